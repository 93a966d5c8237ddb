"""The trained network: a pretrained backbone, a new head, and the frozen old head."""

import math

import torch
from torch import Tensor, nn


class Optimizee(nn.Module):
    """The network that an episode trains.

    One pass through the trained backbone feeds both heads: the new one, trained on the task,
    and the old one, frozen, whose output on the trained features is held near the teacher's by
    the KL term (docs/original.md, section 1).

    The whole network stays in eval mode, as in the original: BatchNorm uses the pretrained
    running statistics while its affine parameters train.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module, old_head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.old_head = old_head.requires_grad_(False)
        self.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits of the new head (B, C) and of the old head (B, C_old)."""
        features = self.backbone(images)
        return self.head(features), self.old_head(features)

    def head_weight(self) -> Tensor:
        """Return the weight of the head's last linear layer, shape (C, F)."""
        return [m for m in self.head.modules() if isinstance(m, nn.Linear)][-1].weight

    @torch.no_grad()
    def initialise_head(self, generator: torch.Generator) -> None:
        """Draw the new head afresh: U(-1/sqrt(F), 1/sqrt(F)), PyTorch's default for Linear."""
        for module in self.head.modules():
            if isinstance(module, nn.Linear):
                bound = 1 / math.sqrt(module.in_features)
                for parameter in (module.weight, module.bias):
                    draw = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
                    parameter.copy_(draw)
