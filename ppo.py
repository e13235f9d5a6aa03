"""ppo.py: learn from preferences. Reward model, PPO with a KL penalty to a reference, and its relatives.

The objective of all of them, over answers y to prompts x, and its one solution (the tests hold us to it):

    J(pi) = E[score(x, y)] - beta KL(pi || ref)      pi*(y|x) = ref(y|x) exp(score(x, y) / beta) / Z(x)
    J(pi*) - J(pi) = beta KL(pi || pi*)              exactly, for every pi

One iteration of PPO:
 1. sample an answer to each prompt from the policy; it ends at the first EOS, an action like any other
 2. logp, ref_logp, value of every action, one forward each; score = a reward model, or any callable
 3. reward_t    = -beta (logp_t - ref_logp_t),  + score at the last real token (no EOS: a constant score)
 4. delta_t     = reward_t + gamma value_{t+1} - value_t           value past the last token = 0
    advantage_t = delta_t + gamma lam advantage_{t+1};  return_t = advantage_t + value_t;  then whiten
 5. epochs x minibatches (x micro-batches, which only accumulate),       ratio = exp(logp_new - logp)
    policy  mean max(-A ratio, -A clip(ratio, 1 - e, 1 + e))   + ptx_coef cross-entropy on plain text
    value   mean 1/2 max((v - ret)^2, (v_old + clip(v - v_old, -e, e) - ret)^2)
 6. beta drifts towards the KL target; the average of the weights (EMA) follows

The index convention, everywhere. Rows are right-padded; column t of a response tensor is the *action* "emit
response token t", taken knowing all before it: position start - 1 + t. Here start = 3 and n = 4:

    position      0    1    2    3    4    5    6    7
    tokens        p    p    p    a    b    c   EOS   .     (T)   pads: any id at all
    action t                0    1    2    3    -          (R)   column t reads position start - 1 + t
    emits                   a    b    c   EOS   .                token start + t
    mask                    1    1    1    1    0                t < n
    logp, ref_logp, value   x    x    x    x    0
    reward                 -k   -k   -k  s-k    0                k = beta (logp - ref_logp), s = score
    the score is read *at* the last real token, position start + n - 1: the EOS, when there is one

Papers: PPO 1707.06347; GAE 1506.02438; RLHF 1909.08593 and 2203.02155 (section 3.5, appendix C); RLOO
2402.14740; GRPO 2402.03300; Dr. GRPO 2503.20783; DPO 2305.18290; IPO 2310.12036; all roles on one base
2309.00754; KL estimators k1, k2, k3: Schulman 2020 (joschu.net/blog/kl-approx.html).

Deviations: no left padding, hence no position ids. Policy and critic share no trained weight, so each has its
own Adam and clipped norm, and the value loss needs no coefficient. The penalty is k1 *in the reward*, the one
estimator and place whose gradient is that of J (k3 in the reward ends 0.8 away from pi*, in the loss 0.3).

A *role* is a callable returning a context manager that yields (model, past): adapters of one frozen base,
copies or soft prompts can play policy, reference, critic and reward model; this file imports none of them.
Dropout is off in every role: model.eval(), gradients on.

B rows  T tokens  R response columns  N actions  C width  V vocabulary  K ranked answers  k samples a prompt
Public: PPOConfig, DPOConfig, Batch, pack, Actor, logprobs, values, scores, ScalarHead, calibrate,
model_reward, reward_step, pair_logprobs, dpo_step, rollout, Roles, PPOState, train_ppo, and the equations
"""
import math
import random
import time
from collections import defaultdict, namedtuple
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from data.runtime import distributed
from data.batches.batching import micro
from data.runtime.files import UserError
from data.results.ppo_metrics import describe
from data.runtime.device import MICRO
from model import generate, logprob


def opt(default, help, type=None, choices=None):
    return field(default=default, metadata=dict(help=help, type=type or default.__class__, choices=choices))


