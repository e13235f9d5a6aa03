"""pass@k, mean@n, majority@n: against the enumeration of subsets, and through --task eval and --task sample."""
import itertools
import json
import math
import statistics
import sys

import pytest
import torch

import train
from data.batches import few_shot
from data.results import evaluate, generations, pass_at_k, plots, runs
from data.results.metrics import wilson
from data.runtime.files import UserError, read_json
from test_table import make, refused, shown
from test_train import world  # noqa: F401
from tiny import ROWS, write


# ------------------------------------------------------------------------------------------------- equations

def enumerated(n, c, k):
    """The share of the subsets of k answers in which one is right, by listing them."""
    answers = [i < c for i in range(n)]
    subsets = list(itertools.combinations(answers, k))
    return sum(map(any, subsets)) / len(subsets)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(n):
    for c in range(n + 1):
        curve = pass_at_k.pass_curve(n, c)
        assert len(curve) == n
        for k in range(1, n + 1):
            assert abs(curve[k - 1] - enumerated(n, c, k)) < 1e-12, (n, c, k)
            assert pass_at_k.pass_at_k(n, c, k) == curve[k - 1]


def test_pass_at_k_by_hand_and_where_binomials_overflow_a_float():
    assert pass_at_k.pass_at_k(4, 2, 2) == pytest.approx(5 / 6, abs=1e-15)         # 1 - C(2, 2) / C(4, 2)
    assert pass_at_k.pass_at_k(10, 3, 5) == pytest.approx(1 - 21 / 252, abs=1e-15)
    for n, c, k in ((3000, 7, 1500), (3000, 1, 1), (3000, 2000, 3), (3000, 0, 3000)):
        exact = 1 - math.comb(n - c, k) / math.comb(n, k)
        assert abs(pass_at_k.pass_at_k(n, c, k) - exact) < 1e-10, (n, c, k)
    for wrong in ((4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)):
        with pytest.raises(ValueError, match="k goes from 1 to 4"):
            pass_at_k.pass_at_k(*wrong)


def test_pass_at_k_is_unbiased():
    """Over all outcomes of n coins, its mean is 1 - (1 - p)^k; the naive 1 - (1 - c/n)^k is not."""
    p = 0.3
    n = 6
    chances = [math.comb(n, c) * p ** c * (1 - p) ** (n - c) for c in range(n + 1)]
    for k in range(1, n + 1):
        mean = sum(chance * pass_at_k.pass_at_k(n, c, k) for c, chance in enumerate(chances))
        assert abs(mean - (1 - (1 - p) ** k)) < 1e-12
    naive = sum(chance * (1 - (1 - c / n) ** 3) for c, chance in enumerate(chances))
    assert abs(naive - (1 - (1 - p) ** 3)) > 0.02


@pytest.mark.parametrize("texts, right, value", [
    (["a", "b", "a"], [1, 0, 1], 1), (["a", "b", "b"], [1, 0, 0], 0),
    (["a", " a\n", "a  ", "b", "b"], [0, 0, 0, 1, 1], 0),               # white space is no difference
    (["a", "b"], [1, 0], 0.5), (["a", "b", "c"], [0, 1, 0], 1 / 3),     # ties: the share that is right
    (["a", "a", "b", "b", "c"], [1, 1, 0, 0, 1], 0.5), (["A", "a", "a"], [1, 0, 0], 0),
    (["x"], [1], 1)])
def test_majority_by_hand(texts, right, value):
    assert pass_at_k.majority(texts, right) == pytest.approx(value, abs=1e-15)


