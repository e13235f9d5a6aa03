"""The toy world: reproducible, split by content, consistent, with a gold reward that orders answers."""
import hashlib
import itertools
import json
import pathlib
import math
import random
import re
import subprocess
import sys

import pytest

from data import toy
from data.results.untrained import coinciding_ids
from data.text import chat, formats
from data.text.tokenizer import Tokenizer
from data.toy import symbols, tasks
from data.toy.world import World
import train
from model import GPT

BASE = pathlib.Path(__file__).resolve().parent.parent / "data" / "base"

ROW_TYPES = {"toy": "chat", "toy/sentiment": "label", "toy/spam": "label", "toy/entities": "tags",
         "toy/questions": "chat", "toy/chat": "chat", "toy/letters": "chat", "toy/preferences": "ranked",
         "toy/prompts": "prompt", "toy/sums": "prompt", "toy/sums_chat": "chat", "toy/corpus": "text"}

GOLDEN = {"toy": "78a0042d3fb1", "toy/questions": "3cee0b000048", "toy/corpus": "55c563c12df6"}


@pytest.fixture(scope="module")
def rows():
    return {(name, split): toy.rows(name, split) for name in toy.NAMES for split in toy.SPLITS}


def digest(some):
    return hashlib.sha256(json.dumps(some).encode()).hexdigest()[:12]


def test_the_world_is_the_one_of_the_base_model(rows):
    """Another random draw anywhere gives another world; data/base must then be trained again."""
    assert {name: digest(rows[name, "test"]) for name in ("toy", "toy/questions", "toy/corpus")} == GOLDEN
    assert digest(toy.rows("toy", "test", seed=1)) != GOLDEN["toy"]


def test_order_does_not_depend_on_hashing(rows):
    code = "from data import toy; import json; print(json.dumps(toy.rows('toy', 'valid')))"
    root = toy.__file__.rsplit("data", 1)[0]
    for seed in "01":
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                             cwd=root, env={"PYTHONHASHSEED": seed, "PATH": ""}).stdout
        assert json.loads(out) == rows["toy", "valid"]


@pytest.mark.parametrize("name", toy.NAMES)
def test_sizes_row_types_and_no_row_twice(name, rows, monkeypatch):
    monkeypatch.setattr(toy, "rows", lambda name, split: rows[name, split])     # they take seconds to make
    for split in toy.SPLITS:
        some = rows[name, split]
        assert 50 < len(some) <= toy.SIZES.get(name, toy.SIZE)[toy.SPLITS.index(split)]
        assert len({json.dumps(row, sort_keys=True) for row in some}) == len(some)
        data = formats.load(name, split)
        dropped = data.dropped.get("with an empty text", [])    # a document of the corpus may be blanks only
        assert data.row_type == ROW_TYPES[name] and len(data.rows) + len(dropped) == len(some)
        assert len(dropped) <= (name == "toy/corpus")


@pytest.mark.parametrize("name", [n for n in toy.NAMES if n != "toy/corpus"])
def test_prompts_of_test_do_not_occur_in_train(name, rows):
    def asked(row):
        return json.dumps(row.get("prompt") or row.get("text") or row.get("tokens") or row["messages"][:3])
    train = {asked(row) for row in rows[name, "train"]}
    for split in ("valid", "test"):
        assert not train & {asked(row) for row in rows[name, split]}


def test_the_corpus_holds_no_held_out_question_or_message(rows):
    corpus = "\n".join(row["text"] for row in rows["toy/corpus", "train"])
    for name in ("toy/questions", "toy/spam"):
        for row in rows[name, "test"]:
            assert (row.get("prompt") or row["text"]) not in corpus
    assert all(f"{name}" in corpus for name in World().names)               # but everybody is mentioned


def test_answers_agree_with_the_world(rows):
    world = World()
    for row in rows["toy/questions", "test"]:
        who = next(name for name in world.names if name in row["prompt"])
        stated = row["completion"].lower().rstrip(".")
        assert any(stated.endswith(str(fact).lower()) for fact in world.people[who].values()), row


