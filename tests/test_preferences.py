"""Preferences without RL: every loss by hand and by naive loops, thumbs rows, z0, what is no comparison, and the
optimum that each loss aims at (tests/optimum_preferences.py)."""
import contextlib
import copy
import json
import math
import pathlib

import numpy as np
import pytest
import torch

import optimum_preferences as optimum
import ppo
import train
from data.batches.row_types import Ranking, Thumbs, as_thumbs, distinct, mismatched
from data.batches.examples import Text, display, size, targets
from data.results.inspect_data import advice_on_rows
from data.results.ppo_metrics import preference_report
from data.runtime.files import DataError, UserError
from data.text import formats
from data.text.tokenizer import Tokenizer
from model import GPT, GPTConfig
from test_rlhf import events, go, town                              # noqa: F401
from test_train import same, weights, world                         # noqa: F401
from tiny import Stop, write

F64 = torch.float64
TRL = pathlib.Path(__file__).parent / "fixtures" / "preferences" / "trl.npz"
LOSSES = [record.name for record in ppo.PREFERENCE_LOSSES]
END = 0


def t(*values):
    return torch.tensor(values, dtype=F64)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def role(model):
    return lambda: contextlib.nullcontext((model, None))


def gpt(seed=0):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(vocab_size=12, block_size=32, n_layer=2, n_head=2, n_embd=16))
    for p in model.parameters():
        p.data.mul_(4 if p.dim() == 2 else 1)
    return model


def total(model, prompt, answer):
    """log p of an answer, token by token."""
    found = 0.0
    for n in range(len(answer)):
        logits = model(torch.tensor([prompt + answer[:n]]))[0][0, -1]
        found = found + logits.double().log_softmax(-1)[answer[n]]
    return found


# -------------------------------------------------------------------------------------------------- equations

def test_simpo_by_hand():
    loss, margin = ppo.simpo_loss(t(-0.5, -1.0), t(-1.25, -0.75), beta=2.0, gamma=0.5)
    assert margin.tolist() == [1.5, -0.5]
    for got, want in zip(loss.tolist(), (-math.log(sigmoid(1.0)), -math.log(sigmoid(-1.0)))):
        assert abs(got - want) < 1e-10
    assert abs(ppo.simpo_loss(t(-1), t(-2))[0].item() + math.log(sigmoid(1.0))) < 1e-10     # beta 2, gamma 1


def test_orpo_by_hand():
    """p = 1/2 and 1/4: odds 1 and 1/3, so the log of their ratio is log 3."""
    loss, margin = ppo.orpo_loss(t(math.log(0.5)), t(math.log(0.25)), weight=0.25)
    assert abs(margin.item() - math.log(3)) < 1e-10
    assert abs(loss.item() - (math.log(2) + 0.25 * math.log(1 + 1 / 3))) < 1e-10
    assert abs(ppo.orpo_loss(t(math.log(0.5)), t(math.log(0.25)))[0].item()
               - (math.log(2) + 0.1 * math.log(4 / 3))) < 1e-10


def test_the_odds_of_a_certain_answer_are_finite():
    logp = torch.tensor([0.0, -1e-9, -1e-3, -200.0], requires_grad=True)
    odds = ppo.log_odds(logp)
    odds.sum().backward()
    assert odds.isfinite().all() and logp.grad.isfinite().all() and logp.grad[:2].tolist() == [0, 0]
    assert abs(odds[2].item() - math.log(math.exp(-1e-3) / -math.expm1(-1e-3))) < 1e-4
    assert odds[3].item() == -200 and logp.grad[3].item() == 1
    assert abs(odds[0].item() - math.log(1e6)) < 1e-3


def test_kto_by_hand():
    h, good = t(3, 3, -2, -2), torch.tensor([True, False, True, False])
    loss, margin = ppo.kto_loss(h, good, z0=0.25, beta=0.5, desirable_weight=1.5, undesirable_weight=0.5)
    assert margin.tolist() == [1.25, -1.25, -1.25, 1.25]
    want = [1.5 * (1 - sigmoid(1.25)), 0.5 * (1 - sigmoid(-1.25)), 1.5 * (1 - sigmoid(-1.25)), 0.5 * (1 - sigmoid(1.25))]
    assert max(abs(a - b) for a, b in zip(loss.tolist(), want)) < 1e-10
    plain, _ = ppo.kto_loss(h, good)
    want = [1 - sigmoid(0.3), 1 - sigmoid(-0.3), 1 - sigmoid(-0.2), 1 - sigmoid(0.2)]
    assert max(abs(a - b) for a, b in zip(plain.tolist(), want)) < 1e-10


def test_z0_by_hand():
    assert abs(ppo.kto_z0(6.0, 4, beta=0.2) - 0.3) < 1e-15 and abs(ppo.kto_z0(6.0, 4) - 0.15) < 1e-15
    assert ppo.kto_z0(-6.0, 4) == 0 and ppo.kto_z0(0.0, 0) == 0 and ppo.kto_z0(3.0, 1, 1.0) == 3.0


