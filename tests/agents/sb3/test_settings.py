"""Settings of SB3's agents: bounds, what fits an environment, the table of the docs."""

import importlib
import inspect
import sys
from pathlib import Path
from typing import Any

import pytest

from agents.experiment import AGENTS, Experiment, load_experiment
from agents.sb3 import learner as sb3
from agents.sb3.algorithms import ALGORITHMS, build_model, spaces_of
from agents.sb3.settings import PPOSettings, SB3Settings
from asg_env.config import EnvSettings
from asg_env.validation import ConfigError, validate
from asg_env.yaml_files import read_yaml

TASK = "ASG/Digits-v0"
ROOT = Path(__file__).parents[3]
KINDS = [kind for kind, (module, _) in AGENTS.items() if module == "agents.sb3.learner"]
BOX_ONLY = ["sac", "td3", "tqc", "crossq", "ars"]


def _class(kind: str) -> type[SB3Settings]:
    found: type[SB3Settings] = getattr(sb3, AGENTS[kind][1])
    return found


def _learner(kind: str, env: EnvSettings, **values: Any) -> sb3.Learner:
    return sb3.Learner(TASK, env, validate(_class(kind), values, "agent"), 0, 0)


def test_every_algorithm_has_a_kind() -> None:
    assert set(KINDS) == set(ALGORITHMS)
    assert [kind for kind in KINDS if _class(kind).box_only] == BOX_ONLY


@pytest.mark.parametrize("kind", KINDS)
def test_the_shipped_file_is_read(kind: str) -> None:
    values = read_yaml(ROOT / "configs" / "agent" / f"{kind}.yaml")
    agent = validate(_class(kind), values, "agent")
    assert agent.kind == kind
    assert agent.episodes == agent.updates * agent.episodes_per_update == 960
    env = {"id": TASK, "action": "box" if kind in BOX_ONLY else "relative"}
    experiment = Experiment({"env": env, "agent": values})
    experiment.check()
    assert Experiment(experiment.to_dict()).digest() == experiment.digest()


@pytest.mark.parametrize("kind", KINDS)
def test_every_argument_is_one_that_sb3_takes(kind: str) -> None:
    settings = validate(_class(kind), {}, "agent")
    known = inspect.signature(ALGORITHMS[kind][0].__init__).parameters
    assert set(settings.arguments(60)) <= set(known)
    model = build_model(settings, spaces_of(TASK, EnvSettings(action="box")), 60)
    kept = vars(model)
    for name in {"n_steps", "batch_size", "gamma", "buffer_size", "policy_delay", "n_delta"}:
        if name in settings.arguments(60):
            assert kept[name] == settings.arguments(60)[name]


@pytest.mark.parametrize("kind", KINDS)
def test_every_setting_stands_in_the_table_of_the_docs(kind: str) -> None:
    text = (ROOT / "docs" / "algorithms.md").read_text(encoding="utf-8")
    cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    listed = {word for cell in cells for word in cell.split("`")[1::2]}
    assert set(_class(kind).model_fields) - {"kind"} <= listed
    assert f"`{kind}`" in text


@pytest.mark.parametrize("kind", BOX_ONLY)
def test_actions_that_are_no_real_numbers_are_refused_before_anything_runs(kind: str) -> None:
    expected = f"`env.action` must be box for the agent {kind}, got relative; set env.action=box"
    with pytest.raises(ConfigError, match=f"^{expected}$"):
        Experiment({"env": {"id": TASK}, "agent": {"kind": kind}}).check()


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("ppo", {"episodes_per_update": 12}, r"a multiple of environments \(8\), got 12; change"),
        ("sac", {"episodes_per_update": 12}, r"a multiple of environments \(8\), got 12; change"),
        ("ars", {"episodes_per_candidate": 3}, r"multiple of environments \(2\), got 3; change"),
        ("ars", {"episodes_per_update": 30}, r"2 \* episodes_per_candidate \(4\), got 30; change"),
        ("ars", {"kept_directions": 9}, r"must be <= 8, the directions of an update, got 9; lower"),
        ("ars", {"normalise_rewards": True}, "`agent.normalise_rewards` is unknown"),
        ("crossq", {"polyak": 0.1}, "`agent.polyak` is unknown"),
        ("trpo", {"entropy": 0.1}, "`agent.entropy` is unknown"),
        ("ppo", {"evaluate_every": 0}, "`agent.evaluate_every` must be >= 1, got 0"),
        ("tqc", {"quantiles_dropped": 25}, "`agent.quantiles_dropped` must be <= 24, got 25"),
        ("sac", {"temperature": 0.0}, "`agent.temperature` must be > 0.0, got 0.0"),
    ],
)
def test_values_out_of_bounds_are_refused(kind: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(_class(kind), values, "agent")


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("a2c", {"rollout_steps": 7}, "`agent.rollout_steps` must divide the 60 env steps"),
        ("sac", {"train_freq": 7}, "`agent.train_freq` must divide the 60 env steps"),
        ("td3", {"learning_starts": 14400}, "`agent.learning_starts` must be < 14400, the env"),
    ],
)
def test_values_that_do_not_fit_the_horizon_are_refused(
    kind: str, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        _learner(kind, EnvSettings(action="box"), **values)


def test_small_temperatures_reach_sb3() -> None:
    learner = _learner("sac", EnvSettings(action="box"), temperature=1e-6)
    assert learner._model.log_ent_coef.exp().item() == pytest.approx(1e-6)


def test_the_shipped_experiment_trains_as_many_episodes_as_reinforce() -> None:
    ppo = load_experiment("digits-ppo")
    assert isinstance(ppo.agent, PPOSettings)
    assert ppo.agent.episodes == load_experiment("digits-reinforce").agent.episodes
    rollout = ppo.agent.episodes_per_update * len(ppo.env.windows())
    assert rollout % ppo.agent.minibatch_size == 0


@pytest.mark.parametrize("package", ["stable_baselines3", "sb3_contrib"])
def test_a_missing_package_is_named_with_its_remedy(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("agents.sb3.learner", "agents.sb3.algorithms", "agents.sb3.callbacks"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=r"needs stable-.*; pip install 'asg-env\[sb3\]'$"):
        importlib.import_module("agents.sb3.learner")
