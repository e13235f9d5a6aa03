"""RL algorithms: a run does not depend on the zero or the scale of its reward, an answer without end is never
the best, groups without variance are replaced; each published loss against a naive loop and against TRL."""
import contextlib
import dataclasses
import functools
import math
import pathlib
import re

import numpy as np
import pytest
import torch

import ppo
import train as command
from data.results.ppo_metrics import equal_groups, health
from data.runtime.files import UserError
from test_ppo import END, F64, NAMES, PAD, PROMPTS, config, environment, leaves, ragged, rolled, setup, t, \
    timeless, toy_reward, train, weights

TRL = pathlib.Path(__file__).parent / "fixtures" / "rl" / "trl.npz"
GROUPED = [algorithm.name for algorithm in ppo.ALGORITHMS if algorithm.compares_groups]
# beta stands beside the score, or beside advantages that have no scale
SCALES_BETA = [a.name for a in ppo.ALGORITHMS if a.defaults.get("kl_place", "reward") == "reward"]


# ---------------------------------------------------------------------------- the zero and the scale of a reward

def eighths(prompts, answers, rows=None):
    """A reward whose sums are exact in fp32, with and without a shift of 10."""
    return [0.25 * sum(a in (1, 2, 3) for a in y) - 0.125 * len(y) for y in answers]


def with_zero_critic(cfg):
    """Roles and state whose critic begins at a value of 0, as without a reward model."""
    roles, state, _, _ = setup(cfg)
    if not ppo.find_record(ppo.ALGORITHMS, cfg.algo).needs_critic:
        return roles, state
    roles = roles._replace(value_head=ppo.ScalarHead(16, zero=True))
    critic = {name: p for name, p in state.params["value"].items() if not name.startswith("head.")}
    critic.update({f"head.{name}": p for name, p in roles.value_head.named_parameters()})
    return roles, ppo.PPOState(cfg, state.params["policy"], critic)


@functools.lru_cache
def curve(algo, shift=0.0, scale=1.0, kl_place=None):
    changes = {"kl_place": kl_place} if kl_place else {}
    if algo in SCALES_BETA or kl_place:
        changes["kl_coef"] = 0.1 * scale
    cfg = config(algo=algo, steps=3, seed=3, **changes)
    roles, state = with_zero_critic(cfg)
    start = weights(state)
    log = train(cfg, roles, state, lambda p, y, rows: [scale * s + shift for s in eighths(p, y)])
    assert (weights(state) - start).abs().max() > 1e-2                          # something was learnt
    return log, weights(state), state


@pytest.mark.parametrize("algo", NAMES)
@pytest.mark.parametrize("shift, scale", [(10.0, 1.0), (0.0, 8.0), (-10.0, 1 / 16)])
def test_zero_and_scale_of_the_reward_do_not_matter(algo, shift, scale):
    """The same answers, values, weights: beta scaled alike where it stands beside the score."""
    plain, w, state = curve(algo)
    other, v, moved = curve(algo, shift, scale)
    for a, b in zip(plain, other):
        for name in ("kl", "length", "clipfrac"):
            assert a[name] == pytest.approx(b[name], abs=2e-3)
        assert a["score"] * scale + shift == pytest.approx(b["score"], abs=2e-3 * scale)
        if "value_loss" in a:
            assert a["value_loss"] == pytest.approx(b["value_loss"], abs=2e-3)
            assert a["value"] * scale + shift == pytest.approx(b["value"], abs=2e-3 * scale)
    torch.testing.assert_close(w, v, atol=2e-3, rtol=0)
    assert moved.units.shift == pytest.approx(state.units.shift * scale + shift, rel=1e-6)
    assert moved.units.scale == pytest.approx(state.units.scale * scale, rel=1e-5)


@pytest.mark.parametrize("shift, scale", [(10.0, 1.0), (0.0, 8.0)])
def test_a_first_rollout_that_leaves_one_answer_gives_the_critic_no_scale(shift, scale):
    """--overlong mask: the critic waits for answers whose rewards differ."""
    def run(shift, scale):
        cfg = config(steps=4, seed=3, batch=8, max_new_tokens=3, overlong="mask", missing_eos_penalty=None,
                     kl_coef=0.1 * scale)
        roles, state = with_zero_critic(cfg)
        log = train(cfg, roles, state, lambda p, y, rows: [scale * s + shift for s in eighths(p, y)])
        learnt = [m["answers_learnt"] for m in log]
        assert learnt[0] == 1 and max(learnt) > 1
        return log, weights(state)

    plain, w = run(0.0, 1.0)
    other, v = run(shift, scale)
    assert plain[0]["value_loss"] == pytest.approx(other[0]["value_loss"], abs=2e-3)
    torch.testing.assert_close(w, v, atol=2e-3, rtol=0)


def test_a_kl_in_the_loss_has_the_scale_of_advantages_that_are_not_normalised():
    plain, w, _ = curve("drgrpo", kl_place="loss")
    scaled, v, _ = curve("drgrpo", 10.0, 8.0, "loss")
    assert scaled[2]["kl"] == pytest.approx(plain[2]["kl"], abs=2e-3) and plain[2]["kl"] != 0
    torch.testing.assert_close(w, v, atol=2e-3, rtol=0)


@pytest.mark.parametrize("algo, sign, shift", [("ppo", 1, 8.0), ("ppo", -1, -3.0), ("reinforce", 1, 8.0)])
def test_a_reward_for_length_makes_answers_longer_and_one_against_it_shorter(algo, sign, shift):
    """The sign of the reward says nothing: len / 20 + 8, -len / 20 - 3 and others like them."""
    cfg = config(algo=algo, steps=8, batch=32, max_new_tokens=16, lr=2e-2, missing_eos_penalty=None,
                 kl_coef=0.0)
    roles, state = with_zero_critic(cfg)
    log = train(cfg, roles, state, lambda p, y, rows: [sign * len(a) / 20 + shift for a in y])
    lengths = [m["length"] for m in log]
    assert sign * (sum(lengths[-3:]) / 3 - lengths[0]) > 2, lengths


def test_a_critic_that_is_a_reward_model_is_shifted_and_keeps_its_scale():
    cfg = config(steps=1, lr=0.0)
    for shift in (0.0, 10.0):
        roles, state, _, _ = setup(cfg)                     # its head speaks in another unit than this reward
        m, batch = next(ppo.train_ppo(cfg, roles, state, environment(lambda p, y, rows: [
            s + shift for s in toy_reward(p, y)])))
        with roles.critic() as (model, past), torch.no_grad():
            raw = ppo.values(model, roles.value_head, batch, past)
        mask = batch.mask
        assert abs(m["value"] - state.units.shift) < 1e-5
        spread = (batch.values - raw)[mask]
        assert spread.std() < 1e-5 and raw[mask].std() > 0.1                    # moved by one number


