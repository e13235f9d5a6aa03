"""Every equation of ppo.py against hand numbers and naive loops; every index and mask against injected
bugs."""
import contextlib
import copy
import dataclasses
import math

import pytest
import tiny
import torch
import torch.nn as nn
import torch.nn.functional as F

import lora
import ppo
import prompts
from data.runtime.files import UserError
from data.results.ppo_metrics import describe, explained_variance, health, reward_report, show
from model import GPT, GPTConfig, generate

F64 = torch.float64
MASK = torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()


def t(*rows):
    return torch.tensor(rows, dtype=F64)


def ragged(B=6, R=7, seed=0, *, n=8):
    """Random ragged tensors in fp64, and a mask with rows of length 1, R and in between."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.cat((torch.tensor([1, R]), torch.randint(1, R + 1, (B - 2,), generator=g)))
    mask = torch.arange(R) < lengths[:, None]
    return mask, [torch.randn(B, R, generator=g, dtype=F64) for _ in range(n)]


# ----------------------------------------------------------------------------------------------- hand numbers

def test_gae_needs_a_bool_mask():
    x = torch.ones(1, 3)
    with pytest.raises(UserError, match="gae: the mask is torch.float32; it must be bool"):
        ppo.gae(x, x, x)


def test_gae_fixtures():
    rewards, values = t([-0.1, 0.2, 1.0], [-0.1, 1.2, 0.0]), t([0.5, 0.4, 0.3], [0.5, 0.4, 9.0])
    adv, ret = ppo.gae(rewards, values, MASK)
    torch.testing.assert_close(adv, t([0.52675, 0.765, 0.7], [0.56, 0.8, 0.0]))
    torch.testing.assert_close(ret, t([1.02675, 1.165, 1.0], [1.06, 1.2, 0.0]))


def test_whiten_fixture():
    adv = t([0.52675, 0.765, 0.7], [0.56, 0.8, 77.0])
    assert abs(ppo.masked_mean(adv, MASK) - 0.67035) < 1e-8
    want = t([-1.31699, 0.86806, 0.27193], [-1.01204, 1.18905, 0.0])
    torch.testing.assert_close(ppo.whiten(adv, MASK), want, atol=1e-5, rtol=0)
    for shift, scale in ((1e3, 1.0), (0.0, 1e-9), (-5.0, 1e6)):
        moved = ppo.whiten(shift + scale * adv, MASK)
        torch.testing.assert_close(moved, ppo.whiten(adv, MASK), atol=1e-9, rtol=0)


def test_whiten_of_a_constant_or_a_single_token_is_zero():
    assert ppo.whiten(t([3.0, 3.0, 3.0], [3.0, 3.0, 9.0]), MASK).abs().max() == 0
    assert ppo.whiten(t([5.0, 1.0]), torch.tensor([[True, False]])).abs().max() == 0


@pytest.mark.parametrize("advantage, ratio, loss, flows", [
    (1, 1.5, -1.2, False), (1, 0.5, -0.5, True), (-1, 1.5, 1.5, True), (-1, 0.5, 0.8, False)])
def test_policy_loss_fixtures(advantage, ratio, loss, flows):
    logp = torch.tensor([[math.log(ratio)]], dtype=F64, requires_grad=True)
    got = ppo.ppo_policy_loss(logp, t([0.0]), t([advantage]), torch.ones(1, 1).bool(), clip=0.2)
    assert abs(got.item() - loss) < 1e-12
    got.sum().backward()
    assert (logp.grad.item() != 0) == flows
    if flows:                                           # d(-A e^l)/dl
        assert abs(logp.grad.item() + advantage * ratio) < 1e-12


@pytest.mark.parametrize("ret, loss, flows", [(2.0, 0.845, False), (0.0, 0.5, True)])
def test_value_loss_fixtures(ret, loss, flows):
    v = torch.tensor([[1.0]], dtype=F64, requires_grad=True)
    got = ppo.ppo_value_loss(v, t([0.5]), t([ret]), torch.ones(1, 1).bool(), clip=0.2)
    assert abs(got.item() - loss) < 1e-12
    got.sum().backward()
    assert (v.grad.item() != 0) == flows


def test_ranking_fixture_ties_and_gradient():
    scores = torch.tensor([[2.0, 1.0, 0.0]], dtype=F64, requires_grad=True)
    loss, pairs = ppo.rank_loss(scores, torch.tensor([[0, 1, 2]]))
    assert abs(loss.item() - 0.2511511) < 1e-6 and pairs.item() == 3
    loss, pairs = ppo.rank_loss(scores, torch.tensor([[1, 1, 1]]))
    loss.sum().backward()
    assert loss.item() == 0 and pairs.item() == 0 and scores.grad.abs().max() == 0
    a, b = torch.tensor([0.3]), torch.tensor([-0.4])
    loss, _ = ppo.rank_loss(torch.stack((a, b), 1), torch.tensor([[1, 0]]))            # the second answer won
    torch.testing.assert_close(loss, ppo.pairwise_loss(b, a))


def test_kl_controller_fixtures():
    for kl, want in ((9.0, 0.201024), (5.4, 0.199488), (6.6, 0.2 * (1 + 0.1 * 256 / 1e4))):
        c = ppo.KLController(0.2, target=6.0, horizon=10_000)
        c.update(kl, 256)
        assert abs(c.beta - want) < 1e-9
    fixed = ppo.KLController(0.2)
    fixed.update(100.0, 256)
    assert fixed.beta == 0.2
    large = ppo.KLController(0.2, target=6.0, horizon=10)
    large.update(0.0, 1000)                             # a batch of a hundred horizons is one of a horizon
    assert abs(large.beta - 0.16) < 1e-12
    again = ppo.KLController(0.5, 6.0)
    again.load_state_dict(c.state_dict())
    assert again.beta == c.beta


def test_rewards_land_on_the_last_real_token():
    """Rows of length 1, middle and R: exact tensors; the KL penalty keeps its sign."""
    mask = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 1]]).bool()
    logp, ref = t([-1, 9, 9], [-1, -2, 9], [-1, -2, -3]), t([-2, 5, 5], [-2, -2, 5], [-1, -1, -1])
    got = ppo.token_rewards(torch.tensor([10.0, 20.0, 30.0], dtype=F64), logp, ref, mask, beta=0.5)
    torch.testing.assert_close(got, t([9.5, 0, 0], [-0.5, 20, 0], [0, 0.5, 31]))
    logp.requires_grad_()
    score = torch.ones(3, dtype=F64, requires_grad=True)
    assert not ppo.token_rewards(score, logp, ref, mask, 0.5).requires_grad


def test_kl_estimators():
    p = torch.tensor([0.5, 0.3, 0.2], dtype=F64)
    q = torch.tensor([0.2, 0.2, 0.6], dtype=F64)
    kl = (p * (p / q).log()).sum()
    for kind in ("k1", "k3"):                                  # unbiased: the mean under p is the KL, exactly
        torch.testing.assert_close((p * ppo.kl_estimate(p.log(), q.log(), kind)).sum(), kl)
    assert all((ppo.kl_estimate(p.log(), q.log(), kind) >= 0).all() for kind in ("k2", "k3"))
    assert ppo.kl_estimate(t([-1.0]), t([-3.0])).item() == 2.0                # more likely than ref: positive


def test_group_advantages():
    got = ppo.rloo_advantage(t([1, 2, 6], [0, 0, 0]))
    torch.testing.assert_close(got, t([1 - 4, 2 - 3.5, 6 - 1.5], [0, 0, 0]))
    got = ppo.grpo_advantage(t([1, 2, 6], [4, 4, 4]))
    torch.testing.assert_close(got[0], (t([1, 2, 6])[0] - 3) / t([1, 2, 6])[0].std())
    assert got[1].abs().max() == 0
    torch.testing.assert_close(ppo.grpo_advantage(t([1, 2, 6]), std=False), t([-2, -1, 3]))


def test_dpo_losses():
    c, r, rc, rr = (torch.tensor([x], dtype=F64) for x in (-3.0, -5.0, -4.0, -4.5))     # h = 1 - (-0.5) = 1.5
    loss, margin = ppo.dpo_loss(c, r, rc, rr, beta=0.2)
    assert abs(loss.item() + math.log(1 / (1 + math.exp(-0.3)))) < 1e-12 and abs(margin.item() - 0.3) < 1e-12
    smooth, _ = ppo.dpo_loss(c, r, rc, rr, beta=0.2, label_smoothing=0.25)
    flipped, _ = ppo.dpo_loss(r, c, rr, rc, beta=0.2)
    torch.testing.assert_close(smooth, 0.75 * loss + 0.25 * flipped)
    ipo, _ = ppo.ipo_loss(c, r, rc, rr, beta=0.2)
    assert abs(ipo.item() - (1.5 - 2.5) ** 2) < 1e-12
    start, _ = ppo.dpo_loss(c, r, c, r)
    assert abs(start.item() - math.log(2)) < 1e-12                                 # policy == reference


def test_the_mean_of_one_token_and_of_none():
    mask = torch.tensor([[True, False]])
    x = torch.tensor([[3.0, math.nan]])
    assert ppo.masked_mean(x, mask) == 3 and ppo.masked_mean(x, ~mask & mask) == 0
    assert ppo.masked_mean(torch.tensor([[3.0, 6.0]]), mask | ~mask) == 4.5


def test_entropy_is_exact_and_survives_banned_tokens():
    logits = torch.tensor([[0.0, 0.0, -math.inf], [0.0, math.log(3), -math.inf]], dtype=F64)
    want = torch.tensor([math.log(2), -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))], dtype=F64)
    torch.testing.assert_close(ppo.entropy(logits), want)


def test_explained_variance():
    mask, (ret, noise, *_) = ragged()
    assert abs(explained_variance(ret, ret, mask) - 1) < 1e-12
    assert abs(explained_variance(torch.zeros_like(ret), ret, mask)) < 1e-12
    assert explained_variance(-ret, ret, mask) < -2.9


def test_selection():
    scores = t([1, 5, 3, 5], [2, 0, 1, -1])
    assert ppo.best_of_n(scores).tolist() == [1, 0]
    assert ppo.feedme(scores, keep=2) == [(0, 1), (0, 3), (1, 0), (1, 2)]
    assert ppo.feedme(scores, keep=9, at_least=3) == [(0, 1), (0, 3), (0, 2)]


def test_ema_is_the_closed_form():
    p = {"w": torch.tensor([1.0, -2.0], dtype=F64)}
    ema, decay = ppo.EMA(p, 0.9), 0.9
    path = [p["w"].clone()]
    for step in range(3):
        p["w"].add_(step + 1.0)
        path.append(p["w"].clone())
        ema.update(p)
    want = decay ** 3 * path[0] + 0.1 * (decay ** 2 * path[1] + decay * path[2] + path[3])
    torch.testing.assert_close(ema.shadow["w"], want)


# ------------------------------------------------------------------------------------ naive loops, fp64 1e-10

def naive_losses(mask, logp, old_logp, ref_logp, values, old_values, scores, beta, gamma=0.97, lam=0.9,
                 e=0.2):
    """PPO in Python scalars, one row and one token at a time, from the definitions (GAE as its double
    sum)."""
    rows = [row.sum().item() for row in mask]
    advs, rets = [], []
    for b, n in enumerate(rows):
        r = [-beta * (old_logp[b, i] - ref_logp[b, i]).item() for i in range(n)]
        r[-1] += scores[b].item()
        v = [old_values[b, i].item() for i in range(n)] + [0.0]
        delta = [r[i] + gamma * v[i + 1] - v[i] for i in range(n)]
        adv = [sum((gamma * lam) ** (j - i) * delta[j] for j in range(i, n)) for i in range(n)]
        advs.append(adv)
        rets.append([a + x for a, x in zip(adv, v)])
    flat = [a for adv in advs for a in adv]
    mean = sum(flat) / len(flat)
    std = math.sqrt(sum((a - mean) ** 2 for a in flat) / len(flat))
    policy, value, count = 0.0, 0.0, sum(rows)
    for b, n in enumerate(rows):
        for i in range(n):
            a = (advs[b][i] - mean) / std
            ratio = (logp[b, i] - old_logp[b, i]).exp()
            policy = policy + torch.maximum(-a * ratio, -a * ratio.clamp(1 - e, 1 + e)) / count
            near = old_values[b, i] + (values[b, i] - old_values[b, i]).clamp(-e, e)
            worse = torch.maximum((values[b, i] - rets[b][i]) ** 2, (near - rets[b][i]) ** 2)
            value = value + 0.5 * worse / count
    return policy, value


def vector_losses(mask, logp, old_logp, ref_logp, values, old_values, scores, beta, gamma=0.97, lam=0.9,
                  e=0.2):
    rewards = ppo.token_rewards(scores, old_logp, ref_logp, mask, beta)
    adv, ret = ppo.gae(rewards, old_values, mask, gamma, lam)
    policy = ppo.masked_mean(ppo.ppo_policy_loss(logp, old_logp, ppo.whiten(adv, mask), mask, e), mask)
    return policy, ppo.masked_mean(ppo.ppo_value_loss(values, old_values, ret, mask, e), mask)


@pytest.mark.parametrize("seed", range(4))
def test_losses_and_gradients_equal_a_naive_loop(seed):
    mask, (logp, old, ref, v, v0, s, *_) = ragged(seed=seed)
    args = [old + 0.3 * logp, old, ref, v0 + 0.3 * v, v0]
    got, want = [], []
    for f, out in ((vector_losses, got), (naive_losses, want)):
        leaf = [x.clone().requires_grad_() for x in args]
        policy, value = f(mask, *leaf, s[:, 0], 0.3)
        (policy + value).backward()
        out += [policy.detach(), value.detach(), leaf[0].grad, leaf[3].grad]
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)
    assert got[2].abs().sum() > 0 and got[3].abs().sum() > 0


def test_rank_loss_equals_a_double_loop():
    g = torch.Generator().manual_seed(1)
    scores, rank = torch.randn(5, 4, generator=g, dtype=F64), torch.randint(0, 3, (5, 4), generator=g)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]).bool()
    got, pairs = ppo.rank_loss(scores.masked_fill(~mask, math.nan), rank, mask)
    for b in range(5):
        terms = [math.log(1 + math.exp((scores[b, j] - scores[b, i]).item()))
                 for i in range(4) for j in range(4)
                 if mask[b, i] and mask[b, j] and rank[b, i] < rank[b, j]]
        assert pairs[b] == len(terms) and abs(got[b].item() - sum(terms) / max(len(terms), 1)) < 1e-10


def test_token_weights():
    mask, (x, *_) = ragged()
    n = mask.sum(1)
    torch.testing.assert_close((ppo.token_weights(mask) * x).sum(), ppo.masked_mean(x, mask))
    rows = torch.stack([x[b, :n[b]].mean() for b in range(6)])
    torch.testing.assert_close((ppo.token_weights(mask, "sequence") * x).sum(), rows.mean())
    torch.testing.assert_close((ppo.token_weights(mask, "constant", 10) * x).sum(), x[mask].sum() / 60)


def test_what_lies_outside_the_mask_changes_no_number_and_no_gradient():
    """NaN, random numbers or zeros in the pads: equal bit for bit. Three more columns of NaN: equal to 1e-14,
    since a sum over another width may add in another order."""
    mask, (logp, old, ref, v, v0, s, junk, _) = ragged(seed=5)
    fills = [torch.zeros_like(junk), junk, junk * 1e30, torch.full_like(junk, math.nan)]
    results = []
    for extra, fill in [(0, f) for f in fills] + [(3, fills[3])]:
        def pad(x):
            return F.pad(torch.where(mask, x, fill), (0, extra), value=math.nan)
        m = F.pad(mask, (0, extra))
        a = [pad(x).requires_grad_() for x in (old + 0.3 * logp, old, ref, v0 + 0.3 * v, v0)]
        losses = vector_losses(m, *a, s[:, 0], 0.3)
        sum(losses).backward()
        with torch.no_grad():
            rewards = ppo.token_rewards(s[:, 0], a[1], a[2], m, 0.3)
            adv, ret = ppo.gae(rewards, a[4], m)
            tensors = [rewards, adv, ret, ppo.whiten(adv, m), a[0].grad, a[3].grad]
        assert not any(x[~m].any() for x in tensors)
        results.append([*losses, ppo.masked_mean(a[0] ** 2, m), explained_variance(a[4], ret, m),
                        *(x[:, :7] for x in tensors)])
    for other in results[1:-1]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))
    for a, b in zip(results[0], results[-1]):
        torch.testing.assert_close(a, b, atol=1e-14, rtol=1e-14)


# ----------------------------------------------------------------------- indices: what is read where, exactly

class Clock(nn.Module):
    """A "model" whose hidden state is its position and whose logits are row `position` of a table."""

    def __init__(self, table):
        super().__init__()
        self.table, self.wte, self.calls = nn.Parameter(table), nn.Embedding(1, 1), 0

    def hidden_states(self, x, past=None, select=None):
        self.calls += 1
        hidden = torch.arange(x.size(1), dtype=F64).expand(x.shape)[..., None]
        return hidden if select is None else hidden[select], None

    def logits(self, hidden):
        return self.table[hidden[..., 0].long()]


def test_action_t_reads_position_start_minus_one_plus_t():
    table = torch.randn(9, 11, dtype=F64, generator=torch.Generator().manual_seed(0))
    model, batch = Clock(table), ppo.collate_rollout([[1, 2, 3], [4]], [[5, 6, 7, 8], [9, 10]])
    got = ppo.logprobs(ppo.PolicyDistribution(model), batch)
    want = table.log_softmax(-1)
    torch.testing.assert_close(got, torch.stack((
        torch.stack([want[2, 5], want[3, 6], want[4, 7], want[5, 8]]),
        torch.stack([want[0, 9], want[1, 10], torch.zeros(()), torch.zeros(())]))))
    assert ppo.values(model, lambda h: h[..., 0], batch).tolist() == [[2, 3, 4, 5], [0, 1, 0, 0]]
    assert ppo.scores(model, lambda h: h[..., 0], batch).tolist() == [6, 2]         # *at* the last real token
    warm = ppo.logprobs(ppo.PolicyDistribution(model, temperature=0.7), batch)
    torch.testing.assert_close(warm[0, 0], (table / 0.7).log_softmax(-1)[2, 5])


def test_the_end_is_an_action_like_any_other():
    """The policy gradient reaches the logits that emitted EOS (position 4), and stops there."""
    model, batch = Clock(torch.zeros(9, 11, dtype=F64)), ppo.collate_rollout([[1, 2, 3]], [[5, 6]])
    logp = ppo.logprobs(ppo.PolicyDistribution(model), batch)
    ppo.ppo_policy_loss(logp, logp.detach(), torch.ones(1, 2, dtype=F64), batch.mask).sum().backward()
    assert model.table.grad.abs().sum(1).gt(0).tolist() == [False, False, True, True] + [False] * 5
    assert model.table.grad[3, 6] < 0                               # descending raises the probability of EOS


def test_batches_are_trimmed_and_put_back():
    batch = ppo.collate_rollout([[1, 2, 3], [4], [5, 6]], [[7], [8, 9, 10], [11, 12]])
    part = batch.take([0, 2])
    assert part.tokens.tolist() == [[1, 2, 3, 7], [5, 6, 11, 12]]
    assert part.mask.tolist() == [[True, False], [True, True]]
    seen = []
    out = ppo.inference(lambda p: seen.append(p.tokens.shape) or p.mask.long() * p.start[:, None], batch, 8)
    assert out.tolist() == [[3, 0, 0], [1, 1, 1], [2, 2, 0]] and seen == [(2, 4), (1, 4)]


# ------------------------------------------------------------------------------------------ with a real model

END, PAD = 10, 11


def gpt(seed=0, dialect="gpt2", **changes):
    """2 layers, width 16, 12 tokens, weights large enough to have opinions."""
    torch.manual_seed(seed)
    c = GPTConfig(**{**dict(vocab_size=12, block_size=24, n_layer=2, n_head=2, n_embd=16), **changes})
    model = GPT(c if dialect == "gpt2" else c.as_family("llama"))
    for p in model.parameters():
        p.data.mul_(8 if p.dim() == 2 else 1)
    return model


def role(model, past=None):
    return lambda: contextlib.nullcontext((model, past))


PROMPTS = [[1], [2, 3], [4, 5, 6], [7, 8, 9, 1, 2]]


def toy_reward(prompts, answers, rows=None):
    return [0.3 * sum(a in (1, 2, 3) for a in y) - 0.1 * len(y) for y in answers]


def setup(cfg, seed=0, dialect="gpt2", dropout=0.0):
    """One frozen base under three adapters: policy, value (a copy of reward's), reward. -> roles, state,
    model, head."""
    model = gpt(seed, dialect)
    for i, name in enumerate(("policy", "value", "reward")):
        lora.inject(model, ("q", "v", "o", "up"), rank=2, alpha=4, dropout=dropout, name=name, seed=i)
    g, named = torch.Generator().manual_seed(seed), dict(model.named_parameters())
    for name, p in lora.adapter_parameters(model, "reward").items():     # a reward model that is not the base
        p.data.copy_(torch.randn(p.shape, generator=g) * 0.3)
        named[name.replace(".reward.", ".value.")].data.copy_(p.data)
    torch.manual_seed(seed)
    head = ppo.ScalarHead(16)

    def adapter(name):
        return tiny.adapter_role(model, name)
    roles, learns = ppo.Roles(adapter("policy"), adapter(None)), {}
    if ppo.find_record(ppo.ALGORITHMS, cfg.algo).needs_critic:
        roles = roles._replace(critic=adapter("value"), value_head=copy.deepcopy(head))
        learns = {f"head.{k}": p for k, p in roles.value_head.named_parameters()}
        learns |= lora.adapter_parameters(model, "value")
    state = ppo.PPOState(cfg, lora.adapter_parameters(model, "policy"), learns)
    return roles, state, model, (adapter("reward"), head)


def config(**changes):
    base = dict(lr=1e-2, batch=16, steps=2, max_new_tokens=8, kl_coef=0.1, adaptive_kl_target=0.0,
                ppo_epochs=2, minibatches=2)
    record = ppo.find_record(ppo.ALGORITHMS, changes.get("algo", "ppo"))
    if changes.get("kl_place", record.defaults.get("kl_place")) == "none":
        del base["kl_coef"], base["adaptive_kl_target"]
    return ppo.PPOConfig(**{**base, **changes})


def environment(reward=toy_reward, **kw):
    return ppo.Environment(PROMPTS, reward, END, **kw)


def train(cfg, roles, state, reward=toy_reward, gold_reward=None, **kw):
    loop = ppo.train_ppo(cfg, roles, state, environment(reward, banned=[PAD], gold_reward=gold_reward), **kw)
    return [m for m, _ in loop]


def timeless(log):
    return [{k: v for k, v in m.items() if not k.startswith("seconds")} for m in log]


def check_rows_alone(dialect="gpt2"):
    """log-probabilities of a ragged batch are those of each row alone, without any padding; so are values,
    scores."""
    model, head = gpt(1, dialect), ppo.ScalarHead(16)
    answers = [[1, 2, END], [3] * 8, [END], [4, 5]]
    batch = ppo.collate_rollout(PROMPTS, answers)
    logp = ppo.logprobs(ppo.PolicyDistribution(model), batch)
    v, s = ppo.values(model, head, batch), ppo.scores(model, head, batch)
    for b, (p, y) in enumerate(zip(PROMPTS, answers)):
        hidden, _ = model.hidden_states(torch.tensor([p + y]))
        alone = model.logits(hidden).log_softmax(-1)[0, range(len(p) - 1, len(p + y) - 1), y]
        torch.testing.assert_close(logp[b, :len(y)], alone, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(v[b, :len(y)], head(hidden)[0, len(p) - 1:-1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(s[b], head(hidden)[0, -1], atol=1e-5, rtol=1e-5)
        assert not logp[b, len(y):].any() and not v[b, len(y):].any()


@pytest.mark.parametrize("dialect", ["gpt2", "llama"])
def test_a_padded_row_is_the_row_alone(dialect):
    check_rows_alone(dialect)


def test_wrong_positions_are_seen(monkeypatch):
    """The classic: rows padded on the left, positions not corrected."""
    def left_padded(prompts, answers, device="cpu", pad=0):
        batch = REAL_PACK(prompts, answers, device, pad)
        shift = batch.tokens.size(1) - batch.lengths
        tokens = torch.stack([row.roll(int(n)) for row, n in zip(batch.tokens, shift)])
        return batch._replace(tokens=tokens, start=batch.start + shift)
    REAL_PACK = ppo.collate_rollout
    monkeypatch.setattr(ppo, "collate_rollout", left_padded)
    with pytest.raises(AssertionError):
        check_rows_alone()


def check_sampling_is_scored():
    """What is sampled at temperature 0.7 has the frequencies that exp(logp) claims (chi-squared, 4 degrees),
    and a banned token never comes."""
    model, cfg = gpt(3, vocab_size=6), config(temperature=0.7, max_new_tokens=1, batch=4)
    model.wte.weight.data[5] = 3 * model.wte.weight.data[:5].mean(0)                # would be popular
    roles = ppo.Roles(role(model), role(model))
    batch, answers = ppo.rollout(roles, [[1, 2]] * 10_000, {4}, cfg, [5], torch.Generator().manual_seed(0))
    seen = torch.bincount(torch.tensor(answers)[:, 0], minlength=6)
    claim = torch.zeros(6).scatter(0, torch.tensor(answers)[:, 0], batch.logp[:, 0].exp())
    assert seen[5] == 0 and (seen[:5] > 0).all() and abs(claim.sum() - 1) < 1e-5
    expected = 10_000 * claim[:5]
    assert ((seen[:5] - expected) ** 2 / expected).sum() < 25                       # one seed in 20,000
    assert torch.equal(batch.logp, batch.ref_logp)


def test_sampling_and_scoring_are_one_distribution():
    check_sampling_is_scored()


def test_banned_tokens_are_impossible_whatever_the_shape():
    hidden = torch.randn(2, 3, 4, 16)
    policy = ppo.PolicyDistribution(gpt(1), 0.7, [PAD, 2])
    logits = policy.logits(hidden)
    assert logits.shape == (2, 3, 4, 12) and (logits[..., [PAD, 2]] == -torch.inf).all()
    assert logits.isfinite().sum() == 2 * 3 * 4 * 10
    torch.testing.assert_close(logits[1, 2], policy.logits(hidden[1, 2]))


@pytest.mark.parametrize("bug", [dict(temperature=1 / 0.7), dict(top_k=3)])
def test_another_temperature_or_top_k_in_the_sampler_is_seen(bug, monkeypatch):
    monkeypatch.setattr(ppo, "generate", lambda *a, **kw: generate(*a, **{**kw, **bug}))
    with pytest.raises(AssertionError):
        check_sampling_is_scored()


@pytest.mark.parametrize("dialect, nudge", [("gpt2", 0.0), ("gpt2", 0.05), ("llama", 0.05)])
def test_nothing_moves_when_the_rate_is_zero(dialect, nudge):
    """Ragged rows, temperature, banned ids, dropout in the adapters, several minibatches and passes: ratios
    are 1 throughout, and a policy equal to the reference has a KL of exactly 0."""
    cfg = config(lr=0.0, steps=1, ppo_epochs=2, minibatches=3, micro_batch_tokens=60, temperature=0.7)
    roles, state, _, _ = setup(cfg, dialect=dialect, dropout=0.5)
    for p in state.params["policy"].values():
        p.data += nudge
    for m in train(cfg, roles, state):
        assert m["ratio_off"] < 1e-5 and m["clipfrac"] == 0 and abs(m["approx_kl"]) < 1e-8
        assert (m["kl"] == 0) == (nudge == 0)


def test_one_base_serves_all_roles_and_stays_as_it_was():
    cfg = config()
    roles, state, model, (reward_role, head) = setup(cfg)
    base = {k: p.detach().clone() for k, p in model.named_parameters() if ".adapters." not in k}
    batch, reward = ppo.collate_rollout(PROMPTS, [[1, 2, END]] * 4), ppo.model_reward(reward_role, head)

    def ref():
        with roles.reference() as (m, _), torch.no_grad():
            return ppo.logprobs(ppo.PolicyDistribution(m), batch)
    before, scored = ref(), reward(PROMPTS, [[1, 2, END]] * 4)
    with roles.policy() as (m, _), torch.no_grad():
        assert torch.equal(ppo.logprobs(ppo.PolicyDistribution(m), batch), before)     # B is 0
    train(cfg, roles, state, reward)
    assert all(p.grad is None and torch.equal(p, base[k]) for k, p in model.named_parameters() if k in base)
    assert torch.equal(ref(), before) and torch.equal(reward(PROMPTS, [[1, 2, END]] * 4), scored)
    with roles.policy() as (m, _), torch.no_grad():
        assert not torch.equal(ppo.logprobs(ppo.PolicyDistribution(m), batch), before)


def test_peak_floats_are_n_times_one_plus_nine_p(monkeypatch):
    """One base, three adapters, gradients and two Adam moments of two of them: N (1 + 9 p), p the adapter's
    share."""
    cfg, peak = config(steps=1), []
    roles, state, model, _ = setup(cfg)

    def count(optim, apply=torch.optim.Adam.step):
        apply(optim)
        floats = sum(p.numel() + (p.grad is not None) * p.numel() for p in model.parameters())
        moments = (t for o in state.optim.values() for s in o.state.values() for t in s.values())
        peak.append(floats + sum(t.numel() for t in moments))
    monkeypatch.setattr(torch.optim.Adam, "step", count)
    train(cfg, roles, state)
    adapter = sum(p.numel() for p in lora.adapter_parameters(model, "policy").values())
    base = sum(p.numel() for k, p in model.named_parameters() if ".adapters." not in k)
    # the policy's gradient is let go before the critic steps: the peak stays one gradient below the formula
    assert abs(max(peak) / (base + 9 * adapter) - 1) < 0.03 and max(peak) <= base + 9 * adapter + 200


def test_the_critic_starts_as_the_reward_model_or_as_zero():
    """Its prediction before the last token is the reward model's score of the row without that token."""
    cfg = config()
    roles, _, model, (reward_role, head) = setup(cfg)
    answers = [[1, 2, END], [3] * 8, [4, END], [4, 5]]
    with roles.critic() as (m, _):
        v = ppo.values(m, roles.value_head, ppo.collate_rollout(PROMPTS, answers))
    want = ppo.model_reward(reward_role, head)(PROMPTS, [y[:-1] for y in answers])
    got = torch.stack([v[b, len(y) - 1] for b, y in enumerate(answers)])
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)
    assert not ppo.values(model, ppo.ScalarHead(16, zero=True), ppo.collate_rollout(PROMPTS, answers)).any()


