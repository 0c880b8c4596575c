"""The drop-in for torchattacks beside the real package: the same adversaries, and the same random numbers after."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import atlas_kernels.compat.torchattacks as ours

try:
    import torchattacks as theirs
except ImportError:
    theirs = None

beside = pytest.mark.skipif(
    theirs is None, reason="torchattacks is missing: pip install --no-deps -r tests/peers.txt (numpy, scipy)"
)

CLASSES = 5
EPS = 0.1
CASES: list[tuple[str, dict[str, Any]]] = [
    ("FGSM", {}),
    ("FGSM", {"eps": EPS}),
    ("PGD", {}),
    ("PGD", {"eps": EPS, "alpha": 0.03, "steps": 4}),
    ("PGD", {"eps": EPS, "alpha": 0.03, "steps": 4, "random_start": False}),
    ("PGD", {"eps": EPS, "steps": 0}),
    ("PGDL2", {}),
    ("PGDL2", {"eps": 0.5, "alpha": 0.3, "steps": 4, "eps_for_division": 1e-3}),
    ("PGDL2", {"eps": 0.5, "alpha": 0.3, "steps": 4, "random_start": False}),
    ("PGDL2", {"eps": 0.5, "steps": 0}),
    ("FFGSM", {}),
    ("FFGSM", {"eps": EPS, "alpha": 0.05}),
    ("TPGD", {}),
    ("TPGD", {"eps": EPS, "alpha": 0.03, "steps": 4}),
    ("TPGD", {"steps": 0}),
    ("MIFGSM", {}),
    ("MIFGSM", {"eps": EPS, "alpha": 0.03, "steps": 5, "decay": 0.4}),
]
NAMES = ["FGSM", "PGD", "PGDL2", "FFGSM", "TPGD", "MIFGSM"]
TARGETED = [name for name in NAMES if name != "TPGD"]
MODES: dict[str, Callable[[Any], None]] = {
    "label": lambda attack: attack.set_mode_targeted_by_label(quiet=True),
    "random": lambda attack: attack.set_mode_targeted_random(quiet=True),
    "least likely": lambda attack: attack.set_mode_targeted_least_likely(quiet=True),
    "third least likely": lambda attack: attack.set_mode_targeted_least_likely(kth_min=3, quiet=True),
    "function": lambda attack: attack.set_mode_targeted_by_function(
        lambda images, labels: (labels + 1 + (images.flatten(1).mean(1) > 0.5)) % CLASSES, quiet=True
    ),
}


class Net(nn.Module):
    """Smooth, so that no gradient sits at a kink; BatchNorm and dropout for the modes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(6)
        self.frozen_bn = nn.BatchNorm2d(6)
        self.dropout = nn.Dropout(0.4)
        self.linear = nn.Linear(6 * 25, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.frozen_bn(torch.tanh(self.bn(self.conv(x))))
        return self.linear(self.dropout(x).flatten(1))


@pytest.fixture
def model(device: torch.device) -> Net:
    """In train mode, but for one frozen BatchNorm; statistics that are not those of any batch."""
    torch.manual_seed(0)
    model = Net().double()
    for bn in (model.bn, model.frozen_bn):
        bn.running_mean.normal_(std=0.2)
        bn.running_var.uniform_(0.5, 2.0)
    model.train()
    model.frozen_bn.eval()
    return model.to(device)


@pytest.fixture
def images(device: torch.device) -> Tensor:
    torch.manual_seed(1)
    return (torch.rand(7, 3, 5, 5, dtype=torch.float64) * 1.2 - 0.1).clamp(0, 1).to(device)


@pytest.fixture
def labels(device: torch.device) -> Tensor:
    return (torch.arange(7) % CLASSES).to(device)


def after(attack: Any, *batch: Tensor) -> tuple[Tensor, Tensor]:
    """The adversaries from a known random state, and what is drawn next."""
    torch.manual_seed(2)
    adv = attack(*batch)
    return adv, torch.rand(4)


def assert_equal(mine: Any, published: Any, *batch: Tensor, tolerance: float = 1e-9) -> Tensor:
    (a, next_a), (b, next_b) = after(mine, *batch), after(published, *batch)
    assert a.dtype == b.dtype and a.shape == b.shape and not a.requires_grad
    assert float((a - b).abs().max()) <= tolerance, f"{mine}: off by {float((a - b).abs().max()):.3g}"
    assert torch.equal(next_a, next_b)
    return a


@beside
@pytest.mark.parametrize("name, arguments", CASES)
@pytest.mark.parametrize("training", [False, True])
def test_same_adversaries(name, arguments, training, model, images, labels):
    model.train(training)
    mine, published = (getattr(module, name)(model, **arguments) for module in (ours, theirs))
    adv = assert_equal(mine, published, images, labels)
    assert float((adv - images).abs().max()) > 1e-4


@beside
@pytest.mark.parametrize("name", NAMES)
def test_same_signature_and_printed_form(name, model):
    mine, published = getattr(ours, name), getattr(theirs, name)
    (a, b) = (list(inspect.signature(cls).parameters.values()) for cls in (mine, published))
    assert [(p.name, p.default, p.kind) for p in a] == [(p.name, p.default, p.kind) for p in b]
    mine, published = mine(model), published(model)
    split = [sorted(str(attack)[:-1].replace("(", ", ", 1).split(", ")) for attack in (mine, published)]
    assert split[0] == split[1]
    public = {name for name in dir(published) if name[0] != "_"} - {"forward", "get_output_with_eval_nograd"}
    assert public <= set(dir(mine))
    assert list(mine.supported_mode) == published.supported_mode


@beside
@pytest.mark.parametrize("name", TARGETED)
@pytest.mark.parametrize("mode", MODES)
def test_same_targeted_adversaries(name, mode, model, images, labels):
    mine, published = getattr(ours, name)(model, eps=0.3), getattr(theirs, name)(model, eps=0.3)
    for attack in (mine, published):
        MODES[mode](attack)
    adv = assert_equal(mine, published, images, labels)
    assert mine.get_mode() == published.get_mode() and mine.targeted
    published.set_mode_default()
    assert not torch.allclose(adv, after(published, images, labels)[0])
    mine.set_mode_default()
    assert_equal(mine, published, images, labels)


@beside
@pytest.mark.parametrize("name", ["get_random_target_label", "get_least_likely_label"])
def test_same_targets_without_labels(name, model, images):
    mine, published = ours.PGD(model), theirs.PGD(model)
    for attack in (mine, published):
        attack.set_mode_targeted_least_likely(kth_min=2, quiet=True)
    assert torch.equal(after(getattr(mine, name), images)[0], after(getattr(published, name), images)[0])


@beside
@pytest.mark.parametrize("name", NAMES)
def test_same_on_normalised_images(name, model, images, labels):
    mean, std = [0.2, 0.4, 0.6], [0.5, 0.3, 0.25]
    mine, published = getattr(ours, name)(model), getattr(theirs, name)(model)
    for attack in (mine, published):
        attack.set_normalization_used(mean, std)
    normalised = mine.normalize(images)
    assert_equal(mine, published, normalised, labels)
    if name != "TPGD":
        for mode in ("random", "least likely", "function"):
            for attack in (mine, published):
                MODES[mode](attack)
            assert_equal(mine, published, normalised, labels)


@beside
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batchnorm", [False, True])
def test_same_in_training_mode(name, batchnorm, model, images, labels):
    """No dropout: its masks are ours."""
    mine, published = (getattr(module, name)(copy.deepcopy(model)) for module in (ours, theirs))
    for attack in (mine, published):
        attack.set_model_training_mode(model_training=True, batchnorm_training=batchnorm)
    assert_equal(mine, published, images, labels)
    mine.set_model_training_mode(batchnorm_training=True, dropout_training=True)  # means nothing without the first
    published.set_model_training_mode()
    published.model.load_state_dict(mine.model.state_dict())
    assert_equal(mine, published, images, labels)


@beside
@pytest.mark.parametrize("name", NAMES)
def test_same_in_float32(name, model, images, labels):
    """Where single steps are concerned: over many, a gradient near zero may turn over."""
    one = {} if name in ("FGSM", "FFGSM") else {"steps": 1}
    mine, published = (getattr(module, name)(model.float(), **one) for module in (ours, theirs))
    assert_equal(mine, published, images.float(), labels, tolerance=2e-6)


def test_attributes_may_change_between_calls(model, images, labels):
    attack = ours.PGD(model, eps=0.01, alpha=0.01, steps=3)
    attack.eps, attack.steps, attack.random_start = 0.05, 20, False
    assert float((attack(images, labels) - images).abs().max()) == pytest.approx(0.05)
    attack.eps = 8
    with pytest.raises(ValueError, match="write 8/255"):
        attack(images, labels)


@pytest.mark.parametrize("name", NAMES)
def test_leaves_no_trace(name, model, images, labels):
    """Where torchattacks un-freezes BatchNorm, leaves train mode on and moves running statistics."""
    attack = getattr(ours, name)(model)
    for mode in ((False, False, False), (True, True, True)):
        attack.set_model_training_mode(*mode)
        modes = [module.training for module in model.modules()]
        state = copy.deepcopy(model.state_dict())
        attack(images, labels)
        assert [module.training for module in model.modules()] == modes and not model.frozen_bn.training
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_training_mode_reaches_each_kind_of_layer(model, images, labels):
    seen = []
    model.linear.register_forward_hook(
        lambda *_: seen.append((model.training, model.bn.training, model.dropout.training))
    )
    attack = ours.FGSM(model.eval())
    for batchnorm in (False, True):
        for dropout in (False, True):
            attack.set_model_training_mode(True, batchnorm, dropout)
            attack(images, labels)
            assert seen.pop() == (True, batchnorm, dropout)
    attack.set_mode_targeted_random(quiet=True)
    attack(images, labels)
    assert seen == [(False, False, False), (True, True, True)]  # targets are chosen in eval mode


def test_dropout_masks_differ_from_call_to_call(model, images, labels):
    attack = ours.PGD(model, steps=1)
    attack.set_model_training_mode(True, dropout_training=True)
    seen = []
    model.linear.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0] == 0))
    attack(images, labels)
    attack(images, labels)
    assert not torch.equal(*seen)


