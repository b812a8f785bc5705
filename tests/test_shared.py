"""What every script keeps to: equal copies, an import that only defines names, a fast `--help`."""

# ruff: noqa: D103 - the names of the tests are their docstrings

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT, clean_environment

SCRIPTS = sorted(path.name for path in ROOT.glob("rag_*.py"))
CANONICAL = "rag_faiss_openai.py"
HEAVY = ["torch", "sentence_transformers", "chromadb", "faiss", "openai", "anthropic", "numpy"]
HEAVY += ["xllamacpp", "pypdf", "bs4", "docx2txt", "gguf", "tokenizers", "starlette", "uvicorn"]
IN_NUMPY = "rag_explainer.py"  # whose every function computes: it imports numpy, 0.1 s, at its top
each_script = pytest.mark.parametrize("script", SCRIPTS)


def block_of(script):
    text = (ROOT / script).read_text("utf-8")
    block = re.search(r"(?m)^# /// script\n((?:#.*\n)+?)# ///$", text)
    assert block, f"{script} has no PEP 723 block"
    return tomllib.loads(re.sub(r"(?m)^# ?", "", block[1]))


# --- the copies ----------------------------------------------------------------------------------


def sync(root, *args):
    command = [sys.executable, str(root / "tools" / "sync_shared.py"), *args]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture
def copies(tmp_path):
    """A copy of the scripts, the tool and pyproject.toml; another.py copies the canonical one."""
    root = tmp_path / "copies"
    (root / "tools").mkdir(parents=True)
    for name in [*SCRIPTS, "pyproject.toml", "tools/sync_shared.py"]:
        shutil.copy(ROOT / name, root / name)
    return root


def test_the_shared_parts_of_all_scripts_are_equal():
    done = sync(ROOT)
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)


OTHER = "rag_local_ollama.py"
CHANGES = [
    ("load_documents", 'raise Failure(f"no such file', 'raise Failure(f"no file'),
    ("Chunk", "    @property\n", ""),
    ("TOP_K", "# more passages find more", "# more passages find less"),
    ("openai", '"openai>=3.51,<4"', '"openai>=3.50,<4"'),
    ("exclude-newer", '2026-11-14T00:00:00Z"', '2026-11-15T00:00:00Z"'),
    ("requires-python", '">=3.11"', '">=3.12"'),
]


@pytest.mark.parametrize(("name", "old", "new"), CHANGES, ids=[change[0] for change in CHANGES])
def test_a_change_in_one_copy_is_named_and_mended(copies, name, old, new):
    before = {path: path.read_bytes() for path in sorted(copies.glob("*.*"))}
    target = copies / OTHER
    assert old in target.read_text()
    target.write_text(target.read_text().replace(old, new, 1))
    done = sync(copies, "--check")
    assert done.returncode == 1
    [line] = done.stdout.splitlines()
    assert line.startswith(f"{OTHER}: {name} ")
    assert line.endswith(": uv run tools/sync_shared.py --fix")
    assert target.read_bytes() != before[target], "--check must not write"
    mended = sync(copies, "--fix")
    assert mended.returncode == 0
    assert f"{OTHER}: {name} " in mended.stdout
    assert {path: path.read_bytes() for path in sorted(copies.glob("*.*"))} == before


@pytest.mark.parametrize("name", ["TOP_K", "Document", "split_text", "printable", "main"])
def test_a_part_that_is_missing_is_put_back_in_its_place(copies, name):
    target = copies / OTHER
    before, tree = target.read_text(), ast.parse(target.read_text())
    node = next(
        node
        for node in tree.body
        if name == getattr(node, "name", getattr(getattr(node, "targets", [None])[0], "id", None))
    )
    lines = before.splitlines(keepends=True)
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
    blanks = 0 if isinstance(node, ast.Assign) else 2
    target.write_text("".join(lines[: first - 1 - blanks] + lines[node.end_lineno :]))
    done = sync(copies)
    assert f"{OTHER}: {name} is missing" in done.stdout
    assert sync(copies, "--fix").returncode == 0
    assert target.read_text() == before


