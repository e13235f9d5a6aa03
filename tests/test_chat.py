"""Chat templates: ids equal to Hugging Face's, the mask, and what is cut when an example is too long."""
import functools
import json
import os
import pathlib
import re
import types

import pytest

from data.text import chat
from data.text.chat import answer, end_token, fit_to_length, guess_template, prompt, render
from data.runtime.files import DataError, UserError
from data.batches.examples import Text
from data.text.tokenizer import Tokenizer

FIXTURES = pathlib.Path(__file__).parent / "fixtures" / "chat"
ANSWERS = json.loads((FIXTURES / "answers.json").read_text("utf-8"))
TALKS = ANSWERS["conversations"]
TEMPLATES = [record.name for record in chat.TEMPLATES]
SPECIAL = ["<|endoftext|>", *dict.fromkeys(token for record in chat.TEMPLATES for token in record.tokens)]
TOK = Tokenizer.train("Two and two is four.\n\n### Response:\nuser\nassistant\n" * 9, 320, special=SPECIAL)


def turns(*contents, role="user"):
    """user, assistant, user, ..."""
    return [dict(role=("user", "assistant")[i % 2], content=text) for i, text in enumerate(contents)]


def shown(ids, tokenizer=TOK):
    return tokenizer.decode(ids, special=True)


def targets_text(ids, mask, tokenizer=TOK):
    return tokenizer.decode([i for i, m in zip(ids, mask) if m], special=True)


# ---- what is written ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["smol", "qwen", "llama3", "smollm2"])
def test_ids_equal_those_of_hugging_face(name):
    folder = os.environ.get("SMOLLM2", "") if name == "smollm2" else FIXTURES / name
    if not folder:
        pytest.skip("SMOLLM2 names no folder of SmolLM2-135M-Instruct")
    tokenizer = Tokenizer.from_pretrained(folder)
    template = guess_template(tokenizer)
    assert template == ("llama3" if name == "llama3" else "chatml")
    for messages, (whole, asked) in zip(TALKS, ANSWERS[name], strict=True):
        assert render(messages, template, tokenizer)[0] == asked[:whole]
        assert prompt(messages, template, tokenizer) == asked


@pytest.mark.parametrize("template", TEMPLATES)
def test_an_answer_is_trained_behind_what_asks_for_it(template):
    """In a conversation of three answers; where a template shows earlier ones otherwise, it says so."""
    talk = turns("1+1", "2", "2+2", "4", "3+3", "6")
    ids, mask = render(talk, template, TOK)
    begins = [i for i, on in enumerate(mask) if on and not mask[i - 1]]
    asked = [prompt(talk[:n], template, TOK) for n in (1, 3, 5)]
    assert len(begins) == 3 and ids[:begins[2]] == asked[2]
    same = [ids[:i] == some for i, some in zip(begins, asked)]
    assert all(same) == (not chat.asks_otherwise_later(template, TOK)) and (all(same) or template == "qwen3")


def test_llama3_strips_contents():
    messages = [dict(m, content=f" \n{m['content']}\n ") for m in turns("Hi", "Ho")]
    assert render(messages, "llama3", TOK) == render(turns("Hi", "Ho"), "llama3", TOK)
    assert answer(" Ho\n", "llama3", TOK) == answer("Ho", "llama3", TOK)


