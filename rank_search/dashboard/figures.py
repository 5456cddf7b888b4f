"""The figures of a study as Plotly's own JSON, without Plotly: a browser draws them.

A dashboard sends all of them again every few seconds, so they hold no more points than a picture shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rank_search.dashboard.spectra import Spectra
from rank_search.dashboard.tables import seed_of
from rank_search.export import layers
from rank_search.front import FrontPoint
from rank_search.ranks import RankSpace
from rank_search.study.overview import MeasuredTrial, Overview, space_of
from rank_search.study.watching import WORST_LOSS

Figure = dict[str, Any]

# Okabe and Ito's palette, told apart with every common colour vision; shapes differ as well.
BLUE, ORANGE, GREEN, GREY, BLACK = "#0072B2", "#E69F00", "#009E73", "#8A8A8A", "#000000"
_OTHERS = ("#CC79A7", "#D55E00", "#56B4E9", "#B8A800", "#5E3C99")
_SYMBOLS = ("diamond", "cross", "x", "triangle-down", "pentagon")

SPECTRA = "rank-search-5-spectra"
"""The id of the figure of the spectra, which only those can draw that have the factor bank at hand."""
MOST_POINTS = 400
"""Trials off the front that are drawn."""
MANY = 60
"""Points of a front; more are drawn smaller."""
MOST_MAPS = 24
"""Points of the front whose rank maps are drawn."""
MOST_STEPS = 200
"""Steps of the hypervolume that are drawn."""
_UNITS = (("days", 86400), ("hours", 3600), ("minutes", 60), ("seconds", 0))


def figures(overview: Overview, spectra: Spectra | None = None) -> dict[str, Figure]:
    """Every figure that there is something to draw for, by an id that stays."""
    made: list[tuple[str, Figure | None]] = [
        ("rank-search-1-front", front_figure(overview)),
        ("rank-search-2-kept-fractions", kept_figure(overview)),
        ("rank-search-3-predicted-and-measured", prediction_figure(overview)),
        ("rank-search-4-hypervolume", hypervolume_figure(overview)),
        (SPECTRA, None if spectra is None else spectra_figure(spectra)),
    ]
    return {name: figure for name, figure in made if figure is not None}


def front_figure(overview: Overview) -> Figure | None:
    """Validation loss against parameters: the front, the dense model, allocations without a search, other trials."""
    front, dense = overview.front, overview.record.dense_loss
    if not front:
        return None
    space, params = space_of(overview.record), overview.facts.model_params
    on_front = {point.trial for point in front}
    references = _references(overview.highest)
    measured = [trial for group in references.values() for trial in group]
    low, high = _loss_range(front, dense, references)
    known = {trial.number for trial in measured} | on_front
    others = [trial for trial in overview.highest if trial.number not in known and trial.loss <= high]
    traces = [_others_trace(others[-MOST_POINTS:]), _front_trace(overview, space)]
    for index, (name, trials) in enumerate(references.items()):
        traces.append(_reference_trace(name, trials, index))
    left = min([point.num_params for point in front] + [trial.num_params for trial in measured + others])
    if dense is not None:
        traces += _dense_traces(dense, params, left)
    hidden = sum(trial.loss > high for trial in overview.highest)
    above = "" if not hidden else f" ({hidden} of {len(overview.highest)} trials lie above)"
    figure = _figure(
        traces, f"Front{above}", "parameters of the whole model", f"validation loss (nats per {overview.unit})"
    )
    figure["layout"]["yaxis"]["range"] = [low, high]
    figure["layout"]["xaxis"]["range"] = [left - 0.03 * (params - left), params + 0.03 * (params - left)]
    return figure


def _front_trace(overview: Overview, space: RankSpace) -> Figure:
    points = overview.front.points
    return {
        **_xy(points), "type": "scatter", "mode": "lines+markers", "name": "front",
        "line": {"color": BLUE, "shape": "hv", "width": 2}, "marker": {"size": 9 if len(points) <= MANY else 4},
        "error_y": _errors([point.measurement.standard_error for point in points], BLUE),
        "text": [_hover(point, space) for point in points], "hovertemplate": "%{text}<extra></extra>",
    }  # fmt: skip


def _hover(point: FrontPoint, space: RankSpace) -> str:
    """What a point of the front tells: the trial, its loss and size, and what it keeps of every layer type."""
    measured = point.measurement
    lines = [
        f"<b>trial {point.trial}</b> ({point.source})",
        f"loss {point.loss:.4f} ± {measured.standard_error:.4f}, {measured.fidelity.label}",
        f"{point.num_params:,} parameters, kept {measured.kept_of_targets:.3f} of the target layers",
    ]
    for told in layers.type_summaries(point.rank_map, space):
        ranks = [f"ranks {_span(told.ranks)}"] if told.ranks else []
        ranks += [f"{told.dense} dense"] if told.dense else []
        lines.append(f"{told.group}: kept {told.kept:.2f}, {', '.join(ranks)}")
    return "<br>".join(lines)


def _span(ranks: Sequence[int]) -> str:
    return str(ranks[0]) if ranks[0] == ranks[-1] else f"{ranks[0]}–{ranks[-1]}"


def _references(trials: Iterable[MeasuredTrial]) -> dict[str, list[MeasuredTrial]]:
    """Allocation → its measured rank maps, by ascending parameters: trials that a ladder seeded."""
    found: dict[str, list[MeasuredTrial]] = {}
    for trial in trials:
        if (seed := seed_of(trial.source)) is not None:
            found.setdefault(seed[0], []).append(trial)
    order = sorted(found, key=lambda name: (name != "closed form", name != "uniform", name))
    return {name: sorted(found[name], key=lambda trial: trial.num_params) for name in order}


def _reference_trace(name: str, trials: Sequence[MeasuredTrial], index: int) -> Figure:
    colours, symbols = (ORANGE, GREEN, *_OTHERS), ("square-open", "triangle-up-open", *_SYMBOLS)
    colour = colours[index % len(colours)]
    return {
        **_xy(trials), "type": "scatter", "mode": "lines+markers", "name": name,
        "line": {"color": colour, "width": 1, "dash": "dot"},
        "marker": {"symbol": symbols[index % len(symbols)], "size": 10, "color": colour, "line": {"width": 2}},
        "error_y": _errors([trial.standard_error for trial in trials], colour),
        "text": [_told(trial) for trial in trials], "hovertemplate": _HOVER,
    }  # fmt: skip


def _others_trace(trials: Sequence[MeasuredTrial]) -> Figure:
    return {
        **_xy(trials), "type": "scatter", "mode": "markers", "name": "other trials",
        "marker": {"color": GREY, "size": 6, "opacity": 0.45},
        "text": [_told(trial) for trial in trials], "hovertemplate": _HOVER,
    }  # fmt: skip


_HOVER = "%{text}<br>loss %{y:.4f}<br>%{x:,} parameters<extra></extra>"


def _told(trial: MeasuredTrial) -> str:
    return f"trial {trial.number} ({trial.source}), kept {trial.kept_of_targets:.3f}"


def _dense_traces(dense: float, params: int, left: int) -> list[Figure]:
    line = {"color": BLACK, "width": 1, "dash": "dash"}
    return [
        {
            "x": [left, params], "y": [_rounded(dense)] * 2, "type": "scatter", "mode": "lines", "line": line,
            "hoverinfo": "skip", "showlegend": False,
        },
        {
            "x": [params], "y": [_rounded(dense)], "type": "scatter", "mode": "markers", "name": "dense model",
            "marker": {"symbol": "star", "size": 14, "color": BLACK},
            "hovertemplate": f"dense model<br>loss {dense:.4f}<br>{params:,} parameters<extra></extra>",
        },
    ]  # fmt: skip


def _loss_range(
    front: Sequence[FrontPoint], dense: float | None, references: Mapping[str, Sequence[MeasuredTrial]]
) -> tuple[float, float]:
    """The front and the dense model fill the picture; the closed form may raise it by half the front's height."""
    losses = [point.loss for point in front] + ([] if dense is None else [dense])
    best, worst = min(losses), max(losses)
    height = (worst - best) or 0.1 * max(abs(worst), 1.0)
    closed = [trial.loss for trial in references.get("closed form", ())]
    top = min(max([worst, *closed]), worst + height / 2)
    return best - 0.08 * height, top + 0.12 * height


