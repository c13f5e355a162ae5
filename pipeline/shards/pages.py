"""Columns of a local Parquet file that are one page, read without Arrow's reader: every byte is copied once less.

The columns of coefficients have a fixed width, no nulls and no dictionary. Arrow writes up to 1,024 such rows of a row
group as one page: a header, then the rows, as they are or compressed as a whole.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

# Parquet's codecs, as pyarrow prints them, and pyarrow's names of them. Its "LZ4" is LZ4_RAW, which alone it writes.
_CODECS = {"ZSTD": "zstd", "LZ4": "lz4_raw"}


def read_page(descriptor: int, chunk: pq.ColumnChunkMetaData, size: int) -> np.ndarray | None:
    """Read the values of one column in one row group. Checksums are not verified.

    Args:
        descriptor: Descriptor of the open file.
        chunk: The column's entry in the footer.
        size: Bytes of all values.

    Returns:
        The values as bytes (size,), uint8; None if they are stored in another way than the module says.

    Raises:
        OSError: The file cannot be read or ends too early, or the data is damaged.
    """
    plain = chunk.compression == "UNCOMPRESSED"
    header = np.empty(max(chunk.total_uncompressed_size - size, 0), np.uint8)
    stored = chunk.total_compressed_size - len(header)
    if not (plain or chunk.compression in _CODECS) or chunk.has_dictionary_page or stored <= 0:
        return None
    content = new_array((stored,), np.dtype(np.uint8))
    _read_into(descriptor, [header, content], chunk.data_page_offset)
    if not header.tobytes().startswith(_first_bytes(size, stored)):
        return None
    if plain:
        return content
    return np.frombuffer(pa.Codec(_CODECS[chunk.compression]).decompress(content, size), np.uint8)


def new_array(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """As `numpy.empty`, in Arrow's memory: it keeps what was freed, where numpy's is taken from the system every time."""
    size = math.prod(shape) * dtype.itemsize
    return np.frombuffer(pa.allocate_buffer(size), dtype).reshape(shape)


def concatenated(parts: Sequence[np.ndarray]) -> np.ndarray:
    """As `numpy.concatenate`, in Arrow's memory. Not with torch, which would start its own threads in each thread."""
    values = new_array((sum(map(len, parts)), *parts[0].shape[1:]), parts[0].dtype)
    return np.concatenate(parts, out=values)


def _first_bytes(size: int, stored: int) -> bytes:
    """How the header of a data page begins: Thrift's compact form of its kind, and of its bytes before and after compression."""
    return b"\x15\x00\x15" + _varint(2 * size) + b"\x15" + _varint(2 * stored) + b"\x15"


def _varint(number: int) -> bytes:
    found = bytearray()
    while number >= 128:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])


def _read_into(descriptor: int, arrays: Sequence[np.ndarray], place: int) -> None:
    """Fill arrays of bytes from a place in a file on. Raises OSError, also if the file is too short."""
    wanted = [array.data for array in arrays if len(array)]
    while wanted:
        count = os.preadv(descriptor, wanted, place)
        if count == 0:
            raise OSError("the file ends too early")
        place += count
        while wanted and count >= len(wanted[0]):
            count -= len(wanted.pop(0))
        if wanted:
            wanted[0] = wanted[0][count:]
