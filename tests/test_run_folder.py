"""The run folder: identity, moving aside, --keep, locks, signals, saves. No model, no training: Run alone."""
import builtins
import contextlib
import io
import itertools
import json
import math
import os
import pathlib
import pty
import signal
import subprocess
import sys
import time

import forked
import pytest
import torch

from data.runtime import distributed, run_folder
from data.runtime.code_hash import short_hash
from data.runtime.files import DataError, UserError, WriteError, read_json, write_json
from data.runtime.run_files import failure_reason, read_events, read_result, read_run_config, resume_step
from data.runtime.run_folder import Interrupted, Run, RunError, defer_signals

ROOT = pathlib.Path(__file__).resolve().parent.parent
FLAGS = {"task": "sft", "rank": 4, "targets": ("q", "v")}
CODE = {"lora.py: LoRA.forward": "aa", "lora.py: LoRA": "bb", "train.py: run_supervised": "cc"}
SAME = {"code": CODE, "data": "d1", "base": "b1", "reward": {"my.py: score": "r1"}, "gold_reward": None}
EDITED = {**SAME, "code": {**CODE, "lora.py: LoRA.forward": "a2"}}


def other(**parts):
    return {**SAME, **parts}


def begin(folder, identity=SAME, flags=FLAGS, steps=2, **settings):
    """A run that was interrupted after some steps."""
    run = Run(folder, flags, **settings)
    with run.opened(identity):
        run.start({"device": "cpu"})
        for step in range(1, steps + 1):
            run.log(event="train", step=step)
        run.save({"step": steps}, step=steps)
    return run


def complete(folder, identity=SAME, flags=FLAGS, value=1.0, **settings):
    """A run from start to end, or from where it stopped. Returns (its result, whether it was there, its state)."""
    run = Run(folder, flags, **settings)
    if done := run.finished(identity):
        return done, True, None
    with run.opened(identity) as done:
        if done:
            return done, True, None
        state = run.start({"device": "cpu"})
        run.rewind(state["step"] if state else -1)
        run.log(event="train", step=3)
        run.save({"step": 3}, step=3)
        return run.finish({"status": "done", "metrics": {"loss": value}, "samples": [{"prompt": "long"}]}), False, state


def aside(folder):
    return sorted(p.name for p in folder.parent.iterdir() if p.name.startswith(folder.name + "."))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "r"


# ------------------------------------------------------------------------------------------------------ the same

def test_the_same_run_again_is_its_result(folder, capsys):
    first = complete(folder)
    again = complete(folder)
    assert first[1:] == (False, None) and again == (read_json(folder / "result.json"), True, None)
    assert again[0] == first[0] and not aside(folder) and capsys.readouterr().err == ""


def test_an_interrupted_run_continues(folder):
    begin(folder)
    _, _, state = complete(folder)
    assert state == {"step": 2} and not aside(folder)
    events = [(e["event"], e["step"]) for e in read_events(folder)[0]]
    assert events == [("train", 1), ("train", 2), ("save", 2), ("train", 3), ("save", 3)]


def test_added_definitions_leave_a_run_as_it_is(folder):
    complete(folder)
    assert complete(folder, other(code={**CODE, "lora.py: Mine": "xx"}))[1]
    assert not aside(folder) and read_json(folder / "config.json")["code_hashes"] == CODE


def test_config_holds_the_identity_and_the_facts(folder):
    run = begin(folder)
    run.add_facts(params_trainable=7)
    config = read_json(folder / "config.json")
    assert config["config"] == {"task": "sft", "rank": 4, "targets": ["q", "v"]}
    assert config["code"] == short_hash(CODE) and config["code_hashes"] == CODE and list(config)[-2] == "code_hashes"
    assert (config["data_sha256"], config["base_sha256"], config["reward"]) == ("d1", "b1", SAME["reward"])
    assert config["device"] == "cpu" and config["params_trainable"] == 7 and config["argv"] == sys.argv
    assert {"commit", "dirty", "python", "torch"} <= config["machine"].keys()
    result = complete(folder)[0]
    line = json.loads((folder.parent / "results.jsonl").read_text())
    assert result["code"] == line["code"] == short_hash(CODE) and "samples" not in line and "kept" not in result


# ------------------------------------------------------------------------------------------------ what has changed

CHANGES = {
    "code": (EDITED, "lora.py: LoRA.forward changed"),
    "removed code": (other(code={k: v for k, v in CODE.items() if "train" not in k}), "train.py: run_supervised changed"),
    "data": (other(data="d2"), "--data changed"), "base": (other(base="b2"), "--init changed"),
    "code of the reward": (other(reward={"my.py: score": "r2"}), "my.py: score changed"),
    "reward model": (other(reward="r2"), "--reward changed"),
    "no reward": (other(reward=None), "--reward changed"),
    "gold reward": (other(gold_reward={"gold.py: gold": "g"}), "--gold_reward changed"),
    "three": (other(code=dict.fromkeys(CODE, "new")),
              "lora.py: LoRA.forward, lora.py: LoRA, train.py: run_supervised changed"),
    "much": ({**EDITED, "code": dict.fromkeys(CODE, "new"), "data": "d2"},
             "lora.py: LoRA.forward, lora.py: LoRA, train.py: run_supervised and 1 more changed")}


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_run_is_moved_aside_and_starts_anew(what, whole, folder, capsys):
    identity, says = CHANGES[what]
    complete(folder, value=1.0) if whole else begin(folder)
    (folder / "notes.txt").write_text("mine")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    result, there, state = complete(folder, identity, value=2.0)
    assert not there and state is None and result["metrics"]["loss"] == 2.0
    name, = aside(folder)
    assert name.split(".")[1] == short_hash({k: v for k, v in SAME.items() if v is not None}, 6)
    assert {p.name: p.read_bytes() for p in (folder.parent / name).iterdir()} == before
    err = capsys.readouterr().err
    assert err == f"{says} since this run was made; the old run is now {folder.parent / name}; starting anew\n"
    assert not (folder / "notes.txt").exists()
    assert complete(folder, identity)[1] and aside(folder) == [name]                 # and now it is this one


