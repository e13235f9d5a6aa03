"""ppo.py: learn from preferences. Reward model, PPO with a KL penalty to a reference, and its relatives.

The objective of all of them, over responses y to prompts x, and its one solution (the tests hold us to it):

    J(pi) = E[score(x, y)] - beta KL(pi || ref)        pi*(y|x) = ref(y|x) exp(score(x, y) / beta) / Z(x)
    J(pi*) - J(pi) = beta KL(pi || pi*)                exactly, for every pi

One iteration of PPO:
 1. sample a response to each prompt from the policy; it ends at the first EOS, which is an action like any other
 2. logp, ref_logp, values over it, one forward each; score = a reward model, or any callable
 3. reward_t    = -beta (logp_t - ref_logp_t),  + score at the last real token (a missing EOS replaces the score)
 4. delta_t     = reward_t + gamma value_{t+1} - value_t           value past the last token = 0
    advantage_t = delta_t + gamma lam advantage_{t+1},  return_t = advantage_t + value_t;  advantages are whitened
 5. epochs x minibatches (x micro-batches, which only accumulate),       ratio = exp(logp_new - logp)
    policy  mean max(-A ratio, -A clip(ratio, 1 - e, 1 + e))        + ptx_coef cross-entropy on pre-training text
    value   mean 1/2 max((v - ret)^2, (v_old + clip(v - v_old, -e, e) - ret)^2)
 6. beta drifts towards the KL target; the average of the weights (EMA) follows

The index convention, everywhere. Rows are right-padded; column t of a response tensor is the *action* "emit
response token t", taken by looking at everything before it: position start - 1 + t. Here start = 3, n = 4.

    position      0    1    2    3    4    5    6    7    8
    tokens        p    p    p    a    b    c   EOS   .    .      (T)   pads: any id at all
    action t                0    1    2    3    -                (R)   column t reads position start - 1 + t
    emits                   a    b    c   EOS   .                      token start + t
    mask                    1    1    1    1    0                      t < n
    logp, ref_logp, value   x    x    x    x    0
    reward                 -k   -k   -k  s-k    0                      k = beta (logp - ref_logp), s = score
    the score itself is read *at* the last real token, position start + n - 1, where the EOS is

Papers: PPO 1707.06347; GAE 1506.02438; RLHF 1909.08593 and 2203.02155 (section 3.5, appendix C); RLOO 2402.14740;
GRPO 2402.03300; Dr. GRPO 2503.20783; DPO 2305.18290; IPO 2310.12036; several roles on one base 2309.00754; the KL
estimators k1, k2, k3: Schulman 2020 (joschu.net/blog/kl-approx.html).

Deviations: no left padding, hence no position ids. Policy and critic share no trained weight, so each has its own
Adam and clipped norm, and the value loss needs no coefficient. The penalty is k1 *in the reward*, the one estimator
and place whose gradient is that of J (k3 in the reward ends at total variation 0.8 from pi*, in the loss at 0.3).

A *role* is a callable that returns a context manager yielding (model, past). So policy, reference, critic and
reward model can be adapters of one frozen base, copies, or soft prompts; this file cannot tell, and imports none
of them. Dropout is off in every role: model.eval(), gradients on.

B rows  T tokens  R response columns  N response tokens  C width  V vocabulary  K ranked answers  k samples a prompt
Public: PPOConfig, DPOConfig, Batch, pack, Actor, logprobs, values, scores, ScalarHead, calibrate, model_reward,
reward_step, reward_report, dpo_step, rollout, Roles, PPOState, train_ppo, health, show, and the equations
"""
import contextlib
import math
import random
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Callable, Literal, NamedTuple, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F

from data.files import UserError
from model import generate


def opt(default, help):
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class PPOConfig:
    """Flag = field. Learning rate, batch (answers per iteration), steps (iterations) and seed are the command's."""
    algo: Literal["ppo", "rloo", "reinforce", "grpo", "drgrpo"] = opt("ppo", "ppo is the one with a critic")
    samples: int = opt(0, "answers per prompt; 0: 4 where answers are compared (rloo, grpo, drgrpo), else 1")
    response_tokens: int = opt(48, "longest answer, its end token included")
    temperature: float = opt(1.0, "of the policy, wherever it is sampled or scored")
    kl_coef: float = opt(0.05, "beta: reward per nat of KL to the reference (the start value, with --kl_target)")
    kl_target: float = opt(0.0, "nats per answer to steer beta to; 0: beta stays")
    kl_horizon: int = opt(10_000, "answers over which beta may change by 20 %")
    missing_eos: Optional[float] = opt(-1.0, "score of an answer that does not end; none: whatever it scored")
    gamma: float = opt(1.0, "discount; below 1 the optimum is no longer pi*")
    lam: float = opt(0.95, "GAE lambda")
    ppo_epochs: int = opt(4, "passes over one rollout")
    minibatches: int = opt(4, "optimiser steps per pass")
    cliprange: float = opt(0.2, "how far a ratio may move from 1")
    cliprange_value: float = opt(0.2, "how far a value may move from its rollout value; 0: no clipping")
    target_kl: float = opt(0.0, "stop the passes when a minibatch has moved this far from the rollout; 0: never")
    value_lr: float = opt(0.0, "learning rate of the critic; 0: that of the policy")
    value_warmup: int = opt(0, "iterations that train the critic alone")
    schedule: Literal["linear", "warmup"] = opt("linear", "linear to zero, or 10 iterations up to a constant rate")
    ptx_coef: float = opt(0.0, "PPO-ptx: weight of the pre-training loss per token (InstructGPT: 27.8, in its units)")
    ema: float = opt(0.0, "decay per iteration of an average of the policy (InstructGPT: 0.992); 0: none")
    micro_tokens: int = opt(16_384, "padded tokens per forward; changes memory and time, no number")

    def __post_init__(self):
        grouped = self.algo in ("rloo", "grpo", "drgrpo")
        if not self.samples:
            object.__setattr__(self, "samples", 4 if grouped else 1)
        if grouped and self.samples < 2:
            raise UserError(f"--algo {self.algo} compares answers to one prompt; it needs --samples 2 or more")
        if self.temperature <= 0:
            raise UserError(f"--temperature {self.temperature} leaves nothing to explore; PPO needs more than 0")


