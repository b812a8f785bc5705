"""The API of rag_hybrid_fastapi.py: real servers, real retrieval, a fake LLM, hostile clients."""

# ruff: noqa: D103 - the names of the tests are their docstrings

import contextlib
import itertools
import json
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from urllib.parse import quote

import httpx2
import pytest
import schemathesis
from bs4 import BeautifulSoup
from conftest import ROOT, wait_for, write_pdf
from fake_llm import FakeLLM, extractive_reply
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import one_of
from nursery import Nursery
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

import rag_hybrid_fastapi as rag

# The servers are forked from a process with the imports made. They embed slowly, so that a signal
# falls in between.
SETUP = """
import sys, time
import anthropic, markdownify, openai, pypdf, sentence_transformers, torch, uvicorn
import rag_hybrid_fastapi as rag
torch.set_num_threads(1)  # threads do not survive a fork
def slow(texts, args, query=False):
    if "unembeddable" in texts[0]:
        raise ValueError("no such file: /tmp/secret")
    if not query:
        print("embedding", len(texts), file=sys.stderr, flush=True)
        time.sleep(0.05 * len(texts))
    return embed(texts, args, query)
embed, rag.embed, rag.EMBED_BATCH = rag.embed, slow, 4
"""
MILLER = {"query": "Who is the miller?"}
STREAM = MILLER | {"stream": True}
BODIES = (MILLER, STREAM)
ASKED = {"role": "user", "content": MILLER["query"]}
POOL = ThreadPoolExecutor(50)


def check_error(response):
    """No response is a crash, and no error tells of the inside."""
    assert response.status_code not in (500, 501, 504), response.request.url
    if response.status_code >= 400:
        text = response.read().decode()
        assert not re.search(f"Traceback|/tmp|{ROOT}|sk-fake|secret-key|127.0.0.1", text), text
        assert text in ("Invalid host header", "Service Unavailable") or json.loads(text)["detail"]


def browse(url):
    client = httpx2.Client(base_url=url, timeout=60, trust_env=False)
    client.event_hooks = {"response": [check_error]}
    return client


@pytest.fixture(scope="module")
def llm():
    with FakeLLM() as llm:
        yield llm
    assert llm.errors == []


@pytest.fixture(scope="module")
def start(llm, tmp_path_factory):
    nursery = Nursery(tmp_path_factory.mktemp("nursery"), SETUP)
    yield lambda *args, **env: nursery.start("--port", 0, *args, env=llm.environment() | env)
    nursery.close()


@pytest.fixture(scope="module")
def url(start, tmp_path_factory):
    """The address of a server with a file for each sample."""
    home = tmp_path_factory.mktemp("api")
    for n, text in enumerate(rag.SAMPLES):
        (home / f"{n}.md").write_text(text)
    return start("--index", home / "rag.db", "--docs", home).url()


@pytest.fixture
def http(url, llm):
    """A client of a server whose LLM has forgotten what the last test told it."""
    llm.reply, llm.delay, llm.token_delay = extractive_reply, 0.0, 0.0
    llm.recover()
    llm.requests.clear()
    with browse(url) as client:
        yield client


def ask(client, query, **options):
    return client.post("/chat", json={"query": query, **options}).raise_for_status().json()


def stream(client, **options):
    """Ask for a stream: the names and the data of its events."""
    text = client.post("/chat", json=STREAM | options).text
    data = [json.loads(data) for data in re.findall("^data: (.*)", text, re.M)]
    return re.findall("^event: (.*)", text, re.M), data


def ask_at_once(client, count):
    """Ask so many times at once, every second time for a stream: the futures of the responses."""
    return [POOL.submit(client.post, "/chat", json=BODIES[n % 2]) for n in range(count)]


def add(client, name, content):
    return client.post("/documents", files={"file": (name, content)})


def listed(client):
    return {document["source"]: document for document in client.get("/documents").json()}


def remove(client, source):
    return client.delete(f"/documents/{quote(source, safe='')}")


