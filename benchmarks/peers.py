#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = ["rich>=15,<16"]
# [tool.uv]
# exclude-newer = "2026-11-14T00:00:00Z"
# ///
"""Measure our retrieval beside LangChain, LlamaIndex, Haystack, txtai, and beside the floor.

    uv run benchmarks/peers.py                                # 35 minutes on two calm cores
    uv run benchmarks/peers.py --only floor dense txtai --rounds 1
    uv run benchmarks/peers.py --data FOLDER    # corpus.jsonl {id, text}, and queries.jsonl
                                                # {question, relevant_ids}

All do the same work with the same files of all-MiniLM-L6-v2: they embed and store the paragraphs
of the data, each of which is one chunk (no splitter is asked), and find ten of them for each
question. benchmarks/peers/ has how each does it, by its documented way and with its defaults. The
floor is sentence-transformers' `encode` and one matrix product. The ratios are to it.

Each contender runs in a process and an environment of its own; the first run makes these (on Linux
3.4 GB to download, 12 GB of disk). They take turns, in changing order, and each figure is the
median of the rounds: what else the machine does hits all. Every run is told to stay offline.

import s     what the libraries take to import, also what they put off until they are used
load s       the model, from its files
ready s      from the start of the process until the first text could be embedded
chunks/s     embedding and storing; of the hybrid script also the index of words
CPU ms       of all cores, for one chunk: what else the machine does hardly changes it
query ms     one question, from its text to the ids; p95: 19 of 20 take no longer
memory MB    the most that the process ever has
installed MB the environment, without bytecode
from nothing with --from-nothing: seconds from an empty cache of packages to the first results
lines        of the contender's own code, without comments and docstrings: of ours, + the script

Exit code 1: a contender could not be measured. Exit code 2: nothing can. 130: Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import tokenize
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

from retrieval import Missing, Question, made_set, percentile, read_set, scores

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
DATA = ROOT.parent / "shared/data/squad2_dev"
TIMEOUT = 3_600  # seconds for one run: a contender that hangs must not stop the others
OFFLINE = {  # no telemetry, no hub: the model's files are here
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HAYSTACK_TELEMETRY_ENABLED": "False",
    "LANGSMITH_TRACING": "false",
    "LANGCHAIN_TRACING_V2": "false",
    "ANONYMIZED_TELEMETRY": "False",
    "DO_NOT_TRACK": "1",
}
THREADS = {  # as many for all; idle ones sleep, or they would fight each other for a busy core
    "OMP_NUM_THREADS": str(os.cpu_count()),
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "true",
}
BESIDE = ("ready s", "chunks/s", "CPU ms", "query ms", "p95 ms", "memory MB", "installed MB")
TIMES = ("import s", "load s", "ready s", "chunks/s", "CPU ms", "query ms", "p95 ms", "memory MB")


class Broken(Exception):
    """A contender can't be installed, or fails: one line that says why."""


@dataclass(frozen=True)
class Contender:
    """Who takes part: its name in the table, its code, and what else its run needs."""

    name: str
    file: str
    package: str = ""  # whose version is told
    script: str = ""  # of ours, in whose environment it runs
    postponed: tuple[str, ...] = ()  # imports that its library puts off until they are used
    install: dict[str, str] = field(default_factory=dict)  # uv's settings

    @property
    def code(self) -> Path:
        """Its code, which has its environment's dependencies too, unless it is one of ours."""
        return HERE / "peers" / self.file


TORCH = ("torch", "sentence_transformers")
COPY = {"UV_LINK_MODE": "copy"}  # LlamaIndex refuses to read its own files where they are links
CONTENDERS = {
    "floor": Contender("floor", "floor.py", "sentence-transformers"),
    "dense": Contender(
        "rag_local_ollama.py", "ours_dense.py", script="rag_local_ollama.py", postponed=TORCH
    ),
    "hybrid": Contender(
        "rag_hybrid_fastapi.py", "ours_hybrid.py", script="rag_hybrid_fastapi.py", postponed=TORCH
    ),
    "langchain": Contender(
        "LangChain", "langchain.py", "langchain-core", postponed=("sentence_transformers",)
    ),
    "llamaindex": Contender("LlamaIndex", "llama_index.py", "llama-index-core", install=COPY),
    "haystack": Contender("Haystack", "haystack.py", "haystack-ai"),
    "txtai": Contender("txtai", "txtai.py", "txtai"),
}


