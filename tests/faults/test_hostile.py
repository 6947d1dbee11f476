"""What somebody made to do harm: nothing of it runs, reads or writes elsewhere, or takes long."""

import asyncio
import io
import json
import os
import pickle
import tarfile
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kit import STEPS, TINY, copy_of, fuzz, refused, verb

from nano_moe.explorer.desk import Desk
from nano_moe.explorer.opened import find
from nano_moe.explorer.server import BODY, application
from nano_moe.files import replacing

MARK = Path("executed")


class Runs:
    """Unpickled carelessly, it does what it was given."""

    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


GADGETS = {
    "open": Runs(open, "executed", "w"),
    "os.system": Runs(os.system, "touch executed"),
    "eval": Runs(eval, "open('executed', 'w')"),
    "exec": Runs(exec, "open('executed', 'w')"),
    "mkdir": Runs(os.mkdir, "executed"),
    "torch.load": Runs(torch.load, io.BytesIO(pickle.dumps(Runs(open, "executed", "w")))),
}
PLACES = ("state_dict", "global_step", "callbacks", "nano_moe", "extra")


def poisoned(path: Path, gadget: Runs, place: str, form: str) -> None:
    """A checkpoint of ours with a gadget in it, with the right checksum, as a zip or as older."""
    content = torch.load(path, weights_only=True)
    content[place] = {"model.x": gadget} if place == "state_dict" else gadget
    with replacing(path, sealed=True) as file:
        if form == "tar":
            _tar(file, content)
        else:
            torch.save(content, file, _use_new_zipfile_serialization=form == "zip")


def _tar(file, content) -> None:
    """The form that PyTorch wrote before 0.1.10, which has a reader of its own."""
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name in ("storages", "tensors", "pickle"):
            raw = pickle.dumps(content)
            member = tarfile.TarInfo(name)
            member.size = len(raw)
            tar.addfile(member, io.BytesIO(raw))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["zip", "legacy", "tar"])
@pytest.mark.parametrize("gadget", GADGETS)
def test_a_pickle_in_a_checkpoint_is_never_executed(course, ledger, gadget, form):
    run = copy_of(course.whole, "evil")
    for path in (run.last, run.previous, run.best):
        place = PLACES[zlib.crc32(f"{gadget} {path.name}".encode()) % len(PLACES)]
        poisoned(path, GADGETS[gadget], place, form)
    for arguments in (["resume", "evil"], ["sample", "evil"], ["eval", "evil"]):
        with ledger.attempt("a pickle inside a checkpoint is not executed"):
            line = refused(*arguments)
            assert "not a readable checkpoint" in line
            assert not MARK.exists()


def test_the_gadgets_do_harm_when_loaded_carelessly(course):
    """Else the test above would show nothing."""
    for name in ("open", "eval", "exec"):
        pickle.loads(pickle.dumps(GADGETS[name]))
        assert MARK.exists(), name
        MARK.unlink()


