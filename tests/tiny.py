"""A base model of two layers over bytes, and a few rows of every kind: all that a run needs."""
import json

import torch

from data.tokenizer import Tokenizer
from model import GPT, GPTConfig

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LETTERS = "abcdefgh"
PAIRS = [a + b for a in LETTERS for b in LETTERS]
ROWS = {"chat": [{"prompt": ab, "completion": ab[0]} for ab in PAIRS],
        "label": [{"text": ab, "label": "x" if ab < "e" else "y"} for ab in PAIRS],
        "text": [{"text": "abcd efgh " * 20}] * 12,
        "tags": [{"tokens": list(ab), "tags": ["B-X" if c < "e" else "O" for c in ab]} for ab in PAIRS],
        "pairs": [{"prompt": ab, "chosen": ab[0], "rejected": ab[1]} for ab in PAIRS if ab[0] != ab[1]]}


def world(folder):
    """Writes folder/base and folder/<kind>/{train,valid,test}.jsonl; returns the folder."""
    tokenizer = Tokenizer.train(["a b"], 256 + len(SPECIAL), SPECIAL)
    torch.manual_seed(0)
    model = GPT(GPTConfig(tokenizer.vocab_size, 160, 2, 2, 32, eos=tokenizer.eos))
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    for name, rows in ROWS.items():
        (folder / name).mkdir()
        for split in ("train", "valid", "test"):
            part = rows if split == "train" else rows[::8]
            (folder / name / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in part))
    return folder
