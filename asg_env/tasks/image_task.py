"""From two lists of images to a task: divisions, where pixels come from, network and new head."""

import hashlib
import mmap
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from asg_env.core.data import HostImages, Split
from asg_env.core.layer_groups import GroupPatterns
from asg_env.core.optimizee import Optimizee
from asg_env.core.seeding import numpy_generator
from asg_env.tasks import SUMMARIES
from asg_env.tasks.backbones import load_pretrained
from asg_env.tasks.listing import DataError, Listing, stratified_division
from asg_env.tasks.store import Store, load_image
from asg_env.tasks.task import Task

HeadName = Literal["mlp", "linear"]
Reader = Callable[[np.ndarray], np.ndarray]

HEAD_WIDTH = 512  # of the original's head, Linear-512-ReLU-Linear
OLD_TASK_IMAGES = 500  # real images on which agreement with the teacher is measured
OUTER_VALID_FRACTION = 0.2  # of the target domain, unless the settings say otherwise
DECODERS = 8  # threads that decode a batch where there is no store


def build_image_task(
    task_id: str,
    listings: Mapping[str, Listing] | None,
    *,
    store: str | None,
    image_size: int,
    backbone: str,
    weights: str,
    head: HeadName,
    layer_groups: GroupPatterns | None,
    inner_valid_fraction: float,
    outer_valid_fraction: float,
    split_seed: int,
    classes: tuple[str, ...] | None = None,
) -> Task:
    """Divide both domains into splits and put the network around the pretrained backbone.

    The source domain is divided into inner_valid and train, the target domain into outer_valid
    and test, by `stratified_division`. With `outer_valid_fraction` 0 the whole target domain is
    the test split, as in the original, and no reward may read a real label. A target domain
    without labels has no test split.

    Args:
        task_id: Environment id.
        listings: `source` and `target`; None if the store stands for them.
        store: Folder made by `asg prepare`; None to decode the images batch by batch.
        image_size: Height and width in pixels.
        backbone: Such as `torchvision:resnet101`.
        weights: See `load_pretrained`.
        head: `mlp` is the original's, `linear` a single layer.
        layer_groups: Patterns instead of those that the architecture suggests.
        inner_valid_fraction: Share of the source domain held out.
        outer_valid_fraction: Share of the target domain that rewards may read.
        split_seed: Of both divisions.
        classes: What the classes have to be; any if None.

    Raises:
        DataError: Images, store or weights cannot be used.
    """
    readers: dict[str, Reader]
    rows: dict[str, np.ndarray]
    if store is not None:
        opened = Store.open(Path(store))
        if listings is not None:
            opened.check(listings, image_size)
        elif opened.size != image_size:
            raise DataError(
                f"the store {store} holds images of {opened.size} pixels, got image_size="
                f"{image_size}; set env.image_size={opened.size} or prepare another store"
            )
        listings = {domain: opened.listing(domain) for domain in ("source", "target")}
        readers = {domain: _store_reader(opened.images(domain)) for domain in listings}
        rows = {domain: opened.rows(domain) for domain in listings}
        digest = opened.digest
    else:
        assert listings is not None  # the settings ask for one of the two
        readers = {domain: _file_reader(x, image_size) for domain, x in listings.items()}
        rows = {domain: np.arange(len(x.paths)) for domain, x in listings.items()}
        prints = "".join(listing.fingerprint() for listing in listings.values())
        digest = hashlib.sha256(prints.encode()).hexdigest()

    source, target = listings["source"], listings["target"]
    if classes is not None and source.classes != classes:
        raise DataError(
            f"{task_id} has the classes {', '.join(classes)}, got {', '.join(source.classes)} "
            f"in {store}; use ASG/ImageFolder-v0"
        )
    inner_valid, train = stratified_division(source, inner_valid_fraction, split_seed)
    parts = {"train": ("source", train), "inner_valid": ("source", inner_valid)}
    if target.labels is None:
        if outer_valid_fraction != OUTER_VALID_FRACTION:
            raise DataError(
                "`outer_valid_fraction` divides a target with labels, which "
                f"{store or target.root} does not hold, got {outer_valid_fraction}; leave it out"
            )
        # In no order of the folders: the first of them are what is looked at.
        generator = numpy_generator(split_seed, "unlabelled-target")
        parts["outer_valid"] = ("target", generator.permutation(len(target)))
    else:
        outer_valid, test = stratified_division(target, outer_valid_fraction, split_seed)
        parts |= {"outer_valid": ("target", outer_valid), "test": ("target", test)}
    pretrained = load_pretrained(backbone, weights, image_size)
    splits = {
        name: Split(
            HostImages(
                readers[domain],
                rows[domain][chosen],
                (3, image_size, image_size),
                cheap=store is not None,
            ),
            _labels(listings[domain], chosen),
            torch.tensor(pretrained.mean).view(3, 1, 1),
            torch.tensor(pretrained.std).view(3, 1, 1),
        )
        for name, (domain, chosen) in parts.items()
        if len(chosen)
    }
    if "outer_valid" in splits:
        agreement = splits["outer_valid"].head(OLD_TASK_IMAGES)
        splits["old_task"] = Split(agreement.images, None, agreement.mean, agreement.std)
    features = pretrained.old_head.in_features
    with torch.random.fork_rng(devices=[]):  # the head draws weights that are replaced
        new_head = _build_head(head, features, len(source.classes))
    optimizee = Optimizee(pretrained.backbone, new_head, pretrained.old_head)
    return Task(
        id=task_id,
        summary=SUMMARIES[task_id],
        # Channels-last: convolutions take less time so.
        optimizee=optimizee.to(memory_format=torch.channels_last),
        layer_groups=layer_groups or pretrained.layer_groups,
        splits=splits,
        digest=digest,
        reference_digest=None,
    )


def _build_head(name: HeadName, features: int, classes: int) -> nn.Module:
    if name == "linear":
        return nn.Linear(features, classes)
    return nn.Sequential(nn.Linear(features, HEAD_WIDTH), nn.ReLU(), nn.Linear(HEAD_WIDTH, classes))


def _labels(listing: Listing, rows: np.ndarray) -> Tensor | None:
    if listing.labels is None:
        return None
    return torch.from_numpy(np.asarray(listing.labels, dtype=np.int64)[rows])


def _store_reader(images: np.memmap) -> Reader:
    array = np.asarray(images)

    def read(rows: np.ndarray) -> np.ndarray:
        pixels: np.ndarray = array[rows]
        # Pages stay in the system's cache, but leave this process: its size is that of a batch.
        images._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]
        return pixels

    return read


def _file_reader(listing: Listing, image_size: int) -> Reader:
    pool = ThreadPoolExecutor(DECODERS, thread_name_prefix="decoder")
    paths = [listing.root / path for path in listing.paths]

    def read(rows: np.ndarray) -> np.ndarray:
        return np.stack(list(pool.map(lambda row: load_image(paths[row], image_size), rows)))

    return read
