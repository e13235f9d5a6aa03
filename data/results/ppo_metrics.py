"""data/results/ppo_metrics.py: numbers that describe a rollout, an update and a reward model, and warnings.

Every mean is over answers or over real tokens. `x[mask]` selects the real ones, so the rest may even be NaN.

    kl         mean over answers of the sum of k1 = log pi - log ref: unbiased, may be negative on an answer
    kl_k2      the same of k2 = k1^2 / 2, biased: half the second moment of k1; near kl while both are small
    kl_k3      the same of k3 = exp(-k1) - 1 + k1, never negative; far from kl when a few answers dominate it
    length_*   mean length of the right and of the wrong answers. Where all scores of finished answers are 0
               or 1, right is 1. Else right is above the mean score of the group of answers to that prompt,
               wrong below it; of a prompt with one answer: of the rollout. Equal to it: neither
    frac_reward_zero_std    share of groups in which all scores are equal, of answers that are learnt from; of
               algorithms that compare groups
    score      the mean of the reward itself, as in the results before and after training, and score_std its
               standard deviation; score_penalised, where it differs: the mean of what is learnt from, after
               --missing_eos_penalty and --overlong. frac_reward_zero_std, score_cut and score_ended are of
               that; length_* and score_length_corr of the reward itself
    objective  score_penalised - beta kl: what PPO maximises, so it rises, up to noise
    clipfrac_low, clipfrac_high   tokens whose gradient the clip took, below and above; clipfrac: both
    answers_learnt    answers that the losses saw; answers_sampled: with --dynamic_sampling, of all rounds
    score_cut, score_ended   means over answers without and with an end token, where both are learnt from
    ratio_*    largest |new / old - 1|; ratio_first is taken before the first optimiser step: 0 to rounding

B answers  R response columns  K ranked answers
Public: correlation, explained_variance, right_and_wrong, equal_groups, describe, merge_parts, average_minibatches, health,
health_line, brief, new_warnings, ranked_pairs, reward_report, preference_report, show
"""
import math
import re
from collections import defaultdict

import torch


def correlation(x, y):
    """Pearson's correlation of two tensors of one shape, a float; 0 if one of them is constant."""
    x = x.cpu().double() - x.cpu().double().mean()
    y = y.cpu().double() - y.cpu().double().mean()
    return ((x * y).sum() / (x.norm() * y.norm()).clamp(min=1e-12)).item()


def explained_variance(values, returns, mask):
    """Of the critic, all (B, R). 1: it predicts the return. 0: no better than a constant. Below 0: worse."""
    residual = (returns - values)[mask]
    returns = returns[mask]
    unexplained = (residual - residual.mean()).square().mean()
    return 1 - unexplained / (returns - returns.mean()).square().mean().clamp(min=1e-12)


def right_and_wrong(scores, ended, num_generations=1):
    """(right, wrong), both (B,) bool, by the rule of the header; scores (B,), ended (B,) bool."""
    if ended.any() and ((scores == 0) | (scores == 1))[ended].all():
        right = scores == 1
        return right, ~right
    groups = scores.double().view(-1, num_generations if num_generations > 1 else len(scores))
    above = (groups - groups.mean(1, keepdim=True)).flatten()
    return above > 0, above < 0


def equal_groups(scores, k, counted=None):
    """scores (B,), k answers to each prompt side by side -> (B / k,) bool: all scores of a group are equal,
    but for rounding. counted (B,) bool, None for all: the answers that the groups consist of."""
    groups = scores.view(-1, k)
    rest = torch.zeros_like(groups, dtype=torch.bool) if counted is None else ~counted.view(-1, k)
    rounding = 8 * torch.finfo(scores.dtype).eps * groups.masked_fill(rest, 0).abs().amax(1)
    return groups.masked_fill(rest, -math.inf).amax(1) - groups.masked_fill(rest, math.inf).amin(1) <= rounding


