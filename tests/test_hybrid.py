"""rag_hybrid_fastapi.py: stages, store, command line. Only the LLM services are fake."""

# ruff: noqa: D103 - the names of the tests are their docstrings

import asyncio
import re
import socket
import sqlite3
from argparse import Namespace
from unittest.mock import patch

import numpy as np
import pytest
from conftest import HEAVY, run_light
from test_contract import CUP, MODEL_FOLDER, call

import rag_hybrid_fastapi as rag

QUESTION, SIEVE = "What does E47 mean?", "inlet sieve is blocked"
PEOPLE = ("Odda Renfrey", "Sunniva Aas", "Torbern Lie", "Imke Dallinger", "Priya Nand", "Wim Okko")
PUMPS = [
    f"The pump {('HX', 'LT', 'QV', 'RB')[n % 4]}-{211 + 7 * n} lifts water to the tank of "
    f"hall {n}. Its error E{4100 + 13 * n} means that the inlet sieve is blocked. "
    f"It is serviced by {'Yngvild Quarrie' if n == 41 else PEOPLE[n % 6]}."
    for n in range(60)
]
ASKED = {"role": "user", "content": "Who is the miller of Halden?"}
TOLD = {"role": "assistant", "content": "Sunniva Aas [1]."}


@pytest.fixture(autouse=True)
def alone(monkeypatch, embedder_loaded_once):
    """No Ollama unless the test starts one, no model hub, no seconds between retries."""
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("INITIAL_RETRY_DELAY", "MAX_RETRY_DELAY"):
        for sdk in ("openai", "anthropic"):
            monkeypatch.setattr(f"{sdk}._base_client.{name}", 0.01)


@pytest.fixture
def ask(capsys):
    """Call main as the command line does: its exit code, stdout, stderr, records of --json."""
    return lambda *args: call(rag, capsys, *args)


@pytest.fixture(scope="module")
def args():
    args = rag.PARSER.parse_args(["--retrieve-only"])
    rag.load_models(args)
    return args


def changed(args, **options):
    return Namespace(**vars(args) | options)


def opened(args, **options):
    return rag.open_store(changed(args, **options))


def retrieve(store, question, **options):
    """Retrieve with options that differ from the store's."""
    with patch.object(store, "args", changed(store.args, **options)):
        return rag.retrieve([question], store)


@pytest.fixture(scope="module")
def pumps(args):
    store = opened(args)
    store.update({f"{n}.txt": [text] for n, text in enumerate(PUMPS)})
    return store


def test_html_is_read_as_markdown_with_its_headings():
    html = b"<?xml version='1.0'?><style>p {}</style>"
    html += b"<h2>Dams</h2><p>A <b>weir</b> of *oak* <a href=x>here</a></p>"
    assert rag.read_pages("a.html", html)[0].strip() == "## Dams\n\nA **weir** of *oak* here"


def test_chunks_have_their_place_and_the_embedder_reads_them_whole(args):
    words = "Hydroxyprolylglycine, 水車 und Mühlräder turn at Halden. "
    text = f"Mills\n=====\n\n{words * 40}\n\n## Dams ##\n\n{words * 30}{'x1Y-' * 400}"
    _, *chunks = rag.split_document("a.pdf", ["Page 1.", text], args)
    covered = set()
    for chunk in chunks:
        assert chunk["text"] == text[chunk["start"] : chunk["end"]]
        assert len(args.embedder.tokenizer(chunk["text"], verbose=False)["input_ids"]) <= 256
        covered.update(range(chunk["start"], chunk["end"]))
    assert not "".join(c for n, c in enumerate(text) if n not in covered).strip()
    assert {chunk["page"] for chunk in chunks} == {2}
    assert [chunks[0]["heading"], chunks[-1]["heading"]] == ["Mills", "Dams"]


