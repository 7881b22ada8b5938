"""The command line as a whole: parsed, carried out, printed, and its exit code."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version

import torch

from ..errors import GMError
from ..runs import is_main
from .commands import COMMANDS, PLACES
from .flags import Parser, add_settings, parse
from .printing import show, watching


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code.

    0, or what the command makes of its findings; 2 where what was given cannot be used; 130 where interrupted.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # paths may hold what no text can
    torch.set_flush_denormal(True)  # tiny numbers slow a CPU down by an order of magnitude
    try:
        parser, commands = make_parser()
        given = parse(parser, commands, argv)
        name, as_json = given.pop("command"), given.pop("json", False)
        if name is None:
            parser.print_help()
            return 0
        with watching(quiet=as_json or not is_main()) as progress:
            data, parts = COMMANDS[name].run(given, progress)
        if not is_main():
            return 0
        if as_json:
            print(json.dumps(data, indent=1))
        else:
            show(parts)
        sys.stdout.flush()
    except BrokenPipeError:  # `gmcompress ... | head` has seen enough; what is still to be flushed goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except GMError as problem:
        print("gmcompress: error:", " ".join(str(problem).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        again = (
            "compress and train go on with --resume FOLDER, sweep --output and --from-safetensors with the same command"
        )
        print(f"gmcompress: interrupted; {again}", file=sys.stderr)
        return 130
    return COMMANDS[name].status(data)


def make_parser() -> tuple[Parser, dict[str, Parser]]:
    """The parser of the whole command line, and those of the commands."""
    text = "Make a trained network smaller, to the size you name; fine-tune it and report what it cost."
    parser = Parser(
        prog="gmcompress", description=text, allow_abbrev=False, epilog="gmcompress COMMAND --help says more."
    )
    parser.add_argument("--version", action="version", version=f"gmcompress {version('gmcompress')}")
    places = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    made: dict[str, Parser] = {}
    for name, command in COMMANDS.items():
        one = places.add_parser(
            name,
            help=command.text,
            description=command.text[0].upper() + command.text[1:] + ".",
            epilog="\n".join(["examples:", *(f"  gmcompress {name} {each}".rstrip() for each in command.examples)]),
            usage=" ".join(["gmcompress", name, *PLACES.get(name, []), "[flags]"]),
            formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=30),
            allow_abbrev=False,
        )
        for names, options in command.more:
            one.add_argument(*names, **{"default": argparse.SUPPRESS, **options})
        for title, texts in command.settings.items():
            add_settings(one, title, texts)
        one.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print nothing but JSON")
        made[name] = one
    return parser, made
