"""Every equation of ppo.py against hand numbers and naive loops; every index and mask against injected bugs."""
import math

import pytest
import torch
import torch.nn.functional as F

import ppo
from data.health import explained_variance, health, reward_report, show

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


# ------------------------------------------------------------------------------------------------ hand numbers

def test_gae_fixtures():
    rewards, values = t([-0.1, 0.2, 1.0], [-0.1, 1.2, 0.0]), t([0.5, 0.4, 0.3], [0.5, 0.4, 9.0])
    adv, ret = ppo.gae(rewards, values, MASK)
    torch.testing.assert_close(adv, t([0.52675, 0.765, 0.7], [0.56, 0.8, 0.0]))
    torch.testing.assert_close(ret, t([1.02675, 1.165, 1.0], [1.06, 1.2, 0.0]))


def test_whiten_fixture():
    adv = t([0.52675, 0.765, 0.7], [0.56, 0.8, 77.0])
    assert abs(ppo.masked_mean(adv, MASK) - 0.67035) < 1e-8 and abs(ppo.masked_var(adv, MASK) - 0.01188899) < 1e-8
    want = t([-1.31699, 0.86806, 0.27193], [-1.01204, 1.18905, 0.0])
    torch.testing.assert_close(ppo.whiten(adv, MASK), want, atol=1e-5, rtol=0)


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
    loss, _ = ppo.rank_loss(torch.stack((a, b), 1), torch.tensor([[1, 0]]))             # the second answer won
    torch.testing.assert_close(loss, ppo.pairwise_loss(b, a))


def test_kl_controller_fixtures():
    for kl, want in ((9.0, 0.201024), (5.4, 0.199488), (6.6, 0.2 * (1 + 0.1 * 256 / 1e4))):
        c = ppo.KLController(0.2, target=6.0, horizon=10_000)
        c.update(kl, 256)
        assert abs(c.beta - want) < 1e-9
    fixed = ppo.KLController(0.2)
    fixed.update(100.0, 256)
    assert fixed.beta == 0.2
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
    assert not ppo.token_rewards(torch.ones(3, dtype=F64), logp, ref, mask, 0.5).requires_grad


def test_kl_estimators():
    p = torch.tensor([0.5, 0.3, 0.2], dtype=F64)
    q = torch.tensor([0.2, 0.2, 0.6], dtype=F64)
    kl = (p * (p / q).log()).sum()
    for kind in ("k1", "k3"):                                       # unbiased: the mean under p is the KL, exactly
        torch.testing.assert_close((p * ppo.kl_estimate(p.log(), q.log(), kind)).sum(), kl)
    assert (ppo.kl_estimate(p.log(), q.log(), "k3") >= 0).all() and (ppo.kl_estimate(p.log(), q.log(), "k2") >= 0).all()
    assert ppo.kl_estimate(t([-1.0]), t([-3.0])).item() == 2.0                      # more likely than ref: positive


def test_group_advantages():
    got = ppo.rloo_advantage(t([1, 2, 6], [0, 0, 0]))
    torch.testing.assert_close(got, t([1 - 4, 2 - 3.5, 6 - 1.5], [0, 0, 0]))
    got = ppo.grpo_advantage(t([1, 2, 6], [4, 4, 4]))
    torch.testing.assert_close(got[0], (t([1, 2, 6])[0] - 3) / (t([1, 2, 6])[0].std() + 1e-4))
    assert got[1].abs().max() == 0
    torch.testing.assert_close(ppo.grpo_advantage(t([1, 2, 6]), std=False), t([-2, -1, 3]))


def test_dpo_losses():
    c, r, rc, rr = (torch.tensor([x], dtype=F64) for x in (-3.0, -5.0, -4.0, -4.5))        # h = 1 - (-0.5) = 1.5
    loss, margin = ppo.dpo_loss(c, r, rc, rr, beta=0.2)
    assert abs(loss.item() + math.log(1 / (1 + math.exp(-0.3)))) < 1e-12 and abs(margin.item() - 0.3) < 1e-12
    smooth, _ = ppo.dpo_loss(c, r, rc, rr, beta=0.2, label_smoothing=0.25)
    flipped, _ = ppo.dpo_loss(r, c, rr, rc, beta=0.2)
    torch.testing.assert_close(smooth, 0.75 * loss + 0.25 * flipped)
    ipo, _ = ppo.dpo_loss(c, r, rc, rr, beta=0.2, kind="ipo")
    assert abs(ipo.item() - (1.5 - 2.5) ** 2) < 1e-12
    start, _ = ppo.dpo_loss(c, r, c, r)
    assert abs(start.item() - math.log(2)) < 1e-12                                 # policy == reference


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


# ----------------------------------------------------------------------------------------- naive loops, fp64 1e-10

def naive_losses(mask, logp, old_logp, ref_logp, values, old_values, scores, beta, gamma=0.97, lam=0.9, e=0.2):
    """PPO in Python scalars, one row and one token at a time, from the definitions (GAE as its double sum)."""
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
    std = math.sqrt(sum((a - mean) ** 2 for a in flat) / len(flat) + 1e-8)
    policy, value, count = 0.0, 0.0, sum(rows)
    for b, n in enumerate(rows):
        for i in range(n):
            a = (advs[b][i] - mean) / std
            ratio = (logp[b, i] - old_logp[b, i]).exp()
            policy = policy + torch.maximum(-a * ratio, -a * ratio.clamp(1 - e, 1 + e)) / count
            near = old_values[b, i] + (values[b, i] - old_values[b, i]).clamp(-e, e)
            value = value + 0.5 * torch.maximum((values[b, i] - rets[b][i]) ** 2, (near - rets[b][i]) ** 2) / count
    return policy, value


def vector_losses(mask, logp, old_logp, ref_logp, values, old_values, scores, beta, gamma=0.97, lam=0.9, e=0.2):
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
        terms = [math.log(1 + math.exp((scores[b, j] - scores[b, i]).item())) for i in range(4) for j in range(4)
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
    """NaN, random numbers or zeros in the pads: equal bit for bit. Three more columns of NaN: equal to 1e-14, since a
    sum over another width may add in another order."""
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
        results.append([*losses, ppo.masked_var(a[0], m), explained_variance(a[4], ret, m), *(x[:, :7] for x in tensors)])
    for other in results[1:-1]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))
    for a, b in zip(results[0], results[-1]):
        torch.testing.assert_close(a, b, atol=1e-14, rtol=1e-14)
