"""ppo.py: learn from preferences. Reward models, PPO with a KL penalty to a reference, and its relatives.

All of them maximise one objective over answers y to prompts x. Its solution is known in closed form, and the
tests compare the trained policies with it:

    J(pi) = E[score(x, y)] - beta KL(pi || ref)      pi*(y|x) = ref(y|x) exp(score(x, y) / beta) / Z(x)
    J(pi*) - J(pi) = beta KL(pi || pi*)              exactly, for every pi

One iteration of PPO:
 1. sample an answer to each prompt from the policy; it ends at the first EOS, an action like any other
 2. logp, ref_logp, value of every action, one forward each; score = a reward model, or any callable
 3. reward_t    = -beta (logp_t - ref_logp_t),  + score at the last real token (less without EOS)
 4. delta_t     = reward_t + gamma value_{t+1} - value_t           value past the last token = 0
    advantage_t = delta_t + gamma lam advantage_{t+1};  return_t = advantage_t + value_t;  then whiten
 5. epochs x minibatches (x micro-batches, which only accumulate),       ratio = exp(logp_new - logp)
    policy  mean max(-A ratio, -A clip(ratio, 1 - e, 1 + e))   + ptx_coef cross-entropy on plain text
    value   mean 1/2 max((v - ret)^2, (v_old + clip(v - v_old, -e, e) - ret)^2)   in the critic's units
 6. beta moves towards the KL target; the average of the weights (EMA) is updated

The other algorithms are records in ALGORITHMS: an advantage, a policy loss, and defaults of the flags that
all share. Any composition of the flags runs, or is refused in a sentence.

    advantage A                          --advantage_norm  ratio     mean over      KL       clip
    ppo        GAE with a critic          batch             token     tokens         reward   0.2
    reinforce  reward to go               batch             token     tokens         reward   0.2
    rloo       R - mean of the others     none              token     tokens         reward   0.2
    grpo       R - mean of the group      group             token     answers        k3 loss  0.2
    drgrpo     R - mean of the group      none              token     the limit      none     0.2
    dapo       R - mean of the group      group             token     tokens         none     0.2, 0.28
    gspo       R - mean of the group      group             sequence  answers        none     3e-4, 4e-4
    cispo      R - mean of the group      group             token     tokens         none     weight < 5
    R = score - beta KL of the answer where the KL stands in the reward, else the score. cispo's loss is
    -sg(min(ratio, 1 + e)) A log pi; dapo also replaces groups of equal rewards (--dynamic_sampling) and takes
    up to one spread of the scores off the longest answers (--overlong penalty)

Neither the zero nor the scale of a reward matters, as neither moves pi* (with beta scaled alike): advantages
are centred in fp64 without any absolute threshold, penalties are in standard deviations of the rollout's
scores, the critic begins at the mean return of the first rollout whose rewards differ and works in units of their
standard deviation (Units), which a rollout of one answer, --batch 1, does not have. With gamma = 1: below that a
constant makes short answers better or worse.

Without RL: losses on answers that people ranked, each one record in PREFERENCE_LOSSES. l = sum of log pi over
the answer's tokens, h = l - l_ref, m = l / tokens, o = log(p / (1 - p)) of p = exp(m); w is preferred to v:

    dpo    -log sigmoid(beta (h_w - h_v))                          ipo   (h_w - h_v - 1 / (2 beta))^2
    simpo  -log sigmoid(beta (m_w - m_v) - gamma)                  no reference
    orpo   -m_w - lambda log sigmoid(o_w - o_v)                    no reference
    kto    lambda_D sigmoid(z0 - beta h) of a good answer, lambda_U sigmoid(beta h - z0) of a bad one
           z0 = max(0, mean of beta h over answers to *other* prompts), of the whole step, without a gradient

All pairs of unequal ranks among a prompt's K answers count, averaged per prompt, as in the reward model
(InstructGPT, eq. 1): a 9-way ranking weighs as much as a pair, and no comparison is thrown away. DPO's other
proposal for K answers, Plackett-Luce (its appendix A.3), is the same for two and has no place for ties. kto
reads rankings as thumbs: good is an answer that wins more comparisons than it loses, bad one that loses more.

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

Papers: PPO 1707.06347; GAE 1506.02438; RLHF 1909.08593 and 2203.02155 (section 3.5, appendix C); REINFORCE++
2501.03262; RLOO 2402.14740; GRPO 2402.03300; Dr. GRPO 2503.20783; DAPO 2503.14476; GSPO 2507.18071; CISPO
2506.13585 (its bound: 2510.13786); DPO 2305.18290; IPO 2310.12036; SimPO 2405.14734; ORPO
2403.07691; KTO 2402.01306; all roles on one base 2309.00754; KL estimators k1, k2, k3: Schulman 2020
(joschu.net/blog/kl-approx.html).

Deviations: no left padding, hence no position ids. Policy and critic share no trained weight, so each has its
own Adam and clipped norm, and the value loss needs no coefficient. The penalty is k1 *in the reward*, the one
estimator and place whose gradient is that of J (k3 in the reward ends at total variation 0.8 from pi*, k3 in
the loss at 0.2 to 0.3; with the KL in the reward every algorithm here ends at pi*: tests/optimum.py).
 - the change of a value is clipped, as in Ziegler et al.'s code but in no paper, in the critic's units
 - a reward model's scores are divided by their spread (`calibrate`), so beta means the same under each
 - losses without a normalised advantage are divided by the same unit as the critic's: the clipped norm and
   Adam's eps have a scale
 - RLOO clips token ratios over several steps, as PPO does; published is one unclipped step
 - "mean over tokens" is 1 / N of a minibatch's own tokens, so a token weighs more in one of short answers
 - GRPO's std is the unbiased one (k - 1), without the 1e-4 that its implementations add; the paper says std
 - Adam has betas 0.9 and 0.95 and eps 1e-5, its rate falls to 0 on a straight line
 - every algorithm with a KL adapts beta (--adaptive_kl_target 6; 0: fixed), as Ziegler et al. do: GRPO, RLOO
   and REINFORCE++ too, whose papers keep it fixed
 - beta changes by at most a fifth per iteration, however large a batch is against --kl_horizon
 - KTO pairs a prompt with the answers of the example half the data further on, not with those of the next one
   in the batch: then their reference log-probabilities never change, and one pass before training finds them,
   also where all weights are trained
 - ORPO's likelihood loss is a mean over the answer's tokens alone, and p = 1 counts as 1 - 1e-6, whose odds
   are finite
 - DAPO's soft punishment is in spreads of the scores (published: 1, for scores of 1 and -1), its buffer a
   fifth of the limit; refilled are at most --dynamic_sampling rounds, then the batch is smaller

An adapter_context is a callable returning a context manager that yields (model, past): adapters of one frozen
base, copies or soft prompts can be policy, reference, critic and reward model; this file imports none of
them. Dropout is off in every role: model.eval(), gradients on.

B rows  T tokens  R response columns  N actions  C width  V vocabulary  K ranked answers  k answers per prompt
Public: SamplingConfig, PPOConfig, PreferenceConfig, Algorithm, ALGORITHMS, PreferenceLoss, PREFERENCE_LOSSES,
masked_mean, centre, whiten, token_weights, kl_estimate, token_rewards, gae, rloo_advantage, grpo_advantage,
normalise_advantages, spread, overlong_penalty, final_scores, log_ratio, ppo_policy_loss, cispo_policy_loss,
clipped_side, ppo_value_loss, pairwise_loss, rank_loss, dpo_loss, ipo_loss, simpo_loss, orpo_loss, kto_loss,
kto_z0, entropy, best_of_n, feedme, KLController, EMA, Trunk, Batch, join_batches, collate_rollout,
PolicyDistribution, logprobs, values, scores, ScalarHead, calibrate, model_reward, combine_rewards,
checked_scores, part_means, reward_step, answer_logprobs, mismatched_log_ratios, preference_step, dpo_step,
kto_step, Roles, Scores, Environment, Units, measure_units, PPOState, rollout, collect, compute_advantages,
update, train_ppo
"""
import argparse
import math
import numbers
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from data.batches.batching import split_by_token_budget
from data.results.ppo_metrics import average_minibatches, describe, equal_groups, merge_parts, ranked_pairs
from data.runtime import distributed
from data.runtime.device import MICRO
from data.runtime.files import UserError
from data.runtime.flags import check_ranges, fields_of, flag
from data.runtime.progress import track
from data.runtime.records import RecordConfig, check_types, find_record
from model import generate, past_length, token_logprobs


# ------------------------------------------------------------------------------------ records and their flags

@dataclass(frozen=True)
class Algorithm:
    """An RL algorithm: what the loop, the flags and the tables need to know about it. A new one is one more
    entry in ALGORITHMS. All that it shares with others (clip range, level of the ratio, mean over tokens,
    place of the KL, normalisation, answers that are cut) are flags of PPOConfig, whose defaults it sets.

    advantage    (cfg, batch) -> advantages, returns, both (B, R), not normalised yet. batch.rewards is there;
                 row i * k + j is answer j to prompt i; an answer that does not count is off the mask
    policy_loss  (cfg, logp (B, R), batch) -> loss per token, 0 outside the mask, and where its clipping acted
                 (1 above, -1 below, 0 nowhere), both (B, R). logp: of the policy now; batch: the rollout's
                 logp, ref_logp, advantages, mask, lengths
    defaults, own_flags, unused: see data/runtime/records.py; without critic or groups their flags are unused
    """
    name: str
    help: str
    advantage: Callable
    policy_loss: Callable
    needs_critic: bool = False
    compares_groups: bool = False
    defaults: dict = field(default_factory=dict)
    own_flags: tuple = ()
    unused: tuple = ()
    selected_by = "algo"

    def __post_init__(self):
        unused = self.unused
        if not self.needs_critic:
            unused += ("lam", "value_lr", "value_warmup", "cliprange_value")
        if not self.compares_groups:
            unused += ("dynamic_sampling",)
        object.__setattr__(self, "unused", unused)


@dataclass(frozen=True)
class PreferenceLoss:
    """A loss on preferred answers. A new one is one more entry in PREFERENCE_LOSSES.

    loss       (cfg, PairLogprobs) -> loss (P,), margin (P,): above 0 where the pair is ranked right. Where
               `unpaired`: (cfg, ThumbLogprobs) -> the same of single answers, (N,)
    unpaired   it takes answers that are good or bad, each alone; pairs are read as such
    needs_reference   it takes log-probabilities of the reference, found once before training
    reads      types of the rows that it can be computed from
    defaults, own_flags, unused: see data/runtime/records.py
    """
    name: str
    help: str
    loss: Callable
    needs_reference: bool = True
    unpaired: bool = False
    reads: tuple = ("pairs", "ranked")
    defaults: dict = field(default_factory=dict)
    own_flags: tuple = ()
    unused: tuple = ()
    selected_by = "preference_loss"


class PairLogprobs(NamedTuple):
    """Pairs of a better and a worse answer, all (P,); log-probabilities are summed over the answer."""
    chosen: torch.Tensor
    rejected: torch.Tensor
    ref_chosen: torch.Tensor                    # of the reference; None if the loss has none
    ref_rejected: torch.Tensor
    chosen_length: torch.Tensor                 # tokens of the answer, its end token included
    rejected_length: torch.Tensor


class ThumbLogprobs(NamedTuple):
    """Answers that are good or bad, all (N,) but z0; log-probabilities are summed over the answer."""
    logp: torch.Tensor
    ref_logp: torch.Tensor
    good: torch.Tensor                          # bool
    z0: float                                   # of the whole step, see kto_z0


