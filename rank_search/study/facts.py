"""What a study found out about its model and text when it was prepared. Pure: no torch, no Optuna."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields

from rank_search.errors import StorageError, StudyMismatchError
from rank_search.ranks import LayerShape


@dataclass(frozen=True)
class StudyFacts:
    """Facts that a study file does not hold, but that decide what its measurements mean.

    Attributes:
        source: where the weights came from; their digest, not their place, identifies them.
        revision: the commit that a hub model resolved to.
        weights_digest: SHA-256 of the weights.
        shapes: the target layers.
        model_params: parameters of the whole dense model, tied weights once.
        calibration_digest: SHA-256 of the calibration blocks.
        bank: key of the factor bank.
        train_digest, validation_digest: SHA-256 of these blocks. Empty in studies made before they were kept: those
            can be read, but not resumed.
        folder: what the study file's relative paths started from when the study was made; may differ later.
    """

    source: str
    revision: str | None
    weights_digest: str
    shapes: tuple[LayerShape, ...]
    model_params: int
    calibration_digest: str
    bank: str
    train_digest: str = ""
    validation_digest: str = ""
    folder: str = ""

    def to_json(self) -> str:
        """One JSON object; inverse of :meth:`from_json`."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> StudyFacts:
        """Read what :meth:`to_json` wrote.

        Raises:
            StorageError: the text is something else.
        """
        try:
            table = json.loads(text)
            shapes = tuple(LayerShape(**shape) for shape in table.pop("shapes"))
            return cls(shapes=shapes, **table)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StorageError(f"the stored facts of the study are damaged ({error}); restore the database") from None

    def check_same(self, stored: StudyFacts, study: str) -> None:
        """Refuse to go on with a study whose stored facts differ from these. ``source`` and ``folder`` may differ.

        Raises:
            StudyMismatchError: naming the first field that differs.
        """
        for name in (field.name for field in fields(self) if field.name not in {"source", "shapes", "folder"}):
            old, new = getattr(stored, name), getattr(self, name)
            if old != new:
                raise StudyMismatchError(_mismatch(study, name, old, new))
        if self.shapes != stored.shapes:
            pairs = zip(stored.shapes, self.shapes, strict=False)
            old, new = next(((a, b) for a, b in pairs if a != b), (len(stored.shapes), len(self.shapes)))
            raise StudyMismatchError(_mismatch(study, "shapes", old, new))


def _mismatch(study: str, field: str, old: object, new: object) -> str:
    return (
        f"study {study!r} was made with {field} = {old}, preparing it now gives {new}; "
        "give the study a new name or restore the model and text it was made with"
    )