def test_a_missing_end_scores_less_than_every_finished_answer():
    def by_length(p, y, rows):
        return [5.0 - len(a) for a in y]                    # what has no end is the longest
    cfg = config(steps=1, max_new_tokens=3, batch=32, minibatches=1)
    for reward, want in ((lambda p, y, rows: [5.0] * 32, lambda s: 4.0),
                         (by_length, lambda s: 2.0 - s.std(unbiased=False))):
        roles, state, _, _ = setup(cfg)
        m, batch = next(ppo.train_ppo(cfg, roles, state, environment(reward)))
        last = batch.lengths - batch.start - 1
        ended = batch.tokens.gather(1, (batch.lengths - 1)[:, None])[:, 0] == END
        own = torch.tensor(reward(None, [[0] * int(n + 1) for n in last], None))
        assert 0 < ended.sum() < 32 and abs(m["eos_rate"] - ended.float().mean()) < 1e-6
        at_last = batch.rewards.gather(1, last[:, None])[:, 0]
        torch.testing.assert_close(at_last, torch.where(ended, own, want(own)))     # KL is 0 at first
        assert m["score_cut"] < m["score_ended"]
        assert not [line for line in health(m) if "without an end" in line]
    roles, state, _, _ = setup(cfg)
    cfg = config(steps=1, max_new_tokens=3, batch=32, minibatches=1, missing_eos_penalty=None)
    longer = environment(lambda p, y, rows: [float(len(a)) for a in y])
    m, batch = next(ppo.train_ppo(cfg, roles, state, longer))
    assert torch.equal(batch.rewards.sum(1), batch.mask.sum(1).float()) and m["score_cut"] > m["score_ended"]
    assert [line for line in health(m) if "--missing_eos_penalty" in line]


