"""The augmentation operator: the same bits on every backend, the usual pipeline's crops, fair draws, clear refusals."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import atlas_kernels as ak
from atlas_kernels import backends
from atlas_kernels.backends import BackendUnavailable, unavailable_reason
from atlas_kernels.backends.reference.augment import draw_windows
from atlas_kernels.core import available_isas, force_isa
from operator_cases import same_bits, to_layout

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
KEY = torch.tensor([-(2**61) - 987654321, 5])
OP = torch.ops.atlas_kernels.augment.default


def image_set(shape, *, channels_last=False, device="cpu", seed=0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return to_layout(torch.randint(0, 256, shape, dtype=torch.uint8, generator=g), channels_last).to(device)


def rows(count: int, batch: int, device="cpu") -> torch.Tensor:
    return torch.randint(0, count, (batch,), generator=torch.Generator().manual_seed(batch)).to(device)


def check_against_reference(images, index, **options):
    """Native against reference; the result, for more."""
    options = {"key": KEY.to(images.device), "draw": 7, **options}
    got = ak.augment(images, index, **options)
    with ak.backend("reference"):
        expected = ak.augment(images, index, **options)
    assert same_bits(got, expected) and got.stride() == expected.stride()
    return got


SHAPES = [(9, 3, 32, 32), (5, 1, 28, 28), (4, 5, 7, 9), (3, 3, 2, 3), (6, 4, 1, 1), (2, 2, 5, 40), (3, 17, 4, 4)]
NORMALISED = {"mean": 0.47, "std": 0.25}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_shapes_and_dtypes(shape, dtype, device):
    images, index = image_set(shape, device=device), rows(shape[0], 11, device)
    per_channel = {"mean": [0.1 + 0.01 * c for c in range(shape[1])], "std": torch.rand(shape[1], device=device) + 0.1}
    for options in ({}, {"mean": 0.3}, {"std": 0.3}, per_channel):
        check_against_reference(images, index, dtype=dtype, **options)


@pytest.mark.parametrize("layouts", list(itertools.product([False, True], repeat=2)), ids=str)
@pytest.mark.parametrize("shape", [(5, 3, 32, 32), (4, 5, 7, 9), (4, 3, 20, 5), (3, 1, 6, 6)], ids=str)
def test_bits_layouts(shape, layouts, device):
    images, index = image_set(shape, channels_last=layouts[0], device=device), rows(shape[0], 8, device)
    for dtype, options in itertools.product((torch.float32, torch.bfloat16), ({}, NORMALISED, {"flip": False})):
        got = check_against_reference(images, index, channels_last=layouts[1], dtype=dtype, **options)
        assert got.is_contiguous(memory_format=torch.channels_last if layouts[1] else torch.contiguous_format)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(
    ("padding", "crop"),
    [(0, None), (1, None), (12, None), (0, 5), (3, (13, 4)), (2, (1, 16)), (40, (89, 3)), (0, (9, 12))],
)
def test_bits_paddings_and_crops(padding, crop, flip, device):
    for channels_last in (False, True):
        images = image_set((6, 3, 9, 12), channels_last=channels_last, device=device)
        for out_last in (False, True):
            index = rows(6, 40, device)
            check_against_reference(images, index, padding=padding, crop=crop, flip=flip, channels_last=out_last)


def test_bits_of_large_images(device):
    """More than a block of rows, more than a block in one row, more channels than one block has."""
    for shape, crop in (((3, 3, 200, 150), (190, 140)), ((2, 1, 3, 5000), None), ((2, 3000, 2, 2), None)):
        for layouts in itertools.product([False, True], repeat=2):
            images = image_set(shape, channels_last=layouts[0], device=device)
            index = rows(shape[0], 3, device)
            for options in ({}, {**NORMALISED, "mean": torch.rand(shape[1], device=device), "dtype": torch.float64}):
                check_against_reference(images, index, crop=crop, channels_last=layouts[1], **options)


def test_bits_above_the_size_where_results_are_streamed():
    images = image_set((8, 3, 256, 256))
    check_against_reference(images, rows(8, 120))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("isa", ["baseline", "v3", "v4"])
def test_bits_of_each_isa_and_thread_count(isa, threads, restored_isa_and_threads):
    if isa not in available_isas():
        pytest.skip(f"this machine cannot run {isa}")
    force_isa(isa)
    torch.set_num_threads(threads)
    for layouts, dtype in itertools.product(itertools.product([False, True], repeat=2), FLOATS):
        images = image_set((30, 3, 33, 31), channels_last=layouts[0])
        check_against_reference(images, rows(30, 70), channels_last=layouts[1], dtype=dtype, std=[0.2, 0.3, 0.4])
        check_against_reference(images, rows(30, 70), channels_last=layouts[1], dtype=dtype)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_bits_of_anything(data):
    draw = data.draw
    shape = tuple(draw(st.integers(1, most)) for most in (4, 6, 20, 40))
    padding = draw(st.integers(0, 9))
    crop = tuple(draw(st.integers(1, side + 2 * padding)) for side in shape[2:])
    index = torch.tensor(draw(st.lists(st.integers(0, shape[0] - 1), max_size=6)), dtype=torch.int64)
    numbers = st.lists(st.integers(-(2**63), 2**63 - 1), min_size=len(index), max_size=len(index))
    check_against_reference(
        image_set(shape, channels_last=draw(st.booleans()), seed=draw(st.integers(0, 9))), index,
        padding=padding, crop=draw(st.sampled_from([crop, None])), flip=draw(st.booleans()),
        key=torch.tensor([draw(st.integers(-(2**63), 2**63 - 1)), 0]),
        ids=torch.tensor(draw(numbers), dtype=torch.int64) if draw(st.booleans()) else None,
        draw=draw(st.integers(0, 2**32 - 1)), dtype=draw(st.sampled_from(FLOATS)), channels_last=draw(st.booleans()),
        mean=draw(st.floats(-1, 1, width=32)), std=draw(st.floats(2**-7, 2, width=32)),
    )  # fmt: skip


def test_bytes_are_divided_exactly(device):
    """u / 255 and the normalisation, each rounded once: against fp64, which a single rounding to fp32 makes exact."""
    images = torch.arange(256, dtype=torch.uint8, device=device).view(1, 1, 16, 16)
    exact = torch.arange(256, dtype=torch.float64).view(1, 1, 16, 16) / 255
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    for dtype in FLOATS:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        got = ak.augment(images, zero, padding=0, flip=False, dtype=dtype)
        assert same_bits(got.cpu(), exact.to(wide).to(dtype))
        got = ak.augment(images, zero, padding=0, flip=False, dtype=dtype, mean=0.4914, std=0.2471)
        mean, std = (torch.tensor(v, dtype=wide) for v in (0.4914, 0.2471))
        assert same_bits(got.cpu(), ((exact.to(wide) - mean) / std).to(dtype))


@pytest.mark.parametrize(("padding", "crop"), [(4, None), (0, (5, 8)), (3, (14, 2))])
def test_samples_are_the_usual_crops(padding, crop, device):
    """Against pad, slice and flip of one sample after the other; the draws alone are the reference's."""
    images = image_set((10, 3, 8, 9), device=device)
    height, width = crop or (8, 9)
    index = rows(10, 64, device)
    positions = 8 + 2 * padding - height + 1, 9 + 2 * padding - width + 1
    got = ak.augment(images, index, padding=padding, crop=crop, key=KEY.to(device), draw=3, mean=0.5, std=0.25)
    draws = [t.tolist() for t in draw_windows(index.cpu(), KEY, 3, positions)]
    assert len(set(draws[2])) == 2
    for sample, row, top, left, mirrored in zip(got, index, *draws, strict=True):
        one = F.pad(images[row], (padding,) * 4)[:, top : top + height, left : left + width]
        expected = ((one.flip(2) if mirrored else one).float() / torch.tensor(255.0, device=device) - 0.5) / 0.25
        assert torch.equal(sample, expected)


