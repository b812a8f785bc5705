"""rag_chroma_claude.py with the real all-MiniLM-L6-v2, a real Chroma and a fake Claude."""

# ruff: noqa: D103 - the names of the tests are their docstrings

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import environment, run_light
from fake_llm import FakeLLM
from nursery import Nursery

import rag_chroma_claude as rag

SCRIPT = "rag_chroma_claude.py"

# The script in a process of its own, with words hashed to vectors in place of the model. Embedding
# takes as long as RAG_PAUSE says for each text, so that a kill can fall between.
FAST = """
import os, time, zlib
import numpy as np, chromadb, chromadb.utils.embedding_functions
import rag_chroma_claude as rag
def embed(texts, *_, query=False):
    vectors = np.full((len(texts), 384), 1e-6, np.float32)
    for vector, text in zip(vectors, texts):
        for word in text.lower().split():
            vector[zlib.crc32(word.encode()) % 384] += 1
    time.sleep(len(texts) * float(os.environ["RAG_PAUSE"]))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
rag.embed, rag.native_precision = embed, lambda: "float32"
rag.token_counter = lambda _: (lambda texts: [len(t.split()) for t in texts], 250)
rag.BLOCK = 64
"""


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    nursery = Nursery(tmp_path_factory.mktemp("nursery"), FAST)
    yield nursery
    nursery.close()


@pytest.fixture
def fast(nursery: Nursery) -> Callable[..., int]:
    """Start a run with the quick embedder."""

    def start(*args: object, pause: float = 0.0003) -> int:
        return nursery.start("--retrieve-only", *args, env={"RAG_PAUSE": str(pause)})

    return start


