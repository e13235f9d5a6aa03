"""data/text/bpe.py: byte-pair encoding: splitting text, learning merges, equality with Hugging Face.

A regular expression splits text into pieces; a piece becomes its UTF-8 bytes; while two neighbouring tokens
form a known pair, the pair that was learned earliest is merged, leftmost first (Sennrich et al. 2016, arXiv
1508.07909; over bytes: Radford et al. 2019, section 2.2).

Learning. Count the pairs of neighbours in all words, merge the most frequent pair everywhere, repeat. Ties
go to the pair of smaller ids, so that one corpus gives one vocabulary. Only words with the merged pair are
recounted.

Equivalence. Hugging Face merges the *pairs* of a list, in list order; tiktoken merges neighbours whose
*bytes* are a token, in the order of the tokens' ranks. Call a token reachable if its bytes, encoded alone
with the list, result in that token. In a longer word, as long as no merge has crossed the token's ends, its
bytes go through the same merges as alone; so neighbours that spell a reachable token are the last pair of
its own encoding, and that pair is in the list. Hence, given the reachable tokens in the order of their last
pairs, both tools make the same merges, and no unreachable token can appear.

Deviation: Python's Unicode tables may be a version older than the tools'; only new characters differ.

Public: CHAR, BYTE (how files spell bytes), GPT2, DIGITS, QWEN2 (regular expressions), compile_pattern,
learn_merges, tiktoken_order
"""
import functools
import heapq
import itertools
import re
import sys
import unicodedata
from collections import Counter, defaultdict

from data.runtime.files import DataError

# The files of a tokenizer spell bytes as characters: printable ones as themselves, the other 68, in order, as
# the characters from 256 on.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
CHAR = [chr(b if b in PRINTABLE else 256 + b - sum(p < b for p in PRINTABLE)) for b in range(256)]
BYTE = {c: b for b, c in enumerate(CHAR)}

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Every digit alone, then GPT-2's rule on the text between, where a space before a digit is trailing space.
DIGITS = r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"
QWEN2 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
         r"|\s+(?!\S)|\s+")
SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"      # Unicode's White_Space


@functools.cache
def compile_pattern(pattern):
    r"""The pattern as a Python re, which has no \p{L}, and whose \s includes four control characters.

    Raises DataError for a pattern that Python cannot compile.
    """
    parts = []
    in_class = False                                            # inside [...]
    for part in re.findall(r"\\p\{\w+\}|\\.|.", pattern, re.S):
        if part == "[":
            in_class = True
        elif part == "]":
            in_class = False
        if part[:2] in (r"\p", r"\s"):
            members = _category(part[3:-1]) if part[1] == "p" else SPACE
            part = members if in_class else f"[{members}]"
        elif part == r"\S" and not in_class:
            part = f"[^{SPACE}]"
        parts.append(part)
    try:
        return re.compile("".join(parts))
    except re.error as e:
        raise DataError(f"Python's re cannot compile {pattern} ({e}); use a pattern like GPT-2's") from e


@functools.cache
def _category(prefix):
    """All characters of a Unicode category (L, Nd, ...), as the inside of a character class."""
    points = [c for c in range(sys.maxunicode + 1) if unicodedata.category(chr(c)).startswith(prefix)]
    ranges = []
    for _, run in itertools.groupby(enumerate(points), lambda pair: pair[1] - pair[0]):     # consecutive
        run = list(run)
        ranges.append(rf"\U{run[0][1]:08x}-\U{run[-1][1]:08x}")
    return "".join(ranges)