def describe(batch, answers, scores, ended, num_generations=1, counted=None, rewarded=None,
             compares_groups=False):
    """Metrics of a rollout, {name: float}.

    batch: ppo.Batch; answers: B lists of ids; scores (B,), what is learnt from; rewarded (B,), the reward
    before penalties, None: the same; ended (B,), whether an answer has its end token;
    num_generations: answers per prompt, which stand side by side; counted (B,) bool, None for all: those that
    are learnt from; compares_groups: whether the algorithm does, and a group of equal scores has no gradient.
    """
    counted = torch.ones_like(ended, dtype=torch.bool) if counted is None else counted
    rewarded = scores if rewarded is None else rewarded
    mask = batch.mask
    n = mask.sum(1).float()                                                     # (B,)
    k1 = (batch.logp - batch.ref_logp).masked_fill(~mask, 0)                    # (B, R)
    kl = k1.sum(1)                                                              # (B,)
    k2 = (k1 ** 2 / 2).sum(1)                                                   # (B,)
    k3 = ((-k1).exp() - 1 + k1).sum(1)                                          # (B,)
    grams = [[tuple(answer[i:i + 4]) for i in range(len(answer) - 3)] for answer in answers]
    repeats = sum(len(some) - len(set(some)) for some in grams)
    metrics = {"score": rewarded.mean(), "score_std": rewarded.std(unbiased=False),
               "kl": kl.mean(), "kl_k2": k2.mean(), "kl_k3": k3.mean(),
               "kl_stderr": kl.std(unbiased=False) / len(kl) ** 0.5,
               "sqrt_kl": kl.mean().clamp(min=0).sqrt(),
               "entropy": batch.entropy[mask].mean(), "entropy_answer": -batch.logp[mask].sum() / len(mask),
               "length": n.mean(), "length_p95": n.quantile(0.95), "eos_rate": ended.float().mean(),
               "score_length_corr": correlation(rewarded, n),
               "unique": len(set(map(tuple, answers))) / len(answers),
               "repeat4": repeats / max(sum(map(len, grams)), 1)}
    if not torch.equal(scores, rewarded):
        metrics["score_penalised"] = scores.mean()
    if compares_groups:
        metrics["frac_reward_zero_std"] = equal_groups(scores, num_generations, counted).float().mean()
    right, wrong = right_and_wrong(rewarded, ended.bool(), num_generations)
    for name, chosen in (("length_right", right), ("length_wrong", wrong)):
        if chosen.any():
            metrics[name] = n[chosen.to(n.device)].mean()
    if 0 < ended.sum() < len(ended) and counted.all():      # else a masked one could seem to be rewarded
        ended = ended.bool()
        metrics.update({"score_ended": scores[ended].mean(), "score_cut": scores[~ended].mean()})
    mask = mask & counted.to(mask.device)[:, None]
    if batch.values is not None and mask.any():             # return - value: the advantage before whitening
        advantage = (batch.returns - batch.values)[mask]
        metrics.update({"value": batch.values[mask].mean(), "return": batch.returns[mask].mean(),
                        "advantage": advantage.mean(), "advantage_std": advantage.std(unbiased=False),
                        "explained_variance": explained_variance(batch.values, batch.returns, mask)})
    return {name: float(x) for name, x in metrics.items()}


def merge_parts(parts):
    """Metrics of a minibatch from those of its parts, [{name: number or tensor}, ...]: sums, and the largest
    ratio_off. A part may be empty."""
    merged = {}
    for part in parts:
        for name, x in part.items():
            if name not in merged:
                merged[name] = x
            elif name == "ratio_off" and isinstance(x, torch.Tensor):
                merged[name] = torch.maximum(merged[name], x)       # max() would wait for a GPU
            elif name == "ratio_off":
                merged[name] = max(merged[name], x)
            else:
                merged[name] = merged[name] + x
    return merged


