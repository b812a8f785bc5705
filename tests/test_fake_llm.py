"""The fake LLM server, driven by the real OpenAI and Anthropic clients."""

# ruff: noqa: D103 - the names of the tests are their docstrings

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anthropic
import httpx2
import numpy as np
import openai
import pytest
from fake_llm import REFUSAL, FakeLLM, count_tokens

PROMPT = """\
<passage-1f2e n="1" source="notes/beavers.md">
Beavers build dams. The dam at Aldermoor is 41 metres long.
</passage-1f2e>
<passage-1f2e n="2" source="sample" page="3">
The lighthouse of Brenn was lit in 1871. </passage-9>
</passage-1f2e>

Question: """
HTML = "<html><body>Bad gateway</body></html>"


@pytest.fixture
def fake():
    with FakeLLM() as server:
        yield server


def says(content, role="user"):
    return {"role": role, "content": content}


def client(fake, retries=0):
    return openai.OpenAI(api_key="sk-x", base_url=fake.openai_base_url, max_retries=retries)


def gpt(fake, **fields):
    model = "qwen3:4b" if fake.ollama else "gpt-4o"
    request: dict[str, Any] = {"model": model, "messages": [says("Hello")]} | fields
    return client(fake).chat.completions.create(**request)


def claude(fake, **fields):
    request: dict[str, Any] = {"model": "claude-sonnet-4-6", "messages": [says("Hello")]}
    request |= {"max_tokens": 100} | fields
    its = anthropic.Anthropic(api_key="sk-ant-x", base_url=fake.url, max_retries=0)
    return its.messages.create(**request)


def embed(fake, **fields):
    request: dict[str, Any] = {"model": "text-embedding-3-small", "input": "dam"} | fields
    return np.array([e.embedding for e in client(fake).embeddings.create(**request).data])


def test_an_answer_quotes_the_nearest_sentence_and_its_number(fake):
    for question, expected in (
        ("How long is the dam at Aldermoor?", "The dam at Aldermoor is 41 metres long. [1]"),
        ("When was the lighthouse of Brenn lit?", "The lighthouse of Brenn was lit in 1871. [2]"),
        ("Who composed the opera Fidelio?", REFUSAL),
    ):
        messages = [says(PROMPT + question)]
        answer = gpt(fake, messages=messages)
        assert answer.choices[0].message.content == expected
        assert answer.usage.prompt_tokens > count_tokens(PROMPT + question)
        other = claude(fake, system="Be brief.", messages=messages)
        assert (other.content[0].text, other.stop_reason) == (expected, "end_turn")
        assert other.usage.input_tokens > answer.usage.prompt_tokens


def test_streams_have_the_events_of_the_services(fake):
    fake.reply = lambda request: f"One {request['model']}."
    *chunks, last = gpt(fake, stream=True, stream_options={"include_usage": True})
    assert [chunk.choices[0].delta.content for chunk in chunks] == ["", "One", " gpt-4o.", None]
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert (last.choices, last.usage.completion_tokens) == ([], count_tokens("One gpt-4o."))
    assert all(chunk.choices and not chunk.usage for chunk in gpt(fake, stream=True))
    events = list(claude(fake, stream=True))
    block = ["content_block_start", *["content_block_delta"] * 2, "content_block_stop"]
    assert [e.type for e in events] == ["message_start", *block, "message_delta", "message_stop"]
    assert events[3].delta.text == " claude-sonnet-4-6."


def test_texts_are_near_that_share_words_and_a_model(fake):
    texts = ["The dam at Aldermoor is long", "How long are the dams of Aldermoor?", "An opera"]
    dam, question, opera = vectors = embed(fake, input=texts)
    assert (vectors**2).sum(axis=1) == pytest.approx(1)
    assert dam @ question > 0.9
    assert abs(dam @ opera) < 0.1
    assert embed(fake, input=texts, encoding_format="float") == pytest.approx(vectors, abs=1e-6)
    large = embed(fake, input=texts[0], model="text-embedding-3-large")[0]
    assert (len(dam), len(large), abs(dam @ large[:1536]) < 0.5) == (1536, 3072, True)
    assert fake.embedded_texts == [*texts, *texts, texts[0]]


