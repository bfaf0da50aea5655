"""Output streams of `icl` that are closed, full or read by a program that has ended, and streams whose encoding lacks a character."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from icl.cli import main


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["runs"], ["sweep", "--help"]])
def test_a_command_that_only_prints_succeeds_if_its_reader_has_ended(capfd, monkeypatch, words):
    reader, writer = os.pipe()
    os.close(reader)  # as in `icl runs | true`
    with os.fdopen(writer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert main(words) == 0
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("words", [["--help"], ["runs"]])
def test_output_to_a_full_disk_is_one_sentence(capfd, monkeypatch, words):
    with Path("/dev/full").open("w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert main(words) == 1
    assert capfd.readouterr() == ("", "icl: No space left on device: a file.\n")


PROGRAM = """
import sys
from icl.cli.entry import _open_streams
_open_streams()
with open(sys.argv[1], "w") as file:
    print("M = \\u221e", file=file if len(sys.argv) > 2 else sys.stdout)
    print("to nobody", file=sys.stderr)
    assert file.fileno() > 2
"""


def test_closed_streams_print_nowhere(tmp_path):
    """The file would get the number of a closed stream, so that messages of libraries would be written into it."""
    line = f'exec "$0" -c "$1" {tmp_path}/file to-file <&- >&- 2>&-'
    assert subprocess.run(["bash", "-c", line, sys.executable, PROGRAM]).returncode == 0
    assert (tmp_path / "file").read_text(encoding="utf-8") == "M = ∞\n"


def test_a_character_that_the_terminal_lacks_becomes_a_question_mark(tmp_path):
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    words = [sys.executable, "-c", PROGRAM, str(tmp_path / "file")]
    ran = subprocess.run(words, capture_output=True, env=environment)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, b"M = ?\n", b"to nobody\n")
