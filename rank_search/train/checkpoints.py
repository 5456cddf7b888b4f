"""How far a fine-tune has come, kept on disk now and then, so that whoever takes over its trial goes on from there.

One safetensors file a fine-tune, named by a digest of all that its steps follow from: what is trained, the state of the
optimiser, and the losses, with a JSON header that says the next step and the digest of the content. A fine-tune that
goes on from it takes the same steps as one that was never interrupted.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rank_search.factors.tensor_files import write_tensors
from rank_search.model.device import synchronize
from rank_search.progress import SILENT, Preempted, Progress
from rank_search.spec import RunSpec

SHARE = 0.05
"""Of the time that writing may take: the next checkpoint waits until the last one has paid for itself."""

STALE_SECONDS = 14 * 86400.0
"""A checkpoint that nobody has gone on from for so long is of a trial that was given up or measured elsewhere."""

_VERSION = 1
_LOSSES = "losses"


class _DamagedError(Exception):
    """A checkpoint that is not what it says."""


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """The folder of a study's checkpoints.

    Attributes:
        folder: made when the first one is written.
        seconds: between two checkpoints of a fine-tune; 0: none are written or read.
    """

    folder: Path
    seconds: float

    @classmethod
    def in_folder(cls, work_dir: Path, run: RunSpec) -> Checkpoints:
        """Those of a study's working folder."""
        return cls(work_dir / "checkpoints", run.checkpoint_seconds)

    def of(self, **follows_from: object) -> Checkpoint | None:
        """That of the fine-tune whose steps follow from these values (JSON's); None where none are wanted."""
        if not self.seconds:
            return None
        told = json.dumps({"version": _VERSION, **follows_from}, sort_keys=True)
        key = hashlib.sha256(told.encode()).hexdigest()
        return Checkpoint(self.folder / f"{key[:24]}.safetensors", key, self.seconds)

    def remove_stale(self) -> None:
        """Remove what nobody will go on from any more, half-written files too."""
        if not self.folder.is_dir():
            return
        for path in self.folder.iterdir():
            with contextlib.suppress(OSError):  # gone already, or a folder of somebody else's
                if time.time() - path.stat().st_mtime > STALE_SECONDS:
                    path.unlink()


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The checkpoint of one fine-tune, there or not."""

    path: Path
    key: str
    seconds: float

    def remove(self) -> None:
        """Remove it, if it is there: the fine-tune has served its purpose."""
        with contextlib.suppress(OSError):  # of a folder that may only be read, say; it will be stale one day
            self.path.unlink(missing_ok=True)


class Keeping:
    """Keeps the state of one fine-tune while it runs.

    Args:
        checkpoint: where; None keeps nothing, and changes nothing.
        trained: what ``optimizer`` trains.
        losses: of all steps.
    """

    def __init__(
        self,
        checkpoint: Checkpoint | None,
        trained: Sequence[Tensor],
        optimizer: torch.optim.Optimizer,
        losses: Tensor,
        progress: Progress = SILENT,
    ) -> None:
        self._checkpoint = checkpoint
        self._trained = trained
        self._optimizer = optimizer
        self._losses = losses
        self._progress = progress
        self._first = 0
        self._stays = False
        self._started = time.monotonic()
        self._due = self._started + (checkpoint.seconds if checkpoint else float("inf"))

    def resume(self) -> int:
        """Bring everything to where the checkpoint was written, in place; returns the next step, 0 without one."""
        if self._checkpoint is None or not self._checkpoint.path.exists():
            return 0
        try:
            step, kept = _read(self._checkpoint, self._expected())
        except _DamagedError as error:
            self._progress.say(f"the checkpoint {self._checkpoint.path} is damaged ({error}); starting again")
            self._checkpoint.remove()
            return 0
        self._take(kept)
        self._first = step
        self._progress.say(f"going on from step {step} of {len(self._losses)}, where this fine-tune was interrupted")
        return step

    def after_step(self, done: int) -> None:
        """To be called after every step, with the number of those that are done.

        Raises:
            Preempted: this process is to end before the fine-tune can; its checkpoint is written.
        """
        if self._checkpoint is None or done == len(self._losses):
            return
        if not self._stays and (left := self._progress.seconds_left()) is not None:
            self._stays = self._seconds_needed(done) < left / 2  # the rest is for scoring
            if not self._stays:
                self._write(done)
                raise Preempted
        if time.monotonic() >= self._due:
            self._write(done)

    def _seconds_needed(self, done: int) -> float:
        """For the other steps, at the pace of those that are done."""
        synchronize(self._losses.device)
        return (time.monotonic() - self._started) / (done - self._first) * (len(self._losses) - done)

    def _write(self, done: int) -> None:
        assert self._checkpoint is not None
        started = time.monotonic()
        try:
            _save(self._checkpoint, done, self._state())
        except (OSError, SafetensorError) as error:
            self._progress.say(f"the checkpoint {self._checkpoint.path} cannot be written ({error}); going on without")
        took = time.monotonic() - started
        self._due = time.monotonic() + max(self._checkpoint.seconds, took / SHARE)

    def _state(self) -> dict[str, Tensor]:
        state = {_LOSSES: self._losses}
        for index, parameter in enumerate(self._trained):
            state[f"{index}"] = parameter
            for name, value in self._optimizer.state.get(parameter, {}).items():
                state[f"{index}.{name}"] = value
        return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}

    def _expected(self) -> dict[str, Tensor]:
        return {_LOSSES: self._losses, **{f"{index}": parameter for index, parameter in enumerate(self._trained)}}

    @torch.no_grad()
    def _take(self, kept: Mapping[str, Tensor]) -> None:
        # In place, and before the first step: one that is recorded keeps reading where it was recorded.
        self._losses.copy_(kept[_LOSSES])
        for index, parameter in enumerate(self._trained):
            parameter.copy_(kept[f"{index}"])
            of_parameter = {
                name.partition(".")[2]: value for name, value in kept.items() if name.startswith(f"{index}.")
            }
            if of_parameter:
                self._optimizer.state[parameter] = {
                    name: value.to(parameter.device, copy=True) for name, value in of_parameter.items()
                }


def _save(checkpoint: Checkpoint, step: int, state: Mapping[str, Tensor]) -> None:
    """Write a checkpoint, whole or not at all."""
    path = checkpoint.path
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {"version": _VERSION, "key": checkpoint.key, "step": step, "digest": _digest(step, state)}
    write_tensors(path, state, {"checkpoint": json.dumps(header)})


def _read(checkpoint: Checkpoint, expected: Mapping[str, Tensor]) -> tuple[int, dict[str, Tensor]]:
    """The next step and the state of a checkpoint, which holds at least tensors like the ``expected`` ones."""
    try:
        with safe_open(checkpoint.path, framework="pt") as file:
            header = json.loads(file.metadata()["checkpoint"])
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
        step, digest = header["step"], header["digest"]
        if header["version"] != _VERSION or header["key"] != checkpoint.key:
            raise _DamagedError("it is another fine-tune's")
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise _DamagedError(str(error)) from None
    if digest != _digest(step, state):
        raise _DamagedError("its content is not what was written")
    for name, tensor in expected.items():
        if name not in state or (state[name].shape, state[name].dtype) != (tensor.shape, tensor.dtype):
            raise _DamagedError("it was written on another kind of device")
    return step, state


def _digest(step: int, state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(str(step).encode())
    for name in sorted(state):
        digest.update(f"{name} {state[name].dtype} {tuple(state[name].shape)}".encode())
        digest.update(state[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
