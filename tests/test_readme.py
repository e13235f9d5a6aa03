"""The README is held true: its commands parse, its files exist, CI runs its test command word for word."""
import pathlib
import re
import shlex

import pytest

import train

ROOT = pathlib.Path(train.__file__).resolve().parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.S)


def commands():
    """Every train.py command of the README; a loop over words is all of its commands, other variables are a
    number."""
    def loop(match):
        name, words, body = match.groups()
        return "\n".join(body.replace(f"${name}", word) for word in shlex.split(words.replace("\\\n", " ")))
    for block in BLOCKS:
        block = re.sub(r"for (\w+) in ([^;$]*); do((?:(?!\bfor\b).)*?)done", loop, block, flags=re.S)
        for part in re.split(r"\n|;|&&|\|", re.sub(r"\\\n", " ", re.sub(r"(?m)#.*$", "", block))):
            if found := re.search(r"train\.py(.*)", re.sub(r"\$\{?\w+\}?", "1", part)):
                yield found[1].strip()


@pytest.mark.parametrize("line", sorted(set(commands())))
def test_commands_parse(line, monkeypatch):
    words = [w for w in shlex.split(line) if w != "done"]
    if "--help" in words:
        with pytest.raises(SystemExit):
            train.parse(words)
    else:
        train.parse(words)


def test_there_are_commands():
    assert len(set(commands())) > 5


def test_files_named_exist():
    for name in set(re.findall(r"`((?:data/|tests/)?\w+\.py)`", README)):
        assert (ROOT / name).exists(), name


def test_ci_runs_the_readmes_test_command():
    command = re.search(r"<!-- test command -->\n```bash\n(.*?)\n```\n<!-- end -->", README, re.S)[1]
    assert "pytest -q" in command and "requirements.txt" in command
    assert "<!-- test command -->" in (ROOT / ".ci" / "run").read_text()


def test_nothing_is_left_to_fill_in():
    assert "@@" not in README and "TODO" not in README


def test_the_padded_row_is_what_the_code_prints(capsys):
    block = re.search(r"<!-- row -->\n```python\n(.*?)```\n\n```\n(.*?)```\n<!-- end -->", README, re.S)
    code, printed = block.groups()
    exec(code, {})
    assert capsys.readouterr().out == printed
