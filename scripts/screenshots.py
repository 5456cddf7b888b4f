"""Pictures of the dashboard and of the service's page, as the documentation shows them.

    rank-search run studies/quickstart/study.toml
    python scripts/screenshots.py studies/quickstart/study.toml [--out docs]

Debian's Chromium looks at a study that has run: dashboard.png is its note above its figures, service.png its page with
a point of the front pointed at.
"""

from __future__ import annotations

import argparse
import io
import tempfile
from pathlib import Path

from _browser import FIGURES, chromium, figure, serving
from _run import run_script
from PIL import Image
from playwright.sync_api import Browser, FloatRect, Page

from rank_search import api

WIDTH, NOTE_HEIGHT = 1200, 900


def main() -> None:
    args = _arguments()
    storage, name = api.storage_of(str(args.study), args.storage)
    point = api.front(str(args.study), storage=args.storage).knee()
    with chromium() as browser:
        with serving("dashboard", str(args.study), "--storage", storage) as address:
            save(args.out / "dashboard.png", dashboard_pictures(browser, address))
        with (
            tempfile.TemporaryDirectory(prefix="rs-") as folder,
            serving("serve", "--launcher", "none", "--storage", storage, "--folder", folder) as address,
        ):
            save(args.out / "service.png", [service_picture(browser, f"{address}#/{name}", point.trial)])


def dashboard_pictures(browser: Browser, address: str) -> list[bytes]:
    """The study's note, and its figures."""
    page = browser.new_page(viewport={"width": WIDTH, "height": NOTE_HEIGHT})
    page.goto(f"{address}/note")
    page.get_by_text("what is searched").wait_for()
    note = page.screenshot()
    page.goto(address)
    for title in FIGURES:
        figure(page, title).wait_for()
    page.wait_for_timeout(2000)  # Plotly grows into its place
    figures = page.screenshot(full_page=True, clip=around_figures(page))
    page.close()
    return [note, figures]


def around_figures(page: Page) -> FloatRect:
    """The rectangle of the project's own figures."""
    boxes = [figure(page, title).bounding_box() for title in FIGURES]
    found = [box for box in boxes if box is not None]
    left, top = min(box["x"] for box in found), min(box["y"] for box in found)
    right, bottom = (max(box[at] + box[size] for box in found) for at, size in (("x", "width"), ("y", "height")))
    return {"x": left - 20, "y": top - 10, "width": right - left + 40, "height": bottom - top + 20}


def service_picture(browser: Browser, address: str, trial: int) -> bytes:
    """The page of the study."""
    page = browser.new_page(viewport={"width": 1100, "height": 1000})
    page.goto(address)
    page.locator(f"#plot a[data-trial='{trial}']").hover()
    page.locator("#point table").wait_for()
    picture = page.screenshot()
    page.close()
    return picture


def save(path: Path, pictures: list[bytes]) -> None:
    """Write pictures as one, the first on top."""
    opened = [Image.open(io.BytesIO(picture)).convert("RGB") for picture in pictures]
    whole = Image.new("RGB", (max(one.width for one in opened), sum(one.height for one in opened)), "white")
    top = 0
    for one in opened:
        whole.paste(one, ((whole.width - one.width) // 2, top))
        top += one.height
    whole.save(path, optimize=True)
    print(f"{path}: {whole.width} x {whole.height}, {path.stat().st_size:,} bytes")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="the study's file")
    parser.add_argument("--storage", help="the database, where it is not the study's own")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    return parser.parse_args()


if __name__ == "__main__":
    run_script(main)
