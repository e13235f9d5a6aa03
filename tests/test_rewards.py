"""Rewards: functions of the user's own, those that are shipped, several together, the rows that they get, errors."""
import fractions
import json
import sys

import pytest
import tiny
import torch

import ppo
import train
from data.batches.examples import Text
from data.checkpoints.safetensors import read_tensors
from data.results import reward_models, rewards
from data.runtime.files import UserError, read_json
from data.runtime.identity import compare_identity
from data.runtime.user_functions import is_function, load_reward, split_words, target
from data.text import chat, formats
from data.text.tokenizer import Tokenizer

PPO = ["--task", "ppo", "--steps", "1", "--batch", "4", "--minibatches", "1", "--ppo_epochs", "1", "--max_new_tokens", "3",
       "--forgetting_data", "none", "--eval_items", "3"]
SAMPLE = ["--task", "sample", "--num_generations", "2", "--max_new_tokens", "3", "--eval_items", "3"]
HEADS = ["Once. " * 40, "Twice. " * 40]                                     # longer than the context
FUNCTIONS = """
import fractions, numpy, torch
seen = []
rows_seen = []
def none(p, a): return None
def text(p, a): return "0.5"
def nan(p, a): return float("nan")
def huge(p, a): return 3.5e38
def many(p, a): return torch.zeros(2)
def listed(p, a): return [0.5]
def boom(p, a): raise KeyError("x" + chr(27) + chr(10) + "y")
def one(p): return 1.0
def four(p, a, row, more): return 1.0
def tensor(p, a): return torch.tensor(0.5)
def tensors(p, a): return torch.tensor([[0.5]])
def array(p, a): return numpy.float32(0.5)
def arrays(p, a): return numpy.array([0.5])
def truth(p, a): return a == "an answer"
def half(p, a): return fractions.Fraction(1, 2)
def star(*texts): return len(texts) / 4
def option(p, a, strict=False): return 0.0 if strict else 0.5
def gold(p, a, row): return row["n"]
def named(p, a, row=None): return row["n"]
def take(p, a, row): return float(row.pop("n"))
def lists(prompts, answers): return [len(p) + len(a) / 100 for p, a in zip(prompts, answers)]
def arrayed(prompts, answers, rows): return numpy.array([row["n"] for row in rows])
def tensored(prompts, answers, rows): return torch.tensor([row["n"] for row in rows])
def short(prompts, answers): return [1.0]
def holes(prompts, answers): return [1.0, None]
def flat(prompts, answers): return 1.0
def crashes(prompts, answers): return 1 / 0
def columns(prompts, answers, answer): return [1.0]
def make(text): return lambda p, a: float(len(text))
def unmade(text): raise ValueError(text)
def spy(prompt, answer, row):
    seen.append((prompt, row))
    return float(len(answer))
def size(prompt, answer): return float(len(answer))
def least(prompt, answer): return -1.0
thing = 3
"""


@pytest.fixture(scope="module")
def functions(tmp_path_factory):
    """The module `own_rewards`, importable."""
    folder = tmp_path_factory.mktemp("functions")
    (folder / "own_rewards.py").write_text(FUNCTIONS)
    (folder / "broken_rewards.py").write_text("1 / 0")
    sys.path.insert(0, str(folder))
    import own_rewards
    yield own_rewards
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def land(tmp_path_factory, functions):
    """A base model, and data whose rows have a right answer."""
    folder = tiny.world(tmp_path_factory.mktemp("land"))
    sums = [(a, b) for a in range(8) for b in range(4)]
    talk = [{"role": "system", "content": "Be brief."}, tiny_turn("user", "Hi"), tiny_turn("assistant", "Yes?")]
    tiny.write(folder, {
        "verifiable": [{"prompt": f"{a}+{b}=", "answer": str(a + b), "level": b} for a, b in sums],
        "gsm8k": [{"question": f"{a}+{b}?", "answer": f"{a} and {b} #### {a + b}"} for a, b in sums],
        "talk": [{"messages": [*talk, tiny_turn("user", f"{a}+{b}?"), tiny_turn("assistant", str(a + b))], "id": a}
                 for a, b in sums],
        "prompts_only": [{"prompt": f"{a}+{b}="} for a, b in sums],
        "long": [{"prompt": HEADS[n % 2] + "What is it?", "answer": str(n)} for n in range(8)]}, every=1)
    return folder


def tiny_turn(role, content):
    return {"role": role, "content": content}


def run(land, out, *words, code=0):
    argv = ["--init", str(land / "base"), "--out", str(out), *map(str, words)]
    assert train.main(argv) == code
    return read_json(out / "result.json") if code == 0 else None


def events(out):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [event for event in lines if event["event"] == "train"]


