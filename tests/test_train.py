"""The command: flags, run folders, exact resume, every method learns, faults have an outcome.

Runs happen in this process through train.main on a two-layer model over bytes; what a signal or a kill does
to a process is tested on real processes.
"""
import ast
import errno
import json
import math
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
import types

import pytest
import torch

import lora
import prompts
import train
from data.text import chat
from data.results import best, evaluate
from data.runtime.run_files import resume_step
from data.runtime import flags, progress, run_folder
from data.runtime.command import groups_of
from data.batches.examples import Text
from data.checkpoints.safetensors import read_tensors
from data.runtime.files import UserError, read_json, write_json
from data.runtime.progress import Progress
from data.text.tokenizer import Tokenizer
from model import GPT, GPTConfig
from prompts import PTuningV2
from tiny import Stop, stopped, wait_for, write

ROOT = pathlib.Path(train.__file__).resolve().parent
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
METHODS = [method.name for method in train.METHODS if method.trains]
LORA = [method.name for method in lora.METHODS]
SHORT = ["--steps", "6", "--batch", "4", "--eval_every", "100", "--max_new_tokens", "4", "--forgetting_data", "none"]


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with a tiny base model, and data: chat rows, labelled rows, raw text."""
    folder = tmp_path_factory.mktemp("world")
    tokenizer = Tokenizer.train(["a b"], 256 + len(SPECIAL), SPECIAL)
    torch.manual_seed(0)
    model = GPT(GPTConfig(tokenizer.vocab_size, 160, 2, 2, 32, eos=tokenizer.eos))
    for p in model.parameters():
        p.data.mul_(8 if p.dim() > 1 else 1)        # as spread as trained weights: frozen parts must help
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    letters = "abcdefgh"
    chats = [{"prompt": f"{a}{b}", "completion": a} for a in letters for b in letters]
    labels = [{"text": f"{a}{b}", "label": "x" if a < "e" else "y"} for a in letters for b in letters]
    texts = [{"text": "abcd efgh " * 20}] * 12
    write(folder, {"chat": chats, "label": labels, "text": texts})
    return folder


def command(world, out, *flags, data="chat"):
    short = SHORT if data == "chat" else SHORT[:-4] + SHORT[-2:]    # --max_new_tokens is for generated answers
    return ["--init", str(world / "base"), "--data", str(world / data), "--out", str(out),
            *short, *map(str, flags)]


def run(world, out, *flags, data="chat"):
    assert train.main(command(world, out, *flags, data=data)) == 0
    return read_json(out / "result.json")


def weights(out):
    inner = out / "adapter" if (out / "adapter").exists() else out / "model"
    files = sorted(inner.glob("*.safetensors"))
    return {f"{f.name}/{k}": t for f in files for k, t in read_tensors(f).items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ------------------------------------------------------------------------------------------------------ flags

@pytest.mark.parametrize("argv, says", [
    (["--rnk", "4"], "did you mean --rank"), (["--ran", "4"], "--ran is not a flag"),
    (["--method", "lroa"], "did you mean lora?"), (["--lr", "abc"], "--lr abc is no number"),
    (["--rank", "eight"], "--rank eight is no whole number"), (["--steps"], "--steps needs a value"),
    (["stray"], "not a flag"),
    (["--method", "full", "--rank", "4"], "--rank belongs to --method lora"),
    (["--method", "lora", "--num_virtual_tokens", "4"], "--num_virtual_tokens belongs to --method prompt_tuning"),
    (["--task", "chat", "--lr", "1"], "--lr belongs to --task sft"),
    (["--task", "chat", "--method", "lora"], "leave"),
    (["--batch", "0"], "--batch 0 is out of range"),
    (["--seed", "-1"], "--seed"), (["--seed", str(2 ** 63)], "--seed"),
    (["--lr", "nan"], "--lr"), (["--lr", "inf"], "--lr"), (["--init", "new"], "only --task pretrain"),
    (["--task", "pretrain", "--init", "x", "--vocab_size", "9"], "--vocab_size shapes a new model"),
    (["--task", "merge", "--init", "data"], "--out"), (["--init", "no/such/folder"], "no such folder"),
    (["--layers", "a-b"], "--layers a-b cannot be read"), (["--layers", "3-1"], "upwards"),
    (["--layers", ""], "cannot be read"), (["--layers", "0-1-2"], "cannot be read"),
    (["--layers", "0-9999999999999"], "cannot be read"), (["--layers", "9" * 5000], "cannot be read"),
    (["--method", "p_tuning", "--encoder_hidden", str(2 ** 63 - 1)], "--encoder_hidden"),
    (["--method", "prefix_tuning", "--encoder_hidden", str(2 ** 63 - 1)], "it goes from 1 to 65536"),
    (["--task", "pretrain", "--block_size", str(2 ** 63 - 1)], "it goes from 2 to 16777216"),
    (["--task", "pretrain", "--n_layer", str(2 ** 63 - 1)], "it goes from 1 to 1000"),
    (["--task", "ppo", "--ppo_epochs", str(2 ** 63 - 1)], "it goes from 1 to 1000"),
    (["--task", "ppo", "--batch", str(2 ** 63 - 2)], "it goes from 1 to 65536"),
    (["--task", "sample", "--num_generations", str(2 ** 63 - 1)], "it goes from 1 to 65536"),
    (["--rank_pattern", "down"], "cannot be read"), (["--rank_pattern", "o=4"], "targets q,v,up,down leave it out"),
    (["--beta2", "1"], "below 1"), (["--warmup", "2"], "from 0 to 1"), (["--min_lr_ratio", "-1"], "--min_lr_ratio -1.0"),
    (["--weight_decay", "-1"], "--weight_decay"), (["--loraplus_lr_ratio", "-1"], "--loraplus_lr_ratio"),
    (["--method", "prefix_tuning", "--encoder_hidden", "0"], "--encoder_hidden 0"),
    (["--method", "p_tuning_v2", "--prefix_dropout", "1.5"], "--prefix_dropout 1.5"),
    (["--method", "adalora", "--target_rank", "0"], "--target_rank 0"),
    (["--task", "sample", "--num_generations", "2", "--best_n", "3"], "--best_n 3 is more"),
    (["--task", "sample", "--keep_best", "2"], "--keep_best of --task sample is now called --best_n"),
    (["--patience", "2"], "name it by --keep_best METRIC"),
    (["--task", "ppo", "--keep_best", "loss"], "--keep_best belongs to --task sft"),
    (["--keep_best", "f2", "--steps", "1"], "--keep_best f2 is no metric of this run on valid; there are exact_match, loss"),
    (["--data", "\udcff.jsonl"], "\\udcff.jsonl is not UTF-8 text or holds the character NUL"),
    (["--out", "a\0b"], "a\\x00b is not UTF-8 text or holds the character NUL"),
    (["--data", "\x1b[2J\n"], "\\x1b[2J\\n does not exist"),
    (["--data", "a" * 300 + ".jsonl"], "a... has a name of 306 bytes, over 255; give another one"),
    (["--data", "toy/nothing"], "toy/nothing is no data set of the toy world"),
    (["--device", "cuda:99"], "--device cuda:99"), (["--double_quant"], "--quant"),
    (["--method", "prompt_tuning", "--prompt_init", "random", "--prompt_init_text", "x"], "not read by --prompt_init random"),
    (["--task", "pretrain", "--data", "toy/chat"], "holds chat rows; --task pretrain reads text rows; chat rows "
     "are for --task sft or ppo"),
    (["--task", "dpo", "--data", "toy/sentiment"], "label rows are for --task sft or classify"),
    (["--forgetting_data", "toy/spam"], "holds label rows; raw text is needed"),
    (["--method", "p_tuning_v2", "--num_virtual_tokens", "170"], "num_virtual_tokens is 170; text shares the context of 160"),
    (["--dora=1"], "--dora takes no value"), (["--no-fresh=x"], "takes no value"),
    (["--device", "foo"], "--device foo is none of auto, cpu, mps, cuda"), (["--device", "meta"], "--device meta is none"),
    (["--out", ""], "--out '' names no file or folder"), (["--init", ""], "--init '' names no file or folder"),
    (["--data="], "--data '' names no file or folder"), (["--system", "\udcff"], "\\udcff is not UTF-8"),
    (["--out", "a/" + "x" * 256], "--out a/xxx"), (["--init", "x" * 256], "has a name of 256 bytes, over 255"),
])
def test_a_wrong_command_is_one_sentence(argv, says, capsys, tmp_path, monkeypatch, world):
    monkeypatch.chdir(tmp_path)
    if {"--rank_pattern", "--device", "--forgetting_data", "170", "f2"} & set(argv):
        argv = [*argv, "--init", str(world / "base"), "--data", str(world / "chat")]
    code = train.main(argv)
    err = capsys.readouterr().err
    assert code in (2, 65) and says in err and "Traceback" not in err
    assert [line for line in err.splitlines() if line.startswith("train.py: ")] == [err.splitlines()[-1]]


@pytest.mark.parametrize("word, says", [
    ("grpo", "; grpo is an --algo of --task ppo"), ("kto", "; kto is a --preference_loss of --task dpo"),
    ("lora", "; lora is a --method\n"), ("sfd", "; did you mean sft?"), ("zzz", " sft ")])
def test_a_word_that_is_no_task_is_answered_with_its_flag(word, says, capsys):
    assert train.main(["--task", word]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"train.py: --task {word} is none of ") and says in err
    assert word == "sfd" or "did you mean" not in err


@pytest.mark.parametrize("old, new", flags.RENAMED.items())
def test_an_old_flag_is_answered_with_its_new_name(old, new, capsys):
    assert new in all_fields(), "the new name is a flag"
    for words in ([f"--{old}", "1"], [f"--{old}=1"]):
        assert train.main(words) == 2
        assert f"train.py: --{old} is now called --{new}" in capsys.readouterr().err


def test_a_flag_of_another_library_is_answered_with_ours(capsys):
    for theirs, ours in flags.ELSEWHERE.items():
        assert theirs not in all_fields() and theirs not in flags.RENAMED, theirs
        assert re.match(r"--(\w+)", ours)[1] in all_fields(), theirs
    for theirs, ours in (("learning_rate", "--lr"), ("lora_r", "--rank"), ("bf16", "--dtype bf16")):
        assert train.main([f"--{theirs}", "1"]) == 2
        assert capsys.readouterr().err == f"train.py: --{theirs} is called {ours} here\n"


def test_the_name_of_a_folder_is_never_too_long():
    words = ["--rank", "3", "--alpha", "3", "--dropout", "0.3", "--batch", "3", "--warmup", "0.3", "--schedule", "linear",
             "--beta2", "0.3", "--steps", "3", "--min_lr_ratio", "0.3", "--grad_clip", "0.3", "--block_size", "33",
             "--eval_every", "3", "--eval_items", "3", "--max_new_tokens", "33", "--weight_decay", "0.3", "--lr", "0.3"]
    names = {flags.default_out(train.parse([*words, "--loraplus_lr_ratio", str(n)])) for n in (2, 3)}
    assert len(names) == 2 and all(len(name) < 200 and name.endswith("-s1") for name in names)


RENAMED_VALUES = [(name, old, new) for name, values in flags.RENAMED_VALUES.items() for old, new in values.items()]


@pytest.mark.parametrize("name, old, new", RENAMED_VALUES)
def test_an_old_value_is_answered_with_its_new_name(name, old, new, capsys):
    task = "sft" if name == "method" else "classify"
    assert train.main(["--task", task, f"--{name}", old]) == 2
    assert f"train.py: --{name} {old} is now called --{name} {new}" in capsys.readouterr().err
    assert getattr(train.parse(["--task", task, f"--{name}", new]), name) == new


def test_flags_have_the_spellings_people_try():
    assert train.parse(["--lr=1"]).lr == 1.0 and train.parse(["--lr", "1"]).lr == 1.0
    assert train.parse(["--no-gradient_checkpointing"]).gradient_checkpointing is False
    assert train.parse(["--method", "full"]).lr != train.parse(["--method", "lora"]).lr


def test_help_is_that_methods_manual(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--method", "prefix_tuning", "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "--num_virtual_tokens" in text and "--rank " not in text
    assert f"default {train.find_method('prefix_tuning').defaults['lr']}" in text


def test_help_names_the_records_whose_defaults_it_shows(capsys):
    for words, shown, hidden in ((["--task", "ppo"], "the RL algorithm (here ppo)", "(here grpo)"),
                                 (["--task", "ppo", "--algo=grpo"], "the RL algorithm (here grpo)", "the RL algorithm (default")):
        with pytest.raises(SystemExit):
            train.main([*words, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert shown in text and hidden not in text and "the objective (here ppo)" in text
    assert "The flags of --task ppo --method lora --algo grpo, with their defaults." in text
    assert "0: the algorithm's own number (default 4)" in text


def all_fields():
    """{flag: field} of every task and method, and of the records that a flag names."""
    groups = [g for task in train.TASKS for method in train.METHODS for g in groups_of(train.PROGRAM, task, method)]
    for records in train.PROGRAM.selectors.values():
        groups += [g for record in records for g in getattr(record, "flags", ())]
    return flags.fields_of(groups)


def test_every_field_is_read():
    """No dead flags: each field is used outside its definition."""
    read = set()
    for path in [*ROOT.glob("*.py"), *ROOT.glob("data/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value).split(".")[-1] in ("cfg", "own"):
                read.add(node.attr)
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "cfg.get":
                read.add(getattr(node.args[0], "value", None))
    collected = {"rank", "alpha", "dropout", "rslora"}              # names that lora.py collects in a tuple
    collected |= {name for method in prompts.METHODS for name in flags.fields_of(
        filter(None, [method.prompt_class.options]))}
    switches = {variant.name for variant in lora.VARIANTS}
    for name in all_fields():
        assert name in read | collected | switches, name
    for method in train.METHODS:
        assert method.defaults.keys() <= all_fields().keys()


@pytest.mark.parametrize("method, lr, small", [
    ("prompt_tuning", "4e-4", True), ("prompt_tuning", "0.05", False), ("p_tuning_v2", "2e-4", True),
    ("p_tuning_v2", "5e-3", False), ("prefix_tuning", "5e-5", False), ("prompt_tuning", None, False),
    ("p_tuning", None, False), ("prefix_tuning", None, False),
])
def test_a_rate_for_weights_is_noticed_at_virtual_tokens(method, lr, small, capsys):
    train.parse(["--method", method, *(["--lr", lr] if lr else [])])
    assert ("is a rate for weights" in capsys.readouterr().err) == small


def test_default_folder_is_readable_and_stable():
    name = train.default_out(train.parse(["--method", "lora", "--rank", "4", "--seed", "3"]))
    assert name == os.path.join("out", "sft-lora-rank4-s3")
    assert train.default_out(train.parse([])) == os.path.join("out", "sft-lora-s1")
    long = train.default_out(train.parse(["--data", "x" * 60]))
    assert len(long) < 40 and long != train.default_out(train.parse(["--data", "x" * 61]))


def test_files_of_one_name_have_folders_of_their_own():
    def name(data):
        return train.default_out(train.parse(["--data", data])).removeprefix("out/sft-lora-data").removesuffix("-s1")
    assert name("a/train.jsonl") == "a-train.jsonl" and name("b/train.jsonl") == "b-train.jsonl"
    deep = [name(f"{folder}/a/train.jsonl") for folder in ("x", "y", "/x", "x/y")]
    assert len(set(deep)) == 4 and all(re.fullmatch(r"a-train.jsonl-[0-9a-f]{6}", one) for one in deep)
    assert name("/a/train.jsonl") == "a-train.jsonl"
    for data, same in (("train.jsonl", "train.jsonl"), ("./train.jsonl", "train.jsonl"), ("a/folder", "folder"),
                       ("toy/letters", "letters"), ("e2e", "e2e"), ("out/sample-none-s1/", "sample-none-s1"), ("..", "..")):
        assert name(data) == same


def test_text_to_go_on_with_needs_no_out():
    cfg = train.parse(["--task", "pretrain", "--method", "lora", "--init", "some/model"])
    assert train.default_out(cfg) == "out/pretrain-lora-initmodel-s1"


def test_an_empty_text_is_said_too(world):
    assert train.main(["--init", str(world / "base"), "--data", str(world / "label"), "--task", "classify",
                       "--steps", "0", "--forgetting_data", "none", "--system", "s", "--question", "?", "--out",
                       str(world / "asks")]) == 0
    for words, system, turn in (([], "s", "aa\n\n?"), (["--system", "", "--question", ""], "", "aa")):
        text = train.open_context(train.parse(["--task", "classify", "--init", str(world / "asks"), *words])).text
        assert text.system == system and text.turns({"text": "aa", "label": "x"})[0]["content"] == turn


def test_schedule_values():
    cfg = train.parse(["--lr", "1", "--warmup", "0.1", "--min_lr_ratio", "0.1"])
    assert train.lr_at(0, 100, cfg) == pytest.approx(1 / 11) and train.lr_at(10, 100, cfg) == pytest.approx(1)
    assert train.lr_at(55, 100, cfg) == pytest.approx(0.55)
    assert train.lr_at(100, 100, cfg) == pytest.approx(0.1)
    flat = cfg.replace(schedule="constant", warmup=0.0)
    assert train.lr_at(0, 100, flat) == train.lr_at(99, 100, flat) == 1


# -------------------------------------------------------------------------------------- runs and their folder

@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("task, data", [("sft", "chat"), ("classify", "label"), ("pretrain", "text")])
def test_every_cell_runs_and_only_what_learns_moves(task, data, method, world, tmp_path):
    before = {k: t.clone() for k, t in read_tensors(world / "base" / "model.safetensors").items()}
    extra = ["--block_size", "24"] if task == "pretrain" else []
    if method not in [*LORA, "full"]:
        extra += ["--num_virtual_tokens", "4"]
    r = run(world, tmp_path / "r", "--task", task, "--method", method, *extra, data=data)
    assert r["status"] == "done" and r["steps"] == 6 and r["skipped"] == 0
    assert all(math.isfinite(v) for v in r["metrics"].values())
    assert same(before, read_tensors(world / "base" / "model.safetensors"))
    assert (r["params_trainable"] == r["params_total"]) == (method == "full")
    model, prompt, _ = train.load(tmp_path / "r")
    base, _, _ = train.load(world / "base")
    assert not any(module.training for part in (model, prompt, base) if part for module in part.modules())
    x = torch.tensor([[97, 98, 99]])
    with torch.no_grad():
        past = prompt(model) if prompt is not None else None
        inside = prompt is not None and prompt.template      # it changes prompts, not text
        assert torch.equal(model(x, past=past)[0], base(x)[0]) == bool(inside)
        if method in LORA:
            with lora.disable_adapter(model):
                assert torch.equal(model(x)[0], base(x)[0])


def test_a_loaded_model_has_no_dropout(world, tmp_path):
    run(world, tmp_path / "r", "--dropout", "0.5")
    model, _, _ = train.load(tmp_path / "r")
    x = torch.tensor([[97, 98, 99]])
    assert torch.equal(model(x)[0], model(x)[0])
    model.train()
    assert not torch.equal(model(x)[0], model(x)[0])


@pytest.mark.parametrize("method, most", [
    ("full", 0.3), ("lora", 0.3), ("adalora", 0.7), ("ia3", 0.9),
    ("prompt_tuning", 0.9), ("p_tuning", 0.9), ("prefix_tuning", 0.7), ("p_tuning_v2", 0.7),
])
def test_every_method_overfits_a_fixed_batch(method, most, world, tmp_path):
    """The loss must fall to this share of its start: the methods differ in reach, but all of them learn."""
    flags = ["--targets", "q,k,v,o,up,down"] if method in ("lora", "adalora") else []
    write(tmp_path, {"one": [{"prompt": f"{a}{b}", "completion": a} for a in "abcd" for b in "efgh"]}, every=1)
    r = run(world, tmp_path / "r", "--method", method, "--steps", "60", "--batch", "16", "--data", tmp_path / "one", "--lr",
            {"full": 3e-3, "lora": 2e-2, "adalora": 3e-2}.get(method, 5e-2), *flags)
    log = [json.loads(line) for line in (tmp_path / "r" / "log.jsonl").read_text().splitlines()]
    losses = [e["loss"] for e in log if e["event"] == "train"]
    assert losses[-1] < most * losses[0], (losses[0], losses[-1])
    assert r["metrics"]["loss"] < r["baseline_metrics"]["loss"]


def test_the_folder_holds_what_it_should(world, tmp_path):
    r = run(world, tmp_path / "r", "--method", "lora", "--rank", "3", "--targets", "q,v")
    whole = run(world, tmp_path / "full", "--method", "full", "--steps", "0")
    assert "adapter_bytes" not in whole and whole["model_bytes"] == (
        tmp_path / "full" / "model" / "model.safetensors").stat().st_size
    first_line = (tmp_path / "results.jsonl").read_text().splitlines()[0]
    stored = read_json(tmp_path / "r" / "config.json")
    assert stored["config"]["rank"] == 3 and stored["config"]["lr"] == train.find_method("lora").defaults["lr"]
    assert {"argv", "machine", "device", "dtype", "data_sha256", "base_sha256", "code", "code_hashes",
            "params_trainable", "params_total"} <= stored.keys()
    assert {"status", "task", "method", "init", "data", "seed", "metrics", "baseline_metrics", "samples",
            "params_trainable", "params_total", "adapter_bytes", "steps", "tokens", "seconds",
            "tokens_per_second", "peak_memory_mb"} <= r.keys()
    log = [json.loads(line) for line in (tmp_path / "r" / "log.jsonl").read_text().splitlines()]
    assert all({"step", "tokens", "seconds"} <= e.keys() for e in log)
    assert [e["event"] for e in log][0] == "baseline" and log[-1]["event"] == "test"
    config = read_json(tmp_path / "r" / "adapter" / "adapter_config.json")
    assert config["peft_type"] == "LORA" and config["r"] == 6       # q and v of a fused c_attn: rank the sum
    assert len(r["item_correct"]) == 8 and r["item_correct"].count("1") / 8 == r["metrics"]["exact_match"]
    line = json.loads(first_line)
    assert line["out"] == str(tmp_path / "r") and "samples" not in line


def test_the_same_command_again(world, tmp_path, capsys):
    run(world, tmp_path / "r")
    first = capsys.readouterr().out
    before = (tmp_path / "r" / "result.json").stat().st_mtime_ns
    run(world, tmp_path / "r")
    printed = capsys.readouterr()
    assert printed.out == first and (tmp_path / "r" / "result.json").stat().st_mtime_ns == before
    assert "r is finished: this is its stored result (--fresh computes it again)" in printed.err
    os.rename(tmp_path / "r", tmp_path / "moved")
    run(world, tmp_path / "moved")
    assert f"--task chat --init {tmp_path / 'moved'}\n" in capsys.readouterr().out
    os.rename(tmp_path / "moved", tmp_path / "r")
    assert train.main(command(world, tmp_path / "r", "--rank", "4")) == 2
    assert "holds a run with --rank 8; this command says --rank 4" in capsys.readouterr().err
    r = run(world, tmp_path / "r", "--rank", "4", "--fresh")
    assert r["params_trainable"] == 2 * 4 * (64 + 64 + 160 + 160)       # r 4, in + out of q, v, up, down
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    assert train.main(command(world, tmp_path / "mine", "--fresh")) == 2    # never among somebody's files
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


def test_same_seed_same_bits_other_seed_other_order(world, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(world, tmp_path / name, "--seed", seed, "--dropout", "0.1")
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "c"))


def test_micro_batches_do_not_change_the_step(world, tmp_path):
    """One step, so that Adam cannot blow up differences in gradients that are zero but for rounding."""
    flags = ["--steps", "1", "--warmup", "0", "--grad_clip", "0"]
    for method, more in (("full", []), ("lora", []), ("prefix_tuning", ["--num_virtual_tokens", "4"]), ("p_tuning", [])):
        states = []
        for micro in ("100000", "1"):
            out = tmp_path / f"{method}-{micro}"
            run(world, out, "--method", method, "--micro_batch_tokens", micro, *flags, *more)
            states.append(torch.load(out / "state.pt", weights_only=True)["optimizer"]["state"])
        first, second = ([s["exp_avg"] for s in state.values()] for state in states)   # tenths of gradients
        largest = max(a.abs().max() for a in first)
        assert all((a - b).abs().max() < 1e-5 * largest for a, b in zip(first, second, strict=True)), method


VARIANTS = ["--method lora --quant nf4", "--method lora --dtype bf16", "--method lora --pissa",
            "--method lora --dora", "--method prompt_tuning --dtype bf16"]


@pytest.mark.parametrize("flags", [f"--method {m}" for m in METHODS] + VARIANTS)
def test_resume_is_bit_exact(flags, world, tmp_path, monkeypatch):
    """Cut a run in the middle of step 4 of 6, after a save at step 2: nothing of the lost steps may show."""
    flags = [*flags.split(), "--save_every", "2"]
    flags += {"lora": ["--dropout", "0.1"], "p_tuning_v2": ["--prefix_dropout", "0.1"]}.get(flags[1], [])
    run(world, tmp_path / "whole", *flags)
    stopped(monkeypatch, 4, lambda: train.main(command(world, tmp_path / "cut", *flags)))
    r = run(world, tmp_path / "cut", *flags)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert events(tmp_path / "whole") == events(tmp_path / "cut")       # no hole, nothing twice
    whole = read_json(tmp_path / "whole" / "result.json")
    assert r["metrics"] == whole["metrics"] and r["tokens"] == whole["tokens"]
    assert [e["step"] for e in events(tmp_path / "cut") if e["event"] == "train"] == [1, 2, 3, 4, 5, 6]


def events(folder):
    """What the log says of the steps, without the clock."""
    path = folder / "log.jsonl"
    log = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [{k: v for k, v in e.items() if k != "seconds"} for e in log
            if e["event"] in ("train", "valid")]


@pytest.mark.parametrize("where", ["a valid look", "a line of the log"])
def test_a_signal_leaves_no_hole_in_the_log(where, world, tmp_path, monkeypatch):
    flags = ["--eval_every", "2"]
    run(world, tmp_path / "whole", *flags)
    look, log = evaluate.evaluate_rows, run_folder.Run.log

    def measure(*args, **kw):
        if len(events(tmp_path / "cut")) == 2 and where == "a valid look":
            signal.raise_signal(signal.SIGTERM)
        return look(*args, **kw)

    def line(run, **event):
        if (event["event"], event["step"]) == ("train", 3) and where != "a valid look":
            signal.raise_signal(signal.SIGTERM)
        return log(run, **event)

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "evaluate_rows", measure)
        patch.setattr(run_folder.Run, "log", line)
        assert train.main(command(world, tmp_path / "cut", *flags)) == 75
    run(world, tmp_path / "cut", *flags)
    assert events(tmp_path / "whole") == events(tmp_path / "cut")
    assert [e["step"] for e in events(tmp_path / "cut") if e["event"] == "valid"] == [2, 4, 6]


# --------------------------------------------------------------------------------- the best weights on valid

STEADY = ["--schedule", "constant", "--warmup", "0", "--eval_every", "2", "--max_new_tokens", "2"]  # steps alike


def valid_values(out, name):
    return {e["step"]: e[name] for e in events(out) if e["event"] == "valid"}


@pytest.mark.parametrize("metric, order", [("loss", (3.0, 1.0, 2.0, math.nan, 1.0)),
                                           ("exact_match", (1.0, 3.0, 2.0, math.nan, 3.0))])
def test_the_weights_of_the_best_evaluation_are_saved_and_tested(metric, order, world, tmp_path, monkeypatch):
    values = iter(order)
    original = train.log_validation

    def log_validation(ctx, run, loop, trainable, total, evaluate_now):
        original(ctx, run, loop, trainable, total, lambda: {**evaluate_now(), metric: next(values)})

    with monkeypatch.context() as patch:
        patch.setattr(train, "log_validation", log_validation)
        r = run(world, tmp_path / "kept", *STEADY, "--steps", "10", "--keep_best", metric)
    assert r["best_valid"] == {"metric": metric, "value": order[1], "step": 4} and r["steps"] == 10
    four = run(world, tmp_path / "four", *STEADY, "--steps", "4")
    assert same(weights(tmp_path / "kept"), weights(tmp_path / "four")) and "best_valid" not in four
    assert {**r["metrics"], "loss": 0} == {**four["metrics"], "loss": 0}
    assert r["metrics"]["loss"] == pytest.approx(four["metrics"]["loss"], rel=1e-6)


def test_valid_is_measured_at_the_end_too(world, tmp_path):
    run(world, tmp_path / "r", "--steps", "5")
    assert list(valid_values(tmp_path / "r", "loss")) == [5]
    run(world, tmp_path / "none", "--steps", "0")
    assert not valid_values(tmp_path / "none", "loss")


@pytest.mark.parametrize("method", ["lora", "p_tuning", "full"])
@pytest.mark.parametrize("at", [2, 6])
def test_a_resume_knows_the_best_weights_so_far(at, method, world, tmp_path, monkeypatch):
    """Cut before and after the best evaluation; here the highest loss is the best, so it is an early one."""
    monkeypatch.setattr(best, "LOWER_IS_BETTER", ())
    flags = ["--method", method, *STEADY, "--steps", "8", "--keep_best", "loss", "--save_every", "2"]
    whole = run(world, tmp_path / "whole", *flags)
    values = valid_values(tmp_path / "whole", "loss")
    assert list(values) == [2, 4, 6, 8] and whole["best_valid"]["step"] == max(values, key=values.get) < 6
    stopped(monkeypatch, at, lambda: train.main(command(world, tmp_path / "cut", *flags)))
    cut = run(world, tmp_path / "cut", *flags)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert events(tmp_path / "whole") == events(tmp_path / "cut")
    assert cut["best_valid"] == whole["best_valid"] and cut["metrics"] == whole["metrics"]


def test_patience_stops_a_run_and_a_resume_trains_no_further(world, tmp_path, monkeypatch, capsys):
    flags = [*STEADY, "--steps", "40", "--keep_best", "loss", "--patience", "2", "--lr", "0.5"]
    whole = run(world, tmp_path / "whole", *flags)
    values = valid_values(tmp_path / "whole", "loss")
    first = min(values, key=values.get)
    assert whole["steps"] == max(values) == first + 4 < 40      # two evaluations behind the best one
    assert "2 evaluations without gain" in capsys.readouterr().err
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(train, "finish", lambda *args: (_ for _ in ()).throw(Stop))
        train.main(command(world, tmp_path / "cut", *flags))
    before = events(tmp_path / "cut")
    cut = run(world, tmp_path / "cut", *flags)
    assert events(tmp_path / "cut") == before == events(tmp_path / "whole")
    assert cut["steps"] == whole["steps"] and same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


def test_a_folder_that_is_no_run_is_never_deleted(world, tmp_path, capsys):
    shutil.copytree(world / "base", tmp_path / "model")
    assert train.main(command(world, tmp_path / "model", "--fresh")) == 2
    assert "holds a model, not a run" in capsys.readouterr().err
    assert (tmp_path / "model" / "model.safetensors").exists()
    write(tmp_path, {"data": [{"text": "x"}]})
    for fresh in ([], ["--fresh"]):
        assert train.main(command(world, tmp_path / "data", *fresh)) == 2
        assert "is not a run folder" in capsys.readouterr().err


def test_ctrl_c_while_torch_is_imported_is_silent(tmp_path):
    """A module in the place of torch, whose import takes its time."""
    (tmp_path / "torch.py").write_text("import pathlib, time\npathlib.Path('begun').write_text('')\ntime.sleep(60)\n")
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), "--help"], stderr=subprocess.PIPE, cwd=tmp_path,
                               stdout=subprocess.DEVNULL, text=True, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    wait_for(tmp_path / "begun", process)
    process.send_signal(signal.SIGINT)
    assert not process.communicate(timeout=60)[1] and process.returncode == -signal.SIGINT


@pytest.mark.parametrize("flags", [f"--method {m}" for m in METHODS if m != "full"] + VARIANTS)
def test_what_is_frozen_keeps_its_bits(flags, world, tmp_path, monkeypatch):
    """In memory, from the first step to the last: weights, codes of a quantised base, PiSSA's remainder."""
    original, seen = train.apply_method, {}

    def apply_method(ctx, cfg):
        trainable = original(ctx, cfg)
        ids = {id(p) for p in trainable.values()}
        tensors = [*ctx.model.named_parameters(), *ctx.model.named_buffers()]
        seen.update({name: (t, t.clone()) for name, t in tensors if id(t) not in ids})
        return trainable

    monkeypatch.setattr(train, "apply_method", apply_method)
    run(world, tmp_path / "r", *flags.split(), "--lr", "0.1")
    assert len(seen) > 10 and all(torch.equal(now, before) for now, before in seen.values())
    assert ("nf4" in flags) == any(t.dtype == torch.uint8 for t, _ in seen.values())
    assert ("bf16" in flags) == any(t.dtype == torch.bfloat16 for t, _ in seen.values())


