"""data/text/bpe.py: byte-pair encoding itself: how text is cut, how merges are learned, when two tools agree.

Text is cut into pieces by a regular expression; a piece becomes UTF-8 bytes; while two neighbours form a
known pair, the pair learned earliest is joined, leftmost first (Sennrich et al. 2016, arXiv 1508.07909; over
bytes: Radford et al. 2019, section 2.2).

Learning.  Count the pairs of neighbours in all words, join the most frequent pair everywhere, repeat.  Ties
go to the pair of smaller ids: one corpus, one vocabulary.  Only words with the joined pair are counted again.

Agreeing.  Hugging Face joins the *pairs* of a list, in list order; tiktoken joins neighbours whose *bytes*
are a token, in token order.  Call a token sound if its bytes, encoded alone by the list, arrive at the token.
In a longer word, while nothing has crossed the token's ends, its bytes take the same steps as alone; so
neighbours that spell a sound token are the last pair of its own encoding, which is in the list.  Hence, given
the sound tokens in the order of their last pairs, both take the same steps, and no unsound token can appear.

Deviation: Python's Unicode tables may be a version older than the tools'; only new characters differ.

Public: CHAR, BYTE (how files spell bytes), GPT2, DIGITS, QWEN2 (regular expressions), splitter, learn, ranked
"""
import functools
import heapq
import itertools
import re
import sys
import unicodedata
from collections import Counter, defaultdict

from data.runtime.files import DataError

# Files spell bytes as characters: printable ones as themselves, the other 68 as those from 256 on, in order.
PLAIN = [*range(33, 127), *range(161, 173), *range(174, 256)]
CHAR = [chr(b if b in PLAIN else 256 + b - sum(p < b for p in PLAIN)) for b in range(256)]
BYTE = {c: b for b, c in enumerate(CHAR)}

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Every digit alone, then GPT-2's rule on the stretches between: there, space before a digit is final space.
DIGITS = r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"
QWEN2 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
         r"|\s+(?!\S)|\s+")
SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"      # Unicode's White_Space


@functools.cache
def splitter(pattern):
    r"""The pattern for Python's re, which has no \p{L} and takes four control characters for white space."""
    out, inside = [], False
    for part in re.findall(r"\\p\{\w+\}|\\.|.", pattern, re.S):
        inside = part == "[" or inside and part != "]"
        if part[:2] in (r"\p", r"\s"):
            members = _category(part[3:-1]) if part[1] == "p" else SPACE
            part = members if inside else f"[{members}]"
        out.append(f"[^{SPACE}]" if part == r"\S" and not inside else part)
    try:
        return re.compile("".join(out))
    except re.error as e:
        raise DataError(f"Python's re cannot cut text by {pattern} ({e}); use a rule like GPT-2's") from e


@functools.cache
def _category(prefix):
    """All characters of a Unicode category (L, Nd, ...), as the inside of a character class."""
    points = (c for c in range(sys.maxunicode + 1) if unicodedata.category(chr(c)).startswith(prefix))
    runs = (list(run) for _, run in itertools.groupby(enumerate(points), lambda pair: pair[1] - pair[0]))
    return "".join(rf"\U{run[0][1]:08x}-\U{run[-1][1]:08x}" for run in runs)


def learn(words, n, banned=()):
    """Up to n merges from a Counter of words (str): tokens (bytes; the 256 bytes first) and pairs of ids.
    No merge spells one of `banned`, so that a special token cannot come out of text."""
    tokens, pairs = [bytes([b]) for b in range(256)], []
    words = [(list(word.encode()), count) for word, count in words.items()]
    counts, where = Counter(), defaultdict(set)                 # of pairs: how often; in which words
    for i, (ids, times) in enumerate(words):
        for pair in zip(ids, ids[1:]):
            counts[pair] += times
            where[pair].add(i)
    heap = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(heap)
    while heap and len(pairs) < n:
        count, pair = heapq.heappop(heap)
        token = tokens[pair[0]] + tokens[pair[1]]
        if not count or -count != counts[pair] or token in banned:      # stale: a newer entry follows
            continue
        changed = set()
        for i in where.pop(pair):
            ids, times = words[i]
            merged = _join(ids, pair, len(tokens))
            for old in zip(ids, ids[1:]):
                counts[old] -= times
                changed.add(old)
            for new in zip(merged, merged[1:]):
                counts[new] += times
                where[new].add(i)
                changed.add(new)
            words[i] = merged, times
        for each in changed:
            heapq.heappush(heap, (-counts[each], each))
        tokens.append(token)
        pairs.append(pair)
    return tokens, pairs


def _join(ids, pair, new):
    """ids with every occurrence of the pair replaced, leftmost first."""
    out, i = [], 0
    while i < len(ids):
        hit = ids[i] == pair[0] and i + 1 < len(ids) and ids[i + 1] == pair[1]
        out.append(new if hit else ids[i])
        i += 2 if hit else 1
    return out


def ranked(vocab, merges, whole=False):
    """Tokens longer than a byte, in the order in which tiktoken has to know them to follow the list `merges`.

    `whole` is Hugging Face's ignore_merges: a piece that is a token becomes that token, sound or not, as in
    tiktoken. Then unsound tokens need a rank, too: safe if *every* split of theirs is in the list, and no
    other token's pair between (lists derived from a tiktoken file, such as Llama 3's, are so).
    """
    index = {pair: i for i, pair in enumerate(merges)}
    if len(index) < len(merges) or not all(left in vocab and right in vocab for left, right in merges):
        raise DataError("its merges name a pair twice, or a part that is not in its vocabulary")
    made = {token: (-1, None, None) for token in vocab if len(token) == 1}      # token: rank, left, right
    late = []
    for rank, (left, right) in enumerate(merges):
        if left not in made or right not in made:
            late.append((left, right))
        elif left + right not in made and _stands(left, right, rank, index, made):
            made[left + right] = rank, left, right
    order = {token: rank for token, (rank, *_) in made.items() if rank >= 0}
    for left, right in () if whole else late:                   # joined once its parts appear: out of order
        if left in made and right in made and left + right not in made:
            raise DataError(f'its merge "{left} {right}" stands before the merges that make its parts')
    for token in vocab if whole else ():
        if token not in made:
            splits = ((token[:i], token[i:]) for i in range(1, len(token)))
            at = [index.get(pair, -1) for pair in splits if pair[0] in vocab and pair[1] in vocab]
            if at and (-1 in at or max(at) - min(at) >= len(at)):
                raise DataError(f'its merges do not lead to its token "{token}", yet it may be a word')
            order[token] = min(at, default=0)
    return sorted(order, key=order.get)


def _stands(left, right, rank, index, made):
    """Do the bytes of left + right, encoded alone, arrive at this pair? Follow the seam between them back in
    time: tokens that met there must not have been joined before one of them went to its other neighbour."""
    until = rank
    while True:
        if index.get((left, right), until) < until:
            return False
        (a, _, tail), (b, head, _) = made[left], made[right]
        if a < 0 and b < 0:                                     # down to two bytes
            return True
        if a > b:                                               # the younger one is taken apart
            until, left = a, tail
        else:                                                   # of equal pairs the left one goes first, so
            until, right = b + 1, head                          # one across the seam precedes one after it
