"""--shots: whole examples, the oldest are dropped first, a ladder that ends where the context does."""
import json

import pytest
import torch

import train
from data.text import chat
from data.results import evaluate
from data.batches import few_shot
from data.results import shot_ladder
from data.batches.examples import Text
from data.runtime.files import UserError, read_json
from data.text.tokenizer import Tokenizer
from model import GPT, GPTConfig

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TOKENIZER = Tokenizer.train(["a b"], 256 + len(SPECIAL), SPECIAL)


def ctx(block, labels=(), max_new_tokens=8):
    model = GPT(GPTConfig(TOKENIZER.vocab_size, block, 1, 2, 16, eos=TOKENIZER.eos)).eval()
    return evaluate.ModelContext(model, Text(TOKENIZER, "plain", labels=labels), torch.device("cpu"), torch.float32,
                        max_new_tokens=max_new_tokens)


def row(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def test_lists():
    assert few_shot.parse_shots("0") == [0] and few_shot.parse_shots("3") == [3]
    assert few_shot.parse_shots("0,1,4") == [0, 1, 4]
    for wrong in ("", "a", "1,", "2,1", "1,1", "-1"):
        with pytest.raises(UserError, match="--shots"):
            few_shot.parse_shots(wrong)
    few_shot.parse_shots("0", "text", "head")
    for row_type, classifier in (("text", "lm"), ("chat", "head")):
        with pytest.raises(UserError, match="in front of a question"):
            few_shot.parse_shots("0,1", row_type, classifier)


def test_whole_examples_are_dropped_oldest_first_and_the_answer_keeps_its_room():
    before = [row(c * 9, "x") for c in "abcd"]             # start, then 9 + " x" + end each: 12 tokens, plain
    asked = row("q" * 5, "y")
    for block, held in ((1 + 48 + 5 + 8, 4), (1 + 48 + 5 + 7, 3), (1 + 12 + 5 + 8, 1), (1 + 5 + 8, 0)):
        ids, n = few_shot.fit_shots(ctx(block), asked, before)
        assert n == held and TOKENIZER.decode(ids).startswith("dcba"[n - 1] * 9 if n else "q")
        assert len(ids) == 1 + 12 * n + 5 and len(ids) + 8 <= block
    cut = few_shot.fit_shots(ctx(6), row("abcdefghij", "y"), ())[0]           # behind the first id
    assert cut[1:] == TOKENIZER.encode("ij") and cut[0] not in TOKENIZER.encode("a")    # " y" and its end have room
    assert len(few_shot.fit_shots(ctx(16), row("q" * 30, "y" * 30), ())[0]) == 16 - 8           # half, as in training
    assert len(few_shot.fit_shots(ctx(32), row("q" * 20, "yy"), ())[0]) == 1 + 20               # it fits, so it is whole


def test_a_label_word_keeps_its_room_too():
    k = ctx(200, labels=("no", "certainly"))
    some = [{"text": c * 20, "label": "no"} for c in "abcdefgh"]
    ids, n = few_shot.fit_shots(k, some[0], some[1:])
    assert 0 < n < 7 and len(ids) + len(chat.answer("certainly", "plain", TOKENIZER)) <= 200
    assert evaluate.word_scores(k, [ids]).isfinite().all()
    ids, n = few_shot.fit_shots(k, {"text": "q" * 300, "label": "no"}, ())        # without examples as well
    assert len(ids) + len(chat.answer("certainly", "plain", TOKENIZER)) == 200 and n == 0


def test_a_ladder_is_its_single_rungs_and_ends_where_the_context_does(tmp_path, capsys):
    k = ctx(60)
    k.model.save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    (tmp_path / "d").mkdir()
    rows = [{"prompt": f"{a}{b}", "completion": a} for a in "abcdef" for b in "abcdef"]
    for split in ("train", "valid", "test"):
        part = rows if split == "train" else rows[::7]
        (tmp_path / "d" / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in part))

    def run(name, *flags):
        args = ["--init", tmp_path / "base", "--data", tmp_path / "d", "--out", tmp_path / name, "--method",
                "none", "--max_new_tokens", "6", "--template", "plain", *flags]
        assert train.main(list(map(str, args))) == 0
        return read_json(tmp_path / name / "result.json")["metrics"]

    many = run("many", "--shots", "0,1,2,8,16,32")
    printed = capsys.readouterr()
    table = [line.split() for line in printed.out.splitlines() if line.strip()[:1].isdigit()]
    assert [line[0] for line in table] == ["0", "1", "2", "8", "16"]        # 5 tokens each: 8 fit, 16 do not
    assert "no question has more than" in printed.err
    for n in (1, 2, 8):
        alone = run(f"k{n}", "--shots", str(n))
        assert many[f"exact_match_{n}_shots"] == alone["exact_match"] and alone["shots_used"] == alone["shots_used_max"] == n
    assert "exact_match_32_shots" not in many
    ladder = {n: many[f"exact_match_{n}_shots"] for n in (0, 1, 2, 8, 16)}
    assert many["shots"] == min(ladder, key=lambda n: (-ladder[n], n))              # the best, not the last
    assert many["exact_match"] == ladder[many["shots"]]
    if many["shots"] < 16:
        assert many.get("shots_used", 0) == many["shots"]
    assert train.main(["--method", "none", "--shots", "2,1"]) == 2


