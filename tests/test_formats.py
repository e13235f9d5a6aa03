"""Reading data files: every format, every fault (numbered as in the list of bad inputs), every split."""
import collections
import json
import os

import pytest

from data.text import formats, readers
from data.runtime.files import DataError, UserError
from data.text.formats import duplicates, leaks, load, prompt_key


def write(folder, content, name="data.jsonl"):
    """A file from bytes, text, or a list of rows."""
    if isinstance(content, list):
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return path


def read(folder, content, name="data.jsonl", split=None):
    return load(write(folder, content, name), split)


def fault(folder, content, name="data.jsonl", split=None):
    """The sentence that a file is refused with; the folder's name is taken out of it."""
    path = content if isinstance(content, os.PathLike) else write(folder, content, name)
    with pytest.raises(DataError) as e:
        load(path, split)
    message = str(e.value).replace(f"{folder}/", "")
    assert e.value.code == 65 and "\n" not in message, message
    return message


def user(text, answer=None):
    """One question, and perhaps its answer, as messages."""
    return [dict(role="user", content=text)] + ([] if answer is None else [bot(answer)])


def bot(text, **more):
    return dict(role="assistant", content=text, **more)


def system(text):
    return dict(role="system", content=text)


def pair(prompt="Hi", chosen="Ho", rejected="Hm", **more):
    return dict(prompt=prompt, chosen=chosen, rejected=rejected, **more)


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


def hh(*turns):
    return "".join(f"\n\n{'Assistant' if i % 2 else 'Human'}: {text}" for i, text in enumerate(turns))


QA = dict(prompt="Two and two?", completion=" four")
EXPECTED = user("Two and two?", " four")

# ---- formats -----------------------------------------------------------------------------------------------
TAGGED = dict(tokens=["Ann", "ran"], tags=["B-PER", "O"])
CHAT = {
    "completion": (QA, EXPECTED),
    "completion, messages": (dict(prompt=user("2+2?"), completion=[bot("4")]), user("2+2?", "4")),
    "completion, system": (dict(QA, system="Be brief."), [system("Be brief."), *EXPECTED]),
    "messages": (dict(messages=[dict(role="developer", content="Be brief."), dict(user("Hi")[0], name="Ann"),
                                bot("Hm", weight=0), *user("Again", "Hi!")]),
                 [system("Be brief."), *user("Hi"), bot("Hm", weight=0), *user("Again", "Hi!")]),
    "messages, parts": (dict(messages=[dict(role="user", content=[dict(type="text", text=x) for x in "ab"]),
                                       bot("c", refusal=None, tool_calls=None)]), user("ab", "c")),
    "Alpaca": (dict(instruction="Add.", input="2 2", output="4"), user("Add.\n2 2", "4")),
    "Alpaca, empty input": (dict(instruction="Add.", input="", output="4"), user("Add.", "4")),
    "Alpaca, null input": (dict(instruction="Add.", input=None, output="4"), user("Add.", "4")),
    "Alpaca, all": (dict(instruction="And 3?", output="6", system="Add.", history=[["2?", "4"]]),
                    [system("Add."), *user("2?", "4"), *user("And 3?", "6")]),
    "input and output": (dict(input="2 2", output="4"), user("2 2", "4")),
    "ShareGPT": (dict(conversations=[human("Hi"), gpt("Ho")], system="Sing."),
                 [system("Sing."), *user("Hi", "Ho")]),
}
REFERENCES = {
    "references alone": (dict(prompt="2+2?", references=["4", "four"]), user("2+2?", "4")),
    "references too": (dict(prompt="2+2?", completion="Yes", references=["4", "four"]), user("2+2?", "Yes")),
    "messages": (dict(messages=user("2+2?"), references=["4", "four"]), user("2+2?", "4")),
    "input and outputs": (dict(input="2+2?", outputs=["4", "four"]), user("2+2?", "4")),
}
PAIRS = {
    "pair": pair(),
    "messages": pair(user("Hi"), [bot("Ho")], bot("Hm")),
    "conversations": dict(chosen=user("Hi", "Ho"), rejected=user("Hi", "Hm")),
    "HH": dict(chosen=hh("Hi", "Ho"), rejected=hh("Hi", "Hm")),
    "Alpaca": dict(instruction="Hi", input="", chosen="Ho", rejected="Hm"),
    "ShareGPT": dict(conversations=[human("Hi")], chosen=gpt("Ho"), rejected=gpt("Hm")),
    "OpenAI": dict(input=dict(messages=user("Hi"), tools=[]), preferred_output=[bot("Ho")],
                   non_preferred_output=[bot("Hm")]),
}
RANKED = dict(prompt="Hi", responses=["a", "b", "c"], rank=[2, 1, 2])
OTHER = {
    "text": (dict(text="Once."), dict(text="Once.")),
    "label": (dict(text="hi", label="ham"), dict(text="hi", label="ham")),
    "label, a number": (dict(text="hi", label=1), dict(text="hi", label="1")),
    "label, true": (dict(text="hi", label=True), dict(text="hi", label="true")),
    "tags": (TAGGED, TAGGED),
    "ranked": (RANKED, dict(RANKED, prompt=user("Hi"))),
    "prompt": (dict(prompt="Hi"), dict(prompt=user("Hi"))),
    "pairs, votes": (pair(votes_for=2, votes_against=1), pair(user("Hi"), votes_for=2, votes_against=1)),
    "pairs, HH prompt": (pair(hh("Hi") + "\n\nAssistant:", " Ho", " Hm"), pair(user("Hi"), " Ho", " Hm")),
    "prompt, not HH": (dict(prompt=hh("Hi")), dict(prompt=user(hh("Hi")))),
    "prompt, not HH either": (dict(prompt=hh("Hi", "Ho", "")), dict(prompt=user(hh("Hi", "Ho", "")))),
    "pairs, HH, long": (dict(chosen=hh("Hi", "Yes?", "Bye", "Ah"), rejected=hh("Hi", "Yes?", "Bye", "Go")),
                        pair(user("Hi", "Yes?") + user("Bye"), "Ah", "Go")),
    **{f"chat, {name}": (row, dict(messages=expected)) for name, (row, expected) in CHAT.items()},
    **{f"chat, references, {name}": (row, dict(messages=expected, references=["4", "four"]))
       for name, (row, expected) in REFERENCES.items()},
    **{f"pairs, {name}": (row, pair(user("Hi"))) for name, row in PAIRS.items()},
}


