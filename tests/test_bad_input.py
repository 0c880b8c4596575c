"""Bad input to the operators: a clear exception that names the argument, before anything is written."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

import atlas_kernels as ak
from atlas_kernels.backends import BackendUnavailable, unavailable_reason
from operator_cases import problem

ADV, GRAD, X = problem((4, 3, 8, 8))
NAN = float("nan")
Z, Y, T = torch.randn(4, 5), torch.tensor([0, 1, 2, 3]), torch.tensor([1, 2, 3, 4])
HUGE = torch.full((4,), 1e300, dtype=torch.float64)


def nested(t):
    return torch.nested.nested_tensor(list(t))


def both(count=1, **rest):
    return ak.pgd_step_neighbours(ADV, GRAD, X, 0.1, 0.1, 0.1, count, **rest)


def labelled(labels=Y, label_noise=X, eps=0.1, **rest):
    return ak.label_noise_start(X, labels, label_noise, eps, **rest)


def step(adv=ADV, grad=GRAD, x=X, eps=0.1, step_size=0.1, **rest):
    return ak.pgd_step(adv, grad, x, eps, step_size, **rest)


def apgd(old=ADV, momentum=0.75, **rest):
    return ak.apgd_step(ADV, old, GRAD, X, 0.1, 0.1, momentum, **rest)


def sparse(largest, **rest):
    return apgd(norm="l1", largest=largest, **rest)


STORE, ROWS = torch.zeros(9, 3, 8, 8), torch.arange(4)


def stored(x=X, grad=GRAD, stored=STORE, momentum=STORE, index=ROWS, eps=0.1, **rest):
    return ak.stored_step(x, grad, stored, momentum, index, eps, **rest)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, r"index\[1\] = 9 is no row of the 9 images", lambda: stored(index=torch.tensor([0, 9, 1, 2]))),
        (ValueError, r"index\[0\] = -1 is no row of the 9", lambda: ak.stored_start(X, STORE, ROWS - 1)),
        (ValueError, "index has row 3 twice: a batch may write", lambda: stored(index=torch.tensor([3, 1, 3, 2]))),
        (TypeError, r"index must be an int64 tensor \[B\] of rows, got torch.int32", lambda: stored(index=ROWS.int())),
        (ValueError, r"index has shape \[3\], expected \[4\]", lambda: ak.stored_start(X, STORE, ROWS[:3])),
        (ValueError, r"stored has shape \[9, 3, 8, 7\], expected \[N, 3, 8, 8\]", lambda: stored(stored=STORE[..., 1:])),
        (ValueError, r"momentum has shape \[8, 3, 8, 8\], stored has \[9", lambda: stored(momentum=STORE[1:])),
        (ValueError, "momentum shares memory with stored", lambda: stored(momentum=STORE)),
        (ValueError, "stored has strides .* call .contiguous", lambda: ak.stored_start(X, STORE.transpose(2, 3), ROWS)),
        (TypeError, "momentum must be a float tensor, got torch.int64", lambda: stored(momentum=STORE.long())),
        (ValueError, "stored is on meta, the images on cpu", lambda: stored(stored=STORE.to("meta"))),
        (ValueError, "momentum requires grad", lambda: stored(momentum=STORE.clone().requires_grad_())),
        *((ValueError, "decay must be a finite number >= 0", lambda bad=bad: stored(decay=bad)) for bad in (-0.1, NAN, True, "x")),
        (ValueError, "eps must be a number >= 0, got -1.0", lambda: stored(eps=-1.0)),
        (ValueError, "step_size must be a number >= 0", lambda: stored(step_size=NAN)),
        (ValueError, r"grad has shape \[4, 3, 8, 7\], x has", lambda: stored(grad=GRAD[..., 1:])),
        (ValueError, "out has shape", lambda: ak.stored_start(X, STORE, ROWS, out=torch.empty(4, 3))),
    ],
)  # fmt: skip
def test_message_of_stored_perturbations(error, message, call):
    with pytest.raises(error, match=message):
        call()
    assert not STORE.any()


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "adv must be a tensor, got list", lambda: step(adv=[1.0])),
        (TypeError, "adv must be a float tensor, got torch.uint8; divide images", lambda: step(adv=ADV.to(torch.uint8))),
        (TypeError, "adv must be a float tensor, got torch.complex64", lambda: step(adv=ADV.to(torch.complex64))),
        (TypeError, "strided tensor, got layout torch.sparse_coo", lambda: step(adv=ADV.to_sparse())),
        (TypeError, "x must be a strided tensor", lambda: step(x=X.to_sparse())),
        (ValueError, "adv must have a batch dimension", lambda: step(adv=torch.tensor(0.5))),
        (TypeError, "x is torch.float64, adv is torch.float32", lambda: step(x=X.double())),
        (ValueError, r"x has shape \[4, 3, 8, 7\], adv has \[4, 3, 8, 8\]", lambda: step(x=X[..., :7])),
        (TypeError, "grad must be a float tensor, got torch.int64", lambda: step(grad=GRAD.long())),
        (ValueError, "grad is on meta, adv on cpu", lambda: step(grad=GRAD.to("meta"))),
        (ValueError, "eps must be a number >= 0, got -0.1", lambda: step(eps=-0.1)),
        (ValueError, "step_size must be a number >= 0, got nan", lambda: step(step_size=NAN)),
        (TypeError, "eps must be a number or a tensor, got the string '8/255'", lambda: step(eps="8/255")),
        (TypeError, "eps must be a number or a tensor, got NoneType", lambda: step(eps=None)),
        (ValueError, r"eps has shape \[3\], expected one number or \[4\]", lambda: step(eps=torch.ones(3))),
        (ValueError, r"eps\[2\] = -1.0 is not", lambda: step(eps=torch.tensor([1.0, 0.0, -1.0, 2.0]))),
        (ValueError, r"step_size\[0\] = nan is not", lambda: step(step_size=torch.full((4,), NAN))),
        (ValueError, "clip_min has 2 values, expected one number, or one per channel", lambda: step(clip_min=[0.0, 0.0])),
        (ValueError, "clip_max must not be NaN", lambda: step(clip_max=NAN)),
        (ValueError, r"clip_max\[1\] = nan is not a number$", lambda: step(clip_max=torch.tensor([1.0, NAN, 1.0]))),
        (ValueError, "one per channel", lambda: ak.random_start(torch.rand(2, 3), 0.1, clip_min=[0.0, 0.0, 0.0])),
        (TypeError, "active must be a bool tensor, got torch.float32", lambda: step(active=torch.ones(4))),
        (ValueError, r"active is \[3\] on cpu, expected \[4\]", lambda: step(active=torch.ones(3, dtype=torch.bool))),
        (ValueError, "out has shape", lambda: step(out=torch.empty(4, 3, 8, 7))),
        (TypeError, "out is torch.float64, expected torch.float32", lambda: step(out=torch.empty_like(ADV, dtype=torch.float64))),
        (ValueError, "out has strides .* do not overlap themselves", lambda: step(out=torch.empty(1, 3, 8, 8).expand(4, 3, 8, 8))),
        (ValueError, "out has strides", lambda: step(out=torch.empty(4, 3, 8, 16)[..., ::2])),
        (ValueError, "out= and cast= do not work", lambda: step(adv=ADV.clone().requires_grad_(), out=torch.empty_like(ADV))),
        (ValueError, r"label_noise is \[5, 3, 8, 7\] on cpu, expected one image for each class, \[classes, 3, 8, 8\]", lambda: labelled(label_noise=X.new_zeros(5, 3, 8, 7))),
        (ValueError, r"label_noise is \[3, 8, 8\] on cpu, expected one image for each class", lambda: labelled(label_noise=X[0])),
        (ValueError, r"label_noise is \[0, 3, 8, 8\] on cpu, expected one image for each class", lambda: labelled(label_noise=X[:0])),
        (ValueError, "label_noise is .* on meta, expected one image", lambda: labelled(label_noise=X.to("meta"))),
        (TypeError, "label_noise must be a float tensor, got torch.int64", lambda: labelled(label_noise=X.long())),
        (ValueError, r"labels\[1\] = 4 is not a class: label_noise has 4, from 0 on", lambda: labelled(labels=torch.tensor([0, 4, 1, 2]))),
        (ValueError, r"labels is \[3\] on cpu, expected \[4\]", lambda: labelled(labels=Y[:3])),
        *((ValueError, "share must be two numbers, 0 <= least <= largest <= 1, got ", lambda bad=bad: labelled(share=bad)) for bad in ((0.5, 0.1), (-0.1, 0.5), (0.1, 1.1), (NAN, 0.5), 0.3, (0.1,), None, ("a", 1))),
        (ValueError, "eps must be a number >= 0, got -0.1", lambda: labelled(eps=-0.1)),
        (ValueError, r"old has shape \[4, 3, 8, 7\], adv has", lambda: apgd(old=ADV[..., 1:])),
        (TypeError, "old is torch.float16, adv is torch.float32", lambda: apgd(old=ADV.half())),
        (TypeError, "old must be a tensor, got NoneType", lambda: apgd(old=None)),
        (ValueError, r"momentum must be in \[0, 1\], got 1.5: it is the share of the step", lambda: apgd(momentum=1.5)),
        (ValueError, r"momentum must be in \[0, 1\], got 2: it", lambda: apgd(momentum=torch.tensor([0.0, 2.0, 1.0, 1.0]))),
        (ValueError, "momentum must be a number >= 0, got -0.5", lambda: apgd(momentum=-0.5)),
        (ValueError, r"momentum has shape \[3\], expected one number or \[4\]", lambda: apgd(momentum=torch.ones(3))),
        (ValueError, "norm must be one of", lambda: apgd(norm="l3")),
        (TypeError, "descend must be True or False, got 1", lambda: apgd(descend=1)),
        (TypeError, "active must be a bool tensor", lambda: apgd(active=Y)),
        (ValueError, "largest must be given in l1: how many of the 192 entries", lambda: sparse(None)),
        *((ValueError, "largest must be an integer of at ", lambda bad=bad: sparse(bad)) for bad in (0, -1, 193)),
        *((TypeError, "largest must be an integer, got", lambda bad=bad: sparse(bad)) for bad in (0.2, True, "x", [1, 2, 3, 4])),
        (ValueError, r"largest is torch.int32 \[4\] on cpu, expected an integer, or int64 \[4\]", lambda: sparse(Y.int())),
        (ValueError, r"largest is torch.int64 \[3\] on cpu", lambda: sparse(Y[:3])),
        (TypeError, "largest must be a strided tensor, got nested", lambda: sparse(nested(Y))),
        *((ValueError, f"largest must be 1 to 192, the entries of a sample, got {bad}", lambda bad=bad: sparse(torch.tensor([1, bad, 192, 7]))) for bad in (0, -7, 193)),
        (ValueError, "step_size must be finite in l2 and l1", lambda: ak.apgd_step(ADV, ADV, GRAD, X, 1.0, float("inf"), 1.0, norm="l2")),
        (ValueError, "key must be the int64", lambda: ak.random_start(X, 0.1, key=torch.zeros(2))),
        (ValueError, r"ids is torch.int32 \[4\]", lambda: ak.random_start(X, 0.1, ids=torch.zeros(4, dtype=torch.int32))),
        (TypeError, "ids must be an int64 tensor .4., got int", lambda: ak.random_start(X, 0.1, ids=3)),
        (TypeError, "ids must be an int64 tensor .4., got list", lambda: ak.sample_neighbours(X, 0.1, 1, ids=[0, 1, 2, 3])),
        (TypeError, "ids must be a strided tensor, got nested", lambda: ak.random_start(X, 0.1, ids=nested(Y))),
        (TypeError, "key must be the tensor of noise_key.'cpu'., got int", lambda: ak.random_start(X, 0.1, key=7)),
        (ValueError, "draw must be an integer of at least 0, got -1", lambda: ak.random_start(X, 0.1, draw=-1)),
        (ValueError, "draw must be an integer of at most 4294967295", lambda: ak.random_start(X, 0.1, draw=2**32)),
        *((TypeError, f"draw must be an integer, got {re.escape(repr(bad))}", lambda bad=bad: ak.random_start(X, 0.1, draw=bad)) for bad in (1.5, "1", None, True)),
        (TypeError, r"draw must be an integer, got a tensor \[\]; call .item", lambda: ak.random_start(X, 0.1, draw=torch.tensor(1))),
        *((TypeError, f"include_x must be True or False, got {re.escape(repr(bad))}", lambda bad=bad: both(include_x=bad)) for bad in (2, 1, "x", None, [])),
        (TypeError, "project must be True or False, got 'yes'", lambda: both(project="yes")),
        (TypeError, "descend must be True or False, got 'yes'", lambda: both(descend="yes")),
        (TypeError, "descend must be True or False, got 'yes'", lambda: step(descend="yes")),
        (TypeError, "descend must be True or False, got 1.0", lambda: step(descend=1.0, norm="l2")),
        (TypeError, "clip_min must be a number or a tensor, got the string '0'", lambda: ak.random_start(X, 0.1, clip_min="0")),
        (TypeError, "clip_max must hold numbers, got .'a', 1, 2.", lambda: step(clip_max=["a", 1, 2])),
        (TypeError, "eps must be a number or a tensor, got True", lambda: step(eps=True)),
        (TypeError, "eps must be a number or a tensor, got int", lambda: step(eps=10**400)),
        (TypeError, "eps must be a strided tensor, got layout torch.sparse_coo", lambda: step(eps=torch.ones(4).to_sparse())),
        (TypeError, "eps must be a strided tensor, got nested", lambda: step(eps=nested(torch.ones(4)))),
        (TypeError, "eps must be a number or a tensor, got a NumPy array; torch.from_numpy", lambda: step(eps=np.ones(4))),
        (TypeError, "adv must be a tensor, got a NumPy array; torch.from_numpy", lambda: step(adv=ADV.numpy())),
        (TypeError, "adv must be a strided tensor, got nested", lambda: step(adv=nested(ADV))),
        (TypeError, "x must be a strided tensor, got nested", lambda: step(x=nested(X))),
        (TypeError, "active must be a strided tensor, got nested", lambda: step(active=nested(Y > 1))),
        (ValueError, r"clip_max has 3 values.*\[4, 8, 8, 3\]\); make images with the channels last", lambda: ak.random_start(X.permute(0, 2, 3, 1), 0.1, clip_max=[1.0, 1.0, 1.0])),
        (TypeError, "cuda_graphs must be True or False, got 'no'", lambda: ak.Execution(cuda_graphs="no")),
        (TypeError, "base must be an integer, got 0.5", lambda: ak.noise_key(base=0.5)),
        (ValueError, "base must be an integer of at most 9223372036854775807", lambda: ak.noise_key(base=2**63)),
        (ValueError, "norm must be one of 'linf', 'l2', 'l1', got 'inf'; did you mean 'linf'", lambda: step(norm="inf")),
        (ValueError, "norm must be one of 'linf', 'l2', 'l1', got 2", lambda: ak.random_start(X, 0.1, norm=2)),
        (ValueError, "norm must be one of .* did you mean 'l1'", lambda: ak.project(ADV, X, 0.1, norm="L1")),
        (TypeError, "v must be a tensor, got float", lambda: ak.project(0.5, X, 0.1)),
        (ValueError, r"x has shape \[4, 3, 8, 7\], v has", lambda: ak.project(ADV, X[..., :7], 0.1, norm="l2")),
        (ValueError, "eps must be a number >= 0, got -1.0", lambda: ak.project(ADV, X, -1.0, norm="l1")),
        (ValueError, "out has shape", lambda: ak.project(ADV, X, 0.1, norm="l1", out=torch.empty(4, 3))),
        (ValueError, "count must be an integer of at least 0, got -1", lambda: ak.sample_neighbours(X, 0.1, -1)),
        (ValueError, "count must be an integer of at most 16777215", lambda: both(count=2**24)),
        (TypeError, "count must be an integer, got 1.5", lambda: ak.sample_neighbours(X, 0.1, 1.5)),
        (TypeError, "count must be an integer, got True", lambda: both(count=True)),
        (ValueError, "radius must be a number >= 0", lambda: ak.sample_neighbours(X, -0.1, 1)),
        (ValueError, "x and eps go together", lambda: ak.sample_neighbours(X, 0.1, 1, x=X)),
        (ValueError, "out has shape", lambda: ak.sample_neighbours(X, 0.1, 2, out=torch.empty_like(X))),
        (ValueError, "out has shape", lambda: ak.pgd_step_neighbours(ADV, GRAD, X, 0.1, 0.1, 0.1, 1, out=torch.empty_like(X))),
    ],
)  # fmt: skip
def test_message(error, message, call):
    with pytest.raises(error, match=message):
        call()


def shares(value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Target distributions for Z, one number of which is this."""
    made = torch.full((4, 5), 0.2, dtype=dtype)
    made[1, 2] = value
    return made