def test_a_checkpoint_that_unpacks_to_much_is_no_bomb(course, ledger):
    """A member of zeros that is declared, or unpacks to, more than there is."""
    with zipfile.ZipFile("bomb.ckpt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + bytes(50_000_000))
        archive.writestr("archive/version", "3\n")
    run = copy_of(course.whole, "evil")
    raw = Path("bomb.ckpt").read_bytes()
    for path in (run.last, run.previous, run.best):
        path.write_bytes(raw)
    with ledger.attempt("a bomb inside a checkpoint"):
        assert "not a readable checkpoint" in refused("eval", "evil")


# --- paths ---------------------------------------------------------------------------------------

ELSEWHERE = (
    "../outside", "/tmp/outside", "x/../../outside", "..", ".", "~/x", "~root", "./x", "x/y",
    "\\\\host\\x", "C:\\x", "..\\x", "x\x00", "%2e%2e", "x\ny", "-rf", "ｘ", "．．", "", " ",
)  # fmt: skip


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_name_never_leads_out_of_the_folder(course, ledger, name):
    before = {str(path) for path in Path("..").rglob("*")}
    with ledger.attempt("path traversal in run names"):
        assert "run name" in refused("train", "tiny.yaml", f"--name={name}")
        assert {str(path) for path in Path("..").rglob("*")} == before


@pytest.mark.parametrize(
    ("base", "part"),
    [
        ("/dev/zero", "no file"),
        ("/dev/stdin", "no file"),
        ("/proc/self/mem", "proc/self/mem"),
        ("/etc/passwd", "/etc/passwd"),
        ("pipe", "no file"),
        ("checkpoints", "no file"),
        ("/", "no file"),
        ("~/x.yaml", "no file"),
        ("loop.yaml", "loop.yaml"),
        ("circle.yaml", "circle"),
        ("big.yaml", "larger than"),
        ("chain0.yaml", "more than 20 files"),
        ("[a, b]", "the name of one file"),
        ('"x\\0y"', "no file"),
        ("x" * 5000, "no file"),
        ("http://example.org/x.yaml", "no file"),
        ("secret.txt", "secret.txt"),
    ],
)
def test_a_base_that_is_no_recipe_is_refused_and_not_shown(course, ledger, base, part):
    """Nothing hangs, and nothing of a file that is no recipe comes out but where it fails."""
    os.mkfifo("pipe")
    Path("loop.yaml").symlink_to("loop.yaml")
    Path("circle.yaml").write_text("base: evil.yaml\n")
    Path("big.yaml").write_text("#" * 100_001)
    Path("secret.txt").write_text("root:hunter2:0:0\nkey = hunter2\n")
    for i in range(1200):
        Path(f"chain{i}.yaml").write_text(f"base: chain{i + 1}.yaml\n")
    Path("chain1200.yaml").write_text(TINY)
    Path("evil.yaml").write_text(f"base: {base}\n")
    with ledger.attempt("path traversal and traps in a recipe's base:"):
        line = refused("show", "evil.yaml")
        assert part in line and "hunter2" not in line and len(line) < 6000


# --- bombs ---------------------------------------------------------------------------------------


def laughs(depth: int, width: int, kind: str) -> str:
    """Aliases of aliases: lists, mappings or merged keys."""
    lines = [f"l0: &l0 [{', '.join('x' * width)}]"]
    if kind == "merge":
        lines = ["l0: &l0 {k0: x}"]
    for i in range(1, depth):
        if kind == "list":
            lines.append(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * width)}]")
        elif kind == "mapping":
            inner = ", ".join(f"k{n}: *l{i - 1}" for n in range(width))
            lines.append(f"l{i}: &l{i} {{{inner}}}")
        else:
            lines.append(
                f"l{i}: &l{i} {{<<: [{', '.join([f'*l{i - 1}'] * width)}], k{i}: *l{i - 1}}}"
            )
    return "\n".join(lines)


