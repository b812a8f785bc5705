#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "jinja2>=3.1,<4", "numpy>=2.4,<3", "pydantic>=2.14,<3", "rich>=15,<16", "scipy>=1.17,<2",
# ]
# [tool.uv]
# exclude-newer = "2026-11-14T00:00:00Z"
# ///
"""Compare RAG scripts on the same documents and questions: quality, time, cost.

    uv run rag_compare.py                                        # the scripts beside this file
    uv run rag_compare.py --docs notes/ --questions questions.jsonl --report report.html
    uv run rag_compare.py rag_chroma_claude.py my_variant.py "my_variant.py --model gpt-5"

Any script takes part that has the collection's command line and --json. In a line of the questions'
file everything but the question may be left out:

    {"question": "Who built it?", "relevant": ["mill.md", {"text": "by Edda"}], "answer": "Edda"}

"relevant" names what should be retrieved: files, or texts that a passage contains. [] says that no
document answers the question, so the script should refuse. In brackets are 95 % intervals; "-" is
not known. Cost is that of the LLM's tokens by list price; asking hosted LLMs costs it here too.

Downloads 57 MB of packages, and what each script needs. Exit code 0: all that can run here was
compared. 1: a script or a question failed. 2: nothing could run, or a file or an argument is wrong.
130: Ctrl-C, after showing what was measured until then.
"""

import json
import math
import os
import re
import shlex
import signal
import statistics
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections import Counter
from collections.abc import Generator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from subprocess import DEVNULL, Popen, TimeoutExpired
from typing import Annotated, Any
from unicodedata import category, normalize

from pydantic import BaseModel, NonNegativeFloat, StringConstraints, ValidationError

# --- questions ---

DOCUMENTS = {
    "press.md": "The cider press of Quillmere Orchard was built by Edda Thornquist in 1911. It "
    "squeezes 640 litres a day. Its seal has the part number QM-4471-B.",
    "old-press.md": "An older press, of elm, stands in the barn. Nobody knows who built it.",
    "apples.md": "Most trees are Quillmere Russet, which keeps until March. Silver Anna goes soft "
    "in a week and is eaten at once.",
}
QUESTIONS = """\
{"question": "Who built the cider press?", "relevant": ["press.md"], "answer": "Edda Thornquist"}
{"question": "What wood is the old press made of?", "relevant": ["old-press.md"], "answer": "elm"}
{"question": "Which apple keeps best?", "relevant": [{"text": "until March"}], "answer": "Russet"}
{"question": "What is QM-4471-B?", "relevant": ["press.md"], "answer": "seal"}
{"question": "Which football club does the village support?", "relevant": []}
"""
Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class Passage(BaseModel, extra="forbid"):
    """A label: a text that a retrieved passage has to contain."""

    text: Text


class Question(BaseModel, extra="forbid"):
    """A line of the questions' file."""

    question: Text
    relevant: list[Text | Passage] | None = None
    answer: Text | None = None


def is_named(source: str, label: str) -> bool:
    """Return whether a label names a source: `a/b.md` names `notes/a/b.md`."""
    return f"/{source}".replace("\\", "/").endswith(f"/{label}")


def read_questions(lines: str, docs: list[str]) -> list[Question]:
    """Read JSON Lines. Each label that names a file must name exactly one under --docs."""
    paths = [path for each in docs for path in [Path(each), *Path(each).rglob("*")]]
    questions = []
    for n, line in enumerate(lines.rstrip().split("\n"), 1):
        try:
            question = Question.model_validate_json(line)
        except ValidationError as error:
            raise ValueError(f"questions, line {n}: {first_fault(error)}") from error
        for label in question.relevant or []:
            if isinstance(label, str):
                named = sum(is_named(p.as_posix(), label) and p.is_file() for p in paths)
                if named != 1:
                    raise ValueError(f"questions, line {n}: {label} names {named} files in {docs}")
        questions.append(question)
    return questions


def first_fault(error: ValidationError) -> str:
    """Return the first fault that pydantic found, in one line."""
    fault = error.errors()[0]
    return f"{'.'.join(map(str, fault['loc']))} {fault['msg']}".strip()


