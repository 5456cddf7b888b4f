"""What processes and GPUs are busy with, for the table. Linux's /proc and nvidia-smi; elsewhere nothing is shown."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

from rank_search.launch.devices import Use, gpu_use

_GPU_SECONDS = 5.0
"""How often nvidia-smi is asked."""


@dataclass(slots=True)
class Usage:
    """Keeps what two looks at a process are needed for."""

    _cpu: dict[int, tuple[float, float]] = field(default_factory=dict)
    _gpus: dict[str, Use] = field(default_factory=dict)
    _asked: float = -_GPU_SECONDS
    _percent: dict[int, float] = field(default_factory=dict)

    def of_gpus(self, names: list[str]) -> Use | None:
        """Mean use and summed memory of some GPUs, None where they tell nothing."""
        now = time.monotonic()
        if now - self._asked >= _GPU_SECONDS:
            self._gpus, self._asked = gpu_use(), now
        found = [self._gpus[name] for name in names if name in self._gpus]
        if not found:
            return None
        return Use(sum(use.percent for use in found) / len(found), sum(use.memory for use in found))

    def of_process(self, pid: int) -> Use | None:
        """Percent of one core, over a second or more, and resident bytes of a process."""
        try:
            stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="utf-8").split()[1])
        except (OSError, IndexError):
            return None
        now, spent = time.monotonic(), (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")
        before = self._cpu.get(pid)
        if before is None:
            self._cpu[pid] = now, spent
        elif now - before[0] >= 1.0:
            self._percent[pid] = 100.0 * (spent - before[1]) / (now - before[0])
            self._cpu[pid] = now, spent
        return Use(self._percent.get(pid, 0.0), pages * os.sysconf("SC_PAGE_SIZE"))