def test_a_torn_state_falls_back_to_the_one_before(world, tmp_path, monkeypatch, capsys):
    run(world, tmp_path / "whole", "--save_every", "1")
    stopped(monkeypatch, 4, lambda: train.main(command(world, tmp_path / "cut", "--save_every", "1")))
    state = tmp_path / "cut" / "state.pt"
    state.write_bytes(state.read_bytes()[:1000])
    run(world, tmp_path / "cut", "--save_every", "1")
    assert "state.pt is damaged" in capsys.readouterr().err
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


def test_other_data_under_an_interrupted_run_starts_anew(world, tmp_path, capsys, monkeypatch):
    shutil.copytree(world, tmp_path / "w")
    args = command(tmp_path / "w", tmp_path / "r")
    monkeypatch.setattr(evaluate, "summed_loss", lambda *a: (_ for _ in ()).throw(Stop()))
    with pytest.raises(Stop):
        train.main(args)
    monkeypatch.undo()
    with open(tmp_path / "w" / "chat" / "train.jsonl", "a") as f:
        f.write('{"prompt": "zz", "completion": "z"}\n')
    assert train.main(args) == 0
    aside, = tmp_path.glob("r.*")
    assert f"--data changed since this run was made; the old run is now {aside}" in capsys.readouterr().err
    assert (aside / "failed.json").exists() and (tmp_path / "r" / "result.json").exists()


