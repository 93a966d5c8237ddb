"""A run or a benchmark as one HTML page that refers to nothing outside itself."""

import os
from pathlib import Path

from agents.benchmark.table import MANIFEST
from agents.report.benchmark import benchmark_page
from agents.report.page import render
from agents.report.run import run_page
from agents.report.svg import page_style
from agents.run_folder import write_text
from asg_env.validation import ConfigError

REPORT = "report.html"  # in the folder that it is about, unless asked otherwise


def report_html(folder: Path) -> str:
    """Return the report of a folder; the same bytes for the same results.

    Args:
        folder: The --out of `asg train` or `asg benchmark`.

    Raises:
        ConfigError: It is neither, or not finished, or a file is damaged.
    """
    name = os.fsencode(folder.resolve().name).decode("utf-8", "replace")
    with page_style():
        if (folder / MANIFEST).is_file():
            return render(benchmark_page(folder, name))
        if (folder / "config.yaml").is_file():
            return render(run_page(folder, name))
    raise ConfigError(
        f"{folder} is neither a run nor a benchmark (no config.yaml and no {MANIFEST} in it); give "
        "the --out of `asg train` or `asg benchmark`"
    )


def write_report(folder: Path, out: Path) -> None:
    """Write the report of a folder, to a temporary name first.

    Raises:
        ConfigError: See `report_html`.
        OSError: The page cannot be written.
    """
    write_text(out, report_html(folder))
