"""The fake LLM server, driven by the real OpenAI and Anthropic clients."""

# ruff: noqa: D103 - the names of the tests are their docstrings

import asyncio
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import anthropic
import bpe_openai
import httpx2
import openai
import pytest
from fake_llm import REFUSAL, FakeLLM, count_tokens

HELLO = [{"role": "user", "content": "Hello"}]
PROMPT = """\
<passage-1f2e n="1" source="notes/beavers.md">
Beavers build dams. The dam at Aldermoor is 41 metres long.
</passage-1f2e>
<passage-1f2e n="2" source="sample" page="3">
The lighthouse of Brenn was lit in 1871.
</passage-1f2e>

Question: """


@pytest.fixture
def fake():
    with FakeLLM() as server:
        yield server


@pytest.fixture
def ollama():
    with FakeLLM(ollama=True, embed_models={"nomic-embed-text": 768}) as server:
        yield server


@pytest.fixture
def gpt(fake):
    return openai.OpenAI(api_key="sk-x", base_url=fake.openai_base_url, max_retries=0)


@pytest.fixture
def claude(fake):
    return anthropic.Anthropic(api_key="sk-ant-x", base_url=fake.url, max_retries=0)


@pytest.fixture
def local(ollama):
    return openai.OpenAI(api_key="ollama", base_url=ollama.openai_base_url, max_retries=0)


def user(content):
    return {"role": "user", "content": content}


def chat(client, **fields):
    return client.chat.completions.create(**{"model": "gpt-4o-mini", "messages": HELLO} | fields)


def message(client, **fields):
    defaults = {"model": "claude-sonnet-4-6", "messages": HELLO, "max_tokens": 100}
    return client.messages.create(**defaults | fields)


def post(fake, path, **request):
    return httpx2.post(fake.url + path, **request)


# --- answers -----------------------------------------------------------------------------------


def test_an_openai_answer_quotes_the_best_sentence_and_cites_its_passage(fake, gpt):
    question = "How long is the dam at Aldermoor?"
    answer = chat(gpt, messages=[{"role": "user", "content": PROMPT + question}])
    assert answer.choices[0].message.content == "The dam at Aldermoor is 41 metres long. [1]"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens == 7 + count_tokens(PROMPT + question)
    assert answer.usage.completion_tokens == count_tokens(answer.choices[0].message.content)


def test_a_claude_answer_quotes_the_best_sentence_and_cites_its_passage(claude):
    question = "When was the lighthouse of Brenn lit?"
    answer = message(claude, system="Be brief.", messages=[user(PROMPT + question)])
    assert answer.content[0].text == "The lighthouse of Brenn was lit in 1871. [2]"
    assert answer.stop_reason == "end_turn"
    prompt = count_tokens(PROMPT + question) + count_tokens("Be brief.")
    assert answer.usage.input_tokens == 11 + prompt


@pytest.mark.parametrize("question", ["Who composed the opera Fidelio?", "What is it?"])
def test_a_question_that_the_passages_do_not_answer_is_refused(gpt, question):
    answer = chat(gpt, messages=[user(PROMPT + question)])
    assert answer.choices[0].message.content == REFUSAL


@pytest.mark.parametrize("reply", ["Fixed.", lambda request: request["model"] + " Fixed."])
def test_the_reply_can_be_a_string_or_a_function_of_the_request(fake, gpt, reply):
    fake.reply = reply
    assert chat(gpt).choices[0].message.content.endswith("Fixed.")


def test_a_reply_function_that_raises_is_seen_by_the_test_and_is_not_retried(fake):
    fake.reply = lambda request: request["no such field"]
    client = openai.OpenAI(api_key="sk-x", base_url=fake.openai_base_url, max_retries=3)
    with pytest.raises(openai.InternalServerError, match="no such field"):
        chat(client)
    assert isinstance(fake.errors[0], KeyError)
    assert len(fake.requests) == 1


