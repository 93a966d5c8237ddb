"""A schedule for another model: by names, by patterns, or by relative depth."""

import re
from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from asg_env.core.layer_groups import split_parameters
from asg_env.schedule import LearnedSchedule

STEM, HEAD = "stem", "head"  # of `depth_groups`: what comes before the first block, and the end


def regroup(
    schedule: LearnedSchedule, layer_groups: Mapping[str, str], sources: Mapping[str, str]
) -> LearnedSchedule:
    """See `LearnedSchedule.regroup`."""
    known = list(schedule.layer_groups)
    unused = [name for name in sources if name not in layer_groups]
    if unused:
        raise ValueError(
            f"`sources` must be for groups of {list(layer_groups)}, got {unused}; take them out"
        )
    taken = {name: sources.get(name, name) for name in layer_groups}
    strange = {name: source for name, source in taken.items() if source not in known}
    if strange:
        raise ValueError(
            f"layer groups must get their multipliers from groups of {known}, got {strange}; name "
            "one for each in `sources`"
        )
    columns = [known.index(source) for source in taken.values()]
    original = schedule.sources  # of a schedule that was made for another model before
    return schedule.with_changes(
        layer_groups=dict(layer_groups),
        sources={name: original.get(source, source) for name, source in taken.items()},
        multipliers=tuple(tuple(row[i] for i in columns) for row in schedule.multipliers),
        spread=tuple(tuple(row[i] for i in columns) for row in schedule.spread),
    )


def by_depth(
    schedule: LearnedSchedule, model: nn.Module, head: str | None = None
) -> LearnedSchedule:
    """See `LearnedSchedule.by_depth`."""
    groups = _groups(model, head)
    sources = sources_by_depth(schedule, list(groups))
    patterns = _trained(groups)
    return regroup(schedule, patterns, {name: sources[name] for name in patterns})


def sources_by_depth(schedule: LearnedSchedule, layer_groups: Sequence[str]) -> dict[str, str]:
    """Which of the schedule's groups each layer group gets its multipliers from.

    The body's groups stand at depths from 0 (input) to 1 (last before the head), evenly, in the
    schedule as in the model; each gets the multipliers of the group that is nearest, of two as near
    those of the deeper. The head gets those of the schedule's last group.

    Args:
        schedule: Of any number of groups.
        layer_groups: Names, input to head.
    """
    *body, head = schedule.layer_groups
    *layers, last = layer_groups
    sources = {}
    for index, name in enumerate(layers):
        depth = index / max(1, len(layers) - 1)
        sources[name] = body[int(depth * (len(body) - 1) + 0.5)] if body else head
    return {**sources, last: head}


def depth_groups(model: nn.Module, head: str | None = None) -> dict[str, str]:
    """Layer groups for a model of any depth: name to pattern, input to head.

    The items of the model's lists (`Sequential`, `ModuleList`) of blocks are a group each: blocks
    of a ResNet or a ViT, stages of a timm ConvNeXt or Swin. What comes before the first is `stem`;
    the head is `head`; what is between the last block and the head goes with that block. A model
    without blocks, such as a `Sequential` of layers, has a group for each layer, its norms going
    with the layer before. Order is that in which the modules were made, as in `named_parameters()`,
    so that of branches side by side is not their depth.

    Args:
        model: What has only parameters with `requires_grad=False` gets no group, but before the
            head it counts for the depth of what follows.
        head: Name of the module that is the head; the last layer with trainable parameters if left
            out.

    Raises:
        ValueError: The model has one layer only, its head is within a block or has no matrix, or
            it has no such module.
    """
    return _trained(_groups(model, head))


def _trained(groups: Mapping[str, tuple[str, bool]]) -> dict[str, str]:
    return {name: pattern for name, (pattern, trains) in groups.items() if trains}


