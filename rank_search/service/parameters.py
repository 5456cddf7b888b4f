"""Parameters that several routes take in their addresses."""

from __future__ import annotations

from typing import Annotated

from fastapi import Path

from rank_search.service.models import MOST_TRIAL

StudyName = Annotated[
    str, Path(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$", description="The study's name.", examples=["tiny"])
]
Number = Annotated[int, Path(ge=1, le=MOST_TRIAL, description="The job's number.")]