def test_a_question_is_answered_with_sources_and_what_each_stage_made_of_them(http):
    found = ask(http, "What does error E47 mean?", top_k=2)
    assert "inlet sieve is blocked" in found["answer"]
    assert found["usage"]["input_tokens"] > 100
    best = found["sources"][0]
    assert (best["n"], best["page"], best["heading"]) == (1, None, "Pump HX-220")
    assert best["text"] == rag.SAMPLES[1][best["start"] : best["end"]]
    assert (0.3 < best["score"] < 1, set(best["ranks"])) == (True, {"dense", "bm25", "fused"})
    assert found["candidates"][:2] == found["sources"]


def test_a_stream_brings_the_sources_then_each_token_and_then_the_whole(http, llm):
    llm.token_delay = 0.05
    with http.stream("POST", "/chat", json=STREAM) as response:
        assert ("event: token" in response.iter_lines(), llm._chats) == (True, 1)  # it still writes
    names, [first, *tokens, done] = stream(http)
    assert list(dict.fromkeys(names)) == ["sources", "token", "done"]
    assert "".join(token["text"] for token in tokens) == done["answer"]
    assert (first["answer"], first["sources"], done["html"]) == (None, done["sources"], None)
    assert ask(http, **MILLER) | {"seconds": 0} == done | {"seconds": 0}


def test_a_hostile_answer_comes_as_harmless_html_with_its_tables_and_lists(http, llm):
    llm.reply = """
<script>fetch('/documents')</script><img src=x onerror=alert(1)> <style>*{display:none}</style>
![track](http://evil.example/x.png) [click](javascript:alert(1)) [good](https://example.org)

| <b onmouseover=alert(1)>1</b> |
|---|

1. <a href="jav&#x09;ascript:alert(1)" style="position:fixed">x</a> <svg/onload=alert(1)>
"""
    html = stream(http, html=True)[1][-1]["html"]
    tags = BeautifulSoup(html, "html.parser").find_all(True)
    assert {tag.name for tag in tags} == {"p", "a", "ol", "li", "table", "thead", "tr", "th"}
    assert {name for tag in tags for name in tag.attrs} == {"href", "rel"}
    # The image is a link, and loads nothing by itself.
    links = {tag["href"] for tag in tags if tag.get("href")}
    assert links <= {"https://example.org", "http://evil.example/x.png"}
    assert ("noopener" in html, "&lt;script" in html) == (True, True)  # shown, as text


def test_a_greeting_and_a_search_without_an_answer_ask_no_llm(http, llm):
    found = ask(http, "Thanks a lot")
    assert (found["answer"][:6], found["sources"], found["queries"]) == ("Hello.", [], [])
    found = ask(http, **MILLER, generate=False, history=[ASKED], html=True)
    assert (found["answer"], found["usage"], found["html"]) == (None, None, "")
    assert "Sunniva" in found["sources"][0]["text"]
    assert (stream(http, generate=False)[0], llm.requests) == (["sources", "done"], [])


@pytest.mark.parametrize(
    ("name", "query", "said", "page"),
    [
        ("trains.html", "How many sleeping cars has the night train?", "7 sleeping cars", None),
        ("comet.pdf", "Which colour had the comet's tail?", "copper", 2),
        ("orchard.docx", "How many baskets of Mirabelle are there?", "330 baskets", None),
    ],
)
def test_a_document_answers_while_it_is_there(http, samples, name, query, said, page):
    count = page or 1
    for added in (count, 0):
        response = add(http, name, (samples / name).read_bytes())
        assert response.json() == {"source": name, "added": added, "removed": 0}
    kept = {"source": name, "chunks": count, "pages": page, "uploaded": True}
    assert listed(http)[name] == kept
    found = ask(http, query)
    assert said in found["answer"]
    assert (found["sources"][0]["source"], found["sources"][0]["page"]) == (name, page)
    assert remove(http, name).json() == {"source": name, "added": 0, "removed": count}
    assert said not in json.dumps([listed(http), ask(http, query)])
    assert remove(http, name).status_code == 404


