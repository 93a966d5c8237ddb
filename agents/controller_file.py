"""A trained controller as one file: the weights of its network and what they are for."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, Strict, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from agents.coordinatewise import CoordinatewiseNetwork
from agents.lstm_policy import LSTMPolicyNetwork
from agents.numpy_policy import CONTROLLER_FORMAT, CONTROLLER_VERSION, order_problem
from agents.protocol import acts_greedily
from agents.recurrent_policy import Layout, RecurrentPolicy
from agents.run_folder import RunFolder, versions
from agents.train import load_policy
from asg_env.actions import ACTIONS, GridName
from asg_env.core.layer_groups import LARGEST_BASE_LR
from asg_env.core.optimizers import LRFactor, MomentumForm
from asg_env.files import replacing
from asg_env.observations import Observation, ObservationName
from asg_env.validation import ConfigError, Settings, validate

LARGEST_HIDDEN_SIZE = 4096  # a damaged file must not ask for all memory
# Lists, in JSON.
Names = Annotated[tuple[str, ...], Strict(False)]
Windows = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Strict(False)]


class NetworkRecord(Settings):
    """What the network is."""

    kind: Literal["per-feature", "coordinate-wise"]
    hidden_size: Annotated[int, Field(ge=1, le=LARGEST_HIDDEN_SIZE)]
    memoryless: bool

    @model_validator(mode="after")
    def _check_memory(self) -> "NetworkRecord":
        if self.memoryless and self.kind == "coordinate-wise":
            raise ValueError("`memoryless` must be false for a coordinate-wise network, got true")
        return self


class EncodingRecord(Settings):
    """How the policy sees a training and acts on it: the environment's settings."""

    observation: ObservationName
    action: Literal["grid", "relative"]
    grid: GridName
    start_multiplier: Annotated[float, Field(ge=0)]
    terms: Names  # guidance terms beside KL that it observes


class ControllerRecord(Settings):
    """All that the file says besides the weights.

    `greedy` says how it acts; the rest from `task` on is what it was trained on.
    """

    format: Literal["asg-env-controller"] = CONTROLLER_FORMAT
    version: Literal[1] = CONTROLLER_VERSION
    network: NetworkRecord
    encoding: EncodingRecord
    greedy: bool
    task: str
    instances: str
    layer_groups: Annotated[Names, Field(min_length=1)]  # or those that it was exported for
    labels: Names  # of the entries of an observation with these layer groups
    horizon: Annotated[int, Field(ge=1)]  # decisions of a training
    inner_steps: Annotated[int, Field(ge=1)]  # of a training
    growing_windows: Windows = ()  # inner steps from decision to decision, where they differ
    base_lr: Annotated[float, Field(gt=0, le=LARGEST_BASE_LR)]
    optimizer: str
    momentum_form: MomentumForm
    lr_factor: LRFactor
    provenance: dict[str, str]

    @model_validator(mode="after")
    def _check_windows(self) -> "ControllerRecord":
        windows = self.growing_windows
        if windows and (len(windows), sum(windows)) != (self.horizon, self.inner_steps):
            raise ValueError(
                f"`growing_windows` must be {self.horizon} that make {self.inner_steps} inner "
                f"steps, got {len(windows)} that make {sum(windows)}"
            )
        return self

    @property
    def windows(self) -> tuple[int, ...]:
        """Length of each window, in proportion."""
        return self.growing_windows or (1,) * self.horizon


@dataclass(frozen=True)
class Controller:
    """A controller that can be put to work on any training.

    Attributes:
        record: What it is.
        weights: State dict of its network.
    """

    record: ControllerRecord
    weights: dict[str, Tensor]

    def digest(self) -> str:
        """SHA-256 of its weights and of what they are for, which tells it from other controllers.

        Where it came from, under which versions, and whether it acts greedily do not count.
        """
        return hashlib.sha256(self._file(exclude={"provenance", "greedy"})).hexdigest()

    def observation(self, layer_groups: Sequence[str]) -> Observation:
        """Return its encoding of a training with these layer groups."""
        encoding = self.record.encoding
        return Observation(encoding.observation, layer_groups, encoding.grid, encoding.terms)

    def action(self, layer_groups: Sequence[str]) -> Any:
        """Return its encoding of actions for these layer groups."""
        encoding = self.record.encoding
        return ACTIONS[encoding.action](encoding.grid, len(layer_groups))

    def network(self, layer_groups: Sequence[str]) -> CoordinatewiseNetwork | LSTMPolicyNetwork:
        """Return the network for a training with these layer groups.

        Raises:
            ConfigError: It is for another number of groups, or the weights are of another network.
        """
        record, groups = self.record, tuple(layer_groups)
        if record.network.kind == "per-feature" and len(groups) != len(record.layer_groups):
            raise ConfigError(
                f"the controller is for {len(record.layer_groups)} layer groups "
                f"({', '.join(record.layer_groups)}), got {len(groups)}; train a coordinate-wise "
                "one, which takes any number"
            )
        layout = Layout.of(self.observation(groups).labels, groups, self.action(groups))
        size, generator = record.network.hidden_size, torch.Generator()
        network: CoordinatewiseNetwork | LSTMPolicyNetwork
        if record.network.kind == "coordinate-wise":
            network = CoordinatewiseNetwork(layout, size, generator)
        else:
            network = LSTMPolicyNetwork(layout, size, generator, record.network.memoryless)
        try:
            network.load_state_dict(self.weights)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise ConfigError(
                f"the weights are not those of the network that the controller says it is "
                f"({reason}); export it again"
            ) from None
        return network.requires_grad_(False)

    def for_layer_groups(self, layer_groups: Sequence[str]) -> "Controller":
        """Return the controller with a record for other layer groups, to be written for them.

        Args:
            layer_groups: Names, input to head.

        Raises:
            ConfigError: As `network`, or as `check_order`.
        """
        check_order(layer_groups, self.record.layer_groups)
        groups = tuple(layer_groups)
        self.network(groups)
        changes = {"layer_groups": groups, "labels": self.observation(groups).labels}
        return Controller(self.record.model_copy(update=changes), self.weights)

    def policy(self, layer_groups: Sequence[str]) -> RecurrentPolicy:
        """Return the policy for a training with these layer groups; errors as `network`."""
        return RecurrentPolicy(self.network(layer_groups))

    def save(self, path: Path) -> None:
        """Write the file, to a temporary name first."""
        with replacing(path) as temporary:
            temporary.write_bytes(self._file())  # with the usual permissions

    def _file(self, exclude: set[str] | None = None) -> bytes:
        return save(self.weights, {"controller": self.record.model_dump_json(exclude=exclude)})


