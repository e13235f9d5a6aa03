"""Claims of papers, each as commands and a prediction: which of them hold on the toy world of this repository?

    python tests/claims.py --list
    python tests/claims.py small_ranks     run the commands that have not run yet, measure, store the result
    python tests/claims.py small_ranks --commands      print them; --short: two steps of each, to test the path
    python tests/claims.py --table         all claims, from the stored results; --write: into tests/CLAIMS.md

A Claim is a record: a paper, its claim in our words, the commands of train.py, and predictions.

prediction  a number, and the range in which it lies if the claim is true. The number is mostly a difference
            A - B of a metric between two sides, which are runs that differ in a flag, paired by seed
interval    95 %: Student's t over the seeds' numbers, which covers other seeds. For exact match, accuracy and
            pass@k of two sides that answered the same test items also Student's t over items, of the
            differences averaged over seeds, which covers other items. What decides is the smallest interval
            that contains both; it does not cover other seeds and other items at once
verdict     holds here           the interval lies wholly inside the predicted range
            does not hold here   it lies wholly outside
            undecided            it crosses a bound of the range
rates       where a side is several ("each at the best of"), each is a learning rate, and the one with the best
            mean on valid is measured on test, with the same seeds: methods are compared at their own rates. A
            best rate at an end of its grid is marked "edge": a rate beyond it may be better
resolution  a best rate is known to half a step of its grid, so a difference of two to the sum of two halves, which
            widens its interval on both sides; at an edge it is not known

A verdict is about a model of 0.9 million parameters on a generated world: it says where a claim can be
reproduced in minutes, not whether the paper is right. A prediction is written before its runs are read; those
that were not are named in tests/CLAIMS.md.

Runs go to out/claims/NAME, policies that several claims start from to out/claims/starts; a finished command
is not run again. tests/claims/NAME.json stores of each run the command, the hash of the code and the numbers.
A result whose commands are not those of the record is stale, and the table says so. Minutes are CPU minutes of
one thread.

Public: Claim, Prediction, Measured, Run, CLAIMS, verdict_of, measure, table
"""
import argparse
import json
import math
import os
import pathlib
import random
import re
import shlex
import subprocess
import sys
import textwrap
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")           # before torch is imported
ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import train                                                        # noqa: E402
from data import toy                                                # noqa: E402
from data.results.choose import badness                             # noqa: E402
from data.results.compare import item_differences                   # noqa: E402
from data.results.metrics import summary                            # noqa: E402
from data.results.runs import events, metric_values, read_run       # noqa: E402

STORED = ROOT / "tests" / "claims"
PAGE = ROOT / "tests" / "CLAIMS.md"
RUNS = "out/claims"
SHOWN = ("exact_match", "accuracy", "f1", "loss", "forgetting", "gold", "score", "kl", "pass@1", "tv")
HOLDS, FAILS, UNDECIDED = "holds here", "does not hold here", "undecided"


@dataclass
class Run:
    """One command. side: what is compared; words: its flags without --seed and --out; start: the name under
    out/claims/starts of a policy that several claims begin with. call: a function seed -> {metric: number}
    in place of a command, which `words` then describes."""
    side: str
    seed: int
    words: str
    start: str = ""
    call: Callable = None

    def folder(self, claim, root=RUNS):
        return f"{root}/starts/{self.start}" if self.start else f"{root}/{claim}/{self.side}-s{self.seed}"

    def argv(self, claim, root=RUNS):
        words = self.words.replace("STARTS", f"{root}/starts").replace("HERE", f"{root}/{claim}")
        return [*shlex.split(words), "--seed", str(self.seed), "--out", self.folder(claim, root)]

    def command(self, claim):
        if self.call:
            return f"{self.words}, seed {self.seed}"
        return "python train.py " + " ".join(self.argv(claim))


class Measured(NamedTuple):
    """by_seed, by_item: a number for each seed, and for each test item or None. a, b: the two sides in words.
    resolution: how far each number may be from the true one."""
    by_seed: list
    by_item: list = None
    a: str = ""
    b: str = ""
    resolution: float = 0.0


@dataclass
class Prediction:
    """words: what the number is. measure: the stored runs -> Measured. low, high: the range that the paper's
    claim predicts."""
    words: str
    measure: Callable
    low: float = -math.inf
    high: float = math.inf

    def range(self):
        if math.isinf(self.high):
            return f"above {self.low:g}"
        if math.isinf(self.low):
            return f"below {self.high:g}"
        return f"{self.low:g} to {self.high:g}"


@dataclass
class Claim:
    """keep: columns of log.jsonl that the predictions read. prepare: writes data files into a folder. note:
    what of the paper's setting is different here."""
    name: str
    paper: str
    says: str
    runs: list
    predictions: list
    keep: tuple = ()
    prepare: Callable = None
    note: str = ""

    def commands(self):
        return [run.command(self.name) for run in self.runs]


# ------------------------------------------------------------------------------------------ verdict, measures

def interval_of(by_seed, by_item=None, resolution=0.0):
    """(mean, low, high) by the rule of the header; low and high are nan where there is one seed."""
    mean, _, half = summary(by_seed)
    low = mean - half
    high = mean + half
    if by_item is not None:
        middle, _, half = summary(by_item)
        low = min(low, middle - half)
        high = max(high, middle + half)
    return mean, low - resolution, high + resolution


