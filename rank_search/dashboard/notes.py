"""The notes of a study and of its front's trials, in Markdown."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from rank_search.dashboard import tables
from rank_search.dashboard.tables import Table
from rank_search.front import FrontPoint
from rank_search.study.overview import Overview


def study_note(overview: Overview, study_id: int) -> str:
    """What is searched, the dense model, the front, the best point of every budget, the goals, and how to export.

    Args:
        study_id: Optuna's, which addresses of the dashboard's pages hold.
    """
    record, front = overview.record, overview.front
    about = tables.study_table(overview)
    parts = [f"# {record.name}", tables.progress_line(overview), markdown(about), _dense(overview)]
    if front:
        knee = front.knee()
        parts += [
            f"## Front: {len(front)} {'point' if len(front) == 1 else 'points'}",
            f"Loss in nats per {overview.unit}; the knee is trial {_link(knee.trial, study_id)}.",
            markdown(tables.front_table(overview), study_id),
            "## Best point of the front for a budget",
            "Kept fractions are of the target layers; on the right, allocations of the same budget without a search.",
            markdown(tables.budget_table(overview), study_id),
        ]
    else:
        parts.append("The front is empty so far.")
    parts += ["## Goals", _goals(overview), "## Take one away", _export(overview)]
    return "\n\n".join(parts)


def trial_note(point: FrontPoint, overview: Overview) -> str:
    """Ranks by layer type, kept fractions, the loss of every fidelity, and seconds."""
    measured, dense = point.measurement, overview.record.dense_loss
    above = "" if dense is None else f", {point.loss - dense:+.4f} against the dense model"
    metrics = _metrics(measured.metrics)
    folds = ""
    if measured.fold_deviation is not None:
        folds = f" Over {len(measured.fold_losses)} folds its standard deviation is {measured.fold_deviation:.4f}."
    parts = [
        f"# Trial {point.trial}, on the front",
        f"Proposed by {point.source}. Keeps {measured.kept_of_targets:.4f} of the target layers and "
        f"{measured.kept_of_model:.4f} of the model: {point.num_params:,} parameters. Loss {point.loss:.4f} ± "
        f"{measured.standard_error:.4f} nats per {overview.unit}{above}; perplexity "
        f"{tables.perplexity(point.loss)}{metrics}. {measured.seconds:.1f} s.{folds}",
        "Ranks by layer type:",
        markdown(tables.type_table(point, overview)),
        "Losses as measured:",
        markdown(tables.rung_table(point, overview)),
        f"Its rank map is among the artifacts, for the study's own folder; `{export_command(overview, point.trial)}` "
        "writes it for any other.",
    ]  # fmt: skip
    return "\n\n".join(parts)


def trial_notes(overview: Overview) -> Mapping[int, str]:
    """Trial of the front → its note."""
    return {point.trial: trial_note(point, overview) for point in overview.front}


def export_command(overview: Overview, trial: int) -> str:
    """The command that writes the rank map of a trial."""
    return f"rank-search export {shlex.quote(overview.record.name)} --trial {trial} -o rank_map.json"


def markdown(table: Table, study_id: int | None = None) -> str:
    """A table; with ``study_id``, numbers of trials are links to their pages."""
    if not table.rows:
        return ""
    ruler = [":--" if column in table.text else "--:" for column in table.columns]
    at = table.columns.index("trial") if "trial" in table.columns and study_id is not None else -1
    rows = [
        [
            _link(int(cell), study_id) if index == at and cell and study_id is not None else cell.replace("|", "\\|")
            for index, cell in enumerate(row)
        ]
        for row in table.rows
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (table.columns, ruler, *rows))


def _link(trial: int, study_id: int) -> str:
    return f"[{trial}](/dashboard/studies/{study_id}/trials?numbers={trial})"


def _dense(overview: Overview) -> str:
    loss = overview.record.dense_loss
    if loss is None:
        return "**Dense model:** not measured yet."
    metrics = _metrics(overview.record.dense_metrics)
    return (
        f"**Dense model:** loss {loss:.4f} nats per {overview.unit}, perplexity {tables.perplexity(loss)}{metrics}, "
        f"{overview.facts.model_params:,} parameters."
    )


def _metrics(metrics: Mapping[str, float]) -> str:
    return "".join(f", {name} {value:.4f}" for name, value in metrics.items() if name != "perplexity")


def _goals(overview: Overview) -> str:
    search = overview.record.spec.search
    goals = []
    if search.max_params is not None:
        goals.append(f"at most {search.max_params:,} parameters (`search.max_params`)")
    if search.max_loss is not None:
        goals.append(f"a loss of at most {search.max_loss:g} (`search.max_loss`)")
    if not goals:
        return "None: every measured rank map may be on the front."
    return (
        f"{' and '.join(goals).capitalize()}. {overview.status.infeasible} trials miss them. The dashboard does not "
        "know them and may draw such trials on a front of its own; the front here holds none."
    )


def _export(overview: Overview) -> str:
    name = shlex.quote(overview.record.name)
    return (
        f"```\nrank-search export {name} --kept 0.6 -o rank_map.json\n"
        "rank-search apply rank_map.json -o compressed\n```\n\n"
        "Instead of `--kept`: `--trial N`, `--max-params N`, `--max-loss X` or `--knee`. Give the study's file in "
        "place of its name, or name the database by `--storage`. `compressed` is a checkpoint that transformers loads."
    )
