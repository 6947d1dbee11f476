"""Whatever is given: a result or one line, never a traceback, never a write where none belongs."""

import contextlib
import json
import os
import random
import shutil
import string
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kit import STEPS, TINY, fuzz, verb

from nano_moe import checkpoints, recipe_file, runs
from nano_moe.config import DataConfig
from nano_moe.errors import UserError
from nano_moe.explorer import opened
from nano_moe.files import SEAL_BYTES
from nano_moe.inference.expert_file import EXPERTS, REST, split_weights
from nano_moe.runs import Run
from nano_moe.text import files, store
from nano_moe.text.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer, Tokenizer

pytestmark = pytest.mark.slow


# --- who writes where ----------------------------------------------------------------------------


class Watch:
    """Every path that Python opens for writing, makes, renames or removes while it is on."""

    def __init__(self) -> None:
        self.touched: list[str] | None = None
        sys.addaudithook(self._hear)  # there is no taking it away again

    def _hear(self, event: str, arguments: tuple) -> None:
        if self.touched is None:
            return
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, int) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
            self.touched.append(os.fsdecode(path))
        elif event in ("os.remove", "os.rmdir"):
            path, folder = arguments  # a name in an open folder, as shutil.rmtree removes it
            where = "" if folder == -1 else os.readlink(f"/proc/self/fd/{folder}")
            self.touched.append(os.path.join(where, os.fsdecode(path)))
        elif event in ("os.mkdir", "os.rename", "os.symlink", "os.link"):
            self.touched += [os.fsdecode(a) for a in arguments[:2] if isinstance(a, str | bytes)]
        elif event in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn"):
            self.touched.append(f"/started: {arguments}")

    @contextlib.contextmanager
    def within(self, *folders: str):
        """Raises where the block writes outside of these folders of the working directory."""
        self.touched = []
        allowed = [Path(folder).resolve() for folder in folders]
        try:
            yield
        finally:
            touched, self.touched = self.touched, None
        places = [Path(path).resolve() for path in touched if "__pycache__" not in path]
        strays = [p for p in places if not any(p.is_relative_to(a) for a in allowed)]
        assert strays in ([], [Path(os.devnull)] * len(strays)), strays


WATCH = Watch()


@pytest.fixture(scope="module")
def here(first_course, tmp_path_factory):
    """The course's folder as working directory, for a whole module."""
    folder = tmp_path_factory.mktemp("fuzz") / "here"
    shutil.copytree(first_course[0], folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


def refusal_of(call, *arguments, **named) -> str | None:
    """The line with which a call refuses; None when it does not."""
    try:
        call(*arguments, **named)
    except UserError as error:
        assert str(error)
        return " ".join(str(error).splitlines())
    return None


def ends_well(*arguments: str) -> bool:
    """Whether a verb did it; else it has refused in one line."""
    status, _, lines = verb(*arguments)
    faults = [line for line in lines if line.startswith("error:")]
    assert status in (0, 2) and len(faults) == (status == 2), (arguments, lines)
    assert not any("not foreseen" in line for line in faults), faults
    return status == 0


# --- recipes -------------------------------------------------------------------------------------

SCRAPS = st.sampled_from(
    """model: moe: data: seed: base: ../tiny.yaml tiny.yaml /etc/passwd lr : - [ ] {
    } &a *a !!int !!python/object:os.system ' " | > # ? << % 0x 1e9 null ~ 2001-01-01 .inf , @ `
    \u2028 \\ = \u202e \x00 \ufeff --- ... !!binary !!set 1:30 0o7 -0 1_000 steps
    n_experts ${x}""".split()
)
TEXTS = st.lists(SCRAPS | st.text(max_size=4) | st.just("\n"), max_size=20).map(" ".join)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=5,
)
FIELDS = (
    "seed", "model", "model.d_model", "model.n_heads", "model.context", "model.vocab_size",
    "model.moe", "model.moe.n_experts", "model.moe.top_k", "model.moe.routing", "model.mla",
    "data", "data.files", "data.tokenizer", "data.val_fraction", "data.cache", "optim.lr",
    "optim.grad_clip", "trainer.steps", "trainer.precision", "trainer.batch_size", "base", "x.y",
)  # fmt: skip


@fuzz(150, 2000)
@given(TEXTS, st.booleans())
def test_recipe_files(here, ledger, text, after):
    Path("fuzz.yaml").write_bytes((TINY + text if after else text).encode(errors="surrogatepass"))
    with ledger.attempt("fuzz: recipe files"), WATCH.within():
        refusal_of(recipe_file.load_any, "fuzz.yaml")


