"""Files of tensors that appear whole, readable for everyone who may read their folder."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from rank_search.atomic import whole

_DTYPES = {torch.float64: "F64", torch.float32: "F32"}
"""What a stream can hold, the widest first, as the format orders them."""

Shapes = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Name → dtype and shape."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, whole or not at all.

    Raises:
        OSError, SafetensorError: it cannot be written; nothing is left behind and an older file is untouched.
    """
    with whole(path) as temporary:
        save_file(dict(tensors), temporary, metadata=dict(metadata))
        _let_others_read(temporary)


class TensorStream:
    """A safetensors file that is being written, tensor by tensor in any order."""

    def __init__(self, file: BinaryIO, shapes: Shapes, starts: Mapping[str, int]) -> None:
        self._file = file
        self._shapes = shapes
        self._starts = starts
        self._missing = set(shapes)

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a tensor, on any device, in its place.

        Raises:
            OSError: as the system gave it.
        """
        dtype, shape = self._shapes[name]
        assert tensor.dtype == dtype, name
        assert tuple(tensor.shape) == shape, name
        self._missing.remove(name)
        self._file.seek(self._starts[name])
        self._file.write(tensor.detach().cpu().contiguous().numpy().reshape(-1).view(np.uint8).data)

    def check_complete(self) -> None:
        """Every tensor must have been written by now."""
        assert not self._missing, sorted(self._missing)


@contextmanager
def streamed_tensors(path: Path, shapes: Shapes, metadata: Mapping[str, str]) -> Iterator[TensorStream]:
    """A safetensors file, byte for byte as :func:`write_tensors` makes it, but never whole in memory.

    Its header follows from the shapes alone, so that it is written first. The disk space is taken at once, too: a
    disk that is too full says so before anything is computed. At the block's end the file takes its name.

    Raises:
        OSError: as the system gave it; nothing is left behind and an older file is untouched.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    starts: dict[str, int] = {}
    end = 0
    widths = list(_DTYPES)
    for name in sorted(shapes, key=lambda name: (widths.index(shapes[name][0]), name)):
        dtype, shape = shapes[name]
        starts[name], end = end, end + dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [starts[name], end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    first = 8 + len(text)
    with whole(path) as temporary:
        with temporary.open("xb") as file:
            os.posix_fallocate(file.fileno(), 0, first + end)
            file.write(len(text).to_bytes(8, "little") + text)
            stream = TensorStream(file, shapes, {name: first + start for name, start in starts.items()})
            yield stream
        stream.check_complete()
        _let_others_read(temporary)


def _let_others_read(file: Path) -> None:
    # Who goes on with a file may be another user than who made it, whatever the umask of that one.
    file.chmod(file.parent.stat().st_mode & 0o644)
