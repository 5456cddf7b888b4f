"""The factor bank: the sorted factors of every target layer, made once, on disk, sliced by every trial.

One safetensors file a bank, named by its key and memory-mapped: ``<layer>.out`` (rank, m), ``<layer>.inn`` (rank, n)
in float32 and ``<layer>.sigma`` in float64, with a JSON header that says what it was made from.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
import uuid
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rank_search.errors import BankError
from rank_search.factors.decompose import Factors
from rank_search.factors.remote import RemoteBanks
from rank_search.factors.tensor_files import streamed_tensors
from rank_search.ranks import LayerShape, RankSpace, Storage
from rank_search.spec import FactorSpec

FORMAT_VERSION = 2

_LOOK_SECONDS = 0.1

_RECIPES = {"asvd": "asvd: E|x|"}
"""Methods whose factors were once made otherwise, with what their keys say now; all other banks stay good."""
_LATER = {"gain_step": 0.0}
"""Fields of keys that came later, with the value that leaves factors as they were."""


@dataclass(frozen=True)
class BankKey:
    """All that a bank's content follows from; equal keys share one file."""

    revision: str | None
    weights_digest: str
    calibration_digest: str
    method: str
    damping: float
    seed: int
    storage: Storage
    layers: tuple[tuple[str, int, int], ...]
    anchor: float = 1.0
    """Kept fraction of the compressed model that the statistics were taken on, too; 1 for the dense model alone."""
    recalibration_digest: str = ""
    """Of what the compressed model was looked at on."""
    slope_power: float = 0.0
    """Of measured slopes over predicted ones, by which predicted rises were multiplied."""
    gain_step: float = 0.0
    """Of the Newton step by which every layer's factors were scaled."""
    tuned: str = ""
    """Digest of the nested fine-tune that the factors went through; empty for factors that were not trained."""
    format_version: int = FORMAT_VERSION

    @classmethod
    def of(
        cls,
        revision: str | None,
        weights_digest: str,
        calibration_digest: str,
        spec: FactorSpec,
        space: RankSpace,
        recalibration_digest: str = "",
    ) -> BankKey:
        """The key of a study's bank. Plain SVD sees no calibration, so any calibration shares it."""
        blind = spec.method == "svd"
        anchor = 1.0 if blind else spec.anchor
        return cls(
            revision, weights_digest, "" if blind else calibration_digest, _RECIPES.get(spec.method, spec.method),
            spec.damping, spec.seed, space.storage, tuple((shape.name, shape.m, shape.n) for shape in space.shapes),
            anchor=anchor, recalibration_digest=recalibration_digest if anchor < 1 else "",
            slope_power=spec.slope_power if spec.method == "kfac" and anchor < 1 else 0.0,
            gain_step=spec.gain_step if spec.method == "kfac" and anchor < 1 else 0.0,
        )  # fmt: skip

    def told(self) -> dict[str, Any]:
        """The key as plain data, without later fields that change nothing: banks of before keep their names."""
        return {name: value for name, value in asdict(self).items() if name not in _LATER or value != _LATER[name]}

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the key's JSON form."""
        return hashlib.sha256(json.dumps(self.told(), sort_keys=True).encode()).hexdigest()


