"""The clients that people have, against a server in a process of its own: openai, lm_eval, curl."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openai
import pytest
from server_process import Served, served

from ms_quant.data.tokenizer import load_tokenizer
from ms_quant.evaluation.generation import generate
from ms_quant.evaluation.perplexity import token_losses
from ms_quant.formats.opening import open_model

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "stdlib-qwen3-6m"
TEMPLATE = "{% for m in messages %}{{ m.content }}\n{% endfor %}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model with a chat template."""
    directory = tmp_path_factory.mktemp("served") / "stdlib-qwen3-6m"
    directory.mkdir()
    for file in MODEL.iterdir():
        (directory / file.name).symlink_to(file)
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Served]:
    with served(model, "--api-key", "secret") as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.address}/v1", api_key="secret", max_retries=0)


def test_openai(client, model):
    name = client.models.list().data[0].id
    asked = {"model": name, "prompt": "import os\nfor name in", "max_tokens": 30, "temperature": 0}
    expected = generate(model, asked["prompt"], max_tokens=30).text
    assert client.completions.create(**asked).choices[0].text == expected
    pieces = list(client.completions.create(**asked, stream=True))
    assert len(pieces) > 10 and "".join(p.choices[0].text for p in pieces) == expected
    chat = {
        "model": name,
        "messages": [{"role": "user", "content": "import os\nfor name in"}],
        "max_tokens": 12,
        "temperature": 0,
    }
    answer = client.chat.completions.create(**chat, logprobs=True, top_logprobs=3)
    assert len(answer.choices[0].logprobs.content) == answer.usage.completion_tokens
    with_usage = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = client.chat.completions.create(**chat, **with_usage)
    told = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert told == answer.choices[0].message.content and last.usage == answer.usage
    with pytest.raises(openai.BadRequestError, match="does not fit the model's context of 1024"):
        client.completions.create(**{**asked, "max_tokens": 2000})
    with pytest.raises(openai.AuthenticationError, match="the API key"):
        client.with_options(api_key="other").models.list()
    with pytest.raises(openai.NotFoundError, match="there is no model 'other'"):
        client.completions.create(**{**asked, "model": "other"})


def test_eight_at_once_say_what_one_says(client):
    from concurrent.futures import ThreadPoolExecutor

    prompts = ["import re", "def main(", "class A:", "for x in", "#", "return", "try:", '"""'] * 2

    def ask(prompt: str) -> str:
        found = client.completions.create(
            model="stdlib-qwen3-6m", prompt=prompt, max_tokens=24, temperature=0
        )
        return found.choices[0].text

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(ask, prompts))
    assert together == [ask(prompt) for prompt in prompts]


