import json
import math
import re
from importlib.resources import files

import numpy as np
import pytest
from torch import nn

from asg_env.schedule import LearnedSchedule

MULTIPLIERS = ((1.0, 0.1), (0.5, 0.2), (0.0, 0.4))

# The file


def test_schedule_survives_its_file(tmp_path, make_schedule):
    original = make_schedule()
    original.save(tmp_path / "schedule.json")
    assert LearnedSchedule.load(tmp_path / "schedule.json") == original
    assert list(LearnedSchedule.load(str(tmp_path / "schedule.json")).layer_groups) == [
        "body",
        "head",
    ]


def test_schedule_file_is_plain_json_with_format_and_version(tmp_path, make_schedule):
    make_schedule().save(tmp_path / "schedule.json")
    assert [p.name for p in tmp_path.iterdir()] == ["schedule.json"]  # no temporary file
    record = json.loads((tmp_path / "schedule.json").read_text(encoding="utf-8"))
    assert (record["format"], record["version"]) == ("asg-env-schedule", 1)
    assert record["knots"] == [0.0, 0.25, 0.5]
    assert record["multipliers"] == [list(row) for row in MULTIPLIERS]


def test_schedule_file_has_a_row_of_multipliers_a_line(tmp_path, make_schedule):
    make_schedule().save(tmp_path / "schedule.json")
    text = (tmp_path / "schedule.json").read_text(encoding="utf-8")
    assert '  "multipliers": [\n    [1.0, 0.1],\n    [0.5, 0.2],\n    [0.0, 0.4]\n  ],\n' in text


def test_schema_that_is_published_is_that_of_the_code():
    published = files("asg_env").joinpath("schedule.schema.json").read_text(encoding="utf-8")
    assert json.loads(published) == LearnedSchedule.model_json_schema()


def test_schema_takes_a_file_and_refuses_a_damaged_one(tmp_path, make_schedule):
    jsonschema = pytest.importorskip("jsonschema")
    make_schedule().save(tmp_path / "schedule.json")
    record = json.loads((tmp_path / "schedule.json").read_text(encoding="utf-8"))
    schema = json.loads(files("asg_env").joinpath("schedule.schema.json").read_text("utf-8"))
    jsonschema.validate(record, schema)
    for damage in (
        {"version": 2},
        {"format": "else"},
        {"multipliers": [[-1.0, 0.1]]},
        {"interpolation": "cubic"},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**record, **damage}, schema)


def test_schedule_refuses_changes_that_do_not_fit(make_schedule):
    learned, longer = make_schedule(), {"knots": (0.0, 0.1), "multipliers": ((1.0, 1.0),) * 2}
    with pytest.raises(ValueError, match="`schedule.spread` must be 2 knots x 2 layer groups"):
        learned.with_changes(**longer)
    with pytest.raises(ValueError, match="`schedule.base_lr` must be > 0"):
        learned.with_changes(base_lr=-1.0)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"knots": (0.0, 0.5, 0.25)}, "`schedule.knots` must increase from 0 and stay below 1"),
        ({"base_lr": -1.0}, "`schedule.base_lr` must be > 0.0, got -1.0; set schedule.base_lr"),
        ({"multipliers": ((math.nan, 0.1),) * 3}, "`schedule.multipliers.0.0` must be a finite"),
        ({"speed": 1}, "`schedule.speed` is unknown; known keys are base_lr"),
    ],
)
def test_schedule_made_by_hand_is_refused_with_the_sentence_of_a_file(
    changes, sentence, make_schedule
):
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}.*$"):
        make_schedule(**changes)


@pytest.mark.parametrize("rate", [np.float32(0.25), np.int64(1)])
def test_param_groups_take_the_numbers_of_numpy(rate, make_schedule, make_network):
    groups = make_schedule().param_groups(make_network(), rate)
    assert [group["lr"] for group in groups] == [float(rate)] * len(groups)


def test_schedule_with_a_key_that_python_uses_is_refused_as_any(write):
    with pytest.raises(ValueError, match="`schedule.self` is unknown; known keys are base_lr"):
        LearnedSchedule.load(write(self=1))


def test_schedule_made_by_hand_says_what_is_missing():
    with pytest.raises(ValueError, match="^`schedule.layer_groups` is missing; add it$"):
        LearnedSchedule(knots=(0.0,))


def test_schedule_keeps_every_bit_of_its_numbers(tmp_path, make_schedule):
    numbers = np.random.default_rng(0).random((3, 2))
    original = make_schedule(multipliers=tuple(map(tuple, numbers.tolist())), base_lr=0.1 + 0.2)
    original.save(tmp_path / "schedule.json")
    loaded = LearnedSchedule.load(tmp_path / "schedule.json")
    np.testing.assert_array_equal(loaded.multipliers, numbers)
    assert loaded.base_lr == 0.1 + 0.2


