"""Rules from the literature that choose a rate per layer group, or when to train and to stop.

Each is a `Controller` (see `agents.baselines`) and acts once a window of K inner steps, where
its source acts once an inner step or an epoch. `top` is the coefficient that is tuned. Where the
telemetry that a rule needs is not finite, the rule keeps the multipliers it has.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from agents import baselines
from agents.baselines import LEVELS, Controller
from asg_env.core.telemetry import Telemetry
from asg_env.core.trainer import Trainer
from asg_env.instances import Instance
from asg_env.validation import ConfigError

FLOOR = 0.001  # lowest multiplier that `Hypergradient` reaches


@dataclass
class _FromTelemetry:
    """All groups have `top` in the first window; what follows is read off each window's report."""

    top: float

    def begin(self, instance: Instance, trainer: Trainer) -> None:
        """Start at the top."""
        self._now = [self.top] * len(trainer.layer_groups)

    def multipliers(self, progress: float, telemetry: Telemetry | None) -> Sequence[float]:
        """Return what the rule makes of the last window's report."""
        if telemetry is not None:
            self._now = self._after(telemetry)
        return self._now

    def _after(self, telemetry: Telemetry) -> list[float]:
        raise NotImplementedError


@dataclass
class AutoRGN(_FromTelemetry):
    """Rates in proportion to each group's relative gradient norm: m_g = top * r_g / max r.

    r_g = |grad_g| / |w_g|. Source: Auto-RGN of surgical fine-tuning (Lee et al., ICLR 2023).
    Differs: the gradient is that of the window's last batch.
    """

    def _after(self, telemetry: Telemetry) -> list[float]:
        ratios = _ratios(telemetry.grad_norms, telemetry.weight_norms)
        return [self.top * r / max(ratios) for r in ratios] if ratios else self._now


@dataclass
class LARS(_FromTelemetry):
    """Steps of the same relative length in every group: m_g = min(1, trust * t_g).

    t_g = |w_g| / (|grad_g| + weight_decay * |w_g|). Source: LARS (You et al., 2017), whose
    coefficient `trust` is 0.001. Differs: `trust` is such that the largest group has `top` when
    t is first known, after the first window, for t may be 5 on one network and 500 on another;
    from then on `trust` stands. The gradient is that of the window's last batch.
    """

    def begin(self, instance: Instance, trainer: Trainer) -> None:
        """Start at the top, the trust coefficient not yet known."""
        super().begin(instance, trainer)
        self._weight_decay = trainer.settings.weight_decay
        self._trust: float | None = None

    def _after(self, telemetry: Telemetry) -> list[float]:
        weights, decay = telemetry.weight_norms, self._weight_decay
        pulls = [g + decay * w for g, w in zip(telemetry.grad_norms, weights, strict=True)]
        ratios = _ratios(weights, pulls)
        if not ratios:
            return self._now
        self._trust = self._trust or self.top / max(ratios)
        return [min(1.0, self._trust * ratio) for ratio in ratios]


@dataclass
class Hypergradient(_FromTelemetry):
    """Raise a group's rate while its steps still go downhill, lower it once they go too far.

    m_g <- m_g * exp(rate * cos_g), within `FLOOR` and 1, from `top`; cos_g is the telemetry's
    `alignments`. Source: the multiplicative form of hypergradient descent (Baydin et al., ICLR
    2018). Differs: the direction is that of a window's way and not of the last step, the product
    is normalised to a cosine per group, and exp(x) stands for 1 + x, which could become negative.
    """

    rate: float = 1.0  # a window at cosine 1 multiplies by e

    def __post_init__(self) -> None:
        _check(self.rate > 0, "hypergradient", "rate", "> 0", self.rate)

    def _after(self, telemetry: Telemetry) -> list[float]:
        return [
            min(max(m * math.exp(self.rate * cos), FLOOR), 1.0) if math.isfinite(cos) else m
            for m, cos in zip(self._now, telemetry.alignments, strict=True)
        ]


