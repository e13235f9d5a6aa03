"""Tokenizers and chat templates in the style of GLM-4, Pythia and Mistral Nemo, against Hugging Face's answers.

The fixture comes from make_family_fixtures.py.
"""
import json
import re

import pytest
from make_family_fixtures import FAMILIES, FIXTURE
from make_tokenizer_fixtures import digest, mark, strings

from data.batches.examples import Text
from data.text import chat
from data.text.tokenizer import Tokenizer

FIXED = json.loads(FIXTURE.read_text("utf-8"))
TEXTS = strings()
TALKS = FIXED["conversations"]


def tokenizer_of(name, **changes):
    config = dict(FIXED["glm4_config"] if name == "glm4" else {}, **changes)
    return Tokenizer(json.loads(json.dumps(FIXED["tokenizers"][name]["spec"])), config)


def turns(*contents):
    return [dict(role=("user", "assistant")[i % 2], content=text) for i, text in enumerate(contents)]


def shown(ids, tokenizer):
    return tokenizer.decode(ids, special=True)


@pytest.mark.parametrize("name", FAMILIES)
def test_ids_of_2000_odd_strings(name, tmp_path):
    answers = FIXED["tokenizers"][name]
    assert digest(TEXTS) == FIXED["strings"], "the strings are not those of the fixture: make it again"
    tokenizer_of(name).save_pretrained(tmp_path)
    for tokenizer in (tokenizer_of(name), Tokenizer.from_pretrained(tmp_path)):
        ids = [tokenizer.encode(text) for text in TEXTS]
        marks = re.findall("....", answers["marks"])
        assert [text for text, i, m in zip(TEXTS, ids, marks, strict=True) if mark(i) != m] == []
        assert digest([tokenizer.decode(i) for i in ids]) == answers["decoded"]


def test_what_is_special():
    glm4, pythia = tokenizer_of("glm4"), tokenizer_of("pythia")
    assert glm4.start_ids == [glm4.special["[gMASK]"], glm4.special["<sop>"]] and pythia.start_ids == []
    run = pythia.encode("a" + " " * 24 + "b")           # a run of spaces is a word of Pythia's, and no special token
    assert len(run) == 3 and run[1] > max(pythia._spec["model"]["vocab"].values())
    assert pythia.decode(run) == "a" + " " * 24 + "b"


# ---- the template of GLM-4 ---------------------------------------------------------------------------------

def test_conversations_of_glm4():
    """Equal ids; behind the last answer stands its end token, which no chat_template of this family writes."""
    tokenizer = tokenizer_of("glm4")
    end = tokenizer.special["<|user|>"]
    assert chat.guess_template(tokenizer) == "glm4" and chat.note("glm4", tokenizer) == ""
    assert chat.end_token("glm4", tokenizer) == end
    for talk, (whole, asked) in zip(TALKS, FIXED["glm4_talks"], strict=True):
        answered = talk[-1]["role"] == "assistant"
        ids, mask = chat.render(talk, "glm4", tokenizer)
        assert ids == asked[:whole] + [end] * answered
        assert mask[-1] is answered
        assert chat.prompt(talk, "glm4", tokenizer) == asked


def test_what_is_learned_is_what_generation_gives():
    """A prompt ends in <|assistant|>; targets are the newline, the answer, and the <|user|> that ends it."""
    tokenizer = tokenizer_of("glm4")
    talk = turns("1+1", "2", "2+2", "4")
    ids, mask = chat.render(talk, "glm4", tokenizer)
    assert shown(ids, tokenizer) == "[gMASK]<sop><|user|>\n1+1<|assistant|>\n2<|user|>\n2+2<|assistant|>\n4<|user|>"
    assert shown([i for i, m in zip(ids, mask) if m], tokenizer) == "\n2<|user|>\n4<|user|>"
    for n in (1, 3):
        asked = chat.prompt(talk[:n], "glm4", tokenizer)
        reply = chat.answer(talk[n]["content"], "glm4", tokenizer)
        assert ids[:len(asked) + len(reply)] == asked + reply
        assert shown(asked, tokenizer).endswith("<|assistant|>")


EDGE = ("{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}")


@pytest.mark.parametrize("source, asked, says", [
    (EDGE, "<|user|>\nHi<|assistant|>", ""),                                            # without a start
    ("[gMASK]<sop>" + EDGE, "[gMASK]<sop><|user|>\nHi<|assistant|>", ""),
    ("[gMASK]<sop>{% if messages[0].role != 'system' %}{{ '<|system|>\nBe kind.' }}{% endif %}" + EDGE,
     "[gMASK]<sop><|system|>\nBe kind.<|user|>\nHi<|assistant|>", ""),                  # a system text of its own
    ("[gMASK]<sop>" + EDGE.replace("<|assistant|>{% endif", "<|assistant|>\n<think></think>\n{% endif"),
     "[gMASK]<sop><|user|>\nHi<|assistant|>", "it writes '.*<think></think>"),
])
def test_models_of_this_template(source, asked, says):
    tokenizer = tokenizer_of("glm4", chat_template=source)
    assert chat.guess_template(tokenizer) == "glm4"
    assert re.search(says, chat.note("glm4", tokenizer)) and bool(chat.note("glm4", tokenizer)) == bool(says)
    assert shown(chat.prompt(turns("Hi"), "glm4", tokenizer), tokenizer) == asked
    exported = chat.export("glm4", tokenizer)
    assert (exported.chat_template == source) == (not says)
    assert chat.prompt(turns("Hi"), "glm4", exported) == chat.prompt(turns("Hi"), "glm4", tokenizer)


def test_a_cut_prompt_keeps_both_start_tokens():
    text = Text(tokenizer_of("glm4"), "glm4")
    row = {"messages": turns("one two three " * 9, "four")}
    whole = text.prompt_ids(row)
    first = text.tokenizer.encode("[gMASK]<sop>", special=True)
    for limit in range(2, len(whole) + 1):
        ids = text.prompt_ids(row, limit=limit)
        assert len(ids) == limit and ids[:2] == first and ids[2:] == whole[len(whole) - limit + 2:]
    ids, mask = chat.render(row["messages"], "glm4", text.tokenizer)
    for limit in range(2, len(ids) + 1):
        cut, kept = chat.fit_to_length(ids, mask, limit, start=text.start_length)
        asked = kept.index(True)
        assert len(cut) == limit and asked >= limit // 2 and cut[:min(2, asked)] == first[:min(2, asked)]
        assert cut[asked] == ids[mask.index(True)]
        assert asked < 2 or cut[2:asked] == ids[mask.index(True) - asked + 2:mask.index(True)]


def test_an_export_starts_with_both_tokens():
    spec = FIXED["tokenizers"]["glm4"]["spec"]
    bare = Tokenizer({**spec, "post_processor": None}, {})
    exported = chat.export("glm4", bare)
    assert bare.start_ids == [] and exported.start_ids == [bare.special["[gMASK]"], bare.special["<sop>"]]
    assert exported.bos is None and chat.guess_template(exported) == "glm4"
    assert chat.render(turns("a", "b"), "glm4", exported) == chat.render(turns("a", "b"), "glm4", bare)
