"""The API of rag_hybrid_fastapi.py: real servers, real retrieval, a fake LLM, hostile clients."""

# ruff: noqa: D103 - the names of the tests are their docstrings

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import random
import re
import signal
import socket
import statistics
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import quote

import httpx2
import pytest
import schemathesis
from bs4 import BeautifulSoup
from conftest import ROOT, write_pdf
from fake_llm import FakeLLM, extractive_reply
from hypothesis import HealthCheck, given, seed, settings
from hypothesis.errors import Unsatisfiable
from nursery import Nursery, wait_for
from schemathesis import GenerationMode
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import positive_data_acceptance

import rag_hybrid_fastapi as rag

# The servers are forked from a process with the imports made. RAG_PAUSE makes the embedding of a
# passage slow, so that a signal can fall in between.
SETUP = """
import os, time
import bm25s, chromadb, fastapi_offline, markdown_it, nh3, openai, torch, uvicorn
import rag_hybrid_fastapi as rag
torch.set_num_threads(1)  # threads do not survive a fork
rag.load_embedder(rag.EMBED_MODEL, rag.native_precision())
embed, main = rag.embed, rag.main
def slow(texts, model, precision, query=False):
    time.sleep(0 if query else len(texts) * float(os.environ.get("RAG_PAUSE", 0)))
    return embed(texts, model, precision, query)
def run(args):
    rag.ANSWERS = int(os.environ.get("RAG_ANSWERS", rag.ANSWERS))
    rag.WAITING = int(os.environ.get("RAG_WAITING", rag.WAITING))
    return main(args)
rag.embed, rag.main = slow, run
"""

NAMES = ("50% off?.md", "sub/a b#c.md", "mill.md", "pump.md", "hours.md", "flour.md")
MILLER = {"query": "Who is the miller?"}


def harmless(response):
    """No response is a crash, and no error tells of the inside."""
    assert response.status_code not in (500, 501, 504), response.request.url
    if response.status_code >= 400:
        text = response.read().decode()
        leaks = ("Traceback", 'File "', str(ROOT), "/tmp", "sk-fake", "secret-key", "127.0.0.1")
        assert not [leak for leak in leaks if leak in text], text
        assert json.loads(text)["detail"]


def browse(url):
    """A client; what it does not verify is TLS, whose certificates take 40 ms to load."""
    hooks: Any = {"response": [harmless]}
    limits = httpx2.Limits(max_connections=None)
    options: Any = {"trust_env": False, "verify": False, "event_hooks": hooks, "limits": limits}
    return httpx2.Client(base_url=url, timeout=60, **options)


@pytest.fixture(scope="module")
def model():
    with FakeLLM() as fake:
        yield fake


@pytest.fixture
def llm(model):
    """The LLM of the servers, which has forgotten what the last test told it."""
    model.reply, model.delay, model.token_delay = extractive_reply, 0.0, 0.0
    model.recover()
    model.requests.clear()
    yield model
    assert model.errors == []


@pytest.fixture(scope="module")
def nursery(tmp_path_factory):
    nursery = Nursery(tmp_path_factory.mktemp("nursery"), SETUP)
    yield nursery
    nursery.close()


