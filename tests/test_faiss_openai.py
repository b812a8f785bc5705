"""rag_faiss_openai.py with the real SDKs; the services are replaced at the wire."""

# ruff: noqa: D103 - the names of the tests are their docstrings

import errno
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

import anthropic
import fake_llm
import numpy as np
import openai
import pytest
from conftest import ROOT, environment
from nursery import Nursery, wait_for

import rag_faiss_openai as rag

SCRIPT = "rag_faiss_openai.py"
QUESTION = "When was the lighthouse lit for the first time?"
LINES = [f"Beaver number {n} built a dam of {n * 7} logs." for n in range(400)]


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    """The SDKs' retries, without the seconds between them."""
    for sdk in (openai, anthropic):
        monkeypatch.setattr(sdk._base_client, "INITIAL_RETRY_DELAY", 0.01)
        monkeypatch.setattr(sdk._base_client, "MAX_RETRY_DELAY", 0.02)


@pytest.fixture
def ask(llm, capsys):
    """Call main as the command line does: its exit code, stdout and stderr."""

    def ask(*args, module=rag):
        capsys.readouterr()
        try:
            code = module.main([str(arg) for arg in args])
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return code, out, err

    return ask


def options(*args):
    return rag.parse_arguments([str(arg) for arg in args])


def whole(folder):
    """Open an index; fail unless each chunk's vector is its own."""
    index = rag.load_index(options("--index", folder))
    assert index
    for row, chunk in enumerate(index.chunks):
        expected = fake_llm.embed_text(chunk.text, rag.EMBED_MODEL, 1536)
        np.testing.assert_allclose(index.vectors.reconstruct(row), expected, atol=1e-5)
    return index


# --- answers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("args", [[], ["--llm", "claude"]], ids=["gpt", "claude"])
def test_the_demonstration_answers_all_but_the_last_question(ask, llm, args):
    code, out, err = ask(*args)
    assert code == 0
    assert [f"Question: {question}" in out for question in rag.DEMO_QUESTIONS] == [True] * 4
    answers = re.findall(r"^Answer: (.*)$", out, re.M)
    assert len(answers) == 4
    assert "October 1874" in answers[0]
    assert "a dog's ticket is 3 pounds" in " ".join(out.split())
    assert "Una Marwick" in answers[2]
    assert answers[3] == rag.REFUSAL
    assert re.search(r"\[1\] 0\.\d\d  sample", out)
    assert "index: 3 chunks added, 0 reused, 0 removed" in err
    assert {r.dialect for r in llm.chat_requests} == {"anthropic" if args else "openai"}
    assert {r.status for r in llm.requests} == {200}


def test_json_is_what_the_design_says(ask, samples):
    pdf = samples / "comet.pdf"
    questions = ["Who saw the comet Brindle in 1811?", "What is the doctor called?"]
    code, out, _ = ask("--docs", pdf, "--json", *questions)
    assert code == 0
    first, second = map(json.loads, out.splitlines())
    for told, question in zip((first, second), questions, strict=True):
        keys = [
            "question",
            "answer",
            "refused",
            "error",
            "sources",
            "model",
            "embed_model",
            "usage",
            "seconds",
        ]
        assert list(told) == keys
        assert told["question"] == question
        assert (told["model"], told["embed_model"]) == ("gpt-4o", "text-embedding-3-small")
        assert list(told["seconds"]) == ["load", "index", "retrieve", "first_token", "generate"]
        assert told["seconds"].pop("first_token") is None
        assert all(type(value) is float and value >= 0 for value in told["seconds"].values())
        assert set(told["usage"]) == {"input_tokens", "output_tokens"}
        assert all(type(value) is int and value > 0 for value in told["usage"].values())
        assert [source["n"] for source in told["sources"]] == [1, 2]
        for source in told["sources"]:
            assert set(source) == {"n", "source", "page", "score", "text"}
            assert source["source"] == str(pdf)
            assert -1.001 <= source["score"] <= 1.001
        scores = [source["score"] for source in told["sources"]]
        assert scores == sorted(scores, reverse=True)
        assert told["error"] is None
    assert first["sources"][0]["page"] == 1
    assert "Odda Renfrey" in first["answer"]
    assert (first["refused"], second["refused"]) == (False, True)
    assert second["answer"] == rag.REFUSAL


