"""What a window of inner steps reports, gathered with one host synchronisation."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Telemetry:
    """Report of one window of K inner steps; may hold non-finite numbers when `diverged`.

    Attributes:
        ce: Cross-entropy of the new head, mean over the window's steps, nats.
        kl: KL(teacher || student), unweighted, mean over the window's steps, nats.
        guidance: Name of each further guidance term to its value, unweighted, mean over the
            window's steps.
        objective: CE plus weighted guidance, mean over the window's steps.
        head_mean: Mean of the head's last weight matrix, averaged over the steps.
        head_std: Its standard deviation (unbiased), averaged over the steps.
        grad_norms: L2 norm of the last step's gradient per layer group, (G,).
        drifts: Relative L2 distance ||w - w0|| / ||w0|| from the start of training, (G,). For
            the head, w0 is its initial draw.
        update_ratios: ||w_end - w_start|| / ||w_end|| over the window, (G,).
        weight_norms: ||w_end||, (G,).
        alignments: Cosine of the last step's negative gradient with the way to where it was taken
            from where the last step of the window before was (or training began), (G,): positive
            where going on would still lower the objective. 0 where either is 0. The step that
            the gradient leads to is no part of the way, or noise alone would look like descent.
        diverged: A loss, gradient norm or weight was not finite.
        cause: Which one, in words; "" if none.
    """

    ce: float
    kl: float
    objective: float
    head_mean: float
    head_std: float
    grad_norms: tuple[float, ...]
    drifts: tuple[float, ...]
    update_ratios: tuple[float, ...]
    weight_norms: tuple[float, ...]
    alignments: tuple[float, ...]
    diverged: bool
    cause: str
    guidance: Mapping[str, float] = field(default_factory=dict)


class WindowRecorder:
    """Gathers a window's report from the parameters it watches.

    Norms are taken over flat copies in buffers that are kept: small fresh tensors in every window
    would cost more than the arithmetic.
    """

    def __init__(self, groups: Sequence[Sequence[Tensor]]) -> None:
        """Watch parameters whose storage stays in place, per layer group."""
        self._parameters = [parameter for group in groups for parameter in group]
        self._weights = [_flat(parameter) for parameter in self._parameters]
        self._sizes = [sum(p.numel() for p in group) for group in groups]
        rows = self._weights[0].new_zeros(5, sum(self._sizes))
        self._rows = rows
        self._now, self._gradient, self.initial, self._moved, self.started = rows
        self.marked, self._way = self._weights[0].new_zeros(2, sum(self._sizes))

    def start_training(self) -> None:
        """Remember the weights as those from which drift is measured."""
        torch.cat(self._weights, out=self.initial)
        self.marked.copy_(self.initial)
        self._way.zero_()

    def start_window(self) -> None:
        """Remember the weights as those at the start of the window."""
        torch.cat(self._weights, out=self.started)

    def mark(self) -> None:
        """Note where the window's last gradient was taken; to be called before its step."""
        torch.cat(self._weights, out=self._now)
        torch.sub(self._now, self.marked, out=self._way)
        self.marked.copy_(self._now)

    def report_before_training(self, step: Sequence[Tensor], terms: Sequence[str]) -> Telemetry:
        """Report on losses before any inner step: nothing has moved, norms are 0.

        Args:
            step: As one inner step of `report`.
            terms: As there.
        """
        ce, kl, objective, head_mean, head_std, *extra = torch.stack(list(step)).tolist()
        zeros = (0.0,) * len(self._sizes)
        return Telemetry(
            ce=ce,
            kl=kl,
            objective=objective,
            head_mean=head_mean,
            head_std=head_std,
            grad_norms=zeros,
            drifts=zeros,
            update_ratios=zeros,
            weight_norms=zeros,
            alignments=zeros,
            diverged=False,
            cause="",
            guidance=dict(zip(terms, extra, strict=True)),
        )

    def report(self, steps: Sequence[Tensor], terms: Sequence[str] = ()) -> Telemetry:
        """Reduce the window to its report; the `.tolist()` below is its one host sync.

        Args:
            steps: Per inner step its ce, kl, objective, head mean, head std and the value of each
                further guidance term, one after another.
            terms: Names of those terms.
        """
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
        torch.cat(self._weights, out=self._now)
        torch.cat([_flat(gradient) for gradient in gradients], out=self._gradient)
        torch.sub(self._now, self.initial, out=self._moved)
        torch.sub(self._now, self.started, out=self.started)
        parts = self._rows.split(self._sizes, dim=1)
        norms = torch.stack([torch.linalg.vector_norm(part, dim=1) for part in parts], dim=1)
        ways = self._way.split(self._sizes)
        aligned = [
            (torch.dot(part[1], way), torch.linalg.vector_norm(way))
            for part, way in zip(parts, ways, strict=True)
        ]
        dots = torch.stack([torch.stack(pair) for pair in aligned], dim=1).flatten()
        means = torch.stack(list(steps)).view(-1, 5 + len(terms)).mean(dim=0)
        numbers = torch.cat([means, norms.flatten(), dots]).tolist()
        ce, kl, objective, head_mean, head_std, *extra = numbers[: len(means)]
        groups = len(self._sizes)
        weights, grad_norms, initial, moved, stepped, products, ways_taken = (
            tuple(numbers[len(means) + groups * i :][:groups]) for i in range(7)
        )
        cause = ""
        if not all(map(math.isfinite, (ce, kl, objective))):
            cause = "a training loss is not finite"
        elif not all(map(math.isfinite, grad_norms)):
            cause = "a gradient norm is not finite"
        elif not all(map(math.isfinite, (*weights, *moved, *stepped))):
            cause = "a weight is not finite"
        return Telemetry(
            ce=ce,
            kl=kl,
            objective=objective,
            head_mean=head_mean,
            head_std=head_std,
            grad_norms=grad_norms,
            drifts=tuple(m / max(n, 1e-12) for m, n in zip(moved, initial, strict=True)),
            update_ratios=tuple(s / max(n, 1e-12) for s, n in zip(stepped, weights, strict=True)),
            weight_norms=weights,
            alignments=tuple(
                -dot / max(g * way, 1e-24)
                for dot, g, way in zip(products, grad_norms, ways_taken, strict=True)
            ),
            diverged=bool(cause),
            cause=cause,
            guidance=dict(zip(terms, extra, strict=True)),
        )


def _flat(tensor: Tensor) -> Tensor:
    """View a dense tensor as one vector in the order of its memory, channels-last or not."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))