def check_order(layer_groups: Sequence[str], learned: Sequence[str]) -> None:
    """Find out whether a controller can drive layer groups of these names.

    Raises:
        ConfigError: See `agents.numpy_policy.order_problem`.
    """
    problem = order_problem(layer_groups, learned)
    if problem:
        raise ConfigError(problem)


def controller_of(run: RunFolder, training_seed: int = 0, greedy: bool | None = None) -> Controller:
    """Return the controller of a run's training seed.

    Args:
        run: Of an agent with one of our networks.
        training_seed: Whose controller.
        greedy: Likeliest actions or draws; what the run's comparison chose if left out.

    Raises:
        ConfigError: The policy has another network, or there is no whole checkpoint.
    """
    experiment, policy = run.experiment, load_policy(run, training_seed)
    if not isinstance(policy, RecurrentPolicy):
        raise ConfigError(
            f"agent {experiment.agent.kind} has a network of its own kind; take a controller of "
            "reinforce, sequence-ppo or es, or export a schedule"
        )
    env, network, groups = experiment.env, policy.network, tuple(experiment.layer_groups)
    assert isinstance(network, CoordinatewiseNetwork | LSTMPolicyNetwork)
    windows = env.windows()
    values = {
        "network": {
            "kind": network.kind,
            "hidden_size": network.hidden_size,
            "memoryless": network.memoryless,
        },
        "encoding": {
            "observation": env.observation,
            "action": env.action,
            "grid": env.grid,
            "start_multiplier": env.start_multiplier,
            "terms": env.further_terms(),
        },
        "greedy": acts_greedily(run, training_seed) if greedy is None else greedy,
        "task": experiment.task,
        "instances": env.instances,
        "layer_groups": groups,
        "labels": Observation(env.observation, groups, env.grid, env.further_terms()).labels,
        "horizon": len(windows),
        "inner_steps": sum(windows),
        "growing_windows": windows if len(set(windows)) > 1 else (),
        "base_lr": env.base_lr,
        "optimizer": env.optimizer,
        "momentum_form": env.momentum_form,
        "lr_factor": env.lr_factor,
        "provenance": {
            "config_digest": experiment.digest(),
            "training_seed": str(training_seed),
            **versions(),
        },
    }
    weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    return Controller(validate(ControllerRecord, values, "controller"), weights)


def read_controller(path: Path | str) -> Controller:
    """Return a controller from its file or from a run folder (training seed 0).

    Raises:
        ConfigError: It is no controller, of a newer format, or damaged.
    """
    path = Path(path)
    if path.is_dir():
        return controller_of(RunFolder.open(path))
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        reason = "there is none" if not path.exists() else str(error).splitlines()[0]
        raise ConfigError(
            f"{path} cannot be read as a controller ({reason}); give a file of asg export, or a "
            "run folder"
        ) from None
    try:
        values = json.loads(metadata.get("controller", ""))
    except ValueError:
        values = None
    if not isinstance(values, dict) or values.get("format") != CONTROLLER_FORMAT:
        raise ConfigError(
            f"{path} is not a controller: it says nothing of the format "
            f"'{CONTROLLER_FORMAT}'; give a file of asg export"
        )
    if repr(values.get("version")) != repr(CONTROLLER_VERSION):  # true and 1.0 are no versions
        raise ConfigError(
            f"{path} has controller version {values.get('version')!r}, this asg-env reads "
            f"{CONTROLLER_VERSION}; use the asg-env that wrote it"
        )
    try:
        controller = Controller(validate(ControllerRecord, values, "controller"), weights)
        groups = controller.record.layer_groups
        controller.network(groups)
    except ConfigError as error:
        raise ConfigError(f"{path} is damaged: {error}") from None
    if controller.observation(groups).labels != controller.record.labels:
        raise ConfigError(
            f"{path} observes {', '.join(controller.record.labels)}, which this asg-env does not "
            "offer; use the asg-env that wrote it"
        )
    broken = [name for name, tensor in weights.items() if not tensor.isfinite().all()]
    if broken:
        raise ConfigError(f"{path} is damaged: {', '.join(broken)} must be finite; export it again")
    return controller
