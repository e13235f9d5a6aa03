"""Speed and memory on one GPU: training, generation and PPO of GPT-2 124M and a Llama of 1.1 billion.

    python tests/gpu_speed.py [--out FILE.json] [--only WORD] [--seconds 240]      PEERS=PYTHON: peft, too
    python tests/gpu_speed.py --device cpu --tiny          that it runs, on a CPU, with tiny models

Weights are random, rows are of one length, one token in four is supervised. Every line is a process of its
own, so that its peak of memory is its own. No line is begun after --seconds. FILE.json holds one object a
line, and the table is printed from it:

    tokens/s     median of five timings of four steps (Repeats); PPO: answers a second
    share        flops of a step by data/results/cost_model.py, over the seconds it took, over the rate at which
                 this device multiplies two 4096 x 4096 matrices in the same precision
    peak MB      torch.cuda.max_memory_allocated from loading on, and what cost_model.py had estimated
    peft         tokens/s of transformers + peft on as many random ids, in the same precision
"""
import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

ROW = 512


class Repeats(NamedTuple):
    """How often a piece of work is repeated."""
    warm: int = 3                   # calls that are not counted
    steps: int = 4                  # calls of one timing
    times: int = 5                  # timings, of which the median counts


LORA = "--method lora --targets q,v"
# name: (model, rows of a step, flags); no flags: generation; PPO: flags of --task ppo
CELLS = {
    "gpt2 full bf16": ("gpt2", 16, "--method full --dtype bf16"),
    "gpt2 full bf16 compile": ("gpt2", 16, "--method full --dtype bf16 --compile"),
    "gpt2 full bf16 checkpointing": ("gpt2", 16, "--method full --dtype bf16 --gradient_checkpointing"),
    "gpt2 full fp16": ("gpt2", 16, "--method full --dtype fp16"),
    "gpt2 lora bf16": ("gpt2", 16, f"{LORA} --dtype bf16"),
    "gpt2 lora fp32": ("gpt2", 16, f"{LORA} --dtype fp32"),
    "llama lora bf16": ("llama", 8, f"{LORA} --dtype bf16"),
    "llama lora bf16 compile": ("llama", 8, f"{LORA} --dtype bf16 --compile"),
    "llama lora bf16 checkpointing": ("llama", 8, f"{LORA} --dtype bf16 --gradient_checkpointing"),
    "llama lora nf4": ("llama", 8, f"{LORA} --dtype bf16 --quant nf4"),
    "llama full bf16 checkpointing": ("llama", 8, "--method full --dtype bf16 --gradient_checkpointing"),
    "gpt2 generate bf16": ("gpt2", 32, ""),
    "llama generate bf16": ("llama", 32, ""),
    "gpt2 ppo bf16": ("gpt2", 32, "--task ppo --dtype bf16 --reward data.toy:gold --data toy/prompts"),
}
PEFT = ("gpt2 lora bf16", "gpt2 lora fp32", "llama lora bf16")      # cells that peft can do as well


def make_models(folder, tiny):
    """Random GPT-2 and Llama folders, with a tokenizer of bytes."""
    import torch

    from data.text.tokenizer import Tokenizer
    from model import GPT, GPTConfig
    tokenizer = Tokenizer.train(["a b"], 257, ["<|endoftext|>"])
    gpt2 = GPTConfig(50257, 1024, 12, 12, 768, eos=tokenizer.eos)
    llama = GPTConfig(32000, 2048, 22, 32, 2048, eos=tokenizer.eos)
    llama = llama.as_family("llama", n_kv_head=4, n_inner=5632)
    if tiny:
        gpt2 = GPTConfig(512, 1024, 2, 2, 32, eos=tokenizer.eos)
        llama = gpt2.as_family("llama", n_kv_head=1, n_inner=64)
    for name, config in (("gpt2", gpt2), ("llama", llama)):
        torch.manual_seed(0)
        GPT(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def random_ids(rows, length, seed=0):
    import torch
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 250, (rows, length), generator=generator).tolist()


# ---------------------------------------------------------------------------------------- one line, one process

def wait(device):
    import torch
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(work, device, repeats):
    """Median seconds of work()."""
    for _ in range(repeats.warm):
        work()
    found = []
    for _ in range(repeats.times):
        wait(device)
        began = time.perf_counter()
        for _ in range(repeats.steps):
            work()
        wait(device)
        found.append((time.perf_counter() - began) / repeats.steps)
    return statistics.median(found)


def matmul_rate(device, dtype, size, repeats):
    """Flops a second of the product of two square matrices."""
    import torch
    a = torch.randn(size, size, device=device).to(dtype)
    return 2 * size ** 3 / timed(lambda: a @ a, device, repeats)


def training_cell(folder, rows, flags, device, matrix, repeats):
    """A step of training as tests/test_scale.py takes it: two equal micro-batches, and the optimiser."""
    from data.results import cost_model
    from data.runtime.device import peak_memory_mb
    from test_scale import Case
    case = Case(folder, [*flags.split(), "--device", device], rows, ROW)
    seconds = timed(case.step, case.ctx.device, repeats)
    peak = peak_memory_mb(case.ctx.device) if device == "cuda" else None
    config = case.ctx.model.config
    tokens = 2 * case.plan.tokens
    rate = matmul_rate(case.ctx.device, case.ctx.dtype, matrix, repeats)
    return dict(tokens_per_second=tokens / seconds, peak_mb=peak,
                share=tokens * cost_model.flops(config, case.plan) / seconds / rate,
                estimated_mb=cost_model.memory(config, case.plan)["total"] / 2 ** 20)


