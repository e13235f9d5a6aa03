"""tests/torture.py: break the product on purpose; print a table of kind, trials, failures.

    python tests/torture.py                              every kind, minutes; --write: into tests/README.md
    python tests/torture.py --short                      a sample, about a minute
    python tests/torture.py --kind runs --trials 500     more of one kind
    python tests/torture.py --kind runs --trial 17       one trial again, with what it printed

A trial is an empty folder, a command that is disturbed or that reads something damaged, and a verdict.
Commands run in forked children (forked.py) on the models and data of torture_world.py, a tenth of a second
each. Trial i of a kind is a function of (seed, i), but for the moment at which a signal arrives.

    operations   killed before its n-th file operation; at times a second kill, at times --fresh afterwards
    writes       killed in the middle of a write, K bytes into a file
    signals      SIGKILL, SIGTERM, SIGINT or SIGHUP at a random time
    disks        from the n-th operation on the disk is full, read-only, or full K bytes into a file: exit
                 code 74
    races        at the n-th operation another process gives the same command, to its end
                 After all of these the same command ends with exit code 0, and the folder around the run
                 holds the files of an undisturbed run, with the same content (but times, state.pt)
    data, models, adapters, runs
                 one fault (damage.py) in one file that a command reads: a documented exit code and one
                 sentence. A run that goes on from a fault ends in the same weights. A fault that cannot be
                 taken for sound never loads as another model. `--task table` shows the other runs
    flags        every flag of every task and method, but --compile, at values that no one means
    rings        adapters that stand on themselves, on each other, on nothing, on hundreds of others
    rewards      functions that are none, of other arguments, or that return, raise or do something else

Failures: a traceback (but of the user's own function), a crash, a hang, another exit code, no sentence.

Public: KINDS, Kind, Trial, World, run
"""
import argparse
import errno
import gc
import json
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Callable, NamedTuple

if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import kept_syntax
import odd_rewards
import test_matrix
import torch
import torch._dynamo                    # AdamW imports it, which takes longer than a trial    # noqa: F401
from damage import ROWS, damage
from forked import EXIT_CODES, Operations, command, judge, kill, must, refuse, tear
from torture_world import World, difference, fingerprint, snapshot, weights

import train
from data.runtime.code_hash import code_hashes

README = test_matrix.README
READ = ("--eval_items", 2, "--max_new_tokens", 2)


class Trial(NamedTuple):
    label: str
    run: Callable                       # (empty folder) -> None, or the reason why it failed


@dataclass(frozen=True)
class Kind:
    name: str
    what: str                           # in the table
    trials: Callable                    # (World, random.Random) -> Trials, for ever
    full: int                           # how many are run
    short: int


# ------------------------------------------------------------------------------- disturbed, and then once more

def in_turn(world, rng):
    """(cell, n) for ever: each cell in turn, a random operation of it; none twice before all were there."""
    order = list(world.cells)
    rng.shuffle(order)
    left = {}
    while True:
        for cell in order:
            if not left.get(cell.name):
                left[cell.name] = list(range(1, world.reference(cell).operations + 1))
                rng.shuffle(left[cell.name])
            yield cell, left[cell.name].pop()


def disturbed(world, cell, label, times, codes, fresh=False):
    """A Trial: the command, disturbed by each of `times` (prepare, stop) in turn, then undisturbed."""
    def run(folder):
        world.set_up(cell, folder)
        for prepare, stop in times:
            outcome = world.call(command(cell.argv), folder, prepare, stop)
            reason = judge(outcome, codes)
            if reason:
                return "disturbed: " + reason
        there = snapshot(folder)
        again = world.call(command([*cell.argv, *["--fresh"] * fresh]), folder)
        found = snapshot(folder)
        expected = dict(world.reference(cell).files)
        if fresh:                                           # it replaces an old run that was not yet moved aside
            for name in [name for name in expected if name.startswith("run.") and name not in there]:
                del expected[name]
        if fresh or cell.before:                            # each finished run has a line there
            for files in (found, expected):
                lines = files["results.jsonl"]
                files["results.jsonl"] = [line for i, line in enumerate(lines) if line not in lines[:i]]
        ends = (0, 2) if "merge" in cell.name else (0,)      # a merged model is not written over
        return judge(again, ends) or difference(found, expected)
    return Trial(f"{cell.name}: {label}" + ", then --fresh" * fresh, run)


