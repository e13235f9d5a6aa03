"""Tags: words and their first tokens, entities by CoNLL's definition, entities as text; runs of both."""
import json

import pytest
import torch

import prompts
import train
from data.results import evaluate, metrics
from data.text import formats, entities
from data.batches.examples import Text, targets
from data.checkpoints.safetensors import read_tensors
from data.runtime.files import read_json
from data.text.tokenizer import Tokenizer
from model import GPT, GPTConfig
from prompts import PTuningV2
from tiny import stopped

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TOKENIZER = Tokenizer.train(["Fay met Luca in Hollowby. " * 9], 290, SPECIAL)
NAMES = ("O", "B-LOC", "B-PER", "I-PER")
SOFT = [m.name for m in prompts.METHODS]


def row(words, tags):
    return {"tokens": words.split(), "tags": tags.split()}


FAY = row("Fay Bell met Luca in Hollowby .", "B-PER I-PER O B-PER O B-LOC O")


# ---------------------------------------------------------------------------------------------- entities

@pytest.mark.parametrize("predicted, gold, scores", [
    ("B-PER I-PER O B-LOC", "B-PER I-PER O B-LOC", (1, 1, 1)),
    ("B-PER O O O", "B-PER I-PER O B-LOC", (0, 0, 0)),                      # half a name is no name
    ("B-PER I-PER O O", "B-PER I-PER O B-LOC", (1, 1 / 2, 2 / 3)),
    ("B-PER I-PER B-LOC B-LOC", "B-PER I-PER O B-LOC", (2 / 3, 1, 4 / 5)),
    ("I-PER I-PER O I-LOC", "B-PER I-PER O B-LOC", (1, 1, 1)),              # I- after nothing opens a name
    ("B-PER I-LOC O O", "B-PER B-LOC O O", (1, 1, 1)),                      # so does I- of another kind
    ("B-PER B-PER O O", "B-PER I-PER O O", (0, 0, 0)),                      # B- always opens
    ("O O O O", "B-PER O O O", (0, 0, 0)), ("O O O O", "O O O O", (0, 0, 0)),
])
def test_precision_recall_f1_by_hand(predicted, gold, scores):
    assert metrics.span_scores([predicted.split()], [gold.split()]) == pytest.approx(scores)
    assert metrics.span_f1([predicted.split()], [gold.split()]) == pytest.approx(scores[2])


def test_pooled_over_texts_and_spans_as_they_are():
    predicted, gold = [["B-X"], ["O", "B-X"], ["B-X"]], [["B-X"], ["B-X", "O"], ["B-X"]]
    assert metrics.span_scores(predicted, gold) == pytest.approx((2 / 3, 2 / 3, 2 / 3))
    assert metrics.span_scores([{("X", 0, 0), ("X", -1, -1)}], [["B-X"]]) == pytest.approx((0.5, 1, 2 / 3))


# ------------------------------------------------------------------------------------------ entities as text

def test_formatted_and_parsed_by_hand():
    predicted = entities.format_entities(FAY["tokens"], FAY["tags"])
    assert predicted == "PER: Fay Bell, PER: Luca, LOC: Hollowby"
    assert entities.parse_entities(predicted, FAY["tokens"]) == metrics.spans(FAY["tags"])
    assert entities.format_entities(["a"], ["O"]) == "none" and entities.parse_entities(" none", ["a"]) == set()
    twice = row("Fay met Fay", "B-PER O B-PER")
    assert entities.parse_entities("PER: Fay, PER: Fay", twice["tokens"]) == {("PER", 0, 0), ("PER", 2, 2)}
    comma = row("Fay , of Bell : met", "B-PER I-PER I-PER I-PER I-PER O")
    assert entities.parse_entities(entities.format_entities(**comma), comma["tokens"]) == {("PER", 0, 4)}
    back = entities.parse_entities("LOC: Hollowby, PER: Luca", FAY["tokens"])            # out of order
    assert back == {("LOC", 5, 5), ("PER", 3, 3)}
    wrong = entities.parse_entities("PER: Zoe, PER: Zoe, rubbish, PER:", FAY["tokens"])
    assert len(wrong) == 3 and all(first < 0 for _, first, _ in wrong)      # not in the text: each counts as wrong
    assert entities.question(NAMES) == "Which names are in this text: LOC or PER?"


def exact(rows):
    return sum(entities.parse_entities(entities.format_entities(r["tokens"], r["tags"]), r["tokens"]) == metrics.spans(r["tags"])
               for r in rows) / len(rows)