# --- run the scripts ---

UV = os.environ.get("UV", "uv")  # set by `uv run`: uv need not be on the PATH
GRACE = 5  # seconds that a script has to end itself
BATCH = 100  # questions per process: Windows takes 32,000 characters on a command line


class Source(BaseModel):
    """A passage that a script retrieved."""

    source: str
    text: str
    page: int | None = None
    score: float | None = None


class Record(BaseModel):
    """What a script prints for a question with --json."""

    question: str
    answer: str | None
    refused: bool
    error: str | None
    sources: list[Source]
    seconds: dict[str, NonNegativeFloat | None]
    model: str | None = None
    embed_model: str | None = None
    usage: dict[str, int] | None = None


@dataclass
class Script:
    """A script, and what came of it."""

    name: str
    path: str
    options: list[str]
    status: str = "not run"  # or ok, cannot run here, failed, interrupted
    reason: str = "Ctrl-C came before"
    records: list[Record] = field(default_factory=list)
    starts: list[float] = field(default_factory=list)  # seconds to the first of each process
    scores: list[dict[str, float]] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)


class ScriptError(Exception):
    """A script failed, hangs, or prints what is no record."""


def stop(process: Popen[bytes]) -> None:
    """Interrupt a process and its descendants; kill what is left after GRACE seconds."""

    def send(number: int) -> None:
        with suppress(OSError):  # all have ended
            os.killpg(process.pid, number) if os.name == "posix" else process.kill()

    try:
        send(signal.SIGINT)
        with suppress(TimeoutExpired):
            process.wait(GRACE)
    finally:
        send(9)  # SIGKILL, a name that Windows lacks
        process.wait()


def run(script: Script, args: Namespace, words: list[str]) -> Generator[tuple[float, bytes]]:
    """Run a script. Yields each line that it prints, with the seconds since its start.

    It writes to files, for a pipe stays open as long as any process that it has started.
    """
    command = [UV, "run", script.path, *words]
    out, err, rest = Path(args.folder, "stdout"), Path(args.folder, "stderr"), b""
    with out.open("wb") as stdout, err.open("wb") as stderr, out.open("rb") as lines:
        start = changed = time.monotonic()
        # In a session of its own it can be ended whole, and Ctrl-C does not reach it.
        process = Popen(
            command, stdin=DEVNULL, stdout=stdout, stderr=stderr, start_new_session=True
        )
        try:
            code = size = None
            while code is None:
                time.sleep(0.05)
                code, now = process.poll(), time.monotonic()  # then read, so to the end
                *complete, rest = (rest + lines.read()).split(b"\n")
                yield from ((now - start, line) for line in complete)
                printed = out.stat().st_size + err.stat().st_size
                if printed != size:
                    size, changed = printed, now
                elif now - changed > args.timeout:
                    raise ScriptError(f"printed nothing for {args.timeout:g} s (--timeout)")
        finally:
            stop(process)
    if code:
        said = err.read_text("utf-8", "replace").strip().rpartition("\n")[2]
        number = code - 128 if code > 128 else -code  # uv reports signals as a shell does
        if number in set(signal.Signals):
            said = f"was killed by {signal.Signals(number).name}"
        script.status = "cannot run here" if code == 2 and not script.records else "failed"
        raise ScriptError(said.removeprefix("error: ") or f"ended with exit code {code}")


def ask(script: Script, questions: list[str], options: list[str], args: Namespace) -> None:
    """Ask a script some questions in one process, and keep its records as they come."""
    words = ["--json", *options, *script.options]
    words += [f" {text}" if text[0] == "-" else text for text in questions]  # or it is an option
    waiting = list(questions)
    try:
        with closing(run(script, args, words)) as lines:
            for seconds, line in lines:
                record = Record.model_validate_json(line)
                if not waiting or record.question.strip() != waiting.pop(0):
                    raise ScriptError(f"answered what was not asked: {record.question}")
                if len(waiting) == len(questions) - 1:
                    script.starts.append(seconds)
                script.records.append(record)
                args.advance()
    except ValidationError as error:
        shown = line[:80].decode(errors="replace")
        raise ScriptError(f"printed no record: {shown} ({first_fault(error)})") from error
    except ScriptError:
        if waiting or not any(record.error for record in script.records):
            raise  # else the exit code says what the records say
    if waiting:
        raise ScriptError(f"ended after {len(script.records)} records")


