"""data/runtime/run_folder.py: a run is a folder, and it survives whatever happens to the process.

    config.json   what was asked for, on what machine      log.jsonl    one object per event, flushed
    state.pt      what is needed to go on (and state.prev.pt, the save before it)
    result.json   written last of all, atomically: its existence means done
    failed.json   why it stopped, if it did not come to its end; the next try takes it away
    .lock         held by the process that works here; a killed process leaves nothing behind

The same command again finds its own folder: finished, it is told so; interrupted, it goes on from state.pt;
another run's folder is refused. `guard` turns SIGINT and SIGTERM into Interrupted at any point of the work,
except inside `with guard:`, where the few lines stand that change weights, optimiser, counters or files. So
nothing has to poll: what a step was computing (an evaluation, a generation) is dropped, and computed again.
Of several processes rank 0 alone reads, writes and speaks; a signal waits for their next exchange.

Public: Run, RunError, Interrupted, guard, say, note
"""
import contextlib
import json
import math
import os
import pathlib
import shutil
import signal
import sys

import torch
from tqdm import tqdm

from data.runtime import distributed
from data.runtime.distributed import Interrupted, world
from data.runtime.files import DataError, UserError, atomic, read_json, write_json
from data.runtime.device import machine

try:
    import fcntl                                    # a lock that dies with its process; absent on Windows
except ImportError:
    fcntl = None


class RunError(UserError):
    """A run that cannot go on, through no fault of the command line."""
    code = 1


