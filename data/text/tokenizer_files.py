"""data/text/tokenizer_files.py: the files of a Hugging Face tokenizer, in and out.

    tokenizer.json           everything: normalizer, pre_tokenizer, model {vocab, merges}, added_tokens
    vocab.json, merges.txt   the model alone; enough for GPT-2 and Qwen2, whose other rules are known
    tokenizer_config.json    which special token is bos, eos, pad; the chat template (also in other files)

    text -> normalizer (a Unicode form, or none) -> pre_tokenizer (ByteLevel; Digits or Split, then ByteLevel)
         -> model (BPE over bytes).   post_processor (but for start_ids), truncation and padding are kept, and
         not used.

"spec" is the content of tokenizer.json, "config" that of tokenizer_config.json. Any setting that would change
an id and is not supported is an error.

Public: read, write, with_template, default_template, encoding_rules, start_ids, tokenizer_json, added_token,
token_text, OUR_RULES, ROLES
"""
import pathlib
import re

from data.text.bpe import DIGITS, GPT2, QWEN2
from data.runtime.files import DataError, read_json, write_atomic, write_json

ROLES = ("bos_token", "eos_token", "pad_token")
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
SPLIT = {"type": "Split", "pattern": {"Regex": QWEN2}, "behavior": "Isolated", "invert": False}
UNICODE_FORMS = ("NFC", "NFD", "NFKC", "NFKD")
END_OF_TEXT = "<|endoftext|>"


def _sequence(*steps):
    return {"type": "Sequence", "pretokenizers": list(steps)}


# (pre_tokenizer, normalizer) of the tokenizers that we train ...
OUR_RULES = (_sequence({"type": "Digits", "individual_digits": True}, BYTE_LEVEL), None)
# ... and of the classes of transformers that imply their own; and the roles that <|endoftext|> has in those.
KNOWN_RULES = {"GPT2Tokenizer": (BYTE_LEVEL, None),
               "Qwen2Tokenizer": (_sequence(SPLIT, BYTE_LEVEL | {"use_regex": False}), {"type": "NFC"})}
END_OF_TEXT_ROLES = {"GPT2Tokenizer": ("bos_token", "eos_token"),
                     "Qwen2Tokenizer": ("eos_token", "pad_token")}


def tokenizer_json(vocab, merges, added_tokens, pre_tokenizer, normalizer):
    """The content of a tokenizer.json for byte-level BPE."""
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added_tokens,
            "normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "post_processor": None,
            "decoder": BYTE_LEVEL,
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                      "ignore_merges": False, "vocab": vocab, "merges": merges}}


def added_token(token, i, special=True):
    """The entry of added_tokens for a token with id i. As in transformers, words stand in normalised text."""
    return {"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": not special, "special": special}


def token_text(token):
    """A token's text; some files hold an object where others hold a string."""
    return token["content"] if isinstance(token, dict) else token


# ---- reading -----------------------------------------------------------------------------------------------
def read(folder):
    """(spec, config) of a folder. Raises DataError for missing, broken or contradicting files."""
    folder = pathlib.Path(folder)
    config = _read_object(folder / "special_tokens_map.json") | _read_object(folder / "tokenizer_config.json")
    if not isinstance(config.get("tokenizer_class", ""), str):
        raise DataError(f"{folder}/tokenizer_config.json: tokenizer_class is {config['tokenizer_class']!r:.80}; "
                        "it must be a string")
    if (folder / "tokenizer.json").exists():
        spec = _read_object(folder / "tokenizer.json")
    elif (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        spec = _spec_from_lists(folder, config)
    else:
        raise DataError(f"{folder} has no tokenizer.json, nor vocab.json with merges.txt; byte-level BPE "
                        "comes as one of these (a SentencePiece tokenizer.model is not supported)")
    try:
        _add_special_tokens(folder, spec, config)
        _add_roles(folder, spec, config)
        _add_chat_template(folder, config)
    except DataError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, OSError) as e:
        raise DataError(f"{folder}: these are not the files of a tokenizer ({type(e).__name__}: {e})") from e
    return spec, config


def _read_object(path):
    """A JSON object; {} when the file does not exist."""
    value = read_json(path) if path.exists() else {}
    if type(value) is not dict:
        raise DataError(f"{path} holds no JSON object")
    return value


