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
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, GgufConfig, PreTrainedModel

from rank_search.errors import ModelError, one_line
from rank_search.model.spread import spread
from rank_search.spec import ModelSpec
from rank_search.task import CAUSAL_LM, TASKS, Task

_LOADING_ERRORS = (
    OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, SafetensorError, UnpicklingError, struct.error,
)  # fmt: skip
"""What transformers lets through of a model that is damaged or not there."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


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
        value = getattr(self.model.config, "max_position_embeddings", None)
        return value if isinstance(value, int) and value > 0 else None


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
        ModelError: not found, not a model for the task, incomplete, or in need of remote code.
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
        raise ModelError(f"model {spec.source!r} cannot be loaded: {one_line(error)}") from error
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
    revision = None if where.is_local else getattr(model.config, "_commit_hash", None)
    return LoadedModel(model, tokenizer, spec.source, revision, weights_digest(model.state_dict().items()), task)


def weights_digest(weights: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over the sorted SHA-256 of every tensor (name, dtype, shape, bytes); threads share the work."""

    def digest(item: tuple[str, Tensor]) -> bytes:
        name, tensor = item
        head = f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode()
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        return hashlib.sha256(head + hashlib.sha256(data.data).digest()).digest()

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return hashlib.sha256(b"".join(pool.map(digest, sorted(weights, key=lambda item: item[0])))).hexdigest()
