"""What `transformers` makes of the folders that we write: prompts, start tokens, and where generation stops."""
import json
import os
import subprocess

import pytest
import torch

import train
from data.text import chat
from data.text.tokenizer import Tokenizer
from model import GPT, GPTConfig, generate

TEMPLATES = [record.name for record in chat.TEMPLATES]
SPECIAL = ["<|endoftext|>", *dict.fromkeys(token for record in chat.TEMPLATES for token in record.tokens)]
HERMES = ("{{bos_token}}{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
          "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
ROWS = [{"prompt": "ab", "completion": "cab"}] * 8


def read(folder, name):
    return json.loads((folder / name).read_text("utf-8"))


def make_base(folder, config=None, family="gpt2", **files):
    """A model of one layer that knows the tokens of every template, and its generation_config.json."""
    tokenizer = Tokenizer.train("a cab, two cabs\nuser\nassistant" * 9, 300, SPECIAL)
    torch.manual_seed(0)
    shape = GPTConfig(tokenizer.vocab_size, 256, 1, 2, 32, eos=tokenizer.eos)
    GPT(shape.as_family(family)).save_pretrained(folder)
    Tokenizer(tokenizer._spec, {**tokenizer._config, **(config or {})}).save_pretrained(folder)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return tokenizer


def make_rows(folder):
    folder.mkdir()
    for split in ("train", "valid", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


def run(out, base, rows, *words):
    argv = ["--init", str(base), "--data", str(rows), "--out", str(out), "--device", "cpu", "--dtype", "fp32",
            "--forgetting_data", "none", "--max_new_tokens", "8", *words]
    assert train.main(argv) == 0
    return out


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports")
    make_base(folder / "base", generation_config={"eos_token_id": [1, 5], "pad_token_id": 0, "temperature": 0.6,
                                                  "do_sample": True})
    make_rows(folder / "rows")
    return folder


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_end_token_of_training_is_the_first(world, template):
    """After full tuning and after a merge; the base's other end tokens and settings stay."""
    tokenizer = Tokenizer.from_pretrained(world / "base")
    end = chat.end_token(template, tokenizer)
    flags = ["--template", template, "--steps", "1", "--system", "Be brief."]
    full = run(world / f"full-{template}", world / "base", world / "rows", "--method", "full", *flags) / "model"
    run(world / f"lora-{template}", world / "base", world / "rows", "--targets", "q", *flags)
    merged = world / f"merged-{template}"
    assert train.main(["--task", "merge", "--init", str(world / f"lora-{template}"), "--out", str(merged)]) == 0
    ends = list(dict.fromkeys([end, 1, 5, tokenizer.eos]))
    for folder in (full, merged):
        assert read(folder, "generation_config.json") == {"eos_token_id": ends, "pad_token_id": 0, "temperature": 0.6,
                                                          "do_sample": True}
        assert read(folder, "config.json")["eos_token_id"] == ends
        assert GPT.from_pretrained(folder).config.eos == ends
        exported = Tokenizer.from_pretrained(folder)
        assert exported.chat_template == chat.export(template, tokenizer, "Be brief.").chat_template != ""
        assert exported.eos == tokenizer.eos


def test_a_single_end_token_is_a_number(tmp_path):
    make_base(tmp_path / "base")
    rows = make_rows(tmp_path / "rows")
    flags = ("--method", "full", "--template", "plain", "--steps", "1")
    folder = run(tmp_path / "out", tmp_path / "base", rows, *flags) / "model"
    eos = Tokenizer.from_pretrained(folder).eos
    assert read(folder, "config.json")["eos_token_id"] == eos
    assert read(folder, "generation_config.json") == {"bos_token_id": None, "eos_token_id": eos}


def test_training_on_raw_text(tmp_path):
    """Without prompts the base's files stay; a new model is one of plain text."""
    make_base(tmp_path / "base", {"chat_template": HERMES, "bos_token": "<|begin_of_text|>"},
              generation_config={"eos_token_id": [7, 0]})
    (tmp_path / "text.txt").write_text("a cab, two cabs\n" * 200)
    flags = ("--task", "pretrain", "--steps", "1", "--block_size", "32", "--eval_items", "2")
    argv = [*flags, "--data", str(tmp_path / "text.txt"), "--device", "cpu"]
    assert train.main([*argv, "--init", str(tmp_path / "base"), "--out", str(tmp_path / "more")]) == 0
    base, more = (read(folder, "tokenizer_config.json") for folder in (tmp_path / "base", tmp_path / "more/model"))
    assert base == more and read(tmp_path / "more/model", "generation_config.json")== {"eos_token_id": [7, 0]}
    assert train.main([*argv, "--n_layer", "1", "--n_embd", "32", "--n_head", "2", "--vocab_size", "300",
                       "--out", str(tmp_path / "new")]) == 0
    new = Tokenizer.from_pretrained(tmp_path / "new/model")
    assert new.bos == new.eos and chat.guess_template(new) == "plain" and chat.note("plain", new) == ""


def test_show_takes_the_models_own_template(tmp_path, capsys):
    make_base(tmp_path / "base", {"chat_template": HERMES, "bos_token": "<|begin_of_text|>"})
    words = ["--task", "show", "--init", str(tmp_path / "base"), "--prompt", "ab", "--device", "cpu"]
    shown = []
    for template in ((), ("--template", "chatml"), ("--template", "plain")):
        assert train.main([*words, *template]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] != shown[2]


def test_the_note_is_said_once_and_a_flag_silences_it(tmp_path, capsys):
    make_base(tmp_path / "base", {"chat_template": HERMES.replace("assistant\n'", "assistant\n<think>'")})
    words = ["--task", "show", "--init", str(tmp_path / "base"), "--prompt", "ab", "--device", "cpu"]
    assert train.main(words) == 0
    said = capsys.readouterr().err
    assert said.count("the model's own chat template is not --template chatml: it writes ") == 1
    assert train.main([*words, "--template", "chatml"]) == 0
    assert "own chat template" not in capsys.readouterr().err


# ---- transformers ------------------------------------------------------------------------------------------
PEER = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
for line in sys.stdin:
    folder, talks, text = json.loads(line)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    rendered = [[tokenizer.apply_chat_template(talk, add_generation_prompt=go, return_dict=False)
                 for go in (False, True)] for talk in talks]
    prompt = torch.tensor([rendered[0][1]])
    out = model.generate(prompt, max_new_tokens=40, do_sample=False)[0, prompt.size(1):].tolist()
    print(json.dumps([rendered, tokenizer(text)["input_ids"], out, model.generation_config.eos_token_id]))
"""


@pytest.mark.slow
def test_transformers_writes_prompts_and_stops_as_we_do(tmp_path):
    """Every template, full tuning and merge, on bases with and without a BOS and a template of their own."""
    if not os.path.exists(python := os.environ.get("PEERS", "")):
        pytest.skip("PEERS does not name a Python that has transformers")
    rows = make_rows(tmp_path / "rows")
    cases = [(template, {}) for template in TEMPLATES]
    families = {len(cases): "glm4", len(cases) + 1: "gpt_neox"}
    cases += [("glm4", {}), ("chatml", {})]
    cases += [("chatml", {"chat_template": HERMES, "bos_token": "<|begin_of_text|>"}), ("plain", {"bos_token": "<|im_start|>"}),
              ("plain", {"add_bos_token": False, "tokenizer_class": "GPT2Tokenizer", "chat_template": HERMES})]
    talks = [[{"role": "user", "content": "ab"}],
             [{"role": "system", "content": "Say: cab"}, {"role": "user", "content": "a cab"},
              {"role": "assistant", "content": "two cabs"}, {"role": "user", "content": "ab"}]]
    folders, want, lines = [], [], []
    for n, (template, config) in enumerate(cases):
        base = tmp_path / f"base{n}"
        make_base(base, config, families.get(n, "gpt2"), generation_config={"eos_token_id": 1})
        for method in (("--method", "full", "--lr", "0.01"), ("--targets", "q,k,v,o,up,down,head", "--lr", "0.01", "--schedule", "constant")):
            out = run(tmp_path / f"out{n}-{method[0][2:]}", base, rows, "--template", template, "--steps", "80", *method)
            folder = out / "model"
            if method[1] != "full":
                folder = tmp_path / f"merged{n}"
                assert train.main(["--task", "merge", "--init", str(out), "--out", str(folder)]) == 0
            folders.append(folder)
    for folder in folders:
        tokenizer, template = Tokenizer.from_pretrained(folder), read(folder, "run.json")["template"]
        rendered = [[chat.render(talk, template, tokenizer)[0], chat.prompt(talk, template, tokenizer)] for talk in talks]
        end = chat.end_token(template, tokenizer)
        answer = generate(GPT.from_pretrained(folder), [rendered[0][1]], 40, temperature=0, eos=end)[0]
        assert answer[-1] == end and "cab" in tokenizer.decode(answer), "it was not trained to answer"
        want.append([rendered, tokenizer.encode("a cab\nab"), answer, end])
        lines.append(json.dumps([str(folder), talks, "a cab\nab"]))
    done = subprocess.run([python, "-c", PEER], input="\n".join(lines), capture_output=True, text=True, cwd=tmp_path,
                          env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr[-2000:]
    for folder, line, (rendered, text, answer, end) in zip(folders, done.stdout.splitlines(), want, strict=True):
        theirs, plain, out, ends = json.loads(line)
        assert theirs == rendered, folder
        assert out == answer, folder
        assert (ends if isinstance(ends, int) else ends[0]) == end
        tokenizer, template = Tokenizer.from_pretrained(folder), read(folder, "run.json")["template"]
        starts = {*tokenizer.special.values()} - {tokenizer.special["<|im_start|>"]}      # which opens a turn
        first = rendered[0][1][:chat.start_length(template, tokenizer)]
        assert plain == [i for i in first if i in starts] + text
        if template in ("plain", "raw"):
            assert plain == chat.prompt([{"role": "user", "content": "a cab\nab"}], template, tokenizer)
