import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import nn

import agents.reinforce
from agents.cli.import_policy import PolicyShape, read_policy
from agents.reinforce import Learner, Reinforce
from agents.run_folder import RunFolder
from agents.train import load_policies
from asg_env.task_settings import VisDA17Settings
from asg_env.tasks.miniature import write_visda_tree
from asg_env.validation import ConfigError, validate
from asg_env.yaml_files import read_yaml

TASK = "ASG/Digits-v0"
GROUPS = 5  # of the digits
VISDA = Path(__file__).parents[3] / "configs" / "env" / "visda17-asg.yaml"


def policy_state(heads=GROUPS, hidden=20, levels=11, features=5, seed=0) -> dict[str, torch.Tensor]:
    """A policy with the original's names, and weights that let everything matter."""
    draws = torch.Generator().manual_seed(seed)
    inputs = features * hidden + 1
    shapes = {}
    for i in range(features):
        shapes |= {
            f"net.state_encoder.{i}.rnn.weight_ih_l0": (4 * hidden, 1),
            f"net.state_encoder.{i}.rnn.weight_hh_l0": (4 * hidden, hidden),
            f"net.state_encoder.{i}.rnn.bias_ih_l0": (4 * hidden,),
            f"net.state_encoder.{i}.rnn.bias_hh_l0": (4 * hidden,),
        }
    for g in range(heads):
        shapes[f"action_distribution.linear.{g}.weight"] = (levels, inputs)
        shapes[f"action_distribution.linear.{g}.bias"] = (levels,)
    shapes |= {"critic.fc.weight": (1, heads * inputs), "critic.fc.bias": (1,)}
    return {name: 0.6 * torch.randn(shape, generator=draws) for name, shape in shapes.items()}


def log_probabilities(state, observations, hidden, memoryless) -> np.ndarray:
    """The equations of an LSTM with gates i, f, g, o, and of the heads; shape (T, G, M)."""
    weights = {name: tensor.double().numpy() for name, tensor in state.items()}

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    h, c = np.zeros((5, hidden)), np.zeros((5, hidden))
    result = []
    for observation in observations:
        if memoryless:
            h, c = np.zeros((5, hidden)), np.zeros((5, hidden))
        for i in range(5):
            lstm = f"net.state_encoder.{i}.rnn."
            gates = (
                weights[lstm + "weight_ih_l0"][:, 0] * observation[i]
                + weights[lstm + "bias_ih_l0"]
                + weights[lstm + "weight_hh_l0"] @ h[i]
                + weights[lstm + "bias_hh_l0"]
            )
            enter, keep, new, out = gates.reshape(4, hidden)
            c[i] = sigmoid(keep) * c[i] + sigmoid(enter) * np.tanh(new)
            h[i] = sigmoid(out) * np.tanh(c[i])
        heads = []
        for g in range(len(observation) - 5):
            linear = f"action_distribution.linear.{g}."
            features = np.append(h.ravel(), observation[5 + g])
            logits = weights[linear + "weight"] @ features + weights[linear + "bias"]
            heads.append(logits - math.log(np.exp(logits - logits.max()).sum()) - logits.max())
        result.append(heads)
    return np.array(result)


@pytest.fixture
def save(tmp_path):
    """Save a state dict as the original's code would have."""

    def save_(state, name="policy.pth") -> Path:
        torch.save(state, tmp_path / name)
        return tmp_path / name

    return save_


@pytest.fixture
def env_file(tmp_path):
    """Write an environment file of tiny digits; keyword arguments change it."""

    def write(**changes) -> Path:
        values = {
            "id": TASK,
            "horizon": 3,
            "inner_steps": 2,
            "outer_valid_size": 50,
            "observation": "asg",
            "action": "grid",
            "grid": "linear",
            "start_multiplier": 1.0,
            **changes,
        }
        path = tmp_path / "env.yaml"
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        return path

    return write


@pytest.fixture
def importing(asg, save, env_file, tmp_path):
    """Import a policy of the digits' shape; return the run."""

    def run(*options, state=None) -> RunFolder:
        out = tmp_path / "run"
        file = save(state or policy_state())
        result = asg("import-policy", file, "--out", out, "--env", env_file(), *options)
        assert (result.status, result.err) == (0, "")
        return RunFolder.open(out)

    return run