# ------------------------------------------------------------------------------------- a function and its arguments

@pytest.mark.parametrize("name, expected", [
    ("tensor", [0.5, 0.5]), ("tensors", [0.5, 0.5]), ("array", [0.5, 0.5]), ("arrays", [0.5, 0.5]), ("truth", [1.0, 0.0]),
    ("half", [0.5, 0.5]), ("star", [0.5, 0.5]), ("option", [0.5, 0.5]),         # a third with a default is its own
    ("gold", [7.0, 8.0]), ("named", [7.0, 8.0]),
    ("lists", [8.09, 9.05]), ("arrayed", [7.0, 8.0]), ("tensored", [7.0, 8.0]),
    ("make()", [0.0, 0.0]), ("make(a,b)", [3.0, 3.0])])
def test_what_a_function_takes_and_returns(name, expected, functions):
    score = load_reward("reward", f"own_rewards:{name}")
    assert score(["a prompt", "a prompt."], ["an answer", "other"], [{"n": 7}, {"n": 8}]) == expected
    assert score([], [], []) == []


def test_a_function_may_change_its_row(functions):
    rows = [{"n": 7, "inner": [1]}]
    score = load_reward("reward", "own_rewards:take")
    assert score(["p"], ["a"], rows) == score(["p"], ["a"], rows) == [7.0] and rows == [{"n": 7, "inner": [1]}]


SINGLE = "a function of the texts of a prompt and an answer, and of their row"
FAULTS = {"none": "returned None (NoneType) for the prompt 'a prompt' and the answer 'an answer'; it must be " + SINGLE,
          "text": "returned '0.5' (str) for", "nan": "returned nan (float) for", "huge": "returned 3.5e+38 (float) for",
          "many": "returned tensor([0., 0.]) (Tensor) for",
          "listed": "returned [0.5] (list) for",
          "boom": "failed for the prompt 'a prompt' and the answer 'an answer' (KeyError: 'x\\x1b\\ny')",
          "one": "cannot be called with two texts, nor with two texts and a row (too many positional",
          "four": "cannot be called with two texts, nor with two texts and a row (missing a required argument: 'more'",
          "thing": "is no function but a value of type int", "missing": "cannot be imported (AttributeError: ",
          "thing(a)": "cannot be made (TypeError: 'int' object", "unmade(a)": "cannot be made (ValueError: a)",
          "make(a": "does not end with its closing parenthesis",
          "short": "returned [1.0] (list), a list of 1, for 2 answers, the first with the prompt 'a prompt' and the "
                   "answer 'an answer'; its first parameter is called prompts, so it gets lists",
          "holes": "returned None (NoneType) for the prompt 'other' and the answer 'b'; its first parameter",
          "flat": "returned 1.0 (float) for 2 answers", "crashes": "failed for 2 answers, the first with the prompt",
          "columns": "gets lists, because its first parameter is called prompts, and its third is called answer"}


@pytest.mark.parametrize("name", FAULTS)
def test_a_function_that_gives_no_number_is_named(name, functions):
    with pytest.raises(UserError) as e:
        load_reward("gold_reward", f"own_rewards:{name}")(["a prompt", "other"], ["an answer", "b"], [{}, {}])
    assert str(e.value).startswith(f"--gold_reward own_rewards:{name} {FAULTS[name]}") and "\n" not in str(e.value)
    assert "a function of lists calls its first parameter prompts" in str(e.value) or name != "listed"


def test_a_module_that_fails_is_named(functions):
    with pytest.raises(UserError, match=r"broken_rewards:x cannot be imported \(ZeroDivisionError: division by zero\)"):
        load_reward("reward", "broken_rewards:x")


def test_a_script_that_ends_itself_ends_no_run(tmp_path, monkeypatch):
    """A file without a main guard, or a function that leaves: an error, not a run that ended well."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "leaving.py").write_text("import sys\n\ndef f(prompt, answer):\n    sys.exit()\n")
    (tmp_path / "script.py").write_text("import sys\n\ndef f(prompt, answer):\n    return 1\n\nsys.exit(0)\n")
    with pytest.raises(UserError, match=r"leaving:f failed for .* \(SystemExit"):
        load_reward("reward", "leaving:f")(["a"], ["b"], [{}])
    with pytest.raises(UserError, match=r"script:f cannot be imported \(SystemExit"):
        load_reward("reward", "script:f")


USERS = """import torch


def short(prompt, answer):
    return inner(answer)


def inner(answer):
    return answer.gone


def column(prompts, answers):
    return torch.ones(len(prompts), 1)


def number(prompts, answers):
    return torch.tensor(1.0)


def nested(prompts, answers):
    return [[1.0] for _ in prompts]


def total(prompts, answers):
    return [inner(answer) for answer in answers]