def run_script(script: Script, questions: list[str], index: str, args: Namespace) -> None:
    """Ask the first question while the script indexes the documents, the others on that index."""
    options = [f"--index={index}", f"--top-k={args.top_k}"]
    options += ["--retrieve-only"] if args.retrieve_only else []
    docs = [f"--docs={path}" for path in args.docs]
    script.status, script.reason = "failed", ""
    try:
        usage = [line for _, line in run(script, args, ["--help"])]
        if b"--json" not in b"".join(usage):
            script.status = "cannot run here"
            raise ScriptError("its --help names no --json")
        ask(script, questions[:1], options + docs, args)
        for start in range(1, len(questions), BATCH):
            ask(script, questions[start : start + BATCH], options, args)
        errors = [record.error for record in script.records if record.error]
        if errors:
            raise ScriptError(f"{len(errors)} of {len(questions)} questions: {errors[0]}")
        script.status = "ok"
    except (ScriptError, OSError) as error:
        script.reason = str(error)
    except KeyboardInterrupt:
        script.status, script.reason = "interrupted", f"after {len(script.records)} records"
        raise


# --- score ---

PRICES = {"gpt-4o": (2.50, 10.00), "claude-sonnet-4-6": (3.00, 15.00)}  # USD per 1M, 2026-11
QUALITY = ("hit@k", "MRR@k", "nDCG@k", "expected in answer", "answer F1")
QUALITY += ("unanswerable: refused", "answerable: refused")
# Between words of Thai, Lao, Burmese, Khmer, Japanese and Chinese there are no blanks.
UNSPACED = r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]"


def split_words(text: str) -> list[str]:
    """Split as SQuAD's evaluation does, and drop citations; unspaced text into characters."""
    text = re.sub(r"\[\d+\]", " ", normalize("NFKC", text).lower())
    text = re.sub(UNSPACED, r" \g<0> ", re.sub(r"[^\w\s]|_", " ", text))
    return [word for word in text.split() if word not in ("a", "an", "the")]


def contains(text: str, expected: str) -> bool:
    """Return whether a text has the words of another in it, one after the other."""
    return f" {' '.join(split_words(expected))} " in f" {' '.join(split_words(text))} "


def token_f1(answer: str, expected: str) -> float:
    """Harmonic mean of precision and recall of an answer's words (Rajpurkar et al., 2016)."""
    said, wanted = Counter(split_words(answer)), Counter(split_words(expected))
    return 2 * (said & wanted).total() / max(1, said.total() + wanted.total())


def is_relevant(source: Source, label: str | Passage) -> bool:
    """Return whether a passage is what a label names."""
    if isinstance(label, Passage):
        return contains(source.text, label.text)
    return is_named(source.source, label)


def rank(sources: list[Source], labels: list[str | Passage]) -> list[bool]:
    """Return which of the retrieved documents, or passages if a label is a text, are relevant."""
    by_text = any(isinstance(label, Passage) for label in labels)
    ranked: dict[str, bool] = {}
    for source in sources:
        found = [str(label) for label in labels if is_relevant(source, label)]
        for name in found or [source.text if by_text else source.source]:
            ranked.setdefault(name, bool(found))
    return list(ranked.values())