@pytest.fixture
def write(tmp_path, make_schedule):
    """Save a schedule with some entries of its record changed; return the path."""

    def write_(**changes):
        path = tmp_path / "schedule.json"
        make_schedule().save(path)
        record = json.loads(path.read_text(encoding="utf-8"))
        for name, value in changes.items():
            if value is ...:
                del record[name]
            else:
                record[name] = value
        path.write_text(json.dumps(record), encoding="utf-8")
        return path

    return write_


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "has schedule version 2, this asg-env reads 1; use the asg-env that"),
        ({"version": ...}, "has schedule version None"),
        ({"version": True}, "has schedule version True, this asg-env reads 1"),
        ({"base_lr": 1e308}, r"`schedule.base_lr` must be .*1e\+30, got 1e\+308"),
        ({"multipliers": [[1e30, 0.1]] * 3}, r"must be <= 1000000.0, got 1e\+30"),
        ({"format": "else"}, "is not a schedule: its `format` must be 'asg-env-schedule'"),
        ({"format": ...}, "is not a schedule"),
        ({"knots": ...}, "`schedule.knots` is missing; add it"),
        ({"speed": 1}, "`schedule.speed` is unknown; known keys are base_lr"),
        ({"multipliers": [[math.nan, 0.1]] * 3}, r"`schedule.multipliers.0.0` must be a finite"),
        ({"multipliers": [[0.1, math.inf]] * 3}, r"multipliers.0.1` must be a finite .* got inf"),
        (
            {"multipliers": [[-0.1, 0.1]] * 3},
            r"`schedule.multipliers.0.0` must be >= 0.* got -0\.1",
        ),
        ({"spread": [[-1, 0.1]] * 3}, "`schedule.spread.0.0` must be >= 0.* got -1"),
        ({"multipliers": [[0.1, 0.1]] * 2}, "`schedule.multipliers` must be 3 knots x 2 layer"),
        ({"multipliers": [[0.1]] * 3}, "`schedule.multipliers` must be 3 knots x 2 layer groups"),
        ({"multipliers": [["fast", 0.1]] * 3}, "multipliers.0.0` must be a number, got 'fast'"),
        ({"multipliers": 3}, "is damaged"),
        ({"multipliers": None}, "is damaged"),
        ({"knots": [0.0, 0.5, 0.5]}, "`schedule.knots` must increase from 0 and stay below 1"),
        ({"knots": [0.0, 0.5, 0.25]}, "`schedule.knots` must increase from 0"),
        ({"knots": [0.1, 0.25, 0.5]}, "`schedule.knots` must increase from 0"),
        ({"knots": [0.0, 0.5, 1.0]}, "`schedule.knots` must increase from 0 and stay below 1"),
        ({"knots": [0.0, math.nan, 0.5]}, "`schedule.knots.1` must be a finite number"),
        ({"knots": []}, "`schedule.knots` must hold at least 1 entry"),
        ({"knots": 0}, "`schedule.knots` must be a list, got 0; set schedule.knots"),
        ({"multipliers": [0.1]}, r"`schedule.multipliers.0` must be a list, got 0\.1"),
        ({"provenance": {"run": 1}}, "`schedule.provenance.run` must be text, got 1"),
        ({"sources": {"tail": "body"}}, r"`schedule.sources` must name groups .*, got \['tail'\]"),
        ({"base_lr_scale": 0.0}, "`schedule.base_lr_scale` must be > 0"),
        ({"base_lr": 0}, "`schedule.base_lr` must be > 0.*, got 0"),
        ({"base_lr": math.inf}, "`schedule.base_lr` must be a finite number, got inf"),
        ({"base_lr": "fast"}, "`schedule.base_lr` must be a number, got 'fast'"),
        ({"episodes": True}, "`schedule.episodes` must be an integer, got True"),
        (
            {"lr_factor": "cosine"},
            "`schedule.lr_factor` must be one of 'constant' or 'warmup-poly'",
        ),
        ({"interpolation": "cubic"}, "`schedule.interpolation` must be one of 'step', 'linear'"),
        ({"layer_groups": {}}, "`schedule.layer_groups` must hold at least 1 entry"),
        ({"layer_groups": ["body", "head"]}, "`schedule.layer_groups` must be a mapping"),
        (
            {"layer_groups": {"body": 0, "head": 2}},
            "`schedule.layer_groups.body` must be text, got 0",
        ),
        ({"layer_groups": {"body": "(", "head": "2"}}, "layer_groups.body` must be a regular expr"),
        ({"settings": [1]}, r"`schedule.settings` must be a mapping, got \[1\]"),
        ({"momentum_form": "nesterov"}, "`schedule.momentum_form` must be one of 'pytorch' or"),
    ],
)
def test_schedule_load_refuses_what_it_cannot_use(write, changes, message):
    path = write(**changes)
    with pytest.raises(ValueError, match=message) as caught:
        LearnedSchedule.load(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b"\xff\xfe\x00", b'"text"'])
def test_schedule_load_refuses_what_is_no_schedule(tmp_path, content):
    path = tmp_path / "schedule.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read as a schedule|is not a schedule"):
        LearnedSchedule.load(path)


