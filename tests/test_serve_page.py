"""The page of the server, in a real browser (Debian's Chromium)."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
import server
from playwright.sync_api import expect, sync_playwright

import l2s_jax
from l2s_jax.settings.search import changed

PROMPT, SEEDS = "abba abc", range(20)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    (root / "prompts.txt").write_text("abc bca\n\ncab <b>\n", encoding="utf-8")
    return root, server.write_model(root, seed=5)[0]


@pytest.fixture(scope="module")
def address(model):
    root, directory = model
    flags = ("--models=l2s,llm,exact", f"--examples={root / 'prompts.txt'}", "--api_key=secret")
    with server.serving(directory, *flags) as started:
        yield started.address


@pytest.fixture(scope="module")
def browser():
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("expected Chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, address):
    """The page with its key given; no error of it goes unseen."""
    context = browser.new_context(viewport={"width": 1100, "height": 900})
    made = context.new_page()
    wrong = []
    made.on("pageerror", lambda error: wrong.append(str(error)))
    asked = []
    made.on("request", lambda request: asked.append(request.url))
    made.goto(address)
    made.get_by_label("API key").fill("secret")
    made.get_by_label("API key").press("Tab")
    expect(made.get_by_label("llm")).to_be_checked()
    yield made
    assert not wrong
    assert all(url.startswith((address, "data:")) for url in asked)
    context.close()


def said(page, name):
    return page.locator(f"section[data-model={name}] .said")


def test_models_race_and_differences_are_marked(page, model):
    search = {"temperature": 1.5}
    loaded = [l2s_jax.load(model[1], exact=exact) for exact in (False, True)]
    for one in loaded:
        one.search = changed(dataclasses.asdict(one.search), search)
    prompts = [PROMPT] * len(SEEDS)
    said_by = [[output.text for output in one.generate(prompts, seeds=SEEDS)] for one in loaded]
    pairs = zip(*said_by, strict=True)
    seed = next(i for i, (own, llm) in enumerate(pairs) if own != llm and " " in llm)
    texts = {"l2s": said_by[0][seed], "exact": said_by[1][seed], "llm": said_by[1][seed]}
    page.get_by_label("Temperature").fill("1.5")
    page.get_by_label("Seed").fill(str(seed))
    page.get_by_label("Prompt").fill(PROMPT)
    page.get_by_label("Prompt").press("Control+Enter")
    expect(page.get_by_role("status")).to_contain_text("Done.")
    for name, text in texts.items():
        # A browser's text_content keeps spaces as they are.
        assert said(page, name).text_content() == text
    expect(said(page, "l2s").locator("mark").first).to_be_visible()
    expect(said(page, "exact").locator("mark")).to_have_count(0)
    rows = page.get_by_role("row").all_inner_texts()
    assert len(rows) == 4
    assert "differs from that of llm" in rows[1]
    assert "what the others are compared with" in rows[2]
    assert "the same as that of llm" in rows[3]
    page.get_by_role("button", name="Replay").click()
    expect(page.get_by_role("status")).to_have_text("Done.")
    assert said(page, "l2s").text_content() == texts["l2s"]


def test_an_example_is_taken_and_all_run_at_once(page):
    page.get_by_label("Or one of the task's").select_option("cab <b>")
    expect(page.get_by_label("Prompt")).to_have_value("cab <b>")
    page.get_by_label("exact").uncheck()
    page.get_by_label("All at once").check()
    page.get_by_label("New tokens").fill("3")
    page.get_by_role("button", name="Run").click()
    expect(page.get_by_role("status")).to_contain_text("Done.")
    tokens = page.locator("tbody td:nth-child(4)").all_inner_texts()
    assert len(tokens) == 2 and all(0 < int(count) <= 3 for count in tokens)


def test_what_the_server_refuses_is_said(page):
    page.get_by_label("Prompt").fill("abc " * 50)
    page.get_by_role("button", name="Run").click()
    expect(page.get_by_role("status")).to_contain_text("tokens")
    expect(page.locator("section[data-model=l2s] .time")).to_contain_text("12")


def test_it_is_worked_by_keys_and_named_for_a_screen_reader(page):
    page.get_by_label("Prompt").focus()
    seen = []
    for _ in range(14):
        seen.append(
            page.evaluate("document.activeElement.id || document.activeElement.value || 'page'")
        )
        page.keyboard.press("Tab")
    for one in ("prompt", "examples", "tokens", "temperature", "seed", "llm", "turns", "run"):
        assert one in seen, seen
    unnamed = page.evaluate(
        """[...document.querySelectorAll("input, select, textarea")]
           .filter((e) => e.offsetParent && !e.labels.length).map((e) => e.outerHTML)"""
    )
    assert not unnamed


def test_a_phone_shows_it_without_scrolling_sideways(browser, address):
    context = browser.new_context(viewport={"width": 360, "height": 740})
    made = context.new_page()
    made.goto(address)
    assert made.evaluate("document.documentElement.scrollWidth") <= 360
    context.close()
