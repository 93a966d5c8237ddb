"""`asg export`: what a run has learned as a file, for trainings elsewhere."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer

from agents.cli.options import (
    Greedy,
    Overwrite,
    RunPath,
    TrainingSeed,
    checked_instance,
    console,
    policy_of_seed,
)
from agents.export import EXPORT_EPISODES, export_schedule
from agents.protocol import acts_greedily
from agents.rollout import RolloutPool
from agents.run_folder import RunFolder, write_text
from agents.schedule_figure import heat_map
from agents.schedule_formats import check_python, to_csv, to_python
from asg_env.schedule import Interpolation, LearnedSchedule, Selection
from asg_env.validation import ConfigError

Format = Literal["json", "csv", "python"]
SUFFIXES: dict[Format, str] = {"json": ".json", "csv": ".csv", "python": ".py"}


def export_command(
    run: RunPath,
    out: Annotated[Path, typer.Option(help="File to write; its suffix tells the format.")],
    format: Annotated[
        Format | None, typer.Option(help="By the suffix of --out if left out.")
    ] = None,
    scale: Annotated[float, typer.Option(help="Factor on the base learning rate.")] = 1.0,
    episodes: Annotated[int, typer.Option(min=1, help="Rollouts.")] = EXPORT_EPISODES,
    select: Annotated[
        Selection,
        typer.Option(
            help="Mean of the rollouts, the one nearest to their median, or best by outer_valid."
        ),
    ] = "mean",
    interpolation: Annotated[
        Interpolation, typer.Option(help="Of the multipliers between windows.")
    ] = "step",
    training_seed: TrainingSeed = 0,
    greedy: Greedy = None,
    overwrite: Overwrite = False,
) -> None:
    """Write what the controller does to the rates as a schedule."""
    if out.is_dir() or not out.parent.is_dir():
        raise ConfigError(f"--out must be a file in an existing folder, got {out}; choose another")
    if out.exists() and not overwrite:
        raise ConfigError(f"{out} exists; add --overwrite or choose another --out")
    kind = _format(format, out)
    opened = RunFolder.open(run)
    opened.experiment.check()  # its device may not be here
    if kind == "python":  # now, not after the rollouts
        check_python(interpolation, opened.experiment.env.lr_factor)
    schedule = exported(opened, scale, episodes, select, interpolation, training_seed, greedy)
    if kind == "json":
        write_schedule(out, schedule)
    else:
        text = to_csv(schedule) if kind == "csv" else to_python(schedule)
        _writing(out, lambda: write_text(out, text))
    console.print(f"written: {out}")


def _format(asked: Format | None, out: Path) -> Format:
    named = {suffix: name for name, suffix in SUFFIXES.items()}.get(out.suffix)
    kind = asked or named
    if kind is None or named not in (None, kind):
        suffix = SUFFIXES[kind] if kind else ", ".join(SUFFIXES.values())
        raise ConfigError(f"--out must end in {suffix}, got {out}; rename it")
    return kind


def exported(
    run: RunFolder,
    scale: float = 1.0,
    episodes: int = EXPORT_EPISODES,
    selection: Selection = "mean",
    interpolation: Interpolation = "step",
    training_seed: int = 0,
    greedy: bool | None = None,
) -> LearnedSchedule:
    """Make a schedule of a run's controller, and say what it is."""
    checked_instance(run.experiment.task, 0, scale)
    policy = policy_of_seed(run, training_seed)
    experiment = run.experiment
    with RolloutPool(experiment.task, experiment.env, experiment.train.workers) as pool:
        schedule = export_schedule(
            run,
            policy,
            pool,
            scale,
            episodes,
            selection,
            deterministic=acts_greedily(run, training_seed) if greedy is None else greedy,
            training_seed=training_seed,
        ).with_changes(interpolation=interpolation)
    if schedule.episodes < episodes:
        console.print(f"{episodes - schedule.episodes} of {episodes} rollouts diverged, left out")
    of = f"{selection} of {schedule.episodes} rollouts, {schedule.provenance['actions']} actions"
    console.print(f"multipliers at scale {scale:g}: {of}")
    console.print(heat_map(schedule))
    return schedule


def write_schedule(path: Path, schedule: LearnedSchedule) -> None:
    """Write a schedule.

    Raises:
        ConfigError: It cannot be written.
    """
    _writing(path, lambda: schedule.save(path))


def _writing(path: Path, write: Callable[[], None]) -> None:
    try:
        write()
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written ({error.strerror}); choose another --out"
        ) from None