@dataclass(frozen=True)
class DPOConfig:
    dpo_beta: float = opt(0.1, "beta: how dearly a nat away from the reference is paid")
    dpo_loss: Literal["dpo", "ipo"] = opt("dpo", "log-sigmoid of the margin, or its squared distance to 1/(2 beta)")
    label_smoothing: float = opt(0.0, "the chance that a label is wrong (cDPO)")


# ------------------------------------------------------------------------------------------------- equations
# (B, R) tensors and a bool mask. What lies outside the mask may be anything, NaN included: it is overwritten
# before the first operation, because 0 * NaN is NaN, in the loss and in the gradient.

def masked_mean(x, mask):
    return x.masked_fill(~mask, 0).sum() / mask.sum().clamp(min=1)


def masked_var(x, mask):
    """Biased: whitened numbers then have a mean square of exactly one."""
    return masked_mean((x - masked_mean(x, mask)) ** 2, mask)


def whiten(x, mask):
    """Mean 0 and variance 1 over the mask, 0 outside. A constant x only loses its mean: it has no scale."""
    var = masked_var(x, mask)
    scale = torch.where(var > 1e-12, (var + 1e-8).rsqrt(), 1.0)
    return ((x - masked_mean(x, mask)) * scale).masked_fill(~mask, 0)


def token_weights(mask, mean="token", limit=None):
    """(B, R) weights w: the loss of a minibatch is sum(w * loss). Micro-batches take rows of w, so their losses add
    up to the minibatch's however it is cut.

    token     1 / N          every token alike (PPO, RLOO)
    sequence  1 / (B n_b)    GRPO as published: the longer an answer, the less each of its tokens counts
    constant  1 / (B limit)  Dr. GRPO, unbiased; limit = the longest answer allowed
    """
    B, n = mask.size(0), mask.sum(1, keepdim=True)                                  # n (B, 1)
    if mean == "token":
        return mask / n.sum()
    return mask / (B * n if mean == "sequence" else B * limit)


def kl_estimate(logp, ref_logp, kind="k1"):
    """KL(pi || ref) per token, on tokens drawn from pi. k1 and k3 are unbiased values, k3 is never negative. That
    says nothing about gradients: only k1, and only in the reward, optimises J."""
    log_ratio = ref_logp - logp
    return {"k1": -log_ratio, "k2": log_ratio ** 2 / 2, "k3": log_ratio.exp() - 1 - log_ratio}[kind]


def token_rewards(scores, logp, ref_logp, mask, beta):
    """-beta k1 on every real token, + score (B,) on the last one. Detached: rewards are data. Returns (B, R)."""
    penalty = (beta * kl_estimate(logp, ref_logp)).detach().masked_fill(~mask, 0)
    last = mask.sum(1, keepdim=True) - 1                                            # (B, 1)
    return (-penalty).scatter_add(1, last, scores[:, None].to(penalty.dtype))


def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16). Past the last real token reward and value
    are zero: a padded row gives the same numbers as the row alone. Returns advantages, returns, both (B, R)."""
    rewards, values = rewards.masked_fill(~mask, 0), values.masked_fill(~mask, 0)
    adv, running = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.size(1))):
        next_value = values[:, t + 1] if t + 1 < rewards.size(1) else 0.0
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        running = torch.where(mask[:, t], delta + gamma * lam * running, 0.0)
        adv[:, t] = running
    return adv, adv + values


def rloo_advantage(returns):
    """returns (B, k) -> each minus the mean of the other k - 1 answers to its prompt."""
    k = returns.size(1)
    return (returns - returns.mean(1, keepdim=True)) * k / (k - 1)


def grpo_advantage(scores, std=True):
    """scores (B, k) minus the prompt's mean, over its std (GRPO) or not (Dr. GRPO). Equal scores give 0."""
    centred = scores - scores.mean(1, keepdim=True)
    return centred / (scores.std(1, keepdim=True) + 1e-4) if std else centred


def ppo_policy_loss(logp, old_logp, advantages, mask, clip=0.2):
    """The clipped surrogate (PPO, eq. 7, negated) per token: (B, R), 0 outside the mask. No gradient where the ratio
    has already left the clip range in the direction its advantage asks for."""
    ratio = (logp - old_logp).masked_fill(~mask, 0).exp()
    advantages = advantages.masked_fill(~mask, 0)
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))


def ppo_value_loss(values, old_values, returns, mask, clip=0.2):
    """Half the squared error per token, of the value or of its clipped move, whichever is worse: (B, R), 0 outside."""
    values, old_values, returns = (x.masked_fill(~mask, 0) for x in (values, old_values, returns))
    loss = (values - returns) ** 2
    if clip:
        loss = torch.maximum(loss, (old_values + (values - old_values).clamp(-clip, clip) - returns) ** 2)
    return loss / 2


def pairwise_loss(chosen, rejected):
    """-log P(chosen beats rejected), Bradley-Terry."""
    return -F.logsigmoid(chosen - rejected)


