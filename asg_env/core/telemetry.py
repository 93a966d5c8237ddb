"""What a window of inner steps reports, gathered with one host synchronisation."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Telemetry:
    """Report of one window of K inner steps; may hold non-finite numbers when `diverged`.

    Attributes:
        ce: Cross-entropy of the new head, mean over the window's steps, nats.
        kl: KL(teacher || student), unweighted, mean over the window's steps, nats.
        objective: CE plus weighted guidance, mean over the window's steps.
        head_mean: Mean of the head's last weight matrix, averaged over the steps.
        head_std: Its standard deviation (unbiased), averaged over the steps.
        grad_norms: L2 norm of the last step's gradient per layer group, (G,).
        drifts: Relative L2 distance ||w - w0|| / ||w0|| from the start of training, (G,). For
            the head, w0 is its initial draw.
        update_ratios: ||w_end - w_start|| / ||w_end|| over the window, (G,).
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
    diverged: bool
    cause: str


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
        self._now, self._gradient, self.initial, self._moved, self._stepped = rows

    def start_training(self) -> None:
        """Remember the weights as those from which drift is measured."""
        torch.cat(self._weights, out=self.initial)

    def start_window(self) -> None:
        """Remember the weights as those at the start of the window."""
        torch.cat(self._weights, out=self._stepped)

    def report(self, steps: Sequence[Tensor]) -> Telemetry:
        """Reduce the window to its report; the `.tolist()` below is its one host sync.

        Args:
            steps: Per inner step its ce, kl, objective, head mean and head std, one after another.
        """
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
        torch.cat(self._weights, out=self._now)
        torch.cat([_flat(gradient) for gradient in gradients], out=self._gradient)
        torch.sub(self._now, self.initial, out=self._moved)
        torch.sub(self._now, self._stepped, out=self._stepped)
        parts = self._rows.split(self._sizes, dim=1)
        norms = torch.stack([torch.linalg.vector_norm(part, dim=1) for part in parts], dim=1)
        means = torch.stack(list(steps)).view(-1, 5).mean(dim=0)
        numbers = torch.cat([means, norms.flatten()]).tolist()
        ce, kl, objective, head_mean, head_std = numbers[:5]
        groups = len(self._sizes)
        weights, grad_norms, initial, moved, stepped = (
            tuple(numbers[5 + groups * i : 5 + groups * (i + 1)]) for i in range(5)
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
            diverged=bool(cause),
            cause=cause,
        )


def _flat(tensor: Tensor) -> Tensor:
    """View a dense tensor as one vector in the order of its memory, channels-last or not."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))