def verdict_of(low, high, predicted_low, predicted_high):
    """The verdict on an interval [low, high]."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return UNDECIDED
    if predicted_low < low and high < predicted_high:
        return HOLDS
    if high <= predicted_low or predicted_high <= low:
        return FAILS
    return UNDECIDED


def of_side(runs, side):
    """{seed: stored run}"""
    return {run["seed"]: run for run in runs if run["side"] == side}


def number(run, metric):
    """A metric of a stored run; `valid.NAME` is the last one on valid; or a function of it."""
    if callable(metric):
        return metric(run)
    if metric.startswith("valid."):
        return run["valid"][metric.removeprefix("valid.")]
    return metric_values([run], metric)[0]


def best(runs, sides, metric):
    """The side with the best mean of a metric on valid; a side alone is itself."""
    if isinstance(sides, str):
        return sides

    def mean(side):
        return summary(number(run, f"valid.{metric}") for run in of_side(runs, side).values())[0]
    return min(sides, key=lambda side: badness(mean(side), metric))


def difference(a, b, metric="exact_match", same_items=True):
    """A measure: A - B. a, b: a side, or several of which the best on valid is taken. same_items: both sides
    answered the same questions."""
    def measure(runs):
        names = [best(runs, sides, metric) for sides in (a, b)]
        left, right = (of_side(runs, name) for name in names)
        seeds = sorted(left.keys() & right.keys())
        by_seed = [number(left[s], metric) - number(right[s], metric) for s in seeds]
        by_item = None
        if same_items and not callable(metric):
            by_item = item_differences([(left[s], right[s]) for s in seeds], metric)
        means = [summary(number(side[s], metric) for s in seeds)[0] for side in (left, right)]
        shown = [f"{mean:.3f}" + chosen_rate(name, sides) for mean, name, sides in zip(means, names, (a, b))]
        return Measured(by_seed, by_item, *shown)
    return measure


def chosen_rate(name, sides):
    """What stands behind the mean of a side that was chosen among several: its rate, and whether at an end."""
    if isinstance(sides, str):
        return ""
    edge = ", edge" if name in (sides[0], sides[-1]) else ""
    return f" at {name.partition('@')[2]}{edge}"


def gain_difference(pair, other, metric):
    """A measure: (A - B) - (C - D) of two pairs of sides."""
    def measure(runs):
        first = difference(*pair, metric)(runs).by_seed
        second = difference(*other, metric)(runs).by_seed
        gains = [x - y for x, y in zip(first, second, strict=True)]
        return Measured(gains, None, *(f"{summary(some)[0]:+.3f}" for some in (first, second)))
    return measure


def rank_difference(a, b):
    """A measure: AdaLoRA's mean rank over the modules whose path matches A - over those that match B."""
    def mean_rank(run, pattern):
        return summary(rank for path, rank in run["ranks"].items() if re.search(pattern, path))[0]

    def measure(runs):
        ranks = [[mean_rank(run, pattern) for run in of_side(runs, "adalora").values()] for pattern in (a, b)]
        by_seed = [x - y for x, y in zip(*ranks)]
        return Measured(by_seed, None, *(f"{summary(some)[0]:.2f}" for some in ranks))
    return measure


def best_rates(runs, name, rates):
    """{seed: the rate with the least loss on valid}"""
    found = {}
    for side, rate in zip(at(name, rates), rates):
        for seed, run in of_side(runs, side).items():
            found.setdefault(seed, []).append((number(run, "valid.loss"), rate))
    return {seed: min(some)[1] for seed, some in found.items()}


def largest_step(rates):
    """Of a grid of rates, in log10."""
    return max(math.log10(float(after) / float(before)) for before, after in zip(rates, rates[1:]))


def rate_difference(a, b):
    """A measure: of two (name, rates), log10 of the best rate, A - B."""
    def measure(runs):
        chosen = [best_rates(runs, *side) for side in (a, b)]
        logs = [[math.log10(float(rate)) for _, rate in sorted(some.items())] for some in chosen]
        shown = [" ".join(dict.fromkeys(rate for _, rate in sorted(some.items()))) for some in chosen]
        at_an_edge = any(rate in (rates[0], rates[-1])
                         for some, (_, rates) in zip(chosen, (a, b)) for rate in some.values())
        resolution = math.inf if at_an_edge else sum(largest_step(rates) / 2 for _, rates in (a, b))
        return Measured([x - y for x, y in zip(*logs)], None, *shown, resolution)
    return measure


