"""What the commands of `asg` share: the terminal, options, and policies by training seed."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from agents.experiment import MAX_WORKERS
from agents.policy import Policy
from agents.run_folder import RunFolder
from agents.train import load_policy
from asg_env.core.layer_groups import LARGEST_SCALE
from asg_env.core.seeding import derive_seed
from asg_env.instances import Instance
from asg_env.schedule import LearnedSchedule
from asg_env.validation import ConfigError

# Paths and messages are printed as they are: [text] in them is no markup.
console = Console(width=None if sys.stdout.isatty() else 110, markup=False, highlight=False)

RunPath = Annotated[Path, typer.Argument(help="Run folder: the --out of an `asg train`.")]
Workers = Annotated[int, typer.Option(min=1, max=MAX_WORKERS, help="Worker processes.")]
Greedy = Annotated[
    bool | None,
    typer.Option(
        "--greedy/--sampled",
        help="How the controller acts: its likeliest actions, or draws. If left out, what did "
        "better on train instances when the run was compared.",
    ),
]
TrainingSeed = Annotated[
    int, typer.Option(min=0, help="Whose controller, of a run with several training seeds.")
]
Scale = Annotated[float, typer.Option(help="Factor on the base learning rate.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Write over what stands at --out.")]


Assignments = Annotated[
    list[str] | None, typer.Option("--set", help="key.key=value, may be repeated.")
]


def progress_bar(label: str) -> Progress:
    """Return a bar with label, the field `numbers` and an ETA; silent where nobody watches."""
    return Progress(
        TextColumn(label),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[numbers]}"),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


def policy_of_seed(run: RunFolder, training_seed: int) -> Policy:
    """Return the policy of one of the run's training seeds."""
    check_training_seed(run, training_seed)
    return load_policy(run, training_seed)


def check_training_seed(run: RunFolder, training_seed: int) -> None:
    """Find out whether a run has this training seed.

    Raises:
        ConfigError: It has fewer.
    """
    seeds = run.experiment.train.seeds
    if training_seed >= seeds:
        raise ConfigError(
            f"--training-seed must be < {seeds}, the training seeds of {run.path}, got "
            f"{training_seed}; lower it"
        )


def load_schedule(path: Path) -> LearnedSchedule:
    """Read a schedule file.

    Raises:
        ConfigError: It is none, or damaged.
    """
    try:
        return LearnedSchedule.load(path)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def make_folder(out: Path) -> None:
    """Make a folder to write to.

    Raises:
        ConfigError: It cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{out} cannot be written ({error.strerror}); choose another --out"
        ) from None


def checked_instance(task: str, seed: int, scale: float) -> Instance:
    """Return the instance of an ordinary training with this seed."""
    try:
        return Instance.from_dict(
            {
                "task": task,
                "head_seed": derive_seed(seed, "fit-head") % 2**31,
                "data_seed": derive_seed(seed, "fit-data") % 2**31,
                "base_lr_scale": scale,
            }
        )
    except ValueError:
        raise ConfigError(
            f"--scale must be a finite number > 0, at most {LARGEST_SCALE:g}, got {scale}; set it "
            "so"
        ) from None
