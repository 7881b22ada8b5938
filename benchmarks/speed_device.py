"""The rows of benchmarks/speed.py about a GPU: launches at batch 1, bytes over bandwidth at a large batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from unittest.mock import patch

import torch
from speed_cases import frozen
from torch import Tensor, nn

from gmcompress import GMLinear, kernels
from gmcompress.metrics import latencies
from gmcompress.products import layout_of

STRUCTURE, WIDTH, DTYPE = "C32xC32", 4096, torch.bfloat16
LAUNCHES = 1.3  # times an empty pair of launches that ours may take at batch 1
SPEEDUP, SHARE = 5.0, 0.6  # of cuBLAS dense, and of the time that the bytes alone take, at a large batch
ERROR, ROWS = 3e-2, 64  # relative to the largest output, and of how many of them
COPIED = 1 << 30  # bytes that the copy reads, and writes
Call = Callable[[], object]
Timer = Callable[[Mapping[str, Call]], Mapping[str, Mapping[str, float]]]


def bandwidth(device: torch.device, size: int = COPIED, rounds: int = 20) -> float:
    """Bytes per second of a copy on the device, read and written, the median of some rounds."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    ((middle, _),) = latencies([lambda: target.copy_(source)], repeats=rounds)
    return 2 * size / (middle / 1000)


def launch_pair(device: torch.device) -> Call:
    """Two launches of a kernel that does nothing; off a GPU two of torch's calls that do nothing."""
    if device.type == "cuda":
        return lambda: (torch.cuda._sleep(0), torch.cuda._sleep(0))
    empty = torch.empty(0)
    return lambda: (empty.view(0), empty.view(0))


def graphed(call: Call, device: torch.device) -> Call:
    """The call as a CUDA graph, without what Python takes to launch it; off a GPU the call itself."""
    if device.type != "cuda":
        return call
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def read_and_written(layer: GMLinear, x: Tensor) -> int:
    """Bytes that a product cannot do without: inputs, outputs, bias, bases and spectra, each of them once."""
    held = [each for name, each in layer.named_buffers() if name.startswith("ready_")]
    held += [] if layer.bias is None else [layer.bias]
    outputs = x.shape[0] * layer.out_features * x.element_size()
    return outputs + sum(each.numel() * each.element_size() for each in [x, *held])


def device_row(batch: int, device: torch.device, timer: Timer, speed: float) -> dict[str, Any]:
    """One row: ours by kernel and by torch's calls, cuBLAS and the empty pair, each as called and as a graph."""
    place: dict[str, Any] = {"device": device, "dtype": DTYPE}
    layer = GMLinear(WIDTH, WIDTH, STRUCTURE, **place)
    dense, ours = nn.Linear(WIDTH, WIDTH, **place).eval(), frozen(layer)
    x = torch.randn(batch, WIDTH, **place)
    ready, sizes = layer._ready(), layout_of(layer.structure.acting).combinations[0].sizes
    assert ready is not None, "the layer is frozen on its fast path"
    with torch.inference_mode():
        why = kernels.supports(x, ready, sizes, layer.bias)
        pair = launch_pair(device)
        calls: dict[str, Call] = {"ours": lambda: ours(x), "dense": lambda: dense(x), "launch pair": pair}
        calls |= {f"{name}, graph": graphed(call, device) for name, call in calls.items()}
        with patch.object(kernels, "supports", return_value="left out"):  # while the graph is made
            calls["torch's calls, graph"] = graphed(lambda: ours(x), device)
        with patch.object(kernels, "pays", return_value=True):
            calls["kernel, graph"] = graphed(lambda: ours(x), device)
        times = timer(calls)
        wanted = x[:ROWS].float() @ layer.weight.float().T + layer.bias.float()  # type: ignore[union-attr]
        error = float((ours(x)[:ROWS].float() - wanted).abs().max() / wanted.abs().max())
    tiles = None if why else str(kernels._tiles(kernels._case(x, ready, sizes), kernels._bucket(x), DTYPE, x.device))
    floor = 1000 * read_and_written(layer, x) / speed
    mine = times["ours, graph"]["ms"]
    found = {
        "speedup": times["dense, graph"]["ms"] / mine,
        "launches": times["ours"]["ms"] / times["launch pair"]["ms"],
        "launches_graph": mine / times["launch pair, graph"]["ms"],
        "share_of_floor": floor / mine,
    }
    kept = found["launches_graph"] <= LAUNCHES if batch == 1 else found["speedup"] >= SPEEDUP
    return {
        "benchmark": "speed",
        "part": "device",
        "what": f"{STRUCTURE} {WIDTH}→{WIDTH}",
        "batch": batch,
        "dtype": "bf16",
        **found,
        "floor_ms": floor,
        "gigabytes_per_second": speed / 1e9,
        "goal": 1.0 if batch == 1 else SPEEDUP,
        "asked": {"launches_graph": LAUNCHES} if batch == 1 else {"speedup": SPEEDUP, "share_of_floor": SHARE},
        "reached": error < ERROR and kept and (batch == 1 or found["share_of_floor"] >= SHARE),
        "largest_error": error,
        "kernel": why or tiles,
        "competitors": times,
    }