def penalty_or_none(word):
    """A number from 0 on, or None for the word none."""
    if word == "none":
        return None
    try:
        number = float(word)
    except ValueError:
        number = math.nan
    if not (number >= 0 and math.isfinite(number)):
        raise argparse.ArgumentTypeError(f"{word} is neither a number from 0 on nor the word none")
    return number


@dataclass(frozen=True)
class SamplingConfig:
    """sampling

    What `rollout` reads. Raises UserError for a value out of range.
    """
    max_new_tokens: int = flag(40, "longest answer in tokens, its end token included", low=1)
    temperature: float = flag(1.0, "divides the logits, wherever the policy is sampled or scored", low=0)
    num_generations: int = flag(4, "answers per prompt", low=1, high=2 ** 16)
    micro_batch_tokens: int = flag(MICRO // 2, "padded tokens per forward: memory and time, no result", low=1)

    def __post_init__(self):
        check_types(type(self).__name__, vars(self), fields_of([type(self)]))
        check_ranges(vars(self), fields_of([type(self)]))
        self.check(self)

    @classmethod
    def check(cls, cfg):
        """Raises UserError for a temperature at which every answer to a prompt would be the same: logits
        divided by it would leave fp32."""
        if cfg.temperature < 1e-3:
            raise UserError(f"--temperature {cfg.temperature} explores nothing; it must be above 0, "
                            "at least 0.001")


@dataclass(frozen=True, init=False)
class PPOConfig(RecordConfig, SamplingConfig):
    """RL

    PPOConfig(algo="grpo", steps=100); see RecordConfig for defaults and errors.
    """
    lr: float = flag(2e-3, "learning rate of the policy", low=0)
    batch: int = flag(64, "answers per iteration", low=1, high=2 ** 16)
    steps: int = flag(60, "iterations: a rollout and its updates", low=0)
    seed: int = flag(1, "seed of prompts, samples and minibatches", low=0)
    grad_clip: float = flag(1.0, "largest gradient norm, of policy and critic each; 0: no clipping", low=0)

    algo: str = flag("ppo", "the RL algorithm", choices=lambda: tuple(one.name for one in ALGORITHMS))
    num_generations: int = flag(0, "answers per prompt; 0: the algorithm's own number", low=0)
    advantage_norm: str = flag("batch", "over the std of the rollout (batch; its mean becomes 0) or of the "
                                        "answers to one prompt (group); none",
                               choices=lambda: tuple(ADVANTAGE_NORMS))
    kl_place: str = flag("reward", "where the KL to the reference stands: only the reward optimises J",
                         choices=("reward", "loss", "none"))
    kl_estimator: str = flag("k3", "estimator of a KL in the loss (k1 has no gradient there)",
                             choices=("k2", "k3"))
    kl_coef: float = flag(0.1, "beta, the weight of the KL; its start, if it is adapted; 0: no KL", low=0)
    adaptive_kl_target: float = flag(6.0, "nats per answer that beta is adapted to; 0: beta is fixed", low=0)
    kl_horizon: int = flag(1000, "answers in which beta may change by a fifth (Ziegler: 10,000)", low=1)
    missing_eos_penalty: float = flag(1.0, "an answer without end scores so many std of the scores less than "
                                           "the worst that ends; none: its own score",
                                      type=penalty_or_none)
    overlong: str = flag("none", "answers cut at --max_new_tokens: as if never sampled (mask); or the last "
                                 "fifth of the length costs up to one std of the scores (penalty)",
                         choices=("none", "mask", "penalty"))
    dynamic_sampling: int = flag(0, "rounds in which groups of equal scores are replaced by answers to other "
                                    "prompts", low=0, high=100)
    gamma: float = flag(1.0, "discount; below 1 the optimum is no longer pi*", low=0, high=1)
    lam: float = flag(0.95, "GAE's lambda", low=0, high=1)
    ppo_epochs: int = flag(2, "passes over one rollout", low=1, high=1000)
    minibatches: int = flag(4, "optimiser steps per pass", low=1)
    ratio_level: str = flag("token", "a ratio for each token, or one for the answer (GSPO)",
                            choices=("token", "sequence"))
    token_mean: str = flag("token", "how the loss is averaged: over tokens; over those of an answer, then "
                                    "over answers; or over answers x --max_new_tokens",
                           choices=lambda: tuple(TOKEN_MEANS))
    cliprange: float = flag(0.2, "ratios outside 1 - cliprange .. 1 + cliprange are clipped", low=0)
    cliprange_high: float = flag(0.0, "another clip range above 1; 0: as --cliprange", low=0)
    cliprange_value: float = flag(0.2, "clip range of the change of a value, in std of the first returns; "
                                       "0: no clipping", low=0)
    early_stop_kl: float = flag(0.0, "end the passes when a minibatch's KL exceeds this; 0: never", low=0)
    value_lr: float = flag(0.0, "learning rate of the critic; 0: that of the policy", low=0)
    value_warmup: int = flag(0, "first iterations, in which only the critic is trained", low=0)
    ptx_coef: float = flag(0.0, "PPO-ptx: weight of the pre-training loss per token; 0: none", low=0)
    ema: float = flag(0.0, "decay of an average of the policy (InstructGPT: 0.992); 0: none", low=0, below=1)

    def __init__(self, **given):
        super().__init__(**given)
        object.__setattr__(self, "num_generations", group_size(self))

    @staticmethod
    def records():
        return ALGORITHMS

    @classmethod
    def check_values(cls, cfg, algorithm):
        SamplingConfig.check(cfg)
        k = group_size(cfg)
        if algorithm.compares_groups and k < 2:
            raise UserError(f"--algo {cfg.algo} compares answers to one prompt: --num_generations must be "
                            "2 or more")
        if cfg.batch % k or cfg.batch < cfg.minibatches:
            raise UserError(f"--batch {cfg.batch} must be a multiple of --num_generations {k}, at least "
                            f"--minibatches {cfg.minibatches}")
        if cfg.advantage_norm == "group" and not algorithm.compares_groups:
            raise UserError("--advantage_norm group needs one advantage for each answer; "
                            f"--algo {cfg.algo} has one for each token: take batch or none")
        unread = {"none": ("kl_coef", "adaptive_kl_target", "kl_horizon", "kl_estimator"),
                  "reward": ("kl_estimator",), "loss": ()}
        for name in unread[cfg.kl_place]:
            if cls.is_given(cfg, name):
                raise UserError(f"--{name} means nothing to --kl_place {cfg.kl_place}; leave one of them out")
        still = "--kl_coef 0" if cfg.kl_coef == 0 else "--adaptive_kl_target 0"
        if (cfg.kl_coef == 0 or cfg.adaptive_kl_target == 0) and cls.is_given(cfg, "kl_horizon"):
            raise UserError(f"--kl_horizon means nothing to {still}, where beta stays; leave one of them out")
        if cfg.kl_coef == 0 and cls.is_given(cfg, "kl_estimator"):
            raise UserError("--kl_estimator means nothing to --kl_coef 0; leave one of them out")
        if cfg.kl_coef == 0 and cfg.adaptive_kl_target and cls.is_given(cfg, "adaptive_kl_target"):
            raise UserError(f"--kl_coef 0 stays 0 under --adaptive_kl_target {cfg.adaptive_kl_target:g}, "
                            "which multiplies it; start above 0, or leave the target out")
        if 0 < cfg.steps <= cfg.value_warmup:
            raise UserError(f"--value_warmup {cfg.value_warmup} leaves none of --steps {cfg.steps} to the "
                            "policy; it must be smaller")
        reads_high = "cliprange_high" not in algorithm.unused
        if reads_high and "cliprange" in algorithm.unused and cfg.cliprange_high == 0:
            raise UserError(f"--cliprange_high 0 stands for --cliprange, which --algo {cfg.algo} does not "
                            "read; it must be above 0")
        penalty = cfg.missing_eos_penalty
        if cfg.overlong == "mask" and penalty is not None and cls.is_given(cfg, "missing_eos_penalty"):
            raise UserError(f"--missing_eos_penalty {penalty} means nothing to --overlong mask, which learns "
                            "nothing from answers without end; leave one of them out")
        if penalty is not None and not (penalty >= 0 and math.isfinite(penalty)):
            raise UserError(f"--missing_eos_penalty {penalty} is neither a number from 0 on nor None")


def group_size(cfg):
    """Answers per prompt: --num_generations, or the algorithm's own number."""
    return cfg.num_generations or find_record(ALGORITHMS, cfg.algo).defaults.get("num_generations", 1)


@dataclass(frozen=True, init=False)
class PreferenceConfig(RecordConfig):
    """preferences

    See RecordConfig for defaults and errors.
    """
    preference_loss: str = flag("dpo", "the loss on preferred answers",
                                choices=lambda: tuple(one.name for one in PREFERENCE_LOSSES))
    beta: float = flag(0.1, "how strongly the policy is held to the reference; of SimPO, its scale", low=0)
    label_smoothing: float = flag(0.0, "the probability that a label is wrong", low=0, high=1)
    simpo_gamma: float = flag(1.0, "SimPO's gamma: the margin that it asks for", low=0)
    orpo_lambda: float = flag(0.1, "ORPO's lambda: weight of the odds ratio beside the likelihood", low=0)
    desirable_weight: float = flag(1.0, "KTO's lambda_D: weight of good answers", low=0)
    undesirable_weight: float = flag(1.0, "KTO's lambda_U: weight of bad answers", low=0)

    @staticmethod
    def records():
        return PREFERENCE_LOSSES

    @staticmethod
    def check_values(cfg, loss):
        if cfg.beta == 0 or cfg.label_smoothing >= 0.5:
            raise UserError(f"--beta {cfg.beta} with --label_smoothing {cfg.label_smoothing} "
                            "teaches nothing; beta is above 0, smoothing below 0.5")
        if cfg.desirable_weight == cfg.undesirable_weight == 0:
            raise UserError("--desirable_weight 0 with --undesirable_weight 0 teaches nothing; one of them "
                            "is above 0")


# -------------------------------------------------------------------------------------------------- equations
# (B, R) tensors and a bool mask. What lies outside the mask may be anything, NaN included: it is overwritten
# before the first operation, because 0 * NaN is NaN, in the loss and in the gradient.

def masked_mean(x, mask):
    """The mean of x (B, R) on the mask: a scalar; 0 if the mask is empty."""
    return x.masked_fill(~mask, 0).sum() / mask.sum().clamp(min=1)


def centre(x, mask, dim):
    """x minus its mean over `dim` on the mask, 0 outside, in fp64 (fp32 where a device has none). Differences
    that are only rounding are exactly 0, however large x is; there is no absolute threshold."""
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    y = x.to(wide).masked_fill(~mask, 0)
    mean = y.sum(dim, keepdim=True) / mask.sum(dim, keepdim=True).clamp(min=1)
    centred = (y - mean).masked_fill(~mask, 0)
    rounding = 8 * torch.finfo(x.dtype).eps * y.abs().amax(dim, keepdim=True)
    return centred.masked_fill(centred.abs().amax(dim, keepdim=True) <= rounding, 0)


def root_mean_square(centred, count, dim):
    """The standard deviation of what `centre` gave, over `count` of them; 1 where all are 0."""
    std = (centred.square().sum(dim, keepdim=True) / count).sqrt()
    return std.where(std > 0, 1.0)


def whiten(x, mask):
    """x (B, R) with mean 0 and biased variance 1 on the mask, 0 outside. A constant becomes 0."""
    centred = centre(x, mask, (0, 1))
    return (centred / root_mean_square(centred, mask.sum().clamp(min=1), (0, 1))).to(x.dtype)


TOKEN_MEANS = {
    "token": lambda mask, n, limit: mask / n.sum(),
    "sequence": lambda mask, n, limit: mask / (len(mask) * n),
    "constant": lambda mask, n, limit: mask / (len(mask) * limit),
}


def token_weights(mask, mean="token", limit=None):
    """(B, R) weights w: a minibatch's loss is sum(w * loss); micro-batches take rows of w and add up to it.

    token     1 / N          every token the same (PPO, RLOO)
    sequence  1 / (B n_b)    GRPO as published: the longer an answer, the less each of its tokens counts
    constant  1 / (B limit)  Dr. GRPO, unbiased; limit = the longest answer allowed
    Raises UserError for another mean.
    """
    if mean not in TOKEN_MEANS:
        raise UserError(f"mean {mean!r} is none of {' '.join(TOKEN_MEANS)}")
    return TOKEN_MEANS[mean](mask, mask.sum(1, keepdim=True), limit)            # n (B, 1)


KL_ESTIMATES = {
    "k1": lambda log_ratio: -log_ratio,
    "k2": lambda log_ratio: log_ratio ** 2 / 2,
    "k3": lambda log_ratio: log_ratio.exp() - 1 - log_ratio,
}


def kl_estimate(logp, ref_logp, kind="k1"):
    """KL(pi || ref) per token, on tokens drawn from pi; shapes equal (Schulman 2020).

    k1 and k3 are unbiased values, k3 is never negative. That says nothing about gradients: only k1, and only
    in the reward, optimises J. Raises UserError for another kind.
    """
    if kind not in KL_ESTIMATES:
        raise UserError(f"KL estimate {kind!r} is none of {' '.join(KL_ESTIMATES)}")
    return KL_ESTIMATES[kind](ref_logp - logp)


def token_rewards(scores, logp, ref_logp, mask, beta):
    """-beta k1 on every real token, + score (B,) on the last. Returns (B, R), all of it detached: rewards are
    data."""
    penalty = (beta * kl_estimate(logp, ref_logp)).detach().masked_fill(~mask, 0)
    last = mask.sum(1, keepdim=True) - 1                                        # (B, 1)
    return (-penalty).scatter_add(1, last, scores.detach()[:, None].to(penalty.dtype))


def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16). Past the last real token reward and
    value are 0: a padded row gives the numbers of the row alone. Returns advantages, returns, both (B, R).
    Raises UserError unless the mask is bool."""
    if mask.dtype != torch.bool:
        raise UserError(f"gae: the mask is {mask.dtype}; it must be bool, true on response tokens")
    rewards = rewards.masked_fill(~mask, 0)
    values = values.masked_fill(~mask, 0)
    adv = torch.zeros_like(rewards)
    running = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.size(1))):
        next_value = values[:, t + 1] if t + 1 < rewards.size(1) else 0.0
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        running = delta + gamma * lam * running             # still 0 where t lies behind the row
        adv[:, t] = running
    return adv, adv + values


def rloo_advantage(returns, counted=None):
    """returns (B, k) -> (B, k): each minus the mean of the other k - 1 answers to its prompt. counted (B, k)
    bool, None for all: the answers that a group consists of; 0 for the rest, and for one alone."""
    counted = torch.ones_like(returns, dtype=torch.bool) if counted is None else counted
    k = counted.sum(1, keepdim=True)
    centred = centre(returns, counted, 1)
    return (centred * k / (k - 1).clamp(min=1)).to(returns.dtype)


def grpo_advantage(scores, std=True, counted=None):
    """scores (B, k) minus the prompt's mean, over its std (GRPO; the unbiased one, of k - 1) or not (Dr.
    GRPO). Equal scores give 0. counted: as rloo_advantage takes it."""
    counted = torch.ones_like(scores, dtype=torch.bool) if counted is None else counted
    centred = centre(scores, counted, 1)
    if std:
        centred = centred / root_mean_square(centred, (counted.sum(1, keepdim=True) - 1).clamp(min=1), 1)
    return centred.to(scores.dtype)


def group_advantages(advantages, mask, k):
    """Advantages (B, R), one number for each answer, over the std of its group; answers off the mask are no
    part of one."""
    of_answers = grpo_advantage(advantages[:, 0].view(-1, k), counted=mask[:, 0].view(-1, k))
    return of_answers.view(-1, 1) * mask


ADVANTAGE_NORMS = {
    "none": lambda advantages, mask, k: advantages.masked_fill(~mask, 0),
    "group": group_advantages,
    "batch": lambda advantages, mask, k: whiten(advantages, mask),
}


def normalise_advantages(advantages, mask, norm="batch", k=1):
    """Advantages (B, R) -> (B, R), 0 outside the mask.

    batch   mean 0 and variance 1 over all tokens of the rollout
    group   over the std of the k answers to a prompt, of advantages that are one number for each answer
    none    as they are
    Raises UserError for another norm.
    """
    if norm not in ADVANTAGE_NORMS:
        raise UserError(f"advantage norm {norm!r} is none of {' '.join(ADVANTAGE_NORMS)}")
    return ADVANTAGE_NORMS[norm](advantages, mask, k)


def spread(scores):
    """The biased standard deviation of scores (B,), a float; 1 if all are equal: the unit of penalties."""
    centred = centre(scores, torch.ones_like(scores, dtype=torch.bool), 0)
    return root_mean_square(centred, len(scores), 0).item()


def overlong_penalty(lengths, limit):
    """Soft overlong punishment (DAPO, eq. 13): 0 up to four fifths of the limit, from there on a straight
    line to -1 at the limit. lengths: tokens, any shape."""
    buffer = limit / 5
    return ((limit - buffer - lengths) / buffer).clamp(-1, 0)


def final_scores(scores, ended, lengths, limit, penalty=1.0, overlong="none"):
    """What is learnt from, (B,), from the reward's scores (B,); ended (B,): the answer has its end token.

    overlong "penalty" takes up to one spread of the scores, see overlong_penalty. penalty: an answer without
    end scores the lowest of the finished ones, or its own score if that is lower, minus penalty spreads: no
    reward makes an answer without end the best. None, or overlong "mask", which does not learn from it: its
    own score.
    """
    unit = spread(scores)
    result = scores
    if overlong == "penalty":
        result = scores + unit * overlong_penalty(lengths, limit)
    if penalty is None or overlong == "mask" or bool(ended.all()):
        return result
    lowest = result[ended].min() if bool(ended.any()) else scores.max()
    return result.where(ended, torch.minimum(scores, lowest) - penalty * unit)


def log_ratio(logp, old_logp, mask, level="token"):
    """log pi / pi_old: (B, R), 0 outside the mask. Raises UserError for another level.

    token     of each token alone
    sequence  the mean over the answer's tokens, in each of its columns (GSPO, eq. 7): its exp is the
              geometric mean of the token ratios
    """
    difference = (logp - old_logp).masked_fill(~mask, 0)
    if level == "token":
        return difference
    if level == "sequence":
        return difference.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1) * mask
    raise UserError(f"ratio level {level!r} is none of token sequence")


def ppo_policy_loss(logp, old_logp, advantages, mask, clip=0.2, clip_high=None, level="token"):
    """The clipped surrogate (PPO, eq. 7, negated) per token: (B, R), 0 outside the mask.

    The ratio is clipped to 1 - clip, 1 + clip_high (None: clip). No gradient where it has already left that
    range in the direction its advantage points to.
    """
    high = clip if clip_high is None else clip_high
    ratio = log_ratio(logp, old_logp, mask, level).exp()
    advantages = advantages.masked_fill(~mask, 0)
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + high))


def cispo_policy_loss(logp, old_logp, advantages, mask, clip_high=4.0, level="token"):
    """-sg(min(ratio, 1 + clip_high)) A log pi (CISPO, eq. 4) per token: (B, R), 0 outside the mask. The
    weight is clipped, the gradient stays."""
    weight = log_ratio(logp.detach(), old_logp, mask, level).exp().clamp(max=1 + clip_high)
    return -weight * advantages.masked_fill(~mask, 0) * logp.masked_fill(~mask, 0)


def clipped_side(ratio, advantages, clip, clip_high):
    """Where ppo_policy_loss has lost its gradient to the clipping, (B, R): 1 above 1 + clip_high where the
    advantage is positive, -1 below 1 - clip where it is negative, else 0."""
    above = (ratio > 1 + clip_high) & (advantages > 0)
    below = (ratio < 1 - clip) & (advantages < 0)
    return above.int() - below.int()


def ppo_value_loss(values, old_values, returns, mask, clip=0.2):
    """Half the squared error of the value or of its clipped change, the larger: (B, R), 0 outside."""
    values, old_values, returns = (x.masked_fill(~mask, 0) for x in (values, old_values, returns))
    loss = (values - returns) ** 2
    if clip:
        near = old_values + (values - old_values).clamp(-clip, clip)
        loss = torch.maximum(loss, (near - returns) ** 2)
    return loss / 2


def pairwise_loss(chosen, rejected):
    """-log P(chosen beats rejected), Bradley-Terry. Scores of one shape in, losses of that shape out."""
    return -F.logsigmoid(chosen - rejected)


def rank_loss(scores, rank, mask=None):
    """All pairs among a prompt's K answers, averaged per prompt, so that a 9-way ranking counts as much as a
    pair (InstructGPT, eq. 1). scores, rank (B, K), smaller rank = better; equal ranks are no pair; mask says
    which answers exist. Returns the loss (B,) and the number of pairs (B,)."""
    mask = torch.ones_like(rank, dtype=torch.bool) if mask is None else mask
    pair = ranked_pairs(rank, mask)                                             # (B, K, K)
    pairs = pair.sum((1, 2))
    s = scores.masked_fill(~mask, 0)
    loss = pairwise_loss(s[:, :, None], s[:, None, :]).masked_fill(~pair, 0)
    return loss.sum((1, 2)) / pairs.clamp(min=1), pairs


def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.1, label_smoothing=0.0):
    """Log-probabilities (B,), *summed* over the answer -> loss (B,), margin (B,): the difference of the
    implicit rewards beta log(pi / ref). With all pairs its optimum is pi* again (DPO, eq. 7)."""
    h = (chosen - ref_chosen) - (rejected - ref_rejected)
    loss = -(1 - label_smoothing) * F.logsigmoid(beta * h) - label_smoothing * F.logsigmoid(-beta * h)
    return loss, beta * h


def ipo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.1):
    """As dpo_loss, with the squared distance of the log-ratio to 1 / (2 beta) (IPO, eq. 17): a pair that is
    ranked with certainty does not push it further."""
    h = (chosen - ref_chosen) - (rejected - ref_rejected)
    return (h - 1 / (2 * beta)) ** 2, beta * h


def simpo_loss(chosen, rejected, beta=2.0, gamma=1.0):
    """*Mean* log-probabilities over the answer's tokens (B,) -> loss (B,), margin (B,): beta times their
    difference, which the loss asks to exceed gamma (SimPO, eq. 6). No reference holds the policy."""
    margin = beta * (chosen - rejected)
    return pairwise_loss(margin, gamma), margin


def log_odds(logp):
    """log(p / (1 - p)) of p = exp(logp), which is at most 1 - 1e-6: above, no gradient."""
    logp = logp.clamp(max=-1e-6)
    return logp - (-logp.expm1()).log()


def orpo_loss(chosen, rejected, weight=0.1):
    """*Mean* log-probabilities (B,) -> loss (B,), margin (B,): the log of the odds ratio. The loss is that of
    SFT on the chosen answer, per token, plus weight x -log sigmoid(margin) (ORPO, eq. 6 and 7)."""
    margin = log_odds(chosen) - log_odds(rejected)
    return -chosen - weight * F.logsigmoid(margin), margin


def kto_loss(log_ratio, good, z0=0.0, beta=0.1, desirable_weight=1.0, undesirable_weight=1.0):
    """log(pi / ref) summed over the answer (N,), good (N,) bool -> loss (N,), margin (N,): how far beta times
    the log-ratio lies on the right side of z0 (KTO, eq. 8)."""
    distance = beta * log_ratio - z0
    margin = distance.where(good, -distance)
    loss = (-margin).sigmoid()                                                  # 1 - sigmoid(margin)
    return torch.where(good, desirable_weight * loss, undesirable_weight * loss), margin


def kto_z0(total, count, beta=0.1):
    """KTO's reference point: the KL of policy and reference, estimated by `count` answers to other prompts
    whose log-ratios add up to `total`, times beta; never below 0, and 0 without such answers."""
    return max(0.0, beta * total / max(count, 1))


def entropy(logits):
    """(..., V) -> (...), exact. entr(0) is 0, where p log p would make NaN of a banned token."""
    return torch.special.entr(logits.softmax(-1)).sum(-1)


def best_of_n(scores):
    """scores (B, n) -> (B,) index of the best sample of each prompt: the baseline to compare RL with."""
    return scores.argmax(1)


def feedme(scores, keep=1, at_least=-math.inf):
    """Which samples to imitate: each prompt's `keep` best that reach `at_least`. (B, n) -> [(b, i), ...].
    SFT on those and on demonstrations is how text-davinci-001 was made."""
    top = scores.topk(min(keep, scores.size(1)), 1).indices.tolist()
    return [(b, i) for b, row in enumerate(top) for i in row if scores[b, i] >= at_least]


class KLController:
    """beta, adapted so that KL nears `target` nats (Ziegler et al. 2019, section 2.2); target 0: fixed."""

    def __init__(self, beta, target=0.0, horizon=10_000):
        self.beta = beta
        self.target = target
        self.horizon = horizon

    def update(self, kl, num_answers):
        """After a rollout of num_answers answers with this mean KL, in nats per answer."""
        if self.target:                                 # the error is limited to a fifth: one batch is noisy
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.beta *= 1 + error * min(num_answers / self.horizon, 1.0)       # more could end below 0

    def state_dict(self):
        return {"beta": self.beta}

    def load_state_dict(self, state):
        self.beta = state["beta"]


class EMA:
    """A running average of named parameters; of the adapter's alone, when only an adapter is trained."""

    def __init__(self, params, decay):
        self.decay = decay
        self.shadow = {name: p.detach().clone() for name, p in params.items()}

    @torch.no_grad()
    def update(self, params):
        for name, p in params.items():
            self.shadow[name].lerp_(p, 1 - self.decay)


