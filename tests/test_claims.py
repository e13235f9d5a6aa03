"""tests/claims.py: the verdict and the measures by hand numbers, the records' commands, the stored results."""
import dataclasses
import json
import math
import pathlib
import re

import claims
import pytest
import train
from data import toy

NAMES = [claim.name for claim in claims.CLAIMS]
MEASURED = [name for name in NAMES if claims.load(name)]


def run(side, seed, valid=None, items=None, **metrics):
    """A stored run."""
    result = {"metrics": metrics, **({"item_correct": items} if items else {})}
    return {"side": side, "seed": seed, "result": result, "valid": valid or {}}


# --------------------------------------------------------------------------------------- verdict and interval

@pytest.mark.parametrize("low, high, verdict", [
    (-0.02, 0.02, claims.HOLDS), (-0.04, 0.02, claims.UNDECIDED), (0.02, 0.04, claims.UNDECIDED),
    (-0.04, 0.04, claims.UNDECIDED), (0.03, 0.04, claims.FAILS), (-0.05, -0.03, claims.FAILS),
    (math.nan, math.nan, claims.UNDECIDED)])
def test_the_verdict_on_a_range_with_two_bounds(low, high, verdict):
    assert claims.verdict_of(low, high, -0.03, 0.03) == verdict


@pytest.mark.parametrize("low, high, verdict", [
    (0.01, 0.5, claims.HOLDS), (0.0, 0.0, claims.FAILS), (-0.5, -0.01, claims.FAILS),
    (-0.1, 0.1, claims.UNDECIDED)])
def test_the_verdict_on_a_direction(low, high, verdict):
    assert claims.verdict_of(low, high, 0.0, math.inf) == verdict


def test_the_interval_covers_seeds_and_items():
    mean, low, high = claims.interval_of([0.1, 0.3])                # t(1) = 12.7062, sd 0.1414, over sqrt(2)
    assert (mean, low, high) == pytest.approx((0.2, 0.2 - 1.27062, 0.2 + 1.27062))
    by_item = [1.0, 0.0, -1.0, 0.8]                                 # mean 0.2, sd 0.9092, t(3) = 3.1824
    half = 3.1824 * 0.909212 / 2
    assert claims.interval_of([0.2, 0.2, 0.2], by_item)[1:] == pytest.approx((0.2 - half, 0.2 + half), abs=1e-5)
    assert claims.interval_of([0.1, 0.3], by_item)[1:] == pytest.approx((0.2 - half, 0.2 + half), abs=1e-5)
    assert claims.interval_of([0.0, 0.4], [0.2, 0.2])[1:] == pytest.approx((0.2 - 2.54124, 0.2 + 2.54124))
    assert not any(map(math.isfinite, claims.interval_of([0.2])[1:]))


# ---------------------------------------------------------------------------------------------------- measures

def test_a_difference_is_paired_by_seed_and_item():
    runs = [run("a", 2, items="1100", exact_match=0.5), run("a", 1, items="1111", exact_match=1.0),
            run("b", 1, items="1000", exact_match=0.25), run("b", 2, items="0100", exact_match=0.25)]
    found = claims.difference("a", "b")(runs)
    assert found.by_seed == [0.75, 0.25] and (found.a, found.b) == ("0.750", "0.250")
    assert found.by_item == [0.5, 0.5, 0.5, 0.5]
    assert claims.difference("a", "b", same_items=False)(runs)[:2] == ([0.75, 0.25], None)
    assert claims.difference("a", "b", lambda one: one["seed"])(runs)[:2] == ([0, 0], None)


def test_the_best_rate_is_that_of_valid():
    runs = [run("a@1e-3", 1, {"loss": 0.3}, loss=0.1), run("a@1e-2", 1, {"loss": 0.2}, loss=0.9),
            run("b@1e-1", 1, {"loss": 0.3}, loss=0.4), run("b@1", 1, {"loss": 0.4}, loss=0.4)]
    sides = claims.at("a", ("1e-3", "1e-2"))
    assert sides == ("a@1e-3", "a@1e-2")
    assert claims.best(runs, sides, "loss") == "a@1e-2"             # on test it is the worse one
    found = claims.difference(sides, "b@1", "loss")(runs)
    assert found.by_seed == [0.5] and (found.a, found.b) == ("0.900 at 1e-2, edge", "0.400")


