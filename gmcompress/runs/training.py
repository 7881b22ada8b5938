"""Compress and train: from settings to a folder with the model, its report and everything that led there."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from ..data import make_loader, make_loaders
from ..errors import GMError
from ..files import read_json, write_text
from ..pipeline import check_outputs, compress, tuned_result
from ..projection import Fit, relative_error
from ..reporting import Report, Result
from ..storage import describe_folder, load, save
from ..surgery import run, shell
from ..tuning import fine_tune
from .networks import (
    Progress,
    accuracy,
    build,
    compressed_folder,
    example_inputs,
    find_device,
    model_options,
    silent,
    with_inherited,
)
from .settings import Settings, read_yaml, typed, setting_kinds, write_yaml

ARGS, SUMMARY, MODEL = "args.yaml", "summary.csv", "model"
REPORTS = ("report.html", "report.json")
MAY_CHANGE = ("data_dir", "workers")  # between a run and its continuation; all else belongs to the recipe
