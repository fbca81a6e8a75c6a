"""What lm-evaluation-harness makes of the data sets of the tests: prompts, tokens, answers.

It needs lm_eval, torch and transformers in an environment of its own:

    python tools/make_golden_tasks.py tests/golden/tasks.json

The harness's own task files are used, with the data on disk in place of what they would download.
The model is the bundled one, in float32.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
import torch
from lm_eval.api.metrics import exact_match_fn
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate
from lm_eval.filters.extraction import RegexFilter
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks._yaml_loader import load_yaml

ROOT = Path(__file__).parents[1]
DATA = ROOT / "tests" / "tasks" / "data"
MODEL = ROOT / "models" / "stdlib-qwen3-6m"
YAMLS = Path(lm_eval.tasks.__file__).parent
Rows = list[dict[str, Any]]
OWN: dict[str, Any] = {
    "output_type": "multiple_choice",
    "test_split": "test",
    "fewshot_split": "dev",
    "fewshot_config": {"sampler": "first_n"},
    "doc_to_text": "{{prompt}}",
    "doc_to_choice": "choices",
    "doc_to_target": "{{answer}}",
    "metric_list": [
        {"metric": name, "aggregation": "mean", "higher_is_better": True}
        for name in ("acc", "acc_norm")
    ],
}
WRITTEN: dict[str, Any] = {
    "output_type": "generate_until",
    "test_split": "test",
    "doc_to_text": "{{prompt}}",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": 256},
    "filter_list": [
        {
            "name": "none",
            "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}],
        }
    ],
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


def table(path: Path) -> Rows:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def mmlu_table(path: Path) -> Rows:
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    return [
        {"question": row[0], "choices": row[1:5], "answer": "ABCD".index(row[5])} for row in rows
    ]


def lines(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def arc_lines(path: Path) -> Rows:
    return [
        {
            "id": row["id"],
            "question": row["question"]["stem"],
            "choices": {
                key: [choice[key] for choice in row["question"]["choices"]]
                for key in ("text", "label")
            },
            "answerKey": row["answerKey"],
        }
        for row in lines(path)
    ]


def own_lines(path: Path, subject: str) -> Rows:
    rows = [row for row in lines(path) if row["subject"] == subject]
    for row in rows:
        if isinstance(row["answer"], str):
            row["answer"] = row["choices"].index(row["answer"])
    return rows


def config_of(path: str) -> dict[str, Any]:
    return load_yaml(YAMLS / path, resolve_func=True)


def task_of(config: dict[str, Any], name: str, shots: int, splits: dict[str, Rows]) -> Any:
    def made(**_: Any) -> datasets.DatasetDict:
        return datasets.DatasetDict(
            {split: datasets.Dataset.from_list(rows) for split, rows in splits.items()}
        )

    kept = {key: value for key, value in config.items() if key not in ("tag", "group", "include")}
    settings = {**kept, "task": name, "custom_dataset": made, "num_fewshot": shots}
    for key in ("dataset_path", "dataset_name", "dataset_kwargs", "metadata"):
        settings.pop(key, None)
    return ConfigurableTask(config=settings)


def cases() -> dict[str, tuple[str, Callable[[int], dict[str, Any]], tuple[int, ...]]]:
    """By the data: the task, what makes the harness's tasks by subject, and numbers of examples."""

    def letters(name: str, yaml: str, tested: str, shown: str, split: str, read: Any) -> Any:
        def tasks(shots: int) -> dict[str, Any]:
            found = {}
            for path in sorted((DATA / name).glob(tested.replace("NAME", "*"))):
                ending = tested.rpartition("NAME")[2]
                subject = path.name.removesuffix(ending)
                splits = {
                    split: read(path),
                    "dev": read(DATA / name / shown.replace("NAME", subject)),
                }
                found[subject] = task_of(config_of(yaml.format(subject)), subject, shots, splits)
            return found

        return tasks

    def single(name: str, yaml: str, splits: dict[str, str], read: Any) -> Any:
        def tasks(shots: int) -> dict[str, Any]:
            held = {split: read(DATA / place) for split, place in splits.items()}
            return {name: task_of(config_of(yaml), name, shots, held)}

        return tasks

    ceval = letters(
        "ceval",
        "ceval/ceval-valid_{}.yaml",
        "val/NAME_val.csv",
        "dev/NAME_dev.csv",
        "val",
        table,
    )
    cmmlu = letters("cmmlu", "cmmlu/cmmlu_{}.yaml", "test/NAME.csv", "dev/NAME.csv", "test", table)
    mmlu = letters(
        "mmlu",
        "mmlu/default/mmlu_{}.yaml",
        "data/test/NAME_test.csv",
        "data/dev/NAME_dev.csv",
        "test",
        mmlu_table,
    )
    gsm8k = single(
        "gsm8k",
        "gsm8k/gsm8k.yaml",
        {"test": "gsm8k/test.jsonl", "train": "gsm8k/train.jsonl"},
        lines,
    )
    hellaswag = single(
        "hellaswag",
        "hellaswag/hellaswag.yaml",
        {
            "validation": "hellaswag/hellaswag_val.jsonl",
            "train": "hellaswag/hellaswag_train.jsonl",
        },
        lines,
    )
    folder = "arc/ARC-Challenge/ARC-Challenge"
    arc = single(
        "arc",
        "arc/arc_challenge.yaml",
        {"test": f"{folder}-Test.jsonl", "train": f"{folder}-Train.jsonl"},
        arc_lines,
    )

    def own(shots: int) -> dict[str, Any]:
        files = {"test": "python.jsonl", "dev": "python.dev.jsonl"}
        return {
            subject: task_of(
                OWN,
                subject,
                shots,
                {split: own_lines(DATA / "own" / f, subject) for split, f in files.items()},
            )
            for subject in ("keywords", "modules")
        }

    def written(shots: int) -> dict[str, Any]:
        rows = lines(DATA / "own" / "written.jsonl")
        return {"written": task_of(WRITTEN, "written", shots, {"test": rows})}

    return {
        "ceval": ("ceval", ceval, (5, 0)),
        "cmmlu": ("cmmlu", cmmlu, (5, 2)),
        "mmlu": ("mmlu", mmlu, (5, 0)),
        "gsm8k": ("gsm8k", gsm8k, (5, 2)),
        "hellaswag": ("hellaswag", hellaswag, (0, 3)),
        "arc": ("arc", arc, (0, 3)),
        "own/python.jsonl": ("", own, (0, 1)),
        "own/written.jsonl": ("", written, (0,)),
    }


