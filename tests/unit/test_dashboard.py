"""What a dashboard shows of a study: notes, figures, files, whose turn it is, and who may ask."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import plotly.graph_objects as go
import pytest
from optuna_dashboard import get_note

from rank_search.dashboard.artifacts import ArtifactReader
from rank_search.dashboard.content import read_content, show
from rank_search.dashboard.figures import MOST_MAPS, front_figure, hypervolumes
from rank_search.dashboard.notes import study_note, trial_note
from rank_search.dashboard.refreshing import LEAST_PAUSE, SHARE, Refreshing
from rank_search.dashboard.spectra import Spectra
from rank_search.errors import InputError
from rank_search.export.rank_map_file import RankMapFile
from rank_search.study import board
from rank_search.study.overview import Overview, read_overview
from rank_search.study.serving import check_host, read_only
from rank_search.study.store import StudyStore
from rank_search.study.watching import WORST_LOSS
from tests.contract.synthetic import make_allocator, measure, open_study

TRIALS = 24
DENSE_LOSS = 2.9


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A study with a goal, some of whose trials miss it."""
    url = f"sqlite:///{tmp_path_factory.mktemp('dashboard')}/s.db"
    study = open_study(url, ladder=[0.9, 0.5], sampler="random", seed=3, max_loss=3.3)
    study.set_dense_loss(DENSE_LOSS)
    for number in range(TRIALS):
        proposal = study.ask()
        measured = measure(proposal.rank_map)
        study.tell(proposal, replace(measured, loss=measured.loss + 0.02 * (number % 3), train_losses=(3.0, 2.5, 2.25)))
    study.close()
    return url


@pytest.fixture
def store(database: str) -> Iterator[StudyStore]:
    with StudyStore(database) as opened:
        yield opened


@pytest.fixture
def overview(store: StudyStore) -> Overview:
    return read_overview(store, "tiny")


def spectra() -> Spectra:
    allocator = make_allocator()
    tails = {
        curve.shape.name: [*(2.0**-rank for rank in range(min(curve.shape.m, curve.shape.n))), 0.0]
        for curve in allocator.curves
    }
    return Spectra.of_tails(allocator.space.shapes, tails)  # type: ignore[arg-type]


def test_an_overview_holds_every_measured_trial_and_its_prediction(overview: Overview, store: StudyStore) -> None:
    stored = {trial.number: trial for trial in store.trials("tiny")}
    assert [trial.number for trial in overview.trials] == sorted(n for n in stored if stored[n].measurement)
    for trial in overview.trials:
        measured = stored[trial.number].measurement
        assert measured is not None
        assert (trial.loss, trial.num_params, trial.state) == (
            measured.loss, measured.num_params, stored[trial.number].state,
        )  # fmt: skip
        assert trial.predicted_rise == pytest.approx(make_allocator().predicted_rise(stored[trial.number].rank_map))


def test_the_note_tells_what_is_searched_the_front_and_the_goals(overview: Overview) -> None:
    note = study_note(overview, 7)
    assert "2.9000 nats per token" in note
    assert "a loss of at most 3.3" in note.lower()
    assert f"{overview.status.infeasible} trials miss them" in note
    assert overview.status.infeasible > 0
    assert "rank-search export tiny --kept" in note
    for point in overview.front:
        row = next(
            line for line in note.splitlines() if line.startswith(f"| [{point.trial}](") and point.source in line
        )
        assert f"{point.num_params:,}" in row
        assert f"{point.loss:.4f}" in row
    # The budget's row names the closed form of that very budget.
    closed = next(trial.loss for trial in overview.highest if trial.source == "closed form 0.9")
    assert any(line.startswith("| 0.9 |") and f"{closed:.4f}" in line for line in note.splitlines())


def test_a_trials_note_has_ranks_by_type_and_every_loss(overview: Overview) -> None:
    point = overview.front[0]
    note = trial_note(point, overview)
    ranks = sorted(rank for name, rank in point.rank_map.items() if name.endswith(".mlp"))
    row = next(line for line in note.splitlines() if line.startswith("| mlp |"))
    assert [cell.strip() for cell in row.split("|")][2] == "3"
    if ranks:
        assert f"| {ranks[0]} | " in row
        assert f" {ranks[-1]} |" in row
    assert f"| tuned | 1,000 | {point.loss:.4f} |" in note