def test_scores_and_ranks_are_fused_and_passages_diversified_as_worked_out_by_hand():
    lists = {"dense": {1: 0.9, 2: 0.7, 3: 0.3, 5: 0.1}, "bm25": {3: 8.0, 2: 6.0, 4: 2.0}}
    # 2: 6/8 + 6/8; 3: 2/8 + 1; 1: 1; 4: 2/8; 5: 0, the least similar of all that were found
    assert rag.fuse(lists, "scores") == [2, 3, 1, 4, 5]
    # 3: 1/63 + 1/61, a little more than 2: 1/62 + 1/62
    assert rag.fuse(lists, "rrf") == [3, 2, 1, 4, 5]
    given = [{"vector": np.array(vector)} for vector in ([1, 0], [1, 0], [0, 1])]
    # After the first, the second: (2/3 - 1) / 2, and the third: (1/3 - 0) / 2
    assert rag.diversify(given, 0.5) == [given[0], given[2], given[1]]
    assert rag.diversify(given, 1) == given


@pytest.mark.parametrize(
    ("question", "n"),
    [("What does E4581 mean?", 37), ("Who works for Quarrie?", 41), ("LT-596?", 55)],
)
def test_hybrid_finds_exact_words_that_the_embedder_does_not_know(pumps, question, n):
    nearest = retrieve(pumps, question, retriever="dense")
    assert PUMPS[n] not in [hit["text"] for hit in nearest[:4]]
    every = rag.embed(PUMPS, pumps.args) @ rag.embed([question], pumps.args, query=True)[0]
    assert [hit["score"] for hit in nearest] == pytest.approx(np.sort(every)[:-21:-1], abs=1e-3)
    [found] = [hit for hit in retrieve(pumps, question)[:4] if hit["text"] == PUMPS[n]]
    assert found["ranks"]["bm25"] == 1
    assert retrieve(pumps, "zebra", retriever="bm25") == []


def test_a_cross_encoder_orders_what_was_fused(pumps):
    args = changed(pumps.args, reranker="cross-encoder", rerank_model=str(MODEL_FOLDER))
    rag.load_models(args)  # its last layer is random
    found = retrieve(pumps, QUESTION, reranker="cross-encoder", cross_encoder=args.cross_encoder)
    scores = args.cross_encoder.predict([(QUESTION, hit["text"]) for hit in found])
    assert all(np.diff(scores) <= 1e-4)
    ranks = [(hit["ranks"]["cross-encoder"], hit["ranks"]["fused"]) for hit in found]
    assert [rank for rank, _ in ranks] == [*range(1, 21)] == sorted(rank for _, rank in ranks)


def passages(*texts):
    return [{"text": text, "source": "a.md", "score": 0.5} for text in texts]


def test_the_context_keeps_its_budget_with_whole_chunks_and_says_what_it_leaves_out(args):
    text = "The pump HX-220 lifts the water of the mill to the pond above it, forty litres a minute"
    same, other = f"# {text.upper()}!", text.replace("HX-220", "HX-221")
    given = passages(text, same, "two " * 300, other, "one " * 90, "three")
    rag.assemble(given, 3, changed(args, window=400))
    same = "it has the words of one before it"
    left_out = [None, same, "its 300 tokens do not fit", None, None, "beyond the best 3"]
    assert [hit["left_out"] for hit in given] == left_out
    assert [hit["n"] for hit in given] == [1, None, None, 2, 3, None]


def test_no_passage_can_close_its_tag(args):
    closing = ""
    for _ in range(3):
        given = [passages(f"The pump.\n{closing}")[0] | {"n": 1, "source": f'a"{closing}'}]
        prompt = rag.build_prompt("What now?", given, args)[1]["content"]
        [closing] = re.findall(r"\n(</passage-\w+>)\n\nQuestion: What now\?$", prompt)
        assert prompt.count(closing) == 1


def test_citations_of_passages_that_were_not_sent_are_marked():
    text = "It is [1], [2][9][0], see [1](https://a.example/x) and [9](y), [a] and 7"
    assert rag.mark_citations(text, 2) == text.replace("[9][0]", "[9?][0?]")


def chat(args, query, history=(), **options):
    """Let the API answer from the samples, as with `stream`: what its last event tells."""

    async def run():
        return [event async for event in rag.run_events(rag.Question(query=query, history=history))]

    rag.app.state.store = opened(args, retrieve_only=False, **options)
    name, done = asyncio.run(run())[-1]
    assert name == "done"
    return Namespace(**done)


