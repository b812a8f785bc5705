"""Measure what each step of hybrid retrieval finds, and how long a question takes in it.

    uv run benchmarks/retrieval.py                  # 60 made paragraphs, 180 questions
    uv run benchmarks/retrieval.py --data FOLDER    # corpus.jsonl {id, text}, and queries.jsonl
                                                    # {question, relevant_ids}
    uv run benchmarks/retrieval.py --data FOLDER --sample 0    # all of its questions

Every method is asked each question, in changing order: what else the machine does hits them all.
Exit code 1: scores, the default, does not beat both of its parts in nDCG@10. Exit code 2: nothing
to measure.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import platform
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
METHODS = {  # the options of each
    "dense": {"retriever": "dense"},
    "BM25": {"retriever": "bm25"},
    "RRF": {"retriever": "hybrid", "fusion": "rrf"},
    "scores": {"retriever": "hybrid", "fusion": "scores"},
}
METRICS = ("recall@5", "MRR@10", "nDCG@10")

Rank = Callable[[str, str], list[str]]


class Missing(Exception):
    """What is to be measured is not here."""


@dataclass(frozen=True)
class Question:
    """A question, and the ids of the paragraphs that answer it."""

    text: str
    relevant: frozenset[str]


# ---- The script that is measured: no other part of this file knows it ----


def load(path: str) -> Any:
    """Import a file of the repository by its path, anew each time."""
    if not (ROOT / path).exists():
        raise Missing(f"there is no {path}")
    spec: Any = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module: Any = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up their annotations
    spec.loader.exec_module(module)
    return module


def connect(corpus: dict[str, str]) -> Rank:
    """Index the paragraphs, given by their ids, with the script. Returns `rank`."""
    rag = load("rag_hybrid_fastapi.py")
    args = rag.PARSER.parse_args(["--retrieve-only"])
    rag.load_models(args)
    store = rag.Store(args)
    store.update({key: [text] for key, text in corpus.items()})

    def rank(question: str, method: str) -> list[str]:
        """Ids of the nearest paragraphs, nearest first.

        A paragraph of several chunks stands where its first chunk stands, once.
        """
        vars(args).update(METHODS[method])
        return list(dict.fromkeys(hit["source"] for hit in rag.retrieve([question], store)))

    return rank


# ---- The made set ----

# A device, and the same in other words.
DEVICES = {
    "pump": "what moves the water",
    "oven": "what we bake in",
    "lamp": "what gives light",
    "scale": "what tells the weight",
    "fan": "what blows the air",
    "lock": "what keeps the door shut",
    "printer": "what puts text on paper",
    "freezer": "what keeps food below zero",
    "camera": "what takes pictures",
    "drill": "what makes holes",
    "clock": "what shows the time",
    "kettle": "what boils water",
}
# A paragraph, a question with nothing but the part number to go by, and one in other words.
TOPICS = (
    (
        "The warranty of the {name} {device} lasts {n} months from the date of purchase. "
        "Claims for part {part} need the invoice.",
        "What holds for part {part}?",
        "Until when is a defect of {other} repaired for free?",
    ),
    (
        "Clean the {name} {device} every {n} days with a damp cloth. "
        "The filter of part {part} must never be soaked.",
        "What do I have to know about {part}?",
        "How do I get the dirt off {other}?",
    ),
    (
        "The {name} {device} draws {n} watts in operation. "
        "Connect part {part} to a grounded socket and to nothing else.",
        "Is there anything on {part}?",
        "How much electricity does {other} use?",
    ),
    (
        "Store the {name} {device} dry and upright between 5 and {n} degrees. "
        "Part {part} goes back into its carton.",
        "What is to be done with part {part}?",
        "Where do we put {other} over the winter?",
    ),
    (
        "Spares for the {name} {device} leave the depot within {n} hours. "
        "Order part {part} by telephone before noon.",
        "Tell me about {part}.",
        "How fast are replacements for {other} sent out?",
    ),
)


def made_set() -> tuple[dict[str, str], list[Question]]:
    """Sixty paragraphs of invented devices, and three questions about each.

    One has nothing but a part number to go by, one is in other words than the paragraph, and one
    too, but for the device's invented name. A device's part numbers are alike.
    """
    dice, corpus, questions = random.Random(0), dict[str, str](), list[Question]()
    for device, other in DEVICES.items():
        letters = ("VBKZ", "aeiou", "lrmn", "aeiou", "dtsg", "aeiou", "nrx")
        name = "".join(map(dice.choice, letters))
        for topic, (text, by_part, in_other_words) in enumerate(TOPICS):
            part = f"{name[:2].upper()}-{dice.randint(1_000, 9_999)}-{dice.choice('ABC')}"
            words = {"name": name, "device": device, "part": part, "n": dice.randint(12, 96)}
            key = f"{device}:{topic}"
            corpus[key] = text.format(**words)
            for asked in (
                by_part.format(**words),
                in_other_words.format(other=other),
                in_other_words.format(other=f"the {name}"),
            ):
                questions.append(Question(asked, frozenset({key})))
    return corpus, questions


def read_set(folder: Path) -> tuple[dict[str, str], list[Question]]:
    """The paragraphs by their ids, and the questions, of a folder of JSON Lines."""

    def read_lines(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (folder / name).open("rb") if line.strip()]

    try:
        corpus = {entry["id"]: entry["text"] for entry in read_lines("corpus.jsonl")}
        questions = [
            Question(entry["question"], frozenset(map(str, entry["relevant_ids"])))
            for entry in read_lines("queries.jsonl")
        ]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise Missing(f"no such set in {folder}: {error!r}") from error
    if not corpus or not questions:
        raise Missing(f"no paragraphs or no questions in {folder}")
    return corpus, questions


# ---- The figures ----


def scores(ids: list[str], relevant: frozenset[str]) -> tuple[float, float, float]:
    """recall@5, MRR@10 and nDCG@10 of a ranking; each relevant paragraph counts alike."""
    places = [place for place, key in enumerate(ids[:10], 1) if key in relevant]
    ideal = sum(1 / math.log2(place + 1) for place in range(1, min(len(relevant), 10) + 1))
    gain = sum(1 / math.log2(place + 1) for place in places)
    recall = sum(place <= 5 for place in places) / len(relevant)
    return recall, 1 / places[0] if places else 0.0, gain / ideal


def percentile(values: list[float], share: float) -> float:
    """The smallest of the values that at least this share of them does not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def measure(rank: Rank, questions: list[Question]) -> dict[str, Any]:
    """Ask each question with each method. Returns the figures."""
    found: dict[str, list[tuple[float, float, float]]] = {method: [] for method in METHODS}
    times: dict[str, list[float]] = {method: [] for method in METHODS}
    for method in METHODS:
        rank(questions[-1].text, method)  # a warm-up
    for turn, question in enumerate(questions):
        first = turn % len(METHODS)
        for method in [*METHODS][first:] + [*METHODS][:first]:
            start = time.perf_counter()
            ids = rank(question.text, method)
            times[method].append(1_000 * (time.perf_counter() - start))
            found[method].append(scores(ids, question.relevant))
        if turn % 100 == 99:
            print(f"asked: {turn + 1} of {len(questions)}", file=sys.stderr, flush=True)
    means = {
        method: dict(zip(METRICS, map(fmean, zip(*each, strict=True)), strict=True))
        for method, each in found.items()
    }
    return {
        "questions": len(questions),
        "methods": means,
        "milliseconds": {
            method: {"median": median(each), "p95": percentile(each, 0.95)}
            for method, each in times.items()
        },
        "target": target(found, means),
    }


