"""An agent in one file, to copy and make your own: REINFORCE with a recurrent policy.

It imports gymnasium, numpy and torch. `asg_env` has to be installed and nothing of it is imported
here: Gymnasium does that, because of the part before the colon in `env_id`.

    python docs/examples/reinforce_single_file.py
    python docs/examples/reinforce_single_file.py --seed 1 --updates 30

An episode is one training run of a small network. At each of its steps the agent moves the learning
rate of every layer group one level down, leaves it, or moves it one level up, and is rewarded with
the gain in accuracy on real validation images. What is done about the noise of training runs:

1. Several rollouts of the same instance (same head, same data, same hidden rate factor) start from
   the same seed; the return-to-go less its mean over them is what the actions made of it.
2. A few gradient steps on each batch of rollouts, with the probability ratio clipped as in PPO.
3. The rollouts of an instance run in processes of their own, beside one another.

The same arguments print the same numbers, on one machine and one version of torch.
"""

import argparse
import math
import time
from dataclasses import dataclass, fields

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Categorical

EVALUATION_SEEDS = 2**31  # training draws its seeds below, evaluation counts from here


@dataclass(frozen=True)
class Args:
    """The arguments, each with its unit; `--help` shows the defaults."""

    seed: int = 0  # of the first weights, the actions and the instances trained on
    env_id: str = "asg_env:ASG/Digits-v0"  # module to import : environment id
    instances: str = "unknown-scale"  # the base rate carries a hidden factor of 0.1 to 10
    horizon: int = 15  # [env steps] of an episode
    inner_steps: int = 10  # [training steps of the network] of an env step
    updates: int = 12
    instances_per_update: int = 4
    rollouts: int = 8  # of each instance; also the number of worker processes
    hidden_size: int = 32  # of the recurrent state
    policy_lr: float = 0.01
    passes: int = 4  # [gradient steps] on each batch of rollouts
    clip: float = 0.2  # of the probability ratio
    entropy: float = 0.01  # bonus per nat at the first update, falls to 0 at the last
    max_grad_norm: float = 1.0
    eval_episodes: int = 24  # of each evaluation, rounded up to whole batches of `rollouts`