def rolled(cfg):
    """Roles, state and a finished rollout of 16 answers, from a policy that is no longer the reference."""
    roles, state, _, _ = setup(cfg)
    for p in state.params["policy"].values():
        p.data += 0.05
    asked = [p for p in PROMPTS for _ in range(4)]
    batch, answers = ppo.rollout(roles, asked, {END}, cfg, [PAD], torch.Generator().manual_seed(0))
    score = torch.tensor(toy_reward(asked, answers))
    return roles, state, ppo.compute_advantages(cfg, batch, score, 0.1), answers


def weights(state):
    return torch.cat([p.detach().flatten() for ps in state.params.values() for p in ps.values()])


NAMES = [algorithm.name for algorithm in ppo.ALGORITHMS]


@pytest.mark.parametrize("algo", NAMES)
def test_pads_change_no_loss_no_gradient_and_no_metric(algo):
    """Random ids behind the rows, NaN outside the mask of every tensor: bit for bit the same update."""
    cfg, results = config(algo=algo), []
    for junk in (False, True):
        roles, state, batch, answers = rolled(cfg)
        assert not batch.mask.all() and batch.lengths.unique().numel() > 2          # ragged indeed
        if junk:
            behind = torch.arange(batch.tokens.size(1)) >= batch.lengths[:, None]
            noise = torch.randint(0, 12, batch.tokens.shape, generator=torch.Generator().manual_seed(5))
            known = {name: x for name, x in zip(batch._fields[3:], batch[3:]) if x is not None}
            holes = {name: x.masked_fill(~batch.mask, math.nan) for name, x in known.items()}
            batch = batch._replace(tokens=torch.where(behind, noise, batch.tokens), **holes)
        described = describe(batch, answers, torch.arange(16.0), torch.ones(16), cfg.num_generations)
        stats = ppo.update(cfg, roles, state, batch, generator=torch.Generator().manual_seed(0))
        results.append((stats, described, weights(state)))
    (a, told_a, wa), (b, told_b, wb) = results
    assert a == b and told_a == told_b and torch.equal(wa, wb)
    assert all(math.isfinite(x) for x in [*a.values(), *told_a.values()]) and told_a["entropy"] >= 0