def test_every_loss_has_its_own_defaults_and_flags():
    found = {name: ppo.PreferenceConfig(preference_loss=name) for name in LOSSES}
    assert {name: cfg.beta for name, cfg in found.items()} == dict(dpo=0.1, ipo=0.1, simpo=2.0, orpo=0.1, kto=0.1)
    assert found["simpo"].simpo_gamma == 1 and found["orpo"].orpo_lambda == 0.1
    assert found["kto"].desirable_weight == found["kto"].undesirable_weight == 1
    for flag, owner in [("label_smoothing", "dpo"), ("simpo_gamma", "simpo"), ("orpo_lambda", "orpo"),
                        ("desirable_weight", "kto"), ("undesirable_weight", "kto")]:
        for name in LOSSES:
            if name == owner:
                assert getattr(ppo.PreferenceConfig(preference_loss=name, **{flag: 0.3}), flag) == 0.3
                continue
            with pytest.raises(UserError, match=f"--{flag} means nothing to --preference_loss {name}"):
                ppo.PreferenceConfig(preference_loss=name, **{flag: 0.3})
        assert getattr(ppo.PreferenceConfig(preference_loss=owner, **{flag: 0}), flag) == 0
        with pytest.raises(UserError, match=f"--{flag} -0.1 is out of range"):
            ppo.PreferenceConfig(preference_loss=owner, **{flag: -0.1})
    with pytest.raises(UserError, match="--beta means nothing to --preference_loss orpo"):
        ppo.PreferenceConfig(preference_loss="orpo", beta=0.3)
    with pytest.raises(UserError, match="--desirable_weight 0 with --undesirable_weight 0 teaches nothing"):
        ppo.PreferenceConfig(preference_loss="kto", desirable_weight=0, undesirable_weight=0)
    ppo.PreferenceConfig(preference_loss="kto", desirable_weight=0)
    free = [record.name for record in ppo.PREFERENCE_LOSSES if not record.needs_reference]
    assert free == ["simpo", "orpo"]


# ------------------------------------------------------------------------------------------- a step, by loops

RANKED = [([1, 2], [[3, END], [4, 5, END], [6, 7, 8, END]], [2, 1, 3]), ([6], [[8, END], [7, 7, 7, END]], [0, 2]),
          ([9, 9, 9], [[5, END], [5, 5, END], [1, END], [2, END]], [1, 1, 0, 4])]


def with_reference(examples, model):
    logp = ppo.answer_logprobs(role(model), examples).split([len(e[1]) for e in examples])
    return [(*example, x.tolist()) for example, x in zip(examples, logp)]


def naive_pair(name, cfg, w, v, rw, rv, nw, nv):
    """The loss of one pair, in Python's floats."""
    h = (w - rw) - (v - rv)
    if name == "dpo":
        return -math.log(sigmoid(cfg.beta * h))
    if name == "ipo":
        return (h - 1 / (2 * cfg.beta)) ** 2
    if name == "simpo":
        return -math.log(sigmoid(cfg.beta * (w / nw - v / nv) - cfg.simpo_gamma))
    odds = [p / (1 - p) for p in (math.exp(w / nw), math.exp(v / nv))]
    return -w / nw - cfg.orpo_lambda * math.log(sigmoid(math.log(odds[0] / odds[1])))


@pytest.mark.parametrize("name", ["dpo", "ipo", "simpo", "orpo"])
def test_a_step_is_the_mean_over_the_pairs_of_each_prompt(name):
    """In fp64, every pair of unequal ranks by a double loop; every metric, too."""
    cfg = ppo.PreferenceConfig(preference_loss=name)
    model, reference = gpt(1).double(), gpt(2).double()
    with torch.no_grad():
        examples = with_reference(RANKED, reference)
        loss, n, metrics = ppo.preference_step(role(model), examples, cfg)
        want = []
        for b, (prompt, answers, ranks, refs) in enumerate(examples):
            p = [total(model, prompt, y).item() for y in answers]
            pairs = [(i, j) for i in range(len(p)) for j in range(len(p)) if ranks[i] < ranks[j]]
            terms = [naive_pair(name, cfg, p[i], p[j], refs[i], refs[j], len(answers[i]), len(answers[j]))
                     for i, j in pairs]
            want.append(sum(terms) / len(terms))
            assert abs(metrics["chosen_logp"][b].item() - sum(p[i] for i, _ in pairs) / len(pairs)) < 1e-10
            assert abs(metrics["rejected_logp"][b].item() - sum(p[j] for _, j in pairs) / len(pairs)) < 1e-10
            if name in ("dpo", "ipo"):
                h = [p[i] - refs[i] - p[j] + refs[j] for i, j in pairs]
                assert abs(metrics["margin"][b].item() - 0.1 * sum(h) / len(h)) < 1e-10
                assert abs(metrics["accuracy"][b].item() - sum(x > 0 for x in h) / len(h)) < 1e-12
    assert n == 3 and abs(loss.item() - sum(want)) < 1e-10