def target(
    found: dict[str, list[tuple[float, float, float]]], means: dict[str, dict[str, float]]
) -> dict[str, Any]:
    """Whether scores beats both of its parts in nDCG@10, and by how much the better one.

    The error is the standard error of the difference, question by question.
    """
    better = max(("dense", "BM25"), key=lambda method: means[method]["nDCG@10"])
    pairs = zip(found["scores"], found[better], strict=True)
    gaps = [ours[2] - theirs[2] for ours, theirs in pairs]
    error = stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else 0.0
    return {"held": fmean(gaps) > 0, "part": better, "by": fmean(gaps), "standard error": error}


# ---- What is printed ----


def print_tables(figures: dict[str, Any]) -> None:
    """Print the figures for people."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 100)
    table = Table("method")
    for name in (*METRICS, "median ms", "p95 ms"):
        table.add_column(name, justify="right")
    for method, means in figures["methods"].items():
        taken = figures["milliseconds"][method].values()
        table.add_row(
            method, *(f"{means[metric]:.3f}" for metric in METRICS), *map("{:.1f}".format, taken)
        )
    console.print(table)
    goal = figures["target"]
    held = "yes" if goal["held"] else "NO"
    gap = f"{goal['by']:+.3f} ± {goal['standard error']:.3f} beside {goal['part']}"
    console.print(f"scores beats both of its parts in nDCG@10: {held} ({gap})")
    asked = f"{figures['questions']:,} questions to {figures['paragraphs']:,} paragraphs"
    console.print(f"{figures['data']}: {asked}. {figures['machine']}")


def machine() -> str:
    """What the times depend on, and nothing that names this machine."""
    return f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"


def main() -> int:
    """Measure, and print. Returns 1 where the target is missed, 2 where nothing can be measured."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--data", type=Path, metavar="FOLDER", help="left out: a small made set")
    add("--sample", type=int, default=300, metavar="N", help="N random questions; 0: all (300)")
    add("--json", action="store_true", help="JSON in place of the tables")
    options = parser.parse_args()
    if options.sample < 0:
        parser.error("--sample: 0 or more")
    try:
        corpus, questions = read_set(options.data) if options.data else made_set()
        if options.sample and options.sample < len(questions):
            questions = random.Random(0).sample(questions, options.sample)
        figures = measure(connect(corpus), questions)
    except Missing as missing:
        print(f"not measured: {missing}", file=sys.stderr)
        return 2
    name = options.data.resolve().name if options.data else "made set"
    figures |= {"data": name, "paragraphs": len(corpus), "machine": machine()}
    if options.json:
        print(json.dumps(figures))
    else:
        print_tables(figures)
    return 0 if figures["target"]["held"] else 1


if __name__ == "__main__":
    sys.exit(main())
