"""train.py: the command. One objective (--task) times one choice of what learns (--method), a folder per run.

    python train.py --method lora                                LoRA, the toy world, the shipped base model
    python train.py --task classify --data FILE --init FOLDER    your data, a real model
    for r in 1 2 4 8; do python train.py --method lora --rank $r; done

    loss of a step = sum over supervised tokens of -log p(token | before) / their number in the whole step

A step is `--batch` examples, cut into micro-batches of at most `--micro` padded tokens; as the division is by
the count of the whole step, the cut does not change the gradient. What is random in step t is a function of
(seed, t), the order of data one of (seed, epoch): a run that is killed and continued ends in the same bits.
Processes of torchrun share its steps and end in the same weights (data/runtime/distributed.py).

The folder (out/<task>-<method>[-flags that are not defaults]-s<seed>) holds config.json, log.jsonl, state.pt,
the weights as adapter/ (peft's format) or model/ (transformers'), and, last of all, result.json. The same
command again prints a finished run's result, continues an interrupted one, refuses another one's folder.
stdout: results; stderr: progress. Exit: 0 done, 1 unexpected, 2 usage, 65 bad data, 75 interrupted.

Public: main, Config, load
"""
import signal

if __name__ == "__main__":                          # until `guard` takes over, Ctrl-C ends us, and no more
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import contextlib
import copy
import dataclasses
import hashlib
import importlib
import json
import math
import os
import sys
import time

import torch
import torch.nn as nn
from tqdm import tqdm

import lora
import ppo
import prompts
from data.batches import batching, objectives, few_shot
from data.text import chat, formats
from data.runtime import distributed, flags
from data.results import evaluate, cost_model, tables
from data.results.inspect_data import examine
from data.runtime.distributed import world
from data.batches.examples import Feed, Ranking, Text, size, targets
from data.checkpoints.safetensors import read_tensors, write_tensors
from data.runtime.files import DataError, UserError, atomic, read_json, write_json
from data.runtime.flags import LORA, NOT_IDENTITY, SOFT, Config, told
from data.checkpoints.model_folders import base_of, beneath, bottom_of, find, portable, settings, weights_folder
from data.results.ppo_metrics import describe as rollout_report
from data.results.ppo_metrics import health, reward_report
from data.checkpoints.hf import read_config
from data.runtime.device import compiles, peak_memory_mb, pick_device, pick_dtype
from data.results.report import describe, report, virtual
from data.runtime.run_folder import Interrupted, Run, RunError, guard, note, say
from data.results.next_token import show
from data.text.tokenizer import Tokenizer
from data.runtime.flags import numbers, ranges
from model import GPT, GPTConfig

HEADS = {"classify": ("label",), "tag": ("tags",), "reward": ("pairs", "ranked")}      # the rows they judge
CONCERNS = {"ppo": ppo.PPOConfig, "sample": ppo.PPOConfig, "dpo": ppo.DPOConfig}     # flags of ppo.py's own


def parse(argv):
    return flags.parse(argv, CONCERNS)


def default_out(cfg):
    standard = ["--task", cfg.task, "--method", cfg.method]
    return flags.default_out(cfg, flags.parse(standard, CONCERNS, checked=False))


# ---------------------------------------------------------------------------------------- models and machines

def load(folder, dtype=torch.float32):
    """(model, prompt or None, tokenizer) of any folder that a run, `transformers` or `peft` wrote.

    An adapter names its base, which may be an adapter again: what that one learned is merged in here.
    """
    folder = weights_folder(folder)
    base = base_of(folder)
    if base is None:
        return GPT.from_pretrained(folder, dtype), None, Tokenizer.from_pretrained(folder)
    model, prompt, tokenizer = load(base)
    if prompt is not None:
        raise DataError(f"{folder} stands on {base}, a soft prompt, which cannot be merged into a model")
    model = (lora.merge(model) if lora.adapters(model) else model).to(dtype)
    if low_rank(folder):
        said = settings(folder)
        if said.get("quant", "none") != "none":         # the base it was trained against, rounding and all
            lora.quantise(model, said["quant"], said["double_quant"])
        lora.load_adapter(model, folder)
    else:
        prompt = prompts.load_prompt(model, folder)
    return model, prompt, tokenizer


def low_rank(folder):
    """Is it an adapter of Linears (lora.py), rather than a soft prompt (prompts.py)?"""
    return read_json(folder / "adapter_config.json").get("peft_type") in ("LORA", "ADALORA", "IA3")


def open_kit(cfg):
    """Model, text and machine for a command, as evaluation and training want them."""
    device, why = pick_device(cfg.device)
    device = distributed.own(device)
    said = settings(cfg.init) if cfg.init != "new" else {}
    judges = said.get("task") == "reward" or said.get("by") == "head"
    if judges and cfg.task in ("chat", "sample", "dpo", "ppo"):
        raise UserError(f"--init {cfg.init} is a run of --task {said['task']}: it judges, and was not taught "
                        "to speak; --task eval measures it, and the model below it can speak")
    if cfg.init == "new":
        model, tokenizer = new_model(cfg)
        prompt, width = None, cfg.n_embd
    else:
        width = read_config(bottom_of(cfg.init))["n_embd"]
    dtype, because = pick_dtype(cfg.dtype, device, width)
    if cfg.compile:
        compiles(device)
    if cfg.init != "new":                           # what is frozen is stored in the dtype it computes in
        stored = torch.float32 if cfg.method == "full" else dtype
        chain = cfg.method != "none" and base_of(weights_folder(cfg.init)) is not None
        model, prompt, tokenizer = load(cfg.init, torch.float32 if chain else stored)
        if chain:                                   # tuned before: that is part of the base now, as in `load`
            model = (lora.merge(model) if lora.adapters(model) else model).to(stored)
    if tokenizer.vocab_size > model.config.vocab_size:
        sizes = f"its tokenizer has {tokenizer.vocab_size} ids, its model {model.config.vocab_size}"
        raise DataError(f"{cfg.init}: {sizes}; they do not belong together")
    template = cfg.template
    if template == "auto":                          # a new model has seen plain text only
        template = said.get("template") or ("plain" if cfg.init == "new" else chat.guess(tokenizer))
    note(f"{device} ({why}), {str(dtype)[6:]} ({because}), chat template {template}"
         + (f", {world.size} processes" if world.size > 1 else ""))
    if cfg.shard and (world.size == 1 or dtype == torch.float16):
        raise UserError("--shard splits a model over the processes of torchrun --nproc_per_node N, in fp32 "
                        "or bf16; " + ("start several" if world.size == 1 else "leave --dtype fp16 out"))
    model = distributed.shard(model, device) if cfg.shard else model.to(device)
    by = "head" if cfg.task == "tag" else said.get("by", "words") if cfg.task == "eval" else cfg.by
    system, ask = (said.get(name) if text is None else text     # "" is an answer
                   for name, text in (("system", cfg.system), ("ask", cfg.ask)))
    text = Text(tokenizer, template, system, tuple(said.get("labels", ())), ask, by,
                *objectives.of(cfg.task, cfg.attention, cfg.objective, said))
    kit = evaluate.Kit(model.eval(), text, device, dtype, prompt=prompt, micro=cfg.micro,
                       max_new=cfg.max_new, checkpoint=cfg.checkpoint, compile=cfg.compile)
    if prompt is not None and prompt.template:
        if cfg.task in ("reward", "dpo", "ppo", "sample"):      # ppo.py reads ids, and these tokens have none
            raise UserError(f"--init {cfg.init} is a soft prompt inside a template, which --task {cfg.task} "
                            "cannot read; train it with --place front")
        text.frame = prompts.place(prompt.template, tokenizer.encode)
    if said.get("by") == "head" and by == "head":
        weight = read_tensors(weights_folder(cfg.init) / "head.safetensors")["score.weight"]
        kit.head = nn.Linear(*reversed(weight.shape), bias=False, device=device)
        kit.head.weight.data.copy_(weight)
    if said.get("task") == "reward" and cfg.task in ("reward", "eval"):
        kit.head = scalar_head(cfg.init).to(device)
    return kit