@torch.no_grad()
def wrapped(prompt, answer):
    return torch.ones(2).view(3)


def swapped(answer, prompt):
    return 1.0


def swapped_lists(answers, prompts):
    return [1.0]


def other(answer, question):
    return 1.0


def _hidden(prompt, answer):
    return 1.0
"""


@pytest.fixture
def users(tmp_path, monkeypatch):
    """A working directory with functions of the user's, which other tests do not import."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "users_own.py").write_text(USERS)
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "deep_own.py").write_text("def score(prompt, answer):\n    return 1.0\n")
    (tmp_path / "fails_own.py").write_text("\n\nx = 1 / 0\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    yield tmp_path
    for name in ("users_own", "inner", "inner.deep_own"):
        sys.modules.pop(name, None)


def said(word):
    with pytest.raises(UserError) as e:
        load_reward("reward", word)(["p", "q"], ["a", "b"], [{}, {}])
    return str(e.value)


@pytest.mark.parametrize("word, says", [
    ("users_own:short", "no attribute 'gone') at line 9 of users_own.py; it must be"),
    ("users_own:total", "no attribute 'gone') at line 9 of users_own.py; its first parameter"),
    ("users_own:wrapped", "at line 30 of users_own.py; it must be"),
    ("fails_own:x", "(ZeroDivisionError: division by zero) at line 3 of fails_own.py; write module:function"),
    ("users_own:column", "returned a Tensor of shape (2, 1) for 2 answers, the first with the prompt 'p' and the answer 'a'; "
     "its shape must be (2,), one number for each answer"),
    ("users_own:number", "returned a Tensor of shape () for 2 answers"),
    ("users_own:shrt", "; write users_own:short; it must"), ("users_own.py:short", "; write users_own:short"),
    ("users_own.py:shrt", "; write users_own:short"), ("inner/deep_own.py:score", "; write inner.deep_own:score"),
    ("inner.deep_own:scor", "; write inner.deep_own:score"), ("users_own:zzzz", "; write module:function; it must"),
    ("users_own:swapped", "--reward users_own:swapped calls its parameters answer, prompt, and gets the prompt first"),
    ("users_own:swapped_lists", "write them as (prompts, answers)")])
def test_the_sentence_on_a_users_own_function(word, says, users):
    assert says in said(word) and "\n" not in said(word)


def test_a_nested_list_is_not_told_to_rename_its_parameter(users):
    assert "returned [1.0] (list)" in said("users_own:nested") and "a function of lists" not in said("users_own:nested")


def test_only_swapped_names_are_refused(users):
    assert load_reward("reward", "users_own:other")(["p"], ["a"], [{}]) == [1.0]


@pytest.mark.parametrize("word, says", [
    ("users_own", "in users_own.py there is users_own:short, users_own:inner, users_own:column, "),
    ("users_own.py", "in users_own.py there is users_own:short, "),
    ("inner/deep_own", "in inner/deep_own.py there is inner.deep_own:score\n"),
    ("fails_own", "fails_own.py is there and has no public function\n"), ("absent", "or module:function\n")])
def test_a_reward_without_its_function_is_answered_with_those_there_are(word, says, users, land, capsys):
    run(land, users / "r", *SAMPLE, "--data", land / "verifiable", "--reward", word, code=65)
    err = capsys.readouterr().err
    assert f"--reward {word} is no folder; --reward takes a run of --task reward, or module:function" in err
    assert says in err and "_hidden" not in err


def test_the_words_of_a_list(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "rm-targetsq,v-s1").mkdir(parents=True)
    for text, words in (
            ("a:f", ["a:f"]), ("a:f,b.c:g", ["a:f", "b.c:g"]), ("a:f, out/rm", ["a:f", "out/rm"]),
            ("a:f(x{1,2},(y,z)),b:g", ["a:f(x{1,2},(y,z))", "b:g"]), (r"a:f(\(,[(,]),b:g", [r"a:f(\(,[(,])", "b:g"]),
            ("out/rm-targetsq,v-s1", ["out/rm-targetsq,v-s1"]), ("out/rm-targetsq,v-s2", ["out/rm-targetsq", "v-s2"]),
            ("a:f,out/rm-targetsq,v-s1,b:g", ["a:f", "out/rm-targetsq,v-s1", "b:g"])):
        assert split_words("reward", text) == words, text
    for text, says in (("a:f,", "nothing before or behind a comma"), (",", "comma"), ("a:f(b,c:g", "not closed")):
        with pytest.raises(UserError, match=says):
            split_words("reward", text)
    assert [is_function(word) for word in ("a:f", "a:f(b)", "out/rm", "out(a:b)")] == [True, True, False, False]
    assert target("a.b:f(c:d(e))") == "a.b:f" and target("out/(a)") == "out/(a)"


# --------------------------------------------------------------------------------------------------- shipped rewards

HALF = fractions.Fraction(2469, 2)


@pytest.mark.parametrize("text, value", [
    ("1,234.50", HALF), ("It costs $1,234.5.", HALF), ("2469/2", HALF), ("1234 1/2", HALF), (r"\frac{2469}{2}", HALF),
    (r"1234\frac{1}{2}", HALF), (r"\dfrac {2469} { 2 }", HALF), ("1.2345e3", HALF), ("1234.5 %", HALF), ("1234.5\\%", HALF),
    ("a 1 b 72", 72), ("72.", 72), ("72.0", 72), ("072", 72), (r"\boxed{72}", 72), ("#### 72", 72), ("#### 72 or 73", 72),
    ("1 #### 2 #### 3", 2), ("5 ####", None), ("none", None), ("", None), ("5-3", 3), ("10 - 3", 3), ("(4)-3", 3), ("= -3", -3),
    ("\u22123", -3), ("-$5", -5), ("$-5", -5), ("\u20ac5", 5), ("-.5", fractions.Fraction(-1, 2)), (r"-\frac{1}{2}", -HALF / HALF / 2),
    ("3/0", 0), ("1/2.", fractions.Fraction(1, 2)), ("1/2.5", HALF / HALF * 5 / 2), ("1, 2, 3", 3), ("12,34", 34), ("1,2345", 2345),
    ("1e999", 999), ("9" * 101, None), ("1/" + "9" * 101, None), ("9" * 5000, None), ("\u0663", None)])
def test_the_number_of_a_text(text, value):
    assert rewards.number(text) == value


def test_last_number_compares_with_the_rows():
    for answer, gold, score in (("so 72", "a chain #### 72", 1.0), ("72 or 73", "#### 72", 0.0), ("0.1", "1/10", 1.0),
                                ("0.3", 0.30000000000000004, 0.0), ("no idea", 5, 0.0), ("five: 5.0", 5, 1.0)):
        assert rewards.last_number("how many?", answer, {"answer": gold}) == score, (answer, gold)
    for row, says in (({"answer": "none"}, "'none' has no number"), ({"id": 3}, 'no "answer", .* the keys id'),
                      ({"answer": None}, 'no "answer"'), ({"answer": True}, 'no "answer"'), ({"answer": ["5"]}, 'no "answer"')):
        with pytest.raises(ValueError, match=says):
            rewards.last_number("how many?", "5", row)


def test_exact_match_ignores_white_space_and_takes_any_reference():
    assert rewards.exact_match("p", " New\n York ", {"answer": "New York"}) == 1.0
    assert rewards.exact_match("p", "new york", {"answer": "New York"}) == 0.0
    assert rewards.exact_match("p", "5", {"answer": 5}) == 1.0
    assert rewards.exact_match("p", "b", {"answer": "a", "references": ["a", "b"]}) == 1.0
    with pytest.raises(ValueError, match='no "answer"'):
        rewards.exact_match("p", "a", {})


def test_a_pattern_fits_all_of_an_answer(functions):
    score = load_reward("reward", r"data.results.rewards:matches(<a>.{1,9}</a>)")
    texts = ["<a>two\nlines</a>", "<a></a>", "x<a>b</a>", "<a>b</a>"]
    assert score([""] * 4, texts, [{}] * 4) == [1.0, 0.0, 0.0, 1.0]
    with pytest.raises(UserError, match=r"cannot be made \(\w*(PatternError|error): "):
        load_reward("reward", "data.results.rewards:matches(*)")


# ----------------------------------------------------------------------------------- rows that reach the reward whole

def write_rows(folder, rows):
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("row, expected, more", [
    ({"prompt": "2+2?", "answer": "4", "level": 3}, {"answer": "4", "level": 3}, "prompt (also: answer, level)"),
    ({"prompt": "2+2?"}, {"prompt": "2+2?"}, "prompt"),
    ({"question": "2+2?", "answer": "2 and 2 #### 4"}, {"answer": "2 and 2 #### 4"}, "question/answer"),
    ({"prompt": "2+2?", "completion": "4"}, {"answer": "4", "completion": "4"}, "prompt/completion"),
    ({"prompt": "2+2?", "references": ["4", "four"]}, {"answer": "4", "references": ["4", "four"]}, "prompt/completion"),
    ({"instruction": "2+2?", "output": "so 4", "answer": 4}, {"answer": 4}, "Alpaca (also: answer)"),
    ({"messages": [tiny_turn("user", "2+2?"), tiny_turn("assistant", "4")], "id": 1}, {"answer": "4", "id": 1},
     "messages (also: id)")])
def test_a_row_keeps_its_answer_and_all_other_keys(row, expected, more, tmp_path):
    path = write_rows(tmp_path, [row] * 2)
    plain, kept = formats.load(path), formats.load(path, keep=True)
    record = kept.rows[0].pop("record")
    assert expected.items() <= record.items() and row.items() <= {**record, **row}.items() and "line" not in record
    assert kept.rows[0] == plain.rows[0] and kept.format == more           # a task without a reward sees no difference
    assert plain.format == more.replace("also", "not read")


def test_what_is_kept_moves_no_row_to_another_split(tmp_path):
    """Rows with one prompt are split by their content, which every task reads alike; other keys do not count."""
    same = write_rows(tmp_path, [{"prompt": "again", "completion": str(n), "id": n} for n in range(60)])
    plain, kept = formats.load_splits(same), formats.load_splits(same, keep=True)
    for split in plain:
        assert [row["line"] for row in plain[split].rows] == [row["line"] for row in kept[split].rows]
    assert len(plain["train"].rows) < 60
    assert formats.duplicates(formats.load(same).rows) == 0


def test_a_clean_copy_keeps_the_answers(land, tmp_path, capsys):
    rows = [{"prompt": f"{n}+1?", "answer": str(n + 1)} for n in range(40)] + [{"prompt": "0+1?", "answer": "1"}]
    path = write_rows(tmp_path, rows)
    assert train.main(["--task", "check", "--data", path, "--init", str(land / "base"), "--write"]) == 0
    assert "prompt (also: answer); prompt rows, for --task ppo" in capsys.readouterr().out
    copies = [dict(sorted(json.loads(line).items())) for file in (tmp_path / "data-clean").iterdir() for line in file.open()]
    assert sorted(copies, key=json.dumps) == sorted(rows[:40], key=lambda row: json.dumps(row, sort_keys=True))


@pytest.mark.parametrize("task", [PPO, SAMPLE], ids=["ppo", "sample"])
def test_a_function_gets_the_prompt_and_the_row_of_each_answer(task, land, tmp_path, functions):
    """Long prompts with one tail, equal prompts with two answers, several turns: all of that very row."""
    for data, reward in (("long", "reward"), ("long", "gold_reward"), ("talk", "reward"), ("gsm8k", "reward")):
        functions.seen.clear()
        words = {"reward": "own_rewards:size", reward: "own_rewards:spy"}
        run(land, tmp_path / f"{data}-{reward}", *task, "--data", land / data,
            *[word for name, value in words.items() for word in (f"--{name}", value)])
        assert len(functions.seen) >= 10
        rows = [json.loads(line) for line in (land / data / "train.jsonl").open()]
        for prompt, row in functions.seen:
            if data == "long":
                assert row in rows and prompt == row["prompt"]
            elif data == "gsm8k":
                assert row in rows and prompt == row["question"]
            else:
                question = row["messages"][-2]["content"]
                assert {key: row[key] for key in ("messages", "id")} in rows and row["answer"] == row["messages"][-1]["content"]
                assert prompt == f"system: Be brief.\nuser: Hi\nassistant: Yes?\nuser: {question}"
        if data == "long":
            assert {prompt[:5] for prompt, _ in functions.seen} == {"Once.", "Twice"}
            assert len({row["answer"] for _, row in functions.seen}) > 2


def test_the_best_answers_keep_the_whole_conversation(land, tmp_path, monkeypatch):
    end, rollout = chat.end_token("chatml", Tokenizer.from_pretrained(land / "base")), ppo.rollout

    def ending(*args):
        batch, answers = rollout(*args)
        return batch, [[97, end] for _ in answers]
    monkeypatch.setattr(ppo, "rollout", ending)
    run(land, tmp_path / "s", *SAMPLE, "--data", land / "talk", "--reward", "own_rewards:size")
    rows = [json.loads(line) for line in (tmp_path / "s" / "train.jsonl").open()]
    original = [json.loads(line) for line in (land / "talk" / "train.jsonl").open()]
    assert [row["prompt"] for row in rows] == [row["messages"][:-1] for row in original[:3]]
    assert {row["completion"] for row in rows} == {"a"} and formats.load(str(tmp_path / "s"), "train").row_type == "chat"


# ------------------------------------------------------------------------------------------------------ several rewards

def test_a_weighted_sum_in_ppo_and_its_parts():
    combined = ppo.combine_rewards({"f": (0.5, lambda p, a, rows: [1.0, 2.0, 4.0]),
                                    "g": (-2.0, lambda p, a, rows: torch.tensor([1, 0, 1]))})
    found = combined([[1]] * 3, [[2]] * 3, None)
    assert ppo.checked_scores(found, 3, "cpu").tolist() == [-1.5, 1.0, 0.0]
    assert ppo.part_means(found) == {"reward_f": pytest.approx(7 / 3), "reward_g": pytest.approx(2 / 3)}
    assert ppo.part_means(torch.zeros(3)) == {}
    with pytest.raises(UserError, match="finite number for each of 2 answers"):
        combined([[1]] * 2, [[2]] * 2, None)


def test_several_rewards_are_logged_apart(land, tmp_path):
    r = run(land, tmp_path / "r", *PPO, "--steps", "2", "--data", land / "verifiable", "--reward",
            "own_rewards:size,own_rewards:least,own_rewards:lists", "--reward_weights", "2,0.5,0", "--missing_eos_penalty", "none")
    for found in (*events(tmp_path / "r"), r["metrics"], r["baseline_metrics"]):
        assert found["reward_least"] == -1.0 and found["reward_lists"] > 3
        assert found["score"] == pytest.approx(2 * found["reward_size"] - 0.5, abs=1e-5)
    r = run(land, tmp_path / "s", *SAMPLE, "--data", land / "verifiable", "--reward", "own_rewards:make(a,b),own_rewards:make(c)")
    assert r["metrics"]["score"] == 4.0 and (r["metrics"]["reward_make"], r["metrics"]["reward_make_2"]) == (3.0, 1.0)


@pytest.mark.parametrize("words, says", [
    (["--reward", "own_rewards:size,own_rewards:least", "--reward_weights", "1"],
     "--reward_weights 1 has 1 numbers, and --reward own_rewards:size,own_rewards:least names 2 rewards"),
    (["--reward", "own_rewards:size", "--reward_weights", "1,x"], "--reward_weights 1,x cannot be read"),
    (["--reward", "own_rewards:size", "--reward_weights", "nan"], "--reward_weights nan cannot be read"),
    (["--reward", "own_rewards:size", "--reward_weights", "0"], "gives every answer the score 0"),
    (["--reward_weights", "1"], "has 1 numbers, and --reward (none) names 0 rewards"),
    (["--reward", "own_rewards:size,"], "--reward own_rewards:size, has nothing before or behind a comma"),
    (["--reward", "own_rewards:make(a"], "--reward own_rewards:make(a has a parenthesis that is not closed"),
    (["--reward", "own_rewards:size", "--gold_reward", "own_rewards:size,own_rewards:least"], "it takes one")])
def test_a_wrong_list_is_one_sentence(words, says, land, tmp_path, capsys):
    run(land, tmp_path / "r", *PPO, "--data", land / "verifiable", *words, code=2)
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("task", [PPO, SAMPLE], ids=["ppo", "sample"])
@pytest.mark.parametrize("words, says", [
    (["--reward", "own_rewards:nan"], "--reward own_rewards:nan returned nan (float) for the prompt '"),
    (["--reward", "own_rewards:size,own_rewards:none"], "--reward own_rewards:none returned None (NoneType) for the prompt '"),
    (["--reward", "own_rewards:size", "--gold_reward", "own_rewards:nan"], "--gold_reward own_rewards:nan returned nan"),
    (["--reward", "own_rewards:size", "--gold_reward", "own_rewards:short"], "--gold_reward own_rewards:short returned [1.0]"),
    (["--reward", "data.results.rewards:exact_match"], "exact_match failed for the prompt '")])
def test_a_broken_reward_stops_the_run_with_one_sentence(task, words, says, land, tmp_path, capsys):
    run(land, tmp_path / "r", *task, "--data", land / "prompts_only", *words, code=2)
    err = capsys.readouterr().err
    assert says in err and "Traceback" not in err
    assert not (tmp_path / "r" / "result.json").exists() and not (tmp_path / "r" / "train.jsonl").exists()


# --------------------------------------------------------------------------------- a reward model with tokens of its own

@pytest.fixture(scope="module")
def judge(land):
    """The folder of a reward model that was trained on the template plain; --init base guesses chatml."""
    run(land, land / "rm", "--task", "reward", "--data", land / "pairs", "--steps", "2", "--batch", "8", "--max_new_tokens",
        "4", "--template", "plain", "--system", "Judge.")
    return land / "rm"


def opened(land, judge, words=()):
    """(setup of a rollout, the rows of test) of --task sample with this reward model."""
    cfg = train.parse(["--task", "sample", "--init", str(land / "base"), "--data", str(land / "talk"), "--reward", str(judge),
                       "--max_new_tokens", "8", *words])
    rows = train.open_data(cfg).rows
    ctx = train.open_context(cfg)
    return train.set_up_rollouts(cfg, ctx, rows, ctx.model, ppo.SamplingConfig(max_new_tokens=8)), rows["test"]


def test_a_reward_model_of_another_template_reads_its_own_tokens(land, judge, capsys):
    """Its scores are those of conversations rendered as in its training, cut answers without an end token."""
    setup, rows = opened(land, judge)
    assert f"--reward {judge} was trained on other tokens" in capsys.readouterr().err and setup.reward_folder is None
    text = setup.ctx.text
    answers = [[97, 98, text.end_token], [97, 98]]
    found = setup.reward(setup.prompts["test"][:2], answers, rows[:2])
    own = Text(text.tokenizer, "plain", "Judge.")
    mine = [own.prompt_ids(row) for row in rows[:2]]
    theirs = chat.answer("ab", "plain", text.tokenizer)
    alone, alike = opened(land, judge, ["--template", "plain", "--system", "Judge."])
    assert "other tokens" not in capsys.readouterr().err and alone.reward_folder == judge / "adapter"
    assert alone.prompts["test"][:2] == mine and setup.prompts["test"][:2] != mine
    expected = alone.reward(mine, [theirs, theirs[:-1]], alike[:2])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    foreign = alone.reward(setup.prompts["test"][:2], answers, rows[:2])        # what it gave before: other tokens
    assert (foreign - expected).abs().min() > 1e-4


def test_a_reward_model_of_another_tokenizer_reads_the_same_text(land):
    mine = Text(Tokenizer.from_pretrained(land / "base"), "chatml")
    other = Tokenizer.train(["What is 2+2? It is 4. " * 9], 300, tiny.SPECIAL)
    own = Text(other, "chatml")
    rows = {"test": [{"prompt": [tiny_turn("user", "What is 2+2?")]}]}
    same = Text(Tokenizer.from_pretrained(land / "base"), "chatml")
    assert reward_models.same_tokens(mine, same, rows) and not reward_models.same_tokens(mine, own, rows)
    assert reward_models.same_tokens(mine, same, {}) and not reward_models.same_tokens(mine, own, {})
    for settings in (("plain", None), ("chatml", "Be kind.")):
        assert not reward_models.same_tokens(mine, Text(mine.tokenizer, *settings), rows)
    read = []
    answer = chat.answer("It is 4.", "chatml", mine.tokenizer)
    score = reward_models.in_own_tokens(lambda prompts, answers, rows: read.append((prompts, answers)), mine, own, 100)
    score([mine.prompt_ids(rows["test"][0])] * 2, [answer, answer[:-1]], rows["test"] * 2)
    (prompts, answers), = read
    assert len(prompts[0]) < len(mine.prompt_ids(rows["test"][0])) and prompts == [own.prompt_ids(rows["test"][0])] * 2
    assert [other.decode(y, special=True) for y in answers] == ["It is 4.<|im_end|>", "It is 4."]


def test_a_long_prompt_is_cut_to_the_context_of_the_reward_model():
    read = []
    score = reward_models.within(lambda prompts, answers, rows: read.extend(zip(prompts, answers)), 8)
    score([[1, 2, 3, 4, 5, 6, 7], [1, 2], [1, 2, 3, 4, 5, 6]], [[9, 9], [9] * 7, [9] * 6], None)
    assert read == [([1, 3, 4, 5, 6, 7], [9, 9]), ([1, 2], [9] * 6), ([1, 4, 5, 6], [9] * 4)]


def test_a_reward_model_that_overflows_is_named(land, judge):
    setup, rows = opened(land, judge, ["--template", "plain", "--system", "Judge."])
    with torch.no_grad():
        setup.head.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="--reward .*rm gave nan for the prompt 'system: Be brief.*' and the answer 'a'; a score must"):
        setup.reward(setup.prompts["test"][:1], [[97]], rows[:1])


