import json

import pytest

from asg_env.tasks import SUMMARIES
from asg_env.tasks.image_folder import list_images

FOLDERS, VISDA = "ASG/ImageFolder-v0", "ASG/VisDA17-v0"


@pytest.fixture
def info(asg):
    """Run `asg info` for a task; values are assigned by --set; return what it describes."""

    def run(task, **values):
        result = asg("info", "--task", task, *assignments(values))
        assert result.status == 0, result.err
        return json.loads(result.out)["task"]

    return run


@pytest.fixture
def fails(asg):
    """Run `asg info`, which must fail: status 2 and one sentence; return the sentence."""

    def run(*arguments):
        result = asg("info", *arguments)
        assert result.status == 2, result.out
        assert (result.out, result.err.count("\n")) == ("", 1)
        return result.err

    return run


def assignments(values):
    return [part for name, value in values.items() for part in ("--set", f"env.{name}={value}")]


@pytest.fixture
def small(image_folders):
    source, target = image_folders
    backbone = {"backbone": "torchvision:resnet18", "weights": "random", "image_size": 32}
    return {"source": source, "target": target, **backbone}


def test_info_describes_image_folders(info, small):
    task = info(FOLDERS, **small)

    assert task["id"] == FOLDERS
    assert task["summary"] == SUMMARIES[FOLDERS]
    assert task["splits"] == {
        **{"train": 20, "inner_valid": 4, "outer_valid": 4, "test": 20, "old_task": 4}
    }
    assert task["unlabelled"] == ["old_task"]
    groups = ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "head"]
    assert list(task["layer_groups"]) == groups
    assert task["storage"] == "image files, decoded every time, batch by batch, one batch ahead"
    assert task["teacher"] == "outputs remembered"
    # ResNet-18 without its last layer, and Linear-512-ReLU-Linear for four classes.
    assert task["parameters"] == 11_176_512 + 512 * 512 + 512 + 512 * 4 + 4
    assert len(task["data_digest"]) == 64
    assert task["reference_digest"] is task["same_data_as_reference"] is None


def test_info_describes_a_store(info, small, image_folders, make_store):
    store = make_store(list_images(*image_folders, target_labels=True))
    del small["source"], small["target"]

    task = info(FOLDERS, **small, store=store)

    assert task["splits"]["train"] == 20
    assert task["storage"] == "the memory-mapped store, batch by batch, one batch ahead"


def test_info_describes_what_the_settings_change(info, small):
    task = info(
        FOLDERS, **small, target_labels="false", augmentation="flip-crop", inner_valid_fraction=0
    )

    assert set(task["splits"]) == {"train", "outer_valid", "old_task"}
    assert task["unlabelled"] == ["outer_valid", "old_task"]
    assert task["teacher"] == "computed at every step, as images are augmented (flip-crop)"


def test_info_describes_visda(info, small, visda_root):
    task = info(VISDA, root=visda_root, backbone=small["backbone"], weights="random", image_size=32)

    assert task["splits"]["train"] == 12 * 4


def test_info_says_that_the_digits_are_resident(info):
    task = info("ASG/Digits-v0")

    assert task["storage"] == "resident on cpu"
    assert task["unlabelled"] == []
    assert task["same_data_as_reference"] == (task["data_digest"] == task["reference_digest"])


def test_info_asks_for_the_images(fails):
    assert fails("--task", VISDA) == (
        "asg: `root` must name the folder that holds train/ and validation/, or `store` one made "
        "by asg prepare, got neither; set env.root\n"
    )
    assert "set env.source and env.target" in fails("--task", FOLDERS)
    assert "--set belong to a task; add --task ID" in fails("--set", "env.root=/data")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("root=/data", "--set must look like env.batch_size=16 here, got 'root=/data'"),
        (
            "agent.policy_lr=1",
            "--set must look like env.batch_size=16 here, got 'agent.policy_lr=1'",
        ),
        ("env.root", "--set must look like KEY=VALUE, got 'env.root'"),
        ("env.speed=1", "`env.speed` is unknown; known keys are"),
        ("env.root=/gone", "/gone/train/image_list.txt is missing; give the folder that holds"),
        ("env.root=3", "`env.root` must be text, got 3"),
    ],
)
def test_info_refuses_a_setting(fails, setting, message):
    assert message in fails("--task", VISDA, "--set", setting)


def test_info_refuses_a_set_of_instances_that_the_task_does_not_have(fails):
    message = fails("--task", "ASG/DigitsImageNet-v0", "--instances", "mixed")
    assert "`instances` must be fixed or unknown-scale on this task, got mixed" in message


def test_info_refuses_a_device_that_is_not_there(fails, small):
    small["device"] = "abacus"

    message = fails("--task", FOLDERS, *assignments(small))

    assert "`device` must be a torch device of this machine, got 'abacus'" in message


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"outer_valid_size": 5}, "`outer_valid_size` must be <= 4 for ASG/ImageFolder-v0, got 5;"),
        ({"layer_groups": "{stem: xyz}"}, "`layer_groups` must fit the network: trainable parame"),
    ],
)
def test_info_refuses_what_training_would_refuse(fails, small, values, message):
    assert message in fails("--task", FOLDERS, *assignments({**small, **values}))
