"""``fedlora unlearn``: ask for a removal, carry it out, and check what was certified."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from fedlora.errors import ConfigError, LeaseHeld, UnlearningError

if TYPE_CHECKING:
    from fedlora.unlearning.keys import Keys
    from fedlora.unlearning.request import Request
    from orchestrator.lease import Lease

app = typer.Typer(help="Take out what was learned, and prove it.", no_args_is_help=True)

RunFolder = Annotated[Path, typer.Argument(help="a run folder, such as runs/quickstart")]
Clients = Annotated[list[str] | None, typer.Option("--client", metavar="ID", help="a client to take out; repeatable")]
Records = Annotated[
    Path | None,
    typer.Option("--records", metavar="FILE", help="names of rows to take out, one a line; only their hashes are kept"),
]
Classes = Annotated[list[str] | None, typer.Option("--class", metavar="LABEL", help="all rows of a label; repeatable")]
DataFile = Annotated[
    Path | None,
    typer.Option("--data", metavar="FILE", help="the rows of a file, such as training rows; only hashes are kept"),
]
Tasks = Annotated[list[str] | None, typer.Option("--task", metavar="NAME", help="a task of the stream; repeatable")]
RequestId = Annotated[str, typer.Option("--request", metavar="R1", help="id of a request")]
Authorised = Annotated[
    list[Path] | None,
    typer.Option(metavar="PLACE", help="public keys of who may ask: a .pub file or a folder of them; or $FEDLORA_KEYS"),
]
Action = Annotated[str, typer.Option(metavar="NAME", help="what is done about it, see fedlora unlearn plan")]
Options = Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="an option of the action; repeatable")]
AsJson = Annotated[bool, typer.Option("--json", help="machine-readable output")]
POLL_S = 0.5


@app.command()
def key(
    path: Annotated[Path, typer.Argument(help="where to write it; the public one goes beside it")],
) -> None:
    """Make a key that signs requests and certificates."""
    from fedlora.unlearning.keys import new_key

    typer.echo(f"{path}: {new_key(path)}")


@app.command()
def plan(
    run: RunFolder,
    client: Clients = None,
    records: Records = None,
    label: Classes = None,
    data: DataFile = None,
    task: Tasks = None,
    as_json: AsJson = False,
) -> None:
    """What a target influenced, which actions could take it out, and what these cost. Changes nothing."""
    from fedlora.plugins import load_plugins
    from orchestrator.stores.files import read_config
    from orchestrator.units import human_bytes
    from orchestrator.unlearning.again import log_size
    from orchestrator.unlearning.execute import estimates
    from orchestrator.unlearning.lineage import lineage
    from orchestrator.unlearning.rollback import plan_for
    from orchestrator.unlearning.traces import rounds_in_words

    request = _request(run, _Named(client, records, label, data, task))
    config = read_config(run)
    load_plugins(config.plugins)
    found = plan_for(run, request)
    possible = estimates(run, request, found)
    kept = log_size(run)
    if as_json:
        told = {"plan": asdict(found), "replayed": found.replayed, "actions": [asdict(one) for one in possible]}
        told["contributions"] = kept
        typer.echo(json.dumps(told))
        return
    for name in request.target if request.kind in ("client", "task") else ():
        for line in lineage(run, client=name) if request.kind == "client" else lineage(run, task=name):
            typer.echo(line)
    if request.kind in ("class", "data"):
        typer.echo(f"{request}: {len(found.records)} names of rows")
    for owner in found.owners:
        typer.echo(f"client {owner} has rows of these names")
    if found.first is None:
        typer.echo("no round used it")
    else:
        begin = "the start" if found.start is None else f"the checkpoint of round {found.start}"
        used = "another run without it from" if request.kind == "task" else "first used in"
        replayed = "" if config.federation.shards > 1 else f"; a rollback begins from {begin}"
        typer.echo(f"{used} round {found.first} of {found.rounds}{replayed}")
    typer.echo("".join(f"not E1: {doubt}\n" for doubt in found.doubts), nl=False)
    size = human_bytes(kept["bytes"])
    listed = rounds_in_words(kept["rounds"]) if kept["rounds"] else ""
    typer.echo(f"contribution log: {listed}, {size}" if listed else f"no contribution log; it would take about {size}")
    typer.echo("action         level  cost, as a share of the rounds of retraining")
    for one in possible:
        typer.echo(f"{one.action:<14} {one.level:<6} " + (one.reason or f"{100 * (one.cost or 0):.0f} %"))
    if any(one.level == "A" for one in possible):
        more = 100 * (1 + found.cost)
        typer.echo(f"at level A a gate trains two controls without the target besides, which costs {more:.0f} % more")
    typer.echo("until it is done the run stays as it is; --now puts its last adapter without the target in use first")


@app.command("run")
def run_request(
    run: RunFolder,
    key: Annotated[Path, typer.Option(metavar="FILE", help="private key that signs the request and its certificate")],
    client: Clients = None,
    records: Records = None,
    label: Classes = None,
    data: DataFile = None,
    task: Tasks = None,
    action: Action = "rollback",
    option: Options = None,
    now: Annotated[bool, typer.Option("--now", help="contain first, erase after")] = False,
    authorised: Authorised = None,
    patience: Annotated[float, typer.Option(min=0, help="seconds to wait for a run that is being played")] = 3600.0,
    as_json: AsJson = False,
) -> None:
    """Take a target out. The same command again goes on where it was stopped."""
    from fedlora.unlearning.keys import load_key
    from fedlora.unlearning.request import sign_request
    from orchestrator.console import JsonScreen, Screen
    from orchestrator.unlearning.execute import carry_out
    from orchestrator.unlearning.requests import identity, receive

    request = _request(run, _Named(client, records, label, data, task), action, now, _options(option))
    signer, keys = load_key(key), _keys(authorised)
    standing = receive(run, sign_request(request, identity(run), signer), keys)
    if standing.reason:
        raise UnlearningError(f"{standing.id} is refused: {standing.reason}")
    screen: JsonScreen | Screen = JsonScreen() if as_json else Screen()
    with screen, _lease(run, patience) as lease:
        standing = carry_out(run, standing.id, lease, signer, screen)
    path = run / "unlearning" / f"{standing.id}.json"
    if as_json:
        typer.echo(json.dumps({"request": standing.id, "level": standing.level, "certificate": str(path)}))
        return
    done = "is suppressed, not erased: level S" if standing.level == "S" else f"taken out at level {standing.level}"
    typer.echo(f"{standing.id}: {request} {done}; certificate {path}")
    if "goes_on_from" in standing.facts["executed"]:
        typer.echo(f"the run goes on after round {standing.facts['executed']['goes_on_from']}: fedlora resume {run}")


@app.command("list")
def list_requests(run: RunFolder, as_json: AsJson = False) -> None:
    """Every request of a run, and where it stands."""
    from orchestrator.unlearning.requests import read_requests

    for standing in read_requests(run).values():
        told = {"request": standing.id, "asks": str(standing.request), "phase": standing.phase, "level": standing.level}
        if as_json:
            typer.echo(json.dumps({**told, "reason": standing.reason}))
        else:
            why = f" ({standing.reason})" if standing.reason else ""
            typer.echo(f"{standing.id}  {standing.request}  {standing.phase}  {standing.level or ''}{why}")


@app.command()
def withdraw(
    run: RunFolder,
    request: RequestId,
    key: Annotated[Path, typer.Option(metavar="FILE", help="an authorised private key")],
    authorised: Authorised = None,
) -> None:
    """Take a request back that has not been carried out yet, so that the run can go on."""
    from fedlora.unlearning.keys import fingerprint, load_key
    from orchestrator.unlearning.execute import withdraw as take_back

    signer = fingerprint(load_key(key).public_key())
    if signer not in _keys(authorised):
        raise UnlearningError(f"the key {signer[:16]} is not authorised")
    with _lease(run, 0.0):
        take_back(run, request, f"withdrawn by key {signer[:16]}")
    typer.echo(f"{request}: withdrawn")


@app.command()
def certificate(run: RunFolder, request: RequestId) -> None:
    """Print a certificate as JSON; the page beside it is for reading."""
    path = run / "unlearning" / f"{request}.json"
    if not path.exists():
        from orchestrator.unlearning.requests import find_request

        raise UnlearningError(f"{request} is {find_request(run, request).phase}, and has no certificate")
    typer.echo(path.read_text())


@app.command()
def verify(
    run: RunFolder,
    request: RequestId,
    authorised: Authorised = None,
    gate: Annotated[
        bool, typer.Option("--gate", help="instead, measure the run's present adapter beside the request's controls")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check a certificate and everything it speaks of; exit code 8 if anything is not as it was certified."""
    if gate:
        _gate(run, request, _keys(authorised), as_json)
        return
    from orchestrator.unlearning.certificate import verify_certificate

    problems = verify_certificate(run, request, _keys(authorised))
    if as_json:
        typer.echo(json.dumps({"request": request, "problems": problems}))
    elif not problems:
        typer.echo(f"{request}: the certificate, the logs and every artefact are as certified")
    for problem in problems if not as_json else ():
        typer.echo(problem, err=True)
    if problems:
        raise typer.Exit(UnlearningError.exit_code)


