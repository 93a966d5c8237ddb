"""`asg benchmark`: methods x suites x training seeds, with equal budgets, in one table."""

import json
import shutil
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer
from filelock import FileLock, Timeout

from agents.benchmark.executors import Outcome, import_ray, run_in_pool, run_on_ray
from agents.benchmark.plan import Benchmark, Trial, load_benchmark
from agents.benchmark.presentation import RESULTS, terminal_table, write_results
from agents.benchmark.results import summarise_benchmark
from agents.benchmark.table import (
    MANIFEST,
    check_table,
    read_manifest,
    read_results,
    write_manifest,
    write_table,
)
from agents.benchmark.trials import check_run_folder, is_done, start_run_folder
from agents.benchmark.wording import title, verdict, warnings
from agents.cli.options import Assignments, console, make_folder, progress_bar
from agents.experiment import MAX_WORKERS
from agents.report.document import REPORT, write_report
from agents.run_folder import read_metrics
from agents.train import seconds_per_episode
from asg_env.build import task_of
from asg_env.validation import ConfigError

FAILURES, LOCK = "failures.jsonl", ".lock"
WORKERS = 2  # of the pool, if not said
Execute = Callable[[Sequence[Trial], Callable[[], None]], Iterator[Outcome]]
NEWS = 300.0  # seconds between two lines of progress where no bar is shown


