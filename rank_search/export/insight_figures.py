"""What a study found out, as a picture. Matplotlib's object interface only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from rank_search.insight import PLACES, Agreement, Insight, Profile, Tendency

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

_DOTS_PER_INCH = 150
_MOST_PAIRS = 3
"""Scatter plots in a picture; the text names all fidelities."""
_BLUE, _ORANGE = "#0072B2", "#E69F00"


def insight_figure(insight: Insight) -> Figure:
    """The profile of the front as a heat map, what types and depths want beside the closed form, importances, and
    measured against cheaper losses."""
    from matplotlib.figure import Figure

    scatters = insight.agreements[:_MOST_PAIRS]
    figure = Figure(figsize=(15, 11), dpi=_DOTS_PER_INCH, layout="constrained")
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=[1.1, 1])[0]
    axes = left.add_subplot()
    left.colorbar(_draw_profile(axes, insight.profile), ax=axes, label="kept fraction of the layer", shrink=0.6)
    panels = [bool(insight.tendencies), bool(insight.importances), bool(scatters)]
    grid = right.add_gridspec(max(1, sum(panels)), max(1, len(scatters)))
    row = 0
    if insight.tendencies:
        _draw_tendencies(right.add_subplot(grid[row, :]), insight.tendencies)
        row += 1
    if insight.importances:
        _draw_importances(right.add_subplot(grid[row, :]), insight)
        row += 1
    for column, found in enumerate(scatters):
        _draw_agreement(right.add_subplot(grid[row, column]), found, insight.unit, labelled=column == 0)
    figure.suptitle(insight.study, fontsize=14)
    return figure


def _draw_profile(axes: Axes, profile: Profile) -> AxesImage:
    image = axes.imshow(np.array(profile.kept), aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    groups = [shape.group for shape in profile.layers]
    starts = [0, *(k for k in range(1, len(groups)) if groups[k] != groups[k - 1])]
    ends = [*starts[1:], len(groups)]
    for start in starts[1:]:
        axes.axhline(start - 0.5, color="white", linewidth=1.2)
    axes.set_yticks(
        [(start + end - 1) / 2 for start, end in zip(starts, ends, strict=True)], [groups[k] for k in starts]
    )
    axes.set_xticks(range(len(profile.trials)), [str(trial) for trial in profile.trials], rotation=90, fontsize=7)
    axes.set_xlabel("trials of the front, smallest model first")
    axes.set_title("kept fractions along the front; in every type the first block is at the top", fontsize=11)
    return image


def _draw_tendencies(axes: Axes, tendencies: Sequence[Tendency]) -> None:
    groups = sorted({tendency.group for tendency in tendencies})
    places = [place for place in PLACES if any(tendency.place == place for tendency in tendencies)]
    table = np.full((len(groups), len(places)), np.nan)
    for tendency in tendencies:
        table[groups.index(tendency.group), places.index(tendency.place)] = 100 * tendency.difference
    reach = max(1e-9, float(np.nanmax(np.abs(table))))
    axes.imshow(table, aspect="auto", cmap="RdBu", vmin=-reach, vmax=reach)
    for (row, column), value in np.ndenumerate(table):
        if not np.isnan(value):
            dark = abs(value) > 0.6 * reach
            axes.text(column, row, f"{value:+.1f}", ha="center", va="center", color="white" if dark else "black")
    axes.set_yticks(range(len(groups)), groups)
    axes.set_xticks(range(len(places)), [f"{place} third" for place in places])
    axes.set_title("kept fraction on the front beside the closed form's, percentage points", fontsize=11)


def _draw_importances(axes: Axes, insight: Insight) -> None:
    names = list(insight.importances)[::-1]
    axes.barh(range(len(names)), [insight.importances[name] for name in names], color=_BLUE)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("share in what makes a trial good for its size")
    axes.set_title("importance of the multipliers (PED-ANOVA)", fontsize=11)
    axes.grid(axis="x", alpha=0.25)


def _draw_agreement(axes: Axes, found: Agreement, unit: str, *, labelled: bool) -> None:
    axes.plot(found.lower, found.higher, "o", color=_BLUE, markersize=4, alpha=0.6)
    low, high = min(*found.lower, *found.higher), max(*found.lower, *found.higher)
    axes.plot([low, high], [low, high], color=_ORANGE, linewidth=1)
    axes.set_xlabel(f"loss, {found.label}")
    if labelled:
        axes.set_ylabel(f"measured loss (nats per {unit})")
    equal = "" if found.at_equal_size is None else f", at equal size {found.at_equal_size:.2f}"
    axes.set_title(f"rank correlation {found.spearman:.2f}{equal}", fontsize=10)
    axes.grid(alpha=0.25)
