"""The Triton kernel of `kernels`: transform, product per irreducible, transform back, gates and bias in one launch.

This file imports Triton, so nothing but the functions that launch the kernel may import it.
"""

# mypy: disallow-untyped-defs=False
# ruff: noqa: E741, N803
# (what a kernel of Triton takes has no type of Python's; its constants are written in capitals)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _matrix(  # the blocks of the spectrum, (PT/S · BP/T, S·T·OT·MP, S·T·IT), zero where a tile is wider than the layer
    spectrum, frequency, first, inner,
    I: tl.constexpr, O: tl.constexpr, MORE: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    S: tl.constexpr, T: tl.constexpr, IT: tl.constexpr, OT: tl.constexpr, MP: tl.constexpr,
    PT: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    block = tl.arange(0, (PT // S) * (BP // T))
    row = tl.arange(0, S * T * OT * MP)
    column = tl.arange(0, S * T * IT)
    one, two = frequency // S + block // (BP // T), block % (BP // T)
    output, which = first + row // MP % OT, row % MP
    given = inner + column % IT
    line = row // (OT * MP) * (O * MORE) + output * MORE + which
    place = column // IT * I + given
    at = (one * (B // T) + two)[:, None, None] * (S * T * O * MORE) + line[None, :, None]
    known = ((one < A // S) & (two < B // T))[:, None, None] & ((output < O) & (which < MORE))[None, :, None]
    return tl.load(
        spectrum + at * (S * T * I) + place[None, None, :], mask=known & (given < I)[None, None, :], other=0.0
    )


@triton.jit
def _signal(  # the inputs, (BN·IT·BP, AP), the first axis of the group last
    x, rows, batch, inner,
    I: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    BN: tl.constexpr, IT: tl.constexpr, AP: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    blocks, high, wide = inner + tl.arange(0, IT), tl.arange(0, AP), tl.arange(0, BP)
    known = (rows < batch)[:, None] & (blocks < I)[None, :]
    inside = (high < A)[None, :] & (wide < B)[:, None]
    start = rows.to(tl.int64)[:, None] * (I * A * B) + blocks[None, :] * (A * B)
    at = start[:, :, None, None] + (high[None, :] * B + wide[:, None])[None, None, :, :]
    found = tl.load(x + at, mask=known[:, :, None, None] & inside[None, None, :, :], other=0.0)
    return tl.reshape(found, (BN * IT * BP, AP))


@triton.jit
def _basis(basis, point, frequency, N: tl.constexpr):  # (points, frequencies)
    known = (point < N)[:, None] & (frequency < N)[None, :]
    return tl.load(basis + point[:, None] * N + frequency[None, :], mask=known, other=0.0)


@triton.jit
def _dot(left, right, WIDE: tl.constexpr):  # WIDE: the interpreter multiplies the bits of bfloat16 as integers
    if WIDE:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, input_precision="ieee")


@triton.jit
def _finish(  # (BN·OT·MP·BP, AP): gates, bias, and out to memory
    found, gates, bias, out, rows, batch, first,
    O: tl.constexpr, MORE: tl.constexpr, A: tl.constexpr, B: tl.constexpr, BN: tl.constexpr,
    OT: tl.constexpr, MP: tl.constexpr, AP: tl.constexpr, BP: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    outputs, high, wide = first + tl.arange(0, OT), tl.arange(0, AP), tl.arange(0, BP)
    place = tl.reshape(high[None, :] * B + wide[:, None], (BP * AP,))
    inside = tl.reshape((high < A)[None, :] & (wide < B)[:, None], (BP * AP,))
    found = tl.reshape(found, (BN, OT, MP, BP * AP))
    if MORE > 1:  # f⋆x + Σ_k a_k ⊙ (b_k⋆x): the first of them has no gate
        which = tl.arange(0, MP)
        line = outputs[:, None] * (MORE - 1) + which[None, :] - 1
        known = (outputs < O)[:, None] & ((which > 0) & (which < MORE))[None, :]
        gate = tl.load(
            gates + line[:, :, None] * (A * B) + place[None, None, :],
            mask=known[:, :, None] & inside[None, None, :],
            other=0.0,
        ).to(tl.float32)
        found = found * tl.where(which[None, :, None] == 0, 1.0, gate)[None, :, :, :]
    result = tl.sum(found, axis=2)  # (BN, OT, BP·AP)
    at = outputs[:, None] * (A * B) + place[None, :]
    known = (outputs < O)[:, None] & inside[None, :]
    if BIAS:
        result += tl.load(bias + at, mask=known, other=0.0).to(tl.float32)[None, :, :]
    start = rows.to(tl.int64)[:, None, None] * (O * A * B)
    tl.store(
        out + start + at[None, :, :], result.to(out.dtype.element_ty), mask=(rows < batch)[:, None, None] & known[None]
    )


@triton.jit
def fused(
    x, basis0, basis1, spectrum, gates, bias, out, batch,
    I: tl.constexpr, O: tl.constexpr, MORE: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    S: tl.constexpr, T: tl.constexpr, BN: tl.constexpr, IT: tl.constexpr, OT: tl.constexpr,
    PT: tl.constexpr, MP: tl.constexpr, AP: tl.constexpr, BP: tl.constexpr, BIAS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """One program: BN rows and OT output blocks; PT frequencies of the first axis and IT input blocks at a time.

    The capital letters are the fields of `Case` and `Tiles`. An axis alone is the first one, and B is 1.
    """
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    first = tl.program_id(1) * OT
    dtype: tl.constexpr = x.dtype.element_ty
    high, wide = tl.arange(0, AP), tl.arange(0, BP)
    found = tl.zeros((BN * OT * MP * BP, AP), tl.float32)
    for frequency in range(0, A, PT):
        tall = _basis(basis0, high, frequency + tl.arange(0, PT), A)
        coupled = tl.zeros(((PT // S) * (BP // T), S * T * OT * MP, BN), tl.float32)
        for inner in range(0, I, IT):
            given = _signal(x, rows, batch, inner, I, A, B, BN, IT, AP, BP)
            part = _dot(given, tall, WIDE).to(dtype)
            if B > 1:
                part = tl.permute(tl.reshape(part, (BN * IT, BP, PT)), (0, 2, 1))
                part = tl.reshape(part, (BN * IT * PT, BP))
                part = _dot(part, _basis(basis1, wide, wide, B), WIDE).to(dtype)
            part = tl.permute(tl.reshape(part, (BN, IT, PT // S, S, BP // T, T)), (2, 4, 3, 5, 1, 0))
            part = tl.reshape(part, ((PT // S) * (BP // T), S * T * IT, BN))
            matrix = _matrix(spectrum, frequency, first, inner, I, O, MORE, A, B, S, T, IT, OT, MP, PT, BP)
            coupled += _dot(matrix, part, WIDE)
        back = tl.reshape(coupled.to(dtype), (PT // S, BP // T, S, T, OT * MP, BN))
        back = tl.reshape(tl.permute(back, (5, 4, 0, 2, 1, 3)), (BN * OT * MP * PT, BP))
        if B > 1:
            turned = tl.permute(_basis(basis1, wide, wide, B), (1, 0))
            back = _dot(back, turned, WIDE).to(dtype)
        back = tl.permute(tl.reshape(back, (BN * OT * MP, PT, BP)), (0, 2, 1))
        back = tl.reshape(back, (BN * OT * MP * BP, PT))
        found += _dot(back, tl.permute(tall, (1, 0)), WIDE)
    _finish(found, gates, bias, out, rows, batch, first, O, MORE, A, B, BN, OT, MP, AP, BP, BIAS)
