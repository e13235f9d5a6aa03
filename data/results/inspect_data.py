"""data/results/inspect_data.py: --task check. Count what a data file holds, estimate training, give advice.

    rows         of each split: all, those that repeat another row of it, those whose prompt is in train
    tokens       percentiles under the tokenizer of --init
    supervised   the share of the tokens that the loss counts; the others only take time
    time         of the command that the check is for, measured on a sample (forecast.py)

Everything is counted but time and memory. --write puts a clean copy into FILE-clean/: of equal rows the first
stays; of rows with one prompt in two splits those in test stay, or else those in valid.

    data, clean_copy = load_for_check(path, write)          then the task for its row type is chosen
    examine(ctx, cfg, data, command, estimate, clean_copy)

Public: load_for_check, examine, clean
"""
import collections
import pathlib
import sys
from dataclasses import dataclass

import numpy as np

from data.batches.examples import Ranking, Thumbs, size, targets
from data.batches.few_shot import ROW_TYPES_WITH_SHOTS, fit_shots
from data.results.forecast import advice_on_steps
from data.results.layout import Column, print_columns, print_wrapped
from data.results.metrics import spans
from data.runtime.files import UserError, atomic
from data.runtime.flags import flag
from data.runtime.progress import format_seconds
from data.runtime.run_folder import fit, print_result
from data.text import formats


@dataclass(frozen=True)
class CheckFlags:
    """check"""
    write: bool = flag(False, "write a clean copy of the splits beside the file")


NO_LIMIT = 1 << 40                                      # tokens: examples are counted as they are, uncut
FEW_ROWS = 100
SHOTS = 4                                               # that are advised for few rows
FEW_OF_A_LABEL = 10
LONG_SECONDS = 3600
COLUMNS = ("rows", "repeated", "in train", "tokens", "shortest", "median", "90 %", "99 %", "longest")


# --------------------------------------------------------------------------------------------- the clean copy

def load_for_check(path, write=False, keep=False):
    """(data, clean_copy) of --data; keep: rows have their record, as formats.load_splits says.

    data         {"train", "valid", "test": data/text/formats.Data}, of one row type
    clean_copy   (folder, {split: rows}) for --write, else None; nothing is written yet

    Raises DataError for data that cannot be read; UserError where --write cannot make a copy.
    """
    data = formats.load_splits(path, keep)
    clean_copy = plan_copy(path, data) if write else None
    return data, clean_copy


def plan_copy(path, data):
    """(folder, {split: rows}) of a clean copy beside the file. Raises UserError."""
    file = pathlib.Path(path)
    if not file.exists():
        raise UserError(f"--write puts a copy beside a file, and --data {path} is no file")
    folder = file.with_name(file.stem + "-clean")
    kept = clean({split: part.rows for split, part in data.items()})
    for split, rows in kept.items():
        if not rows:
            raise UserError(f"--write would leave {split} empty: {path} has too few different rows to split")
    if folder.exists():
        raise UserError(f"{folder} exists; move it away, and --write can make it anew")
    return folder, kept


def clean(splits):
    """{split: rows} without repeated rows and without rows whose prompt is in a later split; test is last."""
    kept = {}
    held_out = set()                                    # the prompts of the splits done so far
    for split in ("test", "valid", "train"):
        first = {}
        for row in splits[split]:
            first.setdefault(formats.row_json(row), row)
        kept[split] = [row for row in first.values() if formats.prompt_key(row) not in held_out]
        held_out.update(formats.prompt_key(row) for row in kept[split])
    return {split: kept[split] for split in splits}


def write_copy(folder, splits):
    folder.mkdir()
    for split, rows in splits.items():
        with atomic(folder / f"{split}.jsonl") as f:
            f.writelines(formats.row_json(row.get("record", row)).encode() + b"\n" for row in rows)


# ------------------------------------------------------------------------------------------------- the counts

def percent(part, whole):
    return f"{part / max(whole, 1):.1%}"


