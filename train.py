"""train.py: the command. One objective (--task) times one choice of what learns (--method), a folder per run.

    python train.py --method lora                                LoRA, the toy world, the shipped base model
    python train.py --task classify --data FILE --init FOLDER    your data, a real model
    for r in 1 2 4 8; do python train.py --method lora --rank $r; done

    loss of a step = sum over supervised tokens of -log p(token | before) / their number in the whole step

A step is `--batch` examples, cut into micro-batches of at most `--micro` padded tokens; as the division is by
the count of the whole step, the cut does not change the gradient. What is random in step t is a function of
(seed, t), the order of data one of (seed, epoch): a run that is killed and continued ends in the same bits.

The folder (out/<task>-<method>[-flags that are not defaults]-s<seed>) holds config.json, log.jsonl, state.pt,
the weights as adapter/ (peft's format) or model/ (transformers'), and, last of all, result.json. The same
command again prints a finished run's result, continues an interrupted one, refuses another one's folder.
stdout: results; stderr: progress. Exit: 0 done, 1 unexpected, 2 usage, 65 bad data, 75 interrupted and saved.

Public: main, Config, load
"""
import argparse
import contextlib
import dataclasses
import difflib
import hashlib
import json
import math
import os
import pathlib
import sys
import time
from dataclasses import dataclass, field

import torch
import torch.nn as nn
from tqdm import tqdm

import lora
import prompts
from data import chat, evaluate, formats
from data.examples import Feed, Text, targets
from data.files import DataError, UserError, read_json, read_tensors, write_json, write_tensors
from data.folders import base_of, bottom_of, portable, settings, weights_folder
from data.hf import read_config
from data.machine import peak_memory_mb, pick_device, pick_dtype
from data.report import describe, report
from data.runs import Interrupted, Run, RunError, guard, note, say
from data.tokenizer import Tokenizer
from model import GPT, GPTConfig

ROOT = pathlib.Path(__file__).resolve().parent

# ------------------------------------------------------------------------------------------------------ flags

TASKS = ("sft", "pretrain", "classify", "eval", "chat", "merge")
METHODS = ("lora", "adalora", "ia3", "prompt", "ptuning", "prefix", "ptuning2", "full", "none")
TRAIN, TEXT = ("sft", "pretrain", "classify"), ("sft", "classify", "eval", "chat")
LORA, SOFT = METHODS[:3], METHODS[3:7]                  # methods that inject; methods that are a past
LEARN = METHODS[:8]
ROLES = {"the run": (TASKS, METHODS), "training": (TRAIN, LEARN), "text": (TEXT, METHODS),
         "LoRA": (TRAIN, LORA), "virtual tokens": (TRAIN, SOFT), "classify": (("classify",), METHODS),
         "generation": (("chat",), METHODS), "a new model, --init new": (("pretrain",), METHODS)}


def opt(group, default, help, tasks=None, methods=None, type=None, choices=None):
    """A flag: its default, its line of help, and the tasks and methods that read it. Others do not see it."""
    return field(default=default, metadata=dict(
        group=group, help=help, tasks=tasks or ROLES[group][0], methods=methods or ROLES[group][1],
        type=type or default.__class__, choices=choices))


