"""toy/sums: sums whose answers a program checks, and the stages that `--task ppo` has on them."""
import re

import pytest

import train
from data import toy
from data.toy import sums

WORK = re.compile(r"(\d)([+-]\d)=(\d)")


@pytest.fixture(scope="module")
def rows():
    names = ("toy/sums", "toy/sums_chat")
    return {(name, split): toy.rows(name, split) for name in names for split in toy.SPLITS}


def test_a_sum_by_hand():
    assert sums.prompt_of([3, 5, -2, 1]) == "3+5-2+1=?"
    assert sums.steps_of([3, 5, -2, 1]) == ["3+5=8", "8-2=6", "6+1=7"]


def test_answers_are_the_values_of_their_prompts(rows):
    for split in toy.SPLITS:
        for row in rows["toy/sums", split]:
            assert eval(row["prompt"].removesuffix("=?")) == int(row["answer"]) in range(10), row


def test_demonstrations_are_right_and_show_their_work_or_do_not(rows):
    with_work = 0
    for row in rows["toy/sums_chat", "train"]:
        gold = {"answer": str(eval(row["prompt"].removesuffix("=?")))}
        assert sums.right(row["prompt"], row["completion"], gold) == 1, row
        steps = WORK.findall(row["completion"])
        with_work += bool(steps)
        for before, change, after in steps:
            assert int(before) + int(change) == int(after), row
        if steps:                                           # every number of the prompt, in its order
            assert steps[0][0] + "".join(step[1] for step in steps) + "=?" == row["prompt"]
    assert 0 <= with_work / 3000 - (1 - sums.DIRECT) < 0.06     # rows that occur twice are dropped, often short ones


def test_no_sum_of_test_occurs_elsewhere(rows):
    asked = {key: {row["prompt"] for row in some} for key, some in rows.items()}
    for name in ("toy/sums", "toy/sums_chat"):
        for split in ("train", "valid"):
            assert not asked["toy/sums", "test"] & asked[name, split]
    assert not asked["toy/sums", "valid"] & asked["toy/sums_chat", "train"]


@pytest.mark.parametrize("answer, score", [
    ("The answer is 7.", 1), ("3+5=8, 8-2=6, 6+1=7. The answer is 7.", 1), ("The answer is 8.", 0), ("7", 0),
    ("", 0),
    ("The answer is 77.", 0), ("The answer is 7", 0), ("The answer is 8. The answer is 7.", 1),
    ("The answer is 7. The answer is 8.", 0)])
def test_right_reads_the_last_answer_that_is_stated(answer, score):
    assert toy.right("3+5-2+1=?", answer, {"prompt": "3+5-2+1=?", "answer": "7"}) == score


def test_the_data_set_says_which_stages_and_rewards_it_has(monkeypatch, tmp_path):
    """SFT on the demonstrations, then RL with the program as reward; letters have a reward model between."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "forecast_stage", lambda cfg: train.forecast.Forecast(1, 1, (1.0, 2.0), {}))
    started = []
    monkeypatch.setattr(train, "run_supervised", started.append)
    run_ppo = train.run_ppo
    monkeypatch.setattr(train, "run_ppo", started.append)
    run_ppo(train.parse(["--task", "ppo", "--algo", "grpo", "--data", "toy/sums"]))
    sft, rl = started
    assert (sft.task, sft.data, rl.init) == ("sft", "toy/sums_chat", train.default_out(sft))
    assert rl.reward == "data.toy:right" and train.gold_reward_of(rl) is None
    started.clear()
    run_ppo(train.parse(["--task", "ppo"]))
    sft, reward, rl = started
    assert (sft.data, reward.data, reward.init) == ("toy/letters", "toy/preferences", train.default_out(sft))
    assert rl.reward == train.default_out(reward) and train.gold_reward_of(rl) == "data.toy:gold"


def test_a_reward_that_is_given_goes_before_that_of_the_data():
    words = ["--task", "sample", "--data", "toy/sums"]
    assert train.reward_of(train.parse(words)) == "data.toy:right"
    assert train.reward_of(train.parse([*words, "--reward", "my:own"])) == "my:own"
    assert train.reward_of(train.parse(["--task", "sample", "--data", "other.jsonl"])) is None
