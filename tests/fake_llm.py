"""A strict loopback server that speaks the HTTP formats of OpenAI, Anthropic and Ollama.

FakeLLM(ollama=False, port=0), for a `with` block
    url, openai_base_url, environment(), close()
    chat_models: what an Ollama has pulled; can be set
    reply: a text, or a function of the request's JSON that returns one; can be set
    delay, token_delay: seconds before each chat answer, before each word of a stream
    requests, chat_requests, embedding_requests: see Request; rejected ones too
    embedded_texts, most_simultaneous_chats, errors: of this file or of `reply`
    fail(...) queues a Fault, recover() forgets those that are left
REFUSAL, embed_text(), extractive_reply(), message_text(), count_tokens()

It rejects what the services reject, with their status codes and the shape of their errors. Fields
that no script sends, such as `tools`, are not known here: add them to the schemas. The rules come
from the SDKs' types, the API references, Ollama's source and errors that users quote in issues.
"""

from __future__ import annotations

import argparse
import base64
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer
from typing import Annotated, Any, Literal, cast

import bpe_openai
import numpy as np
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

JSON = dict[str, Any]
Parts = tuple[list[str], list[str], list[str]]  # of an answer: before its words, each word, after

REFUSAL = "I don't have enough information to answer that."
EMBED_MODELS = {"text-embedding-3-small": 1536, "text-embedding-3-large": 3072}
MODELS = {
    "openai": ("gpt-4o", "gpt-4o-mini", "gpt-5-mini", *EMBED_MODELS),
    "anthropic": ("claude-sonnet-4-6", "claude-opus-4-6", "claude-opus-4-8"),
}
KEYS = {"openai": "sk-(?!ant-)", "anthropic": "sk-ant-", "ollama": ""}
ERROR_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
ERROR_TYPES |= {500: "api_error", 529: "overloaded_error"}
STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "content_filter": "refusal"}

# Left out of the embeddings, so that texts are near for their subject and not for their grammar.
FUNCTION_WORDS = re.compile(
    "a about all also an and any are as at be been but by can could did do does for from had has "
    "have how i if in into is it its me more most much my no not of on one or our say she should "
    "so some tell than that the their them there these they this those to up was we were what when "
    "where which who whom whose why will with would you your".replace(" ", "|")
)
# How the scripts write a passage of the prompt.
PASSAGE = re.compile(r'<passage(\S*) n="(?P<n>\d+)"[^>]*>(?P<text>.*?)</passage\1>', re.S)
ENCODING = bpe_openai.get_encoding("cl100k_base")


# --- schemas: what the services accept -----------------------------------------------------------