def placed(count: int, device, **options) -> torch.Tensor:
    """(top, left, mirrored) that ``count`` samples got, read off images that tell: padding 2, crops of 4 x 4."""
    images = torch.arange(1, 17, dtype=torch.uint8, device=device).view(1, 1, 4, 4)
    index = torch.zeros(count, dtype=torch.int64, device=device)
    ids = torch.arange(count, device=device)
    x = ak.augment(images, index, padding=2, ids=ids, **options)
    u = (x * 255).round().long().view(count, 4, 4)
    i, j = torch.meshgrid(torch.arange(4, device=device), torch.arange(4, device=device), indexing="ij")
    seen = u.flatten(1).argmax(1)  # the image's last covered pixel
    value = u.flatten(1).amax(1) - 1
    mirrored = (u[:, :, 1:] != 0) & (u[:, :, :-1] > u[:, :, 1:])
    mirrored = mirrored.flatten(1).any(1)
    column = torch.where(mirrored, 3 - seen % 4, seen % 4)
    return torch.stack([value // 4 - seen // 4 + 2, value % 4 - column + 2, mirrored.long()])


def test_draws_are_fair(device):
    count = 50_000
    top, left, mirrored = placed(count, device, key=KEY.to(device))
    cells = torch.bincount((top * 5 + left) * 2 + mirrored, minlength=50)
    assert len(cells) == 50
    expected = count / 50
    chi_squared = float(((cells - expected) ** 2 / expected).sum())
    assert chi_squared < 49 + 5 * (2 * 49) ** 0.5  # five standard deviations
    assert abs(mirrored.double().mean() - 0.5) < 5 * 0.5 / count**0.5
    assert not placed(1000, device, key=KEY.to(device), flip=False)[2].any()


def test_permuted_and_split_batches_draw_the_same(device):
    images, key = image_set((50, 3, 8, 8), device=device), KEY.to(device)
    index = torch.randperm(50, generator=torch.Generator().manual_seed(1)).to(device)
    whole = ak.augment(images, index, key=key, draw=2)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(2)).to(device)
    assert torch.equal(ak.augment(images, index[order], key=key, draw=2), whole[order])
    parts = [ak.augment(images, part, key=key, draw=2) for part in index.split(17)]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(ak.augment(images, index, key=key, ids=index, draw=2), whole)
    assert torch.equal(ak.augment(images, index, key=key + torch.tensor([0, 1], device=device), draw=2), whole)


def test_everything_that_should_matter_matters(device):
    images = image_set((1, 1, 12, 12), device=device)
    index, key = torch.zeros(64, dtype=torch.int64, device=device), KEY.to(device)
    ids = torch.arange(64, device=device)
    base = ak.augment(images, index, key=key, ids=ids)
    for other in ({"ids": ids + 64}, {"draw": 1}, {"key": key ^ torch.tensor([1 << 40, 0], device=device)}):
        assert not torch.equal(base, ak.augment(images, index, **{"key": key, "ids": ids, **other}))
    assert len(ak.augment(images, index, key=key, ids=index).unique(dim=0)) == 1  # one number, one crop
    torch.manual_seed(3)
    first, second = ak.augment(images, index, ids=ids), ak.augment(images, index, ids=ids)
    torch.manual_seed(3)
    assert torch.equal(first, ak.augment(images, index, ids=ids)) and not torch.equal(first, second)


def test_nothing_is_drawn_where_there_is_no_choice(device):
    images, index = image_set((6, 3, 8, 9), device=device), rows(6, 10, device)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    got = ak.augment(images, index, padding=0, flip=False)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(got, images[index].float() / torch.tensor(255.0, device=device))
    padded = ak.augment(images, index, padding=2, crop=(12, 13), flip=False)
    assert torch.equal(padded, F.pad(got, (2,) * 4))


def test_out_and_forms_of_the_arguments(device):
    images, index, key = image_set((6, 3, 8, 8), device=device), rows(6, 10, device), KEY.to(device)
    expected = ak.augment(images, index, key=key, crop=6)
    for like in (False, True):
        out = to_layout(torch.empty_like(expected), like)
        version = out._version
        assert ak.augment(images, index, key=key, crop=(6, 6), out=out) is out
        assert same_bits(out, expected) and out._version > version
    assert same_bits(ak.augment(images, index.repeat_interleave(2)[::2], key=key, crop=6), expected)
    grey = images[:, 0].contiguous()
    assert same_bits(ak.augment(grey, index, key=key), ak.augment(grey[:, None], index, key=key))
    shifted = torch.empty(expected.numel() + 1, device=device)[1:].view_as(expected)  # not on 16 bytes
    assert same_bits(ak.augment(images, index, key=key, crop=6, out=shifted), expected)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rows_outside_the_set_become_nan_unchecked(dtype, device, monkeypatch):
    monkeypatch.setenv("ATLAS_CHECKS", "0")
    images = image_set((4, 3, 8, 8), device=device)
    index = torch.tensor([0, -1, 3, 4, 2**62, -(2**63)], device=device)
    for options in ({}, {"mean": 0.5, "std": 0.1}, {"channels_last": True}):
        got = check_against_reference(images, index, dtype=dtype, **options)
        assert got[[1, 3, 4, 5]].isnan().all() and not got[[0, 2]].isnan().any()
        assert check_against_reference(images[:0], index[:2], dtype=dtype, **options).isnan().all()


def test_empty_batch_and_empty_images(device):
    images, none = image_set((4, 3, 8, 8), device=device), torch.empty(0, dtype=torch.int64, device=device)
    assert ak.augment(images, none, crop=5).shape == (0, 3, 5, 5)
    assert ak.augment(images[:0], none).shape == (0, 3, 8, 8)
    assert ak.augment(images[:, :0], rows(4, 5, device)).shape == (5, 0, 8, 8)
    no_rows = check_against_reference(images[:, :, :0], rows(4, 5, device), crop=(3, 3))
    assert no_rows.shape == (5, 3, 3, 3) and not no_rows.any()


@pytest.mark.parametrize(
    ("error", "message", "changed"),
    [
        (TypeError, "images must be a uint8 tensor, got torch.float32", {"images": torch.rand(4, 3, 8, 8)}),
        (TypeError, "images must be a uint8 tensor, got list", {"images": [1]}),
        (ValueError, r"images has shape \[8, 8\], expected", {"images": torch.zeros(8, 8, dtype=torch.uint8)}),
        (ValueError, "images has strides .*contiguous", {"images": image_set((4, 3, 8, 16))[..., ::2]}),
        (TypeError, r"index must be an int64 tensor \[B\] of rows, got torch.int32", {"index": torch.zeros(2).int()}),
        (TypeError, r"got torch.int64 \[1, 2\]", {"index": torch.zeros(1, 2, dtype=torch.int64)}),
        (TypeError, "got list", {"index": [0]}),
        (
            ValueError,
            "index is on meta, the images on cpu",
            {"index": torch.zeros(2, dtype=torch.int64, device="meta")},
        ),
        (ValueError, r"index\[1\] = 4 is no row of the 4 images", {"index": torch.tensor([3, 4, -1])}),
        (ValueError, r"index\[2\] = -1 is no row", {"index": torch.tensor([0, 3, -1])}),
        (TypeError, "images must be .*, got a NumPy array; torch.from_numpy", {"images": torch.zeros(2, 2, 2).numpy()}),
        (TypeError, "index must be .*, got a NumPy array; torch.from_numpy", {"index": torch.tensor([1]).numpy()}),
        (ValueError, r"images has shape \[4, 8, 8, 3\].*permute\(0, 3, 1, 2\)", {"images": image_set((4, 8, 8, 3))}),
        (ValueError, r"\[4, 28, 28, 1\], which looks like \[N, H, W, C\]", {"images": image_set((4, 28, 28, 1))}),
        (TypeError, "flip must be True or False, got 'no'", {"flip": "no"}),
        (TypeError, "channels_last must be True or False, got 1", {"channels_last": 1}),
        (TypeError, "draw must be an integer, got None", {"draw": None}),
        (TypeError, "draw must be an integer, got 1.5", {"draw": 1.5, "padding": 0, "flip": False}),
        (TypeError, "padding must be an integer, got True", {"padding": True}),
        (TypeError, r"crop must be an integer, got a tensor \[3\]", {"crop": torch.tensor([2, 2, 2])}),
        (TypeError, "crop must be an integer, got '8'", {"crop": (8, "8")}),
        (TypeError, "std must be a number or a tensor, got the string '1'", {"std": "1"}),
        (TypeError, "mean must hold numbers", {"mean": ["a", "b", "c"]}),
        (TypeError, "ids must be an int64 tensor .2., got int", {"ids": 3}),
        (ValueError, "padding must be an integer", {"padding": -1}),
        (TypeError, "padding must be an integer", {"padding": 1.0}),
        (ValueError, r"crop \[17, 8\] is larger than the padded image \[16, 16\]", {"crop": (17, 8)}),
        (ValueError, r"crop \[8, 17\] is larger", {"crop": (8, 17)}),
        (ValueError, "crop must be an integer of at least 1, got 0", {"crop": 0}),
        (ValueError, "crop must be one or two integers", {"crop": (8, 8, 8)}),
        (ValueError, "mean has 2 values, expected one number, or one per channel", {"mean": [0.5, 0.5]}),
        (ValueError, "std has 4 values", {"std": torch.ones(4)}),
        (ValueError, "std must be positive in every channel, got 0.0", {"std": 0.0}),
        (ValueError, "std must be positive in every channel, got", {"std": [0.5, -0.5, 0.5]}),
        (ValueError, r"std\[1\] = nan is not a number", {"std": torch.tensor([0.5, float("nan"), 0.5])}),
        (ValueError, "std must be positive", {"std": 1e-60}),
        (ValueError, "key must be the int64", {"key": torch.zeros(2)}),
        (ValueError, r"ids is torch.int64 \[3\]", {"ids": torch.arange(3)}),
        (ValueError, "draw must be an integer of at most 4294967295", {"draw": 2**32}),
        (TypeError, "dtype must be one of", {"dtype": torch.int32}),
        (ValueError, r"out has shape \[2, 3, 8, 9\], expected \[2, 3, 8, 8\]", {"out": torch.empty(2, 3, 8, 9)}),
        (TypeError, "out is torch.float64, expected torch.float32", {"out": torch.empty(2, 3, 8, 8).double()}),
        (TypeError, "out must be a float tensor", {"out": torch.empty(2, 3, 8, 8, dtype=torch.uint8)}),
        (ValueError, "out has strides", {"out": torch.empty(1, 3, 8, 8).expand(2, 3, 8, 8)}),
    ],
)
def test_bad_input(error, message, changed):
    arguments = {"images": image_set((4, 3, 8, 8)), "index": torch.tensor([1, 2]), **changed}
    with pytest.raises(error, match=message):
        ak.augment(arguments.pop("images"), arguments.pop("index"), **arguments)


def test_overlap_is_refused_before_anything_is_written():
    memory = image_set((8 * 3 * 8 * 8 * 4,))
    images = memory[: 4 * 3 * 8 * 8].view(4, 3, 8, 8)
    out = memory[512 : 512 + 2 * 3 * 8 * 8 * 4].view(torch.float32).view(2, 3, 8, 8)
    before = memory.clone()
    with pytest.raises(ValueError, match="out shares memory with images"):
        ak.augment(images, torch.tensor([1, 2]), out=out)
    assert torch.equal(memory, before)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_nothing_wrong_passes_the_door(data):
    """One argument of a valid call is spoilt: the operator itself, called past the public checks, must refuse."""
    args = dict(images=image_set((4, 3, 8, 8)), index=torch.tensor([1, 2]), padding=4, flip=True, mean=0.0,
                mean_rows=torch.rand(3), std=1.0, std_rows=torch.ones(3), key=KEY, ids=torch.arange(2), draw=0,
                out=torch.empty(2, 3, 8, 8))  # fmt: skip
    OP(*args.values())
    name = data.draw(st.sampled_from([n for n, a in args.items() if isinstance(a, torch.Tensor)]))
    good = args[name]
    spoilt = {
        "dtype": lambda: good.to(torch.complex64),
        "16 bits": lambda: good.to(torch.int16),
        "rows": lambda: good[:-1] if name != "images" else good[:, :-1],
        "more rows": lambda: torch.cat([good, good], int(name == "images")),
        "strides": lambda: torch.stack([good, good], -1)[..., 0],
        "one value": lambda: good.flatten()[:1].expand(good.shape),
        "device": lambda: good.to("meta"),
        "flat": lambda: good.flatten()[:, None, None],
    }
    args[name] = spoilt[data.draw(st.sampled_from(sorted(spoilt.keys() - ({"flat"} if good.ndim == 1 else set()))))]()
    out = args["out"]
    if name != "out":
        out[:] = 7.0
    with pytest.raises((ValueError, RuntimeError, NotImplementedError)):
        OP(*args.values())
    assert name == "out" or bool((out == 7.0).all())


def test_sizes_that_cannot_be_are_refused_by_the_operator():
    images, out = image_set((4, 3, 8, 8)), torch.empty(1, 3, 20, 8)
    index = torch.tensor([1])
    for padding, key in ((4, KEY), (-1, KEY), (2**62, KEY), (6, None)):
        with pytest.raises(RuntimeError, match="impossible size|noise needs a key"):
            OP(images, index, padding, True, 0.0, None, 1.0, None, key, None, 0, out)


def test_a_backend_without_kernels_says_so(monkeypatch):
    images, index = image_set((4, 3, 8, 8)), torch.tensor([1])
    with pytest.raises(BackendUnavailable, match="triton backend has no augment kernels"), ak.backend("triton"):
        ak.augment(images, index)
    monkeypatch.setattr(backends, "default_for", lambda _: "triton")
    with pytest.warns(UserWarning, match="no augment kernels for device 'cuda'"):
        assert backends._choose(None, "augment", "cuda").__name__.endswith("backends.reference")


@pytest.mark.gpu
@pytest.mark.skipif(unavailable_reason("native", "cuda") is not None, reason="no CUDA device, or no CUDA library")
def test_cpu_and_cuda_draw_the_same():
    images, index = image_set((40, 3, 32, 32)), rows(40, 100)
    for channels_last in (False, True):
        on_cpu = ak.augment(images, index, key=KEY, channels_last=channels_last)
        on_cuda = ak.augment(images.cuda(), index.cuda(), key=KEY.cuda(), channels_last=channels_last)
        assert same_bits(on_cuda.cpu(), on_cpu)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype, device):
    images, index = image_set((4, 3, 8, 8), device=device), torch.tensor([1, 2], device=device)
    out = torch.empty(2, 3, 8, 8, dtype=dtype, device=device)
    std = torch.ones(3, dtype=dtype, device=device)
    torch.library.opcheck(OP, (images, index, 4, True, 0.5, None, 1.0, std, KEY.to(device), index, 3, out))
    torch.library.opcheck(OP, (images, index, 0, False, 0.0, None, 1.0, None, None, None, 0, out))


def test_compile_fullgraph(device):
    images, index, key = image_set((6, 3, 8, 8), device=device), rows(6, 10, device), KEY.to(device)

    def batches(images, index, key):
        plain = ak.augment(images, index, key=key, draw=1)
        return plain * 2, ak.augment(images, index, key=key, crop=6, std=[0.5, 0.4, 0.3], dtype=torch.bfloat16)

    compiled = torch.compile(batches, fullgraph=True)
    for a, b in zip(compiled(images, index, key), batches(images, index, key), strict=True):
        assert same_bits(a, b)
    fresh = torch.compile(lambda: ak.augment(images, index, channels_last=True), fullgraph=True)
    assert not torch.equal(fresh(), fresh())