@dataclass(frozen=True)
class PPOConfig:
    """Flag = field. The first eight every training task has; here are the values PPO wants for them."""
    lr: float = opt(1e-3, "learning rate of the policy")
    batch: int = opt(64, "answers per iteration")
    steps: int = opt(100, "iterations: a rollout and its updates")
    seed: int = opt(1, "seed of prompts, samples and minibatches")
    max_new: int = opt(48, "longest answer in tokens, its end token included")
    temperature: float = opt(1.0, "of the policy, wherever it is sampled or scored")
    micro: int = opt(MICRO // 2, "padded tokens per forward: memory and time, not mathematics")
    clip: float = opt(1.0, "largest gradient norm, of policy and critic each")

    algo: str = opt("ppo", "only ppo has a critic", choices=("ppo", "rloo", "reinforce", "grpo", "drgrpo"))
    samples: int = opt(0, "answers per prompt; 0: 4 where they are compared (rloo, grpo, drgrpo), else 1")
    kl_coef: float = opt(0.05, "beta: score paid per nat of KL; where it starts, with --kl_target")
    kl_target: float = opt(0.0, "nats per answer that beta is steered to; 0: beta stays")
    kl_horizon: int = opt(1000, "answers over which beta may change by a fifth; Ziegler et al.: 10,000")
    missing_eos: float = opt(-1.0, "score of an answer that does not end; none: whatever it scored",
                             type=lambda word: None if word == "none" else float(word))
    gamma: float = opt(1.0, "discount; below 1 the optimum is no longer pi*")
    lam: float = opt(0.95, "GAE's lambda")
    ppo_epochs: int = opt(4, "passes over one rollout")
    minibatches: int = opt(4, "optimiser steps per pass")
    cliprange: float = opt(0.2, "how far a ratio may usefully move from 1")
    cliprange_value: float = opt(0.2, "how far a value may usefully move from its old self; 0: no limit")
    target_kl: float = opt(0.0, "end the passes when a minibatch is this far from the rollout; 0: never")
    value_lr: float = opt(0.0, "learning rate of the critic; 0: that of the policy")
    value_warmup: int = opt(0, "first iterations, which train the critic alone")
    ptx_coef: float = opt(0.0, "PPO-ptx: weight of the pre-training loss per token; 0: none")
    ema: float = opt(0.0, "decay per iteration of an average of the policy (InstructGPT: 0.992); 0: none")

    def __post_init__(self):
        grouped = self.algo in ("rloo", "grpo", "drgrpo")
        object.__setattr__(self, "samples", self.samples or (4 if grouped else 1))
        if grouped and self.samples < 2:
            raise UserError(f"--algo {self.algo} compares answers to one prompt: --samples must be 2 or more")
        if self.temperature <= 0:
            raise UserError(f"--temperature {self.temperature} explores nothing; it must be above 0")
        if self.batch % self.samples or self.batch < self.minibatches:
            raise UserError(f"--batch {self.batch} must be a multiple of --samples {self.samples}, at least "
                            f"--minibatches {self.minibatches}")


@dataclass(frozen=True)
class DPOConfig:
    dpo_beta: float = opt(0.1, "beta: the price of a nat away from the reference")
    dpo_loss: str = opt("dpo", "log-sigmoid of the margin, or squared error of it", choices=("dpo", "ipo"))
    label_smoothing: float = opt(0.0, "the chance that a label is wrong (cDPO)")

    def __post_init__(self):
        if self.dpo_beta == 0 or self.label_smoothing >= 0.5:
            raise UserError(f"--dpo_beta {self.dpo_beta} with --label_smoothing {self.label_smoothing} "
                            "teaches nothing; beta is above 0, smoothing below 0.5")
        if self.dpo_loss == "ipo" and self.label_smoothing:
            raise UserError("--dpo_loss ipo has no --label_smoothing; leave one of them out")


# ------------------------------------------------------------------------------------------------- equations
# (B, R) tensors and a bool mask. What lies outside the mask may be anything, NaN included: it is overwritten
# before the first operation, because 0 * NaN is NaN, in the loss and in the gradient.

def masked_mean(x, mask):
    return x.masked_fill(~mask, 0).sum() / mask.sum().clamp(min=1)


def whiten(x, mask):
    """Mean 0, biased variance 1 on the mask, 0 outside. A constant has no scale: it only loses its mean."""
    x = (x - masked_mean(x, mask)).masked_fill(~mask, 0)
    var = masked_mean(x ** 2, mask)
    return x * torch.where(var > 1e-12, (var + 1e-8).rsqrt(), 1.0)


def token_weights(mask, mean="token", limit=None):
    """(B, R) weights w: a minibatch's loss is sum(w * loss); micro-batches take rows of w and add up to it.

    token     1 / N          every token alike (PPO, RLOO)
    sequence  1 / (B n_b)    GRPO as published: the longer an answer, the less each of its tokens counts
    constant  1 / (B limit)  Dr. GRPO, unbiased; limit = the longest answer allowed
    """
    B, n = mask.size(0), mask.sum(1, keepdim=True)                              # n (B, 1)
    if mean == "token":
        return mask / n.sum()
    return mask / (B * n if mean == "sequence" else B * limit)


def kl_estimate(logp, ref_logp, kind="k1"):
    """KL(pi || ref) per token, on tokens drawn from pi. k1 and k3 are unbiased values, k3 is never negative.
    That says nothing about gradients: only k1, and only in the reward, optimises J."""
    log_ratio = ref_logp - logp
    return {"k1": -log_ratio, "k2": log_ratio ** 2 / 2, "k3": log_ratio.exp() - 1 - log_ratio}[kind]


def token_rewards(scores, logp, ref_logp, mask, beta):
    """-beta k1 on every real token, + score (B,) on the last. Detached: rewards are data. Returns (B, R)."""
    penalty = (beta * kl_estimate(logp, ref_logp)).detach().masked_fill(~mask, 0)
    last = mask.sum(1, keepdim=True) - 1                                        # (B, 1)
    return (-penalty).scatter_add(1, last, scores[:, None].to(penalty.dtype))


def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16). Past the last real token reward and
    value are 0: a padded row gives the numbers of the row alone. Returns advantages, returns, both (B, R)."""
    rewards, values = rewards.masked_fill(~mask, 0), values.masked_fill(~mask, 0)
    adv, running = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.size(1))):
        next_value = values[:, t + 1] if t + 1 < rewards.size(1) else 0.0
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        running = delta + gamma * lam * running             # still 0 where t lies behind the row
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
    """The clipped surrogate (PPO, eq. 7, negated) per token: (B, R), 0 outside the mask. No gradient where
    the ratio has already left the clip range in the direction its advantage asks for."""
    ratio = (logp - old_logp).masked_fill(~mask, 0).exp()
    advantages = advantages.masked_fill(~mask, 0)
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))


def ppo_value_loss(values, old_values, returns, mask, clip=0.2):
    """Half the squared error of the value or of its clipped move, whichever is worse: (B, R), 0 outside."""
    values, old_values, returns = (x.masked_fill(~mask, 0) for x in (values, old_values, returns))
    loss = (values - returns) ** 2
    if clip:
        near = old_values + (values - old_values).clamp(-clip, clip)
        loss = torch.maximum(loss, (near - returns) ** 2)
    return loss / 2


def pairwise_loss(chosen, rejected):
    """-log P(chosen beats rejected), Bradley-Terry."""
    return -F.logsigmoid(chosen - rejected)


def rank_loss(scores, rank, mask=None):
    """All pairs among a prompt's K answers, averaged per prompt: a 9-way ranking must not outvote a pair
    (InstructGPT, eq. 1). scores, rank (B, K), smaller rank = better; equal ranks are no pair; mask says which
    answers exist. Returns the loss (B,) and the number of pairs (B,)."""
    mask = torch.ones_like(rank, dtype=torch.bool) if mask is None else mask
    pair = (rank[:, :, None] < rank[:, None, :]) & mask[:, :, None] & mask[:, None, :]             # (B, K, K)
    s, n = scores.masked_fill(~mask, 0), pair.sum((1, 2))
    loss = pairwise_loss(s[:, :, None], s[:, None, :]).masked_fill(~pair, 0)
    return loss.sum((1, 2)) / n.clamp(min=1), n


def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.1, label_smoothing=0.0, kind="dpo"):
    """Log-probabilities (B,), *summed* over the answer -> loss (B,), margin (B,): the difference of the
    implicit rewards beta log(pi / ref). With all pairs DPO's optimum is pi* again (DPO, eq. 7); IPO stops at
    a log-ratio of 1 / (2 beta), which keeps it from trusting certain labels too far (IPO, eq. 17)."""
    h = (chosen - ref_chosen) - (rejected - ref_rejected)
    if kind == "ipo":
        return (h - 1 / (2 * beta)) ** 2, beta * h
    loss = -(1 - label_smoothing) * F.logsigmoid(beta * h) - label_smoothing * F.logsigmoid(-beta * h)
    return loss, beta * h


def entropy(logits):
    """(..., V) -> (...), exact. entr(0) is 0, where p log p would make NaN of a banned token."""
    return torch.special.entr(logits.softmax(-1)).sum(-1)


def best_of_n(scores):
    """scores (B, n) -> (B,) the best sample of each prompt: the baseline that RL has to meet."""
    return scores.argmax(1)


def feedme(scores, keep=1, at_least=-math.inf):
    """Which samples to imitate: each prompt's `keep` best that reach `at_least`. (B, n) -> [(b, i), ...].
    SFT on those and on demonstrations is how text-davinci-001 was made."""
    top = scores.topk(min(keep, scores.size(1)), 1).indices.tolist()
    return [(b, i) for b, row in enumerate(top) for i in row if scores[b, i] >= at_least]


class KLController:
    """beta, nudged so that KL nears `target` nats (Ziegler et al. 2019, section 2.2); target 0: fixed."""

    def __init__(self, beta, target=0.0, horizon=10_000):
        self.beta, self.target, self.horizon = beta, target, horizon

    def update(self, kl, answers):
        if self.target:                                 # an error counts as a fifth at most: a batch is noise
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


# ------------------------------------------------------------------------------------ from models to numbers

class Batch(NamedTuple):
    """Prompts with answers in right-padded rows, and what is known of every action (diagram above)."""
    tokens: torch.Tensor                        # (B, T)
    start: torch.Tensor                         # (B,)      prompt lengths
    mask: torch.Tensor                          # (B, R)    as is all that follows
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
        start, mask = self.start[rows], self.mask[rows]
        n = mask.sum(1)
        T, R = int((start + n).max()), int(n.max())
        columns = (x if x is None else x[rows, :R] for x in self[3:])
        return Batch(self.tokens[rows, :T], start, mask[:, :R], *columns)


def pack(prompts, answers, device="cpu", pad=0):
    """Lists of token ids -> Batch. Lengths, never the pad id, say what is real."""
    rows = [[*p, *y] for p, y in zip(prompts, answers)]
    T, R = max(map(len, rows)), max(map(len, answers))
    tokens = torch.tensor([row + [pad] * (T - len(row)) for row in rows], device=device)
    start, n = (torch.tensor([len(x) for x in lists], device=device) for lists in (prompts, answers))
    return Batch(tokens, start, torch.arange(R, device=device) < n[:, None])


class Actor:
    """A model as a distribution over actions: softmax(logits / temperature), `banned` ids impossible.
    Sampling, old, new and reference log-probabilities read this one head, so they cannot disagree."""

    def __init__(self, model, temperature=1.0, banned=()):
        self.model, self.temperature, self.banned = model, temperature, list(banned)

    def __getattr__(self, name):                            # trunk, config, wte: the model's own
        return getattr(self.model, name)

    def head(self, hidden):                                 # (..., C) -> (..., V), at least fp32
        logits = self.model.head(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / self.temperature
        ban = torch.tensor(self.banned, device=logits.device, dtype=torch.long)
        return logits.index_fill(-1, ban, -torch.inf)


def states(model, batch, past):
    """The hidden state in which each action was taken: (N, C), row by row. After the last token none is."""
    b, t = batch.mask.nonzero(as_tuple=True)
    return model.trunk(batch.tokens[:, :-1], past, at=(b, batch.start[b] - 1 + t))[0]


def spread(x, mask):
    """(N, ...), one entry per action -> (B, R, ...), 0 where there was none."""
    return x.new_zeros(*mask.shape, *x.shape[1:]).index_put(mask.nonzero(as_tuple=True), x)


def logprobs(actor, batch, past=None, entropies=False):
    """log pi of every response token, (B, R), 0 outside the mask; `entropies`: both, (B, R, 2). The
    vocabulary is paid for where there is an action, and nowhere else."""
    hidden, (b, t) = states(actor, batch, past), batch.mask.nonzero(as_tuple=True)
    emitted = batch.tokens[b, batch.start[b] + t]                               # (N,)
    if not entropies:
        return spread(logprob(actor.head, hidden, emitted), batch.mask)
    logp = (logits := actor.head(hidden)).log_softmax(-1)                       # (N, V)
    return spread(torch.stack((logp.gather(-1, emitted[:, None])[:, 0], entropy(logits)), -1), batch.mask)


def values(model, head, batch, past=None):
    """The critic's forecast before every action, (B, R): the positions that `logprobs` reads."""
    return spread(head(states(model, batch, past)), batch.mask)


