"""Several processes are one run: real ones, started by torchrun, two of them, over gloo.

    equal     the weights, metrics and answers of one process, to rounding (1e-6), for every kind of loop
    shard     FSDP2 ends where no FSDP2 ends, and its folder is a plain Hugging Face one
    resume    by another number of processes, or refused
    one voice rank 0 writes; a signal to any rank saves once and stops all; an error ends all, in one sentence
"""
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import tiny
import torch

import train
from data import distributed
from data.files import read_json, read_tensors
from data.tokenizer import Tokenizer
from model import GPT, GPTConfig, generate, sample

ROOT = pathlib.Path(train.__file__).resolve().parent
SFT = "--data chat --lr 1e-3 --steps 5 --batch 5 --max_new 3 --forget text --eval_every 2 --items 5"
PPO = "--task ppo --data prompts --reward rm --steps 2 --batch 7 --max_new 4 --forget none --minibatches 2 " \
      "--ppo_epochs 2 --items 5 --micro 64"
PAIRS = "--data pairs --steps 3 --batch 5 --forget none --items 5"
QUICK = {"lora": SFT, "full": f"--method full {SFT}", "alone": f"{SFT} --batch 1",
         "prefix": f"--method prefix --n_virtual 4 --micro 9 {SFT}", "shard": f"--method full --shard {SFT}",
         "reward": f"--task reward {PAIRS} --max_new 4", "ppo": PPO}
SLOW = {"adalora": f"--method adalora {SFT}", "ia3": f"--method ia3 {SFT}",
        "prompt": f"--method prompt --n_virtual 4 {SFT}", "ptuning": f"--method ptuning --n_virtual 4 {SFT}",
        "ptuning2": f"--method ptuning2 --n_virtual 4 --prefix_dropout 0.2 {SFT}",
        "dpo": f"--task dpo {PAIRS}", "head": "--task classify --by head --data label --steps 3 --batch 5 "
        "--forget none --method full", "words": "--task classify --data label --steps 3 --forget none",
        "tag": "--task tag --data tags --steps 3 --batch 5 --forget none",
        "pretrain": "--task pretrain --method full --data text --steps 3 --batch 5 --block 24",
        "shard_reward": f"--task reward {PAIRS} --max_new 4 --method full --shard",
        "shard_head": "--task tag --method full --shard --data tags --steps 3 --batch 3 --forget none --micro 5",
        "shard_dpo": f"--task dpo --method full --shard {PAIRS}",
        "rloo": f"{PPO} --algo rloo --samples 2 --batch 8", "ppo_full": f"{PPO} --method full --ptx_coef 0.1 "
        "--ptx_data text", "ppo_soft": f"{PPO} --method ptuning2 --n_virtual 4",
        "sample": "--task sample --data prompts --reward rm --samples 3 --max_new 4 --items 5"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The rows of tiny.py and prompts; a Llama, whose keys have no bias: softmax cannot see one, so its gradient
    is rounding, and Adam makes steps of that; a reward model."""
    folder = tiny.world(tmp_path_factory.mktemp("world"))
    tiny.write(folder, {"prompts": [{"prompt": ab} for ab in tiny.PAIRS]})
    tokenizer = Tokenizer.from_pretrained(folder / "base")
    torch.manual_seed(0)
    model = GPT(GPTConfig(tokenizer.vocab_size, 160, 2, 2, 32, n_kv_head=1, eos=tokenizer.eos).llama())
    for p in model.parameters():
        p.data.mul_(4 if p.dim() > 1 else 1)
    model.save_pretrained(folder / "base")
    assert train.main(argv(folder, folder / "rm", f"--task reward {PAIRS} --max_new 4")) == 0
    return folder


def argv(world, out, words):
    words = ["--init", "base", "--out", str(out), *words.split()]
    return [str(world / w) if (world / w).exists() and not w.startswith("-") else w for w in words]


def torchrun(script, *words, n=2):
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(n), "--master_port", "0",
         "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", str(script), *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def both(world, tmp_path, jobs, n=2):
    """Every job by n processes into out/n, and by this one into out/1."""
    commands = [argv(world, tmp_path / f"{n}-{name}", words) for name, words in jobs.items()]
    (tmp_path / "jobs.json").write_text(json.dumps(commands))
    p = torchrun(ROOT / "tests" / "ranks.py", tmp_path / "jobs.json", n=n)
    for name, words in jobs.items():
        assert train.main(argv(world, tmp_path / f"1-{name}", words.replace("--shard ", ""))) == 0, name
    out, err = p.communicate(timeout=600)
    assert p.returncode == 0, err
    return err


def weights(out):
    return {f"{f.name}/{key}": t for inner in ("adapter", "model") for f in (out / inner).glob("*.safetensors")
            for key, t in read_tensors(f).items()}


def apart(a, b):
    """The largest difference of any weight, metric or, as whole ones, answer."""
    one, two = weights(a), weights(b)
    assert one.keys() == two.keys()
    gap = max([(one[key] - two[key]).abs().max().item() for key in one], default=0.0)
    one, two = (read_json(path / "result.json") for path in (a, b))
    assert one["samples"] == two["samples"] and one["tokens"] == two["tokens"]
    for kind in ("metrics", "baseline_metrics"):
        assert one[kind].keys() == two[kind].keys()
        gap = max([gap, *(abs(one[kind][key] - two[kind][key]) / max(10, abs(one[kind][key])) for key in one[kind])])
    return gap


if __name__ == "__main__":
    import tempfile
    f = pathlib.Path(tempfile.mkdtemp())
    class F:
        def mktemp(self, x): return f
    w = world.__wrapped__(F()) if hasattr(world, "__wrapped__") else world._get_wrapped_function()(F())
    jobs = {**QUICK, **SLOW}
    if len(sys.argv) > 1: jobs = {k: jobs[k] for k in sys.argv[1:]}
    t = time.time()
    err = both(w, f, jobs)
    print(err[-3000:])
    print(time.time() - t)
    for name in jobs:
        try:
            print(name, apart(f / f"1-{name}", f / f"2-{name}"), weights(f / f"1-{name}").__len__())
        except AssertionError as e:
            print(name, "ASSERT", str(e)[:300])
