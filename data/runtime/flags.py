"""data/runtime/flags.py: every flag of the command, who reads it, and what it is when nobody says it.

Flag = field = JSON key. A field's metadata says its group, its line of help, its type or choices, and which
tasks and methods read it; for one task and method only their flags exist, and for any other word there is one
sentence that says whose it is or what it may have meant. Abbreviations are errors: the meaning of a sweep
must not change with a new flag. Other files have flags of their own (ppo.PPOConfig): `concerns`.

Public: Config, parse, told, default_out, and the names of tasks and methods
"""
import argparse
import dataclasses
import difflib
import hashlib
import os
import re
from dataclasses import dataclass, field

from data.text import chat
from data.batches import objectives, few_shot
from data.results import tables
from data.runtime.files import UserError
from data.runtime.device import MICRO
from data.runtime.run_folder import note

TASKS = ("sft", "pretrain", "classify", "tag", "reward", "dpo", "ppo", "sample", "eval", "chat", "show",
         "merge", "check", "table")
METHODS = ("lora", "adalora", "ia3", "prompt", "ptuning", "prefix", "ptuning2", "full", "none")
FIT = TASKS[:6]                                         # the supervised loop; ppo has a loop of its own
TRAIN = TASKS[:7]
SIZED = TRAIN + ("check",)                              # they build what would learn
CHATTY = ("sft", "classify", "reward", "dpo", "ppo", "sample", "eval", "chat", "show",
          "check")                                      # they render a template
LORA, SOFT = METHODS[:3], METHODS[3:7]                  # methods that inject; methods that are a past
LEARN = METHODS[:8]
ROLES = {"the run": (TASKS, METHODS), "training": (FIT, LEARN), "text": (CHATTY, METHODS),
         "LoRA": (SIZED, LORA), "virtual tokens": (SIZED, SOFT), "classify": (("classify",), METHODS),
         "generation": (("chat", "show"), METHODS), "a new model, --init new": (("pretrain",), METHODS),
         "objective": (FIT, METHODS),
         "reward": (("ppo", "sample"), METHODS), "check": (("check",), METHODS)}
SAMPLING = ("samples", "temperature", "max_new", "micro")       # what --task sample reads of PPO's flags