def test_a_function_beside_two_reward_models(land, judge, tmp_path):
    """Two adapters of one base; the critic, which could begin as one of them, begins at zero."""
    r = run(land, tmp_path / "r", *PPO, "--template", "plain", "--system", "Judge.", "--data", land / "verifiable", "--reward",
            f"{judge},own_rewards:size,{judge}", "--reward_weights", "1,1,-1", "--missing_eos_penalty", "none")
    assert r["metrics"]["reward_rm"] == r["metrics"]["reward_rm_2"] != 0
    assert r["metrics"]["score"] == pytest.approx(r["metrics"]["reward_size"], abs=1e-5)
    words = ["--template", "plain", "--system", "Judge."]
    for reward, begins in ((judge, True), (f"{judge},own_rewards:size", False)):
        setup, _ = opened(land, reward, words)
        assert (setup.head is not None) == (setup.reward_folder is not None) == begins
    setup, _ = opened(land, judge, [*words, "--reward_weights", "2"])
    assert setup.head is None


def test_the_system_message_of_a_run_is_not_part_of_a_prompt(land, tmp_path, functions):
    functions.seen.clear()
    run(land, tmp_path / "s", *SAMPLE, "--system", "Add.", "--data", land / "verifiable", "--reward", "own_rewards:spy")
    assert {prompt for prompt, _ in functions.seen} == {row["prompt"] for _, row in functions.seen}


