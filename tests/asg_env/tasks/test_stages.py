import re

import pytest
import torch
from torch import nn
from torchvision import models

from asg_env.core.layer_groups import split_parameters
from asg_env.core.optimizee import Optimizee
from asg_env.tasks.stages import layer_groups_of

SEVEN = ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "head"]
VGG = ["conv1", "conv2", "conv3", "conv4", "conv5", "FC", "head"]
STEM_4 = ["stem", "stage1", "stage2", "stage3", "stage4", "head"]
STEM_5 = ["stem", "stage1", "stage2", "stage3", "stage4", "stage5", "head"]
VIT = ["embedding", "stage1", "stage2", "stage3", "stage4", "head"]
EXPECTED = {
    "torchvision:resnet18": SEVEN,
    "torchvision:resnet101": SEVEN,
    "torchvision:resnext50_32x4d": SEVEN,
    "torchvision:wide_resnet50_2": SEVEN,
    "timm:resnet18": SEVEN,
    "timm:resnet26t": SEVEN,
    "timm:resnetrs50": SEVEN,
    "timm:seresnext26d_32x4d": SEVEN,
    "torchvision:vgg11": VGG,
    "torchvision:vgg16_bn": VGG,
    "timm:vgg11_bn": VGG,
    "timm:vgg16": VGG,
    "torchvision:efficientnet_b0": STEM_5,
    "torchvision:efficientnet_v2_s": STEM_5,
    "torchvision:mobilenet_v2": STEM_5,
    "torchvision:mobilenet_v3_large": STEM_5,
    "torchvision:mobilenet_v3_small": STEM_4,  # its first block halves the size already
    "timm:efficientnet_b0": STEM_5,
    "timm:tf_efficientnet_lite0": STEM_5,
    "timm:tf_efficientnetv2_b0": STEM_5,
    "timm:efficientnet_cc_b0_4e": STEM_5,
    "timm:mobilenetv3_large_100": STEM_5,
    "torchvision:convnext_tiny": STEM_4,
    "torchvision:swin_t": STEM_4,
    "torchvision:regnet_y_400mf": STEM_4,
    "timm:convnext_tiny": STEM_4,
    "timm:convnextv2_atto": STEM_4,
    "timm:convnext_tiny_hnf": STEM_4,
    "timm:swin_tiny_patch4_window7_224": STEM_4,
    "timm:nf_regnet_b0": STEM_4,
    "torchvision:vit_b_16": VIT,
    "timm:vit_tiny_patch16_224": VIT,
    "timm:vit_little_patch16_reg4_gap_256": VIT,
    "timm:vit_xsmall_patch16_clip_224": VIT,
    "timm:deit3_small_patch16_224": VIT,
    "timm:eva02_tiny_patch14_336": VIT,
    "torchvision:alexnet": ["features", "classifier", "head"],
    "torchvision:shufflenet_v2_x0_5": ["conv1", "stage2", "stage3", "stage4", "conv5", "head"],
    "timm:regnetx_002": ["stem", "s1", "s2", "s3", "s4", "head"],
}


def build_backbone(name):
    """The network without its last layer and, where it can be, without memory for its weights."""
    library, _, model_name = name.partition(":")
    make = (
        models.get_model if library == "torchvision" else pytest.importorskip("timm").create_model
    )
    with torch.device("cpu" if "regnet_y" in model_name else "meta"):  # it computes its widths
        model = make(model_name)
    last = [key for key, m in model.named_modules() if isinstance(m, nn.Linear)][-1]
    model.set_submodule(last, nn.Identity())
    return model


def owners(name):
    """Parameter name of the backbone -> group, from the patterns alone."""
    backbone = build_backbone(name)
    groups = layer_groups_of(backbone)
    return {
        key: next(group for group, p in groups.items() if re.match(p, f"backbone.{key}"))
        for key, _ in backbone.named_parameters()
    }