def _class_name(config, default):
    """The tokenizer's class without "Fast"; the default is also written into the config."""
    return config.setdefault("tokenizer_class", default).removesuffix("Fast")


def _spec_from_lists(folder, config):
    """The spec of a folder that has vocab.json and merges.txt only."""
    name = _class_name(config, "GPT2Tokenizer")
    if name not in KNOWN_RULES or config.get("add_prefix_space"):
        raise DataError(f"{folder}: how {name} splits text is written in tokenizer.json, which is missing; "
                        f"without it, only {' and '.join(KNOWN_RULES)} are known, with add_prefix_space off")
    try:
        text = (folder / "merges.txt").read_bytes().decode()
    except (OSError, ValueError) as e:
        raise DataError(f"{folder / 'merges.txt'} cannot be read ({e})") from e
    lines = text.replace("\r\n", "\n").split("\n")
    merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    pre_tokenizer, normalizer = KNOWN_RULES[name]
    return tokenizer_json(_read_object(folder / "vocab.json"), merges, [], pre_tokenizer, normalizer)


def _add_special_tokens(folder, spec, config):
    """Add to the spec the special tokens of other files; for a token in both, the spec's entry stays."""
    tokens = {token["content"]: token for token in spec.get("added_tokens", [])}
    for i, token in config.get("added_tokens_decoder", {}).items():
        tokens.setdefault(token["content"], added_token(token["content"], int(i)) | token)
    special = _special_texts(config)
    for text, i in _read_object(folder / "added_tokens.json").items():
        tokens.setdefault(text, added_token(text, i, text in special))
    spec["added_tokens"] = list(tokens.values())


def _special_texts(config):
    """The texts that a config names in any role, or as additional special tokens."""
    named = [value for key, value in config.items() if key.endswith("_token")]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        value = config.get(key) or []
        named += value.values() if isinstance(value, dict) else value
    return {token_text(token) for token in named if isinstance(token, (str, dict))}


def _add_roles(folder, spec, config):
    """Add to the config the roles (bos, eos, pad) that other files or the tokenizer's class imply."""
    vocab = spec["model"]["vocab"]
    tokens = {token["content"]: token for token in spec["added_tokens"]}
    names = {i: text for text, i in vocab.items()}
    names |= {token["id"]: token["content"] for token in tokens.values()}
    model_config = _read_object(folder / "config.json") | _read_object(folder / "generation_config.json")
    name = _class_name(config, "PreTrainedTokenizerFast")
    if END_OF_TEXT in names.values():
        for role in END_OF_TEXT_ROLES.get(name, ()):
            config.setdefault(role, END_OF_TEXT)
    for role in ROLES:
        i = model_config.get(role + "_id")
        if isinstance(i, list):                                 # several end tokens: the first is ours
            i = i[0] if i else None
        if i in names:
            config.setdefault(role, names[i])
        text = token_text(config.get(role))
        if text in vocab:
            tokens.setdefault(text, added_token(text, vocab[text]))
    spec["added_tokens"] = sorted(tokens.values(), key=lambda token: token["id"])


def _add_chat_template(folder, config):
    """As in transformers, a file of its own replaces the config's."""
    path = folder / "chat_template.jinja"
    if path.exists():
        config["chat_template"] = path.read_text("utf-8")


def default_template(config):
    """The chat template (Jinja) of a config, "" without one; of several named ones, "default". DataError."""
    template = config.get("chat_template") or ""
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}
    if isinstance(template, dict):
        template = template.get("default", "")
    if not isinstance(template, str):
        raise DataError(f"its chat_template is {template!r:.60}; it must be text, or a list of named texts")
    return template


# ---- writing -----------------------------------------------------------------------------------------------
def with_template(spec, config, chat_template, start):
    """(spec, config) with another chat template, and with the tokens `start`, if any, before what is encoded.

    A single one becomes the BOS where there is none.
    """
    config = config | {"chat_template": chat_template}
    if not start:
        return spec, config
    single, second = ([*({"SpecialToken": {"id": token, "type_id": n}} for token in start),
                       {"Sequence": {"id": name, "type_id": n}}] for n, name in enumerate("AB"))
    ids = {token["content"]: token["id"] for token in spec["added_tokens"]}
    known = {token: {"id": token, "ids": [ids[token]], "tokens": [token]} for token in start}
    first = {"type": "TemplateProcessing", "single": single, "pair": single + second, "special_tokens": known}
    config.pop("add_bos_token", None)                   # with it transformers would make a rule of its own
    if config.get("bos_token") is None and len(start) == 1:
        config["bos_token"] = start[0]
    return spec | {"post_processor": first}, config


