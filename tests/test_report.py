"""data/results/report.py: the end of a run as printed, and the loss mask made visible."""
from types import SimpleNamespace

import pytest
import torch

from data.batches.examples import Ranking, Text, display
from data.results.metrics import unit
from data.results.report import (format_number, mark_targets, print_virtual_tokens, prompt_text, relocated,
                                 report, usual_cosines)
from data.text.tokenizer import Stream

RESULT = dict(task="sft", method="lora", seed=1, params_trainable=10, adapter_bytes=40, steps=5, seconds=1.5,
              tokens_per_second=3, baseline_metrics={"loss": 2.0, "targets": 7, "old": 1},
              metrics={"loss": 1.25, "targets": 7, "forgetting": -0.0}, out="out/x",
              next_command="python train.py --task chat --init out/x", samples=[
                  {"prompt": "a " * 60, "reference": "b", "before": "", "after": "c\nd"}])


def test_a_run_that_trained(capsys):
    assert report(RESULT, "out/x") == 0
    assert capsys.readouterr().out.split("\n") == [
        "                      before       after",
        "loss                  2.0000      1.2500  nats per token",
        "forgetting                        0.0000  rise of loss on other text, nats/token",
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
        "5 steps took 1.5 s, evaluation not included",
        "task=sft method=lora seed=1 params_trainable=10 adapter_bytes=40 steps=5 seconds=1.5 "
        "tokens_per_second=3 loss=1.25 forgetting=-0.0 out=out/x", ""]


def test_a_run_that_only_measured(capsys):
    report({**RESULT, "steps": 0, "virtual_tokens": ["0 word"], "next_command": None}, "out/x")
    lines = capsys.readouterr().out.split("\n")
    assert [line[:28] for line in lines[:2]] == ["loss                  1.2500",
                                                               "forgetting            0.0000"]
    assert not any(" took " in line or "tokens_per_second" in line for line in lines)
    assert "  answer    c" in lines and "  before    " not in lines and "0 word" in lines
    assert not any(line.startswith("python") for line in lines)


def test_one_step_is_no_plural(capsys):
    report({**RESULT, "steps": 1}, "out/x")
    assert "\n1 step took 1.5 s, evaluation not included\n" in capsys.readouterr().out


def test_a_proportion_has_an_interval(capsys):
    report({**RESULT, "metrics": {"exact_match": 0.8, "loss": 1.0}, "baseline_metrics": {"exact_match": 0.1},
            "item_correct": "1111111100"}, "out/x")
    lines = capsys.readouterr().out.split("\n")
    assert lines[1] == "exact_match           0.1000      0.8000  0 to 1, 95 %: [0.490, 0.943]"       # Wilson
    assert lines[2] == "loss                              1.0000  nats"


def test_the_command_names_the_folder_where_the_run_is_now(capsys):
    report(RESULT, "out/moved here")
    assert "\npython train.py --task chat --init 'out/moved here'\n" in capsys.readouterr().out
    assert relocated("eval --init out/x --data out/x2", "out/x", "y") == "eval --init y --data out/x2"


def test_the_bytes_are_those_of_what_was_saved(capsys):
    whole = {name: value for name, value in RESULT.items() if name != "adapter_bytes"}
    report({**whole, "model_bytes": 400}, "out/x")
    assert " model_bytes=400 " in capsys.readouterr().out


@pytest.mark.parametrize("beside, text", [({"targets": 1}, "nats per token"), ({"macro_f1": 1}, "nats per label"),
                                          ({"f1": 1}, "nats per word"), ({"pairs": 1}, "nats per prompt"),
                                          ({"margin": 1}, "per pair"), ({}, "nats")])
def test_a_loss_says_what_it_is_a_mean_over(beside, text):
    assert unit("loss", {"loss": 1, **beside}) == text


def test_a_sample_shows_the_whole_conversation_that_was_asked_about():
    def turn(role, content):
        return {"role": role, "content": content}
    text = Text(SimpleNamespace(special={}, vocab_size=0, eos=None), "plain")
    answer = turn("assistant", "x")
    assert prompt_text(text, {"messages": [turn("user", "a\nb"), answer]}) == "a\nb"
    several = [turn("user", "a"), turn("assistant", "b"), turn("user", "c"), answer]
    assert prompt_text(text, {"messages": several}) == "user: a\nassistant: b\nuser: c"
    text.system = "Be brief."
    assert prompt_text(text, {"messages": several[2:]}) == "system: Be brief.\nuser: c"
    own = [turn("system", "S"), *several[2:]]
    assert prompt_text(text, {"messages": own}) == "system: S\nuser: c"


@pytest.mark.parametrize("x, text", [(None, ""), (12345, "12,345"), (0.5, "0.5000"), (1.5e7, "1.5e+07"),
                                     (float("nan"), "nan"), (float("inf"), "inf")])
def test_numbers_take_twelve_columns(x, text):
    assert format_number(x) == text.rjust(12)


class Letters:
    def decoder(self, special):
        return Stream({i: bytes([i]) for i in range(256)})


@pytest.mark.parametrize("mask, text", [("0110", "a[[bc]]d"), ("1001", "[[a]]bc[[d]]"), ("0000", "abcd"),
                                        ("1111", "[[abcd]]")])
def test_the_loss_mask(mask, text):
    assert mark_targets(list(b"abcd"), [bit == "1" for bit in mask], Letters()) == text


def test_the_loss_mask_shows_characters_of_several_tokens():
    ids = list("naïve 日本 🙂".encode())
    assert mark_targets(ids, [False] * 7 + [True] * (len(ids) - 7), Letters()) == "naïve [[日本 🙂]]"


def test_all_answers_of_a_preference_are_shown():
    shown = display(Ranking([97], [[98, 99], [100]], [0, 1]))
    assert [mark_targets(ids, mask, Letters()) for _, ids, mask in shown] == ["a[[bc]]", "a[[d]]"]
    assert [title for title, _, _ in shown] == [" answer 1 of 2, best first", " answer 2 of 2, best first"]


@pytest.mark.parametrize("other", [0.0, 0.6, 1.0])
def test_how_near_words_usually_are(other):
    """Words in pairs with a cosine of `other`, else orthogonal; a random direction is near none of them."""
    table = torch.eye(256)
    table[1::2] = other * table[::2] + (1 - other ** 2) ** 0.5 * table[1::2]
    model = SimpleNamespace(wte=SimpleNamespace(weight=table), embed=lambda ids: 3 * table[ids],
                                  config=SimpleNamespace(vocab_size=256))
    of_random, of_words = usual_cosines(model)
    assert of_words == pytest.approx(other, abs=1e-6)
    assert 0.15 < of_random < 0.2                           # the largest of 256 normal numbers, over sqrt(256)


def test_the_sentence_about_cosines_is_wrapped(capsys):
    print_virtual_tokens(["a " * 100, "How to read the cosines: " + "b " * 100])
    first, *rest = capsys.readouterr().out.splitlines()
    assert len(first) == 200 and len(rest) == 3 and max(map(len, rest)) <= 110