# -------------------------------------------------------------------------------------- signals, kills, disks

@pytest.fixture
def launch(python, world):
    """launch(out, *flags): a run in a process of its own."""
    def launch(out, *flags):
        args = [python, str(ROOT / "train.py"), *command(world, out, *flags)]
        return subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return launch


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """The weights of a run of 150 steps that nothing has cut."""
    folder = tmp_path_factory.mktemp("whole") / "r"
    run(world, folder, "--steps", "150", "--save_every", "5")
    return weights(folder)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_and_the_same_command_goes_on(number, world, launch, whole, tmp_path):
    flags = ["--steps", "150", "--save_every", "5"]
    p = launch(tmp_path / "cut", *flags)
    wait_for(tmp_path / "cut" / "state.pt", p)
    p.send_signal(number)
    _, err = p.communicate(timeout=300)
    step = resume_step(tmp_path / "cut")
    assert p.returncode == 75 and f"interrupted; the same command continues from step {step}\n" in err, err
    assert not (tmp_path / "cut" / "result.json").exists()
    run(world, tmp_path / "cut", *flags)
    assert same(whole, weights(tmp_path / "cut"))


@pytest.mark.slow
def test_kill_9_at_random_moments(world, launch, tmp_path):
    flags = ["--steps", "300", "--save_every", "1"]
    run(world, tmp_path / "whole", *flags)
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        p = launch(tmp_path / "cut", *flags)
        time.sleep(1 + 3 * torch.rand(1, generator=generator).item())
        p.kill()
        p.communicate()
    assert train.main(command(world, tmp_path / "cut", *flags)) == 0
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


