"""A small made-up model, its study, and what worker processes of the tests do. No torch."""

from __future__ import annotations

import os
import signal
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from rank_search.allocation import Allocator
from rank_search.measurement import Fidelity, Measurement
from rank_search.ranks import LayerShape, RankMap, RankSpace, Storage
from rank_search.spec import StudySpec, parse_study
from rank_search.study.facts import StudyFacts
from rank_search.study.patience import Patience
from rank_search.study.records import State
from rank_search.study.store import StudyStore
from rank_search.study.study import Proposal, Study


def make_allocator(
    layers: int = 3, groups: tuple[tuple[str, int, int], ...] = (("attn", 12, 12), ("mlp", 12, 20)), multiple: int = 1,
    storage: Storage = "two-factor", slower: float = 1.0,
) -> Allocator:  # fmt: skip
    """Blocks of a few layers whose predicted rises decay geometrically, each at its own pace, or a ``slower`` one."""
    shapes = tuple(
        LayerShape(f"block.{depth}.{group}", m, n, group, depth) for depth in range(layers) for group, m, n in groups
    )
    tails = {}
    for index, shape in enumerate(shapes):
        decay = 0.5 + 0.4 * (index % 5) / 5
        energies = decay ** (np.arange(min(shape.m, shape.n)) / slower) * 0.05 * (1 + index)
        tails[shape.name] = np.append(np.cumsum(energies[::-1])[::-1], 0.0)
    return Allocator(RankSpace(shapes, 5000, storage, multiple), tails)


def make_facts(allocator: Allocator, **changes: Any) -> StudyFacts:
    """Facts of a study over ``allocator``."""
    values: dict[str, Any] = {
        "source": "models/tiny",
        "revision": None,
        "weights_digest": "w" * 64,
        "shapes": allocator.space.shapes,
        "model_params": allocator.space.model_params,
        "calibration_digest": "c" * 64,
        "train_digest": "t" * 64,
        "validation_digest": "v" * 64,
        "bank": "b" * 64,
    }
    return StudyFacts(**{**values, **changes})


def make_spec(name: str = "tiny", run: dict[str, Any] | None = None, **search: Any) -> StudySpec:
    """A study file with the given ``[search]`` and ``[run]`` tables, for the made-up model's storage form."""
    targets = {"storage": make_allocator().space.storage}
    tables = {
        "name": name, "model": {"source": "models/tiny"}, "targets": targets, "search": search, "run": run or {},
    }  # fmt: skip
    return parse_study(tables, where="test")


def open_study(
    storage: str, name: str = "tiny", *, lease: float | None = None, spool: Path | None = None,
    patience: Patience | None = None, allocator: Allocator | None = None, **search: Any,
) -> Study:  # fmt: skip
    """Open a study over the made-up model."""
    allocator = make_allocator() if allocator is None else allocator
    spec = make_spec(name, {} if lease is None else {"lease_seconds": lease}, **search)
    return Study.open(spec, storage, allocator, make_facts(allocator), spool=spool, patience=patience)


def measure(
    rank_map: RankMap, loss: float | None = None, fidelity: Fidelity = Fidelity.TUNED,
    allocator: Allocator | None = None,
) -> Measurement:  # fmt: skip
    """What an evaluation of ``rank_map`` would return; without a ``loss``, the predicted one."""
    allocator = make_allocator() if allocator is None else allocator
    space = allocator.space
    return Measurement(
        loss=3.0 + allocator.predicted_rise(rank_map) if loss is None else loss,
        standard_error=0.01,
        num_params=space.num_params(rank_map),
        target_params=space.target_params(rank_map),
        kept_of_targets=space.kept_of_targets(rank_map),
        kept_of_model=space.kept_of_model(rank_map),
        fidelity=fidelity,
        tokens=1000,
        swap_seconds=0.125,
        finetune_seconds=2.0,
        score_seconds=0.5,
        peak_memory=2**33,
    )


def skipped(storage: str, name: str = "tiny") -> list[int]:
    """Numbers of the trials whose rank map another one had already."""
    with StudyStore(storage) as store:
        return [trial.number for trial in store.trials(name) if trial.state is State.SKIPPED]


def run_trials(study: Study, count: int) -> list[Proposal]:
    """Measure ``count`` proposals."""
    proposals = []
    for _ in range(count):
        proposal = study.ask()
        study.tell(proposal, measure(proposal.rank_map))
        proposals.append(proposal)
    return proposals


def worker_measures(storage: str, count: int) -> list[tuple[int, str]]:
    """A worker process: open the study, measure ``count`` proposals, tell their numbers and sources."""
    study = open_study(storage)
    try:
        return [(proposal.number, proposal.source) for proposal in run_trials(study, count)]
    finally:
        study.close()


def worker_measures_until(storage: str, enough: Path) -> None:
    """A worker process that measures until there is a file of that name."""
    with closing(open_study(storage)) as study:
        while not enough.exists():
            run_trials(study, 1)


def worker_dies(storage: str, **search: Any) -> None:
    """A worker process that is killed over its first proposal."""
    open_study(storage, **search).ask()
    os.kill(os.getpid(), signal.SIGKILL)
