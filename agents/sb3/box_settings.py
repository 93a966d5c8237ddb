"""Settings of those agents of stable-baselines3 and sb3-contrib whose actions must be real numbers.

See agents.sb3.settings. Nothing here needs SB3.
"""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from agents.sb3.settings import Count, GradientSettings, Positive, SB3Settings, Share
from asg_env.config import EnvSettings
from asg_env.validation import ConfigError


class OffPolicySettings(GradientSettings):
    """What SAC, TD3, TQC and CrossQ have."""

    box_only: ClassVar[bool] = True

    policy_lr: Positive = 1e-3
    discount: Share = 0.99
    minibatch_size: Annotated[int, Field(ge=2)] = 256  # [env steps]
    buffer_size: Count = 50_000  # [env steps] that are remembered
    learning_starts: Annotated[int, Field(ge=0)] = 300  # [env steps] of uniform actions before
    train_freq: Count = 1  # [env steps] of each environment between trainings
    gradient_steps: Count | None = None  # of each training; None: one for every env step

    def check(self, env: EnvSettings) -> None:
        """An update must be whole chunks of collecting and training; see SB3Settings.check."""
        super().check(env)
        self._check_divides("train_freq", env)
        steps = self.steps_per_update(env) * self.environments * self.updates
        if self.learning_starts >= steps:
            raise ConfigError(
                f"`agent.learning_starts` must be < {steps}, the env steps of the whole training, "
                f"got {self.learning_starts}; set agent.learning_starts"
            )

    def arguments(self, steps: int) -> dict[str, Any]:
        """Collecting and training by turns, many times in each update."""
        return {
            "learning_rate": self.policy_lr,
            "gamma": self.discount,
            "batch_size": self.minibatch_size,
            "buffer_size": self.buffer_size,
            "learning_starts": self.learning_starts,
            "train_freq": self.train_freq,
            "gradient_steps": -1 if self.gradient_steps is None else self.gradient_steps,
        }


class EntropySettings(OffPolicySettings):
    """What SAC, TQC and CrossQ have."""

    temperature: Positive = 0.01  # [reward per nat] at the start; then learned

    def arguments(self, steps: int) -> dict[str, Any]:
        """A learned weight of the entropy."""
        return {**super().arguments(steps), "ent_coef": f"auto_{self.temperature!r}"}


class SACSettings(EntropySettings):
    """`agent:` of an experiment file, for `kind: sac`."""

    kind: Literal["sac"] = "sac"
    polyak: Annotated[float, Field(gt=0, le=1)] = (
        0.005  # share of the critic that its target takes over per gradient step
    )

    def arguments(self, steps: int) -> dict[str, Any]:
        """With a target critic."""
        return {**super().arguments(steps), "tau": self.polyak}


class TD3Settings(OffPolicySettings):
    """`agent:` of an experiment file, for `kind: td3`."""

    kind: Literal["td3"] = "td3"
    polyak: Annotated[float, Field(gt=0, le=1)] = (
        0.005  # share of each network that its target takes over per actor's step
    )
    policy_delay: Count = 2  # gradient steps of the critic for one of the actor
    action_noise: Annotated[float, Field(ge=0)] = 0.2  # deviation, of actions in -1 to 1

    def arguments(self, steps: int) -> dict[str, Any]:
        """With target networks and a slower actor; whoever builds it adds the noise."""
        return {
            **super().arguments(steps),
            "tau": self.polyak,
            "policy_delay": self.policy_delay,
        }


class TQCSettings(EntropySettings):
    """`agent:` of an experiment file, for `kind: tqc`."""

    kind: Literal["tqc"] = "tqc"
    polyak: Annotated[float, Field(gt=0, le=1)] = (
        0.005  # share of the critic that its target takes over per gradient step
    )
    quantiles_dropped: Annotated[int, Field(ge=0, le=24)] = 2  # the highest, of 25 per critic

    def arguments(self, steps: int) -> dict[str, Any]:
        """With a target critic that drops its highest quantiles."""
        return {
            **super().arguments(steps),
            "tau": self.polyak,
            "top_quantiles_to_drop_per_net": self.quantiles_dropped,
        }


class CrossQSettings(EntropySettings):
    """`agent:` of an experiment file, for `kind: crossq`."""

    kind: Literal["crossq"] = "crossq"
    policy_delay: Count = 3  # gradient steps of the critic for one of the actor

    def arguments(self, steps: int) -> dict[str, Any]:
        """With batch normalisation in the place of target networks."""
        return {**super().arguments(steps), "policy_delay": self.policy_delay}


class ARSSettings(SB3Settings):
    """`agent:` of an experiment file, for `kind: ars`.

    An update tries `episodes_per_update / (2 * episodes_per_candidate)` directions, forwards and
    backwards. The environments share the episodes of one candidate.
    """

    box_only: ClassVar[bool] = True

    kind: Literal["ars"] = "ars"
    environments: Count = 2
    episodes_per_candidate: Count = 2
    kept_directions: Count | None = None  # the best, that a step follows; None: all
    policy_lr: Positive = 0.1
    noise: Positive = 0.1  # deviation of a candidate's weights
    hidden_size: Annotated[int, Field(ge=0)] = 0  # units in each of two layers; 0: a linear policy
    normalise_observations: bool = True

    @model_validator(mode="after")
    def _check_candidates(self) -> Self:
        if self.episodes_per_candidate % self.environments:
            raise ValueError(
                "`episodes_per_candidate` must be a multiple of environments "
                f"({self.environments}), got {self.episodes_per_candidate}; change one of them"
            )
        if self.episodes_per_update % (2 * self.episodes_per_candidate):
            raise ValueError(
                "`episodes_per_update` must be a multiple of 2 * episodes_per_candidate "
                f"({2 * self.episodes_per_candidate}), got {self.episodes_per_update}; "
                "change one of them"
            )
        if self.kept_directions is not None and self.kept_directions > self.directions:
            raise ValueError(
                f"`kept_directions` must be <= {self.directions}, the directions of an update, "
                f"got {self.kept_directions}; lower it or leave it out"
            )
        return self

    @property
    def directions(self) -> int:
        """Directions in weight space that an update tries."""
        return self.episodes_per_update // (2 * self.episodes_per_candidate)

    def arguments(self, steps: int) -> dict[str, Any]:
        """One step of the search in each update."""
        return {
            "n_delta": self.directions,
            "n_top": self.kept_directions,
            "n_eval_episodes": self.episodes_per_candidate,
            "learning_rate": self.policy_lr,
            "delta_std": self.noise,
            "zero_policy": self.hidden_size == 0,
        }

    def policy_arguments(self) -> dict[str, Any]:
        """A bias in every layer, and tanh at the end."""
        return {"net_arch": [self.hidden_size] * 2 if self.hidden_size else []}
