"""data/toy/symbols.py: documents of the corpus that are not sentences, for the other tokens.

    lists, tables, JSON     facts about people, with new lines, digits and punctuation
    sums, code              numbers; Python, C, shell, HTML, addresses, with made-up names
    copies                  random characters of every Unicode block, and pieces of words, to be repeated
    turns                   conversations in the chat templates chatml, llama3 and alpaca
    gaps                    text with a masked word, which follows behind its start token

A row of the embedding that is never a target moves only with the softmax's denominator: all such rows end in
the same place, and a frozen model can never say the one that an answer needs. Hence every byte that UTF-8
uses, every piece of a word that is a token, and every special token occurs here.

The questions in `turns` are about counting, repeating and formatting, never about people, reviews or
messages: the tasks of the toy world stay new to the model.

Special tokens are written by name (<|im_end|>); `--parse_special` reads them as such.

Public: document, TURN_FORMATS
"""
import json
import re

from data.toy import lexicon as lex

PREAMBLE = ("Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request.")
ROLES = ("system", "user", "assistant")
# {template: (what opens a conversation, {role: (what stands before a message, what stands behind it)})}
TURN_FORMATS = {
    "chatml": ("", {role: (f"<|im_start|>{role}\n", "<|im_end|>\n") for role in ROLES}),
    "llama3": ("<|begin_of_text|>",
               {role: (f"<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>") for role in ROLES}),
    "alpaca": (PREAMBLE, {"user": ("\n\n### Instruction:\n", ""),
                          "assistant": ("\n\n### Response:\n", "<|endoftext|>")}),
}
SYSTEMS = ("You are a helpful assistant.", "You are a clerk in {town}.", "Answer briefly.", "Be kind and exact.")
WORDS = sorted({*lex.FOODS, *lex.PETS, *lex.PRIZES, *lex.DAYS, *lex.TOWNS, *lex.JOBS})
IDENTIFIERS = "x y z i j k n name key value item items row rows total count text line data file index".split()
# First and last code point: ASCII with control characters, then blocks that use every byte of UTF-8.
BLOCKS = ((0x00, 0x1F), (0x00, 0x1F), (0x00, 0x1F), (0x20, 0x7F), (0x20, 0x7F), (0x80, 0xFF), (0x100, 0x17F),
          (0x180, 0x7FF), (0x180, 0x7FF), (0x600, 0x7FF), (0x370, 0x3FF), (0x400, 0x4FF), (0x590, 0x6FF),
          (0x800, 0xFFF), (0x1000, 0x1FFF), (0x2000, 0x27FF), (0x3000, 0x30FF), (0x4000, 0x4FFF),
          (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xE000, 0xFFFD), (0x1F300, 0x1FAFF), (0x10000, 0x3FFFF),
          (0x40000, 0xFFFFF), (0x100000, 0x10FFFF))


# ---- lists, tables, records --------------------------------------------------------------------------------
def bullets(rng, items):
    """Items one below the other, with one of the usual marks."""
    style = rng.choice(("- {item}", "* {item}", "{n}. {item}", "{n}) {item}", "[ ] {item}", "[x] {item}",
                        "{item}"))
    return "\n".join(style.format(n=n, item=item) for n, item in enumerate(items, start=1))


def word_list(world, rng):
    title = rng.choice(("To do", "Shopping", "Notes", "On the way", "For {day}", "Menu", "Things to bring"))
    items = rng.sample(WORDS, rng.randint(2, 6))
    if rng.random() < 0.3:
        items = [f"{item}: {rng.randint(1, 99)}" for item in items]
    return f"{title.format(day=rng.choice(lex.DAYS))}:\n{bullets(rng, items)}"


def person_record(world, rng):
    """Facts about a person as {key: value}."""
    name, = world.cast(rng, 1)
    keys = rng.sample(list(lex.FACTS), rng.randint(2, 4))
    return {"name": name, **{key: world.people[name][key] for key in keys}}


def record_json(world, rng):
    record = person_record(world, rng)
    if rng.random() < 0.5:
        record["age"] = rng.randint(5, 99)
        record["tags"] = rng.sample(lex.PETS, rng.randint(0, 3))
        record["at_home"] = rng.choice((True, False, None))
        record["score"] = round(rng.uniform(-5, 5), 2)
    if rng.random() < 0.3:
        record = {"items": [record, person_record(world, rng)], "count": 2}
    return json.dumps(record, indent=rng.choice((None, None, 2, 4)))


