"""GPU-seconds of nested fine-tunes in :mod:`bench_search`, each of which many trials share."""

from __future__ import annotations

from collections.abc import Iterable

from _laps import Clock
from _search_rows import RecordFile

from rank_search.model.device import synchronize
from rank_search.preparing import Prepared
from rank_search.ranks import RankMap


def seconds_of_ranges(prepared: Prepared, clock: Clock) -> dict[str, float]:
    """Train every range, in the order in which the ladder comes to them: the first one counts what is compiled."""
    seconds: dict[str, float] = {}
    for kept in (*prepared.spec.search.ladder, *prepared.trial_banks.tops):
        if (name := _range_at(prepared, kept)) not in seconds:
            started = clock()
            prepared.trial_banks.at(kept)
            synchronize(prepared.device)
            seconds[name] = round(clock() - started, 3)
    return seconds


class Ranges:
    """What the ranges of a run cost it: the seconds of each with the first of its trials in it."""

    def __init__(self, file: RecordFile, prepared: Prepared, measured: Iterable[RankMap], *, is_sliced: bool) -> None:
        self._prepared = prepared
        nested = file.preparation()["nested"] if is_sliced else {}
        self._seconds: dict[str, float] = dict(nested)
        for rank_map in measured:
            self.seconds_of_first(rank_map)

    def seconds_of_first(self, rank_map: RankMap) -> float:
        """Of the range that holds a rank map; 0 for all but the first of them, and in own mode."""
        kept = self._prepared.space.kept_of_targets(rank_map)
        return self._seconds.pop(_range_at(self._prepared, kept), 0.0)


def _range_at(prepared: Prepared, kept: float) -> str:
    return prepared.trial_banks.key_at(kept).digest[:16]