def test_a_kto_step_is_the_mean_over_the_answers_of_each_prompt():
    cfg = ppo.PreferenceConfig(preference_loss="kto", desirable_weight=1.25, undesirable_weight=0.75)
    model, reference = gpt(1).double(), gpt(2).double()
    labels = [[True, False, False], [False, True], [True, True, False, True]]
    examples = [(prompt, answers, good) for (prompt, answers, _), good in zip(RANKED, labels)]
    with torch.no_grad():
        examples = with_reference(examples, reference)
        loss, n, metrics = ppo.preference_step(role(model), examples, cfg, z0=0.2)
        want, logp = [], {True: [], False: []}
        for b, (prompt, answers, good, refs) in enumerate(examples):
            terms, right = [], 0
            for y, label, ref in zip(answers, good, refs):
                logp[label].append(total(model, prompt, y).item())
                side = (1 if label else -1) * (0.1 * (logp[label][-1] - ref) - 0.2)
                terms.append((1.25 if label else 0.75) * (1 - sigmoid(side)))
                right += side > 0
            want.append(sum(terms) / len(terms))
            assert abs(metrics["accuracy"][b].item() - right / len(terms)) < 1e-12
    assert n == 3 and abs(loss.item() - sum(want)) < 1e-10
    assert max(abs(a - b) for a, b in zip(metrics["good_logp"].tolist(), logp[True])) < 1e-10
    assert max(abs(a - b) for a, b in zip(metrics["bad_logp"].tolist(), logp[False])) < 1e-10
    report = preference_report([metrics])
    assert report["prompts"] == 3 and abs(report["good_logp"] - sum(logp[True]) / 5) < 1e-10
    assert "bad_logp" not in preference_report([{**metrics, "bad_logp": torch.zeros(0)}])
    with torch.no_grad():                                           # z0 is 0 unless it is given
        zero = ppo.kto_step(role(model), examples, cfg, 0.0)[0].item()
        for step in (ppo.preference_step, ppo.kto_step):
            assert step(role(model), examples, cfg)[0].item() == zero != loss.item()
    with pytest.raises(UserError, match="--preference_loss kto needs a reference"):
        ppo.preference_step(role(model), [e[:3] for e in examples], cfg)
    for answers, good in (([[1, END], [2, END]], [True]), ([], [])):
        with pytest.raises(UserError, match=f"example 0 has {len(answers)} answers and {len(good)} labels"):
            ppo.preference_step(role(model), [([1], answers, good, [-1.0] * len(answers))], cfg)


def test_mismatched_log_ratios_by_a_loop():
    model, reference = gpt(1).double(), gpt(2).double()
    with torch.no_grad():
        pairs = with_reference([([1, 2], [[3, END], [4, 5, END]]), ([6], [[8, END]])], reference)
        sum_, count = ppo.mismatched_log_ratios(role(model), [*pairs, ([5], (), ())])
        want = sum(total(model, x, y).item() - total(reference, x, y).item() for x, some, _ in pairs for y in some)
    assert count == 3 and abs(sum_ - want) < 1e-10
    assert ppo.mismatched_log_ratios(role(model), [([5], (), ())]) == (0.0, 0)


@pytest.mark.parametrize("name", LOSSES)
def test_a_step_does_not_depend_on_how_it_is_cut(name):
    """One by one, or together with a longer example that pads them: the same losses and gradients."""
    cfg = ppo.PreferenceConfig(preference_loss=name)
    model = gpt(3)
    examples = RANKED
    if name == "kto":
        examples = [(prompt, answers, [rank < 2 for rank in ranks]) for prompt, answers, ranks in RANKED]
    with torch.no_grad():
        examples = with_reference(examples, gpt(4))
    grads, losses = [], []
    for parts in ([examples], [[e] for e in examples], [examples[:1], examples[1:]]):
        model.zero_grad()
        done = [ppo.preference_step(role(model), part, cfg, 0.1) for part in parts]
        sums = [loss for loss, _, _ in done]
        assert not any(x.requires_grad for _, _, metrics in done for x in metrics.values())
        sum(sums).backward()
        losses.append(sum(sums).item())
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    for loss, grad in zip(losses[1:], grads[1:]):
        assert abs(loss - losses[0]) < 1e-5
        torch.testing.assert_close(grad, grads[0], atol=1e-5, rtol=1e-4)


def test_a_pair_counts_as_much_as_a_ranking_of_nine():
    cfg = ppo.PreferenceConfig(preference_loss="simpo", beta=1e-6, simpo_gamma=0.0)     # every pair: log 2
    nine = ([1], [[n, END] for n in range(1, 10)], list(range(9)))
    loss, n, _ = ppo.preference_step(role(gpt()), [nine, RANKED[1]], cfg)
    assert n == 2 and abs(loss.item() - 2 * math.log(2)) < 1e-4


