"""Target layers: which weight matrices a study may factorise, found by shape, type and module name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rank_search.errors import TargetError
from rank_search.ranks import LayerShape, RankSpace
from rank_search.spec import TargetSpec

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_QUERY_OR_VALUE = re.compile(r"(^|_)(q|v|query|value)(_|$)", re.IGNORECASE)
_INDEX = re.compile(r"\.(\d+)(?=\.)")


@dataclass(frozen=True)
class Target:
    """A target layer: its shape, its module, and every place in the model that holds this module.

    ``places`` are (parent, attribute) pairs; ALBERT's one layer, say, can stand in several.
    """

    shape: LayerShape
    module: nn.Module
    places: tuple[tuple[nn.Module, str], ...]

    @property
    def name(self) -> str:
        """Module name, the key in rank maps."""
        return self.shape.name


def weight_matrix(module: nn.Module) -> Float[Tensor, "m n"]:
    """The matrix W of ``y = W x``: ``nn.Linear`` keeps it so, GPT-2's ``Conv1D`` transposed."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.T if isinstance(module, Conv1D) else weight


def find_targets(model: nn.Module, spec: TargetSpec) -> tuple[Target, ...]:
    """The target layers that ``[targets]`` selects, in the model's order.

    Blocks are told by a number in the module name (a member of a module list); embeddings, poolers and heads stand
    outside of them and are left alone unless ``include`` names them.

    Raises:
        TargetError: a pattern that matches nothing, a matrix that cannot be factorised, nothing selected.
    """
    candidates = list(_candidates(model))
    names = [target.name for target in candidates]
    modules = [name for name, _ in model.named_modules()]
    chosen = {name for name in names if _selected(name, spec)}
    if spec.share is not None:
        chosen = _fewest_holding(spec.share, [t.shape for t in candidates if t.name in chosen])
    for pattern in spec.include:
        chosen |= _matching(pattern, names, modules, "include")
    for pattern in spec.exclude:
        chosen -= _matching(pattern, names, modules, "exclude")
    targets = tuple(target for target in candidates if target.name in chosen)
    if not targets:
        raise TargetError(
            f"no target layer is selected (layers = {spec.layers!r}, {len(names)} linear layers in the model); "
            "name some under targets.include, or see `rank-search layers MODEL`"
        )
    _refuse_tied(model, targets)
    return targets


def rank_space(model: nn.Module, targets: Sequence[Target], spec: TargetSpec) -> RankSpace:
    """The rank maps of ``model`` over ``targets``; tied weights are counted once."""
    total = sum(parameter.numel() for parameter in model.parameters())
    return RankSpace(tuple(target.shape for target in targets), total, spec.storage, spec.rank_multiple)


def _candidates(model: nn.Module) -> Iterator[Target]:
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        # Not named_children, which names a module that stands twice in one parent only once.
        for attribute, child in parent._modules.items():
            places.setdefault(id(child), []).append((parent, attribute))
    linear = [(name, module) for name, module in model.named_modules() if type(module) in (nn.Linear, Conv1D)]
    stacks = {_INDEX.split(name, maxsplit=1)[0] for name, _ in linear if _INDEX.search(name)}
    for name, module in linear:
        m, n = weight_matrix(module).shape
        depth, group = _depth_and_group(name, several_stacks=len(stacks) > 1)
        yield Target(LayerShape(name, m, n, group, depth), module, tuple(places[id(module)]))


def _depth_and_group(name: str, *, several_stacks: bool) -> tuple[int, str]:
    """Index of the block and the name inside it; an encoder's layers and a decoder's are of different types."""
    match = _INDEX.search(name)
    if match is None:
        return 0, name
    inner = name[match.end() + 1 :]
    return int(match.group(1)), f"{name[: match.start()]}.{inner}" if several_stacks else inner


def _selected(name: str, spec: TargetSpec) -> bool:
    match = _INDEX.search(name)
    if match is None:
        return False
    inner = name[match.end() + 1 :]
    if spec.layers == "linear":
        return True
    if not _ATTENTION.search(inner):
        return False
    return spec.layers == "attention" or bool(_QUERY_OR_VALUE.search(inner.rsplit(".", 1)[-1]))


def _fewest_holding(share: float, shapes: list[LayerShape]) -> set[str]:
    """Largest layers first, until they hold ``share`` of the parameters of ``shapes``."""
    wanted = share * sum(shape.dense_params for shape in shapes)
    chosen: set[str] = set()
    held = 0
    for shape in sorted(shapes, key=lambda shape: -shape.dense_params):
        if held >= wanted - 1e-6:
            break
        chosen.add(shape.name)
        held += shape.dense_params
    return chosen


def _matching(pattern: str, names: list[str], modules: list[str], key: str) -> set[str]:
    found = {name for name in names if fnmatchcase(name, pattern)}
    if found:
        return found
    others = [name for name in modules if fnmatchcase(name, pattern)]
    if others:
        raise TargetError(
            f"targets.{key} pattern {pattern!r} matches {others[0]}, which is no linear layer; name linear layers"
        )
    raise TargetError(
        f"targets.{key} pattern {pattern!r} matches no module of the model; see `rank-search layers MODEL`"
    )


def _refuse_tied(model: nn.Module, targets: Sequence[Target]) -> None:
    """A matrix that another module uses too cannot be replaced in one of them alone."""
    owners: dict[int, set[int]] = {}
    for _, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(id(module))
    for target in targets:
        if len(owners[id(target.module.weight)]) > 1:
            raise TargetError(
                f"{target.name} shares its matrix with another module (tied weights) and must stay dense; exclude it"
            )
