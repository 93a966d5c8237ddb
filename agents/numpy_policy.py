"""The policy networks in NumPy, one decision at a time: what acts, while PyTorch learns.

At this size PyTorch's calls take several times as long as the arithmetic. The networks are those
of `agents.lstm_policy` and `agents.coordinatewise`; probabilities agree with theirs to 1e-6. The
module needs nothing else of this package, and no PyTorch: copied beside a controller's file it is a
runtime for that.

Example:
    policy, state = NumpyPolicy.load("controller.safetensors"), None
    probabilities, state = policy.step(observation, state)  # policy.labels says of what
    choices = choose(probabilities, None)
"""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from safetensors import SafetensorError, safe_open

CONTROLLER_FORMAT: Final = "asg-env-controller"
CONTROLLER_VERSION: Final = 1
Weights = Mapping[str, np.ndarray]  # state dict of the PyTorch network, float32


class _Cell:
    """LSTMs side by side: (N, 1, I) inputs each through its own weights, or (N, I) through one's.

    PyTorch's gates in their order, i, f, g, o. A sigmoid is (1 + tanh(x / 2)) / 2, so with halved
    weights one tanh serves all four.
    """

    def __init__(self, weights: Weights, names: list[str]) -> None:
        self.hidden = weights[names[0] + "weight_hh_l0"].shape[1]
        halves = np.repeat(np.array([0.5, 0.5, 1, 0.5], np.float32), self.hidden)
        matrices, biases = [], []
        for name in names:
            rows = np.hstack((weights[name + "weight_ih_l0"], weights[name + "weight_hh_l0"]))
            matrices.append((rows * halves[:, None]).T)
            biases.append((weights[name + "bias_ih_l0"] + weights[name + "bias_hh_l0"]) * halves)
        self._scale, self._shift = halves, np.where(halves < 1, halves, 0).astype(np.float32)
        if len(names) == 1:
            self._matrix, self._bias = np.ascontiguousarray(matrices[0]), biases[0]
        else:
            self._matrix, self._bias = np.stack(matrices), np.stack(biases)[:, None]

    def __call__(self, inputs: np.ndarray, cell: np.ndarray) -> np.ndarray:
        """Return hidden and cell state, stacked, from [inputs, hidden state] and the cell state."""
        gates = np.matmul(inputs, self._matrix)
        gates += self._bias
        np.tanh(gates, out=gates)
        gates *= self._scale
        gates += self._shift
        size, after = self.hidden, np.empty((2, *cell.shape), np.float32)
        np.multiply(gates[..., size : 2 * size], cell, out=after[1])
        after[1] += gates[..., :size] * gates[..., 2 * size : 3 * size]
        np.multiply(gates[..., 3 * size :], np.tanh(after[1]), out=after[0])
        return after


