"""A shard that cannot be read for a while costs a pause; one that stays away ends the run, by its name."""

import copy
import logging
import threading

import pytest
import torch
from tiny_shards import photos, write_set

from pipeline.shards import row_groups
from pipeline.shards.batches import sequential
from pipeline.shards.errors import ShardError, UnreadableError
from pipeline.shards.reader import Reader
from pipeline.shards.row_groups import read_patiently
from pipeline.workers.unreadable import NOTE, forget, note, still_unreadable

FILE = "train-00000.parquet"


@pytest.fixture
def shards(tmp_path, monkeypatch):
    monkeypatch.setattr(row_groups, "PAUSES", (0.05, 0.1, 0.2))
    monkeypatch.setattr(row_groups, "_warned", set())
    return write_set(tmp_path / "set", photos(30))  # 20 to train on


def rows_of(shards):
    batches = Reader(shards, "train", batch=5, window=shards.image_size, flip=False).epoch(0)
    return torch.cat([batch.rows[batch.weight > 0] for batch in batches]).tolist()


def test_a_file_that_comes_back_costs_no_row_and_one_warning(shards, tmp_path, caplog):
    expected = rows_of(shards)
    path, away = tmp_path / "set" / FILE, tmp_path / "away"
    path.rename(away)
    threading.Timer(0.1, lambda: away.rename(path)).start()
    with caplog.at_level(logging.WARNING):
        assert rows_of(shards) == expected
    assert len(expected) == len(set(expected)) == 20
    (line,) = caplog.messages
    assert f"{path} is missing" in line and "retrying for" in line


def test_reading_in_order_is_retried_where_that_is_asked_for(shards, tmp_path):
    path, away = tmp_path / "set" / FILE, tmp_path / "away"
    (expected,) = (batch.rows.tolist() for batch in sequential(shards, "train", 20, window=shards.image_size))
    path.rename(away)
    with pytest.raises(ShardError, match="is missing") as caught:
        next(sequential(shards, "train", 5, window=shards.image_size))
    assert not isinstance(caught.value, UnreadableError)
    threading.Timer(0.1, lambda: away.rename(path)).start()
    (found,) = (b.rows.tolist() for b in sequential(shards, "train", 20, window=shards.image_size, patiently=True))
    assert found == expected
    path.unlink()
    with pytest.raises(UnreadableError, match="is missing"):
        next(sequential(shards, "train", 5, window=shards.image_size, patiently=True))


def test_a_file_that_stays_away_is_an_error_that_names_it(shards, tmp_path):
    path = tmp_path / "set" / FILE
    content = path.read_bytes()
    path.unlink()
    with pytest.raises(ShardError, match=rf"{path} is missing.*wavemim verify") as caught:
        rows_of(shards)
    error = copy.copy(caught.value)  # as pickle does it, and with it Ray
    assert str(error) == str(caught.value) and "\n" not in str(error)

    stage = tmp_path / "stage"
    stage.mkdir()
    assert still_unreadable(stage, shards.folder.url) == ""
    note(stage, error)
    assert f"{path} is missing" in still_unreadable(stage, shards.folder.url)
    assert "restore the file and run the same command again" in still_unreadable(stage, shards.folder.url)
    path.write_bytes(content)
    assert still_unreadable(stage, shards.folder.url) == ""
    assert not (stage / NOTE).exists()
    note(stage, error)
    forget(stage)
    assert not (stage / NOTE).exists()


def test_the_end_of_training_does_not_wait_for_another_try(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(row_groups, "PAUSES", (100.0,))
    (tmp_path / "set" / FILE).unlink()
    ended = threading.Event()
    threading.Timer(0.1, ended.set).start()
    with pytest.raises(UnreadableError):
        read_patiently(shards, FILE, 0, [1], ended)


def test_a_store_that_is_away_for_a_while_is_tried_again(shards, monkeypatch, caplog, tmp_path):
    from pipeline.storage.object_stores import StorageError

    expected, real, tries = rows_of(shards), row_groups._footer, []

    def footer(*arguments):
        tries.append(1)
        if len(tries) <= 2:
            raise StorageError("s3://b/set: the store does not answer")
        return real(*arguments)

    monkeypatch.setattr(row_groups, "_footer", footer)
    assert rows_of(shards) == expected
    assert "the store does not answer" in caplog.text and "retrying for" in caplog.text

    monkeypatch.setattr(row_groups, "_footer", lambda *_: (_ for _ in ()).throw(StorageError("s3://b/set: away")))
    with pytest.raises(UnreadableError, match="away") as caught:
        rows_of(shards)
    note(tmp_path, caught.value)
    assert "s3://b/set: away" in still_unreadable(tmp_path, shards.folder.url)
