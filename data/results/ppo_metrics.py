"""data/results/ppo_metrics.py: what a rollout, an update and a reward model say about themselves, in numbers and in words.

Every mean is over answers or over real tokens. `x[mask]` picks the real ones, so the rest may even be NaN.

    kl         mean over answers of the sum of k1 = log pi - log ref: unbiased, may be negative on an answer
    kl_k3      the same of k3 = exp(-k1) - 1 + k1, never negative; far from kl when a few answers carry it
    objective  score - beta kl: what PPO climbs, so it rises, but for noise
    ratio_*    largest |new / old - 1|; `first` is taken before the first step: 0 to rounding

Public: describe, explained_variance, health, reward_report, show
"""
from collections import defaultdict

import torch


def correlation(x, y):
    x, y = (z.cpu().double() - z.cpu().double().mean() for z in (x, y))
    return ((x * y).sum() / (x.norm() * y.norm()).clamp(min=1e-12)).item()


def explained_variance(values, returns, mask):
    """1: the critic knows the return. 0: no better than a constant. Below: worse."""
    left, all_ = ((x - x.mean()).square().mean() for x in ((returns - values)[mask], returns[mask]))
    return 1 - left / all_.clamp(min=1e-12)


def describe(batch, answers, scores, ended, samples=1):
    """A rollout in numbers: ppo.Batch, its answers as lists of ids, scores (B,), ended (B,), answers asked
    of each prompt."""
    mask, n = batch.mask, batch.mask.sum(1).float()
    k1 = (batch.logp - batch.ref_logp).masked_fill(~mask, 0)                    # (B, R)
    kl, k3 = k1.sum(1), ((-k1).exp() - 1 + k1).sum(1)                           # (B,)
    grams = [[tuple(y[i:i + 4]) for i in range(len(y) - 3)] for y in answers]
    out = {"score": scores.mean(), "score_std": scores.std(unbiased=False),
           "kl": kl.mean(), "kl_k3": k3.mean(), "kl_stderr": kl.std(unbiased=False) / len(kl) ** 0.5,
           "sqrt_kl": kl.mean().clamp(min=0).sqrt(),
           "entropy": batch.entropy[mask].mean(), "entropy_answer": -batch.logp[mask].sum() / len(mask),
           "length": n.mean(), "length_p95": n.quantile(0.95), "eos_rate": ended.float().mean(),
           "score_length_corr": correlation(scores, n),
           "unique": len(set(map(tuple, answers))) / len(answers),
           "repeat4": sum(len(g) - len(set(g)) for g in grams) / max(sum(map(len, grams)), 1)}
    if samples > 1:
        out["zero_std"] = (scores.view(-1, samples).std(1) < 1e-6).float().mean()
    if batch.values is not None:                            # return - value: the advantage before whitening
        advantage = (batch.returns - batch.values)[mask]
        out |= {"value": batch.values[mask].mean(), "return": batch.returns[mask].mean(),
                "advantage": advantage.mean(), "advantage_std": advantage.std(unbiased=False),
                "explained_variance": explained_variance(batch.values, batch.returns, mask)}
    return {name: float(x) for name, x in out.items()}


def health(metrics, tolerance=1e-4):
    """What is wrong with an iteration, in words; [] when every number is where it should be. `tolerance` is
    the rounding of a log-probability: 1e-4 in fp32, 0.5 in bf16."""
    m = defaultdict(float, metrics)
    checks = (
        (m["ratio_first"] > tolerance,
         "the first ratio is off by {ratio_first:.1e}: rollout and update disagree; is dropout on?"),
        (m["step"] == 1 and abs(m["kl"]) > tolerance,
         "KL starts at {kl:.2g}: the policy does not begin at the reference"),
        (m["kl"] < -3 * m["kl_stderr"] - tolerance,
         "KL is {kl:.2f}, negative beyond chance: sampling and scoring disagree"),
        (m["kl"] > 25,
         "KL is {kl:.0f} nats: the policy leaves the reference; raise --kl_coef or set --kl_target"),
        (m["score_std"] == 0, "every answer scores {score:.3g}: there is nothing to learn from"),
        (m["zero_std"] > 0.5, "{zero_std:.0%} of the prompts score all answers alike and teach nothing"),
        (m["eos_rate"] < 0.5,
         "only {eos_rate:.0%} of the answers end: raise --max_new, or teach the end token in SFT"),
        (m["length"] < 1.5, "answers are down to {length:.1f} tokens: beta costs more than the score pays"),
        (abs(m["score_length_corr"]) > 0.5, "score follows length (correlation {score_length_corr:.2f})"),
        (m["approx_kl"] > 0.1, "updates go too far (KL {approx_kl:.2f}): lower --lr or --ppo_epochs"),
        (m["clipfrac"] > 0.5, "{clipfrac:.0%} of the ratios are clipped: lower --lr or --ppo_epochs"),
        (m["clipfrac_value"] > 0.5,
         "{clipfrac_value:.0%} of the values are clipped: raise --cliprange_value"),
        (m["step"] > 10 and m["explained_variance"] < 0,
         "the critic is worse than a constant ({explained_variance:.2f} of the variance): raise --value_lr"),
        (m["unique"] < 0.1, "only {unique:.0%} of the answers differ: the policy collapses; raise --kl_coef"),
        (m["repeat4"] > 0.5, "{repeat4:.0%} of the 4-grams in answers are repeats"),
        (m["ptx_ratio"] > 10, "the pre-training gradient is {ptx_ratio:.0f} times PPO's: lower --ptx_coef"),
        (m["skipped"] > 0, "{skipped} steps were skipped: the gradient was not finite"))
    return [text.format_map(m) for wrong, text in checks if wrong]


def reward_report(parts):
    """[(scores, rank, mask, length), ...], each (B, K), as `ppo.reward_step` hands them out -> accuracy over
    pairs (equal scores are half right), also by the distance of the ranks, which for votes is their margin;
    and how much of the score is length."""
    right = defaultdict(list)
    for s, rank, mask, _ in parts:
        pair = (rank[:, :, None] < rank[:, None, :]) & mask[:, :, None] & mask[:, None, :]         # (B, K, K)
        won = (s[:, :, None] - s[:, None, :]).sign() / 2 + 0.5
        margin = rank[:, None, :] - rank[:, :, None]
        for m, w in zip(margin[pair].tolist(), won[pair].tolist()):
            right[round(m)].append(w)
    won = sum(right.values(), [])
    s, n = (torch.cat([part[i][part[2]] for part in parts]) for i in (0, 3))
    return {"accuracy": sum(won) / max(len(won), 1), "pairs": len(won),
            "score_length_corr": correlation(s, n),
            **{f"accuracy_margin_{m}": sum(ws) / len(ws) for m, ws in sorted(right.items())}}


def show(batch, row=0, decode=str):
    """One padded row with every tensor, as text. Line i is token i; its action was taken one before."""
    names = [name for name in batch._fields[3:] if getattr(batch, name) is not None]
    start, n = int(batch.start[row]), int(batch.lengths[row])
    head = " ".join(x.rjust(10) for x in names)
    lines = [f"{'position':>8} {'token':>10} {'action':>6} {'mask':>4} {head}"]
    for i, token in enumerate(batch.tokens[row].tolist()):
        line, t = f"{i:>8} {decode(token) if i < n else '(pad)':>10}", i - start
        if 0 <= t < batch.mask.size(1):
            line += f" {t:>6} {int(batch.mask[row, t]):>4} "
            line += " ".join(f"{getattr(batch, name)[row, t].item() + 0.0:>10.4f}" for name in names)
        lines.append(line)
    return "\n".join(lines)
