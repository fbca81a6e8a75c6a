"""``ms-quant eval --task``: what it prints, writes and refuses."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import ms_quant
from ms_quant.cli.main import app
from ms_quant.errors import MsQuantError
from ms_quant.tasks.hellaswag import cleaned
from ms_quant.tasks.records import Data
from ms_quant.tasks.table import task_of

DATA = Path(__file__).parent / "data"
MODEL = Path(__file__).parents[2] / "models" / "stdlib-qwen3-6m"


def run(*arguments: object) -> str:
    found = CliRunner().invoke(
        app, ["eval", str(MODEL), *map(str, arguments)], catch_exceptions=False
    )
    assert not found.exit_code
    return found.stdout


def refused(*arguments: object) -> str:
    with pytest.raises(MsQuantError) as error:
        run(*arguments)
    return str(error.value)


def read(task: str, data: Path, shots: int = 5, subjects: Any = None) -> Any:
    found, place = task_of(task, data)
    return found.read(Data(place, subjects, shots, None))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """All data sets, to be spoiled."""
    return Path(shutil.copytree(DATA, tmp_path / "data"))


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def test_a_table_by_category_and_what_is_quoted() -> None:
    shown = run("--task", "ceval", "--data", DATA / "ceval")
    assert max(map(len, shown.splitlines())) <= 80
    for text in ("STEM", "humanities", "all", "acc over subjects", "(quoted)"):
        assert text in shown


def test_two_checkpoints_are_shown_side_by_side(tmp_path: Path) -> None:
    shutil.copytree(MODEL, tmp_path / "copy")
    shown = run("--task", "arc", "--data", DATA / "arc", "--against", tmp_path / "copy")
    assert max(len(line) for line in shown.splitlines() if str(tmp_path) not in line) <= 80
    for text in ("against", "0.00 %: 0 right to wrong, 0 wrong to right", "p = 1", "100.00 %"):
        assert text in shown


def test_every_answer_is_written(tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    printed = run(
        *("--task", "mmlu", "--data", DATA / "mmlu", "--shots", 1, "--limit", 2),
        *("--subjects", "anatomy", "--output", out, "--json"),
    )
    result = json.loads(printed)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["number"] for row in rows] == [0, 1]
    assert rows[0]["question"].startswith("Which organ pumps blood?\nA. The brain\n")
    right = [row["right"]["acc"] for row in rows]
    assert result["accuracy"] == sum(right) / 2
    for row in rows:
        assert len(row["scores"]) == 4
        assert row["chosen"]["acc"] == row["scores"].index(max(row["scores"]))
        assert row["right"]["acc"] == (row["chosen"]["acc"] == row["answer"])
    assert (result["shots"], result["harness"], result["quoted"]) == (1, "mmlu", "questions")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--text and --task: neither was given, expected one of them"),
        (["--text", "a", "--task", "b"], "--text and --task: both were given"),
        (["--text", "a", "--shots", "1"], "--shots: was given, expected not with --text"),
        (["--task", "arc", "--float16"], "--float16: was given, expected not with --task"),
        (["--task", "squad"], "--task squad: is unknown, expected ceval, cmmlu, mmlu"),
        (["--task", "arc"], "--task arc: --data is missing, expected the directory"),
        (["--task", "q.jsonl", "--data", "."], "--data: q.jsonl is the data itself"),
        (["--task", "q.jsonl"], "q.jsonl: is not a file, expected questions"),
        (["--task", "arc", "--data", "none"], "--data none: is not a directory"),
        (
            ["--task", "arc", "--data", str(DATA / "arc"), "--output", "no/where"],
            "--output no/where: no is not a directory",
        ),
        (
            ["--task", "arc", "--data", str(DATA / "arc"), "--subjects", "x"],
            "--subjects: ARC-Challenge has no subjects, expected none",
        ),
        (
            ["--task", "ceval", "--data", str(DATA / "ceval"), "--subjects", "logic,latin"],
            "--subjects: 'latin' is not in",
        ),
        (
            ["--task", "ceval", "--data", str(DATA / "ceval"), "--shots", "6"],
            "has 5 examples of computer_network, expected 6 for --shots 6",
        ),
        (
            ["--task", "arc", "--data", str(DATA / "arc"), "--against", str(MODEL)],
            "is the checkpoint itself, expected another",
        ),
    ],
)
def test_arguments_that_do_not_fit(arguments: list[str], said: str) -> None:
    assert said in refused(*arguments)


@pytest.mark.parametrize("task", ["ceval", "cmmlu", "mmlu", "hellaswag", "arc", "gsm8k"])
def test_data_of_another_layout(task: str, tmp_path: Path) -> None:
    (tmp_path / "something.csv").write_text("a,b\n")
    with pytest.raises(MsQuantError, match=r"has no questions of .*, expected .*") as error:
        read(task, tmp_path)
    assert str(tmp_path) in str(error.value)


def test_a_subject_without_dev_split(data: Path) -> None:
    (data / "ceval/dev/logic_dev.csv").unlink()
    said = refused("--task", "ceval", "--data", data / "ceval")
    assert "dev/logic_dev.csv: is not there, expected 5 examples of logic for --shots 5" in said
    assert read("ceval", data / "ceval", shots=0)


def test_an_answer_that_is_none_of_the_letters(data: Path) -> None:
    change(data / "ceval/val/logic_val.csv", "等于乙,B", "等于乙,E")
    with pytest.raises(MsQuantError, match=r"logic_val.csv: line 2: answer is 'E', expected one"):
        read("ceval", data / "ceval")


def test_a_column_that_is_missing(data: Path) -> None:
    change(data / "cmmlu/test/astronomy.csv", ",Answer", ",Key")
    with pytest.raises(MsQuantError, match=r"astronomy.csv: has the columns .* expected 'Answer'"):
        read("cmmlu", data / "cmmlu")


def test_a_row_that_is_too_short(data: Path) -> None:
    change(data / "mmlu/data/test/anatomy_test.csv", ",elbow", "")
    with pytest.raises(MsQuantError, match="line 2: has 5 columns, expected 6"):
        read("mmlu", data / "mmlu")


def test_a_field_that_never_ends(data: Path) -> None:
    with (data / "mmlu/data/test/anatomy_test.csv").open("a") as file:
        file.write('"' + "x" * 200_000)
    before = csv.field_size_limit()
    for limit in (before, 1 << 30):
        csv.field_size_limit(limit)
        try:
            with pytest.raises(MsQuantError, match=r"line \d is no csv .*at most 131072 char"):
                read("mmlu", data / "mmlu")
        finally:
            csv.field_size_limit(before)


def test_a_file_that_is_no_text(data: Path) -> None:
    (data / "ceval/val/logic_val.csv").write_bytes(b"id,question\n\xff\xfe")
    with pytest.raises(MsQuantError, match=r"logic_val.csv: is not UTF-8"):
        read("ceval", data / "ceval")


def test_a_file_of_no_known_subject(data: Path) -> None:
    shutil.copy(data / "ceval/val/logic_val.csv", data / "ceval/val/latin_val.csv")
    with pytest.raises(MsQuantError, match="'latin' is not a subject of C-Eval, expected one of"):
        read("ceval", data / "ceval")


def test_files_without_questions(data: Path) -> None:
    (data / "ceval/val/logic_val.csv").write_text("id,question,A,B,C,D,answer\n")
    said = refused("--task", "ceval", "--data", data / "ceval")
    assert "logic_val.csv: has no questions, expected one at least" in said


@pytest.mark.parametrize(
    ("task", "file", "old", "new", "said"),
    [
        ("hellaswag", "hellaswag_val.jsonl", '"label": 0', '"label": 4', "from 0 to 3"),
        ("hellaswag", "hellaswag_val.jsonl", '"ctx_a"', '"ctx_c"', "has no 'ctx_a'"),
        ("hellaswag", "hellaswag_val.jsonl", '["puts', '[7, "puts', "endings is 7, expected text"),
        (
            "arc",
            "ARC-Challenge/ARC-Challenge-Test.jsonl",
            '"answerKey": "B"',
            '"answerKey": "Z"',
            "answerKey is 'Z'",
        ),
        ("arc", "ARC-Challenge/ARC-Challenge-Test.jsonl", '"choices"', '"c"', "question.choices"),
        ("gsm8k", "test.jsonl", '"answer"', '"a"', "has no 'answer', expected it to be text"),
        ("gsm8k", "test.jsonl", '{"question"', '[]\n{"question"', "expected an object"),
        ("gsm8k", "test.jsonl", '{"question"', '{"question', "is not valid JSON"),
    ],
)
def test_records_that_do_not_fit(
    data: Path, task: str, file: str, old: str, new: str, said: str
) -> None:
    change(data / task / file, old, new)
    with pytest.raises(MsQuantError) as error:
        read(task, data / task)
    assert said in str(error.value)
    assert file in str(error.value)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"prompt": "a", "choices": ["b"], "answer": 0}, "expected a list of two texts and more"),
        ({"prompt": "a", "choices": ["b", ""], "answer": 0}, "choices has an empty text"),
        ({"prompt": "a", "choices": ["b", "c"], "answer": "d"}, "answer is 'd', expected one of"),
        ({"prompt": "a", "choices": ["b", "c"], "answer": True}, "answer is True"),
        ({"prompt": "a"}, "has no 'answer', expected it to be text"),
        ({"prompt": "\ud800", "answer": "b"}, "prompt is no UTF-8 text"),
    ],
)
def test_own_questions_that_do_not_fit(tmp_path: Path, record: Any, said: str) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps(record))
    with pytest.raises(MsQuantError, match=r"own.jsonl: line 1") as error:
        read(str(path), None)  # type: ignore[arg-type]
    assert said in str(error.value)


def test_another_vocabulary(tiny_model: Callable[..., Path]) -> None:
    said = refused("--task", "arc", "--data", DATA / "arc", "--against", tiny_model("other"))
    assert "has a vocabulary of 320 tokens, expected the 2048" in said


def test_an_overflow_of_the_other_model_is_said_of_it(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    def huge(tensors: dict[str, Any]) -> None:
        for name in ("gate_proj", "up_proj"):
            tensors[f"model.layers.0.mlp.{name}.weight"] *= 1e30

    (tmp_path / "q.jsonl").write_text(
        json.dumps({"prompt": "the quick", "choices": ["fox", "dog"], "answer": 0})
    )
    model, other = tiny_model("model"), tiny_model("huge", change=huge)
    with pytest.raises(MsQuantError, match=r"^against: model.layers"):
        ms_quant.evaluate_task(model, tmp_path / "q.jsonl", against=other)


def test_a_model_too_short_for_an_answer(tiny_model: Callable[..., Path]) -> None:
    model = tiny_model("short", max_position_embeddings=256)
    with pytest.raises(MsQuantError, match=r"made for 256 positions .* more than the 256 of an"):
        ms_quant.evaluate_task(model, "gsm8k", DATA / "gsm8k")


def test_mirrors_in_parquet_are_the_same(data: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [
        {"question": "Which organ pumps blood?", "subject": "anatomy", "answer": 1}
        | {"choices": ["The brain", "The heart", "The skin", "The ear"]}
    ]
    folder = data / "mirror" / "anatomy"
    folder.mkdir(parents=True)
    for split in ("test", "dev"):
        table = pyarrow.Table.from_pylist(rows)
        parquet.write_table(table, folder / f"{split}-00000-of-00001.parquet")
    (found,) = read("mmlu", data / "mirror", shots=1)
    published = read("mmlu", data / "mmlu", subjects=("anatomy",))[0]
    assert found.questions[0] == published.questions[0]
    assert found.examples == found.questions
    lines = (data / "gsm8k/test.jsonl").read_text().splitlines()
    (data / "m/main").mkdir(parents=True)
    table = pyarrow.Table.from_pylist(list(map(json.loads, lines)))
    parquet.write_table(table, data / "m/main/test-00000-of-00001.parquet")
    assert read("gsm8k", data / "m", 0)[0].questions == read("gsm8k", data / "gsm8k")[0].questions


def test_brackets_go_as_the_pattern_of_the_harness_takes_them() -> None:
    for text in ("[a] b [c", "[[a]]", "a]b[", "[a\nb] [c]", "[ \n ] x [y] z", "[" * 50 + "]"):
        assert cleaned(text) == re.sub("\\[.*?\\]", "", text.strip()).replace("  ", " ")
