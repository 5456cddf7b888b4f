"""The service's page in a real browser: logged in, watched, exported from, submitted to; by mouse and by keyboard."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from rank_search.export.rank_map_file import RankMapFile
from rank_search.study.store import StudyStore
from tests.contract.synthetic import open_study, run_trials
from tests.data.service import MEASURED, WANTED, Served, on_port, served
from tests.integration.conftest import violations
from tests.integration.test_service_process import service as process_of_service

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

QUICKSTART = Path(__file__).resolve().parents[2] / "studies" / "quickstart"
FILE = 'name = "from-page"\n[model]\nsource = "org/model"\n[search]\ntrials = 3\n'


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Served]:
    with served(tmp_path) as started:
        yield started


@pytest.fixture
def address(service: Served) -> Iterator[str]:
    with on_port(service) as url:
        yield url


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page on which nothing may go wrong, the content security policy included."""
    context = browser.new_context(viewport={"width": 1200, "height": 1000})
    opened = context.new_page()
    faults: list[str] = []
    opened.on("pageerror", lambda error: faults.append(str(error)))
    opened.on("console", lambda told: faults.append(told.text) if told.type == "error" else None)
    yield opened
    context.close()
    # Chromium tells of every refusal; the page shows them to whom they concern.
    assert [fault for fault in faults if not fault.startswith("Failed to load resource: the server responded")] == []


def log_in(page: Page, address: str, token: str) -> None:
    page.goto(f"{address}/service/")
    page.get_by_label("Token").fill(token)
    page.get_by_role("button", name="Log in").click()
    page.get_by_role("heading", name="Studies").wait_for()


def test_the_page_shows_a_front_that_grows_and_exports_its_rank_maps(service: Served, address: str, page: Page) -> None:
    log_in(page, address, service.read)
    page.get_by_role("link", name="tiny").click()
    points = page.locator("#plot a")
    with StudyStore(service.storage) as store:
        front = store.front("tiny")
    points.nth(len(front) - 1).wait_for()
    assert points.count() == len(front)
    points.first.hover()
    page.locator("#point").get_by_text(f"Trial {front[0].trial} ({front[0].source})").wait_for()
    table = page.locator("#point table")
    table.wait_for()
    told = table.inner_text()
    for group in ("attn", "mlp"):
        ranks = [rank for name, rank in front[0].rank_map.items() if name.endswith(group)]
        assert f"{group}\t{min(ranks)} to {max(ranks)}" in told
    with page.expect_download() as download:
        points.first.click()
    file = RankMapFile.model_validate_json(Path(download.value.path()).read_text(encoding="utf-8"))
    assert file.rank_map == front[0].rank_map
    study = open_study(service.storage, ladder=[0.9, 0.5], sampler="random", trials=WANTED)
    run_trials(study, 2)
    study.close()
    page.get_by_text(f"{MEASURED + 2} of {WANTED} trials").wait_for()
    page.get_by_role("cell", name=f"{MEASURED + 1}", exact=True).first.wait_for()
    assert page.get_by_role("button", name="Pause").count() == 0  # of one who may only read
    with StudyStore(service.storage) as store:
        points.nth(len(store.front("tiny")) - 1).wait_for()


def test_a_study_is_submitted_and_steered_on_the_page(service: Served, address: str, page: Page) -> None:
    log_in(page, address, service.write)
    page.get_by_label("Study file (TOML)").fill('name = "../x"')
    page.get_by_role("button", name="Submit").click()
    with page.expect_response("**/v1/studies"):  # what is asked again and again leaves the message where it is
        page.get_by_role("alert").get_by_text("name: String should match pattern").wait_for()
    page.get_by_role("alert").get_by_text("name: String should match pattern").wait_for()
    page.get_by_label("Study file (TOML)").fill(FILE)
    page.get_by_role("button", name="Submit").click()
    page.get_by_role("heading", name="from-page").wait_for()
    page.locator("#progress").get_by_text("submitted. 0 of 3 trials").wait_for()
    page.get_by_role("button", name="Pause").click()
    page.locator("#progress").get_by_text("paused").wait_for()
    page.get_by_role("button", name="Resume").click()
    page.locator("#progress").get_by_text("submitted").wait_for()
    page.get_by_role("button", name="Stop").click()
    page.locator("#progress").get_by_text("stopped").wait_for()
    page.get_by_role("link", name="All studies").click()
    page.get_by_role("link", name="from-page").wait_for()
    page.get_by_role("button", name="Log out").click()
    page.get_by_label("Token").wait_for()
    assert page.context.cookies() == []


