"""The page of rag_explainer.py in a real Chromium, with mouse and keys: served and exported."""

# ruff: noqa: D103 - the names of the tests are their docstrings

from __future__ import annotations

import base64
import gzip
import json
import re
import time
from urllib.request import urlopen

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from conftest import needs_chromium, served
from playwright.sync_api import expect

import rag_explainer as rag

pytestmark = needs_chromium

TITLE = "Retrieval-augmented generation, explained"
HOSTILE = (
    "<script>document.title='x'</script><img src=x onerror=\"document.title='x'\"> \u202e\"evil'"
)
SLOW = 60_000  # ms: a model writes at a token in 0.1 s, on a machine that does other things too


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """The address of a server with the built-in domains and hostile documents."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "notes.txt").write_text(f"The fox says {HOSTILE}.\n\nThe owl says nothing.")
    arguments = ("--no-browser", "--docs", "notes.txt", HOSTILE)
    with served("rag_explainer.py", *arguments, cwd=folder) as url:
        yield url


@pytest.fixture(scope="module")
def data(url):
    with urlopen(url) as response:
        [packed] = re.findall(rb'<script id="data"[^>]*>([^<]+)</script>', response.read())
    return json.loads(gzip.decompress(base64.b64decode(packed)))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The address of an export, real but small: a hostile domain, and two questions on cooking."""
    topic = rag.TOPICS[1]
    own = rag.Topic(f"notes {HOSTILE}", [f"The fox says {HOSTILE}"], [rag.Question(HOSTILE)])
    plain = rag.Question("How long does Dorrel bread rise?", "19 hours")
    sentences = [*topic.sentences[:3], *topic.sentences[5:7]]
    short = rag.Topic(topic.name, sentences, [plain, topic.questions[1]])
    path = tmp_path_factory.mktemp("exported") / "explainer.html"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rag, "TOPICS", [own, short])
        # It would take minutes to answer all that an export answers, to the end.
        patch.setattr(rag, "choose_by_sliders", lambda question, domain: [])
        patch.setattr(rag, "MAX_ANSWER", 14)
        assert rag.main(["--export", str(path)]) == 0
    return path.as_uri()


class Visit:
    """A page that was opened. It fails, when it ends, where the page complained or asked others."""

    def __init__(self, browser, url, **options):
        options = {"viewport": {"width": 1280, "height": 800}} | options
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.url = url.partition("#")[0]
        self.complaints, self.asked = [], []
        self.page.on("console", self.hear)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(url)
        expect(self.page.locator("#points .dot").first).to_be_attached()

    def hear(self, message):
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def end(self):
        page = self.page
        assert page.title() == TITLE, "a hostile text ran"
        assert page.locator("main img, main script").count() == 0
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        self.context.close()
        assert [url for url in self.asked if not url.startswith((self.url, "data:"))] == []
        assert self.complaints == []


@pytest.fixture
def page(browser, url):
    """The served page, on its domain of cooking, at a section that has the model write nothing."""
    visit = Visit(browser, f"{url}#s10")
    visit.page.select_option("#domain", label="cooking")
    yield visit.page
    visit.end()


def order(page):
    """The table's sentences from the nearest on, by their numbers from 0."""
    rows = page.locator("#distances tbody tr")
    return [int(n) for n in rows.evaluate_all("rows => rows.map(row => row.dataset.n)")]


def chosen(page):
    """The sentences in the prompt, by their numbers from 0."""
    boxes = page.locator("#prompt input:checked")
    return [int(n) for n in boxes.evaluate_all("boxes => boxes.map(box => box.value)")]


def slide(locator, key, times=1):
    locator.focus()
    for _ in range(times):
        locator.press(key)


def show(page, section):
    page.evaluate("n => document.getElementById(`s${n}`).scrollIntoView()", section)
    return page.locator(f"#s{section}")


