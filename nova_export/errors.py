"""Every error a user can meet: one class per cause, the message carries the value and the way out.

The command line turns an error's `exit_code` into the process's; a traceback is a bug.
"""

from __future__ import annotations


class NovaExportError(Exception):
    """Base of all expected failures. Its text is shown to the user as it stands."""

    exit_code = 1


class UsageError(NovaExportError):
    """An argument, or a combination of arguments, that cannot be carried out."""

    exit_code = 2


class CheckpointError(NovaExportError):
    """A checkpoint folder that is incomplete, corrupt, unsafe or of an unknown kind."""

    exit_code = 3


class BundleError(NovaExportError):
    """A bundle that is incomplete, changed, unsafe or of another format version."""

    exit_code = 4


class InputError(NovaExportError):
    """A prompt, image, class id or latents file that cannot be used."""

    exit_code = 5


class OutputError(NovaExportError):
    """A result that cannot be written."""

    exit_code = 6


class ExportError(NovaExportError):
    """A stage that could not be exported, or whose export does not match the reference."""

    exit_code = 7


class StageError(NovaExportError):
    """A stage was fed tensors that its spec does not allow, or failed while it ran."""

    exit_code = 8


class DependencyError(NovaExportError):
    """An optional package is missing; the message names the extra that brings it."""

    exit_code = 9


class MemoryShortage(NovaExportError):
    """There is less memory than the work needs."""

    exit_code = 10


class BatchError(NovaExportError):
    """Some results of a batch could not be made. All others are there."""

    exit_code = 11


class ServerError(NovaExportError):
    """A server that cannot be reached, or does not answer as it should."""

    exit_code = 12


class Cancelled(NovaExportError):
    """The caller's callback, or Ctrl-C, stopped the work. Nothing was written."""

    exit_code = 130
