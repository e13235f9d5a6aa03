"""Ours against transformers + peft, side by side: one model, one set of rows, one precision, pinned threads.

    PEERS=/path/to/python python tests/bench.py [--short] [--only WORD]     beside transformers and peft
    python tests/bench.py [--short] [--only WORD]                           ours alone, compared with nothing
    python tests/bench.py --model FOLDER --budget 20                        that model, in at most 20 minutes

Each line is a target: the median over repetitions of ours / theirs, both sides alive at once, taking turns;
the first repetition warms up and is not counted. Seconds are a process's own CPU seconds; on one thread they
are those of the wall clock, without the time of other processes. Tokens are real ones, no pads. Memory is the
peak of each side's own process. Without --model it is a small random Llama. With --budget the time is shared
out among the lines: a line has as many repetitions as fit, at least one, of two steps each. Below a line is
what bounds it: the flops that both sides do, counted by torch's dispatcher (attention on a CPU is not counted),
and for decoding the bytes, as shares of what this machine does in a product or a sum; the rest is overhead.

    sft     LoRA r 8 on q and v, ragged rows of which the last third is supervised. Theirs: batches in random
            order, padded to the longest row, as transformers' Trainer collates them. Ours: data/batches/examples.Feed
    sft_bf16    with --model: the same with the base in bf16, adapters in fp32, under autocast, on both sides
    full    the same on rows of one length, every token supervised: nothing to gain by order or by masks
    prompt_tuning, p_tuning, prefix_tuning     twenty virtual tokens, ragged rows
    answer  greedy generation of 48 tokens for 16 prompts of mixed lengths; theirs: generate, left-padded

    ppo     an iteration of PPO: 16 prompts of 16 tokens, answers of 32, 4 passes, LoRA r 8, a GPT-2 of 6
            layers of 384; ppo_upper and ppo_third: LoRA, on both sides, in the upper half and the upper third of
            the layers. Ours: four roles on one base. Theirs: TRL 1.12, the last with a PPO, LoRA on the
            policy, critic and reward model whole (TRL=FOLDER of `pip install --no-deps --target FOLDER
            trl==1.12.0`)

The start-up times are our own, and so is `--only growth`: one step of LoRA (or of P virtual tokens) as one
number of a base cell is changed, and the share of the machine's own matmul rate that the step reaches; and with
adapters from block k of 12 up, in the first epoch (plain) and in those that go on from the trunk.
"""
import argparse
import json
import os
import pathlib
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
# tokens/s, at least
TARGETS = dict(sft=3.0, full=1.05, prompt_tuning=2.0, p_tuning=2.0, prefix_tuning=2.0, answer=2.0, ppo=1.4,
               ppo_upper=2.0, ppo_third=2.5)
REAL_TARGETS = dict(TARGETS, sft=2.0, sft_bf16=2.0)                     # with --model
MEMORY = dict(sft=0.5, ppo=0.4, ppo_upper=0.4, ppo_third=0.4)           # at most
PPO_LAYERS = dict(ppo=None, ppo_upper=(3, 4, 5), ppo_third=(4, 5))      # None: all six
SOFT = ("prompt_tuning", "p_tuning", "prefix_tuning")
BATCH, LR, NEW = 8, 1e-3, 48


def rows(what, vocab, short):
    """[(ids, supervised)]: lengths are log-normal, as instructions are (median 60, at most 400)."""
    r, n = random.Random(0), 64 if short else 256
    lengths = [min(400, max(8, round(r.lognormvariate(4.1, 0.7)))) for _ in range(n)]
    lengths, share = ([128] * n, 0) if what == "full" else (lengths, 2 / 3)
    return [([r.randrange(10, vocab) for _ in range(k)], [i >= share * k for i in range(k)]) for k in lengths]


