"""--task check: each count by hand, the clean copy, the time of real steps, and what is refused."""
import json
import re
import shlex

import pytest
import torch

import train
from data.results import forecast, inspect_data
from data.runtime.files import read_json
from data.text import formats
from data.text.tokenizer import Tokenizer
from model import GPT, GPTConfig

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TOKENIZER = Tokenizer.train(["a b"], 256 + len(SPECIAL), SPECIAL)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    GPT(GPTConfig(TOKENIZER.vocab_size, 160, 2, 2, 16, eos=TOKENIZER.eos)).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def checked(base, data, capsys, *flags, code=0):
    capsys.readouterr()
    assert train.main(["--task", "check", "--init", str(base), "--data", str(data), *flags]) == code
    printed = capsys.readouterr()
    return printed.out if code == 0 else printed.err


def split_folder(folder, **splits):
    folder.mkdir()
    for name, rows in splits.items():
        (folder / f"{name}.jsonl").write_text(lines(rows))
    return folder


def test_every_count_by_hand(base, tmp_path, capsys):
    row = {"prompt": "ab", "completion": "c"}
    train_rows = [row, row, {"prompt": "ab", "completion": "d"}, {"prompt": "x" * 300, "completion": "e"},
                  {"prompt": "q", "completion": ""}]
    train_rows += [{"prompt": f"{i}", "completion": "y"} for i in range(9)]
    folder = split_folder(tmp_path / "d", train=train_rows, valid=[{"prompt": "v", "completion": "w"}],
                          test=[row, {"prompt": "t", "completion": "u"}])
    out = checked(base, folder, capsys, "--batch", "4", "--epochs", "2")
    assert "prompt/completion; chat rows, for --task sft" in out
    assert "train   from" in out and "; 1 dropped" in out
    table = {words[0]: words[1:] for words in map(str.split, out.splitlines()) if words}
    template = len(TOKENIZER.encode("user\n" "\n" "assistant\n" "\n")) + 4        # tokens around the texts
    short = template + 2
    whole = 2 * (template + 3) + (template + 3) + (template + 301) + 9 * short
    expected = [13, 1, 0, whole, short, short, template + 3, template + 301, template + 301]
    assert [int(word.replace(",", "")) for word in out.splitlines()[6].split()[1:]] == expected
    assert table["test"][:3] == ["2", "0", "1"] and table["valid"][:3] == ["1", "0", "0"]
    total = whole + short * 2 + template + 3
    assert f"supervised: {32 / total:.1%} of the tokens, 32 of {total}" in out     # 16 answers and ends
    for text in ("8 steps of 4 examples", "tokens a second on cpu", "parameters are trainable"):
        assert text in out
    for line in ("- 1 rows repeat another row of their split; 1 rows of valid and test have a prompt of",
                 "- 1 of 13 training rows exceed 160 tokens", "- 1 prompts have several answers",
                 "- 13 training rows are few"):
        assert line in out


def test_labels_and_tags(base, tmp_path, capsys):
    rows = [{"text": f"{a}{b}", "label": "spam" if a == "a" and b < "e" else "ham"} for a in "abcdefghij"
            for b in "abcdefghijkl"]
    out = checked(base, split_folder(tmp_path / "l", train=rows, valid=rows[:1], test=rows[1:2]), capsys)
    assert "balance:  ham 116 (96.7%)  spam 4 (3.3%)" in out
    assert "always answering 'ham' is correct in 96.7%" in out
    assert "fewer than 10 training rows each for spam" in out
    rows = [{"tokens": ["Fay", "Bell", "met", f"Luca{i}"], "tags": ["B-PER", "I-PER", "O", "B-PER"]}
            for i in range(40)]
    out = checked(base, split_folder(tmp_path / "t", train=rows, valid=rows[:1], test=rows[1:2]), capsys,
                  "--method", "p_tuning_v2", "--num_virtual_tokens", "4", "--steps", "7")
    assert "tags rows, for --task tag" in out and "balance:  PER 80 (100.0%)" in out
    assert "\n7 steps of 16" in out


