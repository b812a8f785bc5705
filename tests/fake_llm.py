"""A strict loopback server that speaks the HTTP formats of OpenAI, Anthropic and Ollama.

    with FakeLLM() as fake:
        subprocess.run([...], env=os.environ | fake.environment())
        assert len(fake.chat_requests) == 1

It accepts what the real services accept and rejects what they reject, with their status codes and
JSON error shapes, so that a wrong field or a method that does not exist fails a test. Two rules are
stricter on purpose and marked so: an empty prompt for OpenAI and Ollama, and `n` other than 1.

As a program (`python tests/fake_llm.py --port 0 [--ollama]`) it prints its base URL on the first
line and serves until it is killed.

Sources of the rules: the SDKs' own parameter types, platform.openai.com/docs/api-reference,
docs.claude.com/en/api, ollama's openai/openai.go and middleware/openai.go, and the error texts
that users of the services quote in their issues.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import itertools
import json
import math
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, lru_cache
from hashlib import blake2b
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any, ClassVar, cast
from urllib.parse import urlsplit

import bpe_openai

JSON = dict[str, Any]
Reply = str | Callable[[JSON], str]

REFUSAL = "I don't have enough information to answer that."
CHAT_MODELS = ("gpt-4o", "gpt-4o-mini", "claude-sonnet-4-6", "claude-opus-4-6")
EMBED_MODELS = {"text-embedding-3-small": 1536, "text-embedding-3-large": 3072}
PULLED_MODELS = ("qwen3:4b",)


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# The limits of POST /v1/embeddings, as its reference page gives them.
MAX_INPUTS = 2048
MAX_INPUT_TOKENS = 8192
MAX_REQUEST_TOKENS = 300_000

OPENAI_CHAT_FIELDS = _names(
    "audio frequency_penalty function_call functions logit_bias logprobs max_completion_tokens "
    "max_tokens messages metadata modalities model moderation n parallel_tool_calls prediction "
    "presence_penalty prompt_cache_key prompt_cache_options prompt_cache_retention "
    "reasoning_effort response_format safety_identifier seed service_tier stop store stream "
    "stream_options temperature tool_choice tools top_logprobs top_p user verbosity "
    "web_search_options"
)
OPENAI_MESSAGE_FIELDS = _names(
    "audio content function_call name refusal role tool_call_id tool_calls"
)
OPENAI_ROLES = ("system", "assistant", "user", "tool", "developer")
OPENAI_EMBED_FIELDS = _names("dimensions encoding_format input model user")
ANTHROPIC_FIELDS = _names(
    "cache_control container diagnostics inference_geo max_tokens messages metadata model "
    "output_config service_tier speed stop_sequences stream system temperature thinking "
    "tool_choice tools top_k top_p user_profile_id workspace_id"
)

# Kinds of number: name -> (whole, lowest, highest).
OPENAI_NUMBERS: dict[str, tuple[bool, float, float]] = {
    "temperature": (False, 0, 2),
    "top_p": (False, 0, 1),
    "frequency_penalty": (False, -2, 2),
    "presence_penalty": (False, -2, 2),
    "max_tokens": (True, 1, math.inf),
    "max_completion_tokens": (True, 1, math.inf),
    "seed": (True, -math.inf, math.inf),
    "n": (True, 1, 1),  # stricter: the service goes up to 128
}
ANTHROPIC_NUMBERS: dict[str, tuple[bool, float, float]] = {
    "max_tokens": (True, 1, math.inf),
    "temperature": (False, 0, 1),
    "top_p": (False, 0, 1),
    "top_k": (True, 0, math.inf),
}

OPENAI_ERROR_TYPES = {429: "requests", 500: "server_error", 503: "server_error"}
ANTHROPIC_ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    529: "overloaded_error",
}
ANTHROPIC_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "content_filter": "refusal"}

# Left out of the embeddings, so that two texts are near for their matter and not for their grammar.
FUNCTION_WORDS = _names(
    "a about all also an and any are as at be been but by can could did do does for from had has "
    "have how i if in into is it its me more most much my no not of on one or our say she should "
    "so some tell than that the their them there these they this those to up was we were what when "
    "where which who whom whose why will with would you your"
)

PASSAGE = re.compile(
    r'<passage-(?P<hex>[0-9a-fA-F]+) n="(?P<n>\d+)"[^>]*>(?P<text>.*?)</passage-(?P=hex)>', re.S
)


# --- text: tokens, words, vectors, the default answer ------------------------------------------


@cache
def _encoding() -> bpe_openai.Encoding:
    return bpe_openai.get_encoding("cl100k_base")


def count_tokens(text: str) -> int:
    """Count cl100k tokens; in slices, as bpe_openai refuses more than 200,000 tokens at once."""
    slices = (text[start : start + 40_000] for start in range(0, len(text), 40_000))
    return sum(len(_encoding().encode_ordinary(part)) for part in slices)


def content_words(text: str) -> list[str]:
    """Return the lower-cased stems of `text` without function words, in order."""
    words = (word for word in re.findall(r"\w+", text.lower()) if word not in FUNCTION_WORDS)
    return [re.sub(r"(ing|ed|es|s|e)$", "", word) if len(word) > 3 else word for word in words]


@lru_cache(maxsize=100_000)
def _place(model: str, stem: str, dimensions: int) -> tuple[int, int]:
    value = int.from_bytes(blake2b(f"{model}\0{stem}".encode(), digest_size=8).digest(), "big")
    return (value >> 1) % dimensions, 1 if value & 1 else -1


def embed_text(text: str, model: str, dimensions: int) -> list[float]:
    """Hash the words of `text` into a vector of unit length, other places for another model."""
    vector = [0.0] * dimensions
    for stem, number in Counter(content_words(text) or [text]).items():
        place, sign = _place(model, stem, dimensions)
        vector[place] += sign * number
    # Two words can fall on one place with opposite signs; a text of only those has no direction.
    length = math.hypot(*(value for value in vector if value)) or 1.0
    return [value / length if value else 0.0 for value in vector]


def read_prompt(text: str) -> tuple[list[tuple[int, str]], str]:
    """Split a prompt into its numbered passages and the question that follows them.

    The only place that knows how the scripts write a prompt.
    """
    found = list(PASSAGE.finditer(text))
    passages = [(int(match["n"]), match["text"].strip()) for match in found]
    question = text[found[-1].end() :] if found else text
    return passages, re.sub(r"^\s*question:\s*", "", question, flags=re.I).strip()


def extractive_reply(request: JSON) -> str:
    """Answer with the passage sentence nearest to the question and its number, or refuse.

    Refuses when fewer than two content words are shared (one, where the question has only one).
    """
    prompts = [message_text(m) for m in request["messages"] if m["role"] == "user"]
    passages, question = read_prompt(prompts[-1] if prompts else "")
    wanted = set(content_words(question))
    sentences = [
        (len(wanted & set(content_words(sentence))), -order, number, sentence.strip())
        for order, (number, text) in enumerate(passages)
        for sentence in re.split(r"(?<=[.!?])\s+|\n+", text)
    ]
    shared, _, number, sentence = max(sentences, default=(0, 0, 0, ""))
    return f"{sentence} [{number}]" if shared >= max(1, min(2, len(wanted))) else REFUSAL


def message_text(message: JSON) -> str:
    """Return the text of a message whose content is a string or a list of blocks."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "\n".join(block.get("text") or "" for block in content)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


