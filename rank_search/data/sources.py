"""Text of a source named in a study file: the offline default, a local file, or a dataset of the hub.

Every error of the libraries that read files and datasets ends here, as a one-line :class:`DataError`.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rank_search.errors import DataError, one_line
from rank_search.spec import PYTHON_DOCS, DataSpec

Role = Literal["train", "validation", "test"]
"""What a text of a study is for."""

_TABLE_LOADERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    # The words NA and null are text here, not missing values.
    ".csv": ("csv", {"keep_default_na": False}),
    ".tsv": ("csv", {"keep_default_na": False, "sep": "\t"}),
    ".parquet": ("parquet", {}),
}
_PLAIN_SUFFIXES = (".txt", ".text", ".md", ".rst")
_ROW_SEPARATOR = "\n\n"


@dataclass(frozen=True, slots=True)
class Text:
    """A text that was read. ``digest`` is the SHA-256 of its UTF-8 form, ``label`` its name in messages."""

    text: str
    digest: str
    label: str


@dataclass(frozen=True, slots=True)
class Source:
    """Where a text comes from.

    Attributes:
        name: ``python-docs``, a file, a folder that ``datasets`` reads, or a hub dataset id.
        folder: what a relative path starts from.
        split, config, revision: of a dataset; files have none.
        column: the text's column in tables.
    """

    name: str
    folder: Path
    split: str = "train"
    config: str | None = None
    revision: str | None = None
    column: str = "text"

    @classmethod
    def of(cls, spec: DataSpec, role: Role, folder: Path) -> Source | None:
        """The source that ``[data]`` names for a role; None if it names none."""
        name: str | None = getattr(spec, role)
        if name is None:
            return None
        split: str = getattr(spec, f"{role}_split")
        return cls(name, folder, split, spec.config, spec.revision, spec.column)

    @property
    def path(self) -> Path | None:
        """The local file or folder; None for ``python-docs`` and hub datasets.

        Raises:
            DataError: the name reads like a path and nothing is there.
        """
        if self.name == PYTHON_DOCS:
            return None
        path = self.folder / Path(self.name).expanduser()
        if path.exists():
            return path
        known = path.suffix.lower() in (*_TABLE_LOADERS, *_PLAIN_SUFFIXES)
        if known or self.name.startswith((".", "/", "~")):
            raise DataError(f"text file {path}: no such file; a relative path starts from the study file's folder")
        return None

    @property
    def label(self) -> str:
        """Name in messages."""
        path = self.path
        if self.name == PYTHON_DOCS or (path is not None and path.is_file()):
            return self.name
        config = f", config {self.config}" if self.config else ""
        return f"{self.name} (split {self.split}{config})"

    @property
    def is_here(self) -> bool:
        """Whether reading it asks nothing of the hub."""
        return self.name == PYTHON_DOCS or self.path is not None

    def shares_rows_with(self, other: Source) -> bool:
        """Whether both name the same file, or the same split of the same dataset.

        Two slices of one split count as the same: whether ``train[:90%]`` and ``train[80%:]`` share rows cannot
        be told from their names.
        """
        mine, theirs = self.path, other.path
        if mine is not None and theirs is not None:
            if not mine.samefile(theirs):
                return False
        elif mine is not theirs or self.name != other.name:
            return False
        is_one_text = self.name == PYTHON_DOCS or (mine is not None and mine.is_file())
        if is_one_text:
            return True
        splits, other_splits = _base_splits(self.split), _base_splits(other.split)
        return self.config == other.config and bool(splits & other_splits or "all" in splits | other_splits)


def read_text(source: Source) -> Text:
    """Read the text of a source; rows of tables are joined by a blank line, empty rows dropped.

    Raises:
        DataError: missing, empty, not UTF-8, not readable in its format, without the column, or not reachable.
    """
    path = source.path
    if source.name == PYTHON_DOCS:
        text = _python_docs()
    elif path is None or path.is_dir():
        text = _ROW_SEPARATOR.join(_texts(source, _dataset_columns(source, path, [source.column])[source.column]))
    elif path.suffix.lower() in _TABLE_LOADERS:
        text = _ROW_SEPARATOR.join(_texts(source, _table_columns(source, path, [source.column])[source.column]))
    else:
        text = _plain(path)
    if not text.strip():
        raise DataError(f"text {source.label} is empty; name a text with words in it")
    return Text(text, hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest(), source.label)


def read_columns(source: Source, columns: Sequence[str]) -> dict[str, list[Any]]:
    """Values of some columns of a table, row by row; numbers of classes that have names come as :class:`ClassNumber`.

    Raises:
        DataError: missing, empty, not a table, not readable in its format, without a column, or not reachable.
    """
    path = source.path
    if source.name == PYTHON_DOCS or (
        path is not None and path.is_file() and path.suffix.lower() not in _TABLE_LOADERS
    ):
        raise DataError(
            f"{source.label} has no columns; name a table ({', '.join(_TABLE_LOADERS)}) or a dataset of the hub"
        )
    read = _dataset_columns if path is None or path.is_dir() else _table_columns
    values = read(source, path, columns)  # type: ignore[arg-type]
    if not values[columns[0]]:
        raise DataError(f"{source.label} has no rows; name a table with examples in it")
    return values


class ClassNumber(int):
    """The number of a class of a dataset, which knows the class's name."""

    name: str

    @classmethod
    def of(cls, number: int, name: str) -> ClassNumber:
        """The number of the class ``name``."""
        made = cls(number)
        made.name = name
        return made