class Server:
    """A server of its own process."""

    def __init__(self, nursery, args, env):
        self.nursery, self.pid = nursery, nursery.start("--port", 0, *args, env=env)

    def url(self):
        """Its address, which it says once it is ready."""

        def ready():
            assert self.nursery.is_running(self.pid), self.nursery.errors(self.pid)
            return re.search(r"^ready: (\S+)", self.nursery.errors(self.pid), re.M)

        return wait_for(ready)[1]

    def kill(self, number):
        os.kill(self.pid, number)

    def end(self):
        """Wait for its end: the exit code."""
        code, err = self.nursery.wait(self.pid)
        assert "Traceback" not in err, err
        return code


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The folder of the index; beside it are notes, with names that a URL changes."""
    root = tmp_path_factory.mktemp("api")
    (root / "notes" / "sub").mkdir(parents=True)
    extra = ["A discount of half applies in June.", "The ferry Alma has two chimneys."]
    for name, text in zip(NAMES, [*extra, *rag.SAMPLES], strict=True):
        (root / "notes" / name).write_text(text)
    (root / "home").mkdir()
    return root / "home"


@pytest.fixture(scope="module")
def url(model, home, nursery):
    args = ("--index", home / "rag", "--docs", home.parent / "notes")
    server = Server(nursery, args, model.environment())
    yield server.url()
    server.kill(signal.SIGTERM)
    server.end()


@pytest.fixture
def http(url, llm):
    with browse(url) as client:
        yield client


@pytest.fixture
def start(nursery, llm):
    servers = []

    def start(*args, **env):
        servers.append(Server(nursery, args, llm.environment() | {"RAG_API_KEY": ""} | env))
        return servers[-1]

    yield start
    for server in servers:
        if nursery.is_running(server.pid):
            server.kill(signal.SIGKILL)
        server.end()


@pytest.fixture(scope="module")
def narrow(nursery, model):
    """The address of a server that answers one at a time, and lets two wait."""
    env = {"RAG_ANSWERS": "1", "RAG_WAITING": "2"}
    server = Server(nursery, (), model.environment() | env)
    yield server.url()
    server.kill(signal.SIGTERM)
    server.end()


def ask(client, query, **options):
    response = client.post("/chat", json={"query": query, **options})
    assert response.status_code == 200, response.text
    return response.json()


def ask_all(url, bodies):
    """Ask all at once."""
    with browse(url) as client, ThreadPoolExecutor(len(bodies)) as pool:
        return list(pool.map(lambda body: client.post("/chat", json=body), bodies))


def alternating(count):
    """As many questions, every second of which asks for a stream."""
    return [MILLER | {"stream": n % 2 == 0} for n in range(count)]


def events(text):
    """The events of a stream: their names and data."""
    blocks = [dict(line.split(": ", 1) for line in b.splitlines()) for b in text.split("\n\n") if b]
    return [(block["event"], json.loads(block["data"])) for block in blocks]


def add(client, name, content):
    return client.post("/documents", files={"file": (name, content)})


def listed(client):
    return {d["source"]: d for d in client.get("/documents").json()["documents"]}


def remove(client, source):
    return client.delete(f"/documents/{quote(source, safe='')}")


# --- questions ------------------------------------------------------------------------------------


def test_a_question_is_answered_with_sources_and_a_trace_of_each_stage(http):
    found = ask(http, "What does error E47 mean?")
    assert "inlet sieve is blocked" in found["answer"]
    assert not found["refused"]
    assert set(found) == {*("answer", "refused", "sources", "trace", "usage", "unknown_citations")}
    best = found["sources"][0]
    assert best["source"].endswith("notes/pump.md")
    assert (best["n"], best["page"], best["heading"]) == (1, None, "Pump HX-220")
    assert best["text"] == rag.SAMPLES[1][best["start"] : best["end"]]
    assert -1 <= best["score"] <= 1
    assert found["usage"]["input_tokens"] > 100
    trace = found["trace"]
    assert (trace["question"], trace["rewritten"]) == ("What does error E47 mean?", False)
    stages = {"embed", "dense", "bm25", "fuse", "rerank", "assemble", "first_token", "generate"}
    assert stages <= set(trace["seconds"])
    first = trace["candidates"][0]
    assert (first["n"], first["left_out"]) == (1, None)
    assert {"dense", "bm25", "fused", "final"} <= set(first["ranks"])
    assert {"cosine", "bm25"} <= set(first["scores"])
    assert [c["left_out"] for c in trace["candidates"] if not c["n"]] == ["beyond the best 4"] * 2


def test_a_stream_brings_the_sources_then_each_token_and_then_the_whole(http, llm):
    llm.token_delay = 0.05
    body = {"query": "How many paddles has the wheel of the mill?", "stream": True}
    came, text = {}, ""
    with http.stream("POST", "/chat", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        for part in response.iter_text():
            text += part
            for name in re.findall(r"event: (\w+)", part):
                came.setdefault(name, time.monotonic())
    names, data = zip(*events(text), strict=True)
    assert [name for name, _ in itertools.groupby(names)] == ["sources", "token", "done"]
    assert "".join(d["text"] for d in data[1:-1]) == data[-1]["answer"]
    assert "32 oak paddles" in data[-1]["answer"]
    assert came["done"] - came["token"] > 0.3  # they came as they were made
    llm.token_delay = 0
    plain = ask(http, body["query"])
    same = ("answer", "refused", "usage", "unknown_citations")
    assert {key: data[-1][key] for key in same} == {key: plain[key] for key in same}
    assert data[0]["sources"] == plain["sources"] != []


HOSTILE = """
<script>fetch('/documents')</script><img src=x onerror=alert(1)>
![track](http://evil.example/x.png) [click](javascript:alert(1)) [data](data:text/html,x)
[good](https://example.org) <iframe src="//evil"></iframe> <style>*{display:none}</style>

| a | b |
|---|---|
| <b onmouseover=alert(1)>1</b> | 2 |

1. one
2. two

<a href="jav&#x09;ascript:alert(1)" style="position:fixed">x</a> <svg/onload=alert(1)> `</code><u>`
"""
HARMLESS = {"p", "br", "a", "code", "ol", "ul", "li"}
HARMLESS |= {"table", "thead", "tbody", "tr", "th", "td"}


def test_a_hostile_answer_comes_as_harmless_html_with_its_tables_and_lists(http, llm):
    llm.reply, llm.token_delay = HOSTILE, 0.02
    body = MILLER | {"html": True, "stream": True}
    parts = [data.get("html") for _, data in events(http.post("/chat", json=body).text)]
    pieces = [part for part in parts if part]
    assert len(pieces) > 2
    for html in pieces:
        tags = BeautifulSoup(html, "html.parser").find_all(True)
        assert {tag.name for tag in tags} <= HARMLESS
        assert {name for tag in tags for name in tag.attrs} <= {"href", "target", "rel"}
        links = {tag["href"] for tag in tags if tag.get("href")}
        # The image is a link, and loads nothing by itself.
        assert links <= {"https://example.org", "http://evil.example/x.png"}
    last = BeautifulSoup(pieces[-1], "html.parser")
    assert [cell.text for cell in last.select("td")][1] == "2"
    assert [item.text for item in last.select("ol li")] == ["one", "two"]
    assert "noopener" in last.select("a[href]")[0]["rel"]
    assert "<script>" in last.text  # shown, as text


def test_a_follow_up_is_rewritten_for_the_search_and_answered_with_its_history(http, llm):
    history = [
        {"role": "user", "content": "Who is the miller?"},
        {"role": "assistant", "content": "Sunniva Aas [1]"},
    ]
    blank = {"role": "user", "content": " \n"}  # which Claude would refuse
    rewritten = "Who was the miller before Sunniva Aas?"
    llm.fail(containing=rag.REWRITE_PROMPT[:40], reply=rewritten)
    found = ask(http, "And before her?", history=[blank, *history])
    assert found["trace"]["rewritten"]
    assert found["trace"]["queries"] == [rewritten]
    assert "rewrite" in found["trace"]["seconds"]
    assert "Torbern" in found["answer"]
    rewriting, asking = [request.json["messages"] for request in llm.chat_requests]
    assert "Sunniva Aas" in rewriting[-1]["content"]
    assert rewriting[-1]["content"].endswith("And before her?")
    assert [m["role"] for m in asking] == ["system", "user", "assistant", "user"]
    assert asking[1:3] == history
    assert asking[3]["content"].endswith(f"Question: {rewritten}")


@pytest.mark.parametrize("query", ["Hello!", "thanks a lot", "Merci"])
def test_a_greeting_is_answered_and_not_searched_for(http, llm, query):
    llm.reply = "Hello! What would you like to know?"
    found = ask(http, query)
    assert (found["answer"], found["refused"]) == (llm.reply, False)
    assert found["sources"] == found["trace"]["candidates"] == []
    assert not found["trace"]["retrieved"]
    assert found["trace"]["tokens"]["context"] == 0  # as always: the page shows it


def test_passages_alone_ask_no_llm(http, llm):
    history = [{"role": "user", "content": "Hello"}]
    found = ask(http, "Who is the miller?", generate=False, history=history, html=True)
    assert found["answer"] is found["usage"] is None
    assert found["html"] == ""
    assert "Sunniva" in found["sources"][0]["text"]
    body = MILLER | {"generate": False, "stream": True}
    assert [name for name, _ in events(http.post("/chat", json=body).text)] == ["sources", "done"]
    assert llm.requests == []


# --- documents ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "query", "said", "page"),
    [
        ("beavers.txt", "How long is the dam at Aldermoor?", "41 m", None),
        ("bread.md", "How long does the sourdough of Tolsund rise?", "19 hours", None),
        ("trains.html", "How many sleeping cars has the night train?", "7 sleeping cars", None),
        ("comet.pdf", "Which colour had the comet's tail?", "copper", 2),
        ("orchard.docx", "How many plum trees has the orchard?", "212 plum trees", None),
    ],
)
def test_each_kind_of_document_answers_as_soon_as_it_is_added_and_no_longer_when_removed(
    http, samples, name, query, said, page
):
    added = add(http, name, (samples / name).read_bytes())
    assert added.status_code == 201, added.text
    counts = {"chunks": page or 1, "added": page or 1, "reused": 6, "removed": 0}
    assert added.json() == {"source": name} | counts
    document = {"source": name, "chunks": page or 1, "pages": page, "uploaded": True}
    assert listed(http)[name] == document
    found = ask(http, query)
    assert said in found["answer"]
    assert (found["sources"][0]["source"], found["sources"][0]["page"]) == (name, page)
    assert remove(http, name).json()["removed"] == (page or 1)
    assert name not in listed(http)
    assert said not in json.dumps(ask(http, query))
    assert remove(http, name).status_code == 404


def test_a_document_of_the_same_name_is_replaced_and_the_answer_changes_at_once(http):
    for colour, counts in (("green", (1, 0)), ("scarlet", (1, 1)), ("scarlet", (0, 0))):
        added = add(http, "boat.md", f"The boat Heron was painted {colour}.").json()
        assert (added["added"], added["removed"]) == counts
        assert f"painted {colour}" in ask(http, "Which colour has the boat Heron?")["answer"]
    remove(http, "boat.md")


UPLOAD = (
    b'--x\r\nContent-Disposition: form-data; name="file"; filename="%b"\r\n\r\n'
    b"The hostile text.\r\n--x--\r\n"
)
MULTIPART = {"Content-Type": "multipart/form-data; boundary=x"}
LONG_NAME = "n" * 296 + ".txt"
KEPT = {
    "../../etc/x.txt": "x.txt",
    "C:\\\\x.txt": "x.txt",
    "a\x00b/x.txt": "x.txt",
    "\x00x\x1b[2J.txt": "x[2J.txt",
    "\u2028x\u202etxt.txt": "xtxt.txt",
    "..%2f..%2fx.txt": "..%2f..%2fx.txt",
    "<img src=x onerror=alert(1)>.txt": "<img src=x onerror=alert(1)>.txt",
    "x' OR 1=1.txt": "x' OR 1=1.txt",
    LONG_NAME: LONG_NAME[-200:],
    "\ud800x.txt": "\xed x.txt",
}
REFUSED = ("..", "/etc/passwd", "x\r\n.txt", "", ".txt", "x.txt\x00.exe", "rag/chroma.sqlite3")


@pytest.mark.parametrize("name", [*KEPT, *REFUSED], ids=lambda name: ascii(name)[:40])
def test_a_hostile_file_name_is_never_a_path_and_can_be_listed_and_removed(http, home, name):
    before = listed(http)
    content = UPLOAD % name.encode(errors="surrogatepass")
    response = http.post("/documents", content=content, headers=MULTIPART)
    if name in KEPT:
        assert response.status_code == 201, response.text
        assert response.json()["source"] == KEPT[name]
        assert set(listed(http)) - set(before) == {KEPT[name]}
        assert remove(http, KEPT[name]).status_code == 200
    else:
        assert response.status_code in (400, 415, 422), response.text
    assert listed(http) == before
    assert {file.name for file in home.iterdir()} == {"rag"}
    assert not [file for file in home.parent.rglob("*") if file.name.endswith("x.txt")]


def test_documents_whose_names_change_in_a_url_can_be_removed(start, home):
    notes = home.parent / "notes"
    with browse(start("--docs", notes).url()) as client:
        documents = listed(client)
        assert set(documents) == {str(notes / name) for name in NAMES}
        for count, (source, document) in enumerate(documents.items(), 1):
            assert document["uploaded"] is False
            assert remove(client, source).status_code == 200
            assert len(listed(client)) == len(NAMES) - count
        assert ask(client, "Who is the miller?")["refused"]  # of nothing, nothing is known


def bomb(size):
    """A small .docx that unpacks to `size` bytes."""
    file = io.BytesIO()
    with (
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("word/document.xml", "w") as part,
    ):
        for _ in range(size // 1_000_000):
            part.write(b" " * 1_000_000)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "status"),
    [
        ("x.exe", b"MZ", 415),
        ("x", b"text", 415),
        ("x.pdf", b"%PDF-1.7 broken", 422),
        ("x.docx", b"PK\x03\x04 broken", 422),
        ("x.docx", bomb(300_000_000), 422),
        ("x.txt", b" \n\t ", 422),
        ("x.txt", b"a\x00b", 422),
        ("x.html", b"<div>" * 50_000, 422),
        ("x.txt", "\ufeff\u0130\u00df \U0001f600".encode(), 201),
        ("x.txt", b"caf\xe9 na\xefve", 201),
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_a_file_that_cannot_be_read_is_refused_and_nothing_is_changed(http, name, content, status):
    before = listed(http)
    response = add(http, name, content)
    assert response.status_code == status, response.text
    remove(http, name)
    assert listed(http) == before


def test_a_scan_is_refused_with_a_hint(http, tmp_path):
    response = add(http, "scan.pdf", write_pdf(tmp_path / "scan.pdf", "").read_bytes())
    assert response.status_code == 422
    assert "OCR" in response.json()["detail"]


@pytest.mark.parametrize("path", ["/documents", "/chat"])
@pytest.mark.parametrize("announced", [True, False])
def test_what_is_too_long_is_refused(http, path, announced):
    size = rag.MAX_UPLOAD if path == "/documents" else rag.MAX_BODY
    head = UPLOAD.split(b"The hostile text.")[0] % b"x.txt"
    parts = [head, *[b"x" * 100_000] * (size // 100_000 + 1)]
    content = b"".join(parts) if announced else iter(parts)
    response = http.post(path, content=content, headers=MULTIPART)
    assert response.status_code == 413, response.text
    assert f"{size:,} bytes" in response.json()["detail"]
    assert "x.txt" not in listed(http)


# --- limits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b'{"query": "x', b"\xff\xfe", b'{"query": "\xed\xa0\x80"}', b"\x00" * 100),
        *(b'{"query": "x", "top_k": NaN}', b'{"query": "x", "top_k": 1e999}'),
        b'{"query": "x", "top_k": ' + b"9" * 10_000 + b"}",
        b'{"query": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a":' * 60_000 + b"1" + b"}" * 60_000,
    ],
    ids=lambda content: ascii(content)[:40],
)
def test_a_broken_body_is_the_clients_fault(http, content):
    kinds = ("application/json", MULTIPART["Content-Type"], "x/y")
    for kind, path in itertools.product(kinds, ("/chat", "/documents")):
        response = http.post(path, content=content, headers={"Content-Type": kind})
        assert response.status_code in (400, 422), response.text


def test_odd_questions_and_the_longest_with_the_longest_history_are_answered(http):
    for query in (
        "\x00\x01",
        "\u202e",
        "'; DROP TABLE x",
        "[[[[" * 900,
        "hi" + " a" * 1_900 + "!x",
    ):
        ask(http, query, html=True)
    history = [{"role": role, "content": "rye " * 1_500} for role in ("user", "assistant") * 20]
    found = ask(http, "pump " * 799, history=history, top_k=20)
    assert "were left out" in found["trace"]["notes"][0]


# --- who may ask ----------------------------------------------------------------------------------

ROUTES = [
    ("POST", "/chat"),
    ("GET", "/documents"),
    ("POST", "/documents"),
    ("DELETE", "/documents/sample"),
]


def test_with_a_key_only_its_owner_is_served(start, nursery):
    server = start("--host", "0.0.0.0", RAG_API_KEY="secret-key-\u00e9")
    right = "Bearer secret-key-\u00e9".encode()
    wrong = (None, b"", b"Bearer", b"Bearer x", b"Basic eDp5", right + b"x", right[:-1], b"\xff")
    with browse(server.url().replace("0.0.0.0", "127.0.0.1")) as client:
        for header, (method, path) in itertools.product(wrong, ROUTES):
            headers: Any = {} if header is None else {"Authorization": header}
            response = client.request(method, path, headers=headers)
            assert response.status_code == 401, (header, path, response.text)
            assert response.headers["WWW-Authenticate"] == "Bearer"
        big = iter([b"x" * 100_000] * 250)  # is not read for a stranger
        assert client.post("/documents", content=big).status_code == 401
        for path in ("/", "/healthz", "/readyz"):
            assert client.get(path).status_code == 200
        client.headers["Authorization"] = right.decode()
        assert "Sunniva" in ask(client, "Who is the miller?")["answer"]
        assert add(client, "x.txt", "text").status_code == 201
        assert remove(client, "x.txt").status_code == 200
        # Behind a proxy it has another name; a page elsewhere still may not use it.
        assert client.get("/documents", headers={"Host": "rag.example"}).status_code == 200
        assert client.get("/documents", headers={"Origin": "http://evil"}).status_code == 403
    assert "secret-key" not in nursery.errors(server.pid)


@pytest.mark.parametrize(
    "headers",
    [
        *({"Origin": origin} for origin in ("https://evil.example", "null", "http://127.0.0.1:1")),
        *({"Host": host} for host in ("evil.example", "127.0.0.1.evil.example", "[", "", ":80")),
        *({"Host": host} for host in ("evil.example@127.0.0.1", "127.0.0.1@evil.example")),
        {"Host": "evil.example:80", "Origin": "http://evil.example:80"},
    ],
    ids=str,
)
def test_another_site_is_told_nothing_and_can_change_nothing(http, headers):
    for method, path in [*ROUTES, ("GET", "/readyz")]:
        response = http.request(method, path, headers=headers, json={"query": "x"})
        assert response.status_code == 403, (path, response.text)


def test_this_machines_own_names_and_the_pages_own_origin_are_let_in(http):
    port = http.base_url.port
    for host in (f"127.0.0.1:{port}", f"LOCALHOST:{port}", "[::1]:8000"):
        headers = {"Host": host, "Origin": f"http://{host}"}
        assert http.get("/documents", headers=headers).status_code == 200


def test_no_other_site_may_read_and_the_page_runs_only_its_own_script(http):
    headers = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    for method, path in [("OPTIONS", "/chat"), ("GET", "/documents"), ("GET", "/")]:
        response = http.request(method, path, headers=headers)
        assert not [name for name in response.headers if name.startswith("access-control")]
    first, second = http.get("/"), http.get("/")
    policy = first.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    [nonce] = set(re.findall(r"'nonce-([\w-]+)'", policy))
    assert f'<script nonce="{nonce}">' in first.text
    assert nonce not in second.text


def test_the_interactive_documentation_loads_nothing_from_elsewhere(http):
    html = http.get("/docs").text
    assert not re.search(r"(?:https?:)?//(?!127\.0\.0\.1)[\w.-]+\.\w+", html)
    for path in re.findall(r'(?:src|href)="([^"]+)"', html):
        assert http.get(path).status_code == 200


# --- many at once ---------------------------------------------------------------------------------


def test_fifty_clients_of_a_slow_llm_are_all_answered_and_healthz_answers_meanwhile(http, url, llm):
    llm.delay, took, ended = 0.4, list[float](), threading.Event()

    def watch():
        while not ended.wait(0.02):
            begin = time.perf_counter()
            assert http.get("/healthz").json() == {"status": "ok"}
            took.append(time.perf_counter() - begin)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        responses = ask_all(url, alternating(50))
    finally:
        ended.set()
        watcher.join()
    assert [response.status_code for response in responses] == [200] * 50
    assert {events(response.text)[-1][0] for response in responses[::2]} == {"done"}
    assert all("Sunniva" in response.text for response in responses)
    assert llm.most_simultaneous_chats == rag.ANSWERS
    assert len(took) > 30
    assert statistics.mean(took) < 0.05


def test_a_full_queue_says_when_to_come_again(narrow, llm):
    llm.delay = 0.4
    responses = ask_all(narrow, alternating(12))
    codes = [response.status_code for response in responses]
    assert sorted(codes) == [200] * 3 + [503] * 9
    assert {r.headers.get("Retry-After") for r in responses if r.status_code == 503} == {"5"}
    llm.delay = 0
    assert all("Sunniva" in r.text for r in ask_all(narrow, alternating(3)))  # they are free again
    with browse(narrow) as client:
        llm.delay = 1.0
        slow = threading.Thread(target=ask_all, args=(narrow, [MILLER]))
        slow.start()
        wait_for(lambda: llm._chats == 1)
        assert ask(client, "Who is the miller?", generate=False)["sources"]
        assert llm._chats == 1, "passages alone waited for the LLM"
        slow.join()


LONG = " ".join(f"word{n}" for n in range(200))


def leave(url, streamed, query="Who is the miller?"):
    """Send a question from a client that does not stay: its socket."""
    client = socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])))
    text = json.dumps({"query": query, "stream": streamed})
    head = "POST /chat HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    client.sendall(f"{head}Content-Length: {len(text)}\r\n\r\n{text}".encode())
    return client


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_leaves_ends_its_generation(http, url, llm, streamed):
    llm.reply, llm.token_delay = LONG, 0.1
    with leave(url, streamed):
        sent = wait_for(lambda: llm.chat_requests and llm.chat_requests[0])
        time.sleep(0.3)
        assert sent.finished is None
    wait_for(lambda: sent.finished, 4)  # of 20 seconds
    llm.token_delay, llm.reply = 0, extractive_reply
    assert "Sunniva" in ask(http, "Who is the miller?")["answer"]


def test_a_client_that_leaves_the_queue_is_never_generated_for(narrow, llm):
    llm.reply, llm.token_delay = LONG, 0.1
    with browse(narrow) as client:
        with leave(narrow, True, "first"):
            wait_for(lambda: llm.chat_requests)
            with leave(narrow, True, "left"), leave(narrow, False, "left"):
                wait_for(lambda: client.post("/chat", json=MILLER).status_code == 503)
            time.sleep(0.5)
            assert len(llm.chat_requests) == 1
        wait_for(lambda: llm.chat_requests[0].finished, 4)
        llm.reply, llm.token_delay = extractive_reply, 0
        assert "Sunniva" in ask(client, "Who is the miller?")["answer"]
    assert not [r for r in llm.chat_requests if "Question: left" in r.text]


def test_clients_that_leave_or_fail_give_their_places_back(narrow, llm):
    dice = random.Random(5)
    for n in range(60):
        with leave(narrow, n % 3 > 0):
            time.sleep(dice.choice((0, 0, 0.001, 0.01, 0.05)))
    llm.fail(times=None, status=400)
    with browse(narrow) as client:
        wait_for(lambda: client.post("/chat", json=MILLER).status_code == 502)
        codes = [client.post("/chat", json=body).status_code for body in alternating(8)]
    assert codes == [200, 502] * 4
    llm.recover()
    assert [response.status_code for response in ask_all(narrow, alternating(3))] == [200] * 3


# --- what goes wrong ------------------------------------------------------------------------------


def test_while_the_llm_is_down_it_says_so_and_passages_are_still_found(start):
    url = start(OPENAI_BASE_URL="http://127.0.0.1:9/v1").url()
    streamed, plain = ask_all(url, alternating(2))
    assert plain.status_code == 502
    assert plain.json() == {"detail": "the LLM can't be reached, or it broke off"}
    (first, sources), (second, error) = events(streamed.text)
    assert (first, second) == ("sources", "error")
    assert "Sunniva" in sources["sources"][0]["text"]
    assert error == plain.json()
    with browse(url) as client:
        assert "Sunniva" in ask(client, "Who is the miller?", generate=False)["sources"][0]["text"]


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"status": 401, "message": "Incorrect API key: sk-fake-openai"}, "HTTP 401"),
        ({"status": 400}, "HTTP 400"),
        ({"body": "<html>a web page</html>", "status": 200}, "no stream"),
        ({"cut_after": 3}, "broke off"),
        ({"error_after": 3}, "broke off"),
        ({"reply": " \n"}, "answered nothing"),
        ({"null_content": True}, "answered nothing"),
    ],
    ids=str,
)
def test_an_llm_that_fails_is_an_error_and_never_half_an_answer(http, llm, fault, said):
    llm.fail(times=None, **fault)
    response = http.post("/chat", json=MILLER)
    assert response.status_code == 502, response.text
    assert re.search(said, response.json()["detail"])
    response = http.post("/chat", json=MILLER | {"stream": True})
    names = [name for name, _ in events(response.text)]
    assert (names[0], names[-1], "done" in names) == ("sources", "error", False)


def test_sigterm_finishes_the_running_answers(start, llm):
    server = start()
    url = server.url()
    llm.reply, llm.token_delay = " ".join(LONG.split()[:15]), 0.1
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask_all, url, alternating(3))
        wait_for(lambda: llm._chats == 3)
        server.kill(signal.SIGTERM)
        first, second, third = asking.result()
    assert [events(r.text)[-1][1]["answer"] for r in (first, third)] == [llm.reply] * 2
    assert second.json()["answer"] == llm.reply
    assert server.end() in (0, -signal.SIGTERM)
    with browse(url) as client, pytest.raises(httpx2.ConnectError):
        client.get("/healthz")


def test_ctrl_c_while_it_indexes_ends_soon_and_the_next_start_goes_on(start, nursery, tmp_path):
    text = "\n\n".join(f"# Part {n}\n\nThe part {n} is of brass." for n in range(150))
    (tmp_path / "parts.md").write_text(text)
    args = ("--docs", tmp_path / "parts.md", "--index", tmp_path / "rag")
    server = start(*args, RAG_PAUSE="0.01")
    wait_for((tmp_path / "rag" / "chroma.sqlite3").exists)
    time.sleep(0.5)
    server.kill(signal.SIGINT)
    assert server.end() == 130
    assert "ready" not in nursery.errors(server.pid)
    with browse(start(*args).url()) as client:
        assert client.get("/readyz").json()["chunks"] == 150


def test_a_question_before_the_index_is_loaded_is_503_and_healthz_answers(start):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = start("--port", port, RAG_PAUSE="0.5")
    with browse(f"http://127.0.0.1:{port}") as client:

        def answers():
            with contextlib.suppress(httpx2.TransportError):
                return client.get("/healthz").status_code == 200

        wait_for(answers)
        for method, path in [*ROUTES, ("GET", "/readyz")]:
            given: Any = {"json": {"query": "x"}}
            if path == "/documents":
                given = {"files": {"file": ("x.txt", b"x")}}
            response = client.request(method, path, **given)
            assert response.status_code == 503, path
            assert response.headers["Retry-After"] == "2"
        server.url()
        assert client.get("/readyz").json()["status"] == "ready"


# --- old or new, never half -----------------------------------------------------------------------


def ledger(version, lines):
    """A document of as many passages as lines, each with the version's word."""
    return "".join(f"# L{n}\n\nledger {version} entry{n} {version}x{n}\n\n" for n in range(lines))


def test_a_kill_in_an_upload_leaves_the_old_document_or_the_new_and_a_restart_keeps_it(
    start, tmp_path
):
    dice, sizes, now = random.Random(7), {"v0": 70, "v1": 90}, "v0"
    (tmp_path / "notes.md").write_text("The ferry Alma has two chimneys.")
    args = ("--index", tmp_path / "rag", "--docs", tmp_path / "notes.md")
    server = start(*args, RAG_PAUSE="0.005")
    with browse(server.url()) as client:
        add(client, "ledger.md", ledger(now, sizes[now]))
    for _ in range(2):
        then = "v1" if now == "v0" else "v0"
        with browse(server.url()) as client, ThreadPoolExecutor(1) as pool:
            sending = pool.submit(add, client, "ledger.md", ledger(then, sizes[then]))
            time.sleep(dice.uniform(0.05, 1.0))
            server.kill(signal.SIGKILL)
            assert server.end() == -signal.SIGKILL
            assert isinstance(sending.exception(), httpx2.TransportError | None)
        server = start(*args, RAG_PAUSE="0.005")
        with browse(server.url()) as client:
            count = listed(client)["ledger.md"]["chunks"]
            now = next(version for version, size in sizes.items() if size == count)
            for query in ("ledger entry5", f"{then}x3"):
                sources = ask(client, query, top_k=20, generate=False)["sources"]
                texts = [s["text"] for s in sources if s["source"] == "ledger.md"]
                assert {re.findall(r"ledger (v\d+)", text)[-1] for text in texts} == {now}


# --- its own schema -------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [*GenerationMode])
def test_whatever_its_schema_admits_or_forbids_is_answered_as_the_schema_says(http, url, mode):
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operations = list(schema.get_all_operations())
    assert len(operations) == 6
    for operation in operations:
        assert isinstance(operation, Ok)

        @seed(1)
        @settings(max_examples=15, database=None, deadline=None, suppress_health_check=HealthCheck)
        @given(case=operation.ok().as_strategy(generation_mode=mode))
        def check(case):
            # That the name of a file must have a known kind, no schema can say.
            unsaid = [positive_data_acceptance] if case.path == "/documents" else []
            case.call_and_validate(excluded_checks=unsaid)

        with contextlib.suppress(Unsatisfiable):  # what takes nothing can't be given what is wrong
            check()
