"""Study files as earlier versions stored them. Pure."""

from __future__ import annotations

from typing import Any

STORED = "stored"
"""Context in which models are checked that were stored: rules that came later do not hold for them."""
_LATER_FACTORS = {"anchor": 1.0, "slope_power": 0.0, "gain_step": 0.0}
"""Keys of ``[factors]`` that came with a later version, with what was in force before it."""


def as_meant(tables: dict[str, Any]) -> dict[str, Any]:
    """The tables of a stored study file, which hold every key of their version, with the keys that came later."""
    factors = tables.get("factors")
    if not isinstance(factors, dict) or "damping" not in factors:  # which every version stored
        return tables
    return {**tables, "factors": {**_LATER_FACTORS, **factors}}
