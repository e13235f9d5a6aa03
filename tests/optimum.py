"""Where each algorithm ends, measured where the answer is known: `python tests/optimum.py` prints a table.

maximise E[score] - beta KL(pi || ref) => pi* = ref exp(score / beta) / Z, J(pi*) - J(pi) = beta KL(pi || pi*)

    table        vocabulary 4, one of it EOS, answers of up to 4 tokens: 40 states, 121 outcomes, every
                 probability enumerable. A table of logits wears the face of a GPT (trunk, head, a cache of
                 token ids), so that the whole real path runs: generate, rollout, rewards, GAE, whitening,
                 clipped losses, Adam, minibatches
    transformer  two layers, 8 prompts, the same outcomes

A row of the table is a Row: how it trains, and the point that theory says it aims at. That is pi*, the best
answer (no KL), or the point where the expected update is 0, found by ascent on the enumerated outcomes.

    python tests/optimum.py [--rows WORD ...] [--worlds table transformer] [--seeds N] [--write]

--write puts the table into tests/README.md. One thread; seconds for each row and seed.
"""
import argparse
import contextlib
import copy
import functools
import pathlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn as nn

ROOT = pathlib.Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import ppo                                                          # noqa: E402
from model import GPT, GPTConfig, Past                              # noqa: E402

V, EOS, BETA = 4, 3, 0.5


def outcomes(R):
    ended = [y + (EOS,) for n in range(R) for y in product(range(EOS), repeat=n)]
    return ended + list(product(range(EOS), repeat=R))


class Table(nn.Module):
    """The face of a GPT over a table with a row for every answer so far. Its hidden state is that row, its
    head is the identity, the keys in its cache are token ids. Prompts are one token long and say nothing."""

    def __init__(self, R, width, table=None):
        super().__init__()
        self.table = nn.Parameter(torch.zeros((V + 1) ** R, width) if table is None else table.clone())
        self.wte, self.R = nn.Embedding(V, 1).requires_grad_(False), R
        self.config = type("Config", (), dict(block_size=R + 1))

    def rows(self, answer, known):
        """answer (..., n) of which the first `known` are there -> (..., width). The key: base V + 1, digits
        id + 1."""
        at = torch.arange(answer.size(-1))
        key = ((answer + 1) * (at < known[..., None]) * (V + 1) ** at).sum(-1)
        return self.table[key % len(self.table)]                  # only a state without action ever overflows

    def hidden_states(self, x, past=None, cache=None, select=None, **unused):
        if cache is not None:                                 # decoding: (B, 1) is written where the row ends
            ids = cache.layers[0].k.scatter_(2, cache.lengths[:, None, None, None], x[:, None, :, None].float())
            return self.rows(ids[:, 0, 1:, 0].long(), cache.lengths)[:, None], cache.layers
        B, T = x.shape
        cache = x[:, None, :, None].float()
        hidden = self.rows(x[:, None, 1:].expand(B, T, T - 1), torch.arange(T).expand(B, T))
        return hidden if select is None else hidden[select], [Past(cache, cache.clone())]

    def logits(self, hidden):
        return hidden


def role(model):
    return lambda: contextlib.nullcontext((model, None))


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


