"""Pretrained models: a hub id at a revision, a local folder, or a GGUF file."""

from __future__ import annotations

import hashlib
import os
import re
import struct
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, GgufConfig, PreTrainedModel

from rank_search.errors import ModelError, one_line
from rank_search.model.spread import devices_of, spread
from rank_search.spec import ModelSpec
from rank_search.task import CAUSAL_LM, SEQUENCE_CLASSIFICATION, TASKS, Task

_LOADING_ERRORS = (
    OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, SafetensorError, UnpicklingError, struct.error,
)  # fmt: skip
"""What transformers lets through of a model that is damaged or not there."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

_LEAK = 1e-3
"""Change of a prediction, relative to its size, that is no rounding error any more."""


@dataclass(frozen=True)
class LoadedModel:
    """A model in float32 and evaluation mode, its tokenizer, and what identifies it.

    ``revision`` is the commit that a hub id resolved to, None for local files. ``weights_digest`` is the SHA-256 of
    names, shapes, dtypes and bytes of all parameters and persistent buffers, whatever file they came from.
    """

    model: PreTrainedModel
    tokenizer: Any
    source: str
    revision: str | None
    weights_digest: str
    task: Task = CAUSAL_LM

    @property
    def max_length(self) -> int | None:
        """Longest sequence the model takes, where its configuration says so."""
        return _max_length(self.model)


def _max_length(model: PreTrainedModel) -> int | None:
    value = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(value, int) or value <= 0:
        return None
    return value - max((_unused_positions(name, value, m) for name, m in model.named_modules()), default=0)


def _unused_positions(name: str, count: int, module: nn.Module) -> int:
    """Rows of a table of ``count`` positions that no token uses: RoBERTa counts positions from behind the padding's.

    So does I-BERT, whose table is of a class of its own.
    """
    padding, table = getattr(module, "padding_idx", None), getattr(module, "weight", None)
    if "position" not in name.rsplit(".", 1)[-1] or not isinstance(padding, int) or not isinstance(table, Tensor):
        return 0
    return padding + 1 if table.dim() == 2 and len(table) == count else 0


@dataclass(frozen=True)
class ModelLocation:
    """Where ``from_pretrained`` finds a model: its first argument and its keyword arguments."""

    name: str
    arguments: dict[str, Any]

    @property
    def is_local(self) -> bool:
        """A folder or a GGUF file, not a hub id."""
        return bool(self.arguments.get("local_files_only"))


def locate(spec: ModelSpec, folder: Path) -> ModelLocation:
    """Tell folders, GGUF files and hub ids apart. Relative paths start from ``folder``.

    Raises:
        ModelError: looks like a path and is not there, or is neither a path nor a hub id.
    """
    path = Path(spec.source).expanduser()
    path = path if path.is_absolute() else folder / path
    if path.is_dir():
        return ModelLocation(str(path), {"local_files_only": True})
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(
                f"model {spec.source!r} is a file but not GGUF; give a model folder, a .gguf file or a hub id"
            )
        return ModelLocation(str(path.parent), {"gguf_file": path.name, "local_files_only": True})
    looks_like_path = spec.source.startswith((".", "/", "~")) or spec.source.endswith(".gguf")
    if looks_like_path or not _HUB_ID.fullmatch(spec.source):
        raise ModelError(
            f"model {spec.source!r}: no such folder or file ({path}); give a model folder, a .gguf file or a hub id"
        )
    return ModelLocation(spec.source, {"revision": spec.revision})


def load_model(spec: ModelSpec, folder: Path, device: torch.device, *others: torch.device) -> LoadedModel:
    """Load a model for the task of ``spec`` in float32 with its tokenizer; with ``others``, spread over all devices.

    Raises:
        DeviceError: it cannot be spread over the devices, or does not fit them.
        ModelError: not found, not a model for the task, incomplete, in need of remote code, or one that sees the tokens
            that it should predict.
    """
    task = TASKS[spec.task]
    auto_class: Any = getattr(transformers, task.auto_class)
    where = locate(spec, folder)
    arguments: dict[str, Any] = {**where.arguments, "trust_remote_code": spec.trust_remote_code}
    quantized = {"quantization_config": GgufConfig(dequantize=True)} if "gguf_file" in arguments else {}
    try:
        # The configuration first: it is small, and its errors are about the model, not about one of its files.
        if not quantized:
            AutoConfig.from_pretrained(where.name, **arguments)
        pretrained: Any = auto_class.from_pretrained(
            where.name, dtype=torch.float32, output_loading_info=True, **quantized, **arguments
        )
        tokenizer = AutoTokenizer.from_pretrained(where.name, **arguments)
    except _LOADING_ERRORS as error:
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"model {spec.source!r} needs code of its own; set model.trust_remote_code = true if you trust it"
            ) from error
        reason = one_line(error)
        if not where.is_local:
            reason = f"{reason.rstrip('.')}; nor is it a folder here ({folder / spec.source})"
        raise ModelError(f"model {spec.source!r} cannot be loaded: {reason}") from error
    model, info = pretrained
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"model {spec.source!r} lacks {len(missing)} weights of a {type(model).__name__}, first {missing[0]}; "
            f"it would start from random numbers: give a checkpoint made for {task.made_for}"
        )
    model = model.eval().requires_grad_(False)
    if others:
        spread(model, (device, *others))
    else:
        model = model.to(device)
    make_ready(model, tokenizer, task, f"model {spec.source!r}")
    revision = None if where.is_local else getattr(model.config, "_commit_hash", None)
    return LoadedModel(model, tokenizer, spec.source, revision, weights_digest(model.state_dict().items()), task)


def make_ready(model: PreTrainedModel, tokenizer: Any, task: Task, label: str) -> None:
    """Check, and where it can be mended mend, what a task needs of a model in its place and in evaluation mode.

    ``label`` is the model's name in messages.

    Raises:
        ModelError: a causal language model sees the tokens that it should predict.
    """
    if task is SEQUENCE_CLASSIFICATION and tokenizer is not None:
        # A decoder's classifier looks for the last token that is no padding, and takes no batch without knowing it.
        config = model.config.get_text_config()
        if getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = tokenizer.pad_token_id
    if task is CAUSAL_LM and _sees_what_follows(model):
        raise ModelError(
            f"{label}: as it is configured, {type(model).__name__} sees the tokens that it should predict; "
            f"set model.task = 'masked-lm', or take a checkpoint made for {task.made_for}"
        )


@torch.no_grad()
def _sees_what_follows(model: PreTrainedModel) -> bool:
    """Whether the prediction after the first token depends on the last one, as an encoder's does."""
    table: Any = model.get_input_embeddings()
    words, length = len(table.weight), min(4, _max_length(model) or 4)
    if words < 2 or length < 2:
        return False  # nothing to tell apart
    # Several last tokens, since some may never have been trained, and be alike; from all of the vocabulary.
    ids = torch.arange(length).repeat(min(8, words), 1) % words
    ids[:, -1] = torch.linspace(0, words - 1, len(ids)).long()
    first = CAUSAL_LM.logits(model, {"input_ids": ids.to(devices_of(model)[0])})[:, 0]
    return bool((first - first[0]).norm(dim=-1).max() > _LEAK * first[0].norm())


def weights_digest(weights: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over the sorted SHA-256 of every tensor (name, dtype, shape, bytes); threads share the work."""

    def digest(item: tuple[str, Tensor]) -> bytes:
        name, tensor = item
        head = f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode()
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        return hashlib.sha256(head + hashlib.sha256(data.data).digest()).digest()

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return hashlib.sha256(b"".join(pool.map(digest, sorted(weights, key=lambda item: item[0])))).hexdigest()
