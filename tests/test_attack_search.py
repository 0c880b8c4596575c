"""What ``Search`` gives to attacks that keep a state per sample, and the pool that drives it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from atlas_kernels import Execution, noise_key
from atlas_kernels.attacks import Batch, Search, row_noise
from atlas_kernels.attacks.pool import Pool, State
from atlas_kernels.backends.reference.philox import philox4x32_10
from atlas_kernels.layout import column
from test_attack_contract import Net, Snapshot
from test_attacks import CLASSES, Log, Rowwise, images

EPS = 0.05


@dataclass(frozen=True)
class Climb(Search):
    """Signed steps along the gradient from a corner of the ball, shorter with every one; the start fools at times."""

    def begin(self, model: nn.Module, batch: Batch, draw: Tensor) -> State:
        at = batch.inside(batch.x + batch.eps * row_noise.signs(batch, draw, 0, batch.x.shape[1:]))
        objective, fooled = batch.goal.judge(batch.goal.predict(model, at))
        return {"adv": at, "at": at, "fooled": fooled, "objective": objective, "number": torch.zeros_like(draw)}

    def advance(self, model: nn.Module, batch: Batch, state: State) -> State:
        _, grad = batch.goal.gradient(model, state["at"], sized=False)
        at = batch.step(state["at"], grad, batch.eps / (1.0 + state["number"]))
        objective, fooled = batch.goal.judge(batch.goal.predict(model, at))
        better = fooled | (objective > state["objective"])
        return {
            "adv": torch.where(column(better, at), at, state["adv"]),
            "at": at,
            "fooled": state["fooled"] | fooled,
            "objective": torch.where(better, objective, state["objective"]),
            "number": state["number"] + 1,
        }


@pytest.fixture
def case(device: torch.device) -> tuple[Rowwise, Tensor, Tensor]:
    """Labels as the model has them, but for one."""
    model = Rowwise().to(device)
    x = images(40).to(device)
    y = model(x).argmax(1)
    y[2] = (y[2] + 1) % CLASSES
    return model, x, y


def key_of(device: torch.device) -> Tensor:
    return noise_key(device, generator=torch.Generator(device).manual_seed(5))


def test_what_it_finds_is_so(case, device) -> None:
    model, x, y = case
    log = Log(model)
    found = Climb(EPS, steps=5, restarts=2).run(model, x, y, key=key_of(device))
    assert 5 < found.fooled.sum() < 35
    assert torch.equal(found.fooled, model(found.adv).argmax(1) != y)
    assert (found.adv - x).abs().max() <= EPS + 1e-12
    assert torch.equal(found.adv[2], x[2])  # wrong as it is
    assert len(log.inputs[0]) == 40 and len(log.inputs[1]) == 39
    assert min(len(seen) for seen in log.inputs) < 39  # who is fooled leaves
    assert (found.objective[~found.fooled] > -torch.inf).all()


def test_strongest_point_of_all_rounds_is_kept(case, device) -> None:
    model, x, y = case
    key = key_of(device)
    one, both = (Climb(0.01, steps=3, restarts=n).run(model, x, y, key=key) for n in (1, 2))
    assert (one.fooled <= both.fooled).all()
    standing = ~both.fooled
    better = both.objective[standing] > one.objective[standing]
    assert (both.objective[standing] >= one.objective[standing]).all()
    assert 0 < better.sum() < len(better)
    same = (both.adv[standing] == one.adv[standing]).flatten(1).all(1)
    assert torch.equal(same, ~better)


@pytest.mark.parametrize(("size", "every"), [(1, 1), (7, 3), (16, 1), (1000, 3)])
def test_neither_places_nor_neighbours_nor_looks_count(case, device, size: int, every: int) -> None:
    model, x, y = case
    search, key = Climb(EPS, steps=5, restarts=3), key_of(device)
    whole = search.run(model, x, y, key=key)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0)).to(device)
    ids = torch.arange(40, device=device)
    pool = search.pool(model, search.batch(x[order], y[order], key=key, ids=ids[order]), size)
    pool.every = every
    while pool.turn(model):
        assert len(pool.rows) <= size
    assert torch.equal(pool.fooled, whole.fooled[order])
    assert torch.equal(pool.adv, whole.adv[order])
    assert torch.equal(pool.objective, whole.objective[order])


def test_places_are_taken_again(case, device) -> None:
    model, x, y = case
    log = Log(model)
    pool = Climb(EPS, steps=6).pool(model, Climb(EPS).batch(x, y, key=key_of(device)), 16)
    log.inputs.clear()
    begun = []
    while pool.turn(model):
        begun.append(len(set(pool.numbers)) > 1)
    assert any(begun)  # samples at different iterations beside each other
    assert sum(len(seen) > 13 for seen in log.inputs) > len(log.inputs) / 2


def test_what_is_not_confirmed_goes_on(case, device) -> None:
    model, x, y = case
    search = Climb(EPS, steps=4, restarts=2)
    asked: list[int] = []

    def never(batch: Batch, adv: Tensor) -> tuple[Tensor, Tensor]:
        assert (model(adv).argmax(1) != batch.goal.labels).all()
        asked.extend(batch.ids.tolist())
        return adv, torch.zeros(len(adv), dtype=torch.bool, device=device)

    made = search.pool(model, search.batch(x, y, key=key_of(device)), 16)
    pool = Pool(search, made.batch, 16, made.fooled, confirm=never)
    pool.run(model)
    assert pool.fooled.nonzero()[:, 0].tolist() == [2]
    assert max(asked.count(row) for row in asked) > 2
    assert not pool.waiting and not pool.rows


def test_the_strongest_point_is_asked_about_and_kept_as_confirmed(case, device) -> None:
    model, x, y = case
    search = Climb(1e-4, steps=2)  # too small to fool anyone
    made = search.pool(model, search.batch(x, y, key=key_of(device)), 16)

    def as_zeros(batch: Batch, adv: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(adv), batch.ids % 2 == 0

    for doubtful in (False, True):
        pool = Pool(search, made.batch, 16, made.fooled, confirm=as_zeros, doubtful=doubtful)
        pool.run(model)
        even = torch.arange(40, device=device) % 2 == 0
        assert torch.equal(pool.fooled, even if doubtful else made.fooled)
        zeros = (pool.adv == 0).flatten(1).all(1)
        assert torch.equal(zeros, even & ~made.fooled if doubtful else torch.zeros_like(even))


def test_a_pool_goes_on_from_what_was_saved(case, device) -> None:
    model, x, y = case
    search, key = Climb(EPS, steps=5, restarts=2), key_of(device)
    whole = search.run(model, x, y, key=key, batch_size=16)
    pool = search.pool(model, search.batch(x, y, key=key), 16)
    went_on = 0
    while pool.turn(model):
        left = pool.left()
        saved, pool = pool.saved(), search.pool(model, search.batch(x, y, key=key), 16)
        assert pool.left() != left
        pool.restore(saved)
        assert pool.left() == left > 0 or not pool.rows
        went_on += bool(pool.rows) and bool(pool.waiting)
    assert went_on > 5
    assert torch.equal(pool.fooled, whole.fooled)
    assert torch.equal(pool.adv[pool.fooled], whole.adv[whole.fooled])


def test_it_leaves_no_trace_and_says_that_there_is_no_graph(device) -> None:
    torch.manual_seed(0)
    model = Net().to(device).train()
    x = torch.rand(6, 3, 4, 4, device=device)
    y = torch.arange(6, device=device) % 5
    before = Snapshot(model)
    key = key_of(device)
    first = Climb(EPS, steps=3)(model, x, y, key=key)
    before.check()
    with pytest.warns(UserWarning, match="samples come and go"), Execution(cuda_graphs=True):
        assert torch.equal(Climb(EPS, steps=3)(model, x, y, key=key), first)
    assert Climb(EPS)(model, x[:0], y[:0]).shape == (0, 3, 4, 4)


def test_radii_and_ids_per_sample(case, device) -> None:
    model, x, y = case
    eps = torch.linspace(0.01, 0.1, 40, dtype=x.dtype, device=device)
    search, key = replace(Climb(EPS, steps=3), eps=eps), key_of(device)

    class Wide(Climb):
        def begin(self, model: nn.Module, batch: Batch, draw: Tensor) -> State:
            return Climb.begin(self, model, replace(batch, eps=column(batch.eps, batch.x)), draw)

    with pytest.raises(ValueError, match="eps"):
        search.run(model, x[:39], y[:39])
    found = Wide(eps, steps=3).run(model, x, y, key=key, batch_size=7)
    assert ((found.adv - x).abs().flatten(1).amax(1) <= eps + 1e-12).all()


@pytest.mark.parametrize(
    "arguments, told",
    [
        ({"steps": 0}, "steps"),
        ({"restarts": 0}, "restarts"),
        ({"norm": "l7"}, "norm"),
        ({"eps": 8.0}, "8/255"),
        ({"eps": -0.1}, "eps"),
    ],
)
def test_bad_settings(arguments: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Climb(**{"eps": EPS, **arguments})


def test_bad_calls(case, device) -> None:
    model, x, y = case
    with pytest.raises(ValueError, match="divided by 255"):
        Climb(EPS)(model, x * 255, y)
    with pytest.raises(ValueError, match=r"y\[0\] = 4 is not a class"):
        Climb(EPS)(model, x, torch.full_like(y, 4))
    with pytest.raises(ValueError, match="batch_size"):
        Climb(EPS)(model, x, y, batch_size=0)
    with pytest.raises(ValueError, match="key and generator"):
        Climb(EPS)(model, x, y, key=key_of(device), generator=torch.Generator(device))
    with pytest.raises(NotImplementedError, match=r"begin\(model, batch, draw\)"):
        Search(EPS)(model, x, y)


def noise_batch(device: torch.device, rows: int = 2000) -> Batch:
    return Climb(EPS).batch(torch.rand(rows, 4, device=device), torch.zeros(rows, dtype=torch.int64, device=device),
                            key=key_of(device))  # fmt: skip


def test_row_noise_is_the_documented_counter(device) -> None:
    batch = replace(noise_batch(device, 3), ids=torch.tensor([7, 2**32 + 8, 9], device=device))
    draw, number = torch.tensor([0, 1, 5], device=device), torch.tensor([3, 2, 1], device=device)
    got = row_noise.words(batch, draw, number, (2, 5)).cpu()
    seed = int(batch.key[0])
    for row, sample in enumerate((7, 8, 9)):
        for place in range(10):
            counter = (place // 4, sample, int(draw[row]), 4 | int(number[row]) << 8)
            four = philox4x32_10(
                tuple(torch.tensor(c) for c in counter),
                torch.tensor(seed % 2**32),
                torch.tensor(seed >> 32),
            )
            assert got[row].flatten()[place] == four[place % 4]


def test_row_noise_has_its_distribution(device) -> None:
    batch = noise_batch(device)
    u = row_noise.uniform(batch, 0, 1, (50,)).double()
    assert u.shape == (2000, 50) and u.min() >= 0 and u.max() < 1
    assert abs(u.mean() - 0.5) < 5 * (1 / 12 / u.numel()) ** 0.5
    s = row_noise.signs(batch, 0, 2, (50,))
    assert set(s.unique().tolist()) == {-1.0, 1.0} and abs(s.mean()) < 5 / s.numel() ** 0.5
    z = row_noise.normal(batch, 0, 3, (50,)).double()
    assert abs(z.mean()) < 5 / z.numel() ** 0.5 and abs(z.var() - 1) < 5 * (2 / z.numel()) ** 0.5
    bound = torch.tensor([3, 30], device=device).repeat(1000)[:, None]
    i = row_noise.integers(batch, 1, 4, (50,), bound)
    assert (i < bound).all() and i.min() == 0
    for least in (3, 30):
        counts = torch.bincount(i[bound[:, 0] == least].flatten()).double()
        share = 1 / least
        assert len(counts) == least
        assert (counts / 50_000 - share).abs().max() < 5 * (share * (1 - share) / 50_000) ** 0.5
