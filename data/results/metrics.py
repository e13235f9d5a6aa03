"""data/results/metrics.py: what "better" means here; each definition is a pure function.

    exact match   equal texts, after every run of white space became one space and the ends were stripped;
                  case and punctuation count. Of several references, any may be the one.
    macro F1      mean over the *gold* labels of 2 tp / (2 tp + fp + fn). A prediction outside the gold labels
                  (a generative classifier may say anything) is a miss, and adds no class of its own.
    span F1       F1 over whole entities, (kind, first, last) all equal, pooled over the texts. BIO tags; an
                  I- that continues nothing of its kind opens an entity (as CoNLL's script has it).
    BLEU          Papineni et al. 2002: exp(min(0, 1 - r/c) + mean_n log p_n), n = 1..4, over the corpus, no
                  smoothing; an n-gram counts at most as often as in the reference that has it most; r sums
                  the length of the reference closest to each output (of two, the shorter). Tokens:
                  mteval-13a, lower case.
    ROUGE-L       Lin 2004: precision P = LCS / output length and recall R = LCS / reference length, each the
                  best over the references; F = (1 + b^2) P R / (R + b^2 P), b = 1.2; mean over the texts.
                  Lower case, "n't" and "'s" split off, punctuation dropped.
                  Both equal the script of the E2E challenge (Dusek et al. 2020).
    perplexity    exp(sum of negative log likelihoods / supervised tokens)
    wilson        95 % interval of a proportion (Wilson 1927): honest at 0 and 1, where mean +- 2 sd is not
    summary       mean, sd (n - 1), half the 95 % Student interval: at n = 3, 4.30 sd / sqrt(n), not 1.96

`references` hold, per item, one text or a list of texts. Scores are fractions, not percent; of no items, 0.0.

Public: exact_match, accuracy, confusion, macro_f1, spans, span_scores, span_f1, bleu, rouge_l, perplexity,
wilson, summary
"""
import collections
import math
import re
import statistics
import string

from data.text.entities import spans


def _texts(references):
    """One text or several -> a list of them."""
    out = [references] if isinstance(references, str) else list(references)
    if not out:
        raise ValueError("an item has no reference text to be compared with; it needs at least one")
    return out


def _paired(a, b):
    """Equal lengths, or a sentence: zip alone would score a prefix in silence."""
    if len(a) != len(b):
        raise ValueError(f"{len(a)} predictions cannot be scored against {len(b)} references")
    return list(zip(a, b))


# ---- labels ------------------------------------------------------------------------------------------------
def exact_match(prediction, references):
    """True if one text equals any reference, white space normalised."""
    return " ".join(prediction.split()) in {" ".join(r.split()) for r in _texts(references)}


def accuracy(predictions, gold):
    pairs = _paired(predictions, gold)
    return sum(p == g for p, g in pairs) / max(len(pairs), 1)


def confusion(predictions, gold):
    """Counter of (gold, predicted)."""
    return collections.Counter((g, p) for p, g in _paired(predictions, gold))


def macro_f1(predictions, gold):
    tp, said, there = collections.Counter(), collections.Counter(), collections.Counter()
    for (g, p), n in confusion(predictions, gold).items():
        tp[g] += n * (g == p)
        said[p], there[g] = said[p] + n, there[g] + n
    return sum(2 * tp[c] / (said[c] + there[c]) for c in there) / max(len(there), 1)    # said = tp + fp


def span_scores(predictions, gold):
    """(precision, recall, F1) of entities; for each text a list of BIO tags, or its entities as spans."""
    hit = said = there = 0
    for p, g in _paired(predictions, gold):
        p, g = (x if isinstance(x, set) else spans(x) for x in (p, g))
        hit, said, there = hit + len(p & g), said + len(p), there + len(g)
    return hit / max(said, 1), hit / max(there, 1), 2 * hit / max(said + there, 1)


def span_f1(predictions, gold):
    """Entity-level F1; one list of BIO tags per text."""
    return span_scores(predictions, gold)[2]


