"""What :mod:`bench_methods` measures: its variants, and a study under several seeds without a bank on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from _bench import text_examples

from rank_search.baselines.methods import METHODS
from rank_search.data.examples import ExampleTable
from rank_search.data.splits import Splits
from rank_search.factors.bank import BankKey, FactorBank, TrialBanks
from rank_search.factors.build import build_factors, factors_of
from rank_search.factors.decompose import Factors
from rank_search.factors.statistics import LayerStatistics, collect_statistics
from rank_search.model.device import resolve_device
from rank_search.model.load import LoadedModel, load_model
from rank_search.model.targets import Target, find_targets, rank_space
from rank_search.preparing import Prepared, PrepareTimes, maker_for
from rank_search.progress import SILENT
from rank_search.ranks import RankSpace, Storage
from rank_search.spec import Allocation, Method, StudyFile
from rank_search.task import Examples


@dataclass(frozen=True)
class Variant:
    """A way to factorise, to allocate and to count."""

    method: str
    factors: Method
    allocation: Allocation
    storage: Storage

    @property
    def is_own(self) -> bool:
        """The package's own, which looks at a compressed model too; published methods see the dense one alone."""
        return self.method == "kfac"


VARIANTS = (
    *(Variant(m.name, m.factors, m.allocation, "two-factor") for m in METHODS.values()),
    Variant("kfac", "kfac", "uniform", "two-factor"),
    Variant("kfac", "kfac", "closed-form", "two-factor"),
    Variant("kfac", "kfac", "closed-form", "pivoted"),
)
NAMES = ("dense", *dict.fromkeys(variant.method for variant in VARIANTS))


@dataclass(frozen=True)
class Base:
    """What all seeds share."""

    study: StudyFile
    loaded: LoadedModel
    device: torch.device
    targets: tuple[Target, ...]
    space: RankSpace
    splits: Splits
    second: Examples | None

    @classmethod
    def of(cls, study: StudyFile, second_text: Path | None) -> Base:
        """The model, its target layers and the blocks of a study, without its factor bank."""
        spec = study.spec
        device = resolve_device(spec.run.device)
        loaded = load_model(spec.model, study.folder, device)
        targets = find_targets(loaded.model, spec.targets)
        splits = maker_for(loaded).splits(spec.data, study.folder, study.work_dir, SILENT)
        length = spec.data.sequence_length
        second = None if second_text is None else text_examples(second_text, loaded, length, study.work_dir)
        return cls(study, loaded, device, targets, rank_space(loaded.model, targets, spec.targets), splits, second)


class Seeded:
    """The study under one seed; statistics and factors are made when a row first needs them."""

    def __init__(self, base: Base, seed: int) -> None:
        self._base = base
        spec = base.study.spec
        self.spec = spec.model_copy(
            update={
                "factors": spec.factors.model_copy(update={"seed": spec.factors.seed + seed}),
                "search": spec.search.model_copy(update={"seed": spec.search.seed + seed}),
            }
        )
        self.splits = _drawn(base.splits, seed)

    @cached_property
    def statistics(self) -> dict[str, LayerStatistics]:
        """Of all methods, from one pass."""
        base = self._base
        return collect_statistics(
            base.loaded.model, base.targets, Examples.of(base.loaded.task, self.splits.calibration.columns),
            batch_blocks=self.spec.run.score_batch_blocks, seed=self.spec.factors.seed,
        )  # fmt: skip

    def prepared(self, method: Method, factors: Mapping[str, Factors], storage: Storage) -> Prepared:
        """As :func:`rank_search.preparing.prepare` makes it, on factors in memory."""
        base, spec = self._base, self.spec
        factor_spec = spec.factors.model_copy(update={"method": method})
        space = base.space.with_storage(storage)
        bank = FactorBank(Path(), BankKey.of(None, base.loaded.weights_digest, "", factor_spec, space), factors, {})
        study = StudyFile(spec=spec.model_copy(update={"factors": factor_spec}), folder=base.study.folder)
        return Prepared(
            study, base.loaded, base.device, base.targets, space, self.splits, bank,
            TrialBanks.single(bank),
            built=True, times=PrepareTimes(0, 0, 0, 0, 0, 0),
        )  # fmt: skip

    def factors(self, method: Method, *, own: bool) -> dict[str, Factors]:
        """All components of every matrix, on the device: they serve both storage forms."""
        base = self._base
        spec = self.spec.factors.model_copy(update={"method": method})
        if own:
            task, splits = base.loaded.task, self.splits
            made = build_factors(
                base.loaded.model, base.targets, Examples.of(task, splits.calibration.columns), spec,
                base.space.with_storage("pivoted"), recalibration=Examples.of(task, splits.recalibration.columns),
                batch_blocks=self.spec.run.score_batch_blocks,
            )  # fmt: skip
        else:
            made = factors_of(base.targets, self.statistics.__getitem__, spec, "pivoted")
        return {n: Factors(f.out.to(base.device), f.inn.to(base.device), f.sigma) for n, f in made.items()}


def _drawn(splits: Splits, seed: int) -> Splits:
    """Other calibration blocks, drawn out of those for calibration and training; the others train, in their order."""
    seen, trained = splits.calibration, splits.train
    pool = ExampleTable({n: np.concatenate([column, trained.columns[n]]) for n, column in seen.columns.items()})
    chosen = np.zeros(len(pool), dtype=bool)
    chosen[np.random.default_rng(seed).choice(len(pool), len(seen), replace=False)] = True
    return replace(splits, calibration=pool[np.flatnonzero(chosen)], train=pool[np.flatnonzero(~chosen)])
