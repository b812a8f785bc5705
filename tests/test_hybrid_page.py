"""The chat page of rag_hybrid_fastapi.py in a real Chromium, against the real server."""

# ruff: noqa: D103 - the names of the tests are their docstrings

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import needs_chromium, served
from fake_llm import FakeLLM
from playwright.sync_api import Browser, Page, expect

pytestmark = needs_chromium

HOSTILE = "<img src=x onerror=\"document.title='broken'\"><script>document.title='broken'</script>"
NOTES = {
    "mill.md": "# Wheel\n\nThe wheel of the Halden mill has 32 oak paddles.\n\n"
    "# Miller\n\nThe miller of Halden is Sunniva Aas.\n",
    "hostile.md": f"# Evil {HOSTILE}\n\nThe hostile fox says {HOSTILE} at noon.\n",
}


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeLLM]:
    with FakeLLM() as server:
        yield server


@pytest.fixture(scope="module")
def url(fake: FakeLLM, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server with two documents."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "notes").mkdir()
    for name, text in NOTES.items():
        (folder / "notes" / name).write_text(text)
    arguments = ("--docs", "notes", "--port", "0")
    env = fake.environment()
    with served("rag_hybrid_fastapi.py", *arguments, cwd=folder, env=env) as url:
        yield url


@pytest.fixture(params=[(1280, 800), (360, 740)], ids=["desktop", "phone"])
def size(request: pytest.FixtureRequest) -> tuple[int, int]:
    return request.param


@pytest.fixture
def page(browser: Browser, url: str, fake: FakeLLM, size: tuple[int, int]) -> Iterator[Page]:
    """The page, ready. Fails where it complains, asks another host, or is wider than its window."""
    fake.recover()
    fake.token_delay = 0.0
    context = browser.new_context(viewport={"width": size[0], "height": size[1]})
    page = context.new_page()
    complaints: list[str] = []
    asked: list[str] = []
    page.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(url)
    expect(page.locator("#send")).to_be_enabled(timeout=15_000)
    yield page
    assert page.title() == "RAG: ask your documents", "a hostile text ran"
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    context.close()
    assert [a for a in asked if not a.startswith((url, "data:"))] == []
    # Statuses of 4xx and 5xx are told by the browser itself, and some tests are about them.
    assert [c for c in complaints if "Failed to load resource" not in c] == []


def ask(page: Page, question: str) -> Any:
    """Ask, and wait for the end of the answer: its article."""
    page.fill("#query", question)
    page.press("#query", "Enter")
    turn = page.locator(".turn").last
    expect(turn.locator(".question")).to_have_text(question)
    expect(turn).to_have_attribute("aria-busy", "false", timeout=20_000)
    return turn


def test_an_answer_streams_and_its_citation_opens_the_passage(page: Page, fake: FakeLLM) -> None:
    fake.token_delay = 0.15
    fake.fail(reply="The wheel has **32** oak paddles [1], and so on and so forth [9].")
    page.fill("#query", "How many paddles has the wheel?")
    page.press("#query", "Enter")
    text = page.locator(".turn .text")
    lengths: set[int] = set()
    while page.locator(".turn").get_attribute("aria-busy") == "true":
        lengths.add(len(text.inner_text()))
        time.sleep(0.05)
    assert len(lengths) > 3, "the text did not grow"
    expect(text.locator("strong")).to_have_text("32")
    expect(text.locator(".bad-cite")).to_have_text("[9?]")
    text.locator(".cite").click()
    expect(page.locator("#drawer-title")).to_contain_text("mill.md")
    expect(page.locator("#drawer .passage")).to_contain_text("32 oak paddles")
    expect(page.locator("#drawer")).to_contain_text("Wheel")
    page.keyboard.press("Escape")
    expect(page.locator("#drawer")).to_be_hidden()


def test_the_drawer_shows_how_the_passages_were_found(page: Page) -> None:
    turn = ask(page, "Who is the miller of Halden?")
    turn.locator(".found").click()
    drawer = page.locator("#drawer")
    for word in ("dense", "bm25", "fused", "maxsim", "cosine", "Seconds", "for the passages"):
        expect(drawer).to_contain_text(word)
    expect(drawer.locator("tbody tr").first).to_contain_text("Sunniva Aas")


def test_a_refusal_looks_like_one(page: Page, fake: FakeLLM) -> None:
    turn = ask(page, "Zebra quagga okapi?")
    expect(turn).to_have_class(re.compile("refused"))


def test_a_greeting_is_answered_and_nothing_is_looked_up(page: Page) -> None:
    turn = ask(page, "Hello!")
    turn.locator(".found").click()
    expect(page.locator("#drawer")).to_contain_text("Nothing was looked up")


def test_a_dropped_file_is_added_asked_and_removed(page: Page, size: tuple[int, int]) -> None:
    name = f"ferry{size[0]}.txt"
    drop = """name => {
        const data = new DataTransfer();
        data.items.add(new File([`The ferry ${name} leaves Tornby at 9:40.`], name));
        const event = new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true});
        window.dispatchEvent(event);
    }"""
    page.evaluate(drop, name)
    expect(page.locator("#doc-status")).to_contain_text(f"Added {name}", timeout=20_000)
    page.click("#docs-close")
    expect(ask(page, "When does the ferry leave Tornby?").locator(".text")).to_contain_text("9:40")
    page.click("#open-docs")
    entry = page.locator("#doc-list li", has_text=name)
    entry.locator(".remove").click()
    entry.locator(".confirm").click()
    expect(page.locator("#doc-status")).to_contain_text(f"Removed {name}", timeout=20_000)
    expect(entry).to_have_count(0)


def test_a_file_that_cannot_be_read_is_named(page: Page, tmp_path: Path) -> None:
    (tmp_path / "broken.pdf").write_bytes(b"%PDF-1.7 nothing")
    page.click("#open-docs")
    page.set_input_files("#file", tmp_path / "broken.pdf")
    expect(page.locator("#doc-status .error")).to_contain_text("can't be read", timeout=20_000)


def test_hostile_documents_and_answers_are_text(page: Page, fake: FakeLLM) -> None:
    link = "[click](javascript:document.title='broken')"
    fake.fail(reply=f"The fox says {HOSTILE} {link} ![x](http://127.0.0.1:9/x.png) [1]")
    turn = ask(page, "What does the hostile fox say at noon?")
    expect(turn.locator(".text")).to_contain_text("<img src=x")
    assert turn.locator(".text img, .text script, .text [href^=javascript]").count() == 0
    turn.locator(".chip").first.click()
    expect(page.locator("#drawer .passage")).to_contain_text("<script>")
    assert page.locator("#drawer img, #drawer script").count() == 0
    page.click("#drawer-close")  # on a phone it covers the turn
    page.locator(".turn .found").click()
    expect(page.locator("#drawer")).to_contain_text("<img src=x")


def test_stop_keeps_what_came(page: Page, fake: FakeLLM) -> None:
    fake.token_delay = 0.2
    fake.fail(reply="The wheel turns. " * 50)
    page.fill("#query", "How many paddles has the wheel?")
    page.press("#query", "Enter")
    expect(page.locator(".turn .text")).to_contain_text("The wheel", timeout=20_000)
    page.click("#send")
    turn = page.locator(".turn")
    expect(turn).to_have_attribute("aria-busy", "false")
    expect(turn.locator(".state")).to_have_text("Stopped.")
    expect(turn.locator(".text")).to_contain_text("The wheel")


def test_an_llm_that_fails_is_told_and_the_next_question_works(page: Page, fake: FakeLLM) -> None:
    fake.fail(status=400)
    turn = ask(page, "How many paddles has the wheel?")
    expect(turn.locator(".error")).to_contain_text("HTTP 400")
    fake.recover()
    expect(ask(page, "How many paddles has the wheel?").locator(".text")).to_contain_text("32")


def test_it_can_be_used_by_keyboard_and_has_names_for_a_screen_reader(page: Page) -> None:
    ask(page, "Who is the miller of Halden?")
    page.locator(".turn .cite").first.focus()
    page.keyboard.press("Enter")
    expect(page.locator("#drawer-close")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.locator(".turn .cite").first).to_be_focused()
    unnamed = """[...document.querySelectorAll("button, textarea, input, dialog")].filter(
        e => !(e.textContent.trim() || e.ariaLabel || e.labels?.length)).map(e => e.outerHTML)"""
    assert page.evaluate(unnamed) == []
    expect(page.get_by_role("log", name="Conversation")).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_in_both_looks(browser: Browser, url: str, scheme: Any) -> None:
    page = browser.new_page(color_scheme=scheme)
    page.goto(url)
    contrast = """() => {
        const light = color => {
            const [r, g, b] = color.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
                .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const text = [getComputedStyle(document.body).color,
                      getComputedStyle(document.querySelector(".muted")).color].map(light);
        const ground = light(getComputedStyle(document.body).backgroundColor);
        return text.map(t => (Math.max(t, ground) + 0.05) / (Math.min(t, ground) + 0.05));
    }"""
    assert min(page.evaluate(contrast)) >= 4.5
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.click("#look")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before
    page.reload()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before
    page.close()
