"""What a command costs: seconds of CPU and peak memory of its processes."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

POLL_SECONDS = 0.005
OURS = "import sys; sys.argv[0] = 'ms-quant'; from ms_quant.cli.main import main; main()"
"""What Python runs for ``ms-quant``, with the arguments that follow."""


@dataclass
class Cost:
    """What a command has taken.

    Attributes:
        cpu: seconds of all its processes.
        wall: seconds until it ended.
        resident: the most bytes that its processes held at a time, pages of files among them.
        anonymous: the same without pages of files, which can be dropped under pressure.
    """

    cpu: float
    wall: float
    resident: int
    anonymous: int


def limited_to(threads: int) -> dict[str, str]:
    """Variables that bound the threads of every library that is measured."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    return dict.fromkeys(names, str(threads))


def cost(command: Sequence[str], variables: Mapping[str, str] | None = None) -> Cost:
    """Runs a command in a process of its own.

    ``ru_maxrss`` is not used: in it count the pages of this process, from which it was forked.
    VmHWM begins again when the command is executed, which it is before it is looked at.

    Raises:
        SystemExit: the command failed; says with what last words.
    """
    with tempfile.TemporaryFile() as log:
        started = time.monotonic()
        environment = {**os.environ, **(variables or {})}
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        found = Cost(0.0, 0.0, 0, 0)
        while True:
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
            if ended:
                break
            _look(process.pid, found)
            time.sleep(POLL_SECONDS)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            last = log.read().decode(errors="replace")[-3000:]
            raise SystemExit(f"{' '.join(command)}:\n{last}")
    found.cpu, found.wall = usage.ru_utime + usage.ru_stime, time.monotonic() - started
    return found


def _look(pid: int, found: Cost) -> None:
    fields = [_memory(one) for one in _tree(pid)]
    found.resident = max(found.resident, sum(one["VmHWM"] for one in fields))
    found.anonymous = max(found.anonymous, sum(one["RssAnon"] for one in fields))


def _memory(pid: int) -> dict[str, int]:
    values = {"VmHWM": 0, "RssAnon": 0}
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # it has ended
        return values
    for line in lines:
        name, _, rest = line.partition(":")
        if name in values:
            values[name] = int(rest.split()[0]) << 10
    return values


def _tree(pid: int) -> list[int]:
    """A process and those that it started."""
    found = [pid]
    for one in found:
        try:
            found += map(int, Path(f"/proc/{one}/task/{one}/children").read_text().split())
        except OSError:
            continue
    return found
