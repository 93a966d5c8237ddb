import os
import shutil

import numpy as np
import pytest
import torch
from torch import nn

from asg_env.build import build_trainer
from asg_env.core.data import HostImages, Split
from asg_env.core.layer_groups import split_parameters
from asg_env.core.trainer import Trainer, TrainerSettings
from asg_env.task_settings import ImageFolderSettings
from asg_env.tasks.backbones import load_pretrained
from asg_env.tasks.image_folder import list_images
from asg_env.tasks.image_task import build_image_task
from asg_env.tasks.listing import DataError
from asg_env.tasks.store import BrokenImageError, Store, load_image
from asg_env.validation import ConfigError, validate

TASK = "ASG/ImageFolder-v0"
SMALL = "torchvision:shufflenet_v2_x0_5"
SIZE = 32
DEFAULTS = {
    "store": None,
    "image_size": SIZE,
    "backbone": SMALL,
    "weights": "random",
    "head": "linear",
    "layer_groups": None,
    "inner_valid_fraction": 0.2,
    "outer_valid_fraction": 0.5,
    "split_seed": 0,
}
EVERYTHING = slice(None)


def build(listings, **changes):
    return build_image_task(TASK, listings, **(DEFAULTS | changes))


def split_paths(listing, split):
    """Names of the files that a split's images come from, found by their pixels."""
    known = {load_image(listing.root / p, SIZE).tobytes(): p for p in listing.paths}
    assert len(known) == len(listing)
    pixels = split.pixels(EVERYTHING).permute(0, 2, 3, 1).contiguous().numpy()
    return [known[image.tobytes()] for image in pixels]


@pytest.fixture(scope="module")
def listings(image_folders):
    return list_images(*image_folders, target_labels=True)


@pytest.fixture(scope="module")
def unlabelled(image_folders):
    return list_images(*image_folders, target_labels=False)


@pytest.fixture(scope="module")
def store(make_store, listings):
    return make_store(listings)


@pytest.fixture(scope="module")
def task(listings):
    return build(listings)


@pytest.fixture
def own_folders(image_folders, tmp_path):
    """Folders that a test may change."""
    return [shutil.copytree(folder, tmp_path / folder.name) for folder in image_folders]


# Splits


def test_splits_divide_both_domains_by_hand(task):
    # Six images a class: round(0.2 * 6) = 1 and round(0.5 * 6) = 3 are held out.
    sizes = {"inner_valid": 1, "train": 5, "outer_valid": 3, "test": 3}
    for name, per_class in sizes.items():
        assert task.splits[name].labels.bincount().tolist() == [per_class] * 4
    assert set(task.splits) == {*sizes, "old_task"}
    assert torch.equal(
        task.splits["old_task"].pixels(EVERYTHING),
        task.splits["outer_valid"].head(12).pixels(EVERYTHING),
    )
    assert task.splits["old_task"].labels is None


def test_splits_hold_every_image_once_and_its_label(task, listings):
    for names, listing in (
        (("train", "inner_valid"), listings["source"]),
        (("outer_valid", "test"), listings["target"]),
    ):
        labels = dict(zip(listing.paths, listing.labels, strict=True))
        found = {name: split_paths(listing, task.splits[name]) for name in names}
        assert sorted(path for paths in found.values() for path in paths) == sorted(listing.paths)
        for name, paths in found.items():
            assert [labels[path] for path in paths] == task.splits[name].labels.tolist()


@pytest.mark.parametrize(("domain", "split"), [("source", "inner_valid"), ("target", "test")])
def test_splits_follow_their_seed_and_no_other(listings, task, domain, split):
    def images(seed):
        return split_paths(listings[domain], build(listings, split_seed=seed).splits[split])

    assert images(0) == split_paths(listings[domain], task.splits[split])
    assert images(0) != images(1)


def test_splits_are_the_same_from_a_store_and_from_files(listings, store, task):
    for given in (listings, None):
        stored = build(given, store=str(store))
        assert list(stored.splits) == list(task.splits)
        for name, split in task.splits.items():
            other = stored.splits[name]
            assert torch.equal(other.pixels(EVERYTHING), split.pixels(EVERYTHING)), name
            assert (other.labels is None) == (split.labels is None)
            assert split.labels is None or torch.equal(other.labels, split.labels)
        assert stored.splits["train"].images.cheap
        assert stored.digest == Store.open(store).digest
    assert not task.splits["train"].images.cheap


def test_digest_of_files_follows_their_content_and_not_their_place(listings, own_folders, task):
    moved = list_images(*own_folders, target_labels=True)
    assert build(moved).digest == task.digest == build(listings).digest

    (own_folders[1] / moved["target"].paths[0]).write_bytes(b"another")
    assert build(moved).digest != task.digest


