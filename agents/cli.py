"""The command `asg`."""

import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from safetensors.torch import save_file

from agents.baselines import FAMILIES, Controller
from agents.evaluate import (
    acts_greedily,
    compare,
    reads_real_labels,
    reward_in_words,
    summarise,
    test_network,
)
from agents.experiment import MAX_WORKERS, RunFolder, load_experiment, provenance, write_text
from agents.export import EXPORT_EPISODES, export_schedule
from agents.figures import draw_run
from agents.fit import LiveController, ScheduleController, fit
from agents.policy import Policy
from agents.results import comparison_table, episodes_of_comparison, results_markdown
from agents.rollout import RolloutPool
from agents.train import estimate_minutes, load_policies, train
from asg_env.config import ConfigError, EnvSettings, validate
from asg_env.core.seeding import derive_seed
from asg_env.env import build_trainer
from asg_env.instances import Instance, published_test_instances
from asg_env.schedule import LearnedSchedule
from asg_env.tasks import TASK_MODULES, load_task

app = typer.Typer(
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Learn layer-wise learning rates for synthetic-to-real training. A mistake gives one "
    "sentence and status 2; --debug adds the traceback.",
)
# Paths and messages are printed as they are: [text] in them is no markup.
console = Console(width=None if sys.stdout.isatty() else 110, markup=False, highlight=False)

RunPath = Annotated[Path, typer.Argument(help="Run folder: the --out of an `asg train`.")]
Workers = Annotated[int, typer.Option(min=1, max=MAX_WORKERS, help="Worker processes.")]
Greedy = Annotated[
    bool | None,
    typer.Option(
        "--greedy/--sampled",
        help="How the controller acts: its likeliest actions, or draws. If left out, what did "
        "better on train instances when the run was compared.",
    ),
]
TrainingSeed = Annotated[
    int, typer.Option(min=0, help="Whose controller, of a run with several training seeds.")
]
Scale = Annotated[float, typer.Option(help="Factor on the base learning rate.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Write over what stands at --out.")]


@app.command("train")
def train_command(
    experiment: Annotated[str, typer.Argument(help="Name of a shipped experiment, or a path.")],
    out: Annotated[Path, typer.Option(help="Run folder to write.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run in --out.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Stop after the estimate.")] = False,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="key.key=value, may be repeated.")
    ] = None,
) -> None:
    """Train a controller, compare it with the baselines, export its schedule, draw the result."""
    loaded = load_experiment(experiment, settings or ())
    loaded.check()
    run = None if dry_run else RunFolder.create(out, loaded, resume, overwrite)
    try:
        minutes = estimate_minutes(
            loaded, episodes_of_comparison(loaded, len(load_task(loaded.task).layer_groups))
        )
        console.print(
            f"{loaded.task}, {loaded.env.instances}: {loaded.train.seeds} training seed(s) of "
            f"{loaded.agent.episodes} episodes, {minutes['seconds_per_episode']:.2f} s each, on "
            f"{loaded.train.workers} worker(s)\nestimate: {minutes['training']:.1f} minutes of "
            f"training, then {minutes['comparison']:.1f} of comparison"
        )
        if run is None:
            return
        _train_with_progress(run)
        _evaluate(run, loaded.train.test_instances, loaded.train.workers)
        _export(run, run.path / "schedule.json", 1.0, EXPORT_EPISODES, 0, None)
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


@app.command("export")
def export_command(
    run: RunPath,
    out: Annotated[Path, typer.Option(help="Schedule file to write.")],
    scale: Scale = 1.0,
    episodes: Annotated[
        int, typer.Option(min=1, help="Rollouts that are averaged.")
    ] = EXPORT_EPISODES,
    training_seed: TrainingSeed = 0,
    greedy: Greedy = None,
    overwrite: Overwrite = False,
) -> None:
    """Average the controller's multipliers over rollouts and write them as a schedule."""
    opened = RunFolder.open(run)
    opened.experiment.check()  # its device may not be here
    if out.is_dir() or not out.parent.is_dir():
        raise ConfigError(f"--out must be a file in an existing folder, got {out}; choose another")
    if out.exists() and not overwrite:
        raise ConfigError(f"{out} exists; add --overwrite or choose another --out")
    _export(opened, out, scale, episodes, training_seed, greedy)


