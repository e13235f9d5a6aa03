"""Make tests/fixtures/tokenizer.json: what Hugging Face's tokenizers says about thousands of odd strings.

    python tests/make_tokenizer_fixtures.py [SMOLLM2_FOLDER]            # needs the package tokenizers

The strings come from a seed (`strings`), so the fixture holds only 16 bits of a hash of the ids of each, and
the files of small tokenizers of six kinds. The tests import `strings`, `mark` and `digest` from here.
"""
import hashlib
import json
import pathlib
import random
import sys

FIXTURE = pathlib.Path(__file__).parent / "fixtures" / "tokenizer.json"
QWEN2 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
         r"|\s+(?!\S)|\s+")
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
GPT2 = {**BYTES, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}


def sequence(*steps):
    return {"type": "Sequence", "pretokenizers": list(steps)}


def split(regex):
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


# name: pre_tokenizer, normalizer, ignore_merges.  "partial" cuts by a rule that does not match everything.
FAMILIES = {
    "gpt2": (GPT2, None, False),
    "digits": (sequence(DIGITS, GPT2), None, False),
    "numbers": (sequence({**DIGITS, "individual_digits": False}, GPT2), None, False),
    "llama3": (sequence(split(LLAMA3), BYTES), None, True),
    "qwen2": (sequence(split(QWEN2), BYTES), {"type": "NFC"}, False),
    "partial": (sequence(split(r"\p{L}+|\p{N}{1,2}"), BYTES), None, False),
}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
WORDS = """the The THE quick brown fox jumps over lazy dog capital of France is Paris isn't we'll they've I'm
    you'd she's John's 'tis o'clock CAN'T WE'LL naïve café Zürich Ærøskøbing français ñandú straße ﬁnance ſ
    'ſ привет мир 你好 世界 東京 안녕 こんにちは カタカナ مرحبا שלום हिन्दी ไทย 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 a1b2 42 3.14 1,000,000 2024-06-30
    x=y+1; foo_bar() {} [] <b> </b> \\n #hash @me http://a.b/c?d=e&f=g% --- ... !!! ?! “q” ‘s’ ’s ٣٤٥ Ⅷ ½ ² ³
    ⑦ १२३ 〇 三 a.m. U.S. e-mail <|endoftext|> <|im_start|> <|im_end|> <s> </s> <think> </think>""".split()
SPACES = [" ", "  ", "   ", " " * 7, "\t", "\n", "\n\n", "\r\n", "\r", "\x0b", "\x0c", "\x85", "\xa0",
          "\u1680", "\u2003", "\u2028", "\u2029", "\u202f", "\u3000", " \n ", "\t\t ", "\u200b", "\ufeff",
          "\x1c", "\x1f", ""]
EMOJI = ["😀", "👍🏽", "👩‍👩‍👧‍👦", "🇫🇷", "❤️", "🏳️‍🌈", "1️⃣", "☕", "𓀀", "\U000f0000", "\U0010ffff",
         "\U00040000", "\U00080000"]
MARKS = ["e\u0301", "A\u030a", "\u1112\u1161\u11ab", "\u0344", "q\u0307\u0323", "q\u0323\u0307", "\u212b",
         "\uf900", "\u0301", "=\u0338", "e\u0301\u0301", "ﷺ", "\u0e33", "\u1e9b\u0323"]
# Blocks whose characters are old: every Unicode version in use agrees on them.
BLOCKS = [(0x00, 0x7f), (0x80, 0x24f), (0x370, 0x3ff), (0x400, 0x45f), (0x5d0, 0x5ea), (0x621, 0x64a),
          (0x905, 0x939), (0x2000, 0x206f), (0x2150, 0x2188), (0x2460, 0x24ff), (0x3041, 0x30fe),
          (0x4e00, 0x9fa5), (0xac00, 0xd7a3), (0xff01, 0xff9d), (0x1d400, 0x1d454), (0x1f600, 0x1f64f),
          (0x20000, 0x2a6d6), (0xe0100, 0xe01ef)]


def strings(n=2000, seed=0):
    """n strings, the same on every machine."""
    draw = random.Random(seed)

    def one(of):
        return of[draw.randrange(len(of))]

    def character():
        low, high = one(BLOCKS)
        return chr(low + draw.randrange(high - low + 1))
    kinds = [lambda: one(WORDS), lambda: one(SPACES), lambda: " " + one(WORDS), lambda: one(EMOJI),
             lambda: one(MARKS), lambda: str(draw.randrange(10 ** draw.randrange(1, 9))), character,
             lambda: chr(draw.randrange(128)), lambda: chr(draw.randrange(33)), lambda: one("!?.-= aeiou'"),
             lambda: one("ab") * draw.randrange(1, 9)]
    out = ["", " ", "\n", "a", "\x00", "\x04", "!\x04!", "a\x04b", " \x04the", "The capital of France is"]
    while len(out) < n:
        some = [one(kinds) for _ in range(draw.randrange(1, 5))]
        out.append("".join(one(some)() for _ in range(draw.randrange(1, 16))))
    return out


def mark(ids):
    """16 bits of a hash of a list of ids, in hexadecimal."""
    return hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest()[:4]


def digest(texts):
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def answers(tokenizer, texts):
    tokenizer.encode_special_tokens = True              # special tokens in the text are text
    ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    return {"marks": "".join(map(mark, ids)), "decoded": digest([tokenizer.decode(i) for i in ids])}


def main(smollm2=None):
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
    texts, alphabet = strings(), sorted(pre_tokenizers.ByteLevel.alphabet())
    out = {"strings": digest(texts), "families": {}}
    for name, (cut, normalizer, whole) in FAMILIES.items():
        spec = json.loads(Tokenizer(models.BPE()).to_str())
        tok = Tokenizer.from_str(json.dumps(
            spec | {"pre_tokenizer": cut, "normalizer": normalizer, "decoder": GPT2}))
        known = [c for c in alphabet if name != "partial" or c not in "ĀĄĆÀÁñòóô"]    # as SmolLM2 lacks some
        tok.train_from_iterator(strings(4000, seed=1), trainers.BpeTrainer(
            vocab_size=480, special_tokens=SPECIAL, initial_alphabet=known, limit_alphabet=len(known),
            show_progress=False))
        tok.add_tokens([AddedToken(word, normalized=False) for word in ("<think>", "</think>")])
        spec = json.loads(tok.to_str())
        spec["model"]["ignore_merges"] = whole
        out["families"][name] = {"spec": spec, **answers(Tokenizer.from_str(json.dumps(spec)), texts)}
    if smollm2:
        out["smollm2"] = answers(Tokenizer.from_file(smollm2 + "/tokenizer.json"), texts)
    FIXTURE.parent.mkdir(exist_ok=True)
    FIXTURE.write_text(json.dumps(out, ensure_ascii=False, separators=(",", ":")), "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