def scores(model, head, batch, past=None):
    """The reward model's verdict on whole rows, (B,), at the last real token (by length, not by pad id)."""
    at = torch.arange(len(batch.tokens), device=batch.tokens.device), batch.lengths - 1
    return head(model.trunk(batch.tokens, past, at=at)[0])


class ScalarHead(nn.Module):
    """hidden (..., C) -> (...): gain (w h + b) + shift. w starts N(0, 1 / (C + 1)), or zero. gain and shift
    are set by `calibrate`, saved, and never trained."""

    def __init__(self, width, zero=False):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width) if zero else torch.randn(width) / math.sqrt(width + 1))
        self.bias = nn.Parameter(torch.zeros(()))
        self.register_buffer("gain", torch.ones(()))
        self.register_buffer("shift", torch.zeros(()))

    def forward(self, hidden):
        dot = (hidden.to(self.weight.dtype) * self.weight).sum(-1)      # autocast would round a matmul
        return self.gain * (dot + self.bias) + self.shift


@torch.no_grad()
def calibrate(head, scores, scale=True):
    """Ranking cannot see a shift and hardly a scale, so fix both: what scored `scores` now has mean 0 and
    standard deviation 1, and beta means the same under every reward model. scale=False: the zero only."""
    std = scores.std(unbiased=False).item() if scale else 1.0
    if not std > 1e-8:
        raise UserError("the reward model gives every reference sample the same score; train it longer")
    head.gain /= std
    head.shift.copy_((head.shift - scores.mean()) / std)


