"""The drop-in for torchattacks beside the real package: the same adversaries, and the same random numbers after."""

from __future__ import annotations

import copy
import importlib
import inspect
import io
import pickle
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import atlas_kernels.compat.torchattacks as ours
from atlas_kernels import Execution
from atlas_kernels.attacks.graphs import Graphs
from fake_graph import recorded

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
NAMES = list(dict.fromkeys(name for name, _ in CASES))
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


def public(thing: Any) -> set[str]:
    return {name for name in dir(thing) if name[0] != "_"}


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
    assert public(published) <= public(mine)
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
    attack = ours.MIFGSM(model, decay=0.5)._attack()
    _, momentum = attack.step(attack.batch(images, labels), images, torch.zeros_like(images), images, 0.0)
    assert torch.equal(momentum, images / 2)
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


@pytest.mark.parametrize("size", [1e-9, 1e-25, 1e-38])
def test_pgdl2_without_eps_for_division_moves_by_alpha(model, images, labels, size):
    model.linear.weight.data *= size
    model, images = model.float(), images.float() * 0.5 + 0.25
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
    (TypeError, "one value per sample", lambda m, x, y: ours.FGSM(m, eps=torch.full((1, 3, 1, 1), 0.1))(x, y)),
    (TypeError, "one value per sample", lambda m, x, y: ours.MIFGSM(m, alpha=torch.full((3, 1, 1), 0.1))(x, y)),
    (ValueError, r"eps has shape \[6\]", lambda m, x, y: ours.PGD(m, eps=torch.full((6, 1, 1, 1), 0.1).to(x))(x, y)),
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
    (TypeError, "random_start must be True", lambda m, x, y: ours.PGD(m, random_start="no")),
    (TypeError, "batchnorm_training must be", lambda m, x, y: ours.PGD(m).set_model_training_mode(True, "no")),
    (TypeError, "kth_min must be an integer", lambda m, x, y: ours.PGD(m).set_mode_targeted_least_likely(1.5)),
    (ValueError, "kth_min must be", lambda m, x, y: ours.PGD(m).set_mode_targeted_least_likely(0)),
    (ValueError, "std must be positive", lambda m, x, y: ours.PGD(m).set_normalization_used([0.5], [0.0])),
    (ValueError, "one each per channel", lambda m, x, y: ours.PGD(m).set_normalization_used([0.5] * 3, [0.5])),
    (ValueError, "call set_normalization_used", lambda m, x, y: ours.PGD(m).normalize(x)),
    (NotImplementedError, "no forward", lambda m, x, y: ours.Attack("mine", m)(x, y)),
    (ValueError, "save_type must be", lambda m, x, y: ours.PGD(m).save([(x, y)], save_type="uint8")),
    (ValueError, "gives no images", lambda m, x, y: ours.PGD(m).save([], io.BytesIO(), verbose=False)),
    (ValueError, "type must be", lambda m, x, y: ours.PGD.to_type(x, "uint8")),
    (TypeError, "y must be an integer", lambda m, x, y: ours.PGD(m)(x, y.tolist())),
    (ValueError, "give two or more", lambda m, x, y: ours.MultiAttack([ours.PGD(m)])),
    (ValueError, "attacks is empty", lambda m, x, y: ours.MultiAttack([])),
    (TypeError, "labels must be a tensor", lambda m, x, y: ours.MultiAttack([ours.PGD(m)] * 2)(x)),
    (ValueError, "different models", lambda m, x, y: ours.MultiAttack([ours.PGD(m), ours.PGD(copy.deepcopy(m))])),
    (ValueError, "no targeted mode", lambda m, x, y: ours.MultiAttack([ours.PGD(m)] * 2).set_mode_targeted_random()),
    (AttributeError, f"no 'CW'; it has {', '.join(sorted(ours.__all__))}", lambda m, x, y: ours.CW(m)),
    (AttributeError, "Import it from torchattacks", lambda m, x, y: ours.AutoAttack(m)),
    (AttributeError, "no 'PDG'; it has", lambda m, x, y: ours.PDG(m)),
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