@dataclass(frozen=True)
class Config:
    """Everything a run is told: flag = field = JSON key, read-only."""
    task: str = opt("the run", "sft", "the objective", choices=TASKS)
    method: str = opt("the run", "lora", "which parameters learn", choices=METHODS)
    init: str = opt("the run", "data/base", "a model, adapter or run folder, a cached model, or new")
    data: str = opt("the run", "toy", "a file, a folder of train/valid/test files, or toy/NAME",
                    TRAIN + ("eval",))
    out: str = opt("the run", None, "the run folder; default: a readable name in out/",
                   TRAIN + ("eval", "merge"), type=str)
    seed: int = opt("the run", 1, "of initialisation, data order, dropout and sampling")
    device: str = opt("the run", "auto", "auto, cpu, cuda, cuda:1, mps")
    dtype: str = opt("the run", "auto", "precision of the arithmetic; what learns is stored in fp32",
                     choices=("auto", "fp32", "bf16", "fp16"))
    fresh: bool = opt("the run", False, "start over: delete what the run folder holds", TRAIN + ("eval",))
    dry_run: bool = opt("the run", False, "print sizes and two rendered examples, then stop", TRAIN, LEARN)

    steps: int = opt("training", None, "optimiser steps; overrides --epochs", type=int)
    epochs: float = opt("training", 6.0, "passes over the training data")
    batch: int = opt("training", 16, "examples per optimiser step")
    micro: int = opt("training", 4096, "padded tokens per micro-batch: memory, not mathematics",
                     TRAIN + ("eval",), METHODS)
    lr: float = opt("training", 1e-3, "peak learning rate; the wider the model, the lower")
    warmup: float = opt("training", 0.05, "share of the steps in which the rate rises")
    schedule: str = opt("training", "cosine", "after warm-up", choices=("cosine", "linear", "constant"))
    min_lr: float = opt("training", 0.0, "where the schedule ends, as a share of --lr")
    beta2: float = opt("training", 0.999, "AdamW's second moment")
    weight_decay: float = opt("training", 0.0, "AdamW's decay, of matrices only", methods=("full",) + LORA)
    clip: float = opt("training", 1.0, "largest gradient norm; 0: no clipping")
    checkpoint: bool = opt("training", False, "recompute activations in backward: less memory, more time")
    eval_every: int = opt("training", 0, "steps between evaluations on valid; 0: three in the run")
    save_every: int = opt("training", 100, "steps between saves of state.pt")
    forget: str = opt("training", "toy/corpus", "held-out text for the forgetting metric; none: skip it")

    rank: int = opt("LoRA", 8, "r, the width of the bottleneck", methods=("lora", "adalora"))
    alpha: float = opt("LoRA", 16.0, "the delta is scaled by alpha / rank", methods=("lora", "adalora"))
    dropout: float = opt("LoRA", 0.0, "on the adapter's input", methods=("lora", "adalora"))
    targets: str = opt("LoRA", "q,v", "which Linears: q k v o up gate down head")
    layers: str = opt("LoRA", None, "which layers, as 0-3,5; default: all", type=str)
    rank_map: str = opt("LoRA", None, "other ranks by word or path, as down=16,blocks.0.attn.q=2",
                        methods=("lora", "adalora"), type=str)
    rslora: bool = opt("LoRA", False, "scale by alpha / sqrt(rank)", methods=("lora",))
    dora: bool = opt("LoRA", False, "learn magnitude and direction apart", methods=("lora",))
    pissa: bool = opt("LoRA", False, "start from the principal part of each weight", methods=("lora",))
    lora_plus: float = opt("LoRA", 1.0, "B learns this many times faster than A", methods=("lora",))
    quant: str = opt("LoRA", "none", "store the frozen base in fewer bits", choices=("none", "int8", "nf4"))
    double_quant: bool = opt("LoRA", False, "quantise the blocks' scales as well")
    target_rank: int = opt("LoRA", 4, "mean rank that pruning ends at", methods=("adalora",))
    orth: float = opt("LoRA", 0.1, "weight of the orthogonality term", methods=("adalora",))
    prune_start: float = opt("LoRA", 0.2, "share of the steps before pruning", methods=("adalora",))
    prune_end: float = opt("LoRA", 0.3, "share of the steps after it", methods=("adalora",))
    prune_every: int = opt("LoRA", 10, "steps between prunings", methods=("adalora",))

    n_virtual: int = opt("virtual tokens", 20, "how many")
    start: str = opt("virtual tokens", None, "embeddings start from vocab (default), text, labels or random; "
                     "keys and values from text (default), zero, random or gated", type=str,
                     choices=("vocab", "text", "labels", "random", "zero", "gated"))
    start_text: str = opt("virtual tokens", None, "the words for --start; default: common tokens", type=str)
    place: str = opt("virtual tokens", None, 'a template, as "{p:3} {prompt} {p:3}"; default: in front',
                     methods=("prompt", "ptuning"), type=str)
    encoder: str = opt("virtual tokens", "mlp", "what the embeddings go through", methods=("ptuning",),
                       choices=("mlp", "lstm"))
    hidden: int = opt("virtual tokens", None, "the encoder's width; default: the model's, 512 for prefix",
                      methods=("ptuning", "prefix"), type=int)
    prefix_dropout: float = opt("virtual tokens", 0.0, "on keys and values", methods=("ptuning2",))

    by: str = opt("classify", "words", "answer with a label word, or use a linear head",
                  choices=("words", "head"))
    ask: str = opt("classify", None, "the question behind each text; default: one that names the labels",
                   type=str)

    template: str = opt("text", "auto", "chat template", choices=("auto",) + chat.TEMPLATES)
    system: str = opt("text", None, "system message; default: the template's own", type=str)
    block: int = opt("text", None, "longest example in tokens; default: the context, at most 1024",
                     TRAIN + ("eval",), type=int)
    too_long: str = opt("text", "truncate", "what to do with longer ones", ("sft", "classify", "eval"),
                        choices=("truncate", "drop", "error"))
    shots: int = opt("text", 0, "solved training examples in front of each question",
                     ("sft", "classify", "eval"), ("none",))
    items: int = opt("text", 0, "measure on the first N test items; 0: on all", TRAIN + ("eval",))
    max_new: int = opt("text", 64, "longest generated answer, in tokens", ("sft", "eval", "chat"))

    n_layer: int = opt("a new model, --init new", 4, "layers")
    n_head: int = opt("a new model, --init new", 4, "heads")
    n_embd: int = opt("a new model, --init new", 128, "width")
    family: str = opt("a new model, --init new", "gpt2", "dialect", choices=("gpt2", "llama"))
    vocab: int = opt("a new model, --init new", 1024, "size of the tokenizer it gets; 0: bytes")

    prompt: str = opt("generation", None, "answer this and stop; default: a conversation", type=str)
    temperature: float = opt("generation", 0.7, "0 is greedy")
    top_k: int = opt("generation", None, "sample from the k likeliest", type=int)
    top_p: float = opt("generation", None, "sample from the likeliest of this mass", type=float)


