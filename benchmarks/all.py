#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# ///
"""Run the benchmarks, and write their tables into README.md between its comment lines.

    uv run benchmarks/all.py --data FOLDER                   # an hour and a half on two calm cores
    uv run benchmarks/all.py --data FOLDER --only retrieval  # one part

FOLDER has corpus.jsonl {id, text} and queries.jsonl {question, relevant_ids}; without it each
benchmark makes a small set. Of several, retrieval.py takes all, the others the first. A table
stands between `<!-- name -->` and `<!-- /name -->`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
# With the first, every start compiles torch and transformers anew, as no user's does.
LEFT_OUT = ("PYTHONDONTWRITEBYTECODE", "VIRTUAL_ENV")


def run(name: str, *args: object) -> str:
    """Run a benchmark, which reports its progress on stderr. Returns its stdout."""
    kept = {key: value for key, value in os.environ.items() if key not in LEFT_OUT}
    command = ["uv", "run", str(ROOT / "benchmarks" / name), *map(str, args)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=kept)
    if done.returncode not in (0, 1):  # 1: a target is missed, or a peer could not be measured
        raise RuntimeError(f"{name} ended with exit code {done.returncode}")
    return done.stdout


def table(head: list[str], rows: list[list[str]]) -> str:
    """Make a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def peers(data: list[Path]) -> str:
    """Our retrieval beside the frameworks'."""
    given = ["--data", data[0]] if data else []
    figures = json.loads(run("peers.py", "--from-nothing", "--json", *given))
    beside = ("ready s", "chunks/s", "CPU ms", "query ms", "memory MB")
    rows = []
    for row in figures["contenders"].values():
        if row["error"]:
            rows.append([row["name"], row["error"]])
            continue
        ratios = [f"{row['ratios'][what]:.2f}" for what in beside]
        quality = [f"{row['recall@5']:.3f}", f"{row['nDCG@10']:.3f}"]
        seconds = row["from nothing s"]
        size = [f"{row['installed MB']:,.0f}", f"{seconds:.0f}" if seconds else "-"]
        rows.append([row["name"], *ratios, *quality, *size])
    head = ["", *(what.rpartition(" ")[0] or what for what in beside), "recall@5", "nDCG@10"]
    asked = f"{figures['questions']:,} questions to {figures['paragraphs']:,} paragraphs"
    return (
        f"`peers.py`, {date.today()}: {asked}. The first five are ratios to the floor, bare "
        "sentence-transformers; except for\nchunks, lower is better.\n\n"
        + table([*head, "MB on disk", "s from nothing"], rows)
    )


def overhead(data: list[Path]) -> str:
    """What the scripts add to the bare libraries."""
    parts = ("indexing", "question", "async", "streaming")
    only = [word for part in parts for word in ("--only", part)]
    only += ["--data", str(data[0])] if data else []
    rows = []
    for line in run("overhead.py", "--turns", 3, *only).splitlines()[1:-1]:
        what, (ours, floor, ratio, _, unit) = line[:52].strip(), line[52:].split()[:5]
        rows.append([what, f"{ours} {unit}", f"{floor} {unit}", f"{float(ratio):.2f}"])
    head = ["what", "script", "bare library", "ratio"]
    about = "the script beside the same work done with the bare library"
    return f"`overhead.py`, {date.today()}: {about}.\n\n{table(head, rows)}"


def retrieval(data: list[Path]) -> str:
    """What each way of retrieving finds, in each set and in the one that is made."""
    sets = []
    for folder in [*data, None]:
        given = ["--data", folder] if folder else []
        sets.append(json.loads(run("retrieval.py", "--json", "--sample", 0, *given)))
    rows = []
    for method in sets[0]["methods"]:
        found = [figures["methods"][method]["nDCG@10"] for figures in sets]
        taken = [figures["milliseconds"][method]["median"] for figures in sets]
        rows.append(
            [method, *(f"{value:.3f}" for value in [*found, fmean(found)]), f"{taken[0]:.0f}"]
        )
    names = [f"{figures['data']} ({figures['questions']:,} questions)" for figures in sets]
    about = "nDCG@10 of `rag_hybrid_fastapi.py`, and its time for a question"
    return f"`retrieval.py`, {date.today()}: {about}.\n\n{table(['', *names, 'mean', 'ms'], rows)}"


def lines(_: list[Path]) -> None:
    """Write the scripts' lengths into the last column of the table of scripts."""

    def count(match: re.Match[str]) -> str:
        length = len((ROOT / match[2]).read_text(encoding="utf-8").splitlines())
        return f"{match[1]}{length:,} |"

    text = README.read_text(encoding="utf-8")
    README.write_text(re.sub(r"(?m)^(\| `(rag_\w+\.py)` .*\| )[\d,]+ \|$", count, text))


PARTS: dict[str, Callable[[list[Path]], Any]] = {
    "lines": lines,
    "retrieval": retrieval,
    "overhead": overhead,
    "peers": peers,
}


def main() -> int:
    """Run the parts, each of which is written as soon as it is measured."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--data", type=Path, nargs="+", default=[], metavar="FOLDER")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    options = parser.parse_args()
    for name in options.only:
        print(f"measuring: {name}", file=sys.stderr)
        made = PARTS[name](options.data)
        if made:
            text = README.read_text(encoding="utf-8")
            start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
            before, after = text.partition(start)[0], text.partition(end)[2]
            README.write_text(f"{before}{start}\n{made}\n{end}{after}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
