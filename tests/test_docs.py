"""The documentation says what the code does: commands, defaults, exit codes, examples, messages.

After changing a command, `python -m tests.test_docs` writes the tables of docs/cli.md anew.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Callable, Iterator
from inspect import cleandoc
from pathlib import Path
from typing import Any

import click
import pytest

from nova_export import cli, errors
from nova_export.runtime.request import Request

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
CLI = DOCS / "cli.md"
BLOCK = "<!-- {}: written by tests/test_docs.py -->\n{}<!-- end -->\n"


def commands(group: click.Group = cli.cli, prefix: str = "") -> dict[str, click.Command]:
    """By what a user types; those of a group by its name and theirs."""
    found: dict[str, click.Command] = {}
    for name, command in group.commands.items():
        within = commands(command, f"{name} ") if isinstance(command, click.Group) else {name: command}
        found |= {prefix + inner: each for inner, each in within.items()}
    return found


def default_of(param: click.Parameter) -> str:
    """As a reader needs it. click keeps a sentinel where there is no default."""
    value = param.default
    if param.required:
        return "required"
    if isinstance(param, click.Option) and param.is_flag and not param.secondary_opts:
        return "off" if value is not True else "on"
    if isinstance(param, click.Option) and param.secondary_opts:
        return f"`{(param.opts if value else param.secondary_opts)[0]}`"
    return f"`{value}`" if isinstance(value, (str, int, float, Path)) else "none"


def kind_of(param: click.Parameter) -> str:
    if isinstance(param, click.Option) and param.is_flag:
        return ""
    limits = (("at least", getattr(param.type, "min", None)), ("at most", getattr(param.type, "max", None)))
    bounds = [f"{sign} {size}" for sign, size in limits if size is not None]
    choices = getattr(param.type, "choices", ())
    name = {"integer range": "integer", "float range": "float"}.get(param.type.name, param.type.name)
    return ", ".join([" or ".join(map(str, choices)) or name, *bounds])


def row(param: click.Parameter) -> str:
    names = (
        [*param.opts, *param.secondary_opts] if isinstance(param, click.Option) else [str(param.name).upper()]
    )
    text = (
        param.help or ""
        if isinstance(param, click.Option)
        else "several are allowed"
        if param.nargs == -1
        else ""
    )
    shown = " ".join(f"`{name}`" for name in names)
    return f"| {shown} | {kind_of(param)} | {default_of(param)} | {text} |"


def command_section(name: str, command: click.Command) -> str:
    group = cli.cli
    parent = click.Context(group, info_name="nova-export", **group.context_settings)
    context = click.Context(command, info_name=name, parent=parent)
    usage = command.get_usage(context).removeprefix("Usage: ")
    rows = "\n".join(row(param) for param in command.params)
    head = "| option | value | default | what it does |\n|---|---|---|---|"
    return f"```\n{usage}\n```\n\n{cleandoc(command.help or '')}\n\n{head}\n{rows}\n"


def exit_codes() -> dict[int, str]:
    classes = [value for value in vars(errors).values() if isinstance(value, type)]
    found = {0: "Done."}
    for error in sorted(classes, key=lambda each: int(each.exit_code)):
        found[error.exit_code] = (error.__doc__ or "").strip().splitlines()[0]
    found[errors.NovaExportError.exit_code] = "Another expected failure."
    found[cli.EXIT_BUG] = "A bug in nova-export. The message says how to report it."
    return dict(sorted(found.items()))


def exit_code_section() -> str:
    rows = "\n".join(f"| {code} | {meaning} |" for code, meaning in exit_codes().items())
    return f"| code | meaning |\n|---|---|\n{rows}\n"


def sections() -> dict[str, str]:
    """What docs/cli.md must hold, by the name of the block."""
    return {
        **{name: command_section(name, made) for name, made in commands().items()},
        "exit codes": exit_code_section(),
    }


def rewritten(text: str) -> str:
    """The text with every block as it must be; a new command gets a section before the exit codes."""
    for name, body in sections().items():
        block = BLOCK.format(name, "\n" + body + "\n")
        pattern = re.compile(re.escape(f"<!-- {name}: ") + r".*?<!-- end -->\n", re.DOTALL)
        if pattern.search(text):
            text = pattern.sub(lambda _, block=block: block, text)
        else:
            before, heading, after = text.partition("## Exit codes\n")
            text = f"{before}## `nova-export {name}`\n\n{block}\n{heading}{after}"
    return text


@pytest.mark.parametrize("name", sections())
def test_cli_md_says_what_click_says(name: str) -> None:
    """Every command, option and default, and every exit code."""
    block = BLOCK.format(name, "\n" + sections()[name] + "\n")
    assert block in CLI.read_text(encoding="utf-8"), "run: python -m tests.test_docs"


def test_cli_md_has_no_command_that_is_gone() -> None:
    blocks = re.findall(r"<!-- (.+?): written by", CLI.read_text(encoding="utf-8"))
    assert sorted(blocks) == sorted(sections())
    headings = re.findall(r"^## `nova-export ([\w ]+)`", CLI.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(headings) == sorted(commands())


def test_every_option_has_help() -> None:
    for name, command in commands().items():
        assert command.help, name
        for param in command.params:
            assert not isinstance(param, click.Option) or param.help, (name, param.name)


def test_every_argument_of_python_stands_in_python_md() -> None:
    text = (DOCS / "python.md").read_text(encoding="utf-8")
    for name, field in Request.__dataclass_fields__.items():
        default = "" if name == "prompt" else f"| `{field.default!r}` |"
        assert f"| `{name}` {default}" in text, name


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / "python.md").read_text(encoding="utf-8"), re.DOTALL)


def test_the_examples_of_python_md_run(
    golden_bundle: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order of the page, in one namespace, beside a bundle and an image."""
    from PIL import Image

    (tmp_path / "bundle").symlink_to(golden_bundle("t2v"))
    Image.new("RGB", (96, 64), "teal").save(tmp_path / "first.png")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for code in python_blocks():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(compile(code, "docs/python.md", "exec"), names)
    assert (tmp_path / "out.mp4").stat().st_size > 0 and (tmp_path / "out.npz").stat().st_size > 0


def messages() -> str:
    """All text in the sources, f-strings with … in the place of their values."""
    texts = []
    for path in [*(ROOT / "nova_export").rglob("*.py"), *(ROOT / "reference_model").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                texts.append(
                    "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                )
    return "\n".join(texts)


def test_troubleshooting_quotes_real_messages() -> None:
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^### `(.+)`$", text, re.MULTILINE)
    known = messages()
    assert len(quoted) > 10
    assert [quote for quote in quoted if quote not in known] == []


def links(page: Path) -> Iterator[str]:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            yield target


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_pages_point_at_what_is_there(page: Path) -> None:
    """Links, and paths of sources in backticks."""
    for target in links(page):
        assert (page.parent / target).exists(), target
    for path in re.findall(
        r"`((?:nova_export|reference_model|tests|docs|benchmarks)/[\w/.]+)`", page.read_text("utf-8")
    ):
        assert (ROOT / path).exists(), path


if __name__ == "__main__":
    CLI.write_text(rewritten(CLI.read_text(encoding="utf-8")), encoding="utf-8")
