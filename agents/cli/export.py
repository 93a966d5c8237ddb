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
    check_training_seed,
    checked_instance,
    console,
    policy_of_seed,
)
from agents.controller_file import Controller, controller_of
from agents.controller_formats import write_onnx, write_torch
from agents.export import EXPORT_EPISODES, export_schedule
from agents.protocol import acts_greedily
from agents.rollout import RolloutPool
from agents.run_folder import RunFolder, write_text
from agents.schedule_figure import heat_map
from agents.schedule_formats import check_python, to_csv, to_python
from asg_env.schedule import Interpolation, LearnedSchedule, Selection
from asg_env.validation import ConfigError

Format = Literal["json", "csv", "python", "controller", "onnx", "torch"]
SUFFIXES: dict[Format, str] = {
    "json": ".json",
    "csv": ".csv",
    "python": ".py",
    "controller": ".safetensors",
    "onnx": ".onnx",
    "torch": ".pt2",
}
CONTROLLER_WRITERS: dict[Format, Callable[[Controller, Path], None]] = {
    "controller": Controller.save,
    "onnx": write_onnx,
    "torch": write_torch,
}
FOR_GROUPS: tuple[Format, ...] = ("onnx", "torch")  # a graph has fixed shapes, weights have not


def export_command(
    run: RunPath,
    out: Annotated[Path, typer.Option(help="File to write; its suffix tells the format.")],
    format: Annotated[
        Format | None, typer.Option(help="By the suffix of --out if left out.")
    ] = None,
    scale: Annotated[
        float | None, typer.Option(help="Factor on the base learning rate; 1 if left out.")
    ] = None,
    episodes: Annotated[
        int | None, typer.Option(min=1, help=f"Rollouts; {EXPORT_EPISODES} if left out.")
    ] = None,
    select: Annotated[
        Selection | None,
        typer.Option(
            help="Mean of the rollouts, as if left out, the one nearest to their median, or the "
            "best by outer_valid."
        ),
    ] = None,
    interpolation: Annotated[
        Interpolation | None,
        typer.Option(help="Of the multipliers between windows; step if left out."),
    ] = None,
    layer_groups: Annotated[
        str | None,
        typer.Option(
            help="Of onnx and torch: names, input to head, comma between, of the layer groups that "
            "a coordinate-wise controller is to drive; those of its training if left out."
        ),
    ] = None,
    training_seed: TrainingSeed = 0,
    greedy: Greedy = None,
    overwrite: Overwrite = False,
) -> None:
    """Write what the controller does to the rates as a schedule, or the controller itself.

    A schedule: json, csv, python. The controller: controller (for L2OController and NumPy), onnx,
    torch (a program of torch.export).
    """
    if out.is_dir() or not out.parent.is_dir():
        raise ConfigError(f"--out must be a file in an existing folder, got {out}; choose another")
    if out.exists() and not overwrite:
        raise ConfigError(f"{out} exists; add --overwrite or choose another --out")
    kind = _format(format, out)
    if layer_groups is not None and kind not in FOR_GROUPS:
        raise ConfigError(
            f"--layer-groups is of the formats {' and '.join(FOR_GROUPS)}, while a schedule is "
            "brought to another network by `by_depth` and a controller's own file takes any, got "
            f"format {kind}; leave it out"
        )
    opened = RunFolder.open(run)
    if kind in CONTROLLER_WRITERS:
        of_schedules = {"scale": scale, "episodes": episodes, "select": select}
        for name, value in {**of_schedules, "interpolation": interpolation}.items():
            if value is not None:
                raise ConfigError(
                    f"--{name} is of schedules and format {kind} holds the controller itself, got "
                    f"{value}; leave it out"
                )
        _export_controller(opened, kind, out, layer_groups, training_seed, greedy)
        return
    opened.experiment.check()  # its device may not be here
    interpolation = interpolation or "step"
    if kind == "python":  # now, not after the rollouts
        env = opened.experiment.env
        check_python(interpolation, env.lr_factor, env.momentum_form)
    schedule = exported(
        opened,
        1.0 if scale is None else scale,
        episodes or EXPORT_EPISODES,
        select or "mean",
        interpolation,
        training_seed,
        greedy,
    )
    if kind == "json":
        write_schedule(out, schedule)
    else:
        text = to_csv(schedule) if kind == "csv" else to_python(schedule)
        _writing(out, lambda: write_text(out, text))
    console.print(f"written: {out}")


def _export_controller(
    run: RunFolder,
    kind: Format,
    out: Path,
    layer_groups: str | None,
    training_seed: int,
    greedy: bool | None,
) -> None:
    check_training_seed(run, training_seed)
    controller = controller_of(run, training_seed, greedy)
    if layer_groups is not None:
        names = [name.strip() for name in layer_groups.split(",")]
        controller = controller.for_layer_groups(names)
    _writing(out, lambda: CONTROLLER_WRITERS[kind](controller, out))
    console.print(_in_words(controller, any_number=kind == "controller"))
    console.print(f"written: {out}")


def _in_words(controller: Controller, any_number: bool) -> str:
    record = controller.record
    if any_number and record.network.kind == "coordinate-wise":
        drives = "any number of layer groups"
    else:
        groups = record.layer_groups
        drives = f"{len(groups)} layer group{'' if len(groups) == 1 else 's'}: {', '.join(groups)}"
    return (
        f"{record.network.kind} controller of {record.task}, instances {record.instances}, "
        f"{'greedy' if record.greedy else 'sampled'} actions, for {drives}; it observes "
        f"{len(record.labels)} numbers ({record.encoding.observation})"
    )


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
    console.print(heat_map(schedule, console.width))
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
