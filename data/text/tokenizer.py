"""data/text/tokenizer.py: text -> ids and back: Hugging Face's ids at tiktoken's speed.

    text -> Unicode normalisation -> split into pieces (a regular expression) -> BPE (tiktoken) -> rank -> id

The rules come from the folder's files (tokenizer_files.py). data/text/bpe.py shows under which condition
tiktoken makes the same merges as Hugging Face's `tokenizers`; a table maps tiktoken's ranks to ids.

Deviations from `tokenizers`:
- Text that looks like a special token is text. Special tokens are added by id; encode adds no BOS and no EOS.
- SentencePiece, WordPiece and Unigram models, and lone surrogates (which are not characters), are errors.
As in `tokenizers`, bytes that the vocabulary lacks are dropped (SmolLM2 has no 0x04).

Public: Tokenizer with train, from_pretrained, save_pretrained, encode, decode, decoder, and the attributes
special (name -> id), eos, bos, pad (id or None), start_ids (ids that `tokenizers` puts in front of a text, or
None), vocab_size (largest id + 1), chat_template (Jinja or ""); Stream
"""
import codecs
import re
import unicodedata
from collections import Counter

import tiktoken

from data.text import tokenizer_files
from data.text.bpe import BYTE, CHAR, DIGITS, compile_pattern, learn_merges, tiktoken_order
from data.runtime.files import DataError

# tiktoken's regular expressions fail on a million white-space characters in a row; Python's do not.
LONG = re.compile(r"(?<!\s)\s{900000}")


