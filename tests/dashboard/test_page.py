"""The page in a browser: a finished run and one that goes on, as a user sees them."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import expect

from tests.dashboard.conftest import STEPS, Server, start_server, stop_server
from tests.dashboard.scene import SAMPLES, Scene, rows_of, write_rows

LIGHT = "{resultTypes: ['violations'], runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'wcag22aa']}"
DARK = "{resultTypes: ['violations'], runOnly: ['color-contrast']}"
"""Nothing but colours depends on the scheme."""
AXE = Path(__file__).parent / "vendor" / "axe.min.js"
HOSTILE_SAMPLE = "sample?sample=0%3A00000005%3A0&step=5"


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(10_000)
    opened = context.new_page()
    problems: list[str] = []
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on("console", lambda said: problems.append(said.text) if "Security Policy" in said.text else None)
    yield opened
    context.close()
    assert problems == []


def tokens_of(page: Any) -> Any:
    return page.get_by_role("listbox", name="Response tokens").get_by_role("option")


def number(text: str) -> float:
    return float(text.replace("−", "-"))


def go(page: Any, server: Server, view: str, run: str = "done") -> None:
    """To a view of a run, by the address with the token where the page has none yet."""
    if not page.url.startswith(server.origin):
        page.goto(server.url)
        expect(page.locator("#bar a.brand")).to_be_visible()
    page.goto(f"{server.origin}/#/run/{run}/{view}")


def plot_of(page: Any, title: str) -> Any:
    return page.locator("figure.chart", has=page.locator(".title", has_text=re.compile(f"^{title}"))).locator(".plot")


def points(page: Any, title: str) -> tuple[int, int]:
    """How many points a curve shows, and the last one's step."""
    plot = plot_of(page, title)
    expect(plot).to_have_attribute("data-last", re.compile(r"\d"))
    return int(plot.get_attribute("data-points")), int(plot.get_attribute("data-last"))


def test_a_finished_run_opens_with_its_curves_and_the_token_leaves_the_address(page: Any, server: Server) -> None:
    go(page, server, "overview")
    assert points(page, "reward/mean") == (STEPS, STEPS - 1)
    assert "token" not in page.url
    expect(page.locator("figure.chart canvas").first).to_be_visible()
    expect(page.locator(".state").first).to_contain_text("finished")
    expect(page.locator("#main")).to_contain_text("rollout died")


def test_a_bar_of_a_histogram_selects_its_samples(page: Any, server: Server) -> None:
    go(page, server, "rewards")
    card = page.get_by_role("region", name="attention")
    bar = card.locator("a.bar[href]").nth(3)
    count = int(bar.get_attribute("aria-label").split(": ")[1].split()[0])
    low, high = map(number, re.findall(r"[−\d][\d.e−]*", bar.get_attribute("aria-label"))[:2])
    bar.click()
    expect(page.get_by_role("status")).to_contain_text(f"{count} samples")
    rows = page.locator("table.samples tbody tr")
    expect(rows).to_have_count(count)
    values = [number(text) for text in page.locator('td[data-head="attention"]').all_text_contents()]
    assert all(low - 1e-3 <= value <= high + 1e-3 for value in values)


def test_search_and_filters_select_and_stand_in_the_address(page: Any, server: Server) -> None:
    go(page, server, "samples")
    count = page.get_by_role("status")
    expect(count).to_contain_text(f"{STEPS * SAMPLES} samples")
    page.get_by_role("searchbox").fill('"larger than Quito" Li')
    expect(count).to_contain_text(f"{SAMPLES * (STEPS // 3 - 1)} samples")
    page.get_by_label("Finish").select_option("length")
    expect(count).to_contain_text(f"{STEPS // 3 - 1} samples")
    page.get_by_label("Failed").select_option("judge")
    expect(count).to_contain_text("0 samples")
    page.reload()
    expect(count).to_contain_text("0 samples")
    page.get_by_role("link", name="clear").click()
    expect(count).to_contain_text(f"{STEPS * SAMPLES} samples")


