"""Studies of several fidelities on a real model: what each rung measures, and a search over them."""

from __future__ import annotations

import json
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import rank_search as rs
from rank_search.api import facts_of
from rank_search.errors import BudgetError, StudyFileError, TargetError
from rank_search.measurement import Fidelity, Measurement
from rank_search.preparing import Prepared, prepare
from rank_search.progress import SILENT, Progress
from rank_search.ranks import RankMap
from rank_search.spec import load_study_file
from rank_search.stop_rules import StopRules
from rank_search.study.records import State
from rank_search.study.study import Study
from rank_search.trial import Evaluator
from rank_search.worker import Outcome, work
from tests.conftest import StudyFactory
from tests.integration.conftest import rank_search

CLIMBING: dict[str, Any] = {"fidelities": ["predicted", "sliced", "tuned"], "sliced_tokens": [64, 128]}
PREDICTED, SLICED, TUNED = Fidelity.PREDICTED, Fidelity.SLICED, Fidelity.TUNED


@pytest.fixture
def prepared(tiny_study: StudyFactory) -> Prepared:
    return prepare(load_study_file(tiny_study(search=CLIMBING)))


def untimed(measurement: Measurement) -> Measurement:
    return replace(measurement, swap_seconds=0, finetune_seconds=0, score_seconds=0, peak_memory=0)


def test_every_rung_scores_the_first_blocks_of_the_next(prepared: Prepared, tiny_study: StudyFactory) -> None:
    evaluator, rank_map = Evaluator(prepared), prepared.allocator.closed_form(0.5)
    measured = list(evaluator.climb(rank_map))
    assert [m.fidelity for m in measured] == [PREDICTED, SLICED, SLICED, SLICED, TUNED]
    assert [len(m.block_losses) for m in measured] == [0, 2, 4, 8, 8]
    predicted, two, four, every, tuned = measured
    assert predicted.loss == evaluator.score().loss + prepared.allocator.predicted_rise(rank_map)
    assert two.block_losses == pytest.approx(every.block_losses[:2], abs=1e-5)
    assert four.block_losses == pytest.approx(every.block_losses[:4], abs=1e-5)
    assert two.standard_error > 0
    assert every.loss == pytest.approx(sum(every.block_losses) / 8)
    untrained = Evaluator(prepare(load_study_file(tiny_study(finetune={"steps": 0}))))
    assert untimed(every) == untimed(untrained.measure(rank_map))
    assert untimed(tuned) == untimed(evaluator.measure(rank_map))
    assert [untimed(m) for m in evaluator.climb(rank_map, known=3)] == [untimed(every), untimed(tuned)]


def test_a_climb_that_is_given_up_leaves_the_dense_model(prepared: Prepared) -> None:
    before = {name: tensor.clone() for name, tensor in prepared.model.state_dict().items()}
    climb = Evaluator(prepared).climb(prepared.allocator.closed_form(0.5))
    next(climb)
    next(climb)
    climb.close()
    after = prepared.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_folds_are_sliced_block_by_block_too(tiny_study: StudyFactory) -> None:
    path = tiny_study(validation={"folds": 2}, search=CLIMBING)
    text = "\n".join(line for line in path.read_text().splitlines() if not line.startswith(("train_b", "validation_b")))
    path.write_text(text)
    prepared = prepare(load_study_file(path))
    measured = list(Evaluator(prepared).climb(prepared.allocator.closed_form(0.5)))
    assert [len(m.fold_losses) for m in measured] == [0, 2, 2, 2, 2]
    assert measured[1].tokens == 2 * 31  # one block of each fold
    assert {m.block_losses for m in measured} == {()}


def test_a_search_prunes_promotes_and_says_so(tiny_study: StudyFactory) -> None:
    path = tiny_study(search=CLIMBING | {"trials": 24, "ladder": [0.8, 0.6, 0.5, 0.4], "multiplier_range": 6.0})
    outcomes: list[Outcome] = []
    front = rs.run(path, on_outcome=outcomes.append)
    states = [outcome.state for outcome in outcomes]
    assert states[:8] == [State.COMPLETE] * 8
    assert {point.measurement.fidelity for point in front} == {TUNED}
    view = rs.view(path)
    assert len(view.points) == states.count(State.COMPLETE)
    pruned = [outcome for outcome in outcomes if outcome.state is State.PRUNED]
    assert pruned
    assert all(outcome.measurement and outcome.measurement.fidelity < TUNED for outcome in pruned)
    status = rank_search("status", path)
    assert f"24 of 24 trials finished ({24 - len(pruned)} complete, {len(pruned)} pruned" in status.out
    assert "stopped        24 trials are finished" in status.out
    assert rank_search("run", path, "--settle", "--trials", "30").code == 2
    settled = rank_search("run", path, "--settle")
    assert "Stopped because the front is settled." in settled.out
    more = rs.view(path).trials[len(view.trials) :]
    assert all(trial.promotes is not None and trial.state is State.COMPLETE for trial in more)


class Interrupted(Evaluator):
    """Is interrupted over the fine-tune of its n-th trial."""

    def __init__(self, prepared: Prepared, trial: int) -> None:
        super().__init__(prepared)
        self._left = trial
        self.begun: list[tuple[RankMap, int]] = []

    def climb(
        self, rank_map: RankMap, known: int = 0, progress: Progress = SILENT
    ) -> Generator[Measurement, None, None]:
        self.begun.append((rank_map, known))
        yield from super().climb(rank_map, known, progress)

    def measure(self, rank_map: RankMap, progress: Progress = SILENT) -> Measurement:
        self._left -= 1
        if self._left == 0:
            raise KeyboardInterrupt
        return super().measure(rank_map, progress)


