"""The front as a picture. Matplotlib's object interface only: no global state, no window system."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rank_search.atomic import write_atomically
from rank_search.errors import InputError
from rank_search.front import EMPTY, Front, FrontPoint

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart with every common colour vision; shapes differ as well.
_BLUE, _ORANGE, _GREEN, _GREY, _BLACK = "#0072B2", "#E69F00", "#009E73", "#6B6B6B", "#000000"
_SUFFIXES = (".png", ".svg", ".pdf")
_DOTS_PER_INCH = 150


@dataclass(frozen=True, slots=True)
class _Limits:
    left: float
    right: float
    bottom: float
    top: float


def front_figure(
    front: Front,
    *,
    trials: Sequence[FrontPoint],
    dense_loss: float,
    dense_params: int,
    closed_form: Sequence[FrontPoint] = (),
    title: str = "",
    unit: str = "token",
) -> Figure:
    """Validation loss against parameters: the front, every other trial, both ladders, and the dense model.

    Args:
        front: drawn as steps, since at a budget between two points the smaller one is the best there is.
        trials: all measured points, those of the front and the ladders among them or not.
        dense_loss: validation loss of the dense model, nats per unit.
        dense_params: its parameters, tied weights once.
        closed_form: ladder points that are not among ``trials``.
        title: the study's name, or what the reader should know of it.
        unit: what losses are a mean over.

    Raises:
        InputError: the front is empty.
    """
    from matplotlib.figure import Figure

    if not front:
        raise InputError(EMPTY)
    everything = [*trials, *closed_form]
    closed = _from_source(everything, "closed form")
    uniform = _from_source(everything, "uniform")
    limits = _limits(front, everything, closed, dense_loss, dense_params)

    figure = Figure(figsize=(8, 5), dpi=_DOTS_PER_INCH, layout="constrained")
    axes = figure.add_subplot()
    _draw_dense(axes, dense_loss, dense_params)
    ladders = {id(point) for point in (*closed, *uniform)}
    others = [p for p in everything if id(p) not in ladders and p not in front.points]
    _draw_points(axes, others, "other trials", marker="o", s=16, color=_GREY, alpha=0.35, linewidths=0, zorder=2)
    _draw_front(axes, front, dense_params)
    open_marker = {"facecolors": "none", "linewidths": 1.8, "s": 56}
    _draw_points(axes, closed, "closed form", marker="s", edgecolors=_ORANGE, zorder=5, **open_marker)
    _draw_points(axes, uniform, "uniform", marker="^", edgecolors=_GREEN, zorder=4, **open_marker)
    axes.set_xlim(limits.left, limits.right)
    axes.set_ylim(limits.bottom, limits.top)
    _count_hidden(axes, everything, limits)
    _label_axes(axes, dense_params, limits, unit)
    _draw_legend(axes)
    if title:
        axes.set_title(title, fontsize=13, pad=10)
    return figure


def save_figure(figure: Figure, path: Path | str) -> None:
    """Write a picture whole or not at all; the suffix names its format.

    Raises:
        InputError: a suffix of no known format, or a place that cannot be written.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES:
        raise InputError(f"picture {path}: the suffix must be one of {', '.join(_SUFFIXES)}, not {suffix!r}")
    try:
        write_atomically(path, rendered(figure, suffix[1:]))
    except OSError as error:
        raise InputError(f"picture {path} cannot be written: {error.strerror}") from None


def rendered(figure: Figure, form: str = "png") -> bytes:
    """The file of a picture."""
    content = io.BytesIO()
    figure.savefig(content, format=form, dpi=_DOTS_PER_INCH)
    return content.getvalue()


def _from_source(points: Sequence[FrontPoint], start: str) -> list[FrontPoint]:
    return [point for point in points if point.source.startswith(start)]


def _xy(points: Sequence[FrontPoint]) -> tuple[list[int], list[float]]:
    return [point.num_params for point in points], [point.loss for point in points]


def _limits(
    front: Front, everything: Sequence[FrontPoint], closed: Sequence[FrontPoint], dense_loss: float, dense_params: int
) -> _Limits:
    """The front and the dense model fill the picture; what lies far above is left out and counted.

    The closed form may raise the top by half the height of the front, since it is what the front is compared to.
    """
    best, worst = min(front[-1].loss, dense_loss), max(front[0].loss, dense_loss)
    height = (worst - best) or max(abs(worst), 1.0) * 0.1
    top = min(max([worst, *(point.loss for point in closed)]), worst + height / 2) + 0.12 * height
    shown = [point.num_params for point in (*front, *everything) if point.loss <= top]
    least, most = min(*shown, dense_params), max(*shown, dense_params)
    margin = 0.04 * ((most - least) or most)
    return _Limits(least - margin, most + margin, best - 0.08 * height, top)


