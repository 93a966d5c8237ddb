"""The command `asg`."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer

from agents.cli.benchmark import benchmark_command
from agents.cli.compare import compare_command
from agents.cli.export import export_command, exported, write_schedule
from agents.cli.fit import fit_command
from agents.cli.import_policy import import_policy_command
from agents.cli.info import info_command, tasks_command
from agents.cli.options import (
    Assignments,
    RunPath,
    Workers,
    console,
    progress_bar,
)
from agents.cli.prepare import prepare_command
from agents.cli.report import report_command
from agents.cli.show import show_command
from agents.evaluate import compare
from agents.experiment import load_experiment
from agents.figures import draw_run
from agents.protocol import reads_real_labels
from agents.records import write_episodes
from agents.results import comparison_table, episodes_of_comparison, results_markdown
from agents.run_folder import RunFolder, write_text
from agents.summary import summarise
from agents.train import estimate_minutes, load_policies, train
from asg_env.core.guidance import GuidanceError
from asg_env.core.numerics import NotRepeatableError
from asg_env.core.optimizers import OneRateError
from asg_env.tasks.listing import DataError
from asg_env.validation import ConfigError

app = typer.Typer(
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Learn layer-wise learning rates for synthetic-to-real training. A mistake gives one "
    "sentence and status 2; --debug adds the traceback.",
)


@app.command("train")
def train_command(
    experiment: Annotated[str, typer.Argument(help="Name of a shipped experiment, or a path.")],
    out: Annotated[Path, typer.Option(help="Run folder to write.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run in --out.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Stop after the estimate.")] = False,
    settings: Assignments = None,
) -> None:
    """Train a controller, compare it with the baselines, export its schedule, draw the result."""
    loaded = load_experiment(experiment, settings or ())
    loaded.check()
    run = None
    if dry_run:
        RunFolder.check_place(out, loaded, resume, overwrite)
    else:
        run = RunFolder.create(out, loaded, resume, overwrite)
    try:
        workers = loaded.train.workers
        own = getattr(loaded.agent, "environments", workers)  # of stable-baselines3's algorithms
        minutes = estimate_minutes(loaded, episodes_of_comparison(loaded, len(loaded.layer_groups)))
        console.print(
            f"{loaded.task}, {loaded.env.instances}: {loaded.train.seeds} training seed(s) of "
            f"{loaded.agent.episodes} episodes, {minutes['seconds_per_episode']:.2f} s each beside "
            f"what else runs now, on {own} worker(s)\n"
            f"estimate{' of the whole run' if resume else ''}: "
            f"{minutes['training']:.1f} minutes of training, then "
            f"{minutes['comparison']:.1f} of comparison on {workers}"
        )
        if run is None:
            return
        _train_with_progress(run)
        if loaded.test_labels is None:
            console.print("no comparison: the target domain has no labels to judge by")
        else:
            _evaluate(run, loaded.train.test_instances, loaded.train.workers)
        path = run.path / "schedule.json"
        write_schedule(path, exported(run))
        console.print(f"written: {path}")
    except KeyboardInterrupt:
        if run is not None:
            again = ["asg", "train", experiment, "--out", str(out), "--resume"]
            again += [word for setting in settings or () for word in ("--set", setting)]
            console.print(
                "interrupted; what is finished stands (checkpoints, searches): go on with\n  "
                + shlex.join(again),
                soft_wrap=True,
            )
        raise


@app.command("evaluate")
def evaluate_command(
    run: RunPath,
    instances: Annotated[
        int, typer.Option(min=1, max=40, help="Published test instances to judge on.")
    ] = 40,
    workers: Workers = 2,
    beside: Annotated[
        list[Path] | None, typer.Option(help="Another run to judge too, may be repeated.")
    ] = None,
) -> None:
    """Judge a trained controller on unseen instances, beside every baseline."""
    opened = RunFolder.open(run)
    opened.experiment.check()  # its device may not be here
    _evaluate(opened, instances, workers, beside or ())


app.command("export")(export_command)
app.command("show")(show_command)
app.command("fit")(fit_command)
app.command("compare")(compare_command)
app.command("benchmark")(benchmark_command)
app.command("report")(report_command)
app.command("tasks")(tasks_command)
app.command("info")(info_command)
app.command("prepare")(prepare_command)
app.command("import-policy")(import_policy_command)


def _train_with_progress(run: RunFolder) -> None:
    agent, told = run.experiment.agent, 0
    total = agent.episodes * run.experiment.train.seeds
    first = getattr(agent, "warm_start_episodes", 0)
    waiting = f"static search, {first} episodes" if first else ""
    real_labels = reads_real_labels(run.experiment)
    with progress_bar("seed {task.fields[seed]}") as progress:
        bar = progress.add_task("train", total=total, seed=0, numbers=waiting)

        def show(seed: int, update: int, values: dict[str, float]) -> None:
            accuracy = f"{values['accuracy']:.3f}" if real_labels else "not read"
            numbers = (
                f"update {update + 1}  return {values['return']:+.3f}  "
                f"accuracy {accuracy}  entropy {values['entropy']:.2f}"
            )
            nonlocal told
            # SB3 finishes some episodes more or fewer than it was given env steps for.
            done = seed * agent.episodes + min(int(values["episodes"]), agent.episodes)
            progress.update(bar, completed=done, seed=seed, numbers=numbers)
            if not console.is_terminal and int(20 * done / total) > told:
                told = int(20 * done / total)
                print(f"{done}/{total} episodes  seed {seed}  {numbers}", flush=True)

        train(run, show)


def _evaluate(run: RunFolder, count: int, workers: int, beside: Sequence[Path] = ()) -> None:
    others = [RunFolder.open(path) for path in beside]
    with console.status("comparing") as status:
        rows = compare(
            run,
            load_policies(run),
            [(other, load_policies(other)) for other in others],
            count,
            workers,
            lambda name: status.update(f"comparing: {name}"),
        )
    summary = summarise(rows, run.experiment)
    run.write_json("results.json", summary)
    write_text(run.path / "results.md", results_markdown(summary))
    groups = tuple(run.experiment.layer_groups)
    write_episodes(rows, groups, run.path)
    draw_run(rows, summary, groups, run.path / "comparison.png")
    console.print(comparison_table(summary))
    console.print(f"written: {run.path}/results.json, episodes.json, results.md, comparison.png")


def main() -> None:
    """Entry point of the console script: one sentence and status 2 for a mistake."""
    debug = "--debug" in sys.argv
    arguments = [a for a in sys.argv[1:] if a != "--debug"] or ["--help"]
    try:
        status = app(arguments, standalone_mode=False)
    except KeyboardInterrupt:
        sys.exit(130)
    except typer.Exit as error:
        sys.exit(error.exit_code)
    except typer.Abort:
        sys.exit(130)
    except Exception as error:
        if debug:
            raise
        message = getattr(error, "format_message", None)
        if isinstance(error, OSError) and error.strerror:
            print(f"asg: {error.filename}: {error.strerror}; mend that first", file=sys.stderr)
            sys.exit(2)
        if isinstance(error, torch.OutOfMemoryError):
            print(
                "asg: the device ran out of memory; lower env.batch_size, or the number of workers "
                "(train.workers, --workers)",
                file=sys.stderr,
            )
            sys.exit(2)
        sentences = (ConfigError, DataError, GuidanceError, NotRepeatableError, OneRateError)
        if message is None and not isinstance(error, sentences):
            raise
        print(f"asg: {message() if message else error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(status or 0)


if __name__ == "__main__":
    main()
