"""data/text/tokenizer.py: Hugging Face's ids, by its answers, by a slow reading of its rule, by transformers."""
import copy
import itertools
import json
import os
import random
import re
import subprocess
from collections import Counter

import pytest
from make_tokenizer_fixtures import FAMILIES, FIXTURE, digest, mark, strings

from data.text.bpe import BYTE, CHAR, DIGITS, GPT2, compile_pattern, learn_merges, tiktoken_order
from data.runtime.files import DataError
from data.text.tokenizer import Tokenizer

FIXED = json.loads(FIXTURE.read_text("utf-8"))
TEXTS = strings()


def spec_of(name):
    return copy.deepcopy(FIXED["families"][name]["spec"])


def folder_of(path, spec, **files):
    """A folder with a tokenizer.json, and other files: config=... for tokenizer_config.json."""
    path.mkdir(exist_ok=True)
    for name, content in {"tokenizer": spec, **files}.items():
        name = {"config": "tokenizer_config"}.get(name, name)
        (path / f"{name}.json").write_text(json.dumps(content), "utf-8")
    return path


# ---- ids ---------------------------------------------------------------------------------------------------
def agree(tokenizer, answers):
    ids = [tokenizer.encode(text) for text in TEXTS]
    assert digest(TEXTS) == FIXED["strings"], "the strings are not those of the fixture: make it again"
    marks = re.findall("....", answers["marks"])
    assert [text for text, i, m in zip(TEXTS, ids, marks, strict=True) if mark(i) != m] == []
    assert digest([tokenizer.decode(i) for i in ids]) == answers["decoded"]


@pytest.mark.parametrize("name", FAMILIES)
def test_ids_are_those_of_hugging_face(name):
    agree(Tokenizer(spec_of(name), {}), FIXED["families"][name])


@pytest.mark.parametrize("name", FAMILIES)
def test_python_cuts_as_tiktoken_does(name, monkeypatch):
    monkeypatch.setattr("data.text.tokenizer.LONG", re.compile(""))      # everything goes the way of odd texts
    agree(Tokenizer(spec_of(name), {}), FIXED["families"][name])


def test_merges_may_be_pairs_or_lines():
    spec = spec_of("gpt2")
    spec["model"]["merges"] = [" ".join(pair) for pair in spec["model"]["merges"]]
    agree(Tokenizer(spec, {}), FIXED["families"]["gpt2"])


def test_smollm2(tmp_path):
    if not os.path.isdir(folder := os.environ.get("SMOLLM2", "")):
        pytest.skip("SMOLLM2 does not name the folder of SmolLM2-135M-Instruct")
    tokenizer = Tokenizer.from_pretrained(folder)
    assert tokenizer.encode("The capital of France is") == [504, 3575, 282, 4649, 314]
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.vocab_size) == (1, 2, 2, 49152)
    agree(tokenizer, FIXED["smollm2"])
    tokenizer.save_pretrained(tmp_path)
    agree(Tokenizer.from_pretrained(tmp_path), FIXED["smollm2"])


def slow(word, merges, vocab, whole):
    """Hugging Face's rule, read literally: join the pair that stands first in the list, leftmost first."""
    parts, index = list(word), {pair: i for i, pair in enumerate(merges)}
    while len(parts) > 1 and not (whole and word in vocab):
        rank, i = min((index.get(pair, len(merges)), i) for i, pair in enumerate(zip(parts, parts[1:])))
        if rank == len(merges):
            break
        parts[i:i + 2] = ["".join(parts[i:i + 2])]
    return [vocab[word]] if whole and word in vocab else [vocab[part] for part in parts]