# ------------------------------------------------------------------------------------------- rows and examples

THUMBS = {
    "TRL": dict(prompt="Hi", completion="Ho", label=True),
    "TRL, messages": dict(prompt=[dict(role="user", content="Hi")],
                          completion=[dict(role="assistant", content="Ho")], label=True),
    "response": dict(prompt="Hi", response="Ho", label=True),
    "a word": dict(prompt="Hi", completion="Ho", label="True"),
    "a number": dict(prompt="Hi", completion="Ho", label=1),
    "kto_tag": dict(messages=[dict(role="user", content="Hi"), dict(role="assistant", content="Ho")], kto_tag=True),
    "kto_tag, ShareGPT": dict(conversations=[{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}],
                              kto_tag="true"),
    "kto_tag, Alpaca": dict(instruction="Hi", input="", output="Ho", kto_tag=True),
}


def read(folder, rows, name="data.jsonl"):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return formats.load(str(folder / name))


@pytest.mark.parametrize("name", THUMBS)
def test_thumbs_are_read(name, tmp_path):
    data = read(tmp_path, [THUMBS[name], {**THUMBS[name], "label": 0} if "label" in THUMBS[name] else
                           {**THUMBS[name], "kto_tag": False}])
    assert data.row_type == "thumbs" and "not read" not in data.format
    for row, label in zip(data.rows, (True, False)):
        assert {k: v for k, v in row.items() if k != "line"} == dict(
            prompt=[dict(role="user", content="Hi")], completion="Ho", label=label)
    again = read(tmp_path, [json.loads(formats.row_json(row)) for row in data.rows], "again.jsonl")
    assert [row["label"] for row in again.rows] == [True, False]           # what --task check --write writes


def test_thumbs_in_a_table(tmp_path):
    (tmp_path / "d.csv").write_text("prompt,completion,label\nHi,Ho,TRUE\nHi,Hm,false\n")
    assert [row["label"] for row in formats.load(str(tmp_path / "d.csv")).rows] == [True, False]


@pytest.mark.parametrize("label", ["spam", 2, None, 0.5, ["a"], "", -1])
def test_a_label_that_is_no_thumb_is_an_error_that_names_how(label, tmp_path):
    with pytest.raises(DataError) as e:
        read(tmp_path, [dict(prompt="Hi", completion="Ho", label=label)])
    assert 'it is true (thumbs up) or false (thumbs down)' in str(e.value)
    assert 'a text to classify has the keys text and label' in str(e.value) and "data.jsonl:1" in str(e.value)


def test_a_text_with_a_label_is_still_classified(tmp_path):
    assert read(tmp_path, [dict(text="Hi", label=True)]).row_type == "label"
    data = read(tmp_path, [dict(prompt="Hi", completion=" ", label=True), THUMBS["TRL"]], "b.jsonl")
    assert len(data.rows) == 1 and "with an empty answer" in data.dropped


def text_of(town, template="plain"):                                # noqa: F811
    return Text(Tokenizer.from_pretrained(town / "base"), template)


def test_a_thumb_as_ids(town):                                      # noqa: F811
    text = text_of(town)
    row = dict(prompt=[dict(role="user", content="ab")], completion="cd", label=False, line="x:1")
    example, cut = text.ranking(row, 100)
    assert not cut and example.good == [False] and len(example.answers) == 1 and targets(example) == 1
    assert text.decode_answer(example.answers[0]) == "cd" and example.answers[0][-1] == text.end_token
    assert size(example) == len(example.prompt) + len(example.answers[0])
    (title, ids, mask), = display(example)
    assert title == " a bad answer" and ids == example.prompt + example.answers[0]
    assert sum(mask) == len(example.answers[0]) and mask[-1]
    assert display(example._replace(good=[True]))[0][0] == " a good answer"
    example, cut = text.ranking({**row, "completion": "c" * 200}, 40)
    assert cut and len(example.prompt) + len(example.answers[0]) == 40
    assert text.references(row) == ["not: cd"] and text.references({**row, "label": True}) == ["cd"]
    assert [turn["content"] for turn in text.turns(row)] == ["ab", "cd"]


def test_rankings_as_thumbs():
    def labels(ranks):
        got = as_thumbs(Ranking([1], [[n] for n in range(len(ranks))], ranks))
        return dict(zip([y[0] for y in got.answers], got.good))
    assert labels([0, 2]) == {0: True, 1: False} and labels([3, 1]) == {0: False, 1: True}
    assert labels([1, 2, 3]) == {0: True, 2: False}                 # the middle wins as many as it loses
    assert labels([1, 1, 2]) == {0: True, 1: True, 2: False}
    assert labels([1, 2, 3, 4]) == {0: True, 1: True, 2: False, 3: False}
    thumbs = Thumbs([1], [[2]], [True])
    assert as_thumbs(thumbs) is thumbs


