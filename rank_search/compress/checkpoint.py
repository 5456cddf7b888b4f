"""Compressed models as checkpoint folders that transformers loads by itself.

``factored`` keeps the matrices of low rank as they are stored, in two-factor or pivoted form: the folder brings a small
modelling file of its own and loads with ``trust_remote_code=True``. Its model type is its own too, so that without that
permission loading is refused rather than filling the missing matrices with random numbers. ``dense`` multiplies them
out: an ordinary checkpoint of the original architecture, the same function at the original size.
"""

from __future__ import annotations

import importlib.util
import json
import os
import string
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel
from transformers.models.auto import modeling_auto

from rank_search.compress.folder import check_free
from rank_search.compress.low_rank import LowRankLinear
from rank_search.compress.pivoted import PivotedLinear
from rank_search.compress.split import SplitLinear
from rank_search.errors import CheckpointError, ModelError, one_line
from rank_search.model.load import LoadedModel, make_ready, weights_digest
from rank_search.model.targets import Target, by_module
from rank_search.task import CAUSAL_LM, TASKS, Task

Form = Literal["factored", "dense"]
Layers = Mapping[str, LowRankLinear] | Mapping[str, PivotedLinear]
"""Module name → the layer that stands in the target layer's places, all of one storage form."""
_MODULE = "modeling_low_rank"
_PREFIX = "low_rank_"


def save_checkpoint(
    loaded: LoadedModel, targets: Sequence[Target], layers: Layers, out: Path, *,
    form: Form = "factored", dtype: torch.dtype = torch.float32, extra: dict[str, str] | None = None,
) -> None:  # fmt: skip
    """Write the model, whose ``targets`` are replaced by ``layers`` right now, with its tokenizer.

    ``extra`` maps names of further files to their text. The folder appears complete or not at all.

    Raises:
        ModelError: the factored form of a model whose class is not transformers' own.
        CheckpointError: the folder exists and is not empty, or cannot be written.
    """
    check_free(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
            folder = Path(scratch) / "checkpoint"
            if form == "dense":
                with _multiplied_out(targets):
                    _save(loaded, folder, dtype, original_names=True)
            else:
                code, names = _modelling_code(type(loaded.model))
                # Some families' files use other names than their modules, translated by model type: ours has no such
                # translation.
                _save(loaded, folder, dtype, original_names=False)
                _describe(folder, names, _auto_classes(names["model_class"]), targets, layers)
                (folder / f"{_MODULE}.py").write_text(code, encoding="utf-8")
            for name, text in (extra or {}).items():
                (folder / name).write_text(text, encoding="utf-8")
            if out.exists():
                out.rmdir()
            folder.chmod(0o777 & ~_umask())
            folder.replace(out)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"checkpoint {out} cannot be written: {one_line(error)}; free space or choose another folder"
        ) from error


def is_compressed(folder: Path) -> bool:
    """Whether a folder is a checkpoint in factored form."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "low_rank" in config


def load_checkpoint(folder: Path, device: torch.device, task: Task | None = None) -> LoadedModel:
    """Load a factored checkpoint with this package's own modelling code; the folder's code is not run.

    Raises:
        ModelError: the folder is damaged, its architecture unknown to the installed transformers, or it is not made for
            ``task``; or as :func:`rank_search.model.load.make_ready`.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        base = getattr(transformers, str(config["low_rank"]["model_class"]), None)
        if not (isinstance(base, type) and issubclass(base, PreTrainedModel)):
            raise ModelError(
                f"checkpoint {folder}: transformers has no {config['low_rank']['model_class']}; upgrade it"
            )
        auto_classes = _auto_classes(base.__name__)
        known = [name for name, other in TASKS.items() if other.auto_class in auto_classes]
        if task is not None and task.name not in known:
            way_out = f"set model.task = {known[0]!r}" if known else "give a checkpoint of another model"
            raise ModelError(
                f"checkpoint {folder} holds a {base.__name__}, not a model made for {task.made_for}; {way_out}"
            )
        code, _ = _modelling_code(base)
        with _imported(code) as module:
            model, info = module.LowRankModel.from_pretrained(
                folder, config=module.LowRankConfig.from_pretrained(folder), dtype=torch.float32,
                output_loading_info=True, local_files_only=True,
            )  # fmt: skip
        has_tokenizer = (folder / "tokenizer_config.json").exists()
        tokenizer = (
            AutoTokenizer.from_pretrained(folder, config=model.config, local_files_only=True) if has_tokenizer else None
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"checkpoint {folder} cannot be loaded: {one_line(error)}") from error
    if info["missing_keys"]:
        raise ModelError(f"checkpoint {folder} lacks weights, first {min(info['missing_keys'])}; it is damaged")
    model = model.eval().requires_grad_(False).to(device)
    task = task or (TASKS[known[0]] if known else CAUSAL_LM)
    if known:  # a model of images is of none of these tasks
        make_ready(model, tokenizer, task, f"checkpoint {folder}")
    return LoadedModel(model, tokenizer, str(folder), None, weights_digest(model.state_dict().items()), task)


def _save(loaded: LoadedModel, folder: Path, dtype: torch.dtype, *, original_names: bool) -> None:
    state = _cast(loaded.model.state_dict(), dtype)
    loaded.model.save_pretrained(folder, state_dict=state, save_original_format=original_names)
    if loaded.tokenizer is not None:  # a model of images has none
        loaded.tokenizer.save_pretrained(folder)
    config = _read_config(folder)
    config["dtype"] = str(dtype).removeprefix("torch.")
    _write_config(folder, config)