@pytest.mark.parametrize("whole", [False, True])
def test_any_list_of_merges_is_followed_or_refused(whole):
    """Random lists hold what trained ones do not: two ways to a token, tokens out of reach, late parts."""
    draw, followed, refused = random.Random(0), 0, 0
    words = ["".join(w) for n in range(1, 7) for w in itertools.product("ab", repeat=n)]
    for _ in range(150):
        tokens, merges = ["a", "b"], []
        for _ in range(draw.randrange(1, 7)):
            pair = draw.choice(tokens), draw.choice(tokens)
            if pair not in merges:
                merges.append(pair)
                tokens += ["".join(pair)] if "".join(pair) not in tokens else []
        if draw.random() < 0.5:
            draw.shuffle(merges)
        if draw.random() < 0.3:                                 # a token that nothing leads to
            tokens += {"".join(draw.choices("ab", k=4))} - {*tokens}
        if closed := whole and draw.random() < 0.5:         # as out of tiktoken's files: all ways to a token
            draw.shuffle(tokens)
            splits = [(t[:i], t[i:]) for t in tokens for i in range(1, len(t))]
            merges = [pair for pair in splits if {*pair} <= {*tokens}]
            if draw.random() < 0.3:                             # ... but not together
                closed = draw.shuffle(merges)
        elif draw.random() < 0.5:                               # leave tokens without a way to them
            merges = merges[1:]
        draw.shuffle(tokens)                                    # ids say nothing about ranks
        vocab = {t: i for i, t in enumerate(tokens)}
        spec = spec_of("gpt2") | {"added_tokens": []}
        spec["model"] |= {"vocab": vocab, "merges": merges, "ignore_merges": whole}
        try:
            tokenizer = Tokenizer(spec, {})
        except DataError:
            assert not closed
            refused += 1
            continue
        followed += 1
        assert [tokenizer.encode(w) for w in words] == [slow(w, merges, vocab, whole) for w in words], merges
    assert followed > 60 and refused > 4


def test_ways_to_a_token_that_stand_apart_are_refused():
    vocab, one, two, other = {"a", "b", "aa", "aaa", "baa"}, ("a", "aa"), ("aa", "a"), ("b", "aa")
    with pytest.raises(DataError, match='"aaa"'):       # of baaa tiktoken would make b aaa, the list baa a
        tiktoken_order(vocab, [one, other, two, ("a", "a")], ignore_merges=True)
    assert tiktoken_order(vocab, [other, one, two, ("a", "a")], ignore_merges=True) == ["baa", "aaa", "aa"]


def test_the_rule_of_digits_is_two_rules_one_after_the_other():
    for text in TEXTS:
        stretches = re.split(r"(\d)", "".join(c if not c.isnumeric() else "7" for c in text))
        want = [s for part in stretches for s in ([part] if part == "7" else compile_pattern(GPT2).findall(part))]
        assert compile_pattern(DIGITS).findall("".join(stretches)) == want, text


# ---- special tokens ----------------------------------------------------------------------------------------
def test_special_tokens_are_ids_never_text():
    tokenizer = Tokenizer.train("<|endoftext|> <|end|> <|endoftext|>" * 50, 400, ["<|endoftext|>", "<|end|>"])
    n = tokenizer.vocab_size
    assert tokenizer.special == {"<|endoftext|>": n - 2, "<|end|>": n - 1}
    ids = tokenizer.encode("a<|endoftext|>b <|end|>")
    assert not {*ids} & {n - 2, n - 1} and tokenizer.decode(ids) == "a<|endoftext|>b <|end|>"
    ids = [*tokenizer.encode("a"), tokenizer.eos, *tokenizer.encode("b")]
    assert tokenizer.decode(ids) == "ab" and tokenizer.decode(ids, special=True) == "a<|endoftext|>b"
    tokenizer = Tokenizer.train("EOS EOS EOS", 300, ["EOS"])                # merges could spell it
    assert tokenizer.eos not in tokenizer.encode("EOS") and tokenizer.decode(tokenizer.encode("EOS")) == "EOS"
    spec = spec_of("llama3")
    spec["model"]["vocab"]["<｜end｜>"] = 500                                  # in no byte's spelling
    spec["added_tokens"].append({**spec["added_tokens"][0], "id": 500, "content": "<｜end｜>"})
    tokenizer = Tokenizer(spec, {"eos_token": "<｜end｜>"})
    assert tokenizer.eos == 500 not in tokenizer.encode("<｜end｜>") and tokenizer.vocab_size == 501
    assert tokenizer.decode([500], special=True) == "<｜end｜>"


