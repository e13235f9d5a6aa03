"""data/runtime/command.py: which flags a command has, from the records of its task and its method.

    flags      the common group, the task's, the method's, and those of records that a flag names
    (--optimizer)
    defaults   field < method < what --init is < task < record that a flag names

A task record has: name, flags, training_flags, baseline_flags, defaults, renamed_flags, config, lr_scale,
trains, baseline, baseline_hint, new_model, templates, loss, scales_loss. A method record has: name, flags,
loop_flags, template_flags, defaults, rate_falls, refuses, trains, mergeable, and perhaps variants (their names are
switches) and critic_lr. This file names none.

Public: Program, parse, choose_task, groups_of
"""
from typing import Callable, NamedTuple

from data.runtime.files import UserError, printable
from data.runtime.flags import fields_of, usage_error
from data.runtime.flags import parse as parse_flags
from data.runtime.records import find_record, unused_flags
from data.runtime.run_folder import log_progress


class Program(NamedTuple):
    """What the command line can say.

    selectors: {flag: records that it names, with flags or defaults of their own}.
    by_init: (task, method, --init, {flag: default} without it) -> {flag: default} where it depends on --init.
    """
    common: type
    tasks: tuple
    methods: tuple
    selectors: dict
    by_init: Callable


def groups_of(program, task, method):
    """The groups of flags that a task and a method have together."""
    groups = [program.common, *task.flags]
    if not task.trains:
        return groups
    if not method.trains:
        return groups + list(task.baseline_flags)
    groups += [*task.training_flags, *method.flags]
    if task.loss:
        groups += method.loop_flags
    if task.templates:
        groups += getattr(method, "template_flags", ())
    return groups


def word_after(argv, name, default):
    """The value of --name on the command line, before it is parsed in earnest."""
    value = default
    for i, word in enumerate(argv):
        if word == f"--{name}" and i + 1 < len(argv):
            value = argv[i + 1]
        elif word.startswith(f"--{name}="):
            value = word.partition("=")[2]
    return value


def defaults_of(task, method, argv, program):
    """{flag: default} where task, method, variant or --init need another one than the flag's own."""
    usual = {**method.defaults}
    for variant in chosen_variants(method, argv):
        usual.update(getattr(variant, "defaults", {}))
    if task.config:                                 # the numbers of another loop: only the rate carries over
        own = fields_of([task.config])
        usual = {name: value for name, value in usual.items() if name not in own or name == "lr"}
    if "lr" in usual:
        usual["lr"] *= task.lr_scale
    if task.config and getattr(method, "critic_lr", None):
        usual["value_lr"] = method.critic_lr * task.lr_scale
    init = word_after(argv, "init", task.defaults.get("init", fields_of([program.common])["init"].default))
    if task.trains:
        usual.update(program.by_init(task, method, init, usual))
    return {**usual, **task.defaults, "task": task.name, "method": method.name}


def chosen_variants(method, argv):
    """The variants of a method that have their switch on the command line."""
    return [v for v in getattr(method, "variants", ())[1:] if f"--{v.name}" in argv]


def choose_task(argv, program):
    """The task record of a command line. Raises UserError, which says whose name the word is instead."""
    name = word_after(argv, "task", "sft")
    known = [task.name for task in program.tasks]
    hint = None if name in known else flag_of_record(name, program)
    if hint:
        raise UserError(f"--task {name} is none of {' '.join(known)}; {name} is {hint}")
    return find_record(program.tasks, name)


def flag_of_record(name, program):
    """What a name is, "a --method" or "an --algo of --task ppo", if it is one of another record; else None."""
    if name in [method.name for method in program.methods]:
        return "a --method"
    for flag_name, records in program.selectors.items():
        if name in [record.name for record in records]:
            tasks = [task.name for task in program.tasks if task.trains and any(
                flag_name in fields_of(groups_of(program, task, m)) for m in program.methods if m.trains)]
            return f"{'an' if flag_name[0] in 'aeiou' else 'a'} --{flag_name} of --task {' '.join(tasks)}"
    return None