class _PerFeature:
    """`agents.lstm_policy.LSTMPolicyNetwork`."""

    def __init__(self, weights: Weights, shared: np.ndarray, own: np.ndarray) -> None:
        self._shared, self._own = shared, own
        names = [f"net.state_encoder.{i}.rnn." for i in range(len(shared))]
        self._cell = _Cell(weights, names)
        heads = [f"action_distribution.linear.{i}." for i in range(len(own))]
        self._heads = np.stack([weights[name + "weight"].T for name in heads])
        self._biases = np.stack([weights[name + "bias"] for name in heads])
        self.state_width = len(shared) * self._cell.hidden

    def __call__(self, observation: np.ndarray, state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        hidden, cell = state.reshape(2, len(self._shared), 1, self._cell.hidden)
        values = observation[self._shared].reshape(-1, 1, 1)
        after = self._cell(np.concatenate((values, hidden), axis=2), cell).reshape(2, -1)
        seen = np.empty((len(self._own), 1, self._heads.shape[1]), np.float32)
        seen[:, 0, : self.state_width] = after[0]
        seen[:, 0, self.state_width :] = observation[self._own]
        return np.matmul(seen, self._heads)[:, 0] + self._biases, after


class _Coordinatewise:
    """`agents.coordinatewise.CoordinatewiseNetwork`; `own` may be of any number of groups."""

    def __init__(self, weights: Weights, shared: np.ndarray, own: np.ndarray) -> None:
        groups = len(own)
        self._entries = np.hstack((np.tile(shared, (groups, 1)), own))
        self._cell = _Cell(weights, ["rnn."])
        self._head = weights["actor.weight"].T.copy()
        self._bias = weights["actor.bias"].copy()
        self.state_width = groups * self._cell.hidden
        depth = np.linspace(-1, 1, groups) if groups > 1 else np.ones(1)
        ends = np.arange(groups) == 0, np.arange(groups) == groups - 1
        self._place = np.stack((depth, *ends), axis=1).astype(np.float32)

    def __call__(self, observation: np.ndarray, state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        hidden, cell = state.reshape(2, len(self._place), self._cell.hidden)
        seen = np.concatenate((observation[self._entries], self._place, hidden), axis=1)
        after = self._cell(seen, cell)
        seen[:, -self._cell.hidden :] = after[0]
        return seen @ self._head + self._bias, after.reshape(2, -1)


NETWORKS: dict[str, type[_PerFeature] | type[_Coordinatewise]] = {
    "per-feature": _PerFeature,
    "coordinate-wise": _Coordinatewise,
}


def split_labels(
    labels: Sequence[str], layer_groups: Sequence[str]
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """Return which entries of an observation concern the whole optimizee, and each layer group's.

    Args:
        labels: Of the entries; those of a layer group end in `/` and its name.
        layer_groups: Names, input to head.
    """
    shared = tuple(i for i, label in enumerate(labels) if "/" not in label)
    places, quantities = {label: i for i, label in enumerate(labels)}, _quantities(labels)
    return shared, tuple(tuple(places[f"{q}/{g}"] for q in quantities) for g in layer_groups)


def _quantities(labels: Sequence[str]) -> list[str]:
    """What an observation says of every layer group, in its order."""
    return list(dict.fromkeys(label.partition("/")[0] for label in labels if "/" in label))


def order_problem(layer_groups: Sequence[str], learned: Sequence[str]) -> str:
    """Say why a controller cannot drive layer groups of these names, or nothing if it can.

    Args:
        layer_groups: Of the network that it is to drive, input to head; by any names.
        learned: Those of its training; where names are shared, their order is.
    """
    names = list(layer_groups)
    if isinstance(layer_groups, str) or not (names and all(names) and len({*names}) == len(names)):
        return (
            f"layer groups must be different names, none empty, got {layer_groups!r}; name each "
            "group once, input to head"
        )
    known = [name for name in names if name in learned]
    ordered = [name for name in learned if name in known]
    if known != ordered:
        return (
            f"layer groups must be in the order {ordered}, input to head, as where the controller "
            f"was trained, got {known}; put them so"
        )
    if learned[-1] in known and names[-1] != learned[-1]:
        return (
            f"layer groups must go from input to head, with '{learned[-1]}' last, as where the "
            f"controller was trained, got {names}; put them so"
        )
    return ""


class NumpyPolicy:
    """A policy network of given weights, as it acts.

    Args:
        weights: State dict of the network.
        network: What it is: `kind`, `per-feature` or `coordinate-wise`; `shared`, the entries of
            an observation that concern the whole optimizee; `per_group`, those of each layer
            group; `memoryless`, whether every step starts from zeros.

    Attributes:
        width: Entries of an observation, D.
        record: What a controller's file says beside the weights; empty without a file.
        labels: Of the entries of an observation; empty without a file.
    """

    record: Mapping[str, Any] = {}
    labels: tuple[str, ...] = ()

    def __init__(self, weights: Weights, network: Mapping[str, Any]) -> None:
        shared, own = np.array(network["shared"], int), np.array(network["per_group"], int)
        self._network = NETWORKS[network["kind"]](weights, shared, own)
        self._memoryless = bool(network["memoryless"])
        self.width = shared.size + own.size

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], layer_groups: Sequence[str] | None = None
    ) -> "NumpyPolicy":
        """Read a controller's file.

        Args:
            path: Of `asg export --format controller`.
            layer_groups: Names, input to head, of the network that it is to drive; those of its
                training if left out.

        Raises:
            ValueError: The file is no controller, of another version, or damaged; or the
                controller is for another number of layer groups.
        """
        try:
            with safe_open(os.fspath(path), framework="np") as file:
                record = json.loads((file.metadata() or {}).get("controller", "{}"))
                weights = {name: file.get_tensor(name) for name in file.keys()}
        except (OSError, SafetensorError, ValueError) as error:
            reason = "it is a folder" if os.path.isdir(path) else error
            raise ValueError(
                f"{path} cannot be read as a controller ({reason}); give a file of asg export"
            ) from None
        found: tuple[Any, Any] = (None, None)
        if isinstance(record, dict):
            found = record.get("format"), record.get("version")
        if repr(found) != repr((CONTROLLER_FORMAT, CONTROLLER_VERSION)):  # true is no version
            raise ValueError(
                f"{path} must be of format {CONTROLLER_FORMAT}, version {CONTROLLER_VERSION}, got "
                f"{found}; give a file of asg export, read by the asg-env that wrote it"
            )
        try:
            learned, labels, network = record["layer_groups"], record["labels"], record["network"]
            problem = order_problem(learned if layer_groups is None else layer_groups, learned)
            if problem:
                raise ValueError(problem)
            groups = list(learned if layer_groups is None else layer_groups)
            if network["kind"] == "per-feature" and len(groups) != len(learned):
                raise ValueError(
                    f"`layer_groups` must be {len(learned)}, as in the controller's training, got "
                    f"{len(groups)}; a coordinate-wise controller takes any number"
                )
            labels = [label for label in labels if "/" not in label] + [
                f"{quantity}/{group}" for quantity in _quantities(labels) for group in groups
            ]
            shared, per_group = split_labels(labels, groups)
            policy = cls(weights, {**network, "shared": shared, "per_group": per_group})
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is damaged ({error!r}); export it again") from None
        broken = [name for name, array in weights.items() if not np.isfinite(array).all()]
        if broken:
            raise ValueError(
                f"{path} is damaged: {', '.join(broken)} must be finite; export it again"
            )
        policy.record, policy.labels = record, tuple(labels)
        return policy

    def step(
        self, observation: np.ndarray, state: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the probabilities of each group's choices, float64 (G, M), and the next state.

        Args:
            observation: Shape (D,).
            state: As returned before, float32, shape (2, W); None for zeros.

        Raises:
            ValueError: The observation has another width, or the state another shape.
        """
        observation = np.asarray(observation)
        if observation.shape != (self.width,):
            raise ValueError(
                f"observations must have the shape ({self.width},), got {observation.shape}"
            )
        if state is None or self._memoryless:
            state = np.zeros((2, self._network.state_width), np.float32)
        if state.shape != (2, self._network.state_width):
            raise ValueError(
                f"states must have the shape (2, {self._network.state_width}), got {state.shape}; "
                "give the one that the step before returned, or None"
            )
        logits, after = self._network(observation.astype(np.float32, copy=False), state)
        largest = np.maximum.reduce(logits, axis=1, keepdims=True)
        odds = np.exp(np.subtract(logits, largest, dtype=np.float64))
        odds /= np.add.reduce(odds, axis=1, keepdims=True)
        return odds, np.zeros_like(state) if self._memoryless else after


def choose(odds: np.ndarray, generator: np.random.Generator | None) -> np.ndarray:
    """Choose for every row of probabilities, (G, M): drawn, or the likeliest without a generator.

    Returns:
        Indices, int64, shape (G,).
    """
    if generator is None:
        return np.asarray(odds.argmax(axis=1))
    below = np.add.accumulate(odds, axis=1)[:, :-1] < generator.random((len(odds), 1))
    return np.asarray(np.add.reduce(below, axis=1))
