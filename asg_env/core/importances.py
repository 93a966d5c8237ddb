"""How much each weight matters to the old task: Synaptic Intelligence and Fisher information."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

EXACT_CLASSES = 16  # up to so many old classes the expectation over labels is exact


def path_importances(
    parameters: Sequence[Tensor],
    loss: Callable[[int], Tensor],
    optimizer: torch.optim.Optimizer,
    steps: int,
    damping: float,
) -> list[Tensor]:
    """Synaptic Intelligence: each weight's share of a fall in loss, over its squared way.

    omega_k = -sum_t g_k(t) (w_k(t+1) - w_k(t)), the path integral of the gradient;
    Omega_k = max(0, omega_k) / (Delta_k**2 + xi) with Delta_k = w_k(end) - w_k(start).

    Source: Zenke, Poole, Ganguli, "Continual Learning Through Synaptic Intelligence", ICML 2017,
    equations for omega and Omega. Differs in xi: `damping` times the tensor's mean Delta**2,
    since weights of different layers differ in size. A negative omega, a weight whose way raised
    the loss, counts as no importance.

    Args:
        parameters: The weights, at the start of the path; trained in place.
        loss: From the step's number to the old task's loss at the weights of that moment.
        optimizer: Over `parameters`.
        steps: Length of the path.
        damping: Dimensionless, > 0.

    Returns:
        Omega, one tensor for each parameter.
    """
    start = [p.detach().clone() for p in parameters]
    integral = [torch.zeros_like(p) for p in start]
    for step in range(steps):
        before = [p.detach().clone() for p in parameters]
        optimizer.zero_grad()
        loss(step).backward()
        optimizer.step()
        for total, parameter, old in zip(integral, parameters, before, strict=True):
            if parameter.grad is not None:
                total.sub_(parameter.grad * (parameter.detach() - old))
    found = []
    for total, parameter, first in zip(integral, parameters, start, strict=True):
        way = (parameter.detach() - first).square()
        tiny = torch.finfo(way.dtype).tiny  # of a tensor that stood still
        found.append(total.clamp(min=0) / (way + damping * way.mean() + tiny))
    return found


def diagonal_fisher(
    parameters: Sequence[Tensor],
    logits: Callable[[Tensor], Tensor],
    images: Tensor,
    generator: torch.Generator,
) -> list[Tensor]:
    """Diagonal of a classifier's Fisher information: E_x E_{y ~ p(y|x)} (d log p(y|x) / d w)**2.

    Source: Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", PNAS
    2017. Labels are the model's own, not the data's. Up to `EXACT_CLASSES` classes the
    expectation over them is exact; above, one label an image is drawn.

    Args:
        parameters: The weights.
        logits: From images (B, C, H, W) to logits (B, C_old).
        images: Where the expectation over x is taken, shape (N, C, H, W).
        generator: Source of drawn labels, on the CPU.

    Returns:
        The diagonal, one tensor for each parameter.
    """
    found = [torch.zeros_like(p) for p in parameters]
    for image in images.split(1):
        log_probs = torch.log_softmax(logits(image)[0], dim=0)
        probabilities = log_probs.detach().exp()
        if len(probabilities) <= EXACT_CLASSES:
            labels = list(range(len(probabilities)))
            shares = list(probabilities)
        else:
            labels = torch.multinomial(probabilities.cpu(), 1, generator=generator).tolist()
            shares = [torch.ones_like(probabilities[0])]
        for label, share in zip(labels, shares, strict=True):
            gradients = torch.autograd.grad(log_probs[label], list(parameters), retain_graph=True)
            for total, gradient in zip(found, gradients, strict=True):
                total.add_(share * gradient.square())
    return [total / len(images) for total in found]
