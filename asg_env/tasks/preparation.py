"""Writing image stores: decode every image once, in worker processes, so that a killed run resumes.

Bytes are written with `pwrite` and not through a writable map, where a full disk would be a
SIGBUS instead of an error.
"""

import errno
import hashlib
import json
import multiprocessing
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from asg_env.files import replacing
from asg_env.processes import follow_parent
from asg_env.tasks.listing import DataError, Listing
from asg_env.tasks.store import (
    MANIFEST,
    PROGRESS,
    BrokenImageError,
    Store,
    describe,
    differences,
    image_bytes,
    load_image,
)

CHUNK = 64  # images a job; a manifest's digests are made chunk by chunk, so it is part of VERSION
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Record = dict[str, Any]  # a line of the log: domain, first row, SHA-256 of the bytes, broken paths


@dataclass(frozen=True)
class _Chunk:
    """A job: up to `CHUNK` images with consecutive rows.

    Attributes:
        domain: Whose images.
        start: Row of the first image.
        file: The domain's file of bytes, which exists.
        root: Folder of the images.
        paths: The images.
        size: Height and width in pixels.
        logged: Record of an earlier run that finished this chunk.
    """

    domain: str
    start: int
    file: Path
    root: Path
    paths: tuple[str, ...]
    size: int
    logged: Record | None


def prepare(
    listings: Mapping[str, Listing],
    folder: Path,
    size: int,
    workers: int,
    max_broken: float,
    progress: Callable[[int, int, int], None],
) -> dict[str, Any]:
    """Write an image store, go on with an unfinished one, or find it finished.

    Args:
        listings: Images by the name of their domain.
        folder: Where to write: new, empty, or with an earlier run on the same images.
        size: Height and width of the stored images in pixels.
        workers: Processes that decode; the bytes do not depend on it.
        max_broken: Largest share of a domain's images that may be broken, from 0 to 1.
        progress: Called after every chunk with the images done, all images, and the broken
            ones. Chunks of an earlier run count when their bytes have been verified.

    Returns:
        The manifest.

    Raises:
        DataError: Images are missing, the folder holds something else, or there is no room for
            the store; or too many images are broken, said as soon as they are.
    """
    folder = folder.absolute()
    header = describe(listings, size)
    if (folder / MANIFEST).exists():
        manifest = Store.open(folder).manifest
        _refuse_other(folder, differences(manifest, header))
        for name, domain in manifest["domains"].items():
            images = domain["images"]
            _check_broken(name, domain["broken"], images, images, max_broken)
    else:
        try:
            manifest = _write(listings, folder, header, workers, max_broken, progress)
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise DataError(
                    f"{folder} cannot be written ({error.strerror}); choose another --out"
                ) from None
            needed = sum(map(len, listings.values())) * image_bytes(size)
            raise DataError(
                f"{folder} cannot hold the store ({error.strerror}): it takes {needed:,} bytes, "
                f"{shutil.disk_usage(folder).free:,} are free; make room and run the same command "
                "again to go on, or choose another --out"
            ) from None
        except BrokenProcessPool:
            raise DataError(
                f"a worker process was killed while writing {folder}, for lack of memory perhaps; "
                "run the same command again to go on, with fewer --workers"
            ) from None
    (folder / PROGRESS).unlink(missing_ok=True)
    return manifest


def _write(
    listings: Mapping[str, Listing],
    folder: Path,
    header: dict[str, Any],
    workers: int,
    max_broken: float,
    progress: Callable[[int, int, int], None],
) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    logged = _begin_log(folder, header)
    size = header["transform"]["size"]
    texts = {
        name: "".join(f"{path}\t{label}\n" for path, label in listing.rows_of_text()).encode()
        for name, listing in listings.items()
    }
    for name, text in texts.items():
        (folder / f"{name}.txt").write_bytes(text)
    files = {name: folder / f"{name}.u8" for name in listings}
    _reserve({files[name]: len(listings[name]) * image_bytes(size) for name in files})
    chunks = [
        chunk
        for name, listing in listings.items()
        for chunk in _chunks(name, listing, files[name], size, logged)
    ]
    records = _decode(chunks, folder / PROGRESS, workers, max_broken, progress)
    manifest = dict(header)
    manifest["domains"] = {
        name: {
            **header["domains"][name],
            "digest": hashlib.sha256(
                "".join(r["digest"] for r in records if r["domain"] == name).encode()
            ).hexdigest(),
            "list_digest": hashlib.sha256(text).hexdigest(),
            "broken": [path for r in records if r["domain"] == name for path in r["broken"]],
        }
        for name, text in texts.items()
    }
    for file in files.values():  # a manifest promises that the bytes are there
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    with replacing(folder / MANIFEST) as temporary:
        temporary.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return manifest


