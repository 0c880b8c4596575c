"""Everything that ``Attack`` gives to an attack: tested with the one of docs/attacks.md and with MI-FGSM."""

from __future__ import annotations

import re
from dataclasses import KW_ONLY, dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from atlas_kernels import Execution, noise_key, pgd_step
from atlas_kernels.attacks import MIFGSM, PGD, Attack, Batch, attacking, leave_no_trace
from atlas_kernels.attacks.graphs import Graphs
from atlas_kernels.attacks.objective import Objective
from fake_graph import recorded
from test_attack_contract import Snapshot
from test_attack_graphs import Net
from test_attacks import CLASSES, Log, Rowwise

EPS = 0.05
PAGE = Path(__file__).resolve().parents[1] / "docs" / "attacks.md"
DEFINITION, CALLS, SEARCH = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
NAMES: dict[str, Any] = {"__name__": "page"}
exec(compile(DEFINITION, "docs/attacks.md", "exec", dont_inherit=True), NAMES)
ATTACKS = {"page": NAMES["AdamPGD"](EPS, steps=4), "mifgsm": MIFGSM(EPS, steps=4, random_start=True)}


@pytest.fixture(params=ATTACKS)
def attack(request: pytest.FixtureRequest) -> Attack:
    return ATTACKS[request.param]