# Stricter than OpenAI and Ollama, which take a blank text: that is a bug of the caller.
Text = Annotated[str, Field(pattern=r"\S")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    def rules(self) -> JSON:
        """Return what no field can say alone: error texts, and whether they apply."""
        return {}


class _Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text


class _OllamaChat(_Strict):
    model_config = ConfigDict(extra="ignore")

    model: Text
    messages: list[_Message] = Field(min_length=1)
    max_tokens: PositiveInt | None = None
    max_completion_tokens: PositiveInt | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high"] | None = None
    stream: bool | None = None
    stream_options: dict[Literal["include_usage"], bool] | None = None
    temperature: float | None = Field(None, ge=0, le=2)


class _OpenAIChat(_OllamaChat):
    model_config = ConfigDict(extra="forbid")

    def rules(self) -> JSON:
        limit, effort = self.max_tokens, self.reasoning_effort
        reasons = re.match(r"o\d|gpt-[5-9]", self.model)
        is_warm = self.temperature not in (None, 1)
        return {
            "max_tokens and max_completion_tokens are set": limit and self.max_completion_tokens,
            "stream_options is only allowed with stream": self.stream_options and not self.stream,
            "max_tokens is not supported, use max_completion_tokens": limit and reasons,
            "temperature does not support this value with this model": is_warm and reasons,
            "Unrecognized request argument supplied: reasoning_effort": effort and not reasons,
            "maximum context length is 128000": _prompt_tokens(self.model_dump()) > 128_000,
        }


class _AnthropicChat(_Strict):
    model: Text
    max_tokens: PositiveInt
    messages: list[_Message] = Field(min_length=1)
    stream: bool = False
    system: Text = "-"
    temperature: float = Field(1, ge=0, le=1)

    def rules(self) -> JSON:
        roles = [message.role for message in self.messages]
        is_older = re.search(r"-4-[0-6]$", self.model)
        return {
            "Input should be 'user' or 'assistant'": not {"user", "assistant"}.issuperset(roles),
            "first message must use the user role": roles[0] != "user",
            "This model does not support assistant message prefill": roles[-1] == "assistant",
            "temperature is deprecated for this model": self.temperature != 1 and not is_older,
            "prompt is too long: 200000 maximum": _prompt_tokens(self.model_dump()) > 200_000,
        }


class _OpenAIEmbedding(_Strict):
    model: Text
    input: Text | Annotated[list[Text], Field(min_length=1, max_length=2048)]
    encoding_format: Literal["float", "base64"] | None = None

    def rules(self) -> JSON:
        counts = [count_tokens(text) for text in _inputs(self.model_dump())]
        return {
            "maximum context length is 8192 tokens": max(counts) > 8192,
            "max 300000 tokens per request": sum(counts) > 300_000,
        }


ROUTES: dict[str, type[_Strict] | None] = {
    "openai /v1/chat/completions": _OpenAIChat,
    "openai /v1/embeddings": _OpenAIEmbedding,
    "openai /v1/models": None,
    "anthropic /v1/messages": _AnthropicChat,
    "ollama /v1/chat/completions": _OllamaChat,
    "ollama /v1/models": None,
}


# --- text: tokens, embeddings, the default answer ------------------------------------------------


def count_tokens(text: str) -> int:
    """Count cl100k tokens; in slices, as bpe_openai refuses more than 200,000 tokens at once."""
    slices = (text[start : start + 40_000] for start in range(0, len(text), 40_000))
    return sum(len(ENCODING.encode_ordinary(part)) for part in slices)


def _prompt_tokens(request: JSON) -> int:
    """Count the tokens of all messages, and 4 more for each, as the OpenAI cookbook does."""
    texts = [request.get("system") or "", *map(message_text, request["messages"])]
    return sum(4 + count_tokens(text) for text in texts)


def message_text(message: JSON) -> str:
    """Return the text of a message."""
    return message["content"]


def _inputs(request: JSON) -> list[str]:
    texts = request.get("input", [])
    return [texts] if isinstance(texts, str) else texts


def _content_words(text: str) -> list[str]:
    """Return the lower-cased stems of `text` without function words, in order."""
    words = [w for w in re.findall(r"\w+", text.lower()) if not FUNCTION_WORDS.fullmatch(w)]
    return [re.sub(r"(ing|ed|es|s|e)$", "", word) if len(word) > 3 else word for word in words]


def embed_text(text: str, model: str, dimensions: int) -> list[float]:
    """Hash the words of `text` into a vector of unit length, other places for another model."""
    vector = np.zeros(dimensions)
    for stem, number in Counter(_content_words(text) or [text]).items():
        digest = blake2b(f"{model} {stem}".encode(), digest_size=8).digest()
        place, sign = divmod(int.from_bytes(digest), 2)
        vector[place % dimensions] += number if sign else -number
    # Two words can fall on one place with opposite signs; a text of only those has no direction.
    return (vector / (np.linalg.norm(vector) or 1)).tolist()


def extractive_reply(request: JSON) -> str:
    """Answer with the sentence that shares most words with the question, or refuse."""
    prompt = [message_text(m) for m in request["messages"] if m["role"] == "user"][-1]
    passages = list(PASSAGE.finditer(prompt))
    question = prompt[passages[-1].end() :] if passages else prompt
    wanted = set(_content_words(re.sub(r"^\s*question:", "", question, flags=re.I)))
    sentences = [
        (len(wanted & set(_content_words(sentence))), -int(passage["n"]), sentence.strip())
        for passage in passages
        for sentence in re.split(r"(?<=[.!?])\s+|\n+", passage["text"])
    ]
    shared, number, sentence = max(sentences, default=(0, 0, ""))
    return f"{sentence} [{-number}]" if shared >= max(1, min(2, len(wanted))) else REFUSAL


# --- requests, faults, answers -------------------------------------------------------------------


@dataclass
class Request:
    """One request; `finished` and `status` are None until it is answered."""

    path: str
    headers: dict[str, str]  # names in lower case
    json: JSON
    dialect: str  # openai, anthropic, ollama
    received: float  # of time.monotonic()
    finished: float | None = None
    status: int | None = None

    @property
    def is_chat(self) -> bool:
        return self.path in ("/v1/chat/completions", "/v1/messages")

    @property
    def text(self) -> str:
        """The system prompt, all messages, or all texts to embed."""
        messages = map(message_text, self.json.get("messages", []))
        return "\n".join([self.json.get("system", ""), *messages, *_inputs(self.json)])


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
    prompt_tokens: int | None = None  # reported instead of the true number: a prompt that was cut
    cut_after: int | None = None  # tokens; then the socket closes, streamed or not
    error_after: int | None = None  # tokens of a stream; then an `error` event

    def matches(self, request: Request) -> bool:
        of_transport = self.status != 200 or self.body is not None or self.drop or self.delay > 0
        is_near = self.path in request.path and self.containing in request.text
        return is_near and (of_transport or request.is_chat)


@dataclass(eq=False)
class _Rejected(Exception):
    status: int
    message: str

    def body(self, dialect: str) -> JSON:
        kind = ERROR_TYPES.get(self.status, "invalid_request_error")
        error = {"error": {"type": kind, "message": self.message}}
        return error | ({"type": "error"} if dialect == "anthropic" else {})


@dataclass
class _Answer:
    text: str | None
    finish: str  # in OpenAI's words: stop, length, content_filter
    reasoning: str
    sent: int  # tokens of the prompt
    tokens: int

    @property
    def words(self) -> list[str]:
        return re.findall(r"\s*\S+|\s+$", self.text or "")


def _event(body: JSON) -> str:
    """Return a server-sent event; Anthropic's are named after their type."""
    name = f"event: {body['type']}\n" if "type" in body else ""
    return f"{name}data: {json.dumps(body)}\n\n"


def _openai_parts(request: JSON, answer: _Answer) -> Parts:
    fixed = {"id": "chatcmpl-fake", "created": 1, "model": request["model"]}
    usage = {"prompt_tokens": answer.sent, "completion_tokens": answer.tokens}
    usage |= {"total_tokens": answer.sent + answer.tokens}
    message = {"role": "assistant", "content": answer.text}
    if answer.reasoning:
        message["reasoning"] = answer.reasoning
    if not request.get("stream"):
        choice = {"index": 0, "message": message, "finish_reason": answer.finish}
        fixed |= {"object": "chat.completion", "choices": [choice], "usage": usage}
        return [], [], [json.dumps(fixed)]

    fixed["object"] = "chat.completion.chunk"

    def chunk(delta: JSON, finish: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        return _event(fixed | {"choices": [choice]})

    head = [chunk(message | {"content": None if answer.text is None else ""})]
    tail = [chunk({}, answer.finish)]
    if (request.get("stream_options") or {}).get("include_usage"):
        tail.append(_event(fixed | {"choices": [], "usage": usage}))
    return head, [chunk({"content": word}) for word in answer.words], [*tail, "data: [DONE]\n\n"]


def _anthropic_parts(request: JSON, answer: _Answer) -> Parts:
    usage = {"input_tokens": answer.sent, "output_tokens": answer.tokens}
    ended = {"stop_reason": STOP_REASONS[answer.finish], "stop_sequence": None}
    whole = {"id": "msg_fake", "type": "message", "role": "assistant", "model": request["model"]}
    whole |= {"content": [{"type": "text", "text": answer.text}] if answer.text else []}
    whole |= ended | {"usage": usage}
    if not request.get("stream"):
        return [], [], [json.dumps(whole)]

    def block(kind: str, **fields: Any) -> str:
        return _event({"type": f"content_block_{kind}", "index": 0} | fields)

    start = whole | {"content": [], "stop_reason": None}
    head = [_event({"type": "message_start", "message": start}), _event({"type": "ping"})]
    words = [block("delta", delta={"type": "text_delta", "text": word}) for word in answer.words]
    tail = [_event({"type": "message_delta", "delta": ended, "usage": usage})]
    tail.append(_event({"type": "message_stop"}))
    if words:
        head.append(block("start", content_block={"type": "text", "text": ""}))
        tail.insert(0, block("stop"))
    return head, words, tail


# --- HTTP ----------------------------------------------------------------------------------------


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # headers and body leave together

    def log_message(self, format: str, *args: Any) -> None:
        """Stay silent."""

    def do_GET(self) -> None:
        self.fake = fake = cast(FakeLLM, self.server)
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length)
        if fake.stopping.is_set() or len(body) < length:
            raise ConnectionError  # one side is gone
        headers = {name.lower(): value for name, value in self.headers.items()}
        dialect = "anthropic" if "anthropic-version" in headers else "openai"
        dialect = "ollama" if fake.ollama else dialect
        request = json.loads(body or "{}")
        self.record = Request(self.path, headers, request, dialect, time.monotonic())
        with fake.lock:
            fake.requests.append(self.record)
            fake.most_simultaneous_chats = max(fake.most_simultaneous_chats, fake._chats)
        try:
            self._respond()
        except _Rejected as error:
            self._send_error(error)
        except OSError:  # the client went away, or a fault cuts the connection
            raise
        except Exception as error:  # a bug of this file or of `reply`: the test should see it
            fake.errors.append(error)
            self._send_error(_Rejected(500, repr(error)), **{"x-should-retry": "false"})
        finally:
            self._finish()

    do_POST = do_GET

    def _respond(self) -> None:
        fake, record = self.fake, self.record
        fake.check(record)
        fault = fake.take_fault(record)
        fake.stopping.wait(fault.delay + (fake.delay if record.is_chat else 0))
        if fault.drop:
            raise ConnectionError
        if fault.body is not None:
            kind = {"Content-Type": fault.content_type}
            self._send(fault.status, [fault.body], **kind, **fault.headers)
        elif fault.status != 200:
            self._send_error(_Rejected(fault.status, fault.message), **fault.headers)
        elif record.is_chat:
            kind = {"Content-Type": "text/event-stream"} if record.json.get("stream") else {}
            self._send(200, self._parts(fake.compose(record.json, fault), fault), **kind)
        elif record.path == "/v1/embeddings":
            self._send(200, [json.dumps(fake.embeddings(record.json))])
        else:
            models = [{"id": name, "object": "model"} for name in fake.served(record.dialect)]
            self._send(200, [json.dumps({"object": "list", "data": models})])

    def _parts(self, answer: _Answer, fault: Fault) -> Iterator[str]:
        """Yield an answer part by part, up to the place where the fault strikes."""
        dialect = self.record.dialect
        parts = _anthropic_parts if dialect == "anthropic" else _openai_parts
        head, words, tail = parts(self.record.json, answer)
        yield from head
        for word in words[: fault.cut_after][: fault.error_after]:
            self.fake.stopping.wait(self.fake.token_delay)
            yield word
        if fault.cut_after is not None:
            raise ConnectionError
        if fault.error_after is not None and words:
            tail = [_event(_Rejected(529, "Overloaded").body(dialect))]
        self._finish()  # the client may stop reading before the last part
        yield from tail

    def _finish(self) -> None:
        self.record.finished = self.record.finished or time.monotonic()

    def _send_error(self, error: _Rejected, **headers: str) -> None:
        self._send(error.status, [json.dumps(error.body(self.record.dialect))], **headers)

    def _send(self, status: int, parts: Iterable[str], **headers: str) -> None:
        self.record.status = status
        self.send_response(status)
        own = {"Content-Type": "application/json", "Transfer-Encoding": "chunked"}
        for name, value in (own | headers).items():
            self.send_header(name, value)
        self.end_headers()
        for part in filter(None, parts):
            self.wfile.write(b"%x\r\n%b\r\n" % (len(part.encode()), part.encode()))
            self.wfile.flush()
        self._finish()  # before the client goes on
        self.wfile.write(b"0\r\n\r\n")
        self.wfile.flush()


class FakeLLM(ThreadingTCPServer):
    """An Ollama server, or OpenAI and Anthropic in one. Runs from its making to its closing."""

    daemon_threads = True
    block_on_close = False  # do not wait for clients that keep their connection
    request_queue_size = 1024

    def __init__(self, *, ollama: bool = False, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.openai_base_url = f"{self.url}/v1"
        self.ollama = ollama
        self.chat_models: tuple[str, ...] = ("qwen3:4b",)
        self.reply: str | Callable[[JSON], str] = extractive_reply
        self.delay = self.token_delay = 0.0
        self.requests: list[Request] = []
        self.errors: list[Exception] = []
        self.most_simultaneous_chats = 0
        self.stopping = threading.Event()
        self._faults: list[Fault] = []
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def server_close(self) -> None:
        """Stop at once: waiting answers are cut short, kept connections are not answered."""
        self.stopping.set()
        self.shutdown()
        super().server_close()

    close = server_close

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of connections that end."""

    def environment(self) -> dict[str, str]:
        """Return the variables that send a program here; an Ollama server has only its own."""
        if self.ollama:
            return {"OLLAMA_HOST": self.url}
        keys = {"OPENAI_API_KEY": "sk-fake-openai", "ANTHROPIC_API_KEY": "sk-ant-fake"}
        urls = {"OPENAI_BASE_URL": self.openai_base_url, "ANTHROPIC_BASE_URL": self.url}
        return keys | urls | {"OLLAMA_HOST": self.url}

    @property
    def chat_requests(self) -> list[Request]:
        return [request for request in self.requests if request.is_chat]

    @property
    def embedding_requests(self) -> list[Request]:
        return [request for request in self.requests if request.path == "/v1/embeddings"]

    @property
    def embedded_texts(self) -> list[str]:
        accepted = (request for request in self.embedding_requests if request.status == 200)
        return [text for request in accepted for text in _inputs(request.json)]

    @property
    def _chats(self) -> int:
        return sum(chat.finished is None for chat in self.chat_requests)

    def fail(self, **fields: Any) -> None:
        """Queue a Fault. The first that matches is used; a rejected request uses up none."""
        fault = Fault(**fields)
        self._faults += [fault] * (fault.times or 1)

    def recover(self) -> None:
        """Forget the faults that are left."""
        self._faults.clear()

    # What the handler uses.

    def check(self, request: Request) -> None:
        """Raise _Rejected for what the service would reject."""
        route = f"{request.dialect} {request.path}"
        if route not in ROUTES:
            raise _Rejected(404, f"Invalid URL: {request.path}")
        key = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not re.match(KEYS[request.dialect], key):
            raise _Rejected(401, "Incorrect API key provided.")
        schema = ROUTES[route]
        if schema is None:
            return
        try:
            rules = schema.model_validate(request.json).rules()
        except ValidationError as invalid:
            error = invalid.errors()[0]
            place = ".".join(str(part) for part in error["loc"])
            raise _Rejected(400, f"{place}: {error['msg']}") from None
        for text, is_broken in rules.items():
            if is_broken:
                raise _Rejected(400, text)
        model = request.json["model"]
        is_served = {model, f"{model}:latest"}.intersection(self.served(request.dialect))
        if not is_served or (model in EMBED_MODELS) == request.is_chat:
            text = f"The model `{model}` does not exist or you do not have access to it."
            raise _Rejected(404, text)

    def take_fault(self, request: Request) -> Fault:
        with self.lock:
            fault = next((fault for fault in self._faults if fault.matches(request)), Fault())
            if fault in self._faults and fault.times is not None:
                self._faults.remove(fault)
            return fault

    def served(self, dialect: str) -> list[str]:
        """Return the names of the models; a model of Ollama has a tag."""
        if dialect != "ollama":
            return list(MODELS[dialect])
        return [name if ":" in name else f"{name}:latest" for name in self.chat_models]

    def embeddings(self, request: JSON) -> JSON:
        model, texts = request["model"], _inputs(request)
        vectors: list[Any] = [embed_text(text, model, EMBED_MODELS[model]) for text in texts]
        if request.get("encoding_format") == "base64":
            vectors = [base64.b64encode(np.array(v, "<f4").tobytes()).decode() for v in vectors]
        tokens = sum(map(count_tokens, texts))
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        data = [{"index": index, "embedding": vector} for index, vector in enumerate(vectors)]
        return {"object": "list", "data": data, "model": model, "usage": usage}

    def compose(self, request: JSON, fault: Fault) -> _Answer:
        """Make the answer, cut at the request's own limit of tokens."""
        reply = self.reply if fault.reply is None else fault.reply
        text = reply if isinstance(reply, str) else reply(request)
        if fault.think is not None:
            text = f"<think>\n{fault.think}\n</think>\n\n{text}"
        tokens, finish = ENCODING.encode_ordinary(text), "stop"
        limit = request.get("max_completion_tokens") or request.get("max_tokens")
        if limit and len(tokens) > limit:
            tokens, finish = tokens[:limit], "length"
            text = ENCODING.decode(tokens)
        text = None if fault.null_content else text
        sent = _prompt_tokens(request) if fault.prompt_tokens is None else fault.prompt_tokens
        return _Answer(text, fault.finish_reason or finish, fault.reasoning, sent, len(tokens))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Print the base URL, and serve until killed.")
    parser.add_argument("--port", type=int, default=0)
    with FakeLLM(port=parser.parse_args().port) as server:
        print(server.url, flush=True)
        threading.Event().wait()