def test_retrieve_only_shows_passages_and_calls_no_llm(ask, llm, monkeypatch):
    monkeypatch.delenv("ANTHROPIC_API_KEY")
    code, out, _ = ask("--retrieve-only", "--llm", "claude", "--json", QUESTION)
    told = json.loads(out)
    assert (code, told["answer"], told["usage"], told["refused"]) == (0, None, None, False)
    assert "1874" in told["sources"][0]["text"]
    assert llm.chat_requests == []


@pytest.mark.parametrize("service", ["openai", "claude"])
def test_show_prompt_shows_what_is_sent(ask, llm, service):
    code, out, err = ask("--llm", service, "--show-prompt", QUESTION)
    assert code == 0
    assert "passage-" not in out
    shown = json.loads(err[err.index("{\n") : err.rindex("}") + 1])
    assert [shown] == [request.json for request in llm.chat_requests]


def test_the_score_is_the_cosine_of_question_and_passage(ask):
    told = json.loads(ask("--retrieve-only", "--json", QUESTION)[1])
    query = np.array(fake_llm.embed_text(QUESTION, rag.EMBED_MODEL, 1536))
    for source in told["sources"]:
        cosine = query @ np.array(fake_llm.embed_text(source["text"], rag.EMBED_MODEL, 1536))
        assert source["score"] == pytest.approx(cosine, abs=1e-5)


# --- embedding in few requests -------------------------------------------------------------------

DENSE = ["".join(random.Random(n).choices("!?;<>{}7Zq§", k=700)) for n in range(900)]
BATCHES = {
    "10,000 short": ([f"Note {n}" for n in range(10_000)], 10, 0),
    "2,500 long": (["The beaver of Aldermoor built. " * 25 + str(n) for n in range(2_500)], 4, 0),
    "dense": (DENSE, 7, 1),
}


@pytest.mark.parametrize("name", BATCHES)
def test_many_chunks_are_embedded_in_a_handful_of_requests(llm, name):
    texts, most, refused = BATCHES[name]
    chunks = [rag.Chunk(text, "a.txt") for text in texts]
    index = rag.build_index(chunks, options())
    statuses = [request.status for request in llm.embedding_requests]
    assert len(statuses) <= most
    assert (400 in statuses) == bool(refused), "whether the halving was needed"
    assert llm.embedded_texts == texts
    for n in random.Random(1).sample(range(len(texts)), 20):  # each vector is its own chunk's
        expected = fake_llm.embed_text(texts[n], rag.EMBED_MODEL, 1536)
        np.testing.assert_allclose(index.vectors.reconstruct(n), expected, atol=1e-5)
    assert rag.retrieve(texts[-1], index, options())[0].score == pytest.approx(1, abs=1e-4)


# --- the index that is kept ----------------------------------------------------------------------


def indexed(ask, llm, folder, notes, expected=0):
    """Index the notes; return what was embedded (but the question), and stderr."""
    before = len(llm.embedded_texts)
    code, _, err = ask("--index", folder, "--docs", notes, "--retrieve-only", "praised")
    assert code == expected, err
    return [text for text in llm.embedded_texts[before:] if text != "praised"], err


