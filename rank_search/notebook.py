"""A front as HTML for notebooks: a table, and a small picture drawn by hand. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import pairwise

Row = tuple[int, str, int, float, float, float, float]
"""Trial, source, parameters, kept fraction of the target layers, loss, its standard error, perplexity."""

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 560, 300, 56, 34
_COLUMNS = ("trial", "source", "parameters", "kept of targets", "loss", "± s.e.", "perplexity")


def front_html(rows: Sequence[Row]) -> str:
    """The rows by ascending parameters as a picture and a table."""
    if not rows:
        return "<p>The front is empty.</p>"
    return f"<div>{front_svg([(row[0], row[2], row[4]) for row in rows])}{table_html(rows)}</div>"


def table_html(rows: Sequence[Row]) -> str:
    """The rows as a table."""
    head = "".join(f"<th>{column}</th>" for column in _COLUMNS)
    body = "".join(
        f"<tr><td>{trial}</td><td>{escape(source)}</td><td>{params:,}</td><td>{kept:.4f}</td><td>{loss:.4f}</td>"
        f"<td>{error:.4f}</td><td>{perplexity:.6g}</td></tr>"
        for trial, source, params, kept, loss, error, perplexity in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def front_svg(points: Sequence[tuple[int, int, float]]) -> str:
    """Loss against parameters as steps; every point tells its trial when it is pointed at.

    Args:
        points: trial, parameters, and loss, by ascending parameters.
    """
    params, losses = [point[1] for point in points], [point[2] for point in points]
    x_low, x_span = params[0], (params[-1] - params[0]) or 1
    y_low, y_span = min(losses), (max(losses) - min(losses)) or 1.0

    def x(value: float) -> float:
        return round(_LEFT + 10 + (value - x_low) / x_span * (_WIDTH - _LEFT - 30), 1)

    def y(value: float) -> float:
        return round(12 + (1 - (value - y_low) / y_span) * (_HEIGHT - _BOTTOM - 24), 1)

    path = f"M{x(params[0])} {y(losses[0])}" + "".join(f"H{x(b[1])}V{y(b[2])}" for _, b in pairwise(points))
    dots = "".join(
        f'<circle cx="{x(size)}" cy="{y(loss)}" r="4" fill="#0072B2"><title>trial {trial}: {size:,} parameters, loss '
        f"{loss:.4f}</title></circle>"
        for trial, size, loss in points
    )
    y_labels = "".join(
        f'<text x="{_LEFT - 4}" y="{y(loss) + 4}" text-anchor="end">{loss:.3f}</text>'
        for loss in (y_low, y_low + y_span / 2, y_low + y_span)
    )
    x_labels = "".join(
        f'<text x="{x(size)}" y="{_HEIGHT - 18}" text-anchor="middle">{size / 1e6:.2f}M</text>'
        for size in (x_low, x_low + x_span / 2, x_low + x_span)
    )
    frame = f'<path d="M{_LEFT} 6V{_HEIGHT - _BOTTOM}H{_WIDTH - 8}" fill="none" stroke="#888"/>'
    title = f'<text x="{(_LEFT + _WIDTH) / 2}" y="{_HEIGHT - 3}" text-anchor="middle">parameters of the model</text>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" font-size="11" role="img" '
        f'aria-label="validation loss against parameters" fill="currentColor">{frame}'
        f'<path d="{path}" fill="none" stroke="#0072B2" stroke-width="1.6"/>{dots}{y_labels}{x_labels}{title}</svg>'
    )
