"""The program: its verbs, and what becomes of an error."""

from __future__ import annotations

import errno
import functools
import importlib
import os
import pkgutil
import sys
from collections.abc import Callable

import typer

from convsurgeon.errors import ConvSurgeonError, ModelError

_INTERRUPTED = 130
_NOBODY_READS = 141


class _StoppedError(Exception):
    """Ctrl-C, with what the verb has to say about it: typer would swallow a `KeyboardInterrupt`."""


def build() -> typer.Typer:
    """Return the program with one command for every file of this folder."""
    app = typer.Typer(
        name="convsurgeon",
        help="Swap the convolutions of a trained CNN for cheap ones, distil, and export proven ONNX.",
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    app.callback(invoke_without_command=True)(_program)
    for module in pkgutil.iter_modules([os.path.dirname(__file__)]):
        if not module.name.startswith("_"):
            verb = importlib.import_module(f"convsurgeon.cli.{module.name}")
            app.command(module.name)(_stoppable(verb.run))
    return app


def main() -> None:
    """Run the program: exit status 0 when done, 2 for the user's error, 130 after Ctrl-C, 1 for a bug."""
    # so that mynet:Net, and a pickle of mynet.Net, are found where the user works
    sys.path.insert(0, os.getcwd())
    try:
        status = build()(standalone_mode=False)
    except ConvSurgeonError as error:
        _fail(str(error))
        sys.exit(2)
    except BrokenPipeError:  # the reader has gone, as `| head` does; what Python still wants to say, nobody hears
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(_NOBODY_READS)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _fail(f"cannot write what there is to say: {error.strerror}; files that it names are there")
        sys.exit(2)
    except (KeyboardInterrupt, _StoppedError) as error:
        _fail(str(error) or "stopped")
        sys.exit(_INTERRUPTED)
    except Exception as error:
        # a mistake in the arguments; typer and click, whichever raised it, can say it in a line
        say = getattr(error, "format_message", None)
        if say is None:
            if type(error).__name__ == "Abort":
                sys.exit(_INTERRUPTED)
            raise
        message = " ".join(str(say()).split())
        if message:
            _fail(message)
        sys.exit(getattr(error, "exit_code", 2))
    sys.exit(status if isinstance(status, int) else 0)


def _stoppable(run: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(run)
    def call(*args: object, **kwargs: object) -> None:
        try:
            run(*args, **kwargs)
        except KeyboardInterrupt as error:
            raise _StoppedError(str(error)) from error
        except BrokenPipeError:
            raise BrokenPipeError from None  # without a number, by which click would end the program with status 1
        except SystemExit as error:  # nobody here does that: code of the user's own, run by its import
            raise ModelError(
                f"code that was imported ended the program by sys.exit({error.code!r}); "
                "put what a script does under: if __name__ == '__main__'"
            ) from error

    return call


def _program(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", help="Print the version.", is_eager=True),
) -> None:
    if version:
        from convsurgeon import __version__

        typer.echo(f"convsurgeon {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def _fail(message: str) -> None:
    print("error:", " ".join(message.splitlines()), file=sys.stderr)