def test_back_and_forth_keeps_every_run(folder):
    for n, identity in enumerate((SAME, EDITED, SAME, EDITED)):
        complete(folder, identity, value=float(n))
    names = aside(folder)
    assert len(names) == 3 and sum(name.endswith(".2") for name in names) == 1
    values = {read_json(folder.parent / name / "result.json")["metrics"]["loss"] for name in names}
    assert values == {0.0, 1.0, 2.0} and read_json(folder / "result.json")["metrics"]["loss"] == 3.0


def test_asking_moves_nothing(folder):
    complete(folder)
    for identity, _ in CHANGES.values():
        assert Run(folder, FLAGS).finished(identity) is None and not aside(folder)


def test_a_run_without_an_identity_has_unknown_code(folder, capsys):
    complete(folder)
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", {k: v for k, v in config.items() if k not in ("code", "code_hashes")})
    assert not complete(folder)[1] and len(aside(folder)) == 1
    assert "the code (unknown) changed since this run was made" in capsys.readouterr().err


def test_a_failure_of_the_old_run_moves_with_it(folder):
    run = begin(folder)
    with pytest.raises(RunError), run.opened(SAME):
        raise RunError("not finite")
    complete(folder, EDITED)
    assert read_json(folder.parent / aside(folder)[0] / "failed.json")["reason"] == "not finite"
    assert not (folder / "failed.json").exists()


def test_fresh_deletes_what_a_run_wrote_and_nothing_else(folder):
    complete(folder, flags={**FLAGS, "rank": 8})
    (folder / "adapter").mkdir()
    (folder / "notes.txt").write_text("mine")
    assert Run(folder, FLAGS, fresh=True).finished(SAME) is None and (folder / "result.json").exists()
    _, there, state = complete(folder, EDITED, fresh=True)
    assert not there and state is None and not aside(folder)
    assert (folder / "notes.txt").exists() and not (folder / "adapter").exists()


def test_fresh_that_is_killed_leaves_a_run_folder(folder, monkeypatch):
    """At each of its deletions: the same command still finds a folder of its own."""
    original = pathlib.Path.unlink
    for at in range(len(run_folder.WRITTEN)):
        complete(folder, fresh=True)
        calls = itertools.count()

        def unlink(path, missing_ok=False):
            if next(calls) == at:
                raise KeyboardInterrupt
            return original(path, missing_ok)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(pathlib.Path, "unlink", unlink)
            complete(folder, fresh=True)
        assert complete(folder)[0]["status"] == "done"


# --------------------------------------------------------------------------------------------------------- keep

def test_keep_accepts_a_finished_run(folder, capsys):
    complete(folder, value=1.0)
    result, there, _ = complete(folder, EDITED, value=2.0, keep=True)
    assert there and result["metrics"]["loss"] == 1.0 and not aside(folder)
    assert result["kept"] == ["lora.py: LoRA.forward"] and result["code"] == short_hash(EDITED["code"])
    assert read_json(folder / "result.json") == result
    assert f"{folder} is kept, although" in capsys.readouterr().err
    assert complete(folder, EDITED)[1]                              # from then on it is a run of this code
    lines = [json.loads(line) for line in (folder.parent / "results.jsonl").read_text().splitlines()]
    assert [line.get("kept") for line in lines] == [None, ["lora.py: LoRA.forward"]]
    complete(folder, other(code={**EDITED["code"], "lora.py: LoRA": "b2"}), keep=True)
    assert read_json(folder / "result.json")["kept"] == ["lora.py: LoRA.forward", "lora.py: LoRA"]


def test_keep_continues_an_interrupted_run(folder):
    begin(folder)
    result, there, state = complete(folder, other(reward={"my.py: score": "r2"}, code=EDITED["code"]), keep=True)
    assert not there and state == {"step": 2} and not aside(folder)
    assert result["kept"] == ["lora.py: LoRA.forward", "my.py: score"] == read_json(folder / "config.json")["kept"]


@pytest.mark.parametrize("part", ["data", "base", "reward"])
def test_keep_is_for_code_only(part, folder):
    complete(folder)
    label = {"data": "--data", "base": "--init"}.get(part, "--reward")
    for act in (Run(folder, FLAGS, keep=True).finished, lambda identity: complete(folder, identity, keep=True)):
        with pytest.raises(UserError, match=f"{label} changed since this run was made, and --keep accepts"):
            act(other(**{part: "new"}))
    assert not aside(folder) and complete(folder)[1]


