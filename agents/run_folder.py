"""Run folders: where a run is kept, and what its bits depended on."""

import json
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml

from agents.experiment import Experiment
from asg_env.files import replacing
from asg_env.validation import ConfigError
from asg_env.yaml_files import read_yaml


class RunFolder:
    """A run on disk: config.yaml, provenance.json, seed-K/, results and figures."""

    def __init__(self, path: Path, experiment: Experiment) -> None:
        self.path, self.experiment = path, experiment

    @classmethod
    def check_place(cls, path: Path, experiment: Experiment, resume: bool, overwrite: bool) -> None:
        """Find out whether a run may start, or go on, in a folder; writes nothing.

        Raises:
            ConfigError: The folder holds a run already, or another one than is resumed.
        """
        config = path / "config.yaml"
        if resume and overwrite:
            raise ConfigError("--resume and --overwrite exclude each other; give one")
        if config.exists() and not (resume or overwrite):
            raise ConfigError(
                f"{path} already holds a run; add --resume to go on with it, "
                "--overwrite to start anew, or choose another --out"
            )
        if resume and not config.exists():
            raise ConfigError(f"{path} holds no run to resume; leave --resume out to start one")
        if not config.exists() and path.is_dir() and any(path.iterdir()):
            raise ConfigError(f"{path} is not empty and holds no run; choose another --out")
        if resume:
            stored = cls.open(path).experiment
            if stored.digest() != experiment.digest():
                raise ConfigError(
                    f"{path} holds a run of other settings; resume it with those, "
                    "or choose another --out"
                )
        elif config.exists() and not (path / "provenance.json").exists():
            raise ConfigError(
                f"{path} holds a config.yaml but no provenance.json, so it may be no run; "
                "delete it yourself or choose another --out"
            )

    @classmethod
    def create(
        cls, path: Path, experiment: Experiment, resume: bool, overwrite: bool
    ) -> "RunFolder":
        """Start a run folder, or go on with one.

        Raises:
            ConfigError: As in `check_place`, or the folder cannot be written.
        """
        cls.check_place(path, experiment, resume, overwrite)
        if resume:
            run = cls(path, experiment)
            run._note_resumption()
            return run
        try:
            if (path / "config.yaml").exists():
                shutil.rmtree(path)
            return cls.start(path, experiment)
        except OSError as error:
            raise ConfigError(
                f"{path} cannot be written ({error.strerror}); choose another --out"
            ) from None

    @classmethod
    def start(cls, path: Path, experiment: Experiment) -> "RunFolder":
        """Write what a run folder begins with."""
        path.mkdir(parents=True, exist_ok=True)
        write_text(path / "provenance.json", json.dumps(provenance(), indent=2) + "\n")
        run = cls(path, experiment)
        run.write_config()
        return run

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """Open an existing run.

        Raises:
            ConfigError: It is not a run folder.
        """
        if not (path / "config.yaml").is_file():
            if (path / "manifest.json").is_file():
                raise ConfigError(
                    f"{path} holds a benchmark; give a run folder in it, such as {path}/SUITE/AGENT"
                )
            raise ConfigError(
                f"{path} is not a run folder (no config.yaml in it); "
                "give the --out of an earlier `asg train`"
            )
        return cls(path, Experiment(read_yaml(path / "config.yaml")))

    def _note_resumption(self) -> None:
        """Add versions and commit to provenance.json where they are not those it started with.

        Raises:
            ConfigError: provenance.json is missing or damaged, or cannot be written.
        """
        path, now = self.path / "provenance.json", provenance()
        started = read_provenance(self)
        resumed = started.pop("resumed", [])
        if now in (started, *resumed):
            return
        try:
            self.write_json(path.name, {**started, "resumed": [*resumed, now]})
        except OSError as error:
            raise ConfigError(
                f"{path} cannot be written ({error.strerror}); make the folder writable"
            ) from None

    def write_config(self) -> None:
        """Write the resolved experiment."""
        values = yaml.safe_dump(self.experiment.to_dict(), sort_keys=False)
        write_text(self.path / "config.yaml", values)

    def seed_folder(self, index: int) -> Path:
        """Folder of one training seed."""
        return self.path / f"seed-{index}"

    def write_json(self, name: str, values: Any) -> None:
        """Write a JSON file of the run."""
        write_text(self.path / name, json.dumps(values, indent=2) + "\n")


def read_provenance(run: RunFolder) -> dict[str, Any]:
    """Return what provenance.json of a run holds.

    Raises:
        ConfigError: It is missing or damaged.
    """
    path = run.path / "provenance.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        values = None
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path} is missing or no JSON mapping; restore it from a copy, or start anew "
            "with --overwrite"
        )
    return values


def is_imported(run: RunFolder) -> bool:
    """Whether the run is of a policy that the original's code saved.

    Raises:
        ConfigError: `provenance.json` is missing or damaged.
    """
    return "imported" in read_provenance(run)


def training_cost(folder: Path) -> dict[str, int]:
    """What a training seed cost by its folder: episodes, inner steps and validation images."""
    lines = read_metrics(folder)
    return {
        "episodes": int(lines[-1]["episodes"]) if lines else 0,
        "inner_steps": int(sum(line["inner_steps"] for line in lines)),
        "validation_images": int(sum(line["validation_images"] for line in lines)),
    }


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Lines of a training seed's `metrics.jsonl`, without one that a kill left unfinished."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def write_text(path: Path, text: str) -> None:
    """Write to a temporary name, then rename: no reader ever sees half a file."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def versions() -> dict[str, str]:
    """Versions of the packages that bits depend on; torch's with its build tag."""
    names = (
        "asg-env",
        "gymnasium",
        "numpy",
        "stable-baselines3",
        "sb3-contrib",
        "mlxtend",
        "timm",
        "torchvision",
        "matplotlib",
        "pillow",
    )
    found = {"torch": str(torch.__version__)}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def provenance() -> dict[str, Any]:
    """Versions, commit and threads: what bits depend on."""
    return {
        "packages": versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "commit": _commit(),
        "threads_per_process": 1,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def _commit() -> str:
    """Commit of the source tree, with `+changes` if it is modified; "" outside one."""
    source = Path(__file__).parents[1]
    if not (source / ".git").exists():  # an installed copy, perhaps inside somebody's repository
        return ""

    def git(*arguments: str) -> str:
        answer = subprocess.run(
            ["git", *arguments], cwd=source, capture_output=True, text=True, check=True, timeout=10
        )
        return answer.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return ""