def write(folder, spec, config):
    """Write tokenizer.json, tokenizer_config.json, vocab.json and merges.txt."""
    folder = pathlib.Path(folder)
    merges = [" ".join(pair) for pair in _merges(spec)]
    write_json(folder / "tokenizer.json", spec)
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "vocab.json", spec["model"]["vocab"])
    write_atomic(folder / "merges.txt", "\n".join(["#version: 0.2", *merges]) + "\n")


def start_ids(spec, special):
    """The ids that the post_processor puts in front of a text; None if it adds some behind it, too."""
    top = spec.get("post_processor") or {}
    pieces = [piece for step in top.get("processors", [top]) if step.get("type") == "TemplateProcessing"
              for piece in step["single"]]
    names = [piece["SpecialToken"]["id"] if "SpecialToken" in piece else None for piece in pieces]
    before = names[:names.index(None)] if None in names else names
    if len(names) > len(before) + 1:
        return None
    return [special[name] for name in before]


# ---- what decides ids --------------------------------------------------------------------------------------
def encoding_rules(spec):
    """(merges, Unicode form or None, regular expression): what decides ids, beside the vocabulary.

    Raises DataError for any setting that is not supported.
    """
    return _merges(spec), _unicode_form(spec), _pattern(spec)


def _merges(spec):
    """[(left, right)] in the order of the file."""
    model = spec["model"]
    model_type = model.get("type", "BPE")
    if model.get("byte_fallback"):
        model_type = "SentencePiece (BPE with byte_fallback)"
    if model_type != "BPE":
        raise DataError(f"its model is {model_type}; only byte-level BPE is supported (GPT-2, Llama 3, Qwen, "
                        "SmolLM)")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise DataError(f"its model has {key} {model[key]!r}, which is not supported for byte-level BPE")
    return [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]


def _unicode_form(spec):
    normalizer = spec.get("normalizer")
    form = normalizer["type"] if normalizer else None
    if form is not None and form not in UNICODE_FORMS:
        raise DataError(f"its normalizer is {form}; supported are {', '.join(UNICODE_FORMS)} and none")
    for token in spec["added_tokens"]:
        if token["special"]:
            continue
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            raise DataError("it has added words with lstrip, rstrip or single_word, which are not supported")
    return form


def _is_isolating(split):
    """Whether a Split step differs from SPLIT in its pattern only."""
    return split | {"pattern": None} == SPLIT | {"pattern": None}


def _regex(pattern):
    """The pattern of a Split step, a regular expression or a plain string, as a regular expression."""
    if "Regex" in pattern:
        return pattern["Regex"]
    return re.sub(r"([\\.+*?()|\[\]{}^$])", r"\\\1", pattern["String"])


def _pattern(spec):
    """One regular expression that splits text as all steps of the pre_tokenizer do, one after another."""
    pre_tokenizer = spec.get("pre_tokenizer") or {"type": "none"}
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    *first, last = steps
    if last["type"] == "ByteLevel" and not last["add_prefix_space"]:
        step_types = [step["type"] for step in first]
        splits_like_gpt2 = last.get("use_regex", True)
        if step_types == [] and splits_like_gpt2:
            return GPT2
        if step_types == ["Digits"] and splits_like_gpt2:
            return DIGITS if first[0]["individual_digits"] else DIGITS.replace(r"\p{N}|", r"\p{N}+|", 1)
        if step_types == ["Split"] and not splits_like_gpt2 and _is_isolating(first[0]):
            pattern = _regex(first[0]["pattern"])
            return f"{pattern}|(?:(?!{pattern})(?s:.))+"        # text between two matches is a piece, too
    raise DataError(f"its pre_tokenizer is {pre_tokenizer}; supported are ByteLevel, Digits + ByteLevel, and "
                    "an isolating Split + ByteLevel, with add_prefix_space off")