def _cast(state: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The same tensors in ``dtype``; names that share a tensor (tied weights) go on sharing one."""
    cast: dict[tuple[int, torch.Size], torch.Tensor] = {}
    for tensor in state.values():
        key = tensor.data_ptr(), tensor.shape
        if key not in cast:
            cast[key] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    return {name: cast[tensor.data_ptr(), tensor.shape] for name, tensor in state.items()}


def _describe(
    folder: Path, names: dict[str, str], auto_classes: Sequence[str], targets: Sequence[Target], layers: Layers
) -> None:
    config = _read_config(folder)
    config["low_rank"] = {
        "ranks": {name: layer.rank for name, layer in layers.items()},
        "storage": "pivoted" if any(isinstance(layer, PivotedLinear) for layer in layers.values()) else "two-factor",
        "model_class": names["model_class"],
        "parts": _parts(targets, layers),
    }
    config["model_type"] = names["model_type"]
    config["architectures"] = ["LowRankModel"]
    config["auto_map"] = {"AutoConfig": f"{_MODULE}.LowRankConfig"}
    config["auto_map"] |= dict.fromkeys(auto_classes, f"{_MODULE}.LowRankModel")
    _write_config(folder, config)


def _parts(targets: Sequence[Target], layers: Layers) -> dict[str, dict[str, Any]]:
    """Module name → rows or columns, and which of them each part of its matrix holds that is of low rank."""
    told: dict[str, dict[str, Any]] = {}
    for target in targets:
        if target.part and target.name in layers:
            module = told.setdefault(target.part.module, {"axis": target.part.axis, "runs": {}})
            module["runs"][target.part.label] = target.part.runs
    return told


def _read_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config


def _write_config(folder: Path, config: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _modelling_code(model_class: type[PreTrainedModel]) -> tuple[str, dict[str, str]]:
    """The text of the modelling file for one architecture, and the names that it was filled with."""
    config_class = model_class.config_class
    if getattr(transformers, model_class.__name__, None) is not model_class or config_class is None:
        raise ModelError(
            f"{model_class.__name__} is not a class of transformers, so a factored checkpoint could not load it; "
            "use the dense form"
        )
    names = {
        "auto_class": _auto_classes(model_class.__name__)[0],
        "model_class": model_class.__name__,
        "config_class": config_class.__name__,
        "model_type": _PREFIX + config_class.model_type,
    }
    template = resources.files("rank_search.compress").joinpath(f"{_MODULE}.py.tmpl").read_text(encoding="utf-8")
    return string.Template(template).substitute(names), names


@cache
def _auto_classes(name_of_class: str) -> tuple[str, ...]:
    """Names of the classes of transformers that load a checkpoint of one of its models by itself, those of tasks first.

    Raises:
        ModelError: there is none.
    """
    model_class = getattr(transformers, name_of_class)
    tasks = [task.auto_class for task in TASKS.values()]
    names = [name for name in modeling_auto.__all__ if name.startswith("AutoModel")]
    found = []
    for name in sorted(names, key=lambda name: (name not in tasks, name)):
        classes = getattr(getattr(transformers, name), "_model_mapping", {}).get(model_class.config_class, ())
        if model_class in (classes if isinstance(classes, tuple) else (classes,)):
            found.append(name)
    if not found:
        raise ModelError(
            f"no AutoModel of transformers loads a {name_of_class}, so a factored checkpoint would not load; "
            "use the dense form"
        )
    return tuple(found)


@contextmanager
def _imported(code: str) -> Iterator[ModuleType]:
    """The modelling code as a module, importable by name while a model is made from it."""
    name = f"_rank_search_{_MODULE}"
    spec = importlib.util.spec_from_loader(name, loader=None)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        exec(compile(code, f"<{name}>", "exec"), module.__dict__)
        yield module
    finally:
        del sys.modules[name]


@contextmanager
def _multiplied_out(targets: Sequence[Target]) -> Iterator[None]:
    """Ordinary layers of the original kind in the place of all that stands in the model of ``targets`` now."""
    places = [(first, getattr(*first.places[0])) for first, *_ in by_module(targets)]
    changed = [(first, now) for first, now in places if isinstance(now, LowRankLinear | PivotedLinear | SplitLinear)]
    for target, now in changed:
        _stand_in(target, _like(target.module, now))
    try:
        yield
    finally:
        for target, now in changed:
            _stand_in(target, now)


def _stand_in(target: Target, module: nn.Module) -> None:
    for parent, attribute in target.places:
        setattr(parent, attribute, module)


def _like(module: nn.Module, layer: LowRankLinear | PivotedLinear | SplitLinear) -> nn.Module:
    matrix = layer.dense()
    transposed = not isinstance(module, nn.Linear)
    dense = module.__class__.__new__(module.__class__)
    nn.Module.__init__(dense)
    dense.__dict__.update({key: value for key, value in module.__dict__.items() if not key.startswith("_")})
    dense.weight = nn.Parameter(matrix.T.contiguous() if transposed else matrix, requires_grad=False)
    dense.register_parameter("bias", layer.bias)
    return dense


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