def score(question: Question, record: Record, args: Namespace) -> dict[str, float]:
    """Score a record by the labels of its question."""
    scores: dict[str, float] = {}
    if question.relevant:
        found = rank(record.sources, question.relevant)[: args.top_k]
        gains = [1 / math.log2(place + 1) for place in range(1, args.top_k + 1)]
        gained = sum(gain for gain, relevant in zip(gains, found, strict=False) if relevant)
        scores["hit@k"] = float(any(found))
        scores["MRR@k"] = 1 / (found.index(True) + 1) if any(found) else 0.0
        scores["nDCG@k"] = gained / sum(gains[: len(question.relevant)])
    answer = record.answer or ""
    if question.answer and (answer or record.error) and not args.retrieve_only:
        scores["expected in answer"] = float(contains(answer, question.answer))
        scores["answer F1"] = token_f1(answer, question.answer)
    if answer and question.relevant is not None:
        kind = "answerable: refused" if question.relevant else "unanswerable: refused"
        scores[kind] = float(record.refused)
    return scores


def interval(values: list[float]) -> dict[str, float] | None:
    """Mean with its 95 % interval by the bootstrap (BCa, Efron 1987); none if all are equal."""
    import numpy as np
    from scipy.stats import bootstrap

    if not values:
        return None
    found = {"mean": sum(values) / len(values), "questions": len(values)}
    if len(set(values)) > 1:
        low, high = bootstrap((values,), np.mean, n_resamples=2_000, rng=0).confidence_interval
        found |= {"low": float(low), "high": float(high)}
    return found


def median(records: list[Record], *stages: str) -> float | None:
    """Median of the seconds that some stages took together."""
    known = [r.seconds for r in records if all(r.seconds.get(s) is not None for s in stages)]
    sums = [sum(seconds[stage] or 0 for stage in stages) for seconds in known]
    return statistics.median(sums) if sums else None


def measure(script: Script, args: Namespace) -> dict[str, Any]:
    """Work out the figures of a script. None: not known."""
    figures: dict[str, Any] = {}
    for key in QUALITY:
        figures[key] = interval([scores[key] for scores in script.scores if key in scores])
    # The first record of the process that indexes, and of the next, has the imports in its times.
    warm = [record for record in script.records[2:] or script.records if not record.error]
    answers = [record for record in warm if record.answer]
    usage = [record.usage for record in script.records if record.usage]
    read = sum(tokens.get("input_tokens", 0) for tokens in usage)
    written = sum(tokens.get("output_tokens", 0) for tokens in usage)
    price = args.prices.get(script.records[0].model)
    errors = sum(record.error is not None for record in script.records)
    usd = (read * price[0] + written * price[1]) / 1e6 if usage and price else None
    return figures | {
        "retrieve s": median(warm, "retrieve"),
        "first token s": median(answers, "retrieve", "first_token"),
        "answer s": median(answers, "retrieve", "generate"),
        "start s": script.starts[1] if len(script.starts) > 1 else None,
        "start and index s": script.starts[0],
        "tokens in": read / len(usage) if usage else None,
        "tokens out": written / len(usage) if usage else None,
        "USD / 1,000 questions": usd and usd / (len(script.records) - errors) * 1_000,
        "errors": errors,
        "LLM": ", ".join(sorted({r.model for r in answers if r.model})),
        "embedder": ", ".join(sorted({r.embed_model for r in script.records if r.embed_model})),
    }


# --- differences ---


def compare_best(scripts: list[Script]) -> list[str]:
    """Say by how much the best script is ahead of each other one, where both were asked."""
    lines = []
    for key in ("nDCG@k", "expected in answer"):
        rated = [script for script in scripts if script.figures[key]]
        rated.sort(key=lambda s: (s.status == "ok", s.figures[key]["mean"]), reverse=True)
        for other in rated[1:]:
            pairs = zip(rated[0].scores, other.scores, strict=False)
            both = [a[key] - b[key] for a, b in pairs if key in a and key in b]
            found = interval(both) or {"mean": 0, "questions": 0}
            verdict = "better than" if found.get("low", 0) > 0 else "not clearly better than"
            by = f"{number(found)} on {found['questions']} questions"
            lines.append(f"By {key}, {rated[0].name} is {verdict} {other.name}: {by}.")
    return lines


def shingle(text: str) -> set[tuple[str, ...]]:
    """Return all runs of five words (Broder, 1997): passages cut elsewhere have most in common."""
    words = split_words(text)
    return {tuple(words[start : start + 5]) for start in range(max(1, len(words) - 4))}


