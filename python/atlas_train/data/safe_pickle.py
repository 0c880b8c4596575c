"""Reads pickles of uint8 arrays in plain containers, and nothing else.

A pickle names functions and calls them, so an ordinary load runs whatever a file asks for. Here the three names that
an array needs lead to inert stand-ins, and every other name is refused: no function of NumPy runs on the file's word.
"""

from __future__ import annotations

import io
import math
import os
import pickle
from typing import Any

import numpy as np

from ..options import plain


class _DType:
    """Stands for numpy.dtype: keeps the arguments."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        pass  # byte order, fields and flags, without meaning for single bytes


class _Array:
    """Stands for numpy.ndarray: keeps the state."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _reconstruct(*_: Any) -> _Array:
    return _Array()


_ALLOWED = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _DType,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,  # the name since NumPy 2
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _ALLOWED[module, name]


def loads(data: bytes, path: str | os.PathLike[str]) -> Any:
    """The object in a pickle; strings of Python 2 become bytes, arrays become something for `as_uint8`.

    Raises ValueError, naming `path`, when the pickle asks for anything else or is damaged.
    """
    try:
        return _Unpickler(io.BytesIO(data), encoding="bytes").load()
    except Exception as error:  # a damaged pickle raises nearly anything
        raise ValueError(
            f"{plain(path)} was refused: {error!r}. Only uint8 arrays and plain containers are read from a pickle, "
            "since other content could run code; get the file from its original source"
        ) from error


def as_uint8(array: Any) -> np.ndarray:
    """The uint8 array that a stand-in describes. Raises ValueError for another dtype, order or size."""
    if not isinstance(array, _Array):
        raise ValueError(f"expected an array, found {type(array).__name__}")
    _, shape, dtype, fortran_order, data = array.state
    if not isinstance(dtype, _DType) or dtype.args[:1] not in ((b"u1",), ("u1",)) or fortran_order:
        raise ValueError("expected a uint8 array in C order")
    if len(data) != math.prod(shape):
        raise ValueError(f"expected {math.prod(shape)} bytes for shape {shape}, found {len(data)}")
    result: np.ndarray = np.frombuffer(data, dtype=np.uint8).reshape(shape)
    return result
