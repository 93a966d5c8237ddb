"""What learned controllers do, as a part of a report: one figure for each kind of instance."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agents.figures import SCALE_BANDS
from agents.report.figures import Behaviour, behaviour, common_limits, draw_behaviour
from agents.report.page import Picture, Section, number
from agents.results import percent

BANDS = {
    f"low hidden scale (below {SCALE_BANDS[1]:g})": SCALE_BANDS[:2],
    f"middle hidden scale ({SCALE_BANDS[1]:g} to {SCALE_BANDS[2]:g})": SCALE_BANDS[1:3],
    f"high hidden scale (above {SCALE_BANDS[2]:g})": SCALE_BANDS[2:],
}
HOW_TO_READ = (
    "Heat maps show the geometric mean of the multipliers of each layer group, the input on top; "
    "curves the median of the runs and their middle half. A diverged run scores 0 from then on "
    "and has no loss."
)
NOT_READ = "The reward reads no real label, so there is no accuracy on outer_valid to show."

Episodes = Sequence[Mapping[str, Any]]  # records of `agents.records.episode_record`


@dataclass(frozen=True)
class Judged:
    """A method and its recorded episodes on test instances, of all its training seeds."""

    name: str
    episodes: Episodes
    seeds: int


def controller_section(
    shown: Judged,
    title: str,
    layer_groups: Sequence[str],
    rival: Judged | None,
    optimizer: str,
    metric: str = "accuracy",
) -> Section:
    """Draw a controller for low, middle and high hidden scales, and for each optimizer.

    Args:
        shown: The controller.
        title: Of the section.
        layer_groups: Names, input to head; numbers stand in where there are none.
        rival: A baseline on the same instances, drawn beside it.
        optimizer: Of instances that have none of their own.
        metric: What is read on outer_valid, in words.

    Raises:
        ValueError: Episodes are damaged, or of other layer groups.
    """
    kinds = split_by_kind(shown.episodes, optimizer)
    beside = split_by_kind(rival.episodes, optimizer) if rival else {}
    found = {kind: behaviour(episodes) for kind, episodes in kinds.items()}
    rivals = {kind: behaviour(beside[kind]) for kind in found if kind in beside}
    limits = common_limits([*found.values(), *rivals.values()])
    section = Section(title)
    section.text = [f"{len(shown.episodes)} runs of {shown.seeds} training seed(s). {HOW_TO_READ}"]
    if any(one.accuracy is None for one in found.values()):
        section.text.append(NOT_READ)
    for kind, one in found.items():
        names = layer_groups or [f"group {g + 1}" for g in range(one.log_multipliers.shape[1])]
        other = (rival.name, rivals[kind]) if rival and kind in rivals else None
        figure = draw_behaviour(one, shown.name, names, limits, other, metric)
        about = f"{shown.name}: multipliers, loss and accuracy over the training, {kind}"
        heading = f"{kind[0].upper()}{kind[1:]}"
        section.pictures.append(Picture(figure, heading, _caption(one, other, metric), about))
    return section


def _caption(shown: Behaviour, rival: tuple[str, Behaviour] | None, metric: str) -> str:
    text = f"{shown.runs} runs, {percent(shown.diverged)} diverged"
    if shown.accuracy is None:
        return f"{text}."
    text += f"; outer_valid {metric} at the end {number(shown.accuracy.median[-1])}"
    if rival is not None and rival[1].accuracy is not None:
        text += f" ({rival[0]} {number(rival[1].accuracy.median[-1])})"
    return f"{text}."


def split_by_kind(episodes: Episodes, optimizer: str) -> dict[str, list[Mapping[str, Any]]]:
    """Split by optimizer, where there are several, and by hidden scale: name to episodes."""

    def scale(episode: Mapping[str, Any]) -> float:
        return float(episode["instance"].get("base_lr_scale", 1.0))

    def of(episode: Mapping[str, Any]) -> str:
        return str(episode["instance"].get("optimizer") or optimizer)

    optimizers, scales = sorted({*map(of, episodes)}), {*map(scale, episodes)}
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for chosen in optimizers:
        for band, (low, high) in BANDS.items():
            name = band if len(scales) > 1 else f"hidden scale {min(scales):g}"
            if len(optimizers) > 1:
                name += f", {chosen}"
            inside = [e for e in episodes if low <= scale(e) < high and of(e) == chosen]
            if inside:
                kinds[name] = inside
    return kinds
