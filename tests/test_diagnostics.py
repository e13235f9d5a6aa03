"""What a rollout is told by: KL by three estimators, lengths of right and wrong answers, lines in 80 columns."""
import json
import math
import statistics
import sys

import pytest
import torch

import ppo
import train
from data.results import layout, log_plots, ppo_metrics
from data.results.report import report
from data.runtime.files import UserError
from test_table import make, refused, shown
from test_train import world  # noqa: F401
from tiny import PAIRS, write

LOGP = [[-1.0, -0.5, -2.0], [-0.1, -3.0], [-0.7], [-0.2, -0.2, -0.2, -0.2]]
REF = [[-1.5, -0.25, -2.0], [-1.1, -2.0], [-0.7], [-1.2, -0.1, -0.3, -0.2]]
ANSWERS = [[5, 6, 7], [5, 7], [7], [5, 5, 5, 5]]


def described(scores, ended=(True, True, True, True), k=1, rewarded=None):
    batch = ppo.collate_rollout([[1, 2]] * 4, ANSWERS)
    padded = torch.full(batch.mask.shape, math.nan, dtype=torch.float64)
    logp = padded.clone()
    ref_logp = padded.clone()
    for i, (one, other) in enumerate(zip(LOGP, REF)):
        logp[i, :len(one)] = torch.tensor(one, dtype=torch.float64)
        ref_logp[i, :len(other)] = torch.tensor(other, dtype=torch.float64)
    batch = batch._replace(logp=logp, ref_logp=ref_logp, entropy=torch.ones_like(logp))
    return ppo_metrics.describe(batch, ANSWERS, torch.tensor(scores), torch.tensor(ended), k, rewarded=rewarded,
                                compares_groups=k > 1)


def test_three_estimates_of_the_kl_by_a_naive_loop():
    k1 = k2 = k3 = 0.0
    for one, other in zip(LOGP, REF):
        for new, old in zip(one, other):
            k1 += new - old
            k2 += (new - old) ** 2 / 2
            k3 += math.exp(old - new) - 1 - (old - new)
    m = described([0.0, 1.0, 2.0, 3.0])
    assert m["kl"] == pytest.approx(k1 / 4, abs=1e-12)
    assert m["kl_k2"] == pytest.approx(k2 / 4, abs=1e-12) and m["kl_k3"] == pytest.approx(k3 / 4, abs=1e-12)
    assert len({round(m[name], 6) for name in ("kl", "kl_k2", "kl_k3")}) == 3


def test_the_three_estimates_agree_near_the_reference(monkeypatch):
    """k2 and k3 differ from k1 by the third order: at a tenth of the distance by a thousandth."""
    for size, least in ((0.1, 1e-4), (0.01, 1e-7)):
        p = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
        q = (p.log() + size * torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64)).softmax(0)
        k1 = p.log() - q.log()
        exact = (p * k1).sum()
        assert abs((p * k1 ** 2 / 2).sum() - exact) < least * 10
        assert abs((p * ((-k1).exp() - 1 + k1)).sum() - exact) < 1e-12         # unbiased: exact in expectation


@pytest.mark.parametrize("scores, ended, k, right, wrong", [
    ([1.0, 0.0, 1.0, 0.0], (1, 1, 1, 1), 1, 2.0, 3.0),              # verdicts
    ([1.0, 0.0, -1.0, 0.0], (1, 1, 0, 1), 2, 3.0, 7 / 3),           # -1 for an answer without an end: wrong
    ([1.0, 0.0, 1.0, 0.0], (1, 0, 0, 1), 2, 2.0, 3.0),
    ([0.0, 0.0, 0.0, 0.0], (1, 1, 1, 1), 2, None, 2.5),             # all verdicts are no
    ([1.0, 1.0, 1.0, 1.0], (1, 1, 1, 1), 2, 2.5, None),
    ([0.5, 0.25, 9.0, 9.5], (1, 1, 1, 1), 2, 3.5, 1.5),             # above and below the group's mean
    ([0.5, 0.5, 9.0, 9.5], (1, 1, 1, 1), 2, 4.0, 1.0),              # equal scores: neither
    ([0.5, 0.25, 9.0, 9.5], (1, 1, 1, 1), 1, 2.5, 2.5),             # one answer a prompt: the rollout's mean
    ([1000.1, 1000.1, 1000.1, 1000.1], (1, 1, 1, 1), 4, None, None),
    ([-1.0, -1.0, -1.0, -1.0], (0, 0, 0, 0), 1, None, None)])       # none ended: no verdict
