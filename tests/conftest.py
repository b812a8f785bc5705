"""What the tests share: a guard around the network, the fake LLMs, `run`, documents to read."""

from __future__ import annotations

import functools
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import docx
import pytest
from fake_llm import FakeLLM
from fpdf import FPDF
from playwright.sync_api import Browser, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
GUARD = Path(__file__).resolve().parent / "loopback_only"
sys.path.insert(0, str(ROOT))  # so that a test can `import rag_faiss_openai`

# What a user's environment could change in a run.
THEIRS = ("OPENAI_", "ANTHROPIC_", "OLLAMA_", "HF_", "LLAMA_", "CHROMA_", "TQDM_")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="no Chromium: apt install chromium")
READY = r"ready: (\S+)"
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
guard = runpy.run_path(str(GUARD / "sitecustomize.py"))["guard"]


def clean_environment() -> dict[str, str]:
    """Return the environment without the user's keys, hosts, models, proxies."""
    theirs = (*THEIRS, "PYTHON", "VIRTUAL_ENV")  # PYTHONUNBUFFERED, PYTHONDONTWRITEBYTECODE...
    kept = {name for name in os.environ if not name.startswith(theirs)}
    return {name: os.environ[name] for name in kept if name.upper() not in PROXIES}


@pytest.fixture(autouse=True)
def loopback_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Fail a test that reaches beyond loopback, even where its code swallows the error."""
    for name in set(os.environ) - set(clean_environment()):
        monkeypatch.delenv(name)
    reached: list[str] = []
    restore = guard(reached.append)
    yield reached
    restore()
    if reached:
        pytest.fail(reached[0])


def _serve(monkeypatch: pytest.MonkeyPatch, is_ollama: bool) -> Iterator[FakeLLM]:
    with FakeLLM(ollama=is_ollama) as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        yield server
        assert server.errors == []


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeLLM]:
    """OpenAI and Anthropic, to which the environment points."""
    yield from _serve(monkeypatch, is_ollama=False)


@pytest.fixture
def ollama(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeLLM]:
    """An Ollama server, to which the environment points."""
    yield from _serve(monkeypatch, is_ollama=True)


EMBEDDERS: dict[str, Any] = {}


@pytest.fixture
def embedder_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the runs in this process share an embedder, which takes a second to load."""
    import torch
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(1)  # the other cores are for the other workers

    def load(path: str, **options: Any) -> Any:
        if path not in EMBEDDERS:
            EMBEDDERS[path] = SentenceTransformer(path, **options)
        EMBEDDERS[path].tokenizer.backend_tokenizer.enable_truncation(128)  # as it is loaded
        return EMBEDDERS[path]

    monkeypatch.setattr("sentence_transformers.SentenceTransformer", load)


@functools.cache
def _install(script: Path) -> None:
    """Let uv make a script's environment, the one step that may use the package index."""
    command = ["uv", "run", str(script), "--help"]
    done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def command(script: str, *args: str) -> list[str]:
    """Return the command that runs a script, whose environment is made, and asks no index."""
    path = ROOT / script
    _install(path)
    return ["uv", "run", "--offline", str(path), *args]


def environment(env: dict[str, str] | None = None) -> dict[str, str]:
    """Return the environment of a run: clean, behind the guard, the test's fake, and `env`."""
    fakes = {name: value for name, value in os.environ.items() if name.startswith(THEIRS)}
    guarded = {"PYTHONPATH": str(GUARD), "LOOPBACK_ONLY": "1"}
    return clean_environment() | guarded | fakes | (env or {})


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `uv run SCRIPT ARGS` as a user would, in an empty folder, with the test's fake."""

    def run(script: str, *args: str, env: dict[str, str] | None = None, **options: Any) -> Any:
        options = {"cwd": tmp_path, "input": "", "timeout": 60} | options
        done = subprocess.run(
            command(script, *args), env=environment(env), capture_output=True, text=True, **options
        )
        assert "beyond loopback" not in done.stderr, done.stderr
        return done

    return run