def takes_fresh(cell, rng):
    return "merge" not in cell.name and rng.random() < 0.2


def operation_trials(world, rng):
    for cell, n in in_turn(world, rng):
        kills = [n]
        if rng.random() < 0.3:
            kills.append(rng.randint(1, world.reference(cell).operations))
        times = [(Operations(k, kill).install, None) for k in kills]
        label = f"killed before operation {' and '.join(map(str, kills))}"
        yield disturbed(world, cell, label, times, (0, -signal.SIGKILL), takes_fresh(cell, rng))


def some_size(rng):
    return rng.randint(0, rng.choice((20, 300, 5000, 50000)))


def write_trials(world, rng):
    for cell, n in in_turn(world, rng):
        size = some_size(rng)
        times = [(Operations(n, tear(size, signal.SIG_DFL)).install, None)]
        label = f"killed {size} bytes into a file, from operation {n} on"
        codes = (0, 74, -signal.SIGXFSZ)                # 74: a single write that was cut short, as on a full disk
        yield disturbed(world, cell, label, times, codes, takes_fresh(cell, rng))


def signal_trials(world, rng):
    for cell, _ in in_turn(world, rng):
        number = rng.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP))
        share = rng.uniform(0, 1.1)
        times = [(None, (share * world.reference(cell).seconds, number))]
        codes = (0, 75, 128 + number, -number)
        label = f"{number.name} at {share:.0%} of its time"
        yield disturbed(world, cell, label, times, codes, takes_fresh(cell, rng))


def disk_trials(world, rng):
    space = ("open", "os.mkdir", "fsync", "write")
    for cell, n in in_turn(world, rng):
        way = rng.choice(("ENOSPC", "EROFS", "EFBIG"))
        operations = Operations(n)
        operations.effect = {"ENOSPC": refuse(operations, errno.ENOSPC, space),
                             "EROFS": refuse(operations, errno.EROFS, (*space, "os.rename", "os.remove", "os.rmdir")),
                             "EFBIG": tear(some_size(rng), signal.SIG_IGN)}[way]
        yield disturbed(world, cell, f"{way} from operation {n} on", [(operations.install, None)], (0, 74))


def race_trials(world, rng):
    for cell, n in in_turn(world, rng):
        def other(event, path, cell=cell):
            reason = judge(world.call(command(cell.argv), os.getcwd()), (0, 2))
            if reason:
                print(f"the other process: {reason}", file=sys.stderr, flush=True)
                os._exit(99)
        times = [(Operations(n, other).install, None)]
        yield disturbed(world, cell, f"the same command at operation {n}", times, (0, 2))


# ----------------------------------------------------------------------------------------------------- damaged

def copy_with(source, name, fault, folder):
    """A copy of a folder, in `folder`, with a fault in one of its files."""
    copy = folder / source.name
    shutil.copytree(source, copy)
    fault.do(copy / name)
    return copy


def files_of(folder, but=()):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*")
                  if path.is_file() and path.name not in but)


def uses(world):
    """{name: words before the folder} of commands that read a model, adapter or run."""
    chat = world.folder / "chat"
    return {"eval": ["--task", "eval", "--data", chat, *READ, "--out", "measured", "--init"],
            "chat": ["--task", "chat", "--prompt", "ab", "--max_new_tokens", 2, "--init"],
            "show": ["--task", "show", "--prompt", "ab", "--max_new_tokens", 2, "--init"],
            "merge": ["--task", "merge", "--out", "merged", "--init"],
            "on top": ["--data", chat, "--steps", 1, *READ, "--forgetting_data", "none", "--out", "tuned", "--init"],
            "reward": ["--task", "sample", "--data", chat, *READ, "--out", "scored", "--init", world.folder / "base",
                       "--reward"]}