class Guard:
    """Signals raise Interrupted at once, or at the end of a guarded block. A second one kills."""
    depth, pending = 0, None

    def __enter__(self):
        self.depth += 1

    def __exit__(self, kind, *_):
        self.depth -= 1
        if self.pending and not self.depth and kind is None:
            raise Interrupted

    def handler(self, number, frame):
        if world.size > 1:                          # torchrun sends a second one: it must not kill
            world.stop = True
            return
        if self.pending:
            os._exit(128 + number)
        self.pending = number
        if not self.depth:
            raise Interrupted

    @contextlib.contextmanager
    def installed(self):
        self.depth, self.pending, old = 0, None, {}
        with contextlib.suppress(ValueError):       # not the main thread: the caller keeps its own handlers
            old = {s: signal.signal(s, self.handler) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for s, handler in old.items():
                signal.signal(s, handler)


guard = Guard()


def say(text=""):
    """A line of results on stdout. A closed pipe (`| head`) ends the printing, not the run."""
    if world.rank:
        return
    try:
        print(text, flush=True)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")
    except UnicodeEncodeError:                      # a terminal without these letters shows ? in their place
        sys.stdout.reconfigure(errors="replace")
        print(text, flush=True)


def note(text, rank=0):
    """A line of progress on stderr, above the bar if there is one; from one process of several."""
    with contextlib.suppress(OSError):
        if world.rank == rank:
            tqdm.write(text, file=sys.stderr)


class Run:
    """One run folder. `told` is what identifies the run: the flags that change what it computes."""

    def __init__(self, folder, told, fresh=False):
        self.folder, self.told, self.fresh = pathlib.Path(folder), told, fresh
        self.config, self.result = self.folder / "config.json", self.folder / "result.json"
        self.state, self.before = self.folder / "state.pt", self.folder / "state.prev.pt"
        self.failed = self.folder / "failed.json"

    def finished(self):
        """The result of this very command, if it has run before; UserError if another run is in there."""
        return distributed.lead(self.found)

    def found(self):
        if self.config.exists():
            was = read_json(self.config).get("config")
            if was is None:                         # --fresh would delete it
                raise UserError(f"{self.folder} holds a model, not a run; use another --out")
            if self.fresh:
                return None
            for name in [*self.told, *was]:
                if self.told.get(name) != was.get(name):
                    raise UserError(f"{self.folder} holds a run with --{name} {was.get(name)}; this command "
                                    f"says --{name} {self.told.get(name)}. Use another --out, or --fresh to "
                                    "start over")
            return self.recorded(read_json(self.result)) if self.result.exists() else None
        ours = {".lock", "failed.json"}
        if self.folder.is_dir() and set(os.listdir(self.folder)) - ours:
            raise UserError(f"{self.folder} exists and is not a run folder; use another --out")

    @contextlib.contextmanager
    def opened(self):
        """Own the folder, one process at a time."""
        if world.rank:
            yield self
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = open(self.folder / ".lock", "w")
        except OSError as e:
            raise UserError(f"{self.folder} cannot be written ({e.strerror}); choose another --out") from e
        with lock:
            try:
                if fcntl:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(f"{self.folder} is in use by another process; "
                                "wait for it, or use another --out") from None
            self.failed.unlink(missing_ok=True)
            if self.fresh:                          # only what a run writes; nothing else in there is ours
                for name in ("result.json", "config.json", "log.jsonl", "state.pt", "state.prev.pt"):
                    (self.folder / name).unlink(missing_ok=True)
                for name in ("adapter", "model"):
                    shutil.rmtree(self.folder / name, ignore_errors=True)
            try:
                yield self
            except Exception as e:                  # Interrupted is none: an interrupted run has not failed
                why = str(e) if isinstance(e, UserError) else f"{type(e).__name__}: {e}"
                with contextlib.suppress(UserError):            # a full disk may be what this is about
                    write_json(self.failed, {"reason": why.strip().split("\n")[0], "config": self.told})
                raise

    def start(self, facts):
        """Write config.json, or see that a continued run still finds its data and base. Returns the state."""
        theirs, keys = distributed.lead(lambda: facts), ("data_sha256", "base_sha256")
        if any(theirs.get(key) != facts.get(key) for key in keys):
            raise DataError(f"process {world.rank} finds another --data or --init under these names than "
                            "process 0 does; put the same files on every machine")
        return distributed.lead(lambda: self.begun(facts))

    def begun(self, facts):
        if not self.config.exists():
            write_json(self.config, {"config": self.told, **facts, "argv": sys.argv, "machine": machine()})
            return None
        was = read_json(self.config)
        for key, what in (("data_sha256", "--data"), ("base_sha256", "--init")):
            if was.get(key) != facts.get(key):
                raise DataError(f"{self.folder} was begun when {what} held something else; put the old files "
                                "back, or use --fresh to start over")
        for path in (self.state, self.before):
            if path.exists():
                try:
                    return torch.load(path, map_location="cpu", weights_only=True)
                except Exception as e:              # a torn zip raises many kinds; the one before is whole
                    note(f"{path} is damaged ({type(e).__name__}); going on from the save before it")
        return None

    def log(self, **event):
        """One line, flushed. A float that JSON cannot hold becomes a string."""
        if world.rank:
            return
        event = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in event.items()}
        try:
            with open(self.folder / "log.jsonl", "a") as f:
                f.write(json.dumps(event) + "\n")
        except OSError as e:
            raise UserError(f"{self.folder}/log.jsonl cannot be written ({e.strerror}); "
                            "free some space and give the same command again") from e

    def rewind(self, step):
        """Forget the events after the step we go on from (they will happen again), and a torn last line."""
        path = self.folder / "log.jsonl"
        if path.exists() and not world.rank:
            lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
            kept = [line for line in lines if (e := json.loads(line))["step"] < step
                    or e["step"] == step and e["event"] not in ("valid", "test")]
            with atomic(path) as f:
                f.write("".join(line + "\n" for line in kept).encode())

    def save(self, state):
        """state.pt; the one before it stays until this one is whole."""
        if world.rank:
            return
        with atomic(self.folder / "state.new.pt") as f:
            torch.save(state, f)
        if self.state.exists():
            os.replace(self.state, self.before)
        os.replace(self.folder / "state.new.pt", self.state)

    def finish(self, result):
        if not world.rank:
            write_json(self.result, result)
            self.before.unlink(missing_ok=True)
            self.record(result)
        distributed.meet()                          # what follows may read it

    def record(self, result):
        """Append to results.jsonl in one write, so that parallel runs never mix their lines."""
        brief = {k: v for k, v in result.items() if k not in ("samples", "right", "virtual")}
        fd = os.open(self.folder.parent / "results.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(fd, (json.dumps({**brief, "out": str(self.folder)}) + "\n").encode())
        finally:
            os.close(fd)

    def recorded(self, result):
        """The result; a kill just before `record` is made good, so that every finished run has its line."""
        lines = self.folder.parent / "results.jsonl"
        if f'"out": {json.dumps(str(self.folder))}' not in (lines.read_text() if lines.exists() else ""):
            self.record(result)
        return result