def choose_method(argv, task, program):
    """The method record of a command line. Raises UserError for one that the task does not take."""
    word = word_after(argv, "method", None)
    name = word or task.defaults.get("method", "lora" if task.trains else "none")
    method = find_record(program.methods, name)
    if not task.trains and method.trains:
        raise UserError(f"--task {task.name} trains nothing, so it takes no --method {name}; leave --method "
                        "out")
    if task.trains and not method.trains and not task.baseline:
        raise UserError(f"--method {method.name} trains nothing, and --task {task.name} is about training; "
                        f"{task.baseline_hint or 'it takes any other'}")
    if task.name in method.refuses:
        raise UserError(f"--task {task.name} does not take --method {method.name}: "
                        f"{method.refuses[task.name]}")
    return method


def parse(argv, program):
    """argv -> Config. Raises UserError."""
    check_words(argv)
    task = choose_task(argv, program)
    method = choose_method(argv, task, program)
    groups = groups_of(program, task, method)
    defaults = defaults_of(task, method, argv, program)
    hidden = [name for v in chosen_variants(method, argv) for name in v.unused]
    chosen = {"task": task.name, "method": method.name}
    for name, records in program.selectors.items():
        declared = fields_of(groups).get(name)
        if declared:
            chosen[name] = word_after(argv, name, defaults.get(name, declared.default))
            record = find_record(records, chosen[name])
            groups += getattr(record, "flags", ())
            defaults = {**defaults, **getattr(record, "defaults", {})}
            hidden += unused_flags(record, records) if hasattr(record, "unused") else ()
    title = f"The flags of {' '.join(f'--{name} {word}' for name, word in chosen.items())}, with their defaults."

    def sentence(word):
        return explain(word, groups, task, method, program)

    cfg = parse_flags(argv, groups, defaults, title, sentence, hidden, chosen)
    check_together(cfg, task, method)
    return cfg


def check_words(argv):
    """Raises UserError for a word that cannot be written to a file or name one: not UTF-8, or with NUL."""
    for word in argv:
        try:
            good = b"\0" not in word.encode()
        except UnicodeEncodeError:                      # a name on the disk in another encoding
            good = False
        if not good:
            raise UserError(f"{printable(word)} is not UTF-8 text or holds the character NUL; rename the "
                            "file or folder that it names")


def check_together(cfg, task, method):
    """What no group can check alone. Raises UserError."""
    if cfg.get("init") == "new" and not task.new_model:
        raise UserError(f"--init new starts from nothing: only --task pretrain can, not --task {task.name}")
    if cfg.get("dtype") == "fp16" and not task.scales_loss:
        raise UserError("--dtype fp16 rounds small gradients to 0 where no loss scaler helps, and --task "
                        f"{task.name} has none; use bf16 or fp32")
    usual = method.defaults.get("lr")
    if usual and "lr" in cfg and not method.mergeable and cfg.lr < usual / 100:
        log_progress(f"--lr {cfg.lr:g} is a rate for weights; --method {method.name} usually needs about "
                     f"{usual:g}")


def explain(word, groups, task, method, program):
    """The sentence for a word that is no flag of this command."""
    old = word.split("=")[0].removeprefix("--")
    if old in task.renamed_flags:
        return f"--{old} of --task {task.name} is now called --{task.renamed_flags[old]}"
    usable = {}                                     # {flag: (names of tasks, names of methods)}, in pairs
    for other in program.tasks:
        for m in program.methods:
            fits = m.trains or other.baseline if other.trains else not m.trains
            for name in fields_of(groups_of(program, other, m)) if fits else ():
                tasks, methods = usable.setdefault(name, ([], []))
                tasks.append(other.name)
                methods.append(m.name)
    whose = {}
    for name, (tasks, methods) in usable.items():
        if task.name in tasks:
            with_this = [m for t, m in zip(tasks, methods) if t == task.name]
            whose[name] = "--method " + " ".join(dict.fromkeys(with_this))
        else:
            whose[name] = "--task " + " ".join(dict.fromkeys(tasks))
    for flag_name, records in program.selectors.items():
        for record in records:
            for name in fields_of(getattr(record, "flags", ())):
                whose.setdefault(name, f"--{flag_name} {record.name}")
    return usage_error(word, fields_of(groups), whose, f"--task {task.name} --method {method.name}")
