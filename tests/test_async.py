"""rag_async.py: many questions at once, their file, and --out, which is resumed."""

# ruff: noqa: D103 - the names of the tests are their docstrings

import io
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, environment, wait_for
from test_contract import call

import rag_async as rag

QUESTIONS = [f"When was buoy {n} laid?" for n in range(1, 13)]
ANSWERS = {q: f"Buoy {n} was laid in {n + 1800}. [1]" for n, q in enumerate(QUESTIONS, 1)}
ALL = ("--docs", "docs.txt", "--questions", "questions.txt", "--top-k", "1")
OUT = (*ALL, "--out", "out.jsonl")


@pytest.fixture
def ask(llm, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("docs.txt").write_text("\n\n".join(text.ljust(700, ".") for text in ANSWERS.values()))
    Path("questions.txt").write_text("\n".join(QUESTIONS))
    return lambda *args: call(rag, capsys, *args)


def written():
    """Return the records of --out, whose lines are all whole."""
    return [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]


def answers(records):
    return {record["question"]: record["answer"] for record in records if not record["error"]}


def asked(llm):
    """Return and forget which questions the LLM was asked."""
    texts = [request.text.rpartition("Question: ")[2] for request in llm.chat_requests]
    llm.requests.clear()
    return sorted(texts, key=QUESTIONS.index)


# --- at once ---


@pytest.mark.parametrize("count", [0, 1, 4])
def test_as_many_answers_as_concurrency_says_are_under_way_and_no_more(ask, llm, count):
    llm.delay = 0.1
    done = ask(*ALL, "--json", "--concurrency", count)
    assert (done.code, answers(done.records)) == (0, ANSWERS)
    assert llm.most_simultaneous_chats == (count or 1)


@pytest.mark.parametrize("args", [[], ["--json"]])
def test_stdout_has_the_order_of_the_questions(ask, llm, args):
    llm.fail(path="/chat", containing=QUESTIONS[0], delay=0.3)
    assert re.findall(r"When was buoy \d+ laid\?", ask(*ALL, *args).out) == QUESTIONS


def test_one_failure_does_not_stop_the_others_and_is_asked_again(ask, llm):
    too_long = "buoy " * 9_000  # for the embedder
    Path("questions.txt").write_text("\n".join([*QUESTIONS[:6], too_long, *QUESTIONS[6:]]))
    llm.fail(path="/chat", containing=QUESTIONS[4], status=400)
    assert ask(*OUT).code == 1
    failed = [record["question"] for record in written() if record["error"]]
    assert sorted(failed, key=len) == [QUESTIONS[4], too_long.strip()]
    assert asked(llm) == QUESTIONS
    assert (ask(*OUT).code, asked(llm), answers(written())) == (1, [QUESTIONS[4]], ANSWERS)


def test_a_rate_limit_is_waited_out_for_as_long_as_the_service_says(ask, llm):
    llm.fail(path="/chat", status=429, headers={"Retry-After": "1"})
    assert ask(*OUT).code == 0
    limited = next(request for request in llm.chat_requests if request.status == 429)
    again = [request.received for request in llm.chat_requests if request.text == limited.text]
    assert 1 <= again[-1] - limited.finished < 3
    assert answers(written()) == ANSWERS


# --- the file of questions ---


def test_questions_are_lines_of_a_file_in_any_encoding_or_of_stdin(ask, monkeypatch):
    Path("utf-8").write_bytes("\ufeffWho?\r\n\r\n  Où? \r\n".encode())
    Path("windows").write_bytes("Who?\r\nOù?".encode("cp1252"))
    monkeypatch.setattr(sys, "stdin", io.StringIO("Who?\nOù?\n"))
    for file in ("utf-8", "windows", "-"):
        records = ask("--retrieve-only", "--json", "First?", "--questions", file).records
        assert [record["question"] for record in records] == ["First?", "Who?", "Où?"]


@pytest.mark.parametrize(
    ("name", "hint"),
    [("empty", "empty: there is no text"), ("no/such", "No such file .*'no/such'")],
)
def test_a_file_of_questions_that_is_empty_or_missing_is_exit_2(ask, llm, name, hint):
    Path("empty").write_text("\n")
    done = ask("--questions", name)
    assert (done.code, done.out, llm.requests) == (2, "", [])
    assert re.search(hint, done.err.splitlines()[-1])


# --- going on ---


def test_a_finished_run_asks_nothing_and_a_torn_line_is_asked_again(ask, llm):
    assert (ask(*OUT, "--concurrency", 1).out, answers(written())) == ("", ANSWERS)
    assert asked(llm) == QUESTIONS
    whole = Path("out.jsonl").read_bytes()
    assert (ask(*OUT).code, asked(llm)) == (0, [])
    assert Path("out.jsonl").read_bytes() == whole
    rest = whole[whole.index(b"\n") + 1 :]  # so that there is something to ask in any case
    for torn in (rest[:-1], rest[: rest.rindex(b"\n{") + 40]):
        Path("out.jsonl").write_bytes(torn)
        assert ask(*OUT).code == 0
        assert {QUESTIONS[0]} <= set(asked(llm)) <= {QUESTIONS[0], QUESTIONS[-1]}
        assert answers(written()) == ANSWERS


@pytest.mark.parametrize(
    "content",
    [
        "Dear",
        "Dear diary,\nI am",
        '{"id": 3}\n',
        "[]\n",
        '{"question": "?", "id": 7}',
        '{"question": "?", "answer": "!"}\n',  # as rag_compare.py reads it
    ],
)
def test_an_out_that_is_something_else_is_refused_and_left_as_it_was(ask, llm, content):
    Path("out.jsonl").write_text(content)
    done = ask(*OUT)
    assert (done.code, done.out, llm.chat_requests) == (2, "", [])
    assert "out.jsonl, line 1 is not an answer: " in done.err
    assert Path("out.jsonl").read_text() == content


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_ended_keeps_its_answers(ask, llm, number):
    for question in QUESTIONS[6:]:
        llm.fail(path="/chat", containing=question, delay=60)
    command = [sys.executable, ROOT / "rag_async.py", *OUT, "--concurrency", "7"]
    with subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True) as process:
        wait_for(lambda: Path("out.jsonl").exists() and len(written()) == 6)
        process.send_signal(number)
        assert not re.search("Traceback|never retrieved|destroyed", process.communicate()[1])
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    llm.recover()
    asked(llm)
    assert (ask(*OUT).code, asked(llm), answers(written())) == (0, QUESTIONS[6:], ANSWERS)
