from urllib.error import URLError

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision import models

from asg_env.core.layer_groups import split_parameters
from asg_env.core.objectives import kl_to_teacher
from asg_env.core.optimizee import Optimizee
from asg_env.core.seeding import derive_seed
from asg_env.tasks.backbones import load_pretrained
from asg_env.tasks.listing import DataError

SIZE = 64  # [pixels]
# Name -> argument of the library's model that sets the image size, if it has one.
NETWORKS = {
    "torchvision:resnet18": None,
    "torchvision:googlenet": None,
    "torchvision:efficientnet_b0": None,
    "torchvision:mobilenet_v3_small": None,
    "torchvision:convnext_tiny": None,
    "torchvision:densenet121": None,
    "torchvision:vit_b_32": "image_size",
    "timm:resnet26t": None,
    "timm:tf_efficientnet_lite0": None,
    "timm:convnext_atto": None,
    "timm:mobilenetv3_small_050": None,
    "timm:vit_tiny_patch16_224": "img_size",
    "timm:eva02_tiny_patch14_336": "img_size",
    "timm:swin_tiny_patch4_window7_224": "img_size",
}


def whole_network(name, **options):
    """The library's network with the random weights of `load_pretrained`, not split."""
    library, _, model_name = name.partition(":")
    make = (
        models.get_model if library == "torchvision" else pytest.importorskip("timm").create_model
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(0, "backbone", name))
        return make(model_name, **options).eval()


def optimizee_of(pretrained):
    head = nn.Linear(pretrained.old_head.in_features, 3)
    return Optimizee(pretrained.backbone, head, pretrained.old_head)


def images(size=SIZE):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _timm(request):
    if "timm:" in request.node.name:
        pytest.importorskip("timm")


@pytest.mark.parametrize("name", NETWORKS)
def test_load_pretrained_splits_without_changing_what_the_network_computes(name):
    option = NETWORKS[name]
    pretrained = load_pretrained(name, "random", SIZE)
    whole = whole_network(name, **({option: SIZE} if option else {}))
    last = [module for module in whole.modules() if isinstance(module, nn.Linear)][-1]
    nn.init.normal_(last.weight)  # some ViTs start at 0
    pretrained.old_head.load_state_dict(last.state_dict())

    with torch.no_grad():
        expected = whole(images())
        _, old_logits = optimizee_of(pretrained)(images())

    assert torch.equal(old_logits, expected)
    assert pretrained.old_head.out_features == 1000


@pytest.mark.parametrize("name", NETWORKS)
def test_load_pretrained_leaves_only_parameters_with_gradients_to_train(name):
    pretrained = load_pretrained(name, "random", SIZE)
    optimizee = optimizee_of(pretrained)
    teacher = torch.log_softmax(torch.randn(2, 1000), dim=1)

    logits, old_logits = optimizee(images())
    (logits.square().mean() + kl_to_teacher(teacher, old_logits)).backward()

    trained = sum(split_parameters(optimizee, pretrained.layer_groups).values(), [])
    assert all(parameter.grad is not None for parameter in trained)
    assert not any(parameter.requires_grad for parameter in pretrained.old_head.parameters())
    assert not optimizee.training


def test_load_pretrained_freezes_what_the_features_do_not_use(monkeypatch):
    timm = pytest.importorskip("timm")
    create_model = timm.create_model

    def with_unused_layer(*args, **options):
        model = create_model(*args, **options)
        model.unused = nn.Linear(2, 2)
        return model

    monkeypatch.setattr(timm, "create_model", with_unused_layer)

    pretrained = load_pretrained("timm:lcnet_050", "random", SIZE)

    frozen = [n for n, p in pretrained.backbone.named_parameters() if not p.requires_grad]
    assert frozen == ["unused.weight", "unused.bias"]
    split_parameters(optimizee_of(pretrained), pretrained.layer_groups)


@pytest.mark.parametrize(("name", "size"), [("googlenet", 64), ("inception_v3", 96)])
def test_load_pretrained_removes_auxiliary_classifiers(name, size):
    pretrained = load_pretrained(f"torchvision:{name}", "random", size)

    assert not [key for key, _ in pretrained.backbone.named_parameters() if "aux" in key.lower()]


@pytest.mark.parametrize("name", ["torchvision:mobilenet_v3_small", "timm:lcnet_050"])
def test_load_pretrained_random_weights_are_always_the_same_and_leave_the_generator_alone(name):
    first = load_pretrained(name, "random", SIZE)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    second = load_pretrained(name, "random", SIZE)

    assert torch.equal(torch.get_rng_state(), before)
    states = zip(
        optimizee_of(first).backbone.state_dict().values(),
        optimizee_of(second).backbone.state_dict().values(),
        strict=True,
    )
    assert all(torch.equal(left, right) for left, right in states)
    assert torch.equal(first.old_head.weight, second.old_head.weight)