@pytest.fixture
def fails(asg, tmp_path):
    """Run an import that must fail and leave nothing: status 2, one sentence; return it."""

    def run(*arguments):
        out = tmp_path / "run"
        result = asg("import-policy", *arguments, "--out", out)
        assert result.status == 2, result.out + result.err
        assert result.err.startswith("asg: ")
        assert result.err.count("\n") == 1, result.err
        assert not out.exists()
        return result.err

    return run


# The policy that comes out


@pytest.mark.parametrize("hidden", [20, 3])
@pytest.mark.parametrize("memoryless", [True, False])
def test_imported_policy_has_the_probabilities_of_a_hand_written_forward(
    importing, make_env, hidden, memoryless
):
    state = policy_state(hidden=hidden)
    run = importing(*([] if memoryless else ["--recurrent"]), state=state)
    (policy,) = load_policies(run)
    env = make_env(observation="asg", action="grid", grid="linear", start_multiplier=1.0)
    rows = [env.reset(seed=0)[0]]
    for level in (3, 0):
        rows.append(env.step(np.full(GROUPS, level))[0])
    expected = log_probabilities(state, rows, hidden, memoryless)
    recurrent = policy.network.initial_state(1)
    for row, hand in zip(rows, expected, strict=True):
        with torch.no_grad():
            ours, recurrent = policy.network(torch.from_numpy(row)[None, None], recurrent)
        np.testing.assert_allclose(ours[0, 0].numpy(), hand, atol=1e-5)
    other = log_probabilities(state, rows, hidden, not memoryless)
    assert np.abs(other[1:] - expected[1:]).max() > 0.01  # else the test would show nothing


@pytest.mark.parametrize("memoryless", [True, False])
def test_imported_policy_forgets_unless_imported_as_recurrent(importing, memoryless):
    (policy,) = load_policies(importing(*([] if memoryless else ["--recurrent"])))
    rows = np.random.default_rng(0).random((30, 10)).astype(np.float32)
    fresh = [policy.predict(row, deterministic=True)[0] for row in rows]
    state, carried = None, []
    for row in rows:
        action, state = policy.predict(row, state, deterministic=True)
        carried.append(action)
    assert np.array_equal(fresh, carried) == memoryless


def test_imported_policy_of_the_originals_shape_has_17762_parameters(save):
    state, shape = read_policy(save(policy_state(heads=7)))
    assert sum(tensor.numel() for tensor in state.values()) == 17_762
    assert shape == PolicyShape(hidden_size=20, heads=7, levels=11)


def test_import_takes_what_training_scripts_wrap_around_a_state_dict(save, tmp_path):
    state = policy_state()
    half = {f"module.{name}": tensor.half() for name, tensor in state.items()}
    read, _ = read_policy(save({"state_dict": half, "epoch": 3}))
    assert read.keys() == state.keys()
    assert all(tensor.dtype == torch.float32 for tensor in read.values())
    save_file(state, tmp_path / "policy.safetensors")
    read, _ = read_policy(tmp_path / "policy.safetensors")
    assert all(torch.equal(read[name], state[name]) for name in state)


# The run that comes out


def test_import_says_what_it_read_and_where_it_wrote(asg, save, env_file, tmp_path):
    file, out = save(policy_state()), tmp_path / "run"
    result = asg("import-policy", file, "--out", out, "--env", env_file())
    assert result.out == (
        f"{file}: 15,316 parameters, hidden size 20, 5 heads of 11 levels, memoryless\n"
        f"written: {out}\n"
    )


def test_import_records_where_the_policy_comes_from(importing, tmp_path):
    run = importing("--recurrent", "--set", "env.horizon=4", "--set", "train.workers=1")
    stored = json.loads((run.path / "provenance.json").read_text(encoding="utf-8"))
    assert stored["imported"] == {
        "file": "policy.pth",
        "sha256": hashlib.sha256((tmp_path / "policy.pth").read_bytes()).hexdigest(),
        "acting": "recurrent",
    }
    assert "packages" in stored
    experiment = run.experiment
    assert (experiment.task, experiment.env.horizon) == (TASK, 4)
    assert (experiment.agent.kind, experiment.agent.hidden_size) == ("reinforce", 20)
    assert not experiment.agent.memoryless
    assert (experiment.train.workers, experiment.search_episodes) == (1, 0)


