"""data/results/inspect_data.py: --task check: what a data file holds, what training on it would cost, what to change first.

    rows         how many in each split, how many teach nothing, repeat another, ask what train answers
    tokens       percentiles under the tokenizer of --init; how many rows exceed --block
    supervised   the share of the tokens that the loss counts: the rest is read, and costs the same
    time         the seconds per token of a few real steps after the first, times the tokens of all steps

All is counted but time and memory. --write puts a clean copy into FILE-clean/: of equal rows the first, of
rows that ask the same in two splits those in test, or else in valid.

Public: TASK, examine, clean
"""
import collections
import dataclasses
import math
import pathlib

import numpy as np

from data.text import formats
from data.results import cost_model
from data.batches.examples import Feed, Ranking, size, targets
from data.runtime.files import UserError, atomic
from data.runtime.flags import TASK_DEFAULTS, Config
from data.results.metrics import spans
from data.results.report import describe
from data.runtime.run_folder import say

TASK = {"text": "pretrain", "label": "classify", "tags": "tag", "chat": "sft", "pairs": "reward",
        "ranked": "reward", "prompt": "ppo"}            # what rows of a kind are for


def clock(seconds):
    """Seconds as people say them."""
    unit, name = next(((n, name) for n, name in ((3600, "h"), (60, "min")) if seconds >= n), (1, "s"))
    return f"{seconds / unit:.2g} {name}" if seconds < 10 * unit else f"{seconds / unit:,.0f} {name}"


def percent(part, whole):
    return f"{part / max(whole, 1):.1%}"


def balance(rows, kind):
    """[(name, count)] of labels or of names' kinds, the commonest first."""
    if kind == "label":
        return collections.Counter(row["label"] for row in rows).most_common()
    return collections.Counter(name for row in rows for name, *_ in spans(row["tags"])).most_common()


def two_minded(rows):
    """How many questions have several answers."""
    answers = collections.defaultdict(set)
    for row in rows:
        answers[formats.question(row)].add(formats.whole(row))
    return sum(len(some) > 1 for some in answers.values())


def clean(splits):
    """{split: rows} without repetitions, and without what a split held back asks as well."""
    out, asked = {}, set()
    for split in ("test", "valid", "train"):
        once = {formats.whole(row): row for row in reversed(splits[split])}    # of equal rows the first
        out[split] = [row for row in reversed(once.values()) if formats.question(row) not in asked]
        asked |= set(map(formats.question, out[split]))
    return {split: out[split] for split in splits}


def copy(splits, data):
    """(folder, {split: rows}) of a clean copy beside the file, or a sentence why there cannot be one."""
    path = pathlib.Path(data)
    if not path.exists():
        raise UserError(f"--write puts a copy beside a file, and --data {data} is none")
    folder, kept = path.with_name(path.stem + "-clean"), clean(splits)
    if empty := [split for split, rows in kept.items() if not rows]:
        raise UserError(f"--write would leave {empty[0]} empty: {data} has too few different rows to split")
    if folder.exists():
        raise UserError(f"{folder} exists; move it away, and --write can make it anew")
    return folder, kept


def write(folder, kept):
    folder.mkdir()
    for split, rows in kept.items():
        with atomic(folder / f"{split}.jsonl") as f:
            f.writelines(formats.whole(row).encode() + b"\n" for row in rows)


def longest(example):
    """The tokens of an example, of a preference with its longest answer."""
    if isinstance(example, Ranking):
        return len(example.prompt) + max(map(len, example.answers))
    return size(example)


def table(kit, splits, kind):
    """The counts of every split as lines; {split: tokens of every row}."""
    lengths, read, counted = {}, 0, 0
    heads = "rows twice in_train tokens shortest median 90_% 99_% longest".split()
    wide = 9, 8, 10, 12, 10, 8, 8, 8, 9
    say(" " * 8 + "".join(f"{head.replace('_', ' '):>{w}}" for head, w in zip(heads, wide)))
    for split, rows in splits.items():
        if kind == "text":
            lengths[split] = [len(kit.text.tokenizer.encode(row["text"])) for row in rows]
        elif kind == "prompt":
            lengths[split] = [len(kit.text.asked(row)) for row in rows]
        else:
            examples = kit.text.encode(rows, 1 << 40)[0]
            lengths[split] = list(map(longest, examples))
            if kind in ("chat", "label"):
                read, counted = read + sum(lengths[split]), counted + sum(map(targets, examples))
        at = np.percentile(lengths[split], (0, 50, 90, 99, 100), method="higher")
        leaks = 0 if split == "train" else formats.leaks(splits["train"], rows)
        counts = len(rows), formats.duplicates(rows), leaks, sum(lengths[split]), *at
        say(f"{split:8}" + "".join(f"{n:{w},}" for n, w in zip(counts, wide)))
    if read:
        say(f"supervised: {percent(counted, read)} of the tokens, {counted:,} of {read:,}")
    return lengths, counted / read if read else None


