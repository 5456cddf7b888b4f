"""Target layers in groups whose statistics fit into memory together.

What one layer holds grows with the squares of its sides, and all of them are held at once: for a model of 7 billion
parameters that is five times the model. So where there is not enough memory for all, a group of layers has a
calibration pass of its own. Nothing that is computed depends on the groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rank_search.factors.decompose import Needs
from rank_search.model.targets import Target, by_module, weight_matrix

_FLOAT64 = 8
"""Bytes of a number."""

Group = tuple[Target, ...]


@dataclass(frozen=True, slots=True)
class Unit:
    """Target layers that stay together, since they are parts of one module or read one input, whose ``A`` they share;
    and the bytes of their statistics."""

    targets: Group
    nbytes: int


def units(targets: Sequence[Target], needs: Needs, owners: Mapping[str, str]) -> tuple[Unit, ...]:
    """The smallest groups, in the model's order.

    Args:
        owners: module name → the module whose input it reads, too; itself where it is not there.
    """
    members: dict[str, list[list[Target]]] = {}
    for parts in by_module(targets):
        name = parts[0].module_name
        members.setdefault(owners.get(name, name), []).append(parts)
    found = []
    for modules in members.values():
        sides = [weight_matrix(parts[0].module).shape for parts in modules]
        numbers = sides[0][1] ** 2 if needs.inputs else 0
        if needs.gradients:
            numbers += sum(m**2 for m, _ in sides)
        found.append(Unit(tuple(target for parts in modules for target in parts), _FLOAT64 * numbers))
    return tuple(found)


def in_groups(units: Sequence[Unit], limit: int) -> tuple[Group, ...]:
    """Units one after the other as long as their statistics take at most ``limit`` bytes; one that takes more is a
    group by itself."""
    groups: list[Group] = []
    held = 0
    for unit in units:
        if groups and held + unit.nbytes <= limit:
            groups[-1] += unit.targets
            held += unit.nbytes
        else:
            groups.append(unit.targets)
            held = unit.nbytes
    return tuple(groups)