def _gate(run: Path, request: str, keys: Keys, as_json: bool) -> None:
    """Whether what was taken out has stayed out; exit code 8 if not."""
    from fedlora.plugins import load_plugins
    from orchestrator.stores.files import read_config
    from orchestrator.unlearning.certificate import check_genuine
    from orchestrator.unlearning.gate import look_again

    check_genuine(run, request, keys)
    load_plugins(read_config(run).plugins)
    found = look_again(run, request)
    if as_json:
        told = {"round": found.round, **found.verdict.to_json()} if found else None
        typer.echo(json.dumps({"request": request, "gate": told}))
    else:
        nothing = "what is left never had the target, so there is nothing to measure"
        typer.echo(f"{request}: {found.sentence if found else nothing}", err=bool(found and not found.verdict.passed))
    if found and not found.verdict.passed:
        raise typer.Exit(UnlearningError.exit_code)


class _Named(NamedTuple):
    """What the options of a command name, by kind of target."""

    client: list[str] | None
    records: Path | None
    label: list[str] | None
    data: Path | None
    task: list[str] | None


def _request(
    run: Path, named: _Named, action: str = "rollback", now: bool = False, options: Mapping[str, Any] | None = None
) -> Request:
    """What the options ask for. Whether the run has it is for the request log to say."""
    from fedlora.unlearning.request import Request
    from orchestrator.stores.files import read_config
    from orchestrator.unlearning.targets import rows_in_file

    config = read_config(run)
    if sum(bool(value) for value in named) != 1:
        raise ConfigError(
            "unlearn: name what to take out, one kind of --client c7, --records names.txt, --class LABEL,"
            " --data rows.jsonl and --task NAME"
        )
    kind, target = next((kind, value) for kind, value in named._asdict().items() if value)
    if kind == "records":
        target = _names_in(target)
    if kind == "data":
        target = rows_in_file(config, target)
    return Request("class" if kind == "label" else kind, tuple(target), action, now, options or {})


