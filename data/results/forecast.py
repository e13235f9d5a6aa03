"""data/results/forecast.py: how long a command will take, measured on a sample of what it does.

    training     micro-batches of its first steps, forward and backward: seconds per token x tokens of all
                 steps; an optimiser step: seconds x steps. With a trunk (data/results/trunk.py), from there on
    other parts  the evaluations before, during and after training, and what a task prepares (Part): seconds
                 for each of a few items, spread over all of them, x items

A number is a range (low, high), in seconds. Training: 2 standard errors around the mean of the micro-batches,
at least 10 %. Parts: what one more item took, in a larger batch, and at most half of the mean if that is more;
of a single measurement, half of it and all. Answers after training are at best as long as the references, at
worst as long as those of the untrained model. Not included are reading files, loading, encoding and saving.

All measurements together take about BUDGET seconds; a single micro-batch or item may take longer.

Public: Part, Forecast, BUDGET, evaluation_interval, valid_evaluations, evaluation_part, other_parts,
trunk_part, forgetting_part, measure_training, measure_parts, describe_model, describe_pass, advice_on_steps,
format_range, print_forecast
"""
import math
import time
from dataclasses import replace
from typing import Callable, NamedTuple

import torch

from data.batches.examples import size, targets
from data.batches.few_shot import parse_shots
from data.batches.row_types import row_type_of
from data.results.evaluate import mean_loss
from data.results.layout import print_wrapped
from data.results.trunk import Trunk
from data.runtime.progress import Progress, format_seconds
from data.runtime.run_folder import print_result

BUDGET = 20.0                                           # seconds
FEW_STEPS = 10
FIRST_ITEMS = 1


def as_they_are(items):
    return items


class Part(NamedTuple):
    """Something that a run does with items, besides its steps."""
    what: str                                           # for people
    items: list                                         # to measure on
    count: int                                          # items that the run does this with
    work: Callable                                      # (some items) -> anything
    after: int = 0                                      # more items, after training has begun
    at_best: Callable = None                            # work, as it may be then; None: the same
    prepare: Callable = as_they_are                     # some items -> what work takes; not timed


class Forecast(NamedTuple):
    """What is printed. Ranges are (low, high) in seconds."""
    steps: int
    tokens: int
    training: tuple
    parts: dict                                         # {text: range}
    data_pass: str = ""                                 # see describe_pass

    def total(self):
        ranges = [self.training, *self.parts.values()]
        return tuple(sum(side) for side in zip(*ranges))


# ------------------------------------------------------------------------------------- what a run does
# ctx, cfg, task (its record), rows and examples {split: list}: as the supervised loop of train.py has them.

def evaluation_interval(cfg, steps):
    """Steps between evaluations on valid, in a run of so many."""
    return cfg.eval_every or max(1, math.ceil(steps / 4))


def valid_evaluations(cfg, steps):
    """How often a run of so many steps is measured on valid, if --patience does not end it."""
    return math.ceil(steps / evaluation_interval(cfg, steps))


def evaluation_part(ctx, cfg, task, rows, examples, steps):
    """The evaluations on test and valid, as a Part of items (row, example). steps: 0 without training."""
    row_type = row_type_of(rows["test"][0]).name
    is_text = row_type == "text"
    test = rows["test"][:1] * len(examples["test"]) if is_text else rows["test"]
    shots = [rows["train"][:n] for n in parse_shots(cfg.get("shots", "0"), row_type, ctx.text.classifier)]
    what = f"{len(test)} test {'windows' if is_text else 'items'}"
    count = len(test) * len(shots)
    after = 0
    at_best = None
    if steps:
        times = valid_evaluations(cfg, steps)
        valid = len(examples["valid"])
        after = len(test) + times * valid
        count *= task.baseline_metrics
        what += f" {'before and ' if count else ''}after training, {valid} of valid {times} times"
        if task.next_tokens:                            # a tuned model ends its answers
            longest = max(map(targets, examples["test"]))
            brief = replace(ctx, max_new_tokens=min(longest, ctx.max_new_tokens))
            at_best = evaluation_of(brief, cfg, task, shots)
        elif ctx.trunk and task.reads_before:           # which keeps what test and valid pass through
            at_best = evaluation_of(ctx, cfg, task, shots)

    def prepare(pairs):
        if not task.prepare:
            return pairs
        some, encoded = zip(*pairs)
        return list(zip(some, task.prepare(ctx, cfg, list(encoded))))
    items = list(zip(test, examples["test"]))
    return Part(what, items, count, evaluation_of(replace(ctx, trunk=None), cfg, task, shots), after, at_best,
                prepare)


