"""One model of timm, taken by gmcompress from stage to stage: what `coverage.py` does in a process of its own."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

TOLERANCE = 1e-4  # relative to the largest output; loaded and densified models compute the same in another order


class DifferenceError(Exception):
    """Outputs that should be equal and are not."""


def image_size(config: Mapping[str, Any], largest: int) -> tuple[int, ...]:
    """Channels, height and width of a model's images, halved down to `largest` pixels as far as it takes such; 0: not.

    >>> image_size({"input_size": (3, 768, 768), "min_input_size": (3, 96, 96), "fixed_input_size": False}, 512)
    (3, 384, 384)
    """
    channels, *sides = config["input_size"]
    least = config.get("min_input_size")
    if largest and least is not None and not config.get("fixed_input_size"):
        while max(sides) > largest and all(each % 2 == 0 and each // 2 >= min(least[1:]) for each in sides):
            sides = [each // 2 for each in sides]
    return channels, *sides


def tensors(outputs: Any) -> list[Any]:
    """The floating-point tensors in the outputs of a model, however nested."""
    from torch import Tensor
    from torch.utils._pytree import tree_leaves

    return [each for each in tree_leaves(outputs) if isinstance(each, Tensor) and each.is_floating_point()]


def assert_equal(found: Any, expected: Any) -> None:
    """Equal outputs, up to rounding.

    Raises:
        DifferenceError: they are not.
    """
    pairs = list(zip(tensors(found), tensors(expected), strict=True))
    if not pairs:
        raise DifferenceError("there are no tensors to compare")
    worst = max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-12)) for a, b in pairs)
    if not worst <= TOLERANCE:
        raise DifferenceError(f"outputs differ by {worst:.1e} of the largest")


def weightiest(reasons: Sequence[tuple[str, int]], total: int) -> dict[str, Any]:
    """Of reasons that differ in numbers alone the kind that leaves most parameters dense, told by its heaviest layer.

    >>> weightiest([("3 rows", 10), ("5 rows", 20), ("the stem", 25)], 100)
    {'reason': '5 rows', 'layers': 2, 'share': 0.3}
    """
    kinds: dict[str, list[tuple[int, str]]] = {}
    for reason, weight in reasons:
        kinds.setdefault(re.sub(r"\d[\d,]*", "#", reason), []).append((weight, reason))
    most = max(kinds.values(), key=lambda each: sum(weight for weight, _ in each))
    return {"reason": max(most)[1], "layers": len(most), "share": sum(weight for weight, _ in most) / total}


class Subject:
    """One model on its way through the stages; each stage leaves behind what later ones need."""

    def __init__(self, name: str, group: str, folder: Path, *, largest_image: int) -> None:
        self.name, self.group, self.folder, self.largest_image = name, group, folder, largest_image
        self.facts: dict[str, Any] = {}

    def build(self) -> None:
        """The dense model, with random weights, and two random images."""
        import timm
        import torch

        torch.manual_seed(0)
        self.model = timm.create_model(self.name).eval()
        size = image_size(self.model.pretrained_cfg, self.largest_image)
        self.facts["input_size"] = list(size)
        self.inputs = torch.randn(2, *size)
        self.facts["parameters"] = sum(each.numel() for each in self.model.parameters())

    def compress(self) -> None:
        """Compress it with its classifier, and note what share of its parameters that reached, with and without it.

        And why most of the rest was left.
        """
        import gmcompress as gm

        default = gm.plan(self.model, self.group, rank=1)
        classifiers = [site.name for site in default.sites if site.role == "classifier"]
        self.result = gm.compress(self.model, self.group, rank=1, include=classifiers)
        plan, total = self.result.plan, self.facts["parameters"]
        weights = {row["name"]: row["dense"] for row in plan.rows()}
        self.facts["reached"] = sum(weights[name] for name in plan.layers) / total
        self.facts["reached_by_default"] = sum(weights[name] for name in default.layers) / total
        self.facts["kept"] = plan.parameters / total
        reasons = [(reason, weights[name]) for name, reason in plan.skipped.items()]
        vectors = ("parameters that are no weight of a layer", total - sum(weights.values()))
        self.facts["weighs_most"] = weightiest([*reasons, vectors], total)

    def forward(self) -> None:
        """Run it."""
        from gmcompress.forward import run

        self.outputs = run(self.result.model.eval(), self.inputs)
        self.facts["largest_output"] = max(
            float(each.abs().max()) for each in tensors(self.outputs)
        )  # 0 proves nothing

    def backward(self) -> None:
        """Train one step; some structured layer has to receive a gradient."""
        from gmcompress.layers import GMLayer

        model = self.result.model.train()
        sum(each.float().square().sum() for each in tensors(model(self.inputs))).backward()
        layers = [each for each in model.modules() if isinstance(each, GMLayer)]
        if not any(part.grad is not None for each in layers for part in each.parts().values()):
            raise DifferenceError("no structured layer received a gradient")
        model.zero_grad()
        model.eval()

    def save(self) -> None:
        """Write it."""
        import gmcompress as gm
        from gmcompress.forward import run

        self.outputs = run(self.result.model, self.inputs)  # the training step moved running means
        gm.save(self.result, self.folder / "small")

    def load(self) -> None:
        """Read it, onto another random model; equal outputs."""
        import timm

        import gmcompress as gm
        from gmcompress.forward import run

        self.loaded = gm.load(self.folder / "small", timm.create_model(self.name))
        assert_equal(run(self.loaded, self.inputs), self.outputs)

    def densify(self) -> None:
        """Back to plain layers; equal outputs."""
        import gmcompress as gm
        from gmcompress.forward import run

        assert_equal(run(gm.densify(self.loaded), self.inputs), self.outputs)

    def export(self) -> None:
        """torch.export, and run what it gave; equal outputs."""
        import torch

        program = torch.export.export(self.loaded, (self.inputs,))
        with torch.no_grad():
            assert_equal(program.module()(self.inputs), self.outputs)

    def dense_onnx(self) -> None:
        """Whether the dense model can be written as ONNX at all; asked only where the compressed one cannot."""
        self.facts["dense_onnx_difference"] = self._onnx(self.model)

    def onnx(self) -> None:
        """The compressed model as ONNX, run by onnxruntime on other inputs and batch sizes; equal outputs."""
        self.facts["onnx_difference"] = self._onnx(self.loaded)

    def _onnx(self, model: Any) -> float:
        import gmcompress as gm

        return gm.export(model, self.folder / "model.onnx", self.inputs, tolerance=TOLERANCE).difference


def attempt(stage: Callable[[], None]) -> str:
    """ "ok", or the error in one line."""
    try:
        stage()
    except Exception as problem:  # whatever it is, it is a result
        return one_line(problem)
    return "ok"


def one_line(problem: Exception) -> str:
    """An error in a line.

    >>> one_line(ValueError("two\\nlines"))
    'ValueError: two lines'
    """
    return " ".join(f"{type(problem).__name__}: {problem}".split())[:300]
