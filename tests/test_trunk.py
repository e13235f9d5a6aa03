"""test_trunk.py: nothing is computed twice, and nothing changes by it.

A forward pass in two parts is the forward pass; a prompt that is asked often is read once; roles whose adapters
begin at block k share what enters it.
"""
import json

import pytest
import torch

import lora
import ppo
import tiny
import train
from data.checkpoints.safetensors import read_tensors
from data.results import reward_models, trunk
from data.runtime.files import UserError, read_json
from data.runtime.flags import parse_layers
from model import generate, glm_position_ids
from test_model import ANY, ids, make, pad, soft

TOKENS = pad(ids(9, 6, 4))
LENGTHS = torch.tensor([9, 6, 4])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny.world(tmp_path_factory.mktemp("world"))


def in_two_parts(model, k, past=None, select=None, **view):
    trunk, below = model.hidden_states(TOKENS, past, stop_layer=k, **view)
    hidden, above = model.hidden_states(trunk, past, start_layer=k, select=select, **view)
    return hidden, below + above


VIEWS = {
    "causal": {},
    "prefix": dict(bidirectional_len=LENGTHS - 2),
    "glm": dict(glm_positions=glm_position_ids(torch.arange(9), LENGTHS - 1)),
    "checkpointing": dict(gradient_checkpointing=True),
}


@ANY
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("P", [0, 3])
def test_two_parts_are_the_whole_to_the_bit(kind, view, P):
    model = make(kind, n_layer=3)
    past = soft(model, P) if P else None
    rows, columns = torch.tensor([0, 0, 2]), torch.tensor([8, 2, 3])
    for k in range(4):
        whole, made = model.hidden_states(TOKENS, past, **VIEWS[view])
        parts, also_made = in_two_parts(model, k, past, **VIEWS[view])
        assert torch.equal(parts, whole)
        assert all(torch.equal(x, y) for one, other in zip(made, also_made, strict=True) for x, y in zip(one[:2], other))
        if k < 3:
            some, _ = in_two_parts(model, k, past, (rows, columns), **VIEWS[view])
            assert torch.allclose(some, whole[rows, columns], atol=1e-5)


@ANY
def test_gradients_of_the_upper_part(kind):
    model = make(kind, n_layer=3)
    weight = model.blocks[2].mlp.up.weight
    model.hidden_states(TOKENS)[0].square().sum().backward()
    expected = weight.grad.clone()
    model.zero_grad()
    with torch.no_grad():
        trunk, _ = model.hidden_states(TOKENS, stop_layer=2)
    model.hidden_states(trunk, start_layer=2)[0].square().sum().backward()
    assert torch.equal(weight.grad, expected) and model.blocks[1].mlp.up.weight.grad is None


def test_a_soft_prompt_of_the_upper_blocks_alone():
    model = make("llama", n_layer=3)
    past = [None, None, soft(model, 3)[2]]
    whole, _ = model.hidden_states(TOKENS, past)
    assert torch.equal(in_two_parts(model, 2, past)[0], whole)


@pytest.mark.parametrize("call, says", [
    (dict(start_layer=4), "from 0 to 3"),
    (dict(start_layer=-1), "from 0 to 3"),
    (dict(stop_layer=1.5), "whole numbers"),
    (dict(start_layer=2, stop_layer=1), "in this order"),
    (dict(start_layer=1), "not token ids"),
    (dict(stop_layer=1, select=(torch.tensor([0]), torch.tensor([0]))), "select is for the last block"),
])
def test_what_cannot_be(call, says):
    with pytest.raises(UserError, match=says):
        make("gpt2", n_layer=3).hidden_states(TOKENS, **call)


