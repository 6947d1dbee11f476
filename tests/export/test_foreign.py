"""Checkpoints from elsewhere, with their own tokenizers: taken in, used, and given back."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from foreign import CLASSES, STORY, STYLES, checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from nano_moe import checkpoints, recipe_file, runs
from nano_moe.errors import UserError
from nano_moe.evaluation import evaluate
from nano_moe.explorer.trace import texts as shown_texts
from nano_moe.explorer.trace import trace_text
from nano_moe.export import gguf_file, importing
from nano_moe.export.hugging_face import export
from nano_moe.inference.generate import generate
from nano_moe.runs import Run
from nano_moe.tasks.items import Tasks, make_tasks
from nano_moe.tasks.score import score
from nano_moe.text.store import prepare
from nano_moe.text.tokenizer import FileTokenizer, Tokenizer

PROMPTS = ("The old fox", "Où est", "  def f(x):\n    return", "<s><|endoftext|><tool_call>")
# One of characters, one of bytes; what tells others apart is in `test_text_file_tokenizer.py`.
FEW = ("llama 2", "qwen")
SOME = [pytest.param(s, marks=() if s in FEW else pytest.mark.slow) for s in STYLES]
PAIRS = [
    *zip(CLASSES, ("llama 2", "qwen", "metaspace", "llama 3", "deepseek"), strict=True),
    *(pytest.param("Llama", s, marks=pytest.mark.slow) for s in STYLES if s != "llama 2"),
]


@pytest.fixture
def texts(tmp_path, monkeypatch):
    """A folder of documents, in a working directory of its own."""
    monkeypatch.chdir(tmp_path)
    Path("texts").mkdir()
    for i in range(12):
        story = "".join(STORY[i % 3 : i % 3 + 4])
        Path("texts", f"{i}.txt").write_text(f"{i} {story * 2} The e\u0301nd ▁ of {i}.\n")
    return Path("texts")


@pytest.fixture
def taken_in(texts, recipe_of, dense_config):
    """taken_in(folder) -> the run of it, as the verb makes it."""

    def take(folder: Path, name: str = "back") -> Run:
        data = {"files": (str(texts),), "tokenizer": "byte", "cache": "cache", "val_fraction": 0.3}
        rest = recipe_of(dense_config(vocab_size=264), data=data)
        source = importing.read(folder, rest)
        recipe = importing.recipe_of(source, rest, folder)
        model = recipe.model
        corpus = prepare(recipe.data, model.vocab_size, model.context, progress=False)
        return importing.import_run(source, recipe, folder, name=name, corpus=corpus)

    return take


def opened(run: Run):
    """(recipe, model, tokenizer, corpus) of a run, as its verbs open them."""
    recipe, model, _ = checkpoints.load_model(run)
    corpus = prepare(recipe.data, recipe.model.vocab_size, recipe.model.context, progress=False)
    runs.check_corpus(run, corpus)
    return recipe, model, Tokenizer.load(run.tokenizer_file), corpus


def theirs_of(folder: Path):
    model = AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, experts_implementation="eager"
    )
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


@pytest.mark.parametrize("family, style", PAIRS)
@torch.no_grad()
def test_logits_and_greedy_text_are_theirs(taken_in, family, style):
    folder = checkpoint(family, style, Path("theirs"))
    run = taken_in(folder)
    theirs, their_tokenizer = theirs_of(folder)
    shutil.rmtree(folder)
    _, model, tokenizer, _ = opened(run)
    tokens = torch.randint(0, 512, (2, 40), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(tokens)[0], theirs(tokens).logits, rtol=1e-4, atol=1e-4)
    unused = list(range(tokenizer.n_vocab, 512))
    options = GenerationConfig(
        max_new_tokens=20, do_sample=False, suppress_tokens=unused,
        eos_token_id=list(tokenizer.stop_ids), pad_token_id=tokenizer.end_id,
    )  # fmt: skip
    for prompt in PROMPTS:
        ids = their_tokenizer(prompt, split_special_tokens=True)["input_ids"]
        if ids[0] != tokenizer.end_id:  # theirs puts nothing there
            ids = [tokenizer.end_id, *ids]
        assert ids == [tokenizer.end_id, *tokenizer.encode(prompt)]
        written = theirs.generate(torch.tensor([ids]), generation_config=options)[0].tolist()
        wanted = their_tokenizer.decode(written, skip_special_tokens=True)
        ours = "".join(generate(model, tokenizer, prompt, max_tokens=20, temperature=0))
        assert tokenizer.canonical(prompt) + ours == tokenizer.decode(written)
        if "\ufffd" not in wanted:  # of which theirs may give more for the same bytes
            assert tokenizer.decode(written) == wanted


@pytest.mark.parametrize("style", SOME)
def test_a_text_begins_without_the_lead_and_ends_where_theirs_does(taken_in, style):
    run = taken_in(checkpoint("Llama", style, Path("theirs")))
    _, model, tokenizer, _ = opened(run)
    with torch.no_grad():
        for place in model.parameters():
            place.zero_()
        word = tokenizer.encode("fox" if tokenizer.lead else " fox")[0]
        model.embedding.weight.fill_(1)
        model.norm.weight.fill_(1)
        model.head.weight[word] = 1
    found = "".join(generate(model, tokenizer, "", max_tokens=2, temperature=0))
    piece = tokenizer.pieces[word].decode()
    assert found == piece.removeprefix(tokenizer.lead.decode()) + piece
    again = "".join(generate(model, tokenizer, "x", max_tokens=2, temperature=0))
    assert again == piece * 2
    for stop in tokenizer.stop_ids:
        with torch.no_grad():
            model.head.weight.zero_()
            model.head.weight[stop] = 1
        assert list(generate(model, tokenizer, "x", max_tokens=9, temperature=0)) == [""]


@pytest.mark.parametrize("style", SOME)
@torch.no_grad()
def test_bits_per_byte_are_those_of_their_logits(taken_in, texts, style):
    """By hand: of passages as lm-evaluation-harness rolls over them, and of the whole split."""
    folder = checkpoint("Mixtral", style, Path("theirs"))
    run = taken_in(folder)
    theirs, their_tokenizer = theirs_of(folder)
    recipe, model, tokenizer, corpus = opened(run)
    passages = make_tasks(corpus, context=recipe.model.context, seed=0, n=6).passages
    nats = n_bytes = 0.0
    for passage in passages:
        ids = their_tokenizer(passage["text"], add_special_tokens=False)["input_ids"]
        context = recipe.model.context
        for start in range(0, len(ids), context):
            end = min(start + context, len(ids))
            before = ids[max(0, end - context - 1) : end]
            before = before if start else [tokenizer.end_id, *ids[:end]]
            found = theirs(torch.tensor([before[:-1]])).logits[0].log_softmax(-1)
            rows = found.gather(-1, torch.tensor(before[1:]).unsqueeze(-1))
            nats -= rows[len(rows) - (end - start) :].sum().item()
        n_bytes += len(passage["text"].encode())
    scored = score(model, tokenizer, Tasks(passages, [], []), batch_size=2)
    assert scored["bits_per_byte"] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-4)

    names = [
        line.split("\t")[-1] for line in (corpus.path / "documents.tsv").read_text().splitlines()
        if line.startswith("val")
    ]  # fmt: skip
    documents = [Path(json.loads(name)).read_text() for name in names]
    rolled, ends = [tokenizer.end_id], 0
    for document in documents:
        ids = their_tokenizer(document, add_special_tokens=False)["input_ids"]
        rolled += [*ids, tokenizer.end_id]
        ends += len(tokenizer.canonical(document).encode())
    total = 0.0
    for start in range(0, len(rolled) - 1, recipe.model.context):
        window = torch.tensor(rolled[start : start + recipe.model.context + 1])
        found = theirs(window[None, :-1]).logits[0].log_softmax(-1)
        total -= found.gather(-1, window[1:, None]).sum().item()
    overall = evaluate(model, corpus, batch_size=2, precision="fp32").overall
    assert (overall.n_bytes, overall.tokens) == (ends, len(rolled) - 1)
    assert overall.bpb == pytest.approx(total / math.log(2) / ends, rel=1e-4)


@pytest.mark.parametrize("style", SOME)
def test_what_goes_out_again_is_the_same_tokenizer(taken_in, style):
    folder = checkpoint("Llama", style, Path("theirs"))
    run = taken_in(folder)
    export(run, Path("out"))
    one, other = (theirs_of(place)[1] for place in (folder, Path("out")))
    tokenizer = Tokenizer.load(run.tokenizer_file)
    for text in (*STORY[:3], *PROMPTS, " <s>x</s> <unk><|eot_id|><|im_end|>y", "", " a", "e\u0301"):
        for special in (True, False):
            ids = [t(text, add_special_tokens=special)["input_ids"] for t in (one, other)]
            if special and style == "deepseek":  # their AutoTokenizer passes over add_bos_token
                ids[0] = [tokenizer.end_id, *ids[0]]
            assert ids[0] == ids[1]
            assert one.decode(ids[0]) == other.decode(ids[0])
    assert one.eos_token_id == other.eos_token_id
    said = json.loads(Path("out/generation_config.json").read_text())
    stops = list(tokenizer.stop_ids)
    assert said["eos_token_id"] == (stops if len(stops) > 1 else stops[0])
    assert tokenizer.special[tokenizer.end_id] in Path("out/README.md").read_text()
    again = importing.read(Path("out"))
    recipe = importing.recipe_of(again, None, Path("out"))
    back = importing.import_run(again, recipe, Path("out"), name="again", corpus=None)
    assert back.tokenizer_file.read_bytes() == run.tokenizer_file.read_bytes()
    recipe, _, found, _ = opened(back)
    assert recipe.data.tokenizer_file == str(back.tokenizer_file)
    assert recipe_file.load(back.recipe_file) == recipe
    assert isinstance(found, FileTokenizer) and found.pieces == tokenizer.pieces
    with pytest.raises(UserError, match="tokenizer is a file's.*--to hf"):
        gguf_file.export(run, Path("out.gguf"), "f32")
    assert not Path("out.gguf").exists()


def test_special_tokens_are_shown_by_name(taken_in):
    run = taken_in(checkpoint("Mixtral", "llama 3", Path("theirs")))
    _, model, tokenizer, _ = opened(run)
    shown = trace_text(model, tokenizer, "The <|eot_id|> fox")["tokens"]
    assert "".join(shown) == "The <|eot_id|> fox"
    assert shown_texts(tokenizer, [330, 332]) == ["⟨begin_of_text⟩", "⟨eot_id⟩"]


def test_a_moved_run_needs_its_own_folder_alone(taken_in):
    run = taken_in(checkpoint("Llama", "qwen", Path("theirs")))
    assert "checkpoints/back/tokenizer.json" in run.recipe_file.read_text()
    shutil.rmtree("theirs")
    run.path.rename("checkpoints/moved")
    moved = runs.find("moved")
    recipe, _, _, corpus = opened(moved)
    assert recipe.data.tokenizer_file == "checkpoints/moved/tokenizer.json"
    assert corpus.tokenizer.kind == "file"


def test_a_recipe_that_makes_the_same_tokens_is_left_as_it_is(taken_in):
    """Our own folder, as if from elsewhere: bytes stay bytes, and any other asks for the file."""
    export(taken_in(checkpoint("Llama", "llama 2", Path("theirs"))), Path("out"))
    Path("out/nano_moe.json").unlink()
    again = taken_in(Path("out"), "again")
    assert again.recipe().data.tokenizer == "file"
    assert again.tokenizer_file.read_bytes() == Path("checkpoints/back/tokenizer.json").read_bytes()


def test_more_ids_than_the_embedding_has_rows(taken_in):
    folder = checkpoint("Llama", "qwen", Path("theirs"))
    path = folder / "tokenizer.json"
    saved = json.loads(path.read_text())
    saved["model"]["vocab"]["Q1"] = 512
    path.write_text(json.dumps(saved))
    with pytest.raises(UserError, match=r"file tokenizer needs 513 ids|513 ids and its embedding"):
        taken_in(folder)
    assert not Path("checkpoints").exists()