@pytest.mark.parametrize("name", OTHER)
def test_format(tmp_path, name):
    row, expected = OTHER[name]
    path = write(tmp_path, [row])
    data = load(path)
    assert data.row_type == name.split(",")[0]
    assert data.rows == [dict(expected, line=f"{path}:1")]
    assert data.dropped == {} and data.source == str(path)


def test_the_format_is_echoed_with_the_keys_that_are_not_read(tmp_path):
    assert read(tmp_path, [dict(QA, id=7, by="Ann")]).format == "prompt/completion (not read: by, id)"
    assert read(tmp_path, [dict(prompt="Hi", label=1)]).format == "prompt (not read: label)"
    assert read(tmp_path, [dict(instruction="a", input="", output="b")]).format == "Alpaca"


def test_23_25_26_strings_are_kept_to_the_letter(tmp_path):
    odd = " \t<|im_end|>\u2028\x00\x07 中文 👩‍👩‍👧‍👦 \r\n"        # marks, line ends, NUL, emoji: all of it text
    row = read(tmp_path, [dict(prompt=odd, completion=odd)]).rows[0]
    assert [m["content"] for m in row["messages"]] == [odd, odd]
    assert read(tmp_path, json.dumps(dict(text=odd)) + "\n").rows[0]["text"] == odd      # the same, escaped


def test_tables(tmp_path):
    table = 'label,text\r\nspam,"Win, now ""free"""\r\n\r\nham,"two\nlines"\r\n'
    spam, ham = read(tmp_path, table, "data.csv").rows
    assert (spam["text"], spam["label"]) == ('Win, now "free"', "spam")
    assert (ham["text"], ham["label"]) == ("two\nlines", "ham") and ham["line"].endswith("data.csv:5")
    data = read(tmp_path, 'label\ttext\nham\t"Hi\n', "data.tsv")                       # a quote is a quote
    assert data.rows[0]["text"] == '"Hi'
    assert len(read(tmp_path, "text\n" + "a" * 200_000, "data.csv").rows[0]["text"]) == 200_000
    assert read(tmp_path, "prompt,completion\n1+1?,2\n", "data.csv").row_type == "chat"
    assert "3 cells under a header of 2: label, text" in fault(tmp_path, "label,text\nham,a,b\n", "data.csv")
    assert "data.csv:2: not a table (1 cells" in fault(tmp_path, "label,text\nham\n", "data.csv")
    assert 'the key "text" appears twice' in fault(tmp_path, "text,text\na,b\n", "data.csv")
    assert "data.csv:3: not a table" in fault(tmp_path, 'label,text\nham,ok\nham,"open\n', "data.csv")
    assert "no known format has the keys ham, Hello" in fault(tmp_path, "ham\tHello\nspam\tWin\n", "data.tsv")


