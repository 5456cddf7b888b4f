"""The command that says what a study found out: explain."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rank_search import api
from rank_search.cli.options import JsonOption, StorageOption, StudyArgument, check_output

if TYPE_CHECKING:
    from rank_search.insight import Agreement, Insight, Tendency


def explain(
    study: StudyArgument,
    storage: StorageOption = None,
    as_json: JsonOption = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw it: .png, .svg or .pdf.", show_default=False)
    ] = None,
) -> None:
    """Say which layers want more or less than the closed form gives, and how far cheaper losses can be trusted."""
    if plot is not None:
        check_output(plot)
    insight = api.explain(study, storage=storage)
    if plot is not None:
        from rank_search.export.figures import save_figure
        from rank_search.export.insight_figures import insight_figure

        save_figure(insight_figure(insight), plot)
    if as_json:
        typer.echo(json.dumps(asdict(insight), indent=2, allow_nan=False))
        return
    for line in insight_lines(insight):
        typer.echo(line)
    if plot is not None:
        typer.echo(f"wrote {plot}")


def insight_lines(insight: Insight) -> Iterator[str]:
    """All of it but the profile, which is a picture's."""
    yield f"study {insight.study}: {insight.trials} trials, {len(insight.profile.trials)} points on the front"
    yield ""
    yield "Kept fraction of layer types by depth, on the front and in the closed form at the same sizes:"
    yield from _tendency_lines(insight.tendencies)
    yield ""
    yield "Importance of the multipliers for a loss below that of others of the size (PED-ANOVA):"
    yield from _importance_lines(insight)
    yield ""
    yield "Losses that cost less, against those of the highest fidelity (rank correlation):"
    yield from _agreement_lines(insight.agreements)


def _tendency_lines(tendencies: Iterable[Tendency]) -> Iterator[str]:
    rows = list(tendencies)
    if not rows:
        yield "  none: the study has measured no closed form (search.ladder, search.seeds)"
        return
    width = max(len(row.group) for row in rows)
    for row in rows:
        yield (
            f"  {row.group:<{width}}  {row.place:<6} third  front {row.kept:.3f}  closed form {row.closed_form:.3f}  "
            f"{100 * row.difference:+5.1f} points"
        )


def _importance_lines(insight: Insight) -> Iterator[str]:
    if not insight.importances:
        yield "  none: the space has no multipliers, or too few of its proposals were measured"
    width = max(map(len, insight.importances), default=0)
    for name, share in insight.importances.items():
        yield f"  {name:<{width}}  {share:6.1%}"


def _agreement_lines(agreements: Iterable[Agreement]) -> Iterator[str]:
    rows = list(agreements)
    if not rows:
        yield "  none: too few trials were measured more than once"
    width = max((len(row.label) for row in rows), default=0)
    for row in rows:
        equal = "none" if row.at_equal_size is None else f"{row.at_equal_size:.2f}"
        yield f"  {row.label:<{width}}  {row.spearman:5.2f}  at equal size {equal}  ({len(row.lower)} trials)"