def test_the_answers_to_other_prompts():
    """Half the data further on: each once, good ones with bad ones; never behind their own prompt."""
    def partners(*prompts):
        return [[y[0] for y in some] for some in mismatched([Thumbs([p], [[i]], [True]) for i, p in enumerate(prompts)])]
    assert partners(1, 2, 3) == [[1], [2], [0]] and partners(1, 1, 2, 2) == [[2], [3], [0], [1]]
    assert partners(1, 2, 1, 3) == [[3], [3], [1], [1]]             # of equal prompts the next one further on
    assert partners(1, 1, 2, 2, 1) == [[2], [3], [4], [0], [2]]
    assert partners(7, 7) == [[], []] and partners(7) == [[]] and partners() == []
    got = mismatched([Thumbs([1], [[5], [6]], [True, False]), Thumbs([2], [[7]], [True])])
    assert got == [([7],), ([5], [6])]


def pair_row(chosen, rejected, **more):
    return dict(prompt=[dict(role="user", content="ab")], chosen=chosen, rejected=rejected, line="x:1", **more)


def test_equal_answers_are_no_comparison(town):                     # noqa: F811
    text = text_of(town)
    assert text.ranking(pair_row(" X", "X"), 100)[0].answers[0] == text.ranking(pair_row(" X", "X"), 100)[0].answers[1]
    assert distinct(text, pair_row(" X", "X"), 100) is None
    fine = pair_row("X", "XY")
    assert distinct(text, fine, 100) is fine
    long = pair_row("c" * 60 + "a", "c" * 60 + "b")
    assert distinct(text, long, 40) is None and distinct(text, long, 200) is long
    ranked = dict(prompt=fine["prompt"], responses=["b", "a", " a", "c"], rank=[2, 1, 3, 4], line="x:2")
    kept = distinct(text, ranked, 100)
    assert kept["responses"] == ["a", "b", "c"] and kept["rank"] == [1, 2, 4]
    assert ranked["rank"] == [2, 1, 3, 4]                           # the row itself is as it was
    tied = dict(ranked, responses=["a", " a", "c"], rank=[1, 1, 2])
    assert distinct(text, tied, 100) is tied                        # equal ranks: no comparison that is lost
    assert distinct(text, dict(ranked, responses=["a", " a", " a"], rank=[1, 2, 2]), 100) is None
    for row in (dict(prompt=fine["prompt"]), dict(text="a"), dict(THUMBS["TRL"], line="x:3")):
        assert distinct(text, row, 100) is row


@pytest.mark.parametrize("task", ["dpo", "reward"])
def test_equal_answers_are_dropped_and_counted(task, town, tmp_path, capsys):       # noqa: F811
    good = [{"prompt": f"{a}{b}", "chosen": "aa", "rejected": "b"} for a in "abcdefgh" for b in "ab"]
    equal = [{"prompt": c, "chosen": " X", "rejected": "X"} for c in "abc"]
    write(tmp_path, {"d": [*equal, *good], "none": equal, "votes": [dict(good[0], votes_for=1, votes_against=4), *good]})
    few = ["--steps", "1", "--batch", "4", "--forgetting_data", "none", "--template", "plain"]
    r = go(town, tmp_path / "r", "--task", task, "--data", tmp_path / "d", *few)
    err = capsys.readouterr().err
    assert "train: 3 rows are dropped, 0 lose an answer, because two of their answers are equal as tokens" in err
    assert "d/train.jsonl:1 is the first" in err and "test: 1 rows are dropped" in err
    assert r["metrics"]["prompts" if task == "dpo" else "pairs"] == 2 and len(r["samples"]) == 2
    go(town, tmp_path / "n", "--task", task, "--data", tmp_path / "none", *few, code=65)
    assert "0 usable examples in train: the answers of all 3 rows are equal as tokens" in capsys.readouterr().err
    go(town, tmp_path / "v", "--task", task, "--data", tmp_path / "votes", *few)
    assert "1 pairs have more votes against chosen than for it" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- through the command

@pytest.fixture(scope="module")
def thumbs(town):                                                   # noqa: F811
    """toy rows of thumbs: "aa" is good, "b" is bad; two rows for each of 32 prompts."""
    rows = [{"prompt": f"{a}{b}", "completion": answer, "label": label} for a in "abcdefgh" for b in "abcd"
            for answer, label in (("aa", True), ("b", False))]
    write(town, {"thumbs": rows}, every=5)
    return town / "thumbs"


DPO = ["--task", "dpo", "--batch", "8", "--forgetting_data", "none", "--rank", "2", "--lr", "1e-2"]


@pytest.mark.parametrize("name, data", [("simpo", "ranked"), ("orpo", "pairs"), ("ipo", "pairs"), ("kto", "thumbs"),
                                        ("kto", "ranked"), ("kto", "pairs")])
