"""One optimiser step as a CUDA graph: the host launches it as one piece instead of thousands of kernels.

A step of a small model is bound by the host, not by the GPU: some ten thousand kernels, each a few microseconds long.
All steps of a fine-tune are alike (same shapes, same addresses), so the first few run as usual, one is recorded, and
the rest are replays of the recording. A model whose step cannot be recorded runs as usual to the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from rank_search.task import Batch

EAGER_STEPS = 1
"""Before the recording: the optimiser makes its state and libraries allocate their workspaces in the first step."""

_OWN = "rank-search"
"""Torch's own attention, under a name of its own for the sake of its mask."""


class CapturedStep:
    """Runs ``step`` on every batch, from the third on as the replay of a recording.

    ``step`` must do the same work on the same tensors every time, must not wait for the device, and must leave no
    gradients behind that the next step adds to. What it reads from outside has to be a tensor whose content, not
    whose place, changes between steps (a learning rate, say).
    """

    def __init__(
        self,
        model: nn.Module,
        step: Callable[[Batch], Float[Tensor, ""]],
        *,
        on_refusal: Callable[[str], None] = lambda _reason: None,
    ) -> None:
        self._model = model
        self._step = step
        self._on_refusal = on_refusal
        self._done = 0
        self._stream = torch.cuda.Stream()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._refused = False
        self._batch: dict[str, Tensor] = {}
        self._loss: Tensor | None = None
        self._masks = _Masks()

    def __call__(self, batch: Batch) -> Float[Tensor, ""]:
        """Do one step; returns its loss, which the next step may overwrite."""
        self._done += 1
        if self._refused:
            return self._step(batch)
        if self._done <= EAGER_STEPS:
            return self._eager(batch)
        if self._graph is None:
            self._record(batch)
            if self._graph is None:
                return self._step(batch)
        for name, tensor in self._batch.items():
            tensor.copy_(batch[name])
        self._graph.replay()
        assert self._loss is not None
        return self._loss

    def _eager(self, batch: Batch) -> Tensor:
        # On a stream of its own, as a recording is, so that both use the same workspaces.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream), self._masks.watched(), _own_attention(self._model, self._masks):
            loss = self._step(batch)
        torch.cuda.current_stream().wait_stream(self._stream)
        return loss

    def _record(self, batch: Batch) -> None:
        self._batch = {name: tensor.clone() for name, tensor in batch.items()}
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        try:
            with _own_attention(self._model, self._masks), torch.cuda.graph(graph, stream=self._stream):
                self._loss = self._step(self._batch)
        except RuntimeError as error:  # of the driver: an operation that waits for the device, or may not be recorded
            self._refused = True
            torch.cuda.synchronize()
            self._on_refusal(str(error).splitlines()[0])
            return
        self._graph = graph


class _Masks:
    """Builds an explicit attention mask only where the first step needed one.

    transformers cannot look at positions while a step is recorded: it would take them for packed sequences, and build
    a mask that none of the other steps has.
    """

    current: ClassVar[_Masks | None] = None

    def __init__(self) -> None:
        self._is_watching = False
        self._needed = False

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Inside the block masks are built as they are needed, and noted."""
        self._is_watching = True
        try:
            yield
        finally:
            self._is_watching = False

    def build(self, *args: Any, **arguments: Any) -> Tensor | None:
        """As transformers' own builder for torch's attention."""
        if not self._is_watching and not self._needed:
            return None
        mask: Tensor | None = sdpa_mask(*args, **arguments)
        self._needed = self._needed or mask is not None
        return mask


def _mask(*args: Any, **arguments: Any) -> Tensor | None:
    assert _Masks.current is not None
    return _Masks.current.build(*args, **arguments)


AttentionInterface.register(_OWN, sdpa_attention_forward)
AttentionMaskInterface.register(_OWN, _mask)


@contextmanager
def _own_attention(model: nn.Module, masks: _Masks) -> Iterator[None]:
    """``masks`` decides inside the block, for models that use torch's own attention.

    All steps run under one name, since what is compiled for one is compiled anew for another.
    """
    if not isinstance(model, PreTrainedModel) or model.config._attn_implementation != "sdpa":
        yield
        return
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    changed = [config for config in configs.values() if config._attn_implementation == "sdpa"]
    for config in changed:
        config._attn_implementation = {"": _OWN}  # of this one alone, not of the configurations inside it
    _Masks.current = masks
    try:
        yield
    finally:
        _Masks.current = None
        for config in changed:
            config._attn_implementation = {"": "sdpa"}
