"""The service's own page: plain files of the package, which hold no data."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from fastapi import FastAPI
from starlette.staticfiles import StaticFiles


def mount(app: FastAPI) -> None:
    """Serve the page at ``/service/``."""
    folder = Path(str(resources.files(__package__).joinpath("static")))
    app.mount("/service", StaticFiles(directory=folder, html=True))
