#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "httpx>=0.28,<0.29", "jinja2>=3.1,<4", "matplotlib>=3.11,<4", "numpy>=2.4,<3",
#   "packaging>=26.3,<27", "pydantic>=2.14,<3", "pygount>=3.2,<4", "rich>=15,<16",
# ]
# [tool.uv]
# exclude-newer = "2026-11-14T00:00:00Z"
# ///
"""Compare the collection's scripts, and your variants of them, on the same documents and questions.

Run each script as a black box, one after the other; check what it prints; work out its figures;
show all side by side, with the answers and the passages in which they differ.

    uv run rag_compare.py                                  # all that can run here, built-in questions
    uv run rag_compare.py --docs notes/ --questions questions.jsonl
    uv run rag_compare.py rag_chroma_claude.py "rag_local_ollama.py --llm embedded" --report r.html

A line of the questions' file: {"question": "...", "relevant": ["file.md"], "answer": "..."}. The
last two may be left out. "relevant": [] says that no document answers it: a refusal is right.
Any script takes part whose command line and --json are the collection's; one argument may hold a
script and options for it. One that can't run here (exit code 2: no key, no server) is a line that
says why. The first question is asked while a script indexes the documents, all others in a second
process on the kept index, whose start is the warm start. --trace keeps what the scripts printed, and
compares with the newest run of the same questions and documents that is kept there.

First download: the packages for this machine; weights that a script fetches from elsewhere (Ollama's
models, a hub's) are not in it. Costs: the LLM's tokens, not those of embeddings. "-": not known.
Needs what the scripts need: with --retrieve-only no LLM and no LLM's key. Answers of hosted LLMs
cost what they cost anywhere. First download of this script itself: 40 MB.
Exit code 0: compared. 1: a script failed, or could not answer a question. 2: nothing could run here,
or the command line or a file of yours is to be mended. 130: Ctrl-C, after what was measured.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import hashlib
import io
import itertools
import json
import os
import queue
import re
import shlex
import shutil
import signal
import string
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

TOP_K = 4  # as in the scripts
TIMEOUT = 300  # seconds without a line; a first start may download gigabytes
GRACE = 5  # seconds that a script has to end itself
MAX_LINE = 10_000_000  # characters of a line that are read: a record has some thousands
# Bytes of questions on one command line. Systems take 32 kB (Windows) to 2 MB with the environment.
MAX_ARGUMENTS = 20_000 if os.name == "nt" else 200_000
SHOWN = 20  # questions on a terminal
RESAMPLES = 2_000  # of the bootstrap: the ends of an interval are then good to two digits
# USD for a million tokens, in and out, as looked up on 2026-11-21 (the providers' list prices).
PRICES = {"gpt-4o": (2.50, 10.00), "claude-sonnet-4-6": (3.00, 15.00)}

DOCUMENTS = {
    "press.md": "# The cider press\n\nThe press of Quillmere Orchard was built by Edda Thornquist in "
    "1911. It squeezes 640 litres of juice in a day. Its seal has the part number QM-4471-B and is "
    "renewed after every harvest.",
    "old-press.md": "# The old press\n\nAn older press, of elm, stands in the barn. It squeezed 200 "
    "litres in a day, and nobody knows who built it. Its seal was of leather, without a number.",
    "bees.md": "# Bees\n\nForty hives stand between the rows from April to July. Joost Varley looks "
    "after them and is paid in honey. A hive that swarms is moved to the quarry meadow.",
    "frost.md": "# Frost\n\nBelow minus 2 degrees blossom dies. Then a horn sounds three times, and "
    "everybody lights the stoves between the trees. There are 85 stoves, each with 9 litres of oil.",
    "shop.md": "# The shop\n\nThe shop opens on Friday and Saturday from 10 to 16. A bottle of cider "
    "costs 7 crowns; the deposit of 1 crown is paid back. Cards are not taken.",
    "varieties.md": "# Varieties\n\nMost trees are Quillmere Russet, which keeps until March. Silver "
    "Anna is eaten at once, for it goes soft in a week. Perry pears were grubbed up in 1987.",
}
QUESTIONS = [
    ("Who built the cider press of Quillmere Orchard?", "press.md", "Edda Thornquist"),
    ("How many litres does the cider press squeeze in a day?", "press.md", "640"),
    ("What is QM-4471-B?", "press.md", "seal"),
    ("What wood is the old press made of?", "old-press.md", "elm"),
    ("Who looks after the hives?", "bees.md", "Joost Varley"),
    ("Where is a hive moved that swarms?", "bees.md", "quarry meadow"),
    ("How many stoves are there between the trees?", "frost.md", "85"),
    ("How are the workers warned on a cold night?", "frost.md", "horn"),  # in other words
    ("What does a bottle of cider cost?", "shop.md", "7 crowns"),
    ("Which apple keeps until March?", "varieties.md", "Quillmere Russet"),
    ("What is the surname of the orchard's lawyer?", None, None),  # nothing tells
    ("Which football club does the village support?", None, None),
]


class Failure(Exception):
    """What the user can mend: one line that says what is wrong and what to type, exit code 2."""


class Trouble(Exception):
    """What is wrong with a script that was run: it hangs, or prints something else."""


class Question(BaseModel):
    """A line of the questions' file. `relevant`: file names; empty: no document answers it."""

    model_config = ConfigDict(extra="forbid", strict=True)
    question: str
    relevant: list[str] | None = None
    answer: str | None = None


class Source(BaseModel):
    """A passage that a script retrieved."""

    source: str
    text: str
    page: int | None = None
    score: float | None = None


class Usage(BaseModel):
    """What the LLM's service counted."""

    input_tokens: int
    output_tokens: int


class Seconds(BaseModel):
    """How long each stage took; `first_token` counts from the start of `generate`."""

    load: float | None = None
    index: float | None = None
    retrieve: float | None = None
    first_token: float | None = None
    generate: float | None = None


class Record(BaseModel):
    """What a script prints of a question with --json."""

    question: str
    answer: str | None
    refused: bool
    error: str | None
    sources: list[Source]
    seconds: Seconds
    model: str | None = None
    embed_model: str | None = None
    usage: Usage | None = None


@dataclass
class Script:
    """A script, named as it was typed, and what was measured of it."""

    name: str
    path: Path
    options: list[str] = field(default_factory=list)
    status: str = "not run"  # then ok, unable (can't run here), failed
    reason: str | None = None
    records: list[Record] = field(default_factory=list)
    setup: float | None = None  # seconds of --help, with making the environment
    warm_start: float | None = None  # seconds
    opening: float = 0.0  # what seconds.index is on a kept index: loading, not indexing
    chunks: int | None = None
    download: float | None = None  # MB
    figures: dict[str, Any] = field(default_factory=dict)


# --- what is asked --------------------------------------------------------------------------------