def data_trials(world, rng):
    while True:
        name = rng.choice(files_of(world.folder / "files"))
        fault = damage(world.folder / "files" / name, rng)
        row_type = ROWS[name.split(".")[0]][0]
        tasks = [task for task in train.TASKS if row_type in task.reads]
        task = rng.choice([*tasks, train.find_task("check")])
        method = "none" if not task.trains and task.name != "check" else rng.choice(("lora", "prompt_tuning"))
        argv = test_matrix.command(world.folder, task.name, method, "run") if task.name != "check" else [
            "--task", "check", "--init", world.folder / "base"]
        dry = rng.random() < 0.6 and "dry_run" in test_matrix.flags_of(task.name, method)
        argv = [*argv, *["--dry_run"] * dry, "--data", f"files/{name}"]

        def run(folder, name=name, fault=fault, argv=argv):
            copy_with(world.folder / "files", name, fault, folder)
            return judge(world.call(command(argv), folder))
        yield Trial(f"{name}: {fault.what}; {task.name} {method}{' --dry_run' * dry}", run)


def model_trials(world, rng):
    yield from reader_trials(world, [world.folder / "base", world.folder / "llama"], rng)


def adapter_trials(world, rng):
    runs = [cell for cell in world.cells if not cell.before and cell.name.split()[0] in ("sft", "tag", "reward")]
    adapters = [world.reference(cell).folder / "run" / "adapter" for cell in runs]
    yield from reader_trials(world, [folder for folder in adapters if folder.is_dir()], rng)


def reader_trials(world, sources, rng):
    """A fault in one file of a model or adapter folder, and a command that reads it."""
    sound = {source: must(world.call(lambda: fingerprint(source), world.folder)).out for source in sources}
    while True:
        source = rng.choice(sources)
        name = rng.choice(files_of(source))
        fault = damage(source / name, rng)
        use = rng.choice(["load"] * 4 + [*uses(world)])

        def run(folder, source=source, name=name, fault=fault, use=use):
            copy = copy_with(source, name, fault, folder)
            if use != "load":
                return judge(world.call(command([*uses(world)[use], copy]), folder))
            outcome = world.call(lambda: fingerprint(copy), folder)
            other = outcome.code == 0 and fault.noticed and outcome.out != sound[source]
            return judge(outcome) or ("loads as another model" if other else None)
        yield Trial(f"{'/'.join(source.parts[-3:])}/{name}: {fault.what}; {use}", run)


def run_trials(world, rng):
    """A fault in one file of a finished or interrupted run, and a command that reads it."""
    names = ("sft lora", "classify full", "reward p_tuning", "ppo lora", "sample none")
    chosen = [cell for cell in world.cells if cell.name in names]
    while True:
        cell = rng.choice(chosen)
        finished = rng.random() < 0.5
        source = world.reference(cell).folder / "run" if finished else world.interrupted_run(cell)
        name = rng.choice(files_of(source, (".lock",)))
        fault = damage(source / name, rng)
        use = rng.choice(["again"] * 4 + ["--fresh", "table", "table", *uses(world)])

        def run(folder, cell=cell, finished=finished, source=source, name=name, fault=fault, use=use):
            copy = copy_with(source, name, fault, folder)
            if use in uses(world):
                return judge(world.call(command([*uses(world)[use], copy]), folder))
            if use == "table":
                outcome = world.call(command(["--task", "table", "--runs", world.folder / "lora", copy]), folder)
                return judge(outcome, (0,)) or (None if " runs " in outcome.out else "the other run is not shown")
            outcome = world.call(command([*cell.argv, *["--fresh"] * (use == "--fresh")]), folder)
            other = weights(copy) != weights(world.reference(cell).folder / "run")
            if outcome.code == 0 and other and not (finished and use == "again"):
                return "ends in other weights"
            whole = use == "--fresh" and fault.what != "is a folder"        # which --fresh does not remove
            return judge(outcome, (0,) if whole else EXIT_CODES)
        state = "finished" if finished else "interrupted"
        yield Trial(f"{state} {cell.name}: {name}: {fault.what}; {use}", run)


# ------------------------------------------------------------------------------------ flags, rings and rewards

