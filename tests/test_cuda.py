"""The GPU path. Where there is a GPU the first half runs on it; with DEVICE=cpu in the environment it runs on
the CPU, so that these tests are known to run. The second half is what a CPU can show of a GPU: which device
each tensor is on (pretend.py), what is refused, compilation.
"""
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch
from torch.utils import backend_registration

import lora
import model as model_file
import ppo
import prompts
import tiny
import train
from data.results import evaluate
from data.runtime.device import pick_dtype
from data.checkpoints.safetensors import read_tensors
from data.runtime.files import UserError, read_json
from data.runtime.command import groups_of
from data.runtime.flags import fields_of
from data.checkpoints.model_folders import ROOT
from data.checkpoints.quantization import QuantizedWeight
from model import GPT, GPTConfig, generate

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")     # what exact repetition asks of cuBLAS
DEVICE = os.environ.get("DEVICE", "cuda")
gpu = pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(),
                         reason="no CUDA device is here; DEVICE=cpu runs the same on a CPU")
METHODS = [m.name for m in train.METHODS if m.trains]
SHORT = dict(batch=8, eval_every=100, max_new_tokens=2, forgetting_data="none", eval_items=2, num_virtual_tokens=4)
RATES = {"full": 3e-3, "lora": 2e-2, "adalora": 3e-2}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The tiny world, its base as spread as trained weights are: frozen parts must help."""
    folder = tiny.world(tmp_path_factory.mktemp("world"))
    model = GPT.from_pretrained(folder / "base")
    for p in model.parameters():
        p.data.mul_(8 if p.dim() > 1 else 1)
    model.save_pretrained(folder / "base")
    return folder


def command(world, out, line, data="chat", device=DEVICE):
    """A command of train.py: of SHORT, the flags that its task and method read and that it does not name."""
    words = line.split()
    flag_values = dict(zip(words, words[1:]))
    task = train.find_task(flag_values.get("--task", "sft"))
    method = train.find_method(flag_values.get("--method", "lora" if task.trains else "none"))
    reads = fields_of(groups_of(train.PROGRAM, task, method))
    words += [word for name, value in SHORT.items() if name in reads and f"--{name}" not in words
              for word in (f"--{name}", str(value))]
    return [*words, "--init", str(world / "base"), "--data", str(world / data), "--out", str(out),
            "--device", device]


def run(world, out, line, data="chat", device=DEVICE):
    assert train.main(command(world, out, line, data, device)) == 0
    return read_json(out / "result.json")


def losses(out):
    events = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return [e["loss"] for e in events if e["event"] == "train"]


def weights(out):
    file, = list(out.glob("*/*model.safetensors"))
    return read_tensors(file)


def shapes():
    gpt2 = GPTConfig(97, 64, 2, 4, 32)
    torch.manual_seed(0)
    return [GPT(gpt2), GPT(gpt2.as_family("llama", n_kv_head=2))]


# ------------------------------------------------------------------------------------------- on a GPU, if any

@gpu
@pytest.mark.parametrize("family", [0, 1])
def test_logits_are_those_of_the_cpu(family):
    """Plain, behind a past (a mask), seeing both ways (another), from embeddings: fp32, 1e-4."""
    here, there = shapes()[family], shapes()[family].to(DEVICE)
    pick_dtype("fp32", torch.device(DEVICE), 32)
    x = torch.randint(97, (3, 20))
    past = prompts.PTuningV2(here, 5)(here)
    moved = [model_file.Past(k.to(DEVICE), v.to(DEVICE)) for k, v, _ in past]
    bidirectional_len = torch.tensor([4, 20, 0])
    with torch.no_grad():
        for a, b in [(here(x), there(x.to(DEVICE))), (here(x, past=past), there(x.to(DEVICE), past=moved)),
                     (here.hidden_states(x, bidirectional_len=bidirectional_len), there.hidden_states(x.to(DEVICE), bidirectional_len=bidirectional_len.to(DEVICE))),
                     (here(here.embed(x)), there(there.embed(x.to(DEVICE))))]:
            assert (a[0] - b[0].cpu()).abs().max() < 1e-4


@gpu
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_in_half_precision(method, dtype, world, tmp_path):
    line = f"--method {method} --dtype {dtype} --steps 120 --batch 64 --lr {RATES.get(method, 5e-2)}"
    r = run(world, tmp_path / "r", line + " --targets q,k,v,o,up,down" * ("lora" in method))
    found = losses(tmp_path / "r")
    assert found[-1] < 0.93 * found[0] and r["skipped"] <= 5
    assert all(t.dtype == torch.float32 and t.isfinite().all() for t in weights(tmp_path / "r").values())


@gpu
def test_the_scaler_skips_an_overflow(world, tmp_path, monkeypatch):
    """A gradient that fp16 cannot hold costs the step, halves the scale, and never reaches the weights."""
    original, calls = evaluate.summed_loss, []

    def big(ctx, examples, past):
        calls.append(torch.is_grad_enabled())
        return original(ctx, examples, past) * (1e30 if sum(calls) == 3 and calls[-1] else 1)

    monkeypatch.setattr(evaluate, "summed_loss", big)
    r = run(world, tmp_path / "r", "--method full --dtype fp16 --steps 5")
    events = map(json.loads, (tmp_path / "r" / "log.jsonl").read_text().splitlines())
    skipped = [e["skipped"] for e in events if e["event"] == "train"]
    assert skipped[2] == skipped[1] + 1 and all(t.isfinite().all() for t in weights(tmp_path / "r").values())
    scale = torch.load(tmp_path / "r" / "state.pt", weights_only=True)["scaler"]["scale"]
    assert scale == 2.0 ** (16 - r["skipped"])


@gpu
@pytest.mark.parametrize("line", ["--method lora --dropout 0.1 --dtype bf16", "--method full --dtype fp16",
                                  "--method p_tuning_v2 --prefix_dropout 0.1 --dtype fp32",
                                  "--method adalora --dtype fp32"])
def test_resume_is_bit_exact(line, world, tmp_path, monkeypatch):
    """Given kernels that repeat themselves: a GPU's fastest ones add in any order."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        line += " --steps 6 --save_every 2"
        run(world, tmp_path / "whole", line)
        tiny.stopped(monkeypatch, 4, lambda: train.main(command(world, tmp_path / "cut", line)))
        run(world, tmp_path / "cut", line)
    finally:
        torch.use_deterministic_algorithms(False)
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert whole.keys() == cut.keys() and all(torch.equal(whole[k], cut[k]) for k in whole)


