"""The frozen pretrained network: where training starts and what guidance holds on to."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from asg_env.core.data import Split
from asg_env.core.evaluation import forward_all
from asg_env.core.numerics import Precision, autocast
from asg_env.core.optimizee import Optimizee

REMEMBERED_BYTES = 2**30  # features of a whole split above this are computed batch by batch


class LayerOutputs:
    """Keeps the last output of those modules of a backbone that somebody watches."""

    def __init__(self, backbone: nn.Module) -> None:
        self._backbone = backbone
        self._last: dict[str, Tensor] = {}
        self._watched: set[str] = set()
        self._compiled = 0  # layers watched when somebody last asked

    def watch(self, layer: str) -> None:
        """Keep the output of a module from now on; "" is the whole backbone.

        Raises:
            ValueError: The backbone has no such module.
        """
        if layer in self._watched:
            return
        try:
            module = self._backbone.get_submodule(layer)
        except AttributeError:
            names = ", ".join(name for name, _ in self._backbone.named_children())
            raise ValueError(
                f"must be the dotted name of a module of the backbone, such as {names}, got "
                f"{layer!r}"
            ) from None

        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            self._last[layer] = output

        module.register_forward_hook(keep)
        self._watched.add(layer)

    def grown(self) -> bool:
        """Whether layers were added since this was last asked."""
        before, self._compiled = self._compiled, len(self._watched)
        return self._compiled > before

    def clear(self) -> None:
        """Forget the outputs of the last forward pass."""
        self._last.clear()

    def last(self, layer: str) -> Tensor:
        """Return the output of the last forward pass, float32."""
        return self._last[layer].float()


class Teacher:
    """A copy of the pretrained backbone, under the frozen old head.

    Source: ASG's frozen ImageNet network (docs/original.md, section 1).
    """

    def __init__(self, optimizee: Optimizee, precision: Precision, device: torch.device) -> None:
        """Copy the backbone of an optimizee that has not been trained yet."""
        self.backbone = copy.deepcopy(optimizee.backbone).requires_grad_(False)
        self.outputs = LayerOutputs(self.backbone)
        self._old_head = optimizee.old_head
        self._precision, self._device = precision, device
        self._remembered: dict[str, Tensor] = {}
        self._features: dict[tuple[str, str], Tensor | None] = {}

    @torch.no_grad()
    def restore(self, optimizee: Optimizee) -> None:
        """Copy the pretrained weights and statistics back into the optimizee's backbone."""
        tensors = list(optimizee.backbone.state_dict().values())
        torch._foreach_copy_(tensors, list(self.backbone.state_dict().values()))

    @torch.no_grad()
    def log_probs(self, images: Tensor) -> Tensor:
        """Return log-probabilities of the old classes, shape (B, C_old), float32."""
        with autocast(self._precision, self._device):
            logits = self._old_head(self.backbone(images))
        return torch.log_softmax(logits.float(), dim=1)

    def of_split(self, name: str, split: Split) -> Tensor:
        """Log-probabilities for a whole split, (N, C_old): computed once, as images are fixed."""
        if name not in self._remembered:
            self._remembered[name] = forward_all(split, self.log_probs)
        return self._remembered[name]

    @torch.no_grad()
    def features(self, layer: str, images: Tensor) -> Tensor:
        """Return a watched layer's output for a batch, shape (B, ...), float32."""
        self.log_probs(images)
        return self.outputs.last(layer)

    def features_of_split(self, name: str, split: Split, layer: str) -> Tensor | None:
        """A watched layer's output for a whole split, computed once; None if it is too large."""
        if (name, layer) not in self._features:
            one = self.features(layer, split.batch(slice(0, 1)))
            fits = one.numel() * one.element_size() * len(split) <= REMEMBERED_BYTES
            self._features[name, layer] = (
                forward_all(split, lambda images: self.features(layer, images)) if fits else None
            )
        return self._features[name, layer]