def test_a_duplicate_that_no_group_declares_is_named(copies):
    for name in (CANONICAL, OTHER):
        with (copies / name).open("a") as file:
            file.write("\n\ndef sneaky():\n    return 1\n")
    done = sync(copies)
    assert done.returncode == 1
    assert "sneaky is that of" in done.stdout
    assert sync(copies, "--fix").returncode == 1, "the table is mended by hand"


def test_an_exception_that_is_none_is_named(copies):
    shutil.copy(copies / CANONICAL, copies / "rag_async.py")
    done = sync(copies)
    assert done.returncode == 1
    assert "rag_async.py: main is equal: take it out of EXCEPTIONS" in done.stdout


def test_the_table_may_be_checked_with_the_canonical_script_alone(copies):
    for name in SCRIPTS:
        if name != CANONICAL:
            (copies / name).unlink()
    assert sync(copies).stdout == ""


# --- each script ---------------------------------------------------------------------------------

IMPORTED = """
import json, socket, sys
opened, heavy = [], json.loads(sys.argv[2])
def audit(event, args):
    if event.startswith("socket.") or (event == "open" and isinstance(args[0], str)):
        name, how = str(args[0]), args[1] if event == "open" else "connect"
        read = how in ("r", "rb", None) and not (args[2] or 0) & 0x3 if event == "open" else False
        if not (read and name.endswith((".py", ".pyc", ".pth", ".so", "METADATA"))):
            if "__pycache__" not in name:
                opened.append(f"{event} {name} {how}")
sys.path.insert(0, sys.argv[1])
import filelock, tqdm, argparse  # light ones, which may read what they like
sys.addaudithook(audit)
try:
    module = __import__(sys.argv[3])
    code = module.main(json.loads(sys.argv[4])) if sys.argv[4] != "null" else 0
except SystemExit as end:
    code = end.code
print(json.dumps({"heavy": sorted(set(heavy) & set(sys.modules)), "opened": opened, "code": code}),
      file=sys.__stderr__)
"""


def imported(script, argv=None, env=None):
    """Import a script in a new process, call its main with `argv`, and tell what that loaded."""
    arguments = [str(ROOT), json.dumps(HEAVY), script.removesuffix(".py"), json.dumps(argv)]
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED, *arguments],
        capture_output=True,
        text=True,
        env=clean_environment() | (env or {}),
    )
    return json.loads(done.stderr.splitlines()[-1]), done


@each_script
def test_importing_a_script_only_defines_names(script):
    told, done = imported(script)
    assert told == {"heavy": ["numpy"] * (script == IN_NUMPY), "opened": [], "code": 0}
    assert done.stdout == ""


@each_script
@pytest.mark.parametrize(
    ("argv", "code"),
    [(["--help"], 0), (["--top-k", "0", "x"], 2), (["--no-such-option"], 2), ([""], 2)],
    ids=["help", "bad-value", "bad-option", "empty-question"],
)
def test_help_and_usage_errors_import_nothing_heavy(script, argv, code):
    told, done = imported(script, argv)
    assert (told["heavy"], told["code"]) == (["numpy"] * (script == IN_NUMPY), code)
    assert "Traceback" not in done.stderr
    assert bool(done.stdout) == (code == 0)
    if code == 0:
        doc = ast.get_docstring(ast.parse((ROOT / script).read_text()))
        assert doc
        assert doc in done.stdout


@each_script
def test_every_script_fixes_its_dependencies(script):
    block = block_of(script)
    names = [re.split(r"[\[<>=]", dependency)[0] for dependency in block["dependencies"]]
    assert names == sorted(names)
    for dependency in block["dependencies"]:
        assert re.fullmatch(r"[a-z0-9.-]+(\[\w+\])?(>=[\d.]+,<[\d.]+|==[\d.]+)", dependency), (
            dependency
        )
    dates = {block_of(name)["tool"]["uv"]["exclude-newer"] for name in SCRIPTS}
    own = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["uv"]["exclude-newer"]
    assert dates == {own}