# A method's first run must learn. Good rates lie orders of magnitude apart, so each method brings its own.
METHOD_DEFAULTS = {"full": dict(lr=1e-3), "lora": dict(lr=5e-3, targets="q,v,up,down"), "none": {},
                   "adalora": dict(lr=1e-2, targets="q,v,up,down"), "ia3": dict(lr=3e-2, targets="k,v,down"),
                   "prompt": dict(lr=5e-2), "ptuning": dict(lr=3e-3), "prefix": dict(lr=1e-3),
                   "ptuning2": dict(lr=3e-2)}
TASK_DEFAULTS = {"pretrain": dict(method="full", data="toy/corpus", init="new", forget="none", epochs=1.0,
                                  lr=1e-3, min_lr=0.1, beta2=0.99, weight_decay=0.1),
                 "classify": dict(data="toy/sentiment"),
                 **{task: dict(method="none") for task in ("eval", "chat", "merge")}}
NOT_IDENTITY = ("out", "fresh", "dry_run")              # flags that do not change what a run computes


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)


def parse(argv):
    """Flags -> Config. Only what this task and method read exists; for the rest it says whose it is."""
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--task", default="sft", choices=TASKS)
    first.add_argument("--method", choices=METHODS)
    task, method = vars(first.parse_known_args(argv)[0]).values()
    method = method or TASK_DEFAULTS.get(task, {}).get("method", "lora")
    if task not in TRAIN and method != "none":
        raise UserError(f"--task {task} trains nothing, so it takes no --method {method}; leave --method out")
    defaults = {**METHOD_DEFAULTS[method], **TASK_DEFAULTS.get(task, {}), "task": task, "method": method}
    parser = Parser(allow_abbrev=False, usage="python train.py [--task T] [--method M] [flags]",
                    description=f"The flags of --task {task} --method {method}, with its defaults.",
                    formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=26))
    fields, groups = {f.name: f for f in dataclasses.fields(Config)}, {}
    for name, f in fields.items():
        m = f.metadata
        if task not in m["tasks"] or method not in m["methods"]:
            continue
        if m["group"] not in groups:
            groups[m["group"]] = parser.add_argument_group(m["group"])
        value = defaults.get(name, f.default)
        text = m["help"] if value is None or m["type"] is bool else f"{m['help']} (default {value})"
        how = dict(action=argparse.BooleanOptionalAction) if m["type"] is bool else dict(
            type=m["type"], choices=m["choices"], metavar=None if m["choices"] else name.upper())
        groups[m["group"]].add_argument("--" + name, default=value, help=text.replace("%", "%%"), **how)
    values, extra = parser.parse_known_args(argv)
    if extra:
        raise UserError(explain(extra[0], fields, task, method))
    cfg = Config(**vars(values))
    check(cfg)
    return cfg