def _groups(model: nn.Module, head: str | None) -> dict[str, tuple[str, bool]]:
    """As `depth_groups`, with frozen groups too: name to pattern, and whether any of it trains."""
    kind = type(model).__name__
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    trained_layers = list(dict.fromkeys(map(_layer, trainable)))
    if len(trained_layers) < 2 or next(model.children(), None) is None:
        raise ValueError(
            f"{kind} must have two layers or more with trainable parameters, of which the last is "
            "the head; give patterns to regroup"
        )
    last = trained_layers[-1] if head is None else head
    if not any(p.ndim > 1 for name, p in trainable.items() if _within(name, last)):
        raise ValueError(
            f"`head` must be a module of {kind} with a trainable matrix, got {last!r}; name it"
        )
    counted = {}  # frozen layers behind the head, such as an old head, have no depth
    before_head = True
    for name, parameter in model.named_parameters():
        before_head = before_head and not _within(name, last)
        if before_head or parameter.requires_grad:
            counted[name] = parameter
    layers = list(dict.fromkeys(map(_layer, counted)))
    units = {
        u: is_block for u, is_block in _units(model, "") if any(_within(n, u) for n in counted)
    }
    blocks = any(units.values())
    body: list[str] = []
    for unit in units if blocks else layers:
        if _within(last, unit) and unit != last:
            if units.get(unit, False):
                raise ValueError(
                    f"{kind} ends in {unit}, a block that holds more than its head {last}; give "
                    "patterns to regroup"
                )
            # A head with a norm or layers before the last one: those go with the body.
            body += [name for name in layers if _within(name, unit) and not _within(name, last)]
        elif not _within(unit, last):
            body.append(unit)
    # Of a module that holds others on this list only its own parameters.
    listed = [*body, last]
    holders = {unit for unit in body if any(_within(u, unit) and u != unit for u in listed)}
    groups: dict[str, list[str]] = {}
    for unit in body:
        own = [
            parameter
            for name, parameter in counted.items()
            if (_layer(name) == unit if unit in holders else _within(name, unit))
        ]
        opens = any(p.ndim > 1 for p in own) and (not blocks or units.get(unit, False))
        if opens or not groups:
            groups[STEM if blocks and not opens else unit] = []
        groups[next(reversed(groups))].append(unit)
    if HEAD in groups:
        raise ValueError(f"{kind} has a layer {HEAD!r} before its last; give patterns to regroup")
    groups[HEAD] = [last]
    found = {}
    for name, parts in groups.items():
        pattern = "|".join(
            rf"{re.escape(unit)}\.[^.]+$" if unit in holders else rf"{re.escape(unit)}(\.|$)"
            for unit in parts
        )
        found[name] = pattern, any(re.match(pattern, parameter) for parameter in trainable)
    return found


def _layer(parameter: str) -> str:
    """Name of the module that a parameter belongs to; its own where that is the model."""
    plain, parametrised, _ = parameter.partition(".parametrizations.")
    return plain if parametrised else parameter.rpartition(".")[0] or parameter


def _within(name: str, unit: str) -> bool:
    return name == unit or name.startswith(unit + ".")


def _units(module: nn.Module, prefix: str) -> Iterator[tuple[str, bool]]:
    """Yield the parts of a module, and whether each is a block: an item of a list of blocks."""
    for name, _ in module.named_parameters(recurse=False):
        yield prefix + name, False
    is_list = _is_list(module) and _compound_items(module)
    for name, child in module.named_children():
        path = prefix + name
        if _is_list(child) and _compound_items(child):
            yield from _units(child, path + ".")
        elif is_list:
            yield path, True
        elif _holds_blocks(child):
            yield from _units(child, path + ".")
        elif next(child.parameters(), None) is not None:
            yield path, False


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential | nn.ModuleList)


def _compound_items(module: nn.Module) -> bool:
    """Whether an item is made of parts itself, and so more than a layer."""
    return any(next(item.children(), None) is not None for item in module.children())


def _holds_blocks(module: nn.Module) -> bool:
    return any(_is_list(part) and _compound_items(part) for part in module.modules())


def table(schedule: LearnedSchedule, model: nn.Module) -> str:
    """See `LearnedSchedule.table`."""
    owned = split_parameters(model, schedule.layer_groups)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rows = [("layer group", "multipliers of", "weights", "start, peak, end", "parameters")]
    for column, (group, parameters) in enumerate(owned.items()):
        values = [row[column] for row in schedule.multipliers]
        tensors = [names[id(parameter)] for parameter in parameters]
        more = f" ... {tensors[-1]} ({len(tensors)})" if len(tensors) > 1 else ""
        rows.append(
            (
                group,
                schedule.sources.get(group, group),
                f"{sum(p.numel() for p in parameters):,}",
                f"{values[0]:.2g}, {max(values):.2g}, {values[-1]:.2g}",
                tensors[0] + more,
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join(
        "  ".join((*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[4]))
        for row in rows
    )
