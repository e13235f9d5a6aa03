"""README.md and the packages' pages are held true: every command on them is run, pasted into a copy.

The quick suite parses every command and runs the library example. The slow suite runs every block of a page in
order, in one copy of the repository, with tiny lengths (short.py) and loops of one or two words. Blocks that
need data run with the copies in ASSETS, those that need SmolLM2 with the folder in the variable SMOLLM2.
"""
import importlib.util
import os
import pathlib
import re
import shlex
import shutil
import subprocess

import pytest

import train
from data.runtime import cache

ROOT = pathlib.Path(train.__file__).resolve().parent
README = ROOT / "README.md"
PAGES = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8")
         for page in sorted([README, *ROOT.glob("data/*/README.md")])}
BLOCK = re.compile(r"(?:^<!-- (?P<mark>[\w. ]+) -->\n)?^```(?P<kind>bash|python)(?P<skip> skip:[^\n]*)?\n(?P<text>.*?)^```$",
                   re.M | re.S)
LOOP = re.compile(r"for (\w+) in ([^;$]*); do((?:(?!\bfor\b).)*?)\bdone\b", re.S)
WORD = re.compile(r'"[^"]*"|\S+')
PLACEHOLDER = re.compile(r"/path/to/|\b(FILE|FOLDER|PYTHON)\b")
MODELS = ("smollm2-135m-instruct",)                     # what the variable SMOLLM2 is the folder of
IN_CI = ("main command", "test command")                # .ci/run runs these word for word


def blocks(page):
    return [match.groupdict() for match in BLOCK.finditer(PAGES[page])]


def words_of(text):
    return WORD.findall(text.replace("\\\n", " "))


def unrolled(text):
    """A block in which every loop over words is all of its commands; other variables become the number 1."""
    def all_of(match):
        name, words, body = match.groups()
        return "\n".join(body.replace(f"${name}", word.strip('"')) for word in words_of(words))
    while LOOP.search(text):
        text = LOOP.sub(all_of, text, count=1)
    return re.sub(r"\$\{?\w+\}?", "1", text)


def shortened(text):
    """A block whose longest loop runs over its first and last word, and the others over their last."""
    loops = re.findall(r"for \w+ in ([^;$]*); do", text)
    longest = max(loops, key=lambda words: len(words_of(words)), default=None)
    for words in set(loops):
        kept = words_of(words)[-1:]
        if words == longest:
            kept = words_of(words)[:1] + kept
        text = text.replace(f" in {words}; do", f" in {' '.join(kept)}; do")
    return text


def commands():
    """Every command line of train.py on every page, without the variables of loops."""
    found = set()
    for page in PAGES:
        for block in blocks(page):
            if block["kind"] == "bash":
                text = re.sub(r"\\\n", " ", re.sub(r"(?m)(^|\s)#.*$", "", block["text"]))
                for part in re.split(r"\n|;|&&|\|", unrolled(text)):
                    if line := re.search(r"train\.py(.*)", part):
                        found.add(line[1].strip())
    return sorted(found)


def test_there_are_commands():
    assert len(commands()) > 50
    assert "--method lora --rank 8" in commands()
    assert "--task reward --init out/rlhf/sft-s3 --seed 3 --out out/rlhf/rm-s3" in commands()


@pytest.mark.parametrize("line", commands())
def test_every_command_parses(line):
    words = shlex.split(line)
    if "--help" in words:
        with pytest.raises(SystemExit) as stop:
            train.parse(words)
        assert stop.value.code == 0
    else:
        train.parse(words)


def test_links_and_files_that_are_named_exist():
    for page, text in PAGES.items():
        folder = (ROOT / page).parent
        for target in re.findall(r"\]\(([^)#:]+)\)|src=\"([^\"]+)\"", text):
            assert (folder / "".join(target)).exists(), (page, target)
        for name in re.findall(r"`((?:data/|tests/)[\w/]+\.py)`", text):
            assert (ROOT / name).exists(), (page, name)


def test_python_blocks_compile():
    for page in PAGES:
        for block in blocks(page):
            if block["kind"] == "python":
                compile(block["text"], page, "exec")


def test_ci_runs_the_two_commands_of_the_readme():
    marked = {block["mark"]: block["text"] for block in blocks("README.md")}
    assert "train.py --method lora" in marked["main command"]
    assert "pytest -q" in marked["test command"] and "requirements.txt" in marked["test command"]
    ci = (ROOT / ".ci" / "run").read_text()
    for mark in IN_CI:
        assert mark in ci


def test_nothing_is_left_to_fill_in():
    for page, text in PAGES.items():
        assert "@@" not in text and "TODO" not in text, page


def test_old_names_are_gone():
    """An old flag is answered with its new name, so no page may have one."""
    from data.runtime.flags import RENAMED, RENAMED_VALUES
    allowed = {"by"}                                    # the flag of --task table
    for page, text in PAGES.items():
        found = set(re.findall(r"--([a-z_]+)", text)) & set(RENAMED) - allowed
        assert not found, (page, found)
        for name, values in RENAMED_VALUES.items():
            assert not set(re.findall(rf"--{name} (\w+)", text)) & set(values), page


