"""The command line as a whole: refusals and warnings in a line each, and exit codes.

Exit codes: 0 done; 1 refused, with the reason on stderr; 2 wrong usage; 130 interrupted.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from biassurgery.errors import SurgeryError

_EXIT_CODES = (
    "Exit codes: 0 done; 1 refused, with the reason on stderr; 2 wrong usage; 130 interrupted."
)


class _Group(TyperGroup):
    """Says refusals and warnings on stderr, in a line each."""

    def invoke(self, ctx: Any) -> Any:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            try:
                return super().invoke(ctx)
            except SurgeryError as error:
                typer.echo(f"error: {error}", err=True)
                raise typer.Exit(1) from error


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    typer.echo(f"warning: {message}", err=True)


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    epilog=_EXIT_CODES,
    help="Find, fix and remove massive activations in trained transformers.",
)


def register(command: Callable[..., None], name: str | None = None) -> None:
    """Make a function a command of `biassurgery`, by its own name if none is given."""
    app.command(name=name, epilog=_EXIT_CODES)(command)


def _print_version(asked: bool) -> None:
    if asked:
        from biassurgery import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Print the version."
        ),
    ] = False,
) -> None:
    pass