def test_an_ordinary_token_may_have_a_special_role(tmp_path):
    spec = spec_of("gpt2")
    plain = Tokenizer(spec_of("gpt2"), {})
    for word in ("a", "".join(spec["model"]["merges"][0])):
        tokenizer = Tokenizer.from_pretrained(folder_of(tmp_path, spec, config={"pad_token": word}))
        assert tokenizer.pad == spec["model"]["vocab"][word]
        assert [tokenizer.encode(text) for text in TEXTS] == [plain.encode(text) for text in TEXTS]


def test_a_split_on_a_string_and_no_normalizer():
    spec = spec_of("gpt2")
    del spec["normalizer"]
    agree(Tokenizer(spec, {}), FIXED["families"]["gpt2"])
    for string, text, pieces in ((" ", "a  b c", ["a", " ", " ", "b", " ", "c"]), (".*", "a.*b*.", ["a", ".*", "b*."]),
                                 ("^[$\\", "x^[$\\y\n", ["x", "^[$\\", "y\n"])):
        step = {**SPLIT_STEP, "pattern": {"String": string}}
        spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [step, BYTES_STEP]}
        tokenizer = Tokenizer(spec, {})
        assert compile_pattern(tokenizer._pattern).findall(text) == pieces
        whole = Tokenizer(spec_of("gpt2") | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {**SPLIT_STEP, "pattern": {"Regex": "(?s:.)+"}}, BYTES_STEP]}}, {})
        assert tokenizer.encode(text) == [i for piece in pieces for i in whole.encode(piece)]


def test_added_words_that_are_not_special_are_found_in_text():
    spec = spec_of("qwen2")
    for i, word in enumerate(("<think>+", "\n\n", "\n\n\n"), start=600):
        spec["added_tokens"].append({**spec["added_tokens"][-1], "id": i, "content": word})
    tokenizer = Tokenizer(spec, {})
    ids = tokenizer.encode("a<think>\u0338b<think>+\n\n\n\n\n")   # longest first; NFC joins > and \u0338
    assert tokenizer.special["<think>"] in ids and ids[-3:] == [600, 602, 601]
    assert tokenizer.decode(ids) == "a<think>\u0338b<think>+\n\n\n\n\n" and tokenizer.vocab_size == 603
    with pytest.raises(DataError, match="lone surrogate"):
        tokenizer.encode("<think>\ud800")


@pytest.mark.parametrize("files, want", [
    ({"config": {"eos_token": "<|im_end|>", "pad_token": None}}, (None, 2, None)),
    ({"config": {"eos_token": {"content": "<|im_end|>", "lstrip": False}, "bos_token": "<|im_start|>"}},
     (1, 2, None)),
    ({"special_tokens_map": {"eos_token": {"content": "<|im_end|>"}, "pad_token": "<|endoftext|>"}},
     (None, 2, 0)),
    ({"special_tokens_map": {"eos_token": "<|im_end|>"}, "config": {"eos_token": "<|endoftext|>"}},
     (None, 0, None)),
    ({"generation_config": {"eos_token_id": [2, 0], "bos_token_id": 1, "pad_token_id": 99999}}, (1, 2, None)),
    ({"generation_config": {"eos_token_id": 2}, "config": {"eos_token": None}}, (None, None, None)),
    ({"config": {"tokenizer_class": "GPT2Tokenizer"}}, (0, 0, None)),                   # by their classes
    ({"config": {"tokenizer_class": "Qwen2TokenizerFast", "eos_token": "<|im_end|>"}}, (None, 2, 0)),
])
def test_roles(tmp_path, files, want):
    tokenizer = Tokenizer.from_pretrained(folder_of(tmp_path, spec_of("gpt2"), **files))
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == want
    tokenizer.save_pretrained(tmp_path / "copy")
    again = Tokenizer.from_pretrained(tmp_path / "copy")
    assert (again.bos, again.eos, again.pad) == want and again.special == tokenizer.special