BOMBS = {
    "lists": laughs(9, 9, "list"),
    "mappings": laughs(9, 9, "mapping"),
    "merged keys": laughs(12, 5, "merge"),
    "deep": "seed: " + "[" * 900 + "]" * 900,
    "deeper": "seed: " + "{a: " * 5000,
    "deepest": "seed: " + "[" * 20_000 + "]" * 20_000,
    "deep by blocks": "\n".join(" " * i + "a:" for i in range(900)),
    "wide": "data: {files: [" + "x, " * 8_000 + "]}",
    "long number": "seed: " + "9" * 5000,
    "long hexadecimal": "seed: 0x" + "f" * 100_000,
    "exponent": "seed: 1e999999999",
    "long key": "? " + "k" * 100_000 + "\n: 1",
    "itself": "seed: &a [*a]",
    "tag": "seed: !!python/object/apply:os.system [touch executed]",
    "object": "!!python/object/new:os.system [touch executed]",
    "many documents": "--- {}\n" * 5000,
    "steps": TINY.replace(f"steps: {STEPS}", "steps: " + "9" * 30),
    "layers": TINY.replace("n_layers: 2", "n_layers: 1000000000000"),
    "width": TINY.replace("d_model: 16", "d_model: 1000000000000"),
    "experts": TINY.replace("n_experts: 4", "n_experts: 1000000000000"),
}


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize("name", ["show", "train"])
def test_a_bomb_in_a_recipe_is_refused(course, ledger, bomb, name):
    Path("bomb.yaml").write_text(BOMBS[bomb])
    before = set(os.listdir("checkpoints"))
    with ledger.attempt("YAML bombs and absurd sizes"):
        status, _, lines = verb(name, "bomb.yaml")
        assert status == 2 or (name == "show" and bomb in ("steps", "layers", "width", "experts"))
        assert not any("not foreseen" in line for line in lines), lines
        assert not MARK.exists() and set(os.listdir("checkpoints")) == before


# --- the explorer --------------------------------------------------------------------------------


def ask(app, method: str, path: str, headers: list[tuple[bytes, bytes]], parts: list[bytes]):
    """(status, body) of a request as the server hands it on."""
    sent: list[dict] = []
    queue = [
        {"type": "http.request", "body": part, "more_body": i + 1 < len(parts)}
        for i, part in enumerate(parts or [b""])
    ]
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method,
        "scheme": "http", "path": path, "raw_path": path.encode("utf-8", "replace"),
        "query_string": b"", "headers": headers, "client": ("127.0.0.1", 1), "server": None,
        "root_path": "",
    }  # fmt: skip

    async def receive():
        return queue.pop(0) if queue else {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    async def go():
        await app(scope, receive, send)

    asyncio.run(go())
    body = b"".join(message.get("body", b"") for message in sent[1:])
    return sent[0]["status"], body


@pytest.fixture(scope="module")
def app(first_course):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(first_course[0])
        yield application(Desk([find("whole")]), 7860)


HOSTS = st.sampled_from(
    ["evil.example", "127.0.0.1", "127.0.0.1:1", "localhost", "127.0.0.1:7860.evil", "[::1]:7860"]
    + ["127.0.0.1:7860@evil", "LOCALHOST:7860 ", "", "127.1:7860", "0x7f000001:7860", "2130706433"]
) | st.text(max_size=20)


@fuzz(60, 1000)
@given(HOSTS, st.sampled_from(["/", "/api/runs/0/compute", "/nowhere"]), st.booleans())
def test_other_hosts_get_nothing(app, ledger, host, path, twice):
    """A name that resolves to this machine is not ours for that; nor are two at once."""
    ours = {"127.0.0.1:7860", "localhost:7860"}
    headers = [(b"host", host.encode("utf-8", "replace"))]
    if twice:
        headers.append((b"host", b"127.0.0.1:7860"))
    with ledger.attempt("explorer: Host of another site"):
        status, body = ask(app, "GET", path, headers, [])
        assert host in ours or status == 403
        assert host in ours or json.loads(body).keys() == {"error"}


@fuzz(30, 300)
@given(st.lists(st.integers(1, BODY), min_size=1, max_size=4), st.booleans())
def test_large_bodies_are_cut_off(app, ledger, sizes, announced):
    """With their length said or not, in one piece or several."""
    sizes[-1] += BODY
    parts = [b'{"text": "' + b"x" * size for size in sizes]
    headers = [(b"host", b"127.0.0.1:7860"), (b"content-type", b"application/json")]
    if announced:
        headers.append((b"content-length", str(sum(map(len, parts))).encode()))
    with ledger.attempt("explorer: bodies over the limit"):
        status, body = ask(app, "POST", "/api/runs/0/route", headers, parts)
        assert status == 413 and len(body) < 200
