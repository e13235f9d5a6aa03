"""Make tests/fixtures/rl/trl.npz: TRL's advantages, RL losses and gradients, so that ppo.py can be held against them.

    pip download --no-deps trl==1.16.0 && pip download --no-deps trl==0.11.4
    python tests/make_rl_fixtures.py trl-1.16.0-py3-none-any.whl trl-0.11.4-py3-none-any.whl

_compute_loss of GRPOTrainer and RLOOTrainer, and the statements that make advantages in their
_generate_and_score_completions, run by themselves, without the rest of TRL. So do compute_rewards, compute_advantages
and loss of the PPOTrainer of 0.11.4, the last release whose PPO has its equations as methods. Inputs are random, in
fp64: 8 answers of up to 7 tokens, 4 to a prompt. For every NAME of a case:

    mask  old  ref  scores  values  new_values  lengths     what all cases share
    NAME_logp                                               the policy's log-probabilities now
    NAME_advantages  NAME_loss  NAME_grad                   what TRL makes of them; the gradient is that to NAME_logp
    NAME_low  NAME_high  NAME_kl                            shares of tokens that are clipped, mean k3
    ppo_rewards  ppo_returns  ppo_value_loss  ppo_value_grad  overlong
"""
import ast
import collections
import pathlib
import sys
import types

import numpy as np
import torch
from make_preference_fixtures import definition, method

OUT = pathlib.Path(__file__).parent / "fixtures" / "rl" / "trl.npz"
K = 4
LIMIT = 9
BETA = 0.3
CASES = {                                       # settings of TRL's GRPOTrainer; step: how far the policy has moved
    "grpo": dict(loss_type="grpo", scale_rewards="group", beta=BETA),
    "grpo_corrected": dict(loss_type="grpo", scale_rewards="group", beta=BETA, use_bias_correction_kl=True),
    "drgrpo": dict(loss_type="dr_grpo", scale_rewards="none"),
    "dapo": dict(loss_type="dapo", scale_rewards="group", epsilon_high=0.28),
    "gspo": dict(loss_type="grpo", scale_rewards="group", importance_sampling_level="sequence", epsilon_low=3e-4,
                 epsilon_high=4e-4, step=1e-3),
    "cispo": dict(loss_type="cispo", scale_rewards="group", epsilon_high=5.0, step=1.5),
}


def statements(wheel, file, name, first, last, **names):
    """Run the statements of a function from the one that begins with `first` to the one that begins with `last`.
    Returns the names that are there in the end."""
    texts = [ast.unparse(node) for node in definition(wheel, file, name).body]
    [start] = [i for i, text in enumerate(texts) if text.startswith(first)]
    [end] = [i for i, text in enumerate(texts) if text.startswith(last)]
    names["torch"] = torch
    exec("\n".join(texts[start:end + 1]), names)
    return names


def trainer(logp, **settings):
    """What _compute_loss reads of a trainer, whose model gives the answers these log-probabilities."""
    accelerator = types.SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x)
    values = dict(
        accelerator=accelerator, model=types.SimpleNamespace(training=True), aux_loss_enabled=False,
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, importance_sampling_level="token", beta=0.0,
        epsilon_low=0.2, epsilon_high=0.2, use_vllm=False, max_completion_length=LIMIT,
        current_gradient_accumulation_steps=1, _entropy_bonus_enabled=False,
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
        _get_per_token_logps_and_entropies=lambda *args, **more: (logp, torch.zeros_like(logp), None))
    values |= settings
    args = types.SimpleNamespace(delta=None, steps_per_generation=values.pop("steps_per_generation", 1),
                                 use_bias_correction_kl=values.pop("use_bias_correction_kl", False))
    return types.SimpleNamespace(**values, args=args)


def loss_and_gradient(compute_loss, logp, inputs, **settings):
    logp = logp.clone().requires_grad_()
    some = trainer(logp, **settings)
    ids = torch.zeros(logp.shape, dtype=torch.long)
    loss = compute_loss(some, None, dict(inputs, prompt_ids=ids, prompt_mask=ids, completion_ids=ids))
    grad, = torch.autograd.grad(loss, logp)
    return loss.detach(), grad, some._metrics["train"]


def grpo_cases(wheel, shared, noise, data):
    mask, old, ref, scores = shared
    nanstd = method(wheel, "trainer/utils", "nanstd")
    smallest = {name: method(wheel, "trainer/utils", name) for name in ("nanmin", "nanmax")}
    compute_loss = method(wheel, "trainer/grpo_trainer", "_compute_loss", **smallest)
    for name, settings in CASES.items():
        settings = dict(settings)
        logp = old + settings.pop("step", 0.4) * noise
        some = types.SimpleNamespace(multi_objective_aggregation="sum_then_normalize", reward_weights=torch.ones(1),
                                     scale_rewards=settings.pop("scale_rewards"))
        advantages = statements(
            wheel, "trainer/grpo_trainer", "_generate_and_score_completions", "if self.multi_objective_aggregation",
            "advantages = torch.nan_to_num", self=some, rewards_per_func=scores[:, None], device="cpu",
            unscorable_mask=torch.zeros(len(scores), dtype=torch.bool), num_generations=K, nanstd=nanstd)["advantages"]
        inputs = dict(completion_mask=mask, old_per_token_logps=old, ref_per_token_logps=ref, advantages=advantages,
                      num_items_in_batch=mask.sum())
        loss, grad, metrics = loss_and_gradient(compute_loss, logp, inputs, **settings)
        data |= {f"{name}_logp": logp, f"{name}_advantages": advantages, f"{name}_loss": loss, f"{name}_grad": grad}
        for key, metric in (("low", "clip_ratio/low_mean"), ("high", "clip_ratio/high_mean"), ("kl", "kl")):
            if metric in metrics:
                data[f"{name}_{key}"] = torch.tensor(metrics[metric][0])
        if name == "dapo":                      # the first of two optimiser steps on a rollout
            half = {key: x[:K] if x.dim() else x for key, x in inputs.items()}
            loss, grad, _ = loss_and_gradient(compute_loss, logp[:K], half, steps_per_generation=2, **settings)
            data |= {"dapo_half_loss": loss, "dapo_half_grad": grad}