# ---- text and bytes ----------------------------------------------------------------------------------------
def test_plain_bytes():
    tokenizer = Tokenizer.train([], 258, ("<|endoftext|>", "<pad>"), pad="<pad>")
    assert (tokenizer.vocab_size, tokenizer.eos, tokenizer.pad, tokenizer.bos) == (258, 256, 257, None)
    for text in TEXTS[:300]:
        assert tokenizer.encode(text) == list(text.encode()) and tokenizer.decode(text.encode()) == text
    assert Tokenizer.train([], 256, ()).vocab_size == 256


def test_any_text_comes_back_and_streams():
    tokenizer = Tokenizer.train(TEXTS[:500], 600)
    for text in TEXTS:
        ids, stream = tokenizer.encode(text), tokenizer.decoder()
        assert tokenizer.decode(ids) == text
        assert "".join([stream.push(i) for i in ids]) + stream.flush() == text


def test_streaming_waits_for_whole_characters():
    tokenizer = Tokenizer.train([], 257)
    stream = tokenizer.decoder()
    assert [stream.push(i) for i in "é😀".encode()] == ["", "é", "", "", "", "😀"] and stream.flush() == ""
    broken = [0xf0, 0x9f, 65, 0x80, tokenizer.eos, 0xe2, 0x82]
    stream = tokenizer.decoder()
    assert "".join(map(stream.push, broken)) + stream.flush() == "\ufffdA\ufffd\ufffd"
    assert tokenizer.decode(broken) == "\ufffdA\ufffd\ufffd"
    stream = tokenizer.decoder(special=True)
    assert stream.push(tokenizer.eos) == "<|endoftext|>"


def test_ids_without_a_token_are_silent():
    tokenizer = Tokenizer.train([], 257)
    assert tokenizer.decode([104, 9999, 105]) == "hi" and tokenizer.decoder().push(9999) == ""


def test_lone_surrogates_are_refused():
    tokenizer = Tokenizer.train([], 257)
    for text in ("ab\ud83d", "\udc80", json.loads('"\\ud83d"')):
        with pytest.raises(DataError, match="lone surrogate"):
            tokenizer.encode(text)
        with pytest.raises(DataError, match="lone surrogate"):
            Tokenizer.train(["fine", text], 300)
    assert tokenizer.encode(json.loads('"\\ud83d\\ude00"')) == list("😀".encode())


@pytest.mark.parametrize("unit", [" ", "a"])
def test_a_million_times_the_same(unit):
    tokenizer, text = Tokenizer(spec_of("digits"), {}), unit * 1_000_100        # tiktoken alone would panic
    assert tokenizer.decode(tokenizer.encode(text)) == text


# ---- training ----------------------------------------------------------------------------------------------
def naive(words, n):
    """Count every pair anew, join the most frequent (of equals, the one of smaller ids), n times."""
    tokens, pairs = [bytes([b]) for b in range(256)], []
    spelled = {word: list(word.encode()) for word in words}
    for _ in range(n):
        seen = Counter()
        for word, ids in spelled.items():
            for pair in zip(ids, ids[1:]):
                seen[pair] += words[word]
        if not seen:
            break
        best = min(seen, key=lambda pair: (-seen[pair], pair))
        for ids in spelled.values():
            i = 0
            while i < len(ids) - 1:
                if (ids[i], ids[i + 1]) == best:
                    ids[i:i + 2] = [len(tokens)]
                i += 1
        tokens.append(tokens[best[0]] + tokens[best[1]])
        pairs.append(best)
    return tokens, pairs


@pytest.mark.parametrize("seed", range(4))
def test_learning_equals_counting_anew(seed):
    draw = random.Random(seed)
    words = Counter("".join(draw.choice("aab é") for _ in range(draw.randrange(1, 9))) for _ in range(100))
    words["aaaaaaaaaaaaa"] = 20
    assert learn_merges(words, 10 ** 9) == naive(words, 10 ** 9)           # until nothing is left to join
    text = Counter(compile_pattern(DIGITS).findall(" ".join(TEXTS[seed * 100:seed * 100 + 100])))
    assert learn_merges(text, 99) == naive(text, 99)


