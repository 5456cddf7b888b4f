"""Garbage collection in a process that keeps much and throws much away."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def sparing_the_collector() -> Iterator[Callable[[], None]]:
    """Yields what to call when only that is alive which stays: until the block ends, no later collection of garbage
    goes through it again.

    A process with a model and a compiler has half a million objects. Going through them takes 0.3 to 0.5 s, which
    sliced trials, by what they make and throw away, cause every 25th time. Where somebody has frozen objects already,
    it does nothing: there is no giving them back apart from ours.
    """
    if gc.get_freeze_count():
        yield lambda: None
        return

    def settle() -> None:
        gc.collect()  # garbage that is frozen would stay, with the GPU memory that it holds
        gc.freeze()

    try:
        yield settle
    finally:
        gc.unfreeze()
