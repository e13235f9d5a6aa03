"""Where each preference loss ends: distance to the optimum pi* of J, and to the point that it aims at.

    python tests/optimum_preferences.py        prints the tables of tests/README.md

J(pi) = E[score] - beta KL(pi || ref), pi* = ref exp(score / beta) / Z. The data are all pairs of answers that two
draws from ref and a Bradley-Terry rater, P(y beats y') = sigmoid(score - score'), would give, each with its
probability: no sampling noise. Two policies: a table of logits (121 answers to one prompt) and a transformer (40
answers to each of 4 prompts), both as in test_ppo_optimum.py, trained by ppo.py's records from the reference.

W[i, j] is the probability that i is chosen and j rejected; n the length. What the losses aim at over all
distributions, found without ppo.py and without training:

    dpo    pi*: h_i - h_j = (score_i - score_j) / beta is the minimum for each pair (2305.18290, eq. 4 and 7)
    ipo    ref exp(P(y beats ref) / beta) / Z (2310.12036, Psi = identity): probabilities are bounded, so no score
           is followed far
    simpo  exp(n (u + c)), u the minimum of the convex sum W log(1 + exp(gamma - beta (u_i - u_j))), c so that it sums
           to 1; with gamma = 0, u = score / beta: a score per token, and no reference
    orpo   the minimum of its expected loss, by LBFGS on the probabilities; with lambda = 0, pi = P(chosen) / n / Z
    kto    maximum of sum (P(good) - P(bad)) sigmoid(beta h): all mass on what is good more often than bad, where
           more probability soon adds nothing (z0 = 0: answers drawn from ref have a mean log-ratio below 0)
"""
import copy
import pathlib
import sys
import time

if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F

import ppo
from optimum import BETA, tabular, trainable, transformer_task

SEEDS = range(3)
WHY = {
    "dpo": ("pi*", "the likelihood of the rater's choices is largest where log-ratios are the scores / beta"),
    "ipo": ("ref exp(P(beats ref) / beta)", "its target is a probability, which is bounded, and not a score"),
    "simpo": ("exp(n (u + c))", "its scores count per token and nothing holds it to the reference; of rare answers it "
              "learns slowly"),
    "orpo": ("the minimum of its loss", "it is mostly SFT on chosen answers, so it stays near what is often chosen"),
    "kto": ("answers more often good than bad", "a sigmoid gives good answers a ceiling, and bad ones lose all "
            "probability"),
}