def test_keep_without_a_change_says_nothing(folder, capsys):
    complete(folder)
    assert "kept" not in complete(folder, keep=True)[0] and capsys.readouterr().err == ""
    unknown = read_json(folder / "config.json")
    write_json(folder / "config.json", {k: v for k, v in unknown.items() if k not in ("code", "code_hashes")})
    assert complete(folder, keep=True)[0]["kept"] == ["the code (unknown)"]
    assert complete(folder)[1]


def test_keep_that_is_killed_in_between_has_accepted_nothing(folder, monkeypatch):
    complete(folder)
    original = run_folder.write_json

    def write(path, content):
        if path.name == "config.json":
            raise KeyboardInterrupt
        original(path, content)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run_folder, "write_json", write)
        complete(folder, EDITED, keep=True)
    assert Run(folder, FLAGS).finished(EDITED) is None
    assert complete(folder, EDITED, keep=True)[0]["kept"] == ["lora.py: LoRA.forward"]


# -------------------------------------------------------------------------------------------------------- flags

@pytest.mark.parametrize("identity", [SAME, EDITED])
@pytest.mark.parametrize("settings", [{}, {"keep": True}])
def test_other_flags_are_an_error(settings, identity, folder):
    complete(folder)
    for act in (Run.finished, lambda run, identity: run.opened(identity).__enter__()):
        run = Run(folder, {**FLAGS, "rank": 8}, **settings)
        with pytest.raises(UserError) as e:
            act(run, identity)
        assert str(e.value) == (f"{folder} holds a run with --rank 4; this command says --rank 8. Use another --out, "
                                "or --fresh to start over") and e.value.code == 2
        assert not run.lock or run.lock.closed
    assert not aside(folder) and not (folder / "failed.json").exists() and complete(folder)[1]


def test_a_flag_that_the_run_lacks_counts_as_its_default(folder):
    complete(folder)
    more = {"gamma": 1.0, "which": ("a",), **FLAGS}
    assert complete(folder, flags=more, defaults={"gamma": 1.0, "which": ["a"]})[1]
    with pytest.raises(UserError, match="--gamma 1.0; this command says --gamma 0.9"):
        complete(folder, flags={**more, "gamma": 0.9}, defaults={"gamma": 1.0, "which": ["a"]})
    with pytest.raises(UserError, match="--which None; this command says --which"):
        complete(folder, flags=more, defaults={"gamma": 1.0})
    with pytest.raises(UserError, match="--task sft; this command says --task ppo"):        # what both have, first
        complete(folder, flags={**more, "task": "ppo"})


def test_a_flag_that_is_gone(folder, capsys):
    for off in (None, False):                       # as of a variant that was tried and taken out again
        complete(folder, flags={**FLAGS, "old": off}, fresh=True)
        assert complete(folder)[1]
    complete(folder, flags={**FLAGS, "old": 3}, fresh=True)
    assert complete(folder, keep=True)[0]["kept"] == ["--old (gone)"] and complete(folder)[1]
    complete(folder, flags={**FLAGS, "old": 3}, fresh=True)
    assert not complete(folder)[1] and len(aside(folder)) == 1
    assert "--old (gone) changed since" in capsys.readouterr().err


def test_a_renamed_flag_and_value_are_the_same(folder):
    old = {"task": "sft", "method": "prefix", "n_virtual": 8, "start": None}
    new = {"task": "sft", "method": "prefix_tuning", "num_virtual_tokens": 8, "prompt_init": None}
    complete(folder, flags=old)
    assert complete(folder, flags=new)[1]
    with pytest.raises(UserError, match="--num_virtual_tokens 8; this command says --num_virtual_tokens 9"):
        complete(folder, flags={**new, "num_virtual_tokens": 9})


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    (tmp_path / "model").mkdir()
    write_json(tmp_path / "model" / "config.json", {"model_type": "gpt2"})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    for name, says in (("model", "holds a model, not a run"), ("mine", "is not a run folder")):
        for fresh in (False, True):
            with pytest.raises(UserError, match=says):
                complete(tmp_path / name, fresh=fresh)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


# ----------------------------------------------------------------------------------------- crashes and neighbours

KILLS = {"before the move": "os.rename = lambda *a: os._exit(9)",
         "after the move": "rename = os.rename\nos.rename = lambda *a: (rename(*a), os._exit(9))",
         "before the new lock": "run_folder.log_progress = lambda *a: os._exit(9)",
         "before it starts": "run_folder.Run.start = lambda *a: os._exit(9)",
         "before config.json": "run_folder.Run.begin = lambda *a: os._exit(9)",
         "inside config.json": "os.replace = lambda *a: os._exit(9)"}


@pytest.mark.parametrize("when", KILLS)
def test_a_kill_at_any_step_loses_nothing(when, folder):
    def patched():
        exec(KILLS[when], {"os": os, "run_folder": run_folder})
        print(complete(folder, EDITED, value=2.0))
        return 0

    complete(folder, value=1.0)
    ended = forked.call(patched, folder.parent)
    assert ended.code == 9 and not ended.out, ended
    assert complete(folder, EDITED, value=2.0)[0]["metrics"]["loss"] == 2.0
    name, = aside(folder)
    assert read_json(folder.parent / name / "result.json")["metrics"]["loss"] == 1.0


OPERATIONS = ((os, "replace"), (os, "rename"), (os, "open"), (builtins, "open"), (os, "unlink"), (os, "mkdir"),
              (os, "write"), (os, "fsync"))
