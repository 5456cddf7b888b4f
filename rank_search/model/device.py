"""Devices by name."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch

from rank_search.errors import DeviceError

_GPU = re.compile(r"cuda(?::(\d{1,9}))?")
_MEMINFO = re.compile(r"^MemAvailable:\s+(\d+) kB$", re.MULTILINE)
_CONTAINER = Path("/sys/fs/cgroup")
_CACHED = re.compile(r"^inactive_file (\d+)$", re.MULTILINE)


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


def resolve_devices(name: str, count: int) -> tuple[torch.device, ...]:
    """As :func:`resolve_device`, and the ``count - 1`` GPUs that follow it.

    Raises:
        DeviceError: another name, or more GPUs than there are.
    """
    first = resolve_device(name)
    if count == 1:
        return (first,)
    there = torch.cuda.device_count() - (first.index or 0) if first.type == "cuda" else 0
    if count > there:
        raise DeviceError(
            f"the model is to be spread over {count} GPUs, but {there or 'none'} can be used here; "
            "change run.gpus_per_model or --gpus-per-worker"
        )
    return tuple(torch.device("cuda", (first.index or 0) + number) for number in range(count))


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


def synchronize(*devices: torch.device) -> None:
    """Wait for the devices, so that a host clock tells the truth."""
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def free_memory(device: torch.device) -> int:
    """Bytes that this process could still have of a device's memory; for the CPU, of the host's."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if (told := _MEMINFO.search(_read(Path("/proc/meminfo")))) is not None:  # what can be freed counts there, too
        free = 1024 * int(told[1])
    limit, used = (_read(_CONTAINER / name).strip() for name in ("memory.max", "memory.current"))
    if limit.isdecimal() and used.isdecimal():
        cached = _CACHED.search(_read(_CONTAINER / "memory.stat"))
        free = min(free, int(limit) - int(used) + (int(cached[1]) if cached else 0))
    return max(free, 0)


def _read(file: Path) -> str:
    """Empty where a system has no such file."""
    try:
        return file.read_text(encoding="ascii")
    except OSError:
        return ""
