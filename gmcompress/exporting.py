"""Export: a compressed model as one file for elsewhere, kept only if the file, when run, gives the same outputs."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from .attaching import densify, structured
from .errors import GMError
from .files import new_file, read_tensors, usable, write_tensors
from .forward import Inputs, run, run_seeded, shell
from .nesting import describe, is_one_argument
from .reporting import Result
from .storage import check_storable, difference
from .surgery import check_model

FORMATS = {"onnx": ".onnx", "torch-export": ".pt2", "dense": ".safetensors"}
TOLERANCE = 1e-4
INLINE = 3 << 29  # bytes of weights in an ONNX file itself; protobuf ends at 2 GiB

Again = Callable[[Any], list[Tensor]]  # runs what is in a file


@dataclass(frozen=True)
class Export:
    """What was written, and how near its outputs are to those of the model.

    `difference` is the largest absolute difference over the largest output, on random inputs of the sizes in `batches`,
    or those given where the model runs on no random ones, on the CPU. `dynamic` says whether the file takes other batch
    sizes; `notes` why not, and what else is as one might not expect.
    """

    path: str
    format: str
    bytes: int  # of the file, and of one beside it that holds its weights where they are too large for it
    dynamic: bool
    batches: tuple[int, ...]
    difference: float
    tolerance: float
    notes: tuple[str, ...]

    def __str__(self) -> str:
        sizes = " and ".join(str(each) for each in dict.fromkeys(self.batches))
        checked = f"outputs differ by {self.difference:.1e} of the largest at batch {sizes}"
        return "\n".join([f"{self.path}: {self.bytes:,} bytes, {self.format}; {checked}", *self.notes])


def export(
    model: nn.Module | Result,
    path: str | Path,
    inputs: Inputs | None = None,
    *,
    format: str = "onnx",
    tolerance: float = TOLERANCE,
) -> Export:
    """Write a compressed model for use without this package, run the file, and keep it only if it computes the same.

    `format` is "onnx" (.onnx), "torch-export" (.pt2, for torch.export.load) or "dense" (.safetensors, the state dict of
    the dense model that was compressed). The first two hold the structured weights, except of layers that would not
    get smaller by that, and compute the dense ones from them; onnxruntime does so once, when it loads the file. The
    batch is the first axis of `inputs` (those of a Result where left out); the file takes any batch size if the model
    does. Everything happens on the CPU, in evaluation mode. An older file stays until the check has passed.

    Raises:
        GMError: an unknown format or another suffix, inputs that are no tensors or that the model does not accept, a
            model that cannot be exported, outputs that differ by more than `tolerance`, a package that is missing, or
            no place to write.

    >>> import tempfile
    >>> small = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     export(small, f"{folder}/small.safetensors", torch.zeros(2, 8), format="dense").batches
    (1, 3)
    """
    target = _target(usable(path), format)
    if isinstance(model, Result):
        inputs = model.inputs if inputs is None else inputs
        model = model.model
    check_model(model)
    ready = shell(model, private=True).cpu()
    example = _example(ready, inputs)
    with new_file(target) as beside, _quietly():
        # what a first run writes into its parameters would be in the file, and be written again by whoever loads it
        written = shell(model, private=True).cpu() if format == "dense" else ready
        example, again, notes = _WRITERS[format](written, example, beside)
        worst = _worst(ready, example, again)
        if not worst <= tolerance:
            raise GMError(
                f"the exported model's outputs differ by {worst:.2g} of the largest one, more than the tolerance "
                f"of {tolerance:g}; nothing was written to {target}"
            )
        size = sum(each.stat().st_size for each in beside.parent.iterdir())
    notes = (*notes, example.note) if example.note else notes
    return Export(str(target), format, size, example.dynamic, example.batches, worst, tolerance, notes)


def _target(path: Path, format: str) -> Path:
    """The path, after a look at the format, the suffix and the packages needed."""
    if format not in FORMATS:
        raise GMError(f"a format is {', '.join(FORMATS)}, not {format!r}")
    if path.suffix != FORMATS[format]:
        raise GMError(f"a file of format {format} is named *{FORMATS[format]}, not {path.name!r}")
    if path.is_dir():
        raise GMError(f"{path} is a folder; a file is needed")
    if format == "onnx":
        try:
            for each in ("onnx", "onnxscript", "onnxruntime"):
                import_module(each)
        except ImportError as problem:
            raise GMError(
                f'format onnx needs {problem.name}, which is not installed: pip install "gmcompress[onnx]", '
                "or pip install onnx onnxscript onnxruntime"
            ) from None
    return path


@contextmanager
def _quietly() -> Iterator[None]:
    """Keeps the progress, warnings and logs of torch's exporters from the terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


# ---------------------------------------------------------------------------------------------------------------------
# Inputs