# ---- one side: reads a repetition per line, answers with {speed, loss, memory} -----------------------------
def ours(what, folder, data, steps):
    sys.path.insert(0, str(ROOT))
    import torch

    import train
    from data.batches.examples import Feed, size, targets
    from data.results import evaluate
    from model import generate

    dtype = "bf16" if what.endswith("_bf16") else "fp32"
    words = ["--init", folder, "--dtype", dtype, "--device", "cpu", "--batch", str(BATCH), "--lr", str(LR)]
    if what in SOFT:
        words += ["--method", what, "--num_virtual_tokens", "20"]
    else:
        words += ["--method", "lora", "--targets", "q,v", "--rank", "8"]
    if what in ("p_tuning", "prefix_tuning"):
        words += ["--encoder_hidden", "512"]
    if what in ("prompt_tuning", "p_tuning"):
        words += ["--prompt_template", "front"]
    cfg = train.parse(words)
    ctx = train.open_context(cfg)
    if what == "answer":
        prompts = [ids for ids, _ in data[:16]]

        def repeat(i):
            with torch.no_grad():
                return sum(map(len, generate(ctx.model, prompts, NEW, temperature=0))), 0.0
        repeat.bytes = bytes_a_token(ctx.model, prompts)
        return repeat
    trainable = train.apply_method(ctx, cfg)
    feed = Feed(data, BATCH, cfg.micro_batch_tokens, 1)
    optimizer = torch.optim.AdamW(train.param_groups(ctx, cfg, trainable), fused=True)
    ctx.train()

    def repeat(i):
        tokens = total = 0
        for step in range(i * steps, (i + 1) * steps):
            parts = feed(step)
            count = sum(targets(e) for part in parts for e in part)
            past, finish_prompt = train.prompt_past(ctx, cfg, parts)
            for part in parts:
                with ctx.autocast():
                    loss = evaluate.summed_loss(ctx, part, past) / count
                loss.backward()
                total += loss.item()
            finish_prompt()
            torch.nn.utils.clip_grad_norm_(trainable.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            tokens += sum(size(e) for part in parts for e in part)
        return tokens, total / steps
    return repeat


def bytes_a_token(model, prompts):
    """What decoding has to read for a token: its share of the weights, and the keys and values before it."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    columns = sum(map(len, prompts)) / len(prompts) + NEW / 2
    c = model.config
    return weights / len(prompts) + columns * 2 * c.n_layer * c.n_kv_head * c.head_size * 4


def our_ppo(folder, layers):
    sys.path.insert(0, str(ROOT))
    import contextlib

    import torch

    import lora
    import ppo
    from model import GPT
    model = GPT.from_pretrained(folder)
    for name in ("policy", "value", "reward"):
        lora.inject(model, ("q", "k", "v"), rank=8, layers=layers, name=name)

    def role(name):
        @contextlib.contextmanager
        def enter():
            with lora.use_adapter(model, name):
                yield model, None
        return enter
    width = model.config.n_embd
    cfg = ppo.PPOConfig(batch=16, steps=100, max_new_tokens=32, minibatches=1, lr=1e-4, ppo_epochs=4,
                        kl_coef=0.05, adaptive_kl_target=0.0)
    head = ppo.ScalarHead(width)
    value = lora.adapter_parameters(model, "value") | {f"head.{k}": p for k, p in head.named_parameters()}
    state = ppo.PPOState(cfg, lora.adapter_parameters(model, "policy"), value)
    asked = torch.randint(3, 1000, (512, 16), generator=torch.Generator().manual_seed(0)).tolist()
    shared = min(layers or [0])
    reward = ppo.model_reward(role("reward"), ppo.ScalarHead(width), shared_blocks=shared)
    environment = ppo.Environment(asked, reward, 1, reward_takes_batch=True)
    roles = ppo.Roles(role("policy"), role(None), role("value"), head, shared)
    loop = ppo.train_ppo(cfg, roles, state, environment)

    def repeat(i):
        metrics, _ = next(loop)
        return 1, metrics["policy_loss"]
    return repeat


def trl_ppo(folder, layers):
    """TRL's loop is one call, so it runs in a thread that waits for its turn at the end of each iteration."""
    import threading

    sys.path.insert(0, os.environ["TRL"])
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    import datasets
    import peft
    import torch
    from tokenizers import Tokenizer, models
    from transformers import (AutoModelForCausalLM, AutoModelForSequenceClassification,
                              PreTrainedTokenizerFast, TrainerCallback)
    from trl.experimental.ppo import PPOConfig, PPOTrainer
    turn, done = threading.Semaphore(0), threading.Semaphore(0)

    class Turns(TrainerCallback):
        def on_train_begin(self, *args, **kw):
            turn.acquire()

        def on_step_end(self, *args, **kw):
            done.release()
            turn.acquire()
    words = {f"w{i}": i for i in range(1024)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w2")),
                                        pad_token="w0", eos_token="w1", unk_token="w2", padding_side="left")
    asked = torch.randint(3, 1000, (512, 16), generator=torch.Generator().manual_seed(0)).tolist()
    rows = datasets.Dataset.from_list([{"input_ids": ids} for ids in asked])

    def judge():
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
        model.config.pad_token_id = 0
        return model
    settings = PPOConfig(output_dir=tempfile.mkdtemp(), learning_rate=1e-4, report_to="none", save_strategy="no",
                     disable_tqdm=True, use_cpu=True, bf16=False, gradient_checkpointing=False,
                     per_device_train_batch_size=16, gradient_accumulation_steps=1, num_mini_batches=1,
                     num_ppo_epochs=4, total_episodes=512, local_rollout_forward_batch_size=16,
                     response_length=32, stop_token="eos", missing_eos_penalty=1.0, temperature=1.0,
                     num_sample_generations=0, eval_strategy="no")
    trainer = PPOTrainer(
        args=settings, processing_class=tokenizer, ref_model=None, reward_model=judge(), value_model=judge(),
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), train_dataset=rows,
        eval_dataset=rows.select(range(1)), callbacks=[Turns()],
        peft_config=peft.LoraConfig(r=8, lora_alpha=16, target_modules=["c_attn"],
                                    layers_to_transform=layers, task_type="CAUSAL_LM"))
    threading.Thread(target=trainer.train, daemon=True).start()

    def repeat(i):
        turn.release()
        done.acquire()
        return 1, 0.0
    return repeat


