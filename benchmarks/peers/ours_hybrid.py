"""Our hybrid retrieval: the stages of rag_hybrid_fastapi.py, in whose environment this runs."""

import threading
from typing import Any

import rag_hybrid_fastapi as rag


def load(model: str, *options: str) -> Any:
    """Open a store in memory, and load the embedder: by its name, from the same package."""
    args = rag.parse_arguments(["a question", "--retrieve-only", *options])
    rag.check_backend(args)
    store = rag.Store(args, threading.Event())
    rag.load_embedder(args.embed_model, args.precision)
    return store


def index(embedder: Any, corpus: dict[str, str]) -> Any:
    """Embed and store the paragraphs, given by their ids."""
    chunks = [rag.Chunk(text, key, end=len(text)) for key, text in corpus.items()]
    embedder.change(lambda _: chunks)
    return embedder


def query(index: Any, question: str, k: int) -> list[str]:
    """Ids of the k best paragraphs, the best first."""
    return [found.chunk.source for found in rag.retrieve([question], index, {})][:k]