def _begin_log(folder: Path, header: dict[str, Any]) -> dict[tuple[str, int], Record]:
    """Start the log, or cut an earlier run's after its last whole line; return its records."""
    file = folder / PROGRESS
    if not file.exists() and any(folder.iterdir()):
        raise DataError(f"{folder} is not empty and no image store; choose another --out")
    with file.open("a+b") as log:
        log.seek(0)
        lines = log.read().split(b"\n")[:-1]  # what follows the last line's end is torn
        entries: list[dict[str, Any]] = []
        for line in lines:
            try:
                entries.append(json.loads(line))
            except ValueError:  # a crash of the machine: this and what follows is done again
                break
        log.truncate(sum(len(line) + 1 for line in lines[: len(entries)]))
        if not entries:
            log.write(json.dumps(header).encode() + b"\n")
            return {}
    found = differences(entries[0], header)
    if entries[0]["versions"] != header["versions"]:
        found.append(f"the packages ({entries[0]['versions']} there, {header['versions']} here)")
    _refuse_other(folder, found)
    return {(record["domain"], record["start"]): record for record in entries[1:]}


def _refuse_other(folder: Path, found: list[str]) -> None:
    if found:
        raise DataError(
            f"{folder} holds another store: it differs in {', '.join(found)}; delete the folder "
            "or choose another --out"
        )


def _reserve(sizes: Mapping[Path, int]) -> None:
    """Take all disk space now, not after hours; if it is not there, give back what was taken."""
    before = {file: file.stat().st_size if file.exists() else 0 for file in sizes}
    try:
        for file, size in sizes.items():
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                if hasattr(os, "posix_fallocate"):  # not on macOS: there a full disk shows later
                    os.posix_fallocate(descriptor, 0, size)
                os.ftruncate(descriptor, size)
            finally:
                os.close(descriptor)
    except OSError:
        for file, size in before.items():
            if file.exists():
                os.truncate(file, size)
        raise


def _chunks(
    domain: str,
    listing: Listing,
    file: Path,
    size: int,
    logged: Mapping[tuple[str, int], Record],
) -> Iterator[_Chunk]:
    for start in range(0, len(listing), CHUNK):
        paths = listing.paths[start : start + CHUNK]
        record = logged.get((domain, start))
        yield _Chunk(domain, start, file, listing.root, paths, size, record)


def _decode(
    chunks: list[_Chunk],
    log_file: Path,
    workers: int,
    max_broken: float,
    progress: Callable[[int, int, int], None],
) -> list[Record]:
    images: Counter[str] = Counter()  # per domain: all of them, and below those that are done
    for chunk in chunks:
        images[chunk.domain] += len(chunk.paths)
    done: Counter[str] = Counter()
    broken: dict[str, list[str]] = {name: [] for name in images}
    records = []
    pool = _pool(workers)
    try:
        with log_file.open("a", encoding="utf-8") as log:
            for chunk, record in zip(chunks, pool.map(_write_chunk, chunks), strict=True):
                if record != chunk.logged:
                    log.write(json.dumps(record) + "\n")
                    log.flush()
                records.append(record)
                name = chunk.domain
                done[name] += len(chunk.paths)
                broken[name] += record["broken"]
                progress(done.total(), images.total(), sum(map(len, broken.values())))
                _check_broken(name, broken[name], done[name], images[name], max_broken)
    finally:
        pool.shutdown(cancel_futures=True)
    return records


def _write_chunk(chunk: _Chunk) -> Record:
    """Decode and write a chunk, unless the bytes that an earlier run logged are there."""
    count = len(chunk.paths)
    offset = chunk.start * image_bytes(chunk.size)
    descriptor = os.open(chunk.file, os.O_RDWR)
    try:
        if chunk.logged is not None:
            stored = os.pread(descriptor, count * image_bytes(chunk.size), offset)
            if hashlib.sha256(stored).hexdigest() == chunk.logged["digest"]:
                return chunk.logged
        pixels = np.zeros((count, chunk.size, chunk.size, 3), np.uint8)
        broken = []
        for row, path in enumerate(chunk.paths):
            try:
                pixels[row] = load_image(chunk.root / path, chunk.size)
            except BrokenImageError:
                broken.append(path)
        data = pixels.tobytes()
        rest = memoryview(data)
        while rest:  # a nearly full disk takes a part
            written = os.pwrite(descriptor, rest, offset)
            rest, offset = rest[written:], offset + written
    finally:
        os.close(descriptor)
    digest = hashlib.sha256(data).hexdigest()
    return {"domain": chunk.domain, "start": chunk.start, "digest": digest, "broken": broken}


def _check_broken(
    domain: str, broken: list[str], done: int, images: int, max_broken: float
) -> None:
    """Refuse more broken images than may be, though only `done` of a domain's have been read."""
    share = len(broken) / images
    if not share <= max_broken:  # this way NaN is refused too
        raise DataError(
            f"{len(broken)} of the {images} images of {domain} are broken"
            f"{'' if done == images else f', and only {done} were read'}, a share of "
            f"{share:.2g} where at most {max_broken:g} may be ({', '.join(broken[:3])}"
            f"{', ...' if len(broken) > 3 else ''}); mend them, or raise --max-broken"
        )


def _pool(workers: int) -> Executor:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "torchvision.transforms.v2"])
    return ProcessPoolExecutor(workers, mp_context=context, initializer=follow_parent)