def explain(word, fields, task, method):
    """One sentence for a flag that is not there: whose it is, or what it may have meant."""
    name = word.split("=")[0].removeprefix("--").removeprefix("no-")
    if not word.startswith("--"):
        return f"{word!r} is not a flag; flags start with -- and take their value behind a space or ="
    if name in fields:
        m = fields[name].metadata
        whose = ("task", m["tasks"]) if task not in m["tasks"] else ("method", m["methods"])
        whose = f"--{whose[0]} {' '.join(whose[1])}"
        return f"--{name} belongs to {whose}; this is --task {task} --method {method}"
    near = difflib.get_close_matches(name, fields, 1)
    return f"--{name} is not a flag" + (f"; did you mean --{near[0]}?" if near else "; see --help")


def check(cfg):
    """What no flag can check alone."""
    least = dict(batch=1, micro=1, rank=1, steps=0, epochs=0, items=0, save_every=1, eval_every=0, block=2,
                 seed=0, max_new=1, shots=0, n_virtual=1, lr=0, clip=0, warmup=0, temperature=0, top_k=1,
                 top_p=0)
    for name, low in least.items():
        value = getattr(cfg, name)
        if value is not None and not low <= value < 2 ** 63:
            raise UserError(f"--{name} {value} is out of range; it starts at {low} and is finite")
    if cfg.init == "new" and cfg.task != "pretrain":
        raise UserError(f"--init new starts from nothing: only --task pretrain can, not --task {cfg.task}")
    if cfg.task == "pretrain" and cfg.init != "new":
        for name in ("n_layer", "n_head", "n_embd", "family", "vocab"):
            if getattr(cfg, name) != Config.__dataclass_fields__[name].default:
                raise UserError(f"--{name} shapes a new model, but --init {cfg.init} brings its own shape")
    if cfg.task == "pretrain" and cfg.init == "new" and cfg.method != "full":
        raise UserError(f"--init new has nothing that --method {cfg.method} could adapt; use --method full")
    if cfg.method in SOFT and cfg.lr < 1e-3:
        note(f"--lr {cfg.lr:g} is small for virtual tokens: they want ten to a hundred times LoRA's rate")


def default_out(cfg):
    """out/<task>-<method>[-flags that are not defaults]-s<seed>: readable, the same for the same command."""
    standard, parts = parse(["--task", cfg.task, "--method", cfg.method]), [cfg.task, cfg.method]
    for name, value in dataclasses.asdict(cfg).items():
        if value != getattr(standard, name) and name not in ("task", "method", "seed", *NOT_IDENTITY):
            text = str(value).rstrip("/").split("/")[-1] if name in ("init", "data") else str(value)
            plain = len(text) <= 24 and all(c.isalnum() or c in "._,+-=" for c in text)
            parts.append(name + (text if plain else hashlib.sha256(text.encode()).hexdigest()[:8]))
    return os.path.join("out", "-".join(parts) + f"-s{cfg.seed}")


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
    kind = read_json(folder / "adapter_config.json").get("peft_type", "")
    if kind in ("LORA", "ADALORA", "IA3"):
        lora.load_adapter(model, folder)
    else:
        prompt = prompts.load_prompt(model, folder)
    return model, prompt, tokenizer