def quantized(t):
    return torch.quantize_per_tensor(t.float(), 1.0, 0, torch.quint8)


H, LABELS = torch.rand(4, 6), torch.arange(4)


def compact(h=H, h_adv=H, labels=LABELS, **rest):
    return ak.compactness(h, h_adv, labels, **rest)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "h must be a dense float tensor, got list", lambda: compact(h=[1.0])),
        (TypeError, "h must be a dense float tensor, got torch.int64", lambda: compact(h=H.long())),
        (TypeError, "h_adv must be a dense float tensor, got torch.float32 .*sparse", lambda: compact(h_adv=H.to_sparse())),
        (ValueError, r"h has shape \[4, 3, 8, 8\], expected features \[B, k\] .*flatten", lambda: compact(ADV, ADV)),
        (ValueError, r"h has shape \[4, 0\], expected features \[B, k\] with k >= 1", lambda: compact(H[:, :0], H[:, :0])),
        (ValueError, r"h_adv has shape \[4, 5\], h has \[4, 6\]", lambda: compact(h_adv=H[:, :5])),
        (TypeError, "h_adv is torch.float64, h is torch.float32", lambda: compact(h_adv=H.double())),
        (ValueError, "h_adv is on meta, h on cpu", lambda: compact(h_adv=H.to("meta"))),
        (TypeError, "labels must be an int64 tensor .*, got torch.int32: call .long", lambda: compact(labels=LABELS.int())),
        (TypeError, "labels must be an int64 tensor .*, got list", lambda: compact(labels=[0, 1, 2, 3])),
        (ValueError, r"labels is \[3\] on cpu, expected \[4\]", lambda: compact(labels=LABELS[:3])),
        (ValueError, r"labels is \[4, 1\] on cpu", lambda: compact(labels=LABELS[:, None])),
        (ValueError, r"labels is \[4\] on meta, expected \[4\] on cpu", lambda: compact(labels=LABELS.to("meta"))),
        (ValueError, "scale must be finite and not 0 .*, got 0.0", lambda: compact(scale=0.0)),
        (ValueError, "scale must be finite and not 0 .*, got nan", lambda: compact(scale=NAN)),
        (TypeError, "scale must be a number, got str", lambda: compact(scale="0.99")),
        (TypeError, "detach must be True or False, got 'no'", lambda: compact(detach="no")),
        (TypeError, "h must be a dense float tensor, got torch.float32 .nested", lambda: compact(h=nested(H))),
        (TypeError, "labels must be a strided tensor, got nested", lambda: compact(labels=nested(LABELS))),
        (TypeError, "labels must be an int64 tensor .*, got a NumPy array; torch.from_numpy", lambda: compact(labels=LABELS.numpy())),
        (TypeError, "scale must be a number, got NoneType", lambda: compact(scale=None)),
        (ValueError, "distance must be one of 'l1', 'squared', got 'l11'; did you mean 'l1'", lambda: compact(distance="l11")),
        (ValueError, "reduction must be one of 'mean', 'sum', 'none', got 'average'", lambda: compact(reduction="average")),
        (ValueError, "'none' has no gradient for h", lambda: compact(H.clone().requires_grad_(), detach=False, reduction="none")),
    ],
)  # fmt: skip
def test_message_of_compactness(error, message, call):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "d must be a float tensor, got list", lambda: ak.nuclear_norm([[1.0, 2.0]])),
        (TypeError, "d must be a float tensor, got torch.int64", lambda: ak.nuclear_norm(H.long())),
        (TypeError, "d must be a float tensor, got .*; torch.from_numpy", lambda: ak.nuclear_norm(H.numpy())),
        (TypeError, "d must be a strided tensor, got layout torch.sparse_coo", lambda: ak.nuclear_norm(H.to_sparse())),
        (TypeError, "d must be a strided tensor, got nested", lambda: ak.nuclear_norm(nested(H))),
        (ValueError, r"d has shape \[4, 3, 8, 8\], expected \[batch, classes\]", lambda: ak.nuclear_norm(ADV)),
        (ValueError, r"d has shape \[4, 1\], expected \[batch, classes\], two classes or more", lambda: ak.nuclear_norm(H[:, :1])),
    ],
)  # fmt: skip
def test_message_of_nuclear_norm(error, message, call):
    with pytest.raises(error, match=message):
        call()


