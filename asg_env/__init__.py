"""Layer-wise learning-rate control by reinforcement learning, for synthetic-to-real training.

Importing the package registers its environments with Gymnasium.
"""

from typing import TYPE_CHECKING, Any

from gymnasium.envs.registration import register

if TYPE_CHECKING:
    from asg_env.config import EnvSettings
    from asg_env.env import LayerwiseLREnv, env_creator
    from asg_env.instances import Instance
    from asg_env.schedule import LearnedSchedule

__version__ = "0.1.0"
__all__ = ["EnvSettings", "Instance", "LayerwiseLREnv", "LearnedSchedule", "env_creator"]

_HOMES = {
    "EnvSettings": "asg_env.config",
    "Instance": "asg_env.instances",
    "LayerwiseLREnv": "asg_env.env",
    "LearnedSchedule": "asg_env.schedule",
    "env_creator": "asg_env.env",
}


def __getattr__(name: str) -> Any:
    """Import public names on first use, so that `import asg_env` stays fast."""
    if name not in _HOMES:
        raise AttributeError(f"module 'asg_env' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


for _task in (
    "ASG/Digits-v0",
    "ASG/DigitsImageNet-v0",
    "ASG/VisDA17-v0",
    "ASG/ImageFolder-v0",
):
    register(id=_task, entry_point="asg_env.env:make_env", kwargs={"task": _task})
