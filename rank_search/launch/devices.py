"""What this host has for workers: GPUs by nvidia-smi, cores by the scheduler. No torch."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from rank_search.errors import DeviceError

VISIBLE = "CUDA_VISIBLE_DEVICES"
CORES_A_WORKER = 4
"""Of a host without GPUs, where the number of workers is not told."""
_SECONDS = 10.0
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one worker runs: what a table calls it, its GPUs, and the environment that confines it to them."""

    device: str
    gpus: tuple[str, ...]
    environment: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Use:
    """How busy a device or process is: percent, and bytes of memory."""

    percent: float
    memory: int


def gpus(environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """The GPUs that this process may use, by index or identity, as ``CUDA_VISIBLE_DEVICES`` takes them."""
    if VISIBLE in environment:
        return tuple(name for name in environment[VISIBLE].replace(" ", "").split(",") if name and name != "-1")
    return tuple(line.split(",")[0].strip() for line in _nvidia_smi("index"))


def gpu_use() -> dict[str, Use]:
    """Use of every GPU of the host, by index and by identity; empty where there is none."""
    found: dict[str, Use] = {}
    for line in _nvidia_smi("index,uuid,utilization.gpu,memory.used"):
        index, identity, percent, mebibytes = (part.strip() for part in line.split(","))
        try:
            use = Use(float(percent), int(mebibytes) * 2**20)
        except ValueError:  # "[N/A]" of a part of a GPU
            continue
        found[index] = found[identity] = use
    return found


def slots(
    workers: int | None, gpus_per_worker: int | None, *, on_cpu: bool, available: tuple[str, ...] | None = None,
    cores: int | None = None,
) -> tuple[Slot, ...]:  # fmt: skip
    """Share the host out: GPUs to each worker, or cores where there are none or the study wants none.

    Workers beyond what the GPUs suffice for share them in turn.

    Raises:
        DeviceError: more GPUs a worker than there are.
    """
    cores = cores or len(os.sched_getaffinity(0))
    devices = () if on_cpu or gpus_per_worker == 0 else gpus() if available is None else available
    if not devices:
        if gpus_per_worker:
            raise DeviceError(
                f"--gpus-per-worker {gpus_per_worker} was asked for, but "
                f"{'the study runs on the CPU' if on_cpu else 'this host has no GPU'}; leave it out"
            )
        count = workers or max(1, cores // CORES_A_WORKER)
        hidden = {VISIBLE: ""} if on_cpu or gpus_per_worker == 0 else {}
        threads = max(1, cores // count)
        label = f"{threads} core{'s' if threads > 1 else ''}"
        return tuple(Slot(label, (), {**_threads(threads), **hidden}) for _ in range(count))
    each = gpus_per_worker or 1
    if each > len(devices):
        raise DeviceError(f"--gpus-per-worker {each} was asked for, but this host has {len(devices)} usable GPUs")
    groups = [devices[i : i + each] for i in range(0, len(devices) - each + 1, each)]
    count = workers or len(groups)
    threads = max(1, cores // count)
    chosen = [groups[i % len(groups)] for i in range(count)]
    return tuple(
        Slot("GPU " + ",".join(group), group, {VISIBLE: ",".join(group), **_threads(threads)}) for group in chosen
    )


def _threads(count: int) -> dict[str, str]:
    return {name: os.environ.get(name, str(count)) for name in _THREADS}


def _nvidia_smi(query: str) -> list[str]:
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return []  # no driver, so no GPU that a worker could use
    return done.stdout.splitlines()
