"""The page as a file, and the verbs: whole, self-contained, refused where it must be."""

import base64
import hashlib
import json
import re
from pathlib import Path

import pytest

from nano_moe.cli.main import main
from nano_moe.explorer import page
from nano_moe.explorer.opened import find
from nano_moe.explorer.page import MARK, SCRIPTS, embedded, html
from nano_moe.explorer.report import SAMPLE, report

HOSTILE = "</script><script>alert(1)</script> <!-- & \u2028 ]]>"


def documents(page: str) -> dict:
    """As a browser finds them: up to the next end tag."""
    return json.loads(re.search(r'id="documents">(.*?)</script', page, re.DOTALL)[1])


@pytest.fixture
def verb(here, capsys, monkeypatch):
    """verb(*arguments) -> (status, stdout, stderr); nothing is served."""
    monkeypatch.setattr("nano_moe.explorer.server.serve", lambda *given, **named: None)

    def run(*arguments):
        capsys.readouterr()
        status = main(list(arguments))
        return status, *capsys.readouterr()

    return run


def test_it_holds_what_the_server_would_answer(here, served):
    names = ("routed", "lifted", "tight", "hashed", "choosing", "dense")
    held = documents(report([find(name) for name in names], each=1))
    live = documents(served.send("GET", "/")[2].decode())["overview"]
    assert held.pop("overview") == {**live, "live": False}
    for run, name in enumerate(names):
        assert held[f"runs/{run}/passages"].pop("each") == 1
        recorded = held.pop(f"runs/{run}/generation")
        if name == "choosing":
            assert "sees the future" in recorded["error"]
            continue
        assert recorded["settings"] == SAMPLE
        status, body = served.post(f"runs/{run}/generate", {"prompt": "The", **SAMPLE})
        prompt, *steps = map(json.loads, body.decode().splitlines())
        assert status == 200 and recorded["prompt"] == prompt["prompt"]
        for step in (*steps, *recorded["steps"]):
            step.pop("seconds")
        assert recorded["steps"] == steps
    for key, document in held.items():
        answer = served.get(key)
        answer.pop("each", None)
        assert document == answer, key
    assert {key.split("/")[2] for key in held} == {
        "compute", "balance", "specialization", "passages",
    }  # fmt: skip


def test_as_many_passages_as_fit(here):
    held = documents(report([find("routed")]))
    assert held["runs/0/passages"]["each"] == 3
    assert sum("/passages/" in key for key in held) == 6


def test_no_text_ends_the_element_that_holds_it():
    content = {HOSTILE: [HOSTILE, {"deep": HOSTILE}]}
    text = embedded(content)
    assert json.loads(text) == content
    assert not set("<>&\u2028\u2029") & set(text)
    with pytest.raises(ValueError):
        embedded(float("nan"))


def test_the_page_is_one_file_that_nothing_is_fetched_for():
    for live in (True, False):
        whole = html({"overview": {"hostile": HOSTILE}}, live=live)
        assert documents(whole) == {"overview": {"hostile": HOSTILE}}
        assert whole.count("<script") == whole.count("</script>") == len(SCRIPTS) + 1
        outside = set(re.findall(r"""(?:https?:)?//[\w.-]+\.\w+[^\s"'`]*""", whole))
        assert outside <= {"http://www.w3.org/2000/svg"}
        assert not re.search(r"""\b(?:src|href)=["'](?!#|data:,)""", whole)
        assert "@import" not in whole and "url(" not in whole


def test_the_policy_names_every_script_and_the_style_and_no_other_place():
    for live, server in ((True, "'self'"), (False, "'none'")):
        whole = html({}, live=live)
        policy = re.search(r'Content-Security-Policy" content="([^"]*)"', whole)[1]
        rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
        assert rules["default-src"] == "'none'" and rules["connect-src"] == server
        for tag, rule in (("script", "script-src"), ("style", "style-src")):
            found = re.findall(rf"<{tag}>(.*?)</{tag}>", whole, re.DOTALL)
            digests = [base64.b64encode(hashlib.sha256(s.encode()).digest()) for s in found]
            assert rules[rule] == " ".join(f"'sha256-{d.decode()}'" for d in digests)
        assert "unsafe" not in policy
    assert not re.search(r"\sstyle=|\son\w+=", page._read("index.html"))
    sources = [page._read(name) for name in SCRIPTS]
    assert not any("innerHTML" in s or "insertAdjacent" in s or "eval(" in s for s in sources)


