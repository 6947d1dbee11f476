"""RESULTS.md, the figures and the README's verdicts, from committed results files alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nano_moe.errors import UserError
from nano_moe.files import replacing, write_text
from nano_moe.studies import results
from nano_moe.studies.catalogue import STUDIES, Found, check_rule, everything
from nano_moe.studies.figures import draw
from nano_moe.studies.sections import claims, detectable, section
from nano_moe.studies.tables import table

BEGIN, END = "<!-- verdicts: written by make report -->", "<!-- end of verdicts -->"
RESULTS = "recipes/studies/results"
README = STUDIES.parent.parent / "README.md"
HEAD = """# Results

Written by `make report` from the results files beside it; every figure comes from a run of this
repository (`make reproduce`). A gain is positive, a factor (×) above 1, where the claim says so.

- *Reproduced*: the 95 % interval of the gain excludes zero, and its mean reaches the smallest
  effect that the study's file named before the runs. *Reversed*: the same on the other side. *Not
  reproduced*: the whole interval is smaller than that effect. *Undecided at this scale*: none of
  these; more runs, or longer ones, could tell.
- Intervals are Student's t over differences paired by seed, each for itself: of many claims, one in
  twenty would seem to show something if none did. A trend's is over slopes, one per line and seed;
  lines of one seed saw the same text in the same order.
- *Detectable*: the smallest true gain whose interval would exclude zero four times in five, at this
  n and spread.
- Losses are of the whole validation split, mean ± standard deviation over seeds.
- `max_vio` is the load of the busiest expert over the mean, minus 1; `max_share` its share of all
  assignments; `starved_experts` get less than a tenth of an even share, `dead_experts` nothing;
  `load_entropy` is 1 when loads are even.
- Memory is a median: what a process came to hold beyond what it held at its start. In bf16 it
  includes products that oneDNN compiles for experts as loads wander, so that experts may hold more
  than in fp32. bf16 is autocast over fp32 weights (see Precision).
- Studies share runs: a recipe is trained once per seed on a machine, whichever claims it bears on.
  On another machine it ends elsewhere by rounding, and each study names its own.
"""


VOCABULARY = """*Reproduced*: the gain is told from zero and reaches the smallest effect that was
named beforehand. *Reversed*: so does the contrary. *Not reproduced*: any effect is smaller than
that. *Undecided*: so few runs cannot tell, or two draws disagree. *Detectable*: the smallest true
gain that they would tell from zero four times in five. Caveats, such as that one optimizer was
tried (Muon), stand with each study.
"""


class Reported(NamedTuple):
    """A finished study, its results, and those of the study that draws it again."""

    found: Found
    content: Mapping[str, Any]
    again: Mapping[str, Any] | None


def finished(folder: Path = STUDIES) -> list[Reported]:
    """What has results, in the order of the report.

    Raises UserError where a rule has changed, or verdicts do not follow from the runs.
    """
    contents = {}
    for one in everything(folder):
        if one.results.is_file():
            contents[one.name] = (one, results.read(one.results))
            check_rule(*contents[one.name])
            results.check_judged(one.results, one.study, contents[one.name][1])
    again = {one.study.repeats: content for one, content in contents.values()}
    return [
        Reported(one, content, again.get(one.name))
        for one, content in contents.values()
        if one.study.repeats is None
    ]


def write(folder: Path = STUDIES, readme: Path = README) -> list[Path]:
    """Rewrite figures, RESULTS.md and the README's block; the files written."""
    reported = finished(folder)
    if not reported:
        raise UserError(f"{folder / 'results'}: no results yet; run: make reproduce")
    pictures = {one.found.results.with_suffix(".png"): _picture(one) for one in reported}
    text = document_of(reported)
    for picture, drawn in pictures.items():
        with replacing(picture) as file:
            file.write(drawn)
    document = folder / "results" / "RESULTS.md"
    write_text(document, text)
    return [*pictures, document, *_into_readme(readme, readme_block(reported, unrun(folder)))]


def document_of(reported: Sequence[Reported]) -> str:
    """The text of RESULTS.md."""
    return "\n".join([HEAD, *(_section(one) for one in reported)])


def _picture(one: Reported) -> bytes:
    with results.whole(one.found.results):
        return draw(one.content, one.found.study.figure)


def _section(one: Reported) -> str:
    with results.whole(one.found.results):
        return section(*one)


# --- README --------------------------------------------------------------------------------------


def _into_readme(readme: Path, block: str) -> Iterator[Path]:
    if not readme.is_file():
        return
    text = readme.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise UserError(f"{readme}: the line '{BEGIN}' or '{END}' is missing; put it back")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    write_text(readme, f"{before}{BEGIN}\n{block}{END}{after}")
    yield readme


def unrun(folder: Path = STUDIES) -> list[str]:
    """Studies without results."""
    return [one.name for one in everything(folder) if not one.results.is_file()]


def readme_block(reported: Sequence[Reported], missing: Sequence[str] = ()) -> str:
    """Each study's first claim, what became of the others, and the first study's figure.

    And the names of studies that are missing.
    """
    judged = [one for one in reported if "comparisons" in one.content]
    if not judged:
        return ""
    header = ("study", "claim", "verdict", "gain (95 %)", "detectable", "other claims")
    first = judged[0].found
    names = ", ".join(f"`{name}`" for name in missing)
    left = f"Written down, and not run yet: {names}.\n\n" if missing else ""
    return (
        f"\n{table(header, [row for one in judged for row in _rows(one)])}\n{VOCABULARY}\n"
        f"{left}![{first.study.title}]({RESULTS}/{first.name}.png)\n\n"
    )


def _rows(one: Reported) -> Iterator[tuple[str, ...]]:
    first, *others = claims(one.content, one.again)
    shown = [first, *(claim for claim in others if claim[1] == "reversed")]
    failed = [claim["says"] for claim, verdict, _ in others if verdict == "not reproduced"]
    rest = [verdict for _, verdict, _ in others if verdict not in ("reversed", "not reproduced")]
    counted = [f"{rest.count(v)} {v}" for v in dict.fromkeys(rest)]
    named = "; ".join([*counted, *(f"not reproduced: {says}" for says in failed)]) or "–"
    title = one.found.study.title
    twice = ", drawn twice" if one.again else ""
    link = f"[{title}]({RESULTS}/RESULTS.md#{anchor(title)}){twice}"
    for number, (claim, verdict, gained) in enumerate(shown):
        told = (claim["says"], f"**{verdict}**", gained, detectable(claim))
        yield (link, *told, named) if number == 0 else ("", *told, "")


def anchor(title: str) -> str:
    """The name that a heading has in a link."""
    kept = "".join(c for c in title.lower() if c.isalnum() or c in " -")
    return kept.replace(" ", "-")