def test_every_loss_learns(name, data, town, thumbs, tmp_path, capsys):             # noqa: F811
    r = go(town, tmp_path / "r", *DPO, "--preference_loss", name, "--data", town / data, "--steps", "25")
    before, after = r["baseline_metrics"], r["metrics"]
    assert after["accuracy"] > 0.9 and after["loss"] < 0.8 * before["loss"] and r["skipped"] == 0
    assert set(before) == set(after)
    if name in ("ipo", "kto"):
        assert before["accuracy"] == 0.5 and before["margin"] == 0          # the policy is its reference
    if name == "kto":
        assert abs(before["loss"] - 0.5) < 1e-6 and before["z0"] == 0 and after["z0"] >= 0
    out = capsys.readouterr().out
    for what in ("good_logp", "bad_logp") if name == "kto" else ("chosen_logp", "rejected_logp"):
        line, = (line for line in out.splitlines() if line.startswith(what))
        assert line.endswith("  nats per answer") and len(line.split()) == 6        # before, after
    line, = (line for line in out.splitlines() if line.startswith("accuracy "))
    n = after["prompts"]
    low, high = (float(x) for x in line.split("[")[1].rstrip("]").split(","))
    p = after["accuracy"]
    assert low <= p <= high + 1e-3 and 0.05 < high - low and n == len(formats.load(str(town / data), "test").rows)


@pytest.mark.parametrize("name", LOSSES)
def test_reference_free_losses_run_no_reference(name, town, tmp_path, monkeypatch):         # noqa: F811
    passes = []
    original = ppo.answer_logprobs
    monkeypatch.setattr(ppo, "answer_logprobs", lambda *a: passes.append(1) or original(*a))
    cfg = train.parse(["--task", "dpo", "--preference_loss", name])
    ctx = train.open_context(train.parse(["--task", "dpo", "--init", str(town / "base"), "--method", "full",
                                          "--data", str(town / "pairs")]))
    rows = formats.load(str(town / "pairs"), "train").rows[:5]
    examples = train.prepare_preferences(ctx, cfg, [ctx.text.ranking(row, 100)[0] for row in rows])
    free = name in ("simpo", "orpo")
    assert bool(passes) is not free and all(bool(e.reference) is not free for e in examples)


def test_thumbs_are_for_kto_alone(town, thumbs, tmp_path, capsys):                  # noqa: F811
    go(town, tmp_path / "r", *DPO, "--data", thumbs, code=65)
    assert ("holds thumbs rows, answers without a partner; --preference_loss dpo reads pairs or ranked rows; "
            "--preference_loss kto reads thumbs rows") in capsys.readouterr().err
    go(town, tmp_path / "s", "--data", thumbs, code=65)
    assert "thumbs rows are for --task dpo" in capsys.readouterr().err


def test_thumbs_hold_prompts_for_rl(town, thumbs, tmp_path):         # noqa: F811
    r = go(town, tmp_path / "s", "--task", "sample", "--data", thumbs, "--reward", "judges:letters",
           "--num_generations", "2", "--max_new_tokens", "2", "--eval_items", "2")
    assert r["status"] == "done" and "score" in r["metrics"]


def test_votes_against_chosen_are_advice(town):                     # noqa: F811
    rows = [pair_row("a", "b", votes_for=4, votes_against=1), pair_row("a", "b", votes_for=1, votes_against=4),
            pair_row("a", "b", votes_for=2, votes_against=2), pair_row("a", "b")]
    assert formats.outvoted(rows) == rows[1:2]
    advice = list(advice_on_rows(rows, "pairs", 0, 0, 0))
    assert advice[0].startswith("1 pairs have more votes against chosen than for it (x:1 is the first)")
    assert not any("votes" in line for line in advice_on_rows(rows[:1], "pairs", 0, 0, 0))


def test_check_and_dry_run_show_thumbs(town, thumbs, tmp_path, capsys):             # noqa: F811
    assert train.main(["--task", "check", "--data", str(thumbs), "--init", str(town / "base"), "--steps", "2",
                       "--forgetting_data", "none"]) == 0
    out = capsys.readouterr().out
    assert "thumbs rows, for --task dpo" in out and "balance:  good 32 (50.0%)  bad 32 (50.0%)" in out
    assert "--preference_loss kto" in out and "steps" in out
    assert train.main([*DPO, "--preference_loss", "kto", "--data", str(thumbs), "--init", str(town / "base"),
                       "--steps", "2", "--dry_run", "--out", str(tmp_path / "r")]) == 0
    out = capsys.readouterr().out
    assert "[[supervised]] a good answer" in out and "[[supervised]] a bad answer" in out
    assert "[[aa" in out and "[[b" in out


def test_the_old_name_of_beta(capsys):
    assert train.main(["--task", "dpo", "--dpo_beta", "0.3"]) == 2
    assert capsys.readouterr().err == "train.py: --dpo_beta is now called --beta\n"


