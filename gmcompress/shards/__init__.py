"""Models larger than memory: compressed from safetensors shards to safetensors shards, and loaded from these."""

from .compressing import SHARD_SIZE, compress_shards
from .description import Shards, describe_shards
from .layout import EMBEDDINGS, HEADS
from .loading import load_shards

__all__ = ["EMBEDDINGS", "HEADS", "SHARD_SIZE", "Shards", "compress_shards", "describe_shards", "load_shards"]
