"""A compressed model in the place of the dense one, and back, with one copy of the matrices more, on the host."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from rank_search.factors.decompose import Factors
from rank_search.model.targets import Target
from rank_search.ranks import RankMap


class Exchange:
    """The matrices of one of two models, dense and compressed by a rank map; those of the other are in the model."""

    @torch.no_grad()
    def __init__(self, targets: Sequence[Target], factors: dict[str, Factors], rank_map: RankMap) -> None:
        """Multiply the factors of ``rank_map`` out. ``factors`` is emptied, so that the host never holds both."""
        self._targets = {target.name: target for target in targets if target.name in rank_map}
        self._away: dict[str, Tensor] = {}
        for target in targets:
            layer = factors.pop(target.name)
            if target.name in rank_map:
                rank, device = rank_map[target.name], target.matrix.device
                self._away[target.name] = (layer.out[:rank].to(device).T @ layer.inn[:rank].to(device)).cpu()

    @contextmanager
    def compressed(self) -> Iterator[Mapping[str, Float[Tensor, "m n"]]]:
        """The model is compressed inside the block, and bit-identical after it. Yields what its matrices lost."""
        exchanged: list[Target] = []
        try:
            for target in self._targets.values():
                self._exchange(target)
                exchanged.append(target)
            yield _Lost(self._targets, self._away)
        finally:
            for target in exchanged:
                self._exchange(target)

    def _exchange(self, target: Target) -> None:
        away, present = self._away[target.name], target.matrix.detach().clone()
        target.write(away)
        away.copy_(present)  # into the memory that is there


class _Lost(Mapping[str, Tensor]):
    """Compressed minus dense, made when it is asked for, on the layer's device."""

    def __init__(self, targets: Mapping[str, Target], dense: Mapping[str, Tensor]) -> None:
        self._targets = targets
        self._dense = dense

    def __getitem__(self, name: str) -> Tensor:
        matrix = self._targets[name].matrix.detach()
        return matrix - self._dense[name].to(matrix.device)

    def __contains__(self, name: object) -> bool:
        return name in self._targets

    def __iter__(self) -> Iterator[str]:
        return iter(self._targets)

    def __len__(self) -> int:
        return len(self._targets)
