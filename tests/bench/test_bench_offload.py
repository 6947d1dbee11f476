"""What `bench offload` reports of one budget."""

import mmap
import os
import tempfile
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from nano_moe import runs
from nano_moe.bench import offload, offload_figure
from nano_moe.bench.file_cache import MOST_LEFT, check_can_be_emptied, empty
from nano_moe.bench.offload import (
    PROMPT,
    SHARES,
    Case,
    _row,
    _untrained,
    draw_weights,
    drawn_text,
    measure,
    shares_of,
)
from nano_moe.errors import UserError

MEMORY = Path("/dev/shm")  # of Linux: a file system without a disk
EVERYTHING = 4 * 8 * 3 * 16 * 32 * 4  # layers, experts, matrices, D, F, bytes


def test_everything_in_memory_misses_nothing_once_it_was_read(tmp_path):
    run = _untrained(Path(tmp_path), quick=True)
    threads, text = torch.get_num_threads(), drawn_text(run.recipe())
    found = measure(Case(str(run.path), text, budget="100%"))
    assert torch.get_num_threads() == threads
    assert found["experts, GB"] == pytest.approx(EVERYTHING / 1e9)
    some = measure(Case(str(run.path), text, budget="12.5%", cold=True))
    assert 0 <= some["hits"] < found["hits"] <= 1 and some["tokens/s"] > 0


def test_a_cold_files_pages_are_not_in_the_systems_cache_unless_mapped(on_disk):
    path = on_disk / "file"
    with open(path, "wb") as file:
        file.write(bytes(2**20))
        os.fsync(file.fileno())
    assert empty(path) == 0
    path.read_bytes()
    assert empty(path) == 0
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert mapped[:] == bytes(2**20)
        assert empty(path) == 1
    assert [one.name for one in on_disk.iterdir()] == ["file"]


@pytest.mark.skipif(not MEMORY.is_mount(), reason=f"no {MEMORY}")
def test_a_file_in_memory_is_never_cold():
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        (Path(folder) / "file").write_bytes(bytes(2**20))
        assert empty(Path(folder) / "file") == 1
        with pytest.raises(UserError, match="100% of a file there stayed .* [(]tmpfs;"):
            check_can_be_emptied(Path(folder))


@pytest.mark.parametrize("empties", [True, False])
def test_what_stayed_in_the_cache_is_told_and_no_warm_figure_is_called_cold(
    on_disk, monkeypatch, empties
):
    run = _untrained(on_disk, quick=True)
    monkeypatch.setattr(offload, "_apart", measure)
    if not empties:
        monkeypatch.setattr(os, "posix_fadvise", lambda *_: None)
    row = _row(run, drawn_text(run.recipe()), budget="25%")
    assert row["tokens/s, warm"] > 0
    assert (row["still cached"] <= MOST_LEFT) == empties
    assert (row["tokens/s, cold"] is not None) == empties
    assert _row(run, drawn_text(run.recipe()), budget=None)["still cached"] is None


def test_without_a_budget_there_is_no_file(tmp_path):
    run = _untrained(Path(tmp_path), quick=True)
    found = measure(Case(str(run.path), drawn_text(run.recipe()), budget=None))
    assert found["hits"] == 1 and found["experts, GB"] == pytest.approx(EVERYTHING / 1e9)
    assert not list(run.path.glob("*.safetensors"))


def test_a_dense_run_is_refused_before_anything_is_measured(
    tmp_path, monkeypatch, dense_config, recipe_of
):
    run = runs.create(recipe_of(dense_config()), stem="run", name="dense", root=tmp_path)
    monkeypatch.setattr(offload, "_untrained", lambda *_: pytest.fail("began"))
    with pytest.raises(UserError, match="a dense run has no experts"):
        offload.offload(True, str(run.path))


def test_shares_that_hold_no_tokens_experts_are_left_out(tmp_path, moe_config, recipe_of):
    assert shares_of(_untrained(Path(tmp_path), quick=True)) == list(SHARES)
    recipe = recipe_of(moe_config(n_layers=1))  # 2 of 4 experts, and no more
    run = runs.create(recipe, stem="run", name="small", root=tmp_path)
    draw_weights(run)
    assert shares_of(run) == [50, 75, 100]


def test_the_text_is_of_many_tokens_and_of_its_seed(tmp_path):
    recipe = _untrained(Path(tmp_path), quick=True).recipe()
    text = drawn_text(recipe)
    assert len(text) == recipe.model.context > PROMPT and len(set(text)) > len(text) // 2
    assert text == drawn_text(recipe) != drawn_text(recipe.model_copy(update={"seed": 1}))


def test_its_figure_has_a_row_of_panels_per_run_and_a_bar_and_point_per_budget(monkeypatch):
    figures: list[Figure] = []
    monkeypatch.setattr(offload_figure, "png", lambda figure: figures.append(figure) or b"")
    runs_rows = [[_made_up(run, None), _made_up(run, 10), _made_up(run, 50), {
        **_made_up(run, 50), "policy": "lfu", "hits": 0.7,
    }] for run in ("untrained-1", "trained")]  # fmt: skip
    runs_rows[0][1]["tokens/s, cold"] = None  # not measured
    offload_figure.draw(runs_rows)
    (figure,) = figures
    assert len(figure.axes) == 6
    memory, hits, speed = figure.axes[:3]
    assert [bar.get_height() for bar in memory.patches] == pytest.approx([0.1, 0.5, 0.25, 0.25])
    lines = {str(line.get_label()): line.get_xydata().tolist() for line in hits.lines}
    assert lines["lru, read ahead"] == [[10, 0.1], [50, 0.5]] and lines["lfu"] == [[50, 0.7]]
    lines = {str(line.get_label()): line.get_xydata().tolist() for line in speed.lines}
    assert lines["warm cache of the file"] == [[10, 20], [50, 100]]
    assert lines["cold cache of the file"] == [[50, 50]]


def _made_up(run, budget):
    share = (budget or 100) / 100
    return {
        "run": run,
        "budget": f"{budget}%" if budget else "none",
        "policy": "lru, read ahead" if budget else None,
        "anonymous, GB": share,
        "from files, GB": 0.25,
        "hits": share,
        "tokens/s, warm": 200 * share,
        "tokens/s, cold": 100 * share,
    }
