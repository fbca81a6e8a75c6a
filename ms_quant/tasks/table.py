"""The tasks that there are."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from ms_quant.errors import BadArgumentError
from ms_quant.tasks import arc, gsm8k, hellaswag, letters, own
from ms_quant.tasks.records import Task

ACC, ACC_NORM, EXACT_MATCH = "acc", "acc_norm", "exact_match"
TASKS = {
    task.name: task
    for task in (
        Task("ceval", "ceval-valid", 5, "first", ACC, True, partial(letters.read, "ceval")),
        Task("cmmlu", "cmmlu", 5, "first", ACC, True, partial(letters.read, "cmmlu")),
        Task("mmlu", "mmlu", 5, "first", ACC, False, partial(letters.read, "mmlu")),
        Task("gsm8k", "gsm8k", 5, "random", EXACT_MATCH, False, gsm8k.read, gsm8k.EXACT),
        Task("hellaswag", "hellaswag", 0, "random others", ACC_NORM, False, hellaswag.read),
        Task("arc", "arc_challenge", 0, "random", ACC_NORM, False, partial(arc.read, "Challenge")),
        Task("arc_easy", "arc_easy", 0, "random", ACC_NORM, False, partial(arc.read, "Easy")),
    )
}


def task_of(name: str, data: Path | None) -> tuple[Task, Path]:
    """The task that ``--task`` and ``--data`` say, and where its data is.

    Raises:
        MsQuantError: there is no such task, or the data does not go with it.
    """
    if name in TASKS:
        if data is None:
            raise BadArgumentError(
                f"--task {name}: --data is missing, expected the directory of its files"
            )
        return TASKS[name], data
    path = Path(name)
    if path.suffix.lower() not in (".jsonl", ".json"):
        raise BadArgumentError(
            f"--task {name}: is unknown, expected {', '.join(TASKS)} or a file of JSON lines "
            "(.jsonl)"
        )
    if data is not None:
        raise BadArgumentError(f"--data: {name} is the data itself, expected no --data")
    choose = own.with_choices(path)
    exact = None if choose else own.EXACT
    metric = ACC if choose else EXACT_MATCH
    return Task(path.name, "", 0, "first", metric, False, own.read, exact), path