def test_help_shows_the_defaults_of_the_loss(capsys):
    shown = {}
    for name in LOSSES:
        with pytest.raises(SystemExit):
            train.main(["--task", "dpo", "--preference_loss", name, "--help"])
        shown[name] = " ".join(capsys.readouterr().out.split())
    assert "--beta BETA" in shown["simpo"] and "of SimPO, its scale (default 2.0)" in shown["simpo"]
    assert "--beta BETA" not in shown["orpo"] and "--orpo_lambda" in shown["orpo"]
    assert "--simpo_gamma" not in shown["kto"] and "--undesirable_weight" in shown["kto"]


@pytest.mark.parametrize("name, data", [("kto", "thumbs"), ("kto", "ranked"), ("orpo", "ranked")])
def test_micro_batches_change_no_gradient(name, data, town, thumbs, tmp_path):      # noqa: F811
    """z0 is that of the whole step: the same weights whether a step is one micro-batch or many."""
    words = [*DPO, "--preference_loss", name, "--data", town / data, "--steps", "3", "--grad_clip", "0"]
    for out, tokens in (("whole", "100000"), ("cut", "1")):
        go(town, tmp_path / out, *words, "--micro_batch_tokens", tokens)
    a, b = (weights(tmp_path / out) for out in ("whole", "cut"))
    for key in a:
        torch.testing.assert_close(a[key], b[key], atol=2e-4, rtol=1e-3)
    for x, y in zip(events(tmp_path / "whole"), events(tmp_path / "cut")):
        assert abs(x["loss"] - y["loss"]) < 1e-4


def test_z0_of_a_step_by_a_loop(town, thumbs):                      # noqa: F811
    """After the policy has moved: beta times the mean log-ratio of each prompt with the answer half the data
    further on, whatever the micro-batches; and the loss reads it."""
    cfg = train.parse(["--task", "dpo", "--preference_loss", "kto", "--method", "full", "--init",
                       str(town / "base"), "--data", str(thumbs), "--beta", "0.7"])
    ctx = train.open_context(cfg)
    rows = formats.load(str(thumbs), "train").rows[:12:2]           # all good, other prompts
    examples = train.prepare_preferences(ctx, cfg, [ctx.text.ranking(row, 100)[0] for row in rows])
    reference = copy.deepcopy(ctx.model)
    torch.manual_seed(0)
    for p in ctx.model.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    with torch.no_grad():
        ratios = [(total(ctx.model, a.prompt, b.answers[0]) - total(reference, a.prompt, b.answers[0])).item()
                  for a, b in zip(examples, examples[3:] + examples[:3])]
    mean = sum(ratios) / len(ratios)
    want = max(0.0, 0.7 * mean)
    found = []
    for batches in ([examples], [[e] for e in examples], [examples[:2], examples[2:]]):
        found += [batch[0].z0 for batch in train.add_z0(ctx, cfg, batches, [], None)]
    assert max(abs(z0 - want) for z0 in found) < 1e-4
    flipped = [e._replace(mismatched_reference=tuple(x - 100 for x in e.mismatched_reference)) for e in examples]
    (moved,), = train.add_z0(ctx, cfg, [flipped[:1]], [], None)
    assert moved.z0 > 50                                            # above 0: it is read from the reference
    loss = train.preference_loss(ctx, cfg, [moved], None).item()
    h = (total(ctx.model, moved.prompt, moved.answers[0]) - total(reference, moved.prompt, moved.answers[0])).item()
    assert abs(loss - (1 - sigmoid(0.7 * h - moved.z0))) < 1e-4


@pytest.mark.parametrize("name, data", [("dpo", "ranked"), ("simpo", "pairs"), ("orpo", "ranked"), ("ipo", "pairs"),
                                        ("kto", "thumbs")])
def test_resume_is_bit_exact(name, data, town, thumbs, tmp_path, monkeypatch):      # noqa: F811
    """Cut in the forward of step 3 of 4."""
    words = [*DPO, "--preference_loss", name, "--data", town / data, "--steps", "4", "--dropout", "0.1", "--save_every", "1",
             "--eval_every", "9"]
    go(town, tmp_path / "whole", *words)
    original, calls = ppo.preference_step, []

    def cut(*args):
        calls.append(torch.is_grad_enabled())
        if sum(calls) == 3 and torch.is_grad_enabled():
            raise Stop
        return original(*args)
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(ppo, "preference_step", cut)
        go(town, tmp_path / "cut", *words)
    assert torch.load(tmp_path / "cut" / "state.pt", weights_only=True)["counters"]["step"] == 2
    go(town, tmp_path / "cut", *words)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    a, b = ([e["loss"] for e in events(tmp_path / which)] for which in ("whole", "cut"))
    assert a == b and len(a) == 4


# ------------------------------------------------------------------------------------------- the point aimed at