@fuzz(100, 1000)
@given(st.lists(st.tuples(st.sampled_from(FIELDS), PLAIN | st.text(max_size=9)), max_size=4))
def test_overrides(here, ledger, changes):
    given_ = [f"{field}={json.dumps(value)}" for field, value in changes]
    with ledger.attempt("fuzz: overrides of recipes"), WATCH.within():
        ends_well("show", "tiny.yaml", *given_)


# --- names ---------------------------------------------------------------------------------------

PARTS = st.sampled_from(
    [
        "..",
        "/",
        "\\",
        "~",
        ".",
        "\x00",
        "\n",
        "whole",
        "checkpoints",
        "-",
        " ",
        "\u202e",
        "é",
        "%2e",
    ]
    + ["$HOME", "`x`", "a" * 300, "\ud800", "CON", ":", "*", "{}", "--json", "tmp", "etc/passwd"]
)
NAMES = st.lists(PARTS | st.text(max_size=3), max_size=5).map("".join)


@fuzz(100, 800)
@given(NAMES)
def test_names_of_runs(here, ledger, name):
    """New names stay one folder below checkpoints/, and no verb reads a run elsewhere by one."""
    recipe = recipe_file.load("tiny.yaml")
    before = set(os.listdir("."))
    with ledger.attempt("fuzz: names of runs"):
        with WATCH.within("checkpoints"):
            refused = refusal_of(runs.create, recipe, stem="x", name=name)
        if refused is None:
            (made,) = set(os.listdir("checkpoints")) - {"whole"}
            assert made == name
            (Path("checkpoints") / name / "recipe.yaml").unlink()
            (Path("checkpoints") / name).rmdir()
        stem = runs.stem_of(Path(name.replace("\x00", "") or "x"))
        assert runs.NAME.fullmatch(f"{stem[:90]}-1")
        with WATCH.within():
            if not name.startswith("-"):
                assert ends_well("compare", name, name) in (False, True)
            with contextlib.suppress(UserError):
                inside = opened.find(name).run.path.resolve()
                assert inside.is_relative_to(Path("checkpoints").resolve())
        assert set(os.listdir(".")) == before


# --- text ----------------------------------------------------------------------------------------