# ---- learning ----------------------------------------------------------------------------------------------
def learn_merges(words, n, banned=()):
    """Learn up to n merges from words, a Counter of str.

    Returns (tokens, pairs): tokens are bytes, the 256 single bytes first; pairs[k] are the ids that token
    256 + k is made of. No merge spells one of `banned` (bytes), so that a special token cannot come out of
    text.
    """
    tokens = [bytes([b]) for b in range(256)]
    pairs = []
    words = [(list(word.encode()), count) for word, count in words.items()]
    counts = Counter()                                          # pair -> how often it occurs
    words_with = defaultdict(set)                               # pair -> indices of words
    for i, (ids, times) in enumerate(words):
        for pair in zip(ids, ids[1:]):
            counts[pair] += times
            words_with[pair].add(i)
    heap = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(heap)
    while heap and len(pairs) < n:
        count, pair = heapq.heappop(heap)
        token = tokens[pair[0]] + tokens[pair[1]]
        stale = count == 0 or -count != counts[pair]            # a newer entry of this pair follows
        if stale or token in banned:
            continue
        changed = set()
        for i in words_with.pop(pair):
            ids, times = words[i]
            merged = _merge(ids, pair, len(tokens))
            for old in zip(ids, ids[1:]):
                counts[old] -= times
                changed.add(old)
            for new in zip(merged, merged[1:]):
                counts[new] += times
                words_with[new].add(i)
                changed.add(new)
            words[i] = (merged, times)
        for changed_pair in changed:
            heapq.heappush(heap, (-counts[changed_pair], changed_pair))
        tokens.append(token)
        pairs.append(pair)
    return tokens, pairs


def _merge(ids, pair, new):
    """ids with every occurrence of the pair replaced by the id `new`, leftmost first."""
    merged = []
    i = 0
    while i < len(ids):
        if tuple(ids[i:i + 2]) == pair:
            merged.append(new)
            i += 2
        else:
            merged.append(ids[i])
            i += 1
    return merged


# ---- equivalence -------------------------------------------------------------------------------------------
def tiktoken_order(vocab, merges, ignore_merges=False):
    """Tokens longer than a byte, in the order that makes tiktoken follow the list `merges` [(left, right)].

    ignore_merges (Hugging Face): a piece that is a token becomes that token, reachable or not, as in
    tiktoken. Then unreachable tokens need a rank, too. That is safe if *every* split of such a token is in
    the list, with no other token's pair between them; lists derived from a tiktoken file, such as Llama
    3's, are so. Raises DataError where no order gives the same ids.
    """
    index = {pair: i for i, pair in enumerate(merges)}
    if len(index) < len(merges) or not all(left in vocab and right in vocab for left, right in merges):
        raise DataError("its merges name a pair twice, or a part that is not in its vocabulary")
    made = {token: (-1, None, None) for token in vocab if len(token) == 1}      # token: rank, left, right
    out_of_order = []                                           # listed before their parts are made
    for rank, (left, right) in enumerate(merges):
        if left not in made or right not in made:
            out_of_order.append((left, right))
        elif left + right not in made and _is_reachable(left, right, rank, index, made):
            made[left + right] = (rank, left, right)
    order = {token: rank for token, (rank, _, _) in made.items() if rank >= 0}
    if ignore_merges:
        order |= _unreachable_ranks(vocab, index, made)
        return sorted(order, key=order.get)
    for left, right in out_of_order:
        if left in made and right in made and left + right not in made:
            raise DataError(f'its merge "{left} {right}" stands before the merges that make its parts')
    return sorted(order, key=order.get)


def _unreachable_ranks(vocab, index, made):
    """{token: rank} for the tokens of vocab that the merges do not make."""
    ranks = {}
    for token in vocab:
        if token in made:
            continue
        splits = [(token[:i], token[i:]) for i in range(1, len(token))]
        positions = [index.get(pair, -1) for pair in splits if pair[0] in vocab and pair[1] in vocab]
        if positions and (-1 in positions or max(positions) - min(positions) >= len(positions)):
            raise DataError(f'its merges do not make its token "{token}", which a piece of text may be')
        ranks[token] = min(positions, default=0)
    return ranks


def _is_reachable(left, right, rank, index, made):
    """Whether the bytes of left + right, encoded alone, end in this pair.

    Follows the boundary between left and right back in time: two tokens that met there must not have been
    merged with each other before one of them was merged with its other neighbour.
    """
    until = rank
    while True:
        if index.get((left, right), until) < until:
            return False
        left_rank, _, left_tail = made[left]
        right_rank, right_head, _ = made[right]
        if left_rank < 0 and right_rank < 0:                    # two single bytes: nothing came before
            return True
        if left_rank > right_rank:                              # undo the later of the two merges
            until = left_rank
            left = left_tail
        else:               # of equal pairs the left one is merged first, hence + 1 for a merge on the right
            until = right_rank + 1
            right = right_head
