"""What `export` does: a compressed network as one file for use elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..exporting import TOLERANCE, Export, export
from .networks import example_inputs, load_compressed, with_inherited
from .settings import Settings

BATCH = 2  # images in the example from which the network is exported


def export_run(
    settings: Mapping[str, Any], folder: str, path: str, *, format: str = "onnx", tolerance: float = TOLERANCE
) -> Export:
    """Write the compressed network in a folder, rebuilt as for `validate_run`, to a file; see `gmcompress.export`.

    Raises:
        GMError: the network cannot be rebuilt or exported, or the file computes something else.
    """
    batch_size = settings.get("batch_size", BATCH)  # not that of the run which wrote the folder
    chosen = Settings.read(with_inherited({**settings, "compressed": folder, "batch_size": batch_size}))
    model = load_compressed(chosen)
    images = example_inputs(chosen.images, model, batch_size=chosen.images.batch_size)
    return export(model, path, images, format=format, tolerance=tolerance)
