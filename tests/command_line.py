"""The command line, called in this process: what it exits with and what it prints."""

from __future__ import annotations

import contextlib
import io
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest

from nova_export.cli import main


@dataclass(frozen=True)
class Result:
    """Exit code, standard output and standard error of a command."""

    code: int
    out: str
    err: str


def nova_export(*arguments: str | Path) -> Result:
    """Run `nova-export ARGUMENTS`. Its changes to the warning filters are undone."""
    out, err = io.StringIO(), io.StringIO()
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as exit,
    ):
        main([str(argument) for argument in arguments])
    return Result(int(exit.value.code or 0), out.getvalue(), err.getvalue())


def only_error(result: Result, code: int, *words: str) -> None:
    """It ended with `code`, said why in one `error:` line with all these words, and printed no more."""
    assert (result.code, result.out) == (code, ""), result.err
    assert result.err.startswith("error: ") and result.err.count("\n") == 1, result.err
    assert "Traceback" not in result.err
    for word in words:
        assert word in result.err