UPLOAD = b'--x\r\nContent-Disposition: form-data; name="file"; filename="%b"\r\n\r\nText.\r\n--x--'
MULTIPART = {"Content-Type": "multipart/form-data; boundary=x"}
HOSTILE_NAMES = {  # and what is kept of them
    "../..\\\\etc/x": "x",
    "\x00/\u2028x\x1b[2J\u202e.txt": "x[2J.txt",
    "..%2f?#<img src=x>' OR 1=1.txt": "..%2f?#<img src=x>' OR 1=1.txt",
    "\ud800" + "n" * 296 + ".txt": "n" * 196 + ".txt",
    **dict.fromkeys(["..", "a/.", "x\r\n.txt", "\x00"]),  # nothing: they are refused
}


@pytest.mark.parametrize(("name", "kept"), HOSTILE_NAMES.items(), ids=ascii)
def test_a_hostile_name_is_never_a_path_and_can_be_listed_and_removed(http, tmp_path, name, kept):
    before, files = listed(http), {*tmp_path.parent.rglob("*x*")}
    content = UPLOAD % name.encode(errors="surrogatepass")
    response = http.post("/documents", content=content, headers=MULTIPART)
    if kept:
        assert listed(http).keys() - before == {kept} == {response.json()["source"]}
        assert remove(http, kept).status_code == 200
    assert response.is_client_error == (not kept)
    assert listed(http) == before
    assert {*tmp_path.parent.rglob("*x*")} == files


def test_a_file_that_cannot_be_read_is_refused_with_the_reason(http, tmp_path):
    before = listed(http)
    for name, content, reason in (
        ("x.exe", b"MZ\x00", "no text"),
        ("x.pdf", b"%PDF-1.7 broken", "can't be read"),
        ("x.docx", b"PK", "can't be read"),
        ("x.html", b"<div>" * 50_000, "can't be read"),
        ("x.pdf", write_pdf(tmp_path / "scan.pdf", "").read_bytes(), "OCR"),
    ):
        response = add(http, name, content)
        assert (response.status_code, reason in response.text) == (415, True), response.text
    assert listed(http) == before


def test_what_is_too_long_is_refused_whether_it_says_so_or_not(http):
    for path, most in (("/documents", rag.MAX_UPLOAD), ("/chat", rag.MAX_BODY)):
        for content in (b"x" * (most + 1), iter([b"x" * (most + 1)])):
            response = http.post(path, content=content)
            assert response.status_code == 413, response.text
            assert f"{most:,} bytes" in response.json()["detail"]


def test_a_broken_body_is_the_clients_fault_and_an_odd_question_is_answered(http):
    deep = b"[" * 100_000 + b"]" * 100_000
    broken = [b"", b'{"query": "x', b'{"query": " "}', b'{"query": %b}' % deep]
    broken += [b'{"query": "x", "history": [{"role": "user", "content": "\\n"}]}']
    kinds = ("application/json", MULTIPART["Content-Type"], "x/y")
    for content, kind, path in itertools.product(broken, kinds, ("/chat", "/documents")):
        response = http.post(path, content=content, headers={"Content-Type": kind})
        assert response.status_code in (400, 422), (content[:99], response.text)
    for query in ("\x00\x01", "'; DROP TABLE x", '"*" NEAR(', "[" * 3_600, "hi" + " a" * 1_900):
        ask(http, query, html=True)
    history = [{"role": role, "content": "rye " * 1_500} for role in ("user", "assistant") * 20]
    assert ask(http, "pump " * 799, history=history, top_k=20)["answer"]


ROUTES = [("POST", "/chat"), ("OPTIONS", "/chat"), ("DELETE", "/documents/none")]
ROUTES += [("GET", "/documents"), ("POST", "/documents")]