BIDI = "\u202e\u2066\u200f\u2069\u061c\ufeff\u2028\x85"
PIECES = st.one_of(
    st.binary(max_size=40),
    st.text(max_size=40).map(str.encode),
    st.text(alphabet=BIDI + "ab \n", max_size=40).map(str.encode),
    st.text(max_size=20).map(lambda t: t.encode("utf-16", "surrogatepass")),
    st.text(alphabet=st.characters(max_codepoint=255), max_size=20).map(
        lambda t: t.encode("latin-1")
    ),
    st.sampled_from([b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\r", b"\r\n", b"\x1a", b"\x1b[2J"]),
    st.integers(1, 200_000).map(lambda n: b"x" * n),  # a giant line
)
BYTES = st.lists(PIECES, max_size=6).map(b"".join)
RECORDS = st.lists(
    st.one_of(
        st.text(max_size=30).map(lambda t: json.dumps({"text": t}).encode()),
        PLAIN.map(lambda value: json.dumps({"text": value}).encode()),
        PLAIN.map(lambda value: json.dumps(value).encode()),
        st.sampled_from([b'{"text": "\\ud800"}', b"[" * 3000, b'{"text": "a"', b"NaN", b"\x00"]),
        BYTES,
    ),
    max_size=5,
).map(b"\n".join)


@fuzz(150, 2500)
@given(BYTES | RECORDS, st.sampled_from(["a.txt", "a.jsonl", "a", "a.parquet.txt", "ä\u202e.md"]))
def test_files_of_text(here, ledger, raw, name):
    """What is read is what UTF-8 says, document by document."""
    Path(name).write_bytes(raw)
    with ledger.attempt("fuzz: files of text"), WATCH.within():
        found = []
        refused = refusal_of(lambda: found.extend(files.read(files.listed((name,)))))
        if refused is None:
            assert all(document.text.encode() for document in found)
        if not name.endswith(".jsonl") and refused is None:
            assert found[0].text == raw.decode().removeprefix("\ufeff")
    Path(name).unlink()


@fuzz(40, 400)
@given(BYTES, st.sampled_from(["byte", "char", "bpe"]), st.sampled_from(["txt", "jsonl"]))
def test_preparing_text(here, ledger, raw, kind, ending):
    """Tokens of the corpus spell the text; a refusal leaves nothing behind."""
    draw = random.Random(len(raw))
    filler = "".join(draw.choices(string.ascii_letters + " \n", k=300)).encode()
    raw = (
        json.dumps({"text": filler.decode()}).encode() + b"\n" + raw
        if ending == "jsonl"
        else (raw + filler)
    )
    Path(f"f.{ending}").write_bytes(raw)
    data = DataConfig(files=(f"f.{ending}",), tokenizer=kind, val_fraction=0.3, cache="fuzzed")
    with ledger.attempt("fuzz: preparing text"):
        made: list[store.Corpus] = []
        with WATCH.within("fuzzed"):
            make = lambda: made.append(store.prepare(data, 66_000, 16, progress=False))  # noqa: E731
            refused = refusal_of(make)
        assert refused is None or not os.listdir("fuzzed")
        for corpus in made:
            spelt = b"".join(
                corpus.tokenizer.decode_bytes(split.tokens) for split in (corpus.train, corpus.val)
            )
            if ending == "txt" and kind != "char":
                assert spelt == raw.removeprefix(b"\xef\xbb\xbf")
            shutil.rmtree(corpus.path)


# --- tokenizers ----------------------------------------------------------------------------------

ANY = st.text(
    alphabet=st.characters(exclude_categories=())
    | st.sampled_from(BIDI + "👩‍👩‍👧\u0301\u1100\u1161" + string.whitespace),
    max_size=60,
)
TOKENIZERS = {
    "byte": lambda text: ByteTokenizer(),
    "char": lambda text: CharTokenizer.train([text]),
    "bpe": lambda text: LEARNED,
}
LEARNED = BPETokenizer.train(["the old fox saw näh 🦊 漢字 a hen and\n\n\tran " * 30], 400)


@fuzz(200, 3000)
@given(ANY, st.sampled_from(list(TOKENIZERS)))
def test_tokenizer_round_trips(ledger, text, kind):
    """Any string of Unicode; half a surrogate pair becomes the replacement character."""
    clean = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    tokenizer = TOKENIZERS[kind](clean)
    with ledger.attempt("fuzz: tokenizer round trips"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == clean
        assert tokenizer.decode_bytes(ids) == clean.encode()
        assert tokenizer.end_id not in ids


@fuzz(50, 400)
@given(st.sampled_from(["byte", "char", "bpe"]), PLAIN, st.integers(0, 10**6), st.booleans())
def test_saved_tokenizers(here, ledger, kind, value, at, cut):
    """A field changed or bytes cut: read as written, or refused."""
    TOKENIZERS[kind]("abc").save(Path("t.json"))
    saved = json.loads(Path("t.json").read_text())
    keys = list(saved)
    saved[keys[at % len(keys)]] = value
    raw = json.dumps(saved).encode()
    Path("t.json").write_bytes(raw[: at % len(raw)] if cut else raw)
    with ledger.attempt("fuzz: saved tokenizers"), WATCH.within():
        refusal_of(Tokenizer.load, Path("t.json"))


# --- configs of Hugging Face ---------------------------------------------------------------------

MIXTRAL = {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_act": "silu",
    "hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 16, "vocab_size": 264,
    "num_attention_heads": 2, "num_hidden_layers": 2, "num_key_value_heads": 2,
    "num_experts_per_tok": 2, "num_local_experts": 4, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "rope_scaling": None,
    "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "float32",
}  # fmt: skip
NESTED = st.lists(PLAIN, min_size=1, max_size=2) | st.dictionaries(st.text(max_size=4), PLAIN)


@pytest.mark.filterwarnings("ignore")
@fuzz(100, 1000)
@given(
    st.dictionaries(st.sampled_from(list(MIXTRAL)), PLAIN | NESTED, max_size=3),
    st.dictionaries(st.text(max_size=8), PLAIN, max_size=1),
)
def test_configs_to_import(here, ledger, changed, more):
    """Without weights beside it, any is refused; what it says of them is looked at before."""
    pytest.importorskip("transformers")
    Path("imported").mkdir(exist_ok=True)
    Path("imported/config.json").write_text(json.dumps(MIXTRAL | changed | more))
    with ledger.attempt("fuzz: configs to import"), WATCH.within():
        assert not ends_well("import", "imported", "--recipe", "tiny.yaml")


# --- checkpoints and safetensors -----------------------------------------------------------------


def damaged(raw: bytes, edits: list[tuple[float, bytes, int]]) -> bytes:
    """Bytes replaced, inserted or cut at places given as shares of the length."""
    changed = bytearray(raw)
    for place, piece, way in edits:
        at = int(place * len(changed))
        end = at + (len(piece) if way == 0 else 0 if way == 1 else 8 * len(piece))
        changed[at:end] = b"" if way == 2 else piece
    return bytes(changed)


EDITS = st.lists(
    st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=24), st.integers(0, 2)),
    min_size=1,
    max_size=4,
)


@pytest.mark.filterwarnings("ignore")
@fuzz(120, 1500)
@given(EDITS, st.booleans())
def test_checkpoints(here, ledger, edits, sealed):
    """Without a checksum, too: what `torch.load` then finds is refused or has weights and step."""
    raw = Path("checkpoints/whole/last.ckpt").read_bytes()
    Path("f.ckpt").write_bytes(damaged(raw if sealed else raw[:-SEAL_BYTES], edits))
    with ledger.attempt("fuzz: checkpoints"), WATCH.within():
        refused = refusal_of(checkpoints.read_checkpoint, Path("f.ckpt"))
    if refused is None:
        content = torch.load("f.ckpt", weights_only=True)
        assert isinstance(content["global_step"], int) and content["state_dict"]


@fuzz(40, 300)
@given(PLAIN, st.lists(st.sampled_from(["nano_moe", "schema", "recipe", "state_dict", "step"])))
def test_checkpoints_of_another_shape(here, ledger, value, keys):
    content = torch.load("checkpoints/whole/last.ckpt", weights_only=True)
    for key in keys:
        place = content["nano_moe"] if key in ("schema", "recipe") else content
        if isinstance(place, dict):
            place["global_step" if key == "step" else key] = value
    torch.save(content, "f.ckpt")
    with ledger.attempt("fuzz: checkpoints of another shape"), WATCH.within():
        if refusal_of(checkpoints.read_checkpoint, Path("f.ckpt")) is None:
            found = checkpoints.read_checkpoint(Path("f.ckpt"))
            whole = Run(Path("checkpoints/whole"))
            refusal_of(runs.check_recipe, whole, whole.recipe(), found)


@fuzz(20, 150)
@given(EDITS, st.sampled_from([EXPERTS, REST]), st.booleans())
def test_safetensors(here, ledger, edits, name, header):
    """A damaged file of experts is made again, or holds the shapes that the run has."""
    run = Run(Path("checkpoints/whole"))
    with ledger.attempt("fuzz: safetensors"), WATCH.within("checkpoints"):
        split_weights(run)
        raw = (run.path / name).read_bytes()
        cut = 8 + int.from_bytes(raw[:8], "little")
        spoilt = damaged(raw[:cut], edits) + raw[cut:] if header else damaged(raw, edits)
        (run.path / name).write_bytes(spoilt)
        found = []
        if refusal_of(lambda: found.append(split_weights(run))) is None:
            experts, _, step = found[0]
            first, down = (torch.empty(shape) for shape in experts.shapes)
            for key in experts.keys:  # noqa: SIM118
                experts.read(*key, first, down)
            assert len(experts.keys) == 8 and step == STEPS
    for left in (EXPERTS, REST):
        (run.path / left).unlink(missing_ok=True)


@pytest.fixture(scope="module")
def exported(here):
    """The weights of the course's run, exported as a folder of Hugging Face's."""
    pytest.importorskip("transformers")
    assert ends_well("export", "whole", "--to", "hf", "exported")
    return (here / "exported" / "model.safetensors").read_bytes()


def retold(raw: bytes, name: int, field: str, value: Any) -> bytes:
    """A safetensors file whose header says something else of one tensor."""
    cut = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:cut])
    told = header[list(header)[name % len(header)]]
    told[field] = value
    said = json.dumps(header).encode()
    return len(said).to_bytes(8, "little") + said + raw[cut:]


