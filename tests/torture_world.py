"""tests/torture_world.py: what torture.py breaks: models, data, commands, and what these do undisturbed.

A Cell is a command that writes a folder `run` into its working directory: every task with every method that
writes one (test_matrix.py), two of them also over a finished run, with --fresh or after its data changed. A
Reference is what its undisturbed run leaves behind. Both are made when they are first needed.

Public: World, Cell, Reference, snapshot, difference, weights, fingerprint
"""
import itertools
import json
import pathlib
import re
import shutil
import sys
import time
from typing import NamedTuple

import test_matrix
import tiny
import torch
from damage import write_data_files
from forked import Operations, call, command, kill, must

import train
from data.checkpoints.safetensors import read_tensors, write_tensors
from data.runtime.code_hash import code_hashes
from data.runtime.files import UserError, write_json
from data.text.tokenizer import Tokenizer
from model import GPT, GPTConfig

NOT_COMPARED = re.compile(r".*seconds?(_.*)?|.*memory_mb|argv|machine|id")
SHORT = dict(steps=4, save_every=1, eval_every=2)


class Cell(NamedTuple):
    """A command that writes a folder `run` into its working directory."""
    name: str
    argv: list
    before: object = None               # the Cell whose finished folder is there already


class Reference(NamedTuple):
    """What an undisturbed run of a Cell does."""
    folder: pathlib.Path                # around its folder `run`
    files: dict                         # as `snapshot` has them
    operations: int
    seconds: float


class World:
    """The models, data and commands that are tortured. show: print what commands print."""

    def __init__(self, folder, show=False):
        self.folder = tiny.world(folder)
        self.show = show
        (folder / "broken.py").write_text("def f(p, a: return 1\n")
        sys.path.insert(0, str(folder))
        write_data_files(folder / "files", tiny.PAIRS[::3])
        write_llama(folder / "base", folder / "llama")
        self.references = {}
        self.interrupted = {}
        must(call(command(test_matrix.command(folder, "sft", "lora", "lora")), folder))
        self.cells = cells(folder)

    def call(self, action, folder, prepare=None, stop=None):
        """As forked.call."""
        outcome = call(action, folder, prepare, stop)
        if self.show:
            print(f"{outcome.out}{outcome.err}exit code {outcome.code}\n")
        return outcome

    def new(self, name="work"):
        path = self.folder / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return path

    def set_up(self, cell, folder):
        """What is there before the command of a cell. Of one with --data data it has changed since."""
        if "data" in cell.argv and not cell.before:
            shutil.copytree(self.folder / "chat", folder / "data")
        if cell.before:
            shutil.copytree(self.reference(cell.before).folder, folder, dirs_exist_ok=True)
        if cell.before and "data" in cell.argv:
            with open(folder / "data" / "train.jsonl", "a") as f:
                f.write(json.dumps(tiny.ROWS["chat"][0]) + "\n")

    def reference(self, cell):
        if cell.name not in self.references:
            folder = self.new("references/" + cell.name)
            self.set_up(cell, folder)
            cfg = train.parse([str(word) for word in cell.argv])
            if cfg.task != "merge":
                code_hashes(train.code_roots(cfg))          # children find it in the cache
            operations = Operations()

            def action():
                code = command(cell.argv)()
                print(f"\n{operations.seen}")
                return code
            began = time.monotonic()
            outcome = must(call(action, folder, operations.install))
            seconds = time.monotonic() - began
            count = int(outcome.out.split()[-1])
            self.references[cell.name] = Reference(folder, snapshot(folder), count, seconds)
        return self.references[cell.name]

    def interrupted_run(self, cell):
        """The folder of a cell that was killed at two thirds of its operations."""
        if cell.name not in self.interrupted:
            folder = self.new("interrupted/" + cell.name)
            self.set_up(cell, folder)
            n = self.reference(cell).operations * 2 // 3
            call(command(cell.argv), folder, Operations(n, kill).install)
            self.interrupted[cell.name] = folder / "run"
        return self.interrupted[cell.name]