def test_generations_of_three_prompts_by_hand():
    texts = [["a", "a", "b", "c"], ["x", "y", "x", "y"], ["q", "q", "q", "q"]]
    scores = [[1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 1.0, 0.0], [0.0] * 4]
    found = pass_at_k.generations_of(texts, scores)
    assert found == {"n": 4, "mean": [0.5, 0.5, 0.0], "right": [2, 2, 0], "majority": [1.0, 0.5, 0.0]}
    m = pass_at_k.metrics_of(found)
    assert m == pytest.approx({"pass@1": 1 / 3, "pass@2": 5 / 9, "pass@3": 2 / 3, "pass@4": 2 / 3, "majority@4": 0.5,
                               "mean@4": 1 / 3}, abs=1e-15)
    assert pass_at_k.prompt_values(found, "pass@2") == pytest.approx([5 / 6, 5 / 6, 0])
    assert pass_at_k.prompt_values(found, "majority@4") == [1.0, 0.5, 0.0]
    for name in ("pass@5", "pass@0", "mean@3", "exact_match", "pass@", "pass@x"):
        assert pass_at_k.prompt_values(found, name) is None
    graded = pass_at_k.generations_of(texts, [[0.5, 0.0, 1.0, 1.0]] * 3)
    assert graded.keys() == {"n", "mean"} and pass_at_k.metrics_of(graded) == {"mean@4": 0.625}


def test_intervals_over_prompts_by_hand():
    values = [0.5, 0.5, 0.0, 1.0]
    half = 3.1824 * statistics.stdev(values) / 2                        # t of 3 degrees of freedom
    assert pass_at_k.interval(values) == pytest.approx((max(0, 0.5 - half), min(1, 0.5 + half)), abs=1e-9)
    assert pass_at_k.interval([2.0, 5.0], proportion=False) == pytest.approx((3.5 - 12.7062 * 1.5, 3.5 + 12.7062 * 1.5))
    assert pass_at_k.interval([1, 1, 0, 1]) == wilson(3, 4)             # all 0 or 1: Student would give 1 +- 0
    assert pass_at_k.interval([1.0] * 20)[0] < 0.9
    assert all(map(math.isnan, pass_at_k.interval([0.3])))


def test_the_screen_shows_powers_of_two_and_the_last():
    metrics = {f"pass@{k}": 0.0 for k in range(1, 13)}
    assert [name for name in metrics if pass_at_k.is_shown(name, metrics)] == \
        ["pass@1", "pass@2", "pass@4", "pass@8", "pass@12"]
    assert pass_at_k.is_shown("loss", {"loss": 1.0}) and pass_at_k.is_shown("mean@12", metrics)


# ----------------------------------------------------------------------------------------------- the command

@pytest.fixture(scope="module")
def town(world):                                                        # noqa: F811
    """The base of the quick tests, tuned for a few steps; rewards of 0 and 1, and graded ones."""
    write(world, {"asked": [{"prompt": a + b} for a in "abcdefgh" for b in "ab"],
                  "pairs": [{"prompt": a, "chosen": a, "rejected": "x"} for a in "abcdefgh"],
                  "tags": ROWS["tags"]}, every=1)
    (world / "verdicts.py").write_text(
        "def right(prompt, answer):\n    return float(answer.strip()[:1] == prompt[0])\n"
        "def graded(prompt, answer):\n    return len(answer) / 10\n")
    if str(world) not in sys.path:
        sys.path.insert(0, str(world))
    if not (world / "tuned" / "result.json").exists():
        words = ["--data", world / "chat", "--steps", "40", "--lr", "3e-2", "--forgetting_data", "none",
                 "--eval_every", "40", "--max_new_tokens", "4"]
        run(world, world / "tuned", *words, "--init", world / "base")
    return world


def run(town, out, *words, code=0):
    words = list(map(str, words))
    init = [] if "--init" in words else ["--init", str(town / "tuned")]
    assert train.main([*init, "--out", str(out), *words]) == code
    return read_json(out / "result.json") if code == 0 else None


def eval_words(town, n):
    return ["--task", "eval", "--data", town / "chat", "--num_generations", n, "--max_new_tokens", "4"]


