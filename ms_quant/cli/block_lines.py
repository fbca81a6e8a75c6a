"""What a command says of each finished block of a job: its worst group, and what is far off."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from ms_quant.cli.console import STDERR, Steps, note
from ms_quant.job.directory import JobDirectory
from ms_quant.models.names import block_prefix
from ms_quant.pipeline.siblings import GroupWatch, percent
from ms_quant.plan.plan import Plan


class BlockLines:
    """Shows the worst group of the last block beside the bar; without a terminal, in a line for
    each block. Warns of a group that is far worse than others of its kind.

    Args:
        steps: the bars of the command.
        step: name of the bar.
        plan: what is done.
        job: gives the job, some blocks of which may be finished; asked when one is.
    """

    def __init__(self, steps: Steps, step: str, plan: Plan, job: Callable[[], JobDirectory]):
        self.steps, self.step, self.blocks = steps, step, plan.config.num_blocks
        self.started, self.before = time.monotonic(), 0

        def first_linear(index: int, name: str) -> str:
            member = plan.config.block(index).group(name).members[0]
            return f"{block_prefix(index)}{member}"

        self.watch = GroupWatch(first_linear)
        self.job, self.done = job, 0

    def __call__(self, index: int, errors: Mapping[str, float]) -> None:
        """A block is finished."""
        if not self.done:
            self._look_back(index)
        self.done += 1
        worst = self.watch.add(index, errors)
        if worst is not None:
            self.steps.say(self.step, str(worst))
        if not STDERR.is_terminal:
            note(
                self._line(index, f"; worst group {worst.name}, error {percent(worst.error)}")
                if worst
                else self._line(index, "")
            )
        for text in self.watch.warnings(index, errors):
            note(f"warning: {text}")

    def _look_back(self, index: int) -> None:
        """The blocks that were finished before this run."""
        job = self.job()
        for other in sorted(job.finished() - {index}):
            self.watch.add(other, job.errors(other))
            self.before += 1
        self.done = self.before

    def _line(self, index: int, worst: str) -> str:
        took = time.monotonic() - self.started
        left = took / (self.done - self.before) * (self.blocks - self.done)
        return (
            f"{self.step}: block {index} finished, {self.done} of {self.blocks}, "
            f"{in_words(took)} so far, about {in_words(left)} left{worst}"
        )


def in_words(seconds: float) -> str:
    """75 -> "1 min 15 s"; 8000 -> "2 h 13 min"."""
    whole = round(seconds)
    minutes, hours = whole // 60, whole // 3600
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"
