"""data/runtime/flags.py: flags of the command, declared as dataclass fields beside the code that reads them.

    @dataclass(frozen=True)
    class LoRAFlags:
        "LoRA"                                                   the group's title in --help
        rank: int = flag(8, "r, the width of the bottleneck", low=1)

A flag, a field and a JSON key have one name. This file turns such groups into an argument parser, checks
types, choices and ranges, and gives a read-only Config. It knows no flag, task or method: which groups a
command has stands in the records of its task and method (train.py). A group may have a static method
check(cfg), which raises UserError for values that exclude each other. Abbreviations are errors: what a sweep
means must not change when a flag is added. A flag of an earlier version is answered with its new name
(RENAMED), one of transformers, peft or TRL with its name here (ELSEWHERE).

Public: flag, path_type, fields_of, Config, parse, usage_error, default_out, parse_layers, parse_rank_pattern,
RENAMED, ELSEWHERE
"""
import argparse
import dataclasses
import difflib
import hashlib
import math
import os
import re

from data.runtime.files import DataError, UserError, check_path

RENAMED = {
    "n_virtual": "num_virtual_tokens", "start": "prompt_init", "start_text": "prompt_init_text",
    "place": "prompt_template", "hidden": "encoder_hidden", "rank_map": "rank_pattern",
    "lora_plus": "loraplus_lr_ratio", "samples": "num_generations", "kl_target": "adaptive_kl_target",
    "gold": "gold_reward", "min_lr": "min_lr_ratio", "clip": "grad_clip", "micro": "micro_batch_tokens",
    "checkpoint": "gradient_checkpointing", "items": "eval_items", "max_new": "max_new_tokens",
    "forget": "forgetting_data", "by": "classifier", "ask": "question", "block": "block_size",
    "vocab": "vocab_size", "missing_eos": "missing_eos_penalty",
    "missing_eos_score": "missing_eos_penalty", "target_kl": "early_stop_kl",
    "dpo_loss": "preference_loss", "dpo_beta": "beta"}
# What transformers, peft and TRL call a flag of the same meaning, and what an option of theirs is here.
ELSEWHERE = {
    "learning_rate": "--lr", "lr_scheduler_type": "--schedule", "warmup_ratio": "--warmup", "optim": "--optimizer",
    "adam_beta2": "--beta2", "max_grad_norm": "--grad_clip", "max_steps": "--steps", "num_train_epochs": "--epochs",
    "num_epochs": "--epochs", "batch_size": "--batch", "train_batch_size": "--batch",
    "per_device_train_batch_size": "--batch, of all processes together", "eval_steps": "--eval_every",
    "save_steps": "--save_every", "output_dir": "--out", "overwrite_output_dir": "--fresh", "model": "--init",
    "model_name": "--init", "model_name_or_path": "--init", "dataset": "--data", "dataset_name": "--data",
    "train_file": "--data", "max_length": "--block_size", "max_seq_length": "--block_size",
    "max_seq_len": "--block_size", "torch_dtype": "--dtype", "torch_compile": "--compile", "bf16": "--dtype bf16",
    "fp16": "--dtype fp16", "tf32": "--dtype tf32", "load_in_4bit": "--quant nf4", "load_in_8bit": "--quant int8",
    "bnb_4bit_use_double_quant": "--double_quant", "r": "--rank", "lora_r": "--rank", "lora_rank": "--rank",
    "lora_alpha": "--alpha", "lora_dropout": "--dropout", "target_modules": "--targets",
    "lora_target_modules": "--targets", "layers_to_transform": "--layers", "use_rslora": "--rslora",
    "use_dora": "--dora", "peft_type": "--method", "use_peft": "--method", "encoder_hidden_size": "--encoder_hidden",
    "prompt_tuning_init": "--prompt_init", "prompt_tuning_init_text": "--prompt_init_text",
    "reward_model": "--reward", "reward_model_path": "--reward", "num_ppo_epochs": "--ppo_epochs",
    "num_mini_batches": "--minibatches", "response_length": "--max_new_tokens",
    "max_completion_length": "--max_new_tokens", "loss_type": "--preference_loss", "chat_template": "--template",
    "system_prompt": "--system"}
RENAMED_VALUES = {"method": {"prompt": "prompt_tuning", "ptuning": "p_tuning", "prefix": "prefix_tuning",
                             "ptuning2": "p_tuning_v2"},
                  "classifier": {"words": "lm"}}


def path_type(word):
    """The type of a flag that names a file or folder."""
    if not word:
        raise argparse.ArgumentTypeError("'' names no file or folder")
    try:
        check_path(word)
    except DataError as e:
        raise argparse.ArgumentTypeError(str(e).removeprefix("the path ")) from None
    return word


def flag(default, help, type=None, choices=None, low=None, high=None, below=None, identity=True, nargs=None):
    """A dataclass field that is also a flag.

    type      a callable of the word, such as `path_type`; needed where the default is None
    choices   a tuple of words, or a function that returns one (for records declared further down a file)
    low, high   inclusive bounds; below: an exclusive upper bound. A number with a bound must be finite
    identity  False for a flag that does not change what a run computes
    nargs     how many words it takes, as argparse has it ("+" or a number): then its value is a list of words
    """
    return dataclasses.field(default=default, metadata=dict(
        help=help, type=type or default.__class__, choices=choices, low=low, high=high, below=below,
        identity=identity, nargs=nargs))


