"""What maps the work of a job over its blocks. Each executor makes the same bytes."""

from __future__ import annotations

from typing import Protocol

from ms_quant.quantization.work import BlockWork


class Executor(Protocol):
    """Finishes every unfinished block of a job."""

    def run(self, work: BlockWork) -> None:
        """Observes and finishes blocks, in any order.

        Raises:
            MsQuantError: a block cannot be observed or finished; those that are stay.
        """


class InOrder:
    """In this process, one block after the other."""

    def run(self, work: BlockWork) -> None:
        for index in work.unfinished():
            work.finish(index, work.observe(index))
