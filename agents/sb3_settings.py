"""Settings of the agents of stable-baselines3 and sb3-contrib.

Rates are per gradient step; what an agent does not list is SB3's default. docs/algorithms.md says
what each is called there. Nothing here needs SB3.
"""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from asg_env.config import EnvSettings
from asg_env.validation import ConfigError, Settings

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class SB3Settings(Settings):
    """What all of them have."""

    box_only: ClassVar[bool] = False  # whether the action must be real numbers

    kind: str
    updates: Count = 30
    episodes_per_update: Annotated[int, Field(ge=2)] = 32  # more where some diverge early
    environments: Count = 8  # run side by side, whatever train.workers is
    policy_lr: Positive
    normalise_observations: bool = False  # by a running mean and variance, as VecNormalize
    evaluate_every: Count | None = None  # [updates], on train instances
    keep_every: Count | None = None  # [updates], a model that later ones do not replace

    @model_validator(mode="after")
    def _check_environments(self) -> Self:
        if self.episodes_per_update % self.environments:
            raise ValueError(
                f"`episodes_per_update` must be a multiple of environments ({self.environments}), "
                f"got {self.episodes_per_update}; change one of them"
            )
        return self

    @property
    def episodes(self) -> int:
        """Training episodes in all, as far as none diverges."""
        return self.updates * self.episodes_per_update

    def steps_per_update(self, env: EnvSettings) -> int:
        """Env steps of each environment in one update."""
        return len(env.windows()) * self.episodes_per_update // self.environments

    def check(self, env: EnvSettings) -> None:
        """Find out whether this agent can be trained on an environment.

        Raises:
            ConfigError: It cannot.
        """
        if self.box_only and env.action != "box":
            raise ConfigError(
                f"`env.action` must be box for the agent {self.kind}, got {env.action}; "
                "set env.action=box"
            )

    def _check_divides(self, name: str, env: EnvSettings) -> None:
        value, steps = getattr(self, name), self.steps_per_update(env)
        if steps % value:
            raise ConfigError(
                f"`agent.{name}` must divide the {steps} env steps of each environment in an "
                f"update, got {value}; set agent.{name}"
            )

    def arguments(self, steps: int) -> dict[str, Any]:
        """Keyword arguments of the SB3 algorithm.

        Args:
            steps: Env steps of each environment in one update.
        """
        raise NotImplementedError

    def policy_arguments(self) -> dict[str, Any]:
        """Keyword arguments of the SB3 policy, the network."""
        raise NotImplementedError

    def normaliser_arguments(self) -> dict[str, Any] | None:
        """Keyword arguments of SB3's VecNormalize; None: nothing is normalised."""
        if not self.normalise_observations:
            return None
        return {"norm_obs": True, "norm_reward": False}


class GradientSettings(SB3Settings):
    """What all but ARS have."""

    hidden_size: Count = 64  # units in each of two layers, of actor and critic alike
    discount: Share  # per env step
    normalise_rewards: bool = False  # by the running deviation of the discounted return

    def policy_arguments(self) -> dict[str, Any]:
        """Two hidden layers."""
        return {"net_arch": [self.hidden_size] * 2}

    def normaliser_arguments(self) -> dict[str, Any] | None:
        """Observations, rewards or both."""
        if not (self.normalise_observations or self.normalise_rewards):
            return None
        return {
            "norm_obs": self.normalise_observations,
            "norm_reward": self.normalise_rewards,
            "gamma": self.discount,
        }


class OnPolicySettings(GradientSettings):
    """What PPO, RecurrentPPO, A2C and TRPO have."""

    discount: Share = 1.0
    gae_lambda: Share = 0.95

    def arguments(self, steps: int) -> dict[str, Any]:
        """One rollout in each update."""
        return {
            "learning_rate": self.policy_lr,
            "n_steps": steps,
            "gamma": self.discount,
            "gae_lambda": self.gae_lambda,
        }


class ClippedSettings(OnPolicySettings):
    """What PPO and RecurrentPPO have."""

    policy_lr: Positive = 1e-3
    entropy: Annotated[float, Field(ge=0)] = 0.002  # bonus per nat, summed over layer groups
    passes: Count = 4  # over each update's env steps
    minibatch_size: Annotated[int, Field(ge=2)] = 120  # [env steps]
    clip_ratio: Positive = 0.2

    def arguments(self, steps: int) -> dict[str, Any]:
        """Passes over the rollout in minibatches."""
        return {
            **super().arguments(steps),
            "batch_size": self.minibatch_size,
            "n_epochs": self.passes,
            "clip_range": self.clip_ratio,
            "ent_coef": self.entropy,
        }


class PPOSettings(ClippedSettings):
    """`agent:` of an experiment file, for `kind: ppo`."""

    kind: Literal["ppo"] = "ppo"


class RecurrentPPOSettings(ClippedSettings):
    """`agent:` of an experiment file, for `kind: recurrent-ppo`."""

    kind: Literal["recurrent-ppo"] = "recurrent-ppo"
    lstm_size: Count = 64  # units of the LSTM before the hidden layers, of actor and critic each

    def policy_arguments(self) -> dict[str, Any]:
        """An LSTM, then two hidden layers."""
        return {**super().policy_arguments(), "lstm_hidden_size": self.lstm_size}


class A2CSettings(OnPolicySettings):
    """`agent:` of an experiment file, for `kind: a2c`."""

    kind: Literal["a2c"] = "a2c"
    policy_lr: Positive = 1e-3  # of RMSprop
    entropy: Annotated[float, Field(ge=0)] = 0.002  # bonus per nat, summed over layer groups
    rollout_steps: Count = 15  # [env steps] of each environment before every gradient step
    normalise_advantages: bool = True  # rewards here are far below 1

    def check(self, env: EnvSettings) -> None:
        """An update must be whole rollouts; see SB3Settings.check."""
        super().check(env)
        self._check_divides("rollout_steps", env)

    def arguments(self, steps: int) -> dict[str, Any]:
        """Many rollouts in each update, one gradient step after each."""
        return {
            **super().arguments(self.rollout_steps),
            "ent_coef": self.entropy,
            "normalize_advantage": self.normalise_advantages,
        }


class TRPOSettings(OnPolicySettings):
    """`agent:` of an experiment file, for `kind: trpo`."""

    kind: Literal["trpo"] = "trpo"
    policy_lr: Positive = 1e-3  # of the critic; the actor's step follows from max_kl
    max_kl: Positive = 0.01  # [nats] between the policies before and after an update
    critic_passes: Count = 10  # over each update's env steps
    minibatch_size: Annotated[int, Field(ge=2)] = 120  # [env steps], of the critic

    def arguments(self, steps: int) -> dict[str, Any]:
        """One step of the actor in each update, many of the critic."""
        return {
            **super().arguments(steps),
            "batch_size": self.minibatch_size,
            "target_kl": self.max_kl,
            "n_critic_updates": self.critic_passes,
        }


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