def test_two_processes_on_one_folder(world, tmp_path, capsys):
    cfg = train.parse(command(world, tmp_path / "r"))
    with run_folder.Run(cfg.out, {}).opened():
        assert train.main(command(world, tmp_path / "r")) == 2
    assert "in use by another process" in capsys.readouterr().err


def test_a_full_disk_loses_nothing(world, tmp_path, monkeypatch, capsys):
    flags = ["--save_every", "2"]
    original, saves = torch.save, []

    class Full:
        def __init__(self, f):
            self.f, self.left = f, 10_000

        def write(self, some):                      # in the middle: torch then fails once more, over its own
            self.left -= len(some)
            if self.left < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.f.write(some)

        def flush(self):
            self.f.flush()

    def full(state, f):
        saves.append(1)
        return original(state, Full(f) if len(saves) == 2 else f)

    monkeypatch.setattr(torch, "save", full)
    assert train.main(command(world, tmp_path / "r", *flags)) == 74
    assert "No space left" in capsys.readouterr().err
    assert torch.load(tmp_path / "r" / "state.pt", weights_only=True)["counters"]["step"] == 2
    assert not list((tmp_path / "r").glob("*.tmp")) and not list((tmp_path / "r").glob(".*.tmp"))
    monkeypatch.setattr(torch, "save", original)
    run(world, tmp_path / "r", *flags)
    run(world, tmp_path / "whole", *flags)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "r"))


def test_a_file_where_the_folder_should_be(world, tmp_path, capsys):
    (tmp_path / "r").write_text("")
    assert train.main(command(world, tmp_path / "r" / "x")) == 74
    assert "cannot be written" in capsys.readouterr().err


def test_a_closed_pipe_does_not_end_the_run(launch, tmp_path):
    p = launch(tmp_path / "r")
    p.stdout.close()
    assert p.wait(timeout=300) == 0, p.stderr.read()
    assert (tmp_path / "r" / "result.json").exists()
    p.stderr.close()


# ---------------------------------------------------------------------------------------------------- numbers

def test_a_step_that_is_not_finite_is_skipped_and_ten_end_the_run(world, tmp_path, monkeypatch, capsys):
    original, calls = evaluate.summed_loss, []

    def once(ctx, examples, past):
        calls.append(torch.is_grad_enabled())
        bad = torch.is_grad_enabled() and sum(calls) == 3
        return original(ctx, examples, past) * (math.inf if bad else 1.0)

    monkeypatch.setattr(evaluate, "summed_loss", once)
    r = run(world, tmp_path / "once")
    assert r["skipped"] == 1 and all(t.isfinite().all() for t in weights(tmp_path / "once").values())

    def always(ctx, examples, past):
        return original(ctx, examples, past) * (math.nan if torch.is_grad_enabled() else 1.0)

    monkeypatch.setattr(evaluate, "summed_loss", always)
    assert train.main(command(world, tmp_path / "always", "--steps", "20")) == 1
    assert "10 steps in a row were not finite, first of all the gradient of" in capsys.readouterr().err


def test_a_bad_weight_in_the_base_is_named(world, tmp_path, capsys):
    model, _, tokenizer = train.load(world / "base")
    model.blocks[1].mlp.up.weight.data[0, 0] = math.nan
    model.save_pretrained(tmp_path / "bad")
    tokenizer.save_pretrained(tmp_path / "bad")
    args = command(world, tmp_path / "r", "--steps", "20", "--method", "full")
    args[1] = str(tmp_path / "bad")
    assert train.main(args) == 1
    assert "first of all the weight blocks.1.mlp.up.weight" in capsys.readouterr().err


def test_learning_rate_zero_and_absurd(world, tmp_path):
    run(world, tmp_path / "zero", "--lr", "0", "--method", "full")
    assert same({k.split("/")[1]: t for k, t in weights(tmp_path / "zero").items()},
                read_tensors(world / "base" / "model.safetensors"))
    assert train.main(command(world, tmp_path / "huge", "--lr", "1000", "--grad_clip", "0")) in (0, 1)


def test_zero_steps_measure_only(world, tmp_path):
    r = run(world, tmp_path / "r", "--steps", "0")
    assert r["steps"] == 0 and r["metrics"]["loss"] == pytest.approx(r["baseline_metrics"]["loss"], abs=1e-6)


def test_fp16_with_a_scaler_on_the_cpu(world, tmp_path):
    r = run(world, tmp_path / "r", "--method", "full", "--dtype", "fp16", "--steps", "12")
    state = torch.load(tmp_path / "r" / "state.pt", weights_only=True)
    assert state["scaler"]["scale"] > 0 and r["skipped"] < 10
    assert all(t.dtype == torch.float32 for t in state["trainable"].values())


@pytest.mark.parametrize("method", ["full", "lora", "prefix_tuning"])
def test_bf16_learns_in_fp32(method, world, tmp_path):
    run(world, tmp_path / "r", "--method", method, "--dtype", "bf16")
    state = torch.load(tmp_path / "r" / "state.pt", weights_only=True)
    assert all(t.dtype == torch.float32 for t in state["trainable"].values())


def test_a_chain_in_bf16_is_read_as_it_was_trained(world, tmp_path):
    """What the first run learned is merged in fp32, wherever: rounded first, the second had another base."""
    run(world, tmp_path / "a", "--dtype", "bf16", "--lr", "3e-2", "--steps", "6")
    r = run(world, tmp_path / "b", "--dtype", "bf16", "--init", str(tmp_path / "a"))
    out = tmp_path / "eval"
    assert train.main(["--task", "eval", "--init", str(tmp_path / "b"), "--data", str(world / "chat"),
                       "--out", str(out), "--dtype", "bf16", "--max_new_tokens", "4"]) == 0
    assert read_json(out / "result.json")["metrics"]["loss"] == r["metrics"]["loss"]


def test_quantised_bases_and_checkpointing_run(world, tmp_path):
    for name, flags in dict(int8=["--quant", "int8"], nf4=["--quant", "nf4", "--double_quant"],
                            dora=["--dora"], pissa=["--pissa"], rs=["--rslora"], plus=["--loraplus_lr_ratio", "16"],
                            map=["--rank_pattern", "v=2", "--layers", "1"]).items():
        assert run(world, tmp_path / name, *flags)["skipped"] == 0
    run(world, tmp_path / "plain", "--method", "full")
    run(world, tmp_path / "again", "--method", "full", "--gradient_checkpointing")
    a, b = weights(tmp_path / "plain"), weights(tmp_path / "again")
    assert all(torch.allclose(a[k], b[k], atol=1e-6) for k in a)


def test_a_quantised_run_is_read_on_the_base_it_was_trained_against(world, tmp_path):
    for quant in (["--quant", "nf4", "--double_quant"], ["--quant", "int8", "--dora"]):
        r = run(world, tmp_path / quant[1], *quant)
        it, merged = tmp_path / quant[1], tmp_path / f"{quant[1]}-merged"
        assert train.main(["--task", "merge", "--init", str(it), "--out", str(merged)]) == 0
        for init in (it, merged):
            out = tmp_path / f"{init.name}-eval"
            assert train.main(["--task", "eval", "--init", str(init), "--data", str(world / "chat"),
                               "--max_new_tokens", "4", "--out", str(out)]) == 0
            loss = read_json(out / "result.json")["metrics"]["loss"]
            assert loss == pytest.approx(r["metrics"]["loss"], rel=1e-5), init.name


def test_a_batch_beyond_the_data_is_the_data(world, tmp_path, capsys):
    found = [run(world, tmp_path / f"b{n}", "--batch", n)["metrics"]["loss"] for n in (2 ** 63 - 1, 64)]
    assert "a step of 9223372036854775807 is more than the 64 examples there are" in capsys.readouterr().err
    assert found[0] == found[1]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
                                   MemoryError()])
