"""Two checkpoints on the same questions: which answers changed, and whether that is noise.

Accuracy hides answers that change in both directions (arXiv 2407.09141). The test is McNemar's,
exact: if the two were equally good, a question that one of them alone has right would be as likely
to be the one's as the other's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ms_quant.errors import BadArgumentError
from ms_quant.tasks.result import TaskResult


def mcnemar(lost: int, won: int) -> float:
    """The probability of a difference as large as this or larger, in either direction, by chance.

    Args:
        lost: questions that only the other has right.
        won: questions that only the first has right.
    """
    count, term, tail = lost + won, 1, 0
    for k in range(min(lost, won) + 1):
        tail += term
        term = term * (count - k) // (k + 1)
    return min(1.0, 2 * tail / (1 << count))


@dataclass(frozen=True)
class Pairing:
    """How the answers of a model differ from those of another.

    Attributes:
        against: what the other made of the task.
        difference: share of right answers of the model, less that of the other, over all
            questions, by the metric that people quote.
        error: its standard error; None of one question.
        changed: share of questions with another answer.
        lost: questions that only the other has right.
        won: questions that only the model has right.
        p_value: of McNemar's exact test.
        kl_divergence: of the model's next token behind a prompt from the other's, mean, in nats.
        kl_divergence_error: its standard error; None of one question.
        top1_agreement: share of prompts behind which both find the same next token likeliest.
    """

    against: TaskResult
    difference: float
    error: float | None
    changed: float
    lost: int
    won: int
    p_value: float
    kl_divergence: float
    kl_divergence_error: float | None
    top1_agreement: float

    @classmethod
    def of(
        cls, model: TaskResult, against: TaskResult, divergences: np.ndarray, same: np.ndarray
    ) -> Pairing:
        """Compares what two made of a task.

        Args:
            model: what the model made of it.
            against: what the other made of it.
            divergences: of the next token behind each prompt, float64.
            same: whether both find the same one likeliest.

        Raises:
            MsQuantError: the questions are not the same.
        """
        metric, pairs = model.task.quoted, list(zip(model.answers, against.answers, strict=False))
        places = [[(a.subject, a.number) for a in part.answers] for part in (model, against)]
        if places[0] != places[1]:
            raise BadArgumentError(
                f"against: answered {len(places[1])} other questions, expected the "
                f"{len(places[0])} of the model"
            )
        won = sum(a.right[metric] and not b.right[metric] for a, b in pairs)
        lost = sum(b.right[metric] and not a.right[metric] for a, b in pairs)
        count = len(pairs)
        difference = (won - lost) / count
        spread = (won + lost) / count - difference**2
        return cls(
            against,
            difference,
            math.sqrt(spread / (count - 1)) if count > 1 else None,
            sum(a.chosen[metric] != b.chosen[metric] for a, b in pairs) / count,
            lost,
            won,
            mcnemar(lost, won),
            float(divergences.mean()),
            float(divergences.std(ddof=1)) / math.sqrt(count) if count > 1 else None,
            float(same.mean()),
        )

    def as_json(self) -> dict[str, Any]:
        """What the command prints of it."""
        return {
            "against_accuracy": self.against.accuracy,
            "against_totals": self.against.as_json()["totals"],
            "against_categories": self.against.as_json()["categories"],
            "against_subjects": self.against.as_json()["subjects"],
            "difference": self.difference,
            "difference_error": self.error,
            "changed_answers": self.changed,
            "right_to_wrong": self.lost,
            "wrong_to_right": self.won,
            "p_value": self.p_value,
            "kl_divergence": self.kl_divergence,
            "kl_divergence_error": self.kl_divergence_error,
            "top1_agreement": self.top1_agreement,
        }
