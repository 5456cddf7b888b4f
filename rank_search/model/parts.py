"""Parts of a weight matrix: query, key and value of a fused projection, and the heads of attention's projections.

Whose rows or columns are whose follows from a module's name and shape, the number of heads and their size. How a fused
projection lays out its rows is the one thing that neither tells; see :func:`_fused`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from rank_search.errors import TargetError

ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
"""What the name of an attention module, or of one above it, contains."""

Axis = Literal["rows", "columns"]
Run = tuple[int, int]
"""First index and the one after the last."""

_FUSED = re.compile(r"qkv|query_key_value|c_attn|w_pack", re.IGNORECASE)
_WORD = re.compile(r"(?:^|_)(q|k|v|query|key|value)(?:_|$)", re.IGNORECASE)
_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head")
_KEY_HEADS = ("num_key_value_heads", "num_kv_heads")
_HEAD_SIZE = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim", "d_kv")
_OWN_LAYOUTS = frozenset({"codegen"})
"""Model types whose fused rows follow neither of the two layouts that :func:`_fused` knows."""


@dataclass(frozen=True, slots=True)
class Part:
    """Some rows (outputs) or columns (inputs) of a module's matrix.

    Attributes:
        module: name of the module.
        label: the part's name within it: ``q``, ``head.3``, ``q.head.3``.
        axis: what of the matrix it holds.
        runs: which of them, ascending.
    """

    module: str
    label: str
    axis: Axis
    runs: tuple[Run, ...]

    @property
    def name(self) -> str:
        """The key in rank maps."""
        return f"{self.module}.{self.label}"

    @property
    def kind(self) -> str:
        """The label without the number of a head."""
        return re.sub(r"\.\d+$", "", self.label)

    @property
    def size(self) -> int:
        """Rows or columns that it holds."""
        return sum(stop - start for start, stop in self.runs)

    def of(self, matrix: Float[Tensor, "m n"]) -> Float[Tensor, "part_m part_n"]:
        """Its part of the module's matrix."""
        return taken(matrix, self.runs, 0 if self.axis == "rows" else 1)

    def write(self, matrix: Float[Tensor, "m n"], values: Float[Tensor, "part_m part_n"]) -> None:
        """Write its part of the module's matrix, in place."""
        dim, position = 0 if self.axis == "rows" else 1, 0
        for start, stop in self.runs:
            matrix.narrow(dim, start, stop - start).copy_(values.narrow(dim, position, stop - start))
            position += stop - start

    def block(self, moment: Float[Tensor, "d d"]) -> Float[Tensor, "part part"]:
        """Its part of a second moment on its own side: of G for rows, of A for columns."""
        return taken(taken(moment, self.runs, 0), self.runs, 1)


def taken(tensor: Tensor, runs: Sequence[Run], dim: int) -> Tensor:
    """The entries of ``runs`` along ``dim``; a view where there is one run."""
    pieces = [tensor.narrow(dim, start, stop - start) for start, stop in runs]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


def complement(runs: Sequence[Run], size: int) -> tuple[Run, ...]:
    """The indices below ``size`` that no run holds, as runs."""
    free, position = [], 0
    for start, stop in sorted(runs):
        if start > position:
            free.append((position, start))
        position = stop
    return (*free, (position, size)) if position < size else tuple(free)


@dataclass(frozen=True, slots=True)
class Heads:
    """The heads of one attention module.

    Attributes:
        count: of queries.
        size: numbers in a head.
        hidden: width of the model.
        keys: heads of keys and of values, where the configuration says so.
        grouped: fused rows stand head by head, whatever the module's name.
        readable: fused rows follow one of the two layouts that :func:`_fused` knows.
    """

    count: int
    size: int
    hidden: int
    keys: int | None = None
    grouped: bool = False
    readable: bool = True


def heads_of(model: nn.Module, name: str) -> Heads | None:
    """What the attention module around a projection, else the configuration nearest to it, tells of its heads."""
    path = name.split(".")[:-1]
    above = [model.get_submodule(".".join(path[:depth])) for depth in range(len(path), -1, -1)]
    configs = [c for module in above if isinstance(c := getattr(module, "config", None), PreTrainedConfig)]
    if not configs:
        return None
    config = next((config for config in configs if _number([config], _HEADS)), configs[0])
    around = 1 + max((i for i, part in enumerate(reversed(path)) if ATTENTION.search(part)), default=-1)
    owners = [*above[:around], config]
    hidden, count = _number([config], ("hidden_size",)), _number(owners, _HEADS)
    if hidden is None or count is None:
        return None
    size = _number(owners, _HEAD_SIZE) or hidden // count
    return Heads(
        count, size, hidden, _number([config], _KEY_HEADS), hasattr(config, "multi_query"),
        config.model_type not in _OWN_LAYOUTS,
    )  # fmt: skip


