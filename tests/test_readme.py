"""What the README says exists, exists."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from making import no_make

from nano_moe import recipe_file
from nano_moe.census import census
from nano_moe.cli.main import VERBS, main
from nano_moe.config import ModelConfig, MoEConfig
from nano_moe.evaluation import evaluate

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
ROOMS = (
    *("data", "nano_moe/bench", "nano_moe/export", "nano_moe/inference", "nano_moe/model"),
    *("nano_moe/tasks", "nano_moe/training", "recipes", "recipes/clock", "recipes/gpu"),
    "recipes/schemes",
)
PAGES = "".join((ROOT / room / "README.md").read_text(encoding="utf-8") for room in ROOMS)
SCHEMES = (ROOT / "nano_moe/model/README.md").read_text(encoding="utf-8")
TRAPS = (ROOT / "tests" / "test_traps.py").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
COMMANDS = [line for block in (README + PAGES).split("```")[1::2] for line in block.splitlines()]


def test_every_make_target_it_names_exists():
    named = set(re.findall(r"\bmake ([a-z][a-z-]+)", README + PAGES))
    assert {"train", "test", "setup", "tensorboard"} <= named
    assert named <= TARGETS


def test_every_verb_is_in_it():
    for verb in VERBS:
        assert f"`{verb}" in README or f"nano_moe {verb}" in README, verb


def test_every_path_it_names_exists():
    named = re.findall(r"\b(?:recipes|tests|nano_moe|data)/[\w./-]*\w", README + PAGES)
    assert len(named) > 20
    made = "data/embedded-"  # by whoever prepares text
    missing = [path for path in named if not (ROOT / path).exists()]
    assert [path for path in missing if not path.startswith(made)] == []


READING = [
    given
    for given in (shlex.split(line, comments=True) for line in COMMANDS if "make " in line)
    if given[:1] == ["make"] and given[1] in ("count", "show", "train", "prepare")
    if not any(word.startswith("RECIPE=checkpoints/") for word in given)
]


@pytest.mark.parametrize("given", READING, ids=" ".join)
def test_recipes_of_its_commands_load_with_their_overrides(given):
    of_make = {"RECIPE": "recipes/mixtral.yaml"}  # as in the Makefile
    of_make |= dict(word.split("=", 1) for word in given[2:] if word.partition("=")[0].isupper())
    fields = [word for word in given[2:] if not word.partition("=")[0].isupper()]
    recipe_file.load_any(ROOT / of_make["RECIPE"], fields)


def test_commands_that_load_recipes_are_found():
    assert {given[1] for given in READING} >= {"train", "count", "show"}
    assert "\nRECIPE = recipes/mixtral.yaml\n" in (ROOT / "Makefile").read_text()


def dry(*arguments):
    command = ["make", "--dry-run", "--silent", *arguments]
    return subprocess.run(command, cwd=ROOT, env=no_make(), capture_output=True, text=True)


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_a_target_refuses_what_it_would_drop(target):
    for unused in ("LITGPT_PYTHON=x", "MINUTES=1"):
        if (target, unused) not in {("bench", "LITGPT_PYTHON=x"), ("soak", "MINUTES=1")}:
            done = dry(target, unused)
            assert done.returncode == 2
            assert f"make {target} does not take {unused.split('=')[0]}" in done.stderr
    if target not in {"train", "resume", "count", "show", "prepare"}:
        assert "does not take 'model.d_model=3'" in dry(target, "model.d_model=3").stderr


@pytest.mark.parametrize("verb", VERBS)
def test_make_hands_extra_arguments_to_the_verb(verb):
    target = "reproduce" if verb == "study" else verb
    given = {
        "export": ["RUN=r", "OUT=o"],
        "import": ["FROM=f"],
        "break-even": ["DENSE=d", "SPARSE=s"],
        "report-html": ["RUN=r", "OUT=o"],
        **{verb: ["RUN=r"] for verb in ("resume", "eval", "sample", "explore")},
        "compare": ["RUNS=a b"],
    }
    done = dry(target, *given.get(verb, []), "ARGS=--more of --these")
    if verb in {"show", "tensorboard"}:  # have none
        assert f"make {verb} does not take ARGS" in done.stderr
    else:
        assert f"-m nano_moe {verb}" in done.stdout
        assert "--more of --these" in done.stdout


@pytest.mark.parametrize("room", [".", *ROOMS, "recipes/studies/results"])
def test_every_link_leads_somewhere(room):
    for page in (ROOT / room).glob("*.md"):
        for path in re.findall(r"\]\((?!http)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / path).exists(), f"{page}: {path}"


def test_the_file_tree_lists_every_room():
    (tree,) = [b for b in README.split("```")[1::2] if re.search(r"^ *nano_moe/", b, re.MULTILINE)]
    for path in (ROOT / "nano_moe").iterdir():
        room = path.name + "/" * path.is_dir()
        if not room.startswith("__"):
            assert re.search(rf"(?<![\w-]){re.escape(room)}", tree), f"{room} is not in the tree"


def test_the_table_of_schemes_names_fields_files_and_tests_that_exist():
    rows = [line.strip("|").split("|") for line in SCHEMES.splitlines() if line.startswith("| ")]
    assert len(rows) > 15
    fields = ModelConfig.model_fields.keys() | MoEConfig.model_fields.keys()
    for scheme, named, _, code, tests, _ in rows[1:]:
        for field in re.findall(r"`(\w+)", named):
            assert field in fields, f"{scheme}: {field}"
        for folder, cell in (("nano_moe/model", code), ("tests", tests)):
            for path in re.findall(r"`([\w/]+\.py)`", cell):
                assert (ROOT / folder / path).is_file(), f"{scheme}: {path}"
        for trap in re.findall(r"\bT(\d+)", tests):
            assert f"def test_t{int(trap):02d}_" in TRAPS, f"{scheme}: T{trap}"


GPU = ROOT / "recipes" / "gpu"
COST = r"not run by us: (.+?) weights, (.+?) active, (.+?) tokens, (.+?) FLOPs, (.+?), (.+? h)\. "
COSTS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (GPU / "README.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("| [")
]


@pytest.mark.parametrize("row", COSTS, ids=lambda row: " ".join(row[:2]))
def test_costs_on_a_gpu_are_what_count_says(row, capsys):
    name, given, *told = row
    path = GPU / re.search(r"\]\((.+)\)", name)[1]
    assert main(["count", str(path), *re.findall(r"[\w.]+=\d+", given), "--gpu"]) == 0
    (found,) = re.findall(COST, capsys.readouterr().out)
    assert told == list(found)
    if "=" not in given:
        assert f"# Computed: {found[-2]}, {found[-1]} of" in path.read_text(encoding="utf-8")


def test_each_recipe_for_a_gpu_has_its_costs_for_both_cards():
    paths = sorted(path.name for path in GPU.glob("*.yaml") if path.name != "base.yaml")
    assert sorted(row[0] for row in COSTS) == sorted(2 * [f"[{one}]({one})" for one in paths])


def test_the_model_it_writes_down_counts_as_it_says(tmp_path):
    (block,) = [b for b in README.split("```")[1::2] if "model: #" in b]
    (tmp_path / "mine.yaml").write_text(block)
    counted = census(recipe_file.load_any(tmp_path / "mine.yaml"))
    said = re.findall(r"[\d.]+(?=B[,\s])", block)
    assert [f"{n / 1e9:.4g}" for n in (counted.total_params, counted.active_params)] == said


def test_the_figures_it_explains_are_those_of_an_evaluation(moe_config, build, tiny_corpus):
    table = README.split("## Reading a run")[1].split("\n## ")[0]
    (row,) = evaluate(
        build(moe_config(n_layers=1)), tiny_corpus, batch_size=4, precision="fp32"
    ).routing
    explained = set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE))
    assert row.keys() - {"layer", "load", "domain_load"} <= explained
