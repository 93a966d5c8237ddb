"""PPO over whole sequences against sb3-contrib's RecurrentPPO: env steps per second, side by side.

    python -m benchmarks.sequence_ppo                            # a minute and a half
    python -m benchmarks.sequence_ppo --out sequence_ppo.json

The environment costs nothing: it has the spaces of `ASG/Digits-v0`, hands out rows drawn before,
and ends after 15 steps. What is left is the agents' own work. Both take as many env steps in an
update, as many passes over them and as many env steps in a minibatch, on one torch thread, with the
same rate and loss weights. They take turns update by update, after one that is not timed; the
clock is the process's, so what other programs take of the processor does not count.

Acting is everything from the drawing of instances to finished episodes: ours through `run_policy`
in a pool without workers, one observation at a time, as training acts; RecurrentPPO's through its
`collect_rollouts`, on 1 environment and on the 8 that `kind: recurrent-ppo` runs side by side.
Updating is `SequencePPO.update` and `RecurrentPPO.train`.

The same network size means two things:

- parameters: RecurrentPPO has one LSTM for actor and critic, no further layer, and the LSTM size at
  which its number of parameters is nearest to ours;
- hidden size: the same, but with our LSTM size. It has more parameters then, as one row of its
  LSTM holds all layer groups' entries; ours puts each group's own through the same weights.

All this is the cheapest that RecurrentPPO can do. By default it has an LSTM for actor and critic
each.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, Protocol

import gymnasium as gym
import numpy as np
import torch
from sb3_contrib import RecurrentPPO
from stable_baselines3.common.vec_env import DummyVecEnv

from agents.episodic import draw_instances, rollout_jobs
from agents.recurrent_policy import layout_of
from agents.rollout import Episode, WorkerPool, run_policy
from agents.sb3.algorithms import Spaces, spaces_of
from agents.sequence_ppo import SequencePPO, SequencePPOSettings
from asg_env.config import EnvSettings
from benchmarks.timing import write_json

TASK = "ASG/Digits-v0"
HORIZON = 15  # env steps of an episode
ENVIRONMENTS = (1, 8)  # of RecurrentPPO
PARTS = ("acting", "updating", "together")
TARGET = 3.0  # times the env steps per second of RecurrentPPO


def width_of(both: Spaces) -> int:
    """Entries of an observation."""
    shape = both[0].shape
    assert shape is not None
    return shape[0]


class FreeEnv(gym.Env[Any, Any]):
    """Rows drawn before, a reward for action 2 of the first group, 15 steps.

    Args:
        both: Observation and action space.
        records: Whether steps report what `run_policy` records. RecurrentPPO's vector of
            environments would copy it.
    """

    def __init__(self, both: Spaces, records: bool) -> None:
        self.observation_space, self.action_space = both
        draws = np.random.default_rng(0)
        self._rows = draws.random((HORIZON + 1, width_of(both)), dtype=np.float32)
        self._step = 0
        total = SimpleNamespace(total_steps=HORIZON)
        self.trainer = SimpleNamespace(inner_step=0, settings=total, images_evaluated=0)
        self.settings = SimpleNamespace(metric="accuracy")
        self.images_per_measurement = 0
        self._record = {
            "lr_multipliers": np.ones(1),
            "loss/ce": 0.0,
            "loss/kl": 0.0,
            "accuracy/outer_valid": 0.0,
            "diverged": False,
            "inner_step": HORIZON,
        }
        self._info: dict[str, Any] = self._record if records else {}

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin again."""
        self._step = self.trainer.inner_step = 0
        return self._rows[0], self._info

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Take the next row."""
        self._step += 1
        self.trainer.inner_step = self._step
        ended = self._step == HORIZON
        return self._rows[self._step], float(action[0] == 2), ended, False, self._info


class Contender(Protocol):
    """An agent on free environments, update by update."""

    name: str
    parameters: int

    def act(self) -> None:
        """Collect the env steps of an update."""
        ...

    def update(self) -> None:
        """Learn from them."""
        ...


class Ours:
    """PPO over whole sequences, as `SequencePPO.train` drives it without workers."""

    def __init__(self, env: EnvSettings, settings: SequencePPOSettings) -> None:
        self.name = f"sequence-ppo, LSTM {settings.hidden_size}"
        self._algorithm = SequencePPO(layout_of(TASK, env), settings, seed=0)
        self._pool = WorkerPool(0, FreeEnv, (spaces_of(TASK, env), True))
        self._updates = 0
        self._episodes: list[Episode] = []
        network = self._algorithm.policy.network
        assert isinstance(network, torch.nn.Module)
        self.parameters = sum(p.numel() for p in network.parameters())

    def act(self) -> None:
        """Run an episode of an instance each, one observation at a time."""
        count = self._algorithm.settings.episodes_per_update
        drawn = draw_instances(0, self._updates, TASK, "unknown-scale", count)
        jobs = rollout_jobs(self._algorithm.policy, 0, self._updates, drawn, rollouts=1)
        self._episodes = list(self._pool.map(run_policy, jobs))

    def update(self) -> None:
        """Take the gradient steps."""
        self._algorithm.update(self._episodes, self._updates)
        self._updates += 1


class Theirs:
    """RecurrentPPO with an LSTM that actor and critic share, and no further layer."""

    def __init__(
        self, env: EnvSettings, settings: SequencePPOSettings, lstm: int, environments: int
    ) -> None:
        self.name = f"RecurrentPPO, LSTM {lstm}, {environments} environment" + "s" * (
            environments > 1
        )
        both = spaces_of(TASK, env)
        self._steps = settings.episodes_per_update * HORIZON // environments
        self._model = RecurrentPPO(
            "MlpLstmPolicy",
            DummyVecEnv([lambda: FreeEnv(both, records=False)] * environments),
            n_steps=self._steps,
            batch_size=settings.episodes_per_minibatch * HORIZON,
            n_epochs=settings.passes,
            learning_rate=settings.policy_lr,
            gamma=settings.discount,
            gae_lambda=settings.gae_lambda,
            clip_range=settings.clip_ratio,
            ent_coef=settings.entropy,
            vf_coef=settings.value_weight,
            max_grad_norm=settings.max_grad_norm,
            seed=0,
            device="cpu",
            policy_kwargs={
                "lstm_hidden_size": lstm,
                "shared_lstm": True,
                "enable_critic_lstm": False,
                "net_arch": [],
            },
        )
        self.parameters = sum(p.numel() for p in self._model.policy.parameters())
        total = self._steps * environments
        _, self._callback = self._model._setup_learn(total)  # what `learn` does at its start

    def act(self) -> None:
        """Step all environments at once."""
        model = self._model
        assert model.env is not None
        model.collect_rollouts(model.env, self._callback, model.rollout_buffer, self._steps)

    def update(self) -> None:
        """Take the gradient steps."""
        self._model.train()


def nearest_size(env: EnvSettings, settings: SequencePPOSettings, parameters: int) -> int:
    """LSTM size at which RecurrentPPO's number of parameters is nearest to ours."""
    sizes = range(max(1, settings.hidden_size // 2), 2 * settings.hidden_size + 1)
    return min(sizes, key=lambda size: abs(Theirs(env, settings, size, 1).parameters - parameters))


def measure(
    contenders: Sequence[Contender], repeats: int, clock: Callable[[], float] = time.process_time
) -> list[dict[str, list[float]]]:
    """Time updates of all, taking turns after one that is not timed; who begins rotates.

    Returns:
        For each contender, seconds of every update by part.
    """
    times: list[dict[str, list[float]]] = [{part: [] for part in PARTS} for _ in contenders]
    for repeat in range(repeats + 1):
        for turn in range(len(contenders)):
            index = (turn + repeat) % len(contenders)
            began = clock()
            contenders[index].act()
            acted = clock()
            contenders[index].update()
            ended = clock()
            seconds = (acted - began, ended - acted, ended - began)
            for part, value in zip(PARTS, seconds, strict=True):
                if repeat > 0:
                    times[index][part].append(value)
    return times


def times_faster(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest of their seconds over ours, pair by pair."""
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    return {"median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=21, help="timed updates of each")
    parser.add_argument("--observation", default="extended", choices=["asg", "scaled", "extended"])
    parser.add_argument("--out", default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    env = EnvSettings(observation=arguments.observation)
    settings = SequencePPOSettings()
    ours = Ours(env, settings)
    sizes = (nearest_size(env, settings, ours.parameters), settings.hidden_size)
    contenders: list[Contender] = [ours]
    contenders += [Theirs(env, settings, lstm, n) for lstm in sizes for n in ENVIRONMENTS]
    times = measure(contenders, arguments.repeats)
    frames = settings.episodes_per_update * HORIZON
    print(
        f"Updates of {frames} env steps, {settings.passes} passes, minibatches of "
        f"{settings.episodes_per_minibatch * HORIZON}; observation {arguments.observation} of "
        f"{width_of(spaces_of(TASK, env))} entries. Env steps a second, median of "
        f"{arguments.repeats} updates; ratios of pairs: median (lowest to highest).\n"
    )
    print("| agent | parameters | acting | updating | together |\n|---|---:|---:|---:|---:|")
    rows: list[dict[str, Any]] = []
    for contender, seconds in zip(contenders, times, strict=True):
        speeds = {part: frames / statistics.median(values) for part, values in seconds.items()}
        ratios = {part: times_faster(times[0][part], seconds[part]) for part in seconds}
        rows.append(
            {
                "name": contender.name,
                "parameters": contender.parameters,
                "seconds": seconds,
                "env_steps_per_second": speeds,
                "ours_over_it": ratios,
            }
        )
        shown = " | ".join(f"{speeds[part]:,.0f}" for part in PARTS)
        print(f"| {contender.name} | {contender.parameters:,} | {shown} |")
    print("\n| ours over | acting | updating | together |\n|---|---:|---:|---:|")
    for row in rows[1:]:
        shown = " | ".join(
            f"{r['median']:.2f} ({r['lowest']:.2f} to {r['highest']:.2f})"
            for r in (row["ours_over_it"][part] for part in PARTS)
        )
        print(f"| {row['name']} | {shown} |")
    print(f"target: {TARGET:g} times together")
    write_json(
        arguments.out,
        {
            "agents": rows,
            "settings": settings.model_dump(),
            "observation": arguments.observation,
            "env_steps_per_update": frames,
            "clock": "process_time",
            "target": TARGET,
        },
    )


if __name__ == "__main__":
    main()
