"""One rank map, and the short fine-tune of one trial, as pictures. Matplotlib's object interface only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from rank_search.export import layers
from rank_search.ranks import RankMap, RankSpace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DOTS_PER_INCH = 150
_BLUE, _ORANGE = "#0072B2", "#E69F00"
_SMOOTHED = 8
"""Steps that the smooth curve is a mean over."""


def rank_map_figure(rank_map: RankMap, space: RankSpace, title: str = "") -> Figure:
    """Kept fraction of every layer, type by block, with its rank; D: left dense."""
    from matplotlib.figure import Figure

    groups, blocks, places = layers.groups(space), layers.depths(space), layers.by_place(space)
    figure = Figure(
        figsize=(2.5 + 0.95 * len(groups), 2.8 + 0.27 * len(blocks)), dpi=_DOTS_PER_INCH, layout="constrained"
    )
    axes = figure.add_subplot()
    kept = np.full((len(blocks), len(groups)), np.nan)
    for (group, depth), shapes in places.items():
        row, column = blocks.index(depth), groups.index(group)
        kept[row, column] = value = layers.kept_of(shapes, rank_map, space)
        ranks = [str(rank_map.get(shape.name, "D")) for shape in shapes]
        text = ranks[0] if len(ranks) == 1 else f"{len(ranks)} parts"
        axes.text(column, row, text, ha="center", va="center", fontsize=7, color="white" if value < 0.6 else "black")
    image = axes.imshow(kept, aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xticks(range(len(groups)), groups, rotation=30, ha="right")
    axes.set_yticks(range(len(blocks)), [str(block) for block in blocks], fontsize=8)
    axes.set_ylabel("block")
    axes.set_xlabel("layer type; the numbers are ranks, D: left dense")
    figure.colorbar(image, ax=axes, label="kept fraction of the layer")
    if title:
        axes.set_title(title, fontsize=11)
    return figure


def train_loss_figure(losses: Sequence[float], *, title: str = "", unit: str = "token") -> Figure:
    """The training loss of every step of a trial's short fine-tune, and its running mean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=_DOTS_PER_INCH, layout="constrained")
    axes = figure.add_subplot()
    steps = np.arange(1, len(losses) + 1)
    axes.plot(steps, losses, ".-", color=_BLUE, alpha=0.35, linewidth=1, label="every step")
    width = min(_SMOOTHED, len(losses))
    smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
    axes.plot(steps[width - 1 :], smooth, color=_ORANGE, linewidth=2, label=f"mean of {width}")
    axes.set_xlabel("step of the fine-tune")
    axes.set_ylabel(f"training loss (nats per {unit})")
    axes.grid(alpha=0.25)
    axes.legend()
    if title:
        axes.set_title(title, fontsize=11)
    return figure
