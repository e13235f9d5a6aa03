"""The tasks of preferences, through the command: reward, dpo, ppo, sample; roles, folders, exact resume."""
import contextlib
import dataclasses
import json
import math
import shlex
import sys
import types

import pytest
import torch

import lora
import ppo
import prompts
import train
from data.text import chat, formats
from data.batches.examples import Text, size, targets
from data.checkpoints.safetensors import read_tensors
from data.results import evaluate
from data.runtime import run_folder
from data.runtime.files import UserError, read_json
from data.text.tokenizer import Tokenizer
from test_train import same, weights, world  # noqa: F401
from tiny import Stop, write

METHODS = [m.name for m in train.METHODS if m.trains and m.name != "adalora"]
SOFT = [m.name for m in prompts.METHODS]
PPO = ["--steps", "4", "--batch", "8", "--max_new_tokens", "4", "--forgetting_data", "none", "--minibatches", "2",
       "--ppo_epochs", "2"]


@pytest.fixture(scope="session")
def town(world):                                                    # noqa: F811
    """The same base model; prompts, pairs with votes, rankings; a reward function, and a reward model."""
    rows = {"pairs": [{"prompt": f"{a}{b}", "chosen": "aa", "rejected": "b", "votes_for": 3,
                       "votes_against": 1} for a in "abcdefgh" for b in "abcd"],
            "ranked": [{"prompt": f"{a}{b}", "responses": ["b", "aa", "ab"], "rank": [3, 1, 2]}
                       for a in "abcdefgh" for b in "abcd"],
            "prompts": [{"prompt": f"{a}{b}"} for a in "abcdefgh" for b in "abcd"]}
    write(world, rows, every=4)
    (world / "judges.py").write_text(
        "def letters(prompt, answer):\n    return sum(map(str.isascii, answer)) - len(prompt)\n"
        "def broken(prompt, answer):\n    return float('nan')\n")
    if str(world) not in sys.path:
        sys.path.insert(0, str(world))
    for name, method in (("rm", "lora"), ("rm_full", "full"), ("rm_soft", "p_tuning_v2")):
        if not (world / name / "result.json").exists():
            go(world, world / name, "--task", "reward", "--method", method, "--data", world / "pairs",
               "--steps", "6", "--batch", "8", "--max_new_tokens", "4")
    return world


def go(town, out, *words, code=0):
    words = list(map(str, words))
    init = [] if "--init" in words else ["--init", str(town / "base")]
    assert train.main([*init, "--out", str(out), *words]) == code
    return read_json(out / "result.json") if code == 0 else None


def events(out, kind="train"):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [e for e in lines if e["event"] == kind]


# ------------------------------------------------------------------------------------------------ preferences

def test_a_preference_as_ids(town):
    text = Text(Tokenizer.from_pretrained(town / "base"), "plain")
    pair, ranked = (formats.load(str(town / name), "train").rows[0] for name in ("pairs", "ranked"))
    example, cut = text.ranking(pair, 100)
    assert not cut and example.ranks == [0, 2] and targets(example) == 1        # 3 votes against 1
    assert [text.decode_answer(y) for y in example.answers] == ["aa", "b"]
    assert all(y[-1] == text.end_token for y in example.answers)
    assert size(example) == sum(len(example.prompt) + len(y) for y in example.answers)
    example, _ = text.ranking(ranked, 100)
    assert [text.decode_answer(y) for y in example.answers] == ["aa", "ab", "b"] and example.ranks == [1, 2, 3]
    long = {**pair, "prompt": [{"role": "user", "content": "x" * 50}], "chosen": "y" * 50}
    example, cut = text.ranking(long, 40)
    assert cut and max(len(example.prompt) + len(y) for y in example.answers) == 40
    whole = text.prompt_ids(long)                                # a prompt loses its beginning behind its first id
    assert example.prompt == whole[:1] + whole[1 - len(example.prompt):] and example.prompt != whole
    assert example.answers[0] == chat.answer("y" * 50, "plain", text.tokenizer)[:20]    # an answer its end


@pytest.mark.parametrize("task", ["reward", "dpo"])
def test_a_prompt_longer_than_the_context_leaves_room_for_an_answer(task, town, tmp_path):
    rows = [{"prompt": f"{c} " * 200, "chosen": c * 300, "rejected": "b"} for c in "acdefghi"]
    write(tmp_path, {"long": rows})
    go(town, tmp_path / "r", "--task", task, "--data", tmp_path / "long", "--steps", "1", "--forgetting_data", "none")