@dataclass(frozen=True)
class _Example:
    """Example inputs on the CPU, and the batch sizes to check with: two others, or its own twice where it is fixed.

    Where the model runs `alone` on these inputs, whose values say how long or where something is, they are the check.
    A mapping holds the arguments by name, or is a `whole` batch, the one argument of the model.
    """

    inputs: Tensor | tuple[Tensor, ...] | dict[str, Tensor]
    batch: int  # the size of the first axis of those inputs that carry the batch
    batches: tuple[int, ...]
    note: str = ""  # why the batch size is fixed
    alone: bool = False
    whole: bool = False

    @property
    def dynamic(self) -> bool:
        return not self.note

    def carries(self, tensor: Tensor) -> bool:
        return bool(tensor.dim()) and tensor.shape[0] == self.batch

    def axes(self) -> Any:
        """Which axes are the batch, as torch.export takes it; None where it is fixed."""
        if not self.dynamic:
            return None
        batch = torch.export.Dim("batch")
        given, named = self.arguments(self.inputs)
        return tree_map(lambda each: {0: batch} if self.carries(each) else None, named or given)

    def arguments(self, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Tensor]]:
        """Inputs like these as arguments by position and by name."""
        if isinstance(inputs, dict) and not self.whole:
            return (), inputs
        return inputs if isinstance(inputs, tuple) else (inputs,), {}

    def draw(self, size: int, *, seed: int = 0) -> Any:
        """Random inputs of a batch size, of the mean and spread of the example, integers within its range."""
        generator = torch.Generator().manual_seed(seed)

        def one(each: Tensor) -> Tensor:
            if each.layout is not torch.strided:  # sparse ones, as of a graph, stay as they are
                return each
            shape = (size, *each.shape[1:]) if self.carries(each) else each.shape
            if each.is_floating_point():
                wide = each.double()
                spread = float(wide.std(correction=0)) or 1.0
                return (wide.mean() + spread * torch.randn(shape, generator=generator, device="cpu")).to(each.dtype)
            low, high = int(each.min()), int(each.max())
            return torch.randint(low, high + 1, shape, generator=generator, device="cpu").to(each.dtype)

        return tree_map(one, self.inputs)

    def checks(self) -> Iterator[tuple[int, Any]]:
        """The inputs that a file is checked with, each with its batch size."""
        for seed, size in enumerate(self.batches):
            yield size, self.inputs if self.alone else self.draw(size, seed=seed + 1)

    def problem(self, model: nn.Module) -> str:
        """Why a model does not run on what a file is checked with; "" where it does."""
        try:
            for _, given in self.checks():
                run(model, given)
        except GMError as problem:
            return str(problem)
        return ""


def _is_real(each: Any) -> bool:
    return isinstance(each, Tensor) and bool(each.numel()) and not each.is_complex() and not each.is_nested


def _example(model: nn.Module, inputs: Inputs | None) -> _Example:
    """The inputs as an example; the batch is the first size of a first axis at which the model takes others."""
    if inputs is None:
        raise GMError("example inputs are needed to export a model; pass inputs=")
    given: Any = dict(inputs) if isinstance(inputs, Mapping) else inputs
    given = tuple(given) if isinstance(given, list) else given
    tensors = list(given.values()) if isinstance(given, dict) else list(given) if isinstance(given, tuple) else [given]
    if not tensors or not all(map(_is_real, tensors)):
        raise GMError(f"inputs of an export are tensors of real numbers, none of them empty, not {describe(inputs)}")
    given = tree_map(lambda each: each.detach().cpu(), given)
    run(model, given)
    sizes = list(dict.fromkeys(each.shape[0] for each in tensors if each.dim())) or [0]
    reasons, is_whole = [], is_one_argument(model.forward, given)
    for size in sizes:
        found = _Example(given, size, (1, max(size, 2) + 1), whole=is_whole)
        if not (problem := found.problem(model)):
            return found
        reasons.append(problem)
    first = sizes[0]
    fixed = f"the batch size is fixed to {first}"
    note = f"{fixed}, because the model runs on no other: {reasons[0]}"
    found = _Example(given, first, (first, first), note, whole=is_whole)
    if not (problem := found.problem(model)):
        return found
    note = f"{fixed} and the check made on the inputs given, because the model runs on no random ones: {problem}"
    return replace(found, batches=(first,), note=note, alone=True)


# ---------------------------------------------------------------------------------------------------------------------
# Writers: each writes a file and returns the example to check it with, what runs it, and notes


Written = tuple[_Example, Again, tuple[str, ...]]


def _write_dense(model: nn.Module, example: _Example, file: Path) -> Written:
    plain = densify(model)
    state = plain.state_dict()
    check_storable(state)
    write_tensors(file, {name: each.clone() for name, each in state.items()})  # tied ones under all their names
    with torch.no_grad():
        for each in state.values():
            each.zero_()  # so that nothing but what is in the file can give the outputs
    plain.load_state_dict(read_tensors(file))
    return example, lambda given: _tensors(run_seeded(plain, given)), ()