@ANY
def test_a_prompt_that_is_asked_often_is_read_once(kind, monkeypatch):
    model = make(kind)
    a, b = ids(7, 5)
    read = []
    whole = model.hidden_states
    monkeypatch.setattr(model, "hidden_states", lambda x, *args, **kw: read.append(x.tolist()) or whole(x, *args, **kw))
    prompts = [a, b, a, a, b]
    answers = generate(model, prompts, 5, temperature=0)
    assert sorted(read[0]) == sorted(pad([a, b]).tolist()) and all(len(row) == 1 for part in read[1:] for row in part)
    assert answers == [generate(model, [prompt], 5, temperature=0)[0] for prompt in prompts]
    uniforms = torch.rand(5, 5, generator=torch.Generator().manual_seed(0))
    drawn = generate(model, prompts, 5, temperature=5.0, uniforms=uniforms)
    assert drawn == [generate(model, [prompt], 5, temperature=5.0, uniforms=uniforms[[i]])[0] for i, prompt in enumerate(prompts)]
    assert len(set(map(tuple, drawn))) > 2


# ------------------------------------------------------------------------------------------------------ PPO

PROMPTS = ids(4, 6, 3, 7)
END = 5


def reward_of_residues(prompts, answers, rows):
    return [sum(token % 3 for token in answer) for answer in answers]


def reward_model(model, layers):
    """A reward model as a reward: one more adapter of the model, in these blocks."""
    lora.inject(model, ("q", "v"), rank=2, alpha=4, layers=layers, name="reward")
    torch.manual_seed(5)
    for p in lora.adapter_parameters(model, "reward").values():
        torch.nn.init.normal_(p, std=0.3)
    return ppo.model_reward(tiny.adapter_role(model, "reward"), ppo.ScalarHead(32).double(), 64, min(layers))


def train_roles(algo, shared, kind="llama", names=("policy", "value"), steps=2, reward_layers=None):
    """Metrics of some iterations with adapters in blocks 2 and 3 of four; shared: how many are said to be.
    reward_layers: blocks of a reward model's adapter; None: the reward is a function."""
    model = make(kind, n_layer=4).double()
    for seed, name in enumerate(names):
        lora.inject(model, ("q", "v", "up"), rank=2, alpha=4, layers=(2, 3), name=name, seed=seed)

    def role(name):
        return tiny.adapter_role(model, name)
    cfg = ppo.PPOConfig(algo=algo, lr=1e-2, batch=16, steps=steps, max_new_tokens=6, minibatches=2, micro_batch_tokens=64,
                        num_generations=2, missing_eos_penalty=None, temperature=3.0)
    roles = ppo.Roles(role("policy"), role(None), shared_blocks=shared)
    value = {}
    if ppo.find_record(ppo.ALGORITHMS, algo).needs_critic:
        head = ppo.ScalarHead(32, zero=True)
        roles = roles._replace(critic=role("value"), value_head=head)
        value = {f"head.{name}": p for name, p in head.named_parameters()} | lora.adapter_parameters(model, "value")
    state = ppo.PPOState(cfg, lora.adapter_parameters(model, "policy"), value)
    environment = ppo.Environment(PROMPTS, reward_of_residues, END)
    if reward_layers:
        environment = environment._replace(reward=reward_model(model, reward_layers), reward_takes_batch=True)
    return [metrics for metrics, _ in ppo.train_ppo(cfg, roles, state, environment)], state, model


@pytest.mark.parametrize("algo", [record.name for record in ppo.ALGORITHMS])
def test_roles_that_share_blocks_learn_the_same(algo):
    plain, _, _ = train_roles(algo, 0)
    for shared in (1, 2)[algo != "ppo":]:
        compare_logs(plain, train_roles(algo, shared)[0])


def compare_logs(plain, log):
    for one, other in zip(plain, log, strict=True):
        for name in one.keys() - {"seconds_rollout", "seconds_score", "seconds_update"}:
            assert one[name] == pytest.approx(other[name], rel=1e-6, abs=1e-9), name
    assert log[0]["kl"] == 0 and log[0]["ratio_first"] < 1e-12