TALK = [dict(role="system", content="Sum."), *turns("1+1", "2", "2+2", "4")]
TEXTS = {
    "chatml": ("<|im_start|>system\nSum.<|im_end|>\n"
               "<|im_start|>user\n1+1<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n"
               "<|im_start|>user\n2+2<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"),
    "qwen3": ("<|im_start|>system\nSum.<|im_end|>\n"
              "<|im_start|>user\n1+1<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n"
              "<|im_start|>user\n2+2<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n4<|im_end|>\n"),
    "llama3": ("<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nSum.<|eot_id|>"
               "<|start_header_id|>user<|end_header_id|>\n\n1+1<|eot_id|>"
               "<|start_header_id|>assistant<|end_header_id|>\n\n2<|eot_id|>"
               "<|start_header_id|>user<|end_header_id|>\n\n2+2<|eot_id|>"
               "<|start_header_id|>assistant<|end_header_id|>\n\n4<|eot_id|>"),
    "glm4": ("[gMASK]<sop><|system|>\nSum.<|user|>\n1+1<|assistant|>\n2<|user|>\n2+2<|assistant|>\n4<|user|>"),
    "alpaca": ("<|endoftext|>Sum.\n\n### Instruction:\n1+1\n\n### Response:\n2<|endoftext|>"
               "\n\n### Instruction:\n2+2\n\n### Response:\n4<|endoftext|>"),
    "plain": "<|endoftext|>Sum.\n1+1 2<|endoftext|>2+2 4<|endoftext|>",
    "raw": "Sum.\n1+1 2<|endoftext|>2+2 4<|endoftext|>",
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_to_the_letter(template):
    ids, mask = render(TALK, template, TOK)
    end = shown([end_token(template, TOK)])
    assert shown(ids) == TEXTS[template]
    lead = {"plain": " ", "raw": " ", "glm4": "\n"}.get(template, "")
    assert targets_text(ids, mask) == f"{lead}2{end}{lead}4{end}"
    assert len(ids) == len(mask) and all(type(m) is bool for m in mask)


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_prompt_begins_its_conversation(template):
    """Training and generation share their token ids: for every answer of every conversation."""
    odd = ["", " four", "\nfour", "\n\n", "  ", "### Response:\n", "four\n"]
    talks = TALKS + [turns(a, b, b, a) for a in odd for b in odd]
    for messages in talks:
        ids, mask = render(messages, template, TOK)
        for i, m in enumerate(messages):
            if m["role"] == "assistant" and i + 1 == len(messages):
                asked = prompt(messages[:i], template, TOK)
                reply = answer(m["content"], template, TOK)
                assert ids[:len(asked) + len(reply)] == asked + reply
                assert mask[len(asked):] == [True] * len(reply) + [False] * (len(ids) - len(asked) - len(reply))


def test_the_answer_keeps_its_first_token_whatever_precedes_it():
    """'Two' is one token here, and so is ' two': after 'and' the boundary must not be swallowed."""
    for text, reply in ((" two", " two"), ("two", " two"), ("\n\n", "\n\n")):
        ids, mask = render(turns("Two and", text), "plain", TOK)
        assert [i for i, m in zip(ids, mask) if m] == TOK.encode(reply) + [TOK.eos]
        assert ids[1:][:-len(TOK.encode(reply)) - 1] == TOK.encode("Two and")


@pytest.mark.parametrize("template", TEMPLATES)
def test_23_32_marks_in_a_text_are_text_and_there_is_one_start(template):
    text = "".join(SPECIAL).replace("</think>", "")              # which qwen3 refuses in an answer
    ids, mask = render(turns(text, text), template, TOK)
    plain, _ = render(turns("a", "a"), template, TOK)
    for mark in TOK.special.values():
        assert ids.count(mark) == plain.count(mark)
    assert plain.count(plain[0]) == {"llama3": 1, "chatml": 2, "glm4": 1}.get(template, 2)      # eos is also the start
    assert targets_text(ids, mask).lstrip(" \n") == text + shown([end_token(template, TOK)])


def test_raw_is_a_text_as_the_tokenizer_gives_it():
    start = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    for single, ids in (([text], []), ([start, text], [TOK.special["<|im_start|>"]]), ([text, start], None)):
        frame = {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": {}}
        processor = {"type": "Sequence", "processors": [{"type": "ByteLevel"}, frame]}
        tokenizer = Tokenizer({**TOK._spec, "post_processor": processor}, TOK._config)
        assert tokenizer.start_ids == ids
        if ids is None:
            with pytest.raises(UserError, match="adds more than a start token; use another --template"):
                prompt(turns("Hi"), "raw", tokenizer)
        else:
            assert prompt(turns("Hi"), "raw", tokenizer) == ids + TOK.encode("Hi")


@pytest.mark.parametrize("template", TEMPLATES)
def test_20_answers_of_weight_0_are_context(template):
    messages = turns("1+1", "2", "2+2", "4")
    messages[1]["weight"] = 0
    ids, mask = render(messages, template, TOK)
    assert ids == render(turns("1+1", "2", "2+2", "4"), template, TOK)[0]
    assert targets_text(ids, mask).lstrip(" \n") == "4" + shown([end_token(template, TOK)])
    messages[1]["weight"] = 1
    assert render(messages, template, TOK) == render(turns("1+1", "2", "2+2", "4"), template, TOK)


@pytest.mark.parametrize("weight", [0, 1])
@pytest.mark.parametrize("template", TEMPLATES)
def test_answers_are_encoded_alone_whatever_their_weight(template, weight):
    texts = []
    spy = types.SimpleNamespace(special=TOK.special, bos=None, eos=TOK.eos, chat_template="", start_ids=[],
                                encode=lambda text: texts.append(text) or [0] * len(text))
    messages = turns("1+1", "2", "2+2", "4")
    messages[1]["weight"] = weight
    render(messages, template, spy)
    assert [text.strip() for text in texts if text.strip() in ("2", "4")] == ["2", "4"]


@pytest.mark.parametrize("template", TEMPLATES)
def test_14_an_empty_prompt_leaves_something_to_predict_from(template):
    ids, mask = render(turns("", "four"), template, TOK)
    assert not mask[0] or template == "raw"
    assert targets_text(ids, mask).lstrip(" \n") == "four" + shown([end_token(template, TOK)])
    if template != "raw":                               # which takes an empty text as it is
        assert prompt([], template, TOK) and prompt(turns(""), template, TOK)


@pytest.mark.parametrize("template", TEMPLATES)
def test_19_two_answers_and_two_questions_in_a_row(template):
    messages = [*turns("a"), *turns("b"), *turns("", "c")[1:], *turns("", "d")[1:]]
    ids, mask = render(messages, template, TOK)
    end = shown([end_token(template, TOK)])
    between = "" if template == "glm4" else end         # where its user follows, and nowhere else
    assert targets_text(ids, mask).replace(" ", "").replace("\n", "") == f"c{between}d{end}"
    if template == "plain":
        assert shown(ids) == "<|endoftext|>a\nb c<|endoftext|> d<|endoftext|>"


def test_system_texts():
    smol = Tokenizer.from_pretrained(FIXTURES / "smol")
    qwen = Tokenizer.from_pretrained(FIXTURES / "qwen")
    assert "system\nYou are Smol, a model.<" in shown(prompt(turns("a"), "chatml", smol), smol)
    assert "system\nYou are Qwen, a model.<" in shown(prompt(turns("a"), "chatml", qwen), qwen)
    for tokenizer in (smol, TOK):
        assert "system" not in shown(prompt(turns("a"), "chatml", tokenizer, system=""), tokenizer)
        assert "system\nSum.<" in shown(prompt(turns("a"), "chatml", tokenizer, system="Sum."), tokenizer)
        own = [dict(role="system", content="Mine."), *turns("a")]
        assert "Sum" not in shown(prompt(own, "chatml", tokenizer, system="Sum."), tokenizer)
    assert "system" not in shown(prompt(turns("a"), "chatml", TOK))
    assert "Smol" not in shown(prompt(turns("a"), "plain", smol), smol)
    assert shown(prompt(turns("a"), "alpaca", TOK)) == \
        f"<|endoftext|>{chat.PREAMBLE}\n\n### Instruction:\na\n\n### Response:\n"
    assert shown(prompt(turns("a"), "alpaca", TOK, "")).startswith("<|endoftext|>### Instruction:\na\n")


# ---- models' own templates ---------------------------------------------------------------------------------
OWN = {path.stem: path.read_text("utf-8") for path in (FIXTURES / "jinja").glob("*.jinja")}
EXPECTED = {"smollm2": "chatml", "hermes3": "chatml", "qwen2.5": "chatml", "qwen3": "qwen3", "llama3": "llama3",
            "llama3.1": "llama3"}
BOS = {"smollm2": "<|im_start|>", "hermes3": "<|begin_of_text|>", "llama3": "<|begin_of_text|>",
       "llama3.1": "<|begin_of_text|>"}


def model_tokenizer(source, bos=None, tokenizer=TOK):
    config = {**tokenizer._config, "chat_template": source, "bos_token": bos}
    return Tokenizer(tokenizer._spec, config)


@functools.cache
def package_template(source):
    sandbox = pytest.importorskip("jinja2.sandbox")             # torch needs it, so it is there
    environment = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(source)


def package_text(source, messages, open_answer, tokenizer, **options):
    """What `transformers` makes of a chat_template: the package renders it."""
    names = {i: text for text, i in tokenizer.special.items()}
    return package_template(source).render(
        messages=messages, add_generation_prompt=open_answer, bos_token=names.get(tokenizer.bos),
        eos_token=names.get(tokenizer.eos), **options)


@pytest.mark.parametrize("name", OWN)
def test_the_templates_of_models_are_rendered_to_the_letter(name):
    tokenizer = model_tokenizer(OWN[name], BOS.get(name))
    template = guess_template(tokenizer)
    assert template == EXPECTED[name] and chat.note(template, tokenizer) == ""
    talks = [talk for talk in TALKS if talk]
    if name == "qwen3":                                         # has no thought where no question precedes
        talks = [talk for talk in talks if talk[-1]["role"] == "user" or "user" in [m["role"] for m in talk[-2:-1]]]
    assert len(talks) > 12
    for talk in talks:
        for open_answer in (False, True):
            if open_answer and name == "qwen3" and talk[-1]["role"] == "assistant":
                continue
            want = package_text(OWN[name], talk, open_answer, tokenizer, enable_thinking=False)
            got = prompt(talk, template, tokenizer) if open_answer else render(talk, template, tokenizer)[0]
            assert shown(got, tokenizer) == want


def test_models_by_hand():
    talk = turns("Hi", "Yes", "2+2", "4")
    want = {
        "smollm2": "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
                   "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        "qwen2.5": "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
                   "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        "hermes3": "<|begin_of_text|><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        "qwen3": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        "llama3": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
                  "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "llama3.1": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December "
                    "2023\nToday Date: 26 Jul 2024\n\n<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
                    "<|start_header_id|>assistant<|end_header_id|>\n\n"}
    for name, text in want.items():
        tokenizer = model_tokenizer(OWN[name], BOS.get(name))
        assert shown(prompt(talk[:1], EXPECTED[name], tokenizer), tokenizer) == text
    qwen3, llama = model_tokenizer(OWN["qwen3"]), model_tokenizer(OWN["llama3.1"], BOS["llama3.1"])
    assert shown(render(talk, "qwen3", qwen3)[0], qwen3).endswith(
        "<|im_start|>assistant\nYes<|im_end|>\n<|im_start|>user\n2+2<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n4<|im_end|>\n")
    assert "2024\n\nSum.<|eot_id|>" in shown(prompt(talk[:1], "llama3", llama, "Sum."), llama)
    assert "2024\n\n<|eot_id|>" in shown(prompt(talk[:1], "llama3", llama, ""), llama)


def test_qwen3_answers_hold_no_reasoning():
    talk = turns("Hi", "<think>\nhm\n</think>\n\nYes", "2+2", "4")
    assert render(talk, "qwen3", TOK) == render(turns("Hi", "Yes", "2+2", "4"), "qwen3", TOK)
    with pytest.raises(DataError, match='an answer holds "</think>".*use --template chatml'):
        render(talk[:2], "qwen3", TOK)
    assert "<think>\nhm" in shown(render(talk[:2], "chatml", TOK)[0])


CHATML = ("{% for m in messages %}{% if loop.first and m.role != 'system' %}{{ 'SYSTEM' }}{% endif %}"
          "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


@pytest.mark.parametrize("source, system", [
    ([{"name": "tool_use", "template": "{{ 'x' }}"}, {"name": "default", "template": CHATML.replace(
        "SYSTEM", "<|im_start|>system\nA.<|im_end|>\n")}], "A."),
    ({"default": CHATML.replace("SYSTEM", "<|im_start|>system\nA.<|im_end|>\n"), "rag": "{{ 1 }}"}, "A."),
    ("{% set s = 'You are B.' %}" + CHATML.replace("'SYSTEM'", "'<|im_start|>system\n' + s + '<|im_end|>\n'"),
     "You are B."),
    (CHATML.replace("'SYSTEM'", '"<|im_start|>system\nYou\'re {C} <the> \\"model\\".<|im_end|>\n"'),
     'You\'re {C} <the> "model".'),
    (CHATML.replace("{{ 'SYSTEM' }}", "{% if tools %}{{ '<|im_start|>system\nD<|im_end|>\n' }}{% endif %}"), None),
    (CHATML.replace("SYSTEM", "<|im_start|>system\nE\n\nF<|im_end|>\n"), "E\n\nF"),
    (CHATML.replace("SYSTEM", ""), None), (None, None),
])
def test_default_system_texts(source, system):
    tokenizer = model_tokenizer(source)
    assert guess_template(tokenizer) == "chatml" and chat.note("chatml", tokenizer) == ""
    first = "" if system is None else f"<|im_start|>system\n{system}<|im_end|>\n"
    assert shown(prompt(turns("a"), "chatml", tokenizer)) == \
        first + "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"


def test_no_newline_behind_the_end_token():
    source = CHATML.replace("SYSTEM", "").replace("'<|im_end|>\n'", "'<|im_end|>'")
    tokenizer = model_tokenizer(source)
    assert guess_template(tokenizer) == "chatml" and chat.note("chatml", tokenizer) == ""
    ids, mask = render(turns("a", "b", "c", "d"), "chatml", tokenizer)
    assert shown(ids) == ("<|im_start|>user\na<|im_end|><|im_start|>assistant\nb<|im_end|>"
                          "<|im_start|>user\nc<|im_end|><|im_start|>assistant\nd<|im_end|>")
    assert targets_text(ids, mask) == "b<|im_end|>d<|im_end|>"


@pytest.mark.parametrize("source, template, says", [
    (CHATML.replace("SYSTEM", "").replace("'assistant\n'", "'assistant\n<think>\n'").replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}"),
     "chatml", r"it writes '.*assistant\\n<think>\\n' where chatml writes '.*assistant\\n'"),
    (CHATML.replace("SYSTEM", "").replace("m.content +", "m.content | trim +"), "chatml", r"writes .*2 \+ 2\?<\|im_end"),
    ("{% for m in messages %}<|{{ m.role }}|>\n{{ m.content + eos_token }}{% endfor %}", "plain",
     r"it writes '<\|user\|>\\nHi\.<\|endoftext\|>' where plain writes '<\|endoftext\|>Hi\.'"),
    ("{% macro f() %}{% endmacro %}", "chatml", r"it is not read here \(it uses \{% macro %\}\)"),
    (CHATML.replace("'SYSTEM'", "''").replace("{% for", "{% if messages[0].role == 'system' %}{{ raise_exception("
                                              "'no system role') }}{% endif %}{% for", 1), "chatml", "no system role"),
])
def test_a_note_names_what_differs(source, template, says):
    """One sentence, which names the flags."""
    tokenizer = Tokenizer.train("a", 257) if template == "plain" else TOK
    tokenizer = model_tokenizer(source, tokenizer=tokenizer)
    assert guess_template(tokenizer) == template
    said = chat.note(template, tokenizer)
    assert said.startswith(f"the model's own chat template is not --template {template}: ")
    assert re.search(says, said), said
    assert said.endswith(f"; --template {template} accepts that, another --template or --system changes it")
    assert prompt(turns("a"), template, tokenizer)


@pytest.mark.parametrize("system", [None, "", "You're {{ so }} \"brief\" \\n é😀\r\n%}"])
@pytest.mark.parametrize("name", [*OWN, *TEMPLATES])
def test_what_is_exported_renders_the_same(name, system):
    """By the package, without options; read again it is the same template; a model's own stays where it can."""
    own = OWN.get(name) if name not in TEMPLATES or name == "qwen3" else None
    template = EXPECTED.get(name, name)
    tokenizer = model_tokenizer(own, BOS.get(name))
    exported = chat.export(template, tokenizer, system)
    for talk in TALKS:
        if any("<|" in m["content"] for m in talk):
            continue
        for open_answer in (False, True):
            text = package_text(exported.chat_template, talk, open_answer, exported)
            ids = prompt(talk, template, tokenizer, system) if open_answer else \
                render(talk, template, tokenizer, system)[0]
            if template == "glm4" and not open_answer and talk and talk[-1]["role"] == "assistant":
                text += "<|user|>"                      # of the next turn, which ends the answer
            assert text == shown(ids)
    if template not in ("alpaca", "plain", "raw") or system is None:   # whose system text a run keeps beside it
        assert guess_template(exported) == template and chat.note(template, exported) == ""
    for talk in (turns("a"), [dict(role="system", content="b"), *turns("a")]):
        again = None if system is None or template not in ("alpaca", "plain", "raw") else system
        assert prompt(talk, template, exported, again) == prompt(talk, template, tokenizer, system)
    keeps = own is not None and name not in ("qwen3", "llama3.1") and (
        system is None or system == "" and name in ("hermes3", "llama3"))
    assert (exported.chat_template == own) == keeps


def test_an_export_begins_with_the_start_token():
    """tokenizer(text) in transformers: the post-processor of tokenizer.json."""
    for template, start in (("plain", "<|endoftext|>"), ("alpaca", "<|endoftext|>"), ("llama3", "<|begin_of_text|>")):
        exported = chat.export(template, TOK)
        rule = exported._spec["post_processor"]
        assert rule["single"] == [{"SpecialToken": {"id": start, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        assert rule["special_tokens"][start]["ids"] == [TOK.special[start]]
        assert exported.bos == TOK.special[start] and exported.eos == TOK.eos
        assert prompt(turns("a"), template, exported) == prompt(turns("a"), template, TOK)
    assert chat.export("chatml", TOK)._spec["post_processor"] is None and chat.export("chatml", TOK).bos is None
    smol = model_tokenizer(None, "<|im_start|>")
    assert chat.export("plain", smol).bos == TOK.special["<|im_start|>"]        # keeps its role
    assert chat.export("plain", smol)._spec["post_processor"]["single"][0]["SpecialToken"]["id"] == "<|endoftext|>"


# ---- which template, which tokens --------------------------------------------------------------------------
def test_guess_and_end_tokens():
    base = Tokenizer.train("a", 257)
    assert guess_template(Tokenizer.train("a", 257, special=["<|im_start|>"])) == "plain"    # half a template is none
    assert guess_template(base) == "plain" and end_token("plain", base) == end_token("alpaca", base) == base.eos == 256
    assert guess_template(model_tokenizer(OWN["llama3"].replace("| trim", ""), BOS["llama3"])) == "llama3"
    assert end_token("chatml", TOK) == TOK.special["<|im_end|>"]
    assert end_token("llama3", TOK) == TOK.special["<|eot_id|>"]


def test_the_start_of_plain_text():
    """BOS where there is a real one, else EOS; SmolLM2's BOS opens turns."""
    turn, end = "<|im_start|>", "<|im_end|>"
    special = [turn, end, "<s>", "</s>"]
    for bos, eos, first in (("<s>", "</s>", "<s>"), (None, "</s>", "</s>"), (turn, end, end)):
        tokenizer = Tokenizer.train("a", 260, special=special, bos=bos, eos=eos)
        assert shown(prompt(turns("a"), "plain", tokenizer), tokenizer) == first + "a"
        assert shown([end_token("plain", tokenizer)], tokenizer) == eos


def test_templates_that_do_not_fit_the_tokenizer():
    base = Tokenizer.train("a", 256, special=())
    with pytest.raises(UserError, match=r"chatml needs the token <\|im_start\|>, which .*; use --template plain"):
        render(turns("a", "b"), "chatml", base)
    with pytest.raises(UserError, match="plain ends answers with the end-of-text token, and this tokenizer"):
        render(turns("a", "b"), "plain", base)
    with pytest.raises(UserError, match="--template gpt is none of chatml qwen3 llama3 glm4 alpaca plain"):
        end_token("gpt", TOK)


# ---- too long ----------------------------------------------------------------------------------------------
def example(asked, reply, after=0):
    """Distinct ids: 0.. the prompt, 100.. the answer, 200.. what follows it."""
    ids = [*range(asked), *range(100, 100 + reply), *range(200, 200 + after)]
    return ids, [False] * asked + [True] * reply + [False] * after


def test_what_fits_is_left_alone():
    for choice in ("truncate", "drop", "error"):
        ids, mask = example(5, 5)
        assert fit_to_length(ids, mask, 10, choice) == (ids, mask)


def test_21_drop_and_error():
    assert fit_to_length(*example(5, 6), 10, "drop") is None
    with pytest.raises(DataError, match="^data.jsonl:3 has 11 tokens, and 10 fit; shorten it, or use --too_long truncate"):
        fit_to_length(*example(5, 6), 10, "error", location="data.jsonl:3")
    with pytest.raises(UserError, match="^only 1 tokens are left for an example, at least 2 are needed"):
        fit_to_length(*example(5, 6), 1)


@pytest.mark.parametrize("asked, reply, kept", [
    (4, 20, [0, 1, 2, 3, *range(100, 106)]),            # a short prompt stays whole
    (30, 3, [0, *range(24, 30), 100, 101, 102]),        # a short answer stays whole, with its end token
    (30, 30, [0, *range(26, 30), *range(100, 105)]),    # two long ones share
    (6, 5, [0, 2, 3, 4, 5, *range(100, 105)]),
    (1, 20, [0, *range(100, 109)]),
])
def test_21_22_truncation(asked, reply, kept):
    ids, mask = fit_to_length(*example(asked, reply), 10)
    assert ids == kept and mask == [i >= 100 for i in kept]


def test_22_truncation_always_leaves_some_of_both():
    for limit in range(2, 12):
        for asked in range(1, 15):
            for reply in range(1, 15):
                ids, mask = fit_to_length(*example(asked, reply, after=2), limit)
                assert len(ids) == min(limit, asked + reply + 2)
                assert ids[0] == 0 and ids == sorted(ids)
                assert mask == [100 <= i < 200 for i in ids] and 100 in ids     # the answer's first token
                if asked > 1 and limit > 3:
                    assert asked - 1 in ids                                     # the prompt's last


def test_truncation_of_a_prompt_alone_and_of_many_turns():
    assert fit_to_length(list(range(20)), [False] * 20, 5) == ([0, 16, 17, 18, 19], [False] * 5)
    ids, mask = render(turns("Two", "two", "Four", "four"), "chatml", TOK)
    for limit in range(8, len(ids)):
        cut, kept = fit_to_length(ids, mask, limit)
        assert len(cut) == limit and any(kept)
        assert targets_text(ids, mask).startswith(targets_text(cut, kept))


def test_a_cut_answer_has_no_end_token():
    for template in TEMPLATES:
        ids, mask = render(turns("Two and two is", "four, " * 50), template, TOK)
        cut, kept = fit_to_length(ids, mask, 60)
        assert kept[-1] and cut[-1] != end_token(template, TOK)
        assert cut[0] == ids[0]


def test_real_instructions(assets):
    from data.text.formats import load
    smol = Tokenizer.from_pretrained(FIXTURES / "smol")
    for row in load(assets / "instruct", "valid").rows:
        ids, mask = render(row["messages"], "chatml", smol)
        assert targets_text(ids, mask, smol) == row["messages"][-1]["content"] + "<|im_end|>"
        assert ids[:mask.index(True)] == prompt(row["messages"][:-1], "chatml", smol)


def test_an_answer_of_weight_0_behind_the_last_moves_nothing():
    """qwen3 shows earlier answers otherwise: the last trained one stands behind what it is asked with."""
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
    tokenizer = Tokenizer.train(["a b"], 256 + len(special), special)
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"},
             {"role": "user", "content": "r"}, {"role": "assistant", "content": "b", "weight": 0}]
    (ids, mask), = Text(tokenizer, "qwen3").encode([{"messages": turns}], 512)[0]
    assert ids[:mask.index(True)] == chat.prompt(turns[:1], "qwen3", tokenizer)