def test_out_of_memory_is_advice(error, world, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise error
    monkeypatch.setattr(evaluate, "summed_loss", full)
    assert train.main(command(world, tmp_path / "r")) == 1
    assert "--micro_batch_tokens" in capsys.readouterr().err


def test_a_trainable_parameter_in_no_optimiser_group_is_an_error(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lora.LoRA, "groups", lora.LoRA.groups[:1])
    assert train.main(command(world, tmp_path / "a")) == 2
    assert "lora_B is trainable, but LoRA.groups has no Group for lora_B" in capsys.readouterr().err
    monkeypatch.undo()
    original = train.FullMethod.param_groups
    monkeypatch.setattr(train.FullMethod, "param_groups", lambda *args: original(*args)[1:])
    assert train.main(command(world, tmp_path / "b", "--method", "full")) == 2
    assert "wte.weight is trainable, but --method full puts it in no optimiser group" in capsys.readouterr().err


def test_a_trainable_parameter_without_a_gradient_is_an_error(world, tmp_path, monkeypatch, capsys):
    original = prompts.PromptMethod.apply

    def apply(self, ctx, cfg, log):
        return {**original(self, ctx, cfg, log), "prompt.idle": torch.nn.Parameter(torch.zeros(3))}

    monkeypatch.setattr(prompts.PromptMethod, "apply", apply)
    assert train.main(command(world, tmp_path / "r", "--method", "p_tuning_v2")) == 2
    assert "prompt.idle is trainable, but the loss of --task sft gives it no gradient" in capsys.readouterr().err
    assert not (tmp_path / "r" / "result.json").exists()


# -------------------------------------------------------------------------------------------------- the tasks

def test_classify_by_words_and_by_head(world, tmp_path):
    for by in ("lm", "head"):
        r = run(world, tmp_path / by, "--task", "classify", "--classifier", by, "--method", "full",
                "--steps", "60", "--batch", "32", "--lr", "3e-3", data="label")
        assert r["metrics"]["accuracy"] > 0.9, (by, r["metrics"])
        out = tmp_path / f"eval-{by}"
        args = ["--task", "eval", "--init", str(tmp_path / by), "--data", str(world / "label"),
                "--out", str(out)]
        assert train.main(args) == 0
        again = read_json(out / "result.json")["metrics"]
        assert again["accuracy"] == r["metrics"]["accuracy"]
        assert again["loss"] == pytest.approx(r["metrics"]["loss"], rel=1e-4)


def test_a_head_judges_the_rows_it_was_trained_on(world, tmp_path, capsys):
    run(world, tmp_path / "r", "--task", "classify", "--classifier", "head", data="label")
    assert train.main(["--task", "eval", "--init", str(tmp_path / "r"), "--data", str(world / "chat"),
                       "--out", str(tmp_path / "e")]) == 65
    assert "holds chat rows" in capsys.readouterr().err


def test_one_label_teaches_nothing_but_can_be_measured(world, tmp_path, capsys):
    write(tmp_path, {"one": [{"text": f"a{i}", "label": "x"} for i in range(16)]})
    words = command(world, tmp_path / "r", "--task", "classify", data="label")
    words[words.index("--data") + 1] = str(tmp_path / "one")
    assert train.main(words) == 65 and "only the label 'x'" in capsys.readouterr().err
    run(world, tmp_path / "two", "--task", "classify", "--classifier", "head", data="label")
    assert train.main(["--task", "eval", "--init", str(tmp_path / "two"), "--data", str(tmp_path / "one"),
                       "--out", str(tmp_path / "e")]) == 0


def test_a_question_that_fills_the_context_is_refused(world, tmp_path, capsys):
    rows = [{"text": f"text {i}", "label": f"a label number {i}"} for i in range(12)]
    write(tmp_path, {"many": rows})
    words = command(world, tmp_path / "r", "--task", "classify", data="label")
    words[words.index("--data") + 1] = str(tmp_path / "many")
    assert train.main(words) == 2 and "a shorter --question" in capsys.readouterr().err
    assert train.main([*words, "--question", "Which?"]) == 0


def test_word_scores_equal_whole_sequences(world):
    """The cached scores of labels are the sums over whole sequences, with and without a soft prompt."""
    model, _, tokenizer = train.load(world / "base")
    text = Text(tokenizer, "chatml", labels=("x", "yes sir", "no"))
    for prompt in (None, PTuningV2(model, 3, prefix_dropout=0.0)):
        ctx = evaluate.ModelContext(model.eval(), text, torch.device("cpu"), torch.float32, prompt=prompt)
        asked = [tokenizer.encode("ab"), tokenizer.encode("abcdefg"), tokenizer.encode("c")]
        got = evaluate.word_scores(ctx, asked)
        for i, ids in enumerate(asked):
            for j, label in enumerate(text.labels):
                word = chat.answer(label, "chatml", tokenizer)
                past = prompt(model) if prompt is not None else None
                with torch.no_grad():
                    logp = model(torch.tensor([ids + word]), past=past)[0].log_softmax(-1)[0]
                want = -sum(logp[len(ids) - 1 + t, w] for t, w in enumerate(word))
                assert got[i, j].item() == pytest.approx(want.item(), abs=1e-4)


def test_chains_merge_and_chat(world, tmp_path, capsys):
    run(world, tmp_path / "one", "--targets", "q,v,up", "--lr", "1e-2")
    args = command(world, tmp_path / "two", "--method", "lora")
    args[1] = str(tmp_path / "one")
    assert train.main(args) == 0
    merge = ["--task", "merge", "--init", str(tmp_path / "two"), "--out", str(tmp_path / "merged")]
    assert train.main(merge) == 0
    assert float(re.search(r"merging: (\S+)", capsys.readouterr().out)[1]) < 1e-4
    model, _, _ = train.load(tmp_path / "two")
    merged, _, tokenizer = train.load(tmp_path / "merged")
    x = torch.tensor([[97, 98, 99, 100]])
    with torch.no_grad():
        assert (model(x)[0] - merged(x)[0]).abs().max() < 1e-4
    talk = ["--task", "chat", "--init", str(tmp_path / "merged"), "--prompt", "ab", "--max_new_tokens", "3"]
    assert train.main(talk) == 0
    assert train.main(merge) == 2


def test_a_merge_that_changes_the_logits_writes_nothing(world, tmp_path, monkeypatch, capsys):
    run(world, tmp_path / "r", "--lr", "1e-2")
    merge = ["--task", "merge", "--init", str(tmp_path / "r"), "--out", str(tmp_path / "merged")]
    with monkeypatch.context() as patch:
        patch.setattr(lora.LoRA, "merged", lambda self, W, b: (W, b))       # it forgets what was trained
        assert train.main(merge) == 1
    assert "merged logits differ from the adapted model's by" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()
    assert train.main(merge) == 0


def test_merging_keeps_the_head(world, tmp_path):
    run(world, tmp_path / "head", "--task", "classify", "--classifier", "head", data="label")
    merge = ["--task", "merge", "--init", str(tmp_path / "head"), "--out", str(tmp_path / "m")]
    assert train.main(merge) == 0
    found = []
    for init in ("head", "m"):
        words = ["--task", "eval", "--init", str(tmp_path / init), "--data", str(world / "label")]
        assert train.main([*words, "--out", str(tmp_path / f"eval-{init}")]) == 0
        found.append(read_json(tmp_path / f"eval-{init}" / "result.json")["metrics"])
    assert found[0].keys() == found[1].keys() and abs(found[0]["loss"] - found[1]["loss"]) < 1e-4


def classifier_of_peft(world, folder, rows=2, names=None, **config):
    """A SEQ_CLS adapter as peft writes it, and its weights: the head is in the adapter's file."""
    model = GPT.from_pretrained(world / "base")
    lora.inject(model, "q,v", rank=2)
    generator = torch.Generator().manual_seed(7)
    for p in lora.adapter_parameters(model).values():
        p.data.normal_(0, 0.3, generator=generator)
    score = torch.randn(rows, 32, generator=generator)
    lora.save_adapter(model, folder, base=str(world / "base"), extra={"score.weight": score})
    (folder / "run.json").unlink()
    write_json(folder / "adapter_config.json", {**read_json(folder / "adapter_config.json"), **config})
    if names:
        write_json(folder / "config.json", {"id2label": dict(enumerate(names))})
    return model, score


def labels_of_peft(world, model, score, rows):
    """What transformers computes: the head at the last token of tokenizer(text), which adds none here."""
    tokenizer = Tokenizer.from_pretrained(world / "base")
    ids = [torch.tensor([tokenizer.encode(row["text"])]) for row in rows]
    with torch.no_grad():
        return [int((model.eval().hidden_states(x)[0][0, -1] @ score.T).argmax()) for x in ids]


def test_a_classifier_of_peft_is_measured_by_its_head(world, tmp_path, capsys):
    model, score = classifier_of_peft(world, tmp_path / "cls", names=["y", "x"])
    rows = [json.loads(line) for line in (world / "label" / "test.jsonl").read_text().splitlines()]
    right = [number == ["y", "x"].index(row["label"])
             for number, row in zip(labels_of_peft(world, model, score, rows), rows)]
    assert 0 < sum(right) < len(right)

    def accuracy(folder, out):
        argv = ["--task", "eval", "--init", str(folder), "--data", str(world / "label"), "--out", str(out)]
        assert train.main(argv) == 0
        return read_json(out / "result.json")

    result = accuracy(tmp_path / "cls", tmp_path / "eval")
    assert result["item_correct"] == "".join("1" if one else "0" for one in right)
    assert train.main(["--task", "merge", "--init", str(tmp_path / "cls"), "--out", str(tmp_path / "m")]) == 0
    assert torch.equal(read_tensors(tmp_path / "m" / "head.safetensors")["score.weight"], score)
    again = accuracy(tmp_path / "m", tmp_path / "eval-m")
    assert again["item_correct"] == result["item_correct"]
    capsys.readouterr()
    assert train.main(["--task", "chat", "--init", str(tmp_path / "cls"), "--prompt", rows[0]["text"]]) == 0
    label = rows[0]["label"] if right[0] else {"x": "y", "y": "x"}[rows[0]["label"]]
    assert capsys.readouterr().out.startswith(label)
    assert train.main(["--task", "sample", "--init", str(tmp_path / "cls"), "--data", str(world / "chat"),
                       "--out", str(tmp_path / "s"), "--reward", "builtins:len"]) == 2
    assert "scores and does not generate" in capsys.readouterr().err


def test_a_head_of_peft_is_gone_on_with_or_its_loss_is_said(world, tmp_path, capsys):
    classifier_of_peft(world, tmp_path / "cls", names=["y", "x"])
    flags = ["--init", tmp_path / "cls", "--task", "classify", "--lr", 0]
    result = run(world, tmp_path / "head", *flags, "--classifier", "head", data="label")
    assert result["metrics"] == result["baseline_metrics"]
    assert "has a head, which this command does not use" not in capsys.readouterr().err
    run(world, tmp_path / "words", *flags, "--classifier", "lm", data="label")
    assert f"--init {tmp_path / 'cls'} has a head, which this command does not use" in capsys.readouterr().err


@pytest.mark.parametrize("rows, config, says", [
    (2, {}, r"labels \['x', 'y'\], but the head of .* knows \['0', '1'\]; id2label in a config.json"),
    (1, {}, "a head of .labels, 32., and of two labels or more"),
    (2, {"task_type": "TOKEN_CLS"}, "task_type 'TOKEN_CLS' is not read here; CAUSAL_LM .* and SEQ_CLS"),
    (2, {"task_type": "CAUSAL_LM"}, "score.weight was trained beside the adapter .modules_to_save."),
    (2, {"modules_to_save": ["score", "value"], "task_type": "CAUSAL_LM"}, "score.weight was trained beside"),
])
def test_a_head_that_cannot_be_used_is_refused(rows, config, says, world, tmp_path, capsys):
    classifier_of_peft(world, tmp_path / "cls", rows, **config)
    argv = ["--task", "eval", "--init", str(tmp_path / "cls"), "--data", str(world / "label")]
    assert train.main([*argv, "--out", str(tmp_path / "eval")]) == 65
    assert re.search(says, capsys.readouterr().err)


@pytest.mark.parametrize("key", ["task", "template", "classifier", "attention", "objective", "quant"])
def test_an_unknown_choice_in_run_json_is_named(key, world, tmp_path, capsys):
    classifier_of_peft(world, tmp_path / "a", task_type="CAUSAL_LM")
    write_json(tmp_path / "a" / "run.json", {key: "guess"})
    assert train.main(["--task", "chat", "--prompt", "ab", "--init", str(tmp_path / "a")]) == 65
    assert f"{tmp_path}/a/run.json: {key} is 'guess'; it is one of " in capsys.readouterr().err


def test_adapters_in_a_ring_and_a_base_that_is_gone_are_named(world, tmp_path, capsys):
    def chat(name):
        assert train.main(["--task", "chat", "--prompt", "ab", "--init", str(tmp_path / name)]) == 65
        return capsys.readouterr().err

    bases = {"itself": "itself", "a": "b", "b": "c", "c": "a", "gone": "nowhere/model", "nul": "x\0y", "long": "x" * 300}
    for name, base in bases.items():
        classifier_of_peft(world, tmp_path / name, base_model_name_or_path=str(tmp_path / base))
    assert f"leads back to itself ({tmp_path}/itself -> {tmp_path}/itself); name the plain" in chat("itself")
    ring = " -> ".join(str(tmp_path / name) for name in "abca")
    assert f"leads back to itself ({ring}); name the plain model there" in chat("a")
    for name in ("gone", "nul", "long"):
        config = tmp_path / name / "adapter_config.json"
        assert f"{config}: its base_model_name_or_path leads to no base: " in chat(name)
    for base in ([], 7, {"x": 1}):
        classifier_of_peft(world, tmp_path / "typed", base_model_name_or_path=base)
        assert '"base_model_name_or_path" is' in chat("typed")


def test_a_prompt_is_read_where_its_device_is_not(world, tmp_path):
    """Trained on a GPU, evaluated without one: the table that it began with is made here."""
    run(world, tmp_path / "soft", "--method", "prompt_tuning", "--prompt_template", "front", "--num_virtual_tokens", "3")
    stored = read_json(tmp_path / "soft" / "config.json")
    stored["config"]["device"] = "cuda:99"
    (tmp_path / "soft" / "config.json").write_text(json.dumps(stored))
    assert train.main(["--task", "eval", "--init", str(tmp_path / "soft"), "--data", str(world / "chat"),
                       "--out", str(tmp_path / "e")]) == 0
    assert "moved" in "".join(read_json(tmp_path / "e" / "result.json")["virtual_tokens"])


def test_a_soft_prompt_goes_on_with_the_flags_that_are_given(world, tmp_path, capsys):
    run(world, tmp_path / "soft", "--method", "p_tuning_v2")
    again = ["--init", str(tmp_path / "soft"), "--method", "p_tuning_v2"]
    for dropout in ("0.0", "0.5"):
        run(world, tmp_path / dropout, *again, "--prefix_dropout", dropout)
    one, other = (weights(tmp_path / dropout) for dropout in ("0.0", "0.5"))
    assert not same(one, other)
    assert train.main(command(world, tmp_path / "t", *again, "--prompt_init", "zero", "--num_virtual_tokens", "9")) == 2
    assert "--num_virtual_tokens and --prompt_init would shape a new soft prompt; --init" in capsys.readouterr().err
    run(world, tmp_path / "input", "--method", "prompt_tuning", "--num_virtual_tokens", "3")
    for name, value in (("prompt_template", "front"), ("prompt_init_text", "ab")):
        words = ["--init", str(tmp_path / "input"), "--method", "prompt_tuning", f"--{name}", value]
        assert train.main(command(world, tmp_path / name, *words)) == 2
        assert f"--{name} would shape a new soft prompt" in capsys.readouterr().err


def test_what_the_first_lines_say_of_unusual_data(world, tmp_path, capsys):
    """Answers longer than what is generated; a folder without a test file; two long rows that are dropped."""
    rows = [{"prompt": f"a{i}", "completion": "b" * (20 if i < 4 else 2)} for i in range(40)]
    rows[0]["prompt"] = rows[1]["prompt"] = "c" * 150
    write(tmp_path, {"long": rows}, every=1)
    (tmp_path / "long" / "test.jsonl").unlink()
    words = ["--keep_best", "loss", "--eval_every", "2", "--too_long", "drop", "--block_size", "60", "--max_new_tokens", "8"]
    run(tmp_path, tmp_path / "r", "--init", str(world / "base"), *words, data="long")
    said = capsys.readouterr().err
    assert "4 of 40 answers of test are longer than --max_new_tokens 8" in said
    assert "test is " in said and "because there is no test file" in said


def test_a_question_longer_than_an_example_leaves_no_room_for_a_text(world, tmp_path, capsys):
    words = ["--task", "classify", "--question", "x" * 30]
    assert train.main(command(world, tmp_path / "r", *words, "--block_size", "24", data="label")) == 2
    assert "leaves no room for a text; give a shorter --question" in capsys.readouterr().err


@pytest.mark.parametrize("out", ["soft", "./soft", "."])
def test_no_run_writes_over_the_model_it_starts_from(out, world, tmp_path, capsys, monkeypatch):
    run(world, tmp_path / "soft", "--method", "p_tuning_v2")
    before = weights(tmp_path / "soft")
    monkeypatch.chdir(tmp_path)
    again = ["--init", "soft", "--method", "p_tuning_v2", "--data", str(world / "chat"), "--steps", "2", "--fresh"]
    assert train.main([*again, "--out", out]) == 2
    assert f"--out {out} holds a model that --init soft reads; use another --out" in capsys.readouterr().err
    assert same(weights(tmp_path / "soft"), before)


def test_what_an_answer_to_nothing_is_shown_with(world, tmp_path, capsys):
    alone = {"messages": [{"role": "assistant", "content": "hello"}]}
    write(tmp_path, {"alone": [alone] * 16})
    run(tmp_path, tmp_path / "r", "--init", str(world / "base"), data="alone")
    capsys.readouterr()
    assert train.main(["--task", "show", "--init", str(tmp_path / "r")]) in (0, 2)
    assert "Traceback" not in capsys.readouterr().err


def test_an_answer_to_nothing_and_a_label_that_is_never_taught(world, tmp_path, capsys):
    alone = {"messages": [{"role": "assistant", "content": "hello"}]}
    write(tmp_path, {"alone": [alone] * 16, "late": [{"text": f"a{i}", "label": "x" if i % 2 else "y"}
                                                     for i in range(16)]})
    run(tmp_path, tmp_path / "r", "--init", str(world / "base"), data="alone")
    with (tmp_path / "late" / "test.jsonl").open("a") as f:
        f.write('{"text": "zz", "label": "w"}\n')
    args = command(tmp_path, tmp_path / "h", "--task", "classify", "--classifier", "head", data="late")
    assert train.main([*args, "--init", str(world / "base")]) == 0
    assert "no training row has the label w" in capsys.readouterr().err


def test_a_long_question_is_asked_as_it_was_taught(world):
    """Cut at its beginning, but behind the first id, taught as asked; --too_long holds for a head."""
    text = Text(Tokenizer.from_pretrained(world / "base"), "plain")
    row = {"messages": [{"role": "user", "content": "abc" * 60}, {"role": "assistant", "content": "d"}]}
    whole, cut = text.prompt_ids(row), text.prompt_ids(row, limit=50)
    assert len(cut) == 50 and cut[0] == whole[0] and cut[1:] == whole[-49:]
    [example], _ = text.encode([row], 60)
    n = example[1].index(True)
    assert example[0][:n] == text.prompt_ids(row, limit=n) and n < len(whole)
    head = Text(Tokenizer.from_pretrained(world / "base"), "plain")
    head.classifier, head.labels = "head", ("x",)
    rows = [{"text": "abc" * 60, "label": "x"}, {"text": "a", "label": "x"}]
    assert [len(head.encode(rows, 120, how)[0]) for how in ("truncate", "drop")] == [2, 1]
    with pytest.raises(UserError):
        head.encode(rows, 120, "error")


def test_a_talk_that_is_interrupted_claims_no_save(world, monkeypatch, capsys):
    monkeypatch.setattr("builtins.input", lambda _: run_folder.defer_signals.handler(signal.SIGINT, None))
    assert train.main(["--task", "chat", "--init", str(world / "base")]) == 130
    assert "saved" not in capsys.readouterr().err


def test_few_shot_and_zero_shot(world, tmp_path):
    zero = run_none(world, tmp_path / "zero")
    two = run_none(world, tmp_path / "two", "--shots", "2")
    assert zero["steps"] == 0 and zero["metrics"]["loss"] > 0 and "loss" not in two["metrics"]
    model, _, tokenizer = train.load(world / "base")
    text = Text(tokenizer, "chatml")
    rows = [{"messages": [{"role": "user", "content": c}, {"role": "assistant", "content": c}]} for c in "ab"]
    assert tokenizer.decode(text.prompt_ids(rows[1], rows[:1]), special=True) == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
        "<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n")