def drag(page, right, down):
    """Drag the question's point by a part of the picture's width, with the mouse."""
    page.locator("#handle").scroll_into_view_if_needed()
    box = page.locator("#handle path").bounding_box()
    picture = page.locator("#map").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + right * picture["width"], y + down * picture["width"], steps=20)
    page.mouse.up()


# --- retrieval -----------------------------------------------------------------------------------


def test_dragging_the_point_ranks_the_sentences_as_numpy_does(page, data):
    domain = data["domains"][1]
    question = domain["questions"][0]
    assert order(page) == rag.retrieve(np.array(question["similarities"]), 8)
    drag(page, 0.32, -0.12)
    expect(page.locator("#handle text")).to_have_text("what if?")
    # How far the mouse moved it, in the plane's own lengths: read off two sentences' dots.
    dots = page.locator("#map .dot").evaluate_all(
        "dots => dots.map(dot => [dot.cx.baseVal.value, dot.cy.baseVal.value])"
    )
    points = np.array(domain["points"])
    unit = (dots[4][0] - dots[6][0]) / (points[4, 0] - points[6, 0])
    place = page.locator("#handle").evaluate(
        "g => [g.transform.baseVal[0].matrix.e, g.transform.baseVal[0].matrix.f]"
    )
    at = points[6] + (np.array(place) - dots[6]) * (1, -1) / unit
    assert np.allclose(at - question["point"], np.array([0.32, 0.12]) * 640 / unit, atol=0.02)
    squares = ((points - at) ** 2).sum(1) + question["residuals"]
    assert order(page) == np.argsort(squares).tolist()
    assert order(page) != rag.retrieve(np.array(question["similarities"]), 8)
    shown = page.locator("#distances tbody td:nth-child(3)").all_inner_texts()
    assert np.allclose([float(text) for text in shown], np.sqrt(np.sort(squares)), atol=0.006)
    assert chosen(page) == order(page)[:2]
    page.click("#back")
    assert order(page) == rag.retrieve(np.array(question["similarities"]), 8)


def test_arrow_keys_move_the_point_and_escape_takes_it_back(page):
    before = order(page)
    handle = page.locator("#handle")
    slide(handle, "ArrowRight", 20)
    assert order(page) != before
    assert re.search(r"moved; nearest are sentences \d", handle.get_attribute("aria-valuetext"))
    handle.press("Escape")
    assert order(page) == before
    expect(page.locator("#handle text")).to_have_text("question")


def test_k_goes_from_one_to_all(page, data):
    near = rag.retrieve(np.array(data["domains"][1]["questions"][0]["similarities"]), 8)
    assert chosen(page) == near[:2]
    slide(page.locator("#k"), "ArrowRight", 3)
    assert chosen(page) == near[:5]
    assert page.locator("#distances .found").count() == 5
    slide(page.locator("#k"), "End")
    assert chosen(page) == near
    slide(page.locator("#k"), "Home")
    assert chosen(page) == near[:1]
    expect(page.locator("#k-value")).to_have_text("1 of 8")


def test_mmr_takes_what_numpy_takes(page, data):
    domain = data["domains"][1]
    page.click("#show-redundant")
    question = domain["questions"][1]
    assert page.locator("#question option:checked").inner_text() == question["text"]
    page.check("#mmr")
    similarities, cosines = np.array(question["similarities"]), np.array(domain["cosines"])
    slide(page.locator("#k"), "ArrowRight", 2)
    slide(page.locator("#lambda"), "End")
    seen = set()
    for step in range(20, -1, -4):
        expect(page.locator("#lambda-value")).to_have_text(f"{step / 20:.2f}")
        assert chosen(page) == rag.mmr(similarities, cosines, 4, step / 20)
        seen.add(tuple(chosen(page)))
        slide(page.locator("#lambda"), "ArrowLeft", 4)
    assert len(seen) > 2


