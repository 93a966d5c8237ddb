import csv
import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

import agents.cli.compare
import agents.cli.main
from agents.compare.plan import CONTROLLER
from asg_env.tasks import TASK_MODULES

TASK = "ASG/Digits-v0"
TINY = ("env.horizon=3", "env.inner_steps=2", "env.outer_valid_size=50")
FEW = ("--seeds", "2", "--tuning-instances", "1")
ROWS = [
    {"name": "tuned", "paper": 3, "rule": "small-backbone", "tune": {"rate": [0.003, 0.3]}},
    {"name": "plain", "rate": 0.1, "guidance": {}},
]
CLAIMS = [
    {"claim": "tuning helps", "figure": "accuracy", "better": "tuned", "worse": "plain"},
    {"claim": "learning helps", "figure": "accuracy", "better": CONTROLLER, "worse": "tuned"},
]
WRITTEN = {"compare.md", "compare.csv", "compare.json", "compare.png", "rows"}


@pytest.fixture(scope="module", autouse=True)
def _few_resamples():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("agents.statistics.RESAMPLES", 200)
        yield


@pytest.fixture
def pools(monkeypatch, trial_pool):
    """Trainings run in this process; the pools that were opened are in the list."""
    opened = []

    def open_pool(*arguments):
        opened.append(trial_pool(*arguments))
        return opened[-1]

    monkeypatch.setattr(agents.cli.compare, "WorkerPool", open_pool)
    return opened


@pytest.fixture
def command(pools, tmp_path):
    """The arguments that compare rows; those given come last."""

    def arguments(*others, rows=ROWS, claims=CLAIMS):
        path = tmp_path / "rows.yaml"
        text = yaml.safe_dump({"rows": rows, "claims": claims}, sort_keys=False)
        path.write_text(text, encoding="utf-8")
        settings = [word for setting in TINY for word in ("--set", setting)]
        out = () if "--out" in others else ("--out", tmp_path / "out")
        return ["compare", TASK, "--rows", path, *FEW, *out, *settings, *others]

    return arguments


@pytest.fixture(scope="module")
def finished(tmp_path_factory, trial_pool):
    """The folder of a finished comparison, which tests only read."""
    folder = tmp_path_factory.mktemp("finished")
    rows = folder / "rows.yaml"
    rows.write_text(yaml.safe_dump({"rows": ROWS, "claims": CLAIMS}), encoding="utf-8")
    words = ["compare", TASK, "--rows", str(rows), *FEW, "--out", str(folder / "out")]
    words += [word for setting in TINY for word in ("--set", setting)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agents.cli.compare, "WorkerPool", trial_pool)
        patch.setattr("sys.argv", ["asg", *words])
        with pytest.raises(SystemExit) as stop:
            agents.cli.main.main()
    assert stop.value.code == 0
    return folder / "out"


@pytest.fixture
def done(finished, tmp_path) -> Path:
    """A finished comparison of one's own, where `command` writes to."""
    shutil.copytree(finished, tmp_path / "out")
    return tmp_path / "out"


def stripped(folder: Path) -> list:
    """The rows of compare.json, but for the time that trainings took."""
    rows = json.loads((folder / "compare.json").read_text(encoding="utf-8"))["rows"]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


# What works


