"""`nova-export doctor`: what this machine has, can do, and lacks."""

from __future__ import annotations

import json

import click

from nova_export.cli_options import json_option


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Show what this machine has, what nova-export can build and run on it, and how to get the rest.

    Looks only: nothing is changed, and nothing is downloaded.
    """
    from dataclasses import asdict

    from nova_export.doctor import examine

    findings = examine()
    if as_json:
        click.echo(json.dumps([asdict(each) for each in findings]))
        return
    width = max(len(each.name) for each in findings)
    for each in findings:
        click.echo(f"{each.name.ljust(width)}  {each.value or 'none'}")
        if each.fix:
            click.echo(f"{' ' * width}  -> {each.fix}")