def test_another_domain_has_other_points_and_its_honesty(page, data):
    for name in ("history", "medicine"):
        show(page, 2).get_by_role("button", name=name).click()
        [domain] = [domain for domain in data["domains"] if domain["name"] == name]
        assert page.locator("#sentences li").all_inner_texts() == domain["sentences"]
        meters = page.locator("#honesty b").all_inner_texts()
        shares = [sum(domain["variance"]), domain["honesty"]]
        assert meters == [f"{share * 100:.0f}%" for share in shares]
        false = {
            frozenset((n, other))
            for n, near in enumerate(domain["seen"])
            for other in near
            if other not in domain["true"][n]
        }
        assert page.locator("#points .false").count() == len(false)
        expect(page.locator("#domain option:checked")).to_have_text(name)
        assert page.locator("#question option").count() == 5


def test_a_typed_question_gets_its_real_place(page, data):
    text = "What do people put into stew?"
    page.fill("#typed", text)
    page.press("#typed", "Enter")
    expect(page.locator("#question option:checked")).to_have_text(text, timeout=SLOW)
    embedder = rag.MiniLM()
    vectors = np.stack([embedder.embed(each) for each in data["domains"][1]["sentences"]])
    similarities = vectors @ embedder.embed(text)
    assert order(page) == rag.retrieve(similarities, 8)
    shown = page.locator("#distances tbody td:nth-child(4)").all_inner_texts()
    assert np.allclose([float(cell) for cell in shown], np.sort(similarities)[::-1], atol=0.006)


def words_of_point(page, map_id):
    return page.locator(f"#{map_id} .words").text_content()


@pytest.mark.parametrize("map_id", ["points", "map"])
def test_a_point_shows_its_first_words_to_the_pointer_and_to_the_keyboard(page, data, map_id):
    sentences = data["domains"][1]["sentences"]
    page.locator(f"#{map_id} [data-n='3'] .dot").hover()
    assert words_of_point(page, map_id) == "4. Tarvish stew was first cooked by Bena …"
    page.locator("h1").hover()
    assert words_of_point(page, map_id) == ""
    page.locator(f"#{map_id} [tabindex='0'][data-n]").focus()
    for n in range(7):
        point = page.locator(f"#{map_id} [data-n='{n}']")
        expect(point).to_be_focused()
        assert point.get_attribute("aria-label") == f"{n + 1}. {sentences[n]}"
        shown = words_of_point(page, map_id).removesuffix(" …")
        assert f"{n + 1}. {sentences[n]}".startswith(shown)
        assert len(shown) > 25
        page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    assert page.locator(":focus").get_attribute("data-n") == "6"
    label = page.locator(f"#{map_id} .words").bounding_box()
    picture = page.locator(f"#{map_id}").bounding_box()
    assert picture["x"] <= label["x"]
    assert label["x"] + label["width"] <= picture["x"] + picture["width"]


# --- generation ----------------------------------------------------------------------------------


def words(lane):
    return lane.locator("li:not(.later) .word").all_inner_texts()