def find_differences(scripts: list[Script], questions: list[Question]) -> list[Any]:
    """Return questions with the texts that not all scripts retrieved, large differences first."""
    views = []
    for place, question in enumerate(questions):
        asked = [script for script in scripts if place < len(script.records)]
        passages = [[p.text for p in script.records[place].sources] for script in asked]
        found = [shingle("\n".join(texts)) for texts in passages]
        missed = set()
        for text in {text for texts in passages for text in texts}:
            own = shingle(text)
            if any(len(own & other) < len(own) / 2 for other in found):
                missed.add(text)
        spread = 0.0
        for key in QUALITY:
            values = [script.scores[place].get(key, 0) for script in asked]
            spread += max(values, default=0) - min(values, default=0)
        views.append((spread, len(missed), place, question, asked, missed))
    return sorted(views, key=lambda view: view[:2], reverse=True)


# --- show ---


def clean(text: Any) -> str:
    """Drop control characters, which can drive a terminal."""
    return "".join(char for char in str(text) if char == "\n" or category(char)[0] != "C")


def number(value: Any) -> str:
    """Write a figure: three digits, an interval in brackets, "-" where it is not known."""
    if isinstance(value, dict):
        spread = f" ({value['low']:.2f}..{value['high']:.2f})" if "low" in value else ""
        return f"{value['mean']:.2f}{spread}"
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return str(value) if value not in (None, "") else "-"


