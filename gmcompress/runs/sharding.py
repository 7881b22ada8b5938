"""What `compress --from-safetensors` does: files to files, without a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import GMError
from ..shards import SHARD_SIZE, Shards, compress_shards
from .networks import Progress, silent
from .settings import Settings

__all__ = ["SHARD_SIZE", "shards_run"]

USED = ("group", "rank", "residual", "include", "exclude", "override")


def shards_run(
    settings: Mapping[str, Any],
    source: str,
    target: str,
    *,
    shard_size: str,
    transposed: Sequence[str] | None = None,
    progress: Progress = silent,
) -> Shards:
    """Compress safetensors files; of the settings those in `USED`, rank 1 where none is given.

    Raises:
        GMError: another setting is given; else as `compress_shards`.
    """
    foreign = [name for name in settings if name not in USED]
    if foreign:
        flag = "--" + foreign[0].replace("_", "-")
        raise GMError(f"{flag} does not go with --from-safetensors, where there is no network to run or to budget")
    chosen = Settings.read({"rank": 1, **settings})
    options = chosen.compression()
    del options["ties"]

    def told(layer: str, done: int, of: int) -> None:
        progress("compressing", done + 1, of, layer)

    more: dict[str, Any] = {"shard_size": shard_size, "transposed": transposed, "progress": told}
    return compress_shards(source, target, **more, **options)