def peers(what, folder, data, steps):
    import peft
    import torch
    from transformers import AutoModelForCausalLM
    low = what.endswith("_bf16")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16 if low else torch.float32)
    if what == "answer":
        prompts = [ids for ids, _ in data[:16]]
        T = max(map(len, prompts))
        ids = torch.tensor([[0] * (T - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (T - len(p)) + [1] * len(p) for p in prompts])

        def repeat(i):
            out = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=NEW,
                                 do_sample=False, pad_token_id=0)
            return (out.shape[1] - T) * len(prompts), 0.0
        return repeat
    soft = dict(task_type="CAUSAL_LM", num_virtual_tokens=20)
    model = peft.get_peft_model(model, {
        "prompt_tuning": lambda: peft.PromptTuningConfig(**soft),
        "p_tuning": lambda: peft.PromptEncoderConfig(**soft, encoder_hidden_size=512),
        "prefix_tuning": lambda: peft.PrefixTuningConfig(**soft, prefix_projection=True, encoder_hidden_size=512)
    }.get(what, lambda: peft.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16,
                                        target_modules=["q_proj", "v_proj"]))())
    learn = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(learn, lr=LR, weight_decay=0.0, fused=True)
    model.train()
    order = random.Random(1)

    def repeat(i):
        tokens = total = 0
        for _ in range(steps):
            batch = order.sample(data, BATCH)
            T = max(len(ids) for ids, _ in batch)
            ids = torch.tensor([ids + [0] * (T - len(ids)) for ids, _ in batch])
            mask = torch.tensor([[1] * len(ids) + [0] * (T - len(ids)) for ids, _ in batch])
            labels = torch.tensor([[t if on else -100 for t, on in zip(*row)] + [-100] * (T - len(row[0]))
                                   for row in batch])
            with torch.autocast("cpu", torch.bfloat16, enabled=low):        # as Trainer does with bf16=True
                loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(learn, 1.0)
            optimiser.step()
            optimiser.zero_grad()
            tokens, total = tokens + sum(len(ids) for ids, _ in batch), total + loss.item()
        return tokens, total / steps
    return repeat