def _write_torch(model: nn.Module, example: _Example, file: Path) -> Written:
    program, example, notes = _follow(model, example)
    program.example_inputs = None  # a file has no use for them
    try:
        torch.export.save(program, file)
        loaded = torch.export.load(file).module()
    except OSError:  # a full disk, which the caller tells
        raise
    except Exception as problem:  # what has no serial form, such as custom operators
        raise GMError(f"torch.export cannot write this {type(model).__name__}: {_said(problem)}") from problem
    return example, lambda given: _tensors(run_seeded(loaded, [given] if example.whole else given)), notes


def _write_onnx(model: nn.Module, example: _Example, file: Path) -> Written:
    import onnxruntime

    if any(each.dtype is torch.bfloat16 for each in [*model.state_dict().values(), *tree_leaves(example.inputs)]):
        raise GMError("onnxruntime does not run bfloat16 on a CPU; export model.float() with inputs in float32")
    program, example, notes = _follow(model, example)
    try:
        # not optimized: that would compute the dense weights now, where onnxruntime does it when it loads the file
        axes = example.axes()  # known to the program; here they give the axis its name
        made = torch.onnx.export(program, dynamo=True, verbose=False, optimize=False, dynamic_shapes=axes)
        assert made is not None
        for node in made.model.graph.all_nodes():
            node.metadata_props.clear()  # what was called where: many times the bytes of the node
        made.save(file, external_data=sum(each.nbytes for each in _stored(program)) > INLINE)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as problem:  # operations without a counterpart, types that are not known there, a full disk
        raise GMError(f"this {type(model).__name__} cannot be written as ONNX: {_said(problem)}") from problem
    names = [each.name for each in session.get_inputs()]

    def again(given: Any) -> list[Tensor]:
        named = example.arguments(given)[1]
        leaves = named or dict(zip(names, tree_leaves(given), strict=True))
        return [torch.from_numpy(each) for each in session.run(None, {name: leaves[name].numpy() for name in names})]

    return example, again, notes


_WRITERS = {"onnx": _write_onnx, "torch-export": _write_torch, "dense": _write_dense}


def _follow(model: nn.Module, example: _Example) -> tuple[torch.export.ExportedProgram, _Example, tuple[str, ...]]:
    """The model as torch.export sees it, with any batch size if it can be; the example as it then is; notes."""
    lean, notes = _lean(model)
    if example.dynamic:
        try:
            return _program(lean, example, example.draw(max(example.batch, 2))), example, notes
        except GMError as problem:
            size = example.batch
            note = f"the batch size is fixed to {size}: with any, {problem}"
            example = replace(example, batches=(size, size), note=note)
    return _program(lean, example, example.inputs), example, notes


def _lean(model: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """The model with those structured layers dense that would take more bytes, their table of labels counted."""
    found, heavy = structured(model), []
    for name, layer in found.items():
        labels = 0 if layer.labels is None else layer.labels.nbytes
        if labels + sum(each.nbytes for each in layer.parts().values()) >= layer.weight.nbytes:
            heavy.append(name)
    if not heavy:
        return model, ()
    note = f"{len(heavy)} of {len(found)} structured layers are written dense, which takes fewer bytes there"
    return densify(model, heavy), (note,)


def _program(model: nn.Module, example: _Example, inputs: Any) -> torch.export.ExportedProgram:
    args, kwargs = example.arguments(inputs)
    try:
        program = torch.export.export(model, args, kwargs, dynamic_shapes=example.axes())
    except Exception as problem:  # control flow on values, sizes that the code fixes
        raise GMError(f"torch.export cannot follow this {type(model).__name__}: {_said(problem)}") from problem
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # lines of source code, and where it lay
    return program


def _stored(program: torch.export.ExportedProgram) -> list[Tensor]:
    return [each for each in [*program.state_dict.values(), *program.constants.values()] if isinstance(each, Tensor)]


def _said(problem: BaseException) -> str:
    while problem.__cause__ is not None:  # the exporters wrap what happened in advice to their developers
        problem = problem.__cause__
    return f"{type(problem).__name__}: {' '.join(str(problem).split())[:300]}"


# ---------------------------------------------------------------------------------------------------------------------
# The check


def _tensors(output: Any) -> list[Tensor]:
    return [each for each in tree_leaves(output) if isinstance(each, Tensor)]


def _worst(model: nn.Module, example: _Example, again: Again) -> float:
    """The largest difference of any output, as `difference`; where both draw random numbers, they draw the same."""
    worst = 0.0
    for size, given in example.checks():
        wanted = _tensors(run_seeded(model, given))
        try:
            found = again(given)
        except Exception as problem:  # as many kinds as there are runtimes
            raise GMError(f"the exported model does not run at batch {size}: {_said(problem)}") from problem
        if describe(found) != describe(wanted):
            raise GMError(f"the exported model returns {describe(found)} where the model returns {describe(wanted)}")
        for new, old in zip(found, wanted, strict=True):
            gap, _ = difference(new, old)
            worst = max(worst, gap if gap == gap else float("inf"))
    return worst