def rank_loss(scores, rank, mask=None):
    """All pairs among a prompt's K answers, averaged per prompt so that a 9-way ranking does not outvote a pair
    (InstructGPT, eq. 1). scores, rank (B, K), smaller rank = better; equal ranks are no pair; mask: which answers
    exist. Returns the loss (B,) and the number of pairs (B,)."""
    mask = torch.ones_like(rank, dtype=torch.bool) if mask is None else mask
    s = scores.masked_fill(~mask, 0)
    pair = (rank[:, :, None] < rank[:, None, :]) & mask[:, :, None] & mask[:, None, :]              # (B, K, K)
    loss, n = pairwise_loss(s[:, :, None], s[:, None, :]).masked_fill(~pair, 0), pair.sum((1, 2))
    return loss.sum((1, 2)) / n.clamp(min=1), n


def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.1, label_smoothing=0.0, kind="dpo"):
    """Log-probabilities (B,), *summed* over the response -> loss (B,), margin (B,). The margin is the difference of
    the implicit rewards beta log(pi / ref); given all pairs, the optimum is pi* again (DPO, eq. 7; IPO, eq. 17)."""
    h = (chosen - ref_chosen) - (rejected - ref_rejected)
    if kind == "ipo":
        return (h - 1 / (2 * beta)) ** 2, beta * h
    loss = -(1 - label_smoothing) * F.logsigmoid(beta * h) - label_smoothing * F.logsigmoid(-beta * h)
    return loss, beta * h


def entropy(logits):
    """(..., V) -> (...), exact. entr(0) is 0, where p log p would make NaN of a banned token."""
    return torch.special.entr(logits.softmax(-1)).sum(-1)


def explained_variance(values, returns, mask):
    """1: the critic knows the return. 0: no better than a constant. Below: worse."""
    return 1 - masked_var(returns - values, mask) / masked_var(returns, mask).clamp(min=1e-12)


def best_of_n(scores):
    """scores (B, n) -> (B,) the best sample of each prompt: the baseline that RL has to meet."""
    return scores.argmax(1)


def best_of_n_kl(n):
    """How far best-of-n is from its sampler, at most."""
    return math.log(n) - (n - 1) / n


def feedme(scores, keep=1, at_least=-math.inf):
    """Which samples to imitate: each prompt's `keep` best that reach `at_least`. (B, n) -> [(b, i), ...]. Supervised
    tuning on those and on demonstrations is how text-davinci-001 was made."""
    top = scores.topk(min(keep, scores.size(1)), 1)
    return [(b, i) for b, row in enumerate(zip(top.values.tolist(), top.indices.tolist()))
            for s, i in zip(*row) if s >= at_least]


class KLController:
    """beta, nudged so that KL approaches `target` nats (Ziegler et al. 2019, section 2.2). Target 0: fixed."""

    def __init__(self, beta, target=0.0, horizon=10_000):
        self.beta, self.target, self.horizon = beta, target, horizon

    def update(self, kl, answers):
        if self.target:                                     # an error counts as 20 % at most: one batch is noise
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.beta *= 1 + error * answers / self.horizon

    def state_dict(self):
        return {"beta": self.beta}

    def load_state_dict(self, state):
        self.beta = state["beta"]


class EMA:
    """A running average of named parameters; of an adapter's only, when only the adapter learns."""

    def __init__(self, params, decay):
        self.decay, self.shadow = decay, {name: p.detach().clone() for name, p in params.items()}

    @torch.no_grad()
    def update(self, params):
        for name, p in params.items():
            self.shadow[name].lerp_(p, 1 - self.decay)

    @contextlib.contextmanager
    def applied(self, params):
        """Inside, the parameters are the average; afterwards they are themselves again."""
        own = {name: p.detach().clone() for name, p in params.items()}
        try:
            assign(params, self.shadow)
            yield
        finally:
            assign(params, own)


@torch.no_grad()
def assign(params, values):
    for name, p in params.items():
        p.copy_(values[name])


# --------------------------------------------------------------------------------------- from models to numbers

class Batch(NamedTuple):
    """Prompts with responses in right-padded rows, and what is known about every action (diagram above)."""
    tokens: torch.Tensor                        # (B, T)
    start: torch.Tensor                         # (B,)      prompt lengths
    mask: torch.Tensor                          # (B, R)    from here on, all (B, R)
    logp: torch.Tensor = None                   #           of the sampler, at rollout
    ref_logp: torch.Tensor = None
    entropy: torch.Tensor = None
    values: torch.Tensor = None                 #           of the critic, at rollout
    rewards: torch.Tensor = None
    advantages: torch.Tensor = None
    returns: torch.Tensor = None

    @property
    def lengths(self):                          # (B,)      real tokens of each row
        return self.start + self.mask.sum(1)

    def take(self, rows):
        """These rows alone, trimmed to the longest of them: padding costs time, never a number."""
        start, mask, T = self.start[rows], self.mask[rows], int(self.lengths[rows].max())
        R = int(mask.sum(1).max())
        rest = (x if x is None else x[rows, :R] for x in self[3:])
        return Batch(self.tokens[rows, :T], start, mask[:, :R], *rest)


def pack(prompts, responses, device="cpu", pad=0):
    """Lists of token ids -> Batch. Lengths, never the pad id, say what is real."""
    rows = [[*p, *y] for p, y in zip(prompts, responses)]
    T, R = max(map(len, rows)), max(map(len, responses))
    tokens = torch.tensor([row + [pad] * (T - len(row)) for row in rows], device=device)
    start, n = (torch.tensor([len(x) for x in lists], device=device) for lists in (prompts, responses))
    return Batch(tokens, start, torch.arange(R, device=device) < n[:, None])