def open_kit(cfg):
    """Model, text and machine for a command, as evaluation and training want them."""
    device, why = pick_device(cfg.device)
    said = settings(cfg.init) if cfg.init != "new" else {}
    if cfg.init == "new":
        model, tokenizer = new_model(cfg)
        prompt, width = None, cfg.n_embd
    else:
        width = read_config(bottom_of(cfg.init))["n_embd"]
    dtype, because = pick_dtype(cfg.dtype, device, width)
    if cfg.init != "new":                           # what is frozen is stored in the dtype it computes in
        model, prompt, tokenizer = load(cfg.init, torch.float32 if cfg.method == "full" else dtype)
        if cfg.method != "none" and lora.adapters(model):       # tuned before: that is part of the base now
            model = lora.merge(model).to(model.wte.weight.dtype)
    if tokenizer.vocab_size > model.config.vocab_size:
        sizes = f"its tokenizer has {tokenizer.vocab_size} ids, its model {model.config.vocab_size}"
        raise DataError(f"{cfg.init}: {sizes}; they do not belong together")
    template = cfg.template
    if template == "auto":                          # a new model has seen plain text only
        template = said.get("template") or ("plain" if cfg.init == "new" else chat.guess(tokenizer))
    note(f"{device} ({why}), {str(dtype)[6:]} ({because}), chat template {template}")
    by = said.get("by", "words") if cfg.task == "eval" else cfg.by
    text = Text(tokenizer, template, cfg.system or said.get("system"), tuple(said.get("labels", ())),
                cfg.ask or said.get("ask"), by)
    kit = evaluate.Kit(model.to(device).eval(), text, device, dtype, prompt=prompt, micro=cfg.micro,
                       max_new=cfg.max_new, checkpoint=cfg.checkpoint)
    if prompt is not None and prompt.template:
        text.frame = prompts.place(prompt.template, tokenizer.encode)
    if said.get("by") == "head" and by == "head":
        weight = read_tensors(weights_folder(cfg.init) / "head.safetensors")["score.weight"]
        kit.head = nn.Linear(*reversed(weight.shape), bias=False, device=device)
        kit.head.weight.data.copy_(weight)
    return kit


def new_model(cfg):
    """A tokenizer trained on the data (--vocab 0: bytes), a model of the flagged shape, seeded weights."""
    special = [f"<|{word}|>" for word in "endoftext im_start im_end mask start spare_0 spare_1".split()]
    texts = [row["text"] for row in formats.load(cfg.data, "train").rows]
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
        model.requires_grad_(False)
        learn = {f"prompt.{name}": p.requires_grad_() for name, p in kit.prompt.named_parameters()}
    else:
        model.requires_grad_(False)
        first = dict(n_virtual=cfg.n_virtual, seed=cfg.seed, **({"init": cfg.start} if cfg.start else {}))
        if cfg.start == "labels":
            first["ids"] = [kit.text.tokenizer.encode(label) for label in kit.text.labels]
        elif cfg.start_text:
            first["ids"] = kit.text.tokenizer.encode(cfg.start_text)
        if cfg.method == "prompt":
            kit.prompt = prompts.PromptTuning(model, template=cfg.place, **first)
        elif cfg.method == "ptuning":
            kit.prompt = prompts.PTuning(model, template=cfg.place, encoder=cfg.encoder, hidden=cfg.hidden,
                                         **first)
        elif cfg.method == "prefix":
            kit.prompt = prompts.PrefixTuning(model, hidden=cfg.hidden or 512, **first)
        elif cfg.method == "ptuning2":
            kit.prompt = prompts.PTuningV2(model, dropout=cfg.prefix_dropout, **first)
        if cfg.place:
            kit.text.frame = prompts.place(cfg.place, kit.text.tokenizer.encode)
        learn = {f"prompt.{name}": p for name, p in kit.prompt.to(kit.device).named_parameters()}
    if kit.text.by == "head":
        if kit.head is None:                        # from zero: every label equally likely, nothing to seed
            kit.head = nn.Linear(model.config.n_embd, len(kit.text.labels), bias=False, device=kit.device)
            nn.init.zeros_(kit.head.weight)
        learn["head.score.weight"] = kit.head.weight.requires_grad_()
    return learn


def numbers(text):
    """"down=16,blocks.0.attn.q=2" -> {"down": 16, "blocks.0.attn.q": 2}"""
    try:
        return {name: int(n) for name, n in (part.split("=") for part in text.split(","))} if text else None
    except ValueError:
        raise UserError(f"--rank_map {text} cannot be read; write it as down=16,blocks.0.attn.q=2") from None


def ranges(text):
    """"0-3,5" -> [0, 1, 2, 3, 5]"""
    try:
        ends = [part.split("-") for part in text.split(",")] if text else []
        return [i for e in ends for i in range(int(e[0]), int(e[-1]) + 1)] or None
    except ValueError:
        raise UserError(f"--layers {text} cannot be read; write it as 0-3,5") from None