@gpu
@pytest.mark.parametrize("family", [0, 1])
def test_generation(family):
    """Greedy: the CPU's tokens. Sampled: a function of the generator, which is the device's."""
    here, there = shapes()[family], shapes()[family].to(DEVICE)
    asked = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    assert generate(here, asked, 8, temperature=0) == generate(there, asked, 8, temperature=0)

    def drawn(seed):
        return generate(there, asked, 8, generator=torch.Generator(DEVICE).manual_seed(seed), top_p=0.9)
    assert drawn(1) == drawn(1) != drawn(2)


@gpu
@pytest.mark.parametrize("kind, double", [("int8", False), ("nf4", False), ("nf4", True)])
def test_a_quantised_base(kind, double, world, tmp_path):
    torch.manual_seed(0)
    q = QuantizedWeight(torch.randn(48, 80), kind, double)
    here = q(torch.float32)
    assert torch.equal(here, q.to(DEVICE)(torch.float32).cpu())
    run(world, tmp_path / "r", f"--method lora --quant {kind} --steps 20 --lr 2e-2 --dtype bf16")
    assert losses(tmp_path / "r")[-1] < losses(tmp_path / "r")[0]


@gpu
def test_checkpointing_changes_no_gradient_and_takes_less():
    found, tops = [], []
    for checkpoint in (False, True):
        torch.manual_seed(0)
        model = GPT(GPTConfig(97, 512, 8, 4, 64)).to(DEVICE)
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
        hidden, _ = model.hidden_states(torch.arange(8 * 256, device=DEVICE).view(8, 256) % 97, gradient_checkpointing=checkpoint)
        hidden.square().mean().backward()
        found.append([p.grad.cpu() for p in model.blocks.parameters()])
        tops.append(torch.cuda.max_memory_allocated() if DEVICE == "cuda" else 2 - checkpoint)
    assert all((a - b).abs().max() < 1e-5 * a.abs().max() for a, b in zip(*found)) and tops[1] < tops[0]