class Actor:
    """A model as a distribution over actions: softmax(logits / temperature), `banned` ids impossible. Sampling and the
    old, new and reference log-probabilities all read this one head, so they cannot disagree about either."""

    def __init__(self, model, temperature=1.0, banned=()):
        self.model, self.temperature, self.banned = model, temperature, list(banned)

    def __getattr__(self, name):                            # trunk, config, ...: as the model has them
        return getattr(self.model, name)

    def head(self, hidden):                                 # (..., C) -> (..., V), at least fp32
        logits = self.model.head(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / self.temperature
        if self.banned:
            logits[..., self.banned] = -torch.inf
        return logits


def action_states(model, batch, past=None):
    """The hidden state each action was taken in, (N, C), row by row; the model's head has yet to see them."""
    hidden, _ = model.trunk(batch.tokens, past)
    b, t = batch.mask.nonzero(as_tuple=True)
    return hidden[b, batch.start[b] - 1 + t]


def spread(x, mask):
    """(N, ...) in row order -> (B, R, ...), 0 where no action was taken."""
    out = x.new_zeros(*mask.shape, *x.shape[1:])
    return out.index_put(mask.nonzero(as_tuple=True), x)


def action_logp(logits, batch):
    """log-probability of the tokens that were emitted, (B, R), from the logits (N, V) of their states."""
    b, t = batch.mask.nonzero(as_tuple=True)
    emitted = batch.tokens[b, batch.start[b] + t]
    return spread(logits.log_softmax(-1).gather(-1, emitted[:, None])[:, 0], batch.mask)


def logprobs(actor, batch, past=None):
    """log pi of every response token, (B, R), 0 outside the mask. Costs vocabulary only where there is an action."""
    return action_logp(actor.head(action_states(actor, batch, past)), batch)


def values(model, head, batch, past=None):
    """The critic's forecast before every action, (B, R): same positions as `logprobs`."""
    return spread(head(action_states(model, batch, past)), batch.mask)


def scores(model, head, batch, past=None):
    """The reward model's verdict on whole rows, (B,), read at the last real token (found by length, not by pad id)."""
    hidden, _ = model.trunk(batch.tokens, past)
    return head(hidden[torch.arange(len(hidden)), batch.lengths - 1])


class ScalarHead(nn.Module):
    """hidden (..., C) -> (...): gain (w h + b) + shift. w starts N(0, 1 / (C + 1)), or zero. gain and shift are set by
    `calibrate`, saved, and never trained."""

    def __init__(self, width, zero=False):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width) if zero else torch.randn(width) / math.sqrt(width + 1))
        self.bias = nn.Parameter(torch.zeros(()))
        self.register_buffer("gain", torch.ones(()))
        self.register_buffer("shift", torch.zeros(()))

    def forward(self, hidden):
        return self.gain * (hidden.to(self.weight.dtype) @ self.weight + self.bias) + self.shift


@torch.no_grad()
def calibrate(head, scores, scale=True):
    """The ranking loss cannot see a shift or know a scale, so fix both: what scored `scores` now scores 0 on average,
    with standard deviation 1. Then beta means the same for every reward model. scale=False only moves the zero."""
    std = scores.std(unbiased=False).item() if scale else 1.0
    if not std > 1e-8:
        raise UserError("the reward model gives every reference sample the same score; train it longer")
    head.gain /= std
    head.shift.copy_((head.shift - scores.mean()) / std)


def micro_batches(lengths, budget):
    """Row indices in groups of similar length, each at most `budget` tokens once padded (a longer row goes alone)."""
    groups = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):                  # ascending: i sets the width
        if groups and (len(groups[-1]) + 1) * lengths[i] <= budget:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


@torch.no_grad()
def inference(f, batch, budget):
    """f(part) -> (b, r, ...) over micro-batches, put back in order: (B, R, ...), 0 where nothing was computed."""
    out = None
    for rows in micro_batches(batch.lengths.tolist(), budget):
        y = f(batch.take(rows))
        out = y.new_zeros(*batch.mask.shape, *y.shape[2:]) if out is None else out
        out[rows, :y.size(1)] = y
    return out


def model_reward(role, head, budget=16_384):
    """A reward model in the shape `train_ppo` wants: (prompts, responses), lists of ids -> scores (B,)."""
    def reward(prompts, responses):
        with role() as (model, past):
            batch = pack(prompts, responses, model.wte.weight.device)
            return inference(lambda part: scores(model, head, part, past)[:, None], batch, budget)[:, 0]
    return reward


# ------------------------------------------------------------------------- supervised steps: reward model and DPO
# Each takes one micro-batch and returns a sum and a count, so that a step can divide by the count of all its parts.

class Ranked(NamedTuple):
    scores: torch.Tensor                        # (B, K)
    rank: torch.Tensor                          # (B, K)   smaller = better; the distance is the confidence
    mask: torch.Tensor                          # (B, K)   which answers exist
    length: torch.Tensor                        # (B, K)   response tokens


