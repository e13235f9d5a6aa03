"""data/runtime/run_folder.py: a run is a folder, and it survives whatever happens to the process.

    config.json   flags, identity, versions, device        log.jsonl    one object per event, flushed
    state.pt      what is needed to continue (and state.prev.pt, the save before it)
    result.json   written last of all, atomically: its existence means done
    failed.json   why it stopped, if it failed; the next try removes it
    .lock         held by the process that works here; a killed process leaves nothing behind

Identity.  A run is its flags, its code (code_hash.py: definition by definition), its data, its base model and
its reward. The same command again compares them with config.json:

    the same              finished: its result is returned; interrupted: it continues from state.pt
    other flags           UserError: this is the wrong folder. A flag that the stored run lacks counts as its
                          default
    other code, data,     the folder is renamed to NAME.<hash of the old identity>, one line on stderr names
    base or reward        what changed, and the run starts anew, whether the old one was finished or not
    keep=True             changed code, that of a reward function too, is accepted: result and state are used,
                          config.json and result.json list what changed as "kept", and the new code is the
                          run's code from then on. Changed data, base or reward model is a UserError: a change
                          of code can be known to be harmless, another input means another result
    fresh=True            what a run wrote here is deleted, and the run starts anew

A stored flag that no longer exists is compared under its new name, if it was renamed; otherwise a value other
than None counts as changed code. In a folder from before code was recorded the code counts as changed.

`defer_signals` turns SIGINT and SIGTERM into Interrupted at any point, except inside `with defer_signals:`,
for the lines that change weights, optimiser, counters or files. So nothing polls: the step that was
interrupted is dropped and computed again. Of several processes rank 0 alone reads, writes and prints; a
signal waits for the next exchange.

Public: Run, RunError, Interrupted, defer_signals, print_result, log_progress
"""
import contextlib
import json
import math
import os
import pathlib
import shutil
import signal
import sys
from dataclasses import dataclass

import torch
from tqdm import tqdm

from data.runtime import distributed
from data.runtime.code_hash import short_hash
from data.runtime.device import machine
from data.runtime.distributed import Interrupted, dist_state
from data.runtime.files import DataError, UserError, WriteError, atomic, read_json, write_json
from data.runtime.flags import flag
from data.runtime.identity import (UNKNOWN_CODE, Change, code_of, compare_flags, compare_identity,
                                   from_config, has_code, to_config)

try:
    import fcntl                                    # a lock that dies with its process; absent on Windows
except ImportError:
    fcntl = None


@dataclass(frozen=True)
class RunFolderFlags:
    """the run"""
    out: str = flag(None, "the run folder; default: a readable name in out/", type=str, identity=False)
    fresh: bool = flag(False, "start over: delete what the run folder holds", identity=False)
    keep: bool = flag(False, "accept the old result although the code has changed", identity=False)


NOT_IN_RESULTS = ("samples", "item_correct", "virtual_tokens")        # long, in result.json alone
WEIGHTS = ("adapter", "model")                      # folders; a run writes one of them
WRITTEN = ("result.json", "log.jsonl", "state.pt", "state.prev.pt", "state.new.pt", "failed.json",
           "config.json")


class RunError(UserError):
    """A run that cannot continue, although the command is right."""
    code = 1


# ---------------------------------------------------------------------------------------------------- signals