class Pairs:
    """A Task's pairs, with probabilities, and what each loss aims at; all fp64. P prompts, n outcomes."""

    def __init__(self, task):
        self.task = task
        self.scores = task.scores                                               # (P, n)
        self.log_ref = task.log_ref
        self.length = torch.tensor([len(y) for y in task.outcomes])             # (n,)
        ref = self.log_ref.exp()
        self.beats = torch.sigmoid(self.scores[:, :, None] - self.scores[:, None, :])           # (P, n, n)
        W = ref[:, :, None] * ref[:, None, :] * self.beats
        W = W * (1 - torch.eye(len(self.length), dtype=W.dtype))                # equal answers are no pair
        self.W = W / W.sum((1, 2), keepdim=True)
        self.good = self.W.sum(2)                                               # (P, n): chosen
        self.bad = self.W.sum(1)

    # ---- what is trained -----------------------------------------------------------------------------------
    def loss(self, cfg, log_pi):
        """The record's expected loss at log pi (P, n), a scalar: the mean over prompts."""
        record = ppo.find_record(ppo.PREFERENCE_LOSSES, cfg.preference_loss)
        P, n = log_pi.shape
        if record.unpaired:
            h = (log_pi - self.log_ref).detach()
            others = (self.good + self.bad).roll(-1, 0) / 2                     # thumbs of the next prompt
            z0 = ppo.kto_z0((others * h).sum().item(), P, cfg.beta) if P > 1 else 0.0
            total = 0.0
            for weight, label in ((self.good, True), (self.bad, False)):
                thumbs = ppo.ThumbLogprobs(log_pi, self.log_ref, torch.full((P, n), label), z0)
                total = total + (weight * record.loss(cfg, thumbs)[0]).sum() / 2
            return total / P
        sides = []
        for x in (log_pi, self.log_ref if record.needs_reference else None):
            sides += [None, None] if x is None else [x[:, :, None].expand(P, n, n), x[:, None, :].expand(P, n, n)]
        lengths = self.length[:, None].expand(P, n, n), self.length[None, :].expand(P, n, n)
        return (self.W * record.loss(cfg, ppo.PairLogprobs(*sides, *lengths))[0]).sum() / P

    def train(self, cfg, policy, steps, lr):
        """From the reference, with exact expectations: Adam with a rate that falls to 0."""
        n = len(self.length)
        prompts = [prompt for prompt in self.task.prompts for _ in range(n)]
        rows = ppo.collate_rollout(prompts, self.task.outcomes * len(self.task.prompts))
        actor = ppo.PolicyDistribution(policy, banned=self.task.banned)
        optim = torch.optim.Adam(trainable(policy).values(), lr)
        for step in range(steps):
            optim.param_groups[0]["lr"] = lr * (1 - step / steps)
            log_pi = ppo.logprobs(actor, rows).sum(1).view(-1, n).double()
            optim.zero_grad()
            self.loss(cfg, log_pi).backward()
            optim.step()
        return policy

    # ---- what theory says ----------------------------------------------------------------------------------
    def aim(self, cfg):
        """log pi (P, n) of the point that the loss aims at."""
        rows = [getattr(self, "aim_" + cfg.preference_loss)(cfg, p) for p in range(len(self.scores))]
        return torch.stack(rows)

    def aim_dpo(self, cfg, p):
        return (self.log_ref[p] + self.scores[p] / cfg.beta).log_softmax(0)

    def aim_ipo(self, cfg, p):
        beats_ref = (self.beats[p] * self.log_ref[p].exp()).sum(1)
        return (self.log_ref[p] + beats_ref / cfg.beta).log_softmax(0)

    def aim_simpo(self, cfg, p):
        """Newton's method on u; then c by bisection."""
        W = self.W[p]
        u = torch.zeros_like(self.scores[p])

        def value(u):
            return (W * F.softplus(cfg.simpo_gamma - cfg.beta * (u[:, None] - u))).sum()
        for _ in range(100):
            x = torch.sigmoid(cfg.simpo_gamma - cfg.beta * (u[:, None] - u))
            slope = W * x
            curve = W * x * (1 - x)
            gradient = cfg.beta * (slope.sum(0) - slope.sum(1))
            both = cfg.beta ** 2 * (curve + curve.T)
            hessian = torch.diag(both.sum(1)) - both + 1e-12 * torch.eye(len(u), dtype=u.dtype)
            step = torch.linalg.solve(hessian, gradient)
            scale = 1.0
            while value(u - scale * step) > value(u) and scale > 1e-6:
                scale /= 2
            u = u - scale * step
            u = u - u.mean()
            if step.abs().max() < 1e-9:
                break
        return self.length * (u + bisect(lambda c: (self.length * (u + c)).exp().sum() - 1, -100.0, 100.0))

    def aim_orpo(self, cfg, p):
        logits = self.log_ref[p].clone().requires_grad_()
        optim = torch.optim.LBFGS([logits], max_iter=2000, tolerance_grad=1e-10, tolerance_change=1e-14,
                                  history_size=50, line_search_fn="strong_wolfe")

        def closure():
            optim.zero_grad()
            m = logits.log_softmax(0) / self.length
            odds = m - torch.log1p(-m.exp())
            loss = -(self.good[p] * m).sum() + cfg.orpo_lambda * (
                self.W[p] * F.softplus(odds - odds[:, None])).sum()
            loss.backward()
            return loss
        optim.step(closure)
        return logits.detach().log_softmax(0)

    def aim_kto(self, cfg, p):
        """Of each answer with a > 0, a beta sigmoid'(beta h) = mu ref exp(h); mu so that all sums to 1."""
        a = self.good[p] * cfg.desirable_weight - self.bad[p] * cfg.undesirable_weight
        some = a > 0
        log_a, log_ref = a[some].log(), self.log_ref[p][some]

        def log_pi(log_mu):
            def surplus(h):
                return log_a + F.logsigmoid(cfg.beta * h) + F.logsigmoid(-cfg.beta * h) - h - log_ref - log_mu
            return log_ref + bisect(lambda h: -surplus(h), torch.full_like(log_a, -200.0), torch.full_like(log_a, 200.0))
        log_mu = bisect(lambda x: 1 - log_pi(x).exp().sum(), -100.0, 100.0)
        found = torch.full_like(a, -1e3)
        found[some] = log_pi(log_mu)
        return found.log_softmax(0)


