"""The command `asg import-policy`: make a run of a policy that the original's code saved."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors import SafetensorError
from torch import Tensor

from agents.cli.options import Assignments, Overwrite, console
from agents.experiment import Experiment, load_experiment
from agents.run_folder import RunFolder
from asg_env.actions import GRIDS
from asg_env.build import task_to_train
from asg_env.observations import Observation
from asg_env.tasks.listing import DataError
from asg_env.tasks.weight_files import differences, read_state_dict
from asg_env.validation import ConfigError

# The decision process that the original's policy belongs to (docs/original.md, section 2).
NEEDED = {"observation": "asg", "action": "grid", "grid": "linear"}
FEATURES = Observation("asg", (), "linear").labels  # shared ones, each with its LSTM
LEVELS = len(GRIDS["linear"])
HIDDEN_SIZE, GROUPS = 20, 7  # the original's, for naming what a file lacks


@dataclass(frozen=True)
class PolicyShape:
    """The numbers that fix names and shapes of a policy's tensors.

    Attributes:
        hidden_size: Of each feature's LSTM.
        heads: Layer groups it sets the rates of.
        levels: Choices per head.
    """

    hidden_size: int
    heads: int
    levels: int

    def tensors(self) -> dict[str, Tensor]:
        """Names and shapes of the original's state dict, as tensors without content."""
        hidden, gates = self.hidden_size, 4 * self.hidden_size
        inputs = len(FEATURES) * hidden + 1  # all LSTM outputs and the group's own multiplier
        shapes: dict[str, tuple[int, ...]] = {}
        for feature in range(len(FEATURES)):
            rnn = f"net.state_encoder.{feature}.rnn"
            shapes |= {f"{rnn}.weight_ih_l0": (gates, 1), f"{rnn}.weight_hh_l0": (gates, hidden)}
            shapes |= {f"{rnn}.bias_ih_l0": (gates,), f"{rnn}.bias_hh_l0": (gates,)}
        for head in range(self.heads):
            linear = f"action_distribution.linear.{head}"
            shapes |= {f"{linear}.weight": (self.levels, inputs), f"{linear}.bias": (self.levels,)}
        shapes |= {"critic.fc.weight": (1, self.heads * inputs), "critic.fc.bias": (1,)}
        return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def read_policy(path: Path) -> tuple[dict[str, Tensor], PolicyShape]:
    """Read a policy's state dict; nothing in the file is executed.

    Args:
        path: A state dict saved by torch, or safetensors, with the original's names.

    Returns:
        Its tensors, float32, and what their shapes say.

    Raises:
        ConfigError: The file cannot be read, or holds another network.
    """
    try:
        state = read_state_dict(str(path))
    except DataError as error:
        raise ConfigError(str(error)) from None
    features = _count(state, "net.state_encoder")
    heads = _count(state, "action_distribution.linear")
    if features not in (0, len(FEATURES)):  # with none it is another network, see below
        raise ConfigError(
            f"{path} has LSTMs for {features} features, but the observation asg has "
            f"{len(FEATURES)} ({', '.join(FEATURES)}); give a policy with one LSTM for each"
        )
    names = PolicyShape(HIDDEN_SIZE, heads or GROUPS, LEVELS).tensors()
    _refuse(path, differences({name: state.get(name, names[name]) for name in names}, state))
    shape = PolicyShape(
        hidden_size=_size(state["net.state_encoder.0.rnn.weight_hh_l0"], -1),
        heads=heads,
        levels=_size(state["action_distribution.linear.0.weight"], 0),
    )
    _refuse(path, differences(shape.tensors(), state))
    for name, tensor in state.items():
        dense = tensor.layout == torch.strided and not tensor.is_meta
        if not (dense and tensor.is_floating_point() and bool(tensor.isfinite().all())):
            raise ConfigError(
                f"{path} must hold finite floating-point numbers, but {name} does not; save the "
                "policy again"
            )
    return {name: tensor.float() for name, tensor in state.items()}, shape


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    """Number of different N among names that start with `prefix.N.`."""
    found = (re.match(rf"{re.escape(prefix)}\.(\d+)\.", name) for name in state)
    return len({match[1] for match in found if match})


def _size(tensor: Tensor, dimension: int) -> int:
    return tensor.shape[dimension] if tensor.dim() else 1


def _refuse(path: Path, found: str) -> None:
    if found:
        raise ConfigError(
            f"{path} does not hold the original's policy network: {found}; give its whole state "
            "dict, as docs/original.md describes it"
        )