def evaluation_of(ctx, cfg, task, shots):
    """(some pairs of row and example) -> None: what the task measures on them, behind each list of shots."""
    def work(pairs):
        some, encoded = map(list, zip(*pairs))
        for solved in shots:
            task.evaluate(ctx, cfg, some, encoded, solved)
    return work


def other_parts(ctx, cfg, task, rows, examples, feed, steps):
    """What a task computes before the first of `steps` steps, as Parts."""
    parts = []
    if task.begin:
        count = len(rows["valid"])
        parts.append(Part(f"{count} of valid before training", rows["valid"], count,
                          lambda some: task.begin(ctx, cfg, {"valid": some})))
    if task.prepare:
        tests = 1 + task.baseline_metrics                       # before and after training
        used = len(feed.used(steps))
        valid = len(examples["valid"])
        test = len(examples["test"])
        count = used + valid + tests * test
        twice = " twice" if tests == 2 else ""
        what = (f"{counted(count, 'example')} prepared ({used:,} of train, {valid:,} of valid, "
                f"{test:,} of test{twice})")
        parts.append(Part(what, examples["train"], count,
                          lambda some: task.prepare(with_empty_trunk(ctx), cfg, some)))
    return parts


def trunk_part(ctx, examples):
    """What a Trunk reads before the first step, as a Part."""
    what = f"{counted(len(examples), 'example')} through blocks 0 to {ctx.trunk.layer - 1}, once"
    return Part(what, examples, len(examples), lambda some: with_empty_trunk(ctx).trunk.read(ctx, some))


def with_empty_trunk(ctx):
    """A context that knows no example yet: a measurement does not profit from the one before."""
    return replace(ctx, trunk=ctx.trunk and Trunk(ctx.trunk.layer))


def forgetting_part(ctx, examples):
    """The loss on other text, before and after, as a Part."""
    return Part("forgetting, before and after", examples, 2 * len(examples),
                lambda some: mean_loss(ctx, some))


# ----------------------------------------------------------------------------------------------- measurements

def measure_training(ctx, feed, steps, params, optimizer, loss, prepare, budget):
    """The range of the seconds of `steps` steps; the parameters change.

    params    trainable ones             optimizer   of them
    loss      (micro-batch, past) -> summed loss
    prepare   micro-batch -> what loss takes; not timed
    """
    batches = []                                        # (seconds, tokens) of each micro-batch
    updates = []                                        # seconds of each optimiser step
    began = time.monotonic()
    ctx.train()
    with Progress("measuring training steps"):
        for step in range(min(steps, 4)):
            for micro_batch in feed(step):
                if batches and time.monotonic() - began > budget:
                    break
                batches.append(timed_backward(ctx, prepare(micro_batch), params, loss))
            updates.append(timed_update(optimizer, params))
            if time.monotonic() - began > budget:
                break
    ctx.train(False)
    if not batches:
        return 0.0, 0.0
    rate, error = rate_of(batches[1:] or batches)       # the first one warms up
    update = min(updates)
    tokens = feed.tokens(steps)
    return tokens * (rate - error) + steps * update, tokens * (rate + error) + steps * update


def timed_backward(ctx, micro_batch, params, loss):
    """(seconds, tokens) of a forward and a backward."""
    began = time.monotonic()
    with ctx.autocast():
        loss(micro_batch, ctx.past()).backward()
    wait_for(params)
    return time.monotonic() - began, sum(map(size, micro_batch))


def timed_update(optimizer, params):
    began = time.monotonic()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    wait_for(params)
    return time.monotonic() - began


def wait_for(params):
    """Until a GPU has done what it was given."""
    with torch.no_grad():
        params[0].sum().item()