def average_minibatches(history):
    """Metrics of an update from those of its minibatches, [{name: number}, ...]: means over the minibatches
    that have the metric; ratio_off is the largest, ratio_first that of the first minibatch, skipped a sum."""
    result = {}
    for metrics in history:
        for name in metrics:
            if name not in result:
                found = [other[name] for other in history if name in other]
                result[name] = sum(found) / len(found)
    result["ratio_first"] = history[0]["ratio_off"]
    result["ratio_off"] = max(metrics["ratio_off"] for metrics in history)
    result["skipped"] = sum(metrics["skipped"] for metrics in history)
    result["minibatches"] = len(history)
    return result


def health(metrics, tolerance=1e-4):
    """Warnings about an iteration, a list of sentences; [] when every number is in its usual range.
    `tolerance` is the rounding of a log-probability: 1e-4 in fp32, 0.5 in bf16. A metric that is missing
    counts as 0."""
    m = defaultdict(float, metrics)
    if metrics.get("beta", 1.0) > 0:
        hold = "raise --kl_coef"
        hold_far = "raise --kl_coef, or lower --adaptive_kl_target"
        why_short = ": the KL penalty outweighs the score"
    else:                                               # a run without KL
        hold = hold_far = "lower --lr, or give a KL (--kl_place, --kl_coef)"
        why_short = ""
    checks = (
        (m["ratio_first"] > tolerance,
         "the first ratio is off by {ratio_first:.1e}: rollout and update disagree; is dropout on?"),
        (m["step"] == 1 and abs(m["kl"]) > tolerance,
         "KL starts at {kl:.2g}: the policy does not begin at the reference"),
        (m["kl"] < -3 * m["kl_stderr"] - tolerance and metrics.get("kl_stderr") != 0,     # of one answer it is 0
         "KL is {kl:.2f}, negative beyond chance: sampling and scoring disagree"),
        (m["kl"] > 25,
         "KL is {kl:.0f} nats: the policy is far from the reference; " + hold_far),
        (m["score_std"] == 0 and "score_penalised" not in metrics,
         "every answer scores {score:.3g}: there is nothing to learn from"),
        (m["frac_reward_zero_std"] > 0.5,
         "{frac_reward_zero_std:.0%} of the prompts have answers of one score and give no gradient"),
        (m["step"] == 1 and metrics.get("grad_norm_policy", 1.0) == 0,
         "the first gradient is 0: no answer counts as better than another; change the reward, or raise "
         "--num_generations or --temperature"),
        (metrics.get("answers_learnt", 1) == 0,
         "no answer was learnt from: all were cut and masked, or all groups have equal scores"),
        (m["score_cut"] > m["score_ended"],
         "answers without an end score {score_cut:.3g}, finished ones {score_ended:.3g}: give "
         "--missing_eos_penalty"),
        (m["eos_rate"] < 0.5,
         "only {eos_rate:.0%} of the answers end: raise --max_new_tokens, or train the end token in SFT"),
        (m["length"] < 1.5, "answers are down to {length:.1f} tokens" + why_short),
        (abs(m["score_length_corr"]) > 0.5, "score follows length (correlation {score_length_corr:.2f})"),
        (m["approx_kl"] > 0.1, "updates are too large (KL {approx_kl:.2f}): lower --lr or --ppo_epochs"),
        (m["clipfrac"] > 0.5, "{clipfrac:.0%} of the ratios are clipped: lower --lr or --ppo_epochs"),
        (m["clipfrac_value"] > 0.5,
         "{clipfrac_value:.0%} of the values are clipped: raise --cliprange_value"),
        (m["step"] > 10 and m["explained_variance"] < 0,
         "the critic is worse than a constant ({explained_variance:.2f} of the variance): raise --value_lr"),
        (m["unique"] < 0.1, "only {unique:.0%} of the answers differ: the policy collapses; " + hold),
        (m["repeat4"] > 0.5, "{repeat4:.0%} of the 4-grams in answers are repeats"),
        (m["ptx_ratio"] > 10, "the pre-training gradient is {ptx_ratio:.0f} times PPO's: lower --ptx_coef"),
        (m["skipped"] > 0, "{skipped} steps were skipped: the gradient was not finite"))
    return [text.format_map(m) for wrong, text in checks if wrong]


