"""data/text/tokenizer_files.py: what the files of a Hugging Face tokenizer say.

    tokenizer.json           all of it: normalizer, pre_tokenizer, model {vocab, merges}, added_tokens
    vocab.json, merges.txt   the model alone; for GPT-2 and Qwen2, whose other rules are known
    tokenizer_config.json    which special token is bos, eos, pad; the chat template (also in other files)

    text -> normalizer (a Unicode form, or none) -> pre_tokenizer (ByteLevel; Digits or Split, then ByteLevel)
         -> model (BPE over bytes).   post_processor, truncation and padding are kept, and not used.

Anything that would change an id and is not understood is an error, never a guess.

Public: read, write, rules, spec, added, content, OURS, ROLES
"""
import pathlib

from data.text.bpe import DIGITS, GPT2, QWEN2
from data.runtime.files import DataError, read_json, write_atomic, write_json

ROLES = ("bos_token", "eos_token", "pad_token")
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
SPLIT = {"type": "Split", "pattern": {"Regex": QWEN2}, "behavior": "Isolated", "invert": False}


def _sequence(*steps):
    return {"type": "Sequence", "pretokenizers": list(steps)}


OURS = _sequence({"type": "Digits", "individual_digits": True}, BYTE_LEVEL), None
# Classes of transformers that mean something themselves: how to cut text, and which roles <|endoftext|> has.
KNOWN = {"GPT2Tokenizer": (BYTE_LEVEL, None),
         "Qwen2Tokenizer": (_sequence(SPLIT, BYTE_LEVEL | {"use_regex": False}), {"type": "NFC"})}
END = {"GPT2Tokenizer": ("bos_token", "eos_token"), "Qwen2Tokenizer": ("eos_token", "pad_token")}


def spec(vocab, merges, added_tokens, pre_tokenizer, normalizer):
    """The contents of a tokenizer.json."""
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added_tokens,
            "normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "post_processor": None,
            "decoder": BYTE_LEVEL,
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                      "ignore_merges": False, "vocab": vocab, "merges": merges}}


def added(token, i):
    """An entry of added_tokens, or of added_tokens_decoder with its id."""
    return {"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": True}


def content(token):
    """A token's text; some files give an object where others give a string."""
    return token["content"] if isinstance(token, dict) else token


def read(folder):
    """(spec, config) of a folder, whichever of the files it has."""
    folder = pathlib.Path(folder)
    config = _object(folder / "special_tokens_map.json") | _object(folder / "tokenizer_config.json")
    if (folder / "tokenizer.json").exists():
        out = _object(folder / "tokenizer.json")
    elif (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        out = _from_lists(folder, config)
    else:
        raise DataError(f"{folder} has no tokenizer.json, nor vocab.json with merges.txt; byte-level BPE "
                        "comes as one of these (a SentencePiece tokenizer.model is not read)")
    try:
        _gather(folder, out, config)
    except DataError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, OSError) as e:
        raise DataError(f"{folder}: not a tokenizer's files ({type(e).__name__}: {e})") from e
    return out, config


def _object(path):
    out = read_json(path) if path.exists() else {}
    if type(out) is not dict:
        raise DataError(f"{path} holds no JSON object")
    return out


def _from_lists(folder, config):
    kind = config.setdefault("tokenizer_class", "GPT2Tokenizer").removesuffix("Fast")
    if kind not in KNOWN or config.get("add_prefix_space"):
        raise DataError(f"{folder}: how {kind} cuts text is written in tokenizer.json, which is missing; "
                        f"without it, only {' and '.join(KNOWN)} are known, with add_prefix_space off")
    try:
        lines = (folder / "merges.txt").read_bytes().decode().replace("\r\n", "\n").split("\n")
    except (OSError, ValueError) as e:
        raise DataError(f"{folder / 'merges.txt'} cannot be read ({e})") from e
    merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    return spec(_object(folder / "vocab.json"), merges, [], *KNOWN[kind])


