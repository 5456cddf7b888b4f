"""Target layers: which weight matrices a study may factorise, found by shape, type and module name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rank_search.errors import TargetError
from rank_search.model.parts import ATTENTION, Part, heads_of, parts_of
from rank_search.ranks import LayerShape, RankSpace, frozen_ranks
from rank_search.spec import TargetSpec

_QUERY_OR_VALUE = re.compile(r"(^|_)(q|v|query|value)(_|$)", re.IGNORECASE)
_INDEX = re.compile(r"\.(\d+)(?=\.)")
_LINEAR = (nn.Linear, Conv1D)


@dataclass(frozen=True)
class Target:
    """A target layer: its shape, its module, and every place in the model that holds this module.

    ``places`` are (parent, attribute) pairs; ALBERT's one layer, say, can stand in several. ``part`` tells which rows
    or columns of the module's matrix the target layer is; None for all of it.
    """

    shape: LayerShape
    module: nn.Module
    places: tuple[tuple[nn.Module, str], ...]
    part: Part | None = None

    @property
    def name(self) -> str:
        """Module name, or for a part of a module's matrix that and the part's label: the key in rank maps."""
        return self.shape.name

    @property
    def module_name(self) -> str:
        """Name of the module."""
        return self.part.module if self.part else self.shape.name

    @property
    def matrix(self) -> Float[Tensor, "m n"]:
        """W, dense."""
        matrix = weight_matrix(self.module)
        return self.part.of(matrix) if self.part else matrix

    @property
    def device(self) -> torch.device:
        """Where its matrix is."""
        return weight_matrix(self.module).device

    @torch.no_grad()
    def write(self, values: Float[Tensor, "m n"]) -> None:
        """Write W, in place."""
        matrix = weight_matrix(self.module)
        if self.part is None:
            matrix.copy_(values)
        else:
            self.part.write(matrix, values)

    @property
    def bias(self) -> nn.Parameter | None:
        """The module's bias; a part has none, its module adds it to what the parts give."""
        return bias_of(self.module) if self.part is None else None


def weight_matrix(module: nn.Module) -> Float[Tensor, "m n"]:
    """The matrix W of ``y = W x``: ``nn.Linear`` keeps it so, GPT-2's ``Conv1D`` transposed."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.T if isinstance(module, Conv1D) else weight


def bias_of(module: nn.Module) -> nn.Parameter | None:
    """A layer's bias."""
    return module.bias if isinstance(module.bias, nn.Parameter) else None


def by_module(targets: Sequence[Target]) -> list[list[Target]]:
    """The target layers of each module, in order."""
    modules: dict[int, list[Target]] = {}
    for target in targets:
        modules.setdefault(id(target.module), []).append(target)
    return list(modules.values())


def find_targets(model: nn.Module, spec: TargetSpec) -> tuple[Target, ...]:
    """The target layers that ``[targets]`` selects, in the model's order.

    Blocks are told by a number in the module name (a member of a module list); embeddings, poolers and heads stand
    outside of them and are left alone unless ``include`` names them.

    Raises:
        TargetError: a pattern that matches nothing, a matrix that cannot be factorised, nothing selected.
    """
    candidates, untold = _candidates(model, spec)
    selected = [target for target in candidates if _selected(target, spec)]
    chosen = {target.name for target in selected}
    if spec.share is not None:
        chosen = _fewest_holding(spec.share, [target.shape for target in selected])
    for pattern in spec.include:
        chosen |= _matching(pattern, candidates, model, "include")
    for pattern in spec.exclude:
        chosen -= _matching(pattern, candidates, model, "exclude")
    targets = tuple(target for target in candidates if target.name in chosen)
    if not targets:
        raise TargetError(
            f"no target layer is selected (layers = {spec.layers!r}, {len(candidates)} linear layers in the model"
            f"{_told_of_subclasses(model)}); name some under targets.include, or see `rank-search layers MODEL`"
        )
    for target in targets:
        if target.name in untold:
            raise TargetError(untold[target.name])
    _refuse_nothing_split(targets, spec)
    _refuse_tied(model, targets)
    return targets


def rank_space(model: nn.Module, targets: Sequence[Target], spec: TargetSpec) -> RankSpace:
    """The rank maps of ``model`` over ``targets``; tied weights are counted once.

    Raises:
        TargetError: ``targets.frozen`` names no layer, or a rank that is none.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    shapes = tuple(target.shape for target in targets)
    frozen = frozen_ranks(shapes, spec.frozen, spec.storage)
    return RankSpace(shapes, total, spec.storage, spec.rank_multiple, frozen)


def _candidates(model: nn.Module, spec: TargetSpec) -> tuple[list[Target], dict[str, str]]:
    """All linear layers, in parts where ``spec`` asks for it, and why some could not be split, by name."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        # Not named_children, which names a module that stands twice in one parent only once.
        for attribute, child in parent._modules.items():
            places.setdefault(id(child), []).append((parent, attribute))
    linear = [(name, module) for name, module in model.named_modules() if type(module) in _LINEAR]
    stacks = {_INDEX.split(name, maxsplit=1)[0] for name, _ in linear if _INDEX.search(name)}
    candidates: list[Target] = []
    untold: dict[str, str] = {}
    for name, module in linear:
        m, n = weight_matrix(module).shape
        depth, group = _depth_and_group(name, several_stacks=len(stacks) > 1)
        try:
            parts = _parts(model, name, module, spec)
        except TargetError as error:
            # Refused only where it is selected.
            untold[name], parts = str(error), ()
        at = tuple(places[id(module)])
        if not parts:
            candidates.append(Target(LayerShape(name, m, n, group, depth), module, at))
        for part in parts:
            rows, columns = (part.size, n) if part.axis == "rows" else (m, part.size)
            shape = LayerShape(part.name, rows, columns, f"{group}.{part.kind}", depth)
            candidates.append(Target(shape, module, at, part))
    return candidates, untold


