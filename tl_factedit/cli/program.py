"""The program: which commands there are, and how each ends.

Results go to stdout, everything else to stderr. Exit status: 0 when done, 2 for what can't be done (with a message and
no traceback), 130 when interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from importlib.metadata import version

from tl_factedit.cli import audit, edit, report, trace
from tl_factedit.cli.output import in_options, say, warnings_in_words

PROGRAM = "tl-factedit"

REFUSED = (ValueError, OSError, ImportError, RuntimeError)
"""What calls raise when something can't be done: wrong input, files, missing packages, numbers that overflow."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: What stands after the program's name; None for what this process was started with.

    Returns:
        The exit status.

    Raises:
        SystemExit: The options can't be read (2), or help was asked for (0).
    """
    args = _parser().parse_args(argv)
    try:
        # TransformerLens and others print while they work; stdout is for the result alone.
        with warnings_in_words(), contextlib.redirect_stdout(sys.stderr):
            output = args.run(args)
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    except REFUSED as error:
        if args.debug:
            raise
        say(f"{PROGRAM} {args.command}: error: {in_options(str(error))}\n(--debug shows where it was raised)")
        return 2
    say(output.as_json(args.command) if args.json else output.text, result=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        PROGRAM,
        description="Find where a language model keeps a fact, edit it in the weights, and audit what the edit did.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {version('tl-factedit')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command, what in (
        ("trace", trace, "where is a fact recalled?"),
        ("edit", edit, "write a fact into the weights, and save the edit"),
        ("audit", audit, "what did a saved edit change, and what did it leave?"),
        ("report", report, "all of it in one HTML file that opens offline"),
    ):
        one = commands.add_parser(name, help=what, description=command.__doc__, allow_abbrev=False)
        command.add_options(one)
        shared = one.add_argument_group("output")
        shared.add_argument(
            "--json", action="store_true", help="print one JSON object on stdout, and nothing else there"
        )
        shared.add_argument("--quiet", action="store_true", help="no progress on stderr (warnings and errors stay)")
        shared.add_argument("--debug", action="store_true", help="show the traceback of an error")
        one.set_defaults(run=command.run)
    return parser