class DeferSignals:
    """Signals raise Interrupted at once, or at the end of a `with` block of this object. A second one kills.

    pending   the number of the signal that came, None before
    """
    depth = 0
    pending = None

    def __enter__(self):
        self.depth += 1

    def __exit__(self, error, *_):
        self.depth -= 1
        if self.pending and not self.depth and error is None:
            raise Interrupted

    def handler(self, number, frame):
        if dist_state.size > 1:                     # torchrun sends a second one: it must not kill
            dist_state.stop = True
            return
        if self.pending:
            os._exit(128 + number)
        self.pending = number
        if not self.depth:
            raise Interrupted

    @contextlib.contextmanager
    def installed(self):
        """Handle SIGINT and SIGTERM inside this block. Outside the main thread nothing is installed."""
        self.depth = 0
        self.pending = None
        old = {}
        with contextlib.suppress(ValueError):       # not the main thread
            old = {s: signal.signal(s, self.handler) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for s, handler in old.items():
                signal.signal(s, handler)


defer_signals = DeferSignals()


# ----------------------------------------------------------------------------------------------- the terminal

def print_result(text=""):
    """A line of results on stdout. A closed pipe (`| head`) ends the printing, not the run."""
    if dist_state.rank:
        return
    try:
        print(text, flush=True)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")
    except UnicodeEncodeError:                      # a terminal without these letters shows ? instead
        sys.stdout.reconfigure(errors="replace")
        print(text, flush=True)


def log_progress(text, rank=0):
    """A line of progress on stderr, above the bar if there is one; from one process of several."""
    with contextlib.suppress(OSError):
        if dist_state.rank == rank:
            tqdm.write(text, file=sys.stderr)


# ------------------------------------------------------------------------------------------------- the folder

class Run:
    """One run folder.

    flag_values   the flags that change what the run computes
    defaults      {flag: value} for flags that did not exist yet when the stored run was made
    identity      as in identity.py; None compares flags only
    """

    def __init__(self, folder, flag_values, fresh=False, keep=False, defaults=None):
        self.folder = pathlib.Path(folder)
        self.flag_values = flag_values
        self.fresh = fresh
        self.keep = keep
        self.defaults = defaults or {}
        self.identity = None
        self.lock = None
        self.config = self.folder / "config.json"
        self.result = self.folder / "result.json"
        self.failed = self.folder / "failed.json"
        self.state = self.folder / "state.pt"
        self.before = self.folder / "state.prev.pt"

    # ---- is it there already?
    def finished(self, identity=None):
        """The result of this very run, if it is finished; else None. Changes nothing, but for keep=True.

        Raises UserError if another run or something else is in the folder, or if data, base or reward model
        have changed and keep=True; DataError if the processes of one run do not have the same code and files.
        """
        self.check_ranks(identity)
        return distributed.broadcast(lambda: self.find_result(identity))

    def find_result(self, identity):
        change = self.change(identity)
        if change is None or not self.result.exists() or change and not self.keep:
            return None
        if change:
            self.accept(change, identity)
        result = read_json(self.result)
        if not isinstance(result, dict):
            raise DataError(f"{self.result} holds no result of a run; use --fresh to start over")
        saved = result.get("adapter_bytes") or result.get("model_bytes")
        if saved and not any((self.folder / name).is_dir() for name in WEIGHTS):
            raise DataError(f"{self.folder} is a finished run whose weights are gone; use --fresh to start "
                            "over")
        return self.recorded(result)

    def change(self, identity):
        """What has changed since the run in the folder began; None for no run, or fresh=True.

        Raises as `finished`.
        """
        try:
            config = read_json(self.config)
        except DataError as e:
            if self.config.exists():
                if self.fresh:
                    return None
                raise DataError(f"{e}; use --fresh to start over") from None
            names = os.listdir(self.folder) if self.folder.is_dir() else []
            if any(name != "failed.json" and not name.startswith(".") for name in names):
                raise UserError(f"{self.folder} exists and is not a run folder; use another --out") from None
            return None
        if "config" not in config:                  # --fresh would delete it
            raise UserError(f"{self.folder} holds a model, not a run; use another --out")
        if self.fresh:
            return None
        try:
            gone = compare_flags(config["config"], self.flag_values, self.defaults)
        except UserError as e:
            raise UserError(f"{self.folder} {e}") from None
        if identity is None:
            return Change(gone, [])
        if not has_code(config):
            return Change([UNKNOWN_CODE], [])
        change = compare_identity(from_config(config), identity)
        if self.keep and change.inputs:
            raise UserError(f"{self.folder}: {', '.join(change.inputs)} changed since this run was made, and "
                            "--keep accepts changed code only; leave it out to move the old run aside and "
                            "start anew")
        return Change(gone + change.code, change.inputs)

    def check_ranks(self, identity):
        """Raises DataError where this process has another identity than process 0."""
        theirs = distributed.broadcast(lambda: identity)
        if theirs != identity:
            change = compare_identity(theirs or {}, identity or {})
            raise DataError(f"process {dist_state.rank} has another {change} than process 0; put the same "
                            "files on every machine")

    # ---- work in it
    @contextlib.contextmanager
    def opened(self, identity=None):
        """Own the folder, one process at a time: `with run.opened(identity) as done:`.

        A changed run is moved aside first. `done` is None, or the result, if another process has finished
        this very run since `finished` was called. An error in the block is written to failed.json,
        Interrupted is not. Raises as `finished`, UserError if the folder is in use, WriteError if it cannot
        be written.
        """
        self.check_ranks(identity)
        self.identity = identity
        if dist_state.rank:
            yield distributed.broadcast(None)
            return
        self.lock = self.locked()
        try:
            with defer_signals:
                self.prepare(identity)
            done = distributed.broadcast(lambda: None if self.fresh else self.find_result(identity))
            try:
                yield done
            except Exception as e:
                reason = str(e) if isinstance(e, UserError) else f"{type(e).__name__}: {e}"
                reason = reason.strip().split("\n")[0]
                with contextlib.suppress(UserError):        # a full disk may be the reason
                    write_json(self.failed, {"reason": reason, "config": self.flag_values})
                raise
        finally:
            self.lock.close()

    def record_failure(self, error):
        """Write failed.json for a UserError from before the run is opened: its data cannot be read, say.

        Only where this run could begin or continue; with fresh=True and in several processes nothing is
        written.
        """
        if self.fresh or dist_state.size > 1:
            return
        with contextlib.suppress(UserError):        # the error itself, or another folder's reason to refuse
            if self.finished() is None:
                with self.opened():
                    raise error

    def locked(self):
        """The folder's lock file, locked. Raises UserError, WriteError."""
        attempts = 0
        while True:
            attempts += 1
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                lock = open(self.folder / ".lock", "w")
            except OSError as e:
                if isinstance(e, FileNotFoundError) and attempts < 100:     # another process moved it aside
                    continue
                raise WriteError(f"{self.folder} cannot be written ({e.strerror}); use another --out") from e
            if not fcntl:
                return lock
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                lock.close()
                raise UserError(f"{self.folder} is in use by another process; wait for it, or use another "
                                "--out") from None
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(lock.fileno()), os.stat(self.folder / ".lock")):
                    return lock
            lock.close()                            # the lock of a folder that was moved aside

    def prepare(self, identity):
        """Under the lock: leave what can be continued, or nothing. Raises as `finished`."""
        change = self.change(identity)
        if self.fresh:                              # only what a run writes; nothing else in there is ours
            for name in WEIGHTS:
                shutil.rmtree(self.folder / name, ignore_errors=True)
            for name in WRITTEN:                    # config.json last: until then it is a run folder
                (self.folder / name).unlink(missing_ok=True)
        elif change and self.keep:
            self.accept(change, identity)
        elif change:
            self.move_aside(change)
        self.failed.unlink(missing_ok=True)

    def move_aside(self, change):
        """Rename the folder, which is one step, and own a new one. Raises UserError, WriteError."""
        if pathlib.Path.cwd().is_relative_to(self.folder.resolve()):
            raise UserError(f"{self.folder} holds a run from before this changed: {change}; it is not moved "
                            "aside while it is the working directory: use another --out, or --fresh")
        config = read_json(self.config)
        name = f"{self.folder.name}.{short_hash(from_config(config) if has_code(config) else config, 6)}"
        aside = self.folder.with_name(name)
        n = 1
        while aside.exists():
            n += 1
            aside = self.folder.with_name(f"{name}.{n}")
        old = self.lock
        if not fcntl:
            old.close()                             # Windows renames no folder with an open file in it
        try:
            os.rename(self.folder, aside)
        except OSError as e:
            raise WriteError(f"{self.folder} holds a run from before this changed: {change}; it cannot be "
                             f"moved aside ({e.strerror}): use another --out, or --fresh") from e
        log_progress(f"{change} changed since this run was made; the old run is now {aside}; starting anew")
        self.lock = self.locked()                   # UserError, if another process was faster: it starts anew
        old.close()

    def accept(self, change, identity):
        """--keep: note what changed, in result.json first; until config.json follows, nothing is accepted."""
        config = read_json(self.config)
        config["kept"] = list(dict.fromkeys([*config.get("kept", ()), *change.code]))
        config.update(config=self.flag_values, **to_config(identity))
        if self.result.exists():
            write_json(self.result, {**read_json(self.result), **code_of(config)})
        write_json(self.config, config)
        log_progress(f"{self.folder} is kept, although it was made before this changed: {change}")

    def start(self, facts):
        """Write config.json of a new run, with `facts` in it; return the state of one that continues.

        None if there is no state yet. Raises WriteError.
        """
        return distributed.broadcast(lambda: self.load_state() if self.config.exists() else self.begin(facts))

    def begin(self, facts):
        write_json(self.config, {"config": self.flag_values, "argv": sys.argv, "machine": machine(), **facts,
                                 **to_config(self.identity)})

    def add_facts(self, **facts):
        """More for config.json, known later: parameter counts, say. Raises WriteError."""
        if not dist_state.rank:
            write_json(self.config, {**read_json(self.config), **facts})

    def load_state(self):
        for path in (self.state, self.before):
            if path.exists():
                try:
                    return torch.load(path, map_location="cpu", weights_only=True)
                except Exception as e:              # a torn zip raises many kinds; the one before is whole
                    log_progress(f"{path} is damaged ({type(e).__name__}); the save before it is used")
        return None

    def log(self, **event):
        """One line of log.jsonl, flushed. A float that JSON lacks becomes a string. Raises WriteError."""
        if dist_state.rank:
            return
        event = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in event.items()}
        try:
            with open(self.folder / "log.jsonl", "a") as f:
                f.write(json.dumps(event) + "\n")
        except OSError as e:
            raise WriteError(f"{self.folder}/log.jsonl cannot be written ({e.strerror}); "
                             "free some space and give the same command again") from e

    def rewind(self, step):
        """Drop the events after `step`, where the run continues (they come again), and a torn last line."""
        path = self.folder / "log.jsonl"
        if path.exists() and not dist_state.rank:
            lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
            kept = [line for line in lines if (e := json.loads(line))["step"] < step
                    or e["step"] == step and e["event"] not in ("valid", "test")]
            with atomic(path) as f:
                f.write("".join(line + "\n" for line in kept).encode())

    def save(self, state):
        """state.pt; the one before it stays until this one is whole. Raises WriteError."""
        if dist_state.rank:
            return
        with atomic(self.folder / "state.new.pt") as f:
            torch.save(state, f)
        if self.state.exists():
            os.replace(self.state, self.before)
        os.replace(self.folder / "state.new.pt", self.state)

    # ---- the end
    def finish(self, result):
        """Write result.json, with the code in it, and a line of results.jsonl. Returns the result.

        Raises WriteError.
        """
        if not dist_state.rank:
            result = {**result, **code_of(read_json(self.config))}
            write_json(self.result, result)
            self.before.unlink(missing_ok=True)
            self.record(result)
        distributed.barrier()                       # other processes may read the folder after this
        return result

    def line(self, result):
        brief = {k: v for k, v in result.items() if k not in NOT_IN_RESULTS}
        return json.dumps({**brief, "out": str(self.folder)})

    def record(self, result):
        """Append to results.jsonl in one write, so that parallel runs never mix lines. Raises WriteError."""
        path = self.folder.parent / "results.jsonl"
        try:
            fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(fd, (self.line(result) + "\n").encode())
            finally:
                os.close(fd)
        except OSError as e:
            raise WriteError(f"{path} cannot be written ({e.strerror})") from e

    def recorded(self, result):
        """The result. A kill just before `record` is repaired here: every finished run has its line."""
        lines = self.folder.parent / "results.jsonl"
        if self.line(result) not in (lines.read_text().splitlines() if lines.exists() else ()):
            self.record(result)
        return result
