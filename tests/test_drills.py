"""Drills: what the README promises of a new method, loss, algorithm, optimiser or task, and of an edited equation.

Each file of tests/drills/ is a patch of at most 40 lines to one product file. The test copies the repository,
applies the patch, and runs real commands on the tiny world of tests/tiny.py: --help, training, an interrupted
run, eval, chat, merge, loading, the table, and a run of another method that the patch must not touch.
"""
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass

import pytest
import tiny
import torch

from data.text.tokenizer import Tokenizer
from model import GPT

ROOT = pathlib.Path(__file__).resolve().parent.parent
PATCHES = sorted((ROOT / "tests" / "drills").glob("*.patch"))
PRODUCT = ("model.py", "lora.py", "prompts.py", "ppo.py", "train.py", "data/")
SFT = ("--data", "chat", "--batch", "4", "--forgetting_data", "none")
PAIRS = ("--task", "dpo", "--data", "pairs", "--batch", "4", "--forgetting_data", "none", "--rank", "2")
RL = ("--task", "ppo", "--data", "chat", "--reward", "data.toy:gold", "--batch", "8", "--minibatches", "2",
      "--max_new_tokens", "4", "--forgetting_data", "none", "--rank", "2")


@dataclass
class Drill:
    """What is run after a patch."""
    words: tuple                    # the command that trains, without --init, --steps and --out
    other: tuple                    # a run of the nearest kind, which the patch must not touch
    shown: tuple                    # words that --help must print
    steps: int = 200
    refused: tuple = ()             # words added to the command that make it a usage error
    error: str = ""                 # a part of its sentence
    merges: bool = True


NEAR = {"sft": (*SFT, "--rank", "2", "--steps", "3"), "dpo": (*PAIRS, "--steps", "3"),
        "full": (*SFT, "--method", "full", "--steps", "3"), "ppo": (*RL, "--steps", "1", "--algo", "grpo"),
        "prompt": (*SFT, "--method", "p_tuning_v2", "--steps", "3", "--num_virtual_tokens", "2")}
DRILLS = {
    "lora_variant": Drill((*SFT, "--vera", "--rank", "8"), NEAR["sft"], shown=("--vera",),
                          refused=("--alpha", "3"), error="--alpha means nothing to --vera"),
    "soft_prompt": Drill((*SFT, "--method", "llama_adapter", "--adapted_layers", "1", "--num_virtual_tokens", "3"),
                         NEAR["prompt"], shown=("llama_adapter", "--adapted_layers"), merges=False,
                         refused=("--adapted_layers", "3"), error="more than the 2 layers"),
    "rl_algorithm": Drill((*RL, "--algo", "sapo"), NEAR["ppo"], shown=("sapo",), steps=30,
                          refused=("--cliprange", "0.2"), error="--cliprange means nothing to --algo sapo"),
    "preference_loss": Drill((*PAIRS, "--preference_loss", "dpop", "--dpop_lambda", "0.5"), NEAR["dpo"],
                             shown=("dpop", "--dpop_lambda"), refused=("--preference_loss", "dpo"),
                             error="--dpop_lambda means nothing to --preference_loss dpo"),
    "optimizer": Drill((*SFT, "--rank", "2", "--optimizer", "muon", "--schedule", "wsd", "--decay_share", "0.5"),
                       NEAR["full"], shown=("muon", "--decay_share"), refused=("--schedule", "cosine"),
                       error="--decay_share belongs to --schedule wsd"),
    "task": Drill((*SFT, "--task", "distill", "--rank", "2", "--teacher", "teacher"), NEAR["sft"],
                  shown=("distill", "--teacher"), refused=("--teacher", "nowhere"), error="nowhere: no such folder"),
}

# Several commands in one process, so that a drill starts Python six times and not fifteen. Prints
# [[exit code, stdout, stderr], ...].
SEVERAL = """
import contextlib, io, json, sys, train
done = []
for argv in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = train.main(argv)
        except SystemExit as e:
            code = e.code
    done.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(done))
"""
LOADED = """
import sys, torch, train

def logits(folder):
    model, prompt, tokenizer = train.load(folder)
    with torch.no_grad():
        return model(torch.arange(6)[None], past=None if prompt is None else prompt(model))[0]

folder = sys.argv[1]
inner = train.weights_folder(folder)
ctx = train.open_context(train.parse(["--task", "eval", "--init", folder, "--data", "chat"]))
train.method_of(inner).save(ctx, inner.parent.parent.parent / "copy", train.portable(train.base_of(inner)))
assert torch.equal(logits(folder), logits("copy")), "saved and loaded again, the logits are others"
assert not torch.equal(logits(folder), logits("base")), "training changed nothing"
"""