@contextmanager
def served(script: str, *args: str, cwd: Path, env: dict[str, str] | None = None) -> Generator[str]:
    """Run a script that serves, as a user would: its address. In the end it gets a Ctrl-C."""
    process = subprocess.Popen(
        command(script, *args), cwd=cwd, env=environment(env), stderr=subprocess.PIPE, text=True
    )
    assert process.stderr
    try:
        yield next(found[1] for line in process.stderr if (found := re.search(READY, line)))
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)


HEAVY = {"torch", "transformers", "sentence_transformers", "chromadb", "faiss", "xllamacpp"}
HEAVY |= {"anthropic", "fastapi"}


def run_light(script: str, *args: str, heavy: set[str] = HEAVY) -> subprocess.CompletedProcess[str]:
    """Run a script's main in a process of its own, which fails if it imports anything heavy."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {script} as rag\n"
        f"try: code = rag.main({list(args)!r})\n"
        "except SystemExit as end: code = end.code\n"
        f"assert not {heavy!r} & set(sys.modules)\n"
        "sys.exit(code)"
    )
    python = [sys.executable, "-c", code]
    return subprocess.run(python, env=environment(), capture_output=True, text=True)


def wait_for(condition: Callable[[], Any], seconds: float = 120) -> Any:
    """Wait until something is so, and return it."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)
    return found


@pytest.fixture
def free_port() -> int:
    """A port on which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture
def chroma_url(free_port: int, tmp_path: Path) -> Iterator[str]:
    """The address of a Chroma server."""
    chroma = [str(Path(sys.executable).with_name("chroma")), "run", "--port", str(free_port)]
    server = subprocess.Popen([*chroma, "--path", tmp_path / "server"], stdout=subprocess.DEVNULL)
    try:
        wait_for(lambda: socket.socket().connect_ex(("127.0.0.1", free_port)) == 0)
        yield f"http://127.0.0.1:{free_port}"
    finally:
        server.kill()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """The system's Chromium, headless."""
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


def write_pdf(path: Path, *pages: str) -> Path:
    """Write a PDF with the text of each page; a page without any is blank."""
    pdf = FPDF()
    for text in pages:
        pdf.add_page()
        if text:
            pdf.set_font("helvetica", size=12)
            pdf.multi_cell(0, text=text)
    pdf.output(str(path))
    return path


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """A folder with three texts of a line each."""
    folder = tmp_path / "notes"
    folder.mkdir()
    for name in ("dam", "ferry", "honey"):
        (folder / f"{name}.txt").write_text(f"The {name} of Aldermoor was praised in 1811.\n")
    return folder


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    """A folder with a small document of each format, each about something else."""
    folder = tmp_path / "samples"
    folder.mkdir()
    (folder / "beavers.txt").write_text("Beavers build dams. The dam at Aldermoor is 41 m long.\n")
    (folder / "bread.md").write_text("# Bread\n\nThe sourdough of Tolsund rises for 19 hours.\n")
    (folder / "tea.rst").write_text("Tea\n===\n\nThe kettle of Quillet whistles in G major.\n")
    (folder / "trains.html").write_text(
        "<html><style>p {color: vermilion}</style><script>var tracker = 1;</script>"
        "<p>The night train to <b>Marrow</b> has 7 sleeping cars &amp; a&nbsp;bar.</p></html>"
    )
    first = "The comet Brindle was seen in 1811 by Odda Renfrey."
    write_pdf(folder / "comet.pdf", first, "Its tail had the colour of copper.")
    document = docx.Document()
    document.add_paragraph("The orchard has 212 plum trees.")
    table = document.add_table(rows=1, cols=2)
    table.cell(0, 0).text = "Mirabelle"
    table.cell(0, 1).text = "330 baskets"
    document.save(str(folder / "orchard.docx"))
    return folder
