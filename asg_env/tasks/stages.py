"""Layer groups of common networks: their stages, input to head, as patterns over names."""

import re
from itertools import pairwise

from torch import nn

Stages = dict[str, list[str]]  # group name -> names of submodules and parameters of the model

VIT_STAGES = 4  # a ViT has no stages of its own: quarters of its blocks


def layer_groups_of(model: nn.Module) -> dict[str, str]:
    """Divide a network into named stages, from input to head.

    | Network | Groups before `head` |
    |---|---|
    | ResNet, ResNeXt, Wide ResNet | conv1, bn1, layer1..layer4: with `head` the original's seven |
    | VGG | conv1..conv5 (what lies between max-pools), FC |
    | EfficientNet, MobileNet | stem, stage1..stage5: a stage ends where the resolution falls |
    | ConvNeXt, Swin, most of timm | stem, stage1..stage4 |
    | ViT | embedding, stage1..stage4: quarters of the blocks |

    What lies before the first stage (tokens, position tables) belongs to the stem or embedding,
    what lies behind the last one (1x1 convolution, norms) to the last.

    Any other network has one group per child of the model that holds trainable parameters, and
    parameters of the model itself join the first group.

    Args:
        model: A backbone as `load_pretrained` gives it.

    Returns:
        Group name to regular expression for `re.match` on the parameter names of an `Optimizee`
        with this backbone. Each trainable parameter matches exactly one.
    """
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    groups: dict[str, str] = {}
    for group, names in _stages(model).items():
        held = [name for name in names if any(f"{t}.".startswith(f"{name}.") for t in trainable)]
        if held:
            groups[group] = rf"backbone\.{_any_of(held)}(?:\.|$)"
    return groups | {"head": r"head\."}


def _any_of(names: list[str]) -> str:
    escaped = [re.escape(name) for name in names]
    return escaped[0] if len(escaped) == 1 else f"(?:{'|'.join(escaped)})"


def _stages(model: nn.Module) -> Stages:
    """Choose by layout: class names for torchvision's `features`, children for all others."""
    children = {name for name, _ in model.named_children()}
    kind = type(model).__name__
    if "features" in children and kind == "VGG":
        return _vgg(model)
    if "features" in children and kind in ("EfficientNet", "MobileNetV2", "MobileNetV3"):
        return _by_resolution(model, "features", stem=1)
    if "features" in children and kind in ("ConvNeXt", "SwinTransformer"):
        return _alternating(model)
    if kind == "VisionTransformer" and "encoder" in children:
        return _quarters(model, "encoder.layers")
    if {"patch_embed", "blocks"} <= children:
        return _quarters(model, "blocks")
    if {"conv_stem", "blocks"} <= children:
        return _by_resolution(model, "blocks", stem=0)
    for trunk in ("stages", "layers", "trunk_output"):
        if trunk in children and children & {"stem", "patch_embed"}:
            stages = [[name] for name in _members(model, trunk)]
            return _with_rest(model, trunk, {"stem": []} | _numbered(stages))
    return _children(model)


def _vgg(model: nn.Module) -> Stages:
    blocks: list[list[str]] = [[]]
    for name in _members(model, "features"):
        blocks[-1].append(name)
        if isinstance(model.get_submodule(name), nn.MaxPool2d):
            blocks.append([])
    groups = {f"conv{i}": names for i, names in enumerate(blocks, start=1)}
    return _with_rest(model, "features", groups | {"FC": []})


def _by_resolution(model: nn.Module, trunk: str, stem: int) -> Stages:
    """A stage is a run of members with one output stride; the first `stem` ones are the stem."""
    members = _members(model, trunk)
    stages: list[list[str]] = []
    for name in members[stem:]:
        if not stages or _reduces(model.get_submodule(name)):
            stages.append([])
        stages[-1].append(name)
    return _with_rest(model, trunk, {"stem": members[:stem]} | _numbered(stages))


def _reduces(block: nn.Module) -> bool:
    """Whether some layer has a stride above 1; blocks themselves may note theirs, too."""
    strides = [getattr(module, "stride", 1) for module in block.modules()]
    return any(max(stride) > 1 if isinstance(stride, tuple) else stride > 1 for stride in strides)


def _alternating(model: nn.Module) -> Stages:
    """ConvNeXt and Swin of torchvision: stem, stage, downsampling, stage, downsampling, ..."""
    stem, first, *others = _members(model, "features")
    pairs = [list(pair) for pair in zip(others[::2], others[1::2], strict=True)]
    return _with_rest(model, "features", {"stem": [stem]} | _numbered([[first], *pairs]))


def _quarters(model: nn.Module, trunk: str) -> Stages:
    blocks = _members(model, trunk)
    edges = [len(blocks) * i // VIT_STAGES for i in range(VIT_STAGES + 1)]
    stages = [blocks[start:end] for start, end in pairwise(edges)]
    return _with_rest(model, trunk, {"embedding": []} | _numbered(stages))


def _children(model: nn.Module) -> Stages:
    groups = {
        "neck" if name == "head" else name: [name]  # `head` is the new head's group
        for name, child in model.named_children()
        if any(parameter.requires_grad for parameter in child.parameters())
    }
    if {"maxpool", "layer1"} <= set(groups):  # timm's ResNet-RS has a convolution for the pool
        groups["layer1"] = groups.pop("maxpool") + groups["layer1"]
    first = next(iter(groups), "backbone")
    return groups | {first: groups.get(first, []) + _own_parameters(model)}


def _with_rest(model: nn.Module, trunk: str, groups: Stages) -> Stages:
    """Add what the model has before its trunk to the first group, what it has behind to the last.

    Registration order is taken for the order of computation; parameters that belong to no child,
    such as class tokens and position tables, come before.
    """
    before: list[str] = []
    behind: list[str] = []
    module, prefix = model, ""
    for part in trunk.split("."):
        children = [prefix + name for name, _ in module.named_children()]
        at = children.index(prefix + part)
        before += [prefix + name for name in _own_parameters(module)] + children[:at]
        behind = children[at + 1 :] + behind
        module, prefix = module.get_submodule(part), f"{prefix}{part}."
    first, *_, last = groups
    return groups | {first: before + groups[first], last: groups[last] + behind}


def _own_parameters(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters(recurse=False)]


def _members(model: nn.Module, trunk: str) -> list[str]:
    return [f"{trunk}.{name}" for name, _ in model.get_submodule(trunk).named_children()]


def _numbered(stages: list[list[str]]) -> Stages:
    return {f"stage{i}": names for i, names in enumerate(stages, start=1)}
