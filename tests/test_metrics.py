"""data/results/metrics.py: hand numbers, naive loops, equality with the E2E scoring tool if it is there."""
import importlib.util
import json
import math
import random

import pytest

from data.results import metrics as M
from data.text.entities import parse_entities


# ---- labels ------------------------------------------------------------------------------------------------
def test_an_accent_is_one_character_or_two():
    """Files of macOS hold the second form; tokenizers that normalise return the first."""
    assert M.exact_match("caf\u00e9", ["cafe\u0301"]) and not M.exact_match("cafe", ["cafe\u0301"])
    tokens = ["In", "Cafe\u0301", "Luca"]
    assert parse_entities("LOC: Caf\u00e9", tokens) == {("LOC", 1, 1)}


def test_exact_match_normalises_white_space_only():
    assert M.exact_match("  a\tb\n", "a b")
    assert M.exact_match("yes", ["no", " yes "])
    assert not M.exact_match("Yes", "yes")
    assert not M.exact_match("yes.", "yes")
    assert not M.exact_match("ab", "a b")
    assert not M.exact_match("y", "yes")                        # one text is not a list of letters
    with pytest.raises(ValueError, match="at least one"):
        M.exact_match("yes", [])


def test_accuracy_and_confusion():
    p, g = ["a", "b", "b", "c"], ["a", "a", "b", "b"]
    assert M.accuracy(p, g) == 0.5
    assert M.confusion(p, g) == {("a", "a"): 1, ("a", "b"): 1, ("b", "b"): 1, ("b", "c"): 1}
    assert M.accuracy(["a"], ["a"]) == 1.0
    assert M.accuracy([], []) == M.macro_f1([], []) == M.span_f1([], []) == 0.0
    for score in (M.accuracy, M.confusion, M.macro_f1, M.span_f1, M.bleu, M.rouge_l):
        with pytest.raises(ValueError, match="2 predictions cannot be scored against 1"):
            score(["a", "b"], ["a"])


def test_macro_f1_by_hand():
    # a: tp 1 fp 0 fn 1 -> 2/3; b: tp 1 fp 1 fn 1 -> 1/2; the stray prediction c adds no class
    assert M.macro_f1(["a", "b", "b", "c"], ["a", "a", "b", "b"]) == pytest.approx((2 / 3 + 1 / 2) / 2)
    # the majority class: accuracy 0.9 hides what macro F1 shows
    assert M.macro_f1(["ham"] * 10, ["ham"] * 9 + ["spam"]) == pytest.approx((18 / 19 + 0) / 2)
    assert M.macro_f1([1, 0, 1], [1, 0, 1]) == 1.0


def test_span_f1_by_hand():
    gold = [["B-PER", "I-PER", "O", "B-LOC"]]
    assert M.span_f1(gold, gold) == 1.0
    assert M.span_f1([["B-PER", "O", "O", "B-LOC"]], gold) == 0.5           # a part of an entity is no entity
    assert M.span_f1([["B-PER", "I-PER", "O", "B-ORG"]], gold) == 0.5       # nor is the wrong kind
    assert M.span_f1([["I-PER", "I-PER", "O", "I-LOC"]], gold) == 1.0       # a bare I- opens
    assert M.span_f1([["B-PER", "B-PER", "O", "B-LOC"]], gold) == pytest.approx(2 / 5)
    assert M.span_f1([["O"] * 4], gold) == 0.0
    assert M.span_f1([["B-X", "I-Y"]], [["B-X", "B-Y"]]) == 1.0             # I- of another kind opens
    assert M.span_f1([["B-X", "O"], ["O"]], [["O", "B-X"], ["O"]]) == 0.0