def opt(group, default, help, tasks=None, methods=None, type=None, choices=None):
    """A flag: its default, its line of help, and who reads it: its group's tasks and methods, or these."""
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
                    SIZED + ("sample", "eval"))
    out: str = opt("the run", None, "the run folder; default: a readable name in out/",
                   TRAIN + ("sample", "eval", "merge"), type=str)
    seed: int = opt("the run", 1, "of initialisation, data order, dropout and sampling")
    device: str = opt("the run", "auto", "auto, cpu, cuda, cuda:1, mps")
    dtype: str = opt("the run", "auto", "precision of the arithmetic; what learns is stored in fp32",
                     choices=("auto", "fp32", "tf32", "bf16", "fp16"))
    fresh: bool = opt("the run", False, "start over: delete what the run folder holds",
                      TRAIN + ("sample", "eval"))
    dry_run: bool = opt("the run", False, "print sizes and two rendered examples, then stop", FIT, LEARN)

    steps: int = opt("training", None, "optimiser steps; overrides --epochs", FIT + ("check",), type=int)
    epochs: float = opt("training", 6.0, "passes over the training data", FIT + ("check",))
    batch: int = opt("training", 16, "examples per optimiser step", FIT + ("check",))
    micro: int = opt("training", MICRO, "padded tokens per micro-batch: memory, not mathematics",
                     FIT + ("eval", "check"), METHODS)
    lr: float = opt("training", 1e-3, "peak learning rate; the wider the model, the lower")
    warmup: float = opt("training", 0.05, "share of the steps in which the rate rises")
    schedule: str = opt("training", "cosine", "after warm-up", choices=("cosine", "linear", "constant"))
    min_lr: float = opt("training", 0.0, "where the schedule ends, as a share of --lr")
    beta2: float = opt("training", 0.999, "AdamW's second moment")
    weight_decay: float = opt("training", 0.0, "AdamW's decay, of matrices only", methods=("full",) + LORA)
    clip: float = opt("training", 1.0, "largest gradient norm; 0: no clipping")
    checkpoint: bool = opt("training", False, "recompute activations in backward: less memory, more time",
                           FIT + ("check",))
    shard: bool = opt("training", False, "split weights, gradients and moments over torchrun's processes",
                      methods=("full",))
    compile: bool = opt("training", False, "training forward and backward through torch.compile",
                        FIT + ("check",))
    eval_every: int = opt("training", 0, "steps between evaluations on valid; 0: three in the run")
    save_every: int = opt("training", 100, "steps between saves of state.pt", TRAIN)
    forget: str = opt("training", "toy/corpus", "held-out text to measure forgetting on, or none", TRAIN)

    rank: int = opt("LoRA", 8, "r, the width of the bottleneck", methods=("lora", "adalora"))
    alpha: float = opt("LoRA", 16.0, "the delta is scaled by alpha / rank", methods=("lora", "adalora"))
    dropout: float = opt("LoRA", 0.0, "on the adapter's input", FIT, ("lora", "adalora"))
    targets: str = opt("LoRA", "q,v", "which Linears: q k v o up gate down head")
    layers: str = opt("LoRA", None, "which layers, as 0-3,5; default: all", type=str)
    rank_map: str = opt("LoRA", None, "other ranks by word or path, as down=16,blocks.0.attn.q=2",
                        methods=("lora", "adalora"), type=str)
    rslora: bool = opt("LoRA", False, "scale by alpha / sqrt(rank)", methods=("lora",))
    dora: bool = opt("LoRA", False, "learn magnitude and direction apart", methods=("lora",))
    pissa: bool = opt("LoRA", False, "start from the principal part of each weight", methods=("lora",))
    lora_plus: float = opt("LoRA", 1.0, "B learns this many times faster than A", FIT, ("lora",))
    quant: str = opt("LoRA", "none", "store the frozen base in fewer bits", choices=("none", "int8", "nf4"))
    double_quant: bool = opt("LoRA", False, "quantise the blocks' scales as well")
    target_rank: int = opt("LoRA", 4, "mean rank that pruning ends at", FIT, ("adalora",))
    orth: float = opt("LoRA", 0.1, "weight of the orthogonality term", FIT, ("adalora",))
    prune_start: float = opt("LoRA", 0.2, "share of the steps before pruning", FIT, ("adalora",))
    prune_end: float = opt("LoRA", 0.3, "share of the steps after it", FIT, ("adalora",))
    prune_every: int = opt("LoRA", 10, "steps between prunings", FIT, ("adalora",))

    n_virtual: int = opt("virtual tokens", 20, "how many")
    start: str = opt("virtual tokens", None, "embeddings start from vocab (default), text, labels or random; "
                     "keys and values from text (default), zero, random or gated", type=str,
                     choices=("vocab", "text", "labels", "random", "zero", "gated"))
    start_text: str = opt("virtual tokens", None, "the words for --start; default: common tokens", type=str)
    place: str = opt("virtual tokens", None, 'front, or a template: "{prompt} {p}", "{p:3} {prompt} {p:3}"',
                     ("sft", "classify", "tag"), ("prompt", "ptuning"), type=str)
    encoder: str = opt("virtual tokens", "mlp", "what the embeddings go through", methods=("ptuning",),
                       choices=("mlp", "lstm"))
    hidden: int = opt("virtual tokens", None, "the encoder's width; default: the model's, 512 for prefix",
                      methods=("ptuning", "prefix"), type=int)
    prefix_dropout: float = opt("virtual tokens", 0.0, "on keys and values", FIT, ("ptuning2",))

    objective: str = opt("objective", None, "what raw text teaches; default: as --init, or causal",
                         ("pretrain",), type=str, choices=objectives.OBJECTIVES)
    attention: str = opt("objective", None, "who sees whom; default: as --init, or causal",
                         ("classify", "tag"), type=str, choices=objectives.ATTENTION)
    by: str = opt("classify", "words", "answer with a label word, or use a linear head",
                  choices=("words", "head"))
    ask: str = opt("classify", None, "the question behind each text; default: one that names the labels",
                   type=str)

    template: str = opt("text", "auto", "chat template", choices=("auto",) + chat.TEMPLATES)
    system: str = opt("text", None, "system message; default: the template's own", type=str)
    block: int = opt("text", None, "longest example in tokens; default: the context, at most 1024",
                     FIT + ("eval", "check"), type=int)
    too_long: str = opt("text", "truncate", "what to do with longer ones",
                        ("sft", "classify", "eval", "check"), choices=("truncate", "drop", "error"))
    shots: str = opt("text", "0", "solved training examples in front of each question; or a list: 0,1,2,4",
                     ("sft", "classify", "eval"), ("none",))
    items: int = opt("text", 0, "measure on the first N test items, sample N of each split; 0: all",
                     TRAIN + ("sample", "eval"))
    max_new: int = opt("text", 64, "longest generated answer, in tokens",
                       ("sft", "reward", "eval", "chat", "show"))

    write: bool = opt("check", False, "write a clean copy of the splits beside the file")

    n_layer: int = opt("a new model, --init new", 4, "layers")
    n_head: int = opt("a new model, --init new", 4, "heads")
    n_embd: int = opt("a new model, --init new", 128, "width")
    family: str = opt("a new model, --init new", "gpt2", "dialect", choices=("gpt2", "llama"))
    vocab: int = opt("a new model, --init new", 1024, "size of the tokenizer it gets; 0: bytes")

    prompt: str = opt("generation", None, "answer this and stop, or talk; show: go on from this", type=str)
    temperature: float = opt("generation", 0.7, "0 is greedy")
    top_k: int = opt("generation", None, "sample from the k likeliest", type=int)
    top_p: float = opt("generation", None, "sample from the likeliest of this mass", type=float)

    reward: str = opt("reward", None, "what scores an answer: a run of --task reward, or module:function, "
                      "a function of the texts of prompt and answer", type=str)
    gold: str = opt("reward", None, "module:function that is only looked at; default: the toy world's own",
                    type=str)
    ptx_data: str = opt("reward", "toy/corpus", "raw text for --ptx_coef", ("ppo",))
    keep: int = opt("reward", 1, "best answers to each prompt that are written out", ("sample",))
    rl: object = None                                   # no flag, but a box of them: PPOConfig or DPOConfig