@pytest.mark.parametrize("name", EXPECTED)
def test_layer_groups_of_divides_all_parameters_into_the_expected_groups(name):
    backbone = build_backbone(name)

    groups = layer_groups_of(backbone)

    assert list(groups) == EXPECTED[name]
    split = split_parameters(Optimizee(backbone, nn.Linear(2, 2), nn.Linear(2, 2)), groups)
    held = sum(len(parameters) for parameters in split.values())
    assert held == len(list(backbone.parameters())) + 2  # and none twice: split_parameters
    assert len(split["head"]) == 2


def test_layer_groups_of_resnet_reads_as_it_does_in_the_original():
    assert layer_groups_of(build_backbone("torchvision:resnet18")) == {
        "conv1": r"backbone\.conv1(?:\.|$)",
        "bn1": r"backbone\.bn1(?:\.|$)",
        "layer1": r"backbone\.layer1(?:\.|$)",
        "layer2": r"backbone\.layer2(?:\.|$)",
        "layer3": r"backbone\.layer3(?:\.|$)",
        "layer4": r"backbone\.layer4(?:\.|$)",
        "head": r"head\.",
    }


# Hand-checked against the printed models.
@pytest.mark.parametrize(
    ("name", "membership"),
    [
        (
            "torchvision:resnet18",
            {
                "conv1.weight": "conv1",
                "bn1.bias": "bn1",
                "layer1.0.bn1.weight": "layer1",
                "layer2.0.downsample.0.weight": "layer2",
                "layer4.1.bn2.bias": "layer4",
            },
        ),
        (
            "timm:resnetrs50",  # deep stem, and a convolution in place of the max-pool
            {
                "conv1.0.weight": "conv1",
                "conv1.6.weight": "conv1",
                "bn1.weight": "bn1",
                "maxpool.0.weight": "layer1",
                "layer1.0.conv1.weight": "layer1",
            },
        ),
        (
            "torchvision:vgg11",
            {
                "features.0.weight": "conv1",
                "features.3.weight": "conv2",
                "features.6.weight": "conv3",
                "features.8.bias": "conv3",
                "features.11.weight": "conv4",
                "features.13.weight": "conv4",
                "features.16.weight": "conv5",
                "features.18.weight": "conv5",
                "classifier.0.weight": "FC",
                "classifier.3.bias": "FC",
            },
        ),
        (
            "timm:vgg11_bn",
            {
                "features.0.weight": "conv1",
                "features.1.weight": "conv1",
                "features.4.weight": "conv2",
                "features.26.bias": "conv5",
                "pre_logits.fc1.weight": "FC",
                "pre_logits.fc2.bias": "FC",
            },
        ),
        (
            "torchvision:efficientnet_b0",
            {
                "features.0.0.weight": "stem",
                "features.1.0.block.0.0.weight": "stage1",
                "features.2.0.block.0.0.weight": "stage2",
                "features.3.1.block.0.0.weight": "stage3",
                "features.4.0.block.0.0.weight": "stage4",
                "features.5.2.block.0.0.weight": "stage4",
                "features.6.0.block.0.0.weight": "stage5",
                "features.7.0.block.0.0.weight": "stage5",
                "features.8.0.weight": "stage5",
            },
        ),
        (
            "timm:tf_efficientnet_lite0",
            {
                "conv_stem.weight": "stem",
                "bn1.weight": "stem",
                "blocks.0.0.conv_dw.weight": "stage1",
                "blocks.1.0.conv_pw.weight": "stage2",
                "blocks.2.1.conv_pw.weight": "stage3",
                "blocks.3.0.conv_pw.weight": "stage4",
                "blocks.4.2.conv_pw.weight": "stage4",
                "blocks.5.0.conv_pw.weight": "stage5",
                "blocks.6.0.conv_pwl.weight": "stage5",
                "conv_head.weight": "stage5",
                "bn2.bias": "stage5",
            },
        ),
        (
            "torchvision:mobilenet_v2",
            {
                "features.0.0.weight": "stem",
                "features.1.conv.0.0.weight": "stage1",
                "features.2.conv.0.0.weight": "stage2",
                "features.4.conv.0.0.weight": "stage3",
                "features.7.conv.0.0.weight": "stage4",
                "features.13.conv.0.0.weight": "stage4",
                "features.14.conv.0.0.weight": "stage5",
                "features.18.0.weight": "stage5",
            },
        ),
        (
            "torchvision:convnext_tiny",
            {
                "features.0.0.weight": "stem",
                "features.1.0.layer_scale": "stage1",
                "features.2.1.weight": "stage2",
                "features.3.0.layer_scale": "stage2",
                "features.4.0.weight": "stage3",
                "features.6.0.weight": "stage4",
                "features.7.2.layer_scale": "stage4",
                "classifier.0.weight": "stage4",
            },
        ),
        (
            "timm:convnext_tiny",
            {
                "stem.0.weight": "stem",
                "stages.0.blocks.0.gamma": "stage1",
                "stages.1.downsample.0.weight": "stage2",
                "stages.3.blocks.2.gamma": "stage4",
                "head.norm.weight": "stage4",
            },
        ),
        (
            "torchvision:vit_b_16",
            {
                "class_token": "embedding",
                "conv_proj.weight": "embedding",
                "encoder.pos_embedding": "embedding",
                "encoder.layers.encoder_layer_0.ln_1.weight": "stage1",
                "encoder.layers.encoder_layer_1.ln_1.weight": "stage1",
                "encoder.layers.encoder_layer_2.ln_1.weight": "stage1",
                "encoder.layers.encoder_layer_3.ln_1.weight": "stage2",
                "encoder.layers.encoder_layer_8.ln_1.weight": "stage3",
                "encoder.layers.encoder_layer_10.ln_1.weight": "stage4",
                "encoder.layers.encoder_layer_11.ln_1.weight": "stage4",
                "encoder.ln.weight": "stage4",
            },
        ),
        (
            "timm:vit_little_patch16_reg4_gap_256",  # 14 blocks
            {
                "reg_token": "embedding",
                "pos_embed": "embedding",
                "patch_embed.proj.weight": "embedding",
                "blocks.2.norm1.weight": "stage1",
                "blocks.3.norm1.weight": "stage2",
                "blocks.7.norm1.weight": "stage3",
                "blocks.10.norm1.weight": "stage4",
                "blocks.13.norm1.weight": "stage4",
                "fc_norm.weight": "stage4",
            },
        ),
        (
            "timm:vit_xsmall_patch16_clip_224",
            {"cls_token": "embedding", "norm_pre.weight": "embedding", "norm.weight": "stage4"},
        ),
    ],
)
def test_layer_groups_of_puts_each_parameter_where_it_belongs(name, membership):
    found = owners(name)

    assert {key: found[key] for key in membership} == membership