@pytest.fixture
def end(nursery: Nursery) -> Callable[[int], tuple[int, str, str]]:
    """Wait for a run: its exit code, stdout and stderr."""

    def wait(pid: int) -> tuple[int, str, str]:
        code, err = nursery.wait(pid)
        assert "Traceback" not in err, err
        return code, nursery.output(pid), err

    return wait


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The passages that have been embedded, in order."""
    texts: list[str] = []
    embed = rag.embed

    def count(new: list[str], *args: Any, query: bool = False) -> Any:
        if not query and new != ["a"]:
            texts.extend(new)
        return embed(new, *args, query=query)

    monkeypatch.setattr(rag, "embed", count)
    return texts


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """A folder with three short files."""
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "boat.md").write_text("The boat Heron was painted green in April.")
    (folder / "well.md").write_text("The well behind the mill is 22 metres deep.")
    (folder / "cook.md").write_text("Imke Dallinger cooks the soup on Fridays.")
    return folder


def numbered(folder: Path, version: str, files: int = 20) -> Path:
    """Files whose every second paragraph names the version: 600 chunks for 20 files."""
    folder.mkdir(exist_ok=True)
    for n in range(files):
        facts = [
            f"subject{n}x{m} {version if m % 2 else 'both'} part{m % 3} " + f"filler{n}x{m} " * 50
            for m in range(30)
        ]
        (folder / f"{n}.txt").write_text("\n".join(facts))
    return folder


def passages(out: str) -> list[dict[str, Any]]:
    return [source for line in out.splitlines() for source in json.loads(line)["sources"]]


def everything(place: Path) -> list[tuple[str, str]]:
    """All the rows that the index in a folder shows, as (text, source)."""
    with rag.opened(rag.parse_arguments(["--index", str(place)]), rag.COLLECTION) as collection:
        version = collection.metadata["version"]
        rows = collection.get()
    pairs = zip(rows["documents"], rows["metadatas"], strict=True)
    return [(t, m["source"]) for t, m in pairs if m["since"] <= version < m["until"]]


def test_the_demonstration_answers_with_sources_and_refuses_the_last_question(
    llm: FakeLLM, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rag.main([]) == 0
    out, err = capsys.readouterr()
    answers = re.findall(r"^Answer: (.*)", out, re.M)
    assert len(answers) == 4
    assert all(re.search(r"\[\d\]", answer) for answer in answers[:3])
    assert "whole in one of them" in answers[0]
    assert answers[3] == rag.REFUSAL
    assert err == "index: 5 chunks added, 0 reused, 0 removed\n"
    assert [request.json and request.json["model"] for request in llm.chat_requests] == [
        "claude-sonnet-4-6"
    ] * 4


def test_json_has_the_fields_of_the_collection(
    llm: FakeLLM, capsys: pytest.CaptureFixture[str], notes: Path
) -> None:
    assert rag.main(["--json", "--docs", str(notes), "How deep is the well?", "Who cooks?"]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert list(first) == [
        *("question", "answer", "refused", "error", "sources"),
        *("model", "embed_model", "usage", "seconds"),
    ]
    best = first["sources"][0]
    assert best["source"] == str(notes / "well.md")
    assert best["n"] == 1
    assert best["page"] is None
    assert 0.5 < best["score"] <= 1
    assert "22 metres" in first["answer"]
    assert first["usage"]["input_tokens"] > 50
    assert set(first["seconds"]) == {"load", "index", "retrieve", "first_token", "generate"}
    assert second["question"] == "Who cooks?"
    assert len(first["sources"]) == 3  # all there is


def test_passages_alone_need_no_key(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], notes: Path
) -> None:
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
    assert rag.main(["--retrieve-only", "--docs", str(notes), "the colour of the boat"]) == 0
    assert "[1]" in capsys.readouterr().out


def test_scores_are_the_cosine_of_the_real_embeddings(capsys: pytest.CaptureFixture[str]) -> None:
    rag.main(["--retrieve-only", "--json", "Why do chunks overlap?"])
    for source in passages(capsys.readouterr().out):
        question = rag.embed(["Why do chunks overlap?"], rag.EMBED_MODEL, "float32", query=True)
        passage = rag.embed([source["text"]], rag.EMBED_MODEL, "float32")
        assert source["score"] == pytest.approx(float(question[0] @ passage[0]), abs=0.01)


def test_only_what_changed_is_embedded_again(
    embedded: list[str], notes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ask = ["--retrieve-only", "--json", "--index", str(tmp_path / "rag"), "How deep is the well?"]

    def update() -> tuple[int, str, list[dict[str, Any]]]:
        embedded.clear()
        assert rag.main(["--docs", str(notes), *ask]) == 0
        out, err = capsys.readouterr()
        return len(embedded), err.strip().removeprefix("index: "), passages(out)

    assert update()[:2] == (3, "3 chunks added, 0 reused, 0 removed")
    assert update()[:2] == (0, "0 chunks added, 3 reused, 0 removed")
    (notes / "boat.md").write_text("The boat Heron was painted red in May.")
    assert update()[:2] == (1, "1 chunks added, 2 reused, 1 removed")
    (notes / "cook.md").unlink()
    assert update()[:2] == (0, "0 chunks added, 2 reused, 1 removed")
    (notes / "well.md").rename(notes / "fountain.md")
    count, said, hits = update()
    assert (count, said) == (0, "0 chunks added, 2 reused, 0 removed")
    assert hits[0]["source"] == str(notes / "fountain.md")
    assert sorted(Path(source).name for _, source in everything(tmp_path / "rag")) == [
        *("boat.md", "fountain.md")
    ]
    assert rag.main(ask) == 0  # without --docs the kept index is asked
    assert passages(capsys.readouterr().out) == hits


def test_another_embedder_is_refused_and_told_what_to_type(
    notes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ask = ["--retrieve-only", "--index", str(tmp_path / "rag"), "soup"]
    alias = ["--embed-model", "sentence-transformers/all-MiniLM-L6-v2"]
    assert rag.main(["--docs", str(notes), *ask]) == 0
    assert rag.main([*ask, *alias]) == 0
    assert rag.main([*ask, "--embed-model", "other/model"]) == 2
    assert "type --embed-model all-MiniLM-L6-v2" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["files", "another Chroma", "damaged"])
def test_a_folder_that_is_not_ours_is_refused_and_left_as_it_is(
    kind: str, tmp_path: Path, notes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import chromadb

    folder = tmp_path / "theirs"
    folder.mkdir()
    if kind == "files":
        (folder / "thesis.txt").write_text("mine")
    elif kind == "damaged":
        (folder / "chroma.sqlite3").write_bytes(b"no database" * 1000)
    else:
        client: Any = chromadb.PersistentClient(folder)
        client.create_collection("theirs", embedding_function=None)
        client.close()
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    for docs in ([], ["--docs", str(notes)]):
        assert rag.main(["--retrieve-only", "--index", str(folder), *docs]) == 2
        err = capsys.readouterr().err
        assert "--index" in err or "damaged" in err
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before


def test_a_run_killed_at_any_moment_leaves_the_old_index_and_the_next_is_complete(
    tmp_path: Path, fast: Callable[..., int], end: Callable[[int], tuple[int, str, str]]
) -> None:
    place, docs, dice = tmp_path / "rag", numbered(tmp_path / "docs", "old"), random.Random(3)
    args = ("--index", place, "--docs", docs, "subject1x1")

    def shown() -> str:
        """The version that the index shows, and shows whole."""
        rows = everything(place)
        texts = {text for text, _ in rows}
        versions = {text.split()[1] for text in texts} - {"both"}
        assert (len(rows), len(texts), len(versions)) == (600, 600, 1)
        return versions.pop()

    assert end(fast(*args))[0] == 0
    assert shown() == "old"
    now, then, kills = "old", "new", 0
    numbered(docs, then)
    for _ in range(6):
        process = fast(*args, pause=0.002)
        time.sleep(dice.uniform(0.1, 1.5))
        os.kill(process, signal.SIGKILL)
        kills += end(process)[0] == -signal.SIGKILL
        if shown() == then:  # and the next run goes the other way
            now, then = then, now
            numbered(docs, then)
    assert kills >= 3, "the test kills too late"
    code, _, err = end(fast(*args))
    assert code == 0, err
    assert re.search(r"index: 300 chunks added, 300 reused, 300 removed", err), err
    assert shown() == then


@contextlib.contextmanager
def server(path: Path) -> Generator[str]:
    """A real Chroma server on a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    chroma = Path(sys.executable).with_name("chroma")
    command = [chroma, "run", "--path", path, "--port", str(port), "--host", "127.0.0.1"]
    process = subprocess.Popen(
        command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(200):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


@pytest.mark.parametrize("where", ["folder", "server"])
def test_whoever_asks_during_an_update_sees_the_old_version_or_the_new(
    where: str,
    tmp_path: Path,
    nursery: Nursery,
    fast: Callable[..., int],
    end: Callable[[int], tuple[int, str, str]],
) -> None:
    docs = numbered(tmp_path / "docs", "old", 8)
    with contextlib.ExitStack() as stack:
        if where == "server":
            place = ["--chroma-url", stack.enter_context(server(tmp_path / "rag"))]
        else:
            place = ["--index", str(tmp_path / "rag")]
        _, _, err = end(fast(*place, "--docs", docs, "x"))
        assert "index: 240 chunks added, 0 reused, 0 removed" in err
        numbered(docs, "new", 8)
        writer = fast(*place, "--docs", docs, "x", pause=0.03)
        second = None
        seen = []
        while nursery.is_running(writer):
            questions = [f"old new subject{n}x{m}" for n in range(8) for m in (1, 3)]
            _, out, _ = end(fast(*place, "--json", "--top-k", 2, *questions))
            for line in out.splitlines():
                hits = json.loads(line)["sources"]
                assert len(hits) == 2
                words = {text.split()[1] for text in (hit["text"] for hit in hits)} - {"both"}
                assert len(words) == 1, hits
                seen += words
            second = second or fast(*place, "--docs", docs, "x")  # meets the first one's lock
        assert second
        ends = [end(writer), end(second)]
        # One of the two brings the news, whichever is first; the other is refused, or too late.
        said = [re.findall("at work there|index: .*", err)[0] for _, _, err in ends]
        others = {"at work there", "index: 0 chunks added, 240 reused, 0 removed"}
        assert len(set(said) - others) == 1
        assert "index: 120 chunks added, 120 reused, 120 removed" in said
        assert [code for code, _, _ in ends] == [2 if "at work" in text else 0 for text in said]
        assert "old" in seen
    texts = [text for text, _ in everything(tmp_path / "rag")]
    assert len(texts) == len(set(texts)) == 240
    assert not any(" old " in text for text in texts)


def test_a_folder_stays_open_until_another_program_writes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fast: Callable[..., int],
    end: Callable[[int], tuple[int, str, str]],
) -> None:
    import chromadb

    opened, real = [], chromadb.PersistentClient
    monkeypatch.setattr(chromadb, "PersistentClient", lambda *a: opened.append(1) or real(*a))
    place, docs = tmp_path / "rag", tmp_path / "docs"
    docs.mkdir()
    args = rag.parse_arguments(["--index", str(place), "--top-k", "1", "--retrieve-only"])
    for version in range(3):
        (docs / "a.txt").write_text(f"This is version {version}.")
        assert end(fast("--index", place, "--docs", docs, "x"))[0] == 0
        for _ in range(3):
            index = rag.load_index(args)
            assert index
            [hit] = rag.retrieve("Which version is this?", index, args)
            assert hit.chunk.text == f"This is version {version}."
        assert len(opened) == version + 1


