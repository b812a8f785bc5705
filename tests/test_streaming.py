"""rag_streaming.py: tokens as they come, broken streams, questions on stdin, and the chat.

The chat runs on a real terminal (a pty); the LLM is the fake one, behind the real SDKs.
"""

# ruff: noqa: D103 - the names of the tests are their docstrings

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
import types
from itertools import pairwise

import pytest
from conftest import ROOT, command, environment
from fake_llm import REFUSAL, extractive_reply, message_text

SCRIPT = ROOT / "rag_streaming.py"
TRAIN = "When does the night train leave Tamsel?"
LEAVES = "leaves Tamsel at 21:35 from platform 3"
AT_ONCE = {"retry-after-ms": "1"}  # the SDKs wait half a second before they try again, and more
PROVIDERS = pytest.mark.parametrize("provider", ["openai", "claude"])
EVENTS = {
    "openai": 'data: {"choices": [{"index": 0, "delta": {"content": "The train"}}]}\n\n',
    "claude": "".join(
        f"event: {event['type']}\ndata: {json.dumps(event)}\n\n"
        for event in [
            {
                "type": "message_start",
                "message": {
                    **{"id": "m", "type": "message", "role": "assistant", "model": "claude"},
                    **{"content": [], "stop_reason": None, "stop_sequence": None},
                    "usage": {"input_tokens": 300, "output_tokens": 1},
                },
            },
            {
                "type": "content_block_start",
                "index": 0,
                "content_block": {"type": "text", "text": ""},
            },
            {
                "type": "content_block_delta",
                "index": 0,
                "delta": {"type": "text_delta", "text": "The train"},
            },
        ]
    ),
}


def start(*argv, **options):
    """Start the script, with its stdout in a pipe."""
    return subprocess.Popen(
        [sys.executable, SCRIPT, *argv], env=environment(), stdout=subprocess.PIPE, **options
    )


def load(*changes):
    """Import the script anew, as its clients are kept for good, with pieces of it replaced."""
    source = SCRIPT.read_text()
    for old, new in changes:
        assert old in source
        source = source.replace(old, new)
    module = types.ModuleType("rag_streaming")
    module.__file__ = str(SCRIPT)
    sys.modules["rag_streaming"] = module
    exec(compile(source, SCRIPT, "exec"), module.__dict__)
    return module


def indexed(*argv):
    """The module, the samples' index, and the arguments: what main hands on."""
    module = load()
    args = module.parse_arguments(list(argv))
    module.check_backend(args)
    chunks = [module.Chunk(text, "sample") for text in module.SAMPLES]
    return module, module.build_index(chunks, args), args


@pytest.fixture
def ask(capsys):
    """Run main in this process: its exit code, stdout and stderr."""

    def run(*argv, module=None):
        code = (module or load()).main(list(argv))
        return types.SimpleNamespace(code=code, **capsys.readouterr()._asdict())

    return run


@pytest.fixture
def ask_json(ask):
    """Run main with --json: its exit code and the objects."""

    def run(*argv):
        done = ask("--json", *argv)
        return done.code, [json.loads(line) for line in done.out.splitlines()]

    return run


@pytest.fixture
def stdin(monkeypatch):
    """Put bytes on stdin."""
    return lambda data: monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))


def messages_of(request):
    """The conversation that was sent, without the system prompt, as (role, text)."""
    found = [(m["role"], message_text(m)) for m in request.json["messages"]]
    return [message for message in found if message[0] != "system"]


# --- one question ---------------------------------------------------------------------------------


@PROVIDERS
def test_an_answer_is_printed_after_its_sources_and_measured_on_stderr(llm, ask, provider):
    done = ask("--llm", provider, TRAIN)
    assert done.code == 0
    assert done.out.index("[1] 0.") < done.out.index(f"Answer: The night train Corvina {LEAVES}")
    assert done.out.endswith("[1]\n")
    line = done.err.splitlines()[-1]
    assert re.fullmatch(
        r"first token after \d+\.\d\d s, 31 tokens in \d+\.\d\d s, \d+ a second", line
    )


