"""What the two commands share: errors as one sentence, progress, and one JSON result."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table
from rich.text import Text

from ms_quant.diffusers.directory import is_diffusers
from ms_quant.errors import MsQuantError
from ms_quant.files.lock import BusyError
from ms_quant.formats.source_kind import find_model
from ms_quant.pipeline.defaults import DEFAULTS
from ms_quant.progress import BlockProgress, of_blocks

STDERR = Console(stderr=True)
INTERRUPTED = 130
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON result on standard output.")]
CalibOption = Annotated[
    Path | None, typer.Option(help="Calibration data: text, JSON records, .parquet, .npz.")
]
SamplesOption = Annotated[
    int | None,
    typer.Option(help=f"Windows of calibration data. Default: {DEFAULTS.samples}", min=1),
]
SeedOption = Annotated[
    int | None,
    typer.Option(help=f"Seed of the choice of windows. Default: {DEFAULTS.seed}", min=0),
]
DtypeOption = Annotated[
    str | None, typer.Option(help="Type of what stays float: bfloat16 or float16.")
]
JobOption = Annotated[Path | None, typer.Option(help="Job directory. Default: OUTPUT.job")]
KeepJobOption = Annotated[bool, typer.Option("--keep-job", help="Leave the job directory.")]
AnyEnvironmentOption = Annotated[
    bool, typer.Option("--any-environment", help="Resume under other versions, CPU or threads.")
]


class Interrupted(BaseException):
    """Ctrl-C. Not a KeyboardInterrupt, which the command-line library ends without a word."""


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise Interrupted


def run(app: typer.Typer) -> NoReturn:
    """Runs a command line; every failure is one sentence and a non-zero exit status."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored
        signal.signal(signal.SIGINT, _interrupt)
    try:
        app()
    except MsQuantError as error:
        fail(str(error))
    except OSError as error:
        fail(f"{error.filename or 'input or output'}: {error.strerror or error}")
    except (MemoryError, RuntimeError) as error:
        fail(_first_line(error))
    except Interrupted:
        fail("interrupted", INTERRUPTED)
    except Exception as error:
        fail(f"internal error: {_first_line(error)} (please report)")
    raise SystemExit(0)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no further details'}"


def fail(message: str, status: int = 1) -> NoReturn:
    STDERR.print(f"error: {message}", style="red", markup=False, highlight=False, soft_wrap=True)
    raise SystemExit(status)


def note(message: str) -> None:
    """One line for the reader, on standard error."""
    STDERR.print(message, markup=False, highlight=False, soft_wrap=True)


def given_model(path: Path | None) -> Path | None:
    """The model directory that an argument stands for; says so where it is another.

    Raises:
        MsQuantError: it is none.
    """
    if path is None:
        return None
    found = find_model(path)
    for text in found.notes:
        note(f"note: {text}")
    return found.directory


def given_directory(path: Path | None) -> Path | None:
    """The same, or a directory of diffusers, for the commands that take both."""
    return path if path is not None and is_diffusers(path) else given_model(path)


@contextmanager
def naming_leftovers(
    output: Path, job: Path | None = None, formats: Sequence[str] = ()
) -> Iterator[None]:
    """Says what a command that fails leaves behind, and what to do with it.

    Args:
        output: the directory that it makes.
        job: the job directory; None is the usual one.
        formats: names of the outputs in it, where there are several.
    """
    try:
        yield
    except BusyError:
        raise
    except BaseException:
        if not output.name:
            raise
        job = job or output.with_name(f"{output.name}.job")
        outputs = [output / name for name in formats] if len(formats) > 1 else [output]
        directories = [job, job.with_name(f"{job.name}.measure")]
        directories += [path.with_name(f"{path.name}.partial") for path in outputs]
        left = [str(path) for path in directories if path.name and path.is_dir()]
        if left:
            verb, them = ("stays", "it") if len(left) == 1 else ("stay", "them")
            note(
                f"note: {' and '.join(left)} {verb}: the command that began {them} goes on where "
                f"it stopped; delete {them} to start again"
            )
        raise


def emit(result: dict[str, Any], as_json: bool, show: Callable[[dict[str, Any]], None]) -> None:
    """The result of a command: JSON on standard output, or a table."""
    if as_json:
        print(json.dumps(result, indent=2, allow_nan=False))
    else:
        show(result)


class Steps:
    """The bars of a command: called with a step's name and how much of that step is done."""

    def __init__(self, progress: Progress):
        self.progress, self._tasks = progress, dict[str, TaskID]()

    def __call__(self, step: str, part: float) -> None:
        done = round(part * 1000)
        if step not in self._tasks:
            self._tasks[step] = self.progress.add_task(step, total=1000, completed=done, said="")
        self.progress.update(self._tasks[step], completed=done)

    def say(self, step: str, text: str) -> None:
        """Shows a few words beside the bar of a step that has begun."""
        if step in self._tasks:
            self.progress.update(self._tasks[step], said=text)


@contextmanager
def step_progress() -> Iterator[Steps]:
    """A bar for each step of a long command, with an estimate of what remains, on standard error.

    The estimate counts from the step's first call, so a resumed job is not promised the pace of
    what was finished before.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(20),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[said]}", markup=False),
    )
    with Progress(*columns, console=STDERR) as progress:
        yield Steps(progress)


@contextmanager
def block_progress(title: str, blocks: int) -> Iterator[BlockProgress]:
    """A bar over the blocks of a model."""
    with step_progress() as step:
        yield of_blocks(step, title, blocks)


def use_mindspore() -> None:
    """Prepares MindSpore for a command, before anything else imports it.

    On CPU, blocking launches are far faster.
    """
    with _interrupts_deferred():
        import mindspore

        mindspore.runtime.launch_blocking()
        one = mindspore.Tensor([[1.0]])
        mindspore.ops.matmul(one, one).asnumpy()


@contextmanager
def _interrupts_deferred() -> Iterator[None]:
    """Ctrl-C counts after this, and as Python handles it.

    Half an import of MindSpore crashes at exit; and its first operator starts a thread that takes
    SIGINT over, to end the process with SIGTERM.
    """
    handler, seen = signal.getsignal(signal.SIGINT), []
    if handler is None:  # not Python's, so not ours to change
        yield
        return
    if callable(handler):
        signal.signal(signal.SIGINT, lambda *arguments: seen.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if seen and callable(handler):
        handler(*seen[0])


def human_bytes(count: float) -> str:
    """1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def show_fields(result: dict[str, Any]) -> None:
    """A flat result as two columns."""
    table = Table(show_header=False, box=None)
    for key, value in result.items():
        if value is None:
            continue
        if key.endswith(("_bytes", "bytes_per_token")) or key == "bytes":
            value = f"{value:,} ({human_bytes(value)})"
        elif isinstance(value, float):
            value = f"{value:.5g}"
        elif isinstance(value, dict):
            value = "\n".join(f"{name}: {_inline(part)}" for name, part in value.items()) or "none"
        elif isinstance(value, list):
            value = "\n".join(map(str, value)) or "none"
        table.add_row(key.replace("_", " "), Text(str(value)))
    Console().print(table)


def wide_table(*titles: str) -> Table:
    """One whose words are broken rather than cut off."""
    return Table(*(Column(title, overflow="fold") for title in titles))


def _inline(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    return ", ".join(f"{part} {name.replace('_', ' ')}" for name, part in value.items())


def exit_if_problems(problems: Sequence[str]) -> None:
    """Ends a verification that found something, with status 1."""
    if problems:
        sys.stdout.flush()
        fail(f"{len(problems)} problem{'s' if len(problems) > 1 else ''} found")
