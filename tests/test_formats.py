"""Reading data files: every format, every fault (numbered as in the list of bad inputs), every split."""
import collections
import json
import os

import pytest

from data import formats, records
from data.files import DataError, UserError
from data.formats import duplicates, leaks, load, question


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
    turns = [{"role": "user", "content": text}]
    return turns if answer is None else turns + [{"role": "assistant", "content": answer}]


QA = {"prompt": "Two and two?", "completion": " four"}

# ---- formats ---------------------------------------------------------------------------------------------------
GOOD = {
    "text": ({"text": "Once."}, "text", {"text": "Once."}),
    "label": ({"text": "hi", "label": "ham"}, "label", {"text": "hi", "label": "ham"}),
    "number label": ({"text": "hi", "label": 1}, "label", {"text": "hi", "label": "1"}),
    "true label": ({"text": "hi", "label": True}, "label", {"text": "hi", "label": "true"}),
    "tags": ({"tokens": ["Ann", "ran"], "tags": ["B-PER", "O"]}, "tags", {"tokens": ["Ann", "ran"], "tags": ["B-PER", "O"]}),
    "completion": (QA, "chat", {"messages": user("Two and two?", " four")}),
    "completion, messages": ({"prompt": user("2+2?"), "completion": [{"role": "assistant", "content": "4"}]}, "chat",
                             {"messages": user("2+2?", "4")}),
    "completion, system": ({"system": "Be brief.", **QA}, "chat",
                           {"messages": [{"role": "system", "content": "Be brief."}, *user("Two and two?", " four")]}),
    "references alone": ({"prompt": "2+2?", "references": ["4", "four"]}, "chat",
                         {"messages": user("2+2?", "4"), "references": ["4", "four"]}),
    "references too": ({"prompt": "2+2?", "completion": "Four.", "references": ["4", "four"]}, "chat",
                       {"messages": user("2+2?", "Four."), "references": ["4", "four"]}),
    "messages": ({"messages": [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hi", "name": "Ann"},
                               {"role": "assistant", "content": "Hm", "weight": 0}, *user("Again", "Hi!")]}, "chat",
                 {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
                               {"role": "assistant", "content": "Hm", "weight": 0}, *user("Again", "Hi!")]}),
    "messages, parts": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                                      {"role": "assistant", "content": "c", "refusal": None, "tool_calls": None}]}, "chat",
                        {"messages": user("ab", "c")}),
    "messages, references": ({"messages": user("2+2?"), "references": ["4"]}, "chat",
                             {"messages": user("2+2?", "4"), "references": ["4"]}),
    "Alpaca": ({"instruction": "Add.", "input": "2 2", "output": "4"}, "chat", {"messages": user("Add.\n2 2", "4")}),
    "Alpaca, no input": ({"instruction": "Add.", "input": "", "output": "4"}, "chat", {"messages": user("Add.", "4")}),
    "Alpaca, null input": ({"instruction": "Add.", "input": None, "output": "4"}, "chat", {"messages": user("Add.", "4")}),
    "Alpaca, all": ({"instruction": "And 3?", "output": "6", "system": "Add.", "history": [["2?", "4"]]}, "chat",
                    {"messages": [{"role": "system", "content": "Add."}, *user("2?", "4"), *user("And 3?", "6")]}),
    "input and output": ({"input": "2 2", "output": "4"}, "chat", {"messages": user("2 2", "4")}),
    "input and outputs": ({"input": "2 2", "outputs": ["4", "four"]}, "chat",
                          {"messages": user("2 2", "4"), "references": ["4", "four"]}),
    "ShareGPT": ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}], "system": "Sing."}, "chat",
                 {"messages": [{"role": "system", "content": "Sing."}, *user("Hi", "Ho")]}),
    "pair": ({"prompt": "Hi", "chosen": "Ho", "rejected": "Hm"}, "pairs",
             {"prompt": user("Hi"), "chosen": "Ho", "rejected": "Hm"}),
    "pair with votes": ({"prompt": "Hi", "chosen": "Ho", "rejected": "Hm", "votes_for": 2, "votes_against": 1}, "pairs",
                        {"prompt": user("Hi"), "chosen": "Ho", "rejected": "Hm", "votes_for": 2, "votes_against": 1}),
    "pair of messages": ({"prompt": user("Hi"), "chosen": [{"role": "assistant", "content": "Ho"}],
                          "rejected": {"role": "assistant", "content": "Hm"}}, "pairs",
                         {"prompt": user("Hi"), "chosen": "Ho", "rejected": "Hm"}),
    "pair of conversations": ({"chosen": user("Hi", "Ho"), "rejected": user("Hi", "Hm")}, "pairs",
                              {"prompt": user("Hi"), "chosen": "Ho", "rejected": "Hm"}),
    "HH": ({"chosen": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Bye\n\nAssistant: Good day",
            "rejected": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Bye\n\nAssistant: Go"}, "pairs",
           {"prompt": user("Hi", "Yes?") + user("Bye"), "chosen": "Good day", "rejected": "Go"}),
    "HH with prompt": ({"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " Ho", "rejected": " Hm"}, "pairs",
                       {"prompt": user("Hi"), "chosen": " Ho", "rejected": " Hm"}),
    "Alpaca pair": ({"instruction": "Add.", "input": "2 2", "chosen": "4", "rejected": "5"}, "pairs",
                    {"prompt": user("Add.\n2 2"), "chosen": "4", "rejected": "5"}),
    "ShareGPT pair": ({"conversations": [{"from": "human", "value": "Hi"}], "chosen": {"from": "gpt", "value": "Ho"},
                       "rejected": {"from": "gpt", "value": "Hm"}}, "pairs",
                      {"prompt": user("Hi"), "chosen": "Ho", "rejected": "Hm"}),
    "OpenAI pair": ({"input": {"messages": user("Hi"), "tools": []},
                     "preferred_output": [{"role": "assistant", "content": "Ho"}],
                     "non_preferred_output": [{"role": "assistant", "content": "Hm"}]}, "pairs",
                    {"prompt": user("Hi"), "chosen": "Ho", "rejected": "Hm"}),
    "ranking": ({"prompt": "Hi", "responses": ["a", "b", "c"], "rank": [2, 1, 2]}, "ranked",
                {"prompt": user("Hi"), "responses": ["a", "b", "c"], "rank": [2, 1, 2]}),
    "prompt": ({"prompt": "Hi"}, "prompt", {"prompt": user("Hi")}),
}


@pytest.mark.parametrize("name", GOOD)
def test_format(tmp_path, name):
    row, kind, wanted = GOOD[name]
    path = write(tmp_path, [row])
    data = load(path)
    assert data.kind == kind
    assert data.rows == [{**wanted, "line": f"{path}:1"}]
    assert data.dropped == {} and data.source == str(path)


def test_the_format_is_echoed_with_the_keys_that_are_not_read(tmp_path):
    assert read(tmp_path, [{**QA, "id": 7, "label_by": "Ann"}]).form == "prompt/completion (not read: id, label_by)"
    assert read(tmp_path, [{"prompt": "Hi", "label": 1}]).form == "prompt (not read: label)"
    assert read(tmp_path, [{"instruction": "a", "input": "", "output": "b"}]).form == "Alpaca"


def test_strings_are_kept_to_the_letter(tmp_path):
    odd = " \t<|im_end|>\u2028\x00\x07 中文 👩‍👩‍👧‍👦 \r\n"                       # 23, 25, 26: marks, NUL, emoji are text
    row = read(tmp_path, [{"prompt": odd, "completion": odd}]).rows[0]
    assert [m["content"] for m in row["messages"]] == [odd, odd]
    assert read(tmp_path, json.dumps({"text": odd}) + "\n").rows[0]["text"] == odd      # the same, escaped


def test_tables(tmp_path):
    table = 'label,text\r\nspam,"Win, now ""free"""\r\n\r\nham,"two\nlines"\r\n'
    data = read(tmp_path, table, "data.csv")
    assert [(r["text"], r["label"]) for r in data.rows] == [('Win, now "free"', "spam"), ("two\nlines", "ham")]
    assert data.rows[1]["line"].endswith("data.csv:5")
    data = read(tmp_path, 'label\ttext\nham\tShe said "hi\n', "data.tsv")       # in a .tsv a quote is a quote
    assert data.rows[0]["text"] == 'She said "hi'
    assert read(tmp_path, "prompt,completion\n1+1?,2\n", "data.csv").kind == "chat"
    assert "cells under a header of 2" in fault(tmp_path, "label,text\nham,a,b\n", "data.csv")
    assert "data.csv:2" in fault(tmp_path, "label,text\nham\n", "data.csv")
    assert "twice" in fault(tmp_path, "text,text\na,b\n", "data.csv")
    assert "data.csv:3" in fault(tmp_path, 'label,text\nham,ok\nham,"open\n', "data.csv")
    assert "no format has the keys ham, Hello" in fault(tmp_path, "ham\tHello\nspam\tWin\n", "data.tsv")


def test_a_text_file_is_one_document_cut_in_order_at_line_ends(tmp_path):
    text = "".join(f"line {i}\n" for i in range(1000))
    path = write(tmp_path, text, "data.txt")
    assert [r["text"] for r in load(path).rows] == [text]
    parts = [load(path, split).rows[0]["text"] for split in ("train", "valid", "test")]
    assert "".join(parts) == text and all(part.endswith("\n") for part in parts)
    assert [round(len(part) / len(text), 2) for part in parts] == [0.8, 0.1, 0.1]


# ---- faults ----------------------------------------------------------------------------------------------------
def test_01_missing_file(tmp_path):
    assert fault(tmp_path, tmp_path / "no.jsonl").startswith("no.jsonl does not exist; data is a file (.jsonl .json")


@pytest.mark.parametrize("content", [b"", b"\n \r\n\t\n", b"[]", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("split", [None, "train"])
def test_02_03_nothing_in_the_file(tmp_path, content, split):
    assert fault(tmp_path, content, split=split) == "0 usable examples in data.jsonl: it holds no rows"


def test_02_03_nothing_in_a_table_or_text(tmp_path):
    for content, name in ((b"", "data.csv"), (b"text,label\n", "data.csv")):
        assert "it holds no rows" in fault(tmp_path, content, name)
    for content in (b"", b" \n\n"):
        assert fault(tmp_path, content, "data.txt") == "0 usable examples in data.txt: 1 with an empty text"


@pytest.mark.parametrize("content", [b"\xef\xbb\xbf%s\n%s\n", b"%s\r\n%s", b"\n\n%s\n  \n%s\n\n", b"\xef\xbb\xbf[%s,\r\n%s]"])
def test_04_06_08_marks_line_ends_blank_lines_arrays(tmp_path, content):
    row = json.dumps(QA).encode()
    rows = read(tmp_path, content % (row, row)).rows
    assert [r["messages"] for r in rows] == 2 * [user("Two and two?", " four")]


def test_04_a_mark_is_no_part_of_a_text_or_a_header(tmp_path):
    assert read(tmp_path, b"\xef\xbb\xbfOnce.", "data.txt").rows[0]["text"] == "Once."
    assert read(tmp_path, b"\xef\xbb\xbftext,label\na,b\n", "data.csv").kind == "label"


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
    assert fault(tmp_path, good + good[:30]) == ("data.jsonl:2: not JSON (Unterminated string starting at, column 28); "
                                                 "each line is one whole object")
    assert fault(tmp_path, json.dumps(QA, indent=1)).startswith("data.jsonl:1: not JSON")
    assert "each line is one whole object" in fault(tmp_path, good.strip() + good)
    assert fault(tmp_path, "[" + good + ",\n" + good, "data.json").endswith("a file that starts with [ is one array of rows")


def test_08_an_array_names_items(tmp_path):
    assert read(tmp_path, json.dumps([QA, QA]), "data.json").rows[1]["line"].endswith("data.json:item 2")
    assert fault(tmp_path, json.dumps([QA, {"prompt": "Hi"}])).startswith('data.jsonl:item 2: no "completion"')
    assert fault(tmp_path, json.dumps([QA, 3])).startswith("data.jsonl:item 2: a number; a row is an object")


@pytest.mark.parametrize("line, found", [("3", "a number"), ('"a"', "a string"), ("null", "null"), ("true", "true or false"),
                                         ("[1]", "a list")])
def test_09_a_line_that_is_no_object(tmp_path, line, found):
    message = fault(tmp_path, json.dumps(QA) + "\n" + line + "\n")
    assert message.startswith(f"data.jsonl:2: {found}; a row is an object such as {{")
    assert "data.jsonl:item 1: a number" in fault(tmp_path, "[1]")


def test_10_duplicate_keys(tmp_path):
    assert fault(tmp_path, '{"text": "a", "text": "b"}') == 'data.jsonl:1: not JSON (the key "text" appears twice)'
    assert '"role" appears twice' in fault(tmp_path, '{"messages": [{"role": "user", "role": "system", "content": ""}]}')


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity"])
def test_11_literals_that_are_no_json(tmp_path, literal):
    assert f"({literal} is no JSON number)" in fault(tmp_path, '{"text": "a", "score": %s}' % literal)


def test_11_numbers_too_large(tmp_path):
    row = '{"prompt": "a", "chosen": "b", "rejected": "c", "votes_for": %s, "votes_against": 0}'
    assert '"votes_for" is a number; it must be a finite number' in fault(tmp_path, row % "1e999")
    assert "not JSON" in fault(tmp_path, '{"text": "a", "n": %s}' % ("1" * 5000))
    assert "not JSON" in fault(tmp_path, '{"text": ' + "[" * 100_000 + "]" * 100_000 + "}")


def test_12_missing_field(tmp_path):
    assert fault(tmp_path, [QA, QA, {"prompt": "Hi"}]) == ('data.jsonl:3: no "completion", in a file of prompt/completion rows '
                                                           "(so says data.jsonl:1); a file has one format")
    message = fault(tmp_path, [{"question": "a", "answer": "b"}])
    assert message.startswith("data.jsonl:1: no format has the keys question, answer; there are text | text+label |")
    assert "no format has the keys (none)" in fault(tmp_path, "{}\n")


@pytest.mark.parametrize("value, found", [(3, "a number"), (None, "null"), (False, "true or false"), ({}, "an object")])
@pytest.mark.parametrize("row, key", [({"text": 0}, "text"), ({"text": 0, "label": "a"}, "text"), (QA, "prompt"),
                                      ({"instruction": "a", "output": 0}, "output"),
                                      ({"prompt": "a", "responses": 0, "rank": [1]}, "responses"),
                                      ({"tokens": ["a"], "tags": 0}, "tags"), ({"messages": 0}, "messages"),
                                      ({"prompt": "a", "references": 0}, "references")])
def test_13_not_a_string(tmp_path, row, key, value, found):
    if key == "references" and value is None:
        assert "without a last answer" in fault(tmp_path, [{**row, key: value}])
    else:
        assert fault(tmp_path, [{**row, key: value}]).startswith(f'data.jsonl:1: "{key}" is {found}; it must be a ')


def test_13_inside_lists(tmp_path):
    assert '"content" is null; it must be a string' in fault(tmp_path, [{"messages": [{"role": "user", "content": None}]}])
    assert '"value" is a number' in fault(tmp_path, [{"conversations": [{"from": "human", "value": 3}]}])
    assert '"messages" holds a string; a message is {' in fault(tmp_path, [{"messages": ["Hi"]}])
    assert '"messages" is an empty list' in fault(tmp_path, [{"messages": []}])
    assert '"tokens[1]" is null' in fault(tmp_path, [{"tokens": ["a", None], "tags": ["O", "O"]}])
    assert "2 tokens and 1 tags" in fault(tmp_path, [{"tokens": ["a", "b"], "tags": ["O"]}])
    assert '"rank" must be a list with a number for each' in fault(tmp_path, [{"prompt": "a", "responses": ["b", "c"], "rank": [1]}])
    assert '"rank" is a string' in fault(tmp_path, [{"prompt": "a", "responses": ["b", "c"], "rank": [1, "2"]}])
    assert '"label" is 0.5' in fault(tmp_path, [{"text": "a", "label": 0.5}])
    assert '"label" is empty' in fault(tmp_path, [{"text": "a", "label": ""}])
    for history in (3, "ab", [["q"]], [["q", 3]]):
        assert '"history' in fault(tmp_path, [{"instruction": "a", "output": "b", "history": history}])
    assert 'one assistant message' in fault(tmp_path, [{"prompt": "a", "chosen": user("b"), "rejected": "c"}])
    assert '"input" is a string without "messages"' in fault(tmp_path, [
        {"input": "a", "preferred_output": "b", "non_preferred_output": "c"}])
    assert 'each end a conversation' in fault(tmp_path, [{"chosen": user("a"), "rejected": user("a", "b")}])
    assert 'do not begin as one transcript' in fault(tmp_path, [{"chosen": "a", "rejected": "b"}])


def test_14_an_empty_prompt_is_fine_before_an_answer(tmp_path):
    assert read(tmp_path, [{"prompt": "", "completion": "a"}]).rows[0]["messages"] == user("", "a")
    assert read(tmp_path, [{"instruction": "", "output": "a"}]).rows[0]["messages"] == user("", "a")
    assert fault(tmp_path, [{"prompt": ""}]) == "0 usable examples in data.jsonl: 1 with an empty prompt"


USELESS = {
    "with an empty answer": [{"prompt": "a", "completion": " \n"}, {"messages": user("a", "")},
                             {"instruction": "a", "output": ""}, {"prompt": "a", "chosen": "", "rejected": "b"},
                             {"prompt": "a", "responses": ["b", ""], "rank": [1, 2]}],                              # 15
    "with chosen equal to rejected": [{"prompt": "a", "chosen": "b", "rejected": "b"},
                                      {"chosen": user("a", "b"), "rejected": user("a", "b")},
                                      {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: b"}],
    "without a last answer": [{"messages": user("a")}, {"messages": user("a", "b") + user("c")},                    # 18
                              {"conversations": [{"from": "human", "value": "a"}]}, {"prompt": "a", "references": []}],
    "with all weights 0": [{"messages": [*user("a"), {"role": "assistant", "content": "b", "weight": 0}]}],         # 20
    "with all answers ranked alike": [{"prompt": "a", "responses": ["b", "c"], "rank": [1, 1]}],
    "whose conversations part before the last answer": [
        {"chosen": user("a", "b"), "rejected": user("x", "c")},
        {"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d", "rejected": "\n\nHuman: a\n\nAssistant: e"}],
    "with an empty text": [{"text": ""}, {"text": " \n", "label": "a"}],
    "without tokens": [{"tokens": [], "tags": []}],
}


@pytest.mark.parametrize("reason, row", [(reason, row) for reason, rows in USELESS.items() for row in rows])
def test_15_16_18_20_rows_that_teach_nothing(tmp_path, reason, row):
    assert fault(tmp_path, [row, row]) == f"0 usable examples in data.jsonl: 2 {reason}"


def test_useless_rows_are_dropped_and_counted(tmp_path):
    empty = {"prompt": "a", "completion": ""}
    data = read(tmp_path, [empty, QA, empty, {**QA, "prompt": user("a", "b") + user("c")}])
    assert len(data.rows) == 2 and data.dropped == {"with an empty answer": 2}
    assert [r["line"].rpartition(":")[2] for r in data.rows] == ["2", "4"]
    rows = [{"messages": user("a")}, {"messages": user("a", "")}, {"messages": user("b", "")}]
    assert fault(tmp_path, rows) == "0 usable examples in data.jsonl: 1 without a last answer, 2 with an empty answer"


def test_17_unknown_roles_and_tools(tmp_path):
    for role in ("bot", None, 3, ["user"], ""):
        message = fault(tmp_path, [{"messages": [{"role": role, "content": "a"}]}])
        assert message.startswith(f'data.jsonl:1: "messages" has the role {json.dumps(role)}; roles are system, developer,')
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function"}]}
    for turn in (call, {"role": "tool", "content": "a"}, {"role": "function", "content": "a"},
                 {"from": "observation", "value": "a"}, {"from": "function_call", "value": "a"}):
        assert "holds a tool call, which no template here renders" in fault(tmp_path, [{"messages": [turn]}])
    for tools in ({"tools": [{"type": "function"}]}, {"functions": [{"name": "f"}]}):
        assert '"tools" are rendered by no template' in fault(tmp_path, [{"messages": user("a", "b"), **tools}])
    assert read(tmp_path, [{"messages": user("a", "b"), "tools": []}]).rows


def test_17_a_prompt_ends_with_what_is_to_be_answered(tmp_path):
    assert '"prompt" ends with an answer' in fault(tmp_path, [{"prompt": user("a", "b"), "completion": "c"}])
    assert '"prompt" ends with an answer' in fault(tmp_path, [{"prompt": user("a", "b"), "chosen": "c", "rejected": "d"}])


def test_19_two_answers_in_a_row_are_two_answers(tmp_path):
    turns = user("a", "b") + [{"role": "assistant", "content": "c"}]
    assert read(tmp_path, [{"messages": turns}]).rows[0]["messages"] == turns


@pytest.mark.parametrize("weight", [2, 0.5, -1, "1", [0]])
def test_20_odd_weights(tmp_path, weight):
    row = {"messages": [*user("a"), {"role": "assistant", "content": "b", "weight": weight}]}
    assert fault(tmp_path, [row]).startswith(f'data.jsonl:1: "weight" is {json.dumps(weight)} on a')


def test_20_weights_belong_to_assistants(tmp_path):
    row = {"messages": [{"role": "user", "content": "a", "weight": 1}, {"role": "assistant", "content": "b"}]}
    assert '"weight" is 1 on a user turn' in fault(tmp_path, [row])


def test_24_half_a_surrogate_pair(tmp_path):
    assert fault(tmp_path, r'{"text": "a\ud83d"}') == \
        r"data.jsonl:1: \ud83d is half of a surrogate pair, not a character"
    assert "half of a surrogate" in fault(tmp_path, r'{"text": "a", "meta": {"\uDE00": 1}}')
    assert read(tmp_path, r'{"text": "\ud83d\ude00"}').rows[0]["text"] == "😀"
    assert "byte 0xed is not UTF-8" in fault(tmp_path, '{"text": "\ud83d"}')


def test_27_a_line_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MAX_LINE", 2 << 20)
    row = json.dumps({"text": "a" * (2 << 20)})
    assert fault(tmp_path, json.dumps({"text": "a"}) + "\n" + row) == \
        "data.jsonl:2: a line of over 2 MiB; cut it into several rows"
    assert "larger than field limit" in fault(tmp_path, "text\n" + row, "data.csv")
    assert read(tmp_path, row[2:], "data.txt").rows                                    # a text has no lines to speak of


def test_28_duplicates_and_leaks(tmp_path):
    rows = read(tmp_path, [QA, QA, {**QA, "completion": "4"}, {"prompt": "a", "completion": "b"}]).rows
    assert duplicates(rows) == 1
    assert leaks(rows[:1], rows[2:]) == 1 and leaks(rows[3:], rows[:3]) == 0
    pairs = read(tmp_path, [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "c", "rejected": "b"},
                            {"prompt": "d", "chosen": "c", "rejected": "b"}]).rows
    assert duplicates(pairs) == 0 and leaks(pairs[:1], pairs[1:]) == 1
    bare = read(tmp_path, [{"prompt": "", "completion": "a"}, {"prompt": "", "completion": "b"}]).rows
    assert leaks(bare[:1], bare[1:]) == 0 and leaks(bare[:1], bare[:1]) == 1            # nothing asked: the row counts


@pytest.mark.parametrize("n", [1, 2])
def test_29_30_a_handful_of_rows_is_not_split(tmp_path, n):
    path = write(tmp_path, [{"prompt": f"{i}?", "completion": "a"} for i in range(n)])
    for split in ("train", "valid", "test"):
        data = load(path, split)
        assert len(data.rows) == n and data.source == f"{path} (all of it, too few rows to split)"


def test_31_mixed_formats(tmp_path):
    message = fault(tmp_path, [QA, {"messages": user("a", "b")}])
    assert message.startswith('data.jsonl:2: no "prompt", in a file of prompt/completion rows (so says data.jsonl:1)')
    assert "the keys of prompt/completion, in a file of prompt rows" in fault(tmp_path, [{"prompt": "a"}, QA])
    assert "the keys of text/label, in a file of text rows" in fault(tmp_path, [{"text": "a"}, {"text": "a", "label": "b"}])
    for row in ({"text": "a", **QA}, {"messages": user("a", "b"), **QA}, {"text": "a", "instruction": "b", "output": "c"},
                {"conversations": [], "messages": []}):
        message = fault(tmp_path, [row])
        assert message.startswith("data.jsonl:1: the keys of two formats, ") and message.endswith("; keep those of one")


def test_31_thumbs_are_refused_not_learnt(tmp_path):
    for row in ({**QA, "label": False}, {"conversations": [], "kto_tag": True}):
        assert "thumbs up or down (KTO) are not supported" in fault(tmp_path, [row])


def test_31_alpaca_rows_may_leave_out_input(tmp_path):
    rows = [{"instruction": "a", "output": "b"}, {"instruction": "a", "input": "c", "output": "b"}, {"input": "c", "output": "b"}]
    assert [r["messages"][0]["content"] for r in read(tmp_path, rows).rows] == ["a", "a\nc", "c"]


def test_32_paths_that_cannot_be_read(tmp_path):
    assert "holds no train, valid or test file" in fault(tmp_path, tmp_path)
    assert "the last name of a data file is one of .jsonl" in fault(tmp_path, b"PAR1", "data.parquet")
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert "pipe.jsonl is neither a file nor a folder" in fault(tmp_path, tmp_path / "pipe.jsonl")
    assert "cannot be read (File name too long)" in fault(tmp_path, tmp_path / ("a" * 300 + ".jsonl"))
    path = write(tmp_path, [QA], "closed.jsonl")
    path.chmod(0)
    if not os.access(path, os.R_OK):                                                    # root may read everything
        assert "closed.jsonl cannot be read (Permission denied)" in fault(tmp_path, path)


# ---- splits ----------------------------------------------------------------------------------------------------
def names(path):
    return {split: [r["text"] for r in load(path, split).rows] for split in ("train", "valid", "test")}


def test_a_file_is_dealt_by_content_alone(tmp_path):
    rows = [{"text": f"story {i}"} for i in range(2000)]
    before = names(write(tmp_path, rows))
    assert sorted(sum(before.values(), [])) == sorted(r["text"] for r in rows)
    assert abs(len(before["valid"]) - 200) < 50 and abs(len(before["test"]) - 200) < 50
    after = names(write(tmp_path, [{"text": f"new {i}"} for i in range(500)] + rows[::-1], "other.json"))
    for split, texts in before.items():
        assert set(texts) <= set(after[split])
    twice = names(write(tmp_path, rows + rows))
    assert {split: len(texts) for split, texts in twice.items()} == {split: 2 * len(t) for split, t in before.items()}
    known = [split for i in range(6) for split in before if f"story {i}" in before[split]]
    assert known == ["test", "train", "valid", "train", "train", "test"]                                                               # for ever: results depend on it


def test_answers_to_one_prompt_stay_together(tmp_path):
    path = write(tmp_path, [{"prompt": f"{i % 300}?", "chosen": f"a{i}", "rejected": "b"} for i in range(1500)])
    parts = {split: load(path, split).rows for split in ("train", "valid", "test")}
    assert leaks(parts["train"], parts["valid"]) == leaks(parts["train"], parts["test"]) == 0
    sizes = collections.Counter(question(row) for row in parts["valid"])
    assert set(sizes.values()) == {5}


def test_one_prompt_for_all_is_split_by_whole_rows(tmp_path):
    path = write(tmp_path, [{"prompt": "A joke!", "completion": f"Joke {i}"} for i in range(300)])
    sizes = [len(load(path, split).rows) for split in ("train", "valid", "test")]
    assert sum(sizes) == 300 and min(sizes) > 10
    path = write(tmp_path, [{"prompt": "", "completion": f"Joke {i}"} for i in range(300)])
    assert len(load(path, "train").rows) < 270


def folder(tmp_path, **files):
    for name, rows in files.items():
        write(tmp_path, rows, name + ".jsonl")
    return tmp_path


def test_a_folder_has_its_splits(tmp_path):
    path = folder(tmp_path, train=[{"text": "a"}], validation=[{"text": "b"}], test=[{"text": "c"}])
    assert names(path) == {"train": ["a"], "valid": ["b"], "test": ["c"]}
    data = load(path)
    assert [r["text"] for r in data.rows] == ["a", "b", "c"] and data.source == str(path)
    write(path, "text,label\na,b\n", "train.csv")
    assert "holds both train.jsonl and train.csv; keep one" in fault(tmp_path, path)


def test_a_folder_without_valid_deals_a_tenth_of_train(tmp_path):
    path = folder(tmp_path, train=[{"text": f"story {i}"} for i in range(1000)], test=[{"text": "c"}])
    parts = names(path)
    assert parts["test"] == ["c"] and not set(parts["train"]) & set(parts["valid"])
    assert len(parts["train"]) + len(parts["valid"]) == 1000 and 70 < len(parts["valid"]) < 130
    alone = names(path / "train.jsonl")
    assert alone["valid"] == parts["valid"]                                             # the same rows as from the file
    write(path, "line\n" * 1000, "train.txt")
    (path / "train.jsonl").unlink()
    assert [len(load(path, s).rows[0]["text"]) for s in ("train", "valid")] == [4500, 500]


def test_a_folder_without_test_is_tested_on_valid_and_says_so(tmp_path):
    path = folder(tmp_path, train=[{"text": "a"}], valid=[{"text": "b"}])
    data = load(path, "test")
    assert [r["text"] for r in data.rows] == ["b"] and data.source.endswith("valid.jsonl, for want of a test file")
    alone = tmp_path / "alone"
    alone.mkdir()
    assert "alone has no train file; it has test.jsonl" in fault(tmp_path, folder(alone, test=[{"text": "c"}]), split="train")
    assert "alone has no valid file" in fault(tmp_path, alone, split="valid")


def test_a_folder_of_several_kinds_is_refused_as_a_whole(tmp_path):
    path = folder(tmp_path, train=[{"text": "a"}], valid=[QA])
    assert "files of several kinds: text, chat" in fault(tmp_path, path)


def test_unknown_split(tmp_path):
    with pytest.raises(UserError, match="'dev' is no split; there are train, valid, test"):
        load(write(tmp_path, [QA]), "dev")


@pytest.mark.parametrize("name", ["toy", "toy/spam", "toy/preferences"])
def test_names_of_the_toy_world(name):
    rows = load(name, "valid").rows
    assert len(rows) > 50 and rows[0]["line"] == f"{name} valid:1"


def test_real_data(assets):
    kinds = {"instruct": "chat", "instruct_pref": "pairs", "sms_spam": "label", "e2e": "chat", "e2e_ratings": "pairs",
             "wnut17": "tags"}
    for name, kind in kinds.items():
        data = load(assets / name, "valid")
        assert data.kind == kind and data.rows, name
    data = load(assets / "instruct_pref", "train")
    assert len(data.rows) + sum(data.dropped.values()) == 935 and data.dropped == {"with chosen equal to rejected": 6}
    assert len(load(assets / "e2e", "valid").rows[0]["references"]) > 1
    assert leaks(load(assets / "instruct", "train").rows, load(assets / "instruct", "test").rows) == 2
    assert formats.load(assets / "tinyshakespeare" / "input.txt", "train").kind == "text"