@pytest.mark.parametrize("algo", NAMES)
def test_micro_batches_change_nothing_and_steps_are_counted(algo, monkeypatch):
    """One optimiser step per minibatch and epoch, for policy and critic each, however it is cut."""
    steps, after, real = [], [], torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self, *a: steps.append(1) or real(self, *a))
    for micro in (1, 30, 100_000):
        cfg = config(algo=algo, lr=1e-3, ppo_epochs=3, minibatches=2)
        roles, state, batch, _ = rolled(cfg)
        steps.clear()
        stats = ppo.update(dataclasses.replace(cfg, micro_batch_tokens=micro), roles, state, batch,
                           generator=torch.Generator().manual_seed(0))
        assert stats["minibatches"] == 6 and len(steps) == 6 * len(state.params)
        after.append((stats, weights(state)))
    for stats, w in after[1:]:
        torch.testing.assert_close(w, after[0][1], atol=1e-6, rtol=0)
        assert all(abs(x - after[0][0][name]) < 1e-5 for name, x in stats.items())


def test_the_advantage_of_each_algorithm():
    for algo in NAMES:
        cfg = config(algo=algo)
        _, _, batch, answers = rolled(cfg)
        score, mask = torch.tensor(toy_reward(None, answers)), batch.mask
        v, lam = (batch.values, 0.95) if algo == "ppo" else (torch.zeros_like(batch.logp), 1.0)
        plain, returns = ppo.gae(batch.rewards, v, mask, 1.0, lam)
        if algo in ("ppo", "reinforce"):                            # whitened, the returns as they were
            want = ppo.whiten(plain, mask)
            assert torch.equal(batch.returns, returns) and abs(ppo.masked_mean(want ** 2, mask) - 1) < 1e-5
        else:                                                       # groups, one number a row
            k = 8 if algo == "dapo" else 4
            group = (batch.rewards.sum(1) if algo == "rloo" else score).view(-1, k)
            each = ppo.grpo_advantage(group, algo != "drgrpo")
            if algo == "rloo":
                each = ppo.rloo_advantage(group)
            want = each.view(16, 1) * mask
        torch.testing.assert_close(batch.advantages, want)


@pytest.mark.parametrize("algo", NAMES)
def test_the_loss_of_each_algorithm(algo):
    """On the first minibatch every ratio is 1: the loss is -A, plus GRPO's penalty, weighted as published; in
    CISPO -A log pi."""
    cfg = config(algo=algo, lr=0.0, ppo_epochs=1, minibatches=1)
    roles, state, batch, answers = rolled(cfg)
    got, want = ppo.update(cfg, roles, state, batch, banned=[PAD])["policy_loss"], 0.0
    for b, y in enumerate(answers):
        for i in range(len(y)):
            log_ratio = (batch.ref_logp[b, i] - batch.logp[b, i]).item()
            k3 = math.exp(log_ratio) - 1 - log_ratio
            n = {"grpo": 16 * len(y), "gspo": 16 * len(y), "drgrpo": 16 * cfg.max_new_tokens}.get(
                algo, sum(map(len, answers)))
            factor = batch.logp[b, i].item() if algo == "cispo" else 1.0
            want += 1 / n * (-factor * batch.advantages[b, i].item() + (0.1 * k3 if algo == "grpo" else 0.0))
    assert abs(got - want) < 1e-5


def test_ptx_shares_the_step():
    """grad(PPO + c ptx) = grad PPO + c grad ptx, and the logged ratio is that of their norms."""
    model = gpt(2)
    params = dict(model.named_parameters())
    x = torch.randint(0, 12, (3, 9), generator=torch.Generator().manual_seed(1))
    y = x.roll(-1, 1).masked_fill(torch.arange(9) > torch.tensor([[8], [4], [6]]), -1)

    def grads():
        return torch.cat([p.grad.flatten() for p in params.values()])
    batch = ppo.collate_rollout(PROMPTS, [[1, 2, END]] * 4)
    logp = ppo.logprobs(ppo.PolicyDistribution(model), batch)
    ppo.masked_mean(-logp, batch.mask).backward()
    first = grads().clone()
    loss, ratio = ppo.add_ptx(0.5, role(model), params, [(x[:1], y[:1]), (x[1:], y[1:])])       # ragged parts
    both = grads().clone()
    model.zero_grad()
    want = F.cross_entropy(model(x)[0].flatten(0, 1), y.flatten(), ignore_index=-1)
    want.backward()
    torch.testing.assert_close(both, first + 0.5 * grads(), atol=1e-5, rtol=1e-5)
    assert abs(loss - want.item()) < 1e-5 and abs(ratio - (0.5 * grads().norm() / first.norm()).item()) < 1e-4


def test_ptx_holds_the_text_while_ppo_trains():
    x = torch.tensor([[1, 2, 3, 1, 2, 3, 1, 2]])
    losses = []
    for coef in (0.0, 1.0):
        cfg = config(steps=6, ptx_coef=coef)
        roles, state, _, _ = setup(cfg)
        log = train(cfg, roles, state, ptx=(lambda step, k: [(x[:, :-1], x[:, 1:])]) if coef else None)
        with roles.policy() as (m, _):
            losses.append(F.cross_entropy(m(x[:, :-1])[0][0], x[0, 1:]).item())
    assert losses[1] < losses[0] - 0.5
    assert log[-1]["ptx_loss"] < log[0]["ptx_loss"] and log[0]["ptx_ratio"] > 0


def leaves(tree):
    tree = list(tree.values()) if isinstance(tree, dict) else tree
    return sum(map(leaves, tree), []) if isinstance(tree, (list, tuple)) else [tree]


def test_resume_is_exact(tmp_path):
    """2 + 2 iterations = 4, bit for bit, through a file and after an interrupt inside the third: weights,
    Adam, beta, average, prompts, samples, log."""
    cfg = config(steps=4, ema=0.9, adaptive_kl_target=0.5, kl_horizon=100, ppo_epochs=1)

    def through_a_file(state):
        torch.save(state.state_dict(), tmp_path / "state.pt")
        return torch.load(tmp_path / "state.pt", weights_only=True)

    def interrupted(prompts, answers, rows):
        if state.step == 2:
            raise KeyboardInterrupt
        return toy_reward(prompts, answers)
    roles, state, _, _ = setup(cfg)
    whole, end = timeless(train(cfg, roles, state)), None
    end = through_a_file(state)

    roles, state, _, _ = setup(cfg)
    loop, log = ppo.train_ppo(cfg, roles, state, environment(interrupted, banned=[PAD])), []
    with pytest.raises(KeyboardInterrupt):
        for m, _ in loop:
            log.append(m)
            saved = through_a_file(state)
    roles, state, _, _ = setup(cfg)
    state.load_state_dict(saved)
    log += train(cfg, roles, state)
    assert timeless(log) == whole and whole[0]["beta"] != whole[3]["beta"]
    for a, b in zip(leaves(end), leaves(through_a_file(state)), strict=True):
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b


def test_a_seed_is_a_run():
    logs = [timeless(train(cfg, *setup(cfg)[:2])) for cfg in (config(), config(), config(seed=2))]
    assert logs[0] == logs[1] and logs[0][0]["entropy"] != logs[2][0]["entropy"]


def test_minibatches_are_drawn_anew_in_every_iteration(monkeypatch):
    orders, real = [], ppo.update
    monkeypatch.setattr(ppo, "update", lambda *a: orders.append(a[5].initial_seed()) or real(*a))
    for cfg in (config(steps=3), config(steps=3, seed=2)):
        train(cfg, *setup(cfg)[:2])
    assert len(set(orders)) == 6


