"""Examples of a task as columns of numbers: what a text or a labelled table becomes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int32
from numpy.typing import NDArray

Column = Int32[np.ndarray, "examples length"]


@dataclass(frozen=True, eq=False)
class ExampleTable:
    """Columns of equally many rows, ``input_ids`` among them; read-only where they are memory-mapped."""

    columns: Mapping[str, Column]

    def __len__(self) -> int:
        return len(self.columns["input_ids"])

    def __getitem__(self, rows: slice | NDArray[np.integer[Any]]) -> ExampleTable:
        return ExampleTable({name: column[rows] for name, column in self.columns.items()})

    @property
    def digest(self) -> str:
        """SHA-256 of all columns, the same on every machine; of token blocks alone that of their ids."""
        digests = {name: column_digest(column) for name, column in sorted(self.columns.items())}
        if digests.keys() == {"input_ids"}:
            return digests["input_ids"]
        return hashlib.sha256("\n".join(f"{name} {digest}" for name, digest in digests.items()).encode()).hexdigest()


def column_digest(column: Column) -> str:
    """SHA-256 of the numbers and their shape."""
    digest = hashlib.sha256(f"{column.shape[0]}x{column.shape[1]}:".encode())
    digest.update(np.ascontiguousarray(column, dtype="<i4").tobytes())
    return digest.hexdigest()
