"""data/results/metrics.py: the definitions of all metrics, as pure functions.

    exact match   equal texts, after every run of white space became one space and the ends were stripped;
                  case and punctuation count. Of several references, any may match.
    macro F1      mean over the *gold* labels of 2 tp / (2 tp + fp + fn). A prediction outside the gold labels
                  (a generative classifier may answer anything) is a miss, and adds no class of its own.
    span F1       F1 over whole entities, (type, first, last) all equal, pooled over the texts. BIO tags; an
                  I- that continues no entity of its type opens one (as in CoNLL's script).
    BLEU          Papineni et al. 2002: exp(min(0, 1 - r/c) + mean_n log p_n), n = 1..4, over the corpus, no
                  smoothing; an n-gram counts at most as often as in the reference that has it most; r sums
                  the length of the reference closest to each output (of two, the shorter). Tokens:
                  mteval-13a, lower case.
    ROUGE-L       Lin 2004: precision P = LCS / output length and recall R = LCS / reference length, each the
                  best over the references; F = (1 + b^2) P R / (R + b^2 P), b = 1.2; mean over the texts.
                  Lower case, "n't" and "'s" split off, punctuation dropped.
                  Both equal the script of the E2E challenge (Dusek et al. 2020).
    perplexity    exp(sum of negative log likelihoods / supervised tokens)
    wilson        95 % interval of a proportion (Wilson 1927); unlike mean +- 2 sd it stays within 0 and 1
    summary       mean, sd (n - 1), half the 95 % Student interval: at n = 3, 4.30 sd / sqrt(n), not 1.96

`predictions` and `references` (or `gold`) have one entry per item; unequal lengths raise ValueError. An entry
of `references` is one text or a list of texts. Scores are fractions, not percent; of no items, 0.0.

LOWER_IS_BETTER names the metrics that improve downwards, here or elsewhere; all others improve upwards. COUNTS
stand among the metrics of a run and are no scores; of these, a report leaves out HIDDEN.

Public: normalise_space, exact_match, accuracy, confusion, macro_f1, spans, span_scores, span_f1, bleu,
rouge_l, perplexity, wilson, half_width, summary, unit, main_metric, LOWER_IS_BETTER, COUNTS, HIDDEN, METRIC_ORDER
"""
import collections
import math
import re
import statistics
import string
import unicodedata

from data.text.entities import spans

LOWER_IS_BETTER = ("loss", "perplexity", "forgetting", "kl", "sqrt_kl", "nll", "ece", "repeat4", "rejected_logp",
                   "bad_logp")
HIDDEN = ("targets",)
COUNTS = (*HIDDEN, "pairs", "prompts", "labels_used", "shots", "shots_used", "shots_used_max", "rows", "mean_probability")
# What rows are about, where their task has no metric of its own: entities f1, answers exact match, labels and
# comparisons accuracy, PPO the gold reward or else the reward model's score, raw text the loss.
METRIC_ORDER = ("f1", "exact_match", "accuracy", "gold", "score", "loss")


def main_metric(metrics, own=None):
    """The name of the metric that a run is about, or None.

    It is `own`, that of the task's record, if the run has it; entities, with any task, are about f1. Otherwise
    the first of METRIC_ORDER, or else the first that is no count.
    """
    first, *others = METRIC_ORDER
    for name in (first, own, *others):
        if name in metrics:
            return name
    return next((name for name in metrics if name not in COUNTS), None)


def _texts(references):
    """One text or several -> a list of them. Raises ValueError for an empty list."""
    out = [references] if isinstance(references, str) else list(references)
    if not out:
        raise ValueError("an item has no reference text to be compared with; it needs at least one")
    return out


def _paired(a, b):
    """Pairs. Raises ValueError when the lengths differ: zip alone would silently score a prefix."""
    if len(a) != len(b):
        raise ValueError(f"{len(a)} predictions cannot be scored against {len(b)} references")
    return list(zip(a, b))