def test_with_a_key_only_its_owner_is_served_and_can_remove_all_documents(start, notes, http):
    server = start("--host", "0.0.0.0", "--docs", notes, RAG_API_KEY="secret-key-\u00e9")
    right = "Bearer secret-key-\u00e9".encode()
    wrong = (b"", b"Bearer", b"Bearer x", b"Basic eDp5", right + b"x", right[:-1], b"\xff")
    client = browse(server.url().replace("0.0.0.0", "127.0.0.1"))
    for header, (method, path) in itertools.product(wrong, ROUTES):
        response = client.request(method, path, headers={"Authorization": header})
        assert response.status_code == 401, (header, path, response.text)
    assert [client.get(path).status_code for path in ("/", "/healthz", "/readyz")] == [200] * 3
    client.headers["Authorization"] = right.decode()
    # Behind a proxy it has another name; a page elsewhere still may not use it.
    for name, site, code in (("Host", "rag.example", 200), ("Origin", "http://evil", 403)):
        assert client.get("/documents", headers={name: site}).status_code == code
    assert set(listed(client)) == {str(path) for path in notes.iterdir()}
    assert [remove(client, source).status_code for source in listed(client)] == [200] * 3
    assert ask(client, **MILLER)["refused"]  # of nothing, nothing is known
    assert "secret-key" not in server.log


SITES = [
    *((400, h, f"http://{h}") for h in ("evil.example", "127.0.0.1.evil.example", "[", "")),
    *((403, "127.0.0.1", o) for o in ("https://evil.example", "null", "http://127.0.0.1:1")),
    *((None, h, f"http://{h}") for h in ("127.0.0.1:80", "LOCALHOST")),
]


@pytest.mark.parametrize(("code", "host", "origin"), SITES)
def test_another_site_is_told_nothing_and_can_change_nothing(http, code, host, origin):
    for method, path in ROUTES:
        response = http.request(method, path, headers={"Host": host, "Origin": origin})
        refused = response.status_code if response.status_code in (400, 403) else None
        assert refused == code, (path, response.text)
        assert "access-control-" not in str(response.headers)


def test_the_page_runs_only_its_own_script_and_the_documentation_loads_nothing_else(http):
    first, second, docs = [http.get(path) for path in ("/", "/", "/docs")]
    policy = first.headers["Content-Security-Policy"]
    assert (policy[:18], "unsafe" in policy) == ("default-src 'none'", False)
    [nonce] = set(re.findall(r"'nonce-([\w-]+)'", policy))
    assert (f'<script nonce="{nonce}">' in first.text, nonce in second.text) == (True, False)
    assert not re.search(r"(?:https?:)?//(?!127\.0\.0\.1)[\w.-]+\.\w+", docs.text)
    for path in ("/openapi.json", *re.findall(r'(?:src|href)="([^"]+)"', docs.text)):
        assert http.get(path).status_code == 200


def test_fifty_clients_of_a_slow_llm_are_all_answered_and_healthz_answers_meanwhile(http, llm):
    llm.delay, seconds = 0.4, []
    asking = ask_at_once(http, 50)
    while not all(asked.done() for asked in asking):
        response = http.get("/healthz")
        assert response.json() == {"status": "ok"}
        seconds.append(response.elapsed.total_seconds())
        time.sleep(0.02)
    texts = [asked.result().text for asked in asking]
    assert all("Sunniva" in text for text in texts)
    assert sum("event: done" in text for text in texts) == 25
    assert sum(seconds) / len(seconds) < 0.05


def connect(url, body=None):
    """A client that need not stay, with a question sent; without one it is told so, and waits."""
    client = HTTPConnection(url.removeprefix("http://"))
    client.request("POST", "/chat", json.dumps(body), {"Content-Type": "application/json"})
    return contextlib.closing(client)


def test_too_many_clients_are_told_so_and_those_that_leave_end_their_answers(http, url, llm):
    llm.reply, llm.token_delay = "word " * 200, 0.3
    with contextlib.ExitStack() as clients:
        for n in range(rag.MAX_CLIENTS):
            clients.enter_context(connect(url, BODIES[n % 2] if n < 20 else None))
        wait_for(lambda: llm._chats == 20 and http.get("/healthz").status_code == 503)
        time.sleep(0.5)
        assert {chat.finished for chat in llm.chat_requests} == {None}
    wait_for(lambda: llm._chats == 0, 12)  # of 60 seconds
    assert http.get("/healthz").status_code == 200
    llm.reply, llm.token_delay = extractive_reply, 0
    for n in range(20):  # these leave at every stage of an answer
        with connect(url, BODIES[n % 2]):
            time.sleep(n % 5 * 0.005)
    assert all("Sunniva" in asked.result().text for asked in ask_at_once(http, 10))


