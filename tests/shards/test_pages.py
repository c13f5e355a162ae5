"""Pages of a column that are read without Arrow's reader: what Arrow reads, or nothing."""

import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_shards import LEVELS, photos, write_set

from pipeline.shards import row_groups
from pipeline.shards.errors import ShardError
from pipeline.shards.pages import new_array, read_page
from pipeline.shards.row_groups import RowGroups, read_group

WIDTH, ROWS = 900, 70


def column(rows: int = ROWS) -> pa.Table:
    values = np.random.default_rng(0).integers(0, 9, (rows, WIDTH)).astype(np.uint8)
    array = pa.FixedSizeBinaryArray.from_buffers(pa.binary(WIDTH), rows, [None, pa.py_buffer(values)])
    return pa.table([array], schema=pa.schema([pa.field("values", pa.binary(WIDTH), nullable=False)]))


def read(path, table, **written):
    """What is read of each row group of 32 rows, and what Arrow reads."""
    pq.write_table(table, path, row_group_size=32, **{"use_dictionary": False, "write_page_checksum": True} | written)
    footer, found, wanted = pq.read_metadata(path), [], []
    with open(path, "rb") as file:
        for number in range(footer.num_row_groups):
            group = footer.row_group(number)
            found.append(read_page(file.fileno(), group.column(0), group.num_rows * WIDTH))
            arrow = pq.ParquetFile(path).read_row_group(number).column(0).to_pylist()
            wanted.append(np.frombuffer(b"".join(arrow), np.uint8))
    return found, wanted


@pytest.mark.parametrize("codec", ["none", "zstd", "lz4"])
def test_a_page_holds_what_arrow_reads(tmp_path, codec):
    found, wanted = read(tmp_path / "file.parquet", column(), compression=codec)
    assert len(found) == 3
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    "written",
    [
        {"compression": "gzip"},
        {"compression": "none", "use_dictionary": True},
        {"compression": "none", "data_page_version": "2.0"},
        {"compression": "none", "data_page_size": 1024, "write_batch_size": 4},
        {"compression": "zstd", "data_page_size": 1024, "write_batch_size": 4},
    ],
)
def test_what_is_stored_in_another_way_is_left_to_arrow(tmp_path, written):
    found, _ = read(tmp_path / "file.parquet", column(), **written)
    assert found == [None] * 3


def test_a_column_with_nulls_is_left_to_arrow(tmp_path):
    table = pa.table({"values": pa.array([b"x" * WIDTH, None] * 16, pa.binary(WIDTH))})
    assert read_nothing(tmp_path / "file.parquet", table)


def read_nothing(path, table) -> bool:
    pq.write_table(table, path, compression="none", use_dictionary=False)
    with open(path, "rb") as file:
        return read_page(file.fileno(), pq.read_metadata(path).row_group(0).column(0), 32 * WIDTH) is None


def test_a_file_that_ends_too_early_is_an_error(tmp_path):
    path = tmp_path / "file.parquet"
    pq.write_table(column(), path, compression="none", use_dictionary=False)
    group = pq.read_metadata(path).row_group(0)
    os.truncate(path, 20_000)
    with open(path, "rb") as file, pytest.raises(OSError, match="ends too early"):
        read_page(file.fileno(), group.column(0), group.num_rows * WIDTH)


def test_memory_of_a_batch_can_be_written_and_is_aligned():
    values = new_array((5, 3), np.dtype("<i2"))
    values[...] = 7
    assert values.shape == (5, 3) and values.dtype == np.int16 and values.ctypes.data % 64 == 0
    assert new_array((0, 3), np.dtype("<i2")).shape == (0, 3)


@pytest.mark.parametrize("compression", ["small", "fast"])
def test_a_row_group_is_the_same_whenever_it_is_read(tmp_path, monkeypatch, compression):
    """By Arrow with its checksums first, then without: and damage done in between is found."""
    shards = write_set(tmp_path / "set", photos(24), compression=compression)
    by_arrow = []
    real = row_groups._read_columns
    monkeypatch.setattr(row_groups, "_read_columns", lambda *given: by_arrow.append(given[-1]) or real(*given))
    levels = range(1, LEVELS + 1)
    name, group, _ = RowGroups(shards, "train")[0]
    first, again = (read_group(shards, name, group, levels) for _ in range(2))
    assert [len(columns) for columns in by_arrow] == [2 + LEVELS, 2]
    for one, other in zip((*first[:2], *first[2].values()), (*again[:2], *again[2].values()), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    path = tmp_path / "set" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 4] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ShardError, match="is damaged"):
        [read_group(shards, name, group, levels) for name, group, _ in RowGroups(shards, "train")]