@pytest.mark.parametrize("name", NAMES)
def test_works_without_gradients_on_empty_batches_and_on_any_layout(name, model, images, labels):
    attack = getattr(ours, name)(model, eps=0.1)
    expected, _ = after(attack, images, labels)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert torch.equal(after(attack, images, labels)[0], expected)
    assert attack(images[:0], labels[:0]).shape == images[:0].shape
    for _ in range(2):
        adv = attack(images.to(memory_format=torch.channels_last), labels.int())
        assert adv.is_contiguous(memory_format=torch.channels_last) and adv.shape == images.shape
        attack.set_normalization_used([0.5] * 3, [0.5] * 3)
        images = images * 2 - 1


@pytest.mark.parametrize("name", NAMES)
def test_16_bit(name, model, images, labels):
    attack = getattr(ours, name)(model.bfloat16(), eps=0.25)
    adv = attack(images.bfloat16(), labels)
    length = (adv - images.bfloat16()).float().flatten(1).norm(dim=1) if name == "PGDL2" else (adv - images).abs().max()
    assert adv.dtype == torch.bfloat16 and float(length.max()) <= 0.27


def test_mifgsm_goes_on_after_a_gradient_of_zero(model, images, labels):
    direction, _ = ours.MIFGSM(model, decay=0.5)._direction(torch.zeros_like(images), images)
    assert torch.equal(direction, images / 2)
    nn.init.zeros_(model.linear.weight)
    assert torch.equal(ours.MIFGSM(model)(images, labels), images)


