"""Choose, by measurement, how every structured layer of a finished network multiplies, and keep what that needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace as changed
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

from .attaching import structured
from .copies import duplicate, evaluating
from .errors import GMError, said
from .forward import Inputs, run_seeded, shell
from .layers import GMLayer, Verdict
from .metrics import latencies, measure_together
from .nesting import is_plain
from .reporting import Result
from .surgery import check_model

PATHS = ("auto", "dense", "structured")
GAIN = 0.97  # of the dense time that the fast product may take at most; what is nearer may be noise
SECONDS = 2.0  # at most, for the repeated runs of one layer
TOLERANCES = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}  # of the largest output


def freeze(model: Any, path: str = "auto", *, inputs: Inputs | None = None, repeats: int = 15) -> Any:
    """A copy of a compressed model for inference; a Result gives a Result, a module a module.

    "auto" times, layer by layer on what the model gives it for these inputs, the dense product against the fast product
    of the structure, and takes the faster one: so the inputs should have the batch size of later use. "dense" and
    "structured" take one wherever it exists. What a path needs of the weight is kept with the layer, and made anew when
    the weight changes; nothing of it is saved. In evaluation mode the structured weights get no gradients.

    `verdicts` tells what was chosen and why; with a Result it is in the report, whose metrics are measured again.

    Raises:
        GMError: another path, nothing is structured, or "auto" without inputs or with inputs that do not run.

    >>> from gmcompress.layers import GMLinear
    >>> frozen = freeze(nn.Sequential(GMLinear(64, 64, "C8xC8")), "structured")
    >>> verdicts(frozen)["0"].path
    'structured'
    """
    network = model.model if isinstance(model, Result) else model
    if path not in PATHS:
        raise GMError(f"a network is frozen as {', '.join(PATHS)}, not as {path!r}")
    check_model(network)
    if inputs is None and isinstance(model, Result):
        inputs = model.inputs
    if path == "auto" and inputs is None:
        raise GMError('freeze(model, "auto") measures on example inputs: give inputs=')
    frozen = evaluating(duplicate(network, {}))
    layers = structured(frozen)
    if not layers:
        raise GMError("the model has no structured layer; compress it first")
    chosen: dict[str, Verdict] = {}
    if path == "auto":
        assert inputs is not None
        chosen = _measured(evaluating(duplicate(network, {})), inputs, repeats)  # a run may write into its tensors
    for name, layer in layers.items():
        if name in chosen:
            layer.freeze_(chosen[name].path, chosen[name])
        elif not layer.is_frozen:
            _force(layer, path)
    if not isinstance(model, Result):
        return frozen
    return _result(model, frozen, inputs)


def verdicts(model: Result | nn.Module) -> dict[str, Verdict]:
    """What `freeze` chose for every structured layer, by name.

    Raises:
        GMError: the model is not frozen.
    """
    layers = structured(model.model if isinstance(model, Result) else model)
    found = {name: layer.verdict for name, layer in layers.items() if layer.verdict is not None}
    if not found:
        raise GMError("the model is not frozen; gmcompress.freeze does it")
    return found


def _force(layer: GMLayer, path: str) -> None:
    """Freeze a layer without measurement."""
    problem = layer.why_slow()
    if path == "structured" and problem is None:
        layer.freeze_("structured", Verdict("structured", reason="as asked"))
    else:
        reasons = {"dense": "as asked", "auto": problem or "not called on these inputs"}
        layer.freeze_("dense", Verdict("dense", reason=reasons.get(path, str(problem))))


def _measured(model: nn.Module, inputs: Inputs, repeats: int) -> dict[str, Verdict]:
    """A verdict on every layer that the model calls, each frozen when it is first called, equal layers alike.

    Raises:
        GMError: the model does not run on the inputs.
    """
    layers = structured(model)
    known: dict[Any, tuple[str, Verdict]] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def decide(layer: nn.Module, given: tuple[Any, ...]) -> None:
            assert isinstance(layer, GMLayer)
            if layer.is_frozen or layer.computes_with_others or not given or not isinstance(given[0], Tensor):
                return
            if not given[0].numel():  # as of an expert to which nothing is routed, on which nothing can be timed
                return
            if _is_differentiated(layer):
                layer.verdict = Verdict("dense", reason="torch.func differentiates it, where no path can be timed")
                return
            form = (given[0].shape, given[0].stride()) if is_plain(given[0]) else id(layer)  # others have none
            key = (repr(layer), form, given[0].dtype, given[0].device)
            if key not in known:
                known[key] = (name, _compare(layer, given[0], repeats))
                layer.verdict = known[key][1]
                return
            like, verdict = known[key]
            layer.freeze_(verdict.path, changed(verdict, reason=f"as {like}"))

        return decide

    handles = [each.register_forward_pre_hook(hook(name)) for name, each in layers.items() if each.why_slow() is None]
    try:
        run_seeded(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {name: each.verdict for name, each in layers.items() if each.verdict is not None}


def _is_differentiated(layer: GMLayer) -> bool:
    """Whether it runs inside of a transform such as jvp or jacrev, which does not let go of what is made there."""
    return any(is_functorch_wrapped_tensor(each.detach()) for each in layer.parts().values())


def _compare(layer: GMLayer, given: Tensor, repeats: int) -> Verdict:
    """Freeze one layer on the faster path for this input."""
    twin = shell(layer)
    assert isinstance(twin, GMLayer)
    twin.freeze_("structured")
    layer.freeze_("dense")
    dense = layer.forward(given)
    try:
        gap, largest = (float(each.abs().max()) for each in (dense - twin.forward(given), dense))
        problem = "" if gap <= TOLERANCES.get(dense.dtype, 1e-4) * largest else "is not accurate enough here"
    except Exception as failure:  # of inputs that only the dense product takes: nested ones, those inside of vmap
        problem = f"does not run here: {said(failure)}"
    if problem:
        verdict = Verdict("dense", reason=f"the fast product {problem}")
        layer.freeze_("dense", verdict)
        return verdict
    calls = [lambda: layer.forward(given), lambda: twin.forward(given)]
    (slow, _), (quick, _) = latencies(calls, repeats=repeats, seconds=SECONDS)
    faster = quick < GAIN * slow
    verdict = Verdict("structured" if faster else "dense", slow, quick, "faster" if faster else "slower, kept dense")
    layer.freeze_(verdict.path, verdict)
    return verdict


def _result(result: Result, frozen: nn.Module, inputs: Inputs | None) -> Result:
    """The result with the frozen model, its verdicts and its metrics."""
    found = verdicts(frozen)
    rows = tuple(row | found[row["layer"]].to_dict() for row in map(dict, result.report.layers))
    before, after = result.report.before, result.report.after
    if inputs is not None and result.teacher is not None:
        before, after = measure_together([result.teacher, frozen], inputs)
    report = changed(result.report, layers=rows, before=before, after=after)
    return changed(result, model=frozen, report=report)