def test_prompts_come_once_per_turn():
    order = sum((ppo.prompt_indices(5, 3, seed=1, step=s) for s in range(10)), [])
    assert all(sorted(order[i:i + 5]) == list(range(5)) for i in range(0, 30, 5)) and order[:5] != order[5:10]
    assert ppo.prompt_indices(5, 3, 1, 7) == order[21:24] and len(ppo.prompt_indices(2, 7, 1, 0)) == 7
    asked = []
    cfg = config(algo="rloo", steps=1)
    roles, state, _, _ = setup(cfg)
    train(cfg, roles, state, lambda p, y, rows: asked.extend(map(tuple, p)) or [0.0] * 16)
    # groups of num_generations=4
    assert all(len(set(asked[i:i + 4])) == 1 for i in range(0, 16, 4)) and len(set(asked)) == 4


def test_adam_and_the_rate():
    cfg = config(steps=4, lr=1e-2, value_lr=3e-3, ppo_epochs=1)
    roles, state, _, _ = setup(cfg)
    loop = ppo.train_ppo(cfg, roles, state, environment())
    seen = [(m["lr"], state.optim["value"].param_groups[0]["lr"]) for m, _ in loop]
    for (policy, value), share in zip(seen, (1.0, 0.75, 0.5, 0.25)):                # to zero, not at zero
        assert abs(policy - 1e-2 * share) < 1e-12 and abs(value - 3e-3 * share) < 1e-12
    for group in (o.param_groups[0] for o in state.optim.values()):
        assert group["eps"] == 1e-5 and group["weight_decay"] == 0
    roles, state, _, _ = setup(cfg)
    log = train(cfg, roles, state, lr_scale=lambda step, steps: min(1.0, 0.1 + 0.09 * step))
    assert [round(m["lr"], 6) for m in log] == [0.001, 0.0019, 0.0028, 0.0037]


def test_beta_is_steered_and_the_average_follows():
    cfg = config(steps=3, kl_coef=0.2, adaptive_kl_target=1e-3, kl_horizon=100, ema=0.5, seed=2)
    roles, state, _, _ = setup(cfg)
    first = {k: p.detach().clone() for k, p in state.params["policy"].items()}
    want = first
    betas = []
    for m, _ in ppo.train_ppo(cfg, roles, state, environment()):
        betas.append(m["beta"])
        want = {k: (want[k] + p.detach()) / 2 for k, p in state.params["policy"].items()}
    # KL 0, then above its target (by k1 of 16 answers, which could be below 0 by chance)
    assert betas[:2] == [0.2, 0.2 * (1 - 0.2 * 16 / 100)] and betas[2] > betas[1]
    for k, t_ in state.ema.shadow.items():
        torch.testing.assert_close(t_, want[k])


def test_passes_stop_when_the_policy_has_moved_enough():
    cfg = config(steps=1, lr=0.1, ppo_epochs=8, early_stop_kl=0.02)
    roles, state, _, _ = setup(cfg)
    m = train(cfg, roles, state)[0]
    assert 1 < m["minibatches"] < 16
    assert all(p.grad is None for ps in state.params.values() for p in ps.values())
    roles, state, _, _ = setup(cfg)
    assert train(dataclasses.replace(cfg, early_stop_kl=0.0), roles, state)[0]["minibatches"] == 16


def test_the_critic_can_warm_up_alone():
    cfg = config(steps=3, value_warmup=2)
    with pytest.raises(UserError, match="--value_warmup 3 leaves none of --steps 3 to the policy"):
        config(steps=3, value_warmup=3)
    roles, state, _, _ = setup(cfg)
    start = [{k: p.detach().clone() for k, p in state.params[who].items()} for who in ("policy", "value")]
    for m, _ in ppo.train_ppo(cfg, roles, state, environment()):
        still = all(torch.equal(p, start[0][k]) for k, p in state.params["policy"].items())
        assert still == (m["step"] <= 2)
        # every one learns
        assert all(not torch.equal(p, start[1][k]) for k, p in state.params["value"].items())


def test_beta_waits_for_the_policy():
    """While the critic warms up the KL is 0, which is no sign that beta is too large."""
    cfg = config(steps=4, value_warmup=2, adaptive_kl_target=6.0)
    roles, state, _, _ = setup(cfg)
    betas = [m["beta"] for m, _ in ppo.train_ppo(cfg, roles, state, environment())]
    assert betas[0] == betas[1] == betas[2] == 0.1 > betas[3]


def test_a_gradient_that_is_not_finite_goes_nowhere():
    w = {"good": nn.Parameter(torch.ones(3)), "bad.one": nn.Parameter(torch.ones(2))}
    state = ppo.PPOState(config(), w)
    for i in range(9):
        w["good"].grad, w["bad.one"].grad = torch.ones(3), torch.tensor([1.0, math.nan])
        assert math.isnan(state.apply("policy", 1.0)) and torch.equal(w["good"], torch.ones(3))
    w["bad.one"].grad = torch.tensor([math.inf, 0.0])
    with pytest.raises(UserError, match="bad.one"):
        state.apply("policy", 1.0)
    state.bad["policy"] = 9
    w["good"].grad, w["bad.one"].grad = torch.ones(3), torch.zeros(2)
    state.apply("policy", 1.0)
    assert state.bad["policy"] == 0 and not torch.equal(w["good"], torch.ones(3))
    w["good"].grad, w["bad.one"].grad = torch.full((3,), 1e30), torch.zeros(2)  # finite, but not their norm
    state.bad["policy"] = 9
    with pytest.raises(UserError, match="ten gradients .* were not finite, by their norm"):
        state.apply("policy", 1.0)
    state = ppo.PPOState(config(grad_clip=0.5), w)                          # a finite one is clipped
    w["good"].grad, w["bad.one"].grad = torch.tensor([3.0, 0.0, 4.0]), torch.zeros(2)
    assert state.apply("policy", 1.0) == 5.0
    moment = state.optim["policy"].state[w["good"]]["exp_avg"]
    torch.testing.assert_close(moment, 0.1 * torch.tensor([0.3, 0.0, 0.4]))
    roles, state, _, _ = setup(config())
    with pytest.raises(UserError, match="finite number for each of 16"):
        train(config(), roles, state, lambda p, y, rows: [math.nan] + [0.0] * 15)
    with pytest.raises(UserError, match="15"):
        train(config(), roles, state, lambda p, y, rows: [0.0] * 15)


@pytest.mark.parametrize("make", [lambda m: prompts.PromptTuning(m, 3, init="random"),
                                  lambda m: prompts.PrefixTuning(m, 3, init="gated")])
def test_a_soft_prompt_can_be_the_policy(make):
    """The reference is the same prompt, frozen: KL starts at exactly 0, only the prompt learns."""
    model, cfg = gpt(4), config(algo="rloo", max_new_tokens=6, steps=3)
    model.requires_grad_(False)
    policy = make(model).eval()
    start = copy.deepcopy(policy).requires_grad_(False)

    def entering(prompt):
        @contextlib.contextmanager
        def enter():
            yield model, prompt(model)
        return enter
    roles = ppo.Roles(entering(policy), entering(start))
    state = ppo.PPOState(cfg, dict(policy.named_parameters()))
    log = train(cfg, roles, state)
    assert log[0]["kl"] == 0 and log[0]["ratio_first"] < 1e-5 and log[2]["kl"] != 0
    assert all(p.grad is None for p in model.parameters())


def test_full_copies_work_as_roles():
    policy, head, cfg = gpt(5), ppo.ScalarHead(16, zero=True), config(steps=12)
    ref, critic = copy.deepcopy(policy), copy.deepcopy(policy)
    roles = ppo.Roles(role(policy), role(ref), role(critic), head)
    state = ppo.PPOState(cfg, dict(policy.named_parameters()), dict(critic.named_parameters()))
    log = train(cfg, roles, state, gold_reward=lambda p, y, rows: [float(len(a)) for a in y])
    assert log[0]["kl"] == 0 and log[-1]["score"] > log[0]["score"] + 0.1
    assert log[0]["gold"] == log[0]["length"]


def test_the_reward_gets_what_belongs_to_each_prompt():
    cfg = config(algo="grpo", steps=1)
    roles, state, *_ = setup(cfg)
    seen = []

    def reward(prompts, answers, rows):
        seen.extend(zip(prompts, rows))
        return [float(len(y)) for y in answers]

    rows = [{"answer": str(i)} for i in range(len(PROMPTS))]
    next(ppo.train_ppo(cfg, roles, state, ppo.Environment(PROMPTS, reward, END, [PAD], rows=rows)))
    assert len(seen) == cfg.batch and all(row is rows[PROMPTS.index(prompt)] for prompt, row in seen)
    with pytest.raises(UserError, match="4 prompts and 1 rows"):
        next(ppo.train_ppo(cfg, roles, state, ppo.Environment(PROMPTS, reward, END, [PAD], rows=rows[:1])))



def test_bf16_autocast_keeps_the_promises():
    """Autocast is part of a role. KL starts at exactly 0, ratios near 1, and what learns stays fp32."""
    cfg = config(steps=2)
    roles, state, _, _ = setup(cfg)

    def rounded(role):
        @contextlib.contextmanager
        def enter():
            with torch.autocast("cpu", torch.bfloat16), role() as entered:
                yield entered
        return enter
    roles = ppo.Roles(*map(rounded, roles[:3]), roles.value_head)
    log = train(cfg, roles, state)
    assert log[0]["kl"] == 0 and log[0]["ratio_first"] < 0.1 and math.isfinite(log[1]["kl"])
    assert all(p.dtype == torch.float32 for ps in state.params.values() for p in ps.values())


def test_prompts_and_answers_must_fit_the_context():
    cfg = config(max_new_tokens=21)
    roles, state, _, _ = setup(cfg)
    with pytest.raises(UserError, match="5 tokens .* --max_new_tokens 21 .* 24 tokens"):
        train(cfg, roles, state)
    train(config(max_new_tokens=19, steps=1), roles, state)


@pytest.mark.parametrize("changes, says", [
    (dict(algo="rloo", num_generations=1), "--num_generations"), (dict(temperature=0.0), "above 0"),
    (dict(temperature=1e-40), "above 0"), (dict(advantage_norm="group"), "one advantage for each answer"),
    (dict(kl_coef=0.0, adaptive_kl_target=2.0), "--kl_coef 0 stays 0"),
    (dict(dynamic_sampling=2), "means nothing"),
    (dict(kl_place="none", kl_coef=0.3), "--kl_coef means nothing to --kl_place none"),
    (dict(algo="gspo", kl_horizon=3), "--kl_horizon means nothing to --kl_place none"),
    (dict(kl_estimator="k2"), "--kl_estimator means nothing to --kl_place reward"),
    (dict(batch=6, algo="grpo"), "multiple"), (dict(batch=2, minibatches=4), "--minibatches")])
def test_impossible_settings_are_refused_in_a_sentence(changes, says):
    with pytest.raises(UserError, match=says):
        config(**changes)


