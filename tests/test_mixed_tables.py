"""What tables, comparisons and plots say where runs lack a number, share a name or have two test sets."""
import pathlib
import tarfile

import pytest
from test_table import LORA, make, refused, seeds, selected, shown, swept

from data.results import log_plots, plots, runs
from data.results.compare import seed_difference

ROOT = pathlib.Path(__file__).resolve().parent.parent


def words_of(text):
    return " ".join(text.split())


@pytest.mark.parametrize("count", [4, 3])               # 4: test items of two sets were averaged; 3: IndexError
def test_pairs_of_two_test_sets_are_not_averaged(tmp_path, capsys, count):
    for data, correct in (("a", ("1100", "1000")), ("b", ("0011"[:count], "0001"[:count]))):
        for method, outcome in zip(("lora", "full"), correct):
            for seed in (1, 2):
                make(tmp_path / f"{data}-{method}-{seed}", {"exact_match": outcome.count("1") / len(outcome)}, outcome,
                     data=data, flags=["--method", method, "--data", data, "--seed", seed],
                     stored={"test_items": len(outcome), "test_sha256": data})
    for flags in ((), ("--by", "method,data"), ("--by", "method")):
        assert "different test items" in refused(tmp_path, *flags, "--compare", "lora", "full")
    out = shown(tmp_path, capsys, "--by", "method,data", "--compare", "lora,data=a", "full,data=a")
    assert "pairs of runs: 2" in out and "t over 4 items; better on 1, worse on 0" in out


def test_a_test_set_on_which_nothing_is_chosen_is_named(tmp_path, capsys):
    swept(tmp_path, "lora", LORA)
    swept(tmp_path, "full", {1e-3: [(0.5, 0.5)] * 3}, ["--data", "other"],
          stored={"test_items": 50, "test_sha256": "u"})
    out = words_of(selected(tmp_path, capsys, "--by", "method"))
    assert "Not shown: runs on 50 test items of other, 3," in out


def test_a_point_stands_at_its_own_value(tmp_path):
    Figure = pytest.importorskip("matplotlib.figure").Figure
    rates = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
    for number in range(13):
        for rate in rates:
            make(tmp_path / f"{number}-{rate}", {"exact_match": 0.5}, "10",
                 flags=["--schedule", f"s{number:02}", "--lr", rate])
    found, _ = runs.gather([str(tmp_path / "*")])
    figure = Figure(dpi=200)
    plots.draw_sweep(figure, runs.group(found, ["schedule", "lr"]), ["schedule", "lr"], "exact_match", "lr")
    lines = [line.get_xdata() for line in figure.axes[0].lines if len(line.get_xdata()) == len(rates)]
    assert len(lines) == 13
    assert all(1 / 1.25 < x / rate < 1.25 for line in lines for x, rate in zip(line, rates))


def test_a_best_value_at_the_edge_is_named_though_another_is_as_good(tmp_path, capsys):
    swept(tmp_path, "adalora", {1e-3: [(0.5, 0.5)] * 2, 1e-2: [(0.8, 0.5)] * 2, 3e-2: [(0.8, 0.5)] * 2})
    out = words_of(selected(tmp_path, capsys, "--by", "method"))
    assert "adalora: equally good on valid are lr 0.01 0.03; the smallest stands." in out
    assert "adalora: lr 0.03 is the largest that was tried; a larger one may be better." in out


def test_groups_without_a_switch_keep_their_names(tmp_path, capsys):
    swept(tmp_path, "lora", {1e-3: [(0.7, 0.5)] * 3, 3e-3: [(0.8, 0.6)] * 3, 1e-2: [(0.7, 0.5)] * 3},
          ["--quant", "none"])
    swept(tmp_path, "full", {1e-4: [(0.5, 0.5)] * 2, 1e-3: [(0.7, 0.5)] * 2, 1e-2: [(0.6, 0.5)] * 2})
    out = words_of(selected(tmp_path, capsys, "--by", "quant"))
    assert "Groups chose from different values of lr, 3 each." in out
    assert "Groups report different numbers of seeds: 2 quant none; 1 quant -." in out
    assert "exact_match against quant none, paired by seed" in out
    assert log_plots.group_label((), ()) == "all" and log_plots.group_label((False, "x"), ("dora", "init")) == "x"


def test_two_paths_with_one_last_part_are_told_apart(tmp_path, capsys):
    for base, loss in (("a", 0.5), ("b", 0.7)):
        for seed in (1, 2):
            make(tmp_path / f"{base}{seed}", {"loss": loss}, flags=["--init", f"out/{base}/model", "--seed", seed],
                 stored={"base_sha256": base, "test_items": 4, "test_sha256": "t"},
                 log=[dict(event="train", step=1, tokens=1, loss=1.0)])
    rows = [line.split()[:2] for line in shown(tmp_path, capsys).splitlines()[1:3]]
    assert rows == [["out/a/model", "2"], ["out/b/model", "2"]]
    assert shown(tmp_path, capsys, "--across", "init").split()[:2] == ["out/a/model", "out/b/model"]
    assert "by seed  -0.2000" in shown(tmp_path, capsys, "--compare", "out/a/model", "init=out/b/model")


