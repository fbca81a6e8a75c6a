"""DeepSeek-R1, 46,183 tensors and 30,518 groups, is planned, described and read back in seconds.

No weight exists: its files are headers and holes. It takes a while, as each format has a process of
its own whose memory is looked at; nothing smaller shows a step that is quadratic.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import plan_r1
import pytest

SECONDS, MEGABYTES = 30, 1000


@pytest.mark.parametrize(
    ("format", "scheme"),
    [
        ("golden-stick", "W8A8,mtp=FLOAT"),
        ("ascend", "W8A8_DYNAMIC,mtp=W8A8_DYNAMIC"),
        ("compressed-tensors", "W8A8_DYNAMIC"),
    ],
)
def test_r1_is_planned_described_and_read(format: str, scheme: str, tmp_path: Path) -> None:
    command = [sys.executable, plan_r1.__file__, str(tmp_path), format, scheme]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout.splitlines()[-1])
    print(found["seconds"], found["MB"], "MB")
    assert (found["tensors"], found["groups"]) == (46_183, 30_518)
    assert found["same"] and not found["problems"]
    assert 690e9 < found["output_bytes"] < 702e9
    assert "mlp.gate of layers 3-61" in found["float_lines"] and len(found["float_lines"]) <= 3
    spent = {name: s for name, s in found["seconds"].items() if not name.startswith("making")}
    assert sum(spent.values()) < SECONDS and found["MB"] < MEGABYTES, found