class Task:
    """ref, scores (prompts, outcomes), and what follows from them."""

    def __init__(self, ref, scores, prompts=((0,),), R=4, banned=()):
        self.prompts, self.scores, self.outcomes = [list(p) for p in prompts], scores.double(), outcomes(R)
        self.banned, self.ref = banned, ref
        self.log_ref = self.law(ref)
        self.log_star = (self.log_ref + self.scores / BETA).log_softmax(1)
        self.score = {(p, y): s for p, row in zip(map(tuple, prompts), scores.tolist())
                      for y, s in zip(self.outcomes, row)}

    def law(self, model):
        """log pi(y | x): (prompts, outcomes)."""
        actor, n = ppo.PolicyDistribution(model, banned=self.banned), len(self.outcomes)
        with torch.no_grad():
            batches = [ppo.collate_rollout([p] * n, self.outcomes) for p in self.prompts]
            rows = [ppo.logprobs(actor, batch).sum(1) for batch in batches]
        return torch.stack(rows).double().log_softmax(1)            # they sum to 1 but for rounding

    def reward(self, prompts, answers, rows=None):
        return [self.score[tuple(p), tuple(y)] for p, y in zip(prompts, answers)]

    def J(self, log_pi):
        return (log_pi.exp() * (self.scores - BETA * (log_pi - self.log_ref))).sum(1).mean()

    def distance(self, policy):
        """(total variation to pi*, regret), means over prompts; the regret identity is asserted on the
        way."""
        log_pi = self.law(policy)
        p, regret = log_pi.exp(), self.J(self.log_star) - self.J(log_pi)
        assert abs(regret - BETA * (p * (log_pi - self.log_star)).sum(1).mean()) < 1e-9
        return ((p - self.log_star.exp()).abs().sum(1) / 2).mean().item(), regret.item()

    def train(self, cfg, policy, critic, head, shift=0.0):
        if not ppo.find_record(ppo.ALGORITHMS, cfg.algo).needs_critic:
            critic = head = None
        roles = ppo.Roles(role(policy), role(self.ref), critic and role(critic), head)
        learns = trainable(critic) if critic else {}
        if isinstance(head, nn.Module):
            learns |= {f"head.{name}": p for name, p in head.named_parameters()}
        state = ppo.PPOState(cfg, trainable(policy), learns)
        environment = ppo.Environment(self.prompts * (512 // len(self.prompts)), lambda *asked: [
            s + shift for s in self.reward(*asked)], EOS, self.banned)
        loop = ppo.train_ppo(cfg, roles, state, environment)
        return [m for m, _ in loop]


def config(**changes):
    base = dict(lr=0.03, batch=512, steps=100, max_new_tokens=4, kl_coef=BETA, grad_clip=0.0, ppo_epochs=2,
                minibatches=2, micro_batch_tokens=4096, adaptive_kl_target=0.0, missing_eos_penalty=None)
    record = ppo.find_record(ppo.ALGORITHMS, changes.get("algo", "ppo"))
    if changes.get("kl_place", record.defaults.get("kl_place")) == "none":
        del base["kl_coef"], base["adaptive_kl_target"]
    return ppo.PPOConfig(**{**base, **changes})


def tabular(seed, R=4):
    """A random reference, random scores, -1 without EOS. Returns the task and the policy: a copy of the
    reference."""
    g = torch.Generator().manual_seed(seed)
    ref = Table(R, V, torch.randn((V + 1) ** R, V, generator=g))
    scores = torch.randn(1, len(outcomes(R)), generator=g)
    scores[:, -(V - 1) ** R:] = -1.0
    return Task(ref, scores, R=R), Table(R, V, ref.table.data)


def run_tabular(seed=0, R=4, shift=0.0, **changes):
    """Train from the reference, on scores + shift -> the task, the policy, the log."""
    task, policy = tabular(seed, R)
    cfg = config(seed=seed, max_new_tokens=R, **changes)
    log = task.train(cfg, policy, Table(R, 1), lambda h: h[..., 0], shift)
    return task, policy, log


def transformer_task(seed, count, longest, R):
    """`count` prompts of 1 to `longest` tokens, in symbols that may not be answered, with answers of up to R; a
    taste per prompt and a favourite length."""
    torch.manual_seed(seed)
    ref = GPT(GPTConfig(vocab_size=8, block_size=8, n_layer=2, n_head=2, n_embd=32))
    for p in ref.parameters():
        p.data.mul_(8 if p.dim() == 2 else 1)                       # a reference with opinions
    prompts = [tuple(torch.randint(V, 8, (1 + i % longest,)).tolist()) for i in range(count)]
    taste = torch.randn(8, V).tolist()
    scores = [[sum(taste[p[-1]][a] for a in y) / 2 - (len(y) - len(p) / 2) ** 2 / 8 if y[-1] == EOS else -1.0
               for y in outcomes(R)] for p in prompts]
    return Task(ref, torch.tensor(scores), prompts, R, banned=range(V, 8))


