"""Counter-based streams: known answers, an independent implementation, the right distributions, and draws that do not depend on each other."""

import hashlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from icl import rng

ONES = 0xFFFFFFFF
WORDS = st.integers(0, ONES)
KEY = rng.stream(0, "test")


def whole(*numbers):
    return torch.tensor(numbers, dtype=torch.int64)


def normals(key=KEY, *, steps=(0,), num=1, size=1):
    return rng.normal(key, whole(*steps), torch.arange(num), size)


def philox_by_hand(counter, key):
    """Compute Philox in integers of any size, from Salmon et al. 2011, section 3.3."""
    c, (k0, k1) = list(counter), key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [high1 ^ c[1] ^ k0, low1, high0 ^ c[3] ^ k1, low0]
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return tuple(c)


def normals_by_hand(seed, name, step, index, size):
    """Apply the Box-Muller transform to pairs of words of the counter (block, index, step low, step high)."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    key = (int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little"))
    out = []
    for block in range(math.ceil(size / 4)):
        words = philox_by_hand((block, index, step % 2**32, step >> 32), key)
        for first, second in (words[:2], words[2:]):
            radius = math.sqrt(-2 * math.log((first + 0.5) / 2**32))
            angle = 2 * math.pi * second / 2**32
            out += [radius * math.cos(angle), radius * math.sin(angle)]
    return np.array(out[:size])


def call_philox(counter, key):
    return tuple(int(word) for word in rng.philox(rng.Stream(*key), tuple(whole(word) for word in counter)))


# Philox4x32-10


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter, key, answer):
    assert call_philox(counter, key) == answer


@given(counter=st.tuples(WORDS, WORDS, WORDS, WORDS), key=st.tuples(WORDS, WORDS))
def test_philox_agrees_with_unbounded_integers(counter, key):
    assert call_philox(counter, key) == philox_by_hand(counter, key)


@given(
    seed=st.integers(0, 2**63 - 1),
    step=st.integers(0, 2**62),
    index=st.integers(0, ONES),
    size=st.integers(1, 11),
)
def test_normals_agree_with_a_transcription_of_the_counter_layout(seed, step, index, size):
    ours = rng.normal(rng.stream(seed, "some/name"), whole(step), whole(index), size)[0, 0].numpy()
    np.testing.assert_array_max_ulp(
        ours, normals_by_hand(seed, "some/name", step, index, size).astype(np.float32), maxulp=1
    )


@given(step=st.integers(0, 2**62), index=st.integers(0, ONES), bound=st.integers(1, 2**31 - 1))
def test_integers_are_the_high_part_of_bound_times_64_bits(step, index, bound):
    high, low, _, _ = philox_by_hand((0, index, step % 2**32, step >> 32), KEY)
    assert int(rng.integers(KEY, whole(step), whole(index), bound)) == (bound * (high * 2**32 + low)) >> 64


def test_integers_use_all_64_bits_for_a_wide_bound():
    """The low word matters: for a bound of 2^31 - 1, the upper 32 bits alone would miss every fourth number."""
    bound = 2**31 - 1
    expected = []
    for index in range(100):
        high, low, _, _ = philox_by_hand((0, index, 0, 0), KEY)
        expected.append((bound * (high * 2**32 + low)) >> 64)
    assert rng.integers(KEY, whole(0), torch.arange(100), bound)[0].tolist() == expected


@pytest.mark.parametrize(("word", "uniform"), [(0, 2**-33), (ONES, 1 - 2**-33)])
def test_smallest_and_largest_words_give_finite_normals(monkeypatch, word, uniform):
    """The uniform number under the logarithm is (word + 1/2) / 2^32, strictly between 0 and 1."""
    words = whole(word).view(1, 1, 1)
    monkeypatch.setattr(rng, "philox", lambda key, counter: (words, 0 * words, words, 0 * words))
    radius = math.sqrt(-2 * math.log(uniform))
    np.testing.assert_allclose(normals(size=4)[0, 0], [radius, 0, radius, 0], rtol=1e-6)


# Streams


def test_equal_names_and_seeds_make_equal_streams():
    assert rng.stream(3, "train/xs") == rng.stream(3, "train/xs")


def test_streams_of_other_seeds_or_names_have_other_keys():
    keys = {
        rng.stream(seed, name) for seed in range(100) for name in ("train/xs", "train/noise", "tasks", "1:tasks", "")
    }
    assert len(keys) == 500


# Laws


@pytest.fixture(scope="module")
def sample():
    """Return 2^18 normals: 64 steps, 512 indices, 8 numbers each."""
    return normals(steps=range(64), num=512, size=8).double().flatten().numpy()


def test_normals_are_float32_of_the_promised_shape():
    draw = normals(steps=(0, 5, 9), num=4, size=7)
    assert draw.shape == (3, 4, 7)
    assert draw.dtype == torch.float32


@pytest.mark.parametrize(
    ("power", "expected", "variance"),
    [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)],
)
def test_normal_moments_are_right(sample, power, expected, variance):
    """The moments are within 4 standard errors; the variance of z^p is E z^2p - (E z^p)^2."""
    assert abs((sample**power).mean() - expected) < 4 * math.sqrt(variance / len(sample))


def test_normals_pass_a_kolmogorov_smirnov_test(sample):
    assert stats.kstest(sample, "norm").pvalue > 1e-3


def test_normals_reach_the_tails(sample):
    """P(|z| > 3) is 0.0027, and the count is within 4 standard errors of it."""
    expected = len(sample) * 2 * stats.norm.sf(3)
    assert abs((np.abs(sample) > 3).sum() - expected) < 4 * math.sqrt(expected)


@pytest.mark.parametrize("bound", [2, 3, 7, 64, 1000])
def test_integers_pass_a_chi_square_test_of_uniformity(bound):
    draw = rng.integers(KEY, torch.arange(20), torch.arange(2500), bound).flatten()
    assert stats.chisquare(torch.bincount(draw, minlength=bound).numpy()).pvalue > 1e-3


@pytest.mark.parametrize("bound", [1, 2, 3, 2**20, 2**31 - 1])
def test_integers_stay_below_their_bound(bound):
    draw = rng.integers(KEY, torch.arange(10), torch.arange(1000), bound)
    assert draw.min() >= 0
    assert draw.max() < bound


def test_integers_reach_both_ends_of_a_wide_range():
    """Of 20,000 draws, the extremes are within 20 mean spacings of the ends, except once in e^20 cases."""
    bound = 2**31 - 1
    draw = rng.integers(KEY, torch.arange(20), torch.arange(1000), bound)
    assert draw.min() < 20 * bound / 20_000
    assert draw.max() > bound - 20 * bound / 20_000


@pytest.mark.parametrize("bound", [0, -1, 2**31])
def test_bound_out_of_range_is_refused(bound):
    with pytest.raises(ValueError, match=r"`bound` must be from 1 to 2\^31 - 1"):
        rng.integers(KEY, whole(0), whole(0), bound)


# Independence: correlations of n pairs have a standard error of 1 / sqrt(n)

PAIRS = 40_000


def draw_pairs(key=KEY, *, start=0, first=0, size=4):
    return rng.normal(key, torch.arange(start, start + 10), torch.arange(first, first + 1000), size)


NEIGHBOURS = {
    "streams of one seed": lambda: (draw_pairs(rng.stream(0, "train/xs")), draw_pairs(rng.stream(0, "train/noise"))),
    "seeds of one stream": lambda: (draw_pairs(rng.stream(0, "train/xs")), draw_pairs(rng.stream(1, "train/xs"))),
    "consecutive steps": lambda: (draw_pairs(), draw_pairs(start=1)),
    "steps 2^32 apart": lambda: (draw_pairs(), draw_pairs(start=2**32)),
    "consecutive indices": lambda: (draw_pairs(), draw_pairs(first=1)),
    "step and index swapped": lambda: (
        normals(steps=range(200), num=200),
        normals(steps=range(200), num=200).transpose(0, 1),
    ),
    "the two of a pair": lambda: (draw_pairs(size=8)[..., 0::2], draw_pairs(size=8)[..., 1::2]),
    "the pairs of a block": lambda: (draw_pairs(size=8)[..., [0, 1, 4, 5]], draw_pairs(size=8)[..., [2, 3, 6, 7]]),
    "consecutive blocks": lambda: (draw_pairs(size=8)[..., :4], draw_pairs(size=8)[..., 4:]),
}


@pytest.mark.parametrize("function", [torch.clone, torch.square], ids=["values", "squares"])
@pytest.mark.parametrize("case", NEIGHBOURS)
def test_neighbours_are_uncorrelated(case, function):
    first, second = (function(draw.double()).flatten() for draw in NEIGHBOURS[case]())
    distinct = first != second  # the diagonal of a matrix and its transpose
    first, second = first[distinct], second[distinct]
    assert len(first) >= PAIRS - 200
    correlation = torch.corrcoef(torch.stack((first, second)))[0, 1]
    assert abs(correlation) < 4 / math.sqrt(len(first))


def test_normals_and_integers_of_two_streams_are_uncorrelated():
    chosen = rng.integers(rng.stream(0, "a"), torch.arange(40), torch.arange(1000), 64).double().flatten()
    other = normals(rng.stream(0, "b"), steps=range(40), num=1000).double().flatten()
    assert abs(torch.corrcoef(torch.stack((chosen, other)))[0, 1]) < 4 / math.sqrt(40_000)


# Draws stand alone


@given(size=st.integers(1, 40), extra=st.integers(0, 40))
def test_shorter_draw_is_the_beginning_of_a_longer_one(size, extra):
    assert torch.equal(normals(num=3, size=size), normals(num=3, size=size + extra)[..., :size])


@given(size=st.integers(1, 30), num=st.integers(1, 50), start=st.integers(0, 2**40), length=st.integers(1, 6))
def test_batch_of_steps_is_the_steps_one_at_a_time_bitwise(size, num, start, length):
    steps = range(start, start + length)
    together = normals(steps=steps, num=num, size=size)
    assert torch.equal(together, torch.cat([normals(steps=(step,), num=num, size=size) for step in steps]))


@given(size=st.integers(1, 30), num=st.integers(1, 50))
def test_batch_of_indices_is_the_indices_one_at_a_time_bitwise(size, num):
    together = normals(num=num, size=size)
    alone = [rng.normal(KEY, whole(0), whole(index), size) for index in range(num)]
    assert torch.equal(together, torch.cat(alone, dim=1))


@given(start=st.integers(0, 2**40), length=st.integers(1, 6), num=st.integers(1, 50), bound=st.integers(1, 2**31 - 1))
def test_integers_of_many_steps_are_those_of_each(start, length, num, bound):
    steps, indices = torch.arange(start, start + length), torch.arange(num)
    alone = [rng.integers(KEY, step[None], indices, bound) for step in steps]
    assert torch.equal(rng.integers(KEY, steps, indices, bound), torch.cat(alone))


def test_order_of_steps_and_indices_does_not_matter():
    forwards = rng.normal(KEY, whole(1, 2, 3), whole(0, 1, 2, 3), 5)
    backwards = rng.normal(KEY, whole(3, 2, 1), whole(3, 2, 1, 0), 5)
    assert torch.equal(forwards, backwards.flip(0, 1))


def test_step_above_2_to_32_is_not_the_step_below():
    low, high = normals(steps=(5,), size=8), normals(steps=(5 + 2**32,), size=8)
    assert not torch.equal(low, high)


def test_number_of_threads_does_not_change_a_draw():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = normals(steps=range(4), num=3001, size=33)
        torch.set_num_threads(2)
        together = normals(steps=range(4), num=3001, size=33)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(alone, together)


def test_global_generator_is_neither_read_nor_set():
    torch.manual_seed(1)
    state, before = torch.get_rng_state(), normals(size=8)
    torch.manual_seed(2)
    assert torch.equal(normals(size=8), before)
    torch.manual_seed(1)
    normals(size=8)
    rng.integers(KEY, whole(0), whole(0), 10)
    assert torch.equal(torch.get_rng_state(), state)


# CUDA


@pytest.mark.gpu
def test_normals_on_cuda_agree_within_one_unit_in_the_last_place():
    steps, indices = torch.arange(50), torch.arange(1000)
    there = rng.normal(KEY, steps.cuda(), indices.cuda(), 8).cpu().numpy()
    np.testing.assert_array_max_ulp(there, rng.normal(KEY, steps, indices, 8).numpy(), maxulp=1)


@pytest.mark.gpu
def test_integers_on_cuda_are_the_same():
    steps, indices = torch.arange(50), torch.arange(1000)
    there = rng.integers(KEY, steps.cuda(), indices.cuda(), 12_345)
    assert torch.equal(there.cpu(), rng.integers(KEY, steps, indices, 12_345))
