"""Tables and plots: their numbers are those of the runs, and they claim no more than the runs show."""
import builtins
import json
import math
import os

import pytest
import tiny

from data.results import choose, compare, log_plots, plots, resources, runs, tables
from data.runtime.files import UserError, read_json
from data.runtime.flags import parse
from data.runtime.run_folder import Run, RunError

RATES = {"full": 1e-3, "lora": 5e-3, "adalora": 1e-2, "prefix_tuning": 1e-3, "ia3": 3e-2, "none": None}


def config(flags):
    """The stored flags of a run: each method has its own rate, and only two of these have a rank."""
    given = dict(zip((word.removeprefix("--") for word in flags[::2]), flags[1::2]))
    values = {"task": "sft", "method": "lora", "init": "data/base", "data": "toy", "seed": 1, **given}
    values.setdefault("lr", RATES[values["method"]])
    if values["method"] in ("lora", "adalora"):
        values.setdefault("rank", 8)
    return values


def make(folder, metrics=None, item_correct="", data="d", log=(), flags=(), stored=None, **result):
    """A finished run of these flags, by hand. stored: more entries of config.json."""
    values = config(flags)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"config": values, "data_sha256": data, **(stored or {})}))
    (folder / "log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in log))
    if metrics is not None:
        done = dict(task=values["task"], method=values["method"], seed=values["seed"], metrics=metrics,
                    item_correct=item_correct, params_trainable=1000, adapter_bytes=4000,
                    peak_memory_mb=100.0, tokens_per_second=50)
        (folder / "result.json").write_text(json.dumps({**done, **result}))
    return folder


def seeds(tmp_path, name, values, flags=(), **more):
    for seed, x in enumerate(values, 1):
        make(tmp_path / f"{name}-s{seed}", {"exact_match": x, "loss": 1 - x}, flags=[*flags, "--seed", seed],
             **more)


def table(pattern, *flags):
    """What --task table does; raises UserError."""
    return tables.show(parse(["--runs", str(pattern), *flags], [tables.TableFlags], {}, "", str))


def shown(tmp_path, capsys, *flags):
    capsys.readouterr()
    assert table(tmp_path / "*", *flags) == 0
    return capsys.readouterr().out


def refused(tmp_path, *flags):
    with pytest.raises(UserError) as error:
        table(tmp_path / "*", *flags)
    assert error.value.code == 2
    return str(error.value)


def grouped(tmp_path, by=None):
    found, _ = runs.gather([str(tmp_path / "*")])
    fields = runs.group_fields(found, by)
    return fields, runs.group(found, fields)


# ----------------------------------------------------------------------------------------------------- groups

def test_the_fields_that_differ_less_what_follows_from_them(tmp_path):
    for method in ("full", "lora", "prefix_tuning"):    # each has its own rate
        make(tmp_path / method, {"loss": 1}, flags=["--method", method])
        make(tmp_path / f"{method}2", {"loss": 1}, flags=["--method", method, "--seed", 2])
    assert grouped(tmp_path)[0] == ["method"]
    make(tmp_path / "r1", {"loss": 1}, flags=["--rank", 1])
    by, groups = grouped(tmp_path)
    assert by == ["method", "rank"]
    assert list(groups) == [("full", None), ("lora", 1), ("lora", 8), ("prefix_tuning", None)]
    assert [len(some) for some in groups.values()] == [2, 1, 2, 2]


def test_numbers_sort_as_numbers(tmp_path):
    for rank in (16, 2, 1):
        make(tmp_path / str(rank), {"loss": 1}, flags=["--rank", rank])
    assert list(grouped(tmp_path)[1]) == [(1,), (2,), (16,)]


def test_nothing_that_looks_like_a_run_is_left_out(tmp_path, capsys):
    make(tmp_path / "done", {"loss": 1})
    make(tmp_path / "again", {"loss": 1})                                   # the same flags and data: once
    make(tmp_path / "cut", flags=["--rank", 2], log=[{"event": "train", "step": 7}])
    with open(tmp_path / "cut" / "log.jsonl", "a") as f:
        f.write('{"event": "tr')                                            # the kill tore a line
    make(tmp_path / "new", flags=["--rank", 3])
    make(tmp_path / "bad", {}, flags=["--rank", 4])
    (tmp_path / "bad" / "result.json").write_text("{")
    with pytest.raises(RunError), Run(tmp_path / "fell", {"rank": 5}).opened():
        raise RunError("10 steps in a row were not finite")
    (tmp_path / "results.jsonl").write_text("")
    (tmp_path / "merged").mkdir()                                           # a model is not a run
    (tmp_path / "merged" / "config.json").write_text("{}")
    make(tmp_path / "torn", {}, flags=["--rank", 6])
    (tmp_path / "torn" / "config.json").unlink()
    out = shown(tmp_path, capsys)
    words = out.split("Not in the table, 6:\n")[1].replace("\n    ", " ")          # wrapped, not cut
    rest = dict(line.split(None, 1) for line in words.splitlines())
    rest = {path.split("/")[-1]: why for path, why in rest.items()}
    assert rest.keys() == {"done", "cut", "new", "bad", "fell", "torn"}
    assert rest["done"].startswith("the same run as")
    assert rest["cut"].startswith("unfinished: at step 7, ")
    assert rest["cut"].endswith(" ago; the same command starts over, because nothing was saved")
    assert "just begun" in rest["new"] and "not valid JSON" in rest["bad"]
    assert "config.json cannot be read" in rest["torn"]
    assert rest["fell"] == "failed: 10 steps in a row were not finite"


def test_an_interrupted_run_names_the_step_it_goes_on_from(tmp_path):
    cut = make(tmp_path / "cut", log=[{"event": "train", "step": 20}, {"event": "save", "step": 20},
                                      {"event": "train", "step": 38}])
    (cut / "state.pt").write_bytes(b"")
    reason, = [why for _, why in runs.gather([str(cut)])[1]]
    assert reason.startswith("unfinished: at step 38, ") and reason.endswith("; the same command goes on from step 20")


@pytest.mark.parametrize("name, text", [
    (name, text) for name in ("config.json", "result.json")
    for text in ("", "[]", "null", "3", '{"metrics": {}, "item_correct": "12"}', '{"metrics": {}, "steps": "nan"}',
                 '{"metrics": {}, "peak_memory_mb": NaN}', '{"config": {}, "test_items": "inf"}', '{"config": []}', '{"metrics": {"loss": [1]}}', '{"metrics": 7}',
                 '{"config": {"seed": {}}}', '{"config": {}, "test_items": "x"}')])
def test_a_damaged_run_stands_below_the_others_with_its_reason(name, text, tmp_path, capsys):
    seeds(tmp_path, "a", [0.5, 0.7])
    bad = make(tmp_path / "bad", {"exact_match": 0.9, "loss": 1}, flags=["--rank", 2])
    (bad / name).write_text(text)
    out = shown(tmp_path, capsys, "--sort", "best")
    table_part, reason = out.split("Not in the table, 1:\n")
    assert "0.600" in table_part and "0.900" not in table_part and f"bad/{name}" in reason


def test_runs_without_a_metric_have_a_table_too(tmp_path, capsys):
    make(tmp_path / "a", {}, flags=["--rank", 2])
    make(tmp_path / "b", {})
    for flags in ((), ("--sort", "best"), ("--markdown",), ("--across", "rank")):
        assert "4.0 kB" in shown(tmp_path, capsys, *flags) or flags[0] == "--across"


def test_the_sizes_of_large_models_are_read(tmp_path, capsys):
    make(tmp_path / "a", {"loss": 1}, model_bytes=15 * 10 ** 9, adapter_bytes=0, params_trainable=7 * 10 ** 9,
         tokens=10 ** 12)
    assert "7,000,000,000" in shown(tmp_path, capsys)


def test_odd_flag_values_are_values_like_others(tmp_path, capsys):
    seeds(tmp_path, "a", [0.5, 0.7])
    stored = read_json(tmp_path / "a-s1" / "config.json")
    for name, value in (("seed", [1]), ("eval_items", "x"), ("data", [1, "y"]), ("rank", None), ("steps", "z")):
        config = {**stored["config"], name: value}
        (tmp_path / "a-s1" / "config.json").write_text(json.dumps({**stored, "config": config}))
        assert "0.500" in shown(tmp_path, capsys, "--by", f"{name},folder", "--sort", name)


def test_a_folder_of_runs_is_as_good_as_a_pattern(tmp_path, capsys):
    make(tmp_path / "out" / "a", {"loss": 1})
    assert shown(tmp_path, capsys) == shown(tmp_path / "out", capsys)
    assert "no run folder" in refused(tmp_path / "nothing")
    make(tmp_path / "cut" / "a")
    assert "nothing to compare" in refused(tmp_path / "cut", "--compare", "1", "2")


def test_sizes():
    sizes = {0: "0 B", 999: "999 B", 1000: "1.0 kB", 192456: "192 kB", 3_740_160: "3.7 MB", 2e10: "20 GB"}
    assert {n: resources.format_size(n) for n in sizes} == sizes


def test_a_table_for_the_test_items_of_every_task(tmp_path, capsys):
    import train
    world = tiny.world(tmp_path)
    tokens = 2 * (len(tiny.ROWS["text"][0]["text"]) + 1)            # two rows of bytes, each with its end
    windows = math.ceil((tokens - 1) / 32)
    for task, data, flags in (("sft", "chat", ["--max_new_tokens", "2"]), ("classify", "label", []),
                              ("pretrain", "text", ["--block_size", "32"]),
                              ("eval", "chat", ["--max_new_tokens", "2"])):
        flags = flags + ["--steps", "2", "--method", "lora", "--forgetting_data", "none"] * (task != "eval")
        where = ["--init", world / "base", "--data", world / data, "--out", tmp_path / "out" / task]
        assert train.main(["--task", task, *map(str, where), *flags]) == 0
        result = read_json(tmp_path / "out" / task / "result.json")
        named = {"classify": "accuracy", "pretrain": None}.get(task, "exact_match")
        assert len(result["item_correct"]) == (8 if named else 0)
        assert not named or result["item_correct"].count("1") / 8 == result["metrics"][named]
        assert read_json(tmp_path / "out" / task / "config.json")["test_items"] == (windows if task == "pretrain" else 8)
    capsys.readouterr()
    assert train.main(["--task", "table", "--runs", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.endswith(":")] == [
        f"{windows} test windows of text:", "8 test items of chat:", "8 test items of label:"]
    lines = lines[lines.index("8 test items of chat:"):]
    assert lines[1].split()[:4] == ["task", "runs", "exact_match", "95"]
    assert [line.split()[0] for line in lines[2:4]] == ["eval", "sft"]
    assert lines[2].split()[-4:-3] == ["0"] and sum("[" in line for line in lines) == 3     # proportions


# ------------------------------------------------------------------------------------------------- test items

def test_runs_on_different_items_are_neither_starred_nor_averaged_together(tmp_path, capsys):
    """60 items must not win against 300."""
    for rank, x in ((2, 0.90), (8, 0.913)):
        make(tmp_path / f"all{rank}", {"exact_match": x}, "1" * round(300 * x) + "0" * (300 - round(300 * x)),
             flags=["--rank", rank])
    for rank, x in ((2, 0.033), (8, 0.383)):
        make(tmp_path / f"few{rank}", {"exact_match": x}, "1" * round(60 * x) + "0" * (60 - round(60 * x)),
             data="few", flags=["--rank", rank, "--eval_items", 60])
    for flags in ((), ("--by", "method"), ("--sort", "best"), ("--markdown",)):
        first, second = shown(tmp_path, capsys, *flags).split("60 test items of toy:")
        assert first.startswith("300 test items of toy:\n")
        assert "0.383" not in first and "0.9" not in second
    assert "0.383* " in shown(tmp_path, capsys).split("60 test items")[1]           # the best of its own table
    lines = shown(tmp_path, capsys, "--by", "method").splitlines()
    assert lines[2].split()[:5] == ["lora", "2", "0.907", "±", "0.009"]
    second = lines.index("60 test items of toy:")
    assert lines[second + 2].split()[:4] == ["lora", "2", "0.208", "±"]
    out = shown(tmp_path, capsys, "--by", "method", "--across", "rank")
    assert out.splitlines()[0].split() == ["method", "test", "2", "8"] and "0.900  0.913" in out
    assert "different test items" in refused(tmp_path, "--compare", "rank=2,eval_items=60",
                                             "rank=2,eval_items=-", "--by", "rank,eval_items")


def test_equal_items_in_another_training_set_are_compared(tmp_path, capsys):
    for data, x in (("a", 0.5), ("b", 0.75)):
        make(tmp_path / data, {"loss": x}, data=data, flags=["--data", data],
             stored={"test_items": 40, "test_sha256": "t"})
    lines = shown(tmp_path, capsys, "--compare", "a", "b").splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["data", "a", "b"]
    assert "40 test items of a; mean" in lines[4] and any("by seed  -0.2500" in line for line in lines)


def test_a_loss_that_means_something_else_is_neither_starred_nor_averaged(tmp_path, capsys):
    for classifier, loss in (("lm", 1.0), ("head", 0.1)):
        for seed in (1, 2):
            make(tmp_path / f"{classifier}{seed}", {"accuracy": 0.5, "loss": loss},
                 flags=["--classifier", classifier, "--seed", seed])
    out = shown(tmp_path, capsys, "--metric", "accuracy,loss")
    assert "0.100 ± 0.000 " in out and "*" not in out.split("loss: not the same")[0]
    assert "loss: not the same in all rows, because classifier differs; no * there." in out
    assert shown(tmp_path, capsys, "--by", "method", "--metric", "loss").splitlines()[1].split()[2] == "mixed"
    assert "loss means something else" in refused(tmp_path, "--compare", "lm", "head", "--metric", "loss")


def test_the_modules_that_lora_adapts_do_not_define_a_loss(tmp_path, capsys):
    for method, loss, flags in (("full", 0.5, []), ("lora", 0.7, ["--targets", "q,v"])):
        for seed in (1, 2):
            make(tmp_path / f"{method}{seed}", {"accuracy": 0.5, "loss": loss},
                 flags=["--task", "classify", "--method", method, "--seed", seed, *flags])
    out = shown(tmp_path, capsys, "--metric", "loss", "--compare", "full", "lora")
    assert "not the same" not in out and "by seed  -0.2000" in out


def test_which_run_is_best_is_one_command(tmp_path, capsys):
    for name, rank, x, steps in (("a", 2, 0.5, 400), ("b", 4, 0.9, None), ("c", 8, 0.7, 100)):
        folder = make(tmp_path / name, {"exact_match": x, "loss": x}, flags=["--rank", rank, "--steps", steps],
                      steps=steps or 1128)
        os.utime(folder / "result.json", (1e9 + rank, 1e9 + rank))

    def order(column):
        lines = shown(tmp_path, capsys, "--sort", column).splitlines()
        assert lines[0].split()[-1] == "folder"
        return "".join(line.split()[-1].split("/")[-1] for line in lines[1:4])

    assert order("best") == order("exact_match") == "bca" and order("loss") == "acb"
    assert order("rank") == order("folder") == "abc" and order("date") == "cba"
    assert order("steps") == "cab"                      # 1,128 of --epochs
    lines = shown(tmp_path, capsys).splitlines()
    assert [line.split()[lines[0].split().index("steps")] for line in lines[1:4]] == ["400", "1,128", "100"]
    seeds(tmp_path, "s", [0.1, 0.2], ["--rank", 16])
    assert f"{tmp_path}/s-s*" in shown(tmp_path, capsys, "--sort", "best")
    assert f"{tmp_path}/s-s2" in shown(tmp_path, capsys, "--by", "folder")
    assert "--sort exact_mach is no column of these runs; did you mean exact_match?" in refused(
        tmp_path, "--sort", "exact_mach")


def test_what_a_command_line_varied_names_the_rows(tmp_path):
    make(tmp_path / "a", {"loss": 1}, flags=["--batch", 8, "--rank", 2], stored={"argv": ["train.py", "--rank=2"]})
    make(tmp_path / "b", {"loss": 1}, flags=["--batch", 16, "--rank", 8], stored={"argv": ["--rank", "8"]})
    assert grouped(tmp_path)[0] == ["rank"]


def test_a_narrow_terminal_drops_columns_by_rank_and_wraps_the_rest(tmp_path, capsys, monkeypatch):
    seeds(tmp_path, "a", [0.90, 0.91, 0.92])
    seeds(tmp_path, "b", [0.80, 0.81, 0.82], ["--rank", 2, "--data", "a-rather-long-name-of-a-data-set"], data="d")
    make(tmp_path / "cut", flags=["--rank", 3], log=[{"event": "train", "step": 7}])
    for width, titles in ((200, "data runs exact_match 95 % stored trainable memory tokens/s"),
                          (80, "data runs exact_match 95 % stored"), (50, "data runs")):
        monkeypatch.setenv("COLUMNS", str(width))
        out = shown(tmp_path, capsys)
        table_lines = out.split("\n\n")[0].splitlines()
        assert max(map(len, table_lines)) <= width
        assert table_lines[0].split() == titles.split()
    assert table_lines[1].split() == ["exact_match"] and table_lines[3].split() == ["0.810", "±", "0.010"]
    assert "Left out, because the terminal has 50 columns: tokens/s, memory, trainable, stored, 95 %." in (
        " ".join(out.split()))
    reason = " ".join(out.split("Not in the table, 1:")[1].split())
    assert reason.endswith("the same command starts over, because nothing was saved")


def test_before_training_is_a_metric_too(tmp_path, capsys):
    make(tmp_path / "a", {"gold": 2.0}, baseline_metrics={"gold": 0.25, "gold_std": 1.5})
    out = shown(tmp_path, capsys, "--metric", "before.gold,before.gold_std,gold", "--markdown")
    assert out.startswith("| method | runs | before.gold | before.gold_std | gold |")
    assert "| lora | 1 | 0.250 | 1.500 | 2.000 |" in out


# -------------------------------------------------------------------------------------------------- intervals

def test_a_matrix_has_a_column_for_each_value_of_a_field(tmp_path, capsys):
    for method, low in (("full", 0.5), ("lora", 0.25)):
        seeds(tmp_path, f"words-{method}", [low, low + 0.25], ["--method", method])
        flags = ["--task", "tag", "--method"]
        make(tmp_path / f"tag-{method}", {"f1": low, "accuracy": 0.99}, flags=[*flags, method])
    make(tmp_path / "tag-ia3", {"f1": 0.125, "accuracy": 0.99}, flags=[*flags, "ia3"])
    lines = shown(tmp_path, capsys, "--by", "task,method", "--across", "method").splitlines()
    assert lines[0].split() == ["task", "full", "ia3", "lora"]
    assert lines[1].split() == "sft 0.625 ± 0.177 - 0.375 ± 0.177".split()
    assert lines[2].split() == "tag 0.500 0.125 0.250".split()             # f1, not the accuracy of its words
    lines = shown(tmp_path, capsys, "--by", "task", "--across", "method", "--metric", "accuracy,loss")
    assert lines.splitlines()[1].split() == "sft 0.375 ± 0.177 - 0.625 ± 0.177".split()
    assert lines.splitlines()[2].split() == "tag 0.990 0.990 0.990".split()
    assert "metod is no field of these runs; did you mean method?" in refused(tmp_path, "--across", "metod")


def test_a_single_run_of_rl_has_students_interval_over_its_prompts(tmp_path, capsys):
    """Of the values 1, 2, 3, 6: mean 3, sum of squares 14, so sd 2.1602 (n - 1) and half 3.1824 sd / 2."""
    make(tmp_path / "a", {"score": 3.0, "score_std": math.sqrt(14 / 4), "kl": 1.0}, stored={"test_items": 4},
         flags=["--task", "ppo"], main_metric="score")
    run = grouped(tmp_path)[1][("lora",)]
    _, _, low, high = runs.estimate(run, "score")
    assert (low, high) == pytest.approx((3 - 3.1824 * 2.160247 / 2, 3 + 3.1824 * 2.160247 / 2), abs=1e-3)
    assert math.isnan(runs.estimate(run, "kl")[2])
    out = shown(tmp_path, capsys)
    assert "[-0.437, 6.437]" in out and "rewards: Student's t" in " ".join(out.split())
    for more in ({"score_std": 0.0}, {"score_std": math.nan}, {"score_std": "inf"}):        # all equal, or unknown: nothing is claimed
        run[0]["result"]["metrics"].update(more)
        assert math.isnan(runs.estimate(run, "score")[2])
    run[0]["result"]["metrics"]["score_std"] = 1.0
    run[0]["test_items"] = 1
    assert math.isnan(runs.estimate(run, "score")[2])


def test_several_answers_to_a_prompt_are_not_counted_as_prompts(tmp_path):
    make(tmp_path / "a", {"score": 0.5, "score_std": 0.5, "mean@2": 0.5}, stored={"test_items": 4},
         flags=["--task", "sample"], generations={"n": 2, "mean": [0.0, 0.5, 0.5, 1.0]})
    run = grouped(tmp_path)[1][("lora",)]
    assert math.isnan(runs.estimate(run, "score")[2]) and math.isfinite(runs.estimate(run, "mean@2")[2])


def test_a_preference_accuracy_has_wilsons_interval_over_prompts(tmp_path, capsys):
    make(tmp_path / "a", {"accuracy": 0.7, "prompts": 10, "loss": 0.5}, stored={"test_items": 10},
         flags=["--task", "dpo"], main_metric="accuracy")
    assert "[0.397, 0.892]" in shown(tmp_path, capsys)      # as wilson(7, 10)


def test_the_interval_is_explained_where_there_is_one(tmp_path, capsys):
    make(tmp_path / "a", {"loss": 0.5}, stored={"test_items": 10})
    out = shown(tmp_path, capsys)
    assert "mean ± sd over the runs of a row." in out and "95 %" not in out


def test_the_interval_of_three_seeds_is_students(tmp_path, capsys):
    seeds(tmp_path, "a", [0.90, 0.91, 0.92])
    found, _ = runs.gather([str(tmp_path / "*")])
    half = 4.3027 * 0.01 / math.sqrt(3)
    assert runs.estimate(found, "exact_match") == pytest.approx((0.91, 0.01, 0.91 - half, 0.91 + half))
    assert "0.910 ± 0.010  [0.885, 0.935]" in shown(tmp_path, capsys)


def test_one_run_has_wilsons_interval_of_its_items_if_it_is_a_proportion(tmp_path):
    one = [dict(config={}, result=dict(metrics={"exact_match": 0.8, "loss": 2.0}, item_correct="1111111100"))]
    assert runs.estimate(one, "exact_match")[2:] == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert all(map(math.isnan, runs.estimate(one, "loss")[1:]))


def test_what_is_not_finite_is_said_and_not_averaged(tmp_path, capsys):
    seeds(tmp_path, "a", [0.5, math.nan, 0.7])
    seeds(tmp_path, "b", [0.5, 0.6, 0.7], ["--rank", 2])
    out = shown(tmp_path, capsys)
    assert [line.split()[2] for line in out.splitlines()[1:3]] == ["0.600", "nan"] and "*" not in out


@pytest.mark.parametrize("other, data, wins", [
    ([0.8, 0.81, 0.82], "d", True), ([0.88, 0.9, 0.92], "d", False), ([0.8], "d", False),
    ([0.8, 0.81, 0.82], "else", False)])
def test_bold_only_where_intervals_separate(other, data, wins, tmp_path, capsys):
    seeds(tmp_path, "a", [0.90, 0.91, 0.92])
    seeds(tmp_path, "b", other, ["--rank", 2], data=data)
    by, groups = grouped(tmp_path)
    assert tables.best(groups, "exact_match") == ({(8,)} if wins else set())
    assert tables.best(groups, "loss") == ({(8,)} if wins else set())      # the smallest wins
    out = shown(tmp_path, capsys, "--markdown")
    assert ("**0.910 ± 0.010**" in out) == wins and "0.910 ± 0.010" in out


def test_inputs_named_after_the_seed_share_a_row(tmp_path, capsys):
    """Each seed of RL starts from its own SFT model: one row, and pairs by seed. Other names stay apart."""
    for method in ("full", "lora"):
        for seed in (1, 2):
            make(tmp_path / f"{method}-s{seed}", {"exact_match": seed / 4 + (method == "lora") / 8, "kl": seed,
                                                  "score": 2 * seed},
                 flags=["--method", method, "--seed", seed, "--init", f"out/sft-s{seed}", "--reward",
                        f"out/rm-s{seed}/best,short"], stored={"base_sha256": f"b{seed}", "reward": f"r{seed}"})
    assert "1.500 ± 0.577" in shown(tmp_path, capsys, "--by", "init", "--metric", "kl")
    assert "3.000 ± 1.155" in shown(tmp_path, capsys, "--by", "init", "--metric", "score")
    out = shown(tmp_path, capsys, "--by", "method,init,reward", "--compare", "full", "lora")
    assert out.count("sft-s*") == 2 and out.count("best,short") == 2 and "0.375 ± 0.177" in out
    assert "pairs of runs: 2" in out and "-0.1250 ± 0.0000" in out

    for seed in (1, 2):                                 # a word that ends in another way
        make(tmp_path / f"c-s{seed}", {"exact_match": 0.2}, flags=["--seed", seed, "--init", f"out/rest{seed}"])
    out = shown(tmp_path, capsys, "--by", "init")
    assert "rest1" in out and "rest2" in out


@pytest.mark.parametrize("seeds_of_inputs", [[(1, 1), (1, 2), (2, 1), (2, 2)], [(1, 1), (2, 2), (1, 3)],
                                             [(1, 1), (2, 1)]])
def test_inputs_that_other_seeds_have_too_stay_apart(seeds_of_inputs, tmp_path, capsys):
    """A crossed design asks about the input: its name is no name of a seed."""
    for model, seed in seeds_of_inputs:
        make(tmp_path / f"{model}-{seed}", {"exact_match": model / 4},
             flags=["--seed", seed, "--init", f"out/sft-s{model}"])
    out = shown(tmp_path, capsys, "--by", "init")
    assert "sft-s1 " in out and "sft-s2 " in out and "sft-s*" not in out


def test_one_seed_keeps_the_name_of_its_input(tmp_path, capsys):
    make(tmp_path / "a", {"exact_match": 0.5}, flags=["--init", "out/sft-s1"])
    make(tmp_path / "b", {"exact_match": 0.5}, flags=["--init", "out/other-s1"])
    out = shown(tmp_path, capsys, "--by", "init")
    assert "sft-s1" in out and "other-s1" in out and "*" not in out.replace("**", "")


def test_a_row_over_two_inputs_of_one_name_says_so(tmp_path, capsys):
    for folder in ("a", "b"):
        make(tmp_path / folder, {"exact_match": 0.5}, flags=["--init", f"out/{folder}/model"])
    assert "Rows average over init" in shown(tmp_path, capsys, "--by", "method")


def test_less_repetition_is_better(tmp_path, capsys):
    for name, rank, repeats in (("b", 2, 0.1), ("c", 4, 0.9)):
        for seed in (1, 2):
            make(tmp_path / f"{name}-s{seed}", {"repeat4": repeats + seed / 100},
                 flags=["--rank", rank, "--seed", seed])
    out = shown(tmp_path, capsys, "--by", "rank", "--metric", "repeat4", "--compare", "rank=4", "rank=2")
    assert "less is better" in out


def test_the_best_of_n_by_two_reward_models_is_not_compared(tmp_path, capsys):
    for name, reward in (("a", "r1"), ("b", "r2")):
        make(tmp_path / name, {"score": 1.0, "score_best_of_4": 2.0}, flags=["--rank", len(reward), "--reward", name],
             stored={"reward": reward})
    for metric in ("score", "score_best_of_4"):
        assert "not the same in all rows" in shown(tmp_path, capsys, "--by", "reward", "--metric", metric)


def test_a_row_that_mixes_settings_says_so(tmp_path, capsys):
    seeds(tmp_path, "a", [0.5, 0.6])
    seeds(tmp_path, "b", [0.5, 0.6], ["--rank", 2])
    assert "Rows average over" not in shown(tmp_path, capsys)
    out = shown(tmp_path, capsys, "--by", "method")
    assert "Rows average over rank; --by method,rank splits" in out
    assert out.splitlines()[1].split()[1:5] == ["4", "0.550", "±", "0.058"]
    assert "[" not in out                               # four runs, but not four seeds
    assert "did you mean rank?" in refused(tmp_path, "--by", "rnk")


# ------------------------------------------------------------------------------------------------------ A - B

def test_pairs_by_seed_and_by_item(tmp_path, capsys):
    """Seed noise that both sides share cancels: the difference is sharp where the levels are not."""
    for seed, (a, b) in enumerate([("1110", "1100"), ("1111", "1110"), ("1100", "1000")], 1):
        for rank, correct in ((8, a), (2, b)):
            make(tmp_path / f"{rank}-{seed}", {"exact_match": correct.count("1") / 4}, correct,
                 flags=["--rank", rank, "--seed", seed])
    out = shown(tmp_path, capsys, "--compare", "rank=8", "2")
    assert "pairs of runs: 3" in out and "by seed  +0.2500 ± 0.0000  95 % [+0.2500, +0.2500]" in out
    assert "by item  +0.2500" in out and "better on 3, worse on 0, sign test p 0.25" in out


def test_the_sign_test_by_counting():
    assert compare.sign_test(0, 0) == 1 and compare.sign_test(5, 0) == 2 / 32 and compare.sign_test(3, 3) == 1
    assert compare.sign_test(1, 7) == pytest.approx(2 * (8 + 1) / 256)


def test_pairs_leave_other_fields_equal(tmp_path, capsys):
    for method, add in (("lora", 0.0), ("adalora", 0.3)):
        for rank in (2, 8):
            make(tmp_path / f"{method}{rank}", {"loss": add + 1 / rank},
                 flags=["--method", method, "--rank", rank])
    out = shown(tmp_path, capsys, "--compare", "adalora", "lora", "--by", "method,rank")
    assert "loss (less is better), pairs of runs: 2" in out and "by seed  +0.3000 ± 0.0000" in out
    assert "no outcome per item for loss" in out


def test_a_full_run_pairs_with_one_of_a_sweep(tmp_path, capsys):
    for seed in (1, 2):
        make(tmp_path / f"full{seed}", {"loss": 1.0}, flags=["--method", "full", "--seed", seed])
        for rank in (2, 8):
            make(tmp_path / f"lora{rank}{seed}", {"loss": 1.5}, flags=["--rank", rank, "--seed", seed])
    assert "pairs of runs: 2" in shown(tmp_path, capsys, "--compare", "method=lora,rank=8", "full")
    for a, b, sentence in (("lora", "full", "select one, as lora,rank="),
                           ("prefix", "full", "value of 0 fields"), ("rank=3", "full", "rank: - 2 8")):
        assert sentence in refused(tmp_path, "--compare", a, b)
    make(tmp_path / "other", {"loss": 1.0}, flags=["--rank", 4], data="other")
    assert "different test items" in refused(tmp_path, "--compare", "4", "full")
    assert refused(tmp_path, "--compare", "full") == "--compare needs 2 values"


def test_the_metric_that_a_run_is_about():
    for metrics, name in (({"loss": 1, "exact_match": 0}, "exact_match"), ({"kl": 1, "gold": 0}, "gold"),
                          ({"x": 1, "y": 2}, "x"), ({}, None)):
        assert runs.main_metric({"result": {"metrics": metrics}}) == name
    for own, metrics, name in (("brier", {"loss": 1, "accuracy": 1, "brier": 0}, "brier"), ("exact_match", {"exact_match": 1, "f1": 0}, "f1"),
                               ("gold", {"score": 1}, "score"), (None, {"rows": 3, "mean_probability": 1}, None)):
        assert runs.main_metric({"result": {"metrics": metrics, "main_metric": own}}) == name


def test_predictions_are_left_out_in_a_line(tmp_path, capsys):
    make(tmp_path / "a", {"accuracy": 0.5})
    make(tmp_path / "p", {"rows": 3, "mean_probability": 0.9}, flags=["--task", "predict", "--method", "none"])
    out = shown(tmp_path, capsys)
    table_part, rest = out.split("Not in the table, 1:")
    assert "predict" not in table_part and "rows" not in table_part.split("mean ±")[0]
    assert f"{tmp_path / 'p'}  it measured nothing that a table compares; it has rows, mean_probability" in rest


# ------------------------------------------------------------------------------------------------------- code

def test_runs_of_different_code_are_never_averaged(tmp_path, capsys):
    """NAME.<hash>, the folder that was moved aside, is a run as well."""
    seeds(tmp_path, "r", [0.8, 0.9], stored={"code": "cd34"})
    assert shown(tmp_path, capsys).splitlines()[0].split()[:2] == ["method", "runs"]     # one code: no column
    for seed, x in ((1, 0.2), (2, 0.3)):
        make(tmp_path / f"r-s{seed}.ab12", {"exact_match": x}, flags=["--seed", seed],
             stored={"code": "ab12"})
    make(tmp_path / "old", {"exact_match": 0.5})
    for flags in ((), ("--by", "method"), ("--by", "method,code")):
        lines = [line.split() for line in shown(tmp_path, capsys, *flags).splitlines()[:4]]
        assert [line[:4] for line in lines] == [
            ["method", "code", "runs", "exact_match"], ["lora", "-", "1", "0.500"],
            ["lora", "ab12", "2", "0.250"], ["lora", "cd34", "2", "0.850"]]
    lines = [line.split() for line in shown(tmp_path, capsys, "--by", "code").splitlines()[:4]]
    assert [line[0] for line in lines] == ["code", "-", "ab12", "cd34"]
    assert "code" in shown(tmp_path, capsys, "--across", "seed").split("\n")[0]


def test_a_new_definition_or_another_method_is_not_other_code(tmp_path):
    """Codes are the same if the definitions that both executed are; the first one's hash stands for them."""
    order = "model.py: GPTConfig, order of fields"
    model = {"model.py: GPT.forward": "1", order: ["a", "b"]}
    versions = {"1": {**model, "lora.py: LoRA.forward": "2"},
                "2": {**model, "lora.py: LoRA.forward": "2", "lora.py: New": "3"},
                "3": {**model, "prompts.py: PTuning": "4", order: ["a", "x", "b"]},
                "4": {**model, "lora.py: LoRA.forward": "5"},
                "5": {"other.py: f": "1"}}
    for code, hashes in versions.items():
        make(tmp_path / code, {"loss": 1.0}, flags=["--seed", int(code)],
             stored={"code": code, "code_hashes": hashes})
    _, groups = grouped(tmp_path, ["method"])
    assert {key: [run["folder"].name for run in some] for key, some in groups.items()} == {
        ("lora", "1"): ["1", "2", "3"], ("lora", "4"): ["4"], ("lora", "5"): ["5"]}


def test_equal_flags_over_another_content_are_separate_rows(tmp_path):
    """Edited data, another base or reward under the same name."""
    for seed, data in ((1, "old"), (1, "new"), (2, "new")):
        make(tmp_path / f"{data}{seed}", {"loss": 1.0}, flags=["--seed", seed], data=data)
    fields, groups = grouped(tmp_path)
    assert fields == ["method", "data_hash"] and sorted(map(len, groups.values())) == [1, 2]
    for seed in (1, 2):                                 # weights that were drawn from the seed
        make(tmp_path / "new" / str(seed), {"loss": 1}, flags=["--seed", seed],
             stored={"base_sha256": str(seed)})
    assert grouped(tmp_path / "new")[0] == ["method"]
    make(tmp_path / "new" / "again", {"loss": 1}, flags=["--seed", 1], stored={"base_sha256": "other"})
    assert grouped(tmp_path / "new")[0] == ["method", "base_hash"]


def test_pairs_have_one_code(tmp_path, capsys):
    for code, loss in (("ab12", 1.0), ("cd34", 1.5)):
        for seed in (1, 2):
            make(tmp_path / f"lora{seed}.{code}", {"loss": loss}, flags=["--seed", seed],
                 stored={"code": code})
    out = shown(tmp_path, capsys, "--compare", "code=cd34", "code=ab12")
    assert "pairs of runs: 2" in out and "by seed  +0.5000" in out
    assert "code     cd34 - ab12: the two sides were computed by different code" in out
    make(tmp_path / "full1", {"loss": 3.0}, flags=["--method", "full"], stored={"code": "ab12"})
    out = shown(tmp_path, capsys, "--compare", "full", "lora")
    assert "pairs of runs: 1, runs without a partner: 3" in out and "by seed  +2.0000" in out
    assert "different code" not in out
    out = shown(tmp_path, capsys, "--compare", "full", "lora,code=cd34")
    assert "by seed  +1.5000" in out and "ab12 - cd34: the two sides" in out
    make(tmp_path / "full1.b", {"loss": 3.0}, flags=["--method", "full"], stored={"code": "cd34"})
    assert "pairs of different code (ab12 cd34); select one, as full,code=" in refused(
        tmp_path, "--compare", "full", "lora")
    make(tmp_path / "ia3", {"loss": 3.0}, flags=["--method", "ia3"], stored={"code": "ef56"})
    assert "no two runs have the same seed and both have loss. Their code differs" in refused(
        tmp_path, "--compare", "ia3", "full")


def test_results_that_keep_accepted_are_named(tmp_path, capsys):
    make(tmp_path / "a", {"loss": 1}, kept=["lora.py: LoRA.forward"])
    out = shown(tmp_path, capsys)
    assert "a is from before a change of code, accepted by --keep: lora.py: LoRA.forward" in out


# --------------------------------------------------------------------------------------------------- choosing

def swept(tmp_path, method, numbers, flags=(), **more):
    """Runs of {rate: [(exact match on valid, on test) of seed 1, 2, ...]}; None: the seed did not run the rate."""
    for rate, some in numbers.items():
        for seed, pair in enumerate(some, 1):
            if pair:
                log = [dict(event="valid", step=10, exact_match=0.99, loss=0.0),
                       dict(event="valid", step=20, exact_match=pair[0], loss=1 - pair[0])]
                make(tmp_path / f"{method}-{rate}-{seed}", {"exact_match": pair[1], "loss": 1 - pair[1]}, log=log,
                     steps=20, flags=["--method", method, "--lr", rate, "--seed", seed, "--eval_every", 10, *flags],
                     **{"stored": {"test_items": 40, "test_sha256": "t"}, **more})


LORA = {1e-3: [(0.5, 0.9), (0.9, 0.5), (0.9, 0.5)], 3e-3: [(0.8, 0.1), (0.1, 0.6), (0.1, 0.8)],
        1e-2: [(0.7, 0.9), (0.9, 0.5), (0.9, 0.5)]}


def selected(tmp_path, capsys, *flags):
    return shown(tmp_path, capsys, "--select", "lr", *flags)


def test_a_rate_is_chosen_on_valid_by_the_first_seed_and_reported_on_test_by_the_others(tmp_path, capsys, monkeypatch):
    swept(tmp_path, "lora", LORA)
    swept(tmp_path, "full", {1e-4: [(0.2, 0.1), (0.1, 0.9), (0.1, 0.9)],
                             3e-4: [(0.6, 0.3), (0.1, 0.5), (0.1, 0.6)],
                             1e-3: [(0.5, 0.3), (0.9, 0.9), (0.9, 0.9)]})
    monkeypatch.setenv("COLUMNS", "80")
    out = selected(tmp_path, capsys, "--by", "method")
    assert max(map(len, out.splitlines())) <= 80
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == "method lr on valid below above seeds exact_match 95 %".split()
    assert lines[1][:9] == "lora 0.003 0.800 0.300 0.100 2 0.700 ± 0.141".split()
    assert lines[2][:9] == "full 0.0003 0.600 0.400 0.100 2 0.550 ± 0.071".split()
    words = " ".join(out.split())
    assert "luck" not in words
    assert "lr: the best by exact_match on valid, seed 1;" in words and "40 test items of toy; lr" in words
    assert "Groups chose from different values of lr, 3 each." in words
    assert "exact_match against lora, paired by seed (more is better):" in words
    row = next(line for line in lines if line[:2] == ["full", "2"])     # -0.1, -0.2: one degree of freedom
    assert row[2:] == ["-0.1500", "[-0.7853,", "+0.4853]"]
    assert "tried" not in words and "favoured" not in words and "numbers of seeds" not in words
    lines = selected(tmp_path, capsys, "--metric", "loss,exact_match", "--markdown").splitlines()
    assert lines[0].startswith("| method | lr | on valid | below | above | seeds | loss | 95 % | exact_match |")
    assert lines[2].startswith("| lora | 0.003 | 0.200 | 0.300 | 0.100 | 2 | 0.300 ± 0.141 |")
    assert "loss against lora, paired by seed (less is better):" in lines


@pytest.mark.parametrize("ran, chooses, values", [
    ({1: "ab"}, [1], "ab"), ({1: "ab", 2: "ab"}, [1], "ab"), ({3: "ab", 1: "ab", 2: "ab"}, [1], "ab"),
    ({s: "ab" for s in range(5)}, [0, 1], "ab"), ({1: "abc", 2: "b", 3: "b", 4: "b"}, [1], "abc"),
    ({1: "a", 2: "ab", 3: "ab"}, [2], "ab"), ({1: "ab", 2: "bc", 3: "ab", 4: "ab"}, [1, 3], "ab")])
def test_half_of_the_seeds_choose_of_those_that_ran_most_of_the_grid(ran, chooses, values):
    cells = {(value, seed): {} for seed, some in ran.items() for value in some}
    assert choose.choosing_seeds(cells) == (chooses, set(values))


def test_a_grid_with_one_seed_and_its_best_with_more_is_enough(tmp_path, capsys):
    swept(tmp_path, "lora", {1e-3: [(0.5, 0.9)], 3e-3: [(0.8, 0.1), (0.1, 0.5), (0.1, 0.6), (0.1, 0.7)],
                             1e-2: [(0.7, 0.9)]})
    out = selected(tmp_path, capsys)
    assert out.splitlines()[1].split()[:9] == "lora 0.003 0.800 0.300 0.100 3 0.600 ± 0.100".split()


def test_a_choice_of_one_seed_says_that_its_number_is_favoured(tmp_path, capsys):
    swept(tmp_path, "lora", {rate: some[:1] for rate, some in LORA.items()})
    out = " ".join(selected(tmp_path, capsys).split())
    assert "lora 0.003 0.800 0.300 0.100 1 0.100" in out
    assert "No other seed ran the chosen lr of lora, so the number is that of the seeds that chose, and" in out
    make(tmp_path / "one", {"exact_match": 0.05, "loss": 1}, flags=["--method", "full"], log=[],
         stored={"test_items": 40, "test_sha256": "t"})
    assert "the chosen lr of lora, so" in " ".join(selected(tmp_path, capsys, "--by", "method").split())


def test_what_makes_a_choice_less_fair_is_said(tmp_path, capsys):
    swept(tmp_path, "lora", {1e-3: [(0.5, 0.9)] * 2, 3e-3: [(0.8, 0.1)] * 2})
    swept(tmp_path, "full", {1e-4: [(0.6, 0.1)] * 3, 3e-4: [(0.8, 0.1)] * 3, 1e-3: [(0.8, 0.1)] * 3,
                             3e-3: [(0.5, 0.1)] * 3})
    swept(tmp_path, "ia3", {1e-4: [(math.nan, 0.1)] * 2, 3e-4: [(math.nan, 0.1)] * 2})
    swept(tmp_path, "adalora", {1e-3: [(0.5, 0.9), (0.4, 0.9)], 3e-3: [None, (0.3, 0.1)],
                                1e-2: [(0.2, 0.1), None]}, ["--rank", 2])
    swept(tmp_path, "prefix_tuning", {1e-3: [(0.5, 0.9)] * 2}, ["--rank", 3])
    make(tmp_path / "more", {"exact_match": 0.1}, steps=20, stored={"test_items": 40, "test_sha256": "t"},
         flags=["--method", "prefix_tuning", "--seed", 3, "--rank", 4, "--lr", 1e-3, "--eval_every", 10])
    out = " ".join(selected(tmp_path, capsys, "--by", "method").split())
    assert "lora 0.003 0.800 0.300 - 1 0.100" in out
    assert "lora: lr 0.003 is the largest that was tried; a larger one may be better." in out
    assert "adalora: lr 0.001 is the smallest that was tried; a smaller one may be better." in out
    assert "full: equally good on valid are lr 0.0003 0.001; the smallest stands." in out and "full: lr" not in out
    assert "ia3: lr" not in out
    assert "ia3: exact_match on valid is finite at no lr, so nothing was chosen; the smallest stands." in out
    assert "adalora: lr 0.003 could not be chosen, because no seed that chooses ran it." in out
    assert ("Groups chose from different numbers of values of lr, and more values are more chances: " in out
            and "2 lora" in out)
    assert "Groups report different numbers of seeds: " in out and "2 prefix_tuning" in out and "1 ia3" in out
    assert "Beside lr, rank differs inside groups; --by method,rank tells them apart." in out


@pytest.mark.parametrize("flags, sentence", [
    (["--select", "rte"], "--select rte is no flag of these runs; did you mean rate?"),
    (["--select", "seed"], "--select seed: it is no flag that is chosen"),
    (["--select", "code"], "--select code: it is no flag that is chosen"),
    (["--select", "rate", "--by", "method,rate"], "a flag is either chosen or tells groups apart"),
    (["--select", "rate", "--by", "metod"], "metod is no field of these runs; did you mean method?"),
    (["--select", "rate", "--sort", "best"], "leave --sort out"),
    (["--select", "rate", "--across", "method"], "leave --across out"),
    (["--select", "rate", "--on", "train"], "--on train is none of valid test"),
    (["--on", "test"], "name a flag by --select"),
    (["--select", "batch"], "no group of --by rate has measured runs of more than one value"),
    (["--select", "rate", "--metric", "before.loss"], "has no before.loss on valid, where it has exact_match, loss; "),
    (["--select", "rate", "--metric", "f1"], "--metric f1: no run has it")])
def test_what_select_cannot_choose(flags, sentence, tmp_path):
    for rate in (1, 2):
        make(tmp_path / str(rate), {"exact_match": 0.5, "loss": 1}, steps=20, baseline_metrics={"loss": 2},
             log=[dict(event="valid", step=20, exact_match=0.5, loss=1)], flags=["--rate", rate, "--batch", 4])
    assert sentence in refused(tmp_path, *flags)


@pytest.mark.parametrize("flags, more, events, sentence", [
    (["--eval_every", 0], dict(steps=0), [], "because it made no step (--steps); choose by --on test"),
    (["--task", "ppo"], dict(steps=20), [], "because --task ppo measures none; choose by --on test"),
    (["--eval_every", 15], dict(steps=20), [(15, 0.5)], "run it again with --fresh --eval_every 20, or choose by --on test"),
    (["--eval_every", 15], dict(steps=20, best_valid=7), [(15, 0.5)], "--fresh --eval_every 20"),
    (["--eval_every", 5], dict(steps=20, best_valid={"step": 10}), [(20, 0.5)], "--fresh --eval_every 20"),
    (["--eval_every", 5], dict(steps=20), [(20, "x")], "where it has loss; name one of these by --metric")])
def test_a_run_without_a_number_on_valid_is_named_with_the_flag_that_makes_it(flags, more, events, sentence,
                                                                              tmp_path, capsys):
    swept(tmp_path, "lora", {1e-3: [(0.5, 0.9)], 3e-3: [(0.8, 0.1)]})
    log = [dict(event="valid", step=step, exact_match=number, loss=1.0) for step, number in events]
    make(tmp_path / "bare", {"exact_match": 0.3, "loss": 1}, log=log, flags=[*flags, "--lr", 1e-2],
         stored={"test_items": 40, "test_sha256": "t"}, **more)
    said = refused(tmp_path, "--select", "lr", "--by", "method")
    assert f"{tmp_path}/bare has no exact_match on valid" in said and sentence in said
    make(tmp_path / "tag", {"f1": 0.3}, flags=["--task", "tag"], stored={"test_items": 40, "test_sha256": "t"})
    out = selected(tmp_path, capsys, "--by", "method", "--on", "test", "--metric", "exact_match")
    assert "Runs without exact_match, which are not in this table: 1." in out
    assert "Chosen on the items that are reported, so their luck favours every number here." in " ".join(out.split())
    lines = out.splitlines()
    assert lines[0].split()[:4] == ["method", "lr", "on", "test"] and lines[1].split()[:3] == ["lora", "0.001", "0.900"]


def test_the_weights_that_were_kept_are_those_that_choose(tmp_path):
    log = [dict(event="valid", step=step, exact_match=number)
           for step, number in ((10, 0.9), (20, 0.5), (20, 0.4))]
    for best, number in ((None, 0.4), ({"metric": "exact_match", "value": 0.9, "step": 10}, 0.9)):
        folder = make(tmp_path / str(number), {"exact_match": 0.1}, log=log, steps=20, best_valid=best)
        assert runs.valid_metrics(runs.read_run(folder)) == {"exact_match": number}


def test_runs_that_are_damaged_of_other_code_or_of_other_items_do_not_choose(tmp_path, capsys):
    swept(tmp_path, "lora", LORA, stored={"test_items": 40, "test_sha256": "t", "code": "ab12"})
    swept(tmp_path / "new", "lora", {1e-3: [(0.9, 0.2)] * 2, 3e-3: [(0.1, 0.9)] * 2},
          stored={"test_items": 40, "test_sha256": "t", "code": "cd34"})
    swept(tmp_path / "few", "lora", {1e-3: [(0.1, 0.2)] * 2, 3e-3: [(0.2, 0.9)] * 2}, ["--eval_items", 3],
          stored={"test_items": 3, "test_sha256": "u", "code": "ab12"})
    swept(tmp_path / "few", "full", {1e-3: [(0.1, 0.2)] * 2}, ["--eval_items", 3],
          stored={"test_items": 3, "test_sha256": "u", "code": "ab12"})
    (tmp_path / "lora-0.003-1" / "result.json").write_text("{")
    capsys.readouterr()
    folders = map(str, (tmp_path / "*", tmp_path / "new", tmp_path / "few"))
    assert tables.show(parse(["--runs", *folders, "--select", "lr", "--by", "method"], [tables.TableFlags], {},
                             "", str)) == 0
    first, second = capsys.readouterr().out.split("3 test items of toy:\n")
    assert first.startswith("40 test items of toy:\n")
    rows = [line.split() for line in first.splitlines()]
    assert rows[1][:3] == ["method", "code", "lr"]
    # seed 1 has lost 0.003, so seed 2 chooses
    assert ["lora", "ab12", "0.001", "0.900"] in [row[:4] for row in rows]
    assert ["lora", "cd34", "0.001", "0.900"] in [row[:4] for row in rows]
    assert "seed 2 of lora, code ab12" in " ".join(first.split()) and "full" not in first
    rows = [line.split()[:2] for line in second.splitlines()]
    assert ["lora", "0.003"] in rows and ["full", "0.001"] in rows and "Not in the table, 1:" in second
    assert "more values are more chances: 2 lora; 1 full." in " ".join(second.split())
    for rate in ("0.001", "0.01"):
        for seed in (1, 2, 3):
            (tmp_path / f"lora-{rate}-{seed}" / "config.json").write_text("[")
    with pytest.raises(UserError, match="nothing to choose"):
        table(tmp_path / "lora-*", "--select", "lr")
    assert "Not in the table, 7:" in capsys.readouterr().out        # the reason why there is nothing


def test_what_is_not_the_same_is_not_chosen_from(tmp_path):
    swept(tmp_path / "a", "lora", LORA)
    make(tmp_path / "a" / "other", {"exact_match": 0.3, "loss": 1}, flags=["--lr", 1e-3, "--seed", 1, "--rank", 2,
         "--eval_every", 10], steps=20, stored={"test_items": 40, "test_sha256": "t"})
    assert "lora-0.001-1 and " in refused(tmp_path / "a", "--select", "lr", "--by", "method")
    assert refused(tmp_path / "a", "--select", "lr", "--by", "method").endswith(
        "a/other differ in rank and stand in one group; add rank to --by")
    for data, rate in (("d", 1e-3), ("else", 3e-3)):
        swept(tmp_path / "b" / data, "lora", {rate: [(0.5, 0.5)]}, data=data)
    assert "measured on other items of valid, because their data differ; add data to --by" in refused(
        tmp_path / "b", "--runs", *(str(tmp_path / "b" / data / "*") for data in ("d", "else")),
        "--select", "lr", "--by", "method")
    for beta in (1, 2):
        make(tmp_path / "c" / str(beta), {"loss": 0.5}, flags=["--task", "dpo", "--beta", beta])
    assert "--select beta: loss means something else in some of these runs, because beta differs" in refused(
        tmp_path / "c", "--select", "beta")


def test_a_rate_at_which_a_seed_diverged_is_not_chosen(tmp_path, capsys):
    """Two of four seeds choose; a loss that is not finite has no spread, and no mean that is better than another."""
    for rate, losses in ((1e-3, (0.5, 0.6)), (1e-2, (0.1, "inf"))):
        for seed, loss in enumerate((*losses, 0.3, 0.4), 1):
            log = [dict(event="valid", step=20, loss=loss)]
            make(tmp_path / f"lora-{rate}-{seed}", {"loss": 0.5}, log=log, steps=20,
                 flags=["--lr", rate, "--seed", seed], stored={"test_items": 40, "test_sha256": "t"})
    lines = selected(tmp_path, capsys, "--by", "method", "--metric", "loss").splitlines()
    assert lines[1].split()[:3] == ["lora", "0.001", "0.550"]
    for seed in (1, 2, 3, 4):                           # one value, nothing measured on valid
        make(tmp_path / f"none-{seed}", {"loss": 3.0}, steps=0, flags=["--method", "none", "--seed", seed],
             stored={"test_items": 40, "test_sha256": "t"})
    assert "none" in selected(tmp_path, capsys, "--by", "method", "--metric", "loss")


def test_ranks_of_different_modules_are_averaged_where_all_have_them():
    logs = [[{"ranks": {"a.0.q": 2, "a.0.v": 4}}], [{"ranks": {"a.0.q": 4}}]]
    assert log_plots.mean_ranks(logs) == {"a.0.q": 3}
    assert log_plots.mean_ranks([*logs, [{"step": 1}]]) == {}


def test_a_word_can_be_chosen_and_chosen_runs_compared(tmp_path, capsys):
    for method, sign in (("lora", 1), ("full", -1)):
        for schedule, x in (("cosine", 0.5), ("linear", 0.6)):
            for seed in (1, 2, 3):
                correct = "1" * (5 + sign * seed) + "0" * (5 - sign * seed)
                make(tmp_path / f"{method}-{schedule}-{seed}", {"exact_match": correct.count("1") / 10}, correct,
                     steps=20, log=[dict(event="valid", step=20, exact_match=x)],
                     flags=["--method", method, "--schedule", schedule, "--seed", seed])
    out = shown(tmp_path, capsys, "--select", "schedule", "--compare", "full", "lora")
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == "method schedule on valid seeds exact_match 95 % steps stored trainable memory tokens/s".split()
    assert lines[1][:6] == "lora linear 0.600 2 0.750 ±".split() and "was tried" not in out
    row = next(line for line in lines if line[:2] == ["full", "2"])     # -0.4, -0.6; of items -1, -0.5 or 0
    assert row[2:] == ["-0.5000", "[-1.7706,", "+0.7706]", "[-0.8372,", "-0.1628]"]
    assert "full - lora, exact_match (more is better), pairs of runs: 2" in out and "by seed  -0.5000" in out


# --------------------------------------------------------------------------------------------------- plots

def curve(seed, rank=8, **last):
    log = [dict(event="baseline", step=0, exact_match=0.0)]
    log += [dict(event="train", step=s, loss=3 / (s + rank) + 0.01 * seed, **last) for s in range(1, 21)]
    log += [dict(event="valid", step=s, exact_match=s / 40 + 0.01 * seed) for s in (5, 10, 15)]
    return [*log, dict(event="test", step=20, exact_match=0.5)]


def rlhf(beta):
    path = [dict(step=s, gold=s / 10 - s * s / 300, score=s / 8, sqrt_kl=s / 10 / beta, kl=0, eos_rate=1)
            for s in range(1, 30)]
    return [dict(event="baseline", step=0, gold=0.0)] + [dict(e, event="train") for e in path]


@pytest.mark.parametrize("what, end", [("step", "png"), ("rank", "svg"), ("method", "svg"), ("ranks", "svg"),
                                       ("sqrt_kl", "svg")])
def test_every_plot(what, end, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    for seed in (1, 2):
        for rank in (2, 8):
            method = "adalora" if what == "ranks" else "lora"
            ranks = {"ranks": {f"blocks.{i}.{w}": i for i in range(3) for w in ("attn.q", "mlp.up")}}
            log = rlhf(rank) if what == "sqrt_kl" else curve(seed, rank, **ranks)
            make(tmp_path / f"{rank}-{seed}", {"exact_match": rank / 10 + seed / 50}, log=log,
                 flags=["--method", method, "--rank", rank, "--seed", seed])
        if what in ("rank", "method"):
            make(tmp_path / f"full-{seed}", {"exact_match": 0.5 + seed / 50}, log=curve(seed),
                 flags=["--method", "full", "--seed", seed])
    file = tmp_path / f"p.{end}"
    assert str(file) in shown(tmp_path, capsys, "--plot", str(file), "--x", what)
    assert file.stat().st_size > 5000
    if end == "svg":
        assert file.read_text().count("<path") > 20
    drawn = file.read_bytes()
    shown(tmp_path, capsys, "--plot", str(file), "--x", what)
    assert file.read_bytes() == drawn


def test_a_curve_shows_the_loss_on_valid_beside_that_of_training(tmp_path):
    figures = pytest.importorskip("matplotlib.figure")

    def drawn(metric, **beside):
        figure = figures.Figure()
        valid = dict(event="valid", step=2, loss=0.5, exact_match=0.25, **beside)
        log = [dict(event="train", step=s, loss=1.0 / s) for s in (1, 2)] + [valid]
        log_plots.draw_steps(figure, {("lora",): [log]}, ["method"], metric, "8 test items")
        return [[(list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines if len(line.get_xdata())]
                for axis in figure.axes], figure.axes[0].get_title(loc="left")

    curves, title = drawn("exact_match", targets=7)
    assert curves == [[([1, 2], [1.0, 0.5]), ([2], [0.5])], [([2], [0.25])]]
    assert title == "line: training (1 run)\nfilled: valid, hollow: test, 8 test items"
    assert drawn("loss", targets=7)[0] == [[([1, 2], [1.0, 0.5]), ([2], [0.5])]]
    assert drawn("exact_match", macro_f1=1)[0][0] == [([1, 2], [1.0, 0.5])]         # per label, not per token


def test_a_picture_says_on_how_many_runs_and_items_a_point_stands(tmp_path):
    seeds(tmp_path, "a", [0.5, 0.6], item_correct="1100")
    make(tmp_path / "b", {"exact_match": 0.5}, "1100", flags=["--rank", 2])
    assert plots.title_of(grouped(tmp_path)[1]) == "a point: 1 to 2 runs, 4 test items"
    make(tmp_path / "c", {"exact_match": 0.5}, "11", flags=["--rank", 4])
    assert "different test items (4 test items of toy, 2 test items of toy)" in refused(
        tmp_path, "--plot", str(tmp_path / "p.svg"))


def test_a_plot_never_averages_or_joins_other_data(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr(plots, "draw", lambda path, groups, fields, metric, x, *_: drawn.append((groups, fields, x)))
    items = {"test_items": 4, "test_sha256": "t"}
    for rank in (1, 2):
        for data in ("d1", "d2"):
            make(tmp_path / f"{rank}{data}", {"exact_match": 0.5}, "1100", data, log=curve(1), stored=items,
                 flags=["--data", data, "--rank", rank])
    make(tmp_path / "other", {"exact_match": 0.5}, "1100", "d3", flags=["--data", "d3", "--rank", 4])
    for by, x, label in (("method", "step", "data"), ("rank", "rank", "data"), ("rank", None, "data"), ("rank,data", "rank", "data")):
        shown(tmp_path, capsys, "--plot", str(tmp_path / "p.svg"), "--by", by, *(["--x", x] if x else []))
        groups, fields, axis = drawn.pop()
        assert label in fields and axis == (x or "rank")
        lines = {}
        for key, some in groups.items():
            lines.setdefault(tuple(v for f, v in zip(fields, key) if f != axis), []).extend(some)
        assert len(lines) == 3
        for some in lines.values():
            assert len({run["config"]["data"] for run in some}) == len({runs.test_set(run) for run in some}) == 1
    seeds(tmp_path / "same", "a", [0.5, 0.6])
    table(tmp_path / "same" / "*", "--plot", str(tmp_path / "p.svg"), "--by", "method", "--x", "step")
    assert drawn.pop()[1] == ["method"]


def test_the_picture_of_a_choice_has_a_ring_and_a_dot_for_each_seed(tmp_path, capsys):
    figures = pytest.importorskip("matplotlib.figure")
    rates = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    swept(tmp_path, "lora", {rate: [(0.5, 0.5 + i / 20), (0.5, 0.55 + i / 20)] for i, rate in enumerate(rates)})
    swept(tmp_path, "full", {rate: [(0.5, 0.1), (0.5, 0.2)] for rate in rates[:3]})
    fields, groups = grouped(tmp_path, ["method", "lr"])

    def drawn(groups):
        figure = figures.Figure(layout="constrained")
        plots.draw_sweep(figure, groups, fields, "exact_match", "lr", {("lora",): 3e-3})
        return figure, figure.axes[0]

    figure, axis = drawn(groups)
    rings = [line.get_xydata().tolist() for line in axis.lines if line.get_markersize() == 9]
    assert rings == [[pytest.approx([3e-3, 0.675])]]
    dots = [line.get_xydata().tolist() for line in axis.lines if line.get_markersize() == 3]
    assert len(dots) == 10 and [pytest.approx([3e-3, 0.65]), pytest.approx([3e-3, 0.7])] in dots
    assert axis.get_xscale() == "log"
    assert [text.get_text() for text in axis.get_xticklabels()] == "0.0001 0.001 0.01 0.1".split()
    assert sorted(text.get_text() for text in axis.texts) == ["full", "lora"] and not figure.legends
    assert axis.get_title(loc="left") == "a point: 2 runs, 40 test items\nsmall: one seed; ring: the chosen lr"
    for number in range(6):                             # on top of each other: no label has room
        groups.update({(f"method{number}", key[1]): some for key, some in groups.items() if key[0] == "lora"})
    figure, axis = drawn(groups)
    assert not axis.texts and len(figure.legends) == 1
    file = tmp_path / "p.svg"
    shown(tmp_path, capsys, "--select", "lr", "--by", "method", "--plot", str(file))
    assert file.stat().st_size > 5000
    make(tmp_path / "few", {"exact_match": 0.5}, flags=["--lr", 1e-3],
         stored={"test_items": 3, "test_sha256": "u"})
    assert "select one by --runs" in refused(tmp_path, "--select", "lr", "--by", "method", "--plot", str(file))


def test_the_axis_that_is_chosen(tmp_path):
    assert plots.choose_axis(grouped(make(tmp_path / "a" / "x", {"loss": 1}).parent)[1], ["method"]) == "step"
    make(tmp_path / "a" / "y", {"loss": 1}, flags=["--rank", 2])
    by, groups = grouped(tmp_path / "a")
    assert plots.choose_axis(groups, by) == "rank"
    for i, method in enumerate(("lora", "lora", "adalora")):
        log = [dict(event="prune", step=1, ranks={"blocks.0.attn.q": 2})] if method == "adalora" else ()
        make(tmp_path / "b" / str(i), {"loss": 1}, log=log, flags=["--method", method, "--seed", i])
    by, groups = grouped(tmp_path / "b")
    assert plots.choose_axis(groups, by) == "step"
    assert plots.choose_axis({k: v for k, v in groups.items() if k == ("adalora",)}, by) == "ranks"
    make(tmp_path / "c" / "z", {"loss": 1}, log=rlhf(1))
    assert plots.choose_axis(grouped(tmp_path / "c")[1], ["method"]) == "sqrt_kl"


@pytest.mark.parametrize("values, log", [
    ([1, 2, 4, 8], True), ([1e-4, 3e-4, 1e-3], True), ([1, 2, 3, 4], False), ([0, 1, 10], False),
    ([1, 8], False), ([10, 20, 30], False)])
def test_axes_are_logarithmic_where_values_grow_by_factors(values, log):
    assert plots.grows_by_factors(values) == log


def test_without_matplotlib_a_sentence(tmp_path, monkeypatch):
    make(tmp_path / "a", {"loss": 1})
    real = builtins.__import__

    def absent(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    assert "pip install matplotlib" in refused(tmp_path, "--plot", str(tmp_path / "p.png"))


def test_plots_that_cannot_be_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    make(tmp_path / "a", {"loss": 1}, log=curve(1))
    make(tmp_path / "none" / "a", {"loss": 1}, flags=["--method", "none"])
    assert "no steps of training" in refused(tmp_path / "none", "--plot", "p.png", "--x", "step")
    for file, x, sentence in (("p.jpeg", "step", "must end in"),
                              ("no/such/p.png", "step", "cannot be written"),
                          ("p.png", "ranks", "--method adalora"), ("p.png", "sqrt_kl", "gold"),
                          ("p.png", "rank", "name it in --by")):
        assert sentence in refused(tmp_path, "--plot", file, "--x", x)


def test_an_edge_is_one_of_all_that_was_tried():
    choice = choose.Choice(("lora",), 2, {1: 0.1, 2: 0.2}, [2], [4], [1], [], False)
    assert choose.edge_note(choice, "lora", "lr") == []         # another seed ran 4
    assert choose.edge_note(choice._replace(not_chosen_from=[]), "lora", "lr")


def test_a_metric_before_training_improves_as_it_does_after():
    assert runs.lower_is_better("before.loss") and not runs.lower_is_better("before.exact_match")
