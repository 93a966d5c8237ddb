"""What `asg fit` trains under, a schedule, a controller or a baseline, and settings it brings."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agents.baselines import FAMILIES, Controller
from agents.cli.options import console, policy_of_seed
from agents.controller_file import ControllerRecord, read_controller
from agents.fit import ScheduleController
from agents.policy import Policy
from agents.protocol import acts_greedily
from agents.rules import RULE_FAMILIES
from agents.run_folder import RunFolder
from asg_env.config import EnvSettings
from asg_env.observations import NEED_INNER_VALID
from asg_env.schedule import LearnedSchedule
from asg_env.schedulers import Course
from asg_env.task_settings import settings_class
from asg_env.user_code import is_user_code
from asg_env.validation import ConfigError, validate

OF_A_CONTROLLER = ("observation", "action", "grid", "start_multiplier")
OF_A_SCHEDULE = ("optimizer", "momentum_form", "lr_factor")


@dataclass(frozen=True)
class LearnedController:
    """A controller of a run folder or of a file.

    Attributes:
        start: Settings of the environment that it brings.
        terms: Guidance terms beside KL that it observes.
        greedy: Whether it takes its likeliest actions.
        policy: Makes its policy for layer groups of these names.
    """

    start: dict[str, Any]
    terms: tuple[str, ...]
    greedy: bool
    policy: Callable[[Sequence[str]], Policy]

    def check(self, settings: EnvSettings) -> None:
        """Find out whether it can see and do with these settings what it was trained with.

        Raises:
            ConfigError: It can not.
        """
        check_unchanged(settings, self.start, OF_A_CONTROLLER, "controller")
        if settings.observation in NEED_INNER_VALID and settings.further_terms() != self.terms:
            raise ConfigError(
                f"`env.guidance` must hold the terms {list(self.terms)} beside kl, which the "
                f"controller observes, got {list(settings.further_terms())}; keep them, at any "
                "weight"
            )


def learned_controller(
    path: Path, task: str, training_seed: int, greedy: bool | None
) -> LearnedController:
    """Return the controller of a run folder, of this task, or of a file, for any task.

    Args:
        path: Run folder, or file of `asg export`.
        task: Environment id.
        training_seed: Whose controller, of a run folder with several.
        greedy: How it acts; as the run or the file says if None.

    Raises:
        ConfigError: There is no such controller, or it cannot be used.
    """
    if path.is_file():
        if training_seed:
            raise ConfigError(
                f"--training-seed chooses in a run folder, while {path} holds one controller, got "
                f"{training_seed}; leave it out"
            )
        controller = read_controller(path)
        record = controller.record
        acts = record.greedy if greedy is None else greedy
        start = start_of_record(record, task)
        return LearnedController(start, record.encoding.terms, acts, controller.policy)
    if not path.exists():
        raise ConfigError(
            f"--controller {path} is not there; give a run folder or a controller's file"
        )
    run = RunFolder.open(path)
    if run.experiment.task != task:
        raise ConfigError(
            f"{path} was trained on {run.experiment.task}, got {task}; export its controller to a "
            "file, which other tasks take"
        )
    policy = policy_of_seed(run, training_seed)
    acts = acts_greedily(run, training_seed) if greedy is None else greedy
    env = run.experiment.env
    start = env.model_dump(exclude_none=True)
    return LearnedController(start, env.further_terms(), acts, lambda groups: policy)


def start_of_record(record: ControllerRecord, task: str) -> dict[str, Any]:
    """Return the settings that a controller's file brings.

    Another task than that of its training keeps its own base rate and length.

    Raises:
        ConfigError: It was trained with growing windows.
    """
    if record.growing_windows:
        raise ConfigError(
            f"the controller was trained with windows of {list(record.growing_windows)} inner "
            "steps, which its file alone does not set; give its run folder, or use L2OController"
        )
    start = record.encoding.model_dump(include=set(OF_A_CONTROLLER))
    start |= {name: getattr(record, name) for name in OF_A_SCHEDULE}
    if task == record.task:
        steps = record.inner_steps // record.horizon
        start |= {"base_lr": record.base_lr, "horizon": record.horizon, "inner_steps": steps}
    return start


def check_unchanged(
    settings: EnvSettings, start: dict[str, Any], names: Sequence[str], what: str
) -> None:
    """Find out whether settings are what something was learned with.

    Raises:
        ConfigError: One of these names is not.
    """
    learned = validate(type(settings), start, "env")
    for name in names:
        then, now = getattr(learned, name), getattr(settings, name)
        if now != then:
            raise ConfigError(
                f"`env.{name}` must be {then}, as the {what} was learned with it, got {now}; leave "
                "it out"
            )


def start_of_schedule(
    schedule: LearnedSchedule, path: Path, task: str, overrides: Sequence[str]
) -> dict[str, Any]:
    """Return the settings that a schedule was learned with; never code that its file names.

    Raises:
        ConfigError: It is for another task, or its settings cannot be used.
    """
    if schedule.task != task:
        raise ConfigError(
            f"{path} was learned on {schedule.task}, got {task}; fit that task, or bring the "
            "schedule to another network in Python: by_depth or regroup of LearnedSchedule"
        )
    # The file may have been edited: what it says of itself counts, not the settings of its making.
    mine = ("base_lr", *OF_A_SCHEDULE)
    start = {**schedule.settings, **{name: getattr(schedule, name) for name in mine}}
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
    try:
        validate(settings_class(task), start, "schedule.settings")
    except ConfigError as error:
        sentence = str(error)
        for name in mine:  # stands beside `settings` in the file
            sentence = sentence.replace(f"schedule.settings.{name}", f"schedule.{name}")
        raise ConfigError(sentence) from None
    return start


def schedule_controller(schedule: LearnedSchedule, total_steps: int) -> ScheduleController:
    """Return what replays a schedule over so many inner steps; say so where it is squeezed.

    Raises:
        ConfigError: Its common factor would have to be stretched.
    """
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


def baseline_controller(name: str, groups: int) -> Controller:
    """Return a candidate of a family of hand-made rules, by NAME or NAME:CANDIDATE.

    Raises:
        ConfigError: There is none of this name.
    """
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
