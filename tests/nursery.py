"""Servers that are forked from one process with the imports made: seconds saved on each.

They are real processes, with a file for stderr, and can be killed; the guard around the network
holds in them too.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

from conftest import READY, ROOT, environment, wait_for

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
        os.dup2(os.open(given["log"], os.O_CREAT | os.O_WRONLY), 2)
        os.dup2(2, 1)
        sys.exit(rag.main(given["args"]))  # and a whole end of the interpreter after it
    print(pid, flush=True)
"""


class Nursery:
    """The process that forks the servers. Its `setup` imports all, and defines `rag`."""

    def __init__(self, folder: Path, setup: str) -> None:
        self.folder = folder
        self.servers: list[Server] = []
        self.process = subprocess.Popen(
            [sys.executable, "-c", PARENT.format(root=str(ROOT), setup=setup)],
            env=environment(),
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def close(self) -> None:
        """End the servers that still run, and the process."""
        for server in self.servers:
            server.end()
        self.process.communicate()

    def order(self, what: str, given: object) -> int | None:
        """Let the process start a server, or look for the end of one."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps([what, given]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, *args: object, env: dict[str, str]) -> Server:
        """Start a server."""
        log = self.folder / f"{len(self.servers)}.log"
        pid = self.order("start", {"args": [*map(str, args)], "env": env, "log": str(log)})
        assert pid
        self.servers.append(Server(self, pid, log))
        return self.servers[-1]


class Server:
    """A server in a process of its own."""

    def __init__(self, nursery: Nursery, pid: int, log: Path) -> None:
        self.nursery, self.pid, self._log = nursery, pid, log
        self.code: int | None = None

    @property
    def log(self) -> str:
        """What it has written."""
        return self._log.read_text() if self._log.exists() else ""

    def url(self) -> str:
        """Return its address, once it is ready."""

        def ready() -> re.Match[str] | None:
            self.code = self.nursery.order("poll", self.pid)
            assert self.code is None, self.log
            return re.search(f"{READY}\n", self.log)

        return wait_for(ready)[1]

    def end(self, number: int = signal.SIGTERM) -> int | None:
        """Send a signal, and wait for the end: the exit code. One that hangs is killed."""
        if self.code is None:
            os.kill(self.pid, number)
            killer = threading.Timer(120, os.kill, (self.pid, signal.SIGKILL))
            killer.start()
            self.code = self.nursery.order("wait", self.pid)
            killer.cancel()
        assert not re.search("Traceback|terminate called", self.log), self.log
        return self.code
