"""Experiment files and run folders: what a run is made of and where it is kept."""

import hashlib
import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import torch
from pydantic import Field

from agents.search import FIRST_RUNG
from asg_env.build import prepare_variants, task_of
from asg_env.config import EnvSettings
from asg_env.task_settings import settings_class
from asg_env.tasks import TASK_MODULES
from asg_env.user_code import absolute, is_user_code, load, load_module
from asg_env.validation import ConfigError, Settings, validate
from asg_env.yaml_files import parse_yaml, read_yaml

# `agent.kind` -> its module, imported when asked for, and in it the settings class.
AGENTS: dict[str, tuple[str, str]] = {
    "reinforce": ("agents.reinforce", "ReinforceSettings"),
    "sequence-ppo": ("agents.sequence_ppo", "SequencePPOSettings"),
    "es": ("agents.evolution", "EvolutionSettings"),
    "ppo": ("agents.sb3.learner", "PPOSettings"),
    "a2c": ("agents.sb3.learner", "A2CSettings"),
    "recurrent-ppo": ("agents.sb3.learner", "RecurrentPPOSettings"),
    "trpo": ("agents.sb3.learner", "TRPOSettings"),
    "sac": ("agents.sb3.learner", "SACSettings"),
    "td3": ("agents.sb3.learner", "TD3Settings"),
    "tqc": ("agents.sb3.learner", "TQCSettings"),
    "crossq": ("agents.sb3.learner", "CrossQSettings"),
    "ars": ("agents.sb3.learner", "ARSSettings"),
}
# What each module, and each settings class, must have (docs/algorithms.md, An agent of your own).
AGENT_PARTS = ("Learner", "CHECKPOINT", "load_policy")
SETTINGS_PARTS = ("kind", "updates", "episodes")

MAX_WORKERS = 256  # processes; more are a slip of the keyboard


class TrainSettings(Settings):
    """`train:` of an experiment file."""

    seeds: Annotated[int, Field(ge=1)] = 1  # training seeds: seed, seed + 1, ...
    workers: Annotated[int, Field(ge=1, le=MAX_WORKERS)] = 2  # [processes]
    test_instances: Annotated[int, Field(ge=1, le=40)] = 40
    tuning_instances: Annotated[int, Field(ge=1)] = 8  # train instances per baseline candidate
    search_episodes: Annotated[int, Field(ge=0)] | None = None  # training's own if left out
    reference: bool = True  # also search, and judge, with the hidden scale known