VALUES = ["", " ", "-1", "0", "1", "2", "-0.0", "1e-300", "1e300", "nan", "-inf", str(2 ** 63 - 1), str(10 ** 30),
          "1_000", "\uff11", "x" * 300, "x" * 5000, "é😀", "\udcff", "a\0b", "a\nb", "a\x1b[31mb", "/", "..", "/dev/null",
          "None", "true", "[]", "%s%d{0}", "--", "a=b,c", "=", "0-99999999999", "3-1", "q=9999999,v=0", ",", "toy/", "toy/x",
          "base", "chat", "lora", "lora/adapter", "files/pairs.csv", "files/text.txt", "rewards", "missing"]


def flag_trials(world, rng):
    """One flag of a command that works, or two, at odd values, or without one."""
    works = [pair for pair, outcome in test_matrix.documented().items() if outcome == "ok"]
    while True:
        task, method = rng.choice(works)
        words = []
        for _ in range(rng.choice((1, 1, 2))):
            flags = sorted(test_matrix.flags_of(task, method) - {"compile"})    # which compiles for minutes
            words += ["--" + rng.choice(flags), rng.choice(VALUES)]
        words = words[:-1] if rng.random() < 0.05 else words
        dry = rng.random() < 0.3 and "dry_run" in test_matrix.flags_of(task, method)
        argv = [*test_matrix.command(world.folder, task, method, "run"), *["--dry_run"] * dry, *words]

        def run(folder, argv=argv):
            for name in ("base", "chat", "lora", "files"):
                os.symlink(world.folder / name, folder / name)
            outcome = world.call(command(argv), folder)
            logs = "".join(log.read_text() for log in folder.glob("*/log.jsonl"))
            return judge(outcome, (*EXIT_CODES, *[75] * ('"train"' in logs)))        # trains until it is stopped
        yield Trial(f"{task} {method}{' --dry_run' * dry} {words!r:.200}", run)


def ring_trials(world, rng):
    """Folders a0, a1, ... of adapters; each stands on the next, the last on something odd."""
    while True:
        size = rng.choice((1, 1, 2, 3, 50, 300))
        odd = ("chat", "files/text.txt", "missing", "", "a\0b", "x" * 5000, "\ud800", "/", "..", None, 3, [], {"a": 1})
        last = rng.choice(("a0", "a0", "a0", f"a{size - 1}", "base", "interrupted", *odd))
        use = rng.choice(("load", *uses(world)))

        def run(folder, size=size, last=last, use=use):
            source = world.folder / "lora" / "adapter"
            config = json.loads((source / "adapter_config.json").read_text())
            shutil.copytree(world.interrupted_run(world.cells[0]), folder / "interrupted")
            for i in range(size):
                (folder / f"a{i}").mkdir()
                for name in files_of(source, ("adapter_config.json",)):
                    os.link(source / name, folder / f"a{i}" / name)
                base = f"a{i + 1}" if i + 1 < size else last
                base = str(world.folder / base) if base in ("base", "chat", "files/text.txt") else base
                (folder / f"a{i}" / "adapter_config.json").write_text(
                    json.dumps({**config, "base_model_name_or_path": base}))
            action = (lambda: fingerprint("a0")) if use == "load" else command([*uses(world)[use], "a0"])
            return judge(world.call(action, folder))
        yield Trial(f"{size} adapters, the last on {last!r:.30}; {use}", run)


FUNCTIONS = [f"odd_rewards:{name}" for name in vars(odd_rewards) if not name.startswith("__")]
FUNCTIONS += ["odd_rewards:missing", "odd_rewards:", ":", "a:b:c", "nothing:f", "broken:f", "builtins:len", "é:f",
              "..x:f", "odd_rewards:letters.x", "\0:f", "odd_rewards.py:letters", "x" * 5000 + ":f",
              "odd_rewards:length,odd_rewards:none", "odd_rewards:length,,", "odd_rewards:lists(a,b)", "odd_rewards:number(",
              "data.results.rewards:matches(*)", "data.results.rewards:matches(.*)", "data.results.rewards:last_number", "a:b(c,"]