@pytest.mark.parametrize("layers", [(2, 3), (3,), (1, 3)])
def test_a_reward_model_goes_on_from_the_shared_blocks(layers, monkeypatch):
    plain, _, _ = train_roles("ppo", 0, reward_layers=layers)
    trunks = []
    real = ppo.scores
    monkeypatch.setattr(ppo, "scores", lambda model, head, batch, past: trunks.append(batch.trunk) or real(model, head, batch, past))
    log, _, _ = train_roles("ppo", 2, reward_layers=layers)
    compare_logs(plain, log)
    assert len({metrics["score"] for metrics in log}) == 2
    assert trunks and all((trunk is not None) == (min(layers) >= 2) for trunk in trunks)


def test_other_tokens_than_the_rollouts_share_nothing():
    seen = []
    batch = ppo.collate_rollout([[1, 2, 3]], [[4, 5]])

    def score(prompts, answers, rows, batch=None):
        seen.append(batch)
    for room, known in ((5, batch), (4, None)):
        reward_models.within(score, room)([[1, 2, 3]], [[4, 5]], None, batch)
        assert seen.pop() is known


def test_the_shared_blocks_run_once_per_answer(monkeypatch):
    runs = []
    block = ppo.nn.Module.__call__
    lowest = {}

    def count(self, *args, **kw):
        if self is lowest.get("block") and torch.is_tensor(args[0]) and args[0].size(1) > 1:
            runs.append(args[0].size(0))
        return block(self, *args, **kw)
    real = ppo.collate_rollout
    monkeypatch.setattr(ppo.nn.Module, "__call__", count)
    # logp, ref_logp, values; 2 passes of 2 roles; the reward model
    for shared, layers, expected in ((2, None, 16), (2, (2,), 16), (2, (1,), 32), (0, None, 16 * (3 + 2 * 2))):

        started = []

        def start(*args, started=started):
            if not started:                             # a reward model of its own rows collates again
                runs.clear()
            started.append(args)
            return real(*args)
        monkeypatch.setattr(ppo, "collate_rollout", start)
        original = ppo.check_training

        def check(cfg, roles, state, environment, original=original):
            with roles.policy() as (model, _):
                lowest["block"] = model.blocks[0]
            return original(cfg, roles, state, environment)
        monkeypatch.setattr(ppo, "check_training", check)
        train_roles("ppo", shared, steps=1, reward_layers=layers)
        assert sum(runs) == expected


def test_what_cannot_be_shared():
    with pytest.raises(UserError, match=r"shared_blocks is 3, but blocks.2.attn.q.adapters.policy.lora_A is trained"):
        train_roles("rloo", 3)
    assert lora.first_adapted_block(train_roles("rloo", 2, steps=0)[2], ("policy", "value")) == 2
    assert lora.first_adapted_block(make("gpt2"), ("policy",)) == 0


def test_the_command_shares_blocks_with_its_reward_model(world, tmp_path, monkeypatch):
    data = ["--init", str(world / "base"), "--data", str(world / "pairs"), "--layers", "1", "--eval_items", "4", "--forgetting_data",
            "none"]
    assert train.main(["--task", "reward", *data, "--steps", "2", "--max_new_tokens", "3", "--out", str(tmp_path / "rm")]) == 0
    layers = []
    real = ppo.scores

    def scores(model, head, batch, past=None):
        layers.append(batch.trunk and batch.trunk.layer)
        return real(model, head, batch, past)
    monkeypatch.setattr(ppo, "scores", scores)
    logs = []
    for name, share in (("shared", train.shared_blocks), ("plain", lambda *args: 0)):
        monkeypatch.setattr(train, "shared_blocks", share)
        assert train.main(["--task", "ppo", *data, "--reward", str(tmp_path / "rm"), "--steps", "2", "--batch", "8",
                           "--num_generations", "2", "--max_new_tokens", "3", "--out", str(tmp_path / name)]) == 0
        logs.append([json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()])
        assert set(layers) == {1 if name == "shared" else None}
        layers.clear()
    for one, other in zip(*logs, strict=True):
        assert all(other[name] == pytest.approx(value, rel=1e-4, abs=1e-5) for name, value in one.items()
                   if isinstance(value, float) and not name.startswith("seconds"))


# ---------------------------------------------------------------------------------------- the supervised loop

