"""The tables of notes and reports: rows of text, with no word yet of Markdown or HTML."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from rank_search.errors import BudgetError
from rank_search.export import layers
from rank_search.front import FrontPoint
from rank_search.study.overview import MeasuredTrial, Overview, space_of

KEPT = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
"""Budgets for which the best point is told: kept fractions of the target layers."""
_SEED = re.compile(r"(.+) ([01]\.\d+)")


@dataclass(frozen=True, slots=True)
class Table:
    """A heading for every column, and rows of as many cells. ``text`` columns are set to the left, others to the
    right; in ``trial`` cells stand numbers of trials, which a page may make links of."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text: frozenset[str] = frozenset()


def front_table(overview: Overview) -> Table:
    """The front by ascending parameters, the dense model last."""
    dense, facts = overview.record.dense_loss, overview.facts
    metrics = sorted({name for point in overview.front for name in point.measurement.metrics} - {"perplexity"})
    columns = (
        "trial", "source", "parameters", "kept of targets", "kept of model", "loss", "± s.e.", "above dense",
        "perplexity", "fidelity", *metrics,
    )  # fmt: skip
    rows = [
        (
            str(point.trial), point.source, f"{point.num_params:,}", f"{told.kept_of_targets:.4f}",
            f"{told.kept_of_model:.4f}", f"{point.loss:.4f}", f"{told.standard_error:.4f}",
            "" if dense is None else f"{point.loss - dense:+.4f}", perplexity(point.loss), told.fidelity.label,
            *(_metric(told.metrics.get(name)) for name in metrics),
        )
        for point in overview.front for told in [point.measurement]
    ]  # fmt: skip
    if dense is not None:
        values = (_metric(overview.record.dense_metrics.get(name)) for name in metrics)
        rows.append(
            (
                "", "dense model", f"{facts.model_params:,}", "1.0000", "1.0000", f"{dense:.4f}", "", "",
                perplexity(dense), "", *values,
            )
        )  # fmt: skip
    return Table(columns, tuple(rows), frozenset({"source", "fidelity"}))


def budget_table(overview: Overview) -> Table:
    """The best point of the front for round budgets, beside allocations without a search of that very budget."""
    ladders = _ladders(overview.highest)
    rows = []
    for kept in sorted({*KEPT, *(kept for _, kept in ladders)}, reverse=True):
        try:
            best = overview.front.at_most_kept(kept)
        except BudgetError:
            continue  # the front does not reach so far down
        others = [ladders.get((name, kept)) for name in _names(ladders)]
        cells = ["" if loss is None else f"{loss:.4f}" for loss in others]
        if best.measurement.kept_of_targets > 0.8 * kept or any(cells):
            told = f"{best.num_params:,}", f"{best.loss:.4f}", perplexity(best.loss)
            rows.append((f"{kept:g}", str(best.trial), *told, *cells))
    return Table(("kept at most", "trial", "parameters", "loss", "perplexity", *_names(ladders)), tuple(rows))


def type_table(point: FrontPoint, overview: Overview) -> Table:
    """What a rank map does to every layer type."""
    rows = [
        (
            told.group, str(told.layers), f"{told.kept:.3f}", str(told.dense),
            *(f"{rank:,}" for rank in _three(told.ranks)), f"{told.highest:,}",
        )
        for told in layers.type_summaries(point.rank_map, space_of(overview.record))
    ]  # fmt: skip
    rows = [row if len(row) == 8 else (*row[:4], "", "", "", row[-1]) for row in rows]
    columns = ("layer type", "layers", "kept", "left dense", "lowest rank", "middle", "highest", "largest that pays")
    return Table(columns, tuple(rows), frozenset({"layer type"}))


