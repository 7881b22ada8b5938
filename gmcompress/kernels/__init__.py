"""Triton kernels for the fast product of linear layers: one launch in place of some ten calls of torch.

The group is one whose real irreducibles `products` couples in one combination without copies, on at most two axes:
C_n of even n, most C_a x C_b of even a and b (not C4xC2), C2^k. Data is bfloat16, float16 or float32; sums are float32.
The kernel reads what `products.prepare` made, and `supports` says where it does not apply: there torch's calls stay.

What is here was checked in Triton's interpreter and by compiling it for compute capability 9.0. No choice of tiles was
tuned on a GPU, so `pays` measures at the first call of a shape whether the kernel is faster than torch's calls at all.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from math import prod
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ORDER = 1024  # of the group, at most
NARROW = 32  # bytes of the shortest sum that a matrix product on tensor cores takes
TILE = 1 << 16  # bytes of one tile of the inputs' dtype, at most: more do not fit into the registers of one program
PROGRAMS = 132  # that run at once: the multiprocessors of an H200
TRIED = 4  # choices of tiles that are timed, once for every layer shape and power of two of the batch


@dataclass(frozen=True)
class Case:
    """The shape of a product; the names are those of the kernel."""

    I: int  # noqa: E741 - input blocks
    O: int  # noqa: E741 - output blocks
    MORE: int  # 1 and the displacement rank
    A: int  # length of the first axis of the group
    B: int  # length of the second one, 1 where there is none
    S: int  # size of the irreducibles of the first axis
    T: int  # and of the second one


@dataclass(frozen=True)
class Tiles:
    """What one program of the kernel handles at a time, all powers of two."""

    BN: int  # inputs
    IT: int  # input blocks
    OT: int  # output blocks
    PT: int  # frequencies of the first axis
    MP: int  # MORE, A and B made powers of two
    AP: int
    BP: int


def supports(
    rows: Tensor,  # (N, columns)
    ready: Mapping[str, Tensor],
    sizes: Sequence[int],  # of the irreducibles, for every axis
    bias: Tensor | None = None,
    *,
    interpret: bool = False,  # on the CPU, by Triton's interpreter
) -> str | None:
    """Why the kernel is not for this call, None where it is.

    >>> supports(torch.zeros(1, 4), {"basis0": torch.eye(4), "spectrum0": torch.zeros(2, 2, 2)}, (2,))
    'the inputs are not on a CUDA device'
    """
    if not rows.is_cuda and not interpret:
        return "the inputs are not on a CUDA device"
    if not _installed():
        return "Triton is not installed"
    problem = _why_now(rows, ready, bias)
    if problem is not None:
        return problem
    if "spectrum1" in ready:
        return "the irreducibles of the group fall into more than one combination"
    if len(sizes) > 2:
        return "the group has more than two axes"
    case = _case(rows, ready, sizes)
    order = case.A * case.B
    if order > ORDER:
        return f"the order of the group is above {ORDER}"
    if ready["spectrum0"].dim() != 3 or ready["spectrum0"].shape[0] * case.S * case.T != order:
        return "the irreducibles of the group stand there in several copies"
    if any(size & (size - 1) for size in (case.S, case.T)):
        return "the size of the irreducibles is no power of two"
    if rows.shape[0] == 0:
        return "there are no inputs"
    if _tiles(case, _bucket(rows), rows.dtype, rows.device) is None:
        return "no choice of tiles fits the device"
    return None


@lru_cache(maxsize=1)
def _installed() -> bool:
    return find_spec("triton") is not None


def _why_now(rows: Tensor, ready: Mapping[str, Tensor], bias: Tensor | None) -> str | None:
    """Why a kernel is not for these tensors in this state of torch."""
    every = [rows, *ready.values(), *([] if bias is None else [bias])]
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return "the call is being traced"
    if torch._C._len_torch_dispatch_stack() or any(torch._C._functorch.is_functorch_wrapped_tensor(t) for t in every):
        return "the call is watched or transformed: a count of operations, a fake tensor, vmap"
    if torch.is_grad_enabled() and any(each.requires_grad for each in every):
        return "a gradient is wanted"
    if torch.is_autocast_enabled(rows.device.type):
        return "autocast is on"
    if rows.dtype not in DTYPES or any(each.dtype != rows.dtype for each in every):
        return "the tensors are not all bfloat16, all float16 or all float32"
    if any(each.device != rows.device for each in every):
        return "the tensors are on several devices"
    return None


def product(
    rows: Tensor,  # (N, columns)
    ready: Mapping[str, Tensor],
    sizes: Sequence[int],
    bias: Tensor | None = None,
) -> Tensor:  # (N, rows)
    """The group part of x Wᵀ, with the bias if it is given, in one launch; only where `supports` has no reason against.

    The first call of a shape compiles and times some choices of tiles: make it before a CUDA graph is captured.
    """
    case = _case(rows, ready, sizes)
    tiles = _tiles(case, _bucket(rows), rows.dtype, rows.device)
    assert tiles is not None, "supports found one"
    return _launch(rows.contiguous(), ready, bias, case, tiles)


def pays(
    rows: Tensor,  # (N, columns)
    ready: Mapping[str, Tensor],
    sizes: Sequence[int],
    plain: Callable[[Tensor, Mapping[str, Tensor]], Tensor],  # the same product by torch's calls
) -> bool:
    """Whether the kernel takes less time than torch's calls, measured at the first call of a shape and batch.

    A low rank beside the group is not part of the comparison. As all numbers of inputs up to a power of two share one
    answer, so do layers of equal shape.
    """
    group = {name: each for name, each in ready.items() if name not in ("left", "right", "scales")}
    return _pays(_Question(_case(rows, ready, sizes), _bucket(rows), rows.dtype, rows.device, [rows, group, plain]))


@dataclass(frozen=True)
class _Question:
    """What is measured; the call by which it is measured is no part of its identity."""

    case: Case
    batch: int
    dtype: torch.dtype
    device: torch.device
    call: list[Any] = field(compare=False)  # rows, ready and plain: emptied once they are measured


@lru_cache(maxsize=1024)
def _pays(question: _Question) -> bool:
    from triton.testing import do_bench

    rows, ready, plain = question.call
    question.call.clear()  # the cache keeps the question: it must not keep the tensors
    tiles = _tiles(question.case, question.batch, question.dtype, question.device)
    assert tiles is not None, "supports found one"
    ours = do_bench(lambda: _launch(rows, ready, None, question.case, tiles), return_mode="median")
    return bool(ours < do_bench(lambda: plain(rows, ready), return_mode="median"))


def _case(rows: Tensor, ready: Mapping[str, Tensor], sizes: Sequence[int]) -> Case:
    axes = [ready[f"basis{number}"].shape[0] for number in range(len(sizes))]
    more = ready["gates"].shape[1] + 1 if "gates" in ready else 1
    (a, b), (s, t) = (*axes, 1)[:2], (*sizes, 1)[:2]
    outputs = ready["spectrum0"].shape[1] // (prod(sizes) * more)
    return Case(rows.shape[1] // (a * b), outputs, more, a, b, s, t)


def _launch(rows: Tensor, ready: Mapping[str, Tensor], bias: Tensor | None, case: Case, tiles: Tiles) -> Tensor:
    from .fused import fused

    count = rows.shape[0]
    out = rows.new_empty(count, case.O * case.A * case.B)
    spare = ready["basis0"]  # in place of what there is not
    tensors = (ready["basis0"], ready.get("basis1", spare), ready["spectrum0"], ready.get("gates", spare))
    grid = (-(-count // tiles.BN), -(-case.O // tiles.OT))
    flags = {"BIAS": bias is not None, "WIDE": not rows.is_cuda}
    how = {"num_warps": _warps(tiles), "num_stages": 1, "enable_fp_fusion": True}
    settings = asdict(case) | asdict(tiles) | flags | how
    with torch.cuda.device(rows.device if rows.is_cuda else -1):
        last = (spare if bias is None else bias, out, count)
        fused[grid](rows, *(each.contiguous() for each in tensors), *last, **settings)
    return out


# ---------------------------------------------------------------------------------------------------------------------
# The choice of tiles.


def _bucket(rows: Tensor) -> int:
    """The power of two at or above the number of inputs: numbers alike share their tiles."""
    return _power(rows.shape[0])


def _power(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


def _warps(tiles: Tiles) -> int:
    return 8 if tiles.BN * max(tiles.IT, tiles.OT * tiles.MP) * tiles.AP * tiles.BP >= 1 << 13 else 4


def candidates(case: Case, batch: int, itemsize: int) -> list[Tiles]:
    """The choices of tiles that fit, those with the least traffic over the busiest multiprocessor first.

    An estimate: reads of inputs and spectra, of all rounds of programs one after the other. `itemsize` is in bytes.

    >>> candidates(Case(4, 4, 1, 32, 32, 2, 2), 8192, 2)[0]
    Tiles(BN=8, IT=4, OT=2, PT=32, MP=1, AP=32, BP=32)
    """
    size, narrow = case.S * case.T, NARROW // itemsize
    fixed = (_power(case.MORE), max(narrow, _power(case.A)), max(narrow, _power(case.B)) if case.B > 1 else 1)
    inputs = _powers(max(1, narrow // size), max(narrow // size, _power(case.I)))
    frequencies = _powers(narrow, min(128 // itemsize, fixed[1]))
    found = []
    for each in itertools.product(_powers(1, min(64, batch)), inputs, _powers(1, _power(case.O)), frequencies):
        tiles = Tiles(*each, *fixed)
        largest, cost = _costs(case, tiles, batch)
        if largest * itemsize <= TILE:
            found.append((cost, tiles))
    return [tiles for _, tiles in sorted(found, key=lambda pair: pair[0])]


def _powers(least: int, most: int) -> list[int]:
    return [1 << each for each in range(least.bit_length() - 1, most.bit_length())]


def _costs(case: Case, tiles: Tiles, batch: int) -> tuple[int, int]:
    """Entries of the largest tile, and those read by one program times the rounds of programs."""
    size, wide = case.S * case.T, tiles.OT * tiles.MP
    blocks = (tiles.PT // case.S) * (tiles.BP // case.T)
    signal, matrix = tiles.BN * tiles.IT * tiles.AP * tiles.BP, blocks * size**2 * wide * tiles.IT
    found, coupled = tiles.BN * wide * tiles.AP * tiles.BP, blocks * size * max(wide, tiles.IT) * tiles.BN
    steps = -(-case.A // tiles.PT) * -(-case.I // tiles.IT)
    programs = -(-batch // tiles.BN) * -(-case.O // tiles.OT)
    largest = max(signal, matrix, found, coupled, tiles.AP * tiles.PT)
    return largest, -(-programs // PROGRAMS) * (steps * (signal + matrix) + found)


@lru_cache(maxsize=1024)
def _tiles(case: Case, batch: int, dtype: torch.dtype, device: torch.device) -> Tiles | None:
    """The fastest of the first candidates on this device, None where none fits; the first one in the interpreter."""
    choices = candidates(case, batch, dtype.itemsize)
    if device.type != "cuda":
        return choices[0] if choices else None
    timed: list[tuple[float, int]] = []
    for number, each in enumerate(choices[: 3 * TRIED]):
        found = _milliseconds(case, each, batch, dtype, device)
        if found is not None:
            timed.append((found, number))
        if len(timed) == TRIED:
            break
    return choices[min(timed)[1]] if timed else None


def _milliseconds(case: Case, tiles: Tiles, batch: int, dtype: torch.dtype, device: torch.device) -> float | None:
    """Of one launch on zeros; None where the tiles do not fit the device."""
    from triton.runtime.errors import OutOfResources, PTXASError
    from triton.testing import do_bench

    size = case.S * case.T
    shapes: dict[str, tuple[int, ...]] = {"basis0": (case.A, case.A), "basis1": (case.B, case.B)}
    shapes["spectrum0"] = (case.A * case.B // size, size * case.O * case.MORE, size * case.I)
    shapes["gates"] = (case.O, case.MORE - 1, case.A * case.B)
    shapes["rows"] = (batch, case.I * case.A * case.B)
    ready = {name: torch.zeros(shape, dtype=dtype, device=device) for name, shape in shapes.items()}
    try:
        return float(do_bench(lambda: _launch(ready["rows"], ready, None, case, tiles), return_mode="median"))
    except (OutOfResources, PTXASError):
        return None
