"""A controller's network for other runtimes: ONNX, and a program of `torch.export`.

Both take one decision: an observation, float32 (D,), and the recurrent state, float32 (2, W),
zeros at the start of a training; they return the probabilities of each layer group's choices,
float32 (G, M), and the next state. What an entry of an observation is, and what a choice does,
stands beside the network as the JSON record of `agents.controller_file`.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from agents.controller_file import Controller
from asg_env.files import replacing
from asg_env.validation import ConfigError

RECORD = "controller"  # key of the record in both files


class OneStep(nn.Module):
    """One decision of a controller for the layer groups of its record."""

    def __init__(self, controller: Controller) -> None:
        super().__init__()
        self.network = controller.network(controller.record.layer_groups)

    def forward(self, observation: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return probabilities, (G, M), and the next state, (2, W)."""
        log_probs, after = self.network(observation[None, None], state[:, None])
        return log_probs[0, 0].exp(), after[:, 0]

    def example(self) -> tuple[Tensor, Tensor]:
        """Return an observation and a state of zeros."""
        return torch.zeros(self.network.layout.width), self.network.initial_state(1)[:, 0]


def write_onnx(controller: Controller, path: Path) -> None:
    """Write the network as ONNX: inputs `observation`, `state`; `probabilities`, `next_state`.

    Raises:
        ConfigError: The packages of the extra `export` are not installed.
        OSError: The file cannot be written.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401  what torch.onnx builds the graph with
    except ImportError as error:
        raise ConfigError(
            f"--format onnx needs {error.name}, which is not installed; pip install "
            "'asg-env[export]'"
        ) from None
    step = OneStep(controller).eval()
    with _traced():
        program = torch.onnx.export(
            step,
            step.example(),
            input_names=["observation", "state"],
            output_names=["probabilities", "next_state"],
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    entry = model.metadata_props.add()
    entry.key, entry.value = RECORD, controller.record.model_dump_json()
    onnx.checker.check_model(model)
    with replacing(path) as temporary:
        onnx.save(model, str(temporary))


def write_torch(controller: Controller, path: Path) -> None:
    """Write the network as a program of `torch.export`, for `torch.export.load` and C++.

    Raises:
        OSError: The file cannot be written.
    """
    step = OneStep(controller).eval()
    with _traced():
        program = torch.export.export(step, step.example())
    files = {RECORD: controller.record.model_dump_json()}
    with replacing(path) as temporary:
        torch.export.save(program, temporary, extra_files=files)


@contextmanager
def _traced() -> Iterator[None]:
    """Without PyTorch's warning that tracing moves the weights of its own nn.LSTM about."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The tensor attributes .*_flat_weights")
        yield