def show(console: Any, scripts: list[Script], rows: list[Any], notes: list[str]) -> None:
    """Print the table, with the scripts side by side, and the notes."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    for script in scripts:
        table.add_column(Text(clean(script.name)), justify="right", overflow="fold")
    for label, cells in rows:
        table.add_row(label, *(Text(clean(cell).replace(" (", "\n(")) for cell in cells))
    console.print(table)
    for line in notes:
        console.print(Text(clean(line)))


# --- page ---

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>RAG scripts side by side</title>
<style>
:root { color-scheme: light dark; --line: color-mix(in srgb, currentColor 25%, transparent); }
body { max-width: 78rem; margin: auto; padding: 1rem; font: 1rem/1.5 system-ui, sans-serif;
  background: Canvas; overflow-wrap: anywhere; }
.bad { color: light-dark(#a1242b, #ff9d9d); }
table { border-collapse: collapse; overflow-wrap: normal; }
th, td { padding: .3rem .7rem; border: 1px solid var(--line); text-align: right; }
td { min-width: 9rem; }
tbody th { position: sticky; left: 0; background: Canvas; text-align: left; }
.columns { display: grid; gap: .8rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)); }
figure, article { margin: 0; padding: .9rem; border: 1px solid var(--line); border-radius: .5rem; }
svg { overflow: visible; width: calc(100% - 4rem); height: 18rem; margin: 2rem 1rem 2rem 3rem;
  stroke: currentColor; fill: currentColor; }
svg text { stroke: none; }
.said { white-space: pre-wrap; }
.missed { background: color-mix(in srgb, orange 22%, transparent); }
</style>
<main>
<h1>RAG scripts side by side</h1>
<ul>
{% for line in notes %}<li>{{ line }}</li>{% endfor %}
{% for line in problems %}<li class="bad">{{ line }}</li>{% endfor %}
</ul>
<div style="overflow-x: auto" tabindex="0" role="region" aria-label="Figures">
<table>
<thead><tr><th scope="col">Figure (95 % interval)</th>
{% for script in ran %}<th scope="col">{{ loop.index }}. {{ script.name }}</th>{% endfor %}
</tr></thead>
<tbody>
{% for label, cells in rows %}
<tr><th scope="row">{{ label }}</th>{% for cell in cells %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table>
</div>
<h2>Quality against time</h2>
<p>Higher and further left is better. Numbers: the columns above. Lines: 95 % intervals.</p>
<div class="columns">
{% for quality, time in [("nDCG@k", "retrieve s"), ("expected in answer", "answer s")]
  if ran|map(attribute="figures")|selectattr(quality)|selectattr(time)|list %}
<figure>
<figcaption>{{ quality }} against {{ time }}</figcaption>
<svg role="img" aria-label="{{ quality }} against {{ time }}">
{% for part in range(6) %}
<line opacity=".2" x2="100%" y1="{{ part * 20 }}%" y2="{{ part * 20 }}%"/>
<text x="-8" y="{{ part * 20 }}%" dy="5" text-anchor="end">{{ (5 - part) / 5 }}</text>
<line opacity=".2" x1="{{ part * 20 }}%" x2="{{ part * 20 }}%" y2="100%"/>
<text x="{{ part * 20 }}%" y="100%" dy="20" text-anchor="middle">{{ 10 ** (part - 3) }}</text>
{% endfor %}
{% for script in ran %}
{% set level, seconds = script.figures[quality], script.figures[time] %}
{% if level and seconds %}
{% set x = [0, [60 + 20 * log10(seconds), 100]|min]|max %}
{% set y = 100 - 100 * level.mean %}
{% set low, high = level.low|default(level.mean), level.high|default(level.mean) %}
<line x1="{{ x }}%" x2="{{ x }}%" y1="{{ 100 - 100 * low }}%" y2="{{ 100 - 100 * high }}%"/>
<circle cx="{{ x }}%" cy="{{ y }}%" r="5"/>
{% set dx, dy = [(8, -8), (-16, -8), (-16, 18), (8, 18)][loop.index0 % 4] %}
<text x="{{ x }}%" y="{{ y }}%" dx="{{ dx }}" dy="{{ dy }}">{{ loop.index }}</text>
{% endif %}
{% endfor %}
</svg>
</figure>
{% endfor %}
</div>
<h2>Answers</h2>
<p>The largest differences come first. A passage is marked where another script did not find it.</p>
{% for _, _, place, question, asked, missed in views %}
<h3>{{ question.question }}</h3>
<p>
{% for label in question.relevant or [] %}Relevant: {{ label.text or label }}. {% endfor %}
{% if question.relevant == [] %}No document answers it. {% endif %}
{% if question.answer %}Expected: {{ question.answer }}.{% endif %}
</p>
<div class="columns">
{% for script in asked %}
{% set record = script.records[place] %}
<article>
<strong>{{ script.name }}</strong>
{% if record.error %}<p class="bad">Error: {{ record.error }}</p>{% endif %}
{% if record.answer %}<p class="said">{{ record.answer }}</p>{% endif %}
{% for passage in record.sources %}
<details{% if passage.text in missed %} class="missed"{% endif %}>
<summary>{{ loop.index }}. {{ passage.source -}}
{% if passage.page %}, page {{ passage.page }}{% endif -%}
{% if passage.score is not none %}, {{ "%.2f"|format(passage.score) }}{% endif -%}
{% for tag in question.relevant or [] if is_relevant(passage, tag) %}, <b>relevant</b>{% endfor -%}
{% if passage.text in missed %}, <b>not found by all</b>{% endif %}
<br>{{ passage.text|truncate(60) }}</summary>
<p class="said">{{ passage.text }}</p>
</details>
{% endfor %}
</article>
{% endfor %}
</div>
{% endfor %}
</main>
</html>
"""


# --- command line: comparison ---

PARSER = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
add = PARSER.add_argument
add("script", nargs="*", help="what to compare; left out: the rag_*.py beside this file")
add("--docs", action="append", metavar="PATH", help="a file or folder to index; may be repeated")
add("--questions", type=Path, metavar="FILE", help="JSON Lines, see above")
add(
    "--top-k",
    type=int,
    default=4,
    metavar="N",
    help="passages per question, the k of hit@k (%(default)s)",
)
add("--retrieve-only", action="store_true", help="compare the passages, without calling the LLM")
add("--report", type=Path, metavar="FILE", help="write a page with all answers side by side")
add("--json", action="store_true", help="print one JSON object in place of the table")
add("--price", action="append", nargs=3, metavar=("MODEL", "IN", "OUT"), help="USD per 1M tokens")
add(
    "--timeout", type=float, default=600, metavar="S", help="stop what prints nothing (%(default)s)"
)
SIGNALS = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]
SIGNALS = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # nohup