# ---- labels ------------------------------------------------------------------------------------------------
def normalise_space(text):
    """Every run of white space as one space, none at the ends; an accented letter as one character (NFC)."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def exact_match(prediction, references):
    """True if one text equals any reference, white space normalised."""
    return normalise_space(prediction) in set(map(normalise_space, _texts(references)))


def accuracy(predictions, gold):
    """The share of equal pairs."""
    pairs = _paired(predictions, gold)
    return sum(p == g for p, g in pairs) / max(len(pairs), 1)


def confusion(predictions, gold):
    """Counter of (gold, predicted)."""
    return collections.Counter((g, p) for p, g in _paired(predictions, gold))


def macro_f1(predictions, gold):
    true_positives = collections.Counter()
    predicted = collections.Counter()                           # tp + fp
    actual = collections.Counter()                              # tp + fn
    for (label, prediction), n in confusion(predictions, gold).items():
        predicted[prediction] += n
        actual[label] += n
        if label == prediction:
            true_positives[label] += n
    scores = [2 * true_positives[label] / (predicted[label] + actual[label]) for label in actual]
    return sum(scores) / max(len(scores), 1)


def span_scores(predictions, gold):
    """(precision, recall, F1) of entities; for each text a list of BIO tags, or a set of spans."""
    correct = 0
    predicted = 0
    actual = 0
    for prediction, reference in _paired(predictions, gold):
        entities = prediction if isinstance(prediction, set) else spans(prediction)
        expected = reference if isinstance(reference, set) else spans(reference)
        correct += len(entities & expected)
        predicted += len(entities)
        actual += len(expected)
    return correct / max(predicted, 1), correct / max(actual, 1), 2 * correct / max(predicted + actual, 1)


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
    """mteval-13a, as in the E2E script: the three rules are applied in this order, each in one pass."""
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
    matched = [0] * 4                                           # n-grams of each order
    total = [0] * 4
    reference_length = 0
    for text, some in _paired(predictions, references):
        tokens = _tokens_13a(text)
        refs = [_tokens_13a(reference) for reference in _texts(some)]
        for n in range(4):
            limit = collections.Counter()
            for ref in refs:
                limit |= _ngrams(ref, n + 1)                    # | keeps the larger of two counts
            matched[n] += (_ngrams(tokens, n + 1) & limit).total()
            total[n] += max(len(tokens) - n, 0)
        reference_length += min((abs(len(ref) - len(tokens)), len(ref)) for ref in refs)[1]
    if not all(matched):
        return 0.0                                              # an order without a match: log 0
    brevity = min(0.0, 1 - reference_length / total[0])
    return math.exp(brevity + statistics.fmean(math.log(m / t) for m, t in zip(matched, total)))


def _lcs(a, b):
    """Length of the longest common subsequence, with one addition for each row of the table (Hyyro 2004).

    Bit j of `row` is 0 where the table's row grows by one at column j. The carry of row + (row & match) moves
    each growth to the leftmost match of its stretch, which is what the recurrence's max does.
    """
    match = collections.defaultdict(int)
    for j, token in enumerate(b):
        match[token] |= 1 << j
    full = (1 << len(b)) - 1
    row = full
    for token in a:
        if token in match:
            step = row & match[token]
            row = (row + step | row - step) & full
    return len(b) - row.bit_count()


def rouge_l(predictions, references, beta=1.2):
    pairs = _paired(predictions, references)
    total = 0.0
    for text, some in pairs:
        tokens = _tokens_caption(text)
        refs = [_tokens_caption(reference) for reference in _texts(some)]
        common = [_lcs(tokens, ref) for ref in refs]
        precision = max(common) / max(len(tokens), 1)
        recall = max(length / max(len(ref), 1) for length, ref in zip(common, refs))
        if precision and recall:
            total += (1 + beta ** 2) * precision * recall / (recall + beta ** 2 * precision)
    return total / max(len(pairs), 1)


# ---- numbers -----------------------------------------------------------------------------------------------
def perplexity(nll_sum, tokens):
    """nan without tokens; inf where exp overflows, so that a diverged run does not stop the evaluation."""
    try:
        return math.exp(nll_sum / tokens) if tokens else math.nan
    except OverflowError:
        return math.inf


def wilson(successes, n, z=1.959963984540054):
    """(low, high) of the proportion successes / n; (0, 1) when n is 0."""
    if not n:
        return 0.0, 1.0
    p = successes / n
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low = (centre - half) / (1 + z * z / n)
    high = (centre + half) / (1 + z * z / n)
    return max(0.0, min(low, p)), min(1.0, max(high, p))        # rounding must not put p outside


# Student's t at 97.5 % for 1 to 6 degrees of freedom; above, Fisher's series in 1/df is accurate to 0.001.
_T = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469)


def _student(df):
    if df <= len(_T):
        return _T[df - 1]
    z = 1.959963984540054
    return (z + (z ** 3 + z) / (4 * df) + (5 * z ** 5 + 16 * z ** 3 + 3 * z) / (96 * df ** 2)
            + (3 * z ** 7 + 19 * z ** 5 + 17 * z ** 3 - 15 * z) / (384 * df ** 3))


def half_width(sd, n):
    """Half the 95 % Student interval of the mean of n > 1 values with the standard deviation sd (n - 1)."""
    return _student(n - 1) * sd / math.sqrt(n)


def summary(values):
    """(mean, sd, half): the 95 % interval is mean +- half. Of one value, and where one is not finite, sd and
    half are nan; of none all are."""
    values = list(values)
    mean = statistics.fmean(values) if values else math.nan
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return mean, math.nan, math.nan
    sd = statistics.stdev(values)
    return mean, sd, half_width(sd, len(values))


# ---- units -------------------------------------------------------------------------------------------------
UNITS = {"exact_match": "0 to 1", "accuracy": "0 to 1",
         "macro_f1": "0 to 1", "precision": "0 to 1", "recall": "0 to 1", "f1": "0 to 1",
         "rouge_l": "0 to 1", "bleu": "0 to 1", "perplexity": "exp(loss)",
         "forgetting": "rise of loss on other text, nats/token",
         "labels_used": "different labels among the answers", "shots": "examples asked for",
         "shots_used": "examples in front of a question, mean", "shots_used_max": "the same, largest",
         "pairs": "comparisons", "score_length_corr": "-1 to 1", "margin": "above 0: ranked right",
         **dict.fromkeys(("chosen_logp", "rejected_logp", "good_logp", "bad_logp"), "nats per answer"),
         "z0": "beta x nats per answer, from the reference", "prompts": "prompts with such answers",
         "kl": "nats per answer, from the reference", "eos_rate": "share of answers that end",
         "length": "tokens per answer", "unique": "share of answers that differ",
         "repeat4": "share of 4-grams that repeat",
         "score": "mean of --reward", "score_std": "its standard deviation",
         "score_penalised": "mean of what is learnt from",
         "gold": "mean of the gold reward", "gold_std": "its standard deviation",
         "gold_gain": "rise of gold / gold_std before",
         "score_best_of_": "best of {} answers by score", "gold_best_of_": "gold of the best of {} by score",
         "pass@": "any of {} right", "majority@": "most frequent of {} right", "mean@": "mean score of {}"}
# What a loss is a mean over, by the metric that stands beside it.
LOSS_UNITS = {"targets": "nats per token", "macro_f1": "nats per label", "f1": "nats per word",
              "pairs": "nats per prompt", "good_logp": "per answer", "margin": "per pair"}


def unit(name, metrics):
    """The unit of a metric among `metrics`, {name: value}; "" where its name says it or it has none."""
    if name == "loss":
        return next((text for other, text in LOSS_UNITS.items() if other in metrics), "nats")
    for mark in ("@", "_best_of_"):                             # pass@8, score_best_of_4
        kind, found, number = name.partition(mark)
        if found:
            return UNITS.get(kind + mark, "").format(number)
    return UNITS.get(name, "")
