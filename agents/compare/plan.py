"""The rows of `asg compare`: what is compared, read from YAML and checked before anything runs."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from agents.baselines import Controller
from agents.fit import LiveController
from agents.policy import Policy
from agents.protocol import acts_greedily, check_same_problem, reads_real_labels, reward_in_words
from agents.rules import RULES
from agents.run_folder import RunFolder
from agents.train import load_policies
from asg_env.config import EnvSettings
from asg_env.core.trainer import Trainer
from asg_env.task_settings import settings_class
from asg_env.user_code import absolute, is_user_code, load, text_of
from asg_env.validation import ConfigError, Settings, validate

Figure = Literal["accuracy", "retention", "hse_0", "hse_1", "hse_2"]
CONTROLLER = "controller"  # name of the first run's row
# Settings that a row may have for itself: how it trains. What it trains on, for how long, and how
# it is judged are the same for all.
OWN_SETTINGS = (
    "optimizer",
    "momentum",
    "momentum_form",
    "weight_decay",
    "base_lr",
    "lr_factor",
    "augmentation",
    "precision",
    "compile",
    "deterministic",
)


def _controller_name(number: int) -> str:
    return CONTROLLER if number == 0 else f"{CONTROLLER} {number + 1}"


def file_name(row: str) -> str:
    """Return what a row's file is called, without its ending."""
    return "".join(c if c.isalnum() else "-" for c in row.lower())


class RowSettings(Settings):
    """One row of the file of rows; docs/guidance.md explains each key."""

    name: str
    paper: int | None = None  # its number in the original's table
    rule: str = "uniform"  # of agents.rules.RULES, or FILE.py:NAME
    options: dict[str, Any] = {}  # of the rule
    rate: Annotated[float, Field(ge=0)] | Literal["shared"] | None = None
    share_rate: bool = False
    guidance: dict[str, Any] | None = None  # the environment's own if left out
    env: dict[str, Any] = {}  # further settings, of `OWN_SETTINGS`
    tune: dict[str, list[Annotated[float, Field(ge=0)]]] = {}  # one key: `rate` or a guidance term


class ClaimSettings(Settings):
    """A statement that one row is above another, to be tested."""

    claim: str
    original: bool = False  # what the original's table says
    figure: Figure
    better: str
    worse: str


class ComparisonSettings(Settings):
    """The file of rows."""

    rows: Annotated[list[RowSettings], Field(min_length=1)]
    claims: list[ClaimSettings] = []


@dataclass(frozen=True)
class Method:
    """One way to train, ready to be sent to a worker.

    Attributes:
        settings: Of environment and trainer, guidance included.
        rule: What sets the multipliers: a name in `RULES` or FILE.py:NAME; "" for a policy.
        rate: The rule's `top`.
        options: Of the rule.
        policy: A trained policy, in the place of a rule.
        greedy: How the policy acts.
    """

    settings: EnvSettings
    rule: str
    rate: float
    options: Mapping[str, Any]
    policy: Policy | None = None
    greedy: bool = False

    def controller(self, trainer: Trainer) -> Controller:
        """Build what sets the multipliers of one training.

        Raises:
            ConfigError: The rule does not take these options.
        """
        if self.policy is not None:
            return LiveController(self.policy, self.settings, trainer, self.greedy)
        build = load(self.rule) if is_user_code(self.rule) else RULES[self.rule]
        try:
            made: Controller = build(len(trainer.layer_groups), self.rate, **self.options)
        except TypeError as error:
            raise ConfigError(
                f"`options` must fit the rule {self.rule}, got {dict(self.options)}: {error}"
            ) from None
        return made


@dataclass(frozen=True)
class Row:
    """One line of the table before it is run.

    Attributes:
        name: What it is called.
        paper: Its number in the original's table.
        candidates: Setting to method; one of them is chosen on train instances.
        seeds: Of a controller, its methods by training seed; then nothing is chosen.
        reward: Of a controller, what it was trained on.
        real_labels: Whether that reward read labels of real images.
        checkpoints: Digest of what it was loaded from.
    """

    name: str
    paper: int | None
    candidates: Mapping[str, Method]
    seeds: tuple[Method, ...] = ()
    reward: str = ""
    real_labels: bool = False
    checkpoints: str = ""


