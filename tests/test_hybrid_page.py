"""The chat page of rag_hybrid_fastapi.py in a real Chromium, on a server as a user starts it."""

# ruff: noqa: D103 - the names of the tests are their docstrings

import re
import time

import pytest
from axe_playwright_python.sync_playwright import Axe
from conftest import needs_chromium, served
from fake_llm import FakeLLM
from playwright.sync_api import expect

pytestmark = needs_chromium

HOSTILE = "<img src=x onerror=\"document.title='broken'\"><script>document.title='broken'</script>"
NOTES = {
    "mill.md": "# Wheel\n\nThe wheel of the Halden mill has 32 oak paddles.\n",
    "miller.md": "# Miller\n\nThe miller of Halden is Sunniva Aas.\n",
    "hostile.md": f"# Evil {HOSTILE}\n\nThe hostile fox says {HOSTILE} at noon.\n",
}
WHEEL = "How many paddles has the wheel?"
on_a_phone_too = pytest.mark.parametrize("width", [1280, 360])


@pytest.fixture(scope="module")
def fake():
    with FakeLLM() as server:
        yield server


@pytest.fixture(scope="module")
def url(fake, tmp_path_factory):
    """The address of a server with three documents."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "notes").mkdir()
    for name, text in NOTES.items():
        (folder / "notes" / name).write_text(text)
    arguments = ("--docs", "notes", "--port", "0")
    env = fake.environment() | {"OMP_NUM_THREADS": "1"}
    with served("rag_hybrid_fastapi.py", *arguments, cwd=folder, env=env) as url:
        yield url


@pytest.fixture
def width():
    return 1280


@pytest.fixture
def page(browser, url, fake, width):
    """The page, ready. Fails where it complains, asks another host, or is wider than its window."""
    fake.recover()
    fake.token_delay = 0.0
    context = browser.new_context(viewport={"width": width, "height": 800})
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = context.new_page()
    complaints, asked = [], []
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


def start(page, question):
    """Ask: the article of the answer, which is being written."""
    turns = page.locator(".turn")
    turn = turns.nth(turns.count())
    page.fill("#query", question)
    page.press("#query", "Enter")
    expect(turn.locator(".question")).to_have_text(question)
    return turn


def ask(page, question):
    """Ask, and wait for the end of the answer: its article."""
    turn = start(page, question)
    expect(turn).to_have_attribute("aria-busy", "false", timeout=20_000)
    return turn


@on_a_phone_too
def test_an_example_question_is_asked_and_comes_back_with_a_new_chat(page, fake):
    fake.fail(reply="Her name is Sunniva Aas [1].")
    examples = page.locator("#examples button")
    expect(examples).to_have_count(3)
    expect(examples.filter(has_text=HOSTILE)).to_have_count(1)
    examples.filter(has_text="Miller").click()
    expect(page.locator(".question")).to_have_text('What is said about "Miller"?')
    expect(page.locator(".text")).to_have_text("Her name is Sunniva Aas [1].", timeout=20_000)
    expect(examples.first).to_be_hidden()
    page.click("#new-chat")
    expect(examples.first).to_be_visible()


def test_an_answer_is_copied_with_the_sources_that_it_cites(page, fake):
    fake.fail(reply="The wheel has **32** oak paddles [1].")
    turn = ask(page, WHEEL)
    turn.get_by_role("button", name="Copy").click()
    expect(turn.get_by_role("status")).to_have_text("Copied")
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied == "The wheel has **32** oak paddles [1].\n\n[1] notes/mill.md"


def test_a_question_is_asked_again_with_the_history_before_it(page):
    ask(page, WHEEL)
    ask(page, "Who is the miller?")
    histories = []
    page.on("request", lambda request: histories.append(request.post_data_json["history"]))
    for n in range(2):
        page.locator(".turn .again").nth(n).click()
        expect(page.locator(".turn[aria-busy=false]")).to_have_count(3 + n, timeout=20_000)
    said = "The wheel of the Halden mill has 32 oak paddles."
    first = [{"role": "user", "content": WHEEL}, {"role": "assistant", "content": said}]
    assert histories == [[], first]


@on_a_phone_too
def test_an_answer_streams_and_its_citation_opens_the_passage(page, fake):
    fake.token_delay = 0.15
    fake.fail(reply="The wheel has **32** oak paddles [1], and so on [9].")
    text = start(page, WHEEL).locator(".text")
    lengths = set()
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


@on_a_phone_too
def test_the_drawer_shows_how_the_passages_were_found(page):
    turn = ask(page, "Who is the miller of Halden?")
    turn.locator(".found").click()
    drawer = page.locator("#drawer")
    for word in ("dense", "bm25", "fused", "cosine", "Seconds", "written"):
        expect(drawer).to_contain_text(word)
    expect(drawer.locator("tbody tr").first).to_contain_text("Sunniva Aas")


def test_a_refusal_looks_like_one_and_a_greeting_is_not_looked_up(page):
    expect(ask(page, "Zebra quagga okapi?")).to_have_class(re.compile("refused"))
    ask(page, "Hello!").locator(".found").click()
    expect(page.locator("#drawer")).to_contain_text("Nothing was looked up")


@on_a_phone_too
def test_a_dropped_file_is_added_asked_and_removed(page, width):
    name = f"ferry{width}.txt"
    drop = """name => {
        const data = new DataTransfer();
        data.items.add(new File([`The ferry ${name} leaves Tornby at 9:40.`], name));
        const event = new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true});
        window.dispatchEvent(event);
    }"""
    page.evaluate(drop, name)
    expect(page.locator("#doc-status")).to_contain_text(f"Added {name}: 1 ", timeout=20_000)
    page.click("#docs-close")
    expect(ask(page, "When does the ferry leave Tornby?").locator(".text")).to_contain_text("9:40")
    page.click("#open-docs")
    remove = page.get_by_role("button", name=f"Remove {name}")
    remove.click()  # and say no, as Playwright does to dialogs
    page.once("dialog", lambda dialog: dialog.accept())
    remove.click()
    expect(page.locator("#doc-status")).to_have_text(f"Removed {name}.", timeout=20_000)
    expect(remove).to_have_count(0)


def test_a_file_that_cannot_be_read_is_named(page, tmp_path):
    (tmp_path / "broken.pdf").write_bytes(b"%PDF-1.7 nothing")
    page.click("#open-docs")
    page.set_input_files("#file", tmp_path / "broken.pdf")
    expect(page.locator("#doc-status .error")).to_contain_text("can't be read", timeout=20_000)


def test_hostile_documents_and_answers_are_text(page, fake):
    link = "[click](javascript:document.title='broken')"
    fake.fail(reply=f"The fox says {HOSTILE} {link} ![x](http://127.0.0.1:9/x.png) [1]")
    turn = ask(page, "What does the hostile fox say at noon?")
    expect(turn.locator(".text")).to_contain_text("<img src=x")
    assert turn.locator(".text img, .text script, .text [href^=javascript]").count() == 0
    turn.locator(".chip").first.click()
    expect(page.locator("#drawer .passage")).to_contain_text("<script>")
    assert page.locator("#drawer img, #drawer script").count() == 0
    page.click("#drawer-close")
    page.locator(".turn .found").click()
    expect(page.locator("#drawer")).to_contain_text("<img src=x")


def test_stop_keeps_what_came(page, fake):
    fake.token_delay = 0.2
    fake.fail(reply="The wheel turns. " * 50)
    turn = start(page, WHEEL)
    expect(turn.locator(".text")).to_contain_text("The wheel", timeout=20_000)
    page.click("#send")
    expect(turn).to_have_attribute("aria-busy", "false")
    expect(turn.locator(".state")).to_have_text("Stopped.")
    expect(turn.locator(".text")).to_contain_text("The wheel")


def test_an_llm_that_fails_is_told_and_the_next_question_works(page, fake):
    fake.fail(status=400)
    expect(ask(page, WHEEL).locator(".error")).to_contain_text("it failed (BadRequestError)")
    fake.recover()
    expect(ask(page, WHEEL).locator(".text")).to_contain_text("32")


def test_events_are_read_wherever_the_network_cuts_them(page):
    sent = ': ping\n\nevent: token\ndata: {"text": "é"}\n\nevent: done\ndata: {}\n\n'
    read = """async (bytes) => {
        const body = new ReadableStream({ start(stream) {
            for (const byte of bytes) stream.enqueue(new Uint8Array([byte]));
            stream.close();
        } });
        const events = [];
        for await (const event of serverEvents({ body })) events.push(event);
        return events;
    }"""
    assert page.evaluate(read, list(sent.encode())) == [["token", {"text": "é"}], ["done", {}]]


def test_it_can_be_used_by_keyboard(page, fake):
    ask(page, "Who is the miller of Halden?")
    page.locator(".turn .cite").first.focus()
    page.keyboard.press("Enter")
    expect(page.locator("#drawer-close")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.locator(".turn .cite").first).to_be_focused()
    expect(page.get_by_role("log", name="Conversation")).to_be_visible()
    page.click("#new-chat")  # else the first request would be to rewrite the question
    fake.token_delay = 0.4
    fake.fail(reply="Sunniva Aas [1] is the miller.")
    turn = start(page, WHEEL)
    turn.locator(".cite").click()  # which the next words make anew, so that it can't be focused
    expect(turn).to_have_attribute("aria-busy", "false", timeout=20_000)
    page.keyboard.press("Escape")
    expect(page.locator("#query")).to_be_focused()


@pytest.mark.parametrize("motion", ["no-preference", "reduce"])
def test_axe_finds_nothing_in_either_look_not_even_while_an_answer_is_written(page, fake, motion):
    page.emulate_media(reduced_motion=motion)
    fake.token_delay = 0.2
    fake.fail(reply="The miller is Sunniva Aas [1]. " * 20)
    background = "getComputedStyle(document.body).backgroundColor"
    before = page.evaluate(background)
    expect(start(page, WHEEL).locator(".state")).to_have_text("Writing ...", timeout=20_000)
    halfway = """document.getAnimations().map((animation) => {
        animation.pause();
        animation.currentTime = animation.effect.getTiming().duration - 1;
    }).length"""
    assert page.evaluate(halfway) == (motion == "no-preference")
    for _ in range(2):
        found = Axe().run(page)
        assert found.violations_count == 0, found.generate_report()
        page.click("#look")
    expect(page.locator(".state")).to_have_text("Writing ...")
    page.click("#send")
    expect(page.locator(".state")).to_have_text("Stopped.")
    assert Axe().run(page).violations_count == 0
    page.click("#look")
    assert page.evaluate(background) != before
    page.reload()
    assert page.evaluate(background) != before, "the choice is kept"
