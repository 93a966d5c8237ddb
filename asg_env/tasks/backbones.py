"""Pretrained networks of torchvision and timm, split into a backbone and the frozen old head."""

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from asg_env.core.seeding import derive_seed
from asg_env.tasks.listing import DataError
from asg_env.tasks.stages import layer_groups_of
from asg_env.tasks.weight_files import differences, first_line, is_path, read_state_dict

AUXILIARY = ("aux1", "aux2", "AuxLogits")  # children of torchvision's GoogLeNet and Inception v3
REFUSALS = (AssertionError, RuntimeError, ValueError)  # what models raise for a size they refuse


@dataclass(frozen=True)
class Pretrained:
    """A pretrained classifier, split before its last linear layer.

    Attributes:
        backbone: Images (B, 3, H, W), normalised with `mean` and `std`, to features (B, F).
        old_head: Features to logits of the classes it was pretrained on (B, C_old); frozen.
        layer_groups: Group name to pattern for the parameters of `Optimizee`, input to head.
        mean: Of the pixels of each channel, 0..255.
        std: Of the pixels of each channel, 0..255.
    """

    backbone: nn.Module
    old_head: nn.Linear
    layer_groups: dict[str, str]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True)
class _Request:
    """What was asked for; `state` is the content of the file that `weights` names, if any."""

    name: str
    model: str
    weights: str
    state: dict[str, Tensor] | None
    image_size: int


@dataclass(frozen=True)
class _Classifier:
    """A whole network; pixel statistics as the libraries give them, for pixels 0..1."""

    model: nn.Module
    last: nn.Module
    mean: Iterable[float]
    std: Iterable[float]
    own_size: int  # [pixels], of the images that it was made for


def load_pretrained(name: str, weights: str, image_size: int) -> Pretrained:
    """Build a network and split it; the global random generators are left as found.

    Auxiliary classifiers are removed, and parameters without influence on the features in eval
    mode are frozen, so that every trainable one gets a gradient.

    Args:
        name: Library and model, such as `torchvision:resnet101` or `timm:convnext_tiny`.
        weights: `pretrained` for the library's own, which it downloads; `random` for random
            ones, the same everywhere; a path to a file of weights (`.safetensors`, `.pth`,
            `.pt`, `.pth.tar`); for torchvision also an entry such as `IMAGENET1K_V1`.
        image_size: Height and width in pixels.

    Raises:
        DataError: No such model; weights that cannot be had or belong to another model; a model
            that does not end in one linear layer or refuses images of this size.
    """
    library, _, model = name.partition(":")
    builders = {"torchvision": _build_torchvision, "timm": _build_timm}
    if library not in builders:
        raise DataError(
            f"a backbone must be named torchvision:NAME or timm:NAME, got '{name}'"
            + _close_matches(library, builders)
        )
    state = read_state_dict(weights) if is_path(weights) else None
    asked = _Request(name, model, weights, state, image_size)
    built = builders[library](asked)
    old_head = _split(built, asked)
    return Pretrained(
        backbone=built.model,
        old_head=old_head,
        layer_groups=layer_groups_of(built.model),
        mean=_pixel_units(built.mean),
        std=_pixel_units(built.std),
    )


def _build_torchvision(asked: _Request) -> _Classifier:
    from torchvision import models  # here: slow to import, and a task may need timm only

    known = models.list_models(module=models)
    if asked.model not in known:
        raise _unknown_model(asked, known)
    entries = models.get_model_weights(asked.model)
    named = {"pretrained": entries.DEFAULT, **entries.__members__}
    entry = named.get(asked.weights)
    if entry is None and asked.state is None and asked.weights != "random":
        raise _unknown_weights(asked, ["random", *named])
    transforms = (entry or entries.DEFAULT).transforms()
    own_size = transforms.crop_size[0]

    def construct(**options: Any) -> Any:
        with _seeded(asked.name):
            return models.get_model(asked.model, weights=entry, **options)

    if entry is not None:
        with _download_explained(asked.name):
            model = construct()
    else:
        with _refusal_explained(asked.name, asked.image_size, own_size):
            model = _construct_sized(construct, {"image_size": asked.image_size})
    if asked.state is not None:
        if hasattr(model, "transform_input"):
            model.transform_input = True  # as torchvision does when it loads its own weights
        for key in list(asked.state):
            # torchvision's published DenseNets have names of an older release: norm.1, conv.2.
            name = re.sub(r"(denselayer\d+\.(?:norm|conv))\.(?=[12]\.)", r"\1", key)
            asked.state[name] = asked.state.pop(key)
        try:
            model.load_state_dict(asked.state)
        except (RuntimeError, ValueError) as error:
            raise _other_model(asked, model, error) from error
    for child in AUXILIARY:
        if hasattr(model, child):
            setattr(model, child, None)
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    last = [*model.children(), *linear][-1]
    return _Classifier(model, last, transforms.mean, transforms.std, own_size)


