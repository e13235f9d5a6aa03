"""data/runtime/run_folder.py: a run is a folder, and it survives whatever happens to the process.

    config.json   flags, identity, versions, device        log.jsonl    one object per event, flushed
    state.pt      what is needed to continue (state.prev.pt: the save before it, until the run is finished)
    result.json   written last of all, atomically: its existence means done
    failed.json   why it stopped, if it failed; the next try removes it
    .lock         held by the process that works here; a killed process leaves nothing behind, but perhaps
                  temporary files, which the next one deletes

Saves.  state.pt is written every --save_every steps, and every two minutes; each save is an event of
log.jsonl, with the step from which it goes on. A damaged one (its parts have checksums) is left for the one
before it, with a line on stderr. A save has the id of its run: that of another run is an error.

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

`defer_signals` turns SIGINT, SIGTERM and SIGHUP into Interrupted at any point, except inside `with defer_signals:`,
for the lines that change weights, optimiser, counters or files. So nothing polls: the step that was
interrupted is dropped and computed again. Of several processes rank 0 alone reads, writes and prints; a
signal waits for the next exchange.

Public: Run, RunError, Interrupted, defer_signals, print_result, log_progress, terminal_width, fit
"""
import contextlib
import errno
import json
import math
import os
import pathlib
import shutil
import signal
import sys
import textwrap
import time
import uuid
import zipfile
from dataclasses import dataclass

import torch
from tqdm import tqdm

from data.runtime import distributed
from data.runtime.code_hash import short_hash
from data.runtime.device import machine
from data.runtime.distributed import Interrupted, dist_state
from data.runtime.files import (DataError, UserError, WriteError, atomic, cannot_write, fcntl,
                                remove_abandoned, sync_folder, try_lock, write_json)
from data.runtime.flags import flag, path_type
from data.runtime.identity import (UNKNOWN_CODE, Change, code_of, compare_flags, compare_identity,
                                   from_config, has_code, to_config)
from data.runtime.run_files import read_events, read_result, read_run_config, resume_step


@dataclass(frozen=True)
class RunFolderFlags:
    """the run"""
    out: str = flag(None, "the run folder; default: a readable name in out/", type=path_type, identity=False)
    fresh: bool = flag(False, "start over: delete what the run folder holds", identity=False)
    keep: bool = flag(False, "accept the old result although the code has changed", identity=False)


NOT_IN_RESULTS = ("samples", "item_correct", "generations", "virtual_tokens")     # long, in result.json alone
WEIGHTS = ("adapter", "model")                      # folders; a run writes one of them
STATES = ("state.new.pt", "state.pt", "state.prev.pt")          # newest first
WRITTEN = ("result.json", "log.jsonl", *STATES, "failed.json", "config.json")
SAVE_SECONDS = 120                                  # a killed process loses no more than this, or one step


@contextlib.contextmanager
def or_start_over():
    """Name the remedy for a damaged file."""
    try:
        yield
    except DataError as e:
        raise DataError(f"{e}; use --fresh to start over") from None


class RunError(UserError):
    """A run that cannot continue, although the command is right."""
    code = 1


# ---------------------------------------------------------------------------------------------------- signals

STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class DeferSignals:
    """Signals raise Interrupted at once, or at the end of a `with` block of this object. A second one kills,
    except SIGHUP: a terminal that closes sends several.

    pending   the number of the signal that came, None before
    """
    depth = 0
    pending = None
    terminals = ()

    def __enter__(self):
        self.depth += 1

    def __exit__(self, error, *_):
        self.depth -= 1
        if self.pending and not self.depth and error is None:
            raise Interrupted

    def handler(self, number, frame):
        self.leave_closed_terminals()
        if dist_state.size > 1:                     # torchrun sends a second one: it must not kill
            dist_state.stop = True
            return
        if self.pending:
            if number in (signal.SIGINT, signal.SIGTERM):
                os._exit(128 + number)
            return
        self.pending = number
        if not self.depth:
            raise Interrupted

    def leave_closed_terminals(self):
        """Send output to nowhere where the terminal is gone: writing to it would be an error."""
        for descriptor in self.terminals:
            if not os.isatty(descriptor):
                with open(os.devnull, "w") as nowhere:
                    os.dup2(nowhere.fileno(), descriptor)

    @contextlib.contextmanager
    def installed(self):
        """Handle SIGINT, SIGTERM and SIGHUP inside this block, but for those that are ignored (nohup, a job
        in the background of a script). Outside the main thread nothing is installed."""
        self.depth = 0
        self.pending = None
        self.terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
        old = {}
        with contextlib.suppress(ValueError):       # not the main thread
            for number in STOP_SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:
                    old[number] = signal.signal(number, self.handler)
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)