@app.command("fit")
def fit_command(
    task: Annotated[str, typer.Argument(help="Task id, such as ASG/Digits-v0.")],
    out: Annotated[Path, typer.Option(help="Folder for the trained network.")],
    schedule: Annotated[Path | None, typer.Option(help="Schedule file.")] = None,
    controller: Annotated[Path | None, typer.Option(help="Run folder of a controller.")] = None,
    baseline: Annotated[
        str | None, typer.Option(help="NAME or NAME:CANDIDATE, such as cosine:0.1.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of head and data order.")] = 0,
    scale: Scale = 1.0,
    greedy: Greedy = None,
    training_seed: TrainingSeed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Train a network once, outside the environment, and save it.

    Exactly one of --schedule, --controller and --baseline says how; --greedy, --sampled and
    --training-seed go with --controller.
    """
    if sum(x is not None for x in (schedule, controller, baseline)) != 1:
        raise ConfigError("give exactly one of --schedule, --controller and --baseline")
    if controller is None and (greedy is not None or training_seed):
        raise ConfigError(
            "--greedy, --sampled and --training-seed choose how a controller acts; "
            "give --controller, or leave them out"
        )
    if task not in TASK_MODULES:
        raise ConfigError(
            f"`task` must be one of {', '.join(TASK_MODULES)}, got '{task}'; give one of these"
        )
    if out.exists() and not overwrite and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is not empty; add --overwrite or choose another --out")
    torch.set_num_threads(1)
    instance = _checked_instance(task, seed, scale)
    settings = EnvSettings()
    policy: Policy | None = None
    if schedule is not None:
        learned = _load_schedule(schedule)
        values = {**learned.settings, "base_lr": learned.base_lr}
        settings = validate(EnvSettings, values, "schedule.settings")
        source: Controller = ScheduleController(learned)
    elif controller is not None:
        run = RunFolder.open(controller)
        if run.experiment.task != task:
            raise ConfigError(f"{controller} was trained on {run.experiment.task}, got {task}")
        settings = run.experiment.env
        policy = _policy(run, training_seed)
        greedy = acts_greedily(run) if greedy is None else greedy
    trainer = build_trainer(task, settings)
    # Items, not dicts: in another order, multipliers would go to the wrong groups.
    if schedule is not None and [*learned.layer_groups.items()] != [*trainer.patterns.items()]:
        raise ConfigError(
            f"{schedule} is for the groups {list(learned.layer_groups)}, {task} has "
            f"{list(trainer.layer_groups)}; export one on this task"
        )
    if baseline is not None:
        source = _baseline(baseline, len(trainer.layer_groups))
    elif policy is not None:
        policy.seed(derive_seed(seed, "fit-actions"))
        source = LiveController(policy, settings, trainer, deterministic=bool(greedy))
    _make_folder(out)  # now, not after the training
    began = time.perf_counter()
    records = fit(trainer, source, instance, settings.windows())
    seconds = time.perf_counter() - began
    diverged = records[-1]["diverged"]
    correct, retention = test_network(trainer, diverged)
    _save_fit(
        out,
        trainer,
        {
            "task": task,
            "source": str(schedule or controller or f"baseline {baseline}"),
            "actions": None if policy is None else "greedy" if greedy else "sampled",
            "training_seed": None if policy is None else training_seed,
            "instance": instance.to_dict(),
            "settings": settings.model_dump(exclude_none=True),
            "test_accuracy": float(correct.mean()),
            "retention": retention,
            "windows": [_finite(record) for record in records],
        },
    )
    console.print(
        f"trained {records[-1]['inner_step']} inner steps in {seconds:.1f} s: test accuracy "
        f"{correct.mean():.3f}, retention {retention:.3f}"
        + (", diverged" if diverged else "")
        + f"\nwritten: {out}/model.safetensors, fit.json"
    )


@app.command("tasks")
def tasks_command() -> None:
    """List the tasks."""
    for task_id in TASK_MODULES:
        console.print(f"{task_id}  {load_task(task_id).summary}")


@app.command("info")
def info_command(
    task: Annotated[str | None, typer.Option(help="Task id; versions alone if left out.")] = None,
    instances: Annotated[
        str | None, typer.Option(help="Print the published test instances of this set.")
    ] = None,
) -> None:
    """Print versions, and a task's groups, splits and digest, as one JSON object."""
    if instances is not None and task is None:
        raise ConfigError("--instances belongs to a task; add --task ID")
    if instances not in (None, "fixed", "unknown-scale"):
        raise ConfigError(f"--instances must be fixed or unknown-scale, got {instances}")
    report: dict[str, Any] = {"provenance": provenance()}
    if task is not None:
        try:
            loaded = load_task(task)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        report["task"] = {
            "id": loaded.id,
            "summary": loaded.summary,
            "layer_groups": dict(loaded.layer_groups),
            "splits": {name: len(split) for name, split in loaded.splits.items()},
            "parameters": sum(p.numel() for p in loaded.optimizee.parameters() if p.requires_grad),
            "data_digest": loaded.digest,
            "reference_digest": loaded.reference_digest,
            "same_data_as_reference": loaded.digest == loaded.reference_digest,
        }
    if task is not None and instances is not None:
        listed = published_test_instances(task, instances)  # type: ignore[arg-type]
        report["test_instances"] = [instance.to_dict() for instance in listed]
    console.print_json(json.dumps(report))


def _train_with_progress(run: RunFolder) -> None:
    total = run.experiment.agent.updates * run.experiment.train.seeds
    real_labels = reads_real_labels(run.experiment)
    with Progress(
        TextColumn("seed {task.fields[seed]}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[numbers]}"),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as progress:
        bar = progress.add_task("train", total=total, seed=0, numbers="")

        def show(seed: int, update: int, values: dict[str, float]) -> None:
            accuracy = f"{values['accuracy']:.3f}" if real_labels else "not read"
            numbers = (
                f"{values['episodes']:.0f} episodes  return {values['return']:+.3f}  "
                f"accuracy {accuracy}  entropy {values['entropy']:.2f}"
            )
            done = seed * run.experiment.agent.updates + update + 1
            progress.update(bar, completed=done, seed=seed, numbers=numbers)
            if not console.is_terminal and done % max(1, total // 20) == 0:
                print(f"{done}/{total} updates  seed {seed}  {numbers}", flush=True)

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
    summary = summarise(rows, reward_in_words(run.experiment))
    run.write_json("results.json", summary)
    write_text(run.path / "results.md", results_markdown(summary))
    groups = tuple(load_task(run.experiment.task).layer_groups)
    draw_run(rows, summary, groups, run.path / "comparison.png")
    console.print(comparison_table(summary))
    console.print(f"written: {run.path}/results.json, results.md, comparison.png")


def _export(
    run: RunFolder,
    out: Path,
    scale: float,
    episodes: int,
    training_seed: int,
    greedy: bool | None,
) -> None:
    _checked_instance(run.experiment.task, 0, scale)
    policy = _policy(run, training_seed)
    experiment = run.experiment
    with RolloutPool(experiment.task, experiment.env, experiment.train.workers) as pool:
        schedule = export_schedule(
            run,
            policy,
            pool,
            scale,
            episodes,
            deterministic=acts_greedily(run) if greedy is None else greedy,
            training_seed=training_seed,
        )
    if schedule.episodes < episodes:
        console.print(f"{episodes - schedule.episodes} of {episodes} rollouts diverged, left out")
    try:
        schedule.save(out)
    except OSError as error:
        raise ConfigError(
            f"{out} cannot be written ({error.strerror}); choose another --out"
        ) from None
    table = Table(title=f"mean multipliers at scale {scale:g}, {schedule.episodes} rollouts")
    table.add_column("progress", justify="right")
    for name in schedule.layer_groups:
        table.add_column(name, justify="right")
    for knot, row in zip(schedule.knots, schedule.multipliers, strict=True):
        table.add_row(f"{knot:.2f}", *(f"{m:.3g}" for m in row))
    console.print(table)
    console.print(f"written: {out}")


def _policy(run: RunFolder, training_seed: int) -> Policy:
    policies = load_policies(run)
    if training_seed >= len(policies):
        raise ConfigError(
            f"--training-seed must be < {len(policies)}, the training seeds of {run.path}, got "
            f"{training_seed}; lower it"
        )
    return policies[training_seed]


def _checked_instance(task: str, seed: int, scale: float) -> Instance:
    try:
        return Instance.from_dict(
            {
                "task": task,
                "head_seed": derive_seed(seed, "fit-head") % 2**31,
                "data_seed": derive_seed(seed, "fit-data") % 2**31,
                "base_lr_scale": scale,
            }
        )
    except ValueError:
        raise ConfigError(f"--scale must be a finite number > 0, got {scale}; set it so") from None


def _load_schedule(path: Path) -> LearnedSchedule:
    try:
        return LearnedSchedule.load(path)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _baseline(name: str, groups: int) -> Controller:
    family, _, candidate = name.partition(":")
    if family not in FAMILIES:
        raise ConfigError(
            f"--baseline must be one of {', '.join(FAMILIES)}, got '{family}'; give one of these"
        )
    candidates = FAMILIES[family](groups)
    if not candidate:
        candidate = list(candidates)[len(candidates) // 2]
        console.print(f"{family} has the candidates {', '.join(candidates)}; taking {candidate}")
    if candidate not in candidates:
        raise ConfigError(
            f"--baseline {family} has the candidates {', '.join(candidates)}, got "
            f"'{candidate}'; give one of these"
        )
    return candidates[candidate]


def _finite(record: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: a loss that is not finite is stored as null."""
    return {
        k: None if isinstance(v, float) and v != v or v in (float("inf"),) else v
        for k, v in record.items()
    }


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{out} cannot be written ({error.strerror}); choose another --out"
        ) from None


def _save_fit(out: Path, trainer: Any, record: dict[str, Any]) -> None:
    try:
        temporary = out / "model.safetensors.tmp"
        state = trainer.optimizee.state_dict()  # channels-last tensors are stored in plain order
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, str(temporary))
        temporary.replace(out / "model.safetensors")
        write_text(out / "fit.json", json.dumps(record, indent=2) + "\n")
    except OSError as error:
        raise ConfigError(
            f"{out} cannot be written ({error.strerror}); choose another --out"
        ) from None


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
        if message is None and not isinstance(error, ConfigError):
            raise
        print(f"asg: {message() if message else error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(status or 0)


if __name__ == "__main__":
    main()
