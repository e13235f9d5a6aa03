"""data/text/tokenizer.py: text to ids and back, with Hugging Face's ids at tiktoken's speed.

A folder says how text is normalised and cut, which pairs of tokens are joined, and which id a token has.
tiktoken does the work (data/text/bpe.py shows when it takes the same steps); a table turns its ranks into ids.

Deviations, all on purpose:
- Text that looks like a special token is text. Special tokens are added by id; encode adds no BOS, no EOS.
- SentencePiece, WordPiece and Unigram models are refused, and so are lone surrogates (no characters).
- Bytes that the vocabulary lacks vanish, as they do in Hugging Face's (SmolLM2 has no 0x04).

Public: Tokenizer with train, from_pretrained, save_pretrained, encode, decode, decoder, and the attributes
special (name -> id), eos, bos, pad (id or None), vocab_size (largest id + 1)
"""
import codecs
import re
import unicodedata
from collections import Counter

import tiktoken

from data.text import tokenizer_files
from data.text.bpe import BYTE, CHAR, DIGITS, learn, ranked, splitter
from data.runtime.files import DataError


# tiktoken's regular expressions panic at a million characters of white space in a row; Python's do not.
LONG = re.compile(r"(?<!\s)\s{900000}")


class Tokenizer:
    """`spec` and `config` are the contents of tokenizer.json and tokenizer_config.json, kept as they came."""

    def __init__(self, spec, config):
        self._spec, self._config = spec, config
        merges, self._form, self._pattern = tokenizer_files.rules(spec)
        added, vocab = sorted(spec["added_tokens"], key=lambda t: t["id"]), spec["model"]["vocab"]
        self.special = {t["content"]: t["id"] for t in added}
        names = vocab | self.special
        if len({*names.values()}) < len(names) or any(vocab.get(t, i) != i for t, i in self.special.items()):
            raise DataError("two of its tokens share an id, or one token has two")
        hidden = {t["content"] for t in added if t["special"]}
        spelled = {left + right for left, right in merges} | BYTE.keys()        # text may give these
        vocab = {t: i for t, i in vocab.items() if t not in hidden or t in spelled}
        try:
            self._bytes = {i: bytes([BYTE[c] for c in t]) for t, i in vocab.items()}
        except KeyError as e:
            raise DataError(f"its tokens hold {e}, and only byte-level BPE is read here") from e

        tokens = ranked(vocab, merges, spec["model"].get("ignore_merges"))
        self._ids = [vocab.get(c, -1) for c in CHAR] + [vocab[t] for t in tokens]       # rank -> id
        if -1 in self._ids and spec["model"].get("unk_token"):
            raise DataError("it has no token for some bytes, but an unk_token, which is not supported here")
        ranks = {bytes([b]): b for b in range(256)}
        ranks |= {self._bytes[vocab[t]]: rank for rank, t in enumerate(tokens, start=256)}
        self._bpe = tiktoken.Encoding("bpe", pat_str=self._pattern, mergeable_ranks=ranks, special_tokens={})

        self._bytes |= {i: t.encode() for t, i in self.special.items()}
        self._shown = self._bytes | {self.special[t]: b"" for t in hidden}
        # Added words that are not special (Qwen3's <think>) are found in text before all else, longest first.
        words = sorted(self.special.keys() - hidden, key=lambda t: (-len(t), t))
        self._words = re.compile("(" + "|".join(map(re.escape, words)) + ")") if words else None
        self.vocab_size = max(self._bytes) + 1
        self.bos, self.eos, self.pad = (self._role(config.get(role)) for role in tokenizer_files.ROLES)
        self.chat_template = config.get("chat_template", "")    # Jinja; data/text/chat.py reads its system text

    def _role(self, token):
        token = tokenizer_files.content(token)
        if token is not None and token not in self.special:
            raise DataError(f'its config names "{token}" as a special token, and it has no such token')
        return self.special.get(token)

    def encode(self, text):
        """The ids of a text; nothing in it counts as a special token."""
        parts = self._words.split(_valid(text)) if self._words else [_valid(text)]
        ids = self._encode(parts[0])
        for word, rest in zip(parts[1::2], parts[2::2]):
            ids += [self.special[word], *self._encode(rest)]
        return ids

    def _encode(self, text):
        text = unicodedata.normalize(self._form, text) if self._form else text
        if not LONG.search(text):
            ids = [self._ids[rank] for rank in self._bpe.encode_ordinary(text)]
            if -1 not in ids:
                return ids
        ids = []            # a byte without a token leaves before BPE, so that its neighbours may join
        for piece in splitter(self._pattern).finditer(text):
            if known := bytes(b for b in piece.group().encode() if self._ids[b] >= 0):
                ids += [self._ids[rank] for rank in self._bpe._encode_single_piece(known)]
        return ids

    def decode(self, ids, special=False):
        """The text of ids. Broken UTF-8 shows as U+FFFD, an id without a token (a spare row) as nothing."""
        table = self._bytes if special else self._shown
        return b"".join([table.get(int(i), b"") for i in ids]).decode(errors="replace")

    def decoder(self, special=False):
        """For streaming: push(id) gives the text that is certain by now, flush() the rest."""
        return Stream(self._bytes if special else self._shown)

    @classmethod
    def from_pretrained(cls, folder):
        spec, config = tokenizer_files.read(folder)
        try:
            return cls(spec, config)
        except DataError as e:
            raise DataError(f"{folder}: {e}") from e
        except (KeyError, TypeError, AttributeError, ValueError) as e:
            raise DataError(f"{folder}: not a tokenizer's files ({type(e).__name__}: {e})") from e

    def save_pretrained(self, folder):
        """Files that transformers reads to the same ids; what we do not use of foreign ones stays in."""
        tokenizer_files.write(folder, self._spec, self._config)

    @classmethod
    def train(cls, texts, vocab_size, special=("<|endoftext|>",), eos=None, bos=None, pad=None):
        """256 bytes (id = byte), merges learned from texts, then the special tokens; eos is the first of them
        if not named. 256 + len(special) means plain bytes; a small text may give less than vocab_size."""
        n = vocab_size - 256 - len(special)
        if n < 0 or len(set(special)) < len(special):
            raise DataError(f"vocab_size {vocab_size} cannot hold 256 bytes and {list(special)}, once each")
        words = Counter()
        for text in [texts] if isinstance(texts, str) else texts:
            words.update(splitter(DIGITS).findall(_valid(text)))
        tokens, pairs = learn(words, n, {t.encode() for t in special})
        names = ["".join(CHAR[b] for b in token) for token in tokens]
        vocab = {t: i for i, t in enumerate([*names, *special])}
        added = [tokenizer_files.added(t, vocab[t]) for t in special]
        spec = tokenizer_files.spec(vocab, [[names[a], names[b]] for a, b in pairs], added, *tokenizer_files.OURS)
        return cls(spec, {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
                          "bos_token": bos, "eos_token": eos or next(iter(special), None), "pad_token": pad})


class Stream:
    """Bytes become text as soon as a character is whole; all pushes and the flush together equal decode."""

    def __init__(self, table):
        self._table, self._utf8 = table, codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, i):
        return self._utf8.decode(self._table.get(int(i), b""))

    def flush(self):
        return self._utf8.decode(b"", final=True)


def _valid(text):
    try:
        text.encode()
        return text
    except UnicodeEncodeError as e:
        raise DataError(f"the text holds a lone surrogate ({text[e.start]!a} at character {e.start}), half a "
                        "character, which UTF-8 cannot hold; write the whole one or remove it") from e