def find_scripts(names: list[str]) -> list[Script]:
    """Return the named scripts with their options, or the rag_*.py beside this file."""
    own = Path(__file__)
    beside = [str(path) for path in sorted(own.parent.glob("rag_*.py")) if path.name != own.name]
    scripts = []
    for name in names or beside:
        path, *options = [name] if Path(name).is_file() else shlex.split(name) or [""]
        if not Path(path).is_file():
            raise ValueError(f"no such script: {path}")
        title = " ".join([Path(path).stem.removeprefix("rag_"), *options])
        scripts.append(Script(title, path, options))
    return scripts


def run_all(scripts: list[Script], questions: list[str], args: Namespace) -> None:
    """Run one script after the other, with progress bars on a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        for n, script in enumerate(scripts):
            task = progress.add_task(clean(script.name), total=len(questions))
            args.advance = partial(progress.advance, task)
            run_script(script, questions, f"{args.folder}/index-{n}", args)


def compare(args: Namespace) -> int:
    """Run the scripts and report. Returns the exit code."""
    import jinja2
    from rich.console import Console

    scripts = find_scripts(args.script)
    given = {model: (float(read), float(written)) for model, read, written in args.price or []}
    args.prices = PRICES | given
    if args.report:
        args.report.open("a").close()  # fails now, not after hours
    if not args.docs:
        args.docs = [f"{args.folder}/samples"]
        Path(*args.docs).mkdir()
        for name, text in DOCUMENTS.items():
            Path(*args.docs, name).write_text(text, "utf-8")
    lines = args.questions.read_text("utf-8-sig") if args.questions else QUESTIONS
    questions = read_questions(lines, args.docs)
    code = 0
    try:
        run_all(scripts, [question.question for question in questions], args)
    except KeyboardInterrupt:
        code = 130

    ran = [script for script in scripts if script.records]
    for script in ran:
        pairs = zip(questions, script.records, strict=False)
        script.scores = [score(question, record, args) for question, record in pairs]
        script.figures = measure(script, args)
    keys = ran[0].figures if ran else []
    rows = [(key, [number(script.figures[key]) for script in ran]) for key in keys]
    rows = [(key, cells) for key, cells in rows if set(cells) != {"-"}]
    notes = compare_best(ran)
    problems = [f"{s.name} {s.status}: {s.reason}" for s in scripts if s.status != "ok"]
    if args.report:
        environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        report: dict[str, Any] = {"ran": ran, "rows": rows, "notes": notes, "problems": problems}
        report |= {"views": find_differences(ran, questions), "is_relevant": is_relevant}
        page = environment.from_string(PAGE).render(report, log10=math.log10)
        args.report.write_text(page, "utf-8")
    console = Console(highlight=False)
    if args.json:
        console.out(json.dumps({"questions": questions, "scripts": scripts}, default=vars))
    else:
        show(console, ran, rows, notes + problems)
    failed = any(script.status == "failed" for script in scripts)
    return code or (1 if failed else 0 if ran else 2)


def interrupt(*_: Any) -> None:
    """Stop, once: a signal from a terminal reaches us from `uv run` a second time."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def main(argv: list[str] | None = None) -> int:
    """Compare the scripts. Returns the exit code."""
    args = PARSER.parse_intermixed_args(argv)
    if args.top_k < 1:
        PARSER.error("--top-k must be 1 or more")
    if bool(args.docs) != bool(args.questions):
        PARSER.error("--docs and --questions go together; without both, built-in ones are used")
    handlers = {number: signal.signal(number, interrupt) for number in SIGNALS}
    try:
        with tempfile.TemporaryDirectory(prefix="rag-", ignore_cleanup_errors=True) as args.folder:
            return compare(args)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if os.environ.get("DEBUG"):
            raise
        print(f"error: {clean(error)}", file=sys.stderr)
        return 2 if isinstance(error, (OSError, ValueError)) else 1
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # ty: ignore - pipes on Windows lack most of Unicode
    sys.exit(main())