@pytest.mark.parametrize("method", METHODS + ["adalora"])
@pytest.mark.parametrize("task, data", [("reward", "pairs"), ("dpo", "ranked")])
def test_every_method_learns_preferences(task, data, method, town, tmp_path):
    rate = {"full": "1e-3", "lora": "1e-2", "adalora": "3e-2"}.get(method, "3e-2")
    soft = ["--num_virtual_tokens", "4"] if method in SOFT else []
    r = go(town, tmp_path / "r", "--task", task, "--data", town / data, "--method", method, "--steps", "25",
           "--batch", "8", "--lr", rate, "--forgetting_data", "none", *soft)
    assert r["metrics"]["accuracy"] > 0.9 and r["metrics"]["loss"] < 0.6 and r["skipped"] == 0
    if task == "reward":
        assert {"accuracy_margin_2", "score_length_corr"} <= r["metrics"].keys()


def test_a_saved_reward_model_scores_as_the_trained_one_did(town, tmp_path):
    """Test metrics of the run, again, from its folder; and its reference samples score 0 +- 1."""
    for name in ("rm", "rm_full", "rm_soft"):
        stored = read_json(town / name / "result.json")["metrics"]
        found = go(town, tmp_path / name, "--task", "eval", "--init", town / name, "--data", town / "pairs")
        assert all(abs(found["metrics"][key] - stored[key]) < 1e-5 for key in stored if key != "forgetting"), name
        state = torch.load(town / name / "state.pt", weights_only=True)
        ctx = train.open_context(train.parse(["--task", "eval", "--init", str(town / name)]))
        rows = formats.load(str(town / "pairs"), "valid").rows
        judge = ppo.model_reward(train.adapter_context(ctx, ctx.past()), ctx.head)
        s = judge([ctx.text.prompt_ids(row) for row in rows * 2], state["samples"])
        assert abs(s.mean()) < 1e-4 and abs(s.std(unbiased=False) - 1) < 1e-4, name


def test_dpo_starts_at_log_2_and_its_reference_is_the_start(town, tmp_path):
    for method in ("lora", "full", "p_tuning_v2", "prompt_tuning"):
        go(town, tmp_path / method, "--task", "dpo", "--data", town / "pairs", "--method", method, "--steps",
           "1", "--batch", "8", "--forgetting_data", "none", "--beta", "0.3")
        assert abs(events(tmp_path / method)[0]["loss"] - math.log(2)) < 1e-5, method


def test_reference_logprobs_are_computed_for_the_rows_that_are_used(town, tmp_path, monkeypatch):
    seen = []
    original = train.prepare_preferences
    task = train.find_task("dpo")

    def spy(ctx, cfg, examples):
        seen.append(len(examples))
        return original(ctx, cfg, examples)
    monkeypatch.setattr(train, "TASKS", [dataclasses.replace(task, prepare=spy)])
    test = len(formats.load(str(town / "pairs"), "test").rows)
    valid = len(formats.load(str(town / "pairs"), "valid").rows)
    flags = ["--task", "dpo", "--data", town / "pairs", "--batch", "4", "--forgetting_data", "none"]
    whole = go(town, tmp_path / "two", *flags, "--steps", "2", "--eval_every", "1")
    assert seen == [test, 8, valid, test] and whole["metrics"]["loss"] > 0      # before training: test
    go(town, tmp_path / "one", *flags, "--steps", "1")
    assert seen[4:] == [4, valid, test]             # what the base does before training is known by now


def test_a_stage_before_ppo_says_how_long_it_takes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    found = train.forecast.Forecast(188, 1000, (60.0, 90.0), {"x": (30.0, 60.0)})
    monkeypatch.setattr(train, "forecast_stage", lambda cfg: found)
    monkeypatch.setattr(train, "run_supervised", lambda cfg: 0)
    three_stages = train.run_ppo
    monkeypatch.setattr(train, "run_ppo", lambda cfg: 0)
    assert three_stages(train.parse(["--task", "ppo", "--steps", "2"])) == 0
    said = "a stage before RL, with steps of its own: 188, in all about 1.5-2.5 min"
    assert capsys.readouterr().err.count(said) == 2
    folder = tmp_path / train.default_out(train.parse(["--data", "toy/letters", "--epochs", "3"]))
    folder.mkdir(parents=True)
    (folder / "result.json").write_text("{}")                       # this stage is done
    three_stages(train.parse(["--task", "ppo", "--steps", "2"]))
    assert capsys.readouterr().err.count(said) == 1


# -------------------------------------------------------------------------------------------------------- PPO

