"""train.py: the command. An objective (--task) times what is trained (--method), a folder per run.

    python train.py --method lora                                LoRA, the toy world, the shipped base model
    python train.py --task classify --data FILE --init FOLDER    your data, a real model
    for r in 1 2 4 8; do python train.py --method lora --rank $r; done

    loss of a step = sum over supervised tokens of -log p(token | before) / their number in the whole step

A step is `--batch` examples, cut into micro-batches of at most `--micro_batch_tokens` padded tokens; the loss
is divided by the count of the whole step, so the cut does not change the gradient. The random numbers of step
t are a function of (seed, t), the order of data of (seed, epoch): a run that is killed and continued ends in
the same bits. Processes of torchrun share its steps and end in the same weights
(data/runtime/distributed.py).

Read `train_loop` first. A task is one record at the end of this file, an optimiser or a schedule one above the
loop; a method is one in lora.py or prompts.py (`full` and `none` here), an RL algorithm or a preference
loss one in ppo.py. Flags, --help, saving, loading and tables read the records.

The folder (out/<task>-<method>[-flags that are not defaults]-s<seed>) holds config.json, log.jsonl, state.pt,
the weights as adapter/ (peft's format) or model/ (transformers'), and, last of all, result.json. The same
command again prints a finished run's result and continues an interrupted one; if the code, data, base or
reward of a run have changed, it is moved aside and starts anew (data/runtime/run_folder.py).
stdout: results; stderr: progress. Exit codes: 0 done, 1 unexpected, 2 usage, 65 bad data, 74 cannot write,
75 interrupted: the same command goes on.

Public: main, load, parse, TASKS, METHODS, OPTIMIZERS, SCHEDULES
"""
import os
import signal

if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:   # until `defer_signals` takes over, Ctrl-C ends it
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")     # before torch is loaded: see data/runtime/device.py

import contextlib
import copy
import json
import math
import pathlib
import shlex
import sys
import time
from dataclasses import dataclass, field, replace
from typing import Callable, NamedTuple

import torch
import torch.nn as nn

import lora
import ppo
import prompts
from data import toy
from data.batches import batching, few_shot, objectives
from data.batches.examples import (BlockFlags, ClassifyFlags, Feed, Ranking, Text, TextFlags, Thumbs,
                                   TooLongFlags, size, targets, training_facts)
from data.batches.few_shot import ShotFlags
from data.batches.objectives import AttentionFlags, ObjectiveFlags, RawTextFlags
from data.batches.row_types import as_thumbs, distinct, mismatched
from data.checkpoints.hf import FAMILIES, read_config, save_generation
from data.checkpoints.model_folders import (base_of, find, folders, hash_folder, portable, read_head,
                                            root_model, settings, weights_folder)
from data.checkpoints.peft import read_adapter_config
from data.checkpoints.safetensors import write_tensors
from data.results import (conversation, cost_model, evaluate, forecast, inspect_data, next_token, predict,
                          reward_models, shot_ladder, tables, untrained)
from data.results.best import Best, KeepBestFlags, check_metric
from data.results.cost_model import count_numbers
from data.results.evaluate import AnswerFlags, EvalFlags, MicroBatchFlags
from data.results.generations import GenerationsFlags, evaluate_generations, require_answers
from data.results.inspect_data import CheckFlags
from data.results.metrics import main_metric
from data.results.next_token import GenerationFlags
from data.results.layout import join_parts, wrapped
from data.results.pass_at_k import generations_of, is_right_or_wrong, metrics_of
from data.results.ppo_metrics import describe as rollout_report
from data.results.ppo_metrics import (brief, health, health_line, new_warnings, preference_report,
                                     reward_report)
from data.results.report import (describe_plan, describe_virtual_tokens, print_virtual_tokens, prompt_text,
                                 report)
from data.results.trunk import Trunk, bytes_per_token, count_tokens, memory_limit
from data.runtime import cache, command, distributed
from data.runtime.baselines import remembered
from data.runtime.code_hash import code_hashes, function_hashes, hash_json
from data.runtime.device import MICRO, compiles, peak_memory_mb, pick_device, pick_dtype, pick_threads
from data.runtime.distributed import dist_state
from data.runtime.files import DataError, UserError, atomic_folder, read_json, write_atomic, write_json
from data.runtime.flags import Config, Parser, default_out, fields_of, flag, parse_layers, path_type
from data.runtime.progress import Progress
from data.runtime.records import find_record
from data.runtime.run_files import read_run_config
from data.runtime.run_folder import (Interrupted, Run, RunError, RunFolderFlags, defer_signals, log_progress,
                                     print_result)
from data.runtime.user_functions import is_function, no_such_reward, split_words, target
from data.text import chat, formats
from data.text.tokenizer import Tokenizer
from model import GPT, GPTConfig


# ------------------------------------------------------------------------------------------------------ flags
# Each group is read by the functions of this file; the records of tasks below say which groups a task has.

DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def dtype_name(word):
    """torch's names of dtypes are accepted, too."""
    return DTYPES.get(word, word)


@dataclass(frozen=True)
class CommonFlags:
    """the run"""
    task: str = flag("sft", "the objective", choices=lambda: names(TASKS))
    method: str = flag("lora", "which parameters are trained", choices=lambda: names(METHODS))
    init: str = flag("data/base", "a model, adapter or run folder, a fetched model, or new", type=path_type)
    seed: int = flag(1, "of initialisation, data order, dropout and sampling", low=0)
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps")
    dtype: str = flag("auto", "precision of the arithmetic; trainable parameters are stored in fp32",
                      type=dtype_name, choices=("auto", "fp32", "tf32", "bf16", "fp16"))
    threads: int = flag(0, "CPU threads; 0: one for a small model, every core for others", low=0,
                        identity=False)


@dataclass(frozen=True)
class DataFlags:
    """the run"""
    data: str = flag("toy", "a file, a folder of train/valid/test files, a fetched data set, or toy/NAME",
                     type=path_type)


@dataclass(frozen=True)
class MeasuredDataFlags:
    """the run"""
    data: str = flag("toy", "what to measure on, as for training; of a run its own data, otherwise",
                     type=path_type)


@dataclass(frozen=True)
class DryRunFlags:
    """the run"""
    dry_run: bool = flag(False, "print sizes, two rendered examples and the time, then stop", identity=False)


@dataclass(frozen=True)
class TrainingFlags:
    """training"""
    steps: int = flag(None, "optimiser steps; overrides --epochs", type=int, low=0)
    epochs: float = flag(6.0, "passes over the training data", low=0)
    batch: int = flag(16, "examples per optimiser step", low=1)
    optimizer: str = flag("adamw", "what updates the parameters", choices=lambda: names(OPTIMIZERS))
    lr: float = flag(1e-3, "peak learning rate; the wider the model, the lower", low=0)
    warmup: float = flag(0.05, "share of the steps in which the rate rises", low=0, high=1)
    schedule: str = flag("cosine", "the rate after warm-up", choices=lambda: names(SCHEDULES))
    min_lr_ratio: float = flag(0.0, "where the schedule ends, as a share of --lr", low=0, high=1)
    grad_clip: float = flag(1.0, "largest gradient norm; 0: no clipping", low=0)
    gradient_checkpointing: bool = flag(False, "recompute activations in backward: less memory, more time")
    compile: bool = flag(False, "training forward and backward through torch.compile")
    eval_every: int = flag(0, "steps between evaluations on valid, with one at the end; 0: at most four",
                           low=0)

    @staticmethod
    def check(cfg):
        if cfg.min_lr_ratio and not find_record(SCHEDULES, cfg.schedule).decays:
            raise UserError(f"--min_lr_ratio {cfg.min_lr_ratio} is where a rate ends that falls, and --schedule "
                            f"{cfg.schedule} keeps it; leave one of them out")


@dataclass(frozen=True)
class SaveFlags:
    """training"""
    save_every: int = flag(100, "steps between saves of state.pt", low=1, identity=False)
    forgetting_data: str = flag("toy/corpus", "held-out text to measure forgetting on, or none", type=path_type)


@dataclass(frozen=True)
class AdamWFlags:
    """training"""
    beta2: float = flag(0.999, "AdamW's second moment", low=0, below=1)


@dataclass(frozen=True)
class ShardFlags:
    """training"""
    shard: bool = flag(False, "split weights, gradients and moments over torchrun's processes",
                       identity=False)

    @staticmethod
    def check(cfg):
        if cfg.compile and cfg.shard:
            raise UserError("--compile and --shard have not been tried together; leave one of them out")


@dataclass(frozen=True)
class NewModelFlags:
    """a new model, --init new"""
    n_layer: int = flag(4, "layers", low=1, high=1000)
    n_head: int = flag(4, "heads", low=1, high=2 ** 16)
    n_embd: int = flag(128, "width", low=1, high=2 ** 16)
    family: str = flag("gpt2", "dialect", choices=lambda: tuple(f.model_type for f in FAMILIES))
    vocab_size: int = flag(1024, "size of the tokenizer it gets; 0: bytes", low=0,
                           high=2 ** 24)

    @staticmethod
    def check(cfg):
        if cfg.init == "new":
            if cfg.method != "full":
                raise UserError(f"--init new has nothing that --method {cfg.method} could adapt; use "
                                "--method full, or --init data/base")
            return
        for name in ("n_layer", "n_head", "n_embd", "family", "vocab_size"):
            if name in cfg.given:
                raise UserError(f"--{name} shapes a new model, but --init {cfg.init} brings its own shape")


@dataclass(frozen=True)
class RewardFlags:
    """reward"""
    reward: str = flag(None, "what scores an answer: a run of --task reward, or module:function, a function "
                       "of the texts of prompt and answer, and of the row if it takes three; or several: "
                       "a:f,b:g", type=str)
    reward_weights: str = flag(None, "a factor for each --reward, of which the score is the sum: 1,0.5",
                               type=str)
    gold_reward: str = flag(None, "module:function that is only measured; default: the toy world's own",
                            type=str)

    @staticmethod
    def check(cfg):
        reward_models.parse_weights(cfg.reward_weights, reward_words(cfg))
        if cfg.gold_reward and len(split_words("gold_reward", cfg.gold_reward)) > 1:
            raise UserError(f"--gold_reward {cfg.gold_reward} names several functions; it takes one, which "
                            "is only measured")


@dataclass(frozen=True)
class PtxFlags:
    """reward"""
    ptx_data: str = flag("toy/corpus", "raw text for --ptx_coef", type=path_type)

    @staticmethod
    def check(cfg):
        if "ptx_data" in cfg.given and not cfg.ptx_coef:
            raise UserError(f"--ptx_data {cfg.ptx_data} is not read without --ptx_coef; give a weight above 0, or "
                            "leave it out")


@dataclass(frozen=True)
class BestAnswersFlags:
    """sampling"""
    best_n: int = flag(1, "best answers to each prompt that are written out", low=1)
    at_least: float = flag(None, "write out no answer that scores less; default: no limit", type=float)

    @staticmethod
    def check(cfg):
        if cfg.best_n > cfg.num_generations:
            raise UserError(f"--best_n {cfg.best_n} is more than --num_generations "
                            f"{cfg.num_generations}, the answers there are")
        if cfg.at_least is not None and not math.isfinite(cfg.at_least):
            raise UserError(f"--at_least {cfg.at_least} must be a finite number")


@dataclass(frozen=True)
class MergeFlags:
    """the run"""
    out: str = flag(None, "the new folder", type=path_type)


def names(records):
    return tuple(record.name for record in records)


def command_line(*words):
    """A command of this program, as it is typed into a shell."""
    return shlex.join(["python", "train.py", *words])


def find_task(name):
    return find_record(TASKS, name)


def find_method(name):
    return find_record(METHODS, name)


def parse(argv):
    """argv -> Config. Raises UserError."""
    cfg = command.parse(argv, PROGRAM)
    if find_task(cfg.task).reads_own_data and "data" not in cfg.given:
        data = setting_of(cfg.init, "data")
        if data is not None:
            log_progress(f"without --data, {cfg.init} is measured on the data of its run, {data}")
            return cfg.replace(data=data)
    return cfg


def defaults_by_init(task, method, init, usual):
    """{flag: default} that depends on --init. usual: the defaults without it."""
    found = {}
    if task.full_lr and method.trains_base:
        found["lr"] = task.full_lr["new" if init == "new" else "existing"]
    if init == "new":
        return found
    if method.trains:
        width = width_of(init)
        if method.rate_falls:
            found["lr"] = rate_at_width(found.get("lr", usual["lr"]), width)
        if "value_lr" in usual:                     # the rate of a critic that is a LoRA
            found["value_lr"] = rate_at_width(usual["value_lr"], width)
    if not reads_toy(init):
        found["forgetting_data"] = "none"
    return found


BASE_WIDTH = 128                                    # of data/base, which the methods' rates suit


def rate_at_width(rate, width):
    """A rate that suits data/base, for a model of another width: rate (128 / width)^0.78, in two digits.

    Schulman et al. 2025 (LoRA Without Regret) fitted the best rates of LoRA on Llama models of all sizes by
    5e-5 * 10 * (2000 / width)^0.781. The same power leads from our rate at width 128 to 1.17 times theirs.
    Which methods need it (`rate_falls` of their records) was measured at width 576, data/results/README.md: LoRA,
    full tuning and prefix tuning do. Narrower models keep the rate.
    """
    if width <= BASE_WIDTH:
        return rate
    return float(f"{rate * (BASE_WIDTH / width) ** 0.78:.2g}")


def width_of(init):
    """The width of a model, adapter or run folder; that of data/base for a folder that cannot be read."""
    try:
        return read_config(root_model(init))["n_embd"]
    except UserError:                               # a folder that cannot be read is reported where it is opened
        return BASE_WIDTH


def reads_toy(init):
    """Whether a model has the vocabulary of data/base, so that text of the toy world is its own kind of text."""
    try:
        roots = [root_model(name) for name in (init, "data/base")]
        if roots[0].resolve() == roots[1].resolve():
            return True
        sizes = [read_config(root)["vocab_size"] for root in roots]
        if sizes[0] != sizes[1]:
            return False
        mine, ours = map(Tokenizer.from_pretrained, roots)
        words = [[tokenizer.decode([i], special=True) for i in range(sizes[0])] for tokenizer in (mine, ours)]
        return words[0] == words[1]
    except UserError:                               # a folder that cannot be read is reported where it is opened
        return True


# ----------------------------------------------------------------------------------------- models and methods

def load(folder, dtype=torch.float32):
    """(model, prompt or None, tokenizer) of any folder that a run, `transformers` or `peft` wrote, in eval
    mode.

    An adapter names its base, which may be an adapter again: that one is merged in here. The head of a
    classifier or reward model is read by `read_head(folder)`. Raises DataError.
    """
    *adapters, plain = folders(folder)
    model = GPT.from_pretrained(plain, torch.float32 if adapters else dtype)
    tokenizer = Tokenizer.from_pretrained(plain)
    prompt = None
    below = plain
    for adapter in reversed(adapters):
        if prompt is not None:
            raise DataError(f"{adapter} stands on {below}, a soft prompt, which cannot be merged into a model")
        model = merged(model).to(dtype if adapter == adapters[0] else torch.float32)
        method = method_of(adapter)
        loaded = method.load(model, adapter, settings(adapter))
        prompt = None if method.mergeable else loaded.eval()
        below = adapter
    return model.eval(), prompt, tokenizer


def merged(model):
    """The model with its adapter, if it has one, folded into the weights."""
    return lora.merge(model) if lora.adapters(model) else model


def method_of(folder):
    """The method that reads an adapter folder. Raises DataError for a peft_type that none reads."""
    peft_type = read_adapter_config(folder).get("peft_type")
    for method in METHODS:
        if peft_type in method.peft_types:
            return method
    known = dict.fromkeys(name for method in METHODS for name in method.peft_types)
    raise DataError(f"{folder}/adapter_config.json: peft_type {peft_type!r} is not read here; "
                    f"{', '.join(known)} are")


