"""Fine-tune a compressed model against the dense one: distillation, BatchNorm recalibration, exact resumption."""

from __future__ import annotations

import copy
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from .checkpoints import load_checkpoint, save_checkpoint
from .errors import GMError, nearest_names
from .surgery import call, check_model, describe

Evaluate = Callable[[nn.Module], Mapping[str, float]]
Progress = Callable[[int, int, int, float], None]  # epoch, step, steps, loss
JUDGED = 8  # batches on which recalibrated statistics are compared with the old ones
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass(frozen=True)
class Recipe:
    """How to fine-tune; everything that the result depends on, besides model, teacher and data.

    The loss is `distillation` × T² × KL(teacher ‖ student) at temperature T, plus `task` × cross-entropy with the
    labels. `optimizer` is a name that timm knows; "auto" is SGD with Nesterov momentum for networks with BatchNorm and
    AdamW for others, at learning rates of 0.01 and 3e-4 where `lr` is None. The rate warms up over `warmup` epochs and
    follows a cosine to zero. `recalibrate` re-estimates BatchNorm statistics on the training data first: "auto" keeps
    them if the distillation loss on these batches falls by it. `ema` is the decay of an exponential moving average of
    the weights, which then is the result. `amp` is "bf16", "fp16" or "no", None meaning bf16 on CUDA and no on the CPU.
    """

    epochs: int
    lr: float | None = None
    optimizer: str = "auto"
    weight_decay: float = 5e-4
    momentum: float = 0.9
    warmup: float = 0.2
    temperature: float = 4.0
    distillation: float = 0.9
    task: float = 0.1
    recalibrate: bool | str = "auto"
    recalibration_batches: int = 40
    clip: float | None = 5.0
    ema: float | None = None
    amp: str | None = None
    device: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for key in ("temperature", "recalibration_batches", "lr", "clip"):
            value = getattr(self, key)
            if value is not None and not value > 0:
                raise GMError(f"{key} must be positive, not {value!r}")
        for key in ("epochs", "weight_decay", "momentum", "warmup", "distillation", "task"):
            if not getattr(self, key) >= 0:
                raise GMError(f"{key} must be at least 0, not {getattr(self, key)!r}")
        if self.ema is not None and not 0 < self.ema < 1:
            raise GMError(f"ema is a decay between 0 and 1, not {self.ema!r}")
        if self.recalibrate not in (True, False, "auto"):
            raise GMError(f'recalibrate is True, False or "auto", not {self.recalibrate!r}')
        if self.amp not in (None, "no", "bf16", "fp16"):
            raise GMError(f'amp is "no", "bf16" or "fp16", not {self.amp!r}')
        if self.optimizer != "auto":
            from timm.optim import list_optimizers

            if self.optimizer not in (known := list_optimizers()):
                near = nearest_names(self.optimizer, known)
                raise GMError(f"timm knows no optimizer {self.optimizer!r}; the nearest are {near}")