def parts_of(name: str, module: nn.Module, m: int, n: int, heads: Heads | None, *, by_head: bool) -> tuple[Part, ...]:
    """The parts of one projection of attention: q, k and v of a fused one, and with ``by_head`` all heads.

    Empty for a projection that is not fused, where only fused ones are split.

    Raises:
        TargetError: which rows or columns are whose cannot be told.
    """
    last = name.rsplit(".", 1)[-1]
    fused_name, word = bool(_FUSED.search(last)), _WORD.search(last)
    if heads is None:
        if by_head or fused_name:
            raise TargetError(_untold(name, m, n, heads, by_head))
        return ()
    kv = _kv_heads(m, n, heads)
    if fused_name or (kv and not word):
        # The layout of a fused projection whose name is none of the known ones is anyone's guess.
        if not kv or not fused_name or not heads.readable:
            raise TargetError(_untold(name, m, n, heads, by_head))
        grouped = "query_key_value" in last or (heads.grouped and not isinstance(module, Conv1D))
        return _fused(name, heads, kv, grouped=grouped, by_head=by_head)
    if not by_head:
        return ()
    if word:
        count, rest = divmod(m, heads.size)
        is_query = word[1][0].lower() == "q"
        if rest or (count != heads.count if is_query else heads.count % max(1, count)):
            raise TargetError(_untold(name, m, n, heads, by_head))
        return _per_head(name, "head", "rows", [_run(i, heads.size) for i in range(count)])
    if n != heads.count * heads.size or m != heads.hidden:
        raise TargetError(_untold(name, m, n, heads, by_head))
    return _per_head(name, "head", "columns", [_run(i, heads.size) for i in range(heads.count)])


def _kv_heads(m: int, n: int, heads: Heads) -> int:
    """Heads of the keys of a fused projection, from its rows: (heads + 2 kv) · head size; 0 where it is none."""
    fitting = {kv for kv in (heads.count, heads.keys, 1) if kv and m == (heads.count + 2 * kv) * heads.size}
    return max(fitting, default=0) if n == heads.hidden else 0


def _fused(name: str, heads: Heads, kv: int, *, grouped: bool, by_head: bool) -> tuple[Part, ...]:
    """q, k and v of a fused projection.

    Two layouts are in use: all of q, then all of k, then all of v (GPT-2, Phi-3); and group after group, each the
    queries of a group with its key and its value (GPT-NeoX and Bloom, whose modules are named ``query_key_value``,
    and GPT-BigCode, whose configuration says ``multi_query``). A third would be split in wrong places, which costs
    quality and not correctness: the parts are put back where they were.
    """
    queries = heads.count // kv
    if grouped:
        starts = [group * (queries + 2) for group in range(kv)]
        slots = {
            "q": [start + i for start in starts for i in range(queries)],
            "k": [start + queries for start in starts],
            "v": [start + queries + 1 for start in starts],
        }
    else:
        slots = {
            "q": list(range(heads.count)),
            "k": list(range(heads.count, heads.count + kv)),
            "v": list(range(heads.count + kv, heads.count + 2 * kv)),
        }
    runs = {label: [_run(slot, heads.size) for slot in of] for label, of in slots.items()}
    if by_head:
        return tuple(part for label in runs for part in _per_head(name, f"{label}.head", "rows", runs[label]))
    return tuple(Part(name, label, "rows", _joined(of)) for label, of in runs.items())


def _per_head(name: str, label: str, axis: Axis, runs: Sequence[Run]) -> tuple[Part, ...]:
    return tuple(Part(name, f"{label}.{i}", axis, (run,)) for i, run in enumerate(runs))


def _run(slot: int, size: int) -> Run:
    return slot * size, (slot + 1) * size


def _joined(runs: Sequence[Run]) -> tuple[Run, ...]:
    """Runs that touch as one."""
    joined: list[Run] = []
    for start, stop in runs:
        if joined and joined[-1][1] == start:
            joined[-1] = joined[-1][0], stop
        else:
            joined.append((start, stop))
    return tuple(joined)


def _number(owners: Sequence[object], names: Sequence[str]) -> int | None:
    """The first of ``names`` that is a whole number above 0 in the first of ``owners`` that has one."""
    for owner in owners:
        for name in names:
            value = getattr(owner, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def _untold(name: str, m: int, n: int, heads: Heads | None, by_head: bool) -> str:
    known = f"{heads.count} heads of {heads.size}" if heads else "no number of heads in the configuration"
    what, key = ("heads", 'granularity = "matrix"') if by_head else ("query, key and value", "split_qkv = false")
    return f"{name}: its {what} cannot be told in a ({m}, {n}) matrix ({known}); exclude it or set targets.{key}"