AGAIN = {                                               # what is in the folder, the arguments of the command
    "new": (lambda folder: None, {}), "interrupted": (begin, {}), "interrupted, --keep": (begin, dict(keep=True)),
    "finished, --fresh": (complete, dict(fresh=True)), "finished, other code": (complete, {})}


def killed_at(n, act):
    """act() in a child that is killed before its n-th file operation. Returns whether it came to that."""
    child = os.fork()
    if not child:
        calls = itertools.count(1)

        def killing(original):
            return lambda *a, **k: os._exit(9) if next(calls) == n else original(*a, **k)

        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        os.fsync = lambda descriptor: None
        for module, name in OPERATIONS:
            setattr(module, name, killing(getattr(module, name)))
        io.open = builtins.open
        act()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.parametrize("case", AGAIN)
def test_a_kill_at_any_file_operation_leaves_nothing_behind(case, tmp_path, monkeypatch):
    """The same command then ends with the right result, one line in results.jsonl and no other file."""
    before, settings = AGAIN[case]
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    for n in itertools.count(1):
        folder = tmp_path / str(n) / "r"
        before(folder)
        if not killed_at(n, lambda: complete(folder, EDITED, value=2.0, **settings)):
            break
        assert complete(folder, EDITED, value=2.0, **settings)[0]["metrics"]["loss"] == 2.0, n
        left = {path.name for path in folder.iterdir()}
        assert left == {"config.json", "log.jsonl", "state.pt", "result.json", ".lock"}, n
        lines = (tmp_path / str(n) / "results.jsonl").read_text().splitlines()
        assert sum('"loss": 2.0' in line for line in lines) == 1 + ("fresh" in case and len(lines) > 2), n
    assert n > 30


STARTS = """
import os, sys, time
sys.path[:0] = {paths!r}
import test_run_folder as t
from data.runtime import run_folder
folder = t.pathlib.Path(sys.argv[1])
start = run_folder.Run.start
run_folder.Run.start = lambda *a: (time.sleep(0.3), start(*a))[1]
(folder.parent / f"ready.{{os.getpid()}}").write_text("")
while not (folder.parent / "go").exists():
    time.sleep(0.001)
print(t.complete(folder, t.EDITED, value=2.0)[0]["metrics"]["loss"])
"""


