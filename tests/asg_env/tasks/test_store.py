import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from asg_env.tasks import preparation
from asg_env.tasks.listing import DataError, read_visda_list, scan_class_folders, scan_unlabelled
from asg_env.tasks.miniature import write_class_folders, write_visda_tree
from asg_env.tasks.store import BrokenImageError, Store, describe_transform, load_image

SIZE = 16


def domains(root):
    return {
        "source": read_visda_list(root / "train"),
        "target": read_visda_list(root / "validation"),
    }


def prepare(listings, folder, size=SIZE, max_broken=0.0):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparation, "_pool", ThreadPoolExecutor)
        return preparation.prepare(listings, folder, size, 1, max_broken, lambda *_: None)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A miniature VisDA-17; tests that change it take a copy."""
    root = tmp_path_factory.mktemp("visda") / "tree"
    write_visda_tree(root, train=2, validation=1, seed=0, size=20)
    return root


@pytest.fixture(scope="module")
def shared(tree, tmp_path_factory):
    folder = tmp_path_factory.mktemp("store") / "store"
    prepare(domains(tree), folder)
    return folder


@pytest.fixture
def folder(shared, tmp_path):
    """A store of one's own."""
    return shutil.copytree(shared, tmp_path / "store")


@pytest.fixture
def own_tree(tree, tmp_path):
    return shutil.copytree(tree, tmp_path / "tree")


@pytest.fixture
def save(tmp_path):
    def write(pixels, name="image.png", **options):
        Image.fromarray(np.asarray(pixels, np.uint8)).save(tmp_path / name, **options)
        return tmp_path / name

    return write


def test_load_image_keeps_the_pixels_of_a_square_image_of_the_right_size(save):
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3))
    loaded = load_image(save(pixels), SIZE)
    np.testing.assert_array_equal(loaded, pixels)
    assert loaded.dtype == np.uint8


def test_load_image_crops_the_centre_of_the_longer_side(save):
    pixels = np.zeros((8, 24, 3))
    pixels[:, 8:16] = 255
    assert (load_image(save(pixels), 8) == 255).all()
    assert (load_image(save(pixels.swapaxes(0, 1)), 8) == 255).all()


def test_load_image_averages_when_it_shrinks(save):
    board = np.indices((64, 64)).sum(0) % 2 * 255
    loaded = load_image(save(np.repeat(board[..., None], 3, 2)), 8)
    assert abs(loaded.astype(int) - 127).max() <= 2  # without antialias: 0 or 255


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "CMYK"])
def test_load_image_makes_rgb_of_other_modes(tmp_path, mode):
    Image.new("RGB", (20, 18), (255, 255, 255)).convert(mode).save(tmp_path / "image.tif")
    loaded = load_image(tmp_path / "image.tif", SIZE)
    assert loaded.shape == (SIZE, SIZE, 3)
    assert (loaded == 255).all()