def test_eval_samples_n_answers_and_keeps_the_greedy_metrics(town, tmp_path, capsys):
    greedy = run(town, tmp_path / "g", "--task", "eval", "--data", town / "chat", "--max_new_tokens", "4")
    assert "generations" not in greedy and not any("@" in name for name in greedy["metrics"])
    capsys.readouterr()
    r = run(town, tmp_path / "s", *eval_words(town, 6))
    m = r["metrics"]
    assert all(m[name] == greedy["metrics"][name] for name in greedy["metrics"])
    assert r["item_correct"] == greedy["item_correct"]
    assert [name for name in m if "@" in name] == [*(f"pass@{k}" for k in range(1, 7)), "majority@6", "mean@6"]
    right = r["generations"]["right"]
    assert len(right) == len(r["item_correct"]) and 0 < sum(right) < 6 * len(right)
    for k in (1, 3, 6):
        naive = statistics.fmean(enumerated(6, c, k) for c in right)
        assert abs(m[f"pass@{k}"] - naive) < 1e-12
    assert m["mean@6"] == pytest.approx(m["pass@1"], abs=1e-12)
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith(("pass@", "mean@", "majority@"))]
    assert [line.split()[0] for line in lines] == ["pass@1", "pass@2", "pass@4", "pass@6", "majority@6", "mean@6"]
    low, high = pass_at_k.interval(pass_at_k.prompt_values(r["generations"], "pass@2"))
    assert lines[1].endswith(f"any of 2 right, 95 %: [{low:.3f}, {high:.3f}]")
    assert "pass@5" not in out and max(map(len, lines)) <= 80


def test_right_is_exact_match_against_any_reference(town, tmp_path, monkeypatch):
    monkeypatch.setattr(generations, "sample_generations", lambda ctx, prompts, n, seed, **_: [
        [list(text.encode()) for text in ("a", " a ", "b")] for _ in prompts])
    rows = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}]}
            for answer in ("a", "b", "c")]
    ctx = train.open_context(train.parse(["--task", "eval", "--init", str(town / "tuned")]))
    cfg = train.parse(["--task", "eval", "--num_generations", "3", "--init", str(town / "tuned")])
    m, found = generations.evaluate_generations(ctx, cfg, rows)
    assert found["right"] == [2, 1, 0] and found["majority"] == [1.0, 0.0, 0.0]
    assert m["pass@2"] == pytest.approx((1 + 2 / 3) / 3)


def test_answers_do_not_depend_on_batches_items_or_n(town):
    cfg = train.parse(["--task", "eval", "--init", str(town / "tuned"), "--max_new_tokens", "6"])
    ctx = train.open_context(cfg)
    prompts = [ctx.text.prompt_ids({"prompt": a + b, "messages": [{"role": "user", "content": a + b}]}, limit=100)
               for a in "abcd" for b in "ab"]
    whole = generations.sample_generations(ctx, prompts, 4, 1, temperature=1.3)
    ctx.micro_batch_tokens = 8
    assert generations.sample_generations(ctx, prompts, 4, 1, temperature=1.3) == whole
    assert generations.sample_generations(ctx, prompts[:3], 2, 1, temperature=1.3) == [some[:2] for some in whole[:3]]
    assert generations.sample_generations(ctx, prompts, 4, 2, temperature=1.3) != whole
    assert len({tuple(y) for y in whole[0]}) > 1
    assert generations.sample_generations(ctx, prompts, 2, 1, temperature=1.3, top_k=1) == \
        [[y, y] for y in evaluate.sample(ctx, prompts)]


def test_the_same_command_gives_the_same_numbers(town, tmp_path):
    a = run(town, tmp_path / "a", *eval_words(town, 3), "--temperature", "0.7", "--top_p", "0.9")
    b = run(town, tmp_path / "b", *eval_words(town, 3), "--temperature", "0.7", "--top_p", "0.9",
            "--micro_batch_tokens", "64")
    other = run(town, tmp_path / "c", *eval_words(town, 3), "--seed", "2")
    assert a["generations"] == b["generations"] and other["generations"] != a["generations"]


@pytest.mark.parametrize("words, says", [
    (["--num_generations", "1", "--temperature", "0.7"], "--temperature is for sampled answers"),
    (["--top_p", "0.9"], "--top_p is for sampled answers"),
    (["--num_generations", "4", "--temperature", "0"], "gives --num_generations 4 equal answers"),
    (["--num_generations", "0"], "--num_generations 0 is out of range"),
    (["--num_generations", "4", "--shots", "0,2"], "give one"),
    (["--num_generations", "4", "--data", "label"], "labels are chosen by their probability"),
    (["--num_generations", "4", "--data", "text"], "the loss of raw text is measured"),
    (["--num_generations", "4", "--data", "pairs"], "a reward model scores preferences")])