@pytest.mark.parametrize("losses, resolution", [((0.3, 0.1, 0.2), 0.25 + 0.25), ((0.3, 0.2, 0.1), math.inf)])
def test_a_best_rate_is_known_to_half_a_step_and_not_at_all_at_an_edge(losses, resolution):
    rates = ("1e-3", "3.1622777e-3", "1e-2")
    runs = [run(f"{name}@{rate}", 1, {"loss": loss}) for name, some in (("a", losses), ("b", (0.3, 0.1, 0.2)))
            for rate, loss in zip(rates, some)]
    found = claims.rate_difference(("a", rates), ("b", rates))(runs)
    assert found.by_seed == pytest.approx([rates.index(found.a) / 2 - 0.5]) and found.b == rates[1]
    assert found.resolution == pytest.approx(resolution)
    mean, low, high = claims.interval_of([0.1, 0.3], resolution=resolution)
    assert claims.largest_step(("1e-3", "1e-2", "1")) == pytest.approx(2)
    assert (mean, low, high) == pytest.approx((0.2, 0.2 - 1.27062 - resolution, 0.2 + 1.27062 + resolution))
    assert claims.verdict_of(-math.inf, math.inf, -0.3, 0.3) == claims.UNDECIDED


def test_a_difference_of_differences():
    runs = [run(side, 1, f1=value) for side, value in zip("abcd", (0.9, 0.2, 0.5, 0.1))]
    found = claims.gain_difference("ab", "cd", "f1")(runs)
    assert found.by_seed == pytest.approx([0.3]) and (found.a, found.b) == ("+0.700", "+0.400")


def test_numbers_of_logs():
    logs = {1: [0, 0, 4, 2], 2: [0, 20, 1, 1], 3: [0, 1, 5, 2]}
    runs = [{**run("few", seed), "log": {"gold": log}} for seed, log in logs.items()]
    found = claims.from_peak("few", "end")(runs)
    assert found.by_seed == [2, 0, 1] and (found.a, found.b) == ("1.667", "0.667")     # peaks: second, third, second
    assert claims.from_peak("few", "start")(runs)[0] == [0, -1, -1]
    grown = claims.growth("length")({"log": {"length": [1, None, 3, 5, 5, 9, 11]}})
    assert grown == 8                                               # (9 + 11) / 2 - (1 + 3) / 2


def test_ranks_are_compared_by_the_names_of_modules():
    ranks = {"blocks.0.attn.q": 2, "blocks.3.attn.o": 4, "blocks.0.mlp.up": 6, "blocks.2.mlp.down": 8}
    runs = [{**run("adalora", 1), "ranks": ranks}]
    claim = claims.find("adalora_upper")
    assert [p.measure(runs)[:4] for p in claim.predictions] == [([4], None, "7.00", "3.00"), ([2], None, "6.00", "4.00")]


# ----------------------------------------------------------------------------------------------------- records

@pytest.mark.parametrize("name", NAMES)
def test_every_command_parses_and_has_its_own_folder(name):
    claim = claims.find(name)
    folders = [run.folder(name) for run in claim.runs]
    assert len(set(folders)) == len(folders)
    for one in claim.runs:
        if one.call:
            assert callable(one.call)
        else:
            cfg = train.parse(one.argv(name))
            assert cfg.seed == one.seed and cfg.out == one.folder(name)
    assert len({run.seed for run in claim.runs}) >= 3
    sides = {one.side for one in claim.runs}
    assert len(sides) > 1 or name == "adalora_upper"
    assert claim.predictions and all(p.low > -math.inf or p.high < math.inf for p in claim.predictions)


def test_the_same_starting_model_is_the_same_command_everywhere():
    made = {}
    for claim in claims.CLAIMS:
        for one in claim.runs:
            if one.start:
                assert made.setdefault(one.start, one.command(claim.name)) == one.command(claim.name)
    assert "sums" in made


def test_names_are_unique_and_an_unknown_one_is_answered():
    assert len(set(NAMES)) == len(NAMES) >= 15
    with pytest.raises(SystemExit, match="there is no claim rank_one; there is shots_or_tuning"):
        claims.find("rank_one")