def answers(lm: Any, tasks: dict[str, Any]) -> dict[str, Any]:
    """Prompts, tokens and answers of each subject."""
    for task in tasks.values():
        task.set_fewshot_seed(seed=1234)  # as simple_evaluate does
    # Random draws go on from question to question, so the requests are built once, by evaluate.
    found = evaluate(lm=lm, task_dict=tasks, limit=None, bootstrap_iters=2, log_samples=True)
    shown: dict[str, Any] = {}
    for name, task in tasks.items():
        questions: dict[int, dict[str, Any]] = {}
        for sample in found["samples"][name]:
            one = questions.setdefault(sample["doc_id"], {"right": {}})
            arguments = [list(pair) for pair in sample["arguments"]]
            one["context"] = arguments[0][0]
            if task.OUTPUT_TYPE == "multiple_choice":
                one["continuations"] = [pair[1] for pair in arguments]
                pairs = [lm._encode_pair(*pair) for pair in arguments]
                one["context_ids"] = pairs[0][0]
                one["continuation_ids"] = [ids for _, ids in pairs]
                one["likelihoods"] = [float(pair[0]) for pair in sample["filtered_resps"]]
            else:
                one["context_ids"] = lm.tok_encode(arguments[0][0])
                one["text"] = sample["resps"][0][0]
            for metric in sample["metrics"]:
                key = metric if sample["filter"] == "none" else f"{metric},{sample['filter']}"
                one["right"][key] = bool(sample[metric])
        results = {
            key: value
            for key, value in found["results"][name].items()
            if isinstance(value, float) and "," in key
        }
        shown[name] = {"questions": [questions[i] for i in sorted(questions)], "results": results}
    return shown


TEXTS = (
    *(" 3 + 4 = 7\n#### 7", " #### -1,234.", "#### $16", "####7", " 5 or 12.", "$1,000. ..."),
    *(" 3.50 dollars", "", " none", "#### 7\n#### 8", " - 5 -", " $,.", "so 18\n#### 12 apples"),
)


def readings() -> list[dict[str, Any]]:
    """What the filters of gsm8k read out of texts, and whether that is 7, 1,234, 16, ..."""
    answers = "so\n#### 7", "#### -1234", "x #### 16", "#### 1,000", "12", "#### 3.50"
    config = config_of("gsm8k/gsm8k.yaml")
    (metric,) = config["metric_list"]
    keys = "ignore_case", "ignore_punctuation", "regexes_to_ignore"
    options = {key: metric[key] for key in keys}
    found = []
    for text in TEXTS:
        one: dict[str, Any] = {"text": text}
        for row in config["filter_list"]:
            settings = {k: v for k, v in row["filter"][0].items() if k != "function"}
            ((read,),) = RegexFilter(**settings).apply([[text]], [])
            scores = [
                exact_match_fn(predictions=[read], references=[answer], **options)["exact_match"]
                for answer in answers
            ]
            one[row["name"]] = {"read": read, "right": [bool(score) for score in scores]}
        found.append(one)
    return [{"answers": answers}, *found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", type=Path, default=MODEL)
    asked = parser.parse_args()
    torch.manual_seed(0)
    lm = HFLM(pretrained=str(asked.model), dtype="float32", device="cpu", batch_size=1)
    found = {
        "versions": {name: version(name) for name in ("lm_eval", "torch", "transformers")},
        "cases": [
            {"data": data, "task": name, "shots": shots, "subjects": answers(lm, make(shots))}
            for data, (name, make, many) in cases().items()
            for shots in many
        ],
        "readings": readings(),
    }
    text = json.dumps(found, ensure_ascii=False, separators=(",", ":"))
    asked.out.write_text(text.replace('{"right"', '\n{"right"') + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