def record_lines(world, rng):
    """A record as `key: value` lines, YAML, or `key = "value"`."""
    style = rng.choice(("{key}: {value}", "{key} = \"{value}\"", "- {key}: {value}", "{key}\t{value}",
                        "**{key}**: {value}"))
    record = person_record(world, rng)
    return "\n".join(style.format(key=key, value=value) for key, value in record.items())


def table(world, rng):
    """Rows of facts, as CSV, TSV or Markdown."""
    keys = rng.sample(list(lex.FACTS), 2)
    rows = [["name", *keys]]
    for name in world.cast(rng, rng.randint(2, 3)):
        rows.append([name, *(world.people[name][key] for key in keys)])
    style = rng.choice((",", ";", "\t", "|"))
    if style != "|":
        return "\n".join(style.join(row) for row in rows)
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "| --- | --- | --- |", *lines[1:]])


# ---- numbers and code --------------------------------------------------------------------------------------
def sums(world, rng):
    lines = []
    for _ in range(rng.randint(1, 4)):
        a = rng.randint(0, 99)
        b = rng.randint(0, 20)
        lines.append(rng.choice((f"{a} + {b} = {a + b}", f"{a} - {b} = {a - b}", f"{a} * {b} = {a * b}",
                                 f"{a} <= {b} = {a <= b}", f"{a} > {b} = {a > b}",
                                 f"{a} % {b + 1} = {a % (b + 1)}")))
    return rng.choice(("\n", "; ", "\r\n")).join(lines)


def amounts(world, rng):
    """Dates, times, prices, shares, addresses."""
    n = [rng.randint(0, 9) for _ in range(8)]
    return rng.choice((
        f"20{n[0]}{n[1]}-0{n[2]}-1{n[3]} 1{n[4]}:{n[5] % 6}{n[6]}",
        f"Total: ${n[0]}{n[1]},{n[2]}{n[3]}{n[4]}.{n[5]}0 ({n[6]}.{n[7]} %)",
        f"{n[0]}.{n[1]}{n[2]}e-{n[3]} ~ {n[4]}/{n[5] + 1} != {n[6]}^{n[7]}",
        f"Tel. +{n[0]}{n[1]} ({n[2]}{n[3]}{n[4]}) {n[5]}{n[6]}-{n[7]}{n[0]} & #{n[1]}{n[2]}",
        f"{rng.choice(world.names).lower()}_{n[0]}{n[1]}@{rng.choice(lex.TOWNS).lower()}.org",
        f"https://www.{rng.choice(lex.TOWNS).lower()}.com/{rng.choice(lex.PETS)}"
        f"?id={n[0]}{n[1]}&q=%{n[2]}{n[3]}#{n[4]}",
        f"\\frac{{{n[0]}}}{{{n[1]}}} \\cdot $x_{n[2]}^{{{n[3]}}}$",
        f"<b>{rng.choice(WORDS)}</b><br/> <a href='/{n[0]}{n[1]}'>{rng.choice(WORDS)}</a>"))


def code(world, rng):
    a, b, c = rng.sample(IDENTIFIERS, 3)
    n, m = rng.randint(0, 99), rng.randint(0, 9)
    word = rng.choice(WORDS)
    return rng.choice((
        f"def {a}({b}, {c}={n}):\n    if {b} > {m}:\n        return {b} + {c}\n    return None",
        f"for {a} in range({n}):\n\t{b}[{a}] = \"{word}\"  # {word}\n\tprint({b}[{a}], end='')",
        f"int {a} = {n}; if ({a} < {m} && !{b}) {{ {c} += {a}; }} else {{ return -{m}; }}",
        f"$ grep -n '{word}' {a}.txt | head -{m} > {b}.log; echo ${c} && rm ~/{a}/*.tmp",
        f"import {a}\n\n{b} = [{n}, {m}]\n{c} = {{\"{a}\": {b}}}\nassert {b}[0] == {n}, f\"{{{c}}}\"",
        f"SELECT {a}, {b} FROM {c} WHERE {a} >= {n} AND {b} <> '{word}';",
        f"@{a}\nclass {b.title()}:\n    {c}: int = {n}  # `{word}`\n\n"
        f"    def __init__(self):\n        self.{a} = None\n",
        f"```python\n{a} = lambda {b}: {b} ** {m} // {n} | {c} ^ ~{a}\n```"))