@PROVIDERS
def test_tokens_are_printed_one_by_one_while_the_stream_goes_on(llm, monkeypatch, provider):
    class Screen(io.StringIO):
        shown = ""

        def flush(self):
            if self.getvalue() != self.shown:
                self.shown = self.getvalue()
                times.append(time.monotonic())

    times = []
    llm.token_delay = 0.05
    monkeypatch.setattr("sys.stdout", Screen())
    assert load().main(["--llm", provider, TRAIN]) == 0
    before_the_end = [t for t in times if t < llm.chat_requests[0].finished]
    assert len(before_the_end) >= 10  # of 18 words
    assert sum(b - a > 0.02 for a, b in pairwise(before_the_end)) >= 8


def test_tokens_reach_a_pipe_one_by_one(llm):
    llm.token_delay = 0.05
    run, reads = start(TRAIN), []
    assert run.stdout
    while data := os.read(run.stdout.fileno(), 65536):
        reads.append((time.monotonic(), data))
    run.stdout.close()
    assert run.wait() == 0
    assert sum(when < llm.chat_requests[0].finished for when, _ in reads) >= 10


@PROVIDERS
def test_our_own_part_of_the_first_token_is_below_5_ms(llm, provider):
    module, index, args = indexed("--llm", provider, "--json")

    def bare(prompt):
        client, user = module.client(provider), {"role": "user", "content": prompt}
        start = time.perf_counter()
        if provider == "claude":
            with client.messages.stream(
                model=args.model, max_tokens=99, system=module.SYSTEM_PROMPT, messages=[user]
            ) as stream:
                return next(stream.text_stream) and time.perf_counter() - start
        system = {"role": "system", "content": module.SYSTEM_PROMPT}
        with client.chat.completions.create(
            model=args.model, messages=[system, user], stream=True
        ) as stream:
            return next(
                time.perf_counter() - start
                for chunk in stream
                if chunk.choices and chunk.choices[0].delta.content
            )

    prompt = module.build_prompt(TRAIN, module.retrieve(TRAIN, index, args))
    ours, others = [], []
    for _ in range(25):
        ours.append(module.answer_question(TRAIN, index, args, [], []).seconds["first_token"])
        others.append(bare(prompt))
    assert sorted(ours)[5] - sorted(others)[5] < 0.005


@PROVIDERS
def test_show_prompt_shows_what_is_sent(llm, ask, provider):
    done = ask("--llm", provider, "--show-prompt", TRAIN)
    shown, _ = json.JSONDecoder().raw_decode(done.err[done.err.index("{") :])
    assert shown == llm.chat_requests[0].json


def test_retrieve_only_asks_no_llm(llm, ask, monkeypatch):
    monkeypatch.delenv("ANTHROPIC_API_KEY")
    done = ask("--llm", "claude", "--retrieve-only", TRAIN)
    assert done.code == 0
    assert "21:35" in done.out
    assert "Answer" not in done.out
    assert not llm.chat_requests


@PROVIDERS
def test_json_is_one_object_a_question_and_has_the_time_of_the_first_token(llm, ask_json, provider):
    llm.token_delay = 0.05
    code, (answer, refusal) = ask_json("--llm", provider, TRAIN, "What does the mayor earn?")
    assert code == 0
    assert LEAVES in answer["answer"]
    assert answer["usage"]["output_tokens"] == 31
    assert 0.05 <= answer["seconds"]["first_token"] < answer["seconds"]["generate"]
    assert (refusal["answer"], refusal["refused"]) == (REFUSAL, True)


@PROVIDERS
def test_control_characters_do_not_reach_the_terminal(llm, ask, tmp_path, provider):
    (tmp_path / "evil.txt").write_text("The night train \x1b[31mis red\x1b]0;owned\x07 in Tamsel.")
    # The fake cuts before blanks: the first escape is split over two pieces.
    llm.reply = "Red \x1b [31m train \x9b2J\x1b]0;owned\x07 at \u202e9:15\r."
    done = ask("--llm", provider, "--docs", str(tmp_path), TRAIN)
    assert done.code == 0
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", done.out + done.err)
    assert "Answer: Red  [31m train 2J]0;owned at 9:15." in done.out


