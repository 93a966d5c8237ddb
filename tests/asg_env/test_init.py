import subprocess
import sys

import gymnasium as gym
import pytest

import asg_env

HEAVY = ("torchvision", "stable_baselines3", "pandas", "sklearn")


def loaded(code, *modules):
    """Which of `modules` a fresh interpreter has imported after running `code`."""
    report = f"import sys; print(*(m for m in {modules!r} if m in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def test_import_is_light():
    assert loaded("import asg_env", "torch", "matplotlib", "yaml", *HEAVY) == []


def test_environment_needs_no_heavy_package(make_env):
    make_env()  # so that the images are in the cache
    code = "import gymnasium, asg_env; gymnasium.make('ASG/Digits-v0').reset(seed=0)"

    assert loaded(code, "torch", *HEAVY) == ["torch"]


def test_public_names_are_there():
    for name in asg_env.__all__:
        assert getattr(asg_env, name).__name__ == name


def test_unknown_names_are_refused():
    with pytest.raises(AttributeError, match="module 'asg_env' has no attribute 'Environment'"):
        _ = asg_env.Environment


def test_ids_are_registered():
    assert gym.spec("ASG/Digits-v0").entry_point == "asg_env.env:make_env"