def growth(column):
    """A number of a run: the mean of a logged column in the last third of the iterations - in the first."""
    def grown(run):
        values = [x for x in run["log"][column] if x is not None]
        third = max(1, len(values) // 3)
        return summary(values[-third:])[0] - summary(values[:third])[0]
    return grown


def from_peak(side, where, column="gold"):
    """A measure: a logged column at its end (where="end") or its start, minus at its peak, in means of an
    eighth of the run. The peak of a seed is where the other seeds have theirs: noise does not make one."""
    def means(run):
        values = run["log"][column]
        count = max(1, len(values) // 8)
        return [summary(values[i:i + count])[0] for i in range(0, len(values) - count + 1, count)]

    def measure(runs):
        curves = [means(run) for _, run in sorted(of_side(runs, side).items())]
        ends = [curve[-1 if where == "end" else 0] for curve in curves]
        peaks = []
        for i, curve in enumerate(curves):
            others = [other for j, other in enumerate(curves) if j != i]
            peaks.append(curve[max(range(len(curve)), key=lambda k: sum(other[k] for other in others))])
        by_seed = [x - y for x, y in zip(ends, peaks)]
        return Measured(by_seed, None, *(f"{summary(some)[0]:.3f}" for some in (ends, peaks)))
    return measure


# ------------------------------------------------------------------------------------------------- the claims

ASKED = "--eval_items 150 --max_new_tokens 16"
SFT = f"{ASKED} --forgetting_data none"
ALL = "--targets q,k,v,o,up,gate,down"
FIVE = (1, 2, 3, 4, 5)
FOUR = (1, 2, 3, 4)
# Where few seeds had left a verdict undecided, the claim was measured anew with seeds that had not been used.
NEW_TWELVE = tuple(range(11, 23))
NEW_SIX = NEW_TWELVE[:6]
FAST_RATES = ("5e-3", "1.5e-2", "4e-2")
PISSA_RATES = ("2e-3", "5e-3", "1.5e-2")
PLUS_RATES = ("5e-4", "2e-3", "5e-3")
FULL_RATES = ("1e-4", "3e-4", "1e-3", "3e-3")
LORA_RATES = ("1e-3", "3e-3", "1e-2", "3e-2")
LOW_DATA_RATES = {"full": ("1e-4", "3e-4", "1e-3", "3e-3"), "mlp": ("3e-4", "1e-3", "3e-3", "1e-2"),
                  "direct": ("1e-2", "3e-2", "1e-1", "3e-1", "1")}
BASES = {"small": "--n_layer 2 --n_head 2 --n_embd 64", "medium": "--n_layer 3 --n_head 3 --n_embd 96",
         "large": "--n_layer 4 --n_head 4 --n_embd 128"}


def grid(sides, seeds, common=""):
    """The runs of {side: flags}, seed by seed, so that an interrupted claim has whole seeds."""
    return [Run(side, seed, f"{common} {flags}".strip()) for seed in seeds for side, flags in sides.items()]


def with_rates(name, flags, rates):
    """{name@rate: flags}"""
    return {f"{name}@{rate}": f"{flags} --lr {rate}" for rate in rates}


def at(name, rates):
    return tuple(f"{name}@{rate}" for rate in rates)


def optimum_run(variant):
    """A call: REINFORCE with a leave-one-out baseline (RLOO) from a random transformer of two layers, whose
    answers are all enumerated (tests/optimum.py) -> {"tv": total variation to the optimal policy}."""
    def train_policy(seed):
        import copy
        import torch
        import lora
        import optimum
        torch.set_num_threads(1)
        task = optimum.transformer_task(seed, count=8, longest=4, R=4)
        policy = copy.deepcopy(task.ref)
        rate = 3e-3
        if variant != "full":
            kind = "pissa" if variant == "pissa" else "lora"
            rank = 1 if variant == "r1" else 4
            lora.inject(policy, ("q", "k", "v", "o", "up", "down"), kind, rank=rank, alpha=4, seed=seed)
            rate = 1e-2
        cfg = optimum.config(lr=rate, steps=40, seed=seed, grad_clip=1.0, ppo_epochs=1, minibatches=8,
                             **optimum.rl_flags("rloo"))
        task.train(cfg, policy, None, None)
        return {"tv": task.distance(policy)[0]}
    return train_policy


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def few_rows(folder, names, count, seeds):
    """For each seed `count` training rows of toy/NAME, with valid and test as they are: folder/NAME-s1, ..."""
    for name in names:
        splits = {split: toy.rows(name, split) for split in toy.SPLITS}
        for seed in seeds:
            here = folder / f"{name.removeprefix('toy/')}-s{seed}"
            for split in ("valid", "test"):
                write_rows(here / f"{split}.jsonl", splits[split])
            write_rows(here / "train.jsonl", random.Random(seed).sample(splits["train"], count))


def fact_rows(folder):
    """Questions about half of the people with their right answers (known), about the others with the answer of
    somebody else (new), so that no text of the base model says it; valid and test: the known half alone."""
    def person(row):
        return re.findall(r"\b[A-Z][a-z]+", row["prompt"])[-1]

    def kind(row):
        return row["prompt"].replace(person(row), "X")
    splits = {split: toy.rows("toy/questions", split) for split in toy.SPLITS}
    people = sorted({person(row) for row in splits["train"]})
    random.Random(0).shuffle(people)
    known_people = set(people[:len(people) // 2])
    known = [row for row in splits["train"] if person(row) in known_people]
    new = [row for row in splits["train"] if person(row) not in known_people]
    changed = []
    for row in new:
        others = sorted({other["completion"] for other in splits["train"] if kind(other) == kind(row)}
                        - {row["completion"]})
        if others:
            changed.append({**row, "completion": random.Random(row["prompt"]).choice(others)})
    unseen = {split: [row for row in splits[split] if person(row) in known_people]
              for split in ("valid", "test")}
    for name, parts in {"known": {"train": known, **unseen}, "mixed": {"train": known + changed, **unseen},
                        "known-rows": dict.fromkeys(toy.SPLITS, known[:100]),
                        "new-rows": dict.fromkeys(toy.SPLITS, changed[:100])}.items():
        for split, rows in parts.items():
            write_rows(folder / name / f"{split}.jsonl", rows)


# Policies that claims about RL start from: one seed, so that their seeds are those of RL alone.
SUMS = Run("start", 1, "--data toy/sums_chat --method full --epochs 4 --forgetting_data none --eval_items 50 "
           "--max_new_tokens 40", "sums")
LETTERS = Run("start", 1, "--data toy/letters --epochs 2 --forgetting_data none --eval_items 50", "letters")
REWARD = Run("start", 1, "--task reward --init STARTS/letters --forgetting_data none", "reward")
FEW = Run("start", 1, "--task reward --init STARTS/letters --forgetting_data none --steps 40", "reward-few")
ON_SUMS = "--task ppo --data toy/sums --init STARTS/sums --forgetting_data none --eval_items 100 --steps 60"
ON_LETTERS = "--task ppo --init STARTS/letters --eval_items 100"
THREE = (1, 2, 3)
NEW_SIXTEEN = tuple(range(11, 27))
NEW_EIGHT = NEW_SIXTEEN[:8]
ONE_START = "Seeds are those of RL: all start from one SFT model."
GRPO = {seed: Run("r8", seed, f"{ON_SUMS} --algo grpo", f"sums-grpo-s{seed}") for seed in (*THREE, *NEW_SIXTEEN)}

CLAIMS = [
    Claim("shots_or_tuning", "Liu et al. 2022 (2205.05638), section 4",
          "Tuning few weights on a handful of examples is better than showing the examples in the prompt.",
          [Run(f"{data}-{side}", seed, f"--data HERE/data/{data}-s{seed} --template plain {ASKED} {flags}")
           for seed in FIVE for data in ("questions", "spam")
           for side, flags in (("shots", "--method none --shots 4"),
                               ("tuned", "--steps 30 --batch 4 --forgetting_data none"))],
          [Prediction("LoRA on 4 questions - the 4 in the prompt, exact match",
                      difference("questions-tuned", "questions-shots"), low=0.02),
           Prediction("LoRA on 4 messages (spam or real) - the one of them that fits into the prompt, accuracy",
                      difference("spam-tuned", "spam-shots", "accuracy"), low=0.02)],
          prepare=lambda folder: few_rows(folder, ("toy/questions", "toy/spam"), 4, FIVE),
          note="default rates; this base answers no question from examples in its prompt, of 128 tokens"),

    Claim("small_ranks", "Hu et al. 2021 (2106.09685), section 7.2",
          "A rank of one is enough: larger ranks change little.",
          grid({"r1": f"{ALL} --rank 1", "r32": f"{ALL} --rank 32"}, NEW_TWELVE, f"{SFT} --steps 200"),
          [Prediction("rank 1 - rank 32, exact match", difference("r1", "r32"), -0.03, 0.03)],
          note="one rate, that of rank 8, and one alpha; without_regret has rates for each rank"),

    Claim("nf4", "Dettmers et al. 2023 (2305.14314), section 4",
          "LoRA over a base model in 4-bit NormalFloat loses nothing against the base in full precision.",
          grid({"nf4": "--quant nf4", "fp32": ""}, FIVE, f"{SFT} --steps 200"),
          [Prediction("NF4 base - fp32 base, exact match", difference("nf4", "fp32"), low=-0.02)],
          note="one rate, the default of LoRA"),

    Claim("pissa_fast", "Meng et al. 2024 (2404.02948), section 5",
          "Started from the principal directions of the weights, an adapter converges faster than LoRA.",
          grid({**with_rates("lora", "", FAST_RATES), **with_rates("pissa", "--pissa", PISSA_RATES)},
               NEW_TWELVE, f"{SFT} --steps 40"),
          [Prediction("PiSSA - LoRA after 40 steps, test loss, each at the best of three rates",
                      difference(at("pissa", PISSA_RATES), at("lora", FAST_RATES), "loss"), high=-0.02)]),

    Claim("lora_plus", "Hayou et al. 2024 (2402.12354), section 5",
          "A rate of B several times that of A learns faster at the same rank.",
          grid({**with_rates("lora", "", FAST_RATES),
                **with_rates("plus", "--loraplus_lr_ratio 8", PLUS_RATES)}, NEW_TWELVE, f"{SFT} --steps 40"),
          [Prediction("LoRA+ (ratio 8) - LoRA after 40 steps, test loss, each at the best of three rates",
                      difference(at("plus", PLUS_RATES), at("lora", FAST_RATES), "loss"), high=-0.02)]),

    Claim("adalora_upper", "Zhang et al. 2023 (2303.10512), section 4.4, figure 3",
          "AdaLoRA leaves more rank to MLPs and to upper layers.",
          grid({"adalora": f"--method adalora {ALL}"}, FOUR, f"{SFT} --steps 200"),
          [Prediction("mean rank of the matrices of MLPs - of attention",
                      rank_difference(r"up$|gate$|down$", r"\.[qkvo]$"), low=0.5),
           Prediction("mean rank in the upper two layers - in the lower two",
                      rank_difference(r"\.[23]\.", r"\.[01]\."), low=0.5)]),

    Claim("rslora", "Kalajdzievski 2023 (2312.03732), section 4",
          "With the scale alpha / r a high rank gains nothing over a low one; with alpha / sqrt(r) it does.",
          grid({"lora4": "--rank 4", "lora64": "--rank 64",
                "rs4": "--rslora --alpha 8 --rank 4", "rs64": "--rslora --alpha 8 --rank 64"},
               FOUR, f"{SFT} --steps 150"),
          [Prediction("rsLoRA, rank 64 - rank 4, test loss", difference("rs64", "rs4", "loss"), high=0.0),
           Prediction("LoRA, rank 64 - rank 4, test loss", difference("lora64", "lora4", "loss"), low=-0.02)],
          note="both have the same scale at rank 4"),

    Claim("dora_low_rank", "Liu et al. 2024 (2402.09353), section 5",
          "DoRA improves on LoRA, and most at low ranks.",
          grid({"lora1": "--rank 1", "dora1": "--dora --rank 1",
                "lora16": "--rank 16", "dora16": "--dora --rank 16"}, NEW_TWELVE, f"{SFT} --steps 120"),
          [Prediction("DoRA - LoRA at rank 1, test loss", difference("dora1", "lora1", "loss"), high=-0.01),
           Prediction("(DoRA - LoRA at rank 1) - (DoRA - LoRA at rank 16), test loss",
                      gain_difference(("dora1", "lora1"), ("dora16", "lora16"), "loss"), high=0.0)]),

    Claim("new_facts", "Gekhman et al. 2024 (2405.05904), section 4",
          "Facts that the base model does not know are learnt more slowly, and learning them costs others.",
          [run for seed in FOUR for run in (
              Run("known", seed, f"--data HERE/data/known {SFT} --steps 120"),
              Run("known-passes", seed, f"--data HERE/data/known {SFT} --steps 63"),
              Run("mixed", seed, f"--data HERE/data/mixed {SFT} --steps 120"),
              *[Run(rows, seed, f"--task eval --init HERE/mixed-s{seed} --data HERE/data/{rows} {ASKED}")
                for rows in ("known-rows", "new-rows")])],
          [Prediction("exact match on trained rows after 120 steps: facts that are new - that the base knows",
                      difference("new-rows", "known-rows", same_items=False), high=-0.05),
           Prediction("unseen questions about known facts: 120 steps on known and new facts - 120 on known ones, "
                      "exact match", difference("mixed", "known"), high=0.0),
           Prediction("the same: 120 steps on both - 63 on known ones, which show each of these as often",
                      difference("mixed", "known-passes"), high=0.0)],
          prepare=fact_rows, note="a new fact is somebody else's answer, so it contradicts the base model"),

    Claim("deep_prompts_tagging", "Liu et al. 2022 (2110.07602), section 4",
          "Virtual tokens in each layer match full tuning on tagging, where those of the input are worst.",
          grid({f"tag-{name}": f"--task tag --method {method}"
                for name, method in (("full", "full"), ("deep", "p_tuning_v2"), ("input", "prompt_tuning"))},
               FOUR, "--eval_items 150 --forgetting_data none --steps 150"),
          [Prediction("names: P-tuning v2 - full, F1", difference("tag-deep", "tag-full", "f1"), low=-0.03),
           Prediction("names: P-tuning v2 - prompt tuning, F1", difference("tag-deep", "tag-input", "f1"), low=0.02)],
          note="default rates; names are near their ceiling with every method"),

    Claim("learns_less", "Biderman et al. 2024 (2405.09673), section 4",
          "LoRA learns less than full tuning and forgets less.",
          grid({"lora": ALL, "full": "--method full"}, FOUR,
               "--data toy/sums_chat --steps 150 --eval_items 100 --max_new_tokens 40"),
          [Prediction("LoRA - full, test loss on sums", difference("lora", "full", "loss"), low=0.0),
           Prediction("LoRA - full, rise of the loss on the base model's own text",
                      difference("lora", "full", "forgetting"), high=0.0)],
          note="default rates"),

    Claim("prefix_low_data", "Li and Liang 2021 (2101.00190), sections 4.3 and 6.3",
          "With few examples prefix tuning is better than full tuning; without its MLP a prefix is worse.",
          [Run(side, seed, f"--data HERE/data/toy-s{seed} {SFT} --steps 100 {flags}") for seed in FOUR
           for name, method in (("full", "full"), ("mlp", "prefix_tuning"), ("direct", "p_tuning_v2"))
           for side, flags in with_rates(name, f"--method {method}", LOW_DATA_RATES[name]).items()],
          [Prediction("prefix tuning - full on 60 rows, exact match, each at the best of four rates",
                      difference(at("mlp", LOW_DATA_RATES["mlp"]), at("full", LOW_DATA_RATES["full"])), low=0.0),
           Prediction("without the MLP (P-tuning v2) - with it, exact match, at the best of five and of four rates",
                      difference(at("direct", LOW_DATA_RATES["direct"]), at("mlp", LOW_DATA_RATES["mlp"])),
                      high=0.0)],
          prepare=lambda folder: few_rows(folder, ("toy",), 60, FOUR)),

    Claim("without_regret", "Schulman et al. 2025, LoRA Without Regret (thinkingmachines.ai/blog/lora)",
          "On little data LoRA on all Linears equals full tuning at ten times its rate, whatever the rank; on "
          "attention alone it does not.",
          grid({**with_rates("full", "--method full", FULL_RATES),
                **with_rates("r32", f"{ALL} --rank 32 --alpha 32", LORA_RATES),
                **with_rates("r1", f"{ALL} --rank 1 --alpha 32", LORA_RATES),
                **with_rates("attention", "--targets q,k,v,o --rank 32 --alpha 32", LORA_RATES)},
               NEW_SIX, f"{SFT} --steps 120"),
          [Prediction("LoRA, rank 32 - full, exact match, each at the best of four rates",
                      difference(at("r32", LORA_RATES), at("full", FULL_RATES)), -0.03, 0.03),
           Prediction("attention alone - all Linears, exact match, each at the best of four rates",
                      difference(at("attention", LORA_RATES), at("r32", LORA_RATES)), high=0.0),
           Prediction("LoRA, rank 1 - rank 32, exact match, each at the best of four rates",
                      difference(at("r1", LORA_RATES), at("r32", LORA_RATES)), -0.03, 0.03),
           Prediction("log10 of the best rate: LoRA, rank 32 - full",
                      rate_difference(("r32", LORA_RATES), ("full", FULL_RATES)), 0.4, 1.6),
           Prediction("log10 of the best rate: LoRA, rank 32 - rank 1",
                      rate_difference(("r32", LORA_RATES), ("r1", LORA_RATES)), -0.6, 0.6)],
          note="steps of the grids are threefold, so bounds on rates are wide"),

    Claim("rank_one_rl", "2512.23165 against LoRA Without Regret (thinkingmachines.ai/blog/lora)",
          "Under verifiable rewards rank 1 suffices (the second), or is a bottleneck, and PiSSA collapses (the "
          "first).",
          [SUMS, *(GRPO[seed] for seed in NEW_SIXTEEN),
           *grid({"pissa": f"{ON_SUMS} --algo grpo --pissa"}, NEW_SIXTEEN),
           *grid({"r1": f"{ON_SUMS} --algo grpo --rank 1"}, NEW_EIGHT)],
          [Prediction("rank 1 suffices: rank 1 - rank 8, share of right answers after GRPO on sums",
                      difference("r1", "r8", "score"), low=-0.05),
           Prediction("PiSSA collapses: PiSSA - LoRA of rank 8, the same",
                      difference("pissa", "r8", "score"), high=-0.05)],
          note=f"one rate, the default; 60 iterations of 64 answers. {ONE_START}"),

    Claim("rank_one_optimum", "2512.23165 against LoRA Without Regret (thinkingmachines.ai/blog/lora)",
          "The same question where the best policy is known exactly.",
          [Run(variant, seed, f"optimum_run({variant!r})", call=optimum_run(variant))
           for seed in NEW_TWELVE for variant in ("full", "r1", "r4", "pissa")],
          [Prediction("rank 1 suffices: rank 1 - full, total variation to the optimum after RLOO",
                      difference("r1", "full", "tv"), high=0.02),
           Prediction("rank 1 suffices: rank 1 - rank 4, the same", difference("r1", "r4", "tv"), high=0.02),
           Prediction("PiSSA collapses: PiSSA - LoRA of rank 4, the same", difference("pissa", "r4", "tv"), low=0.02)],
          note="a random transformer of two layers, answers of up to 4 tokens, 40 iterations of 512 answers"),

    Claim("pass_at_k", "Yue et al. 2025 (2504.13837), section 3",
          "RL with verifiable rewards raises pass@1, and not pass@k at large k.",
          [SUMS, *(GRPO[seed] for seed in THREE),
           *[Run(side, seed, f"--task sample --data toy/sums --init STARTS/{init} --num_generations 16 "
                 "--eval_items 100") for seed in THREE
             for side, init in (("sft", "sums"), ("grpo", f"sums-grpo-s{seed}"))]],
          [Prediction("GRPO - SFT, pass@1", difference("grpo", "sft", "pass@1"), low=0.05),
           Prediction("GRPO - SFT, pass@16", difference("grpo", "sft", "pass@16"), high=0.005)],
          note="an answer is one of ten digits: pass@16 of SFT is at its ceiling, and cannot show a loss. "
               f"{ONE_START}"),

    Claim("grpo_length", "Liu et al. 2025 (2503.20783), section 3.2",
          "GRPO's mean within each answer makes wrong answers longer; Dr. GRPO, without it, does not.",
          [SUMS, *grid({"grpo": f"{ON_SUMS} --algo grpo --kl_place none", "drgrpo": f"{ON_SUMS} --algo drgrpo"},
                       THREE)],
          [Prediction("growth of wrong answers in 60 iterations, tokens: GRPO - Dr. GRPO",
                      difference("grpo", "drgrpo", growth("length_wrong")), low=0.5)],
          keep=("length_wrong", "length_right", "score"), note=ONE_START),

    Claim("overoptimisation", "Gao et al. 2022 (2210.10760), sections 3.1 and 3.3",
          "Against a learnt reward the gold reward rises, then falls; with less reward data it is lower.",
          [LETTERS, REWARD, FEW,
           *grid({"few": "--reward STARTS/reward-few", "all": "--reward STARTS/reward"}, THREE,
                 f"{ON_LETTERS} --kl_coef 0 --adaptive_kl_target 0 --forgetting_data none --steps 80")],
          [Prediction("gold reward at the start - at its peak, little reward data",
                      from_peak("few", "start"), high=-0.2),
           Prediction("gold reward at the end - at its peak, little reward data",
                      from_peak("few", "end"), high=-0.1),
           Prediction("gold reward at the end - at its peak, all reward data",
                      from_peak("all", "end"), high=-0.1),
           Prediction("gold reward after 80 iterations: little reward data - all",
                      difference("few", "all", "gold"), high=0.0)],
          keep=("gold", "sqrt_kl", "score"),
          note="no KL in the objective; the axis is the iteration; one SFT model, and one reward model for each "
               "side: little data is 40 steps"),

    Claim("ppo_ptx", "Ouyang et al. 2022 (2203.02155), section 4.2",
          "Mixed with the pre-training loss (PPO-ptx), PPO forgets less and keeps its reward.",
          [LETTERS, REWARD,
           *grid({"ppo": "", "ptx": "--ptx_coef 1"}, THREE, f"{ON_LETTERS} --reward STARTS/reward --steps 30")],
          [Prediction("PPO-ptx - PPO, rise of the loss on the base model's own text",
                      difference("ptx", "ppo", "forgetting"), high=-0.02),
           Prediction("PPO-ptx - PPO, gold reward", difference("ptx", "ppo", "gold"), low=-0.3)],
          note="one SFT model, one reward model; the text that is measured is that of the pre-training loss"),

    Claim("prompt_scale", "Lester et al. 2021 (2104.08691), section 3.1, figure 1",
          "The larger the base model, the closer prompt tuning comes to full tuning.",
          [*[Run("start", 1, "--task pretrain --data toy/corpus --parse_special --family llama "
                 f"--block_size 128 --batch 16 --lr 4e-3 --steps 1500 {shape}", f"base-{size}")
             for size, shape in BASES.items()],
           *[Run(f"{size}-{method}", seed, f"--init STARTS/base-{size} --method {method} {SFT} --steps 400")
             for seed in THREE for size in BASES for method in ("full", "prompt_tuning")]],
          [Prediction("(full - prompt tuning with the smallest base) - (the same with the largest), exact match",
                      gain_difference(("small-full", "small-prompt_tuning"),
                                      ("large-full", "large-prompt_tuning"), "exact_match"), low=0.0)],
          note="three bases by the recipe of data/base, one each, with 1,500 of its 8,000 steps; default rates, "
               "at which 400 steps of prompt tuning reach little"),
]


# ------------------------------------------------------------------------------------------ running and storing

def find(name):
    for claim in CLAIMS:
        if claim.name == name:
            return claim
    raise SystemExit(f"claims.py: there is no claim {name}; there is {', '.join(c.name for c in CLAIMS)}")


def fork_train(argv, errors):
    """train.main(argv) in a child, with stderr into a file -> its CPU seconds. Ends the program if it fails."""
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            sys.argv = ["train.py", *argv]
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            code = train.main(argv)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    _, status, used = os.wait4(pid, 0)
    if status:
        said = errors.read_text()[-1500:]
        raise SystemExit(f"{said}\nclaims.py: python train.py {' '.join(argv)} did not end well")
    return used.ru_utime + used.ru_stime


def with_short_lengths(argv):
    """A command cut to two steps and four test items."""
    trains = not {"eval", "sample"} & set(argv) and "--method none" not in " ".join(argv)
    return [*argv, "--eval_items", "4", *(["--steps", "2"] if trains else [])]


def run_call(run, folder):
    """The result of run.call into result.json, each time anew -> CPU seconds."""
    began = time.process_time()
    metrics = run.call(run.seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps({"metrics": metrics}))
    return time.process_time() - began


def shortened(value):
    """Numbers with five digits, inside dicts and lists."""
    if isinstance(value, dict):
        return {key: shortened(x) for key, x in value.items()}
    if isinstance(value, list):
        return [shortened(x) for x in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def stored_run(claim, run, root=RUNS):
    """What is kept of a finished run: the shape of result.json, so that data/results reads it."""
    folder = ROOT / run.folder(claim.name, root)
    if run.call:
        result = json.loads((folder / "result.json").read_text())
        code = None
        log = []
    else:
        found = read_run(folder)
        result = found["result"]
        code = found.get("code")
        log = events(folder)
    kept = {name: result[name] for name in ("metrics", "item_correct") if result.get(name)}
    if result.get("generations"):
        kept["generations"] = {name: result["generations"][name] for name in ("n", "right")
                               if name in result["generations"]}
    valid = [event for event in log if event["event"] == "valid"]
    ranks = [event["ranks"] for event in log if "ranks" in event]
    steps = [event for event in log if event["event"] == "train"]
    return shortened({
        "side": run.side, "seed": run.seed, "command": run.command(claim.name), "code": code, "result": kept,
        **({"valid": {k: v for k, v in valid[-1].items() if isinstance(v, float)}} if valid else {}),
        **({"ranks": ranks[-1]} if ranks else {}),
        **({"log": {name: [event.get(name) for event in steps] for name in claim.keep}} if claim.keep else {})})


def reproduce(claim, root=RUNS, short=False):
    """Run what is not there -> what tests/claims/NAME.json holds."""
    os.chdir(ROOT)
    here = pathlib.Path(root, claim.name)
    here.mkdir(parents=True, exist_ok=True)
    if claim.prepare:
        claim.prepare(here / "data")
    seconds = 0.0
    for i, run in enumerate(claim.runs):
        print(f"{claim.name} {i + 1}/{len(claim.runs)}: {run.side}, seed {run.seed}", file=sys.stderr)
        folder = pathlib.Path(run.folder(claim.name, root))
        argv = run.argv(claim.name, root)
        if run.call:
            used = run_call(run, folder)
        else:
            used = fork_train(with_short_lengths(argv) if short else argv, here / "errors.txt")
        clock = pathlib.Path(f"{folder}.seconds")           # a finished command takes no time again
        used = max(used, float(clock.read_text()) if clock.exists() else 0.0)
        clock.write_text(f"{used:.1f}")
        seconds += used
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return {"claim": claim.name, "commit": commit.stdout.strip(), "minutes": round(seconds / 60, 1),
            "runs": [stored_run(claim, run, root) for run in claim.runs]}


def store(found):
    """One line for each run."""
    lines = ",\n".join(json.dumps(run) for run in found["runs"])
    head = json.dumps({name: value for name, value in found.items() if name != "runs"})[:-1]
    STORED.mkdir(exist_ok=True)
    (STORED / f"{found['claim']}.json").write_text(f'{head}, "runs": [\n{lines}\n]}}\n')


def load(name):
    """The stored result of a claim, or None."""
    path = STORED / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


# ------------------------------------------------------------------------------------------------------ output

def measure(claim, found):
    """[(prediction, Measured, mean, low, high, verdict)]"""
    rows = []
    for prediction in claim.predictions:
        numbers = prediction.measure(found["runs"])
        mean, low, high = interval_of(numbers.by_seed, numbers.by_item, numbers.resolution)
        verdict = verdict_of(low, high, prediction.low, prediction.high)
        rows.append((prediction, numbers, mean, low, high, verdict))
    return rows


def is_stale(claim, found):
    return [run["command"] for run in found["runs"]] != claim.commands()


def describe(claim, found):
    """What was measured, for the terminal."""
    lines = [claim.name, *textwrap.wrap(f"{claim.paper}: {claim.says}", 100, initial_indent="  ",
                                        subsequent_indent="  ")]
    if claim.note:
        lines.append(f"  Here: {claim.note}.")
    for prediction, _, mean, low, high, verdict in measure(claim, found):
        lines += [f"  {prediction.words}", f"    predicted {prediction.range()}; "
                  f"measured {mean:+.4f} [{low:+.4f}, {high:+.4f}]: {verdict}"]
    for side in dict.fromkeys(run["side"] for run in found["runs"]):
        some = of_side(found["runs"], side).values()
        shown = {name: summary(number(run, name) for run in some)[0] for name in SHOWN
                 if all(metric_values([run], name) for run in some)}
        lines.append(f"  {side:20} " + "  ".join(f"{name} {value:.4f}" for name, value in shown.items()))
    return "\n".join(lines)


def table():
    """Markdown: a row for each prediction, the claim and its cost on the first; below, the claims in our words."""
    lines = ["| claim | prediction: A - B | predicted | A | B | A - B, 95 % | verdict | seeds | minutes |",
             "|" + "---|" * 9]
    for claim in CLAIMS:
        found = load(claim.name)
        if found is None or is_stale(claim, found):
            why = "not run yet" if found is None else "stale: the commands have changed"
            rows = [(prediction, "", "", why, "", "") for prediction in claim.predictions]
            minutes = ""
        else:
            rows = [(prediction, numbers.a, numbers.b, f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]", verdict,
                     str(len(numbers.by_seed)))
                    for prediction, numbers, mean, low, high, verdict in measure(claim, found)]
            minutes = f"{found['minutes']:.1f}"
        name = f"`{claim.name}`"
        for prediction, *cells in rows:
            cells = [name, prediction.words, prediction.range(), *cells, minutes]
            lines.append(f"| {' | '.join(cells)} |")
            name = ""
            minutes = ""
    notes = [f"- `{claim.name}`, {claim.paper}: {claim.says}" + (f" Here: {claim.note.removesuffix('.')}."
                                                                  if claim.note else "")
             for claim in CLAIMS]
    return "\n".join([*lines, "", "The claims in our words, and what is particular here:", "", *notes])


def listing():
    """One line for each claim."""
    return "\n".join(f"{claim.name:22} {claim.paper}: {claim.says}" for claim in CLAIMS)


def write_page():
    """The table into tests/CLAIMS.md."""
    before, rest = PAGE.read_text().split("<!-- claims -->\n")
    after = rest.split("<!-- end -->", 1)[1]
    PAGE.write_text(f"{before}<!-- claims -->\n{table()}\n<!-- end -->{after}")


def main():
    args = argparse.ArgumentParser(description="Claims of papers, as commands and predictions.")
    args.add_argument("names", nargs="*", metavar="NAME", help="claims to measure")
    args.add_argument("--list", action="store_true", help="the claims")
    args.add_argument("--commands", action="store_true", help="the commands of NAME, without running them")
    args.add_argument("--table", action="store_true", help="all claims, from the stored results")
    args.add_argument("--write", action="store_true", help="with --table: into tests/CLAIMS.md")
    args.add_argument("--short", action="store_true", help="two steps each: that the path works, nothing else")
    args = args.parse_args()
    if args.list:
        print(listing())
    for claim in map(find, args.names):
        if args.commands:
            print("\n".join(claim.commands()))
        elif args.short:
            print(describe(claim, reproduce(claim, f"{RUNS}-short", short=True)))
            print("  --short: two steps of four items each; these numbers prove nothing and are not stored")
        else:
            store(reproduce(claim))
            print(describe(claim, load(claim.name)))
    if args.table:
        print(table())
        if args.write:
            write_page()


if __name__ == "__main__":
    main()
