"""The rank map file: one rank map as JSON, with all that is needed to check it, trust it and remake its factors.

Its JSON Schema is ``docs/rank_map.schema.json``. No torch here: reading and writing cost nothing.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rank_search.atomic import write_atomically
from rank_search.earlier import STORED, as_meant
from rank_search.errors import RankMapError
from rank_search.measurement import Fidelity, Measurement
from rank_search.ranks import LayerShape, RankMap, RankSpace, Storage
from rank_search.spec import PYTHON_DOCS, Method, StudySpec

SCHEMA_VERSION: Final = 1
"""Version of the file's form that this code writes and reads."""

_Count = Annotated[int, Field(ge=0)]
_Positive = Annotated[int, Field(ge=1)]
_Fraction = Annotated[float, Field(gt=0)]
_Seconds = Annotated[float, Field(ge=0)]
_Name = Annotated[str, Field(min_length=1)]
_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Part(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class ModelRecord(_Part):
    """The dense model that the rank map was made for."""

    source: _Name
    """Hub id, folder, or GGUF file; a relative path is relative to this file."""
    revision: str | None = None
    """Commit of a hub model."""
    weights_digest: _Name
    """Digest of the dense weights."""


class MeasurementRecord(_Part):
    """What an evaluation of the rank map returned."""

    loss: float
    """Validation loss, nats per token."""
    standard_error: _Seconds
    """Of the loss over the validation blocks, nats per token."""
    num_params: _Positive
    target_params: _Positive
    kept_of_targets: _Fraction
    kept_of_model: _Fraction
    fidelity: Literal["predicted", "sliced", "tuned", "confirmed"]
    """How the loss was obtained."""
    tokens: _Count
    """Tokens that the loss is a mean over."""
    swap_seconds: _Seconds = 0.0
    finetune_seconds: _Seconds = 0.0
    score_seconds: _Seconds = 0.0
    peak_memory: _Count = 0
    """Bytes."""

    @classmethod
    def of(cls, measurement: Measurement) -> MeasurementRecord:
        """The record of a measurement."""
        values = {name: getattr(measurement, name) for name in cls.model_fields}
        return cls(**(values | {"fidelity": measurement.fidelity.label}))

    def measurement(self) -> Measurement:
        """Inverse of :meth:`of`."""
        return Measurement(**(self.model_dump() | {"fidelity": Fidelity.from_label(self.fidelity)}))


class StudyRecord(_Part):
    """The study that the rank map comes from."""

    name: _Name
    trial: _Count | None = None
    """Number of the trial that proposed it; null for an allocation without a search."""


class DigestRecord(_Part):
    """Digests of what the rank map rests on."""

    rank_map: _Sha256
    """Of ``ranks``: tells a file that was edited by hand."""
    calibration: str | None = None
    """Of the token ids of the calibration blocks."""
    bank: str | None = None
    """Of the factor bank."""


class RankMapFile(_Part):
    """One rank map with its model, measurement, origin, and the recipe that remakes its factors."""

    schema_version: Literal[1] = SCHEMA_VERSION
    model: ModelRecord
    method: Method
    """How the matrices were factorised."""
    storage: Storage
    """How a matrix of rank r is stored, and counted in ``num_params``."""
    ranks: dict[str, _Positive]
    """Module name → rank; a target layer that is absent is left dense."""
    layers: dict[str, tuple[_Positive, _Positive]]
    """Module name → shape (m, n) of every target layer ``y = W x``, W being (m, n)."""
    kept_of_targets: Annotated[float, Field(gt=0, le=1)]
    """Kept fraction of the target layers."""
    kept_of_model: Annotated[float, Field(gt=0, le=1)]
    """Kept fraction of the whole model."""
    num_params: _Positive
    """Parameters of the whole compressed model."""
    allocation: _Name
    """The rule that gave the ranks, in words: ``closed form 0.6``, ``trial 17 (tpe)``."""
    measurement: MeasurementRecord | None = None
    """Null where the rank map was not evaluated."""
    study: StudyRecord
    digests: DigestRecord
    recipe: StudySpec
    """The study file; its relative paths are relative to this file."""

    @property
    def num_params_otherwise(self) -> tuple[Storage, int]:
        """The other storage form, and the parameters of the whole model in it: pivoted takes r² less for rank r."""
        squares = sum(rank**2 for rank in self.ranks.values())
        if self.storage == "pivoted":
            return "two-factor", self.num_params + squares
        return "pivoted", self.num_params - squares

    @model_validator(mode="after")
    def _ranks_of_target_layers(self) -> RankMapFile:
        for name in self.ranks:
            if name not in self.layers:
                raise ValueError(f"ranks.{name} is not among the target layers in layers")
        if self.rank_map.digest != self.digests.rank_map:
            raise ValueError("digests.rank_map does not belong to ranks, which were changed; export the rank map anew")
        return self

    @classmethod
    def of(
        cls,
        rank_map: RankMap,
        space: RankSpace,
        recipe: StudySpec,
        *,
        weights_digest: str,
        allocation: str,
        revision: str | None = None,
        measurement: Measurement | None = None,
        trial: int | None = None,
        calibration_digest: str | None = None,
        bank_digest: str | None = None,
    ) -> RankMapFile:
        """The file of a rank map, its kept fractions counted in the storage form of ``space``.

        Raises:
            RankMapError: the rank map does not fit the space.
        """
        space.validate(rank_map)
        return cls(
            model=ModelRecord(
                source=recipe.model.source, revision=revision or recipe.model.revision, weights_digest=weights_digest
            ),
            method=recipe.factors.method,
            storage=space.storage,
            ranks=dict(rank_map),
            layers={shape.name: (shape.m, shape.n) for shape in space.shapes},
            kept_of_targets=space.kept_of_targets(rank_map),
            kept_of_model=space.kept_of_model(rank_map),
            num_params=space.num_params(rank_map),
            allocation=allocation,
            measurement=None if measurement is None else MeasurementRecord.of(measurement),
            study=StudyRecord(name=recipe.name, trial=trial),
            digests=DigestRecord(rank_map=rank_map.digest, calibration=calibration_digest, bank=bank_digest),
            recipe=recipe,
        )

    @classmethod
    def read(cls, path: Path | str) -> RankMapFile:
        """Read and check a rank map file.

        Raises:
            RankMapError: missing, not JSON, of another schema version, or against the schema; names the field.
        """
        path = Path(path)
        tables = _read_json(path)
        version = tables.get("schema_version")
        if version != SCHEMA_VERSION:
            raise RankMapError(
                f"rank map file {path}: schema_version must be {SCHEMA_VERSION}, not {version!r}; "
                f"read it with the version of rank-search that wrote it"
            )
        if isinstance(recipe := tables.get("recipe"), dict):
            tables["recipe"] = as_meant(recipe)
        try:
            return cls.model_validate_json(json.dumps(tables), context=STORED)
        except ValidationError as error:
            raise RankMapError(f"rank map file {path}: {_first_fault(error)}") from None

    def write(self, path: Path | str, *, folder: Path | str) -> None:
        """Write the file whole or not at all.

        Relative local paths in it are rewritten to start from the file's own folder.

        Args:
            path: the file to write, in a folder that is there.
            folder: where the recipe's relative paths start from now.

        Raises:
            RankMapError: the folder is missing, not writable, or its disk is full; nothing is left half-written.
        """
        path = Path(path)
        moved = self._moved(Path(folder), path.parent)
        try:
            write_atomically(path, moved.text().encode())
        except OSError as error:
            raise RankMapError(f"rank map file {path} cannot be written: {error.strerror}; write elsewhere") from None

    def text(self) -> str:
        """The file's content, its paths as they are."""
        text = json.dumps(self.model_dump(mode="json"), indent=2, ensure_ascii=False)
        # A shape on one line, not on four.
        return re.sub(r"\[\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2]", text) + "\n"

    @property
    def rank_map(self) -> RankMap:
        """The rank map."""
        return RankMap(self.ranks)

    @property
    def spec(self) -> StudySpec:
        """The study file that the factors and the fine-tune can be remade from; paths start from the file's folder."""
        return self.recipe

    def check_fits(self, shapes: Sequence[LayerShape], weights_digest: str | None = None) -> None:
        """Check the rank map against the layers of the model that it is to be applied to.

        ``weights_digest`` None leaves the weights unchecked.

        Raises:
            RankMapError: naming the first module that does not fit, else the weights.
        """
        there = {shape.name: shape for shape in shapes}
        for name, (m, n) in self.layers.items():
            shape = there.get(name)
            if shape is None:
                raise RankMapError(f"{name} is in the rank map but not in this model; use the rank map of this model")
            if (shape.m, shape.n) != (m, n):
                raise RankMapError(
                    f"{name} is ({m}, {n}) in the rank map but ({shape.m}, {shape.n}) in this model; "
                    f"use the rank map of this model"
                )
            rank, top = self.ranks.get(name), shape.max_rank(self.storage)
            if rank is not None and rank > top:
                raise RankMapError(
                    f"{name} has rank {rank}, but above {top} its ({m}, {n}) matrix is smaller dense "
                    f"({self.storage} storage); leave it out of the rank map"
                )
        if weights_digest is not None and weights_digest != self.model.weights_digest:
            raise RankMapError(
                f"the rank map was made for weights {self.model.weights_digest[:12]}, but this model has "
                f"{weights_digest[:12]}; use {self.model.source}"
                + (f" at revision {self.model.revision}" if self.model.revision else "")
            )

    def _moved(self, old: Path, new: Path) -> RankMapFile:
        recipe = self.recipe
        source = _moved_path(recipe.model.source, old, new)
        data = {
            role: _moved_path(name, old, new)
            for role in ("train", "validation", "test")
            if (name := getattr(recipe.data, role)) is not None and name != PYTHON_DOCS
        }
        work_dir = _moved_path(recipe.run.work_dir, old, new, is_path=True)
        recipe = recipe.model_copy(
            update={
                "model": recipe.model.model_copy(update={"source": source}),
                "data": recipe.data.model_copy(update=data),
                "run": recipe.run.model_copy(update={"work_dir": work_dir}),
            }
        )
        model = self.model.model_copy(update={"source": _moved_path(self.model.source, old, new)})
        return self.model_copy(update={"model": model, "recipe": recipe})


def json_schema() -> dict[str, Any]:
    """The JSON Schema of rank map files."""
    schema = RankMapFile.model_json_schema()
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:rank-search:rank-map:{SCHEMA_VERSION}",
    } | (schema | {"title": "Rank map", "required": ["schema_version", *schema["required"]]})


def _moved_path(name: str, old: Path, new: Path, *, is_path: bool = False) -> str:
    """A name as seen from folder ``new``, if it is a relative path from ``old``; hub ids stay as they are."""
    if Path(name).is_absolute() or name.startswith("~"):
        return name
    path = old / name
    if not is_path and not path.exists():
        return name
    # Links on the way are followed, since ".." would not lead back through them; the last part keeps its name.
    return Path(os.path.relpath(path.parent.resolve() / path.name, new.resolve())).as_posix()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        tables = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RankMapError(f"rank map file {path}: {error.strerror}") from None
    except ValueError as error:
        raise RankMapError(f"rank map file {path} is not JSON: {error}") from None
    if not isinstance(tables, dict):
        raise RankMapError(f"rank map file {path} must hold one JSON object, not a {type(tables).__name__}")
    return tables


def _first_fault(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"unknown field {field}"
    if first["type"] == "missing":
        return f"field {field} is missing"
    message = first["msg"].removeprefix("Value error, ")
    given = "" if first["type"] == "value_error" else f", not {first['input']!r}"
    return f"{field + ': ' if field else ''}{message}{given}"