def test_learned_pairs_by_hand():
    tokens, pairs = learn_merges(Counter({"abab": 3, "ab": 1, "bc": 2, "é": 1}), 3)
    assert pairs == [(97, 98), (256, 256), (98, 99)] and tokens[256:] == [b"ab", b"abab", b"bc"]
    assert learn_merges(Counter({"abab": 3, "bc": 2}), 2, {b"ab"})[0][256:] == [b"ba", b"aba"]


def test_training_is_a_function_of_the_text():
    one, two, three = (Tokenizer.train(t, 400) for t in (TEXTS[:500], iter(TEXTS[:500]), TEXTS[499::-1]))
    assert one.encode(" ".join(TEXTS)) == two.encode(" ".join(TEXTS)) == three.encode(" ".join(TEXTS))
    assert len(one.encode("the")) == 1 and len(one.encode("4242")) == 4 and one.vocab_size == 400
    assert Tokenizer.train("abc", 10 ** 6).vocab_size == 256 + 2 + 1        # two joins, and nothing is left


@pytest.mark.parametrize("size, special", [(256, ("<s>",)), (300, ("<s>", "<s>")), (0, ())])
def test_training_refuses_what_cannot_be(size, special):
    with pytest.raises(DataError, match="vocab_size"):
        Tokenizer.train("text", size, special)


# ---- files -------------------------------------------------------------------------------------------------
def test_saving_keeps_everything(tmp_path):
    first = Tokenizer.train(TEXTS, 500, ["<|endoftext|>", "<|user|>"], pad="<|user|>")
    config = {"config": {"chat_template": "{{ x }}", "eos_token": "<|im_end|>", "model_max_length": 99}}
    foreign = Tokenizer.from_pretrained(folder_of(tmp_path / "a", spec_of("qwen2"), **config))
    for tokenizer in (first, foreign):
        tokenizer.save_pretrained(tmp_path / "b" / "c")
        again = Tokenizer.from_pretrained(tmp_path / "b" / "c")
        assert [again.encode(t) for t in TEXTS] == [tokenizer.encode(t) for t in TEXTS]
        assert vars(again)["_spec"] == vars(tokenizer)["_spec"] and again.vocab_size == tokenizer.vocab_size
    assert json.loads((tmp_path / "b/c/tokenizer.json").read_text("utf-8")) == spec_of("qwen2")
    saved = json.loads((tmp_path / "b/c/tokenizer_config.json").read_text("utf-8"))
    assert saved.items() >= config["config"].items()


@pytest.mark.parametrize("name, config", [("gpt2", None), ("gpt2", {"tokenizer_class": "GPT2TokenizerFast"}),
                                          ("qwen2", {"tokenizer_class": "Qwen2Tokenizer"})])
def test_vocab_and_merges_alone(tmp_path, name, config):
    spec = spec_of(name)
    folder = folder_of(tmp_path, spec, **({"config": config} if config else {}), vocab=spec["model"]["vocab"],
                       added_tokens={t["content"]: t["id"] for t in spec["added_tokens"][3:]})
    (tmp_path / "tokenizer.json").unlink()
    lines = ["#version: 0.2", *(" ".join(pair) for pair in spec["model"]["merges"]), ""]
    (tmp_path / "merges.txt").write_bytes("\n".join(lines).encode())
    for t in spec["added_tokens"][3:]:
        assert not t["special"]                     # added_tokens.json does not tell; only a config makes one so
        t["normalized"] = True
    want, got = Tokenizer(spec, {}), Tokenizer.from_pretrained(folder)
    assert [got.encode(t) for t in TEXTS] == [want.encode(t) for t in TEXTS]
    assert {**got.special, **want.special} == want.special and "<think>" in got.special
    (tmp_path / "merges.txt").write_bytes("\r\n".join(lines).encode())
    assert Tokenizer.from_pretrained(folder).encode(TEXTS[50]) == want.encode(TEXTS[50])


