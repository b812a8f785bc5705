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

    uv run rag_compare.py                                     # whatever can run here, built-in set
    uv run rag_compare.py --docs notes/ --questions questions.jsonl
    uv run rag_compare.py rag_chroma_claude.py my_variant.py --report report.html

A line of the questions' file: {"question": "...", "relevant": ["file.md"], "answer": "..."}. The
last two may be left out; "relevant": [] says that no document answers it, so a refusal is right.
Any script takes part whose command line and JSON are the collection's; an argument may hold options
for it: "rag_local_ollama.py --llm embedded". The first question is asked while a script indexes the
documents, the others in a second process on the kept index: its start is the warm start. --trace
keeps what the scripts print, and compares with the newest run of the same questions and documents.

"-": not known. First download: the packages for this machine, without what a script fetches from
elsewhere (Ollama's models). Cost: the LLM's tokens, without those of embeddings; asking hosted
LLMs costs money here too (--retrieve-only asks none). This file's own packages are 48 MB.
Exit code 0: compared; a script that can't run here (its code was 2: no key...) is a line that says
why. 1: a script failed, or some question. 2: no script could run, or something of yours is to be
mended. 130: Ctrl-C, after showing what was measured.
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
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import tomllib
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

TOP_K = 4  # as in the scripts
TIMEOUT = 300  # seconds without a line; a first start may download gigabytes
GRACE = 5  # seconds that a script has to end itself
MAX_LINE = 10_000_000  # characters of a line that are read: a record has some thousands
# Bytes of questions on one command line. Systems take 32 kB (Windows) to 2 MB with the environment.
MAX_ARGUMENTS = 20_000 if os.name == "nt" else 200_000
MAX_QUESTION = 4_000  # characters: the scripts refuse longer ones
SHOWN = 20  # questions, and changes, on a terminal
MIN_CHUNKS = 100  # with fewer, the time of indexing is that of imports
RESAMPLES = 2_000  # of the bootstrap: the ends of an interval are then good to two digits
PRICES_OF = "2026-11-21"  # list prices, USD for a million tokens, in and out
Prices = dict[str, tuple[float, float]]
PRICES: Prices = {"gpt-4o": (2.50, 10.00), "claude-sonnet-4-6": (3.00, 15.00)}

DOCUMENTS = {
    "press.md": "The cider press of Quillmere Orchard was built by Edda Thornquist in 1911. It "
    "squeezes 640 litres in a day. Its seal has the part number QM-4471-B.",
    "old-press.md": "An older press, of elm, stands in the barn. It squeezed 200 litres in a day; "
    "nobody knows who built it. Its seal was of leather and had no part number.",
    "bees.md": "Forty hives stand between the rows from April to July. Joost Varley looks after "
    "them and is paid in honey. A hive that swarms is moved to the quarry meadow.",
    "frost.md": "Below minus 2 degrees the blossom dies. A horn then sounds three times, and all "
    "light the stoves between the trees. There are 85 stoves, each with 9 litres of oil.",
    "shop.md": "The shop opens on Friday and Saturday from 10 to 16. A bottle of cider costs 7 "
    "crowns. The deposit of 1 crown is paid back. Cards are not taken.",
    "varieties.md": "Most trees are Quillmere Russet, which keeps until March. Silver Anna goes "
    "soft in a week and is eaten at once. The perry pears were grubbed up in 1987.",
}
QUESTIONS = [  # with the document that answers it, and the answer
    ("Who built the cider press of Quillmere Orchard?", "press.md", "Edda Thornquist"),
    ("How many litres does the cider press squeeze in a day?", "press.md", "640"),
    ("What is QM-4471-B?", "press.md", "seal"),
    ("What wood is the old press made of?", "old-press.md", "elm"),
    ("Who looks after the hives?", "bees.md", "Joost Varley"),
    ("Where is a hive moved that swarms?", "bees.md", "quarry meadow"),
    ("How many stoves are there between the trees?", "frost.md", "85"),
    ("How are the workers warned on a cold night?", "frost.md", "horn"),  # in other words
    ("What does a bottle of cider cost?", "shop.md", "7 crowns"),
    ("Which apple can be stored through the winter?", "varieties.md", "Quillmere Russet"),
    ("What is the surname of the orchard's lawyer?", None, None),  # nothing tells
    ("Which football club does the village support?", None, None),
]
COLORS = ["#2f7fc1", "#d9822b", "#3d9a5f", "#b55aa8", "#b8960c", "#c8504b"]  # on light and dark
HATCHES = ["", "//", ".."]  # told apart without colours too


class Failure(Exception):
    """What the user can mend: one line that says what is wrong and what to type, exit code 2."""


class Trouble(Exception):
    """What is wrong with a script that was run: it hangs, or prints something else."""


Number = Annotated[float, Field(ge=0, allow_inf_nan=False)]
LATER = ConfigDict(defer_build=True)  # until a record comes: --help need not wait


class Question(BaseModel):
    """A line of the questions' file. `relevant`: file names; empty: no document answers it."""

    model_config = ConfigDict(extra="forbid", strict=True, defer_build=True)
    question: str
    relevant: list[str] | None = None
    answer: str | None = None


class Source(BaseModel):
    """A passage that a script retrieved."""

    model_config = LATER
    source: str
    text: str
    page: int | None = None
    score: Annotated[float, Field(allow_inf_nan=False)] | None = None


class Usage(BaseModel):
    """What the LLM's service counted."""

    model_config = LATER
    input_tokens: int = Field(ge=0, le=10**12)
    output_tokens: int = Field(ge=0, le=10**12)


class Seconds(BaseModel):
    """How long each stage took; `first_token` counts from the start of `generate`."""

    model_config = LATER
    load: Number | None = None
    index: Number | None = None
    retrieve: Number | None = None
    first_token: Number | None = None
    generate: Number | None = None


class Record(BaseModel):
    """What a script prints of a question with --json."""

    model_config = LATER
    question: str
    answer: str | None
    refused: bool
    error: str | None
    sources: list[Source]
    seconds: Seconds
    model: str | None = None
    embed_model: str | None = None
    usage: Usage | None = None


class EarlierScript(BaseModel):
    """What run.json tells of a script."""

    model_config = LATER
    name: str
    file: str
    status: str
    figures: dict[str, dict[str, float] | float | str | None]


class EarlierRun(BaseModel):
    """What run.json tells."""

    model_config = LATER
    started: str
    digest: str
    retrieve_only: bool
    scripts: list[EarlierScript]


@dataclass
class Script:
    """A script, named as it was typed, and what was measured of it."""

    name: str
    path: Path
    file: str  # its records, in a folder of --trace
    options: list[str] = field(default_factory=list)
    status: str = "not run"  # then ok, unable (can't run here), failed
    reason: str | None = None
    records: list[Record] = field(default_factory=list)
    first_answer: float | None = None  # seconds from a start on a kept index to its first record
    opening: float | None = None  # what seconds.index is on a kept index: loading, not indexing
    chunks: int | None = None
    download: float | None = None  # MB
    figures: dict[str, Any] = field(default_factory=dict)


# --- what is asked --------------------------------------------------------------------------------


def find_scripts(typed: list[str]) -> list[Script]:
    """Read the arguments that name scripts, or else take the rag_*.py beside this file."""
    own, scripts = Path(__file__).resolve(), []
    beside = [str(path) for path in sorted(own.parent.glob("rag_*.py")) if path != own]
    for number, name in enumerate(dict.fromkeys(typed or beside), 1):
        try:
            path, *options = [name] if Path(name).is_file() else shlex.split(name)
        except ValueError as error:  # nothing in it, or an open quote
            raise Failure(f"{name!r} is no script with options: {error}") from error
        if not Path(path).is_file():
            raise Failure(f"no such script: {path}")
        file = re.sub("[^A-Za-z0-9]+", "-", f"{number} {short(name)}")[:60] + ".jsonl"
        scripts.append(Script(name if typed else Path(name).name, Path(path), file, options))
    if not scripts:
        raise Failure("no rag_*.py stands beside this file: name scripts to compare")
    return scripts


def read_questions(file: Path, documents: list[str]) -> list[Question]:
    """Read JSON Lines. Raises Failure, with the number of the line, for what is no question."""
    questions, named_so = [], dict[str, list[str]]()
    for document in documents:
        named_so.setdefault(Path(document).name, []).append(document)
    try:
        lines = file.read_text("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise Failure(f"the questions can't be read: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            question = Question.model_validate_json(line)
            if not question.question.strip() or "\0" in question.question:
                raise ValueError('"question" is empty, or holds a null character')
            if len(question.question) > MAX_QUESTION:
                raise ValueError(f'"question" has more than {MAX_QUESTION} characters')
            if question.answer is not None and not normalize(question.answer):
                raise ValueError('"answer" has neither a letter nor a digit')
            if question.relevant == [] and question.answer is not None:
                raise ValueError('"relevant": [] says that there is no "answer"')
            labels: dict[str, str] = {}  # by document: one that is named twice counts once
            for label in question.relevant or []:
                named = [d for d in named_so.get(Path(label).name, []) if matches(label, d)]
                if len(named) != 1:
                    several = f"{len(named)} documents: write more of its path"
                    what = several if named else "no document under --docs"
                    raise ValueError(f'"relevant": {label!r} names {what}')
                labels.setdefault(named[0], label)
            if question.relevant:
                question.relevant = list(labels.values())
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


def read_prices(file: Path | None) -> Prices:
    """Read {"model": [in, out]}, USD a million tokens, which go before the built-in prices."""
    try:
        given = file.read_text("utf-8") if file else "{}"
        return PRICES | TypeAdapter(dict[str, tuple[Number, Number]]).validate_json(given)
    except (OSError, ValueError) as error:
        hint = 'it holds {"model": [USD a million tokens in, out]}'
        fault = first_fault(error) if isinstance(error, ValueError) else error
        raise Failure(f"the prices in {file} can't be read, {hint} ({fault})") from error


# --- running the scripts --------------------------------------------------------------------------


def lines_of(command: list[str], timeout: float) -> Generator[tuple[str, str]]:
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
    said = cut(errors[-1].removeprefix("error: "), 300) if errors else ""
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
    batch, size = quoted[:1], MAX_ARGUMENTS
    for question in quoted[1:]:
        size += len(question.encode())
        if size > MAX_ARGUMENTS:
            yield batch
            batch, size = [], len(question.encode())
        batch.append(question)
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
    command = ["uv", "run", str(script.path), "--json", *options, *script.options, *questions]
    errors, verdict, answered, start = [], ("failed", None), 0, time.perf_counter()
    second, failed = len(script.records) == 1, False
    with contextlib.closing(lines_of(command, timeout)) as lines:
        for name, line in lines:
            if name == "stderr":
                errors = [*errors, line][-20:] if line.strip() else errors
                if found := re.search(r"index: (\d{1,12}) chunks", line):
                    script.chunks = int(found[1])
                continue
            if name == "exit":
                verdict = judge(int(line), errors)
                continue
            place = f"line {answered + 1} of its output"
            try:
                record = Record.model_validate_json(line)
            except ValidationError as error:
                raise Trouble(
                    f"{place} is no record: {cut(line, 80)} ({first_fault(error)})"
                ) from error
            if answered == len(questions):
                raise Trouble(f"{place} is an answer more than there were questions")
            if record.question.strip() != questions[answered].strip():
                text = cut(record.question, 80)
                raise Trouble(f"{place} answers {text!r}, which was not the next question")
            if not answered and second:
                script.first_answer = time.perf_counter() - start
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
    told, errors = "", []
    command = ["uv", "run", str(script.path), *script.options, "--help"]
    try:
        with contextlib.closing(lines_of(command, args.timeout)) as lines:
            for name, line in lines:
                told += line if name == "stdout" else ""
                errors += [line] if name == "stderr" and line.strip() else []
                code = int(line) if name == "exit" else 0
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
                if script.status == "unable" and script.records:
                    script.status = "failed"  # it could run here, and gave up
            docs = []
    except BaseException as error:
        script.status, script.reason = "failed", str(error) or "was interrupted"
        if not isinstance(error, Trouble):
            raise


async def sizes_of(urls: list[str]) -> list[int]:
    """Ask how many bytes each URL has, by HEAD requests. Raises httpx.HTTPError, KeyError."""
    import httpx

    async with httpx.AsyncClient(follow_redirects=True, timeout=30) as client:

        async def size(url: str) -> int:
            response = await client.head(url)
            return int(response.raise_for_status().headers["Content-Length"])

        return await asyncio.gather(*map(size, urls))


@functools.cache  # several variants may be of one script
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
    """Drop case, punctuation and articles as SQuAD's evaluation does, and citations.

    Of a script that has no blanks between words, each character is a word.
    """
    text = re.sub(r"\[\d+\??\]", " ", text.lower())
    text = re.sub(r"[^\w\s]|_", " ", text)  # a blank: "1911-14" holds 1911
    text = re.sub("([\u3040-\u30ff\u3400-\u9fff\u0e00-\u0e7f])", r" \1 ", text)  # Han, kana, Thai
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def contains(answer: str | None, expected: str) -> float:
    """1 if an answer holds the expected one as whole words, else 0."""
    return float(f" {normalize(expected)} " in f" {normalize(answer or '')} ")


def shingles(texts: list[str]) -> set[tuple[str, ...]]:
    """All runs of five words (Broder, 1997): texts that are cut otherwise share them."""
    lists = [re.findall(r"\w+", text.lower()) for text in texts]
    return {tuple(words[n : n + 5]) for words in lists for n in range(max(1, len(words) - 4))}


def jaccard(one: set[Any], other: set[Any]) -> float:
    """Size of the intersection / size of the union; 1 for two empty sets."""
    return len(one & other) / len(one | other) if one or other else 1.0


def lookups(records: list[Record]) -> list[float | None]:
    """Seconds of retrieval, a question each, of the process on the kept index.

    A script that looks all questions up at once gives each record the time of all: the same number
    to the last digit, which is then shared among them. (A rounded one may be the same by chance.)
    """
    times = [record.seconds.retrieve for record in records[1:]]
    if len(times) > 2 and times[0] and len(set(times)) == 1 and times[0] != round(times[0], 4):
        return [times[0] / len(times)] * len(times)
    return times


def total(*parts: float | None) -> float | None:
    """The sum, if all of it is known."""
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None


def middle(values: list[float | None], share: float = 50, unit: float = 1) -> float | None:
    """A percentile of the values that are known, the median, times `unit`."""
    import numpy as np

    known = [value for value in values if value is not None]
    return float(np.percentile(known, share)) * unit if known else None


def mean(values: list[float | None]) -> float | None:
    """The mean of the values that are known."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def cost(record: Record, prices: Prices) -> float | None:
    """USD for what the LLM read and wrote."""
    if not record.usage or record.model not in prices:
        return None
    read, written = prices[record.model]
    return (record.usage.input_tokens * read + record.usage.output_tokens * written) / 1e6


def indexing_rate(script: Script) -> float | None:
    """Chunks a second; None where it can't be told from loading.

    seconds.index of a kept index is loading alone; with few chunks the imports take the most.
    """
    if script.opening is None or not script.chunks or script.chunks < MIN_CHUNKS:
        return None
    spent = (script.records[0].seconds.index or 0.0) - script.opening
    return script.chunks / spent if spent > script.opening else None


def work_out(
    script: Script, questions: list[Question], prices: Prices, retrieve_only: bool
) -> dict[str, Any]:
    """Work out a script's figures, by name. None: not known. Shares are 0 to 1."""
    from pygount import SourceAnalysis

    records = script.records
    pairs = list(zip(questions, records, strict=False))
    # The first record of a process has the time of imports and of connecting in it.
    settled = list(zip(lookups(records), records[1:], strict=True))[1:]
    found = [search for search, _ in settled]
    timed = [(s, r.seconds.first_token, r.seconds.generate) for s, r in settled if r.answer]
    spent = middle([(s or 0) + (r.seconds.generate or 0) for s, r in settled if not r.error])
    whole = [total(search, generate) for search, _, generate in timed]
    asked = [] if retrieve_only else records  # of an LLM
    used = [r.usage for r in records if r.usage]
    # A refusal that asked no LLM cost nothing.
    priced = [
        0.0 if used and record.refused and not record.usage else cost(record, prices)
        for record in records
        if not record.error
    ]
    ranked = [(rank_documents(r.sources, q.relevant), q.relevant) for q, r in pairs if q.relevant]
    said = [] if retrieve_only else [(q, r) for q, r in pairs if not r.error]
    expected = [] if retrieve_only else [(q.answer, r.answer) for q, r in pairs if q.answer]
    usd = mean(priced) if None not in priced else None
    warm_start = total(script.first_answer, -spent) if spent is not None else None
    source = SourceAnalysis.from_file(str(script.path), "compare")
    return {
        "hit_at_k": interval([hit(*each) for each in ranked]),
        "mrr_at_10": interval([reciprocal_rank(*each) for each in ranked]),
        "ndcg_at_10": interval([ndcg(*each) for each in ranked]),
        "contains_expected": interval([contains(text, wanted) for wanted, text in expected]),
        "refused_unanswerable": mean([r.refused for q, r in said if q.relevant == []]),
        "refused_answerable": mean([r.refused for q, r in said if q.relevant]),
        "retrieve_ms_p50": middle(found, 50, 1_000),
        "retrieve_ms_p95": middle(found, 95, 1_000),
        "first_token_s_p50": middle([total(search, first) for search, first, _ in timed]),
        "answer_s_p50": middle(whole),
        "answer_s_p95": middle(whole, 95),
        "retrieve_s": mean(found),
        "wait_s": mean([first for _, first, _ in timed]),
        "rest_s": mean([total(whole, -(first or 0.0)) for _, first, whole in timed]),
        "input_tokens": mean([usage.input_tokens for usage in used]),
        "output_tokens": mean([usage.output_tokens for usage in used]),
        "usd_per_1000": usd and usd * 1_000,
        "chunks": script.chunks,
        "chunks_per_s": indexing_rate(script),
        "warm_start_s": warm_start if warm_start and warm_start > 0 else None,
        "llm": ", ".join(sorted({r.model for r in asked if r.model})) or None,
        "embedder": ", ".join(sorted({r.embed_model for r in records if r.embed_model})) or None,
        "download_mb": script.download,
        "lines_of_code": source.source_count if source.is_countable else None,
        "answered": sum(record.error is None for record in records),
        "errors": sum(record.error is not None for record in records),
    }


ROWS = {  # the rows of the table, with the figures in their cells
    "hit@k": ["hit_at_k"],
    "MRR@10": ["mrr_at_10"],
    "nDCG@10": ["ndcg_at_10"],
    "expected in answer": ["contains_expected"],
    "unanswerable: refused": ["refused_unanswerable"],
    "answerable: refused": ["refused_answerable"],
    "retrieve ms, p50 / p95": ["retrieve_ms_p50", "retrieve_ms_p95"],
    "first token s, p50": ["first_token_s_p50"],
    "answer s, p50 / p95": ["answer_s_p50", "answer_s_p95"],
    "tokens in / out, a call": ["input_tokens", "output_tokens"],
    "USD / 1,000 questions": ["usd_per_1000"],
    "indexing chunks/s": ["chunks_per_s"],
    "chunks": ["chunks"],
    "warm start s": ["warm_start_s"],
    "first download MB": ["download_mb"],
    "lines of code": ["lines_of_code"],
    "answered / errors": ["answered", "errors"],
    "LLM": ["llm"],
    "embedder": ["embedder"],
}
TIMES = re.compile(".*_(s|ms)(_p50|_p95)?")  # figures that differ from run to run


def number(value: Any) -> str:
    """Write a figure: three digits, an interval in brackets, "-" where it is not known."""
    if isinstance(value, dict):
        return f"{value['mean']:.2f} ({value['low']:.2f}-{value['high']:.2f})"
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if value >= 100 or isinstance(value, int) else f"{value:.3g}"


def agreement(scripts: list[Script]) -> list[list[float | None]]:
    """Mean Jaccard overlap of what each two scripts retrieved, over the questions both have."""
    found = [[shingles([p.text for p in r.sources]) for r in s.records] for s in scripts]
    return [
        [mean([jaccard(*pair) for pair in zip(one, other, strict=False)]) for other in found]
        for one in found
    ]


def side_by_side(scripts: list[Script], questions: list[Question]) -> list[dict[str, Any]]:
    """For each question the answers, and of each passage whether all others retrieved it too.

    Another script retrieved a passage if half of its shingles stand in what that one retrieved.
    The questions on which the scripts differ most come first.
    """
    views = []
    for place, question in enumerate(questions):
        asked = [(short(s.name), s.records[place]) for s in scripts if place < len(s.records)]
        found = [shingles([passage.text for passage in r.sources]) for _, r in asked]
        answers = []
        for name, record in asked:
            answer: dict[str, Any] = record.model_dump() | {"name": name}
            for passage in answer["sources"]:
                own = shingles([passage["text"]])
                passage["differs"] = any(len(own & other) < len(own) / 2 for other in found)
            answers.append(answer)
        overlap = mean([jaccard(*pair) for pair in itertools.combinations(found, 2)])
        split = len({record.refused for _, record in asked}) > 1
        differs = split or any(p["differs"] for a in answers for p in a["sources"])
        differs |= len({record.answer for _, record in asked}) > 1 or len(asked) == 1
        order = {"differs": differs, "order": (1.0 if overlap is None else overlap) - split}
        views.append(question.model_dump() | {"answers": answers} | order)
    return sorted(views, key=lambda view: view["order"])


class Report:
    """What came of a run, as it is shown on the terminal, on the page and in the JSON."""

    def __init__(
        self,
        scripts: list[Script],
        questions: list[Question],
        prices: Prices,
        args: argparse.Namespace,
        earlier: Path | None,
    ) -> None:
        self.ran = [script for script in scripts if script.records]
        for script in self.ran:
            script.figures = work_out(script, questions, prices, args.retrieve_only)
        self.names = [short(script.name) for script in self.ran]
        self.rows: list[tuple[str, list[str]]] = []
        unknown = []
        for label, keys in ROWS.items():
            cells = [" / ".join(number(s.figures[key]) for key in keys) for s in self.ran]
            cells = ["-" if set(text) <= set("- /") else text for text in cells]
            if set(cells) <= {"-"}:
                unknown.append(label)
            else:
                self.rows.append((label, cells))
        self.overlap = agreement(self.ran)
        self.views = side_by_side(self.ran, questions) if self.ran else []
        self.troubles = tell_troubles(scripts)
        self.changes = changes_since(earlier, self.ran) if earlier else None
        self.told_changes = tell_changes(self.changes) if self.changes else []
        labelled = sum(bool(question.relevant) for question in questions)
        unanswerable = sum(question.relevant == [] for question in questions)
        self.notes = [
            f"{len(questions)} questions, {labelled} with the documents that answer them and "
            f"{unanswerable} that none answers; {args.top_k} passages a question; in brackets "
            "95 % intervals."
        ]
        if any(script.figures["usd_per_1000"] for script in self.ran):
            self.notes.append(f"Built-in prices are of {PRICES_OF}.")
        if unknown and not args.retrieve_only:
            self.notes.append(f"Not known of any: {'; '.join(unknown)}.")


# --- earlier runs ---------------------------------------------------------------------------------


def digest(questions: list[Question], documents: list[str]) -> str:
    """A digest of the questions and of the documents' contents: what two runs must share."""
    made = hashlib.sha256(json.dumps([question.model_dump() for question in questions]).encode())
    for document in documents:
        made.update(Path(document).name.encode(errors="replace"))
        made.update(hashlib.sha256(Path(document).read_bytes()).digest())
    return made.hexdigest()


def summary(script: Script) -> dict[str, Any]:
    """What --json and --trace tell of a script, besides its records."""
    keys = ("name", "file", "status", "reason", "figures")
    return {key: getattr(script, key) for key in keys}


def save_run(folder: Path, asked: dict[str, Any], scripts: list[Script]) -> None:
    """Write run.json: what was asked, and what was measured until now. Raises OSError."""
    run = asked | {"scripts": [summary(script) for script in scripts]}
    (folder / "run.json").write_text(json.dumps(run, indent=2), "utf-8")


def find_earlier(root: Path, asked: dict[str, Any], scripts: list[Script]) -> Path | None:
    """Find the newest run that --trace has kept of any of the scripts, on the same questions."""
    names = {script.name for script in scripts}
    for file in sorted(root.glob("*/run.json"), reverse=True):
        with contextlib.suppress(OSError, ValueError):  # no run of ours
            run = EarlierRun.model_validate_json(file.read_text("utf-8") if file.is_file() else "")
            same = (run.digest, run.retrieve_only) == (asked["digest"], asked["retrieve_only"])
            if same and any(s.status == "ok" and s.name in names for s in run.scripts):
                return file.parent
    return None


def changes_since(folder: Path, scripts: list[Script]) -> dict[str, Any]:
    """Tell what an earlier run had otherwise: figures, answers, passages.

    Times differ from run to run: those that moved by less than a fifth are left out.
    """
    run = EarlierRun.model_validate_json((folder / "run.json").read_text("utf-8"))
    before, changed = {script.name: script for script in run.scripts}, {}
    for script in scripts:
        old, figures, pairs = before.get(script.name), {}, []
        if not old:
            continue
        # What can't be read, it did not print then: or a stop has cut it.
        with contextlib.suppress(OSError, ValueError):
            lines = (folder / Path(old.file).name).read_text("utf-8").split("\n")
            for line, new in zip(lines, script.records, strict=False):
                pairs.append((Record.model_validate_json(line), new))
        for key, now in script.figures.items():
            was = old.figures.get(key)
            steady = TIMES.fullmatch(key) and was and now and abs(now / was - 1) < 0.2
            if number(was) != number(now) and not steady:
                figures[key] = [was, now]
        passages = [[[(p.source, p.text) for p in r.sources] for r in pair] for pair in pairs]
        changed[script.name] = {
            "figures": figures,
            "answers": [
                {"question": new.question, "before": old.answer, "now": new.answer}
                for old, new in pairs
                if old.answer != new.answer
            ],
            "passages": [
                new.question
                for (_, new), (was, now) in zip(pairs, passages, strict=True)
                if was != now
            ],
        }
    return {"since": run.started, "scripts": changed}


def tell_changes(changes: dict[str, Any]) -> list[str]:
    """Say in lines what changed since an earlier run."""
    lines = []
    for name, changed in changes["scripts"].items():
        lines += [
            f"{name}: {key} {number(a)} -> {number(b)}"
            for key, (a, b) in changed["figures"].items()
        ]
        lines += [
            f"{name}: {c['question']} {c['before']!r} -> {c['now']!r}" for c in changed["answers"]
        ]
        lines += [f"{name}: other passages for: {question}" for question in changed["passages"]]
        if not any(changed.values()):
            lines.append(f"{name}: nothing changed")
    more = len(lines) - SHOWN
    lines = [f"Since {changes['since']}:", *lines[:SHOWN]]
    lines += [f"... and {more:,} more, which --json tells"] if more > 0 else []
    return [textwrap.shorten(printable(line), 400) for line in lines]


# --- what is shown --------------------------------------------------------------------------------


def printable(text: str) -> str:
    """Drop the control characters by which text could drive a terminal (ANSI, bidirectional)."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", "", text)


def one_line(text: object) -> str:
    """Fold white space: a file's name may have line breaks."""
    return " ".join(str(text).split())


def cut(text: str, size: int) -> str:
    """What a line on a terminal has room for."""
    return textwrap.shorten(one_line(printable(text)), size)


def short(name: str) -> str:
    """A script's name for the head of a column: without folder, rag_ and .py."""
    path, blank, options = name.partition(" ")
    return Path(path).stem.removeprefix("rag_") + blank + options


def tell_troubles(scripts: list[Script]) -> list[str]:
    """Say in lines which scripts did not do all that was asked, and why."""
    lines = []
    for script in scripts:
        what = {"unable": "can't run here", "failed": "failed"}.get(script.status, script.status)
        if script.status != "ok":
            lines.append(f"{script.name} {what}: {script.reason or 'it was not its turn'}")
        errors = [record.error for record in script.records if record.error]
        if errors:
            lines.append(f"{script.name}: {len(errors)} questions failed, the first: {errors[0]}")
    return [cut(line, 400) for line in lines]


def show(report: Report, console: Any) -> None:
    """Print the tables, and the questions on which the scripts differ most."""
    from rich import box
    from rich.columns import Columns
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    heads = report.names
    fitting = max(1, (console.width - 26) // 17)  # columns beside the labels
    parts = -(-len(heads) // fitting)
    fitting = -(-len(heads) // max(1, parts))  # as many in each table
    for start in range(0, len(heads), fitting or 1):
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column(no_wrap=True)
        for head in heads[start : start + fitting]:
            title = Text(head.replace("_", "_\n"))
            table.add_column(title, justify="right", max_width=15, overflow="fold")
        for label, cells in report.rows:
            shown = [Text(text.replace(" (", "\n(")) for text in cells[start:][:fitting]]
            table.add_row(label, *shown)
        console.print(table)
    for line in report.notes + report.troubles + report.told_changes:
        console.print(Text(line))
    if len(heads) > 1:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="overlap of the passages")
        for head in ("", *map(str, range(1, len(heads) + 1))):
            table.add_column(head, justify="right" if head else "left")
        for place, (head, row) in enumerate(zip(heads, report.overlap, strict=True), 1):
            table.add_row(Text(f"{place} {head}"), *map(number, row))
        console.print(table)
    telling = [view for view in report.views if view["differs"]]
    for view in telling[:SHOWN]:
        console.print(Text(f"\n{cut(view['question'], 300)}", style="bold"))
        panels = []
        for answer in view["answers"]:
            said = f"error: {answer['error']}" if answer["error"] else answer["answer"] or ""
            body = Text(f"{cut(said, 300)}\n" if said else "")
            for n, passage in enumerate(answer["sources"], 1):
                score = "-" if passage["score"] is None else f"{passage['score']:.2f}"
                body.append(f"{n}  {score}  {cut(Path(passage['source']).name, 60)}\n")
                if passage["differs"]:
                    body.append(f"not all have: {cut(passage['text'], 90)}\n", style="yellow")
            body.rstrip()
            panels.append(Panel(body, title=Text(answer["name"]), title_align="left"))
        console.print(
            Columns(
                panels,
                width=min(console.width - 2, max(38, console.width // max(1, len(panels)) - 1)),
            )
        )
    if len(report.views) > len(telling):
        same = len(report.views) - len(telling)
        console.print(f"\n{same} questions: the same passages and answers from all.")
    if len(telling) > SHOWN:
        most = "those in which the scripts differ most; all are in --json and --report"
        console.print(f"\n{SHOWN} of {len(telling)} questions are shown, {most}.")


def draw(plot: Callable[[Any], bool], height: float, title: str) -> str | None:
    """Draw a plot as an SVG that takes the page's colour of text. None: there is no data for it."""
    import matplotlib
    from matplotlib.figure import Figure

    ink = "#010203"  # stands for the page's colour
    settings: dict[str, Any] = {"svg.fonttype": "none", "svg.hashsalt": "", "font.size": 11}
    settings |= {"text.parse_math": False, "axes.spines.top": False, "axes.spines.right": False}
    for name in ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"):
        settings[name] = ink
    with matplotlib.rc_context(settings):  # ty: ignore[invalid-argument-type]
        figure, file = Figure(figsize=(4.8, height), layout="constrained"), io.StringIO()
        if not plot(figure.subplots()):
            return None
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = re.sub(r"(?s)<metadata>.*?</metadata>", "", file.getvalue()).replace(ink, "currentColor")
    svg = re.sub(
        r'(id="|url\(#|href="#)', rf"\g<1>{title.replace(' ', '-')}-", svg
    )  # ids are the page's
    return f'<svg role="img" aria-label="{title}" {svg.partition("<svg ")[2]}'


def draw_plots(scripts: list[Script], retrieve_only: bool) -> list[dict[str, str | None]]:
    """Draw what people ask for: quality against time, where time goes, first token, cost."""
    from matplotlib.ticker import LogLocator, NullFormatter

    names = [textwrap.fill(short(script.name), 16) for script in scripts]
    figures, places = [script.figures for script in scripts], range(len(scripts))

    def bars(axes: Any, keys: dict[str, str], unit: str) -> bool:
        left = [0.0] * len(names)
        known = {key: label for key, label in keys.items() if any(f[key] for f in figures)}
        for (key, label), color, hatch in zip(known.items(), COLORS, HATCHES, strict=False):
            row = [figure[key] or 0.0 for figure in figures]
            axes.barh(places, row, left=left, color=color, hatch=hatch, label=label)
            left = [a + b for a, b in zip(left, row, strict=True)]
        for place, total in enumerate(left):
            axes.text(total, place, f"\u2002{number(total or None)}", va="center")
        axes.set_yticks(places, names)
        axes.invert_yaxis()
        axes.margins(x=0.2)
        axes.locator_params(axis="x", nbins=4)
        axes.set_xlabel(unit)
        if len(known) > 1:
            axes.figure.legend(frameon=False, loc="outside lower center", ncols=3)
        return any(left)

    def trade(axes: Any) -> bool:
        key, unit = ("answer_s_p50", "median seconds to the answer")
        if retrieve_only:
            key, unit = ("retrieve_ms_p50", "median milliseconds to the passages")
        points = [p for p in zip(names, figures, strict=True) if p[1][key] and p[1]["ndcg_at_10"]]
        for (name, figure), color, marker in zip(points, COLORS * 9, "osD^vPX" * 9, strict=False):
            score = figure["ndcg_at_10"]
            spread = [[score["mean"] - score["low"]], [score["high"] - score["mean"]]]
            style = {"color": color, "marker": marker, "markersize": 9, "capsize": 4}
            axes.errorbar(figure[key], score["mean"], spread, label=name, linestyle="", **style)
        axes.set_xlabel(unit)
        axes.set_ylabel("nDCG@10")
        axes.set_ylim(top=1.02)
        axes.set_xscale("log")
        axes.margins(x=0.15)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.figure.legend(frameon=False, loc="outside lower center", ncols=2)
        return bool(points)

    stages = {"retrieve_s": "retrieval", "wait_s": "to first token", "rest_s": "answer"}
    first, cost = {"first_token_s_p50": ""}, {"usd_per_1000": ""}
    plots: list[tuple[str, str, Callable[[Any], bool]]] = [
        ("Quality against time", "Higher and further left is better. Bars: 95 % intervals.", trade),
        (
            "Where the time of a question goes",
            "Means. A script that does not stream tells no first token: all of it is answer.",
            lambda axes: bars(axes, stages, "seconds"),
        ),
        ("Time to the first token", "Medians.", lambda axes: bars(axes, first, "seconds")),
        ("Cost of 1,000 questions", "By list prices.", lambda axes: bars(axes, cost, "USD")),
    ]
    height = 1.6 + 0.45 * len(scripts)
    return [
        {"title": title, "caption": caption}
        | {"svg": draw(plot, height + (plot is trade) * 1.5, title)}
        for title, caption, plot in plots
    ]


def write_page(report: Report, file: Path, retrieve_only: bool) -> None:
    """Write the page, whole or not at all. Raises OSError."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["number"] = number
    plots = draw_plots(report.ran, retrieve_only) if report.ran else []
    overlap = zip(report.names, [list(map(number, row)) for row in report.overlap], strict=True)
    page = environment.from_string(PAGE).render(report=report, plots=plots, overlap=overlap)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        new = Path(folder) / "page"
        new.write_text(printable(page), "utf-8")
        new.replace(file)


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
    add("--trace", type=Path, metavar="DIR", help="keep what is printed; compare with earlier runs")
    add("--prices", type=Path, metavar="FILE", help='{"model": [USD a million tokens in, out]}')
    add("--timeout", type=float, default=TIMEOUT, metavar="S", help="without a line (%(default)s)")
    add("--no-downloads", action="store_true", help="do not ask for the packages' sizes")
    args = parser.parse_intermixed_args(argv)
    if args.top_k < 1:
        parser.error("--top-k must be 1 or more")
    if not 0 < args.timeout <= threading.TIMEOUT_MAX:
        parser.error("--timeout takes a number of seconds")
    if bool(args.docs) != bool(args.questions):
        parser.error("--docs and --questions go together; without both the built-in ones are taken")
    if "" in args.script + (args.docs or []):
        parser.error("a script and --docs need a path")
    return args


def check_report(file: Path) -> None:
    """Raise Failure where the report can't be written, before anything runs."""
    try:
        if file.exists() and not file.is_file():
            raise OSError("it is no file")
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
    questions: list[str],
    folder: Path,
    trace: Path | None,
    args: argparse.Namespace,
) -> None:
    """Run one script after the other, with a bar for each on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    bars = Progress(*columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal)
    with bars:
        tasks = [bars.add_task(short(s.name), total=len(questions), start=False) for s in scripts]
        for place, (script, task) in enumerate(zip(scripts, tasks, strict=True)):
            bars.start_task(task)

            def keep(record: Record, script: Script = script, task: Any = task) -> None:
                for passage in record.sources:  # the temporary folder is another in each run
                    passage.source = passage.source.removeprefix(f"{folder}{os.sep}")
                script.records.append(record)
                bars.advance(task)
                if trace:
                    with (trace / script.file).open("a", encoding="utf-8") as file:
                        file.write(record.model_dump_json() + "\n")

            run_script(script, questions, folder / f"index-{place}", args, keep)
            bars.stop_task(task)
            if script.records and not args.no_downloads:
                script.download = download_megabytes(script.path)


def compare(args: argparse.Namespace, folder: Path) -> int:
    """Run the scripts, and tell what came of it. Returns the exit code."""
    from rich.console import Console

    scripts, prices, trace, earlier = (
        find_scripts(args.script),
        read_prices(args.prices),
        None,
        None,
    )
    if not shutil.which("uv"):
        raise Failure("uv is not found: pip install uv")
    if args.report:
        check_report(args.report)
    started = datetime.now(UTC)
    asked: dict[str, Any] = {"started": f"{started:%Y-%m-%d %H:%M:%S} UTC", "top_k": args.top_k}
    asked |= {"retrieve_only": args.retrieve_only, "docs": args.docs or ["built-in"]}
    questions, documents = prepare(args, folder)
    asked |= {"digest": digest(questions, documents)}
    asked |= {"questions": [question.model_dump() for question in questions]}
    if args.trace:
        earlier = find_earlier(args.trace, asked, scripts)
        trace = args.trace / f"{started:%Y%m%dT%H%M%S%fZ}"
        trace.mkdir(parents=True)
        save_run(trace, asked, scripts)
    code = 0
    try:
        run_all(scripts, [question.question for question in questions], folder, trace, args)
    except KeyboardInterrupt:
        code = 130
    except OSError as error:  # no room for --trace: what was measured is shown all the same
        print(f"error: {cut(str(error), 600)}", file=sys.stderr)
        code = 2
    report = Report(scripts, questions, prices, args, earlier)
    try:  # before the tables: whoever reads those may close the pipe
        if args.report:
            write_page(report, args.report, args.retrieve_only)
        if trace:
            save_run(trace, asked, scripts)
    except OSError as error:
        print(f"error: {cut(str(error), 600)}", file=sys.stderr)
        code = code or 2
    if args.json:
        told = [summary(s) | {"records": [r.model_dump() for r in s.records]} for s in scripts]
        overlap = {"names": [s.name for s in report.ran], "overlap": report.overlap}
        found = {"scripts": told, "agreement": overlap, "changes": report.changes}
        print(json.dumps(asked | found), flush=True)
    else:
        console = Console()
        with console.capture() as captured:  # printed by ourselves: rich exits on a broken pipe
            show(report, console)
        print(captured.get(), end="", flush=True)
    failed = any(s.status == "failed" or s.figures.get("errors") for s in scripts)
    return code or (1 if failed else 0 if report.ran else 2)


SIGNALS = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]


def interrupt(*_: Any) -> None:
    """Stop at the first signal, once: the scripts are ended, and what was measured is shown."""
    for name in SIGNALS:
        signal.signal(name, signal.SIG_IGN)
    raise KeyboardInterrupt


def main(argv: list[str] | None = None) -> int:
    """Compare. Returns the exit code."""
    args = parse_arguments(argv)
    for name in SIGNALS:  # else the scripts, in groups of their own, would outlive us
        if signal.getsignal(name) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(name, interrupt)
    try:
        with tempfile.TemporaryDirectory(prefix="rag-", ignore_cleanup_errors=True) as folder:
            return compare(args, Path(folder))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Failure, OSError) as error:
        print(f"error: {cut(str(error), 600)}", file=sys.stderr)
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
table { border-collapse: collapse; font-size: .9rem; overflow-wrap: normal; }
th, td { padding: .35rem .7rem; border: 1px solid var(--line); text-align: right; }
th, td { background: var(--card); white-space: nowrap; }
thead th { max-width: 12rem; white-space: normal; overflow-wrap: anywhere; min-width: 6rem; }
tbody th { position: sticky; left: 0; text-align: left; font-weight: normal; }
.plots, .answers {
  display: grid; gap: .8rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 1fr));
}
.plots { grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
figure, article {
  margin: 0; padding: .9rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .5rem;
}
figure svg { display: block; width: 100%; height: auto; color: var(--text); }
figcaption p, article p { margin: .2rem 0 .6rem; }
.said { white-space: pre-wrap; }
details { margin-top: .4rem; padding: .3rem .5rem; border-left: 3px solid var(--line);
  font-size: .9rem; }
.differs { border-left-color: currentColor; background: var(--mark); }
summary { cursor: pointer; }
</style>
</head>
<body>
<main>
<h1>RAG scripts side by side</h1>
<p class="muted">{{ report.notes|join(" ") }}
"-": not known.</p>
{% if report.troubles %}
<h2>What did not work</h2>
<ul>
{% for line in report.troubles %}
<li class="bad">{{ line }}</li>
{% endfor %}
</ul>
{% endif %}
{% macro table(title, heads, rows) %}
<h2>{{ title }}</h2>
<div class="scroll" tabindex="0" role="region" aria-label="{{ title }}">
<table>
<thead><tr><th scope="col">{{ heads[0] }}</th>
{% for name in report.names %}
<th scope="col">{{ name }}</th>
{% endfor %}
</tr></thead>
<tbody>
{% for label, cells in rows %}
<tr><th scope="row">{{ label }}</th>{% for text in cells %}<td>{{ text }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table>
</div>
{% endmacro %}
{% if report.names %}
{{ table("Figures", ["Figure"], report.rows) }}
<h2>Plots</h2>
<div class="plots">
{% for plot in plots if plot.svg %}
<figure>
<figcaption><strong>{{ plot.title }}</strong><p class="muted">{{ plot.caption }}</p></figcaption>
{{ plot.svg|safe }}
</figure>
{% endfor %}
</div>
{% endif %}
{% if report.names|length > 1 %}
{{ table("Overlap of the passages", ["1 is the same text"], overlap) }}
{% endif %}
{% if report.told_changes %}
<h2>{{ report.told_changes[0] }}</h2>
<ul>
{% for line in report.told_changes[1:] %}
<li>{{ line }}</li>
{% endfor %}
</ul>
{% endif %}
<h2>Answers</h2>
<p class="muted">The questions on which the scripts differ most come first. A passage is marked
where another script did not retrieve its text.</p>
{% for view in report.views %}
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
{% for passage in answer.sources %}
<details{% if passage.differs %} class="differs"{% endif %}>
<summary>{{ loop.index }}. {{ passage.source }}{% if passage.page %}, p. {{ passage.page }}
{% endif %}<span class="muted">
{{ "%.2f"|format(passage.score) if passage.score is not none }}</span>
{% if passage.differs %}<strong>not all have this</strong>{% endif %}</summary>
<p class="said">{{ passage.text }}</p>
</details>
{% endfor %}
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
