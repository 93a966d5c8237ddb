import json
import sys

import numpy as np
import pytest

from benchmarks import adaptation
from benchmarks.adaptation import answer, answers, table

FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)


def results(slope, accuracy=0.5):
    """Episodes of a controller that answers the factor by that slope."""
    return [
        {
            "instance": {"base_lr_scale": factor},
            "multipliers": [[0.03 * factor**slope, 0.03 * factor**slope]] * 3,
            "accuracy": accuracy,
            "diverged": False,
        }
        for factor in FACTORS
    ]


@pytest.fixture
def benchmark(tmp_path):
    def write(method, seed, kind="agent", **episodes):
        folder = tmp_path / "suite" / method / f"seed-{seed}"
        folder.mkdir(parents=True)
        stored = {"kind": kind, "method": method, "results": results(**episodes)}
        (folder / "test-suite.json").write_text(json.dumps(stored))

    for seed, slope in enumerate((-1.0, -0.5, 0.0)):
        write("mine", seed, slope=slope, accuracy=0.5 - 0.1 * slope)
    write("static-search", 0, "baseline", slope=0.0)
    return tmp_path


@pytest.mark.parametrize("slope", [-1.0, -0.25, 0.0, 0.5])
def test_slope_is_that_of_a_power_of_the_factor(slope):
    assert answer("mine", results(slope)).slope == pytest.approx(slope, abs=1e-12)


def test_a_controller_that_ignores_the_factor_has_none_whatever_else_it_does():
    generator = np.random.default_rng(0)
    episodes = results(0.0)
    for episode in episodes:
        episode["multipliers"] = np.outer(generator.permutation([0.0, 0.01, 1.0]), [1, 0.1])
    assert answer("mine", episodes).slope == pytest.approx(0, abs=1e-12)


def test_diverged_trainings_count_as_zero():
    episodes = results(0.0, accuracy=0.8)
    assert answer("mine", episodes).accuracy == pytest.approx(0.8)
    for episode in episodes:
        episode["diverged"] = True
    assert answer("mine", episodes).accuracy == 0


def test_agents_of_a_benchmark_are_read_and_baselines_left_out(benchmark):
    found = answers(benchmark, "suite")
    assert [one.agent for one in found] == ["mine"] * 3
    text = table(found)
    assert "| mine | 3 | -0.50 (-1.00 to 0.00) |" in text
    assert "over 3 controllers: -1.00" in text


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (None, "suite has no judged controllers; give a finished benchmark folder"),
        ('{"kind": "agent"}', "test-suite.json is damaged or of another version; give a finished"),
        ('{"kind": "agent", "method": "a", "results": [{}]}', "is damaged or of another version"),
    ],
)
def test_what_is_no_benchmark_is_refused(benchmark, monkeypatch, capsys, damage, message):
    for path in (benchmark / "suite").rglob("*.json"):
        path.unlink()
    if damage is not None:
        (benchmark / "suite" / "mine" / "seed-0" / "test-suite.json").write_text(damage)
    monkeypatch.setattr(sys, "argv", ["adaptation", str(benchmark), "suite"])
    with pytest.raises(SystemExit) as stopped:
        adaptation.main()
    assert stopped.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