def reward_step(role, head, examples):
    """examples: [(prompt, [answer, ...], [rank, ...]), ...]; a comparison is two answers of ranks 0 and 1 (or 0 and
    the margin of votes). One forward scores every answer, and all pairs of a prompt stay together: spread over batches
    they overfit within an epoch. Returns the loss summed over prompts, the number of prompts that hold a pair, Ranked."""
    with role() as (model, past):
        flat = pack([p for p, answers, _ in examples for _ in answers],
                    [y for _, answers, _ in examples for y in answers], model.wte.weight.device)
        s = scores(model, head, flat, past)
    n = torch.tensor([len(answers) for _, answers, _ in examples], device=s.device)
    mask = torch.arange(int(n.max()), device=s.device) < n[:, None]                 # (B, K)
    rank = torch.tensor([float(r) for _, _, ranks in examples for r in ranks], device=s.device)
    grid = [torch.zeros(mask.shape, dtype=x.dtype, device=s.device).masked_scatter(mask, x)
            for x in (s, rank, flat.mask.sum(1))]
    loss, pairs = rank_loss(grid[0], grid[1], mask)
    return loss.sum(), (pairs > 0).sum(), Ranked(grid[0].detach(), grid[1], mask, grid[2])


def correlation(x, y):
    x, y = (z.double() - z.double().mean() for z in (x, y))
    return ((x * y).sum() / (x.norm() * y.norm()).clamp(min=1e-12)).item()


def reward_report(parts):
    """[Ranked, ...] -> accuracy over pairs (a tie in score is half right), overall and by rank distance; how much score
    follows length (0.5 and more is a length model)."""
    right = defaultdict(list)
    for s, rank, mask, _ in parts:
        pair = (rank[:, :, None] < rank[:, None, :]) & mask[:, :, None] & mask[:, None, :]
        won = torch.sign(s[:, :, None] - s[:, None, :])[pair] / 2 + 0.5
        for distance, w in zip((rank[:, None, :] - rank[:, :, None])[pair].tolist(), won.tolist()):
            right[round(distance)].append(w)
    everything = [w for ws in right.values() for w in ws]
    report = {"accuracy": sum(everything) / max(len(everything), 1), "pairs": len(everything)}
    report |= {f"accuracy_margin_{d}": sum(ws) / len(ws) for d, ws in sorted(right.items())}
    s, n = (torch.cat([part[i][part.mask] for part in parts]) for i in (0, 3))
    return report | {"score_length_corr": correlation(s, n), "score_mean": s.mean().item(), "score_std": s.std().item()}


def dpo_step(policy, reference, examples, cfg):
    """examples: [(prompt, chosen, rejected), ...]. Returns the loss summed over pairs, their number, and sums to
    log. That both answers grow less likely is normal: only their margin is trained."""
    prompts, chosen, rejected = zip(*examples)
    logp = []
    for role, learns in ((policy, torch.is_grad_enabled()), (reference, False)):
        with role() as (model, past), torch.set_grad_enabled(learns):
            batch = pack(prompts + prompts, chosen + rejected, model.wte.weight.device)
            logp += logprobs(Actor(model), batch, past).sum(1).chunk(2)             # chosen (B,), rejected (B,)
    loss, margin = dpo_loss(*logp, cfg.dpo_beta, cfg.label_smoothing, cfg.dpo_loss)
    seen = {"accuracy": (margin > 0).float(), "margin": margin, "chosen_logp": logp[0], "rejected_logp": logp[1]}
    return loss.sum(), len(examples), {name: x.detach().sum().item() for name, x in seen.items()}


# ------------------------------------------------------------------------------------------------------------ PPO

class Roles(NamedTuple):
    policy: Callable
    reference: Callable                         # the policy as it began; never a gradient
    critic: Callable = None                     # --algo ppo only


@torch.no_grad()
def rollout(policy, reference, prompts, eos, max_new, temperature=1.0, banned=(), generator=None, budget=16_384):
    """Answer every prompt and score every action. Returns Batch (logp, ref_logp, entropy filled) and the answers.

    The old log-probabilities come from a second forward, the very one `update` will run, not from the sampler: the
    ratio then starts at 1 to rounding, whatever dtype the cache has. Policy and reference see the same micro-batches,
    so equal weights give a KL of exactly 0.
    """
    responses = [None] * len(prompts)
    with policy() as (model, past):
        actor = Actor(model, temperature, banned)
        for rows in micro_batches([len(p) + max_new for p in prompts], budget):
            new = generate(actor, [prompts[i] for i in rows], max_new, eos=eos, past=past, generator=generator)
            for i, y in zip(rows, new):
                responses[i] = y
        batch = pack(prompts, responses, model.wte.weight.device)

        def f(part):
            logits = actor.head(action_states(actor, part, past))
            return torch.stack((action_logp(logits, part), spread(entropy(logits), part.mask)), -1)
        logp, h = inference(f, batch, budget).unbind(-1)
    with reference() as (model, past):
        actor = Actor(model, temperature, banned)
        ref_logp = inference(lambda part: logprobs(actor, part, past), batch, budget)
    return batch._replace(logp=logp, ref_logp=ref_logp, entropy=h), responses