def test_compare_writes_table_numbers_and_figure(finished):
    assert {path.name for path in finished.iterdir()} == WRITTEN
    assert {path.name for path in (finished / "rows").iterdir()} == {"tuned.json", "plain.json"}
    assert (finished / "compare.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads(
        (finished / "compare.json").read_text(encoding="utf-8"),
        parse_constant=lambda name: pytest.fail(f"{name} is no JSON"),
    )
    assert [row["name"] for row in record["rows"]] == ["tuned", "plain"]
    assert [row["setting"] for row in record["rows"]] == ["rate 0.3", "rate 0.1"]
    assert [list(row["guidance"]) for row in record["rows"]] == [["kl"], []]
    assert [found["claim"] for found in record["claims"]] == ["tuning helps"]
    assert record["claims_not_tested"] == ["learning helps"]
    about = record["about"]
    assert (about["task"], about["seeds"], about["tuning_instances"]) == (TASK, 2, 1)
    assert (about["tune_on"], about["test_images"]) == ("outer_valid", 1500)
    assert about["settings"]["horizon"] == 3
    assert record["provenance"]["packages"]["torch"]
    text = (finished / "compare.md").read_text(encoding="utf-8")
    assert "| 1 | tuned (rate 0.3) |" in text
    assert "Not tested: learning helps." in text
    with (finished / "compare.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["name"] for line in lines] == ["tuned", "plain"]
    accuracies = [float(line["accuracy"]) for line in lines]
    assert accuracies == [row["accuracy"]["iqm"] for row in record["rows"]]
    assert all(accuracy > 0.2 for accuracy in accuracies)


def test_compare_prints_its_table_and_what_it_writes(asg, command, done):
    result = asg(*command("--resume"))
    assert (result.status, result.err) == (0, "")
    assert "tuned" in result.out
    assert "plain" in result.out
    assert f"written: {done}/compare.md, compare.csv, compare.json, compare.png" in " ".join(
        result.out.split()
    )


def test_compare_resumes_a_finished_comparison_without_training(asg, command, pools, done):
    before = stripped(done)
    for name in WRITTEN - {"rows"}:
        (done / name).unlink()
    assert asg(*command("--resume")).status == 0
    assert pools[0].trainings == {}
    assert {path.name for path in done.iterdir()} == WRITTEN
    assert stripped(done) == before


def test_compare_resumes_with_the_row_that_is_missing(asg, command, pools, done):
    before, kept = stripped(done), (done / "rows" / "tuned.json").read_bytes()
    (done / "rows" / "plain.json").unlink()
    assert asg(*command("--resume")).status == 0
    assert pools[0].trainings == {"test_trial": 2}
    assert (done / "rows" / "tuned.json").read_bytes() == kept
    assert stripped(done) == before


def test_compare_overwrites_when_asked(asg, command, pools, done):
    (done / "rows" / "leftover.json").write_text("{}", encoding="utf-8")
    result = asg(*command("--overwrite", "--set", "env.base_lr=0.2"))
    assert result.status == 0
    assert pools[0].trainings == {"tuning_trial": 2, "test_trial": 4}
    assert not (done / "rows" / "leftover.json").exists()
    record = json.loads((done / "compare.json").read_text(encoding="utf-8"))
    assert record["about"]["settings"]["base_lr"] == 0.2


def test_compare_may_choose_on_synthetic_images_and_count_recall(asg, command, tmp_path):
    others = ("--tune-on", "inner_valid", "--set", "env.metric=mean_recall")
    assert asg(*command(*others, rows=[ROWS[1]], claims=[])).status == 0
    record = json.loads((tmp_path / "out" / "compare.json").read_text(encoding="utf-8"))
    assert record["about"]["tune_on"] == "inner_valid"
    assert record["metric"] == "mean_recall"
    text = (tmp_path / "out" / "compare.md").read_text(encoding="utf-8")
    assert "| target mean per-class recall |" in text
    assert "chosen among candidates by inner_valid" in text


def test_compare_judges_a_controller_beside_the_rows(asg, command, trained_run, tmp_path):
    result = asg(*command("--controller", trained_run.path, rows=[ROWS[1]], claims=[]))
    assert (result.status, result.err) == (0, "")
    record = json.loads((tmp_path / "out" / "compare.json").read_text(encoding="utf-8"))
    assert [(row["name"], row["controller"]) for row in record["rows"]] == [
        ("plain", False),
        (CONTROLLER, True),
    ]
    text = (tmp_path / "out" / "compare.md").read_text(encoding="utf-8")
    assert f"| 2 | {CONTROLLER} (run, greedy, reward 1 x gain) |" in text
    assert "No row of a learned controller" not in text


def test_compare_interrupted_says_how_to_go_on(asg, command, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(agents.cli.compare.Comparison, "run", interrupted)
    result = asg(*command())
    assert result.status == 130
    assert "finished rows stand: repeat the command with --resume" in result.out
    assert "Traceback" not in result.out + result.err


def test_fit_trains_with_a_guidance_term_of_ones_own(asg, user_code, tmp_path):
    def weights(name, guidance):
        settings = [word for setting in TINY for word in ("--set", setting)]
        result = asg(
            *("fit", TASK, "--baseline", "uniform:0.1", "--out", tmp_path / name),
            *(*settings, "--set", f"env.guidance={guidance}"),
        )
        assert (result.status, result.err) == (0, "")
        record = json.loads((tmp_path / name / "fit.json").read_text(encoding="utf-8"))
        tensors = load_file(str(tmp_path / name / "model.safetensors"))
        return record["windows"], {key: tensor.tolist() for key, tensor in tensors.items()}

    windows, mine = weights("mine", f"{{{user_code}:Anchor: {{weight: 2, factor: 8}}}}")
    _, built_in = weights("built-in", "{weight_l2: 16}")
    _, none = weights("none", "{}")
    assert mine == built_in
    assert mine != none
    values = [window["guidance"] for window in windows]
    assert [list(value) for value in values] == [["Anchor"]] * 3
    assert 0 < values[0]["Anchor"] < values[2]["Anchor"]


# Mistakes


def test_compare_says_what_to_do_with_a_folder_that_is_in_use(fails, command, pools, done):
    assert (
        f"{done} already holds a comparison; add --resume to go on with it, --overwrite to start "
        "anew, or choose another --out"
    ) in fails(*command())
    assert "--resume and --overwrite exclude each other; give one" in fails(
        *command("--resume", "--overwrite")
    )
    message = fails(*command("--resume", "--set", "env.base_lr=0.2"))
    assert f"{done}/rows/tuned.json is a row of other settings; go on with those, or add" in message
    assert all(pool.trainings == {} for pool in pools)


def test_compare_leaves_a_folder_alone_that_holds_something_else(fails, command, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("", encoding="utf-8")
    for more in ([], ["--resume"], ["--overwrite"]):
        message = fails(*command("--out", tmp_path / "thesis", *more))
        assert "is not empty and holds no comparison; choose another --out" in message
    assert "cannot be written" in fails(*command("--out", tmp_path / "thesis" / "chapter.tex"))
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter.tex"]
    (tmp_path / "survey" / "rows").mkdir(parents=True)
    answers = tmp_path / "survey" / "rows" / "answers.csv"
    answers.write_text("yes", encoding="utf-8")
    message = fails(*command("--out", tmp_path / "survey", "--overwrite"))
    assert "rows holds more than a comparison's rows; choose another --out" in message
    assert answers.read_text(encoding="utf-8") == "yes"


def test_compare_refuses_an_unknown_task(fails):
    known = ", ".join(TASK_MODULES)
    assert f"`task` must be one of {known}, got 'nowhere'" in fails("compare", "nowhere")


def test_compare_refuses_an_unknown_file_of_rows(fails, tmp_path):
    assert (
        "compare 'nowhere' is none of the shipped ones (ablation); give one of these or the path "
        "of a YAML file"
    ) in fails("compare", TASK, "--rows", "nowhere")
    gone = tmp_path / "gone.yaml"
    assert f"{gone} cannot be read" in fails("compare", TASK, "--rows", gone)
    gone.write_text("- 3\n", encoding="utf-8")
    assert f"{gone} must hold a mapping of settings, got list" in fails(
        "compare", TASK, "--rows", gone
    )


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (
            ["--tune-on", "test"],
            "--tune-on must be one of outer_valid, inner_valid, got 'test'",
        ),
        (["--seeds", "1"], "--seeds"),
        (["--seeds", "41"], "--seeds"),
        (["--tuning-instances", "0"], "--tuning-instances"),
        (["--workers", "0"], "--workers"),
        (["--set", "env.guidance=magic"], "`env.guidance` must name guidance terms of kl"),
        (["--set", "env.horizon=0"], "`env.horizon` must be >= 1, got 0"),
        *(
            (
                ["--set", override],
                f"`{override.partition('=')[0]}` changes nothing in this command, got '{override}'"
                "; leave it out",
            )
            for override in ("env.instances=unknown-scale", "env.action=box", "env.split=test")
        ),
        (["--set", "seed=1"], "--set must look like env.batch_size=16 here, got 'seed=1'"),
        (["--loudly"], "--loudly"),
    ],
)
def test_compare_refuses_wrong_options(fails, command, pools, tmp_path, others, message):
    assert message in fails(*command(*others))
    assert not pools
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guidance": {"kl": -1}}, "`rows.b.guidance` must map 'kl' to a weight >= 0, got -1"),
        ({"guidance": {"magic": 1}}, "`rows.b.guidance` must name guidance terms of kl, weight_l2"),
        ({"tune": {"kl": [1, -1]}}, "must be >= 0.0, got -1"),
        ({"rule": "magic"}, "`rows.b.rule` must be one of uniform, "),
    ],
    ids=["negative-weight", "unknown-term", "negative-candidate", "unknown-rule"],
)
def test_compare_refuses_wrong_rows(fails, command, pools, tmp_path, changes, message):
    rows = [*ROWS, {"name": "b", "rate": 0.1, **changes}]
    assert message in fails(*command(rows=rows))
    assert not pools
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"guidance": {"feature_l2": {"weight": 1, "layer": "nope"}}},
            "`rows.b.guidance`: `layer` of feature_l2 must be the dotted name of a module of the "
            "backbone",
        ),
        ({"options": {"decay": 1}}, "`options` must fit the rule uniform, got {'decay': 1}"),
    ],
    ids=["layer", "options"],
)
def test_compare_refuses_what_cannot_be_built(asg, fails, command, pools, changes, message):
    rows = [*ROWS, {"name": "b", "rate": 0.1, **changes}]
    assert message in fails(*command(rows=rows))
    assert all(pool.trainings == {} for pool in pools)
    # Once mended, the same command works.
    assert asg(*command(rows=[ROWS[1]], claims=[])).status == 0