def test_an_openai_stream_sends_usage_only_when_asked_and_then_without_choices(fake, gpt):
    fake.reply = "One two three."
    plain = list(chat(gpt, stream=True))
    assert all(chunk.choices and chunk.usage is None for chunk in plain)
    asked = list(chat(gpt, stream=True, stream_options={"include_usage": True}))
    assert asked[-1].choices == []
    assert asked[-1].usage.completion_tokens == count_tokens("One two three.")
    assert all(chunk.usage is None for chunk in asked[:-1])
    assert "".join(c.choices[0].delta.content or "" for c in asked[:-1]) == "One two three."
    assert asked[-2].choices[0].finish_reason == "stop"


def test_an_anthropic_stream_has_the_events_of_the_service_in_their_order(fake, claude):
    fake.reply = "One two."
    raw = post(
        fake,
        "/v1/messages",
        headers={"x-api-key": "k", "anthropic-version": "2023-06-01"},
        json={"model": "claude-opus-4-6", "max_tokens": 9, "messages": HELLO, "stream": True},
    )
    assert re.findall(r"^event: (\w+)$", raw.text, re.M) == [
        "message_start",
        "ping",
        "content_block_start",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    with claude.messages.stream(model="claude-opus-4-6", max_tokens=9, messages=HELLO) as stream:
        assert "".join(stream.text_stream) == "One two."
        final = stream.get_final_message()
    assert (final.stop_reason, final.usage.output_tokens) == ("end_turn", count_tokens("One two."))


def test_an_answer_longer_than_max_tokens_is_cut_and_says_so(fake, gpt, claude):
    fake.reply = "word " * 50
    answer = chat(gpt, max_completion_tokens=5)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 5
    assert message(claude, max_tokens=5).stop_reason == "max_tokens"


def test_the_async_clients_are_answered_and_many_at_once(fake):
    async def ask():
        gpt = openai.AsyncOpenAI(api_key="k", base_url=fake.openai_base_url)
        claude = anthropic.AsyncAnthropic(api_key="k", base_url=fake.url)
        async with gpt, claude:
            return await asyncio.gather(
                *(chat(gpt) for _ in range(100)), *(message(claude) for _ in range(100))
            )

    fake.delay = 1.0
    started = time.monotonic()
    answers = asyncio.run(ask())
    assert len(answers) == len(fake.chat_requests) == 200
    assert fake.most_simultaneous_chats > 150
    assert time.monotonic() - started < 10


def test_requests_one_after_the_other_are_never_counted_as_simultaneous(fake, gpt):
    fake.reply = "One two."
    for turn in range(20):
        list(chat(gpt, stream=True)) if turn % 2 else chat(gpt)
    assert fake.most_simultaneous_chats == 1
    assert all(request.finished for request in fake.requests)


# --- embeddings --------------------------------------------------------------------------------


def embed(client, texts, **fields):
    fields = {"model": "text-embedding-3-small"} | fields
    return [item.embedding for item in client.embeddings.create(input=texts, **fields).data]


def cosine(one, other):
    return sum(a * b for a, b in zip(one, other, strict=True))


def test_texts_that_share_words_are_near_and_others_are_not(gpt):
    dam, question, opera, grammar = embed(
        gpt,
        [
            "The dam at Aldermoor is long",
            "How long are the dams of Aldermoor?",
            "Fidelio, an opera",
            "How is it of the?",
        ],
    )
    assert cosine(dam, dam) == pytest.approx(1)
    assert cosine(dam, question) > 0.9
    assert abs(cosine(dam, opera)) < 0.1
    assert abs(cosine(question, grammar)) < 0.1


def test_the_vectors_of_two_models_do_not_fit_together(gpt):
    text = "beavers build long dams at Aldermoor"
    small = embed(gpt, text, dimensions=1024)[0]
    large = embed(gpt, text, model="text-embedding-3-large", dimensions=1024)[0]
    assert abs(cosine(small, large)) < 0.5
    assert len(embed(gpt, text)[0]) == 1536
    assert len(embed(gpt, text, model="text-embedding-3-large")[0]) == 3072


def test_the_client_asks_for_base64_and_floats_give_the_same_vector(fake, gpt):
    packed = embed(gpt, "beavers build dams")[0]
    plain = embed(gpt, "beavers build dams", encoding_format="float")[0]
    assert packed == pytest.approx(plain, abs=1e-6)
    formats = [request.json["encoding_format"] for request in fake.embedding_requests]
    assert formats == ["base64", "float"]
    assert fake.embedded_texts == ["beavers build dams"] * 2


def test_tokens_can_be_embedded_like_their_text(gpt):
    tokens = bpe_openai.get_encoding("cl100k_base").encode("beavers build dams")
    assert embed(gpt, tokens) == embed(gpt, [tokens]) == embed(gpt, "beavers build dams")


def test_the_limits_of_embedding_requests_are_inclusive(gpt):
    assert len(embed(gpt, ["dam"] * 2048)) == 2048
    assert len(embed(gpt, "dam " * 8191)) == 1
    assert (
        gpt.embeddings.create(model="text-embedding-3-small", input="a b").usage.total_tokens == 2
    )


EMBEDDING_REJECTIONS = {
    "an empty string": ({"input": ""}, 400, "is invalid"),
    "an empty list": ({"input": []}, 400, "is invalid"),
    "an empty string in a list": ({"input": ["dam", ""]}, 400, "is invalid"),
    "a number in a list": ({"input": ["dam", 3]}, 400, "is invalid"),
    "2,049 inputs": ({"input": ["dam"] * 2049}, 400, "is invalid"),
    "8,193 tokens": ({"input": "dam " * 8193}, 400, "maximum context length is 8192"),
    "300,001 tokens": ({"input": ["dam " * 8000] * 38}, 400, "max 300000 tokens per request"),
    "a chat model": ({"model": "gpt-4o"}, 403, "not allowed to generate embeddings"),
    "an unknown model": ({"model": "all-MiniLM-L6-v2"}, 404, "does not exist"),
    "too many dimensions": ({"dimensions": 1537}, 400, "dimensions"),
    "no dimensions": ({"dimensions": 0}, 400, "dimensions"),
    "an unknown format": ({"encoding_format": "int8"}, 400, "Supported values"),
    "an unknown field": ({"extra_body": {"truncate": True}}, 400, "Unrecognized request argument"),
}


@pytest.mark.parametrize("case", EMBEDDING_REJECTIONS)
def test_an_embedding_request_is_rejected_for(gpt, case):
    fields, status, text = EMBEDDING_REJECTIONS[case]
    with pytest.raises(openai.APIStatusError, match=text) as caught:
        gpt.embeddings.create(**{"model": "text-embedding-3-small", "input": "dam"} | fields)
    assert caught.value.status_code == status


# --- rejections --------------------------------------------------------------------------------

OPENAI_REJECTIONS = {
    "a wrong role": ({"messages": [{"role": "bot", "content": "x"}]}, 400, "Supported values"),
    "no messages": ({"messages": []}, 400, "empty array"),
    "messages that are no list": ({"messages": {"role": "user"}}, 400, "array of objects"),
    "a message that is no object": ({"messages": ["Hello"]}, 400, "expected an object"),
    "an empty content": ({"messages": [user("")]}, 400, "'content'"),
    "a null content": ({"messages": [user(None)]}, 400, "'content'"),
    "an empty content list": ({"messages": [user([])]}, 400, "'content'"),
    "an unknown message field": ({"messages": [user("x") | {"source": "a"}]}, 400, "source"),
    "a tool result without a call": ({"messages": [{"role": "tool", "content": "x"}]}, 400, "tool"),
    "an unknown model": ({"model": "gpt-17"}, 404, "`gpt-17` does not exist"),
    "a model of Anthropic": ({"model": "claude-sonnet-4-6"}, 404, "does not exist"),
    "an embedding model": ({"model": "text-embedding-3-small"}, 403, "not allowed to sample"),
    "an empty model": ({"model": ""}, 400, "model parameter"),
    "an unknown field": ({"extra_body": {"top_k": 4}}, 400, "argument supplied: top_k"),
    "two unknown fields": ({"extra_body": {"b": 1, "a": 2}}, 400, "arguments supplied: a, b"),
    "a high temperature": ({"temperature": 2.1}, 400, "maximum value"),
    "a low temperature": ({"temperature": -1}, 400, "minimum value"),
    "a temperature in words": ({"temperature": "0"}, 400, "expected decimal"),
    "no max_tokens left": ({"max_tokens": 0}, 400, "integer below minimum value"),
    "half a token": ({"max_completion_tokens": 1.5}, 400, "expected integer"),
    "both limits": ({"max_tokens": 5, "max_completion_tokens": 5}, 400, "at the same time"),
    "a stream in words": ({"extra_body": {"stream": "yes"}}, 400, "Invalid type for 'stream'"),
    "stream options alone": ({"stream_options": {"include_usage": True}}, 400, "only allowed"),
}


@pytest.mark.parametrize("case", OPENAI_REJECTIONS)
def test_openai_rejects(gpt, case):
    fields, status, text = OPENAI_REJECTIONS[case]
    with pytest.raises(openai.APIStatusError, match=text) as caught:
        chat(gpt, **fields)
    assert caught.value.status_code == status
    body = caught.value.body
    assert isinstance(body, dict)
    assert set(body) == {"message", "type", "param", "code"}


def test_openai_takes_every_role_that_it_documents(gpt):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    chat(
        gpt,
        messages=[
            {"role": "system", "content": "a"},
            {"role": "developer", "content": "b"},
            {"role": "user", "content": [{"type": "text", "text": "c"}]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "d", "tool_call_id": "1"},
        ],
        temperature=None,
    )


ANTHROPIC_REJECTIONS = {
    "a system turn": ({"messages": [{"role": "system", "content": "x"}]}, 400, "role 'system'"),
    "a wrong role": (
        {"messages": [{"role": "tool", "content": "x"}]},
        400,
        "'user' or 'assistant'",
    ),
    "an assistant who begins": (
        {"messages": [{"role": "assistant", "content": "x"}, *HELLO]},
        400,
        'first message must use the "user" role',
    ),
    "a prefilled answer": (
        {"messages": [*HELLO, {"role": "assistant", "content": "{"}]},
        400,
        "does not support assistant message prefill",
    ),
    "no messages": ({"messages": []}, 400, "at least one message"),
    "messages that are no list": ({"messages": {"role": "user"}}, 400, "valid list"),
    "a message that is no object": ({"messages": ["Hello"]}, 400, "valid dictionary"),
    "an empty content": ({"messages": [user("")]}, 400, "non-empty content"),
    "a null content": ({"messages": [user(None)]}, 400, "non-empty content"),
    "an empty text block": ({"messages": [user([{"type": "text", "text": ""}])]}, 400, "non-empty"),
    "a blank content": ({"messages": [user(" \n")]}, 400, "non-whitespace"),
    "a number for content": ({"messages": [user(3)]}, 400, "valid list"),
    "an unknown message field": ({"messages": [user("x") | {"name": "a"}]}, 400, "Extra inputs"),
    "an empty system block": ({"system": [{"type": "text", "text": ""}]}, 400, "system: text"),
    "an unknown model": ({"model": "claude-2"}, 404, "model: claude-2"),
    "a model of OpenAI": ({"model": "gpt-4o"}, 404, "model: gpt-4o"),
    "an unknown field": ({"extra_body": {"n": 1}}, 400, "n: Extra inputs are not permitted"),
    "no tokens": ({"max_tokens": 0}, 400, "max_tokens"),
    "tokens in words": ({"extra_body": {"max_tokens": "9"}}, 400, "valid integer"),
    "a temperature over 1": ({"extra_body": {"temperature": 1.5}}, 400, "temperature: range: 0..1"),
    "a stream in words": ({"extra_body": {"stream": "yes"}}, 400, "valid boolean"),
}


@pytest.mark.parametrize("case", ANTHROPIC_REJECTIONS)
def test_anthropic_rejects(claude, case):
    fields, status, text = ANTHROPIC_REJECTIONS[case]
    with pytest.raises(anthropic.APIStatusError, match=re.escape(text)) as caught:
        message(claude, **fields)
    assert caught.value.status_code == status
    body = caught.value.body
    assert isinstance(body, dict)
    assert body["type"] == "error"
    kind = "not_found_error" if status == 404 else "invalid_request_error"
    assert body["error"]["type"] == kind


ANTHROPIC_HEADERS = {"x-api-key": "k", "anthropic-version": "2023-06-01"}
RAW_REJECTIONS = {
    "no OpenAI key": ("/v1/chat/completions", {"json": {}}, 401, "didn't provide an API key"),
    "a blank OpenAI key": (
        "/v1/embeddings",
        {"json": {}, "headers": {"Authorization": "Bearer"}},
        401,
        "didn't provide an API key",
    ),
    "no Anthropic key": ("/v1/messages", {"json": {}}, 401, "x-api-key header is required"),
    "a blank Anthropic key": (
        "/v1/messages",
        {"json": {}, "headers": {"x-api-key": ""}},
        401,
        "invalid x-api-key",
    ),
    "no Anthropic version": (
        "/v1/messages",
        {"json": {}, "headers": {"x-api-key": "k"}},
        400,
        "anthropic-version: header is required",
    ),
    "an Anthropic request without max_tokens": (
        "/v1/messages",
        {"json": {"model": "claude-opus-4-6", "messages": HELLO}, "headers": ANTHROPIC_HEADERS},
        400,
        "max_tokens: Field required",
    ),
    "an unknown OpenAI path": ("/v1/complete", {"json": {}}, 404, "Invalid URL"),
    "a doubled /v1": (
        "/v1/v1/messages",
        {"json": {}, "headers": ANTHROPIC_HEADERS},
        404,
        "Not Fou",
    ),
    "an OpenAI body that is no JSON": (
        "/v1/chat/completions",
        {
            "content": b"{,}",
            "headers": {"Authorization": "Bearer k", "Content-Type": "application/json"},
        },
        400,
        "could not parse the JSON body",
    ),
    "an OpenAI body that is a form": (
        "/v1/chat/completions",
        {"data": {"model": "gpt-4o"}, "headers": {"Authorization": "Bearer k"}},
        400,
        "Content-Type",
    ),
    "an OpenAI request without messages": (
        "/v1/chat/completions",
        {"json": {"model": "gpt-4o"}, "headers": {"Authorization": "Bearer k"}},
        400,
        "Missing required parameter: 'messages'",
    ),
    "an Anthropic body that is no JSON": (
        "/v1/messages",
        {"content": b"[]", "headers": ANTHROPIC_HEADERS | {"Content-Type": "application/json"}},
        400,
        "could not parse",
    ),
}


@pytest.mark.parametrize("case", RAW_REJECTIONS)
def test_what_no_client_would_send_is_rejected_too(fake, case):
    path, request, status, text = RAW_REJECTIONS[case]
    response = post(fake, path, **request)
    assert response.status_code == status
    assert text in response.json()["error"]["message"]


def test_an_anthropic_key_is_taken_from_either_header(fake, claude):
    message(claude)
    assert fake.requests[0].headers["authorization"] == "Bearer sk-ant-x"
    body = {"model": "claude-opus-4-6", "max_tokens": 9, "messages": HELLO}
    assert post(fake, "/v1/messages", json=body, headers=ANTHROPIC_HEADERS).status_code == 200


def test_a_get_where_a_post_belongs_is_not_allowed(fake):
    response = httpx2.get(fake.url + "/v1/embeddings", headers={"Authorization": "Bearer k"})
    assert response.status_code == 405


def test_a_method_that_does_not_exist_is_no_method_of_the_client(gpt, claude):
    with pytest.raises(AttributeError):
        gpt.chat.completions.acreate  # noqa: B018
    with pytest.raises(AttributeError):
        claude.messages.acreate  # noqa: B018


def test_a_chunk_read_as_a_dict_fails(fake, gpt):
    with pytest.raises(AttributeError):
        [chunk.choices[0].delta.get("content") for chunk in chat(gpt, stream=True)]


def test_the_models_of_openai_are_listed_without_those_of_anthropic(gpt):
    names = {model.id for model in gpt.models.list()}
    assert names == {"gpt-4o", "gpt-4o-mini", "text-embedding-3-small", "text-embedding-3-large"}


def test_the_models_can_be_chosen():
    with FakeLLM(chat_models=("gpt-9",), embed_models={"e": 8}) as fake:
        client = openai.OpenAI(api_key="k", base_url=fake.openai_base_url)
        assert chat(client, model="gpt-9").choices
        assert len(embed(client, "dam", model="e")[0]) == 8
        with pytest.raises(openai.NotFoundError):
            chat(client)


# --- Ollama ------------------------------------------------------------------------------------


def test_ollama_lists_what_is_pulled_and_answers_as_ollama_does(ollama, local):
    assert [m.id for m in local.models.list()] == ["qwen3:4b", "nomic-embed-text:latest"]
    assert httpx2.get(ollama.url).text == "Ollama is running"
    assert "version" in httpx2.get(ollama.url + "/api/version").json()
    tags = httpx2.get(ollama.url + "/api/tags").json()["models"]
    assert [tag["name"] for tag in tags] == ["qwen3:4b", "nomic-embed-text:latest"]
    assert httpx2.get(ollama.url + "/v2").text == "404 page not found"


def test_ollama_needs_no_key_and_ignores_unknown_fields(ollama):
    body = {"model": "qwen3:4b", "messages": HELLO, "options": {"num_ctx": 9}}
    assert post(ollama, "/v1/chat/completions", json=body).status_code == 200


def test_ollama_has_no_model_that_was_not_pulled(local):
    with pytest.raises(openai.NotFoundError) as caught:
        chat(local, model="llama3.2")
    assert caught.value.body == {
        "message": "model 'llama3.2' not found",
        "type": "not_found_error",
        "param": None,
        "code": None,
    }


@pytest.mark.parametrize(
    ("messages", "model"),
    [([], "qwen3:4b"), ([user("")], "qwen3:4b"), (HELLO, "nomic-embed-text")],
)
def test_ollama_rejects_a_chat_without_messages_or_with_an_embedding_model(local, messages, model):
    with pytest.raises(openai.BadRequestError):
        chat(local, model=model, messages=messages)


def test_ollama_embeds_with_an_embedding_model_alone(local):
    assert len(embed(local, "dam", model="nomic-embed-text")[0]) == 768
    with pytest.raises(openai.APIStatusError, match="does not support embeddings"):
        embed(local, "dam", model="qwen3:4b")


def test_thoughts_come_in_the_content_or_in_a_field_of_their_own(ollama, local):
    ollama.reply = "Yes."
    ollama.fail(think="Hm.")
    answer = chat(local, model="qwen3:4b")
    assert answer.choices[0].message.content == "<think>\nHm.\n</think>\n\nYes."
    ollama.fail(reasoning="Hm.", times=2)
    answer = chat(local, model="qwen3:4b")
    assert answer.choices[0].message.reasoning == "Hm."
    deltas = [c.choices[0].delta for c in chat(local, model="qwen3:4b", stream=True)]
    assert [d.reasoning for d in deltas if hasattr(d, "reasoning")] == ["Hm."]


# --- faults ------------------------------------------------------------------------------------

STATUS_ERRORS = {
    429: ("RateLimitError", "RateLimitError"),
    500: ("InternalServerError", "InternalServerError"),
    529: ("InternalServerError", "OverloadedError"),
}


@pytest.mark.parametrize("status", STATUS_ERRORS)
def test_a_status_on_demand_is_the_error_of_the_client(fake, gpt, claude, status):
    fake.fail(status=status, message="Not now.", times=2)
    for_openai, for_anthropic = STATUS_ERRORS[status]
    with pytest.raises(getattr(openai, for_openai), match=r"Not now\."):
        chat(gpt)
    error = getattr(anthropic, for_anthropic, anthropic.InternalServerError)
    with pytest.raises(anthropic.APIStatusError, match=r"Not now\.") as caught:
        message(claude)
    assert isinstance(caught.value, error)
    assert caught.value.status_code == status
    assert chat(gpt)


def test_the_client_waits_as_long_as_retry_after_says(fake):
    client = openai.OpenAI(api_key="k", base_url=fake.openai_base_url)
    fake.fail(status=429, headers={"Retry-After": "1"})
    assert chat(client)
    first, second = fake.chat_requests
    assert 1 <= second.received - first.finished < 2
    assert (first.status, second.status) == (429, 200)


def test_a_fault_waits_for_its_text_and_can_last_for_ever(fake, gpt):
    fake.fail(containing="Brenn", status=500, times=None)
    assert chat(gpt)
    for _ in range(3):
        with pytest.raises(openai.InternalServerError):
            chat(gpt, messages=[user("Where is\nBrenn?")])
    fake.recover()
    assert chat(gpt, messages=[user("Brenn?")])


def test_a_fault_of_the_answer_or_of_another_path_leaves_embeddings_alone(fake, gpt):
    fake.fail(reply="")
    fake.fail(path="/chat/", status=500)
    assert embed(gpt, "dam")
    assert chat(gpt).choices[0].message.content == ""
    with pytest.raises(openai.InternalServerError):
        chat(gpt)


def test_a_request_that_breaks_a_rule_uses_up_no_fault(fake, gpt):
    fake.fail(status=500)
    with pytest.raises(openai.BadRequestError):
        chat(gpt, messages=[])
    with pytest.raises(openai.InternalServerError):
        chat(gpt)


HTML = "<html><body>Bad gateway</body></html>"


def test_html_with_502_is_a_status_error(fake, gpt, claude):
    fake.fail(body=HTML, status=502, times=2)
    with pytest.raises(openai.InternalServerError, match="502") as caught:
        chat(gpt)
    assert caught.value.response.text == HTML  # but it is not in the message
    with pytest.raises(anthropic.InternalServerError, match="Bad gateway"):
        message(claude)


def test_html_with_200_is_no_error_for_the_clients_but_a_string_or_an_empty_stream(
    fake, gpt, claude
):
    fake.fail(body=HTML, times=None)
    assert chat(gpt) == message(claude) == HTML
    assert list(chat(gpt, stream=True)) == list(message(claude, stream=True)) == []
    with pytest.raises(AttributeError):  # and not openai.APIError
        embed(gpt, "dam")


def claude_text(client):
    with client.messages.stream(model="claude-opus-4-6", max_tokens=9, messages=HELLO) as stream:
        yield from stream.text_stream


async def async_gpt_text(url):
    async with openai.AsyncOpenAI(api_key="k", base_url=url) as client:
        async for chunk in await chat(client, stream=True):
            yield chunk.choices[0].delta.content


def test_a_cut_stream_is_an_api_error_of_openai_but_a_raw_httpx2_error_of_anthropic(
    fake, gpt, claude
):
    fake.reply = "One two three four."
    fake.fail(cut_after=2, times=None)
    got = []
    with pytest.raises(openai.APIConnectionError):
        got.extend(chunk.choices[0].delta.content for chunk in chat(gpt, stream=True))
    with pytest.raises(httpx2.RemoteProtocolError) as caught:
        got.extend(claude_text(claude))
    assert not isinstance(caught.value, anthropic.APIError)
    with pytest.raises(openai.APIConnectionError):
        asyncio.run(collect(async_gpt_text(fake.openai_base_url), got))
    assert "".join(got) == "One two" * 3


async def collect(items, into):
    async for item in items:
        into.append(item)


def test_a_cut_answer_that_is_not_streamed_is_a_connection_error(fake, gpt, claude):
    fake.fail(cut_after=2, times=2)
    with pytest.raises(openai.APIConnectionError):
        chat(gpt)
    with pytest.raises(anthropic.APIConnectionError):
        message(claude)


def test_an_error_event_in_a_stream_is_an_api_error(fake, gpt, claude):
    fake.reply = "One two three four."
    fake.fail(error_after=2, times=None)
    with pytest.raises(openai.APIError, match="Overloaded"):
        list(chat(gpt, stream=True))
    with pytest.raises(anthropic.APIStatusError, match="overloaded_error") as caught:
        list(claude_text(claude))
    assert caught.value.status_code == 200  # the status of the stream that was under way


def test_a_dropped_connection_is_a_connection_error_and_is_retried(fake, gpt, claude):
    fake.fail(drop=True, times=2)
    with pytest.raises(openai.APIConnectionError):
        chat(gpt)
    with pytest.raises(anthropic.APIConnectionError):
        message(claude)
    fake.fail(drop=True, path="/embeddings")
    assert embed(gpt.with_options(max_retries=1), "dam")
    assert len(fake.embedding_requests) == 2


def test_an_empty_answer_has_no_text(fake, gpt, claude):
    fake.fail(reply="", times=None)
    assert chat(gpt).choices[0].message.content == ""
    assert "".join(c.choices[0].delta.content or "" for c in chat(gpt, stream=True)) == ""
    assert message(claude).content == []


def test_a_null_content_is_none_for_openai_and_an_empty_list_for_anthropic(fake, gpt, claude):
    fake.fail(null_content=True, times=None)
    assert chat(gpt).choices[0].message.content is None
    assert all(chunk.choices[0].delta.content is None for chunk in chat(gpt, stream=True))
    assert message(claude).content == []


@pytest.mark.parametrize(
    ("reason", "of_claude"), [("length", "max_tokens"), ("content_filter", "refusal")]
)
def test_an_answer_can_end_for_another_reason(fake, gpt, claude, reason, of_claude):
    fake.fail(finish_reason=reason, times=None)
    assert chat(gpt).choices[0].finish_reason == reason
    assert list(chat(gpt, stream=True))[-1].choices[0].finish_reason == reason
    assert message(claude).stop_reason == of_claude


def test_the_prompt_can_be_reported_shorter_than_it_was(fake, gpt, claude):
    fake.fail(prompt_tokens=3, times=None)
    assert chat(gpt).usage.prompt_tokens == 3
    assert message(claude).usage.input_tokens == 3


def test_delays_are_kept_and_a_client_can_time_out(fake, gpt):
    fake.reply = "One two three."
    fake.token_delay = 0.1
    started = time.monotonic()
    list(chat(gpt, stream=True))
    assert time.monotonic() - started >= 0.3
    fake.fail(delay=5)
    with pytest.raises(openai.APITimeoutError):
        chat(gpt, timeout=0.3)


# --- the program -------------------------------------------------------------------------------


def test_every_request_is_recorded_with_its_headers_and_times(fake, gpt):
    chat(gpt, messages=[user("Grüße")])
    (request,) = fake.requests
    assert (request.method, request.path) == ("POST", "/v1/chat/completions")
    assert request.headers["authorization"] == "Bearer sk-x"
    assert request.json["messages"] == [user("Grüße")]
    assert request.received <= request.finished <= time.monotonic()
    assert "Grüße" in request.text


def test_the_environment_sends_both_clients_here(fake, ollama, monkeypatch):
    for name, value in (fake.environment() | ollama.environment()).items():
        monkeypatch.setenv(name, value)
    assert chat(openai.OpenAI())
    assert message(anthropic.Anthropic())
    assert len(fake.requests) == 2
    assert os.environ["OLLAMA_HOST"] == ollama.url


def test_the_server_stops_at_once_though_clients_wait(fake):
    client = openai.OpenAI(api_key="k", base_url=fake.openai_base_url, max_retries=0)
    chat(client)  # leaves a connection open
    fake.delay = 30
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(chat, client)
        while len(fake.requests) < 2:
            time.sleep(0.01)
        started = time.monotonic()
        fake.close()
        assert time.monotonic() - started < fake.delay / 2
        assert waiting.exception() is None or isinstance(waiting.exception(), openai.APIError)
    with pytest.raises(openai.APIConnectionError):
        chat(client)


def test_it_runs_as_a_program_that_prints_its_url_first():
    command = [sys.executable, Path(__file__).with_name("fake_llm.py"), "--port", "0", "--ollama"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout
        try:
            url = program.stdout.readline().strip()
            assert httpx2.get(url).text == "Ollama is running"
        finally:
            program.terminate()
        assert program.stdout.read() == ""
