"""A layer whose matrix is in parts, some of them of low rank: it stands where a fused or a many-headed layer stood."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rank_search.model.parts import Axis, Part, Run, complement, taken
from rank_search.model.targets import bias_of, weight_matrix


class SplitLinear(nn.Module):
    """``y = W x + b`` with W in parts: side by side in the outputs (rows), or in the inputs (columns).

    A part's layer has its label as its name, ``head.3`` say, so that target layers keep their module names. What no
    part holds is one dense layer, ``rest``.
    """

    axis: Axis
    bias: nn.Parameter | None

    def __init__(
        self, axis: Axis, runs: Mapping[str, tuple[Run, ...]], layers: Mapping[str, nn.Module], rest: nn.Linear | None,
        rest_runs: tuple[Run, ...], bias: nn.Parameter | None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.axis = axis
        self.runs = dict(runs)
        for label in runs:
            _attach(self, label, layers[label])
        if rest is not None:
            self.add_module("rest", rest)
            self.runs["rest"] = rest_runs
        self.register_parameter("bias", bias)

    @classmethod
    def of(cls, module: nn.Module, parts: Sequence[Part], layers: Mapping[str, nn.Module]) -> SplitLinear:
        """``module`` with ``layers`` (by target name) for ``parts``, and a copy of its other rows or columns."""
        matrix, axis = weight_matrix(module), parts[0].axis
        runs = {part.label: part.runs for part in parts}
        left = complement([run for part in parts for run in part.runs], matrix.shape[0 if axis == "rows" else 1])
        rest = _dense(taken(matrix, left, 0 if axis == "rows" else 1)) if left else None
        return cls(axis, runs, {part.label: layers[part.name] for part in parts}, rest, left, bias_of(module))

    def with_layers(self, parts: Sequence[Part], layers: Mapping[str, nn.Module]) -> SplitLinear:
        """The same bias and rest, with other layers for the same parts."""
        runs = {part.label: part.runs for part in parts}
        rest = self._modules.get("rest")
        assert rest is None or isinstance(rest, nn.Linear)
        by_label = {part.label: layers[part.name] for part in parts}
        return SplitLinear(self.axis, runs, by_label, rest, self.runs.get("rest", ()), self.bias)

    @property
    def labels(self) -> set[str]:
        """Labels of the parts that have layers of their own."""
        return self.runs.keys() - {"rest"}

    @property
    def weight(self) -> Float[Tensor, "m n"]:
        """W, multiplied out: for code that reads a layer's matrix instead of calling it."""
        return self._joined([layer.weight for layer in self._layers()], 0 if self.axis == "rows" else 1)

    def dense(self) -> Float[Tensor, "m n"]:
        """W, multiplied out, without gradients."""
        return self.weight.detach()

    def forward(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch m"]:
        """The parts' outputs put in order, or added up."""
        if self.axis == "rows":
            y = self._joined([layer(x) for layer in self._layers()], -1)
        else:
            outputs = [
                layer(taken(x, runs, -1)) for layer, runs in zip(self._layers(), self.runs.values(), strict=True)
            ]
            y = functools.reduce(torch.add, outputs)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _layers(self) -> list[Any]:
        """The parts' layers and the rest, in the order of ``runs``."""
        return [self.get_submodule(label) for label in self.runs]

    def _joined(self, tensors: Sequence[Tensor], dim: int) -> Tensor:
        """The parts' tensors as one, every run of each in its place."""
        pieces: dict[int, Tensor] = {}
        for tensor, runs in zip(tensors, self.runs.values(), strict=True):
            split = tensor.split([stop - start for start, stop in runs], dim)
            pieces |= {start: piece for (start, _), piece in zip(runs, split, strict=True)}
        return torch.cat([pieces[start] for start in sorted(pieces)], dim)


def _attach(parent: nn.Module, label: str, layer: nn.Module) -> None:
    *path, last = label.split(".")
    for name in path:
        if name not in parent._modules:
            parent.add_module(name, nn.ModuleDict())
        parent = parent.get_submodule(name)
    parent.add_module(last, layer)


def _dense(matrix: Float[Tensor, "m n"]) -> nn.Linear:
    m, n = matrix.shape
    layer = nn.Linear(n, m, bias=False, device="meta")
    # A copy, since a file of weights holds no tensor that is a piece of another.
    copy = matrix.detach().clone(memory_format=torch.contiguous_format)
    layer.weight = nn.Parameter(copy, requires_grad=False)
    return layer