# ---- copies ------------------------------------------------------------------------------------------------
def copies(rng, items):
    """Each item a few times, so that what comes next can be known."""
    item = rng.choice(items)
    separator = rng.choice((" ", "", ", ", "\n", " = ", " -> ", "-", "/", "|"))
    return separator.join([item] * rng.randint(3, 6))


def characters(world, rng):
    """Characters of one Unicode block, repeated."""
    first, last = rng.choice(BLOCKS)
    drawn = [chr(rng.randint(first, last)) for _ in range(rng.randint(1, 4))]
    if rng.random() < 0.3:                                      # a rule or an indent: ====, ##, two spaces
        drawn = [rng.choice("=-#*_. \t\n/+<>") * rng.randint(1, 6), rng.choice(WORDS)]
    return copies(rng, ["".join(drawn)])


def pieces(world, rng):
    """Words of the world spelled out from one of their letters on: e en enc ence."""
    text = " ".join([*(world.document(rng) for _ in range(4)), PREAMBLE, *exchange(rng)])
    words = sorted(set(re.findall(r"\w+", text)))              # rare words as often as frequent ones
    separator = rng.choice((" ", " ", "\n", "-", "/", ", ", "'", "(", ". "))
    parts = []
    for word in rng.sample(words, 8):
        start = rng.randrange(len(word))
        parts += [word[start:end] for end in range(start + 1, len(word) + 1)]
    return rng.choice(("", " ")) + separator.join(parts)


# ---- conversations -----------------------------------------------------------------------------------------
def exchange(rng):
    """(request, answer): repeat, count, list, format; nothing about people, reviews or messages."""
    words = rng.sample(WORDS, rng.randint(2, 4))
    first = rng.randint(0, 20)
    numbers = [str(first + i) for i in range(rng.randint(3, 6))]
    return rng.choice((
        (f"Repeat: {words[0]}", words[0]),
        (f"Repeat this three times, one per line: {words[0]}", "\n".join([words[0]] * 3)),
        (f"Count from {numbers[0]} to {numbers[-1]}.", ", ".join(numbers)),
        (f"List these: {', '.join(words)}", "\n".join("- " + word for word in words)),
        (f"Number these: {', '.join(words)}",
         "\n".join(f"{n}. {word}" for n, word in enumerate(words, start=1))),
        (f"Write as JSON: {', '.join(words)}", json.dumps(words)),
        (f"Write as JSON: {words[0]} {first}", json.dumps({words[0]: first})),
        (f"How many: {', '.join(words)}?", str(len(words))),
        (f"What is {first} + {len(words)}?", f"{first + len(words)}"),
        (f"In capitals: {words[0]}", words[0].upper()),
        (f"In code: {words[0]}", f"print(\"{words[0]}\")")))


def turns(world, rng):
    """A conversation of one to three exchanges in one of the templates."""
    opening, roles = TURN_FORMATS[rng.choice(list(TURN_FORMATS))]
    messages = []
    if "system" in roles and rng.random() < 0.5:
        messages.append(("system", rng.choice(SYSTEMS).format(town=rng.choice(lex.TOWNS))))
    for _ in range(rng.randint(1, 3)):
        request, answer = exchange(rng)
        messages += [("user", request), ("assistant", answer)]
    parts = [opening]
    for role, content in messages:
        before, after = roles[role]
        parts += [before, content, after]
    return "".join(parts)


def gaps(world, rng):
    """A fact with a masked word, and that word behind its start token; the spare tokens as marks."""
    name, = world.cast(rng, 1)
    words = world.fact(rng, name, rng.choice(list(lex.FACTS))).split()
    i = rng.randrange(len(words))
    gap = " ".join([*words[:i], "<|mask|>", *words[i + 1:]])
    text = f"{gap}<|start|>{words[i]}<|endoftext|>"
    mark = rng.choice(("<|spare_0|>", "<|spare_1|>", ""))
    return mark * rng.randint(1, 3) + text


# {function: how often, relative to the others}
DOCUMENTS = {word_list: 3, record_json: 4, record_lines: 2, table: 2, sums: 2, amounts: 3, code: 4,
             characters: 12, pieces: 13, turns: 8, gaps: 2}


def document(world, rng):
    """One to three of these texts, each from a line of its own."""
    makers = rng.choices(list(DOCUMENTS), list(DOCUMENTS.values()), k=rng.randint(1, 3))
    return "\n".join(make(world, rng) for make in makers)
