"""`asg fit`: ordinary training under a schedule, a controller or a baseline."""

import json
import math
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import save_file

from agents.baselines import FAMILIES, Controller
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
    policy_of_seed,
    progress_bar,
)
from agents.experiment import env_settings
from agents.fit import LiveController, ScheduleController, fit
from agents.judgement import judge_network, retention_of
from agents.policy import Policy
from agents.protocol import acts_greedily
from agents.rules import RULE_FAMILIES
from agents.run_folder import RunFolder, write_text
from asg_env.build import build_trainer
from asg_env.config import EnvSettings
from asg_env.core.seeding import derive_seed
from asg_env.core.trainer import Trainer
from asg_env.files import replacing
from asg_env.instances import Instance
from asg_env.observations import NEED_INNER_VALID
from asg_env.schedule import LearnedSchedule
from asg_env.schedulers import Course
from asg_env.task_settings import settings_class
from asg_env.tasks import TASK_MODULES
from asg_env.user_code import is_user_code
from asg_env.validation import ConfigError, validate

UNUSED = ("instances", "split")  # --seed and --scale say which instance
OF_A_CONTROLLER = ("observation", "action", "grid", "start_multiplier")


def fit_command(
    task: Annotated[str, typer.Argument(help="Task id, such as ASG/Digits-v0.")],
    out: Annotated[Path, typer.Option(help="Folder for the trained network.")],
    schedule: Annotated[Path | None, typer.Option(help="Schedule file.")] = None,
    controller: Annotated[Path | None, typer.Option(help="Run folder of a controller.")] = None,
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
    policy: Policy | None = None
    if schedule is not None:
        learned = load_schedule(schedule)
        if learned.task != task:
            raise ConfigError(
                f"{schedule} was learned on {learned.task}, got {task}; fit that task, or bring "
                "the schedule to another network in Python: by_depth or regroup of LearnedSchedule"
            )
        start = _start(learned, overrides or ())
        validate(settings_class(task), start, "schedule.settings")
    elif controller is not None:
        if controller.is_file():
            raise ConfigError(
                f"--controller must be a run folder, got the file {controller}; give the run that "
                "it was exported from, or use it with L2OController"
            )
        run = RunFolder.open(controller)
        if run.experiment.task != task:
            raise ConfigError(f"{controller} was trained on {run.experiment.task}, got {task}")
        start = run.experiment.env.model_dump(exclude_none=True)
        policy = policy_of_seed(run, training_seed)
        greedy = acts_greedily(run, training_seed) if greedy is None else greedy
    unused = UNUSED if policy is not None else (*UNUSED, *OF_A_CONTROLLER)
    settings = env_settings(task, overrides or (), start, unused)
    windows = settings.windows()
    if policy is not None:
        _check_unchanged(settings, start, OF_A_CONTROLLER, "controller")
        learned_terms = validate(type(settings), start, "env").further_terms()
        if settings.observation in NEED_INNER_VALID and settings.further_terms() != learned_terms:
            raise ConfigError(
                f"`env.guidance` must hold the terms {list(learned_terms)} beside kl, which the "
                f"controller observes, got {list(settings.further_terms())}; keep them, at any "
                "weight"
            )
    elif schedule is not None:
        _check_unchanged(settings, start, ("optimizer", "momentum_form", "lr_factor"), "schedule")
    trainer = build_trainer(task, settings)
    source: Controller
    # Items, not dicts: in another order, multipliers would go to the wrong groups.
    if schedule is not None and [*learned.layer_groups.items()] != [*trainer.patterns.items()]:
        raise ConfigError(
            f"{schedule} is for the groups {dict(learned.layer_groups)}, {task} has "
            f"{dict(trainer.patterns)}; export one on this task, or mend the patterns"
        )
    if schedule is not None:
        scheduled = _scheduled(learned, sum(windows))
        source, windows = scheduled, scheduled.windows
    elif baseline is not None:
        source = _baseline(baseline, len(trainer.layer_groups))
    else:
        assert policy is not None
        policy.seed(derive_seed(seed, "fit-actions"))
        source = LiveController(policy, settings, trainer, deterministic=bool(greedy))
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
            "actions": None if policy is None else "greedy" if greedy else "sampled",
            "training_seed": None if policy is None else training_seed,
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


def _check_unchanged(
    settings: EnvSettings, start: dict[str, Any], names: Sequence[str], what: str
) -> None:
    learned = validate(type(settings), start, "env")
    for name in names:
        then, now = getattr(learned, name), getattr(settings, name)
        if now != then:
            raise ConfigError(
                f"`env.{name}` must be {then}, as the {what} was learned with it, got {now}; leave "
                "it out"
            )


def _start(schedule: LearnedSchedule, overrides: Sequence[str]) -> dict[str, Any]:
    """Settings that a schedule was learned with; never code that its file names."""
    start = {**schedule.settings, "base_lr": schedule.base_lr}
    guidance = start.get("guidance")
    own = [name for name in guidance or () if is_user_code(name)]
    if any(re.match(r"env\.(guidance|kl_weight)=", override) for override in overrides):
        start.pop("guidance", None)
    elif own:
        raise ConfigError(
            f"`env.guidance` must be set: the schedule was learned with the term {own[0]}, and no "
            "file is run because a schedule names it; add --set env.guidance=..., with that term "
            "or without"
        )
    return start


def _scheduled(schedule: LearnedSchedule, total_steps: int) -> ScheduleController:
    if schedule.lr_factor != "constant" and total_steps != schedule.inner_steps:
        raise ConfigError(
            f"env.horizon times env.inner_steps must be {schedule.inner_steps}, over which the "
            f"schedule's {schedule.lr_factor} was learned, got {total_steps}; set them so, or use "
            "the schedule in a loop of your own, where it is stretched"
        )
    course = Course(schedule, total_steps)
    if course.squeezed:
        console.print(course.squeezed)
    return ScheduleController(course)


def _baseline(name: str, groups: int) -> Controller:
    family, _, candidate = name.partition(":")
    families = {**FAMILIES, **RULE_FAMILIES}
    if family not in families:
        raise ConfigError(
            f"--baseline must be one of {', '.join(families)}, got '{family}'; give one of these"
        )
    candidates = families[family](groups)
    if not candidate:
        candidate = list(candidates)[len(candidates) // 2]
        console.print(f"{family} has the candidates {', '.join(candidates)}; taking {candidate}")
    if candidate not in candidates:
        raise ConfigError(
            f"--baseline {family} has the candidates {', '.join(candidates)}, got "
            f"'{candidate}'; give one of these"
        )
    return candidates[candidate]


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