def test_few_rows_are_drawn_by_seed(tmp_path):
    claims.few_rows(tmp_path, ("toy/spam",), 4, (1, 2))
    one, two = ((tmp_path / f"spam-s{seed}" / "train.jsonl").read_text() for seed in (1, 2))
    assert one != two and len(one.splitlines()) == 4
    test = (tmp_path / "spam-s1" / "test.jsonl").read_text()
    assert [json.loads(line) for line in test.splitlines()] == toy.rows("toy/spam", "test")


def test_new_facts_contradict_the_world_and_are_about_other_people(tmp_path):
    claims.fact_rows(tmp_path)

    def rows(name):
        return [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
    true = {(row["prompt"], row["completion"]) for row in toy.rows("toy/questions", "train")}
    known = rows("known/train.jsonl")
    mixed = rows("mixed/train.jsonl")
    new = mixed[len(known):]
    assert mixed[:len(known)] == known and len(new) > 100
    assert all((row["prompt"], row["completion"]) in true for row in known)
    assert not any((row["prompt"], row["completion"]) in true for row in new)
    people = [{re.findall("[A-Z][a-z]+", row["prompt"])[-1] for row in some} for some in (known, new)]
    assert len(people[0]) > 5 and not people[0] & people[1]
    assert rows("new-rows/test.jsonl") == new[:100] and rows("known-rows/test.jsonl") == known[:100]


# --------------------------------------------------------------------------------------------- stored results

def test_stored_results_belong_to_claims_and_are_small():
    files = list(claims.STORED.glob("*.json"))
    assert {path.stem for path in files} <= set(NAMES)
    assert sum(path.stat().st_size for path in files) < 500_000
    assert MEASURED


@pytest.mark.parametrize("name", MEASURED)
def test_a_stored_result_is_that_of_its_record(name):
    claim, found = claims.find(name), claims.load(name)
    assert not claims.is_stale(claim, found)
    for _, _, mean, low, high, verdict in claims.measure(claim, found):
        assert low <= mean <= high and verdict in (claims.HOLDS, claims.FAILS, claims.UNDECIDED)


def test_a_changed_record_makes_its_result_stale(monkeypatch):
    name = MEASURED[0]
    claim = claims.find(name)
    first = dataclasses.replace(claim.runs[0], words=claim.runs[0].words + " --batch 5")
    changed = dataclasses.replace(claim, runs=[first, *claim.runs[1:]])
    monkeypatch.setattr(claims, "CLAIMS", [changed])
    assert "stale: the commands have changed" in claims.table()
    assert claims.HOLDS not in claims.table() and claims.FAILS not in claims.table()


def test_a_claim_without_result_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(claims, "STORED", tmp_path)
    assert claims.table().count("not run yet") == sum(len(claim.predictions) for claim in claims.CLAIMS)


def test_the_page_has_the_table_of_today():
    assert f"<!-- claims -->\n{claims.table()}\n<!-- end -->" in claims.PAGE.read_text()


def test_the_commands_of_the_page_name_claims_and_flags():
    lines = re.findall(r"^python tests/claims\.py ([^#\n]+)", claims.PAGE.read_text(), re.M)
    words = [word for line in lines for word in line.split()]
    assert len(lines) >= 4
    assert {word for word in words if word[0] != "-"} <= set(NAMES)
    assert {word for word in words if word[0] == "-"} <= {"--list", "--commands", "--table", "--write"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adalora_upper", "shots_or_tuning"])
def test_a_claim_runs_to_its_verdict(name, tmp_path, monkeypatch):
    """Two steps of each command, two seeds: the path alone. A second time nothing is computed."""
    monkeypatch.chdir(claims.ROOT)
    monkeypatch.setattr(claims, "STORED", tmp_path / "stored")
    claim = claims.find(name)
    claim = dataclasses.replace(claim, runs=[one for one in claim.runs if one.seed < 3])
    found = claims.reproduce(claim, str(tmp_path), short=True)
    claims.store(found)
    assert claims.load(name) == found and not claims.is_stale(claim, found)
    assert "predicted above" in claims.describe(claim, found)
    results = {path: path.stat().st_mtime_ns for path in pathlib.Path(tmp_path).rglob("result.json")}
    assert len(results) == len(claim.runs)
    if name == "adalora_upper":
        assert claims.reproduce(claim, str(tmp_path), short=True)["runs"] == found["runs"]
        assert all(path.stat().st_mtime_ns == at for path, at in results.items())
