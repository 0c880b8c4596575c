"""An attack by a graph is the attack: for whatever batch, key and weights, and it says so where there is no graph."""

from __future__ import annotations

import gc
import sys
import threading
import warnings
import weakref
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from atlas_kernels import FGSM, PGD, Execution, backend, noise_key
from atlas_kernels.attacks import graphs
from atlas_kernels.attacks.graphs import Graphs
from atlas_kernels.capture import Capture, cuda_graph
from atlas_kernels.compat.trades import trades_loss
from fake_graph import recorded

EPS, B = 8 / 255, 4


class Net(nn.Module):
    """Small, with all that makes it hard: BatchNorm, dropout, a layer that can look at values."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4 * 36, 5)
        self.dropout, self.looks = dropout, False

    def forward(self, x: Tensor) -> Tensor:
        z = torch.relu(self.norm(self.conv(x)))
        if self.looks and z.mean().item() < 0:
            z = -z
        return self.head(nn.functional.dropout(z.flatten(1), self.dropout, self.training))


@pytest.fixture
def net(device: torch.device) -> Net:
    torch.manual_seed(0)
    net = Net().to(device)
    with torch.no_grad():
        net(torch.rand(8, 3, 8, 8, device=device))  # running statistics worth the name
    return net


@pytest.fixture
def execution(device: torch.device) -> Execution:
    """Graphs on this device: real ones where there is one."""
    made = Execution(cuda_graphs=True)
    if device.type == "cpu":
        made.graphs = Graphs(recorded, "cpu")
    return made


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="cuda_graphs")
        yield


def case(device: torch.device, batch: int = B) -> tuple[Tensor, Tensor]:
    return torch.rand(batch, 3, 8, 8, device=device), torch.randint(5, (batch,), device=device)


def equal(got, wanted) -> bool:
    assert type(got) is type(wanted)
    return all(
        a is None and b is None or (torch.equal(a, b) and a.stride() == b.stride())
        for a, b in zip(got, wanted, strict=True)
    )


ATTACKS = {
    "ce": PGD(EPS, steps=3),
    "fgsm": FGSM(EPS),
    "start only": PGD(EPS, steps=0),
    "margin, l2": PGD(0.5, steps=2, norm="l2", objective="margin"),
    "dlr, l1": PGD(4.0, steps=2, norm="l1", objective="dlr"),
    "targeted": PGD(EPS, steps=2, targeted=True, objective="dlr"),
    "kl": PGD(EPS, steps=2, objective="kl"),
    "restarts": PGD(EPS, steps=2, restarts=3),
    "best": PGD(EPS, steps=2, keep="best", objective="margin"),
    "kappa": PGD(EPS, steps=3, count_correct=True),
    "train": PGD(EPS, steps=2, attack_mode="train"),
    "buffers move": PGD(EPS, steps=2, attack_mode="train", update_buffers=True),
    "range per channel": PGD(EPS, steps=2, clip_min=(0.0, 0.1, 0.2), clip_max=[1.0, 0.9, 1.0]),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_replays_are_the_attack(net, device, execution, name) -> None:
    attack = ATTACKS[name]
    for _ in range(3):
        x, y = case(device)
        x = x.clamp(0.2, 0.9)
        key, before = noise_key(device), {k: v.clone() for k, v in net.state_dict().items()}
        wanted = attack.run(net, x, y, key=key)
        moved = {k: v.clone() for k, v in net.state_dict().items()}
        net.load_state_dict(before)
        with execution:
            got = attack.run(net, x, y, key=key)
        assert equal(got, wanted)
        assert all(torch.equal(v, moved[k]) for k, v in net.state_dict().items())
        assert net.training and all(p.requires_grad and p.grad is None for p in net.parameters())
    assert execution.graphs.recordings == 1


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_compiled_network(net, device, execution, mode) -> None:
    """Compiled once, in the run before the recording; its weights are cast anew at every replay."""
    torch._dynamo.reset()
    execution.precision = "bf16"
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    network = torch.compile(net, backend=backend, dynamic=False)
    attack, eager = PGD(EPS, steps=2, attack_mode=mode), Execution("bf16")
    before, made = counters["stats"]["unique_graphs"], []
    for _ in range(4):
        x, y = case(device)
        key = noise_key(device)
        with execution:
            got = attack.run(network, x, y, key=key)
        made.append(counters["stats"]["unique_graphs"] - before)
        with eager:
            assert equal(got, attack.run(network, x, y, key=key))
        with torch.no_grad():
            for weight in net.parameters():
                weight.mul_(0.9)
    assert made == [1] * 4 and execution.graphs.recordings == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_last_gradient_too(net, device, execution, layout) -> None:
    net.to(memory_format=layout)
    attack = PGD(EPS, steps=2, attack_mode="train")
    for _ in range(2):
        x, y = case(device)
        x, key = x.contiguous(memory_format=layout), noise_key(device)
        with execution:
            got = attack.last_gradient(net, x, y, key=key)
        assert equal(got, attack.last_gradient(net, x, y, key=key))
    with execution:
        attack.run(net, x, y)
    assert execution.graphs.recordings == 2


def test_everything_given_is_an_input(net, device, execution) -> None:
    """Radii, steps, start, ids and logits of the call at hand count, not those of the recording."""
    for _ in range(3):
        x, y = case(device)
        options = {
            "start": (x + 0.01 * torch.randn_like(x)).clamp(0, 1),
            "reference_logits": torch.randn(B, 5, device=device),
            "ids": torch.randint(1000, (B,), device=device),
            "key": noise_key(device),
        }
        attack = PGD(torch.rand(B, device=device) * 0.1, torch.rand(B, device=device) * 0.05, 2, objective="kl")
        for given in (options, {k: v for k, v in options.items() if k != "start"}):
            with execution:
                got = attack.run(net, x, None, **given)
            assert equal(got, attack.run(net, x, None, **given))
    assert execution.graphs.recordings == 2


def test_noise_is_fresh_unless_a_key_is_given(net, device, execution) -> None:
    (x, y), attack = case(device), PGD(EPS, steps=1)
    with execution:
        first, second = attack.run(net, x, y), attack.run(net, x, y)
        assert not torch.equal(first.key, second.key) and not torch.equal(first.adv, second.adv)
        assert torch.equal(attack(net, x, y, key=first.key), first.adv)
        generator = torch.Generator(device).manual_seed(3)
        drawn = attack(net, x, y, generator=generator)
        assert torch.equal(drawn, attack(net, x, y, generator=generator.manual_seed(3)))


def test_a_result_is_not_overwritten_by_the_next(net, device, execution) -> None:
    attack = PGD(EPS, steps=1, restarts=2)
    with execution:
        first = attack.run(net, *case(device))
        kept = [t.clone() for t in first[:4]]
        attack.run(net, *case(device))
    assert all(torch.equal(a, b) for a, b in zip(first[:4], kept, strict=True))


def test_weights_moved_in_place_are_seen_and_replaced_ones_are_recorded_anew(net, device, execution) -> None:
    (x, y), attack = case(device), PGD(EPS, steps=2)
    optimizer = torch.optim.SGD(net.parameters(), 0.5)

    def check(recordings: int) -> None:
        key = noise_key(device)
        with execution:
            got = attack(net, x, y, key=key)
        assert torch.equal(got, attack(net, x, y, key=key))
        assert execution.graphs.recordings == recordings

    check(1)
    nn.functional.cross_entropy(net(x), y).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    check(1)
    net.load_state_dict({k: torch.randn_like(v) if v.ndim else v for k, v in net.state_dict().items()}, assign=True)
    net.norm.running_var.abs_()
    check(2)
    net.norm.running_mean = torch.randn(4, device=device)
    check(3)
    held = [t.data for t in net.state_dict().values()]  # so that the new ones lie elsewhere
    net.to(torch.float64).to(torch.float32)
    check(4)
    del held
    net.head = nn.Linear(4 * 36, 7, device=device)
    check(5)
    check(5)


def test_another_kind_is_recorded_and_the_first_is_still_there(net, device, execution) -> None:
    attack = PGD(EPS, steps=1)
    count = 0
    for batch in (B, 3, B, 3):
        x, y = case(device, batch)
        key = noise_key(device)
        with execution:
            got = attack(net, x, y, key=key)
        assert torch.equal(got, attack(net, x, y, key=key))
    assert execution.graphs.recordings == 2
    x, y = case(device)
    with execution:
        for other, options in [
            (replace(attack, eps=0.1), {}),
            (replace(attack, attack_mode="keep"), {}),
            (attack, {"ids": torch.arange(B, device=device)}),
        ]:
            count += 1
            for _ in range(2):
                other(net, x, y, **options)
            assert execution.graphs.recordings == 2 + count
        net.norm.eval()
        replace(attack, attack_mode="keep")(net, x, y)
        attack(net, x, y)
        assert execution.graphs.recordings == 6
        with torch.autocast(device.type, torch.bfloat16):
            attack(net, x, y)
        with backend("reference"):
            attack(net, x, y)
        execution.precision = "bf16"
        attack(net, x, y)
        attack(net, x.to(memory_format=torch.channels_last), y)
        assert execution.graphs.recordings == 10


def test_precision_is_part_of_the_graph(net, device, execution) -> None:
    execution.precision = "bf16"
    (x, y), key, attack = case(device), noise_key(device), PGD(EPS, steps=2)
    for _ in range(2):
        with execution:
            got = attack(net, x, y, key=key)
        with Execution("bf16"):
            assert torch.equal(got, attack(net, x, y, key=key))
        assert not torch.equal(got, attack(net, x, y, key=key))
        with torch.no_grad():
            net.conv.weight.mul_(1.5)


@pytest.mark.parametrize("wrong", ["label", "image", "width"])
def test_values_are_checked_at_every_call(net, device, execution, wrong) -> None:
    attack = PGD(EPS, steps=1)
    with execution:
        for _ in range(2):  # before there is a graph, and after
            x, y = case(device)
            if wrong == "label":
                y[1] = 5
            elif wrong == "image":
                x[1, 2] = 1.5
            else:
                x = torch.rand(B, 4, 8, 8, device=device)
            with pytest.raises((ValueError, RuntimeError), match=r"y\[1\] = 5|outside|channels"):
                attack(net, x, y)
            attack(net, *case(device))


def test_dropout_draws_anew_and_training_draws_what_it_would(device, execution) -> None:
    torch.manual_seed(0)
    net, (x, y), attack = Net(dropout=0.5).to(device), case(device), PGD(EPS, steps=1, attack_mode="train")
    with execution:
        attack(net, x, y)
        key = noise_key(device)
        one, other = attack(net, x, y, key=key), attack(net, x, y, key=key)
    assert not torch.equal(one, other), "the key repeats the noise, not the masks"
    assert (one - x).abs().max() <= EPS + 1e-6
    eval_attack = PGD(EPS, steps=1)
    torch.manual_seed(1)
    with execution:
        eval_attack(net, x, y, key=key)
    after = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(3)), "recording it has drawn nothing"


def test_drop_ins_and_empty_batches(net, device, execution) -> None:
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    with execution:
        for _ in range(2):
            trades_loss(net, *case(device), optimizer, perturb_steps=2)
        assert PGD(EPS)(net, *case(device, 0)).shape == (0, 3, 8, 8)
    assert execution.graphs.recordings == 1


def test_an_attack_within_a_larger_graph_is_part_of_it(net, device, execution) -> None:
    attack, recorder = PGD(EPS, steps=2), cuda_graph if device.type == "cuda" else recorded
    with execution:
        whole = Capture(lambda x, y, key: attack(net, x, y, key=key), [*case(device), noise_key(device)], warmup=1,
                        recorder=recorder)  # fmt: skip
    x, y = case(device)
    key = noise_key(device)
    assert torch.equal(whole(x, y, key), attack(net, x, y, key=key))
    assert execution.graphs.recordings == 0


def refused(execution: Execution, attack: PGD, model, device: torch.device, why: str) -> None:
    """Runs, is right, and says why it is no graph, once."""
    key = noise_key(device)
    for i in range(2):
        x, y = case(device)
        with execution, warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            got = attack(model, x, y, key=key)
        assert torch.equal(got, attack(model, x, y, key=key))
        assert [(why in str(w.message), w.filename) for w in told] == [(True, __file__)] * (i == 0)


def test_what_has_no_graph_says_why_once(net, device, execution) -> None:
    refused(execution, PGD(EPS, steps=2, compact=True), net, device, "compact=True waits")
    function = net.eval().forward
    refused(execution, PGD(EPS, steps=2, attack_mode="keep"), function, device, "pass the torch.nn.Module itself")
    assert execution.graphs.recordings == 0
    handle = net.conv.register_forward_hook(lambda *_: None)
    refused(execution, PGD(EPS, steps=2), net, device, "hooks")
    handle.remove()
    net.looks = True
    refused(execution, PGD(EPS, steps=2), net, device, "no .item()")
    assert execution.graphs.recordings == 1
    other = Net().to(device)
    other.norm.momentum = None  # whose forward asks how many batches there were
    refused(execution, PGD(EPS, steps=2, attack_mode="train"), other, device, "no .item()")


def test_on_a_cpu_it_says_that_it_needs_cuda() -> None:
    refused(Execution(cuda_graphs=True), PGD(EPS, steps=1), Net(), torch.device("cpu"), "CUDA device")


def test_the_last_used_graphs_are_kept(net, device, execution, monkeypatch) -> None:
    monkeypatch.setattr(graphs, "LIMIT", 2)
    monkeypatch.setattr(graphs, "CALLS_PER_RECORDING", 1)
    x, y = case(device)
    with execution:
        for eps in (0.1, 0.2, 0.1, 0.3, 0.1):  # at 0.3, 0.2 has to go
            PGD(eps, steps=1)(net, x, y)
        assert len(execution.graphs._models[net].kinds) == 2 and execution.graphs.recordings == 3
        PGD(0.2, steps=1)(net, x, y)
    assert execution.graphs.recordings == 4


def test_recordings_are_rationed(device, execution, monkeypatch) -> None:
    """Models made anew for every attack, say: a recording each would cost more than it brings."""
    monkeypatch.setattr(graphs, "LIMIT", 2)
    x, y = case(device)
    nets = [Net().to(device) for _ in range(3)]
    with execution:
        for i, net in enumerate(nets):
            if i == 2:
                with pytest.warns(UserWarning, match="not seen before"):
                    PGD(EPS, steps=1)(net, x, y)
            elif i < 2:
                PGD(EPS, steps=1)(net, x, y)
        PGD(0.1, steps=1)(nets[2], x, y)  # said once
        for _ in range(12):
            PGD(EPS, steps=1)(nets[0], x, y)
        assert execution.graphs.recordings == 2
        PGD(EPS, steps=1)(nets[2], x, y)
    assert execution.graphs.recordings == 3, "there have been calls enough for one more"


def test_graphs_go_with_the_model_and_with_the_execution(device, execution) -> None:
    net = Net().to(device)
    with execution:
        PGD(EPS, steps=1)(net, *case(device))
    (graph,) = execution.graphs._models[net].kinds.values()
    held, model = weakref.ref(graph.capture), weakref.ref(net)
    del graph, net
    gc.collect()
    assert model() is None and held() is None and not execution.graphs._models


def test_threads_take_turns_with_a_graph(net, device, execution) -> None:
    """It has its inputs and outputs once."""
    cases = [(*case(device), noise_key(device)) for _ in range(4)]
    attack, found = PGD(EPS, steps=2), {}
    with execution:
        wanted = [attack(net, x, y, key=key) for x, y, key in cases]

    def run(number: int) -> None:
        x, y, key = cases[number]
        with execution:
            found[number] = [attack(net, x, y, key=key) for _ in range(5)]

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert all(torch.equal(adv, wanted[number]) for number in range(4) for adv in found[number])