# --- what the server keeps and what it is told -------------------------------------------------


@dataclass
class Request:
    """One request as it came in; `finished` and `status` are None until it is answered.

    Times are of `time.monotonic()`. `json` is None where the body is no JSON object.
    """

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    json: JSON | None
    dialect: str
    received: float
    finished: float | None = None
    status: int | None = None

    @property
    def is_chat(self) -> bool:
        """True for a chat completion or an Anthropic message."""
        return self.path in ("/v1/chat/completions", "/v1/messages")

    @property
    def is_embedding(self) -> bool:
        """True for a request for embeddings."""
        return self.path == "/v1/embeddings"

    @property
    def text(self) -> str:
        """All strings of the JSON body, one a line."""
        return "\n".join(_strings(self.json))


@dataclass
class Fault:
    """What goes wrong with the next `times` valid requests that match; None is for ever.

    A request matches if `path` is part of its path and `containing` part of its text. A fault of
    the answer (from `reply` on) is kept for chat requests. Tokens of a stream are words here.
    """

    times: int | None = 1
    path: str = ""
    containing: str = ""

    status: int = 200  # other than 200: an error in the service's JSON shape, unless `body` is set
    headers: dict[str, str] = field(default_factory=dict)
    message: str = "The server had an error while processing your request."
    body: str | None = None  # sent as it is
    content_type: str = "text/html"  # of `body`
    drop: bool = False  # close the connection before a response
    delay: float = 0.0  # seconds before the response

    reply: str | None = None  # instead of the server's; "" is an empty answer
    null_content: bool = False  # `content: null`; for Anthropic, whose content is a list, []
    finish_reason: str | None = None  # "length", "content_filter"; mapped for Anthropic
    think: str | None = None  # put before the answer as <think>...</think>
    reasoning: str = ""  # the extra field of a message or delta, as Ollama sends it
    prompt_tokens: int | None = None  # reported instead of the true number
    cut_after: int | None = None  # tokens; then the socket closes (half-way where not streamed)
    error_after: int | None = None  # tokens of a stream; then an `error` event

    OF_THE_ANSWER: ClassVar = _names(
        "reply null_content finish_reason think reasoning prompt_tokens cut_after error_after"
    )

    def matches(self, request: Request) -> bool:
        """Tell whether this fault is for `request`."""
        of_the_answer = any(
            getattr(self, name) != getattr(Fault, name) for name in self.OF_THE_ANSWER
        )
        return (
            self.path in request.path
            and self.containing in request.text
            and (request.is_chat or not of_the_answer)
        )


@dataclass(frozen=True)
class Answer:
    """What the model says, before it is put into a service's format."""

    text: str | None
    finish: str  # in OpenAI's words: stop, length, content_filter
    reasoning: str
    input_tokens: int
    output_tokens: int


