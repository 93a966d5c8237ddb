import csv
import json

import pytest

from agents.experiment import Experiment
from asg_env.validation import ConfigError
from benchmarks import tune_sb3


@pytest.mark.parametrize("kind", tune_sb3.KINDS)
def test_candidates_are_experiments_of_the_budget_and_follow_the_seed(kind):
    drawn = [tune_sb3.candidate(kind, number, 480, 0) for number in range(12)]
    assert drawn[0].agent == type(drawn[0].agent)(updates=480 // drawn[0].agent.episodes_per_update)
    for experiment in drawn:
        experiment.agent.check(experiment.env)
        assert experiment.agent.episodes == 480 // experiment.agent.episodes_per_update * (
            experiment.agent.episodes_per_update
        )
        assert experiment.env.split == "train"
    assert len({json.dumps(experiment.agent.model_dump()) for experiment in drawn}) == 12
    again = tune_sb3.candidate(kind, 5, 480, 0)
    assert again.to_dict() == drawn[5].to_dict()
    assert tune_sb3.candidate(kind, 5, 480, 1).to_dict() != drawn[5].to_dict()


def test_a_search_writes_every_candidate(monkeypatch, tmp_path):
    tiny = {"horizon": 3, "inner_steps": 2, "outer_valid_size": 50}
    monkeypatch.setattr(tune_sb3, "ENV", {**tune_sb3.ENV, **tiny})
    path = tmp_path / "tuning.csv"
    best = tune_sb3.search(["ars"], 2, 64, 2, 0, 1, path)
    with path.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["kind"], row["candidate"]) for row in rows] == [("ars", "0"), ("ars", "1")]
    assert all(0 < float(row["score"]) < 1 for row in rows)
    for row in rows:
        settings = json.loads(row["settings"])
        assert Experiment({"env": {"id": tune_sb3.TASK, "action": "box"}, "agent": settings})
    assert best["ars"]["score"] == max(float(row["score"]) for row in rows)


def test_too_few_episodes_are_refused():
    with pytest.raises(ConfigError, match="--episodes must be enough for one update, got 31"):
        tune_sb3.candidate("ppo", 0, 31, 0)