def rate_of(batches):
    """(seconds per token, its error) from (seconds, tokens) of micro-batches: a ratio of sums, and 2 standard
    errors of it, at least 10 %."""
    seconds = sum(s for s, _ in batches)
    tokens = sum(n for _, n in batches)
    rate = seconds / tokens
    if len(batches) == 1:
        return rate, 0.25 * rate
    spread = sum((s - rate * n) ** 2 for s, n in batches) * len(batches) / (len(batches) - 1)
    return rate, min(0.5 * rate, max(0.1 * rate, 2 * math.sqrt(spread) / tokens))


def measure_parts(parts, budget):
    """{what: range of the seconds} of the parts that have items."""
    some = [part for part in parts if part.items and part.count + part.after]
    end = time.monotonic() + budget
    measured = {}
    for number, part in reversed(list(enumerate(some, 1))):     # the evaluations come first, and get what is left
        measured[part.what] = measure_part(part, (end - time.monotonic()) / number)
    return {part.what: measured[part.what] for part in some}


def measure_part(part, budget):
    """The range of the seconds of a part."""
    with Progress(f"measuring {part.what}"):
        low, high = seconds_per_item(part, part.work, budget)
        lowest = low
        if part.at_best is not None:
            lowest = min(low, seconds_per_item(part, part.at_best, budget)[0])
    return part.count * low + part.after * lowest, (part.count + part.after) * high


def seconds_per_item(part, work, budget):
    """(low, high): work(some of the items) for more and more of them, as long as `budget` seconds allow."""
    items = part.items
    count = before = 0
    spent = 0.0
    n = FIRST_ITEMS
    while True:
        sample = part.prepare(items[::max(1, len(items) // n)][:n])
        began = time.monotonic()
        work(sample)
        seconds = time.monotonic() - began
        spent += seconds
        one_more = max(0.0, (seconds - before) / (len(sample) - count))     # a batch has costs of its own
        is_first = count == 0
        count = len(sample)
        before = seconds
        needed = 3 * seconds if is_first else spent + seconds + 3 * count * one_more
        if count == len(items) or needed > budget:
            break
        n *= 4
    mean = seconds / count
    if count == len(items):
        return mean, mean
    if is_first:
        return mean / 2, mean
    rest = len(items) - count
    high = (seconds + rest * max(one_more, mean / 2)) / len(items)
    return min(high, max(one_more, seconds / len(items))), high


# ----------------------------------------------------------------------------------------------- for people

def describe_model(name, config):
    """A model in one line: its name, family and shape."""
    return (f"model: {name} ({config.family}, {config.n_layer} layers of width {config.n_embd}, "
            f"a context of {config.block_size:,} tokens)")


def counted(n, what):
    """"1 step", "1,200 steps"."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def describe_pass(cfg, steps_per_epoch):
    """How many steps a pass over the training data has, and how many passes --epochs makes."""
    passes = f"; --epochs {cfg.epochs:g}" if cfg.get("steps") is None else ""
    return f"a pass over the training data: {counted(steps_per_epoch, 'step')}{passes}"


def advice_on_steps(cfg, steps):
    """A sentence about a run of so few steps that it cannot learn; "" for others, and without training."""
    if not 0 < steps < FEW_STEPS:
        return ""
    remedy = "raise --epochs, or lower --batch" if cfg.get("steps") is None else "raise --steps"
    teach = "1 step teaches" if steps == 1 else f"{steps} steps teach"
    return f"{teach} a model next to nothing: {remedy}"


def format_range(seconds):
    low, high = map(format_seconds, seconds)
    if low == high:
        return low
    if low.split()[1] == high.split()[1]:
        return f"{low.split()[0]}-{high}"
    return f"{low} - {high}"


def print_forecast(forecast, batch, device):
    """Print steps, tokens and seconds of a run."""
    if forecast.steps:
        middle = sum(forecast.training) / 2
        print_wrapped(f"{counted(forecast.steps, 'step')} of {counted(batch, 'example')}, "
                      f"{counted(forecast.tokens, 'token')}; "
                      f"{forecast.tokens / max(middle, 1e-9):,.0f} tokens a second on {device}")
        if forecast.data_pass:
            print_result(f"  {forecast.data_pass}")
        print_result(f"  training: {format_range(forecast.training)}")
    for text, seconds in forecast.parts.items():
        print_wrapped(f"{text}: {format_range(seconds)}", "  ")
    print_result(f"in all about {format_range(forecast.total())}")
