"""Precision and choice of kernels."""

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch

NO_KERNEL = "does not have a deterministic implementation"  # in PyTorch's message

Precision = Literal["float32", "bfloat16"]


class NotRepeatableError(ValueError):
    """Repeatable kernels were asked for, but an operation has none."""


def autocast(precision: Precision, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Context for one forward pass; with `bfloat16` matrix products and convolutions run so.

    To be entered for each pass anew: its cache of cast weights must not outlive an update.
    """
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


@contextlib.contextmanager
def kernels(deterministic: bool, device: torch.device) -> Iterator[None]:
    """Choose CUDA kernels: the fastest for the shape, or repeatable ones.

    Elsewhere it changes nothing: on a CPU with one thread all kernels are repeatable.

    Raises:
        NotRepeatableError: An operation has no repeatable kernel.
    """
    if device.type != "cuda":
        yield
        return
    cudnn: Any = torch.backends.cudnn
    before = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    chosen = cudnn.benchmark, cudnn.deterministic
    # One by one: `cudnn.flags` reads whether TF32 is allowed, which raises where that was said in
    # PyTorch's newer way.
    cudnn.benchmark, cudnn.deterministic = not deterministic, deterministic
    torch.use_deterministic_algorithms(deterministic)
    try:
        yield
    except RuntimeError as error:
        operation, found, _ = str(error).partition(f" {NO_KERNEL}")
        if not found:
            raise
        raise NotRepeatableError(
            f"`deterministic` must be false here, as {operation} {NO_KERNEL} on "
            f"{device.type}; set env.deterministic=false"
        ) from error
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)
        cudnn.benchmark, cudnn.deterministic = chosen