def network(seed, steps, **changes):
    """The transformer task with 8 prompts of 1 to 4 tokens, trained: (task, policy, log)."""
    task = transformer_task(seed, count=8, longest=4, R=4)
    policy, critic = copy.deepcopy(task.ref), copy.deepcopy(task.ref)
    cfg = config(lr=3e-3, steps=steps, seed=seed, grad_clip=1.0, ppo_epochs=1, minibatches=8, **changes)
    log = task.train(cfg, policy, critic, ppo.ScalarHead(32, zero=True))
    return task, policy, log


# ------------------------------------------------------------------------------- the points that are aimed at

def optimum(task, p):
    """pi*: (prompts, outcomes), whatever the policy p (prompts, outcomes) is."""
    return task.log_star.exp()


def one_answer(task, p):
    """All probability on one answer to each prompt, the one that p prefers: where all advantages are 0 if
    nothing holds p to the reference."""
    return torch.zeros_like(p).scatter(1, p.argmax(1, keepdim=True), 1.0)


def fixed_point(task, advantage, weight, kl):
    """Where the expected update of a loss with a KL in it is 0: (prompts, outcomes).

    advantage   (scores (outcomes,), pi (outcomes,)) -> the expected advantage of each outcome
    weight      tokens (outcomes,) -> weight of each token of an answer of so many tokens
    kl          (log ref / pi) -> the estimate per token that stands in the loss
    No rollout, no clipping, no minibatch: Adam on the expectation, a softmax for each state.
    """
    R = max(map(len, task.outcomes))
    states = {}
    for y in task.outcomes:
        for i in range(len(y)):
            states.setdefault(y[:i], len(states))
    state = torch.tensor([[states[y[:i]] if i < len(y) else 0 for i in range(R)] for y in task.outcomes])
    action = torch.tensor([[*y, *[0] * (R - len(y))] for y in task.outcomes])
    mask = torch.tensor([[i < len(y) for i in range(R)] for y in task.outcomes])
    found = []
    for prompt, scores in zip(task.prompts, task.scores):
        rows = ppo.collate_rollout([prompt] * len(task.outcomes), task.outcomes)
        with torch.no_grad():
            ref = ppo.logprobs(ppo.PolicyDistribution(task.ref, banned=task.banned), rows).double()
        theta = torch.full((len(states), V), -30.0, dtype=torch.float64)
        theta[state[mask], action[mask]] = ref[mask]
        theta.requires_grad_()
        optim = torch.optim.Adam([theta], 0.1)
        for step in range(200):
            optim.param_groups[0]["lr"] = 0.1 * (1 - step / 200)
            logp = theta.log_softmax(-1)[state, action].masked_fill(~mask, 0)
            p = logp.detach().sum(1).exp()
            each = weight(mask.sum(1)) * p                          # the weight of each token of an outcome
            loss = BETA * kl(ref - logp) - advantage(scores, p)[:, None] * logp
            loss = (each[:, None] * mask * loss).sum()
            optim.zero_grad()
            loss.backward()
            optim.step()
        found.append(theta.detach().log_softmax(-1)[state, action].masked_fill(~mask, 0).sum(1).exp())
    return torch.stack(found)