@pytest.mark.parametrize("changes", [
    dict(temperature=1e-3), dict(batch=4, minibatches=4), dict(steps=3, value_warmup=2), dict(steps=0),
    dict(missing_eos_penalty=0.0), dict(algo="cispo", cliprange_high=1e-6), dict(algo="grpo", num_generations=2)])
def test_settings_at_the_edge_of_what_is_possible_are_taken(changes):
    cfg = config(**changes)
    assert all(getattr(cfg, name) == value for name, value in changes.items())


# -------------------------------------------------------------------------------------- records and arguments

def gated(cfg, logp, batch):
    """A soft gate instead of a clip (SAPO, 2511.20347): nothing is clipped."""
    ratio = ppo.log_ratio(logp, batch.logp, batch.mask).exp()
    loss = -4 * torch.sigmoid(ratio - 1) * batch.advantages.masked_fill(~batch.mask, 0)
    return loss, torch.zeros_like(loss)


def test_a_new_algorithm_is_one_record(monkeypatch):
    new = ppo.Algorithm("sapo", "a soft gate", ppo.advantage_group_mean, gated, compares_groups=True,
                        defaults={"num_generations": 4, "kl_place": "none", "advantage_norm": "group"},
                        unused=("gamma", "cliprange", "cliprange_high"))
    monkeypatch.setattr(ppo, "ALGORITHMS", (*ppo.ALGORITHMS, new))
    cfg = ppo.PPOConfig(algo="sapo", lr=1e-2, batch=16, steps=12, max_new_tokens=8, minibatches=1)
    roles, state, _, _ = setup(cfg)
    log = train(cfg, roles, state)
    assert log[0]["ratio_first"] < 1e-5 and log[0]["beta"] == 0
    assert log[0]["objective"] == log[0]["score_penalised"]                     # beta is 0
    assert log[-1]["objective"] > log[0]["objective"] + 0.1 and log[-1]["clipfrac"] == 0
    with pytest.raises(UserError, match="--cliprange means nothing to --algo sapo"):
        ppo.PPOConfig(algo="sapo", cliprange=0.3)


def test_a_ratio_of_the_whole_answer():
    """The geometric mean of the token ratios, in every column; its gradient reaches every token equally."""
    mask, (logp, old, adv, *_) = ragged(seed=3)
    leaf = logp.clone().requires_grad_()
    got = ppo.log_ratio(leaf, old.masked_fill(~mask, math.nan), mask, "sequence")
    for b, n in enumerate(mask.sum(1).tolist()):
        want = (logp - old)[b, :n].mean()
        torch.testing.assert_close(got[b], want.expand(7) * mask[b])
    loss = ppo.ppo_policy_loss(leaf, old, adv[:, :1].expand(6, 7), mask, 0.2, 0.3, "sequence")
    for b, n in enumerate(mask.sum(1).tolist()):
        ratio, a = (logp - old)[b, :n].mean().exp(), adv[b, 0]
        want = torch.maximum(-a * ratio, -a * ratio.clamp(0.8, 1.3))
        torch.testing.assert_close(loss[b, :n], want.expand(n))
    (ppo.token_weights(mask, "sequence") * ppo.ppo_policy_loss(
        leaf, old, adv[:, :1].expand(6, 7), mask, 9.0, 9.0, "sequence")).sum().backward()
    n = mask.sum(1, keepdim=True)
    ratio = ((logp - old).masked_fill(~mask, 0).sum(1, keepdim=True) / n).exp()
    torch.testing.assert_close(leaf.grad, -adv[:, :1] * ratio / n / 6 * mask)


def test_the_clip_range_may_be_higher_above():
    one = torch.ones(1, 1).bool()
    logp = torch.tensor([[math.log(1.25)]], dtype=F64)
    for high, want in ((None, -1.2), (0.28, -1.25), (0.1, -1.1)):
        assert abs(ppo.ppo_policy_loss(logp, t([0.0]), t([1.0]), one, 0.2, high).item() - want) < 1e-9


DEFAULTS = dict(
    max_new_tokens=40, temperature=1.0, num_generations=1, lr=2e-3, batch=64, steps=60, seed=1, grad_clip=1.0,
    algo="ppo", kl_coef=0.1, adaptive_kl_target=6.0, kl_horizon=1000, missing_eos_penalty=1.0, gamma=1.0,
    advantage_norm="batch", kl_place="reward", kl_estimator="k3", overlong="none", dynamic_sampling=0,
    ratio_level="token", token_mean="token",
    lam=0.95, ppo_epochs=2, minibatches=4, cliprange=0.2, cliprange_high=0.0, cliprange_value=0.2,
    early_stop_kl=0.0,
    value_lr=0.0, value_warmup=0, ptx_coef=0.0, ema=0.0)


def test_the_defaults_and_where_the_ranges_begin():
    values = dataclasses.asdict(ppo.PPOConfig())
    assert values.pop("micro_batch_tokens") == ppo.MICRO // 2
    assert values == DEFAULTS
    assert dataclasses.asdict(ppo.PreferenceConfig()) == dict(
        preference_loss="dpo", beta=0.1, label_smoothing=0.0, simpo_gamma=1.0, orpo_lambda=0.1,
        desirable_weight=1.0, undesirable_weight=1.0)
    ones = ("max_new_tokens", "micro_batch_tokens", "batch", "kl_horizon", "ppo_epochs", "minibatches")
    words = {name for name, value in DEFAULTS.items() if isinstance(value, str)}
    for name in set(DEFAULTS) - words - {"missing_eos_penalty", "temperature"} | set(ones):
        low = 1 if name in ones else 0
        rest = {"minibatches": 1} if name == "batch" else {}
        ppo.PPOConfig(**{**rest, name: low})
        with pytest.raises(UserError, match=f"--{name} {low - 1} is out of range"):
            ppo.PPOConfig(**{**rest, name: low - 1})


def test_default_clip_ranges():
    one = torch.ones(1, 1).bool()
    assert abs(ppo.ppo_policy_loss(t([1.0]), t([0.0]), t([1.0]), one).item() + 1.2) < 1e-12
    assert abs(ppo.ppo_value_loss(t([1.0]), t([0.0]), t([2.0]), one).item() - 1.8 ** 2 / 2) < 1e-12
    scores = torch.tensor([[1.0, 0.0, math.nan]], dtype=F64, requires_grad=True)
    loss, _ = ppo.rank_loss(scores, torch.tensor([[0, 1, 2]]), torch.tensor([[True, True, False]]))
    loss.sum().backward()
    assert scores.grad.isfinite().all() and scores.grad[0, 2] == 0          # what is masked has no gradient


@pytest.mark.parametrize("call, says", [
    (lambda: ppo.PPOConfig(algo="foo"), "--algo foo is none of ppo rloo reinforce grpo drgrpo dapo gspo cispo"),
    (lambda: ppo.PreferenceConfig(preference_loss="foo"), "--preference_loss foo is none of dpo ipo simpo orpo kto"),
    (lambda: ppo.PPOConfig(micro=3), "PPOConfig has no field micro; it has max_new_tokens"),
    (lambda: ppo.PPOConfig(lam=1.5), "--lam 1.5 is out of range"),
    (lambda: ppo.PPOConfig(missing_eos_penalty=math.nan), "--missing_eos_penalty nan is neither"),
    (lambda: ppo.PPOConfig(missing_eos_penalty=-1.0), "--missing_eos_penalty -1.0 is neither"),
    (lambda: ppo.PPOConfig(ratio_level="word"), "--ratio_level word is none of token sequence"),
    (lambda: ppo.PPOConfig(kl_place="x"), "--kl_place x is none of reward loss none"),
    (lambda: ppo.PPOConfig(token_mean="row"), "--token_mean row is none of token sequence constant"),
    (lambda: ppo.PPOConfig(overlong="cut"), "--overlong cut is none of none mask penalty"),
    (lambda: ppo.PPOConfig(advantage_norm="std"), "--advantage_norm std is none of none group batch"),
    (lambda: ppo.normalise_advantages(t([0.0]), t([1.0]).bool(), "std"), "'std' is none of none group batch"),
    (lambda: ppo.SamplingConfig(num_generations=0), "--num_generations 0 is out of range"),
    (lambda: ppo.token_weights(MASK, "row"), "mean 'row' is none of token sequence constant"),
    (lambda: ppo.kl_estimate(t([0.0]), t([0.0]), "k4"), "'k4' is none of k1 k2 k3"),
    (lambda: ppo.log_ratio(t([0.0]), t([0.0]), t([1.0]).bool(), "word"), "none of token sequence")])
def test_an_unknown_name_or_value_is_refused(call, says):
    with pytest.raises(UserError, match=says):
        call()


def test_the_loop_refuses_an_unknown_name():
    cfg = config()
    roles, state, batch, _ = rolled(cfg)
    object.__setattr__(cfg, "algo", "foo")
    for go in (lambda: ppo.update(cfg, roles, state, batch), lambda: train(cfg, roles, state),
               lambda: ppo.compute_advantages(cfg, batch, torch.zeros(16), 0.1)):
        with pytest.raises(UserError, match="--algo foo is none of"):
            go()
    wrong = ppo.PreferenceConfig()
    object.__setattr__(wrong, "preference_loss", "foo")
    with pytest.raises(UserError, match="--preference_loss foo is none of"):
        ppo.dpo_step(role(gpt()), [([1], [[2], [3]], [0, 1], (0.0, 0.0))], wrong)


class Given:
    """What the parser of flags hands to a check: values as attributes, and the names that were given."""

    def __init__(self, group, given, **values):
        self.__dict__.update({f.name: f.default for f in dataclasses.fields(group)})
        if "algo" in values:
            self.__dict__.update(ppo.find_record(ppo.ALGORITHMS, values["algo"]).defaults)
        self.__dict__.update(values, given=frozenset(given))


def test_a_flag_that_is_not_read_is_refused():
    """In the library when it differs from its default, in a command whenever it was given."""
    for algo, name in [("rloo", "lam"), ("rloo", "gamma"), ("grpo", "value_lr"), ("drgrpo", "value_warmup"),
                       ("reinforce", "cliprange_value"), ("reinforce", "lam")]:
        with pytest.raises(UserError, match=f"--{name} means nothing to --algo {algo}"):
            ppo.PPOConfig(algo=algo, **{name: 1 if name == "value_warmup" else 0.5})
        with pytest.raises(UserError, match=f"--{name} means nothing to --algo {algo}"):
            ppo.PPOConfig.check(Given(ppo.PPOConfig, [name], algo=algo))
        ppo.PPOConfig.check(Given(ppo.PPOConfig, [], algo=algo, **{name: 0.5}))
        assert ppo.PPOConfig.from_flags(Given(ppo.PPOConfig, [], algo=algo, **{name: 0.5})).algo == algo
    assert ppo.PPOConfig(algo="reinforce", gamma=0.5).gamma == 0.5
    with pytest.raises(UserError, match="--label_smoothing means nothing to --preference_loss ipo"):
        ppo.PreferenceConfig(preference_loss="ipo", label_smoothing=0.1)
    with pytest.raises(UserError, match="teaches nothing"):
        ppo.PreferenceConfig(label_smoothing=0.5)
    cfg = ppo.PPOConfig.from_flags(Given(ppo.PPOConfig, ["steps"], algo="rloo", steps=7, gold="x"))
    assert (cfg.steps, cfg.num_generations, cfg.lam) == (7, 4, 0.95)
    assert dataclasses.replace(cfg, steps=9) == ppo.PPOConfig(algo="rloo", steps=9)