def test_what_has_no_pass_at_k_is_refused(words, says, town, tmp_path, capsys):
    words = [town / word if (town / word).exists() else word for word in words]
    data = [] if "--data" in words else ["--data", town / "chat"]
    run(town, tmp_path / "r", "--task", "eval", *words, *data, code=2)
    err = capsys.readouterr().err
    assert says in err and "Traceback" not in err and not (tmp_path / "r" / "result.json").exists()


def test_a_head_is_refused(town, tmp_path, capsys):
    run(town, tmp_path / "tagger", "--task", "tag", "--data", town / "tags", "--steps", "1", "--init", town / "base",
        "--forgetting_data", "none")
    run(town, tmp_path / "r", "--task", "eval", "--init", tmp_path / "tagger", "--data", town / "tags",
        "--num_generations", "2", code=2)
    assert "a head chooses the tags" in capsys.readouterr().err


def test_examples_in_front_of_the_prompt_are_sampled_behind(town, tmp_path, monkeypatch):
    seen = []
    fit = few_shot.fit_shots

    def counted(ctx, row, shots):
        seen.append(len(shots))
        return fit(ctx, row, shots)
    monkeypatch.setattr(generations, "fit_shots", counted)
    r = run(town, tmp_path / "r", *eval_words(town, 2), "--shots", "2", "--eval_items", "3")
    assert seen == [2] * 3 and "pass@2" in r["metrics"]


# ------------------------------------------------------------------------------------------------- --task sample

def test_sample_counts_what_a_verifiable_reward_calls_right(town, tmp_path):
    words = ["--task", "sample", "--data", town / "asked", "--num_generations", "5", "--max_new_tokens", "4"]
    r = run(town, tmp_path / "s", *words, "--reward", "verdicts:right")
    m = r["metrics"]
    right = r["generations"]["right"]
    assert len(right) == 16 and 0 < sum(right) < 80
    assert m["score"] == pytest.approx(sum(right) / 80, abs=1e-6) and m["pass@1"] == pytest.approx(m["score"], abs=1e-6)
    assert m["pass@5"] == pytest.approx(sum(c > 0 for c in right) / 16, abs=1e-12)
    assert m["score_best_of_5"] == pytest.approx(m["pass@5"], abs=1e-6) and 0 <= m["majority@5"] <= 1
    graded = run(town, tmp_path / "g", *words, "--reward", "verdicts:graded", "--gold_reward", "verdicts:right")
    assert graded["generations"]["right"] == right and graded["metrics"]["pass@5"] == m["pass@5"]


def test_without_a_verdict_there_is_no_pass_at_k(town, tmp_path, capsys):
    words = ["--task", "sample", "--data", town / "asked", "--max_new_tokens", "4", "--reward", "verdicts:graded"]
    r = run(town, tmp_path / "s", *words, "--num_generations", "3")
    assert "no pass@k: neither --reward nor --gold_reward gives only 0 and 1" in capsys.readouterr().err
    assert not any(name.startswith("pass@") for name in r["metrics"])
    assert r["metrics"]["mean@3"] == pytest.approx(r["metrics"]["score"], abs=1e-6)
    one = run(town, tmp_path / "one", *words, "--num_generations", "1")
    assert not any("@" in name for name in one["metrics"]) and "no pass@k" not in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- tables

def counts(right, n=4):
    return {"n": n, "right": right, "mean": [c / n for c in right], "majority": [float(2 * c > n) for c in right]}


def evaluated(folder, right, seed, **flags):
    found = counts(right)
    words = ["--task", "eval", "--seed", seed, *itertools.chain(*flags.items())]
    return make(folder, {"exact_match": 0.5, **pass_at_k.metrics_of(found)}, flags=words, generations=found)


def test_the_table_has_pass_at_k_with_intervals_over_prompts(tmp_path, capsys):
    evaluated(tmp_path / "a", [0, 1, 4, 2], 1)
    out = shown(tmp_path, capsys, "--metric", "pass@1,pass@4")
    low, high = pass_at_k.interval([0, 0.25, 1, 0.5])
    assert "pass@1" in out and f"[{low:.3f}, {high:.3f}]" in out
    assert "[{:.3f}, {:.3f}]".format(*wilson(3, 4)) in out
    assert "no run has it" in refused(tmp_path, "--metric", "pass@5")


