"""A recorded call: new inputs and weights count, what Python computed does not, and what cannot be recorded says so."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from atlas_kernels.capture import Capture, CaptureFailed, capturing, cuda_graph
from fake_graph import recorded


@pytest.fixture
def recorder(device: torch.device):
    """What records on this device: the real thing where there is one."""
    return cuda_graph if device.type == "cuda" else recorded


@pytest.fixture
def net(device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)
    return nn.Sequential(*layers).to(device)


class Pulled(NamedTuple):
    logits: Tensor
    grad: Tensor
    nothing: None = None


def pull(net: nn.Module, x: Tensor) -> Pulled:
    leaf = x.detach().requires_grad_()
    logits = net(leaf)
    return Pulled(logits, torch.autograd.grad(logits.square().sum(), leaf)[0])


def images(device: torch.device, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
    return torch.rand(2, 3, 8, 8, device=device).contiguous(memory_format=layout)


def same(got: Pulled, wanted: Pulled) -> None:
    assert torch.equal(got.logits, wanted.logits) and torch.equal(got.grad, wanted.grad) and got.nothing is None
    assert got.grad.stride() == wanted.grad.stride() and not got.logits.requires_grad


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("inference", [False, True])
def test_replays_are_the_call_for_new_inputs_and_weights(net, device, recorder, layout, inference) -> None:
    net.eval()
    capture = Capture(lambda x: pull(net, x), [images(device, layout)], recorder=recorder)
    assert capture._outputs.logits.grad_fn is None
    for _ in range(2):
        x = images(device, layout)
        with torch.inference_mode(inference):
            got = capture(x)
        same(got, pull(net, x))
        assert not got.logits.is_inference()
        with torch.no_grad():
            net[0].weight.mul_(1.1)


def test_outputs_are_the_callers_own(net, device, recorder) -> None:
    capture = Capture(lambda x: (x, {"twice": x * 2, "n": 3}), [images(device)], recorder=recorder)
    first, second = images(device), images(device)
    kept, _ = capture(first), capture(second)
    assert torch.equal(kept[0], first) and torch.equal(kept[1]["twice"], first * 2) and kept[1]["n"] == 3
    kept[0].zero_()
    assert torch.equal(capture(second)[0], second)


def test_two_that_share_memory_do_not_disturb_each_other(net, device, recorder) -> None:
    net.eval()
    one = Capture(lambda x: pull(net, x), [images(device)], recorder=recorder)
    other = Capture(lambda x: pull(net, x.tanh()), [images(device)], share=one, recorder=recorder)
    x = images(device)
    for _ in range(2):
        same(one(x), pull(net, x))
        same(other(x), pull(net, x.tanh()))


def test_weights_are_cast_by_the_graph_and_not_before_or_for_others(net, device, recorder) -> None:
    net.eval()
    x = images(device)
    with torch.autocast(device.type, torch.bfloat16):
        net(x)  # now autocast holds 16-bit weights
        capture = Capture(lambda x: pull(net, x), [x], recorder=recorder)
        assert net(x).isfinite().all()
        same(capture(x), pull(net, x))
    with torch.no_grad():
        net[0].weight.mul_(2)
    got = capture(x)
    with torch.autocast(device.type, torch.bfloat16):
        same(got, pull(net, x))


def test_python_is_frozen(device, recorder) -> None:
    factor = [2.0]
    capture = Capture(lambda x: x * factor[0], [torch.ones(2, device=device)], recorder=recorder)
    factor[0] = 3.0
    assert capture(torch.ones(2, device=device)).tolist() == [2.0, 2.0]


def test_the_runs_before_leave_no_trace(net, device, recorder) -> None:
    buffers = [b.clone() for b in net.buffers()]
    drawn, x = nn.Dropout(0.5), images(device)
    before = torch.random.get_rng_state(), torch.cuda.get_rng_state() if device.type == "cuda" else None
    capture = Capture(lambda x: drawn(net(x)), [x], restore=net.buffers(), recorder=recorder, warmup=3)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert before[1] is None or torch.equal(torch.cuda.get_rng_state(), before[1])
    assert all(torch.equal(b, was) for b, was in zip(net.buffers(), buffers, strict=True))
    masks = [capture(x) == 0 for _ in range(2)]
    assert net[1].num_batches_tracked == 2, "and every replay moves the statistics once"
    assert not torch.equal(*masks), "and draws anew"


def test_runs_and_recordings_under_the_same_rules(device, recorder) -> None:
    seen = []
    Capture(lambda x: seen.append(capturing(x.is_cuda)) or x + 1, [images(device)], warmup=3, recorder=recorder)
    assert seen == [False, False, True, True] and not capturing(device.type == "cuda")


@pytest.mark.parametrize(
    "call",
    [
        lambda x: x * x.sum().item(),
        lambda x: x if x.sum() > 0 else -x,
        lambda x: x[x > 0.5],
        lambda x: x.flatten().nonzero(),
        lambda x: x + torch.tensor([1.0], device=x.device),
    ],
    ids=["item", "branch", "mask", "nonzero", "constant"],
)
def test_what_a_graph_forbids_is_said_and_the_device_goes_on(device, recorder, call) -> None:
    with pytest.raises(CaptureFailed, match="no CUDA graph.*\\.item\\(\\)"):
        Capture(call, [images(device)], recorder=recorder)
    assert not capturing(device.type == "cuda")
    assert torch.rand(3, device=device).sum().item() > 0
    capture = Capture(lambda x: x + 1, [images(device)], recorder=recorder)
    assert torch.equal(capture(torch.zeros(2, 3, 8, 8, device=device)), torch.ones(2, 3, 8, 8, device=device))


def test_errors_of_an_ordinary_run_are_the_calls_own(net, device, recorder) -> None:
    with pytest.raises(RuntimeError) as raised:
        Capture(lambda x: net(x[:, :2]), [images(device)], recorder=recorder)
    assert not isinstance(raised.value, CaptureFailed)


def test_other_inputs_are_refused(device, recorder) -> None:
    capture = Capture(lambda x: x + 1, [images(device)], recorder=recorder)
    for other in (images(device)[:1], images(device).double()):
        with pytest.raises(ValueError, match="input 0 is .*make another Capture"):
            capture(other)
    with pytest.raises(ValueError, match="warmup"):
        Capture(lambda x: x, [images(device)], warmup=0, recorder=recorder)