@dataclass
class GradualUnfreezing:
    """The head alone, then one more group from the back at equal parts of the first `share`.

    Source: ULMFiT (Howard and Ruder, 2018), which unfreezes one group an epoch. Differs: of
    ULMFiT's three measures only this one; every group that trains has `top`, and from `share` on
    all do. The optimizer goes on gathering the gradients of a frozen group.
    """

    top: float
    share: float = 0.5  # of the inner steps

    def __post_init__(self) -> None:
        _check(0 <= self.share <= 1, "gradual-unfreezing", "share", "in [0, 1]", self.share)

    def begin(self, instance: Instance, trainer: Trainer) -> None:
        """Remember the number of groups."""
        self._groups = len(trainer.layer_groups)

    def multipliers(self, progress: float, telemetry: Telemetry | None) -> Sequence[float]:
        """Return zeros for the groups near the input, `top` for the others."""
        done = progress / self.share if progress < self.share else 1.0
        frozen = math.ceil((1 - done) * (self._groups - 1) - 1e-9)  # 1e-9: 0.1 * 3 is not 0.3
        return [0.0] * frozen + [self.top] * (self._groups - frozen)


@dataclass
class EarlyStopping:
    """`top` for every group until the loss on inner_valid stops falling, then the best weights.

    Source: textbook early stopping with patience (Prechelt, 1998). When the loss has not fallen
    for `patience` windows, the weights with the lowest loss are put back, the optimizer's state
    is emptied, and all multipliers are 0 to the end. Nothing can be read after the last window,
    so before it the best weights are put back at once unless they are the present ones, which
    train on; it is known if no longer than the one before. A non-finite loss has not fallen.
    """

    top: float
    patience: int = 2  # windows

    def __post_init__(self) -> None:
        whole = type(self.patience) is int and self.patience >= 1
        _check(whole, "early-stopping", "patience", "an integer >= 1", self.patience)

    def begin(self, instance: Instance, trainer: Trainer) -> None:
        """Remember the trainer; ConfigError where inner_valid cannot be read or weights held."""
        _check_inner_valid(trainer, "early-stopping")
        if trainer.settings.optimizer == "schedule-free":  # its average moves on at rate 0
            raise ConfigError("rule 'early-stopping' cannot hold schedule-free weights; use sgd")
        self._trainer, self._stopped = trainer, False
        self._empty_state = trainer.snapshot()["optimizer"]
        self._best: dict[str, Any] | None = None
        self._lowest, self._waited, self._read_at = math.inf, 0, 0

    def multipliers(self, progress: float, telemetry: Telemetry | None) -> Sequence[float]:
        """Read the loss; return `top`, or zeros once stopped."""
        if telemetry is not None and not self._stopped:
            self._read()
        return [0.0 if self._stopped else self.top] * len(self._trainer.layer_groups)

    def _read(self) -> None:
        trainer = self._trainer
        window, self._read_at = trainer.inner_step - self._read_at, trainer.inner_step
        loss = trainer.evaluate("inner_valid").loss
        if loss < self._lowest:
            self._lowest, self._waited, self._best = loss, 0, trainer.snapshot()
            return
        self._waited += 1
        last = trainer.settings.total_steps - trainer.inner_step <= window
        if self._best is not None and (self._waited >= self.patience or last):
            # Time does not go back. State must go: momentum would move the weights at rate 0.
            now = {"optimizer": self._empty_state, "inner_step": trainer.inner_step}
            trainer.restore(self._best | now)
            self._best, self._stopped = None, True