def prompt_base(name):
    """The base for training a soft prompt on `name`: the model below if `name` is a soft prompt itself."""
    below = base_of(weights_folder(name))
    if below is None or method_of(weights_folder(name)).mergeable:
        return name
    return below


def open_context(cfg, log=log_progress):
    """Model, tokenizer, template and device of a command, as training and evaluation take them.

    log: a function of a line about them.
    """
    task = find_task(cfg.task)
    device, why = pick_device(cfg.device)
    stored = settings(cfg.init) if cfg.init != "new" else {}
    check_settings(stored, cfg.init)
    made_by = task_of(stored)
    has_label_head = stored.get("classifier") == "head"
    refuse_head(cfg, task, made_by, has_label_head, stored.get("row_type"))
    width = cfg.n_embd if cfg.init == "new" else read_config(root_model(cfg.init))["n_embd"]
    dtype, because = pick_dtype(cfg.dtype, device, width)
    threads, by = pick_threads(cfg.get("threads", 0), width)
    if cfg.get("compile"):
        compiles(device)
    model, prompt, tokenizer = open_model(cfg, dtype)
    template, differs = choose_template(cfg, tokenizer, stored)
    several = f", {dist_state.size} processes" if dist_state.size > 1 else ""
    on_cpu = f", {threads} thread{'s' * (threads > 1)} ({by})" if device.type == "cpu" else ""
    log(f"{device} ({why}){on_cpu}, {str(dtype)[6:]} ({because}), chat template {template}{several}")
    if differs and TextFlags in task.flags:
        log(differs)
    model = place_model(model, cfg, device, dtype)
    text = open_text(cfg, task, tokenizer, template, stored)
    ctx = evaluate.ModelContext(model.eval(), text, device, dtype, prompt=prompt,
                                micro_batch_tokens=cfg.get("micro_batch_tokens", MICRO),
                                max_new_tokens=cfg.get("max_new_tokens", 64),
                                gradient_checkpointing=cfg.get("gradient_checkpointing", False),
                                compile=cfg.get("compile", False))
    if prompt is not None:
        prompt.to(device)
        if prompt.template:
            if not task.reads_templates:            # ppo.py takes ids, and these tokens have none
                raise UserError(f"--init {cfg.init} is a soft prompt inside a template, which --task "
                                f"{cfg.task} cannot use; train it with --prompt_template front")
            text.soft_prompt_ids = prompt.template_ids(tokenizer.encode)
    if made_by and made_by.load_head:
        labels_by_head = has_label_head and text.classifier == "head"
        scores_by_head = made_by.judges and (task.judges or task.measures)
        if labels_by_head or scores_by_head:
            ctx.head = made_by.load_head(cfg.init).to(device)
    if ctx.head is None and cfg.init != "new" and read_head(cfg.init):
        log(f"--init {cfg.init} has a head, which this command does not use")
    return ctx


def refuse_head(cfg, task, made_by, has_label_head, row_type):
    """Raises UserError for a model whose head the task has no use for, and for flags that a head does not read."""
    if task.measures and has_label_head and row_type == "tags":
        unread = sorted(cfg.given & {"template", "system", "max_new_tokens"})
        if unread:
            raise UserError(f"--{unread[0]} means nothing to --init {cfg.init}, whose head tags the words of a text as "
                            "they are; leave it out")
    if made_by and task.generates and (made_by.judges or has_label_head and not task.measures):
        raise UserError(f"--init {cfg.init} is a model of --task {made_by.name}, which scores and does not "
                        "generate; --task eval measures it, and the model below it can generate")


def check_settings(stored, name):
    """DataError unless what run.json of the folder `name` chooses is known."""
    known = {"task": names(TASKS), "template": names(chat.TEMPLATES), "classifier": ("lm", "head"),
             "attention": (*objectives.ATTENTION, "prefix"), "objective": objectives.OBJECTIVES,
             "quant": ("none", *lora.QUANT_TYPES)}
    for key, choices in known.items():
        if stored.get(key) not in (None, *choices):
            raise DataError(f"{weights_folder(name)}/run.json: {key} is {stored[key]!r:.80}; it is one of "
                            f"{' '.join(choices)}")


def task_of(stored):
    """The task that the settings of a folder name, by our name or by peft's; None for a language model."""
    if stored.get("task"):
        return find_task(stored["task"])
    found = [task for task in TASKS if task.peft_task_type and task.peft_task_type == stored.get("task_type")]
    return found[0] if found else None


def open_model(cfg, dtype):
    """(model, prompt or None, tokenizer) of --init; frozen weights are stored as they compute."""
    if cfg.init == "new":
        model, tokenizer = new_model(cfg)
        return model, None, tokenizer
    method = find_method(cfg.method)
    stored_dtype = torch.float32 if method.trains_base else dtype
    # a reward model belongs to the merged model, so --task sample merges
    as_base = method.trains or "reward" in cfg
    tuned_before = as_base and base_of(weights_folder(cfg.init)) is not None
    with Progress(f"loading {cfg.init}"):
        model, prompt, tokenizer = load(cfg.init, torch.float32 if tuned_before else stored_dtype)
    if tuned_before:  # an adapter under the new one is part of the base, as in `load`
        model = merged(model).to(stored_dtype)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise DataError(f"{cfg.init}: its tokenizer has {tokenizer.vocab_size} ids, its model "
                        f"{model.config.vocab_size}; they do not belong together")
    return model, prompt, tokenizer


def place_model(model, cfg, device, dtype):
    """The model on its device, or split over the processes."""
    if not cfg.get("shard"):
        return model.to(device)
    if dist_state.size == 1 or dtype == torch.float16:
        remedy = "start several" if dist_state.size == 1 else "leave --dtype fp16 out"
        raise UserError("--shard splits a model over the processes of torchrun --nproc_per_node N, in fp32 "
                        f"or bf16; {remedy}")
    return distributed.shard(model, device)


def choose_template(cfg, tokenizer, stored):
    """(the name of the chat template, how the model's own differs from it, or "")."""
    template = cfg.get("template", "auto")
    if template != "auto":
        return template, ""
    if stored.get("template") or cfg.init == "new":  # a new model is trained on plain text only
        return stored.get("template") or "plain", ""
    template = chat.guess_template(tokenizer)
    return template, chat.note(template, tokenizer) if chat.fits(template, tokenizer) else ""


def open_text(cfg, task, tokenizer, template, stored):
    """How rows become token ids, from the flags and from what the run of --init was trained with."""
    if task.measures:
        classifier = stored.get("classifier", "lm")
    else:
        classifier = task.classifier or cfg.get("classifier", "lm")
    system = stored.get("system") if cfg.get("system") is None else cfg.system          # "" is an answer
    question = stored.get("question") if cfg.get("question") is None else cfg.question
    attention, objective = objectives.resolve_objective(task, cfg.get("attention"), cfg.get("objective"),
                                                        stored)
    return Text(tokenizer, template, system, tuple(stored.get("labels", ())), question, classifier, attention,
                objective, cfg.get("parse_special", False) or stored.get("parse_special", False))