def _build_timm(asked: _Request) -> _Classifier:
    try:
        import timm
    except ImportError as error:
        raise DataError(f"`{asked.name}` needs timm ({error}); pip install timm") from error
    known = {*timm.list_models(), *timm.list_models(include_tags=True)}
    if asked.model not in known:
        raise _unknown_model(asked, known)
    if asked.state is None and asked.weights not in ("pretrained", "random"):
        raise _unknown_weights(asked, ["random", "pretrained"])
    cfg = timm.models.get_pretrained_cfg(asked.model) or timm.models.PretrainedCfg()
    own_size = cfg.input_size[-1]

    def construct(**options: Any) -> Any:
        with _seeded(asked.name):
            return timm.create_model(asked.model, **options)

    size = {"img_size": asked.image_size}
    if asked.state is not None:
        # timm's own loader knows names of older releases and resizes position tables.
        source = {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": asked.state}}
        try:
            model = _construct_sized(construct, size, **source)
        except Exception as error:  # a foreign file can make that loader raise anything
            with _refusal_explained(asked.name, asked.image_size, own_size):
                blank = _construct_sized(construct, size)
            raise _other_model(asked, blank, error) from error
        model.pretrained_cfg.pop("state_dict")  # a second copy of all weights
    elif asked.weights == "pretrained":
        with _download_explained(asked.name):
            model = _construct_sized(construct, size, pretrained=True)
    else:
        with _refusal_explained(asked.name, asked.image_size, own_size):
            model = _construct_sized(construct, size)
    return _Classifier(model, model.get_classifier(), cfg.mean, cfg.std, own_size)


@contextmanager
def _seeded(name: str) -> Iterator[None]:
    """Draw from a seed of the model's own, and leave the global generator as found."""
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: it would reseed the generators of the GPUs as well.
        torch.default_generator.manual_seed(derive_seed(0, "backbone", name))
        yield


def _construct_sized(construct: Callable[..., Any], size: dict[str, int], **options: Any) -> Any:
    """Construct for an image size, or without it where the model has no such argument."""
    try:
        return construct(**size, **options)
    except TypeError:
        return construct(**options)


@contextmanager
def _download_explained(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # downloads raise OSError, hub and HTTP errors, hash mismatches
        raise DataError(
            f"the pretrained weights of `{name}` could not be loaded ({first_line(error)}); "
            "give a local file through env.weights"
        ) from error


@contextmanager
def _refusal_explained(name: str, image_size: int, own_size: int) -> Iterator[None]:
    try:
        yield
    except REFUSALS as error:
        raise DataError(
            f"`{name}` cannot take images of {image_size} x {image_size} pixels "
            f"({first_line(error)}); it is made for {own_size} x {own_size}"
        ) from error


@torch.enable_grad()  # callers may have switched gradients off
def _split(built: _Classifier, asked: _Request) -> nn.Linear:
    """Replace the last layer by the identity and return it frozen.

    One black image goes through before and after: the parts must give what the whole gives.
    Backbone parameters that the features do not depend on are frozen on the way.
    """
    model, old_head = built.model.eval(), built.last
    path = [name for name, module in model.named_modules() if module is old_head]
    if not isinstance(old_head, nn.Linear) or not path:
        raise DataError(
            f"`{asked.name}` must end in one nn.Linear, which becomes the old head, got "
            f"{type(old_head).__name__}; use another model"
        )
    old_head.requires_grad_(False)
    images = torch.zeros(1, 3, asked.image_size, asked.image_size)
    with _refusal_explained(asked.name, asked.image_size, built.own_size):
        logits = model(images)
    if isinstance(logits, Tensor) and not logits.isfinite().all():
        raise DataError(f"`{asked.name}` gives scores that are not finite; use other weights")
    model.set_submodule(path[0], nn.Identity())
    try:
        features = model(images)
        rounding = 1e-3 * logits.detach().abs().max().item()
        same = torch.allclose(old_head(features), logits, rtol=0, atol=rounding)
        splits = same and features.shape == (1, old_head.in_features)
    except (AttributeError, TypeError, *REFUSALS):
        splits = False
    if not splits:
        raise DataError(
            f"`{asked.name}` must compute one feature vector per image, and its scores from that "
            "by its last nn.Linear alone, but does not; use another model"
        )
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(features.sum(), trainable, allow_unused=True)
    for parameter, gradient in zip(trainable, gradients, strict=True):
        parameter.requires_grad_(gradient is not None)
    return old_head


def _pixel_units(values: Iterable[float]) -> tuple[float, float, float]:
    red, green, blue = (255 * value for value in values)
    return red, green, blue


def _close_matches(name: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name, list(known))
    return f"; did you mean {' or '.join(matches)}?" if matches else ""


def _unknown_model(asked: _Request, known: Collection[str]) -> DataError:
    found = _close_matches(asked.model, known) or f"; use one of the {len(known)} in list_models()"
    return DataError(f"`{asked.name}` is unknown{found}")


def _unknown_weights(asked: _Request, known: list[str]) -> DataError:
    return DataError(
        f"the weights of `{asked.name}` must be {', '.join(known)} or a path to a file, got "
        f"'{asked.weights}'"
    )


def _other_model(asked: _Request, model: nn.Module, error: Exception) -> DataError:
    assert asked.state is not None
    found = differences(model.state_dict(), asked.state) or first_line(error)
    return DataError(
        f"{asked.weights} holds weights of another model than `{asked.name}` at "
        f"{asked.image_size} pixels: {found}"
    )