TOLD = st.one_of(
    st.tuples(st.just("dtype"), st.sampled_from(["F64", "F16", "BF16", "I64", "F8_E4M3", "U8"])),
    st.tuples(st.just("shape"), st.lists(st.integers(0, 2**63), max_size=4)),
    st.tuples(st.just("data_offsets"), st.lists(st.integers(0, 2**63), min_size=2, max_size=2)),
    st.tuples(st.sampled_from(["dtype", "shape", "data_offsets", "x"]), PLAIN),
)


@pytest.mark.filterwarnings("ignore")
@fuzz(20, 200)
@given(EDITS, st.sampled_from(["all", "header", "fields"]), st.integers(0, 99), TOLD)
def test_weights_to_import(here, exported, ledger, edits, where, name, told):
    """A damaged file is refused, or is a run of finite weights of the shapes of its config."""
    cut = 8 + int.from_bytes(exported[:8], "little")
    spoilt = {
        "all": lambda: damaged(exported, edits),
        "header": lambda: damaged(exported[:cut], edits) + exported[cut:],
        "fields": lambda: retold(exported, name, *told),
    }[where]()
    Path("exported/model.safetensors").write_bytes(spoilt)
    with ledger.attempt("fuzz: weights to import"), WATCH.within("checkpoints"):
        if ends_well("import", "exported", "--name", "fuzzed"):
            _, model, _ = checkpoints.load_model(Run(Path("checkpoints/fuzzed")))
            assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
            shutil.rmtree("checkpoints/fuzzed")
        assert not [path for path in os.listdir("checkpoints") if "fuzzed" in path]