def test_a_mean_over_fewer_runs_than_the_row_is_said(tmp_path, capsys):
    stored = {"test_items": 4, "test_sha256": "t"}
    make(tmp_path / "1", {"loss": 0.5}, flags=["--seed", 1], stored=stored)
    make(tmp_path / "2", {"loss": 0.5, "exact_match": 0.5}, "1100", flags=["--seed", 2], stored=stored)
    make(tmp_path / "3", {"loss": 0.5, "exact_match": 0.5}, "1100", flags=["--seed", 2, "--method", "full"],
         stored=stored)
    out = shown(tmp_path, capsys, "--metric", "exact_match,loss")
    full, lora = (line.split() for line in out.splitlines()[1:3])
    assert full[2:5] == lora[2:5] == ["0.500", "[0.150,", "0.850]"]     # of the run that has it, Wilson's
    assert "Not all runs of a row have exact_match; its mean is over those that do: 1 of 2 lora." in words_of(out)


def tick_boxes(figure, axis):
    figure.draw_without_rendering()
    return [label.get_window_extent() for label in axis.get_xticklabels() if label.get_text()]


def test_numbers_below_a_plot_do_not_touch():
    matplotlib = pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure
    log = [dict(event="train", step=i, tokens=2390 * i, kl=1.0 * i, kl_k2=2.0) for i in range(1, 61)]
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(layout="constrained", dpi=200)
        log_plots.draw_logged(figure, {("ppo",): [log]}, ["algo"], "tokens", ["kl", "kl_k2"])
        boxes = tick_boxes(figure, figure.axes[0])
    assert len(boxes) >= 4 and all(a.x1 + 5 < b.x0 for a, b in zip(boxes, boxes[1:]))


def test_ranks_have_whole_titles_and_legible_numbers():
    matplotlib = pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure
    log = [dict(event="train", step=1, ranks={f"blocks.{i}.attn.q": 2 * (i + 1) for i in range(4)})]
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(layout="constrained", dpi=200)
        log_plots.draw_ranks(figure, {("adalora", 0.01): [log] * 4, ("adalora", 0.03): [log] * 4}, ["method", "lr"])
        figure.draw_without_rendering()
        for axis in figure.axes:
            assert axis._left_title.get_window_extent().x1 <= figure.bbox.x1
            shades = axis.images[0]
            for text in axis.texts:
                grey = shades.cmap(shades.norm(float(text.get_text())))[0]
                light = ((grey + 0.055) / 1.055) ** 2.4 + 0.05                      # WCAG's contrast
                assert (1.05 / light if text.get_color() == "white" else light / 0.05) > 4


def test_below_a_markdown_table_stands_an_empty_line(tmp_path, capsys):
    seeds(tmp_path, "a", [0.5, 0.6, 0.55], ["--rank", 2])
    seeds(tmp_path, "b", [0.7, 0.6], ["--rank", 4])
    lines = shown(tmp_path, capsys, "--by", "method", "--markdown").splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("Rows average over rank"))
    assert lines[at - 1] == ""
    seeds(tmp_path / "c", "a", [0.5, 0.5], ["--rank", 2])
    seeds(tmp_path / "c", "b", [0.9, 0.9], ["--rank", 4])
    out = shown(tmp_path / "c", capsys, "--markdown")
    assert "**0.900 ± 0.000**" in out and "; bold: the best of its table" in out and "; *" not in out


def test_a_matrix_says_what_its_cells_are(tmp_path, capsys):
    seeds(tmp_path, "a", [0.5, 0.6], ["--rank", 2])
    seeds(tmp_path, "b", [0.7, 0.6], ["--rank", 4])
    out = shown(tmp_path, capsys, "--across", "rank", "--metric", "loss")
    assert "items of toy; loss: mean ± sd over the runs of a cell." in out
    make(tmp_path / "c", {"loss": 1.0, "targets": 9}, flags=["--rank", 4, "--seed", 3])
    assert "mixed" in shown(tmp_path, capsys, "--across", "rank", "--metric", "loss").splitlines()[1]


def test_the_pages_differences_to_lora_on_real_text_are_those_of_the_stored_runs(tmp_path):
    """Rounded once: not from four decimals."""
    with tarfile.open(ROOT / "tests" / "runs" / "real.tar.xz") as stored:
        stored.extractall(tmp_path, filter="data")
    page = (ROOT / "data" / "results" / "README.md").read_text()

    def some(name, rate, of):
        return [run for seed in of
                for run in runs.gather([str(next(tmp_path.glob(f"**/{name}-{rate}-{seed}")))])[0]]
    for row, data, name, rate, of in (("| prefix tuning | 0.0003 | 1.654", "e2e", "prefix_tuning", "3e-4", (2, 3, 4)),
                                      ("| DoRA | 0.0005 |", "sms", "dora", "5e-4", (3, 4, 5)),
                                      ("| prompt tuning | 0.01 | 0.155", "sms", "prompt_tuning", "1e-2", (3, 4, 5))):
        lora = some(f"{data}-lora", "5e-3" if data == "e2e" else "5e-4", of)
        mean, _, half = seed_difference(list(zip(some(f"{data}-{name}", rate, of), lora)), "loss")
        line = next(line for line in page.splitlines() if line.startswith(row))
        assert f" {mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}] " in line
