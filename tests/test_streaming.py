"""rag_streaming.py: tokens as they come, streams that break, questions on stdin, and the chat."""

# ruff: noqa: D103 - the names of the tests are their docstrings

import io
import os
import pty
import select
import sys
import threading
import time

import pytest
from conftest import ROOT, environment
from fake_llm import extractive_reply
from test_contract import CUP, FERRY, LIGHTHOUSE, call

import rag_streaming as rag

ANSWER = "Skarn's lighthouse was first lit in 1874. [1]"


@pytest.fixture
def stdin(monkeypatch):
    def stdin(text, is_terminal=False):
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        monkeypatch.setattr(sys.stdin, "isatty", lambda: is_terminal)

    return stdin


@pytest.fixture
def ask(llm, capsys):
    return lambda *args: call(rag, capsys, *args)


def rewrite_or_answer(request):
    """Answer from passages; a request without any wants the question in other words."""
    return extractive_reply(request) if "<passage" in str(request) else FERRY


# --- tokens ---


def test_each_token_is_printed_as_it_comes(llm, monkeypatch):
    llm.token_delay = 0.05
    reading, writing = os.pipe()
    reads = []

    def read():
        while data := os.read(reading, 65_536):
            reads.append((time.monotonic(), data))

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(writing, "w") as pipe:  # with a buffer, as any program's stdout
        monkeypatch.setattr(sys, "stdout", pipe)
        assert rag.main([LIGHTHOUSE]) == 0
    reader.join()
    os.close(reading)
    assert b"".join(data for _, data in reads).endswith(f"\nAnswer: {ANSWER}\n".encode())
    finished = llm.chat_requests[0].finished
    assert sum(seen < finished for seen, _ in reads) >= 5  # of 8 words


def test_json_has_the_time_of_the_first_token(ask, llm):
    llm.token_delay = 0.05
    [record] = ask("--json", LIGHTHOUSE).records
    assert 0.05 <= record["seconds"]["first_token"] < record["seconds"]["generate"] - 0.3


BEGUN = "Skarn's lighthouse was"
PIECE = f'data: {{"choices": [{{"index": 0, "delta": {{"content": "{BEGUN}"}}}}]}}\n\n'
BROKEN = {
    "just ends": {"body": PIECE, "content_type": "text/event-stream"},
    "is cut": {"cut_after": 3},
    "turns into an error": {"error_after": 3},
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_stream_that_breaks_is_an_error_and_what_came_of_it_is_kept(ask, llm, how):
    llm.fail(path="/chat", containing=LIGHTHOUSE, times=None, **BROKEN[how])
    done = ask("--json", LIGHTHOUSE, FERRY)
    broken, answered = done.records
    assert (done.code, broken["answer"], bool(broken["error"])) == (1, BEGUN, True)
    assert "55 minutes" in answered["answer"]
    assert f"Answer: {BEGUN}\n" in ask(LIGHTHOUSE).out


def test_stdin_has_a_question_a_line_if_none_is_given(ask, stdin):
    for text, args, asked in (
        (f"{LIGHTHOUSE}\r\n\n  \n{FERRY}", [], [LIGHTHOUSE, FERRY]),
        ("", [], rag.QUESTIONS),
        (FERRY, [CUP], [CUP]),
    ):
        stdin(text)
        assert [record["question"] for record in ask("--json", *args).records] == asked


# --- chat ---


def test_a_failure_ends_a_turn_and_not_the_chat(ask, llm, stdin):
    llm.fail(path="/chat", containing=LIGHTHOUSE, status=400)
    stdin(f"{LIGHTHOUSE}\n{FERRY}\n", is_terminal=True)
    done = ask()
    assert (done.code, done.err.count("error: "), "55 minutes" in done.out) == (1, 1, True)
    assert len(llm.chat_requests) == 2  # a turn without an answer is no history


def test_only_the_last_turns_are_sent_again(ask, llm, stdin):
    llm.reply = rewrite_or_answer
    stdin(f"{CUP}\n" + f"{LIGHTHOUSE}\n" * 9, is_terminal=True)
    assert ask().code == 0
    sizes = [len(request.text) for request in llm.chat_requests]
    assert sizes[2] < sizes[4] < sizes[-3] == sizes[-1]
    assert CUP not in llm.chat_requests[-1].text


def test_a_chat_on_a_terminal(llm):
    llm.reply = rewrite_or_answer
    process, terminal = pty.fork()
    if process == 0:  # dumb: bracketed paste would wrap every prompt in escapes
        command = [sys.executable, str(ROOT / "rag_streaming.py")]
        os.execve(command[0], command, environment({"TERM": "dumb"}))

    def type_and_wait(typed, text):
        os.write(terminal, typed.encode())
        shown = ""
        while text not in shown:
            assert select.select([terminal], [], [], 60)[0], f"waits for {text}: {shown}"
            shown += os.read(terminal, 65_536).decode().replace("\r\n", "\n")
        return shown

    assert "Ctrl-D leaves" in type_and_wait("", "\n> ")
    llm.token_delay = 1
    type_and_wait(f"{LIGHTHOUSE}\n", "Answer: Skarn's lighthouse")
    assert "1874" not in type_and_wait("\x03", "\n> ")
    llm.token_delay = 0
    assert "takes 55 minutes. [1]\n" in type_and_wait("And how long is it?\n", "\n> ")
    assert llm.embedded_texts[-1] == FERRY
    _, rewrite, answer = llm.chat_requests
    assert LIGHTHOUSE in rewrite.text
    assert "And how long is it?" in rewrite.text
    _, asked, said, prompt = [message["content"] for message in answer.json["messages"]]
    assert (asked, prompt.endswith(f"Question: {FERRY}")) == (LIGHTHOUSE, True)
    assert ANSWER.startswith(said.strip()), "what came before the Ctrl-C"
    os.write(terminal, b"\x04")
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    os.close(terminal)
