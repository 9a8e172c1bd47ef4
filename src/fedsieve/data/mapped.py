"""Examples in files of NumPy that are too large for memory: rows are read when they are used.

A ``FileTensor`` is a tensor to whoever asks for its shape or takes rows of it. Taking rows by ``index_select``, as
``Data.subset`` does, and changing the type of numbers, read nothing; an index or a slice, as of a batch, reads those
rows. Any other operation reads it all first. Other processes are sent where the files are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fedsieve.types import InputError

CHUNK = 1 << 20
"""The bytes that are read together of what is read whole."""
READ = "name a .npy file of numbers as numpy.save writes it"


@dataclass(frozen=True)
class ArrayFile:
    """Where an array [n, ...] begins in a file, and what it is."""

    path: str
    offset: int
    shape: tuple[int, ...]
    dtype: str

    def array(self) -> NDArray[Any]:
        """Return the array, mapped, read-only."""
        return _mapped(self)


class FileTensor(Tensor):
    """Rows [n, ...] of the arrays in some files, one after the other: all, or those at ``rows``, int64 [n]."""

    files: tuple[ArrayFile, ...]
    rows: Tensor | None

    @staticmethod
    def __new__(
        cls: type[FileTensor],
        files: Sequence[ArrayFile],
        rows: Tensor | None = None,
        kind: torch.dtype | None = None,
    ) -> FileTensor:
        """Make one of files alike but for their numbers of rows; ``kind`` is the files' own where it is None."""
        first = files[0]
        n = sum(file.shape[0] for file in files) if rows is None else len(rows)
        kind = kind or torch.from_numpy(np.empty(0, first.dtype)).dtype
        tensor = Tensor._make_wrapper_subclass(cls, (n, *first.shape[1:]), dtype=kind)
        tensor.files, tensor.rows = tuple(files), rows
        return tensor

    @classmethod
    def open(cls, paths: Sequence[Path]) -> FileTensor:
        """Return the arrays of ``.npy`` files, one after the other. Raises InputError."""
        files = [_header(path) for path in paths]
        for file in files:
            if (file.shape[1:], file.dtype) != (files[0].shape[1:], files[0].dtype):
                raise InputError(
                    f"{file.path} holds {file.dtype} {list(file.shape[1:])}, {files[0].path} {files[0].dtype} "
                    f"{list(files[0].shape[1:])}: arrays of one folder must be alike"
                )
        return cls(files)

    @classmethod
    def of(cls, array: np.memmap[Any, Any]) -> FileTensor | None:
        """Return what a mapped array shows of its file; None where that is no whole rows, or no file."""
        root = array
        while isinstance(root.base, np.memmap):
            root = root.base
        path: Any = root.filename
        if path is None or not array.flags.c_contiguous or not array.ndim or array.dtype.kind not in "fiub":
            return None
        offset = root.offset + array.ctypes.data - root.ctypes.data
        return cls([ArrayFile(str(path), offset, array.shape, array.dtype.str)])

    def read(self, rows: slice | Tensor | None = None) -> Tensor:
        """Return some of the rows, or all, in memory."""
        index = self.rows
        if rows is not None:
            index = torch.arange(len(self))[rows] if index is None else index[rows]
        array = np.concatenate([file.array() for file in self.files]) if index is None else self._at(index)
        return torch.from_numpy(array).to(self.dtype)

    def _at(self, index: Tensor) -> NDArray[Any]:
        """Return the files' rows at ``index``, int64 [m]."""
        if len(self.files) == 1:
            return self.files[0].array()[index.numpy()]  # type: ignore[no-any-return]
        ends = np.cumsum([file.shape[0] for file in self.files])
        part = np.searchsorted(ends, index.numpy(), side="right")
        out = np.empty((len(index), *self.shape[1:]), self.files[0].dtype)
        for i in np.unique(part):
            here = part == i
            out[here] = self.files[i].array()[index.numpy()[here] - (ends[i - 1] if i else 0)]
        return out

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Take rows, or read all and compute."""
        aten, first = torch.ops.aten, args[0] if args else None
        if isinstance(first, FileTensor):
            match func, args[1:]:
                case (aten.detach.default | aten.alias.default, _):
                    return cls(first.files, first.rows, first.dtype)
                case (aten._to_copy.default, ()) if [*kwargs] == ["dtype"]:
                    return cls(first.files, first.rows, kwargs["dtype"])
                case (aten.index_select.default, (0, index)):
                    return cls(first.files, index.clone() if first.rows is None else first.rows[index], first.dtype)
                case (aten.index.Tensor, ([Tensor() as index],)) if not index.is_floating_point():
                    return first.read(index)
                case (aten.slice.Tensor, (0, start, stop)):
                    return first.read(slice(start, stop))
                case (aten.select.int, (0, place)):
                    return first.read(torch.tensor([place]))[0]
        tensors = [tree_map_only(FileTensor, FileTensor.read, part) for part in (args, kwargs or {})]
        return func(*tensors[0], **tensors[1])

    def share_memory_(self) -> FileTensor:
        """Return it: files are everybody's."""
        return self

    def __deepcopy__(self, memo: Any) -> FileTensor:
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        return FileTensor, (self.files, self.rows, self.dtype)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"FileTensor({list(self.shape)}, {self.dtype}, {self.files[0].path}{', ...' * (len(self.files) > 1)})"


def chunks(x: Tensor) -> Iterator[Tensor]:
    """Yield the rows of a tensor, some at a time: what is in files is never in memory as a whole."""
    rows = max(1, CHUNK // max(1, x[:1].nbytes))
    for i in range(0, len(x), rows):
        yield x[i : i + rows]


def _header(path: Path) -> ArrayFile:
    """Return what a ``.npy`` file holds. Raises InputError."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path} cannot be mapped ({' '.join(str(error).split())}): {READ}") from None
    if not isinstance(array, np.memmap) or not array.ndim or array.dtype.kind not in "fiub":
        raise InputError(f"{path} holds no rows of numbers: {READ}")
    if not array.flags.c_contiguous or not array.dtype.isnative:
        raise InputError(f"{path} is in Fortran's order, or another machine's: write it by numpy.ascontiguousarray")
    return ArrayFile(str(path.absolute()), array.offset, array.shape, array.dtype.str)


@lru_cache(maxsize=1024)
def _mapped(file: ArrayFile) -> NDArray[Any]:
    try:
        return np.memmap(file.path, file.dtype, "r", file.offset, file.shape)
    except (OSError, ValueError) as error:
        raise InputError(f"{file.path} is not as it was ({error}): put it back") from None