def test_later_runs_embed_only_what_has_changed(ask, llm, notes, tmp_path):
    kept = tmp_path / "index"
    texts, err = indexed(ask, llm, kept, notes)
    assert (len(texts), "3 chunks added, 0 reused, 0 removed" in err) == (3, True)
    texts, err = indexed(ask, llm, kept, notes)
    assert (texts, "0 chunks added, 3 reused, 0 removed" in err) == ([], True)

    (notes / "dam.txt").write_text("The dam has burst.")
    texts, err = indexed(ask, llm, kept, notes)
    assert (texts, "1 chunks added, 2 reused, 1 removed" in err) == (["The dam has burst."], True)

    (notes / "ferry.txt").rename(notes / "boat.txt")
    texts, err = indexed(ask, llm, kept, notes)
    assert texts == []
    assert {Path(c.source).name for c in whole(kept).chunks} == {"boat.txt", "dam.txt", "honey.txt"}

    (notes / "honey.txt").unlink()
    texts, err = indexed(ask, llm, kept, notes)
    assert (texts, "0 chunks added, 2 reused, 1 removed" in err) == ([], True)
    assert len(whole(kept).chunks) == 2

    before = len(llm.embedded_texts)
    code, out, _ = ask("--index", kept, "--retrieve-only", "--json", "Which dam has burst?")
    assert (code, json.loads(out)["sources"][0]["text"]) == (0, "The dam has burst.")
    assert llm.embedded_texts[before:] == ["Which dam has burst?"]
    assert {f.name for f in kept.iterdir()} <= {
        *("manifest.json", "index.faiss", "index-b.faiss", ".lock"),
    }


SETUP = """
import anthropic, bs4, docx2txt, faiss, numpy, openai, openai.resources, pypdf
import rag_faiss_openai as rag
rag.BLOCK = 20
"""


@pytest.fixture(scope="module")
def nursery(tmp_path_factory):
    """Forks runs that index in blocks of 20 chunks."""
    nursery = Nursery(tmp_path_factory.mktemp("nursery"), SETUP)
    yield nursery
    nursery.close()


def test_a_run_that_is_killed_leaves_a_whole_index_and_is_resumed(llm, tmp_path, nursery):
    docs, kept, dice, block = tmp_path / "docs", tmp_path / "index", random.Random(7), 20
    docs.mkdir()

    def write(version, numbers):
        for n in numbers:
            (docs / f"{n}.txt").write_text(f"Version {version}. {LINES[n]}")

    args = ("--index", kept, "--docs", docs, "--retrieve-only", "praised")
    write(1, range(40))
    assert nursery.wait(nursery.start(*args))[0] == 0
    old = whole(kept).chunks
    write(2, range(400))
    llm.fail(path="/embeddings", delay=0.03, times=None)
    first = len(llm.embedded_texts)
    kills = 0
    for _ in range(10):
        seen = len(llm.embedding_requests)
        process = nursery.start(*args)
        wait_for(lambda s=seen: len(llm.embedding_requests) > s)
        time.sleep(dice.random() * 0.15)
        os.kill(process, signal.SIGKILL)
        code, err = nursery.wait(process)
        assert code in (0, -signal.SIGKILL), err
        kills += code != 0
        chunks = whole(kept).chunks
        assert chunks == old or len(chunks) == 400
    assert kills >= 5, "the test kills too late"
    code, err = nursery.wait(nursery.start(*args))
    assert code == 0, err
    assert sorted(c.text for c in whole(kept).chunks) == sorted(
        f"Version 2. {line}" for line in LINES
    )
    texts = [text for text in llm.embedded_texts[first:] if text != "praised"]
    assert len(set(texts)) == 400
    assert len(texts) - len(set(texts)) <= kills * block
    assert not list(kept.glob("block-*")), "nothing is left over"


def test_two_runs_at_once_lose_nothing(llm, notes, tmp_path, nursery):
    kept = tmp_path / "index"
    llm.fail(path="/embeddings", delay=0.5, times=None)
    args = ("--index", kept, "--docs", notes, "--retrieve-only", "praised")
    both = [nursery.start(*args), nursery.start(*args)]
    ended = [nursery.wait(process) for process in both]
    codes = sorted(code for code, _ in ended)
    assert codes in ([0, 2], [0, 0])
    if codes == [0, 2]:
        assert any("another run is at work there, try again" in err for _, err in ended)
    assert len(whole(kept).chunks) == 3


