"""The estimates of data/results/cost_model.py against what torch allocates and multiplies, within 15 %.

    python tests/test_scale.py FOLDER [TOKENS]      the same on a real model, printed as a table

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
from data.results import cost_model, large_models, trunk
from data.text.tokenizer import Tokenizer
from model import GPT, GPTConfig

METHODS = ["--method full", "--method lora", "--method adalora", "--method ia3", "--method prefix_tuning",
           "--method prompt_tuning --prompt_template front", "--method p_tuning", "--method p_tuning_v2"]
VARIANTS = ["--method lora --dora", "--method lora --quant nf4", "--method lora --quant int8 --dtype bf16",
            "--method lora --layers 2-3", "--method lora --targets q,k,v,o,up,gate,down --dtype bf16",
            "--method full --dtype bf16 --gradient_checkpointing",
            "--method p_tuning_v2 --dtype bf16 --gradient_checkpointing",
            "--method full --gradient_checkpointing", "--method lora --gradient_checkpointing",
            "--method full --dtype bf16", "--method lora --dtype bf16"]


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
    """A command's step on rows of random ids, one in four of them supervised, as in the training loop."""

    def __init__(self, folder, flags, rows, row):
        self.cfg = train.parse(["--init", str(folder), "--batch", str(rows), "--lr", "1e-6", *flags])
        self.ctx = train.open_context(self.cfg)
        self.ctx.micro_batch_tokens = rows * (row + 1)
        self.trainable = train.apply_method(self.ctx, self.cfg)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(1, 250, (rows, row + 1), generator=generator).tolist()
        self.batch = [(x, [i % 4 == 3 for i in range(row + 1)]) for x in ids]
        groups = train.param_groups(self.ctx, self.cfg, self.trainable)
        self.optimizer = torch.optim.AdamW(groups, fused=True)
        self.ctx.train()
        costs = train.find_method(self.cfg.method).cost(self.cfg, self.ctx.model.config.n_layer)
        plan = cost_model.planned(self.ctx, self.cfg, self.trainable, self.batch, row, costs)
        self.plan = plan._replace(tokens=rows * row, row=row)           # the last id is only a target
        self.step()                                                     # Adam's moments are there from now on

    def loss(self, past):
        with self.ctx.autocast():
            return train.find_task(self.cfg.task).loss(self.ctx, self.cfg, self.batch, past) / 100

    def step(self):
        with self.ctx.autocast():
            past = self.ctx.past()
        finish = None
        if past is not None:
            past, finish = prompts.detach_for_accumulation(past)
        for _ in range(2):
            self.loss(past).backward()
        if finish:
            finish()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def memory(self):
        """(measured, estimated) bytes"""
        moments = [t for s in self.optimizer.state.values() for t in s.values()]
        model = self.ctx.model
        held = alive(*model.parameters(), *model.buffers(), *self.trainable.values(), *moments)
        return held + peak(self.step), cost_model.memory(model.config, self.plan)["total"]

    def flops(self):
        """(counted, estimated) flops of one micro-batch, for each of its tokens."""
        counter = FlopCounterMode(display=False)
        counter.mod_tracker = Unnamed()
        with counter, sdpa_kernel(SDPBackend.MATH):         # it counts no flops of the other kernels
            self.loss(self.ctx.past()).backward()
        counted = counter.get_total_flops() / self.plan.tokens
        return counted, cost_model.flops(self.ctx.model.config, self.plan)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Four blocks of width 128 in each dialect."""
    folder = tmp_path_factory.mktemp("scale")
    gpt2 = GPTConfig(1000, 256, 4, 4, 128)
    shapes = dict(gpt2=gpt2, llama=gpt2.as_family("llama", n_kv_head=2, n_inner=352),
                  glm4=gpt2.as_family("glm4", n_kv_head=2, n_inner=352),
                  gpt_neox=gpt2.as_family("gpt_neox", tied=False))
    for name, shape in shapes.items():
        tokenizer = Tokenizer.train(["a b"], 256 + 3, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
        GPT(shape).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize("family, flags", [("llama", f) for f in METHODS + VARIANTS if "int8" in f or
                                           "gate" in f or f in METHODS] +
                         [("gpt2", f) for f in METHODS[:2] + VARIANTS if "gate" not in f] +
                         [("glm4", f) for f in (*METHODS[:2], METHODS[-1], *VARIANTS[-2:])] +
                         [("gpt_neox", f) for f in (*METHODS[:2], *METHODS[4:], *VARIANTS[-2:])])
def test_memory(family, flags, folders):
    measured, estimated = Case(folders / family, flags.split(), 8, 64).memory()
    assert abs(estimated / measured - 1) < 0.15, f"{estimated / 1e6:.1f} MB, measured {measured / 1e6:.1f} MB"


@pytest.mark.parametrize("family, flags", [("llama", f) for f in METHODS + VARIANTS[-4:-2]] +
                         [("glm4", f) for f in METHODS[:2]] +
                         [("gpt_neox", f) for f in (*METHODS[:2], *METHODS[4:])])
def test_flops(family, flags, folders):
    counted, estimated = Case(folders / family, flags.split(), 8, 64).flops()
    assert abs(estimated / counted - 1) < 0.15, (estimated, counted)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_a_step_that_begins_at_a_trunk(family, folders):
    case = Case(folders / family, ["--method", "lora", "--layers", "2-3"], 8, 64)
    case.ctx.trunk = trunk.Trunk(2)
    case.ctx.trunk.read(case.ctx, case.batch)
    case.plan = case.plan._replace(shared_blocks=2, kept_tokens=trunk.count_tokens(case.batch))
    kept = alive(*(hidden for _, hidden in case.ctx.trunk.hidden.values()))
    assert kept == cost_model.memory(case.ctx.model.config, case.plan)["trunk"] == 8 * 64 * 128 * 4
    measured, estimated = case.memory()
    assert abs(estimated / (measured + kept) - 1) < 0.15, (estimated, measured + kept)
    counted, estimated = case.flops()
    assert abs(estimated / counted - 1) < 0.15, (estimated, counted)


def test_unknown_costs_are_refused(folders):
    case = Case(folders / "gpt2", ["--method", "full"], 2, 16)
    for costs, sentence in (({"dora": True}, "unknown costs dora"), ({"kind": "lorra"}, "unknown kind")):
        with pytest.raises(ValueError, match=sentence):
            cost_model.planned(case.ctx, case.cfg, case.trainable, [], 16, costs)


def test_the_table_of_large_models(capsys):
    large_models.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 12 and all(line.count("|") == 10 for line in lines)
    assert lines[6].startswith("| 8B | `full` | 174 | 136 | neither | 35 | 21 |")   # 16 bytes x 8e9 and casts


def cpu_seconds(go, times=1):
    began = time.process_time()                     # one thread's, so that neighbours do not count
    for _ in range(times):
        go()
    return (time.process_time() - began) / times


def matmul_rate(case, times=8):
    """FLOP a second of this machine's matrix products, of the shape and precision that the MLP has."""
    c, plan = case.ctx.model.config, case.plan
    a, b = torch.randn(plan.tokens, c.n_embd), torch.randn(c.n_embd, c.n_inner)
    a, b = a.to(case.ctx.dtype), b.to(case.ctx.dtype)
    a @ b
    return 2 * plan.tokens * c.n_embd * c.n_inner / cpu_seconds(lambda: a @ b, times)


