"""The noise contract: Random123's known answers, and independence from everything that must not matter."""

from __future__ import annotations

import pytest
import torch

import atlas_kernels as ak
from atlas_kernels.backends.reference.philox import noise, philox4x32_10, uniform
from operator_cases import same_bits

# Random123's kat_vectors for philox4x32 with 10 rounds: counter, key, result.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_philox_known_answers(counter, key, result):
    words = philox4x32_10(tuple(torch.tensor(c) for c in counter), *(torch.tensor(k) for k in key))
    assert tuple(int(w) for w in words) == result


def test_uniform_map_is_exact_and_half_open():
    words = torch.tensor([0, 1 << 8, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
    assert uniform(words, torch.float32).tolist() == [0.0, 2.0**-23, 1 - 2.0**-23, -1.0, -(2.0**-23)]


def kernel_noise(shape, key, **how):
    """The noise itself: a start around 0 of radius 1, not clipped."""
    zero = torch.zeros(shape, device=key.device)
    return ak.random_start(zero, 1.0, key=key, clip_min=-2.0, clip_max=2.0, **how)


def test_kernel_noise_is_the_documented_counter(device):
    key = torch.tensor([0x123456789ABCDEF0, 41], device=device)
    got = kernel_noise((3, 2, 5, 3), key, draw=7)
    sample, channel, pixel = 2, 1, 13
    c0 = channel * 4 + pixel // 4  # 15 pixels are 4 groups
    words = philox4x32_10(
        tuple(torch.tensor(c) for c in (c0, 41 + sample, 7, 0)), torch.tensor(0x9ABCDEF0), torch.tensor(0x12345678)
    )
    assert got[sample, channel].flatten()[pixel] == uniform(words[pixel % 4], torch.float32)


def test_moments(device):
    u = kernel_noise((64, 3, 32, 32), ak.noise_key(device, generator=torch.Generator(device).manual_seed(3)))
    count = u.numel()
    assert abs(u.mean()) < 5 / (3 * count) ** 0.5  # five standard errors
    assert abs((u * u).mean() - 1 / 3) < 5 * (4 / 45 / count) ** 0.5
    assert u.min() >= -1 and u.max() < 1


def test_seed_rules_the_key(device):
    torch.manual_seed(5)
    first, second = ak.noise_key(device), ak.noise_key(device)
    torch.manual_seed(5)
    assert torch.equal(first, ak.noise_key(device)) and not torch.equal(first, second)
    assert first.dtype == torch.int64 and first.shape == (2,) and first[1] == 0
    assert ak.noise_key(device, base=9)[1] == 9


def test_every_word_of_the_counter_matters(device):
    key = ak.noise_key(device)
    base = kernel_noise((2, 1, 4, 4), key)
    other_seed = torch.stack((key[0] ^ (1 << 40), key[1]))
    x = torch.full((2, 1, 4, 4), 0.5, device=device)
    assert not torch.equal(base, kernel_noise((2, 1, 4, 4), other_seed))
    assert not torch.equal(base, kernel_noise((2, 1, 4, 4), key, draw=1))
    assert not torch.equal(base[0], base[1])
    one, two = ak.sample_neighbours(x, 0.1, 2, key=key).chunk(2)
    assert not torch.equal(one, two)
    assert not torch.equal(one, ak.random_start(x, 0.1, key=key))


def test_batch_split_permutation_and_ids(device):
    shape, key = (6, 3, 5, 5), torch.tensor([77, 100], device=device)
    whole = kernel_noise(shape, key)
    halves = [kernel_noise((3, 3, 5, 5), torch.tensor([77, 100 + start], device=device)) for start in (0, 3)]
    assert torch.equal(whole, torch.cat(halves))
    order = torch.tensor([5, 2, 0], device=device)
    assert torch.equal(whole[order], kernel_noise((3, 3, 5, 5), key, ids=100 + order))


def test_memory_format_does_not_matter(device):
    x = torch.rand(3, 3, 6, 7, device=device)
    key = ak.noise_key(device)
    plain = ak.random_start(x, 0.1, key=key)
    last = ak.random_start(x.contiguous(memory_format=torch.channels_last), 0.1, key=key)
    assert last.is_contiguous(memory_format=torch.channels_last) and same_bits(plain, last)


def test_step_neighbours_draws_what_sample_neighbours_draws(device):
    x, key = torch.rand(4, 3, 9, 9, device=device), ak.noise_key(device)
    grad = torch.randn_like(x)
    batch = ak.pgd_step_neighbours(x, grad, x, 0.1, 0.05, 0.02, 3, key=key, draw=4)
    adv = ak.pgd_step(x, grad, x, 0.1, 0.05)
    assert same_bits(batch, torch.cat([x, adv, ak.sample_neighbours(adv, 0.02, 3, key=key, draw=4)]))


@pytest.mark.parametrize("base", [2**32 - 1, 2**63 - 1, -1])
def test_sample_numbers_wrap_at_32_bits(device, base):
    shape = (2, 1, 3, 3)
    far = torch.tensor([1, base], device=device)
    expected = noise((2, 1, 9), far, None, 0, 0, 0, torch.float32).view(shape)
    assert torch.equal(kernel_noise(shape, far), expected)
    assert torch.equal(expected[1], kernel_noise(shape, torch.tensor([1, 0], device=device))[0])
    last = ak.random_start(torch.zeros(shape, device=device), 1.0, norm="l2", key=far, clip_min=-2.0)[1]
    first = ak.random_start(
        torch.zeros(shape, device=device), 1.0, norm="l2", key=torch.tensor([1, 0], device=device), clip_min=-2.0
    )[0]
    assert torch.equal(last, first)