# ------------------------------------------------------------------------------------------------- algorithms

def advantage_gae(cfg, batch):
    """GAE with the critic's values."""
    return gae(batch.rewards, batch.values, batch.mask, cfg.gamma, cfg.lam)


def advantage_to_go(cfg, batch):
    """The reward to go; normalised over the batch, its mean is the baseline."""
    return gae(batch.rewards, torch.zeros_like(batch.rewards), batch.mask, cfg.gamma, 1.0)


def per_answer(advantage, batch):
    """(B / k, k), one advantage for each whole answer -> advantages, returns, both (B, R)."""
    returns = batch.rewards.sum(1, keepdim=True)
    return advantage.view(-1, 1) * batch.mask, returns * batch.mask


def advantage_leave_one_out(cfg, batch):
    """The reward of a whole answer against the mean of the other answers to its prompt."""
    groups = batch.rewards.sum(1).view(-1, cfg.num_generations)
    return per_answer(rloo_advantage(groups, batch.mask.any(1).view_as(groups)), batch)


def advantage_group_mean(cfg, batch):
    """The reward of a whole answer against the mean of all answers to its prompt."""
    groups = batch.rewards.sum(1).view(-1, cfg.num_generations)
    return per_answer(grpo_advantage(groups, False, batch.mask.any(1).view_as(groups)), batch)


