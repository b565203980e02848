"""The tree of verbs, and the one place where errors become lines and exit codes."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import typer

from chunkplan.engine.errors import InputError
from chunkplan.service.cli import catalogs, database, jobs, keys, planning, profiles, server, training
from chunkplan.service.cli.exits import FAILED, USAGE, CommandError

app = typer.Typer(
    name="chunkplan",
    help="Plan, run and profile full-parameter fine-tuning that fits the GPU you have.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("plan")(planning.plan)
app.command("train")(training.train)
app.command("serve")(server.serve)
app.command("submit")(jobs.submit)
app.add_typer(jobs.app, name="jobs")
app.add_typer(profiles.app, name="profiles")
app.command("models")(catalogs.models)
app.command("gpus")(catalogs.gpus)
app.add_typer(keys.app, name="keys")
app.add_typer(database.app, name="db")


def run(arguments: Sequence[str] | None = None) -> int:
    """See `chunkplan.service.cli.main`."""
    try:
        code = app(args=arguments, prog_name="chunkplan", standalone_mode=False)
    except CommandError as error:
        return _end(str(error), error.exit_code)
    except InputError as error:
        return _end(str(error), USAGE)
    except (typer.Abort, KeyboardInterrupt):
        return _end("interrupted", FAILED)
    except BrokenPipeError:
        # Whoever read our output has gone: nothing is left to say, and the interpreter must not try at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        if not hasattr(error, "format_message"):  # every usage error of the parser has it, and nothing else
            raise
        return _usage(error)
    return code if isinstance(code, int) else 0


def _usage(error: Exception) -> int:
    message = error.format_message()  # type: ignore[attr-defined]
    if type(error).__name__ == "NoArgsIsHelpError":
        print(message, file=sys.stderr)
        return USAGE
    return _end(message, USAGE)


def _end(message: str, code: int) -> int:
    print(f"chunkplan: {' '.join(message.split())}", file=sys.stderr)
    return code