@each_script
def test_the_packages_that_a_script_imports_are_its_dependencies(script):
    tree = ast.parse((ROOT / script).read_text())
    roots = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            roots.add((node.module or "").split(".")[0])
    named = {re.split(r"[\[<>=]", d)[0].replace("-", "_") for d in block_of(script)["dependencies"]}
    known = {"bs4": "beautifulsoup4", "faiss": "faiss_cpu"}
    known |= {"Stemmer": "pystemmer", "markdown_it": "markdown_it_py"}
    third_party = {known.get(name, name) for name in roots - sys.stdlib_module_names}
    brought = {"numpy", "transformers", "pydantic"}  # by faiss-cpu, sentence-transformers...
    assert third_party - brought <= named


@each_script
def test_the_docstring_of_a_script_shows_three_commands_that_exist(script):
    doc = ast.get_docstring(ast.parse((ROOT / script).read_text())) or ""
    commands = re.findall(r"^    uv run (\S+)(.*)$", doc, re.M)
    assert len(commands) == 3
    assert {name for name, _ in commands} == {script}
    options = {o for _, rest in commands for o in re.findall(r"(?<!\w)--[a-z-]+", rest)}
    told = imported(script, ["--help"])[1].stdout.partition("options:")[2]
    assert all(option in told for option in options)


@each_script
def test_a_script_has_the_shebang_the_guard_and_short_lines(script):
    text = (ROOT / script).read_text("utf-8")
    assert text.startswith("#!/usr/bin/env -S uv run --script\n# /// script\n")
    assert text.endswith("    sys.exit(main())\n")
    assert [n for n, line in enumerate(text.splitlines(), 1) if len(line) > 100] == []
    assert os.access(ROOT / script, os.X_OK)


def test_no_tracked_file_names_a_machine_or_an_index():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout: which files are tracked is unknown")
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    own = Path(__file__).name
    places = r"/(root|work|home/\w+|Users/\w+|tmp/wt-)/"
    places += r"|(127\.0\.0\.1|localhost|10\.\d+\.\d+\.\d+):\d+/(simple|pypi|root)"
    places += r"|https?://[^\s\"']*/simple\b"
    hits = [
        f"{file.name}: {match[0]}"
        for file in files
        if file.is_file() and file.name != own
        for match in re.finditer(places, file.read_bytes().decode("utf-8", "ignore"))
    ]
    assert hits == []


@each_script
def test_a_script_copied_alone_into_an_empty_folder_runs(script, run, tmp_path):
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(ROOT / script, alone)
    run(script, "--help")  # its environment may be made from the index; the copy's from the cache
    command = ["uv", "run", "--offline", script, "--help"]
    done = subprocess.run(
        command, cwd=alone, env=clean_environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    what = "SCRIPT" if script == "rag_compare.py" else "QUESTION"
    assert done.stdout.startswith(f"usage: uv run {script} [{what} ...]")
    assert [path.name for path in alone.iterdir()] == [script], "it left something behind"


# --- the guard -----------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["192.0.2.1", "api.openai.com"])
def test_the_guard_reports_what_leaves_loopback(loopback_only, host):
    import urllib.request

    with pytest.raises(OSError, match="beyond loopback"):
        urllib.request.urlopen(f"http://{host}/", timeout=2)
    assert host in loopback_only[0]
    loopback_only.clear()  # which would fail this test


def test_the_guard_ends_a_subprocess_that_leaves_loopback():
    from conftest import environment

    code = "import urllib.request as r\ntry: r.urlopen('http://192.0.2.1')\nexcept OSError: pass"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 97
    assert "beyond loopback: 192.0.2.1, port 80" in done.stderr