def clip_range(cfg):
    """(low, high): a ratio is clipped to 1 - low, 1 + high."""
    return cfg.cliprange, cfg.cliprange_high or cfg.cliprange


def clipped_policy_loss(cfg, logp, batch):
    """PPO's clipped surrogate, and where the clipping acts."""
    low, high = clip_range(cfg)
    loss = ppo_policy_loss(logp, batch.logp, batch.advantages, batch.mask, low, high, cfg.ratio_level)
    ratio = log_ratio(logp.detach(), batch.logp, batch.mask, cfg.ratio_level).exp()
    return loss, clipped_side(ratio, batch.advantages, low, high)


def clipped_weight_loss(cfg, logp, batch):
    """CISPO's loss, and where its weight is clipped."""
    _, high = clip_range(cfg)
    loss = cispo_policy_loss(logp, batch.logp, batch.advantages, batch.mask, high, cfg.ratio_level)
    ratio = log_ratio(logp.detach(), batch.logp, batch.mask, cfg.ratio_level).exp()
    return loss, (ratio > 1 + high).int()


ALGORITHMS = (
    Algorithm("ppo", "GAE with a critic, KL in the reward (1707.06347, 2203.02155)",
              advantage_gae, clipped_policy_loss, needs_critic=True),
    Algorithm("rloo", "score minus KL against the mean of the other answers (2402.14740)",
              advantage_leave_one_out, clipped_policy_loss, compares_groups=True,
              defaults={"num_generations": 4, "advantage_norm": "none"}, unused=("gamma",)),
    Algorithm("reinforce", "reward to go, whitened over the batch (REINFORCE++, 2501.03262)",
              advantage_to_go, clipped_policy_loss),
    Algorithm("grpo", "score against its group, in standard deviations; KL in the loss (2402.03300)",
              advantage_group_mean, clipped_policy_loss, compares_groups=True, unused=("gamma",),
              defaults={"num_generations": 4, "advantage_norm": "group", "kl_place": "loss",
                        "token_mean": "sequence"}),
    Algorithm("drgrpo", "GRPO without its bias to low variance and short answers, without KL (2503.20783)",
              advantage_group_mean, clipped_policy_loss, compares_groups=True, unused=("gamma",),
              defaults={"num_generations": 4, "advantage_norm": "none", "kl_place": "none",
                        "token_mean": "constant"}),
    Algorithm("dapo", "GRPO that clips higher, averages over tokens and resamples equal groups (2503.14476)",
              advantage_group_mean, clipped_policy_loss, compares_groups=True, unused=("gamma",),
              defaults={"num_generations": 8, "advantage_norm": "group", "kl_place": "none",
                        "cliprange_high": 0.28, "overlong": "penalty", "dynamic_sampling": 3}),
    Algorithm("gspo", "GRPO with one ratio for each answer, without KL (2507.18071)",
              advantage_group_mean, clipped_policy_loss, compares_groups=True, unused=("gamma",),
              defaults={"num_generations": 4, "advantage_norm": "group", "kl_place": "none",
                        "ratio_level": "sequence", "token_mean": "sequence", "cliprange": 3e-4,
                        "cliprange_high": 4e-4}),
    Algorithm("cispo", "GRPO that clips a token's weight and keeps its gradient, without KL (2506.13585)",
              advantage_group_mean, clipped_weight_loss, compares_groups=True, unused=("gamma", "cliprange"),
              defaults={"num_generations": 4, "advantage_norm": "group", "kl_place": "none",
                        "cliprange_high": 4.0}),
)


def dpo_pair_loss(cfg, pair):
    return dpo_loss(pair.chosen, pair.rejected, pair.ref_chosen, pair.ref_rejected, cfg.beta,
                    cfg.label_smoothing)


def ipo_pair_loss(cfg, pair):
    return ipo_loss(pair.chosen, pair.rejected, pair.ref_chosen, pair.ref_rejected, cfg.beta)


def simpo_pair_loss(cfg, pair):
    return simpo_loss(pair.chosen / pair.chosen_length, pair.rejected / pair.rejected_length, cfg.beta,
                      cfg.simpo_gamma)


def orpo_pair_loss(cfg, pair):
    return orpo_loss(pair.chosen / pair.chosen_length, pair.rejected / pair.rejected_length, cfg.orpo_lambda)


def kto_thumb_loss(cfg, thumbs):
    return kto_loss(thumbs.logp - thumbs.ref_logp, thumbs.good, thumbs.z0, cfg.beta, cfg.desirable_weight,
                    cfg.undesirable_weight)


PREFERENCE_LOSSES = (
    PreferenceLoss("dpo", "log-sigmoid of the margin (2305.18290)", dpo_pair_loss,
                   own_flags=("label_smoothing",)),
    PreferenceLoss("ipo", "squared error of the margin (2310.12036)", ipo_pair_loss),
    PreferenceLoss("simpo", "margin of mean log-probabilities, no reference (2405.14734)", simpo_pair_loss,
                   needs_reference=False, defaults={"beta": 2.0}, own_flags=("simpo_gamma",)),
    PreferenceLoss("orpo", "SFT and the odds ratio in one, no reference (2403.07691)", orpo_pair_loss,
                   needs_reference=False, own_flags=("orpo_lambda",), unused=("beta",)),
    PreferenceLoss("kto", "answers that are good or bad, each alone (2402.01306)", kto_thumb_loss,
                   unpaired=True, reads=("thumbs", "pairs", "ranked"),
                   own_flags=("desirable_weight", "undesirable_weight")),
)


# ------------------------------------------------------------------------------------ from models to numbers

class Trunk(NamedTuple):
    """What enters a block, below which all roles compute the same: once per answer, for every pass over it."""
    hidden: torch.Tensor                        # (B, T, C)
    layer: int                                  # the block that it enters


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
    weights: torch.Tensor = None                #           of each token's loss in its minibatch
    trunk: Trunk = None

    @property
    def lengths(self):                          # (B,)      real tokens of each row
        return self.start + self.mask.sum(1)

    def take(self, rows):
        """These rows alone, trimmed to the longest of them: padding costs time and changes no number."""
        start = self.start[rows]
        mask = self.mask[rows]
        n = mask.sum(1)
        T = int((start + n).max())
        R = int(n.max())
        columns = [x if x is None else x[rows, :R] for x in self[3:-1]]
        trunk = self.trunk and self.trunk._replace(hidden=self.trunk.hidden[rows, :T])
        return Batch(self.tokens[rows, :T], start, mask[:, :R], *columns, trunk)


def join_batches(batches):
    """Rollouts of other widths, one below the other: what `collate_rollout` makes of all rows together."""
    if len(batches) == 1:
        return batches[0]
    T = max(batch.tokens.size(1) for batch in batches)
    R = max(batch.mask.size(1) for batch in batches)
    joined = []
    for name in Batch._fields[:-1]:
        parts = [getattr(batch, name) for batch in batches]
        if parts[0] is None:
            joined.append(None)
            continue
        if name != "start":
            width = T if name == "tokens" else R
            parts = [F.pad(part, (0, width - part.size(1))) for part in parts]
        joined.append(torch.cat(parts))
    trunks = [batch.trunk for batch in batches]
    if trunks[0] is None:
        return Batch(*joined)
    hidden = torch.cat([F.pad(trunk.hidden, (0, 0, 0, T - trunk.hidden.size(1))) for trunk in trunks])
    return Batch(*joined, Trunk(hidden, trunks[0].layer))