def test_the_library_example_prints_what_the_readme_says(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    code, printed = re.search(r"<!-- library -->\n```python\n(.*?)```\n\n```\n(.*?)```\n<!-- end -->",
                              PAGES["README.md"], re.S).groups()
    exec(code, {})
    assert capsys.readouterr().out == printed


# ------------------------------------------------------------------------------------------ run as they are pasted

PYTHON = """#!/bin/bash
# The python of fork_server.py, with tiny lengths for train.py and the copies in ASSETS for data/fetch.py.
case "$1" in
    train.py) shift; exec "{python}" tests/short.py "$@" ;;
    data/fetch.py) [ "$2" = --list ] || exec "{python}" "$@" --from "$ASSETS/raw" --unverified ;;
esac
exec "{python}" "$@"
"""
TORCHRUN = """#!/bin/bash
export PYTHON_EXEC="{python}"
exec "{python}" -m torch.distributed.run "${{@/train.py/tests/short.py}}"
"""


def copy_repository(folder):
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    for name in names:
        if (ROOT / name).is_file() and not name.startswith("tests/fixtures/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    assert (folder / "tests" / "short.py").exists()
    return folder


def paste(text, folder, bin_folder):
    """Run a block in bash; fails with what it printed."""
    env = {**os.environ, "PATH": f"{bin_folder}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    env.setdefault("ASSETS", str(ROOT.parent / "shared" / "assets"))
    done = subprocess.run(["bash", "-e", "-o", "pipefail", "-c", text], cwd=folder, env=env, capture_output=True,
                          text=True, stdin=subprocess.DEVNULL, timeout=900)
    assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done


def missing(text):
    """What a block needs that is not here, or None."""
    assets = pathlib.Path(os.environ.get("ASSETS", ROOT.parent / "shared" / "assets"), "raw")
    if PLACEHOLDER.search(text):
        return "a placeholder"
    if any(name in text for name in MODELS) and "SMOLLM2" not in os.environ:
        return "SMOLLM2"
    for name in cache.DATASETS:
        if re.search(rf"(fetch\.py|--data) {name}\b", text) and not list(assets.glob(f"{name}__*")):
            return f"{name} in ASSETS"
    return None


def with_local_model(text):
    """The block with the folder in SMOLLM2 in place of the fetched model."""
    for name in MODELS:
        text = re.sub(rf"python data/fetch\.py {name}\b", "true", text)
        text = text.replace(f"--init {name}", f"--init {shlex.quote(os.environ.get('SMOLLM2', name))}")
    return text


@pytest.fixture(scope="module")
def bin_folder(python, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bin")
    for name, text in (("python", PYTHON), ("torchrun", TORCHRUN)):
        (folder / name).write_text(text.format(python=python))
        (folder / name).chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def pasted(tmp_path_factory, bin_folder):
    """A copy of the repository in which the README's first command has been given, and one of another method."""
    folder = copy_repository(tmp_path_factory.mktemp("copy"))
    done = paste("python train.py --method lora", folder, bin_folder)
    (folder / "printed.txt").write_text(done.stdout)
    paste("python train.py --method full", folder, bin_folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted(PAGES))
def test_every_block_runs_as_pasted(page, pasted, bin_folder, tmp_path):
    folder = tmp_path / "house"
    shutil.copytree(pasted, folder)
    for block in blocks(page):
        if block["skip"] or block["mark"] in (*IN_CI, "lora.py"):
            continue
        if block["mark"] and block["mark"].endswith(".py"):
            (folder / block["mark"]).write_text(block["text"])
        elif block["kind"] == "python":
            (folder / "pasted.py").write_text(block["text"])
            paste("python pasted.py", folder, bin_folder)
        elif "--plot" in block["text"] and not importlib.util.find_spec("matplotlib"):
            continue
        elif not missing(block["text"]):
            paste(with_local_model(shortened(block["text"])), folder, bin_folder)


@pytest.mark.slow
def test_a_run_ends_as_the_readme_shows(pasted):
    """Other numbers, for it is a short run; the same metrics, the same summary, the same next command."""
    shown = re.search(r"```\n( +before +after\n.*?)```", PAGES["README.md"], re.S)[1]
    for text in (shown, (pasted / "printed.txt").read_text()):
        assert text.splitlines()[0].split() == ["before", "after"]
    printed = (pasted / "printed.txt").read_text()
    for pattern in (r"^(\w+) +[-\d].*$", r"(\w+)=", r"^python (.*)$", r"^  (\w+) "):
        assert re.findall(pattern, shown, re.M) == re.findall(pattern, printed, re.M), pattern


@pytest.mark.slow
def test_the_added_method_works_everywhere(pasted, bin_folder, tmp_path):
    folder = tmp_path / "house"
    shutil.copytree(pasted, folder)
    code = next(block["text"] for block in blocks("README.md") if block["mark"] == "lora.py")
    added, record = code.rstrip().rsplit("\n", 1)
    source = (folder / "lora.py").read_text()
    old = re.search(r"^LORA_VARIANTS = .*$", source, re.M)[0]
    assert record.startswith(old.split(")")[0])
    (folder / "lora.py").write_text(source.replace(old, f"{added}\n{record}"))
    done = paste("python train.py --fa; python train.py --task eval --init out/sft-lora-faTrue-s1 --eval_items 4\n"
                 "python train.py --task merge --init out/sft-lora-faTrue-s1 --out out/merged\n"
                 "python train.py --fa --help; python train.py --task table", folder, bin_folder)
    assert "keeps its random start" in done.stdout


@pytest.mark.slow
def test_an_edited_equation_keeps_both_results(pasted, bin_folder, tmp_path):
    folder = tmp_path / "house"
    shutil.copytree(pasted, folder)
    block = next(block["text"] for block in blocks("README.md") if "sed -i" in block["text"])
    done = paste(block, folder, bin_folder)
    assert "lora.py: LoRA.scale_of changed since this run was made; the old run is now" in done.stderr
    assert len(re.findall(r"^lora +\w{8} ", done.stdout, re.M)) == 2
