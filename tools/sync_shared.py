"""Hold the stages that the scripts share equal to the letter, and their dependencies' bounds too.

    uv run tools/sync_shared.py           # one line a difference; exit code 1 if there is any
    uv run tools/sync_shared.py --fix     # copy the canonical text into the other scripts

Each script stands alone, so what they have in common is copied. The tables below say what that is;
a top-level name with the same text in two scripts that they don't tell of is a difference too.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SELF = "tools/sync_shared.py"
FIX = f"uv run {SELF} --fix"
FAISS, LOCAL, CHROMA = "rag_faiss_openai.py", "rag_local_ollama.py", "rag_chroma_claude.py"
STREAMING, ASYNC, HYBRID = "rag_streaming.py", "rag_async.py", "rag_hybrid_fastapi.py"
EXPLAINER = "rag_explainer.py"
LOOPS = (LOCAL, CHROMA, STREAMING, ASYNC, HYBRID)  # which answer questions, as FAISS does


@dataclass(frozen=True)
class Group:
    """Names whose text in `canonical` is the text in all of `scripts` (None: in every script)."""

    canonical: str
    scripts: tuple[str, ...] | None
    names: tuple[str, ...]


GROUPS = [
    Group(FAISS, None, ("Failure", "printable", "one_line")),
    Group(  # reading files, and speaking on stderr
        FAISS,
        (*LOOPS, EXPLAINER),
        ("KINDS", "MAX_QUESTION", "Document", "read_pages", "load_documents", "notice"),
    ),
    Group(  # the data, the common stages, the command line
        FAISS,
        LOOPS,
        (
            *("MAX_ANSWER_TOKENS", "TOP_K", "CHUNK_CHARACTERS", "REFUSAL", "SYSTEM_PROMPT"),
            *("Chunk", "Hit", "Answer", "split_text", "split_documents", "build_prompt"),
            *("parse_arguments", "require_key", "show_prompt"),
            *("check_answer", "explain", "print_hits", "answer_question", "main"),
        ),
    ),
    Group(  # OpenAI's embeddings in a FAISS index
        FAISS,
        (STREAMING, ASYNC),
        (
            *("EMBED_MODEL", "LLM_MODELS", "FAISS_FACTORY", "MAX_INPUTS, MAX_TOKENS"),
            *("MAX_INPUT_TOKENS", "BLOCK", "client", "token_counter", "embed", "Index"),
            *("load_index", "build_index", "retrieve", "add_backend_arguments", "check_backend"),
        ),
    ),
    Group(FAISS, (STREAMING, ASYNC, CHROMA, HYBRID), ("TIMEOUT",)),  # the hosted services
    Group(  # all-MiniLM-L6-v2 on this machine
        LOCAL,
        (CHROMA, HYBRID),
        ("load_embedder", "native_precision", "token_counter", "embed"),
    ),
    Group(  # Ollama, and the embedded LLM
        LOCAL,
        (HYBRID,),
        (
            *("GGUF", "EMBEDDED_MAX_TOKENS", "EMBEDDED_MIN_SCORE", "SMALL_SYSTEM_PROMPT"),
            *("SMALL_EXAMPLES", "FUNCTION_WORDS", "ollama", "embedded_llm", "embedded_request"),
        ),
    ),
    Group(LOCAL, (CHROMA, HYBRID, EXPLAINER), ("packaged",)),  # the models come in packages
    Group(STREAMING, (HYBRID,), ("REWRITE_PROMPT",)),
    Group(CHROMA, (HYBRID,), ("FOREVER", "EMBED_MODEL", "is_ours")),
]

# What is meant to differ, and why. One that is equal after all is a difference: take it out.
EXCEPTIONS = {
    STREAMING: {
        "main": "without a question it reads stdin, or is a chat",
        "answer_question": "it prints the answer while it comes, and a chat has a history",
    },
    ASYNC: {
        "main": "it runs an event loop around many questions",
        "answer_question": "a coroutine",
        "client": "the SDKs' asynchronous clients",
        "LLM_MODELS": "it asks one service",
        "retrieve": "it looks up many questions at once",
        "add_backend_arguments": "it has options for files of questions and for concurrency",
        "check_backend": "it reads the file of questions",
    },
    HYBRID: {
        "main": "it serves an API, or runs an event loop around the questions",
        "answer_question": "a coroutine, that prints what the API would send",
        "Chunk": "it knows its heading and its place in the document",
        "split_documents": "there are three ways to split",
        "split_text": "there are three ways to split",
        "CHUNK_CHARACTERS": "its chunks are measured in tokens",
        "build_prompt": "headings stand in it",
    },
}


@dataclass(frozen=True)
class Part:
    """A top-level definition: lines `start` to `end` (from 0, `end` excluded) of its script."""

    start: int
    end: int
    text: str
    is_constant: bool


def cut(source: str) -> dict[str, Part]:
    """Cut a script into its top-level parts, each with the comment lines directly above it."""
    lines, parts = source.splitlines(keepends=True), {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = node.name
            start = min(line.lineno for line in (node, *node.decorator_list)) - 1
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            name, start = ", ".join(ast.unparse(t).strip("()") for t in targets), node.lineno - 1
        else:
            continue
        while start and lines[start - 1].startswith("#"):
            start -= 1
        end = node.end_lineno or node.lineno
        is_constant = isinstance(node, ast.Assign | ast.AnnAssign)
        parts[name] = Part(start, end, "".join(lines[start:end]), is_constant)
    return parts


def settings(name: str, text: str) -> dict[str, str]:
    """Read what a script's PEP 723 block or pyproject.toml fixes: Python, date, dependencies."""
    if name.endswith(".toml"):
        data = tomllib.loads(text)
        found = {"requires-python": data["project"]["requires-python"]}
        dependencies = data["dependency-groups"]["dev"]
    else:
        block = re.search(r"(?m)^# /// script\n((?:#.*\n)+?)# ///$", text)
        data = tomllib.loads(re.sub(r"(?m)^# ?", "", block[1])) if block else {}
        found = {"requires-python": data.get("requires-python", "")}
        dependencies = data.get("dependencies", [])
    found["exclude-newer"] = data.get("tool", {}).get("uv", {}).get("exclude-newer", "")
    for dependency in dependencies:
        found[re.split(r"[\[<>=!~ ]", dependency)[0].lower()] = dependency
    return found


