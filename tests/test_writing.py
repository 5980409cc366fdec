"""Files that appear whole or not at all."""

import errno
import os
import subprocess
from contextlib import contextmanager

import pytest
from run_cases import small, write_text

from jaxformer import writing
from jaxformer.config import Config
from jaxformer.data import pipeline
from jaxformer.errors import UserError
from jaxformer.training.record import Record


@contextmanager
def disk(path, size):
    """A file system of so many bytes at `path`."""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def test_a_file_is_replaced_when_all_is_written(tmp_path):
    path = tmp_path / "x.html"
    path.write_text("before")
    with writing.whole(path) as partial:
        partial.write_text("after")
        assert path.read_text() == "before"
    assert path.read_text() == "after"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "^--output=x cannot be written: No"),
        (KeyboardInterrupt("by hand"), "^by hand$"),
    ],
)
def test_what_was_there_stays_where_writing_fails(tmp_path, error, told):
    path = tmp_path / "x.html"
    path.write_text("before")
    expected = UserError if isinstance(error, OSError) else type(error)
    told_of = pytest.raises(expected, match=told)
    with told_of, writing.whole(path, "--output=x") as partial:
        partial.write_text("half")
        raise error
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_a_file_is_one_sentence(tmp_path):
    (tmp_path / "f").touch()
    told = pytest.raises(UserError, match=r"f/x cannot be written: Not a directory\.$")
    with told, writing.whole(tmp_path / "f" / "x") as partial:
        partial.write_text("text")


@pytest.mark.parametrize("size", ["4k", "8k", "16k"])  # full at the tokenizer, or at the tokens
def test_a_full_disk_under_the_data_is_one_sentence(tmp_path, size):
    write_text(tmp_path)
    with disk(tmp_path / "disk", size) as folder:
        config = Config.of(small(tmp_path, data__data_dir=str(folder)))
        with pytest.raises(UserError, match=r"No space left.*name another config\.data\.data_dir"):
            pipeline.prepare(config)
    config = Config.of(small(tmp_path, data__data_dir=str(tmp_path / "train.tsv")))
    with pytest.raises(UserError, match=r"Not a directory.*config\.data\.data_dir"):
        pipeline.prepare(config)


def test_a_full_disk_under_the_log_is_one_sentence(tmp_path):
    def fill(record):
        for step in range(1, 1000):
            record.write(step, {"loss": 1.0})

    with disk(tmp_path / "disk", "12k") as folder:
        record = Record(folder, 0)
        with pytest.raises(UserError, match=r"disk cannot be written \(No space left"):
            fill(record)
        record.close()  # what is still in the buffers cannot be written either
        # The log is read, and cannot be written again.
        with pytest.raises(UserError, match=r"metrics.jsonl cannot be written: No space left"):
            Record(folder, 9999)