class PPOState:
    """Everything that evolves: parameters by name, their Adam states, beta, the average, the iteration count. All
    randomness is a function of (seed, iteration), so this, saved between iterations, is an exact resume."""

    def __init__(self, cfg, lr, policy, value=None):
        self.params = {"policy": dict(policy)} | ({"value": dict(value)} if value else {})
        self.lr = {"policy": lr, "value": cfg.value_lr or lr}
        self.optim = {who: torch.optim.Adam(params.values(), self.lr[who], betas=(0.9, 0.95), eps=1e-5)
                      for who, params in self.params.items()}
        self.kl = KLController(cfg.kl_coef, cfg.kl_target, cfg.kl_horizon)
        self.ema = EMA(self.params["policy"], cfg.ema) if cfg.ema else None
        self.step = 0                                       # iterations done
        self.bad = dict.fromkeys(self.params, 0)            # non-finite gradients in a row

    def apply(self, who, scale, max_norm=1.0):
        """Clip and step at `scale` times the learning rate; scale 0 only forgets the gradient. A gradient that is not
        finite steps nowhere, and ten of them end the run. Returns the norm before clipping."""
        params, optim = self.params[who], self.optim[who]
        optim.param_groups[0]["lr"] = self.lr[who] * scale
        norm = nn.utils.clip_grad_norm_(params.values(), max_norm).item()
        self.bad[who] = 0 if math.isfinite(norm) else self.bad[who] + 1
        if self.bad[who] == 10:
            name = next(k for k, p in params.items() if p.grad is not None and not p.grad.isfinite().all())
            raise UserError(f"ten gradients in a row were not finite, beginning with {name} ({who}); lower --lr")
        if scale and not self.bad[who]:
            optim.step()
        optim.zero_grad()
        return norm

    def state_dict(self):
        return {"step": self.step, "bad": self.bad, "beta": self.kl.beta, "ema": self.ema and self.ema.shadow,
                "params": {who: {k: p.detach() for k, p in params.items()} for who, params in self.params.items()},
                "optim": {who: optim.state_dict() for who, optim in self.optim.items()}}

    def load_state_dict(self, state):
        self.step, self.bad, self.kl.beta = state["step"], dict(state["bad"]), state["beta"]
        for who, params in self.params.items():
            assign(params, state["params"][who])
            self.optim[who].load_state_dict(state["optim"][who])
        if self.ema:
            self.ema.shadow = {k: t.clone() for k, t in state["ema"].items()}


def rng(*key, device="cpu"):
    """A generator that is a function of its key, through `random` because torch keeps 32 bits of a CPU seed."""
    return torch.Generator(device).manual_seed(random.Random(repr(key)).getrandbits(32))


def draw(n, count, seed, step):
    """Which of n prompts iteration `step` asks: each one once per pass, every pass in an order of its own."""
    orders = defaultdict(list)
    for at in range(step * count, (step + 1) * count):
        pass_, i = divmod(at, n)
        orders[pass_] = orders[pass_] or torch.randperm(n, generator=rng(seed, "prompts", pass_)).tolist()
        yield orders[pass_][i]


def rate(kind, step, steps):
    """Share of the learning rate. Whitened advantages never shrink: only the rate can let a policy settle."""
    return 1 - step / steps if kind == "linear" else min(1.0, 0.1 + 0.09 * step)


def advantages(cfg, batch, scores):
    """Where the algorithms differ: Batch with rewards (and values), scores (B,) -> advantages, returns, both (B, R)."""
    mask, groups = batch.mask, (-1, cfg.samples)
    if cfg.algo == "ppo":
        adv, returns = gae(batch.rewards, batch.values, mask, cfg.gamma, cfg.lam)
        return whiten(adv, mask), returns
    if cfg.algo == "reinforce":                             # reward to go; whitening is the baseline
        adv, returns = gae(batch.rewards, torch.zeros_like(batch.rewards), mask, cfg.gamma, lam=1.0)
        return whiten(adv, mask), returns
    total = batch.rewards.sum(1)                            # one advantage for the whole answer
    each = (rloo_advantage(total.view(groups)) if cfg.algo == "rloo"
            else grpo_advantage(scores.view(groups), std=cfg.algo == "grpo"))
    return each.view(-1, 1) * mask, total[:, None] * mask


def add_ptx(cfg, policy, params, parts):
    """Add ptx_coef times the cross-entropy per token of pre-training text to the gradients. parts: [(x, y), ...], y -1
    where there is no target. Returns the cross-entropy and the norm of what it added over that of what was there."""
    ppo = {name: p.grad.clone() for name, p in params.items() if p.grad is not None}
    count, total = sum(int((y >= 0).sum()) for _, y in parts), 0.0
    for x, y in parts:
        with policy() as (model, past):
            hidden, _ = model.trunk(x, past)
            loss = F.cross_entropy(model.head(hidden[y >= 0]).float(), y[y >= 0], reduction="sum") / count
            (cfg.ptx_coef * loss).backward()
            total += loss.item()
    added = nn.utils.get_total_norm([params[name].grad - g for name, g in ppo.items()])
    return total, (added / nn.utils.get_total_norm(ppo.values()).clamp(min=1e-12)).item()


