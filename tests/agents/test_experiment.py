import json
from pathlib import Path

import pytest
import torch
import yaml

from agents.experiment import Experiment, load_experiment
from agents.run_folder import RunFolder, provenance, write_text
from asg_env.config import EnvSettings
from asg_env.validation import ConfigError

SHIPPED = Path(__file__).parents[2] / "configs" / "experiment"


@pytest.fixture
def write(tmp_path, make_values):
    """Write an experiment file and return its path."""

    def write_(**sections):
        path = tmp_path / "experiment.yaml"
        path.write_text(yaml.safe_dump(make_values(**sections)), encoding="utf-8")
        return str(path)

    return write_


@pytest.mark.parametrize("name", sorted(path.stem for path in SHIPPED.glob("*.yaml")))
def test_shipped_experiments_load_by_their_bare_name(name):
    # These two are about the user's images, which they have to be told of.
    own = ["env.store=mine"] if name in ("visda17", "imagefolder") else []
    experiment = load_experiment(name, own)
    assert experiment.agent.updates >= 1
    assert Experiment(experiment.to_dict()).digest() == experiment.digest()


def test_experiment_resolves_bare_names_of_sections(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("env: digits-asg\nagent: reinforce\n", encoding="utf-8")
    experiment = load_experiment(str(path))
    assert (experiment.env.observation, experiment.env.grid) == ("asg", "linear")
    assert experiment.agent.kind == "reinforce"
    assert experiment.seed == 0


def test_experiment_overrides_are_read_as_yaml(write):
    experiment = load_experiment(
        write(),
        ["agent.policy_lr=1e-3", "env.horizon=4", "seed=9", "env.reward={retention: 0.5, gain: 2}"],
    )
    assert experiment.agent.policy_lr == 0.001
    assert experiment.env.horizon == 4
    assert experiment.seed == 9
    assert experiment.env.reward == {"retention": 0.5, "gain": 2.0}


def test_experiment_overrides_may_start_a_section(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("env: {id: ASG/Digits-v0}\nagent: reinforce\n", encoding="utf-8")
    assert load_experiment(str(path), ["train.workers=3"]).train.workers == 3


@pytest.mark.parametrize("text", ["1e-3", "1.0e-3", "0.001", ".1e-2"])
def test_experiment_reads_scientific_notation_as_a_number(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(
        f"env: {{id: ASG/Digits-v0, base_lr: {text}}}\nagent: reinforce\n", encoding="utf-8"
    )
    assert load_experiment(str(path)).env.base_lr == 0.001


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"env": {"id": "ASG/Nothing-v0"}}, r"`env\.id` must be one of ASG/Digits-v0"),
        ({"env": {"id": ["ASG/Digits-v0"]}}, r"`env\.id` must be one of ASG/Digits-v0"),
        ({"env": {"id": None}}, r"`env\.id` must be one of .*, got None"),
        ({"env": {"speed": 3}}, r"`env\.speed` is unknown; known keys are .*horizon"),
        ({"env": {"horizon": 0}}, r"`env\.horizon` must be >= 1, got 0; set env\.horizon"),
        ({"env": {"horizon": True}}, r"`env\.horizon` must be an integer, got True"),
        ({"env": {"horizon": 1.5}}, r"`env\.horizon` must be an integer, got 1\.5"),
        ({"env": {"horizon": "3"}}, r"`env\.horizon` must be an integer, got '3'"),
        ({"env": {"base_lr": float("nan")}}, r"`env\.base_lr` must be a finite number, got nan"),
        ({"env": {"base_lr": float("inf")}}, r"`env\.base_lr` must be a finite number, got inf"),
        ({"env": {"reward": "speed"}}, r"`env\.reward` must name a reward term of .*gain"),
        ({"env": {"split": "test"}}, r"`env\.split` must be train to train on, got test"),
        ({"agent": {"kind": "dreamer"}}, r"`agent\.kind` must be one of reinforce, "),
        ({"agent": {"kind": ["ppo"]}}, r"`agent\.kind` must be one of reinforce, "),
        ({"agent": {"rollouts_per_instance": 1}}, r"`agent\.rollouts_per_instance` must be >= 2"),
        ({"agent": {"policy_lr": 0}}, r"`agent\.policy_lr` must be > 0\.0, got 0"),
        ({"agent": {"momentum": 0.9}}, r"`agent\.momentum` is unknown"),
        ({"train": {"workers": 10**6}}, r"`train\.workers` must be <= 256, got 1000000"),
        ({"train": {"workers": 0}}, r"`train\.workers` must be >= 1, got 0"),
        ({"train": {"test_instances": 41}}, r"`train\.test_instances` must be <= 40, got 41"),
        ({"train": {"search_episodes": 3}}, r"`train\.search_episodes` must be 0 or >= 4, got 3"),
        ({"seed": -1}, "`seed` must be an integer >= 0, got -1"),
        ({"seed": True}, "`seed` must be an integer >= 0, got True"),
        ({"seed": 1.0}, "`seed` must be an integer >= 0, got 1.0"),
    ],
)
def test_experiment_says_in_a_sentence_what_is_wrong(write, sections, message):
    values = yaml.safe_load(Path(write(**sections)).read_text())
    with pytest.raises(ConfigError, match=message) as caught:
        Experiment(values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"notes": 1}, "`notes` is unknown; known keys are agent, env, seed, train"),
        ({1: 2, "notes": 1}, "is unknown; known keys are agent, env, seed, train"),
        ({"env": None}, "`env` must be a mapping of settings, got None"),
        ({"agent": [1]}, r"`agent` must be a mapping of settings, got \[1\]"),
        ({"agent": {}}, r"`agent\.kind` must be one of .*, got None"),
    ],
)
def test_experiment_refuses_other_sections(make_values, extra, message):
    with pytest.raises(ConfigError, match=message):
        Experiment({**make_values(), **extra})


