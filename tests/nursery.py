"""Runs of a script that are forked from one process with the imports made: seconds saved on each.

They are real processes, with files for stdout and stderr, and can be killed; the guard around the
network holds in them too.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import ROOT, THEIRS, environment

PARENT = """
import json, os, sys
sys.path.insert(0, {root!r})
{setup}
for line in sys.stdin:
    order, given = json.loads(line)
    if order != "start":
        pid, status = os.waitpid(given, os.WNOHANG if order == "poll" else 0)
        print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
        continue
    pid = os.fork()
    if not pid:
        os.environ.update(given["env"])
        for stream, name in ((1, given["out"]), (2, given["err"])):
            os.dup2(os.open(name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), stream)
        sys.exit(rag.main(given["args"]))  # and a whole end of the interpreter after it
    print(pid, flush=True)
"""


class Nursery:
    """The process that forks the runs. Its `setup` imports all, and defines `rag`, the script."""

    def __init__(self, folder: Path, setup: str) -> None:
        self.folder = folder
        self.pids: list[int] = []
        self.codes: dict[int, int] = {}
        self.process = subprocess.Popen(
            [sys.executable, "-c", PARENT.format(root=str(ROOT), setup=setup)],
            env=environment(),
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def close(self) -> None:
        """End the process; runs that are under way go on."""
        self.process.communicate()

    def _order(self, what: str, given: object) -> int | None:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps([what, given]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(
        self, *args: object, env: dict[str, str] | None = None, err: str | None = None
    ) -> int:
        """Start a run, with the test's fake: its process id. `err`: a terminal for its stderr."""
        place = self.folder / str(len(self.pids))
        fakes = {name: value for name, value in os.environ.items() if name.startswith(THEIRS)}
        given = {
            "args": [*map(str, args)],
            "env": fakes | (env or {}),
            "out": f"{place}.out",
            "err": err or f"{place}.err",
        }
        pid = self._order("start", given)
        assert pid
        self.pids.append(pid)
        return pid

    def is_running(self, pid: int) -> bool:
        """Whether a run has not ended yet."""
        if pid not in self.codes and (code := self._order("poll", pid)) is not None:
            self.codes[pid] = code
        return pid not in self.codes

    def wait(self, pid: int, seconds: float = 120) -> tuple[int, str]:
        """Wait for a run: its exit code and its stderr. One that hangs is killed."""
        if self.is_running(pid):
            killer = threading.Timer(seconds, os.kill, (pid, signal.SIGKILL))
            killer.start()
            code = self._order("wait", pid)
            killer.cancel()
            assert code is not None
            self.codes[pid] = code
        return self.codes[pid], self.errors(pid)

    def output(self, pid: int) -> str:
        """What a run has written to stdout."""
        return self._read(pid, "out")

    def errors(self, pid: int) -> str:
        """What a run has written to stderr, unless that is a terminal."""
        return self._read(pid, "err")

    def _read(self, pid: int, stream: str) -> str:
        path = self.folder / f"{self.pids.index(pid)}.{stream}"
        return path.read_text() if path.exists() else ""


def wait_for(condition: Callable[[], Any], seconds: float = 120) -> Any:
    """Wait until something is so, and return it."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)
    return found