def test_units_by_hand():
    """Two answers, gamma 1 and beta 0: returns 3 3 and 6, a mean of 4 and a variance of 2."""
    batch = ppo.collate_rollout([[1], [2]], [[1, 2], [3]])
    mask = batch.mask
    batch = batch._replace(logp=t([-1, -2], [-3, 0]), ref_logp=t([-1, -2], [-3, 0]), values=t([0, 0], [0, 7]))
    units = ppo.measure_units(config(), batch, torch.tensor([3.0, 6.0], dtype=F64), 0.3)
    assert units == pytest.approx((4.0, math.sqrt(2), 1.0, 0.0), abs=1e-12)
    head = t([1.0, 2.0], [6.0, 9.0])                        # mean 3: a reward model
    units = ppo.measure_units(config(), batch._replace(values=head), torch.tensor([3.0, 6.0], dtype=F64), 0.3)
    torch.testing.assert_close(units.value(head)[mask], torch.tensor([2.0, 3.0, 7.0], dtype=F64))
    torch.testing.assert_close(units.standard(units.value(head)), units.standard_value(head))
    flat = ppo.measure_units(config(), batch, torch.tensor([5.0, 5.0], dtype=F64), 0.3)
    assert flat == (5.0, 0.0, 1.0, 0.0) and flat.unit == 1.0
    discounted = ppo.measure_units(config(gamma=0.5), batch, torch.tensor([4.0, 4.0], dtype=F64), 0.0)
    assert discounted.shift == pytest.approx(10 / 3)        # 2, 4 and 4
    bare = ppo.measure_units(config(algo="rloo"), batch._replace(values=None), t([3.0, 6.0])[0], 0.0)
    assert bare[2:] == (1.0, 0.0) and bare[:2] == pytest.approx((4.0, math.sqrt(2)))


def test_the_value_loss_is_in_units_of_the_first_returns():
    cfg = config(minibatches=1, ppo_epochs=1, lr=0.0)
    _, _, batch, answers = rolled(cfg)
    roles, state, _, _ = setup(cfg)
    for p in state.params["policy"].values():
        p.data += 0.05
    raw = batch.values
    state.units = ppo.Units(2.0, 0.5, 2.0, -1.0)
    batch = ppo.compute_advantages(cfg, batch, torch.tensor(toy_reward(None, answers)), 0.1, state.units)
    torch.testing.assert_close(batch.values, (2 + 0.5 * (2 * raw - 1)).masked_fill(~batch.mask, 0))
    m = ppo.update(cfg, roles, state, batch, banned=[PAD])
    want = ppo.masked_mean(((batch.values - batch.returns) / 0.5) ** 2 / 2, batch.mask).item()
    assert abs(m["value_loss"] - want) < 1e-4 * want and m["clipfrac_value"] == 0


def test_the_units_wait_for_returns_that_differ():
    """As long as all answers score the same nothing is learnt; then the units are set, once."""
    seen = []

    def reward(prompts, answers, rows):
        seen.append(1)
        return [7.0] * 16 if len(seen) < 3 else eighths(prompts, answers)
    cfg = config(algo="reinforce", steps=5, missing_eos_penalty=None)
    roles, state, _, _ = setup(cfg)
    scales = []
    for m, _ in ppo.train_ppo(cfg, roles, state, environment(reward)):
        scales.append(state.units.scale)
        assert (m["step"] == 1) == any("first gradient is 0" in line for line in health(m))
    assert scales[:2] == [0, 0] and scales[2] == scales[3] == scales[4] > 0


@pytest.mark.parametrize("x", [1000.1, 1e-5, -3e7, 0.0])
def test_equal_scores_teach_nothing_whatever_their_size(x):
    for dtype in (torch.float32, F64):
        same = torch.full((3, 5), x, dtype=dtype)
        mask = torch.ones_like(same, dtype=torch.bool)
        assert not ppo.grpo_advantage(same).any() and not ppo.grpo_advantage(same, std=False).any()
        assert not ppo.rloo_advantage(same).any() and not ppo.whiten(same, mask).any()
        assert ppo.spread(same.flatten()) == 1.0 and equal_groups(same.flatten(), 5).all()


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_what_counts_as_rounding_is_eight_units_of_the_largest_number(dtype):
    eps = torch.finfo(dtype).eps
    mask = torch.ones(1, 2, dtype=torch.bool)
    for units, counts in ((16, False), (18, True)):         # the mean lies in the middle
        x = torch.tensor([[1.0, 1 + units * eps]], dtype=dtype)
        assert ppo.centre(x, mask, 1).any() == ppo.centre(-2.0 ** 20 * x, mask, 1).any() == counts


@pytest.mark.parametrize("scale", [1e-12, 1e-5, 1.0, 1e6])
def test_advantages_have_no_scale_of_their_own(scale):
    scores = t([0, 1, 1, 5], [2, 2, 2, 3])
    want = ppo.grpo_advantage(scores)
    torch.testing.assert_close(ppo.grpo_advantage(scale * scores), want, atol=1e-10, rtol=0)
    torch.testing.assert_close(ppo.grpo_advantage((scale * scores).float()), want.float())
    mask = torch.ones_like(scores, dtype=torch.bool)
    torch.testing.assert_close(ppo.whiten(scale * scores, mask), ppo.whiten(scores, mask), atol=1e-10, rtol=0)
    assert equal_groups(scale * t([1, 1], [1, 2]).flatten(), 2).tolist() == [True, False]
    assert ppo.spread(scale * t([1, 3])[0]) == pytest.approx(scale)


def test_the_norms_of_advantages():
    mask, (x, *_) = ragged(B=4)
    rows = t([1.0], [2.0], [6.0], [3.0]) * mask
    got = ppo.normalise_advantages(rows.masked_fill(~mask, math.nan), mask, "group", 2)
    torch.testing.assert_close(got, t([-1.0], [1.0], [1.0], [-1.0]) / math.sqrt(2) * mask)
    torch.testing.assert_close(ppo.normalise_advantages(x, mask), ppo.whiten(x, mask))
    plain = ppo.normalise_advantages(x.masked_fill(~mask, math.nan), mask, "none")
    assert torch.equal(plain, x.masked_fill(~mask, 0))


# ------------------------------------------------------------------------------------------ answers without end