def test_length_of_right_and_of_wrong_answers(scores, ended, k, right, wrong):
    m = described(scores, tuple(map(bool, ended)), k)
    assert m.get("length_right") == (right if right is None else pytest.approx(right))
    assert m.get("length_wrong") == (wrong if wrong is None else pytest.approx(wrong))


def test_accuracy_by_margin_is_of_whole_margins():
    """Ranks may be fractions; half a rank is no margin of 0 or 1, but a pair like any other."""
    s, rank = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 0.0]]), torch.tensor([[1.0, 1.4, 2.0], [1.0, 1.5, 3.0]])
    report = ppo_metrics.reward_report([(s, rank, torch.ones(2, 3, dtype=torch.bool), torch.ones(2, 3))])
    assert report["accuracy"] == pytest.approx(5 / 6) and report["pairs"] == 6
    assert {k: v for k, v in report.items() if "margin" in k} == {"accuracy_margin_1": 1.0, "accuracy_margin_2": 1.0}


def test_an_answer_is_right_whatever_its_penalty():
    """Lengths of right answers, and how the score follows length, are about the reward, not about penalties."""
    rewarded = [1.0, 1.0, 0.0, 0.0]
    m = described([1.0, -0.5, 0.0, 0.0], (True,) * 4, 4, rewarded=torch.tensor(rewarded))
    plain = described(rewarded, (True,) * 4, 4)
    assert [m[name] == plain[name] for name in ("length_right", "length_wrong", "score_length_corr")] == [True] * 3
    assert m["score_penalised"] == 0.125 and m["score"] == 0.5


def test_groups_without_variance():
    assert described([1.0, 1.0, 0.0, 1.0], k=2)["frac_reward_zero_std"] == 0.5
    assert described([2.0, 2.0, 2.0, 2.0], k=4)["frac_reward_zero_std"] == 1
    assert "frac_reward_zero_std" not in described([2.0, 2.0, 2.0, 2.0])


# ------------------------------------------------------------------------------------------------- the lines

FULL = dict(score=-0.1234, gold=12.3, kl=5.678, kl_k2=4.5, kl_k3=5.5, beta=0.05, eos_rate=0.975, length=123.4,
            length_right=100.2, length_wrong=150.7, entropy=1.234, frac_reward_zero_std=0.125, clipfrac_low=0.01,
            clipfrac_high=0.02, clipfrac=0.03)


def test_the_line_of_an_iteration_has_every_diagnostic_once():
    parts = ppo_metrics.health_line(FULL)
    assert [part.split()[0] for part in parts] == [
        "score", "gold", "kl", "length", "kl_k2", "kl_k3", "beta", "eos_rate", "length_right", "length_wrong", "entropy",
        "frac_reward_zero_std", "clipfrac_low", "clipfrac_high"]
    assert parts[0] == "score -0.123" and parts[-1] == "clipfrac_high 0.02"
    without = {name: value for name, value in FULL.items() if name != "gold"}
    assert ppo_metrics.health_line(without) == [part for part in parts if part != "gold 12.3"]