TASKS = {
    "sft": ["--data", "chat"],
    "classify": ["--data", "label", "--classifier", "head"],
    "tag": ["--data", "tags"],
    "reward": ["--data", "pairs", "--max_new_tokens", "3"],
    "dpo": ["--data", "pairs"],
    "kto": ["--data", "pairs", "--preference_loss", "kto"],
    "simpo": ["--data", "pairs", "--preference_loss", "simpo"],
}


def command(world, task, out, *more):
    words = ["--task", "dpo" if task in ("kto", "simpo") else task, "--init", str(world / "base"), "--out", str(out), "--batch", "24", "--lr", "3e-3",
             "--layers", "1", "--epochs", "3", *TASKS[task], *more]
    words[words.index("--data") + 1] = str(world / words[words.index("--data") + 1])
    return words


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines() if '"train"' in line]


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize("task", [slow(task) if task in ("dpo", "simpo", "reward") else task for task in TASKS])
def test_a_supervised_run_is_the_same_with_what_it_keeps(task, world, tmp_path, monkeypatch, capsys):
    assert train.main(command(world, task, tmp_path / "kept")) == 0
    assert "blocks 0 to 0 run once per example: " in capsys.readouterr().err
    monkeypatch.setattr(trunk, "SHARE", 0)
    assert train.main(command(world, task, tmp_path / "plain")) == 0
    assert "more than 0% of the memory" in capsys.readouterr().err
    kept, plain = losses(tmp_path / "kept"), losses(tmp_path / "plain")
    assert kept == pytest.approx(plain, rel=1e-4) and len(kept) == 9 and min(kept) < kept[0]
    one, other = (read_json(tmp_path / name / "result.json")["metrics"] for name in ("kept", "plain"))
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)


@pytest.mark.parametrize("task, epochs, known", [
    ("dpo", "0.5", True), slow("kto", "0.5", True), ("simpo", "2", True), slow("simpo", "1", False),
    slow("reward", "1", False)])
def test_answers_pass_the_lower_blocks_once(task, epochs, known, world, tmp_path, monkeypatch):
    found = []
    real = ppo.collate_rollout

    def collate(*args, **kw):
        batch = real(*args, **kw)
        found.append((torch.is_grad_enabled(), batch.trunk is not None))
        return batch
    monkeypatch.setattr(ppo, "collate_rollout", collate)
    words = command(world, task, tmp_path / "r", "--forgetting_data", "none")
    words[words.index("--epochs") + 1] = epochs
    assert train.main(words) == 0
    assert {one for with_grad, one in found if with_grad} == {known}
    if known and task != "simpo":                       # from the pass of the reference on, and not before
        first = found.index((False, True))
        assert not any(one for _, one in found[:first]) and all(one for _, one in found[first:])


def test_answers_are_found_by_their_tokens(world):
    ctx = train.open_context(train.parse(["--init", str(world / "base"), "--task", "dpo"]))
    a, b, c = [1, 2], [3], [4, 5, 6]
    kept = trunk.Trunk(1)
    kept.read(ctx, [trunk.Thumbs(a, [b, c], [True, False], mismatched=(a,))])
    kept.read(ctx, [trunk.Ranking(a, [c, b], [0, 1]), trunk.Ranking(b, [c], [0])])
    assert kept.bytes == (3 + 5 + 4 + 4) * 32 * 4 and len(kept.hidden) == 4
    hidden, layer = kept.find_answers([a, b], [c, c])
    whole, _ = ctx.model.hidden_states(torch.tensor([a + c, b + c + [0]]), stop_layer=1)
    assert layer == 1 and torch.allclose(hidden[0], whole[0]) and torch.allclose(hidden[1, :4], whole[1, :4])
    assert kept.find_answers([b], [a]) is None and kept.find([a]) is None
    ctx.trunk = kept
    assert ctx.find_trunk([a], [b]) is not None
    assert train.replace(ctx, model=make("gpt2")).find_trunk([a], [b]) is None          # a teacher's is another