def benchmark_command(
    name: Annotated[str, typer.Argument(help="Name of a shipped benchmark, or a path.")],
    out: Annotated[Path, typer.Option(help="Folder to write, or to add to with --resume.")],
    executor: Annotated[str, typer.Option(help="pool: processes here; ray: Ray tasks.")] = "pool",
    workers: Annotated[
        int | None, typer.Option(min=1, max=MAX_WORKERS, help="Of the pool.", show_default="2")
    ] = None,
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

    def execute(waiting: Sequence[Trial], tick: Callable[[], None]) -> Iterator[Outcome]:
        if executor == "ray":
            return run_on_ray(benchmark, waiting, out, gpus, tick)
        return run_in_pool(benchmark, waiting, out, workers or WORKERS, tick)

    if executor not in ("pool", "ray"):
        raise ConfigError(f"--executor must be pool or ray, got '{executor}'; give one of these")
    if gpus and executor == "pool":
        raise ConfigError(f"--gpus is used with --executor ray only, got {gpus:g}; leave it out")
    if workers and executor == "ray":
        raise ConfigError(
            f"--workers is used with --executor pool only, got {workers}; leave it out: Ray runs "
            "as many trials at once as its cluster has CPUs"
        )
    benchmark = load_benchmark(name, settings or ())
    trials = benchmark.trials()
    _check_folder(out, resume, overwrite)
    if executor == "ray":
        import_ray()
    with console.status("loading") as status:
        benchmark.check(lambda what: status.update(f"loading: {what}"))
    if dry_run:
        if not overwrite:
            _check_table(benchmark, out)
        left = [t for t in trials if overwrite or not is_done(benchmark, t, out)]
        _say_what_there_is(benchmark, left, 1 if executor == "ray" else workers or WORKERS)
        return
    make_folder(out)
    lock = FileLock(out / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise ConfigError(
            f"another `asg benchmark` is at work in {out}; wait for it, or choose another --out"
        ) from None
    with lock:
        _work(benchmark, trials, out, overwrite, retries, execute)


def _work(
    benchmark: Benchmark,
    trials: Sequence[Trial],
    out: Path,
    overwrite: bool,
    retries: int,
    execute: Execute,
) -> None:
    """Do what is missing, then write table, numbers, figures and page."""
    if overwrite:
        for path in out.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()
    write_manifest(benchmark, _check_table(benchmark, out), out)
    for suite, agent in _run_folders(benchmark):
        start_run_folder(benchmark, suite, agent, out)
    (out / RESULTS).unlink(missing_ok=True)  # of what was there; what is to come is more
    try:
        failed = _run(benchmark, trials, out, retries, execute)
    except KeyboardInterrupt:
        console.print(
            f"interrupted; what is finished stands: repeat the command with --resume, or see it "
            f"with asg report {out}"
        )
        raise
    finally:
        write_table(out, read_results(out))
    if failed:
        console.print(
            f"{len(failed)} trials failed and are not in the table: {', '.join(failed)}; "
            f"{out / FAILURES} says why, --resume tries them again"
        )
    results = read_results(out)
    if results:
        summary = summarise_benchmark(results, benchmark, out)
        write_results(summary, out)
        console.print(terminal_table(summary))
        for comparison in summary["comparisons"]:
            said = [verdict(comparison), *warnings(comparison)]
            console.print(f"{title(comparison)}: {' '.join(said)}")
        with console.status("drawing"):
            write_report(out, out / REPORT)
        console.print(f"written: {out}/table.csv, {RESULTS}, results.md, {REPORT} and figures")
    if failed:
        raise typer.Exit(1)


def _check_table(benchmark: Benchmark, out: Path) -> dict[str, str]:
    """Return the versions of all suites of the table, once all that stands in `out` fits."""
    versions = check_table(benchmark, out)
    for suite, agent in _run_folders(benchmark):
        check_run_folder(benchmark, suite, agent, out)
    return versions


def _run_folders(benchmark: Benchmark) -> list[tuple[str, str]]:
    """Suite and agent of each run folder."""
    return [(suite, agent) for suite in benchmark.trained for agent in benchmark.settings.agents]


def _say_what_there_is(benchmark: Benchmark, trials: Sequence[Trial], workers: int) -> None:
    for trial in trials:
        console.print(trial.name)
    suite = benchmark.suites[benchmark.trained[0]]
    settings = suite.settings()
    with console.status("timing a few episodes"):
        groups = len(task_of(suite.task, settings).layer_groups)
        seconds = seconds_per_episode(suite.task, settings, groups, workers)
    episodes = _total(benchmark, trials)
    console.print(
        f"{len(trials)} trials, about {episodes:.0f} episodes; at {seconds:.2f} s each, beside "
        f"what else runs now, about {episodes * seconds / workers / 60:.0f} minutes with {workers} "
        "at a time, and what the agents themselves compute"
    )


def _run(
    benchmark: Benchmark,
    trials: Sequence[Trial],
    out: Path,
    retries: int,
    execute: Execute,
) -> list[str]:
    """Run what is missing, failed trials again as often as allowed; return who failed for good."""
    waiting = [trial for trial in trials if not is_done(benchmark, trial, out)]
    attempts: Counter[Trial] = Counter()
    began = told = time.perf_counter()
    total = _total(benchmark, trials)
    with progress_bar("benchmark") as bar:
        task = bar.add_task("benchmark", total=total, numbers="")

        def tick() -> None:
            done = sum(_progress(benchmark, trial, out) for trial in trials)
            finished = sum(is_done(benchmark, trial, out) for trial in trials)
            bar.update(task, completed=done, numbers=f"{finished}/{len(trials)} trials")
            nonlocal told
            if not console.is_terminal and time.perf_counter() - told > NEWS:
                told = time.perf_counter()
                share = done / total
                print(
                    f"{(told - began) / 60:6.1f} min  {share:.0%} of the episodes, "
                    f"{finished}/{len(trials)} trials",
                    flush=True,
                )

        tick()
        while waiting:
            failed = []
            for trial, error in execute(waiting, tick):
                if error is None:
                    passed = time.perf_counter() - began
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
    if there:
        read_manifest(out)  # other programs have files of this name: nothing of theirs is deleted
    if resume and not there:
        raise ConfigError(f"{out} holds no benchmark to resume; leave --resume out to start one")
    if not there and out.is_dir() and any(path.name != LOCK for path in out.iterdir()):
        raise ConfigError(f"{out} is not empty and holds no benchmark; choose another --out")