class Refusal(Exception):
    """A request that the real service rejects."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        kind: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message = status, message
        self.code, self.param, self.kind = code, param, kind


class _StreamCut(Exception):
    """The socket closes here."""


class _StreamError(Exception):
    """The stream turns into an error event here."""


# --- the rules: each function raises Refusal for what the service rejects ----------------------


def _number_fault(value: Any, whole: bool, low: float, high: float) -> str | None:
    """Return "type", "below" or "above", or None for a number within the bounds."""
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        return "type"
    return "below" if value < low else "above" if value > high else None


def _check_openai_numbers(request: JSON) -> None:
    for name, (whole, low, high) in OPENAI_NUMBERS.items():
        value = request.get(name)
        fault = None if value is None else _number_fault(value, whole, low, high)
        word = "integer" if whole else "decimal"
        if fault == "type":
            message = f"Invalid type for '{name}': expected {word}, got {type(value).__name__}."
            raise Refusal(400, message, code="invalid_type", param=name)
        if fault:
            limit = "minimum" if fault == "below" else "maximum"
            bound = f">= {low:g}" if fault == "below" else f"<= {high:g}"
            message = (
                f"Invalid '{name}': {word} {fault} {limit} value. "
                f"Expected a value {bound}, but got {value} instead."
            )
            raise Refusal(400, message, code=f"{word}_{fault}_{limit[:3]}_value", param=name)


def _check_openai_fields(request: JSON, known: frozenset[str]) -> None:
    if unknown := sorted(set(request) - known):
        plural = "s" if len(unknown) > 1 else ""
        names = ", ".join(unknown)
        raise Refusal(400, f"Unrecognized request argument{plural} supplied: {names}")
    if not isinstance(request.get("model"), str) or not request["model"]:
        raise Refusal(400, "you must provide a model parameter")


def _check_openai_message(place: str, message: Any) -> None:
    if not isinstance(message, dict):
        text = f"Invalid type for '{place}': expected an object, but got something else instead."
        raise Refusal(400, text, code="invalid_type", param=place)
    if unknown := sorted(set(message) - OPENAI_MESSAGE_FIELDS):
        param = f"{place}.{unknown[0]}"
        raise Refusal(400, f"Unknown parameter: '{param}'.", code="unknown_parameter", param=param)
    if message.get("role") not in OPENAI_ROLES:
        roles = ", ".join(f"'{role}'" for role in OPENAI_ROLES)
        text = f"Invalid value: '{message.get('role')}'. Supported values are: {roles}."
        raise Refusal(400, text, code="invalid_value", param=f"{place}.role")
    if message.get("tool_calls"):
        return
    content = message.get("content")
    blocks = content if isinstance(content, list) else [{"type": "text", "text": content}]
    # Stricter: the service takes an empty string, but an empty prompt is a bug of the caller.
    if not blocks or any(
        not isinstance(block, dict)
        or "type" not in block
        or (block["type"] == "text" and not (isinstance(block.get("text"), str) and block["text"]))
        for block in blocks
    ):
        text = f"Invalid value for 'content': expected a non-empty string, got {content!r}."
        raise Refusal(400, text, code="invalid_value", param=f"{place}.content")


def check_openai_chat(request: JSON, models: frozenset[str], embed_models: set[str]) -> None:
    """Apply the rules of POST /v1/chat/completions: 400, 403 (embedding model), 404 (unknown)."""
    _check_openai_fields(request, OPENAI_CHAT_FIELDS)
    messages = request.get("messages")
    if messages is None:
        text = "Missing required parameter: 'messages'."
        raise Refusal(400, text, code="missing_required_parameter", param="messages")
    if not isinstance(messages, list):
        text = "Invalid type for 'messages': expected an array of objects."
        raise Refusal(400, text, code="invalid_type", param="messages")
    if not messages:
        text = (
            "Invalid 'messages': empty array. Expected an array with minimum length 1, "
            "but got an empty array instead."
        )
        raise Refusal(400, text, code="empty_array", param="messages")
    _check_openai_model(request["model"], models)
    if request["model"] in embed_models:
        raise Refusal(403, "You are not allowed to sample from this model")
    for index, message in enumerate(messages):
        _check_openai_message(f"messages[{index}]", message)
        if message["role"] == "tool" and not any(m.get("tool_calls") for m in messages[:index]):
            text = "messages with role 'tool' must be a response to a message with 'tool_calls'."
            raise Refusal(400, text, param=f"messages[{index}].role")
    _check_openai_numbers(request)
    if request.get("max_tokens") and request.get("max_completion_tokens"):
        text = "Setting 'max_tokens' and 'max_completion_tokens' at the same time is not supported."
        raise Refusal(400, text)
    for name, kind in {"stream": bool, "stream_options": dict, "stop": str | list}.items():
        if request.get(name) is not None and not isinstance(request[name], kind):
            raise Refusal(400, f"Invalid type for '{name}'.", code="invalid_type", param=name)
    if request.get("stream_options") and not request.get("stream"):
        text = "The 'stream_options' parameter is only allowed when 'stream' is enabled."
        raise Refusal(400, text, param="stream_options")


def _check_openai_model(model: str, models: frozenset[str]) -> None:
    if model not in models:
        text = f"The model `{model}` does not exist or you do not have access to it."
        raise Refusal(404, text, code="model_not_found")


def read_inputs(request: JSON) -> list[str]:
    """Return the texts to embed; tokens are decoded. 400 for what is neither, or is empty."""
    inputs = request.get("input")
    if isinstance(inputs, str) or (isinstance(inputs, list) and inputs and _is_tokens(inputs)):
        inputs = [inputs]
    if (
        not isinstance(inputs, list)
        or not 1 <= len(inputs) <= MAX_INPUTS
        or not all(item and (isinstance(item, str) or _is_tokens(item)) for item in inputs)
    ):
        text = (
            "'$.input' is invalid. Please check the API reference: "
            "https://platform.openai.com/docs/api-reference."
        )
        raise Refusal(400, text)
    return [item if isinstance(item, str) else _encoding().decode(item) for item in inputs]


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def check_openai_embedding(
    request: JSON, models: frozenset[str], embed_models: Mapping[str, int]
) -> int:
    """Apply the rules of POST /v1/embeddings and return the number of tokens.

    403 for a chat model, 404 for an unknown one, 400 for the rest.
    """
    _check_openai_fields(request, OPENAI_EMBED_FIELDS)
    model = request["model"]
    _check_openai_model(model, models)
    if model not in embed_models:
        raise Refusal(403, "You are not allowed to generate embeddings from this model")
    encoding = request.get("encoding_format")
    if encoding not in (None, "float", "base64"):
        text = f"Invalid value: '{encoding}'. Supported values are: 'float' and 'base64'."
        raise Refusal(400, text, code="invalid_value", param="encoding_format")
    dimensions = request.get("dimensions")
    if dimensions is not None and _number_fault(dimensions, True, 1, embed_models[model]):
        text = (
            f"Invalid value for 'dimensions' = {dimensions}. "
            f"Must be an integer from 1 to {embed_models[model]}."
        )
        raise Refusal(400, text, param="dimensions")
    counts = [count_tokens(text) for text in read_inputs(request)]
    if (most := max(counts)) > MAX_INPUT_TOKENS:
        text = (
            f"This model's maximum context length is {MAX_INPUT_TOKENS} tokens, however you "
            f"requested {most} tokens ({most} in your prompt; 0 for the completion). "
            "Please reduce your prompt; or completion length."
        )
        raise Refusal(400, text)
    if (total := sum(counts)) > MAX_REQUEST_TOKENS:
        text = f"Requested {total} tokens, max {MAX_REQUEST_TOKENS} tokens per request"
        kind = "max_tokens_per_request"
        raise Refusal(400, text, kind=kind, code=kind)
    return total


def check_ollama_chat(request: JSON) -> None:
    """Apply Ollama's rules for messages: 400. Unknown fields are ignored, as Go's decoder does."""
    if not request.get("messages"):
        raise Refusal(400, "[] is too short - 'messages'")
    for message in request["messages"]:
        # Stricter: Ollama takes an empty string and any role.
        if message.get("role") not in OPENAI_ROLES or not message_text(message):
            raise Refusal(400, f"invalid message content type: {message!r}")


def check_anthropic(request: JSON, models: frozenset[str]) -> None:
    """Apply the rules of POST /v1/messages: 404 for an unknown model, 400 for the rest."""
    for name in ("model", "max_tokens", "messages"):
        if name not in request:
            raise Refusal(400, f"{name}: Field required")
    if unknown := sorted(set(request) - ANTHROPIC_FIELDS):
        raise Refusal(400, f"{unknown[0]}: Extra inputs are not permitted")
    for name, (whole, low, high) in ANTHROPIC_NUMBERS.items():
        fault = name in request and _number_fault(request[name], whole, low, high)
        if fault == "type":
            number = "integer" if whole else "number"
            raise Refusal(400, f"{name}: Input should be a valid {number}")
        if fault:
            bounds = f"{low:g}.." + ("" if high == math.inf else f"{high:g}")
            raise Refusal(400, f"{name}: range: {bounds}")
    if not isinstance(request.get("stream", False), bool):
        raise Refusal(400, "stream: Input should be a valid boolean")
    if request["model"] not in models:
        raise Refusal(404, f"model: {request['model']}")
    _check_anthropic_messages(request["messages"])
    system = request.get("system", "")
    if not isinstance(system, str | list):
        raise Refusal(400, "system: Input should be a valid list")
    if isinstance(system, list):
        _check_anthropic_blocks("system", system)
    if request["messages"][-1]["role"] == "assistant" and "-4-6" in request["model"]:
        text = (
            "This model does not support assistant message prefill. "
            "The conversation must end with a user message."
        )
        raise Refusal(400, text)


def _check_anthropic_messages(messages: Any) -> None:
    if not isinstance(messages, list):
        raise Refusal(400, "messages: Input should be a valid list")
    if not messages:
        raise Refusal(400, "messages: at least one message is required")
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise Refusal(400, f"messages.{index}: Input should be a valid dictionary")
        if unknown := sorted(set(message) - {"role", "content"}):
            text = f"messages.{index}.{unknown[0]}: Extra inputs are not permitted"
            raise Refusal(400, text)
        # Models before Opus 4.8 take no system turn.
        if message.get("role") == "system":
            raise Refusal(400, "role 'system' is not supported on this model")
        if message.get("role") not in ("user", "assistant"):
            raise Refusal(400, f"messages.{index}.role: Input should be 'user' or 'assistant'")
        content = message.get("content")
        if content is not None and not isinstance(content, str | list):
            raise Refusal(400, f"messages.{index}.content: Input should be a valid list")
        if not content:
            text = (
                f"messages.{index}: all messages must have non-empty content "
                "except for the optional final assistant message"
            )
            raise Refusal(400, text)
        _check_anthropic_blocks(
            "messages",
            content if isinstance(content, list) else [{"type": "text", "text": content}],
        )
    if messages[0]["role"] != "user":
        raise Refusal(400, 'messages: first message must use the "user" role')


def _check_anthropic_blocks(place: str, blocks: list[Any]) -> None:
    for index, block in enumerate(blocks):
        if not isinstance(block, dict) or "type" not in block:
            raise Refusal(400, f"{place}.{index}.type: Field required")
        if block["type"] == "text" and not block.get("text"):
            raise Refusal(400, f"{place}: text content blocks must be non-empty")
        if block["type"] == "text" and not block["text"].strip():
            raise Refusal(400, f"{place}: text content blocks must contain non-whitespace text")


# --- the formats -------------------------------------------------------------------------------


def error_body(dialect: str, error: Refusal) -> JSON:
    """Return the JSON body of an error in the shape of the service."""
    if dialect == "anthropic":
        kind = ANTHROPIC_ERROR_TYPES.get(error.status, "invalid_request_error")
        inner = {"type": error.kind or kind, "message": error.message}
        return {"type": "error", "error": inner, "request_id": "req_fake"}
    if dialect == "ollama":  # openai.NewError of Ollama
        kind = {400: "invalid_request_error", 404: "not_found_error"}.get(error.status, "api_error")
        return {"error": {"message": error.message, "type": kind, "param": None, "code": None}}
    kind = error.kind or OPENAI_ERROR_TYPES.get(error.status, "invalid_request_error")
    inner = {"message": error.message, "type": kind, "param": error.param, "code": error.code}
    return {"error": inner}


def openai_usage(answer: Answer) -> JSON:
    """Return `usage` of a chat completion."""
    return {
        "prompt_tokens": answer.input_tokens,
        "completion_tokens": answer.output_tokens,
        "total_tokens": answer.input_tokens + answer.output_tokens,
    }


def openai_completion(request: JSON, answer: Answer) -> JSON:
    """Return a `chat.completion` object."""
    message: JSON = {"role": "assistant", "content": answer.text}
    if answer.reasoning:
        message["reasoning"] = answer.reasoning
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": answer.finish}
    return {
        "id": "chatcmpl-fake",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": request["model"],
        "choices": [choice],
        "usage": openai_usage(answer),
        "system_fingerprint": "fp_fake",
    }


def openai_events(request: JSON, answer: Answer, pieces: Iterator[str]) -> Iterator[str]:
    """Yield the server-sent events of a streamed chat completion.

    With `stream_options.include_usage`, `usage` is null in each chunk and a last chunk without
    choices has it; otherwise there is none.
    """
    with_usage = bool((request.get("stream_options") or {}).get("include_usage"))
    created = int(time.time())

    def chunk(delta: JSON | None, finish: str | None = None, usage: JSON | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        body: JSON = {
            "id": "chatcmpl-fake",
            "object": "chat.completion.chunk",
            "created": created,
            "model": request["model"],
            "system_fingerprint": "fp_fake",
            "choices": [] if delta is None else [choice],
        }
        if with_usage:
            body["usage"] = usage
        return f"data: {json.dumps(body)}\n\n"

    yield chunk({"role": "assistant", "content": None if answer.text is None else ""})
    if answer.reasoning:
        yield chunk({"content": "", "reasoning": answer.reasoning})
    for piece in pieces:
        yield chunk({"content": piece})
    yield chunk({}, answer.finish)
    if with_usage:
        yield chunk(None, usage=openai_usage(answer))
    yield "data: [DONE]\n\n"


def anthropic_message(request: JSON, answer: Answer) -> JSON:
    """Return a `message` object; an answer without text has no content block."""
    return {
        "id": "msg_fake",
        "type": "message",
        "role": "assistant",
        "model": request["model"],
        "content": [{"type": "text", "text": answer.text}] if answer.text else [],
        "stop_reason": ANTHROPIC_STOP_REASONS[answer.finish],
        "stop_sequence": None,
        "usage": {"input_tokens": answer.input_tokens, "output_tokens": answer.output_tokens},
    }


def anthropic_event(body: JSON) -> str:
    """Return one server-sent event, named after its type."""
    return f"event: {body['type']}\ndata: {json.dumps(body)}\n\n"


def anthropic_events(request: JSON, answer: Answer, pieces: Iterator[str]) -> Iterator[str]:
    """Yield the events of a streamed message: docs.claude.com/en/api/messages-streaming."""
    whole = anthropic_message(request, answer)
    start_usage = whole["usage"] | {"output_tokens": 1}
    start = whole | {"content": [], "stop_reason": None, "usage": start_usage}
    yield anthropic_event({"type": "message_start", "message": start})
    yield anthropic_event({"type": "ping"})
    block = {"type": "text", "text": ""}
    for index, piece in enumerate(pieces):
        if index == 0:
            start = {"type": "content_block_start", "index": 0, "content_block": block}
            yield anthropic_event(start)
        delta = {"type": "text_delta", "text": piece}
        yield anthropic_event({"type": "content_block_delta", "index": 0, "delta": delta})
    if answer.text:
        yield anthropic_event({"type": "content_block_stop", "index": 0})
    delta = {"stop_reason": whole["stop_reason"], "stop_sequence": None}
    yield anthropic_event({"type": "message_delta", "delta": delta, "usage": whole["usage"]})
    yield anthropic_event({"type": "message_stop"})


# --- HTTP --------------------------------------------------------------------------------------


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # do not wait for clients that keep their connection
    request_queue_size = 1024

    def __init__(self, fake: FakeLLM, port: int) -> None:
        self.fake = fake
        self.open_sockets: set[socket.socket] = set()
        super().__init__(("127.0.0.1", port), _Handler)

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # HTTPServer's would look up the host's name
        self.server_name, self.server_port = self.socket.getsockname()

    def process_request(self, request: Any, client_address: Any) -> None:
        self.open_sockets.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.open_sockets.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a client that went away."""

    def close_clients(self) -> None:
        for connection in list(self.open_sockets):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # headers and body leave together
    record: Request

    @property
    def fake(self) -> FakeLLM:
        return cast(_Server, self.server).fake

    def log_message(self, format: str, *args: Any) -> None:
        """Stay silent."""

    def do_GET(self) -> None:
        self._handle()

    def do_POST(self) -> None:
        self._handle()

    def _handle(self) -> None:
        fake = self.fake
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.record = fake._begin(self.command, urlsplit(self.path).path, headers, body)
        try:
            self._respond(fake)
        except Refusal as error:
            self._send_error(error)
        except (OSError, _StreamCut):
            self._close()
        except Exception as error:  # a bug of this file or of `reply`: the test should see it
            fake.errors.append(error)
            self._send_error(Refusal(500, repr(error)), {"x-should-retry": "false"})
        finally:
            fake._end(self.record)

    def _respond(self, fake: FakeLLM) -> None:
        record = self.record
        result = fake._route(record)
        fault = fake._take_fault(record) or Fault()
        fake._stopping.wait(fault.delay + (fake.delay if record.is_chat else 0))
        if fault.drop:
            self._close()
        elif fault.body is not None:
            self._send(fault.status, fault.content_type, fault.body.encode(), fault.headers)
        elif fault.status != 200:
            code = "rate_limit_exceeded" if fault.status == 429 else None
            self._send_error(Refusal(fault.status, fault.message, code=code), fault.headers)
        elif isinstance(result, str):
            self._send(200, "text/plain; charset=utf-8", result.encode())
        elif not record.is_chat:
            self._send(200, "application/json", json.dumps(result).encode())
        else:
            self._send_answer(fake, result, fault)

    def _send_answer(self, fake: FakeLLM, request: JSON, fault: Fault) -> None:
        answer = fake._compose(request, fault)
        anthropic = self.record.dialect == "anthropic"
        if request.get("stream"):
            events = anthropic_events if anthropic else openai_events
            self._send_events(events(request, answer, fake._pieces(answer, fault)))
            return
        whole = anthropic_message if anthropic else openai_completion
        body = json.dumps(whole(request, answer)).encode()
        cut = None if fault.cut_after is None else len(body) // 2
        self._send(200, "application/json", body, cut=cut)

    def _send_events(self, events: Iterator[str]) -> None:
        self.record.status = 200
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            for event in events:
                self._send_chunk(event.encode())
        except _StreamError:
            error = Refusal(529 if self.record.dialect == "anthropic" else 500, "Overloaded")
            body = error_body(self.record.dialect, error)
            event = anthropic_event(body) if "type" in body else f"data: {json.dumps(body)}\n\n"
            self._send_chunk(event.encode())
        # The last chunk releases the client, which must then find this request finished.
        self.fake._end(self.record)
        self._send_chunk(b"")

    def _send_chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
        self.wfile.flush()

    def _send_error(self, error: Refusal, headers: Mapping[str, str] | None = None) -> None:
        dialect, path = self.record.dialect, self.record.path
        if dialect == "ollama" and error.status == 404 and not path.startswith("/v1"):
            self._send(404, "text/plain", b"404 page not found", headers)
            return
        body = json.dumps(error_body(dialect, error)).encode()
        self._send(error.status, "application/json", body, headers)

    def _send(
        self,
        status: int,
        content_type: str,
        body: bytes,
        headers: Mapping[str, str] | None = None,
        cut: int | None = None,
    ) -> None:
        self.record.status = status
        own = {"Content-Type": content_type, "Content-Length": str(len(body))}
        own |= {"request-id": "req_fake", "x-request-id": "req_fake"}
        # 529 is Anthropic's own and unknown to the standard library.
        self.send_response(status, "Overloaded" if status == 529 else None)
        for name, value in (own | dict(headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[:cut])
        self.fake._end(self.record)
        self.wfile.flush()
        if cut is not None:
            self._close()

    def _close(self) -> None:
        self.close_connection = True
        self.fake._end(self.record)
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)


