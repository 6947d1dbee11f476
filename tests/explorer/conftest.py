"""Runs as training leaves them, made without training, in a folder of their own.

routed    3 layers, the first dense, 4 experts of which a token visits 2, and a shared one
lifted    4 layers of 4 experts, sigmoid scores and a bias that decides
tight     8 experts, one per token, under a capacity that drops tokens
hashed    a fixed hash of the token
choosing  experts choose their tokens
dense     no experts
"""

import contextlib
import http.client
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn
from torch.utils.tensorboard.writer import SummaryWriter

from nano_moe import runs
from nano_moe.config import ModelConfig, MoEConfig, Recipe
from nano_moe.explorer.desk import Desk
from nano_moe.explorer.opened import Opened, find
from nano_moe.explorer.server import application, bind
from nano_moe.model.gpt import GPT, init_weights
from nano_moe.text.store import prepare

HILL = "<b>hill"  # a folder's name is its domain's
HOSTILE = "</script><script>alert('text')</script><!-- & <b>bold</b> \u2028"
MODELS = {
    "routed": {
        "n_experts": 4,
        "top_k": 2,
        "n_shared_experts": 1,
        "first_k_dense": 1,
        "d_expert": 8,
    },
    "lifted": {"n_experts": 4, "top_k": 2, "score": "sigmoid", "bias_update_rate": 0.1},
    "tight": {"n_experts": 8, "top_k": 1, "d_expert": 8, "capacity_factor": 0.75},
    "hashed": {"n_experts": 4, "top_k": 2, "routing": "hash"},
    "choosing": {"n_experts": 4, "top_k": 2, "routing": "expert_choice"},
    "dense": None,
}
STEPS = (2, 4, 6)


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with two domains of text, one of them hostile, and all runs."""
    folder = tmp_path_factory.mktemp("explorer")
    for name, word in (("sea", "wave"), (HILL, f"stone {HOSTILE}")):
        (folder / name).mkdir()
        for i in range(5):
            text = "\n".join(f"{word} {i * j % 17} näh 🦊" for j in range(20 + 3 * i))
            (folder / name / f"{i}.txt").write_text(text + "\n", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in MODELS:
            make_run(name)
    return folder


def make_run(name: str) -> None:
    moe = MODELS[name]
    model = ModelConfig(
        vocab_size=264,
        context=48,
        n_layers={"routed": 3, "lifted": 4}.get(name, 2),
        d_model=16,
        n_heads=2,
        d_ff=32,
        init_std=0.3,  # large, so that routers decide
        moe=None if moe is None else MoEConfig(**moe),
    )
    data = {"files": ["sea", HILL], "tokenizer": "byte", "val_fraction": 0.3, "cache": "cache"}
    trainer = {"steps": 6, "batch_size": 4, "accelerator": "cpu", "precision": "fp32"}
    recipe = Recipe.model_validate(
        {"model": model, "data": data, "optim": {"lr": 0.01}, "trainer": trainer}
    )
    corpus = prepare(recipe.data, 264, 48, progress=False)
    assert set(corpus.val.domain_ids) == {0, 1}, "both domains must have validation text"
    run = runs.create(recipe, stem=name, name=name)
    runs.write_json(run.manifest_file, runs.describe(recipe, corpus=corpus, device="cpu"))
    corpus.tokenizer.save(run.tokenizer_file)
    columns = "step,tokens,flops,seconds,train/ce,train/load_balancing_loss,train/router_z_loss"
    run.metrics_file.write_text(f"{columns},val/ce,val/bpb\n6,1152,1,1.0,5.1,,,5.25,7.5\n")
    save_weights(run, model)
    if moe is not None:
        log_loads(run, model)


def save_weights(run: runs.Run, model: ModelConfig) -> None:
    decoder = init_weights(GPT(model), seed=1)
    for router in decoder.routers:
        if router.expert_bias is not None:
            router.expert_bias.copy_(torch.tensor([0.4, -0.4, 0.2, -0.2]))
    state = {f"model.{name}": value for name, value in decoder.state_dict().items()}
    content = {"nano_moe": {"schema": runs.SCHEMA}, "state_dict": state, "global_step": 6}
    torch.save(content, run.best)


def log_loads(run: runs.Run, model: ModelConfig) -> None:
    """Expert 0 of each layer takes more and more; in the end the last one takes nothing."""
    assert model.moe is not None
    n = model.moe.n_experts
    with SummaryWriter(log_dir=str(run.path)) as writer:
        for i, step in enumerate(STEPS):
            counts = torch.ones(n)
            counts[0], counts[-1] = 1 + i * n, (1.0, 0.05, 0.0)[i]
            for layer in range(model.n_layers):
                if model.is_sparse(layer):
                    for expert, share in enumerate((counts / counts.sum()).tolist()):
                        writer.add_scalar(f"moe_load/layer{layer}/{expert}", share, step)


@pytest.fixture
def here(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The workshop as working directory, and one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.chdir(workshop)
    yield workshop
    torch.set_num_threads(threads)


@pytest.fixture
def opened(here: Path) -> Callable[[str], Opened]:
    """opened(name) -> a run of the workshop, opened anew."""
    return find


def documents_of(page: str) -> dict:
    """The documents that a page holds, found as a browser finds them: up to the next end tag."""
    start = page.index('id="documents">') + len('id="documents">')
    return json.loads(page[start : page.index("</script", start)])


class Served:
    """A running server, and requests to it as a stranger could send them."""

    def __init__(self, port: int):
        self.port = port
        self.url = f"http://127.0.0.1:{port}/"

    def send(
        self, method: str, path: str, body: bytes | None = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        """(status, headers, body); header names with _ for -; host="" sends none."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        host = named.pop("host", f"127.0.0.1:{self.port}")
        try:
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for name, value in ({"Host": host} if host else {}).items():
                connection.putheader(name, value)
            for name, value in named.items():
                connection.putheader(name, value)
            if body is not None:
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()

    def get(self, key: str) -> Any:
        status, _, body = self.send("GET", f"/api/{key}")
        assert status == 200, body
        return json.loads(body)

    def post(self, key: str, question: Any, **headers: str) -> tuple[int, bytes]:
        kind = {"content_type": "application/json", **headers}
        status, _, body = self.send("POST", f"/api/{key}", json.dumps(question).encode(), **kind)
        return status, body


@contextlib.contextmanager
def serving(opened: list[Opened]) -> Iterator[Served]:
    """The server of some runs, in a thread of this process."""
    with contextlib.closing(bind(0)) as listening:
        port = listening.getsockname()[1]
        config = uvicorn.Config(application(Desk(opened), port), log_level="error", ws="none")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            yield Served(port)
        finally:
            server.should_exit = True
            thread.join(30)


@pytest.fixture(scope="module")
def served(workshop: Path) -> Iterator[Served]:
    """All runs of the workshop, in the order of MODELS."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workshop)
        with serving([find(name) for name in MODELS]) as running:
            yield running
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def serve() -> Callable[[list[Opened]], contextlib.AbstractContextManager[Served]]:
    """serve(opened) -> a context with a server of these runs."""
    return serving
