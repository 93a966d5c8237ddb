"""`asg benchmark`: methods x suites x training seeds, with equal budgets, in one table."""

import json
import shutil
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from agents.benchmark import Benchmark, Trial, load_benchmark
from agents.benchmark_results import summarise_benchmark, title, verdict, warnings
from agents.benchmark_table import MANIFEST, open_table, read_results, write_table
from agents.benchmark_tables import terminal_table, write_results
from agents.cli_options import Assignments, Workers, console, make_folder, progress_bar
from agents.executors import Outcome, run_in_pool, run_on_ray
from agents.experiment import assign, assignment
from agents.report import REPORT, write_report
from agents.run_folder import read_metrics
from agents.trials import is_done, start_run_folder
from asg_env.validation import ConfigError

FAILURES = "failures.jsonl"
Executor = Literal["pool", "ray"]


def benchmark_command(
    name: Annotated[str, typer.Argument(help="Name of a shipped benchmark, or a path.")],
    out: Annotated[Path, typer.Option(help="Folder to write, or to add to with --resume.")],
    executor: Annotated[str, typer.Option(help="pool: processes here; ray: Ray tasks.")] = "pool",
    workers: Workers = 2,
    gpus: Annotated[float, typer.Option(min=0, help="GPUs of a trial, with --executor ray.")] = 0,
    retries: Annotated[int, typer.Option(min=0, help="Of a trial that failed.")] = 1,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with --out, or add to its table.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace --out.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what is to be done.")] = False,
    settings: Assignments = None,
) -> None:
    """Train and judge every agent and baseline of a benchmark; write one table, figures, page."""
    if executor not in ("pool", "ray"):
        raise ConfigError(f"--executor must be pool or ray, got '{executor}'")
    if gpus and executor == "pool":
        raise ConfigError(f"--gpus is used with --executor ray only, got {gpus:g}; leave it out")
    overrides: dict[str, Any] = {}
    assign(overrides, [assignment(text) for text in settings or ()])
    benchmark = load_benchmark(name, overrides)
    trials = benchmark.trials()
    if dry_run:
        for trial in trials:
            console.print(trial.name)
        console.print(f"{len(trials)} trials of up to {benchmark.settings.episodes} episodes")
        return
    _check_folder(out, resume, overwrite)
    with console.status("loading") as status:
        benchmark.check(lambda what: status.update(f"loading: {what}"))
    if overwrite and out.exists():
        shutil.rmtree(out)
    make_folder(out)
    open_table(benchmark, out)
    for suite in benchmark.trained:
        for agent in benchmark.settings.agents:
            start_run_folder(benchmark, suite, agent, out)

    def execute(waiting: Sequence[Trial], tick: Callable[[], None]) -> Iterator[Outcome]:
        if executor == "ray":
            return run_on_ray(benchmark, waiting, out, gpus, tick)
        return run_in_pool(benchmark, waiting, out, workers, tick)

    try:
        failed = _run(benchmark, trials, out, retries, execute)
    except KeyboardInterrupt:
        console.print("interrupted; what is finished stands: repeat the command with --resume")
        raise
    finally:
        write_table(out, read_results(out))
    summary = summarise_benchmark(read_results(out), benchmark, out)
    write_results(summary, out)
    console.print(terminal_table(summary))
    for comparison in summary["comparisons"]:
        said = [verdict(comparison), *warnings(comparison, summary["seeds"])]
        console.print(f"{title(comparison)}: {' '.join(said)}")
    with console.status("drawing"):
        write_report(out, out / REPORT)
    console.print(f"written: {out}/table.csv, results.json, results.md, {REPORT} and figures")
    if failed:
        console.print(
            f"{len(failed)} trials failed and are not in the table: {', '.join(failed)}; "
            f"{out / FAILURES} says why, --resume tries them again"
        )
        raise typer.Exit(1)


def _run(
    benchmark: Benchmark,
    trials: Sequence[Trial],
    out: Path,
    retries: int,
    execute: Callable[[Sequence[Trial], Callable[[], None]], Iterator[Outcome]],
) -> list[str]:
    """Run what is missing, failed trials again as often as allowed; return who failed for good."""
    waiting = [trial for trial in trials if not is_done(benchmark, trial, out)]
    attempts: Counter[Trial] = Counter()
    seconds = time.perf_counter()
    with progress_bar("benchmark") as bar:
        task = bar.add_task("benchmark", total=_total(benchmark, trials), numbers="")

        def tick() -> None:
            done = sum(_progress(benchmark, trial, out) for trial in trials)
            finished = sum(is_done(benchmark, trial, out) for trial in trials)
            bar.update(task, completed=done, numbers=f"{finished}/{len(trials)} trials")

        tick()
        while waiting:
            failed = []
            for trial, error in execute(waiting, tick):
                if error is None:
                    passed = time.perf_counter() - seconds
                    if not console.is_terminal:
                        print(f"{passed / 60:6.1f} min  {trial.name}", flush=True)
                    continue
                attempts[trial] += 1
                _note_failure(out, trial, attempts[trial], error)
                if attempts[trial] <= retries and not isinstance(error, ConfigError):
                    failed.append(trial)
            waiting = failed
    return [trial.name for trial in trials if not is_done(benchmark, trial, out)]


def _total(benchmark: Benchmark, trials: Sequence[Trial]) -> float:
    return sum(_weight(benchmark, trial) for trial in trials)


def _weight(benchmark: Benchmark, trial: Trial) -> float:
    """Episodes that a trial takes, about."""
    settings = benchmark.settings
    tests = settings.test_instances * len(benchmark.suites)
    if trial.kind in ("agent", "search"):
        return settings.episodes + tests
    return tests + (8 * settings.tuning_instances if trial.kind == "rule" else 0)


def _progress(benchmark: Benchmark, trial: Trial, out: Path) -> float:
    """Episodes of a trial that are done, as far as its files tell."""
    if is_done(benchmark, trial, out):
        return _weight(benchmark, trial)
    lines = read_metrics(trial.folder(out))
    return lines[-1]["episodes"] if lines else 0.0


def _note_failure(out: Path, trial: Trial, attempt: int, error: BaseException) -> None:
    record = {
        "trial": trial.name,
        "attempt": attempt,
        "error": f"{type(error).__name__}: {error}",
        "traceback": "".join(traceback.format_exception(error)),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    with (out / FAILURES).open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(record) + "\n")
    console.print(f"failed: {trial.name}, attempt {attempt}: {record['error']}")


def _check_folder(out: Path, resume: bool, overwrite: bool) -> None:
    if resume and overwrite:
        raise ConfigError("--resume and --overwrite exclude each other; give one")
    there = (out / MANIFEST).exists()
    if there and not (resume or overwrite):
        raise ConfigError(
            f"{out} already holds a benchmark; add --resume to go on with it or to add to its "
            "table, --overwrite to start anew, or choose another --out"
        )
    if resume and not there:
        raise ConfigError(f"{out} holds no benchmark to resume; leave --resume out to start one")
    if not there and out.is_dir() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty and holds no benchmark; choose another --out")
