"""Measure rag_hybrid_fastapi.py with a large kept index: restart, questions, an upload, memory.

    uv run benchmarks/scale.py                      # 100,000 chunks, 8 minutes on two cores
    uv run benchmarks/scale.py --chunks 10000

The chunks are made of words of the files that --data names (default: this repository's own), their
vectors are random: embedding them would take an hour, and changes nothing of what is measured here.
Exit code 1: a target is missed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
QUESTIONS = 200


def words(folder: Path) -> list[str]:
    """All words of the text files in a folder, in their order."""
    kinds = ("*.txt", "*.md", "*.py")
    files = sorted(file for kind in kinds for file in folder.glob(kind))
    return [word for file in files for word in file.read_text("utf-8", "ignore").split()]


def memory() -> float:
    """The most memory that this process has had, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def options(rag: Any, index: Path) -> Any:
    """The options of a run on the index, without the re-ranking, which reads the passages."""
    args = rag.parse_arguments(
        ["a question", "--index", str(index), "--retrieve-only", "--reranker", "none"]
    )
    rag.check_backend(args)
    return args


def build(index: Path, chunks: int, vocabulary: list[str]) -> dict[str, float]:
    """Make the index."""
    import numpy as np

    rag: Any = importlib.import_module("rag_hybrid_fastapi")
    dice = np.random.default_rng(1)

    def embed_now(texts: list[str], *_: object, query: bool = False) -> Any:
        vectors = dice.standard_normal((len(texts), 384)).astype("float32")
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    rag.embed_now, rag.BLOCK = embed_now, 1_000
    store = rag.Store(options(rag, index), threading.Event())
    pick, made = random.Random(1), []
    for n in range(chunks):
        at = pick.randrange(len(vocabulary) - 125)
        text = " ".join([*vocabulary[at : at + 125], f"part{n}"])[-800:]
        made.append(rag.Chunk(text, f"{n // 50}.txt", None, None, 0, len(text)))
    start = time.perf_counter()
    store.change(lambda _: made)
    store.close()
    return {"build": time.perf_counter() - start, "build GiB": memory()}


def restart(index: Path, vocabulary: list[str]) -> dict[str, float]:
    """Open the index in a new process, ask it, add a document."""
    import bm25s  # noqa: F401 - what a restart takes besides importing the libraries
    import chromadb  # noqa: F401
    import sentence_transformers  # noqa: F401
    import torch  # noqa: F401

    import rag_hybrid_fastapi as rag

    start = time.perf_counter()
    store = rag.open_store(options(rag, index))
    found = {"ready": time.perf_counter() - start}
    pick, beyond = random.Random(2), []
    for _ in range(QUESTIONS):
        seconds: dict[str, float] = {}
        rag.retrieve([" ".join(pick.sample(vocabulary, 10))[:300]], store, seconds)
        beyond.append(sum(seconds.values()) - seconds["embed"])
    found |= {"median": median(beyond), "p95": sorted(beyond)[int(0.95 * QUESTIONS) - 1]}
    found["GiB"] = memory()
    start = time.perf_counter()
    new = rag.split_documents([rag.Document("The last file. " * 40, "new.txt")], [], store.args)
    store.change(lambda kept: [*kept, *new])
    store.close()
    return found | {"upload": time.perf_counter() - start}


def print_table(found: dict[str, float], chunks: int) -> bool:
    """Print the figures. Returns whether the targets hold."""
    from rich.console import Console
    from rich.table import Table

    ready, fast = found["ready"] < 10, found["p95"] < 0.060
    table = Table("what", "measured", "target", "held", title=f"{chunks:,} chunks")
    table.add_row("restart to ready", f"{found['ready']:.1f} s", "< 10 s", "yes" if ready else "NO")
    asked = f"median {1000 * found['median']:.0f} ms, p95 {1000 * found['p95']:.0f} ms"
    table.add_row("a question, beyond its encoding", asked, "p95 < 60 ms", "yes" if fast else "NO")
    table.add_row("memory of the server", f"{found['GiB']:.2f} GiB")
    table.add_row("a document added", f"{found['upload']:.0f} s")
    built = f"{found['build']:.0f} s, {found['build GiB']:.2f} GiB"
    table.add_row("the index made, without the embedding", built)
    Console(width=None if sys.stdout.isatty() else 100).print(table)
    return ready and fast


def main() -> int:
    """Make the index and ask it, each in a process of its own. Returns the exit code."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--chunks", type=int, default=100_000, metavar="N")
    parser.add_argument("--data", type=Path, default=ROOT, metavar="FOLDER")
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)  # what the processes are for
    given = parser.parse_args()
    if given.part:
        part, index = given.part[0], Path(given.part[1])
        vocabulary = words(given.data)
        found = (
            build(index, given.chunks, vocabulary)
            if part == "build"
            else restart(index, vocabulary)
        )
        print(json.dumps(found))
        return 0
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for part in ("build", "restart"):
            print(f"measuring: {part}", file=sys.stderr)
            arguments = [sys.executable, __file__, *sys.argv[1:], "--part", part, f"{folder}/index"]
            done = subprocess.run(arguments, env=os.environ, stdout=subprocess.PIPE, check=True)
            found |= json.loads(done.stdout.splitlines()[-1])
    return 0 if print_table(found, given.chunks) else 1


if __name__ == "__main__":
    sys.exit(main())
