import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from PIL import Image

from asg_env.tasks.digit_images import load_images

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
SINGLE_FILE = EXAMPLES / "reinforce_single_file.py"


def load(path):
    """Import an example as a module, without running its `main`."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def single_file():
    return load(SINGLE_FILE)


def imported(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").split(".")[0] if not node.level else "."


def test_single_file_imports_nothing_of_ours():
    names = set(imported(SINGLE_FILE))
    assert names - sys.stdlib_module_names == {"gymnasium", "numpy", "torch"}


def test_single_file_runs_from_a_folder_of_a_strangers(tmp_path):
    copy = tmp_path / "mine.py"
    copy.write_text(SINGLE_FILE.read_text(encoding="utf-8"), encoding="utf-8")
    small = "--updates 1 --horizon 1 --inner-steps 1 --instances-per-update 1 --rollouts 2"
    done = subprocess.run(
        [sys.executable, copy, *small.split(), "--eval-episodes", "1"],
        cwd=tmp_path,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^update 1: return [+-]0\.\d{3}, accuracy", done.stdout, re.M)) == 1
    accuracies = re.findall(r"instances, .*: accuracy (0\.\d+)$", done.stdout, re.M)
    assert len(accuracies) == 6
    assert all(0 < float(accuracy) < 1 for accuracy in accuracies)


class Probe(gym.Env):
    """Two groups; a tenth is paid for each that takes its own right choice, 2 and 0.

    Args:
        paid: Pay what the actions earn; else a constant, whatever the actions.
        stops: Length of the episodes of instances with an odd seed.
    """

    right = np.array([2, 0])

    def __init__(self, paid=True, stops=4):
        self.observation_space = gym.spaces.Box(-1, 1, (3,), np.float32)
        self.action_space = gym.spaces.MultiDiscrete([3, 3])
        self.paid, self.stops = paid, stops

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.seed = seed
        self.steps = 0
        self.limit = self.stops if self.seed % 2 else 4
        return self.observe(), {"accuracy/outer_valid": 0.0}

    def step(self, action):
        self.steps += 1
        earned = 0.1 * (action == self.right).sum()
        info = {"accuracy/outer_valid": self.steps / 10}
        ended = self.steps == self.limit
        return self.observe(), earned if self.paid else 0.1, ended, False, info

    def observe(self):
        return np.full(3, self.steps / 4, np.float32)


def probe_envs(**settings):
    return gym.vector.SyncVectorEnv([lambda: Probe(**settings)] * 8)


def train_on_probe(module, updates=15, **settings):
    """Train on the probe; return each group's mean probability of its right choice."""
    torch.manual_seed(0)
    args = module.Args(horizon=4, policy_lr=0.02)
    envs = probe_envs(**settings)
    policy = module.Policy(envs, args.hidden_size)
    optimizer = torch.optim.Adam(policy.parameters(), lr=args.policy_lr)
    for index in range(updates):
        batch = module.collect(envs, policy, [2 * index] * 8 + [2 * index + 1] * 8, args.horizon)
        module.update(policy, optimizer, batch, args, entropy=0.0)
    seen = module.collect(envs, policy, [0] * 8, args.horizon).observations
    probabilities = policy(seen, None)[0].probs.detach().mean((0, 1))
    return probabilities[[0, 1], Probe.right].numpy()


def test_single_file_learns_the_rewarded_choice(single_file):
    untrained, once, trained = (train_on_probe(single_file, updates) for updates in (0, 1, 15))

    np.testing.assert_allclose(untrained, 1 / 3, atol=0.02)
    assert once.min() > 0.4
    assert trained.min() > 0.8


def test_single_file_learns_nothing_where_actions_earn_nothing(single_file):
    np.testing.assert_allclose(train_on_probe(single_file, paid=False), 1 / 3, atol=0.02)


def test_single_file_trains_the_same_policy_again(single_file):
    once, again = train_on_probe(single_file, 2), train_on_probe(single_file, 2)
    np.testing.assert_array_equal(once, again)


def test_single_file_counts_nothing_after_an_early_end(single_file):
    envs = probe_envs(paid=False, stops=2)
    rollouts = single_file.collect(envs, None, [1, 2] * 8, 4)

    assert rollouts.observations.shape == (4, 16, 3)
    assert rollouts.actions.shape == (4, 16, 2)
    assert (rollouts.actions == 1).all()  # without a policy every rate stays
    odd, even = [0, 8], [1, 9]
    for column in odd:
        assert rollouts.running[:, column].tolist() == [1, 1, 0, 0]
        assert rollouts.rewards[:, column].tolist() == [0.1, 0.1, 0, 0]
        assert rollouts.accuracy[:, column].tolist() == [0.1, 0.2, 0.2, 0.2]
    for column in even:
        assert rollouts.running[:, column].tolist() == [1, 1, 1, 1]
        assert rollouts.accuracy[-1, column] == 0.4


