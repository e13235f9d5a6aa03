"""Several processes are one run: two processes, started by torchrun, over gloo.

    equal      the weights, metrics and answers of one process, to rounding (1e-6), for every kind of loop
    shard      FSDP2 ends where a run without it ends, and its folder is a plain Hugging Face one
    resume     by another number of processes is exact, or refused
    rank 0     alone writes; a signal to any rank saves once and stops all; an error ends all with one message
"""
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import tiny
import torch

import ppo
import train
from data.runtime import distributed
from data.checkpoints.safetensors import read_tensors
from data.runtime.files import read_json
from data.text.tokenizer import Tokenizer
from model import GPT, GPTConfig, generate, sample

ROOT = pathlib.Path(train.__file__).resolve().parent
SFT = "--data chat --lr 5e-4 --steps 5 --batch 5 --max_new_tokens 3 --forgetting_data text --eval_every 2 " \
      "--eval_items 5"
PAIRS = "--data pairs --lr 2e-4 --steps 3 --batch 5 --forgetting_data none --eval_items 5"
HEAD = "--lr 2e-4 --steps 3 --batch 5 --forgetting_data none"
PPO = "--task ppo --data prompts --reward rm --lr 5e-4 --steps 2 --batch 7 --max_new_tokens 4 " \
      "--forgetting_data none --minibatches 2 --ppo_epochs 2 --eval_items 5 --micro_batch_tokens 64 " \
      "--missing_eos_penalty none"                      # rates are low: Adam divides rounding by rounding
QUICK = {"lora": SFT, "full": f"--method full {SFT}", "alone": f"{SFT} --batch 1",
         "prefix": f"--method prefix_tuning --num_virtual_tokens 4 --micro_batch_tokens 9 {SFT}",
         "shard": f"--method full --shard --keep_best loss {SFT}",
         "reward": f"--task reward {PAIRS} --max_new_tokens 4", "ppo": PPO,
         "generations": "--task eval --data chat --num_generations 3 --temperature 2 --max_new_tokens 4"}
