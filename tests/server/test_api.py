"""The API by its own client: OpenAI's shapes, limits, and one sentence for each mistake."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from ms_quant.evaluation.generation import generate
from ms_quant.server.text_stream import Detokenizer, StopStrings

PROMPT = {"prompt": "the quick brown", "max_tokens": 8, "temperature": 0}
CHAT = {"messages": [{"role": "user", "content": "the fox"}], "max_tokens": 6, "temperature": 0}


def completion(client: Any, **body: Any) -> dict[str, Any]:
    found = client.post("/v1/completions", json={**PROMPT, **body})
    assert found.status_code == 200, found.text
    return found.json()


def events(client: Any, path: str, body: dict[str, Any]) -> list[Any]:
    with client.stream("POST", path, json={**body, "stream": True}) as found:
        assert found.status_code == 200 and "text/event-stream" in found.headers["content-type"]
        lines = [line.removeprefix("data: ") for line in found.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_a_completion_is_what_generate_says(client, decoder):
    found = completion(client())
    expected = generate(decoder.directory, "the quick brown", max_tokens=8)
    assert found["choices"] == [
        {"index": 0, "text": expected.text, "logprobs": None, "finish_reason": "length"}
    ]
    assert found["object"] == "text_completion" and found["model"] == "tiny"
    prompt = expected.positions - len(expected.tokens)
    assert found["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": 8,
        "total_tokens": prompt + 8,
    }


def test_prompts_of_every_kind(client):
    client = client()
    ids = client.tokenizer.encode("the quick brown").tolist()
    one = completion(client)["choices"][0]["text"]
    assert completion(client, prompt=ids)["choices"][0]["text"] == one
    texts = completion(client, prompt=["a dog", "the quick brown"], n=2)["choices"]
    assert [choice["index"] for choice in texts] == [0, 1, 2, 3]
    assert texts[2]["text"] == texts[3]["text"] == one
    assert completion(client, prompt=[ids, [5]])["choices"][0]["text"] == one
    assert completion(client, prompt="the quick brown", echo=True)["choices"][0]["text"] == (
        "the quick brown" + one
    )


def test_seeds(client):
    client = client()
    drawn = [
        [c["text"] for c in completion(client, temperature=1.5, seed=s, n=3)["choices"]]
        for s in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2] and len(set(drawn[0])) > 1


def test_likelihoods_of_a_prompt(client):
    """What lm_eval asks for: everything is there, for each token, and sums are consistent."""
    client = client()
    ids = client.tokenizer.encode("the quick brown fox").tolist()
    found = completion(client, prompt=ids, max_tokens=1, logprobs=2, echo=True)["choices"][0]
    told = found["logprobs"]
    assert len(told["tokens"]) == len(ids) + 1
    assert told["token_logprobs"][0] is told["top_logprobs"][0] is None
    for logprob, top, token in zip(
        told["token_logprobs"][1:], told["top_logprobs"][1:], told["tokens"][1:], strict=True
    ):
        assert top[token] == logprob <= max(top.values()) and 2 <= len(top) <= 3
    for token, offset in zip(told["tokens"], told["text_offset"], strict=True):
        assert found["text"][offset:].startswith(token)
    nothing = completion(client, prompt=ids, max_tokens=0, logprobs=2, echo=True)["choices"][0]
    assert nothing["logprobs"]["token_logprobs"] == told["token_logprobs"][:-1]
    assert nothing["text"] == "the quick brown fox"


def test_a_stream_is_the_whole_in_pieces(client):
    client = client()
    whole = completion(client, n=2, logprobs=1, echo=True)
    found = events(
        client,
        "/v1/completions",
        {**PROMPT, "n": 2, "logprobs": 1, "echo": True, "stream_options": {"include_usage": True}},
    )
    assert found[-1]["usage"] == whole["usage"] and found[-1]["choices"] == []
    for choice in whole["choices"]:
        pieces = [
            p["choices"][0] for p in found[:-1] if p["choices"][0]["index"] == choice["index"]
        ]
        assert len(pieces) > 3
        assert "".join(p["text"] for p in pieces) == choice["text"]
        assert [p["finish_reason"] for p in pieces] == [None] * (len(pieces) - 1) + ["length"]
        for key, values in choice["logprobs"].items():
            assert [v for p in pieces for v in p["logprobs"][key]] == values


def test_chat(client):
    client = client()
    found = client.post("/v1/chat/completions", json={**CHAT, "logprobs": True, "top_logprobs": 2})
    choice = found.json()["choices"][0]
    same = completion(client, prompt="user: the fox\nassistant:", max_tokens=6)["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": same["text"]}
    told = choice["logprobs"]["content"]
    assert len(told) == 6 and all(len(one["top_logprobs"]) == 2 for one in told)
    text = b"".join(bytes(one["bytes"]) for one in told)
    assert text.decode("utf-8", "replace") == same["text"]
    pieces = events(client, "/v1/chat/completions", CHAT)
    assert pieces[0]["choices"][0]["delta"] == {"role": "assistant"}
    deltas = [piece["choices"][0]["delta"] for piece in pieces[1:]]
    assert "".join(delta.get("content", "") for delta in deltas) == same["text"]
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "fox"}]
    again = client.post(
        "/v1/chat/completions", json={**CHAT, "messages": [{"role": "user", "content": parts}]}
    )
    assert again.json()["choices"][0]["message"]["content"] == same["text"]


def test_stop_strings(client):
    """Ended before the string, which may begin and end within tokens; nothing of it is told."""
    client = client()
    text = completion(client, max_tokens=20)["choices"][0]["text"]
    for start in range(1, len(text) - 3):
        stop = text[start : start + 3]
        expected = text[: text.index(stop)]
        body = {"max_tokens": 20, "stop": ["never there", stop]}
        found = completion(client, **body)["choices"][0]
        assert (found["text"], found["finish_reason"]) == (expected, "stop")
    pieces = events(client, "/v1/completions", {**PROMPT, **body})
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == expected


def test_end_tokens(client):
    first = client()
    ids = first.tokenizer.encode("the quick brown").tolist()
    told = completion(first, prompt=ids, logprobs=0)["choices"][0]["logprobs"]["tokens"]
    ends = [t for t in range(320) if first.tokenizer.decode([t]) == told[2]]
    ending = client(ends=tuple(ends))
    found = completion(ending)
    assert found["choices"][0]["finish_reason"] == "stop"
    assert found["usage"]["completion_tokens"] == told.index(told[2])
    assert completion(ending, ignore_eos=True)["usage"]["completion_tokens"] == 8
    assert completion(first, stop_token_ids=ends)["choices"] == found["choices"]


@pytest.mark.parametrize("chars", ["naïve — 日本語 🎉 fox", "\ufffd odd \ufffd", "e\u0301" * 9])
def test_no_half_character_is_told(decoder, chars):
    from ms_quant.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(decoder.directory)
    ids = tokenizer.encode(chars).tolist()
    for known in range(len(ids)):
        text = Detokenizer(tokenizer, ids[:known])
        pieces = [text.add(token) for token in ids[known:]]
        assert not any(piece.endswith("\ufffd") for piece in pieces)
        told = "".join(pieces) + text.rest()
        assert chars.endswith(told.lstrip("\ufffd")) or tokenizer.decode(ids[known:]) == told


def test_random_tokens_are_told_as_their_text(decoder):
    """Bytes that are no text among them: in the end all is there that decoding all gives."""
    from ms_quant.data.tokenizer import load_tokenizer

    tokenizer, rng = load_tokenizer(decoder.directory), np.random.default_rng(0)
    for _ in range(60):
        ids = rng.integers(1, 300, 30).tolist()
        text = Detokenizer(tokenizer)
        told = "".join(text.add(token) for token in ids) + text.rest()
        assert told == tokenizer.decode(ids)


def test_stop_strings_over_pieces():
    rng = np.random.default_rng(0)
    for _ in range(300):
        text = "".join(rng.choice(list("ab"), 30))
        stops = ["".join(rng.choice(list("ab"), rng.integers(1, 6))) for _ in range(2)]
        stream, told, at, expected = StopStrings(stops), "", 0, None
        while at < len(text):
            step = int(rng.integers(1, 4))
            told += stream.add(text[at : at + step])
            at += step
            places = [text[:at].index(stop) for stop in stops if stop in text[:at]]
            if places and expected is None:
                expected = text[: min(places)]  # what is there when the first of them is whole
        told += stream.rest()
        assert told == (text if expected is None else expected)
        assert stream.met == (expected is not None)


REFUSED = [
    ({"prompt": ""}, 400, "the prompt has no tokens, expected at least one"),
    ({"prompt": [5, 320]}, 400, "prompt has the token 320, expected less than 320"),
    ({"prompt": {}}, 400, "prompt is neither a text, nor token ids, nor a list of either"),
    ({"prompt": None}, 400, "prompt is neither a text, nor token ids, nor a list of either"),
    ({"model": "gpt"}, 404, "there is no model 'gpt', expected 'tiny'"),
    ({"max_tokens": 0}, 400, "max_tokens is 0 without echo, expected some"),
    ({"max_tokens": 60}, 400, "the prompt has 6 tokens and max_tokens is 60, which does not fit"),
    ({"n": 65}, 400, "the request asks for 65 texts, expected at most 64 (--max-texts)"),
    ({"guided_json": {"a": 1}}, 400, "guided_json is not supported, expected no such field"),
    ({"suffix": "x"}, 400, "suffix 'x' is not supported, expected no such field, or ''"),
    ({"best_of": 3, "n": 2}, 400, "best_of 3 is not supported"),
    ({"presence_penalty": 0.5}, 400, "presence_penalty 0.5 is not supported"),
    ({"logit_bias": {"1": 5}}, 400, "logit_bias {'1': 5} is not supported"),
    ({"temperature": -1}, 400, "temperature: input should be greater than or equal to 0"),
    ({"temperature": "hot"}, 400, "temperature: input should be a valid number"),
    ({"logprobs": 21}, 400, "logprobs: input should be less than or equal to 20"),
    ({"stop": ["a"] * 17}, 400, "stop: expected at most 16 texts"),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options needs stream true"),
]


@pytest.mark.parametrize(("change", "status", "sentence"), REFUSED)
def test_what_is_refused(client, change, status, sentence):
    found = client(max_texts=64, cache_tokens=50).post("/v1/completions", json={**PROMPT, **change})
    error = found.json()["error"]
    assert found.status_code == error["code"] == status
    assert error["message"].startswith(sentence) and set(error) == {
        "message",
        "type",
        "param",
        "code",
    }


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"messages": []}, "messages: list should have at least 1 item"),
        ({"messages": [{"content": "a"}]}, "messages.0.role is missing"),
        ({"tools": [{"type": "function"}]}, "tools [{'type': 'function'}] is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format {'type': 'json_object'}"),
        ({"top_logprobs": 3}, "top_logprobs needs logprobs true"),
        ({"max_completion_tokens": 3}, "max_tokens and max_completion_tokens differ"),
    ],
)
def test_what_is_refused_of_a_chat(client, change, sentence):
    found = client().post("/v1/chat/completions", json={**CHAT, **change})
    assert found.status_code == 400 and found.json()["error"]["message"].startswith(sentence)


def test_fields_that_change_nothing_are_taken(client):
    client = client()
    neutral = {"user": "me", "best_of": 1, "suffix": None, "presence_penalty": 0, "logit_bias": {}}
    assert completion(client, **neutral)["choices"] == completion(client)["choices"]


def test_bodies(client):
    client = client(body_bytes=500)
    send = {"headers": {"content-type": "application/json"}}
    for raw, status, sentence in [
        (b"{", 400, "the body is no JSON"),
        (b"\xff", 400, "the body is no JSON"),
        (b"[]", 400, "the body: input should be an object"),
        (b"{" * 400, 400, "the body is no JSON"),
        (b" " * 501, 413, "the body is larger than 500 bytes"),
    ]:
        found = client.post("/v1/completions", content=raw, **send)
        assert found.status_code == status and sentence in found.json()["error"]["message"]
    found = client.post("/v1/completions", content=b"{}", headers={"content-type": "text/plain"})
    assert found.status_code == 415
    assert client.get("/v1/completions").status_code == 405
    assert client.get("/nothing").json()["error"]["message"] == "GET /nothing is not served here"


def test_keys(client):
    client = client(api_key="secret")
    for headers in ({}, {"Authorization": "Bearer other"}, {"Authorization": "Basic secret"}):
        found = client.post("/v1/completions", json=PROMPT, headers=headers)
        assert found.status_code == 401 and "the API key" in found.json()["error"]["message"]
    right = {"Authorization": "Bearer secret"}
    assert client.post("/v1/completions", json=PROMPT, headers=right).status_code == 200
    assert client.get("/v1/models", headers=right).status_code == 200
    assert client.get("/health").status_code == 200


def test_a_full_queue_and_a_server_that_stops(client):
    client = client(batch=1, queue=1)
    client.scheduler.queue = 0
    found = client.post("/v1/completions", json=PROMPT)
    assert found.status_code == 503 and found.headers["retry-after"] == "5"
    client.scheduler.stop(0)
    found = client.post("/v1/completions", json=PROMPT)
    assert found.status_code == 503 and "stopping" in found.json()["error"]["message"]
    assert client.get("/health").status_code == 503


@pytest.mark.parametrize("stream", [False, True])
def test_time_runs_out(client, stream):
    found = client(timeout=1e-6).post("/v1/completions", json={**PROMPT, "stream": stream})
    assert found.status_code == 504
    assert found.json()["error"]["message"] == "the request took longer than 1e-06 s"


def test_what_breaks_is_told_and_logged(client, decoder, caplog):
    def broken(*arguments: Any) -> None:
        raise ZeroDivisionError("secret")

    decoder.step = broken
    found = client().post("/v1/completions", json=PROMPT)
    assert found.status_code == 500 and "secret" not in found.text
    assert "ZeroDivisionError" in caplog.text
    pieces = events(client(), "/v1/completions", PROMPT)
    assert pieces[-1]["error"]["type"] == "server_error"


def test_models_and_metrics(client):
    client = client(cache_tokens=50)
    completion(client)
    found = client.get("/v1/models").json()["data"]
    assert [model["id"] for model in found] == ["tiny", "other"]
    assert client.get("/v1/models/other").json()["max_model_len"] == 50
    assert client.get("/v1/models/none").status_code == 404
    lines = dict(
        line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines() if line[0] != "#"
    )
    assert lines["ms_quant_generation_tokens_total"] == "8.0"
    assert lines["ms_quant_prompt_tokens_total"] == "6.0"
    assert lines["ms_quant_step_texts_sum"] == "7.0"
    assert lines["ms_quant_cache_tokens"] == "50.0"
    assert lines["ms_quant_texts_running"] == lines["ms_quant_cache_tokens_reserved"] == "0.0"
    assert lines['ms_quant_requests_total{path="/v1/completions",status="200"}'] == "1.0"
    assert lines["ms_quant_time_to_first_token_seconds_count"] == "1.0"