def test_import_replaces_a_run_only_when_asked(importing, asg, save, tmp_path):
    out = importing().path
    checkpoint = out / "seed-0" / "checkpoints" / "last.safetensors"
    before = checkpoint.read_bytes()
    command = ["import-policy", save(policy_state(seed=1)), "--out", out]
    command += ["--env", tmp_path / "env.yaml"]
    result = asg(*command)
    assert result.status == 2
    assert result.err == (
        f"asg: {out} already holds a run; add --overwrite or choose another --out\n"
    )
    assert checkpoint.read_bytes() == before
    assert asg(*command, "--overwrite").status == 0
    assert checkpoint.read_bytes() != before


def test_import_does_not_delete_its_own_file(importing, asg, tmp_path):
    out = importing().path
    inside = (tmp_path / "policy.pth").rename(out / "policy.pth")
    result = asg(
        "import-policy", inside, "--out", out, "--env", tmp_path / "env.yaml", "--overwrite"
    )
    assert result.status == 2
    assert result.err.startswith(f"asg: FILE must lie outside --out, got {inside}")
    assert inside.exists()


def test_import_leaves_a_folder_alone_that_is_no_run(asg, save, env_file, tmp_path):
    out = tmp_path / "folder"
    out.mkdir()
    (out / "notes.txt").write_text("mine", encoding="utf-8")
    result = asg(
        "import-policy", save(policy_state()), "--out", out, "--env", env_file(), "--overwrite"
    )
    assert result.status == 2
    assert "is not empty and holds no run; choose another --out" in result.err
    assert [path.name for path in out.iterdir()] == ["notes.txt"]


def test_import_says_that_the_disk_refuses(asg, save, env_file, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Learner, "save", full)
    out = tmp_path / "run"
    result = asg("import-policy", save(policy_state()), "--out", out, "--env", env_file())
    assert result.status == 2
    assert result.err == (
        f"asg: {out} cannot be written (No space left on device); choose another --out\n"
    )


def test_imported_run_is_evaluated_at_an_unknown_cost(importing, asg, inline_pool, monkeypatch):
    monkeypatch.setattr("agents.statistics.RESAMPLES", 200)
    monkeypatch.setattr("agents.evaluate.RolloutPool", inline_pool)
    run = importing("--set", "train.tuning_instances=1", "--set", "env.reward=train_loss")
    result = asg("evaluate", run.path, "--instances", "2")
    assert (result.status, result.err) == (0, "")
    assert "static search" not in result.out
    rows = json.loads((run.path / "results.json").read_text(encoding="utf-8"))["rows"]
    assert rows[0]["name"] == "controller (sampled)"  # as the original acts
    assert rows[0]["cost"] == {"episodes": 0, "inner_steps": 0, "validation_images": 0}


def test_imported_run_is_exported_and_used_live(importing, asg, inline_pool, monkeypatch, tmp_path):
    run = importing("--set", "env.instances=unknown-scale")
    monkeypatch.setattr("agents.cli.export.RolloutPool", inline_pool)
    out = tmp_path / "schedule.json"
    result = asg("export", run.path, "--out", out, "--episodes", "2", "--sampled")
    assert (result.status, result.err) == (0, "")
    assert len(json.loads(out.read_text(encoding="utf-8"))["knots"]) == 3
    model = tmp_path / "model"
    result = asg("fit", TASK, "--controller", run.path, "--out", model, "--sampled")
    assert (result.status, result.err) == (0, "")
    windows = json.loads((model / "fit.json").read_text(encoding="utf-8"))["windows"]
    levels = {m for window in windows for m in window["lr_multipliers"]}
    assert levels <= {level / 10 for level in range(11)}
    assert len(levels) > 1