class NoGradient(nn.Linear):
    """A root at zero: its derivative times zero is NaN."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + (x * 0).sqrt())


@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_that_is_nan_moves_nothing(name, images, labels):
    model = nn.Sequential(nn.Flatten(), NoGradient(75, CLASSES)).to(images)
    still = {"random_start": False} if name in ("PGD", "PGDL2") else {}
    adv = getattr(ours, name)(model, **still)(images, labels)
    assert torch.isfinite(adv).all() and (name in ("FFGSM", "TPGD") or torch.equal(adv, images))


def test_pgdl2_without_eps_for_division_moves_by_alpha(model, images, labels):
    model.linear.weight.data *= 1e-9
    images = images * 0.5 + 0.25
    for division, length in ((0.0, 0.1), (1e-10, None)):
        attack = ours.PGDL2(model, alpha=0.1, steps=1, random_start=False, eps_for_division=division)
        moved = (attack(images, labels) - images).flatten(1).norm(dim=1)
        assert (moved < 0.099).all() if length is None else torch.allclose(moved, torch.full_like(moved, length))


def test_device_is_where_the_model_is(model, images):
    attack = ours.PGD(model)
    assert attack.device == images.device
    model.to("meta")
    assert attack.device == torch.device("meta")
    attack.set_device("cpu")
    assert attack.device == "cpu"
    assert ours.PGD(nn.Flatten()).device is None
    assert ours.TPGD(nn.Flatten(), steps=1)(images).device == images.device


def test_set_model(model, images, labels):
    attack = ours.PGD(nn.Flatten(), random_start=False)
    attack.set_model(model)
    assert attack.model_name == "Net"
    assert torch.equal(attack(images, labels), ours.PGD(model, random_start=False)(images, labels))


def test_modes_are_announced(model, capsys):
    attack = ours.PGD(model)
    attack.set_mode_targeted_random(quiet=True)
    assert capsys.readouterr().out == ""
    attack.set_mode_targeted_least_likely()
    assert "targeted(least-likely)" in capsys.readouterr().out
    attack.set_mode_default()
    assert "default" in capsys.readouterr().out


REFUSED: list[tuple[type[Exception], str, Callable[[Any, Tensor, Tensor], object]]] = [
    (TypeError, "model must be a torch.nn.Module", lambda m, x, y: ours.PGD(lambda x: x)),
    (ValueError, "write 8/255", lambda m, x, y: ours.PGD(m, eps=8)),
    (ValueError, "eps must be finite", lambda m, x, y: ours.FGSM(m, eps=-1)),
    (ValueError, "alpha must be finite", lambda m, x, y: ours.PGD(m, alpha=-1)),
    (TypeError, "one value per sample", lambda m, x, y: ours.PGD(m, eps=torch.full((7,), 0.1))),
    (TypeError, "steps must be an integer", lambda m, x, y: ours.PGD(m, steps=2.5)),
    (ValueError, "labels is missing: FGSM", lambda m, x, y: ours.FGSM(m)(x)),
    (ValueError, "is not a class", lambda m, x, y: ours.PGD(m)(x, y + CLASSES)),
    (ValueError, "is not a class", lambda m, x, y: ours.MIFGSM(m)(x, y + CLASSES)),
    (TypeError, "y must be an integer", lambda m, x, y: ours.PGDL2(m)(x, y.float())),
    (TypeError, "inputs must be a float", lambda m, x, y: ours.PGD(m)((x * 255).byte(), y)),
    (ValueError, "outside", lambda m, x, y: ours.PGDL2(m)(x * 2, y)),
    (ValueError, "contains NaN", lambda m, x, y: ours.MIFGSM(m)(x / 0 * 0, y)),
    (ValueError, "no targeted mode", lambda m, x, y: ours.TPGD(m).set_mode_targeted_random()),
    (ValueError, "no targets are known", lambda m, x, y: ours.PGD(m).get_target_label(x, y)),
    (TypeError, "by_label", lambda m, x, y: ours.PGD(m).set_mode_targeted_by_function(None)),
    (ValueError, "kth_min must be", lambda m, x, y: ours.PGD(m).set_mode_targeted_least_likely(0)),
    (ValueError, "std must be positive", lambda m, x, y: ours.PGD(m).set_normalization_used([0.5], [0.0])),
    (ValueError, "one each per channel", lambda m, x, y: ours.PGD(m).set_normalization_used([0.5] * 3, [0.5])),
    (ValueError, "call set_normalization_used", lambda m, x, y: ours.PGD(m).normalize(x)),
    (NotImplementedError, "in a loop", lambda m, x, y: ours.PGD(m).save([(x, y)], "adv.pt")),
    (AttributeError, "no 'CW'; it has FFGSM, FGSM", lambda m, x, y: ours.CW(m)),
]


@pytest.mark.parametrize("kind, match, call", REFUSED, ids=[match for _, match, _ in REFUSED])
def test_bad_input(kind, match, call, model, images, labels):
    with pytest.raises(kind, match=match):
        call(model, images, labels)


def test_bad_input_in_modes(model, images, labels):
    attack = ours.PGD(model)
    attack.set_mode_targeted_by_label(quiet=True)
    with pytest.raises(ValueError, match="set_mode_targeted_by_label takes them"):
        attack(images)
    attack.set_mode_targeted_least_likely(CLASSES, quiet=True)
    with pytest.raises(ValueError, match=f"kth_min={CLASSES} is too large"):
        attack(images, labels)
    attack.set_normalization_used([0.5] * 4, [0.5] * 4)
    with pytest.raises(ValueError, match="mean has 4 values"):
        attack(images, labels)


def test_normalised_images_may_be_off_by_rounding_only(model, images, labels):
    attack = ours.PGD(model.float())
    attack.set_normalization_used([0.4914, 0.4822, 0.4465], [0.2471, 0.2435, 0.2616])
    x = attack.normalize(images.float().round() * (1 + 2e-6) - 1e-6)
    assert not ((attack.inverse_normalize(x) >= 0) & (attack.inverse_normalize(x) <= 1)).all()
    adv = attack.inverse_normalize(attack(x, labels))
    assert float(adv.min()) > -1e-6 and float(adv.max()) < 1 + 1e-6
    with pytest.raises(ValueError, match="outside"):
        attack(x * 1.01, labels)
