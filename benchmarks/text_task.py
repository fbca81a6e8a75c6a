"""A task made from a text: which of four lines comes next. For `ms-quant eval --task`.

    python benchmarks/text_task.py models/text/heldout.txt lines.jsonl --questions 400

The wrong lines are lines of the same text of about the same length, which come elsewhere.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from random import Random

BEFORE = 12  # lines that are shown
CHOICES = 4
NEAR = 0.2  # how much longer or shorter a wrong line may be


def questions(lines: list[str], count: int, seed: int = 0) -> list[dict[str, object]]:
    """So many questions, in the order of the text."""
    random = Random(seed)
    places = [
        i for i in range(BEFORE, len(lines)) if 20 <= len(lines[i]) <= 80 and lines[i - 1].strip()
    ]
    long = [line for line in {lines[i].strip() for i in places} if len(line) > 10]
    long.sort()
    found: list[dict[str, object]] = []
    for place in sorted(random.sample(places, count)):
        right = lines[place].strip()
        near = [
            line
            for line in random.sample(long, len(long))
            if line != right and abs(len(line) - len(right)) <= NEAR * len(right)
        ][: CHOICES - 1]
        choices = random.sample([right, *near], len(near) + 1)
        if len(choices) == CHOICES:
            text = "\n".join(lines[place - BEFORE : place]) + "\n"
            found.append({"prompt": text, "choices": choices, "answer": choices.index(right)})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--questions", type=int, default=400)
    asked = parser.parse_args()
    lines = asked.text.read_text(encoding="utf-8").splitlines()
    made = questions(lines, asked.questions)
    asked.out.write_text("".join(json.dumps(one) + "\n" for one in made), encoding="utf-8")
    print(f"{asked.out}: {len(made)} questions")


if __name__ == "__main__":
    main()