def test_a_run_with_several_rewards_is_resumed_exactly(land, tmp_path, monkeypatch):
    words = [*PPO, "--steps", "3", "--data", land / "verifiable", "--missing_eos_penalty", "none", "--reward",
             "own_rewards:size,data.results.rewards:last_number", "--reward_weights", "0.5,1"]
    run(land, tmp_path / "whole", *words)
    original, calls = ppo.checked_scores, []

    def cut(*args):
        calls.append(1)
        if len(calls) == 8:                     # three a rollout, of the parts and the sum; the first is the baseline
            raise tiny.Stop
        return original(*args)
    with monkeypatch.context() as patch, pytest.raises(tiny.Stop):
        patch.setattr(ppo, "checked_scores", cut)
        run(land, tmp_path / "cut", *words)
    assert len(events(tmp_path / "cut")) == 1 and not (tmp_path / "cut" / "result.json").exists()
    run(land, tmp_path / "cut", *words)
    for key in ("score", "reward_size", "reward_last_number", "kl"):
        assert [e[key] for e in events(tmp_path / "whole")] == [e[key] for e in events(tmp_path / "cut")]
    one, two = (read_tensors(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "cut"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


# ------------------------------------------------------------------------------------------------ what identifies a run

@pytest.fixture
def two_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    (tmp_path / "first_reward.py").write_text("def f(prompt, answer):\n    return 1.0\n")
    (tmp_path / "second_reward.py").write_text("def make(text):\n    return lambda prompt, answer: 1.0\n")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("1")
    return tmp_path


def identity(words, data="toy/prompts"):
    cfg = train.parse(["--task", "ppo", "--data", data, *words])
    return train.identity_of(cfg.replace(init="new", forgetting_data="none"), train.TaskData({}, "prompt"))


def test_every_function_and_folder_of_a_list_identifies_a_run(two_files):
    words = ["--reward", "first_reward:f,second_reward:make(a:b),model"]
    before = identity(words)
    assert {"first_reward.py: f", "second_reward.py: make"} <= before["reward"].keys()
    (two_files / "second_reward.py").write_text("def make(text):\n    return lambda prompt, answer: 2.0\n")
    after = identity(words)
    assert compare_identity(before, after) == (["second_reward.py: make"], [])
    (two_files / "model" / "config.json").write_text("2")                           # no --keep accepts another model
    assert compare_identity(after, identity(words)) == ([], ["--reward model"])
    alone = identity(["--reward", "model"])["reward"]
    (two_files / "model" / "config.json").write_text("3")
    assert isinstance(alone, str) and alone != identity(["--reward", "model"])["reward"]
    assert isinstance(identity(["--reward", "model,model"])["reward"], str)


def test_the_gold_reward_of_a_toy_data_set_identifies_a_run(two_files):
    words = ["--reward", "first_reward:f"]
    assert "data/toy/tasks.py: gold" in identity(words)["gold_reward"]
    assert "gold_reward" not in identity(words, "toy/letters")
    assert "gold_reward" not in train.identity_of(train.parse(["--task", "predict", "--data", "toy/prompts"]), train.TaskData({}, "prompt"))


def test_an_edited_reward_of_a_list_starts_the_run_anew(land, two_files, capsys):
    words = ["--data", land / "verifiable", "--reward", "first_reward:f,second_reward:make(a)"]
    assert run(land, two_files / "s", *SAMPLE, *words)["metrics"]["score"] == 2.0
    (two_files / "second_reward.py").write_text("def make(text):\n    return lambda prompt, answer: 2.0\n")
    sys.modules.pop("second_reward")
    capsys.readouterr()
    assert run(land, two_files / "s", *SAMPLE, *words)["metrics"]["score"] == 3.0
    assert "second_reward.py: make changed" in capsys.readouterr().err


def test_the_right_answers_identify_a_run(land, tmp_path):
    rows = [json.loads(line) for line in (land / "verifiable" / "train.jsonl").open()]
    words = [*SAMPLE, "--reward", "data.results.rewards:last_number", "--data"]
    for name, change in (("a", 0), ("b", 1)):
        tiny.write(tmp_path, {"rows": [{**row, "answer": str(int(row["answer"]) + change)} for row in rows]}, every=1)
        run(land, tmp_path / name, *words, tmp_path / "rows")
    a, b = (read_json(tmp_path / name / "config.json") for name in "ab")
    assert a["data_sha256"] != b["data_sha256"] and a["test_sha256"] == b["test_sha256"]