def test_final_scores_by_hand():
    s = t([1.0, 5.0, 3.0, 3.0])[0]
    ended = torch.tensor([True, True, True, False])
    n = torch.tensor([2, 9, 4, 10])
    std = math.sqrt(2)
    torch.testing.assert_close(ppo.final_scores(s, ended, n, 10), t([1, 5, 3, 1 - std])[0])
    torch.testing.assert_close(ppo.final_scores(s, ended, n, 10, 0.5), t([1, 5, 3, 1 - std / 2])[0])
    assert torch.equal(ppo.final_scores(s, ended, n, 10, None), s)
    low = t([1.0, 5.0, 3.0, -7.0])[0]                       # its own score is lower still
    assert ppo.final_scores(low, ended, n, 10)[3] == pytest.approx(-7 - ppo.spread(low))
    for penalty, last in ((None, 3 - std), (1.0, 1 - std)):
        got = ppo.final_scores(s, ended, n, 10, penalty, "penalty")
        torch.testing.assert_close(got, t([1, 5 - std / 2, 3, last])[0])
    nothing = torch.zeros(4, dtype=torch.bool)
    torch.testing.assert_close(ppo.final_scores(s, nothing, n, 10), s - std)
    same = t([2.0, 2.0])[0]                                 # no spread: a unit of 1
    assert ppo.final_scores(same, torch.tensor([True, False]), n[:2], 10).tolist() == [2.0, 1.0]
    assert torch.equal(ppo.final_scores(s, ~nothing, n, 10), s)


@pytest.mark.parametrize("shift, scale", [(10.0, 1.0), (-1e4, 1.0), (0.0, 1e-6)])
def test_no_reward_makes_an_answer_without_end_the_best(shift, scale):
    g = torch.Generator().manual_seed(0)
    for overlong in ("none", "penalty"):
        s = torch.randn(20, generator=g, dtype=F64)
        ended = torch.rand(20, generator=g) < 0.7
        n = torch.randint(1, 9, (20,), generator=g)
        s[~ended] += 9                                      # the reward prefers them
        plain = ppo.final_scores(s, ended, n, 8, 1.0, overlong)
        assert plain[~ended].max() < plain[ended].min()
        moved = ppo.final_scores(scale * s + shift, ended, n, 8, 1.0, overlong)
        torch.testing.assert_close(moved, scale * plain + shift)


def test_the_overlong_penalty_is_a_straight_line_over_the_last_fifth():
    got = ppo.overlong_penalty(torch.tensor([0, 16, 17, 18, 19, 20]), 20)
    torch.testing.assert_close(got, torch.tensor([0, 0, -0.25, -0.5, -0.75, -1]))
    lengths = torch.tensor([100, 16384, 18000, 20480])                      # DAPO's own numbers
    want = torch.tensor([0.0 if n <= 16384 else (16384 - n) / 4096 for n in lengths.tolist()])
    torch.testing.assert_close(ppo.overlong_penalty(lengths, 20480), want)


def test_answers_that_are_cut_can_be_left_out_of_the_loss(monkeypatch):
    seen, real = [], ppo.update
    monkeypatch.setattr(ppo, "update", lambda cfg, roles, state, batch, *a: seen.append(batch) or real(
        cfg, roles, state, batch, *a))
    cfg = config(steps=1, max_new_tokens=3, batch=32, algo="grpo", overlong="mask")
    roles, state, _, _ = setup(cfg)
    m, whole = next(ppo.train_ppo(cfg, roles, state, environment()))
    last = seen[0].tokens.gather(1, (seen[0].lengths - 1)[:, None])
    assert 0 < len(last) == m["answers_learnt"] == round(32 * m["eos_rate"]) < 32 and (last == END).all()
    assert len(whole.mask) == 32
    ended = (whole.tokens.gather(1, (whole.lengths - 1)[:, None]) == END).view(-1, 4)
    group = whole.advantages[:, 0].view(-1, 4)
    assert (ended.any(1) & ~ended.all(1)).any()             # the mean of a group is that of its finished answers
    torch.testing.assert_close((group * ended).sum(1), torch.zeros(8), atol=1e-6, rtol=0)
    assert (group[~ended] == 0).all()
    cfg = config(steps=2, max_new_tokens=1, batch=8, overlong="mask", missing_eos_penalty=None)
    roles, state, _, _ = setup(cfg)
    before = weights(state)
    banned = ppo.Environment(PROMPTS, toy_reward, 0, banned=[0])            # nobody can end
    log = [m for m, _ in ppo.train_ppo(cfg, roles, state, banned)]
    assert [m["answers_learnt"] for m in log] == [0, 0] and torch.equal(weights(state), before)
    assert any("no answer was learnt from" in line for line in health(log[0]))


MASKED = torch.tensor([True, True, False, True, False, False, True, False])     # two groups of four


@pytest.mark.parametrize("algo, want", [
    ("grpo", [-1, 0, 0, 1, 0, 0, 0, 0]), ("drgrpo", [-2, 0, 0, 2, 0, 0, 0, 0]),
    ("rloo", [-3, 0, 0, 3, 0, 0, 0, 0])])
def test_a_masked_answer_is_in_no_baseline_and_no_spread(algo, want):
    """Finished are 1 3 5, of mean 3 and std 2, beside a cut 99; and one alone, whose group has no other."""
    cfg = config(algo=algo, batch=8, num_generations=4, overlong="mask", max_new_tokens=2)
    batch = ppo.collate_rollout([[1]] * 8, [[2] * n for n in (1, 2, 3, 1, 2, 1, 1, 2)])
    zero = torch.zeros(batch.mask.shape, dtype=F64)
    batch = batch._replace(logp=zero, ref_logp=zero)
    s = t([1.0, 3.0, 99.0, 5.0, -9.0, 4.0, 7.0, 9.0])[0]
    kept = ppo.final_scores(s, MASKED, batch.mask.sum(1), 2, 1.0, "mask")
    assert torch.equal(kept, s)                             # no penalty for the missing end
    done = ppo.compute_advantages(cfg, batch, s, 0.1, counted=MASKED)
    torch.testing.assert_close(done.advantages[:, 0], t(want)[0], atol=1e-12, rtol=0)
    alone = ppo.compute_advantages(dataclasses.replace(cfg, batch=6, num_generations=3, minibatches=2),
                                   batch.take([0, 1, 3]), s[[0, 1, 3]], 0.1)
    assert torch.equal(done.advantages[[0, 1, 3], :2], alone.advantages)