def find_scripts(typed: list[str]) -> list[Script]:
    """Read the arguments that name scripts, or else take the rag_*.py beside this file."""
    own = Path(__file__).resolve()
    if not typed:
        beside = [path for path in sorted(own.parent.glob("rag_*.py")) if path != own]
        if not beside:
            raise Failure("no rag_*.py stands beside this file: name scripts to compare")
        return [Script(path.name, path) for path in beside]
    scripts = []
    for name in dict.fromkeys(typed):
        try:
            path, *options = [name] if Path(name).is_file() else shlex.split(name)
        except ValueError as error:  # nothing in it, or an open quote
            raise Failure(f"{name!r} is no script with options: {error}") from error
        if not Path(path).is_file():
            raise Failure(f"no such script: {path}")
        scripts.append(Script(name, Path(path), options))
    return scripts


def read_questions(file: Path, documents: list[str]) -> list[Question]:
    """Read JSON Lines. Raises Failure, with the number of the line, for what is no question."""
    questions = []
    try:
        lines = file.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise Failure(f"the questions can't be read: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            question = Question.model_validate_json(line)
            if not question.question.strip() or "\0" in question.question:
                raise ValueError('"question" is empty, or holds a null character')
            if question.relevant == [] and question.answer is not None:
                raise ValueError('"relevant": [] says that there is no "answer"')
            for label in question.relevant or []:
                named = [document for document in documents if matches(label, document)]
                if len(named) != 1:
                    several = f"{len(named)} documents: write more of its path"
                    what = several if named else "no document under --docs"
                    raise ValueError(f'"relevant": {label!r} names {what}')
        except ValueError as error:
            raise Failure(f"{file}, line {number}: {first_fault(error)}") from error
        questions.append(question)
    if not questions:
        raise Failure(f'{file} is empty: give it a line like {{"question": "Who wrote it?"}}')
    return questions


def first_fault(error: ValueError) -> str:
    """Say in one line what pydantic found first."""
    if not isinstance(error, ValidationError):
        return one_line(error)
    fault = error.errors()[0]
    place = ".".join(map(str, fault["loc"]))
    return one_line(f"{place}: {fault['msg']}" if place else fault["msg"])


def find_documents(paths: list[str]) -> list[str]:
    """List the files under --docs that are not hidden, as paths with forward slashes."""
    found = []
    for path in map(Path, paths):
        if not path.exists():
            raise Failure(f"no such file or folder: {path}")
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        hidden = (any(p.startswith(".") for p in file.relative_to(path).parts) for file in inside)
        found += [f.as_posix() for f, hide in zip(inside, hidden, strict=True) if not hide]
    return [file for file in dict.fromkeys(found) if Path(file).is_file()]


def matches(label: str, source: str) -> bool:
    """Whether a label names a source: `a/b.md` names `notes/a/b.md`."""
    return f"/{source}".replace("\\", "/").endswith(f"/{label.removeprefix('./')}")


def read_prices(file: Path | None) -> dict[str, tuple[float, float]]:
    """Read {"model": [in, out]}, USD a million tokens, which go before the built-in prices."""
    if file is None:
        return dict(PRICES)
    prices: dict[str, tuple[float, float]] = dict(PRICES)
    try:
        for model, (given, made) in json.loads(file.read_text("utf-8")).items():
            prices[model] = float(given), float(made)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        hint = 'it holds {"model": [USD a million tokens in, out]}'
        raise Failure(f"the prices in {file} can't be read, {hint} ({one_line(error)})") from error
    return prices


# --- running the scripts --------------------------------------------------------------------------


def lines_of(command: list[str], timeout: float) -> Iterator[tuple[str, str]]:
    """Run a command. Yields ("stdout" or "stderr", line) as they come, at last ("exit", code).

    The command has a process group of its own, which has ended when this ends, however that is.
    Raises Trouble after `timeout` seconds without a line.
    """
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,  # what it starts is in its group, and Ctrl-C is told by us
    )
    lines: queue.Queue[tuple[str, str | None]] = queue.Queue()

    def pump(name: str, stream: Any) -> None:
        for line in iter(functools.partial(stream.readline, MAX_LINE), ""):
            lines.put((name, line))
        lines.put((name, None))

    streams = {"stdout": process.stdout, "stderr": process.stderr}
    try:
        for name, stream in streams.items():
            threading.Thread(target=pump, args=(name, stream), daemon=True).start()
        while streams:
            name, line = lines.get(timeout=timeout)
            if line is None:
                del streams[name]
            else:
                yield name, line
        yield "exit", str(process.wait(timeout))
    except (queue.Empty, subprocess.TimeoutExpired) as error:
        raise Trouble(f"printed nothing for {timeout:g} s, and was ended (--timeout)") from error
    finally:
        end(process)


def end(process: subprocess.Popen[str]) -> None:
    """End a process and what it started: with an interrupt, and what is left after GRACE hard."""

    def tell(number: int) -> None:
        with contextlib.suppress(OSError):  # the group has gone
            os.killpg(process.pid, number) if os.name == "posix" else process.kill()

    try:
        if process.poll() is None:
            tell(signal.SIGINT)
            process.wait(GRACE)
    except subprocess.TimeoutExpired:
        pass
    finally:
        tell(9)  # SIGKILL, a name that Windows does not have
        process.wait()


def judge(code: int, errors: list[str]) -> tuple[str, str | None]:
    """Say what an exit code means: the status, and the script's own last words as the reason."""
    said = textwrap.shorten(one_line(printable(errors[-1] if errors else "")), 300)
    if code == 0:
        return "ok", None
    number = code - 128 if code > 128 else -code  # uv reports its child's signal as a shell does
    if number in set(signal.Signals):
        return "failed", f"was killed by {signal.Signals(number).name}"
    return ("unable" if code == 2 else "failed"), said or f"ended with exit code {code}"


def batches(questions: list[str]) -> Iterator[list[str]]:
    """Yield the first question alone, for the indexing run; the others as many as a command takes.

    A question that begins with "-" gets a blank before it, or else it would be an option.
    """
    quoted = [f" {q}" if q.startswith("-") else q for q in questions]
    yield quoted[:1]
    batch: list[str] = []
    for question in quoted[1:]:
        if batch and sum(len(q.encode()) + 8 for q in [*batch, question]) > MAX_ARGUMENTS:
            yield batch
            batch = []
        batch.append(question)
    if batch:
        yield batch