@pytest.mark.parametrize("name, class_name", [("gpt2", "GPT2Tokenizer"), ("qwen2", "Qwen2Tokenizer")])
@pytest.mark.parametrize("files, special", [
    ({}, set()), ({"config": {"eos_token": "<|x|>"}}, {"<|x|>"}),
    ({"config": {"additional_special_tokens": ["<|x|>", {"content": "<think>"}]}}, {"<|x|>", "<think>"}),
    ({"special_tokens_map": {"eos_token": "<|x|>", "unk_token": {"content": "<think>"}}}, {"<|x|>", "<think>"}),
])
def test_added_tokens_json_names_words_that_a_config_may_make_special(tmp_path, name, class_name, files, special):
    """As in transformers: a word is found in text and shown by decode, a special token is neither."""
    spec = spec_of(name)
    words = {"<think>": 600, "<|x|>": 601, "fo\u0301o": 602}
    files = {**files, "config": {"tokenizer_class": class_name, **files.get("config", {})}}
    folder = folder_of(tmp_path, spec, vocab=spec["model"]["vocab"], added_tokens=words, **files)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "merges.txt").write_text("\n".join(map(" ".join, spec["model"]["merges"])), "utf-8")
    tokenizer = Tokenizer.from_pretrained(folder)
    assert {word: tokenizer.special[word] for word in words} == words
    for word, i in words.items():
        ids = tokenizer.encode(f"a{word}b")
        assert (i in ids) == (word not in special)
        assert tokenizer.decode([5, i]) == tokenizer.decode([5]) + ("" if word in special else word)
    # with a Unicode form a word is looked for in the normalised text, without one as it stands
    assert (602 in tokenizer.encode("f\u00f3o")) == (name == "qwen2")
    assert (600 in tokenizer.encode("<think>\u0338")) == (name == "gpt2" and "<think>" not in special)
    if name == "qwen2" and not special:
        assert tokenizer.encode("a<think>\u0338b<|x|>") == [67, 30, 366, 161, 234, 110, 68, 601]


def test_a_class_without_its_end_token_has_no_roles(tmp_path):
    spec = spec_of("gpt2")
    spec["added_tokens"][0]["content"] = spec["model"]["vocab"]["<end>"] = "<end>"
    spec["model"]["vocab"]["<end>"] = spec["model"]["vocab"].pop("<|endoftext|>")
    config = {"tokenizer_class": "GPT2Tokenizer"}
    tokenizer = Tokenizer.from_pretrained(folder_of(tmp_path, spec, config=config))
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (None, None, None)


@pytest.mark.parametrize("template, want", [
    ("{{ 1 }}", "{{ 1 }}"), (None, ""), ([{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}], "d"),
    ({"default": "d", "rag": "r"}, "d"), ([{"name": "rag", "template": "r"}], ""), ([], ""),
])
def test_chat_templates(tmp_path, template, want):
    folder = folder_of(tmp_path, spec_of("gpt2"), config={"chat_template": template})
    assert Tokenizer.from_pretrained(folder).chat_template == want
    (folder / "chat_template.jinja").write_text("{{ é }}", "utf-8")     # it goes first, as in transformers
    assert Tokenizer.from_pretrained(folder).chat_template == "{{ é }}"


def test_sentencepiece_is_refused(assets):
    with pytest.raises(DataError, match="SentencePiece"):
        Tokenizer.from_pretrained(assets / "stories260k")


def model(**changes):
    return lambda spec: spec["model"].update(changes)


def top(**changes):
    return lambda spec: spec.update(changes)


def steps(*some):
    return top(pre_tokenizer={"type": "Sequence", "pretokenizers": list(some)})