@pytest.mark.parametrize("row_type, rows, task", [
    ("text", [{"text": "abcd efgh " * 20}] * 3, "pretrain"),
    ("pairs", [{"prompt": f"{i}", "chosen": "a", "rejected": "b"} for i in range(30)], "reward"),
    ("ranked", [{"prompt": f"{i}", "responses": ["a", "bc"], "rank": [1, 2]} for i in range(30)], "reward"),
    ("prompt", [{"prompt": f"{i}"} for i in range(30)], "ppo"),
])
def test_every_row_type(row_type, rows, task, base, tmp_path, capsys):
    data = split_folder(tmp_path / "d", train=rows, valid=rows[:1], test=rows[1:2])
    out = checked(base, data, capsys, "--method", "lora", "--batch", "4",
                  *(["--block_size", "16"] if row_type == "text" else []))
    assert f"; {row_type} rows, for --task {task}" in out
    assert ("tokens a second" in out) == (row_type != "prompt")
    if row_type == "text":
        assert "tokens a second" not in checked(base, data, capsys, "--method", "none")


def test_a_clean_copy(base, tmp_path, capsys, monkeypatch):
    opened = []
    open_context = train.open_context
    monkeypatch.setattr(train, "open_context", lambda cfg: opened.append(cfg) or open_context(cfg))
    rows = [{"prompt": f"q{i % 60}", "completion": f"a{i % 70}"} for i in range(200)]
    file = tmp_path / "mine.jsonl"
    file.write_text(lines(rows))
    out = checked(base, file, capsys, "--write")
    assert f"clean copy: {tmp_path / 'mine-clean'}" in out
    splits = {split: formats.load(tmp_path / "mine-clean", split).rows for split in formats.SPLITS}
    assert not sum(map(formats.duplicates, splits.values()))
    assert not formats.leaks(splits["train"], splits["test"] + splits["valid"])
    assert not formats.leaks(splits["valid"], splits["test"])
    kept = {formats.row_json(row) for some in splits.values() for row in some}
    assert kept == {formats.row_json(row) for row in formats.load(file).rows}      # nothing unique is lost
    assert "nothing to change" not in out
    started = len(opened)
    assert "mine-clean exists" in checked(base, file, capsys, "--write", code=2)
    assert started and len(opened) == started                   # refused before anything takes time
    assert "0 rows repeat" not in checked(base, tmp_path / "mine-clean", capsys)


def test_of_two_splits_test_keeps_the_prompt():
    def row(q, a):
        return {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}], "line": a}
    kept = inspect_data.clean({
        "train": [row("x", "1"), row("y", "2"), row("z", "3"), row("z", "3"), row("z", "4")],
        "valid": [row("y", "5"), row("x", "6")], "test": [row("x", "1")]})
    assert {split: [r["messages"][1]["content"] for r in rows] for split, rows in kept.items()} == \
        {"train": ["3", "4"], "valid": ["5"], "test": ["1"]}


def test_what_makes_no_sense_is_refused(base, tmp_path, capsys):
    assert "--data toy/sentiment is no file" in checked(base, "toy/sentiment", capsys, "--method", "none",
                                                        "--write", code=2)
    mixed = split_folder(tmp_path / "mixed", train=[{"text": "a", "label": "x"}, {"text": "b", "label": "y"}],
                         test=[{"text": "c"}])
    message = checked(base, mixed, capsys, code=65)
    assert "test.jsonl holds text rows" in message and "label rows" in message
    few = tmp_path / "few.jsonl"
    few.write_text(lines([{"prompt": "a", "completion": "b"}] * 2))
    assert "too few different rows" in checked(base, few, capsys, "--write", code=2)
    assert "--best_n belongs to" in checked(base, few, capsys, "--best_n", "1", code=2)
    assert "--fresh means nothing to --task check" in checked(base, few, capsys, "--fresh", code=2)
    assert "--data needs a value" in checked(base, few, capsys, "--data", code=2)
    assert "does not exist" in checked(base, tmp_path / "no.jsonl", capsys, code=65)