class FactorBank:
    """An open bank. Tensors are views of the mapped file until they are moved to a device."""

    def __init__(self, path: Path, key: BankKey, factors: Mapping[str, Factors], made: Mapping[str, Any]) -> None:
        self.path = path
        self.key = key
        self.made = made
        self._factors = factors

    def __getitem__(self, name: str) -> Factors:
        return self._factors[name]

    def tails(self) -> dict[str, NDArray[np.float64]]:
        """Module name → predicted rise at rank 0, 1, ..., min(m, n): ``½ Σ_{i>r} σᵢ²``."""
        return tails(self._factors)

    @property
    def nbytes(self) -> int:
        """Bytes of all factors."""
        return sum(f.out.nbytes + f.inn.nbytes for f in self._factors.values())

    def on(self, devices: torch.device | Mapping[str, torch.device]) -> Mapping[str, Factors]:
        """The factors for trials on a device, or on those of the layers: on GPUs with room for them they are copied
        there once."""
        if isinstance(devices, torch.device):
            devices = dict.fromkeys(self._factors, devices)
        nbytes: dict[torch.device, int] = {}
        for name, f in self._factors.items():
            nbytes[devices[name]] = nbytes.get(devices[name], 0) + f.out.nbytes + f.inn.nbytes
        if any(d.type != "cuda" or held >= torch.cuda.mem_get_info(d)[0] // 4 for d, held in nbytes.items()):
            return self._factors
        return {
            name: Factors(f.out.to(devices[name]), f.inn.to(devices[name]), f.sigma)
            for name, f in self._factors.items()
        }


class TrialBanks:
    """What trials slice: one bank, or banks for ranges of kept fractions (of the target layers).

    A range's bank is opened, or made, when it is first asked for.

    Args:
        tops: the upper ends of the ranges, ascending.
        keys: those of their banks.
        open_or_make: gives the bank of the range of this number.
    """

    def __init__(
        self, tops: Sequence[float], keys: Sequence[BankKey], open_or_make: Callable[[int], FactorBank]
    ) -> None:
        self.tops = tuple(tops)
        self._keys = tuple(keys)
        self._open_or_make = open_or_make
        self._open: dict[int, FactorBank] = {}

    @classmethod
    def single(cls, bank: FactorBank) -> TrialBanks:
        """One bank for all rank maps."""
        return cls([1.0], [bank.key], lambda _: bank)

    @property
    def digest(self) -> str:
        """SHA-256 of the keys of all banks; a single bank's is its own."""
        digests = [key.digest for key in self._keys]
        return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()

    @property
    def banks(self) -> tuple[FactorBank, ...]:
        """All banks, by range; those that are not there are made."""
        return tuple(self._bank(number) for number in range(len(self._keys)))

    def at(self, kept: float) -> FactorBank:
        """The bank whose range holds ``kept``, made if it is not there; outside of all, the nearest."""
        return self._bank(self.place(self.tops, kept))

    def key_at(self, kept: float) -> BankKey:
        """The key of the bank :meth:`at` ``kept``, which need not be there."""
        return self._keys[self.place(self.tops, kept)]

    def _bank(self, number: int) -> FactorBank:
        if number not in self._open:
            self._open[number] = self._open_or_make(number)
        return self._open[number]

    @staticmethod
    def place(tops: Sequence[float], kept: float) -> int:
        """Which of the ranges holds ``kept``."""
        return min(bisect_left(tops, kept), len(tops) - 1)


def tails(factors: Mapping[str, Factors]) -> dict[str, NDArray[np.float64]]:
    """Module name → predicted rise at rank 0, 1, ..., min(m, n): ``½ Σ_{i>r} σᵢ²``."""
    return {name: _tail(layer.sigma.cpu().numpy()) for name, layer in factors.items()}


def bank_path(folder: Path, key: BankKey) -> Path:
    """Where the bank of ``key`` lies under a working folder."""
    return folder / "banks" / f"{key.digest[:24]}.safetensors"


def open_bank(folder: Path, key: BankKey) -> FactorBank | None:
    """The bank of ``key``, or None if it has not been made.

    Raises:
        BankError: the file is damaged, or another bank's.
    """
    path = bank_path(folder, key)
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()["bank"])
            if header["key"] != json.loads(json.dumps(key.told())):
                raise BankError(
                    f"factor bank {path} was made from something else than its name says; delete it and run again"
                )
            factors = {
                name: Factors(*(file.get_tensor(f"{name}.{part}") for part in ("out", "inn", "sigma")))
                for name, _, _ in key.layers
            }
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise BankError(f"factor bank {path} is damaged ({error}); delete it and run again") from error
    return FactorBank(path, key, factors, header["made"])


@runtime_checkable
class Turn(Protocol):
    """Lets one worker of all hosts at a time make what has a name."""

    def __call__(
        self, name: str, on_wait: Callable[[], object], is_made: Callable[[], bool]
    ) -> AbstractContextManager[None]:
        """Have the turn inside the block, or none where it ``is_made`` by then; ``on_wait``: called before waiting."""


Piece = tuple[str, Literal["out", "inn", "sigma"], Tensor]
"""A target layer's name, which of its factors it is, and the tensor itself."""


def pieces_of(factors: Mapping[str, Factors]) -> Iterator[Piece]:
    """All factors, layer by layer."""
    for name, layer in factors.items():
        yield name, "out", layer.out
        yield name, "inn", layer.inn
        yield name, "sigma", layer.sigma