def test_a_server_that_tells_no_usage_has_its_pieces_counted(llm, ask):
    chunk = {"choices": [{"index": 0, "delta": {"content": "At 21:35"}, "finish_reason": "stop"}]}
    body = f"data: {json.dumps(chunk)}\n\n" * 2 + "data: [DONE]\n\n"
    llm.fail(path="chat", body=body, content_type="text/event-stream")
    assert " 2 pieces in " in ask(TRAIN).err


def test_a_cut_answer_is_said_on_a_line_of_its_own(llm, ask):
    llm.fail(finish_reason="length")
    done = ask(TRAIN)
    assert done.code == 0
    assert done.out.endswith("[1]\n")
    assert "\nthe answer was cut at 1024 tokens\n" in done.err


# --- what goes wrong ------------------------------------------------------------------------------

BROKEN = {
    "the socket closes": {"cut_after": 3},
    "the stream turns into an error event": {"error_after": 3},
}


@PROVIDERS
@pytest.mark.parametrize("how", BROKEN)
def test_what_came_of_a_broken_stream_is_kept_and_the_error_said(llm, ask, ask_json, provider, how):
    llm.fail(**BROKEN[how], times=2)
    done = ask("--llm", provider, TRAIN)
    assert done.code == 1
    assert done.out.endswith("Answer: The night train\n")
    assert "\nerror: " in done.err
    assert "first token" not in done.err
    code, (answer, other) = ask_json("--llm", provider, TRAIN, "Who built the tide organ?")
    assert code == 1
    assert answer["answer"] == "The night train"
    assert answer["error"]
    assert answer["seconds"]["first_token"] > 0
    assert "Ines Calder" in other["answer"]


@PROVIDERS
def test_a_stream_that_ends_without_its_end_is_no_answer(llm, ask_json, provider):
    events = {"body": EVENTS[provider], "content_type": "text/event-stream"}
    llm.fail(path="chat" if provider == "openai" else "messages", **events)
    code, (answer,) = ask_json("--llm", provider, TRAIN)
    assert code == 1
    assert answer["answer"] == "The train"
    assert "broke off" in answer["error"]


@PROVIDERS
@pytest.mark.parametrize("body", ["<html>Log in to the Wi-Fi</html>", '{"status": "fine"}', ""])
def test_a_page_with_status_200_is_no_answer(llm, ask, provider, body):
    llm.fail(path="chat" if provider == "openai" else "messages", body=body)
    done = ask("--llm", provider, TRAIN)
    assert done.code == 1
    assert "Answer" not in done.out
    assert re.search("error: (the reply is no stream|a service's reply has another)", done.err)


@PROVIDERS
def test_an_empty_answer_is_an_error(llm, ask, provider):
    llm.fail(reply="")
    done = ask("--llm", provider, TRAIN)
    assert done.code == 1
    assert "the LLM answered nothing" in done.err


@PROVIDERS
@pytest.mark.parametrize("status", [429, 500])
def test_a_failure_before_the_stream_is_tried_again(llm, ask, provider, status):
    path = "chat" if provider == "openai" else "messages"
    llm.fail(path=path, status=status, headers=AT_ONCE, times=2)
    done = ask("--llm", provider, TRAIN)
    assert (done.code, len(llm.chat_requests)) == (0, 3)
    assert done.out.count("Answer: ") == 1


@PROVIDERS
def test_a_failure_that_stays_is_exit_code_1_and_the_other_questions_are_answered(
    llm, ask, provider
):
    path = "chat" if provider == "openai" else "messages"
    llm.fail(path=path, status=500, headers=AT_ONCE, times=3)
    done = ask("--llm", provider, TRAIN, "Who built the tide organ?")
    assert done.code == 1
    assert done.err.count("error: ") == 1
    assert "Answer: The tide organ of Orle was built by Ines Calder" in done.out


@PROVIDERS
@pytest.mark.parametrize("status", [401, 404])
def test_what_the_user_can_mend_is_exit_code_2(llm, ask, provider, status):
    llm.fail(path="chat" if provider == "openai" else "messages", status=status)
    assert ask("--llm", provider, TRAIN).code == 2