def count_names(rows):
    """[(name, count)] of the rows' labels, thumbs or types of entities, the commonest first; else []."""
    counts = collections.Counter()
    for row in rows:
        if "completion" in row:
            counts["good" if row["label"] else "bad"] += 1
        elif "label" in row:
            counts[row["label"]] += 1
        elif "tags" in row:
            counts.update(name for name, *_ in spans(row["tags"]))
    return counts.most_common()


def ambiguous_prompts(rows):
    """How many prompts have several answers."""
    answers = collections.defaultdict(set)
    for row in rows:
        answers[formats.prompt_key(row)].add(formats.row_json(row))
    return sum(len(some) > 1 for some in answers.values())


def length_of(example):
    """The tokens of an example; of a preference with its longest answer."""
    if isinstance(example, (Ranking, Thumbs)):
        return len(example.prompt) + max(map(len, example.answers))
    return size(example)


def count_tokens(ctx, rows, row_type):
    """(tokens of each row, number of targets). The targets are None for row types without one answer."""
    if row_type == "text":
        return [len(ctx.text.tokenizer.encode(row["text"])) for row in rows], None
    if row_type == "prompt":
        return [len(ctx.text.prompt_ids(row)) for row in rows], None
    examples, _ = ctx.text.encode(rows, NO_LIMIT)
    lengths = [length_of(example) for example in examples]
    if row_type in ("chat", "label"):
        return lengths, sum(map(targets, examples))
    return lengths, None


def print_counts(ctx, data, row_type):
    """Print a line for each split.

    Returns ({split: tokens of each row}, share of targets or None, repeated rows, leaked rows).
    """
    lengths = {}
    lines = {}
    supervised = 0
    repeated = 0
    leaked = 0
    for split, part in data.items():
        lengths[split], count = count_tokens(ctx, part.rows, row_type)
        supervised = None if count is None else supervised + count
        leaks = 0 if split == "train" else formats.leaks(data["train"].rows, part.rows)
        repeats = formats.duplicates(part.rows)
        repeated += repeats
        leaked += leaks
        percentiles = np.percentile(lengths[split], (0, 50, 90, 99, 100), method="higher")
        numbers = [len(part.rows), repeats, leaks, sum(lengths[split]), *percentiles]
        lines[split] = [f"{n:,}" for n in numbers]
    print_columns([Column("", list(lines)), *(Column(head, [line[i] for line in lines.values()])
                                              for i, head in enumerate(COLUMNS))], markdown=False)
    if supervised is None:
        return lengths, None, repeated, leaked
    total = sum(map(sum, lengths.values()))
    print_result(f"supervised: {percent(supervised, total)} of the tokens, {supervised:,} of {total:,}")
    return lengths, supervised / total, repeated, leaked


# ------------------------------------------------------------------------------------------------- the advice

def usable_shots(ctx, data, row_type):
    """How many solved examples, 4 at most, can stand in front of every one of the first test questions."""
    if row_type not in ROW_TYPES_WITH_SHOTS or ctx.text.classifier != "lm":
        return 0
    shots = data["train"].rows[:SHOTS]
    return min(fit_shots(ctx, row, shots)[1] for row in data["test"].rows[:SHOTS])


def advice_on_rows(train, row_type, repeated, leaked, shots):
    """Sentences about repeated, leaked, ambiguous and too few rows.

    train: the rows of that split. shots: the largest --shots that the task and the context take, 0 without.
    """
    parts = []
    if repeated:
        parts.append(f"{repeated:,} rows repeat another row of their split")
    if leaked:
        parts.append(f"{leaked:,} rows of valid and test have a prompt of train, so test scores are too high")
    if parts:
        yield "; ".join(parts) + ": --write makes a copy without them"
    against = formats.outvoted(train)
    if against:
        yield (f"{len(against)} pairs have more votes against chosen than for it ({against[0]['line']} is the "
               "first): swap them, or drop them")
    if row_type in ("chat", "label"):
        ambiguous = ambiguous_prompts(train)
        if ambiguous:
            yield f"{ambiguous} prompts have several answers; a model can give only one of them"
    if len(train) < FEW_ROWS and row_type != "text":
        compare = f"compare with --method none --shots {shots}; " if shots else ""
        yield f"{len(train)} training rows are few: {compare}use several seeds"


