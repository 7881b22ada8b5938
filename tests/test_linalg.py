"""Dense linear algebra: the same, to tolerance, as torch's own where all singular values are computed."""

import pytest
import scipy.linalg
import torch
from conftest import assert_close, must_fail
from torch import Generator, Tensor

from gmcompress.errors import GMError
from gmcompress.linalg import (
    ALL,
    PIECES,
    add_gram_,
    add_product_,
    cholesky,
    count_above,
    gram_matrix,
    leading_vectors,
    mirrored_,
    spectral_norm,
    trailing_energy,
    truncated_svd,
)


def randn(shape: tuple[int, ...], generator: Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def spectrum(values: Tensor, columns: int, generator: Generator) -> Tensor:
    """A random matrix with these singular values."""
    u, v = (torch.linalg.qr(randn((each, len(values)), generator))[0] for each in (len(values), columns))
    return u * values @ v.T


@pytest.mark.parametrize("rank", [1, 3, 10, 30])
@pytest.mark.parametrize("columns", [8, 64, 200])
@pytest.mark.parametrize(
    "values",
    [torch.rand(64), torch.ones(64), torch.logspace(0, -14, 64), torch.tensor([1.0] * 3 + [0.0] * 61), torch.zeros(64)],
    ids=["random", "flat", "decaying", "rank 3", "zero"],
)
def test_truncated_svd_is_that_of_torch(values: Tensor, columns: int, rank: int, generator: Generator) -> None:
    matrix = (
        spectrum(values.double(), 64, generator)[:, :columns]
        if columns < 64
        else spectrum(values.double(), columns, generator)
    )
    rank = min(rank, columns)
    expected = torch.linalg.svdvals(matrix)

    def assert_truncation(u: Tensor, s: Tensor, vh: Tensor) -> None:
        assert_close(s, expected[:rank])
        assert_close(u.T @ u, torch.eye(rank, dtype=torch.float64))
        assert_close(vh @ vh.T, torch.eye(rank, dtype=torch.float64))
        assert_close((matrix - u * s @ vh).norm(), expected[rank:].norm())

    u, s, vh = truncated_svd(matrix, rank)
    assert_truncation(u, s, vh)
    ut, st, vht = truncated_svd(matrix.T, rank)
    assert_truncation(vht.T, st, ut.T)
    batched = truncated_svd(torch.stack([2 * matrix, matrix]), rank)
    assert_truncation(*(each[1] for each in batched))
    must_fail(assert_truncation, u, s + 1e-6, vh)
    must_fail(assert_truncation, u * 1.01, s, vh)


def test_lapack_may_fail(monkeypatch: pytest.MonkeyPatch, generator: Generator) -> None:
    def fails(*_: object, **__: object) -> None:
        raise scipy.linalg.LinAlgError

    matrix = randn((200, 300), generator)
    expected = truncated_svd(matrix, 2)
    monkeypatch.setattr(scipy.linalg, "eigh", fails)
    for found, wanted in zip(truncated_svd(matrix, 2), expected, strict=True):
        assert_close(found.abs(), wanted.abs(), slack=1e3)


@pytest.mark.parametrize("values", [torch.rand(200), torch.ones(200), torch.logspace(0, -14, 200), torch.zeros(200)])
def test_some_eigenvectors_are_those_of_all(values: Tensor, generator: Generator) -> None:
    matrix = spectrum(values.double(), 300, generator)
    gram = torch.stack([matrix @ matrix.T, torch.eye(200, dtype=torch.float64)])
    assert leading_vectors(gram, 2).shape == (2, 200, 2)
    found, expected = truncated_svd(matrix, 2), torch.linalg.svdvals(matrix)
    assert_close(found[1], expected[:2])
    assert_close((matrix - found[0] * found[1] @ found[2]).norm(), expected[2:].norm())
    for rank in (0, 2, 12, 150, 300):  # by Lanczos iteration, and by all eigenvalues
        assert_close(trailing_energy(gram, rank), float(expected[rank:].square().sum()) + max(200 - rank, 0), slack=1e5)


def spectra(size: int, generator: Generator) -> Tensor:
    """A batch: singular values of all sizes, a few equal ones with zeros behind, all equal, and none."""
    few = torch.zeros(size)
    few[:5] = 3.0
    values = [torch.logspace(0, -9, size), few, torch.ones(size), torch.zeros(size)]
    return torch.stack([spectrum(each.double(), size + 30, generator) for each in values])


@pytest.mark.parametrize("size", [1, 2, 40, 150])
@pytest.mark.parametrize("tolerance", [0.3, 1e-3, 1e-5, 1e-8, 0.0])
@pytest.mark.parametrize("tall", [False, True])
def test_singular_values_are_counted_without_all_of_them(
    size: int, tolerance: float, tall: bool, generator: Generator
) -> None:
    matrix = spectra(max(size, 5), generator)[:, -size:] if size < 5 else spectra(size, generator)
    matrix = matrix.mT if tall else matrix
    values = torch.linalg.svdvals(matrix)
    assert_close(spectral_norm(matrix), values[:, 0])
    assert_close(spectral_norm(matrix[0]), values[0, 0])
    counted = (values > tolerance * values[:, :1]).sum(1)

    def assert_counted(found: Tensor) -> None:
        if tolerance:
            assert found.tolist() == counted.tolist()
        else:  # whose count is that of the rounding
            assert found[3] == 0

    found = count_above(matrix, values[:, 0], tolerance)
    assert_counted(found)
    assert count_above(matrix[0], values[0, 0], tolerance) == found[0]
    must_fail(assert_counted, found + 1)


def test_a_scale_below_the_largest_counts_more(generator: Generator) -> None:
    matrix = spectrum(torch.linspace(1, 0.01, 200).double(), 250, generator)
    for scale, tolerance in ((1.0, 0.1), (0.5, 0.1), (4.0, 0.01)):
        wanted = int((torch.linalg.svdvals(matrix) > scale * tolerance).sum())
        assert int(count_above(matrix, torch.tensor(scale), tolerance)) == wanted


def test_cholesky_factors_what_has_any_and_ends_where_there_are_none(generator: Generator) -> None:
    rows = torch.randn(3, 5, 2, generator=generator, dtype=torch.float64)
    found = cholesky(rows @ rows.mT)  # of rank 2
    torch.testing.assert_close(found @ found.mT, rows @ rows.mT, rtol=0, atol=1e-6)
    for wrong in (torch.full((2, 2), torch.nan), torch.diag(torch.tensor([1.0, torch.inf])), -torch.eye(2)):
        with pytest.raises(GMError, match="beyond what can be computed with"):
            cholesky(wrong)


@pytest.mark.parametrize("shape", [(5, 7), (2, 5, 7), (2, 9, PIECES * ALL + 5), (3, PIECES * ALL)], ids=str)
def test_the_gram_matrix_is_the_product(shape: tuple[int, ...], generator: Generator) -> None:
    rows = randn(shape, generator)
    assert_close(gram_matrix(rows), rows.mT @ rows, slack=10)


@pytest.mark.parametrize("m", [5, PIECES * ALL, PIECES * ALL + 1])
def test_products_are_added_block_row_by_block_row(m: int, generator: Generator) -> None:
    left, right = randn((2, 3, m), generator), randn((2, 3, 4), generator)
    total, crossed = randn((2, m, m), generator).zero_(), torch.ones(2, m, 4, dtype=torch.float64)
    for each in (left, 2 * left):
        add_gram_(total, each)
        add_product_(crossed, each, right)
    assert_close(mirrored_(total), 5 * left.mT @ left, slack=10)
    assert_close(crossed, 1 + 3 * left.mT @ right, slack=10)
