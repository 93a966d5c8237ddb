"""Rewards: named terms, each from one kind of measurement, added with weights."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from asg_env.core.evaluation import Metric

LOSS_BOUND = 20.0  # nats; a larger or non-finite loss counts as this
DEFAULT_REWARD = "gain"


@dataclass(frozen=True)
class Measurements:
    """What the reward of one env step may be made of.

    Attributes:
        accuracy: By split, `outer_valid` and `inner_valid`; 0 after divergence.
        mean_recall: Likewise.
        metric: Which of the two the terms are about.
        loss: By split, nats.
        agreement: Share of `old_task` images on which the old head still agrees with the
            teacher; no label is read. 0 after divergence, and where nothing asked for it.
        objective: Mean training objective of the window, nats.
    """

    accuracy: Mapping[str, float]
    loss: Mapping[str, float]
    agreement: float
    objective: float
    mean_recall: Mapping[str, float] = field(default_factory=dict)
    metric: Metric = "accuracy"

    def score(self, split: str) -> float:
        """Return the figure of `metric` on a split."""
        return (self.accuracy if self.metric == "accuracy" else self.mean_recall)[split]


@dataclass(frozen=True)
class RewardTerm:
    """A term and the split it has to be measured on (None: telemetry alone)."""

    split: str | None
    value: Callable[[Measurements, Measurements, bool], float]


def bounded_loss(loss: float) -> float:
    """Return the loss, at most `LOSS_BOUND`, and that bound where it is not finite."""
    return min(loss, LOSS_BOUND) if math.isfinite(loss) else LOSS_BOUND


def _validation_terms(split: str, prefix: str) -> dict[str, RewardTerm]:
    return {
        f"{prefix}gain": RewardTerm(
            split, lambda now, before, last: now.score(split) - before.score(split)
        ),
        f"{prefix}level": RewardTerm(split, lambda now, before, last: now.score(split)),
        f"{prefix}terminal": RewardTerm(
            split, lambda now, before, last: now.score(split) if last else 0.0
        ),
        f"{prefix}loss": RewardTerm(
            split, lambda now, before, last: -bounded_loss(now.loss[split])
        ),
    }


REWARD_TERMS: dict[str, RewardTerm] = {
    **_validation_terms("outer_valid", ""),
    **_validation_terms("inner_valid", "inner_valid_"),
    "retention": RewardTerm("old_task", lambda now, before, last: now.agreement - before.agreement),
    "train_loss": RewardTerm(
        None,
        lambda now, before, last: bounded_loss(before.objective) - bounded_loss(now.objective),
    ),
}


class Reward:
    """A weighted sum of terms."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        self.weights = dict(weights)
        terms = [REWARD_TERMS[name] for name in self.weights]
        self.splits = tuple(sorted({term.split for term in terms if term.split}))

    def terms(self, now: Measurements, before: Measurements, last: bool) -> dict[str, float]:
        """Return each term's unweighted value for the env step from `before` to `now`."""
        return {name: REWARD_TERMS[name].value(now, before, last) for name in self.weights}

    def total(self, terms: Mapping[str, float]) -> float:
        """Return the weighted sum."""
        return sum(self.weights[name] * value for name, value in terms.items())