# A method's first run must learn. Good rates lie orders of magnitude apart, so each method brings its own.
METHOD_DEFAULTS = {"full": dict(lr=1e-3), "lora": dict(lr=5e-3, targets="q,v,up,down"), "none": {},
                   "adalora": dict(lr=1e-2, epochs=8.0, targets="q,v,up,down"),
                   "ia3": dict(lr=3e-2, targets="k,v,down"),
                   "prompt": dict(lr=0.2, beta2=0.95, epochs=9.0, batch=8, n_virtual=40,
                                  place="{prompt} {p}"),
                   "ptuning": dict(lr=6e-3, beta2=0.95, epochs=12.0, n_virtual=40,
                                   place="{prompt} {p}"),
                   "prefix": dict(lr=1e-3, beta2=0.95, epochs=10.0),
                   "ptuning2": dict(lr=3e-2, beta2=0.95, epochs=10.0)}
TASK_DEFAULTS = {"pretrain": dict(method="full", data="toy/corpus", init="new", forget="none", epochs=1.0,
                                  min_lr=0.1, beta2=0.99, weight_decay=0.1),
                 "classify": dict(data="toy/sentiment"), "tag": dict(data="toy/entities", place=None),
                 "reward": dict(data="toy/preferences", forget="none", epochs=1.0, beta2=0.95),
                 "dpo": dict(data="toy/preferences", epochs=0.25),
                 "ppo": dict(data="toy/prompts", save_every=1, steps=60, batch=64, ppo_epochs=2, max_new=40,
                             kl_coef=0.1, kl_target=6.0),
                 "sample": dict(data="toy/prompts", method="none", samples=4),
                 "check": dict(epochs=None),            # the default of the task that the rows are for
                 "show": dict(method="none", template="plain", temperature=1.0, max_new=12),
                 **{task: dict(method="none") for task in ("eval", "chat", "merge", "table")}}
NOT_IDENTITY = ("out", "fresh", "dry_run", "shard")     # flags that do not change what a run computes


class Parser(argparse.ArgumentParser):
    def error(self, message):
        """argparse's three faults of a value, as sentences; it has many more ways to say others."""
        flag, _, fault = message.removeprefix("argument ").partition(": ")
        if kind := re.fullmatch(r"invalid (\w+) value: '(.*)'", fault):
            raise UserError(f"{flag} {kind[2]} is no {'whole ' * (kind[1] == 'int')}number")
        if one := re.match(r"invalid choice: '(.*)' \(choose from (.*)\)", fault):
            known = re.findall(r"[\w.-]+", one[2])
            near = difflib.get_close_matches(one[1], known, 1)
            raise UserError(f"{flag} {one[1]} is none of {' '.join(known)}"
                            + (f"; did you mean {near[0]}?" if near else ""))
        raise UserError(f"{flag} needs a value" if fault == "expected one argument" else message)


def parser_of(fields, task, method, defaults):
    """The parser of one task and method. defaults: {name: value} that beat a field's own."""
    parser = Parser(allow_abbrev=False, usage="python train.py [--task T] [--method M] [flags]",
                    description=f"The flags of --task {task} --method {method}, with its defaults.",
                    formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=26))
    groups = {}
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
    return parser