def test_an_answer_plays_pauses_and_steps_and_a_sentence_changes_it(page):
    section = show(page, 6)
    bare, helped = section.locator(".lane").all()
    expect(bare.locator(".verdict")).to_have_text("✗ Wrong: it is “19 hours”.", timeout=SLOW)
    expect(helped.locator(".verdict")).to_have_text("✓ Right.", timeout=SLOW)
    whole = words(helped)
    assert "hours" in "".join(helped.locator(".copied .word").all_inner_texts())
    section.get_by_role("button", name="From the start").click()
    section.get_by_role("button", name="Pause").click()
    count = len(words(helped))
    assert count < len(whole)
    time.sleep(0.7)
    assert len(words(helped)) == count
    section.get_by_role("button", name="Step").click()
    assert words(helped) == whole[: count + 1]
    section.get_by_role("button", name="Play").click()
    expect(helped.locator(".verdict")).to_have_text("✓ Right.", timeout=SLOW)
    assert words(helped) == whole

    # The heat map: the copying heads look at the words, and the arrow keys read it.
    show(page, 7)
    expect(page.locator("#heat-sum")).to_contain_text("by the copying heads", timeout=SLOW)
    hits = page.locator("#heat-sum").inner_text()
    mean, copying = [int(n) for n in re.findall(r"for (\d+) by the", hits)]
    assert copying > mean
    before = page.locator("#heat-text").inner_text()
    slide(page.locator("#heat"), "ArrowDown")
    assert page.locator("#heat-text").inner_text() != before
    shades = "cells => cells.map(cell => cell.getAttribute('fill-opacity')).join()"
    copied = page.locator("#heat .cell").evaluate_all(shades)
    page.click("#heads-all")
    assert page.locator("#heat .cell").evaluate_all(shades) != copied

    # The sum: its terms add up, and temperature moves the trust.
    show(page, 8)
    rows = page.locator("#sum tbody tr")
    expect(rows).to_have_count(5, timeout=SLOW)

    def priors():
        return [float(row.locator("td").nth(1).inner_text()) for row in rows.all()[:2]]

    sharp = priors()
    assert sum(sharp) == pytest.approx(1, abs=0.002)
    slide(page.locator("#temperature"), "End")
    flat = priors()
    assert abs(flat[0] - flat[1]) < abs(sharp[0] - sharp[1])

    # Without the sentence that holds it, the fact is gone.
    show(page, 5)
    page.locator("#prompt label", has_text="19 hours").click()
    show(page, 6)
    expect(helped.locator(".verdict")).to_have_text("✗ Wrong: it is “19 hours”.", timeout=SLOW)
    assert words(helped) != whole


def test_an_empty_answer_is_said(page):
    prompt = {"prompt": "", "columns": [{"text": "a", "sentence": 0}]}
    attention = {"maps": [], "shape": [0, 0, 0], "shares": ""}
    answer = {"answer": "", "stopped": "end", "attention": attention}
    body = f"{json.dumps(prompt)}\n{json.dumps(answer)}\n"
    page.route("**/generate", lambda route: route.fulfill(body=body))
    page.reload()  # an answer may be on its way already
    show(page, 7)
    expect(page.locator("#heat-text")).to_have_text("It wrote nothing.", timeout=SLOW)
    show(page, 8)
    expect(page.locator("#odds")).to_have_text("It wrote nothing.")


# --- hostile text --------------------------------------------------------------------------------


def test_hostile_documents_and_questions_are_text(browser, url):
    visit = Visit(browser, url)
    page = visit.page
    expect(page.locator("#domain option:checked")).to_have_text("your documents")
    expect(page.locator("#sentences li").first).to_contain_text("<script>document.title")
    expect(page.locator("#question option:checked")).to_contain_text("<img src=x onerror")
    page.fill("#typed", f"Who? {HOSTILE}")
    page.press("#typed", "Enter")
    expect(page.locator("#question option:checked")).to_contain_text("Who? <script>", timeout=SLOW)
    expect(page.locator("#prompt")).to_contain_text("Who? <script>document.title")
    # Whatever turns the direction of text stands in an element of its own, so far as it is shown.
    loose = """text => [...document.querySelectorAll("main *")].filter(e =>
        e.localName !== "bdi" && !e.closest("option, svg") &&
        [...e.childNodes].some(n => n.nodeType === 3 && n.data.includes("\\u202e"))).length"""
    assert page.evaluate(loose) == 0
    visit.end()


def test_the_page_says_that_its_script_has_ended(browser, url):
    visit = Visit(browser, url)
    visit.context.set_offline(True)
    visit.page.fill("#typed", "Who?")
    visit.page.press("#typed", "Enter")
    expect(visit.page.locator("#typed-note")).to_contain_text("has ended: start it again")
    visit.complaints = [c for c in visit.complaints if "Failed to load resource" not in c]
    visit.end()