@pytest.mark.slow
def test_the_quickstart_study_is_submitted_grows_and_exports(page: Page, tmp_path: Path) -> None:
    """The repository's own study and model, its trials fewer and shorter, by workers of a service of its own."""
    study = (QUICKSTART / "study.toml").read_text(encoding="utf-8")
    changes = (
        (r'"model"', json.dumps(str(QUICKSTART / "model"))),
        (r"^trials = \d+", "trials = 5"),
        (r"^steps = \d+", "steps = 1"),
        (r"^calibration_blocks = \d+", "calibration_blocks = 16"),
    )
    for pattern, value in changes:
        study, count = re.subn(pattern, value, study, flags=re.MULTILINE)
        assert count == 1
    with process_of_service(tmp_path / "service", "--root", str(QUICKSTART), "--workers", "1") as (client, _):
        page.goto(f"{client.base_url}/service/")
        page.get_by_text("There are no studies yet.").wait_for()
        assert violations(page) == []
        page.get_by_label("Study file (TOML)").fill(study)
        page.get_by_role("button", name="Submit").click()
        page.get_by_role("heading", name="quickstart").wait_for()
        points, seen = page.locator("#plot a"), set()
        page.locator("#progress").get_by_text("of 5 trials").wait_for()
        deadline = time.monotonic() + 300
        while not (told := page.locator("#progress").inner_text()).startswith("ended"):
            assert time.monotonic() < deadline, told
            seen.add(points.count())
            page.wait_for_timeout(100)
        assert any(0 < count < points.count() for count in seen)  # it grew
        with page.expect_download() as download:
            points.first.click()
        path = tmp_path / download.value.suggested_filename
        download.value.save_as(path)
        front = client.get("/v1/studies/quickstart/front").json()["points"]
        assert points.count() == len(front)
        page.goto("about:blank")
    file = RankMapFile.model_validate_json(path.read_text(encoding="utf-8"))
    assert path.name == f"quickstart-trial-{front[0]['trial']}.rank_map.json"
    assert file.measurement is not None
    assert file.measurement.loss == front[0]["loss"]


def test_the_keyboard_reaches_points_and_asks_for_their_checkpoints(service: Served, address: str, page: Page) -> None:
    log_in(page, address, service.write)
    page.goto(f"{address}/service/#/tiny")
    page.locator("#plot a").first.wait_for()
    page.get_by_role("button", name="Stop").focus()
    page.keyboard.press("Tab")
    page.locator("#point").get_by_text("of the target layers kept").wait_for()
    assert page.evaluate("document.activeElement.getAttribute('aria-label')").endswith("downloads its rank map")
    first = page.evaluate("document.activeElement.dataset.trial")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.dataset.trial") != first
    page.keyboard.press("Home")
    assert page.evaluate("document.activeElement.dataset.trial") == first
    page.keyboard.press("Tab")  # one stop for all points
    assert page.evaluate("document.activeElement.id") == "apply"
    page.keyboard.press("Shift+Tab")
    with page.expect_download() as download:
        page.keyboard.press("Enter")
    assert json.loads(Path(download.value.path()).read_text(encoding="utf-8"))["schema_version"] == 1
    page.get_by_role("button", name="Write its checkpoint").focus()
    page.keyboard.press("Enter")
    page.get_by_role("cell", name="1 (apply)").wait_for()


def test_the_page_of_a_study_that_is_not_there_says_so_and_shows_nothing_else(
    service: Served, address: str, page: Page
) -> None:
    log_in(page, address, service.read)
    page.goto(f"{address}/service/#/nothing")
    page.get_by_role("alert").get_by_text("there is no study 'nothing'").wait_for()
    assert page.get_by_role("link", name="All studies").is_visible()
    assert not page.locator("#details").is_visible()


def test_nothing_on_the_page_is_in_anyones_way(service: Served, address: str, page: Page) -> None:
    page.goto(f"{address}/service/")
    page.get_by_label("Token").fill("wrong")
    assert violations(page) == []
    page.get_by_role("button", name="Log in").click()
    page.get_by_role("alert").get_by_text("the token is not valid").wait_for()
    assert violations(page) == []
    log_in(page, address, service.write)
    page.get_by_role("link", name="tiny").wait_for()
    assert violations(page) == []
    page.get_by_label("Study file (TOML)").fill('name = "../x"')
    page.get_by_role("button", name="Submit").click()
    page.get_by_role("alert").get_by_text("should match pattern").wait_for()
    assert violations(page) == []
    page.get_by_label("Study file (TOML)").fill(FILE)
    page.get_by_role("button", name="Submit").click()
    page.locator("#plot").get_by_text("No trial has ended yet.").wait_for()
    assert violations(page) == []
    page.goto(f"{address}/service/#/nothing")
    page.get_by_role("alert").get_by_text("there is no study 'nothing'").wait_for()
    assert violations(page) == []
    page.goto(f"{address}/service/#/tiny")
    page.locator("#plot a").first.hover()
    page.locator("#point table").wait_for()
    for size, scheme in (((1200, 1000), "light"), ((1200, 1000), "dark"), ((400, 800), "light")):
        page.set_viewport_size({"width": size[0], "height": size[1]})
        page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        assert violations(page) == []
        assert page.evaluate("document.documentElement.scrollWidth") <= size[0]  # tables scroll in their own place


def test_the_dashboard_opens_behind_the_same_login(service: Served, address: str, page: Page) -> None:
    page.goto(f"{address}/dashboard")
    page.get_by_label("Token").wait_for()  # sent to the page first
    log_in(page, address, service.read)
    page.get_by_role("link", name="tiny").click()
    page.get_by_role("link", name="Open in the dashboard").click()
    page.get_by_text("tiny").first.wait_for()
    assert page.url.startswith(f"{address}/dashboard/studies/1")