def test_training_is_the_same_from_a_store_from_files_and_from_memory(
    listings, store, weights, identical
):
    settings = TrainerSettings(base_lr=0.01, total_steps=4, batch_size=6)
    resnet = {"backbone": "torchvision:resnet18"}
    files, stored = build(listings, **resnet), build(None, store=str(store), **resnet)
    resident = build(listings, **resnet)
    splits = {
        name: Split(split.pixels(EVERYTHING), split.labels, split.mean, split.std)
        for name, split in resident.splits.items()
    }
    results = []
    for one, images in (
        (files, files.splits),
        (stored, stored.splits),
        (resident, splits),
    ):
        groups, device = one.layer_groups, torch.device("cpu")
        trainer = Trainer(one.optimizee, groups, images, settings, {"kl": 0.1}, device)
        trainer.reset(1, 2)
        reports = [trainer.initial_report(2), trainer.run(2, (1.0,) * len(groups))]
        figures = [trainer.evaluate("test").loss, trainer.retention()]
        results.append((reports, figures, weights(trainer)))

    assert isinstance(stored.splits["train"].images, HostImages)
    assert min(results[0][0][1].drifts) > 0
    assert results[0][0][0].kl == pytest.approx(0.0, abs=1e-5)
    for reports, figures, end in results[1:]:
        assert (reports, figures) == results[0][:2]
        assert identical(end, results[0][2])


def test_no_fraction_held_out_leaves_the_whole_target_to_the_test_split(listings):
    task = build(listings, outer_valid_fraction=0.0, inner_valid_fraction=0.0)

    assert set(task.splits) == {"train", "test"}
    assert task.splits["test"].labels.bincount().tolist() == [6] * 4
    assert len(task.splits["train"]) == 24


def test_target_without_labels_has_no_test_split(unlabelled):
    task = build(unlabelled, outer_valid_fraction=0.2)

    assert set(task.splits) == {"train", "inner_valid", "outer_valid", "old_task"}
    assert task.splits["outer_valid"].labels is None
    assert len(task.splits["outer_valid"]) == len(task.splits["old_task"]) == 24
    assert task.splits["old_task"].labels is None
    assert task.optimizee.head_weight().shape[0] == 4  # classes are the source's


def test_division_of_an_unlabelled_store_is_refused(unlabelled, make_store):
    store = str(make_store(unlabelled))

    with pytest.raises(
        DataError,
        match=rf"^`outer_valid_fraction` divides a target with labels, which {store} does not "
        r"hold, got 0.5; leave it out$",
    ):
        build(None, store=store, outer_valid_fraction=0.5)


def test_store_of_unlabelled_images_knows_that_they_are(unlabelled, make_store):
    task = build(None, store=str(make_store(unlabelled)), outer_valid_fraction=0.2)

    assert "test" not in task.splits
    assert task.splits["outer_valid"].labels is None


def test_broken_images_of_a_store_are_in_no_split(own_folders, make_store):
    listings = list_images(*own_folders, target_labels=True)
    broken = listings["source"].paths[2]
    (own_folders[0] / broken).write_bytes(b"no picture")

    task = build(None, store=str(make_store(listings, max_broken=0.1)))

    kept = listings["source"].select([row for row in range(24) if row != 2])
    found = [split_paths(kept, task.splits[name]) for name in ("train", "inner_valid")]
    assert sorted(sum(found, [])) == sorted(kept.paths)


def test_pixels_are_normalised_by_the_statistics_of_the_backbone(task):
    split = task.splits["test"]
    pretrained = load_pretrained(SMALL, "random", SIZE)
    pixels = split.pixels(EVERYTHING).double().numpy()
    mean, std = (np.array(x)[:, None, None] for x in (pretrained.mean, pretrained.std))

    np.testing.assert_allclose(split.batch(EVERYTHING), (pixels - mean) / std, rtol=1e-5, atol=1e-5)
    assert len(set(pretrained.mean)) == 3


# Refusals


def test_store_of_another_size_is_refused(listings, store):
    for given, message in (
        (None, r"holds images of 32 pixels, got image_size=48; set env.image_size=32 or prepare"),
        (listings, r"images of 32 pixels, got an image size of 48; .* env.image_size to 32"),
    ):
        with pytest.raises(DataError, match=message):
            build(given, store=str(store), image_size=48)


def test_stale_store_is_refused(own_folders, make_store):
    listings = list_images(*own_folders, target_labels=True)
    store = make_store(listings)
    build(listings, store=str(store))
    os.utime(own_folders[1] / listings["target"].paths[0], (1, 1))

    with pytest.raises(DataError, match=r"is stale: it differs in the images of target \(files or"):
        build(listings, store=str(store))
    build(None, store=str(store))  # where nothing else is given there is nothing to differ from