def rloo_cases(wheel, shared, noise, data):
    mask, old, ref, scores = shared
    some = types.SimpleNamespace(beta=BETA, normalize_advantages=False)
    data["rloo_advantages"] = statements(
        wheel, "trainer/rloo_trainer", "_generate_and_score_completions",
        "if self.beta != 0.0:\n    per_token_kl = old", "advantages = torch.nan_to_num", self=some, num_generations=K,
        rewards=scores, old_per_token_logps=old, ref_per_token_logps=ref, completion_mask=mask, gather=lambda x: x,
        nanstd=method(wheel, "trainer/utils", "nanstd"))["advantages"]
    compute_loss = method(wheel, "trainer/rloo_trainer", "_compute_loss",
                          nanmin=torch.min, nanmax=torch.max)
    inputs = dict(completion_mask=mask, old_logps=(old * mask).sum(1), advantages=data["rloo_advantages"])
    for name, logp in (("rloo", old + 0.1 * noise), ("rloo_first", old)):
        loss, grad, _ = loss_and_gradient(compute_loss, logp, inputs)
        data |= {f"{name}_logp": logp, f"{name}_loss": loss, f"{name}_grad": grad}


def ppo_cases(wheel, shared, noise, data):
    mask, old, ref, scores = shared
    mean = method(wheel, "core", "masked_mean", Optional=None)
    var = method(wheel, "core", "masked_var", masked_mean=mean)
    whiten = method(wheel, "core", "masked_whiten", masked_mean=mean, masked_var=var)
    file = "trainer/ppo_trainer"
    some = types.SimpleNamespace(
        kl_ctl=types.SimpleNamespace(value=BETA),
        config=types.SimpleNamespace(kl_penalty="kl", whiten_rewards=False, gamma=0.97, lam=0.9, cliprange=0.2,
                                     cliprange_value=0.2, vf_coef=1.0, ratio_threshold=10.0))
    some._kl_penalty = lambda logp, ref: method(wheel, file, "_kl_penalty")(some, logp, ref)
    rewards, _, _ = method(wheel, file, "compute_rewards")(some, scores, old, ref, mask)
    data["ppo_rewards"] = rewards
    advantages_of = method(wheel, file, "compute_advantages", masked_whiten=whiten)
    loss_of = method(
        wheel, file, "loss", masked_mean=mean, masked_var=var, clip_by_value=method(wheel, "core", "clip_by_value"),
        entropy_from_logits=method(wheel, "core", "entropy_from_logits"), flatten_dict=lambda stats: stats)
    for name, values in (("ppo", data["values"]), ("reinforce", torch.zeros_like(old))):
        if name == "reinforce":                 # no critic: the reward to go
            some.config.lam = 1.0
        _, advantages, returns = advantages_of(some, values, rewards, mask)
        logp = (old + 0.4 * noise).requires_grad_()
        new_values = data["new_values"].clone().requires_grad_()
        loss, value_loss, _ = loss_of(some, old, values, torch.zeros(*old.shape, 2), new_values, logp, mask,
                                      advantages, returns)
        data |= {f"{name}_advantages": advantages, f"{name}_returns": returns, f"{name}_logp": logp.detach(),
                 f"{name}_loss": loss.detach(), f"{name}_grad": torch.autograd.grad(loss, logp)[0]}
        if name == "ppo":
            data["ppo_value_loss"] = value_loss.detach()
            data["ppo_value_grad"], = torch.autograd.grad(value_loss, new_values)


def main(new, old_release):
    torch.set_default_dtype(torch.float64)      # TRL divides whole numbers by each other
    g = torch.Generator().manual_seed(0)
    shape = 2 * K, 7

    def randn(*size):
        return torch.randn(*size, generator=g, dtype=torch.float64)
    n = torch.randint(1, shape[1] + 1, (shape[0], 1), generator=g)
    n[0] = shape[1]
    mask = (torch.arange(shape[1]) < n).long()
    old = -randn(*shape).abs() - 0.1
    ref = old + 0.4 * randn(*shape)
    scores = 2 * randn(shape[0])
    values = randn(*shape)
    data = dict(mask=mask, old=old, ref=ref, scores=scores, values=values, new_values=values + 0.3 * randn(*shape))
    noise = randn(*shape)
    shared = mask, old, ref, scores
    grpo_cases(new, shared, noise, data)
    rloo_cases(new, shared, noise, data)
    ppo_cases(old_release, shared, noise, data)
    data["lengths"] = torch.arange(23)
    punish = method(new, "rewards/other_rewards", "_SoftOverlongPunishment.__call__")
    some = types.SimpleNamespace(max_completion_len=20, soft_punish_cache=4)
    data["overlong"] = torch.tensor(punish(some, [[0] * n for n in range(23)]))
    OUT.parent.mkdir(exist_ok=True)
    np.savez_compressed(OUT, **{name: x.numpy() for name, x in data.items()})


if __name__ == "__main__":
    main(*sys.argv[1:])
