"""The table of a benchmark: one CSV with a line per judged network, and a manifest beside it."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agents.benchmark.plan import Benchmark
from agents.run_folder import provenance, write_text
from asg_env.validation import ConfigError

TABLE, MANIFEST = "table.csv", "manifest.json"
SELECTION = "selection.json"  # of a trial: the last thing that it writes
# What two benchmark files must agree in for their results to stand in one table.
COMMON_SETTINGS = ("episodes", "seed", "tuning_instances", "test_instances", "env")
COLUMNS = (
    "suite",
    "suite_version",
    "tested_on",
    "tested_version",
    "method",
    "kind",
    "training_seed",
    "instance",
    "accuracy",
    "mean_recall",
    "retention",
    "diverged",
    "setting",
    "episodes",
    "inner_steps",
    "validation_images",
)
FORMAT = 1  # of table and manifest; raise when a column changes its meaning


def check_table(benchmark: Benchmark, root: Path) -> dict[str, str]:
    """Return the versions of all suites of the table, those of this benchmark added.

    Raises:
        ConfigError: The table is of another version of a suite, or of another budget, so that
            results cannot stand side by side; or its manifest is damaged.
    """
    path, versions = root / MANIFEST, benchmark.versions()
    if not path.exists():
        return versions
    manifest = read_manifest(root)
    settings, known = benchmark.settings.model_dump(), manifest["suites"]
    for name in COMMON_SETTINGS:
        before = manifest["settings"].get(name)
        if before != settings[name]:
            raise ConfigError(
                f"`{name}` must be {before} as in the other results in {root}, which would not be "
                f"comparable, got {settings[name]}; set it so, or choose another --out"
            )
    for name, version in versions.items():
        if known.get(name, version) != version:
            raise ConfigError(
                f"{root / TABLE} holds results of suite {name} in version {known[name]}, this "
                f"is version {version}; results of two versions are not compared: choose "
                "another --out"
            )
    return {**known, **versions}


def read_manifest(root: Path) -> dict[str, Any]:
    """Return what the manifest of a benchmark holds.

    Raises:
        ConfigError: It is missing, damaged, or of another format.
    """
    path = root / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        written = manifest["format"]
        dict(manifest["suites"]), dict(manifest["settings"])
    except (OSError, ValueError, TypeError, KeyError):
        raise ConfigError(
            f"{path} is no manifest of a benchmark; restore it, or choose another --out"
        ) from None
    if written != FORMAT:
        raise ConfigError(
            f"{path} is of format {written}, this version writes {FORMAT}; choose another --out"
        )
    return manifest


def write_manifest(benchmark: Benchmark, suites: Mapping[str, str], root: Path) -> None:
    """Write what the table is of: columns, versions of suites, settings, provenance."""
    values = {
        "format": FORMAT,
        "columns": COLUMNS,
        "suites": dict(suites),
        "settings": benchmark.settings.model_dump(),
        "provenance": provenance(),
    }
    write_text(root / MANIFEST, json.dumps(values, indent=2) + "\n")


def read_results(root: Path) -> list[dict[str, Any]]:
    """Return what every finished trial wrote, in the order of their paths.

    Raises:
        ConfigError: A file is damaged.
    """
    found = []
    for path in sorted(root.glob("*/*/seed-*/test-*.json")):
        if not (path.parent / SELECTION).exists():
            continue
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            values["results"], values["suite_version"]
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"{path} is no whole result; delete it and go on") from None
        found.append(values)
    return found


def write_table(root: Path, results: Sequence[dict[str, Any]]) -> None:
    """Write the table anew from all results, to a temporary name first."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for judged in results:
        for number, one in enumerate(judged["results"]):
            writer.writerow({**judged, **judged["cost"], **one, "instance": number})
    write_text(root / TABLE, text.getvalue())


def version_of(results: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Return each suite's version.

    Raises:
        ConfigError: Results of one suite are of two versions.
    """
    versions: dict[str, str] = {}
    for judged in results:
        for name, version in (
            (judged["suite"], judged["suite_version"]),
            (judged["tested_on"], judged["tested_version"]),
        ):
            if versions.setdefault(name, version) != version:
                raise ConfigError(
                    f"results of suite {name} are of the versions {versions[name]} and {version}; "
                    "compare those of one"
                )
    return versions