# ---- BLEU and ROUGE-L --------------------------------------------------------------------------------------
def test_bleu_by_hand():
    text = "the cat sat on the mat"
    assert M.bleu([text], [text]) == pytest.approx(1.0)
    assert M.bleu([text], [["a dog", text]]) == pytest.approx(1.0)
    assert M.bleu([text.upper() + "  "], [text]) == pytest.approx(1.0)
    # 6 of 7, 5 of 6, 4 of 5, 3 of 4 n-grams; longer than the reference, so no brevity penalty
    assert M.bleu([text + " now"], [text]) == pytest.approx((6 / 7 * 5 / 6 * 4 / 5 * 3 / 4) ** 0.25)
    # everything is right but the end is missing: c = 5, r = 6
    assert M.bleu(["the cat sat on the"], [text]) == pytest.approx(math.exp(1 - 6 / 5))
    # clipping: "the" may count twice. 2 of 7 unigrams, no bigram at all -> no smoothing, 0
    assert M.bleu(["the the the the the the the"], [text]) == 0.0
    # one "a" in each of two references allows one, not two: 4/5, 3/4, 2/3 and 1/2 n-grams
    assert M.bleu(["a a b c d"], [["a b c d e", "f a b c d"]]) == pytest.approx(0.2 ** 0.25)
    # r is the length of the closest reference, not of the shortest
    assert M.bleu(["a b c d e"], [["a b c", "a b c d e f"]]) == pytest.approx(math.exp(1 - 6 / 5))
    # of two references equally far (4 and 6 from 5) the shorter: r = 4, no penalty
    assert M.bleu(["a b c d e"], [["a b c d", "a b c d e f"]]) == pytest.approx(1.0)
    assert M.bleu([], []) == M.bleu([""], ["a"]) == 0.0
    # corpus level: counts are pooled, not averaged
    a, b = "a b c d e", "a b c d x"
    pooled = [9 / 10, 7 / 8, 5 / 6, 3 / 4]
    assert M.bleu([a, b], [a, a]) == pytest.approx(math.prod(pooled) ** 0.25)


def test_13a_tokens():
    assert M._tokens_13a("It's £1,000.50, e.g. 5-star (A_b)!") == [
        "it's", "£1,000.50", ",", "e", ".", "g", ".", "5", "-", "star", "(", "a", "_", "b", ")", "!"]
    assert M._tokens_13a("&quot;Fish &amp; Chips&quot; &lt;3") == ['"', "fish", "&", "chips", '"', "<", "3"]
    assert M._tokens_13a("from .5 to ,7") == ["from", ".", "5", "to", ",", "7"]
    assert M._tokens_13a("family-friendly.") == ["family-friendly", "."]


def test_caption_tokens():
    assert M._tokens_caption("It isn't John's, they'll see: family-friendly!") == [
        "it", "is", "n't", "john", "'s", "they", "'ll", "see", "family-friendly"]
    assert M._tokens_caption("£20-25 ... (don't) 'quoted'") == ["£", "20-25", "(", "do", "n't", ")", "quoted"]


def test_rouge_l_by_hand():
    assert M.rouge_l(["a b c"], ["a b c"]) == pytest.approx(1.0)
    p, r, b2 = 2 / 3, 2 / 4, 1.44                               # LCS of "a b c" and "a x c d" is "a c"
    f = (1 + b2) * p * r / (r + b2 * p)
    assert M.rouge_l(["a b c"], ["a x c d"]) == pytest.approx(f)
    assert M.rouge_l(["a b c", "z"], ["a x c d", "y"]) == pytest.approx(f / 2)
    assert M.rouge_l(["a b c"], [["z", "a b c"]]) == pytest.approx(1.0)     # the best, not the first
    # precision 3/3 from one reference, recall 1/1 from the other
    assert M.rouge_l(["a b c"], [["x a b c y z", "a"]]) == pytest.approx(1.0)
    assert M.rouge_l([], []) == M.rouge_l([""], ["a"]) == M.rouge_l(["!"], ["!"]) == 0.0


def test_lcs_equals_the_table():
    def table(a, b):
        rows = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                rows[i + 1][j + 1] = rows[i][j] + 1 if x == y else max(rows[i][j + 1], rows[i + 1][j])
        return rows[-1][-1]
    draw = random.Random(0)
    for _ in range(500):
        a, b = ([draw.choice("abcde"[:draw.randint(1, 5)]) for _ in range(draw.randint(0, 80))] for _ in "ab")
        assert M._lcs(a, b) == table(a, b)