def test_experiment_refuses_a_training_too_short_for_its_own_search_budget(make_values):
    # Left out, the search costs as much as training: here 2 episodes, less than one candidate.
    values = make_values(agent={"updates": 1, "instances_per_update": 1})
    del values["train"]["search_episodes"]
    with pytest.raises(ConfigError, match=r"`train\.search_episodes` must be 0 or >= 4, got 2"):
        Experiment(values)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("env.horizon", "--set must look like KEY=VALUE, got 'env.horizon'"),
        ("=3", "--set must look like"),
        ("env..horizon=3", "--set must look like"),
        ("seed.deep=3", "--set seed.deep=3: `seed` is no section"),
        ("env.horizon=[", "the text is not YAML"),
        ("env.horizon={a: 1, a: 2}", "`a` is repeated"),
        ("env.speed=3", r"`env\.speed` is unknown"),
    ],
)
def test_experiment_refuses_malformed_overrides(write, override, message):
    with pytest.raises(ConfigError, match=message):
        load_experiment(write(), [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("env: digits-nowhere\n", "env 'digits-nowhere' is none of the shipped ones"),
        ("- a\n- b\n", "must hold a mapping of settings, got list"),
        ("env: [\n", "the text is not YAML in line"),
        ("seed: \x07\n", "the text is not YAML .unacceptable character"),
        ("seed: !!python/name:os.system\n", "the text is not YAML in line 1 .could not determine"),
        ("seed: 1\nseed: 2\n", "`seed` is repeated in line 2; keep one of them"),
        ("env: {horizon: 3, horizon: 4}\n", "`horizon` is repeated in line 1"),
        ("", "must hold a mapping of settings, got NoneType"),
    ],
)
def test_experiment_file_errors_name_the_file_or_the_place(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message) as caught:
        load_experiment(str(path))
    assert "\n" not in str(caught.value)


def test_experiment_name_that_is_not_shipped_lists_those_that_are():
    with pytest.raises(ConfigError, match=r"experiment 'nowhere' is none .*digits-reinforce"):
        load_experiment("nowhere")
    with pytest.raises(ConfigError, match=r"nowhere\.yaml cannot be read"):
        load_experiment("nowhere.yaml")


def test_digest_covers_every_setting_but_the_number_of_workers(make_experiment):
    digest = make_experiment().digest()
    assert make_experiment(train={"workers": 7}).digest() == digest
    for change in (
        {"env": {"horizon": 4}},
        {"env": {"base_lr": 0.1}},
        {"agent": {"updates": 3}},
        {"train": {"test_instances": 3}},
        {"seed": 4},
    ):
        assert make_experiment(**change).digest() != digest, change


def test_search_budget_is_that_of_one_training_seed_unless_given(make_values):
    values = make_values(train={"seeds": 3})
    assert Experiment(values).search_episodes == 4
    del values["train"]["search_episodes"]
    assert Experiment(values).search_episodes == 8


# Run folders


def test_run_folder_holds_resolved_settings_and_provenance(make_experiment, tmp_path):
    experiment = make_experiment()
    run = RunFolder.create(tmp_path / "deep" / "run", experiment, False, False)
    assert sorted(p.name for p in run.path.iterdir()) == ["config.yaml", "provenance.json"]
    stored = yaml.safe_load((run.path / "config.yaml").read_text(encoding="utf-8"))
    assert stored == experiment.to_dict()
    assert stored["env"]["base_lr"] == EnvSettings().base_lr  # defaults are written out
    written = json.loads((run.path / "provenance.json").read_text(encoding="utf-8"))
    assert set(written) == {
        "packages",
        "python",
        "platform",
        "commit",
        "threads_per_process",
        "cpu_capability",
    }
    assert {"torch", "numpy", "gymnasium", "asg-env"} <= set(written["packages"])
    assert RunFolder.open(run.path).experiment.digest() == experiment.digest()


