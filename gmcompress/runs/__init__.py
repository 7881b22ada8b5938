"""What the commands do, as functions of plain settings: plan, compress, train, validate, benchmark, demo."""

from .demo import demo_run
from .measuring import FAMILIES, benchmark_run, group_facts, plan_run, read_report, validate_run
from .networks import Accuracy, Progress, accuracy, is_main, silent
from .settings import Settings, read_yaml, setting_defaults, setting_kinds, typed
from .training import compress_run, train_run

__all__ = [
    "FAMILIES",
    "Accuracy",
    "Progress",
    "Settings",
    "accuracy",
    "benchmark_run",
    "compress_run",
    "demo_run",
    "group_facts",
    "is_main",
    "plan_run",
    "read_report",
    "read_yaml",
    "setting_defaults",
    "setting_kinds",
    "silent",
    "train_run",
    "typed",
    "validate_run",
]
