"""RLlib's PPO on an ASG environment.

RLlib pins a Gymnasium of its own; `docs/examples/rllib_env.sh` makes an environment for it and runs
this file there:

    docs/examples/rllib_env.sh
    docs/examples/rllib_env.sh --iterations 20 --env-runners 8

The numbers of a run depend on the number of env runners. The policy sees one observation at a time
and the baseline is a learned value function, not the mean over rollouts of the same instance.
"""

import argparse
import time
from typing import Any

import ray
from ray import tune
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig

from asg_env import env_creator

# The arguments of `gym.make`, in one mapping.
ENVIRONMENT: dict[str, Any] = {
    "id": "ASG/Digits-v0",
    "instances": "unknown-scale",
    "observation": "extended",
    "horizon": 15,  # [env steps] of an episode
}


def ppo_config(
    environment: dict[str, Any], env_runners: int = 2, episodes: int = 32, seed: int = 0
) -> PPOConfig:
    """Return PPO with smaller batches and networks than RLlib's defaults: episodes are dear.

    Args:
        environment: What `env_creator` gets.
        env_runners: Processes that run episodes; 0 runs them in this one.
        episodes: Of each iteration, more where some diverge early.
        seed: Of weights, actions and instances.
    """
    tune.register_env("asg", env_creator)
    steps = environment["horizon"] * episodes
    return (
        PPOConfig()
        .environment("asg", env_config=environment)
        .env_runners(num_env_runners=env_runners, batch_mode="complete_episodes")
        .rl_module(model_config=DefaultModelConfig(fcnet_hiddens=[64, 64]))
        .training(
            gamma=1.0,  # the return is final minus initial accuracy
            lambda_=0.95,
            lr=1e-3,
            train_batch_size_per_learner=steps,  # [env steps]
            minibatch_size=max(1, steps // 4),  # [env steps]
            num_epochs=4,
            entropy_coeff=0.002,  # per nat, summed over the layer groups
        )
        .debugging(seed=seed, log_level="ERROR")
    )


def main() -> None:
    """Train for some iterations and print what the episodes of each returned."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--iterations", type=int, default=6, help="of 32 episodes each")
    parser.add_argument("--env-runners", type=int, default=2, help="processes")
    parser.add_argument("--seed", type=int, default=0, help="of weights, actions and instances")
    args = parser.parse_args()
    ray.init(include_dashboard=False)
    begin = time.perf_counter()
    algorithm = ppo_config(ENVIRONMENT, args.env_runners, seed=args.seed).build_algo()
    for iteration in range(args.iterations):
        episodes = algorithm.train()["env_runners"]
        print(
            f"iteration {iteration + 1}: {episodes['num_episodes']:.0f} episodes, "
            f"mean return {episodes['episode_return_mean']:+.3f}, "
            f"{time.perf_counter() - begin:.0f} s",
            flush=True,
        )
    algorithm.stop()
    ray.shutdown()


if __name__ == "__main__":
    main()