def test_figures_are_plotly_s_and_show_the_studys_own_numbers(overview: Overview, store: StudyStore) -> None:
    drawn = read_content(store, "tiny", spectra()).figures
    assert len(drawn) == 5
    for figure in drawn.values():
        go.Figure(figure)  # refuses what Plotly does not know
        json.dumps(figure, allow_nan=False)
        assert len(figure["layout"]["title"]["text"]) <= 40  # the dashboard's cards are 370 pixels wide at the least
    traces = {trace.get("name"): trace for trace in drawn["rank-search-1-front"]["data"]}
    assert traces["front"]["x"] == [point.num_params for point in overview.front]
    assert traces["front"]["y"] == [round(point.loss, 5) for point in overview.front]
    assert traces["front"]["error_y"]["array"] == [0.01] * len(overview.front)
    assert len(traces["closed form"]["x"]) == len(traces["uniform"]["x"]) == 2
    assert traces["dense model"]["y"] == [DENSE_LOSS]
    predicted = drawn["rank-search-3-predicted-and-measured"]["data"][0]
    assert len(predicted["x"]) == len(overview.highest)
    maps = drawn["rank-search-2-kept-fractions"]
    assert len(maps["data"]) == min(len(overview.front), MOST_MAPS) == len(maps["layout"]["sliders"][0]["steps"])
    assert [trace["visible"] for trace in maps["data"]].count(True) == 1
    assert all(0 < kept <= 1 for trace in maps["data"] for row in trace["z"] for kept in row)


def test_references_are_allocations_that_seeded_the_study_and_nothing_else(overview: Overview) -> None:
    sources = ["closed form 0.9", "svd-llm 0.8", "svd-llm 0.5", "fitted", "by hand 1 12345678", "warm-start"]
    trials = tuple(replace(overview.trials[0], number=n, source=source) for n, source in enumerate(sources))
    figure = front_figure(replace(overview, trials=trials))
    assert figure is not None
    names = {trace["name"]: len(trace["x"]) for trace in figure["data"] if trace.get("name")}
    assert names == {"other trials": 3, "front": len(overview.front), "closed form": 1, "svd-llm": 2, "dense model": 1}


def test_the_hypervolume_ends_at_the_fronts_own_and_never_falls(overview: Overview) -> None:
    grown = [area for _, area, _ in hypervolumes(overview)]
    assert grown == sorted(grown)
    dense = overview.facts.model_params
    assert grown[-1] == pytest.approx(overview.front.hypervolume(DENSE_LOSS + WORST_LOSS, dense) / dense)


def test_a_spectrum_is_what_each_rank_saves() -> None:
    curve = spectra().curves[0]
    assert curve.layers == 3
    assert curve.ranks[0] == 1
    assert curve.middle[0] == curve.low[0] == curve.high[0] == 0.5  # 2^0 - 2^-1
    assert all(high >= low for high, low in zip(curve.high, curve.low, strict=True))


def test_optuna_dashboard_reads_what_was_written_and_a_second_time_changes_nothing(database: str) -> None:
    with StudyStore(database) as store:
        show(store, "tiny", spectra())
        assert show(store, "tiny", spectra()) == 0
        front = store.front("tiny")
        assert json.loads(board.stored_figure(store.engine, "tiny", "rank-search-1-front") or "")["data"]
        # Without a bank at hand, the spectra stay as a worker has drawn them.
        assert "rank-search-5-spectra" in read_content(store, "tiny").figures
    study = optuna.load_study(study_name="tiny", storage=database)
    assert get_note(study).startswith("# tiny\n")
    assert study.metric_names == ["validation loss", "parameters"]
    attributes = study._storage.get_study_system_attrs(study._study_id)
    noted = [trial.number for trial in study.trials if f"dashboard:{trial._trial_id}:note_ver" in attributes]
    assert noted == sorted(point.trial for point in front)