def test_the_toys_names_come_back_exactly():
    assert exact(formats.load("toy/entities", "test").rows) == 1


def test_real_names_come_back(assets):
    assert exact(formats.load(assets / "wnut17", "train").rows) > 0.98


# ---------------------------------------------------------------------------------------- words and tokens

def test_word_tokens_are_the_joined_text():
    words = FAY["tokens"] + ["Überraschung", "😀", "n't", "12"]
    ids, first = entities.word_tokens(words, TOKENIZER, 7)
    assert ids[0] == 7 and ids[1:] == TOKENIZER.encode(" ".join(words)) and first[0] == 1
    for word, a, b in zip(words, first, [*first[1:], len(ids)]):
        assert TOKENIZER.decode(ids[a:b]).strip() == word
    assert entities.word_tokens(["", "a"], TOKENIZER, 7) == ([7, 7, *TOKENIZER.encode(" a")], [1, 2])


@pytest.mark.parametrize("soft_prompt_ids", [([], []), ([-1, -2], [-3])])
def test_an_example_supervises_first_tokens_only(soft_prompt_ids):
    text = Text(TOKENIZER, "plain", labels=NAMES, classifier="head", soft_prompt_ids=soft_prompt_ids)
    before, after = soft_prompt_ids
    (e,), counts = text.encode([FAY], 64)
    ids, first = entities.word_tokens(FAY["tokens"], TOKENIZER, TOKENIZER.eos)
    assert e.ids == before + ids + after and counts["truncated"] == 0 and e.bidirectional_len == 0 and e.head
    assert {i: NAMES[t] for i, t in enumerate(e.y) if t >= 0} == \
        {i + len(before): tag for i, tag in zip(first, FAY["tags"])}
    text.attention = "bidirectional"
    assert text.encode([FAY], 64)[0][0].bidirectional_len == len(e.ids)
    (e,), counts = text.encode([FAY], first[4] + len(before + after))       # four words fit
    assert sum(t >= 0 for t in e.y) == 4 and counts["truncated"] == 1
    assert len(e.ids) == first[4] + len(before + after)


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_tags_do_not_depend_on_the_batch_and_soft_prompts_are_not_tagged(attention):
    torch.manual_seed(0)
    model = GPT(GPTConfig(TOKENIZER.vocab_size, 64, 2, 2, 16)).eval()
    for p in model.parameters():
        p.data.mul_(10 if p.dim() > 1 else 1)
    text = Text(TOKENIZER, "plain", labels=NAMES, classifier="head", attention=attention)
    rows = [FAY, row("Luca met Fay", "B-PER O B-PER"), row("Hollowby", "B-LOC")]
    examples = text.encode(rows, 64)[0]
    for prompt in (None, PTuningV2(model, 3, prefix_dropout=0.0)):
        ctx = evaluate.ModelContext(model, text, torch.device("cpu"), torch.float32, prompt=prompt,
                           head=torch.nn.Linear(16, 4, bias=False))
        predicted = evaluate.word_tags(ctx, examples)
        assert predicted == [evaluate.word_tags(ctx, [e])[0] for e in examples]
        assert [len(t) for t in predicted] == [7, 3, 1]
        for e, t in zip(examples, predicted):
            with torch.no_grad():
                bidirectional_len = torch.tensor([len(e.ids)]) if attention == "bidirectional" else None
                past = prompt(model) if prompt is not None else None
                h = model.hidden_states(torch.tensor([e.ids]), past, bidirectional_len=bidirectional_len)[0][0]
                want = ctx.head(h[[i for i, y in enumerate(e.y) if y >= 0]]).argmax(-1)
            assert t == [NAMES[k] for k in want]


# ---------------------------------------------------------------------------------------------------- runs