def serve(args):
    import torch
    torch.set_num_threads(args.threads)
    if args.side == "cell":
        return cell(json.loads(pathlib.Path(args.job).read_text()))
    out = os.fdopen(os.dup(1), "w")                 # a trainer that prints its logs must not answer for us
    os.dup2(2, 1)
    job = json.loads(pathlib.Path(args.job).read_text())
    if job["what"] in PPO_LAYERS:
        repeat = {"ours": our_ppo, "peers": trl_ppo}[args.side](job["model"], PPO_LAYERS[job["what"]])
    else:
        side = {"ours": ours, "peers": peers}[args.side]
        repeat = side(job["what"], job["model"], job["rows"], job["steps"])
    print("ready", file=out, flush=True)
    for i, word in enumerate(sys.stdin):
        if word == "count\n":
            print(json.dumps(work(repeat, i, job["what"])), file=out, flush=True)
            continue
        began = time.process_time()
        tokens, loss = repeat(i)
        seconds, unit = time.process_time() - began, 2 ** (20 if sys.platform == "darwin" else 10)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
        print(json.dumps(dict(speed=tokens / seconds, loss=loss, memory=peak)), file=out,
              flush=True)


def work(repeat, i, what):
    """What bounds a side: flops a token, the machine's own rates of them and of bytes, bytes a token if known."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import flop_registry

    class Counter(TorchDispatchMode):           # FlopCounterMode fails at a nested torch.autograd.grad
        total = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            flops = flop_registry.get(function._overloadpacket)
            self.total += flops(*args, **(kwargs or {}), out_val=out) if flops else 0
            return out
    with Counter() as counter:
        tokens, _ = repeat(i)
    bulk = torch.zeros(2 ** 25)
    rate = matmul_rate(512, 2048, torch.bfloat16 if what.endswith("_bf16") else torch.float32)
    return dict(flops=counter.total / tokens, flops_a_second=rate, bytes=getattr(repeat, "bytes", None),
                bytes_a_second=4 * bulk.numel() / fastest(bulk.sum))


def matmul_rate(width, inner, dtype):
    """Flops a second of the best of twenty products."""
    import torch
    x, w = torch.randn(1024, width, dtype=dtype), torch.randn(width, inner, dtype=dtype)
    return 2 * x.numel() * inner / fastest(lambda: x @ w)


def fastest(call):
    """CPU seconds of the best of twenty calls."""
    times = []
    for _ in range(20):
        began = time.process_time()
        call()
        times.append(time.process_time() - began)
    return min(times)


def cell(job):
    """A step of training on rows of one length, a third supervised: CPU seconds, peak MB, share of peak."""
    sys.path.insert(0, str(ROOT))
    import torch

    import train
    from data.results import evaluate
    from data.results.trunk import Trunk
    from data.runtime.device import peak_memory_mb
    how = (["--method", "p_tuning_v2", "--num_virtual_tokens", str(job["P"])] if "P" in job else
           ["--method", "lora", "--targets", "q,v", "--rank", str(job["rank"])])
    if job.get("k"):
        how += ["--layers", f"{job['k']}-{job['layers'] - 1}"]
    cfg = train.parse(["--init", job["model"], "--dtype", "fp32", "--device", "cpu", *how])
    ctx = train.open_context(cfg)
    trainable = train.apply_method(ctx, cfg)
    T = job["T"]
    c = ctx.model.config
    ctx.train()
    r, times = random.Random(0), []
    rows = [([r.randrange(c.vocab_size) for _ in range(T)], [i >= 2 / 3 * T for i in range(T)])
            for _ in range(job["batch"])]
    each = max(1, cfg.micro_batch_tokens // T)
    if job.get("trunk"):
        ctx.trunk = Trunk(job["k"])
        ctx.trunk.read(ctx, rows)
    for _ in range(5):
        began = time.process_time()
        for i in range(0, len(rows), each):
            evaluate.summed_loss(ctx, rows[i:i + each], ctx.past()).backward()
        for p in trainable.values():
            p.grad = None
        times.append(time.process_time() - began)
    dense = sum(p.numel()
                for n, p in ctx.model.blocks.named_parameters() if n.endswith("weight") and p.dim() > 1)
    # forward and the gradient of the input, 2 flops a weight each; attention is causal, its backward twice it
    back = 1 - job.get("k", 0) / c.n_layer                  # the share of the blocks
    forward = back if job.get("trunk") else 1
    attention = 2 * c.n_layer * c.n_head * c.head_size * T
    flops = (2 * dense + attention) * forward + (2 * dense + 2 * attention) * back
    flops += 4 * c.vocab_size * c.n_embd / 3
    seconds = statistics.median(times[1:])
    print(json.dumps(dict(seconds=seconds, memory=peak_memory_mb(ctx.device),
                          share=flops * T * len(rows) / seconds / matmul_rate(c.n_embd, c.n_inner, torch.float32))))


# ---- both sides, in turns ----------------------------------------------------------------------------------
def duel(what, model, vocab, args, folder, targets, minutes):
    """One line. minutes: what it may take, or None."""
    began = time.monotonic()
    short = args.short or minutes is not None
    job = folder / f"{what}.json"
    job.write_text(json.dumps(dict(what=what, model=str(model), rows=rows(what, vocab, args.short),
                                   steps=2 if short else 8)))
    sides = {}
    pythons = {"ours": sys.executable}
    if "PEERS" in os.environ and (what not in PPO_LAYERS or "TRL" in os.environ):
        pythons["peers"] = os.environ["PEERS"]
    for side, python in pythons.items():
        sides[side] = subprocess.Popen(
            [python, __file__, "--side", side, "--job", str(job), "--threads", str(args.threads)], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"})
    for side, process in sides.items():
        if process.stdout.readline() != "ready\n":
            raise SystemExit(f"{what}: {side} ({process.args[0]}) does not start; --side {side} --job FILE "
                             "tells why, where FILE holds what, model, rows and steps as JSON")
    found = {side: [] for side in sides}
    longest = 0
    for i in range(1 + (2 if args.short else 5)):
        turn = time.monotonic()
        if i > 1 and minutes is not None and turn - began + longest > 60 * minutes:
            break
        for side, process in sides.items():
            found[side].append(ask(process, ""))
        longest = max(longest, time.monotonic() - turn)
    counts = {}
    for side, process in sides.items():
        if side == "ours" or what not in PPO_LAYERS:        # TRL trains in a thread that the counter does not see
            counts[side] = ask(process, "count")
    for process in sides.values():
        process.communicate()
    medians = [{k: statistics.median(r[k] for r in found[side][1:]) for k in found[side][0]} for side in sides]
    unit = "iterations" if what in PPO_LAYERS else "tokens"
    learns = what not in ("answer", *PPO_LAYERS)
    if len(medians) == 1:
        a, = medians
        print(f"{what:14} {a['speed']:8,.4g} {unit}/s, {a['memory']:7,.0f} MB" + f"; loss {a['loss']:.3f}" * learns,
              flush=True)
        print_bound(what, counts, medians)
        return
    a, b = medians
    ratios = [x["speed"] / y["speed"] for x, y in zip(found["ours"][1:], found["peers"][1:])]
    verdict(what, statistics.median(ratios), targets[what], True,
            f"{a['speed']:8,.4g} against {b['speed']:8,.4g} {unit}/s, {len(ratios)} ratios {min(ratios):.2f} to "
            f"{max(ratios):.2f}" + f"; loss {a['loss']:.3f} and {b['loss']:.3f}" * learns)
    if what in MEMORY:
        verdict(f"{what} memory", a["memory"] / b["memory"], MEMORY[what], False,
                f"{a['memory']:7,.0f} against {b['memory']:7,.0f} MB")
    print_bound(what, counts, medians)


def ask(process, word):
    """What a side answers to "" (a repetition) or "count"."""
    process.stdin.write(f"{word}\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def print_bound(what, counts, medians):
    """Flops (and bytes) of a token on each side, and their share of what this machine can do in a second."""
    flops, shares, parts = [], [], []
    for count, median in zip(counts.values(), medians):
        flops.append(f"{count['flops'] / 1e6:,.1f}")
        shares.append(f"{count['flops'] * median['speed'] / count['flops_a_second']:.0%}")
        if count["bytes"]:
            share = count["bytes"] * median["speed"] / count["bytes_a_second"]
            parts.append(f"; ours reads {count['bytes'] / 1e6:,.2f} MB, {share:.0%} of the memory rate")
    unit = "an iteration" if what in PPO_LAYERS else "a token"
    print(f"{'':14} bound: {' against '.join(flops)} Mflop {unit}, {' and '.join(shares)} of the matmul rate"
          + "".join(parts), flush=True)


def verdict(what, value, target, least, note):
    good = value >= target if least else value <= target
    sign, word = ">=" if least else "<=", "pass" if good else "MISS"
    print(f"{what:14} {value:6.2f}  target {sign} {target:<4}  {word}  {note}", flush=True)


def growth(args, folder, small):
    """The base cell, and one number changed at a time."""
    base, changes = dict(T=64, batch=8, rank=8, layers=6), dict(T=(128, 256), batch=(16, 32), rank=(1, 64),
                                                               layers=(12, 24), P=(5, 20, 80))
    print(f"{'a step of LoRA on q and v':34} {'CPU s':>7} {'over base':>10} {'peak MB':>10} {'over base':>10}"
          f" {'share of peak':>14}")
    first = None
    cells = [("", None, {}), *((name, v, {}) for name, values in changes.items() for v in values)]
    cells += [("k", k, dict(layers=12, trunk=trunk)) for k in (3, 6, 9) for trunk in (False, True)]
    for name, value, more in cells:
        job = {**base, **more, **({name: value} if name else {})}
        job["model"], file = small(job["layers"]), folder / "cell.json"
        file.write_text(json.dumps(job))
        side = [sys.executable, __file__, "--side", "cell", "--job", file, "--threads", str(args.threads)]
        found = json.loads(subprocess.check_output(side, stderr=subprocess.DEVNULL))
        first = first or found
        what = f"{name} {value}" + " virtual tokens, no LoRA" * (name == "P") if name else \
            ", ".join(f"{k} {v}" for k, v in base.items())
        if name == "k":
            what = f"layers 12, adapters from {value}" + (", trunk" if job["trunk"] else "")
        print(f"{what:34} {found['seconds']:7.3f} {found['seconds'] / first['seconds']:10.2f} "
              f"{found['memory']:10.0f} {found['memory'] / first['memory']:10.2f} {found['share']:14.0%}",
              flush=True)


def timed(*argv):
    """(CPU seconds, seconds) until train.py ends, or until it logs its first step."""
    with tempfile.TemporaryDirectory() as out:
        began, log = time.perf_counter(), pathlib.Path(out) / "r" / "log.jsonl"
        spent = resource.getrusage(resource.RUSAGE_CHILDREN)
        where = [] if "--help" in argv else ["--out", f"{out}/r"]
        p = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *argv, *where],
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while p.poll() is None and not (log.exists() and '"train"' in log.read_text()):
            time.sleep(0.01)
        seconds = time.perf_counter() - began
        p.kill()
        p.wait()
        now = resource.getrusage(resource.RUSAGE_CHILDREN)
        return now.ru_utime - spent.ru_utime + now.ru_stime - spent.ru_stime, seconds


def main():
    args = argparse.ArgumentParser(description="ours against transformers and peft")
    args.add_argument("--short", action="store_true", help="a few steps, indicative only")
    args.add_argument("--only", choices=[*REAL_TARGETS, "start", "growth"], help="one line of it")
    args.add_argument("--model", help="a model folder instead of the small random Llama")
    args.add_argument("--budget", type=float, metavar="MINUTES", help="how long the lines may take together")
    args.add_argument("--threads", type=int, default=1)
    args.add_argument("--side", choices=("ours", "peers", "cell"), help=argparse.SUPPRESS)
    args.add_argument("--job", help=argparse.SUPPRESS)
    args = args.parse_args()
    if args.side:
        return serve(args)
    if args.only in (None, "start"):
        for name, most, argv in (("--help", 1.5, ["--help"]), ("first step", 5.0, ["--steps", "100"])):
            times = [timed(*argv) for _ in range(1 if args.short else 5)]
            cpu, wall = (statistics.median(t) for t in zip(*times))
            verdict(name, cpu, most, False, f"CPU seconds; {wall:.2f} by the clock")
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        sys.path.insert(0, str(ROOT))
        import torch

        from data.runtime.files import read_json
        from data.text.tokenizer import Tokenizer
        from model import GPT, GPTConfig

        def small(layers=6):
            model, tokenizer = folder / f"llama{layers}", Tokenizer.train(["a b"], 257, ["<|endoftext|>"])
            if not model.exists():
                torch.manual_seed(0)
                shape = GPTConfig(4096, 512, layers, 4, 256, eos=tokenizer.eos).as_family("llama", n_inner=704)
                GPT(shape).save_pretrained(model)
                tokenizer.save_pretrained(model)
            return str(model)
        model = args.model or small()
        vocab = read_json(pathlib.Path(model) / "config.json")["vocab_size"]
        print(f"{pathlib.Path(model).name}, fp32 where a line says nothing else, {args.threads} threads, "
              f"load {os.getloadavg()[0]:.1f}, torch {torch.__version__}", flush=True)
        if args.only == "growth" or not (args.only or args.short or args.model):
            growth(args, folder, small)
        if args.only in ("start", "growth"):
            return
        if "PEERS" not in os.environ:
            print("PEERS names no interpreter with transformers and peft, so ours is compared with nothing")
        targets = REAL_TARGETS if args.model else TARGETS
        left_out = PPO_LAYERS if args.model else ()                 # PPO has a model of its own
        lines = [args.only] if args.only else [what for what in targets if what not in left_out]
        if "ppo" in lines and "PEERS" in os.environ and "TRL" not in os.environ:
            print("TRL names no folder with trl 1.12, so PPO is not compared")
        ends = time.monotonic() + 60 * (args.budget or 0)
        for i, what in enumerate(lines):
            minutes = (ends - time.monotonic()) / 60 / (len(lines) - i) if args.budget else None
            if what in PPO_LAYERS:
                torch.manual_seed(0)
                GPT(GPTConfig(1024, 64, 6, 6, 384, eos=1)).save_pretrained(folder / "gpt2")
                duel(what, folder / "gpt2", 1024, args, folder, targets, minutes)
            else:
                duel(what, model, vocab, args, folder, targets, minutes)


if __name__ == "__main__":
    main()