class Plan:
    """All rows of a comparison on one task, in the order in which they can be run."""

    def __init__(
        self, task: str, env: EnvSettings, wanted: ComparisonSettings, runs: Sequence[Path]
    ) -> None:
        """Check every row.

        Raises:
            ConfigError: A row, its settings or a controller's run cannot be used.
        """
        self.task, self.env, self.wanted = task, env, wanted
        names = [row.name for row in wanted.rows]
        reserved = [_controller_name(number) for number in range(max(1, len(runs)))]
        names_of = {file_name(name): name for name in reserved}
        for name in names:
            if file_name(name) in names_of:
                raise ConfigError(
                    f"`rows` must have names that differ in letters or digits, and none is "
                    f"'{CONTROLLER}', got '{names_of[file_name(name)]}' and '{name}'; rename one"
                )
            names_of[file_name(name)] = name
        sharing = [row for row in wanted.rows if row.share_rate]
        if len(sharing) > 1 or (sharing and "rate" not in sharing[0].tune):
            raise ConfigError(
                "`rows` must have at most one with share_rate, which tunes `rate`; mend the file"
            )
        if not sharing and any(row.rate == "shared" for row in wanted.rows):
            raise ConfigError("`rows` with rate: shared need a row with share_rate; add it")
        # Checked with any rate: a bad row is found now, not after an hour.
        for row in wanted.rows:
            self.row(row, shared=1.0)
        self.controllers = [self._controller(path, number) for number, path in enumerate(runs)]
        known = {*names, *map(_controller_name, range(9))}
        for claim in wanted.claims:
            for name in (claim.better, claim.worse):
                if name not in known:
                    raise ConfigError(f"`claims` must name rows of the file, got '{name}'; add it")

    def ordered(self) -> list[RowSettings]:
        """Return the rows, the one that shares its rate first."""
        return sorted(self.wanted.rows, key=lambda row: not row.share_rate)

    def row(self, wanted: RowSettings, shared: float) -> Row:
        """Return a row with its candidates.

        Args:
            wanted: The row of the file.
            shared: Rate in the place of `rate: shared`.

        Raises:
            ConfigError: Its rule, rate, settings or candidates cannot be used.
        """
        where = f"rows.{wanted.name}"
        if not is_user_code(wanted.rule) and wanted.rule not in RULES:
            raise ConfigError(
                f"`{where}.rule` must be one of {', '.join(RULES)}, or FILE.py:NAME, got "
                f"'{wanted.rule}'; set it so"
            )
        if is_user_code(wanted.rule):
            try:
                load(wanted.rule)
            except ValueError as error:
                raise ConfigError(f"`{where}.rule` {error}; mend it") from None
        if len(wanted.tune) > 1 or any(not values for values in wanted.tune.values()):
            raise ConfigError(f"`{where}.tune` must hold one coefficient with candidates; mend it")
        if any(len(set(values)) < len(values) for values in wanted.tune.values()):
            raise ConfigError(f"`{where}.tune` must hold different candidates; mend it")
        if wanted.rule == "pilot-search" and (wanted.rate is not None or "rate" in wanted.tune):
            raise ConfigError(f"`{where}.rate` is not used by pilot-search; leave it out")
        if ("rate" in wanted.tune) == (wanted.rate is not None) and wanted.rule != "pilot-search":
            raise ConfigError(f"`{where}.rate` must be given or tuned, and not both; mend it")
        foreign = sorted(set(wanted.env) - set(OWN_SETTINGS))
        if foreign:
            raise ConfigError(
                f"`{where}.env` must hold settings of {', '.join(OWN_SETTINGS)}, got "
                f"'{foreign[0]}'; give what is the same for all rows with --set"
            )
        rule = absolute(wanted.rule) if is_user_code(wanted.rule) else wanted.rule
        rate = shared if wanted.rate == "shared" else wanted.rate or 0.0
        candidates = {}
        for key, values in wanted.tune.items() or {"": [0.0]}.items():
            for value in values:
                settings = self._settings(wanted, where, key, value)
                top = value if key == "rate" else float(rate)
                name = f"{key} {value:g}" if key else f"rate {top:g}"
                if wanted.rate == "shared" and key:
                    name += f", rate {top:g}"
                candidates[name] = Method(settings, rule, top, wanted.options)
        return Row(wanted.name, wanted.paper, candidates)

    def _settings(self, wanted: RowSettings, where: str, key: str, value: float) -> EnvSettings:
        values = self.env.model_dump(exclude_none=True) | wanted.env
        if wanted.guidance is not None:
            values = {k: v for k, v in values.items() if k != "kl_weight"}
            values["guidance"] = wanted.guidance
        if key not in ("", "rate"):
            values = {k: v for k, v in values.items() if k != "kl_weight"}
            others = wanted.guidance or {}
            # Options such as a cap are the row's, or else the environment's.
            entry = others.get(key, (self.env.guidance or {}).get(key))
            options = entry if isinstance(entry, dict) else {}
            values["guidance"] = {**others, key: {**options, "weight": value}}
        return validate(settings_class(self.task), values, where)

    def _controller(self, path: Path, number: int) -> Row:
        run = RunFolder.open(path)
        experiment = run.experiment
        if experiment.task != self.task:
            raise ConfigError(
                f"--controller {path} was trained on {experiment.task}, got {self.task}; give one "
                "that was trained on this task"
            )
        check_same_problem(f"--controller {path}", experiment.env, self.env)
        greedy = acts_greedily(run)
        methods = tuple(
            Method(experiment.env, "", 0.0, {}, policy, greedy) for policy in load_policies(run)
        )
        digest = hashlib.sha256(experiment.digest().encode())
        for index in range(experiment.train.seeds):
            name = experiment.agent_module.CHECKPOINT
            digest.update((run.seed_folder(index) / "checkpoints" / name).read_bytes())
        reward = reward_in_words(experiment)
        return Row(
            _controller_name(number),
            9 if number == 0 else None,
            {},
            methods,
            f"{path.name}, {'greedy' if greedy else 'sampled'}, reward {reward}",
            reads_real_labels(experiment),
            digest.hexdigest(),
        )

    def digest(self) -> str:
        """SHA-256 of what rows are made of: files of the user's and checkpoints by their bytes."""
        named = [self.env.guidance or {}]
        named += [{row.rule: 0, **(row.guidance or {}), **row.tune} for row in self.wanted.rows]
        code = {name: text_of(name) for names in named for name in names if is_user_code(name)}
        values = {
            "code": code,
            "task": self.task,
            "env": self.env.model_dump(mode="json"),
            "rows": [row.model_dump(mode="json") for row in self.wanted.rows],
            "controllers": [[row.name, row.reward, row.checkpoints] for row in self.controllers],
        }
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()