def test_a_tokens_attention_lights_the_prompt_by_pointer_and_by_key(page: Any, server: Server) -> None:
    go(page, server, "sample?sample=0%3A00000000%3A0&step=0")
    tokens, prompt = tokens_of(page), page.locator(".tokens.prompt .token")
    expect(prompt.first).to_be_visible()
    assert "Paris" in "".join(tokens.all_text_contents()), "pieces of the run's own tokenizer"

    def brightest() -> int:
        tints = prompt.evaluate_all("all => all.map(one => parseFloat(one.style.getPropertyValue('--tint') || '-1'))")
        return tints.index(max(tints)) if max(tints) > 0 else -1

    assert brightest() == -1
    tokens.nth(2).hover()
    expect(page.locator(".readout")).to_contain_text("looks most at")
    assert brightest() == 3, "token t of the scene looks at position 1 + t"
    page.get_by_role("listbox").focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    expect(tokens.nth(1)).to_have_attribute("aria-selected", "true")
    expect(page.locator(".readout")).to_contain_text("looks most at")
    assert brightest() == 2
    expect(page.locator(".tokens.prompt .salient")).to_have_count(2)
    shades = tokens.evaluate_all("all => all.map(one => one.style.getPropertyValue('--tint'))")
    assert len(set(shades)) > 1, "the response is coloured by its own figures"


def test_a_sample_without_a_map_says_so_and_a_run_without_a_tokenizer_shows_ids(page: Any, server: Server) -> None:
    go(page, server, "sample?sample=0%3A00000000%3A3&step=0")
    expect(page.locator(".notes")).to_contain_text("kept no map")
    go(page, server, "sample?sample=0%3A00000000%3A3&step=0", run="other")
    expect(page.locator(".notes")).to_contain_text("no tokenizer.json")
    expect(tokens_of(page).first).to_contain_text("⟨")


def test_a_group_stands_side_by_side_with_all_its_scores(page: Any, server: Server) -> None:
    go(page, server, "group?group=0%3A00000001&step=1")
    cards = page.get_by_role("article")
    expect(cards).to_have_count(SAMPLES)
    expect(cards.nth(3)).to_contain_text("judge unclear")
    expect(page.get_by_text("highest", exact=True)).to_have_count(1)


def test_verdicts_failures_and_comparison(page: Any, server: Server) -> None:
    go(page, server, "verdicts")
    expect(page.locator("#main")).to_contain_text("The better answer is true.")
    expect(page.locator("#main")).to_contain_text("orders disagree")
    page.locator("details.judged-by summary").first.click()
    expect(page.locator("details.judged-by li").first).to_have_text("Nobody is hurt by it.")
    go(page, server, "failures")
    expect(page.locator("#main")).to_contain_text("the judge gives too little")
    page.get_by_role("link", name=str(STEPS), exact=True).click()
    expect(page.get_by_role("status")).to_contain_text(f"{STEPS} samples")
    go(page, server, "compare?with=other")
    assert points(page, "reward/mean")[0] >= STEPS - 1
    expect(page.get_by_role("table", name="Where the recipes differ")).to_contain_text("run.name")


def test_a_batch_that_was_not_trained_on_can_be_looked_at(page: Any, server: Server) -> None:
    go(page, server, "failures")
    table = page.get_by_role("table", name="Batches that were not trained on")
    expect(table).to_contain_text("NaN")
    table.get_by_role("link", name="look at them").click()
    expect(page.get_by_role("heading", name="The batch of step 7, not trained on")).to_be_visible()
    expect(page.get_by_role("article")).to_have_count(2 * SAMPLES)
    expect(page.get_by_role("article").last).to_contain_text("attention")
    go(page, server, "bad?step=3")
    expect(page.get_by_role("alert")).to_contain_text("kept no batch of step 3")


BAD, GROUP = "bad?step=7", "group?group=0%3A00000005&step=5"


@pytest.mark.parametrize("view", ["overview", "samples", "failures", HOSTILE_SAMPLE, GROUP, BAD])
def test_markup_in_prompts_responses_and_errors_is_text(page: Any, server: Server, view: str) -> None:
    go(page, server, view)
    if view == "samples":
        page.get_by_label("To step").fill("5")
    expect(page.locator("#main")).to_contain_text("onerror")
    assert page.evaluate("() => window.hurt ?? null") is None
    assert page.locator("#main script, #main img").count() == 0


def test_a_wrong_token_is_refused_and_the_right_one_can_be_given(page: Any, server: Server) -> None:
    page.goto(f"{server.origin}/#token=wrong")
    expect(page.get_by_role("heading", name="Token needed")).to_be_visible()
    page.get_by_label("Token").fill(server.token)
    page.get_by_role("button", name="Open").click()
    expect(page.get_by_role("table", name="Runs")).to_contain_text("done")


