"""One thread for every test, as bits change with their number; miniature images of one's own."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """Run the slow tests first: at the end one worker would wait for the other."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session")
def visda_root(tmp_path_factory):
    """A miniature VisDA-17, 5 renders and 4 photographs a class; who changes it takes a copy."""
    from asg_env.tasks.miniature import write_visda_tree

    root = tmp_path_factory.mktemp("visda") / "tree"
    write_visda_tree(root, train=5, validation=4, seed=0, size=36)
    return root


@pytest.fixture(scope="session")
def image_folders(tmp_path_factory):
    """Source and target, four classes, 6 images a class; who changes them takes a copy."""
    from asg_env.tasks.miniature import write_class_folders

    root = tmp_path_factory.mktemp("folders")
    write_class_folders(root / "source", root / "target", images=6, seed=0, size=36)
    return root / "source", root / "target"


@pytest.fixture(scope="session")
def make_store(tmp_path_factory):
    """Return a function that writes an image store, in this process, and returns its folder."""
    from asg_env.tasks import preparation

    def make(listings, size=32, max_broken=0.0):
        folder = tmp_path_factory.mktemp("stores") / "store"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(preparation, "_pool", ThreadPoolExecutor)
            preparation.prepare(listings, folder, size, 1, max_broken, lambda *_: None)
        return folder

    return make
