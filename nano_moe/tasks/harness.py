"""The same tasks as files for lm-evaluation-harness: JSON lines and a description each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nano_moe.files import creating
from nano_moe.tasks.items import Tasks


def _metric(name: str, aggregation: str, *, higher: bool) -> dict[str, Any]:
    return {"metric": name, "aggregation": aggregation, "higher_is_better": higher}


PASSAGES = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [_metric("bits_per_byte", "bits_per_byte", higher=False)],
}
PAIRS = {
    "output_type": "multiple_choice",
    "doc_to_text": "",
    "doc_to_target": 0,
    "doc_to_choice": "{{[good, bad]}}",
    "target_delimiter": "",
    "metric_list": [_metric("acc", "mean", higher=True)],
}
CLOZE = {
    "output_type": "loglikelihood",
    "doc_to_text": "{{context}}",
    "doc_to_target": " {{target}}",
    "target_delimiter": "",
    "metric_list": [
        _metric("acc", "mean", higher=True),
        _metric("perplexity", "perplexity", higher=False),
    ],
}


def write_tasks(folder: Path, tasks: Tasks) -> list[str]:
    """A new folder for `lm_eval --include_path`; the tasks' names. Raises UserError.

    The descriptions name the folder's place, so it must stay there.
    """
    named: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
        "nano_moe_bpb": (PASSAGES, tasks.passages),
        "nano_moe_pairs": (PAIRS, tasks.pairs),
        "nano_moe_cloze": (CLOZE, tasks.cloze),
    }
    named = {name: task for name, task in named.items() if task[1]}
    place = folder.resolve()
    with creating(folder) as partial:
        partial.mkdir()
        for name, (description, items) in named.items():
            lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
            (partial / f"{name}.jsonl").write_text(lines, encoding="utf-8")
            text = json.dumps(_task(name, description, place), indent=2)  # JSON is YAML, too
            (partial / f"{name}.yaml").write_text(text + "\n", encoding="utf-8")
    return list(named)


def _task(name: str, description: dict[str, Any], place: Path) -> dict[str, Any]:
    data = {"data_files": {"test": str(place / f"{name}.jsonl")}}
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": data,
        "test_split": "test",
        **description,
        "metadata": {"version": 1},
    }
