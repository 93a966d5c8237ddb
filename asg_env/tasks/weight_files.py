"""Files of weights: reading one safely, and saying how it differs from a model."""

import os
import pickle
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from asg_env.tasks.listing import DataError

SUFFIXES = (".safetensors", ".pth", ".pt", ".pth.tar")
WRAPPERS = ("state_dict", "model")  # keys under which training scripts store the weights
NAMED = 3  # mismatching names of each kind in a message


def is_path(weights: str) -> bool:
    """Whether `weights` means a file: it has a path separator or a known suffix."""
    return "/" in weights or os.sep in weights or weights.endswith(SUFFIXES)


def read_state_dict(path: str) -> dict[str, Tensor]:
    """Read tensors by name; nothing in the file is executed.

    A state dict under the key `state_dict` or `model` is found there, and the prefix `module.`
    of data-parallel training is dropped.

    Raises:
        DataError: The file is missing, of another kind, damaged, or holds more than tensors.
    """
    if not path.endswith(SUFFIXES):
        raise DataError(f"a file of weights must end in one of {', '.join(SUFFIXES)}, got {path}")
    file = Path(path).expanduser()
    try:
        if path.endswith(".safetensors"):
            content: Any = load_file(str(file))
        else:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{path} is damaged or holds more than tensors, which could run code when read; save "
            "the state dict alone"
        ) from error
    except Exception as error:  # OSError, SafetensorError, and anything from a damaged pickle
        raise DataError(
            f"{path} cannot be read ({first_line(error)}); give a file of weights"
        ) from error
    inner = [content[key] for key in WRAPPERS if isinstance(content, dict) and key in content]
    state: Any = inner[0] if inner else content
    if not isinstance(state, dict) or not state:
        raise DataError(
            f"{path} must hold a state dict, got {type(state).__name__}; save the state dict alone"
        )
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise DataError(
                f"{path} must map names to tensors, got {type(value).__name__} under {key!r}; "
                "save the state dict alone"
            )
    consume_prefix_in_state_dict_if_present(state, "module.")
    return state


def differences(model: Mapping[str, Tensor], file: Mapping[str, Tensor]) -> str:
    """Name the first few names that are missing, unexpected or of another shape; "" if none."""
    kinds = {
        "missing in the file": [name for name in model if name not in file],
        "unexpected in the file": [name for name in file if name not in model],
        "of another shape": [
            f"{name} {tuple(file[name].shape)} instead of {tuple(tensor.shape)}"
            for name, tensor in model.items()
            if name in file and file[name].shape != tensor.shape
        ],
    }
    return "; ".join(
        f"{len(names)} {kind}: {', '.join(islice(names, NAMED))}" + ", ..." * (len(names) > NAMED)
        for kind, names in kinds.items()
        if names
    )


def first_line(error: BaseException) -> str:
    """What a library says of an error, fit for the middle of a sentence."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".:") if lines else type(error).__name__