@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_a_policy(method, town, tmp_path):
    """KL of the first rollout is exactly 0, the first ratio 1; the base on disk keeps its bits; the policy's
    weights come back as they were."""
    before = read_tensors(town / "base" / "model.safetensors")
    soft = ["--num_virtual_tokens", "4"] if method in SOFT else []
    r = go(town, tmp_path / "r", "--task", "ppo", "--data", town / "prompts", "--method", method, *PPO, *soft,
           "--reward", town / "rm", "--lr", "1e-2" if method != "full" else "1e-3")
    first, *_, last = events(tmp_path / "r")
    assert first["kl"] == 0 and first["kl_k3"] == 0 and first["ratio_first"] < 1e-5
    assert last["step"] == 4 and last["kl"] != 0 and r["steps"] == 4
    assert same(before, read_tensors(town / "base" / "model.safetensors"))
    assert (r["params_trainable"] == r["params_total"]) == (method == "full")
    assert {"score", "kl", "eos_rate", "length"} <= r["metrics"].keys()
    assert "score_best_of_4" in r["baseline_metrics"]
    model, prompt, _ = train.load(tmp_path / "r")
    base, _, _ = train.load(town / "base")
    x = torch.tensor([[97, 98, 99]])
    with torch.no_grad():
        assert not torch.equal(model(x, past=prompt(model) if prompt is not None else None)[0], base(x)[0])


@pytest.mark.parametrize("algo", [algorithm.name for algorithm in ppo.ALGORITHMS])
def test_a_function_is_a_reward_and_every_algorithm_climbs_it(algo, town, tmp_path):
    has_kl = ppo.find_record(ppo.ALGORITHMS, algo).defaults.get("kl_place") != "none"
    r = go(town, tmp_path / "r", "--task", "ppo", "--data", town / "prompts", *PPO, "--reward",
           "judges:letters", "--algo", algo, "--steps", "12", "--batch", "32", "--lr", "2e-2",
           *["--kl_coef", "0.01", "--adaptive_kl_target", "0"] * has_kl, "--missing_eos_penalty", "none")
    assert r["metrics"]["score"] > r["baseline_metrics"]["score"] + 0.5


def test_one_base_for_every_role(town, tmp_path, monkeypatch):
    """A reward model of the same base is an adapter of it, and the critic begins as it; another one is loaded
    as a model of its own. Scores agree either way."""
    seen = []
    original = train.make_roles

    def spy(cfg, ctx, base, table):
        roles, value = original(cfg, ctx, base, table)
        floats = sum(p.numel() for p in ctx.model.parameters())
        asked = table.prompts["test"]
        answer = [97, 98, ctx.text.end_token]
        scores = table.reward(asked, [answer] * len(asked))
        with roles.critic() as (model, past):
            begins = ppo.scores(model, roles.value_head, ppo.collate_rollout(asked, [answer] * len(asked)))
        seen.append((floats, scores, begins.detach(), sorted({name for m in lora.wrapped_linears(base).values()
                                                              for name in m.adapters})))
        return roles, value
    monkeypatch.setattr(train, "make_roles", spy)
    go(town, tmp_path / "a", "--task", "ppo", "--data", town / "prompts", *PPO, "--reward", town / "rm")
    go(town, tmp_path / "b", "--task", "ppo", "--data", town / "prompts", *PPO, "--reward", town / "rm_full")
    (shared, scores, begins, names), (_, other, zero, alone) = seen
    assert names == ["default", "reward", "value"] and alone == ["default", "value"]
    torch.testing.assert_close(scores, begins)                                  # the critic, read at the end
    assert not torch.allclose(scores, other) and (zero == 0).all()
    per_role = 2 * 8 * (64 + 64 + 160 + 160)                                    # q, v, up, down of two layers
    model, _, _ = train.load(town / "base")
    base = sum(p.numel() for p in model.parameters())
    assert shared == base + 3 * per_role


@pytest.mark.parametrize("words", [["--method", "lora", "--ema", "0.9", "--adaptive_kl_target", "3"],
                                   ["--method", "full", "--algo", "rloo", "--ptx_coef", "0.1"],
                                   ["--method", "p_tuning_v2", "--num_virtual_tokens", "4"]])