def param_groups(kit, cfg, learn):
    """Optimiser groups. Decay pulls matrices of the model and of LoRA, never virtual tokens or a head."""
    if cfg.method in LORA:
        groups = lora.param_groups(kit.model, cfg.lr, cfg.lora_plus, cfg.weight_decay)
        learn = {name: p for name, p in learn.items() if name.startswith("head.")}
    else:
        groups = []
    pulled = {name for name, p in learn.items() if p.dim() > 1 and cfg.method == "full"}
    pulled.discard("head.score.weight")
    for decay in (True, False):
        if ps := [p for name, p in learn.items() if (name in pulled) == decay]:
            groups.append(dict(params=ps, lr=cfg.lr, weight_decay=cfg.weight_decay * decay))
    return groups


def save_weights(kit, cfg, folder):
    """The trained weights in other people's formats, what only we know in run.json. Returns their bytes."""
    inner = folder / ("model" if cfg.method == "full" else "adapter")
    inner.mkdir(exist_ok=True)
    if cfg.method == "full":
        kit.model.save_pretrained(inner)
        kit.text.tokenizer.save_pretrained(inner)
    else:
        if kit.prompt is not None:
            prompts.save_prompt(kit.prompt, inner, base=portable(cfg.init))
        else:
            lora.save_adapter(kit.model, inner, base=portable(cfg.init))
    if kit.head is not None:
        write_tensors(inner / "head.safetensors", {"score.weight": kit.head.weight.detach().cpu()})
    beside = read_json(inner / "run.json") if (inner / "run.json").exists() else {}
    said = {name: getattr(kit.text, name) for name in ("template", "system", "labels", "ask", "by")}
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
    return next((what for what, t in named if not t.isfinite().all()), "the loss itself")


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
    now = dict(step=0, tokens=0, seconds=0.0, skipped=0, bad=0)
    if "learn" in state:
        for name, value in state["learn"].items():
            learn[name].data.copy_(value)
        optimiser.load_state_dict(state["optimiser"])
        scaler.load_state_dict(state["scaler"])
        now.update(state["now"])
        if ranks:
            ranks.load_state_dict(state["ranks"])

    def save():
        with guard:
            run.save({**state, "learn": {name: p.detach().cpu() for name, p in learn.items()},
                      "optimiser": optimiser.state_dict(), "scaler": scaler.state_dict(), "now": dict(now),
                      "ranks": ranks.state_dict() if ranks else {}})

    run.rewind(now["step"])
    spoke = time.monotonic()
    every = cfg.eval_every or -(-total // 4)
    bar = tqdm(total=total, initial=now["step"], disable=None, unit="step", mininterval=0.5)
    kit.train()
    try:
        while now["step"] < total:
            step, began = now["step"], time.monotonic()
            torch.manual_seed((cfg.seed * 1_000_003 + step) % 2 ** 63)  # dropout: a function of (seed, step)
            parts = feed(step)
            count, loss, extra = sum(targets(e) for part in parts for e in part), 0.0, {}
            with kit.cast():
                past, finish = kit.past(), None
            if past is not None and len(parts) > 1:                     # one pass through the prompt per step
                past, finish = prompts.cut(past)
            for part in parts:
                with kit.cast():
                    share = evaluate.summed_loss(kit, part, past) / max(count, 1)
                scaler.scale(share).backward()
                loss += share.item()
            if finish:
                finish()
            if ranks:                               # reported apart: the loss stays comparable
                reg = cfg.orth * lora.orthogonality(kit.model)
                scaler.scale(reg).backward()
                extra["orthogonality"] = reg.item()
            scaler.unscale_(optimiser)
            norm = nn.utils.clip_grad_norm_(learn.values(), cfg.clip or math.inf).item()
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
                now["tokens"] += sum(len(ids) for part in parts for ids, _ in part)
                now["skipped"], now["bad"] = now["skipped"] + (not sound), 0 if sound else now["bad"] + 1
            clock = dict(step=step + 1, tokens=now["tokens"], seconds=round(now["seconds"], 3))
            last = step + 1 == total
            if ranks:
                extra.update(ranks.report())
            if (step + 1) % max(1, total // 100) == 0 or last or not sound:
                run.log(event="train", **clock, loss=loss, lr=rate, grad_norm=norm, skipped=now["skipped"],
                        **extra)
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()
            if bar.disable and time.monotonic() - spoke > 5:
                speed = now["tokens"] / now["seconds"]
                note(f"step {step + 1}/{total}  loss {loss:.4f}  {speed:,.0f} tokens/s")
                spoke = time.monotonic()
            if (step + 1) % every == 0 and not last:
                kit.train(False)
                found = evaluate_now()
                kit.train()
                run.log(event="valid", **clock, **found)
                note(f"step {step + 1}/{total}  valid  "
                     + "  ".join(f"{name} {value:.4g}" for name, value in found.items()))
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
    """pretrain, sft, classify; with --method none (and --task eval) the same without learning."""
    told = {name: value for name, value in dataclasses.asdict(cfg).items() if name not in NOT_IDENTITY}
    run = Run(cfg.out or default_out(cfg), told, cfg.fresh)
    if not cfg.dry_run and (done := run.finished()):
        return report(done, run.folder)
    with contextlib.nullcontext() if cfg.dry_run else run.opened():
        kit, rows, kind = open_kit(cfg), *open_data(cfg)
        if kind == "label":
            found = {row["label"] for split in rows.values() for row in split}
            if not found <= set(kit.text.labels):   # a tuned model keeps its own order, and its unused labels
                if kit.head is not None:
                    raise DataError(f"{cfg.data} has the labels {sorted(found)}, but the head of {cfg.init} "
                                    f"knows {list(kit.text.labels)}")
                kit.text.labels = tuple(sorted(found))
        base = sum(p.numel() for p in kit.model.parameters())
        if cfg.dry_run:
            learn = build(kit, cfg)
            few = {"train": [] if kind == "text" else rows["train"][:2]}
            shown = kit.text.split(few, kit.block(cfg.block), cfg.too_long)["train"]
            return describe(kit, learn, base, shown)
        data_sha256 = hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
        state = run.start(dict(device=str(kit.device), dtype=str(kit.dtype)[6:], template=kit.text.template,
                               data_sha256=data_sha256, base_sha256=evaluate.fingerprint(kit.model))) or {}
        test, shots = rows["test"], rows["train"][:cfg.shots]
        if "baseline" not in state:
            examples = kit.text.split({"test": test}, kit.block(cfg.block), cfg.too_long)["test"]
            found, said = evaluate.measure(kit, test, examples, shots)
            state = {"baseline": found, "before": said[:3]}
            run.rewind(-1)
            run.log(event="baseline", step=0, tokens=0, seconds=0.0, **found)
        now, learn, weights = dict(step=0, tokens=0, seconds=0.0, skipped=0), {}, 0
        after, found = state["before"], dict(state["baseline"])
        if cfg.method != "none":
            general = [] if cfg.forget == "none" else formats.load(cfg.forget, "valid").rows[:100]
            room = kit.room() - (cfg.n_virtual if cfg.method in SOFT else 0)    # before and after alike
            general = kit.text.split({"valid": general}, min(256, room))["valid"]
            state.setdefault("general", evaluate.mean_loss(kit, general)[0])
            learn = build(kit, cfg)
            block = kit.block(cfg.block)
            examples = kit.text.split(rows, block, cfg.too_long)
            feed = Feed(examples["train"], cfg.batch, cfg.micro, cfg.seed, block if kind == "text" else None)
            total = math.ceil(cfg.epochs * feed.per_epoch) if cfg.steps is None else cfg.steps
            note(f"{sum(p.numel() for p in learn.values()):,} of {base:,} parameters learn; {total} steps")
            now = fit(kit, cfg, run, learn, feed, total, state,
                      lambda: evaluate.measure(kit, rows["valid"], examples["valid"])[0])
            if kit.prompt is not None:
                kit.prompt.fold()                   # what an encoder was for ends with the training
            found, said = evaluate.measure(kit, test, examples["test"])
            after = said[:3]
            if general:
                found["forgetting"] = evaluate.mean_loss(kit, general)[0] - state["general"]
        with guard:
            if learn:
                weights = save_weights(kit, cfg, run.folder)
            samples = [dict(prompt=kit.text.turns(row)[-2]["content"], wanted=kit.text.wanted(row)[0],
                            before=b, after=a) for row, b, a in zip(test, state["before"], after)]
            clock = dict(step=now["step"], tokens=now["tokens"], seconds=round(now["seconds"], 3))
            run.log(event="test", **clock, **found)
            result = dict(
                status="done", **{name: told[name] for name in ("task", "method", "init", "data", "seed")},
                metrics=found, baseline_metrics=state["baseline"], params_total=base,
                params_trainable=sum(p.numel() for p in learn.values()), adapter_bytes=weights,
                steps=now["step"], skipped=now["skipped"], tokens=now["tokens"], seconds=clock["seconds"],
                tokens_per_second=round(now["tokens"] / max(now["seconds"], 1e-9)), samples=samples,
                peak_memory_mb=peak_memory_mb(kit.device))
            run.finish(result)
    return report(result, run.folder)


def open_data(cfg):
    """({split: rows}, kind) of --data, fit for the task."""
    data = {split: formats.load(cfg.data, split) for split in ("train", "valid", "test")}
    rows, kind = {split: d.rows for split, d in data.items()}, data["train"].kind
    said = [f"{len(r)} {split}" for split, r in rows.items()]
    said += [f"{n} dropped {why}" for why, n in data["train"].dropped.items()]
    note(f"{data['train'].source}, {data['train'].form or kind}: {', '.join(said)}")
    reads = {"pretrain": ("text",), "classify": ("label",), "sft": ("chat", "label")}
    reads = reads.get(cfg.task, ("chat", "label", "text"))
    if kind not in reads:
        raise DataError(f"{cfg.data} holds {kind} rows; --task {cfg.task} reads {' or '.join(reads)} rows")
    if shared := formats.leaks(rows["train"], rows["test"]):
        note(f"{shared} test rows are in the training split, too: the test flatters")
    rows["test"] = rows["test"][:cfg.items or None]
    rows["valid"] = rows["valid"][:100]             # a look at progress; results come from test
    return rows, kind


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
        ids = kit.text.asked({"messages": [*turns, {"role": "assistant", "content": ""}]})
        while len(ids) > kit.room() - 1 and len(turns) > 2:
            turns = turns[2:]                       # an overfull context forgets its oldest exchange
            ids = kit.text.asked({"messages": [*turns, {"role": "assistant", "content": ""}]})
        said = evaluate.answer(kit, [ids[-(kit.room() - 1):]], temperature=cfg.temperature, top_k=cfg.top_k,
                               top_p=cfg.top_p, generator=generator)[0]
        say(said)
        if cfg.prompt is not None:
            return 0
        turns.append({"role": "assistant", "content": said})


def merge(cfg):
    """--task merge: an adapter run as a plain Hugging Face folder, fp32; says the largest logit change."""
    if not cfg.out or os.path.exists(cfg.out) and os.listdir(cfg.out):
        raise UserError(f"--task merge needs an --out FOLDER that is new or empty, not {cfg.out}")
    model, prompt, tokenizer = load(cfg.init)
    if prompt is not None:
        raise UserError(f"--init {cfg.init} is a soft prompt: it has no weights that could be merged")
    merged = lora.merge(model)
    x = torch.arange(min(64, model.config.vocab_size))[None]
    with torch.no_grad():
        gap = (model(x)[0] - merged(x)[0]).abs().max().item()
    merged.save_pretrained(cfg.out)
    tokenizer.save_pretrained(cfg.out)
    write_json(os.path.join(cfg.out, "run.json"), {k: v for k, v in settings(cfg.init).items()
                                                   if k in ("template", "system", "labels", "ask")})
    say(f"largest logit difference after merging: {gap:.2g}")
    say(f"python train.py --task chat --init {cfg.out}")
    return 0


def main(argv=None):
    """The command. Returns the exit code; a mistake of the user is one sentence on stderr."""
    try:
        with guard.installed():
            cfg = parse(sys.argv[1:] if argv is None else argv)
            if cfg.task == "chat":
                return talk(cfg)
            if cfg.task == "merge":
                return merge(cfg)
            return supervised(cfg)
    except UserError as e:
        note(f"train.py: {e}")
        return e.code
    except Interrupted:
        note("train.py: interrupted and saved; the same command goes on from here")
        return 75
    except RuntimeError as e:                       # torch.OutOfMemoryError is one, and so is the CPU's
        if "out of memory" not in str(e) and "can't allocate memory" not in str(e):
            raise
        note(f"train.py: out of memory ({str(e).splitlines()[0][:120]}); a lower --micro or --block, and "
             "--checkpoint, need less")
        return 1


if __name__ == "__main__":
    sys.exit(main())
