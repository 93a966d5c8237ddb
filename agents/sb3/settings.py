"""Settings of the agents of stable-baselines3 and sb3-contrib: what all have, and on-policy ones.

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