def fields_of(task, concerns):
    """{flag: field} of all concerns; where two have a flag, such as --lr, the task's own wins."""
    found = {f.name: f for f in dataclasses.fields(Config) if f.metadata}
    for owner, concern in concerns.items():
        for f in dataclasses.fields(concern):
            own = owner == task and (task != "sample" or f.name in SAMPLING)
            if own or f.name not in found:
                m = f.metadata
                found[f.name] = field(default=f.default, metadata=dict(
                    m, group=owner, tasks=(owner,), methods=METHODS))
    return found


def parse(argv, concerns, checked=True):
    """Flags -> Config; concerns: {task: the dataclass of flags that it adds, which becomes Config.rl}."""
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--task", default="sft", choices=TASKS)
    first.add_argument("--method", choices=METHODS)
    task, method = vars(first.parse_known_args(argv)[0]).values()
    method = method or TASK_DEFAULTS.get(task, {}).get("method", "lora")
    if task not in SIZED and method != "none":
        raise UserError(f"--task {task} trains nothing, so it takes no --method {method}; leave --method out")
    if task == "table":                             # it reads runs, and no flag of theirs
        return tables.flags(Parser(allow_abbrev=False), lambda t: fields_of(t, concerns)).parse_args(argv)
    if task in ("reward", "dpo", "ppo") and method == "none":
        raise UserError(f"--method none learns nothing, which --task {task} is about; it takes any other")
    if (task, method) == ("ppo", "adalora"):
        raise UserError("--method adalora prunes by the supervised loop's schedule; --task ppo takes lora")
    defaults = {**METHOD_DEFAULTS[method], **TASK_DEFAULTS.get(task, {}), "task": task, "method": method}
    if task in ("dpo", "ppo"):                  # near the reference; faster, DPO unlearns to end its answers
        defaults["lr"] *= 0.1 if task == "dpo" else 0.4
    if task == "ppo" and method in (*SOFT, "ia3"):      # the critic is a LoRA, whatever the policy is
        defaults["value_lr"] = 0.4 * METHOD_DEFAULTS["lora"]["lr"]
    fields = fields_of(task, concerns)
    values, extra = parser_of(fields, task, method, defaults).parse_known_args(argv)
    if extra:
        raise UserError(explain(extra[0], fields, task, method))

    if task == "ppo" and values.algo != "ppo":          # no critic; REINFORCE alone has steps to discount
        unread = ("lam", "value_lr", "value_warmup", "cliprange_value")
        for name in unread + ("gamma",) * (values.algo != "reinforce"):
            if getattr(values, name) != defaults.get(name, fields[name].default):
                raise UserError(f"--{name} means nothing to --algo {values.algo}; leave it out")

    def box(concern):
        names = {f.name for f in dataclasses.fields(concern)}
        return concern(**{name: value for name, value in vars(values).items() if name in names})
    cfg = box(Config)
    if task in concerns:
        if task == "sample":                        # it reads four of PPO's flags; its answers are no batch
            values.batch, values.minibatches = max(1, values.samples), 1
        cfg = dataclasses.replace(cfg, rl=box(concerns[task]))
    if checked:                                 # the defaults of a pair alone may be no command
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


def told(cfg):
    """{flag: value}, flat: everything that a run was told."""
    flat = dataclasses.asdict(cfg)
    rl = flat.pop("rl") or {}
    return {**flat, **{name: rl[name] for name in (SAMPLING if cfg.task == "sample" else rl)}}


