"""Devices by name."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from rank_search.errors import DeviceError

_GPU = re.compile(r"cuda(?::(\d{1,9}))?")


def resolve_device(name: str) -> torch.device:
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N`` as a device that is there.

    Raises:
        DeviceError: another name, or a GPU that this machine does not have.
    """
    # cuBLAS reads this when it starts; without it, it may sum in another order each time.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if name == "cpu":
        return torch.device("cpu")
    gpu = _GPU.fullmatch(name)
    if gpu is None:
        raise DeviceError(f"device must be auto, cpu, cuda or cuda:N, not {name!r}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = int(gpu[1] or 0)
    if index >= count:
        raise DeviceError(
            f"device {name!r} was asked for, but this machine has {count} usable GPUs; use 'auto' or 'cpu'"
        )
    return torch.device("cuda", index)


def autocast(device: torch.device) -> AbstractContextManager[object]:
    """bf16 autocast on a GPU, plain float32 on a CPU."""
    if device.type == "cuda":
        return torch.autocast("cuda", torch.bfloat16)
    return nullcontext()


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """On a GPU, sums in a fixed order, so that one seed gives one result."""
    if device.type != "cuda":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs time, changes nothing
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that a host clock tells the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