def test_ctrl_c_ends_one_shot_mode_with_130_and_no_traceback(llm):
    llm.token_delay = 0.2
    with start(TRAIN, stderr=subprocess.PIPE) as run:
        assert run.stdout
        out = b""
        while b"Answer: The" not in out:
            out += (data := os.read(run.stdout.fileno(), 65536))
            assert data
        run.send_signal(signal.SIGINT)
        rest, err = run.communicate(timeout=20)
    assert run.returncode == 130
    assert (out + rest).endswith(b"\n")
    assert LEAVES.encode() not in (out + rest).partition(b"Answer")[2]
    assert b"Traceback" not in err


# --- questions on stdin ---------------------------------------------------------------------------


def test_stdin_is_read_as_one_question_a_line(llm, ask_json, stdin):
    long = b"x" * 4001
    stdin(TRAIN.encode() + b"\r\n\n  \n" + long + b"\n\xff\nWho built the tide organ?")
    code, answers = ask_json()
    assert code == 1
    assert [a["question"] for a in answers] == [
        *(TRAIN, long.decode(), "\ufffd", "Who built the tide organ?")
    ]
    assert [bool(a["error"]) for a in answers] == [False, True, False, False]
    assert "longer than 4000 characters" in answers[1]["error"]
    assert (answers[1]["sources"], answers[1]["answer"]) == ([], None)


