"""The front as a picture and as tables."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from rank_search import atomic
from rank_search.errors import InputError
from rank_search.export.figures import front_figure, save_figure
from rank_search.export.tables import FrontRow, front_csv, front_json, front_rows
from rank_search.front import Front, FrontPoint
from rank_search.measurement import Fidelity, Measurement
from rank_search.ranks import RankMap

DENSE_PARAMS, DENSE_LOSS = 1000, 3.0


def point(trial: int, num_params: int, loss: float, source: str = "tpe") -> FrontPoint:
    measured = Measurement(
        loss=loss,
        standard_error=0.02,
        num_params=num_params,
        target_params=num_params - 200,
        kept_of_targets=(num_params - 200) / 800,
        kept_of_model=num_params / DENSE_PARAMS,
        fidelity=Fidelity.TUNED,
        tokens=100,
    )
    return FrontPoint(trial, RankMap({"q": trial + 1}), measured, source)


POINTS = [
    point(0, 900, 3.1, "closed form 0.9"),
    point(1, 900, 3.3, "uniform 0.9"),
    point(2, 500, 3.8, "closed form 0.4"),
    point(3, 700, 3.4),
    point(4, 720, 3.6),
    point(5, 600, 14.0),
]
FRONT = Front.of(POINTS)


def drawn(**changes: Any) -> Figure:
    given: dict[str, Any] = {"trials": POINTS, "dense_loss": DENSE_LOSS, "dense_params": DENSE_PARAMS}
    return front_figure(FRONT, **(given | changes))


def offsets(figure: Figure) -> dict[str, set[tuple[float, float]]]:
    """Label → points of every scatter in the picture."""
    return {
        str(collection.get_label()): {(float(x), float(y)) for x, y in collection.get_offsets()}
        for collection in figure.axes[0].collections
    }


# --- picture


def test_every_kind_of_point_is_drawn_once_under_its_own_name() -> None:
    figure = drawn()
    assert offsets(figure) == {
        "closed form": {(900, 3.1), (500, 3.8)},
        "uniform": {(900, 3.3)},
        "other trials": {(720, 3.6), (600, 14.0)},
    }
    (front,) = [line for line in figure.axes[0].lines if line.get_label() == "front"]
    assert [tuple(p) for p in front.get_xydata()] == [(p.num_params, p.loss) for p in FRONT]
    legend = figure.axes[0].get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == [
        "front",
        "closed form",
        "uniform",
        "other trials",
        "dense model",
    ]


def test_the_front_is_stepped_since_between_two_points_the_smaller_is_the_best() -> None:
    (steps,) = [line for line in drawn().axes[0].lines if line.get_drawstyle() == "steps-post"]
    assert steps.get_xdata()[0] == FRONT[0].num_params
    assert steps.get_xdata()[-1] == DENSE_PARAMS


def test_hopeless_points_do_not_squash_the_picture_and_are_counted() -> None:
    axes = drawn().axes[0]
    bottom, top = axes.get_ylim()
    assert bottom < DENSE_LOSS
    assert FRONT[0].loss < top < 4.5
    assert [text.get_text() for text in axes.texts] == ["↑ 1 trial lies above the picture"]
    assert not drawn(trials=POINTS[:-1]).axes[0].texts


def test_the_second_axes_say_kept_fraction_and_perplexity() -> None:
    figure = drawn()
    figure.draw_without_rendering()
    kept, perplexity = figure.axes[0].child_axes
    left, right = figure.axes[0].get_xlim()
    assert kept.get_xlim() == pytest.approx((left / DENSE_PARAMS, right / DENSE_PARAMS))
    labels = [label.get_text() for label in perplexity.get_yticklabels()]
    assert len(labels) >= 3
    for label, place in zip(labels, perplexity.get_yticks(), strict=True):
        assert float(label) == pytest.approx(math.exp(place))


def test_ladder_points_may_be_given_apart_from_the_trials() -> None:
    assert (650, 3.5) in offsets(drawn(closed_form=[point(9, 650, 3.5, "closed form 0.6")]))["closed form"]


def test_one_point_and_no_ladder_make_a_picture() -> None:
    only = [point(0, 700, DENSE_LOSS)]
    figure = front_figure(Front.of(only), trials=only, dense_loss=DENSE_LOSS, dense_params=DENSE_PARAMS)
    bottom, top = figure.axes[0].get_ylim()
    assert bottom < DENSE_LOSS < top
    assert not offsets(figure)


def test_losses_beyond_any_perplexity_can_be_drawn(tmp_path: Path) -> None:
    far = [point(0, 500, 2000.0), point(1, 900, 3.1)]
    figure = front_figure(Front.of(far), trials=far, dense_loss=DENSE_LOSS, dense_params=DENSE_PARAMS)
    save_figure(figure, tmp_path / "front.png")
    assert figure.axes[0].get_ylim()[1] > 2000


def test_an_empty_front_is_refused() -> None:
    with pytest.raises(InputError, match="the front is empty"):
        front_figure(Front(), trials=[], dense_loss=DENSE_LOSS, dense_params=DENSE_PARAMS)


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".PDF", b"%PDF")])
def test_the_suffix_names_the_format(tmp_path: Path, suffix: str, start: bytes) -> None:
    path = tmp_path / f"front{suffix}"
    save_figure(drawn(), path)
    assert path.read_bytes().startswith(start)


def test_pictures_that_cannot_be_written_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"suffix must be one of \.png, \.svg, \.pdf, not '\.docx'"):
        save_figure(drawn(), tmp_path / "front.docx")
    with pytest.raises(InputError, match="cannot be written: No such file or directory"):
        save_figure(drawn(), tmp_path / "nowhere" / "front.png")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(InputError, match="No space left on device"):
        save_figure(drawn(), tmp_path / "front.png")
    assert not list(tmp_path.iterdir())


# --- tables


def test_rows_follow_the_front_with_its_own_numbers() -> None:
    rows = front_rows(FRONT)
    assert [row.trial for row in rows] == [2, 3, 0]
    assert rows[0] == FrontRow(
        trial=2,
        source="closed form 0.4",
        num_params=500,
        kept_of_targets=0.375,
        kept_of_model=0.5,
        loss=3.8,
        standard_error=0.02,
        perplexity=math.exp(3.8),
        fidelity="tuned",
    )


def test_csv_and_json_say_the_same() -> None:
    first, *others = FRONT
    measured = replace(first.measurement, metrics={"accuracy": 0.5, "f1": 0.25}, fold_losses=(3.0, 4.0))
    points = [replace(first, measurement=measured), *others]
    from_csv = list(csv.DictReader(io.StringIO(front_csv(points))))
    from_json = json.loads(front_json(points))
    assert len(from_csv) == len(FRONT)
    assert from_json[0]["metrics"] == {"accuracy": 0.5, "f1": 0.25}
    assert from_json[0]["fold_deviation"] == pytest.approx(math.sqrt(0.5))
    for row in from_json:
        row |= {"accuracy": None, "f1": None} | row.pop("metrics")
    said = [{key: "" if value is None else str(value) for key, value in row.items()} for row in from_json]
    assert said == from_csv


def test_an_empty_front_is_a_heading_and_an_empty_array() -> None:
    assert front_csv([]) == (
        "trial,source,num_params,kept_of_targets,kept_of_model,loss,standard_error,perplexity,fidelity,fold_deviation\n"
    )
    assert json.loads(front_json([])) == []


def test_a_perplexity_beyond_a_float_is_null_in_json() -> None:
    (row,) = json.loads(front_json([point(0, 700, 2000.0)]))
    assert row["perplexity"] is None
    assert row["loss"] == 2000.0