def test_compare_names_the_package_that_an_optimizer_needs(fails, command, pools, monkeypatch):
    monkeypatch.setitem(sys.modules, "prodigyopt", None)  # importing it fails
    rows = [ROWS[1], {"name": "b", "rate": 1, "env": {"optimizer": "prodigy", "base_lr": 1}}]
    message = fails(*command(rows=rows, claims=[]))
    assert "needs the package prodigyopt; pip install 'asg-env[rivals]'" in message
    assert pools[0].trainings == {}


def test_compare_refuses_a_controller_that_is_none(fails, command, pools, trained_run, tmp_path):
    assert f"{tmp_path} is not a run folder" in fails(*command("--controller", tmp_path))
    message = fails(*command("--controller", trained_run.path, "--set", "env.horizon=4"))
    assert (
        f"--controller {trained_run.path} trains with inner steps 6, what it stands beside with 8"
        in (message)
    )
    assert not pools
    assert not (tmp_path / "out").exists()


def test_compare_needs_labels_to_judge_by(fails, image_folders, tmp_path):
    source, target = image_folders
    settings = [f"env.source={source}", f"env.target={target}", "env.target_labels=false"]
    settings += ["env.backbone=torchvision:resnet18", "env.weights=random", "env.image_size=32"]
    settings += ["env.reward=train_loss"]
    words = [word for setting in settings for word in ("--set", setting)]
    message = fails("compare", "ASG/ImageFolder-v0", "--out", tmp_path / "out", *words)
    assert "the comparison needs labelled images of outer_valid" in message
    assert not (tmp_path / "out").exists()
