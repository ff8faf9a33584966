"""The command `splitsam`."""

import importlib.metadata
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from splitsam.client import cli_calls, cli_services
from splitsam.client.errors import SplitsamError
from splitsam.client.processes import StackError
from splitsam.common.errors import StartProblem

app = typer.Typer(
    name="splitsam",
    help="Segment Anything as two services: encode an image once, get masks on every click.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(cli_services.commands)
app.add_typer(cli_calls.commands)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 failed (one line on stderr says why), 2 wrong usage."""
    try:
        status = app(args=None if arguments is None else list(arguments), prog_name="splitsam", standalone_mode=False)
    except typer.TyperException as error:
        _complain(error.format_message() + (" (see --help)" if error.exit_code == 2 else ""))
        sys.exit(error.exit_code)
    except (SplitsamError, StackError, StartProblem, ValueError) as error:
        _complain(f"{error}{_hint(error)}")
        for line in getattr(error, "log_tail", ()):
            print(f"  | {line}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        _complain(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        sys.exit(1)
    sys.exit(status if isinstance(status, int) else 0)


@app.callback(invoke_without_command=True)
def start(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        print(f"splitsam {importlib.metadata.version('splitsam')}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


def _hint(error: Exception) -> str:
    is_unavailable = isinstance(error, SplitsamError) and error.reason == "UNAVAILABLE"
    is_nobody_there = is_unavailable and "CERTIFICATE" not in str(error)  # else somebody is, and shows another one
    return " (is `splitsam up` running?)" if is_nobody_there else ""


def _complain(message: str) -> None:
    print(f"splitsam: {' '.join(message.split())}", file=sys.stderr)