def test_a_live_run_moves_faults_appear_and_a_resume_cuts_back(page: Any, tmp_path: Path, tokenizer: Any) -> None:
    scene = Scene(tmp_path / "live", tokenizer)
    for _ in range(3):
        scene.step()
    live = start_server(tmp_path / "live", tmp_path / "cache")
    try:
        page.goto(live.url)
        expect(page.locator("#how")).to_contain_text("3 steps")
        plot = plot_of(page, "reward/mean")
        expect(plot).to_have_attribute("data-last", "2")
        before = plot.locator("canvas").screenshot()
        for _ in range(4):
            scene.step()
        expect(plot).to_have_attribute("data-last", "6")
        assert plot.locator("canvas").screenshot() != before
        scene.run.event("learner_died", error="learner-1 failed: it was killed")
        expect(page.get_by_role("table", name="Faults, newest first")).to_contain_text("learner-1 failed")
        scene.back_to(4)
        expect(page.locator("#how")).to_contain_text("4 steps")
        expect(plot).to_have_attribute("data-last", "3")
        scene.step(response="Something altogether different")
        expect(plot).to_have_attribute("data-last", "4")
        page.goto(f"{live.origin}/#/run/live/samples?text=altogether")
        expect(page.get_by_role("status")).to_contain_text(f"{SAMPLES} samples")
    finally:
        stop_server(live)
        scene.run.unlock()


def test_tabs_share_a_stream_and_another_goes_on_when_its_holder_closes(
    browser: Any, tmp_path: Path, tokenizer: Any
) -> None:
    scene = Scene(tmp_path / "live", tokenizer)
    scene.step()
    live = start_server(tmp_path / "live", tmp_path / "cache")
    context = browser.new_context()
    try:
        tabs = [context.new_page() for _ in range(2)]
        asked: list[str] = []
        context.on("request", lambda request: asked.append(request.url) if "/api/stream" in request.url else None)
        for tab in tabs:
            tab.goto(live.url)
            expect(tab.locator("#how")).to_contain_text("1 steps")
        scene.step()
        for tab in tabs:
            expect(tab.locator("#how")).to_contain_text("2 steps", timeout=10_000)
        assert len(asked) == 1, "one connection for both"
        tabs[0].close()
        scene.step()
        expect(tabs[1].locator("#how")).to_contain_text("3 steps", timeout=10_000)
    finally:
        context.close()
        stop_server(live)
        scene.run.unlock()


def test_keys_a_zoom_and_a_table_in_place_of_a_curve(page: Any, server: Server) -> None:
    go(page, server, "overview")
    assert points(page, "kl/reference") == (STEPS, STEPS - 1)
    page.get_by_label("From step").fill("3")
    page.get_by_label("To step").fill("6")
    page.get_by_label("To step").press("Enter")
    expect(plot_of(page, "kl/reference")).to_have_attribute("data-last", "6")
    assert points(page, "kl/reference") == (4, 6)
    page.get_by_role("button", name="Table of kl/reference").click()
    expect(page.get_by_role("table", name="kl/reference").get_by_role("row")).to_have_count(5)
    page.get_by_role("button", name="whole run").click()
    expect(plot_of(page, "reward/mean")).to_have_attribute("data-last", str(STEPS - 1))
    page.get_by_label("log scale").check()
    page.locator("#main").click(position={"x": 2, "y": 2})
    page.keyboard.press("g")
    page.keyboard.press("v")
    expect(page.get_by_role("heading", name="Verdicts")).to_be_visible()
    page.keyboard.press("/")
    expect(page.get_by_role("searchbox")).to_be_focused()


PRESS = "keys => keys.forEach(key => document.body.dispatchEvent(new KeyboardEvent('keydown', {key, bubbles: true})))"
"""One after the other at once: the page waits 1.5 s for a second key, which a busy machine may take to press it."""


def test_each_letter_of_the_manual_opens_its_view(page: Any, server: Server) -> None:
    manual = Path("docs/dashboard.md").read_text(encoding="utf-8")
    row = re.search(r"\| `g` then (.+) \| (.+) \|", manual)
    assert row, "the table of keys"
    letters, views = re.findall("`(.)`", row[1]), row[2].split(", ")
    go(page, server, "sample?sample=0%3A00000000%3A0&step=0")
    tabs = page.get_by_role("navigation", name="Views").get_by_role("link")
    expect(tabs).to_have_text(views)
    for letter, view in zip(letters, views, strict=True):
        page.evaluate(PRESS, ["g", letter])
        expect(page.locator("nav [aria-current=page]")).to_have_text(view)


def test_a_curve_that_never_changes_is_drawn(page: Any, server: Server) -> None:
    go(page, server, "flow")
    assert points(page, "groups waiting") == (STEPS, STEPS - 1)
    expect(plot_of(page, "groups waiting").locator("canvas")).to_be_visible()
    page.evaluate("() => new Promise(requestAnimationFrame)")  # after what drawing it may throw