def _draw_points(axes: Axes, points: Sequence[FrontPoint], label: str, **style: Any) -> None:
    if points:
        axes.scatter(*_xy(points), label=label, **style)


def _draw_front(axes: Axes, front: Front, dense_params: int) -> None:
    x, y = _xy(front.points)
    end = max(x[-1], dense_params)
    axes.step([*x, end], [*y, y[-1]], where="post", color=_BLUE, linewidth=1.6, alpha=0.75, zorder=3)
    axes.plot(x, y, "o", color=_BLUE, markersize=5.5, zorder=3, label="front")


def _draw_legend(axes: Axes) -> None:
    order = ["front", "closed form", "uniform", "other trials", "dense model"]
    handles, labels = axes.get_legend_handles_labels()
    entries = sorted(zip(labels, handles, strict=True), key=lambda entry: order.index(entry[0]))
    axes.legend([handle for _, handle in entries], [label for label, _ in entries], framealpha=0.92, fontsize=10)


def _draw_dense(axes: Axes, dense_loss: float, dense_params: int) -> None:
    axes.axhline(dense_loss, color=_BLACK, linewidth=1, linestyle=(0, (5, 4)), alpha=0.55, zorder=1)
    axes.plot(
        [dense_params], [dense_loss], "*", color=_BLACK, markersize=13, zorder=6, clip_on=False, label="dense model"
    )


def _count_hidden(axes: Axes, points: Sequence[FrontPoint], limits: _Limits) -> None:
    hidden = sum(point.loss > limits.top for point in points)
    if hidden:
        trials = "1 trial lies" if hidden == 1 else f"{hidden} trials lie"
        axes.text(
            0.015, 0.975, f"↑ {trials} above the picture", transform=axes.transAxes, va="top", fontsize=9, color=_GREY
        )


def _label_axes(axes: Axes, dense_params: int, limits: _Limits, unit: str) -> None:
    from matplotlib.ticker import EngFormatter, FixedLocator, FormatStrFormatter, NullLocator

    def kept_of(params: Any) -> Any:
        return params / dense_params

    def params_of(kept: Any) -> Any:
        return kept * dense_params

    axes.grid(alpha=0.25, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel("parameters of the whole model", fontsize=11)
    axes.set_ylabel(f"validation loss (nats per {unit})", fontsize=11)
    kept = axes.secondary_xaxis("top", functions=(kept_of, params_of))
    kept.set_xlabel("kept fraction of the whole model", fontsize=11)
    # A second axis in perplexity would be placed by exp and log anyway: naming losses by it needs no inverse.
    perplexity = axes.secondary_yaxis("right")
    ticks = _perplexity_ticks(limits.bottom, limits.top)
    perplexity.yaxis.set_major_locator(FixedLocator([math.log(tick) for tick in ticks]))
    perplexity.yaxis.set_minor_locator(NullLocator())
    perplexity.set_yticklabels([f"{tick:g}" for tick in ticks])
    perplexity.set_ylabel("perplexity", fontsize=11)
    kept.xaxis.set_major_formatter(FormatStrFormatter("%g"))


def _perplexity_ticks(bottom: float, top: float) -> list[float]:
    """A handful of round perplexities between two losses (nats per token)."""
    from matplotlib.ticker import MaxNLocator

    # Above that a perplexity is no number any more that would mean something to a reader, or fit a float.
    low, high = (math.exp(min(loss, 600.0)) for loss in (bottom, top))
    if high < 5 * low:
        ticks = [float(tick) for tick in MaxNLocator(8, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)]
        return [tick for tick in ticks if low <= tick <= high]
    ticks = []
    gap = (top - bottom) / 8
    for exponent in range(math.floor(math.log10(low)), math.ceil(math.log10(high))):
        for mantissa in (1.0, 1.5, 2.0, 3.0, 5.0, 7.0):
            tick = mantissa * 10.0**exponent
            if low <= tick <= high and (not ticks or math.log(tick / ticks[-1]) >= gap):
                ticks.append(tick)
    return ticks