class Plain(nn.Module):
    """No known layout; `layer1` is a prefix of `layer10`, and a child has the new head's name."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.layer1 = nn.Linear(2, 2)
        self.layer10 = nn.Linear(2, 2)
        self.pool = nn.Identity()
        self.head = nn.Sequential(nn.LayerNorm(2), nn.Identity())


def test_layer_groups_of_an_unknown_network_has_one_group_per_child():
    model = Plain()

    groups = layer_groups_of(model)

    assert list(groups) == ["layer1", "layer10", "neck", "head"]
    split = split_parameters(Optimizee(model, nn.Linear(2, 3), nn.Linear(2, 2)), groups)
    assert split["layer1"] == [model.scale, *model.layer1.parameters()]
    assert split["layer10"] == list(model.layer10.parameters())
    assert split["neck"] == list(model.head.parameters())


def test_layer_groups_of_takes_dots_literally():
    groups = layer_groups_of(build_backbone("torchvision:vgg11"))

    assert re.match(groups["conv1"], "backbone.features.0.weight")
    assert not re.match(groups["conv1"], "backbone.features_0.weight")
    assert not re.match(groups["conv1"], "backbone.features.01.weight")


def test_layer_groups_of_leaves_out_a_frozen_stage():
    backbone = build_backbone("torchvision:resnet18")
    backbone.layer1.requires_grad_(False)

    assert list(layer_groups_of(backbone)) == [name for name in SEVEN if name != "layer1"]