def test_folder_that_is_no_store_is_refused(listings, tmp_path):
    with pytest.raises(DataError, match=r"gone is no folder; make the image store with `asg prep"):
        build(listings, store=str(tmp_path / "gone"))


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"this is a text file", "unknown format"), (b"", "unknown format"), ("half", "truncated")],
)
@pytest.mark.parametrize("place", ["first batch", "ahead"])
def test_broken_image_is_named_by_its_path_when_training_reads_it(
    own_folders, content, reason, place
):
    listings = list_images(*own_folders, target_labels=True)
    task = build(listings, inner_valid_fraction=0.0)
    row = {"first batch": 0, "ahead": 20}[place]
    file = own_folders[0] / listings["source"].paths[row]
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    images = task.splits["train"].images
    if place == "ahead":
        images.gather(torch.arange(4))  # the others are fine
        images.prefetch(torch.arange(18, 24))

    with pytest.raises(BrokenImageError, match=rf"{file} is no readable image \(.*{reason}"):
        images.gather(torch.arange(4) if place == "first batch" else torch.arange(18, 24))


def test_broken_image_ends_the_training_with_its_path(own_folders):
    settings = validate(
        ImageFolderSettings,
        {
            **{"source": str(own_folders[0]), "target": str(own_folders[1]), "image_size": SIZE},
            **{"backbone": SMALL, "weights": "random", "inner_valid_fraction": 0.0},
        },
        "env",
    )
    file = own_folders[0] / "disc/0003.png"
    file.write_text("this is a text file", encoding="utf-8")
    trainer = build_trainer(TASK, settings)

    with pytest.raises(DataError, match=rf"{file} is no readable image \(unknown format\); replac"):
        trainer.run(1, (1.0,) * len(trainer.layer_groups))


def test_image_that_is_gone_is_named_by_its_path(own_folders):
    listings = list_images(*own_folders, target_labels=True)
    task = build(listings)
    gone = own_folders[1] / listings["target"].paths[0]
    gone.unlink()

    with pytest.raises(DataError, match=rf"{gone} cannot be read \(No such file"):
        [split.pixels(EVERYTHING) for split in task.splits.values()]
    with pytest.raises(DataError, match=rf"{gone} is missing \(1 of the 24 listed images are\)"):
        build(listings)


# The network


def test_head_of_the_original_has_two_layers_and_the_linear_one_has_one(listings):
    features = load_pretrained(SMALL, "random", SIZE).old_head.in_features

    original = build(listings, head="mlp").optimizee.head
    linear = build(listings, head="linear").optimizee.head

    assert [type(module) for module in original] == [nn.Linear, nn.ReLU, nn.Linear]
    assert (original[0].in_features, original[0].out_features) == (features, 512)
    assert (original[2].in_features, original[2].out_features) == (512, 4)
    assert isinstance(linear, nn.Linear)
    assert (linear.in_features, linear.out_features) == (features, 4)


def test_building_leaves_the_global_generator_alone(listings):
    before = torch.get_rng_state()
    build(listings)
    assert torch.equal(torch.get_rng_state(), before)


def test_network_is_channels_last_and_its_old_head_frozen(task):
    weight = next(p for p in task.optimizee.backbone.parameters() if p.ndim == 4)
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not any(p.requires_grad for p in task.optimizee.old_head.parameters())
    assert task.optimizee.old_head.out_features == 1000


def test_layer_groups_are_the_architectures_unless_given(listings, task):
    groups = {"low": r"backbone\.(conv1|stage[23])\.", "high": r"backbone\.(stage4|conv5)\."}
    groups["head"] = r"head\."

    own = build(listings, layer_groups=groups)

    assert list(own.layer_groups) == ["low", "high", "head"]
    assert split_parameters(own.optimizee, own.layer_groups)["low"]
    assert task.layer_groups == load_pretrained(SMALL, "random", SIZE).layer_groups


def settings_with(image_folders, groups):
    source, target = map(str, image_folders)
    values = {"source": source, "target": target, "image_size": SIZE, "backbone": SMALL}
    values |= {"weights": "random", "layer_groups": groups}
    return validate(ImageFolderSettings, values, "env")


def test_trainer_uses_the_layer_groups_of_the_settings(image_folders):
    settings = settings_with(image_folders, {"all": r"backbone\.", "head": r"head\."})

    assert build_trainer(TASK, settings).layer_groups == ("all", "head")


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (
            {"body": r"backbone\.(?!conv5)", "head": r"head\."},
            r"^`layer_groups` must fit the network: trainable parameters match no layer group of "
            r"\['body', 'head'\]: backbone\.conv5\.0\.weight, backbone\.conv5\.1\.weight, "
            r"backbone\.conv5\.1\.bias; add a pattern",
        ),
        (
            {"all": "", "head": r"head\."},
            r"`layer_groups` must fit the network: parameters match several layer groups: head\.",
        ),
        (
            {"all": "", "none": r"classifier"},
            r"`layer_groups` must fit the network: layer groups \['none'\] match no trainable",
        ),
    ],
)
def test_trainer_refuses_layer_groups_that_do_not_fit(image_folders, groups, message):
    with pytest.raises(ConfigError, match=message):
        build_trainer(TASK, settings_with(image_folders, groups))
