"""The command `asg prepare`: make an image store of one's own images."""

import shlex
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from agents.cli.options import console, progress_bar
from agents.experiment import MAX_WORKERS
from asg_env.tasks import image_folder, visda17
from asg_env.tasks.listing import DataError, Listing
from asg_env.tasks.preparation import prepare
from asg_env.tasks.store import MANIFEST, image_bytes
from asg_env.validation import ConfigError

KINDS = {"visda17": 1, "imagefolder": 2}  # folders that each takes
MAX_IMAGE_SIZE = 1024  # pixels; a chunk of 64 such images is 200 MB
SHOWN_BROKEN = 10  # paths; the manifest has them all


def prepare_command(
    kind: Annotated[str, typer.Argument(help="Layout of the images: visda17 or imagefolder.")],
    roots: Annotated[
        list[Path],
        typer.Argument(
            help="visda17: the folder with train/ and validation/. imagefolder: the source and "
            "the target folder, each with a folder per class."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Image store to write: a new folder.")],
    image_size: Annotated[
        int, typer.Option(min=1, max=MAX_IMAGE_SIZE, help="Height and width in pixels.")
    ] = 224,
    workers: Annotated[int, typer.Option(min=1, max=MAX_WORKERS, help="Worker processes.")] = 2,
    max_broken: Annotated[
        float,
        typer.Option(min=0, max=1, help="Share of a domain's images that may be undecodable."),
    ] = 0.001,
    unlabelled: Annotated[
        bool,
        typer.Option("--unlabelled", help="The target of imagefolder has no class folders."),
    ] = False,
) -> None:
    """Decode and resize images once, so that training reads them at full speed."""
    try:
        listings = _listings(kind, roots, unlabelled)
        _check_outside(out, listings)
        finished = (out / MANIFEST).exists()
        manifest = _prepare_with_progress(listings, out, image_size, workers, max_broken)
    except DataError as error:
        raise ConfigError(str(error)) from None
    except KeyboardInterrupt:
        again = ["asg", "prepare", kind, *map(str, roots), "--out", str(out)]
        again += ["--image-size", str(image_size), "--workers", str(workers)]
        again += ["--max-broken", str(max_broken), *(["--unlabelled"] if unlabelled else [])]
        console.print(
            "interrupted; what is finished stands: the same command goes on\n  "
            + shlex.join(again),
            soft_wrap=True,
        )
        raise
    console.print(_summary(manifest, out, finished), soft_wrap=True)


def _listings(kind: str, roots: list[Path], unlabelled: bool) -> dict[str, Listing]:
    if kind not in KINDS:
        raise ConfigError(f"KIND must be one of {', '.join(KINDS)}, got '{kind}'; give one of them")
    if len(roots) != KINDS[kind]:
        wanted = "the folder with train/ and validation/" if kind == "visda17" else "source, target"
        raise ConfigError(
            f"{kind} takes {KINDS[kind]} folder(s) ({wanted}), got {len(roots)}; give these"
        )
    if kind == "visda17":
        if unlabelled:
            raise ConfigError("--unlabelled belongs to imagefolder; leave it out")
        return visda17.list_images(roots[0])
    return image_folder.list_images(roots[0], roots[1], target_labels=not unlabelled)


def _check_outside(out: Path, listings: dict[str, Listing]) -> None:
    """A store within an image folder would look like a class folder the next time."""
    for listing in listings.values():
        if out.resolve().is_relative_to(listing.root.resolve()):
            raise ConfigError(
                f"--out must lie outside the image folder {listing.root}, got {out}; choose another"
            )


def _prepare_with_progress(
    listings: dict[str, Listing], out: Path, image_size: int, workers: int, max_broken: float
) -> dict[str, Any]:
    total = sum(map(len, listings.values()))
    first: tuple[int, float] | None = None  # images and time at the first chunk: workers are up
    lines = 0
    with progress_bar("{task.completed}/{task.total} images") as bar:
        task = bar.add_task("prepare", total=total, numbers="")

        def show(done: int, _: int, broken: int) -> None:
            nonlocal first, lines
            now = time.perf_counter()
            first = first or (done, now)
            rate = (done - first[0]) / (now - first[1]) if now > first[1] else 0.0
            numbers = f"{rate:.0f} images/s  {broken} broken"
            bar.update(task, completed=done, numbers=numbers)
            if not console.is_terminal and done * 20 // total > lines:
                lines = done * 20 // total
                print(f"{done}/{total} images  {numbers}", flush=True)

        return prepare(listings, out, image_size, workers, max_broken, show)


def _summary(manifest: dict[str, Any], out: Path, finished: bool) -> str:
    domains = manifest["domains"]
    size = manifest["transform"]["size"]
    total = sum(domain["images"] for domain in domains.values()) * image_bytes(size)
    broken = [f"{name}/{path}" for name in domains for path in domains[name]["broken"]]
    lines = [
        f"{'finished already' if finished else 'written'}: {out}, images of {size} pixels, "
        f"{total:,} bytes",
        *(
            f"{name}: {domain['images']} images, {len(domain['broken'])} broken"
            for name, domain in domains.items()
        ),
        *(f"broken: {path}" for path in broken[:SHOWN_BROKEN]),
    ]
    if len(broken) > SHOWN_BROKEN:
        lines.append(f"and {len(broken) - SHOWN_BROKEN} more: see {out / MANIFEST}")
    return "\n".join(lines)