def main(folder, tokens="512", cases=()):
    row = 128
    print("| | MB estimated | MB measured | ratio | CPU seconds a step | share of the matmul rate |\n"
          "|---|---|---|---|---|---|")
    for flags in cases or ["--method full", "--method lora", "--method p_tuning_v2", *VARIANTS[-4:]]:
        case = Case(folder, [*flags.split(), *([] if "dtype" in flags else ["--dtype", "fp32"])],
                    int(tokens) // row, row)
        measured, estimated = case.memory()
        before = matmul_rate(case)
        seconds = cpu_seconds(case.step)
        after = matmul_rate(case)
        work = 2 * case.plan.tokens * cost_model.flops(case.ctx.model.config, case.plan)
        print(f"| `{flags}` | {estimated / 1e6:,.0f} | {measured / 1e6:,.0f} | {estimated / measured:.2f} "
              f"| {seconds:.1f} | {work / seconds / ((before + after) / 2):.2f} |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("python tests/test_scale.py FOLDER [TOKENS]: FOLDER is a model's")
    torch.set_num_threads(1)
    main(sys.argv[1], *sys.argv[2:3], cases=sys.argv[3:])


def test_flops_of_a_small_shape_by_hand():
    """A block has 128 weights, its attention multiplies 64 for each token, the head has 40 weights."""
    shape = cost_model.Shape(10, 2, 4, 2, 2, 2, 8, mlp="gelu", norm="layernorm")
    full = cost_model.Plan("full", 0, 8, 8, 8)
    assert cost_model.flops(shape, full) == 2 * (3 * 256 + 3 * 64) + 6 * 40
    again = full._replace(gradient_checkpointing=True)
    assert cost_model.flops(shape, again) == 2 * (4 * 256 + 4 * 64) + 6 * 40
    adapted = full._replace(kind="lora", targets=("q",), rank=2, trainable=32)
    assert cost_model.flops(shape, adapted) == 2 * (2 * 256 + 3 * 64) - 2 * 48 + 4 * 40 + 6 * 32