def fine_tune(
    model: nn.Module,
    loader: Iterable[Any],
    recipe: Recipe,
    *,
    teacher: nn.Module | None = None,
    evaluate: Evaluate | None = None,
    folder: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """A fine-tuned copy of the model, in evaluation mode, and one row of history per epoch.

    A batch is (inputs, labels), inputs alone, or a mapping with or without "labels"; without labels the loss is
    distillation alone, without a teacher it is the task alone. Every epoch draws its random numbers from (seed, epoch),
    so that with a `folder` of checkpoints, written after each epoch, `resume=True` goes on exactly where the last
    complete epoch ended. `evaluate(model)` returns further columns of the history, such as an accuracy. Runs through
    accelerate: on the CPU, one GPU, or several when launched by `accelerate launch`.

    Raises:
        GMError: an empty loader, a teacher with other outputs, neither teacher nor labels, a loss that is not finite,
            or a checkpoint of another model or recipe.
    """
    check_model(model)
    run = _Run(copy.deepcopy(model), teacher, loader, recipe)
    folder = None if folder is None else Path(folder)
    history: list[dict[str, Any]] = []
    if resume:
        if folder is None:
            raise GMError("resume=True needs the folder of the checkpoints")
        history = load_checkpoint(folder, run.state(), asdict(recipe))
    with _own_random_numbers():
        if not history:
            _seed(recipe.seed, 0)
            run.recalibrate()
        for epoch in range(len(history), recipe.epochs):
            _seed(recipe.seed, epoch + 1)
            row = run.epoch(epoch, progress)
            if evaluate is not None:
                row.update(evaluate(run.result()))
            history.append(row)
            if folder is not None and run.accelerator.is_main_process:
                save_checkpoint(folder, run.state(), history, asdict(recipe))
            run.accelerator.wait_for_everyone()
    return run.finish(), history


class _Run:
    """Everything that one training holds: prepared model, teacher, loader, optimizer, schedule and average."""

    def __init__(self, model: nn.Module, teacher: nn.Module | None, loader: Iterable[Any], recipe: Recipe) -> None:
        from timm.optim import create_optimizer_v2
        from timm.scheduler import create_scheduler_v2
        from timm.utils import ModelEmaV3

        _check_length(loader)
        self.recipe = recipe
        self.accelerator = _accelerator(recipe)
        self.device = self.accelerator.device
        model = model.to(self.device)
        self.teacher = None if teacher is None else copy.deepcopy(teacher).eval().to(self.device)
        self.ema = None if recipe.ema is None else ModelEmaV3(model, decay=recipe.ema)
        name, lr = _optimizer_of(model, recipe)
        decay, momentum = recipe.weight_decay, recipe.momentum
        self.optimizer = create_optimizer_v2(model, opt=name, lr=lr, weight_decay=decay, momentum=momentum)
        self.model, self.stepper, self.loader = self.accelerator.prepare(model, self.optimizer, loader)
        self.steps = len(self.loader)  # of this process, where there are several
        self.schedule, _ = create_scheduler_v2(
            self.optimizer,
            sched="cosine",
            num_epochs=max(recipe.epochs, 1),
            warmup_epochs=recipe.warmup,
            warmup_lr=lr / 25,
            step_on_epochs=False,
            updates_per_epoch=self.steps,
        )

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds, by name."""
        plain = self.accelerator.unwrap_model(self.model)
        averaged = {} if self.ema is None else {"ema": self.ema.module}
        scaler = {} if self.accelerator.scaler is None else {"scaler": self.accelerator.scaler}
        return {"model": plain, "optimizer": self.optimizer, **averaged, **scaler}

    def result(self) -> nn.Module:
        """The model as it would be handed over now: the average where there is one, in evaluation mode."""
        module = self.accelerator.unwrap_model(self.model) if self.ema is None else self.ema.module
        return module.eval()

    def finish(self) -> nn.Module:
        """The result, free of what accelerate wrapped around it."""
        return self.accelerator.unwrap_model(self.result(), keep_fp32_wrapper=False)

    def losses(self, batch: Any) -> Tensor:
        """The loss of one batch."""
        inputs, labels = _parts(batch, self.device)
        with self.accelerator.autocast():
            found = _logits(call(self.model, inputs))
            wanted = None
            if self.teacher is not None:
                with torch.no_grad():
                    wanted = _logits(call(self.teacher, inputs))
        return distillation_loss(found, wanted, labels, self.recipe)

    def epoch(self, number: int, progress: Progress | None) -> dict[str, Any]:
        """One pass over the loader."""
        self.model.train()
        start, total, seen = time.perf_counter(), 0.0, 0
        for step, batch in enumerate(self.loader):
            self.schedule.step_update(number * self.steps + step)
            loss = self.losses(batch)
            value = float(loss.detach())
            if not math.isfinite(value):
                raise GMError(f"the loss is {value} in epoch {number}, step {step}; try a smaller learning rate")
            self.accelerator.backward(loss)
            if self.recipe.clip is not None:
                self.accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
            self.stepper.step()
            self.stepper.zero_grad()
            if self.ema is not None:
                self.ema.update(self.accelerator.unwrap_model(self.model))
            total, seen = total + value, seen + 1
            if progress is not None:
                progress(number, step + 1, self.steps, value)
        if not seen:
            raise GMError("the loader is empty: it gave no batch")
        mean = self.accelerator.reduce(torch.tensor(total / seen, device=self.device), "mean")  # over processes
        rate = self.optimizer.param_groups[0]["lr"]
        return {"epoch": number, "loss": float(mean), "lr": rate, "seconds": time.perf_counter() - start}

    def recalibrate(self) -> None:
        """Re-estimate the BatchNorm statistics, as the recipe says."""
        norms = [each for each in self.model.modules() if isinstance(each, BATCH_NORMS) and each.track_running_stats]
        if not self.recipe.recalibrate or not norms:
            return
        judged = list(islice(self.loader, JUDGED)) if self.recipe.recalibrate == "auto" else []
        old = [copy.deepcopy(norm.state_dict()) for norm in norms]
        before = self._loss_on(judged)
        self.model.eval()
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # torch: a cumulative average
            norm.train()
        with torch.no_grad():
            for batch in islice(self.loader, self.recipe.recalibration_batches):
                call(self.model, _parts(batch, self.device)[0])
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        if judged and self._loss_on(judged) >= before:
            for norm, state in zip(norms, old, strict=True):
                norm.load_state_dict(state)
        if self.ema is not None:
            self.ema.set(self.accelerator.unwrap_model(self.model))

    @torch.no_grad()
    def _loss_on(self, batches: list[Any]) -> float:
        self.model.eval()
        return sum(float(self.losses(batch)) for batch in batches)


def distillation_loss(
    found: Tensor,  # (batch, classes), (batch, tokens, classes) or (batch, classes, *places)
    wanted: Tensor | None,  # the teacher's, same shape
    labels: Tensor | None,  # without the axis of classes
    recipe: Recipe,
) -> Tensor:  # ()
    """`distillation` × T² × KL(teacher ‖ student) + `task` × cross-entropy; one of them alone where one is missing.

    Raises:
        GMError: the teacher's outputs have another shape, the labels do not fit, or there is neither.
    Source: Hinton, Vinyals and Dean 2015, section 2.
    """
    if wanted is not None and wanted.shape != found.shape:
        raise GMError(f"the teacher's outputs have shape {tuple(wanted.shape)}, the model's {tuple(found.shape)}")
    if wanted is None and labels is None:
        raise GMError("there is nothing to learn from: neither a teacher nor labels in the batches")
    axis = _class_axis(found, labels)
    found = found.movedim(axis, -1).flatten(0, -2).float()
    loss = found.new_zeros(())
    if wanted is not None:
        t = recipe.temperature
        target = F.log_softmax(wanted.movedim(axis, -1).flatten(0, -2).float() / t, dim=-1)
        kl = F.kl_div(F.log_softmax(found / t, dim=-1), target, log_target=True, reduction="batchmean")
        loss = recipe.distillation * t * t * kl
    if labels is not None:
        weight = recipe.task if wanted is not None else 1.0
        loss = loss + weight * F.cross_entropy(found, labels.flatten())
    return loss


def _class_axis(found: Tensor, labels: Tensor | None) -> int:
    """Where the classes are: last in (batch, tokens, classes), second in (batch, classes, *places)."""
    if found.dim() < 2:
        raise GMError(f"outputs of shape {tuple(found.shape)} have no axis of classes")
    if labels is None:
        return 1 if found.dim() == 4 else -1
    if labels.shape == found.shape[:-1]:
        return -1
    if labels.shape == (found.shape[0], *found.shape[2:]):
        return 1
    raise GMError(f"labels of shape {tuple(labels.shape)} do not fit outputs of shape {tuple(found.shape)}")


def _logits(output: Any) -> Tensor:
    """The logits in a model's output: the output itself, its `logits`, or the first of a sequence."""
    found = output
    if isinstance(output, Mapping):
        found = output.get("logits")
    elif isinstance(output, list | tuple) and output:
        found = output[0]
    elif not isinstance(output, Tensor):
        found = getattr(output, "logits", None)
    if not isinstance(found, Tensor):
        raise GMError(f"no logits found in the model's output, {describe(output)}")
    return found


def _parts(batch: Any, device: torch.device) -> tuple[Any, Tensor | None]:
    """Inputs and labels of a batch, on the device."""
    if isinstance(batch, Mapping):
        named = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
        return named, named.pop("labels", None)
    if isinstance(batch, Tensor):
        return batch.to(device), None
    if isinstance(batch, list | tuple) and 1 <= len(batch) <= 2 and all(isinstance(each, Tensor) for each in batch):
        return batch[0].to(device), (batch[1].to(device) if len(batch) == 2 else None)
    raise GMError(f"a batch is (inputs, labels), inputs, or a mapping, but the loader gave {describe(batch)}")


def _check_length(loader: Iterable[Any]) -> None:
    if not isinstance(loader, Sized):
        raise GMError(
            f"the loader needs a length, for the schedule; a {type(loader).__name__} has none: use a DataLoader"
        )
    if not len(loader):
        raise GMError("the loader is empty: it gives no batch")


def _optimizer_of(model: nn.Module, recipe: Recipe) -> tuple[str, float]:
    name = recipe.optimizer
    if name == "auto":
        name = "nesterov" if any(isinstance(each, BATCH_NORMS) for each in model.modules()) else "adamw"
    if not any(each.requires_grad for each in model.parameters()):
        raise GMError("every parameter of the model is frozen, so there is nothing to fine-tune")
    return name, recipe.lr if recipe.lr is not None else (3e-4 if "adam" in name else 0.01)


def _accelerator(recipe: Recipe) -> Any:
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState

    on_cpu = recipe.device is not None and torch.device(recipe.device).type == "cpu"
    cuda = torch.cuda.is_available() and not on_cpu
    options = {
        "mixed_precision": recipe.amp or ("bf16" if cuda else "no"),
        "cpu": on_cpu,
        # a head that no output reaches must not stall the other processes
        "kwargs_handlers": [DistributedDataParallelKwargs(find_unused_parameters=True)],
    }
    try:
        return Accelerator(**options)
    except ValueError:  # accelerate keeps the settings of the first Accelerator of a process; this one differs
        AcceleratorState._reset_state(reset_partial_state=True)
        return Accelerator(**options)


def _seed(seed: int, epoch: int) -> None:
    mixed = int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
    random.seed(mixed)
    np.random.seed(mixed)  # augmentations of timm draw from numpy's global stream
    torch.manual_seed(mixed)


@contextmanager
def _own_random_numbers() -> Iterator[None]:
    """Random numbers drawn inside leave the caller's streams where they were."""
    python, arrays = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)
