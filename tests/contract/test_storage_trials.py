"""Trials and the front in the project's own tables."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import create_engine, text

from rank_search.errors import StorageError
from rank_search.front import Front, FrontPoint
from rank_search.measurement import Fidelity, Measurement
from rank_search.ranks import RankMap
from rank_search.study.records import State
from rank_search.study.store import StudyStore
from tests.contract.synthetic import make_allocator, make_facts, make_spec

MAP = RankMap({"block.0.attn": 3, "block.2.mlp": 5})


@pytest.fixture
def store(storage: str) -> Iterator[StudyStore]:
    with StudyStore(storage) as opened:
        opened.add_study(make_spec("tiny"), make_facts(make_allocator()))
        yield opened


def measured(loss: float, num_params: int, fidelity: Fidelity = Fidelity.TUNED) -> Measurement:
    return Measurement(loss, 0.01, num_params, num_params // 2, 0.5, 0.75, fidelity, 1000, 0.1, 0.2, 0.3, 2**40)


def complete(store: StudyStore, number: int, measurement: Measurement) -> FrontPoint:
    rank_map = RankMap({"block.0.attn": 1 + number})
    store.begin_trial("tiny", number, "tpe", rank_map, "host:1:")
    store.complete_trial("tiny", number, measurement)
    return FrontPoint(number, rank_map, measurement, "tpe")


def test_a_trial_comes_back_as_it_was_stored(store: StudyStore) -> None:
    measurement = measured(0.1 + 0.2, 3 * 2**33)
    store.begin_trial("tiny", 0, "closed form 0.8", MAP, "host:1:")
    store.complete_trial("tiny", 0, measurement)
    (trial,) = store.trials("tiny")
    assert (trial.state, trial.rank_map, trial.measurement) == (State.COMPLETE, MAP, measurement)
    assert list(trial.rank_map) == list(MAP)
    assert trial.finished is not None
    assert trial.finished >= trial.started


@pytest.mark.parametrize("seed", range(3))
def test_the_stored_front_is_the_front_of_all_trials(store: StudyStore, seed: int) -> None:
    rng = random.Random(seed)
    points: list[FrontPoint] = []
    numbers = list(range(24))
    rng.shuffle(numbers)
    for number in numbers:
        # Few distinct values, so that many trials are equal in one objective or both.
        fidelity = rng.choice([Fidelity.SLICED, Fidelity.TUNED, Fidelity.TUNED])
        points.append(complete(store, number, measured(rng.randint(1, 5) / 4, rng.randint(1, 5), fidelity)))
        assert store.front("tiny") == Front.of(points)
    assert store.recompute_front("tiny") == Front.of(points)


def test_a_higher_fidelity_replaces_the_whole_front(store: StudyStore) -> None:
    complete(store, 0, measured(1.0, 10, Fidelity.SLICED))
    complete(store, 1, measured(9.0, 90, Fidelity.CONFIRMED))
    assert [point.trial for point in store.front("tiny")] == [1]


def test_completing_twice_keeps_the_first_measurement(store: StudyStore) -> None:
    first = measured(1.0, 10)
    complete(store, 0, first)
    assert store.complete_trial("tiny", 0, measured(0.5, 5)) == first
    assert [trial.measurement for trial in store.trials("tiny")] == [first]
    assert [point.measurement for point in store.front("tiny")] == [first]


def test_two_writers_at_once_keep_the_front_right(storage: str, store: StudyStore) -> None:
    def write(numbers: range) -> None:
        rng = random.Random(numbers.start)
        with StudyStore(storage) as own:
            for number in numbers:
                complete(own, number, measured(rng.randint(1, 30) / 4, rng.randint(1, 30)))

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(write, [range(0, 20), range(20, 40)]))
    assert len(store.trials("tiny")) == 40
    assert store.front("tiny") == store.recompute_front("tiny")


def test_select_alone_reads_the_front(storage: str, store: StudyStore) -> None:
    store.add_study(make_spec("other"), make_facts(make_allocator()))
    store.begin_trial("other", 0, "tpe", MAP, "host:1:")
    store.complete_trial("other", 0, measured(1000.0, 7))
    complete(store, 0, measured(1.0, 10))
    engine = create_engine(storage.replace("postgresql://", "postgresql+psycopg://"))
    with engine.connect() as connection:
        rows = connection.execute(text("SELECT * FROM rank_search_front WHERE study = 'other'")).mappings().all()
    engine.dispose()
    (row,) = rows
    assert json.loads(row["rank_map"]) == dict(MAP)
    assert (row["trial"], row["loss"], row["num_params"], row["fidelity"]) == (0, 1000.0, 7, "tuned")
    assert row["perplexity"] is None  # exp(1000) is no number


def test_a_failure_keeps_its_reason_and_is_final(store: StudyStore) -> None:
    store.begin_trial("tiny", 0, "tpe", MAP, "host:1:")
    store.fail_trial("tiny", 0, "validation loss is nan")
    store.requeue_trial("tiny", 0, "interrupted")
    with pytest.raises(StorageError, match="trial 0 of study 'tiny' has failed"):
        store.complete_trial("tiny", 0, measured(1.0, 10))
    (trial,) = store.trials("tiny")
    assert (trial.state, trial.reason, trial.measurement) == (State.FAILED, "validation loss is nan", None)
    assert store.status("tiny").failures == ((0, "validation loss is nan"),)
    assert len(store.front("tiny")) == 0


def test_a_measurement_outlives_a_late_failure(store: StudyStore) -> None:
    point = complete(store, 0, measured(1.0, 10))
    store.fail_trial("tiny", 0, "too late")
    assert list(store.front("tiny")) == [point]


def test_status_counts_and_sums(store: StudyStore) -> None:
    assert store.status("tiny").last_activity is None
    store.set_dense_loss("tiny", 0.5)
    complete(store, 0, measured(1.0, 10))
    complete(store, 1, measured(2.0, 5))
    for number in (2, 3, 4):
        store.begin_trial("tiny", number, "tpe", RankMap({"block.0.attn": 1 + number}), "host:1:")
    store.fail_trial("tiny", 2, "no memory")
    store.requeue_trial("tiny", 3, "interrupted")
    status = store.status("tiny")
    assert (status.complete, status.failed, status.requeued, status.running) == (2, 1, 1, 1)
    assert status.finished == store.finished("tiny") == 3
    assert (status.wanted, status.best_loss, status.dense_loss) == (40, 1.0, 0.5)
    assert status.seconds == pytest.approx(1.2)


def test_an_unknown_study_is_refused_with_the_known_names(store: StudyStore) -> None:
    store.add_study(make_spec("big"), make_facts(make_allocator()))
    with pytest.raises(StorageError, match="no study 'tinny'; known studies are big, tiny"):
        store.front("tinny")
    with pytest.raises(StorageError, match="no study 'tinny'"):
        store.begin_trial("tinny", 0, "tpe", MAP, "host:1:")


def test_the_study_file_and_facts_come_back(store: StudyStore) -> None:
    spec = make_spec("other", space="direct", ladder=[0.5])
    facts = make_facts(make_allocator(), revision="abc")
    store.add_study(spec, facts)
    record = store.study("other")
    assert (record.spec, record.facts, record.dense_loss) == (spec, facts, None)