def test_lines_of_stdin_are_answered_while_it_is_open(llm):
    with start(stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as run:
        assert run.stdin
        assert run.stdout
        run.stdin.write(f"{TRAIN}\n".encode())
        run.stdin.flush()
        while not (line := run.stdout.readline()).startswith(b"Answer: "):
            assert line
        assert LEAVES in line.decode()
        run.stdin.close()
        assert run.wait(20) == 0


def test_an_empty_stdin_means_the_demonstration(llm, ask, stdin):
    stdin(b"\n")
    done = ask()
    assert done.code == 0
    assert done.out.count("Question: ") == 4
    assert done.out.count(f"Answer: {REFUSAL}") == 1
    for fact in (LEAVES, "Ines Calder in 2011", "310 stalls"):
        assert fact in "".join(re.findall("Answer: .*", done.out))


def test_questions_in_the_arguments_leave_stdin_alone(llm, ask, stdin):
    stdin(b"Who built the tide organ?\n")
    assert ask(TRAIN).out.count("Question: ") == 1
    assert sys.stdin.read() == "Who built the tide organ?\n"


# --- the chat -------------------------------------------------------------------------------------


class Terminal:
    """The script on a terminal of its own."""

    def __init__(self, *argv, command=(sys.executable, SCRIPT)):
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:  # bracketed paste would wrap every prompt in escapes
            os.execvpe(command[0], [*command, *argv], environment({"TERM": "dumb"}))
        self.seen = self.new = ""
        self.is_running = True

    def wait_for(self, text):
        """Wait until `text` is shown. Returns all since the last wait, up to its end."""
        deadline = time.monotonic() + 30
        while text not in self.new:
            assert select.select([self.terminal], [], [], deadline - time.monotonic())[0], self.seen
            data = os.read(self.terminal, 65536).decode(errors="replace").replace("\r\n", "\n")
            self.seen, self.new = self.seen + data, self.new + data
        end = self.new.index(text) + len(text)
        shown, self.new = self.new[:end], self.new[end:]
        return shown

    def type(self, text):
        os.write(self.terminal, text.encode())

    def ask(self, question):
        """Type a question at the prompt. Returns what is shown up to the next prompt."""
        self.type(f"{question}\n")
        self.wait_for(question)  # the echo
        return self.wait_for("\n> ")

    def leave(self):
        self.type("\x04")
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                self.is_running = False
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
        raise AssertionError(f"it goes on after Ctrl-D: {self.seen}")


@pytest.fixture
def chat(llm):
    """Start a chat and wait for its prompt."""
    terminals = []

    def start(*argv, **options):
        terminals.append(Terminal(*argv, **options))
        terminals[-1].wait_for("\n> ")
        return terminals[-1]

    yield start
    for terminal in terminals:
        if terminal.is_running:
            os.kill(terminal.pid, signal.SIGKILL)
            os.waitpid(terminal.pid, 0)
        os.close(terminal.terminal)


def rewriting(question):
    """A reply that rewrites any follow-up to `question`, and answers from the passages."""

    def reply(request):
        last = message_text(request["messages"][-1])
        return question if "The last question, to rewrite: " in last else extractive_reply(request)

    return reply


def test_a_follow_up_is_rewritten_shown_and_looked_up(llm, chat):
    llm.reply = rewriting("When do the fireworks of the salt fair begin?")
    terminal = chat("--top-k", "1")
    assert "Ctrl-D leaves" in terminal.seen
    assert TRAIN in terminal.seen  # what one could ask
    assert "310 stalls. [1]" in terminal.ask("How many stalls did the fair have in 2022?")
    assert len(llm.chat_requests) == 1  # nothing to rewrite before there is a history
    shown = terminal.ask("and when do they start?")
    assert "Question: When do the fireworks of the salt fair begin?" in shown
    assert "Saturday at 22:15" in shown
    assert "first token after" in shown
    assert llm.embedded_texts[-1] == "When do the fireworks of the salt fair begin?"
    _, rewrite, answer = map(messages_of, llm.chat_requests)
    assert len(rewrite) == 1
    assert rewrite[0][1].endswith("The last question, to rewrite: and when do they start?")
    assert "In 2022 the fair had 310 stalls." in rewrite[0][1]
    # The turn before is sent without its citations: their numbers mean other passages now.
    assert answer[:2] == [
        ("user", "How many stalls did the fair have in 2022?"),
        ("assistant", "In 2022 the fair had 310 stalls."),
    ]
    assert answer[2][1].endswith("Question: When do the fireworks of the salt fair begin?")
    assert terminal.leave() == 0


def test_a_rewriting_that_fails_is_said_and_the_plain_question_taken(llm, chat):
    terminal = chat("--show-prompt")
    terminal.ask(TRAIN)
    llm.fail(containing="to rewrite", status=500, headers=AT_ONCE, times=3)
    shown = terminal.ask("Who built the tide organ?")
    assert '"content": "You rewrite the last question' in shown
    assert "could not be rewritten" in shown
    assert "Answer: The tide organ of Orle was built by Ines Calder" in shown
    llm.fail(containing="to rewrite", reply="when " * 900)
    shown = terminal.ask("Who built the tide organ?")
    assert "could not be rewritten, it is taken as it is: it became too long" in shown
    assert terminal.leave() == 0


@PROVIDERS
def test_ctrl_c_stops_an_answer_and_not_the_chat(llm, chat, provider):
    terminal = chat("--llm", provider)
    llm.token_delay = 0.2
    terminal.type(f"{TRAIN}\n")
    terminal.wait_for("Answer: The night")
    terminal.type("\x03")
    shown = terminal.wait_for("\n> ")
    assert "stopped\n" in shown
    assert "Traceback" not in shown
    assert "platform" not in shown
    llm.token_delay, llm.reply = 0, rewriting("Who built the tide organ?")
    assert "Answer: The tide organ of Orle was built by" in terminal.ask("And the organ?")
    kept = messages_of(llm.chat_requests[-1])
    assert kept[0] == ("user", TRAIN)
    assert kept[1][1].startswith("The night")
    assert LEAVES not in kept[1][1]
    assert terminal.leave() == 0


def test_ctrl_c_at_the_prompt_tells_how_to_leave_and_an_empty_line_asks_again(llm, chat):
    as_a_user = command(SCRIPT.name, "--retrieve-only")
    terminal = chat(command=as_a_user)
    terminal.type("half a question")
    terminal.wait_for("half a question")
    time.sleep(0.3)  # readline loses a signal that comes before it waits for the next key
    terminal.type("\x03")
    assert "Ctrl-D leaves\n" in terminal.wait_for("\n> ")
    terminal.type("\n   \n")
    terminal.wait_for("\n> ")
    terminal.wait_for("\n> ")
    os.write(terminal.terminal, b"train \xff\n")  # not in the terminal's encoding
    assert "Question: train ?\n" in terminal.wait_for("\n> ")
    assert "21:35" in terminal.ask(TRAIN)
    assert not llm.chat_requests
    assert "error" not in terminal.seen  # nothing empty was looked up
    assert terminal.leave() == 0


def test_a_failure_ends_a_turn_and_not_the_chat(llm, chat):
    terminal = chat()
    llm.fail(path="chat", status=500, headers=AT_ONCE, times=3)
    assert "error: " in terminal.ask(TRAIN)
    llm.fail(path="chat", status=401)
    assert "error: the service refused the key" in terminal.ask(TRAIN)
    llm.fail(path="embeddings", body="<html>")
    assert "error: " in terminal.ask(TRAIN)
    llm.fail(cut_after=3)
    assert "Answer: The night train\nerror: " in terminal.ask(TRAIN)
    # Only what was cut is remembered: turns without an answer are not.
    llm.reply = rewriting("Who built the tide organ?")
    assert "Answer: The tide organ of Orle was built by" in terminal.ask("And the organ?")
    assert messages_of(llm.chat_requests[-1])[:2] == [
        ("user", TRAIN),
        ("assistant", "The night train"),
    ]
    assert terminal.leave() == 0


def test_only_the_last_turns_are_sent_and_not_too_much_of_them(llm, monkeypatch):
    module, index, args = indexed()
    llm.reply = rewriting(TRAIN)

    def talk(*questions):
        lines = iter(questions)
        monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
        with pytest.raises(StopIteration):
            module.chat(index, args)
        return messages_of(llm.chat_requests[-1])

    assert len(talk(*["When?"] * 7)) == 9  # four turns and the prompt
    llm.reply = "understanding " * 430  # a token each
    monkeypatch.setattr(module, "rewrite_question", lambda question, history, args: question)
    sent = talk(*["When?"] * 4)[:-1]
    assert [len(text) for _, text in sent] == [5, 6_019]  # two such turns are over the limit


# --- planted faults -------------------------------------------------------------------------------


def answers(llm, ask, module, provider):
    done = ask("--llm", provider, TRAIN, module=module)
    return done.code == 0 and LEAVES in done.out and "31 tokens" in done.err


def notices_a_broken_stream(llm, ask, module, provider):
    events = {"body": EVENTS[provider], "content_type": "text/event-stream"}
    llm.fail(path="chat" if provider == "openai" else "messages", **events)
    return ask("--llm", provider, TRAIN, module=module).code == 1


def keeps_the_terminal_clean(llm, ask, module, provider):
    llm.reply = "\x1b[31mRed"
    return "\x1b" not in ask("--llm", provider, TRAIN, module=module).out


FAULTS = [
    (answers, "openai", ".completions.create(**", ".completions.acreate(**"),
    (answers, "openai", "if choice.delta.content:", 'if choice.delta.get("content"):'),
    (answers, "openai", "say(choice.delta.content)", "say(choice.message.content)"),
    (answers, "openai", "if choice.delta.content:", "if True:"),
    (answers, "openai", "for choice in chunk.choices:", "for choice in [chunk.choices[0]]:"),
    (answers, "openai", '"include_usage": True', '"include_usage": False'),
    (answers, "openai", '"max_completion_tokens"', '"max_output_tokens"'),
    (answers, "claude", "in stream.text_stream", "in stream.text_deltas"),
    (answers, "claude", "get_final_message()", "get_final_text()"),
    (answers, "claude", '"max_tokens": MAX', '"max_completion_tokens": MAX'),
    (answers, "claude", '"messages": messages}', '"messages": [{"role": "system"}, *messages]}'),
    (notices_a_broken_stream, "openai", "if not stopped:", "if False:"),
    (notices_a_broken_stream, "claude", "if not stopped:", "if False:"),
    (keeps_the_terminal_clean, "openai", "printable(piece)", "piece"),
    (keeps_the_terminal_clean, "claude", "printable(piece)", "piece"),
]


@pytest.mark.parametrize(("check", "provider", "old", "new"), FAULTS)
def test_a_planted_fault_is_caught(llm, ask, check, provider, old, new):
    assert check(llm, ask, load(), provider)
    assert not check(llm, ask, load((old, new)), provider)
