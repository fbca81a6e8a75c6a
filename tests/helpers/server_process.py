"""``ms-quant serve`` in a process of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

COMMAND = "import sys; from ms_quant.cli.main import main; sys.argv[0] = 'ms-quant'; main()"


@dataclass
class Served:
    """A server that runs.

    Attributes:
        process: it.
        address: ``http://host:port``.
        lines: what it wrote.
    """

    process: subprocess.Popen[str]
    address: str
    lines: list[str] = field(default_factory=list)

    def stop(self, number: int = signal.SIGTERM, seconds: float = 30) -> int:
        """Its status after a signal."""
        self.process.send_signal(number)
        return self.process.wait(seconds)


@contextmanager
def served(model: Path, *options: object) -> Iterator[Served]:
    """A server of a model on a port that is free, ended at the end."""
    arguments = [sys.executable, "-c", COMMAND, "serve", str(model), "--port", "0"]
    process = subprocess.Popen(
        [*arguments, *map(str, options)], stderr=subprocess.PIPE, text=True, env={**os.environ}
    )
    lines: list[str] = []
    found, ready = [""], threading.Event()

    def read() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line)
            if told := re.search(r"served at (http://\S+)/v1", line):
                found[0] = told[1]
                ready.set()
        ready.set()

    threading.Thread(target=read, daemon=True).start()
    try:
        assert ready.wait(60) and found[0], "".join(lines)
        yield Served(process, found[0], lines)
    finally:
        process.kill()
        process.wait()
