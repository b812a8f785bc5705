# /// script
# requires-python = ">=3.11"
# ///
"""Compare the sections that the scripts share, and the versions that they ask for.

    uv run tools/sync_shared.py                            # name each difference
    uv run tools/sync_shared.py --fix rag_faiss_openai.py  # copy its sections into the others

A section starts with a line `# --- title ---`. Sections with the same title are the same to the
letter in all scripts. Dependencies and `exclude-newer` agree with pyproject.toml.
"""

from __future__ import annotations

import argparse
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def split_sections(text: str) -> dict[str, str]:
    """Split a script into its sections by title; "" has what stands before the first."""
    parts = re.split(r"(?m)^# --- (.+) ---$", text)
    return {"": parts[0]} | dict(zip(parts[1::2], parts[2::2], strict=True))


def join_sections(sections: dict[str, str]) -> str:
    """Undo split_sections."""
    return "".join(
        f"# --- {title} ---{text}" if title else text for title, text in sections.items()
    )


def read_versions(name: str, text: str) -> dict[str, str]:
    """Read what a PEP 723 block or pyproject.toml fixes: Python, `exclude-newer`, dependencies."""
    if not name.endswith(".toml"):
        block = re.search(r"(?m)^# /// script\n((?:#.*\n)+?)# ///$", text)
        text = re.sub(r"(?m)^# ?", "", block[1]) if block else ""
    data = tomllib.loads(text)
    project = data.get("project", data)
    groups = data.get("dependency-groups", {"dev": data.get("dependencies", [])})
    versions = {re.split(r"[\[<>=!~ ]", entry)[0]: entry for entry in groups["dev"]}
    versions["exclude-newer"] = data["tool"]["uv"]["exclude-newer"]
    versions["requires-python"] = project["requires-python"]
    return versions


def main(argv: list[str] | None = None) -> int:
    """Compare the scripts, or copy the sections of one. Returns 1 if there are differences."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare only: the default")
    parser.add_argument("--fix", metavar="SCRIPT", help="copy its sections into the other scripts")
    args = parser.parse_args(argv)

    scripts = {path.name: split_sections(path.read_text()) for path in ROOT.glob("rag_*.py")}
    if args.fix:
        right = scripts[args.fix]
        for name, sections in scripts.items():
            common = {title: right[title] for title in sections if title and title in right}
            (ROOT / name).write_text(join_sections(sections | common))
        return 0

    differences = []
    first: dict[str, str] = {}
    for name, sections in sorted(scripts.items()):
        for title, text in sections.items():
            other = first.setdefault(title, name)
            if title and text.rstrip() != scripts[other][title].rstrip():
                differences.append(f"{name}: section '{title}' differs from that in {other}")
    project = read_versions("pyproject.toml", (ROOT / "pyproject.toml").read_text())
    for name, sections in sorted(scripts.items()):
        for key, wanted in read_versions(name, sections[""]).items():
            if project.get(key) != wanted:
                differences.append(f"{name}: {wanted}, but pyproject.toml has {project.get(key)}")
    print("\n".join(differences) or f"{len(scripts)} scripts agree")
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