def new_model(cfg):
    """A tokenizer trained on the data (--vocab_size 0: bytes), a model of the flagged shape."""
    words = ("endoftext im_start im_end mask start begin_of_text start_header_id end_header_id eot_id "
             "spare_0 spare_1")
    special = [f"<|{word}|>" for word in words.split()]
    with Progress("training a tokenizer"):
        texts = [row["text"] for row in formats.load_text(cfg.data, "train")]
        tokenizer = Tokenizer.train(texts, cfg.vocab_size or 256 + len(special), special,
                                    skip_special=cfg.parse_special)
    shape = GPTConfig(tokenizer.vocab_size, cfg.block_size or 256, cfg.n_layer, cfg.n_head, cfg.n_embd,
                      eos=tokenizer.eos).as_family(cfg.family)
    if shape.mlp == "swiglu":                       # three matrices at 8/3 of the width: GPT-2's size
        shape = replace(shape, n_inner=-(-8 * cfg.n_embd // 96) * 32)
    torch.manual_seed(cfg.seed)
    return GPT(shape), tokenizer


def apply_method(ctx, cfg):
    """Freeze, add adapters or a soft prompt, add the task's head. Returns {name: trainable parameter}."""
    method = find_method(cfg.method)
    if ctx.prompt is not None and (method.mergeable or method.trains_base):
        raise UserError(f"--init {cfg.init} is a soft prompt and cannot be merged; start from its base, or "
                        f"continue it by --method {prompts.method_name(ctx.prompt)}")
    trainable = method.apply(ctx, cfg, log_progress)
    task = find_task(cfg.task)
    if ctx.head is None and task.make_head and (task.judges or ctx.text.classifier == "head"):
        ctx.head = task.make_head(ctx, cfg)
    if ctx.head is not None:
        for name, p in ctx.head.named_parameters():
            trainable[f"head.score.{name}"] = p.requires_grad_()
    return trainable


def param_groups(ctx, cfg, trainable):
    """Optimiser groups: the method's, and one for a head. Raises UserError if a parameter is in none."""
    own = {name: p for name, p in trainable.items() if not name.startswith("head.score.")}
    groups = find_method(cfg.method).param_groups(ctx, cfg, own)
    head = [p for name, p in trainable.items() if name not in own]
    if head:                                        # rates that suit virtual tokens would destroy a head
        groups.append(dict(params=head, lr=min(cfg.lr, 0.03), weight_decay=0.0))
    grouped = {id(p) for group in groups for p in group["params"]}
    for name, p in trainable.items():
        if id(p) not in grouped:
            raise UserError(f"{name} is trainable, but --method {cfg.method} puts it in no optimiser group")
    names_of = {id(p): name for name, p in trainable.items()}
    for group in groups:                            # for optimisers that treat some parameters in another way
        group["names"] = [names_of[id(p)] for p in group["params"]]
    return groups


def save_weights(ctx, cfg, folder, rows):
    """The weights trained on rows in standard formats, what only we have a name for in run.json.

    Returns {"adapter_bytes" or, of a whole model, "model_bytes": their size}.
    """
    method = find_method(cfg.method)
    inner = folder / ("model" if method.trains_base else "adapter")
    if method.trains_base:                              # the slices of a whole model come from all processes
        method.save(ctx, inner, None)
    elif not dist_state.rank:
        method.save(ctx, inner, portable(cfg.init if method.mergeable else prompt_base(cfg.init)))
    if dist_state.rank:
        return {}
    if ctx.head is not None:
        write_tensors(inner / "head.safetensors",
                      {f"score.{name}": t.cpu() for name, t in ctx.head.state_dict().items()})
    written = read_json(inner / "run.json") if (inner / "run.json").exists() else {}
    text = {**{name: getattr(ctx.text, name) for name in TEXT_SETTINGS}, **training_facts(ctx.text, rows)}
    if method.trains_base:
        save_text_files(inner, cfg.init, ctx.text.tokenizer, {"task": cfg.task, **text})
    write_json(inner / "run.json", {**written, "task": cfg.task, "method": cfg.method, **text,
                                    **method.run_settings(ctx, cfg)})
    return {f"{inner.name}_bytes": sum(f.stat().st_size for f in inner.iterdir() if f.suffix == ".safetensors")}


def save_text_files(folder, init, tokenizer, stored):
    """Tokenizer, chat template and end tokens: `transformers` writes prompts and stops as in training.

    stored: task, template and system of the run; without a task (another tool's adapter) and for tasks
    without prompts, the files of the base are kept.
    """
    base = None if init == "new" else root_model(init)
    end = None
    has_prompts = {"task", "template"} <= stored.keys()
    if base is not None and has_prompts:
        has_prompts = TextFlags in find_task(stored["task"]).flags
    if has_prompts and chat.fits(stored["template"], tokenizer):
        end = chat.end_token(stored["template"], tokenizer)
        tokenizer = chat.export(stored["template"], tokenizer, stored.get("system"))
    save_generation(folder, end, base)
    tokenizer.save_pretrained(folder)


TEXT_SETTINGS = ("template", "system", "labels", "question", "classifier", "attention", "objective",
                 "parse_special")
TRAINING_FACTS = ("task", "row_type", "turns", "systems")               # of run.json, besides


class FullMethod:
    """--method full: every weight is trained."""
    name = "full"
    selected_by = "method"
    help = "everything"
    rate_falls = True
    flags = ()
    loop_flags = (lora.DecayFlags, ShardFlags)
    defaults = dict(lr=1e-3)
    refuses = {}
    peft_types = ()
    trains = True
    trains_base = True
    mergeable = False
    allocator = None

    def apply(self, ctx, cfg, log):
        distributed.reshard(ctx.model)
        ctx.model.requires_grad_(True)                  # of an adapter's merged base most of it is frozen
        return dict(ctx.model.named_parameters())

    def param_groups(self, ctx, cfg, trainable):
        """Matrices decay; norms and biases do not."""
        matrices = [p for p in trainable.values() if p.dim() > 1]
        others = [p for p in trainable.values() if p.dim() <= 1]
        groups = [dict(params=matrices, lr=cfg.lr, weight_decay=cfg.weight_decay),
                  dict(params=others, lr=cfg.lr, weight_decay=0.0)]
        return [group for group in groups if group["params"]]

    def save(self, ctx, folder, base):
        model = ctx.model
        distributed.reshard(model)  # a gathered root looks like a model that is not sharded
        if distributed.is_sharded(model.wte.weight):
            weights = distributed.collect({name: p.detach() for name, p in model.named_parameters()})
            if dist_state.rank:
                return
            with torch.device("meta"):
                model = GPT(model.config)
            model.load_state_dict({"head.weight": weights["wte.weight"], **weights}, assign=True)
        if not dist_state.rank:
            model.save_pretrained(folder)

    def run_settings(self, ctx, cfg):
        return {}

    def cost(self, cfg, n_layer):
        return dict(kind="full")


class NoneMethod:
    """--method none: nothing is trained, the baseline is measured."""
    name = "none"
    selected_by = "method"
    help = "nothing: a zero-shot or few-shot baseline"
    flags = ()
    loop_flags = ()
    defaults = {}
    refuses = {}
    peft_types = ()
    trains = False
    trains_base = False
    mergeable = False
    allocator = None


FULL = FullMethod()
NONE = NoneMethod()
METHODS = (*lora.METHODS, *prompts.METHODS, FULL, NONE)


# --------------------------------------------------------------------------------- optimisers and schedules

@dataclass(frozen=True)
class Optimizer:
    """What --optimizer names. make(groups, cfg, device) -> a torch optimizer with a state_dict.

    groups: dicts of params, their names, lr and weight_decay; the loop sets group["lr"] at each step.
    """
    name: str
    help: str
    make: Callable
    flags: tuple = ()
    defaults: dict = field(default_factory=dict)
    selected_by = "optimizer"


@dataclass(frozen=True)
class Schedule:
    """What --schedule names. factor(t, cfg), t from 0 to 1 after warm-up -> share of the way down, 1 to 0."""
    name: str
    help: str
    factor: Callable
    decays: bool = True
    flags: tuple = ()
    defaults: dict = field(default_factory=dict)
    selected_by = "schedule"


def make_adamw(groups, cfg, device):
    return torch.optim.AdamW(groups, betas=(0.9, cfg.beta2), fused=device.type != "mps")


def cosine(t, cfg):
    return 0.5 + 0.5 * math.cos(math.pi * t)


def linear(t, cfg):
    return 1 - t


def constant(t, cfg):
    return 1.0


OPTIMIZERS = (
    Optimizer("adamw", "AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101)", make_adamw, flags=(AdamWFlags,)),
)
SCHEDULES = (
    Schedule("cosine", "half a cosine", cosine),
    Schedule("linear", "a straight line", linear),
    Schedule("constant", "no decay", constant, decays=False),
)


def lr_at(step, total, cfg):
    """Linear warm-up, then the schedule down to min_lr_ratio x --lr."""
    warmup = round(cfg.warmup * total)
    if step < warmup:
        return cfg.lr * (step + 1) / (warmup + 1)
    t = (step - warmup) / max(1, total - warmup)
    factor = find_record(SCHEDULES, cfg.schedule).factor(t, cfg)
    return cfg.lr * (cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * factor)


# --------------------------------------------------------------------------------------------------- the loop

@dataclass
class LoopState:
    """What changes from step to step, besides the parameters."""
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    allocator: object               # AdaLoRA's, None for other methods
    lr_scales: list                 # of each optimiser group, relative to --lr
    best: Best                      # --keep_best: the best weights on valid
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    skipped: int = 0                # steps whose loss or gradient was not finite
    skipped_in_a_row: int = 0

    def clock(self):
        return dict(step=self.step, tokens=self.tokens, seconds=round(self.seconds, 3))


def train_loop(ctx, cfg, run, trainable, feed, total, state, evaluate_now):
    """The supervised loop. trainable {name: parameter}; state: what state.pt held; returns the LoopState.

    evaluate_now() gives the metrics on valid. Raises RunError after ten steps in a row that are not finite.
    """
    compute_loss = find_task(cfg.task).loss
    loop = start_loop(ctx, cfg, trainable, total)
    resume(cfg, run, loop, trainable, state)
    say_where(loop.step, total)
    progress = Progress("step", total, loop.step, "steps").start()
    ctx.train()
    try:
        while True:
            step = loop.step
            if evaluation_is_due(cfg, step, total):         # before the step: a resume repeats it
                log_validation(ctx, run, loop, trainable, total, evaluate_now)
            if step == total or loop.best.patience_is_over():
                break
            began = time.monotonic()
            seed_step(cfg.seed, step)
            batch = feed.step_examples(step)
            micro_batches, idle_batches = local_micro_batches(feed, batch, cfg)
            count = max(sum(map(targets, batch)), 1)                        # of the whole step, all processes
            past, finish_prompt = prompt_past(ctx, cfg, micro_batches)      # None without a soft prompt
            micro_batches = prepare_step(ctx, cfg, micro_batches, idle_batches, past)
            seed_rank(cfg.seed, step)
            loss = 0.0
            for micro_batch in micro_batches:
                with ctx.autocast():
                    part = compute_loss(ctx, cfg, micro_batch, past) / count
                loop.scaler.scale(part).backward()
                loss = loss + part.detach()
            for micro_batch in idle_batches:  # sharded: equal numbers of forwards
                with ctx.autocast():
                    (0 * compute_loss(ctx, cfg, micro_batch, past)).backward()
            finish_prompt()
            # gradients in place, too; all processes save when one finds that it is time
            loss, due = distributed.all_reduce(trainable.values(), [float(loss), run.save_is_due()])
            penalty = add_penalty(loop)
            if step == 0:
                require_gradients(cfg, trainable)
            loop.scaler.unscale_(loop.optimizer)
            grad_norm = float(distributed.clip_grad_norm(trainable.values(), cfg.grad_clip or math.inf))
            lr = lr_at(step, total, cfg)
            finite = math.isfinite(loss) and math.isfinite(grad_norm)
            with defer_signals:                                             # no signal between these lines
                if finite:
                    for group, scale in zip(loop.optimizer.param_groups, loop.lr_scales):
                        group["lr"] = lr * scale
                    loop.scaler.step(loop.optimizer)
                    if loop.allocator:
                        loop.allocator.update(step)  # new weights, this step's gradient
                else:
                    stop_after_ten_skipped(ctx, run, loop, trainable)
                loop.scaler.update()
                loop.optimizer.zero_grad(set_to_none=True)
                advance(loop, batch, finite, time.monotonic() - began)
                if loop.step % max(1, total // 100) == 0 or loop.step == total or not finite:
                    run.log(event="train", **loop.clock(), loss=loss, lr=lr, grad_norm=grad_norm,
                            skipped=loop.skipped, **penalty)
            progress.update(note=f"loss {loss:.4f}  {loop.tokens / loop.seconds:,.0f} tokens/s")
            if due or loop.step % cfg.save_every == 0 or loop.step == total:
                save_state(run, loop, trainable, state)
        if loop.step < total:
            stop_early(run, loop, trainable, state)
        return loop
    except Interrupted:
        save_state(run, loop, trainable, state)
        raise
    finally:
        progress.close()
        ctx.train(False)


def start_loop(ctx, cfg, trainable, total):
    """Optimiser, loss scaler and allocator of a run, before its first step."""
    groups = param_groups(ctx, cfg, trainable)
    lr_scales = [group["lr"] / (cfg.lr or 1) for group in groups]
    optimizer = find_record(OPTIMIZERS, cfg.optimizer).make(groups, cfg, ctx.device)
    scaler = torch.amp.GradScaler(ctx.device.type, enabled=ctx.dtype == torch.float16)
    make_allocator = find_method(cfg.method).allocator
    allocator = make_allocator(ctx.model, cfg, total) if make_allocator else None
    distributed.reshard(ctx.model)
    return LoopState(optimizer, scaler, allocator, lr_scales, Best(cfg.keep_best, cfg.patience))


def resume(cfg, run, loop, trainable, state):
    """Go on from state.pt, if it holds steps.

    Raises UserError for other processes than the run began with.
    """
    if "trainable" in state:
        began_with = state["processes"]
        if cfg.get("dropout") and began_with != dist_state.size:
            raise UserError(f"{run.folder} was begun by {began_with} processes, each with its own --dropout: "
                            "continue with as many, or use --fresh to start over")
        for name, value in state["trainable"].items():
            trainable[name].data.copy_(distributed.scatter(trainable[name], value))
        loop.optimizer.load_state_dict(distributed.scatter_state(loop.optimizer, state["optimizer"]))
        loop.scaler.load_state_dict(state["scaler"])
        best = state["best"]
        kept = {name: distributed.scatter(trainable[name], value) for name, value in best["weights"].items()}
        loop.best.load_state_dict({**best, "weights": kept})
        for name in ("trainable", "optimizer", "best"):     # copied; `save_state` takes them anew
            del state[name]
        for name, value in state["counters"].items():
            setattr(loop, name, value)
        if loop.allocator:
            loop.allocator.load_state_dict(state["allocator"])
    run.rewind(loop.step)


def say_where(step, total):
    """A line about a run that does not begin at its beginning."""
    if step:
        log_progress(f"continuing from step {step} of {total}")


def save_state(run, loop, trainable, state):
    """state.pt: all that `resume` needs, beside what the run found before its first step."""
    names = ("step", "tokens", "seconds", "skipped", "skipped_in_a_row")
    counters = {name: getattr(loop, name) for name in names}
    with defer_signals:
        whole = distributed.collect({"trainable": {name: p.detach() for name, p in trainable.items()},
                                     "optimizer": loop.optimizer.state_dict(),
                                     "best": loop.best.state_dict()})
        run.save({**state, **whole, "scaler": loop.scaler.state_dict(), "counters": counters,
                  "processes": dist_state.size,
                  "allocator": loop.allocator.state_dict() if loop.allocator else {}}, **loop.clock())


def step_seed(seed, step):
    return (seed * 1_000_003 + step) % 2 ** 63


def seed_step(seed, step):
    """Dropout of a soft prompt: a function of (seed, step), the same in every process."""
    torch.manual_seed(step_seed(seed, step))


def seed_rank(seed, step):
    """Dropout of adapters: a function of (seed, step, process)."""
    if dist_state.rank:
        torch.manual_seed((step_seed(seed, step) + (dist_state.rank << 40)) % 2 ** 63)


def local_micro_batches(feed, batch, cfg):
    """(this process's micro-batches, those it runs at weight 0 so that sharded forwards agree in number)."""
    shards = distributed.partition(batch, list(map(size, batch)), dist_state.size)
    parts = [feed.micro_batches(shard) for shard in shards]
    own = parts[dist_state.rank]
    missing = max(map(len, parts)) - len(own)
    return own, [batch[:1]] * missing if cfg.get("shard") else []


def prompt_past(ctx, cfg, micro_batches):
    """(the soft prompt's past, what to call after the last backward): P tokens run once a step, not once a
    batch."""
    with ctx.autocast():
        past = ctx.past()
    if past is None or len(micro_batches) < 2:
        return past, lambda: None
    return find_method(cfg.method).detach_past(past)


def prepare_step(ctx, cfg, micro_batches, idle_batches, past):
    """This process's micro-batches, with what a task finds out about the whole step before its first
    gradient."""
    prepare = find_task(cfg.task).prepare_step
    return prepare(ctx, cfg, micro_batches, idle_batches, past) if prepare else micro_batches


def add_penalty(loop):
    """AdaLoRA's orthogonality term: its gradient, and what the log says of it. The loss stays comparable."""
    if not loop.allocator:
        return {}
    penalty = loop.allocator.penalty()
    loop.scaler.scale(penalty).backward()
    return dict(orthogonality=penalty.item(), **loop.allocator.report())


def require_gradients(cfg, trainable):
    """After the first backward. Raises UserError for a trainable parameter that the loss does not reach."""
    if find_method(cfg.method).trains_base:         # a model may have weights that a task does not use
        return
    for name, p in trainable.items():
        if p.grad is None:
            raise UserError(f"{name} is trainable, but the loss of --task {cfg.task} gives it no gradient; "
                            "freeze it, or use it in the forward pass")


def stop_after_ten_skipped(ctx, run, loop, trainable):
    """Before a step is skipped. Raises RunError at the tenth in a row."""
    if loop.skipped_in_a_row == 9:
        raise RunError(f"{run.folder}: 10 steps in a row were not finite, first of all "
                       f"{first_nonfinite(ctx, trainable)}; lower --lr, or use --dtype fp32")


def first_nonfinite(ctx, trainable):
    """The first tensor that is not finite, in words: weights before gradients."""
    named = [("the weight " + name, p) for name, p in [*ctx.model.named_parameters(), *trainable.items()]]
    named += [("the gradient of " + name, p.grad) for name, p in trainable.items() if p.grad is not None]
    for what, t in named:
        if not distributed.full(t).isfinite().all():
            return what
    return "the loss itself"


def advance(loop, batch, finite, seconds):
    """Count a step that is done."""
    loop.step += 1
    loop.tokens += sum(map(size, batch))
    loop.seconds += seconds
    loop.skipped += not finite
    loop.skipped_in_a_row = 0 if finite else loop.skipped_in_a_row + 1


def evaluation_is_due(cfg, step, total):
    """Whether valid is measured before this step, or behind the last one (step == total)."""
    return step > 0 and (step == total or step % forecast.evaluation_interval(cfg, total) == 0)


def log_validation(ctx, run, loop, trainable, total, evaluate_now):
    ctx.train(False)
    with Progress(f"valid at step {loop.step}"):
        metrics = evaluate_now()
    ctx.train()
    with defer_signals:
        if not loop.allocator or loop.allocator.is_pruned(loop.step):   # else the best would have too many ranks
            loop.best.consider(loop.step, metrics, trainable)
    run.log(event="valid", **loop.clock(), **metrics)
    shown = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
    log_progress(f"step {loop.step}/{total}  valid  {shown}")


def stop_early(run, loop, trainable, state):
    """--patience is over: save, so that a resume trains no further."""
    log_progress(f"stopped at step {loop.step}: {loop.best.without_gain} evaluations without gain")
    save_state(run, loop, trainable, state)


# ----------------------------------------------------------------------------------------- the supervised run

def run_supervised(cfg):
    """The tasks that share `train_loop`; with --method none (and --task eval) the same without training."""
    if cfg.get("dry_run"):
        return dry_run(cfg, open_data(cfg))
    data, run, identity = open_run(cfg)
    return report_once(run, identity, lambda: train_and_measure(cfg, run, data, identity))


def train_and_measure(cfg, run, data, identity):
    """Measure, train, measure again, save. Returns the result."""
    ctx = open_context(cfg)
    check_rows(ctx, cfg, data)
    row_type = data.row_type
    rows = drop_equal_answers(ctx, cfg, data.rows)
    task = find_task(cfg.task)
    params_total = count_numbers(ctx.model.parameters())
    if cfg.get("keep_best") is not None and task.baseline_metrics:
        few = rows["valid"][:2]
        cut = cfg.replace(too_long="truncate")              # these two say what is measured, not how well
        examples = encode_rows(ctx, cut, {"valid": few})["valid"]
        require_metric(ctx, cfg, few, prepared(ctx, cfg, examples))
    windows = len(encode_rows(ctx, cfg, {"test": rows["test"]})["test"]) if row_type == "text" else None
    state = run.start(facts_of(ctx, rows, windows)) or {}
    shots = few_shot.parse_shots(cfg.get("shots", "0"), row_type, ctx.text.classifier)
    known = baseline_key(ctx, cfg, identity)
    if "baseline" not in state:
        if windows is not None:
            say_if_few({"test": windows}, "window")
        state = measure_baseline(ctx, cfg, run, rows, shots[0], known)
    outcome = Outcome(dict(state["baseline"]), state["before"], state["item_correct"],
                      state.get("generations", {}))
    loop = None
    trainable = {}
    if find_method(cfg.method).trains:
        loop, trainable, outcome = train(ctx, cfg, run, rows, state, known, params_total)
    elif len(shots) > 1:
        outcome = measure_shots(ctx, cfg, rows, shots, outcome)
    with defer_signals, Progress("saving"):
        stored = save_weights(ctx, cfg, run.folder, rows["train"]) if trainable else {}
        samples = [dict(prompt=prompt_text(ctx.text, row), reference=ctx.text.references(row)[0], before=before,
                        after=after)
                   for row, before, after in zip(rows["test"], state["before"], outcome.answers)]
        counts = dict(params_total=params_total, params_trainable=count_numbers(trainable.values()),
                      **stored)
        return finish(run, ctx, cfg, outcome, state["baseline"], samples, counts, clock_of(loop))


def require_metric(ctx, cfg, rows, examples):
    """Raises UserError unless --keep_best names a metric of these rows of valid."""
    check_metric(cfg.keep_best, find_task(cfg.task).evaluate(ctx, cfg, rows[:2], examples[:2])[0])


@dataclass
class Outcome:
    """What was measured on test: metrics, the first answers as text, "1" or "0" for each item."""
    metrics: dict
    answers: list
    item_correct: str = ""
    generations: dict = field(default_factory=dict)     # of sampled answers, data/results/pass_at_k.py


def clock_of(loop):
    if loop is None:
        return dict(steps=0, tokens=0, seconds=0.0, skipped=0)
    return dict(steps=loop.step, tokens=loop.tokens, seconds=round(loop.seconds, 3), skipped=loop.skipped,
                **loop.best.summary())


def check_rows(ctx, cfg, data):
    """Labels and heads fit the TaskData. Sets the labels of ctx.text. Raises DataError, UserError."""
    rows, row_type, labels = data
    if ctx.head is not None:
        made_by = task_of(settings(cfg.init))
        if row_type not in made_by.reads:
            remedy = "; --task predict labels texts" if row_type == "text" else ""
            raise DataError(f"{cfg.data} holds {row_type} rows; {cfg.init}, a model of --task {made_by.name}, "
                            f"reads {' or '.join(made_by.reads)} rows{remedy}")
    if row_type == "text" and ctx.text.labels and not find_method(cfg.method).trains:
        log_progress(f"{cfg.data} has no labels: the loss of its text is measured; --task predict labels it")
    if cfg.get("num_generations", 1) > 1:
        require_answers(ctx, row_type, "--num_generations")
    if row_type == "chat":
        say_if_answers_are_cut(ctx, cfg, rows["test"])
    if row_type not in ("label", "tags"):
        return
    if not set(labels) <= set(ctx.text.labels):         # a tuned model keeps its order and unused labels
        if ctx.head is not None:
            raise DataError(f"{cfg.data} has the labels {sorted(labels)}, but the head of {cfg.init} "
                            f"knows {list(ctx.text.labels)}; id2label in a config.json beside an adapter of "
                            "peft names its labels")
        ctx.text.labels = labels
    unseen = set(labels) - set(formats.label_names(rows["train"]))
    if unseen and find_method(cfg.method).trains:
        log_progress(f"no training row has the label {', '.join(sorted(unseen))}, which valid or test have")
    if row_type != "label":
        return
    if len(ctx.text.labels) < 2:
        raise DataError(f"{cfg.data} has only the label {labels[0]!r}; classification needs two")
    if len(ctx.text.prompt_ids({"text": "", "label": labels[0]})) >= ctx.block_size(cfg.get("block_size")):
        raise UserError(f"the question that names the {len(labels)} labels of {cfg.data} leaves no "
                        "room for a text; give a shorter --question")


def say_if_answers_are_cut(ctx, cfg, rows):
    """A note about test rows whose answers are all longer than what is generated."""
    limit = cfg.get("max_new_tokens")
    if limit is None:
        return
    shortest = [min(map(ctx.text.tokenizer.encode, ctx.text.references(row)), key=len) for row in rows]
    cut = sum(len(ids) > limit for ids in shortest)
    if cut:
        log_progress(f"{cut} of {len(rows)} answers of test are longer than --max_new_tokens {limit}: what is "
                     "generated ends before, and is no exact match")


def drop_equal_answers(ctx, cfg, rows):
    """{split: rows} without answers that are, as tokens, a better one again: they are no comparison. Raises
    DataError where that leaves no row."""
    block = ctx.block_size(cfg.block_size) if "block_size" in cfg else 0
    kept = {}
    for split, some in rows.items():
        after = [distinct(ctx.text, row, block) for row in some]
        kept[split] = [row for row in after if row is not None]
        changed = [row["line"] for row, new in zip(some, after) if new is not row]
        if changed:
            dropped = len(some) - len(kept[split])
            log_progress(f"{split}: {dropped} rows are dropped, {len(changed) - dropped} lose an answer, because two "
                         f"of their answers are equal as tokens ({changed[0]} is the first)")
        if some and not kept[split]:
            raise DataError(f"0 usable examples in {split}: the answers of all {len(some)} rows are equal as "
                            f"tokens ({changed[0]} is the first); use a larger --block_size if they were cut")
    return kept


def baseline_key(ctx, cfg, identity):
    """All that decides what a base does before training, for data/runtime/baselines.py: no flag of the method
    or of training. None where it is not shared: a new model has a seed, and without training it is the result."""
    if cfg.init == "new" or not find_method(cfg.method).trains:
        return None
    read = fields_of([CommonFlags, *find_task(cfg.task).flags]).keys() - {"seed", "method"}
    flag_values = {name: value for name, value in cfg.identity().items() if name in read}
    machine = [str(ctx.device), str(ctx.dtype), str(ctx.model.wte.weight.dtype), torch.__version__,
               torch.get_num_threads(), dist_state.size, bool(cfg.get("shard"))]
    return [identity, flag_values, machine]


def measure_baseline(ctx, cfg, run, rows, shots, known):
    """What the model does before training, as the first state of a run. known: its baseline_key."""
    state = remembered(run, known, "test before training", lambda: measure_untrained(ctx, cfg, rows, shots))
    task = find_task(cfg.task)
    if task.begin:
        with Progress("before training"):
            state.update(task.begin(ctx, cfg, rows))
    run.log(event="baseline", step=0, tokens=0, seconds=0.0, **state["baseline"])
    return state


def measure_untrained(ctx, cfg, rows, shots):
    """{"baseline": metrics on test, and "before", "item_correct": the answers}, as JSON can hold them."""
    task = find_task(cfg.task)
    test = rows["test"]
    if task.baseline_metrics:
        examples = prepared(ctx, cfg, encode_rows(ctx, cfg, {"test": test})["test"])
        with Progress("test before training" if find_method(cfg.method).trains else "test"):
            metrics, answers = task.evaluate(ctx, cfg, test, examples, rows["train"][:shots])
    else:                                               # nothing to measure yet, but answers to compare with
        metrics = {}
        answers = evaluate.answer(ctx, [ctx.prompt_ids(row) for row in test[:3]])
    state = {"baseline": metrics, "before": answers[:3],
             "item_correct": evaluate.item_correct(ctx, test, answers)}
    if cfg.get("num_generations", 1) > 1:
        sampled, state["generations"] = evaluate_generations(ctx, cfg, test, rows["train"][:shots])
        metrics.update(sampled)
    return state


def train(ctx, cfg, run, rows, state, known, params_total):
    """Apply the method, run the loop, measure. Returns (LoopState, {name: parameter}, Outcome)."""
    task = find_task(cfg.task)
    forgetting = forgetting_examples(cfg, ctx)
    if "forgetting_before" not in state:
        key = known and [known, forgetting]
        state.update(remembered(run, key, "forgetting before training",
                                lambda: {"forgetting_before": forgetting_loss(ctx, forgetting)}))
    trainable = apply_method(ctx, cfg)
    examples = encode_rows(ctx, cfg, rows)
    untrained.warn(ctx, cfg, examples["train"])
    feed, total = open_feed(ctx, cfg, examples["train"])
    ctx.trunk = open_trunk(ctx, cfg, feed, total)
    if task.prepare:
        with Progress("before training"):
            prepare_examples(ctx, cfg, feed, total, examples)
    if ctx.trunk:
        ctx.trunk.read(ctx, kept_examples(cfg, feed, total))
        ctx.trunk.describe()
    count = count_numbers(trainable.values())
    log_progress(f"{count:,} of {params_total:,} parameters are trainable; {total} steps")
    run.add_facts(params_trainable=count, params_total=params_total, total_steps=total)
    if cfg.keep_best is not None and not task.baseline_metrics:         # it has needed its head, or a reference
        require_metric(ctx, cfg, rows["valid"], examples["valid"])
    loop = train_loop(ctx, cfg, run, trainable, feed, total, state,
                      lambda: task.evaluate(ctx, cfg, rows["valid"], examples["valid"])[0])
    distributed.reshard(ctx.model)
    loop.best.restore(trainable)
    if ctx.prompt is not None:
        ctx.prompt.drop_encoder()                       # an encoder is for training only
    with Progress("test after training"):
        if task.end:
            task.end(ctx, cfg, rows, state)
        metrics, answers = task.evaluate(ctx, cfg, rows["test"], examples["test"])
    ctx.trunk = None
    if forgetting:
        metrics["forgetting"] = forgetting_loss(ctx, forgetting) - state["forgetting_before"]
    return loop, trainable, Outcome(metrics, answers[:3], evaluate.item_correct(ctx, rows["test"], answers))


def encode_rows(ctx, cfg, rows):
    """{split: rows} -> {split: examples} of this run's length."""
    return ctx.text.encode_splits(rows, ctx.block_size(cfg.block_size), cfg.get("too_long", "truncate"),
                                  cfg.eval_items)


def open_trunk(ctx, cfg, feed, total):
    """An empty Trunk of what enters the lowest adapter's block, or None: nothing below, a stream of windows, or
    nothing that is read twice."""
    layer = shared_blocks(ctx, cfg, ctx.model)
    return Trunk(layer) if layer and feed.stride is None and kept_examples(cfg, feed, total) else None


def kept_examples(cfg, feed, total):
    """The training examples that a run of `total` steps reads twice: what its task does before counts."""
    reads_before = find_task(cfg.task).reads_before
    if total > feed.steps_per_epoch or (reads_before and reads_before(cfg)):
        return [feed.examples[i] for i in feed.used(total)]
    return []


def open_feed(ctx, cfg, examples):
    """(Feed of the training examples, number of optimiser steps)."""
    block = ctx.block_size(cfg.block_size) if find_task(cfg.task).raw_text else None
    feed = Feed(examples, cfg.batch, cfg.micro_batch_tokens, cfg.seed, block, ctx.text)
    return feed, math.ceil(cfg.epochs * feed.steps_per_epoch) if cfg.steps is None else cfg.steps


def prepared(ctx, cfg, examples):
    """Examples with what the task computes for them before training, if it does."""
    prepare = find_task(cfg.task).prepare
    return prepare(ctx, cfg, examples) if prepare else examples


def prepare_examples(ctx, cfg, feed, total, examples):
    """All examples prepared, in place: of training only those that the run reads."""
    used = feed.used(total)
    for i, example in zip(used, prepared(ctx, cfg, [feed.examples[i] for i in used])):
        feed.examples[i] = example
    for split in ("valid", "test"):
        examples[split] = prepared(ctx, cfg, examples[split])


def measure_shots(ctx, cfg, rows, shots, first):
    """The same measurement with more and more solved examples in front. Returns the best Outcome."""
    test = rows["test"]

    def measure(n):
        metrics, answers = evaluate.evaluate_rows(ctx, test, [], rows["train"][:n])
        return shot_ladder.Rung(n, metrics, answers, evaluate.item_correct(ctx, test, answers))
    rungs = shot_ladder.shot_ladder(shots, measure, shot_ladder.Rung(shots[0], first.metrics, first.answers,
                                                                     first.item_correct))
    own = find_task(cfg.task).metric
    shot_ladder.print_ladder(rungs, own)
    best = shot_ladder.best_rung(rungs, own)
    return Outcome(best.metrics, best.answers, best.item_correct)


def finish(run, ctx, cfg, outcome, baseline, samples, counts, clock):
    """The last event, then result.json, which is returned."""
    task = find_task(cfg.task)
    run.log(event="test", step=clock["steps"], tokens=clock["tokens"], seconds=clock["seconds"],
            **outcome.metrics)
    named = {name: cfg.get(name) for name in ("task", "method", "init", "data", "seed")}
    generations = dict(generations=outcome.generations) if outcome.generations else {}
    result = dict(status="done", **named, out=str(run.folder),
                  metrics=outcome.metrics, main_metric=main_metric(outcome.metrics, task.metric),
                  baseline_metrics=baseline, **counts, **clock,
                  tokens_per_second=round(clock["tokens"] / max(clock["seconds"], 1e-9)), samples=samples,
                  item_correct=outcome.item_correct, **generations, peak_memory_mb=peak_memory_mb(ctx.device),
                  next_command=task.next_command(ctx, cfg, run.folder))
    if task.describe and ctx.prompt is not None:
        result["virtual_tokens"] = task.describe(ctx, cfg)
    return run.finish(result)


def use_it(ctx, cfg, folder):
    """The command that uses what a supervised run has trained; None if nothing was."""
    if not find_method(cfg.method).trains:
        return None
    if ctx.text.classifier == "head" or ctx.text.attention == "bidirectional":
        return command_line("--task", "eval", "--init", str(folder), "--data", cfg.data)
    chat_command = command_line("--task", "chat", "--init", str(folder))
    if ctx.prompt is None:
        return chat_command
    what = "words nearest to" if ctx.prompt.holds == "embeddings" else "norms of"
    show_command = command_line("--task", "show", "--init", str(folder))
    return f"{chat_command}\n{show_command}    # the {what} its virtual tokens"


def describe_prompt(ctx, cfg):
    """What a soft prompt has become, as lines: the nearest words of its virtual tokens, and how far they
    moved."""
    return describe_virtual_tokens(ctx, initial_prompt(cfg.init, str(ctx.device)), prompts.nearest_tokens)


def initial_prompt(folder, device="auto"):
    """The soft prompt that a run began with, made again from its flags and seed; None if those are lost."""
    # no config.json, no base, other flags
    with contextlib.suppress(UserError, TypeError, KeyError, AttributeError):
        stored = read_run_config(find(folder))["config"]
        usual = parse(["--task", stored["task"], "--method", stored["method"]])     # flags that are not stored
        cfg = Config({**usual.to_dict(), **stored, "device": device, "compile": False})
        ctx = open_context(cfg, log=lambda line: None)      # the device has been printed
        ctx.text.labels = tuple(settings(folder).get("labels", ()))  # --prompt_init labels starts from them
        apply_method(ctx, cfg)
        return ctx.prompt


def dry_run(cfg, data):
    """--dry_run: sizes, costs on paper, two rendered examples, the time measured on a sample."""
    ctx = open_context(cfg)
    check_rows(ctx, cfg, data)
    rows = drop_equal_answers(ctx, cfg, data.rows)
    expected = preview(ctx, cfg, rows, shown=2)
    advice = forecast.advice_on_steps(cfg, expected.steps) if expected else ""
    if advice:
        print_result(advice)
    return 0


def preview(ctx, cfg, rows, shown=0):
    """Print what a run takes, and so many of its examples. The model is changed. Returns the Forecast, None
    with several processes."""
    method = find_method(cfg.method)
    params_total = count_numbers(ctx.model.parameters())
    trainable = apply_method(ctx, cfg) if method.trains else {}
    examples = encode_rows(ctx, cfg, rows)
    feed = None
    steps = 0
    print_result(forecast.describe_model(cfg.init, ctx.model.config))
    if method.trains:
        untrained.warn(ctx, cfg, examples["train"])
        plan = plan_of(ctx, cfg, trainable, examples["train"], ctx.block_size(cfg.block_size))
        feed, steps = open_feed(ctx, cfg, examples["train"])
        trunk, kept = planned_trunk(ctx, cfg, feed, steps)
        if kept:
            plan = plan._replace(shared_blocks=trunk.layer, kept_tokens=count_tokens(kept))
        describe_plan(ctx, plan, params_total, [] if find_task(cfg.task).raw_text else examples["train"][:shown])
    if dist_state.size > 1:                             # a measurement ends by each process's own clock
        print_result("\nthe time is measured by one process only: leave torchrun out")
        return None
    expected = forecast_run(ctx, cfg, rows, examples, feed, steps, trainable)
    print_result()
    forecast.print_forecast(expected, cfg.get("batch"), ctx.device)
    return expected


def forecast_run(ctx, cfg, rows, examples, feed, steps, trainable, budget=forecast.BUDGET):
    """A forecast.Forecast of the run, measured on the model, which is changed. feed, steps: as open_feed gives
    them; not read where trainable is {}, for a run that does not train."""
    task = find_task(cfg.task)
    if not trainable:
        parts = [forecast.evaluation_part(ctx, cfg, task, rows, examples, 0)]
        return forecast.Forecast(0, 0, (0.0, 0.0), forecast.measure_parts(parts, budget))
    ctx.trunk, kept = planned_trunk(ctx, cfg, feed, steps)
    parts = [forecast.evaluation_part(ctx, cfg, task, rows, examples, steps),
             *forecast.other_parts(ctx, cfg, task, rows, examples, feed, steps),
             forecast.forgetting_part(ctx, forgetting_examples(cfg, ctx))]
    if kept and not (task.reads_before and task.reads_before(cfg)):     # which counts the same blocks
        parts.append(forecast.trunk_part(ctx, kept))
    seconds = forecast.measure_parts(parts, budget / 2)
    make = find_record(OPTIMIZERS, cfg.optimizer).make
    optimizer = make(param_groups(ctx, cfg, trainable), cfg, ctx.device)
    training = forecast.measure_training(
        ctx, feed, steps, list(trainable.values()), optimizer,
        lambda batch, past: task.loss(ctx, cfg, prepare_step(ctx, cfg, [batch], [], past)[0], past),
        lambda some: prepared_micro_batch(ctx, cfg, some), budget / 2)
    ctx.trunk = None
    data_pass = forecast.describe_pass(cfg, feed.steps_per_epoch)
    return forecast.Forecast(steps, feed.tokens(steps), training, seconds, data_pass)


def planned_trunk(ctx, cfg, feed, steps):
    """(an empty Trunk, the training examples that it will hold); None, [] where a run has none."""
    trunk = open_trunk(ctx, cfg, feed, steps)
    kept = kept_examples(cfg, feed, steps) if trunk else []
    fits = count_tokens(kept) * bytes_per_token(ctx) <= memory_limit(ctx.device)
    return (trunk, kept) if fits else (None, [])


def prepared_micro_batch(ctx, cfg, examples):
    """Examples as the steps of a run take them: prepared by the task, known to the trunk."""
    examples = prepared(ctx, cfg, examples)
    if ctx.trunk:
        ctx.trunk.read(ctx, examples)
    return examples


def plan_of(ctx, cfg, trainable, examples, block):
    """The numbers from which data/results/cost_model.py estimates memory and arithmetic."""
    costs = find_method(cfg.method).cost(cfg, ctx.model.config.n_layer)
    logits_on_answers = find_task(cfg.task).logits_on_answers
    return cost_model.planned(ctx, cfg, trainable, examples, block, costs, logits_on_answers)


# ------------------------------------------------------------------------------------------ data and identity

class TaskData(NamedTuple):
    """--data as a run reads it. labels: also of the rows that are not measured."""
    rows: dict                                      # {split: rows}
    row_type: str
    labels: tuple = ()


def open_data(cfg):
    """The TaskData of --data. Raises DataError for rows the task does not read."""
    with Progress(f"reading {cfg.data}"):
        data = formats.load_splits(cfg.data, keep=find_task(cfg.task).scores_samples)
    rows = {split: d.rows for split, d in data.items()}
    train = data["train"]
    what = " rows" if train.row_type == "text" else ""       # it is measured in windows
    counts = [f"{len(r)} {split}{what}" for split, r in rows.items()]
    counts += train.count_dropped()
    log_progress(f"{train.source}, {train.format or train.row_type}: {', '.join(counts)}")
    require_row_type(cfg, train.row_type)
    check_data = find_task(cfg.task).check_data
    if check_data:
        check_data(cfg, train.row_type)
    if rows["test"] == rows["valid"]:
        log_progress(f"test is {data['test'].source}")
    leaks = formats.leaks(rows["train"], rows["test"])
    if leaks:
        log_progress(f"{leaks} test rows are in the training split, too: the test metric is too high")
    against = formats.outvoted(rows["train"])
    if against:
        log_progress(f"{len(against)} pairs have more votes against chosen than for it ({against[0]['line']} is "
                     "the first); chosen is taken as the better answer all the same")
    labels = formats.label_names(sum(rows.values(), [])) if train.row_type in ("label", "tags") else ()
    rows = measured_rows(cfg, data)
    if train.row_type != "text":                    # text is measured in windows, see measure_baseline
        say_if_few({split: len(rows[split]) for split in ("valid", "test")})
    return TaskData(rows, train.row_type, labels)


def require_row_type(cfg, row_type):
    """Raises DataError, which names what reads such rows, unless the task does."""
    reads = find_task(cfg.task).reads
    if row_type not in reads:
        if find_task(cfg.task).reads_own_data:
            refuse_scored_rows(cfg, row_type)
        others = [task.name for task in TASKS if task.trains and row_type in task.reads]
        raise DataError(f"{cfg.data} holds {row_type} rows; --task {cfg.task} reads {' or '.join(reads)} rows; "
                        f"{row_type} rows are for --task {' or '.join(others)}")


def refuse_scored_rows(cfg, row_type):
    """Raises DataError, with the command that measures a model by a reward, for rows that one scores."""
    scoring = [task.name for task in TASKS if task.scores_samples and not task.trains and row_type in task.reads]
    if scoring:
        words = ["--task", scoring[0], "--init", cfg.init, "--data", cfg.data]
        reward = setting_of(cfg.init, "reward")
        if reward is not None:
            words += ["--reward", reward]
        elif cfg.data not in toy.RL:                    # the toy world brings its own reward
            words += ["--reward", "REWARD"]
        measure = command_line(*words, "--num_generations", "16")
        raise DataError(f"{cfg.data} holds {row_type} rows, whose answers a reward scores; --task {cfg.task} reads "
                        f"{' or '.join(find_task(cfg.task).reads)} rows, and this measures {row_type} rows: {measure}")


FEW_ITEMS = 30                                      # with 30, an accuracy of 0.5 is known to +- 0.17


def say_if_few(counts, item="item"):
    """A note about splits of so few items that their metrics mean nothing. counts: {split: items}."""
    few = [f"{n} {split} {item}{'s' if n > 1 else ''}" for split, n in counts.items() if n < FEW_ITEMS]
    if few:
        log_progress(f"{' and '.join(few)}: metrics mean nothing with fewer than {FEW_ITEMS}")


def measured_rows(cfg, data):
    """{split: Data} -> {split: rows} as a run uses them: --eval_items of test, at most 100 of valid. Of raw text
    --eval_items are windows, which encode_rows counts."""
    rows = {split: part.rows for split, part in data.items()}
    if data["test"].row_type != "text":
        rows["test"] = rows["test"][:cfg.eval_items or None]
    if not find_task(cfg.task).all_valid:
        rows["valid"] = rows["valid"][:100]             # for progress; results come from test
    return rows


def open_questions(cfg):
    """TaskData of test alone: all rows of --data, and each line of a .txt. Raises DataError."""
    data = formats.load_lines(cfg.data)
    log_progress(f"{data.source}, {data.format}: {len(data.rows)} rows")
    require_row_type(cfg, data.row_type)
    return TaskData({"test": data.rows[:cfg.eval_items or None]}, data.row_type)


def open_run(cfg, read=open_data):
    """(TaskData, Run, identity): what a command reads, where its run lives, what it is the run of.

    Raises as `read`; failed.json then says why. UserError for an --out that an input lies in.
    """
    refuse_out_of_inputs(cfg)
    run = Run(cfg.out or default_out(cfg), cfg.identity(), cfg.fresh, cfg.keep, defaults=cfg.standard)
    try:
        data = read(cfg)
        with Progress("hashing code, data and base"):
            return data, run, identity_of(cfg, data)
    except UserError as e:
        run.record_failure(e)
        raise


def refuse_out_of_inputs(cfg):
    """Raises UserError if --out is, or holds, a model that the run reads: it would write over it."""
    if cfg.out is None:
        return
    out = pathlib.Path(cfg.out).resolve()
    for name in ("init", "reward"):
        for word in filter(os.path.isdir, (cfg.get(name) or "").split(",")):
            if any(folder.resolve().is_relative_to(out) for folder in (pathlib.Path(word), *folders(word))):
                raise UserError(f"--out {cfg.out} holds a model that --{name} {word} reads; use another --out")


def report_once(run, identity, compute):
    """Print the result of a run, which compute() makes unless the folder holds it. Returns the exit code."""
    result = run.finished(identity)
    if result is None:
        with run.opened(identity) as result:            # another process may have finished it meanwhile
            if result is None:
                result = compute()
    else:
        log_progress(f"{run.folder} is finished: this is its stored result (--fresh computes it again)")
    return report(result, run.folder)


def identity_of(cfg, data):
    """Code, data, base and reward of a run, as hashes (data/runtime/identity.py)."""
    require_rewards(cfg)
    content = [data.rows, other_texts(cfg)]
    if data.labels and data.labels != formats.label_names(sum(data.rows.values(), [])):
        content.append(data.labels)                     # some are of rows that are not measured
    identity = {"code": code_hashes(code_roots(cfg)), "data": hash_json(content),
                "base": "new" if cfg.init == "new" else hash_folder(cfg.init)}
    words = {"reward": reward_of(cfg), "gold_reward": gold_reward_of(cfg)}     # some data sets have their own
    for name in find_task(cfg.task).input_flags:
        word = words.get(name, cfg.get(name))
        if word:
            identity.update(input_hashes(name, split_words(name, word)))
    return identity


def input_hashes(name, words):
    """{part of the identity: hashes} of the functions and folders that a flag names.

    The code of functions has a hash for each definition, a folder one that no --keep accepts.
    """
    functions = {}
    for word in filter(is_function, words):
        functions.update(function_hashes(target(word)))
    found = {f"{name} {word}": hash_folder(word) for word in words if not is_function(word)}
    if functions:
        return {name: functions, **found}
    return {name: next(iter(found.values())) if len(found) == 1 else hash_json(found)}


def methods_used(cfg):
    """The method of a run, and those that made the adapters it loads: their code computes, too."""
    used = [find_method(cfg.method)]
    if find_task(cfg.task).config:                  # PPO's critic is a LoRA
        used.append(lora.METHODS[0])
    for name in (cfg.init, *reward_words(cfg)):
        if name != "new" and not is_function(name):
            *adapters, _ = folders(name)
            used += map(method_of, adapters)
    return used


def code_roots(cfg):
    """The definitions from which everything that this run computes is reached."""
    task = find_task(cfg.task)
    used = methods_used(cfg)
    roots = [f"train.py: {task.run.__name__}", f'train.py: TASKS["{task.name}"]']
    variants = []
    for method in used:
        chosen = hasattr(method, "variant") and method is used[0]
        variants += [method.variant(cfg)] if chosen else getattr(method, "variants", ())
        if method in (FULL, NONE):
            roots.append(f"train.py: {type(method).__name__}")
    for file, methods in (("lora.py", lora.METHODS), ("prompts.py", prompts.METHODS)):
        own = [f'{file}: METHODS["{method.name}"]' for method in used if method in methods]
        roots += own or [f"{file}: METHODS[]"]
    roots += [f"lora.py: {variant.__name__}" for variant in variants]
    listed = [f'lora.py: LORA_VARIANTS["{v.name}"]' for v in variants if v in lora.LORA_VARIANTS]
    roots += listed or ["lora.py: LORA_VARIANTS[]"]
    files = {"optimizer": "train.py: OPTIMIZERS", "schedule": "train.py: SCHEDULES",
             "algo": "ppo.py: ALGORITHMS", "preference_loss": "ppo.py: PREFERENCE_LOSSES"}
    for name, collection in files.items():
        roots.append(f'{collection}["{cfg.get(name)}"]' if name in cfg else f"{collection}[]")
    return roots


def other_texts(cfg):
    """Rows that a run reads beside --data."""
    texts = []
    if cfg.get("forgetting_data", "none") != "none":
        texts.append(formats.load_text(cfg.forgetting_data, "valid", ("text", "chat"))[:100])
    if cfg.get("ptx_coef"):
        texts.append(formats.load_text(cfg.ptx_data, "train"))
    return texts


def facts_of(ctx, rows, windows=None):
    """What config.json keeps beside flags and identity; tables compare runs of equal test items only.

    windows: of raw text, which is measured in them and not in rows.
    """
    left_out = ("line", "record")                       # a task that reads no record has the same test items
    test = [{key: value for key, value in row.items() if key not in left_out} for row in rows["test"]]
    count = dict(test_items=len(test)) if windows is None else dict(test_items=windows, test_unit="windows")
    return dict(device=str(ctx.device), dtype=str(ctx.dtype)[6:], template=ctx.text.template,
                **count, test_sha256=hash_json(test))


def forgetting_loss(ctx, forgetting):
    """The mean loss on these examples, nats per token."""
    with Progress("forgetting"):
        return evaluate.mean_loss(ctx, forgetting)[0]


def forgetting_examples(cfg, ctx):
    """Plain text that no task trains on, as examples: the rise of its loss is the forgetting."""
    if cfg.forgetting_data == "none":
        if "forgetting_data" not in {*cfg.given, *find_task(cfg.task).defaults}:
            log_progress(f"forgetting is not measured, because the toy world's text says nothing about {cfg.init}; "
                         "--forgetting_data FILE names other text")
        return []
    rows = formats.load_text(cfg.forgetting_data, "valid", ("text", "chat"))[:100]
    # the same before and after
    virtual_tokens = cfg.get("num_virtual_tokens", 0) if ctx.prompt is None else 0
    block = ctx.max_text_len() - virtual_tokens
    if block < 2:
        raise UserError(f"--num_virtual_tokens {virtual_tokens} leaves no room in a context of "
                        f"{ctx.model.config.block_size}")
    return ctx.text.encode_splits({"valid": rows}, min(256, block))["valid"]


# -------------------------------------------------------------------------------- losses and metrics of tasks

def answer_loss(ctx, cfg, batch, past):
    """-log p of the supervised tokens, or of the labels at a head, summed over these examples."""
    return evaluate.summed_loss(ctx, batch, past)


def reward_loss(ctx, cfg, batch, past):
    """The ranking loss of a reward model, summed over prompts."""
    return ppo.reward_step(adapter_context(ctx, past), ctx.head, batch, ctx.find_trunk)[0]


def preference_loss(ctx, cfg, batch, past):
    """--preference_loss, summed over prompts."""
    z0 = batch[0].z0 if preference_record(cfg).unpaired else 0.0
    config = ppo.PreferenceConfig.from_flags(cfg)
    return ppo.preference_step(adapter_context(ctx, past), batch, config, z0, ctx.find_trunk)[0]


def preference_record(cfg):
    return find_record(ppo.PREFERENCE_LOSSES, cfg.preference_loss)


def needs_reference(cfg):
    return preference_record(cfg).needs_reference


def check_preferences(cfg, row_type):
    """Raises DataError for rows that --preference_loss cannot compare."""
    record = preference_record(cfg)
    if row_type not in record.reads:
        able = [other.name for other in ppo.PREFERENCE_LOSSES if row_type in other.reads]
        raise DataError(f"{cfg.data} holds {row_type} rows, answers without a partner; --preference_loss "
                        f"{record.name} reads {' or '.join(record.reads)} rows; --preference_loss "
                        f"{' or '.join(able)} reads {row_type} rows")


def preference_words(row_type):
    """The flags without which --task dpo does not read rows of a type, as --task check gives them."""
    able = [record.name for record in ppo.PREFERENCE_LOSSES if row_type in record.reads]
    return [] if ppo.PreferenceConfig().preference_loss in able else ["--preference_loss", able[0]]


def adapter_context(ctx, past):
    """The model as ppo.py takes it: a function that gives a context manager, which gives (model, past)."""
    return lambda: contextlib.nullcontext((ctx.as_model(), past))


def evaluate_answers(ctx, cfg, rows, examples, shots=()):
    """(metrics, answers as text) of a model that answers, or that labels by a head."""
    if isinstance(examples[0] if examples else None, Ranking):
        raise UserError(f"--data {cfg.data} holds preferences, which --task eval measures of runs of --task reward "
                        "alone; a run of --task dpo has measured them at its end; give --data with questions")
    return evaluate.evaluate_rows(ctx, rows, examples, shots)


@torch.no_grad()
def evaluate_reward(ctx, cfg, rows, examples, shots=()):
    """(loss and pairwise accuracy, the scores of each row as text) of a reward model."""
    if ctx.head is None or not isinstance(examples[0], Ranking):
        return evaluate_answers(ctx, cfg, rows, examples, shots)
    total = 0.0
    steps = []
    lines = {}
    past = ctx.past()
    with ctx.autocast():
        for part in evaluate.length_batches(ctx, list(map(size, examples)), "scores"):
            loss, _, scored = ppo.reward_step(adapter_context(ctx, past), ctx.head,
                                              [examples[i] for i in part], ctx.find_trunk)
            total += loss.item()
            steps.append(scored)
            for i, scores in zip(part, scored[0].tolist()):
                lines[i] = "scores, best first: " + " ".join(f"{s:.2f}" for s in scores)
    total = sum(distributed.gather(total))
    steps = sum(distributed.gather(steps), [])
    return {"loss": total / len(rows), **reward_report(steps)}, distributed.gather_rows(lines)


@torch.no_grad()
def evaluate_preferences(ctx, cfg, rows, examples, shots=()):
    """(loss, accuracy and margin of the implicit reward, answers to three prompts). KTO's z0 is that of all
    these examples."""
    def batches(what):
        for part in evaluate.length_batches(ctx, list(map(size, examples)), what):
            yield [examples[i] for i in part]
    total = 0.0
    parts = []
    config = ppo.PreferenceConfig.from_flags(cfg)
    unpaired = preference_record(cfg).unpaired
    past = ctx.past()
    z0 = find_z0(ctx, cfg, batches("answers to other prompts"), past) if unpaired else 0.0
    with ctx.autocast():
        for batch in batches("preferences"):
            loss, _, values = ppo.preference_step(adapter_context(ctx, past), batch, config, z0,
                                                  ctx.find_trunk)
            total += loss.item()
            parts.append({name: x.cpu() for name, x in values.items()})
    total = sum(distributed.gather(total))
    metrics = preference_report(sum(distributed.gather(parts), []))
    answers = evaluate.answer(ctx, [ctx.prompt_ids(row) for row in rows[:3]])
    return {"loss": total / len(examples), **metrics, **({"z0": z0} if unpaired else {})}, answers


def find_z0(ctx, cfg, batches, past, idle_batches=()):
    """KTO's z0 of the Thumbs in these batches and those of all other processes, without dropout."""
    sums = []
    context = adapter_context(ctx, past)
    with ctx.autocast():
        for batch in batches:
            sums.append(ppo.mismatched_log_ratios(context, mismatched_pairs(batch), ctx.find_trunk))
        for batch in idle_batches:                      # sharded: equal numbers of forwards
            ppo.mismatched_log_ratios(context, mismatched_pairs(batch), ctx.find_trunk)
    total, count = distributed.all_reduce((), map(sum, zip((0.0, 0), *sums)))
    return ppo.kto_z0(total, count, cfg.beta)


def mismatched_pairs(examples):
    return [(e.prompt, e.mismatched, e.mismatched_reference) for e in examples]


def add_z0(ctx, cfg, micro_batches, idle_batches, past):
    """The step's examples with KTO's z0, which is that of the whole step; other losses have none."""
    if not preference_record(cfg).unpaired:
        return micro_batches
    ctx.train(False)
    if past is not None:
        with torch.no_grad(), ctx.autocast():
            past = ctx.past()                               # the step's own has --prefix_dropout
    z0 = find_z0(ctx, cfg, micro_batches, past, idle_batches)
    ctx.train()
    return [[example._replace(z0=z0) for example in batch] for batch in micro_batches]


def prepare_preferences(ctx, cfg, examples):
    """Examples as --preference_loss takes them: for KTO good and bad answers, and answers to other prompts."""
    if preference_record(cfg).unpaired:
        examples = [as_thumbs(example) for example in examples]
        room = ctx.max_text_len()                           # what is longer behind this prompt is cut
        partners = [[ids[:room - len(example.prompt)] for ids in answers]
                    for example, answers in zip(examples, mismatched(examples))]
        examples = [example._replace(mismatched=tuple(answers)) for example, answers in zip(examples, partners)]
    return add_reference_logprobs(ctx, cfg, examples)


@torch.no_grad()
def add_reference_logprobs(ctx, cfg, examples):
    """Examples with the log-probabilities of their answers as they are now: the policy begins as its
    reference."""
    if not needs_reference(cfg):
        return examples
    if ctx.trunk:                                       # training reads them again
        ctx.trunk.read(ctx, examples)
    answers = [[*e.answers, *(e.mismatched if isinstance(e, Thumbs) else ())] for e in examples]
    lengths = [sum(len(e.prompt) + len(ids) for ids in some) for e, some in zip(examples, answers)]
    found = {}
    past = ctx.past()
    with ctx.autocast():
        for part in evaluate.length_batches(ctx, lengths, "reference log-probabilities"):
            some = [(examples[i].prompt, answers[i]) for i in part]
            logp = ppo.answer_logprobs(adapter_context(ctx, past), some, ctx.find_trunk)
            for i, values in zip(part, logp.split([len(answers[i]) for i in part])):
                found[i] = values.tolist()
    done = []
    for example, values in zip(examples, distributed.gather_rows(found)):
        n = len(example.answers)
        example = example._replace(reference=tuple(values[:n]))
        done.append(example if n == len(values) else example._replace(mismatched_reference=tuple(values[n:])))
    return done


def label_head(ctx, cfg):
    """A linear classifier that starts at zero: every label is equally likely."""
    head = nn.Linear(ctx.model.config.n_embd, len(ctx.text.labels), bias=False, device=ctx.device)
    nn.init.zeros_(head.weight)
    return head


def load_label_head(folder):
    """The head of a classifier, from its folder. Raises DataError."""
    stored = read_head(folder)
    labels = settings(folder).get("labels", ())
    if set(stored) != {"weight"} or stored["weight"].dim() != 2 or len(stored["weight"]) != len(labels):
        found = {name: list(t.shape) for name, t in stored.items()}
        raise DataError(f"{folder}: its head is {found}; the head of a classifier is one weight with a row "
                        f"for each of its labels {list(labels)}")
    head = nn.Linear(*reversed(stored["weight"].shape), bias=False)
    head.weight.data.copy_(stored["weight"])
    return head


def reward_head(ctx, cfg):
    torch.manual_seed(cfg.seed)
    return ppo.ScalarHead(ctx.model.config.n_embd).to(ctx.device)


def load_reward_head(folder):
    """The head of a reward model, from the folder of its run. Raises DataError."""
    stored = read_head(folder)
    if settings(folder).get("task") != "reward" or not stored:
        raise DataError(f"{folder} is no reward model; --task reward makes one")
    head = ppo.ScalarHead(stored["weight"].size(-1))
    try:
        head.load_state_dict(stored)
    except RuntimeError as e:
        fault = " ".join(str(e).split())
        raise DataError(f"{folder}: its head is not that of a reward model ({fault})") from e
    return head


def calibration_prompts(ctx, rows):
    return [ctx.prompt_ids(row) for row in rows["valid"] * 2]


def sample_for_calibration(ctx, cfg, rows):
    """Answers of the untrained model: a reward model's scores are made relative to them."""
    generator = torch.Generator(ctx.device).manual_seed(cfg.seed)
    with distributed.replicated():                      # one stream of random numbers
        samples = evaluate.sample(ctx, calibration_prompts(ctx, rows), temperature=1.0, generator=generator)
    return {"samples": samples}


@torch.no_grad()
def calibrate_reward(ctx, cfg, rows, state):
    with ctx.autocast():
        reward = ppo.model_reward(adapter_context(ctx, ctx.past()), ctx.head, cfg.micro_batch_tokens)
        reward = reward_models.within(reward, ctx.max_text_len())       # an answer may end behind the last column
        ppo.calibrate(ctx.head, reward(calibration_prompts(ctx, rows), state["samples"]))


# ------------------------------------------------------------------------------------------------------- RLHF

def enter_model(ctx, model, name=None, prompt=None):
    """A role that a model plays in ppo.py: inside, the adapter `name` is active, and it computes as the run
    does."""
    @contextlib.contextmanager
    def enter():
        with ctx.autocast(), lora.use_adapter(model, name):
            yield model, prompt(model) if prompt is not None else None
    return enter


def tuned_role(ctx, model, prompt):
    """The role of a model as it was tuned: with its adapter, if it has one, and its soft prompt."""
    return enter_model(ctx, model, "default" if lora.adapters(model) else None, prompt)


def reward_of(cfg):
    """The words of --reward as one text, or that of prompts of the toy world which a program checks; None
    without."""
    if "reward" not in cfg:
        return None
    return cfg.reward or (toy.RL[cfg.data].reward if cfg.data in toy.RL else None)


def reward_words(cfg):
    """The words of --reward, module:function or a folder each. Raises UserError."""
    words = reward_of(cfg)
    return split_words("reward", words) if words else []


def require_rewards(cfg):
    """Raises DataError for a word of --reward that names neither a function nor a model."""
    for word in reward_words(cfg):
        if not is_function(word) and word not in cache.MODELS:
            try:
                find(word)
            except DataError:
                raise DataError(no_such_reward("reward", word)) from None


def open_rewards(cfg, ctx, base, rows):
    """(what scores answers, the head of a reward model, its adapter's folder). Raises UserError.

    The last two are None unless a reward model is all of it, the folder also where that is no adapter of
    `base`: a critic can begin with it.
    """
    words = reward_words(cfg)
    if not words:
        raise UserError(f"--task {cfg.task} needs --reward: a run of --task reward, or module:function")
    weights = reward_models.parse_weights(cfg.reward_weights, words)
    opened = []
    for word in words:
        if is_function(word):
            opened.append((reward_models.reward_function("reward", word, ctx.text), None, None))
        else:
            opened.append(open_reward_model(cfg, ctx, base, word, rows))
    if len(opened) == 1 and cfg.reward_weights is None:
        return opened[0]
    rewards = [reward for reward, _, _ in opened]
    names_of_rewards = reward_models.reward_names(words)
    return ppo.combine_rewards(dict(zip(names_of_rewards, zip(weights, rewards)))), None, None


def open_reward_model(cfg, ctx, base, word, rows):
    """(what scores answers, its head, its adapter's folder or None). Raises DataError.

    A reward model that was trained on the model of --init is one more adapter of `base`, and a critic can
    begin with it, unless it was trained on other tokens: then rows are rendered for it as in its training.
    """
    folder = weights_folder(word)
    head = load_reward_head(word).to(ctx.device)
    below = base_of(folder)
    same_base = below is not None and below.resolve() == weights_folder(cfg.init).resolve()
    if same_base and method_of(folder).mergeable and settings(folder).get("quant", "none") in (
            "none", cfg.get("quant", "none")):
        name = "reward"
        while lora.adapters(base, name):
            name += "_2"
        lora.load_adapter(base, folder, name, trainable=False)
        adapter = enter_model(ctx, base, name)
        shared = lora.first_adapted_block(base, (name,))
        room = base.config.block_size
        tokenizer = ctx.text.tokenizer
    else:
        model, prompt, tokenizer = load(word, ctx.model.wte.weight.dtype)
        adapter = tuned_role(ctx, model.to(ctx.device).requires_grad_(False).eval(), prompt)
        room = model.config.block_size - (prompt.prefix_len if prompt is not None else 0)
        folder = None
        shared = 0
    stored = settings(word)
    own = Text(tokenizer, stored.get("template") or chat.guess_template(tokenizer), stored.get("system"))
    score = ppo.model_reward(adapter, head, cfg.micro_batch_tokens, shared)
    if reward_models.same_tokens(ctx.text, own, rows):
        score = reward_models.within(score, room)
    else:
        log_progress(f"--reward {word} was trained on other tokens than --init {cfg.init} writes (template "
                     f"{own.template}); it is given each row in its own")
        score = reward_models.in_own_tokens(score, ctx.text, own, room)
        folder = None
    return reward_models.checked(score, word, ctx.text), head, folder


@dataclass
class RolloutSetup:
    """What --task ppo and --task sample need: prompts as ids, rewards, banned ids."""
    ctx: evaluate.ModelContext
    seed: int
    config: object                                      # ppo.PPOConfig, or ppo.SamplingConfig to sample only
    prompts: dict                                       # {split: lists of ids}
    rows: dict                                          # {split: the row of each prompt, with its record}
    reward: Callable
    head: nn.Module                                     # of a reward model alone, else None
    reward_folder: object                               # of one that is an adapter of the base, else None
    gold_reward: Callable
    banned: list


def set_up_rollouts(cfg, ctx, rows, base, config):
    """Raises UserError without a reward, or where prompts have no room."""
    room = ctx.max_text_len() - config.max_new_tokens
    if room < ctx.max_text_len() // 8:
        raise UserError(f"--max_new_tokens {config.max_new_tokens} leaves {room} tokens of the context for "
                        "prompts; lower it")
    prompt_ids = {}
    for split, some in rows.items():
        with Progress(f"encoding {split}"):
            whole = [ctx.text.prompt_ids(row) for row in some]
        prompt_ids[split] = [chat.truncate_left(ids, room, ctx.text.start_length) for ids in whole]
        cut = sum(len(ids) > room for ids in whole)
        if cut:
            log_progress(f"{split}: {cut} prompts lost their beginning, because they are longer than {room} "
                         "tokens")
    reward, head, folder = open_rewards(cfg, ctx, base, rows)
    gold = gold_reward_of(cfg)
    unnamed = range(ctx.text.tokenizer.vocab_size, ctx.model.config.vocab_size)
    banned = sorted({*ctx.text.tokenizer.special.values(), *unnamed} - {ctx.text.end_token})
    gold_reward = gold and reward_models.reward_function("gold_reward", gold, ctx.text)
    return RolloutSetup(ctx, cfg.seed, config, prompt_ids, rows, reward, head, folder, gold_reward, banned)


def gold_reward_of(cfg):
    """The word of --gold_reward; None without."""
    if "gold_reward" not in cfg:
        return None
    return cfg.gold_reward or (toy.RL[cfg.data].gold_reward if cfg.data in toy.RL else None)


@torch.no_grad()
def evaluate_policy(setup, roles, split, n=1):
    """n answers of the policy to each prompt of a split: ({metric: value}, answers, {"score", "gold": (prompts,
    n)})."""
    repeated = [p for p in setup.prompts[split] for _ in range(n)]
    rows = [row for row in setup.rows[split] for _ in range(n)]
    end = setup.ctx.text.end_token
    generator = ppo.rng(setup.seed, "look", device=setup.ctx.device)
    batch, answers = ppo.rollout(roles._replace(critic=None), repeated, {end}, setup.config, setup.banned,
                                 generator)
    values = setup.reward(repeated, answers, rows, batch)
    scored = {"score": ppo.checked_scores(values, len(answers), "cpu")}
    if setup.gold_reward:
        scored["gold"] = ppo.checked_scores(setup.gold_reward(repeated, answers, rows), len(answers), "cpu")
    ended = torch.tensor([y[-1] == end for y in answers])
    metrics = rollout_report(batch, answers, scored["score"], ended, n)
    metrics = {name: metrics[name] for name in ("kl", "eos_rate", "length", "unique", "repeat4")}
    best = ppo.best_of_n(scored["score"].view(-1, n))[:, None]          # the baseline that RL has to reach
    for name, x in scored.items():
        metrics[name] = x.mean().item()
        metrics[name + "_std"] = x.std(unbiased=False).item()
        if n > 1:
            metrics[f"{name}_best_of_{n}"] = x.view(-1, n).gather(1, best).mean().item()
    metrics.update(ppo.part_means(values))
    return metrics, answers, {name: x.view(-1, n) for name, x in scored.items()}


def make_roles(cfg, ctx, base, setup):
    """(Roles, the critic's parameters or None).

    The critic begins as the reward model, or with values of zero.
    """
    policy = tuned_role(ctx, ctx.model, ctx.prompt)
    reference = enter_model(ctx, base, None, copy.deepcopy(ctx.prompt))     # of a soft prompt: as it began
    if not find_record(ppo.ALGORITHMS, cfg.algo).needs_critic:
        return ppo.Roles(policy, reference, shared_blocks=shared_blocks(ctx, cfg, base)), None
    if setup.reward_folder:
        head = copy.deepcopy(setup.head)
        lora.load_adapter(base, setup.reward_folder, "value")
    else:
        head = ppo.ScalarHead(base.config.n_embd, zero=True).to(ctx.device)
        targets = [word for word in cfg.get("targets", "q,v").split(",") if word != "head"]     # which it never runs
        lora.inject(base, targets or "q,v", rank=cfg.get("rank", 8), alpha=cfg.get("alpha", 16.0),
                    layers=parse_layers(cfg.get("layers"), base.config.n_layer), name="value", seed=cfg.seed)
        base.to(ctx.device)
    parameters = {f"head.{name}": p.requires_grad_() for name, p in head.named_parameters()}
    parameters.update(lora.adapter_parameters(base, "value"))
    critic = enter_model(ctx, base, "value")
    return ppo.Roles(policy, reference, critic, head, shared_blocks(ctx, cfg, base)), parameters


def shared_blocks(ctx, cfg, base):
    """How many of the lowest blocks no adapter of policy and critic changes."""
    if ctx.prompt is not None or find_method(cfg.method).trains_base:
        return 0
    return lora.first_adapted_block(base, ("default", "value"))


def run_ppo(cfg):
    """--task ppo. Policy, critic and reward model are adapters of one frozen base, which is the reference;
    with --method full the policy changes it, so a copy stays behind."""
    if (cfg.init, cfg.reward) == ("data/base", None) and cfg.data in toy.RL:
        return run_stages(cfg)
    data, run, identity = open_run(cfg)
    return report_once(run, identity, lambda: train_policy(cfg, run, data.rows))


def train_policy(cfg, run, rows):
    """Set up the roles, iterate, measure, save. Returns the result."""
    ctx = open_context(cfg)
    config = ppo.PPOConfig.from_flags(cfg)
    trains_base = find_method(cfg.method).trains_base
    base = copy.deepcopy(ctx.model).requires_grad_(False) if trains_base else ctx.model
    params_total = count_numbers(base.parameters())
    started = ctx.prompt                                    # a soft prompt of --init; a new one is no part of it
    trainable = apply_method(ctx, cfg)
    setup = set_up_rollouts(cfg, ctx, rows, base, config)
    roles, critic = make_roles(cfg, ctx, base, setup)
    state = run.start(facts_of(ctx, rows)) or {}
    count = count_numbers(trainable.values())
    log_progress(f"{count:,} of {params_total:,} parameters are trainable")
    run.add_facts(params_trainable=count, params_total=params_total)
    trained = ppo.PPOState(config, trainable, critic)
    forgetting = forgetting_examples(cfg, ctx)
    if "baseline" in state:
        trained.load_state_dict(state["trained"])
    else:
        state = measure_reference(run, setup, roles, forgetting, started)
    run.rewind(trained.step)
    say_where(trained.step, config.steps)
    iterate(cfg, run, setup, roles, trained, state)
    if trained.ema:                                     # what is measured and kept is the average
        for name, p in trainable.items():
            p.data.copy_(trained.ema.shadow[name])
    with Progress("test after training"):
        metrics, answers, _ = evaluate_policy(setup, roles, "test")
    if setup.gold_reward and state["baseline"]["gold_std"]:
        metrics["gold_gain"] = (metrics["gold"] - state["baseline"]["gold"]) / state["baseline"]["gold_std"]
    with roles.policy():
        if forgetting:
            metrics["forgetting"] = forgetting_loss(ctx, forgetting) - state["forgetting_before"]
        with defer_signals:
            stored = save_weights(ctx, cfg, run.folder, rows["train"])
            samples = [dict(prompt=prompt_text(ctx.text, row), before=before, after=ctx.text.decode_answer(y))
                       for row, before, y in zip(rows["test"], state["before"], answers)]
            counts = dict(params_total=params_total, params_trainable=count, **stored)
            clock = dict(steps=trained.step, tokens=state["tokens"], seconds=round(state["seconds"], 3),
                         skipped=state["skipped"])
            return finish(run, ctx, cfg, Outcome(metrics, answers), state["baseline"], samples, counts, clock)


def measure_reference(run, setup, roles, forgetting, prompt=None):
    """What the reference does, before the first iteration: the first state of a run. prompt: the soft prompt of
    --init, with which forgetting begins."""
    reference = roles._replace(policy=roles.reference)
    with Progress("test before training, 4 answers to each prompt"):
        metrics, answers, _ = evaluate_policy(setup, reference, "test", 4)
    before = [setup.ctx.text.decode_answer(y) for y in answers[:12:4]]
    with roles.reference():
        loss = forgetting_loss(replace(setup.ctx, prompt=prompt), forgetting)
    run.log(event="baseline", step=0, tokens=0, seconds=0.0, **metrics)
    return dict(baseline=metrics, before=before, seconds=0.0, tokens=0, skipped=0, forgetting_before=loss)


def ptx_batches(cfg, setup):
    """PPO-ptx: (iteration, minibatch) -> micro-batches of plain text; None without --ptx_coef."""
    config = setup.config
    if not config.ptx_coef:
        return None
    ctx = setup.ctx
    stream = ctx.text.stream(formats.load_text(cfg.ptx_data, "train"))
    feed = Feed(stream, 8, config.micro_batch_tokens, cfg.seed, min(256, ctx.max_text_len()), ctx.text)

    def batches(step, minibatch):
        parts = feed(step * config.ppo_epochs * config.minibatches + minibatch)
        return [tuple(t.to(ctx.device) for t in batching.collate(part)) for part in parts]
    return batches


def iterate(cfg, run, setup, roles, trained, state):
    """ppo.train_ppo to its end: log, save, show."""
    config = setup.config
    began = time.monotonic()
    tolerance = 1e-4 if setup.ctx.dtype == torch.float32 else 0.5
    warnings = []
    environment = ppo.Environment(setup.prompts["train"], setup.reward, setup.ctx.text.end_token,
                                  setup.banned, setup.gold_reward, setup.rows["train"], reward_takes_batch=True)
    with Progress("iteration", config.steps, trained.step, "it") as progress:
        for metrics, _ in ppo.train_ppo(config, roles, trained, environment, ptx_batches(cfg, setup)):
            with defer_signals:
                now = time.monotonic()
                state["seconds"] += now - began
                state["tokens"] += metrics["tokens"]
                state["skipped"] += metrics.get("skipped", 0)
                began = now
                run.log(event="train", **{**metrics, "tokens": state["tokens"], "seconds": state["seconds"]})
                is_last = trained.step == config.steps
                if is_last or trained.step % cfg.save_every == 0 or run.save_is_due():
                    run.save({**state, "trained": trained.state_dict()}, step=trained.step,
                             tokens=state["tokens"], seconds=state["seconds"])
            progress.update(note="  ".join(brief(metrics)))
            before = warnings
            warnings = health(metrics, tolerance)
            is_shown = is_last or trained.step % max(1, config.steps // 10) == 0
            said = warnings if is_shown else new_warnings(warnings, before)
            if is_shown or said:
                lines = [join_parts(f"iteration {trained.step}/{config.steps}", health_line(metrics))]
                lines += [wrapped(text, "  ") for text in said]
                log_progress("\n".join(lines))


def sample_answers(cfg):
    """--task sample: n answers to each prompt, scored, and the best of them as rows.

    `--task sft --data FOLDER` on them is FeedME (Ouyang et al. 2022).
    """
    data, run, identity = open_run(cfg)
    return report_once(run, identity, lambda: write_samples(cfg, run, data.rows))


def write_samples(cfg, run, rows):
    """Roll out, keep the best, write rows. Returns the result."""
    began = time.monotonic()
    ctx = open_context(cfg)
    facts = facts_of(ctx, rows)
    rows = {split: some[:cfg.eval_items or None] for split, some in rows.items()}
    params_total = count_numbers(ctx.model.parameters())    # before the adapter of a reward model
    config = ppo.SamplingConfig(**{name: cfg.get(name) for name in fields_of([ppo.SamplingConfig])})
    setup = set_up_rollouts(cfg, ctx, rows, ctx.model, config)
    policy = tuned_role(ctx, ctx.model, ctx.prompt)
    run.start(facts)
    for split, prompt_ids in setup.prompts.items():
        with Progress(split):
            metrics, answers, scored = evaluate_policy(setup, ppo.Roles(policy, policy), split,
                                                       cfg.num_generations)
        kept, answered = best_rows(setup, split, answers, scored["score"], cfg)
        without = len(prompt_ids) - answered
        if without:
            limit = "" if cfg.at_least is None else f" with a score of {cfg.at_least:g} or more"
            log_progress(f"{split}: {without} prompts have no answer that ended{limit}, and no row")
        write_rows(run.folder / f"{split}.jsonl", kept)
    del metrics["kl"]                                   # policy and reference are one here
    generations = {}
    if cfg.num_generations > 1:
        generations = count_right(setup, answers, scored)
        metrics.update(metrics_of(generations))
    counts = dict(params_total=params_total, params_trainable=0)
    clock = dict(steps=0, tokens=0, seconds=round(time.monotonic() - began, 3), skipped=0)
    return finish(run, ctx, cfg, Outcome(metrics, [], generations=generations), {}, [], counts, clock)


def count_right(setup, answers, scored):
    """The "generations" of result.json. Right is what the gold reward gives 1, if it gives only 0 and 1, or
    else the reward; without such a reward nothing is right or wrong."""
    n = scored["score"].size(1)
    texts = [setup.ctx.text.decode_answer(y) for y in answers]
    texts = [texts[i:i + n] for i in range(0, len(texts), n)]
    for name in ("gold", "score"):
        if name in scored and is_right_or_wrong(scored[name].tolist()):
            return generations_of(texts, scored[name].tolist())
    log_progress("no pass@k: neither --reward nor --gold_reward gives only 0 and 1, right and wrong")
    return generations_of(texts, scored["score"].tolist())


def write_rows(path, rows):
    """Rows as a .jsonl file, by one process of several. Raises WriteError."""
    if not dist_state.rank:
        write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def best_rows(setup, split, answers, scores, cfg):
    """(the best answers that ended, as rows to train on, the number of prompts that have one)."""
    n = cfg.num_generations
    text = setup.ctx.text
    cut = torch.tensor([y[-1] != text.end_token for y in answers]).view(-1, n)
    at_least = torch.finfo().min if cfg.at_least is None else cfg.at_least
    best = ppo.feedme(scores.masked_fill(cut, -math.inf), cfg.best_n, at_least)
    rows = []
    for b, i in best:
        turns = text.turns(setup.rows[split][b])[:-1]
        prompt = turns[0]["content"] if [turn["role"] for turn in turns] == ["user"] else turns
        rows.append(dict(prompt=prompt, completion=text.decode_answer(answers[b * n + i]),
                         score=scores[b, i].item()))
    return rows, len({b for b, _ in best})


def run_stages(cfg):
    """--task ppo from the base model on prompts of the toy world: SFT on demonstrations, a reward model where
    no program scores the answers, RL on both."""
    policy = run_stage(cfg, "--task", "sft", *toy.RL[cfg.data].demonstrations)
    reward = reward_of(cfg) or run_stage(cfg, "--task", "reward", "--init", policy)
    log_progress(f"\npython train.py --task ppo --data {cfg.data} --init {policy} --reward {reward}")
    out = cfg.out or default_out(cfg)
    return run_ppo(cfg.replace(init=policy, reward=reward, out=out))


def run_stage(cfg, *words):
    """A supervised run before RL, unless it is finished. Returns its folder."""
    words = [*words, "--seed", str(cfg.seed), "--device", cfg.device, "--dtype", cfg.dtype]
    words += [f"--{name}={cfg.get(name)}" for name in ("template", "system") if name in cfg.given]
    words += ["--keep"] * cfg.keep
    stage = parse(words)
    log_progress("\n" + command_line(*words))
    is_finished = os.path.exists(os.path.join(default_out(stage), "result.json"))
    if not is_finished and dist_state.size == 1:            # a measurement ends by each process's own clock
        found = forecast_stage(stage)
        log_progress(f"a stage before RL, with steps of its own: {found.steps}, in all about "
                     f"{forecast.format_range(found.total())}")
    run_supervised(stage)
    return default_out(stage)


def forecast_stage(cfg):
    """The forecast.Forecast of a supervised run, from less than ten seconds of it.

    It trains a model of its own, for a moment: the run then opens another one, and describes it.
    """
    ctx = open_context(cfg, log=lambda line: None)
    rows = measured_rows(cfg, formats.load_splits(cfg.data))
    trainable = apply_method(ctx, cfg)
    examples = encode_rows(ctx, cfg, rows)
    feed, steps = open_feed(ctx, cfg, examples["train"])
    return forecast_run(ctx, cfg, rows, examples, feed, steps, trainable, budget=8.0)


# -------------------------------------------------------------------------------------------- the other tasks

def run_chat(cfg):
    """--task chat: one answer to --prompt, or a conversation until the input ends."""
    return conversation.chat(open_context(cfg), cfg, settings(cfg.init))


def run_predict(cfg):
    """--task predict: what a model answers to rows without answers, as rows of predictions.jsonl."""
    if cfg.data is None:
        raise UserError("--task predict needs --data FILE: texts, one a line, or rows with text or prompt")
    data, run, identity = open_run(cfg, open_questions)
    return report_once(run, identity, lambda: write_predictions(cfg, run, data.rows))


def write_predictions(cfg, run, rows):
    """Predict, write rows. Returns the result."""
    began = time.monotonic()
    ctx = open_context(cfg)
    run.start(facts_of(ctx, rows))
    row_type = predict.row_type_of_model(ctx, settings(cfg.init))
    predict.refuse_unread(cfg, row_type)
    questions, references = predict.input_rows(ctx, row_type, rows["test"], cfg.data)
    predictions = predict.predict_rows(ctx, row_type, questions)
    for prediction, reference in zip(predictions, references):
        if reference is not None:
            prediction["reference"] = reference
    write_rows(run.folder / "predictions.jsonl", predictions)
    log_progress(f"{run.folder}/predictions.jsonl holds {len(predictions)} rows")
    samples = [dict(prompt=prompt_text(ctx.text, row), after=predict.prediction_text(prediction))
               for row, prediction in zip(questions[:3], predictions)]
    clock = dict(steps=0, tokens=0, seconds=round(time.monotonic() - began, 3), skipped=0)
    counts = dict(params_total=count_numbers(ctx.model.parameters()), params_trainable=0)
    return finish(run, ctx, cfg, Outcome(predict.metrics_of(predictions), []), {}, samples, counts, clock)


def run_show(cfg):
    """--task show: the next-token distribution, of the base and of the tuned model.

    Without --prompt, what a soft prompt has become; of another run, what follows its first test row.
    """
    ctx = open_context(cfg)
    if ctx.prompt is not None and not cfg.prompt:
        print_virtual_tokens(describe_prompt(ctx, cfg))
        return 0
    if not cfg.prompt:
        cfg = cfg.replace(prompt=first_test_prompt(ctx, cfg.init))
    sides = {"base": enter_model(ctx, ctx.model)}
    if lora.adapters(ctx.model) or ctx.prompt is not None:
        sides["tuned"] = tuned_role(ctx, ctx.model, ctx.prompt)
    return next_token.show(ctx, sides, cfg)


def first_test_prompt(ctx, init):
    """The last message of the first test row that a run was measured on, or the beginning of its text; None if
    that is not known."""
    data = setting_of(init, "data")
    if data is None:
        return None
    test = formats.load_splits(data)["test"]
    row = test.rows[0]
    if test.row_type == "text":
        prompt = " ".join(row["text"].split()[:8])
    else:
        turns = ctx.text.turns(row)[:-1]
        if not turns:                                   # an answer to nothing
            return None
        prompt = turns[-1]["content"]
    log_progress(f"without --prompt, the first test row of {data} is continued")
    return prompt


def run_merge(cfg):
    """--task merge: an adapter run as a plain Hugging Face folder, fp32.

    Exit code 1, and nothing is written, if the merged logits are not those of the adapted model.
    """
    if not cfg.out:
        raise UserError("--task merge needs --out FOLDER, one that is new or empty")
    if os.path.exists(cfg.out) and (not os.path.isdir(cfg.out) or os.listdir(cfg.out)):
        raise UserError(f"--task merge needs --out FOLDER, one that is new or empty; {cfg.out} is not")
    with Progress(f"loading {cfg.init}"):
        model, prompt, tokenizer = load(cfg.init)
    if prompt is not None:
        raise UserError(f"--init {cfg.init} is a soft prompt: it has no weights that could be merged")
    if not lora.adapters(model):
        raise UserError(f"--init {cfg.init} has no adapter that could be merged")
    plain = lora.merge(model)
    tokens = torch.arange(min(64, model.config.vocab_size, model.config.block_size))[None]
    with torch.no_grad():
        adapted = model(tokens)[0]
        difference = (adapted - plain(tokens)[0]).abs().max().item()
        largest = adapted.abs().max().item()
    if not difference <= 1e-3 * max(1.0, largest):      # fp32 rounding is about 1e-5
        raise RunError(f"--init {cfg.init}: merged logits differ from the adapted model's by "
                       f"{difference:.2g}, so the variant's merged() is not its forward(); nothing was "
                       "written")
    stored = settings(cfg.init)
    made_by = task_of(stored)
    named = {"task": made_by.name} if made_by else {}
    facts = {name: stored[name] for name in (*TRAINING_FACTS, *TEXT_SETTINGS) if name in stored}
    head = read_head(cfg.init)
    with atomic_folder(cfg.out) as folder:              # else a killed merge is in the way of the next one
        plain.save_pretrained(folder)
        save_text_files(folder, cfg.init, tokenizer, stored)
        write_json(folder / "run.json", {**facts, **named})
        if head:
            write_tensors(folder / "head.safetensors", {f"score.{n}": t for n, t in head.items()})
    print_result(f"largest logit difference after merging: {difference:.2g}")
    words = ["--task", "chat", "--init", cfg.out]
    if made_by and made_by.judges:                      # it scores, and does not answer
        words = ["--task", "eval", "--init", cfg.out, "--data", setting_of(cfg.init, "data") or "FILE"]
    print_result(command_line(*words))
    return 0


def setting_of(name, flag):
    """A flag's value in the run that made a folder; None if it is not known."""
    with contextlib.suppress(UserError):
        return read_run_config(find(name))["config"].get(flag)
    return None


def run_check(argv):
    """--task check: what a data file holds, what training on it would take, what to change first.

    The rows decide the task; the command line is then parsed with that task in place of check.
    """
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--task")
    parser.add_argument("--data", default="toy")
    parser.add_argument("--write", action="store_true")
    own, others = parser.parse_known_args(argv)
    data, clean_copy = inspect_data.load_for_check(own.data, own.write)
    row_type = data["train"].row_type
    reading = [task for task in TASKS if row_type in task.reads]
    task = next((task for task in reading if task.reads[0] == row_type), reading[0])
    if task.scores_samples:
        data, clean_copy = inspect_data.load_for_check(own.data, own.write, keep=True)
    needed = task.flags_for_rows(row_type) if task.flags_for_rows else []
    words = ["--task", task.name, "--data", own.data, *needed, *others]
    cfg = parse(words)
    of_a_run = sorted(cfg.given & cfg.transient)
    if of_a_run:
        raise UserError(f"--{of_a_run[0]} means nothing to --task check, which leaves no run; leave it out")
    ctx = open_context(cfg)
    rows = drop_equal_answers(ctx, cfg, measured_rows(cfg, data))
    has_forecast = task.loss is not None                # the supervised loop; RL has none
    return inspect_data.examine(ctx, cfg, data, command_line(*words),
                                (lambda: preview(ctx, cfg, rows)) if has_forecast else None, clean_copy,
                                takes_shots=task.baseline and ShotFlags in task.baseline_flags)


# ------------------------------------------------------------------------------------------- records of tasks

@dataclass(frozen=True)
class Task:
    """What --task names. Everything that another part of the program needs to know about it stands here."""
    selected_by = "task"
    name: str
    help: str
    run: Callable                                   # (cfg) -> exit code
    reads: tuple = ()                               # row types of its data
    flags: tuple = ()                               # groups of flags, whatever the method
    training_flags: tuple = ()                      # groups that it has with a method that trains
    baseline_flags: tuple = ()                      # groups that it has with --method none
    defaults: dict = field(default_factory=dict)    # of flags, where this task needs another value
    config: type = None  # the group that replaces TrainingFlags, with its own defaults
    renamed_flags: dict = field(default_factory=dict)   # {old name of a flag of this task: its new name}
    lr_scale: float = 1.0                           # of the method's rate
    full_lr: dict = None                            # --lr of --method full: {"new": rate, "existing": rate}
    trains: bool = True
    baseline: bool = False                          # --method none measures without training
    baseline_hint: str = ""
    generates: bool = False                         # it needs a model that generates, not one that scores
    reads_templates: bool = True                    # it can use a soft prompt inside a template
    templates: bool = False                         # it can train one
    new_model: bool = False                         # --init new
    raw_text: bool = False                          # it trains on text without prompt and answer
    next_tokens: bool = False                       # it teaches a model to generate answers
    needs_causal: bool = False                      # it needs a model that was trained with causal attention
    measures: bool = False                          # it measures --init as it was trained, head included
    all_valid: bool = False                         # it reads all of valid, not 100 rows
    reads_own_data: bool = False                    # without --data, that of the run of --init
    scores_samples: bool = False                    # it has a reward, which may read any key of a row
    one_process: bool = False
    input_flags: tuple = ("reward", "gold_reward")  # folders or module:function, whose content is hashed
    parses_itself: bool = False                     # run takes the words of the command line
    scales_loss: bool = True                        # its loop has the loss scaler that --dtype fp16 needs
    # the supervised loop
    loss: Callable = None                           # (ctx, cfg, batch, past) -> summed loss
    evaluate: Callable = evaluate_answers           # (ctx, cfg, rows, examples, shots) -> (metrics, answers)
    metric: str = None                              # what it is about; None: what its rows are about
    baseline_metrics: bool = True                   # there is something to measure before training
    prepare: Callable = None                        # (ctx, cfg, examples) -> examples, before the loop
    reads_before: Callable = None                   # (cfg) -> whether prepare runs the model on examples
    prepare_step: Callable = None                   # of a step: as the function prepare_step
    check_data: Callable = None                     # (cfg, row type): DataError for rows its flags do not read
    flags_for_rows: Callable = None                 # (row type) -> words that such rows need, for --task check
    begin: Callable = None                          # (ctx, cfg, rows) -> more state, before training
    end: Callable = None                            # (ctx, cfg, rows, state), after training
    logits_on_answers: bool = True                  # of a Ranking: its loss needs the answers' logits
    classifier: str = None  # "head": labels are read off a head, whatever the flags say
    judges: bool = False                            # its runs score texts by a head of their own
    make_head: Callable = None                      # (ctx, cfg) -> nn.Module
    load_head: Callable = None                      # (folder) -> nn.Module
    peft_task_type: str = None                      # task_type of peft's adapters that are read as its own
    describe: Callable = None                       # (ctx, cfg) -> lines about a soft prompt, for result.json
    next_command: Callable = use_it                 # (ctx, cfg, folder) -> the command that uses the result


def start_of(ctx, cfg):
    """--init of the next run, and of a soft prompt the only --method that goes on with it."""
    is_soft = ctx.prompt is not None and prompt_base(cfg.init) != cfg.init
    return ["--init", cfg.init, *(["--method", prompts.method_name(ctx.prompt)] if is_soft else [])]


def then_ppo(ctx, cfg, folder):
    return command_line("--task", "ppo", *start_of(ctx, cfg), "--reward", str(folder))


def then_sft(ctx, cfg, folder):
    return command_line(*start_of(ctx, cfg), "--data", str(folder))


def no_command(ctx, cfg, folder):
    return None


RUN = (DataFlags, RunFolderFlags)
LOOP = (TrainingFlags, KeepBestFlags, SaveFlags, DryRunFlags)
PREFERENCES = ("pairs", "ranked")
PROMPTS = ("prompt", "chat", "pairs", "ranked", "thumbs")

TASKS = (
    Task("sft", "next token on the answers only", run_supervised, reads=("chat", "label", "tags"),
         flags=(*RUN, MicroBatchFlags, TextFlags, BlockFlags, TooLongFlags, EvalFlags, AnswerFlags),
         training_flags=LOOP, baseline_flags=(ShotFlags,), baseline=True, templates=True, loss=answer_loss,
         next_tokens=True, metric="exact_match"),
    Task("pretrain", "next token on raw text, masked text, blank infilling", run_supervised, reads=("text",),
         flags=(*RUN, MicroBatchFlags, BlockFlags, EvalFlags, ObjectiveFlags, RawTextFlags,
                NewModelFlags),
         training_flags=LOOP,
         defaults=dict(method="full", data="toy/corpus", init="new", forgetting_data="none", epochs=1.0,
                       min_lr_ratio=0.1, beta2=0.99, weight_decay=0.1),
         # 60 steps of 4 windows on a model of width 128, loss on new text and forgetting in nats per token:
         # 1e-4: 3.12 -> 1.21, 0.007; 3e-4: 0.92, 0.03; 1e-3: 0.68, 0.20; 3e-3: 0.67, 1.31. Wider ones need less
         full_lr=dict(new=1e-3, existing=1e-4),
         baseline=True, new_model=True, raw_text=True, loss=answer_loss, metric="loss"),
    Task("classify", "a label, by a head or by label words", run_supervised, reads=("label",),
         flags=(*RUN, MicroBatchFlags, TextFlags, BlockFlags, TooLongFlags, EvalFlags, ClassifyFlags,
                AttentionFlags),
         training_flags=LOOP, baseline_flags=(ShotFlags,), defaults=dict(data="toy/sentiment"), baseline=True,
         templates=True, loss=answer_loss, metric="accuracy", make_head=label_head,
         load_head=load_label_head, peft_task_type="SEQ_CLS"),
    Task("tag", "a label per token", run_supervised, reads=("tags",),
         flags=(*RUN, MicroBatchFlags, BlockFlags, EvalFlags, AttentionFlags), training_flags=LOOP,
         defaults=dict(data="toy/entities", prompt_template=None), templates=True, loss=answer_loss,
         metric="f1",
         classifier="head", make_head=label_head, load_head=load_label_head,
         baseline_hint="--task tag has no head before it is trained: use --task eval for a trained one, or "
                       "--task sft --method none for names as words"),
    Task("reward", "pairwise or K-ranked comparisons", run_supervised, reads=PREFERENCES,
         flags=(*RUN, MicroBatchFlags, TextFlags, BlockFlags, EvalFlags, AnswerFlags), training_flags=LOOP,
         defaults=dict(data="toy/preferences", forgetting_data="none", epochs=1.0, beta2=0.95),
         reads_templates=False, needs_causal=True, logits_on_answers=False,
         loss=reward_loss, evaluate=evaluate_reward, metric="accuracy",
         baseline_metrics=False, begin=sample_for_calibration, end=calibrate_reward, judges=True,
         make_head=reward_head, load_head=load_reward_head, next_command=then_ppo),
    Task("dpo", "preferences without RL (--preference_loss)", run_supervised, reads=(*PREFERENCES, "thumbs"),
         flags=(*RUN, MicroBatchFlags, TextFlags, BlockFlags, EvalFlags, ppo.PreferenceConfig),
         training_flags=LOOP,
         defaults=dict(data="toy/preferences", epochs=0.25), lr_scale=0.1, generates=True,
         reads_templates=False, needs_causal=True,
         loss=preference_loss, evaluate=evaluate_preferences, metric="accuracy", prepare=prepare_preferences,
         reads_before=needs_reference, prepare_step=add_z0, check_data=check_preferences,
         flags_for_rows=preference_words),
    Task("ppo", "RL: PPO with a KL penalty to the reference, and relatives (--algo)", run_ppo, reads=PROMPTS,
         flags=(*RUN, SaveFlags, TextFlags, EvalFlags, ppo.PPOConfig, RewardFlags, PtxFlags, RawTextFlags),
         config=ppo.PPOConfig,
         defaults=dict(data="toy/prompts", save_every=1), lr_scale=0.4, generates=True, reads_templates=False,
         needs_causal=True, scores_samples=True,
         metric="gold", scales_loss=False),
    Task("sample", "answers to prompts, scored, the best as rows", sample_answers, reads=PROMPTS,
         trains=False,
         flags=(*RUN, TextFlags, EvalFlags, RewardFlags, ppo.SamplingConfig, BestAnswersFlags),
         defaults=dict(data="toy/prompts"), renamed_flags=dict(keep_best="best_n"),
         generates=True, reads_templates=False, needs_causal=True, all_valid=True, scores_samples=True,
         metric="score",
         next_command=then_sft),
    Task("eval", "measure a trained model", run_supervised, trains=False,
         reads=("chat", "label", "tags", "text", "pairs", "ranked"),
         flags=(MeasuredDataFlags, RunFolderFlags, MicroBatchFlags, TextFlags, BlockFlags, TooLongFlags,
                EvalFlags, AnswerFlags, ShotFlags, GenerationsFlags),
         evaluate=evaluate_reward, measures=True, reads_own_data=True, describe=describe_prompt,
         next_command=no_command),
    Task("predict", "labels or answers for rows without them", run_predict, trains=False,
         reads=("text", "label", "tags", "chat", "prompt"),
         flags=(*RUN, MicroBatchFlags, TextFlags, EvalFlags, AnswerFlags), defaults=dict(data=None),
         generates=True, measures=True, next_command=no_command),
    Task("chat", "talk to a model", run_chat, trains=False, flags=(TextFlags, AnswerFlags, GenerationFlags),
         generates=True, measures=True, one_process=True),
    Task("show", "the next-token distribution; without --prompt: the words nearest to a soft prompt", run_show,
         trains=False, flags=(TextFlags, AnswerFlags, GenerationFlags),
         defaults=dict(temperature=1.0, max_new_tokens=12), one_process=True),
    Task("merge", "an adapter run as a plain model folder", run_merge, trains=False, flags=(MergeFlags,),
         one_process=True),
    Task("check", "look at a data file", run_check, trains=False, flags=(DataFlags, CheckFlags),
         one_process=True, parses_itself=True),
    Task("table", "look at runs", tables.show, trains=False, flags=(tables.TableFlags,), one_process=True),
)


PROGRAM = command.Program(CommonFlags, TASKS, METHODS, {
    "optimizer": OPTIMIZERS, "schedule": SCHEDULES, "algo": ppo.ALGORITHMS,
    "preference_loss": ppo.PREFERENCE_LOSSES}, defaults_by_init)


# ------------------------------------------------------------------------------------------------ the command

def main(argv=None):
    """The command. Returns the exit code; a mistake of the user is one sentence on stderr."""
    argv = sys.argv[1:] if argv is None else argv
    task = None
    cfg = None
    try:
        distributed.start()
        with defer_signals.installed():
            task = command.choose_task(argv, PROGRAM)
            if dist_state.size > 1 and task.one_process:
                raise UserError(f"--task {task.name} is work for one process: leave torchrun out")
            if task.parses_itself and not {"-h", "--help"} & set(argv):
                return task.run(argv)
            cfg = parse(argv)
            return task.run(cfg)
    except UserError as e:
        if distributed.first_to_fail(str(e)):
            log_progress(f"train.py: {e}", dist_state.rank)
        return e.code
    except Interrupted as e:
        if cfg is None or RunFolderFlags not in task.flags or cfg.get("dry_run"):
            # there was nothing to save; with several processes the signal's number is not known here
            return 128 + (defer_signals.pending or signal.SIGTERM)
        log_progress(f"train.py: interrupted; {e or 'the same command starts again'}")
        with contextlib.suppress(distributed.LostProcess):
            distributed.barrier()                       # a process that leaves first has the others killed
        return 75
    except Exception as e:
        if not distributed.first_to_fail(f"{type(e).__name__}: {e}".split("\n")[0]):
            return 1                                    # what fails here is that another process has ended
        known = "out of memory" in str(e) or "can't allocate memory" in str(e)     # CUDA's words, and a CPU's
        if not known and not isinstance(e, MemoryError):
            raise
        log_progress(f"train.py: out of memory ({(str(e) or type(e).__name__).splitlines()[0][:120]}); a lower "
                     "--micro_batch_tokens or --block_size, and --gradient_checkpointing, need less",
                     dist_state.rank)
        return 1


def run_and_exit():
    """main, as a process: it leaves the process group before it exits."""
    code = main()
    if code in (0, 75):                                 # nccl would wait for a process that is gone
        distributed.end()
    if dist_state.size > 1:
        with contextlib.suppress(OSError):              # whoever read the output is gone
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)                                  # gloo's threads may abort while the interpreter ends
    sys.exit(code)


if __name__ == "__main__":
    run_and_exit()
