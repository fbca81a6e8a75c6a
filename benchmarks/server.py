"""Tokens a second of ms-quant serve, one client alone and several at once; first-token times.

One client and several take turns, so that a machine that others use slows both; ratios count then.

    python benchmarks/server.py models/stdlib-qwen3-6m [--clients 8] [--tokens 200] [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.request import Request, urlopen

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))
from server_process import served

PROMPTS = ["import os", "def main(", "class Reader:", "for name in", "return", "try:", "#", "with"]


def ask(address: str, prompt: str, tokens: int) -> tuple[float, float, str]:
    """Seconds to the first token and to the last, and the text."""
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
    data = json.dumps({**body, "ignore_eos": True}).encode()
    started, first, text = time.monotonic(), 0.0, ""
    kind = {"Content-Type": "application/json"}
    with urlopen(Request(f"{address}/v1/completions", data, kind), timeout=600) as answer:
        for line in answer:
            if line.startswith(b"data: {"):
                first = first or time.monotonic() - started
                text += json.loads(line[6:])["choices"][0]["text"]
    return first, time.monotonic() - started, text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(given.clients)]
    found: dict[str, list[float]] = {"alone": [], "together": [], "ratio": [], "first": []}
    with served(given.model) as server, ThreadPoolExecutor(given.clients) as pool:
        ask(server.address, "warm", 8)
        for _ in range(given.rounds):
            started = time.monotonic()
            one = [ask(server.address, prompt, given.tokens) for prompt in prompts]
            alone = given.clients * given.tokens / (time.monotonic() - started)
            started = time.monotonic()
            many = list(pool.map(lambda prompt: ask(server.address, prompt, given.tokens), prompts))
            together = given.clients * given.tokens / (time.monotonic() - started)
            assert [text for *_, text in one] == [text for *_, text in many]
            found["alone"].append(alone)
            found["together"].append(together)
            found["ratio"].append(together / alone)
            found["first"] += [first for first, *_ in one]
    middle = {name: statistics.median(values) for name, values in found.items()}
    print(f"one client at a time:  {middle['alone']:8.0f} tokens/s")
    print(f"{given.clients} clients at once:     {middle['together']:8.0f} tokens/s in sum")
    low, high = min(found["ratio"]), max(found["ratio"])
    print(f"ratio:                 {middle['ratio']:8.2f} (from {low:.2f} to {high:.2f})")
    print(f"first token, alone:    {1000 * middle['first']:8.1f} ms")


if __name__ == "__main__":
    main()
