"""data/results/report.py: the end of a run as printed, and the loss mask made visible."""
import pytest

from data.results.report import format_number, mark_targets, report

RESULT = dict(task="sft", method="lora", seed=1, params_trainable=10, adapter_bytes=40, steps=5, seconds=1.5,
              tokens_per_second=3, baseline_metrics={"loss": 2.0, "targets": 7, "old": 1},
              metrics={"loss": 1.25, "targets": 7, "forgetting": -0.0}, samples=[
                  {"prompt": "a " * 60, "reference": "b", "before": "", "after": "c\nd"}])


def test_a_run_that_trained(capsys):
    assert report(RESULT, "out/x", "python train.py --task chat --init out/x") == 0
    assert capsys.readouterr().out.split("\n") == [
        "                      before       after",
        "loss                  2.0000      1.2500",
        "forgetting                        0.0000",
        "old                        1",
        "",
        "  prompt    " + ("a " * 47).strip(),
        "            " + ("a " * 13).strip(),
        "  reference b",
        "  before    ",
        "  after     c",
        "            d",
        "",
        "python train.py --task chat --init out/x",
        "task=sft method=lora seed=1 params_trainable=10 adapter_bytes=40 steps=5 seconds=1.5 "
        "tokens_per_second=3 loss=1.25 forgetting=-0.0 out=out/x", ""]


def test_a_run_that_only_measured(capsys):
    report({**RESULT, "steps": 0, "virtual_tokens": ["0 word"]}, "out/x")
    lines = capsys.readouterr().out.split("\n")
    assert lines[:2] == ["loss                  1.2500", "forgetting            0.0000"]
    assert "  answer    c" in lines and "  before    " not in lines and "0 word" in lines
    assert not any(line.startswith("python") for line in lines)


def test_a_proportion_has_an_interval(capsys):
    report({**RESULT, "metrics": {"exact_match": 0.8, "loss": 1.0}, "baseline_metrics": {"exact_match": 0.1},
            "item_correct": "1111111100"}, "out/x")
    lines = capsys.readouterr().out.split("\n")
    assert lines[1] == "exact_match           0.1000      0.8000   95 %: 0.490 to 0.943, 10 items"      # Wilson
    assert lines[2] == "loss                              1.0000"


@pytest.mark.parametrize("x, text", [(None, ""), (12345, "12,345"), (0.5, "0.5000"), (1.5e7, "1.5e+07"),
                                     (float("nan"), "nan"), (float("inf"), "inf")])
def test_numbers_take_twelve_columns(x, text):
    assert format_number(x) == text.rjust(12)


class Letters:
    def decode(self, ids, special):
        return "".join(chr(i) for i in ids)


@pytest.mark.parametrize("mask, text", [("0110", "a[[bc]]d"), ("1001", "[[a]]bc[[d]]"), ("0000", "abcd"),
                                        ("1111", "[[abcd]]")])
def test_the_loss_mask(mask, text):
    assert mark_targets(list(b"abcd"), [bit == "1" for bit in mask], Letters()) == text
