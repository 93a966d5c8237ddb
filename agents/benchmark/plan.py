"""What `asg benchmark` runs: methods x suites x training seeds, read from YAML and checked."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from agents.baselines import FAMILIES
from agents.experiment import Experiment, assign, assignment, config_path, env_settings
from agents.rules import RULE_FAMILIES
from agents.search import FIRST_RUNG
from asg_env.build import prepare_variants, task_of
from asg_env.config import EnvSettings
from asg_env.instances import (
    TEST_INSTANCES,
    Instance,
    kind_of,
    published_test_instances,
    variants,
)
from asg_env.tasks import TASK_MODULES
from asg_env.user_code import absolute, is_user_code
from asg_env.validation import ConfigError, Settings, validate
from asg_env.yaml_files import read_yaml

SEARCH, RANDOM = "static-search", "random"  # baselines beside the tuned rules
# Of the rules all but pilot-search, whose pilots make every training longer than the others'.
TUNED_RULES = {**FAMILIES, **{n: f for n, f in RULE_FAMILIES.items() if n != "pilot-search"}}
# How an agent sees a suite and acts on it is its own choice; the problem is the suite's.
AGENTS_OWN = ("action", "grid", "start_multiplier", "observation")

TrialKind = Literal["agent", "rule", "search", "random"]


def _own(value: dict[str, Any]) -> dict[str, Any]:
    for key in value:
        if key not in AGENTS_OWN:
            raise ValueError(f"may hold {', '.join(AGENTS_OWN)}, got '{key}'")
    return value


OwnSettings = Annotated[dict[str, Any], AfterValidator(_own)]


class AgentEntry(Settings):
    """One agent of a benchmark file."""

    agent: str | dict[str, Any]  # of configs/agent, or `kind` and settings
    env: OwnSettings = {}


class BenchmarkSettings(Settings):
    """A file of configs/benchmark; docs/benchmark.md explains each key."""

    suites: Annotated[list[str], Field(min_length=1)]  # trained on: of configs/env, or paths
    test: list[str] = []  # suites that all are judged on besides their own
    env: OwnSettings = {}  # for every suite
    agents: dict[str, AgentEntry] = {}
    baselines: list[str] = [*TUNED_RULES, SEARCH, RANDOM]
    episodes: Annotated[int, Field(ge=FIRST_RUNG)]  # of each training, and of the search
    seeds: Annotated[int, Field(ge=1)] = 5
    seed: Annotated[int, Field(ge=0)] = 0  # training seeds are seed, seed + 1, ...
    test_instances: Annotated[int, Field(ge=1, le=TEST_INSTANCES)] = TEST_INSTANCES
    tuning_instances: Annotated[int, Field(ge=1)] = 8  # train instances per candidate of a rule

    @model_validator(mode="after")
    def _check_names(self) -> "BenchmarkSettings":
        known = (*TUNED_RULES, SEARCH, RANDOM)
        for name in self.baselines:
            if name not in known:
                raise ValueError(
                    f"`baselines` must be of {', '.join(known)}, got '{name}'; give those"
                )
            if self.baselines.count(name) > 1:
                raise ValueError(f"`baselines` must name each once, got '{name}' again; drop it")
        for name in self.agents:
            if name in known or not name.replace("-", "").replace("_", "").isalnum():
                raise ValueError(
                    f"`agents` must have names of letters, digits and dashes that no baseline has, "
                    f"got '{name}'"
                )
        return self


@dataclass(frozen=True)
class Suite:
    """A task and an instance set, under a name: what methods are trained, tuned and judged on.

    Attributes:
        name: That of its file.
        task: Environment id.
        values: Settings of the environment.
    """

    name: str
    task: str
    values: Mapping[str, Any]

    @classmethod
    def load(cls, name: str, common: Mapping[str, Any]) -> "Suite":
        """Read a suite by bare name (of configs/env) or path.

        Raises:
            ConfigError: The file or a value cannot be used.
        """
        values = {**read_yaml(config_path("env", name)), **common}
        task = values.pop("id", None)
        if task not in TASK_MODULES:
            raise ConfigError(f"{name}: `id` must be one of {', '.join(TASK_MODULES)}, got {task}")
        return cls(Path(name).stem, task, values)

    def settings(self, own: Mapping[str, Any] | None = None) -> EnvSettings:
        """Settings of its environments, as one agent sees them."""
        return env_settings(self.task, start={**self.values, **(own or {})})

    def tests(self, count: int) -> list[Instance]:
        """Return the first `count` of its published test instances, its kinds taking turns."""
        kinds: dict[str, list[Instance]] = {}
        for instance in published_test_instances(self.task, self.settings().instances):
            kinds.setdefault(kind_of(instance), []).append(instance)
        turns = zip_longest(*kinds.values())
        return [instance for turn in turns for instance in turn if instance is not None][:count]

    @cached_property
    def version(self) -> str:
        """Digest of what results depend on: settings, test instances, images and teachers.

        How an agent sees the suite and acts on it is left out, and so are defaults: when one of
        those changes, the environment's id does.
        """
        settings = self.settings()
        values = settings.model_dump(exclude=set(AGENTS_OWN), exclude_defaults=True)
        listed = [i.to_dict() for i in self.tests(TEST_INSTANCES)]
        digests = [
            task_of(self.task, settings.of(Instance(self.task, 0, 0, **change))).digest
            for change in variants(settings.instances)
        ]
        text = json.dumps([self.task, values, listed, digests], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Trial:
    """One unit of work: train or tune a method on a suite once, then judge it on every suite.

    Attributes:
        suite: Name of the suite that is trained on.
        method: Agent or baseline.
        kind: What the method is.
        index: Which training seed; 0 for what is not trained.
    """

    suite: str
    method: str
    kind: TrialKind
    index: int

    @property
    def name(self) -> str:
        """What people call it."""
        seed = f" seed {self.index}" if self.kind in ("agent", "search") else ""
        return f"{self.method} on {self.suite}{seed}"

    def folder(self, root: Path) -> Path:
        """Where its files are."""
        return root / self.suite / self.method / f"seed-{self.index}"


class Benchmark:
    """A validated benchmark: suites, methods, budget and seeds."""

    def __init__(self, settings: BenchmarkSettings) -> None:
        self.settings = settings
        names = dict.fromkeys([*settings.suites, *settings.test])
        loaded = [Suite.load(name, settings.env) for name in names]
        self.suites = {suite.name: suite for suite in loaded}
        if len(self.suites) < len(loaded):
            raise ConfigError(f"`suites` must have names of their own, got {', '.join(names)}")
        self.trained = [suite.name for suite in loaded[: len(dict.fromkeys(settings.suites))]]
        # Read here: trials may run in another folder.
        self._agents = {name: _agent_values(name, e.agent) for name, e in settings.agents.items()}
        for name in self.trained:
            for agent in settings.agents:
                self.experiment(name, agent)  # refuses what does not fit

    def experiment(self, suite: str, agent: str) -> Experiment:
        """Return the experiment of an agent on a suite, all training seeds in one run folder.

        Raises:
            ConfigError: The agent does not fit the suite, or its updates the budget.
        """
        settings, values = self.settings, self._agents[agent]
        section = {"env": {"id": self.suites[suite].task, **self.suites[suite].values}}
        section["env"] |= settings.agents[agent].env
        train = {
            "seeds": settings.seeds,
            "workers": 1,
            "test_instances": settings.test_instances,
            "tuning_instances": settings.tuning_instances,
            "search_episodes": 0,  # searches are trials of their own
        }
        one, two = (
            Experiment({**section, "agent": {**values, "updates": n}, "train": train})
            for n in (1, 2)
        )
        per_update = two.agent.episodes - one.agent.episodes
        if per_update < 1:  # of an agent of one's own
            raise ConfigError(
                f"`episodes` of agent {agent} must grow with its updates, got "
                f"{one.agent.episodes} for one and {two.agent.episodes} for two; mend it"
            )
        before = one.agent.episodes - per_update  # of a warm start
        updates, rest = divmod(settings.episodes - before, per_update)
        if rest or updates < 1:
            more = f"{before}, which agent {agent} starts with, plus " if before else ""
            raise ConfigError(
                f"`episodes` must be {more}a multiple of {per_update}, the episodes of an update "
                f"of agent {agent}, got {settings.episodes}; change one of them"
            )
        return Experiment(
            {
                **section,
                "agent": {**values, "updates": updates},
                "train": train,
                "seed": settings.seed,
            }
        )

    def seen_by(self, suite: str, agent: str, tested: str) -> Experiment:
        """Return the experiment that an agent trained on a suite would have on a tested one.

        It sees instances and acts on them as in its training, whatever the tested suite says.
        """
        trained = self.experiment(suite, agent)
        own = {key: getattr(trained.env, key) for key in AGENTS_OWN}
        there = self.suites[tested]
        section = {"id": there.task, **there.values, **own}
        return Experiment({**trained.to_dict(), "env": section})

    def check(self, report: Callable[[str], None]) -> None:
        """Load every task and build every agent; nothing is trained.

        Raises:
            ConfigError: A setting does not fit the task, the machine or the agent, or a suite
                has no labelled images to judge by.
        """
        for suite in self.suites.values():
            settings = suite.settings()
            prepare_variants(suite.task, settings, report)
            splits = task_of(suite.task, settings).splits
            for split in ("outer_valid", "test"):
                if split not in splits or splits[split].labels is None:
                    raise ConfigError(
                        f"suite {suite.name} has no labelled images of {split}, so there is "
                        "nothing to judge by; leave it out"
                    )
        for trained in self.trained:
            for agent in self.settings.agents:
                one = self.experiment(trained, agent)
                one.agent_module.Learner(one.task, one.env, one.agent, one.seed, 0)
                for tested in self.suites:
                    self.seen_by(trained, agent, tested)

    def trials(self) -> list[Trial]:
        """Everything there is to do; the cheap ones last, so that they fill the gaps."""
        settings = self.settings
        trials = [
            Trial(suite, agent, "agent", index)
            for index in range(settings.seeds)
            for suite in self.trained
            for agent in settings.agents
        ]
        for suite in self.trained:
            if SEARCH in settings.baselines:
                trials += [Trial(suite, SEARCH, "search", i) for i in range(settings.seeds)]
            rules = [name for name in settings.baselines if name not in (SEARCH, RANDOM)]
            trials += [Trial(suite, name, "rule", 0) for name in rules]
            trials += [Trial(suite, RANDOM, "random", 0)] * (RANDOM in settings.baselines)
        return trials

    def versions(self) -> dict[str, str]:
        """Version of every suite."""
        return {name: suite.version for name, suite in self.suites.items()}


def _agent_values(name: str, agent: str | dict[str, Any]) -> dict[str, Any]:
    """Return an agent's settings, of its file or its entry."""
    if isinstance(agent, str):
        values = read_yaml(config_path("agent", agent))
    elif "updates" in agent:
        raise ConfigError(
            f"`updates` of agent {name} follows from the benchmark's `episodes`, got "
            f"{agent['updates']}; leave it out"
        )
    else:
        values = dict(agent)
    if isinstance(values.get("kind"), str) and is_user_code(values["kind"]):
        values["kind"] = absolute(values["kind"])
    return values


def load_benchmark(name: str, overrides: Sequence[str] = ()) -> Benchmark:
    """Read a benchmark by bare name (of the shipped ones) or path.

    Args:
        name: Such as `digits-quick`, or the path of a YAML file.
        overrides: `KEY=VALUE`, put into the file's values.

    Raises:
        ConfigError: The file or a value cannot be used.
    """
    values = read_yaml(config_path("benchmark", name))
    for override in map(assignment, overrides):
        _open_agent(values, override[1])
        assign(values, [override])
    return Benchmark(validate(BenchmarkSettings, values, ""))


def _open_agent(values: Mapping[str, Any], key: Sequence[str]) -> None:
    """Put the settings of an agent in the place of their file's name, where one is to be set."""
    match key:
        case ["agents", name, "agent", _, *_]:
            entry = values.get("agents", {}).get(name)
            if isinstance(entry, dict) and isinstance(entry.get("agent"), str):
                entry["agent"] = read_yaml(config_path("agent", entry["agent"]))
                entry["agent"].pop("updates", None)  # follows from the benchmark's episodes