def run_none(world, out, *flags):
    args = ["--init", str(world / "base"), "--data", str(world / "chat"), "--out", str(out),
            "--method", "none", "--max_new_tokens", "4", *flags]
    assert train.main(args) == 0
    return read_json(out / "result.json")


def test_a_template_puts_virtual_tokens_inside_the_prompt(world, tmp_path):
    r = run(world, tmp_path / "r", "--method", "p_tuning", "--num_virtual_tokens", "4",
            "--prompt_template", "{p:2} {prompt} {p:2}", "--steps", "40", "--lr", "1e-2")
    assert r["metrics"]["loss"] < r["baseline_metrics"]["loss"]
    out = tmp_path / "again"
    args = ["--task", "eval", "--init", str(tmp_path / "r"), "--data", str(world / "chat"),
            "--out", str(out), "--max_new_tokens", "4"]
    assert train.main(args) == 0
    assert read_json(out / "result.json")["metrics"]["loss"] == pytest.approx(r["metrics"]["loss"], rel=1e-4)


@pytest.mark.parametrize("task, data, flags", [
    ("sft", "chat", "--method prompt_tuning"), ("sft", "chat", "--method p_tuning --encoder lstm"),
    ("sft", "chat", "--method prompt_tuning --prompt_template {p:4}{prompt}"), ("sft", "chat", "--method prefix_tuning"),
    ("sft", "chat", "--method p_tuning_v2 --prompt_init gated"),
    ("classify", "label", "--method prompt_tuning --prompt_init labels"),
])
def test_eval_reads_a_soft_prompt_and_knows_where_it_started(task, data, flags, world, tmp_path, capsys):
    flags = ["--task", task, *flags.split(), "--num_virtual_tokens", "4", "--seed", "7"]
    for name, steps in (("none", "0"), ("some", "3")):
        args = command(world, tmp_path / name, *flags, data=data)
        args[args.index("--steps") + 1] = steps
        assert train.main(args) == 0
        _, prompt, _ = train.load(tmp_path / name)
        start = train.initial_prompt(tmp_path / name)
        assert torch.allclose(prompt.prompt_embeddings(), start.prompt_embeddings(), rtol=0, atol=1e-6) == (steps == "0")
        ask = ["--task", "eval", "--init", str(tmp_path / name), "--data", str(world / data), "--out",
               str(tmp_path / f"eval-{name}")]
        capsys.readouterr()
        assert train.main(ask) == 0
        printed = capsys.readouterr().out
        lines = read_json(tmp_path / f"eval-{name}" / "result.json")["virtual_tokens"]
        assert train.main(ask) == 0
        assert capsys.readouterr().out == printed
        embeddings = "prompt_tuning" in flags or "p_tuning" in flags
        assert lines[-1].startswith("How to read the cosines: ") == embeddings
        ways = [line.split("| ")[-1] for line in (lines[1:-1] if embeddings else lines[1:])]
        assert len(ways) == (4 if embeddings else 2)        # tokens, or layers
        look = ["--task", "show", "--init", str(tmp_path / name)]
        assert train.main(look) == 0
        shown = capsys.readouterr().out
        assert shown in printed and shown.split() == " ".join(lines).split()
        command_at_the_end = read_json(tmp_path / name / "result.json")["next_command"].splitlines()[-1]
        assert command_at_the_end.startswith(f"python train.py {' '.join(look)}    # the ")
        assert all((float(way) == 0) == (steps == "0") for way in ways)
    alone = ["--task", "eval", "--init", str(tmp_path / "some" / "adapter"), *ask[4:6]]
    assert train.main([*alone, "--out", str(tmp_path / "alone")]) == 0
    assert "| unknown" in capsys.readouterr().out
    assert "virtual_tokens" not in json.loads((tmp_path / "results.jsonl").read_text().splitlines()[-1])