def bisect(f, low, high):
    """The root of an increasing function, elementwise."""
    low, high = torch.as_tensor(low, dtype=torch.float64), torch.as_tensor(high, dtype=torch.float64)
    for _ in range(100):
        middle = (low + high) / 2
        above = f(middle) > 0
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return (low + high) / 2


def config(name, **changes):
    """The loss with its own defaults, at the beta of pi* where it is held to the reference."""
    record = ppo.find_record(ppo.PREFERENCE_LOSSES, name)
    own = {"beta": BETA} if record.needs_reference else {}
    return ppo.PreferenceConfig(preference_loss=name, **{**own, **changes})


def tv(log_p, log_q):
    """Total variation, mean over prompts."""
    return ((log_p.exp() - log_q.exp()).abs().sum(1) / 2).mean().item()


def measures(task, log_pi, aim):
    """(TV to pi*, TV to the aim, E[score], KL to ref)."""
    p = log_pi.exp()
    kl = torch.where(p > 0, p * (log_pi - task.log_ref), 0.0).sum(1).mean().item()
    return tv(log_pi, task.log_star), tv(log_pi, aim), (p * task.scores).sum(1).mean().item(), kl


def transformer(seed):
    """The task with 40 answers to each of 4 prompts, and the policy, a copy of its reference."""
    task = transformer_task(seed, count=4, longest=3, R=3)
    return task, copy.deepcopy(task.ref)


WORLDS = {"table": (tabular, dict(steps=400, lr=1.0)), "transformer": (transformer, dict(steps=120, lr=3e-3))}


def run(name, world="table", seed=0, **changes):
    """Train one loss on one seed -> its measures."""
    make, settings = WORLDS[world]
    task, policy = make(seed)
    pairs = Pairs(task)
    cfg = config(name, **changes)
    pairs.train(cfg, policy, **settings)
    return measures(task, task.law(policy), pairs.aim(cfg))


def table(world):
    """The Markdown table of one world: means over the seeds."""
    lines = ["| algorithm | aims at | TV to pi* | TV to its aim | reward | KL | why |", "|---|---|---|---|---|---|---|"]

    def line(name, aim, rows, why, has_aim=True):
        star, own, reward, kl = (sum(column) / len(column) for column in zip(*rows))
        lines.append(f"| {name} | {aim} | {star:.3f} | {f'{own:.3f}' if has_aim else ''} | {reward:.2f} | {kl:.2f} "
                     f"| {why} |")
    tasks = [WORLDS[world][0](seed)[0] for seed in SEEDS]
    line("the reference", "", [measures(t, t.log_ref, t.log_ref) for t in tasks], "before training", False)
    line("pi*", "", [measures(t, t.log_star, t.log_star) for t in tasks], "the optimum of J", False)
    for name, (aim, why) in WHY.items():
        line(f"`{name}`", aim, [run(name, world, seed) for seed in SEEDS], why)
    return "\n".join(lines)


def main():
    torch.set_num_threads(1)
    began = time.process_time()
    for world in WORLDS:
        print(f"{world}:\n\n{table(world)}\n")
    print(f"{time.process_time() - began:.0f} s of one thread")


if __name__ == "__main__":
    main()
