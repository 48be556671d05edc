"""The progress display: a bar on a terminal, else lines, both with the time left."""

import os
import pty
import select
import subprocess
import sys

import pytest

from hpcres import progress
from hpcres.progress import progress_display


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_lines_come_every_few_seconds_and_at_the_end_and_say_the_time_left(clock, capfd):
    with progress_display("counting", 40) as show:
        for done in range(1, 41):
            clock[0] += 1
            show(done)
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == "counting: 5 of 40, 35 s left"
    assert lines[-1] == "counting: 40 of 40"
    assert len(lines) == 8


def test_a_total_that_becomes_known_later_and_words_in_place_of_numbers(clock, capfd):
    with progress_display("solving") as show:
        clock[0] += 10
        show(3)
        clock[0] += 10
        show(5, "half of the way", total=10)
    assert capfd.readouterr().err.splitlines() == ["solving: 3", "solving: half of the way, 25 s left"]


def test_nothing_is_shown_where_nobody_asked(clock, capfd):
    with progress_display("counting", 1, shown=False) as show:
        clock[0] += 100
        show(1)
    assert capfd.readouterr() == ("", "")


def test_a_terminal_has_a_bar_with_the_time_left_and_a_table_above_it():
    code = (
        "import time; from rich.table import Table\n"
        "from hpcres.progress import progress_display\n"
        "table = Table('step', 'loss'); table.add_row('7', '0.25')\n"
        "with progress_display('training', 8) as show:\n"
        "    for done in range(1, 8):\n"
        "        show(done, above=table); time.sleep(0.1)\n"
    )
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen([sys.executable, "-c", code], stderr=theirs, env=environment)
    os.close(theirs)
    text = b""
    while select.select([ours], [], [], 60)[0]:
        try:
            if not (more := os.read(ours, 65536)):
                break
        except OSError:  # the other end of a pseudo-terminal is closed
            break
        text += more
    os.close(ours)
    assert process.wait() == 0
    for words in (b"training", b"of 8", b"left", b"0.25"):
        assert words in text