def test_a_text_file_is_one_document_cut_in_order_at_line_ends(tmp_path):
    text = "".join(f"line {i}\n" for i in range(1000))
    path = write(tmp_path, text, "data.txt")
    assert [row["text"] for row in load(path).rows] == [text]
    parts = [load(path, split).rows[0]["text"] for split in ("train", "valid", "test")]
    assert "".join(parts) == text and all(part.endswith("\n") for part in parts)
    assert [round(len(part) / len(text), 2) for part in parts] == [0.8, 0.1, 0.1]
    path = write(tmp_path, "a" * 1000 + "\n", "data.txt")                # no line ends to cut at
    assert [len(load(path, split).rows[0]["text"]) for split in ("train", "valid", "test")] == [800, 100, 101]
    data = load(write(tmp_path, "abc", "data.txt"), "valid")
    assert data.rows[0]["text"] == "abc" and data.source.endswith("(all of it, too few rows to split)")


# ---- faults ------------------------------------------------------------------------------------------------
def test_01_missing_file(tmp_path):
    message = fault(tmp_path, tmp_path / "no.jsonl")
    assert message == ("no.jsonl does not exist; data is a file (.jsonl .json .csv .tsv .txt), a folder with "
                       "train.jsonl, a fetched data set, or a name such as toy/sentiment")