def test_a_connection_that_is_back_is_no_longer_called_lost(page: Any, tmp_path: Path) -> None:
    scene = Scene(tmp_path / "live")
    scene.step()
    live = start_server(tmp_path / "live", tmp_path / "cache")
    try:
        page.route("**/api/stream*", lambda route: route.abort())
        page.goto(live.url)
        how = page.locator("#how")
        expect(how).to_contain_text("connection lost")
        scene.run.metrics.rename(tmp_path / "metrics.jsonl")
        scene.run.metrics.mkdir()
        run = {"params": {"run": "live"}, "headers": live.headers}
        while httpx.get(f"{live.origin}/api/run", **run).json()["problem"] is None:
            page.wait_for_timeout(100)
        page.unroute("**/api/stream*")
        expect(how).to_contain_text("IsADirectoryError")
        expect(how).not_to_contain_text("connection lost")
        expect(how).to_contain_text("1 steps")
    finally:
        stop_server(live)
        scene.run.unlock()


def test_a_group_that_is_too_much_for_one_page_says_what_it_leaves_out(page: Any, tmp_path: Path) -> None:
    scene = Scene(tmp_path / "live")
    scene.step()
    shard = scene.run.samples / "step_000000.jsonl"
    write_rows(shard, ({**row, "long": "x" * 10 * 2**20} for row in rows_of(shard)))
    live = start_server(tmp_path / "live", tmp_path / "cache")
    try:
        page.goto(live.url)
        expect(plot_of(page, "reward/mean")).to_have_attribute("data-last", "0")
        go(page, live, "group?group=0%3A00000000&step=0", run="live")
        expect(page.get_by_role("article")).to_have_count(SAMPLES - 1)
        expect(page.locator("#main")).to_contain_text("1 more samples are too much for one page")
        expect(page.get_by_text("highest", exact=True)).to_have_count(0)
        page.get_by_role("link", name="all of the group").click()
        expect(page.get_by_role("status")).to_contain_text(f"{SAMPLES} samples")
    finally:
        stop_server(live)
        scene.run.unlock()


def test_a_group_of_long_responses_has_one_scale(page: Any, server: Server) -> None:
    go(page, server, "overview")
    lowest, highest, signed, shades = page.evaluate("""async () => {
        const { rangeOf, strengths } = await import("/page/tokens.js");
        const columns = [...Array(16).keys()].map((k) => [...Array(16384).keys()].map((t) => (t ? k - t % 8 : null)));
        const { low, high } = rangeOf("mass", columns), signed = rangeOf("kl", columns);
        return [low, high, [signed.low, signed.high], strengths("mass", columns[0], { low, high }).slice(0, 9)];
    }""")
    assert (lowest, highest, signed) == (-7, 15, [-15, 15])
    assert shades == [None, *(pytest.approx((7 - t % 8) / 22) for t in range(1, 9))]


def test_a_narrow_screen_scrolls_in_one_direction_only(browser: Any, server: Server) -> None:
    context = browser.new_context(viewport={"width": 360, "height": 740})
    page = context.new_page()
    for view in (
        "overview",
        "rewards",
        "samples",
        "sample?sample=0%3A00000000%3A0&step=0",
        "verdicts",
        "failures",
        BAD,
    ):
        go(page, server, view)
        page.wait_for_timeout(300)
        wide = page.evaluate("() => document.documentElement.scrollWidth")
        assert wide <= 360, f"{view} is {wide} wide"
    context.close()


def said_of(violation: dict[str, Any]) -> str:
    node = violation["nodes"][0]
    return f"{violation['id']}: {violation['help']} {node['html'][:200]} {node.get('failureSummary', '')}"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_serious_fault(browser: Any, server: Server, scheme: str) -> None:
    context = browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme=scheme, bypass_csp=True)
    page = context.new_page()
    found: dict[str, list[str]] = {}
    rules = LIGHT if scheme == "light" else DARK
    page.goto(server.url)
    page.evaluate(AXE.read_text(encoding="utf-8"))  # the page never loads anew: its views follow the fragment
    views = ("overview", "rewards", "flow", "samples", "verdicts", "failures", "compare?with=other", HOSTILE_SAMPLE,
             "sample?sample=0%3A00000000%3A0&step=0", "group?group=0%3A00000001&step=1", BAD)  # fmt: skip
    for view in ("", *views):
        if view:
            go(page, server, view)
        expect(page.locator("#main > :not(p.quiet)").first).to_be_attached()
        page.wait_for_timeout(200)
        if "sample?" in view:
            tokens_of(page).nth(1).click()
        result = page.evaluate(f"() => axe.run(document, {rules})")
        bad = [said_of(one) for one in result["violations"] if one["impact"] in ("serious", "critical")]
        if bad:
            found[view] = bad
    context.close()
    assert found == {}
