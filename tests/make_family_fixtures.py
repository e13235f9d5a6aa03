"""Make tests/fixtures/families.json: tokenizers and chat templates in the style of GLM-4, Pythia and Mistral Nemo.

    python tests/make_family_fixtures.py            # needs transformers

Small tokenizers are trained here with each family's rules: its regular expression, normalizer, special tokens,
added words and post-processor. Of the 2,000 strings of make_tokenizer_fixtures.py the fixture holds hashes of the
ids that `tokenizers` gives; of the conversations of make_chat_fixtures.py the ids of apply_chat_template.
"""
import json
import pathlib
import tempfile

from make_chat_fixtures import conversations
from make_tokenizer_fixtures import BYTES, GPT2, LLAMA3, answers, digest, sequence, split, strings

FIXTURE = pathlib.Path(__file__).parent / "fixtures" / "families.json"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = (rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*|\p{{N}}"
          r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
GLM4_TOKENS = ["<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>",
               "<|assistant|>", "<|observation|>"]
# Tools and metadata as chat templates of this family treat them: absent here, and written as nothing.
GLM4_CHAT = ("[gMASK]<sop>{% for m in messages %}"
             "{% if m['tools'] is defined %}{{ '<|system|>\n' + m['tools'] }}{% endif %}"
             "{{ '<|' + m['role'] + '|>' }}{{ m['metadata'] }}{{ '\n' + m['content'] }}{% endfor %}"
             "{% if add_generation_prompt %}<|assistant|>{% endif %}")
FAMILIES = {            # pre-tokenizer, normalizer, special tokens in front of the vocabulary, and behind it
    "glm4": (sequence(split(LLAMA3), BYTES), None, [], GLM4_TOKENS),
    "pythia": (GPT2, {"type": "NFC"}, ["<|endoftext|>", "<|padding|>"], []),
    "tekken": (sequence(split(TEKKEN), BYTES), None, ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"], []),
}
SPACES = [" " * n for n in range(24, 1, -1)]            # words of Pythia's, found before the text is split


def processor(tokenizer, tokens):
    """What puts tokens in front of a text."""
    from tokenizers import processors
    first = processors.TemplateProcessing(
        single=" ".join([*tokens, "$A"]), pair=" ".join([*tokens, "$A $B:1"]),
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in tokens])
    return processors.Sequence([processors.ByteLevel(trim_offsets=False), first])


def build(name):
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
    cut, normalizer, first, last = FAMILIES[name]
    spec = json.loads(Tokenizer(models.BPE()).to_str())
    tok = Tokenizer.from_str(json.dumps(spec | {"pre_tokenizer": cut, "normalizer": normalizer, "decoder": GPT2}))
    tok.train_from_iterator(strings(4000, seed=1), trainers.BpeTrainer(
        vocab_size=480, special_tokens=first, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False))
    tok.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in last])
    if name == "pythia":
        tok.add_tokens([AddedToken(word, normalized=True) for word in SPACES])
    if name == "glm4":
        tok.post_processor = processor(tok, ["[gMASK]", "<sop>"])
    return tok


def talks(tok):
    """[length without the opening of an answer, ids with it] of each conversation."""
    from transformers import AutoTokenizer
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, "bos_token": None,
              "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "chat_template": GLM4_CHAT}
    out = []
    with tempfile.TemporaryDirectory() as folder:
        tok.save(folder + "/tokenizer.json")
        (pathlib.Path(folder) / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
        theirs = AutoTokenizer.from_pretrained(folder)
        for messages in conversations():
            whole, asked = (theirs.apply_chat_template(messages, add_generation_prompt=go, return_dict=False)
                            for go in (False, True))
            out.append([len(whole), asked])
    return config, out


def main():
    from tokenizers import Tokenizer
    texts = strings()
    out = {"strings": digest(texts), "conversations": list(conversations()), "tokenizers": {}}
    for name in FAMILIES:
        tok = build(name)
        spec = tok.to_str()
        out["tokenizers"][name] = {"spec": json.loads(spec), **answers(Tokenizer.from_str(spec), texts)}
        if name == "glm4":
            out["glm4_config"], out["glm4_talks"] = talks(Tokenizer.from_str(spec))
    FIXTURE.write_text(json.dumps(out, ensure_ascii=False, separators=(",", ":")), "utf-8")


if __name__ == "__main__":
    main()