def ask(
    script: Script,
    questions: list[str],
    options: list[str],
    timeout: float,
    kept: Callable[[Record], None],
) -> tuple[str, str | None]:
    """Run a script on some questions, and keep each record as it comes. Returns `judge`'s verdict.

    Raises Trouble for what is not the record of the next question, and for a script that hangs.
    """
    command = ["uv", "run", str(script.path), *script.options, "--json", *options, *questions]
    errors, verdict, answered, start = [], ("failed", None), 0, time.perf_counter()
    second, failed = len(script.records) == 1, False
    with contextlib.closing(lines_of(command, timeout)) as lines:
        for name, line in lines:
            if name == "stderr":
                errors = [*errors, line][-20:] if line.strip() else errors
                if found := re.search(r"index: (\d+) chunks added", line):
                    script.chunks = int(found[1])
                continue
            if name == "exit":
                verdict = judge(int(line), errors)
                continue
            place = f"line {answered + 1} of its output"
            try:
                record = Record.model_validate_json(line)
            except ValidationError as error:
                text = textwrap.shorten(one_line(printable(line)), 80)
                raise Trouble(f"{place} is no record: {text} ({first_fault(error)})") from error
            if answered == len(questions):
                raise Trouble(f"{place} is an answer more than there were questions")
            if record.question.strip() != questions[answered].strip():
                text = textwrap.shorten(one_line(printable(record.question)), 80)
                raise Trouble(f"{place} answers {text!r}, which was not the next question")
            if not answered and second:
                spent = (record.seconds.retrieve or 0) + (record.seconds.generate or 0)
                script.warm_start = max(0.0, time.perf_counter() - start - spent)
                script.opening = record.seconds.index or 0.0
            answered += 1
            failed |= record.error is not None
            kept(record)
    if answered < len(questions) and verdict[0] == "ok":
        return "failed", f"ended after {len(script.records)} answers, without an error"
    if answered == len(questions) and failed and verdict[0] == "failed":
        return "ok", None  # its exit code only says what stands in the records
    return verdict


def run_script(
    script: Script,
    questions: list[str],
    folder: Path,
    args: argparse.Namespace,
    kept: Callable[[Record], None],
) -> None:
    """Run a script on all questions; its index is kept in `folder`. Fills in what it measures."""
    start, told, errors = time.perf_counter(), "", []
    command = ["uv", "run", str(script.path), *script.options, "--help"]
    try:
        with contextlib.closing(lines_of(command, args.timeout)) as lines:
            for name, line in lines:
                told += line if name == "stdout" else ""
                errors += [line] if name == "stderr" and line.strip() else []
                code = int(line) if name == "exit" else 0
        script.setup = time.perf_counter() - start
        script.status, script.reason = judge(code, errors)
        if script.status == "ok" and not ("--json" in told and "--retrieve-only" in told):
            script.status = "unable"
            script.reason = "its --help names no --json or no --retrieve-only"
        docs = [f"--docs={path}" for path in args.docs]
        options = [f"--index={folder}", f"--top-k={args.top_k}"]
        options += ["--retrieve-only"] if args.retrieve_only else []
        for batch in batches(questions):
            if script.status == "ok":
                verdict = ask(script, batch, docs + options, args.timeout, kept)
                script.status, script.reason = verdict
            docs = []
    except Trouble as trouble:
        script.status, script.reason = "failed", str(trouble)


async def sizes_of(urls: list[str]) -> list[int]:
    """Ask how many bytes each URL has, by HEAD requests. Raises httpx.HTTPError, KeyError."""
    import httpx

    async with httpx.AsyncClient(follow_redirects=True, timeout=30) as client:

        async def size(url: str) -> int:
            response = await client.head(url)
            return int(response.raise_for_status().headers["Content-Length"])

        return await asyncio.gather(*map(size, urls))


def download_megabytes(script: Path) -> float | None:
    """Megabytes of the packages that a script's first run takes here; None where it is not known.

    uv says which (a lock of PEP 751, made of a copy: nothing is written beside the script), and
    `packaging` which wheel of each suits this machine.
    """
    import httpx
    from packaging.pylock import Pylock, PylockSelectError, PylockValidationError

    try:
        with tempfile.TemporaryDirectory() as folder:
            copy = shutil.copy(script, Path(folder) / "script.py")
            command = ["uv", "export", "--quiet", "--script", copy, "--format", "pylock.toml"]
            done = subprocess.run(command, capture_output=True, check=True, timeout=TIMEOUT)
        wheels: list[Any] = [
            file for _, file in Pylock.from_dict(tomllib.loads(done.stdout.decode())).select()
        ]
        unknown = asyncio.run(sizes_of([wheel.url for wheel in wheels if not wheel.size]))
        return (sum(wheel.size or 0 for wheel in wheels) + sum(unknown)) / 1e6
    except (OSError, ValueError, KeyError, subprocess.SubprocessError, httpx.HTTPError):
        return None
    except (AttributeError, PylockSelectError, PylockValidationError):  # a folder, no wheel for us
        return None


# --- figures --------------------------------------------------------------------------------------


def rank_documents(sources: list[Source], relevant: list[str]) -> list[str]:
    """Turn passages into documents, best first, each once, named by its label if it has one."""
    names = (
        next((label for label in relevant if matches(label, s.source)), s.source) for s in sources
    )
    return list(dict.fromkeys(names))


def hit(ranked: list[str], relevant: list[str]) -> float:
    """1 if any relevant document was retrieved, else 0 (success@k)."""
    return float(not set(relevant).isdisjoint(ranked))


def reciprocal_rank(ranked: list[str], relevant: list[str], depth: int = 10) -> float:
    """1 / rank of the first relevant document among the best `depth`, or 0.

    Its mean over questions is MRR (Voorhees, TREC-8 question answering track, 1999).
    """
    places = (place for place, name in enumerate(ranked[:depth], 1) if name in relevant)
    return 1 / next(places, float("inf"))


def ndcg(ranked: list[str], relevant: list[str], depth: int = 10) -> float:
    """Normalised discounted cumulative gain: DCG = sum of 1 / log2(rank + 1) over the relevant
    among the best `depth`, divided by that of the best order (Jarvelin and Kekalainen, 2002).
    """
    import numpy as np

    gains = 1 / np.log2(np.arange(2, depth + 2))
    found = [name in relevant for name in ranked[:depth]]
    return float(gains[: len(found)] @ found / gains[: len(set(relevant))].sum())


def interval(values: list[float]) -> dict[str, float] | None:
    """The mean with its 95 % interval: percentiles of means of resampled questions (Efron, 1979).

    The seed is fixed: the same values give the same interval.
    """
    import numpy as np

    if not values:
        return None
    draws = np.random.default_rng(0).choice(values, (RESAMPLES, len(values))).mean(axis=1)
    low, high = np.percentile(draws, [2.5, 97.5])
    mean = float(np.mean(values))
    return {"mean": mean, "low": float(low), "high": float(high), "questions": len(values)}