def advice_on_names(names, rows, row_type):
    """Sentences about labels or entity types. names: of count_names."""
    if names and row_type == "label":
        share = names[0][1] / len(rows)
        if share > 1.5 / len(names):
            yield (f"always answering {names[0][0]!r} is correct in {share:.1%}: compare with that, and use "
                   "macro F1 instead of accuracy")
    rare = [name for name, count in names if count < FEW_OF_A_LABEL]
    if rare:
        yield (f"fewer than {FEW_OF_A_LABEL} training rows each for {', '.join(rare[:8])}: add rows, or "
               "merge labels")


def advice_on_lengths(lengths, row_type, block_size, supervised, seconds):
    """Sentences about rows that are cut, prompts that are long, and training that is long."""
    long = sum(n > block_size for n in lengths["train"])
    if long and row_type != "text":
        yield (f"{long:,} of {len(lengths['train']):,} training rows exceed {block_size} tokens and are "
               "truncated: shorten them, or use a model with a longer context")
    if supervised is not None and supervised < 0.05 and row_type == "chat":
        yield f"only {supervised:.1%} of the tokens are answers: shorter prompts would make training faster"
    if seconds is not None and seconds > LONG_SECONDS:
        yield f"{format_seconds(seconds)} is long: try --steps 100 first, or --layers for the upper half only"


# ------------------------------------------------------------------------------------------------ the command

def examine(ctx, cfg, data, command, estimate=None, clean_copy=None, takes_shots=False):
    """Print the counts, the estimate and the advice, and write the clean copy. Returns 0.

    ctx, cfg     of the task that the rows are for; read are cfg.task, data and block_size
    data         as load_for_check returns it
    command      the command line that the estimate is for
    estimate     estimate() prints what that command takes, and returns a forecast.Forecast; None without one
    clean_copy   as load_for_check returns it
    takes_shots  whether the task has a baseline with solved examples in front of a question

    Sets ctx.text.labels for rows with labels or tags.
    """
    row_type = data["train"].row_type
    train = data["train"].rows
    print_result(f"{cfg.data}: {data['train'].format}; {row_type} rows, for --task {cfg.task}")
    for split, part in data.items():
        print_result(fit(f"{split:8}from {'; '.join([part.source, *part.count_dropped()])}", sys.stdout))
    names = count_names(train)
    if row_type in ("label", "tags"):
        ctx.text.labels = formats.label_names([row for part in data.values() for row in part.rows])
    print_result()
    lengths, supervised, repeated, leaked = print_counts(ctx, data, row_type)
    if names:
        total = sum(count for _, count in names)
        shares = [f"{name} {n:,} ({percent(n, total)})" for name, n in names[:12]]
        print_wrapped("balance:  " + "  ".join(shares))
    seconds = None
    steps = 0
    # before the estimate changes the model
    shots = usable_shots(ctx, data, row_type) if takes_shots else 0
    print_result("\n" + command)
    if estimate is not None:
        forecast = estimate()
        seconds = forecast.total()[1]
        steps = forecast.steps
    else:
        print_result(f"there is no forecast for --task {cfg.task}")
    block_size = ctx.block_size(cfg.get("block_size"))
    advice = [*advice_on_rows(train, row_type, repeated, leaked, shots), *advice_on_names(names, train, row_type),
              *advice_on_lengths(lengths, row_type, block_size, supervised, seconds)]
    advice += filter(None, [advice_on_steps(cfg, steps)])
    print_result()
    for line in advice or ["nothing to change"]:
        print_wrapped(f"- {line}")
    if clean_copy is not None:
        write_copy(*clean_copy)
        print_result(f"\nclean copy: {clean_copy[0]}")
    return 0