# ---- generated text ----------------------------------------------------------------------------------------
_ENTITIES = (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"))
_SYMBOL = re.compile("([" + re.escape("".join(sorted(set(string.punctuation) - set("'.,-")))) + "])")
_AFTER_NONDIGIT = re.compile(r"(\D)([.,])", re.ASCII)           # 1,000.5 stays whole; a final stop does not
_BEFORE_NONDIGIT = re.compile(r"([.,])(\D)", re.ASCII)
_DIGIT_DASH = re.compile(r"(\d)-", re.ASCII)


def _tokens_13a(text):
    """mteval-13a, as the E2E script has it: the three rules are applied in this order, each in one pass."""
    for name, char in _ENTITIES:
        text = text.replace(name, char)
    text = _SYMBOL.sub(r" \1 ", f" {text.lower()} ")
    text = _BEFORE_NONDIGIT.sub(r" \1 \2", _AFTER_NONDIGIT.sub(r"\1 \2 ", text))
    return _DIGIT_DASH.sub(r"\1 - ", text).split()


_NOT = re.compile(r"(?<=\w)n't\b")
_WORD = re.compile(r"n't|'(?:s|re|ve|ll|d|m)\b|\w+(?:[-/.,]\w+)*|\S")


def _tokens_caption(text):
    """Penn-like words without punctuation, as image captions are scored."""
    return [w for w in _WORD.findall(_NOT.sub(" n't", text.lower())) if w not in "'`.?!,:-;\""]


def _ngrams(tokens, n):
    return collections.Counter(zip(*(tokens[i:] for i in range(n))))


def bleu(predictions, references):
    hit, total, reference_length = [0] * 4, [0] * 4, 0
    for text, refs in _paired(predictions, references):
        out, refs = _tokens_13a(text), [_tokens_13a(r) for r in _texts(refs)]
        for n in range(4):
            allowed = collections.Counter()
            for r in refs:
                allowed |= _ngrams(r, n + 1)                    # | keeps the larger of two counts
            hit[n] += (_ngrams(out, n + 1) & allowed).total()
            total[n] += max(len(out) - n, 0)
        reference_length += min((abs(len(r) - len(out)), len(r)) for r in refs)[1]
    if not all(hit):
        return 0.0                                              # log 0: no n-gram of some order is right
    brevity = min(0.0, 1 - reference_length / total[0])
    return math.exp(brevity + statistics.fmean(math.log(h / t) for h, t in zip(hit, total)))


def _lcs(a, b):
    """Length of the longest common subsequence, a row of the table per addition (Hyyro 2004).

    Bit j of `row` is 0 where the table's row grows by one at column j. The carry of row + (row & match) moves
    each growth to the leftmost match of its stretch, which is just what the recurrence's max does.
    """
    match = collections.defaultdict(int)
    for j, token in enumerate(b):
        match[token] |= 1 << j
    full = row = (1 << len(b)) - 1
    for token in a:
        if token in match:
            step = row & match[token]
            row = (row + step | row - step) & full
    return len(b) - row.bit_count()


def rouge_l(predictions, references, beta=1.2):
    pairs, total = _paired(predictions, references), 0.0
    for text, refs in pairs:
        out, refs = _tokens_caption(text), [_tokens_caption(r) for r in _texts(refs)]
        common = [_lcs(out, r) for r in refs]
        p, r = max(common) / max(len(out), 1), max(c / max(len(x), 1) for c, x in zip(common, refs))
        total += (1 + beta ** 2) * p * r / (r + beta ** 2 * p) if p and r else 0.0
    return total / max(len(pairs), 1)


# ---- numbers -----------------------------------------------------------------------------------------------
def perplexity(nll_sum, tokens):
    """nan without tokens, inf where exp leaves the floats: a diverged run must not stop the evaluation."""
    try:
        return math.exp(nll_sum / tokens) if tokens else math.nan
    except OverflowError:
        return math.inf


def wilson(successes, n, z=1.959963984540054):
    """(low, high) of a proportion; (0, 1) when nothing was counted."""
    if not n:
        return 0.0, 1.0
    p, shrink = successes / n, 1 + z * z / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (centre - half) / shrink, (centre + half) / shrink
    return max(0.0, min(low, p)), min(1.0, max(high, p))        # rounding must not put p outside


# Student's t at 97.5 % for 1 to 6 degrees of freedom; beyond, Fisher's series in 1/df is right to 0.001.
_T = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469)


def _student(df):
    if df <= len(_T):
        return _T[df - 1]
    z = 1.959963984540054
    return (z + (z ** 3 + z) / (4 * df) + (5 * z ** 5 + 16 * z ** 3 + 3 * z) / (96 * df ** 2)
            + (3 * z ** 7 + 19 * z ** 5 + 17 * z ** 3 - 15 * z) / (384 * df ** 3))


def summary(values):
    """(mean, sd, half): the 95 % interval is mean +- half. One value has no spread: sd and half are nan."""
    values = list(values)
    mean = statistics.fmean(values) if values else math.nan
    if len(values) < 2:
        return mean, math.nan, math.nan
    sd = statistics.stdev(values)
    return mean, sd, _student(len(values) - 1) * sd / math.sqrt(len(values))
