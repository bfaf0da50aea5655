"""Draw normal random numbers as JAX's default generator drew them before version 0.5. Only NumPy is needed, not JAX.

JAX's default generator is Threefry-2x32 with 20 rounds (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"). A key is a
pair of 32-bit words. To draw n words, the generator encrypts the pairs of counters (i, i + n/2) for i < n/2. The two words of an
encrypted pair are word i and word i + n/2 of the result.
"""

import math

import numpy as np
from jaxtyping import Float, UInt32

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA
# Coefficients of erfinv(x) in single precision: `_CENTRE` if w = -log(1 - x^2) is below 5, and `_TAIL` otherwise (Giles 2010,
# "Approximating the erfinv function").
_CENTRE: tuple[float, ...] = (2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087)
_CENTRE += (-0.00125372503, -0.00417768164, 0.246640727, 1.50140941)
_TAIL: tuple[float, ...] = (-0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773)
_TAIL += (-0.0076224613, 0.00943887047, 1.00167406, 2.83297682)


def key_of(seed: int) -> UInt32[np.ndarray, "2"]:
    """Return the key of a seed, as `jax.random.PRNGKey` does."""
    return np.array([0, seed & 0xFFFFFFFF], dtype=np.uint32)  # without 64-bit types, JAX uses only the low word


def fold_in(key: UInt32[np.ndarray, "2"], number: int) -> UInt32[np.ndarray, "2"]:
    """Return a new key that depends on a key and a number, as `jax.random.fold_in` does."""
    return encrypt(key, key_of(number))


def normal(key: UInt32[np.ndarray, "2"], shape: tuple[int, ...]) -> Float[np.ndarray, "..."]:
    """Return numbers from N(0, 1) in float32, as `jax.random.normal` does."""
    words = encrypt(key, np.arange(math.prod(shape), dtype=np.uint32))
    unit = ((words >> np.uint32(9)) | np.uint32(0x3F800000)).view(np.float32) - np.float32(1)  # in [0, 1)
    low = np.nextafter(np.float32(-1), np.float32(0))
    uniform = np.maximum(low, unit * (np.float32(1) - low) + low)
    return (np.float32(math.sqrt(2)) * _erfinv(uniform)).reshape(shape)


def encrypt(key: UInt32[np.ndarray, "2"], counters: UInt32[np.ndarray, " n"]) -> UInt32[np.ndarray, " n"]:
    """Return the encrypted counters. Counter i of the first half and counter i of the second half are encrypted as a pair."""
    size = len(counters)
    x, y = np.split(np.concatenate((counters, np.zeros(size % 2, dtype=np.uint32))), 2)
    words = (key[0], key[1], key[0] ^ key[1] ^ np.uint32(_PARITY))
    x, y = x + words[0], y + words[1]
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            x = x + y
            y = (y << np.uint32(rotation)) | (y >> np.uint32(32 - rotation))
            y = y ^ x
        x = x + words[(group + 1) % 3]
        y = y + words[(group + 2) % 3] + np.uint32(group + 1)
    return np.concatenate((x, y))[:size]


def _erfinv(x: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Return the inverse error function as XLA computes it in float32."""
    w = -np.log1p(-x * x)
    is_central = w < 5
    w = np.where(is_central, w - np.float32(2.5), np.sqrt(w) - np.float32(3))
    result = np.zeros_like(w)
    for centre, tail in zip(_CENTRE, _TAIL, strict=True):
        result = np.where(is_central, np.float32(centre), np.float32(tail)) + result * w
    return result * x
