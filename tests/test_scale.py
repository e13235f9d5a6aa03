"""What a step costs on paper (data/results/cost_model.py) against what torch allocates and multiplies, within 15 %.

    python tests/test_scale.py FOLDER [TOKENS]      the same on a real model, printed as the README's table

Measured: every byte that torch's allocator hands out during a step of two equal micro-batches, through the
profiler, so without the interpreter and its libraries, and on top of what weights and moments hold already.
"""
import contextlib
import pathlib
import sys
import time

if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import prompts
import train
from data.results import cost_model
from data.text.tokenizer import Tokenizer
from model import GPT, GPTConfig

METHODS = ["--method full", "--method lora", "--method adalora", "--method ia3", "--method prefix",
           "--method prompt --place front", "--method ptuning", "--method ptuning2"]
VARIANTS = ["--method lora --dora", "--method lora --quant nf4", "--method lora --quant int8 --dtype bf16",
            "--method lora --layers 2-3", "--method lora --targets q,k,v,o,up,gate,down --dtype bf16",
            "--method full --dtype bf16 --checkpoint", "--method ptuning2 --dtype bf16 --checkpoint",
            "--method full --checkpoint", "--method lora --checkpoint", "--method full --dtype bf16",
            "--method lora --dtype bf16"]


def peak(go):
    """Bytes that go() has alive at once, beyond those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        go()
    now = most = 0
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    for e in sorted(events, key=lambda e: e.start_ns()):
        now += e.nbytes()
        most = max(most, now)
    assert most > 0
    return most


def alive(*tensors):
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


class Unnamed(contextlib.nullcontext):
    """In place of the counter's tracker of modules, whose hooks forbid a gradient taken inside a forward."""
    parents = {"Global"}


class Case:
    """A command's step on rows of random ids, one in four of them supervised, as `fit` takes it."""

    def __init__(self, folder, flags, rows, row):
        self.cfg = cfg = train.parse(["--init", str(folder), "--batch", str(rows), "--lr", "1e-6", *flags])
        self.kit = kit = train.open_kit(cfg)
        kit.micro, self.learn = rows * (row + 1), train.build(kit, cfg)
        dice = torch.Generator().manual_seed(0)
        ids = torch.randint(1, 250, (rows, row + 1), generator=dice).tolist()
        self.part = [(x, [i % 4 == 3 for i in range(row + 1)]) for x in ids]
        self.optimiser = torch.optim.AdamW(train.param_groups(kit, cfg, self.learn), fused=True)
        kit.train()
        self.plan = cost_model.planned(kit, cfg, self.learn, self.part, row)
        self.plan = self.plan._replace(tokens=rows * row, row=row)      # the last id is only a target
        self.step()                                                     # Adam's moments are there from now on

    def loss(self, past):
        with self.kit.cast():
            return train.objective(self.kit, self.cfg, self.part, past) / 100

    def step(self):
        with self.kit.cast():
            past, finish = self.kit.past(), None
        if past is not None:
            past, finish = prompts.cut(past)
        for _ in range(2):
            self.loss(past).backward()
        if finish:
            finish()
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)

    def memory(self):
        """(measured, on paper)"""
        moments = [t for s in self.optimiser.state.values() for t in s.values()]
        model = self.kit.model
        held = alive(*model.parameters(), *model.buffers(), *self.learn.values(), *moments)
        return held + peak(self.step), cost_model.memory(model.config, self.plan)["total"]

    def flops(self):
        """(counted, on paper): of one micro-batch, for each of its tokens."""
        counter = FlopCounterMode(display=False)
        counter.mod_tracker = Unnamed()
        with counter, sdpa_kernel(SDPBackend.MATH):         # of others it does not know the cost
            self.loss(self.kit.past()).backward()
        return counter.get_total_flops() / self.plan.tokens, cost_model.flops(self.kit.model.config, self.plan)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Four blocks of width 128 in each dialect."""
    folder = tmp_path_factory.mktemp("scale")
    gpt2 = GPTConfig(1000, 256, 4, 4, 128)
    for name, shape in dict(gpt2=gpt2, llama=gpt2.llama(n_kv_head=2, n_inner=352)).items():
        tokenizer = Tokenizer.train(["a b"], 256 + 3, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
        GPT(shape).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize("family, flags", [("llama", f) for f in METHODS + VARIANTS if "int8" in f or
                                           "gate" in f or f in METHODS] +
                         [("gpt2", f) for f in METHODS[:2] + VARIANTS if "gate" not in f])
def test_memory(family, flags, folders):
    measured, paper = Case(folders / family, flags.split(), 8, 64).memory()
    assert abs(paper / measured - 1) < 0.15, f"{paper / 1e6:.1f} MB on paper, {measured / 1e6:.1f} measured"


@pytest.mark.parametrize("flags", METHODS + VARIANTS[-4:-2])
def test_flops(flags, folders):
    counted, paper = Case(folders / "llama", flags.split(), 8, 64).flops()
    assert abs(paper / counted - 1) < 0.15, (paper, counted)


def cpu_seconds(go, times=1):
    began = time.process_time()                     # one thread's, so that neighbours do not count
    for _ in range(times):
        go()
    return (time.process_time() - began) / times


def matmul_rate(case, times=8):
    """FLOP a second of this machine's matrix products, of the shape and precision that the MLP has."""
    c, plan = case.kit.model.config, case.plan
    a, b = torch.randn(plan.tokens, c.n_embd), torch.randn(c.n_embd, c.n_inner)
    a, b = a.to(case.kit.dtype), b.to(case.kit.dtype)
    a @ b
    return 2 * plan.tokens * c.n_embd * c.n_inner / cpu_seconds(lambda: a @ b, times)


def main(folder, tokens="512", cases=()):
    row = 128
    print("| | MB on paper | MB measured | ratio | CPU seconds a step | share of the matmul rate |\n"
          "|---|---|---|---|---|---|")
    for flags in cases or ["--method full", "--method lora", "--method ptuning2", *VARIANTS[-4:]]:
        case = Case(folder, [*flags.split(), *([] if "dtype" in flags else ["--dtype", "fp32"])],
                    int(tokens) // row, row)
        measured, paper = case.memory()
        before, took, after = matmul_rate(case), cpu_seconds(case.step), matmul_rate(case)
        work = 2 * case.plan.tokens * cost_model.flops(case.kit.model.config, case.plan)
        print(f"| `{flags}` | {paper / 1e6:,.0f} | {measured / 1e6:,.0f} | {paper / measured:.2f} "
              f"| {took:.1f} | {work / took / ((before + after) / 2):.2f} |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("python tests/test_scale.py FOLDER [TOKENS]: FOLDER is a model's")
    torch.set_num_threads(1)
    main(sys.argv[1], *sys.argv[2:3], cases=sys.argv[3:])