# ---- The work ----


def choose(
    corpus: dict[str, str], questions: list[Question], chunks: int, queries: int
) -> tuple[dict[str, str], list[Question]]:
    """So many paragraphs, and so many of the questions that these answer, both by lot."""
    dice = random.Random(0)
    if chunks < len(corpus):
        corpus = dict(dice.sample(list(corpus.items()), chunks))
    answered = [q for q in questions if q.relevant and q.relevant <= corpus.keys()]
    if not answered:
        raise Missing("the paragraphs answer none of the questions: more of them, with --chunks")
    return corpus, dice.sample(answered, min(queries, len(answered)))


# ---- One contender ----


def run(*command: Any, **variables: str) -> str:
    """Run a command, without keys, and with Python's bytecode kept. Returns what it prints.

    Raises Broken where it fails, with what it says of that: of a traceback, the last line.
    """
    left_out = ("OPENAI_", "ANTHROPIC_", "OLLAMA_", "PYTHON", "VIRTUAL_ENV")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    words = [str(word) for word in command]
    settings: dict[str, Any] = {"capture_output": True, "text": True, "timeout": TIMEOUT}
    try:
        done = subprocess.run(words, env=kept | variables, **settings)
    except subprocess.TimeoutExpired as error:
        raise Broken(f"no end after {TIMEOUT} s") from error
    except OSError as error:
        raise Broken(str(error)) from error
    if done.returncode < 0:
        raise Broken(f"killed by {signal.Signals(-done.returncode).name}")
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        said = said[-1:] if any(line.startswith("Traceback") for line in said) else said
        raise Broken(textwrap.shorten(" ".join(said), 300))
    return done.stdout


def install(contender: Contender, **settings: str) -> Path:
    """Make the contender's environment, or bring it up to date. Returns its Python."""
    script = ROOT / contender.script if contender.script else contender.code
    settings |= contender.install
    run("uv", "sync", "--quiet", "--script", script, **settings)
    return Path(run("uv", "python", "find", "--script", script, **settings).strip())


def start_from_nothing(contender: Contender, work: Path) -> float:
    """Download and install a contender with an empty cache, and let it work. Returns seconds."""
    with tempfile.TemporaryDirectory() as cache:
        start = time.monotonic()
        once(contender, install(contender, UV_CACHE_DIR=cache), work)
        return time.monotonic() - start


def once(contender: Contender, python: Path, work: Path) -> dict[str, Any]:
    """Let a contender do the work in a new process. Returns what contender.py prints."""
    imports = [word for name in contender.postponed for word in ("--import", name)]
    packages = ("torch", "transformers", *([contender.package] if contender.package else []))
    versions = [word for name in packages for word in ("--package", name)]
    start = time.time()
    command = (python, HERE / "contender.py", contender.code, work, *imports, *versions)
    printed = run(*command, **OFFLINE, **THREADS)
    try:
        figures = json.loads(printed.splitlines()[-1])
        return figures | {"ready s": figures.pop("ready at") - start}
    except (ValueError, LookupError, AttributeError) as error:
        raise Broken("it did not print its figures") from error


def check(found: list[list[str]], corpus: dict[str, str], questions: list[Question]) -> None:
    """Raise Broken where a ranking is not ten different paragraphs of the corpus, or all of it."""
    if len(found) != len(questions):
        raise Broken(f"{len(found)} answers to {len(questions)} questions")
    for ids, question in zip(found, questions, strict=True):
        if len(set(ids) & corpus.keys()) != len(ids) or len(ids) != min(10, len(corpus)):
            raise Broken(f"not ten different paragraphs for: {question.text}")


def size(folder: Path) -> float:
    """The files of an environment in MB, without the bytecode that Python writes."""
    files = (file for file in folder.rglob("*") if file.is_file() and not file.is_symlink())
    return sum(file.stat().st_size for file in files if file.suffix != ".pyc") / 1e6