def test_resume_is_bit_exact(words, town, tmp_path, monkeypatch):
    """Cut inside the update of iteration 3 of 4, and inside the rollout of iteration 4."""
    (town / "text").mkdir(exist_ok=True)
    words = ["--task", "ppo", "--data", town / "prompts", *PPO, "--reward", town / "rm", *words]
    words += ["--ptx_data", town / "text"] if "--ptx_coef" in words else []
    go(town, tmp_path / "whole", *words)
    for name, place, at in (("update", "logprobs", 14), ("rollout", "generate", 5)):
        original, calls = getattr(ppo, place), []

        def cut(*args, **kw):
            calls.append(1)
            if len(calls) == at:
                raise Stop
            return original(*args, **kw)
        with monkeypatch.context() as patch:
            patch.setattr(ppo, place, cut)
            with pytest.raises(Stop):
                go(town, tmp_path / name, *words)
        assert 0 < len(events(tmp_path / name)) < 4
        go(town, tmp_path / name, *words)
        assert same(weights(tmp_path / "whole"), weights(tmp_path / name))
        a, b = (torch.load(tmp_path / which / "state.pt", weights_only=True)["trained"] for which in
                ("whole", name))
        assert a["kl"] == b["kl"] and a["step"] == b["step"] == 4
        assert (a["ema"] is None) == (b["ema"] is None) and (a["ema"] is None or same(a["ema"], b["ema"]))
        a, b = ([e["score"] for e in events(tmp_path / which)] for which in ("whole", name))
        assert a == b


@pytest.mark.parametrize("words, says", [
    (["--reward", "no/such"], "is no folder; --reward takes a run of --task reward, or module:function"), (["--reward", "judges:nothing"], "module:function"),
    (["--reward", "judges:broken"], "finite"), ([], "needs --reward"),
    (["--reward", "BASE"], "no reward model"),
    (["--reward", "judges:letters", "--batch", "6", "--num_generations", "4", "--algo", "rloo"], "multiple"),
    (["--reward", "judges:letters", "--temperature", "0"], "explores nothing"),
    (["--reward", "judges:letters", "--method", "adalora"], "lora"),
    (["--reward", "judges:letters", "--method", "none"], "trains nothing"),
    (["--reward", "judges:letters", "--max_new_tokens", "159"], "for prompts"),
    (["--reward", "judges:letters", "--algo", "rloo", "--lam", "0.9"], "--lam means nothing"),
    (["--reward", "judges:letters", "--algo", "grpo", "--value_warmup", "2"], "--value_warmup means"),
    (["--reward", "judges:letters", "--algo", "drgrpo", "--gamma", "0.9"], "--gamma means nothing"),
    (["--task", "dpo", "--beta", "0"], "teaches nothing"),
    (["--task", "dpo", "--label_smoothing", "0.5"], "teaches nothing"),
    (["--task", "dpo", "--preference_loss", "ipo", "--label_smoothing", "0.1"], "leave one of them out"),
])
def test_a_wrong_command_is_one_sentence(words, says, town, tmp_path, capsys):
    words = [str(town / "base") if word == "BASE" else word for word in words]
    flags = [] if "dpo" in words else ["--task", "ppo", *PPO]
    code = train.main(["--init", str(town / "base"), "--data", str(town / "prompts"),
                       "--out", str(tmp_path / "r"), *flags, *words])
    err = capsys.readouterr().err
    assert code in (2, 65) and says in err and "Traceback" not in err, err


# ---------------------------------------------------------------------------------------------------- samples

def ending(town, monkeypatch, every):
    """Of the answers that are drawn, each `every`-th ends, the others are cut short."""
    end, rollout = chat.end_token("chatml", Tokenizer.from_pretrained(town / "base")), ppo.rollout

    def drawn(*args):
        batch, answers = rollout(*args)
        return batch, [y[:-1] + [97 if i % every else end] for i, y in enumerate(answers)]
    monkeypatch.setattr(ppo, "rollout", drawn)


def test_samples_feed_sft(town, tmp_path, monkeypatch):
    """Best of n is what it says; the kept rows are data for SFT."""
    ending(town, monkeypatch, 1)
    r = go(town, tmp_path / "s", "--task", "sample", "--data", town / "prompts", "--reward", "judges:letters",
           "--num_generations", "8", "--max_new_tokens", "4", "--best_n", "2", "--gold_reward", "judges:letters")
    rows = [json.loads(line) for line in (tmp_path / "s" / "train.jsonl").read_text().splitlines()]
    assert len(rows) == 64
    assert all(row["score"] >= sum(map(str.isascii, row["completion"])) - 2 for row in rows)    # stripped
    m = r["metrics"]
    assert m["score_best_of_8"] > m["score"] and m["gold_best_of_8"] == m["score_best_of_8"]
    limit = sorted(row["score"] for row in rows)[-5]
    go(town, tmp_path / "few", "--task", "sample", "--data", town / "prompts", "--reward", "judges:letters",
       "--num_generations", "8", "--max_new_tokens", "4", "--best_n", "2", "--at_least", limit)
    few = [json.loads(line) for line in (tmp_path / "few" / "train.jsonl").read_text().splitlines()]
    assert few == [row for row in rows if row["score"] >= limit] and 5 <= len(few) < 64
    rows = [row for row in rows if row["completion"].strip()]
    r = go(town, tmp_path / "sft", "--data", tmp_path / "s", "--steps", "2", "--forgetting_data", "none")
    assert r["status"] == "done"