def test_an_interrupted_trial_goes_on_where_it_stopped(prepared: Prepared, tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/s.db"
    evaluator = Interrupted(prepared, 2)
    study = Study.open(prepared.spec, storage, prepared.allocator, facts_of(prepared))
    with pytest.raises(KeyboardInterrupt):
        work(study, evaluator, 4)
    stop = work(study, evaluator, 4)
    study.close()
    assert stop == "4 trials are finished"
    interrupted = evaluator.begun[1][0]
    assert [known for rank_map, known in evaluator.begun if rank_map == interrupted] == [0, 4]
    assert [known for rank_map, known in evaluator.begun if rank_map != interrupted] == [0, 0, 0]


def test_a_nested_study_climbs_within_one_fidelity(tiny_study: StudyFactory) -> None:
    nested = {"mode": "nested", "nested_steps": 8, "nested_ranges": 1, "steps": 0}
    path = tiny_study(finetune=nested, search={"fidelities": ["sliced"], "sliced_tokens": [64]})
    evaluator = Evaluator(prepare(load_study_file(path)))
    assert [rung.blocks for rung in evaluator.rungs] == [2, None]
    front = rs.run(path, trials=6)
    assert {len(point.measurement.block_losses) for point in front} == {0}
    assert {point.measurement.tokens for point in front} == {8 * 31}


@pytest.mark.parametrize(
    ("rules", "trials", "reason"),
    [
        (StopRules(gpu_seconds=1e-9), 1, "measurements have taken"),
        (StopRules(target_loss=99.0, target_kept=0.85), 1, "trial 0 has a loss of"),
        (StopRules(flat_trials=2, flat_tolerance=0.999), 3, "in 2 trials the hypervolume has grown by"),
        (StopRules(wall_time=1e-9), 0, "the run has searched for"),
    ],
)
def test_stop_rules_stop_the_worker(
    prepared: Prepared, tmp_path: Path, rules: StopRules, trials: int, reason: str
) -> None:
    study = Study.open(prepared.spec, f"sqlite:///{tmp_path}/s.db", prepared.allocator, facts_of(prepared))
    stop = work(study, Evaluator(prepared), 9, rules=rules)
    assert stop.startswith(reason)
    assert study.finished() == trials
    study.close()
    assert rs.status("tiny", storage=f"sqlite:///{tmp_path}/s.db").stop_reason == stop


def test_frozen_layers_keep_their_rank_in_every_rank_map(tiny_study: StudyFactory, tmp_path: Path) -> None:
    frozen = tmp_path / "frozen"
    frozen.mkdir()
    path = tiny_study(search={"trials": 5, "ladder": [0.6]})
    text = path.read_text().replace("[data]", '[targets.frozen]\n"*.0.*q_proj" = 3\n"*.1.*" = "dense"\n[data]')
    path.write_text(text)
    rs.run(path)
    for trial in rs.view(path).trials:
        assert trial.rank_map["model.layers.0.self_attn.q_proj"] == 3
        assert not [name for name in trial.rank_map if ".1." in name]
    rs.export(path, knee=True).write(tmp_path / "map.json", folder=path.parent)
    assert json.loads((tmp_path / "map.json").read_text())["ranks"]["model.layers.0.self_attn.q_proj"] == 3
    for old, new, message in [
        ("= 3", "= 3000", "rank 3000, but above"),
        ('"*.1.*"', '"*.7.*"', r"frozen pattern '\*\.7\.\*' fits no target layer"),
    ]:
        path.write_text(text.replace(old, new).replace('"tiny"', '"other"'))
        with pytest.raises(TargetError, match=message):
            rs.prepare(path)


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        (
            {"search": {"fidelities": ["sliced"]}},
            "search.fidelities ends with 'sliced', but the fine-tune of a trial has",
        ),
        ({"search": {"fidelities": ["sliced", "tuned"]}, "finetune": {"steps": 0}}, "let it end with 'sliced'"),
        ({"search": {"fidelities": ["tuned", "sliced"]}}, "once each, in this order"),
        ({"search": {"fidelities": []}}, "fidelities must be some of"),
        ({"search": {"interest": [0.2, 0.5]}}, "lie within min_kept and max_kept"),
        ({"search": {"interest": [0.4, 0.5], "space": "direct"}}, "interest needs a space with a budget"),
        ({"search": {"target_loss": 3.0}}, "target_loss and target_kept go together"),
    ],
)
def test_what_does_not_go_together_is_refused(
    tiny_study: StudyFactory, tables: dict[str, dict[str, Any]], message: str
) -> None:
    with pytest.raises(StudyFileError, match=message):
        load_study_file(tiny_study(**tables))


def test_a_goal_below_the_ladder_is_refused(tiny_study: StudyFactory, prepared: Prepared) -> None:
    space = prepared.space
    most = space.model_params - int(0.4 * space.dense_params)
    path = tiny_study(search={"max_params": most})
    told = r"search\.ladder holds 0\.8, outside search\.min_kept to search\.max_params \(0\.3 to 0\.6\)"
    with pytest.raises(StudyFileError, match=told):
        rs.run(path)
    with pytest.raises(BudgetError, match=r"search\.max_params allows a kept fraction of .*, below search\.min_kept"):
        rs.run(tiny_study(search={"max_params": space.model_params - int(0.8 * space.dense_params)}))