def lines(file: Path) -> int:
    """Lines of code in a Python file: not blank, and no comment or docstring."""
    silent = {
        tokenize.ENCODING, tokenize.COMMENT, tokenize.NL, tokenize.INDENT, tokenize.DEDENT,
        tokenize.ENDMARKER,
    }  # fmt: skip
    code, statement = set[int](), list[tokenize.TokenInfo]()
    with file.open("rb") as text:
        for token in tokenize.tokenize(text.readline):
            if token.type == tokenize.NEWLINE:
                if [each.type for each in statement] != [tokenize.STRING]:
                    code.update(n for t in statement for n in range(t.start[0], t.end[0] + 1))
                statement = []
            elif token.type not in silent:
                statement.append(token)
    return len(code)


# ---- All of them ----


@dataclass
class Measured:
    """What the rounds of a contender took, the size of its environment, and why it broke."""

    rounds: list[dict[str, Any]] = field(default_factory=list)
    installed: float = 0.0  # MB
    from_nothing: float | None = None  # s
    error: str | None = None


def measure(
    measured: dict[str, Measured],
    corpus: dict[str, str],
    questions: list[Question],
    rounds: int,
    from_nothing: bool = False,
) -> None:
    """Let all contenders do the work, in turns, and note what each round takes.

    What fails leaves the others alone, and Ctrl-C leaves what was noted until then.
    """
    pythons: dict[str, Path] = {}
    names = list(measured)
    with tempfile.TemporaryDirectory() as folder:
        small, whole = Path(folder, "small.json"), Path(folder, "whole.json")
        texts, few = [question.text for question in questions], dict(list(corpus.items())[:32])
        small.write_text(json.dumps({"corpus": few, "questions": texts[:1]}), encoding="utf-8")
        whole.write_text(json.dumps({"corpus": corpus, "questions": texts}), encoding="utf-8")
        for turn in range(-1, rounds):  # the first is a warm-up, which writes the bytecode
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                contender, own = CONTENDERS[name], measured[name]
                if own.error:
                    continue
                what = "preparing" if turn < 0 else f"round {turn + 1} of {rounds}:"
                print(what, contender.name, file=sys.stderr, flush=True)
                try:
                    if turn < 0:
                        pythons[name] = install(contender)
                        own.installed = size(pythons[name].parent.parent)
                        once(contender, pythons[name], small)
                        if from_nothing:
                            own.from_nothing = start_from_nothing(contender, small)
                    else:
                        figures = once(contender, pythons[name], whole)
                        check(figures["found"], corpus, questions)
                        own.rounds.append(figures | derived(figures, len(corpus)))
                except Broken as why:
                    print(f"{contender.name}: {why}", file=sys.stderr, flush=True)
                    own.error = str(why)


def derived(figures: dict[str, Any], chunks: int) -> dict[str, float]:
    """The figures of a round that are told in place of what was timed."""
    times = figures["query ms"]
    speed = {
        "chunks/s": chunks / figures["index s"],
        "CPU ms": 1_000 * figures["index CPU s"] / chunks,
    }
    return speed | {"query ms": median(times), "p95 ms": percentile(times, 0.95)}


def quality(found: list[list[str]], questions: list[Question]) -> dict[str, float]:
    """recall@5 and nDCG@10 of the rankings, the means over the questions."""
    each = [scores(ids, q.relevant) for ids, q in zip(found, questions, strict=True)]
    recall, _, ndcg = map(fmean, zip(*each, strict=True))
    return {"recall@5": recall, "nDCG@10": ndcg}


def ratios(own: Measured, floor: Measured) -> dict[str, float]:
    """The medians of the rounds' ratios to the floor's; of a run that was stopped, the whole ones.

    The environment's size is the same in all rounds.
    """
    pairs = list(zip(own.rounds, floor.rounds, strict=False))
    told = {what: median(mine[what] / least[what] for mine, least in pairs) for what in TIMES}
    return told | {"installed MB": own.installed / floor.installed}


def report(measured: dict[str, Measured], questions: list[Question]) -> dict[str, dict[str, Any]]:
    """All figures by contender; of one that could not be measured, why."""
    rows, floor = {}, measured.get("floor", Measured())
    for name, own in measured.items():
        contender = CONTENDERS[name]
        row: dict[str, Any] = {"name": contender.name, "error": own.error}
        rows[name] = row
        if own.error or not own.rounds:
            row["error"] = own.error or "not measured"
            continue
        script = lines(ROOT / contender.script) if contender.script else 0
        row |= {what: median(each[what] for each in own.rounds) for what in TIMES}
        row |= {"installed MB": own.installed, "from nothing s": own.from_nothing}
        row |= {"lines": lines(contender.code)}
        row |= {"script lines": script, "rounds": len(own.rounds)}
        row |= quality(own.rounds[0]["found"], questions)
        row |= {"versions": own.rounds[0]["versions"]}
        if floor.rounds and not floor.error:
            row["ratios"] = ratios(own, floor)
    return rows


