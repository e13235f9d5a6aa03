"""What --task predict, chat, show and eval do where something is cut, unread or ends early."""
import json
import shutil

import pytest
import torch

import tiny
import train
from data.results import evaluate, predict
from data.text import formats
from data.text.tokenizer import Tokenizer
from model import GPT, GPTConfig

SHORT = ["--steps", "2", "--batch", "8", "--forgetting_data", "none"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tiny.world(tmp_path_factory.mktemp("world"))
    for name, data, flags in (("single", "chat", ["--max_new_tokens", "2"]), ("words", "label", ["--task", "classify"]),
                              ("tagger", "tags", ["--task", "tag"])):
        assert train.main(["--init", str(folder / "base"), "--data", str(folder / data), "--out", str(folder / name),
                           *SHORT, *flags]) == 0
    return folder


def predicted(world, tmp_path, init, rows, *flags, name="q.jsonl"):
    file = tmp_path / name
    file.write_text(rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    assert train.main(["--task", "predict", "--init", str(world / init), "--data", str(file), "--out", str(out),
                       *flags]) == 0
    return out / "predictions.jsonl", [json.loads(line) for line in (out / "predictions.jsonl").open()]


def talk(*contents):
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]}


def test_predictions_of_short_and_long_conversations_are_one_format(world, tmp_path):
    path, rows = predicted(world, tmp_path, "single", [talk("ab", "a"), talk("ab", "a", "cd", "c")],
                           "--max_new_tokens", "2")
    assert len(rows) == 2
    path.write_text("".join(json.dumps({**row, **({"completion": "x"} if "completion" in row else {})}) + "\n"
                            for row in rows))
    assert formats.load(path).row_type == "chat"


def test_predict_says_what_it_cuts(world, tmp_path, capsys):
    capsys.readouterr()
    predicted(world, tmp_path, "single", [{"prompt": "ab " * 200}, {"prompt": "ab"}], "--max_new_tokens", "2")
    said = capsys.readouterr().err
    assert "2 of 2 answers are cut" in said and "1 of 2 prompts are longer" in said


def test_predict_says_which_words_have_no_tag_because_they_were_not_read(world, tmp_path, capsys):
    capsys.readouterr()
    _, rows = predicted(world, tmp_path, "tagger", "ab " * 200 + "\nab\n", name="q.txt")
    assert len(rows[0]["tags"]) == 200
    assert "1 of 2 texts are longer" in capsys.readouterr().err


def test_the_answer_of_a_prompt_row_becomes_the_reference(world, tmp_path):
    _, rows = predicted(world, tmp_path, "single", [{"prompt": "2+2?", "answer": "4"}], "--max_new_tokens", "2")
    assert rows[0]["reference"] == "4"


def test_a_word_keeps_its_marks(world):
    ctx = train.open_context(train.parse(["--task", "chat", "--init", str(world / "tagger")]))
    row = predict.question_row(ctx, "tags", "हिन्दी में, Zoe\u0308!")
    assert row["tokens"] == ["हिन्दी", "में", ",", "Zoe\u0308", "!"]


@pytest.fixture(scope="module")
def two_ends(tmp_path_factory):
    """A model that answers "ab" with <|endoftext|>, then a, a, a ...; as Qwen2.5's and Llama 3's, its folder names two
    end tokens."""
    folder = tmp_path_factory.mktemp("two")
    tokenizer = Tokenizer.train(["a b"], 256 + len(tiny.SPECIAL), tiny.SPECIAL)
    model = GPT(GPTConfig(tokenizer.vocab_size, 160, 1, 2, 32, eos=tokenizer.eos))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ctx = train.open_context(train.parse(["--task", "chat", "--init", str(folder)]))
    last = len(ctx.prompt_ids(predict.open_row([{"role": "user", "content": "ab"}]))) - 1
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.zero_()
        model.wpe.weight[:, 1] = 9
        model.wpe.weight[last] = 0
        model.wpe.weight[last, 0] = 9
        model.wte.weight[tokenizer.eos, 0] = 5
        model.wte.weight[ord("a"), 1] = 5
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    ends = {"eos_token_id": [tokenizer.special["<|im_end|>"], tokenizer.eos]}
    (folder / "config.json").write_text(json.dumps({**config, **ends}))
    (folder / "generation_config.json").write_text(json.dumps(ends))
    return folder


def test_an_answer_ends_at_every_end_token_of_the_model(two_ends, capsys):
    """transformers' generate gives [<|endoftext|>] here."""
    ctx = train.open_context(train.parse(["--task", "eval", "--init", str(two_ends), "--max_new_tokens", "9"]))
    assert ctx.text.template == "chatml"
    row = predict.open_row([{"role": "user", "content": "ab"}])
    assert evaluate.sample(ctx, [ctx.prompt_ids(row)]) == [[ctx.text.tokenizer.eos]]
    capsys.readouterr()
    assert train.main(["--task", "chat", "--init", str(two_ends), "--prompt", "ab", "--max_new_tokens", "9"]) == 0
    said = capsys.readouterr()
    assert said.out == "\n" and "cut here" not in said.err


def test_end_tokens_that_generation_config_alone_names_count(two_ends, tmp_path):
    """config.json of many instruction models names one end token, generation_config.json all."""
    folder = shutil.copytree(two_ends, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    ends = config.pop("eos_token_id")
    for rest in ({}, {"eos_token_id": ends[0]}, {"eos_token_id": 7}):
        (folder / "config.json").write_text(json.dumps(config | rest))
        assert GPT.from_pretrained(folder).config.eos == ends
    (folder / "generation_config.json").write_text("{}")
    assert GPT.from_pretrained(folder).config.eos == 7


def test_labels_have_no_longest_answer(world, tmp_path, capsys):
    (tmp_path / "texts.txt").write_text("ab\n")
    assert train.main(["--task", "predict", "--init", str(world / "words"), "--data", str(tmp_path / "texts.txt"), "--out",
                       str(tmp_path / "out"), "--max_new_tokens", "5"]) == 2
    assert "--max_new_tokens is for generated answers" in capsys.readouterr().err


def test_show_says_that_it_cuts_the_prompt(world, capsys):
    capsys.readouterr()
    assert train.main(["--task", "show", "--init", str(world / "base"), "--prompt", "ab " * 200]) == 0
    assert "its beginning is cut" in capsys.readouterr().err


@pytest.mark.parametrize("task", ["chat", "show"])
def test_greedy_answers_have_no_top_k(task, world, capsys):
    assert train.main(["--task", task, "--init", str(world / "single"), "--prompt", "ab", "--temperature", "0",
                       "--top_k", "3"]) == 2
    assert "--top_k means nothing to --temperature 0" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--system", "Be rude."], ["--template", "alpaca"], ["--max_new_tokens", "3"]])
def test_a_head_that_tags_reads_no_system_message(flags, world, tmp_path, capsys):
    assert train.main(["--task", "eval", "--init", str(world / "tagger"), "--data", str(world / "tags"),
                       "--out", str(tmp_path / "out"), *flags]) == 2
    assert f"{flags[0]} means nothing to" in capsys.readouterr().err


def test_a_sample_of_a_tagger_shows_what_the_head_has_read(world):
    result = json.loads((world / "tagger" / "result.json").read_text())
    assert "Which names" not in json.dumps(result["samples"])