C = torch.rand(3)


def normalise(x=X, mean=C, var=C, weight=C, bias=C, training=True, **rest):
    return ak.batch_norm(x, mean, var, weight, bias, training, **rest)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "input must be a tensor, got list", lambda: normalise([1.0])),
        (TypeError, "input must be a float tensor, got torch.int64", lambda: normalise(X.long())),
        (TypeError, "input must be a strided tensor, got layout torch.sparse_coo", lambda: normalise(X.to_sparse())),
        (ValueError, r"input has shape \[3\], expected \[batch, channels, ...\]", lambda: normalise(C)),
        (TypeError, "weight must be a tensor of torch.float32, got torch.float64", lambda: normalise(weight=C.double())),
        (TypeError, "bias must be a tensor of torch.float32, got float", lambda: normalise(bias=0.0)),
        (TypeError, "running_var must be a strided tensor, got layout", lambda: normalise(var=C.to_sparse())),
        (ValueError, r"weight is \[2\] on cpu, expected \[3\] on cpu, one number per channel", lambda: normalise(weight=C[:2])),
        (ValueError, r"running_mean is \[3\] on meta, expected \[3\] on cpu", lambda: normalise(mean=C.to("meta"))),
        (TypeError, "must be of one dtype, got running_mean torch.float32, .* weight torch.float16",
         lambda: normalise(X.half(), weight=C.half())),
        (ValueError, "running_mean and running_var go together", lambda: normalise(mean=None)),
        (ValueError, "running_mean must be given where training is False", lambda: normalise(mean=None, var=None, training=False)),
        (TypeError, "training must be True or False, got 1", lambda: normalise(training=1)),
        (ValueError, r"momentum must be a number in \[0, 1\], got 1.5", lambda: normalise(momentum=1.5)),
        (ValueError, "eps must be a number >= 0, got nan", lambda: normalise(eps=NAN)),
        (ValueError, "Expected more than 1 value per channel when training", lambda: normalise(X[:1, :, :1, :1])),
    ],
)  # fmt: skip
def test_message_of_batch_norm(error, message, call):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "logits must be a float tensor, got list", lambda: ak.cross_entropy([1.0], Y)),
        (TypeError, "logits must be a float tensor, got torch.int64", lambda: ak.entropy(Z.long())),
        (TypeError, "logits must be a strided tensor", lambda: ak.entropy(Z.to_sparse())),
        (ValueError, r"logits has shape \[5\], expected \[batch, classes\]", lambda: ak.entropy(Z[0])),
        (ValueError, r"logits has shape \[4, 1\].*two classes or more; stack", lambda: ak.entropy(Z[:, :1])),
        (ValueError, r"logits has shape \[1, 4, 5\]", lambda: ak.cross_entropy(Z[None], Y)),
        (ValueError, r"q_logits has shape \[4, 4\], p_logits has \[4, 5\]", lambda: ak.kl_div(Z, Z[:, :4])),
        (ValueError, r"adv_logits has shape \[3, 5\], logits has \[4, 5\]", lambda: ak.trades_loss(Z, Z[:3], Y)),
        (TypeError, "adv_logits is torch.float64, logits is torch.float32", lambda: ak.mart_loss(Z, Z.double(), Y)),
        (ValueError, "adv_logits is on meta, logits on cpu", lambda: ak.logit_pairing(Z, Z.to("meta"))),
        (TypeError, "labels must be an integer tensor of class indices, got torch.float32", lambda: ak.cross_entropy(Z, Y.float())),
        (TypeError, "labels must be an integer tensor of class indices, got list", lambda: ak.margin_loss(Z, [0, 1, 2, 3])),
        (ValueError, r"labels is \[3\] on cpu, expected \[4\]", lambda: ak.cross_entropy(Z, Y[:3])),
        (ValueError, r"labels is \[4, 1\] on cpu, expected \[4\]", lambda: ak.cross_entropy(Z, Y[:, None])),
        (ValueError, r"labels is \[4\] on meta, expected \[4\] on cpu", lambda: ak.cross_entropy(Z, Y.to("meta"))),
        (ValueError, r"labels\[1\] = 5 is not a class: the logits have 5", lambda: ak.cross_entropy(Z, Y + torch.tensor([0, 4, 9, 0]))),
        (ValueError, r"labels\[2\] = -1 is not a class", lambda: ak.trades_loss(Z, Z, Y - torch.tensor([0, 0, 3, 9]))),
        (ValueError, r"labels\[0\] = -100 is not a class", lambda: ak.atlas_loss(torch.cat([Z, Z]), Y.to(torch.int16) - 100)),
        (ValueError, r"weights is \[3\] on cpu, expected \[4\]", lambda: ak.cross_entropy(Z, Y, weights=torch.ones(3))),
        (ValueError, r"weights is \[5\] on cpu, expected \[4\].*one per sample", lambda: ak.kl_div(Z, Z, weights=torch.ones(5))),
        (TypeError, "weights must be a real tensor", lambda: ak.entropy(Z, weights=2.0)),
        (ValueError, r"weights\[0\] = 1e\+300 does not fit torch.float32.*float64 logits", lambda: ak.entropy(Z, weights=HUGE)),
        (ValueError, r"beta = 1e\+300 does not fit torch.float32", lambda: ak.trades_loss(Z, Z, Y, beta=1e300)),
        (ValueError, r"global_weight = 1e\+39 does not fit torch.float32", lambda: ak.atlas_loss(torch.cat([Z, Z]), Y, global_weight=1e39)),
        (ValueError, r"beta has no gradient.*pass float\(beta.detach\(\)\)", lambda: ak.mart_loss(Z, Z, Y, beta=torch.tensor(2.0, requires_grad=True))),
        (ValueError, "reduction must be one of .*'means'; did you mean 'mean'", lambda: ak.entropy(Z, reduction="means")),
        (ValueError, r"label_smoothing must be a number in \[0, 1\], got 1.5", lambda: ak.cross_entropy(Z, Y, label_smoothing=1.5)),
        (ValueError, "beta must be a number >= 0, got -1.0", lambda: ak.trades_loss(Z, Z, Y, beta=-1)),
        (ValueError, "beta must be a number >= 0, got nan", lambda: ak.mart_loss(Z, Z, Y, beta=NAN)),
        (TypeError, "beta must be a number or a tensor, got the string", lambda: ak.mart_loss(Z, Z, Y, beta="6")),
        (ValueError, "logits has 2 classes: the DLR loss looks as far as logit number 3, so it needs 3", lambda: ak.dlr_loss(Z[:, :2], Y % 2)),
        (ValueError, "logits has 3 classes: the targeted DLR loss .* number 4", lambda: ak.dlr_loss(Z[:, :3], Y % 3, targets=(Y + 1) % 3)),
        (ValueError, r"targets\[2\] = 2 is the label itself", lambda: ak.dlr_loss(Z, Y, targets=torch.tensor([1, 2, 2, 3]))),
        (ValueError, r"targets\[3\] = 5 is not a class", lambda: ak.dlr_loss(Z, Y, targets=torch.tensor([1, 2, 3, 5]))),
        (ValueError, r"targets is \[3\]", lambda: ak.dlr_loss(Z, Y, targets=T[:3])),
        (ValueError, r"logits has 7 rows for 4 labels.*2 \+ n batches \[x; x'; z_1", lambda: ak.atlas_loss(torch.randn(7, 5), Y)),
        (ValueError, r"logits has 4 rows for 4 labels.*2 \+ n batches", lambda: ak.atlas_loss(Z, Y)),
        (ValueError, r"logits has 12 rows for 4 labels.*local='none'.*2 batches \[x; x'\]", lambda: ak.atlas_loss(torch.randn(12, 5), Y, local="none")),
        (ValueError, r"logits has 8 rows for 4 labels.*1 batches \[x'\]", lambda: ak.atlas_loss(torch.randn(8, 5), Y, local="none", global_term="none")),
        (ValueError, "logits has 4 rows for 0 labels", lambda: ak.atlas_loss(Z, Y[:0])),
        (TypeError, "labels must be an integer tensor", lambda: ak.atlas_loss(torch.cat([Z, Z]), None)),
        (ValueError, "local must be one of .*did you mean 'kl'", lambda: ak.atlas_loss(Z, Y, local="kld")),
        (ValueError, "global_term must be one of .*got 'mse'", lambda: ak.atlas_loss(Z, Y, global_term="mse")),
        (ValueError, "global_weight must be a number >= 0", lambda: ak.atlas_loss(torch.cat([Z, Z]), Y, global_weight=-1)),
        (TypeError, "labels must be an integer tensor of class indices, got a NumPy array; torch.from_numpy", lambda: ak.cross_entropy(Z, Y.numpy())),
        (TypeError, "labels must be a strided tensor, got nested; call torch.nested.to_padded", lambda: ak.cross_entropy(Z, nested(Y))),
        (TypeError, "labels must be a strided tensor, got quantized; call .dequantize", lambda: ak.cross_entropy(Z, quantized(Y))),
        (TypeError, "labels must be a strided tensor, got layout torch.sparse_coo", lambda: ak.margin_loss(Z, Y.to_sparse())),
        (TypeError, "targets must be a strided tensor, got nested", lambda: ak.dlr_loss(Z, Y, targets=nested(T))),
        (TypeError, "weights must be a strided tensor, got nested", lambda: ak.cross_entropy(Z, Y, weights=nested(Z[:, 0]))),
        (TypeError, "logits must be a strided tensor, got nested", lambda: ak.cross_entropy(nested(Z), Y)),
        (TypeError, "adv_logits must be a strided tensor, got nested", lambda: ak.trades_loss(Z, nested(Z), Y)),
        (TypeError, "return_terms must be True or False, got 1", lambda: ak.atlas_loss(torch.cat([Z, Z]), Y, return_terms=1)),
        (TypeError, "beta must be a number or a tensor, got True", lambda: ak.trades_loss(Z, Z, Y, beta=True)),
        (ValueError, r"labels is torch.float32 \[4, 4\] on cpu, expected integers \[4\], or distributions \[4, 5\]", lambda: ak.cross_entropy(Z, Z[:, :4])),
        (ValueError, r"labels\[1, 2\] = -0.5 is no share of a class: give numbers >= 0", lambda: ak.cross_entropy(Z, shares(-0.5))),
        (ValueError, r"labels\[1, 2\] = nan is no share of a class", lambda: ak.consistency_loss(Z, Z, shares(NAN))),
        (ValueError, r"labels\[1, 2\] = inf is no share of a class", lambda: ak.consistency_loss(Z, Z, shares(float("inf")))),
        (ValueError, r"labels\[1, 2\] = 1e\+300 is no share of a class: .* finite in torch.float32", lambda: ak.cross_entropy(Z, shares(1e300, torch.float64))),
        (ValueError, r"labels is torch.float32 \[4, 5\] on meta", lambda: ak.cross_entropy(Z, shares(0.0).to("meta"))),
        (TypeError, "labels must be a strided tensor, got layout torch.sparse_coo", lambda: ak.cross_entropy(Z, shares(0.0).to_sparse())),
        (ValueError, r"labels is \[4, 5\] on cpu, expected \[4\]", lambda: ak.consistency_loss(Z, Z, torch.ones(4, 5).long())),
        (ValueError, r"other_logits has shape \[3, 5\], logits has \[4, 5\]", lambda: ak.consistency_loss(Z, Z[:3], Y)),
        (ValueError, "distance must be one of .*did you mean 'logit'", lambda: ak.consistency_loss(Z, Z, Y, distance="logits")),
        (ValueError, "weight must be a number >= 0, got -1.0", lambda: ak.consistency_loss(Z, Z, Y, weight=-1)),
        (ValueError, "weight must be a number >= 0, got -1.0", lambda: ak.consistency_loss(Z, Z, Y, weight=torch.tensor(-1.0))),
        (ValueError, "weight must be a number >= 0, got nan", lambda: ak.consistency_loss(Z, Z, Y, weight=torch.tensor(NAN))),
        (ValueError, r"weight = 1e\+300 does not fit torch.float32", lambda: ak.consistency_loss(Z, Z, Y, weight=HUGE[0])),
        (TypeError, r"weight must be a number or a float tensor \[\], got torch.float32 \[1\]", lambda: ak.consistency_loss(Z, Z, Y, weight=torch.ones(1))),
        (TypeError, r"weight must be a number or a float tensor \[\], got torch.int64 \[\]", lambda: ak.consistency_loss(Z, Z, Y, weight=torch.tensor(1))),
        (ValueError, r"weight is on meta, the logits on cpu: move it there, or pass float\(weight\)", lambda: ak.consistency_loss(Z, Z, Y, weight=torch.ones((), device="meta"))),
        (TypeError, "return_terms must be True or False, got 1", lambda: ak.consistency_loss(Z, Z, Y, return_terms=1)),
        (ValueError, "steps must be an integer of at least 2", lambda: ak.gairat_weights(Y, 1)),
        *((ValueError, "steps must be an integer of at most 2147483647", lambda steps=steps: ak.gairat_weights(Y, steps)) for steps in (2**31, 2**63, 2**70)),
        (TypeError, "steps must be an integer, got 10.0", lambda: ak.gairat_weights(Y, 10.0)),
        (TypeError, "kappa must be a strided tensor, got nested", lambda: ak.gairat_weights(nested(Y), 10)),
        (TypeError, "kappa must be a strided tensor, got nested", lambda: ak.attack_cotangent(Z, Y, kappa=nested(Y))),
        *((TypeError, f"{name} must be True or False, got 'no'", lambda name=name: ak.attack_cotangent(Z, Y, **{name: "no"})) for name in ("descend", "return_cotangent", "return_correct", "return_value")),
        (ValueError, "lam must be a number", lambda: ak.gairat_weights(Y, 10, float("-inf"))),
        (TypeError, "dtype must be torch.float32 or", lambda: ak.gairat_weights(Y, 10, dtype=torch.float16)),
        (TypeError, "kappa must be an integer tensor", lambda: ak.gairat_weights(Y.float(), 10)),
        (ValueError, r"kappa\[3\] = 3 is not in \[0, steps\] = \[0, 2\]", lambda: ak.gairat_weights(Y, 2)),
        (ValueError, "objective must be one of .*did you mean 'margin'", lambda: ak.attack_cotangent(Z, Y, objective="margins")),
        (ValueError, "labels is missing", lambda: ak.attack_cotangent(Z)),
        (ValueError, "labels is missing", lambda: ak.attack_cotangent(Z, objective="kl", reference=Z, kappa=Y.clone())),
        (ValueError, "reference is missing", lambda: ak.attack_cotangent(Z, Y, objective="kl")),
        (ValueError, 'reference plays no part in objective="ce"', lambda: ak.attack_cotangent(Z, Y, reference=Z)),
        (ValueError, r"reference has shape \[4, 4\], logits has", lambda: ak.attack_cotangent(Z, objective="kl", reference=Z[:, :4])),
        (ValueError, "targets and objective=\"dlr_targeted\" go together", lambda: ak.attack_cotangent(Z, Y, objective="dlr", targets=T)),
        (ValueError, "targets and objective=\"dlr_targeted\" go together", lambda: ak.attack_cotangent(Z, Y, objective="dlr_targeted")),
        (ValueError, "logits has 2 classes: the DLR", lambda: ak.attack_cotangent(Z[:, :2], Y % 2, objective="dlr")),
        (ValueError, r"labels\[3\] = 3 is not a class", lambda: ak.attack_cotangent(Z[:, :3], Y)),
        (TypeError, "kappa must be an int64 tensor, got torch.int32", lambda: ak.attack_cotangent(Z, Y, kappa=Y.int())),
        (ValueError, r"kappa is \[3\]", lambda: ak.attack_cotangent(Z, Y, kappa=Y[:3].clone())),
        (ValueError, "kappa is .* expected contiguous", lambda: ak.attack_cotangent(Z, Y, kappa=torch.zeros(8, dtype=torch.int64)[::2])),
    ],
)  # fmt: skip
def test_message_of_losses_and_objectives(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_nothing_is_counted_when_a_label_is_refused():
    kappa = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="not a class"):
        ak.attack_cotangent(Z, Y + 3, kappa=kappa)
    assert not kappa.any()


