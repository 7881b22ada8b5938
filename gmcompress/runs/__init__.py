"""What the commands do, as functions of plain settings: plan, compress, train, validate, doctor, demo and others."""

from .compressing import WEIGHTS_ALONE, compress_run, read_report
from .demo import demo_run
from .examining import doctor_run
from .exporting import export_run
from .measuring import FAMILIES, benchmark_run, group_facts, plan_run, validate_run
from .networks import Accuracy, Progress, accuracy, is_main, silent
from .settings import WAYS, Settings, read_yaml, setting_defaults, setting_kinds, typed
from .sharding import SHARD_SIZE, shards_run
from .sweeping import BUDGETS, sweep_run
from .training import train_run

__all__ = [
    "BUDGETS",
    "FAMILIES",
    "SHARD_SIZE",
    "WAYS",
    "WEIGHTS_ALONE",
    "Accuracy",
    "Progress",
    "Settings",
    "accuracy",
    "benchmark_run",
    "compress_run",
    "demo_run",
    "doctor_run",
    "export_run",
    "group_facts",
    "is_main",
    "plan_run",
    "read_report",
    "read_yaml",
    "setting_defaults",
    "setting_kinds",
    "shards_run",
    "silent",
    "sweep_run",
    "train_run",
    "typed",
    "validate_run",
]
