"""What every script keeps to: equal sections, lengths, versions, the CPU build of torch."""

# ruff: noqa: D103 - the names of the tests are their docstrings

import ast
import os
import re
import shutil
import subprocess
import sys
import threading
import tomllib
import types
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT, clean_environment, command, environment
from test_contract import SCRIPTS, call, demonstration_faults

SMALL = [f"{script.name}.py" for script in SCRIPTS]
WITH_TORCH = sorted(p.name for p in ROOT.glob("rag_*.py") if "whl/cpu" in p.read_text())
MOST_LINES = dict.fromkeys(SMALL, 350) | {"rag_local_ollama.py": 390}
MOST_LINES_IN_ALL = 1_720
MOST_LINES_BEFORE_THE_PAGE = {
    "rag_hybrid_fastapi.py": 900,
    "rag_explainer.py": 1_000,
    "rag_compare.py": 470,
}
MOST_LINES_OF_A_FUNCTION = 50
each_small = pytest.mark.parametrize("script", SMALL)


def read_block(text):
    block = re.search(r"(?m)^# /// script\n((?:#.*\n)+?)# ///$", text)
    assert block
    return tomllib.loads(re.sub(r"(?m)^# ?", "", block[1]))


# --- sections ---


def sync(root, *args):
    python = [sys.executable, str(root / "tools" / "sync_shared.py"), *args]
    return subprocess.run(python, capture_output=True, text=True)


@pytest.fixture
def copies(tmp_path):
    """The small scripts with the tool, and a second copy of the first script."""
    (tmp_path / "tools").mkdir()
    for name in [*SMALL, "pyproject.toml", "tools/sync_shared.py"]:
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / SMALL[0], tmp_path / "rag_copy.py")
    return tmp_path


def test_the_scripts_agree(copies):
    for root in (ROOT, copies):
        done = sync(root)
        assert done.returncode == 0, done.stdout


def test_a_changed_section_is_named_and_mended(copies):
    changed = copies / "rag_copy.py"
    text = changed.read_text()
    changed.write_text(text.replace("def load_documents(paths", "def load_documents(places"))
    done = sync(copies)
    assert done.returncode == 1
    assert "rag_copy.py" in done.stdout
    assert "'load and split' differs" in done.stdout
    assert "places" in changed.read_text(), "without --fix nothing is written"
    assert sync(copies, "--fix", SMALL[0]).returncode == 0
    assert changed.read_text() == text
    assert sync(copies).returncode == 0


@pytest.mark.parametrize(
    ("old", "new"),
    [("pypdf[crypto]>=7.1", "pypdf[crypto]>=7.0"), ("2026-11-14", "2026-11-15"), ("3.11", "3.12")],
)
def test_versions_that_differ_from_pyproject_are_named(copies, old, new):
    changed = copies / "rag_copy.py"
    changed.write_text(changed.read_text().replace(old, new, 1))
    done = sync(copies)
    assert done.returncode == 1
    assert re.search(f"^rag_copy.py: .*{re.escape(new)}", done.stdout, re.M)


# --- each script ---


def test_the_scripts_keep_to_their_lengths():
    lengths = {name: len((ROOT / name).read_text().splitlines()) for name in SMALL}
    assert {name: n for name, n in lengths.items() if n > MOST_LINES[name]} == {}
    assert sum(lengths.values()) <= MOST_LINES_IN_ALL


@pytest.mark.parametrize("script", MOST_LINES_BEFORE_THE_PAGE)
def test_the_scripts_with_a_page_keep_to_their_lengths(script):
    before = re.split(r"(?m)^# --- (?:the )?page", (ROOT / script).read_text())[0]
    assert len(before.splitlines()) <= MOST_LINES_BEFORE_THE_PAGE[script]


@each_small
def test_no_line_is_too_wide_and_no_function_too_long(script):
    text = (ROOT / script).read_text()
    assert [line for line in text.splitlines() if len(line) > 100] == []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < MOST_LINES_OF_A_FUNCTION, node.name


@each_small
def test_a_script_starts_as_a_program_and_names_what_it_imports(script):
    text = (ROOT / script).read_text()
    assert text.startswith("#!/usr/bin/env -S uv run --script\n# /// script\n")
    assert text.endswith("    sys.exit(main())\n")
    assert os.access(ROOT / script, os.X_OK)
    dependencies = read_block(text)["dependencies"]
    assert dependencies == sorted(dependencies)
    for dependency in dependencies:
        assert re.fullmatch(r"[a-z0-9.-]+(\[\w+\])?(>=[\d.]+,<[\d.]+|==[\d.]+)", dependency)
    named = {re.split(r"[\[<>=]", name)[0].replace("-", "_") for name in dependencies}
    known = {"bs4": "beautifulsoup4", "faiss": "faiss_cpu"}
    imported = set(re.findall(r"(?m)^ *(?:import|from) (\w+)", text)) - sys.stdlib_module_names
    brought = {"transformers"}  # by sentence-transformers
    assert {known.get(name, name) for name in imported} - brought <= named