SPLIT_STEP = {"type": "Split", "pattern": {"Regex": r"\w+"}, "behavior": "Isolated", "invert": False}
GPT2_STEP = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
BYTES_STEP = {**GPT2_STEP, "use_regex": False}
FAULTS = [
    (model(byte_fallback=True), "SentencePiece"), (model(type="Unigram"), "Unigram"),
    (model(type="WordPiece"), "WordPiece"), (model(dropout=0.1), "dropout"),
    (model(end_of_word_suffix="</w>"), "end_of_word_suffix"), (model(merges=2 * [["a", "b"]]), "pair twice"),
    (model(merges=[["a", "zzz"]]), "not in its vocabulary"), (model(merges=[list("abc")]), "not the files of a tokenizer"),
    (model(merges=7), "not the files of a tokenizer"), (model(vocab=[]), "not the files of a tokenizer"),
    (top(model=None), "not the files of a tokenizer"), (lambda spec: spec.pop("model"), "not the files of a tokenizer"),
    (lambda spec: spec.pop("pre_tokenizer"), "its pre_tokenizer is {'type': 'none'}"),
    (lambda spec: spec["model"]["vocab"].update({"▁the": 9999}), "▁"),
    (lambda spec: spec["model"]["vocab"].update({"a": 5}), "share an id"),
    (lambda spec: spec["added_tokens"][0].update(id=7), "share an id"),
    (lambda spec: spec["added_tokens"][0].update(id=999), "has two"),
    (lambda spec: spec["added_tokens"][-1].update(lstrip=True), "lstrip"),
    (top(normalizer={"type": "Lowercase"}), "Lowercase"), (top(pre_tokenizer=None), "pre_tokenizer"),
    (top(pre_tokenizer={"type": "Whitespace"}), "Whitespace"),
    (top(pre_tokenizer={**GPT2_STEP, "add_prefix_space": True}), "add_prefix_space"),
    (top(pre_tokenizer=BYTES_STEP), "pre_tokenizer"),
    (steps({"type": "Digits", "individual_digits": True}, BYTES_STEP), "pre_tokenizer"),
    (steps(SPLIT_STEP, GPT2_STEP), "pre_tokenizer"),
    (steps({**SPLIT_STEP, "behavior": "Removed"}, BYTES_STEP), "pre_tokenizer"),
    (steps({**SPLIT_STEP, "invert": True}, BYTES_STEP), "pre_tokenizer"),
    (steps(SPLIT_STEP, SPLIT_STEP, BYTES_STEP), "pre_tokenizer"),
]


@pytest.mark.parametrize("change, says", FAULTS)
def test_what_is_not_understood_is_refused(tmp_path, change, says):
    spec = spec_of("gpt2")
    change(spec)
    with pytest.raises(DataError) as e:
        Tokenizer.from_pretrained(folder_of(tmp_path, spec))
    assert says in str(e.value) and str(tmp_path) in str(e.value)


def test_missing_bytes_need_no_unknown_token():
    spec = spec_of("partial")
    spec["model"]["unk_token"] = "<|endoftext|>"
    with pytest.raises(DataError, match="unk_token"):
        Tokenizer(spec, {})


@pytest.mark.parametrize("name, content, says", [
    ("tokenizer.json", "{", "not valid JSON"), ("tokenizer.json", "[]", "JSON object"),
    ("tokenizer.model", "\n", "SentencePiece"), ("vocab.json", "{}", "merges.txt"),
    ("tokenizer_config.json", '{"eos_token": "</s>"}', "</s>"),
    ("tokenizer_config.json", "[]", "JSON object"),
    ("tokenizer_config.json", '{"chat_template": 7}', "its chat_template is 7"),
    ("tokenizer_config.json", '{"chat_template": {"default": ["x"]}}', "its chat_template is ['x']"),
    ("tokenizer_config.json", '{"chat_template": [{"name": "x"}]}', "not the files of a tokenizer"),
    ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "y"}}}', "not the files of a tokenizer"),
])
def test_bad_files_are_named(tmp_path, name, content, says):
    if name == "tokenizer_config.json":
        folder_of(tmp_path, spec_of("gpt2"))
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError) as e:
        Tokenizer.from_pretrained(tmp_path)
    assert says in str(e.value) and str(tmp_path) in str(e.value)