def both(name: str, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    return tuple(getattr(module, name)(*args, **kwargs) for module in (ours, theirs))


@beside
def test_every_public_name_is_there_or_says_where_it_is():
    for name in public(theirs):
        if not hasattr(ours, name):
            with pytest.raises(ImportError, match=f"no '{name}'; it has .*Import it from torchattacks"):
                exec(f"from atlas_kernels.compat.torchattacks import {name}")
    assert {"MultiAttack", *NAMES} == set(ours.__all__)
    assert {"attack", "attacks", "wrappers", "MultiAttack", *NAMES} <= public(ours)
    assert ours.__version__ == theirs.__version__ and set(ours.__wrapper__) <= set(theirs.__wrapper__)
    assert set(ours.__all__) == set(theirs.__all__) & public(ours)  # which scripts go through, calling each
    for name in NAMES:
        assert importlib.import_module(f"{ours.__name__}.attacks.{name.lower()}").__dict__[name] is getattr(ours, name)
    from atlas_kernels.compat.torchattacks.attack import Attack, wrapper_method
    from atlas_kernels.compat.torchattacks.wrappers.multiattack import MultiAttack

    assert Attack is ours.Attack and MultiAttack is ours.MultiAttack and callable(wrapper_method)


@beside
@pytest.mark.parametrize("name", ["Attack", "MultiAttack", *NAMES])
def test_same_signatures_of_methods(name):
    mine, published = getattr(ours, name), theirs.attack.Attack if name == "Attack" else getattr(theirs, name)
    for method in public(published) | {"__call__"}:
        a, b = (
            inspect.signature(inspect.unwrap(getattr(cls, method))).parameters.values() for cls in (mine, published)
        )
        if "wrapper_func" in getattr(published, method).__qualname__:  # theirs hides what it wraps
            a = inspect.signature(getattr(mine, method)).parameters.values()
            b = inspect.signature(getattr(published, method).__closure__[0].cell_contents).parameters.values()
        assert [(p.name, p.default, p.kind) for p in a] == [(p.name, p.default, p.kind) for p in b], method


def turned(attack: Any, inputs: Tensor, labels: Any = None) -> Tensor:
    """Four classes of five, at another temperature and with their sign turned."""
    images = attack.normalize(inputs) if attack._normalization_applied is False else inputs
    return -attack.model(images)[:, [3, 0, 4, 1]] / 0.3


@beside
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("place", ["class", "attack", "base"])
def test_get_logits_may_be_overridden(name, place, model, images, labels, monkeypatch):
    labels, model = labels % 4, model.eval()
    plain, _ = after(getattr(ours, name)(model), images, labels)
    mine, published = (
        type("Own", (getattr(module, name),), {"get_logits": turned} if place == "class" else {})(model)
        for module in (ours, theirs)
    )
    for attack in (mine, published):
        if place == "attack":
            attack.get_logits = turned.__get__(attack)
        elif place == "base":
            base = next(cls for cls in type(attack).__mro__ if "get_logits" in vars(cls))
            monkeypatch.setattr(base, "get_logits", turned)
    adv = assert_equal(mine, published, images, labels)
    assert not torch.allclose(adv, plain)
    for mode in MODES if name != "TPGD" and place == "class" else ():
        if mode != "function":  # whose targets are of five classes
            MODES[mode](mine), MODES[mode](published)
            assert_equal(mine, published, images, labels)
    for attack in (mine, published):
        attack.set_normalization_used([0.2, 0.4, 0.6], [0.5, 0.3, 0.25])
    assert_equal(mine, published, mine.normalize(images), labels)
    assert all(p.requires_grad for p in model.parameters()) and not model.training


@beside
@pytest.mark.parametrize("name", NAMES)
def test_get_logits_may_draw_random_numbers(name, model, images, labels):
    """Input diversity, smoothing, dropout: as often as there, in the same order, and the same numbers afterwards."""
    calls: list[int] = []

    def get_logits(self, inputs, labels=None, *args, **kwargs):
        calls.append(1)
        return self.model(inputs + 0.05 * torch.randn_like(inputs)) + torch.rand(5).to(inputs)

    mine, published = (
        type("Own", (getattr(m, name),), {"get_logits": get_logits})(model.eval()) for m in (ours, theirs)
    )
    for mode in ("random", "least likely", None) if name != "TPGD" else (None,):
        for attack in (mine, published):
            attack.set_mode_default() if mode is None else MODES[mode](attack)
        assert_equal(mine, published, images, labels)
    assert len(calls) % 2 == 0 and calls
    for attack in (mine, published):
        attack.set_model_training_mode(model_training=True, dropout_training=True)
    assert_equal(mine, published, images, labels)


@pytest.mark.parametrize("name", NAMES)
def test_get_logits_overridden_in_any_context_and_dtype(name, model, images, labels):
    attack = type("Own", (getattr(ours, name),), {"get_logits": turned})(model.eval(), eps=0.1)
    attack.set_normalization_used([0.2, 0.4, 0.6], [0.5, 0.3, 0.25])
    batch, labels = attack.normalize(images), labels % 4
    expected, _ = after(attack, batch, labels)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            attack.set_normalization_used([0.2, 0.4, 0.6], [0.5, 0.3, 0.25])
            assert torch.equal(after(attack, batch, labels)[0], expected)
    assert attack(batch[:0], labels[:0]).shape == batch[:0].shape
    attack.set_model(model.bfloat16())
    adv = attack(batch.bfloat16(), labels)
    assert adv.dtype == torch.bfloat16 and torch.isfinite(adv).all() and not torch.equal(adv, batch.bfloat16())


class Ensemble:
    """The mean of two networks, of which the attack knows one."""

    def get_logits(self, inputs: Tensor, labels: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        return (self.model(inputs) + self.second(inputs)) / 2


@beside
@pytest.mark.parametrize("name", ["MIFGSM", "PGD"])
def test_an_ensemble_by_get_logits(name, model, images, labels):
    second = copy.deepcopy(model.eval())
    second.linear.weight.data.normal_()
    attacks = [type("Own", (Ensemble, getattr(module, name)), {"second": second})(model) for module in (ours, theirs)]
    assert_equal(*attacks, images, labels)
    attacks[1].model = attacks[0].model = second
    assert_equal(*attacks, images, labels)


@beside
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_forward_may_be_called(name, training, model, images, labels):
    """In the mode that the model is in."""
    model.dropout.p = 0.0
    mine, published = (getattr(module, name)(copy.deepcopy(model).train(training)) for module in (ours, theirs))
    assert_equal(mine.forward, published.forward, images, labels)
    assert mine.model.training == training


@beside
def test_forward_may_be_overridden(model, images, labels):
    def forward(self, inputs, labels=None, *args, shift=0.0, **kwargs):
        assert not any(module.training for module in self.model.modules()) and 0 <= inputs.min() <= inputs.max() <= 1
        assert self.get_mode() == "default" and self.device == inputs.device
        inputs = (inputs + shift).clamp(0, 1).requires_grad_()
        loss = torch.nn.functional.cross_entropy(self.get_logits(inputs), labels)
        return (inputs + 0.1 * torch.autograd.grad(loss, inputs)[0].sign()).clamp(0, 1).detach()

    for normalised in (False, True):
        attacks = [
            type("Own", (base,), {"forward": forward})("Own", copy.deepcopy(model))
            for base in (ours.attack.Attack, theirs.attack.Attack)
        ]
        batch = images * 0.8 + 0.1
        if normalised:
            for attack in attacks:
                attack.set_normalization_used([0.2, 0.4, 0.6], [0.5, 0.3, 0.25])
            batch = attacks[0].normalize(batch)
        assert_equal(*attacks, batch, labels)
        assert attacks[0].supported_mode == attacks[1].supported_mode
        shifted = [attack(batch, labels, shift=0.02) for attack in attacks]
        assert torch.allclose(*shifted, atol=1e-9, rtol=0) and not torch.equal(shifted[0], attacks[0](batch, labels))
        assert attacks[0].model.training and not attacks[0].model.frozen_bn.training


@beside
@pytest.mark.parametrize("name", NAMES)
def test_forward_may_be_run_twice(name, model, images, labels):
    """From where the first run ended, as restarts and schedules of one's own do."""

    def forward(self, images, labels):
        base = next(cls for cls in type(self).__mro__ if cls.__name__ == name)
        return base.forward(self, base.forward(self, images, labels), labels)

    mine, published = (type("Twice", (getattr(m, name),), {"forward": forward})(model) for m in (ours, theirs))
    assert_equal(mine, published, images, labels)


@beside
@pytest.mark.parametrize("name", ["PGDL2", "FGSM"])
def test_the_other_public_methods_may_be_overridden(name, model, images, labels):
    overrides = {
        "normalize": lambda self, inputs: (inputs - 0.4) / 0.3,
        "inverse_normalize": lambda self, inputs: inputs * 0.3 + 0.4,
        "get_target_label": lambda self, inputs, labels=None: (
            (labels + 1 + (inputs.flatten(1).mean(1) > 0.5)) % CLASSES
        ),
        "get_output_with_eval_nograd": lambda self, inputs: inputs.flatten(1)[:, :CLASSES],
    }
    for method, function in overrides.items():
        mine, published = (type("Own", (getattr(m, name),), {method: function})(model.eval()) for m in (ours, theirs))
        plain, batch = getattr(ours, name)(model), images
        for attack in (mine, published, plain):
            if "normalize" in method:
                attack.set_normalization_used([0.4] * 3, [0.5] * 3)
                batch = (images * 0.8 + 0.1 - 0.4) / (0.5 if method == "normalize" else 0.3)
            else:
                attack.set_mode_targeted_least_likely(quiet=True)
        adv = assert_equal(mine, published, batch, labels)
        if method != "inverse_normalize":
            assert not torch.allclose(adv, after(plain, batch, labels)[0]), method


@beside
@pytest.mark.parametrize("name", NAMES)
def test_attributes_changed_afterwards_act_as_there(name, model, images, labels):
    mine, published = both(name, model.eval())
    other = copy.deepcopy(model)
    other.linear.weight.data.normal_()
    changes = {"eps": 0.2, "alpha": 0.03, "steps": 3, "decay": 0.3, "random_start": False, "eps_for_division": 1e-3}
    before = after(mine, images, labels)[0]
    for attribute, value in {**changes, "model": other}.items():
        if hasattr(mine, attribute):
            setattr(mine, attribute, value), setattr(published, attribute, value)
            adv = assert_equal(mine, published, images, labels)
            assert not torch.equal(adv, before), attribute
            before = adv


@beside
@pytest.mark.parametrize("name", ["FGSM", "PGD", "MIFGSM", "TPGD", "PGDL2"])
def test_one_eps_per_sample(name, model, images, labels):
    eps = torch.linspace(0.02, 0.4, len(images), dtype=images.dtype, device=images.device)
    shaped = eps if name == "PGDL2" else eps.view(-1, 1, 1, 1)
    still = {"random_start": False} if name in ("PGD", "PGDL2") else {}
    given = {} if name in ("FGSM", "PGDL2") else {"alpha": shaped / 3}
    mine, published = both(name, model.eval(), eps=shaped, **still, **given)
    adv = assert_equal(mine, published, images, labels)
    mine.eps = eps
    assert torch.equal(adv, after(mine, images, labels)[0])


@pytest.mark.parametrize("name", NAMES)
def test_one_eps_per_sample_is_that_of_each_alone(name, model, images, labels):
    """Starts included, and steps: samples do not touch in eval mode."""
    eps = torch.linspace(0.02, 0.4, len(images), dtype=images.dtype, device=images.device)
    attack = getattr(ours, name)(model, eps=eps)
    if hasattr(attack, "alpha"):
        attack.alpha = eps / 2
    adv, _ = after(attack, images, labels)
    attack.eps = float(eps[4])
    if hasattr(attack, "alpha"):
        attack.alpha = float(eps[4]) / 2
    assert torch.allclose(after(attack, images, labels)[0][4], adv[4], atol=1e-9, rtol=0)


def settings_of_many(attack: Any, name: str) -> None:
    if name == "normalised":
        attack.set_normalization_used([0.2, 0.4, 0.6], [0.5, 0.3, 0.25])
    elif name == "training mode":
        attack.set_model_training_mode(model_training=True, batchnorm_training=True)
    elif name == "device":
        attack.set_device(attack.attacks[0].device)
    elif name == "targeted":
        attack.supported_mode = ["default", "targeted"]
        attack.set_mode_targeted_least_likely(kth_min=2, quiet=True)
    elif name == "model":
        other = copy.deepcopy(attack.model)
        other.linear.weight.data.neg_()
        attack.set_model(other)


def inner(module: Any, model: nn.Module) -> list[Any]:
    return [
        module.FGSM(model, eps=0.02), module.PGDL2(model, eps=0.3, steps=2), module.PGD(model, eps=0.1, steps=3),
        module.MIFGSM(model, eps=0.1),
    ]  # fmt: skip


@beside
@pytest.mark.parametrize("setting", ["none", "normalised", "training mode", "device", "targeted", "model"])
def test_multiattack(setting, model, images, labels):
    """Theirs of theirs, and every mixture with ours."""
    model, made = model.eval(), {}
    model.dropout.p = 0.0  # theirs lets the attacks inside switch it on
    labels = model(images).argmax(1)
    for outer in (theirs, ours):
        for module in (theirs, ours):
            net = copy.deepcopy(model)
            attack = outer.MultiAttack(inner(module, net))
            settings_of_many(attack, setting)
            batch = attack.normalize(images) if setting == "normalised" else images
            made[outer.__name__, module.__name__] = after(attack, batch, labels)
            assert all(a.model is attack.model for a in attack.attacks)
            assert {a._normalization_applied for a in attack.attacks} <= {None, True}
            if setting == "targeted":
                assert all(a.targeted and a.get_mode() == "targeted(least-likely)" for a in attack.attacks)
                attack.set_mode_default()
                assert not any(a.targeted for a in attack.attacks)
    (adv, drawn), *others = made.values()
    for found, drawn_then in others:
        assert float((found - adv).abs().max()) <= 1e-9 and torch.equal(drawn, drawn_then)
    assert not torch.allclose(adv, images)


@beside
def test_multiattack_takes_what_is_overridden(model, images, labels):
    """Its own get_logits says what is still right; get_logits of those inside, what is attacked."""
    made = []
    for module in (ours, theirs):
        own = type("Own", (module.FGSM,), {"get_logits": lambda self, x: -self.model(x)})
        many = type("Many", (module.MultiAttack,), {"get_logits": lambda self, x: self.model(x).roll(1, 1)})
        made.append(many([own(model.eval(), eps=0.05), module.PGD(model, eps=0.05)]))
    assert_equal(*made, images, labels)
    assert made[0].attack == "MultiAttack" and len(made[0].attacks) == 2


@beside
def test_settings_reach_attacks_in_attributes_lists_and_dicts(model, capsys):
    for module in (ours, theirs):

        class Holder(module.attack.Attack):
            def __init__(self, model):
                super().__init__("Holder", model)
                self.supported_mode = ["default", "targeted"]
                self.one, self.many = (
                    inner(ours, model)[0],
                    {"a": inner(theirs, model)[1:], "b": [inner(ours, model)[3]]},
                )

        holder = Holder(model)
        held = [holder.one, *holder.many["a"], *holder.many["b"]]
        holder.set_mode_targeted_by_function(lambda x, y: y, quiet=True)
        holder.set_model_training_mode(True, dropout_training=True)
        holder.set_device("meta")
        for attack in held:
            assert attack.targeted and attack.get_mode() == "targeted(custom)" and str(attack.device) == "meta"
            assert (attack._model_training, attack._batchnorm_training, attack._dropout_training) == (True, False, True)
        assert capsys.readouterr().out == ""


@beside
def test_lgv_takes_ours(model, images, labels):
    """It makes its attack at the first call, and hands settings on from then on."""
    mine, published = (
        theirs.LGV(model.eval(), [], attack_class=module.PGD, eps=0.1, steps=3, verbose=False)
        for module in (ours, theirs)
    )
    for attack in (mine, published):
        attack.load_models([copy.deepcopy(model)])
    adv = assert_equal(mine, published, images, labels)
    for attack in (mine, published):
        attack.set_normalization_used([0.2, 0.4, 0.6], [0.5, 0.3, 0.25])
    assert isinstance(mine.base_attack, ours.PGD)
    assert not torch.allclose(assert_equal(mine, published, mine.normalize(images), labels), mine.normalize(adv))


@pytest.mark.parametrize("imported", [False, True])
def test_attacks_are_copied_and_pickled(imported, model, images, labels, monkeypatch):
    """Also where torchattacks is imported, to which ours then seem to be its own."""
    if imported and theirs is None:
        pytest.skip("torchattacks is missing")
    if not imported:
        monkeypatch.delitem(importlib.sys.modules, "torchattacks.attack", raising=False)
    attack = ours.PGD(model, eps=0.1)
    attack.set_normalization_used([0.2, 0.4, 0.6], [0.5, 0.3, 0.25])
    attack.set_mode_targeted_random(quiet=True)
    batch = attack.normalize(images)
    expected, _ = after(attack, batch, labels)
    assert theirs is None or isinstance(attack, theirs.attack.Attack) == imported
    assert type(attack) is ours.PGD and isinstance(attack, ours.Attack) and attack.__class__.__name__ == "PGD"
    for protocol in (0, 2, pickle.HIGHEST_PROTOCOL):
        copied = pickle.loads(pickle.dumps(attack, protocol))
        assert type(copied) is ours.PGD and torch.equal(after(copied, batch, labels)[0], expected)
    copied = copy.deepcopy(attack)
    nn.init.zeros_(attack.model.linear.weight)
    assert copied._target_map_function.__self__ is copied
    assert torch.equal(after(copied, batch, labels)[0], expected)
    assert torch.equal(copy.copy(copied).model.linear.weight, copied.model.linear.weight)


@beside
def test_random_targets_leave_frozen_layers_frozen(model, images, labels):
    """Where torchattacks, having looked at the predictions, puts all of the model in train mode."""
    seen = []
    model.linear.register_forward_hook(lambda *_: seen.append((model.bn.training, model.dropout.training)))
    for module, expected in ((ours, (False, False)), (theirs, (True, True))):
        attack = module.FGSM(model.train())
        attack.set_model_training_mode(model_training=True)
        attack.set_mode_targeted_random(quiet=True)
        attack(images, labels)
        assert seen.pop() == expected


class RobModel(Net):
    """By this name and these attributes torchattacks knows a model of MAIR, whose inputs are normalised."""

    mean, std = torch.tensor([0.2, 0.4, 0.6]), torch.tensor([0.5, 0.3, 0.25])


@beside
def test_models_of_mair(model, images, labels):
    mair = RobModel().to(images)
    mair.load_state_dict(model.state_dict())
    mine, published = both("PGD", mair.eval())
    assert mine.normalization_used is not None
    assert_equal(mine, published, mine.normalize(images), labels)
    mair.mean = None
    assert ours.PGD(mair).normalization_used is None


def loader(images: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(images[:4], labels[:4]), (images[4:], labels[4:])]


@beside
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("save_type", ["float", "int"])
def test_save_and_load(save_type, normalised, model, images, labels, tmp_path, capsys):
    """Either writes what the other writes and reads what the other reads."""
    images, model = images.float(), model.float().eval()
    images = torch.where((255 * images - (255 * images).round()).abs() < 0.01, 0.3, images)  # no ties in rounding down
    labels = model(images).argmax(1)
    files, figures = [], []
    for name, module in (("ours", ours), ("theirs", theirs)):
        attack, batch = module.FGSM(model, eps=0.0503), images
        if normalised:
            attack.set_normalization_used([0.2, 0.4, 0.6], [0.5, 0.3, 0.25])
            batch = attack.normalize(images)
        files.append(tmp_path / name)
        options = {"save_predictions": True, "save_clean_inputs": True, "save_type": save_type, "return_verbose": True}
        figures.append(attack.save(loader(batch, labels), str(files[-1]), **options))
    assert figures[0][:2] == pytest.approx(figures[1][:2], rel=1e-4) and figures[0][2] > 0
    assert "Robust accuracy" in capsys.readouterr().out and 0 < figures[0][0] < 100
    a, b = (torch.load(file) for file in files)
    assert list(sorted(a)) == list(sorted(b)) and a["save_type"] == b["save_type"]
    for key in set(a) - {"save_type"}:
        assert a[key].dtype == b[key].dtype and torch.allclose(a[key].float(), b[key].float(), atol=1e-6), key
    how = {"load_predictions": True, "load_clean_inputs": True, "normalize": {"mean": [0.1] * 3, "std": [0.5] * 3}}
    for file in files:
        (mine,), (published,) = (list(module.load(str(file), **how)) for module in (ours.PGD, theirs.PGD))
        assert all(torch.allclose(p.float(), q.float(), atol=1e-6) for p, q in zip(mine, published, strict=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "theirs"]


@beside
def test_multiattack_saves(model, images, labels, tmp_path, capsys):
    labels, made = model.eval()(images).argmax(1), []
    for module in (ours, theirs):
        attack = module.MultiAttack([module.FGSM(model, eps=0.02), module.FGSM(model, eps=0.1)], verbose=True)
        made.append(attack.save(loader(images, labels), str(tmp_path / "adv"), return_verbose=True)[:3])
        assert attack.verbose
        capsys.readouterr()
        attack(images, labels)
        made.append(capsys.readouterr().out)
    assert made[0][0] == pytest.approx(made[2][0]) and made[0][1] == pytest.approx(made[2][1])
    assert made[1] == made[3] and made[1].startswith("Attack success rate: ")


def test_save_to_a_stream_and_of_nothing(model, images, labels):
    file = io.BytesIO()
    attack = ours.PGD(model)
    assert attack.save(loader(images, labels), file, verbose=False) is None
    file.seek(0)
    (batch,) = attack.load(file)
    assert len(batch) == 2 and batch[0].shape == images.shape and torch.equal(batch[1], labels.cpu())
    file.seek(0)
    with pytest.raises(ValueError, match="no preds and no clean_inputs"):
        attack.load(file, load_predictions=True, load_clean_inputs=True)


def test_a_file_is_written_whole_or_not_at_all(model, images, labels, tmp_path, monkeypatch):
    (tmp_path / "adv").write_bytes(b"before")

    def fail(content: Any, path: Any) -> None:
        open(path, "wb").close()
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        ours.PGD(model).save(loader(images, labels), tmp_path / "adv", verbose=False)
    assert [path.name for path in tmp_path.iterdir()] == ["adv"] and (tmp_path / "adv").read_bytes() == b"before"


def test_execution_knows_a_normalised_model_again(model, images, labels):
    """Recorded once, not anew in every call."""
    attack = ours.PGD(model.eval(), steps=2)
    attack.set_normalization_used([0.2, 0.4, 0.6], [0.5, 0.3, 0.25])
    expected, execution = after(attack, attack.normalize(images), labels % 4)[0], Execution(cuda_graphs=True)
    if images.device.type == "cpu":
        execution.graphs = Graphs(recorded, "cpu")
    for _ in range(2):
        with execution:
            assert torch.equal(after(attack, attack.normalize(images), labels % 4)[0], expected)
    assert execution.graphs.recordings == 1


def test_normalisation_that_changes_is_seen(model, images, labels):
    attack, mean = ours.PGD(model.eval()), torch.full((3,), 0.4, dtype=torch.float64)
    for value in (0.4, 0.2):
        mean.fill_(value)
        attack.set_normalization_used(mean, [0.5] * 3)
        fresh = ours.PGD(model)
        fresh.set_normalization_used(mean, [0.5] * 3)
        batch = attack.normalize(images)
        assert torch.equal(after(attack, batch, labels)[0], after(fresh, batch, labels)[0])
        assert torch.equal(mean, torch.full_like(mean, value))


OVERRIDES: list[dict[str, Callable[..., Any]]] = [
    {},
    {},
    {"get_logits": lambda self, x, *_: -super(type(self), self).get_logits(x) / 2},
    {"get_logits": lambda self, x, *_: super(type(self), self).get_logits(x + 0.03 * torch.randn_like(x))},
    {"get_target_label": lambda self, x, y=None: (y + 2) % CLASSES},
    {"forward": lambda self, x, y=None: super(type(self), self).forward(super(type(self), self).forward(x, y), y)},
]


def drawn(chance: random.Random, depth: int = 0) -> Callable[[Any, nn.Module], Any]:
    """A recipe of an attack, from either package: settings, overrides, and attacks within attacks."""
    name, override = chance.choice([*NAMES, *["MultiAttack"] * (2 if depth < 2 else 0)]), chance.choice(OVERRIDES)
    if name == "MultiAttack":
        parts = [(drawn(chance, depth + 1), chance.random() < 0.5) for _ in range(chance.randint(2, 3))]

        def many(module: Any, net: nn.Module) -> Any:
            attacks = [part(theirs if foreign else module, net) for part, foreign in parts]
            return type("Own", (module.MultiAttack,), override)(attacks)

        return many
    choices = {"eps": [0.02, 0.1, 0.3], "alpha": [0.01, 0.05], "steps": [0, 1, 3], "random_start": [True, False]}
    taken = {
        key: chance.choice(choices[key]) for key in inspect.signature(getattr(ours, name)).parameters & choices.keys()
    }
    return lambda module, net: type("Own", (getattr(module, name),), override)(net, **taken)


@beside
@pytest.mark.parametrize("seed", range(40))
def test_same_for_random_settings_overrides_and_nesting(seed, model, images, labels):
    """But for what differs: in train mode theirs un-freezes layers after targets and within MultiAttack."""
    chance = random.Random(seed)
    recipe, normalised, mode = drawn(chance), chance.random() < 0.4, chance.choice([None, *MODES])
    training = chance.random() < 0.3
    model.dropout.p, attacks = 0.0, []
    for module in (ours, theirs):
        attack = recipe(module, copy.deepcopy(model.eval()))
        if normalised:
            attack.set_normalization_used([0.2, 0.4, 0.6], [0.5, 0.3, 0.25])
        if "targeted" in attack.supported_mode and mode is not None:
            MODES[mode](attack)
        elif training and not hasattr(attack, "attacks"):
            attack.set_model_training_mode(model_training=True, batchnorm_training=True)
        attacks.append(attack)
    assert_equal(*attacks, attacks[0].normalize(images) if normalised else images, labels)
