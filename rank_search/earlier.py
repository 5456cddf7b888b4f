"""Study files as earlier versions stored them. Pure."""

from __future__ import annotations

from typing import Any

STORED = "stored"
"""Context in which models are checked that were stored: rules that came later do not hold for them."""
_LATER = {"factors": {"anchor": 1.0, "slope_power": 0.0, "gain_step": 0.0}}
"""Keys that came with a later version, with what was in force before it."""
_WITNESS = {"factors": "damping"}
"""A key of each table that every version had: where it stands, the table was stored whole."""


def as_meant(tables: dict[str, Any]) -> dict[str, Any]:
    """The tables of a stored study file, which hold every key of their version, with the keys that came later."""
    return {
        name: {**_LATER[name], **table} if name in _LATER and _WITNESS[name] in table else table
        for name, table in tables.items()
    }