def test_a_server_that_does_not_answer_is_one_line_that_says_how_to_start_one(
    fast: Callable[..., int], end: Callable[[int], tuple[int, str, str]]
) -> None:
    code, _, err = end(fast("--chroma-url", "http://127.0.0.1:9", "x"))
    assert code == 2
    assert err.count("\n") == 1
    assert "chroma run --path .chroma" in err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["hello"], "ANTHROPIC_API_KEY"),
        (["--chroma-url", "localhost:8000", "x"], "http://localhost:8000"),
        (["--chroma-url", "cloud", "x"], "CHROMA_API_KEY"),
        (["--chroma-url", "http://x", "--index", "y", "x"], "not both|give --index or"),
    ],
)
def test_what_the_user_can_mend_is_said_before_anything_heavy_is_imported(
    args: list[str], said: str
) -> None:
    done = run_light("rag_chroma_claude", *args)
    assert done.returncode == 2, done.stderr
    assert re.search(said, done.stderr)
    assert done.stderr.count("\n") == 1


def test_the_script_runs_as_a_user_runs_it(
    llm: FakeLLM, run: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = run(SCRIPT, "--json", timeout=280)
    assert done.returncode == 0, done.stderr
    refused = [json.loads(line)["refused"] for line in done.stdout.splitlines()]
    assert refused == [False, False, False, True]