def group_advantage(k, std):
    """The expected advantage of an outcome among k - 1 others drawn from pi, by 256 points of a Sobol
    sequence; over the group's standard deviation or not."""
    uniforms = torch.quasirandom.SobolEngine(k - 1, scramble=True, seed=0).draw(256, dtype=torch.float64)

    def advantage(scores, p):
        drawn = torch.searchsorted(p.cumsum(0), uniforms * p.sum()).clamp(max=len(p) - 1)       # (256, k - 1)
        others = scores[drawn]
        group = torch.cat((scores[:, None, None].expand(-1, len(others), 1),
                           others.expand(len(scores), -1, -1)), 2)                      # (outcomes, 256, k)
        centred = scores[:, None] - group.mean(2)
        if std:
            spread = group.std(2)
            centred = centred / spread.where(spread > 1e-9, 1.0)
        return centred.mean(1)
    return advantage


def log_ratio_k3(log_ratio):
    return log_ratio.exp() - 1 - log_ratio


def aim_of_grpo(task, p):
    return fixed_point(task, group_advantage(4, std=True), lambda n: 1 / n, log_ratio_k3)


def aim_of_grpo_with_k2(task, p):
    return fixed_point(task, group_advantage(4, std=True), lambda n: 1 / n, lambda x: x ** 2 / 2)


def aim_of_drgrpo_with_k3(task, p):
    return fixed_point(task, group_advantage(4, std=False), lambda n: 1 + 0 * n, log_ratio_k3)


# --------------------------------------------------------------------------------------------------- the rows

@dataclass
class Row:
    """run: (world, seed) -> task, policy. aim: task, the policy's probabilities (prompts, outcomes) -> those
    that theory says it ends at. why: a sentence for the table."""
    name: str
    aim_name: str
    aim: Callable
    run: Callable
    why: str
    worlds: tuple = ("table", "transformer")


def rl_flags(algo, **flags):
    """The settings of a row: answers score what the task says, with nothing taken off."""
    own = ppo.find_record(ppo.ALGORITHMS, algo).defaults
    if flags.get("kl_place", own.get("kl_place", "reward")) != "none":
        flags = {"kl_coef": BETA, "adaptive_kl_target": 0.0, **flags}
    return dict(algo=algo, overlong="none", missing_eos_penalty=None, **flags)


def run_rl(world, seed, algo, **flags):
    """Train an RL algorithm in one of the worlds -> task, policy."""
    flags = rl_flags(algo, **flags)
    if world == "table":
        task, policy, _ = run_tabular(seed, steps=60, **flags)
    else:
        task, policy, _ = network(seed, 40, **flags)
    return task, policy


def rl_row(words, aim_name, aim, why):
    """words: what stands behind --algo on a command line; what is composed is measured on the table alone."""
    algo, *rest = words.split()
    flags = {name.removeprefix("--"): value for name, value in zip(rest[::2], rest[1::2])}
    return Row(f"`--algo {words}`", aim_name, aim, functools.partial(run_rl, algo=algo, **flags), why,
               ("table",) if rest else ("table", "transformer"))