def test_tags_agree_with_the_words(rows):
    world = World()
    for row in rows["toy/entities", "train"][:300]:
        for word, tag in zip(row["tokens"], row["tags"], strict=True):
            assert (tag == "B-PER") == (word in world.people)
        for before, tag in zip(["O", *row["tags"]], row["tags"]):
            assert tag != "I-ORG" or before in ("B-ORG", "I-ORG")


def test_labels_are_balanced_and_rows_are_short(rows):
    for name, one in (("toy/sentiment", "good"), ("toy/spam", "spam")):
        share = sum(row["label"] == one for row in rows[name, "train"]) / len(rows[name, "train"])
        assert 0.4 < share < 0.6
    assert max(len(row["prompt"]) for row in rows["toy", "train"]) < 260


@pytest.mark.parametrize("template", list(symbols.TURN_FORMATS))
def test_turns_of_the_corpus_are_those_of_the_chat_templates(template):
    """The corpus writes what data/text/chat.py renders, special tokens by name."""
    special = ["<|endoftext|>", *itertools.chain(*(record.tokens for record in chat.TEMPLATES))]
    tokenizer = Tokenizer.train([], 256 + len(set(special)), list(dict.fromkeys(special)))
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Count to 3."},
                {"role": "assistant", "content": "1, 2, 3"}, {"role": "user", "content": "And 4?"},
                {"role": "assistant", "content": "4"}]
    opening, roles = symbols.TURN_FORMATS[template]
    if "system" not in roles:                       # alpaca's is its preamble
        messages = messages[1:]
    text = opening
    for message in messages:
        before, after = roles[message["role"]]
        text += before + message["content"] + after
    ids, _ = chat.render(messages, template, tokenizer, system=None if template == "alpaca" else "")
    start = [tokenizer.eos] if template == "alpaca" else []     # stands before every document of the corpus
    assert start + tokenizer.encode(text, special=True) == ids


def test_no_two_rows_of_the_base_coincide():
    """So a frozen head can say every token; 13 bytes occur in no UTF-8."""
    weight = GPT.from_pretrained(BASE).head.weight
    impossible = {0xC0, 0xC1, *range(0xF5, 0x100)}
    assert coinciding_ids(weight, set(range(len(weight))) - impossible) == []


def test_every_token_of_the_base_occurs_in_the_corpus(rows):
    tokenizer = Tokenizer.from_pretrained(BASE)
    seen = set()
    for row in rows["toy/corpus", "train"]:
        seen.update(tokenizer.encode(row["text"], special=True))
    assert set(range(tokenizer.vocab_size)) - seen == {0xC0, 0xC1, *range(0xF5, 0x100)}


def test_gold_by_hand():
    wish = "Tell Cora about the tea at the Quiet Corner."
    praise = "Cora, the tea at the Quiet Corner was lovely and the staff were kind to us."
    plain = "Cora, the tea at the Quiet Corner was there and the staff were there to us."
    scorn = "Cora, the tea at the Quiet Corner was cold and the staff were rude to us."
    assert toy.gold(wish, praise) > toy.gold(wish, plain) > toy.gold(wish, scorn)
    assert toy.gold(wish, praise.replace("lovely", "never lovely")) < toy.gold(wish, praise)
    assert toy.gold(wish, scorn.replace("cold", "not cold")) > toy.gold(wish, scorn)
    assert toy.gold(wish, praise.replace("tea at the Quiet Corner", "day")) < toy.gold(wish, praise)
    assert toy.gold(wish, praise + " " + praise) < toy.gold(wish, praise)
    assert toy.gold(wish, "Lovely.") < toy.gold(wish, praise)
    assert toy.gold(wish, praise + " It made my day.") > toy.gold(wish, praise + " It ruined my day.")
    assert toy.gold(wish, praise) == toy.gold(wish, praise.replace("kind", "there"))    # a mean, not a sum
    assert toy.gold(wish, praise) == pytest.approx(1.5 + 1.5) and toy.gold(wish, plain) == pytest.approx(1.5)
    mixed = praise.replace("kind", "rude")
    assert toy.gold(wish, mixed) == pytest.approx(1.5) and toy.gold(wish, scorn) == pytest.approx(0)


