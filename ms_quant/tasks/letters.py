"""C-Eval, CMMLU and MMLU: four choices, of which a letter is the answer.

Prompts are those of lm-evaluation-harness: ``ceval-valid``, ``cmmlu`` and ``mmlu``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ms_quant.errors import BadArgumentError, BadFileError
from ms_quant.tasks.reading import (
    LETTERS,
    Row,
    csv_rows,
    parquet_rows,
    require_directory,
)
from ms_quant.tasks.records import Data, Question, Subject
from ms_quant.tasks.subjects import CEVAL, CMMLU, MMLU, SubjectName

CHINESE_CUE = "答案："  # noqa: RUF001 - as the prompts have it
Read = Callable[[Path], Iterator[Question]]


@dataclass(frozen=True)
class Files:
    """Where the questions and the examples of a subject are.

    Attributes:
        questions: the file of the questions.
        examples: the file of the examples.
        read: reads each.
    """

    questions: Path
    examples: Path
    read: Read


@dataclass(frozen=True)
class Benchmark:
    """One of them.

    Attributes:
        title: what it is called.
        subjects: its subjects.
        description: what prompts begin with, with a place for the subject.
        layout: of its files, in words.
        find: the subjects that a directory has.
    """

    title: str
    subjects: Mapping[str, SubjectName]
    description: str
    layout: str
    find: Callable[[Path], dict[str, Files]]


def _question(number: int, row: Row, names: tuple[str, str], cue: str) -> Question:
    """A question of a row with a column for each choice."""
    asked, answer = names
    choices = "".join(f"{letter}. {row.text(letter)}\n" for letter in LETTERS)
    text = f"{row.text(asked).strip()}\n{choices}{cue}"
    return Question(number, text, tuple(LETTERS), row.letter(answer))


def _of_csv(
    path: Path, *, names: tuple[str, str], cue: str, header: bool = True
) -> Iterator[Question]:
    columns = (names[0], *LETTERS, names[1])
    for number, row in enumerate(csv_rows(path, columns, header)):
        yield _question(number, row, names, cue)


def _of_parquet(path: Path) -> Iterator[Question]:
    for number, row in enumerate(parquet_rows(path, ("question", "choices", "answer"))):
        choices = row.texts("choices")
        if len(choices) != len(LETTERS):
            raise BadFileError(f"{row.where}: has {len(choices)} choices, expected 4")
        letters = dict(zip(LETTERS, choices, strict=True))
        answer = LETTERS[row.index("answer", len(LETTERS))]
        values = {"question": row.text("question"), "answer": answer, **letters}
        yield _question(number, Row(values, row.where), ("question", "answer"), "Answer:")


def _pairs(
    root: Path, tested: str, shown: str, ends: tuple[str, str], read: Read
) -> dict[str, Files]:
    """The subjects of two directories, one of questions and one of examples."""
    names = (
        path.name.removesuffix(ends[0])
        for path in sorted((root / tested).glob(f"*{ends[0]}"))
        if path.is_file()
    )
    return {
        name: Files(root / tested / f"{name}{ends[0]}", root / shown / f"{name}{ends[1]}", read)
        for name in names
    }


def _ceval_files(root: Path) -> dict[str, Files]:
    read = partial(_of_csv, names=("question", "answer"), cue=CHINESE_CUE)
    return _pairs(root, "val", "dev", ("_val.csv", "_dev.csv"), read)


def _cmmlu_files(root: Path) -> dict[str, Files]:
    read = partial(_of_csv, names=("Question", "Answer"), cue=CHINESE_CUE)
    return _pairs(root, "test", "dev", (".csv", ".csv"), read)


def _mmlu_files(root: Path) -> dict[str, Files]:
    root = root / "data" if (root / "data" / "test").is_dir() else root
    read = partial(_of_csv, names=("question", "answer"), cue="Answer:", header=False)
    found = _pairs(root, "test", "dev", ("_test.csv", "_dev.csv"), read)
    if found:
        return found
    for path in sorted(root.glob("*/test-*.parquet")):
        if path.parent.name in MMLU:
            examples = sorted(path.parent.glob("dev-*.parquet"))
            shown = examples[0] if examples else path.parent / "dev-00000-of-00001.parquet"
            found[path.parent.name] = Files(path, shown, _of_parquet)
    return found


BENCHMARKS = {
    "ceval": Benchmark(
        "C-Eval",
        CEVAL,
        "以下是中国关于{}的单项选择题，请选出其中的正确答案。\n\n",  # noqa: RUF001
        "val/NAME_val.csv and dev/NAME_dev.csv",
        _ceval_files,
    ),
    "cmmlu": Benchmark(
        "CMMLU",
        CMMLU,
        "以下是关于{}的单项选择题，请直接给出正确答案的选项。\n\n",  # noqa: RUF001
        "test/NAME.csv and dev/NAME.csv",
        _cmmlu_files,
    ),
    "mmlu": Benchmark(
        "MMLU",
        MMLU,
        "The following are multiple choice questions (with answers) about {}.\n\n",
        "test/NAME_test.csv and dev/NAME_dev.csv, or NAME/test-*.parquet",
        _mmlu_files,
    ),
}


def read(name: str, data: Data) -> list[Subject]:
    """The subjects of one of ``BENCHMARKS``, in its order.

    Raises:
        MsQuantError: a file is missing or malformed, or a subject is unknown.
    """
    benchmark = BENCHMARKS[name]
    require_directory(data.directory, benchmark.title)
    found = benchmark.find(data.directory)
    if not found:
        raise BadFileError(
            f"{data.directory}: has no questions of {benchmark.title}, expected {benchmark.layout}"
        )
    strange = [subject for subject in found if subject not in benchmark.subjects]
    if strange:
        raise BadFileError(
            f"{found[strange[0]].questions}: {strange[0]!r} is not a subject of "
            f"{benchmark.title}, expected one of its {len(benchmark.subjects)}, such as "
            f"{', '.join(list(benchmark.subjects)[:3])}"
        )
    wanted = chosen(data.subjects, [s for s in benchmark.subjects if s in found], data.directory)
    return [_subject(benchmark, subject, found[subject], data) for subject in wanted]


def chosen(wanted: tuple[str, ...] | None, present: list[str], where: Path) -> list[str]:
    """The subjects that are asked for.

    Raises:
        MsQuantError: one of them is not there.
    """
    unknown = [name for name in wanted or () if name not in present]
    if unknown:
        shown = ", ".join(present[:8]) + (", ..." if len(present) > 8 else "")
        raise BadArgumentError(
            f"--subjects: {unknown[0]!r} is not in {where}, expected some of {shown}"
        )
    return [name for name in present if wanted is None or name in wanted]


def _subject(benchmark: Benchmark, name: str, files: Files, data: Data) -> Subject:
    known = benchmark.subjects[name]
    shown = files.examples.is_file() and data.shots
    return Subject(
        name,
        known.category,
        benchmark.description.format(known.title),
        list(files.read(files.questions))[: data.limit],
        list(files.read(files.examples)) if shown else [],
        str(files.questions),
        str(files.examples),
    )