REJECTED = [
    ("gpt claude ollama", 400, {"messages": []}),
    ("gpt claude ollama", 400, {"messages": [says("")]}),
    ("gpt claude ollama", 400, {"messages": [says("x", "bot")]}),
    ("gpt claude ollama", 400, {"max_tokens": 0}),
    ("gpt claude ollama", 404, {"model": "gpt-3.5-turbo-0301"}),
    ("gpt claude embed", 400, {"extra_body": {"top_k": 4}}),
    ("gpt claude embed", 401, {"extra_headers": {"authorization": "Bearer wrong"}}),
    ("gpt claude", 400, {"extra_body": {"temperature": 2.1}}),
    ("gpt claude", 400, {"extra_body": {"temperature": "0"}}),
    ("gpt claude", 400, {"messages": [says("x") | {"source": "a"}]}),
    ("gpt claude", 400, {"messages": [says("dam " * 130_000)] * 2}),
    ("gpt", 404, {"model": "text-embedding-3-small"}),
    ("gpt", 400, {"max_tokens": 5, "max_completion_tokens": 5}),
    ("gpt", 400, {"model": "gpt-5-mini", "max_tokens": 5}),
    ("gpt", 400, {"model": "gpt-5-mini", "temperature": 0}),
    ("gpt", 400, {"reasoning_effort": "low"}),
    ("gpt", 400, {"stream_options": {"include_usage": True}}),
    ("gpt", 401, {"extra_headers": {"authorization": "Bearer sk-ant-x"}}),
    ("claude", 400, {"messages": [says("x"), says("x", "system"), says("x")]}),
    ("claude", 400, {"messages": [says("x", "assistant"), says("x")]}),
    ("claude", 400, {"messages": [says("x"), says("{", "assistant")]}),
    ("claude", 400, {"extra_body": {"max_tokens": None}}),
    ("claude", 400, {"model": "claude-opus-4-8", "extra_body": {"temperature": 0}}),
    ("embed", 400, {"input": []}),
    ("embed", 400, {"input": ["dam", ""]}),
    ("embed", 400, {"input": ["dam"] * 2049}),
    ("embed", 400, {"input": "dam " * 8193}),
    ("embed", 400, {"input": ["dam " * 8000] * 38}),
    ("embed", 404, {"model": "gpt-4o"}),
]


@pytest.mark.parametrize(("services", "status", "fields"), REJECTED)
def test_what_the_services_reject_is_rejected(services, status, fields):
    for service in services.split():
        send = {"claude": claude, "embed": embed}.get(service, gpt)
        with FakeLLM(ollama=service == "ollama") as fake:
            fake.fail(status=418)  # which a rejected request does not use up
            for request, expected in ((fields, status), ({}, 418)):
                with pytest.raises((openai.APIStatusError, anthropic.APIStatusError)) as caught:
                    send(fake, **request)
                assert caught.value.status_code == expected


def test_what_is_at_a_limit_is_accepted(fake):
    assert len(embed(fake, input=["dam"] * 2048)) == 2048
    assert len(embed(fake, input="dam " * 8191)) == 1
    assert gpt(fake, model="gpt-5-mini", temperature=1, reasoning_effort="low").choices
    assert claude(fake, extra_body={"temperature": 0}).content


def test_ollama_has_tags_and_ignores_unknown_fields():
    with FakeLLM(ollama=True) as fake:
        fake.chat_models = ("mistral", "qwen3:4b")
        assert [m.id for m in client(fake).models.list()] == ["mistral:latest", "qwen3:4b"]
        assert gpt(fake, model="mistral", extra_body={"options": {"num_ctx": 9}}).choices


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        ("AuthenticationError", {"status": 401}),
        ("NotFoundError", {"status": 404}),
        ("RateLimitError", {"status": 429}),
        ("InternalServerError", {"status": 502, "body": HTML}),
        ("APIConnectionError", {"drop": True}),
        ("APIConnectionError", {"cut_after": 2}),
        ("APITimeoutError", {"delay": 5}),
    ],
)
def test_a_fault_is_the_error_of_both_clients_as_often_as_told(fake, error, fault):
    fake.fail(**fault, path="/chat/")
    fake.fail(**fault, path="/messages")
    timeout = 0.5 if "delay" in fault else 60
    with pytest.raises(getattr(openai, error)):
        gpt(fake, timeout=timeout)
    with pytest.raises(getattr(anthropic, error)):
        claude(fake, timeout=timeout)
    assert gpt(fake).choices
    assert claude(fake).content


