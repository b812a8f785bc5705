"""Measure rag_hybrid_fastapi.py with a large kept index: restart, questions, an upload, memory.

    uv run benchmarks/scale.py                      # 100,000 chunks, 5 minutes on two cores
    uv run benchmarks/scale.py --chunks 10000

The chunks are made of words of the files that --data names (default: this repository's own), their
vectors are random: embedding them would take an hour, and changes nothing of what is measured here.
Exit code 1: a target is missed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
QUESTIONS = 200


def read_words(folder: Path) -> list[str]:
    """All words of the text files in a folder, in their order."""
    kinds = ("*.txt", "*.md", "*.py")
    files = sorted(file for kind in kinds for file in folder.glob(kind))
    return [word for file in files for word in file.read_text("utf-8", "ignore").split()]


def memory() -> float:
    """The most memory that this process has had, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def build(index: Path, chunks: int, words: list[str]) -> dict[str, float]:
    """Make the index, of documents with fifty chunks, one a page."""
    import numpy as np

    rag: Any = importlib.import_module("rag_hybrid_fastapi")
    dice, pick = np.random.default_rng(1), random.Random(1)

    def embed(texts: list[str], *_: object) -> Any:
        vectors = dice.standard_normal((len(texts), 384)).astype("float32")
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    rag.embed, rag.EMBED_BATCH = embed, 1_000
    args = rag.PARSER.parse_args(["--index", str(index)])
    args.by_characters = args.by_tokens = argparse.Namespace(chunk_indices=lambda text: [(0, text)])
    documents: dict[str, list[str]] = {}
    for n in range(chunks):
        start = pick.randrange(len(words) - 125)
        text = " ".join([*words[start : start + 125], f"part{n}"])[-800:]
        documents.setdefault(f"{n // 50}.txt", []).append(text)
    start = time.perf_counter()
    rag.Store(args).update(documents)
    return {"build": time.perf_counter() - start, "build GiB": memory()}


def restart(index: Path, words: list[str]) -> dict[str, float]:
    """Open the index in a new process, ask it, add a document."""
    import sentence_transformers  # noqa: F401 - what a restart takes besides importing libraries
    import torch  # noqa: F401

    rag: Any = importlib.import_module("rag_hybrid_fastapi")
    args = rag.PARSER.parse_args(["--index", str(index), "--retrieve-only"])
    embed, embedding = rag.embed, [0.0]

    def timed_embed(*given: Any, **options: Any) -> Any:
        start = time.perf_counter()
        vectors = embed(*given, **options)
        embedding[0] += time.perf_counter() - start
        return vectors

    def timed(function: Callable[..., Any], *given: Any) -> float:
        """Seconds that a call takes, beyond those of the embedding."""
        embedding[0] = 0.0
        start = time.perf_counter()
        function(*given)
        return time.perf_counter() - start - embedding[0]

    rag.embed = timed_embed
    start = time.perf_counter()
    store = rag.open_store(args)
    found = {"ready": time.perf_counter() - start}
    pick = random.Random(2)
    questions = [" ".join(pick.sample(words, 10))[:300] for _ in range(QUESTIONS)]
    taken = [timed(rag.retrieve, [question], store) for question in questions]
    found |= {"median": median(taken), "p95": sorted(taken)[int(0.95 * QUESTIONS) - 1]}
    found["added"] = timed(store.update, {"new.txt": ["The last file. " * 40]}, True)
    return found | {"GiB": memory()}


def print_table(found: dict[str, float], chunks: int) -> bool:
    """Print the figures. Returns whether the targets hold."""
    from rich.console import Console
    from rich.table import Table

    asked = f"median {1000 * found['median']:.0f} ms, p95 {1000 * found['p95']:.0f} ms"
    rows = (
        ("restart to ready, without imports", f"{found['ready']:.1f} s", found["ready"], 10, "s"),
        ("a question, beyond its embedding", asked, 1000 * found["p95"], 150, "ms"),
        (
            "a document added, beyond its embedding",
            f"{found['added']:.1f} s",
            found["added"],
            2,
            "s",
        ),
        ("memory of the server", f"{found['GiB']:.2f} GiB", found["GiB"], 2, "GiB"),
    )
    table = Table("what", "measured", "target", "held", title=f"{chunks:,} chunks")
    for what, measured, value, limit, unit in rows:
        table.add_row(what, measured, f"< {limit} {unit}", "yes" if value < limit else "NO")
    built = f"{found['build']:.0f} s, {found['build GiB']:.2f} GiB"
    table.add_row("the index made, without the embedding", built)
    Console(width=None if sys.stdout.isatty() else 100).print(table)
    return all(value < limit for _, _, value, limit, _ in rows)


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
        words = read_words(given.data)
        found = build(index, given.chunks, words) if part == "build" else restart(index, words)
        print(json.dumps(found))
        return 0
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for part in ("build", "restart"):
            print(f"measuring: {part}", file=sys.stderr)
            command = [sys.executable, __file__, *sys.argv[1:], "--part", part, f"{folder}/index"]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
            found |= json.loads(done.stdout.splitlines()[-1])
    return 0 if print_table(found, given.chunks) else 1


if __name__ == "__main__":
    sys.exit(main())
