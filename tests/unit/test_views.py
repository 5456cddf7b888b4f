"""A study in the terminal, in a notebook, and as one HTML file."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from rank_search import api
from rank_search.cli.plotting import Canvas, Range
from rank_search.cli.watch_screen import Watched, last_trials, screen, summary, trial_line
from rank_search.dashboard.report import html, write_report
from rank_search.dashboard.tables import Table
from rank_search.front import Front
from rank_search.study.store import StudyStore
from tests.contract.synthetic import open_study, run_trials
from tests.integration.conftest import rank_search


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A study that has ended."""
    url = f"sqlite:///{tmp_path_factory.mktemp('views')}/s.db"
    study = open_study(url, ladder=[0.9, 0.5], sampler="random", trials=12)
    study.set_dense_loss(2.9)
    run_trials(study, 12)
    study.fail(study.ask(), "<b>no memory</b>")
    study.set_stop_reason("12 trials are finished")
    study.close()
    return url


class _Elements(HTMLParser):
    """The elements of a page, the addresses it names, and its text by element."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.open: list[str] = []
        self.texts: dict[str, str] = {}
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.open.append(dict(attrs).get("id") or tag)
        self.addresses += [value or "" for key, value in attrs if key in {"src", "href", "action", "data"}]

    def handle_endtag(self, tag: str) -> None:
        if self.open:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts[self.open[-1]] = self.texts.get(self.open[-1], "") + data


def test_a_report_is_one_file_with_every_figure_and_the_front(database: str, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(database, "tiny", path)
    page = _Elements(path.read_text(encoding="utf-8"))
    assert page.addresses == []  # nothing is fetched
    assert "link" not in page.tags
    assert "img" not in page.tags
    figures = json.loads(page.texts["figures"])
    assert [name for name in page.texts if name.startswith("rank-search-")] == []  # a browser fills them
    text = path.read_text(encoding="utf-8")
    for name in figures:
        assert f'id="{name}"' in text
    with StudyStore(database) as store:
        for point in store.front("tiny"):
            assert f">{point.loss:.4f}</td>" in text
    assert "&lt;b&gt;no memory&lt;/b&gt;" in text


def test_cells_of_a_report_are_text() -> None:
    assert "<script>" not in html(Table(("trial", "reason"), (("1", "<script>alert(1)</script>"),)))


def test_watch_draws_the_front_and_tells_of_workers_and_trials(database: str) -> None:
    with StudyStore(database) as store:
        watched = Watched.read(store, "tiny")
    out = io.StringIO()
    Console(file=out, width=100, highlight=False).print(screen(watched))
    text = out.getvalue()
    assert text.startswith("study tiny: 13 of 12 trials, 1 failed")
    assert "dense model 2.9000" in text
    drawn = "".join(re.findall(r"│(.*)", text))
    assert drawn.count("□") >= 1
    assert drawn.count("★") == 1
    assert max(map(len, text.splitlines())) <= 100
    for trial in last_trials(watched.trials, 6):
        assert f"{trial.loss:.4f}" in text


def test_watch_prints_once_and_ends_where_the_search_has_stopped(database: str) -> None:
    once = rank_search("watch", "tiny", "--storage", database, "--once")
    assert (once.code, once.err) == (0, "")
    assert "closed form" in once.out
    lines = rank_search("watch", "tiny", "--storage", database)
    with StudyStore(database) as store:
        watched = Watched.read(store, "tiny")
    assert lines.out == summary(watched) + "\n"
    told = trial_line(watched.trials[0], on_front=True)
    assert told.startswith("trial 0 (closed form 0.9): kept 0.")
    assert told.endswith(", front")


def test_a_canvas_puts_points_where_they_belong() -> None:
    canvas = Canvas(2, 1, Range(0.0, 1.0), Range(0.0, 1.0))
    canvas.point(0.0, 1.0, "red")
    canvas.point(1.0, 0.0, "red")
    canvas.point(2.0, 0.0, "red")  # outside
    assert [line.plain for line in canvas.lines()] == [chr(0x2801) + chr(0x2880)]
    canvas.mark(0.0, 1.0, "★", "")
    canvas.point(0.0, 1.0, "red")
    assert canvas.lines()[0].plain == "★" + chr(0x2880)


def test_a_notebook_shows_the_front_as_picture_and_table(database: str) -> None:
    view = api.view("tiny", storage=database)
    shown = view.front._repr_html_()
    page = _Elements(shown)
    assert page.tags.count("circle") == len(view.front)
    assert page.tags.count("tr") == len(view.front) + 1
    assert 'src="data:image/png;base64,' in view._repr_html_()
    assert Front()._repr_html_() == "<p>The front is empty.</p>"