@gpu
@pytest.mark.parametrize("more", ["--method lora --ema 0.9", "--method full", "--algo grpo"])
def test_ppo_iterates_and_goes_on(more, world, tmp_path):
    """Two iterations; and what is read from state.pt is put on the device again."""
    line = f"--task ppo --reward data.toy:gold --gold_reward data.toy:gold --max_new_tokens 3 --steps 2 --dtype fp32 {more}"
    first = run(world, tmp_path / "r", line)
    (tmp_path / "r" / "result.json").unlink()               # as if it had been killed just before
    assert run(world, tmp_path / "r", line)["metrics"] == first["metrics"]


@gpu
def test_peak_memory_is_the_runs_own(world, tmp_path):
    first, second = (run(world, tmp_path / f"{i}", f"--method lora --steps 2 --rank {4 + i}") for i in (0, 1))
    assert first["peak_memory_mb"] > 0
    if DEVICE == "cuda":            # and not the most that this process ever had
        assert second["peak_memory_mb"] < 1.5 * first["peak_memory_mb"]


@gpu
def test_tf32_only_where_it_is_asked_for():
    device = torch.device(DEVICE)
    if DEVICE == "cpu" or not torch.cuda.is_bf16_supported(including_emulation=False):
        with pytest.raises(UserError, match="--dtype tf32"):
            pick_dtype("tf32", device, 64)
        return
    x = torch.randn(256, 256, dtype=torch.float64)
    far = {}
    for word in ("tf32", "fp32"):
        assert pick_dtype(word, device, 64)[0] == torch.float32
        far[word] = (x.float().to(device) @ x.float().to(device) - (x @ x).to(device)).abs().max().item()
    assert far["fp32"] < 1e-3 < far["tf32"]


# ---------------------------------------------------------------------------------- what a CPU can show of it

LINES = [("chat", "--method lora --dropout 0.1"), ("chat", "--method adalora --steps 8"),
         ("chat", "--method lora --quant nf4 --double_quant --gradient_checkpointing"),
         ("chat", "--method p_tuning --prompt_template front"),
         ("chat", "--task ppo --reward data.toy:gold --gold_reward data.toy:gold --ema 0.9 --max_new_tokens 3 "
                  "--minibatches 1"),
         ("chat", "--method full"), ("chat", "--method lora --dora"), ("chat", "--method ia3"),
         ("chat", "--method prompt_tuning"), ("chat", "--method prefix_tuning"),
         ("chat", "--method p_tuning_v2 --prompt_init gated --micro_batch_tokens 32"),
         ("label", "--task classify --classifier head --method p_tuning_v2"),
         ("label", "--task classify --classifier head --method lora --pissa --attention bidirectional"),
         ("tags", "--task tag --method lora"), ("pairs", "--task reward --gradient_checkpointing"),
         ("pairs", "--task dpo --gradient_checkpointing"), ("chat", "--task sample --reward data.toy:gold --num_generations 2"),
         ("chat", "--task ppo --reward data.toy:gold --algo grpo --max_new_tokens 3 --method p_tuning_v2"),
         ("chat", "--task ppo --reward data.toy:gold --max_new_tokens 3 --method full")]


@pytest.mark.skipif(not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
                    reason="this torch cannot have a device that is written in Python")
