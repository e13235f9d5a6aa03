"""The tools of tests/torture.py find what they are for; the short torture finds nothing."""
import errno
import os
import pathlib
import random
import signal
import subprocess
import sys

import pytest
from damage import damage
from forked import Operations, Outcome, call, judge, kill, refuse, tear
from torture_world import difference, snapshot

ROOT = pathlib.Path(__file__).resolve().parent.parent


def write_three(size=1000):
    """Three operations in the working directory: a folder, a file, a new name."""
    os.mkdir("a")
    with open("a/b", "wb") as f:
        f.write(b"x" * size)
    os.replace("a/b", "a/c")
    return 0


@pytest.mark.parametrize("n, left", [(1, []), (2, ["a"]), (3, ["a", "a/b"]), (4, ["a", "a/c"])])
def test_a_child_is_killed_before_its_nth_operation(tmp_path, n, left):
    outcome = call(write_three, tmp_path, Operations(n, kill).install)
    assert outcome.code == (-signal.SIGKILL if n < 4 else 0)
    assert sorted(snapshot(tmp_path)) == left


def test_a_write_is_torn_and_a_disk_is_full(tmp_path):
    torn = Operations(2, tear(300, signal.SIG_DFL)).install
    assert call(write_three, tmp_path, torn).code == -signal.SIGXFSZ
    assert (tmp_path / "a" / "b").stat().st_size == 300
    full = Operations(1)
    full.effect = refuse(full, errno.ENOSPC, ("open", "os.mkdir"))
    assert "No space left" in call(write_three, tmp_path, full.install).err


def test_judge():
    sentence = "cpu\ntrain.py: data.jsonl:3: no row"
    assert judge(Outcome(0, "", "")) is None
    assert judge(Outcome(65, "", sentence)) is None
    assert judge(Outcome(65, "", sentence), (0,)) == "exit code 65: 'train.py: data.jsonl:3: no row'"
    assert "without a sentence" in judge(Outcome(65, "", "cpu"))
    assert "not printable" in judge(Outcome(2, "", "train.py: \x1b[31m"))
    assert judge(Outcome(-11, "", "")) == "exit code -11: ''"
    assert "does not stop" in judge(Outcome(-signal.SIGKILL, "", ""))
    raised = call(lambda: ROOT.nothing, ROOT)
    assert judge(raised).startswith("traceback in")
    assert judge(raised, own_code="test_torture.py") is None


def test_a_child_that_works_on_is_stopped():
    def endless():
        signal.setitimer(signal.ITIMER_REAL, 0.2)           # stands for the limit of CPU seconds
        signal.signal(signal.SIGALRM, signal.getsignal(signal.SIGXCPU))
        while True:
            pass
    assert call(endless, ROOT).code == -signal.SIGTERM


def test_difference(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2.0, "seconds": 1.0}\n')
    before = snapshot(tmp_path)
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2.0, "seconds": 9.0}\n')
    assert difference(snapshot(tmp_path), before) is None
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2.5, "seconds": 1.0}\n')
    (tmp_path / ".config.json.1234.tmp").write_text("")
    assert difference(snapshot(tmp_path), before) == (
        "stray .config.json.N.tmp; log.jsonl is another than after an undisturbed run: loss: 2.5 for 2.0")


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.txt", "a.safetensors", "a.pt"])
def test_damage_changes_one_file(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b'{"a": [1, "b"], "c": 2.5}\n' * (1 if name == "a.json" else 3))
    content = path.read_bytes()
    changed = 0
    for seed in range(60):
        fault = damage(path, random.Random(seed))
        copy = tmp_path / str(seed) / name
        copy.parent.mkdir()
        copy.write_bytes(content)
        fault.do(copy)
        assert path.read_bytes() == content
        changed += not copy.is_file() or copy.read_bytes() != content
    assert changed > 50


@pytest.mark.slow
def test_short_torture():
    command = [sys.executable, "tests/torture.py", "--short"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| rewards |" in done.stdout