def test_load_image_does_not_apply_the_exif_orientation(save):
    pixels = np.zeros((SIZE, SIZE, 3))
    pixels[: SIZE // 2] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    loaded = load_image(save(pixels, exif=exif), SIZE)
    assert loaded[0].min() == 255
    assert loaded[-1].max() == 0


def test_load_image_refuses_what_is_no_picture(save, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3))
    for name in ("image.png", "image.jpg", "image.bmp", "image.webp"):
        whole = save(noise, name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(BrokenImageError, match=rf"{name} is no readable image \(.+\); replace"):
            load_image(tmp_path / name, SIZE)
    for content in (b"", b"<html>not found</html>"):
        (tmp_path / "image.jpg").write_bytes(content)
        with pytest.raises(BrokenImageError, match=r"is no readable image \(unknown format\)"):
            load_image(tmp_path / "image.jpg", SIZE)


def test_load_image_tells_an_unreadable_file_from_a_broken_picture(tmp_path):
    for path, reason in ((tmp_path / "gone.png", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(DataError, match=rf"cannot be read \({reason}.*\)") as caught:
            load_image(path, SIZE)
        assert not isinstance(caught.value, BrokenImageError)


def test_store_holds_what_load_image_returns(tree, shared):
    store = Store.open(shared)
    assert store.size == SIZE
    for name, listing in domains(tree).items():
        images = store.images(name)
        assert images.shape == (len(listing), SIZE, SIZE, 3)
        assert not images.flags.writeable
        for row, path in enumerate(listing.paths):
            np.testing.assert_array_equal(images[row], load_image(listing.root / path, SIZE))
        assert store.listing(name) == listing
        np.testing.assert_array_equal(store.rows(name), np.arange(len(listing)))
        assert store.rows(name).dtype == np.int64


def test_store_needs_the_original_images_no_more(own_tree, tmp_path):
    listings = domains(own_tree)
    prepare(listings, tmp_path / "store")
    shutil.rmtree(own_tree)
    store = Store.open(tmp_path / "store")
    assert store.listing("target") == listings["target"]
    assert store.images("source").any()


def test_store_manifest_says_what_was_done(tree, shared):
    manifest = json.loads((shared / "manifest.json").read_text())
    assert (manifest["format"], manifest["version"]) == ("asg-env image store", 1)
    assert manifest["transform"] == describe_transform(SIZE)
    assert manifest["classes"][:2] == ["aeroplane", "bicycle"]
    assert set(manifest["versions"]) == {"pillow", "torchvision"}
    source = manifest["domains"]["source"]
    assert source["root"] == str(tree / "train")
    assert (source["images"], source["broken"]) == (24, [])
    assert source["fingerprint"] == read_visda_list(tree / "train").fingerprint()
    assert {file.name for file in shared.iterdir()} == {
        *("manifest.json", "source.u8", "source.txt", "target.u8", "target.txt")
    }


def test_store_drops_broken_images_and_keeps_their_rows_zero(own_tree, tmp_path):
    listings = domains(own_tree)
    (own_tree / "train" / listings["source"].paths[3]).write_bytes(b"broken")
    prepare(listings, tmp_path / "store", max_broken=0.05)
    store = Store.open(tmp_path / "store")
    assert store.manifest["domains"]["source"]["broken"] == [listings["source"].paths[3]]
    kept = [row for row in range(24) if row != 3]
    assert store.rows("source").tolist() == kept
    assert store.listing("source") == listings["source"].select(kept)
    assert not store.images("source")[3].any()
    assert len(store.listing("target")) == 12


def test_store_of_unlabelled_images_has_no_labels(tmp_path):
    write_class_folders(tmp_path / "s", tmp_path / "t", images=1, seed=0)
    source, target = scan_class_folders(tmp_path / "s"), scan_unlabelled(tmp_path / "t")
    prepare({"source": source, "target": target}, tmp_path / "store")
    store = Store.open(tmp_path / "store")
    assert store.listing("source") == source
    assert store.listing("target") == target
    assert (tmp_path / "store/target.txt").read_text().startswith("cross/0000.jpg\t-\n")


def test_store_digest_is_that_of_the_data_and_not_of_the_place_or_time(own_tree, shared, tmp_path):
    for file in own_tree.rglob("*.png"):
        os.utime(file, (1, 1))
    prepare(domains(own_tree), tmp_path / "again")
    digest = Store.open(shared).digest
    assert Store.open(tmp_path / "again").digest == digest
    file = own_tree / "train/image_list.txt"
    file.write_text(file.read_text().replace(" 0\n", " 1\n"))
    prepare(domains(own_tree), tmp_path / "relabelled")
    assert Store.open(tmp_path / "relabelled").digest != digest


def test_open_refuses_a_folder_that_is_no_finished_store(folder, tmp_path):
    with pytest.raises(DataError, match=r"gone is no folder; make the image store with `asg prep"):
        Store.open(tmp_path / "gone")
    (folder / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"has no manifest.json, so it is unfinished .* run `as"):
        Store.open(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"format": "tar"},
            r"must be an 'asg-env image store' of version 1, got 'tar' of v",
        ),
        ({"version": 2}, r"got 'asg-env image store' of version 2; run `asg prepare` again into"),
        ({"domains": 3}, r"manifest.json is damaged; delete"),
        ({"transform": {}}, r"manifest.json is damaged; delete"),
    ],
)
def test_open_refuses_another_format_version_or_damage(folder, change, message):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | change))
    with pytest.raises(DataError, match=message):
        Store.open(folder)


def test_open_refuses_a_manifest_that_is_no_json(folder):
    (folder / "manifest.json").write_text("{")
    with pytest.raises(DataError, match=r"manifest.json is damaged; delete"):
        Store.open(folder)


def test_open_refuses_files_that_do_not_match(folder):
    size = 24 * SIZE * SIZE * 3
    os.truncate(folder / "source.u8", size - 1)
    with pytest.raises(DataError, match=rf"source.u8 must have {size} bytes, got {size - 1}; del"):
        Store.open(folder)
    (folder / "source.u8").unlink()
    with pytest.raises(DataError, match=r"source.u8 cannot be read \(No such file"):
        Store.open(folder)


def test_open_refuses_an_edited_list(folder):
    text = (folder / "target.txt").read_text()
    (folder / "target.txt").write_text(text.replace("\t0\n", "\t1\n"))
    with pytest.raises(DataError, match=r"target.txt was changed; delete .* run `asg prepare` aga"):
        Store.open(folder)


def test_check_accepts_the_same_images_wherever_they_are(own_tree, shared):
    shutil.copytree(own_tree, own_tree.parent / "moved")  # copytree keeps modification times
    # It says what is wrong by an exception, and nothing otherwise.
    assert Store.open(shared).check(domains(own_tree.parent / "moved"), SIZE) is None


def test_check_refuses_another_image_size(tree, shared):
    with pytest.raises(
        DataError,
        match=r"images of 16 pixels, got .* of 32; run .* --image-size 32, or .* 16",
    ):
        Store.open(shared).check(domains(tree), 32)


def test_check_refuses_another_transform(tree, folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["transform"]["crop"] = "random"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"is stale: it differs in the transform"):
        Store.open(folder).check(domains(tree), SIZE)


def test_check_refuses_changed_files_and_other_lists(own_tree, shared):
    store = Store.open(shared)
    listings = domains(own_tree)
    fewer = {**listings, "target": listings["target"].select(range(11))}
    with pytest.raises(DataError, match=r"stale: .* the images of target \(12 there, 11 here\)"):
        store.check(fewer, SIZE)
    os.utime(own_tree / "train" / listings["source"].paths[0], (1, 1))
    with pytest.raises(DataError, match=r"is stale: .* source \(files or labels changed\); run"):
        store.check(listings, SIZE)


def test_check_refuses_other_classes_and_domains(tree, shared, tmp_path):
    write_class_folders(tmp_path / "s", tmp_path / "t", images=1, seed=0)
    store = Store.open(shared)
    other = {"source": scan_class_folders(tmp_path / "s")}
    with pytest.raises(DataError, match=r"the classes, the domains \(source, target there, source"):
        store.check(other, SIZE)
