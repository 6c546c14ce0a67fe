"""``fedlora flower ...``: the files of a Flower app, and a node that runs no code but its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Federate organisations over Flower; see docs/flower.md.", no_args_is_help=True)


@app.command()
def init(folder: Annotated[Path, typer.Argument(metavar="DIR", help="a new or empty folder")]) -> None:
    """Write a Flower app: a pyproject.toml for flwr run, a configuration, and a policy for nodes."""
    from orchestrator.flower.app import write_app

    for path in write_app(folder):
        typer.echo(str(path))


_PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.command(context_settings=_PASSED_ON)
def superlink(context: typer.Context) -> None:
    """Start flower-superlink with these arguments so that from elsewhere it answers nodes only."""
    from orchestrator.flower.app import check_installed

    check_installed()
    from orchestrator.flower.gate import superlink as start

    start(context.args)


@app.command(context_settings=_PASSED_ON)
def supernode(context: typer.Context) -> None:
    """Start flower-supernode with these arguments so that it runs the installed ClientApp only."""
    from orchestrator.flower.app import check_installed

    check_installed()
    from clients.flower_worker import supernode as start

    if code := start(context.args):
        raise typer.Exit(code)


@app.command()
def certify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="where ca.crt, server.pem and server.key go")],
    hosts: Annotated[
        list[str] | None, typer.Option("--host", help="name or address nodes reach the SuperLink at; repeatable")
    ] = None,
) -> None:
    """Make a certificate for a SuperLink, and the authority that nodes check it against."""
    from orchestrator.flower.keys import write_certificates

    for path in write_certificates(folder, hosts or ["localhost", "127.0.0.1"]):
        typer.echo(str(path))


@app.command()
def key(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="private half; FILE.pub is the other")],
) -> None:
    """Make a SuperNode's key pair; flwr supernode register takes the public half."""
    from orchestrator.flower.keys import write_node_key

    for written in write_node_key(path):
        typer.echo(str(written))
