"""`nova-export triton`: asks a Triton server that serves a bundle."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from nova_export.cli_options import FiniteRange, json_option, quiet_option


@click.group()
def triton() -> None:
    """Ask a Triton server that serves a bundle."""


@triton.command()
@click.argument("url")
@click.option("--model", default="nova", show_default=True, help="Of the server, the one that streams.")
@click.option(
    "--timeout", type=FiniteRange(min=0, min_open=True), default=10.0, show_default=True,
    help="Seconds for the request, and for loading.",
)  # fmt: skip
@click.option("--recover", is_flag=True, help="Where it does not answer: unload and load the model.")
@quiet_option
@json_option
def health(url: str, model: str, timeout: float, recover: bool, quiet: bool, as_json: bool) -> None:
    """Have the server at URL (HOST:PORT of gRPC) make a small image; exit with 0 if it does.

    Needs the `triton` extra.
    """
    from engines.triton.health import check
    from nova_export.progress import say

    found = check(url, model, timeout, recover, report=(lambda message: None) if quiet else say)
    if as_json:
        click.echo(json.dumps(asdict(found)))
        return
    again = ", loaded again" if found.recovered else ""
    click.echo(f"{model} answers, in {found.seconds:.2f} s{again}")
