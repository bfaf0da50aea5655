"""Damaged and malicious files are refused in little time and memory."""

import io
import os
import time
import zipfile

import numpy as np
import pytest

from icl.files.arrays import locate_array, read_archive, read_array
from icl.files.reading import ContentError, parse_yaml
from icl.files.writing import write_atomically


def test_merges_of_tables_are_refused_at_once():
    """Each table merges the table before it, so PyYAML would make 1500 ** 2 / 2 entries."""
    lines = ["0: &0 {a: }", *(f"{i}: &{i} {{<<: *{i - 1}, {i}: }}" for i in range(1, 1500))]
    start = time.process_time()
    with pytest.raises(ContentError, match=r"it merges a table by `<<`, which `icl` does not support"):
        parse_yaml("\n".join(lines))
    assert time.process_time() - start < 1
    with pytest.raises(ContentError, match="merges"):
        parse_yaml("a: {!!merge x: {b: 1}}")
    assert parse_yaml("{'<<': 1}") == {"<<": 1}


@pytest.mark.parametrize("read", [locate_array, read_array])
def test_a_zip_file_with_the_name_of_an_array_is_damaged(tmp_path, read):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.npy", b"")
    (tmp_path / "step-000000001.npy").write_bytes(buffer.getvalue())
    with pytest.raises(ContentError, match="it is damaged"):
        read(tmp_path / "step-000000001.npy")
    np.save(tmp_path / "good.npy", np.arange(3))
    assert len(read(tmp_path / "good.npy")) == 3


@pytest.mark.parametrize("read", [locate_array, read_array, read_archive])
def test_a_pipe_with_the_name_of_an_array_is_refused_at_once(tmp_path, read):
    os.mkfifo(tmp_path / "a.npy")
    with pytest.raises(ContentError, match="is not a regular file"):
        read(tmp_path / "a.npy")


def test_the_longest_name_of_a_file_can_be_written(tmp_path):
    for name in ("n" * 251 + ".csv", "\U0001f600" * 62 + ".csv"):
        write_atomically(tmp_path / name, b"1")
        assert (tmp_path / name).read_bytes() == b"1"