UPPER = "--layers 1 --targets q,up"
RLOO = f"{PPO} --algo rloo --num_generations 2 --batch 8"
GROUPED = [algorithm.name for algorithm in ppo.ALGORITHMS if algorithm.compares_groups]
RESUMED = f"{SFT} --save_every 2"
SLOW = {"adalora": f"--method adalora {SFT}", "ia3": f"--method ia3 {SFT}",
        "prompt": f"--method prompt_tuning --num_virtual_tokens 4 {SFT}",
        "p_tuning": f"--method p_tuning --num_virtual_tokens 4 {SFT}",
        "p_tuning_v2": f"--method p_tuning_v2 --num_virtual_tokens 4 --prefix_dropout 0.2 {SFT}",
        "dpo": f"--task dpo {PAIRS}", "simpo": f"--task dpo --preference_loss simpo {PAIRS}",
        "kto": f"--task dpo --preference_loss kto --micro_batch_tokens 20 {PAIRS}",
        "kto_full": f"--task dpo --preference_loss kto --method full --beta 0.9 {PAIRS}",
        "upper": f"{UPPER} {SFT.replace('--steps 5', '--steps 15')}", "dpo_upper": f"--task dpo {UPPER} {PAIRS}",
        "kto_upper": f"--task dpo --preference_loss kto {UPPER} {PAIRS}", "rloo_upper": f"{UPPER} {RLOO}",
        "words": f"--task classify --data label {HEAD}",
        "head": f"--task classify --classifier head --data label --method full {HEAD}",
        "tag": f"--task tag --data tags {HEAD}",
        "pretrain": "--task pretrain --method full --data text --steps 3 --batch 5 --block_size 24",
        "shard_reward": f"--task reward {PAIRS} --max_new_tokens 4 --method full --shard",
        "shard_tag": f"--task tag --method full --shard --data tags --micro_batch_tokens 5 {HEAD}",
        "shard_dpo": f"--task dpo --method full --shard {PAIRS}",
        "shard_kto": f"--task dpo --preference_loss kto --method full --shard --beta 0.9 {PAIRS}",
        **{name: f"{PPO} --algo {name} --num_generations 2 --batch 8" for name in GROUPED},
        "reinforce": f"{PPO} --algo reinforce",
        "ptx": f"{PPO} --method full --ptx_coef 0.1 --ptx_data text",
        "soft": f"{PPO} --method p_tuning_v2 --num_virtual_tokens 4",
        "functions": PPO.replace("--reward rm", "--reward data.results.rewards:matches(.*a.*),data.toy:gold "
                                                "--reward_weights 1,0.5"),
        "eval": "--task eval --init rm --data pairs",
        "shots": "--method none --data chat --shots 2 --max_new_tokens 3",
        "sample": "--task sample --data prompts --reward rm --num_generations 4 --max_new_tokens 4 --eval_items 5"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The rows of tiny.py, and prompts; a small Llama with shared key heads; a reward model."""
    folder = tiny.world(tmp_path_factory.mktemp("world"))
    tiny.write(folder, {"prompts": [{"prompt": ab} for ab in tiny.PAIRS]})
    tokenizer = Tokenizer.from_pretrained(folder / "base")
    torch.manual_seed(0)
    model = GPT(GPTConfig(tokenizer.vocab_size, 160, 2, 2, 32, n_kv_head=1, eos=tokenizer.eos).as_family("llama"))
    for p in model.parameters():
        p.data.mul_(4 if p.dim() > 1 else 1)
    model.save_pretrained(folder / "base")
    assert train.main(argv(folder, folder / "rm", f"--task reward {PAIRS} --max_new_tokens 4")) == 0
    return folder


def argv(world, out, words):
    words = ["--init", "base", "--out", str(out), *words.split()]
    return [str(world / w) if (world / w).exists() else w for w in words]


@pytest.fixture(scope="module")
def torchrun(python):
    """torchrun(folder, commands, *modules, n=2): processes that run the commands; ranks.py says what they write."""
    def start(folder, commands, *modules, n=2):
        (folder / "jobs.json").write_text(json.dumps(commands))
        words = [python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n),
                 str(ROOT / "tests" / "ranks.py"), str(folder / "jobs.json"), *modules]
        return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder,
                                env={**os.environ, "PYTHON_EXEC": python})
    return start


def codes(folder, process, n=2):
    """The commands' exit codes, equal in all processes; and stderr."""
    err = process.communicate(timeout=600)[1]
    found = [read_json(folder / f"codes{rank}") if (folder / f"codes{rank}").exists() else err
             for rank in range(n)]
    assert all(one == found[0] for one in found), found
    return found[0], err


def weights(out):
    found = {f"{f.name}/{key}": t for f in out.glob("*/*.safetensors") for key, t in read_tensors(f).items()}
    if "head.safetensors/score.shift" in found:         # no comparison sees the bias: Adam divides rounding
        gain, bias, shift = (found.pop(f"head.safetensors/score.{key}") for key in ("gain", "bias", "shift"))
        found.update(gain=gain, offset=gain * bias + shift)     # by rounding, and the shift makes up for it
    return found


def equal_runs(a, b):
    """Weights and metrics of two runs to 1e-6 (large metrics: to so many digits), answers exactly."""
    one, two = weights(a), weights(b)
    assert one.keys() == two.keys() and all(one[key].dtype == two[key].dtype for key in one)
    far = {key: (one[key] - two[key]).abs().max().item() for key in one}
    assert not far or max(far.values()) < 1e-6, (b.name, max(far.items(), key=lambda pair: pair[1]))
    one, two = (read_json(path / "result.json") for path in (a, b))
    assert all(one[key] == two[key] for key in ("samples", "tokens", "steps", "item_correct", "skipped")), b.name
    assert one.get("generations", {}).get("right") == two.get("generations", {}).get("right"), b.name
    for kind in ("metrics", "baseline_metrics"):
        assert two[kind] == pytest.approx(one[kind], rel=2e-6, abs=2e-6), b.name
    logs = [[json.loads(line) for line in (path / "log.jsonl").open()] for path in (a, b)]
    for one, two in zip(*logs, strict=True):            # Adam does not see a gradient's scale, its norm does
        one, two = ({key: x for key, x in event.items() if isinstance(x, (int, float)) and "sec" not in key}
                    for event in (one, two))
        assert two == pytest.approx(one, rel=1e-4, abs=1e-5), b.name


# ------------------------------------------------------------------------------------------------------ equal

FAULT = """
import os, torch
from data.results import evaluate
from data.runtime.files import DataError
original = evaluate.summed_loss

def summed_loss(ctx, examples, past):
    if ctx.max_new_tokens == 7 and torch.is_grad_enabled() and os.environ["RANK"] == "1":
        raise {error}
    return original(ctx, examples, past)

evaluate.summed_loss = summed_loss
"""
BROKEN, SAYS = f"{SFT} --max_new_tokens 7", "row 7 is gone; put it back"


@pytest.fixture(scope="module")
def many(world, torchrun, tmp_path_factory):
    """The quick loops by two processes; two runs that one process began; one that ends badly in rank 1."""
    folder = tmp_path_factory.mktemp("many")
    jobs = {**QUICK, "resumed": RESUMED, "refused": f"{RESUMED} --dropout 0.1", "broken": BROKEN}
    commands = {name: argv(world, folder / name, words) for name, words in jobs.items()}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("resumed", "refused"):
            tiny.stopped(patch, 4, lambda: train.main(commands[name]))
    (folder / "fault.py").write_text(FAULT.format(error=f"DataError({SAYS!r})"))
    p = torchrun(folder, list(commands.values()), "fault")
    return folder, p.communicate(timeout=600)[1], [read_json(folder / f"codes{rank}") for rank in (0, 1)]


@pytest.mark.parametrize("name", [*QUICK, "resumed"])
def test_two_processes_are_one_run(name, many, world, tmp_path):
    words = {**QUICK, "resumed": RESUMED}[name].replace("--shard", "")
    assert train.main(argv(world, tmp_path / name, words)) == 0
    equal_runs(tmp_path / name, many[0] / name)


@pytest.mark.slow
def test_every_loop_and_three_processes(world, torchrun, tmp_path):
    for n, jobs in (2, SLOW), (3, {name: QUICK[name] for name in ("lora", "prefix", "shard", "ppo")}):
        (tmp_path / str(n)).mkdir()
        commands = [argv(world, tmp_path / str(n) / name, words) for name, words in jobs.items()]
        found, err = codes(tmp_path / str(n), torchrun(tmp_path / str(n), commands, n=n), n)
        assert found == [0] * len(jobs), err
        for name, words in jobs.items():
            out = tmp_path / f"{name}-{n}"
            assert train.main(argv(world, out, words.replace("--shard", ""))) == 0
            equal_runs(out, tmp_path / str(n) / name)


def test_a_sharded_run_leaves_a_plain_folder(many):
    plain, made = many[0] / "full" / "model", many[0] / "shard" / "model"
    assert {f.name for f in plain.iterdir()} == {f.name for f in made.iterdir()}
    assert read_json(plain / "config.json") == read_json(made / "config.json")
    assert train.load(many[0] / "shard")[0].config.tied


# -------------------------------------------------------------------------------------------------- rank 0 alone

def test_rank_0_alone_writes_and_prints(many):
    folder, err, found = many
    events = [json.loads(line)["event"] for line in (folder / "lora" / "log.jsonl").open()]
    assert events == ["baseline", "train", "train", "valid", "train", "train", "valid", "train", "save", "valid", "test"]
    lines = [json.loads(line)["out"] for line in (folder / "results.jsonl").open()]
    assert len(lines) == len(set(lines)) == len(QUICK) + 1
    assert read_json(folder / "lora" / "config.json")["machine"]["processes"] == 2
    assert err.count("was begun by 1 processes, each with its own --dropout") == 1
    assert found[0][:-1] == found[1][:-1] == [0] * (len(QUICK) + 1) + [2], err


def test_an_error_in_one_ends_all_with_one_message(many):
    folder, err, found = many
    assert err.count(SAYS) == err.count(f"train.py: {SAYS}") == 1 and "Traceback" not in err
    assert (found[0][-1], found[1][-1]) == (1, 65)                  # lost the other; bad data
    assert read_json(folder / "broken" / "failed.json")["reason"] == SAYS


@pytest.mark.slow
@pytest.mark.parametrize("error, says", [("KeyError(7)", "KeyError: 7"),
                                         ("SystemExit(os.kill(os.getpid(), 9))", "is gone and gave no reason")])
def test_a_crash_of_one_ends_all(error, says, world, torchrun, tmp_path):
    (tmp_path / "fault.py").write_text(FAULT.format(error=error))
    began = time.monotonic()
    err = torchrun(tmp_path, [argv(world, tmp_path / "r", BROKEN)], "fault").communicate(timeout=200)[1]
    assert time.monotonic() - began < 100
    if "gone" in says and "(SIGTERM)" in err:       # torchrun saw it first, and ended the other: no message
        return
    assert err.count(says) == 1 and err.count("train.py: ") == ("gone" in says), err
    assert says in read_json(tmp_path / "r" / "failed.json")["reason"]


def signalled(world, torchrun, tmp_path, words, rank):
    """A run of two processes, of which one gets SIGTERM after its first save."""
    p = torchrun(tmp_path, [argv(world, tmp_path / "cut", words)])
    tiny.wait_for(tmp_path / "cut" / "state.pt", p)
    os.kill(int((tmp_path / f"pid{rank}").read_text()), signal.SIGTERM)
    found, err = codes(tmp_path, p)
    assert found == [75] and err.count("interrupted; the same command continues from step ") == 1, err
    assert not (tmp_path / "cut" / "result.json").exists()
    return torch.load(tmp_path / "cut" / "state.pt", weights_only=True)["counters"]["step"]


def test_a_signal_to_one_stops_all_and_one_goes_on(world, torchrun, tmp_path):
    words = SFT.replace("--steps 5", "--steps 150 --save_every 5") + " --eval_every 999"
    assert 5 <= signalled(world, torchrun, tmp_path, words, rank=1) < 150
    for name in ("cut", "whole"):
        assert train.main(argv(world, tmp_path / name, words)) == 0
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert max((one[key] - two[key]).abs().max() for key in one) < 1e-5         # after 150 steps of Adam
    log = [json.loads(line) for line in (tmp_path / "cut" / "log.jsonl").open()]
    assert [e["step"] for e in log if e["event"] == "train"] == list(range(1, 151))


@pytest.mark.slow
def test_slices_go_on_as_a_whole_and_the_other_way_round(world, torchrun, tmp_path, monkeypatch):
    """A sharded run that was stopped is ended by one process; what one process began, by a sharded run."""
    words = "--method full " + SFT.replace("--steps 5", "--steps 60 --save_every 5")
    signalled(world, torchrun, tmp_path, words + " --shard", rank=0)
    for name in ("cut", "whole"):
        assert train.main(argv(world, tmp_path / name, words)) == 0
    tiny.stopped(monkeypatch, 20, lambda: train.main(argv(world, tmp_path / "back", words)))
    p = torchrun(tmp_path, [argv(world, tmp_path / "back", words + " --shard")])
    assert codes(tmp_path, p)[0] == [0]
    one = weights(tmp_path / "whole")
    for name in ("cut", "back"):
        two = weights(tmp_path / name)
        assert max((one[key] - two[key]).abs().max() for key in one) < 1e-5, name       # 60 steps of Adam


def test_what_one_process_does_is_refused_to_several(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(distributed.dist_state, "size", 2)
    monkeypatch.setattr(distributed, "start", lambda: None)
    for words in ("--task chat", "--task show", "--task check", "--task table", "--task merge"):
        assert train.main(words.split()) == 2
        assert "leave torchrun out" in capsys.readouterr().err
    monkeypatch.undo()
    assert train.main(argv(world, tmp_path / "r", f"--method full --shard {SFT}")) == 2
    assert "start several" in capsys.readouterr().err
    assert train.main("--method full --shard --compile".split()) == 2
    assert "leave one of them out" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------- rank shards and uniforms

def test_rank_shards_hold_every_item_once_and_weigh_about_the_same():
    weights = [(7 * i) % 23 + 1 for i in range(40)]
    items = [f"item {i}" for i in range(40)]
    for n in (1, 2, 3, 7):
        shards = distributed.partition(items, weights, n)
        assert sorted(sum(shards, [])) == sorted(items) and len(shards) == n
        load = [sum(weights[items.index(item)] for item in shard) for shard in shards]
        assert max(load) - min(load) <= max(weights)
        assert all(shard == sorted(shard, key=items.index) for shard in shards)
    assert distributed.partition(items[:2], weights[:2], 3).count([]) == 1


def test_uniforms_sample_the_distribution_and_never_a_token_of_probability_0():
    logits = torch.tensor([[0.0, 1.0, -torch.inf, 2.0, -torch.inf]])
    u = torch.rand(40000, generator=torch.Generator().manual_seed(0))
    drawn = sample(logits.expand(40000, 5), uniforms=u).bincount(minlength=5) / 40000
    assert (drawn - logits[0].softmax(-1)).abs().max() < 0.01 and drawn[2] == drawn[4] == 0
    edge = torch.tensor([0.0, 1 - 2 ** -24])
    assert sample(logits.expand(2, 5), uniforms=edge).tolist() == [0, 3]


def test_a_row_with_its_own_uniforms_does_not_depend_on_its_neighbours(world):
    model, _, _ = train.load(world / "base")
    prompts = [[5, 6], [7], [8, 9, 10, 11]]
    uniforms = torch.rand(3, 6, generator=torch.Generator().manual_seed(1))
    whole = generate(model, prompts, 6, eos=range(100), uniforms=uniforms)
    assert len(set(map(len, whole))) > 1                                        # some rows finish early
    for i in (2, 0, 1):
        assert generate(model, prompts[i:i + 1], 6, eos=range(100), uniforms=uniforms[i:i + 1]) == whole[i:i + 1]


def test_threads_of_gloo_cannot_fail_a_run_that_has_ended(tmp_path):
    """What aborts while the interpreter ends comes too late to be the exit code; what was printed is there."""
    program = ("import atexit, os\nimport train\natexit.register(os.abort)\ntrain.main = lambda: print('done') or 0\n"
               "train.distributed.end = lambda: None\ntrain.dist_state.size = 2\ntrain.run_and_exit()")
    p = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (p.returncode, p.stdout) == (0, "done\n"), p.stderr