def changed_lines(patch):
    return [line for line in patch.read_text().splitlines() if re.match(r"[+-](?![+-]{2} )", line)]


def changed_files(patch):
    return re.findall(r"^\+\+\+ b/(\S+)", patch.read_text(), re.M)


def apply_patch(path, folder):
    """One line of context is enough: other lines of the file may have changed."""
    env = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)}
    done = subprocess.run(["git", "apply", "-p1", "-C1", str(path)], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{path.name} does not apply any more: {done.stderr}"


class House:
    """A copy of the repository with the tiny world in it, where commands run by `python`, the fixture."""

    def __init__(self, folder, python):
        self.folder = folder
        self.python = python
        ignore = shutil.ignore_patterns(".git", "out", "tests", ".pytest_cache", "figures", "shared")
        shutil.copytree(ROOT, folder / "house", ignore=ignore)
        tiny.world(folder)
        shape = GPT.from_pretrained(folder / "base").config
        torch.manual_seed(1)
        GPT(shape).save_pretrained(folder / "teacher")
        Tokenizer.from_pretrained(folder / "base").save_pretrained(folder / "teacher")

    def patch(self, name):
        apply_patch(ROOT / "tests" / "drills" / f"{name}.patch", self.folder / "house")

    def start(self, *words, program="train.py"):
        env = {**os.environ, "PYTHONPATH": str(self.folder / "house")}
        program = [str(self.folder / "house" / program)] if program != "-c" else ["-c"]
        return subprocess.Popen([self.python, *program, *map(str, words)], cwd=self.folder, env=env, text=True,
                                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def run(self, *words, **options):
        """(stdout, stderr) of a command that ends well."""
        process = self.start(*words, **options)
        out, err = process.communicate(timeout=600)
        assert process.returncode == 0, f"{words}: exit code {process.returncode}\n{out}\n{err}"
        return out, err

    def run_several(self, *commands):
        """[(stdout, stderr), ...] of commands in one process. A run in runs/refused must be refused."""
        out, _ = self.run(SEVERAL, json.dumps([list(map(str, words)) for words in commands]), program="-c")
        done = json.loads(out.splitlines()[-1])
        for words, (code, out, err) in zip(commands, done):
            refused = "runs/refused" in words or "merge" in words and code
            assert code in ((2, 65) if refused else (0,)), f"{words}: exit code {code}\n{out}\n{err}"
        return [(out, err) for _, out, err in done]

    def interrupted(self, words, out):
        """Start a command, and end it by SIGTERM as soon as it has logged a step."""
        process = self.start(*words)
        log = self.folder / out / "log.jsonl"
        tiny.wait_for(log, process)
        end = time.monotonic() + 300
        while '"train"' not in log.read_text() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=300)
        assert process.returncode == 75, f"{words}: exit code {process.returncode}\n{err}"

    def weights(self, out):
        [folder] = [path for path in (self.folder / out / "adapter", self.folder / out / "model") if path.is_dir()]
        return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_a_patch_is_small(patch):
    """At most 40 lines in one product file, and two sentences on top."""
    assert len(changed_lines(patch)) <= 40
    [file] = changed_files(patch)
    assert file.startswith(PRODUCT)
    head = patch.read_text().split("---")[0].strip()
    assert len(re.findall(r"[.](?=\s|$)", head)) == 2, head


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_a_patch_applies(patch, tmp_path):
    [file] = changed_files(patch)
    shutil.copy(ROOT / file, tmp_path)
    apply_patch(patch, tmp_path)
    compile((tmp_path / file).read_text(), file, "exec")


def test_every_patch_is_run():
    assert [patch.stem for patch in PATCHES] == sorted([*DRILLS, "edited_equation"])


@pytest.mark.slow
@pytest.mark.parametrize("name", DRILLS)
def test_drill(name, python, tmp_path):
    drill = DRILLS[name]
    house = House(tmp_path, python)
    other = (*drill.other, "--init", "base", "--out", "runs/other")
    before, _ = house.run(*other)
    house.patch(name)
    command = (*drill.words, "--init", "base", "--steps", drill.steps)
    whole = (*command, "--out", "runs/whole")
    first = house.run_several(other, (*command, "--help"), (*command, *drill.refused, "--out", "runs/refused"), whole)
    assert first[0][0] == before and "baseline" not in first[0][1], "a finished run of another method was touched"
    assert all(word in first[1][0] for word in drill.shown), first[1][0]
    assert drill.error in first[2][1]

    cut = (*command, "--out", "cut")
    house.interrupted(cut, "cut")
    house.run(*cut)
    assert house.weights("cut") == house.weights("runs/whole"), "resumed, the weights are others"
    use_result(house, drill, command)


def use_result(house, drill, command):
    """eval, chat, merge, load, table, a soft prompt on top of it (or continued), --dry_run where the task has it."""
    tuned = ("--init", "runs/whole")
    dry = "ppo" not in command
    on_top = (*SFT, "--num_virtual_tokens", "3", "--method", "p_tuning_v2" if drill.merges else "llama_adapter")
    done = house.run_several(
        ("--task", "eval", *tuned, "--data", "chat", "--max_new_tokens", "2", "--out", "measured"),
        ("--task", "chat", *tuned, "--prompt", "ab", "--max_new_tokens", "3"),
        ("--task", "merge", *tuned, "--out", "merged"),
        ("--task", "table", "--runs", "runs/whole", "runs/other"),
        (*on_top, "--steps", "1", *tuned, "--out", "on_top"),
        *[(*command, "--dry_run")] * dry)
    assert "exact_match" in done[0][0]
    assert ("largest logit difference" if drill.merges else "no weights that could be merged") in "".join(done[2])
    head, *rows = done[3][0].split("\n\n")[0].splitlines()
    assert len(rows) == 2 and "runs" in head, done[3][0]
    base = json.loads((house.folder / "on_top" / "adapter" / "adapter_config.json").read_text())
    assert base["base_model_name_or_path"].endswith("runs/whole" if drill.merges else "base")
    assert not dry or "parameters are trainable" in "".join(done[-1])
    house.run(LOADED, "runs/whole", program="-c")


@pytest.mark.slow
def test_another_teacher_is_another_run(python, tmp_path):
    """The content of a folder that a record lists in `input_flags` is part of what identifies a run."""
    house = House(tmp_path, python)
    house.patch("task")
    command = (*DRILLS["task"].words, "--init", "base", "--steps", "2", "--out", "runs/distilled")
    house.run(*command)
    shutil.rmtree(tmp_path / "teacher")
    shutil.copytree(tmp_path / "base", tmp_path / "teacher")
    (_, err), (table, _) = house.run_several(command, ("--task", "table", "--runs", "runs"))
    assert "--teacher changed since this run was made; the old run is now" in err
    head, *rows = table.split("\n\n")[0].splitlines()
    assert "inputs_hash" in head.split() and len(rows) == 2, table


@pytest.mark.slow
def test_edited_equation(python, tmp_path):
    """The same command before and after: a new result, the old folder kept, one line, two rows."""
    house = House(tmp_path, python)
    command = (*SFT, "--rank", "2", "--steps", "20", "--init", "base", "--out", "runs/lora")
    prefix = (*SFT, "--method", "prefix_tuning", "--num_virtual_tokens", "2", "--steps", "2", "--init", "base",
              "--out", "runs/prefix")
    house.run(*command)
    untouched, _ = house.run(*prefix)
    old = house.weights("runs/lora")
    house.patch("edited_equation")
    _, err = house.run(*command)
    assert house.weights("runs/lora") != old
    moved = re.findall(r"^(.*) changed since this run was made; the old run is now (\S+); starting anew$", err, re.M)
    assert [what for what, _ in moved] == ["lora.py: LoRA.scale_of"]
    assert house.weights(moved[0][1]) == old
    again, err = house.run(*prefix)
    assert again == untouched and "step" not in err
    out, _ = house.run("--task", "table", "--runs", "runs/lora*")
    head, *rows = out.split("\n\n")[0].splitlines()
    assert "code" in head.split() and len(rows) == 2, out
