"""The frozen pretrained network: where training starts and what the KL term holds on to."""

import copy

import torch
from torch import Tensor

from asg_env.core.data import Split
from asg_env.core.evaluation import forward_all
from asg_env.core.numerics import Precision, autocast
from asg_env.core.optimizee import Optimizee


class Teacher:
    """A copy of the pretrained backbone, under the frozen old head.

    Source: ASG's frozen ImageNet network (docs/original.md, section 1).
    """

    def __init__(self, optimizee: Optimizee, precision: Precision, device: torch.device) -> None:
        """Copy the backbone of an optimizee that has not been trained yet."""
        self._backbone = copy.deepcopy(optimizee.backbone).requires_grad_(False)
        self._old_head = optimizee.old_head
        self._precision, self._device = precision, device
        self._remembered: dict[str, Tensor] = {}

    @torch.no_grad()
    def restore(self, optimizee: Optimizee) -> None:
        """Copy the pretrained weights and statistics back into the optimizee's backbone."""
        tensors = list(optimizee.backbone.state_dict().values())
        torch._foreach_copy_(tensors, list(self._backbone.state_dict().values()))

    @torch.no_grad()
    def log_probs(self, images: Tensor) -> Tensor:
        """Return log-probabilities of the old classes, shape (B, C_old), float32."""
        with autocast(self._precision, self._device):
            logits = self._old_head(self._backbone(images))
        return torch.log_softmax(logits.float(), dim=1)

    def of_split(self, name: str, split: Split) -> Tensor:
        """Log-probabilities for a whole split, (N, C_old): computed once, as images are fixed."""
        if name not in self._remembered:
            self._remembered[name] = forward_all(split, self.log_probs)
        return self._remembered[name]
