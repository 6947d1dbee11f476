"""A folder with a text, a tiny recipe and a trained run, copied for each test that works in it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from nano_moe.cli.main import main

TINY = """\
seed: 5
model:
  vocab_size: 264
  context: 16
  n_layers: 2
  d_model: 32
  n_heads: 2
  d_ff: 64
  moe:
    n_experts: 4
    top_k: 2
    load_balancing_loss: 0.01
data:
  files: [text.txt]
  tokenizer: byte
  val_fraction: 0.2
  cache: cache
optim:
  lr: 0.01
trainer:
  steps: 6
  batch_size: 4
  precision: fp32
  accelerator: cpu
  val_every: 2
  save_every: 2
  log_every: 2
"""


class Shop:
    """Runs verbs in this process, in the folder of the test."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]):
        self.folder, self.capsys = folder, capsys

    def run(self, *arguments: str) -> tuple[int, str, str]:
        """(exit status, stdout, stderr) of a verb."""
        self.capsys.readouterr()
        status = main(list(arguments))
        out, err = self.capsys.readouterr()
        return status, out, err

    def json(self, *arguments: str) -> dict:
        """The one object that a verb prints with --json."""
        status, out, _ = self.run(*arguments, "--json")
        assert status == 0
        found = json.loads(out)  # fails on anything before or after the object
        assert isinstance(found, dict)
        return found

    def fault(self, *arguments: str) -> str:
        """The fault of a verb that must refuse: one line, status 2, no file touched or added."""
        before = self.files()
        status, _, err = self.run(*arguments)
        faults = [line for line in err.splitlines() if line.startswith("error:")]
        assert status == 2
        assert len(faults) == 1 and err.endswith(f"{faults[0]}\n")
        assert "Traceback" not in err
        assert self.files() == before
        return faults[0]

    def files(self) -> dict[str, bytes]:
        """All files below the folder but prepared tokens, which a refused verb may keep."""
        return {
            str(path.relative_to(self.folder)): path.read_bytes() if path.is_file() else b""
            for path in self.folder.rglob("*")
            if "cache" not in path.relative_to(self.folder).parts
        }

    def edit(self, path: str, old: str, new: str) -> None:
        text = Path(path).read_text()
        assert old in text
        Path(path).write_text(text.replace(old, new, 1))


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """text.txt, tiny.yaml and the finished run `done`, made once."""
    folder = tmp_path_factory.mktemp("trained")
    words = "the old fox saw a hen and ran to the river where stones lie in the sun".split()
    rng = np.random.default_rng(0)
    lines = [" ".join(rng.choice(words, 9)) for _ in range(20)]
    (folder / "text.txt").write_text("\n".join(lines) + "\n")
    (folder / "tiny.yaml").write_text(TINY)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the tests that compare with it
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["train", "tiny.yaml", "--name", "done", "--json"]) == 0
    torch.set_num_threads(threads)
    return folder


@pytest.fixture
def shop(trained, tmp_path, monkeypatch, capsys):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path / "shop"
    shutil.copytree(trained, folder)
    monkeypatch.chdir(folder)
    yield Shop(folder, capsys)
    torch.set_num_threads(threads)