FAULTS = [{"drop": True}, {"body": "<html>a web page</html>"}, {"cut_after": 3}, {"error_after": 3}]
FAULTS += [{"reply": " \n"}, {"null_content": True}, {"status": 401}]


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_an_llm_that_is_down_or_fails_is_an_error_after_the_sources(http, llm, fault):
    llm.fail(times=None, **fault)
    response = http.post("/chat", json=MILLER)
    assert (response.status_code, "it failed (" in response.text) == (502, True)
    names, data = stream(http)
    assert (names[0], names[-1], "done" in names) == ("sources", "error", False)
    assert ("Sunniva" in str(data[0]["sources"]), data[-1]) == (True, response.json())


def test_a_failure_inside_is_told_to_the_log_only(url):
    client = httpx2.Client(base_url=url, trust_env=False, headers={"Connection": "close"})
    added = add(client, "x.txt", "unembeddable")
    asked = client.post("/chat", json={"query": "unembeddable"})
    assert (added.status_code, asked.status_code) == (500, 502)
    said = {"detail": "it failed (ValueError): the server's log says why"}
    assert added.json() == asked.json() == said


def test_sigterm_finishes_the_running_answers(start, llm, http):
    server = start()
    llm.reply, llm.token_delay = "word " * 15 + "end", 0.1
    asking = ask_at_once(browse(server.url()), 4)
    wait_for(lambda: llm._chats == 4)
    assert server.end(signal.SIGTERM) == -signal.SIGTERM
    assert all(f'"{llm.reply}"' in asked.result().text for asked in asking)


def test_ctrl_c_ends_a_start_and_the_next_goes_on_while_requests_wait(start, tmp_path, free_port):
    for n in range(80):
        (tmp_path / f"{n}.md").write_text(f"The part {n} is of brass.")
    args = ("--docs", tmp_path, "--index", tmp_path / "rag.db", "--port", free_port)
    for question in ([], ["Of what is part 7?"]):
        run = start(*args, *question)
        wait_for(lambda run=run: run.log.count("embedding") == 5)
        assert (run.end(signal.SIGINT), "index: " in run.log) == (130, False)
    server = start(*args)
    wait_for(lambda: "embedding" in server.log)
    assert len(listed(browse(f"http://127.0.0.1:{free_port}"))) == 80  # sent before it was ready
    assert server.log.count("embedding 4") <= 12


def test_a_kill_leaves_the_document_as_it_was(start, tmp_path):
    def upload(client, version):
        return add(client, "ledger.md", f"# Ledger\n\nledger {version}{' rye' * 200}\n\n" * 8)

    def served(client):
        found = ask(client, "ledger", top_k=20, generate=False)["candidates"]
        return {hit["text"][:20] for hit in found if {"dense", "bm25"} <= set(hit["ranks"])}

    server = start("--index", tmp_path / "rag.db")
    client = browse(server.url())
    upload(client, "old")
    before = served(client)
    sending = POOL.submit(upload, client, "new")
    wait_for(lambda: server.log.count("embedding") == 4)
    server.end(signal.SIGKILL)
    assert isinstance(sending.exception(), httpx2.TransportError)
    client = browse(start("--index", tmp_path / "rag.db").url())
    assert served(client) == before
    upload(client, "new")
    assert not served(client) & before


SCHEMA = schemathesis.openapi.from_dict(rag.app.openapi())


@settings(derandomize=True, deadline=None, suppress_health_check=HealthCheck, max_examples=150)
@given(case=one_of([SCHEMA.as_strategy(generation_mode=mode) for mode in GenerationMode]))
def test_whatever_its_schema_admits_or_forbids_is_answered_as_the_schema_says(case, http, url):
    # No schema says that a file must have text, or that pydantic also takes true for 1.
    unsaid = [positive_data_acceptance] if case.path == "/documents" else []
    case.call_and_validate(url, excluded_checks=[*unsaid, negative_data_rejection])
