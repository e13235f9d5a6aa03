"""data/results/untrained.py: rows of the head that no training reached, by hand; the note, and when it is due."""
import types

import pytest
import torch

from data.batches.examples import Text
from data.results import untrained
from data.text.tokenizer import Tokenizer
from model import GPT, GPTConfig

TOKENIZER = Tokenizer.train(["ab"], 259, ("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
NEWLINE = 10
COMMA = 44


def test_rows_that_coincide_by_hand():
    weight = torch.eye(6)                               # any two rows are sqrt(2) apart, and the limit is a tenth
    weight[4] = weight[1] + torch.tensor([0, 0, 0, 0, 0.1, 0])
    weight[5] = weight[2] + torch.tensor([0, 0, 0, 0, 0, 0.2])
    assert untrained.coinciding_ids(weight, range(6)) == [1, 4]
    assert untrained.coinciding_ids(weight, [4, 5]) == [4]
    assert untrained.coinciding_ids(weight, []) == []


def test_a_cluster_among_many_rows():
    weight = torch.randn(3000, 96, generator=torch.Generator().manual_seed(1))
    weight[100:1100] = weight[100] + 0.01 * torch.randn(1000, 96, generator=torch.Generator().manual_seed(2))
    assert untrained.coinciding_ids(weight, range(90, 1110)) == list(range(100, 1100))


def test_tied_scale_does_not_matter():
    weight = torch.randn(300, 32, generator=torch.Generator().manual_seed(1))
    weight[7] = weight[9]
    assert untrained.coinciding_ids(1e-4 * weight, range(300)) == [7, 9]


def context(classifier="lm", template="plain"):
    torch.manual_seed(1)
    model = GPT(GPTConfig(TOKENIZER.vocab_size, 32, 1, 2, 16)).requires_grad_(False)
    with torch.no_grad():
        model.wte.weight[NEWLINE] = model.wte.weight[COMMA]
        model.wte.weight[TOKENIZER.special["<|im_end|>"]] = model.wte.weight[COMMA]
    return types.SimpleNamespace(model=model, text=Text(TOKENIZER, template, classifier=classifier))


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(untrained, "log_progress", lines.append)
    return lines


WITH_NEWLINE = [([97, NEWLINE, 98], [False, True, True])]
WITHOUT = [([NEWLINE, 97, 98], [False, True, True])]    # a new line in the prompt is no target
LORA = types.SimpleNamespace(init="data/base", targets="q,v", get={"targets": "q,v"}.get)
SOFT = types.SimpleNamespace(init="data/base", get={}.get)


def test_the_note_names_tokens_and_remedies(said):
    untrained.warn(context(), LORA, WITH_NEWLINE)
    assert said == ["answers need 1 token that no training of data/base reached ('\\n'): with a frozen head it "
                    "cannot be learnt; use --targets q,v,head, or --method full"]
    untrained.warn(context(), SOFT, WITH_NEWLINE)
    assert "--method lora with head in --targets, or --method full" in said[1]


def test_an_end_token_that_was_never_trained_names_the_template(said):
    end = TOKENIZER.special["<|im_end|>"]
    untrained.warn(context(template="chatml"), LORA, [([97, end], [False, True])])
    assert "<|im_end|>" in said[0] and "another --template" in said[0]


@pytest.mark.parametrize("case", ["prompt only", "head trained", "classifier head"])
def test_no_note_where_nothing_is_lost(said, case):
    ctx = context(classifier="head" if case == "classifier head" else "lm")
    if case == "head trained":
        ctx.model.wte.weight.requires_grad_(True)
    untrained.warn(ctx, LORA, WITHOUT if case == "prompt only" else WITH_NEWLINE)
    assert said == []


def test_all_tokens_of_a_stream_are_targets(said):
    untrained.warn(context(), LORA, [97, NEWLINE, 98])
    assert "'\\n'" in said[0]


def test_the_limit_is_a_tenth_of_a_far_distance():
    """Rows on a line: 9 of 10 pairs are at most 7 apart, half of them 3; the first two are 0.5 apart."""
    weight = torch.tensor([[0.0], [0.5], [2], [3], [4], [5], [6], [7], [8], [9]])
    assert untrained.coinciding_ids(weight, range(10)) == [0, 1]