class Tokenizer:
    """spec, config: the contents of tokenizer.json and tokenizer_config.json; both are kept unchanged."""

    def __init__(self, spec, config):
        self._spec = spec
        self._config = config
        merges, self._unicode_form, self._pattern = tokenizer_files.encoding_rules(spec)
        added = sorted(spec["added_tokens"], key=lambda token: token["id"])
        self.special = {token["content"]: token["id"] for token in added}
        hidden = {token["content"] for token in added if token["special"]}
        vocab = self._text_vocab(merges, hidden)
        self._build_bpe(vocab, merges)

        self._bytes |= {i: text.encode() for text, i in self.special.items()}
        self._shown_bytes = self._bytes | {self.special[text]: b"" for text in hidden}
        # Added words that are not special (Qwen3's <think>) are found in text before BPE: those that are not
        # normalized before Unicode normalisation, the others behind it.
        words = [token for token in added if not token["special"]]
        self._raw_words = _Words({t["content"]: t["id"] for t in words if not t["normalized"]})
        self._words = _Words({self._normalize(t["content"]): t["id"] for t in words if t["normalized"]})
        self._special_words = _Words({text: self.special[text] for text in hidden})
        self.vocab_size = max(self._bytes) + 1
        self.bos = self._role_id("bos_token")
        self.eos = self._role_id("eos_token")
        self.pad = self._role_id("pad_token")
        self.start_ids = tokenizer_files.start_ids(spec, self.special)
        self.chat_template = tokenizer_files.default_template(config)

    def _text_vocab(self, merges, hidden):
        """{token: id} of the tokens that text may be encoded to: all but special ones that no merge makes."""
        vocab = self._spec["model"]["vocab"]
        all_ids = vocab | self.special
        moved = any(vocab.get(text, i) != i for text, i in self.special.items())
        if len(set(all_ids.values())) < len(all_ids) or moved:
            raise DataError("two of its tokens share an id, or one token has two")
        from_text = {left + right for left, right in merges} | BYTE.keys()
        return {text: i for text, i in vocab.items() if text not in hidden or text in from_text}

    def _build_bpe(self, vocab, merges):
        """Set _bytes {id: bytes}, _ids [id of each tiktoken rank; -1: none], _bpe (tiktoken)."""
        model = self._spec["model"]
        try:
            self._bytes = {i: bytes([BYTE[c] for c in text]) for text, i in vocab.items()}
        except KeyError as e:
            raise DataError(f"its tokens hold {e}, and only byte-level BPE is supported") from e
        tokens = tiktoken_order(vocab, merges, model.get("ignore_merges"))
        self._ids = [vocab.get(c, -1) for c in CHAR] + [vocab[text] for text in tokens]
        if -1 in self._ids and model.get("unk_token"):
            raise DataError("it has no token for some bytes, but an unk_token, which is not supported")
        ranks = {bytes([b]): b for b in range(256)}
        for rank, text in enumerate(tokens, start=256):
            ranks[self._bytes[vocab[text]]] = rank
        self._bpe = tiktoken.Encoding("bpe", pat_str=self._pattern, mergeable_ranks=ranks, special_tokens={})

    def _role_id(self, role):
        """The id of the token that the config names for a role; None without one."""
        token = tokenizer_files.token_text(self._config.get(role))
        if token is not None and token not in self.special:
            raise DataError(f'its config names "{token}" as its {role}, and it has no such token')
        return self.special.get(token)

    def same_vocabulary(self, other):
        """Whether another tokenizer gives every id the same meaning."""
        return self._bytes == other._bytes and self.special == other.special

    # ---- encoding ------------------------------------------------------------------------------------------
    def encode(self, text, special=False):
        """The ids of a text. special=True reads special tokens that it names; otherwise they are text.

        Raises DataError for a lone surrogate.
        """
        _check_surrogates(text)
        if special:
            return self._special_words.encode(text, self._encode_words)
        return self._encode_words(text)

    def _encode_words(self, text):
        return self._raw_words.encode(text, self._encode_normalized)

    def _normalize(self, text):
        return unicodedata.normalize(self._unicode_form, text) if self._unicode_form else text

    def _encode_normalized(self, text):
        return self._words.encode(self._normalize(text), self._encode_bpe)

    def _encode_bpe(self, text):
        if not LONG.search(text):
            ids = [self._ids[rank] for rank in self._bpe.encode_ordinary(text)]
            if -1 not in ids:
                return ids
        # Slower: bytes without a token are dropped before BPE, so that their neighbours may merge.
        ids = []
        for piece in compile_pattern(self._pattern).finditer(text):
            known = bytes(b for b in piece.group().encode() if self._ids[b] >= 0)
            if known:
                ids += [self._ids[rank] for rank in self._bpe._encode_single_piece(known)]
        return ids

    def decode(self, ids, special=False):
        """The text of ids; special=True shows special tokens. Broken UTF-8 becomes U+FFFD; an id without a
        token (a spare row of the embedding) becomes nothing."""
        table = self._bytes if special else self._shown_bytes
        return b"".join([table.get(int(i), b"") for i in ids]).decode(errors="replace")

    def decoder(self, special=False):
        """A Stream that decodes token by token."""
        return Stream(self._bytes if special else self._shown_bytes)

    # ---- files ---------------------------------------------------------------------------------------------
    @classmethod
    def from_pretrained(cls, folder):
        """The tokenizer of a Hugging Face folder. Raises DataError for one that is not supported."""
        spec, config = tokenizer_files.read(folder)
        try:
            return cls(spec, config)
        except DataError as e:
            raise DataError(f"{folder}: {e}") from e
        except (KeyError, TypeError, AttributeError, ValueError) as e:
            fault = f"{type(e).__name__}: {e}"
            raise DataError(f"{folder}: these are not the files of a tokenizer ({fault})") from e

    def save_pretrained(self, folder):
        """Write files that `transformers` reads to the same ids. Entries that we do not use are kept."""
        tokenizer_files.write(folder, self._spec, self._config)

    def with_template(self, chat_template, start):
        """The same tokenizer, whose files have this chat_template and let `transformers` put tokens first.

        start: the texts of those tokens; none leaves the files' own rule.
        """
        return Tokenizer(*tokenizer_files.with_template(self._spec, self._config, chat_template, start))

    @classmethod
    def train(cls, texts, vocab_size, special=("<|endoftext|>",), eos=None, bos=None, pad=None,
              skip_special=False):
        """Learn a tokenizer: 256 bytes (id = byte), merges learned from texts, then the special tokens.

        eos defaults to the first special token. skip_special: the texts name special tokens, from which no
        merge is learned. vocab_size 256 + len(special) gives plain bytes; a small text
        may give fewer tokens than vocab_size. Raises DataError for a vocab_size that is too small.
        """
        n_merges = vocab_size - 256 - len(special)
        if n_merges < 0 or len(set(special)) < len(special):
            raise DataError(f"vocab_size {vocab_size} cannot hold 256 bytes and {list(special)}, once each")
        words = Counter()
        skipped = _any_of(special) if skip_special else None
        for text in [texts] if isinstance(texts, str) else texts:
            _check_surrogates(text)
            for part in skipped.split(text)[::2] if skipped else [text]:
                words.update(compile_pattern(DIGITS).findall(part))
        tokens, pairs = learn_merges(words, n_merges, {token.encode() for token in special})
        names = ["".join(CHAR[b] for b in token) for token in tokens]
        vocab = {token: i for i, token in enumerate([*names, *special])}
        merges = [[names[left], names[right]] for left, right in pairs]
        added = [tokenizer_files.added_token(token, vocab[token]) for token in special]
        spec = tokenizer_files.tokenizer_json(vocab, merges, added, *tokenizer_files.OUR_RULES)
        if eos is None and special:
            eos = special[0]
        return cls(spec, {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
                          "bos_token": bos, "eos_token": eos, "pad_token": pad})


class _Words:
    """Words {text: id} that are found in a text, the longest first where several begin."""

    def __init__(self, ids):
        self._ids = ids
        self._pattern = _any_of(ids)

    def encode(self, text, encode_rest):
        """The ids of a text; encode_rest gives those of what stands between the words."""
        if self._pattern is None:
            return encode_rest(text)
        first, *parts = self._pattern.split(text)               # text, word, text, word, ..., text
        ids = encode_rest(first)
        for word, rest in zip(parts[::2], parts[1::2]):
            ids.append(self._ids[word])
            ids += encode_rest(rest)
        return ids


class Stream:
    """Decodes token by token: push(id) returns the text that is complete by now, flush() the rest.

    All pushes and the flush together equal decode.
    """

    def __init__(self, table):
        self._table = table
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, i):
        return self._utf8.decode(self._table.get(int(i), b""))

    def flush(self):
        return self._utf8.decode(b"", final=True)


def _any_of(words):
    """A regular expression that finds any of the words, the longest first, as a group; None without words."""
    words = sorted(words, key=lambda word: (-len(word), word))
    return re.compile("(" + "|".join(map(re.escape, words)) + ")") if words else None


def _check_surrogates(text):
    """Raise DataError for half of a surrogate pair, which UTF-8 cannot encode."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise DataError(f"the text holds a lone surrogate ({text[e.start]!a} at character {e.start}), half "
                        "of a character that UTF-8 cannot encode; write it whole or remove it") from e
