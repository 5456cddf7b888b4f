"""What a dashboard shows, written and claimed in every kind of database."""

from __future__ import annotations

import json

from rank_search.dashboard.content import show
from rank_search.ranks import RankMap
from rank_search.study import board
from rank_search.study.overview import read_overview
from rank_search.study.store import StudyStore
from tests.contract.synthetic import make_allocator, open_study, run_trials


def test_a_board_is_written_once_and_read_back(storage: str) -> None:
    study = open_study(storage, ladder=[0.9, 0.5])
    study.set_dense_loss(2.9)
    run_trials(study, 4)
    study.close()
    with StudyStore(storage) as store:
        assert show(store, "tiny") > 0
        assert show(store, "tiny") == 0
        drawn = json.loads(board.stored_figure(store.engine, "tiny", "rank-search-1-front") or "")
        assert drawn["data"][1]["x"] == [point.num_params for point in store.front("tiny")]
        assert board.study_of(store.engine, board.optuna_id(store.engine, "tiny")) == "tiny"
        overview = read_overview(store, "tiny")
    for trial, record in zip(overview.trials, run_order(storage), strict=True):
        assert trial.predicted_rise == make_allocator().predicted_rise(record)


def run_order(storage: str) -> list[RankMap]:
    """Rank maps of the measured trials, by number."""
    with StudyStore(storage) as store:
        return [trial.rank_map for trial in store.trials("tiny") if trial.measurement is not None]


def test_a_long_text_is_stored_whole(storage: str) -> None:
    open_study(storage).close()
    text = "½ σ² \\ \"'\n" * 20_000
    with StudyStore(storage) as store:
        board.write_board(store.engine, "tiny", board.Board(note="n", figures={"long": text}))
        assert board.stored_figure(store.engine, "tiny", "long") == text
        board.write_board(store.engine, "tiny", board.Board(note="n", figures={"long": "short"}))
        assert board.stored_figure(store.engine, "tiny", "long") == "short"


def test_the_boards_turns_go_by_the_databases_clock(storage: str) -> None:
    open_study(storage).close()
    with StudyStore(storage) as store:
        assert board.claim_board(store.engine, "tiny", "a")
        assert not board.claim_board(store.engine, "tiny", "b")
        board.release_board(store.engine, "tiny", "a", pause=0.0)
        assert board.claim_board(store.engine, "tiny", "b")