def test_an_index_that_is_being_written_is_refused(ask, notes, tmp_path):
    from filelock import FileLock

    kept = tmp_path / "index"
    kept.mkdir()
    with FileLock(kept / ".lock"):
        code, _, err = ask("--index", kept, "--docs", notes, "praised")
    assert (code, err.startswith("error: another run is at work there")) == (2, True)
    assert ask("--index", kept, "--docs", notes, "praised")[0] == 0


def cut_vectors(folder):
    [file] = folder.glob("index*.faiss")
    file.write_bytes(file.read_bytes()[:100])


def drop_a_chunk(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["chunks"].pop()
    (folder / "manifest.json").write_text(json.dumps(manifest))


DAMAGES = {
    "vectors cut short": cut_vectors,
    "vectors gone": lambda folder: [file.unlink() for file in folder.glob("index*.faiss")],
    "manifest cut short": lambda f: (f / "manifest.json").write_text('{"kind": "faiss", '),
    "manifest of another shape": lambda f: (f / "manifest.json").write_text("[1, 2]"),
    "manifest no text": lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe\0\x81"),
    "a chunk missing": drop_a_chunk,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_index_is_refused_with_what_to_do(ask, llm, notes, tmp_path, damage):
    kept = tmp_path / "index"
    indexed(ask, llm, kept, notes)
    DAMAGES[damage](kept)
    before = {file.name: file.read_bytes() for file in kept.iterdir()}
    for more in ([], ["--docs", notes]):
        code, out, err = ask("--index", kept, *more, "praised")
        assert (code, out) == (2, "")
        assert f"error: {kept} is damaged: remove it, and index again" in err
    assert {file.name: file.read_bytes() for file in kept.iterdir()} == before


def test_the_index_of_another_embedder_is_refused(ask, llm, notes, tmp_path):
    kept = tmp_path / "index"
    indexed(ask, llm, kept, notes)
    for more in ([], ["--docs", notes]):
        code, out, err = ask("--index", kept, "--embed-model", "text-embedding-3-large", *more, "x")
        assert (code, out) == (2, "")
        assert "was made with faiss and text-embedding-3-small: type --embed-model" in err
        assert "--embed-model text-embedding-3-small" in err
    assert len(whole(kept).chunks) == 3


@pytest.mark.parametrize("name", ["diary.txt", "manifest.json"])
def test_a_folder_of_something_else_is_left_alone(ask, notes, tmp_path, name):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / name).write_text('{"mine": 1}')
    code, _, err = ask("--index", foreign, "--docs", notes, "praised")
    assert (code, str(foreign) in err) == (2, True)
    assert [(f.name, f.read_text()) for f in foreign.iterdir()] == [(name, '{"mine": 1}')]


@pytest.mark.skipif(os.geteuid() != 0, reason="takes root to become nobody for a moment")
def test_a_folder_that_may_not_be_written_is_an_error_of_the_user(ask, llm):
    with tempfile.TemporaryDirectory() as parent:
        Path(parent).chmod(0o755)
        kept, old, new_text = (Path(parent, name) for name in ("index", "old.md", "new.md"))
        old.write_text("The dam holds.")
        new_text.write_text("The dam has burst.")
        assert ask("--index", kept, "--docs", old, "--retrieve-only", "x y")[0] == 0
        for file in (kept, *kept.iterdir()):
            file.chmod(0o555 if file.is_dir() else 0o444)
        try:
            os.seteuid(65534)
            denied = ask("--index", kept, "--docs", new_text, "--retrieve-only", "x y")
            new = ask("--index", Path(parent, "new"), "--docs", old, "--retrieve-only", "x")
            reading = ask("--index", kept, "--retrieve-only", "x y")
        finally:
            os.seteuid(0)
    for code, _, err in (denied, new):
        assert code == 2, err
        assert "Permission denied" in err
    assert reading[0] == 0, "asking a kept index writes nothing"


@pytest.mark.parametrize("place", ["faiss.write_index", "numpy.savez", "pathlib.Path.write_text"])
def test_a_full_disk_leaves_the_old_index_whole(ask, llm, notes, tmp_path, monkeypatch, place):
    kept = tmp_path / "index"
    indexed(ask, llm, kept, notes)
    (notes / "dam.txt").write_text("The dam has burst.")

    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(place, full)
        _, err = indexed(ask, llm, kept, notes, expected=2)
    assert "No space left on device" in err
    assert "The dam has burst." not in [chunk.text for chunk in whole(kept).chunks]
    indexed(ask, llm, kept, notes)
    assert "The dam has burst." in [chunk.text for chunk in whole(kept).chunks]


# --- what the user gives -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "hint"),
    [
        ([""], "a question has 1 to 4000 characters"),
        ([" \n\t"], "a question has 1 to 4000 characters"),
        (["x" * 100_000], "a question has 1 to 4000 characters"),
        (["--top-k", "0", "x"], "--top-k must be 1 or more"),
        (["--top-k", "-1", "x"], "--top-k must be 1 or more"),
        (["--top-k", "four", "x"], "invalid int value: 'four'"),
        (["--llm", "bard", "x"], "invalid choice: 'bard'"),
        ([__file__], "is a file, not a question"),
        (["--docs", "/no/such/folder", "x"], "no such file or folder: /no/such/folder"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_a_wrong_argument_is_exit_2_with_a_hint(ask, llm, args, hint):
    code, out, err = ask(*args)
    assert (code, out) == (2, "")
    assert hint in err
    assert llm.requests == []


def test_more_passages_than_there_are_is_all_of_them(ask):
    code, out, _ = ask("--top-k", "1000", "--json", QUESTION)
    assert (code, len(json.loads(out)["sources"])) == (0, 3)


@pytest.mark.parametrize("key", [None, "", "sk-secret\n", "sk-secret x", "sk-sécret"])
@pytest.mark.parametrize("service", ["openai", "claude"])
def test_a_key_that_is_missing_or_broken_is_named_and_never_shown(
    ask, llm, monkeypatch, key, service
):
    variable = {"openai": "OPENAI_API_KEY", "claude": "ANTHROPIC_API_KEY"}[service]
    monkeypatch.delenv(variable)
    if key is not None:
        monkeypatch.setenv(variable, key)
    code, out, err = ask("--llm", service, QUESTION)
    assert (code, out, llm.requests) == (2, "", [])
    assert f"{variable} is not set, or has blanks in it: export {variable}=" in err
    assert "sk-" not in err


# --- services that fail --------------------------------------------------------------------------

HTML = {"body": "<html><h1>It works!</h1></html>"}
FAILURES = {
    "401": ({"status": 401}, 2, "the service refused the key (HTTP 401)"),
    "403": ({"status": 403}, 2, "the service refused the key (HTTP 403)"),
    "429": ({"status": 429, "headers": {"Retry-After": "0.01"}}, 1, "429"),
    "500": ({"status": 500}, 1, "500"),
    "html-200": (HTML, 1, "a service's reply has another format than its API's"),
    "html-502": (HTML | {"status": 502}, 1, "502|Bad Gateway|It works"),
    "dropped": ({"drop": True}, 1, "Connection error"),
}


@pytest.mark.parametrize("name", FAILURES)
@pytest.mark.parametrize("where", ["embeddings", "gpt", "claude"])
def test_a_failing_service_is_one_line_and_an_exit_code(ask, llm, name, where):
    fault, expected, hint = FAILURES[name]
    for path in ["/embeddings"] if where == "embeddings" else ["/chat", "/messages"]:
        llm.fail(path=path, times=None, **fault)
    code, out, err = ask("--llm", "claude" if where == "claude" else "openai", QUESTION)
    assert (code, "Answer:" in out) == (expected, False)
    line = err.splitlines()[-1]
    assert line.startswith("error: ")
    assert hint in line or re.search(hint, line), line
    assert "sk-" not in err


def test_a_model_that_does_not_exist_is_exit_2(ask):
    for option in ("--model", "--embed-model"):
        code, _, err = ask(option, "gpt-17", QUESTION)
        assert (code, "no such model (HTTP 404): change --model" in err) == (2, True)


def test_a_server_that_is_down_is_exit_1(ask, monkeypatch):
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{free.getsockname()[1]}/v1")
    code, out, err = ask(QUESTION)
    assert (code, out) == (1, "")
    assert err.startswith("error: Connection error")


@pytest.mark.parametrize(
    "fault", [{"status": 429, "headers": {"Retry-After": "0.05"}}, {"status": 500}, {"drop": True}]
)
def test_a_service_that_fails_twice_is_asked_again(ask, llm, fault):
    llm.fail(path="/chat", times=2, **fault)
    code, out, _ = ask(QUESTION)
    assert (code, "October 1874" in out, len(llm.chat_requests)) == (0, True, 3)


def test_one_question_that_fails_does_not_stop_the_others(ask, llm):
    llm.fail(path="/chat", containing="Who keeps the bees?", status=500, times=None)
    code, out, _ = ask("--json")
    told = [json.loads(line) for line in out.splitlines()]
    assert code == 1
    assert [bool(answer["error"]) for answer in told] == [False, False, True, False]
    assert (told[2]["answer"], told[2]["usage"], told[2]["refused"]) == (None, None, False)
    assert told[2]["sources"], "what was found is told all the same"


@pytest.mark.parametrize("fault", [{"reply": ""}, {"reply": " \n"}, {"null_content": True}])
@pytest.mark.parametrize("service", ["openai", "claude"])
def test_an_empty_answer_is_an_error(ask, llm, fault, service):
    llm.fail(**fault)
    code, out, err = ask("--llm", service, "--json", QUESTION)
    told = json.loads(out)
    assert (code, told["answer"]) == (1, None)
    assert "the LLM answered nothing" in told["error"]
    assert err.count("\n") == 1


@pytest.mark.parametrize("service", ["openai", "claude"])
def test_a_cut_is_told(ask, llm, service):
    llm.fail(finish_reason="length")
    code, out, err = ask("--llm", service, QUESTION)
    assert (code, "October 1874" in out) == (0, True)
    assert "the answer was cut at 1024 tokens" in err
    llm.fail(prompt_tokens=40)
    code, out, err = ask("--llm", service, QUESTION)
    assert code == 0
    assert re.search("the LLM read only 40 tokens of a longer prompt: .*OLLAMA_CONTEXT_LENGTH", err)
    code, out, err = ask("--llm", service, QUESTION)
    assert err.count("\n") == 1, "and nothing where nothing was cut"


# --- the terminal --------------------------------------------------------------------------------


@pytest.mark.parametrize("args", [[], ["--retrieve-only"], ["--show-prompt"], ["--json"]])
def test_no_control_character_reaches_the_terminal(ask, llm, tmp_path, args):
    path = tmp_path / "evil\x1b]0;title\x07.txt"
    path.write_text(
        "Beavers \x1b[31mbuild\x1b[0m\x07 dams\r and \u202ebackwards\u2069 \x9b2J huts."
    )
    llm.reply = "They build \x1b[2J\x07dams\u202e [1]"
    code, out, err = ask("--docs", path, "--docs", tmp_path, *args, "What \x1b[1mdo beavers build?")
    assert code == 0
    assert "build" in out
    assert re.findall(r"[^\n\t\x20-\x7e\xa0-\u2029\u202f-\u2065\u206a-\uffff]", out + err) == []


def test_ctrl_c_is_exit_130_without_a_traceback(llm, nursery):
    llm.delay = 30
    process = nursery.start(QUESTION)
    wait_for(lambda: llm.chat_requests)
    os.kill(process, signal.SIGINT)
    code, err = nursery.wait(process)
    assert code == 130
    assert "Traceback" not in err


@pytest.mark.parametrize("args", [[], ["--retrieve-only"]], ids=["answers", "passages"])
@pytest.mark.parametrize("buffered", [True, False], ids=["buffered", "unbuffered"])
def test_an_output_that_is_closed_early_is_no_error(llm, args, buffered):
    process = subprocess.Popen(
        [sys.executable, ROOT / SCRIPT, *args],
        env=environment({} if buffered else {"PYTHONUNBUFFERED": "1"}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    assert process.stderr
    llm.delay = 0.3  # so that something is left to print
    process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 0
    assert err == "index: 3 chunks added, 0 reused, 0 removed\n"
    assert len(llm.chat_requests) <= 2, "nobody pays for answers that nobody reads"


def test_the_script_runs_as_a_user_runs_it(run, llm, samples):
    done = run(SCRIPT, "--docs", str(samples), "How many plum trees has the orchard?")
    assert done.returncode == 0, done.stderr
    assert "Answer: The orchard has 212 plum trees." in done.stdout
    assert done.stderr == "index: 7 chunks added, 0 reused, 0 removed\n"
    (samples / "noise.txt").write_bytes(bytes(range(128, 256)) * 40 + b"\0\x81")
    done = run(SCRIPT, "--docs", str(samples / "noise.txt"), "What is it?")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 2, done.stderr


# --- planted faults ------------------------------------------------------------------------------

FAULTS = {
    "nothing": ("", ""),
    "the question embedded with another model": (
        "query = embed([question], args.embed_model)",
        'query = embed([question], "text-embedding-3-large")',
    ),
    "embeddings.acreate": (".embeddings.create(", ".embeddings.acreate("),
    "completions.acreate": (".chat.completions.create(", ".chat.completions.acreate("),
    "messages.acreate": (".messages.create(", ".messages.acreate("),
    "delta.get": ("choice.message.content", 'choice.delta.get("content")'),
    "a chat model that embeds": (
        'EMBED_MODEL = "text-embedding-3-small"',
        'EMBED_MODEL = "gpt-4o"',
    ),
    "no system role": ('"role": "system"', '"role": "instructions"'),
    "no max_tokens for Claude": (', "max_tokens": MAX_ANSWER_TOKENS, "system"', ', "system"'),
    "the farthest first": ("row >= 0]", "row >= 0][::-1]"),
    "passages without the question": ('return f"{prompt}Question: {question}"', "return prompt"),
    "one passage too few": (
        "enumerate(hits, 1):\n        page = f' page",
        "enumerate(hits[1:], 1):\n        page = f' page",
    ),
    "vectors not of unit length": ("return vectors / np", "return vectors * 2 / np"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(ask, fault):
    old, new = FAULTS[fault]
    source = (ROOT / SCRIPT).read_text()
    assert old in source, "the script has changed: plant the fault anew"
    module = types.ModuleType("planted")
    sys.modules["planted"] = module  # where dataclass looks
    module.__file__ = str(ROOT / SCRIPT)
    try:
        exec(compile(source.replace(old, new, 1), "planted.py", "exec"), vars(module))
        works = True
        for service in ("openai", "claude"):
            code, out, _ = ask("--llm", service, "--json", module=module)
            told = [json.loads(line) for line in out.splitlines()]
            wanted = ("October 1874", "", "Una Marwick", rag.REFUSAL)
            works &= code == 0 and all(
                text in (answer["answer"] or "")
                and answer["sources"] == sorted(answer["sources"], key=lambda s: -s["score"])
                and all(-1.001 < source["score"] < 1.001 for source in answer["sources"])
                for text, answer in zip(wanted, told, strict=True)
            )
    finally:
        del sys.modules["planted"]
    assert works == (fault == "nothing")