def test_a_soft_prompt_is_gone_on_with(world, tmp_path, capsys):
    """Its own numbers learn on; what comes out stands on the same base."""
    run(world, tmp_path / "one", "--method", "prompt_tuning", "--num_virtual_tokens", "4")
    args = command(world, tmp_path / "two", "--method", "prompt_tuning", "--num_virtual_tokens", "4")
    args[1] = str(tmp_path / "one")
    assert train.main(args) == 0
    _, one, _ = train.load(tmp_path / "one")
    _, two, _ = train.load(tmp_path / "two")
    assert torch.equal(train.initial_prompt(tmp_path / "two").prompt_embeddings(), one.prompt_embeddings())
    assert not torch.equal(one.prompt_embeddings(), two.prompt_embeddings())
    args = command(world, tmp_path / "three", "--method", "prompt_tuning", "--num_virtual_tokens", "5")
    args[1] = str(tmp_path / "one")
    assert train.main(args) == 2
    assert "of 4 virtual tokens" in capsys.readouterr().err


def test_dry_run_shows_the_mask_and_writes_nothing(world, tmp_path, capsys):
    assert train.main(command(world, tmp_path / "r", "--dry_run")) == 0
    out = capsys.readouterr().out
    assert "[[a<|im_end|>]]" in out and "parameters are trainable" in out and not (tmp_path / "r").exists()


@pytest.mark.parametrize("rows, code, says", [
    ([], 65, ""), ([{"text": "only text"}] * 20, 65, "reads chat or label or tags rows"),
    ([{"prompt": "x" * 400, "completion": "a"}] * 20, 65, "0 usable examples"),
    ([{"prompt": "a", "completion": "b"}], 0, ""),                          # one example
    ([{"prompt": "", "completion": "b"}] * 3                                # empty prompts
     + [{"prompt": "q", "completion": "r"}] * 9, 0, ""),
])
def test_data_of_every_shape_has_an_outcome(rows, code, says, world, tmp_path, capsys):
    file = tmp_path / "d.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    args = command(world, tmp_path / "r", "--too_long", "drop")
    args[3] = str(file)
    assert train.main(args) == code
    assert says in capsys.readouterr().err


def test_recorded_failures_do_not_count_as_done(world, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "summed_loss", lambda *a: (_ for _ in ()).throw(Stop()))
    with pytest.raises(Stop):
        train.main(command(world, tmp_path / "r"))
    assert not (tmp_path / "r" / "result.json").exists()