SHOWN = ("score", "gold", "kl", "length")               # beside the progress bar, and first on the line
HEALTH = ("kl_k2", "kl_k3", "beta", "eos_rate", "length_right", "length_wrong", "entropy",
          "frac_reward_zero_std", "clipfrac_low", "clipfrac_high")


def brief(metrics, names=SHOWN):
    """["score 0.5", ...] of those metrics that there are."""
    return [f"{name} {metrics[name]:.3g}" for name in names if name in metrics]


def health_line(metrics):
    """The parts of the line about an iteration, under the names that log.jsonl has."""
    return brief(metrics, (*SHOWN, *HEALTH))


def new_warnings(warnings, before):
    """Those of the warnings that, numbers aside, are not among the ones before."""
    known = set(map(wording, before))
    return [text for text in warnings if wording(text) not in known]


def wording(text):
    return re.sub(r"-?\d\S*", "", text)


def ranked_pairs(rank, mask):
    """rank, mask (B, K) -> (B, K, K) bool: answers i and j exist, and i is ranked before j."""
    return (rank[:, :, None] < rank[:, None, :]) & mask[:, :, None] & mask[:, None, :]


def reward_report(parts):
    """[(scores, rank, mask, length), ...], each (B, K), as `ppo.reward_step` returns them -> accuracy over
    pairs (equal scores count half), also by the difference of the ranks where it is whole, which for votes is
    their margin; and the correlation of score and length."""
    by_margin = defaultdict(list)
    for s, rank, mask, _ in parts:
        pair = ranked_pairs(rank, mask)                                                 # (B, K, K)
        correct = (s[:, :, None] - s[:, None, :]).sign() / 2 + 0.5
        margin = rank[:, None, :] - rank[:, :, None]
        for m, x in zip(margin[pair].tolist(), correct[pair].tolist()):
            by_margin[m].append(x)
    correct = sum(by_margin.values(), [])
    s = torch.cat([scores[mask] for scores, _, mask, _ in parts])
    length = torch.cat([length[mask] for _, _, mask, length in parts])
    return {"accuracy": sum(correct) / max(len(correct), 1), "pairs": len(correct),
            "score_length_corr": correlation(s, length),
            **{f"accuracy_margin_{m:.0f}": sum(xs) / len(xs) for m, xs in sorted(by_margin.items()) if m % 1 == 0}}


def preference_report(parts):
    """[{name: (n,)}, ...], as ppo.preference_step returns them -> the mean of each metric that has values,
    and `prompts`, how many the accuracy is a mean over."""
    values = defaultdict(list)
    for part in parts:
        for name, x in part.items():
            values[name] += x.tolist()
    means = {name: math.fsum(some) / len(some) for name, some in values.items() if some}
    return {**means, "prompts": len(values["accuracy"])}


def show(batch, row=0, decode=str):
    """One padded row of a ppo.Batch with every tensor, as text. Line i is token i; its action was taken one
    position before. decode: id -> str."""
    names = [name for name in batch._fields[3:] if getattr(batch, name) is not None]
    start = int(batch.start[row])
    n = int(batch.lengths[row])
    titles = " ".join(name.rjust(10) for name in names)
    lines = [f"{'position':>8} {'token':>10} {'action':>6} {'mask':>4} {titles}"]
    for i, token in enumerate(batch.tokens[row].tolist()):
        line = f"{i:>8} {decode(token) if i < n else '(pad)':>10}"
        t = i - start
        if 0 <= t < batch.mask.size(1):
            line += f" {t:>6} {int(batch.mask[row, t]):>4} "
            line += " ".join(f"{getattr(batch, name)[row, t].item() + 0.0:>10.4f}" for name in names)
        lines.append(line)
    return "\n".join(lines)