@torch.no_grad()
def inference(f, batch, budget):
    """f(part) -> (b, r, ...) over micro-batches, put back in order: (B, R, ...), 0 where nothing was."""
    out, n = None, batch.lengths.tolist()
    done = [(rows, f(batch.take(rows))) for rows in micro(distributed.share(range(len(n)), n), n, budget)]
    for rows, y in sum(distributed.gather(done), []):
        y = y.to(batch.mask.device)
        out = y.new_zeros(*batch.mask.shape, *y.shape[2:]) if out is None else out
        out[rows, :y.size(1)] = y
    return out


def model_reward(role, head, budget=MICRO):
    """A reward model in the shape `train_ppo` wants: (prompts, answers), lists of ids -> scores (B,)."""
    def reward(prompts, answers):
        with role() as (model, past):
            batch = pack(prompts, answers, model.wte.weight.device)
            return inference(lambda part: scores(model, head, part, past)[:, None], batch, budget)[:, 0]
    return reward


# --------------------------------------------------------------------- supervised steps: reward model and DPO
# One micro-batch in; a sum and a count out, so that a step can divide by the count of all its parts.

def reward_step(role, head, examples):
    """examples: [(prompt, [answer, ...], [rank, ...]), ...], what follows is not read; a comparison has ranks
    0 and 1, or 0 and the margin of votes. One forward scores all answers; the pairs of a prompt stay
    together: dealt out over batches they overfit in an epoch. Returns the loss summed over prompts, how many
    of them hold a pair, and (scores, rank, mask, answer length), each (B, K), for health.reward_report."""
    prompts, answers, ranks = zip(*((p, y, r) for p, ys, rs, *_ in examples for y, r in zip(ys, rs)))
    with role() as (model, past):
        flat = pack(prompts, answers, model.wte.weight.device)
        s = scores(model, head, flat, past)                                     # (all answers,)
    n = torch.tensor([len(ys) for _, ys, *_ in examples], device=s.device)
    mask = torch.arange(int(n.max()), device=s.device) < n[:, None]             # (B, K)
    columns = (s, torch.tensor(ranks, dtype=s.dtype, device=s.device), flat.mask.sum(1))
    s, rank, length = (spread(x, mask) for x in columns)                        # (B, K)
    loss, pairs = rank_loss(s, rank, mask)
    return loss.sum(), (pairs > 0).sum(), (s.detach(), rank, mask, length)


