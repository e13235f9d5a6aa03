"""Make tests/fixtures/chat/: what transformers' apply_chat_template says about conversations of all sorts.

    python tests/make_chat_fixtures.py [SMOLLM2_FOLDER]                 # needs transformers

For three families a small tokenizer (trained here) and a Jinja template that follows the family's published
format; for the real SmolLM2-135M-Instruct, whose files are not kept here, only the ids.
"""
import json
import pathlib
import random
import shutil
import sys
import tempfile

FOLDER = pathlib.Path(__file__).parent / "fixtures" / "chat"
QWEN2 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
         r"|\s+(?!\S)|\s+")
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def split(regex):
    cut = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [cut, BYTES]}


CHATML = ("{%% for m in messages %%}{%% if loop.first and m.role != 'system' %%}{{ '%s' }}{%% endif %%}"
          "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{%% endfor %%}"
          "{%% if add_generation_prompt %%}{{ '<|im_start|>assistant\n' }}{%% endif %%}")
LLAMA3 = ("{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
          "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}"
          "{% endfor %}{% if add_generation_prompt %}"
          "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")
TURNS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
HEADERS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
DIGITS = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True},
                                                {**BYTES, "use_regex": True}]}
FAMILIES = {        # pre-tokenizer, special tokens, template, bos, eos
    "smol": (DIGITS, TURNS, CHATML % "<|im_start|>system\nYou are Smol, a model.<|im_end|>\n", 1, 2),
    "qwen": (split(QWEN2), TURNS, CHATML % r"<|im_start|>system\nYou are Qwen, a model.<|im_end|>\n",
             None, 2),
    "llama3": (split(QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")), HEADERS, LLAMA3, 0, 4),
}


def conversations():
    """Texts with spaces and newlines where they hurt; answers begin with a letter (see data/text/chat.py)."""
    rng = random.Random(0)
    words = ["Hello", " there", "\n", "\n\n", "  ", " is", " 2024", "42", "'s", "!?", " 你好", " café", "\t",
             "?\n", " 👩‍👩‍👧"]

    def text(start=""):
        return start + "".join(rng.choices(words, k=rng.randrange(8)))
    fixed = [["user"], ["user", "assistant"], ["system", "user", "assistant"], ["user", "user", "assistant"],
             ["user", "assistant", "assistant"], ["user", "assistant", "user", "assistant"], ["assistant"]]
    roles = ["system", "user", "assistant"]
    for roles in fixed + [rng.choices(roles, k=rng.randrange(1, 7)) for _ in range(40)]:
        yield [{"role": role, "content": text("Yes" if role == "assistant" else "")} for role in roles]


def answers(folder):
    from transformers import AutoTokenizer
    tok = AutoTokenizer.from_pretrained(folder)
    out = []
    for messages in conversations():
        whole, asked = (tok.apply_chat_template(messages, add_generation_prompt=go, return_dict=False)
                        for go in (False, True))
        assert asked[:len(whole)] == whole
        out.append([len(whole), asked])
    return out


def main(smollm2=None):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    shutil.rmtree(FOLDER, ignore_errors=True)
    out = {"conversations": list(conversations())}
    for name, (cut, special, template, bos, eos) in FAMILIES.items():
        spec = json.loads(Tokenizer(models.BPE()).to_str())
        tok = Tokenizer.from_str(json.dumps(spec | {"pre_tokenizer": cut, "decoder": BYTES}))
        texts = [m["role"] + "\n" + m["content"] for turns in conversations() for m in turns]
        tok.train_from_iterator(texts * 3 + ["\n\n", "\n\n\n", "##\n\n"] * 20, trainers.BpeTrainer(
            vocab_size=340, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False))
        (FOLDER / name).mkdir(parents=True)
        (FOLDER / name / "tokenizer.json").write_text(tok.to_str(), "utf-8")
        (FOLDER / name / "tokenizer_config.json").write_text(json.dumps(
            {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
             "bos_token": None if bos is None else special[bos], "eos_token": special[eos],
             "chat_template": template}, indent=1), "utf-8")
        out[name] = answers(FOLDER / name)
    if smollm2:
        with tempfile.TemporaryDirectory() as copy:         # without the weights
            for file in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(pathlib.Path(smollm2) / file, copy)
            out["smollm2"] = answers(copy)
    text = json.dumps(out, ensure_ascii=False, separators=(",", ":"))
    (FOLDER / "answers.json").write_text(text, "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