def test_single_file_gives_a_step_the_credit_of_what_follows(single_file):
    # One instance, three rollouts; the third ends after the first step and leaves the baseline
    # of the second step to the others.
    rewards = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, 0.0]], dtype=torch.float64)
    running = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]], dtype=torch.float64)
    # Returns-to-go 3, 0, -1 and 2, 0; their means 2/3 and 1.
    centred = torch.tensor([[7.0, -2.0, -5.0], [3.0, -3.0, 0.0]]) / 3
    expected = centred / (centred.square().sum() / 5).sqrt()
    torch.testing.assert_close(single_file.advantages(rewards, running, 3), expected)


@pytest.mark.slow
def test_rllib_trains_for_an_iteration():
    pytest.importorskip("ray.rllib.algorithms.ppo", reason="docs/examples/rllib_env.sh test")
    import ray

    example = load(EXAMPLES / "rllib_ppo.py")
    environment = {**example.ENVIRONMENT, "horizon": 2, "inner_steps": 2}
    ray.init(include_dashboard=False)
    try:
        algorithm = example.ppo_config(environment, env_runners=0, episodes=4).build_algo()
        before = {k: v.clone() for k, v in algorithm.get_module().state_dict().items()}
        episodes = algorithm.train()["env_runners"]
        after = algorithm.get_module().state_dict()
        algorithm.stop()
    finally:
        ray.shutdown()
    assert episodes["num_episodes"] == 4
    assert episodes["episode_len_mean"] == 2
    assert -1 < episodes["episode_return_mean"] < 1
    assert any(not torch.equal(before[name], after[name]) for name in before)


# Reuse: with and without a schedule


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A few images in the folders that `digit_folders.py` writes."""
    root, generator = tmp_path_factory.mktemp("digits"), np.random.default_rng(0)
    for split, first in (("pretrain", 0), ("train", 5), ("valid", 5), ("test", 5)):
        for digit in range(first, first + 5):
            folder = root / split / str(digit)
            folder.mkdir(parents=True)
            for number in range(4):
                pixels = generator.integers(0, 256, (32, 32), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


def run_example(name, *arguments):
    return subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "package", "groups"),
    [
        ("resnet_folder", "torchvision", ["stem", "layer1.0", "layer4.1", "head"]),
        ("vit_timm", "timm", ["stem", "blocks.0", "blocks.11", "head"]),
        ("hf_trainer", "transformers", ["stem", "vit.layers.0", "vit.layers.5", "head"]),
    ],
)
def test_examples_of_reuse_compare_with_and_without_a_schedule(digits, name, package, groups):
    pytest.importorskip(package)
    done = run_example(name, digits, "--steps", 2, "--seeds", 2)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert set(groups) <= {line.split()[0] for line in lines}
    assert lines[-3].startswith("one rate  base rate")
    assert lines[-2].startswith("schedule  base rate")
    assert re.fullmatch(r"schedule minus one rate: -?[\d.]+ \(.*, n = 2\)", lines[-1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere/train is no folder; python docs/examples/digit_folders.py nowhere"),
        (["nowhere", "--steps", 1], "--steps must be >= 2, got 1"),
        (["nowhere", "--schedule", "none.json"], "none.json cannot be read as a schedule"),
    ],
)
def test_examples_of_reuse_say_what_is_wrong(arguments, message):
    done = run_example("resnet_folder", *arguments)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_folders_of_digits_hold_every_class_of_every_split(tmp_path, monkeypatch):
    module = load(EXAMPLES / "digit_folders.py")

    def a_few(image_size):  # of the real images: writing all of them takes a while
        whole = load_images(image_size=image_size)
        arrays = {}
        for split in (name[: -len("/labels")] for name in whole if name.endswith("/labels")):
            labels = whole[f"{split}/labels"]
            chosen = np.concatenate([np.flatnonzero(labels == n)[:3] for n in np.unique(labels)])
            for part in ("images", "labels"):
                arrays[f"{split}/{part}"] = whole[f"{split}/{part}"][chosen]
        return arrays

    monkeypatch.setattr("asg_env.tasks.digit_images.load_images", a_few)
    module.write_folders(tmp_path)
    found = {f"{path.parent.parent.name}/{path.parent.name}" for path in tmp_path.rglob("*.png")}
    assert found == {f"pretrain/{digit}" for digit in range(5)} | {
        f"{split}/{digit}" for split in ("train", "valid", "test") for digit in range(5, 10)
    }