@pytest.mark.parametrize("lines", [LINES[:5], pytest.param(LINES[5:], marks=pytest.mark.slow)])
def test_every_tensor_is_on_the_device(lines, python, world, tmp_path):
    """Every operation of whole runs on a device that refuses to meet the CPU's tensors, as CUDA does; and its
    numbers are the CPU's, but for attention, which is written out there."""
    asked = []
    for i, (data, line) in enumerate(lines):
        line += ("" if "steps" in line or "sample" in line else " --steps 2") + " --dtype fp32"
        asked.append((line, data, tmp_path / f"{i}"))
    argv = [" ".join(command(world, out, line, data, "cpu")).removesuffix(" --device cpu")
            for line, data, out in asked]
    done = subprocess.run([python, str(pathlib.Path(__file__).with_name("pretend.py")), *argv],
                          capture_output=True, text=True, timeout=900)
    ended = [line for line in done.stdout.splitlines() if line.startswith("ended")]
    for (line, data, out), end in zip(asked, ended, strict=True):
        assert end == "ended 0", f"{line}: {end}\n{done.stderr[-2000:]}"
        there = read_json(out / "result.json")["metrics"]
        here = run(world, tmp_path / f"{out.name}-here", line, data, "cpu")["metrics"]
        for key in here if "full" not in line else ():      # there alone a move takes tied weights apart
            assert there[key] == pytest.approx(here[key], abs=1e-3, nan_ok=True), (line, key)


def test_an_average_is_put_where_its_weights_are():
    """state.pt is read onto the CPU, whatever the run is on."""
    here, there = ({"w": torch.nn.Parameter(torch.ones(2, device=name))} for name in ("cpu", "meta"))
    state = ppo.PPOState(ppo.PPOConfig(ema=0.9), there)
    state.load_state_dict(ppo.PPOState(ppo.PPOConfig(ema=0.9), here).state_dict())
    assert state.ema.shadow["w"].device.type == "meta"


def test_checkpoint_reaches_every_task(world, tmp_path, monkeypatch):
    original, calls = model_file.checkpoint, []
    monkeypatch.setattr(model_file, "checkpoint", lambda *a, **k: calls.append(1) or original(*a, **k))
    for data, task in (("chat", "sft"), ("pairs", "reward"), ("pairs", "dpo")):
        calls.clear()
        run(world, tmp_path / task, f"--task {task} --gradient_checkpointing --steps 1 --method lora", data, "cpu")
        assert calls, task


def test_refusals(world, tmp_path, capsys, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no compiler here\nat all")

    monkeypatch.setattr(torch, "compile", broken)
    for line, says in [("--compile", "--compile does not work on this machine (no compiler here)"),
                       ("--dtype tf32", "--dtype tf32 needs a CUDA device"),
                       ("--task ppo --reward data.toy:gold --dtype fp16", "--task ppo has none")]:
        words = command(world, tmp_path / "r", line, device="cpu")
        assert train.main(words) == 2 and says in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="--compile on a CPU needs g++")
@pytest.mark.parametrize("line", ["--method full --gradient_checkpointing", "--method lora --quant nf4",
                                  "--method p_tuning_v2"])
def test_compiled_is_the_same(line, world, tmp_path):
    """Losses to 1e-5, and names as ever: what is compiled is a function of the block, not the block."""
    line += " --steps 3 --lr 1e-4 --dtype fp32"
    r = run(world, tmp_path / "compiled", line + " --compile", device=DEVICE if DEVICE != "cuda" else "cpu")
    run(world, tmp_path / "plain", line, device=DEVICE if DEVICE != "cuda" else "cpu")
    assert r["skipped"] == 0 and model_file.compiled_block.cache_info().currsize == 1
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)
    assert weights(tmp_path / "compiled").keys() == weights(tmp_path / "plain").keys()
    assert lora.adapters(train.load(tmp_path / "compiled")[0]) or "lora" not in line


@pytest.mark.slow
@pytest.mark.parametrize("only", ["gpt2 lora fp32", "gpt2 generate", "gpt2 ppo"])
def test_the_measurement_of_speed_runs(only, tmp_path):
    """tests/gpu_speed.py with tiny models on the CPU: training, generation, PPO."""
    words = ["--device", "cpu", "--tiny", "--only", only, "--out", str(tmp_path / "speed.json")]
    program = [sys.executable, str(ROOT / "tests" / "gpu_speed.py")]
    p = subprocess.run([*program, *words], capture_output=True, text=True)
    assert p.returncode == 0, p.stdout + p.stderr
    line, = read_json(tmp_path / "speed.json")
    assert line["tokens_per_second"] > 0 and line["peak_mb"] is None
    assert ("share" in line) == ("lora" in only)
    assert p.stdout.count("\n") == 3 and f"| {line['name']} |" in p.stdout