def scalar_head(folder):
    """The head of a reward model, from the folder of its run."""
    path = weights_folder(folder) / "head.safetensors"
    if settings(folder).get("task") != "reward" or not path.exists():
        raise DataError(f"{folder} is no reward model; --task reward makes one")
    tensors = {name.removeprefix("score."): t for name, t in read_tensors(path).items()}
    head = ppo.ScalarHead(len(tensors["weight"]))
    head.load_state_dict(tensors)
    return head


def new_model(cfg):
    """A tokenizer trained on the data (--vocab 0: bytes), a model of the flagged shape, seeded weights."""
    special = [f"<|{word}|>" for word in "endoftext im_start im_end mask start spare_0 spare_1".split()]
    texts = [row["text"] for row in formats.plain(cfg.data, "train")]
    tokenizer = Tokenizer.train(texts, cfg.vocab or 256 + len(special), special)
    shape = GPTConfig(tokenizer.vocab_size, cfg.block or 256, cfg.n_layer, cfg.n_head, cfg.n_embd,
                      eos=tokenizer.eos)
    if cfg.family == "llama":                       # three matrices at 8/3 of the width: GPT-2's size
        shape = shape.llama(n_inner=-(-8 * cfg.n_embd // 96) * 32)
    torch.manual_seed(cfg.seed)
    return GPT(shape), tokenizer


# ------------------------------------------------------------------------------------------------ the methods

def build(kit, cfg):
    """The one place that knows the methods. Freezes, injects, and returns what learns: {name: parameter}."""
    model, first = kit.model, {}
    if kit.prompt is not None and cfg.method not in SOFT:
        raise UserError(f"--init {cfg.init} is a soft prompt and cannot be merged; start from its base, or "
                        "go on with it by --method prompt (embeddings) or ptuning2 (keys and values)")
    if cfg.method == "full":
        distributed.reshard(model)
        learn = dict(model.named_parameters())
    elif cfg.method in LORA:
        if cfg.quant != "none":
            bits = lora.quantise(model, cfg.quant, cfg.double_quant)
            note(f"base in {cfg.quant}: {bits:.2f} bits per weight of the blocks")
        if cfg.method != "ia3":
            first = dict(rank=cfg.rank, alpha=cfg.alpha, dropout=cfg.dropout, rank_map=numbers(cfg.rank_map))
        if cfg.method == "lora":
            first.update(rslora=cfg.rslora, dora=cfg.dora, pissa=cfg.pissa)
        lora.inject(model, cfg.targets, kind=cfg.method, layers=ranges(cfg.layers), seed=cfg.seed, **first)
        learn = {name: p for name, p in lora.adapter_parameters(model).items() if p.requires_grad}
    elif kit.prompt is not None:                    # a prompt that was tuned before: go on with its numbers
        same = "prompt" if isinstance(kit.prompt, prompts.PromptTuning) else "ptuning2"
        if cfg.method != same:
            raise UserError(f"--init {cfg.init} is a soft prompt, which only --method {same} can go on with")
        if cfg.start or cfg.n_virtual not in (Config.n_virtual, kit.prompt.n_virtual):
            raise UserError(f"--n_virtual and --start shape a new soft prompt; --init {cfg.init} brings its "
                            f"own, of {kit.prompt.n_virtual} virtual tokens")
        model.requires_grad_(False)
        learn = {f"prompt.{name}": p.requires_grad_() for name, p in kit.prompt.named_parameters()}
    else:
        model.requires_grad_(False)
        first = dict(n_virtual=cfg.n_virtual, seed=cfg.seed, **({"init": cfg.start} if cfg.start else {}))
        if cfg.start == "labels":
            first["ids"] = [kit.text.tokenizer.encode(label) for label in kit.text.labels]
        elif cfg.start_text:
            first["ids"] = kit.text.tokenizer.encode(cfg.start_text)
        place = None if cfg.place in (None, "front") else cfg.place.replace("{p}", f"{{p:{cfg.n_virtual}}}")
        if cfg.method == "prompt":
            kit.prompt = prompts.PromptTuning(model, template=place, **first)
        elif cfg.method == "ptuning":
            kit.prompt = prompts.PTuning(model, template=place, encoder=cfg.encoder, hidden=cfg.hidden,
                                         **first)
        elif cfg.method == "prefix":
            kit.prompt = prompts.PrefixTuning(model, hidden=cfg.hidden or 512, **first)
        elif cfg.method == "ptuning2":
            kit.prompt = prompts.PTuningV2(model, dropout=cfg.prefix_dropout, **first)
        if place:
            kit.text.frame = prompts.place(place, kit.text.tokenizer.encode)
        learn = {f"prompt.{name}": p for name, p in kit.prompt.to(kit.device).named_parameters()}
    if kit.text.by == "head":
        if kit.head is None:                        # from zero: every label equally likely, nothing to seed
            kit.head = nn.Linear(model.config.n_embd, len(kit.text.labels), bias=False, device=kit.device)
            nn.init.zeros_(kit.head.weight)
    if cfg.task == "reward" and kit.head is None:
        torch.manual_seed(cfg.seed)
        kit.head = ppo.ScalarHead(model.config.n_embd).to(kit.device)
    if kit.head is not None:
        learn.update({f"head.score.{name}": p.requires_grad_() for name, p in kit.head.named_parameters()})
    return learn


def began_as(folder, device="auto"):
    """The soft prompt that a run began with, made again from its flags and seed; None if those are lost."""
    with contextlib.suppress(UserError, TypeError, KeyError):       # no config.json, no base, other flags
        said = read_json(find(folder) / "config.json")["config"] | {"device": device, "compile": False}
        cfg = Config(**{name: said[name] for name in Config.__dataclass_fields__ if name in said})
        kit = open_kit(cfg)
        kit.text.labels = tuple(settings(folder).get("labels", ()))     # --start labels starts from them
        build(kit, cfg)
        return kit.prompt


def param_groups(kit, cfg, learn):
    """Optimiser groups. Decay pulls matrices of the model and of LoRA, never virtual tokens or a head."""
    if cfg.method in LORA:
        groups = lora.param_groups(kit.model, cfg.lr, cfg.lora_plus, cfg.weight_decay)
        learn = {name: p for name, p in learn.items() if name.startswith("head.score.")}
    else:
        groups = []
    heads = {name for name in learn if name.startswith("head.score.")}
    pulled = {name for name, p in learn.items() if p.dim() > 1 and cfg.method == "full"} - heads
    for decay in (True, False):
        if ps := [p for name, p in learn.items() if name not in heads and (name in pulled) == decay]:
            groups.append(dict(params=ps, lr=cfg.lr, weight_decay=cfg.weight_decay * decay))
    if heads:                                       # virtual tokens bear rates that would shatter a head
        groups.append(dict(params=[learn[name] for name in learn if name in heads], lr=min(cfg.lr, 0.03),
                           weight_decay=0.0))
    return groups


def save_weights(kit, cfg, folder):
    """The trained weights in other people's formats, what only we know in run.json. Returns their bytes."""
    inner, model = folder / ("model" if cfg.method == "full" else "adapter"), kit.model
    if cfg.shard:
        distributed.reshard(model)
        weights = distributed.collect({name: p.detach() for name, p in model.named_parameters()})
    if world.rank:
        return 0
    if cfg.shard:
        with torch.device("meta"):
            model = GPT(model.config)
        model.load_state_dict({"head.weight": weights["wte.weight"], **weights}, assign=True)
    if cfg.method == "full":
        model.save_pretrained(inner)
        kit.text.tokenizer.save_pretrained(inner)
    else:
        if kit.prompt is not None:
            prompts.save_prompt(kit.prompt, inner, base=portable(beneath(cfg.init)))
        else:
            lora.save_adapter(kit.model, inner, base=portable(cfg.init))
    if kit.head is not None:
        write_tensors(inner / "head.safetensors", {f"score.{name}": t.cpu()
                                                   for name, t in kit.head.state_dict().items()})
    beside = read_json(inner / "run.json") if (inner / "run.json").exists() else {}
    said = {name: getattr(kit.text, name) for name in ("template", "system", "labels", "ask", "by",
                                                       "attention", "objective")}
    if cfg.method in LORA and cfg.quant != "none":
        said |= dict(quant=cfg.quant, double_quant=cfg.double_quant)
    write_json(inner / "run.json", {**beside, "task": cfg.task, "method": cfg.method, **said})
    return sum(f.stat().st_size for f in inner.iterdir() if f.suffix == ".safetensors")


# --------------------------------------------------------------------------------------------------- the loop

def lr_at(step, total, cfg):
    """Linear warm-up, then the schedule down to min_lr (a share of --lr)."""
    warm = round(cfg.warmup * total)
    if step < warm:
        return cfg.lr * (step + 1) / (warm + 1)
    t = (step - warm) / max(1, total - warm)
    down = {"cosine": 0.5 + 0.5 * math.cos(math.pi * t), "linear": 1 - t, "constant": 1.0}[cfg.schedule]
    return cfg.lr * (cfg.min_lr + (1 - cfg.min_lr) * down)


def culprit(kit, learn):
    """The first tensor that is not finite, for the sentence that ends a run: weights before gradients."""
    named = [("the weight " + name, p) for name, p in [*kit.model.named_parameters(), *learn.items()]]
    named += [("the gradient of " + name, p.grad) for name, p in learn.items() if p.grad is not None]
    return next((what for what, t in named if not distributed.full(t).isfinite().all()), "the loss itself")


def objective(kit, cfg, part, past):
    """What --task minimises, summed over these examples, fp32: all that the loop knows about tasks."""
    if cfg.task == "reward":
        return ppo.reward_step(kit.role(past), kit.head, part)[0]
    if cfg.task == "dpo":
        return ppo.dpo_step(kit.role(past), part, cfg.rl)[0]
    return evaluate.summed_loss(kit, part, past)


@torch.no_grad()
def measure(kit, cfg, rows, examples, shots=()):
    """(metrics, what it says about the first rows): evaluate.measure, and the same for preferences."""
    if not isinstance(examples[0], Ranking):
        return evaluate.measure(kit, rows, examples, shots)
    if cfg.task == "eval" and kit.head is None:
        raise UserError(f"--data {cfg.data} holds preferences, which only a run of --task reward can judge")
    total, seen, said, past = 0.0, [], {}, kit.past()
    with kit.cast():
        for part in evaluate.by_length(kit, list(map(size, examples))):
            some = [examples[i] for i in part]
            if cfg.task == "dpo":
                loss, _, found = ppo.dpo_step(kit.role(past), some, cfg.rl)
            else:
                loss, _, found = ppo.reward_step(kit.role(past), kit.head, some)
                for i, scores in zip(part, found[0].tolist()):
                    said[i] = "scores, best first: " + " ".join(f"{s:.2f}" for s in scores)
            total, seen = total + loss.item(), [*seen, found]
    total, seen = sum(distributed.gather(total)), sum(distributed.gather(seen), [])
    if cfg.task != "dpo":
        return {"loss": total / len(rows), **reward_report(seen)}, distributed.merged(said)
    means = {name: sum(found[name] for found in seen) / len(rows) for name in seen[0]}
    return {"loss": total / len(rows), **means}, evaluate.answer(kit, list(map(kit.asked, rows[:3])))


def fit(kit, cfg, run, learn, feed, total, state, evaluate_now):
    """The supervised loop, the only one. learn: {name: parameter}; state: what state.pt held.

    `evaluate_now` is called a few times on the way. Returns the counters: step, tokens, seconds, skipped.
    """
    optimiser = torch.optim.AdamW(param_groups(kit, cfg, learn), betas=(0.9, cfg.beta2),
                                  fused=kit.device.type != "mps")
    shares = [g["lr"] / (cfg.lr or 1) for g in optimiser.param_groups]      # LoRA+: a group's own rate
    scaler = torch.amp.GradScaler(kit.device.type, enabled=kit.dtype == torch.float16)
    ranks = None
    if cfg.method == "adalora":                     # its schedule counts optimiser steps, all of the run's
        ranks = lora.RankAllocator(kit.model, total, cfg.target_rank, round(cfg.prune_start * total),
                                   round(cfg.prune_end * total), cfg.prune_every)
    now = dict(step=0, tokens=0, seconds=0.0, skipped=0, bad=0, processes=world.size)
    distributed.reshard(kit.model)
    if "learn" in state:
        if cfg.dropout and state["now"].get("processes", 1) != world.size:
            raise UserError(f"{run.folder} was begun by {state['now'].get('processes', 1)} processes, each "
                            "with its own --dropout: go on with as many, or use --fresh to start over")
        for name, value in state["learn"].items():
            learn[name].data.copy_(distributed.scatter(learn[name], value))
        optimiser.load_state_dict(distributed.scatter_state(optimiser, state["optimiser"]))
        scaler.load_state_dict(state["scaler"])
        now.update(state["now"], processes=world.size)
        if ranks:
            ranks.load_state_dict(state["ranks"])

    def save():
        with guard:
            whole = distributed.collect({"learn": {name: p.detach() for name, p in learn.items()},
                                         "optimiser": optimiser.state_dict()})
            run.save({**state, **whole, "scaler": scaler.state_dict(), "now": dict(now),
                      "ranks": ranks.state_dict() if ranks else {}})

    def clock():
        return dict(step=now["step"], tokens=now["tokens"], seconds=round(now["seconds"], 3))

    run.rewind(now["step"])
    spoke = time.monotonic()
    every = cfg.eval_every or -(-total // 4)
    bar = tqdm(total=total, initial=now["step"], disable=world.rank > 0 or None, unit="step", mininterval=0.5)
    kit.train()
    try:
        while now["step"] < total:
            step = now["step"]
            if step and step % every == 0:          # first of all: what was interrupted here comes again
                kit.train(False)
                found = evaluate_now()
                kit.train()
                run.log(event="valid", **clock(), **found)
                note(f"step {step}/{total}  valid  "
                     + "  ".join(f"{name} {value:.4g}" for name, value in found.items()))
            began = time.monotonic()
            dice = (cfg.seed * 1_000_003 + step) % 2 ** 63
            torch.manual_seed(dice)                 # dropout: a function of (seed, step)
            whole = feed.rows(step)                 # every rank plans the whole step ...
            hands = [feed.cut(some) for some in distributed.deal(whole, list(map(size, whole)), world.size)]
            parts, most = hands[world.rank], max(map(len, hands))       # ... and takes its hand
            count, loss, extra = sum(map(targets, whole)), 0.0, {}
            with kit.cast():
                past, finish = kit.past(), None
            if world.rank:
                torch.manual_seed((dice + (world.rank << 40)) % 2 ** 63)
            if past is not None and len(parts) > 1:                     # one pass through the prompt per step
                past, finish = prompts.cut(past)
            for part in parts:
                with kit.cast():
                    share = objective(kit, cfg, part, past) / max(count, 1)
                scaler.scale(share).backward()
                loss = loss + share.detach()
            for _ in range(most - len(parts)) if cfg.shard else ():     # all ranks must run the same forwards
                with kit.cast():
                    (0 * objective(kit, cfg, whole[:1], past)).backward()
            if finish and parts:
                finish()
            loss, = distributed.add_up(learn.values(), [float(loss)])       # a GPU is waited for
            if ranks:                               # reported apart: the loss stays comparable
                extra["orthogonality"] = cfg.orth * lora.orthogonality(kit.model)
                scaler.scale(extra["orthogonality"]).backward()
            scaler.unscale_(optimiser)
            norm = float(distributed.clip(learn.values(), cfg.clip or math.inf))
            rate, sound = lr_at(step, total, cfg), math.isfinite(loss) and math.isfinite(norm)
            with guard:                             # all that changes, changes in here
                if sound:
                    for group, own in zip(optimiser.param_groups, shares):
                        group["lr"] = rate * own
                    scaler.step(optimiser)
                    if ranks:                       # new weights with this step's gradient, as its authors do
                        ranks.update(step)
                elif now["bad"] == 9:
                    raise RunError(f"{run.folder}: 10 steps in a row were not finite, first of all "
                                   f"{culprit(kit, learn)}; lower --lr, or use --dtype fp32")
                scaler.update()
                optimiser.zero_grad(set_to_none=True)
                now["step"], now["seconds"] = step + 1, now["seconds"] + time.monotonic() - began
                now["tokens"] += sum(map(size, whole))
                now["skipped"], now["bad"] = now["skipped"] + (not sound), 0 if sound else now["bad"] + 1
                last = step + 1 == total
                if (step + 1) % max(1, total // 100) == 0 or last or not sound:
                    if ranks:
                        extra = {"orthogonality": extra["orthogonality"].item(), **ranks.report()}
                    run.log(event="train", **clock(), loss=loss, lr=rate, grad_norm=norm,
                            skipped=now["skipped"], **extra)
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()
            if bar.disable and time.monotonic() - spoke > 5:
                speed = now["tokens"] / now["seconds"]
                note(f"step {step + 1}/{total}  loss {loss:.4f}  {speed:,.0f} tokens/s")
                spoke = time.monotonic()
            if (step + 1) % cfg.save_every == 0 and not last:
                save()
        save()
    except Interrupted:
        save()
        raise
    finally:
        bar.close()
        kit.train(False)
    return now


# -------------------------------------------------------------------------------------------------- the tasks

def supervised(cfg):
    """The tasks that share a loop; with --method none (and --task eval) the same without learning."""
    run = open_run(cfg)
    if not cfg.dry_run and (done := run.finished()):
        return report(done, run.folder)
    with contextlib.nullcontext() if cfg.dry_run else run.opened():
        kit, rows, kind = open_kit(cfg), *open_data(cfg)
        if kit.head is not None:
            task = settings(cfg.init)["task"]
            if kind not in (judged := HEADS[task]):
                raise DataError(f"{cfg.data} holds {kind} rows; {cfg.init}, a run of --task {task}, judges "
                                f"{' or '.join(judged)} rows")
        if kind in ("label", "tags"):
            found = formats.names(sum(rows.values(), []))
            if not set(found) <= set(kit.text.labels):      # a tuned model keeps its order and unused labels
                if kit.head is not None:
                    raise DataError(f"{cfg.data} has the labels {sorted(found)}, but the head of {cfg.init} "
                                    f"knows {list(kit.text.labels)}")
                kit.text.labels = found
            if kind == "label" and len(kit.text.labels) < 2:
                raise DataError(f"{cfg.data} has the one label {found[0]!r}, and nothing to tell it from")
            unseen = set(found) - set(formats.names(rows["train"]))
            if unseen and cfg.method != "none":
                note(f"no training row has the label {', '.join(sorted(unseen))}, which valid or test have")
            if kind == "label" and len(kit.text.asked({"text": "", "label": found[0]})) >= kit.room():
                raise UserError(f"the question that names the {len(found)} labels of {cfg.data} leaves no "
                                "room for a text; give a shorter --ask")
        base = sum(p.numel() for p in kit.model.parameters())
        if cfg.dry_run:
            learn = build(kit, cfg)
            few, block = {"train": [] if kind == "text" else rows["train"][:200]}, kit.block(cfg.block)
            some = kit.text.split(few, block, cfg.too_long)["train"]
            return describe(kit, cost_model.planned(kit, cfg, learn, some, block), base, some[:2])
        state = run.start(facts(kit, rows)) or {}
        test, steps = rows["test"], few_shot.counts(cfg.shots, kind, kit.text.by)
        asked = [*map(kit.asked, rows["valid"] * 2)] if cfg.task == "reward" else []
        if "baseline" not in state:
            examples = kit.text.split({"test": test}, kit.block(cfg.block), cfg.too_long)["test"]
            if cfg.task in ("reward", "dpo"):       # nothing to measure yet; what would the model say?
                found, said = {}, evaluate.answer(kit, list(map(kit.asked, test[:3])))
            else:
                found, said = measure(kit, cfg, test, examples, rows["train"][:steps[0]])
            state = {"baseline": found, "before": said[:3], "right": evaluate.right(kit, test, said)}
            if cfg.task == "reward":                # scores will be relative to what this model says
                dice = torch.Generator(kit.device).manual_seed(cfg.seed)
                with distributed.alike():           # one stream of random numbers
                    state["samples"] = evaluate.sample(kit, asked, temperature=1.0, generator=dice)
            run.rewind(-1)
            run.log(event="baseline", step=0, tokens=0, seconds=0.0, **found)
        now, learn, weights = dict(step=0, tokens=0, seconds=0.0, skipped=0), {}, 0
        after, found, right = state["before"], dict(state["baseline"]), state["right"]
        if cfg.method != "none":
            plain = general(cfg, kit)
            state.setdefault("general", evaluate.mean_loss(kit, plain)[0])
            learn = build(kit, cfg)
            block = kit.block(cfg.block)
            examples = kit.text.split(rows, block, cfg.too_long)
            if cfg.task == "dpo":                   # the reference is the policy as it begins
                examples = {split: referred(kit, some) for split, some in examples.items()}
            feed = Feed(examples["train"], cfg.batch, cfg.micro, cfg.seed, block if kind == "text" else None,
                        kit.text)
            total = math.ceil(cfg.epochs * feed.per_epoch) if cfg.steps is None else cfg.steps
            note(f"{sum(p.numel() for p in learn.values()):,} of {base:,} parameters learn; {total} steps")
            now = fit(kit, cfg, run, learn, feed, total, state,
                      lambda: measure(kit, cfg, rows["valid"], examples["valid"])[0])
            if kit.prompt is not None:
                kit.prompt.fold()                   # what an encoder was for ends with the training
            if cfg.task == "reward":
                with kit.cast(), torch.no_grad():
                    judge = ppo.model_reward(kit.role(kit.past()), kit.head, cfg.micro)
                    ppo.calibrate(kit.head, judge(asked, state["samples"]))
            found, said = measure(kit, cfg, test, examples["test"])
            after, right = said[:3], evaluate.right(kit, test, said)
            if plain:
                found["forgetting"] = evaluate.mean_loss(kit, plain)[0] - state["general"]
        elif steps[1:]:
            rungs, after = few_shot.ladder(
                steps, lambda n: evaluate.measure(kit, test, [], rows["train"][:n]), found)
            found, right = {**rungs[-1][1], **few_shot.table(rungs)}, evaluate.right(kit, test, after)
        with guard:
            if learn:
                weights = save_weights(kit, cfg, run.folder)
            samples = [dict(prompt="".join(turn["content"] for turn in kit.text.turns(row)[-2:-1]),
                            wanted=kit.text.wanted(row)[0], before=b, after=a)
                       for row, b, a in zip(test, state["before"], after)]
            result = finish(run, kit, found, state["baseline"], samples, learn, base, weights, now, right)
    return report(result, run.folder)


def finish(run, kit, found, before, samples, learn, total, weights, now, right=""):
    """The last event, then result.json, which is returned."""
    clock = dict(step=now["step"], tokens=now["tokens"], seconds=round(now["seconds"], 3))
    run.log(event="test", **clock, **found)
    result = dict(
        status="done", **{name: run.told[name] for name in ("task", "method", "init", "data", "seed")},
        metrics=found, baseline_metrics=before, params_total=total,
        params_trainable=sum(p.numel() for p in learn.values()), adapter_bytes=weights,
        steps=now["step"], skipped=now["skipped"], tokens=now["tokens"], seconds=clock["seconds"],
        tokens_per_second=round(now["tokens"] / max(now["seconds"], 1e-9)), samples=samples,
        right=right, peak_memory_mb=peak_memory_mb(kit.device),
        speaks=kit.text.by == "words" and kit.text.attention != "bidirectional")
    if run.told["task"] == "eval" and kit.prompt is not None:
        result["virtual"] = virtual(kit, began_as(run.told["init"], str(kit.device)), prompts.nearest_tokens)
    run.finish(result)
    return result


def facts(kit, rows):
    """What config.json keeps beside the flags, and what a continued run must find again."""
    return dict(device=str(kit.device), dtype=str(kit.dtype)[6:], template=kit.text.template,
                data_sha256=hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest(),
                base_sha256=evaluate.fingerprint(kit.model))


def general(cfg, kit):
    """Plain text that no task asks for, as examples: the rise of its loss is the forgetting."""
    rows = [] if cfg.forget == "none" else formats.plain(cfg.forget, "valid", ("text", "chat"))[:100]
    virtual = cfg.n_virtual if cfg.method in SOFT and kit.prompt is None else 0     # before and after alike
    if kit.room() - virtual < 2:
        raise UserError(f"--n_virtual {virtual} leaves no room in a context of {kit.model.config.block_size}")
    return kit.text.split({"valid": rows}, min(256, kit.room() - virtual))["valid"]


def open_run(cfg):
    return Run(cfg.out or default_out(cfg),
               {name: value for name, value in told(cfg).items() if name not in NOT_IDENTITY}, cfg.fresh)


@torch.no_grad()
def referred(kit, examples):
    """DPO's examples with their log-probabilities as they are now: the policy begins as its reference."""
    out, past = {}, kit.past()
    with kit.cast():
        for part in evaluate.by_length(kit, list(map(size, examples))):
            both = ppo.pair_logprobs(kit.role(past), [examples[i] for i in part])
            for i, pair in zip(part, torch.stack(both, 1).tolist()):
                out[i] = pair
    return [e._replace(reference=tuple(pair)) for e, pair in zip(examples, distributed.merged(out))]


def open_data(cfg):
    """({split: rows}, kind) of --data, fit for the task."""
    data = formats.splits(cfg.data)
    rows, kind = {split: d.rows for split, d in data.items()}, data["train"].kind
    said = [f"{len(r)} {split}" for split, r in rows.items()]
    said += [f"{n} dropped {why}" for why, n in data["train"].dropped.items()]
    note(f"{data['train'].source}, {data['train'].form or kind}: {', '.join(said)}")
    asks = ("prompt", "chat", "pairs", "ranked")
    reads = {"pretrain": ("text",), "classify": ("label",), "tag": ("tags",), "ppo": asks, "sample": asks,
             "sft": ("chat", "label", "tags"), "reward": ("pairs", "ranked"), "dpo": ("pairs", "ranked"),
             "eval": ("chat", "label", "tags", "text", "pairs", "ranked")}[cfg.task]
    if kind not in reads:
        raise DataError(f"{cfg.data} holds {kind} rows; --task {cfg.task} reads {' or '.join(reads)} rows")
    if shared := formats.leaks(rows["train"], rows["test"]):
        note(f"{shared} test rows are in the training split, too: the test flatters")
    rows["test"] = rows["test"][:cfg.items or None]
    if cfg.task != "sample":                        # which answers them all
        rows["valid"] = rows["valid"][:100]         # a look at progress; results come from test
    return rows, kind


# ------------------------------------------------------------------------------------------- from preferences

def role(kit, model, name=None, prompt=None):
    """A part that a model plays in ppo.py: inside, its adapter is live, and it computes as the run does."""
    @contextlib.contextmanager
    def enter():
        with kit.cast(), lora.use(model, name):
            yield model, prompt(model) if prompt is not None else None
    return enter


def tuned(kit, model, prompt):
    """The part of a model as it has been tuned: with its adapter, if it has one, and its soft prompt."""
    return role(kit, model, "default" if lora.adapters(model) else None, prompt)


def scorer(word, kit, texts):
    """module:function of two texts -> a function of ids, for ppo.py. texts: {prompt ids: its text}."""
    module, _, name = word.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        judge = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as e:
        raise UserError(f"{word} cannot be imported ({e}); it must be module:function, a function of the "
                        "texts of a prompt and an answer that returns a number") from None
    return lambda asked, said: distributed.lead(lambda: torch.tensor(      # which may draw, or ask somebody
        [float(judge(texts[tuple(p)], kit.text.said(y))) for p, y in zip(asked, said)]))


def reward_model(cfg, kit, base):
    """(what scores answers, its head, its adapter's folder or None). A reward model that was trained on the
    model which --init names is one more adapter of `base`, and a critic can begin with it."""
    folder, head = weights_folder(cfg.reward), scalar_head(cfg.reward).to(kit.device)
    below = base_of(folder)
    shared = below is not None and below.resolve() == weights_folder(cfg.init).resolve() and low_rank(folder)
    if shared and settings(folder).get("quant", "none") in ("none", cfg.quant):
        lora.load_adapter(base, folder, "reward", trainable=False)
        return ppo.model_reward(role(kit, base, "reward"), head, cfg.rl.micro), head, folder
    model, prompt, tokenizer = load(cfg.reward, kit.model.wte.weight.dtype)
    if tokenizer.encode("A reward, of 10!") != kit.text.tokenizer.encode("A reward, of 10!"):
        raise DataError(f"--reward {cfg.reward} and --init {cfg.init} do not share a tokenizer")
    model = model.to(kit.device).requires_grad_(False).eval()
    return ppo.model_reward(tuned(kit, model, prompt), head, cfg.rl.micro), head, None


class Table:
    """What --task ppo and --task sample sit at: prompts as ids, judges of answers, ids that no answer has."""

    def __init__(self, cfg, kit, rows, base):
        self.kit, self.rl, self.seed, self.texts, self.prompts = kit, cfg.rl, cfg.seed, {}, {}
        room = kit.room() - cfg.rl.max_new
        if room < kit.room() // 8:
            raise UserError(f"--max_new {cfg.rl.max_new} leaves {room} tokens of the context for prompts; "
                            "lower it")
        for split, some in rows.items():
            whole = [kit.text.asked(row) for row in some]
            self.prompts[split] = [chat.shorter(ids, room) for ids in whole]
            if long := sum(len(ids) > room for ids in whole):
                note(f"{split}: {long} prompts lost their beginning, because longer than {room} tokens")
            last = [kit.text.turns(row)[-2]["content"] for row in some]
            self.texts.update(zip(map(tuple, self.prompts[split]), last))
        if not cfg.reward:
            raise UserError(f"--task {cfg.task} needs --reward: a run of --task reward, or module:function")
        if ":" in cfg.reward:
            self.reward, self.head, self.folder = scorer(cfg.reward, kit, self.texts), None, None
        else:
            self.reward, self.head, self.folder = reward_model(cfg, kit, base)
        word = cfg.gold or ("data.toy:gold" if cfg.data == "toy/prompts" else None)
        self.gold = scorer(word, kit, self.texts) if word else None
        rest = range(kit.text.tokenizer.vocab_size, kit.model.config.vocab_size)
        self.banned = sorted({*kit.text.tokenizer.special.values(), *rest} - {kit.text.end})

    @torch.no_grad()
    def look(self, roles, prompts, n=1):
        """n answers of the policy to each prompt: ({metric: value}, answers, scores (prompts, n))."""
        asked, end = [p for p in prompts for _ in range(n)], self.kit.text.end
        batch, answers = ppo.rollout(roles._replace(critic=None), asked, {end}, self.rl, self.banned,
                                     ppo.rng(self.seed, "look", device=self.kit.device))
        judged = {"score": torch.as_tensor(self.reward(asked, answers)).float().cpu()}
        if self.gold:
            judged["gold"] = self.gold(asked, answers)
        ended = torch.tensor([y[-1] == end for y in answers])
        found = rollout_report(batch, answers, judged["score"], ended, n)
        found = {name: found[name] for name in ("kl", "eos_rate", "length", "unique", "repeat4")}
        best = ppo.best_of_n(judged["score"].view(-1, n))[:, None]      # the baseline that RL has to meet
        for name, x in judged.items():
            found |= {name: x.mean().item(), name + "_std": x.std(unbiased=False).item()}
            if n > 1:
                found[f"{name}_best_of_{n}"] = x.view(-1, n).gather(1, best).mean().item()
        return found, answers, judged["score"].view(-1, n)


def cast_roles(cfg, kit, base, table):
    """(Roles, what the critic learns). The critic begins as the reward model, or with values of zero."""
    policy = tuned(kit, kit.model, kit.prompt)
    reference = role(kit, base, None, copy.deepcopy(kit.prompt))    # of a soft prompt: the prompt as it began
    if cfg.rl.algo != "ppo":
        return ppo.Roles(policy, reference), None
    if table.folder:
        head = copy.deepcopy(table.head)
        lora.load_adapter(base, table.folder, "value")
    else:
        head = ppo.ScalarHead(base.config.n_embd, zero=True).to(kit.device)
        lora.inject(base, cfg.targets, cfg.rank, cfg.alpha, layers=ranges(cfg.layers), name="value",
                    seed=cfg.seed)
        base.to(kit.device)
    learn = {f"head.{name}": p.requires_grad_() for name, p in head.named_parameters()}
    return ppo.Roles(policy, reference, role(kit, base, "value"), head), \
        learn | lora.adapter_parameters(base, "value")


def reinforce(cfg):
    """--task ppo. Policy, critic and reward model are adapters of one frozen base, which is the reference;
    with --method full the policy leaves it, so a copy stays behind."""
    run = open_run(cfg)
    if done := run.finished():
        return report(done, run.folder)
    with run.opened():
        kit, (rows, _), rl = open_kit(cfg), open_data(cfg), cfg.rl
        base = kit.model if cfg.method != "full" else copy.deepcopy(kit.model).requires_grad_(False)
        total = sum(p.numel() for p in base.parameters())
        state = run.start(facts(kit, rows)) or {}
        learn = build(kit, cfg)
        table = Table(cfg, kit, rows, base)
        roles, value = cast_roles(cfg, kit, base, table)
        note(f"{sum(p.numel() for p in learn.values()):,} of {total:,} parameters learn")
        trained, plain = ppo.PPOState(rl, learn, value), general(cfg, kit)
        if "baseline" not in state:
            found, answers, _ = table.look(roles._replace(policy=roles.reference), table.prompts["test"], 4)
            before = [kit.text.said(y) for y in answers[:12:4]]
            state = dict(baseline=found, before=before, seconds=0.0, tokens=0)
            with roles.reference():
                state["general"] = evaluate.mean_loss(kit, plain)[0]
            run.rewind(-1)
            run.log(event="baseline", step=0, tokens=0, seconds=0.0, **found)
        else:
            trained.load_state_dict(state["trained"])
        run.rewind(trained.step)
        ptx = None
        if rl.ptx_coef:
            feed = Feed(kit.text.stream(formats.plain(cfg.ptx_data, "train")), 8, rl.micro, cfg.seed,
                        min(256, kit.room()), kit.text)

            def ptx(step, minibatch):
                parts = feed(step * rl.ppo_epochs * rl.minibatches + minibatch)
                return [tuple(t.to(kit.device) for t in batching.collate(part)) for part in parts]
        bar = tqdm(total=rl.steps, initial=trained.step, disable=world.rank > 0 or None, unit="iteration",
                   mininterval=0.5)
        began, spoke = time.monotonic(), -math.inf
        for metrics, batch in ppo.train_ppo(rl, roles, trained, table.prompts["train"], table.reward,
                                            kit.text.end, table.banned, table.gold, ptx):
            with guard:
                now = time.monotonic()
                state["seconds"], began = state["seconds"] + now - began, now
                state["tokens"] += int(batch.lengths.sum())
                run.log(event="train", **{**metrics, "tokens": state["tokens"], "seconds": state["seconds"]})
                if trained.step % cfg.save_every == 0 or trained.step == rl.steps:
                    run.save({**state, "trained": trained.state_dict()})
            bar.set_postfix(score=f"{metrics['score']:.3f}", refresh=False)
            bar.update()
            wrong = health(metrics, 1e-4 if kit.dtype == torch.float32 else 0.5)
            if now - spoke > 5 or wrong or trained.step == rl.steps:
                shown = ("score", "gold", "kl", "beta", "eos_rate", "length", "entropy")
                shown = [f"{name} {metrics[name]:.3g}" for name in shown if name in metrics]
                note(f"iteration {trained.step}/{rl.steps}  " + "  ".join(shown)
                     + "".join(f"\n  {line}" for line in wrong))
                spoke = now
        bar.close()
        if trained.ema:                             # what is measured and kept is the average
            for name, p in learn.items():
                p.data.copy_(trained.ema.shadow[name])
        found, answers, _ = table.look(roles, table.prompts["test"])
        if table.gold and state["baseline"]["gold_std"]:
            found["gold_gain"] = (found["gold"] - state["baseline"]["gold"]) / state["baseline"]["gold_std"]
        with roles.policy():
            if plain:
                found["forgetting"] = evaluate.mean_loss(kit, plain)[0] - state["general"]
            with guard:
                weights = save_weights(kit, cfg, run.folder)
                samples = [dict(prompt=table.texts[tuple(p)], before=b, after=kit.text.said(y))
                           for p, b, y in zip(table.prompts["test"], state["before"], answers)]
                result = finish(run, kit, found, state["baseline"], samples, learn, total, weights,
                                dict(step=trained.step, skipped=0, **state))
    return report(result, run.folder)


def draw(cfg):
    """--task sample: n answers to each prompt, scored, and the best of them as rows to imitate, so that
    `--task sft --data FOLDER` on them is FeedME."""
    run = open_run(cfg)
    if done := run.finished():
        return report(done, run.folder)
    with run.opened():
        kit, (rows, _), began = open_kit(cfg), open_data(cfg), time.monotonic()
        run.start(facts(kit, rows))
        rows = {split: some[:cfg.items or None] for split, some in rows.items()}
        table, n = Table(cfg, kit, rows, kit.model), cfg.rl.samples
        policy = tuned(kit, kit.model, kit.prompt)
        for split, asked in table.prompts.items():
            found, answers, scores = table.look(ppo.Roles(policy, policy), asked, n)
            cut = torch.tensor([y[-1] != kit.text.end for y in answers]).view(-1, n)
            best = ppo.feedme(scores.masked_fill(cut, -math.inf), cfg.keep, torch.finfo().min)
            kept = [dict(prompt=table.texts[tuple(asked[b])], completion=kit.text.said(answers[b * n + i]),
                         score=scores[b, i].item()) for b, i in best]   # a text cut short is none to imitate
            if bare := len(asked) - len({row["prompt"] for row in kept}):
                note(f"{split}: {bare} prompts have no answer that ended, and no row")
            with atomic(run.folder / f"{split}.jsonl") if not world.rank else open(os.devnull, "wb") as f:
                f.writelines((json.dumps(row) + "\n").encode() for row in kept)
        del found["kl"]                             # policy and reference are one here
        result = finish(run, kit, found, {}, [], {}, sum(p.numel() for p in kit.model.parameters()), 0,
                        dict(step=0, tokens=0, seconds=time.monotonic() - began, skipped=0))
    return report(result, run.folder)


def stages(cfg):
    """--task ppo from the base model: letters to imitate, a reward model of ranked letters, PPO on both."""
    folders = []
    for words in (["sft", "--data", "toy/letters", "--epochs", "1"], ["reward", "--init"]):
        words = ["--task", *words, *folders, "--seed", str(cfg.seed), "--device", cfg.device]
        stage = parse([*words, "--dtype", cfg.dtype])
        note("\npython train.py " + " ".join(words))
        supervised(stage)
        folders.append(default_out(stage))
    note(f"\npython train.py --task ppo --init {folders[0]} --reward {folders[1]}")
    out = cfg.out or default_out(cfg)
    return reinforce(dataclasses.replace(cfg, init=folders[0], reward=folders[1], out=out))


def talk(cfg):
    """--task chat: one answer to --prompt, or a conversation until the input ends."""
    kit, turns = open_kit(cfg), []
    generator = torch.Generator(kit.device).manual_seed(cfg.seed)
    while True:
        asked = cfg.prompt
        if asked is None:
            try:
                asked = input("> " if sys.stdin.isatty() else "")
            except EOFError:
                return 0
        turns.append({"role": "user", "content": asked})
        row = {"messages": [*turns, {"role": "assistant", "content": ""}]}
        while len(kit.text.asked(row)) > kit.asking() and len(turns) > 2:
            turns = turns[2:]                       # an overfull context forgets its oldest exchange
            row = {"messages": row["messages"][2:]}
        said = evaluate.answer(kit, [kit.asked(row)], temperature=cfg.temperature, top_k=cfg.top_k,
                               top_p=cfg.top_p, generator=generator)[0]
        say(said)
        if cfg.prompt is not None:
            return 0
        turns.append({"role": "assistant", "content": said})


def probe(kit, cfg, feed, steps=4):
    """For --task check: (what would learn, seconds, tokens) of a few real steps after the first."""
    learn, seconds, tokens = build(kit, cfg), 0.0, 0
    optimiser = torch.optim.AdamW(param_groups(kit, cfg, learn))
    kit.train()
    for step in range(steps):
        began, parts = time.monotonic(), feed(step)
        for part in parts:
            with kit.cast():
                objective(kit, cfg, part, kit.past()).backward()
        optimiser.step()
        next(iter(learn.values())).sum().item()             # a GPU computes behind our back: wait for it
        optimiser.zero_grad(set_to_none=True)
        if step:
            seconds, tokens = seconds + time.monotonic() - began, tokens + sum(map(size, sum(parts, [])))
    return learn, seconds, tokens


def both_sides(cfg):
    """A kit, and the parts that its model plays in --task show: as it was before, as it is tuned now."""
    kit = open_kit(cfg)
    sides = {"base": role(kit, kit.model)}
    if lora.adapters(kit.model) or kit.prompt is not None:
        sides["tuned"] = tuned(kit, kit.model, kit.prompt)
    return kit, sides


def merge(cfg):
    """--task merge: an adapter run as a plain Hugging Face folder, fp32; says the largest logit change."""
    if not cfg.out or os.path.exists(cfg.out) and os.listdir(cfg.out):
        raise UserError("--task merge needs --out FOLDER, one that is new or empty"
                        + f"; {cfg.out} is not" * bool(cfg.out))
    model, prompt, tokenizer = load(cfg.init)
    if prompt is not None:
        raise UserError(f"--init {cfg.init} is a soft prompt: it has no weights that could be merged")
    if not lora.adapters(model):
        raise UserError(f"--init {cfg.init} has no adapter that could be merged")
    merged = lora.merge(model)
    x = torch.arange(min(64, model.config.vocab_size, model.config.block_size))[None]
    with torch.no_grad():
        gap = (model(x)[0] - merged(x)[0]).abs().max().item()
    merged.save_pretrained(cfg.out)
    tokenizer.save_pretrained(cfg.out)
    write_json(os.path.join(cfg.out, "run.json"), {k: v for k, v in settings(cfg.init).items()
        if k in ("task", "template", "system", "labels", "ask", "by", "attention", "objective")})
    if (head := weights_folder(cfg.init) / "head.safetensors").exists():
        write_tensors(os.path.join(cfg.out, head.name), read_tensors(head))
    say(f"largest logit difference after merging: {gap:.2g}")
    say(f"python train.py --task {'eval' if head.exists() else 'chat'} --init {cfg.out}")
    return 0


def main(argv=None):
    """The command. Returns the exit code; a mistake of the user is one sentence on stderr."""
    cfg = None
    try:
        distributed.start()
        with guard.installed():
            cfg = parse(sys.argv[1:] if argv is None else argv)
            if world.size > 1 and cfg.task in ("chat", "show", "merge", "check", "table"):
                raise UserError(f"--task {cfg.task} is work for one process: leave torchrun out")
            if cfg.task == "show":
                return show(*both_sides(cfg), cfg)
            if cfg.task == "check":
                return examine(cfg, open_kit, probe)
            if cfg.task == "ppo" and (cfg.init, cfg.reward) == ("data/base", None):
                return stages(cfg)
            others = {"chat": talk, "merge": merge, "sample": draw, "ppo": reinforce, "table": tables.show}
            return others.get(cfg.task, supervised)(cfg)
    except UserError as e:
        if distributed.first(str(e)):
            note(f"train.py: {e}", world.rank)
        return e.code
    except Interrupted:
        if cfg is None or cfg.task not in flags.TRAIN + ("sample", "eval") or cfg.dry_run:
            return 128 + guard.pending              # there was nothing to save
        note("train.py: interrupted; the same command goes on from where it last saved")
        with contextlib.suppress(distributed.Lost):
            distributed.meet()                      # whoever leaves early has the others killed
        return 75
    except Exception as e:
        if not distributed.first(f"{type(e).__name__}: {e}".split("\n")[0]):
            return 1                                # what fails here is that another process has ended
        if "out of memory" not in str(e) and "can't allocate memory" not in str(e):
            raise                                   # torch.OutOfMemoryError says the one, a CPU the other
        note(f"train.py: out of memory ({str(e).splitlines()[0][:120]}); a lower --micro or --block, and "
             "--checkpoint, need less", world.rank)
        return 1


if __name__ == "__main__":
    code = main()
    if code in (0, 75):                             # nccl would wait for a process that is gone
        distributed.end()
    sys.exit(code)
