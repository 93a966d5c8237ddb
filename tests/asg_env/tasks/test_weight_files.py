import pytest
import torch
from safetensors.torch import save_file

from asg_env.tasks.listing import DataError
from asg_env.tasks.weight_files import differences, is_path, read_state_dict


@pytest.fixture
def state():
    return {"conv.weight": torch.arange(6.0).view(2, 3), "conv.bias": torch.ones(2)}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ("pretrained", False),
        ("IMAGENET1K_V1", False),
        ("teacher.pth", True),
        ("teacher.pth.tar", True),
        ("teacher.pt", True),
        ("teacher.safetensors", True),
        ("folder/teacher", True),
    ],
)
def test_is_path_knows_files_by_separator_or_suffix(weights, expected):
    assert is_path(weights) is expected


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".pth.tar", ".safetensors"])
def test_read_state_dict_gives_back_what_was_saved(tmp_path, state, suffix):
    path = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(state, path)

    assert same(read_state_dict(str(path)), state)


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_read_state_dict_unwraps_training_checkpoints(tmp_path, state, key):
    path = tmp_path / "checkpoint.pth.tar"
    parallel = {f"module.{name}": tensor for name, tensor in state.items()}
    torch.save({"epoch": 3, key: parallel}, path)

    assert same(read_state_dict(str(path)), state)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.nn.Linear(2, 2), r"damaged or holds more than tensors, which could run code"),
        ([1, 2], r"must hold a state dict, got list"),
        ({}, r"must hold a state dict, got dict"),
        ({"model": 3}, r"must hold a state dict, got int"),
        ({"epoch": 3}, r"must map names to tensors, got int under 'epoch'"),
    ],
)
def test_read_state_dict_refuses_other_contents(tmp_path, content, message):
    path = tmp_path / "weights.pth"
    torch.save(content, path)

    with pytest.raises(DataError, match=message):
        read_state_dict(str(path))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"no weights at all"])
def test_read_state_dict_refuses_damaged_files(tmp_path, suffix, content):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)

    with pytest.raises(DataError, match=r"weights\.\w+ (cannot be read|is damaged)"):
        read_state_dict(str(path))


def test_read_state_dict_refuses_missing_files_and_other_suffixes(tmp_path):
    with pytest.raises(DataError, match=r"gone\.pth cannot be read .*No such file"):
        read_state_dict(str(tmp_path / "gone.pth"))
    with pytest.raises(DataError, match=r"must end in one of \.safetensors, \.pth, .*got .*x\.bin"):
        read_state_dict(str(tmp_path / "x.bin"))


def test_differences_names_at_most_three_of_each_kind():
    model = {name: torch.zeros(2) for name in "abcde"} | {"w": torch.zeros(2, 3)}
    file = {name: torch.zeros(2) for name in "xy"} | {"w": torch.zeros(4)}

    assert differences(model, file) == (
        "5 missing in the file: a, b, c, ...; 2 unexpected in the file: x, y; "
        "1 of another shape: w (4,) instead of (2, 3)"
    )
    assert differences(model, model) == ""
