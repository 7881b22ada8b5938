"""Measure a model: parameters, bytes, multiply-adds, latency; and how near its layers are to the group matrices."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .attaching import CHILD, dense_class, is_replaced, structured
from .copies import count_parameters, parameters_of, state_of
from .costs import expansion_macs
from .errors import GMError
from .forward import Inputs, run, run_seeded, shell
from .groupconv import GroupConv
from .homogeneous import HomogeneousConv
from .kinds import kind_of
from .lattice import LatticeConv
from .layers import GMLayer, GMWeight
from .nesting import describe
from .streams import seeded
from .structure import displacement_rank, distance, generator_displacement_rank
from .surgery import check_model, find_weight
from .tables import table_text


@dataclass(frozen=True)
class Metrics:
    """What a model costs. Everything that needs example inputs is None without them.

    `parameters` counts tied ones once; `bytes` are those of the tensors that a checkpoint holds. `macs` are the
    multiply-adds of one forward pass by formula, over all linear, convolution and recurrent layers, those on groups and
    the projections of nn.MultiheadAttention among them, as they are executed; of a layer on a group its matrix products
    and convolutions count, no products entry by entry. `counted_macs` are those of torch's FlopCounterMode, which also
    sees attention products and other calls that no layer owns, but neither an LSTM that a CPU runs in one call nor
    elementwise products, as a frozen layer has in place of small matrix products for up to 4 inputs.
    `latency_ms` is the median over interleaved runs, `latency_spread_ms` the distance between their
    quartiles; compare latencies only within one measurement.
    """

    parameters: int
    bytes: int
    macs: int | None
    counted_macs: int | None
    latency_ms: float | None
    latency_spread_ms: float | None
    inputs: str | None
    device: str
    dtype: str
    threads: int

    def to_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)

    def __str__(self) -> str:
        rows = [(name.replace("_", " "), "-" if value is None else value) for name, value in self.to_dict().items()]
        return table_text("", ["measure", "value#"], rows)


def measure(model: nn.Module, inputs: Inputs | None = None, *, repeats: int = 15) -> Metrics:
    """The metrics of a model in evaluation mode; the model itself is left alone.

    Raises:
        GMError: the model is wrapped, or does not run on the inputs.

    >>> measure(nn.Linear(8, 4), torch.zeros(2, 8)).macs
    64
    """
    return measure_together([model], inputs, repeats=repeats)[0]


def measure_together(
    models: Sequence[nn.Module], inputs: Inputs | None = None, *, repeats: int = 15
) -> tuple[Metrics, ...]:
    """The metrics of several models on the same inputs, their timed runs interleaved so that latencies compare."""
    for model in models:
        check_model(model)
    shells = [shell(model, private=inputs is not None) for model in models]  # a run may write into its parameters
    if inputs is None:
        return tuple(_metrics(each, None, (None, None), (None, None)) for each in shells)
    with seeded(shells[0]):
        macs = [count_macs(each, inputs) for each in shells]
        calls = [lambda each=each: run(each, inputs) for each in shells]
        times = latencies(calls, repeats=repeats)
    return tuple(_metrics(*each) for each in zip(shells, [inputs] * len(shells), macs, times, strict=True))


def _metrics(
    model: nn.Module,
    inputs: Inputs | None,
    macs: tuple[int | None, int | None],
    latency: tuple[float | None, float | None],
) -> Metrics:
    first = next(iter(parameters_of(model).values()), torch.empty(0))
    return Metrics(
        parameters=count_parameters(model),
        bytes=stored_bytes(model),
        macs=macs[0],
        counted_macs=macs[1],
        latency_ms=latency[0],
        latency_spread_ms=latency[1],
        inputs=None if inputs is None else describe(inputs),
        device=str(first.device),
        dtype=str(first.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
    )


def stored_bytes(model: nn.Module) -> int:
    """Bytes of the tensors in the model's state dict, tied ones once."""
    tensors = {id(each): each for each in state_of(model).values() if isinstance(each, Tensor)}
    return sum(each.numel() * each.element_size() for each in tensors.values())


def latencies(
    calls: Sequence[Callable[[], object]], *, repeats: int, seconds: float = 20.0, turn: float = 0.0
) -> list[tuple[float, float]]:
    """Median and distance between quartiles, in milliseconds, of each call; the runs of all calls take turns.

    Slow calls are repeated less often: after `seconds` in all no further round begins, but three are always run. Quick
    ones are repeated, up to 100 times, within a turn of `turn` seconds, so that the clock is not what is measured.
    """
    times: list[list[float]] = [[] for _ in calls]
    inner = [_calls_in(turn, each) for each in calls]
    collecting = gc.isenabled()
    gc.disable()
    try:
        began = time.perf_counter()
        for done in range(max(repeats, 2)):
            if done >= 3 and time.perf_counter() - began > seconds:
                break
            for run_once, count, taken in zip(calls, inner, times, strict=True):
                taken.append(1000 * _seconds(run_once, count))
    finally:
        if collecting:
            gc.enable()
    quartiles = [statistics.quantiles(each, n=4) for each in times]
    return [(middle, high - low) for low, middle, high in quartiles]


