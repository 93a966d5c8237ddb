"""Observations: what an agent sees of a window, as a bounded float32 vector with labels."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from gymnasium import spaces

from asg_env.actions import GridName, grid_positions
from asg_env.core.telemetry import Telemetry

ObservationName = Literal["asg", "scaled", "extended", "normalised"]

NEED_INNER_VALID: tuple[ObservationName, ...] = ("extended", "normalised")
SCALED_BOUND = 2.0  # of every entry of all encodings but `asg`
LOSS_BOUND = 20.0  # nats, of CE and KL in `asg`
WEIGHT_BOUND = 10.0  # of the head's weight statistics in `asg`


class Observation:
    """One of the four encodings, for given layer groups.

    `asg`: CE, KL (both window means, nats), progress, mean and standard deviation of the head's
    last weight, then the multipliers used: the original's 12 numbers at 7 groups
    (docs/original.md, section 2).

    `scaled`: log CE, its change since the last window, log KL, progress, and each group's
    position on the grid, all about [-1, 1].

    `extended`: `scaled`, then the log of the inner_valid loss and of every guidance term other
    than KL, and per group the log of gradient norm, of drift from the pretrained weights and of
    update-to-weight ratio.

    `normalised`: as `extended`, in quantities that do not depend on the size of a layer or the
    number of classes, so that a controller may be used on other networks: cross-entropies over
    that of chance, ln C; gradient norms over weight norms; and the alignment of the last gradient
    with the way that the weights went, which says whether a rate is too small or too large.
    """

    def __init__(
        self,
        name: ObservationName,
        layer_groups: Sequence[str],
        grid: GridName,
        terms: Sequence[str] = (),
    ) -> None:
        self.name = name
        self._terms = tuple(terms)
        self._grid: GridName = grid
        self.needs_inner_valid = name in NEED_INNER_VALID
        moved = ("log_drift", "log_update_ratio")
        per_group = {
            "asg": ("multiplier",),
            "scaled": ("position",),
            "extended": ("position", "log_grad_norm", *moved),
            "normalised": ("position", "alignment", "log_relative_gradient", *moved),
        }[name]
        scaled = ("log_ce", "log_ce_change", "log_kl", "progress")
        extended = (*scaled, "log_inner_valid_loss", *(f"log_{term}" for term in terms))
        shared = {
            "asg": ("ce", "kl", "progress", "head_mean", "head_std"),
            "scaled": scaled,
            "extended": extended,
            "normalised": extended,
        }[name]
        self.labels = shared + tuple(
            f"{quantity}/{group}" for quantity in per_group for group in layer_groups
        )
        if name == "asg":
            ones = np.ones(len(layer_groups))
            low = np.concatenate([[0, 0, 0, -WEIGHT_BOUND, 0], 0 * ones])
            high = np.concatenate([[LOSS_BOUND, LOSS_BOUND, 1, WEIGHT_BOUND, WEIGHT_BOUND], ones])
        else:
            high = np.full(len(self.labels), SCALED_BOUND)
            low = -high
        self.space = spaces.Box(low.astype(np.float32), high.astype(np.float32), dtype=np.float32)

    def encode(
        self,
        telemetry: Telemetry,
        previous_ce: float,
        progress: float,
        multipliers: Sequence[float],
        inner_valid_loss: float,
        chance_loss: float,
    ) -> np.ndarray:
        """Return the observation, clipped to its space; non-finite entries become a bound.

        Args:
            telemetry: Report of the window just run.
            previous_ce: CE of the window before it, nats.
            progress: Share of the inner steps that is over.
            multipliers: Nominal multipliers used in the window, (G,).
            inner_valid_loss: CE on inner_valid, nats; read by `extended` and `normalised`.
            chance_loss: CE of guessing, ln C, nats; read by `normalised`.
        """
        if self.name == "asg":
            head = (telemetry.head_mean, telemetry.head_std)
            values = np.array([telemetry.ce, telemetry.kl, progress, *head, *multipliers])
        else:
            unit = chance_loss if self.name == "normalised" else 1.0
            losses = (telemetry.ce / unit, previous_ce / unit, inner_valid_loss / unit)
            log_ce, previous, log_loss = _scaled_log(losses, 1e-3, 4)
            (log_kl,) = _scaled_log((telemetry.kl,), 1e-4, 5)
            shared = [log_ce, 4 * (log_ce - previous), log_kl, progress]
            positions = grid_positions(multipliers, self._grid)
            if self.name == "scaled":
                values = np.array([*shared, *positions])
            else:
                moved = 1 + _scaled_log((*telemetry.drifts, *telemetry.update_ratios), 1e-4, 5)
                held = _scaled_log([telemetry.guidance[term] for term in self._terms], 1e-4, 5)
                values = np.array(
                    [*shared, log_loss, *held, *positions, *self._gradients(telemetry), *moved]
                )
        values = np.where(np.isnan(values), np.inf, values)
        return np.asarray(np.clip(values, self.space.low, self.space.high), dtype=np.float32)

    def _gradients(self, telemetry: Telemetry) -> list[float]:
        """What the last gradient says of each group: its norm, or alignment and relative norm."""
        if self.name == "extended":
            return list(_scaled_log(telemetry.grad_norms, 1e-3, 4))
        pairs = zip(telemetry.grad_norms, telemetry.weight_norms, strict=True)
        relative = [norm / weight if weight else 0.0 for norm, weight in pairs]
        return [*telemetry.alignments, *_scaled_log(relative, 1e-3, 4)]


def _scaled_log(values: Sequence[float], offset: float, scale: float) -> np.ndarray:
    """Natural log of non-negative quantities, kept finite at 0, divided to about [-1, 1]."""
    return np.asarray(np.log(np.array(values, dtype=np.float64) + offset) / scale)