def test_pass_at_k_is_compared_prompt_by_prompt(tmp_path, capsys):
    evaluated(tmp_path / "a", [0, 1, 4, 2], 1, **{"--init": "one"})
    evaluated(tmp_path / "b", [1, 1, 3, 4], 1, **{"--init": "two"})
    out = shown(tmp_path, capsys, "--by", "init", "--metric", "pass@1", "--compare", "two", "one")
    assert "by item  +0.1250" in out and "better on 2, worse on 1" in out


def test_pass_at_k_of_two_rewards_is_not_one_metric(tmp_path):
    for name in ("one", "two"):
        found = counts([1, 2, 3])
        make(tmp_path / name, pass_at_k.metrics_of(found), flags=["--task", "sample", "--reward", name],
             generations=found)
    found, _ = runs.gather([str(tmp_path / "*")])
    assert runs.measured_differently(found, "pass@2") == ["reward"]
    assert math.isnan(runs.estimate(found, "pass@2")[0])


@pytest.mark.parametrize("damage", [
    {"n": 0}, {"right": [1]}, {"right": [5, 1, 1]}, {"mean": []}, {"mean": ["nan", 1, 1]}, {"majority": "x"}, {"n": "4"}])
def test_a_damaged_result_is_left_out_with_its_reason(damage, tmp_path, capsys):
    evaluated(tmp_path / "a", [0, 1, 4], 1)
    bad = evaluated(tmp_path / "b", [0, 1, 4], 2)
    stored = json.loads((bad / "result.json").read_text())
    stored["generations"].update(damage)
    (bad / "result.json").write_text(json.dumps(stored))
    assert '"generations" is' in shown(tmp_path, capsys, "--metric", "pass@1").split("Not in the table, 1:")[1]


def test_uniforms_of_an_answer_are_its_own():
    one = generations.answer_uniforms(1, 3, 2, 5)
    assert torch.equal(one, generations.answer_uniforms(1, 3, 2, 5)) and one.min() >= 0 and one.max() < 1
    assert not any(torch.equal(one, generations.answer_uniforms(*key, 5)) for key in ((1, 2, 3), (2, 3, 2), (1, 3, 1)))
    with pytest.raises(UserError):
        generations.require_answers(None, "text", "--num_generations")


def test_pass_at_k_against_k_is_drawn_with_bands(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    for seed in (1, 2):
        evaluated(tmp_path / f"a{seed}", [0, 1, 4, seed], seed, **{"--init": "one"})
    evaluated(tmp_path / "b", [1, 1, 3, 4], 1, **{"--init": "two"})
    figures = []
    monkeypatch.setattr(plots, "add_legend", lambda figure, *_: figures.append(figure))
    shown(tmp_path, capsys, "--by", "init", "--plot", str(tmp_path / "p.svg"), "--x", "k")
    axis, = figures[0].axes
    one, two = axis.lines
    means = [statistics.fmean(pass_at_k.pass_at_k(4, c, k) for c in (0, 1, 4, 1, 0, 1, 4, 2)) for k in range(1, 5)]
    assert list(one.get_xdata()) == [1, 2, 3, 4] and list(one.get_ydata()) == pytest.approx(means)
    assert list(two.get_ydata())[-1] == 1 and len(axis.collections) == 2
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["1", "2", "4"]
    make(tmp_path / "c" / "x", {"loss": 1.0})
    assert "no run has pass@k" in refused(tmp_path / "c", "--plot", str(tmp_path / "p.svg"), "--x", "k")


def test_uniforms_differ_from_prompt_to_prompt():
    one = generations.answer_uniforms(1, 3, 2, 5)
    assert not torch.equal(one, generations.answer_uniforms(1, 4, 2, 5))
    assert not torch.equal(one, generations.answer_uniforms(2, 3, 2, 5))
    assert not torch.equal(one, generations.answer_uniforms(1, 3, 4, 5))


def test_values_of_0_and_1_that_are_no_proportion_have_students_interval():
    half = 4.3027 * statistics.stdev([0, 1, 1]) / math.sqrt(3)
    assert pass_at_k.interval([0, 1, 1], proportion=False) == pytest.approx((2 / 3 - half, 2 / 3 + half), abs=1e-9)