defer_signals = DeferSignals()


# ----------------------------------------------------------------------------------------------- the terminal

def print_result(text="", end="\n"):
    """A line of results on stdout, a part of one with end="". A closed pipe (`| head`) ends the printing, not
    the run. Raises WriteError where stdout cannot be written: a file on a full disk."""
    if dist_state.rank:
        return
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")
    except OSError as e:
        sys.stdout = open(os.devnull, "w")          # Python would try again at its end
        raise cannot_write("stdout", e) from e
    except UnicodeEncodeError:                      # a terminal without these letters shows ? instead
        sys.stdout.reconfigure(errors="replace")
        print(text, end=end, flush=True)


def terminal_width(stream):
    """COLUMNS, or the width of a stream's terminal; None for a file or a pipe."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return int(os.environ.get("COLUMNS") or os.get_terminal_size(stream.fileno()).columns) or None
    return None


def fit(text, stream, indent="  ", widest=10 ** 6):
    """Text whose lines fit the terminal of a stream, at most `widest` characters; no word is cut.

    Unchanged where there is no terminal. Later lines are indented; a command stays one line, to be copied.
    """
    width = min(terminal_width(stream) or widest, widest)
    lines = []
    for line in text.split("\n"):
        if len(line) <= width or line.startswith("python "):
            lines.append(line)
        else:
            lines += textwrap.wrap(line, max(40, width), break_long_words=False, break_on_hyphens=False,
                                   subsequent_indent=indent, replace_whitespace=False)
    return "\n".join(lines)


tqdm.get_lock()         # made now: a signal inside of its first use would leave tqdm without one


def log_progress(text, rank=0):
    """A line of progress on stderr, above the bar if there is one; from one process of several."""
    with contextlib.suppress(OSError):
        if dist_state.rank == rank:
            tqdm.write(fit(text, sys.stderr), file=sys.stderr)


# ------------------------------------------------------------------------------------------------- the folder

class Saved(dict):
    """What state.pt held. Raises DataError for an entry that an earlier version did not save."""

    def __init__(self, state, path):
        super().__init__(state)
        self.path = path

    def __missing__(self, key):
        raise DataError(f"{self.path} was saved by an earlier version and has no {key!r}; use --fresh to "
                        "start over")


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
        self.made = []                              # folders that `locked` has made
        self.id = None                              # of this run, in config.json and in each save
        self.begun = False                          # by this command, not by an earlier one
        self.saved_at = time.monotonic()
        self.save_seconds = 0.0                     # how long the last save took
        self.config = self.folder / "config.json"
        self.result = self.folder / "result.json"
        self.failed = self.folder / "failed.json"
        self.state = self.folder / "state.pt"

    # ---- is it there already?
    def finished(self, identity=None):
        """The result of this very run, if it is finished; else None. Changes nothing, but for keep=True.

        Raises UserError if another run or something else is in the folder, or if data, base or reward model
        have changed and keep=True; DataError if the processes of one run do not have the same code and files.
        """
        self.check_ranks(identity)
        return distributed.broadcast(lambda: self.recorded(self.find_result(identity)))

    def find_result(self, identity):
        change = self.change(identity)
        if change is None or not self.result.exists() or change and not self.keep:
            return None
        if change:
            self.accept(change, identity)
        with or_start_over():
            result = read_result(self.folder)
        saved = result.get("adapter_bytes") or result.get("model_bytes")
        if saved and not any((self.folder / name).is_dir() for name in WEIGHTS):
            raise DataError(f"{self.folder} is a finished run whose weights are gone; use --fresh to start "
                            "over")
        return result

    def change(self, identity):
        """What has changed since the run in the folder began; None for no run, or fresh=True.

        Raises as `finished`.
        """
        names = set(os.listdir(self.folder)) if os.path.isdir(self.folder) else set()
        if self.config.name not in names:
            strangers = {name for name in names if not name.startswith(".")} - {self.failed.name}
            if strangers & {"log.jsonl", *STATES} and strangers <= {*WRITTEN, *WEIGHTS}:
                if self.fresh:
                    return None
                raise UserError(f"{self.folder} holds a run whose config.json is gone; use --fresh to start over")
            if strangers:
                raise UserError(f"{self.folder} exists and is not a run folder; use another --out")
            return None
        if not names & {"log.jsonl", self.state.name, self.result.name}:
            self.require_run_config()
        if self.fresh:
            self.require_own_weights()
            return None
        with or_start_over():
            config = read_run_config(self.folder)
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

    def require_run_config(self):
        """Raises UserError for the config.json of a model, which --fresh would delete."""
        try:
            read_run_config(self.folder)
        except DataError:
            raise UserError(f"{self.folder} holds a model, not a run; use another --out") from None

    def require_own_weights(self):
        """Raises UserError for a folder inside adapter/ or model/, where a run writes files alone: --fresh would
        delete somebody's run or model."""
        for name in WEIGHTS:
            for path in (self.folder / name).glob("[!.]*"):
                if path.is_dir():
                    raise UserError(f"{path} was not written by this run, and --fresh would delete it; move it "
                                    "away, or use another --out")

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

        `done` is None, or the result, if another process has finished this very run since `finished` was
        called. An error in the block is written to failed.json; but one sentence for the user before the
        first step of a new run leaves no folder behind. Interrupted says from which step the same command
        goes on. Raises as `finished`, UserError if the folder is in use, WriteError if it cannot be written.
        """
        self.check_ranks(identity)
        self.identity = identity
        if dist_state.rank:
            yield distributed.broadcast(None)
            return
        self.lock = self.locked()
        try:
            done = distributed.broadcast(lambda: None if self.fresh else self.find_result(identity))
            try:
                yield done
            except Interrupted:
                raise Interrupted(self.what_comes_next()) from None
            except Exception as e:
                with contextlib.suppress(UserError, OSError):       # a full disk may be the reason
                    self.note_failure(e)
                raise
        finally:
            self.lock.close()

    def record_failure(self, error):
        """Write failed.json for a UserError from before the run is opened: its data cannot be read, say.

        Only into the folder of this very run; with fresh=True and in several processes nothing is written.
        """
        if self.fresh or dist_state.size > 1 or not os.path.exists(self.config):
            return
        with contextlib.suppress(UserError):        # the error itself, or another folder's reason to refuse
            with self.opened() as done:
                if done is None:
                    raise error

    def what_comes_next(self):
        """What the same command will do with an interrupted run."""
        with contextlib.suppress(UserError):
            step = resume_step(self.folder)
            if step is not None:
                again = "the same command without --fresh" if self.fresh else "the same command"
                return f"{again} continues from step {step}"
        return "nothing was saved yet, so the same command starts again"

    def note_failure(self, error):
        """failed.json; nothing at all for a mistake before the first step of a new run."""
        is_new = self.begun or not os.path.exists(self.config)
        is_mistake = isinstance(error, UserError) and error.code != 1
        if is_new and is_mistake and self.remove():
            return
        if not is_new and (self.fresh or self.change(self.identity)):
            return                                  # another run is still in the folder
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        write_json(self.failed, {"reason": reason.strip().split("\n")[0], "config": self.flag_values})

    def remove(self):
        """Remove the folder again, if no step was done and nothing else is in it. Returns whether it is gone."""
        if set(os.listdir(self.folder)) - {*WRITTEN, ".lock"} or any(map(os.path.exists, self.states())):
            return False
        if any(event["event"] == "train" for event in read_events(self.folder)[0]):
            return False
        for name in (*WRITTEN, ".lock"):
            (self.folder / name).unlink(missing_ok=True)
        for folder in self.made or [self.folder]:
            with contextlib.suppress(OSError):      # another run has begun in it
                folder.rmdir()
        return True

    def locked(self):
        """The folder's lock file, locked. Raises UserError, WriteError."""
        attempts = 0
        while True:
            attempts += 1
            missing = [path for path in (self.folder, *self.folder.parents) if not os.path.exists(path)]
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                lock = open(self.folder / ".lock", "w")
            except OSError as e:
                if isinstance(e, FileNotFoundError) and attempts < 100:     # another process moved it aside
                    continue
                raise WriteError(f"{cannot_write(self.folder, e)}; use another --out") from e
            self.made += missing
            if not try_lock(lock):
                lock.close()
                raise UserError(f"{self.folder} is in use by another process; wait for it, or use another "
                                "--out")
            with contextlib.suppress(OSError):
                if not fcntl or os.path.samestat(os.fstat(lock.fileno()), os.stat(self.folder / ".lock")):
                    return lock
            lock.close()                            # the lock of a folder that was moved aside

    def prepare(self):
        """Under the lock: leave what can be continued, or nothing. Raises as `finished`, and WriteError."""
        change = self.change(self.identity)
        try:
            if self.fresh:                          # only what a run writes; nothing else in there is ours
                for name in WEIGHTS:
                    shutil.rmtree(self.folder / name, ignore_errors=True)
                for name in WRITTEN:                # config.json stays, and with it a run folder, until `begin`
                    if name != self.config.name:
                        (self.folder / name).unlink(missing_ok=True)
            elif change and self.keep:
                self.accept(change, self.identity)
            elif change:
                self.move_aside(change)
            self.failed.unlink(missing_ok=True)
        except OSError as e:
            raise WriteError(f"{e.filename or self.folder} cannot be removed ({e.strerror}); use another "
                             "--out") from e
        for folder in (self.folder, *(self.folder / name for name in WEIGHTS)):
            remove_abandoned(folder)

    def move_aside(self, change):
        """Rename the folder, which is one step, and own a new one. Raises UserError, WriteError."""
        if pathlib.Path.cwd().is_relative_to(self.folder.resolve()):
            raise UserError(f"{self.folder} holds a run from before this changed: {change}; it is not moved "
                            "aside while it is the working directory: use another --out, or --fresh")
        config = read_run_config(self.folder)
        name = f"{self.folder.name}.{short_hash(from_config(config) if has_code(config) else config, 6)}"
        aside = self.folder.with_name(name)
        n = 1
        while os.path.exists(aside):
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
        config = read_run_config(self.folder)
        config["kept"] = list(dict.fromkeys([*config.get("kept", ()), *change.code]))
        config.update(config=self.flag_values, **to_config(identity))
        if self.result.exists():
            write_json(self.result, {**read_result(self.folder), **code_of(config)})
        write_json(self.config, config)
        log_progress(f"{self.folder} is kept, although it was made before this changed: {change}")

    def start(self, facts):
        """Begin or continue: write config.json of a new run, with `facts` in it, or return the last save.

        What is in the way is deleted (fresh=True) or moved aside here and not before, when the command has
        shown that it can be run. Returns None if there is no save yet. Raises as `finished`, WriteError, and
        DataError for a save of another run.
        """
        def begin_or_continue():
            with defer_signals:
                self.prepare()
            if os.path.exists(self.config) and not self.fresh:
                return self.load_state()
            self.begin(facts)
        state = distributed.broadcast(begin_or_continue)
        self.saved_at = time.monotonic()
        if state is None:
            self.rewind(-1)                         # the events of a process that was killed before its first save
            return None
        return Saved(state, self.state)

    def begin(self, facts):
        self.id = uuid.uuid4().hex
        self.begun = True
        write_json(self.config, {"config": self.flag_values, "argv": sys.argv, "id": self.id,
                                 "machine": machine(), **facts, **to_config(self.identity)})

    def add_facts(self, **facts):
        """More for config.json, known later: parameter counts, say. Raises WriteError."""
        if not dist_state.rank:
            write_json(self.config, {**read_run_config(self.folder), **facts})

    # ---- saves and the log
    def states(self):
        return [self.folder / name for name in STATES]

    def load_state(self):
        """The newest save that is whole, without its id; None if there is none. Raises DataError."""
        self.id = read_run_config(self.folder).get("id")
        saves = [path for path in self.states() if os.path.exists(path)]
        for path, older in zip(saves, [*saves[1:], None]):
            try:
                state = read_state(path)
            except Exception as e:                  # a damaged archive raises many kinds
                instead = "starting over" if older is None else "the save before it is used"
                log_progress(f"{path} is damaged ({type(e).__name__}); {instead}")
                continue
            if not isinstance(state, dict) or state.pop("id", None) != self.id:
                raise DataError(f"{path} is of another run than {self.config}; put the right file there, or "
                                "use --fresh to start over")
            return state
        return None

    def log(self, **event):
        """One line of log.jsonl, flushed. A float that JSON lacks becomes a string. Raises WriteError."""
        if dist_state.rank:
            return
        event = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in event.items()}
        path = self.folder / "log.jsonl"
        try:
            with open(path, "a") as f:
                f.write(json.dumps(event) + "\n")
        except OSError as e:
            raise cannot_write(path, e) from e

    def rewind(self, step):
        """Drop the events after `step`, where the run continues: they come again. Raises DataError, WriteError."""
        if dist_state.rank:
            return
        path = self.folder / "log.jsonl"
        events, unread = read_events(self.folder)
        if not os.path.exists(path):
            if step > 0:
                log_progress(f"{path} is missing; the new one begins at step {step}")
            return
        if unread > 0:
            log_progress(f"{path}: {unread} of {unread + len(events)} lines cannot be read and are left out")
        kept = [e for e in events
                if e["step"] < step or e["step"] == step and e["event"] not in ("valid", "test")]
        with atomic(path) as f:
            f.write("".join(json.dumps(event) + "\n" for event in kept).encode())

    def save_is_due(self):
        """Whether the last save was SAVE_SECONDS ago; longer where saves take more than 5 % of the time.

        True in process 0 alone, which sends it to the others.
        """
        wait = max(SAVE_SECONDS, 20 * self.save_seconds)
        return not dist_state.rank and time.monotonic() - self.saved_at > wait

    def save(self, state, **clock):
        """state.pt, and an event with the step from which it goes on: clock has `step`, as every event has.

        The save before stays until this one is whole. Raises WriteError.
        """
        if dist_state.rank:
            return
        began = time.monotonic()
        new, current, before = self.states()
        with atomic(new) as f:
            torch.save({**state, "id": self.id}, f)
        try:
            if current.exists():
                os.replace(current, before)
            os.replace(new, current)
        except OSError as e:
            raise cannot_write(current, e) from e
        sync_folder(self.folder)
        self.log(event="save", **clock)
        self.saved_at = time.monotonic()
        self.save_seconds = self.saved_at - began

    # ---- the end
    def finish(self, result):
        """Write result.json, with the code in it, and a line of results.jsonl. Returns the result.

        Raises WriteError.
        """
        if not dist_state.rank:
            result = {**result, **code_of(read_run_config(self.folder))}
            for path in self.states():
                if path != self.state:
                    with contextlib.suppress(OSError):
                        if self.state.exists():
                            path.unlink()
                        else:                       # killed between the two renames of its last save
                            os.replace(path, self.state)
            write_json(self.result, result)
            self.record(result)
        distributed.barrier()                       # other processes may read the folder after this
        return result

    def line(self, result, out=None):
        brief = {k: v for k, v in result.items() if k not in NOT_IN_RESULTS}
        return json.dumps({**brief, "out": out or str(self.folder)})

    def record(self, result):
        """Append to results.jsonl, whole or not at all; parallel runs wait for each other. Raises WriteError."""
        path = self.folder.parent / "results.jsonl"
        line = (self.line(result) + "\n").encode()
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                if fcntl:
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
                append_whole(descriptor, b"\n" + line if ends_torn(descriptor) else line)
            finally:
                os.close(descriptor)
        except OSError as e:
            raise cannot_write(path, e) from e

    def recorded(self, result):
        """The result. A kill just before `record` is repaired here: every finished run has its line, and no
        temporary files.

        Not while another process works in the folder, nor where the line cannot be written.
        """
        if result is not None and not self.has_line(result):
            with contextlib.suppress(UserError), self.locked():
                remove_abandoned(self.folder)
                if not self.has_line(result):
                    self.record(result)
        return result

    def has_line(self, result):
        """Whether results.jsonl has the line of this result, however --out was spelt; True if it cannot be read."""
        try:
            lines = (self.folder.parent / "results.jsonl").read_bytes().splitlines()
        except FileNotFoundError:
            return False
        except OSError:
            return True
        name = self.folder.resolve().name
        for line in lines:
            with contextlib.suppress(ValueError, TypeError, AttributeError):        # a torn line is no result
                found = json.loads(line)
                known = pathlib.Path(found.get("out")).name == name
                if known and json.dumps({**found, "out": name}) == self.line(result, name):
                    return True
        return False


def read_state(path):
    """What `save` has written. Raises one of many errors for a damaged file: each part has a CRC-32."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged:
        raise DataError(f"the checksum of {damaged} is wrong")
    return torch.load(path, map_location="cpu", weights_only=True)


def append_whole(descriptor, line):
    """Write a line at the end of a file. On a full disk the file keeps its size. Raises OSError."""
    size = os.fstat(descriptor).st_size
    try:
        if os.write(descriptor, line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError:
        os.ftruncate(descriptor, size)
        raise


def ends_torn(descriptor):
    """Whether a file has a last line without an end: a kill has cut it."""
    if os.fstat(descriptor).st_size == 0:
        return False
    os.lseek(descriptor, -1, os.SEEK_END)
    return os.read(descriptor, 1) != b"\n"
