import numpy as np
import pytest

from agents.experiment import Experiment
from agents.run_folder import RunFolder
from agents.train import train_seed
from asg_env.validation import ConfigError
from benchmarks import transfer

TASK = "ASG/Digits-v0"
TINY = {"horizon": 3, "inner_steps": 2, "outer_valid_size": 50}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    values = {
        "env": {"id": TASK, "instances": "unknown-scale", "observation": "normalised", **TINY},
        "agent": {
            "kind": "reinforce",
            "network": "coordinate-wise",
            "updates": 1,
            "instances_per_update": 1,
            "rollouts_per_instance": 2,
            "hidden_size": 4,
        },
        "train": {"workers": 1, "seeds": 1, "search_episodes": 0},
    }
    run = RunFolder.start(tmp_path_factory.mktemp("transfer") / "run", Experiment(values))
    train_seed(run, 0, lambda *_: None, 0)
    return run


@pytest.fixture
def targets(monkeypatch, tmp_path):
    suite = tmp_path / "tiny.yaml"
    suite.write_text(f"id: {TASK}\n" + "".join(f"{k}: {v}\n" for k, v in TINY.items()))
    listed = {
        "here": (str(suite), {}, 2),
        "unknown": (str(suite), {"instances": "unknown-scale"}, 9),
    }
    monkeypatch.setattr(transfer, "TARGETS", listed)
    monkeypatch.setattr(transfer, "TUNING_INSTANCES", 1)
    monkeypatch.setattr(transfer, "FACTORS", (0.5, 2.0))


def test_every_row_is_judged_once_and_compared_with_uniform(run, targets, monkeypatch, tmp_path):
    out = tmp_path / "transfer.json"
    found = transfer.measure(run, 1, 3, 0, out)
    rows = [*transfer.RULES, transfer.LIVE, transfer.AS_IT_IS, transfer.SCALED]
    for name, count in (("here", 2), ("unknown", 3)):
        assert list(found["rows"][name]) == rows
        for done in found["rows"][name].values():
            assert np.shape(done["scores"]) == (1, count)
    assert found["rows"]["here"][transfer.SCALED]["setting"][0] in ("x 0.5", "x 2")
    lines = transfer.table(found).splitlines()
    assert sum(line.startswith("| ") for line in lines) == 2 * (1 + len(rows))
    transfer.draw(found, tmp_path / "transfer.png")
    assert (tmp_path / "transfer.png").read_bytes().startswith(b"\x89PNG")
    for method in ("rule", "schedule", "live"):
        monkeypatch.setattr(transfer.Target, method, lambda *_: pytest.fail("judged again"))
    assert transfer.measure(run, 1, 3, 0, out) == found
    with pytest.raises(ConfigError, match="of other controllers or tests; give another"):
        transfer.measure(run, 1, 2, 0, out)


def test_schedules_are_scaled_as_a_whole(run):
    (schedule,) = transfer.schedules_of(run, 1, 0)
    doubled = transfer.scaled(schedule, 2.0)
    np.testing.assert_array_equal(doubled.multipliers, 2 * np.array(schedule.multipliers))
    assert doubled.knots == schedule.knots


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "is not a run folder"),
        (["--seeds", "2"], "--seeds must be from 1 to 1, got 2; set it so"),
        (["--tests", "0"], "--tests must be from 1 to 40, got 0; set it so"),
    ],
)
def test_mistakes_give_a_sentence(run, monkeypatch, capsys, tmp_path, arguments, message):
    folder = run.path if arguments else tmp_path
    words = ["transfer", str(folder), "--out", str(tmp_path / "transfer.json"), *arguments]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as stop:
        transfer.main()
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