def test_gold_prefers_the_names_that_were_asked_for_and_none_to_others():
    wish = "Tell Cora about the tea at the Quiet Corner."
    praise = "Cora, the tea at the Quiet Corner was lovely and the staff were kind to us."
    person = [praise, praise.replace("Cora, ", "") + " We stayed.", praise.replace("Cora", "Hugo")]
    assert [toy.gold(wish, answer) for answer in person] == pytest.approx([3, 2.5, 2])
    assert toy.gold(wish, praise.replace("Cora", "Hugo, Cora")) == pytest.approx(2.5)       # 1 right, 1 wrong
    shop = [praise, praise.replace("Quiet Corner", "place"), praise.replace("Quiet Corner", "Salty Dog")]
    assert [toy.gold(wish, answer) for answer in shop] == pytest.approx([3, 2.5, 2])
    thing = [praise, praise.replace("tea", "cake"), praise.replace("tea", "steak")]         # "tea" as a word
    assert [toy.gold(wish, answer) for answer in thing] == pytest.approx([3, 2.5, 2.5])
    assert toy.gold("Anything else?", praise) == pytest.approx(1.5)


def test_the_rankings_hold_letters_with_other_names(rows):
    """A reward model can learn what the gold reward says about names: a quarter has them wrong."""
    answers = [(row["prompt"], answer) for row in rows["toy/preferences", "train"][:2000] for answer in row["responses"]]
    named = {prompt: re.fullmatch(tasks.WISH, prompt) for prompt, _ in answers}
    a_name = re.compile(rf"\b({'|'.join(World().names)})\b")
    people = [set(a_name.findall(answer)) for _, answer in answers]
    wrong = [name != named[prompt][1] for (prompt, _), found in zip(answers, people) for name in found]
    assert 0.2 < sum(wrong) / len(wrong) < 0.3 and len(wrong) > 0.6 * len(answers)


def test_comparisons_are_as_noisy_as_they_say(rows):
    """The gold reward agrees with P = sigmoid(difference / TAU) of the pairs on average; count both sides."""
    agree, expected, n = 0, 0.0, 0
    for row in rows["toy/preferences", "train"]:
        g = [toy.gold(row["prompt"], answer) for answer in row["responses"]]
        for i in range(4):
            for j in range(i):
                if abs(g[i] - g[j]) > 1e-9:
                    agree += (g[i] > g[j]) == (row["rank"][i] < row["rank"][j])
                    expected += 1 / (1 + math.exp(-abs(g[i] - g[j]) / toy.TAU))
                    n += 1
    assert n > 5000 and abs(agree - expected) / n < 0.02


def test_the_script_writes_files_that_load(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "NAMES", ("toy/prompts", "toy/spam"))
    monkeypatch.setattr(sys, "argv", ["toy.py", "--out", str(tmp_path)])
    tasks.main()
    assert formats.load(str(tmp_path / "toy" / "spam"), "test").row_type == "label"


def test_rows_that_draw_leave_the_global_generator_alone():
    state = random.getstate()
    toy.rows("toy/spam", "valid")
    assert random.getstate() == state


@pytest.mark.parametrize("method, template", [("lora", "chatml"), ("ia3", "plain")])
def test_answers_of_several_lines_are_learnt_with_a_frozen_head(method, template, tmp_path):
    """The base model has seen a new line and <|im_end|>, so methods that leave its embedding alone can give them."""
    animals = "cat dog goat duck horse snake".split()
    pairs = [(a, b) for a in animals for b in animals if a != b]
    random.Random(0).shuffle(pairs)
    for split, some in {"train": pairs[:22], "valid": pairs[22:], "test": pairs[22:]}.items():
        lines = [json.dumps({"prompt": f"List {a} and {b}.", "completion": f"- {a}\n- {b}"}) for a, b in some]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    assert train.main(["--method", method, "--template", template, "--data", str(tmp_path), "--steps", "120",
                       "--forgetting_data", "none", "--out", str(tmp_path / "run")]) == 0
    metrics = json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]
    assert metrics["exact_match"] >= 0.75
