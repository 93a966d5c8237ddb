import pytest
import torch

from asg_env.core.numerics import NotRepeatableError, kernels

cudnn = torch.backends.cudnn


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("deterministic", [True, False])
def test_kernels_of_cuda_leave_alone_what_they_do_not_choose(monkeypatch, enabled, deterministic):
    monkeypatch.setattr(cudnn, "enabled", enabled)
    monkeypatch.setattr(cudnn, "allow_tf32", enabled)

    with kernels(deterministic, torch.device("cuda")):
        assert cudnn.enabled is enabled
        assert cudnn.allow_tf32 is enabled
        assert (cudnn.benchmark, cudnn.deterministic) == (not deterministic, deterministic)
        assert torch.are_deterministic_algorithms_enabled() is deterministic

    assert (cudnn.enabled, cudnn.benchmark, cudnn.deterministic) == (enabled, False, False)
    assert not torch.are_deterministic_algorithms_enabled()


def test_kernels_of_cuda_stand_beside_tf32_said_in_the_newer_way():
    before = cudnn.conv.fp32_precision
    cudnn.conv.fp32_precision = "ieee"
    try:
        with pytest.raises(RuntimeError):
            assert cudnn.allow_tf32  # what reads the older way fails from here on
        with kernels(True, torch.device("cuda")):
            assert cudnn.conv.fp32_precision == "ieee"
    finally:
        cudnn.conv.fp32_precision = before


def test_kernels_of_cuda_put_back_that_a_user_wants_warnings_only():
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with kernels(True, torch.device("cuda")):
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_kernels_of_a_cpu_change_nothing():
    with kernels(True, torch.device("cpu")):
        assert not cudnn.deterministic
        assert not torch.are_deterministic_algorithms_enabled()


MESSAGE = "bincount_cuda does not have a deterministic implementation, but you set 'torch.use_d"


def test_operation_without_a_repeatable_kernel_names_the_setting():
    with (
        pytest.raises(NotRepeatableError, match=r"^`deterministic` .* as bincount_cuda does not "),
        kernels(True, torch.device("cuda")),
    ):
        raise RuntimeError(MESSAGE)
    assert not torch.are_deterministic_algorithms_enabled()


def test_other_errors_pass_unchanged():
    with (
        pytest.raises(torch.OutOfMemoryError, match=r"^CUDA out of memory$"),
        kernels(True, torch.device("cuda")),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory")
