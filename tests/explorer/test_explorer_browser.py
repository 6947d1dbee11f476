"""The page in a real browser: a Chromium of the system's, driven by Playwright."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nano_moe.explorer.opened import find
from nano_moe.explorer.page import SCRIPTS
from nano_moe.explorer.report import report

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium"),
]
NAMES = ("routed", "lifted", "tight", "hashed", "choosing", "dense")
PANELS = ("route", "compute", "balance", "specialization", "generate")
LONG = 120_000  # ms: kernels may have to be compiled first


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--headless=new"]
        )
        yield launched
        launched.close()


@pytest.fixture
def visit(browser) -> Iterator[Callable[..., sync_api.Page]]:
    """visit(url, **context settings) -> a page; in the end, that nothing went wrong on any.

    Nothing: no line on the console, no error, no dialog, no request but to the place visited.
    """
    contexts, faults = [], []

    def open_page(url: str, **settings) -> sync_api.Page:
        settings = {"viewport": {"width": 1280, "height": 900}, **settings}
        context = browser.new_context(**settings)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(LONG)
        page.on("console", lambda message: faults.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: faults.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (faults.append("a dialog"), dialog.dismiss()))
        page.on(
            "request", lambda request: request.url.startswith(url) or faults.append(request.url)
        )
        page.goto(url)
        page.wait_for_selector("#route .body:not([aria-busy])")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert faults == []


@pytest.fixture(scope="module")
def written(workshop, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("report") / "page.html"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workshop)
        out.write_text(report([find(name) for name in NAMES], each=1), encoding="utf-8")
    return out


def show(page, panel: str):
    """Go to a panel, and wait until it is drawn."""
    page.locator(f"nav a[href='#{panel}']").click()
    page.wait_for_selector(f"#{panel} .body:not([aria-busy]) > *")
    return page.locator(f"#{panel}")


def choose(page, run: str) -> None:
    page.get_by_role("radiogroup", name="Run").get_by_role("radio", name=run, exact=True).click()
    page.wait_for_selector("#route .body:not([aria-busy])")


def glosses(panel) -> list[str]:
    return panel.locator(".t .n").all_inner_texts()


def gloss(chosen: list[int]) -> str:
    return "+".join(map(str, chosen))


def test_every_panel_is_drawn(served, visit):
    page = visit(served.url)
    route = show(page, "route")
    assert route.locator(".t").count() == 47
    assert route.locator(".ranks tbody tr").count() == 5  # four experts and a shared one
    assert route.locator(".way .taken").count() == 4 and route.locator(".way .shared").count() == 2
    compute = show(page, "compute")
    assert compute.locator(".weights .part").count() == 1 + 3 + 1 + 2 * (2 + 4)
    assert compute.locator(".square").count() == 3
    balance = show(page, "balance")
    assert balance.locator(".balance").count() == 5
    assert balance.locator(".balance").first.locator(".plot").count() == 2
    specialization = show(page, "specialization")
    specialization.locator(".heat").first.wait_for()
    assert specialization.locator(".heat").first.locator("td").count() == 2 * 4
    assert specialization.locator(".bits").count() == 3 * 2
    assert show(page, "generate").get_by_role("button", name="Continue").is_enabled()


@pytest.mark.parametrize("width", [390, 1280])
def test_going_straight_to_a_panel_stays_there_though_those_above_it_grow(served, visit, width):
    page = visit(served.url, viewport={"width": width, "height": 844})
    generate = show(page, "generate")
    show(page, "compute")
    show(page, "balance")
    show(page, "generate")
    page.wait_for_selector("#specialization .heat", state="attached")
    page.wait_for_timeout(300)
    top = generate.locator("h2").evaluate("node => node.getBoundingClientRect().top")
    assert 0 < top < 844
    assert page.locator("nav a[aria-current]").inner_text() == "Generate"


def test_pointing_and_the_layer_slider_show_what_the_run_decided(served, visit):
    trace = served.get("runs/0/passages/0/0")
    page = visit(served.url)
    route = show(page, "route")
    for place, layer in enumerate(trace["layers"]):
        if place:
            route.get_by_role("slider").press("ArrowRight")
        assert glosses(route) == [gloss(chosen) for chosen in layer["chosen"]]
        for i in (7, 0):
            route.locator(".t").nth(i).hover()
            assert route.locator(".ranks caption").inner_text() == f"Layer {layer['layer']}"
            rows = route.locator(".ranks tr.chosen[data-expert]")
            shown = [int(row.get_attribute("data-expert")) for row in rows.all()]
            assert sorted(shown) == sorted(layer["chosen"][i])
            best = layer["chosen"][i][0]
            row = route.locator(f".ranks tr[data-expert='{best}']").inner_text()
            assert f"{100 * layer['probs'][i][best]:.1f} %" in row
            assert f"{layer['weights'][i][0]:.3f}" in row
    page.mouse.move(5, 5)
    assert "token 1 of" in route.locator(".head").inner_text()


def test_a_keyboard_does_it_all(served, visit):
    page = visit(served.url)
    route = show(page, "route")
    route.locator(".t").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert "token 3 of" in route.locator(".head").inner_text()
    page.keyboard.press("ArrowDown")
    assert route.locator(".ranks caption").inner_text() == "Layer 2"
    assert "token 3 of" in route.locator(".head").inner_text()
    page.keyboard.press("End")
    assert "token 47 of 47" in route.locator(".head").inner_text()
    route.locator(".expert").nth(1).focus()
    page.keyboard.press("Enter")
    route.locator(".card ul").first.wait_for()
    assert "Expert 1, layer 2" in route.locator(".card h3").inner_text()
    specialization = show(page, "specialization")
    specialization.locator(".heat td").first.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    assert "go to expert 1" in specialization.locator(".say").inner_text()


def test_an_expert_tells_its_tokens_and_domains(served, visit):
    found = served.get("runs/0/specialization")["layers"][0]["experts"][2]
    page = visit(served.url)
    route = show(page, "route")
    route.locator(".expert").nth(2).click()
    route.locator(".card ul").first.wait_for()
    listed = route.locator(".card .words").first.locator("small").all_inner_texts()
    assert listed == [f"{count:,}" for _, count in found["most"]]
    assert set(route.locator(".card .bars li span:first-child").all_inner_texts()) == {
        "sea",
        "<b>hill",
    }
    assert f"{100 * found['share']:.1f} %" in route.locator(".card").inner_text()


def test_typed_markup_is_text(served, visit):
    page = visit(served.url)
    route = show(page, "route")
    route.get_by_role("radio", name="your own text").click()
    text = "<img src=x onerror=alert(1)><b>x</b>"
    route.get_by_role("textbox").fill(text)
    sync_api.expect(route.locator(".t")).to_have_count(len(text))
    assert "".join(route.locator(".t .w").all_inner_texts()).replace("\xa0", " ") == text
    assert page.locator("main img, main b:not(.expert b, .plot b)").count() == 0
    status, body = served.post("runs/0/route", {"text": text})
    assert status == 200
    assert glosses(route) == [gloss(c) for c in json.loads(body)["layers"][0]["chosen"]]


def test_dropped_tokens_are_marked(served, visit):
    trace = served.get("runs/2/passages/0/0")
    page = visit(served.url)
    choose(page, "tight")
    route = show(page, "route")
    dropped = [bool(one) for one in trace["layers"][0]["dropped"]]
    assert any(dropped) and not all(dropped)
    assert [text.startswith("✕") for text in glosses(route)] == dropped
    route.locator(".t.dropped").first.hover()
    assert "would be full" in route.locator(".remark").inner_text()


def test_the_sizes_move_with_top_k_and_the_token(served, visit):
    run = served.get("runs/0/compute")["run"]
    page = visit(served.url)
    compute = show(page, "compute")
    words = compute.locator(".say")
    before = words.inner_text()
    compute.get_by_role("slider").press("End")
    assert compute.locator(".weights .met").count() == 2 * 4 and words.inner_text() != before
    compute.get_by_role("slider").press("Home")
    assert compute.locator(".weights .met").count() == 2
    active = run["active"] - run["more"]["active"]
    share = f"({100 * active / run['total']:.0f} %)"
    assert share in words.inner_text()
    trace = served.get("runs/0/passages/0/0")
    show(page, "route").locator(".t").nth(5).click()
    show(page, "compute")
    met = [int(e.get_attribute("data-expert")) for e in compute.locator(".weights .met").all()]
    assert met == [layer["chosen"][5][0] for layer in trace["layers"]]


def test_balance_moves_through_the_steps_for_all_runs(served, visit):
    found = served.get("runs/0/balance")
    page = visit(served.url)
    balance = show(page, "balance")
    slider = balance.get_by_role("slider")
    for i, step in ((2, 6), (0, 2), (1, 4)):
        slider.fill(str(i))
        assert f"At step {step}" in balance.locator(".figures caption").inner_text()
        row = balance.locator(".figures tbody tr").first
        numbers = row.locator(".number").all_inner_texts()
        layers = found["layers"]
        worst = max(layer["max_vio"][i] for layer in layers)
        starved, dead = (sum(layer[name][i] for layer in layers) for name in ("starved", "dead"))
        assert numbers == [f"{worst:.2f}", str(starved), str(dead)]
        marks = balance.locator(".balance").first.locator(".plot").first.locator("b")
        assert marks.last.inner_text() == {0: "3", 1: "○", 2: "✕"}[i]
    slider.fill("0")
    balance.get_by_role("button", name="Play").click()
    balance.get_by_text("At step 6").wait_for()
    balance.get_by_role("button", name="Play").wait_for()


def test_generating_streams_and_shows_each_tokens_experts(served, visit):
    page = visit(served.url)
    generate = show(page, "generate")
    generate.get_by_label("Prompt").fill("wave")
    generate.get_by_label("tokens", exact=True).fill("9")
    generate.get_by_role("button", name="Continue").click()
    generate.get_by_text("9 tokens in").wait_for()
    generate.get_by_role("button", name="Continue").wait_for()
    assert generate.locator(".t").count() == 13 and generate.locator(".t.context").count() == 4
    settings = {"prompt": "wave", "tokens": 9, "temperature": 0.8, "top_p": 0.95, "seed": 0}
    _, body = served.post("runs/0/generate", settings)
    steps = [json.loads(line) for line in body.decode().splitlines()][1:]
    assert glosses(generate)[4:] == [gloss(step["choices"][0]["chosen"]) for step in steps]
    assert "token 13 of 13" in generate.locator(".head").inner_text()


def test_stop_stops(served, visit):
    page = visit(served.url)
    generate = show(page, "generate")
    generate.get_by_label("tokens", exact=True).fill("500")
    generate.get_by_role("button", name="Continue").click()
    generate.locator(".t:not(.context)").nth(2).wait_for()
    generate.get_by_role("button", name="Stop").click()
    generate.get_by_role("button", name="Continue").wait_for()
    assert generate.locator(".t").count() < 500


def test_dense_runs_and_such_that_see_the_future_say_what_they_lack(served, visit):
    page = visit(served.url)
    choose(page, "dense")
    assert "no routing to show" in show(page, "route").inner_text()
    assert "every token meets all" in show(page, "compute").inner_text()
    assert "is dense" in show(page, "specialization").inner_text()
    generate = show(page, "generate")
    generate.get_by_label("tokens", exact=True).fill("3")
    generate.get_by_role("button", name="Continue").click()
    generate.get_by_text("3 tokens in").wait_for()
    choose(page, "choosing")
    assert show(page, "route").locator(".t").count() == 47
    for panel in ("specialization", "generate"):
        assert "experts choose their tokens" in show(page, panel).inner_text()


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_telephone_and_follows_the_theme(served, visit, width, scheme):
    page = visit(served.url, viewport={"width": width, "height": 844}, color_scheme=scheme)
    for panel in PANELS:
        show(page, panel)
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    paper = "getComputedStyle(document.body).backgroundColor"

    def brightness() -> int:
        return sum(map(int, re.findall(r"\d+", page.evaluate(paper))[:3]))

    assert (brightness() > 384) == (scheme == "light")
    page.locator("#theme").click()
    assert (brightness() > 384) == (scheme == "dark")
    page.reload()
    assert (brightness() > 384) == (scheme == "dark")


def test_a_server_that_is_gone_is_said(here, serve, browser):
    page = browser.new_page()
    page.set_default_timeout(LONG)
    with serve([find("routed")]) as running:
        page.goto(running.url)
        route = show(page, "route")
    route.get_by_role("radio", name="<b>hill").click()
    sync_api.expect(route.get_by_text("make explore RUN=routed")).to_be_visible(timeout=LONG)
    page.close()


def test_the_file_opens_from_disk_without_a_network(written, visit):
    page = visit(written.as_uri(), offline=True)
    route = show(page, "route")
    assert route.locator(".t").count() == 47
    route.locator(".t").nth(3).hover()
    assert "token 4 of" in route.locator(".head").inner_text()
    route.locator(".expert").first.click()
    route.locator(".card ul").first.wait_for()
    route.get_by_role("radio", name="your own text").click()
    assert route.get_by_role("textbox").is_disabled()
    assert 'make explore RUNS="routed' in route.inner_text()
    assert show(page, "compute").locator(".square").count() == 3
    assert show(page, "balance").locator(".plot").count() > 8
    assert show(page, "specialization").locator(".heat td").count() > 8
    generate = show(page, "generate")
    assert generate.locator(".t:not(.context)").count() > 10
    assert generate.get_by_role("button", name="Continue").is_disabled()
    assert "tokens/s" in generate.inner_text() and "recording" in generate.inner_text()
    choose(page, "dense")
    assert "no routing to show" in show(page, "route").inner_text()


def test_text_that_is_markup_in_the_corpus_is_text_in_the_file(written, visit):
    page = visit(written.as_uri(), offline=True)
    route = show(page, "route")
    route.get_by_role("radio", name="<b>hill").click()
    route.locator(".t").nth(40).wait_for()
    assert "</script>" in "".join(route.locator(".t .w").all_inner_texts())
    assert page.locator("script").count() == len(SCRIPTS) + 1