@pytest.fixture
def case(device: torch.device) -> tuple[Rowwise, Tensor, Tensor]:
    """Labels as the model has them, but for one."""
    model = Rowwise().to(device)
    x = torch.rand(8, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(device)
    y = model(x).argmax(1)
    y[2] = (y[2] + 1) % CLASSES
    return model, x, y


def test_the_search_of_the_page(case, tmp_path: Path) -> None:
    model, x, y = case
    names = {"__name__": "page", "model": model.eval(), "x": x, "y": y, "state_path": tmp_path / "state.pt"}
    exec(compile(SEARCH, "docs/attacks.md", "exec", dont_inherit=True), names)
    assert torch.equal(names["found"].fooled, model(names["found"].adv).argmax(1) != y)
    assert names["result"].correct.sum() <= 7 and (tmp_path / "state.pt").exists()


def test_the_calls_of_the_page(case) -> None:
    model, x, y = case
    names = {**NAMES, "model": model, "x": x, "y": y}
    exec(compile(CALLS, "docs/attacks.md", "exec"), names)
    assert torch.equal(names["again"].adv, names["found"].adv)
    assert (names["adv"] - x).abs().max() <= 8 / 255 + 1e-12


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_it_climbs_and_stays_in_ball_and_range(attack: Attack, case, norm: str) -> None:
    model, x, y = case
    eps = torch.linspace(0.02, 0.4, len(x), dtype=x.dtype, device=x.device)
    for targeted in (False, True):
        goal = Objective(y, targeted=targeted)
        made = replace(attack, eps=eps, step_size=eps / 2, norm=norm, targeted=targeted)
        adv = made(model, x, y)
        way = (adv - x).flatten(1)
        assert ((way.abs().amax(1) if norm == "linf" else way.norm(dim=1)) <= eps + 1e-12).all()
        assert adv.min() >= 0 and adv.max() <= 1
        assert (goal.judge(model(adv))[0] > goal.judge(model(x))[0]).all()


def test_key_and_ids_repeat_it_in_any_batch(attack: Attack, case) -> None:
    model, x, y = case
    ids, order = torch.randperm(100, device=x.device)[: len(x)], torch.randperm(len(x), device=x.device)
    found = attack.run(model, x, y, ids=ids)
    again = attack(model, x[order], y[order], ids=ids[order], key=found.key)
    assert torch.equal(again, found.adv[order]) and not torch.equal(attack(model, x, y), found.adv)


def test_samples_that_are_done_are_left_out_and_the_others_go_on_as_without(attack: Attack, case) -> None:
    """What the step carries goes with its rows."""
    model, x, y = case
    key, log = noise_key(x.device), Log(model)
    wanted = attack(model, x, y, key=key)
    iterates = torch.stack(log.inputs)
    log.inputs.clear()
    adv = replace(attack, compact=True)(model, x, y, key=key)
    sizes = [len(batch) for batch in log.inputs]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[1] > 0 and sizes[0] == len(x)
    for row in range(len(x)):
        wrong = [i for i, iterate in enumerate(iterates) if model(iterate[row : row + 1]).argmax(1) != y[row]]
        assert torch.equal(adv[row], iterates[wrong[0]][row] if wrong else wanted[row])


def test_restarts_begin_anew_and_the_best_is_kept(attack: Attack, case) -> None:
    model, x, y = case
    key = noise_key(x.device)
    last, best = (replace(attack, keep=keep).run(model, x, y, key=key) for keep in ("last", "best"))
    three = replace(attack, restarts=3).run(model, x, y, key=key)
    goal = Objective(y)
    one = goal.judge(model(last.adv))
    assert (best.objective >= one[0]).all() and ((three.objective >= one[0]) | (three.fooled & ~one[1])).all()
    assert torch.equal(three.adv, replace(attack, restarts=3)(model, x, y, key=key))


def test_it_leaves_no_trace_and_runs_as_the_execution_says(attack: Attack, device: torch.device) -> None:
    torch.manual_seed(0)
    net, dtypes = Net(dropout=0.5).to(device), []
    x, y = torch.rand(4, 3, 8, 8, device=device), torch.randint(5, (4,), device=device)
    net.conv.register_forward_hook(lambda module, args, out: dtypes.append(out.dtype))
    before, state = Snapshot(net), torch.get_rng_state()
    with Execution("bf16"), torch.no_grad():
        adv = replace(attack, attack_mode="train")(net, x, y, key=noise_key(device, generator=torch.Generator(device)))
    before.check()
    assert torch.equal(torch.get_rng_state(), state)
    assert dtypes == [torch.bfloat16] * 4 and adv.dtype == torch.float32 and not adv.requires_grad


def test_it_is_recorded_as_a_graph(attack: Attack, device: torch.device) -> None:
    torch.manual_seed(0)
    net, execution = Net().to(device), Execution(cuda_graphs=True)
    if device.type == "cpu":
        execution.graphs = Graphs(recorded, "cpu")
    for _ in range(3):
        x, y, key = torch.rand(4, 3, 8, 8, device=device), torch.randint(5, (4,), device=device), noise_key(device)
        with execution:
            got = attack(net, x, y, key=key)
        assert torch.equal(got, attack(net, x, y, key=key))
    assert execution.graphs is not None and execution.graphs.recordings == 1
    with execution:  # fields of its own make another attack
        own = [f.name for f in fields(attack)[len(fields(Attack)) :] if isinstance(getattr(attack, f.name), float)]
        other = replace(attack, **{name: getattr(attack, name) / 4 for name in own})
        assert torch.equal(other(net, x, y, key=key), other(net, x, y, key=key))
    assert execution.graphs.recordings == 2 and not torch.equal(other(net, x, y, key=key), got)


@dataclass
class Weighted(Objective):
    """Cross-entropy by a weight of each sample's."""

    weights: Tensor | None = None

    def cotangent(self, logits: Tensor) -> Tensor:
        assert self.weights is not None
        return self.weights[:, None] * super().cotangent(logits)


def test_tensors_of_an_objective_of_ones_own_are_inputs_of_the_graph(device: torch.device) -> None:
    torch.manual_seed(0)
    net, execution, attack = Net().to(device), Execution(cuda_graphs=True), ATTACKS["page"]
    if device.type == "cpu":
        execution.graphs = Graphs(recorded, "cpu")
    x, y, key = torch.rand(4, 3, 8, 8, device=device), torch.randint(5, (4,), device=device), noise_key(device)
    for weights in torch.tensor([[1.0, -1.0, 1.0, 0.0], [-1.0, 1.0, 0.0, 1.0]], device=device):

        def batch() -> Batch:
            return replace(attack.batch(x, y, key=key), goal=Weighted(y, weights=weights))  # noqa: B023

        wanted = attack.on(net, batch()).adv
        with execution:
            assert torch.equal(attack.on(net, batch()).adv, wanted)
        still = weights == 0
        assert torch.equal(wanted[still], attack.batch(x, y, key=key).start(0)[still])
    assert execution.graphs is not None and execution.graphs.recordings == 1


def test_an_attack_without_a_step_says_so(case) -> None:
    with pytest.raises(NotImplementedError, match="Attack has no step"):
        Attack(EPS)(*case)


def test_leave_no_trace_knows_no_execution_and_attacking_does(device: torch.device) -> None:
    net, x = nn.Conv2d(3, 4, 3).to(device), torch.rand(2, 3, 8, 8, device=device)
    with Execution("bf16"):
        with leave_no_trace(net, "eval", None):
            assert net(x).dtype == torch.float32
        with attacking(net, "eval", None):
            assert net(x).dtype == torch.bfloat16 and not net.weight.requires_grad


class Square(Objective):
    """The sum of squared logits."""

    def cotangent(self, logits: Tensor) -> Tensor:
        return 2 * logits


def test_an_objective_of_ones_own_sees_the_logits_as_they_are(device: torch.device) -> None:
    """Where the label's is far above all others, too, which cross-entropy does with less of."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Flatten(), nn.Linear(48, 5)).to(device), torch.rand(4, 3, 4, 4, device=device)
    with torch.no_grad():
        net[1].weight.mul_(1000)
    attack, leaf = PGD(EPS, EPS, steps=1, random_start=False), x.clone().requires_grad_()
    logits = net(leaf)
    assert (logits.topk(2).values[:, 0] - logits.topk(2).values[:, 1]).max() > 40
    (grad,) = torch.autograd.grad(logits.square().sum(), leaf)
    adv = attack.on(net, replace(attack.batch(x, logits.argmax(1)), goal=Square(logits.argmax(1)))).adv
    assert torch.equal(adv, pgd_step(x, grad, x, EPS, EPS))


@dataclass(frozen=True)
class Made(Attack):
    """Its steps give what ``make`` makes of the iterate."""

    _: KW_ONLY
    make: Any = None

    def step(self, batch: Batch, adv: Tensor, grad: Tensor, carried: Any, left: float) -> tuple[Tensor, Any]:
        return self.make(adv)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda adv: adv, r"Made.step must give \(iterate, carried\), a tuple of two, got a tensor"),
        (lambda adv: None, "a tuple of two, got None"),
        (lambda adv: (None, adv), "Made.step must give a tensor as iterate, got NoneType"),
        (lambda adv: (adv[:1], None), r"Made.step gave an iterate \[1, 3, 4, 4\] .*, expected \[2, 3, 4, 4\]"),
        (lambda adv: (adv.half(), None), "of torch.float16, expected .* of torch.float64, as batch.x"),
    ],
)
def test_a_step_that_gives_no_iterate_is_refused(case, make: Any, message: str) -> None:
    """A batch of two tensors would pass for a tuple of two."""
    model, x, y = case
    with pytest.raises((TypeError, ValueError), match=message):
        Made(EPS, steps=1, make=make)(model, x[:2], y[:2])


def test_a_start_that_is_no_iterate_is_refused(case) -> None:
    class Flat(Made):
        def start(self, batch: Batch, draw: int) -> Tensor:
            return batch.x.flatten(1)

    with pytest.raises(ValueError, match=r"Flat.start gave an iterate \[8, 48\]"):
        Flat(EPS, steps=0)(*case)


def test_adversaries_have_no_graph_whatever_a_step_does(case) -> None:
    model, x, y = case
    adv = Made(EPS, steps=2, make=lambda adv: (adv.clone().requires_grad_() * 1, None))(model, x, y)
    assert not adv.requires_grad


def test_a_field_that_may_change_unseen_is_in_no_graph(case, device: torch.device) -> None:
    model, x, y = case
    execution = Execution(cuda_graphs=True)
    if device.type == "cpu":
        execution.graphs = Graphs(recorded, "cpu")

    @dataclass(frozen=True)
    class Listed(PGD):
        _: KW_ONLY
        weights: Any = ()

    with execution, pytest.warns(UserWarning, match="must not change unseen .*'list'.*: give a tuple"):
        assert len(Listed(EPS, weights=[1.0, 2.0])(model, x, y)) == len(x)
    with execution:
        Listed(EPS, weights=(1.0, 2.0))(model, x, y)
    assert execution.graphs is not None and execution.graphs.recordings == 1
