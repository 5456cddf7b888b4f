"""Token blocks: a text tokenised once, cut into blocks of equal length, kept on disk and memory-mapped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
from filelock import FileLock
from jaxtyping import Int32
from numpy.typing import NDArray

from rank_search.atomic import whole
from rank_search.data.sources import Text
from rank_search.errors import DataError
from rank_search.progress import SILENT, Progress

Blocks: TypeAlias = Int32[np.ndarray, "blocks length"]
"""Token ids, one block a row; read-only where they are memory-mapped."""

_FORMAT = 1
_CHUNK_CHARACTERS = 1 << 16
_CHUNKS_AT_ONCE = 16


@runtime_checkable
class FastTokenizer(Protocol):
    """What is needed of a ``transformers`` tokenizer: the ``tokenizers.Tokenizer`` inside it."""

    @property
    def backend_tokenizer(self) -> Any:
        """The ``tokenizers.Tokenizer``."""


def token_blocks(
    text: Text, tokenizer: FastTokenizer, sequence_length: int, *, work_dir: Path, progress: Progress = SILENT
) -> Blocks:
    """All non-overlapping blocks of a text, (blocks, sequence_length); what is left over at its end is dropped.

    No special tokens are added. Blocks are cached in ``work_dir/blocks``, once for all processes that share the
    folder.

    Raises:
        DataError: the text is shorter than one block, or the cache cannot be written or read.
    """
    path = work_dir / "blocks" / f"{_key(text, tokenizer, sequence_length)}.npy"
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_suffix(".lock")):
                if not path.exists():
                    _write(path, _cut(text, tokenizer, sequence_length, progress))
        blocks: Blocks = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise DataError(
            f"token blocks {path}: {error.strerror or error}; free the space or move run.work_dir"
        ) from None
    except (ValueError, EOFError) as error:
        raise DataError(f"token blocks {path} are damaged ({error}); delete the file") from None
    return blocks


def tokenizer_digest(tokenizer: FastTokenizer) -> str:
    """SHA-256 of the tokenizer's serialised form, without the truncation and padding of its latest call."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state.pop("truncation", None)
    state.pop("padding", None)
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def check_length(sequence_length: int, model_max: int | None) -> None:
    """Refuse sequences that the model has no positions for; ``model_max`` None is a model without a limit.

    Raises:
        DataError: ``sequence_length`` is above ``model_max``.
    """
    if model_max is not None and sequence_length > model_max:
        raise DataError(
            f"sequences may be at most {model_max} tokens long for this model, not {sequence_length}; "
            f"lower data.sequence_length"
        )


def _key(text: Text, tokenizer: FastTokenizer, sequence_length: int) -> str:
    parts = (str(_FORMAT), text.digest, tokenizer_digest(tokenizer), str(sequence_length))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _cut(text: Text, tokenizer: FastTokenizer, sequence_length: int, progress: Progress) -> Blocks:
    # A copy, because truncation and padding are state of the backend that other callers may have set.
    backend = tokenizer.backend_tokenizer
    backend = type(backend).from_str(backend.to_str())
    backend.no_truncation()
    backend.no_padding()
    pieces: list[NDArray[np.int32]] = []
    chunks = _chunks(text.text)
    with progress.step(f"token blocks of {text.label}", len(text.text)) as step:
        while batch := list(islice(chunks, _CHUNKS_AT_ONCE)):
            encodings = backend.encode_batch_fast(batch, add_special_tokens=False)
            pieces.extend(np.asarray(encoding.ids, dtype=np.int32) for encoding in encodings)
            step.advance(sum(map(len, batch)))
    ids = np.concatenate(pieces)
    count = len(ids) // sequence_length
    if count == 0:
        raise DataError(
            f"text {text.label} has {len(ids)} tokens, fewer than one block of {sequence_length}; "
            f"name a longer text or lower data.sequence_length"
        )
    return ids[: count * sequence_length].reshape(count, sequence_length)


def _chunks(text: str) -> Iterator[str]:
    """Pieces that join to the text, cut after a paragraph where there is one, else after a line or a word.

    Bounds the memory of the tokenizer, and lets it work on several pieces at once. Borders depend on the text alone.
    """
    start = 0
    while start < len(text):
        end = start + _CHUNK_CHARACTERS
        if end < len(text):
            for border in ("\n\n", "\n", " "):
                found = text.rfind(border, start, end)
                if found >= start:
                    end = found + len(border)
                    break
        yield text[start:end]
        start = end


def _write(path: Path, blocks: Blocks) -> None:
    """Whole or not at all: a reader never sees half a file."""
    with whole(path) as temporary, temporary.open("wb") as file:
        np.save(file, blocks, allow_pickle=False)