def check(cfg):
    """What no flag can check alone."""
    least = dict(batch=1, micro=1, rank=1, steps=0, epochs=0, items=0, save_every=1, eval_every=0, block=2,
                 seed=0, max_new=1, n_virtual=1, lr=0, clip=0, warmup=0, temperature=0, top_k=1,
                 top_p=0, keep=1, samples=1, kl_coef=0, kl_target=0, kl_horizon=1, ppo_epochs=1,
                 minibatches=1, cliprange=0, cliprange_value=0, target_kl=0, value_lr=0, value_warmup=0,
                 ptx_coef=0, ema=0, gamma=0, lam=0, dpo_beta=0, label_smoothing=0, hidden=1, beta2=0,
                 min_lr=0, weight_decay=0, lora_plus=0, dropout=0, prefix_dropout=0, target_rank=1, orth=0,
                 prune_start=0, prune_end=0, prune_every=1, n_layer=1, n_head=1, n_embd=1, vocab=0,
                 missing_eos=-2 ** 63)
    shares = ("warmup", "min_lr", "beta2", "dropout", "prefix_dropout", "prune_start", "prune_end", "top_p",
              "ema", "gamma", "lam", "label_smoothing")
    values = told(cfg)
    for name, low in least.items():
        value = values.get(name)
        if value is not None and not low <= value < 2 ** 63:
            raise UserError(f"--{name} {value} is out of range; it starts at {low} and is finite")
        most = "below 1" if name in ("beta2", "dropout", "prefix_dropout", "ema") else "1"
        if name in shares and value is not None and (value > 1 or value == 1 and most != "1"):
            raise UserError(f"--{name} {value} is out of range; it goes from 0 to {most}")
    few_shot.counts(cfg.shots)
    ranges(cfg.layers), numbers(cfg.rank_map)       # what cannot be read is said before anything is loaded
    if cfg.init == "new" and cfg.task != "pretrain":
        raise UserError(f"--init new starts from nothing: only --task pretrain can, not --task {cfg.task}")
    if cfg.task == "pretrain" and cfg.init != "new":
        for name in ("n_layer", "n_head", "n_embd", "family", "vocab"):
            if getattr(cfg, name) != Config.__dataclass_fields__[name].default:
                raise UserError(f"--{name} shapes a new model, but --init {cfg.init} brings its own shape")
    if cfg.task == "pretrain" and cfg.init == "new" and cfg.method != "full":
        raise UserError(f"--init new has nothing that --method {cfg.method} could adapt; use --method "
                        "full, or --init data/base")
    if cfg.quant == "none" and cfg.double_quant:
        raise UserError("--double_quant quantises the scales of --quant int8 or nf4, and there is none")
    if cfg.start_text and cfg.start in ("random", "zero", "labels"):
        raise UserError(f"--start_text is not read by --start {cfg.start}")
    if cfg.task == "sample" and cfg.keep > cfg.rl.samples:
        raise UserError(f"--keep {cfg.keep} is more than --samples {cfg.rl.samples}, the answers there are")
    if cfg.compile and cfg.shard:
        raise UserError("--compile and --shard have not been tried together; leave one of them out")
    if cfg.task == "ppo" and cfg.dtype == "fp16":
        raise UserError("--dtype fp16 rounds small gradients to 0 where no scaler helps, and --task ppo has "
                        "none; use bf16 or fp32")
    if cfg.task == "tag" and cfg.method == "none":
        raise UserError("--task tag has no head before it is trained: use --task eval for a trained one, or "
                        "--task sft --method none for names as words")
    if cfg.method in SOFT and cfg.lr < (usual := METHOD_DEFAULTS[cfg.method]["lr"]) / 100:
        note(f"--lr {cfg.lr:g} is a rate for weights; --method {cfg.method} usually wants about {usual:g}")


def default_out(cfg, standard):
    """out/<task>-<method>[-flags that differ from the standard]-s<seed>: the same for the same command."""
    standard, parts = told(standard), [cfg.task, cfg.method]
    for name, value in told(cfg).items():
        if value != standard.get(name) and name not in ("task", "method", "seed", *NOT_IDENTITY):
            last = name in ("init", "data", "reward") and str(value).rstrip("/").split("/")[-1]
            text = last or str(value)
            plain = len(text) <= 24 and all(c.isalnum() or c in "._,+-=" for c in text)
            parts.append(name + (text if plain else hashlib.sha256(text.encode()).hexdigest()[:8]))
    return os.path.join("out", "-".join(parts) + f"-s{cfg.seed}")


def numbers(text):
    """"down=16,blocks.0.attn.q=2" -> {"down": 16, "blocks.0.attn.q": 2}"""
    try:
        return {name: int(n) for name, n in (part.split("=") for part in text.split(","))} if text else None
    except ValueError:
        raise UserError(f"--rank_map {text} cannot be read; write it as down=16,blocks.0.attn.q=2") from None


def ranges(text):
    """"0-3,5" -> [0, 1, 2, 3, 5]; None, as nobody says it, stays None"""
    if text is None:
        return None
    found = []
    for part in text.split(","):
        if not (ends := re.fullmatch(r"(\d+)(?:-(\d+))?", part)) or int(ends[2] or ends[1]) < int(ends[1]):
            raise UserError(f"--layers {text} cannot be read; write it as 0-3,5, each range upwards")
        found += range(int(ends[1]), int(ends[2] or ends[1]) + 1)
    return found