def rung(shots, accuracy, labels_used=2, **more):
    return shot_ladder.Rung(shots, {"accuracy": accuracy, "labels_used": labels_used, **more}, [str(shots)], f"{shots}")


def test_the_best_rung_is_the_result_with_its_answers_and_items():
    rungs = [rung(0, 0.5), rung(1, 0.75, shots_used=1.0), rung(4, 0.75, shots_used=1.6), rung(8, 0.6, shots_used=1.6)]
    best = shot_ladder.best_rung(rungs)
    assert best.answers == ["1"] and best.item_correct == "1"
    assert best.metrics == {"accuracy": 0.75, "labels_used": 2, "shots_used": 1.0, "shots": 1,
                            "accuracy_0_shots": 0.5, "accuracy_1_shots": 0.75, "accuracy_4_shots": 0.75,
                            "accuracy_8_shots": 0.6}


def test_a_ladder_of_entities_is_about_f1_and_one_of_losses_is_best_low(capsys):
    tags = [shot_ladder.Rung(n, {"exact_match": e, "loss": 1.0, "f1": f}, [], "") for n, e, f in ((0, 0.9, 0.1), (1, 0.2, 0.6))]
    assert shot_ladder.best_rung(tags, "exact_match").shots == 1
    shot_ladder.print_ladder(tags, "exact_match")
    assert "best f1" in capsys.readouterr().out
    losses = [shot_ladder.Rung(n, {"targets": 9, "loss": x}, [], "") for n, x in ((0, 2.0), (1, 1.0), (2, 3.0))]
    assert shot_ladder.best_rung(losses).shots == 1


def test_a_printed_ladder_says_what_was_held_and_where_all_answers_are_one_label(capsys):
    shot_ladder.print_ladder([rung(0, 0.5, 1), rung(1, 0.75, shots_used=1.0), rung(4, 0.6, 1, shots_used=1.6)])
    out = capsys.readouterr().out
    assert [line.split()[:2] for line in out.splitlines()[1:4]] == [["0", "0.5"], ["1", "0.75"], ["4", "0.6"]]
    assert [line.endswith("best accuracy") for line in out.splitlines()[1:4]] == [False, True, False]
    assert "where it is below shots, the context held no more" in out
    assert "With 0, 4 shots every answer is the same label" in out
    shot_ladder.print_ladder([rung(0, 0.5), rung(1, 0.75, shots_used=1.0)])
    out = capsys.readouterr().out
    assert "held" not in out and "same label" not in out