def normalize(text: str) -> str:
    """Drop case, punctuation, articles and white space as SQuAD's evaluation does; citations too."""
    text = re.sub(r"\[\d+\??\]", " ", text.lower())
    text = "".join(character for character in text if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def contains(answer: str | None, expected: str) -> float:
    """1 if an answer holds the expected one as whole words, else 0."""
    return float(f" {normalize(expected)} " in f" {normalize(answer or '')} ")


def shingles(texts: list[str]) -> set[tuple[str, ...]]:
    """All runs of five words of some texts (Broder, 1997): what they share, however they are cut."""
    lists = [re.findall(r"\w+", text.lower()) for text in texts]
    return {tuple(words[n : n + 5]) for words in lists for n in range(max(1, len(words) - 4))}


def jaccard(one: set[Any], other: set[Any]) -> float:
    """Size of the intersection / size of the union; 1 for two empty sets."""
    return len(one & other) / len(one | other) if one or other else 1.0


def percentile(values: list[float | None], share: float) -> float | None:
    """A percentile of the values that are known."""
    import numpy as np

    known = [value for value in values if value is not None]
    return float(np.percentile(known, share)) if known else None


def mean(values: list[float]) -> float | None:
    """The mean, or None where there is no value."""
    return sum(values) / len(values) if values else None


def lookups(records: list[Record]) -> list[float | None]:
    """Seconds of retrieval, a question each.

    A script that looks all questions up at once gives each record of a process the time of all:
    the same number, which is then shared among them.
    """
    times = [record.seconds.retrieve for record in records[1:]]  # the second process, and others
    count = {value: times.count(value) for value in set(times)}
    return [r.seconds.retrieve for r in records[:1]] + [t and t / count[t] for t in times]


def work_out(
    script: Script,
    questions: list[Question],
    prices: dict[str, tuple[float, float]],
    retrieve_only: bool,
) -> dict[str, Any]:
    """Work out a script's figures. None: not known."""
    from pygount import SourceAnalysis

    records = script.records
    pairs = list(zip(questions, records, strict=False))
    looked = lookups(records)
    waits = [
        (r.seconds.first_token, r.seconds.generate) if r.answer else (None, None) for r in records
    ]
    first = [
        s + w[0] if None not in (s, w[0]) else None for s, w in zip(looked, waits, strict=True)
    ]
    whole = [
        s + w[1] if None not in (s, w[1]) else None for s, w in zip(looked, waits, strict=True)
    ]
    used = [record for record in records if record.usage]
    priced = [(r.usage, prices[r.model]) for r in used if r.usage and r.model in prices]
    costs = [(u.input_tokens * i + u.output_tokens * o) / 1e6 for u, (i, o) in priced]
    labelled = [(rank_documents(r.sources, q.relevant), q.relevant) for q, r in pairs if q.relevant]
    said = [] if retrieve_only else [(q, r) for q, r in pairs if not r.error]
    expected = [(q.answer, r) for q, r in pairs if q.answer and not retrieve_only]
    first_index = records[0].seconds.index if records else None
    indexing = (first_index or 0.0) - script.opening
    measured = script.chunks and first_index and indexing > first_index / 2
    source = SourceAnalysis.from_file(str(script.path), "compare")
    return {
        "download_mb": script.download,
        "setup_s": script.setup,
        "warm_start_s": script.warm_start,
        "chunks": script.chunks,
        "indexing_s": indexing if measured else None,
        "chunks_per_s": script.chunks / indexing if script.chunks and measured else None,
        "retrieve_ms_p50": (p := percentile(looked, 50)) and p * 1_000,
        "retrieve_ms_p95": (p := percentile(looked, 95)) and p * 1_000,
        "first_token_s_p50": percentile(first, 50),
        "answer_s_p50": percentile(whole, 50),
        "answer_s_p95": percentile(whole, 95),
        "input_tokens": mean([float(r.usage.input_tokens) for r in used if r.usage]),
        "output_tokens": mean([float(r.usage.output_tokens) for r in used if r.usage]),
        "usd_per_1000": (m := mean(costs) if len(priced) == len(used) else None) and m * 1_000,
        "lines_of_code": source.source_count if source.is_countable else None,
        "hit_at_k": interval([hit(*each) for each in labelled]),
        "mrr_at_10": interval([reciprocal_rank(*each) for each in labelled]),
        "ndcg_at_10": interval([ndcg(*each) for each in labelled]),
        "refused_unanswerable": mean([float(r.refused) for q, r in said if q.relevant == []]),
        "refused_answerable": mean([float(r.refused) for q, r in said if q.relevant]),
        "contains_expected": interval([contains(r.answer, text) for text, r in expected]),
        "retrieve_mean": mean([s for s in looked if s is not None]),
        "wait_mean": mean([w[0] for w in waits if w[0] is not None]),
        "rest_mean": mean([w[1] - (w[0] or 0.0) for w in waits if w[1] is not None]),
        "answered": len([r for r in records if not r.error]),
        "errors": len([r for r in records if r.error]),
    }


ROWS = [  # what a table shows, in this order: a label, and the figures in its cells
    ("hit@k", ["hit_at_k"]),
    ("MRR@10", ["mrr_at_10"]),
    ("nDCG@10", ["ndcg_at_10"]),
    ("answers with the expected", ["contains_expected"]),
    ("unanswerable, refused", ["refused_unanswerable"]),
    ("answerable, refused", ["refused_answerable"]),
    ("retrieve, ms, p50 / p95", ["retrieve_ms_p50", "retrieve_ms_p95"]),
    ("first token, s, p50", ["first_token_s_p50"]),
    ("answer, s, p50 / p95", ["answer_s_p50", "answer_s_p95"]),
    ("tokens a question, in / out", ["input_tokens", "output_tokens"]),
    ("1,000 questions, USD", ["usd_per_1000"]),
    ("indexing, chunks/s", ["chunks_per_s"]),
    ("chunks", ["chunks"]),
    ("warm start, s", ["warm_start_s"]),
    ("--help, environment made, s", ["setup_s"]),
    ("first download, MB", ["download_mb"]),
    ("lines of code", ["lines_of_code"]),
    ("answered / errors", ["answered", "errors"]),
]


def number(value: Any) -> str:
    """Write a figure: three digits, an interval in brackets, "-" where it is not known."""
    if isinstance(value, dict):
        return f"{value['mean']:.2f} ({value['low']:.2f}-{value['high']:.2f})"
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 or isinstance(value, int) else f"{value:.3g}"


def cell(figures: dict[str, Any], keys: list[str]) -> str:
    """Write the figures of one cell."""
    texts = [number(figures.get(key)) for key in keys]
    return "-" if set(texts) == {"-"} else " / ".join(texts)


def table_of(scripts: list[Script]) -> tuple[list[tuple[str, list[str]]], list[str]]:
    """The rows of the table, and the labels of those that are not known of any script."""
    rows = [(label, [cell(s.figures, keys) for s in scripts]) for label, keys in ROWS]
    known = [row for row in rows if set(row[1]) != {"-"}]
    return known, [label for label, cells in rows if set(cells) == {"-"}]


def agreement(scripts: list[Script]) -> list[list[float | None]]:
    """Mean Jaccard overlap of what each two scripts retrieved, over the questions both have."""
    found = [[shingles([p.text for p in r.sources]) for r in s.records] for s in scripts]
    pairs = [[list(zip(one, other, strict=False)) for other in found] for one in found]
    return [[mean([jaccard(*each) for each in cell]) for cell in row] for row in pairs]


def side_by_side(scripts: list[Script], questions: list[Question]) -> list[dict[str, Any]]:
    """For each question the answers, and of each passage whether all others retrieved it too.

    Another script retrieved a passage if half of its shingles stand in what that one retrieved.
    The questions on which the scripts differ most come first.
    """
    views = []
    for place, question in enumerate(questions):
        asked = [(s.name, s.records[place]) for s in scripts if place < len(s.records)]
        found = [shingles([passage.text for passage in r.sources]) for _, r in asked]
        answers = []
        for name, record in asked:
            passages = []
            for passage in record.sources:
                own = shingles([passage.text])
                shared = all(len(own & other) * 2 >= len(own) for other in found)
                passages.append(passage.model_dump() | {"differs": not shared})
            answers.append(
                record.model_dump(exclude={"sources"}) | {"name": name, "passages": passages}
            )
        overlap = mean([jaccard(*pair) for pair in itertools.combinations(found, 2)])
        split = len({record.refused for _, record in asked}) > 1
        order = (overlap if overlap is not None else 1.0) - split
        views.append(
            question.model_dump() | {"answers": answers, "overlap": overlap, "order": order}
        )
    return sorted(views, key=lambda view: view["order"])


# --- earlier runs ---------------------------------------------------------------------------------


def digest(questions: list[Question], documents: list[str], roots: list[str]) -> str:
    """A digest of the questions and of the documents' contents: what two runs must share."""
    made = hashlib.sha256(json.dumps([q.model_dump() for q in questions]).encode())
    for document in documents:
        name = document if document in roots else Path(document).name
        made.update(
            name.encode(errors="replace") + hashlib.sha256(Path(document).read_bytes()).digest()
        )
    return made.hexdigest()


def changes_since(folder: Path, scripts: list[Script]) -> dict[str, Any]:
    """What an earlier run, kept by --trace, had otherwise: figures, answers, passages.

    Times differ from run to run: those that moved by less than a fifth are left out.
    """
    run = json.loads((folder / "run.json").read_text("utf-8"))
    before = {script["name"]: script for script in run["scripts"]}
    changed = []
    for script in scripts:
        if not (old := before.get(script.name)) or not script.records:
            continue
        lines = (folder / old["file"]).read_text("utf-8").splitlines()
        pairs = list(zip(map(Record.model_validate_json, lines), script.records, strict=False))
        figures = {}
        for key, now in script.figures.items():
            was = old.get("figures", {}).get(key)
            is_time = re.search(r"_(s|ms|per_s)(_p\d+)?$", key) and now is not None and was
            if number(was) != number(now) and not (is_time and abs(now / was - 1) < 0.2):
                figures[key] = [was, now]
        answers = [
            {"question": new.question, "before": old.answer, "now": new.answer}
            for old, new in pairs
            if old.answer != new.answer
        ]
        passages = [
            new.question
            for old, new in pairs
            if [(p.source, p.text) for p in old.sources]
            != [(p.source, p.text) for p in new.sources]
        ]
        changed.append(
            {"name": script.name, "figures": figures, "answers": answers, "passages": passages}
        )
    return {"since": run["started"], "scripts": changed}


class Trace:
    """A folder of --trace for one run: run.json, and what each script printed, as it comes."""

    def __init__(self, root: Path, asked: dict[str, Any], scripts: list[Script]) -> None:
        self.started = datetime.now(UTC)
        self.folder, self.asked, self.scripts = (
            root / f"{self.started:%Y%m%dT%H%M%S%fZ}",
            asked,
            scripts,
        )
        try:
            self.folder.mkdir(parents=True)
            self.save()
        except OSError as error:
            raise Failure(f"--trace: {root} can't be written: {error}") from error
        self.earlier = None
        for other in sorted(root.glob("*/run.json"), reverse=True):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                run = json.loads(other.read_text("utf-8"))
                if (
                    other.parent != self.folder
                    and run["digest"] == asked["digest"]
                    and run["scripts"]
                ):
                    self.earlier = other.parent
                    break

    def file(self, script: Script) -> str:
        """The name of a script's file."""
        place = self.scripts.index(script) + 1
        return f"{place}-{re.sub(r'[^A-Za-z0-9]+', '-', script.name)[:60].strip('-')}.jsonl"

    def keep(self, script: Script, record: Record) -> None:
        """Write a record."""
        with (self.folder / self.file(script)).open("a", encoding="utf-8") as file:
            file.write(record.model_dump_json() + "\n")

    def save(self) -> None:
        """Write run.json: what was asked, and what was measured until now."""
        told = [
            {"name": s.name, "file": self.file(s), "status": s.status, "reason": s.reason}
            | {"figures": s.figures}
            for s in self.scripts
        ]
        run = {"started": self.started.isoformat()} | self.asked | {"scripts": told}
        (self.folder / "run.json").write_text(json.dumps(run, indent=2), "utf-8")


# --- what is shown --------------------------------------------------------------------------------


def printable(text: str) -> str:
    """Drop the control characters by which text could drive a terminal (ANSI, bidirectional)."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", "", text)


def one_line(text: object) -> str:
    """Fold white space: a file's name may have line breaks."""
    return " ".join(str(text).split())


def short(name: str) -> str:
    """A script's name for the head of a column, which may break it."""
    return re.sub(r"\brag_|\.py\b", "", Path(name).name if " " not in name else name)


def troubles(scripts: list[Script]) -> list[str]:
    """One line for each script that did not do all that was asked."""
    lines = []
    for script in scripts:
        what = {"unable": "can't run here", "failed": "failed"}.get(script.status, script.status)
        if script.status != "ok":
            lines.append(f"{script.name} {what}" + (f": {script.reason}" if script.reason else ""))
        errors = [record.error for record in script.records if record.error]
        if errors:
            lines.append(
                f"{script.name}: {len(errors)} questions failed, the first with: {errors[0]}"
            )
    return [printable(one_line(line)) for line in lines]


def show(
    console: Any,
    scripts: list[Script],
    views: list[dict[str, Any]],
    changes: dict[str, Any] | None,
    all_scripts: list[Script],
    top_k: int,
) -> None:
    """Print the tables, the scripts' troubles, and the questions on which they differ most."""
    from rich import box
    from rich.columns import Columns
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    rows, unknown = table_of(scripts)
    heads = [short(script.name).replace("_", "_\u200b") for script in scripts]
    fitting = max(1, (console.width - 30) // 14)  # columns beside the labels
    for start in range(0, len(scripts), fitting):
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
        table.add_column("", no_wrap=True)
        for head in heads[start : start + fitting]:
            table.add_column(
                Text(head.replace("\u200b", "\n") if len(head) > 14 else head), justify="right"
            )
        for label, cells in rows:
            table.add_row(
                label, *[text.replace(" (", "\n(") for text in cells[start : start + fitting]]
            )
        console.print(table)
    if scripts:
        notes = f"{top_k} passages a question; in brackets 95 % intervals"
        console.print(Text(notes + (f"; not known: {', '.join(unknown)}" if unknown else "")))
    for line in troubles(all_scripts):
        console.print(Text(line))
    if len(scripts) > 1:
        table = Table(
            box=box.SIMPLE_HEAD, title="overlap of retrieved passages", title_justify="left"
        )
        table.add_column("")
        for place in range(1, len(scripts) + 1):
            table.add_column(f"{place}", justify="right")
        for place, (script, row) in enumerate(zip(scripts, agreement(scripts), strict=True), 1):
            table.add_row(Text(f"{place} {script.name}"), *[number(value) for value in row])
        console.print(table)
    if changes:
        console.print(Text(f"\nsince {changes['since'][:19]}Z:", style="bold"))
        for line in told_changes(changes):
            console.print(Text(line))
    for view in views[:SHOWN]:
        console.print(Text(f"\n{printable(view['question'])}", style="bold"))
        panels = []
        for answer in view["answers"]:
            said = answer["error"] and f"error: {answer['error']}" or answer["answer"] or ""
            body = Text(textwrap.shorten(printable(said), 300) + ("\n" if said else ""))
            for n, passage in enumerate(answer["passages"], 1):
                name = printable(one_line(Path(passage["source"]).name))
                body.append(
                    f"{n} {number(passage['score'])} {name}\n",
                    style="dim" * (not passage["differs"]),
                )
                if passage["differs"]:
                    text = textwrap.shorten(printable(passage["text"]), 90)
                    body.append(f"  not all have: {text}\n", style="yellow")
            body.rstrip()
            panels.append(Panel(body, title=Text(short(answer["name"])), title_align="left"))
        console.print(Columns(panels, width=max(38, console.width // max(1, len(panels)) - 1)))
    if len(views) > SHOWN:
        more = (
            f"\n{SHOWN} of {len(views)} questions, those first in which the scripts differ most: "
        )
        console.print(Text(more + "all are in --json and --report"))


def told_changes(changes: dict[str, Any]) -> list[str]:
    """Lines that say what changed since an earlier run."""
    labels = {key: label for label, keys in ROWS for key in keys}
    lines = []
    for script in changes["scripts"]:
        found = [
            f"{labels[key]}: {number(was)}, now {number(now)}"
            if len(next(keys for _, keys in ROWS if key in keys)) == 1
            else f"{labels[key]} ({key}): {number(was)}, now {number(now)}"
            for key, (was, now) in script["figures"].items()
            if key in labels
        ]
        found += [f"other answer to: {one_line(a['question'])}" for a in script["answers"]]
        found += [f"other passages for: {one_line(question)}" for question in script["passages"]]
        lines.append(f"{script['name']}: " + ("" if found else "nothing changed"))
        lines += [f"  {printable(line)}" for line in found]
    return lines


def plots(scripts: list[Script], retrieve_only: bool) -> list[dict[str, str | None]]:
    """Draw the plots as SVG that inherits the page's colours; None where a plot has no data."""
    import matplotlib
    from matplotlib.figure import Figure

    ink = "#010203"  # replaced by the page's own colour of text
    settings = {"svg.fonttype": "none", "svg.hashsalt": "", "text.parse_math": False}
    settings |= {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}
    colored = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    names = [short(script.name) for script in scripts]
    figures = [script.figures for script in scripts]

    def bars(axes: Any, keys: list[str], labels: list[str], unit: str) -> bool:
        values = [[figure[key] or 0.0 for figure in figures] for key in keys]
        known = any(figure[keys[0]] is not None for figure in figures)
        left = [0.0] * len(names)
        for row, label, color, hatch in zip(values, labels, COLORS, HATCHES, strict=False):
            axes.barh(names, row, left=left, color=color, hatch=hatch, edgecolor=ink, label=label)
            left = [a + b for a, b in zip(left, row, strict=True)]
        for place, (figure, end) in enumerate(zip(figures, left, strict=True)):
            text = number(end) if figure[keys[0]] is not None else "not known"
            axes.annotate(f" {text}", (end, place), va="center")
        axes.invert_yaxis()
        axes.margins(x=0.2)
        axes.set_xlabel(unit)
        if len(keys) > 1:
            axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.4, -0.22), ncols=3)
        return known

    def trade(axes: Any) -> bool:
        key, unit = "answer_s_p50", "seconds to the answer, median"
        if retrieve_only:
            key, unit = "retrieve_ms_p50", "milliseconds to the passages, median"
        points = [(n, f) for n, f in zip(names, figures, strict=True) if f[key] and f["ndcg_at_10"]]
        for (name, figure), color, marker in zip(points, COLORS * 9, "osD^vP*X" * 9, strict=False):
            score = figure["ndcg_at_10"]
            spread = [[score["mean"] - score["low"]], [score["high"] - score["mean"]]]
            style = {"color": color, "marker": marker, "capsize": 4, "markeredgecolor": ink}
            axes.errorbar(figure[key], score["mean"], yerr=spread, label=name, ls="", ms=9, **style)
        axes.set_xlabel(unit)
        axes.set_ylabel("nDCG@10")
        axes.margins(0.15)
        if points:
            axes.set_xlim(left=0)
            axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.4, -0.18), ncols=2)
        return bool(points)

    stages = [f"{stage}_mean" for stage in ("retrieve", "wait", "rest")]
    drawings: list[tuple[str, str, Callable[[Any], bool]]] = [
        ("Quality against time", "Up and left is better; the bars are 95 % intervals.", trade),
        (
            "Where the time of a question goes",
            "Mean seconds. A script that does not stream tells no first token: all is the answer.",
            lambda a: bars(a, stages, ["retrieval", "to first token", "answer"], "seconds"),
        ),
        (
            "Time to the first token",
            "From the question on, median.",
            lambda a: bars(a, ["first_token_s_p50"], [""], "seconds"),
        ),
        (
            "Cost of 1,000 questions",
            "By the tokens that the service counted, and the list of prices.",
            lambda a: bars(a, ["usd_per_1000"], [""], "USD"),
        ),
    ]
    drawn: list[dict[str, str | None]] = []
    for place, (title, caption, draw) in enumerate(drawings):
        with matplotlib.rc_context(settings | dict.fromkeys(colored, ink)):
            size = (4.8, 3.6 if draw is trade else 1.5 + 0.45 * len(scripts))
            figure = Figure(figsize=size, layout="constrained")
            known = draw(figure.subplots())
            written = io.StringIO()
            nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
            figure.savefig(written, format="svg", transparent=True, metadata=nothing)
        svg = written.getvalue()
        svg = svg[svg.index("<svg") :].replace(ink, "currentColor")
        svg = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>plot{place}-", svg)  # ids are the page's
        drawn.append({"title": title, "caption": caption, "svg": svg if known else None})
    return drawn


COLORS = ["#2f7fc1", "#d9822b", "#3d9a5f", "#b55aa8", "#b8960c", "#c8504b"]  # on light and dark
HATCHES = ["", "//", ".."]  # told apart without colours too


def write_report(
    file: Path,
    scripts: list[Script],
    views: list[dict[str, Any]],
    changes: dict[str, Any] | None,
    all_scripts: list[Script],
    args: argparse.Namespace,
) -> None:
    """Write the page, whole or not at all."""
    import jinja2
    from markupsafe import Markup

    rows, unknown = table_of(scripts)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["number"] = number
    drawn = plots(scripts, args.retrieve_only) if scripts else []
    page = environment.from_string(PAGE).render(
        names=[script.name for script in scripts],
        rows=rows,
        unknown=unknown,
        agreement=agreement(scripts),
        plots=[plot | {"svg": Markup(plot["svg"])} for plot in drawn if plot["svg"]],
        missing=[plot["title"] for plot in drawn if not plot["svg"]],
        views=views,
        changes=[changes["since"][:19], *told_changes(changes)] if changes else [],
        troubles=troubles(all_scripts),
        top_k=args.top_k,
        made=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    )
    with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False, encoding="utf-8") as new:
        new.write(re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]", "", page))
    Path(new.name).chmod(0o644)  # a temporary file is for its owner alone
    Path(new.name).replace(file)


