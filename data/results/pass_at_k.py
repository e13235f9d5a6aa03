"""data/results/pass_at_k.py: n sampled answers to each prompt in numbers: pass@k, mean@n, majority@n.

    pass@k      the chance that one of k answers is right. From n answers of which c are right, unbiased for
                every k <= n: 1 - C(n - c, k) / C(n, k)  (Chen et al. 2021, arXiv 2107.03374, eq. 1)
    mean@n      the mean score of the n answers; where scores are 0 or 1 it is pass@1
    majority@n  1 if the most frequent answer is right, else 0 (self-consistency, arXiv 2203.11171). Of
                answers that are equally frequent: the share of right ones among them, which is the expected
                value of a choice by lot. Answers are equal as in exact match: white space is normalised
    interval    95 %, over prompts: Student's t of the prompts' values; Wilson's where each of them is 0 or 1

All are means over prompts. C(n - c, k) / C(n, k) is the chance that k answers, drawn one after the other, are
all wrong: the product of (n - c - j) / (n - j), j < k. No factor exceeds 1, so nothing overflows or cancels.

"generations" of result.json holds what they are computed from: {"n": answers to each prompt,
"mean": [mean score, ...]}, and where answers are right or wrong also "right": [how many are right, ...] and
"majority".

Public: pass_at_k, pass_curve, majority, is_right_or_wrong, generations_of, metrics_of, prompt_values,
interval, interval_of, is_shown
"""
import collections
import math
import re

from data.results.metrics import normalise_space, summary, wilson

NAME = re.compile(r"(pass|mean|majority)@(\d+)")


def pass_curve(n, c):
    """[pass@1, ..., pass@n] of n answers of which c are right."""
    curve = []
    all_wrong = 1.0
    for j in range(n):
        all_wrong *= max(n - c - j, 0) / (n - j)
        curve.append(1 - all_wrong)
    return curve


def pass_at_k(n, c, k):
    """1 - C(n - c, k) / C(n, k), for 0 <= c <= n and 1 <= k <= n. Raises ValueError for other numbers."""
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@{k} of {n} answers, {c} of them right: k goes from 1 to {n}, the number of "
                         f"right ones from 0 to {n}")
    return pass_curve(n, c)[k - 1]


def majority(texts, right):
    """majority@n of one prompt: texts, n answers; right, n values of 0 or 1 (or True and False)."""
    normalised = list(map(normalise_space, texts))
    votes = collections.Counter(normalised)
    most = max(votes.values())
    chosen = [int(value) for text, value in zip(normalised, right, strict=True) if votes[text] == most]
    return sum(chosen) / len(chosen)


def is_right_or_wrong(scores):
    """Whether lists of scores say which answers are right: each score is 0 or 1."""
    return all(score in (0, 1) for some in scores for score in some)


def generations_of(texts, scores):
    """The "generations" of result.json. texts, scores: for each prompt its n answers and their n scores."""
    found = {"n": len(scores[0]), "mean": [math.fsum(some) / len(some) for some in scores]}
    if is_right_or_wrong(scores):
        found["right"] = [int(sum(some)) for some in scores]
        found["majority"] = [majority(*one) for one in zip(texts, scores, strict=True)]
    return found


def metrics_of(generations):
    """{metric: mean over prompts}: pass@1 to pass@n, majority@n and mean@n, those that there are."""
    n = generations["n"]
    found = {}
    if "right" in generations:
        curves = {c: pass_curve(n, c) for c in set(generations["right"])}
        columns = zip(*(curves[c] for c in generations["right"]))
        found = {f"pass@{k}": mean_of(column) for k, column in enumerate(columns, 1)}
        found[f"majority@{n}"] = mean_of(generations["majority"])
    found[f"mean@{n}"] = mean_of(generations["mean"])
    return found


def mean_of(values):
    return math.fsum(values) / len(values)


def prompt_values(generations, name):
    """The value of each prompt whose mean is the metric `name`; None for a metric that is no such mean.

    generations: of result.json, or None.
    """
    match = NAME.fullmatch(name)
    if not generations or not match:
        return None
    n = generations["n"]
    kind = match[1]
    k = int(match[2])
    if kind == "pass" and 1 <= k <= n and "right" in generations:
        curves = {c: pass_at_k(n, c, k) for c in set(generations["right"])}
        return [curves[c] for c in generations["right"]]
    return generations.get(kind) if kind != "pass" and k == n else None


def interval(values, proportion=True):
    """(low, high), 95 %, of the mean of the prompts' values; nan, nan if one value does not tell.

    proportion: the mean lies within 0 and 1.
    """
    if proportion and values and all(value in (0, 1) for value in values):
        return wilson(sum(values), len(values))
    mean, _, half = summary(values)
    if not proportion or math.isnan(half):
        return mean - half, mean + half
    return max(0.0, mean - half), min(1.0, mean + half)


def interval_of(generations, name):
    """The 95 % interval of the metric `name`, or None."""
    values = prompt_values(generations, name)
    if values is None:
        return None
    low, high = interval(values, "right" in generations)
    return None if math.isnan(low) else (low, high)


def is_shown(name, metrics):
    """Whether a metric stands on the screen: of pass@k those whose k is a power of two, or the largest."""
    match = NAME.fullmatch(name)
    if not match or match[1] != "pass":
        return True
    k = int(match[2])
    return k & (k - 1) == 0 or f"pass@{k + 1}" not in metrics
