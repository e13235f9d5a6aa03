"""toy/sums: sums whose answers a program checks."""
import sys

from data.runtime.user_functions import load_reward


def test_a_reward_of_three_arguments_gets_the_row(tmp_path, monkeypatch):
    (tmp_path / "rewards_of_rows.py").write_text("def equal(prompt, answer, row):\n"
                                                 "    return float(answer == row['answer'])\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    score = load_reward("reward", "rewards_of_rows:equal")
    assert score("1+1=?", "2", {"answer": "2"}) == 1 and score("1+1=?", "3", {"answer": "2"}) == 0
    del sys.modules["rewards_of_rows"]