def _gather(folder, spec, config):
    """Bring into spec and config what other files say of special tokens, their roles, the chat template."""
    vocab, tokens = spec["model"]["vocab"], {t["content"]: t for t in spec.get("added_tokens", [])}
    for i, t in config.get("added_tokens_decoder", {}).items():
        tokens.setdefault(t["content"], added(t["content"], int(i)) | t)
    for t, i in _object(folder / "added_tokens.json").items():
        tokens.setdefault(t, added(t, i))
    names = {i: t for t, i in vocab.items()} | {t["id"]: t["content"] for t in tokens.values()}
    ids = _object(folder / "config.json") | _object(folder / "generation_config.json")
    kind = config.setdefault("tokenizer_class", "PreTrainedTokenizerFast").removesuffix("Fast")
    for role in END.get(kind, ()):
        if "<|endoftext|>" in names.values():
            config.setdefault(role, "<|endoftext|>")
    for role in ROLES:
        i = ids.get(role + "_id")
        i = i[0] if isinstance(i, list) else i                  # several ways to end: the first
        if i in names:
            config.setdefault(role, names[i])
        if (token := content(config.get(role))) in vocab:
            tokens.setdefault(token, added(token, vocab[token]))
    if (folder / "chat_template.jinja").exists():
        config.setdefault("chat_template", (folder / "chat_template.jinja").read_text("utf-8"))
    spec["added_tokens"] = sorted(tokens.values(), key=lambda t: t["id"])


def write(folder, spec, config):
    folder = pathlib.Path(folder)
    write_json(folder / "tokenizer.json", spec)
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "vocab.json", spec["model"]["vocab"])
    write_atomic(folder / "merges.txt", "\n".join(["#version: 0.2", *map(" ".join, _merges(spec))]) + "\n")


def rules(spec):
    """(merges, Unicode form or None, regular expression): all that decides ids, beside the vocabulary."""
    return _merges(spec), _form(spec), _pattern(spec)


def _merges(spec):
    model = spec["model"]
    if model.get("type", "BPE") != "BPE" or model.get("byte_fallback"):
        kind = "SentencePiece (BPE with byte_fallback)" if model.get("byte_fallback") else model["type"]
        raise DataError(f"its model is {kind}; only byte-level BPE is read (GPT-2, Llama 3, Qwen, SmolLM)")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise DataError(f"its model has {key} {model[key]!r}, which byte-level BPE goes without")
    return [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]


def _form(spec):
    kind = (spec["normalizer"] or {"type": None})["type"]
    if kind not in (None, "NFC", "NFD", "NFKC", "NFKD"):
        raise DataError(f"its normalizer is {kind}; known are NFC, NFD, NFKC, NFKD and none")
    words = [t for t in spec["added_tokens"] if not t["special"]]
    if any(t["lstrip"] or t["rstrip"] or t["single_word"] or t["normalized"] and kind for t in words):
        raise DataError("it has added words with lstrip, rstrip, single_word or normalized: not supported")
    return kind


def _pattern(spec):
    """One regular expression that cuts as the steps do, one after the other."""
    cut = spec["pre_tokenizer"] or {"type": "none"}
    *first, last = cut["pretokenizers"] if cut["type"] == "Sequence" else [cut]
    if last["type"] == "ByteLevel" and not last["add_prefix_space"]:
        kinds, gpt2 = [step["type"] for step in first], last.get("use_regex", True)
        if kinds == [] and gpt2:
            return GPT2
        if kinds == ["Digits"] and gpt2:
            return DIGITS if first[0]["individual_digits"] else DIGITS.replace(r"\p{N}|", r"\p{N}+|", 1)
        if kinds == ["Split"] and not gpt2 and {**first[0], "pattern": 0} == {**SPLIT, "pattern": 0}:
            rule = first[0]["pattern"]["Regex"]
            return f"{rule}|(?:(?!{rule})(?s:.))+"              # what no match covers is a piece, too
    raise DataError(f"its pre_tokenizer is {cut}; known are ByteLevel, Digits + ByteLevel, and an isolating "
                    "Split by a Regex + ByteLevel, with add_prefix_space off")
