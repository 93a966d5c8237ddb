"""`asg show`: a schedule as a heat map."""

from pathlib import Path
from typing import Annotated

import typer

from agents.cli.options import Overwrite, console, load_schedule
from agents.schedule_figure import draw_schedule, heat_map
from asg_env.schedule import LearnedSchedule
from asg_env.validation import ConfigError


def show_command(
    schedule: Annotated[Path, typer.Argument(help="Schedule file, of `asg export`.")],
    out: Annotated[Path | None, typer.Option(help="PNG to draw; SCHEDULE.png if left out.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Print a schedule as a heat map, and draw it."""
    learned = load_schedule(schedule)
    picture = out or schedule.with_suffix(".png")
    if picture.suffix != ".png":
        raise ConfigError(f"--out must end in .png, got {picture}; rename it")
    keep = picture.exists() and not overwrite
    if keep and out is not None:
        raise ConfigError(f"{picture} exists; add --overwrite or choose another --out")
    console.print(_in_words(learned))
    console.print(heat_map(learned, console.width))
    if keep:
        console.print(f"{picture} exists and stays as it is; --overwrite draws it again")
        return
    try:
        draw_schedule(learned, picture)
    except OSError as error:
        raise ConfigError(
            f"{picture} cannot be written ({error.strerror}); choose another --out"
        ) from None
    console.print(f"written: {picture}")


def _in_words(learned: LearnedSchedule) -> str:
    actions = learned.provenance.get("actions", "unknown")
    return (
        f"{learned.task}, instances {learned.instances}, scale {learned.base_lr_scale:g}: "
        f"{learned.selection} of {learned.episodes} rollouts, {actions} actions\n"
        f"{learned.inner_steps} inner steps of {learned.optimizer} at base rate "
        f"{learned.base_lr:g}; interpolation {learned.interpolation}, common factor "
        f"{learned.lr_factor}"
    )
