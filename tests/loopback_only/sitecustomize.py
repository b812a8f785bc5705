"""Let a Python process connect to loopback only. `PYTHONPATH` with this folder does it by itself.

The tests' own process imports `guard`; a subprocess that reaches out is ended with exit code 97.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from typing import Any

LOUD = "the tests reached beyond loopback:"


def is_loopback(host: Any) -> bool:
    """Tell whether a host (None: this machine) is this machine, without asking a resolver."""
    name = host.decode() if isinstance(host, bytes) else str(host or "localhost")
    return name in ("localhost", "::1", "::", "0.0.0.0") or name.startswith("127.")


def guard(report: Callable[[str], None]) -> Callable[[], None]:
    """Patch `socket` to report what goes beyond loopback; what is returned undoes it."""
    kept = socket.socket.connect, socket.socket.connect_ex, socket.socket.sendto, socket.getaddrinfo

    def check(host: Any, port: Any = "?") -> None:
        if not is_loopback(host):
            report(f"{LOUD} {host}, port {port}")
            raise OSError(f"{LOUD} {host}, port {port}")

    def checked(original: Callable[..., Any]) -> Callable[..., Any]:
        def method(self: socket.socket, *args: Any) -> Any:
            if self.family in (socket.AF_INET, socket.AF_INET6):
                check(*args[-1][:2])
            return original(self, *args)

        return method

    def getaddrinfo(host: Any, port: Any, *args: Any, **options: Any) -> Any:
        check(host, port)
        return kept[3](host, port, *args, **options)

    def restore() -> None:
        patch(*kept)

    def patch(connect: Any, connect_ex: Any, sendto: Any, lookup: Any) -> None:
        for name, value in (("connect", connect), ("connect_ex", connect_ex), ("sendto", sendto)):
            setattr(socket.socket, name, value)
        socket.getaddrinfo = lookup

    patch(*map(checked, kept[:3]), getaddrinfo)
    return restore


def _end(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
    os._exit(97)


if __name__ == "sitecustomize" and os.environ.get("LOOPBACK_ONLY"):
    guard(_end)