def test_load_pretrained_works_without_gradients():
    with torch.no_grad():
        pretrained = load_pretrained("torchvision:mobilenet_v3_small", "random", SIZE)

    assert all(parameter.requires_grad for parameter in pretrained.backbone.parameters())


@pytest.mark.parametrize("suffix", [".pth", ".pth.tar", ".safetensors"])
@pytest.mark.parametrize(
    "name",
    ["torchvision:resnet18", "torchvision:googlenet", "timm:convnext_atto", "timm:lcnet_050"],
)
def test_load_pretrained_reads_a_local_file(tmp_path, name, suffix):
    options = {"transform_input": True} if "googlenet" in name else {}  # as with torchvision's own
    library, _, model_name = name.partition(":")
    make = (
        models.get_model if library == "torchvision" else pytest.importorskip("timm").create_model
    )
    whole = make(model_name, **options).eval()
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(whole.state_dict(), path)
    else:
        torch.save(
            {"state_dict": whole.state_dict()} if "tar" in suffix else whole.state_dict(), path
        )

    pretrained = load_pretrained(name, str(path), SIZE)

    with torch.no_grad():
        assert torch.equal(optimizee_of(pretrained)(images())[1], whole(images()))
    assert not [key for key in pretrained.layer_groups if "aux" in key]


def test_load_pretrained_reads_names_of_older_torchvision_releases(tmp_path):
    whole = models.densenet121().eval()
    names = {k: k.replace("norm1", "norm.1").replace("conv2", "conv.2") for k in whole.state_dict()}
    assert sum(".norm.1" in old for old in names.values()) > 50
    path = tmp_path / "densenet.pth"
    torch.save({names[key]: tensor for key, tensor in whole.state_dict().items()}, path)

    pretrained = load_pretrained("torchvision:densenet121", str(path), SIZE)

    with torch.no_grad():
        assert torch.equal(optimizee_of(pretrained)(images())[1], whole(images()))


def test_load_pretrained_resizes_position_tables_of_a_timm_file(tmp_path):
    timm = pytest.importorskip("timm")
    name, path = "vit_tiny_patch16_224", tmp_path / "weights.safetensors"
    whole = timm.create_model(name).eval()
    save_file(whole.state_dict(), path)

    pretrained = load_pretrained(f"timm:{name}", str(path), SIZE)

    whole.set_input_size(img_size=SIZE)
    with torch.no_grad():
        assert torch.equal(optimizee_of(pretrained)(images())[1], whole(images()))
    assert "state_dict" not in pretrained.backbone.pretrained_cfg


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_load_pretrained_names_what_differs_in_a_file_of_another_network(tmp_path, library):
    if library == "timm":
        pytest.importorskip("timm")
    path = tmp_path / "weights.pth"
    torch.save(models.resnet18(num_classes=5).state_dict(), path)

    with pytest.raises(
        DataError,
        match=r"weights\.pth holds weights of another model than .*: 96 missing in the file: "
        r"layer1\.2\.conv1\.weight, layer1\.2\.bn1\.weight, layer1\.2\.bn1\.bias, \.\.\.; "
        r"2 of another shape: fc\.weight \(5, 512\) instead of \(1000, 512\), "
        r"fc\.bias \(5,\) instead of \(1000,\)",
    ):
        load_pretrained(f"{library}:resnet34", str(path), SIZE)


def test_load_pretrained_refuses_weights_that_are_not_finite(tmp_path):
    state = models.resnet18().state_dict()
    state["fc.weight"].fill_(float("nan"))  # as in torchvision's IMAGENET1K_FEATURES of VGG-16
    path = tmp_path / "weights.pth"
    torch.save(state, path)

    with pytest.raises(DataError, match="gives scores that are not finite; use other weights"):
        load_pretrained("torchvision:resnet18", str(path), SIZE)


@pytest.mark.parametrize(
    ("weights", "url"),
    [
        ("pretrained", "mobilenet_v3_large-5c1a4163"),
        ("DEFAULT", "mobilenet_v3_large-5c1a4163"),
        ("IMAGENET1K_V1", "mobilenet_v3_large-8738ca79"),
    ],
)
def test_load_pretrained_asks_torchvision_for_the_named_weights(monkeypatch, weights, url):
    whole = models.mobilenet_v3_large().eval()
    asked = []

    def download(url, **_):
        asked.append(url)
        return whole.state_dict()

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", download)

    pretrained = load_pretrained("torchvision:mobilenet_v3_large", weights, SIZE)

    assert len(asked) == 1
    assert url in asked[0]
    with torch.no_grad():
        assert torch.equal(optimizee_of(pretrained)(images())[1], whole(images()))