# ---- what a run takes
def test_check_foretells_the_command_that_follows(base, tmp_path, capsys):
    """Steps, tokens, items and evaluations are those of the run itself; --dry_run says the same."""
    rows = [{"prompt": f"q{i}" * (i % 5 + 1), "completion": f"a{i}"} for i in range(40)]
    data = split_folder(tmp_path / "d", train=rows, valid=rows[:3], test=rows[:9])
    flags = ["--batch", "8", "--epochs", "1.5", "--eval_items", "5", "--max_new_tokens", "3"]
    out = checked(base, data, capsys, *flags)
    command = f"python train.py --task sft --data {data} --init {base} {' '.join(flags)}"
    assert command in out.splitlines()
    assert f"model: {base} (gpt2, 2 layers of width 16, a context of 160 tokens)" in out
    words = shlex.split(command)[2:] + ["--out", str(tmp_path / "r")]
    assert train.main([*words, "--dry_run"]) == 0
    dry = capsys.readouterr().out
    assert train.main(words) == 0
    result = read_json(tmp_path / "r" / "result.json")
    log = [json.loads(line) for line in (tmp_path / "r" / "log.jsonl").read_text().splitlines()]
    times = sum(event["event"] == "valid" for event in log)
    for text in (f"\n{result['steps']:,} steps of 8 examples, {result['tokens']:,} tokens; ",
                 f"\n  5 test items before and after training, 3 of valid {times} times: ", "\nin all about "):
        assert text in out and text in dry
    assert "[[" in dry and "[[" not in out


@pytest.mark.parametrize("task, extra", [("sft", "evaluation"), ("reward", "6 of valid before training"),
                                         ("dpo", "30 examples prepared (8 of train, 6 of valid, 8 of test twice)")])
def test_a_dry_run_of_every_loop(task, extra, base, tmp_path, capsys):
    pairs = [{"prompt": f"{i}", "chosen": "ab", "rejected": "b"} for i in range(40)]
    chats = [{"prompt": f"{i}", "completion": "ab"} for i in range(40)]
    rows = chats if task == "sft" else pairs
    data = split_folder(tmp_path / "d", train=rows, valid=rows[:6], test=rows[:8])
    argv = ["--task", task, "--data", data, "--init", base, "--batch", "4", "--steps", "2", "--eval_every", "1",
            "--out", tmp_path / "r", "--dry_run"]
    assert train.main([*map(str, argv)]) == 0
    out = capsys.readouterr().out
    before = "" if task == "reward" else "before and "
    assert f"  8 test items {before}after training, 6 of valid 2 times: " in out
    assert extra == "evaluation" or f"\n  {extra}: " in out          # dpo: 8 for two steps, 6 and 2 x 8 to measure
    assert not (tmp_path / "r").exists()


def test_few_thumbs_say_how_they_become_one_step(base, tmp_path, capsys):
    """40 rows in steps of 16 are 3 steps (16, 16, 8), of which --epochs 0.25 takes 0.75, rounded up."""
    rows = [{"prompt": f"{i // 2}", "completion": f"a{i}", "label": i % 2 == 0} for i in range(40)]
    data = split_folder(tmp_path / "d", train=rows, valid=rows[:4], test=rows[:6])
    out = checked(base, data, capsys)
    used = re.search(r"\n  (\d+) examples prepared \((\d+) of train, 4 of valid, 6 of test twice\): ", out)
    assert int(used[1]) == int(used[2]) + 4 + 2 * 6 and 8 <= int(used[2]) <= 16
    assert "\n1 step of 16 examples, " in out and "1 steps" not in out
    assert "\n  a pass over the training data: 3 steps; --epochs 0.25\n" in out
    assert "\n  a pass over the training data: 3 steps\n" in checked(base, data, capsys, "--steps", "2")


