"""Our hybrid retrieval: the stages of rag_hybrid_fastapi.py, in whose environment this runs."""

from argparse import Namespace
from typing import Any

import rag_hybrid_fastapi as rag


def load(model: str) -> Any:
    """Load the embedder: by its name, which the script finds in the same package."""
    args = rag.PARSER.parse_args(["--retrieve-only"])
    rag.load_models(args)
    return args


def index(embedder: Any, corpus: dict[str, str]) -> Any:
    """Embed and store the paragraphs, given by their ids, each of which is one chunk."""
    whole = Namespace(chunk_indices=lambda text: [(0, text)])
    embedder.by_characters = embedder.by_tokens = whole
    store = rag.Store(embedder)
    store.update({key: [text] for key, text in corpus.items()})
    return store


def query(index: Any, question: str, k: int) -> list[str]:
    """Ids of the k best paragraphs, the best first."""
    return [hit["source"] for hit in rag.retrieve([question], index)][:k]
