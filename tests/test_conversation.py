"""--task chat and --task predict: what is asked is what was trained, what is printed is what was generated."""
import io
import json
import shutil
import signal

import pytest
import torch

import tiny
import train
from data.batches.examples import training_facts
from data.results import conversation, evaluate, next_token, predict
from data.runtime.files import read_json
from data.runtime.run_folder import defer_signals
from data.text import entities
from tiny import write

SHORT = ["--steps", "2", "--batch", "8", "--forgetting_data", "none"]
S = {"role": "system", "content": "Be brief."}
MANY = [{"messages": [S, {"role": "user", "content": a}, {"role": "assistant", "content": a},
                      {"role": "user", "content": b}, {"role": "assistant", "content": b}]}
        for a in "abcd" for b in "abcd"]
OTHER = [{"messages": [{"role": "system", "content": a}, *row["messages"][1:]]} for row in MANY for a in "xy"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """tiny.py's world, and what chats are with: a run of each kind."""
    folder = tiny.world(tmp_path_factory.mktemp("world"))
    write(folder, {"many": MANY, "other": OTHER})
    torch.manual_seed(1)
    for name, data, flags in (
            ("single", "chat", ["--max_new_tokens", "2"]), ("multi", "many", ["--max_new_tokens", "2"]),
            ("mixed", "other", ["--max_new_tokens", "2"]),
            ("words", "label", ["--task", "classify"]),
            ("head", "label", ["--task", "classify", "--classifier", "head", "--lr", "0.1"]),
            ("answers", "label", ["--max_new_tokens", "2"]), ("tagger", "tags", ["--task", "tag", "--lr", "0.1"]),
            ("named", "tags", ["--max_new_tokens", "2"]),
            ("soft", "chat", ["--method", "p_tuning", "--num_virtual_tokens", "3", "--max_new_tokens", "2"])):
        command = ["--init", str(folder / "base"), "--data", str(folder / data), "--out", str(folder / name)]
        assert train.main([*command, *SHORT, *flags]) == 0
    return folder


def chat(capsys, init, *flags, code=0):
    capsys.readouterr()
    assert train.main(["--task", "chat", "--init", str(init), *flags]) == code
    return capsys.readouterr()


def typed(monkeypatch, *lines):
    """What a user types, or a function that is called instead of it; then the end of the input."""
    left = list(lines)

    def ask(prompt):
        if not left:
            raise EOFError
        line = left.pop(0)
        return line() if callable(line) else line
    monkeypatch.setattr("builtins.input", ask)


@pytest.fixture
def asked(monkeypatch):
    """The prompts that a chat gives to the model, as text."""
    seen = []
    original = next_token.steps

    def steps(model, ids, *args, **kwargs):
        seen.append("".join(map(chr, ids)) if max(ids) < 256 else ids)
        return original(model, ids, *args, **kwargs)
    monkeypatch.setattr(next_token, "steps", steps)
    return seen


def context(init, *flags):
    cfg = train.parse(["--task", "chat", "--init", str(init), *flags])
    return train.open_context(cfg)


# ---------------------------------------------------------------------------------------------------- answers

@pytest.mark.parametrize("name", ["base", "single", "soft"])
def test_a_chat_answers_as_the_test_does(name, world, capsys):
    printed = chat(capsys, world / name, "--prompt", "ab", "--max_new_tokens", "9")
    ctx = context(world / name, "--max_new_tokens", "9")
    row = {"messages": [{"role": "user", "content": "ab"}, {"role": "assistant", "content": ""}]}
    assert printed.out == evaluate.answer(ctx, [ctx.prompt_ids(row)])[0] + "\n"


def test_an_answer_comes_in_whole_characters(world, monkeypatch):
    ctx = context(world / "base")
    cfg = train.parse(["--task", "chat", "--init", str(world / "base")])
    text = "\n é, 日本 \n 👋. \n"
    steps = [(byte, 1.0, None) for byte in text.encode()] + [(ctx.text.end_token, 1.0, None)]
    monkeypatch.setattr(next_token, "steps", lambda *args, **kwargs: iter(steps))
    pieces = []
    monkeypatch.setattr(conversation, "print_result", lambda text="", end="\n": pieces.append(text + end))
    said = conversation.Conversation(ctx, cfg, "chat", False).stream([{"role": "user", "content": "x"}])
    assert said == text.strip() and "".join(pieces) == said + "\n"
    assert [piece for piece in pieces if piece][:4] == ["é", ",", " 日", "本"]


@pytest.mark.parametrize("pieces", [["  ", "a", " ", " b", "\n"], ["a"], [" ", ""], [], ["\n a b ", "c", " \n"]])
def test_outer_blanks_are_left_out(pieces):
    assert "".join(conversation.without_outer_blanks(pieces)) == "".join(pieces).strip()


@pytest.mark.parametrize("flags, prompt, says", [
    (["--max_new_tokens", "3"], "ab", "the answer is cut here: --max_new_tokens 3 is reached"),
    (["--max_new_tokens", "155"], "abcdefghij" * 5, "the answer is cut here: the context of 160 tokens is full")])
def test_a_cut_answer_is_said_to_be_cut(flags, prompt, says, world, capsys, monkeypatch):
    original = next_token.steps
    monkeypatch.setattr(next_token, "steps", lambda m, ids, past, n, g, ends, **k: original(m, ids, past, n, g, (), **k))
    assert says in chat(capsys, world / "base", "--prompt", prompt, *flags).err
    monkeypatch.setattr(next_token, "steps", lambda *args, **kwargs: iter([(97, 1.0, None), (max(args[5]), 1.0, None)]))
    ended = chat(capsys, world / "base", "--prompt", prompt, *flags)
    assert "cut here" not in ended.err and ended.out == "a\n"


def test_answers_are_greedy_unless_a_flag_asks_for_sampling(world, capsys):
    def say(*flags):
        return chat(capsys, world / "base", "--prompt", "ab", "--max_new_tokens", "30", *flags).out
    assert say("--seed", "1") == say("--seed", "2")
    for flags in (["--temperature", "1"], ["--top_k", "200"], ["--top_p", "1"]):
        assert say("--seed", "1", *flags) != say("--seed", "2", *flags)
    cfg = train.parse(["--task", "chat", "--top_k", "5"])
    assert next_token.sampling_of(cfg) == dict(temperature=1.0, top_k=5, top_p=None)


# ----------------------------------------------------------------------------------------------- conversations

def test_a_model_of_single_questions_is_asked_one_at_a_time(world, capsys, monkeypatch, asked):
    assert read_json(world / "single" / "adapter" / "run.json")["turns"] == 1
    for name, alone in (("single", True), ("multi", False), ("base", False)):
        typed(monkeypatch, "ab", "ab")
        asked.clear()
        err = chat(capsys, world / name, "--max_new_tokens", "2").err
        assert (asked[0] == asked[1]) == alone == ("It was trained on single questions" in err)


def test_the_system_message_of_the_data_is_used(world, capsys, monkeypatch):
    assert read_json(world / "multi" / "adapter" / "run.json")["system"] == "Be brief."
    assert context(world / "multi").text.system == "Be brief."
    assert context(world / "multi", "--system", "No.").text.system == "No."
    assert context(world / "multi", "--system", "").text.system == ""
    typed(monkeypatch)
    assert "System message (--system overrules it): Be brief." in chat(capsys, world / "multi").err
    typed(monkeypatch)
    assert "had 2 different system messages; --system gives one" in chat(capsys, world / "mixed").err
    assert context(world / "mixed").text.system is None


def test_facts_of_rows(world):
    text = context(world / "base").text
    assert training_facts(text, MANY) == {"row_type": "chat", "turns": 2, "systems": 1, "system": "Be brief."}
    some = [*MANY, tiny.ROWS["chat"][0] | {"messages": MANY[0]["messages"][1:3]}]
    assert training_facts(text, some) == {"row_type": "chat", "turns": 2, "systems": 1}
    text.system = "Mine."
    assert "system" not in training_facts(text, MANY)
    assert training_facts(text, tiny.ROWS["text"]) == {"row_type": "text"}


def test_commands_and_empty_lines(world, capsys, monkeypatch, asked):
    typed(monkeypatch, "", "  ", "ab", "cd", "/help", "/clear", "ab", "/quit", "ef")
    err = chat(capsys, world / "multi", "--max_new_tokens", "2").err
    assert len(asked) == 3 and asked[0] == asked[2] != asked[1] and "the conversation is forgotten" in err
    assert err.count("/quit or Ctrl-D leaves") == 1                 # the banner is for terminals


def test_an_unknown_command_is_no_question(world, capsys, monkeypatch, asked):
    typed(monkeypatch, "/cler", "/quit now?", "/usr/bin", "/quit")
    err = chat(capsys, world / "multi", "--max_new_tokens", "2").err
    assert "/cler is no command: /quit or Ctrl-D leaves, /clear forgets" in err and err.count("is no command") == 1
    assert len(asked) == 2


def test_a_long_conversation_loses_its_oldest_part_and_says_so(world, capsys, monkeypatch, asked):
    typed(monkeypatch, *["a" * 60] * 4)
    err = chat(capsys, world / "base", "--max_new_tokens", "40").err
    assert len(asked) == 4 and max(map(len, asked)) <= 160 - 40
    assert "the oldest of the conversation is left out" in err and "its beginning is cut" not in err
    typed(monkeypatch, "a" * 200)
    assert "longer than the 120 tokens" in chat(capsys, world / "base", "--max_new_tokens", "40").err


def test_bytes_that_are_not_utf8_are_said(world, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff ab\n"), encoding="utf-8"))
    printed = chat(capsys, world / "base", "--max_new_tokens", "2")
    assert "what is not UTF-8 in the question became \ufffd" in printed.err and printed.out


def test_a_closed_input_ends_the_conversation(world, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    assert chat(capsys, world / "base").out == ""


@pytest.mark.parametrize("key, value", [("turns", "1"), ("systems", []), ("row_type", ["label"])])
def test_settings_of_a_wrong_type_are_an_error(key, value, world, tmp_path, capsys):
    shutil.copytree(world / "single" / "adapter", tmp_path / "run")
    stored = read_json(tmp_path / "run" / "run.json")
    (tmp_path / "run" / "run.json").write_text(json.dumps({**stored, key: value}))
    assert f'"{key}"' in chat(capsys, tmp_path / "run", code=65).err


def test_a_paste_is_one_question(world, capsys, monkeypatch):
    waiting = [True, True, False, False]
    monkeypatch.setattr(conversation, "is_terminal", lambda: True)
    monkeypatch.setattr(conversation, "more_is_waiting", lambda: waiting.pop(0))
    typed(monkeypatch, "a", "b", "c", "d")
    assert conversation.read_question() == "a\nb\nc" and conversation.read_question() == "d"
    assert conversation.read_question() is None


def ctrl_c(number=signal.SIGINT):
    defer_signals.handler(number, None)


def test_ctrl_c_stops_an_answer_and_then_leaves(world, capsys, monkeypatch, asked):
    monkeypatch.setattr(conversation, "is_terminal", lambda: True)
    monkeypatch.setattr(conversation, "more_is_waiting", lambda: False)
    original = next_token.steps

    def steps(*args, **kwargs):
        for n, step in enumerate(original(*args, **kwargs)):
            if n == 2 and len(asked) == 1:
                ctrl_c()
            yield step
    monkeypatch.setattr(next_token, "steps", steps)
    typed(monkeypatch, "ab", "ab", ctrl_c, "ab", ctrl_c, ctrl_c)
    printed = chat(capsys, world / "multi", "--max_new_tokens", "4", code=130)
    assert printed.err.count("stopped; this question is not part of the conversation") == 1
    assert printed.err.count("again leaves") == 2 and printed.err.count("/quit or Ctrl-D leaves") == 1
    assert asked[0] == asked[1] != asked[2] and "saved" not in printed.err
    typed(monkeypatch, lambda: ctrl_c(signal.SIGTERM))
    chat(capsys, world / "multi", code=143)


# ------------------------------------------------------------------------------------------------- classifiers

@pytest.mark.parametrize("name", ["words", "head", "answers"])
def test_a_classifier_answers_with_label_and_probabilities(name, world, capsys, monkeypatch):
    ctx = context(world / name)
    ids = ctx.text.prompt_ids({"text": "ab", "label": "x"})
    scores = evaluate.head_scores(ctx, [ids]) if name == "head" else evaluate.word_scores(ctx, [ids])
    x, y = (-scores[0]).softmax(0).tolist()
    best, other = sorted((("x", x), ("y", y)), key=lambda pair: -pair[1])
    expected = f"{best[0]}  ({best[0]} {best[1]:.3f}, {other[0]} {other[1]:.3f})\n"
    assert chat(capsys, world / name, "--prompt", "ab").out == expected
    typed(monkeypatch, "ab", "ab")
    printed = chat(capsys, world / name)
    assert printed.out == 2 * expected and "Which label fits this text: x or y?" in printed.err
    err = chat(capsys, world / name, "--top_k", "2", code=2).err
    assert "--top_k is for generated answers" in err and "answers with a label" in err


def test_a_reward_model_still_cannot_chat(world, tmp_path, capsys):
    assert train.main(["--task", "reward", "--init", str(world / "base"), "--data", str(world / "pairs"), "--out",
                       str(tmp_path / "rm"), "--max_new_tokens", "2", *SHORT]) == 0
    assert "scores and does not generate" in chat(capsys, tmp_path / "rm", "--prompt", "ab", code=2).err


def test_a_tagger_names_entities(world, capsys):
    ctx = context(world / "tagger")
    row = {"tokens": ["ab", "."], "tags": ["O", "O"]}
    tags = evaluate.word_tags(ctx, ctx.text.encode([row], 50)[0])[0]
    assert chat(capsys, world / "tagger", "--prompt", "ab.").out == entities.format_entities(["ab", "."], tags) + "\n"


@pytest.mark.parametrize("tags", [["O"], ["B-X", "I-X", "B-X", "O", "B-Y"], ["B-Y", "B-X", "I-X"]])
def test_tags_of_spans(tags):
    assert entities.tags_of(entities.spans(tags), len(tags)) == tags
    assert entities.tags_of({("X", -1, -1)}, 2) == ["O", "O"]


# ------------------------------------------------------------------------------------------------- predictions

def predicted(capsys, world, name, data, out, *flags):
    command = ["--task", "predict", "--init", str(world / name), "--data", str(data), "--out", str(out), *flags]
    assert train.main(command) == 0
    printed = capsys.readouterr().out
    assert train.main(command) == 0 and capsys.readouterr().out.endswith(printed)       # a finished run
    return [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()], printed


@pytest.mark.parametrize("name", ["words", "head"])
def test_lines_of_a_text_file_get_labels(name, world, tmp_path, capsys):
    (tmp_path / "texts.txt").write_text("ab\n\n ef\ngh\n")
    rows, printed = predicted(capsys, world, name, tmp_path / "texts.txt", tmp_path / "p")
    assert [row["text"] for row in rows] == ["ab", " ef", "gh"]
    for row in rows:
        assert sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert row["label"] == max(row["probabilities"], key=row["probabilities"].get)
        assert predict.prediction_text(row) in printed
    assert read_json(tmp_path / "p" / "result.json")["metrics"]["rows"] == 3
    again = train.formats.load(tmp_path / "p" / "predictions.jsonl")
    assert again.row_type == "label" and [row["label"] for row in again.rows] == [row["label"] for row in rows]


def test_predictions_are_those_of_eval_and_know_the_reference(world, tmp_path, capsys):
    rows, _ = predicted(capsys, world, "words", world / "label" / "test.jsonl", tmp_path / "p", "--eval_items", "5")
    assert len(rows) == 5 and [row["reference"] for row in rows] == ["x", "x", "x", "x", "y"]
    assert train.main(["--task", "eval", "--init", str(world / "words"), "--data", str(world / "label"), "--out",
                       str(tmp_path / "e")]) == 0
    correct = read_json(tmp_path / "e" / "result.json")["item_correct"][:5]
    assert correct == "".join(str(int(row["label"] == row["reference"])) for row in rows)


def test_predicted_answers_are_rows_again(world, tmp_path, capsys):
    rows, _ = predicted(capsys, world, "single", world / "chat" / "test.jsonl", tmp_path / "p", "--max_new_tokens", "4")
    assert "reference" in rows[0]
    again = train.formats.load(tmp_path / "p" / "predictions.jsonl")
    assert again.row_type == "chat" and len(again.rows) == len(rows)


def test_predictions_of_other_models(world, tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text('{"prompt": "ab"}\n')
    rows, _ = predicted(capsys, world, "single", tmp_path / "p.jsonl", tmp_path / "1", "--max_new_tokens", "4")
    assert rows == [{"prompt": "ab", "completion": chat(capsys, world / "single", "--prompt", "ab",
                                                        "--max_new_tokens", "4").out.strip("\n")}]
    rows, _ = predicted(capsys, world, "multi", world / "many" / "test.jsonl", tmp_path / "2", "--max_new_tokens", "2")
    assert [turn["role"] for turn in rows[0]["messages"]] == ["system", "user", "assistant"] * 1 + ["user", "assistant"]
    rows, _ = predicted(capsys, world, "tagger", world / "tags" / "test.jsonl", tmp_path / "3")
    assert {"tokens", "tags", "reference"} == set(rows[0]) and len(rows[0]["tags"]) == len(rows[0]["tokens"])
    rows, _ = predicted(capsys, world, "named", world / "tags" / "test.jsonl", tmp_path / "4", "--max_new_tokens", "2")
    assert {"tokens", "tags", "reference"} == set(rows[0])


def test_what_predict_and_eval_say_of_texts_without_labels(world, tmp_path, capsys):
    (tmp_path / "texts.txt").write_text("ab\nef\n")
    for name, code, says in (("head", 65, "--task predict labels texts"), ("words", 0, "--task predict labels it")):
        assert train.main(["--task", "eval", "--init", str(world / name), "--data", str(tmp_path / "texts.txt"),
                           "--out", str(tmp_path / name)]) == code
        assert says in capsys.readouterr().err
    assert train.main(["--task", "predict", "--init", str(world / "words")]) == 2
    assert "--task predict needs --data FILE" in capsys.readouterr().err
    assert train.main(["--task", "predict", "--init", str(world / "words"), "--data", str(world / "chat"), "--out",
                       str(tmp_path / "chat")]) == 65
    assert 'answers with a label and reads rows with "text"' in capsys.readouterr().err