def _python_docs() -> str:
    from pydoc_data.topics import topics

    return _ROW_SEPARATOR.join(topics[key] for key in sorted(topics))


def _plain(path: Path) -> str:
    try:
        # utf-8-sig drops the byte order mark that some editors write.
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"text file {path} is not UTF-8 (byte {error.start}); convert it, or name a format by its suffix: "
            f"{', '.join(_TABLE_LOADERS)}"
        ) from None
    except OSError as error:
        raise DataError(f"text file {path}: {error.strerror}") from None


def _table_columns(source: Source, path: Path, wanted: Sequence[str]) -> dict[str, list[Any]]:
    import datasets

    if path.stat().st_size == 0:
        raise DataError(f"text {source.label} is empty; name a text with words in it")
    loader, options = _TABLE_LOADERS[path.suffix.lower()]
    with _translated(source):
        # Streaming reads the file itself: no copy in a cache that could outlive a change of the file.
        rows = datasets.load_dataset(loader, data_files=str(path), split="train", streaming=True, **options)
        columns: list[str] = []
        values: dict[str, list[Any]] = {column: [] for column in wanted}
        # Read to its end even where it is no use: a reader left in the middle keeps its file open.
        for row in rows:
            columns = columns or list(row)
            for column in wanted:
                values[column].append(row.get(column))
    if columns:
        _check_columns(source, wanted, columns)
    return values


def _dataset_columns(source: Source, path: Path | None, wanted: Sequence[str]) -> dict[str, list[Any]]:
    import datasets

    name = source.name if path is None else str(path)
    if path is None and Path(name).exists():
        # `datasets` would prefer a folder of that name where the command happens to be started.
        raise DataError(
            f"dataset {name} is a hub id, but the current folder holds something of that name; "
            f"write ./{name} and put it beside the study file, or start elsewhere"
        )
    with _translated(source):
        rows = datasets.load_dataset(name, name=source.config, revision=source.revision, split=source.split)
        _check_columns(source, wanted, rows.column_names)
        return {column: _with_class_names(list(rows[column]), rows.features[column]) for column in wanted}


def _with_class_names(values: list[Any], feature: Any) -> list[Any]:
    names = getattr(feature, "names", None)
    if not names:
        return values
    # Minus one is a row without a class.
    return [ClassNumber.of(value, names[value]) if value is not None and value >= 0 else None for value in values]


def _check_columns(source: Source, wanted: Sequence[str], known: list[str]) -> None:
    for column in wanted:
        if column not in known:
            raise DataError(f"text {source.label} has no column {column!r}; its columns are {', '.join(known)}")


def _texts(source: Source, values: Iterable[Any]) -> list[str]:
    texts = []
    for value in values:
        if value is None:
            continue
        if not isinstance(value, str):
            kind = type(value).__name__
            raise DataError(f"column {source.column!r} of {source.label} holds {kind}, not text; name a text column")
        if value.strip():
            texts.append(value)
    return texts


@contextmanager
def _translated(source: Source) -> Iterator[None]:
    from datasets.exceptions import DatasetsError

    # The library logs the same failure again, in several lines, before it raises.
    logger = logging.getLogger("datasets")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    except (DatasetsError, OSError, ValueError, TypeError, RuntimeError, StopIteration) as error:
        cause = error.__cause__ or error
        reason = one_line(cause) if str(cause).strip() else "nothing in it can be read as rows"
        raise DataError(f"text {source.label}: {reason}") from None
    finally:
        logger.setLevel(level)


def _base_splits(split: str) -> set[str]:
    """Names of the splits in an instruction such as ``train[:10%]+extra``."""
    return {part.split("[")[0].strip() for part in split.split("+")}