@dataclass
class PilotSearch:
    """Try every level in a short run of this very training, then train with the best.

    Every level of `LEVELS` trains all groups for `steps` inner steps from the start; the one
    with the lowest loss on inner_valid is used throughout. A pilot that diverged is worst; of
    equals the lower level is taken. Source: the learning-rate range test (Smith, 2017), as
    separate runs.
    """

    steps: int = 10  # [inner steps] per level

    def __post_init__(self) -> None:
        whole = type(self.steps) is int and self.steps >= 1
        _check(whole, "pilot-search", "steps", "an integer >= 1", self.steps)

    @property
    def extra_inner_steps(self) -> int:
        """Inner steps that the pilots of one episode take, beyond those of the training."""
        return self.steps * len(LEVELS)

    def begin(self, instance: Instance, trainer: Trainer) -> None:
        """Run the pilots and go back; ConfigError where the task has no inner_valid."""
        _check_inner_valid(trainer, "pilot-search")
        self._groups = len(trainer.layer_groups)
        start = trainer.snapshot()
        losses = {}
        for level in sorted(LEVELS):
            telemetry = trainer.run(self.steps, [level] * self._groups)
            loss = math.inf if telemetry.diverged else trainer.evaluate("inner_valid").loss
            losses[level] = loss if math.isfinite(loss) else math.inf
            trainer.restore(start)
        self._level = min(losses, key=lambda level: losses[level])

    def multipliers(self, progress: float, telemetry: Telemetry | None) -> Sequence[float]:
        """Return the best pilot's level."""
        return [self._level] * self._groups


def _ratios(over: Sequence[float], under: Sequence[float]) -> list[float] | None:
    """Divide one by one; None unless all are finite and one is not 0."""
    if not all(u > 0 for u in under):  # NaN is not
        return None
    ratios = [o / u for o, u in zip(over, under, strict=True)]
    return ratios if all(map(math.isfinite, ratios)) and max(ratios) > 0 else None


def _check(fine: bool, rule: str, option: str, bound: str, value: object) -> None:
    if not fine:
        raise ConfigError(f"`{option}` of {rule} must be {bound}, got {value!r}; set it so")


def _check_inner_valid(trainer: Trainer, rule: str) -> None:
    split = trainer.splits.get("inner_valid")
    if split is None or split.labels is None:
        raise ConfigError(
            f"rule '{rule}' needs labelled inner_valid images, which this task lacks; use another"
        )


# Rule name -> its builder, called with the number of layer groups, `top` and the rule's options.
RULES: dict[str, Callable[..., Controller]] = {
    "uniform": lambda groups, top: baselines.uniform(top, groups),
    "small-backbone": lambda groups, top: baselines.small_backbone(top, groups),
    "frozen-backbone": lambda groups, top: baselines.frozen_backbone(top, groups),
    "layer-decay": lambda groups, top, decay=0.65: baselines.layer_decay(top, decay, groups),
    "cosine": lambda groups, top: baselines.Cosine(top),
    "plateau": lambda groups, top, **options: baselines.ReduceOnPlateau(top, **options),
    "back-off": lambda groups, top, **options: baselines.BackOff(top, **options),
    "auto-rgn": lambda groups, top: AutoRGN(top),
    "lars": lambda groups, top: LARS(top),
    "hypergradient": lambda groups, top, **options: Hypergradient(top, **options),
    "gradual-unfreezing": lambda groups, top, **options: GradualUnfreezing(top, **options),
    "early-stopping": lambda groups, top, **options: EarlyStopping(top, **options),
    "pilot-search": lambda groups, top=None, **options: PilotSearch(**options),  # no top
}


def _family(rule: str) -> Callable[[int], dict[str, Controller]]:
    return lambda groups: {f"{m:g}": RULES[rule](groups, m) for m in LEVELS}


# Family name -> its candidates, given the number of layer groups; see `baselines.FAMILIES`.
_TUNED = ("auto-rgn", "lars", "hypergradient", "gradual-unfreezing", "early-stopping")
RULE_FAMILIES: dict[str, Callable[[int], dict[str, Controller]]] = {
    **{rule: _family(rule) for rule in _TUNED},
    "pilot-search": lambda groups: {f"{steps} steps": PilotSearch(steps) for steps in (10, 30)},
}
