"""Checkpoints of SB3 agents: SB3's own zip, with entries of ours.

SB3's part holds pickles, which can run any code when loaded: give `PPO.load` and the like only
files that you trust. What is read here is its tensors, with torch's `weights_only`, JSON, and
NumPy arrays without pickles.
"""

import io
import json
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from agents.sb3.algorithms import Statistics, frozen_normaliser
from asg_env.files import replacing
from asg_env.validation import ConfigError

# Entries of ours; SB3 passes over them.
PROGRESS = "asg-env.json"  # what is finished, in numbers
STATISTICS = "asg-env-normaliser.npz"
BUFFER = "asg-env-replay-buffer.npz"  # the part of it that is filled
BUFFER_ARRAYS = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")


@dataclass(frozen=True)
class Stored:
    """What a checkpoint holds.

    Attributes:
        progress: Numbers of what is finished.
        tensors: State dicts, by SB3's names.
        variables: Further tensors, by SB3's names.
        statistics: Of the normaliser; empty for none.
    """

    progress: dict[str, Any]
    tensors: dict[str, Any]
    variables: dict[str, torch.Tensor]
    statistics: Statistics


def write(
    path: Path, model: BaseAlgorithm, statistics: Statistics, progress: dict[str, Any]
) -> None:
    """Write a checkpoint with the replay buffer, under a temporary name that is then renamed."""
    with replacing(path) as temporary:
        model.save(temporary)
        add_entries(temporary, statistics, progress)
        buffer = _buffer_of(model)
        if buffer is not None:
            arrays = {name: getattr(buffer, name)[: buffer.size()] for name in BUFFER_ARRAYS}
            with zipfile.ZipFile(temporary, "a") as archive:
                archive.writestr(BUFFER, _packed({**arrays, "pos": np.array(buffer.pos)}))


def add_entries(path: Path, statistics: Statistics, progress: dict[str, Any]) -> None:
    """Add to a zip that SB3 has written what a policy needs beside it."""
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(PROGRESS, json.dumps(progress))
        if statistics:
            archive.writestr(STATISTICS, _packed(statistics))


def read(path: Path) -> Stored:
    """Read a checkpoint but for its replay buffer; call it within `one_sentence`."""
    with zipfile.ZipFile(path) as archive:
        progress = json.loads(archive.read(PROGRESS))
        statistics = _unpacked(archive.read(STATISTICS)) if STATISTICS in archive.namelist() else {}
    _, tensors, variables = load_from_zip_file(path, load_data=False, device="cpu")
    return Stored(progress, dict(tensors), dict(variables or {}), statistics)


def read_buffer(path: Path, model: BaseAlgorithm) -> None:
    """Fill the replay buffer of an off-policy algorithm; call it within `one_sentence`."""
    buffer = _buffer_of(model)
    if buffer is None:
        return
    with zipfile.ZipFile(path) as archive:
        arrays = _unpacked(archive.read(BUFFER))
    rows = len(arrays["rewards"])
    if rows > buffer.buffer_size:
        raise ValueError(f"its replay buffer has {rows} rows")
    for name in BUFFER_ARRAYS:
        getattr(buffer, name)[:rows] = arrays[name]
    buffer.pos, buffer.full = int(arrays["pos"]), rows == buffer.buffer_size


def load_normaliser(path: Path, envs: VecEnv) -> VecNormalize:
    """Wrap environments as a checkpoint's policy saw them, for use with SB3's own `load`.

    Statistics are frozen and rewards are left as they are; `training` and `norm_reward` of the
    result change that.

    Args:
        path: A checkpoint or another zip that a training wrote.
        envs: Environments with the observations that the policy was trained on.

    Raises:
        ConfigError: The file is damaged, or nothing was normalised in its training.
    """
    with one_sentence(path):
        statistics = read(path).statistics
    if not statistics:
        raise ConfigError(f"{path} has no statistics to load: its training normalised nothing")
    with one_sentence(path):
        return frozen_normaliser(statistics, envs)


@contextmanager
def one_sentence(path: Path) -> Iterator[None]:
    """Turn what a damaged checkpoint raises into a ConfigError."""
    try:
        yield
    except (
        AttributeError,
        OSError,
        EOFError,
        KeyError,
        RuntimeError,
        TypeError,
        UnpicklingError,
        ValueError,
        zipfile.BadZipFile,
    ) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"{path} is no whole checkpoint of this agent ({reason}); "
            "restore it from a copy or train anew"
        ) from None


def _buffer_of(model: Any) -> ReplayBuffer | None:
    return getattr(model, "replay_buffer", None)


def _packed(arrays: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def _unpacked(packed: bytes) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(packed), allow_pickle=False) as arrays:
        return dict(arrays)