def _parts(model: nn.Module, name: str, module: nn.Module, spec: TargetSpec) -> tuple[Part, ...]:
    by_head = spec.granularity == "head"
    inner = _inner(name)
    if not (by_head or spec.split_qkv) or inner is None or not ATTENTION.search(inner):
        return ()
    m, n = weight_matrix(module).shape
    return parts_of(name, module, m, n, heads_of(model, name), by_head=by_head)


def _depth_and_group(name: str, *, several_stacks: bool) -> tuple[int, str]:
    """Index of the block and the name inside it; an encoder's layers and a decoder's are of different types."""
    match = _INDEX.search(name)
    if match is None:
        return 0, name
    inner = name[match.end() + 1 :]
    return int(match.group(1)), f"{name[: match.start()]}.{inner}" if several_stacks else inner


def _inner(name: str) -> str | None:
    """Name inside the block; None outside of the blocks."""
    match = _INDEX.search(name)
    return None if match is None else name[match.end() + 1 :]


def _selected(target: Target, spec: TargetSpec) -> bool:
    inner = _inner(target.module_name)
    if inner is None:
        return False
    if spec.layers == "linear":
        return True
    if not ATTENTION.search(inner):
        return False
    # A part of a fused projection says itself what it is: q, k or v.
    kind = target.part.kind.removesuffix("head").strip(".") if target.part else ""
    return spec.layers == "attention" or bool(_QUERY_OR_VALUE.search(kind or inner.rsplit(".", 1)[-1]))


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


def _matching(pattern: str, candidates: Sequence[Target], model: nn.Module, key: str) -> set[str]:
    """Names of the target layers whose own name, or their module's, the pattern fits."""
    found = {t.name for t in candidates if fnmatchcase(t.name, pattern) or fnmatchcase(t.module_name, pattern)}
    if found:
        return found
    for name, parameter in other_matrices(model):
        if fnmatchcase(name, pattern) or fnmatchcase(name.rpartition(".")[0], pattern):
            kind = type(model.get_submodule(name.rpartition(".")[0])).__name__
            raise TargetError(
                f"targets.{key} pattern {pattern!r} matches {name}, a parameter {tuple(parameter.shape)} of {kind}, "
                "which must stay dense; name linear layers"
            )
    for name, _ in model.named_modules():
        if fnmatchcase(name, pattern):
            raise TargetError(
                f"targets.{key} pattern {pattern!r} matches {name}, which is no linear layer; name linear layers"
            )
    raise TargetError(
        f"targets.{key} pattern {pattern!r} matches no module of the model; see `rank-search layers MODEL`"
    )


def other_matrices(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters of two or three dimensions inside the blocks that no target layer can have: they stay dense.

    The experts of a mixture in one piece, most often. Embeddings and convolutions are none.
    """
    for prefix, module in model.named_modules():
        if type(module) in _LINEAR or isinstance(module, nn.Embedding | nn.modules.conv._ConvNd):
            continue
        for name, parameter in module.named_parameters(prefix, recurse=False):
            if parameter.dim() in (2, 3) and min(parameter.shape) > 1 and _INDEX.search(name) and "bias" not in name:
                yield name, parameter


def told_of_other_matrices(model: nn.Module) -> str | None:
    """One line about the matrices that stay dense, the largest by name, for whoever watches; None without any."""
    matrices = list({id(parameter): (name, parameter) for name, parameter in other_matrices(model)}.values())
    if not matrices:
        return None
    total = sum(parameter.numel() for parameter in model.parameters())
    held = sum(parameter.numel() for _, parameter in matrices)
    largest, _ = max(matrices, key=lambda named: named[1].numel())
    others = f" and {len(matrices) - 1} more" if len(matrices) > 1 else ""
    return (
        f"{largest}{others}: parameters of two or three dimensions outside of nn.Linear (experts of a mixture, say) "
        f"are left dense; they hold {held / total:.1%} of the model"
    )


def _told_of_subclasses(model: nn.Module) -> str:
    """The kinds of linear layers that are none of torch's own, whose matrices may be used in other ways."""
    others = [module for module in model.modules() if isinstance(module, nn.Linear) and type(module) is not nn.Linear]
    kinds = ", ".join(sorted({type(module).__name__ for module in others}))
    return f", and {len(others)} of subclasses that cannot be target layers: {kinds}" if others else ""


def _refuse_nothing_split(targets: Sequence[Target], spec: TargetSpec) -> None:
    kinds = {target.part.kind for target in targets if target.part}
    if spec.granularity == "head" and not kinds:
        raise TargetError('targets.granularity = "head", but no projection of attention is selected; leave it out')
    if spec.split_qkv and not any(kind[0] in "qkv" for kind in kinds):
        raise TargetError("targets.split_qkv = true, but no fused QKV is selected; leave it out")


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