def test_data_that_cannot_be_read_is_recorded_where_a_run_has_begun(world, tmp_path, monkeypatch):
    args = command(world, tmp_path / "r")
    args[3] = str(tmp_path / "later")
    assert train.main(args) == 65 and not (tmp_path / "r").exists()
    shutil.copytree(world / "chat", tmp_path / "later")
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(evaluate, "summed_loss", lambda *a: (_ for _ in ()).throw(Stop()))
        train.main(args)
    shutil.rmtree(tmp_path / "later")
    assert train.main(args) == 65
    assert "later does not exist" in read_json(tmp_path / "r" / "failed.json")["reason"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    foreign = [str(tmp_path / "mine") if word == str(tmp_path / "r") else word for word in args]
    assert train.main(foreign) == 65 and os.listdir(tmp_path / "mine") == ["thesis.txt"]
    shutil.copytree(world / "chat", tmp_path / "later")
    assert train.main(args) == 0 and not (tmp_path / "r" / "failed.json").exists()
    shutil.rmtree(tmp_path / "later")
    assert train.main(args) == 65 and (tmp_path / "r" / "result.json").exists()
    assert not (tmp_path / "r" / "failed.json").exists()        # it is finished, whatever became of its data


def test_forgetting_is_measured_behind_virtual_tokens_too(world, tmp_path):
    flags = ["--forgetting_data", str(world / "text"), "--num_virtual_tokens", "40", "--lr", "1e-2"]
    r = run(world, tmp_path / "r", "--method", "p_tuning_v2", *flags)
    assert math.isfinite(r["metrics"]["forgetting"]) and r["metrics"]["forgetting"] != 0
    zero = run(world, tmp_path / "z", "--method", "lora", "--forgetting_data", str(world / "text"), "--steps", "0")
    assert zero["metrics"]["forgetting"] == 0


def test_every_phase_has_a_name(world, tmp_path, monkeypatch):
    """What may take long is inside a Progress, so that it is said: around it, and what it does."""
    phases = []
    start = Progress.start

    def spy(self):
        around = [phase.what for phase in progress.active if phase.total is None]
        phases.append(", ".join([*around, self.what]) + ("" if self.total is None else f" of {self.total}"))
        return start(self)
    monkeypatch.setattr(Progress, "start", spy)
    run(world, tmp_path / "r", "--eval_every", "4", "--forgetting_data", str(world / "text"))
    base = str(world / "base")
    assert phases == [
        f"reading {world / 'chat'}", "hashing code, data and base", f"loading {base}", "encoding of 8",
        "test before training", "test before training, answers of 8", "test before training, loss of 8",
        "encoding of 2", "forgetting", "forgetting, loss of 3",
        "encoding of 64", "encoding of 8", "encoding of 8", "step of 6",
        "valid at step 4", "valid at step 4, answers of 8", "valid at step 4, loss of 8",
        "valid at step 6", "valid at step 6, answers of 8", "valid at step 6, loss of 8",
        "test after training", "test after training, answers of 8", "test after training, loss of 8",
        "forgetting", "forgetting, loss of 3", "saving"]
    assert progress.active == []


def test_default_rates_fall_with_the_width_of_the_model(tmp_path):
    """By hand: 5e-3 (128 / 576)^0.78 = 1.547e-3; the published 5e-4 (2000 / width)^0.781 within a quarter."""
    assert train.rate_at_width(5e-3, 576) == 1.5e-3
    for width in (2048, 4096, 8192, 16384):
        assert 1 < train.rate_at_width(5e-3, width) / (5e-4 * (2000 / width) ** 0.781) < 1.25
    assert train.rate_at_width(5e-3, 128) == train.rate_at_width(5e-3, 32) == 5e-3

    def rate(*words, name="lr"):
        return train.parse([*words]).get(name)
    wide = tmp_path / "wide"
    GPT(GPTConfig(64, 16, 1, 8, 512)).save_pretrained(wide)             # 4^-0.78 = 0.3392
    assert rate("--init", str(wide)) == 1.7e-3 == rate("--init", str(wide), "--dora")
    assert rate("--init", str(wide), "--method", "full") == 3.4e-4
    assert rate("--init", str(wide), "--method", "prefix_tuning") == 3.4e-4
    for name in ("adalora", "ia3", "prompt_tuning", "p_tuning", "p_tuning_v2"):
        assert rate("--init", str(wide), "--method", name) == train.find_method(name).defaults["lr"]
    ppo_flags = ("--task", "ppo", "--reward", "x", "--init", str(wide), "--method", "p_tuning_v2")
    assert rate(*ppo_flags) == 0.012 and rate(*ppo_flags, name="value_lr") == 6.8e-4       # 0.4 * 5e-3 * 0.3392
    assert rate("--task", "pretrain", "--init", "new") == 1e-3
    assert rate("--task", "pretrain", "--init", str(wide)) == 3.4e-5
    assert rate("--init", str(wide), "--lr", "0.02") == 0.02
    assert rate("--init", str(wide), "--method", "none") is None
    assert rate("--init", str(tmp_path / "nowhere")) == 5e-3            # reported where it is opened


def test_pretraining_starts_from_what_init_is():
    def rate(*words):
        return train.parse(["--task", "pretrain", *words]).lr
    assert rate() == rate("--init", "new") == 1e-3
    assert rate("--init", "data/base") == rate("--init=data/base") == 1e-4
    assert rate("--init", "data/base", "--lr", "0.5") == 0.5
    lora_rate = train.find_method("lora").defaults["lr"]            # an adapter's rate is for a trained model
    assert rate("--init", "data/base", "--method", "lora") == lora_rate
    assert train.parse(["--method", "full"]).lr == 1e-3


def test_forgetting_is_measured_by_default_where_the_base_knows_the_toy_world(world, tmp_path, capsys):
    foreign = ["--init", str(world / "base")]
    assert train.parse([]).forgetting_data == train.parse(["--init", "data/base"]).forgetting_data == "toy/corpus"
    assert train.parse(foreign).forgetting_data == "none"
    assert train.parse([*foreign, "--forgetting_data", "toy/corpus"]).forgetting_data == "toy/corpus"
    words = command(world, tmp_path / "r")
    at = words.index("--forgetting_data")
    assert train.main(words[:at] + words[at + 2:]) == 0             # the flag left out
    note = f"the toy world's text says nothing about {world / 'base'}; --forgetting_data FILE names other text"
    assert capsys.readouterr().err.count(note) == 1
    assert "forgetting" not in read_json(tmp_path / "r" / "result.json")["metrics"]
    assert train.main(words) == 0 and note not in capsys.readouterr().err       # "none" was asked for


def test_rows_of_another_task_name_the_tasks_that_read_them(world, tmp_path, capsys):
    for data, says in (("text", "holds text rows; --task sft reads chat or label or tags rows; text rows are for --task pretrain"),
                       ("pairs", "holds pairs rows; --task sft reads chat or label or tags rows; pairs rows are for "
                        "--task reward or dpo or ppo"),
                       ("ranked", "holds ranked rows; --task sft reads chat or label or tags rows; ranked rows are "
                        "for --task reward or dpo or ppo")):
        rows = {"text": [{"text": "a b"}] * 3, "pairs": [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 3,
                "ranked": [{"prompt": "a", "responses": ["b", "c", "d"], "rank": [1, 2, 3]}] * 3}
        write(tmp_path, {data: rows[data]}, every=1)
        assert train.main(["--data", str(tmp_path / data), "--init", str(world / "base"), "--out",
                           str(tmp_path / "r")]) == 65
        assert says in capsys.readouterr().err


def test_few_items_are_said(world, tmp_path, capsys):
    run(world, tmp_path / "r", "--eval_items", "1")
    assert "8 valid items and 1 test item: metrics mean nothing with fewer than 30" in capsys.readouterr().err
    run(world, tmp_path / "t", "--task", "pretrain", "--block_size", "150", data="text")    # 12 rows, 3 windows
    assert "\n3 test windows: metrics mean nothing" in capsys.readouterr().err
    write(tmp_path, {"chat": [{"prompt": f"{i}", "completion": "a"} for i in range(31)]}, every=1)
    assert train.main(["--init", str(world / "base"), "--data", str(tmp_path / "chat"), "--out",
                       str(tmp_path / "many"), "--steps", "0", "--max_new_tokens", "2"]) == 0
    assert "metrics mean nothing" not in capsys.readouterr().err


def test_a_tokenizer_that_is_too_large_for_the_model_is_refused(world, tmp_path, capsys):
    shutil.copytree(world / "base", tmp_path / "base")
    more = SPECIAL + tuple(f"<|{i}|>" for i in range(20))
    Tokenizer.train(["a b c"], 300, more).save_pretrained(tmp_path / "base")
    args = command(world, tmp_path / "r")
    args[1] = str(tmp_path / "base")
    assert train.main(args) == 65 and "do not belong together" in capsys.readouterr().err


@pytest.mark.skipif("SMOLLM2" not in os.environ, reason="SMOLLM2 names no folder of SmolLM2-135M in fp32")
def test_smollm2s_golden_values():
    model, _, tokenizer = train.load(os.environ["SMOLLM2"])
    ids = tokenizer.encode("The capital of France is")
    assert ids == [504, 3575, 282, 4649, 314]
    with torch.no_grad():
        value, token = model(torch.tensor([ids]))[0][0, -1].max(-1)
    assert token == 7042 and abs(value - 17.3713) < 1e-3


def test_what_is_measured_changes_no_labels(world, tmp_path):
    """A label of a test row that --eval_items leaves out is in the question of every prompt all the same."""
    folder = tmp_path / "rare"
    folder.mkdir()
    for split in ("train", "valid", "test"):
        rows = [{"text": f"t{i}", "label": "xy"[i % 2]} for i in range(12)]
        if split == "test":
            rows[-1]["label"] = "z"
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--task", "classify", "--init", world / "base", "--data", folder, "--steps", 1, "--forgetting_data", "none"]
    for items in (0, 6):
        assert train.main([*map(str, words), "--eval_items", str(items), "--out", str(tmp_path / str(items))]) == 0
    kept, cut = (read_tensors(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in "06")
    assert all(torch.equal(kept[name], cut[name]) for name in kept)
    assert read_json(tmp_path / "6" / "adapter" / "run.json")["labels"] == ["x", "y", "z"]
    rows = [{"text": "t", "label": "x"}]
    cfg = train.parse(["--task", "classify"])
    some, more = (train.identity_of(cfg, train.TaskData({"test": rows}, "label", labels))["data"] for labels in ("x", "xz"))
    assert some != more


def test_special_tokens_of_raw_text_are_read_as_in_training(world, tmp_path):
    write(tmp_path, {"special": [{"text": "<|im_start|>a<|im_end|>" * 20}] * 4}, every=1)
    for words in (["--task", "pretrain", "--init", world / "base", "--data", tmp_path / "special", "--parse_special",
                   "--steps", 2, "--forgetting_data", "none", "--out", tmp_path / "a"],
                  ["--task", "eval", "--init", tmp_path / "a", "--out", tmp_path / "b"]):
        assert train.main(list(map(str, words))) == 0
    trained, measured = (read_json(tmp_path / name / "result.json")["metrics"] for name in "ab")
    assert (trained["targets"], trained["loss"]) == (measured["targets"], measured["loss"])


def test_other_saves_are_the_same_run(world, tmp_path, capsys):
    """--save_every changes no result: a run goes on with another one, also one whose folder still names it."""
    run(world, tmp_path / "run")
    capsys.readouterr()
    run(world, tmp_path / "run", "--save_every", 7)
    assert "is finished" in capsys.readouterr().err
    stored = read_json(tmp_path / "run" / "config.json")
    stored["config"]["save_every"] = 100
    write_json(tmp_path / "run" / "config.json", stored)
    run(world, tmp_path / "run", "--save_every", 7)
    assert "is finished" in capsys.readouterr().err and not list(tmp_path.glob("run.*"))


def test_a_rate_that_does_not_fall_ends_nowhere(capsys):
    assert train.main(["--schedule", "constant", "--min_lr_ratio", "0.3"]) == 2
    assert "--schedule constant keeps it" in capsys.readouterr().err


def test_items_of_a_text_are_windows(world, tmp_path):
    (tmp_path / "t.txt").write_text("some words here\n" * 400)
    words = ["--task", "pretrain", "--method", "none", "--init", world / "base", "--data", tmp_path / "t.txt", "--block_size", 32,
             "--eval_items", 2, "--out", tmp_path / "out"]
    assert train.main(list(map(str, words))) == 0
    assert read_json(tmp_path / "out" / "config.json")["test_items"] == 2
    assert read_json(tmp_path / "out" / "result.json")["metrics"]["targets"] == 64


@pytest.mark.parametrize("words", [["--task", "tag", "--data", "tags"],
                                   ["--task", "classify", "--classifier", "head", "--template", "plain", "--question", "",
                                    "--data", "label"]])
def test_virtual_tokens_leave_room_for_the_text(words, world, tmp_path, capsys):
    write(tmp_path, {"tags": [{"tokens": ["a", "b"], "tags": ["B-X", "O"]}] * 8}, every=1)
    words = [str((tmp_path if word == "tags" else world) / word) if word in ("tags", "label") else word for word in words]
    soft = ["--method", "prompt_tuning", "--prompt_template", "{prompt} {p}", "--num_virtual_tokens", "20", "--block_size", "12"]
    code = train.main([*words, *soft, "--init", str(world / "base"), "--steps", "1", "--out", str(tmp_path / "out")])
    assert code == 2 and "tokens are left for an example" in capsys.readouterr().err


def test_a_head_computes_in_fp32(world):
    """Autocast would round its product, of full tuning in bf16, but not of LoRA, which needs no autocast."""
    model, _, tokenizer = train.load(world / "base")
    text = Text(tokenizer, "plain", labels=("a", "b"), classifier="head")
    ctx = evaluate.ModelContext(model, text, torch.device("cpu"), torch.bfloat16)
    torch.manual_seed(0)
    ctx.head = torch.nn.Linear(32, 2, bias=False)
    with torch.no_grad(), ctx.autocast():
        hidden, _ = ctx.run_prompts([[1, 2, 3]], None)
    with torch.no_grad():
        exact = -ctx.head(hidden.float()).log_softmax(-1)
    assert torch.equal(evaluate.head_scores(ctx, [[1, 2, 3]]), exact)


def test_full_tuning_on_an_adapter_moves_every_weight(world, tmp_path):
    """Also those of its merged base that the adapter did not sit on."""
    run(world, tmp_path / "adapter", "--targets", "q,v")
    assert train.main(["--task", "merge", "--init", str(tmp_path / "adapter"), "--out", str(tmp_path / "merged")]) == 0
    words = ["--init", tmp_path / "adapter", "--data", world / "chat", *SHORT, "--method", "full", "--out", tmp_path / "full"]
    assert train.main(list(map(str, words))) == 0
    before = read_tensors(tmp_path / "merged" / "model.safetensors")
    after = read_tensors(tmp_path / "full" / "model" / "model.safetensors")
    assert [name for name in before if torch.equal(before[name], after[name])] == []


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_merged_is_the_quantized_base_that_was_trained_against(dtype, world, tmp_path, monkeypatch):
    """Codes of bf16 weights are others than those of fp32 weights: run.json says which they are."""
    trained = {}
    original = lora.LoRAMethod.apply

    def apply(self, ctx, cfg, log):
        found = original(self, ctx, cfg, log)
        trained["k"] = ctx.model.blocks[0].attn.k.quant(torch.float32)          # no target: it stays as it is
        return found

    monkeypatch.setattr(lora.LoRAMethod, "apply", apply)
    words = ["--init", world / "base", "--data", world / "chat", "--steps", 1, "--quant", "nf4", "--dtype", dtype, "--targets", "q",
             "--eval_items", 2, "--forgetting_data", "none", "--out", tmp_path / "adapter"]
    assert train.main(list(map(str, words))) == 0
    assert train.main(["--task", "merge", "--init", str(tmp_path / "adapter"), "--out", str(tmp_path / "merged")]) == 0
    assert torch.equal(GPT.from_pretrained(tmp_path / "merged").blocks[0].attn.k.weight, trained["k"])


def test_weight_decay_is_no_flag_of_ia3(capsys):
    assert train.main(["--method", "ia3", "--weight_decay", "0.1", "--dry_run"]) == 2
    assert "weight_decay" in capsys.readouterr().err


def test_forgetting_is_the_rise_of_the_loss(world, tmp_path, monkeypatch):
    losses = iter([2.0, 5.0])
    monkeypatch.setattr(train, "forgetting_loss", lambda *a: next(losses))
    (tmp_path / "other.txt").write_text("some other text\n" * 40)       # no run has measured it yet
    r = run(world, tmp_path / "r", "--forgetting_data", tmp_path / "other.txt")
    assert r["metrics"]["forgetting"] == 3.0


def test_the_rate_of_virtual_tokens_does_not_reach_a_head(world):
    cfg = train.parse(["--task", "classify", "--classifier", "head", "--method", "prompt_tuning", "--lr", "0.3",
                       "--init", str(world / "base"), "--data", str(world / "label")])
    ctx = train.open_context(cfg)
    ctx.text.labels = ("x", "y")
    trainable = train.apply_method(ctx, cfg)
    rates = {name: group["lr"] for group in train.param_groups(ctx, cfg, trainable) for name in group["names"]}
    assert rates.pop("head.score.weight") == 0.03 and set(rates.values()) == {0.3}


def test_full_tuning_decays_matrices_alone(world):
    cfg = train.parse(["--method", "full", "--weight_decay", "0.1", "--init", str(world / "base"),
                       "--data", str(world / "chat")])
    ctx = train.open_context(cfg)
    trainable = train.apply_method(ctx, cfg)
    decays = {name: group["weight_decay"] for group in train.param_groups(ctx, cfg, trainable)
              for name in group["names"]}
    assert decays == {name: 0.1 if p.dim() > 1 else 0.0 for name, p in trainable.items()}
    assert set(decays.values()) == {0.0, 0.1}


def test_a_finite_step_ends_a_row_of_skipped_ones():
    loop = types.SimpleNamespace(step=0, tokens=0, seconds=0.0, skipped=0, skipped_in_a_row=0)
    for finite in (False, False, True, False):
        train.advance(loop, [], finite, 0.0)
    assert (loop.step, loop.skipped, loop.skipped_in_a_row) == (4, 3, 1)


def test_the_loss_of_labels_is_that_of_the_right_one(world, monkeypatch):
    scores = torch.tensor([[0.5, 2.0], [3.0, 1.0]])
    monkeypatch.setattr(evaluate, "label_scores", lambda ctx, prompts: scores)
    text = Text(Tokenizer.from_pretrained(world / "base"), "plain", labels=("x", "y"))
    rows = [{"text": "a", "label": "y"}, {"text": "b", "label": "y"}]
    values, predicted = evaluate.evaluate_labels(types.SimpleNamespace(text=text), rows, [[1], [1]])
    assert predicted == ["x", "y"] and values["loss"] == 1.5 and values["accuracy"] == 0.5
