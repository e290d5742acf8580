"""nova-export: a NOVA checkpoint to deployable bundles, and videos from them without PyTorch."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nova_export.runtime.pipeline import Output, Pipeline, load
    from nova_export.runtime.request import Request

__version__ = "0.1.0"
__all__ = ["Output", "Pipeline", "Request", "__version__", "load"]

_HOMES = {"Output": "pipeline", "Pipeline": "pipeline", "Request": "request", "load": "pipeline"}


def __getattr__(name: str) -> Any:
    """Import the runtime when it is first asked for: the command line starts in a tenth of the time."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"nova_export.runtime.{_HOMES[name]}"), name)
