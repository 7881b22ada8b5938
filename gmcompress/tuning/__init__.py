"""Fine-tune a compressed model against the dense one: learning-rate trial, distillation, exact resumption."""

from .finetuning import Evaluate, fine_tune
from .losses import distillation_loss, find_blocks
from .recipe import Recipe
from .running import Progress

__all__ = ["Evaluate", "Progress", "Recipe", "distillation_loss", "find_blocks", "fine_tune"]