def update(cfg, roles, state, batch, value_head, scale, generator, banned=(), ptx=None):
    """Step 5. Every pass is one permutation, cut into minibatches, each one optimiser step. Returns what was seen,
    averaged over minibatches, every number over real tokens only."""
    log, mean = defaultdict(list), {"grpo": "sequence", "drgrpo": "constant"}.get(cfg.algo, "token")
    passes = (torch.randperm(len(batch.mask), generator=generator) for _ in range(cfg.ppo_epochs))
    for minibatch in (m for order in passes for m in order.tensor_split(cfg.minibatches)):
        mini, seen = batch.take(minibatch), defaultdict(float)
        even, weight = token_weights(mini.mask), token_weights(mini.mask, mean, cfg.response_tokens)
        for rows in micro_batches(mini.lengths.tolist(), cfg.micro_tokens):
            part = mini.take(rows)
            mask, e, w = part.mask, *(x[rows, :part.mask.size(1)] for x in (even, weight))
            with roles.policy() as (model, past):           # backward inside: recomputation must meet the same role
                logp = logprobs(Actor(model, cfg.temperature, banned), part, past)
                loss = ppo_policy_loss(logp, part.logp, part.advantages, mask, cfg.cliprange)
                if mean != "token":                         # GRPO's penalty. Its optimum is not pi*
                    loss = loss + state.kl.beta * kl_estimate(logp, part.ref_logp, "k3").masked_fill(~mask, 0)
                (w * loss).sum().backward()
            with torch.no_grad():
                log_ratio = (logp - part.logp).masked_fill(~mask, 0)
                ratio = log_ratio.exp()
                seen["policy_loss"] += (w * loss).sum()
                seen["ratio"] += (e * ratio).sum()
                seen["approx_kl"] += (e * kl_estimate(0.0, log_ratio, "k3")).sum()
                seen["clipfrac"] += (e * ((ratio - 1).abs() > cfg.cliprange)).sum()
                seen["ratio_off"] = max(seen["ratio_off"], (ratio - 1).abs().max().item())
            if roles.critic:
                with roles.critic() as (model, past):
                    v = values(model, value_head, part, past)
                    loss = ppo_value_loss(v, part.values, part.returns, mask, cfg.cliprange_value)
                    (e * loss).sum().backward()
                moved = (v.detach() - part.values).masked_fill(~mask, 0).abs()
                seen["value_loss"] += (e * loss).sum().detach()
                seen["clipfrac_value"] += (e * (moved > cfg.cliprange_value)).sum()
        stop = cfg.target_kl and seen["approx_kl"] > cfg.target_kl
        if ptx and not stop:
            seen["ptx_loss"], seen["ptx_grad_ratio"] = add_ptx(
                cfg, roles.policy, state.params["policy"], ptx(state.step, len(log["ratio"])))
        for who in state.params:
            frozen = stop or (who == "policy" and state.step < cfg.value_warmup)
            seen[f"grad_norm_{who}"] = state.apply(who, 0 if frozen else scale)
        for name, x in seen.items():
            log[name].append(float(x))
        if stop:
            break
    stats = {name: sum(xs) / len(xs) for name, xs in log.items()}
    return stats | {"ratio_off": max(log["ratio_off"]), "ratio_first": log["ratio_off"][0],
                    "minibatches": len(log["ratio"]), "skipped": sum(not math.isfinite(x) for name in state.params
                                                                     for x in log[f"grad_norm_{name}"])}


def describe(batch, responses, scores, ended, beta):
    """The rollout in numbers: over answers, or over real tokens."""
    mask, n = batch.mask, batch.mask.sum(1).float()
    k1, k3 = (kl_estimate(batch.logp, batch.ref_logp, k).masked_fill(~mask, 0).sum(1) for k in ("k1", "k3"))
    grams = [[tuple(y[i:i + 4]) for i in range(len(y) - 3)] for y in responses]
    kl = k1.mean().item()
    return {"score": scores.mean().item(), "score_std": scores.std(unbiased=False).item(),
            "objective": scores.mean().item() - beta * kl, "beta": beta, "kl": kl, "kl_k3": k3.mean().item(),
            "kl_stderr": k1.std(unbiased=False).item() / len(k1) ** 0.5, "sqrt_kl": max(kl, 0.0) ** 0.5,
            "entropy": masked_mean(batch.entropy, mask).item(),
            "entropy_answer": -batch.logp.masked_fill(~mask, 0).sum(1).mean().item(),
            "length": n.mean().item(), "length_p95": n.quantile(0.95).item(),
            "eos_rate": ended.float().mean().item(), "score_length_corr": correlation(scores, n),
            "unique": len(set(map(tuple, responses))) / len(responses),
            "repeat4": 1 - sum(len(set(g)) for g in grams) / max(sum(map(len, grams)), 1)}


