"""One training: what it holds, a step of it, an epoch, and its state taken back after steps that were only a test."""

from __future__ import annotations

import copy
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager, nullcontext
from inspect import signature
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..attaching import structured
from ..calibration import ends_in_classes
from ..copies import duplicate, evaluating, keeping_modes, parameters_of, training
from ..errors import GMError, said
from ..forward import Inputs, call
from ..nesting import describe
from ..streams import own_random_numbers
from .factors import Annealing, Decay
from .losses import (
    Features,
    distillation_loss,
    has_classes,
    outputs_of,
    outputs_to_compare,
    own_loss,
    parts_of,
    temperature_of,
)
from .recipe import BATCH_NORMS, Recipe, learning_rate, optimizer_name, rates_to_try

Progress = Callable[[int, int, int, float], None]  # epoch, step, steps, loss; the epoch of the trial is -1
JUDGED = 8  # batches on which recalibrated statistics are compared with the old ones
HEARD = 4  # batches, at most, on which the teacher's answers say what temperature suits them


class Run:
    """Everything that one training holds: prepared model, teacher, loader, optimizer, decay and average.

    A step is step `at` of `of`: learning rate and annealing follow from these two alone, so that a short run of few
    steps is a miniature of a long one.
    """

    def __init__(self, model: nn.Module, teacher: nn.Module | None, loader: Iterable[Any], recipe: Recipe) -> None:
        from accelerate import DistributedDataParallelKwargs
        from timm.optim import create_optimizer_v2
        from timm.utils import ModelEmaV3

        _check_length(loader)
        if not any(each.requires_grad for each in parameters_of(model).values()):
            raise GMError("every parameter of the model is frozen, so there is nothing to fine-tune")
        self.recipe = recipe
        self.accelerator = _accelerator(recipe)
        self.device = self.accelerator.device
        model = model.to(self.device)
        self.teacher = None if teacher is None else evaluating(duplicate(teacher, {})).to(self.device)
        self.logits: bool | None = None  # whether outputs are logits where nothing says so, known after a first batch
        self.form = signature(model.forward)
        self.ema = None
        if recipe.ema is not None:  # which copies what it is given as torch's own copies do
            self.ema = ModelEmaV3(nn.Linear(1, 1, device=self.device), decay=recipe.ema)
            self.ema.module = evaluating(duplicate(model, {}))
        name, decay = optimizer_name(model, recipe), recipe.weight_decay
        self.rates = rates_to_try(name, recipe)
        lr = recipe.lr or self.rates[0]  # set anew before every step
        self.optimizer = create_optimizer_v2(model, opt=name, lr=lr, weight_decay=decay, momentum=recipe.momentum)
        strength = decay if recipe.decay == "weight" else 0.0
        self.decay = Decay(model, self.optimizer, name=name, strength=strength)
        self.features = Features(model, self.teacher, recipe)
        self.annealing = Annealing(model, self.teacher, share=recipe.anneal if recipe.epochs or recipe.minutes else 0.0)
        for each in [model] if self.ema is None else [model, self.ema.module]:
            self.annealing.attach(each)
        self.model, self.stepper = model, self.optimizer
        self.loader: Any = loader
        if self.accelerator.distributed_type.startswith("MULTI_"):  # torch's DistributedDataParallel
            self.loader = self.accelerator.prepare(loader)
            unused = self.leaves_parameters_out()
            self.accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=unused)
        try:
            self.model, self.stepper, self.loader = self.accelerator.prepare(model, self.optimizer, self.loader)
        except Exception as problem:  # of any kind: it sets attributes on what it prepares, and wraps it
            raise GMError(f"accelerate cannot prepare this {type(model).__name__}: {said(problem)}") from problem
        self.steps = len(self.loader)  # in an epoch, of this process, where there are several

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds, by name."""
        averaged = {} if self.ema is None else {"ema": self.ema.module}
        scaler = {} if self.accelerator.scaler is None else {"scaler": self.accelerator.scaler}
        return {"model": self.plain, "optimizer": self.optimizer, **averaged, **scaler}

    @property
    def plain(self) -> nn.Module:
        """The student as it was before accelerate wrapped it."""
        return self.accelerator.unwrap_model(self.model)

    def result(self) -> nn.Module:
        """The model as it would be handed over now: the average where there is one, in evaluation mode."""
        return evaluating(self.plain if self.ema is None else self.ema.module)

    def finish(self) -> nn.Module:
        """The result, free of hooks and of what accelerate wrapped around it."""
        self.annealing.remove()
        return self.accelerator.unwrap_model(self.result(), keep_fp32_wrapper=False)

    def loss(self, batch: Any, *, features: float = 0.0) -> Tensor:  # ()
        """The loss of one batch against teacher and labels, with this share of the weight of the blocks' outputs."""
        inputs, labels = parts_of(batch, self.device, self.form)
        compared = self.features if features and self.features.student else None
        none: dict[str, Any] = {}
        watched = nullcontext(none) if compared is None else outputs_of(compared.student)
        with self.accelerator.autocast():
            with watched as ours:
                output = self._called(self.model, inputs, labels)
            (found, named), wanted = outputs_to_compare(output), None
            if self.teacher is not None:
                seen = nullcontext(none) if compared is None else outputs_of(compared.teacher)
                with torch.no_grad(), seen as theirs:
                    wanted = outputs_to_compare(self._called(self.teacher, inputs, labels))[0]
        task = own_loss(output) if labels is not None and "labels" in self.form.parameters else None
        labels = labels if task is None else None
        if task is not None and wanted is None:
            return task
        logits = named or labels is not None or self._has_logits(inputs)
        loss = distillation_loss(found, wanted, labels, self.recipe, logits=logits)
        loss = loss if task is None else loss + self.recipe.task * task
        return loss if compared is None else loss + features * compared.weight * compared.loss(ours, theirs)

    def _called(self, model: nn.Module, inputs: Inputs, labels: Tensor | None = None) -> Any:
        """What a model returns, of one that takes labels beside inputs by name also the loss that it has by them.

        Raises:
            GMError: it does not run on the inputs.
        """
        if labels is not None and "labels" in self.form.parameters and isinstance(inputs, Mapping):
            inputs = {**inputs, "labels": labels}
        try:
            return call(model, inputs)
        except GMError:
            raise
        except Exception as problem:
            mode = "training" if any(each.training for each in model.modules()) else "evaluation"
            what = f"{type(model).__name__} does not run in {mode} mode on a batch of shape {describe(inputs)}"
            raise GMError(f"{what}: {said(problem)}") from problem

    def _has_logits(self, inputs: Inputs) -> bool:
        """Whether outputs are logits where neither their name nor labels say so: whether a classifier runs last."""
        if self.logits is None:
            teacher = self.teacher
            self.logits = teacher is None or bool(structured(teacher)) or ends_in_classes(teacher, inputs)
        return self.logits

    @torch.no_grad()
    def temperature(self) -> float | None:
        """The recipe's, or the mean of those that suit the teacher's answers to the first batches, if it gives any."""
        if self.recipe.temperature is not None or self.teacher is None:
            return self.recipe.temperature
        found: list[float] = []
        for batch in islice(self.loader, HEARD):
            inputs, labels = parts_of(batch, self.device, self.form)
            with self.accelerator.autocast():
                wanted, named = outputs_to_compare(self._called(self.teacher, inputs))
            if "labels" in self.form.parameters:  # a model with a loss of its own
                labels = None
            logits = named or labels is not None or self._has_logits(inputs)
            if has_classes(wanted, labels, logits=logits):
                found.append(temperature_of(wanted, labels))
        return self.mean(sum(found) / len(found)) if found else None

    def leaves_parameters_out(self) -> bool:
        """Whether the loss of a first batch leaves a trainable parameter without a gradient, in any of the processes.

        A head that no output reaches, for one, would stall the processes unless they looked for such parameters at
        every step. Weights, statistics, gradients, modes and random numbers, also the loader's, stay as they were.
        """
        drawing = getattr(self.loader, "synchronized_generator", None)  # of a loader that accelerate prepared
        drawn = None if drawing is None else drawing.get_state()
        with keeping_modes(self.model), own_random_numbers(), self.taken_back():
            training(self.model)
            self.loss(next(iter(self.loader), None), features=1.0).backward()
        left = any(each.requires_grad and each.grad is None for each in parameters_of(self.model).values())
        self.model.zero_grad()
        if drawing is not None:
            drawing.set_state(drawn)
        return self.mean(float(left)) > 0

    def step(self, batch: Any, *, at: int, of: int, peak: float, warmup: float) -> float:
        """One step of the optimizer, and its loss."""
        rate = learning_rate(at, steps=of, peak=peak, warmup=warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.annealing.set(at / of)
        loss = self.loss(batch, features=1 - at / of)
        if not loss.requires_grad:
            raise GMError(
                "no gradient reaches the parameters: the model's code turns gradients off, or uses none of them"
            )
        try:
            self.accelerator.backward(loss)
        except Exception as problem:
            raise GMError(f"the backward pass of {type(self.plain).__name__} fails: {said(problem)}") from problem
        for each in parameters_of(self.model).values():
            if each.grad is not None and each.grad.layout is not torch.strided:  # which few optimizers take
                each.grad = each.grad.to_dense()
        if self.recipe.clip is not None:
            self.accelerator.clip_grad_norm_(parameters_of(self.model).values(), self.recipe.clip)
        else:
            self.accelerator.unscale_gradients()
        self.decay.apply_(at, rate=rate)
        self.stepper.step()
        self.stepper.zero_grad()
        return float(loss.detach())

    def epoch(self, number: int, *, steps: int, peak: float, progress: Progress | None) -> dict[str, Any]:
        """One pass over the loader, of a run of so many steps; the last pass ends with the last step."""
        training(self.model)
        start, total, seen, first = time.perf_counter(), 0.0, 0, number * self.steps
        here = min(self.steps, steps - first)
        for batch in self.loader:
            value = self.step(batch, at=first + seen, of=steps, peak=peak, warmup=self.warmup(steps))
            if not math.isfinite(value):
                raise GMError(f"the loss is {value} in epoch {number}, step {seen}; try a smaller learning rate")
            if self.ema is not None:
                self.ema.update(self.plain)
            total, seen = total + value, seen + 1
            if progress is not None:
                progress(number, seen, here, value)
            if seen == here < self.steps:  # a whole pass goes on to the loader's own end, where accelerate tidies up
                break
        if not seen:
            raise GMError("the loader is empty: it gave no batch")
        for name, each in parameters_of(self.plain).items():
            if each.requires_grad and not each.isfinite().all():
                raise GMError(f"{name!r} is not finite after epoch {number}; try a smaller learning rate")
        self.annealing.set((first + seen) / steps)
        rate = self.optimizer.param_groups[0]["lr"]
        return {"epoch": number, "loss": self.mean(total / seen), "lr": rate, "seconds": time.perf_counter() - start}

    def warmup(self, steps: int) -> float:
        """The share of the warm-up in a run of so many steps."""
        return self.recipe.warmup * self.steps / steps

    def mean(self, value: float) -> float:
        """The mean over the processes, the same in all of them."""
        return float(self.accelerator.reduce(torch.tensor(value, device=self.device), "mean"))

    def recalibrate(self) -> None:
        """Re-estimate the BatchNorm statistics, as the recipe says."""
        norms = [each for each in self.model.modules() if isinstance(each, BATCH_NORMS) and each.track_running_stats]
        if not self.recipe.recalibrate or not norms:
            return
        judged = list(islice(self.loader, JUDGED)) if self.recipe.recalibrate == "auto" else []
        old = [copy.deepcopy(norm.state_dict()) for norm in norms]
        before = self.loss_on(judged)
        evaluating(self.model)
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # torch: a cumulative average
            norm.train()
        with torch.no_grad():
            for batch in islice(self.loader, self.recipe.recalibration_batches):
                self._called(self.model, parts_of(batch, self.device, self.form)[0])
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        if judged and self.loss_on(judged) >= before:
            for norm, state in zip(norms, old, strict=True):
                norm.load_state_dict(state)
        if self.ema is not None:
            self.ema.set(self.plain)

    @torch.no_grad()
    def loss_on(self, batches: Sequence[Any], *, features: float = 0.0) -> float:
        """The sum of the losses of these batches, in evaluation mode."""
        evaluating(self.model)
        return sum(float(self.loss(batch, features=features)) for batch in batches)

    @contextmanager
    def taken_back(self) -> Iterator[Callable[[], None]]:
        """Steps inside are undone at the end, and by the function given: weights, statistics, optimizer and scaler."""
        tensors = [*chain(parameters_of(self.plain).values(), self.plain.buffers())]
        kept = [each.detach().clone() for each in tensors]
        parts = [self.optimizer, *([] if self.accelerator.scaler is None else [self.accelerator.scaler])]
        states = [copy.deepcopy(part.state_dict()) for part in parts]

        @torch.no_grad()
        def undo() -> None:
            for tensor, old in zip(tensors, kept, strict=True):
                tensor.copy_(old)
            for part, state in zip(parts, states, strict=True):
                part.load_state_dict(copy.deepcopy(state))
            self.annealing.set(0.0)

        try:
            yield undo
        finally:
            undo()


def _check_length(loader: Iterable[Any]) -> None:
    if not isinstance(loader, Sized):
        raise GMError(
            f"the loader needs a length, for the schedule; a {type(loader).__name__} has none: use a DataLoader"
        )
    if not len(loader):
        raise GMError("the loader is empty: it gives no batch")


def _accelerator(recipe: Recipe) -> Any:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    on_cpu = recipe.device is not None and torch.device(recipe.device).type == "cpu"
    cuda = torch.cuda.is_available() and not on_cpu
    options = {"mixed_precision": recipe.amp or ("bf16" if cuda else "no"), "cpu": on_cpu}
    try:
        return Accelerator(**options)
    except ValueError:  # accelerate keeps the settings of the first Accelerator of a process; this one differs
        AcceleratorState._reset_state(reset_partial_state=True)
        return Accelerator(**options)


def seed_all(seed: int, *stream: int) -> None:
    """Seed the global streams of random numbers: one for each epoch, counted from 1, and (0,), (0, ...) before them."""
    mixed = int(np.random.SeedSequence([seed, *stream]).generate_state(1)[0])
    random.seed(mixed)
    np.random.seed(mixed)  # augmentations of timm draw from numpy's global stream
    torch.manual_seed(mixed)
