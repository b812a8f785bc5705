"""Our dense retrieval: the stages of rag_local_ollama.py, in whose environment this runs."""

from typing import Any

import rag_local_ollama as rag


def load(model: str) -> Any:
    """Load the embedder: by its name, which the script finds in the same package."""
    args = rag.PARSER.parse_args(["--retrieve-only", "--top-k", "10"])
    rag.load_models(args)
    return args


def index(embedder: Any, corpus: dict[str, str]) -> Any:
    """Embed the paragraphs, given by their ids."""
    chunks = [{"text": text, "source": key, "page": None} for key, text in corpus.items()]
    return rag.update_index(chunks, embedder), embedder


def query(index: Any, question: str, k: int) -> list[str]:
    """Ids of the k nearest paragraphs, the nearest first: k is in the arguments."""
    built, args = index
    return [hit["source"] for hit in rag.retrieve(question, built, args)][:k]