def collate_rollout(prompts, answers, device="cpu", pad=0, find_trunk=None):
    """Lists of token ids -> Batch. Lengths, never the pad id, mark the real tokens.

    find_trunk   None, or (prompts, answers) -> the fields of their rows' Trunk, or None where it is not known
    Raises UserError for a prompt that is empty or text.
    """
    check_prompts(prompts)
    rows = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    T = max(map(len, rows))
    R = max(map(len, answers))
    tokens = torch.tensor([row + [pad] * (T - len(row)) for row in rows], device=device)
    start = torch.tensor([len(prompt) for prompt in prompts], device=device)
    n = torch.tensor([len(answer) for answer in answers], device=device)
    known = find_trunk(prompts, answers) if find_trunk else None
    return Batch(tokens, start, torch.arange(R, device=device) < n[:, None], trunk=known and Trunk(*known))


def check_prompts(prompts):
    """Raises UserError unless prompts are non-empty lists of token ids."""
    if not isinstance(prompts, (list, tuple)) or not prompts:
        raise UserError("prompts must be a list with at least one list of token ids in it")
    for i, prompt in enumerate(prompts):
        is_list = isinstance(prompt, (list, tuple)) and len(prompt) > 0
        if not is_list or not all(isinstance(token, (int, numbers.Integral)) for token in prompt):
            raise UserError(f"prompt {i} is {prompt!r:.60}; a prompt is a list of at least one token id")