# --- command line ---------------------------------------------------------------------------------


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line; an error is one line, with exit code 2."""
    parser = argparse.ArgumentParser(
        usage=f"uv run {Path(__file__).name} [SCRIPT ...] [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("script", nargs="*", help="what to compare; left out: the rag_*.py beside this file")
    add("--docs", action="append", metavar="PATH", help="a file or folder to answer from; give all")
    add("--questions", type=Path, metavar="FILE", help="JSON Lines, see above")
    add("--top-k", type=int, default=TOP_K, metavar="N", help="passages a question (%(default)s)")
    add("--retrieve-only", action="store_true", help="compare the passages; no LLM is called")
    add("--report", type=Path, metavar="FILE", help="write a page with tables, plots and answers")
    add("--json", action="store_true", help="one JSON object in place of the tables")
    add("--trace", type=Path, metavar="DIR", help="keep all that is printed; compare with earlier")
    add("--prices", type=Path, metavar="FILE", help='{"model": [USD a million tokens in, out]}')
    add("--timeout", type=float, default=TIMEOUT, metavar="S", help="without a line (%(default)s)")
    add("--no-downloads", action="store_true", help="do not ask for the packages' sizes")
    args = parser.parse_intermixed_args(argv)
    if args.top_k < 1:
        parser.error("--top-k must be 1 or more")
    if not 0 < args.timeout <= threading.TIMEOUT_MAX:
        parser.error("--timeout must be more than 0 seconds")
    if bool(args.docs) != bool(args.questions):
        parser.error("--docs and --questions go together; without both the built-in ones are taken")
    if "" in args.script or "" in (args.docs or []):
        parser.error("a script and --docs need a path")
    return args


def notice(text: str) -> None:
    """Say something on stderr; stdout is for what was found."""
    print(printable(text), file=sys.stderr, flush=True)


def check_report(file: Path) -> None:
    """Raise Failure where the report can't be written, before anything runs."""
    try:
        if file.is_dir():
            raise IsADirectoryError("it is a folder")
        with tempfile.NamedTemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        raise Failure(f"--report: {file} can't be written: {error}") from error


