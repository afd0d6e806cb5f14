"""Read a pickle of arrays and plain containers without letting it run anything.

A pickle is a program that may call whatever it can name. Here it can name only what numpy's arrays need, and each of
those is a stand-in that keeps its arguments and does nothing; numpy sees them after they were checked. (The real
`numpy.dtype` would do harm too: its `__setstate__` believes any flags, and an object array with the wrong ones takes
bytes of the file for addresses.)
"""

import io
import math
import pickle
import re
from typing import Any, ClassVar

import numpy as np

from fastcifar.errors import DataError


class _Inert:
    """What a refused call leaves behind: the arguments, nothing done with them."""

    __slots__ = ("args", "state")

    def __init__(self, *args):
        self.args = args
        self.state: tuple = ()

    def __setstate__(self, state):
        self.state = state


class _Array(_Inert):
    """numpy.ndarray, and the function that numpy's pickles (protocols 0-4) build an empty one with."""

    __slots__ = ()

    def to_numpy(self) -> np.ndarray:
        _version, shape, dtype, fortran, raw = self.state
        return _build_array(raw, dtype, shape, "F" if fortran else "C")


class _FlatArray(_Inert):
    """numpy's `_frombuffer`: how protocol 5 writes an array."""

    __slots__ = ()

    def to_numpy(self) -> np.ndarray:
        return _build_array(*self.args)


class _Dtype(_Inert):
    __slots__ = ()

    def to_numpy(self) -> np.dtype:
        code = self.args[0]
        order, *structure = self.state[1:5] if self.state else ("=", None, None, None)
        if not re.fullmatch("b1|[iuf][1248]", code) or order not in ("<", ">", "=", "|") or any(structure):
            raise ValueError(f"an array of type {code!r}")
        return np.dtype(code).newbyteorder(order)


class _Encode(_Inert):
    """codecs.encode: how protocol 2 writes bytes, as text in latin1."""

    __slots__ = ()

    def to_bytes(self) -> bytes:
        text, encoding = self.args
        if encoding not in ("latin1", "latin-1"):
            raise ValueError(f"bytes encoded as {encoding!r}")
        return text.encode("latin1")


def _build_array(raw, dtype, shape, order) -> np.ndarray:
    if isinstance(raw, _Encode):
        raw = raw.to_bytes()
    elif isinstance(raw, str):  # the bytes of a Python 2 pickle
        raw = raw.encode("latin1")
    if not isinstance(dtype, _Dtype) or not isinstance(raw, bytes | bytearray):
        raise ValueError("an array of objects")
    shape = tuple(shape)
    if any(type(n) is not int or n < 0 for n in shape) or order not in ("C", "F"):
        raise ValueError(f"an array of shape {shape}")
    kind = dtype.to_numpy()
    if math.prod(shape) * kind.itemsize != len(raw):
        raise ValueError(f"{len(raw):,} bytes for an array of shape {shape} and type {kind}")
    return np.frombuffer(raw, kind).reshape(shape, order=order)


_ALLOWED = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _Encode,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _FlatArray for core in ("core", "_core")},
}


class _Refused(Exception):
    pass


# The unpickler written in Python, not the one in C: its memo is a dict, where five bytes ask C's for 64 GB. Reading a
# batch of CIFAR-10 takes 24 ms instead of 19.
_PythonUnpickler: Any = pickle._Unpickler


class _Unpickler(_PythonUnpickler):
    def load_bytearray8(self):
        # The inherited one makes room for as many bytes as the file claims before it looks whether they are there.
        self.append(self.read(int.from_bytes(self.read(8), "little")))

    dispatch: ClassVar[dict] = _PythonUnpickler.dispatch | {pickle.BYTEARRAY8[0]: load_bytearray8}

    def find_class(self, module, name):
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise _Refused(f"{module}.{name}") from None

    def persistent_load(self, pid):
        raise _Refused(f"persistent object {pid!r}")


def read_dict(raw: bytes, where: str) -> dict[str, object]:
    """The dictionary that the pickle `raw` holds, keys as str, numpy arrays among its values read-only.

    Python 2 and Python 3 pickles of every protocol are read. `where` names the file in the errors.

    Raises DataError: the pickle is damaged, is no dictionary, or asks for anything but arrays and plain containers.
    """
    try:
        content = _Unpickler(io.BytesIO(raw), encoding="latin1").load()
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__}, not a dictionary")
        return {str(_text(key)): _value(value) for key, value in content.items()}
    except _Refused as refused:
        raise DataError(
            f"{where} is a pickle that asks for {refused}. CIFAR's files need nothing but arrays and lists, so this is "
            "not one of them, and it may be an attack. It was refused; nothing in it was run."
        ) from None
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to mean, a dozen types at least
        reason = f"{type(error).__name__}: {error}"[:200]
        raise DataError(f"{where} is damaged or no CIFAR file: its pickle cannot be read ({reason}).") from error


def _value(value: object) -> object:
    if isinstance(value, _Array | _FlatArray):
        return value.to_numpy()
    if isinstance(value, list):
        return [_text(item) for item in value]
    return _text(value)


def _text(value: object) -> object:
    """Python 2 knew one kind of string: whichever way its pickles come out, as str."""
    if isinstance(value, _Encode):
        value = value.to_bytes()
    return value.decode("latin1") if isinstance(value, bytes) else value
