"""`asg compare`: ways to keep what a pretrained network knows, in one table."""

import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from agents.cli.options import Assignments, Workers, console, make_folder, progress_bar
from agents.compare.figure import draw_comparison
from agents.compare.plan import ComparisonSettings, Plan
from agents.compare.results import markdown, summarise, table_csv
from agents.compare.work import Comparison, TrialRunner
from agents.experiment import config_path, env_settings
from agents.rollout import WorkerPool
from agents.run_folder import provenance, write_text
from asg_env.build import checked_task
from asg_env.config import EnvSettings
from asg_env.rewards import Reward
from asg_env.tasks.task import Task
from asg_env.validation import ConfigError, validate
from asg_env.yaml_files import read_yaml

SPLITS = ("outer_valid", "inner_valid")
# All rows are tested on the instances of `fixed`; rules neither observe nor act, and a controller
# does both as it was trained.
UNUSED = ("instances", "split", "action", "grid", "observation", "start_multiplier")


def compare_command(
    task: Annotated[str, typer.Argument(help="Task id, such as ASG/Digits-v0.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("runs/compare"),
    controller: Annotated[
        list[Path] | None, typer.Option(help="Run of a learned controller, may be repeated.")
    ] = None,
    rows: Annotated[str, typer.Option(help="Shipped file of rows, or a path.")] = "ablation",
    seeds: Annotated[int, typer.Option(min=2, max=40, help="Unseen instances of each row.")] = 10,
    tuning_instances: Annotated[
        int, typer.Option(min=1, help="Train instances of each candidate.")
    ] = 3,
    tune_on: Annotated[
        str, typer.Option(help="Split that chooses: outer_valid (real) or inner_valid.")
    ] = "outer_valid",
    workers: Workers = 2,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with --out.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace --out.")] = False,
    overrides: Assignments = None,
) -> None:
    """Train with every way to keep what the network knows; write table, claims and figure."""
    if tune_on not in SPLITS:
        raise ConfigError(f"--tune-on must be one of {', '.join(SPLITS)}, got '{tune_on}'")
    settings = env_settings(task, overrides or (), unused=UNUSED)
    wanted = validate(ComparisonSettings, read_yaml(config_path("compare", rows)), rows)
    plan = Plan(task, settings, wanted, controller or ())
    loaded = checked_task(task, settings)
    _check_splits(task, settings, loaded, tune_on)
    _claim_folder(out, resume, overwrite)
    comparison = Comparison(plan, out, seeds, tuning_instances, tune_on)
    labels = loaded.splits["test"].known_labels().numpy()
    pool = WorkerPool(workers, TrialRunner, (task, workers))
    with progress_bar("compare") as bar, pool:
        progress = bar.add_task("compare", total=comparison.trainings(), numbers="")
        said = ""

        def report(row: str, done: int) -> None:
            nonlocal said
            bar.update(progress, advance=done, numbers=row)
            if row != said and not console.is_terminal:
                print(row, flush=True)
            said = row

        try:
            finished = comparison.run(pool, report)
        except KeyboardInterrupt:
            console.print("interrupted; finished rows stand: repeat the command with --resume")
            raise
    about = {
        "task": task,
        "rows": rows,
        "seeds": seeds,
        "tuning_instances": tuning_instances,
        "tune_on": tune_on,
        "test_images": len(labels),
        "settings": settings.model_dump(exclude_none=True),
    }
    classes = loaded.optimizee.head_weight().shape[0]
    summary = summarise(finished, wanted.claims, settings.metric, labels, classes)
    record = {"about": about, **summary, "provenance": provenance()}
    write_text(out / "compare.json", json.dumps(record, indent=1) + "\n")
    write_text(out / "compare.md", markdown(summary, about))
    write_text(out / "compare.csv", table_csv(summary))
    draw_comparison(summary, tuple(loaded.layer_groups), out / "compare.png")
    console.print(_terminal_table(summary))
    console.print(f"written: {out}/compare.md, compare.csv, compare.json, compare.png")


def _check_splits(task: str, settings: EnvSettings, loaded: Task, tune_on: str) -> None:
    needed = dict.fromkeys((tune_on, "test", *Reward(settings.reward).splits), True)
    needed["old_task"] = False  # retention needs images, no labels
    for split, labelled in needed.items():
        if split not in loaded.splits or (labelled and loaded.splits[split].labels is None):
            what = "labelled images" if labelled else "images"
            use = "retention" if split == "old_task" else "the comparison"
            raise ConfigError(
                f"{use} needs {what} of {split}, which {task} does not have with these settings; "
                "change them with --set"
            )


def _claim_folder(out: Path, resume: bool, overwrite: bool) -> None:
    if resume and overwrite:
        raise ConfigError("--resume and --overwrite exclude each other; give one")
    rows = out / "rows"
    if not rows.exists() and out.is_dir() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty and holds no comparison; choose another --out")
    if rows.exists() and overwrite:
        if any(path.suffix != ".json" for path in rows.iterdir()):
            raise ConfigError(f"{rows} holds more than a comparison's rows; choose another --out")
        shutil.rmtree(rows)
    if rows.exists() and any(rows.iterdir()) and not resume:
        raise ConfigError(
            f"{out} already holds a comparison; add --resume to go on with it, --overwrite to "
            "start anew, or choose another --out"
        )
    make_folder(rows)


def _terminal_table(summary: dict[str, Any]) -> Table:
    table = Table(title="interquartile means over instances; intervals in compare.md")
    for index, heading in enumerate(("", "method", "target", "retention", "HSE 0", "steps", "s")):
        table.add_column(heading, justify="left" if index == 1 else "right", overflow="fold")
    for number, row in enumerate(summary["rows"], start=1):
        cells = [str(number), row["name"]]
        for figure in ("accuracy", "retention", "hse_0"):
            found = row[figure]
            cells.append("–" if found is None else f"{found['iqm']:.3f}")
        cells += [f"{row['inner_steps']:.0f}", f"{row['seconds']:.2f}"]
        table.add_row(*cells, style="bold" if row["controller"] else None)
    return table