@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Names are capital letters, two in a row are one name; whether x is a place, the *next* word tells."""
    folder = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    model = GPT(GPTConfig(TOKENIZER.vocab_size, 96, 2, 2, 32, eos=TOKENIZER.eos))
    model.save_pretrained(folder / "base")
    TOKENIZER.save_pretrained(folder / "base")
    rows = [row(f"{a} {b} {c}", {"x": "O B-LOC O" if c == "!" else "O B-PER O"}.get(b, "B-PER I-PER O"))
            for a in "PQRSTU" for b in "xVW" for c in "!?"]
    for split in ("train", "valid", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def run(world, out, *flags, code=0):
    args = ["--init", world / "base", "--data", world, "--out", out, *flags]
    args += [] if "eval" in flags or "none" in flags else ["--forgetting_data", "none"]
    assert train.main(list(map(str, args))) == code
    return read_json(out / "result.json")["metrics"] if code == 0 else None


LEARN = ["--task", "tag", "--method", "full", "--steps", "80", "--batch", "36", "--lr", "3e-3"]


def test_what_comes_later_can_only_be_seen_both_ways(world, tmp_path):
    causal = run(world, tmp_path / "causal", *LEARN, "--attention", "causal")
    both = run(world, tmp_path / "both", *LEARN, "--attention", "bidirectional")
    assert both["f1"] == both["precision"] == both["recall"] == both["accuracy"] == 1.0 and both["loss"] < 0.1
    assert causal["f1"] < 0.85                                      # a third of the names is a coin's toss
    again = run(world, tmp_path / "eval", "--task", "eval", "--init", tmp_path / "both")
    assert again["f1"] == 1.0 and again["loss"] == pytest.approx(both["loss"], rel=1e-4)
    stored = read_json(tmp_path / "both" / "model" / "run.json")
    assert (stored["labels"], stored["classifier"], stored["attention"]) == ([*("O B-LOC B-PER I-PER".split())], "head",
                                                               "bidirectional")
    assert list(read_tensors(tmp_path / "both" / "model" / "head.safetensors")) == ["score.weight"]
    sample = read_json(tmp_path / "both" / "result.json")["samples"][0]
    assert sample["reference"] == sample["after"] == "LOC: x" and sample["before"] == "none"


@pytest.mark.parametrize("method", [m.name for m in train.METHODS if m.trains])
def test_every_method_tags(method, world, tmp_path):
    more = ["--num_virtual_tokens", "4"] if method in SOFT else []
    for attention in ("causal", "bidirectional"):
        found = run(world, tmp_path / attention, "--task", "tag", "--method", method, "--steps", "6",
                    "--batch", "36", "--attention", attention, *more)
        assert found["loss"] < 1.3863                               # ln 4: the head of zeros
        again = run(world, tmp_path / f"{attention}-eval", "--task", "eval", "--init", tmp_path / attention)
        assert again["loss"] == pytest.approx(found["loss"], rel=1e-4)


def test_resume_is_bit_exact(world, tmp_path, monkeypatch):
    flags = [*LEARN[:2], "--method", "lora", "--steps", "6", "--save_every", "2", "--attention",
             "bidirectional"]
    run(world, tmp_path / "whole", *flags)
    stopped(monkeypatch, 4, lambda: run(world, tmp_path / "cut", *flags))
    run(world, tmp_path / "cut", *flags)
    for name in ("adapter_model.safetensors", "head.safetensors"):
        a, b = (read_tensors(tmp_path / run / "adapter" / name) for run in ("whole", "cut"))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_the_same_rows_in_words(world, tmp_path):
    found = run(world, tmp_path / "r", "--method", "full", "--steps", "60", "--batch", "36", "--lr", "5e-3",
                "--max_new_tokens", "12")
    assert {"precision", "recall", "loss"} <= found.keys() and found["f1"] >= found["exact_match"] > 0.05
    assert read_json(tmp_path / "r" / "result.json")["samples"][0]["reference"] == "LOC: x"
    none = run(world, tmp_path / "none", "--method", "none", "--max_new_tokens", "4")
    assert none["f1"] < 0.2


def test_what_makes_no_sense_is_refused(world, tmp_path, capsys):
    run(world, tmp_path / "a", "--task", "tag", "--method", "full", "--data", "toy/sentiment", code=65)
    assert "toy/sentiment holds label rows; --task tag reads tags rows" in capsys.readouterr().err
    assert train.main(["--task", "tag", "--method", "none"]) == 2
    assert "--task tag has no head before it is trained" in capsys.readouterr().err
    assert train.main(["--task", "tag", "--classifier", "lm"]) == 2
    assert "--classifier belongs to --task classify" in capsys.readouterr().err


def test_words_that_were_cut_off_count_as_no_entity():
    model = GPT(GPTConfig(TOKENIZER.vocab_size, 64, 1, 2, 16)).eval()
    text = Text(TOKENIZER, "plain", labels=NAMES, classifier="head")
    ctx = evaluate.ModelContext(model, text, torch.device("cpu"), torch.float32)    # no head yet: every word is O
    _, first = entities.word_tokens(FAY["tokens"], TOKENIZER, TOKENIZER.eos)
    examples, counts = text.encode([FAY], first[4])
    assert counts["truncated"] == 1 and targets(examples[0]) == 4
    found, _ = evaluate.evaluate_tags(ctx, [FAY], examples)
    assert found["accuracy"] == pytest.approx(3 / 7) and found["recall"] == 0