def prepare(args: argparse.Namespace, folder: Path) -> tuple[list[Question], list[str]]:
    """Read the questions and list the documents; the built-in ones are written into `folder`."""
    if args.docs:
        documents = find_documents(args.docs)
        return read_questions(args.questions, documents), documents
    (folder / "built-in").mkdir()
    for name, text in DOCUMENTS.items():
        (folder / "built-in" / name).write_text(text + "\n", "utf-8")
    args.docs = [str(folder / "built-in")]
    questions = [
        Question(question=text, relevant=[label] if label else [], answer=answer)
        for text, label, answer in QUESTIONS
    ]
    return questions, find_documents(args.docs)


def run_all(
    scripts: list[Script],
    questions: list[Question],
    folder: Path,
    trace: Trace | None,
    args: argparse.Namespace,
) -> None:
    """Run one script after the other, with a bar for each on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console, asked = Console(stderr=True), [question.question for question in questions]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal
    ) as progress:
        bars = [progress.add_task(short(s.name), total=len(asked), start=False) for s in scripts]
        for place, (script, bar) in enumerate(zip(scripts, bars, strict=True)):
            progress.start_task(bar)

            def keep(record: Record, script: Script = script, bar: Any = bar) -> None:
                for passage in record.sources:  # the temporary folder is another in each run
                    passage.source = passage.source.removeprefix(f"{folder}{os.sep}")
                script.records.append(record)
                progress.advance(bar)
                if trace:
                    trace.keep(script, record)

            run_script(script, asked, folder / f"index-{place}", args, keep)
            progress.stop_task(bar)
            if script.records and not args.no_downloads:
                script.download = download_megabytes(script.path)


def compare(args: argparse.Namespace) -> int:
    """Run the scripts, and show what came of it. Returns the exit code."""
    scripts, prices = find_scripts(args.script), read_prices(args.prices)
    if not shutil.which("uv"):
        raise Failure("uv is not found: pip install uv")
    if args.report:
        check_report(args.report)
    code = 0
    with tempfile.TemporaryDirectory(
        prefix="rag-compare-", ignore_cleanup_errors=True
    ) as temporary:
        folder = Path(temporary)
        asked: dict[str, Any] = {"docs": args.docs or ["built-in"], "top_k": args.top_k}
        questions, documents = prepare(args, folder)
        asked |= {"retrieve_only": args.retrieve_only}
        trace = None
        if args.trace:
            asked["digest"] = digest(questions, documents, args.docs)
            asked["questions"] = [question.model_dump() for question in questions]
            trace = Trace(args.trace, asked, scripts)
        try:
            run_all(scripts, questions, folder, trace, args)
        except KeyboardInterrupt:
            code = 130
        ran = [script for script in scripts if script.records]
        for script in ran:
            script.figures = work_out(script, questions, prices, args.retrieve_only)
        changes = None
        if trace:
            trace.save()
            changes = changes_since(trace.earlier, ran) if trace.earlier else None
    views = side_by_side(ran, questions) if ran else []
    if args.report:
        write_report(args.report, ran, views, changes, scripts, args)
    output(scripts, ran, questions, views, changes, asked, args)
    failed = any(s.status == "failed" or any(r.error for r in s.records) for s in scripts)
    return code or (1 if failed else 0 if ran else 2)


def output(
    scripts: list[Script],
    ran: list[Script],
    questions: list[Question],
    views: list[dict[str, Any]],
    changes: dict[str, Any] | None,
    asked: dict[str, Any],
    args: argparse.Namespace,
) -> None:
    """Print one JSON object, or the tables."""
    from rich.console import Console

    if args.json:
        told = [
            {"name": s.name, "status": s.status, "reason": s.reason, "figures": s.figures}
            | {"records": [record.model_dump() for record in s.records]}
            for s in scripts
        ]
        overlap = {"names": [script.name for script in ran], "overlap": agreement(ran)}
        whole = {"asked": asked, "questions": [q.model_dump() for q in questions], "scripts": told}
        print(json.dumps(whole | {"agreement": overlap, "changes": changes}))
        return
    console = Console()
    with console.capture() as captured:  # printed by ourselves: rich ends us on a broken pipe
        show(console, ran, views, changes, scripts, args.top_k)
    print(captured.get(), end="", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Compare. Returns the exit code."""
    args = parse_arguments(argv)
    for name in (
        "SIGTERM",
        "SIGHUP",
    ):  # the scripts' groups would outlive us: end them as Ctrl-C does
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) == signal.SIG_DFL:
            signal.signal(getattr(signal, name), signal.default_int_handler)
    try:
        return compare(args)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Failure, OSError) as error:
        notice(f"error: {one_line(error)}")
        return 2