def open_or_build(
    folder: Path, key: BankKey, build: Callable[[], Mapping[str, Factors] | Iterable[Piece]], made: Mapping[str, Any],
    on_wait: Callable[[], object] = lambda: None, turn: Turn | None = None, remote: RemoteBanks | None = None,
) -> FactorBank:  # fmt: skip
    """The bank of ``key``; the first process to come builds it, the others wait and then map it.

    With ``remote``, ``folder`` is what this host has of the banks there: what it lacks is downloaded, and what was
    built is uploaded before the next folder has its turn, while the workers of this one go on.

    A file's lock makes the processes of a host wait for each other, ``turn`` those of all hosts: locks of files do
    not reach over every shared folder, and one of a host that is gone may stay.

    ``on_wait`` is called before waiting for another process; what it raises ends the waiting. What ``build`` returns
    may be made as it is asked for, piece by piece in any order: each is written before the next.

    Raises:
        BankError: it cannot be written (a full disk, say), or is damaged. No part of a bank is left behind. Or
            ``remote`` cannot be reached; what was built stays in ``folder`` and is uploaded the next time.
    """
    bank = open_bank(folder, key)
    path = bank_path(folder, key)
    lock = FileLock(path.with_suffix(".lock"))
    if bank is not None:
        if remote is not None and not remote.has(path.name):
            _upload_unless_taken(remote, path, lock, turn)
        return bank
    with ExitStack() as held:
        with _writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            name = f"bank {key.digest[:24]} in {_identity(path.parent)}" if turn is not None else ""
        if turn is not None:
            held.enter_context(turn(name, on_wait, path.exists))
        with _writing(path):
            if not _try_acquire(lock) and turn is None:
                on_wait()
                while not _try_acquire(lock) and not path.exists():
                    time.sleep(_LOOK_SECONDS)
        held.callback(lock.release)
        bank = open_bank(folder, key)
        if bank is not None:
            return bank
        for stale in path.parent.glob(f".{path.name}.*") if lock.is_locked else ():
            stale.unlink(missing_ok=True)  # of a process that was killed as it wrote, since the lock is ours
        if remote is None:
            _write(path, key, build, made)
        else:
            held.enter_context(_turn_at(remote, path, turn, on_wait))
            if not remote.download(path.name, path):
                remote.check_writable()
                _write(path, key, build, made)
                remote.upload(path)
        bank = open_bank(folder, key)
        assert bank is not None
        return bank


class _TakenError(Exception):
    """Another worker is at it."""


def _upload_unless_taken(remote: RemoteBanks, path: Path, lock: FileLock, turn: Turn | None) -> None:
    """Upload a bank that was built when nothing could be, or before there was a URL."""

    def leave() -> None:
        raise _TakenError

    with suppress(_TakenError), ExitStack() as held:
        if turn is None:
            with _writing(path):
                if not _try_acquire(lock):
                    return
            held.callback(lock.release)
        held.enter_context(_turn_at(remote, path, turn, leave))
        if not remote.has(path.name):
            remote.upload(path)


def _turn_at(
    remote: RemoteBanks, path: Path, turn: Turn | None, on_wait: Callable[[], object]
) -> AbstractContextManager[None]:
    """The turn of one folder of all that have banks from ``remote``."""
    if turn is None:
        return nullcontext()
    return turn(f"bank {path.stem} at {remote.identity}", on_wait, lambda: remote.has(path.name))


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BankError(
            f"factor bank {path} cannot be written: {error.strerror or error}; choose another run.work_dir"
        ) from error


def _identity(folder: Path) -> str:
    """Of a folder, the same for all hosts that share it."""
    file = folder / ".identity"
    if not file.exists():
        own = folder / f".identity.{uuid.uuid4().hex}"
        own.write_text(own.suffix[1:], encoding="ascii")
        with suppress(FileExistsError):
            file.hardlink_to(own)  # whole, and only by the first one
        own.unlink()
    return file.read_text(encoding="ascii")


def _try_acquire(lock: FileLock) -> bool:
    from filelock import Timeout

    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    return True


class _UnwritableError(Exception):
    """Of the file, not of what is to be in it."""


@contextmanager
def _told_apart() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _UnwritableError(str(error)) from error


def _write(
    path: Path, key: BankKey, build: Callable[[], Mapping[str, Factors] | Iterable[Piece]], made: Mapping[str, Any]
) -> None:
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, m, n in key.layers:
        rank = LayerShape(name, m, n).max_rank(key.storage)
        shapes[f"{name}.out"], shapes[f"{name}.inn"] = (torch.float32, (rank, m)), (torch.float32, (rank, n))
        shapes[f"{name}.sigma"] = torch.float64, (min(m, n),)
    header = {"bank": json.dumps({"key": key.told(), "made": dict(made)})}
    try:
        with ExitStack() as writing:
            with _told_apart():
                file = writing.enter_context(streamed_tensors(path, shapes, header))
            factors = build()
            for name, part, tensor in pieces_of(factors) if isinstance(factors, Mapping) else factors:
                with _told_apart():
                    file.write(f"{name}.{part}", tensor)
            with _told_apart():
                writing.close()
    except _UnwritableError as error:
        if path.exists():
            return  # by the next one, to whom this one was silent for too long
        size = sum(dtype.itemsize * math.prod(shape) for dtype, shape in shapes.values())
        raise BankError(
            f"factor bank {path} of {size / 2**20:.0f} MiB cannot be written: {error}; "
            "free space or choose another run.work_dir"
        ) from error.__cause__


def _tail(sigma: NDArray[np.float64]) -> NDArray[np.float64]:
    # Summed from the smallest up, which keeps the small tails exact.
    return np.append(0.5 * np.cumsum(sigma[::-1] ** 2)[::-1], 0.0)
