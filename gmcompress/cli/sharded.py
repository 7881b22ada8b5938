"""compress --from-safetensors: its flags, and what it prints."""

from __future__ import annotations

from typing import Any

from ..errors import GMError
from ..runs import SHARD_SIZE, Progress, shards_run

FLAGS: tuple[tuple[tuple[str, ...], dict[str, Any]], ...] = (
    (
        ("--from-safetensors",),
        {
            "metavar": "FILES",
            "help": "in place of a network: a .safetensors file or a folder of them, of any size, a tensor at a time; "
            "with --rank (default: 1); the same command goes on where it was interrupted",
        },
    ),
    (("--to",), {"metavar": "FOLDER", "help": "the folder for the compressed files; gmcompress.load_shards reads it"}),
    (("--shard-size",), {"metavar": "SIZE", "help": f"bytes in one of them at most (default: {SHARD_SIZE})"}),
    (
        ("--transposed",),
        {
            "nargs": "*",
            "metavar": "RULE",
            "help": "weights in them that lie as inputs × outputs "
            "(default: those of a model like GPT-2, by its config.json)",
        },
    ),
)
NAMES = ("from_safetensors", "to", "shard_size", "transposed")


def asked(given: dict[str, Any]) -> bool:
    """Whether files are to be compressed in place of a network.

    Raises:
        GMError: only some of the flags that this needs are there, or some of others.
    """
    there = [name for name in NAMES if given.get(name) is not None]
    if there and not {"from_safetensors", "to"} <= set(there):
        raise GMError(
            "--from-safetensors FILES and --to FOLDER go together, and --shard-size and --transposed with them"
        )
    other = [name for name in ("output", "experiment", "resume") if given.get(name) is not None]
    if there and other:
        raise GMError(f"--{other[0]} does not go with --from-safetensors; --to names the folder")
    return bool(there)


def compress(given: dict[str, Any], settings: dict[str, Any], progress: Progress) -> tuple[Any, list[Any]]:
    """Compress files; what was done, for --json and for people."""
    target, size = given["to"], str(given.get("shard_size", SHARD_SIZE))
    source, turned = given["from_safetensors"], given.get("transposed")
    found = shards_run(settings, source, target, shard_size=size, transposed=turned, progress=progress)
    return {"folder": target, "summary": found.summary, **found.to_dict()}, [str(found), f"written to {target}"]
