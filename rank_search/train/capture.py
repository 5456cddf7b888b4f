"""One optimiser step as a CUDA graph: the host launches it as one piece instead of thousands of kernels.

A step of a small model is bound by the host, not by the GPU: some ten thousand kernels, each a few microseconds long.
All steps of a fine-tune are alike (same shapes, same addresses), so the first few run as usual, one is recorded, and
the rest are replays of the recording. A model whose step cannot be recorded runs as usual to the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from rank_search.task import Batch

EAGER_STEPS = 2
"""Before the recording: libraries choose their algorithms and allocate their workspaces in the first steps."""

_WATCHED = "rank-search-watched"
_UNMASKED = "rank-search-unmasked"


class CapturedStep:
    """Runs ``step`` on every batch, from the fourth on as the replay of a recording.

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
        self._watch = _Watch()

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
        with torch.cuda.stream(self._stream), self._watching() if self._done == 1 else self._as_recorded():
            loss = self._step(batch)
        torch.cuda.current_stream().wait_stream(self._stream)
        return loss

    @contextmanager
    def _watching(self) -> Iterator[None]:
        # Nothing is compiled in it: the watched attention is not the one of later steps.
        with torch.compiler.set_stance("force_eager"), _attention(self._model, _WATCHED), self._watch:
            yield

    def _as_recorded(self) -> AbstractContextManager[None]:
        # Where the first step needed no explicit mask, the recorded one must not build one: transformers cannot look
        # at positions while it records, and would take them for packed sequences.
        return _attention(self._model, None if self._watch.masked else _UNMASKED)

    def _record(self, batch: Batch) -> None:
        self._batch = {name: tensor.clone() for name, tensor in batch.items()}
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        try:
            with self._as_recorded(), torch.cuda.graph(graph, stream=self._stream):
                self._loss = self._step(self._batch)
        except RuntimeError as error:  # of the driver: an operation that waits for the device, or may not be recorded
            self._refused = True
            torch.cuda.synchronize()
            self._on_refusal(str(error).splitlines()[0])
            return
        self._graph = graph


class _Watch:
    """Notes whether any attention was given an explicit mask."""

    _active: _Watch | None = None

    def __init__(self) -> None:
        self.masked = False

    def __enter__(self) -> None:
        _Watch._active = self

    def __exit__(self, *_: object) -> None:
        _Watch._active = None

    @classmethod
    def note(cls, mask: Tensor | None) -> None:
        """Called by every watched attention."""
        if cls._active is not None and mask is not None:
            cls._active.masked = True


def _watched_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **arguments: Any
) -> Any:
    _Watch.note(attention_mask)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **arguments)


# The second has no mask function of its own, which transformers takes for: no mask.
AttentionInterface.register(_WATCHED, _watched_attention)
AttentionMaskInterface.register(_WATCHED, sdpa_mask)
AttentionInterface.register(_UNMASKED, sdpa_attention_forward)


@contextmanager
def _attention(model: nn.Module, name: str | None) -> Iterator[None]:
    """Another attention implementation inside the block, for models that use torch's own; None changes nothing."""
    if name is None or not isinstance(model, PreTrainedModel) or model.config._attn_implementation != "sdpa":
        yield
        return
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    changed = [config for config in configs.values() if config._attn_implementation == "sdpa"]
    for config in changed:
        config._attn_implementation = {"": name}  # of this one alone, not of the configurations inside it
    try:
        yield
    finally:
        for config in changed:
            config._attn_implementation = {"": "sdpa"}