def test_overlap_is_refused_before_anything_is_written():
    memory = torch.rand(2 * ADV.numel())
    adv, shifted = memory[: ADV.numel()].view_as(ADV), memory[64 : 64 + ADV.numel()].view_as(ADV)
    before = memory.clone()
    with pytest.raises(ValueError, match="out shares memory with adv"):
        ak.pgd_step(adv, GRAD, X, 0.1, 0.1, out=shifted)
    with pytest.raises(ValueError, match="cast shares memory with adv"):
        ak.pgd_step(adv, GRAD, X, 0.1, 0.1, cast=adv)
    with pytest.raises(ValueError, match="out shares memory with adv"):
        ak.sample_neighbours(memory[: ADV.numel()].view_as(ADV), 0.1, 2, out=memory.view(8, 3, 8, 8))
    assert torch.equal(memory, before)


def test_result_does_not_share_memory_with_a_copied_input():
    """An expanded x is copied before the kernel sees it."""
    x = X[:, :1].expand_as(X)
    assert torch.equal(ak.pgd_step(ADV, GRAD, x, 0.1, 0.1), ak.pgd_step(ADV, GRAD, x.contiguous(), 0.1, 0.1))


def test_numpys_numbers_and_switches_are_taken():
    key, yes, one = torch.tensor([3, 4]), np.bool_(True), np.int64(1)
    assert torch.equal(both(one, include_x=yes, key=key, draw=np.uint8(2)), both(1, include_x=True, key=key, draw=2))
    assert torch.equal(step(eps=np.float32(0.1), descend=np.bool_(False)), step(eps=float(np.float32(0.1))))
    assert torch.equal(ak.gairat_weights(Y, np.int32(10)), ak.gairat_weights(Y, 10))
    assert ak.noise_key(base=np.int64(7))[1] == 7


def test_value_checks_can_be_switched_off(monkeypatch):
    monkeypatch.setenv("ATLAS_CHECKS", "0")
    ak.random_start(X, torch.full((4,), -0.1))
    monkeypatch.setenv("ATLAS_CHECKS", "yes")
    with pytest.raises(ValueError, match="ATLAS_CHECKS='yes' is unknown: choose from 0, 1"):
        ak.random_start(X, torch.full((4,), 0.1))


def test_backends_are_named_and_never_fall_back():
    with pytest.raises(ValueError, match="did you mean 'native'"), ak.backend("natve"):
        pass
    if unavailable_reason("triton", "cpu"):
        with pytest.raises(BackendUnavailable, match="the triton backend cannot run on cpu"), ak.backend("triton"):
            step()
    step()  # and the choice ended with the block


def test_other_devices_run_the_reference_with_a_warning():
    with pytest.warns(UserWarning, match="no kernels for device 'meta'"):
        assert step(*(t.to("meta") for t in (ADV, GRAD, X))).shape == ADV.shape