def rung_table(point: FrontPoint, overview: Overview) -> Table:
    """Every loss that was measured of a trial."""
    dense = overview.record.dense_loss
    measured = overview.rungs.get(point.trial) or (point.measurement,)
    rows = [
        (
            told.fidelity.label, f"{told.tokens:,}" if told.tokens else "", f"{told.loss:.4f}",
            f"{told.standard_error:.4f}", "" if dense is None else f"{told.loss - dense:+.4f}", perplexity(told.loss),
            f"{told.swap_seconds:.2f}", f"{told.finetune_seconds:.2f}", f"{told.score_seconds:.2f}",
        )
        for told in measured
    ]  # fmt: skip
    columns = (
        "fidelity", f"{overview.unit}s", "loss", "± s.e.", "above dense", "perplexity", "swap s", "fine-tune s",
        "scoring s",
    )  # fmt: skip
    return Table(columns, tuple(rows), frozenset({"fidelity"}))


def study_table(overview: Overview) -> Table:
    """What is searched, and how."""
    spec, facts, space = overview.record.spec, overview.facts, space_of(overview.record)
    steps = spec.finetune.steps_for(spec.data.sequence_length)
    search, data = spec.search, spec.data
    goals = [
        *([] if search.max_params is None else [f"at most {search.max_params:,} parameters"]),
        *([] if search.max_loss is None else [f"a loss of at most {search.max_loss:g}"]),
    ]
    climb = "" if search.fidelities is None else f"; every trial climbs {', '.join(search.fidelities)}"
    rows = [
        ("model", f"{spec.model.source}{f' at {facts.revision[:12]}' if facts.revision else ''}, {spec.model.task}"),
        ("parameters", f"{facts.model_params:,}"),
        (
            "target layers",
            f"{len(facts.shapes)} with {space.dense_params:,} parameters "
            f"({space.dense_params / facts.model_params:.1%} of the model)",
        ),
        ("layer types", ", ".join(layers.groups(space))),
        ("storage", f"{space.storage}, ranks in multiples of {space.multiple}"),
        ("factors", f"{spec.factors.method}, {data.calibration_blocks} calibration blocks of {data.sequence_length}"),
        ("fine-tune of a trial", f"{spec.finetune.mode}, {steps} steps of {spec.finetune.batch_blocks} blocks"),
        ("space and sampler", f"{search.space}, {search.sampler}, seed {search.seed}{climb}"),
        ("kept fractions", f"of the target layers, {search.min_kept:g} to {search.max_kept:g}"),
        ("goals", ", ".join(goals) or "none"),
    ]  # fmt: skip
    return Table(("", "what is searched"), tuple(rows), frozenset({"", "what is searched"}))


def progress_line(overview: Overview) -> str:
    """How far the search is."""
    status = overview.status
    told = {
        "complete": status.complete, "pruned": status.pruned, "infeasible": status.infeasible, "failed": status.failed,
        "running": status.running,
    }  # fmt: skip
    shown = ", ".join(f"{count} {name}" for name, count in told.items() if count)
    stopped = f" Stopped because {status.stop_reason}." if status.stop_reason else ""
    return f"{status.finished} of {status.wanted} trials finished ({shown or 'none yet'}).{stopped}"


def perplexity(loss: float) -> str:
    """exp(loss), as short as it means something."""
    value = math.exp(loss) if loss < 709 else math.inf
    return f"{value:.2f}" if value < 1e5 else f"{value:.2e}"


def _metric(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _three(ranks: tuple[int, ...]) -> Sequence[int]:
    return () if not ranks else (ranks[0], ranks[len(ranks) // 2], ranks[-1])


def _ladders(trials: Sequence[MeasuredTrial]) -> dict[tuple[str, float], float]:
    """Allocation and kept fraction → loss."""
    found = {}
    for trial in trials:
        seed = seed_of(trial.source)
        if seed is not None:
            found[seed] = trial.loss
    return found


def seed_of(source: str) -> tuple[str, float] | None:
    """Allocation and kept fraction of a trial that a ladder seeded: ``closed form 0.8``."""
    found = _SEED.fullmatch(source)
    return None if found is None else (found[1], float(found[2]))


def _names(ladders: dict[tuple[str, float], float]) -> list[str]:
    names = dict.fromkeys(name for name, _ in ladders)
    return sorted(names, key=lambda name: (name != "closed form", name != "uniform", name))