def train_ppo(cfg, roles, state, prompts, reward, eos, steps, batch, seed=0, value_head=None, banned=(), gold=None,
              ptx=None):
    """Iterate until `state.step` is `steps`; after each iteration yield (metrics, Batch), the moment to log and save.

    roles    Roles; `state` holds the parameters that learn in them
    prompts  lists of token ids; reward and gold: (prompts, responses) -> scores, one per response; gold is only logged
    eos      id, or ids, that end an answer; banned: ids that can neither be sampled nor cost probability (pads)
    batch    answers per iteration, cfg.samples of them to each prompt
    ptx      None, or (iteration, minibatch) -> [(x, y), ...] of pre-training text
    An interrupted iteration leaves no trace in the last saved state: it is run again, with the same random numbers.
    """
    stop = {eos} if isinstance(eos, int) else set(eos)
    if batch % cfg.samples or batch < cfg.minibatches:
        raise UserError(f"--batch {batch} must be a multiple of --samples {cfg.samples} and at least --minibatches "
                        f"{cfg.minibatches}")
    for role in filter(None, roles):
        with role() as (model, _):
            model.eval()
    device = model.wte.weight.device
    while state.step < steps:
        clock, beta, in_loss = [time.perf_counter()], state.kl.beta, cfg.algo in ("grpo", "drgrpo")
        ask = [prompts[i] for i in draw(len(prompts), batch // cfg.samples, seed, state.step) for _ in range(cfg.samples)]
        b, responses = rollout(roles.policy, roles.reference, ask, stop, cfg.response_tokens, cfg.temperature, banned,
                               rng(seed, "sample", state.step, device=device), cfg.micro_tokens)
        clock.append(time.perf_counter())

        raw = torch.as_tensor(reward(ask, responses), dtype=torch.float32, device=device)
        if raw.shape != (batch,) or not raw.isfinite().all():
            raise UserError(f"the reward must be one finite number for each of {batch} answers; it gave "
                            f"{tuple(raw.shape)}, {int((~raw.isfinite()).sum())} of them not finite")
        ended = torch.tensor([y[-1] in stop for y in responses], device=device)
        s = raw if cfg.missing_eos is None else torch.where(ended, raw, cfg.missing_eos)
        b = b._replace(rewards=token_rewards(s, b.logp, b.ref_logp, b.mask, 0.0 if in_loss else beta))
        if roles.critic:
            with roles.critic() as (model, past):
                v = inference(lambda part: values(model, value_head, part, past), b, cfg.micro_tokens)
            b = b._replace(values=v)
        adv, returns = advantages(cfg, b, s)
        b = b._replace(advantages=adv, returns=returns)
        clock.append(time.perf_counter())

        metrics = {"step": state.step + 1, **describe(b, responses, s, ended, beta)}
        if roles.critic:
            plain = returns - b.values                      # advantages before whitening
            metrics |= {"explained_variance": explained_variance(b.values, returns, b.mask).item(),
                        "value": masked_mean(b.values, b.mask).item(), "return": masked_mean(returns, b.mask).item(),
                        "advantage": masked_mean(plain, b.mask).item(),
                        "advantage_std": masked_var(plain, b.mask).sqrt().item()}
        if cfg.samples > 1:
            metrics["zero_std"] = (s.view(-1, cfg.samples).std(1) < 1e-6).float().mean().item()
        if gold:
            metrics["gold"] = torch.as_tensor(gold(ask, responses), dtype=torch.float32).mean().item()
        scale = rate(cfg.schedule, state.step, steps)
        metrics |= update(cfg, roles, state, b, value_head, scale, rng(seed, "order", state.step), banned, ptx)

        state.kl.update(metrics["kl"], batch)
        if state.ema:
            state.ema.update(state.params["policy"])
        state.step += 1
        clock.append(time.perf_counter())
        parts = zip(("rollout", "score", "update"), clock, clock[1:])
        yield metrics | {"lr": state.lr["policy"] * scale} | {f"seconds_{n}": y - x for n, x, y in parts}, b


# ------------------------------------------------------------------------------------------------ in plain words

def health(m, tolerance=1e-4):
    """What is wrong with an iteration, in words; [] when every number is in its healthy range. `tolerance` is the
    rounding of a log-probability: 1e-4 in fp32, 0.1 in bf16."""
    see = defaultdict(float, m)
    checks = (
        (see["ratio_first"] > tolerance, "the first ratio is off 1 by {ratio_first:.1e}: rollout and update "
         "disagree (dropout on? another temperature or dtype?)"),
        (see["step"] == 1 and abs(see["kl"]) > tolerance, "KL starts at {kl:.2g}, not 0: the policy does not begin "
         "at the reference"),
        (see["kl"] < -3 * see["kl_stderr"] - tolerance, "KL is {kl:.2f}, below 0 by more than chance: sampling and "
         "scoring disagree"),
        (see["kl"] > 25, "KL is {kl:.0f} nats: the policy is leaving the reference; raise --kl_coef or set --kl_target"),
        (see["score_std"] == 0, "every answer scores {score:.3g}: there is nothing to learn from"),
        (see["zero_std"] > 0.5, "{zero_std:.0%} of the prompts have equal scores on all answers and teach nothing"),
        (see["eos_rate"] < 0.5, "only {eos_rate:.0%} of the answers end: allow more --response_tokens, or train the "
         "end token in SFT"),
        (see["length"] < 1.5, "answers have shrunk to {length:.1f} tokens: beta may cost more than the score pays"),
        (abs(see["score_length_corr"]) > 0.5, "score follows length (correlation {score_length_corr:.2f})"),
        (see["approx_kl"] > 0.1 or see["clipfrac"] > 0.5, "steps are too big (KL to the rollout {approx_kl:.3f}, "
         "{clipfrac:.0%} clipped): lower --lr or --ppo_epochs, or set --target_kl 0.05"),
        (see["clipfrac_value"] > 0.5, "{clipfrac_value:.0%} of the values are clipped: raise --cliprange_value"),
        (see["step"] > 10 and see["explained_variance"] < 0, "the critic is worse than a constant (explained variance "
         "{explained_variance:.2f}): raise --value_lr"),
        (see["unique"] < 0.1, "only {unique:.0%} of the answers differ: the policy has collapsed; raise --kl_coef"),
        (see["repeat4"] > 0.5, "{repeat4:.0%} of 4-grams are repeats"),
        (see["ptx_grad_ratio"] > 10, "the pre-training gradient is {ptx_grad_ratio:.0f} times PPO's: lower --ptx_coef"),
        (see["skipped"] > 0, "{skipped} steps were skipped: gradients were not finite"))
    return [text.format_map(m) for wrong, text in checks if wrong]


def show(batch, row=0, decode=str):
    """One padded row with every tensor, as a table. Line i is token i; its action was taken one position earlier."""
    names = [name for name in Batch._fields[3:] if getattr(batch, name) is not None]
    start, R, n = int(batch.start[row]), batch.mask.size(1), int(batch.lengths[row])
    lines = [f"{'position':>8} {'token':>12} {'action':>6} {'mask':>4} " + " ".join(f"{x:>10}" for x in names)]
    for i, token in enumerate(batch.tokens[row].tolist()):
        cells, t = f"{i:>8} {decode(token) if i < n else 'pad':>12}", i - start
        if 0 <= t < R:
            cells += f" {t:>6} {int(batch.mask[row, t]):>4} "
            cells += " ".join(f"{getattr(batch, name)[row, t].item():>10.4f}" for name in names)
        lines.append(cells)
    return "\n".join(lines)