def test_the_python_behind_each_section_is_the_scripts_own(page, data):
    shown = page.locator("details[data-code]").all()
    assert len(shown) == 9
    for details in shown:
        names = (details.get_attribute("data-code") or "").split()
        code = "\n".join(data["code"][name] for name in names)
        assert details.locator("pre").text_content() == code
    assert page.locator("#model").text_content() == data["code"]["model"]


# --- the export, for everybody -------------------------------------------------------------------


@pytest.fixture
def offline(browser, exported):
    """Opens the export, at a width, without a network: its page."""
    visits = []

    def visit(width=1280, **options):
        size = {"width": width, "height": 800}
        options = {"offline": True, "reduced_motion": "reduce", "viewport": size} | options
        visits.append(Visit(browser, exported, **options))
        return visits[-1].page

    yield visit
    for visit in visits:
        visit.end()
        assert visit.asked == [exported]


@pytest.mark.parametrize("width", [360, 820, 1440])
def test_an_export_works_without_a_network_at_every_width(offline, width):
    page = offline(width)
    assert page.locator("#typed").is_disabled()
    expect(page.locator("#typed-note")).to_contain_text("An exported file has no model")
    section = show(page, 6)
    bare, helped = section.locator(".lane").all()
    expect(bare.locator(".verdict")).to_contain_text("✗ Wrong")
    expect(helped.locator(".verdict")).to_have_text("✓ Right.")
    show(page, 8)
    expect(page.locator("#sum tbody tr")).to_have_count(5)
    before = order(page)
    drag(page, 0.5, 0.0)
    assert order(page) != before
    show(page, 9)
    page.get_by_role("button", name="Make it fail").click()
    expect(page.locator(".outcome")).to_contain_text("✗ Wrong")
    page.get_by_role("button", name="Choose by MMR").click()
    expect(page.locator(".outcome")).to_contain_text("✓ Right.")
    slide(page.locator("#k"), "Home")
    slide(page.locator("#k"), "ArrowRight", 3)
    show(page, 6)
    verdict = section.locator(".verdict").last
    expect(verdict).to_contain_text("holds no answer for this choice")
    verdict.get_by_role("button").click()  # the nearest choice that it holds an answer for
    expect(verdict).not_to_contain_text("holds no answer")
    page.select_option("#domain", index=0)
    expect(page.locator("#sentences li")).to_contain_text("<script>document.title")


def test_the_tour_leads_through_eight_steps(offline):
    page = offline()
    page.click("#start-tour")
    for step in range(1, 9):
        expect(page.locator("#tour-place")).to_have_text(f"Step {step} of 8")
        expect(page.locator(f"#s{step}")).to_be_in_viewport()
        page.click("#tour-next")
    expect(page.locator("#tour")).to_be_hidden()


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 390)])
def test_axe_finds_nothing_in_either_look(offline, scheme, width):
    page = offline(width, color_scheme=scheme)
    for n in range(1, 11):
        show(page, n)
        page.wait_for_timeout(100)
    page.get_by_role("button", name="Make it fail").click()
    page.locator("#points [tabindex='0']").focus()
    assert words_of_point(page, "points")
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()


def test_what_the_keyboard_reaches_has_a_name_and_shows_that_it_is_reached(offline):
    page = offline()
    reached = set()
    while True:
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement === document.body"):  # it went round
            break
        name, has_ring, has_name = page.evaluate("""() => {
            const e = document.activeElement, style = getComputedStyle(e);
            const halo = e.querySelector?.(".halo");
            const ring = style.outlineStyle !== "none" || getComputedStyle(halo).stroke !== "none";
            const name = e.ariaLabel || e.labels?.[0]?.textContent || e.textContent
                || e.getAttribute("aria-label");
            return [e.id || e.textContent.slice(0, 30), Boolean(ring), Boolean(name?.trim())];
        }""")
        reached.add(name)
        assert (has_ring, has_name) == (True, True), name
    assert {"handle", "k", "lambda", "mmr", "heat", "heads", "temperature"} <= reached
