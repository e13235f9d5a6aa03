"""Jinja without the package: equal to the package on chat templates, and what is refused."""
import functools
import json
import pathlib
import random

import pytest

from data.text.jinja import JinjaError, render

FIXTURES = pathlib.Path(__file__).parent / "fixtures" / "chat"
TEMPLATES = {path.stem: path.read_text("utf-8") for path in sorted((FIXTURES / "jinja").glob("*.jinja"))}
TALKS = json.loads((FIXTURES / "answers.json").read_text("utf-8"))["conversations"]


@functools.cache
def reference(source):
    """The package's template, in the environment of transformers."""
    sandbox = pytest.importorskip("jinja2.sandbox")             # torch needs it, so it is there
    environment = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(source)


@pytest.mark.parametrize("name", TEMPLATES)
def test_known_templates(name):
    for messages in TALKS:
        for options in ({}, {"add_generation_prompt": True}, {"add_generation_prompt": True, "enable_thinking": False}):
            values = {"messages": messages, "bos_token": "<s>", "eos_token": "</s>", **options}
            assert render(TEMPLATES[name], values) == reference(TEMPLATES[name]).render(values)


PIECES = ["a", " ", "\n", "  \n ", "{{ x }}", "{{- x }}", "{{ x -}}", "{{- '\n' -}}", "{# c #}", "{#- c -#}",
          "{% set y = x ~ '}}' %}", "{%- set y = 'é' + y | default('b') -%}", "{{ y }}",
          "{% if x == 'v' %}t{% elif y is defined %}\n u{% else %} e{% endif %}",
          "{%- for i in items -%} {{ loop.index ~ i | trim }}\n{% if loop.last %} {%- endif %} {% endfor %}",
          "{% for i in items %}{% set y = i %}{{ y }}{% endfor %}", "{{ 'q' if items[1:] and not z else \"it's\" }}"]


@pytest.mark.parametrize("seed", range(200))
def test_white_space_and_scopes(seed):
    source = "".join(random.Random(seed).choices(PIECES, k=9))
    values = {"x": "v", "items": [" m", "n "]}
    assert render(source, values) == reference(source).render(values), source


@pytest.mark.parametrize("source, want", [
    ("{{ a['b'].c[-1] + a.none }}|{{ nothing }}", "z|"), ("{{ [1, 2] | length - 1 }}", "1"),
    ("{{ m.role == 'user' and m.text is string }}", "True"), ("{{ m | tojson }}", '{"role": "user", "text": "é"}'),
    ("{%- set n = namespace(k=0) %}{% for c in 'abc' %}{% set n.k = loop.index0 %}{% endfor %}{{ n.k }}", "2"),
    ("{% for k, v in m.items() %}{{ k ~ '=' ~ v ~ ';' }}{% endfor %}", "role=user;text=é;"),
    ("{{ 'a\\nb' }}{{ 'it\\'s {% x %}' }}", "a\nbit's {% x %}"), ("{{ strftime_now is defined }}", "False"),
    ("{% for t in m.tools %}x{% endfor %}{{ m.tools | length }}{{ 'x' in m.tools }}", "0False"),
    ("{{ a.__class__ }}", ""), ("", ""), ("{# c #}\n\n\n", "\n"),
])
def test_values_by_hand(source, want):
    assert render(source, {"a": {"b": {"c": ["y", "z"]}}, "m": {"role": "user", "text": "é"}}) == want


@pytest.mark.parametrize("source, says", [
    ("{% macro f() %}{% endmacro %}", "uses {% macro %}"), ("{{ x | wordwrap }}", "the filter wordwrap"),
    ("{{ x.encode() }}", "calls encode"), ("{{ (1).__class__.__mro__ }}", "__mro__ of something undefined"),
    ("{{ open('f') }}", "uses open"), ("{{ [y for y in x] }}", "uses"), ("{{ lambda: 1 }}", "uses lambda"),
    ("{% if x %}", "lacks an endif"), ("{% endif %}", "uses {% endif %}"), ("a {{ 'b", "a tag is not closed"),
    ("{{ raise_exception('no system') }}", "^no system$"), ("{% set x = 1; import os %}", "uses import os"),
    ("{{ }}", "holds {{ }}"), ("{{ x if x }}", "SyntaxError"), ("{{ range(10 ** 9) }}", "operator Pow"),
    ("{% set x = 'ab' %}" + "{% set x = x + x %}" * 40 + "{{ x }}", "above 20000"), ("{{ x\0 }}", "null"),
    ("{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}", "more than 20000 steps"),
    ("{{ " + "(" * 9999 + " }}", "Error"), ("{% for x.y in [1] %}{% endfor %}", "AttributeError"),
])
def test_what_is_refused(source, says):
    """Nothing of Python can be reached, and nothing runs for long."""
    with pytest.raises(JinjaError, match=says):
        render(source, {"x": "v"})


def test_damaged_templates_are_text_or_an_error():
    draw = random.Random(0)
    values = {"messages": TALKS[3], "bos_token": "<s>", "add_generation_prompt": True}
    outcomes = []
    for _ in range(400):
        source = list(TEMPLATES[draw.choice([*TEMPLATES])])
        for _ in range(draw.choice([1, 3, 30])):
            at = draw.randrange(len(source) + 1)
            source[at:at + draw.choice([0, 1, 40])] = draw.choice(["", "{%", "}}", "(", "'", "\0", "é", " - ", "[", "end"])
        try:
            outcomes.append(type(render("".join(source), values)))
        except JinjaError:
            outcomes.append(JinjaError)
    assert {*outcomes} == {str, JinjaError}
