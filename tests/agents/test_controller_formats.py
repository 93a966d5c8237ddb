"""The four runtimes of a controller's network agree over whole episodes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from agents.controller_file import read_controller
from agents.controller_formats import write_onnx, write_torch
from agents.numpy_policy import NumpyPolicy
from agents.rollout import run_policy
from asg_env.validation import ConfigError

KINDS = ["coordinate-wise", "per-feature", "shipped"]  # the last has been trained
EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


class Watched:
    """A policy that keeps what it sees."""

    def __init__(self, policy) -> None:
        self._policy, self.seen = policy, []
        self.seed = policy.seed

    def predict(self, observation, *arguments, **options):
        self.seen.append(observation)
        return self._policy.predict(observation, *arguments, **options)


@pytest.fixture(params=KINDS)
def controller(request, make_env, controller_for):
    if request.param == "shipped":
        return read_controller(EXAMPLES / "controller.safetensors")
    return controller_for(make_env(observation="normalised", horizon=6).settings, request.param)


@pytest.fixture
def seen(controller, make_env, instance):
    """Observations of a whole episode, (T, D)."""
    env = make_env(observation="normalised", horizon=controller.record.horizon)
    policy = Watched(controller.policy(env.trainer.layer_groups))
    episode = run_policy(env, policy, instance, seed=1, deterministic=True)
    assert not episode.diverged
    return np.stack(policy.seen)


def in_torch(controller, seen):
    network = controller.network(controller.record.layer_groups)
    with torch.no_grad():
        log_probs, _ = network(torch.from_numpy(seen)[:, None], network.initial_state(1))
    return log_probs[:, 0].exp().numpy()


def zeros(controller):
    return controller.network(controller.record.layer_groups).initial_state(1)[:, 0]


def test_numpy_agrees_with_torch(controller, seen, tmp_path):
    controller.save(tmp_path / "c.safetensors")
    policy, state, found = NumpyPolicy.load(tmp_path / "c.safetensors"), None, []
    for row in seen:
        odds, state = policy.step(row, state)
        found.append(odds)
    np.testing.assert_allclose(found, in_torch(controller, seen), rtol=0, atol=1e-6)


def test_onnx_agrees_with_torch(controller, seen, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    write_onnx(controller, tmp_path / "c.onnx")
    session = runtime.InferenceSession(tmp_path / "c.onnx", providers=["CPUExecutionProvider"])
    state, found = zeros(controller).numpy(), []
    for row in seen:
        odds, state = session.run(
            ["probabilities", "next_state"], {"observation": row, "state": state}
        )
        found.append(odds)
    np.testing.assert_allclose(found, in_torch(controller, seen), rtol=0, atol=1e-6)
    record = json.loads(session.get_modelmeta().custom_metadata_map["controller"])
    assert record["labels"] == list(controller.record.labels)
    assert [p.name for p in tmp_path.iterdir()] == ["c.onnx"]


def test_a_program_of_torch_export_agrees_with_torch(controller, seen, tmp_path):
    write_torch(controller, tmp_path / "c.pt2")
    files = {"controller": ""}
    program = torch.export.load(tmp_path / "c.pt2", extra_files=files).module()
    state, found = zeros(controller), []
    for row in torch.from_numpy(seen):
        odds, state = program(row, state)
        found.append(odds.detach().numpy())
    np.testing.assert_allclose(found, in_torch(controller, seen), rtol=0, atol=1e-6)
    assert json.loads(files["controller"])["layer_groups"] == list(controller.record.layer_groups)


def test_onnx_and_torch_export_are_written_for_other_layer_groups_too(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    names = ["stem", *(f"block{i}" for i in range(1, 7)), "norm", "head"]
    original = read_controller(EXAMPLES / "controller.safetensors")
    controller = original.for_layer_groups(names)
    numbers = np.random.default_rng(0)
    rows = numbers.normal(size=(15, len(controller.record.labels))).astype(np.float32)
    expected = in_torch(controller, rows)
    assert expected.shape[1] == len(names)
    write_onnx(controller, tmp_path / "c.onnx")
    write_torch(controller, tmp_path / "c.pt2")
    original.save(tmp_path / "c.safetensors")
    session = runtime.InferenceSession(tmp_path / "c.onnx", providers=["CPUExecutionProvider"])
    program = torch.export.load(tmp_path / "c.pt2").module()
    policy = NumpyPolicy.load(tmp_path / "c.safetensors", names)
    record = json.loads(session.get_modelmeta().custom_metadata_map["controller"])
    assert record["layer_groups"] == names
    assert record["labels"] == list(policy.labels)
    onnx_state, torch_state, numpy_state = zeros(controller).numpy(), zeros(controller), None
    for row, odds in zip(rows, expected, strict=True):
        in_onnx, onnx_state = session.run(None, {"observation": row, "state": onnx_state})
        in_program, torch_state = program(torch.from_numpy(row), torch_state)
        in_numpy, numpy_state = policy.step(row, numpy_state)
        for found in (in_onnx, in_program.detach().numpy(), in_numpy):
            np.testing.assert_allclose(found, odds, rtol=0, atol=1e-6)


def test_a_controller_is_not_made_for_layer_groups_that_it_cannot_drive(controller, tmp_path):
    controller.save(tmp_path / "c.safetensors")
    for names, message in (
        ([], "must be different names, none empty, got"),
        (["body", "body"], "must be different names"),
        (["body", ""], "must be different names"),
        ("body", "must be different names, none empty, got 'body'"),
        (["head", "conv4"], r"must be in the order \['conv4', 'head'\]"),
        (["head", "body"], "must go from input to head, with 'head' last"),
    ):
        with pytest.raises(ConfigError, match=f"^layer groups {message}"):
            controller.for_layer_groups(names)
        with pytest.raises(ValueError, match=f"^layer groups {message}"):
            NumpyPolicy.load(tmp_path / "c.safetensors", names)
    if controller.record.network.kind == "per-feature":
        with pytest.raises(ConfigError, match="is for 5 layer groups .*, got 2; train a coord"):
            controller.for_layer_groups(["body", "head"])


@pytest.fixture
def memoryless(make_settings, controller_for):
    controller = controller_for(make_settings(), "per-feature")
    network = controller.record.network.model_copy(update={"memoryless": True})
    record = controller.record.model_copy(update={"network": network})
    return type(controller)(record, controller.weights)


def test_memoryless_policies_are_written_as_onnx_too(memoryless, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    write_onnx(memoryless, tmp_path / "c.onnx")
    session = runtime.InferenceSession(tmp_path / "c.onnx", providers=["CPUExecutionProvider"])
    rows = np.linspace(-1, 1, 2 * len(memoryless.record.labels), dtype=np.float32).reshape(2, -1)
    expected = in_torch(memoryless, rows)
    for state in (zeros(memoryless).numpy(), np.ones_like(zeros(memoryless).numpy())):
        for row, odds in zip(rows, expected, strict=True):
            found, after = session.run(
                ["probabilities", "next_state"], {"observation": row, "state": state}
            )
            np.testing.assert_allclose(found, odds, rtol=0, atol=1e-6)
            assert not after.any()


def test_memoryless_policies_are_written_too(memoryless, tmp_path):
    controller, record = memoryless, memoryless.record
    write_torch(memoryless, tmp_path / "c.pt2")
    program = torch.export.load(tmp_path / "c.pt2").module()
    row = torch.linspace(-1, 1, len(record.labels))
    first, after = program(row, zeros(controller))
    assert not after.any()
    torch.testing.assert_close(program(row, torch.ones_like(after))[0], first)


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_a_missing_package_is_told(controller, tmp_path, monkeypatch, package):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(ConfigError, match=rf"needs {package}.*; pip install 'asg-env\[export\]'"):
        write_onnx(controller, tmp_path / "c.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("write", [write_onnx, write_torch])
def test_files_that_cannot_be_written_leave_nothing(controller, tmp_path, monkeypatch, write):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("asg_env.files.os.replace", refuse)
    with pytest.raises(OSError, match="No space left"):
        write(controller, tmp_path / "c.bin")
    assert not list(tmp_path.iterdir())