def test_a_client_that_goes_ends_its_text(client):
    from time import monotonic, sleep
    from urllib.request import urlopen

    stream = client.completions.create(
        model="stdlib-qwen3-6m",
        prompt="a",
        max_tokens=1000,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    stream.close()
    until, address = monotonic() + 10, str(client.base_url).removesuffix("/v1/")
    while b"texts_running 0.0" not in urlopen(f"{address}/metrics").read():
        assert monotonic() < until
        sleep(0.05)
    made = [
        line
        for line in urlopen(f"{address}/metrics").read().decode().splitlines()
        if line.startswith("ms_quant_cache_tokens_reserved")
    ]
    assert made == ["ms_quant_cache_tokens_reserved 0.0"]


QUESTIONS = ["import", "def main(", "class Error(", "    return self"]
ROWS = [
    {"question": "import", "choices": [" os", " zebra"], "answer": 0},
    {"question": "for name", "choices": [" in", " out"], "answer": 0},
    {"question": "def main(", "choices": ["):", "import"], "answer": 1},
]
CHOICES = """
task: made_up_choices
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
target_delimiter: ""
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
doc_to_choice: choices
metric_list: [{{metric: acc}}]
"""
TEXTS = """
task: made_up_texts
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
generation_kwargs: {{until: ["\\n"], max_gen_toks: 24, temperature: 0}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture(scope="module")
def harness(tmp_path_factory, server: Served, model: Path) -> dict:
    """What one run of lm_eval finds: results and samples of both tasks."""
    directory = tmp_path_factory.mktemp("harness")
    answers = [generate(model, question, max_tokens=24).text for question in QUESTIONS]
    answers = [answer.partition("\n")[0] for answer in answers]
    texts = [
        {"question": question, "answer": answer if i else "something else", "expected": answer}
        for i, (question, answer) in enumerate(zip(QUESTIONS, answers, strict=True))
    ]
    for task, rows, yaml in (
        ("made_up_choices", ROWS, CHOICES),
        ("made_up_texts", texts, TEXTS),
    ):
        data = directory / f"{task}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (directory / f"{task}.yaml").write_text(yaml.format(data=data))
    options = f"model=stdlib-qwen3-6m,base_url={server.address}/v1/completions,num_concurrent=4"
    options += f",max_retries=1,tokenizer={model}"
    environment = {
        **os.environ,
        "HF_DATASETS_OFFLINE": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(directory / "cache"),
        "OPENAI_API_KEY": "secret",
    }
    command = [sys.executable, "-m", "lm_eval", "--model", "local-completions"]
    command += ["--model_args", options, "--tasks", "made_up_choices,made_up_texts"]
    command += ["--include_path", str(directory)]
    command += ["--output_path", str(directory / "out"), "--log_samples"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150)
    assert run.returncode == 0, run.stderr[-3000:]
    (results,) = (directory / "out").rglob("results_*.json")
    found = {"results": json.loads(results.read_text())["results"]}
    for task in found["results"]:
        (samples,) = (directory / "out").rglob(f"samples_{task}_*.jsonl")
        found[task] = [json.loads(line) for line in samples.read_text().splitlines()]
    return found


def test_lm_eval_generates(harness):
    for sample in harness["made_up_texts"]:
        assert sample["resps"][0][0] == sample["doc"]["expected"]
    assert harness["results"]["made_up_texts"]["exact_match,none"] == 0.75


def test_lm_eval_finds_likelihoods(harness, model):
    """To rounding those of eval; the answers that it finds right are those that are likelier."""
    opened, tokenizer = open_model(model), load_tokenizer(model)
    right = 0
    for one in harness["made_up_choices"]:
        row, sums = one["doc"], []
        for choice, told in zip(row["choices"], one["resps"], strict=True):
            context = len(tokenizer.encode(row["question"]))
            ids = tokenizer.encode(row["question"] + choice)
            losses = token_losses(opened, ids[None])[0]
            sums.append(-losses[context - 1 :].sum())
            assert float(told[0][0]) == pytest.approx(sums[-1], abs=1e-3)
        right += int(np.argmax(sums)) == row["answer"]
    assert harness["results"]["made_up_choices"]["acc,none"] == pytest.approx(right / len(ROWS))


def test_curl(server):
    """The line of docs/serving.md, and that of the board's guide."""
    page = (ROOT / "docs" / "serving.md").read_text()
    start = page.index("curl http://localhost:8000/v1/completions")
    line = page[start : page.index("\n```", start)].replace("\\\n", " ")
    address = server.address
    key = ["-H", "Authorization: Bearer secret", "-sS", "--fail-with-body"]
    for words, tokens in (
        (shlex.split(line), 16),
        (
            [
                *("curl", "http://localhost:8000/v1/completions"),
                *("-H", "Content-Type: application/json", "-d"),
                '{"model": "Qwen3-8B-W8A8", "prompt": "Introduce the Forbidden City in Beijing", '
                '"max_tokens": 120, "temperature": 0}',
            ],
            120,
        ),
    ):
        asked = [
            word.replace("http://localhost:8000", address).replace(
                "Qwen3-8B-W8A8", "stdlib-qwen3-6m"
            )
            for word in words
        ]
        found = json.loads(subprocess.run([*asked, *key], capture_output=True, check=True).stdout)
        assert found["usage"]["completion_tokens"] <= tokens and found["choices"][0]["text"]