def pair_logprobs(role, examples):
    """Log-probabilities, summed over the answer, of the best and the worst one to each prompt: two (B,)."""
    with role() as (model, past):
        best, worst = ([ys[i] for _, ys, *_ in examples] for i in (0, -1))
        batch = pack([e[0] for e in examples] * 2, best + worst, model.wte.weight.device)
        return logprobs(Actor(model), batch, past).sum(1).chunk(2)


def dpo_step(role, examples, cfg):
    """examples: [(prompt, answers, ranks, (log-probabilities of the best and the worst before training))];
    these never change, so `pair_logprobs` finds them once, and no second model runs beside the first. Returns
    the loss summed over pairs, their number, and sums to log. That both answers grow less likely is normal:
    only their margin is trained."""
    chosen, rejected = pair_logprobs(role, examples)
    ref_chosen, ref_rejected = torch.tensor([e[3] for e in examples], device=chosen.device).unbind(1)
    loss, margin = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, cfg.dpo_beta, cfg.label_smoothing,
                            cfg.dpo_loss)
    seen = dict(accuracy=(margin > 0).float(), margin=margin, chosen_logp=chosen, rejected_logp=rejected)
    return loss.sum(), len(examples), {name: x.detach().sum().item() for name, x in seen.items()}


# ------------------------------------------------------------------------------------------------------- PPO

# The reference is the policy as it began. algo ppo has a critic, with its head: hidden -> value.
Roles = namedtuple("Roles", "policy reference critic value_head", defaults=(None, None))