def advice(splits, lengths, share, kind, names, block, seconds):
    """What to change first, as sentences."""
    train = splits["train"]
    repeated = sum(map(formats.duplicates, splits.values()))
    leaks = sum(formats.leaks(train, splits[split]) for split in ("valid", "test"))
    if repeated or leaks:
        told = [f"{repeated:,} rows repeat another of their split"] * bool(repeated)
        told += [f"{leaks:,} of valid and test are asked in train, so the test flatters"] * bool(leaks)
        yield "; ".join(told) + ": --write makes a copy without them"
    long = sum(n > block for n in lengths["train"])
    if long and kind != "text":
        yield (f"{long:,} of {len(train):,} training rows exceed {block} tokens and are cut: shorten them, "
               "or take --too_long drop, or a model with a longer context")
    if two := kind in ("chat", "label") and two_minded(train):
        yield f"{two} questions have several answers, of which a model can give one"
    if names and kind == "label":
        most = names[0][1] / len(train)
        if most > 1.5 / len(names):
            yield (f"always saying {names[0][0]!r} is right in {most:.1%}: compare with that, and look at "
                   "macro F1 rather than at accuracy")
    if rare := [name for name, n in names if n < 10]:
        yield f"fewer than 10 rows each teach {', '.join(rare[:8])}: more rows, or fewer labels"
    if len(train) < 100 and kind != "text":
        yield (f"{len(train)} training rows are few: compare with --method none --shots 4, and trust several "
               "seeds, not one")
    if kind == "chat" and share < 0.05:
        yield f"only {share:.1%} of the tokens are answers: shorter questions would make training cheaper"
    if seconds is not None and seconds > 3600:
        yield f"{clock(seconds)} is long: try --steps 100 first, or --layers for the upper half alone"


def examine(cfg, open_kit, probe):
    """--task check. probe(kit, cfg, feed): (what would learn, seconds and tokens of a few steps)."""
    data = formats.splits(cfg.data)
    kind, splits = data["train"].kind, {split: d.rows for split, d in data.items()}
    folder, kept = copy(splits, cfg.data) if cfg.write else (None, None)     # before anything takes time
    cfg = dataclasses.replace(cfg, task=TASK[kind])
    kit = open_kit(cfg)
    say(f"{cfg.data}: {data['train'].form}; {kind} rows, for --task {cfg.task}")
    for split, d in data.items():
        say(f"{split:8}from {d.source}" + "".join(f"; {n} dropped {why}" for why, n in d.dropped.items()))
    names = balance(splits["train"], kind) if kind in ("label", "tags") else []
    if names:
        kit.text.labels = formats.names(sum(splits.values(), []))
    say()
    lengths, share = table(kit, splits, kind)
    if names:
        count = sum(n for _, n in names)
        say("balance:  " + "  ".join(f"{name} {n:,} ({percent(n, count)})" for name, n in names[:12]))
    block, seconds = kit.block(cfg.block), None
    if cfg.method != "none" and kind != "prompt":
        examples = kit.text.split({"train": splits["train"]}, block, cfg.too_long)["train"]
        feed = Feed(examples, cfg.batch, cfg.micro, cfg.seed, block if kind == "text" else None, kit.text)
        epochs = cfg.epochs or TASK_DEFAULTS.get(cfg.task, {}).get("epochs", Config.epochs)
        steps = math.ceil(epochs * feed.per_epoch) if cfg.steps is None else cfg.steps
        base = sum(p.numel() for p in kit.model.parameters())
        learn, took, tokens = probe(kit, cfg, feed)
        each = block * cfg.batch if kind == "text" else sum(map(size, examples)) / feed.per_epoch
        seconds = took / tokens * each * steps
        say()
        describe(kit, cost_model.planned(kit, cfg, learn, examples, block), base, [])
        say(f"{steps:,} steps of {cfg.batch} examples, {each * steps:,.0f} tokens; {tokens / took:,.0f} "
            f"tokens a second on {kit.device}: about {clock(seconds)}, without evaluation")
    found = list(advice(splits, lengths, share, kind, names, block, seconds))
    say()
    for line in found or ["nothing to complain about"]:
        say(f"- {line}")
    if cfg.write:
        write(folder, kept)
        say(f"\nclean copy: {folder}")
    return 0