def cut_preferences(monkeypatch, at, go):
    """go(), cut in the middle of step `at` of a preference loss."""
    steps = []
    real = ppo.preference_step

    def step(*args, **kw):
        steps.append(torch.is_grad_enabled())
        if sum(steps) == at and torch.is_grad_enabled():
            raise tiny.Stop
        return real(*args, **kw)
    with monkeypatch.context() as patch, pytest.raises(tiny.Stop):
        patch.setattr(ppo, "preference_step", step)
        go()


@pytest.mark.parametrize("task, cut, more", [
    ("sft", tiny.stopped, []),
    ("kto", cut_preferences, ["--dtype", "bf16", "--gradient_checkpointing"])])
def test_an_interrupted_run_ends_in_the_same_bits(task, cut, more, world, tmp_path, monkeypatch):
    assert train.main(command(world, task, tmp_path / "whole", *more)) == 0
    words = command(world, task, tmp_path / "cut", "--save_every", "2", *more)
    cut(monkeypatch, 6, lambda: train.main(words))
    assert train.main(words) == 0
    whole, cut = (read_tensors(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys() and all(torch.equal(whole[name], cut[name]) for name in whole)


def test_every_example_passes_the_lower_blocks_once(world, tmp_path, monkeypatch):
    rows = []
    forward = trunk.Trunk.read

    def read(self, ctx, examples):
        rows.append(len(examples))
        forward(self, ctx, examples)
        block = type(ctx.model.blocks[0]).forward

        def count(block_, h, *args):
            if block_ is ctx.model.blocks[0] and torch.is_grad_enabled():
                rows.append(h.size(0))
            return block(block_, h, *args)
        monkeypatch.setattr(type(ctx.model.blocks[0]), "forward", count)
    monkeypatch.setattr(trunk.Trunk, "read", read)
    assert train.main(command(world, "sft", tmp_path / "r")) == 0
    assert rows == [64]


@pytest.mark.parametrize("task, said", [
    ("sft", "64 examples through blocks 0 to 0, once: "), slow("simpo", "56 examples through blocks 0 to 0, once: "),
    ("kto", "77 examples prepared (56 of train, 7 of valid, 7 of test twice): ")])
def test_a_forecast_measures_what_a_run_does(task, said, world, tmp_path, monkeypatch, capsys):
    timed = []
    real = train.forecast.timed_backward

    def count(ctx, micro_batch, params, loss):
        run = type(ctx.model.blocks[0]).forward
        with monkeypatch.context() as patch:
            patch.setattr(type(ctx.model.blocks[0]), "forward",
                          lambda self, *args: timed.append(self is ctx.model.blocks[0]) or run(self, *args))
            return real(ctx, micro_batch, params, loss)
    monkeypatch.setattr(train.forecast, "timed_backward", count)
    monkeypatch.setattr(train.forecast, "BUDGET", 1.0)
    assert train.main([*command(world, task, tmp_path / "r"), "--dry_run"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert timed and not any(timed) and said in out and " MB that enter block 1" in out


@pytest.mark.parametrize("more", [["--epochs", "1"], ["--layers", "0-1"], ["--method", "prompt_tuning"]])
def test_what_does_not_pay_is_not_kept(more, world, tmp_path, monkeypatch):
    monkeypatch.setattr(trunk.Trunk, "read", None)
    words = command(world, "sft", tmp_path / "r")
    if more[0] == "--method":
        at = words.index("--layers")
        words = words[:at] + words[at + 2:] + more
    else:
        words[words.index(more[0]) + 1] = more[1]
    assert train.main(words) == 0


def test_words_for_layers():
    words = "upper", "upper-third", "upper-quarter"
    assert [parse_layers(word, 6) for word in words] == [[3, 4, 5], [4, 5], [4, 5]]
    assert [parse_layers(word, 1) for word in words] == [[0], [0], [0]]
    with pytest.raises(UserError, match="--layers lower cannot be read; .* or as one of upper upper-third"):
        parse_layers("lower", 6)
