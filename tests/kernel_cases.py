"""The laws of the kernels, run in a process of its own: Triton decides at its import whether it interprets.

python tests/kernel_cases.py cpu        the largest relative errors of every case, one line of JSON
"""

from __future__ import annotations

import json
import sys

import torch
from market import random_tensors
from torch import Tensor

from gmcompress import kernels
from gmcompress.products import layout_of, linear, prepare
from gmcompress.structure import Structure, expand

CASES = (  # structure, shape of the weight, inputs, with a bias
    ("C8", (16, 24), 3, True),
    ("C8", (24, 72), 5, False),
    ("C4xC4", (32, 16), 5, True),
    ("C8xC8", (128, 64), 1, False),
    ("C8xC8", (64, 192), 4, True),
    ("C2^4", (48, 64), 3, True),
    ("C2^10", (1024, 1024), 2, False),
    ("C12xC12", (144, 288), 3, True),
    ("C64xC2", (128, 256), 5, False),
    ("C16xC4+displacement:1", (128, 192), 7, True),
    ("C64xC2+displacement:2", (384, 128), 5, True),
    ("C32xC32+displacement:2", (2048, 1024), 2, True),
    ("C8xC8+displacement:1+lowrank:3", (128, 64), 3, True),
)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).abs().max() / wanted.abs().max())


def errors(about: tuple[str, tuple[int, int], int, bool], dtype: torch.dtype, device: str) -> dict[str, float | str]:
    """Of the kernel against the dense weight, the same with a wrong spectrum, and of the path of torch."""
    text, shape, count, biased = about
    structure, draw = Structure.parse(text), torch.Generator().manual_seed(0)
    tensors = {name: each.to(dtype) for name, each in random_tensors(structure, shape, draw).items()}
    x = torch.randn(count, shape[1], generator=draw).to(dtype)
    bias = torch.randn(shape[0], generator=draw).to(dtype) if biased else None
    exact = expand({name: each.double() for name, each in tensors.items()}, structure, shape)
    wanted = x.double() @ exact.T + (0 if bias is None else bias.double())
    ready = {name: each.to(device) for name, each in prepare(tensors, structure).items()}
    x, bias = x.to(device), None if bias is None else bias.to(device)
    sizes, interpret = layout_of(structure.acting).combinations[0].sizes, device == "cpu"
    why = kernels.supports(x, ready, sizes, bias, interpret=interpret)
    wrong = {**ready, "spectrum0": ready["spectrum0"].roll(1, 0)}
    calls: list[Tensor] = []
    product = kernels.product
    kernels.product = lambda *given: calls.append(product(*given)) or calls[-1]  # type: ignore[assignment,func-returns-value]
    try:
        found, turned = (linear(x, each, structure, bias, interpret=interpret).cpu() for each in (ready, wrong))
    finally:
        kernels.product = product
    case = kernels._case(x, ready, sizes)
    choices = kernels.candidates(case, kernels._power(count), dtype.itemsize)
    widest = max(choices, key=lambda each: each.BN * each.OT * each.IT * each.PT)
    other = kernels._launch(x, ready, bias, case, widest)
    with torch.enable_grad():  # a gradient is wanted: the path of torch
        plain = linear(x.requires_grad_(), ready, structure, bias).detach().cpu()
    return {
        "why": why or "",
        "launches": len(calls),
        "dtype": str(found.dtype),
        "kernel": relative(found, wanted),
        "control": relative(turned, wanted),
        "tiles": relative(other, calls[0].double()),
        "torch": relative(plain, wanted),
    }


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    kernels.pays = lambda *_given: True  # type: ignore[assignment]
    each = {f"{case} {name}": errors(case, dtype, sys.argv[1]) for case in CASES for name, dtype in DTYPES.items()}
    print(json.dumps(each))