def test_paraphrases_are_searched_for_too_and_fused(llm, args):
    reply = f"{QUESTION}\n1. How heavy is a sack of rye?\n\n- x\n3) y\nz"
    llm.fail(containing="in 3 other wordings", reply=reply)
    done = chat(args, QUESTION, expand=3)
    assert done.queries == [QUESTION, "How heavy is a sack of rye?", "x", "y"]
    ranks = {hit["text"][:6]: hit["ranks"] for hit in done.candidates}
    assert ranks["# Pump"]["dense"] == ranks["# Flou"]["dense 2"] == ranks["# Flou"]["bm25 2"] == 1
    assert SIEVE in done.answer


@pytest.mark.parametrize(("reply", "looked_up"), [(QUESTION, QUESTION), (" ", "And that?")])
def test_a_follow_up_is_rewritten_by_the_last_three_turns(llm, args, reply, looked_up):
    llm.fail(containing=rag.REWRITE_PROMPT, reply=reply)
    done = chat(args, "And that?", [ASKED | {"content": "First?"}, TOLD, *[ASKED, TOLD] * 3])
    rewriting, asking = [request.json["messages"] for request in llm.chat_requests]
    assert rewriting[1:-1] == asking[1:-1] == [ASKED, TOLD] * 3
    assert asking[-1]["content"].endswith(f"Question: {looked_up}")
    assert (done.queries, done.refused) == ([looked_up], reply == " ")


def test_without_an_llm_it_quotes_or_refuses(args):
    found = chat(args, QUESTION, [ASKED, TOLD], llm="quotes", expand=2)
    assert re.fullmatch(rf'".*{SIEVE}.*" \[1\]', found.answer)
    assert (found.queries, found.usage) == ([QUESTION], None)
    found = chat(args, CUP, llm="quotes")
    assert (found.answer, found.refused, found.usage) == (rag.REFUSAL, True, None)


def held(store):
    """The sources of what a question finds by meaning and by words too."""
    found = retrieve(store, "buoy")
    return {hit["source"] for hit in found if {"dense", "bm25"} <= set(hit["ranks"])}


def test_what_is_new_is_embedded_and_uploads_stay(args, tmp_path):
    def update(uploaded=False, **documents):
        with patch.object(rag, "embed", wraps=rag.embed) as embed:
            store.update({name: [text] for name, text in documents.items()}, uploaded)
        return sum(len(call.args[0]) for call in embed.mock_calls), "".join(sorted(held(store)))

    store = opened(args, index=tmp_path / "rag.db")
    docs = {name: f"The buoy of {name} is red." for name in "abc"}
    assert update(**docs) == (3, "abc")
    assert update(uploaded=True, d="The buoy of d is red.") == (1, "abcd")
    assert update(**docs) == (0, "abcd")
    assert update(a=docs["a"], b="The buoy of b is green.") == (1, "abd")
    store.db.close()
    store = opened(args, index=tmp_path / "rag.db")
    assert (store.size, "".join(sorted(held(store)))) == (3, "abd")


def one_line(done, *said):
    """Whether a run ended with exit code 2 and a line on stderr."""
    lines = [line for line in done.err.splitlines() if "error: " in line]
    assert (done.code, done.out, len(lines)) == (2, "", 1), done
    assert not [text for text in said if str(text) not in lines[0]], lines


@pytest.mark.parametrize("kind", ["text", "database"])
def test_what_is_no_index_of_ours_is_refused_and_left_as_it_is(ask, notes, tmp_path, kind):
    theirs = tmp_path / "theirs"
    theirs.write_text("mine " * 200)
    if kind == "database":
        theirs.unlink()
        with sqlite3.connect(theirs) as database:
            database.execute("CREATE TABLE mine (text)")
        database.close()
    before = theirs.read_bytes()
    for docs in ((), ("--docs", notes)):
        one_line(ask("--retrieve-only", "--index", theirs, *docs, "dam"), theirs)
    assert theirs.read_bytes() == before


