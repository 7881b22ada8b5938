"""Laws of the real Fourier transforms: they are those of numpy, they are undone, and correlations are a slow twin's."""

import itertools

import numpy as np
import pytest
import torch
from conftest import assert_close, must_fail
from torch import Generator

from gmcompress import fourier, spectra
from gmcompress.groups import cyclic
from gmcompress.spectra import Spectrum, _restore, _transform, correlate, spectrum, transform_macs

AXES = [(1,), (2,), (5,), (8,), (3, 4), (4, 1), (2, 2, 2), (2, 3, 4), (2, 2, 2, 2)]


def every_place(axes: tuple[int, ...]) -> np.ndarray:
    return np.array(list(itertools.product(*map(range, axes))))


@pytest.mark.parametrize("axes", AXES, ids=str)
def test_coefficients_are_those_of_numpy_and_are_undone(axes: tuple[int, ...], generator: Generator) -> None:
    found = spectrum(axes, (1,) * len(axes), every_place(axes))
    signal = torch.randn(int(np.prod(axes)), 2, generator=generator, dtype=torch.float64)
    expected = np.fft.rfftn(signal.numpy().reshape(*axes, 2), axes=range(len(axes))).reshape(found.frequencies, 2)
    coefficients = _transform(signal, found)
    assert_close(coefficients, torch.from_numpy(np.stack([expected.real, expected.imag])), slack=10)
    assert_close(_restore(coefficients, found), signal, slack=10)
    must_fail(assert_close, _restore(coefficients.flip(0) + 1e-6, found), signal)
    macs = sum(each.size * coefficients[:, :, 0].numel() // len(each) for each in found.forward[:-1])
    assert transform_macs(axes) == macs + found.forward[-1].size * int(np.prod(axes[:-1]))


@pytest.mark.parametrize("order", [1, 2, 5, 8])
def test_the_transforms_are_those_of_the_real_fourier_basis(order: int) -> None:
    """Q has the same rows up to their norms, in the order (real characters, pairs of cosine and sine)."""
    assert spectra.characters is fourier.characters
    cosines, negative_sines = spectrum((order,), (1,), every_place((order,))).forward[0].reshape(2, -1, order)
    real = [number for number in range(order // 2 + 1) if 2 * number % order == 0]
    pairs = [number for number in range(order // 2 + 1) if 2 * number % order]
    rows = [cosines[number] for number in real]
    rows += [each for number in pairs for each in (cosines[number], -negative_sines[number])]
    stacked = np.stack(rows) / np.linalg.norm(rows, axis=1, keepdims=True)
    basis = fourier.fourier(cyclic(order)).basis
    assert_close(torch.from_numpy(stacked.T.copy()), basis)
    if order > 2:
        must_fail(assert_close, torch.from_numpy(stacked[:, ::-1].T.copy()), basis)


@pytest.mark.parametrize("axes", AXES, ids=str)
@pytest.mark.parametrize("direct", [True, False])
def test_correlations_on_any_taps_at_any_stride(axes: tuple[int, ...], direct: bool, generator: Generator) -> None:
    places = every_place(axes)
    for step in {1, *axes}:
        stride = tuple(step if each % step == 0 else 1 for each in axes)
        kept = places[(places % np.array(stride) == 0).all(1)]
        for taps in (places[:1], places[::2], np.random.default_rng(0).permutation(places)):
            found = spectrum(axes, stride, taps)
            if not direct:
                found = Spectrum(found.axes, found.forward, found.inverse, None, found.fold)
            signal = torch.randn(2, 2, len(places), generator=generator, dtype=torch.float64)
            kernel = torch.randn(3, 2, len(taps), generator=generator, dtype=torch.float64)
            expected = torch.zeros(2, 3, len(kept), dtype=torch.float64)
            for (h, place), (u, tap) in itertools.product(enumerate(kept), enumerate(taps)):
                read = int(np.ravel_multi_index(tuple((place + tap) % np.array(axes)), axes))
                expected[:, :, h] += signal[:, :, read] @ kernel[:, :, u].T
            numbers = torch.from_numpy(np.ravel_multi_index(tuple(taps.T), axes))
            result = correlate(signal, kernel, found, numbers)
            assert_close(result, expected, slack=10)
            must_fail(assert_close, result, expected + 1e-6)