@pytest.mark.parametrize("content", [b"", b"\n \r\n\t\n", b"[]", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("split", [None, "train"])
def test_02_03_nothing_in_the_file(tmp_path, content, split):
    assert fault(tmp_path, content, split=split) == "0 usable examples in data.jsonl: it holds no rows"


def test_02_03_nothing_in_a_table_or_text(tmp_path):
    assert "it holds no rows" in fault(tmp_path, "", "data.csv")
    assert "it holds no rows" in fault(tmp_path, "text,label\n", "data.csv")
    for content in ("", " \n\n"):
        assert fault(tmp_path, content, "data.txt") == "0 usable examples in data.txt: 1 with an empty text"


@pytest.mark.parametrize("content", [b"\xef\xbb\xbf%s\n%s\n", b"%s\r\n%s", b"\n\n%s\n  \n%s\n\n",
                                     b"\xef\xbb\xbf[%s,\r\n%s]", b"  [%s, %s]"])
def test_04_06_08_marks_line_ends_blank_lines_arrays(tmp_path, content):
    row = json.dumps(QA).encode()
    assert [r["messages"] for r in read(tmp_path, content % (row, row)).rows] == [EXPECTED, EXPECTED]


def test_04_a_mark_is_no_part_of_a_text_or_a_header(tmp_path):
    assert read(tmp_path, b"\xef\xbb\xbfOnce.", "data.txt").rows[0]["text"] == "Once."
    assert read(tmp_path, b"\xef\xbb\xbftext,label\na,b\n", "data.csv").row_type == "label"


def test_columns_that_no_format_has_come_with_a_remedy(tmp_path):
    assert "rename the columns in the first line" in fault(tmp_path, "Review,Stars\na,1\n", "a.csv")
    assert "the columns of a .csv are separated by commas" in fault(tmp_path, "text;label\na;b\n", "b.csv")


def test_05_invalid_utf8(tmp_path):
    good = json.dumps(QA).encode() + b"\n"
    sentence = "data.jsonl:2: byte 0xff is not UTF-8; save the file as UTF-8"
    assert fault(tmp_path, good + b'{"prompt": "\xff"}') == sentence
    assert fault(tmp_path, b"a\n\xff", "data.txt") == sentence.replace("jsonl", "txt")
    assert fault(tmp_path, b"text,label\na\xff,b\n", "data.csv").startswith("data.csv:2: byte 0xff")
    assert fault(tmp_path, b'[{"text": "a"},\n\n{"text": "\xff"}]').startswith("data.jsonl:3: byte 0xff")
    assert "byte 0xff is not UTF-8" in fault(tmp_path, json.dumps(QA).encode("utf-16"))


def test_07_truncated_json(tmp_path):
    good = json.dumps(QA) + "\n"
    assert fault(tmp_path, good + good[:30]) == ("data.jsonl:2: not JSON (Unterminated string starting at, "
                                                 "column 28); each line is one whole object")
    assert fault(tmp_path, json.dumps(QA, indent=1)).startswith("data.jsonl:1: not JSON")
    assert "each line is one whole object" in fault(tmp_path, good.strip() + good)
    message = fault(tmp_path, "[" + good + ",\n" + good, "data.json")
    assert message.startswith("data.json:4: ") and message.endswith("starts with [ is one array of rows")


def test_08_an_array_names_items(tmp_path):
    assert read(tmp_path, json.dumps([QA, QA]), "data.json").rows[1]["line"].endswith("data.json:item 2")
    assert 'data.jsonl:item 2: "completion" is missing' in fault(tmp_path, json.dumps([QA, dict(prompt="Hi")]))
    assert "data.jsonl:item 2: a number; a row is an object" in fault(tmp_path, json.dumps([QA, 3]))


@pytest.mark.parametrize("line, found", [("3", "a number"), ("0.5", "a number"), ('"a"', "a string"),
                                         ("null", "null"), ("true", "true or false"), ("[1]", "a list")])
def test_09_a_line_that_is_no_object(tmp_path, line, found):
    message = fault(tmp_path, json.dumps(QA) + "\n" + line + "\n")
    assert message.startswith(f"data.jsonl:2: {found}; a row is an object such as {{")


def test_10_duplicate_keys(tmp_path):
    message = fault(tmp_path, '{"text": "a", "text": "b"}')
    assert message == 'data.jsonl:1: not JSON (the key "text" appears twice)'
    twice = '{"messages": [{"role": "user", "role": "system", "content": ""}]}'
    assert '"role" appears twice' in fault(tmp_path, twice)


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity"])
def test_11_literals_that_are_no_json(tmp_path, literal):
    assert f"({literal} is no JSON number)" in fault(tmp_path, '{"text": "a", "score": %s}' % literal)


def test_11_numbers_too_large_and_lists_too_deep(tmp_path):
    row = json.dumps(pair(votes_for=7, votes_against=0)).replace("7", "1e999")
    assert '"votes_for" is a number; it must be a finite number' in fault(tmp_path, row)
    assert "data.jsonl:1: not JSON" in fault(tmp_path, '{"text": "a", "n": %s}' % ("1" * 5000))
    assert "data.jsonl:1: not JSON" in fault(tmp_path, '{"text": ' + "[" * 100_000 + "]" * 100_000 + "}")


def test_12_missing_field(tmp_path):
    assert fault(tmp_path, [QA, QA, dict(prompt="Hi")]) == (
        'data.jsonl:3: "completion" is missing, in a file of prompt/completion rows (see data.jsonl:1); '
        "all rows of a file have one format")
    message = fault(tmp_path, [dict(question="a", answer="b")])
    assert message.startswith("data.jsonl:1: no known format has the keys question, answer; known are text | text+")
    assert "no known format has the keys (none)" in fault(tmp_path, "{}\n")


@pytest.mark.parametrize("value, found", [(3, "a number"), (None, "null"), (False, "true or false"),
                                          ({}, "an object")])
@pytest.mark.parametrize("row, key", [
    (dict(text=0), "text"), (dict(text=0, label="a"), "text"), (QA, "prompt"),
    (dict(instruction="a", output=0), "output"), (RANKED, "responses"), (TAGGED, "tags"),
    (dict(messages=0), "messages"), (dict(input="a", outputs=0), "outputs")])
def test_13_not_a_string(tmp_path, row, key, value, found):
    message = fault(tmp_path, [dict(row, **{key: value})])
    if key == "outputs" and value is None:
        assert message.endswith("1 without a last answer")
    else:
        assert message.startswith(f'data.jsonl:1: "{key}" is {found}; it must be a ')


@pytest.mark.parametrize("row, sentence", [
    (dict(messages=[dict(role="user", content=None)]), '"content" is null; it must be a string'),
    (dict(messages=[dict(role="user", content=[dict(type="image_url")])]), '"content" is a list; it must'),
    (dict(conversations=[{"from": "human", "value": 3}]), '"value" is a number'),
    (dict(messages=["Hi"]), '"messages" holds a string; a message is {'),
    (dict(messages=[]), '"messages" is an empty list'),
    (dict(TAGGED, tokens=["a", None]), '"tokens[1]" is null'),
    (dict(TAGGED, tags=["S-PER", "O"]), "the tag S-PER is not BIO"),
    (dict(TAGGED, tags=["O"]), "2 tokens and 1 tags; every token needs one tag"),
    (dict(RANKED, rank=[1, 2]), '"rank" must be a list with a number for each of "responses"'),
    (dict(prompt="a", responses=["b"], rank=[1]), '"rank" must be a list with a number for each'),
    (dict(RANKED, rank="123"), '"rank" must be a list with a number for each of "responses"'),
    (dict(RANKED, rank=[1, 2, "3"]), '"rank" is a string; it must be a finite number'),
    (dict(text="a", label=0.5), '"label" is 0.5; it must be a name, or a whole number'),
    (dict(text="a", label=" "), '"label" is " "; it must be a name'),
    (dict(text="a", label=""), '"label" is ""; it must be a name'),
    (dict(instruction="a", output="b", history=3), '"history" is a number'),
    (dict(instruction="a", output="b", history=["q"]), '"history" is a string'),
    (dict(instruction="a", output="b", history=[["q"]]), '"history" holds a list of 1; it holds [question'),
    (dict(instruction="a", output="b", history=[["q", 3]]), '"history[1]" is a number'),
    (dict(instruction=3, output="b"), '"instruction" is a number'),
    (dict(QA, system=3), '"system" is a number'),
    (pair(chosen=user("a")), '"chosen" must be a string, or one assistant message'),
    (pair(chosen=user("a", "b")), '"chosen" must be a string, or one assistant message'),
    (dict(input="a", preferred_output="b", non_preferred_output="c"), '"input" is a string without "mess'),
    (dict(chosen=user("a"), rejected=user("a", "b")), '"chosen" and "rejected" must each be a conversation'),
    (dict(chosen=[bot("a")], rejected=[bot("b")]), '"chosen" and "rejected" must each be a conversation'),
    (dict(chosen="a", rejected="b"), '"chosen" and "rejected" do not begin with the same transcript'),
    (dict(chosen=hh("a", "b"), rejected=3), '"rejected" is a number')])
def test_13_inside_lists(tmp_path, row, sentence):
    assert fault(tmp_path, [row]).startswith("data.jsonl:1: ") and sentence in fault(tmp_path, [row])


def test_14_an_empty_prompt_is_fine_before_an_answer(tmp_path):
    assert read(tmp_path, [dict(prompt="", completion="a")]).rows[0]["messages"] == user("", "a")
    assert read(tmp_path, [dict(instruction="", output="a")]).rows[0]["messages"] == user("", "a")
    assert fault(tmp_path, [dict(prompt="")]) == "0 usable examples in data.jsonl: 1 with an empty prompt"


SKIPPED = {
    "with an empty answer": [                                                               # 15
        dict(prompt="a", completion=" \n"), dict(messages=user("a", "")), dict(instruction="a", output=""),
        dict(messages=user("a", "") + user("b", "c")), pair(chosen=""), pair(rejected=" "),
        dict(prompt="a", responses=["b", ""], rank=[1, 2])],
    "with chosen equal to rejected": [                                                      # 16
        pair(chosen="a", rejected="a"), dict(chosen=user("a", "b"), rejected=user("a", "b")),
        dict(chosen=hh("a", "b"), rejected=hh("a", "b"))],
    "without a last answer": [                                                              # 18
        dict(messages=user("a")), dict(messages=user("a", "b") + user("c")), dict(conversations=[human("a")]),
        dict(prompt="a", references=[]), dict(input="a", outputs=[" "])],
    "with all weights 0": [dict(messages=[*user("a"), bot("b", weight=0)])],                # 20
    "with equal ranks for all answers": [dict(RANKED, rank=[1, 1, 1])],
    "with conversations that differ before the last answer": [
        dict(chosen=user("a", "b"), rejected=user("x", "c")),
        dict(chosen=hh("a", "b", "c", "d"), rejected=hh("a", "e"))],
    "with an empty text": [dict(text=""), dict(text=" \n", label="a")],
    "without tokens": [dict(tokens=[], tags=[])],
}


@pytest.mark.parametrize("reason, row", [(reason, row) for reason, rows in SKIPPED.items() for row in rows])
def test_15_16_18_20_rows_that_train_nothing(tmp_path, reason, row):
    assert fault(tmp_path, [row, row]) == f"0 usable examples in data.jsonl: 2 {reason}"


def test_skipped_rows_are_dropped_and_counted(tmp_path):
    empty = dict(prompt="a", completion="")
    data = read(tmp_path, [empty, QA, empty, QA])
    assert data.dropped == {"with an empty answer": 2}
    assert [row["line"].rpartition(":")[2] for row in data.rows] == ["2", "4"]
    rows = [dict(messages=user("a")), dict(messages=user("a", "")), dict(messages=user("b", ""))]
    assert fault(tmp_path, rows).endswith(" data.jsonl: 1 without a last answer, 2 with an empty answer")


@pytest.mark.parametrize("role", ["bot", None, 3, ["user"], ""])
def test_17_unknown_roles(tmp_path, role):
    message = fault(tmp_path, [dict(messages=[dict(role=role, content="a")])])
    assert f'"messages" has the role {json.dumps(role)}; roles are system, developer, user, human,' in message


@pytest.mark.parametrize("turn", [
    bot(None, tool_calls=[dict(type="function")]), bot(None, function_call=dict(name="f")),
    dict(role="tool", content="a"), dict(role="function", content="a"), {"from": "observation", "value": "a"},
    {"from": "function_call", "value": "a"}])
def test_17_tool_calls(tmp_path, turn):
    assert "holds a tool call, and no chat template here renders one" in fault(tmp_path, [dict(messages=[turn])])


def test_17_tools(tmp_path):
    for tools in (dict(tools=[dict(type="function")]), dict(functions=[dict(name="f")])):
        message = fault(tmp_path, [dict(messages=user("a", "b"), **tools)])
        assert '"tools" are not supported' in message
    assert read(tmp_path, [dict(messages=user("a", "b"), tools=[])]).rows


def test_17_a_prompt_ends_with_what_is_to_be_answered(tmp_path):
    assert '"prompt" ends with an answer' in fault(tmp_path, [dict(prompt=user("a", "b"), completion="c")])
    assert '"prompt" ends with an answer' in fault(tmp_path, [pair(prompt=user("a", "b"))])


def test_19_two_answers_in_a_row_are_two_answers(tmp_path):
    turns = [*user("a", "b"), bot("c")]
    assert read(tmp_path, [dict(messages=turns)]).rows[0]["messages"] == turns


@pytest.mark.parametrize("weight", [2, 0.5, -1, "1", [0]])
def test_20_odd_weights(tmp_path, weight):
    message = fault(tmp_path, [dict(messages=[*user("a"), bot("b", weight=weight)])])
    assert message.startswith(f'data.jsonl:1: "weight" is {json.dumps(weight)} on a')


def test_20_weights_belong_to_assistants(tmp_path):
    row = dict(messages=[dict(role="user", content="a", weight=1), bot("b")])
    assert '"weight" is 1 on a message of role user' in fault(tmp_path, [row])


def test_24_half_a_surrogate_pair(tmp_path):
    assert fault(tmp_path, r'{"text": "a\ud83d"}') == \
        r"data.jsonl:1: \ud83d is half of a surrogate pair, not a character"
    assert "half of a surrogate" in fault(tmp_path, r'{"text": "a", "meta": {"\uDE00": 1}}')
    assert read(tmp_path, r'{"text": "\ud83d\ude00"}').rows[0]["text"] == "😀"
    assert "byte 0xed is not UTF-8" in fault(tmp_path, '{"text": "\ud83d"}')


def test_27_a_line_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_LINE", 2 << 20)
    row = json.dumps(dict(text="a" * (2 << 20)))
    assert fault(tmp_path, json.dumps(dict(text="a")) + "\n" + row) == \
        "data.jsonl:2: a line of over 2 MiB; split it into several rows"
    assert "larger than field limit" in fault(tmp_path, "text\n" + row, "data.csv")
    assert read(tmp_path, row[2:], "data.txt").rows                     # a document has no lines to speak of


def test_28_duplicates_and_leaks(tmp_path):
    rows = read(tmp_path, [QA, QA, dict(QA, completion="4"), dict(prompt="a", completion="b")]).rows
    assert duplicates(rows) == 1
    assert leaks(rows[:1], rows[2:]) == 1 and leaks(rows[3:], rows[:3]) == 0
    pairs = read(tmp_path, [pair("a", "b", "c"), pair("a", "c", "b"), pair("d", "b", "c")]).rows
    assert duplicates(pairs) == 0 and leaks(pairs[:1], pairs[1:]) == 1
    bare = read(tmp_path, [dict(prompt="", completion="a"), dict(prompt="", completion="b")]).rows
    assert leaks(bare[:1], bare[1:]) == 0 and leaks(bare[:1], bare[:1]) == 1   # nothing asked: the row counts
    tagged = read(tmp_path, [TAGGED, dict(TAGGED, tags=["O", "O"])]).rows
    assert duplicates(tagged) == 0 and leaks(tagged[:1], tagged[1:]) == 1


@pytest.mark.parametrize("n", [1, 2])
def test_29_30_a_handful_of_rows_is_not_split(tmp_path, n):
    path = write(tmp_path, [dict(prompt=f"{i}?", completion="a") for i in range(n)])
    for split in ("train", "valid", "test"):
        data = load(path, split)
        assert len(data.rows) == n and data.source == f"{path} (all of it, too few rows to split)"


def test_31_mixed_formats(tmp_path):
    message = fault(tmp_path, [QA, dict(messages=user("a", "b"))])
    assert 'data.jsonl:2: "prompt" is missing, in a file of prompt/completion rows (see data.jsonl:1)' in message
    message = fault(tmp_path, [dict(prompt="a"), QA])
    assert "data.jsonl:2: the keys of prompt/completion, in a file of prompt rows" in message
    message = fault(tmp_path, [dict(text="a"), dict(text="a", label="b")])
    assert "the keys of text/label, in a file of text rows" in message


@pytest.mark.parametrize("row", [
    dict(QA, text="a"), dict(QA, messages=user("a", "b")), dict(text="a", instruction="b", output="c"),
    dict(conversations=[], messages=[]), dict(QA, chosen="a", rejected="b")])
def test_31_the_keys_of_two_formats(tmp_path, row):
    message = fault(tmp_path, [row])
    assert "data.jsonl:1: the keys of two formats, " in message and message.endswith("; keep those of one")


def test_31_unpaired_feedback_is_refused(tmp_path):
    for row in (dict(QA, label=False), dict(conversations=[], kto_tag=True)):
        assert "unpaired thumbs up or down (KTO) are not supported" in fault(tmp_path, [row])


def test_31_alpaca_rows_may_leave_out_what_is_empty(tmp_path):
    data = read(tmp_path, [dict(instruction="a", output="b"), dict(instruction="a", input="c", output="b"),
                           dict(input="c", output="b")])
    assert [row["messages"][0]["content"] for row in data.rows] == ["a", "a\nc", "c"]


def test_32_paths_that_cannot_be_read(tmp_path):
    assert "holds no train, valid or test file" in fault(tmp_path, tmp_path)
    assert "unknown file type; a data file ends in .jsonl" in fault(tmp_path, b"PAR1", "data.parquet")
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert "pipe.jsonl is neither a file nor a folder" in fault(tmp_path, tmp_path / "pipe.jsonl")
    assert "cannot be read (File name too long)" in fault(tmp_path, tmp_path / ("a" * 300 + ".jsonl"))
    path = write(tmp_path, [QA], "closed.jsonl")
    path.chmod(0)
    if not os.access(path, os.R_OK):                                    # root may read everything
        assert "closed.jsonl cannot be read (Permission denied)" in fault(tmp_path, path)


# ---- splits ------------------------------------------------------------------------------------------------
def names(path):
    return {split: [row["text"] for row in load(path, split).rows] for split in ("train", "valid", "test")}


def test_a_file_is_split_by_content_alone(tmp_path):
    rows = [dict(text=f"story {i}") for i in range(2000)]
    before = names(write(tmp_path, rows))
    assert sorted(sum(before.values(), [])) == sorted(row["text"] for row in rows)
    assert abs(len(before["valid"]) - 200) < 50 and abs(len(before["test"]) - 200) < 50
    more = [dict(text=f"new {i}") for i in range(500)] + rows[::-1]
    after = names(write(tmp_path, more, "other.json"))
    assert all(set(texts) <= set(after[split]) for split, texts in before.items())
    twice = names(write(tmp_path, rows + rows))
    assert all(len(twice[split]) == 2 * len(texts) for split, texts in before.items())
    found = [split for i in range(6) for split in before if f"story {i}" in before[split]]
    assert found == ["test", "train", "valid", "train", "train", "test"]     # for ever: results depend on it


def test_answers_to_one_prompt_stay_together(tmp_path):
    path = write(tmp_path, [pair(f"{i % 300}?", f"a{i}", "b") for i in range(1500)])
    parts = {split: load(path, split).rows for split in ("train", "valid", "test")}
    assert leaks(parts["train"], parts["valid"]) == leaks(parts["train"], parts["test"]) == 0
    assert set(collections.Counter(map(prompt_key, parts["valid"])).values()) == {5}


@pytest.mark.parametrize("prompt", ["A joke!", ""])
def test_one_prompt_for_all_is_split_by_whole_rows(tmp_path, prompt):
    path = write(tmp_path, [dict(prompt=prompt, completion=f"Joke {i}") for i in range(300)])
    sizes = [len(load(path, split).rows) for split in ("train", "valid", "test")]
    assert sum(sizes) == 300 and min(sizes) > 10


def folder(tmp_path, **files):
    for name, rows in files.items():
        write(tmp_path, rows, name + ".jsonl")
    return tmp_path


def test_a_folder_has_its_splits(tmp_path):
    path = folder(tmp_path, train=[dict(text="a")], validation=[dict(text="b")], test=[dict(text="c")])
    assert names(path) == dict(train=["a"], valid=["b"], test=["c"])
    data = load(path)
    assert [row["text"] for row in data.rows] == ["a", "b", "c"] and data.source == str(path)
    write(path, "text,label\na,b\n", "train.csv")
    assert "holds both train.jsonl and train.csv; keep one" in fault(tmp_path, path)


def test_a_folder_without_valid_gives_a_tenth_of_train(tmp_path):
    path = folder(tmp_path, train=[dict(text=f"story {i}") for i in range(1000)], test=[dict(text="c")])
    parts = names(path)
    assert parts["test"] == ["c"] and not set(parts["train"]) & set(parts["valid"])
    assert len(parts["train"]) + len(parts["valid"]) == 1000 and 70 < len(parts["valid"]) < 130
    assert names(path / "train.jsonl")["valid"] == parts["valid"]       # the same rows as from the file
    write(path, "line\n" * 1000, "train.txt")
    (path / "train.jsonl").unlink()
    assert [len(load(path, split).rows[0]["text"]) for split in ("train", "valid")] == [4500, 500]


def test_a_folder_without_test_is_tested_on_valid_and_says_so(tmp_path):
    path = folder(tmp_path, train=[dict(text="a")], valid=[dict(text="b")])
    data = load(path, "test")
    assert data.rows[0]["text"] == "b" and data.source.endswith("valid.jsonl, because there is no test file")
    (tmp_path / "alone").mkdir()
    alone = folder(tmp_path / "alone", test=[dict(text="c")])
    assert "alone has no train file; it has test.jsonl" in fault(tmp_path, alone, split="train")
    assert "alone has no valid file; it has test.jsonl" in fault(tmp_path, alone, split="valid")


def test_a_folder_of_several_row_types_is_refused_as_a_whole(tmp_path):
    path = folder(tmp_path, train=[dict(text="a")], valid=[QA])
    assert "files of different row types: text, chat" in fault(tmp_path, path)


def test_unknown_split(tmp_path):
    with pytest.raises(UserError, match="unknown split 'dev'; known are train, valid, test"):
        load(write(tmp_path, [QA]), "dev")


@pytest.mark.parametrize("name", ["toy", "toy/spam", "toy/preferences"])
def test_names_of_the_toy_world(name):
    rows = load(name, "valid").rows
    assert len(rows) > 50 and rows[0]["line"] == f"{name} valid:1"


def test_real_data(assets):
    row_types = dict(instruct="chat", instruct_pref="pairs", sms_spam="label", e2e="chat", e2e_ratings="pairs",
                 wnut17="tags")
    for name, row_type in row_types.items():
        data = load(assets / name, "valid")
        assert data.row_type == row_type and data.rows, name
    data = load(assets / "instruct_pref", "train")
    assert len(data.rows) == 929 and data.dropped == {"with chosen equal to rejected": 6}
    assert len(load(assets / "e2e", "valid").rows[0]["references"]) > 1
    assert leaks(load(assets / "instruct", "train").rows, load(assets / "instruct", "test").rows) == 2
    assert load(assets / "tinyshakespeare" / "input.txt", "train").row_type == "text"


def test_a_file_of_all_splits_is_read_once(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"p {i}", "completion": "c"}) + "\n" for i in range(100)))
    reads = []
    read_records = formats.read_records

    def counted(file):
        reads.append(file)
        return read_records(file)
    monkeypatch.setattr(formats, "read_records", counted)
    data = formats.load_splits(path)
    assert len(reads) == 1
    assert all(part == formats.load(path, split) for split, part in data.items())