def test_lists_of_unknown_classes_are_refused(tmp_path):
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "merges.txt").write_text("")
    for config in ({"tokenizer_class": "RobertaTokenizer"}, {"add_prefix_space": True}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        with pytest.raises(DataError, match="tokenizer.json, which is missing"):
            Tokenizer.from_pretrained(tmp_path)


def test_bytes_are_spelled_as_in_gpt2():
    assert CHAR[32] == "Ġ" and CHAR[10] == "Ċ" and CHAR[97] == "a" and CHAR[0xad] == "Ń" and CHAR[0xff] == "ÿ"
    assert len(set(CHAR)) == 256 and all(BYTE[CHAR[b]] == b for b in range(256))


# ---- transformers ------------------------------------------------------------------------------------------
PEER = """
import json, sys
from transformers import AutoTokenizer
for line in sys.stdin:
    folder, texts = json.loads(line)
    tok = AutoTokenizer.from_pretrained(folder, split_special_tokens=True)
    print(json.dumps([tok(texts, add_special_tokens=False)["input_ids"], tok.bos_token_id, tok.eos_token_id,
                      tok.pad_token_id, len(tok)]))
"""


@pytest.mark.slow
def test_transformers_reads_what_we_write(tmp_path):
    if not os.path.exists(python := os.environ.get("PEERS", "")):
        pytest.skip("PEERS does not name a Python that has transformers")
    texts = [*TEXTS, "a<think>\u0338b<|x|>c", "fo\u0301o f\u00f3o<think>"]
    ours = Tokenizer.train(TEXTS, 700, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], pad="<|im_end|>")
    tokenizers = [ours, *(Tokenizer.from_pretrained(folder_of(
        tmp_path / name, spec_of(name), config={"eos_token": "<|im_end|>"})) for name in FAMILIES)]
    lists = spec_of("qwen2")
    folder = folder_of(tmp_path / "lists", {}, vocab=lists["model"]["vocab"], config={
        "tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>"})
    (folder / "tokenizer.json").unlink()
    (folder / "merges.txt").write_text("\n".join(map(" ".join, lists["model"]["merges"])), "utf-8")
    tokenizers.append(Tokenizer.from_pretrained(folder))
    split = spec_of("gpt2")
    del split["normalizer"]
    split["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [
        {**SPLIT_STEP, "pattern": {"String": " "}}, {**BYTES_STEP, "trim_offsets": True}]}
    tokenizers.append(Tokenizer.from_pretrained(folder_of(tmp_path / "split", split)))
    lines = []
    for i, tokenizer in enumerate(tokenizers):
        tokenizer.save_pretrained(tmp_path / f"out{i}")
        lines.append(json.dumps([str(tmp_path / f"out{i}"), texts]))
    n = len(lists["model"]["vocab"])
    for files in ({}, {"special_tokens_map": {"eos_token": "<|x|>"}}):      # read there as they are
        folder = folder_of(tmp_path / f"added{len(files)}", {}, vocab=lists["model"]["vocab"], **files, config={
            "tokenizer_class": "Qwen2Tokenizer"}, added_tokens={"<think>": n, "<|x|>": n + 1, "fo\u0301o": n + 2})
        (folder / "tokenizer.json").unlink()
        (folder / "merges.txt").write_text("\n".join(map(" ".join, lists["model"]["merges"])), "utf-8")
        tokenizers.append(Tokenizer.from_pretrained(folder))
        lines.append(json.dumps([str(folder), texts]))
    run = subprocess.run([python, "-c", PEER], input="\n".join(lines), capture_output=True, text=True,
                         cwd=tmp_path, env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""})
    assert run.returncode == 0, run.stderr[-2000:]
    for tokenizer, line in zip(tokenizers, run.stdout.splitlines(), strict=True):
        ids, *roles = json.loads(line)
        assert ids == [tokenizer.encode(text) for text in texts]
        assert roles == [tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.vocab_size]


@pytest.mark.parametrize("name", [[], 7, {"a": 1}, None])
def test_a_tokenizer_class_that_is_no_string(name, tmp_path):
    Tokenizer.train(["ab ab"], 260).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": name}))
    with pytest.raises(DataError, match="tokenizer_config.json: tokenizer_class is .*; it must be a string"):
        Tokenizer.from_pretrained(tmp_path)