def test_a_text_cut_short_is_no_row_to_imitate(town, tmp_path, monkeypatch, capsys):
    """Five samples a prompt are no batch of PPO's; only answers that end are kept."""
    go(town, tmp_path / "s", "--task", "sample", "--data", town / "prompts", "--reward", "judges:letters",
       "--num_generations", "5", "--max_new_tokens", "1")
    assert "prompts have no answer that ended" in capsys.readouterr().err
    assert not (tmp_path / "s" / "train.jsonl").read_text()     # one token that is no end, as good as always
    ending(town, monkeypatch, 2)
    go(town, tmp_path / "t", "--task", "sample", "--data", town / "prompts", "--reward", "judges:letters",
       "--num_generations", "4", "--max_new_tokens", "4", "--best_n", "4")
    rows = [json.loads(line) for line in (tmp_path / "t" / "train.jsonl").read_text().splitlines()]
    assert len(rows) == 32 * 2


def test_samples_that_were_cut_at_the_end_log_test_once(town, tmp_path, monkeypatch):
    words = ["--task", "sample", "--data", town / "prompts", "--reward", "judges:letters", "--num_generations", "2",
             "--max_new_tokens", "2", "--eval_items", "2"]

    def killed(run, result):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run_folder.Run, "finish", killed)
        go(town, tmp_path / "s", *words)
    assert len(events(tmp_path / "s", "test")) == 1
    go(town, tmp_path / "s", *words)
    assert len(events(tmp_path / "s", "test")) == 1


def test_sample_answers_every_valid_prompt(town, tmp_path):
    write(tmp_path, {"many": [{"prompt": f"{i}"} for i in range(110)]}, every=1)
    cfg = train.parse(["--task", "sample", "--data", str(tmp_path / "many"), "--reward", "judges:letters"])
    assert len(train.open_data(cfg).rows["valid"]) == 110


def test_the_critic_leaves_the_head_alone(town, tmp_path):
    """No value passes through the language model's head, so an adapter there would never get a gradient."""
    words = ["--task", "ppo", *PPO, "--data", town / "prompts", "--reward", "judges:letters"]
    for targets in ("q,v,head", "head"):
        assert go(town, tmp_path / targets, *words, "--targets", targets)["status"] == "done"


def test_a_reward_model_scores_answers_that_fill_the_context(town, tmp_path):
    """A sampled answer ends one token behind the last column that a model reads."""
    words = ["--task", "reward", "--data", town / "pairs", "--steps", "2", "--batch", "8"]
    assert go(town, tmp_path / "rm", *words, "--max_new_tokens", "159")["status"] == "done"


def test_answers_to_other_prompts_are_cut_to_the_context(town, tmp_path):
    """KTO reads an answer behind the prompt of another row: each row fits, and not all such pairs do."""
    rows = [{"prompt": "a", "chosen": "b" * 120, "rejected": "c"},
            {"prompt": "d" * 120, "chosen": "e", "rejected": "f"}]
    write(tmp_path, {"long": rows * 4}, every=4)
    words = ["--task", "dpo", "--preference_loss", "kto", "--data", tmp_path / "long", "--steps", "2", "--batch", "4"]
    assert go(town, tmp_path / "run", *words)["status"] == "done"


def test_a_judge_that_sees_no_difference_ends_no_run(town, tmp_path):
    """Every answer has the same score before training: a gain in standard deviations of nothing is left out."""
    (town / "flat.py").write_text("def zero(prompt, answer):\n    return 0.0\n")
    r = go(town, tmp_path / "r", "--task", "ppo", "--data", town / "prompts", "--reward", "judges:letters",
           "--gold_reward", "flat:zero", *PPO, "--eval_items", "1")
    assert r["metrics"]["gold"] == 0 and "gold_gain" not in r["metrics"]
    assert all(math.isfinite(x) for x in r["metrics"].values())


def test_the_critic_of_a_soft_prompt_has_a_rate_of_its_own(town):
    rates = {m: train.parse(["--task", "ppo", "--reward", "x:y", "--method", m]) for m in METHODS}
    assert {m: cfg.value_lr for m, cfg in rates.items() if cfg.value_lr} == dict.fromkeys(
        ("ia3", "prompt_tuning", "p_tuning", "prefix_tuning", "p_tuning_v2"), 0.002)
    assert {cfg.batch for cfg in rates.values()} == {64}