@pytest.mark.parametrize("algo", ["ppo", "reinforce"])
def test_a_masked_answer_is_in_no_mean_of_the_batch(algo):
    cfg = config(algo=algo, batch=8, overlong="mask")
    mask, (logp, ref, v, s, *_) = ragged(B=8)
    batch = ppo.collate_rollout([[1]] * 8, [[2] * int(n) for n in mask.sum(1)])
    batch = batch._replace(logp=logp, ref_logp=ref, values=v if algo == "ppo" else None)
    rows = MASKED.nonzero()[:, 0].tolist()
    done = ppo.compute_advantages(cfg, batch, s[:, 0], 0.1, counted=MASKED).take(rows)
    alone = ppo.compute_advantages(cfg, batch.take(rows), s[rows, 0], 0.1)
    torch.testing.assert_close(done.advantages, alone.advantages)
    torch.testing.assert_close(done.returns, alone.returns)
    units = ppo.measure_units(cfg, batch, s[:, 0], 0.1, MASKED)
    assert units == pytest.approx(ppo.measure_units(cfg, batch.take(rows), s[rows, 0], 0.1))


def test_groups_differ_by_their_finished_answers_alone():
    s = t([1.0, 1.0, 9.0, 1.0, 3.0, 4.0, 5.0, 6.0])[0]
    assert equal_groups(s, 4).tolist() == [False, False]
    assert equal_groups(s, 4, MASKED).tolist() == [True, True]
    batch = ppo.collate_rollout([[1]] * 8, [[2]] * 8)
    some = ppo.Experience([[2]] * 8, batch, s, MASKED, {})
    cfg = config(algo="dapo", batch=8, num_generations=4, overlong="mask")
    assert ppo.keep_informative_groups(cfg, some).answers == []
    cfg = dataclasses.replace(cfg, overlong="none")
    assert len(ppo.keep_informative_groups(cfg, some).answers) == 8
    equal = some._replace(rewarded=torch.ones(8), ended=torch.ones(8, dtype=torch.bool))     # penalties alone differ
    assert ppo.keep_informative_groups(cfg, equal).answers == []


@pytest.mark.parametrize("changes", [dict(missing_eos_penalty=2.0), dict(overlong="penalty")])
def test_the_logged_score_is_the_reward_before_penalties(changes):
    given = []

    def reward(prompts, answers, rows=None):
        given.extend(toy_reward(prompts, answers))
        return given
    cfg = config(steps=1, max_new_tokens=3, batch=32, **changes)
    roles, state, _, _ = setup(cfg)
    m, batch = next(ppo.train_ppo(cfg, roles, state, environment(reward)))
    raw = torch.tensor(given)
    assert m["score"] == pytest.approx(raw.mean().item(), abs=1e-6)
    assert m["score_std"] == pytest.approx(raw.std(unbiased=False).item(), abs=1e-6)
    learnt = batch.rewards.sum(1).mean().item() + m["beta"] * m["kl"]
    assert m["score_penalised"] == pytest.approx(learnt, abs=1e-5) and learnt < m["score"] - 0.05
    assert m["objective"] == pytest.approx(learnt - m["beta"] * m["kl"], abs=1e-5)
    cfg = config(steps=1, max_new_tokens=3, batch=32, missing_eos_penalty=None)
    roles, state, _, _ = setup(cfg)
    assert "score_penalised" not in next(ppo.train_ppo(cfg, roles, state, environment()))[0]


def test_equal_rewards_with_a_penalty_are_something_to_learn_from():
    cfg = config(steps=1, max_new_tokens=3, batch=32)
    roles, state, _, _ = setup(cfg)
    for penalty, silent in ((1.0, True), (None, False)):
        cfg = dataclasses.replace(cfg, missing_eos_penalty=penalty)
        m = next(ppo.train_ppo(cfg, roles, state, environment(lambda p, y, rows: [2.0] * len(y))))[0]
        state.step = 0
        assert m["score"] == 2 and m["score_std"] == 0
        assert silent != any("nothing to learn from" in line for line in health(m))


@pytest.mark.parametrize("words, says", [
    (["--overlong", "mask", "--missing_eos_penalty", "1"],
     "--missing_eos_penalty 1.0 means nothing to --overlong mask"),
    (["--algo", "cispo", "--cliprange_high", "0"],
     "--cliprange_high 0 stands for --cliprange, which --algo cispo does not read; it must be above 0"),
    (["--missing_eos_score", "-1"], "--missing_eos_score is now called --missing_eos_penalty"),
    (["--missing_eos_penalty", "no"], "--missing_eos_penalty no is neither a number from 0 on nor the word"),
    (["--missing_eos_penalty", "nan"], "nan is neither a number"),
    (["--missing_eos_penalty=-1"], "-1 is neither"),
    (["--algo", "dapo", "--kl_coef", "0.1"], "--kl_coef means nothing to --kl_place none"),
    (["--algo", "ppo", "--dynamic_sampling", "2"], "--dynamic_sampling means nothing to --algo ppo"),
    (["--kl_coef", "0", "--adaptive_kl_target", "6"], "--kl_coef 0 stays 0"),
    (["--algo", "cispo", "--cliprange", "0.2"], "--cliprange means nothing to --algo cispo"),
    (["--ratio_level", "word"], "--ratio_level word is none of token sequence")])
def test_flags_are_refused_in_a_sentence(words, says, capsys):
    assert command.main(["--task", "ppo", *words]) == 2
    assert says in capsys.readouterr().err


def test_no_kl_at_all_is_one_flag():
    assert command.parse(["--task", "ppo", "--kl_coef", "0", "--init", "x", "--reward", "y"]).kl_coef == 0