def reward_trials(world, rng):
    pairs = [(task, method) for (task, method), outcome in test_matrix.documented().items()
             if outcome == "ok" and "reward" in test_matrix.flags_of(task, method)]
    while True:
        task, method = rng.choice(pairs)
        words = [rng.choice(("--reward", "--gold_reward")), rng.choice(FUNCTIONS)]
        argv = [*test_matrix.command(world.folder, task, method, "run"), *words]

        def run(folder, argv=argv):
            return judge(world.call(command(argv), folder), (*EXIT_CODES, 3), own_code="odd_rewards.py")
        yield Trial(f"{task} {method} {' '.join(words):.60}", run)


# ------------------------------------------------------------------------------------------------------- table

KINDS = (
    Kind("operations", "killed before any file operation", operation_trials, 600, 12),
    Kind("writes", "killed in the middle of a write", write_trials, 300, 8),
    Kind("signals", "SIGKILL, SIGTERM, SIGINT, SIGHUP at any time", signal_trials, 300, 8),
    Kind("disks", "a disk that is full or read-only from some moment on", disk_trials, 200, 8),
    Kind("races", "the same command in another process meanwhile", race_trials, 100, 4),
    Kind("data", "faults in data files", data_trials, 700, 30),
    Kind("models", "faults in model folders", model_trials, 700, 30),
    Kind("adapters", "faults in adapter folders", adapter_trials, 700, 30),
    Kind("runs", "faults in run folders", run_trials, 700, 50),
    Kind("flags", "values that no one means", flag_trials, 1000, 40),
    Kind("rings", "bases that are no base", ring_trials, 100, 10),
    Kind("rewards", "functions that break", reward_trials, 100, 10),
)


def run(kind, world, seed, number, only=None):
    """Runs trials of a kind, and yields (i, label, reason, seconds) of each."""
    trials = kind.trials(world, random.Random(f"{seed} {kind.name}"))
    for i in range(number):
        trial = next(trials)
        if only in (None, i):
            began = time.monotonic()
            yield i, trial.label, trial.run(world.new()), time.monotonic() - began


def main():
    args = argparse.ArgumentParser(description="break the product on purpose")
    args.add_argument("--short", action="store_true", help="a sample")
    args.add_argument("--kind", choices=[kind.name for kind in KINDS])
    args.add_argument("--seed", type=int, default=1)
    args.add_argument("--trials", type=int, help="of each kind")
    args.add_argument("--trial", type=int, help="this one alone")
    args.add_argument("--write", action="store_true", help="the table into tests/README.md")
    args = args.parse_args()
    torch.set_num_threads(1)
    kept_syntax.install()
    code_hashes(["train.py"])           # children find all files parsed
    torch.optim.AdamW([torch.zeros(1)])
    rows = []
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        world = World(pathlib.Path(folder), show=args.trial is not None)
        gc.freeze()                     # objects that are not visited are not copied by a fork
        for kind in KINDS:
            if args.kind not in (None, kind.name):
                continue
            began = time.monotonic()
            number = args.trials or (kind.short if args.short else kind.full)
            number = number if args.trial is None else args.trial + 1
            failed = 0
            for i, label, reason, seconds in run(kind, world, args.seed, number, args.trial):
                if reason:
                    failed += 1
                    print(f"FAILED --kind {kind.name} --seed {args.seed} --trial {i}  {label}: {reason}", flush=True)
            failures += failed
            rows.append(f"| {kind.name} | {kind.what} | {number} | {failed} |")
            print(f"{kind.name}: {number} trials, {failed} failures, {time.monotonic() - began:.0f} s", flush=True)
    words = " ".join(word for word in sys.argv[1:] if word != "--write")
    table = "\n".join([f"<!-- `python tests/torture.py {words}`".rstrip() + " prints this table -->", "",
                       "| kind | what is done | trials | failures |", "|---|---|---|---|", *rows]) + "\n"
    print(table)
    if args.write:
        before, rest = README.read_text().split("<!-- torture -->\n")
        README.write_text(before + "<!-- torture -->\n" + table + "<!-- end -->" + rest.split("<!-- end -->", 1)[1])
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