def test_schedule_load_says_that_a_file_is_missing(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.json cannot be read as a schedule"):
        LearnedSchedule.load(tmp_path / "nowhere.json")


def test_schedule_load_says_in_which_line_it_is_no_json(tmp_path, make_schedule):
    path = tmp_path / "schedule.json"
    make_schedule().save(path)
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([lines[0], lines[1].rstrip(","), *lines[2:]]), encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"\(it is no JSON text: line 3, Expecting ',' delimiter\)"
    ):
        LearnedSchedule.load(path)


def test_schedule_of_an_editor_that_writes_a_byte_order_mark_is_read(tmp_path, make_schedule):
    path = tmp_path / "schedule.json"
    make_schedule().save(path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert LearnedSchedule.load(path) == make_schedule()


def test_schedule_truncated_file_is_refused_at_any_length(tmp_path, make_schedule):
    path = tmp_path / "schedule.json"
    make_schedule().save(path)
    content = path.read_bytes()
    for length in range(0, len(content.rstrip()), 37):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="cannot be read as a schedule"):
            LearnedSchedule.load(path)


# Reading it


def test_schedule_holds_each_knots_value_until_the_next(make_schedule):
    learned = make_schedule()
    for progress, row in (
        (0.0, 0),
        (0.2499, 0),
        (0.25, 1),
        (0.4999, 1),
        (0.5, 2),
        (0.99, 2),
        (1.0, 2),
    ):
        assert learned.at(progress) == MULTIPLIERS[row], progress


def test_schedule_interpolates_between_knots(make_schedule):
    rows = ((1.0, 0.1), (0.01, 0.2), (0.0, 0.4))
    linear = make_schedule(multipliers=rows, interpolation="linear")
    log = make_schedule(multipliers=rows, interpolation="log-linear")

    for learned in (linear, log):
        for knot, row in zip(learned.knots, rows, strict=True):
            assert learned.at(knot) == row
        assert learned.at(0.9) == learned.at(1.0) == rows[-1]
    assert linear.at(0.125) == pytest.approx((0.505, 0.15))
    assert log.at(0.125) == pytest.approx((0.1, math.sqrt(0.02)))
    assert log.at(0.375) == pytest.approx((0.005, math.sqrt(0.08)))  # 0 has no logarithm


def test_param_groups_spare_biases_and_norms_the_decay(make_schedule):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2, bias=False))
    learned = make_schedule(layer_groups={"body": r"[01]\.", "head": r"2\."})
    groups = learned.param_groups(model, weight_decay=0.05)
    named = {id(p): name for name, p in model.named_parameters()}
    found = [(g["name"], g["weight_decay"], [named[id(p)] for p in g["params"]]) for g in groups]
    assert found == [
        ("body", 0.05, ["0.weight"]),
        ("body/no_decay", 0.0, ["0.bias", "1.weight", "1.bias"]),
        ("head", 0.05, ["2.weight"]),
    ]
    assert [group["layer_group"] for group in groups] == ["body", "body", "head"]


def test_param_groups_name_the_groups_and_set_their_rates(make_schedule, make_network):
    model = make_network()
    groups = make_schedule().param_groups(model, base_lr=0.05)
    assert [group["name"] for group in groups] == ["body", "head"]
    assert [group["lr"] for group in groups] == [0.05] * 2
    assert [len(group["params"]) for group in groups] == [2, 2]
    assert groups[0]["params"][0] is model[0].weight


def test_param_groups_use_the_schedules_own_rate_when_none_is_given(make_schedule, make_network):
    assert {group["lr"] for group in make_schedule().param_groups(make_network())} == {0.3}


def test_param_groups_pass_frozen_parameters_over(make_schedule, make_network):
    model = make_network()
    model.append(nn.Linear(2, 2).requires_grad_(False))  # matches no group
    model[0].bias.requires_grad_(False)
    groups = make_schedule().param_groups(model)
    assert [len(group["params"]) for group in groups] == [1, 2]


def test_param_groups_refuse_a_trainable_parameter_without_a_group(make_schedule, make_network):
    model = make_network().append(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"match no layer group .*3\.weight, 3\.bias"):
        make_schedule().param_groups(model)


def test_param_groups_refuse_a_parameter_of_several_groups(make_schedule, make_network):
    learned = make_schedule(layer_groups={"body": r"[02]\.", "head": r"2\."})
    with pytest.raises(ValueError, match=r"several layer groups: 2\.weight \(body, head\)"):
        learned.param_groups(make_network())


def test_param_groups_refuse_a_group_without_parameters(make_schedule, make_network):
    with pytest.raises(ValueError, match=r"layer groups \['head'\] match no trainable parameter"):
        make_schedule().param_groups(make_network()[:2])


@pytest.mark.parametrize("base_lr", [0.0, -0.1, math.nan, math.inf, 1e40, True, "0.1"])
def test_param_groups_refuse_a_rate_that_is_none(base_lr, make_schedule, make_network):
    with pytest.raises(ValueError, match="`base_lr` must be a finite number > 0"):
        make_schedule().param_groups(make_network(), base_lr)
