"""Reading data files: every format, every fault (numbered as in the list of bad inputs), every split."""
import collections
import csv
import gzip
import io
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
    "prompt and response": (dict(prompt="2+2?", response="4"), user("2+2?", "4")),
    "Dolly": (dict(instruction="Add.", context="2 2", response="4", category="open_qa"), user("Add.\n2 2", "4")),
    "Dolly, empty context": (dict(instruction="Add.", context="", response="4"), user("Add.", "4")),
    "GSM8K": (dict(question="2+2?", answer="2+2=<<2+2=4>>4\n#### 4"), user("2+2?", "2+2=<<2+2=4>>4\n#### 4")),
    "question and context": (dict(context="2 2", question="Sum?", answer="4"), user("Sum?\n2 2", "4")),
    "OpenOrca": (dict(system_prompt="Add.", question="2+2?", response="4"), [system("Add."), *user("2+2?", "4")]),
    "query": (dict(query="2+2?", response="4"), user("2+2?", "4")),
    "tatsu-lab": (dict(instruction="Add.", input="2 2", output="4 ", text="Below is an instruction that ...\n\n"
                       "### Instruction:\nAdd.\n\n### Input:\n2 2\n\n### Response:\n4"), user("Add.\n2 2", "4 ")),
    "UltraChat": (dict(prompt="2+2?", prompt_id="1f", messages=user("2+2?", "4")), user("2+2?", "4")),
    "Magpie": (dict(conversations=[human("Hi"), gpt("Ho")], instruction="Hi", response="Ho"), user("Hi", "Ho")),
    "messages, JSON in a string": (dict(messages=json.dumps(user("Hi", "Ho"))), user("Hi", "Ho")),
    "completion, JSON in a string": (dict(prompt=json.dumps(user("Hi")), completion=json.dumps([bot("Ho")])),
                                     user("Hi", "Ho")),
    "completion, JSON that is no conversation": (dict(prompt="[1]", completion='[{"role": "boss"}]'),
                                                 user("[1]", '[{"role": "boss"}]')),
    "system message twice": (dict(system="Add.", messages=[system("Add."), *user("2", "4")]),
                             [system("Add."), *user("2", "4")]),
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
PAIRS |= {
    "UltraFeedback": dict(prompt="Hi", prompt_id="1f", messages=user("Hi", "Ho"), chosen=user("Hi", "Ho"),
                          rejected=user("Hi", "Hm"), score_chosen=8.5, score_rejected=8.5),
    "prompt in messages beside conversations": pair(user("Hi"), user("Hi", "Ho"), user("Hi", "Hm")),
    "a question": dict(question="Hi", chosen="Ho", rejected="Hm"),
    "an input": dict(input="Hi", chosen="Ho", rejected="Hm"),
    "JSON objects in strings": pair(chosen=json.dumps(bot("Ho")), rejected=json.dumps(gpt("Hm"))),
    "OpenAI, JSON in strings": dict(input=json.dumps(dict(messages=user("Hi"))), preferred_output=json.dumps([bot("Ho")]),
                                    non_preferred_output=json.dumps([bot("Hm")])),
    "JSON in strings": dict(chosen=json.dumps(user("Hi", "Ho")), rejected=json.dumps(user("Hi", "Hm"))),
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


def test_what_stands_beside_the_keys_of_a_format_is_named(tmp_path):
    assert read(tmp_path, [dict(text="a", label="b", system="c")]).format == "text/label (not read: system)"
    assert read(tmp_path, [dict(QA, input="x", history=[["a", "b"]])]).format == \
        "prompt/completion (not read: history, input)"
    assert read(tmp_path, [dict(PAIRS["UltraFeedback"])]).format == \
        "prompt/chosen/rejected (not read: messages, prompt_id, score_chosen, score_rejected)"
    assert read(tmp_path, [dict(prompt="Hi", question="Hi", answer="72")]).format == \
        "prompt (not read: answer, question)"
    assert read(tmp_path, [dict(QA, response="five")]).format == "prompt/completion (not read: response)"
    many = {f"key{i}": i for i in range(12)}
    assert read(tmp_path, [dict(QA, **many)]).format.endswith("key2, key3, key4, key5 and 4 more)")
    assert read(tmp_path, [{**QA, "a\n\x1b[2J" + "b" * 50: 1}]).format == \
        "prompt/completion (not read: a\\n\\x1b[2J" + "b" * 34 + "...)"


def test_keys_inside_a_message_are_named_too(tmp_path):
    turns = [dict(user("Hi")[0], name="Ann", images=[]), bot("Ho", thinking="Well", refusal=None, tool_calls=None)]
    data = read(tmp_path, [dict(messages=turns, id=7)])
    assert data.format == "messages (not read: id, messages[].name, messages[].thinking)"
    assert data.rows[0]["messages"] == user("Hi", "Ho")
    data = read(tmp_path, [pair(chosen=[bot("Ho", reasoning_content="a")], rejected=bot("Hm", tool_call_id="1"))])
    assert data.format == "prompt/chosen/rejected (not read: chosen[].reasoning_content, rejected.tool_call_id)"
    parts = [dict(type="text", text="a", cache_control=1)]
    data = read(tmp_path, [dict(messages=[dict(role="user", content=parts), bot("b")])])
    assert data.format == "messages (not read: messages[].content[].cache_control)"
    data = read(tmp_path, [dict(PAIRS["OpenAI"], input=dict(messages=user("Hi"), parallel_tool_calls=True))])
    assert data.format == "OpenAI preference (not read: input.parallel_tool_calls)"
    data = read(tmp_path, [dict(messages=json.dumps([*user("Hi"), bot("Ho", thinking="a")]))])
    assert data.format == "messages (not read: messages[].thinking)"


@pytest.mark.parametrize("row", [
    dict(messages=[dict(user("a")[0], images=["a.png"]), bot("b")]), dict(messages=user("a", "b"), images=["a"]),
    dict(conversations=[human("<image>"), gpt("a")], image="a.png"), pair(videos=["a.mp4"]), dict(QA, audios=["a"]),
    dict(instruction="a", output="b", images=["a"]), dict(instruction="a", output="b", tools=["f"]),
    dict(PAIRS["OpenAI"], input=dict(messages=user("Hi"), tools=["f"])),
    dict(messages=[dict(role="user", content=[dict(type="image", text=None)]), bot("b")])])
def test_what_a_text_model_cannot_see_is_refused(tmp_path, row):
    message = fault(tmp_path, [row])
    assert message.startswith("data.jsonl:1: ") and "remove such rows" in message
    assert "read text only" in message or "no chat template here renders them" in message


def test_images_beside_raw_text_are_named(tmp_path):
    assert read(tmp_path, [dict(text="a", image="a.png")]).format == "text (not read: image)"


def test_text_that_is_json_stays_text(tmp_path):
    turns = json.dumps(user("Hi", "Ho"))
    assert read(tmp_path, [dict(text=turns)]).rows[0]["text"] == turns
    assert read(tmp_path, [dict(text="a", tags="[x")]).format == "text (not read: tags)"
    row = read(tmp_path, [dict(instruction="Write a chat.", output=turns)]).rows[0]
    assert row["messages"] == user("Write a chat.", turns)


def test_a_conversation_in_a_table_beside_its_prompt(tmp_path):
    out = io.StringIO(newline="")
    turns = user('Say "Hi",\nplease', "Hi")
    csv.writer(out).writerows([["prompt", "messages"], [turns[0]["content"], json.dumps(turns)]])
    data = read(tmp_path, out.getvalue(), "a.csv")
    assert data.format == "messages (not read: prompt)" and data.rows[0]["messages"] == turns


@pytest.mark.parametrize("rows, key, meant", [
    ([dict(text="a", labels="b")], "labels", "label"), ([{"text": "a", " label": "b"}], " label", "label"),
    ([dict(text="a", Label="b")], "Label", "label"), ([dict(text="a", lable="b")], "lable", "label"),
    ([dict(Text="a", label="b")], "Text", "text"), ([dict(Text="a", Label="b")], "Text", "text"),
    ([{"text": "a", "lab\x00el": "b"}], "lab\\x00el", "label"), ([dict(prompt="a", Messages=[])], "Messages", "messages"),
    ([dict(Prompt="a", Completions="b", id=1)], "Prompt", "prompt"), ([dict(prompt="a", completions="b")], "completions", "completion"),
    ([dict(prompt="a", chosen="b", reject="c")], "reject", "rejected"), ([dict(message=[])], "message", "messages"),
    ([dict(instruction="a", inputs="b", output="c")], "inputs", "input"), ([dict(QA, System="a")], "System", "system"),
    ([dict(token=["a"], tags=["O"])], "token", "tokens"), ([dict(question="a", answers="b")], "answers", "answer"),
    ([dict(text="a", label="b"), dict(text="a", labels="b")], "labels", "label")])
def test_a_key_that_is_nearly_one_of_a_format(tmp_path, rows, key, meant):
    assert fault(tmp_path, rows) == (f'data.jsonl:{len(rows)}: the key "{key}" is not read; rename it to "{meant}" if '
                                     "that is meant, else to another name")


@pytest.mark.parametrize("more", [dict(title="a"), dict(texts="a"), dict(label_name="a"), dict(system="a"),
                                  dict(language="a"), dict(timestamp=3), dict(category="a")])
def test_a_key_of_its_own_is_no_near_miss(tmp_path, more):
    assert read(tmp_path, [dict(text="a", **more)]).format == f"text (not read: {[*more][0]})"


def test_23_25_26_strings_are_kept_to_the_letter(tmp_path):
    odd = " \t<|im_end|>\u2028\x00\x07 中文 👩‍👩‍👧‍👦 \r\n"        # marks, line ends, NUL, emoji: all of it text
    row = read(tmp_path, [dict(prompt=odd, completion=odd)]).rows[0]
    assert [m["content"] for m in row["messages"]] == [odd, odd]
    assert read(tmp_path, json.dumps(dict(text=odd)) + "\n").rows[0]["text"] == odd      # the same, escaped


def test_tables(tmp_path):
    table = 'label,text\r\nspam,"Win, now ""free"""\r\n\r\nham,"two\nlines"\r\n'
    spam, ham = read(tmp_path, table, "data.csv").rows
    assert (spam["text"], spam["label"]) == ('Win, now "free"', "spam")
    assert (ham["text"], ham["label"]) == ("two\nlines", "ham") and ham["line"].endswith("data.csv:4")
    data = read(tmp_path, 'label\ttext\nham\t"Hi\n', "data.tsv")                       # a quote is a quote
    assert data.rows[0]["text"] == '"Hi'
    assert len(read(tmp_path, "text\n" + "a" * 200_000, "data.csv").rows[0]["text"]) == 200_000
    assert read(tmp_path, "prompt,completion\n1+1?,2\n", "data.csv").row_type == "chat"
    assert "3 cells under a header of 2: label, text" in fault(tmp_path, "label,text\nham,a,b\n", "data.csv")
    assert "data.csv:2: not a table (1 cells" in fault(tmp_path, "label,text\nham\n", "data.csv")
    assert 'the key "text" appears twice' in fault(tmp_path, "text,text\na,b\n", "data.csv")
    assert "data.csv:3: not a table" in fault(tmp_path, 'label,text\nham,ok\nham,"open\n', "data.csv")
    assert "no known format has the keys ham, Hello" in fault(tmp_path, "ham\tHello\nspam\tWin\n", "data.tsv")


def test_a_label_is_its_name_without_blanks(tmp_path):
    rows = [dict(text="a", label="spam"), dict(text="b", label=" spam"), dict(text="c", label="spam\t\n")]
    assert {row["label"] for row in read(tmp_path, rows).rows} == {"spam"}
    rows = [dict(tokens=["Ann", "ran"], tags=["B-PER ", " O"])]
    assert read(tmp_path, rows).rows[0]["tags"] == ["B-PER", "O"]


def test_the_first_line_of_a_table(tmp_path):
    row = dict(text="Win, now", label="spam")
    for table in ('text, label\n"Win, now",spam\n', ' text\t,label \n"Win, now",spam\n',
                  'label, text\nspam, "Win, now"\n', "\n,,\ntext,label,\n\"Win, now\",spam,\n,,\n"):
        data = read(tmp_path, table, "data.csv")
        assert [(r["text"], r["label"]) for r in data.rows] == [(row["text"], row["label"])]
    assert data.format == "text/label (not read: unnamed column 3)"
    data = read(tmp_path, ",text,label\n0,a,b\n1,c,d\n", "data.csv")                      # pandas' index
    assert data.format == "text/label (not read: unnamed column 1)" and len(data.rows) == 2
    assert read(tmp_path, "text,label,,\na,b,,\n", "data.csv").format.endswith("column 3, unnamed column 4)")
    assert read(tmp_path, "text \t label\na\tb\n", "data.tsv").row_type == "label"
    assert "b" * 40 not in fault(tmp_path, "a" * 99 + "," + "b" * 99 + "\n", "data.csv").partition("b" * 80)[2]


@pytest.mark.parametrize("table, line", [
    ('text,label\n"a",b\n"open,b\nc,d\ne,f\n', 3), ('text,label\na,"open\nc,d\ne,"f"\n', 2),
    ('text,label\r\n"two\r\nlines","open\r\nc,d\r\n', 3), ('text,label\r5" pipe,b\r"a ""b""",c\r"open,d\r', 4),
    ('text,label\na,b\n"a" b,c\n', 3)])
def test_the_line_of_a_quote_that_does_not_end(tmp_path, table, line):
    assert fault(tmp_path, table, "data.csv") == (
        f'data.csv:{line}: not a table (the quoted cell that begins here does not end; a quote inside a cell is '
        'written as "")')


def test_lists_in_a_table_are_json(tmp_path):
    def table(*cells):
        out = io.StringIO(newline="")
        csv.writer(out).writerows(cells)
        return out.getvalue()
    turns = user("Hi", "Ho")
    assert read(tmp_path, table(["messages"], [json.dumps(turns)]), "a.csv").rows[0]["messages"] == turns
    row = read(tmp_path, table(["tokens", "tags"], [json.dumps(v) for v in TAGGED.values()]), "a.csv").rows[0]
    assert row["tokens"] == TAGGED["tokens"] and row["tags"] == TAGGED["tags"]
    sentence = "a list or object in a string is written as by json.dumps"
    message = fault(tmp_path, table(["messages"], [str(turns)]), "a.csv")                 # as pandas writes it
    assert message.startswith('a.csv:2: "messages" is a string: not JSON (') and message.endswith(sentence)
    message = fault(tmp_path, table(["chosen", "rejected"], [str(turns), str(turns)]), "a.csv")
    assert message.startswith('a.csv:2: "chosen" is a string: not JSON (') and message.endswith(sentence)
    assert '"messages" is an object; it must be' in fault(tmp_path, [dict(messages="{}")])
    assert 'the key "role" appears twice' in fault(tmp_path, [dict(messages='[{"role": "user", "role": 1}]')])


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends(tmp_path, end):
    rows = [dict(text="a", label="b"), dict(text="c", label="d")]
    lines = end.join([json.dumps(row) for row in rows]) + end
    data = read(tmp_path, lines + end + lines)
    assert [row["text"] for row in data.rows] == ["a", "c", "a", "c"] and data.rows[3]["line"].endswith(":5")
    assert fault(tmp_path, lines + "{").startswith("data.jsonl:3: not JSON (")
    assert fault(tmp_path, (lines + "\xff").encode("latin-1")).startswith("data.jsonl:3: byte 0xff")
    assert fault(tmp_path, end.join("[1, }"), "data.json").startswith("data.json:5: not JSON (")
    table = read(tmp_path, end.join(["text,label", '"a', 'b",c', "d,e"]), "data.csv").rows
    assert [(row["text"], row["line"][-1]) for row in table] == [(f"a{end}b", "2"), ("d", "4")]
    assert [row["text"] for row in read(tmp_path, f"text\tlabel{end}a\tb{end}", "a.tsv").rows] == ["a"]
    assert read(tmp_path, f"a{end}b", "a.txt").rows[0]["text"] == f"a{end}b"               # to the letter


# ---- compressed files --------------------------------------------------------------------------------------
@pytest.mark.parametrize("name, content", [
    ("a.jsonl", json.dumps(QA) + "\n"), ("a.json", json.dumps([QA])), ("A.CSV", "prompt,completion\nTwo and two?, four\n"),
    ("a.tsv", "prompt\tcompletion\nTwo and two?\t four\n"), ("a.txt", "Once.\n")])
def test_a_compressed_file_is_read_as_the_file_in_it(tmp_path, name, content):
    plain = read(tmp_path, content, name)
    data = read(tmp_path, gzip.compress(b"\xef\xbb\xbf" + content.encode()), name + ".gz")
    assert data.row_type == plain.row_type and data.format == plain.format
    assert [dict(row, line="") for row in data.rows] == [dict(row, line="") for row in plain.rows]
    assert data.rows[0]["line"].partition(name)[2] == ".gz" + plain.rows[0]["line"].partition(name)[2]


def test_a_compressed_text_is_cut_like_the_text(tmp_path):
    text = "".join(f"line {i}\n" for i in range(1000))
    path = write(tmp_path, gzip.compress(text.encode()), "data.txt.gz")
    assert "".join(load(path, split).rows[0]["text"] for split in ("train", "valid", "test")) == text


def test_a_folder_of_compressed_files(tmp_path):
    for name in ("train", "validation", "test"):
        write(tmp_path, gzip.compress(json.dumps(dict(text=name)).encode()), name + ".jsonl.gz")
    assert names(tmp_path) == dict(train=["train"], valid=["validation"], test=["test"])
    write(tmp_path, [dict(text="a")], "train.jsonl")
    assert "holds both train.jsonl and train.jsonl.gz; keep one" in fault(tmp_path, tmp_path)


def test_damaged_compressed_files(tmp_path):
    whole = gzip.compress(os.urandom(3000).hex().encode())
    flipped = whole[:1000] + bytes([whole[1000] ^ 8]) + whole[1001:]
    wrong_sum = whole[:-8] + bytes(4) + whole[-4:]
    cut_and_no_text = gzip.compress(b"\xff" * 3000 + os.urandom(3000))[:1000]
    for bad in (b"not packed", whole[:1000], flipped, wrong_sum, whole + b"rest", cut_and_no_text):
        message = fault(tmp_path, bad, "a.txt.gz")
        assert message.startswith("a.txt.gz: not a whole .gz file (") and "compress it again" in message
    assert "a.txt.gz:2: byte 0xff" in fault(tmp_path, gzip.compress(b"a\n\xff"), "a.txt.gz")
    assert "unknown file type" in fault(tmp_path, whole, "a.gz")


def test_a_text_file_is_one_document_cut_in_order_at_line_ends(tmp_path):
    for end in ("\r", "\r\n", "\n"):
        text = "".join(f"line {i}{end}" for i in range(1000))
        path = write(tmp_path, text, "data.txt")
        assert [row["text"] for row in load(path).rows] == [text]
        parts = [load(path, split).rows[0]["text"] for split in ("train", "valid", "test")]
        assert "".join(parts) == text and all(part.endswith(end) and part[:4] == "line" for part in parts)
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
        assert fault(tmp_path, content, "data.txt") == \
            "0 usable examples in data.txt: 1 with an empty text (data.txt:1 is the first)"


@pytest.mark.parametrize("content", [b"\xef\xbb\xbf%s\n%s\n", b"%s\r\n%s", b"\n\n%s\n  \n%s\n\n",
                                     b"\xef\xbb\xbf[%s,\r\n%s]", b"  [%s, %s]"])
def test_04_06_08_marks_line_ends_blank_lines_arrays(tmp_path, content):
    row = json.dumps(QA).encode()
    assert [r["messages"] for r in read(tmp_path, content % (row, row)).rows] == [EXPECTED, EXPECTED]


def test_04_a_mark_is_no_part_of_a_text_or_a_header(tmp_path):
    assert read(tmp_path, b"\xef\xbb\xbfOnce.", "data.txt").rows[0]["text"] == "Once."
    for mark in (b"\xef\xbb\xbf", b"\xef\xbb\xbf" * 2):
        assert read(tmp_path, mark + b"text,label\na,b\n", "data.csv").row_type == "label"
        assert read(tmp_path, mark + b'[{"text": "a"}]', "data.json").row_type == "text"
        assert read(tmp_path, (mark + b'{"text": "a"}\n') * 2, "data.json").row_type == "text"


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
    for large in ("1" + "0" * 400, "1e300", "-2000000"):
        row = json.dumps(RANKED).replace("[2, 1, 2]", f"[2, 1, {large}]")
        assert "a number here is at most 1,000,000" in fault(tmp_path, row)
    deep = '{"messages": [{"role": %s, "content": ""}]}' % ("[" * 900 + "]" * 900)
    assert fault(tmp_path, deep).startswith("data.jsonl:1: ")
    assert "data.jsonl:1: not JSON" in fault(tmp_path, '{"text": "a", "n": %s}' % ("1" * 5000))
    assert "data.jsonl:1: not JSON" in fault(tmp_path, '{"text": ' + "[" * 100_000 + "]" * 100_000 + "}")


def test_12_missing_field(tmp_path):
    assert fault(tmp_path, [QA, QA, dict(prompt="Hi")]) == (
        'data.jsonl:3: "completion" is missing, in a file of prompt/completion rows (see data.jsonl:1); '
        "all rows of a file have one format")
    message = fault(tmp_path, [dict(query="a", reply="b")])
    assert message.startswith("data.jsonl:1: no known format has the keys query, reply; known are prompt | text | ")
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
        assert message.endswith("1 without a last answer (data.jsonl:1 is the first)")
    else:
        assert message.startswith(f'data.jsonl:1: "{key}" is {found}; it must be a ')


@pytest.mark.parametrize("row, sentence", [
    (dict(messages=[dict(role="user", content=None)]), '"content" is null; it must be a string'),
    (dict(messages=[dict(role="user", content=[dict(type="image_url")])]), '"messages" holds a part of type "image_url"; the models here read text only'),
    (dict(conversations=[{"from": "human", "value": 3}]), '"value" is a number'),
    (dict(messages=["Hi"]), '"messages" holds a string; a message is {'),
    (dict(messages=[]), '"messages" is an empty list'),
    (dict(TAGGED, tokens=["a", None]), '"tokens[1]" is null'),
    (dict(TAGGED, tags=["S-PER", "O"]), "the tag S-PER is not BIO"),
    (dict(TAGGED, tags=["NOUN", "O"]), "the tag NOUN is not BIO"),
    (dict(TAGGED, tags=["B-", "O"]), "the tag B- is not BIO"),
    (dict(TAGGED, tags=["B-Body Part", "O"]), "a TYPE has no blank, comma or colon"),
    (dict(TAGGED, tags=["B-geo:loc", "O"]), "a TYPE has no blank, comma or colon"),
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
    assert fault(tmp_path, [dict(prompt="")]) == \
        "0 usable examples in data.jsonl: 1 with an empty prompt (data.jsonl:1 is the first)"


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
    assert fault(tmp_path, [row, row]) == \
        f"0 usable examples in data.jsonl: 2 {reason} (data.jsonl:1 is the first)"


def test_skipped_rows_are_dropped_and_counted(tmp_path):
    empty = dict(prompt="a", completion="")
    data = read(tmp_path, [empty, QA, empty, QA])
    assert data.dropped == {"with an empty answer": [f"{tmp_path}/data.jsonl:{n}" for n in (1, 3)]}
    assert data.count_dropped() == [
        f"2 dropped with an empty answer ({tmp_path}/data.jsonl:1 is the first)"]
    assert [row["line"].rpartition(":")[2] for row in data.rows] == ["2", "4"]
    rows = [dict(messages=user("a")), dict(messages=user("a", "")), dict(messages=user("b", ""))]
    assert fault(tmp_path, rows).endswith(" data.jsonl: 1 without a last answer (data.jsonl:1 is the first), "
                                          "2 with an empty answer (data.jsonl:2 is the first)")


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
        assert f'"{[*tools][0]}" is not supported, because no chat template here renders them' in message
    assert read(tmp_path, [dict(messages=user("a", "b"), tools=[])]).rows


def test_17_a_prompt_ends_with_what_is_to_be_answered(tmp_path):
    assert '"prompt" ends with an answer' in fault(tmp_path, [dict(prompt=user("a", "b"), completion="c")])
    assert '"prompt" ends with an answer' in fault(tmp_path, [pair(prompt=user("a", "b"))])


def test_19_two_answers_in_a_row_are_two_answers(tmp_path):
    turns = [*user("a", "b"), bot("c")]
    assert read(tmp_path, [dict(messages=turns)]).rows[0]["messages"] == turns


@pytest.mark.parametrize("key", ["weight", "loss_weight", "loss", "train", "trainable", "training"])
def test_20_a_message_may_say_that_it_is_no_target(tmp_path, key):
    turns = [dict(user("a")[0], **{key: False}), bot("b", **{key: False}), dict(user("c")[0], **{key: None}),
             bot("d", **{key: True}), *user("e"), bot("f", **{key: None})]
    data = read(tmp_path, [dict(messages=turns)])
    assert data.rows[0]["messages"] == [*user("a"), bot("b", weight=0), *user("c"), bot("d", weight=1),
                                        *user("e", "f")]
    assert data.format == "messages"
    conversation = [human("a"), dict(gpt("b"), **{key: 0}), human("c"), gpt("d")]
    assert read(tmp_path, [dict(conversations=conversation)]).rows[0]["messages"] == [
        *user("a"), bot("b", weight=0), *user("c", "d")]
    no_target = [bot("b", **{key: 0})]
    assert fault(tmp_path, [dict(prompt="a", completion=no_target)]) == \
        "0 usable examples in data.jsonl: 1 with all weights 0 (data.jsonl:1 is the first)"
    assert 'the "chosen" answer has weight 0' in fault(tmp_path, [pair(chosen=no_target)])
    message = fault(tmp_path, [dict(messages=[dict(user("a")[0], **{key: True}), bot("b")])])
    assert f'"{key}" is true on a message of role user; only assistant messages are targets' in message
    assert f'"{key}" is "no" on a mes' in fault(tmp_path, [dict(messages=[*user("a"), bot("b", **{key: "no"})])])


def test_20_two_keys_that_contradict_each_other(tmp_path):
    message = fault(tmp_path, [dict(messages=[*user("a"), bot("b", weight=1, train=False)])])
    assert message == "data.jsonl:1: weight and train of one message contradict each other; keep one"


def test_keys_that_mean_the_same(tmp_path):
    assert '"references" and "outputs" mean the same; keep one' in fault(
        tmp_path, [dict(input="a", references=["b"], outputs=["c"])])
    assert "begins with a system message, and the row has another one" in fault(
        tmp_path, [dict(system="a", messages=[system("b"), *user("c", "d")])])


def test_a_prompt_that_its_conversations_do_not_hold(tmp_path):
    assert fault(tmp_path, [pair("Hello", user("Hi", "Ho"), user("Hi", "Hm"))]) == (
        "0 usable examples in data.jsonl: 1 with a prompt that is no part of its conversations (data.jsonl:1 is "
        "the first)")


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


def test_31_alpaca_rows_may_leave_out_what_is_empty(tmp_path):
    data = read(tmp_path, [dict(instruction="a", output="b"), dict(instruction="a", input="c", output="b"),
                           dict(input="c", output="b")])
    assert [row["messages"][0]["content"] for row in data.rows] == ["a", "a\nc", "c"]


def test_32_paths_that_cannot_be_read(tmp_path):
    assert "holds no train, valid or test file" in fault(tmp_path, tmp_path)
    assert "unknown file type; a data file ends in .jsonl" in fault(tmp_path, b"PAR1", "data.parquet")
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert "pipe.jsonl is neither a file nor a folder" in fault(tmp_path, tmp_path / "pipe.jsonl")
    assert "a... has a name of 306 bytes, over 255; give" in fault(tmp_path, tmp_path / ("a" * 300 + ".jsonl"))
    assert "a\\x00b.jsonl holds the character NUL; give" in fault(tmp_path, tmp_path / "a\0b.jsonl")
    assert "\\udcff.jsonl is no path in UTF-8; rename" in fault(tmp_path, tmp_path / "\udcff.jsonl")
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
    assert len(data.rows) == 929 and len(data.dropped["with chosen equal to rejected"]) == 6
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


def test_lines_of_a_text_end_as_its_reader_ends_them(tmp_path):
    (tmp_path / "q.txt").write_text("one\u2028still one\ntwo\x0cstill two\n")
    assert [row["line"][-2:] for row in formats.load_lines(tmp_path / "q.txt").rows] == [":1", ":2"]


def test_a_text_in_upper_case_is_a_text(tmp_path):
    path = tmp_path / "BOOK.TXT"
    path.write_text("a line\n" * 100)
    data = formats.load_splits(path)
    assert data["train"].rows[0]["text"] != data["test"].rows[0]["text"]
    assert len(formats.load_lines(path).rows) == 100


def test_votes_in_a_table(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("prompt,chosen,rejected,votes_for,votes_against\nHi,Ho,Hm,3,1\n")
    row = formats.load(path).rows[0]
    assert (row["votes_for"], row["votes_against"]) == (3, 1)
    path.write_text("prompt,chosen,rejected,votes_for,votes_against\nHi,Ho,Hm,three,1\n")
    with pytest.raises(DataError, match='"votes_for" is a string'):
        formats.load(path)


def test_an_empty_cell_of_references(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text('instruction,output,references\nHi,Ho,\nHi,Hm,"[""a""]"\n')
    assert [row.get("references") for row in formats.load(path).rows] == [None, ["a"]]


@pytest.mark.parametrize("answers", [("x\n\nAssistant: y", "x\n\nAssistant: z"), ("x", "x\n\nAssistant: z")])
def test_a_transcript_of_two_answers_in_a_row_is_counted_and_not_an_error_or_an_answer(tmp_path, answers):
    path = tmp_path / "x.jsonl"
    pairs = [answers, ("Ho", "Hm")]
    path.write_text("".join(json.dumps({"chosen": f"\n\nHuman: Hi\n\nAssistant: {a}",
                                        "rejected": f"\n\nHuman: Hi\n\nAssistant: {b}"}) + "\n" for a, b in pairs))
    data = formats.load(path)
    assert len(data.rows) == 1 and list(data.dropped) == ["with two answers in a row"]
