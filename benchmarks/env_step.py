"""Environment against a bare loop with the same validation passes; then worker scaling.

    python -m benchmarks.env_step --out env_step.json

The bare loop trains the same network on the same batches and runs the same forward passes over
outer_valid after every window. The second figure is rollouts per second of two worker processes
over one, the two pools taking turns.
"""

import argparse
import statistics
import time
from collections.abc import Iterator

import torch

from agents.baselines import uniform
from agents.rollout import RolloutPool, run_controller
from asg_env.build import build_trainer
from asg_env.config import EnvSettings
from asg_env.env import LayerwiseLREnv
from asg_env.instances import Instance
from benchmarks.inner_step import MULTIPLIER, TASK, BareLoop
from benchmarks.timing import interleave, write_json


def environment_episode(env: LayerwiseLREnv, instance: Instance) -> Iterator[None]:
    """One whole episode through the environment, at multipliers set directly."""
    env.reset(options={"instance": instance})
    yield
    multipliers = (MULTIPLIER,) * len(env.trainer.layer_groups)
    terminated = False
    while not terminated:
        _, _, terminated, _, _ = env.step_multipliers(multipliers)
        yield


def worker_scaling(settings: EnvSettings, repeats: int, episodes: int) -> list[float]:
    """Ratios of rollouts per second: two workers over one, pair by pair."""
    job = (uniform(MULTIPLIER, 5), Instance(TASK, 1, 2))
    ratios = []
    with RolloutPool(TASK, settings, 1) as one, RolloutPool(TASK, settings, 2) as two:
        for pool in (one, two):
            list(pool.map(run_controller, [job] * 4))
        for _ in range(repeats):
            seconds = []
            for pool in (one, two):
                began = time.perf_counter()
                list(pool.map(run_controller, [job] * episodes))
                seconds.append(time.perf_counter() - began)
            ratios.append(seconds[0] / seconds[1])
    return ratios


def main() -> None:
    """Measure and print both ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--episodes", type=int, default=16, help="per pool and scaling pair")
    parser.add_argument("--out", default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    settings = EnvSettings()
    env = LayerwiseLREnv(TASK, settings)
    instance = Instance(TASK, head_seed=1, data_seed=2)
    loop = BareLoop(build_trainer(TASK, settings))  # a network of its own
    ours, bare = interleave(
        (
            lambda: environment_episode(env, instance),
            lambda: loop.run(settings.windows(), validate=True),
        ),
        arguments.repeats,
    )
    ratio = statistics.median(a / b for a, b in zip(ours, bare, strict=True))
    print(
        f"environment {statistics.median(ours):.3f} s an episode, bare loop with the same "
        f"validation {statistics.median(bare):.3f} s; ratio {ratio:.3f} (median of "
        f"{arguments.repeats} interleaved pairs)"
    )
    ratios = worker_scaling(settings, max(3, arguments.repeats // 3), arguments.episodes)
    print(
        f"two workers over one: {statistics.median(ratios):.2f} times the rollouts a second "
        f"(from {min(ratios):.2f} to {max(ratios):.2f} in {len(ratios)} pairs)"
    )
    write_json(
        arguments.out,
        {
            "environment_s": ours,
            "bare_s": bare,
            "ratio": ratio,
            "clock": "process_time",
            "two_workers_over_one": ratios,
        },
    )


if __name__ == "__main__":
    main()
