"""A controller as one file: what is written is what is read, and what is wrong is told."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from agents.controller_file import Controller, controller_of, read_controller
from agents.l2o_controller import L2OController
from agents.numpy_policy import NumpyPolicy, choose
from agents.run_folder import RunFolder
from agents.train import load_policy
from asg_env.validation import ConfigError


@pytest.fixture
def controller(make_settings, controller_for):
    return controller_for(make_settings(observation="normalised"))


@pytest.fixture
def path(controller, tmp_path):
    controller.save(tmp_path / "controller.safetensors")
    return tmp_path / "controller.safetensors"


def rewrite(path, change, weights=None):
    """Write the file again with changes to its record, as some other program would."""
    controller = read_controller(path)
    record = json.loads(controller.record.model_dump_json())
    change(record)
    metadata = {"controller": json.dumps(record)}
    save_file(weights or controller.weights, str(path), metadata=metadata)


def test_a_file_holds_the_controller(controller, path):
    read = read_controller(path)
    assert read.record == controller.record
    assert read.weights.keys() == controller.weights.keys()
    assert all(torch.equal(read.weights[n], t) for n, t in controller.weights.items())
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_the_controller_of_a_run_is_its_policy(trained_run):
    controller, policy = controller_of(trained_run), load_policy(trained_run, 0)
    observation = np.linspace(-1, 1, len(controller.record.labels), dtype=np.float32)
    mine = controller.policy(controller.record.layer_groups)
    for one, other in zip(mine.predict(observation), policy.predict(observation), strict=True):
        np.testing.assert_array_equal(one, other)
    env = trained_run.experiment.env
    assert controller.record.inner_steps == sum(env.windows())
    assert controller.record.base_lr == env.base_lr
    assert read_controller(trained_run.path).record == controller.record


def test_growing_windows_are_kept(make_experiment, trained_run, tmp_path):
    windows = {"inner_steps": "asg-as-coded", "steps_per_epoch": 15, "epochs": 2, "horizon": None}
    run = RunFolder.start(tmp_path / "run", make_experiment(env=windows))
    checkpoints = "seed-0/checkpoints"
    shutil.copytree(trained_run.path / checkpoints, run.path / checkpoints)
    record = controller_of(run, greedy=True).record
    assert record.growing_windows == record.windows == (10, 5, 10, 5)
    assert controller_of(trained_run).record.growing_windows == ()


def test_a_file_is_used_where_its_path_is_given(controller, path):
    model = torch.nn.Sequential(*(torch.nn.Linear(3, 3) for _ in range(7)))
    found = []
    for given in (controller, path, str(path)):
        optimizer = torch.optim.SGD(
            [
                {"params": [*layer.parameters()], "lr": 0.1, "name": str(i)}
                for i, layer in enumerate(model)
            ]
        )
        live = L2OController(optimizer, given, 6, classes=3, inner_valid=lambda: 1.0)
        live.begin(ce=1.0, kl=0.0)
        found.append(live.multipliers)
    assert found[0] == found[1] == found[2]


def test_other_versions_and_another_choice_of_actions_are_the_same_controller(controller):
    moved = controller.record.model_copy(
        update={"provenance": {"torch": "9"}, "greedy": not controller.record.greedy}
    )
    assert Controller(moved, controller.weights).digest() == controller.digest()
    other = controller.record.model_copy(update={"horizon": 7})
    assert Controller(other, controller.weights).digest() != controller.digest()
    weights = {name: tensor + 1 for name, tensor in controller.weights.items()}
    assert Controller(controller.record, weights).digest() != controller.digest()


def test_a_controller_that_cannot_be_written_leaves_nothing(controller, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("asg_env.files.os.replace", refuse)
    with pytest.raises(OSError, match="No space left"):
        controller.save(tmp_path / "controller.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "has controller version 2, this asg-env reads 1; use the asg-env"),
        ({"format": "other"}, "is not a controller: it says nothing of the format 'asg-env-contr"),
        ({"base_lr": -1.0}, "is damaged: `controller.base_lr` must be > 0.*got -1.0"),
        ({"base_lr": 1e300}, r"is damaged: `controller.base_lr` must be <= 1e\+25"),
        (
            {"network": {"kind": "coordinate-wise", "hidden_size": 10**9, "memoryless": False}},
            "is damaged: `controller.network` must be <= 4096, got 1000000000",
        ),
        ({"version": True}, "has controller version True, this asg-env reads 1"),
        ({"speed": 1}, "is damaged: `controller.speed`"),
        ({"growing_windows": [1, 2]}, "is damaged: `growing_windows` must be .* got 2 that make 3"),
        ({"labels": ["ce"]}, "observes ce, which this asg-env does not offer"),
    ],
)
def test_a_record_that_cannot_be_used_is_told(path, change, message):
    rewrite(path, lambda record: record.update(change))
    with pytest.raises(ConfigError, match=message):
        read_controller(path)


def test_weights_that_cannot_be_used_are_told(controller, path):
    rewrite(path, lambda record: None, {n: t * torch.inf for n, t in controller.weights.items()})
    with pytest.raises(ConfigError, match="is damaged: .* must be finite; export it again"):
        read_controller(path)
    rewrite_size = {n: t for n, t in list(controller.weights.items())[1:]}
    save_file(rewrite_size, str(path), metadata={"controller": controller.record.model_dump_json()})
    with pytest.raises(ConfigError, match="is damaged: the weights are not those of the network"):
        read_controller(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"cannot be read as a controller \(there is none\)"),
        (b"not safetensors", "cannot be read as a controller"),
    ],
)
def test_what_is_no_controller_is_told(tmp_path, text, message):
    with pytest.raises(ValueError, match=r"cannot be read as a controller \(it is a folder\)"):
        NumpyPolicy.load(tmp_path)
    path = tmp_path / "controller.safetensors"
    if text is not None:
        path.write_bytes(text)
    for read in (read_controller, NumpyPolicy.load):
        with pytest.raises(ValueError, match="cannot be read as a controller"):
            read(path)
    with pytest.raises(ConfigError, match=message):
        read_controller(path)


def test_a_run_that_is_no_run_or_has_no_network_of_ours_is_told(trained_run, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="is not a run folder"):
        read_controller(tmp_path)
    shutil.copytree(trained_run.path, tmp_path / "run")
    monkeypatch.setattr("agents.controller_file.load_policy", lambda *_: object())
    with pytest.raises(ConfigError, match="agent reinforce has a network of its own kind"):
        controller_of(RunFolder.open(tmp_path / "run"))


# The runtime that needs NumPy alone


@pytest.mark.parametrize("kind", ["coordinate-wise", "per-feature"])
def test_the_numpy_runtime_decides_as_the_policy(make_settings, controller_for, tmp_path, kind):
    controller = controller_for(make_settings(observation="normalised"), kind)
    controller.save(tmp_path / "c.safetensors")
    runtime = NumpyPolicy.load(tmp_path / "c.safetensors")
    policy = controller.policy(controller.record.layer_groups)
    assert runtime.labels == controller.record.labels
    assert runtime.record["base_lr"] == controller.record.base_lr
    state = before = None
    for row in np.random.default_rng(0).normal(size=(10, runtime.width)).astype(np.float32):
        odds, state = runtime.step(row, state)
        action, before = policy.predict(row, before, deterministic=True)
        np.testing.assert_array_equal(choose(odds, None), action)
        np.testing.assert_array_equal(state, before[0])


def test_the_numpy_runtime_takes_other_layer_groups(controller, path):
    names = [f"block{i}" for i in range(12)]
    runtime, policy = NumpyPolicy.load(path, names), controller.policy(names)
    assert runtime.labels == controller.observation(names).labels
    row = np.linspace(-1, 1, runtime.width, dtype=np.float32)
    np.testing.assert_array_equal(
        choose(runtime.step(row)[0], None), policy.predict(row, deterministic=True)[0]
    )


def test_the_numpy_runtime_tells_what_does_not_fit(make_settings, controller_for, path, tmp_path):
    controller_for(make_settings(), "per-feature").save(tmp_path / "p.safetensors")
    with pytest.raises(ValueError, match="`layer_groups` must be 5, .* got 2; a coordinate-wise"):
        NumpyPolicy.load(tmp_path / "p.safetensors", ["a", "b"])
    rewrite(path, lambda record: record.update(version=2))
    with pytest.raises(ValueError, match=r"version 1, got \('asg-env-controller', 2\)"):
        NumpyPolicy.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda record: record.pop("labels"),
            r"is damaged \(KeyError\('labels'\)\); export it again",
        ),
        (lambda record: record["network"].update(kind="transformer"), "is damaged .*'transformer'"),
        (lambda record: record.update(network=3), "is damaged"),
    ],
)
def test_the_numpy_runtime_tells_what_is_damaged(path, change, message):
    rewrite(path, change)
    with pytest.raises(ValueError, match=message):
        NumpyPolicy.load(path)


def test_the_numpy_runtime_tells_weights_that_cannot_be_used(controller, path):
    rewrite(path, lambda record: None, {n: t * torch.nan for n, t in controller.weights.items()})
    with pytest.raises(ValueError, match="is damaged: .* must be finite; export it again"):
        NumpyPolicy.load(path)
    controller.save(path)
    rewrite(path, lambda record: None, {"rnn.weight_hh_l0": controller.weights["rnn.weight_hh_l0"]})
    with pytest.raises(ValueError, match="is damaged .*KeyError"):
        NumpyPolicy.load(path)


def test_a_coordinate_wise_network_without_memory_is_refused(path):
    rewrite(path, lambda record: record["network"].update(memoryless=True))
    with pytest.raises(ConfigError, match="`memoryless` must be false for a coordinate-wise"):
        read_controller(path)