@each_small
def test_a_script_copied_alone_runs_and_its_help_is_the_docstring(script, tmp_path):
    command(script)  # its environment may be made from the index, that of the copy may not
    shutil.copy(ROOT / script, tmp_path)
    uv_run = ["uv", "run", "--offline", script, "--help"]
    told = subprocess.check_output(uv_run, cwd=tmp_path, env=clean_environment(), text=True)
    assert [path.name for path in tmp_path.iterdir()] == [script], "it left something behind"
    doc = ast.get_docstring(ast.parse((ROOT / script).read_text())) or "none"
    assert doc in told
    examples = re.findall(r"^    uv run (\S+)(.*)$", doc, re.M)
    assert [name for name, _ in examples] == [script] * 3
    options = re.findall(r"(?<!\w)--[a-z-]+", " ".join(rest for _, rest in examples))
    assert set(options) <= set(re.findall(r"--[a-z-]+", told.partition("options:")[2]))


IMPORT = """
import argparse, glob, json, numpy, semantic_text_splitter, sqlite3, sys, textwrap, tqdm
def audit(event, args):
    if event.startswith(("open", "socket.", "subprocess.", "sqlite3.", "os.mkdir")):
        if not str(args[0]).endswith((".py", ".pyc")) and "__pycache__" not in str(args):
            print(event, args)
sys.path.insert(0, sys.argv[1])
sys.addaudithook(audit)
__import__(sys.argv[2])
"""


@each_small
def test_importing_a_script_defines_names_only(script):
    python = [sys.executable, "-c", IMPORT, str(ROOT), script.removesuffix(".py")]
    env = environment({"PYTHONDONTWRITEBYTECODE": "1"})
    done = subprocess.run(python, capture_output=True, text=True, env=env)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# --- planted faults ---

FAULTS = {
    "nothing": ("", ""),
    "embeddings.acreate": (".embeddings.create(", ".embeddings.acreate("),
    "completions.acreate": (".completions.create(", ".completions.acreate("),
    "delta.get": ("choice.message.content", 'choice.delta.get("content")'),
    "another embedder": (
        "    scores, rows = ",
        '    args.embed_model = "text-embedding-3-large"\n    scores, rows = ',
    ),
    "swapped vectors": ("for chunk in chunks])", "for chunk in reversed(chunks)])"),
    "a chat model that embeds": ('"text-embedding-3-small"\nEMBED_BATCH', '"gpt-4o"\nEMBED_BATCH'),
    "no system role": ('"role": "system"', '"role": "instructions"'),
    "the farthest first": ("in enumerate(found, 1)]", "in enumerate(reversed([*found]), 1)]"),
    "no question": ('prompt += f"Question: {question}"', "pass"),
    "a passage too few": ("in hits:\n        prompt", "in hits[1:]:\n        prompt"),
    "long vectors": ("return vectors / np", "return vectors * 2 / np"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught_by_the_contract(llm, capsys, monkeypatch, fault):
    old, new = FAULTS[fault]
    source = (ROOT / "rag_faiss_openai.py").read_text()
    assert old in source, "the script has changed: plant the fault anew"
    module = types.ModuleType("rag_planted")
    monkeypatch.setitem(sys.modules, "rag_planted", module)
    exec(compile(source.replace(old, new, 1), "rag_planted.py", "exec"), vars(module))
    faults = demonstration_faults(call(module, capsys, "--json"))
    assert bool(faults) == (fault != "nothing"), faults


# --- the CPU build of torch ---


@pytest.fixture
def undated_index(tmp_path):
    """An index with torch and without upload dates, as PyTorch's own: its URL."""
    folder = tmp_path / "index" / "torch"
    folder.mkdir(parents=True)
    name = "torch-2.99.0+cpu-py3-none-any.whl"
    with zipfile.ZipFile(folder / name, "w") as wheel:
        info = "torch-2.99.0+cpu.dist-info"
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: torch\nVersion: 2.99.0+cpu"
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true")
        wheel.writestr(f"{info}/RECORD", "")
    (folder / "index.html").write_text(f'<a href="{name}">{name}</a>')  # PEP 503
    handler = partial(SimpleHTTPRequestHandler, directory=folder.parent)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,)).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("script", WITH_TORCH)
def test_the_cpu_build_of_torch_is_found_once_uncommented(script, undated_index, tmp_path):
    [edit] = re.findall(r"sed -i '(.+?)'", (ROOT / "README.md").read_text())
    block = subprocess.check_output(["sed", edit, ROOT / script], text=True).partition('"""')[0]
    torch = next(name for name in read_block(block)["dependencies"] if name.startswith("torch"))
    block = re.sub(r"(?s)# dependencies = \[.*?\n# \]", f'# dependencies = ["{torch}"]', block)
    block = block.replace("https://download.pytorch.org/whl/cpu", undated_index)
    block = block.replace("sys_platform == 'linux'", f"sys_platform == '{sys.platform}'")

    def resolve(block):
        copy = tmp_path / script
        copy.write_text(f"{block}from importlib.metadata import version\nprint(version('torch'))")
        uv_run = ["uv", "run", "--no-cache", "--no-config", copy]
        return subprocess.run(uv_run, env=clean_environment(), capture_output=True, text=True)

    done = resolve(block)
    assert done.stdout == "2.99.0+cpu\n", done.stderr
    without = resolve(re.sub(r"(?m)^# exclude-newer.*false.*\n", "", block))
    assert without.returncode != 0
    assert "missing an upload date" in without.stderr