@pytest.mark.parametrize("algo", NAMES)
def test_help_shows_the_algorithms_own_defaults(algo, capsys):
    with pytest.raises(SystemExit):
        command.main(["--task", "ppo", "--algo", algo, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    cfg = ppo.PPOConfig(algo=algo)
    record = ppo.find_record(ppo.ALGORITHMS, algo)
    for name in ("ratio_level", "token_mean", "kl_place", "advantage_norm", "overlong", "cliprange_high"):
        after = text.split(f"--{name} ")[-1]
        assert f"(default {getattr(cfg, name)})" in after[:300], name
    for name in record.unused:
        assert f"--{name} {name.upper()} " not in text


# ----------------------------------------------------------------------------------- groups without variance

def half_equal(prompts, answers, rows=None):
    """To prompts of an odd first token all answers score the same."""
    return [1.0 if p[0] % 2 else float(len(set(y))) for p, y in zip(prompts, answers)]


MANY = [[i % 9 + 1, i // 9 + 1] for i in range(45)]


def sampled(rounds, steps=2, prompts=MANY, reward=half_equal, **changes):
    cfg = config(algo="dapo", num_generations=4, steps=steps, dynamic_sampling=rounds, overlong="none",
                 missing_eos_penalty=None, **changes)
    roles, state, _, _ = setup(cfg)
    steps = list(ppo.train_ppo(cfg, roles, state, ppo.Environment(prompts, reward, END, [PAD])))
    return [m for m, _ in steps], [batch for _, batch in steps], state


def test_groups_of_equal_scores_are_replaced_by_other_prompts():
    log, batches, _ = sampled(rounds=20)
    for m, batch in zip(log, batches):
        first = batch.tokens[:, 0]
        assert (first % 2 == 0).all() and len(batch.mask) == m["answers_learnt"] == 16      # full again
        asked = [tuple(row[:2].tolist()) for row in batch.tokens[::4]]
        assert len(set(asked)) == 4                         # never the same prompt twice
        assert m["answers_sampled"] > 16 and m["frac_reward_zero_std"] > 0     # described is the rollout before the choice
        assert (batch.advantages[:, 0].view(4, 4).std(1) > 0).all()
        assert m["tokens"] > batch.lengths.sum()            # of all rounds


def test_penalties_of_a_refilled_rollout_have_one_unit():
    """Scores of different prompts differ in scale, so that the spread of each round would be another one."""
    def reward(prompts, answers, rows=None):
        return [float(p[1]) ** 3 * (len(set(y)) if p[0] % 2 else 1) for p, y in zip(prompts, answers)]
    cfg = config(algo="dapo", num_generations=4, batch=32, dynamic_sampling=20, max_new_tokens=5, overlong="penalty")
    roles, state, _, _ = setup(cfg)
    m, batch = next(ppo.train_ppo(cfg, roles, state, ppo.Environment(MANY, reward, END, [PAD])))
    assert m["answers_sampled"] > 32 and len(batch.mask) == 32
    rows = [row[:n] for row, n in zip(batch.tokens.tolist(), batch.lengths)]
    rewarded = torch.tensor(reward([row[:2] for row in rows], [row[2:] for row in rows]))
    ended = torch.tensor([row[-1] == END for row in rows])
    assert not ended.all()
    want = ppo.final_scores(rewarded, ended, batch.mask.sum(1), 5, cfg.missing_eos_penalty, "penalty")
    assert torch.equal(batch.rewards.sum(1), want) and not torch.equal(want, rewarded)


def test_penalties_alone_give_no_units():
    """Rewards that do not differ yet say nothing of their scale; an answer without end must not."""
    cfg = config(steps=2, max_new_tokens=3, batch=32)
    roles, state, _, _ = setup(cfg)
    given = []

    def reward(prompts, answers, rows=None):
        given.append(len(answers))
        return [0.0] * len(answers) if len(given) == 1 else toy_reward(prompts, answers)
    for m, _ in ppo.train_ppo(cfg, roles, state, environment(reward)):
        assert m["eos_rate"] < 1 and (state.units.scale > 0) == (m["step"] == 2)


def test_the_refill_is_bounded_and_says_how_many_are_left():
    log, batches, _ = sampled(rounds=1)
    assert any(m["answers_learnt"] < 16 for m in log) and all(m["answers_learnt"] % 4 == 0 for m in log)
    for m, batch in zip(log, batches):
        assert m["answers_learnt"] == len(batch.mask) and m["answers_sampled"] <= 32
    few, batches, _ = sampled(rounds=20, steps=1, prompts=MANY[:6])             # no prompt is left
    assert few[0]["answers_sampled"] == 24 and few[0]["answers_learnt"] == 12
    none, batches, state = sampled(rounds=2, reward=lambda p, y, rows: [3.0] * len(y))
    assert [m["answers_learnt"] for m in none] == [0, 0] and none[0]["answers_sampled"] == 48
    assert any("no answer was learnt from" in line for line in health(none[0])) and state.step == 2


def test_a_refilled_batch_is_the_batch_of_its_rows():
    batch = ppo.collate_rollout([[1, 2, 3], [4], [5, 6]], [[7], [8, 9, 10], [11]])
    batch = batch._replace(logp=torch.randn(3, 3) * batch.mask)
    again = ppo.join_batches([batch.take([0]), batch.take([1, 2])])
    for a, b in zip(again, batch):
        assert a is b is None or torch.equal(a, b)


# ------------------------------------------------------------------------- naive loops, fp64, for each equation

def naive_loss(algo, mask, logp, old, ref, scores, k, limit, beta=0.3):
    """The loss of a minibatch as its paper has it, one token at a time in Python."""
    n = mask.sum(1).tolist()
    total = sum(n)
    loss = 0.0
    for b in range(len(n)):
        group = [scores[i].item() for i in range(b - b % k, b - b % k + k)]
        mean = sum(group) / k
        a = group[b % k] - mean
        if algo != "drgrpo":
            a /= math.sqrt(sum((s - mean) ** 2 for s in group) / (k - 1))
        answer = math.exp(sum((logp[b, i] - old[b, i]).item() for i in range(n[b])) / n[b])
        for i in range(n[b]):
            ratio = math.exp((logp[b, i] - old[b, i]).item())
            low, high = {"dapo": (0.2, 0.28), "gspo": (3e-4, 4e-4)}.get(algo, (0.2, 0.2))
            if algo == "gspo":
                ratio = answer
            if algo == "cispo":
                token = -min(ratio, 1 + 4.0) * a * logp[b, i].item()
            else:
                token = -min(a * ratio, a * min(max(ratio, 1 - low), 1 + high))
            if algo == "grpo":
                gap = (ref[b, i] - logp[b, i]).item()
                token += beta * (math.exp(gap) - 1 - gap)
            weight = {"grpo": 1 / len(n) / n[b], "gspo": 1 / len(n) / n[b], "drgrpo": 1 / len(n) / limit}
            loss += weight.get(algo, 1 / total) * token
    return loss


@pytest.mark.parametrize("algo", [name for name in GROUPED if name != "rloo"])
@pytest.mark.parametrize("seed", range(2))
def test_each_published_loss_equals_a_naive_loop(algo, seed):
    mask, (logp, old, ref, s, *_) = ragged(B=8, seed=seed)
    cfg = config(algo=algo, batch=8, num_generations=4, max_new_tokens=9)
    logp = old + 0.5 * logp
    batch = ppo.collate_rollout([[1]] * 8, [[2] * int(n) for n in mask.sum(1)])
    batch = batch._replace(logp=old, ref_logp=ref)
    batch = ppo.compute_advantages(cfg, batch, s[:, 0], 0.3)
    loss, clipped = ppo.find_record(ppo.ALGORITHMS, algo).policy_loss(cfg, logp, batch)
    if cfg.kl_place == "loss":
        loss = loss + 0.3 * ppo.kl_estimate(logp, ref, cfg.kl_estimator).masked_fill(~mask, 0)
    got = (ppo.token_weights(mask.double(), cfg.token_mean, cfg.max_new_tokens) * loss).sum().item()
    assert abs(got - naive_loss(algo, mask, logp, old, ref, s[:, 0], 4, 9)) < 1e-10
    assert not clipped[~mask].any() and clipped.any() == (algo != "cispo")


# ------------------------------------------------------------------------- TRL's numbers (make_rl_fixtures.py)

ALIKE = {"rtol": 0, "atol": 1e-10}
TRL_BETA = 0.3
TRL_CASES = {                                   # flags of ours that are the settings of the fixture's case
    "grpo": dict(algo="grpo"), "grpo_corrected": dict(algo="grpo", kl_place="none"), "drgrpo": dict(algo="drgrpo"),
    "dapo": dict(algo="dapo", overlong="none"), "gspo": dict(algo="gspo"), "cispo": dict(algo="cispo"),
    "ppo": dict(algo="ppo", gamma=0.97, lam=0.9), "reinforce": dict(algo="reinforce", gamma=0.97)}


@pytest.fixture(scope="module")
def trl():
    return {name: torch.from_numpy(x) for name, x in np.load(TRL).items()}


def trl_batch(trl, advantages=None):
    """The fixture's rollout; advantages (8,) or (8, 7)."""
    mask = trl["mask"].bool()
    batch = ppo.collate_rollout([[1]] * 8, [[2] * int(n) for n in mask.sum(1)])
    batch = batch._replace(logp=trl["old"], ref_logp=trl["ref"], values=trl["values"])
    if advantages is None:
        return batch
    return batch._replace(advantages=advantages.view(8, -1).expand(8, 7) * mask)


def step_of(monkeypatch, cfg, logp, batch):
    """policy_step of a policy that gives the answers these log-probabilities: its metrics, and the gradient."""
    logp = logp.clone().requires_grad_()
    monkeypatch.setattr(ppo, "PolicyDistribution", lambda *given: None)
    monkeypatch.setattr(ppo, "logprobs", lambda policy, part, past: logp)
    weights = ppo.token_weights(batch.mask.double(), cfg.token_mean, cfg.max_new_tokens)
    roles = ppo.Roles(lambda: contextlib.nullcontext((None, None)), None)
    metrics = ppo.policy_step(cfg, roles, batch._replace(weights=weights), TRL_BETA, batch.mask.sum())
    return metrics, logp.grad


def group_std(x):
    return x.view(2, 4).std(1, keepdim=True).expand(2, 4).flatten()


@pytest.mark.parametrize("algo", NAMES)
def test_the_advantages_are_trls(algo, trl):
    """TRL adds 1e-4 to a group's std, and whitens by the unbiased variance + 1e-8. Nothing else differs."""
    cfg = config(batch=8, num_generations=4, max_new_tokens=9, **{"algo": algo, **TRL_CASES.get(algo, {})})
    batch = trl_batch(trl)
    if algo != "ppo":
        batch = batch._replace(values=None)
    got = ppo.compute_advantages(cfg, batch, trl["scores"], TRL_BETA)
    mask = batch.mask
    want = trl[f"{algo}_advantages"]
    if algo in ("ppo", "reinforce"):
        raw = trl[f"{algo}_returns"] - (trl["values"] * mask if algo == "ppo" else 0)
        unbiased = raw[mask].var()
        biased = raw[mask].var(unbiased=False)
        torch.testing.assert_close(got.rewards, trl["ppo_rewards"] * mask, **ALIKE)
        torch.testing.assert_close(got.returns * mask, trl[f"{algo}_returns"] * mask, **ALIKE)
        want = (want * ((unbiased + 1e-8) / biased).sqrt()) * mask
    else:
        if cfg.advantage_norm == "group":
            std = group_std(trl["scores"])
            want = want * (std + 1e-4) / std
        want = want[:, None] * mask
    torch.testing.assert_close(got.advantages, want, **ALIKE)


@pytest.mark.parametrize("case", TRL_CASES)
def test_losses_and_gradients_are_trls(case, trl, monkeypatch):
    """On TRL's advantages. grpo_corrected: TRL's default multiplies k3 by the ratio, and has its gradient too."""
    cfg = config(batch=8, num_generations=4, max_new_tokens=9, **TRL_CASES[case])
    batch = trl_batch(trl, trl[f"{case}_advantages"])
    metrics, grad = step_of(monkeypatch, cfg, trl[f"{case}_logp"], batch)
    loss = metrics["policy_loss"]
    if case == "grpo_corrected":
        logp = trl["grpo_corrected_logp"].clone().requires_grad_()
        k3 = (logp - batch.logp).exp() * ppo.kl_estimate(logp, batch.ref_logp, "k3")
        extra = (TRL_BETA * k3 * ppo.token_weights(batch.mask.double(), "sequence")).sum()
        loss = loss + extra.detach()
        grad = grad + torch.autograd.grad(extra, logp)[0]
        assert (loss - trl["grpo_loss"]).abs() > 1e-2               # what it is without
    torch.testing.assert_close(loss, trl[f"{case}_loss"], **ALIKE)
    torch.testing.assert_close(grad, trl[f"{case}_grad"], **ALIKE)
    assert trl[f"{case}_grad"].abs().max() > 1e-3
    if f"{case}_low" in trl and cfg.ratio_level == "token":
        for side in ("low", "high"):
            assert metrics[f"clipfrac_{side}"] == pytest.approx(trl[f"{case}_{side}"].item(), abs=1e-6)
            assert trl[f"{case}_{side}"] > 0.1
    if case == "grpo":
        k3 = ppo.kl_estimate(trl["grpo_logp"], batch.ref_logp, "k3")
        assert ppo.masked_mean(k3, batch.mask) == pytest.approx(trl["grpo_kl"].item(), abs=1e-6)


def test_a_minibatch_is_averaged_over_its_own_tokens_and_in_trls_dapo_over_those_of_the_rollout(trl, monkeypatch):
    cfg = config(algo="dapo", batch=8, num_generations=4, max_new_tokens=9, overlong="none")
    batch = trl_batch(trl, trl["dapo_advantages"])._replace(values=None)
    half = ppo.Batch(*(None if x is None else x[:4] for x in batch))
    metrics, grad = step_of(monkeypatch, cfg, trl["dapo_logp"][:4], half)
    share = half.mask.sum() / (batch.mask.sum().double() / 2)       # its tokens over those of the mean minibatch
    assert (share - 1).abs() > 0.03
    torch.testing.assert_close(metrics["policy_loss"] * share, trl["dapo_half_loss"], **ALIKE)
    torch.testing.assert_close(grad * share, trl["dapo_half_grad"], **ALIKE)


def test_trls_rloo_has_one_ratio_for_the_whole_answer(trl, monkeypatch):
    """The product of the token ratios, and a mean over answers. Before the first step all ratios are 1, and the
    gradients are in proportion: a token weighs 1 / N here and 1 / B there."""
    cfg = config(algo="rloo", batch=8, num_generations=4, max_new_tokens=9)
    batch = trl_batch(trl, trl["rloo_advantages"])
    _, grad = step_of(monkeypatch, cfg, trl["rloo_first_logp"], batch)
    torch.testing.assert_close(grad * batch.mask.sum() / 8, trl["rloo_first_grad"], **ALIKE)
    logp = trl["rloo_logp"].clone().requires_grad_()
    new, old = ((x * batch.mask).sum(1, keepdim=True) for x in (logp, batch.logp))
    loss = ppo.ppo_policy_loss(new, old, trl["rloo_advantages"][:, None], torch.ones(8, 1).bool()).mean()
    torch.testing.assert_close(loss, trl["rloo_loss"], **ALIKE)
    torch.testing.assert_close(torch.autograd.grad(loss, logp)[0], trl["rloo_grad"], **ALIKE)


def test_the_value_loss_is_trls(trl):
    values = trl["new_values"].clone().requires_grad_()
    mask = trl["mask"].bool()
    loss = ppo.masked_mean(ppo.ppo_value_loss(values, trl["values"] * mask, trl["ppo_returns"], mask), mask)
    torch.testing.assert_close(loss, trl["ppo_value_loss"], **ALIKE)
    torch.testing.assert_close(torch.autograd.grad(loss, values)[0], trl["ppo_value_grad"], **ALIKE)


def test_the_overlong_penalty_is_trls_with_a_fifth_of_the_limit_as_its_buffer(trl):
    torch.testing.assert_close(ppo.overlong_penalty(trl["lengths"].double(), 20), trl["overlong"], **ALIKE)


def test_the_gradient_of_cispo_stays_where_its_weight_is_clipped():
    logp = t([math.log(9.0), math.log(0.1)]).requires_grad_()
    mask = torch.ones(1, 2).bool()
    ppo.cispo_policy_loss(logp, t([0, 0]), t([2.0, -1.0]), mask, 4.0).sum().backward()
    torch.testing.assert_close(logp.grad, t([-5.0 * 2, 0.1]))                   # a weight of 5 for 9, and 0.1
    whole = ppo.cispo_policy_loss(logp.detach(), t([0, 0]), t([2.0, 2.0]), mask, 4.0, "sequence")
    torch.testing.assert_close(whole, -math.sqrt(0.9) * 2 * logp.detach())


@pytest.mark.parametrize("ratio, advantage, side", [
    (1.3, 1.0, 1), (1.3, -1.0, 0), (0.37, 1.0, 0), (0.37, -1.0, -1), (1.1, 1.0, 0), (0.9, -1.0, 0),
    (1.3, 0.0, 0)])
def test_a_ratio_counts_as_clipped_where_the_clipping_acts(ratio, advantage, side):
    got = ppo.clipped_side(t([ratio]), t([advantage]), 0.2, 0.28)
    assert got.item() == side
    logp = t([math.log(ratio)]).requires_grad_()
    ppo.ppo_policy_loss(logp, t([0.0]), t([advantage]), torch.ones(1, 1).bool(), 0.2, 0.28).sum().backward()
    assert (logp.grad.item() == 0) == (side != 0 or advantage == 0)


def test_a_ratio_at_the_bound_is_not_clipped():
    got = ppo.clipped_side(t([1.5, 0.75, 1.75, 0.5]), t([1.0, -1.0, 1.0, -1.0]), 0.25, 0.5)
    assert got.tolist() == [[0, 0, 1, -1]]


def test_clip_shares_are_logged_apart():
    for algo, low in (("ppo", True), ("cispo", False)):
        cfg = config(algo=algo, lr=0.1, steps=2, ppo_epochs=3, **({} if low else {"cliprange_high": 0.05}))
        roles, state, _, _ = setup(cfg)
        for m in train(cfg, roles, state):
            assert m["clipfrac_high"] > 0 and (m["clipfrac_low"] > 0) == low
            assert m["clipfrac"] == pytest.approx(m["clipfrac_low"] + m["clipfrac_high"])


@pytest.mark.parametrize("algo", NAMES)
def test_beta_is_0_where_no_kl_stands(algo):
    cfg = config(algo=algo)
    beta = ppo.PPOState(cfg, {"w": torch.nn.Parameter(torch.zeros(1))}).kl.beta
    assert beta == (0.0 if cfg.kl_place == "none" else cfg.kl_coef) and cfg.kl_coef > 0


def test_a_kl_in_the_loss_that_overflows_is_nothing_times_a_beta_of_0():
    cfg = config(algo="grpo", kl_coef=0.0, minibatches=1, ppo_epochs=1)
    roles, state, batch, _ = rolled(cfg)
    far = batch._replace(ref_logp=batch.ref_logp.masked_fill(batch.mask, 100.0))
    m = ppo.update(cfg, roles, state, far)
    assert math.isfinite(m["policy_loss"]) and m["skipped"] == 0
    state.kl.beta = 0.1
    before = weights(state)
    m = ppo.update(cfg, roles, state, far)
    assert not math.isfinite(m["policy_loss"]) and m["skipped"] == 1 and torch.equal(weights(state), before)


def test_a_composed_algorithm_runs():
    """GRPO with the KL in the reward, one ratio an answer, whitened over the batch, k2 in the loss."""
    for changes in (dict(algo="grpo", kl_place="reward"), dict(algo="ppo", advantage_norm="none"),
                    dict(algo="ppo", ratio_level="sequence", token_mean="constant"),
                    dict(algo="reinforce", kl_place="loss", kl_estimator="k2"),
                    dict(algo="cispo", ratio_level="sequence", advantage_norm="batch"),
                    dict(algo="rloo", dynamic_sampling=2, overlong="mask", advantage_norm="group")):
        cfg = config(steps=2, **changes)
        roles, state, _, _ = setup(cfg)
        log = train(cfg, roles, state)
        assert all(math.isfinite(x) for m in log for x in m.values()), changes
        assert log[1]["kl"] != 0


def test_grpo_with_the_kl_in_the_reward_compares_what_the_reward_says():
    cfg = config(algo="grpo", kl_place="reward", batch=16)
    _, _, batch, answers = rolled(cfg)
    batch = ppo.compute_advantages(cfg, batch, torch.tensor(toy_reward(None, answers)), 0.5)
    want = torch.tensor(toy_reward(None, answers)) - 0.5 * (batch.logp - batch.ref_logp).sum(1)
    torch.testing.assert_close(batch.advantages[:, 0], ppo.grpo_advantage(want.view(4, 4)).flatten())


# --------------------------------------------------------------------------------------------- exact resume

@pytest.mark.parametrize("algo", NAMES)
def test_every_algorithm_resumes_exactly(algo, tmp_path):
    """2 + 2 iterations = 4, bit for bit, through a file: weights, Adam, units, beta, log."""
    changes = dict(adaptive_kl_target=0.5, kl_horizon=100) if algo in SCALES_BETA else {}
    cfg = config(algo=algo, steps=4, ppo_epochs=1, ema=0.9, **changes)
    roles, state, _, _ = setup(cfg)
    whole = timeless(train(cfg, roles, state))
    torch.save(state.state_dict(), tmp_path / "whole.pt")

    roles, state, _, _ = setup(cfg)
    loop = ppo.train_ppo(cfg, roles, state, environment(banned=[PAD]))
    log = [next(loop)[0], next(loop)[0]]
    torch.save(state.state_dict(), tmp_path / "half.pt")
    roles, state, _, _ = setup(cfg)
    state.load_state_dict(torch.load(tmp_path / "half.pt", weights_only=True))
    log += train(cfg, roles, state)
    assert timeless(log) == whole and state.units.scale > 0
    end = torch.load(tmp_path / "whole.pt", weights_only=True)
    for a, b in zip(leaves(end), leaves(state.state_dict()), strict=True):
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b


def test_dynamic_sampling_resumes_exactly():
    whole, batches, end = sampled(rounds=3, steps=4)
    cfg = config(algo="dapo", num_generations=4, batch=16, steps=4, dynamic_sampling=3, overlong="none",
                 missing_eos_penalty=None)
    roles, state, _, _ = setup(cfg)
    loop = ppo.train_ppo(cfg, roles, state, ppo.Environment(MANY, half_equal, END, [PAD]))
    log = [next(loop)[0]]
    saved = torch.utils._pytree.tree_map(lambda x: x.clone() if torch.is_tensor(x) else x, state.state_dict())
    roles, state, _, _ = setup(cfg)
    state.load_state_dict(saved)
    log += [m for m, _ in ppo.train_ppo(cfg, roles, state, ppo.Environment(MANY, half_equal, END, [PAD]))]
    assert timeless(log) == timeless(whole) and torch.equal(weights(state), weights(end))


@pytest.mark.parametrize("algo", [name for name in NAMES if name not in ("ppo", "reinforce")])
def test_a_group_is_two_answers_or_more(algo):
    assert config(algo=algo, num_generations=2).num_generations == 2
    with pytest.raises(UserError, match=f"--algo {algo} compares answers to one prompt"):
        config(algo=algo, num_generations=1)


@pytest.mark.parametrize("given, says", [
    (dict(steps="5"), "PPOConfig takes a whole number as steps, not '5'"),
    (dict(steps=2.5), "PPOConfig takes a whole number as steps, not 2.5"),
    (dict(steps=None), "PPOConfig takes a whole number as steps, not None"),
    (dict(num_generations=True), "PPOConfig takes a whole number as num_generations, not True"),
    (dict(lr="1e-3"), "PPOConfig takes a number as lr, not '1e-3'"),
    (dict(lr=False), "PPOConfig takes a number as lr, not False"),
    (dict(missing_eos_penalty="none"), "PPOConfig takes a number or None as missing_eos_penalty, not 'none'"),
    (dict(temprature=1.0), "PPOConfig has no field temprature; did you mean temperature?")])
def test_a_value_of_another_type_is_refused_in_a_sentence(given, says):
    with pytest.raises(UserError, match="^" + re.escape(says) + "$"):
        ppo.PPOConfig(**given)


def test_a_float_takes_an_int_and_a_penalty_none():
    cfg = ppo.PPOConfig(lr=1, missing_eos_penalty=None, gamma=1)
    assert cfg.lr == 1 and cfg.missing_eos_penalty is None
    with pytest.raises(UserError, match="SamplingConfig takes a whole number as max_new_tokens, not 4.0"):
        ppo.SamplingConfig(max_new_tokens=4.0)
    with pytest.raises(UserError, match="PreferenceConfig takes a number as beta, not '0.1'"):
        ppo.PreferenceConfig(beta="0.1")


def test_an_unknown_algorithm_fails_loudly():
    cfg = config()
    with pytest.raises(UserError, match="--algo grop is none of .*; did you mean grpo"):
        dataclasses.replace(cfg, algo="grop")


def test_every_round_of_a_refill_has_random_numbers_of_its_own(monkeypatch):
    seeds, real = [], ppo.sample_and_score
    monkeypatch.setattr(ppo, "sample_and_score", lambda *a: seeds.append(a[4].initial_seed()) or real(*a))
    sampled(rounds=20)
    assert len(seeds) > 3 and len(set(seeds)) == len(seeds)


@pytest.mark.parametrize("score", [-1.0, 5.0])
def test_equal_rewards_teach_nothing_wherever_their_zero_is(score):
    cfg = config(steps=2, missing_eos_penalty=None)
    roles, state = with_zero_critic(cfg)
    start = weights(state)
    log = train(cfg, roles, state, lambda p, y, rows: [score] * len(y))
    assert [m["grad_norm_policy"] for m in log] == [0, 0] and torch.equal(weights(state), start)


@pytest.mark.parametrize("scale", [64.0, 1 / 64])
def test_a_rollout_of_equal_rewards_gives_the_critic_no_scale(scale):
    """The first rollout's rewards are 0, as on a hard task, and some answers are cut; later ones differ."""
    def log_of(scale):
        calls = []

        def reward(prompts, answers, rows=None):
            calls.append(1)
            return [0.0] * len(answers) if len(calls) == 1 else [scale * s for s in eighths(prompts, answers)]
        cfg = config(steps=3, seed=3, batch=64, kl_coef=0.1 * scale, lr=1e-2)
        roles, state = with_zero_critic(cfg)
        return train(cfg, roles, state, reward)
    plain, scaled = log_of(1.0), log_of(scale)
    assert 0 < plain[0]["eos_rate"] < 1
    for a, b in zip(plain[1:], scaled[1:]):
        for name in ("value_loss", "explained_variance", "kl"):
            assert a[name] == pytest.approx(b[name], abs=2e-2), name