def parse_args() -> Args:
    """Read the arguments from the command line: one option for each field of `Args`."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for field in fields(Args):
        option, kind = "--" + field.name.replace("_", "-"), type(field.default)
        parser.add_argument(option, type=kind, default=field.default, help=kind.__name__)
    return Args(**vars(parser.parse_args()))


def make_envs(args: Args, split: str) -> gym.vector.VectorEnv:
    """Start `rollouts` copies of the environment, each in a process of its own.

    Args:
        args: Every argument of the environment is in docs/environment.md; add what you need.
        split: `train` or `test`: which instances they draw, never which images the reward reads.
    """
    return gym.make_vec(
        args.env_id,
        num_envs=args.rollouts,
        vectorization_mode="async",
        instances=args.instances,
        split=split,
        observation="extended",
        horizon=args.horizon,
        inner_steps=args.inner_steps,
    )


class Policy(nn.Module):
    """A GRU that reads the observations, and one action head per layer group."""

    def __init__(self, envs: gym.vector.VectorEnv, hidden_size: int) -> None:
        super().__init__()
        observation, action = envs.single_observation_space, envs.single_action_space
        assert isinstance(observation, gym.spaces.Box)
        assert isinstance(action, gym.spaces.MultiDiscrete), "the other spaces need other heads"
        (inputs,) = observation.shape
        self.memory = nn.GRU(inputs, hidden_size)
        heads = [nn.Linear(inputs + hidden_size, int(choices)) for choices in action.nvec]
        for head in heads:  # near-uniform first actions
            nn.init.orthogonal_(head.weight, 0.01)
            nn.init.zeros_(head.bias)
        self.heads = nn.ModuleList(heads)

    def forward(self, observations: Tensor, state: Tensor | None) -> tuple[Categorical, Tensor]:
        """Map observations (T, E, D) to choices of batch shape (T, E, G), and the state after."""
        remembered, state = self.memory(observations, state)
        seen = torch.cat((remembered, observations), dim=-1)
        return Categorical(logits=torch.stack([head(seen) for head in self.heads], -2)), state


@dataclass(frozen=True)
class Rollouts:
    """T env steps of E episodes, side by side."""

    observations: Tensor  # float32, (T, E, D)
    actions: Tensor  # int64, (T, E, G)
    rewards: Tensor  # float64, (T, E); 0 after the end of an episode
    running: Tensor  # float64, (T, E); 1 until the end of an episode, 0 after it
    accuracy: Tensor  # float64, (T, E), on real validation images; stays after the end


def collect(
    envs: gym.vector.VectorEnv,
    policy: Policy | None,
    seeds: list[int],
    horizon: int,
    greedy: bool = False,
) -> Rollouts:
    """Run one episode for each seed; without a policy every rate stays where it is.

    Where a training diverges the episode ends early. The vector environment then starts another
    one in its place, which is not counted.

    Args:
        envs: N environments.
        policy: Chooses the actions.
        seeds: A multiple of N of them; the same seed is the same instance.
        horizon: T, env steps of an episode.
        greedy: Take the likeliest actions instead of drawing them.
    """
    batches = []
    for first in range(0, len(seeds), envs.num_envs):
        batch_seeds = seeds[first : first + envs.num_envs]
        observation, _ = envs.reset(seed=batch_seeds)  # type: ignore[arg-type]  # takes lists too
        state, steps = None, []
        running, accuracy = np.ones(envs.num_envs, bool), np.zeros(envs.num_envs)
        for _ in range(horizon):
            seen = torch.from_numpy(observation)
            action = torch.ones(envs.action_space.shape or (), dtype=torch.int64)  # 1 is stay
            if policy is not None:
                with torch.no_grad():
                    choices, state = policy(seen[None], state)
                action = (choices.probs.argmax(-1) if greedy else choices.sample())[0]
            observation, reward, terminated, truncated, info = envs.step(action.numpy())
            accuracy = np.where(running, info["accuracy/outer_valid"], accuracy)
            outcome = np.stack([reward * running, running, accuracy])
            steps.append((seen, action, *torch.from_numpy(outcome)))
            running = running & ~(terminated | truncated)
        batches.append([torch.stack(column) for column in zip(*steps, strict=True)])
    return Rollouts(*(torch.cat(parts, dim=1) for parts in zip(*batches, strict=True)))


def advantages(rewards: Tensor, running: Tensor, rollouts: int) -> Tensor:
    """Return-to-go less its mean over the rollouts of the instance that run at that step.

    Divided by the standard deviation over the batch.

    Args:
        rewards: float64, shape (T, E), `rollouts` episodes of each instance after one another.
        running: float64, shape (T, E), 1 until the end of an episode.
        rollouts: Episodes of an instance.

    Returns:
        Shape (T, E), 0 after the end of an episode.
    """
    instances = (len(rewards), -1, rollouts)
    returns = rewards.flip(0).cumsum(0).flip(0).reshape(instances)
    mask = running.reshape(instances)
    baseline = (returns * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    centred = (returns - baseline) * mask
    spread = (centred.square().sum() / running.sum()).sqrt()
    return (centred / (spread + 1e-8)).reshape(rewards.shape).float()


def update(
    policy: Policy, optimizer: torch.optim.Optimizer, batch: Rollouts, args: Args, entropy: float
) -> float:
    """Take the clipped policy-gradient steps on a batch; return the entropy per group [nats]."""
    credit = advantages(batch.rewards, batch.running, args.rollouts)
    before, nats = None, torch.zeros(())
    for _ in range(args.passes):
        choices, _ = policy(batch.observations, None)
        log_prob = choices.log_prob(batch.actions).sum(-1)  # (T, E), of all groups together
        before = log_prob.detach() if before is None else before
        ratio = (log_prob - before).exp()
        clipped = ratio.clamp(1 - args.clip, 1 + args.clip)
        gain = torch.minimum(ratio * credit, clipped * credit).sum() / batch.running.sum()
        nats = (choices.entropy().mean(-1) * batch.running).sum() / batch.running.sum()
        optimizer.zero_grad()
        (-gain - entropy * nats).backward()
        nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm)
        optimizer.step()
    return nats.item()


def evaluate(
    envs: gym.vector.VectorEnv, policy: Policy | None, args: Args, greedy: bool = False
) -> str:
    """Mean final accuracy over episodes whose seeds are the same at every call, as text."""
    batches = math.ceil(args.eval_episodes / envs.num_envs)
    seeds = list(range(EVALUATION_SEEDS, EVALUATION_SEEDS + batches * envs.num_envs))
    rollouts = collect(envs, policy, seeds, args.horizon, greedy)
    return f"accuracy {rollouts.accuracy[-1].mean():.3f}"


def main() -> None:
    """Train between two evaluations, then go to instances that nobody trained on."""
    args, begin = parse_args(), time.perf_counter()
    torch.set_num_threads(1)  # the policy is small; the cores belong to the environments
    torch.manual_seed(args.seed)
    draw = np.random.default_rng(args.seed)

    envs = make_envs(args, split="train")
    policy = Policy(envs, args.hidden_size)
    optimizer = torch.optim.Adam(policy.parameters(), lr=args.policy_lr)
    print(args)
    print("train instances, rates left alone:", evaluate(envs, None, args))
    print("train instances, untrained, drawn:", evaluate(envs, policy, args))
    for index in range(args.updates):
        seeds = draw.integers(EVALUATION_SEEDS, size=args.instances_per_update)
        batch = collect(envs, policy, seeds.repeat(args.rollouts).tolist(), args.horizon)
        bonus = args.entropy * (1 - index / args.updates)
        entropy = update(policy, optimizer, batch, args, bonus)
        print(
            f"update {index + 1}: return {batch.rewards.sum(0).mean():+.3f}, "
            f"accuracy {batch.accuracy[-1].mean():.3f}, entropy {entropy:.2f} nats, "
            f"{time.perf_counter() - begin:.0f} s",
            flush=True,
        )
    print("train instances, trained, drawn:", evaluate(envs, policy, args))
    print("train instances, trained, likeliest:", evaluate(envs, policy, args, greedy=True))
    envs.close()

    envs = make_envs(args, split="test")
    print("test instances, rates left alone:", evaluate(envs, None, args))
    print("test instances, trained, likeliest:", evaluate(envs, policy, args, greedy=True))
    envs.close()
    print(f"{(time.perf_counter() - begin) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