def put(text: str, name: str, canonical: dict[str, Part]) -> str:
    """Return a script with the canonical text of `name`, in its place or where it belongs."""
    lines, parts, part = text.splitlines(keepends=True), cut(text), canonical[name]
    if name in parts:
        lines[parts[name].start : parts[name].end] = [part.text]
        return "".join(lines)
    earlier = [other for other in list(canonical)[: list(canonical).index(name)] if other in parts]
    if earlier:
        before = parts[earlier[-1]]
        place, blanks = before.end, 0 if before.is_constant and part.is_constant else 2
    else:
        nodes = ast.parse(text).body
        place = max(n.end_lineno or 0 for n in nodes if isinstance(n, ast.Import | ast.ImportFrom))
        blanks = 1 if part.is_constant else 2
    lines.insert(place, "\n" * blanks + part.text)
    return "".join(lines)


def compare_parts(texts: dict[str, str], fixed: dict[str, str]) -> list[str]:
    """Compare what the groups share; `fixed` gets the canonical text."""
    found, parts = [], {script: cut(text) for script, text in texts.items()}
    for group in GROUPS:
        if group.canonical not in texts:
            continue
        for name in group.names:
            canonical = parts[group.canonical].get(name)
            if not canonical:
                found.append(f"{group.canonical}: {name} is in the table, but not in the script")
                continue
            for script in texts if group.scripts is None else group.scripts:
                if script == group.canonical or script not in texts:
                    continue
                copy, reason = parts[script].get(name), EXCEPTIONS.get(script, {}).get(name)
                equal = copy is not None and copy.text == canonical.text
                if reason and equal:
                    found.append(f"{script}: {name} is equal: take it out of EXCEPTIONS")
                elif not reason and not equal:
                    how = f"differs from {group.canonical}" if copy else "is missing"
                    found.append(f"{script}: {name} {how}: {FIX}")
                    fixed[script] = put(fixed[script], name, parts[group.canonical])
    return found


def compare_settings(texts: dict[str, str], fixed: dict[str, str]) -> list[str]:
    """Compare Python versions, dates and bounds; the first file that names one is right."""
    found, right = [], {}
    for file in sorted(texts, key=lambda name: (name.endswith(".toml"), name != FAISS, name)):
        for key, value in settings(file, texts[file]).items():
            first, wanted = right.setdefault(key, (file, value))
            if value != wanted:
                found.append(f"{file}: {key} is {value}, in {first} {wanted}: {FIX}")
                fixed[file] = fixed[file].replace(f'"{value}"', f'"{wanted}"', 1)
    return found


def undeclared(texts: dict[str, str]) -> list[str]:
    """Name the parts that stand in two scripts with the same text, and in no group for both."""
    found, seen = [], {}
    for script, text in texts.items():
        for name, part in cut(text).items():
            first = seen.setdefault((name, part.text), script)
            declared = any(
                name in group.names
                and {first, script} <= {group.canonical, *(group.scripts or texts)}
                for group in GROUPS
            )
            if first != script and not declared:
                found.append(f"{script}: {name} is that of {first}: add it to a group of {SELF}")
    return found


def main(argv: list[str] | None = None) -> int:
    """Compare, and with --fix mend. Returns 1 where a difference is left."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--check", action="store_true", help="only say what differs (the default)")
    either.add_argument("--fix", action="store_true", help="copy the canonical text to the others")
    fix = parser.parse_args(argv).fix

    scripts = {path.name: path.read_text("utf-8") for path in sorted(ROOT.glob("rag_*.py"))}
    files = scripts | {"pyproject.toml": (ROOT / "pyproject.toml").read_text("utf-8")}
    fixed = dict(files)
    found = [*compare_parts(scripts, fixed), *compare_settings(files, fixed), *undeclared(scripts)]
    for line in found:
        mended = fix and line.endswith(f": {FIX}")
        print(line.removesuffix(f": {FIX}") + ": mended" if mended else line)
    for name, text in fixed.items() if fix else []:
        if text != files[name]:
            (ROOT / name).write_text(text, "utf-8")
    left = [line for line in found if not (fix and line.endswith(FIX))]
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
