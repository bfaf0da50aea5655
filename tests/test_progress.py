"""Progress is a live bar on a terminal, and plain lines elsewhere."""

import io
import re
import sys
import time

from icl import progress


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self) -> bool:
        """Return True."""
        return True


def drawn(monkeypatch, stream, seconds=0.0, disable=False):
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", seconds)
    with progress.progress_bar("evaluation", 3, "checkpoint", disable=disable) as bar:
        for _ in range(3):
            bar.update()
    return stream.getvalue()


def test_a_log_file_gets_plain_lines(monkeypatch):
    lines = drawn(monkeypatch, io.StringIO()).splitlines()
    assert lines[0] == "evaluation 0/3 checkpoints"
    assert lines[-1] == "evaluation 3/3 checkpoints"
    assert not any("\r" in line or "%" in line for line in lines)


def test_a_short_work_is_two_lines_in_a_log_file(monkeypatch):
    lines = drawn(monkeypatch, io.StringIO(), seconds=10.0).splitlines()
    assert lines == ["evaluation 0/3 checkpoints", "evaluation 3/3 checkpoints"]


def test_a_terminal_gets_a_live_bar(monkeypatch):
    text = drawn(monkeypatch, Terminal())
    assert "\r" in text
    assert "100%" in text


def test_nothing_is_shown_of_a_single_unit(monkeypatch):
    assert drawn(monkeypatch, io.StringIO(), disable=True) == ""


def test_a_rate_is_told_when_there_is_one(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.01)
    with progress.progress_bar("training", 3, "step", shows_rate=True, initial=1) as bar:
        time.sleep(0.05)
        bar.set_postfix_str("loss=0.5", refresh=False)
        bar.update(2)
    lines = sys.stderr.getvalue().splitlines()
    assert re.fullmatch(r"training 3/3 steps, loss=0\.5, +\d+\.\d\dstep/s, 00:00 left", lines[-1])
    assert not any("?" in line for line in lines)


def test_items_come_with_a_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert list(progress.with_progress("abc", "reading", "run")) == ["a", "b", "c"]
    assert sys.stderr.getvalue().splitlines()[-1] == "reading 3/3 runs"
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert list(progress.with_progress("a", "reading", "run")) == ["a"]
    assert sys.stderr.getvalue() == ""