def kept_figure(overview: Overview) -> Figure | None:
    """What each layer keeps, type by block, at one point of the front after the other."""
    front = overview.front
    if not front:
        return None
    space = space_of(overview.record)
    points = [front[index] for index in layers.evenly(len(front), MOST_MAPS)]
    knee = front.knee()
    shown = min(range(len(points)), key=lambda index: abs(points[index].num_params - knee.num_params))
    traces = [_kept_trace(point, space, visible=index == shown) for index, point in enumerate(points)]
    steps = [
        {
            "label": f"{point.measurement.kept_of_targets:.2f}", "method": "update",
            "args": [
                {"visible": [other == index for other in range(len(points))]}, {"title.text": _kept_title(point)}
            ],
        }
        for index, point in enumerate(points)
    ]  # fmt: skip
    figure = _figure(traces, _kept_title(points[shown]), "", "block")
    below = 30 + 4 * max(map(len, layers.groups(space)))  # what the slanted names of the layer types take
    figure["layout"]["yaxis"] |= {"autorange": "reversed", "dtick": max(1, len(layers.depths(space)) // 15)}
    figure["layout"]["xaxis"] |= {"tickangle": -30, "type": "category"}
    figure["layout"]["margin"]["b"] = below + 85
    figure["layout"]["sliders"] = [
        {
            "active": shown, "steps": steps, "pad": {"t": below}, "len": 1.0,
            "currentvalue": {"prefix": "point that keeps ", "suffix": " of the target layers"},
        }
    ]  # fmt: skip
    return figure


def _kept_title(point: FrontPoint) -> str:
    return f"Trial {point.trial}: what layers keep, loss {point.loss:.4f}"


def _kept_trace(point: FrontPoint, space: RankSpace, *, visible: bool) -> Figure:
    places, groups, blocks = layers.by_place(space), layers.groups(space), layers.depths(space)
    kept: list[list[float | None]] = []
    ranks: list[list[str]] = []
    for block in blocks:
        here = [places.get((group, block), []) for group in groups]
        kept.append([round(layers.kept_of(shapes, point.rank_map, space), 2) if shapes else None for shapes in here])
        ranks.append(["/".join(str(point.rank_map.get(s.name, "dense")) for s in shapes[:4]) for shapes in here])
    return {
        "type": "heatmap", "x": list(groups), "y": list(blocks), "z": kept, "text": ranks, "visible": visible,
        "zmin": 0, "zmax": 1, "colorscale": "Viridis", "xgap": 1, "ygap": 1,
        "colorbar": {"title": {"text": "kept"}, "thickness": 14},
        "hovertemplate": "%{x}, block %{y}<br>kept %{z}<br>rank %{text}<extra></extra>",
    }  # fmt: skip


def prediction_figure(overview: Overview) -> Figure | None:
    """Measured losses against the closed form's own predictions of them."""
    dense = overview.record.dense_loss
    trials = [trial for trial in overview.highest if trial.predicted_rise is not None][-MOST_POINTS:]
    if dense is None or len(trials) < 2:
        return None
    rises = [max(float(trial.predicted_rise or 0.0), 1e-6) for trial in trials]
    low, high = min(rises), max(rises)
    line = [low * (high / low) ** (step / 40) for step in range(41)]
    top = max(trial.loss for trial in trials)
    drawn = [(rise, dense + rise) for rise in line if dense + rise <= top]
    traces = [
        {
            "x": [float(f"{rise:.4g}") for rise in rises], "y": [_rounded(trial.loss) for trial in trials],
            "type": "scatter", "mode": "markers", "name": "trials",
            "marker": {
                "color": [round(trial.kept_of_targets, 3) for trial in trials], "colorscale": "Viridis", "size": 8,
                "showscale": True, "colorbar": {"title": {"text": "kept of<br>targets"}, "thickness": 14},
            },
            "text": [_told(trial) for trial in trials], "showlegend": False,
            "hovertemplate": "%{text}<br>predicted rise %{x:.4f}, measured loss %{y:.4f}<extra></extra>",
        },
        {
            "x": [float(f"{rise:.4g}") for rise, _ in drawn], "y": [_rounded(loss) for _, loss in drawn],
            "type": "scatter", "mode": "lines", "name": "measured as predicted", "hoverinfo": "skip",
            "line": {"color": BLACK, "width": 1, "dash": "dash"},
        },
    ]  # fmt: skip
    figure = _figure(
        traces, "Predicted and measured loss", "rise that the closed form predicts (nats)",
        f"measured loss (nats per {overview.unit})",
    )  # fmt: skip
    figure["layout"]["xaxis"] |= {"type": "log", "dtick": "D2" if high / low < 30 else 1}
    figure["layout"]["legend"] |= {"x": 0.01, "xanchor": "left"}
    return figure


def hypervolume_figure(overview: Overview) -> Figure | None:
    """How the area that the front dominates grew, with the trials' ends."""
    grown = hypervolumes(overview)
    if len(grown) < 2:
        return None
    started = grown[0][0]
    chosen = [grown[index] for index in layers.evenly(len(grown), MOST_STEPS)]
    spent = [(end - started).total_seconds() for end, _, _ in chosen]
    unit, size = next((unit, size) for unit, size in _UNITS if spent[-1] >= 2 * size)
    traces = [
        {
            "x": [round(seconds / max(size, 1), 3) for seconds in spent],
            "y": [round(area, 5) for _, area, _ in chosen],
            "type": "scatter", "mode": "lines+markers", "line": {"color": BLUE, "shape": "hv"}, "marker": {"size": 4},
            "text": [f"trial {number}" for _, _, number in chosen],
            "hovertemplate": "%{text}<br>%{y:.4f} nats<extra></extra>", "showlegend": False,
        }
    ]  # fmt: skip
    return _figure(
        traces, "Hypervolume that the front dominates", f"{unit} since the first trial ended",
        "hypervolume (nats)",
    )  # fmt: skip


def hypervolumes(overview: Overview) -> list[tuple[Any, float, int]]:
    """End, hypervolume after it, and number of every feasible trial of the highest fidelity, the first end first.

    Measured from the dense model's size and :data:`WORST_LOSS` above its loss, as everywhere.
    """
    if overview.record.dense_loss is None:
        return []
    trials = sorted(
        (trial for trial in overview.highest if trial.state == "complete"), key=lambda t: (t.finished, t.number)
    )
    reference = overview.record.dense_loss + WORST_LOSS
    best: list[tuple[int, float]] = []
    found, area, right = [], 0.0, overview.facts.model_params
    for trial in trials:
        if not any(params <= trial.num_params and loss <= trial.loss for params, loss in best):
            best = [p for p in best if not (trial.num_params <= p[0] and trial.loss <= p[1])]
            best = sorted([*best, (trial.num_params, trial.loss)])
            area = _area(best, reference, right)
        found.append((trial.finished, area, trial.number))
    return found


def _area(front: Sequence[tuple[int, float]], reference: float, dense_params: int) -> float:
    area, right = 0.0, dense_params
    for params, loss in reversed(front):
        if loss < reference and params < right:
            area += (right - params) * (reference - loss)
            right = params
    return area / dense_params


def spectra_figure(spectra: Spectra) -> Figure:
    """What every rank saves, by layer type: the middle of its layers, and the range of all of them."""
    traces: list[Figure] = []
    for index, curve in enumerate(spectra.curves):
        colour = (BLUE, ORANGE, GREEN, *_OTHERS)[index % 8]
        x = list(curve.ranks)
        outline = {"x": x + x[::-1], "y": [*curve.high, *curve.low[::-1]], "fill": "toself", "fillcolor": f"{colour}22"}
        shared = {"type": "scatter", "mode": "lines", "legendgroup": curve.group}
        traces.append({**shared, **outline, "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False})
        traces.append(
            {
                **shared, "x": x, "y": list(curve.middle), "name": f"{curve.group} ({curve.layers})",
                "line": {"color": colour, "width": 2},
                "hovertemplate": "%{fullData.name}<br>rank %{x}: %{y:.3g} nats<extra></extra>",
            }
        )  # fmt: skip
    figure = _figure(
        traces, "Spectra: what every next rank saves", "rank", "predicted loss that it saves, ½ σ² (nats)",
    )  # fmt: skip
    figure["layout"]["xaxis"] |= {"type": "log", "dtick": 1}
    figure["layout"]["yaxis"] |= {"type": "log", "exponentformat": "power", "dtick": 2}
    figure["layout"]["legend"] |= {"x": 0.01, "y": 0.01, "xanchor": "left", "yanchor": "bottom"}
    return figure


def _figure(traces: Sequence[Figure], title: str, x: str, y: str) -> Figure:
    axis: Callable[[str], Figure] = lambda text: {  # noqa: E731
        "title": {"text": text}, "gridcolor": "#e4e4e4", "zeroline": False, "automargin": True, "linecolor": "#888",
    }  # fmt: skip
    return {
        "data": list(traces),
        "layout": {
            "title": {"text": title, "font": {"size": 16}, "x": 0.01, "xanchor": "left"},
            "xaxis": axis(x), "yaxis": axis(y), "paper_bgcolor": "#fff", "plot_bgcolor": "#fff",
            "font": {"color": "#222"}, "margin": {"l": 70, "r": 30, "t": 60, "b": 60}, "hovermode": "closest",
            "legend": {"bgcolor": "rgba(255,255,255,0.7)", "x": 0.99, "y": 0.99, "xanchor": "right", "yanchor": "top"},
        },
    }  # fmt: skip


def _xy(points: Iterable[FrontPoint | MeasuredTrial]) -> Figure:
    told = list(points)
    return {"x": [point.num_params for point in told], "y": [_rounded(point.loss) for point in told]}


def _errors(errors: Sequence[float], colour: str) -> Figure:
    return {"type": "data", "array": [_rounded(error) for error in errors], "color": colour, "thickness": 1, "width": 3}


def _rounded(value: float) -> float | None:
    """As precise as a picture shows, and no number where Plotly would find none."""
    return round(value, 5) if math.isfinite(value) else None
