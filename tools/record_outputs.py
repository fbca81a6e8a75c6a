"""Shows that a change of the code changes no output: a sha256 of every file of many commands.

    python tools/record_outputs.py record before.json
    python tools/record_outputs.py check before.json

The commands are rows of ``recorded_commands.py``. They are run in this process by the entry
points of the installed distribution, so no module of it is named here. What is calibrated, and
what runs a model, depends on the machine: ``check`` says so and compares the rest where the
machine differs. It exits with 1 if an output differs, with 2 if none does but some could not be
compared.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import hashlib
import io
import json
import os
import platform
import re
import signal
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any

from recorded_commands import (
    COMMANDS,
    GIVEN,
    depends_on_machine,
    with_sources,
    words,
    write_files,
)
from small_models import MODELS, write_model

RECORD = "ms_quant.json"
NOT_DECIDED = ("record", "measured", "files", "sha256")
"""Entries of a record with versions, options, what reports show, or digests of what is compared
itself."""
COPIED = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
VALUES = ("perplexity", "loss", "text")
VECTORS = re.compile("avx|amx|fma|f16c|gfni|s?sse|asimd|sve|i8mm|bf16")
VARIABLES = re.compile("MS_QUANT_|OPENBLAS_|OMP_|MKL_|ONEDNN_|NPY_")
PACKAGES = ("numpy", "ml_dtypes", "mindspore")

Output = dict[str, str]
"""What is compared of a command: a file's path, or a value's name, to its sha256 or text."""


class Workplace:
    """A directory with the models, the recipes and what the commands have made so far."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.paths = {**GIVEN, **write_files(directory)}

    def run(self, name: str) -> Output:
        """Runs a command and says what came out; an error is an output, too."""
        for word in words(name):
            if word in MODELS and word not in self.paths:
                self.paths[word] = self.directory / word
                write_model(self.paths[word], MODELS[word])
        out = self.paths[name] = self.directory / f"output-{name}"
        paths = {word: str(path) for word, path in {**self.paths, "out": out}.items()}
        command, *arguments = (part.format(**paths) for part in COMMANDS[name].split())
        status, printed, errors = _call(command, [*arguments, "--json"])
        if status:
            last = errors.strip().splitlines()[-1:] or ["no message"]
            return {"failed": last[0].replace(str(self.directory), "")}
        if not out.is_dir():
            return _values(json.loads(printed))
        return _files(out) | (_decided(out) if depends_on_machine(name) else {})


def _call(command: str, arguments: list[str]) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of a command of the distribution."""
    (point,) = entry_points(group="console_scripts", name=command)
    main, output, errors = point.load(), io.StringIO(), io.StringIO()
    argv, interrupt = sys.argv, signal.getsignal(signal.SIGINT)
    sys.argv = [command, *arguments]
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            main()
        status = 0
    except SystemExit as stop:
        status = int(stop.code or 0)
    finally:
        sys.argv = argv
        signal.signal(signal.SIGINT, interrupt)  # the commands take it over
    return status, output.getvalue(), errors.getvalue()


def _files(directory: Path) -> Output:
    """Of each file that was made and has no versions, times or options in it."""
    return {
        path.relative_to(directory).as_posix(): _sha256(path.read_bytes())
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name not in (RECORD, *COPIED)
    }


def _decided(directory: Path) -> Output:
    """What calibration saw and decided, as our own record says it."""
    found = {}
    for path in sorted(directory.rglob(RECORD)):
        name = path.relative_to(directory).as_posix()
        for key, value in json.loads(path.read_text()).items():
            if key not in NOT_DECIDED:
                found[f"{name}: {key}"] = _sha256(json.dumps(value, sort_keys=True).encode())
    return found


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _values(result: dict[str, Any]) -> Output:
    """The numbers with all their digits, and the text, of a JSON result."""
    return {key: repr(value) for key, value in result.items() if key.startswith(VALUES)}


def machine() -> dict[str, Any]:
    """What sums of floats may depend on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": platform.machine(),
        "instruction sets": _instruction_sets(),
        "threads": cores,
        "variables": {key: os.environ[key] for key in sorted(os.environ) if VARIABLES.match(key)},
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _instruction_sets() -> str:
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.is_file() else ():
        key, _, flags = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return " ".join(sorted(set(filter(VECTORS.match, flags.split()))))
    return platform.processor()


def run_all(names: list[str]) -> dict[str, Output]:
    """The outputs of the commands; what only others read is run and left out."""
    outputs = {}
    with tempfile.TemporaryDirectory() as directory:
        place = Workplace(Path(directory))
        for name in with_sources(names):
            started = time.process_time()
            output = place.run(name)
            seconds = time.process_time() - started
            print(f"{name}: {len(output)} in {seconds:.1f} s", file=sys.stderr)
            if name in names:
                outputs[name] = output
    return outputs


def record(path: Path, names: list[str]) -> int:
    outputs = run_all(names)
    failed = [f"{name}: {out['failed']}" for name, out in outputs.items() if "failed" in out]
    if failed:
        print(*failed, sep="\n")
        return 1
    facts = {"machine": machine()} if any(map(depends_on_machine, outputs)) else {}
    path.write_text(json.dumps({**facts, "outputs": outputs}, indent=1) + "\n")
    print(f"{len(outputs)} commands, {sum(map(len, outputs.values()))} outputs in {path}")
    return 0


def check(path: Path, names: list[str]) -> int:
    recorded = json.loads(path.read_text())
    before: dict[str, Output] = recorded["outputs"]
    other = _differences(recorded.get("machine", {}), machine()) if "machine" in recorded else []
    left_out = [name for name in names if other and name in before and depends_on_machine(name)]
    compared = [name for name in names if name in before and name not in left_out]
    after = run_all(compared)
    changed = {name: _differences(before[name], after[name]) for name in compared}
    changed |= {name: ["no such command any more"] for name in before if name not in COMMANDS}
    lines = [f"{name}: {line}" for name, found in changed.items() for line in found]
    print(*lines, sep="\n", end="\n" if lines else "")
    same = sum(not found for found in changed.values())
    print(f"{same} of {len(changed)} commands have the outputs of {path}")
    new = [name for name in names if name not in before]
    if new:
        print(f"not compared: {len(new)} that are not in it: {', '.join(new)}")
    if left_out:
        print(
            f"not compared: {len(left_out)} that are calibrated or run a model, as this machine is "
            "not the recorded one:",
            *other,
            sep="\n  ",
        )
    return 1 if lines else 2 if left_out else 0


def _differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    keys = dict.fromkeys([*before, *after])
    return [
        f"{key} was {before.get(key, 'not there')}, is {after.get(key, 'not there')}"
        for key in keys
        if before.get(key) != after.get(key)
    ]


def chosen(patterns: list[str], data_free: bool) -> list[str]:
    """The commands that match one of the patterns, all if there is none."""
    names = [name for name in COMMANDS if not (data_free and depends_on_machine(name))]
    if patterns:
        names = [n for n in names if any(fnmatch.fnmatchcase(n, one) for one in patterns)]
    if not names:
        raise SystemExit(f"no command matches {' or '.join(patterns)}")
    return names


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("action", choices=("record", "check"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", action="append", default=[], help="glob pattern of commands")
    parser.add_argument("--data-free", action="store_true", help="those that any machine repeats")
    given = parser.parse_args()
    names = chosen(given.only, given.data_free)
    return (record if given.action == "record" else check)(given.file, names)


if __name__ == "__main__":
    raise SystemExit(main())