def test_load_pretrained_asks_timm_for_its_weights(monkeypatch):
    timm = pytest.importorskip("timm")
    whole = timm.create_model("convnext_atto").eval()
    asked = []

    def download(source, **_):
        asked.append(source)
        return whole.state_dict()

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", download)

    pretrained = load_pretrained("timm:convnext_atto.d2_in1k", "pretrained", SIZE)

    assert asked == ["timm/convnext_atto.d2_in1k"]
    with torch.no_grad():
        assert torch.equal(optimizee_of(pretrained)(images())[1], whole(images()))


@pytest.mark.parametrize(
    ("name", "loader"),
    [
        ("torchvision:resnet18", "torchvision.models._api.load_state_dict_from_url"),
        ("timm:convnext_atto", "timm.models._builder.load_state_dict_from_hf"),
    ],
)
def test_load_pretrained_says_what_to_do_without_network(monkeypatch, name, loader):
    def fail(*_, **__):
        raise URLError("Name or service not known")

    monkeypatch.setattr(loader, fail)

    with pytest.raises(
        DataError,
        match=rf"pretrained weights of `{name}` could not be loaded \(.*service not known.*\); "
        "give a local file through env.weights",
    ):
        load_pretrained(name, "pretrained", SIZE)


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        ("torchvision:resnet18", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
        ("timm:lcnet_050", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
        ("timm:tf_efficientnet_lite0", (127.5,) * 3, (127.5,) * 3),
    ],
)
def test_load_pretrained_gives_the_statistics_of_the_pixels(name, mean, std):
    pretrained = load_pretrained(name, "random", SIZE)

    assert pretrained.mean == pytest.approx(mean)
    assert pretrained.std == pytest.approx(std)


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("resnet18", "random", r"must be named torchvision:NAME or timm:NAME, got 'resnet18'$"),
        ("tim:resnet18", "random", r"got 'tim:resnet18'; did you mean timm\?"),
        ("torchvision:", "random", r"`torchvision:` is unknown; use one of the \d+ in list_models"),
        ("torchvision:resnet1O1", "random", r"`torchvision:resnet1O1` is .*did you mean resnet101"),
        ("torchvision:fcn_resnet50", "random", r"`torchvision:fcn_resnet50` is unknown"),
        ("timm:convnxt_tiny", "random", r"`timm:convnxt_tiny` is unknown; did you mean convnext_t"),
        ("timm:convnext_tiny.fb_in2k", "random", r"unknown; did you mean convnext_tiny\.fb_in22k"),
        (
            "torchvision:resnet18",
            "IMAGENET1K_V9",
            r"must be random, pretrained, IMAGENET1K_V1, .*or a path to a file, got 'IMAGENET1K_V9",
        ),
        ("timm:resnet18", "IMAGENET1K_V1", r"must be random, pretrained or a path to a file, got"),
        ("torchvision:squeezenet1_1", "random", r"must end in one nn\.Linear,.* got Sequential"),
        ("timm:dla34", "random", r"must end in one nn\.Linear, .*, got Conv2d; use another model"),
        ("timm:volo_d1_224", "random", r"must compute one feature vector per image, .*, but does"),
    ],
)
def test_load_pretrained_refuses_unknown_and_unfit_networks(name, weights, message):
    with pytest.raises(DataError, match=message):
        load_pretrained(name, weights, 224 if "volo" in name else SIZE)


@pytest.mark.parametrize(
    ("name", "size", "own"),
    [
        ("torchvision:alexnet", 16, 224),
        ("torchvision:inception_v3", 32, 299),
        ("torchvision:vit_b_32", 50, 224),
        ("timm:inception_v3", 32, 299),
    ],
)
def test_load_pretrained_refuses_image_sizes_that_the_network_cannot_take(name, size, own):
    with pytest.raises(
        DataError, match=rf"`{name}` cannot take images of {size} x {size} .* {own} x {own}$"
    ):
        load_pretrained(name, "random", size)


def test_load_pretrained_refuses_another_image_size_for_torchvision_vit_weights(monkeypatch):
    whole = models.vit_b_32()
    monkeypatch.setattr(
        "torchvision.models._api.load_state_dict_from_url", lambda *_, **__: whole.state_dict()
    )

    with pytest.raises(DataError, match=r"64 x 64 pixels \(Wrong image height.*; .* 224 x 224"):
        load_pretrained("torchvision:vit_b_32", "pretrained", SIZE)