class FakeLLM:
    """The server. Starts when made, stops at `close()` or at the end of its `with` block.

    `ollama=True` makes it an Ollama server that has pulled `chat_models`; otherwise it is OpenAI
    and Anthropic in one, told apart by path and headers (models named claude-* are Anthropic's).
    `embed_models` maps a name to its dimension.
    """

    def __init__(
        self,
        *,
        ollama: bool = False,
        chat_models: tuple[str, ...] | None = None,
        embed_models: Mapping[str, int] | None = None,
        port: int = 0,
    ) -> None:
        self.ollama = ollama
        self.chat_models = chat_models or (PULLED_MODELS if ollama else CHAT_MODELS)
        self.embed_models = dict(embed_models or ({} if ollama else EMBED_MODELS))
        self.reply: Reply = extractive_reply
        self.delay = 0.0  # seconds before each chat answer
        self.token_delay = 0.0  # seconds before each token of a stream
        self.requests: list[Request] = []
        self.errors: list[Exception] = []  # bugs of the fake or of `reply`; answered with 500
        self.most_simultaneous_chats = 0
        self._chats = 0
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        _encoding()  # 0.7 s that the first request must not pay
        self._server = _Server(self, port)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )
        self._thread.start()

    def __enter__(self) -> FakeLLM:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop at once: waiting answers are cut short and clients' connections closed."""
        self._stopping.set()
        self._server.shutdown()
        self._server.server_close()
        self._server.close_clients()
        self._thread.join()

    @property
    def openai_base_url(self) -> str:
        """The base URL for an OpenAI client; an Anthropic client takes `url`."""
        return f"{self.url}/v1"

    def environment(self) -> dict[str, str]:
        """Return the variables that send a program here and nowhere else.

        An Ollama server gives OLLAMA_HOST alone: `cloud.environment() | ollama.environment()`.
        """
        if self.ollama:
            return {"OLLAMA_HOST": self.url}
        return {
            "OPENAI_API_KEY": "sk-fake-openai",
            "OPENAI_BASE_URL": self.openai_base_url,
            "ANTHROPIC_API_KEY": "sk-ant-fake",
            "ANTHROPIC_BASE_URL": self.url,
            "OLLAMA_HOST": self.url,
        }

    @property
    def chat_requests(self) -> list[Request]:
        """The chat requests so far, rejected ones too, in the order in which they came in."""
        return [request for request in self.requests if request.is_chat]

    @property
    def embedding_requests(self) -> list[Request]:
        """The embedding requests so far, rejected ones too."""
        return [request for request in self.requests if request.is_embedding]

    @property
    def embedded_texts(self) -> list[str]:
        """Every text that was embedded, in order."""
        accepted = (request for request in self.embedding_requests if request.status == 200)
        return [text for request in accepted for text in read_inputs(request.json or {})]

    def fail(self, **fault: Any) -> None:
        """Queue a fault; the fields are those of `Fault`. The first that matches is used.

        `fail(status=429, headers={"Retry-After": "0"}, times=2)`, `fail(drop=True)`,
        `fail(containing="beaver", cut_after=3, times=None)`, `fail(body="<html>", status=502)`.
        A request that breaks a rule is rejected first and uses up no fault.
        """
        with self._lock:
            self._faults.append(Fault(**fault))

    def recover(self) -> None:
        """Forget the faults that are left."""
        with self._lock:
            self._faults.clear()

    # What the handler uses.

    def _begin(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Request:
        try:
            parsed = json.loads(body)
        except ValueError:
            parsed = None
        if self.ollama:
            dialect = "ollama"
        elif path == "/v1/messages" or "anthropic-version" in headers or "x-api-key" in headers:
            dialect = "anthropic"
        else:
            dialect = "openai"
        parsed = parsed if isinstance(parsed, dict) else None
        record = Request(method, path, headers, body, parsed, dialect, time.monotonic())
        with self._lock:
            self.requests.append(record)
            if record.is_chat:
                self._chats += 1
                self.most_simultaneous_chats = max(self.most_simultaneous_chats, self._chats)
        return record

    def _end(self, record: Request) -> None:
        with self._lock:
            if record.finished is None:
                record.finished = time.monotonic()
                self._chats -= record.is_chat

    def _take_fault(self, record: Request) -> Fault | None:
        with self._lock:
            fault = next((fault for fault in self._faults if fault.matches(record)), None)
            if fault and fault.times is not None:
                fault.times -= 1
                if fault.times <= 0:
                    self._faults.remove(fault)
            return fault

    def _route(self, record: Request) -> Any:
        """Return the body of a GET or of embeddings, or the checked request for a chat answer."""
        routes: dict[str, dict[tuple[str, str], Callable[[Request], Any]]] = {
            "openai": {
                ("POST", "/v1/chat/completions"): self._openai_chat,
                ("POST", "/v1/embeddings"): self._embeddings,
                ("GET", "/v1/models"): self._models,
            },
            "anthropic": {("POST", "/v1/messages"): self._anthropic_chat},
            "ollama": {
                ("POST", "/v1/chat/completions"): self._ollama_chat,
                ("POST", "/v1/embeddings"): self._embeddings,
                ("GET", "/v1/models"): self._models,
                ("GET", "/api/tags"): self._tags,
                ("GET", "/api/version"): lambda _: {"version": "0.30.0"},
                ("GET", "/"): lambda _: "Ollama is running",
            },
        }
        known = routes[record.dialect]
        if (record.method, record.path) in known:
            self._check_key(record)
            return known[record.method, record.path](record)
        if record.dialect == "anthropic":
            raise Refusal(404, "Not Found")
        if any(path == record.path for _, path in known):
            text = f"Not allowed to {record.method} on {record.path}."
            raise Refusal(405, text, code="method_not_supported")
        raise Refusal(404, f"Invalid URL ({record.method} {record.path})")

    def _check_key(self, record: Request) -> None:
        scheme, _, bearer = record.headers.get("authorization", "").partition(" ")
        bearer = bearer.strip() if scheme == "Bearer" else ""
        if record.dialect == "anthropic":
            # The documented header is x-api-key; the client of anthropic 2.8 sends a bearer.
            if not {"x-api-key", "authorization"} & set(record.headers):
                raise Refusal(401, "x-api-key header is required")
            if not (record.headers.get("x-api-key", "").strip() or bearer):
                raise Refusal(401, "invalid x-api-key")
            if "anthropic-version" not in record.headers:
                raise Refusal(400, "anthropic-version: header is required")
        if record.dialect == "openai" and not bearer:
            text = (
                "You didn't provide an API key. You need to provide your API key in an "
                "Authorization header using Bearer auth (i.e. Authorization: Bearer YOUR_KEY)."
            )
            raise Refusal(401, text)

    def _body(self, record: Request) -> JSON:
        kind = record.headers.get("content-type", "")
        if record.dialect != "ollama" and kind.partition(";")[0].strip() != "application/json":
            text = f"Invalid Content-Type header ({kind}), expected application/json."
            raise Refusal(400, text)
        if record.json is None:
            text = "We could not parse the JSON body of your request."
            raise Refusal(400, text)
        return record.json

    def _known_models(self) -> frozenset[str]:
        return frozenset(self.chat_models) | frozenset(self.embed_models)

    def _openai_chat(self, record: Request) -> JSON:
        request = self._body(record)
        models = frozenset(m for m in self._known_models() if not m.startswith("claude-"))
        check_openai_chat(request, models, set(self.embed_models))
        return request

    def _anthropic_chat(self, record: Request) -> JSON:
        request = self._body(record)
        models = frozenset(m for m in self.chat_models if m.startswith("claude-"))
        check_anthropic(request, models)
        return request

    def _ollama_chat(self, record: Request) -> JSON:
        request = self._body(record)
        check_ollama_chat(request)
        self._check_pulled(request)
        if _tagged(request["model"]) in map(_tagged, self.embed_models):
            raise Refusal(400, f'"{request["model"]}" does not support chat')
        return request

    def _check_pulled(self, request: JSON) -> None:
        model = request.get("model", "")
        if _tagged(model) not in map(_tagged, self._known_models()):
            raise Refusal(404, f"model '{model}' not found")

    def _embeddings(self, record: Request) -> JSON:
        request = self._body(record)
        if self.ollama:
            self._check_pulled(request)
            tokens = sum(map(count_tokens, read_inputs(request)))
        else:
            models = frozenset(m for m in self._known_models() if not m.startswith("claude-"))
            tokens = check_openai_embedding(request, models, self.embed_models)
        sizes = {_tagged(model): size for model, size in self.embed_models.items()}
        model = request["model"]
        if _tagged(model) not in sizes:
            raise Refusal(501, "this model does not support embeddings")
        size = request.get("dimensions") or sizes[_tagged(model)]
        vectors = [embed_text(text, model, size) for text in read_inputs(request)]
        as_text = request.get("encoding_format") == "base64"
        data = [
            {
                "object": "embedding",
                "index": index,
                "embedding": _base64_floats(vector) if as_text else vector,
            }
            for index, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return {"object": "list", "data": data, "model": model, "usage": usage}

    def _models(self, record: Request) -> JSON:
        owner = "library" if self.ollama else "openai"
        names = [m for m in (*self.chat_models, *self.embed_models) if not m.startswith("claude-")]
        models = [
            {"id": name, "object": "model", "created": 1_700_000_000, "owned_by": owner}
            for name in (map(_tagged, names) if self.ollama else names)
        ]
        return {"object": "list", "data": models}

    def _tags(self, record: Request) -> JSON:
        names = map(_tagged, (*self.chat_models, *self.embed_models))
        return {"models": [{"name": name, "model": name} for name in names]}

    def _compose(self, request: JSON, fault: Fault) -> Answer:
        """Make the answer, cut at the request's own limit of tokens."""
        reply = self.reply if fault.reply is None else fault.reply
        text = reply if isinstance(reply, str) else reply(request)
        if fault.think is not None:
            text = f"<think>\n{fault.think}\n</think>\n\n{text}"
        tokens = _encoding().encode_ordinary(text)
        limit = request.get("max_completion_tokens") or request.get("max_tokens")
        finish = "stop"
        if limit and len(tokens) > limit:
            tokens, finish = tokens[:limit], "length"
            text = _encoding().decode(tokens)
        sent = count_prompt_tokens(request)
        return Answer(
            text=None if fault.null_content else text,
            finish=fault.finish_reason or finish,
            reasoning=fault.reasoning,
            input_tokens=sent if fault.prompt_tokens is None else fault.prompt_tokens,
            output_tokens=len(tokens),
        )

    def _pieces(self, answer: Answer, fault: Fault) -> Iterator[str]:
        """Yield the answer word by word, up to the place where the fault strikes."""
        words = re.findall(r"\s*\S+|\s+$", answer.text or "")
        for index in itertools.count():
            last = index == len(words)
            if fault.cut_after is not None and (last or index == fault.cut_after):
                raise _StreamCut
            if fault.error_after is not None and (last or index == fault.error_after):
                raise _StreamError
            if last or self._stopping.wait(self.token_delay):
                return
            yield words[index]


def count_prompt_tokens(request: JSON) -> int:
    """Count the tokens of the messages and the system prompt: 4 more for each, and 3 in all.

    The overhead is that of the OpenAI cookbook's `num_tokens_from_messages`.
    """
    messages = list(request["messages"])
    if request.get("system"):
        messages.append({"content": request["system"]})
    return 3 + sum(4 + count_tokens(message_text(message)) for message in messages)


def _tagged(model: str) -> str:
    """Return Ollama's full name of a model: `:latest` where no tag is given."""
    return model if ":" in model else f"{model}:latest"


def _base64_floats(vector: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


def main() -> None:
    """Serve until killed; the base URL is the first line of stdout."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--ollama", action="store_true", help="be an Ollama server")
    arguments = parser.parse_args()
    with FakeLLM(ollama=arguments.ollama, port=arguments.port) as fake:
        print(fake.url, flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