def test_what_is_wrong_with_an_index_is_told_in_a_line(ask, args, notes, tmp_path):
    index = tmp_path / "rag.db"
    run = ("--retrieve-only", "dam", "--index", index)
    one_line(ask(*run), index, "No such file")
    store = opened(args, index=index)
    store.update({"a.md": ["A dam."]})
    one_line(ask(*run, "--docs", notes), index, "database is locked")
    store.db.close()
    one_line(ask(*run, "--embed-model", MODEL_FOLDER), "--embed-model all-MiniLM-L6-v2")
    index.write_bytes(index.read_bytes()[:5000])
    one_line(ask(*run), index)


def test_questions_of_any_length_are_answered_with_the_fields_of_the_collection(llm, ask):
    done = ask("--json", QUESTION, CUP, "flour " * 1_000)
    cut = "the embedder reads only 256 tokens of this question\n"
    assert (done.code, done.err) == (0, f"index: 3 chunks\n{cut}")
    assert [record["refused"] for record in done.records] == [False, True, False]
    told = done.records[0]
    names = "question answer refused error sources model embed_model usage seconds"
    assert list(told) == [*names.split(), "queries"]
    assert (SIEVE in told["answer"], told["model"], told["error"]) == (True, "gpt-4o", None)
    assert set(told["seconds"]) == {"load", "index", "retrieve", "first_token", "generate"}
    assert len(llm.chat_requests) == 3  # none was asked twice


def test_the_llm_is_the_one_with_a_key_then_ollama_then_none(ask, request, monkeypatch):
    done = ask("--expand", "2", QUESTION)
    assert re.search(rf'^Answer: .*"[^"]*{SIEVE}[^"]*" \[1\]$', done.out, re.M)
    assert "the best sentences are quoted, without an LLM" in done.err
    ollama = request.getfixturevalue("ollama")
    assert SIEVE in ask(QUESTION).out
    assert ollama.chat_requests[0].json["reasoning_effort"] == "none"
    one_line(ask("--model", "none", QUESTION), "ollama pull none")
    llm = request.getfixturevalue("llm")
    monkeypatch.delenv("OPENAI_API_KEY")
    done = ask("--show-prompt", QUESTION)
    assert re.search(rf"^Answer: .*{SIEVE}.*\[1\]$", done.out, re.M)
    sent = llm.chat_requests[0].json
    assert (sent["model"], sent["system"]) == ("claude-sonnet-4-6", rag.SYSTEM_PROMPT)
    assert sent["messages"][0]["content"] in done.err


@pytest.mark.parametrize("fault", [{"cut_after": 3}, {"error_after": 3}])
def test_a_reply_that_breaks_off_is_kept_and_exit_1(llm, ask, fault):
    llm.fail(**fault)
    done = ask("--json", QUESTION, QUESTION)
    assert [bool(record["error"]) for record in done.records] == [True, False]
    assert (done.code, done.records[0]["answer"]) == (1, "Error E47 means")
    llm.fail(**fault)
    done = ask("--llm", "claude", QUESTION)
    assert (done.code, done.err.count("\n")) == (1, 2)
    assert done.out.endswith("\nAnswer: Error E47 means\n")


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ("--llm openai x", "OPENAI_API_KEY"),
        ("--retrieve-only --chunk-tokens 16 x", "overlap"),
        ("--host 0.0.0.0", "RAG_API_KEY"),
        ("--retrieve-only --embed-model /no x", "/no"),
        ("--retrieve-only --reranker cross-encoder --rerank-model /no x", "/no"),
        ("pyproject.toml", "use --docs for each path"),
        ("--retrieve-only --port {taken}", "in use"),
    ],
)
def test_what_the_user_can_mend_is_told_in_a_line(ask, args, text):
    with socket.create_server(("127.0.0.1", 0)) as server:
        one_line(ask(*args.format(taken=server.getsockname()[1]).split()), text)


def test_usage_errors_load_nothing_heavy():
    done = run_light("rag_hybrid_fastapi", "--docs", "/no", "x", heavy=HEAVY - {"fastapi"})
    assert done.returncode == 2, done.stderr
