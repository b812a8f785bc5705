"""rag_async.py: many questions at once, in few requests, and no answer paid for twice."""

# ruff: noqa: D103 - the names of the tests are their docstrings

import importlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, command, environment

import rag_async as rag

SCRIPT = ROOT / "rag_async.py"
KEYS = ["number", "question", "answer", "refused", "error", "sources", "model", "embed_model"]
KEYS += ["usage", "seconds"]
FACTS = [f"The tram to stop{n} is painted colour{n}." for n in range(1, 13)]
QUESTIONS = [f"What colour is the tram to stop{n} painted?" for n in range(1, 13)]
NO_RETRY = {"x-should-retry": "false"}  # the SDK heeds it: a test need not wait for 12 retries


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder with twelve facts and the questions for them, in which the test runs."""
    monkeypatch.chdir(tmp_path)
    Path("docs").mkdir()
    for n, fact in enumerate(FACTS, 1):
        Path(f"docs/{n}.txt").write_text(fact)
    Path("questions.txt").write_text("\n".join(QUESTIONS) + "\n")
    return tmp_path


ALL = ["--docs", "docs", "--questions", "questions.txt", "--top-k", "2"]
OUT = [*ALL, "--out", "out.jsonl"]


def entries(path="out.jsonl"):
    text = Path(path).read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def asked(llm):
    """The numbers of the questions that the LLM got, in order."""
    texts = [request.text for request in llm.chat_requests]
    return [QUESTIONS.index(text.rpartition("Question: ")[2].split("\n")[0]) + 1 for text in texts]


def fail(llm, number, **fault):
    """Let the answer to a question fail; its embedding does not."""
    llm.fail(path="chat", containing=QUESTIONS[number - 1], **fault)


def is_complete(found):
    """Whether there is a right answer to each question, once."""
    right = {n: f"{fact} [1]" for n, fact in enumerate(FACTS, 1)}
    return len(found) == 12 and {entry["number"]: entry["answer"] for entry in found} == right


def start(*args):
    """Start `uv run rag_async.py` in a process group of its own, as a terminal does."""
    return subprocess.Popen(
        command("rag_async.py", *args),
        env=environment(),
        text=True,
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def wait_for_lines(count, process):
    end = time.monotonic() + 30
    out = Path("out.jsonl")
    while not (out.exists() and out.read_bytes().count(b"\n") >= count):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


# --- asking --------------------------------------------------------------------------------------


def test_the_demonstration_answers_all_questions_but_the_last(llm, capsys):
    assert rag.main(["--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [entry["question"] for entry in found] == rag.DEMO_QUESTIONS
    assert [entry["refused"] for entry in found] == [False] * 7 + [True]


def test_all_questions_are_embedded_in_one_request(llm, files):
    assert rag.main(OUT) == 0
    _documents, questions = llm.embedding_requests
    assert questions.json["input"] == QUESTIONS
    assert is_complete(entries())


def test_more_questions_than_a_request_takes_are_embedded_in_two(llm, files):
    Path("questions.txt").write_text("\n".join(f"stop{n}" for n in range(2100)))
    assert rag.main([*ALL, "--retrieve-only", "--out", "out.jsonl"]) == 0
    assert [len(request.json["input"]) for request in llm.embedding_requests[1:]] == [2048, 52]
    nearest = {e["question"]: e["sources"][0]["text"] for e in entries()}
    assert [nearest[f"stop{n}"] for n in range(1, 13)] == FACTS
    assert llm.chat_requests == []


@pytest.mark.parametrize("count", [1, 4])
def test_as_many_answers_as_concurrency_says_are_under_way_and_no_more(llm, files, count):
    llm.delay = 0.2 if count > 1 else 0.02
    assert rag.main([*OUT, "--concurrency", str(count)]) == 0
    assert llm.most_simultaneous_chats == count
    assert is_complete(entries())


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_stdout_has_the_order_of_the_questions_whichever_is_answered_first(
    llm, files, capsys, form
):
    fail(llm, 1, delay=0.4)
    fail(llm, 6, delay=0.2)
    assert rag.main([*ALL, *form]) == 0
    out = capsys.readouterr().out
    places = [out.index(f"{'' if form else 'Question: '}{question}") for question in QUESTIONS]
    assert places == sorted(places)
    if form:
        assert [json.loads(line)["answer"] for line in out.splitlines()] == [
            f"{fact} [1]" for fact in FACTS
        ]
        assert list(json.loads(out.splitlines()[0])) == KEYS[1:]


def test_an_answer_is_printed_as_soon_as_all_before_it_are_there(llm, files):
    fail(llm, 3, delay=60)
    process = start(*ALL, "--json")
    assert process.stdout
    try:
        lines = [json.loads(process.stdout.readline()) for _ in range(2)]
        assert [line["question"] for line in lines] == QUESTIONS[:2]
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_out_has_whole_lines_as_answers_finish_and_stdout_nothing(llm, files, capsys):
    fail(llm, 1, delay=0.5)
    assert rag.main(OUT) == 0
    found = entries()
    assert [entry["number"] for entry in found][-1] == 1
    assert all(list(entry) == KEYS for entry in found)
    assert list(found[0]["seconds"]) == ["load", "index", "retrieve", "first_token", "generate"]
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines()[-1] == "questions: 12 answered, 0 failed, 0 answered before"
    assert "answering" not in said.err, "stderr is no terminal: no bar"


def test_show_prompt_and_a_kept_index_work_as_in_every_script(llm, files, capsys):
    assert rag.main([*ALL, "--index", "kept", "--show-prompt"]) == 0
    assert capsys.readouterr().err.count('"max_completion_tokens": 1024') == 12
    llm.requests.clear()
    assert rag.main(["--index", "kept", QUESTIONS[0], QUESTIONS[1]]) == 0
    assert [request.json["input"] for request in llm.embedding_requests] == [QUESTIONS[:2]]


# --- the file of questions -----------------------------------------------------------------------


def test_questions_are_read_from_stdin_after_those_of_the_command_line(
    llm, files, monkeypatch, capsys
):
    stdin = io.TextIOWrapper(io.BytesIO("\n".join(QUESTIONS[1:3]).encode()))
    monkeypatch.setattr("sys.stdin", stdin)
    assert rag.main([QUESTIONS[0], "--docs", "docs", "--questions", "-", "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [entry["question"] for entry in found] == QUESTIONS[:3]


def test_questions_are_read_from_json_lines_and_from_windows(files):
    lines = [json.dumps({"id": 7, "question": "Who?\u2028Where?"}, ensure_ascii=False)]
    Path("q.jsonl").write_text("\ufeff" + "\r\n".join([*lines, '{"question": "\\ud800"}', ""]))
    assert rag.read_questions("q.jsonl") == ["Who?\u2028Where?", "?"]
    Path("q.txt").write_bytes(b"Who?\r\n\r\n{odd\r\n\r\n")
    assert rag.read_questions("q.txt") == ["Who?", "", "{odd"]


@pytest.mark.parametrize(
    "line", ['{"text": "Who?"}', '{"question": 3}', '{"question": "Who', '["Who?"]', "Who?"]
)
def test_a_line_without_a_question_is_named_by_its_number(llm, files, capsys, line):
    Path("q.jsonl").write_text('{"question": "Who?"}\n{"question": "Where?"}\n' + line + "\n")
    assert rag.main(["--questions", "q.jsonl", "--out", "out.jsonl"]) == 2
    assert "q.jsonl, line 3: " in capsys.readouterr().err
    assert llm.requests == []


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "no question in q"), (b"Who?\nWh\xff?", "q, line 2: "), (None, "No such file")],
)
def test_a_file_that_holds_no_questions_is_refused(llm, files, capsys, content, words):
    if content is not None:
        Path("q").write_bytes(content)
    assert rag.main(["--questions", "q"]) == 2
    assert words in capsys.readouterr().err
    assert llm.requests == []


def test_an_empty_and_an_overlong_question_fail_alone(llm, files, capsys):
    Path("questions.txt").write_text(f"{QUESTIONS[0]}\n\n{'long ' * 1000}\n{QUESTIONS[1]}\n")
    assert rag.main(OUT) == 1
    found = sorted(entries(), key=lambda entry: entry["number"])
    assert [bool(entry["error"]) for entry in found] == [False, True, True, False]
    assert "1 to 4000 characters" in found[1]["error"]
    assert "questions: 2 answered, 2 failed" in capsys.readouterr().err
    assert llm.embedding_requests[1].json["input"] == QUESTIONS[:2]


def test_a_bad_concurrency_is_a_usage_error(llm, capsys):
    assert rag.main(["--concurrency", "0"]) == 2
    assert "--concurrency must be 1 or more" in capsys.readouterr().err


# --- going on ------------------------------------------------------------------------------------


def test_a_run_that_was_killed_goes_on_where_it_stopped(llm, files):
    llm.delay = 0.3
    process = start(*OUT, "--concurrency", "2")
    wait_for_lines(4, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    before = {entry["number"] for entry in entries()}
    assert 4 <= len(before) < 12
    llm.delay = 0
    llm.requests.clear()
    assert rag.main(OUT) == 0
    assert set(asked(llm)) == set(range(1, 13)) - before
    assert len(asked(llm)) == 12 - len(before)
    assert set(llm.embedding_requests[-1].json["input"]).isdisjoint(
        QUESTIONS[n - 1] for n in before
    )
    assert is_complete(entries())


def test_a_finished_run_asks_nothing_and_embeds_nothing(llm, files, capsys):
    assert rag.main(OUT) == 0
    before = Path("out.jsonl").read_bytes()
    llm.requests.clear()
    assert rag.main(OUT) == 0
    assert llm.requests == []
    assert Path("out.jsonl").read_bytes() == before
    assert "0 answered, 0 failed, 12 answered before" in capsys.readouterr().err


@pytest.mark.parametrize("left", [1, 5, 40, -1])
def test_a_torn_last_line_is_asked_again_and_one_that_only_lacks_its_end_is_not(llm, files, left):
    assert rag.main([*OUT, "--concurrency", "1"]) == 0
    *whole, last = Path("out.jsonl").read_bytes().splitlines(keepends=True)
    Path("out.jsonl").write_bytes(b"".join(whole) + last[:left])
    llm.requests.clear()
    assert rag.main(OUT) == 0
    assert asked(llm) == ([] if left == -1 else [12])
    assert is_complete(entries())


def test_failed_questions_are_asked_again_and_their_lines_replaced(llm, files):
    fail(llm, 4, status=500, headers=NO_RETRY)
    fail(llm, 8, reply="")
    assert rag.main(OUT) == 1
    failed = {entry["number"]: entry["error"] for entry in entries() if entry["error"]}
    assert set(failed) == {4, 8}
    assert "answered nothing" in failed[8]
    llm.requests.clear()
    assert rag.main(OUT) == 0
    assert sorted(asked(llm)) == [4, 8]
    assert is_complete(entries())
    assert sorted(path.name for path in files.glob("out*")) == ["out.jsonl", "out.jsonl.lock"]


def test_what_was_only_retrieved_is_answered_by_a_later_run(llm, files):
    assert rag.main([*OUT, "--retrieve-only"]) == 0
    assert [entry["answer"] for entry in entries()] == [None] * 12
    assert rag.main(OUT) == 0
    assert is_complete(entries())
    assert rag.main([*OUT, "--retrieve-only"]) == 0
    assert is_complete(entries())


def test_added_questions_alone_are_asked(llm, files):
    Path("questions.txt").write_text("\n".join(QUESTIONS[:9]))
    assert rag.main(OUT) == 0
    Path("questions.txt").write_text("\n".join(QUESTIONS))
    llm.requests.clear()
    assert rag.main(OUT) == 0
    assert sorted(asked(llm)) == [10, 11, 12]
    assert is_complete(entries())


LINE = dict.fromkeys(KEYS) | {"number": 1, "question": QUESTIONS[0], "answer": "Red."}
LINE |= {"model": "gpt-4o", "embed_model": "text-embedding-3-small"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("my notes", "line 1, is no answer"),
        ("my notes\n", "line 1, is no answer"),
        (json.dumps(LINE) + '\n{"id": 3}\n', "line 2, is no answer"),
        (json.dumps(LINE) + "\n[]", "line 2, is no answer"),
        (json.dumps(LINE | {"number": "1"}), "line 1, is no answer"),
        ('{"number": 1, "torn\n' + json.dumps(LINE), "line 1, is no answer"),
        (json.dumps(LINE | {"model": "gpt-4o-mini"}), "type --model gpt-4o-mini"),
        (json.dumps(LINE | {"embed_model": "other"}), "--embed-model other"),
        (json.dumps(LINE | {"question": "Who?"}), "line 1, answers another question"),
        (json.dumps(LINE | {"number": 13}), "line 1, answers another question"),
    ],
)
def test_an_out_that_is_not_this_run_s_is_refused_and_left_as_it_is(
    llm, files, capsys, content, words
):
    Path("out.jsonl").write_text(content)
    assert rag.main(OUT) == 2
    assert words in capsys.readouterr().err
    assert Path("out.jsonl").read_text() == content
    assert not Path("out.jsonl.new").exists()
    assert llm.requests == []


def test_an_out_that_is_a_folder_is_refused(llm, files, capsys):
    assert rag.main([*ALL, "--out", "docs"]) == 2
    assert "docs is no file" in capsys.readouterr().err


def test_the_second_of_two_runs_on_one_out_is_refused(llm, files, capsys):
    llm.delay = 0.2
    process = start(*OUT, "--concurrency", "1")
    wait_for_lines(1, process)
    assert rag.main(OUT) == 2
    assert "another run" in capsys.readouterr().err
    assert process.wait(30) == 0, process.communicate()
    process.communicate()
    assert sorted(asked(llm)) == list(range(1, 13))
    assert is_complete(entries())


# --- what goes wrong -----------------------------------------------------------------------------


def test_one_failing_question_does_not_stop_the_others(llm, files, capsys):
    fail(llm, 5, status=500, headers=NO_RETRY, times=None)
    assert rag.main(OUT) == 1
    failed = [entry for entry in entries() if entry["error"]]
    assert [(entry["number"], entry["answer"]) for entry in failed] == [(5, None)]
    assert len(entries()) == 12
    assert capsys.readouterr().err.splitlines()[-1].startswith("questions: 11 answered, 1 failed")


def test_without_out_a_failure_is_told_in_its_place(llm, files, capsys):
    fail(llm, 5, status=500, headers=NO_RETRY)
    assert rag.main(ALL) == 1
    said = capsys.readouterr()
    assert said.out.count("Answer: ") == 11
    assert "error: " in said.err
    assert "questions: 11 answered, 1 failed" in said.err


def test_a_rate_limit_is_waited_out_for_as_long_as_the_service_says(llm, files):
    fail(llm, 1, status=429, headers={"Retry-After": "1"})
    assert rag.main(OUT) == 0
    first, second = (r for r in llm.chat_requests if QUESTIONS[0] + "\n" in f"{r.text}\n")
    assert 1 <= second.received - first.finished < 2
    assert is_complete(entries())


def test_a_busy_service_is_tried_more_often_than_the_sdk_would(llm, files):
    soon = {"retry-after-ms": "5"}
    llm.fail(path="embeddings", status=503, headers=soon, times=6)
    fail(llm, 1, status=429, headers=soon, times=rag.MAX_RETRIES)
    assert rag.main(OUT) == 0
    assert is_complete(entries())


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_the_user_can_mend_stops_the_run_at_once_and_keeps_what_is_finished(
    llm, files, capsys, status
):
    fail(llm, 6, status=status, delay=0.3)
    for n in range(7, 13):
        fail(llm, n, delay=60)
    begun = time.monotonic()
    assert rag.main([*OUT, "--concurrency", "2"]) == 2
    assert time.monotonic() - begun < 30
    assert {entry["number"] for entry in entries()} == {1, 2, 3, 4, 5}
    assert len(llm.chat_requests) == 7
    said = capsys.readouterr().err
    assert f"HTTP {status}" in said
    assert "Traceback" not in said
    llm.recover()
    assert rag.main(OUT) == 0
    assert is_complete(entries())


def test_ctrl_c_keeps_what_is_finished_and_says_nothing(llm, files):
    for n in range(7, 13):
        fail(llm, n, delay=60)
    process = start(*OUT, "--concurrency", "4")
    wait_for_lines(6, process)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert out == ""
    assert "Traceback" not in err
    assert "never retrieved" not in err
    assert {entry["number"] for entry in entries()} == {1, 2, 3, 4, 5, 6}


# --- planted faults: the checks above would notice -----------------------------------------------


def check_concurrency(module, llm):
    llm.delay = 0.1
    assert module.main([*OUT, "--concurrency", "4"]) == 0
    assert llm.most_simultaneous_chats == 4
    assert len(llm.embedding_requests) == 2
    assert is_complete(entries())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("", ""),
        ("await llm.chat.completions.create(", "await llm.chat.completions.acreate("),
        ("await llm.chat.completions.create(", 'client("openai").chat.completions.create('),
        ("await llm.chat.completions.create(", "llm.chat.completions.create("),
        ("count = args.concurrency", "count = len(todo)"),
        ("for number, question in questions:", "for number, question in todo.items():"),
        ("len(questions), MAX_INPUTS)", "len(questions), 1)"),
    ],
    ids=["none", "acreate", "sync-call", "no-await", "unbounded", "asked-by-all", "one-by-one"],
)
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")
def test_a_planted_fault_is_caught(llm, files, monkeypatch, old, new):
    source = SCRIPT.read_text()
    assert not old or source.count(old) == 1
    Path("rag_planted.py").write_text(source.replace(old, new) if old else source)
    monkeypatch.syspath_prepend(str(files))
    monkeypatch.delitem(sys.modules, "rag_planted", raising=False)
    module = importlib.import_module("rag_planted")
    if not old:
        check_concurrency(module, llm)
        return
    with pytest.raises(AssertionError):
        check_concurrency(module, llm)