def test_imported_policy_can_be_trained_further(importing, inline_pool, monkeypatch):
    run = importing()
    monkeypatch.setattr("agents.episodic.RolloutPool", inline_pool)
    small = {"instances_per_update": 1, "rollouts_per_instance": 2, "passes": 1}
    agent = run.experiment.agent.model_copy(update=small)
    learner = Learner(TASK, run.experiment.env, agent, 0, 1)
    start = learner.load(run.seed_folder(0) / "checkpoints" / "last.safetensors")
    assert start == 0
    next(learner.train(start))
    assert learner.policy.network.memoryless
    after = learner.policy.network.state_dict()
    assert not torch.equal(
        after["action_distribution.linear.0.weight"],
        policy_state()["action_distribution.linear.0.weight"],
    )


# The original's own task


def test_visda17_asg_is_the_originals_decision_process():
    values = read_yaml(VISDA)
    assert values.pop("id") == "ASG/VisDA17-v0"
    settings = validate(VisDA17Settings, {**values, "root": "images"}, "env")
    windows = settings.windows()
    assert len(windows) == 67  # the warm-start window and 66 decisions
    assert windows[:10] == (10, 10, 20, 40, 80, 160, 320, 640, 1280, 2203)
    assert sum(windows) == 4763 * 30
    assert settings.guidance_terms()["kl"].weight == 0.1


def test_import_for_visda17_asks_for_the_images(fails, save):
    assert "set env.root" in fails(save(policy_state(heads=7)))


def test_policy_of_the_originals_shape_fits_visda17(asg, save, tmp_path):
    write_visda_tree(tmp_path / "images", train=1, validation=1, seed=0, size=32)
    small = ["root=" + str(tmp_path / "images"), "backbone=torchvision:resnet18"]
    small += ["weights=random", "image_size=32", "batch_size=4", "steps_per_epoch=3", "epochs=2"]
    small += ["device=cpu"]
    options = [word for setting in small for word in ("--set", f"env.{setting}")]
    out = tmp_path / "run"
    result = asg("import-policy", save(policy_state(heads=7)), "--out", out, *options)
    assert (result.status, result.err) == (0, "")
    assert "17,762 parameters, hidden size 20, 7 heads of 11 levels, memoryless" in result.out
    model = tmp_path / "model"
    result = asg("fit", "ASG/VisDA17-v0", "--controller", out, "--sampled", "--out", model)
    assert (result.status, result.err) == (0, "")
    windows = json.loads((model / "fit.json").read_text(encoding="utf-8"))["windows"]
    assert [window["inner_step"] for window in windows] == [3, 6]
    assert all(len(window["lr_multipliers"]) == 7 for window in windows)


# Mistakes


