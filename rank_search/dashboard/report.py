"""`rank-search report`: one HTML file with a study's figures and tables, which opens from disk and asks no network."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from datetime import UTC, datetime
from html import escape
from importlib import metadata, resources
from pathlib import Path
from string import Template

from rank_search.atomic import write_atomically
from rank_search.dashboard import tables
from rank_search.dashboard.content import Content, read_content
from rank_search.dashboard.notes import export_command
from rank_search.dashboard.tables import Table
from rank_search.errors import InputError
from rank_search.study.overview import Overview
from rank_search.study.store import StudyStore

_HEADINGS = {
    "rank-search-1-front": "Front",
    "rank-search-2-kept-fractions": "What every layer keeps",
    "rank-search-3-predicted-and-measured": "Predicted and measured",
    "rank-search-4-hypervolume": "The search",
    "rank-search-5-spectra": "Spectra",
}
_MOST_FAILURES = 20


def write_report(storage: str, name: str, path: Path) -> None:
    """Write the report of a study, whole or not at all.

    Raises:
        InputError: Plotly is not installed, or the file cannot be written.
        StorageError: the database cannot be reached, or lacks the study.
    """
    with StudyStore(storage) as store:
        text = report(read_content(store, name))
    try:
        write_atomically(path, text.encode())
    except OSError as error:
        raise InputError(f"report {path} cannot be written: {error.strerror}") from None


def report(content: Content) -> str:
    """The report as HTML.

    Raises:
        InputError: Plotly is not installed.
    """
    overview = content.overview
    template = resources.files(__package__).joinpath("report.html.tmpl").read_text(encoding="utf-8")
    figures = json.dumps(content.figures, separators=(",", ":"), allow_nan=False)
    return Template(template).substitute(
        title=escape(f"Rank search: {overview.record.name}"),
        progress=escape(tables.progress_line(overview)),
        made=escape(_made()),
        sections="\n".join(_sections(content)),
        plotly=_plotly(),
        figures=figures.replace("<", "\\u003c"),  # text of JSON must not end its element
    )


def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ModuleNotFoundError as error:
        raise InputError(f"the report needs {error.name}; pip install 'rank-search[dashboard]'") from None
    source: str = get_plotlyjs()
    return source


def _made() -> str:
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("rank-search", "optuna"))
    return f"Written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC by {versions}, Python {platform.python_version()}."


def _sections(content: Content) -> Iterator[str]:
    overview = content.overview
    yield _section("What is searched", html(tables.study_table(overview)))
    for key, figure in content.figures.items():
        told = html(tables.front_table(overview)) if key == "rank-search-1-front" else ""
        label = escape(figure["layout"]["title"]["text"], quote=True)
        drawing = f'<div class="figure" id="{key}" role="group" aria-label="{label}"></div>'
        yield _section(_HEADINGS[key], drawing + told)
    if overview.front:
        about = (
            f"<p>Kept fractions are of the target layers, losses in nats per {overview.unit}; on the right, "
            "allocations of the same budget without a search.</p>"
        )
        yield _section("Best point of the front for a budget", about + html(tables.budget_table(overview)))
        knee = overview.front.knee()
        yield _section(f"The knee: trial {knee.trial}", html(tables.type_table(knee, overview)))
        yield _section("Take one away", f"<pre>{escape(export_command(overview, knee.trial))}</pre>")
    if overview.status.failures:
        rows = tuple((str(number), reason) for number, reason in overview.status.failures[:_MOST_FAILURES])
        yield _section("Failed trials", html(Table(("trial", "reason"), rows, frozenset({"reason"}))))
    yield _section("How it was made", _recipe(overview))


def _recipe(overview: Overview) -> str:
    """The study file as stored, and the digests of what its measurements rest on."""
    facts = overview.facts
    digests = {
        "weights": facts.weights_digest,
        "calibration text": facts.calibration_digest,
        "training text": facts.train_digest,
        "validation text": facts.validation_digest,
        "factor bank": facts.bank,
        "study file": overview.record.spec.digest,
    }
    rows = tuple((name, value) for name, value in digests.items() if value)
    spec = json.dumps(overview.record.spec.model_dump(mode="json"), indent=2)
    listing = html(Table(("SHA-256 of", ""), rows, frozenset({"SHA-256 of", ""})))
    return f"{listing}<details><summary>The study file with all defaults</summary><pre>{escape(spec)}</pre></details>"


def _section(heading: str, body: str) -> str:
    return f"<section><h2>{escape(heading)}</h2>{body}</section>"


def html(table: Table) -> str:
    """A table."""
    kinds = ["text" if column in table.text else "number" for column in table.columns]

    def row(cells: tuple[str, ...], tag: str) -> str:
        pairs = zip(cells, kinds, strict=True)
        tags = [tag if cell else "td" for cell in cells]  # a header that says nothing is none
        told = [f'<{tag} class="{kind}">{escape(cell)}</{tag}>' for tag, (cell, kind) in zip(tags, pairs, strict=True)]
        return f"<tr>{''.join(told)}</tr>"

    body = "".join(row(cells, "td") for cells in table.rows)
    return f'<div class="scroll"><table><thead>{row(table.columns, "th")}</thead><tbody>{body}</tbody></table></div>'
