"""The dashboard's own process on a study that really ran, asked by HTTP and looked at with a real browser."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from rank_search import api
from rank_search.export.rank_map_file import RankMapFile
from tests.integration.conftest import MakeStudy, rank_search, violations

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page


@dataclass(frozen=True)
class Served:
    """A study, and the address of its page."""

    study: Path
    page: str

    @property
    def root(self) -> str:
        return self.page.partition("/dashboard")[0]

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.root + path, timeout=30) as answer:
            return json.loads(answer.read())


@contextmanager
def dashboard(study: Path) -> Iterator[str]:
    """The command in a process of its own, on any free port; yields the address it tells."""
    command = [sys.executable, "-m", "rank_search", "dashboard", str(study), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stderr is not None
        line = process.stdout.readline()
        assert line.startswith("dashboard at http://127.0.0.1:"), process.stderr.read()
        yield line.split()[-1]
    finally:
        process.terminate()
        process.communicate(timeout=30)


@pytest.fixture(scope="module")
def served(make_study: MakeStudy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    study = make_study(tmp_path_factory.mktemp("dashboard"))
    assert rank_search("run", study).code == 0
    with dashboard(study) as page:
        yield Served(study, page)


def test_workers_write_the_dashboard_as_they_search(make_study: MakeStudy, tmp_path: Path) -> None:
    """What a plain optuna-dashboard would show, with no rank-search there."""
    import optuna
    from optuna_dashboard import get_note

    study = make_study(tmp_path)
    rank_search("run", study)
    told = optuna.load_study(study_name="tiny", storage=f"sqlite:///{tmp_path}/tiny.db")
    assert "6 of 6 trials finished" in get_note(told)
    attributes = told._storage.get_study_system_attrs(told._study_id)
    for point in api.front(study):
        note = attributes[f"dashboard:{told.trials[point.trial]._trial_id}:note_str:0"]
        assert f"# Trial {point.trial}, on the front" in note
    for trial in told.trials:
        assert {"fidelity", "kept_of_targets", "perplexity", "seconds", "source", "worker"} <= set(trial.user_attrs)
        assert all(len(str(value)) < 100 for value in trial.user_attrs.values())


def test_the_api_returns_note_figures_and_artifacts(served: Served) -> None:
    [summary] = served.get("/api/studies")["study_summaries"]
    detail = served.get(f"/api/studies/{summary['study_id']}")
    assert detail["objective_names"] == ["validation loss", "parameters"]
    assert detail["note"]["body"].startswith("# tiny\n")
    assert [graph["id"] for graph in detail["plotly_graph_objects"]] == [
        "rank-search-1-front", "rank-search-2-kept-fractions", "rank-search-3-predicted-and-measured",
        "rank-search-4-hypervolume", "rank-search-5-spectra",
    ]  # fmt: skip
    for graph in detail["plotly_graph_objects"]:
        assert json.loads(graph["graph_object"])["data"]
    front = {point.trial for point in api.front(served.study)}
    for trial in detail["trials"]:
        names = sorted(artifact["filename"] for artifact in trial["artifacts"])
        assert names == (["rank_map.json", "rank_map.png", "train_loss.png"] if trial["number"] in front else [])


def test_a_rank_map_downloads_and_applies(served: Served) -> None:
    detail = served.get("/api/studies/1")
    point = api.front(served.study)[0]
    [trial] = [trial for trial in detail["trials"] if trial["number"] == point.trial]
    [artifact] = [one for one in trial["artifacts"] if one["filename"] == "rank_map.json"]
    with urllib.request.urlopen(f"{served.root}/artifacts/1/{trial['trial_id']}/{artifact['artifact_id']}") as answer:
        assert answer.headers["Content-Type"] == "application/json"
        content = answer.read()
    path = served.study.parent / "downloaded.json"
    path.write_bytes(content)
    assert RankMapFile.read(path).rank_map == point.rank_map
    done = rank_search("apply", path, "-o", served.study.parent / "compressed", "--no-finetune")
    assert (done.code, "compressed" in done.out) == (0, True)


@pytest.mark.parametrize("path", ["/artifacts/1/1/1-1-0", "/artifacts/1/1/..%2f..%2ftiny.db", "/artifacts/1/1/ffff"])
def test_no_artifact_but_those_of_the_front_can_be_had(served: Served, path: str) -> None:
    off = max(set(range(6)) - {point.trial for point in api.front(served.study)}, default=None)
    if path.endswith("1-1-0") and off is not None:
        path = f"/artifacts/1/{off + 1}/1-{off:x}-0"
    elif path.endswith("1-1-0"):
        path = "/artifacts/1/1/1-5-0"  # of another trial
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(served.root + path)
    assert caught.value.code == 404
    caught.value.close()


def test_a_study_cannot_be_deleted_through_it(served: Served) -> None:
    request = urllib.request.Request(f"{served.root}/api/studies/1", method="DELETE")
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request)
    assert caught.value.code == 403
    caught.value.close()
    assert served.get("/api/studies")["study_summaries"]


def test_an_address_that_others_reach_is_one_clear_line(served: Served) -> None:
    refused = rank_search("dashboard", served.study, "--host", "0.0.0.0")
    assert refused.code == 2
    assert "has no login" in refused.err
    assert refused.err.count("\n") == 1


@pytest.fixture(scope="module")
def browser_page(browser: Browser) -> Page:
    """A page of its own."""
    return browser.new_page(viewport={"width": 1400, "height": 1000})


def test_the_dashboards_pages_show_note_figures_and_artifacts(served: Served, browser_page: Page) -> None:
    page, point = browser_page, api.front(served.study)[0]
    page.goto(f"{served.page}/note")
    page.get_by_text("Best point of the front for a budget").wait_for()
    page.goto(served.page)
    for title in ("Hypervolume that the front dominates", "Predicted and measured loss"):
        page.get_by_text(title).first.wait_for()
    page.goto(f"{served.page}/trials?numbers={point.trial}")
    page.get_by_text(f"Trial {point.trial}, on the front").wait_for()
    with page.expect_download() as download:
        page.locator("a[download='rank_map.json']").click()
    file = RankMapFile.model_validate_json(Path(download.value.path()).read_text(encoding="utf-8"))
    assert file.rank_map == point.rank_map
    # Nothing on the page is wider than the window, as a rank map among the attributes would be.
    assert page.evaluate("document.documentElement.scrollWidth") <= 1400


def test_a_report_opens_from_disk_and_asks_no_network(served: Served, browser_page: Page) -> None:
    path = served.study.parent / "report.html"
    assert rank_search("report", served.study, "-o", path).code == 0
    asked: list[str] = []
    faults: list[str] = []
    browser_page.on("request", lambda request: asked.append(request.url))
    browser_page.on("pageerror", lambda error: faults.append(str(error)))
    browser_page.goto(path.as_uri())
    browser_page.wait_for_function("document.querySelectorAll('.figure .main-svg').length >= 5")
    assert (asked, faults) == ([path.as_uri()], [])
    assert browser_page.locator("#rank-search-1-front .legendtext").all_inner_texts()
    assert violations(browser_page) == []