def hinge(cfg, pair):
    """A hinge on mean log-probabilities, without a reference (SLiC-HF, 2305.10425)."""
    margin = cfg.beta * (pair.chosen / pair.chosen_length - pair.rejected / pair.rejected_length)
    assert pair.ref_chosen is None and pair.ref_rejected is None
    return (1 - margin).relu(), margin


def test_a_new_preference_loss_is_one_record(monkeypatch):
    record = ppo.PreferenceLoss("hinge", "no reference", hinge, needs_reference=False, defaults={"beta": 2.0})
    monkeypatch.setattr(ppo, "PREFERENCE_LOSSES", (*ppo.PREFERENCE_LOSSES, record))
    cfg, model = ppo.PreferenceConfig(preference_loss="hinge"), gpt(6)
    examples = [([1, 2], [[3, END], [4, 5, END]], [0, 1]), ([6], [[8, END], [7, 7, 7, END]], [2, 1])]
    assert cfg.beta == 2.0
    optim, losses = torch.optim.Adam(model.parameters(), 1e-2), []
    for _ in range(20):
        loss, n, seen = ppo.preference_step(role(model), examples, cfg)
        optim.zero_grad()
        loss.backward()
        optim.step()
        losses.append(loss.item())
    a, b, c, d = ppo.answer_logprobs(role(model), examples)
    margin = 2.0 * (torch.stack((a, d)) / torch.tensor([2, 4]) - torch.stack((b, c)) / torch.tensor([3, 2]))
    loss, n, seen = ppo.preference_step(role(model), examples, cfg)
    assert abs(loss.item() - (1 - margin).relu().sum().item()) < 1e-5 and n == 2
    assert losses[-1] < losses[0] / 2 and seen["accuracy"].tolist() == [1, 1]
    with pytest.raises(UserError, match="--preference_loss dpo needs a reference"):
        ppo.dpo_step(role(model), examples, ppo.PreferenceConfig())


def test_pairs_follow_the_ranks_and_not_the_order():
    """All pairs of unequal ranks, each once, averaged per prompt, wherever an answer stands in its list."""
    model, reference, answers = gpt(6), gpt(7), [[3, END], [4, 5, END], [6, 7, 8, END]]
    want, pairs = 0, 0
    p = ppo.answer_logprobs(role(model), [([1, 2], answers)])
    r = ppo.answer_logprobs(role(reference), [([1, 2], answers)]).tolist()
    for ranks in ([2, 1, 3], [3, 3, 1], [0.5, -1, 0]):
        losses = [ppo.dpo_loss(p[i], p[j], r[i], r[j])[0] for i in range(3) for j in range(3)
                  if ranks[i] < ranks[j]]
        assert len(losses) == (2 if ranks == [3, 3, 1] else 3)
        want += sum(losses) / len(losses)
        for order in ([0, 1, 2], [2, 0, 1]):
            example = ([1, 2], [answers[i] for i in order], [ranks[i] for i in order], [r[i] for i in order])
            loss, n, seen = ppo.dpo_step(role(model), [example], ppo.PreferenceConfig())
            torch.testing.assert_close(loss, sum(losses) / len(losses), atol=1e-5, rtol=1e-5)
        pairs += 1
    examples = [([1, 2], answers, ranks, r) for ranks in ([2, 1, 3], [3, 3, 1], [0.5, -1, 0])]
    loss, n, seen = ppo.dpo_step(role(model), examples, ppo.PreferenceConfig())
    torch.testing.assert_close(loss, want, atol=1e-5, rtol=1e-5)
    assert n == pairs and seen["chosen_logp"][1].item() == p[2].item()
    torch.testing.assert_close(seen["rejected_logp"][0], (p[0] + 2 * p[2]) / 3)
    with pytest.raises(UserError, match="example 1 ranks all its answers 2"):
        ppo.dpo_step(role(model), [examples[0], ([1], answers, [2, 2, 2], r)], ppo.PreferenceConfig())
    with pytest.raises(UserError, match="example 0 has 3 answers and 2 ranks"):
        ppo.reward_step(role(model), ppo.ScalarHead(16), [([1], answers, [1, 2])])


@pytest.mark.parametrize("prompts_, says", [
    ("text", "prompts must be a list"), ([], "prompts must be a list"), (["text"], "prompt 0 is 'text'"),
    ([[1], []], "prompt 1 is \\[\\]"), ([[1], [2.5]], "prompt 1 is"), ([[1], None], "prompt 1 is None"),
    ([[1], [12]], "outside 0 .. 11"), ([[-1]], "outside 0 .. 11")])
def test_wrong_prompts_are_refused_in_a_sentence(prompts_, says):
    cfg = config(steps=1)
    roles, state, _, _ = setup(cfg)
    with pytest.raises(UserError, match=says):
        next(ppo.train_ppo(cfg, roles, state, environment()._replace(prompts=prompts_)))
    ppo.check_training(cfg, roles, state, environment()._replace(prompts=[[0], [11]]))    # both ends of the range
    if says.startswith("prompt") and isinstance(prompts_, list) and prompts_:
        with pytest.raises(UserError, match=says):
            ppo.collate_rollout(prompts_, [[1]] * len(prompts_))


def test_roles_and_parameters_that_do_not_fit_are_refused():
    cfg, rloo = config(steps=1), config(steps=1, algo="rloo")
    roles, state, model, _ = setup(cfg)
    policy = state.params["policy"]
    bare, bare_state, _, _ = setup(rloo)
    for says, settings, some_roles, some_state in [
            ("the role policy is a GPT", cfg, roles._replace(policy=model), state),
            ("the role reference is a NoneType", cfg, roles._replace(reference=None), state),
            ("needs roles.critic", cfg, roles._replace(critic=None), state),
            ("needs roles.value_head", cfg, roles._replace(value_head=None), state),
            ("needs value parameters", cfg, roles, ppo.PPOState(cfg, policy)),
            ("rloo has no critic and takes no roles.critic", rloo, roles, bare_state),
            ("takes no value parameters", rloo, bare, state)]:
        with pytest.raises(UserError, match=says):
            train(settings, some_roles, some_state)
    with pytest.raises(UserError, match="reward is a NoneType"):
        train(cfg, roles, state, None)
    with pytest.raises(UserError, match="it got none"):
        ppo.PPOState(cfg, {})
    with pytest.raises(UserError, match="parameter w of the policy does not require"):
        ppo.PPOState(cfg, {"w": torch.ones(2)})
    with pytest.raises(UserError, match="no list of numbers"):
        train(cfg, roles, state, lambda p, y, rows: ["good"] * 16)


@pytest.mark.parametrize("changes", [dict(), dict(value_warmup=1, steps=2), dict(early_stop_kl=1e-12)])
def test_a_parameter_without_a_gradient_is_named(changes):
    cfg = config(**{"steps": 1, **changes})
    roles, state, _, _ = setup(cfg)
    train(cfg, roles, state)                                    # all have one
    for part in ("policy", "value"):
        roles, state, _, _ = setup(cfg)
        params = {**state.params, part: {**state.params[part], "forgotten": nn.Parameter(torch.ones(2))}}
        with pytest.raises(UserError, match=f"parameter forgotten of the {part} got no gradient"):
            train(cfg, roles, ppo.PPOState(cfg, params["policy"], params["value"]))


# ----------------------------------------------------------------------------- reward model, calibration, DPO

def test_reward_head_starts_with_unit_scores():
    torch.manual_seed(0)
    head = ppo.ScalarHead(4096)
    torch.manual_seed(0)
    assert torch.allclose(head.weight, torch.randn(4096) / math.sqrt(4097), rtol=1e-5) and head.bias == 0
    assert abs(head(torch.randn(2000, 4096)).std() - 1) < 0.1


def test_calibration():
    head, hidden = ppo.ScalarHead(8), torch.randn(50, 8) * 3 + 1
    for scale in (False, True, True):                                          # the third finds nothing to do
        before = head(hidden).detach()
        ppo.calibrate(head, before, scale)
        s = head(hidden).detach()
        assert abs(s.mean()) < 1e-5 and (abs(s.std(unbiased=False) - 1) < 1e-5) == scale
        assert torch.equal(s.argsort(), before.argsort())
    torch.testing.assert_close(s, before, atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="same score"):
        ppo.calibrate(head, torch.ones(5))


RANKED = [([1, 2], [[3, END], [4, 5, END], [6, END]], [0, 1, 2]), ([3], [[3, 3, END], [7, END]], [1, 0]),
          ([4, 4, 4], [[5, END], [6, 6, END]], [2, 2])]


def test_one_forward_scores_all_answers_and_pads_do_not_count():
    model, head = Clock(torch.zeros(1, 1)), lambda h: h[..., 0] / 7
    loss, prompts_, (s, rank, mask, n) = ppo.reward_step(role(model), head, RANKED)
    assert model.calls == 1 and prompts_ == 2                                      # the third prompt is a tie
    assert (s * 7).round().tolist() == [[3, 4, 3], [3, 2, 0], [4, 5, 0]]
    assert n.tolist() == [[2, 3, 2], [3, 2, 0], [2, 3, 0]]
    want = [ppo.rank_loss(s[b:b + 1], rank[b:b + 1], mask[b:b + 1])[0].item() for b in range(3)]
    assert abs(loss.item() - sum(want)) < 1e-12 and want[2] == 0
    report = reward_report([(s, rank, mask, n)])
    # pairs: 3 < 4 wrong, 3 = 3 half (margin 2), 4 > 3 right; and 2 < 3 wrong, for the second prompt
    assert report["pairs"] == 4 and report["accuracy"] == (0 + 0.5 + 1 + 0) / 4
    assert report["accuracy_margin_1"] == 1 / 3 and report["accuracy_margin_2"] == 0.5
    assert -1 <= report["score_length_corr"] <= 1