# --- the page -------------------------------------------------------------------------------------

PAGE = r"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>RAG scripts side by side</title>
<link rel="icon" href="data:,">
<style>
/* Each colour is given twice, light and dark: color-scheme says which of the two counts. */
:root {
  color-scheme: light dark;
  --page: light-dark(#f7f6f3, #16181c); --card: light-dark(#ffffff, #1f2228);
  --text: light-dark(#1e2227, #e6e7ea); --muted: light-dark(#565d66, #a8b0ba);
  --line: light-dark(#dcdad4, #353a43); --mark: light-dark(#fbe9b7, #4d4015);
  --bad: light-dark(#a1242b, #ff9d9d);
}
* { box-sizing: border-box; }
body {
  max-width: 78rem; margin: 0 auto; padding: 1rem; background: var(--page); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere;
}
h1 { margin: .4rem 0; font-size: 1.6rem; }
h2 { margin: 2.5rem 0 .6rem; font-size: 1.25rem; }
h3 { margin: 2rem 0 .6rem; font-size: 1.05rem; }
h4 { margin: 0 0 .4rem; font-size: .9rem; }
.muted { color: var(--muted); font-size: .9rem; }
.bad { color: var(--bad); }
.scroll { overflow-x: auto; } /* a wide table scrolls, not the page */
table { border-collapse: collapse; font-size: .9rem; overflow-wrap: normal; background: var(--card); }
th, td { padding: .35rem .7rem; border: 1px solid var(--line); text-align: right; }
thead th { min-width: 7rem; max-width: 14rem; overflow-wrap: anywhere; vertical-align: bottom; }
tbody th { text-align: left; font-weight: normal; }
.plots { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); }
.answers { display: grid; gap: .7rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 1fr)); }
figure, article { margin: 0; padding: .9rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .5rem; }
figure svg { display: block; width: 100%; height: auto; max-width: 34rem; color: var(--text); }
figcaption p, article p { margin: .2rem 0 .6rem; }
.said { white-space: pre-wrap; }
ol { margin: .6rem 0 0; padding: 0; list-style: none; font-size: .85rem; }
li { margin-top: .4rem; padding: .35rem .5rem; border-left: 3px solid var(--line); }
li.differs { border-left-color: currentColor; background: var(--mark); }
summary { cursor: pointer; }
.passage { white-space: pre-wrap; }
</style>
</head>
<body>
<header>
<h1>RAG scripts side by side</h1>
<p class="muted">{{ views|length }} questions, {{ top_k }} passages each. Made {{ made }}.</p>
</header>
<main>
{% if troubles %}
<h2>What did not work</h2>
<ul>
{% for line in troubles %}
<li class="bad">{{ line }}</li>
{% endfor %}
</ul>
{% endif %}
<h2>Figures</h2>
{% if names %}
<div class="scroll" tabindex="0" role="region" aria-label="Figures">
<table>
<thead><tr><th scope="col">Figure</th>{% for name in names %}<th scope="col">{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for label, cells in rows %}
<tr><th scope="row">{{ label }}</th>{% for text in cells %}<td>{{ text }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table>
</div>
<p class="muted">In brackets: 95 % intervals of the mean over questions. "-": not known.
{% if unknown %}Not known of any script: {{ unknown|join(", ") }}.{% endif %}</p>
{% else %}
<p>No script could run.</p>
{% endif %}
{% if plots %}
<h2>Plots</h2>
<div class="plots">
{% for plot in plots %}
<figure role="group" aria-label="{{ plot.title }}">
<figcaption><strong>{{ plot.title }}</strong><p class="muted">{{ plot.caption }}</p></figcaption>
{{ plot.svg }}
</figure>
{% endfor %}
</div>
{% endif %}
{% if missing %}
<p class="muted">Left out, for no script has the figures: {{ missing|join(", ") }}.</p>
{% endif %}
{% if names|length > 1 %}
<h2>Overlap of the retrieved passages</h2>
<p class="muted">1: the same text was retrieved for every question; 0: nothing in common.</p>
<div class="scroll" tabindex="0" role="region" aria-label="Overlap">
<table>
<thead><tr><th scope="col">Script</th>{% for name in names %}<th scope="col">{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in agreement %}
<tr><th scope="row">{{ names[loop.index0] }}</th>{% for value in row %}<td>{{ value|number }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table>
</div>
{% endif %}
{% if changes %}
<h2>Since {{ changes[0] }}Z</h2>
<ul>
{% for line in changes[1:] %}
<li>{{ line }}</li>
{% endfor %}
</ul>
{% endif %}
<h2>Answers</h2>
<p class="muted">The questions on which the scripts differ most come first.
{% if names|length > 1 %}A passage is marked "not all have this" where another script did not
retrieve its text.{% endif %}</p>
{% for view in views %}
<section>
<h3>{{ view.question }}</h3>
<p class="muted">
{% if view.relevant %}Relevant: {{ view.relevant|join(", ") }}. {% endif %}
{% if view.relevant == [] %}No document answers it. {% endif %}
{% if view.answer %}Expected: {{ view.answer }}.{% endif %}
</p>
<div class="answers">
{% for answer in view.answers %}
<article>
<h4>{{ answer.name }}</h4>
{% if answer.error %}<p class="bad">Error: {{ answer.error }}</p>{% endif %}
{% if answer.answer %}<p class="said">{{ answer.answer }}</p>{% endif %}
<ol>
{% for passage in answer.passages %}
<li{% if passage.differs %} class="differs"{% endif %}>
<details><summary>{{ loop.index }}. {{ passage.source }}{% if passage.page %}, p. {{ passage.page }}{% endif %},
{{ passage.score|number }}{% if passage.differs %} <strong>not all have this</strong>{% endif %}</summary>
<p class="passage">{{ passage.text }}</p></details>
</li>
{% endfor %}
</ol>
</article>
{% endfor %}
</div>
</section>
{% endfor %}
</main>
</body>
</html>
"""


if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal or a pipe without all of Unicode
    sys.exit(main())