def import_policy_command(
    file: Annotated[Path, typer.Argument(help="State dict of the policy: .pth, .pt, ...")],
    out: Annotated[Path, typer.Option(help="Run folder to write.")],
    env: Annotated[
        str, typer.Option(help="Environment: name of a shipped one, or a path.")
    ] = "visda17-asg",
    recurrent: Annotated[
        bool,
        typer.Option(
            "--recurrent",
            help="Carry the recurrent state from step to step. The original's released code "
            "discarded it when acting, which is the default here.",
        ),
    ] = False,
    overwrite: Overwrite = False,
    settings: Assignments = None,
) -> None:
    """Make a run of a policy saved by the original's code, for evaluate, export and fit.

    The images of VisDA-17 are named by --set env.root=DIR. What training the policy cost is
    unknown: `asg evaluate` counts 0 episodes for it, and makes no static search unless --set
    train.search_episodes=N gives that a budget. Like the original, it draws its actions;
    --greedy of export and fit takes the likeliest.
    """
    if (out / "config.yaml").exists() and not overwrite:  # before images and network are loaded
        raise ConfigError(f"{out} already holds a run; add --overwrite or choose another --out")
    if file.resolve().is_relative_to(out.resolve()):
        raise ConfigError(f"FILE must lie outside --out, got {file}; choose another --out")
    state, shape = read_policy(file)
    experiment = _experiment(env, settings or (), shape, memoryless=not recurrent)
    _check_decisions(file, experiment, shape)
    groups = task_to_train(experiment.task, experiment.env).layer_groups
    if shape.heads != len(groups):
        raise ConfigError(
            f"{file} sets the rates of {shape.heads} layer groups, but {experiment.task} has "
            f"{len(groups)} here ({', '.join(groups)}); choose an "
            f"--env with {shape.heads}"
        )
    learner = experiment.agent_module.Learner(
        experiment.task,
        experiment.env,
        experiment.agent,
        experiment.seed,
        experiment.train.workers,
    )
    learner.policy.network.load_state_dict(state)
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    acting = "recurrent" if recurrent else "memoryless"
    run = RunFolder.create(out, experiment, resume=False, overwrite=overwrite)
    _fill(run, learner, {"file": file.name, "sha256": digest, "acting": acting})
    parameters = sum(tensor.numel() for tensor in state.values())
    console.print(
        f"{file}: {parameters:,} parameters, hidden size {shape.hidden_size}, {shape.heads} heads "
        f"of {shape.levels} levels, {acting}\nwritten: {out}",
        soft_wrap=True,
    )


def _experiment(
    env: str, settings: Sequence[str], shape: PolicyShape, memoryless: bool
) -> Experiment:
    for setting in settings:
        if not setting.startswith(("env.", "train.")):
            raise ConfigError(
                f"--set must look like env.root=DIR or train.workers=4 here, got {setting!r}; the "
                "agent is that of the file"
            )
    experiment = load_experiment(
        str(files("configs") / "import-policy.yaml"),
        [
            f"env={json.dumps(env, ensure_ascii=False)}",  # quoted: a path is text, not YAML
            *settings,
            f"agent.hidden_size={shape.hidden_size}",
            f"agent.memoryless={str(memoryless).lower()}",
        ],
    )
    if experiment.train.seeds != 1:
        raise ConfigError(
            f"`train.seeds` must be 1, as the file holds one policy, got "
            f"{experiment.train.seeds}; leave it out"
        )
    return experiment


def _check_decisions(file: Path, experiment: Experiment, shape: PolicyShape) -> None:
    for name, needed in NEEDED.items():
        if (now := getattr(experiment.env, name)) != needed:
            raise ConfigError(
                f"`env.{name}` must be {needed}, which the original's policies are made for, got "
                f"{now}; set env.{name}={needed}"
            )
    if shape.levels != LEVELS:
        raise ConfigError(
            f"{file} chooses among {shape.levels} levels, but the grid linear has {LEVELS}; give a "
            f"policy with {LEVELS}"
        )


def _fill(run: RunFolder, learner: Any, imported: dict[str, str]) -> None:
    """Add what an import has to a new run: its origin, and a checkpoint of no update of ours.

    Raises:
        ConfigError: The folder cannot be written.
    """
    checkpoint = run.seed_folder(0) / "checkpoints" / run.experiment.agent_module.CHECKPOINT
    try:
        started = json.loads((run.path / "provenance.json").read_text(encoding="utf-8"))
        run.write_json("provenance.json", {**started, "imported": imported})
        checkpoint.parent.mkdir(parents=True)
        learner.save(checkpoint, update=-1)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"{run.path} cannot be written ({reason}); choose another --out"
        ) from None
