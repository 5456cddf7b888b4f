"""Layer statistics: second moments of what goes into every target layer and of the gradients that come back.

With ``W (m, n)``: ``A = E[x xᵀ]`` over the layer's inputs and ``G = E[g gᵀ]`` over the gradients of a prediction's
loss at its outputs, the labels being sampled from the model's own output, so that ``G`` belongs to the true Fisher
information and not to the empirical one (Martens and Grosse, "Optimizing neural networks with Kronecker-factored
approximate curvature", 2015).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn
from torch.nn import functional as F

from rank_search.errors import NonFiniteLossError, TargetError
from rank_search.model.device import autocast, deterministic
from rank_search.model.parts import Part, taken
from rank_search.model.targets import Target, by_module
from rank_search.progress import SILENT, Progress
from rank_search.task import Batch, Examples, Task


@dataclass(frozen=True)
class LayerStatistics:
    """``A`` (n, n) and ``G`` (m, m) of one target layer in float64; None where a method does not ask for it.

    ``mean_abs`` (n,) is ``E|x|`` of the inputs, there with ``A``. Layers that read the same tensor (query, key and
    value, say) share one ``A`` object.
    """

    A: Float64[Tensor, "n n"] | None = None
    G: Float64[Tensor, "m m"] | None = None
    mean_abs: Float64[Tensor, " n"] | None = None


def collect_statistics(
    model: nn.Module,
    targets: Sequence[Target],
    examples: Examples,
    *,
    batch_blocks: int,
    seed: int,
    inputs: bool = True,
    gradients: bool = True,
    progress: Progress = SILENT,
) -> dict[str, LayerStatistics]:
    """Statistics of every target layer from one forward (and, with ``gradients``, one backward) pass.

    A module that runs several times a token (a layer shared by all blocks) sums its gradients' moments over the runs,
    as its factors are used in each of them.

    Args:
        examples: calibration, on any device; padding is left out, since no prediction depends on it.
        seed: of the sampled labels.

    Raises:
        NonFiniteLossError: the model's output is not finite.
        TargetError: a target layer that the model does not use.
    """
    if not inputs and not gradients:
        return {target.name: LayerStatistics() for target in targets}
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    moments = _Moments(targets, inputs, gradients)
    predictions = 0
    with deterministic(device), moments.recording(), progress.step("calibration", len(examples)) as step:
        for batch in examples.unpadded(batch_blocks, device):
            predictions += _pass(model, examples.task, batch, generator, backward=gradients)
            step.advance(len(batch["input_ids"]))
    return moments.means(predictions)


@torch.no_grad()
def input_owners(model: nn.Module, targets: Sequence[Target], examples: Examples) -> dict[str, str]:
    """Module name → the module whose input it reads, too, and whose ``A`` is its own; told by one example.

    A module that the example does not reach is not there.
    """
    device = next(model.parameters()).device
    readers = _Readers()

    def note(name: str, x: Tensor) -> None:
        readers.owner(name, x)

    handles = [
        parts[0].module.register_forward_pre_hook(lambda _module, args, name=parts[0].module_name: note(name, args[0]))
        for parts in by_module(targets)
    ]
    try:
        with autocast(device):
            examples.task.logits(model, next(examples.unpadded(1, device)))
    finally:
        for handle in handles:
            handle.remove()
    return readers.owners


def mean_statistics(
    first: dict[str, LayerStatistics], second: dict[str, LayerStatistics]
) -> dict[str, LayerStatistics]:
    """The mean of two collections of one model's statistics, which are emptied; what layers share stays shared."""
    shared: dict[int, tuple[Tensor, Tensor]] = {}  # with the first tensor itself, so that no other one gets its id

    def mean(one: Tensor | None, other: Tensor | None) -> Tensor | None:
        if one is None or other is None:
            return None
        if id(one) not in shared:
            shared[id(one)] = one, (one + other) / 2
        return shared[id(one)][1]

    names = list(first)
    pairs = ((name, first.pop(name), second.pop(name)) for name in names)
    return {name: LayerStatistics(mean(a.A, b.A), mean(a.G, b.G), mean(a.mean_abs, b.mean_abs)) for name, a, b in pairs}


def _pass(model: nn.Module, task: Task, batch: Batch, generator: torch.Generator, *, backward: bool) -> int:
    """Returns the number of predictions."""
    with torch.set_grad_enabled(backward), autocast(batch["input_ids"].device):
        logits = task.logits(model, batch)
    asked = task.asked(batch)
    counts = [logits.shape[1]] * len(logits) if asked is None else asked.sum(1).tolist()
    logits = (logits.flatten(0, 1) if asked is None else logits[asked]).float()
    if not bool(torch.isfinite(logits).all()):
        raise NonFiniteLossError("the model's output on the calibration blocks is not finite")
    if backward:
        # Example by example, so that the labels do not depend on how many examples make a batch.
        drawn = [torch.multinomial(one.softmax(-1), 1, generator=generator) for one in logits.detach().split(counts)]
        # The sum, not the mean: G is about one prediction's loss.
        loss = F.cross_entropy(logits, torch.cat(drawn).squeeze(1), reduction="sum")
        if loss.requires_grad:  # else no target layer had a part in it, which the means will say
            loss.backward()
    return len(logits)