@pytest.mark.parametrize("task, data", [("sample", "prompts"), ("ppo", "prompts"), ("dpo", "pairs")])
def test_a_prompt_inside_a_template_is_refused(task, data, town, tmp_path, capsys):
    go(town, tmp_path / "sft", "--data", town / "chat", "--method", "prompt_tuning", "--num_virtual_tokens", "4", "--steps",
       "1", "--forgetting_data", "none")
    judge = [] if task == "dpo" else ["--reward", "judges:letters"]
    method = [] if task == "sample" else ["--method", "prompt_tuning"]
    go(town, tmp_path / "r", "--task", task, "--init", tmp_path / "sft", "--data", town / data, *judge,
       *method, code=2)
    assert "--prompt_template front" in capsys.readouterr().err


@pytest.mark.slow
def test_three_stages_from_one_command(town, tmp_path, monkeypatch):
    """What `--task ppo` alone does, at a small scale: each stage has its folder, the second call trains
    nothing, and the policy's folder is a chain that loads."""
    monkeypatch.chdir(tmp_path)
    original = train.parse

    def short(argv):
        few = {"sft": ["--steps", "2"], "reward": ["--steps", "2"]}
        task = argv[argv.index("--task") + 1]
        return original([*argv, *few.get(task, []), *(["--eval_items", "4"] if task in few else [])])
    monkeypatch.setattr(train, "parse", short)
    words = ["--task", "ppo", "--steps", "2", "--batch", "8", "--eval_items", "4"]
    assert train.main(words) == 0
    runs = sorted(path.name for path in (tmp_path / "out").glob("[!.]*") if path.is_dir())
    assert len(runs) == 3 and all((tmp_path / "out" / name / "result.json").exists() for name in runs)
    policy = next(tmp_path / "out" / name for name in runs if name.startswith("ppo"))
    stamp = (policy / "result.json").stat().st_mtime_ns
    assert train.main(words) == 0 and (policy / "result.json").stat().st_mtime_ns == stamp
    model, _, _ = train.load(policy)
    assert lora.adapters(model) and read_json(policy / "result.json")["baseline_metrics"]["gold_best_of_4"]


def test_memory_is_one_base_and_nine_adapters(town, tmp_path, monkeypatch):
    """Parameters, gradients and Adam's moments when the optimiser steps: N (1 + 9p) floats, where an adapter
    has p N: three adapters, two of them with a gradient and two moments. Four full models: 10 N."""
    seen, original = [], ppo.PPOState.apply

    def apply(self, who, share):
        moments = sum(s["exp_avg"].numel() + s["exp_avg_sq"].numel() for o in self.optim.values()
                      for s in o.state.values())
        seen.append(sum(p.numel() + (p.grad is not None) * p.numel() for p in alive) + moments)
        return original(self, who, share)

    alive, cast = [], train.make_roles

    def spy(cfg, ctx, base, table):
        roles, value = cast(cfg, ctx, base, table)
        alive.extend(p for part in (ctx.model, table.head, roles.value_head) for p in part.parameters())
        return roles, value
    monkeypatch.setattr(train, "make_roles", spy)
    monkeypatch.setattr(ppo.PPOState, "apply", apply)
    go(town, tmp_path / "r", "--task", "ppo", "--data", town / "prompts", *PPO, "--reward", town / "rm")
    model, _, _ = train.load(town / "base")
    N, adapter = sum(p.numel() for p in model.parameters()), 2 * 8 * (64 + 64 + 160 + 160)
    most = max(seen)
    assert abs(most / (N + 9 * adapter) - 1) < 0.01, (most, N + 9 * adapter)


def test_skipped_steps_reach_the_result(town, tmp_path, monkeypatch):
    original = ppo.optimizer_step
    monkeypatch.setattr(ppo, "optimizer_step", lambda *args: {**original(*args), "skipped": 1})
    r = go(town, tmp_path / "r", "--task", "ppo", "--data", town / "prompts", *PPO, "--reward", "judges:letters")
    assert r["skipped"] == 4 * 2 * 2 == sum(e["skipped"] for e in events(tmp_path / "r"))


def test_gold_gain_is_in_standard_deviations_before_training(town, tmp_path):                 # noqa: F811
    r = go(town, tmp_path / "r", "--task", "ppo", "--data", town / "prompts", "--reward", "judges:letters",
           "--gold_reward", "judges:letters", "--lr", "3e-2", *PPO)
    before, after = r["baseline_metrics"], r["metrics"]
    assert before["gold_std"] != after["gold_std"]
    assert after["gold_gain"] == pytest.approx((after["gold"] - before["gold"]) / before["gold_std"])