class Experiment:
    """A validated experiment: environment, agent, budget and seed."""

    def __init__(self, values: dict[str, Any]) -> None:
        values = dict(values)
        unknown = sorted(set(values) - {"env", "agent", "train", "seed"}, key=str)
        if unknown:
            raise ConfigError(f"`{unknown[0]}` is unknown; known keys are agent, env, seed, train")
        env = _section(values, "env")
        self.task = env.pop("id", None)
        if not isinstance(self.task, str) or self.task not in TASK_MODULES:
            raise ConfigError(
                f"`env.id` must be one of {', '.join(TASK_MODULES)}, got {self.task!r}; set env.id"
            )
        self.env: EnvSettings = validate(settings_class(self.task), env, "env")
        if self.env.split != "train":
            raise ConfigError(
                f"`env.split` must be train to train on, got {self.env.split}; leave it out"
            )
        agent = _section(values, "agent")
        kind = agent.get("kind")
        if isinstance(kind, str) and is_user_code(kind):
            agent["kind"] = absolute(kind)
        self.agent_module, settings = _find_agent(agent.get("kind"))
        self.agent = validate(settings, agent, "agent")
        self.train = validate(TrainSettings, _section(values, "train"), "train")
        if 0 < self.search_episodes < FIRST_RUNG:  # now, not after the training
            raise ConfigError(
                f"`train.search_episodes` must be 0 or >= {FIRST_RUNG}, got "
                f"{self.search_episodes}; set it (left out, it is the episodes of training)"
            )
        seed = values.get("seed", 0)
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ConfigError(f"`seed` must be an integer >= 0, got {seed!r}; set seed")
        self.seed = seed

    @cached_property
    def _loaded(self) -> tuple[dict[str, str], torch.Tensor | None, int]:
        task = task_of(self.task, self.env)
        test = task.splits.get("test")
        labels = None if test is None else test.labels
        return dict(task.layer_groups), labels, len(task.optimizee.head_weight())

    @property
    def layer_groups(self) -> dict[str, str]:
        """Layer groups of the task's network, input to head: name to parameter pattern."""
        return self._loaded[0]

    @property
    def test_labels(self) -> torch.Tensor | None:
        """Labels of the test split, (N,); None where the target domain has none."""
        return self._loaded[1]

    @property
    def classes(self) -> int:
        """Number of classes that the network tells apart."""
        return self._loaded[2]

    def check(self, report: Callable[[str], None] = lambda what: None) -> None:
        """Load the task and build the agent, so that a setting that fits neither is found early.

        No image is put on the device: this process would keep the memory that workers need.

        Args:
            report: Called with what is being loaded, where instances need several networks.

        Raises:
            ConfigError: A setting does not fit the task, the machine or the agent.
        """
        prepare_variants(self.task, self.env, report)
        self.agent_module.Learner(self.task, self.env, self.agent, self.seed, self.train.workers)

    def to_dict(self) -> dict[str, Any]:
        """Return the resolved values: what `config.yaml` of a run folder holds."""
        return {
            "env": {"id": self.task, **self.env.model_dump(mode="json", exclude_none=True)},
            "agent": self.agent.model_dump(),
            "train": self.train.model_dump(exclude_none=True),
            "seed": self.seed,
        }

    def digest(self) -> str:
        """SHA-256 of the resolved values but for the number of workers, which changes nothing.

        Not of sorted ones: the order of layer groups is part of what they are.
        """
        values = self.to_dict()
        del values["train"]["workers"]
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()

    @property
    def search_episodes(self) -> int:
        """Training runs that a static search may cost: as many as one training seed."""
        if self.train.search_episodes is not None:
            return self.train.search_episodes
        return int(self.agent.episodes)


def _find_agent(kind: Any) -> tuple[ModuleType, type[Any]]:
    """Return the module of an agent and its settings class.

    Raises:
        ConfigError: There is no such agent, or the user's file does not hold what an agent needs.
    """
    if not isinstance(kind, str) or (kind not in AGENTS and not is_user_code(kind)):
        raise ConfigError(
            f"`agent.kind` must be one of {', '.join(AGENTS)}, or FILE.py:NAME, got {kind!r}; set "
            "agent.kind"
        )
    if kind in AGENTS:
        module_name, name = AGENTS[kind]
        module = import_module(module_name)
        return module, getattr(module, name)
    try:
        module, settings = load_module(kind), load(kind)
    except ValueError as error:
        raise ConfigError(f"`agent.kind` {error}; mend it") from None
    file, _, name = kind.rpartition(":")
    if not isinstance(settings, type) or not issubclass(settings, Settings):
        raise ConfigError(
            f"`agent.kind` must name a subclass of asg_env.validation.Settings, {name} of {file} "
            "is none; mend it"
        )
    known = {*dir(settings), *settings.model_fields}
    missing = [f"{name} of {file} has no {part}" for part in SETTINGS_PARTS if part not in known]
    missing += [f"{file} has no {part}" for part in AGENT_PARTS if not hasattr(module, part)]
    if missing:
        raise ConfigError(
            f"`agent.kind` must name settings with {', '.join(SETTINGS_PARTS)} in a file with "
            f"{', '.join(AGENT_PARTS)}; {missing[0]}, add it"
        )
    return module, settings


def _section(values: dict[str, Any], name: str) -> dict[str, Any]:
    section = values.get(name, {})
    if not isinstance(section, dict):
        raise ConfigError(f"`{name}` must be a mapping of settings, got {section!r}; see configs/")
    return dict(section)


