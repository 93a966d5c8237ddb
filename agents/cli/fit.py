"""`asg fit`: ordinary training under a schedule, a controller or a baseline."""

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import save_file

from agents.baselines import Controller
from agents.cli.fit_sources import (
    OF_A_CONTROLLER,
    OF_A_SCHEDULE,
    LearnedController,
    baseline_controller,
    check_unchanged,
    learned_controller,
    schedule_controller,
    start_of_schedule,
)
from agents.cli.options import (
    Assignments,
    Greedy,
    Overwrite,
    Scale,
    TrainingSeed,
    checked_instance,
    console,
    load_schedule,
    make_folder,
    progress_bar,
)
from agents.experiment import env_settings
from agents.fit import LiveController, fit
from agents.judgement import judge_network, retention_of
from agents.run_folder import write_text
from asg_env.build import build_trainer
from asg_env.core.seeding import derive_seed
from asg_env.core.trainer import Trainer
from asg_env.files import replacing
from asg_env.instances import Instance
from asg_env.tasks import TASK_MODULES
from asg_env.validation import ConfigError

UNUSED = ("instances", "split")  # --seed and --scale say which instance


def fit_command(
    task: Annotated[str, typer.Argument(help="Task id, such as ASG/Digits-v0.")],
    out: Annotated[Path, typer.Option(help="Folder for the trained network.")],
    schedule: Annotated[Path | None, typer.Option(help="Schedule file.")] = None,
    controller: Annotated[Path | None, typer.Option(help="Run folder, or controller file.")] = None,
    baseline: Annotated[
        str | None, typer.Option(help="NAME or NAME:CANDIDATE, such as cosine:0.1.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of head and data order.")] = 0,
    scale: Scale = 1.0,
    greedy: Greedy = None,
    training_seed: TrainingSeed = 0,
    overwrite: Overwrite = False,
    overrides: Assignments = None,
) -> None:
    """Train a network once, outside the environment, and save it.

    Exactly one of --schedule, --controller and --baseline says how; --greedy, --sampled and
    --training-seed go with --controller.
    """
    if sum(x is not None for x in (schedule, controller, baseline)) != 1:
        raise ConfigError("give exactly one of --schedule, --controller and --baseline")
    if controller is None and (greedy is not None or training_seed):
        raise ConfigError(
            "--greedy, --sampled and --training-seed choose how a controller acts; "
            "give --controller, or leave them out"
        )
    if task not in TASK_MODULES:
        raise ConfigError(
            f"`task` must be one of {', '.join(TASK_MODULES)}, got '{task}'; give one of these"
        )
    if out.exists() and not overwrite and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is not empty; add --overwrite or choose another --out")
    torch.set_num_threads(1)
    start: dict[str, Any] = {}
    instance = checked_instance(task, seed, scale)
    live: LearnedController | None = None
    if schedule is not None:
        learned = load_schedule(schedule)
        start = start_of_schedule(learned, schedule, task, overrides or ())
    elif controller is not None:
        live = learned_controller(controller, task, training_seed, greedy)
        start = live.start
    unused = UNUSED if live is not None else (*UNUSED, *OF_A_CONTROLLER)
    settings = env_settings(task, overrides or (), start, unused)
    windows = settings.windows()
    if live is not None:
        live.check(settings)
    elif schedule is not None:
        check_unchanged(settings, start, OF_A_SCHEDULE, "schedule")
    trainer = build_trainer(task, settings)
    source: Controller
    # Items, not dicts: in another order, multipliers would go to the wrong groups.
    if schedule is not None and [*learned.layer_groups.items()] != [*trainer.patterns.items()]:
        raise ConfigError(
            f"{schedule} is for the groups {dict(learned.layer_groups)}, {task} has "
            f"{dict(trainer.patterns)}; export one on this task, or mend the patterns"
        )
    if schedule is not None:
        scheduled = schedule_controller(learned, sum(windows))
        source, windows = scheduled, scheduled.windows
    elif baseline is not None:
        source = baseline_controller(baseline, len(trainer.layer_groups))
    else:
        assert live is not None
        policy = live.policy(trainer.layer_groups)
        policy.seed(derive_seed(seed, "fit-actions"))
        source = LiveController(policy, settings, trainer, deterministic=live.greedy)
    make_folder(out)  # now, not after the training
    began = time.perf_counter()
    records = _fit_with_progress(trainer, source, instance, windows)
    seconds = time.perf_counter() - began
    diverged = records[-1]["diverged"]
    retention = retention_of(trainer, diverged)
    figures: dict[str, Any] = {"test_accuracy": None, "test_mean_recall": None}
    if "test" in trainer.splits:  # it is not where the target domain has no labels
        judged = judge_network(trainer, diverged)
        figures = {
            "test_accuracy": float(judged.correct.mean()),
            "test_mean_recall": float(judged.recalls.mean()),
            "test_recall_per_class": judged.recalls.tolist(),
            "test_confusion": judged.confusion.tolist(),
            "test_calibration_error": judged.calibration_error,
            "test_hyperspherical_energies": judged.energies,
        }
    accuracy, recall = figures["test_accuracy"], figures["test_mean_recall"]
    _save_fit(
        out,
        trainer,
        {
            "task": task,
            "source": str(schedule or controller or f"baseline {baseline}"),
            "actions": None if live is None else "greedy" if live.greedy else "sampled",
            "training_seed": None if live is None else training_seed,
            "instance": instance.to_dict(),
            "settings": settings.model_dump(exclude_none=True),
            **figures,
            "retention": retention,
            "windows": [_finite(record) for record in records],
        },
    )
    console.print(
        f"trained {records[-1]['inner_step']} inner steps in {seconds:.1f} s: "
        + ("" if accuracy is None else f"test accuracy {accuracy:.3f}, ")
        + ("" if recall is None else f"mean recall {recall:.3f}, ")
        + ("no old task to retain" if retention is None else f"retention {retention:.3f}")
        + (", diverged" if diverged else "")
        + f"\nwritten: {out}/model.safetensors, fit.json"
    )


def _fit_with_progress(
    trainer: Trainer, source: Controller, instance: Instance, windows: Sequence[int]
) -> list[dict[str, Any]]:
    with progress_bar("{task.completed}/{task.total} inner steps") as bar:
        task = bar.add_task("fit", total=sum(windows), numbers="")

        def show(record: dict[str, Any]) -> None:
            numbers = f"CE {record['ce']:.3f}  KL {record['kl']:.3f}"
            bar.update(task, completed=record["inner_step"], numbers=numbers)

        return fit(trainer, source, instance, windows, show)


def _finite(value: Any) -> Any:
    """JSON has no NaN: a number that is not finite is stored as null."""
    if isinstance(value, dict):
        return {name: _finite(held) for name, held in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(held) for held in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _save_fit(out: Path, trainer: Any, record: dict[str, Any]) -> None:
    try:
        weights = trainer.weights()  # channels-last tensors are stored in plain order
        with replacing(out / "model.safetensors") as temporary:
            save_file({name: tensor.contiguous() for name, tensor in weights.items()}, temporary)
        write_text(out / "fit.json", json.dumps(record, indent=2) + "\n")
    except OSError as error:
        raise ConfigError(
            f"{out} cannot be written ({error.strerror}); choose another --out"
        ) from None
