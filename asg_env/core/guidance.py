"""Guidance: terms of the objective that hold on to what the pretrained network knows.

A term is a class. It is built once, from the pretrained network and the options that the settings
give it, and called in every inner step; it returns a scalar. The objective is cross-entropy plus
the weighted terms. docs/guidance.md shows how to add one in a file of one's own.
"""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from asg_env.core.importances import diagonal_fisher, path_importances
from asg_env.core.objectives import feature_distance, kl_to_teacher, squared_distance
from asg_env.core.optimizee import Optimizee
from asg_env.core.seeding import torch_generator
from asg_env.core.teacher import LayerOutputs, Teacher

IMPORTANCE_SEED = 0  # of images, shifts and labels that importances are estimated with
PATH_STEPS, PATH_SHIFT, PATH_DAMPING = 50, 0.1, 0.1  # of Synaptic Intelligence
# Of training images, whatever the batch size of the training: instances with batches of their own
# share a network's importances.
IMPORTANCE_BATCH, FISHER_BATCHES = 32, 4


class GuidanceError(ValueError):
    """A term that cannot be built as the settings ask."""


@dataclass(frozen=True)
class Pretrained:
    """What a term is built from.

    Attributes:
        optimizee: The network that trains.
        teacher: The frozen pretrained network.
        outputs: Outputs of layers of the trained backbone, once watched.
        batch: From a number to a batch of training images, normalised, in an order of its own.
    """

    optimizee: Optimizee
    teacher: Teacher
    outputs: LayerOutputs
    batch: Callable[[int], Tensor]

    def backbone(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the backbone's trainable weights and, beside them, their pretrained values."""
        anchors = dict(self.teacher.backbone.named_parameters())
        named = self.optimizee.backbone.named_parameters()
        trained = [(p, anchors[name].detach()) for name, p in named if p.requires_grad]
        return [p for p, _ in trained], [a for _, a in trained]


@dataclass(frozen=True)
class Step:
    """What a term sees of an inner step, the batch having gone through the network.

    Attributes:
        kl: KL(teacher || student) at temperature 1, in nats.
        teacher_log_probs: Of the old classes, shape (B, C_old).
        old_logits: The trained backbone through the frozen old head, shape (B, C_old).
        teacher_features: From a watched layer to its output in the teacher on this batch.
    """

    kl: Tensor
    teacher_log_probs: Tensor
    old_logits: Tensor
    teacher_features: Callable[[str], Tensor]


class Term(Protocol):
    """A guidance term, built; `Term(pretrained, **options)` builds it."""

    def __call__(self, step: Step) -> Tensor:
        """Return the unweighted value, a scalar with a gradient."""
        ...


class ProxyKL:
    """KL(teacher || student) through the frozen old head: ASG's proxy guidance.

    The value that telemetry reports as `kl` is always the one at temperature 1.
    """

    def __init__(self, pretrained: Pretrained, temperature: float = 1.0) -> None:
        if not (math.isfinite(temperature) and temperature > 0):
            raise GuidanceError(
                f"`temperature` of kl must be a finite number > 0, got {temperature}"
            )
        self._temperature = temperature

    def __call__(self, step: Step) -> Tensor:
        """Return `kl_to_teacher`."""
        if self._temperature == 1.0:
            return step.kl
        return kl_to_teacher(step.teacher_log_probs, step.old_logits, self._temperature)


class WeightL2:
    """|w - w_pretrained|**2 over the backbone: ASG's "vanilla L2" (docs/original.md, section 5)."""

    def __init__(self, pretrained: Pretrained) -> None:
        self._weights, self._anchors = pretrained.backbone()

    def __call__(self, step: Step) -> Tensor:
        """Return `squared_distance` from the pretrained weights."""
        return squared_distance(self._weights, self._anchors)


class L2SP:
    """(1/2) |w - w_pretrained|**2 over the backbone plus (ratio/2) |w|**2 over the new head.

    Source: Li, Grandvalet, Davoine, "Explicit Inductive Bias for Transfer Learning with
    Convolutional Networks", ICML 2018, the penalty L2-SP; `head_ratio` is its beta / alpha. The
    optimizer's own `weight_decay` still acts; set it to 0 for the penalty alone.
    """

    def __init__(self, pretrained: Pretrained, head_ratio: float = 0.1) -> None:
        if not (math.isfinite(head_ratio) and head_ratio >= 0):
            raise GuidanceError(
                f"`head_ratio` of l2_sp must be a finite number >= 0, got {head_ratio}"
            )
        self._weights, self._anchors = pretrained.backbone()
        self._head: list[Tensor] = list(pretrained.optimizee.head.parameters())
        self._origin = [torch.zeros_like(p) for p in self._head]
        self._ratio = head_ratio

    def __call__(self, step: Step) -> Tensor:
        """Return half the sum of both squared distances."""
        held = squared_distance(self._weights, self._anchors)
        return (held + self._ratio * squared_distance(self._head, self._origin)) / 2


class FeatureL2:
    """Squared distance of a layer's output from the teacher's: ROAD (see `feature_distance`).

    `layer` is the dotted name of a module of the backbone; left out, the features that the heads
    read. Teacher features are remembered where images are not augmented and they fit.
    """

    def __init__(self, pretrained: Pretrained, layer: str = "") -> None:
        try:
            pretrained.outputs.watch(layer)
            pretrained.teacher.outputs.watch(layer)
        except ValueError as error:
            raise GuidanceError(f"`layer` of feature_l2 {error}") from None
        self._layer, self._outputs = layer, pretrained.outputs

    def __call__(self, step: Step) -> Tensor:
        """Return `feature_distance`."""
        return feature_distance(self._outputs.last(self._layer), step.teacher_features(self._layer))


class SynapticIntelligence:
    """sum_k Omega_k (w_k - w_pretrained,k)**2 over the backbone.

    Source: Zenke et al. 2017 (see `path_importances`). The method wants the path along which the
    old task was learned, which nobody has who downloads weights. The stand-in is its last stretch:
    the pretrained weights are shifted at random by a tenth of their size, and learn the old task
    again from the teacher's answers on training images; importances are those of that path.
    """

    def __init__(self, pretrained: Pretrained) -> None:
        self._weights, self._anchors = pretrained.backbone()
        backbone, parameters = _trainable_copy(pretrained)
        generator = torch_generator(IMPORTANCE_SEED, "synaptic-intelligence")
        groups = []
        for parameter in parameters:
            size = parameter.detach().square().mean().sqrt().item()
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
            with torch.no_grad():
                parameter.add_(PATH_SHIFT * size * noise)
            # Adam moves every weight by about its rate: far enough in all to undo the shift.
            groups.append({"params": [parameter], "lr": 2 * PATH_SHIFT * size / PATH_STEPS})

        def old_task(step: int) -> Tensor:
            images = pretrained.batch(step)
            logits = pretrained.optimizee.old_head(backbone(images))
            return kl_to_teacher(pretrained.teacher.log_probs(images), logits)

        found = path_importances(
            parameters, old_task, torch.optim.Adam(groups), PATH_STEPS, PATH_DAMPING
        )
        self._scales = [omega.sqrt() for omega in found]

    def __call__(self, step: Step) -> Tensor:
        """Return the weighted squared distance."""
        return squared_distance(self._weights, self._anchors, self._scales)


class ElasticWeightConsolidation:
    """(1/2) sum_k F_k (w_k - w_pretrained,k)**2 over the backbone, F the Fisher information.

    Source: Kirkpatrick et al. 2017 (see `diagonal_fisher`). F is that of the frozen old head on
    training images: images of the old task are not needed, as with the KL term.
    """

    def __init__(self, pretrained: Pretrained) -> None:
        self._weights, self._anchors = pretrained.backbone()
        backbone, parameters = _trainable_copy(pretrained)
        images = torch.cat([pretrained.batch(number) for number in range(FISHER_BATCHES)])
        fisher = diagonal_fisher(
            parameters,
            lambda image: pretrained.optimizee.old_head(backbone(image)),
            images,
            torch_generator(IMPORTANCE_SEED, "fisher"),
        )
        self._scales = [(f / 2).sqrt() for f in fisher]

    def __call__(self, step: Step) -> Tensor:
        """Return the weighted squared distance."""
        return squared_distance(self._weights, self._anchors, self._scales)


def _trainable_copy(pretrained: Pretrained) -> tuple[nn.Module, list[Tensor]]:
    """Copy the teacher's backbone; the copy's weights train where the optimizee's do."""
    backbone = copy.deepcopy(pretrained.teacher.backbone)
    parameters: list[Tensor] = []
    named = pretrained.optimizee.backbone.parameters()
    for ours, theirs in zip(named, backbone.parameters(), strict=True):
        theirs.requires_grad_(ours.requires_grad)
        if ours.requires_grad:
            parameters.append(theirs)
    return backbone, parameters


TERMS: dict[str, Callable[..., Term]] = {
    "kl": ProxyKL,
    "weight_l2": WeightL2,
    "l2_sp": L2SP,
    "feature_l2": FeatureL2,
    "si": SynapticIntelligence,
    "ewc": ElasticWeightConsolidation,
}


@dataclass(frozen=True)
class Weighted:
    """A term as the settings ask for it.

    Attributes:
        build: `build(pretrained, **options)` returns the term.
        weight: Factor in the objective, >= 0; at 0 the term is only reported.
        cap: Largest weight x value; above it the weight falls to cap / value, as a constant. The
            original did so in segmentation, at 9 (docs/original.md, section 1).
        options: Of the term.
    """

    build: Callable[..., Term]
    weight: float
    cap: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


class Guidance:
    """The terms of an objective, built."""

    def __init__(self, terms: Mapping[str, Weighted], built: Mapping[str, Term]) -> None:
        self.weighted = dict(terms)
        self._built = built
        # KL is always reported, asked for or not.
        self.extra = tuple(name for name in terms if name != "kl")

    def values(self, step: Step) -> dict[str, Tensor]:
        """Return each term's unweighted value.

        Raises:
            GuidanceError: A term returned something other than a scalar tensor.
        """
        values = {name: self._built[name](step) for name in self.weighted}
        for name, value in values.items():
            if not isinstance(value, Tensor) or value.ndim:
                raise GuidanceError(f"'{name}' must return a tensor without axes, got {value!r}")
        return values

    def objective(self, ce: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        """CE + sum of weight x value: the loss whose gradient an inner step follows."""
        total = ce
        for name, value in values.items():
            term = self.weighted[name]
            if term.weight:  # a term of weight 0 may be infinite
                weight: float | Tensor = term.weight
                if term.cap is not None:
                    now = value.detach()  # rounding can make it negative
                    weight = torch.where(term.weight * now > term.cap, term.cap / now, term.weight)
                total = total + weight * value
        return total
