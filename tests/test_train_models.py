"""The trainer's networks: sizes, names, initialisation, formats, and gradients of gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from atlas_train import checkpoint, data, engine, models
from atlas_train.config import TrainConfig
from atlas_train.models import Normalize
from tiny_runs import TINY, splits

SIZES = {
    "digits_net": (1, 8),
    "small_cnn": (1, 28),
    "preact_resnet18": (3, 32),
    "resnet18": (3, 32),
    "wide_resnet28_10": (3, 32),
    "wide_resnet34_10": (3, 32),
}
WIDE = {"wide_resnet28_10": 4, "wide_resnet34_10": 5}  # blocks a stage
DATASETS = {"digits": "digits_net", **dict.fromkeys(("mnist", "fashion_mnist"), "small_cnn")}
DATASETS |= dict.fromkeys(("cifar10", "cifar100", "svhn"), "preact_resnet18")
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)  # of CIFAR-10


def make(name: str, width: int | None = 4, **changed: object) -> models.Classifier:
    """A small model whose last layer is not zero, so that gradients flow."""
    torch.manual_seed(0)
    normalize = (MEAN, STD) if SIZES[name][0] == 3 else None
    sizes = {"num_classes": 5, "in_channels": SIZES[name][0], "width": width}
    model = models.build(name, **{"normalize": normalize, **sizes, **changed})
    if name == "small_cnn":
        nn.init.normal_(model.classifier["fc3"].weight)
    return model


def batch(name: str, n: int = 3, size: int | None = None) -> torch.Tensor:
    channels, usual = SIZES[name]
    return torch.rand(n, channels, size or usual, size or usual, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", SIZES)
def test_logits_are_the_head_of_the_features(name: str, device: torch.device):
    assert models.names() == tuple(SIZES)
    model, x = make(name).to(device).eval(), batch(name).to(device)
    features = model.features(x)
    assert features.shape == (3, model.num_features)
    assert (features >= 0).all() and features.any()  # after the last ReLU
    assert torch.equal(model(x), model.head(features)) and model(x).shape == (3, 5)
    # the head is linear: nothing but the last layer comes after the features
    with torch.no_grad():
        bias = model.head(torch.zeros_like(features))
        torch.testing.assert_close(model.head(2 * features) - bias, 2 * (model.head(features) - bias))


def test_parameter_counts():
    def count(name: str, **sizes: int) -> int:
        model = models.build(name, num_classes=10, in_channels=SIZES[name][0], normalize=False, **sizes)
        return sum(p.numel() for p in model.parameters())

    def preact(w: int) -> int:  # convolutions, shortcuts, BatchNorms and the linear layer, stage by stage
        convs = 27 * w + 9 * w * w * (4 + (2 + 3 * 4) + (8 + 3 * 16) + (32 + 3 * 64))
        shortcuts = w * w * (2 + 8 + 32)
        norms = 2 * w * (4 + (1 + 3 * 2) + (2 + 3 * 4) + (4 + 3 * 8) + 8)
        return convs + shortcuts + norms + 80 * w + 10

    def wide(blocks: int, w: int, c: int = 10) -> int:  # the same, with a stem of 16 channels
        convs = 27 * 16 + 9 * (16 * w + (2 + 8) * w * w + (2 * blocks - 1) * (1 + 4 + 16) * w * w)
        shortcuts = (16 if w != 16 else 0) * w + (2 + 8) * w * w
        norms = 2 * (16 + w + 2 * w + (2 * blocks - 1) * (1 + 2 + 4) * w + 4 * w)
        return convs + shortcuts + norms + (4 * w + 1) * c

    assert count("wide_resnet28_10") == wide(4, 160) == 36_479_194
    assert count("wide_resnet34_10") == wide(5, 160) == 46_160_474
    assert count("wide_resnet28_10", width=16) == wide(4, 16)  # nothing to shorten in the first stage
    assert count("preact_resnet18") == preact(64) == 11_172_170
    assert count("preact_resnet18", width=16) == preact(16) == 701_018
    assert count("resnet18") == 11_173_962  # with 10 classes, of the published code
    assert count("resnet18", width=16) == 701_466
    assert count("small_cnn") == 320 + 9_248 + 18_496 + 36_928 + 205_000 + 40_200 + 2_010 == 312_202
    assert count("digits_net") == 288 + 64 + 18_432 + 128 + 131_200 + 1_290 == 151_402


def test_preact_resnet_has_the_usual_names():
    keys = set(models.build("preact_resnet18", num_classes=10, in_channels=3, normalize=False).state_dict())
    norm = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    expected = {"conv1.weight", "linear.weight", "linear.bias"} | {f"bn.{part}" for part in norm}
    for stage in range(1, 5):
        for block in range(2):
            prefix = f"layer{stage}.{block}"
            expected |= {f"{prefix}.conv{i}.weight" for i in (1, 2)}
            expected |= {f"{prefix}.bn{i}.{part}" for i in (1, 2) for part in norm}
        if stage > 1:
            expected.add(f"layer{stage}.0.shortcut.0.weight")
    assert keys == expected


def wide_names(blocks: int, first_stages: tuple[str, ...] = ("block1",)) -> set[str]:
    norm = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    expected = {"conv1.weight", "fc.weight", "fc.bias"} | {f"bn1.{part}" for part in norm}
    for stage in (*first_stages, "block2", "block3"):
        expected.add(f"{stage}.layer.0.convShortcut.weight")
        for block in range(blocks):
            expected |= {f"{stage}.layer.{block}.conv{i}.weight" for i in (1, 2)}
            expected |= {f"{stage}.layer.{block}.bn{i}.{part}" for i in (1, 2) for part in norm}
    return expected


@pytest.mark.parametrize(("name", "blocks"), WIDE.items())
def test_wide_resnet_has_the_usual_names_and_loads_checkpoints(name: str, blocks: int):
    model, other = make(name, normalize=False), make(name, normalize=False)
    assert set(model.state_dict()) == wide_names(blocks)
    # as they are published: with a second first stage that takes no part
    for module in other.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight)
    saved = other.state_dict()
    saved |= {key.replace("block1.", "sub_block1."): value for key, value in saved.items() if key.startswith("block1.")}
    assert set(saved) == wide_names(blocks, ("block1", "sub_block1"))
    model.load_state_dict(saved)
    nn.Sequential(model).load_state_dict({f"0.{key}": value for key, value in saved.items()})
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict({**saved, "sub_block2.layer.0.bn1.weight": torch.ones(4)})


def test_wide_resnet_starts_as_published():
    model = make("wide_resnet28_10", width=32, num_classes=10)
    for conv in (m for m in model.modules() if isinstance(m, nn.Conv2d) and m.weight.numel() > 5_000):
        weight = conv.weight.detach().flatten()
        outputs = conv.out_channels * conv.kernel_size[0] ** 2  # fan-out, not the usual fan-in
        assert abs(weight.std().item() / (2 / outputs) ** 0.5 - 1) < 0.05
        assert abs(weight.pow(4).mean().item() / weight.var().item() ** 2 - 3) < 0.3  # a uniform one would have 1.8
    assert not model.fc.bias.any() and model.fc.weight.any()


@pytest.mark.parametrize("width", [4, 16])  # 16: as wide as the stem, so the first stage has no convolution to shorten
@pytest.mark.parametrize(("name", "blocks"), WIDE.items())
def test_wide_blocks_compute_what_they_say(name: str, blocks: int, width: int):
    model = make(name, width=width).eval()
    lively_norms(model)
    x = batch(name, size=12)
    w = model.state_dict()
    h = (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    h = F.conv2d(h, w["conv1.weight"], padding=1)
    for stage in range(1, 4):
        for block in range(blocks):
            at, stride = f"block{stage}.layer.{block}", 2 if stage > 1 and block == 0 else 1
            a, short = bn_relu(w, f"{at}.bn1", h), h
            if block == 0 and (stage > 1 or width != 16):
                short = F.conv2d(a, w[f"{at}.convShortcut.weight"], stride=stride)
            h = F.conv2d(a, w[f"{at}.conv1.weight"], stride=stride, padding=1)
            h = F.conv2d(bn_relu(w, f"{at}.bn2", h), w[f"{at}.conv2.weight"], padding=1) + short
    features = bn_relu(w, "bn1", h).mean((2, 3))
    scale = features.abs().max().item()
    torch.testing.assert_close(model.features(x), features, rtol=1e-4, atol=1e-4 * scale)
    assert features.shape == (3, 4 * width) == (3, model.num_features)


def test_small_cnn_is_that_of_trades():
    torch.manual_seed(0)
    model = models.build("small_cnn", num_classes=10, in_channels=1)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if name.endswith("weight")}
    assert shapes == {
        "feature_extractor.conv1.weight": (32, 1, 3, 3),
        "feature_extractor.conv2.weight": (32, 32, 3, 3),
        "feature_extractor.conv3.weight": (64, 32, 3, 3),
        "feature_extractor.conv4.weight": (64, 64, 3, 3),
        "classifier.fc1.weight": (200, 1024),
        "classifier.fc2.weight": (200, 200),
        "classifier.fc3.weight": (10, 200),
    }
    # Kaiming's normal distribution, zero biases, zero last layer
    for conv in model.feature_extractor.values():
        assert not conv.bias.any()
    last = model.feature_extractor["conv4"].weight.flatten()
    assert abs(last.std().item() / (2 / 576) ** 0.5 - 1) < 0.02
    assert abs(last.pow(4).mean().item() / last.var().item() ** 2 - 3) < 0.2  # a uniform one would have 1.8
    assert not model(batch("small_cnn")).any()
    # dropout sits between the fully connected layers
    model = make("small_cnn")
    x = batch("small_cnn")
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def lively_norms(model: nn.Module) -> None:
    """BatchNorms that do something, so that their order matters."""
    generator = torch.Generator().manual_seed(2)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.1)


def bn_relu(w: dict[str, torch.Tensor], name: str, h: torch.Tensor) -> torch.Tensor:
    mean, var, gain, bias = (
        w[f"{name}.{p}"].view(1, -1, 1, 1) for p in ("running_mean", "running_var", "weight", "bias")
    )
    return ((h - mean) / (var + 1e-5).sqrt() * gain + bias).clamp_min(0)


def test_preact_blocks_compute_what_they_say():
    """Against the definition, block by block: pre-activation, shortcut from the activated input where shapes change."""
    model = make("preact_resnet18").eval()
    lively_norms(model)
    x = batch("preact_resnet18")
    w = model.state_dict()
    h = (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    h = F.conv2d(h, w["conv1.weight"], padding=1)
    for stage in range(1, 5):
        for block in range(2):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            a = bn_relu(w, f"{name}.bn1", h)
            short = F.conv2d(a, w[f"{name}.shortcut.0.weight"], stride=2) if stride == 2 else h
            h = F.conv2d(a, w[f"{name}.conv1.weight"], stride=stride, padding=1)
            h = F.conv2d(bn_relu(w, f"{name}.bn2", h), w[f"{name}.conv2.weight"], padding=1) + short
    features = bn_relu(w, "bn", h).mean((2, 3))
    torch.testing.assert_close(model.features(x), features, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(x), features @ w["linear.weight"].T + w["linear.bias"], rtol=1e-4, atol=1e-4)


def bn(w: dict[str, torch.Tensor], name: str, h: torch.Tensor) -> torch.Tensor:
    mean, var, gain, bias = (w[f"{name}.{p}"] for p in ("running_mean", "running_var", "weight", "bias"))
    return F.batch_norm(h, mean, var, gain, bias)


def test_resnet_has_the_usual_names_in_the_usual_order():
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    expected = ["conv1.weight", *(f"bn1.{part}" for part in norm)]
    for stage in range(1, 5):
        for block in range(2):
            prefix = f"layer{stage}.{block}"
            for i in (1, 2):
                expected += [f"{prefix}.conv{i}.weight", *(f"{prefix}.bn{i}.{part}" for part in norm)]
            if stage > 1 and block == 0:
                expected += [f"{prefix}.shortcut.0.weight", *(f"{prefix}.shortcut.1.{part}" for part in norm)]
    expected += ["linear.weight", "linear.bias"]
    assert list(models.build("resnet18", num_classes=10, in_channels=3, normalize=False).state_dict()) == expected


@pytest.mark.parametrize(
    ("activation", "plain"),
    [
        ("relu", lambda h: h.clamp_min(0)),
        ("silu", lambda h: h / (1 + (-h).exp())),
        ("gelu", lambda h: h * (1 + torch.erf(h / 2**0.5)) / 2),
    ],
)
def test_resnet_blocks_compute_what_they_say(activation: str, plain: Callable[[torch.Tensor], torch.Tensor]):
    """Against the published definition (kuangliu/pytorch-cifar, models/resnet.py), block by block."""
    model = make("resnet18", width=16, activation=activation).double().eval()
    lively_norms(model)
    x, w = batch("resnet18").double(), model.state_dict()
    h = (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    h = plain(bn(w, "bn1", F.conv2d(h, w["conv1.weight"], padding=1)))
    for stage in range(1, 5):
        for block in range(2):
            at, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            out = plain(bn(w, f"{at}.bn1", F.conv2d(h, w[f"{at}.conv1.weight"], stride=stride, padding=1)))
            out = bn(w, f"{at}.bn2", F.conv2d(out, w[f"{at}.conv2.weight"], padding=1))
            if stride == 2:
                h = bn(w, f"{at}.shortcut.1", F.conv2d(h, w[f"{at}.shortcut.0.weight"], stride=2))
            h = plain(out + h)
    assert h.shape[2:] == (4, 4)
    features = F.avg_pool2d(h, 4).flatten(1)
    torch.testing.assert_close(model.features(x), features, rtol=1e-5, atol=1e-6)  # mean and std are float32
    torch.testing.assert_close(model(x), F.linear(features, w["linear.weight"], w["linear.bias"]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SIZES)
def test_every_activation_of_a_network_is_the_one_asked_for(name: str):
    """Each is smooth where it is asked for: a network of SiLU has no call of ReLU, and as many of its own."""
    x = batch(name, size=16 if SIZES[name][1] == 32 else None)

    def calls(activation: str) -> tuple[int, int]:
        seen = {"relu": 0, activation: 0}

        class Counted(TorchFunctionMode):
            def __torch_function__(self, func, types, args=(), kwargs=None):
                kind = getattr(func, "__name__", "")
                if kind in seen:
                    seen[kind] += 1
                return func(*args, **(kwargs or {}))

        model = make(name, activation=activation).eval()
        with Counted():
            model(x)
        return seen["relu"], seen[activation]

    relu, _ = calls("relu")
    assert relu > 1 and calls("silu") == (0, relu) and calls("gelu") == (0, relu)
    weights = make(name).state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in make(name, activation="silu").state_dict().items())
    with pytest.raises(ValueError, match="activation must be one of relu, silu, gelu, got 'tanh'"):
        make(name, activation="tanh")


#: Channels, height and width of the images of each data set.
SHAPES = {"digits": (1, 8, 8), **dict.fromkeys(("mnist", "fashion_mnist"), (1, 28, 28))}
SHAPES |= dict.fromkeys(("cifar10", "cifar100", "svhn"), (3, 32, 32))


@pytest.mark.parametrize("name", data.names())
def test_declared_networks_take_the_images_of_their_data_set(name: str):
    """Training begins with the network that the data set declares: it must fit the images, the classes and the mean."""
    declared, shape = data.get(name), SHAPES[name]
    if name == "digits":
        assert data.load(name).train.shape == shape
    normalize = (declared.mean, declared.std) if declared.mean else None
    if name in ("cifar100", "svhn"):  # measured (`config.resolved`)
        normalize = (0.5,) * 3, (0.25,) * 3
    model = models.build(declared.model, num_classes=declared.num_classes, in_channels=shape[0], normalize=normalize)
    assert declared.model == DATASETS[name]
    assert (normalize is not None) == (shape[0] == models.COLOUR)
    models.require_usable(model, declared.model, torch.rand(2, *shape), declared.num_classes)
    if model.image_size:
        with pytest.raises(ValueError, match="must be .*choose another model"):
            models.require_usable(model, declared.model, torch.rand(2, shape[0], 40, 40), declared.num_classes)


@pytest.mark.parametrize(("name", "activation"), [*((name, "relu") for name in SIZES), ("resnet18", "silu")])
@pytest.mark.parametrize("train", [False, True])
def test_double_backward(name: str, activation: str, train: bool):
    """The parameter gradient of a penalty on the input gradient, against a difference quotient in float64."""
    model = make(name, width=2, activation=activation).double().train(train)
    x = batch(name, n=2, size=16 if SIZES[name][1] == 32 else None).double().requires_grad_()
    y = torch.tensor([1, 3])

    def penalty() -> torch.Tensor:
        torch.manual_seed(7)  # the same dropout mask each time
        loss = F.cross_entropy(model(x), y, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        return gradient.square().sum()

    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(penalty(), parameters, allow_unused=True)
    assert sum(g is not None and bool(g.any()) for g in gradients) > len(parameters) / 2

    generator = torch.Generator().manual_seed(3)
    direction = [torch.randn(p.shape, dtype=torch.float64, generator=generator) for p in parameters]
    slope = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True) if g is not None)
    h = 1e-7  # small enough that no ReLU or pool switches between the two points

    def shifted(by: float) -> torch.Tensor:
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.add_(d, alpha=by)
        return penalty().detach()

    difference = (shifted(h) - shifted(-2 * h)) / (2 * h)
    torch.testing.assert_close(slope, difference, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("name", SIZES)
def test_channels_last_and_bf16(name: str, device: torch.device):
    model, x = make(name, width=8).to(device).eval(), batch(name).to(device)
    plain = model(x)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        low = model(x)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), plain, rtol=0.05, atol=0.05 * plain.abs().max().item())
    model = model.to(memory_format=torch.channels_last)
    last = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    logits = model(last)
    torch.testing.assert_close(logits, plain, rtol=1e-3, atol=1e-4)
    (gradient,) = torch.autograd.grad(logits.sum(), last)
    assert gradient.is_contiguous(memory_format=torch.channels_last)
    half = model.to(torch.bfloat16)(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), plain, rtol=0.1, atol=0.1 * plain.abs().max().item())


def test_normalisation_is_inside():
    x = batch("preact_resnet18", size=8)
    model = make("preact_resnet18").eval()
    bare = make("preact_resnet18", normalize=False).eval()  # the same initialisation
    assert bare.normalize is None and make("small_cnn").normalize is None and make("digits_net").normalize is None
    normalised = torch.stack([(x[:, c] - MEAN[c]) / STD[c] for c in range(3)], 1)
    torch.testing.assert_close(model(x), bare(normalised), rtol=1e-4, atol=1e-4)
    assert {"normalize.mean", "normalize.std"} == set(model.state_dict()) - set(bare.state_dict())
    assert not any(name.startswith("normalize") for name, _ in model.named_parameters())

    own = make("digits_net", normalize=([0.5], [0.25])).eval()
    torch.testing.assert_close(own(batch("digits_net")), make("digits_net").eval()((batch("digits_net") - 0.5) / 0.25))
    with pytest.raises(ValueError, match="got 3 means, expected one for each of 1 channels"):
        make("digits_net", normalize=(MEAN, STD))
    with pytest.raises(ValueError, match="normalize: mean and std of colour images differ .* give .mean, std."):
        models.build("preact_resnet18", num_classes=10, in_channels=3)
    for bad in ([1.0, 0.0, 1.0], [1.0]):
        with pytest.raises(ValueError, match="std must be positive and as many as mean"):
            Normalize(MEAN, bad)
    for bad in ((math.nan, 0.5, 0.5), (math.inf, 0.5, 0.5)):
        with pytest.raises(ValueError, match="mean and std must be finite"):
            Normalize(bad, STD)
    for pair in ((MEAN,), "mean", (MEAN, STD, STD)):
        with pytest.raises(ValueError, match="normalize must be .mean, std., a list of numbers each, or False, got"):
            make("preact_resnet18", normalize=pair)


def test_a_run_keeps_its_activation(tmp_path: Path):
    settings = TrainConfig(method="standard", **TINY | {"epochs": 1, "activation": "silu"})
    run = engine.train(settings, splits=splits(), folder=tmp_path / "silu")
    assert run.model.active is F.silu
    for name in ("last.pt", checkpoint.export_name()):
        loaded, config = checkpoint.load_model(tmp_path / "silu" / name)
        assert config["activation"] == "silu"
        assert torch.equal(loaded(batch("digits_net")), run.model.eval()(batch("digits_net")))
    more = replace(settings, epochs=2, resume=str(tmp_path / "silu"))
    with pytest.raises(ValueError, match="cannot be resumed with another activation: it has 'silu', you gave 'gelu'"):
        engine.train(replace(more, activation="gelu"), splits=splits())
    assert engine.train(more, splits=splits()).epoch == 2
    with pytest.raises(ValueError, match="activation is for networks of ours alone.*choose it in yours"):
        engine.train(settings, splits=splits(), model=nn.Sequential(nn.Flatten(), nn.Linear(64, 4)))


def test_names_and_defaults():
    for dataset, model in DATASETS.items():
        assert data.get(dataset).model == model
    with pytest.raises(ValueError, match="name: nothing known as 'resnet'; the nearest is 'resnet18'"):
        models.build("resnet", num_classes=10, in_channels=3)
    with pytest.raises(ValueError, match="no data set 'cifar'; the nearest is 'cifar10'"):
        data.get("cifar")


def test_bad_sizes_are_refused():
    for width in (0, -1, 2.5, True, "64"):
        with pytest.raises(ValueError, match=f"width must be a positive integer, got {width!r}; None takes"):
            make("preact_resnet18", width=width)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_classes must be a positive integer, got 0"):
        make("digits_net", num_classes=0)
    for name, x in (
        ("small_cnn", batch("digits_net")),
        ("digits_net", batch("small_cnn")),
        ("preact_resnet18", batch("small_cnn")),
        ("preact_resnet18", batch("preact_resnet18")[0]),
    ):
        with pytest.raises(ValueError, match=r"x must be \[B, \d, \w+, \w+\] for \w+, got "):
            make(name)(x)


@pytest.mark.parametrize("width", [10**6, 2**62])
def test_a_width_beyond_memory_is_refused_before_anything_is_allocated(width: int):
    for name in SIZES:
        with pytest.raises(ValueError, match=f"{name} of width {width} take .* GiB, and this machine has"):
            make(name, width=width)


def test_seed_rules_the_initialisation():
    default, same = make("digits_net", width=None).state_dict(), make("digits_net", width=32).state_dict()
    assert all(torch.equal(default[key], same[key]) for key in same)  # how much memory it takes is known without a draw
    for name in SIZES:
        first, again = make(name).state_dict(), make(name).state_dict()
        assert all(torch.equal(first[key], again[key]) for key in first)


def test_digits_net_learns():
    """Bright upper or lower half, with noise: 30 steps are enough, or something in the network is broken."""
    torch.manual_seed(0)
    y = torch.arange(64) % 2
    x = 0.5 * torch.rand(64, 1, 8, 8)
    x[y == 0, :, :4] += 0.3
    x[y == 1, :, 4:] += 0.3
    model = models.build("digits_net", num_classes=2, in_channels=1, width=8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(30):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert (model.eval()(x).argmax(1) == y).all()
