"""rag_chroma_claude.py: a real Chroma in memory, in a folder and on a server; Claude's requests."""

# ruff: noqa: D103 - the names of the tests are their docstrings

import subprocess
import sys
from argparse import Namespace
from types import SimpleNamespace

import pytest
from conftest import ROOT, environment
from test_contract import LIGHTHOUSE, MODEL_FOLDER, call

import rag_chroma_claude as rag

# Another process, with random vectors instead of a model that takes ten seconds to load. It dies
# when it calls METHOD of the collection for the second time.
OTHER = """
import os, sys, chromadb, numpy, semantic_text_splitter, rag_chroma_claude as rag
def die_second(*args):
    calls.append(args)
    return method(*args) if len(calls) < 2 else os.kill(os.getpid(), 9)
calls, method = [], getattr(chromadb.Collection, METHOD, None)
setattr(chromadb.Collection, METHOD, lambda *args: die_second(*args))
random, rag.EMBED_BATCH = numpy.random.default_rng(1), 20
rag.embed = lambda texts, args, **_: random.normal(size=(len(texts), 384)).astype("float32")
rag.load_models = lambda args: semantic_text_splitter.TextSplitter(800)
sys.exit(rag.main(sys.argv[1:]))
"""


@pytest.fixture
def ask(llm, capsys, embedder_loaded_once):
    from chromadb.api.shared_system_client import SharedSystemClient

    def ask(*args):
        SharedSystemClient.clear_system_cache()  # each run opens Chroma, as a new process does
        return call(rag, capsys, *args)

    return ask


def held(ask, *index):
    """Return the texts of an index, by a question that asks for more than there are."""
    done = ask(*index, "--retrieve-only", "--json", "--top-k", 1_000, "Where is buoy 7?")
    assert done.code == 0, done.err
    return sorted(source["text"] for source in done.records[0]["sources"])


def start_other(*args, method="nothing"):
    code = OTHER.replace("METHOD", repr(method))
    command = [sys.executable, "-c", code, *map(str, args), "--retrieve-only", "buoy"]
    return subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL)


def write(folder, version):
    folder.mkdir(exist_ok=True)
    for n in range(60):
        (folder / f"{n}.txt").write_text(f"Buoy {n} is {version if n % 2 else 'as ever'}.")
    return sorted(path.read_text() for path in folder.iterdir())


@pytest.mark.parametrize("method", ["upsert", "delete"])
def test_the_run_after_one_that_was_killed_completes_the_index(ask, tmp_path, method):
    index = ("--index", tmp_path / "kept", "--docs", tmp_path / "docs")
    old = write(tmp_path / "docs", "red")
    assert held(ask, *index) == old
    new = write(tmp_path / "docs", "green")
    assert start_other(*index, method=method).wait() == -9
    between = held(ask, *index[:2])
    assert set(old) & set(new) < set(between) <= {*old, *new}
    assert between not in (old, new), "the test kills too late"
    assert held(ask, *index) == held(ask, *index[:2]) == new


def test_programs_that_share_a_server_end_with_one_complete_index(ask, tmp_path, chroma_url):
    index = ("--chroma-url", chroma_url, "--docs", tmp_path / "docs")
    old = write(tmp_path / "docs", "red")
    assert held(ask, *index) == held(ask, *index[:2]) == old
    new = write(tmp_path / "docs", "green")
    others = [start_other(*index) for _ in range(2)]
    while None in [other.poll() for other in others]:
        assert set(held(ask, *index[:2])) <= {*old, *new}
    assert [other.returncode for other in others] == [0, 0]
    assert held(ask, *index[:2]) == new


def test_a_chunk_that_another_program_is_just_deleting_is_left_out(monkeypatch):
    monkeypatch.setattr(rag, "embed", lambda texts, args, query: texts)
    lists = {"documents": [None, "b"], "metadatas": [None, {"source": "s"}], "distances": [0, 0.5]}
    index = SimpleNamespace(query=lambda *_, **__: {name: [row] for name, row in lists.items()})
    [hit] = rag.retrieve("?", index, Namespace(top_k=2))
    assert hit == {"n": 1, "score": 0.5, "text": "b", "source": "s", "page": None}


def test_a_server_that_is_down_and_a_cloud_without_key_are_told_in_one_line(ask):
    for url in ("http://127.0.0.1:9", "cloud"):
        done = ask("--chroma-url", url, "--retrieve-only", LIGHTHOUSE)
        assert (done.code, done.err[:7], done.err.count("\n")) == (2, "error: ", 1)


def test_the_index_of_another_embedder_is_refused_and_left_as_it_was(ask, notes, tmp_path):
    index = ("--index", tmp_path / "kept")
    before = held(ask, *index, "--docs", notes)
    done = ask(*index, "--docs", notes, "--embed-model", MODEL_FOLDER, LIGHTHOUSE)
    assert (done.code, "--embed-model all-MiniLM-L6-v2" in done.err) == (2, True)
    assert held(ask, *index) == before


@pytest.mark.parametrize("name", ["notes", "notes/dam.txt"])
def test_a_place_of_something_else_is_refused_and_left_as_it_was(ask, notes, tmp_path, name):
    before = {file: file.read_text() for file in tmp_path.rglob("*.*")}
    for args in ([], ["--docs", notes]):
        done = ask("--index", tmp_path / name, *args, "--retrieve-only", LIGHTHOUSE)
        assert (done.code, done.out, str(tmp_path / name) in done.err) == (2, "", True), done.err
    assert {file: file.read_text() for file in tmp_path.rglob("*.*")} == before


def test_an_index_in_memory_is_gone_with_its_run(ask, notes):
    assert len(held(ask, "--docs", notes)) == 3
    assert held(ask) == sorted(rag.SAMPLES)


def test_claude_gets_the_system_prompt_apart_and_a_limit(ask, llm):
    [record] = ask("--json", "--model", "claude-opus-4-8", LIGHTHOUSE).records
    sent = llm.chat_requests[0].json
    assert (sent["system"], sent["max_tokens"]) == (rag.SYSTEM_PROMPT, 1024)
    assert record["sources"][0]["text"] in sent["messages"][0]["content"]