@pytest.mark.parametrize("width", [40, 80, 200])
def test_lines_fit_the_terminal(width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    parts = ppo_metrics.health_line(FULL)
    lines = layout.join_parts("iteration 60/60", parts).split("\n")
    assert max(map(len, lines)) <= width and len(lines) > 200 // width
    assert " ".join(" ".join(lines).split()) == " ".join(["iteration 60/60", *parts])
    assert all(line.startswith("  ") and line[2] != " " for line in lines[1:])
    assert layout.wrapped("word " * 30, "  ").startswith("  word") and \
        max(map(len, layout.wrapped("word " * 30, "  ").split("\n"))) <= width


def test_a_warning_is_new_once_whatever_its_numbers():
    first = ["score follows length (correlation 0.61)", "KL is -1.20, negative beyond chance"]
    again = ["score follows length (correlation -0.58)", "KL is 30 nats: far"]
    assert ppo_metrics.new_warnings(first, []) == first
    assert ppo_metrics.new_warnings(again, first) == ["KL is 30 nats: far"]
    assert ppo_metrics.new_warnings(first, again) == [first[1]] and ppo_metrics.new_warnings([], first) == []


def test_the_command_logs_and_shows_them(world, tmp_path, monkeypatch, capsys):       # noqa: F811
    monkeypatch.setenv("COLUMNS", "80")
    write(tmp_path, {"asked": [{"prompt": ab} for ab in PAIRS]})
    (tmp_path / "long_words.py").write_text("def score(prompt, answer):\n    return float(len(answer) > 2)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    drawn = ppo.sample_answers

    def that_end(policy, prompts, eos, *more, **named):
        return [y[:1 + i % 4] + [min(eos)] for i, y in enumerate(drawn(policy, prompts, eos, *more, **named))]
    monkeypatch.setattr(ppo, "sample_answers", that_end)
    words = ["--task", "ppo", "--algo", "grpo", "--init", world / "base", "--data", tmp_path / "asked", "--steps", "20",
             "--batch", "8", "--minibatches", "1", "--max_new_tokens", "5", "--forgetting_data", "none", "--reward",
             "long_words:score", "--eval_items", "4", "--save_every", "100", "--out", tmp_path / "r"]
    assert train.main(list(map(str, words))) == 0
    log = [json.loads(line) for line in (tmp_path / "r" / "log.jsonl").read_text().splitlines()]
    log = [event for event in log if event["event"] == "train"]
    assert all({"kl", "kl_k2", "kl_k3", "frac_reward_zero_std", "entropy"} <= event.keys() for event in log)
    assert any("length_right" in event for event in log) and any("length_wrong" in event for event in log)
    err = capsys.readouterr().err
    lines = err[err.index("iteration "):].splitlines()
    assert max(map(len, lines)) <= 80
    shown = [int(line.split()[1].split("/")[0]) for line in lines if line.startswith("iteration ")]
    assert set(range(2, 21, 2)) <= set(shown)                       # one in ten of the iterations, at least
    assert all(f"{name} " in err for name in ("kl_k2", "kl_k3", "entropy", "frac_reward_zero_std"))
    sys.modules.pop("long_words", None)


# ------------------------------------------------------------------------------------- the end of a run, printed

PPO_END = dict(task="ppo", method="lora", seed=1, params_trainable=47104, adapter_bytes=192456, steps=6, seconds=60.8,
               tokens_per_second=228, baseline_metrics={"kl": 0.0, "score_best_of_4": 0.9909, "gold_best_of_4": 1.2},
               out="out/x", next_command=None, metrics={
                   "kl": 0.7471, "eos_rate": 0.9667, "length": 18.83, "unique": 0.9767, "repeat4": 0.0038,
                   "score": 0.2886, "score_std": 1.1768, "gold": 0.4947, "gold_std": 1.6, "gold_gain": 0.28,
                   "forgetting": -0.0045}, samples=[{"prompt": "p " * 60, "before": "b " * 60, "after": "a " * 60}])


def test_the_end_of_a_ppo_run_fits_80_columns_and_names_its_units(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    report(PPO_END, "out/x")
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80
    table = lines[1:1 + len({**PPO_END["metrics"], **PPO_END["baseline_metrics"]})]
    assert all(len(line) > 42 and line[42:].strip() for line in table), table       # every number has its unit
    assert "best of 4 answers by score" in out and "rise of gold / gold_std before" in out
    pairs = " ".join(lines[-6:])
    assert "task=ppo method=lora seed=1" in pairs and pairs.endswith("out=out/x")


def test_a_pipe_gets_the_summary_in_one_line(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    report(PPO_END, "out/x")
    assert capsys.readouterr().out.splitlines()[-1].startswith("task=ppo ")


# ----------------------------------------------------------------------------------------- any field over any

def logged(**fields):
    """The log of a run: fields {name: values of the steps 1, 2, ...}."""
    steps = range(1, 1 + max(map(len, fields.values())))
    return [{"event": "train", "step": s, **{name: values[s - 1] for name, values in fields.items()
                                             if s <= len(values) and values[s - 1] is not None}} for s in steps]


def drawn(logs, x, ys, fields=("method",)):
    figure = pytest.importorskip("matplotlib.figure").Figure()
    log_plots.draw_logged(figure, logs, list(fields), x, ys)
    lines = [[(list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines] for axis in figure.axes]
    return lines, figure


def test_a_field_against_another_is_the_mean_of_runs_at_their_common_steps():
    logs = {("lora",): [logged(tokens=[10, 20, 30], kl=[0.0, 1.0, 2.0]), logged(tokens=[12, 24], kl=[2.0, 3.0])]}
    (lines,), figure = drawn(logs, "tokens", ["kl"])
    assert lines == [([10, 20, 30], [0, 1, 2]), ([12, 24], [2, 3]), ([11, 22], [1, 2])]
    assert figure.axes[0].get_title(loc="left") == "mean of 2 runs, thin: each"
    assert (figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()) == ("tokens", "kl")
    assert not figure.legends                                       # one line needs none


def text_of(figure):
    """(the title of the first axis, the label below the last one, whether its ticks are whole numbers)."""
    last = figure.axes[-1]
    figure.canvas.draw()
    return (figure.axes[0].get_title(loc="left"), last.get_xlabel(),
            all(float(tick).is_integer() for tick in last.get_xticks()))


def test_a_plot_says_what_a_step_is_and_whether_it_is_smoothed():
    few = logged(score=[0.0, 1.0, 0.5])
    _, figure = drawn({("grpo",): [few]}, "step", ["score"])
    assert text_of(figure) == ("1 run", "iteration", True)
    _, figure = drawn({("grpo",): [logged(score=[0.0, 1.0] * 4 + [1.0])]}, "step", ["score"])
    assert text_of(figure)[0] == "1 run"
    many = logged(loss=[1.0, 2.0] * 5)
    _, figure = drawn({("lora",): [many], ("full",): [many, many]}, "step", ["loss"])
    assert text_of(figure) == ("smoothed; mean of 1 to 2 runs, thin: each", "optimiser step", True)
    _, figure = drawn({("lora",): [many], ("grpo",): [few]}, "step", ["loss"])
    assert text_of(figure)[1] == "optimiser step or iteration"
    _, figure = drawn({("grpo",): [logged(score=[0.0, 1.0], kl=[0.0, 0.5])]}, "kl", ["score"])
    assert text_of(figure) == ("1 run", "kl", False)


def test_the_default_curves_say_the_same():
    figure = pytest.importorskip("matplotlib.figure").Figure()
    log_plots.draw_steps(figure, {("grpo",): [logged(score=[0.0, 1.0, 0.5])]}, ["method"], "score")
    assert text_of(figure) == ("line: training (1 run)", "iteration", True)
    figure.clear()
    long = logged(loss=[1.0, 2.0] * 5)
    log_plots.draw_steps(figure, {("lora",): [long, long]}, ["method"], "loss")
    assert text_of(figure) == ("line: training, smoothed (mean, range of 2 runs)", "optimiser step", True)


def test_overoptimisation_without_a_gold_reward_is_named():
    figure = pytest.importorskip("matplotlib.figure").Figure()
    plain = logged(score=[0.0, 1.0], sqrt_kl=[0.0, 0.5])
    with pytest.raises(UserError, match="these runs logged no gold reward.*--gold_reward"):
        log_plots.draw_overoptimisation(figure, {("grpo",): [plain]}, ["method"])
    gold = logged(score=[0.0, 1.0], sqrt_kl=[0.0, 0.5], gold=[0.5, 0.25])
    log_plots.draw_overoptimisation(figure, {("grpo",): [plain, gold, gold]}, ["method"])
    assert text_of(figure)[0] == "2 runs; ring: the highest gold reward"


def test_fields_that_no_event_has_together_are_named_without_a_list():
    log = logged(kl=[1.0, None], score=[None, 2.0])
    with pytest.raises(UserError) as error:
        drawn({("lora",): [log]}, "kl", ["score"])
    assert str(error.value).startswith("--x kl --y score: no run logged both together")


def test_only_what_is_no_clock_is_smoothed():
    values = [float(i % 2) for i in range(20)]
    (lines,), _ = drawn({("lora",): [logged(seconds=list(range(20)), kl=values)]}, "seconds", ["kl"])
    assert lines[0][0] == list(range(20)) and lines[0][1][0] == 0 and set(lines[0][1][1:-1]) <= {1 / 3, 2 / 3}
    (lines,), _ = drawn({("lora",): [logged(kl=values, score=list(range(20)))]}, "kl", ["score"])
    assert lines[0][0][1] == 1 / 3 and lines[0][1] == list(range(20))
    assert log_plots.smooth([0.0, 2.0, 4.0, 6.0, 8.0], 5) == [0, 2, 4, 6, 8]        # no shift, no bend at the ends
    assert log_plots.smooth([0.0, 3.0, 0.0], 3) == [0, 1, 0] and log_plots.smooth([1.0, 5.0], 1) == [1, 5]


def test_several_fields_of_one_group_share_a_plot_and_of_more_groups_have_one_each():
    log = logged(kl=[1.0, 2.0], kl_k3=[1.5, 2.5])
    lines, figure = drawn({("lora",): [log]}, "step", ["kl", "kl_k3"])
    assert lines == [[([1, 2], [1, 2]), ([1, 2], [1.5, 2.5])]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["kl", "kl k3"]
    lines, figure = drawn({("lora",): [log], ("full",): [logged(kl=[3.0, 4.0])]}, "step", ["kl", "kl_k3"])
    assert lines == [[([1, 2], [1, 2]), ([1, 2], [3, 4])], [([1, 2], [1.5, 2.5])]]
    assert [axis.get_ylabel() for axis in figure.axes] == ["kl", "kl k3"]
    assert figure.axes[0].lines[1].get_linestyle() != figure.axes[0].lines[0].get_linestyle()


def test_a_number_that_is_missing_or_not_finite_is_a_gap():
    (lines,), _ = drawn({("lora",): [logged(length_right=[3.0, None, "nan", 5.0], kl=[0.0, 1, math.nan, 3])]}, "kl",
                        ["length_right"])
    assert lines == [([0, 3], [3, 5])]


def test_fields_of_valid_are_drawn_where_training_has_none():
    log = [dict(event="train", step=1, loss=2.0), dict(event="valid", step=2, accuracy=0.5, tokens=7)]
    (lines,), _ = drawn({("lora",): [log]}, "tokens", ["accuracy"])
    assert lines == [([7], [0.5])]
    assert log_plots.logged_fields([log]) == ["step", "loss", "accuracy", "tokens"]


def test_the_command_draws_any_logged_field(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    for seed in (1, 2):
        log = logged(tokens=[s * 100 for s in range(9)], kl=[s / 9 for s in range(9)], score=[s / 4 for s in range(9)])
        make(tmp_path / str(seed), {"gold": 1.0}, log=log, flags=["--seed", seed])
    for number, words in enumerate((["--x", "tokens", "--y", "kl"], ["--y", "kl,score"], ["--x", "kl"])):
        file = tmp_path / f"{number}.svg"
        shown(tmp_path, capsys, "--plot", str(file), *words)
        assert file.stat().st_size > 5000
    file = str(tmp_path / "p.svg")
    assert "--y no: no run logged it; logged are step tokens kl score" in refused(tmp_path, "--plot", file, "--y", "no")
    assert refused(tmp_path, "--plot", file, "--y", "kl,scor") == "--y scor: no run logged it; did you mean score?"
    assert "did you mean tokens?" in refused(tmp_path, "--plot", file, "--x", "tokns")
    assert "--y kl is for a plot" in refused(tmp_path, "--y", "kl")


def test_the_error_of_the_kl_and_a_long_answer_by_hand():
    batch = ppo.collate_rollout([[1]] * 4, [[5], [5, 6], [5, 6, 7], [5, 6, 7, 8]])
    logp = torch.zeros(batch.mask.shape)
    logp[:, 0] = torch.tensor([1.0, 2.0, 3.0, 6.0])                                     # the KL of each answer
    batch = batch._replace(logp=logp, ref_logp=torch.zeros_like(logp), entropy=torch.zeros_like(logp))
    m = ppo_metrics.describe(batch, [[5], [5, 6], [5, 6, 7], [5, 6, 7, 8]], torch.arange(4.0), torch.ones(4).bool())
    assert m["kl"] == 3 and m["kl_stderr"] == pytest.approx(statistics.pstdev([1, 2, 3, 6]) / 2)
    assert m["length_p95"] == pytest.approx(3.85)


def test_groups_without_variance_consist_of_the_answers_that_count():
    batch = ppo.collate_rollout([[1]] * 4, [[5]] * 4)
    zero = torch.zeros(4, 1)
    batch = batch._replace(logp=zero, ref_logp=zero, entropy=zero)
    counted = torch.tensor([True, True, True, False])
    m = ppo_metrics.describe(batch, [[5]] * 4, torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.ones(4).bool(), 2, counted,
                             compares_groups=True)
    assert m["frac_reward_zero_std"] == 0.5                     # of the second group one answer is left


def test_equal_scores_of_a_reward_model_are_half_right():
    scores, rank = torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([[0.0, 1.0, 2.0]])
    report = ppo_metrics.reward_report([(scores, rank, torch.ones(1, 3).bool(), torch.ones(1, 3))])
    assert report["accuracy"] == pytest.approx(2.5 / 3) and report["accuracy_margin_1"] == 0.75


@pytest.mark.parametrize("sick, word", [
    (dict(kl=40.0, beta=0.0), "raise --kl_coef"), (dict(unique=0.05, beta=0.0), "raise --kl_coef"),
    (dict(length=1.0, beta=0.0), "KL penalty outweighs"), (dict(kl=-1.0, kl_stderr=0.0, beta=0.1), "beyond chance")])
def test_a_warning_says_nothing_that_the_run_contradicts(sick, word):
    """Without a KL (dapo, drgrpo, ...) --kl_coef is refused; the KL of one answer has no standard error."""
    well = dict(step=20, kl=3.0, kl_stderr=0.1, score=0.5, score_std=1.0, eos_rate=0.97, length=20.0, unique=1.0)
    assert not [line for line in ppo_metrics.health({**well, **sick}) if word in line]