def test_what_people_write_stays_and_what_left_the_front_goes(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/s.db"
    study = open_study(url, ladder=[0.9, 0.5])
    first, second = study.ask(), study.ask()
    study.tell(first, measure(first.rank_map, 5.0))
    with StudyStore(url) as store:
        show(store, "tiny")
        told = optuna.load_study(study_name="tiny", storage=url)
        body = get_note(told)
        storage, study_id = told._storage, told._study_id
        storage.set_study_system_attr(study_id, "dashboard:note_str:0", f"{body}\n\nMine, of a person.")
        before = storage.get_study_system_attrs(study_id)
        assert any(key.startswith("dashboard:artifacts:1:") for key in before)
        study.tell(second, measure(second.rank_map, 4.0))
        assert [point.trial for point in store.front("tiny")] == ([1] if second_is_smaller(first, second) else [1, 0])
        show(store, "tiny")
        after = storage.get_study_system_attrs(study_id)
    study.close()
    note = get_note(optuna.load_study(study_name="tiny", storage=url))
    assert note.endswith("Mine, of a person.")
    assert note.count(board.HAND_WRITTEN) == 1
    assert after["dashboard:note_ver"] == before["dashboard:note_ver"] + 1
    assert any(key.startswith("dashboard:artifacts:2:") for key in after)


def second_is_smaller(first: Any, second: Any) -> bool:
    """Whether the second proposal dominates the first by its size, given its lower loss."""
    space = make_allocator().space
    return space.num_params(second.rank_map) <= space.num_params(first.rank_map)


def test_artifacts_are_a_rank_map_that_validates_its_picture_and_the_fine_tune(
    store: StudyStore, overview: Overview, tmp_path: Path
) -> None:
    from rank_search.dashboard.artifacts import artifacts

    reader, point = ArtifactReader(store), overview.front[0]
    files = artifacts(overview, board.optuna_id(store.engine, "tiny"))[point.trial]
    assert [file.filename for file in files] == ["rank_map.json", "rank_map.png", "train_loss.png"]
    content = {file.filename: reader.read(file.id) for file in files}
    path = tmp_path / "rank_map.json"
    path.write_bytes(content["rank_map.json"] or b"")
    read = RankMapFile.read(path)
    assert read.rank_map == point.rank_map
    assert read.study.trial == point.trial
    for name in ("rank_map.png", "train_loss.png"):
        assert (content[name] or b"").startswith(b"\x89PNG")


@pytest.mark.parametrize("artifact", ["1-0-9", "63-0-0", "1-ffff-0", "0", "-", "1-0-0-0"])
def test_an_artifact_that_is_not_there_is_none(store: StudyStore, artifact: str) -> None:
    assert ArtifactReader(store).read(artifact) is None


def test_one_worker_at_a_time_writes_the_board(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/s.db"
    open_study(url).close()
    with StudyStore(url) as store:
        engine = store.engine
        assert board.claim_board(engine, "tiny", "a")
        assert not board.claim_board(engine, "tiny", "b")
        board.release_board(engine, "tiny", "a", pause=3600.0)
        assert not board.claim_board(engine, "tiny", "b")
        board.release_board(engine, "tiny", "a", pause=0.0)
        assert board.claim_board(engine, "tiny", "b")


def test_a_worker_spends_no_more_than_its_share_on_the_dashboard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rank_search.dashboard import refreshing

    url = f"sqlite:///{tmp_path}/s.db"
    open_study(url).close()
    now, spent = [0.0], []

    def costly(*_: object) -> int:
        spent.append(0.5 if len(spent) % 2 else 0.25)
        now[0] += spent[-1]
        return 1

    monkeypatch.setattr(refreshing, "show", costly)
    monkeypatch.setattr(refreshing, "claim_board", lambda *_: True)
    with Refreshing(url, "tiny", clock=lambda: now[0]) as dashboard:
        dashboard.begin()
        for _ in range(1000):
            now[0] += 1.0  # a trial
            dashboard.after_trial()
    assert len(spent) > 10
    assert sum(spent) <= SHARE * now[0] + 0.25  # by which a time may be dearer than the last one
    assert LEAST_PAUSE >= 1


def test_trouble_with_the_dashboard_is_told_once_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rank_search.dashboard import refreshing

    def fails(*_: object) -> int:
        raise InputError("no room")

    url = f"sqlite:///{tmp_path}/s.db"
    open_study(url).close()
    monkeypatch.setattr(refreshing, "show", fails)
    told: list[str] = []
    with Refreshing(url, "tiny", on_trouble=told.append) as dashboard:
        dashboard.end()
        dashboard.end()
    assert told == ["the dashboard is not current: no room"]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", ""])
def test_an_address_that_others_reach_is_refused(host: str) -> None:
    with pytest.raises(InputError, match="has no login"):
        check_host(host)


@pytest.mark.parametrize(
    ("method", "path", "host", "status"),
    [
        ("GET", "/api/studies", "127.0.0.1:80", "200 OK"),
        ("HEAD", "/", "localhost:80", "200 OK"),
        ("PUT", "/api/studies/1/note", "127.0.0.1:80", "200 OK"),
        ("PUT", "/api/studies/1/12/note", "127.0.0.1:80", "200 OK"),
        ("GET", "/api/studies", "evil.example:80", "403 Forbidden"),
        ("DELETE", "/api/studies/1", "127.0.0.1:80", "403 Forbidden"),
        ("POST", "/api/trials/1/tell", "127.0.0.1:80", "403 Forbidden"),
        ("POST", "/api/studies/1/rename", "127.0.0.1:80", "403 Forbidden"),
        ("PUT", "/api/studies/1/preference_feedback_component", "127.0.0.1:80", "403 Forbidden"),
        ("POST", "/api/studies/1/note", "127.0.0.1:80", "403 Forbidden"),
    ],
)
def test_the_dashboard_is_read_only_but_for_notes(method: str, path: str, host: str, status: str) -> None:
    answers: list[str] = []

    def app(_environ: object, start_response: Any) -> list[bytes]:
        start_response("200 OK", [])
        return []

    guarded = read_only(app, ["127.0.0.1:80", "localhost:80"])
    environ = {"REQUEST_METHOD": method, "PATH_INFO": path, "HTTP_HOST": host}
    list(guarded(environ, lambda line, _headers: answers.append(line)))  # type: ignore[arg-type, return-value, func-returns-value]
    assert answers == [status]