def write_llama(base, folder):
    """A model in other files than `base`: shards with an index, a tokenizer in lists, a chat template."""
    tokenizer = Tokenizer.from_pretrained(base)
    GPT(GPTConfig(tokenizer.vocab_size, 160, 2, 2, 32, eos=tokenizer.eos).as_family("llama", n_inner=48)
        ).save_pretrained(folder)
    tensors = read_tensors(folder / "model.safetensors")
    shard_of = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
    for shard in set(shard_of.values()):
        write_tensors(folder / shard, {name: t for name, t in tensors.items() if shard_of[name] == shard})
    (folder / "model.safetensors").unlink()
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(base / name, folder)
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    write_json(folder / "model.safetensors.index.json",
               {"metadata": {"total_size": 1}, "weight_map": shard_of})
    write_json(folder / "tokenizer_config.json",
               {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>", "chat_template": template,
                "model_max_length": 160})
    write_json(folder / "added_tokens.json", tokenizer.special)
    write_json(folder / "generation_config.json", {"eos_token_id": [tokenizer.eos], "do_sample": True})


def cells(world):
    """Every task with every method that writes a folder; two of them also over a folder that is there."""
    found = []
    for (task, method), outcome in test_matrix.documented().items():
        flags = test_matrix.flags_of(task, method)
        if outcome != "ok" or "out" not in flags:
            continue
        argv = test_matrix.command(world, task, method, "run")
        argv += [word for name, value in SHORT.items() if name in flags for word in (f"--{name}", value)]
        cell = Cell(f"{task} {method}", argv)
        found.append(cell)
        if (task, method) in (("sft", "lora"), ("sample", "none")):
            other = Cell(cell.name + " data", [*argv, "--data", "data"])
            found += [Cell(cell.name + " --fresh", [*argv, "--fresh"], before=cell),
                      Cell(cell.name + " changed", other.argv, before=other)]
    return found


def snapshot(folder):
    """{path: content} of all files below a folder; without times, and without the content of state.pt, .lock,
    and without the events that say when a run was saved."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir() or path.suffix == ".pt" or path.name == ".lock":
            found[name] = None
        elif path.suffix == ".json":
            found[name] = parsed(path.read_bytes())
        elif path.suffix == ".jsonl":
            found[name] = [event for event in map(parsed, path.read_bytes().splitlines())
                           if not (isinstance(event, dict) and event.get("event") == "save")]
        else:
            found[name] = path.read_bytes()
    return found


def parsed(content):
    """JSON without times; what is none, as it is."""
    try:
        return without_times(json.loads(content))
    except ValueError:
        return content


def without_times(value):
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if not NOT_COMPARED.fullmatch(k)}
    return [without_times(v) for v in value] if isinstance(value, list) else value


def difference(found, expected):
    """None, or the first things by which two snapshots differ."""
    faults = [f"stray {re.sub('[0-9]{3,}', 'N', name)}" for name in sorted(found.keys() - expected.keys())]
    faults += [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    for name in sorted(expected.keys() & found.keys()):
        if found[name] != expected[name]:
            where = first_line(found[name], expected[name])
            faults.append(f"{name} is another than after an undisturbed run{where}")
    return "; ".join(faults[:3]) or None


def first_line(found, expected):
    """Where two JSON values begin to differ, in words."""
    if isinstance(found, list) and isinstance(expected, list):
        return next((first_line(a, b) for a, b in itertools.zip_longest(found, expected) if a != b), "")
    if isinstance(found, dict) and isinstance(expected, dict):
        key = next((key for key in {**found, **expected} if found.get(key) != expected.get(key)), None)
        return f": {key}{first_line(found.get(key), expected.get(key))}"
    return "" if isinstance(found, bytes) else f": {str(found):.90} for {str(expected):.90}"


def weights(run):
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.glob("*/*.safetensors"))}


def fingerprint(folder):
    """Prints what a model folder computes: logits, token ids. Returns the exit code."""
    try:
        model, prompt, tokenizer = train.load(folder)
        ids = torch.arange(40)[None] % 250
        with torch.no_grad():
            logits = model(ids, past=prompt(model) if prompt is not None else None)[0]
        print(f"{logits.double().sum().item():.6f} {logits.double().std().item():.6f}")
        print(tokenizer.encode("abc \u00e9\n1"), tokenizer.special, tokenizer.eos)
    except UserError as e:
        print(f"train.py: {e}", file=sys.stderr)
        return e.code
    return 0