@pytest.mark.parametrize("fault", ["cut_after", "error_after"])
def test_a_stream_can_break_off_or_become_an_error(fake, fault):
    fake.reply, events = "One two three.", []
    fake.fail(**{fault: 2}, times=2)
    with pytest.raises(openai.APIError):
        events.extend(gpt(fake, stream=True))
    assert [chunk.choices[0].delta.content for chunk in events] == ["", "One", " two"]
    with pytest.raises((anthropic.APIStatusError, httpx2.RemoteProtocolError)):
        events.extend(claude(fake, stream=True))
    assert [event.delta.text for event in events[5:]] == ["One", " two"]


def test_answers_can_be_bad_in_many_ways(fake):
    fake.fail(reply="word " * 50, times=2)
    assert gpt(fake, max_completion_tokens=5).choices[0].finish_reason == "length"
    assert claude(fake, max_tokens=5).stop_reason == "max_tokens"
    fake.fail(null_content=True, finish_reason="content_filter", prompt_tokens=3, times=2)
    answer = gpt(fake)
    assert (answer.choices[0].message.content, answer.usage.prompt_tokens) == (None, 3)
    answer = claude(fake)
    found = (answer.content, answer.stop_reason, answer.usage.input_tokens)
    assert found == ([], "refusal", 3)
    fake.fail(think="Hm.", reply="Yes.", reasoning="So.")
    answer = gpt(fake).choices[0].message
    assert (answer.content, answer.reasoning) == ("<think>\nHm.\n</think>\n\nYes.", "So.")
    fake.fail(body=HTML)
    assert gpt(fake) == HTML


def test_a_fault_waits_for_its_request_and_can_last_for_ever(fake):
    fake.fail(containing="of\nBrenn", status=500, times=None)
    fake.fail(reply="Mine.")
    assert embed(fake).any()
    for _ in range(3):
        with pytest.raises(openai.InternalServerError):
            gpt(fake, messages=[says("The light of\nBrenn")])
    assert gpt(fake).choices[0].message.content == "Mine."
    fake.recover()
    assert gpt(fake, messages=[says("The light of\nBrenn")]).choices


def test_the_client_waits_as_long_as_retry_after_says(fake):
    fake.fail(status=429, headers={"Retry-After": "1"})
    assert client(fake, retries=1).models.list().data
    first, second = fake.requests
    assert (first.status, second.status) == (429, 200)
    assert 1 <= second.received - first.finished < 2


def test_chats_are_simultaneous_when_they_are(fake):
    for stream in (True, False) * 10:
        list(gpt(fake, stream=stream))
    assert (len(fake.chat_requests), fake.most_simultaneous_chats) == (20, 1)
    fake.delay = 1
    with ThreadPoolExecutor(10) as pool:
        list(pool.map(gpt, [fake] * 10))
    assert fake.most_simultaneous_chats == 10


def test_a_reply_that_raises_is_kept_for_the_test_and_not_retried(fake):
    fake.reply = lambda request: request["no such field"]
    chats = client(fake, retries=3).chat.completions
    with pytest.raises(openai.InternalServerError, match="no such field"):
        chats.create(model="gpt-4o", messages=[says("Hello")])
    assert ([type(error) for error in fake.errors], len(fake.requests)) == ([KeyError], 1)


def test_it_stops_at_once_though_clients_wait(fake):
    keeps = client(fake)
    keeps.models.list()
    fake.fail(path="/models", delay=30)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(client(fake).models.list)
        while len(fake.requests) < 2:
            time.sleep(0.01)
        fake.close()
        assert waiting.exception(timeout=5) is None
    with pytest.raises(openai.APIConnectionError):
        keeps.models.list()
