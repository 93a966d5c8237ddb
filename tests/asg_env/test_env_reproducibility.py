"""Same seed, same episode: nothing before or around it changes a bit."""

import random

import numpy as np
import pytest
import torch
from gymnasium.error import ResetNeeded

from asg_env.rewards import REWARD_TERMS

DIGITS = "ASG/Digits-v0"
ACTIONS = ("grid", "relative", "box")
OBSERVATIONS = ("asg", "scaled", "extended", "normalised")
STAY = [1] * 5
EVERY_TERM = dict.fromkeys(REWARD_TERMS, 1.0)
INSTANCE = {"task": DIGITS, "head_seed": 3, "data_seed": 4, "base_lr_scale": 1.0}


@pytest.mark.parametrize("instances", ["fixed", "unknown-scale"])
@pytest.mark.parametrize("action", ACTIONS)
def test_twin_rollouts_are_identical(make_env, weights, identical, action, instances, rollout):
    twins = [
        make_env(
            action=action,
            instances=instances,
            observation="extended",
            reward=EVERY_TERM,
            base_lr=0.01,
        )
        for _ in range(2)
    ]
    twins[0].action_space.seed(0)
    actions = [twins[0].action_space.sample() for _ in range(3)]

    first, second = (rollout(twin, actions, seed=5) for twin in twins)

    assert identical(first, second)
    assert twins[0].instance == twins[1].instance
    assert identical(weights(twins[0].trainer), weights(twins[1].trainer))


def test_rollout_does_not_depend_on_the_episodes_before_it(make_env, weights, identical, rollout):
    used, fresh = make_env(optimizer="adam"), make_env(optimizer="adam")
    for seed in (1, 2):
        rollout(used, [[2] * 5] * 3, seed=seed)

    assert identical(rollout(used, seed=5), rollout(fresh, seed=5))
    assert identical(weights(used.trainer), weights(fresh.trainer))


def test_rollout_at_multipliers_one_equals_plain_training(make_env, weights, rollout):
    env = make_env(start_multiplier=1.0, kl_weight=0, base_lr=0.05)
    rollout(env, options={"instance": INSTANCE})
    trained = weights(env.trainer)

    env.reset(options={"instance": INSTANCE})
    optimizee, train = env.trainer.optimizee, env.trainer.splits["train"]
    parameters = [p for p in optimizee.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4)
    for step in range(6):
        index = env.trainer._order.indices(step)
        loss = torch.nn.functional.cross_entropy(
            optimizee(train.batch(index))[0], train.labels[index]
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    for name, tensor in optimizee.state_dict().items():
        assert torch.equal(tensor, trained[name]), name


@pytest.mark.parametrize("observation", OBSERVATIONS)
@pytest.mark.parametrize(
    "settings",
    [{}, {"momentum_form": "scaled-velocity"}, {"optimizer": "adam", "lr_factor": "warmup-poly"}],
)
def test_snapshot_and_restore_replay_mid_episode(
    make_env, weights, identical, observation, settings
):
    settings = {"observation": observation, "reward": EVERY_TERM, "render_mode": "ansi"} | settings
    env, other = make_env(**settings), make_env(**settings)
    env.reset(seed=0)
    env.step([2, 1, 0, 2, 2])
    snapshot = env.snapshot()

    def go_on(replaying):
        steps = [replaying.step(action) for action in ([2] * 5, [0, 1, 2, 1, 0])]
        return steps, weights(replaying.trainer), replaying.render()

    expected = go_on(env)
    env.reset(seed=9)
    for replaying in (env, env, other):
        replaying.restore(snapshot)
        assert identical(go_on(replaying), expected)
        assert replaying.instance == snapshot["instance"]
        with pytest.raises(ResetNeeded):
            replaying.step(STAY)


def test_snapshot_of_a_finished_episode_restores_as_finished(make_env, rollout):
    env = make_env(horizon=1)
    rollout(env, seed=0)
    snapshot = env.snapshot()
    env.reset(seed=0)

    env.restore(snapshot)

    with pytest.raises(ResetNeeded):
        env.step(STAY)


def test_snapshot_needs_a_reset(make_env):
    with pytest.raises(ResetNeeded, match="nothing to snapshot"):
        make_env().snapshot()


def test_global_generators_are_left_as_found(make_env):
    def states():
        name, keys, *rest = np.random.get_state()  # noqa: NPY002
        return random.getstate(), (name, keys.tolist(), *rest), torch.get_rng_state().tolist()

    before = states()
    env = make_env(observation="extended", reward=EVERY_TERM, render_mode="rgb_array")
    assert states() == before, "make"
    env.reset(seed=0)
    assert states() == before, "reset"
    env.step(STAY)
    env.trainer.evaluate("test")
    env.render()
    env.restore(env.snapshot())
    assert states() == before, "step"


def test_global_generators_do_not_steer_the_episode(make_env, identical, rollout):
    rollouts = []
    for seed in (1, 2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            rollouts.append(rollout(make_env(), seed=0))

    assert identical(*rollouts)


@pytest.mark.parametrize(("parent", "calls"), [(None, []), (object(), [1])])
def test_env_sets_one_thread_in_worker_processes_only(make_env, monkeypatch, parent, calls):
    seen = []
    monkeypatch.setattr("multiprocessing.parent_process", lambda: parent)
    monkeypatch.setattr(torch, "set_num_threads", seen.append)

    make_env()

    assert seen == calls