@torch.no_grad()
def rollout(roles, prompts, eos, cfg, banned=(), generator=None):
    """Answer every prompt, score every action: Batch with logp, entropy, ref_logp, values; and the answers.
    The old logp is not the sampler's but that of the forward which `update` will run, so that ratios start at
    1 to rounding. Policy and reference see equal micro-batches: equal weights, KL exactly 0."""
    def act(part):
        return logprobs(Actor(model, cfg.temperature, banned), part, past, entropies=True)
    answers, v, n = {}, None, [len(p) + cfg.max_new for p in prompts]
    with roles.policy() as (model, past):
        if generator is not None:                   # a row's own dice: --micro and processes change no answer
            generator = torch.rand(len(n), cfg.max_new, generator=generator, device=generator.device)
            generator = generator.to(model.wte.weight.device)
        for rows in micro(distributed.share(range(len(n)), n), n, 8 * cfg.micro):
            new = generate(Actor(model, cfg.temperature, banned), [prompts[i] for i in rows], cfg.max_new,
                           eos=eos, past=past, generator=None if generator is None else generator[rows])
            answers.update(zip(rows, new))
        answers = distributed.merged(answers)
        batch = pack(prompts, answers, model.wte.weight.device)
        logp, h = inference(act, batch, cfg.micro).unbind(-1)
    with roles.reference() as (model, past):
        ref_logp = inference(act, batch, cfg.micro)[..., 0]
    if roles.critic:
        with roles.critic() as (model, past):
            v = inference(lambda part: values(model, roles.value_head, part, past), batch, cfg.micro)
    return batch._replace(logp=logp, entropy=h, ref_logp=ref_logp, values=v), answers


def advantages(cfg, batch, scores):
    """Where the algorithms differ: a batch with rewards, scores (B,) -> advantages, returns, both (B, R)."""
    mask, group = batch.mask, (-1, cfg.samples)
    if cfg.algo in ("ppo", "reinforce"):
        v, lam = (batch.values, cfg.lam) if cfg.algo == "ppo" else (torch.zeros_like(batch.rewards), 1.0)
        adv, returns = gae(batch.rewards, v, mask, cfg.gamma, lam)
        return whiten(adv, mask), returns                   # REINFORCE: reward to go, its mean the baseline
    total = batch.rewards.sum(1)                            # the others: one advantage for the whole answer
    each = (rloo_advantage(total.view(group)) if cfg.algo == "rloo"
            else grpo_advantage(scores.view(group), std=cfg.algo == "grpo"))
    return each.view(-1, 1) * mask, total[:, None] * mask


class PPOState:
    """Everything that evolves: parameters by name, their Adam states, beta, the average, the iteration count.
    Randomness is a function of (seed, iteration): this, saved between iterations, is an exact resume."""

    def __init__(self, cfg, policy, value=None):
        self.params = {"policy": dict(policy)} | ({"value": dict(value)} if value else {})
        self.lr, self.clip = {"policy": cfg.lr, "value": cfg.value_lr or cfg.lr}, cfg.clip or math.inf
        self.optim = {who: torch.optim.Adam(params.values(), self.lr[who], betas=(0.9, 0.95), eps=1e-5)
                      for who, params in self.params.items()}
        self.kl = KLController(cfg.kl_coef, cfg.kl_target, cfg.kl_horizon)
        self.ema = EMA(self.params["policy"], cfg.ema) if cfg.ema else None
        self.step = 0                                       # iterations done
        self.bad = dict.fromkeys(self.params, 0)            # gradients in a row that were not finite

    def apply(self, who, share):
        """Clip, and step at this share of the learning rate; share 0 only forgets the gradient. What is not
        finite steps nowhere, and ten in a row end the run. Returns the norm before clipping."""
        optim, grads = self.optim[who], {k: p.grad for k, p in self.params[who].items() if p.grad is not None}
        norm = nn.utils.get_total_norm(grads.values())
        self.bad[who] = 0 if norm.isfinite() else self.bad[who] + 1
        if self.bad[who] == 10:
            name = next(name for name, g in grads.items() if not g.isfinite().all())
            raise UserError(f"ten gradients of the {who} in a row were not finite, first {name}; lower --lr")
        if share and not self.bad[who]:
            nn.utils.clip_grads_with_norm_(self.params[who].values(), self.clip, norm)
            optim.param_groups[0]["lr"] = self.lr[who] * share
            optim.step()
        optim.zero_grad()
        return norm.item()

    def state_dict(self):
        """Live tensors: write them out, or copy them, before the next iteration."""
        return {"step": self.step, "bad": dict(self.bad), "kl": self.kl.state_dict(),
                "ema": self.ema and self.ema.shadow,
                "optim": {who: optim.state_dict() for who, optim in self.optim.items()},
                "params": {who: {k: p.data for k, p in ps.items()} for who, ps in self.params.items()}}

    def load_state_dict(self, state):
        self.step, self.bad = state["step"], dict(state["bad"])
        self.kl.load_state_dict(state["kl"])
        for who, params in self.params.items():
            for name, p in params.items():
                p.data.copy_(state["params"][who][name])
            self.optim[who].load_state_dict(state["optim"][who])
        if self.ema:
            for name, t in state["ema"].items():            # read from a file they are on the CPU
                self.ema.shadow[name].copy_(t)