def test_run_folder_is_not_written_over_by_accident(make_experiment, tmp_path):
    RunFolder.create(tmp_path / "run", make_experiment(), False, False)
    with pytest.raises(ConfigError, match=r"already holds a run; add --resume .* --overwrite"):
        RunFolder.create(tmp_path / "run", make_experiment(), False, False)


def test_run_folder_overwritten_keeps_nothing_of_the_old_run(make_experiment, tmp_path):
    run = RunFolder.create(tmp_path / "run", make_experiment(), False, False)
    (run.seed_folder(0) / "checkpoints").mkdir(parents=True)
    (run.seed_folder(0) / "checkpoints" / "last.safetensors").write_bytes(b"old")
    RunFolder.create(tmp_path / "run", make_experiment(seed=8), False, overwrite=True)
    assert not run.seed_folder(0).exists()
    assert RunFolder.open(run.path).experiment.seed == 8


def test_run_folder_overwrite_does_not_delete_what_is_no_run(make_experiment, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work", encoding="utf-8")
    with pytest.raises(ConfigError, match="is not empty and holds no run"):
        RunFolder.create(tmp_path, make_experiment(), False, overwrite=True)
    assert (tmp_path / "thesis.tex").exists()


def test_run_folder_overwrite_refuses_a_folder_with_a_config_but_no_provenance(
    make_experiment, tmp_path
):
    # Someone else's config.yaml: neither deleted, nor mixed with a run's files.
    (tmp_path / "config.yaml").write_text("mine: true\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="choose another --out"):
        RunFolder.create(tmp_path, make_experiment(), False, overwrite=True)
    assert (tmp_path / "config.yaml").read_text(encoding="utf-8") == "mine: true\n"


def test_run_folder_resumes_a_run_of_the_same_settings(make_experiment, tmp_path):
    RunFolder.create(tmp_path / "run", make_experiment(), False, False)
    again = RunFolder.create(tmp_path / "run", make_experiment(train={"workers": 2}), True, False)
    assert again.experiment.train.workers == 2


def test_run_folder_notes_when_it_is_resumed_by_other_versions(
    make_experiment, tmp_path, monkeypatch
):
    def record():
        return json.loads((tmp_path / "run" / "provenance.json").read_text(encoding="utf-8"))

    RunFolder.create(tmp_path / "run", make_experiment(), False, False)
    started = record()
    RunFolder.create(tmp_path / "run", make_experiment(), True, False)
    assert record() == started
    newer = {**started, "packages": {**started["packages"], "torch": "99.0"}}
    monkeypatch.setattr("agents.run_folder.provenance", lambda: newer)
    for _ in range(2):  # noted once
        RunFolder.create(tmp_path / "run", make_experiment(), True, False)
        assert record() == {**started, "resumed": [newer]}


@pytest.mark.parametrize("text", ["{", "[]"])
def test_run_folder_resume_refuses_a_damaged_provenance(make_experiment, tmp_path, text):
    RunFolder.create(tmp_path / "run", make_experiment(), False, False)
    (tmp_path / "run" / "provenance.json").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"provenance\.json is missing or no JSON mapping"):
        RunFolder.create(tmp_path / "run", make_experiment(), True, False)


@pytest.mark.parametrize(
    ("resume", "overwrite", "changes", "message"),
    [
        (True, False, {"seed": 5}, "holds a run of other settings"),
        (True, True, {}, "--resume and --overwrite exclude each other"),
    ],
)
def test_run_folder_refuses_to_mix_runs(
    make_experiment, tmp_path, resume, overwrite, changes, message
):
    RunFolder.create(tmp_path / "run", make_experiment(), False, False)
    with pytest.raises(ConfigError, match=message):
        RunFolder.create(tmp_path / "run", make_experiment(**changes), resume, overwrite)


def test_run_folder_resume_needs_a_run(make_experiment, tmp_path):
    with pytest.raises(ConfigError, match="holds no run to resume"):
        RunFolder.create(tmp_path / "run", make_experiment(), True, False)


def test_run_folder_below_a_file_cannot_be_written(make_experiment, tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ConfigError, match=r"cannot be written .*choose another --out"):
            RunFolder.create(path, make_experiment(), False, False)


def test_run_folder_open_refuses_what_is_none(tmp_path):
    with pytest.raises(ConfigError, match=r"is not a run folder .*`asg train`"):
        RunFolder.open(tmp_path)


def test_write_text_replaces_a_file_and_leaves_no_temporary_one(tmp_path):
    for text in ("one\n", "two\n"):
        write_text(tmp_path / "notes.txt", text)
        assert (tmp_path / "notes.txt").read_text(encoding="utf-8") == text
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_provenance_says_what_is_not_installed(monkeypatch):
    from importlib import metadata

    def missing(name):
        raise metadata.PackageNotFoundError

    monkeypatch.setattr(metadata, "version", missing)
    packages = provenance()["packages"]
    assert packages.pop("torch") == torch.__version__
    assert set(packages.values()) == {"not installed"}
