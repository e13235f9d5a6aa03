"""tests/forked.py: one command in a forked child, disturbed on purpose; the verdict on how it ended.

    call(command(argv), cwd, prepare, stop) -> Outcome(exit code, stdout, stderr)

The parent has imported everything and never ran a backward pass, so that a fork is a fresh process in
milliseconds. A child is asked to stop (SIGTERM) after CPU seconds of work, killed 5 later, and after PATIENCE
seconds if it sleeps. Its memory is bounded.

`Operations` counts what a process does to files below its working directory (creates, renames, removes,
fsyncs), by an audit hook of Python, and has an effect before the n-th: kill, tear, refuse, or any function.

Public: call, command, must, judge, Outcome, Operations, kill, tear, refuse, EXIT_CODES
"""
import contextlib
import os
import pathlib
import re
import resource
import signal
import sys
import time
import traceback
from typing import NamedTuple

import train

EXIT_CODES = (0, 1, 2, 65, 74)          # with 0 nothing is wrong, with the others one sentence says what
CPU = 6
PATIENCE = 180
MEMORY = 4 << 30                        # bytes that a child may allocate
ROOT = pathlib.Path(__file__).resolve().parent.parent


class Outcome(NamedTuple):
    """How a child ended. code: the exit code, or -N for signal N."""
    code: int
    out: str
    err: str


def command(argv):
    """An action for `call`."""
    return lambda: train.main([str(word) for word in argv])


def must(outcome):
    assert outcome.code == 0, outcome
    return outcome


def call(action, cwd, prepare=None, stop=None):
    """The Outcome of action() -> exit code. prepare() runs in the child first; stop: (seconds, signal)."""
    pipes = [os.pipe(), os.pipe()]
    pid = os.fork()
    if not pid:
        child(action, cwd, prepare, *[write for _, write in pipes])
    for read, write in pipes:
        os.close(write)
        os.set_blocking(read, False)
    code, texts = wait(pid, [read for read, _ in pipes], stop)
    for read, _ in pipes:
        os.close(read)
    return Outcome(code, *texts)


def child(action, cwd, prepare, out, err):
    """All of a child's life."""
    code = 1
    try:
        os.chdir(cwd)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdin = open(0, closefd=False)
        sys.stdout = open(1, "w", buffering=1, closefd=False)
        sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)
        sys.argv = ["train.py"]
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGXCPU, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        resource.setrlimit(resource.RLIMIT_CPU, (CPU, CPU + 5))
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if prepare:
            prepare()
        code = action()
    except SystemExit as e:             # --help
        code = e.code
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def wait(pid, pipes, stop):
    """(exit code, [what the child wrote into each pipe])"""
    began = time.monotonic()
    texts = [b"" for _ in pipes]
    ended = 0
    while not ended:
        ended, status = os.waitpid(pid, os.WNOHANG)         # what it wrote before it ended is read below
        for i, pipe in enumerate(pipes):
            with contextlib.suppress(BlockingIOError):
                while part := os.read(pipe, 1 << 16):
                    texts[i] += part
        passed = time.monotonic() - began
        if ended:
            continue
        if stop and passed >= stop[0]:
            os.kill(pid, stop[1])
            stop = None
        if passed > PATIENCE:
            os.kill(pid, signal.SIGKILL)
        time.sleep(min(0.003, stop[0] - passed) if stop else 0.003)
    return os.waitstatus_to_exitcode(status), [text.decode(errors="backslashreplace") for text in texts]


def judge(outcome, codes=EXIT_CODES, own_code="no file"):
    """None, or what is wrong with an Outcome. own_code: a file of the user; a traceback may end there."""
    lines = outcome.err.strip().splitlines() or [""]
    if "Traceback (most recent call last)" in outcome.err:
        frames = re.findall(r'File "(.+)", line \d+, in (.+)', outcome.err)
        if own_code in frames[-1][0]:
            return None
        ours = [f"{pathlib.Path(file).name} {name}" for file, name in frames
                if file.startswith(str(ROOT)) and not file.startswith(str(ROOT / "tests"))]
        return f"traceback in {' < '.join(ours[:-4:-1])}: {lines[-1][:120]}"
    if outcome.code == -signal.SIGKILL and outcome.code not in codes:
        return f"works for over {CPU} CPU seconds and does not stop when asked to"
    if outcome.code in (75, 143) and outcome.code not in codes:
        return f"works for over {CPU} CPU seconds"
    if outcome.code not in codes:
        return f"exit code {outcome.code}: {lines[-1][-200:]!r}"
    if outcome.code in (1, 2, 65, 74):
        if not lines[-1].startswith("train.py: "):
            return f"exit code {outcome.code} without a sentence: {lines[-1][-150:]!r}"
        if len(lines[-1]) > 1000 or not lines[-1].isprintable():
            return f"a sentence of {len(lines[-1])} characters, or not printable: {lines[-1][:150]!r}"
    return None


# ------------------------------------------------------------------------------------------------- operations

EVENTS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Operations:
    """Counts file operations in `seen`; effect(event, path) runs before operation n and may raise OSError."""

    def __init__(self, n=None, effect=None):
        self.n = n
        self.effect = effect
        self.seen = 0

    def install(self):
        """In a child: an audit hook cannot be removed."""
        self.here = os.getcwd()
        sys.addaudithook(self.hook)
        for name in ("fsync", "write"):
            setattr(os, name, self.counted(name, getattr(os, name)))

    def counted(self, name, function):
        def counted(*args):
            self.count(name, None)
            return function(*args)
        return counted

    def hook(self, event, args):
        if event in EVENTS:
            self.count(event, None)
        elif event == "open" and isinstance(args[0], (str, bytes)) and args[2] & WRITING:
            path = os.path.abspath(os.fsdecode(args[0]))
            if path.startswith(self.here):
                self.count(event, path)

    def count(self, event, path):
        self.seen += 1
        if self.seen == self.n:
            self.effect(event, path)


def kill(event, path):
    os.kill(os.getpid(), signal.SIGKILL)


def tear(size, action):
    """An effect: from here on no file grows beyond what this one has now and `size` bytes.

    action   signal.SIG_DFL: killed in the middle of the write; SIG_IGN: an error, as of a full disk
    """
    def effect(event, path):
        limit = size + (os.path.getsize(path) if path and os.path.exists(path) else 0)
        signal.signal(signal.SIGXFSZ, action)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return effect


def refuse(operations, number, events):
    """An effect: from here on every operation that is one of these events fails with an OSError."""
    def effect(event, path):
        operations.n = operations.seen + 1
        if event in events:
            raise OSError(number, os.strerror(number), path)
    return effect
