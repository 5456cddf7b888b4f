"""Workers keep a study's dashboard current as the search goes: one of them at a time, and none for long."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Self

from rank_search.dashboard.content import show
from rank_search.dashboard.spectra import Spectra
from rank_search.errors import RankSearchError
from rank_search.study.board import claim_board, release_board
from rank_search.study.liveness import WorkerId
from rank_search.study.store import StudyStore

LEAST_PAUSE = 5.0
"""Seconds between two times, all workers together."""
SHARE = 0.01
"""The part of a worker's time that it may spend on the dashboard."""


class Refreshing:
    """Writes the dashboard of a study now and then, in at most a hundredth of this worker's time.

    Workers take turns: who claims the board writes it, and the others go on with their trials. An error is told to
    ``on_trouble``, once, and ends no search.

    Args:
        storage: the database.
        name: of the study.
        spectra: of the study's bank.
    """

    def __init__(
        self, storage: str, name: str, spectra: Spectra | None = None, *,
        on_trouble: Callable[[str], object] = lambda _message: None, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._store = StudyStore(storage)
        self._name = name
        self._spectra = spectra
        self._on_trouble = on_trouble
        self._clock = clock
        self._worker = str(WorkerId.current())
        self._begun = clock()
        self._spent = 0.0
        self._next = 0.0
        self._trouble: str | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._store.close()

    def begin(self) -> None:
        """Write it before the first trial, which tells what it costs."""
        self._write(whose_turn=True)

    def after_trial(self) -> None:
        """Write it, if enough time has passed and it is this worker's turn."""
        if self._clock() >= self._next:
            self._write(whose_turn=True)

    def end(self) -> None:
        """Write it, whoever's turn it is: there may be no one to do it later."""
        self._write(whose_turn=False)

    def _write(self, *, whose_turn: bool) -> None:
        started, engine = self._clock(), self._store.engine
        try:
            if whose_turn and not claim_board(engine, self._name, self._worker):
                self._next = started + LEAST_PAUSE
                return
            show(self._store, self._name, self._spectra)
            if whose_turn:
                release_board(engine, self._name, self._worker, LEAST_PAUSE)
            ended = self._clock()
            self._spent += ended - started
            affordable = self._begun + (self._spent + ended - started) / SHARE  # if the next time takes as long as this
            self._next = max(ended + LEAST_PAUSE, affordable)
        except RankSearchError as error:
            if str(error) != self._trouble:
                self._trouble = str(error)
                self._on_trouble(f"the dashboard is not current: {error}")