def load_experiment(name: str, overrides: Sequence[str] = ()) -> Experiment:
    """Read an experiment by bare name (of the shipped ones) or path.

    `env:` and `agent:` may be the bare name of a file in configs/env or configs/agent.

    Args:
        name: Such as `digits-reinforce`, or the path of a YAML file.
        overrides: `key.key=value` each, the value read as YAML.

    Raises:
        ConfigError: The file or a value cannot be used.
    """
    values = read_yaml(config_path("experiment", name))
    assignments = [assignment(override) for override in overrides]
    for key in ("env", "agent"):  # another whole section, before single values of it
        for _, parts, value in assignments:
            if parts == [key]:
                values[key] = value
        if isinstance(values.get(key), str):
            values[key] = read_yaml(config_path(key, values[key]))
    assign(values, [a for a in assignments if a[1] not in (["env"], ["agent"])])
    return Experiment(values)


def env_settings(
    task: str,
    overrides: Sequence[str] = (),
    start: Mapping[str, Any] | None = None,
    unused: Collection[str] = (),
) -> EnvSettings:
    """Return settings of a task: its defaults, or `start`, changed by `env.key=value` each.

    Raises:
        ConfigError: There is no such task, a value cannot be used, or an override is of a setting
            that the caller names as one it makes no use of.
    """
    if task not in TASK_MODULES:
        raise ConfigError(
            f"`task` must be one of {', '.join(TASK_MODULES)}, got '{task}'; give one of these"
        )
    values: dict[str, Any] = {"env": dict(start or {})}
    assignments = [assignment(override) for override in overrides]
    for override, parts, _ in assignments:
        if len(parts) < 2 or parts[0] != "env":
            raise ConfigError(f"--set must look like env.batch_size=16 here, got {override!r}")
        if parts[1] in unused:
            raise ConfigError(
                f"`env.{parts[1]}` changes nothing in this command, got {override!r}; leave it out"
            )
    assign(values, assignments)
    return validate(settings_class(task), values["env"], "env")


Assignment = tuple[str, list[str], Any]  # as typed, the path of the key, the value


def assignment(override: str) -> Assignment:
    """Split `key.key=value`, the value read as YAML.

    Raises:
        ConfigError: It does not look like that.
    """
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise ConfigError(f"--set must look like KEY=VALUE, got {override!r}")
    try:
        return override, parts, parse_yaml(text)
    except ConfigError as error:
        raise ConfigError(f"--set {override}: {error}") from None


def assign(values: dict[str, Any], assignments: Sequence[Assignment]) -> None:
    """Set values by the paths of their keys, in place.

    Raises:
        ConfigError: A path leads through what is no section.
    """
    for override, parts, value in assignments:
        target = values
        for part in parts[:-1]:
            target = target.setdefault(part, {})
            if not isinstance(target, dict):
                raise ConfigError(f"--set {override}: `{part}` is no section; check the key")
        target[parts[-1]] = value


def config_path(folder: str, name: str) -> Path:
    """Return the path of a file in configs/ by its bare name, or the path that was given.

    Raises:
        ConfigError: No shipped file has this name.
    """
    if name.endswith((".yaml", ".yml")) or os.sep in name:
        return Path(name)
    shipped = Path(str(files("configs") / folder))
    path = shipped / f"{name}.yaml"
    if not path.exists():
        for other, command in (("experiment", "train"), ("benchmark", "benchmark")):
            if (shipped.parent / other / path.name).exists():
                raise ConfigError(
                    f"'{name}' is one of the shipped {other}s, no {folder}; give it to "
                    f"`asg {command}`"
                )
        known = ", ".join(sorted(p.stem for p in shipped.glob("*.yaml")))
        raise ConfigError(
            f"{folder} '{name}' is none of the shipped ones ({known}); "
            "give one of these or the path of a YAML file"
        )
    return path