def test_text_is_priced_as_pretraining_trains_it(base, tmp_path, capsys):
    texts = [{"text": "abcd efgh " * 20}] * 8
    data = split_folder(tmp_path / "d", train=texts, valid=texts[:1], test=texts[:2])
    out = checked(base, data, capsys, "--batch", "4", "--block_size", "16")
    assert "(100.00%)" in out                                           # --method full
    words = ["--task", "pretrain", "--data", data, "--init", base, "--batch", "4", "--block_size", "16", "--out",
             tmp_path / "r"]
    assert train.main([*map(str, words)]) == 0
    result = read_json(tmp_path / "r" / "result.json")
    assert f"\n{result['steps']} steps of 4 examples, {result['tokens']:,} tokens; " in out
    assert " test windows before and after training, " in out


def test_check_names_tokens_that_no_training_reached(base, tmp_path, capsys):
    model = GPT.from_pretrained(base)
    ids = TOKENIZER.encode("YZ")
    with torch.no_grad():
        model.wte.weight[ids[0]] = model.wte.weight[ids[1]]
    model.save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    rows = [{"prompt": f"{i}", "completion": "Z"} for i in range(30)]
    data = split_folder(tmp_path / "d", train=rows, valid=rows[:2], test=rows[:2])
    argv = ["--task", "check", "--init", str(tmp_path / "base"), "--data", str(data), "--steps", "1"]
    assert train.main(argv) == 0
    assert "answers need 1 token that no training of" in capsys.readouterr().err


class Clock:
    """A clock that work moves."""
    now = 0.0

    def monotonic(self):
        return self.now

    def work(self, fixed, each):
        """Work that takes `fixed` seconds, and `each` for every item."""
        def do(items):
            self.now += fixed + each * len(items)
        return do


@pytest.mark.parametrize("items, fixed, each, budget, low, high, seconds", [
    (300, 0.0, 1.0, 100, 1.0, 1.0, 85),                 # 1, 4, 16 and 64 items
    (300, 8.0, 0.5, 100, 0.5, (40 + 236 * 0.5) / 300, 74.5),    # a larger batch costs less for each item
    (300, 8.0, 0.0, 40, 8 / 300, (8 + 44 * 8 / 256 / 2) / 300, 40),     # 256 cost no more than one
    (300, 0.0, 3.0, 10, 3.0, 3.0, 15),                  # two measurements, unless the first is long
    (300, 0.0, 60.0, 10, 30.0, 60.0, 60),               # one item already takes long
    (3, 0.0, 1.0, 100, 1.0, 1.0, 4),                    # all there are
    (16, 4.0, 1.0, 100, 1.25, 1.25, 33)])
def test_seconds_of_an_item_and_how_long_it_takes_to_know(items, fixed, each, budget, low, high, seconds, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(forecast, "time", clock)
    part = forecast.Part("x", list(range(items)), items, clock.work(fixed, each))
    assert forecast.seconds_per_item(part, part.work, budget) == pytest.approx((low, high))
    assert clock.now == seconds


def test_answers_after_training_may_be_shorter(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(forecast, "time", clock)
    part = forecast.Part("x", [1, 2, 3], 3, clock.work(0, 10), after=5, at_best=clock.work(0, 1))
    assert forecast.measure_part(part, 100) == (3 * 10 + 5 * 1, 8 * 10)
    unused = part._replace(what="y", count=0, after=0)
    assert forecast.measure_parts([part, unused, part._replace(what="z", items=[])], 100) == {"x": (35, 80)}


def test_a_rate_and_its_error():
    assert forecast.rate_of([(2.0, 100)]) == pytest.approx((0.02, 0.005))           # one: a quarter
    assert forecast.rate_of([(2.0, 100), (4.0, 200)]) == pytest.approx((0.02, 0.002))   # equal: a tenth
    rate, error = forecast.rate_of([(1.5, 100), (2.0, 100), (2.5, 100)])
    # residuals -.5, 0, .5: sqrt(0.5 x 3/2) / 300, twice
    assert (rate, error) == pytest.approx((0.02, 2 * 0.75 ** 0.5 / 300))


@pytest.mark.parametrize("seconds, text", [((1, 2), "1-2 s"), ((3.0, 3.0), "3 s"), ((50, 90), "50 s - 1.5 min"),
                                           ((66, 120), "1.1-2 min")])
def test_ranges(seconds, text):
    assert forecast.format_range(seconds) == text
