"""Imports run one way: core <- tasks <- environment <- agents <- benchmarks."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("asg_env", "agents", "benchmarks", "configs")
SB3 = {"stable_baselines3", "sb3_contrib"}

# What the modules below a prefix must not import; the longest prefix does not win, all apply.
FORBIDDEN = {
    "asg_env": {"agents", "benchmarks", "configs", *SB3},
    "asg_env.core": {"gymnasium", "yaml", "pydantic", "json", "os", "pathlib", "tempfile"},
    "asg_env.tasks": {"gymnasium", "yaml", "pydantic"},
    "agents": {"benchmarks"},
    "agents.sb3.settings": SB3,  # read before it is known whether SB3 is there
    "agents.sb3.box_settings": SB3,
    "configs": {"asg_env", "agents", "benchmarks"},
}
# What the modules below a prefix may import of asg_env.
ALLOWED_WITHIN = {
    "asg_env.core": ("asg_env.core",),
    "asg_env.files": (),  # knows nothing of the project, so that tasks may stand on it
    "asg_env.processes": (),
    "asg_env.tasks": ("asg_env.core", "asg_env.files", "asg_env.processes", "asg_env.tasks"),
}
# Packages that only modules below these may import.
ONLY_IN = {
    "yaml": {"asg_env.yaml_files", "agents.run_folder"},
    "stable_baselines3": {"agents.sb3", "benchmarks.sequence_ppo"},
    "sb3_contrib": {"agents.sb3", "benchmarks.sequence_ppo"},
    "agents.benchmark": {"agents.benchmark", "agents.report", "agents.cli", "benchmarks"},
    "agents.compare": {"agents.compare", "agents.report", "agents.cli"},
    "agents.report": {"agents.report", "agents.cli"},
    "agents.cli": {"agents.cli"},
}


def below(module, prefix):
    return module == prefix or module.startswith(prefix + ".")


def imported_names(source, module):
    """Every dotted name that `source` imports, wherever the statement stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: -node.level]
                base = ".".join([*parents, base] if base else parents)
            yield base
            # `from package import module` names a module too.
            yield from (f"{base}.{alias.name}" for alias in node.names)


def violations(source, module):
    found = []
    for name in imported_names(source, module):
        for prefix, forbidden in FORBIDDEN.items():
            if below(module, prefix) and any(below(name, bad) for bad in forbidden):
                found.append(f"{module} imports {name}")
        for prefix, allowed in ALLOWED_WITHIN.items():
            if below(module, prefix) and below(name, "asg_env"):
                inside = any(below(name, good) or below(good, name) for good in allowed)
                # A bare `asg_env` is its public names: the environment.
                if not inside or name == "asg_env":
                    found.append(f"{module} imports {name}")
        for package, homes in ONLY_IN.items():
            if below(name, package) and not any(below(module, home) for home in homes):
                found.append(f"{module} imports {name}")
    return sorted(set(found))


def modules():
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


@pytest.mark.parametrize(("module", "path"), [pytest.param(m, p, id=m) for m, p in modules()])
def test_imports_point_one_way(module, path):
    assert violations(path.read_text(encoding="utf-8"), module) == []


def test_every_layer_is_looked_at():
    names = {module for module, _ in modules()}

    assert {"asg_env", "asg_env.env", "asg_env.core.trainer", "asg_env.tasks.digits"} <= names
    assert {"agents.reinforce", "agents.experiment", "agents.sb3.learner"} <= names


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("asg_env.core.trainer", "import asg_env.tasks"),
        ("asg_env.core.trainer", "from asg_env.env import LayerwiseLREnv"),
        ("asg_env.core.trainer", "from asg_env import LayerwiseLREnv"),
        ("asg_env.core.trainer", "from asg_env import tasks"),
        ("asg_env.core.trainer", "from .. import env"),
        ("asg_env.core.trainer", "from ..tasks.task import Task"),
        ("asg_env.core.trainer", "import gymnasium as gym"),
        ("asg_env.core.trainer", "from gymnasium.spaces import Box"),
        ("asg_env.core.trainer", "def f():\n    import yaml"),
        ("asg_env.core.data", "from pathlib import Path"),
        ("asg_env.tasks.digits", "import asg_env.env"),
        ("asg_env.tasks.digits", "from asg_env.config import EnvSettings"),
        ("asg_env.core.trainer", "from asg_env.files import replacing"),
        ("asg_env.files", "from asg_env.tasks.task import Task"),
        ("asg_env.processes", "import asg_env.core"),
        ("asg_env.env", "from agents.policy import Policy"),
        ("asg_env.env", "if TYPE_CHECKING:\n    import stable_baselines3"),
        ("asg_env.env", "import yaml"),
        ("asg_env", "import agents"),
        ("agents.train", "from stable_baselines3 import PPO"),
        ("agents.train", "import sb3_contrib.ppo_recurrent"),
        ("agents.sb3.box_settings", "from sb3_contrib import TQC"),
        ("agents.train", "import yaml"),
        ("agents.train", "from agents.cli.options import console"),
        ("agents.benchmark.trials", "from agents.report import page"),
        ("agents.train", "import benchmarks.timing"),
        ("benchmarks.timing", "from stable_baselines3 import PPO"),
    ],
)
def test_checker_catches_a_reverse_arrow(module, source):
    assert violations(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("asg_env.core.trainer", "from asg_env.core.data import Split"),
        ("asg_env.core.trainer", "from .data import Split"),
        ("asg_env.core.trainer", "import torch\nimport osmium"),
        ("asg_env.tasks.digits", "from asg_env.core import data\nfrom pathlib import Path"),
        ("asg_env.tasks.digits", "from asg_env.tasks.task import Task"),
        ("asg_env.tasks.digits", "from asg_env.files import replacing"),
        ("asg_env.env", "from asg_env.tasks import load_task\nimport gymnasium"),
        ("asg_env.yaml_files", "import yaml"),
        ("agents.sb3.learner", "from stable_baselines3 import PPO"),
        ("agents.train", "from asg_env import LayerwiseLREnv\nimport agentstvo"),
        ("benchmarks.timing", "from agents.train import train"),
    ],
)
def test_checker_lets_the_right_arrows_pass(module, source):
    assert violations(source, module) == []