def _names_in(records: Path) -> tuple[str, ...]:
    """Hashes of the names in a file, one a line."""
    from fedlora.unlearning.request import hashed

    try:
        names = [line for line in records.read_text(encoding="utf-8").splitlines() if line]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"unlearn: {records} cannot be read: {error}") from error
    if not names:
        raise ConfigError(f"unlearn: {records} names no record; one name a line")
    return hashed(names)


def _options(pairs: list[str] | None) -> dict[str, Any]:
    """Options of an action; values are read as YAML."""
    import yaml

    found = {}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        try:
            found[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            equals = ""
        if not equals:
            raise ConfigError(f"--option {pair}: expected KEY=VALUE, such as steps=20")
    return found


def _keys(places: list[Path] | None) -> Keys:
    from fedlora.unlearning.keys import authorised

    listed = places or [Path(place) for place in os.environ.get("FEDLORA_KEYS", "").split(os.pathsep) if place]
    return authorised(listed)


@contextmanager
def _lease(run: Path, patience: float) -> Iterator[Lease]:
    """The lease of a run, once whoever plays it has come to the end of its round and seen the request."""
    from orchestrator.launch import hold_run
    from orchestrator.stores.files import read_config

    config, given_up = read_config(run), time.monotonic() + patience
    while True:
        try:
            with hold_run(config, run) as lease:
                yield lease
                return
        except LeaseHeld:
            if time.monotonic() >= given_up:
                raise
            time.sleep(POLL_S)