def test_pre_training_text_is_read_on_and_not_again(town, monkeypatch):                       # noqa: F811
    asked = []
    monkeypatch.setattr(train, "Feed", lambda *a: lambda step: asked.append(step) or [])
    text = types.SimpleNamespace(stream=lambda rows: [1] * 99)
    ctx = types.SimpleNamespace(text=text, max_text_len=lambda: 64)
    cfg = types.SimpleNamespace(ptx_data=str(town / "text"), seed=1)
    found = ppo.PPOConfig(ptx_coef=1.0, ppo_epochs=3, minibatches=2, batch=8)
    batches = train.ptx_batches(cfg, types.SimpleNamespace(config=found, ctx=ctx))
    for step in range(2):
        for minibatch in range(6):
            batches(step, minibatch)
    assert asked == list(range(12))


def test_the_samples_before_training_are_answers_to_the_first_prompts(monkeypatch):
    answers = [(prompt, n) for prompt in range(5) for n in range(4)]
    monkeypatch.setattr(train, "evaluate_policy", lambda *a: ({}, answers, {}))
    monkeypatch.setattr(train, "forgetting_loss", lambda *a: 0.0)
    text = types.SimpleNamespace(decode_answer=lambda answer: answer)
    ctx = evaluate.ModelContext(None, text, torch.device("cpu"), torch.float32)
    setup = types.SimpleNamespace(ctx=ctx)
    log = types.SimpleNamespace(log=lambda **event: None)
    state = train.measure_reference(log, setup, ppo.Roles(None, contextlib.nullcontext), [])
    assert state["before"] == [(0, 0), (1, 0), (2, 0)]


def test_the_answers_to_imitate_are_chosen_by_the_reward_and_not_by_gold(town, tmp_path, monkeypatch):      # noqa: F811
    (tmp_path / "lengths.py").write_text("def more(prompt, answer):\n    return float(len(answer))\n"
                                         "def fewer(prompt, answer):\n    return -1.0 - len(answer)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    go(town, tmp_path / "r", "--task", "sample", "--data", town / "prompts", "--reward", "lengths:more",
       "--gold_reward", "lengths:fewer", "--num_generations", "8", "--max_new_tokens", "64")
    rows = [json.loads(line) for line in (tmp_path / "r" / "train.jsonl").read_text().splitlines()]
    assert rows and all(row["score"] == len(row["completion"]) for row in rows)


def test_forgetting_of_a_policy_is_the_rise_of_the_loss(town, tmp_path, monkeypatch):         # noqa: F811
    losses = iter([2.0, 5.0])
    monkeypatch.setattr(train, "forgetting_loss", lambda *a: next(losses))
    words = [town / "text" if word == "none" else word for word in PPO]
    r = go(town, tmp_path / "r", "--task", "ppo", "--data", town / "prompts", "--reward", "judges:letters", *words)
    assert r["metrics"]["forgetting"] == 3.0


