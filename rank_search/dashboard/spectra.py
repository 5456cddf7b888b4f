"""The spectra of the target layers, from a factor bank: what every next rank is predicted to save. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rank_search.errors import BankError
from rank_search.ranks import LayerShape
from rank_search.study.records import StudyRecord

POINTS = 48
"""Ranks at which a curve is drawn, evenly spaced on a logarithmic axis."""
_LEAST = 1e-12
"""Nats; less is no different from nothing, and a logarithmic axis has no zero."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class SpectrumCurve:
    """The layers of one type: at some ranks r, the range over the layers of ``½ σ_r²`` in nats, and its median."""

    group: str
    layers: int
    ranks: tuple[int, ...]
    low: tuple[float, ...]
    middle: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Spectra:
    """All layer types."""

    curves: tuple[SpectrumCurve, ...]

    @classmethod
    def of_tails(cls, shapes: Sequence[LayerShape], tails: Mapping[str, Floats]) -> Spectra:
        """From predicted rises at rank 0, 1, ..., min(m, n), in nats: rank r saves ``tail[r-1] - tail[r]``."""
        gains = {name: -np.diff(np.asarray(tail, dtype=np.float64)) for name, tail in tails.items()}
        return cls._of(shapes, gains)

    @classmethod
    def _of(cls, shapes: Sequence[LayerShape], gains: Mapping[str, Floats]) -> Spectra:
        groups: dict[str, list[Floats]] = {}
        for shape in shapes:
            groups.setdefault(shape.group, []).append(gains[shape.name])
        return cls(tuple(_curve(group, members) for group, members in groups.items()))


def _curve(group: str, gains: Sequence[Floats]) -> SpectrumCurve:
    top = min(len(gain) for gain in gains)  # layers of one type have one shape, but for odd ones at the model's ends
    ranks = np.unique(np.geomspace(1, top, POINTS).round().astype(int))
    table = np.maximum(np.array([gain[ranks - 1] for gain in gains]), _LEAST)
    low, middle, high = table.min(0), np.median(table, 0), table.max(0)
    return SpectrumCurve(group, len(gains), tuple(ranks.tolist()), *(_short(values) for values in (low, middle, high)))


def _short(values: Floats) -> tuple[float, ...]:
    return tuple(float(f"{value:.3g}") for value in values)


def stored_spectra(record: StudyRecord) -> Spectra | None:
    """From the study's bank in its working folder, None where that is not at hand.

    Raises:
        BankError: the bank is damaged.
    """
    facts = record.facts
    path = Path(facts.folder) / record.spec.run.work_dir / "banks" / f"{facts.bank[:24]}.safetensors"
    if not path.is_file():
        return None
    from safetensors import SafetensorError, safe_open

    gains = {}
    try:
        with safe_open(path, framework="np") as file:
            for shape in facts.shapes:
                gains[shape.name] = 0.5 * np.asarray(file.get_tensor(f"{shape.name}.sigma"), dtype=np.float64) ** 2
    except (SafetensorError, OSError, ValueError) as error:
        raise BankError(f"factor bank {path} is damaged ({error}); delete it and run the study again") from None
    return Spectra._of(facts.shapes, gains)