def fields_of(groups):
    """{flag: its dataclass field}, in order; of two groups with the same flag the later one wins."""
    found = {}
    for group in groups:
        for field in dataclasses.fields(group):
            if "help" in field.metadata:
                found[field.name] = field
    return found


class Config:
    """The flags of one command and their values, as read-only attributes.

    `given` holds the names that stood on the command line, `standard` the values of the bare command. A flag
    that the task and method do not have is no attribute: reading it raises AttributeError.
    """

    def __init__(self, values, given=(), transient=(), standard=None):
        self.__dict__.update(values)
        self.__dict__["given"] = frozenset(given)
        self.__dict__["transient"] = frozenset(transient)
        self.__dict__["standard"] = standard or {}

    def __setattr__(self, name, value):
        raise AttributeError(f"a Config is read-only; use replace({name}=...)")

    def __contains__(self, name):
        return name in self.to_dict()

    def get(self, name, default=None):
        """The value of a flag that only some commands have."""
        return self.to_dict().get(name, default)

    def to_dict(self):
        return {name: value for name, value in self.__dict__.items()
                if name not in ("given", "transient", "standard")}

    def identity(self):
        """The flags that change what a run computes."""
        return {name: value for name, value in self.to_dict().items() if name not in self.transient}

    def replace(self, **changes):
        return Config({**self.to_dict(), **changes}, self.given, self.transient, self.standard)


# ---------------------------------------------------------------------------------------------------- parsing

class Parser(argparse.ArgumentParser):
    def error(self, message):
        """argparse's faults of a value, as UserError in one sentence."""
        name, _, fault = message.removeprefix("argument ").partition(": ")
        if found := re.fullmatch(r"invalid (\w+) value: '(.*)'", fault):
            whole = "whole " if found[1] == "int" else ""
            raise UserError(f"{name} {found[2]} is no {whole}number")
        if found := re.match(r"invalid choice: '(.*)' \(choose from (.*)\)", fault):
            raise UserError(unknown_choice(name, found[1], re.findall(r"[\w.-]+", found[2])))
        if re.match(r"ignored explicit argument", fault):
            raise UserError(f"{name.split('/')[0].split(', ')[0]} takes no value; leave the = and what follows out")
        if found := re.fullmatch(r"expected (?:at least )?(\w+) arguments?", fault):
            raise UserError(f"{name} needs {'a value' if found[1] == 'one' else found[1] + ' values'}")
        raise UserError(f"{name} {fault}" if message.startswith("argument ") else message)


def unknown_choice(name, word, known):
    """The sentence for a value that is none of the known ones."""
    new = RENAMED_VALUES.get(name.removeprefix("--"), {}).get(word)
    if new:
        return f"{name} {word} is now called {name} {new}"
    near = difflib.get_close_matches(word, known, 1)
    return f"{name} {word} is none of {' '.join(known)}" + (f"; did you mean {near[0]}?" if near else "")


def make_parser(groups, defaults, description, hidden=(), chosen={}):
    """An argument parser with a section for each group; defaults are not filled in.

    hidden    flags that this command refuses, which --help leaves out
    chosen    {flag: the record it names}: all other defaults on the page are theirs
    """
    parser = Parser(allow_abbrev=False, usage="python train.py [--task T] [--method M] [flags]",
                    description=description, argument_default=argparse.SUPPRESS,
                    formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=26))
    winner = fields_of(groups)
    sections = {}
    for group in groups:
        for name, field in fields_of([group]).items():
            if winner[name] is not field:
                continue
            title = group.__doc__.strip().split("\n")[0]
            if title not in sections:
                sections[title] = parser.add_argument_group(title)
            default = f"(here {chosen[name]})" if name in chosen else default_text(
                field, defaults.get(name, field.default))
            add_flag(sections[title], name, field, default, name in hidden)
    return parser


def default_text(field, default):
    """What --help says of a default; nothing where there is none, and for switches."""
    if default is None or field.metadata["type"] is bool:
        return ""
    words = " ".join(map(str, default)) if field.metadata["nargs"] else default
    return f"(default {words})"


def add_flag(section, name, field, default, hidden=False):
    meta = field.metadata
    text = f"{meta['help']} {default}".strip()
    text = argparse.SUPPRESS if hidden else text.replace("%", "%%")
    if meta["type"] is bool:
        section.add_argument("--" + name, action=argparse.BooleanOptionalAction, help=text)
        return
    choices = meta["choices"]() if callable(meta["choices"]) else meta["choices"]
    section.add_argument("--" + name, type=meta["type"], choices=choices, help=text, nargs=meta["nargs"],
                         metavar=None if choices else name.upper())