def generation_cell(folder, rows, device, repeats):
    """Greedy answers of ROW / 4 tokens to prompts of ROW / 4."""
    import torch

    from data.runtime.device import peak_memory_mb
    from model import GPT, generate
    device = torch.device(device)
    model = GPT.from_pretrained(folder, torch.bfloat16).to(device).eval()
    new = ROW // 4
    prompts = random_ids(rows, ROW // 4)

    def answer():
        with torch.no_grad():
            generate(model, prompts, new, temperature=0)

    return dict(tokens_per_second=rows * new / timed(answer, device, repeats),
                peak_mb=peak_memory_mb(device) if device.type == "cuda" else None)


def ppo_cell(folder, rows, flags, device):
    """Answers a second of the command itself, from its own log, without the first two iterations."""
    import train
    from data.runtime.files import read_json
    with tempfile.TemporaryDirectory() as name:
        out = pathlib.Path(name) / "run"
        words = [*flags.split(), "--init", str(folder), "--out", str(out), "--device", device,
                 "--batch", str(rows), "--max_new_tokens", "32", "--steps", "6", "--eval_items", "4"]
        code = train.main(words)
        if code:
            raise SystemExit(code)
        log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        seconds = [event["seconds"] for event in log if event["event"] == "train"]
        peak = read_json(out / "result.json").get("peak_memory_mb") if device == "cuda" else None
    return dict(tokens_per_second=rows * (len(seconds) - 2) / (seconds[-1] - seconds[1]), peak_mb=peak)


def peft_cell(folder, rows, flags, device, repeats):
    """As many ids and the same LoRA, by transformers and peft: two micro-batches a step."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM
    device = torch.device(device)
    dtype = torch.bfloat16 if "bf16" in flags else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
    fused = hasattr(model, "transformer")               # GPT-2: q, k and v are one matrix, so all three learn
    targets = ["c_attn"] if fused else ["q_proj", "v_proj"]
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=targets)
    model = peft.get_peft_model(model, config)
    learn = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learn, lr=1e-6, weight_decay=0.0, fused=True)
    ids = torch.tensor(random_ids(rows, ROW), device=device)
    supervised = torch.arange(ROW, device=device) % 4 == 3
    labels = ids.masked_fill(~supervised, -100)
    model.train()

    def step():
        for _ in range(2):
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    seconds = timed(step, device, repeats)
    peak = torch.cuda.max_memory_allocated(device) / 2 ** 20 if device.type == "cuda" else None
    return dict(tokens_per_second=2 * rows * ROW / seconds, peak_mb=peak)


def run_cell(args):
    """The process of one line: prints its object as the last line."""
    import torch
    model, rows, flags = CELLS[args.cell]
    folder = pathlib.Path(args.models) / model
    repeats, matrix = Repeats(), 4096
    if args.tiny:
        rows, repeats, matrix = 4, Repeats(1, 1, 1), 64
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    if args.peers:
        found = peft_cell(folder, rows, flags, args.device, repeats)
    elif "--task ppo" in flags:
        found = ppo_cell(folder, rows, flags, args.device)
    elif flags:
        found = training_cell(folder, rows, flags, args.device, matrix, repeats)
    else:
        found = generation_cell(folder, rows, args.device, repeats)
    print(json.dumps(found))


# --------------------------------------------------------------------------------------------------- all lines

def measure(name, python, models, args, *more):
    """The object of a line, or {"error": its last words}."""
    words = [python, __file__, "--cell", name, "--models", str(models), "--device", args.device, *more]
    p = subprocess.run([*words, *["--tiny"] * args.tiny], capture_output=True, text=True)
    if p.returncode:
        return dict(error=(p.stderr.strip().splitlines() or [f"exit code {p.returncode}"])[-1])
    return json.loads(p.stdout.splitlines()[-1])


def table(lines):
    """Markdown, one row a line."""
    def number(found, key, form):
        return format(found[key], form) if found.get(key) is not None else ""

    rows = ["| | tokens/s | share | peak MB | estimated MB | peft, tokens/s | peft, peak MB |",
            "|---|---|---|---|---|---|---|"]
    for found in lines:
        if "error" in found:
            rows.append(f"| {found['name']} | {found['error']} | | | | | |")
            continue
        peft = found.get("peft", {})
        cells = [found["name"], number(found, "tokens_per_second", ",.4g"), number(found, "share", ".2f"),
                 number(found, "peak_mb", ",.0f"), number(found, "estimated_mb", ",.0f"),
                 number(peft, "tokens_per_second", ",.4g"), number(peft, "peak_mb", ",.0f")]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def main():
    parser = argparse.ArgumentParser(description="speed and memory on one GPU")
    parser.add_argument("--out", help="where the lines are written, as JSON")
    parser.add_argument("--only", default="", help="lines whose name holds this word")
    parser.add_argument("--seconds", type=float, default=240, help="no line is begun after these")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="tiny models: that it runs, not how fast")
    parser.add_argument("--cell", choices=CELLS, help=argparse.SUPPRESS)
    parser.add_argument("--models", help=argparse.SUPPRESS)
    parser.add_argument("--peers", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell:
        return run_cell(args)
    lines = []
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as models:
        make_models(pathlib.Path(models), args.tiny)
        for name in CELLS:
            if args.only not in name:
                continue
            if time.monotonic() - began > args.seconds:
                print(f"{name}: not begun, {args.seconds:g} seconds are over", file=sys.stderr)
                continue
            found = dict(name=name, **measure(name, sys.executable, models, args))
            if "PEERS" in os.environ and name in PEFT:
                found["peft"] = measure(name, os.environ["PEERS"], models, args, "--peers")
            lines.append(found)
            if args.out:
                pathlib.Path(args.out).write_text(json.dumps(lines, indent=1) + "\n")
    print(table(lines))
    return int(any("error" in found for found in lines))


if __name__ == "__main__":
    sys.exit(main())
