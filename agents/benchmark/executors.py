"""Where the trials of a benchmark run: in processes of this machine, or as Ray tasks.

Both yield each finished trial with what went wrong, if anything did. A trial's results depend on
the trial alone, so they are the same wherever it ran.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from agents.benchmark.plan import Benchmark, Trial
from agents.benchmark.trials import run_trial
from agents.rollout import WorkerPool
from asg_env.validation import ConfigError

Outcome = tuple[Trial, BaseException | None]
POLL = 1.0  # seconds between two looks at the progress of running trials


def run_in_pool(
    benchmark: Benchmark,
    trials: Sequence[Trial],
    root: Path,
    workers: int,
    tick: Callable[[], None],
) -> Iterator[Outcome]:
    """Run trials in worker processes, one torch thread each.

    A process that dies (killed, or out of memory) takes the pool with it: the trials that were
    running are yielded as failed, and the others go on in a new pool.

    Args:
        benchmark: What the trials are of.
        trials: What to do, in this order.
        root: Folder of the benchmark.
        workers: Processes.
        tick: Called about every second.
    """
    waiting = list(trials)
    while waiting:
        with WorkerPool(workers, _nothing, ()) as pool:
            running: dict[Future[Any], Trial] = {}
            broken = False
            while (waiting or running) and not broken:
                while waiting and len(running) < workers:
                    try:
                        started = pool.submit(_work, (benchmark, waiting[0], root))
                    except BrokenProcessPool:  # since the last look
                        broken = True
                        break
                    running[started] = waiting.pop(0)
                done, _ = wait(running, timeout=POLL, return_when=FIRST_COMPLETED)
                tick()
                for future in done:
                    error = future.exception()
                    broken = broken or isinstance(error, BrokenProcessPool)
                    yield running.pop(future), error
            for future, trial in running.items():  # of a pool that broke
                yield trial, future.exception()


def _nothing() -> None:
    """A worker needs nothing built in advance."""


def _work(_: None, benchmark: Benchmark, trial: Trial, root: Path) -> None:
    run_trial(benchmark, trial, root)


def run_on_ray(
    benchmark: Benchmark,
    trials: Sequence[Trial],
    root: Path,
    gpus: float,
    tick: Callable[[], None],
) -> Iterator[Outcome]:
    """Run every trial as a Ray task of one CPU; the cluster decides where, and how many at once.

    Joins the cluster that `RAY_ADDRESS` names, or starts Ray on this machine. All machines must
    see the benchmark's folder under the same path, and have the project installed.

    Args:
        benchmark: What the trials are of.
        trials: What to do.
        root: Folder of the benchmark.
        gpus: GPUs that a trial occupies; a fraction shares one.
        tick: Called about every second.

    Raises:
        ConfigError: Ray is not installed.
    """
    ray = import_ray()
    started = not ray.is_initialized()
    if started:
        ray.init(log_to_driver=False, include_dashboard=False, configure_logging=False)
    try:
        task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0)(run_trial)
        whole = ray.put(benchmark)
        running = {task.remote(whole, trial, root.resolve()): trial for trial in trials}
        while running:
            done, _ = ray.wait(list(running), num_returns=1, timeout=POLL)
            tick()
            for reference in done:
                error: BaseException | None = None
                try:
                    ray.get(reference)
                except ray.exceptions.RayTaskError as failed:
                    error = failed if failed.cause is None else failed.cause
                    error.add_note(str(failed))  # the cause has come without its traceback
                except ray.exceptions.RayError as failed:  # its process or machine died
                    error = failed
                yield running.pop(reference), error
    finally:
        if started:
            ray.shutdown()


def import_ray() -> Any:
    """Return the module `ray`.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        import ray
        import ray.exceptions
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise ConfigError("--executor ray needs Ray; pip install 'asg-env[ray]'") from None
    return ray