class Opened:
    """Creates a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def without(name) -> dict[str, torch.Tensor]:
    state = policy_state()
    del state[name]
    return state


def test_import_refuses_what_is_no_file_of_tensors(fails, save, env_file, tmp_path):
    env = ("--env", env_file())
    assert "missing.pth cannot be read" in fails(tmp_path / "missing.pth", *env)
    assert "must end in one of" in fails(save(policy_state(), "policy.bin"), *env)
    harmful = save({"policy": Opened(tmp_path / "harm")}, "harmful.pth")
    assert "holds more than tensors, which could run code" in fails(harmful, *env)
    assert not (tmp_path / "harm").exists()
    assert "save the state dict alone" in fails(save(nn.Linear(1, 1), "whole.pth"), *env)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            without("net.state_encoder.3.rnn.bias_hh_l0"),
            "1 missing in the file: net.state_encoder.3.rnn.bias_hh_l0; give",
        ),
        (
            without("net.state_encoder.0.rnn.weight_hh_l0"),
            "1 missing in the file: net.state_encoder.0.rnn.weight_hh_l0; give",
        ),
        (
            without("critic.fc.weight"),
            "policy network: 1 missing in the file: critic.fc.weight; give its whole state dict",
        ),
        (
            policy_state() | {"obs_filter.mean": torch.zeros(10), "a": torch.zeros(1)},
            "2 unexpected in the file: obs_filter.mean, a; give",
        ),
        (
            {"conv1.weight": torch.zeros(1)},
            "36 missing in the file: net.state_encoder.0.rnn.weight_ih_l0, "
            "net.state_encoder.0.rnn.weight_hh_l0, net.state_encoder.0.rnn.bias_ih_l0, ...; "
            "1 unexpected in the file: conv1.weight; give",
        ),
        (
            policy_state() | {"critic.fc.weight": torch.zeros(1, 7)},
            "1 of another shape: critic.fc.weight (1, 7) instead of (1, 505); give",
        ),
        (
            policy_state() | {"net.state_encoder.0.rnn.weight_hh_l0": torch.tensor(1.0)},
            "of another shape: ",
        ),
        (
            policy_state(features=4),
            "has LSTMs for 4 features, but the observation asg has 5 (ce, kl, progress, "
            "head_mean, head_std); give a policy with one LSTM for each",
        ),
        (policy_state(features=6), "has LSTMs for 6 features"),
        (
            policy_state(heads=7),
            "sets the rates of 7 layer groups, but ASG/Digits-v0 has 5 here (",
        ),
        (
            policy_state(levels=9),
            "chooses among 9 levels, but the grid linear has 11; give a policy with 11",
        ),
        (
            policy_state() | {"critic.fc.bias": torch.tensor([math.nan])},
            "must hold finite floating-point numbers, but critic.fc.bias does not",
        ),
        (
            policy_state() | {"critic.fc.bias": torch.tensor([1])},
            "must hold finite floating-point numbers, but critic.fc.bias does not",
        ),
    ],
    ids=[
        "missing",
        "missing-that-tells-the-size",
        "no-critic",
        "extra",
        "another-network",
        "shape",
        "shape-that-tells-the-size",
        "4-features",
        "6-features",
        "7-heads",
        "9-levels",
        "nan",
        "integers",
    ],
)
def test_import_refuses_another_network(fails, save, env_file, state, message):
    assert message in fails(save(state), "--env", env_file())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"observation": "scaled"},
            "`env.observation` must be asg, which the original's policies are made for, got "
            "scaled; set env.observation=asg",
        ),
        ({"action": "relative"}, "`env.action` must be grid"),
        ({"action": "box"}, "got box; set env.action=grid"),
        ({"grid": "log"}, "`env.grid` must be linear, which the original's policies are made"),
        ({"id": "ASG/None-v0"}, "`env.id` must be one of"),
        ({"device": "cuda:99"}, "`device` must be a torch device of this machine"),
    ],
)
def test_import_refuses_an_environment_that_does_not_fit(fails, save, env_file, changes, message):
    assert message in fails(save(policy_state()), "--env", env_file(**changes))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--env", "nowhere"], "env 'nowhere' is none of the shipped ones ("),
        (["--env", "no: where.yaml"], "no: where.yaml cannot be read"),
        (["--set", "agent.hidden_size=4"], "got 'agent.hidden_size=4'; the agent is that of"),
        (["--set", "env=digits-asg"], "--set must look like env.root=DIR"),
        (["--set", "env.speed=1"], "`env.speed` is unknown"),
        (["--set", "train.seeds=2"], "`train.seeds` must be 1, as the file holds one policy, got"),
    ],
)
def test_import_refuses_options_that_do_not_fit(fails, save, env_file, options, message):
    assert message in fails(save(policy_state()), "--env", env_file(), *options)


def test_read_policy_raises_a_config_error_from_python_too(save):
    with pytest.raises(ConfigError, match="LSTMs for 4 features"):
        read_policy(save(policy_state(features=4)))


def test_imported_network_is_the_one_that_the_shape_describes(make_settings):
    agent = agents.reinforce.ReinforceSettings(hidden_size=6)
    env = make_settings(observation="asg", action="grid", grid="linear")
    ours = Reinforce(agents.reinforce.layout_of(TASK, env), agent, 0).policy.network.state_dict()
    described = PolicyShape(hidden_size=6, heads=GROUPS, levels=11).tensors()
    assert {name: tensor.shape for name, tensor in described.items()} == {
        name: tensor.shape for name, tensor in ours.items()
    }