def test_report_html_writes_a_page_and_says_where(verb, tmp_path):
    out = tmp_path / "page.html"
    status, said, err = verb("report-html", "routed", "--out", str(out), "--passages", "1")
    assert status == 0 and said == "" and str(out) in err
    text = out.read_text(encoding="utf-8")
    assert MARK in text and "routed" in text and HOSTILE[:17] not in documents_part(text)
    assert verb("report-html", "dense", "--out", str(out), "--passages", "1")[0] == 0
    assert documents(out.read_text())["overview"]["runs"][0]["name"] == "dense"


def documents_part(text: str) -> str:
    return text[text.index('id="documents">') : text.rindex("<script>")].partition("</script")[0]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("explore",), "RUN"),
        (("explore", "rooted"), "nearest: routed"),
        (("explore", "routed", "--port", "0"), "must be 1 to 65535"),
        (("explore", "routed", "--port", "70000"), "must be 1 to 65535"),
        (("explore", "routed", "outside"), "outside: lies outside of checkpoints/"),
        (("explore", "checkpoints/../outside"), "lies outside of checkpoints/"),
        (("explore", "linked"), "lies outside of checkpoints/"),
        (("explore", "../outside"), "lies outside of checkpoints/"),
        (("explore", "/etc"), "not a run folder"),
        (("report-html", "routed"), "--out"),
        (("report-html", "outside", "--out", "x.html"), "lies outside of checkpoints/"),
        (("report-html", "routed", "--out", "notes.txt"), "exists and is no page of ours"),
        (("report-html", "routed", "--out", "sea"), "exists and is no page of ours"),
        (("report-html", "routed", "--out", "nowhere/x.html"), "no folder to write in"),
        (("report-html", "routed", "--out", "x.html", "--passages", "0"), "1 to 50"),
    ],
)
def test_faults_are_one_line_and_touch_nothing(verb, arguments, says):
    outside, linked = Path("outside"), Path("checkpoints/linked")
    if not outside.exists():
        outside.mkdir()
        (outside / "recipe.yaml").write_text(Path("checkpoints/routed/recipe.yaml").read_text())
        linked.symlink_to(outside.absolute())
        Path("notes.txt").write_text("mine")
    before = sorted(Path().rglob("*"))
    status, out, err = verb(*arguments)
    (line,) = err.splitlines()
    assert status == 2 and out == "" and line.startswith("error: ") and says in line
    assert sorted(Path().rglob("*")) == before and Path("notes.txt").read_text() == "mine"


def test_runs_are_found_by_name_and_by_path_below_the_root(here):
    folder = Path("checkpoints/studies/deep")
    if not folder.exists():
        folder.parent.mkdir()
        folder.symlink_to(Path("checkpoints/dense").absolute())
    assert find("routed").name == find("checkpoints/routed").name == "routed"
    assert find("studies/deep").name == "dense"


def test_a_run_without_weights_still_shows_what_needs_none(here, tmp_path):
    root = tmp_path / "checkpoints"
    (root / "begun").mkdir(parents=True)
    recipe = Path("checkpoints/routed/recipe.yaml").read_text()
    (root / "begun" / "recipe.yaml").write_text(recipe)
    held = documents(report([find("begun", root)], each=1))
    assert held["overview"]["runs"][0]["ce"] is None
    assert held["runs/0/compute"]["run"]["total"] > 0
    for name in ("balance", "specialization", "generation", "passages"):
        assert len(held[f"runs/0/{name}"]["error"].splitlines()) == 1
