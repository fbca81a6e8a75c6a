"""Chat templates are rendered in a process of their own, with little time and memory.

The sandbox of jinja2 keeps a template from running code, but not from counting for ever or from
writing gigabytes. The process stays for the next conversations; one that had to be ended is
replaced. It is told by pickles, which are ours, and answers in plain text.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import selectors
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

CPU_SECONDS = 5.0  # of one conversation
WAIT_SECONDS = 60.0  # for it, on a machine that does much else
MEMORY_BYTES = 1 << 30  # more than the process has at first
MOST_BYTES = 256 << 20  # of what it answers
WRITTEN, FAILED = b"w", b"f"
HEADER = struct.Struct("<cQ")
START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from ms_quant.data.template_process import main; main()"
)


def render_template(template: str, names: Mapping[str, Any]) -> str:
    """What a template writes.

    Args:
        template (str): in Jinja.
        names (Mapping): what it may use.

    Returns:
        str, at most 64 Mi characters.

    Raises:
        ValueError: it fails or refuses, or takes too much time or memory; says why.
    """
    return _renderer.render(template, names)


class Renderer:
    """The process that renders, started when it is needed first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def render(self, template: str, names: Mapping[str, Any]) -> str:
        """See :func:`render_template`."""
        asked = pickle.dumps((template, dict(names)))
        with self._lock:
            try:
                child = self._running()
                kind, answer = _ask(child, asked)
            except (OSError, EOFError, TimeoutError) as error:
                self._end()
                raise ValueError(_why(error)) from None
            except BaseException:
                self._end()  # its answer would be taken for that of the next question
                raise
        text = answer.decode("utf-8", "surrogatepass")
        if kind == WRITTEN:
            return text
        raise ValueError(text)

    @property
    def process(self) -> int | None:
        """Its number, if it runs."""
        return None if self._child is None else self._child.pid

    def _running(self) -> subprocess.Popen[bytes]:
        if self._owner != os.getpid():  # after a fork it is the parent's
            self._child, self._owner = None, os.getpid()
        if self._child is None or self._child.poll() is not None:
            self._end()
            self._child = subprocess.Popen(
                [sys.executable, "-I", "-c", START, json.dumps(sys.path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        return self._child

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


_renderer = Renderer()


def _why(error: Exception) -> str:
    if isinstance(error, OSError) and not isinstance(error, BrokenPipeError | TimeoutError):
        return f"no process can be started for it: {error.strerror or error}"
    return f"it takes more than {CPU_SECONDS:g} s or {MEMORY_BYTES >> 20} MB"


def _ask(child: subprocess.Popen[bytes], asked: bytes) -> tuple[bytes, bytes]:
    assert child.stdin is not None and child.stdout is not None
    child.stdin.write(struct.pack("<Q", len(asked)) + asked)
    child.stdin.flush()
    until = time.monotonic() + WAIT_SECONDS
    kind, size = HEADER.unpack(_read(child.stdout, HEADER.size, until))
    if kind not in (WRITTEN, FAILED) or size > MOST_BYTES:
        raise EOFError
    return kind, _read(child.stdout, size, until)


def _read(pipe: IO[bytes], size: int, until: float) -> bytes:
    found = bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while len(found) < size:
            if not selector.select(max(0.0, until - time.monotonic())):
                raise TimeoutError
            part = os.read(pipe.fileno(), min(size - len(found), 1 << 20))
            if not part:
                raise EOFError
            found += part
    return bytes(found)


def main() -> None:
    """What the process does: answers until nobody asks any more."""
    from ms_quant.data.chat_template import render_here

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    asked, told = sys.stdin.buffer, sys.stdout.buffer
    _limit_memory()
    while header := asked.read(8):
        template, names = pickle.loads(asked.read(struct.unpack("<Q", header)[0]))
        _limit_time()
        try:
            kind, answer = WRITTEN, render_here(template, names)
        except ValueError as error:
            kind, answer = FAILED, str(error)
        except MemoryError:
            return
        raw = answer.encode("utf-8", "surrogatepass")
        told.write(HEADER.pack(kind, len(raw)) + raw)
        told.flush()


def _limit_memory() -> None:
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        used = pages * resource.getpagesize()
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        wanted = used + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (wanted if most < 0 else min(wanted, most), most))


def _limit_time() -> None:
    """The system ends the process when it has computed for so long from now on."""
    if hasattr(signal, "ITIMER_PROF"):
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
