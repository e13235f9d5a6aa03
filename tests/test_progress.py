"""data/runtime/progress.py: short phases are silent, long ones say what they are and how far."""
import re
import time

import pytest

from data.runtime import progress
from data.runtime.progress import Progress, track


@pytest.fixture
def fast(monkeypatch):
    """The same, ten to fifty times faster."""
    monkeypatch.setattr(progress, "SILENT", 0.1)
    monkeypatch.setattr(progress, "LINE_EVERY", 0.1)
    monkeypatch.setattr(progress, "BAR_EVERY", 0.02)


def wait_until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)


def lines_of(capsys):
    """A function that returns all lines that stderr has had so far."""
    lines = []

    def read():
        lines.extend(capsys.readouterr().err.splitlines())
        return lines
    return read


def test_a_short_phase_is_silent(capsys):
    with Progress("loading"):
        pass
    assert list(track([[1, 2], [3]], "loss")) == [[1, 2], [3]]
    assert capsys.readouterr().err == ""
    assert progress.active == []


def test_a_long_phase_says_what_it_is_and_how_far(fast, capsys):
    read = lines_of(capsys)
    with Progress("valid at step 5"), Progress("answers", 8) as inner:
        wait_until(read)                                        # before anything is done
        inner.update(2, "loss 1.5")
        count = len(read())
        wait_until(lambda: len(read()) > count + 1)
    lines = read()
    assert re.fullmatch(r"valid at step 5, answers 0/8  0\.\d+ s", lines[0])
    assert re.fullmatch(r"valid at step 5, answers 2/8  loss 1\.5  [\d.]+ s, about [\d.]+ s left", lines[-1])
    assert progress.active == []


def test_only_the_innermost_phase_speaks(fast, capsys):
    inside = lines_of(capsys)
    outside = lines_of(capsys)
    with Progress("step", 100, 40) as outer:
        with Progress("valid"):
            outer.update()
            wait_until(lambda: len(inside()) > 2)
        wait_until(outside)
    assert all(line.startswith("valid  ") for line in inside())
    assert outside()[0].startswith("step 41/100  ")


def test_a_phase_that_fails_ends(fast):
    with pytest.raises(ValueError, match="x"), Progress("loading"):
        raise ValueError("x")
    for _ in track([[1]], "loss"):
        with pytest.raises(ZeroDivisionError):
            for _ in track([[1], [2]], "answers"):
                1 / 0
        break
    assert progress.active == []


def test_a_bar_on_a_terminal(fast, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with Progress("answers", 8) as phase:
        phase.update(2, "loss 1.5")
        time.sleep(0.3)
    shown = capsys.readouterr().err
    assert "answers:  25%" in shown and "2/8" in shown and "loss 1.5" in shown
    assert "answers 2/8" not in shown                           # no line beside the bar


def test_other_processes_are_silent(fast, capsys, monkeypatch):
    monkeypatch.setattr(progress.dist_state, "rank", 1)
    with Progress("answers", 8):
        time.sleep(0.25)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("seconds, text", [(0.5, "0.5 s"), (59, "59 s"), (90, "1.5 min"), (7200, "2 h"),
                                           (3.6e6, "1,000 h")])
def test_seconds(seconds, text):
    assert progress.format_seconds(seconds) == text