@pytest.fixture
def tool(assets):
    path = assets.parent / "tools" / "e2e_score.py"
    if not path.exists():
        pytest.skip(f"{path} is not there: nothing to compare with")
    spec = importlib.util.spec_from_file_location("e2e_score", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _equal(tool, outs, refs):
    """The tool's BLEU; its `scores` also computes NIST, which divides by zero on short texts."""
    def over(tokens, score):
        return score([tokens(o) for o in outs], [[tokens(r) for r in rs] for rs in refs])
    expected = over(tool.mteval_tokens, tool.bleu)
    assert M.bleu(outs, refs) == pytest.approx(expected, abs=1e-9)
    assert M.rouge_l(outs, refs) == pytest.approx(over(tool.caption_tokens, tool.rouge_l), abs=1e-9)
    return expected


def test_tokens_equal_the_tool_on_random_text(tool):
    draw = random.Random(1)
    pieces = ["a", "B", "7", "12", " ", "  ", "n't", "'s", "'ll", "'d", "'", "''", "`", ".", ",", "...", "-",
              "--", "/", "£", "é", "ß", "ſ", "_", "&amp;", "&amp;lt;", "&quot;", "(", "]", "~", "\n", "中",
              "🙂", "can", "١", "²"]
    for _ in range(20_000):
        text = "".join(draw.choices(pieces, k=draw.randint(0, 12)))
        assert M._tokens_13a(text) == tool.mteval_tokens(text), repr(text)
        assert M._tokens_caption(text) == tool.caption_tokens(text), repr(text)


def test_scores_equal_the_tool_on_random_text(tool):
    draw = random.Random(2)
    words = "the a pub cheap £20 family-friendly isn't John's 5-star , . city centre near".split()
    for _ in range(200):
        refs = [[" ".join(draw.choices(words, k=draw.randint(0, 15))) for _ in range(draw.randint(1, 4))]
                for _ in range(draw.randint(4, 8))]
        outs = [" ".join(w for w in draw.choice(r).split() if draw.random() < 0.9) for r in refs]
        _equal(tool, outs, refs)


def test_scores_equal_the_tool_on_real_text(tool, assets):
    lines = (assets / "e2e" / "valid.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line)["outputs"] for line in lines]
    rows = [r for r in rows if len(r) > 1][:120]
    score = _equal(tool, [r[0] for r in rows], [r[1:] for r in rows])       # people against people
    assert 0.3 < score < 0.7                                    # neither trivial nor broken
    _equal(tool, [r[0].lower()[:60] for r in rows], [r[1:] for r in rows])


# ---- numbers -----------------------------------------------------------------------------------------------
def test_perplexity():
    assert M.perplexity(10 * math.log(50), 10) == pytest.approx(50)
    assert M.perplexity(1e6, 10) == math.inf and math.isnan(M.perplexity(0.0, 0))


def test_wilson_by_hand():
    # Agresti & Coull's formula worked for 8 of 10 with z = 1.96
    low, high = M.wilson(8, 10)
    assert low == pytest.approx(0.4901625) and high == pytest.approx(0.9433178)
    assert M.wilson(0, 10) == pytest.approx((0.0, 0.2775328))
    assert M.wilson(10, 10) == pytest.approx((0.7224672, 1.0))
    assert M.wilson(0, 0) == (0.0, 1.0)
    for k in range(11):
        low, high = M.wilson(k, 10)
        z = 1.959963984540054                                   # the ends solve (p - k/n)^2 = z^2 p(1 - p)/n
        assert all(abs((p - k / 10) ** 2 - z * z * p * (1 - p) / 10) < 1e-12 for p in (low, high))
        assert 0 <= low <= k / 10 <= high <= 1


def test_summary_over_seeds():
    mean, sd, half = M.summary([1.0, 2.0, 3.0])
    assert (mean, sd) == (2.0, 1.0) and half == pytest.approx(4.3027 / math.sqrt(3))
    mean, sd, half = M.summary([0.5])
    assert mean == 0.5 and math.isnan(sd) and math.isnan(half)
    assert all(math.isnan(x) for x in M.summary([]))
    assert M.summary([3, 3, 3, 3])[1:] == (0.0, 0.0)
    for df, t in ((4, 2.7764), (6, 2.4469), (7, 2.3646), (9, 2.2622), (19, 2.0930), (999, 1.9623)):
        assert M._student(df) == pytest.approx(t, abs=1e-3)


def test_students_t_of_few_seeds():
    for df, t in enumerate((12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469), 1):
        assert M._student(df) == pytest.approx(t, abs=1e-4)