def parse(argv, groups, defaults, description, explain, hidden=(), chosen={}):
    """argv -> Config of the flags of these groups. `defaults` {flag: value} beat a field's own default.

    explain(word) gives the sentence for a word that is no flag of these groups; hidden, chosen: as make_parser
    takes them. Raises UserError.
    """
    parser = make_parser(groups, defaults, description, hidden, chosen)
    found, extra = parser.parse_known_args(argv)
    if extra:
        raise UserError(explain(extra[0]))
    given = vars(found)
    fields = fields_of(groups)
    standard = {name: defaults.get(name, field.default) for name, field in fields.items()}
    values = {**standard, **given}
    check_ranges(values, fields)
    transient = [name for name, field in fields.items() if not field.metadata["identity"]]
    cfg = Config(values, given, transient, standard)
    for group in groups:
        if hasattr(group, "check"):
            group.check(cfg)
    return cfg


def check_ranges(values, fields):
    """Raises UserError for a number outside the bounds of its field."""
    for name, field in fields.items():
        value = values[name]
        low, high, below = (field.metadata[key] for key in ("low", "high", "below"))
        if value is None or isinstance(value, (str, bool)):
            continue
        too_low = low is not None and (value < low or not math.isfinite(value) or abs(value) >= 2 ** 63)
        too_high = high is not None and value > high or below is not None and value >= below
        if too_low or too_high:
            span = f"it starts at {low} and is finite"
            if high is not None or below is not None:
                span = f"it goes from {low} to {high if below is None else f'below {below}'}"
            raise UserError(f"--{name} {value} is out of range; {span}")


def usage_error(word, known, owners, here):
    """The sentence for a word that is no flag here: renamed, another command's, or mistyped.

    known   flags of this command      owners   {flag: "--task ppo" ...}, who has the flags of other commands
    """
    name = word.split("=")[0].removeprefix("--")
    name = name if name in known or name in owners else name.removeprefix("no-")
    if not word.startswith("--"):
        return f"{word!r} is not a flag; flags start with -- and take their value behind a space or ="
    if name in RENAMED:
        return f"--{name} is now called --{RENAMED[name]}"
    if name in owners:
        return f"--{name} belongs to {owners[name]}; this is {here}"
    if name in ELSEWHERE:
        return f"--{name} is called {ELSEWHERE[name]} here"
    near = difflib.get_close_matches(name, [*known, *owners], 1)
    return f"--{name} is not a flag" + (f"; did you mean --{near[0]}?" if near else "; see --help")


def default_out(cfg):
    """out/<task>-<method>[-flags that differ from the bare command's]-s<seed>: deterministic, not too long."""
    parts = [cfg.task, cfg.method]
    for name, value in cfg.identity().items():
        if value == cfg.standard.get(name) or name in ("task", "method", "seed"):
            continue
        text = str(value)
        if name in ("init", "data", "reward") and ":" not in text:     # a path, no module:function(TEXT)
            text = text.rstrip("/").split("/")[-1] or text
        if name == "data":
            text = name_of_data(str(value)) or text
        plain = len(text) <= 24 and all(c.isalnum() or c in "._,+-=" for c in text)
        parts.append(name + (text if plain else short_name(text)))
    name = "-".join(parts)
    if len(name) > 180:                             # a disk takes 255 bytes, and more is added to some names
        name = name[:170] + "-" + short_name(name)
    return os.path.join("out", f"{name}-s{cfg.seed}")


def name_of_data(path):
    """A data file in a folder as FOLDER-FILE, because many folders have a train.jsonl; "" for anything else.

    Further up, where folders can have one name too, a short hash of the path stands behind.
    """
    path = os.path.normpath(path)
    *above, parent, file = ["", "", *path.split(os.sep)]
    if not parent or "." not in file.strip("."):
        return ""
    name = f"{parent}-{file}"
    return f"{name}-{short_name(path)[:6]}" if any(above) else name


def short_name(text):
    return hashlib.sha256(text.encode()).hexdigest()[:8]


# ------------------------------------------------------------------------- values that are a small language

def parse_rank_pattern(text):
    """"down=16,blocks.0.attn.q=2" -> {"down": 16, "blocks.0.attn.q": 2}; None stays None.

    Raises UserError.
    """
    if not text:
        return None
    try:
        return {name: int(n) for name, n in (part.split("=") for part in text.split(","))}
    except ValueError:
        raise UserError(f"--rank_pattern {text} cannot be read; write it as "
                        f"down=16,blocks.0.attn.q=2") from None


UPPER = {"upper": 2, "upper-third": 3, "upper-quarter": 4}


def parse_layers(text, n_layer):
    """"0-3,5" -> [0, 1, 2, 3, 5]; "upper" -> the upper half of n_layer blocks (rounded up); None stays None.
    Raises UserError."""
    if text is None:
        return None
    if text in UPPER:
        return list(range(n_layer - -(-n_layer // UPPER[text]), n_layer))
    found = []
    for part in text.split(","):
        ends = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part)        # of thousands of layers at most
        if not ends or int(ends[2] or ends[1]) < int(ends[1]):
            raise UserError(f"--layers {text} cannot be read; write it as 0-3,5, each range upwards, or as one of "
                            f"{' '.join(UPPER)}")
        found += range(int(ends[1]), int(ends[2] or ends[1]) + 1)
    return found
