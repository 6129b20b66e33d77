"""Token ids, positions and block tables on the wire: little-endian int32."""

from __future__ import annotations

import array
import sys
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]


def pack_int32(values: Iterable[int] | npt.NDArray[np.integer]) -> bytes:
    if isinstance(values, np.ndarray):
        return values.astype("<i4", copy=False).tobytes()
    packed = array.array("i", values)  # several times faster than numpy for the few tokens of a step
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_int32(data: bytes) -> Int32Array:
    return np.frombuffer(data, dtype="<i4")


def unpack_ids(data: bytes) -> list[int]:
    """As `unpack_int32`, in a list: several times faster for the few tokens of a step."""
    values = array.array("i", data)
    if sys.byteorder == "big":
        values.byteswap()
    return values.tolist()
