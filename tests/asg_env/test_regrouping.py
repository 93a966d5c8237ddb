import pytest
import torch
from torch import nn

from asg_env.core.layer_groups import split_parameters
from asg_env.regrouping import depth_groups


class Block(nn.Module):
    """A residual block with a list of layers in it, as many have."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.shortcut = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))


class Backbone(nn.Module):
    """Stages of blocks below an attribute of the model, then a norm; a head of norm and layer."""

    def __init__(self, stages=(2, 1)):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(4))
        self.conv = nn.Conv2d(3, 4, 3)
        self.body = nn.Module()
        self.body.stages = nn.ModuleList(
            nn.Sequential(*(Block() for _ in range(n))) for n in stages
        )
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Module()
        self.head.norm, self.head.fc = nn.LayerNorm(4), nn.Linear(4, 2)


@pytest.fixture
def five(make_schedule):
    """A schedule of five groups whose multipliers say which group they are of."""
    names = ["conv1", "conv2", "conv3", "conv4", "head"]
    return make_schedule(
        layer_groups={name: rf"{name}\." for name in names},
        multipliers=((0.1, 0.2, 0.3, 0.4, 0.5), (0.01, 0.02, 0.03, 0.04, 0.05), (0.0,) * 5),
        spread=((0.0,) * 5,) * 3,
    )


def covered(model, patterns):
    """Layer group of every parameter; each must have exactly one."""
    import re

    found = {}
    for name, _ in model.named_parameters():
        (found[name],) = [g for g, p in patterns.items() if re.match(p, name)]
    return found


def test_every_block_is_a_group_between_stem_and_head():
    model = Backbone()
    groups = depth_groups(model)
    assert list(groups) == ["stem", "body.stages.0.0", "body.stages.0.1", "body.stages.1.0", "head"]
    found = covered(model, groups)
    assert found["token"] == found["conv.weight"] == "stem"
    assert found["body.stages.0.1.shortcut.0.weight"] == "body.stages.0.1"
    assert found["norm.weight"] == found["head.norm.weight"] == "body.stages.1.0"
    assert found["head.fc.weight"] == found["head.fc.bias"] == "head"


def test_twelve_blocks_do_not_mix_the_first_with_the_tenth():
    model = Backbone((12,))
    assert len(depth_groups(model)) == 14
    assert covered(model, depth_groups(model))["body.stages.0.1.conv.weight"] == "body.stages.0.1"


def test_layers_are_groups_where_there_are_no_blocks():
    model = nn.Sequential(
        nn.BatchNorm2d(3),  # with nothing before it to go with
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3),
        nn.Flatten(),
        nn.Linear(4, 2),
    )
    found = covered(model, depth_groups(model))
    assert list(dict.fromkeys(found.values())) == ["0", "1", "4", "head"]
    assert found["2.weight"] == "1"


def test_lists_of_layers_below_attributes_are_layers_too():
    model = nn.Module()
    model.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    model.classifier = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    assert list(depth_groups(model)) == ["features.0", "features.2", "classifier.0", "head"]


def test_frozen_layers_are_no_groups_and_the_last_that_trains_is_the_head():
    model = Backbone()
    model.conv.requires_grad_(False)
    model.token.requires_grad_(False)
    model.body.stages[0][0].requires_grad_(False)
    model.old_head = nn.Linear(4, 7).requires_grad_(False)
    assert list(depth_groups(model)) == ["body.stages.0.1", "body.stages.1.0", "head"]


def test_frozen_blocks_count_for_the_depth_of_those_behind_them(five):
    whole, model = five.by_depth(Backbone((12,))), Backbone((12,))
    model.token.requires_grad_(False)
    model.conv.requires_grad_(False)
    model.body.stages[0][:6].requires_grad_(False)
    model.old_head = nn.Linear(4, 7).requires_grad_(False)  # behind the head
    partly = five.by_depth(model)
    assert list(partly.layer_groups) == list(whole.layer_groups)[7:]
    assert partly.sources == {name: whole.sources[name] for name in partly.layer_groups}
    torch.optim.SGD(partly.param_groups(model))


@pytest.mark.parametrize("model", [nn.Linear(3, 2), nn.Sequential(nn.Linear(3, 2)), nn.ReLU()])
def test_a_model_without_a_body_is_refused(model):
    with pytest.raises(ValueError, match="must have two layers or more with trainable parameters"):
        depth_groups(model)


def test_a_head_within_a_block_is_refused():
    model = nn.Sequential(Block(), Block())
    with pytest.raises(ValueError, match=r"ends in 1, a block .* its head 1\.conv; give patterns"):
        depth_groups(model, head="1.conv")


def test_by_depth_gives_each_group_the_nearest_multipliers(five):
    mapped = five.by_depth(Backbone((12,)))
    assert list(mapped.layer_groups)[0] == "stem"
    sources = list(mapped.sources.values())
    assert sources == (["conv1"] * 2 + ["conv2"] * 4 + ["conv3"] * 4 + ["conv4"] * 3 + ["head"])
    number = {"conv1": 0, "conv2": 1, "conv3": 2, "conv4": 3, "head": 4}
    for before, after in zip(five.multipliers, mapped.multipliers, strict=True):
        assert after == tuple(before[number[source]] for source in sources)


def test_by_depth_with_fewer_layers_keeps_the_ends(five):
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    assert list(five.by_depth(model).sources.values()) == ["conv1", "conv4", "head"]


def test_a_mapped_schedule_survives_its_file_and_drives_an_optimizer(five, tmp_path):
    model = Backbone()
    mapped = five.by_depth(model)
    mapped.save(tmp_path / "mapped.json")
    loaded = type(five).load(tmp_path / "mapped.json")
    assert loaded == mapped
    optimizer = torch.optim.SGD(loaded.param_groups(model, base_lr=1.0))
    loaded.to_torch(optimizer, 8)
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert (rates["stem"], rates["body.stages.1.0"], rates["head"]) == (0.1, 0.4, 0.5)


def test_regroup_keeps_names_and_takes_sources(five):
    patterns = {"conv1": "stem", "mid": "blocks", "head": "fc"}
    mapped = five.regroup(patterns, {"mid": "conv3"})
    assert mapped.layer_groups == patterns
    assert mapped.multipliers[0] == (0.1, 0.3, 0.5)
    assert mapped.sources == {"conv1": "conv1", "mid": "conv3", "head": "head"}
    again = mapped.regroup({"all": ""}, {"all": "mid"})
    assert again.sources == {"all": "conv3"}  # what it was learned for, not what it was called


@pytest.mark.parametrize(
    ("patterns", "sources", "message"),
    [
        ({"mid": "b"}, {}, r"from groups of \['conv1', .*\], got \{'mid': 'mid'\}; name one"),
        ({"mid": "b"}, {"mid": "conv9"}, r"got \{'mid': 'conv9'\}"),
        ({"head": "b"}, {"mid": "conv1"}, r"must be for groups of \['head'\], got \['mid'\]"),
        ({"head": "("}, {}, "must be a regular expression"),
        ({}, {}, "must hold at least 1 entry"),
    ],
)
def test_regroup_refuses_what_it_cannot_place(five, patterns, sources, message):
    with pytest.raises(ValueError, match=message):
        five.regroup(patterns, sources)


def test_regroup_leaves_no_trainable_parameter_over(five):
    mapped = five.regroup({"conv1": r"conv\.|token", "head": r"head\."})
    with pytest.raises(
        ValueError, match=r"match no layer group .*body\.stages\.0\.0\.conv\.weight"
    ):
        mapped.param_groups(Backbone())


def test_table_says_what_goes_where(five):
    model = Backbone()
    lines = five.by_depth(model).table(model).splitlines()
    assert [line.split()[0] for line in lines] == [
        *("layer", "stem", "body.stages.0.0", "body.stages.0.1", "body.stages.1.0", "head")
    ]
    assert lines[1].split() == [
        *("stem", "conv1", "116", "0.1,", "0.1,", "0", "token", "...", "conv.bias", "(3)")
    ]
    with pytest.raises(ValueError, match="match no layer group"):
        five.table(model)


# Models of others: what a user brings


@pytest.mark.parametrize(
    ("library", "name", "count", "second", "head"),
    [
        ("torchvision", "resnet18", 10, "layer1.0", r"fc(\.|$)"),
        ("torchvision", "vgg16", 16, "features.2", r"classifier\.6(\.|$)"),
        ("torchvision", "vit_b_16", 14, "encoder.layers.encoder_layer_0", r"heads\.head(\.|$)"),
        ("torchvision", "densenet121", 9, "features.denseblock1", r"classifier(\.|$)"),
        ("timm", "vit_tiny_patch16_224", 14, "blocks.0", r"head(\.|$)"),
        ("timm", "vit_base_patch16_siglip_224", 14, "blocks.0", r"attn_pool\.mlp\.fc2(\.|$)"),
        ("timm", "convnext_tiny", 6, "stages.0", r"head\.fc(\.|$)"),
        ("timm", "poolformer_s12", 6, "stages.0", r"head\.fc(\.|$)"),
        ("timm", "efficientnet_b0", 18, "blocks.0.0", r"classifier(\.|$)"),
    ],
)
def test_depth_groups_cover_models_of_others(library, name, count, second, head):
    if library == "timm":
        make = pytest.importorskip("timm").create_model
    else:
        make = pytest.importorskip("torchvision.models").get_model
    with torch.device("meta"):
        model = make(name)
    groups = depth_groups(model)
    owned = split_parameters(model, groups)  # refuses what is left over or in two groups
    assert sum(map(len, owned.values())) == len(list(model.parameters()))
    assert (len(groups), list(groups)[1], groups["head"]) == (count, second, head)


def test_the_head_may_be_named(five):
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model("deit_tiny_distilled_patch16_224")
    mapped = five.by_depth(model, head="head")
    assert mapped.layer_groups["head"] == r"head(\.|$)"
    owned = split_parameters(model, mapped.layer_groups)
    assert len(owned["head"]) == 2
    with pytest.raises(ValueError, match="`head` must be a module of .* got 'fc'; name it"):
        five.by_depth(model, head="fc")


def test_a_model_that_ends_in_a_norm_is_told_to_name_its_head(five):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.LayerNorm(2))
    with pytest.raises(ValueError, match="`head` must be .* with a trainable matrix, got '2'"):
        five.by_depth(model)
    assert five.by_depth(model, head="1").layer_groups.keys() == {"0", "head"}


def test_a_head_may_have_been_made_first(five):
    model = nn.Module()
    model.fc = nn.Linear(2, 2)
    model.blocks = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    mapped = five.by_depth(model, head="fc")
    assert list(mapped.layer_groups) == ["blocks.0", "blocks.1", "head"]
    assert mapped.sources["head"] == "head"


def test_parametrised_layers_are_one():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    nn.utils.parametrizations.weight_norm(model[1])
    assert [len(p) for p in split_parameters(model, depth_groups(model)).values()] == [2, 3]


def test_a_layer_called_head_before_the_last_is_refused(five):
    model = nn.ModuleDict({"head": nn.Linear(2, 2), "old_head": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match="has a layer 'head' before its last"):
        five.by_depth(model)
