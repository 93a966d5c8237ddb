"""`asg report`: a run or a benchmark as one web page."""

from pathlib import Path
from typing import Annotated

import typer

from agents.cli.options import console
from agents.report.document import REPORT, write_report
from asg_env.validation import ConfigError


def report_command(
    folder: Annotated[Path, typer.Argument(help="The --out of `asg train` or `asg benchmark`.")],
    out: Annotated[
        Path | None, typer.Option(help=f"Page to write; {REPORT} in the folder if left out.")
    ] = None,
) -> None:
    """Write what a run or a benchmark found as one HTML page that needs no network."""
    page = folder / REPORT if out is None else out
    if page.suffix not in (".html", ".htm") or page.is_dir():
        raise ConfigError(f"--out must be a file that ends in .html, got {page}; choose another")
    try:
        with console.status("drawing"):
            write_report(folder, page)
    except OSError as error:
        raise ConfigError(
            f"{error.filename} cannot be read or written ({error.strerror}); mend that, or choose "
            "another --out"
        ) from None
    console.print(f"written: {page}")