ROWS = [
    rl_row("ppo", "pi*", optimum, "the KL stands in the reward as k1, whose gradient is that of J"),
    rl_row("reinforce", "pi*", optimum, "as PPO; the batch's mean is a noisier baseline than a critic"),
    rl_row("rloo", "pi*", optimum, "as PPO; the other answers are the baseline, which needs no model"),
    rl_row("grpo --kl_place reward", "pi*", optimum,
           "at pi* all answers to a prompt have one return, so neither the std nor 1 / length moves the optimum"),
    rl_row("drgrpo --kl_place reward", "pi*", optimum, "RLOO but for the factor (k - 1) / k"),
    rl_row("dapo --kl_place reward", "pi*", optimum, "as GRPO; groups of equal returns are left out"),
    rl_row("gspo --kl_place reward", "pi*", optimum,
           "one ratio for each answer; the narrow clip leaves one step to each rollout, so it arrives later"),
    rl_row("cispo --kl_place reward", "pi*", optimum, "on fresh rollouts its gradient is that of GRPO"),
    rl_row("grpo", "its own", aim_of_grpo,
           "k3 in the loss pays KL(ref to pi) state by state; the std makes beta mean beta x std of the scores; "
           "1 / length favours short good answers"),
    rl_row("grpo --kl_estimator k2", "its own", aim_of_grpo_with_k2,
           "k2 has the gradient of KL(pi to ref) at each token, without its effect on later ones"),
    rl_row("drgrpo --kl_place loss", "its own", aim_of_drgrpo_with_k3,
           "without std and 1 / length; scores count (k - 1) / k; k3 in the loss is what remains wrong"),
    rl_row("drgrpo", "one answer", one_answer,
           "no KL: it goes to one good answer, of those that the reference gives often enough to be found"),
    rl_row("dapo", "one answer", one_answer,
           "no KL; groups that agree are replaced, so that every group has a gradient"),
    rl_row("gspo", "one answer", one_answer,
           "no KL; further steps on one rollout (table) are clipped away: there it is still on its way"),
    rl_row("cispo", "one answer", one_answer,
           "no KL; with few steps to each rollout hardly a weight is clipped: as DAPO"),
]


def measure(row, world, seed):
    """{column: number} of one run."""
    clock = time.process_time()
    task, policy = row.run(world, seed)[:2]
    seconds = time.process_time() - clock
    log_pi = task.law(policy)
    p = log_pi.exp()
    best = task.J(task.log_star) - task.J(task.log_ref)

    def distance(q):
        return ((p - q).abs().sum(1) / 2).mean().item()
    return {"to pi*": distance(optimum(task, p)), "to its aim": distance(row.aim(task, p)),
            "score": (p * task.scores).sum(1).mean().item(),
            "KL": (p * (log_pi - task.log_ref)).sum(1).mean().item(),
            "of J(pi*)": ((task.J(log_pi) - task.J(task.log_ref)) / best).item(), "seconds": seconds}


def table(rows, worlds, seeds):
    """The rows as markdown, means over seeds."""
    lines = ["| world | | aims at | TV to pi* | TV to its aim | score | KL | share of J gained | CPU s | why |",
             "|---|---|---|---|---|---|---|---|---|---|"]
    for world in worlds:
        for row in (row for row in rows if world in row.worlds):
            runs = [measure(row, world, seed) for seed in range(seeds)]
            mean = {name: sum(run[name] for run in runs) / len(runs) for name in runs[0]}
            numbers = [f"{mean['to pi*']:.3f}", f"{mean['to its aim']:.3f}", f"{mean['score']:.2f}",
                       f"{mean['KL']:.2f}", f"{mean['of J(pi*)']:.2f}", f"{mean['seconds']:.0f}"]
            lines.append(f"| {world} | {row.name} | {row.aim_name} | {' | '.join(numbers)} | {row.why} |")
            print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


def main():
    args = argparse.ArgumentParser(description="Where each algorithm ends, against the known optimum.")
    args.add_argument("--rows", nargs="+", default=[], help="only rows whose name has one of these words")
    args.add_argument("--worlds", nargs="+", default=["table", "transformer"], choices=("table", "transformer"))
    args.add_argument("--seeds", type=int, default=3)
    args.add_argument("--write", action="store_true", help="the table into tests/README.md")
    args = args.parse_args()
    torch.set_num_threads(1)
    rows = [row for row in ROWS if not args.rows or any(word in row.name for word in args.rows)]
    text = "<!-- `python tests/optimum.py` prints this table -->\n\n" + table(rows, args.worlds, args.seeds)
    print(text)
    if args.write:
        page = ROOT / "tests" / "README.md"
        before, rest = page.read_text().split("<!-- optimum -->\n")
        after = rest.split("<!-- end -->", 1)[1]
        page.write_text(before + "<!-- optimum -->\n" + text + "\n<!-- end -->" + after)


if __name__ == "__main__":
    main()