@pytest.mark.parametrize("dialect", ["gpt2", "llama"])
def test_a_reward_model_learns_and_does_not_see_slots(dialect):
    """The hidden rule: each 3 is good, each 4 bad. Rankings of 4; tested on new pairs, in both orders."""
    g = torch.Generator().manual_seed(0)

    def example(K):
        answers = [torch.randint(1, 8, (int(n),), generator=g).tolist() + [END]
                   for n in torch.randint(2, 6, (K,), generator=g)]
        return [1, 2], answers, [y.count(4) - y.count(3) for y in answers]
    model, head = gpt(0, dialect), ppo.ScalarHead(16)
    lora.inject(model, ("q", "v", "o", "up"), rank=4)
    params = [p for p in model.parameters() if p.requires_grad] + list(head.parameters())
    optim = torch.optim.Adam(params, 1e-2)
    for _ in range(60):
        loss, n, _ = ppo.reward_step(role(model), head, [example(4) for _ in range(8)])
        optim.zero_grad()
        (loss / n).backward()
        optim.step()
    with torch.no_grad():
        test = [example(2) for _ in range(200)]
        swapped = [(p, y[::-1], r[::-1]) for p, y, r in test]
        a, b = (ppo.reward_step(role(model), head, x)[2] for x in (test, swapped))
    torch.testing.assert_close(a[0], b[0].flip(1), atol=1e-5, rtol=1e-5)
    assert reward_report([a])["accuracy"] > 0.9


def test_dpo_step():
    """Starts at log 2, is the equation on summed log-probabilities, learns the pairs."""
    model, cfg = gpt(6), ppo.PreferenceConfig(beta=0.5)
    ref = copy.deepcopy(model)
    examples = [([1, 2], ([3, END], [4, 5, END]), (0, 1)), ([6], ([7, 7, 7, END], [8, END]), (0, 1))]
    with torch.no_grad():
        before = ppo.answer_logprobs(role(ref), examples).view(2, 2).tolist()
    examples = [(*e, pair) for e, pair in zip(examples, before)]
    loss, n, seen = ppo.dpo_step(role(model), examples, cfg)
    assert n == 2 and abs(loss.item() / n - math.log(2)) < 1e-5
    assert seen["margin"].tolist() == [0, 0] and seen["accuracy"].tolist() == [0.5, 0.5]    # a tie counts half
    optim = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(20):
        loss, n, seen = ppo.dpo_step(role(model), examples, cfg)
        optim.zero_grad()
        loss.backward()
        optim.step()
    assert loss.item() / n < 0.2 and seen["accuracy"].tolist() == [1, 1]
    by_hand = 0
    for p, (c, r), *_ in examples:
        def total(m, y):
            return m(torch.tensor([p + y]))[0].log_softmax(-1)[0, range(len(p) - 1, len(p + y) - 1), y].sum()
        h = total(model, c) - total(ref, c) - total(model, r) + total(ref, r)
        by_hand -= F.logsigmoid(0.5 * h)
    loss, _, _ = ppo.dpo_step(role(model), examples, cfg)
    torch.testing.assert_close(loss, by_hand, atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------------------- in words, and on paper

WELL = dict(step=20, kl=3.0, kl_stderr=0.1, score=0.5, score_std=1.0, eos_rate=0.97, length=20.0, unique=1.0,
            score_length_corr=0.1, approx_kl=0.01, clipfrac=0.1, clipfrac_value=0.1, explained_variance=0.5,
            repeat4=0.01, ratio_first=1e-6, skipped=0, frac_reward_zero_std=0.1, ptx_ratio=0.5)


@pytest.mark.parametrize("sick, word", [
    (dict(ratio_first=0.1), "dropout"), (dict(step=1, kl=0.1), "begin"), (dict(kl=-1.0), "negative"),
    (dict(kl=60.0), "60 nats"), (dict(score_std=0.0), "nothing to learn"),
    (dict(frac_reward_zero_std=0.9), "90%"),
    (dict(eos_rate=0.2), "--max_new_tokens"), (dict(length=1.2), "1.2 tokens"),
    (dict(score_length_corr=-0.8), "length"), (dict(approx_kl=0.3), "--lr"), (dict(clipfrac=0.7), "clipped"),
    (dict(unique=0.01), "collapses"), (dict(clipfrac_value=0.7), "--cliprange_value"),
    (dict(explained_variance=-0.2), "critic"), (dict(repeat4=0.8), "4-grams"),
    (dict(ptx_ratio=30.0), "--ptx_coef"), (dict(skipped=2), "2 steps")])
def test_health_in_words(sick, word):
    assert health(WELL) == []
    warnings = health({**WELL, **sick})
    assert len(warnings) == 1 and word in warnings[0]


def test_health_of_a_run_and_metrics_of_a_rollout():
    cfg = config(steps=1, batch=16)
    roles, state, _, _ = setup(cfg)
    m, batch = next(ppo.train_ppo(cfg, roles, state, environment()))
    assert not [line for line in health(m) if "ratio" in line or "KL" in line]
    answers = [row[s:n].tolist() for row, s, n in zip(batch.tokens, batch.start, batch.lengths)]
    lengths = torch.tensor([float(len(y)) for y in answers])
    own = torch.tensor(toy_reward(None, answers))
    ended = torch.tensor([y[-1] == END for y in answers])
    lowest = torch.minimum(own, own[ended].min())
    s = own.where(ended, lowest - own.std(unbiased=False))
    assert abs(m["score"] - own.mean()) < 1e-6 and abs(m["score_penalised"] - s.mean()) < 1e-6
    assert abs(m["length"] - lengths.mean()) < 1e-6
    assert abs(m["score_length_corr"] - torch.corrcoef(torch.stack((own, lengths)))[0, 1]) < 1e-5
    assert abs(m["entropy_answer"] + batch.logp.sum(1).mean()) < 1e-5
    assert m["unique"] == len(set(map(tuple, answers))) / 16
    assert m["objective"] == m["score_penalised"] and m["entropy"] > 0 and m["seconds_rollout"] > 0
    one = describe(batch, [[1, 2, 1, 2, 1, 2, 1, 2]] * 16, s, torch.ones(16))
    assert abs(one["repeat4"] - (1 - 2 / 5)) < 1e-9                              # five 4-grams, two different


def test_show_prints_the_row_of_the_header():
    batch = ppo.collate_rollout([[20, 21, 22], [23] * 5], [[5, 6, 7, END], [8, 9, END]], pad=0)
    mask = batch.mask
    batch = batch._replace(logp=torch.full(mask.shape, -1.0), ref_logp=torch.full(mask.shape, -1.5))
    rewards = ppo.token_rewards(torch.tensor([2.0, 0.0]), batch.logp, batch.ref_logp, mask, 0.1)
    batch = batch._replace(rewards=rewards)
    lines = show(batch, 0).splitlines()
    assert lines[0].split() == ["position", "token", "action", "mask", "logp", "ref_logp", "rewards"]
    assert lines[3].split() == ["2", "22"]
    assert lines[4].split() == ["3", "5", "0", "1", "-1.0000", "-1.5000", "-0.0500"]
    assert lines[7].split() == ["6", str(END), "3", "1", "-1.0000", "-1.5000", "1.9500"]
    assert lines[8].split() == ["7", "(pad)"] and len(lines) == 9


def test_dr_grpo_divides_by_the_limit_and_not_by_the_longest_answer():
    cfg = config(algo="drgrpo", lr=0.0, ppo_epochs=1, minibatches=1)
    norms = []
    for limit in (8, 16):
        roles, state, batch, _ = rolled(cfg)
        stats = ppo.update(dataclasses.replace(cfg, max_new_tokens=limit), roles, state, batch)
        norms.append(stats["grad_norm_policy"])
    assert norms[0] > 0 and norms[1] == pytest.approx(norms[0] / 2, rel=1e-4)


def test_the_betas_of_adam_are_those_of_the_header():
    _, state, _, _ = setup(config())
    assert {optim.param_groups[0]["betas"] for optim in state.optim.values()} == {(0.9, 0.95)}


def test_beta_follows_the_mean_of_k1():
    def first(**changes):
        cfg = config(steps=1, lr=0.0, **changes)
        roles, state, _, _ = setup(cfg)
        for p in state.params["policy"].values():
            p.data += 0.05                                  # no longer the reference
        return train(cfg, roles, state)[0], state.kl.beta
    m, _ = first()
    assert m["kl"] > 0 and abs(m["kl_k3"] / m["kl"] - 1) > 0.02
    assert first(adaptive_kl_target=m["kl"] / 1.05, kl_horizon=16)[1] == pytest.approx(0.1 * 1.05, rel=1e-5)


def test_the_kl_in_the_loss_is_that_of_the_flag():
    losses = {}
    for kind in ("k2", "k3"):
        cfg = config(algo="grpo", lr=0.0, ppo_epochs=1, minibatches=1, kl_estimator=kind)
        roles, state, batch, _ = rolled(cfg)
        batch = batch._replace(ref_logp=batch.ref_logp - 1.0 * batch.mask)          # far away, where they differ
        losses[kind] = ppo.update(cfg, roles, state, batch, banned=[PAD])["policy_loss"]
    weight = ppo.token_weights(batch.mask, "sequence")
    kl = {kind: ppo.kl_estimate(batch.logp, batch.ref_logp, kind).masked_fill(~batch.mask, 0) for kind in losses}
    more = (weight * (kl["k3"] - kl["k2"])).sum().item()
    assert abs(more) > 0.1 and losses["k3"] - losses["k2"] == pytest.approx(0.1 * more, abs=1e-6)


def test_approx_kl_is_k3_of_the_rollouts_policy_against_the_new_one():
    cfg = config(algo="rloo", lr=0.0, ppo_epochs=1, minibatches=1)
    roles, state, batch, _ = rolled(cfg)
    stats = ppo.update(cfg, roles, state, batch._replace(logp=batch.logp - 0.5 * batch.mask), banned=[PAD])
    assert stats["approx_kl"] == pytest.approx(math.exp(0.5) - 1 - 0.5, abs=1e-4)


def test_every_pass_has_an_order_of_its_own():
    rows = ppo.make_minibatches(config(ppo_epochs=3, minibatches=2), 64, torch.Generator().manual_seed(0))
    passes = [tuple(torch.cat(rows[i:i + 2]).tolist()) for i in (0, 2, 4)]
    assert all(sorted(one) == list(range(64)) for one in passes) and len(set(passes)) == 3


def test_the_minibatch_that_ends_the_passes_moves_nothing():
    cfg = config(lr=0.1, early_stop_kl=0.01)
    roles, state, batch, _ = rolled(cfg)
    before = weights(state)
    stats = ppo.update(cfg, roles, state, batch._replace(logp=batch.logp - 0.5 * batch.mask))
    assert stats["minibatches"] == 1 and torch.equal(weights(state), before)