def small(seed=0):
    """40 answers to one prompt, a table of logits, and the pairs."""
    task, policy = optimum.tabular(seed, R=3)
    return task, policy, optimum.Pairs(task)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_reaches_the_point_that_it_aims_at(name):
    """With exact expectations, from the reference; dpo's is pi*, the others' is not."""
    task, policy, pairs = small()
    cfg = optimum.config(name)
    pairs.train(cfg, policy, steps=200, lr=0.3)
    to_star, to_aim, reward, kl = optimum.measures(task, task.law(policy), pairs.aim(cfg))
    start = optimum.measures(task, task.log_ref, pairs.aim(cfg))
    assert to_aim < 0.01 and start[1] > 0.1 and reward > start[2] + 0.1
    assert to_star < 0.01 if name == "dpo" else to_star > 0.1


def test_the_aims_agree_with_closed_forms():
    """simpo without a margin: a score per token; orpo without odds: P(chosen) over the length; kto: stationary."""
    task, _, pairs = small(1)
    cfg = optimum.config("simpo", simpo_gamma=0.0)
    log_pi = pairs.aim(cfg)[0]
    per_token = log_pi / pairs.length - task.scores[0] / cfg.beta
    assert per_token.std() < 1e-6 and abs(log_pi.exp().sum() - 1) < 1e-9
    log_pi = pairs.aim(optimum.config("orpo", orpo_lambda=0.0))[0]
    want = pairs.good[0] / pairs.length
    assert (log_pi.exp() - want / want.sum()).abs().max() < 1e-5
    cfg = optimum.config("kto")
    theta = pairs.aim(cfg).clamp(min=-60).requires_grad_()
    pairs.loss(cfg, theta.log_softmax(1)).backward()
    assert theta.grad.abs().max() < 1e-6
    assert (pairs.aim(cfg)[0].exp() < 1e-9).equal(pairs.good[0] <= pairs.bad[0])


# ------------------------------------------------------------------------------------------- TRL's numbers

def test_the_losses_are_trls():
    """On log-probabilities in fp64 (make_preference_fixtures.py). TRL's ipo may average over tokens, its orpo also
    trains on the prompt, its simpo takes gamma / beta off the difference: the same numbers on the same inputs."""
    x = {name: torch.from_numpy(value) for name, value in np.load(TRL).items()}
    pair = [x[name] for name in ("chosen", "rejected", "ref_chosen", "ref_rejected")]
    mean = x["chosen"] / x["chosen_length"], x["rejected"] / x["rejected_length"]
    z0 = ppo.kto_z0((x["kl"] - x["ref_kl"]).sum().item(), 16, 0.3)
    assert abs(z0 - 0.3 * x["kl_mean"].item()) < 1e-12 and z0 > 0
    kto = [ppo.kto_loss(pair[i] - pair[i + 2], torch.full((16,), i == 0), z0, 0.3, 1.25, 0.75)[0] for i in (0, 1)]
    ours = {"dpo": ppo.dpo_loss(*pair, beta=0.3)[0], "cdpo": ppo.dpo_loss(*pair, beta=0.3, label_smoothing=0.2)[0],
            "ipo": ppo.ipo_loss(*pair, beta=0.3)[0], "simpo": ppo.simpo_loss(*mean, beta=2.0, gamma=0.7)[0],
            "odds": -mean[0] - ppo.orpo_loss(*mean, weight=0.25)[0], "kto_good": kto[0], "kto_bad": kto[1]}
    for name, loss in ours.items():
        assert (loss - x[name]).abs().max() < 1e-12, name


@pytest.mark.parametrize("method", ["full", "ia3", "p_tuning_v2", "prompt_tuning"])
def test_kto_with_other_methods(method, town, thumbs, tmp_path):    # noqa: F811
    """The reference and z0 also where all weights, or a soft prompt, are trained: both begin at 0."""
    soft = ["--num_virtual_tokens", "2"] if "tuning" in method else []
    rate = "1e-3" if method == "full" else "3e-2"
    r = go(town, tmp_path / "r", "--task", "dpo", "--preference_loss", "kto", "--data", thumbs, "--method", method,
           "--steps", "6", "--batch", "8", "--forgetting_data", "none", "--lr", rate, *soft)
    assert abs(events(tmp_path / "r")[0]["loss"] - 0.5) < 1e-5
    assert r["metrics"]["loss"] < r["baseline_metrics"]["loss"] and r["skipped"] == 0


@pytest.mark.parametrize("votes, ranks", [((1, 4), [0, 1]), ((2, 2), [0, 1]), ((4, 1), [0, 3])])
def test_chosen_is_better_whatever_the_votes(votes, ranks, town):                             # noqa: F811
    text = Text(Tokenizer.from_pretrained(town / "base"), "plain")
    row = {"prompt": [{"role": "user", "content": "a"}], "chosen": "b", "rejected": "c",
           "votes_for": votes[0], "votes_against": votes[1]}
    assert text.ranking(row, 100)[0].ranks == ranks
