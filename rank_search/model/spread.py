"""One model over several GPUs, for models that do not fit one: whole blocks, each where it computes.

The blocks are cut into as many runs as there are GPUs. What a block is given is moved to its GPU when it is called, and
the model's output to the first one, where its input came from; gradients go back the same way. Only one GPU computes at
a time: this is for memory, not for speed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device  # type: ignore[import-untyped]
from torch import nn

from rank_search.errors import DeviceError
from rank_search.model.device import free_memory


@dataclass(frozen=True, slots=True)
class ModelPart:
    """What stays on one GPU.

    Attributes:
        name: of its module.
        nbytes: of its parameters, but for those that it shares with a part before it.
        is_block: one of the blocks, which are cut into runs.
        tied_to: parts before it that hold a parameter of it, too (an embedding, of the head).
    """

    name: str
    nbytes: int
    is_block: bool = False
    tied_to: tuple[str, ...] = ()


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """What the outermost lists of modules hold: the blocks of a Transformer."""
    blocks: list[nn.Module] = []
    for child in model.children():
        blocks.extend(child if isinstance(child, nn.ModuleList) else blocks_of(child))
    return blocks


def parts_of_model(model: nn.Module) -> tuple[ModelPart, ...]:
    """All of a model, in its order.

    Raises:
        DeviceError: it holds parameters beside its blocks that belong to no module of their own.
    """
    parts: list[ModelPart] = []
    holders: dict[int, str] = {}
    for name, module, is_block in _pieces(model, "", {id(block) for block in blocks_of(model)}):
        parameters = {id(parameter): parameter for parameter in module.parameters()}
        tied = dict.fromkeys(holders[key] for key in parameters if key in holders)
        nbytes = sum(parameter.nbytes for key, parameter in parameters.items() if key not in holders)
        holders.update((key, name) for key in parameters if key not in holders)
        parts.append(ModelPart(name, nbytes, is_block, tuple(tied)))
    return tuple(parts)


def _pieces(module: nn.Module, name: str, blocks: set[int]) -> Iterator[tuple[str, nn.Module, bool]]:
    if id(module) in blocks or not any(id(inner) in blocks for inner in module.modules()):
        yield name, module, id(module) in blocks
        return
    for own, _ in module.named_parameters(recurse=False):
        raise DeviceError(
            f"the model cannot be spread over GPUs: {f'{name}.{own}'.lstrip('.')} stands beside its blocks; "
            "set run.gpus_per_model = 1"
        )
    for child_name, child in module.named_children():
        yield from _pieces(child, f"{name}.{child_name}".lstrip("."), blocks)


def places(parts: Sequence[ModelPart], count: int) -> dict[str, int]:
    """Name of every part → number of its GPU, such that the fullest of ``count`` GPUs holds as little as can be.

    Parts keep their order, but for two kinds: those that share a parameter with an earlier one are beside that one, and
    those without any are on the first GPU, where the input is.

    Raises:
        DeviceError: blocks that share a parameter would be on several GPUs.
    """
    low, high = 0, sum(part.nbytes for part in parts)
    while low < high:
        limit = (low + high) // 2
        fits = max(_loads(parts, _filled(parts, count, limit))) <= limit
        low, high = (low, limit) if fits else (limit + 1, high)
    found = _filled(parts, count, low)
    for part in parts:
        for other in part.tied_to:
            if found[other] != found[part.name]:
                raise DeviceError(
                    f"the model cannot be spread over GPUs: {part.name} shares parameters with {other}; "
                    "set run.gpus_per_model = 1"
                )
    return found


def _filled(parts: Sequence[ModelPart], count: int, limit: int) -> dict[str, int]:
    """One GPU after the other filled up to ``limit`` bytes; the last one takes whatever is left."""
    found: dict[str, int] = {}
    now, load = 0, sum(part.nbytes for part in parts if _is_aside(part))  # most often tied to an embedding, the first
    for part in parts:
        if _is_aside(part):
            found[part.name] = found[part.tied_to[0]] if part.tied_to else 0
            continue
        if load + part.nbytes > limit and now < count - 1:
            now, load = now + 1, 0
        load += part.nbytes
        found[part.name] = now
    return found


def _is_aside(part: ModelPart) -> bool:
    return not part.is_block and (part.nbytes == 0 or bool(part.tied_to))


def _loads(parts: Sequence[ModelPart], found: dict[str, int]) -> list[int]:
    loads = [0] * (1 + max(found.values(), default=0))
    for part in parts:
        loads[found[part.name]] += part.nbytes
    return loads


def spread(model: nn.Module, devices: Sequence[torch.device]) -> None:
    """Put a model's blocks on several devices, for good; it takes its input and gives its output on the first.

    Raises:
        DeviceError: it cannot be cut, or does not fit.
    """
    parts = parts_of_model(model)
    found = places(parts, len(devices))
    for device, load in zip(devices, _loads(parts, found), strict=False):
        if device.type == "cuda" and load > (free := free_memory(device)):
            raise DeviceError(
                f"the model's share of {load / 2**30:.1f} GiB does not fit {device}, which has {free / 2**30:.1f} GiB "
                "free; spread it over more GPUs (run.gpus_per_model, --gpus-per-worker)"
            )
    for buffer in model.buffers():
        buffer.data = buffer.data.to(devices[0])
    for part in parts:
        module, device = model.get_submodule(part.name), devices[found[part.name]]
        module.to(device)
        module.register_forward_pre_hook(_Move(device).inputs, with_kwargs=True)
    model.register_forward_hook(_Move(devices[0]).output)


@dataclass(frozen=True)
class _Move:
    """Hooks that move tensors to a device, in whatever they are wrapped."""

    device: torch.device

    def inputs(self, _module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return send_to_device(args, self.device), send_to_device(kwargs, self.device)

    def output(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        return send_to_device(output, self.device)


def devices_of(model: nn.Module) -> tuple[torch.device, ...]:
    """The devices that hold a model's parameters; the first takes its input."""
    return tuple(dict.fromkeys(parameter.device for parameter in model.parameters()))
