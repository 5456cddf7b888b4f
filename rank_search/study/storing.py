"""Stores the results of trials; what the database does not take is kept on disk until it does. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rank_search.errors import LeaseLostError, StorageError
from rank_search.measurement import Measurement
from rank_search.study.patience import Patience
from rank_search.study.spool import Spool, Spooled
from rank_search.study.store import StudyStore


@dataclass
class Storing:
    """The storing of one study's results, as one worker does it.

    Args:
        missed: tells in words which goals of the study a measurement misses; None where it misses none.
        spool: None keeps nothing on disk.
    """

    name: str
    worker: str
    store: StudyStore
    patience: Patience
    missed: Callable[[Measurement], str | None]
    spool: Spool | None
    _said: set[Path] = field(default_factory=set)
    """Files that were told of already."""

    def complete(self, number: int, rank_map_digest: str, rung: int, measurement: Measurement) -> Measurement:
        """Store a result of this worker's, kept on disk and tried again while the database does not take it.

        Returns:
            The stored measurement: a trial that has one already keeps it.

        Raises:
            LeaseLostError: the trial was taken from this worker; nothing is stored or kept.
            StorageError: the database refuses it; it is kept on disk.
            OutOfPatienceError: the database was away for too long; it is kept on disk.
        """
        result = Spooled(number, self.worker, rank_map_digest, rung, measurement)
        kept: list[Path] = []
        refusals: list[OSError] = []

        def keep() -> None:
            """Tried whenever the database refuses, for there may be room by now, but said once."""
            if self.spool is None or kept:
                return
            try:
                kept.append(self.spool.keep(result))
            except OSError as error:
                if not refusals:
                    self.patience.say(
                        f"the result of trial {number} cannot be kept on disk either ({error.strerror or error}); "
                        "it is lost if this worker ends before the database is back"
                    )
                refusals.append(error)

        def attempt() -> Measurement:
            try:
                return self._complete(result)
            except LeaseLostError:
                raise
            except StorageError:
                keep()
                raise

        try:
            stored = self.patience.keep_trying(attempt)
        except LeaseLostError:
            self._remove(kept)
            raise
        self._remove(kept)
        return stored

    def complete_kept(self, number: int) -> bool:
        """Store what is kept on disk of a trial of this worker's, if anything is, in one attempt.

        Returns:
            False where the database did not take it: it stays on disk, and the trial is to be left as it is.
        """
        for path, result in self._kept():
            if (result.number, result.worker) == (number, self.worker):
                try:
                    self._complete_kept(path, result)
                except StorageError as error:
                    self.patience.say(
                        f"the result of trial {number} stays on disk and is stored when the study is opened next: "
                        f"{error}"
                    )
                    return False
        return True

    def replay(self) -> None:
        """Store what is kept on disk, whosever it is; what another database's trials gave is left alone.

        Raises:
            StorageError: the database does not take it, which stays on disk.
        """
        for path, result in self._kept():
            self._complete_kept(path, result)

    def _kept(self) -> Iterator[tuple[Path, Spooled]]:
        return iter(()) if self.spool is None else self.spool.results(self._say_damaged)

    def _say_damaged(self, path: Path, why: str) -> None:
        if path not in self._said:
            self._said.add(path)
            self.patience.say(f"file {path} holds no result that could be stored: {why}")

    def _complete_kept(self, path: Path, result: Spooled) -> None:
        row = self.store.trial(self.name, result.number)
        if row is None or row.worker != result.worker or row.rank_map.digest != result.rank_map_digest:
            return
        try:
            self._complete(result)
            self.patience.say(f"stored the result of trial {result.number}, which was kept on disk")
        except LeaseLostError as error:
            self.patience.say(f"dropped a result that was kept on disk: {error}")
        self._remove([path])

    def _remove(self, paths: list[Path]) -> None:
        """Delete files whose results are stored; one that stays is told once, and storing it again changes nothing."""
        for path in paths:
            try:
                path.unlink(missing_ok=True)  # another worker may have told it, too
            except OSError as error:
                if path not in self._said:
                    self._said.add(path)
                    self.patience.say(f"file {path} is not needed any more; delete it ({error.strerror or error})")

    def _complete(self, result: Spooled) -> Measurement:
        return self.store.complete_trial(
            self.name, result.number, result.measurement, rung=result.rung, infeasible=self.missed(result.measurement)
        )