def test_parallel_starts_move_the_old_run_once(folder, python):
    """Four processes at once: each ends with the new result or finds the folder in use; one old run is aside."""
    complete(folder, value=1.0)
    words = [python, "-c", STARTS.format(paths=[str(ROOT), str(ROOT / "tests")]), str(folder)]
    all_ = [subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    end = time.monotonic() + 120
    while len(list(folder.parent.glob("ready.*"))) < len(all_) and time.monotonic() < end:
        time.sleep(0.01)
    (folder.parent / "go").write_text("")
    found = [(p.communicate(timeout=120), p.returncode) for p in all_]
    done = [out.strip() for (out, _), code in found if code == 0]
    assert done and set(done) == {"2.0"}
    assert all("is in use by another process" in err for (_, err), code in found if code)
    name, = aside(folder)
    assert read_json(folder.parent / name / "result.json")["metrics"]["loss"] == 1.0
    assert sum("the old run is now" in err for (_, err), _ in found) == 1
    assert len((folder.parent / "results.jsonl").read_text().splitlines()) == 2


def test_a_lock_of_a_folder_that_was_moved_is_no_lock(folder, monkeypatch):
    """Between opening and locking the file, another process moves the folder aside."""
    begin(folder)
    original, calls = run_folder.fcntl.flock, []

    def flock(lock, how):
        calls.append(lock.name)
        if len(calls) == 1:
            folder.rename(folder.parent / "away")
        original(lock, how)

    monkeypatch.setattr(run_folder.fcntl, "flock", flock)
    with Run(folder, FLAGS).opened(SAME):
        assert len(calls) == 2 and folder.exists()
        monkeypatch.undo()
        with pytest.raises(UserError, match="in use by another process"), Run(folder, FLAGS).opened(SAME):
            pass


def test_one_process_at_a_time_also_while_it_moves(folder):
    begin(folder)
    with Run(folder, FLAGS).opened(EDITED):
        with pytest.raises(UserError, match="in use by another process"), Run(folder, FLAGS).opened(EDITED):
            pass
        assert not (folder / "failed.json").exists()
    with Run(folder, FLAGS).opened(EDITED) as done:
        assert done is None


def test_what_another_process_has_finished_since_is_the_result(folder):
    run = Run(folder, FLAGS)
    assert run.finished(SAME) is None
    complete(folder)
    with run.opened(SAME) as done:
        assert done["status"] == "done"


def test_the_working_directory_is_not_moved(folder, monkeypatch):
    complete(folder)
    monkeypatch.chdir(folder)
    for name in (folder, "."):
        with pytest.raises(UserError, match="it is the working directory"):
            complete(pathlib.Path(name), EDITED)
    assert not aside(folder) and complete(folder)[1]


def test_a_move_that_fails_is_a_sentence(folder, monkeypatch):
    complete(folder)

    def rename(*args):
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(WriteError, match="cannot be moved aside .Device or resource busy.: use another --out"):
        complete(folder, EDITED)
    assert complete(folder)[1]


@pytest.mark.parametrize("settings", [{}, {"fresh": True}])
def test_a_kill_while_config_is_written_leaves_our_folder(settings, folder):
    folder.mkdir()
    left = [folder / ".config.json.999999999.tmp", folder / ".state.new.pt.999999999.tmp"]
    for path in left:
        path.write_text("{")
    (folder / ".lock").write_text("")
    (folder / ".mine.tmp").write_text("")
    assert not complete(folder, **settings)[1]
    assert not any(path.exists() for path in left) and (folder / ".mine.tmp").exists()


# ------------------------------------------------------------------------------------------------ several processes

def test_ranks_need_the_same_identity(folder, monkeypatch):
    monkeypatch.setattr(distributed, "broadcast", lambda f: EDITED)
    with pytest.raises(DataError, match="has another lora.py: LoRA.forward than process 0"):
        Run(folder, FLAGS).finished(SAME)
    monkeypatch.setattr(distributed, "broadcast", lambda f: other(data="d2"))
    with pytest.raises(DataError, match="has another --data than process 0"), Run(folder, FLAGS).opened(SAME):
        pass


RANKS = """
import os, sys
sys.path[:0] = {paths!r}
import test_run_folder as t
from data.runtime import distributed
distributed.start()
folder = t.pathlib.Path(sys.argv[1])
for identity, value in ((t.SAME, 1.0), (t.EDITED, 2.0), (t.EDITED, 3.0)):
    result, there, state = t.complete(folder, identity, value=value)
    outcome = result["metrics"]["loss"] if there else "anew"
    os.write(1, f"{{os.environ['RANK']}} {{value}} {{outcome}} {{state}}\\n".encode())
distributed.end()
"""


def test_two_processes_decide_alike(folder, python):
    code = folder.parent / "job.py"
    code.write_text(RANKS.format(paths=[str(ROOT), str(ROOT / "tests")]))
    p = subprocess.run([python, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0",
                        "--standalone", str(code), str(folder)], capture_output=True, text=True, timeout=200,
                       env={**os.environ, "PYTHON_EXEC": python})
    assert p.returncode == 0, p.stderr
    says = [(1.0, "anew"), (2.0, "anew"), (3.0, "2.0")]
    assert sorted(p.stdout.split("\n")[:-1]) == [f"{rank} {v} {w} None" for rank in (0, 1) for v, w in says]
    assert len(aside(folder)) == 1 and p.stderr.count("the old run is now") == 1
    assert len((folder.parent / "results.jsonl").read_text().splitlines()) == 2


# ---------------------------------------------------------------------------------------------- failures and disks

def test_a_failed_run_says_why_and_the_next_try_starts_clean(folder):
    """Also where it failed before config.json; a signal is no failure; nor is a folder in use."""
    run = Run(folder, {"rank": 4})
    for error, reason in ((RunError("not finite"), "not finite"), (KeyError("x"), "KeyError: 'x'")):
        with pytest.raises(type(error)), run.opened():
            run.start({})
            assert not run.failed.exists()
            raise error
        assert read_json(run.failed) == {"reason": reason, "config": {"rank": 4}}
        assert run.finished() is None                   # the folder is ours, to be tried again
    with run.opened():
        run.start({})
        with pytest.raises(UserError), Run(folder, {"rank": 4}).opened():
            pass
        assert not run.failed.exists()
    with pytest.raises(Interrupted), run.opened():
        raise Interrupted
    assert not run.failed.exists()


@pytest.mark.parametrize("begins", [False, True])
def test_a_mistake_before_the_first_step_leaves_no_folder(begins, tmp_path):
    """Nor the folders around it; where a step was done, or an earlier command has begun, it is recorded."""
    folder = tmp_path / "a" / "b" / "r"

    def fail(event):
        run = Run(folder, FLAGS)
        with pytest.raises(UserError), run.opened(SAME):
            if begins:
                run.start({})
                run.log(event=event, step=1)
            raise UserError("no such label")

    fail("baseline")
    assert not (tmp_path / "a").exists()
    if begins:
        fail("train")
        assert read_json(folder / "failed.json")["reason"] == "no such label"
    begin(folder, steps=0, fresh=True)
    fail("baseline")
    assert read_json(folder / "failed.json")["reason"] == "no such label"


def test_a_mistake_leaves_the_run_that_is_there_alone(folder):
    """With --fresh, or after an edit: until the command has shown that it can begin."""
    complete(folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    for settings in (dict(fresh=True), {}):
        run = Run(folder, FLAGS, **settings)
        with pytest.raises(UserError), run.opened(EDITED):
            raise UserError("no such template")
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == before and not aside(folder)


def test_a_failure_is_not_recorded_in_a_run_that_another_process_has_finished(folder, monkeypatch):
    run = begin(folder)
    locked = run.locked
    monkeypatch.setattr(run, "locked", lambda: (complete(folder), locked())[1])
    run.record_failure(DataError("later does not exist"))
    assert (folder / "result.json").exists() and not (folder / "failed.json").exists()


def test_every_finished_run_has_its_line(tmp_path, monkeypatch):
    """A kill between result.json and results.jsonl is repaired by the same command, once; an older line of the same
    folder is not this run's."""
    lines = tmp_path / "results.jsonl"
    for name in ("a", "ab"):
        complete(tmp_path / name)
    written = lines.read_text()
    assert written.count("\n") == 2
    lines.write_text(written.splitlines()[1] + "\n")
    for _ in range(2):
        assert complete(tmp_path / "a")[1]
        assert sorted(lines.read_text().splitlines()) == sorted(written.splitlines())
    with monkeypatch.context() as patch:                    # the same folder, spelt in another way
        patch.chdir(tmp_path)
        assert complete(pathlib.Path("a"))[1]
    lines.write_text("torn {\n[1]\n3\n" + lines.read_text())
    assert complete(tmp_path / "a")[1] and lines.read_text().count("\n") == 5
    complete(tmp_path / "a", EDITED, value=2.0)
    lines.write_text(written)
    complete(tmp_path / "a", EDITED)
    assert len(lines.read_text().splitlines()) == 3


def flip(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def test_a_flipped_bit_in_a_save_never_becomes_other_numbers(folder, capsys):
    """Each tenth of the file: the save before it is used, or the bit stands for nothing."""
    run = begin(folder)
    run.save({"step": 3, "weights": torch.arange(64.0)}, step=3)
    whole = run.state.read_bytes()
    used = []
    for byte in range(0, len(whole), len(whole) // 40):
        run.state.write_bytes(whole)
        flip(run.state, 8 * byte + 5)
        state = Run(folder, FLAGS).load_state()
        used.append(state["step"])
        assert used[-1] == 2 or torch.equal(state["weights"], torch.arange(64.0))
    assert used.count(2) > 20 and "state.pt is damaged" in capsys.readouterr().err


def test_a_finished_run_on_a_read_only_disk_is_its_result(folder, monkeypatch, capsys):
    """Also where its line of results.jsonl is missing, or where that file cannot be read."""
    result, _, _ = complete(folder)
    (folder.parent / "results.jsonl").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "mkdir", lambda *a, **k: (_ for _ in ()).throw(OSError(30, "Read-only file system")))
        assert Run(folder, FLAGS).finished(SAME) == result
        assert not (folder.parent / "results.jsonl").exists()
    (folder.parent / "results.jsonl").mkdir()
    assert Run(folder, FLAGS).finished(SAME) == result
    (folder.parent / "results.jsonl").rmdir()
    (folder.parent / "results.jsonl").write_bytes(b"\xff\n{torn")
    assert complete(folder)[1] and complete(folder)[1]
    lines = (folder.parent / "results.jsonl").read_bytes().splitlines()
    assert lines[:2] == [b"\xff", b"{torn"] and [json.loads(line)["status"] for line in lines[2:]] == ["done"]


def test_a_folder_where_a_file_should_be_is_one_sentence(folder):
    for name in ("log.jsonl", "state.pt"):
        begin(folder, fresh=True)
        (folder / name).unlink()
        (folder / name).mkdir()
        if name == "log.jsonl":
            with pytest.raises(DataError, match="log.jsonl cannot be read .Is a directory."):
                complete(folder)
        with pytest.raises(WriteError, match=f"{name} cannot be removed .Is a directory.; use another --out"):
            complete(folder, fresh=True)
        (folder / name).rmdir()


def test_a_missing_log_is_said(folder, capsys):
    begin(folder)
    (folder / "log.jsonl").unlink()
    complete(folder)
    assert f"{folder / 'log.jsonl'} is missing; the new one begins at step 2\n" in capsys.readouterr().err
    begin(folder, fresh=True)
    with open(folder / "log.jsonl", "ab") as f:
        f.write(b'{"event": "train", "a": {"b": 1}\n\xff\n{"event": "train"}\n')
    complete(folder)
    assert "log.jsonl: 3 of 6 lines cannot be read and are left out\n" in capsys.readouterr().err
    assert [e["event"] for e in read_events(folder)[0]] == ["train", "train", "save", "train", "save"]


def test_a_damaged_save_falls_back_to_the_one_before_or_starts_over(folder, capsys):
    run = begin(folder)
    run.save({"step": 3}, step=3)
    run.state.write_bytes(run.state.read_bytes()[:100])
    assert Run(folder, FLAGS).load_state() == {"step": 2}
    assert "state.pt is damaged (BadZipFile); the save before it is used" in capsys.readouterr().err
    (folder / "state.prev.pt").unlink()
    assert complete(folder)[2] is None
    assert "state.pt is damaged (BadZipFile); starting over" in capsys.readouterr().err


def test_a_save_of_another_run_is_an_error(folder):
    begin(folder, steps=2)
    begin(folder.parent / "other", steps=3)
    for content in ((folder.parent / "other" / "state.pt").read_bytes(), pickled([1]), pickled({"step": 1})):
        (folder / "state.pt").write_bytes(content)
        with pytest.raises(DataError, match="state.pt is of another run than .*config.json; put the right file there"):
            complete(folder)
    assert not complete(folder, fresh=True)[1]


def pickled(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def test_a_run_from_before_saves_had_an_id_continues(folder):
    run = begin(folder)
    write_json(folder / "config.json", {k: v for k, v in read_json(folder / "config.json").items() if k != "id"})
    run.state.write_bytes(pickled({"step": 2}))
    assert complete(folder)[2] == {"step": 2}


def test_saves_tell_from_which_step_the_run_continues(folder):
    assert resume_step(folder) is None
    run = begin(folder, steps=0)
    assert resume_step(folder) == 0
    run.log(event="train", step=7)
    assert resume_step(folder) == 0
    run.save({"step": 7}, step=7)
    assert resume_step(folder) == 7
    for name in ("state.pt", "state.prev.pt"):
        (folder / name).unlink()
    assert resume_step(folder) is None


def test_a_save_is_due_after_two_minutes_or_twenty_times_its_own_time(folder, monkeypatch):
    run = begin(folder)
    clock = [run.saved_at]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    clock[0] += 119
    assert not run.save_is_due()
    clock[0] += 2
    assert run.save_is_due()
    run.save({"step": 3}, step=3)
    assert not run.save_is_due()
    run.save_seconds = 30.0
    clock[0] += 599
    assert not run.save_is_due()
    clock[0] += 2
    assert run.save_is_due()
    monkeypatch.setattr(distributed.dist_state, "rank", 1)
    assert not run.save_is_due()


def test_what_cannot_be_written_is_code_74(folder, monkeypatch):
    run = begin(folder)
    (folder.parent / "file").write_text("")
    with pytest.raises(WriteError, match="cannot be written") as e:
        complete(folder.parent / "file" / "x")
    assert e.value.code == 74

    def full(*args, **kw):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(WriteError, match="No space left on device") as e:
        patch.setattr(torch, "save", full)
        run.save({"step": 9}, step=9)
    assert e.value.code == 74 and torch.load(run.state, weights_only=True)["step"] == 2
    assert not list(folder.glob(".*.tmp"))
    with monkeypatch.context() as patch, pytest.raises(WriteError, match="log.jsonl cannot be written"):
        patch.setattr("builtins.open", full)
        run.log(event="train", step=3)
    with monkeypatch.context() as patch, pytest.raises(WriteError, match="results.jsonl cannot be written"):
        patch.setattr(os, "open", full)
        run.record({"status": "done"})
    assert complete(folder)[2] == {"step": 2}


def test_the_log_forgets_what_will_happen_again(folder):
    run = begin(folder, steps=4)
    run.log(event="valid", step=2, loss=math.nan)
    with open(folder / "log.jsonl", "a") as f:
        f.write('{"event": "tr')
    assert '"loss": "nan"' in (folder / "log.jsonl").read_text()
    run.rewind(2)
    assert [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] == [
        {"event": "train", "step": 1}, {"event": "train", "step": 2}]


# ------------------------------------------------------------------------------------------------ damaged files

DAMAGED = {                                             # file: (content, what the sentence says)
    "config.json": (("[]", "holds [], and an object belongs there"), ("null", "holds null"), ("{", "is not valid JSON"),
                    ("{}", 'has no "config"'), ('{"config": 3}', '"config" is 3, and an object of strings'),
                    ('{"config": {"task": ["sft"]}}', '"config": "task" is ["sft"], and a string belongs there'),
                    ('{"config": {"rank": {"a": 1}}}', '"config" is {"rank": {"a": 1}}'),
                    ('{"config": {}, "code_hashes": ["a"]}', '"code_hashes" is ["a"], and an object of hashes'),
                    ('{"config": {}, "kept": [1]}', '"kept" is [1], and a list of strings')),
    "result.json": (("[]", "holds []"), ("{}", 'has no "metrics"'), ('{"metrics": [1]}', '"metrics" is [1]'),
                    ('{"metrics": {"loss": "low"}}', "an object of numbers"), ('{"metrics": {"loss": true}}', "numbers"),
                    ('{"metrics": {"loss": 1%s}}' % ("0" * 400), "an object of numbers"),
                    ('{"metrics": {}, "samples": [["a"]]}', "a list of objects of strings"),
                    ('{"metrics": {}, "item_correct": 101}', '"item_correct" is 101, and a string of 0 and 1 belongs there')),
    "failed.json": (("3", "holds 3"), ("{}", 'has no "reason"'), ('{"reason": null}', '"reason" is null'))}
READERS = {"config.json": read_run_config, "result.json": read_result, "failed.json": failure_reason}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_one_sentence(name, tmp_path):
    for content, says in DAMAGED[name]:
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError) as e:
            READERS[name](tmp_path)
        assert says in str(e.value) and str(e.value).startswith(str(tmp_path / name)) and "\n" not in str(e.value)


@pytest.mark.parametrize("name", ["config.json", "result.json"])
def test_a_run_with_a_damaged_file_can_start_over(name, folder):
    for content, says in DAMAGED[name]:
        complete(folder, fresh=True)
        (folder / name).write_text(content)
        with pytest.raises(DataError) as e:
            complete(folder)
        assert says in str(e.value) and str(e.value).endswith("; use --fresh to start over")
        assert not complete(folder, fresh=True)[1] and complete(folder)[1]


def test_whole_files_are_read_as_they_were_written(folder):
    result = complete(folder)[0]
    assert read_result(folder) == result and read_run_config(folder) == read_json(folder / "config.json")
    assert failure_reason(folder) is None
    write_json(folder / "result.json", {"metrics": {"kl": "inf", "loss": 1.5}})
    assert read_result(folder)["metrics"] == {"kl": math.inf, "loss": 1.5}


def test_a_run_without_its_config_can_be_started_over(tmp_path):
    begin(tmp_path / "r")
    (tmp_path / "r" / "config.json").unlink()
    with pytest.raises(UserError, match="r holds a run whose config.json is gone; use --fresh to start over"):
        Run(tmp_path / "r", FLAGS).finished(SAME)
    assert Run(tmp_path / "r", FLAGS, fresh=True).finished(SAME) is None
    (tmp_path / "r" / "mine.txt").write_text("no file of a run")
    with pytest.raises(UserError, match="is not a run folder"):
        Run(tmp_path / "r", FLAGS, fresh=True).finished(SAME)


def test_lines_of_the_log_that_are_no_event_are_left_out(tmp_path):
    good = b'{"event": "train", "step": 1, "loss": "nan"}\n'
    bad = [b'{"event": "train", "step": 2, "ranks": {"q": 1}', b'{"event": "train"}', b'{"step": 3}', b"[]", b"\xff",
           b'{"event": "train", "step": "4"}', b'{"event": "train", "step": "nan"}', b"[" * 99999, b'{"event": "tr']
    (tmp_path / "log.jsonl").write_bytes(good + b"\n".join(bad) + b"\n" + good)
    assert read_events(tmp_path) == ([json.loads(good)] * 2, len(bad))
    (tmp_path / "log.jsonl").unlink()
    assert read_events(tmp_path) == ([], 0)
    (tmp_path / "log.jsonl").mkdir()
    with pytest.raises(DataError, match="log.jsonl cannot be read .Is a directory."):
        read_events(tmp_path)


# ----------------------------------------------------------------------------------------- signals and the terminal

def test_signals_are_deferred_and_let_through():
    deferring = run_folder.DeferSignals()
    with deferring.installed():
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
    with deferring.installed():
        done = []
        with pytest.raises(Interrupted):
            with deferring:
                with deferring:
                    os.kill(os.getpid(), signal.SIGINT)
                done.append("all of the block")
        assert done and deferring.pending == signal.SIGINT


def test_an_ignored_signal_stays_ignored():
    """nohup ignores SIGHUP; a shell script ignores SIGINT in its background jobs."""
    deferring = run_folder.DeferSignals()
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with deferring.installed():
            signal.raise_signal(signal.SIGHUP)
            assert signal.getsignal(signal.SIGTERM) == deferring.handler
        assert deferring.pending is None and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_closed_terminal_interrupts_and_its_last_words_are_no_error(folder):
    """The terminal sends SIGHUP, perhaps twice, and then cannot be written."""
    child, terminal = pty.fork()
    if not child:
        code = 1
        try:
            with defer_signals.installed():
                try:
                    with Run(folder, FLAGS).opened(SAME):
                        begin(folder.parent / "ready")
                        time.sleep(60)
                except Interrupted as e:
                    signal.raise_signal(signal.SIGHUP)
                    run_folder.log_progress("interrupted")
                    run_folder.print_result("interrupted")
                    os.write(2, b"a bar")
                    (folder.parent / "said").write_text(str(e))
                    code = 75
        finally:
            os._exit(code)
    while not (folder.parent / "ready" / "state.pt").exists():
        time.sleep(0.01)
    time.sleep(0.1)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 75
    assert (folder.parent / "said").read_text() == "nothing was saved yet, so the same command starts again"


def test_stdout_on_a_full_disk_is_code_74(monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(WriteError, match="stdout cannot be written .No space left on device.; free some space"):
            run_folder.print_result("x" * 10)
        run_folder.print_result("the rest goes nowhere")
        with contextlib.suppress(OSError):
            full.close()


def test_a_signal_while_the_run_is_moved_waits_for_the_end(folder, monkeypatch):
    complete(folder)
    rename = os.rename

    def signalled(*args):
        signal.raise_signal(signal.SIGTERM)
        rename(*args)

    with defer_signals.installed(), monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(os, "rename", signalled)
        complete(folder, EDITED)
    assert len(aside(folder)) == 1 and os.listdir(folder) == [".lock"]
    with defer_signals.installed():
        assert not complete(folder, EDITED)[1]


def test_a_terminal_without_our_letters_shows_question_marks(monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    run_folder.print_result("caf\u00e9")
    assert stdout.buffer.getvalue() == b"caf?\n"


def test_a_closed_pipe_ends_the_printing_only(python):
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); from data.runtime.run_folder import print_result\n"
            "sys.stdin.read()\nfor _ in range(3): print_result('x' * 100000)\nprint('still here', file=sys.stderr)")
    p = subprocess.Popen([python, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE, text=True)
    p.stdout.close()
    p.stdin.close()
    assert p.wait(timeout=120) == 0 and p.stderr.read() == "still here\n"
    p.stderr.close()


def test_no_error_is_a_base_class_in_disguise():
    assert not issubclass(Interrupted, Exception)
    assert [error("x").code for error in (RunError, UserError, DataError, WriteError)] == [1, 2, 65, 74]


def test_a_run_killed_between_the_renames_of_its_last_save_keeps_its_state(tmp_path):
    run = Run(tmp_path / "r", {"task": "sft"})
    with run.opened():
        run.start({})
        run.save({"step": 1}, step=1)
        run.save({"step": 2}, step=2)
        os.replace(run.state, tmp_path / "r" / "state.new.pt")
        run.finish({"status": "done"})
    assert torch.load(run.state, weights_only=True)["step"] == 2
    assert sorted(path.name for path in (tmp_path / "r").glob("*.pt")) == ["state.pt"]


def test_an_interrupted_fresh_run_goes_on_without_the_flag(tmp_path):
    """The same command with --fresh would delete what was saved."""
    run = run_folder.Run(tmp_path / "run", {"a": 1}, fresh=True)
    with pytest.raises(run_folder.Interrupted) as stopped, run.opened({}):
        run.start({})
        run.save({"x": 1}, step=5)
        raise run_folder.Interrupted
    assert "the same command without --fresh continues from step 5" in str(stopped.value)
