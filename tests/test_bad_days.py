"""A bad day: --fresh over somebody's model, a base that was exchanged or moved, a merge onto a full disk."""
import json
import shutil

import pytest
import tiny
import torch

import train
from data.runtime.files import UserError, WriteError, atomic_folder, write_json
from data.runtime.run_folder import Run
from model import GPT


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny.world(tmp_path_factory.mktemp("world"))


def sft(world, out, *more):
    return ["--init", world / "base", "--data", world / "chat", "--forgetting_data", "none", "--steps", "2", "--batch",
            "4", "--eval_items", "2", "--max_new_tokens", "2", "--out", out, *more]


def run(words):
    return train.main([str(word) for word in words])


def test_fresh_refuses_to_delete_a_model_inside_adapter(world, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(sft(world, out)) == 0
    assert run(["--task", "merge", "--init", out, "--out", out / "adapter" / "merged"]) == 0
    capsys.readouterr()
    assert run(sft(world, out, "--fresh")) == 2
    assert f"{out}/adapter/merged was not written by this run" in capsys.readouterr().err
    assert (out / "adapter" / "merged" / "model.safetensors").exists() and (out / "result.json").exists()
    shutil.move(out / "adapter" / "merged", tmp_path / "merged")
    assert run(sft(world, out, "--fresh")) == 0


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning_v2"])
def test_a_soft_prompt_refuses_another_base(world, tmp_path, method, capsys):
    base = tmp_path / "base"
    shutil.copytree(world / "base", base)
    out = tmp_path / "run"
    assert run([*sft(world, out, "--method", method, "--num_virtual_tokens", "3"), "--init", base]) == 0
    chat = ["--task", "chat", "--init", out, "--prompt", "ab", "--max_new_tokens", "2"]
    assert run(chat) == 0 and run([*chat, "--dtype", "bf16"]) == 0
    torch.manual_seed(7)
    GPT(GPT.from_pretrained(base).config).save_pretrained(base)
    capsys.readouterr()
    assert run(chat) == 65
    assert "was trained on another base than the one loaded here" in capsys.readouterr().err
    stored = json.loads((out / "adapter" / "run.json").read_text())
    write_json(out / "adapter" / "run.json", {**stored, "base_fingerprint": "float32"})
    assert run(chat) == 65
    write_json(out / "adapter" / "run.json", {**stored, "base_fingerprint": 5})
    assert run(chat) == 65
    assert "base_fingerprint is 5" in capsys.readouterr().err
    del stored["base_fingerprint"]                      # of an earlier version
    write_json(out / "adapter" / "run.json", stored)
    assert run(chat) == 0


def test_an_adapter_whose_base_was_moved_says_what_to_do(world, tmp_path, capsys):
    shutil.copytree(world / "base", tmp_path / "base")
    out = tmp_path / "run"
    assert run([*sft(world, out), "--init", tmp_path / "base"]) == 0
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    capsys.readouterr()
    chat = ["--task", "chat", "--init", out, "--prompt", "ab", "--max_new_tokens", "2"]
    assert run(chat) == 65
    assert "if it was moved, write its new place there" in capsys.readouterr().err
    path = out / "adapter" / "adapter_config.json"
    write_json(path, {**json.loads(path.read_text()), "base_model_name_or_path": str(tmp_path / "elsewhere")})
    assert run(chat) == 0


def test_a_full_disk_names_the_folder_and_not_a_temporary_one(tmp_path):
    out = tmp_path / "merged"
    with pytest.raises(WriteError) as caught, atomic_folder(out) as folder:
        raise WriteError(f"{folder}/model.safetensors cannot be written (No space left on device)")
    assert str(caught.value) == f"{out}/model.safetensors cannot be written (No space left on device)"
    assert not list(tmp_path.iterdir())


def test_fresh_of_a_run_without_strangers_goes_on(tmp_path):
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    (tmp_path / "run" / "adapter" / "x.safetensors").write_bytes(b"")
    for name in ("config.json", "log.jsonl"):
        (tmp_path / "run" / name).write_text('{"config": {}}')
    assert Run(tmp_path / "run", {}, fresh=True).change(None) is None
    (tmp_path / "run" / "adapter" / "mine").mkdir()
    with pytest.raises(UserError, match="adapter/mine was not written by this run"):
        Run(tmp_path / "run", {}, fresh=True).change(None)
