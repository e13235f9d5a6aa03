"""A base model of two layers over bytes, rows of every kind: all that a run needs; and how to cut a run."""
import contextlib
import json
import time

import pytest
import torch

import lora
from data.results import evaluate
from data.text.tokenizer import Tokenizer
from model import GPT, GPTConfig

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LETTERS = "abcdefgh"
PAIRS = [a + b for a in LETTERS for b in LETTERS]
ROWS = {"chat": [{"prompt": ab, "completion": ab[0]} for ab in PAIRS],
        "label": [{"text": ab, "label": "x" if ab < "e" else "y"} for ab in PAIRS],
        "text": [{"text": "abcd efgh " * 20}] * 12,
        "tags": [{"tokens": list(ab), "tags": ["B-X" if c < "e" else "O" for c in ab]} for ab in PAIRS],
        "pairs": [{"prompt": ab, "chosen": ab[0], "rejected": ab[1]} for ab in PAIRS if ab[0] != ab[1]]}


def adapter_role(model, name):
    """A role of ppo.py: the model with this adapter active; None: as it is without."""
    @contextlib.contextmanager
    def enter():
        with lora.use_adapter(model, name):
            yield model, None
    return enter


class Stop(Exception):
    pass


def stopped(monkeypatch, at, go):
    """go(), cut in the middle of step `at`, at one micro-batch a step; afterwards all is as it was before."""
    original, calls = evaluate.summed_loss, []

    def cut(ctx, examples, past):
        calls.append(torch.is_grad_enabled())
        if sum(calls) == at and torch.is_grad_enabled():
            raise Stop
        return original(ctx, examples, past)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(evaluate, "summed_loss", cut)
        go()


def wait_for(path, process, seconds=300):
    """Until a process has written a file. Seen once is enough: a save moves state.pt aside before the next one lies there."""
    end = time.monotonic() + seconds
    while not path.exists():
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            raise AssertionError(f"{path} was never written: {process.communicate()}")
        time.sleep(0.02)


def write(folder, kinds, every=8):
    """{name: rows} as folder/name/{train,valid,test}.jsonl; valid and test are every eighth row of train."""
    for name, rows in kinds.items():
        (folder / name).mkdir(exist_ok=True)
        for split in ("train", "valid", "test"):
            part = rows if split == "train" else rows[::every]
            (folder / name / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in part))


def world(folder):
    """Writes folder/base and folder/<kind>/{train,valid,test}.jsonl; returns the folder."""
    tokenizer = Tokenizer.train(["a b"], 256 + len(SPECIAL), SPECIAL)
    torch.manual_seed(0)
    model = GPT(GPTConfig(tokenizer.vocab_size, 160, 2, 2, 32, eos=tokenizer.eos))
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    write(folder, ROWS)
    return folder