class _Readers:
    """Tells which layers read one tensor: those called one after the other on it, unchanged."""

    def __init__(self) -> None:
        self.owners: dict[str, str] = {}
        self._last: tuple[Tensor, int, str] | None = None

    def owner(self, name: str, x: Tensor) -> str:
        """The first of the layers that read ``x``, of which ``name`` is the one that is called now."""
        owner = name
        if self._last is not None:
            last, version, last_owner = self._last
            if last.data_ptr() == x.data_ptr() and last.shape == x.shape and version == x._version:
                owner = last_owner
        owner = self.owners.setdefault(name, owner)
        self._last = (x, x._version, owner)
        return owner

    def forget(self) -> None:
        """Let go of the last tensor."""
        self._last = None


class _Moments:
    """Sums of outer products, gathered by hooks."""

    def __init__(self, targets: Sequence[Target], inputs: bool, gradients: bool) -> None:
        self._targets = targets
        self._inputs = inputs
        self._gradients = gradients
        self._A: dict[str, Tensor] = {}
        self._abs: dict[str, Tensor] = {}
        self._G: dict[str, Tensor] = {}
        self._vectors: dict[str, int] = {}
        self._readers = _Readers()

    @contextmanager
    def recording(self) -> Iterator[None]:
        handles = [
            parts[0].module.register_forward_hook(
                lambda _module, args, output, name=parts[0].module_name: self._on_forward(name, args[0], output)
            )
            for parts in by_module(self._targets)
        ]
        try:
            yield
        finally:
            self._readers.forget()
            for handle in handles:
                handle.remove()

    def means(self, tokens: int) -> dict[str, LayerStatistics]:
        """Sums to means.

        Raises:
            TargetError: a layer took no part in what the model computed.
        """
        owners = self._readers.owners
        for target in self._targets:
            if target.module_name not in (self._G if self._gradients else owners):
                raise TargetError(
                    f"{target.module_name} has no part in the model's output on the calibration blocks; exclude it, or "
                    "calibrate on more text"
                )
        modules = {
            name: LayerStatistics(
                self._mean_inputs(owners[name]) if self._inputs else None,
                self._G[name].div_(tokens) if self._gradients else None,
                self._abs[owners[name]] if self._inputs else None,
            )
            for name in dict.fromkeys(target.module_name for target in self._targets)
        }
        return {target.name: _of_part(modules[target.module_name], target.part) for target in self._targets}

    def _mean_inputs(self, owner: str) -> Tensor:
        vectors = self._vectors.pop(owner, 0)
        if vectors:
            self._abs[owner].div_(vectors)
            self._A[owner].div_(vectors)
        return self._A[owner]

    def _on_forward(self, name: str, x: Tensor, output: Tensor) -> Tensor | None:
        if self._inputs:
            self._add_input(name, x.detach())
        if not self._gradients:
            return None
        # No weight needs a gradient here, so the backward pass ends at the first target layers' outputs. Copies,
        # because the model may go on in place, which a leaf forbids, and at which a view (a product with a bias is
        # one) loses its hooks.
        if output.is_leaf:
            output = output.requires_grad_().clone()
        elif output._is_view():
            output = output.clone()
        output.register_hook(lambda g: _add_outer(self._G, name, g))
        return output

    def _add_input(self, name: str, x: Tensor) -> None:
        """Layers that read the same tensor share the sums of the first."""
        owner = self._readers.owner(name, x)
        if owner == name:
            _add_outer(self._A, name, x)
            magnitudes = x.flatten(0, -2).abs().sum(0, dtype=torch.float64)
            self._abs[name] = self._abs[name] + magnitudes if name in self._abs else magnitudes
            self._vectors[name] = self._vectors.get(name, 0) + x.numel() // x.shape[-1]


def _of_part(module: LayerStatistics, part: Part | None) -> LayerStatistics:
    """Rows see all inputs and have gradients of their own; columns the other way round."""
    if part is None:
        return module
    if part.axis == "rows":
        return replace(module, G=None if module.G is None else part.block(module.G))
    return replace(
        module,
        A=None if module.A is None else part.block(module.A),
        mean_abs=None if module.mean_abs is None else taken(module.mean_abs, part.runs, 0),
    )


def _add_outer(sums: dict[str, Tensor], name: str, vectors: Float[Tensor, "*batch d"]) -> None:
    # Products in float32, sums in float64: a float32 sum over a whole calibration would lose the small directions.
    # Hooks run under the forward pass's autocast, which would make the product bf16.
    with torch.autocast(vectors.device.type, enabled=False):
        flat = vectors.flatten(0, -2)
        if flat.device.type == "cuda":
            # What the layer itself multiplies by is bf16. Products of two bf16 numbers are exact in float32, in which
            # they are summed up; in float32 throughout they would take ten times as long.
            flat = flat.bfloat16()
            product = torch.mm(flat.T, flat, out_dtype=torch.float32).double()
        else:
            product = (flat.float().T @ flat.float()).double()
    if name in sums:
        sums[name] += product
    else:
        sums[name] = product
