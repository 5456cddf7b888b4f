"""What to do when memory runs out: the same work once more, in two parts."""

from __future__ import annotations

import errno
import gc
from collections.abc import Callable
from typing import TypeVar

import torch

_Result = TypeVar("_Result")

_ON_HOST = ("DefaultCPUAllocator: can't allocate memory", "Cannot allocate memory", "can't start new thread")
"""How torch, a file that is mapped and a thread without room for its stack say it, in a RuntimeError."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory has run out, a GPU's or the host's."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or (isinstance(error, RuntimeError) and any(words in str(error) for words in _ON_HOST))
    )


def in_halves_if_needed(
    work: Callable[[int], _Result], size: int, on_retry: Callable[[], object] = lambda: None
) -> _Result:
    """``work(1)`` or, where memory runs out under it, ``work(2)``: with batches in two parts.

    ``work`` must be one that may be begun again. A batch of ``size`` 1 cannot be halved.

    Raises:
        Exception: of the second attempt, or of the first where there is none.
    """
    try:
        return work(1)
    except (RuntimeError, MemoryError) as error:
        if size < 2 or not is_out_of_memory(error):
            raise
    # Here, since the error holds on to all that the attempt had in memory.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    on_retry()
    return work(2)