# ---- What is printed ----

COLUMNS = {
    "import s": ".1f", "load s": ".1f", "ready s": ".1f", "chunks/s": ".1f", "CPU ms": ".1f",
    "query ms": ".1f", "p95 ms": ".1f", "memory MB": ",.0f", "installed MB": ",.0f",
    "recall@5": ".3f", "nDCG@10": ".3f",
}  # fmt: skip


def title(row: dict[str, Any], name: str) -> str:
    """A contender's name, with its version."""
    version = row.get("versions", {}).get(CONTENDERS[name].package, "")
    return f"{row['name']} {version}".strip()


def print_tables(figures: dict[str, Any]) -> None:
    """Print the figures for people."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 160)
    rows = figures["contenders"]
    table = Table("contender", title="what it takes, and what it finds", title_justify="left")
    for what in (*COLUMNS, "lines"):
        table.add_column(what, justify="right")
    for name, row in rows.items():
        if row["error"]:
            table.add_row(f"{row['name']}: {row['error']}")
            continue
        more = f" + {row['script lines']}" if row["script lines"] else ""
        cells = (format(row[what], form) for what, form in COLUMNS.items())
        table.add_row(title(row, name), *cells, f"{row['lines']}{more}")
    console.print(table)
    if any("ratios" in row for row in rows.values()):
        beside = Table("contender", title="ratio to the floor", title_justify="left")
        for what in BESIDE:
            beside.add_column(what, justify="right")
        for name, row in rows.items():
            if "ratios" in row:
                cells = (f"{row['ratios'][what]:.2f}" for what in BESIDE)
                beside.add_row(title(row, name), *cells)
        console.print(beside)
    asked = f"{figures['questions']:,} questions to {figures['paragraphs']:,} paragraphs"
    console.print(f"{figures['data']}: {asked}. {figures['machine']}")


def machine() -> str:
    """What the times depend on, and nothing that names this machine."""
    return f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"


def natural(text: str) -> int:
    """A number of 1 or more, for the command line."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} is not a number of 1 or more")
    return int(text)


def main(argv: list[str] | None = None) -> int:
    """Measure, and print. Returns the exit code."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--data", type=Path, metavar="FOLDER", help="left out: SQuAD, or a small made set")
    add("--chunks", type=natural, default=10**9, metavar="N", help="N random paragraphs (all)")
    add("--queries", type=natural, default=200, metavar="N", help="N random questions (200)")
    add("--rounds", type=natural, default=3, metavar="N", help="3")
    add("--only", nargs="+", choices=CONTENDERS, metavar="NAME", help=", ".join(CONTENDERS))
    add("--from-nothing", action="store_true", help="also time each with an empty package cache")
    add("--json", action="store_true", help="JSON in place of the tables")
    options = parser.parse_args(argv)
    try:
        folder = options.data or (DATA if DATA.is_dir() else None)
        whole, asked = read_set(folder) if folder else made_set()
        corpus, questions = choose(whole, asked, options.chunks, options.queries)
    except Missing as missing:
        print(f"not measured: {missing}", file=sys.stderr)
        return 2
    names = [name for name in CONTENDERS if name in (options.only or CONTENDERS)]
    measured, stopped = {name: Measured() for name in names}, False
    try:
        measure(measured, corpus, questions, options.rounds, options.from_nothing)
    except KeyboardInterrupt:  # which has ended the contender that was at work
        stopped = True
    figures = {
        "contenders": report(measured, questions),
        "data": folder.resolve().name if folder else "made set",
        "paragraphs": len(corpus),
        "questions": len(questions),
        "machine": machine(),
    }
    if options.json:
        print(json.dumps(figures))
    else:
        print_tables(figures)
    return 130 if stopped else int(any(own.error for own in measured.values()))


if __name__ == "__main__":
    sys.exit(main())