class PolicyDistribution:
    """A model as a distribution over actions: softmax(logits / temperature), `banned` ids impossible.
    Sampling, old, new and reference log-probabilities all use this one head, so they cannot disagree."""

    def __init__(self, model, temperature=1.0, banned=()):
        self.model = model
        self.temperature = temperature
        self.banned = torch.tensor(list(banned), device=model.wte.weight.device, dtype=torch.long)

    def __getattr__(self, name):                            # hidden_states, config, wte: the model's own
        return getattr(self.model, name)

    def logits(self, hidden):                               # (..., C) -> (..., V), at least fp32
        logits = self.model.logits(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / self.temperature
        return logits.index_fill(-1, self.banned, -torch.inf)


def selected_hidden_states(model, batch, past, select, columns=None):
    """The hidden states at select = (rows, positions), (N, C), from the trunk on where there is one. Read are
    the columns up to `columns`, as a slice takes it: None for all."""
    if batch.trunk is None:
        return model.hidden_states(batch.tokens[:, :columns], past, select=select)[0]
    hidden, layer = batch.trunk
    return model.hidden_states(hidden[:, :columns], past, select=select, start_layer=layer)[0]


def action_hidden_states(model, batch, past):
    """The hidden state in which each action was taken: (N, C), row by row. After the last token none is."""
    b, t = batch.mask.nonzero(as_tuple=True)
    return selected_hidden_states(model, batch, past, (b, batch.start[b] - 1 + t), columns=-1)


def scatter_to_mask(x, mask):
    """(N, ...), one entry per action -> (B, R, ...), 0 where there was none."""
    return x.new_zeros(*mask.shape, *x.shape[1:]).index_put(mask.nonzero(as_tuple=True), x)


def logprobs(policy, batch, past=None, entropies=False):
    """log pi of every response token, (B, R), 0 outside the mask; `entropies`: both, (B, R, 2).

    policy: a PolicyDistribution. Logits are computed at the actions only.
    """
    b, t = batch.mask.nonzero(as_tuple=True)
    hidden = action_hidden_states(policy, batch, past)                          # (N, C)
    emitted = batch.tokens[b, batch.start[b] + t]                               # (N,)
    if not entropies:
        return scatter_to_mask(token_logprobs(policy.logits, hidden, emitted), batch.mask)
    logits = policy.logits(hidden)                                              # (N, V)
    logp = logits.log_softmax(-1).gather(-1, emitted[:, None])[:, 0]
    return scatter_to_mask(torch.stack((logp, entropy(logits)), -1), batch.mask)


def values(model, head, batch, past=None):
    """The critic's prediction before every action, (B, R): at the positions that `logprobs` reads."""
    return scatter_to_mask(head(action_hidden_states(model, batch, past)), batch.mask)


def scores(model, head, batch, past=None):
    """The reward model's score of whole rows, (B,), at the last real token (by length, not by pad id)."""
    rows = torch.arange(len(batch.tokens), device=batch.tokens.device)
    return head(selected_hidden_states(model, batch, past, (rows, batch.lengths - 1)))


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
    """Ranking determines neither the shift nor the scale of a score, so fix both: what scored `scores` now
    has mean 0 and standard deviation 1, and beta means the same under every reward model. scale=False: the
    mean only. Raises UserError if all scores are equal."""
    std = scores.std(unbiased=False).item() if scale else 1.0
    if not std > 1e-8:
        raise UserError("the reward model gives every reference sample the same score; train it longer")
    head.gain /= std
    head.shift.copy_((head.shift - scores.mean()) / std)


def micro_batches(batch, tokens):
    """This process's rows of a batch, as lists of row indices of at most so many padded tokens."""
    lengths = batch.lengths.tolist()
    rows = distributed.local_rows(range(len(lengths)), lengths)
    return split_by_token_budget(rows, lengths, tokens)


@torch.no_grad()
def inference(f, batch, tokens, columns=None):
    """f(part) -> (b, c, ...) over micro-batches, put back in order: (B, columns, ...), 0 where nothing was.
    columns: None for R."""
    columns = batch.mask.size(1) if columns is None else columns
    mine = [(rows, f(batch.take(rows))) for rows in track(micro_batches(batch, tokens), "log-probabilities")]
    out = None
    for done in distributed.gather(mine):
        for rows, y in done:
            y = y.to(batch.mask.device)
            if out is None:
                out = y.new_zeros(len(batch.mask), columns, *y.shape[2:])
            out[rows, :y.size(1)] = y
    return out


def run_trunk(model, batch, layer, tokens):
    """The Trunk that enters block `layer` in every row of a batch, by all processes together."""
    def enter(part):
        return model.hidden_states(part.tokens, stop_layer=layer)[0]
    return Trunk(inference(enter, batch, tokens, batch.tokens.size(1)), layer)


def model_reward(adapter_context, head, micro_batch_tokens=MICRO, shared_blocks=0):
    """A reward model as the reward of an Environment: (prompts, answers, rows, batch) -> scores (B,); rows are
    not read.

    shared_blocks: how many of its lowest blocks compute the same as those of the roles. If the trunk of
    `batch`, the rollout of these prompts and answers, ends there or below, the reward model goes on from it.
    """
    def reward(prompts, answers, rows=None, batch=None):
        with adapter_context() as (model, past):
            if batch is None or batch.trunk is None or batch.trunk.layer > shared_blocks:
                batch = collate_rollout(prompts, answers, model.wte.weight.device)
            s = inference(lambda part: scores(model, head, part, past)[:, None], batch, micro_batch_tokens)
            return s[:, 0]                                                 # (B, 1) -> (B,)
    return reward


def combine_rewards(parts):
    """The sum of weight x reward as one reward, which returns Scores. parts: {name: (weight, reward)}. A batch
    that it is given is given to all parts."""
    def reward(prompts, answers, rows=None, *batch):
        found = {name: checked_scores(part(prompts, answers, rows, *batch), len(answers), "cpu")
                 for name, (_, part) in parts.items()}
        total = sum(weight * found[name].double() for name, (weight, _) in parts.items())
        return Scores(total, found)
    return reward


# -------------------------------------------------------------- supervised steps: reward models, preferences
# One micro-batch in; a sum and a count out, so that a step can divide by the count of all its parts.
# examples: [(prompt, [answer, ...], [rank, ...], ...), ...], ids; smaller rank = better. A comparison has the
# ranks 0 and 1, or 0 and the margin of votes. find_trunk: as collate_rollout takes it.

class Ranked(NamedTuple):
    """The answers of B examples."""
    flat: Batch                                 # see collate_answers
    rank: torch.Tensor                          # (B, K)
    mask: torch.Tensor                          # (B, K)    which answers exist
    length: torch.Tensor                        # (B, K)    tokens, end token included


def check_labels(examples, name):
    """Raises UserError for an example without answers, or without as many ranks or labels (`name`) as answers."""
    for i, (_, answers, labels, *_) in enumerate(examples):
        if not len(answers) or len(answers) != len(labels):
            raise UserError(f"example {i} has {len(answers)} answers and {len(labels)} {name}s; it needs one "
                            f"answer or more, and a {name} for each")


def collate_answers(examples, device, find_trunk=None):
    """A Batch with a row for each answer, one example behind the other."""
    prompts = [example[0] for example in examples for _ in example[1]]
    answers = [answer for example in examples for answer in example[1]]
    return collate_rollout(prompts, answers, device, find_trunk=find_trunk)


def collate_ranked(examples, device, find_trunk=None):
    """Examples -> Ranked. Raises UserError for an example without as many ranks as answers."""
    check_labels(examples, "rank")
    flat = collate_answers(examples, device, find_trunk)
    n = torch.tensor([len(example[1]) for example in examples], device=device)
    mask = torch.arange(int(n.max()), device=device) < n[:, None]               # (B, K)
    ranks = [rank for example in examples for rank in example[2]]
    rank = torch.tensor(ranks, dtype=torch.get_default_dtype(), device=device)
    return Ranked(flat, scatter_to_mask(rank, mask), mask, scatter_to_mask(flat.mask.sum(1), mask))


def reward_step(adapter_context, head, examples, find_trunk=None):
    """One forward scores all answers; the pairs of a prompt stay together: spread over batches they overfit
    in an epoch (InstructGPT, section 3.5). Returns the loss summed over prompts, how many of them hold a
    pair, and (scores, rank, mask, answer length), each (B, K), for ppo_metrics.reward_report. Raises
    UserError for an example without as many ranks as answers.
    """
    with adapter_context() as (model, past):
        ranked = collate_ranked(examples, model.wte.weight.device, find_trunk)
        s = scatter_to_mask(scores(model, head, ranked.flat, past), ranked.mask)                # (B, K)
    loss, pairs = rank_loss(s, ranked.rank, ranked.mask)
    return loss.sum(), (pairs > 0).sum(), (s.detach(), ranked.rank, ranked.mask, ranked.length)


def answer_logprobs(adapter_context, examples, find_trunk=None):
    """Log-probabilities of all answers, one example behind the other, summed over their tokens: (N,).
    examples: [(prompt, [answer, ...], ...), ...]."""
    with adapter_context() as (model, past):
        batch = collate_answers(examples, model.wte.weight.device, find_trunk)
        return logprobs(PolicyDistribution(model), batch, past).sum(1)


def reference_logprobs(record, examples, like):
    """What the reference gives all answers, (N,), from the fourth entries of examples; None if the loss needs
    none. Raises UserError for an example without a log-probability for each answer."""
    if not record.needs_reference:
        return None
    if any(len(example) < 4 or len(example[3]) != len(example[1]) for example in examples):
        raise UserError(f"--preference_loss {record.name} needs a reference: each example must have the "
                        "log-probabilities of its answers as a fourth entry")
    return torch.tensor([x for example in examples for x in example[3]], device=like.device, dtype=like.dtype)


def preference_step(adapter_context, examples, cfg, z0=0.0, find_trunk=None):
    """The preference loss that cfg, a PreferenceConfig, names: dpo_step, or for answers without a partner
    kto_step, which reads z0."""
    if find_record(PREFERENCE_LOSSES, cfg.preference_loss).unpaired:
        return kto_step(adapter_context, examples, cfg, z0, find_trunk)
    return dpo_step(adapter_context, examples, cfg, find_trunk)


def dpo_step(adapter_context, examples, cfg, find_trunk=None):
    """A loss on pairs: all pairs of unequal ranks among a prompt's answers, averaged per prompt.

    examples  [(prompt, answers, ranks, log-probabilities of the answers under the reference), ...]. The last
              never change, so `answer_logprobs` finds them once, before training; a loss without a reference
              ignores them
    cfg       a PreferenceConfig
    Returns the loss summed over examples, their number, and metrics {name: (B,)}. That both answers become
    less likely is normal: only their margin is trained. Raises UserError as collate_ranked, for an example
    whose ranks are all equal, and for a missing reference.
    """
    record = find_record(PREFERENCE_LOSSES, cfg.preference_loss)
    with adapter_context() as (model, past):
        ranked = collate_ranked(examples, model.wte.weight.device, find_trunk)
        logp = logprobs(PolicyDistribution(model), ranked.flat, past).sum(1)                    # (N,)
    pair = ranked_pairs(ranked.rank, ranked.mask)                                               # (B, K, K)
    count = pair.sum((1, 2))                                                                    # (B,)
    for i, example in enumerate(examples):
        if not count[i]:
            raise UserError(f"example {i} ranks all its answers {example[2][0]}; a pair is a better and a "
                            "worse one")
    b, better, worse = pair.nonzero(as_tuple=True)                                              # (P,)
    ref = reference_logprobs(record, examples, logp)

    def of_pairs(x):                                                        # (N,) -> (P,), (P,)
        if x is None:
            return None, None
        table = scatter_to_mask(x, ranked.mask)                             # (B, K)
        return table[b, better], table[b, worse]

    pairs = PairLogprobs(*of_pairs(logp), *of_pairs(ref), ranked.length[b, better], ranked.length[b, worse])
    loss, margin = record.loss(cfg, pairs)

    def per_prompt(x):
        return x.new_zeros(len(examples)).index_add(0, b, x / count[b])
    metrics = {"accuracy": ranked_right(margin), "margin": margin, "chosen_logp": pairs.chosen,
               "rejected_logp": pairs.rejected}
    return (per_prompt(loss).sum(), len(examples),
            {name: per_prompt(x.detach()) for name, x in metrics.items()})


def ranked_right(margin):
    """1 where a margin is above 0, 1/2 where it is 0, else 0."""
    return margin.sign() / 2 + 0.5


def kto_step(adapter_context, examples, cfg, z0=0.0, find_trunk=None):
    """A loss on answers that are good or bad, averaged per prompt.

    examples  [(prompt, answers, [good?, ...], log-probabilities of the answers under the reference), ...]
    cfg and result as in dpo_step; z0: of the whole step, see mismatched_log_ratios. The metrics good_logp and
    bad_logp have an entry for each such answer. Raises UserError for an example without as many labels as
    answers, and for a missing reference.
    """
    check_labels(examples, "label")
    record = find_record(PREFERENCE_LOSSES, cfg.preference_loss)
    logp = answer_logprobs(adapter_context, examples, find_trunk)                               # (N,)
    good = torch.tensor([label for example in examples for label in example[2]], device=logp.device)
    thumbs = ThumbLogprobs(logp, reference_logprobs(record, examples, logp), good, z0)
    loss, margin = record.loss(cfg, thumbs)
    answers = [len(example[1]) for example in examples]

    def per_prompt(x):
        return torch.stack([some.mean() for some in x.split(answers)])
    logp = logp.detach()
    return (per_prompt(loss).sum(), len(examples),
            {"accuracy": per_prompt(ranked_right(margin.detach())), "margin": per_prompt(margin.detach()),
             "good_logp": logp[good], "bad_logp": logp[~good]})


@torch.no_grad()
def mismatched_log_ratios(adapter_context, examples, find_trunk=None):
    """(sum of log(pi / ref) of answers to other prompts, how many): what kto_z0 takes, of all parts of a step.

    examples: [(prompt, answers to other prompts, their log-probabilities under the reference), ...].
    """
    examples = [example for example in examples if len(example[1])]
    if not examples:
        return 0.0, 0
    logp = answer_logprobs(adapter_context, examples, find_trunk)
    ref = [x for example in examples for x in example[2]]
    return logp.sum(dtype=torch.float64).item() - math.fsum(ref), len(ref)


# ----------------------------------------------------------------------------------- PPO: what the loop takes

class Roles(NamedTuple):
    """Callables that return a context manager which yields (model, past). The reference is the policy as it
    began; the critic, where the algorithm has one, comes with its head: hidden (..., C) -> values (...).
    shared_blocks: how many of the lowest blocks compute the same in policy, reference and critic; they run
    once per answer, and what they return is kept in the Batch for every role, pass and minibatch."""
    policy: Callable
    reference: Callable
    critic: Callable = None
    value_head: Callable = None
    shared_blocks: int = 0


class Scores(NamedTuple):
    """What a reward made of several returns in place of its (B,) scores."""
    total: torch.Tensor                         # (B,)      the scores
    parts: dict                                 # {name: (B,)} what they are made of, logged as reward_NAME


class Environment(NamedTuple):
    """What the policy is trained in.

    prompts      non-empty lists of token ids
    reward       (prompts, answers, rows), lists of ids and what `rows` has -> a score per answer, (B,), or
                 Scores
    reward_takes_batch   whether the reward takes their Batch, too, as a fourth argument: see model_reward
    eos          an id, or ids, that end an answer
    banned       ids never sampled and given no probability (pads)
    gold_reward  None, or another reward, which is only logged
    rows         None, or for each prompt what the reward may need besides, such as the right answer
    """
    prompts: list
    reward: Callable
    eos: int
    banned: tuple = ()
    gold_reward: Callable = None
    rows: list = None
    reward_takes_batch: bool = False


class Experience(NamedTuple):
    """One rollout with its rewards."""
    answers: list                               # B lists of ids, num_generations for each prompt
    batch: Batch
    rewarded: torch.Tensor                      # (B,)      what the reward gave, before any penalty
    ended: torch.Tensor                         # (B,)      bool: the answer ends with an end token
    metrics: dict


class Units(NamedTuple):
    """The units in which the critic works and a loss is measured, from the first rollout whose rewards
    differ.

    A run must not depend on the zero and the scale of its reward: neither changes pi* (with beta scaled
    alike). So the critic begins at the mean return of that rollout, and its loss and clip range are in
    standard deviations of those returns: value = shift + unit (gain head(h) + offset). A head that begins as
    a constant has gain 1; one that does not is a reward model, and keeps its scale. A policy loss whose
    advantages are not normalised is divided by the same unit.
    """
    shift: float = 0.0                          # the mean return
    scale: float = 0.0                          # its standard deviation; 0: no rewards have differed yet
    gain: float = 1.0
    offset: float = 0.0

    @property
    def unit(self):
        return self.scale or 1.0

    def without_scale(self):
        """Of a rollout whose rewards are all equal: the mean return alone, so that their zero does not matter."""
        return Units(self.shift, 0.0, 1.0, self.offset / self.gain)

    def standard_value(self, head_output):
        return self.gain * head_output + self.offset

    def value(self, head_output):
        return self.shift + self.unit * self.standard_value(head_output)

    def standard(self, x):
        """Values or returns in these units."""
        return (x - self.shift) / self.unit


def measure_units(cfg, batch, scores, beta, counted=None):
    """Units of a rollout and its scores (B,). batch.values: the output of the critic's head, or None.
    counted: as compute_advantages takes it, one at least."""
    mask = batch.mask if counted is None else batch.mask & counted[:, None]
    count = mask.sum()

    def mean_and_std(x):
        centred = centre(x, mask, (0, 1))
        return ((x.to(centred.dtype).masked_fill(~mask, 0).sum() / count).item(),
                (centred.square().sum() / count).sqrt().item())

    rewards = reward_tokens(cfg, batch, scores, beta)
    _, returns = gae(rewards, torch.zeros_like(rewards), mask, cfg.gamma, 1.0)
    shift, scale = mean_and_std(returns)
    if batch.values is None:
        return Units(shift, scale)
    mean, std = mean_and_std(batch.values)
    gain = 1 / (scale or 1.0) if std else 1.0
    return Units(shift, scale, gain, -gain * mean)


class PPOState:
    """Everything that changes in training: parameters by name, their Adam states, beta, the average, the
    units, the iteration count. Randomness is a function of (seed, iteration), so this, saved between
    iterations, is an exact resume.

    policy, value: {name: parameter}, value None without a critic. Raises UserError for no parameters, or for
    one that takes no gradient.
    """

    def __init__(self, cfg, policy, value=None):
        self.params = {"policy": dict(policy)}
        if value:
            self.params["value"] = dict(value)
        for role, params in self.params.items():
            if not params:
                raise UserError(f"PPOState needs the parameters of the {role} that are trained; it got none")
            for name, p in params.items():
                if not p.requires_grad:
                    raise UserError(f"parameter {name} of the {role} does not require a gradient")
        self.lr = {"policy": cfg.lr, "value": cfg.value_lr or cfg.lr}
        self.grad_clip = cfg.grad_clip or math.inf
        self.optim = {role: torch.optim.Adam(params.values(), self.lr[role], betas=(0.9, 0.95), eps=1e-5)
                      for role, params in self.params.items()}
        self.units = Units()
        beta = 0.0 if cfg.kl_place == "none" else cfg.kl_coef
        self.kl = KLController(beta, cfg.adaptive_kl_target, cfg.kl_horizon)
        self.ema = EMA(self.params["policy"], cfg.ema) if cfg.ema else None
        self.step = 0                                       # iterations done
        self.bad = dict.fromkeys(self.params, 0)            # gradients in a row that were not finite
        self.checked = set()                                # roles whose gradients have been seen once

    def apply(self, role, lr_scale):
        """Clip, and step at this share of the learning rate; 0 only clears the gradient. Returns the norm
        before clipping. A gradient that is not finite changes nothing.

        Raises UserError after ten of those in a row, and the first time for a parameter without a gradient.
        """
        params = self.params[role]
        if role not in self.checked:
            self.require_gradients(role)
        grads = {name: p.grad for name, p in params.items() if p.grad is not None}
        norm = nn.utils.get_total_norm(grads.values())
        self.bad[role] = 0 if norm.isfinite() else self.bad[role] + 1
        if self.bad[role] == 10:
            first = [name for name, g in grads.items() if not g.isfinite().all()]
            where = f"first {first[0]}" if first else "by their norm, which is too large for their type"
            raise UserError(f"ten gradients of the {role} in a row were not finite, {where}; lower --lr")
        optim = self.optim[role]
        if lr_scale and not self.bad[role]:
            nn.utils.clip_grads_with_norm_(params.values(), self.grad_clip, norm)
            optim.param_groups[0]["lr"] = self.lr[role] * lr_scale
            optim.step()
        optim.zero_grad()
        return norm.item()

    def require_gradients(self, role):
        """Raises UserError for a parameter that the first backward pass did not reach."""
        missing = [name for name, p in self.params[role].items() if p.grad is None]
        if missing:
            raise UserError(f"parameter {missing[0]} of the {role} got no gradient ({len(missing)} of "
                            f"{len(self.params[role])} did not): no loss depends on it; leave it out")
        self.checked.add(role)

    def state_dict(self):
        """Live tensors: write them out, or copy them, before the next iteration."""
        return {"step": self.step, "bad": dict(self.bad), "kl": self.kl.state_dict(),
                "units": list(self.units), "ema": self.ema and self.ema.shadow,
                "optim": {role: optim.state_dict() for role, optim in self.optim.items()},
                "params": {role: {name: p.data for name, p in params.items()}
                           for role, params in self.params.items()}}

    def load_state_dict(self, state):
        self.step = state["step"]
        self.bad = dict(state["bad"])
        self.kl.load_state_dict(state["kl"])
        self.units = Units(*state["units"])
        for role, params in self.params.items():
            for name, p in params.items():
                p.data.copy_(state["params"][role][name])
            self.optim[role].load_state_dict(state["optim"][role])
        if self.ema:
            for name, t in state["ema"].items():            # read from a file they are on the CPU
                self.ema.shadow[name].copy_(t)


def rng(*key, device="cpu"):
    """A generator that is a function of its key (hashed, because torch keeps 32 bits of a CPU seed)."""
    return torch.Generator(device).manual_seed(random.Random(repr(key)).getrandbits(32))


def prompt_indices(n, count, seed, step):
    """Which of n prompts iteration `step` answers: each once per pass over the prompts, every pass in its own
    order. Returns `count` indices."""
    positions = range(step * count, (step + 1) * count)
    orders = {}
    for i in positions:
        if i // n not in orders:
            orders[i // n] = torch.randperm(n, generator=rng(seed, "prompts", i // n)).tolist()
    return [orders[i // n][i % n] for i in positions]


def linear_decay(step, steps):
    """The share of the learning rate in an iteration: to zero, because whitened advantages do not shrink near
    the optimum, so a constant rate never settles."""
    return 1 - step / steps


def check_training(cfg, roles, state, environment):
    """Switches dropout off; returns the policy's device. Raises UserError for arguments that do not fit."""
    algorithm = find_record(ALGORITHMS, cfg.algo)
    for name, role in zip(("policy", "reference", "critic"), roles):
        optional = role is None and name == "critic"
        if not optional and (not callable(role) or isinstance(role, nn.Module)):
            raise UserError(f"the role {name} is a {type(role).__name__}; it must be a callable that returns "
                            "a context of (model, past)")
    needs = "needs" if algorithm.needs_critic else "has no critic and takes no"
    for name, part in (("roles.critic", roles.critic), ("roles.value_head", roles.value_head),
                       ("value parameters in the state", state.params.get("value"))):
        if algorithm.needs_critic != (part is not None):
            raise UserError(f"--algo {cfg.algo} {needs} {name}")
    for name in ("reward", "gold_reward"):
        function = getattr(environment, name)
        if not callable(function) and (name == "reward" or function is not None):
            raise UserError(f"{name} is a {type(function).__name__}, not a function of (prompts, answers, rows)")
    for params in state.params.values():
        check_shared_blocks(roles.shared_blocks, params)
    check_prompts(environment.prompts)
    if environment.rows is not None and len(environment.rows) != len(environment.prompts):
        raise UserError(f"the environment has {len(environment.prompts)} prompts and {len(environment.rows)} rows")
    longest = max(map(len, environment.prompts))
    largest = max(map(max, environment.prompts))
    for adapter_context in roles[:3]:
        if adapter_context is None:
            continue
        with adapter_context() as (model, past):
            model.eval()
            if any(entry is not None for entry in (past or ())[:roles.shared_blocks]):
                raise UserError(f"shared_blocks is {roles.shared_blocks}, but a soft prompt stands below that block")
            room = model.config.block_size - past_length(past)
            vocab_size = model.wte.weight.size(0)
        if longest + cfg.max_new_tokens > room:
            raise UserError(f"{longest} tokens of prompt and --max_new_tokens {cfg.max_new_tokens} of answer "
                            f"do not fit the {room} tokens of the context; shorten either")
        if largest >= vocab_size or min(map(min, environment.prompts)) < 0:
            raise UserError(f"a prompt has a token id outside 0 .. {vocab_size - 1}, the model's vocabulary")
    with roles.policy() as (model, _):
        return model.wte.weight.device


def check_shared_blocks(shared_blocks, params):
    """Raises UserError for a trained parameter ({name: parameter}) in or below the blocks that roles share."""
    for name in params:
        _, found, path = name.rpartition("blocks.")
        block = int(path.split(".")[0]) if found else 0
        if block < shared_blocks and not name.startswith(("head.", "ln_f.")):
            raise UserError(f"shared_blocks is {shared_blocks}, but {name} is trained, and it changes what enters "
                            f"block {shared_blocks}")


# -------------------------------------------------------------------------------- PPO: rollout and advantages

@torch.no_grad()
def sample_answers(policy, prompts, eos, cfg, past=None, generator=None):
    """One answer to each prompt, by all processes together. Every answer is drawn from uniforms of its own
    row, so neither --micro_batch_tokens nor the number of processes changes it. Returns B lists of ids."""
    lengths = [len(prompt) + cfg.max_new_tokens for prompt in prompts]
    uniforms = None
    if generator is not None:
        uniforms = torch.rand(len(prompts), cfg.max_new_tokens, generator=generator, device=generator.device)
        uniforms = uniforms.to(policy.wte.weight.device)
    answers = {}
    mine = distributed.local_rows(range(len(prompts)), lengths)
    for rows in track(split_by_token_budget(mine, lengths, 8 * cfg.micro_batch_tokens), "answers"):
        new = generate(policy, [prompts[i] for i in rows], cfg.max_new_tokens, eos=eos, past=past,
                       uniforms=None if uniforms is None else uniforms[rows])
        answers.update(zip(rows, new))
    return distributed.gather_rows(answers)


@torch.no_grad()
def rollout(roles, prompts, eos, cfg, banned=(), generator=None):
    """Answer every prompt, evaluate every action: a Batch with logp, entropy, ref_logp, values; the answers.

    cfg: a SamplingConfig, or a PPOConfig. The old logp is not the sampler's but that of the forward which
    `update` will run, so that ratios start at 1 to rounding. Policy and reference see equal micro-batches:
    equal weights, KL exactly 0. Without roles.critic values stay None; with it they are what its head gives,
    not yet in the reward's units (Units).
    """
    tokens = cfg.micro_batch_tokens

    def logprobs_and_entropies(policy, batch, past):
        return inference(lambda part: logprobs(policy, part, past, entropies=True), batch, tokens).unbind(-1)

    with roles.policy() as (model, past):
        policy = PolicyDistribution(model, cfg.temperature, banned)
        answers = sample_answers(policy, prompts, eos, cfg, past, generator)
        batch = collate_rollout(prompts, answers, model.wte.weight.device)
        if roles.shared_blocks:
            batch = batch._replace(trunk=run_trunk(model, batch, roles.shared_blocks, tokens))
        logp, entropies = logprobs_and_entropies(policy, batch, past)
    with roles.reference() as (model, past):
        reference = PolicyDistribution(model, cfg.temperature, banned)
        ref_logp, _ = logprobs_and_entropies(reference, batch, past)
    v = None
    if roles.critic:
        with roles.critic() as (model, past):
            v = inference(lambda part: values(model, roles.value_head, part, past), batch, tokens)
    return batch._replace(logp=logp, entropy=entropies, ref_logp=ref_logp, values=v), answers


def checked_scores(values, count, device):
    """What a reward returned, as (count,) fp32. Raises UserError unless it is a finite number per answer."""
    if isinstance(values, Scores):
        values = values.total
    try:
        s = torch.as_tensor(values, dtype=torch.float32, device=device)
    except (TypeError, ValueError, RuntimeError) as e:
        raise UserError(f"the reward must be a finite number for each of {count} answers; it gave "
                        f"a {type(values).__name__} that is no list of numbers ({e})") from None
    if s.shape != (count,) or not s.isfinite().all():
        raise UserError(f"the reward must be a finite number for each of {count} answers; it gave "
                        f"{list(s.shape)}, {int((~s.isfinite()).sum())} of them not finite")
    return s


def part_means(values):
    """{"reward_NAME": mean} of the parts of what a reward returned; {} where it has none."""
    parts = values.parts if isinstance(values, Scores) else {}
    return {f"reward_{name}": part.mean().item() for name, part in parts.items()}


def sample_and_score(cfg, roles, environment, chosen, generator, device):
    """Answers to the prompts with these indices, `num_generations` each, and their rewards: an Experience,
    with the gold reward, tokens (of prompts and answers) and seconds as metrics."""
    started = time.perf_counter()
    eos = {environment.eos} if isinstance(environment.eos, int) else set(environment.eos)
    chosen = [i for i in chosen for _ in range(cfg.num_generations)]
    prompts = [environment.prompts[i] for i in chosen]
    rows = [environment.rows and environment.rows[i] for i in chosen]
    batch, answers = rollout(roles, prompts, eos, cfg, environment.banned, generator)
    rolled_out = time.perf_counter()

    values = environment.reward(prompts, answers, rows, *([batch] if environment.reward_takes_batch else []))
    rewarded = checked_scores(values, len(answers), device)
    ended = torch.tensor([answer[-1] in eos for answer in answers], device=device)
    metrics = part_means(values)
    if environment.gold_reward:
        gold = checked_scores(environment.gold_reward(prompts, answers, rows), len(answers), device)
        metrics["gold"] = gold.mean().item()
    metrics["tokens"] = int(batch.lengths.sum())
    metrics["seconds_rollout"] = rolled_out - started
    metrics["seconds_score"] = time.perf_counter() - rolled_out
    return Experience(answers, batch, rewarded, ended, metrics)


def learnt_scores(cfg, experience):
    """What is learnt from, (B,): the rewards of an Experience, and penalties in units of their spread."""
    lengths = experience.batch.mask.sum(1)
    return final_scores(experience.rewarded, experience.ended, lengths, cfg.max_new_tokens,
                        cfg.missing_eos_penalty, cfg.overlong)


def collect(cfg, roles, environment, step, device):
    """One iteration's rollout, an Experience, and what is learnt from: the same, or with --dynamic_sampling
    only groups whose rewards differ, of it and of answers to other prompts."""
    count = cfg.batch // cfg.num_generations
    chosen = prompt_indices(len(environment.prompts), count, cfg.seed, step)
    generator = rng(cfg.seed, "sample", step, device=device)
    first = sample_and_score(cfg, roles, environment, chosen, generator, device)
    if not cfg.dynamic_sampling:
        return first, first
    found = [keep_informative_groups(cfg, first)]
    asked = set(chosen)
    sampled = len(first.answers)
    for turn in range(1, cfg.dynamic_sampling + 1):
        missing = count - sum(len(some.answers) for some in found) // cfg.num_generations
        order = torch.randperm(len(environment.prompts), generator=rng(cfg.seed, "refill", step, turn))
        chosen = [i for i in order.tolist() if i not in asked][:missing]
        if not chosen:                                      # the rollout is full, or no prompt is left
            break
        asked.update(chosen)
        generator = rng(cfg.seed, "sample", step, turn, device=device)
        more = sample_and_score(cfg, roles, environment, chosen, generator, device)
        for name in ("tokens", "seconds_rollout", "seconds_score"):
            first.metrics[name] += more.metrics[name]
        found.append(keep_informative_groups(cfg, more))
        sampled += len(more.answers)
    first.metrics["answers_sampled"] = sampled
    return first, join_experiences(found)


def keep_informative_groups(cfg, experience):
    """The groups in which the rewards of answers that count differ: an Experience, perhaps without any answer.
    Penalties do not count: of eight right answers one that is long teaches nothing about the task."""
    k = cfg.num_generations
    differs = ~equal_groups(experience.rewarded, k, counted_answers(cfg, experience)).repeat_interleave(k)
    rows = differs.nonzero()[:, 0].tolist()
    answers = [experience.answers[i] for i in rows]
    batch = experience.batch.take(rows) if rows else None
    return experience._replace(answers=answers, batch=batch, rewarded=experience.rewarded[rows],
                               ended=experience.ended[rows])


def join_experiences(parts):
    """Experiences of the same iteration as one; batch None if none of them has an answer."""
    batches = [part.batch for part in parts if part.batch is not None]
    return Experience([answer for part in parts for answer in part.answers],
                      join_batches(batches) if batches else None,
                      torch.cat([part.rewarded for part in parts]),
                      torch.cat([part.ended for part in parts]), {})


def reward_tokens(cfg, batch, scores, beta):
    """Step 3 of the header; a KL that does not stand in the reward leaves the score alone. Returns (B, R)."""
    beta = beta if cfg.kl_place == "reward" else 0.0
    return token_rewards(scores, batch.logp, batch.ref_logp, batch.mask, beta)


def compute_advantages(cfg, batch, scores, beta, units=Units(), counted=None):
    """A rollout and its scores (B,) -> the Batch with rewards, values in the reward's units, advantages and
    returns. counted (B,) bool, None for all: the rest is in no baseline and no spread, its advantages and
    returns are 0."""
    algorithm = find_record(ALGORITHMS, cfg.algo)
    batch = batch._replace(rewards=reward_tokens(cfg, batch, scores, beta))
    if batch.values is not None:
        batch = batch._replace(values=units.value(batch.values).masked_fill(~batch.mask, 0))
    mask = batch.mask if counted is None else batch.mask & counted[:, None]
    adv, returns = algorithm.advantage(cfg, batch._replace(mask=mask))
    adv = normalise_advantages(adv, mask, cfg.advantage_norm, cfg.num_generations)
    return batch._replace(advantages=adv, returns=returns)


# ----------------------------------------------------------------------------------------------- PPO: updates

def make_minibatches(cfg, count, generator=None):
    """Row indices of each optimiser step: every pass is a permutation of `count` rows, cut into pieces, which
    are fewer than --minibatches where rows are."""
    minibatches = []
    for _ in range(cfg.ppo_epochs):
        pieces = torch.randperm(count, generator=generator).tensor_split(cfg.minibatches)
        minibatches += [rows for rows in pieces if len(rows)]
    return minibatches


def policy_step(cfg, roles, part, beta, count, banned=()):
    """The policy's loss on a micro-batch, backward. part: a Batch with weights; count: tokens of the
    minibatch. Returns what it adds to the minibatch's metrics, as scalar tensors."""
    algorithm = find_record(ALGORITHMS, cfg.algo)
    with roles.policy() as (model, past):           # backward inside: recomputation needs this adapter
        logp = logprobs(PolicyDistribution(model, cfg.temperature, banned), part, past)
        loss, clipped = algorithm.policy_loss(cfg, logp, part)                  # (B, R)
        if cfg.kl_place == "loss" and beta:         # its optimum is not pi*; overflow times a beta of 0: NaN
            kl = kl_estimate(logp, part.ref_logp, cfg.kl_estimator)
            loss = loss + beta * kl.masked_fill(~part.mask, 0)
        (part.weights * loss).sum().backward()
    with torch.no_grad():
        even = part.mask / count
        ratio = log_ratio(logp, part.logp, part.mask, cfg.ratio_level).exp()
        k3 = kl_estimate(0.0, log_ratio(logp, part.logp, part.mask), "k3")
        # outside the mask `even` is 0 and every factor finite
        return {"policy_loss": (part.weights * loss).sum(), "ratio": (even * ratio).sum(),
                "clipfrac": (even * (clipped != 0)).sum(), "clipfrac_low": (even * (clipped < 0)).sum(),
                "clipfrac_high": (even * (clipped > 0)).sum(), "approx_kl": (even * k3).sum(),
                "ratio_off": ((ratio - 1).abs() * part.mask).max()}


def value_step(cfg, roles, part, count, units=Units()):
    """The critic's loss on a micro-batch, in its units, backward; arguments and result as in policy_step."""
    even = part.mask / count
    old_values = units.standard(part.values)
    with roles.critic() as (model, past):
        v = units.standard_value(values(model, roles.value_head, part, past))
        loss = ppo_value_loss(v, old_values, units.standard(part.returns), part.mask, cfg.cliprange_value)
        (even * loss).sum().backward()
    clipped = (v.detach() - old_values).abs() > (cfg.cliprange_value or math.inf)
    return {"value_loss": (even * loss.detach()).sum(), "clipfrac_value": (even * clipped).sum()}


def accumulate_gradients(cfg, roles, state, minibatch, banned=()):
    """Forward and backward over the micro-batches of a minibatch, by all processes. Returns {name:
    number}."""
    count = minibatch.mask.sum()
    weights = token_weights(minibatch.mask, cfg.token_mean, cfg.max_new_tokens)
    if cfg.advantage_norm == "none":                        # Adam's eps and the clipped norm have a scale
        weights = weights / state.units.unit
    minibatch = minibatch._replace(weights=weights)
    parts = []
    for rows in micro_batches(minibatch, cfg.micro_batch_tokens):
        part = minibatch.take(rows)
        metrics = policy_step(cfg, roles, part, state.kl.beta, count, banned)
        if roles.critic:
            metrics.update(value_step(cfg, roles, part, count, state.units))
        parts.append(metrics)
    mine = merge_parts(parts)
    if mine:                                                # one wait for a GPU per minibatch
        mine = dict(zip(mine, torch.stack(list(mine.values())).tolist()))
    distributed.all_reduce(p for params in state.params.values() for p in params.values())
    return merge_parts(distributed.gather(mine))


def add_ptx(coef, policy, params, parts):
    """PPO-ptx (InstructGPT, section 3.5): add coef x (cross-entropy per token) to the gradients.

    parts: [(x, y), ...], both (B, T), y = -1 where no target is. Returns the cross-entropy, and the norm of
    what was added over the norm of what was there. Processes share the rows; the gradients that were there,
    equal on all of them, are counted on rank 0 alone.
    """
    before = {name: p.grad.clone() for name, p in params.items() if p.grad is not None}
    count = sum(int((y >= 0).sum()) for _, y in parts)
    total = 0.0
    if distributed.dist_state.rank > 0:
        for p in params.values():
            p.grad = None
    for x, y in parts:
        rows = distributed.local_rows(range(len(x)), [1] * len(x))
        if not rows:
            continue
        targets = y[rows]
        with policy() as (model, past):
            hidden, _ = model.hidden_states(x[rows], past)
            logits = model.logits(hidden[targets >= 0]).float()
            loss = F.cross_entropy(logits, targets[targets >= 0], reduction="sum") / count
            (coef * loss).backward()
            total += loss.item()
    total, = distributed.all_reduce(params.values(), [total])
    added = nn.utils.get_total_norm([params[name].grad - g for name, g in before.items()])
    return total, (added / nn.utils.get_total_norm(before.values()).clamp(min=1e-12)).item()


def idle_roles(cfg, state):
    """The roles that do not step in this iteration: the policy while the critic warms up, and a critic that
    still waits for units, to which a step would give a scale."""
    idle = []
    if state.step < cfg.value_warmup:
        idle.append("policy")
    if cfg.batch > 1 and not state.units.scale:
        idle.append("value")
    return idle


def optimizer_step(state, lr_scale, stop, idle=()):
    """Let policy and critic step, each with its own clipping; nobody steps after an early stop, and no role in
    `idle`. Returns {name: number}."""
    metrics = {}
    for role in state.params:
        waits = stop or role in idle
        metrics[f"grad_norm_{role}"] = state.apply(role, 0.0 if waits else lr_scale)
    metrics["skipped"] = sum(bad > 0 for bad in state.bad.values())
    return metrics


def update(cfg, roles, state, batch, lr_scale=1.0, generator=None, banned=(), ptx=None, idle=()):
    """Step 5 of the header: passes over a rollout with advantages, an optimiser step per minibatch.

    idle: roles that do not step, see idle_roles.
    ptx: None, or (iteration, minibatch) -> [(x, y), ...] of pre-training text. Returns metrics: means over
    minibatches of means over real tokens; ratio_off is the largest, ratio_first that of the first minibatch,
    skipped the number of gradients that were not finite.
    """
    history = []
    for rows in make_minibatches(cfg, len(batch.mask), generator):
        metrics = accumulate_gradients(cfg, roles, state, batch.take(rows), banned)
        stop = 0 < cfg.early_stop_kl < metrics["approx_kl"]
        if ptx and not stop:
            texts = ptx(state.step, len(history))
            loss, ratio = add_ptx(cfg.ptx_coef, roles.policy, state.params["policy"], texts)
            metrics["ptx_loss"] = loss
            metrics["ptx_ratio"] = ratio
        metrics.update(optimizer_step(state, lr_scale, stop, idle))
        history.append(metrics)
        if stop:
            break
    return average_minibatches(history)


def train_ppo(cfg, roles, state, environment, ptx=None, lr_scale=linear_decay):
    """Iterate until `state.step` is cfg.steps; yield (metrics, Batch) after each iteration: the time to save.

    cfg          PPOConfig
    roles        Roles; state: PPOState of the parameters that are trained in them
    environment  Environment: prompts, reward, end tokens
    ptx          see update
    lr_scale     (iteration, iterations) -> share of the learning rate
    An interrupted iteration changes nothing in the last state saved; it runs again, with the same random
    numbers. Raises UserError for arguments that do not fit each other, and for scores that are not finite.
    """
    device = check_training(cfg, roles, state, environment)
    compares_groups = find_record(ALGORITHMS, cfg.algo).compares_groups
    while state.step < cfg.steps:
        beta = state.kl.beta
        first, experience = collect(cfg, roles, environment, state.step, device)
        metrics = {"step": state.step + 1, "beta": beta}
        counted = counted_answers(cfg, experience)
        rows = counted.nonzero()[:, 0].tolist()
        batch = None
        if experience.batch is not None:
            scores = learnt_scores(cfg, experience)
            if rows and cfg.batch > 1 and not state.units.scale:
                units = measure_units(cfg, experience.batch, scores, beta, counted)
                rewards_differ = experience.rewarded[counted].unique().numel() > 1  # not penalties alone
                state.units = units if rewards_differ else units.without_scale()
            batch = compute_advantages(cfg, experience.batch, scores, beta, state.units, counted)
        shown = batch if first is experience else first.batch._replace(values=None)
        metrics.update(describe(shown, first.answers, learnt_scores(cfg, first), first.ended,
                                cfg.num_generations, counted_answers(cfg, first), first.rewarded,
                                compares_groups))
        metrics["objective"] = metrics.get("score_penalised", metrics["score"]) - beta * metrics["kl"]
        metrics.update(first.metrics)

        started = time.perf_counter()
        scale = lr_scale(state.step, cfg.steps)
        metrics["answers_learnt"] = len(rows)
        idle = idle_roles(cfg, state)
        if rows:
            order = rng(cfg.seed, "order", state.step)
            part = batch if len(rows) == len(batch.mask) else batch.take(rows)
            metrics.update(update(cfg, roles, state, part, scale, order, environment.banned, ptx, idle))
        if "policy" not in idle:                                # else its KL stands still, too
            state.kl.update(metrics["kl"], cfg.batch)
        if state.ema:
            state.ema.update(state.params["policy"])
        state.step += 1
        metrics["lr"] = cfg.lr * scale
        metrics["seconds_update"] = time.perf_counter() - started
        yield metrics, shown if batch is None else batch


def counted_answers(cfg, experience):
    """(B,) bool, the answers that baselines and losses see: with --overlong mask not those that were cut."""
    if cfg.overlong != "mask":
        return torch.ones_like(experience.ended)
    return experience.ended
