"""Files of tensors that appear whole, readable for everyone who may read their folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from rank_search.atomic import whole


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, whole or not at all.

    Raises:
        OSError, SafetensorError: it cannot be written; nothing is left behind and an older file is untouched.
    """
    with whole(path) as temporary:
        save_file(dict(tensors), temporary, metadata=dict(metadata))
        # safetensors makes files that nobody else may read; who goes on with one may be another user.
        temporary.chmod(path.parent.stat().st_mode & 0o644)