def rng(*key, device="cpu"):
    """A generator that is a function of its key (hashed, because torch keeps 32 bits of a CPU seed)."""
    return torch.Generator(device).manual_seed(random.Random(repr(key)).getrandbits(32))


def draw(n, count, seed, step):
    """Which of n prompts iteration `step` asks: each once per turn, every turn in an order of its own."""
    at = range(step * count, (step + 1) * count)
    turns = range(at[0] // n, at[-1] // n + 1)
    orders = {turn: torch.randperm(n, generator=rng(seed, "prompts", turn)).tolist() for turn in turns}
    return [orders[i // n][i % n] for i in at]


def add_ptx(coef, policy, params, parts):
    """Add coef x (cross-entropy per token) to the gradients. parts: [(x, y), ...], y = -1 where no target is.
    Returns the cross-entropy, and the norm of what was added over the norm of what was there. Processes share
    the rows; what was there, alike in all, is rank 0's part of the sum."""
    before = {name: p.grad.clone() for name, p in params.items() if p.grad is not None}
    count, total = sum(int((y >= 0).sum()) for _, y in parts), 0.0
    for p in params.values() if distributed.world.rank else ():
        p.grad = None
    parts = [(x[rows], y[rows]) for x, y in parts if (rows := distributed.share(range(len(x)), [1] * len(x)))]
    for x, y in parts:
        with policy() as (model, past):
            hidden, _ = model.trunk(x, past)
            logits = model.head(hidden[y >= 0]).float()
            loss = F.cross_entropy(logits, y[y >= 0], reduction="sum") / count
            (coef * loss).backward()
            total += loss.item()
    total, = distributed.add_up(params.values(), [total])
    added = nn.utils.get_total_norm([params[name].grad - g for name, g in before.items()])
    return total, (added / nn.utils.get_total_norm(before.values()).clamp(min=1e-12)).item()


def update(cfg, roles, state, batch, share=1.0, generator=None, banned=(), ptx=None):
    """Step 5. A pass is a permutation cut into minibatches, a minibatch one optimiser step. Returns what was
    seen, averaged over minibatches; within one, over real tokens."""
    log, mean = defaultdict(list), {"grpo": "sequence", "drgrpo": "constant"}.get(cfg.algo, "token")
    passes = (torch.randperm(len(batch.mask), generator=generator) for _ in range(cfg.ppo_epochs))
    for minibatch in (m for order in passes for m in order.tensor_split(cfg.minibatches)):
        mini, seen = batch.mask[minibatch], defaultdict(float)
        even, weight = token_weights(mini), token_weights(mini, mean, cfg.max_new)
        n = batch.lengths[minibatch].tolist()
        for rows in micro(distributed.share(range(len(n)), n), n, cfg.micro):
            part = batch.take(minibatch[rows])
            mask, e, w = part.mask, *(x[rows, :part.mask.size(1)] for x in (even, weight))
            with roles.policy() as (model, past):       # backward inside: recomputation must meet this role
                logp = logprobs(Actor(model, cfg.temperature, banned), part, past)
                loss = ppo_policy_loss(logp, part.logp, part.advantages, mask, cfg.cliprange)
                if mean != "token":                     # GRPO's own penalty; its optimum is not pi*
                    k3 = kl_estimate(logp, part.ref_logp, "k3")
                    loss = loss + state.kl.beta * k3.masked_fill(~mask, 0)
                (w * loss).sum().backward()
            log_ratio = (logp.detach() - part.logp).masked_fill(~mask, 0)
            ratio = log_ratio.exp()
            off = (ratio - 1).abs()
            sums = {"policy_loss": w * loss, "ratio": e * ratio, "clipfrac": e * (off > cfg.cliprange),
                    "approx_kl": e * kl_estimate(0.0, log_ratio, "k3")}
            if roles.critic:
                with roles.critic() as (model, past):
                    v = values(model, roles.value_head, part, past)
                    loss = ppo_value_loss(v, part.values, part.returns, mask, cfg.cliprange_value)
                    (e * loss).sum().backward()
                far = (v.detach() - part.values).abs() > (cfg.cliprange_value or math.inf)
                sums |= {"value_loss": e * loss, "clipfrac_value": e * far}
            for name, x in sums.items():
                seen[name] = seen[name] + x.detach().sum()
            seen["ratio_off"] = off.max().clamp(min=seen["ratio_off"])
        if seen:                                            # a GPU is waited for once a minibatch
            seen.update(zip([*seen], torch.stack([*seen.values()]).tolist()))
        distributed.add_up(p for params in state.params.values() for p in params.values())
        hands = [hand for hand in distributed.gather(dict(seen)) if hand]
        seen = defaultdict(float, {name: (max if name == "ratio_off" else sum)(hand[name] for hand in hands)
                                   for name in hands[0]})
        stop = 0 < cfg.target_kl < seen["approx_kl"]
        if ptx and not stop:
            seen["ptx_loss"], seen["ptx_ratio"] = add_ptx(cfg.ptx_coef, roles.policy, state.params["policy"],
                                                          ptx(state.step, len(log["ratio"])))
        for who in state.params:
            idle = stop or (who == "policy" and "value" in state.params and state.step < cfg.value_warmup)
            seen[f"grad_norm_{who}"] = state.apply(who, 0.0 if idle else share)
        seen["skipped"] = sum(bad > 0 for bad in state.bad.values())
        for name, x in seen.items():
            log[name].append(x)
        if stop:
            break
    return {name: sum(xs) / len(xs) for name, xs in log.items()} | {
        "ratio_first": log["ratio_off"][0], "ratio_off": max(log["ratio_off"]),
        "skipped": sum(log["skipped"]), "minibatches": len(log["ratio"])}


def train_ppo(cfg, roles, state, prompts, reward, eos, banned=(), gold=None, ptx=None,
              rate=lambda step, steps: 1 - step / steps):
    """Iterate until `state.step` is cfg.steps; yield (metrics, Batch) after each: the moment to save.

    roles    Roles; `state` holds the parameters that learn in them
    prompts  lists of token ids; reward, gold: (prompts, answers) -> a score per answer; gold is only logged
    eos      id, or ids, that end an answer; banned: ids never sampled and given no probability (pads)
    ptx      None, or (iteration, minibatch) -> [(x, y), ...] of pre-training text
    rate     share of the learning rate. To zero: whitened advantages never shrink, so only it lets us settle
    A stopped iteration leaves no trace in the last state saved; it runs again, with the same random numbers.
    """
    eos, longest = {eos} if isinstance(eos, int) else set(eos), max(map(len, prompts))
    for role in filter(None, roles[:3]):
        with role() as (model, past):
            model.eval()
            room = model.config.block_size - (past[0][0].size(2) if past and len(past[0]) == 2 else 0)
            if longest + cfg.max_new > room:
                raise UserError(f"{longest} tokens of prompt and --max_new {cfg.max_new} of answer do not "
                                f"fit the {room} tokens of the context; shorten either")
    device = model.wte.weight.device
    while state.step < cfg.steps:
        clock, beta = [time.perf_counter()], state.kl.beta
        chosen = draw(len(prompts), cfg.batch // cfg.samples, cfg.seed, state.step)
        asked = [prompts[i] for i in chosen for _ in range(cfg.samples)]
        dice = rng(cfg.seed, "sample", state.step, device=device)
        batch, answers = rollout(roles, asked, eos, cfg, banned, dice)
        clock.append(time.perf_counter())

        s = torch.as_tensor(reward(asked, answers), dtype=torch.float32, device=device)
        if s.shape != (cfg.batch,) or not s.isfinite().all():
            raise UserError(f"the reward must be a finite number for each of {cfg.batch} answers; it gave "
                            f"{list(s.shape)}, {int((~s.isfinite()).sum())} of them not finite")
        ended = torch.tensor([y[-1] in eos for y in answers], device=device)
        if cfg.missing_eos is not None:                     # replaced, not reduced: no score can outbid it
            s = s.where(ended, cfg.missing_eos)
        in_reward = 0.0 if cfg.algo in ("grpo", "drgrpo") else beta
        batch = batch._replace(rewards=token_rewards(s, batch.logp, batch.ref_logp, batch.mask, in_reward))
        adv, returns = advantages(cfg, batch, s)
        batch = batch._replace(advantages=adv, returns=returns)
        metrics = {"step": state.step + 1, "beta": beta, **describe(batch, answers, s, ended, cfg.samples)}
        metrics["objective"] = metrics["score"] - beta * metrics["kl"]
        if gold:
            metrics["gold"] = torch.as_tensor(gold(asked, answers), dtype=torch.float32).mean().item()
        clock.append(time.perf_counter())

        share = rate(state.step, cfg.steps)
        metrics |= update(cfg, roles, state, batch, share, rng(cfg.seed, "order", state.step), banned, ptx)
        state.kl.update(metrics["kl"], cfg.batch)
        if state.ema:
            state.ema.update(state.params["policy"])
        state.step += 1
        spans = zip(("rollout", "score", "update"), clock, [*clock[1:], time.perf_counter()])
        yield metrics | {"lr": cfg.lr * share} | {f"seconds_{name}": b - a for name, a, b in spans}, batch