def _calls_in(turn: float, call: Callable[[], object]) -> int:
    """How many runs of a call, of which a first has been done, fit into so many seconds: between 1 and 100."""
    call()  # the first run allocates
    if not turn:
        return 1
    once = min(_seconds(call, 1) for _ in range(2))  # of two, as one may be interrupted
    return max(1, min(100, int(turn / max(once, 1e-6))))


def _seconds(call: Callable[[], object], count: int) -> float:
    """Of one of so many runs in a row."""
    _synchronize()
    start = time.perf_counter()
    for _ in range(count):
        call()
    _synchronize()
    return (time.perf_counter() - start) / count


def _synchronize() -> None:
    if torch.cuda.is_initialized():  # asking whether a GPU is available takes up to 0.3 ms, which would be timed
        torch.cuda.synchronize()


def count_macs(model: nn.Module, inputs: Inputs) -> tuple[int, int | None]:
    """Multiply-adds of one forward pass: by formula over the layers, and half of what FlopCounterMode counts.

    The two agree where all products happen in layers; attention products and functional calls make the second larger.
    It is None where the model does not run while being counted, as one that takes gradients of its own does not.
    """
    total = 0

    def add(module: nn.Module, _inputs: Any, output: Any) -> None:
        nonlocal total
        if isinstance(output, Tensor):
            total += layer_macs(module, output, _inputs[0] if _inputs else None)

    def add_recurrent(module: nn.Module, given: Any, named: Mapping[str, Any], _output: Any) -> None:
        nonlocal total
        total += _recurrent_macs(module, given[0] if given else named["input"])

    def add_attention(module: nn.Module, given: Any, named: Mapping[str, Any], _output: Any) -> None:
        nonlocal total
        assert isinstance(module, nn.MultiheadAttention), "only those have this hook"
        total += _projection_macs(module, **dict(zip(("query", "key", "value"), given, strict=False)), **named)

    handles = [each.register_forward_hook(add) for each in model.modules() if is_counted(each)]
    recurrent = (each for each in model.modules() if isinstance(each, nn.RNNBase | nn.RNNCellBase))
    handles += [each.register_forward_hook(add_recurrent, with_kwargs=True) for each in recurrent]
    attentions = [
        each
        for each in model.modules()
        if isinstance(each, nn.MultiheadAttention) and type(each).forward is nn.MultiheadAttention.forward
    ]
    handles += [each.register_forward_hook(add_attention, with_kwargs=True) for each in attentions]
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # its one call is unknown to FlopCounterMode
    try:
        try:
            with FlopCounterMode(display=False) as counter:
                run_seeded(model, inputs)
            counted: int | None = counter.get_total_flops() // 2
        except GMError:
            total, counted = 0, None
            run_seeded(model, inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for handle in handles:
            handle.remove()
    return total, counted


def _projection_macs(layer: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, **_options: Any) -> int:
    """Multiply-adds of the four projections, whose weights the layer hands to torch itself; all have embed_dim rows."""
    return layer.embed_dim * (2 * query.numel() + key.numel() + value.numel())


def _recurrent_macs(layer: nn.Module, given: Any) -> int:  # (..., inputs), or a packed sequence
    """Multiply-adds of a recurrent layer or cell, each of whose weights is applied once at every step."""
    steps = given.data.numel() // given.data.shape[-1]
    keys = layer._flat_weights_names if isinstance(layer, nn.RNNBase) else ("weight_ih", "weight_hh")
    return steps * sum(prod(_weight_shape(layer, key)) for key in keys if key.startswith("weight"))


_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_ON_GROUPS = (GroupConv, HomogeneousConv, LatticeConv)
_COUNTED = (nn.Linear, nn.Bilinear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED, GMLayer, *_ON_GROUPS)
_COUNTED_BY_NAME = ("transformers.pytorch_utils.Conv1D",)


def is_counted(layer: nn.Module) -> bool:
    """Whether a module is a linear layer or convolution, on a group too, or computes a weight."""
    names = {kind_of(cls) for cls in dense_class(layer).__mro__}
    return isinstance(layer, _COUNTED) or not names.isdisjoint(_COUNTED_BY_NAME)


def layer_macs(layer: nn.Module, output: Tensor, given: Tensor | None = None) -> int:
    """Multiply-adds of one call of a layer as it is executed, from the shape of its output (and input, if transposed).

    A structured layer runs the dense product with its computed weight, after the products that compute it unless it is
    frozen; or the fast product, as it was frozen or as takes far fewer.
    """
    if isinstance(layer, _ON_GROUPS):
        return layer.multiply_adds(output.shape)
    if isinstance(layer, GMLayer) and given is not None and layer.takes_fast_product(given):
        return layer.fast_macs(given)
    extra = 0
    if isinstance(layer, GMLayer) and not layer.is_frozen:
        extra = expansion_macs(layer.structure, layer.weight_shape)
    if isinstance(layer, GMWeight):  # the product is its module's
        return extra if layer.original is None else 0
    return _positions(layer, output, given) * prod(_weight_shape(layer)) + extra


def _weight_shape(layer: nn.Module, key: str = "weight") -> tuple[int, ...]:
    """The shape of a parameter, dense or structured."""
    attached = layer._modules.get(CHILD + key)
    if isinstance(attached, GMWeight):
        return attached.view.shape
    if isinstance(layer, GMLayer):
        return layer.weight_shape
    weight = getattr(layer, key, None)  # which a subclass may have packed away
    return tuple(weight.shape) if isinstance(weight, Tensor) else (0,)


def _positions(layer: nn.Module, output: Tensor, given: Tensor | None) -> int:
    """How often a layer applied its weight in one call: numbers of output over rows, of input if transposed."""
    shape = _weight_shape(layer)
    if not prod(shape):
        return 0
    if isinstance(layer, _TRANSPOSED):
        return 0 if given is None else given.numel() // shape[0]
    by_name = not isinstance(layer, _COUNTED)  # which lies (columns, rows)
    return output.numel() // shape[1 if by_name else 0]


def layer_positions(model: nn.Module, inputs: Inputs, names: Sequence[str]) -> dict[str, int]:
    """How often each weight is applied in one run by the layers that are counted; 0 where it never is."""
    counts = dict.fromkeys(names, 0)
    handles = []
    for name in names:

        def hook(module: nn.Module, given: Any, output: Any, name: str = name) -> None:
            if isinstance(output, Tensor):
                counts[name] += _positions(module, output, given[0] if given else None)

        for module in _appliers(model, name):
            handles.append(module.register_forward_hook(hook))
    try:
        run_seeded(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return counts


def replaced_positions(model: nn.Module, inputs: Inputs, names: Sequence[str]) -> dict[str, int]:
    """How often each weight is applied by a layer that would be replaced by a structured one; 0 for all others.

    Those stay in their modules, which apply them as dense ones whatever their structure, so that none is cheaper.
    """
    replaced = [name for name in names if is_replaced(model, name)]
    return dict.fromkeys(names, 0) | layer_positions(model, inputs, replaced)


def _appliers(model: nn.Module, name: str) -> list[nn.Module]:
    """The modules, counted ones alone, that apply the weight of this name."""
    module, key = find_weight(model, name)
    weight = module._parameters.get(key)
    if key != "weight" or weight is None:
        return [module] if key == "weight" and is_counted(module) else []
    return [each for each in model.modules() if is_counted(each) and each._parameters.get(key) is weight]


def equivariance(model: nn.Module, *, tolerance: float | None = None) -> list[dict[str, Any]]:
    """Per structured layer, how near its weight is to the group matrices, relative to its norm, and both ranks.

    Fields: `layer`, `structure`, `distance`, `displacement_rank` (the paper's; None where the rows are not the group
    itself) and `generator_displacement_rank`, two different notions; all None where the structure has no group. Both
    are numerical ranks: singular values count above `tolerance` × the largest one of the weight, by default the larger
    dimension × the machine epsilon.

    Raises:
        GMError: the model has no structured layer.
    """
    layers = structured(model)
    if not layers:
        raise GMError("the model has no structured layer; compress it first")
    rows: list[dict[str, Any]] = []
    for name, layer in layers.items():
        weight, structure = layer.weight.detach(), layer.structure
        if structure.group is None:
            empty = dict.fromkeys(("distance", "displacement_rank", "generator_displacement_rank"))
            rows.append({"layer": name, "structure": str(structure), **empty})
            continue
        paper = displacement_rank(weight, structure, tolerance=tolerance) if structure.is_regular else None
        rows.append(
            {
                "layer": name,
                "structure": str(structure),
                "distance": distance(weight, structure, relative=True),
                "displacement_rank": paper,
                "generator_displacement_rank": generator_displacement_rank(weight, structure, tolerance=tolerance),
            }
        )
    return rows
