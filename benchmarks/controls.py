"""Controls of the same size, next to which a structure has to be judged: plain SVD and shuffled labels."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import gmcompress as gm
from gmcompress import GMError


class FactoredConv2d(nn.Module):
    """Two convolutions in a row, the truncated SVD of one: at a given rank the best in Frobenius norm in its view.

    The views of a weight (out, in, ky, kx) as a matrix: out × in·taps, a ky×kx convolution to `rank` channels and then
    a 1×1; or, `split`, out·ky × in·kx, a 1×kx convolution and then a ky×1.

    Source: Eckart and Young 1936; Jaderberg, Vedaldi and Zisserman 2014, scheme 2, for the split view.

    >>> dense = nn.Conv2d(4, 6, 3, padding=1, bias=False)
    >>> torch.allclose(FactoredConv2d(dense, 12, split=True).weight, dense.weight, atol=1e-5)
    True
    """

    def __init__(self, dense: nn.Conv2d, rank: int, *, split: bool) -> None:
        super().__init__()
        if dense.groups > 1 or dense.padding_mode != "zeros" or isinstance(dense.padding, str):
            raise GMError(f"the SVD control is written for plain convolutions, not for {dense}")
        o, i, ky, kx = dense.weight.shape
        (sy, sx), (py, px), (dy, dx) = dense.stride, dense.padding, dense.dilation
        bias = dense.bias is not None
        if split:
            self.first = nn.Conv2d(i, rank, (1, kx), (1, sx), (0, px), (1, dx), bias=False)
            self.second = nn.Conv2d(rank, o, (ky, 1), (sy, 1), (py, 0), (dy, 1), bias=bias)
        else:
            self.first = nn.Conv2d(i, rank, (ky, kx), (sy, sx), (py, px), (dy, dx), bias=False)
            self.second = nn.Conv2d(rank, o, 1, bias=bias)
        self.to(dense.weight)  # its device and dtype
        u, s, vh = torch.linalg.svd(matrix_view(dense.weight.detach().double(), split=split), full_matrices=False)
        left, right = u[:, :rank] * s[:rank].sqrt(), s[:rank, None].sqrt() * vh[:rank]
        inner = (o, ky, rank) if split else (o, 1, rank)
        with torch.no_grad():
            self.second.weight.copy_(left.reshape(inner).transpose(1, 2)[..., None])
            self.first.weight.copy_(right.reshape(self.first.weight.shape))
            if bias:
                self.second.bias.copy_(dense.bias)

    def forward(self, x: Tensor) -> Tensor:  # (batch, in, height, width)
        """The second convolution of the first."""
        return self.second(self.first(x))

    @property
    def weight(self) -> Tensor:  # (out, in, ky, kx)
        """The weight of the one convolution that the two are together."""
        product = torch.einsum("oray,rixb->oiaxyb", self.second.weight, self.first.weight)
        o, i = product.shape[:2]
        return product.reshape(o, i, product.shape[2] * product.shape[3], -1)


def matrix_view(weight: Tensor, *, split: bool) -> Tensor:
    """The weight of a convolution as out·ky × in·kx where `split`, else as out × in·taps."""
    return weight.transpose(1, 2).flatten(2).flatten(0, 1) if split else weight.flatten(1)


def svd_model(model: nn.Module, stored: Mapping[str, int], *, split: bool) -> nn.Module | None:
    """A copy with factored convolutions of at most `stored` numbers each; None where not even rank 1 fits in one."""
    layers = dict(model.named_modules())
    ranks = {
        name: numbers // sum(matrix_view(layers[name].weight, split=split).shape) for name, numbers in stored.items()
    }
    if min(ranks.values()) < 1:
        return None
    return gm.replace(model, {name: FactoredConv2d(layers[name], rank, split=split) for name, rank in ranks.items()})


class ShuffledConv2d(nn.Module):
    """A structured convolution with its rows and columns renamed: W[rows[p], columns[q]] = inner.weight[p, q]."""

    def __init__(self, inner: gm.GMConv2d, rows: Tensor, columns: Tensor) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("rows", rows.argsort(), persistent=False)
        self.register_buffer("columns", columns.argsort(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:  # (batch, in, height, width)
        """The convolution with the renamed weight."""
        inner = self.inner
        return F.conv2d(x, self.weight, inner.bias, inner.stride, inner.padding, inner.dilation, inner.groups)

    @property
    def weight(self) -> Tensor:  # (out, in, ky, kx)
        """The dense weight in the order of the network's channels."""
        return self.inner.weight[self.rows][:, self.columns]


def shuffled_model(model: nn.Module, plan: gm.Plan, *, seed: int) -> nn.Module:
    """The plan carried out under random names of every layer's rows and columns: the random structure of that size."""
    generator = torch.Generator().manual_seed(seed)
    shuffled = copy.deepcopy(model)
    layers = dict(shuffled.named_modules())
    orders = {}
    for name in plan.layers:
        weight = layers[name].weight
        orders[name] = [torch.randperm(each, generator=generator).to(weight.device) for each in weight.shape[:2]]
        rows, columns = orders[name]
        weight.data = weight.data[rows][:, columns]
    small = gm.compress(shuffled, plan=plan, inplace=True).model
    layers = dict(small.named_modules())
    return gm.replace(small, {name: ShuffledConv2d(layers[name], *order) for name, order in orders.items()})