@pytest.mark.parametrize("words", [["--keep"], ["--template", "alpaca", "--system", "Be brief."]])
def test_the_stages_before_rl_take_the_flags_that_they_share(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stages = []
    found = train.forecast.Forecast(188, 1000, (60.0, 90.0), {"x": (30.0, 60.0)})
    monkeypatch.setattr(train, "forecast_stage", lambda cfg: found)
    monkeypatch.setattr(train, "run_supervised", lambda cfg: stages.append(cfg) or 0)
    all_stages = train.run_ppo
    monkeypatch.setattr(train, "run_ppo", lambda cfg: 0)
    cfg = train.parse(["--task", "ppo", "--steps", "2", *words])
    all_stages(cfg)
    assert [stage.task for stage in stages] == ["sft", "reward"]
    for stage in stages:
        assert (stage.keep, stage.template, stage.system) == (cfg.keep, cfg.template, cfg.system)


def test_the_reference_has_no_prefix_dropout(town, tmp_path):                     
    """At a rate of 0 the policy stays its reference: every margin is 0, the loss log 2."""
    go(town, tmp_path / "r", "--task", "dpo", "--data", town / "pairs", "--method", "p_tuning_v2", "--num_virtual_tokens",
       "8", "--prompt_init", "random", "--prefix_dropout", "0.5", "--steps", "1", "--batch", "8", "--lr", "0",
       "--forgetting_data", "none")
    for kind in ("valid", "test"):
        m = events(tmp_path / "r", kind)[0]
        assert abs(m["margin"]) < 1e-5 and m["accuracy"] == 0.5 and m["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_z0_is_taken_without_prefix_dropout(town, tmp_path, monkeypatch):         
    """Before the first step the policy is its reference: every log-ratio is 0."""
    seen = []
    original = ppo.kto_z0
    monkeypatch.setattr(ppo, "kto_z0", lambda *a, **k: seen.append(a[0]) or original(*a, **k))
    go(town, tmp_path / "r", "--task", "dpo", "--preference_loss", "kto", "--data", town / "pairs", "--method",
       "p_tuning_v2", "--num_virtual_tokens", "8", "--prompt_init", "random", "--prefix_dropout", "0.5", "--steps", "1",
       "--batch", "8", "--lr", "0", "--forgetting_data", "none")
    assert len(seen) >= 3 and max(map(abs, seen)) < 1e-3, seen


def test_forgetting_of_a_new_soft_prompt_begins_without_it(town, tmp_path):       
    """No step, the same start: what RL reports is what every other task reports."""
    words = ["--steps", "0", "--method", "prompt_tuning", "--num_virtual_tokens", "8", "--prompt_init", "random",
             "--forgetting_data", town / "text" / "valid.jsonl"]
    dpo = go(town, tmp_path / "dpo", "--task", "dpo", "--data", town / "pairs", *words)
    rl = go(town, tmp_path / "ppo", "--task", "ppo", "--data", town / "prompts", "--reward", "judges:letters",
            "--batch", "8", "--max_new_tokens", "4", *words)
    assert dpo["metrics"]["forgetting"] != 0
    assert rl["metrics"]["forgetting"] == pytest.approx(dpo["metrics"]["forgetting"], abs=1e-6)


@pytest.mark.parametrize("words, says", [
    (["--adaptive_kl_target", "0", "--kl_horizon", "5"], "--kl_horizon means nothing to --adaptive_kl_target 0"),
    (["--kl_coef", "0", "--kl_horizon", "5"], "--kl_horizon means nothing to --kl_coef 0"),
    (["--algo", "grpo", "--kl_coef", "0", "--kl_estimator", "k2"], "--kl_estimator means nothing to --kl_coef 0"),
    (["--ptx_data", "toy/corpus"], "is not read without --ptx_coef")])
def test_a_flag_without_effect_is_refused(words, says):
    with pytest.raises(UserError, match=says):
        train.parse(["--task", "ppo", "--reward", "x:y", *words])


def test_a_reward_model_is_no_part_of_the_sampled_model(town, tmp_path):          
    totals = [go(town, tmp_path / name, "--task", "sample", "--data", town / "prompts", "--reward", reward, "--eval_items",
                 "2", "--num_generations", "2", "--max_new_tokens", "2")["params_total"]
              for name, reward in (("function", "judges:letters"), ("model", town / "rm"))]
    assert totals[0] == totals[1]


def test_the_command_printed_behind_a_soft_prompt_runs(town, tmp_path):           
    soft = ["--method", "prompt_tuning", "--steps", "1", "--forgetting_data", "none"]
    go(town, tmp_path / "sft", "--data", town / "chat", "--prompt_template", "front", "--num_virtual_tokens", "3", *soft)
    r = go(town, tmp_path / "rm", "--task", "reward", "--init", tmp_path / "sft", "--data", town / "pairs", *soft,
           "--max_new_tokens", "4")
    s = go(town, tmp_path / "s", "--task", "sample", "--init", tmp_path / "sft", "--data", town / "prompts", "--reward",
           "judges:letters", "--max_new_tokens", "4", "--eval_items", "2")
    assert "--method prompt_tuning" in s["next_command"]
    words = shlex.split(r["next_command"])[2:]
    assert train.main([*words, "--data", str(town / "prompts"), "--out", str(tmp_path / "rl"), "--steps", "1", "--batch",
                       "8", "--max_new_tokens", "4", "--forgetting_data", "none"]) == 0
    assert read_json(tmp_path / "rl" / "result.json")["status"] == "done"


@pytest.mark.parametrize("algo", ["ppo", "reinforce"])
def test_equal_scores_of_one_prompt_have_a_gradient_without_groups(algo, town, tmp_path, capsys): 
    (town / "of_prompt.py").write_text("def score(prompt, answer):\n    return float(prompt < 'e')\n")
    go(town, tmp_path / "r", "--task", "ppo", "--algo", algo, "--data", town / "prompts", "--reward", "of_prompt:score",
       "--num_generations", "4", "--batch", "32", "--steps", "1", "--max_new_tokens", "4", "--forgetting_data", "none",
       "--missing_eos_penalty", "none")
    assert events(tmp_path / "r")[0]["grad_norm_policy"] > 0
    assert "give no gradient" not in capsys.readouterr().err
