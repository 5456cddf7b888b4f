"""Debian's Chromium, and the project's own servers for it to look at."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

FIGURES = tuple(re.compile(f"^{start}") for start in ("Front", "Trial ", "Predicted", "Hypervolume", "Spectra"))
"""The beginnings of the titles of the project's own figures in the dashboard."""


def figure(page: Page, title: re.Pattern[str]) -> Locator:
    """A figure on a page of the dashboard."""
    return page.locator(".js-plotly-plot").filter(has=page.locator(".gtitle").get_by_text(title)).first


@contextmanager
def chromium() -> Iterator[Browser]:
    """The browser, without a window."""
    from playwright.sync_api import sync_playwright

    found = shutil.which("chromium")
    if found is None:
        sys.exit("there is no chromium; apt-get install chromium")
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def serving(*command: str) -> Iterator[str]:
    """``rank-search`` with such a command in a process of its own, on any free port; yields the address it tells."""
    arguments = [sys.executable, "-m", "rank_search", *command, "--port", "0"]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().split()[-1]
    finally:
        process.terminate()
        process.wait()
