"""Laws of moving images: a twin that interpolates by the definition, exact quarter turns, and refusals."""

import math

import pytest
import torch
from conftest import assert_close, must_fail
from market import blobs
from torch import Generator, Tensor

from gmcompress.errors import GMError
from gmcompress.liegrids import FACTORS
from gmcompress.motions import disc, motions, move, move_signal


def hill(rows: Tensor, columns: Tensor, angle: float, ratio: float) -> Tensor:
    """A smooth function on the plane, moved by its definition: f(g⁻¹x), with x to the right and y upwards."""
    x, y = columns, -rows
    cosine, sine = math.cos(angle), math.sin(angle)
    x, y = (cosine * x + sine * y) / ratio, (cosine * y - sine * x) / ratio
    return torch.exp(-((x - 4).square() / 20 + (y - 2).square() / 12))


def assert_moved(angle: float, ratio: float, wrong: float = 0.0) -> None:
    rows, columns = torch.meshgrid(
        *(torch.arange(n, dtype=torch.float64) - (n - 1) / 2 for n in (41, 36)), indexing="ij"
    )
    plain = hill(rows, columns, 0.0, 1.0)[None, None]
    expected = hill(rows, columns, angle + wrong, ratio)
    torch.testing.assert_close(move(plain, angle, ratio)[0, 0], expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize(("angle", "ratio"), [(0.4, 1.0), (-2.0, 1.0), (0.0, 1.2), (1.1, 0.8)])
def test_images_move_as_functions_on_the_plane(angle: float, ratio: float) -> None:
    assert_moved(angle, ratio)
    must_fail(assert_moved, angle, ratio, 0.1)


def test_quarter_turns_of_squares_are_exact(generator: Generator) -> None:
    for side in (4, 5):
        image = torch.randn(2, 3, side, side, generator=generator)
        for quarter in range(1, 4):
            assert_close(move(image, quarter * math.pi / 2), image.rot90(quarter, [2, 3]))
    signal = torch.randn(2, 3, 8, 5, 5, generator=generator)
    assert_close(move_signal("SE(2)", signal, (math.pi / 2, 1.0)), signal.rot90(1, [3, 4]).roll(2, 2))
    assert_close(move_signal("Sim(2)", signal[:, :, 0], (math.pi / 2, 1.0)), signal[:, :, 0].rot90(1, [2, 3]))


def test_the_disc_holds_what_a_motion_fills(generator: Generator) -> None:
    image = blobs(20, generator) + 1
    for angle, ratio in ((0.3, 1.0), (2.0, 0.7), (1.0, 1.3)):
        inside = disc(image, ratio)
        assert 0.3 * ratio < float(inside.mean()) < 0.8
        seen = move(torch.ones_like(image), angle, ratio)
        assert float(((seen - 1) * inside).abs().max()) < 0.05
    assert float((move(torch.ones_like(image), 0.3) - 1).abs().max()) > 0.5, "corners come from outside"


def test_elements_and_refusals() -> None:
    for group in FACTORS:
        usual = motions(group)
        assert len(usual) > 3
        assert all(angle or ratio != 1 for _, (angle, ratio) in usual)
    assert motions("SE(2)", [1]) == [(1, (1.0, 1.0))]
    assert motions("R^2:R+", [2.0]) == [(2.0, (0.0, 2.0))]
    assert motions("Sim(2)", [(1.0, 2.0)]) == [((1.0, 2.0), (1.0, 2.0))]
    for group, elements, message in (
        ("SE(2)", [], "there are none"),
        ("SE(2)", [(1.0, 2.0)], "angles in radians"),
        ("SE(2)", [math.inf], "angles in radians"),
        ("R^2:R+", [0], "ratios above 0"),
        ("Sim(2)", [1.0], "pairs"),
        ("Sim(2)", [(1.0, "2")], "pairs"),
    ):
        with pytest.raises(GMError, match=message):
            motions(group, elements)
    signal = torch.ones(1, 1, 8, 5, 5)
    with pytest.raises(GMError, match="multiples of 2π/8"):
        move_signal("SE(2)", signal, (0.1, 1.0))
    with pytest.raises(GMError, match="LiePool"):
        move_signal("Sim(2)", signal, (0.0, 1.0))
