"""A NOVA checkpoint to deployable ONNX and TensorRT bundles, and videos from them without PyTorch."""

from nova_export.runtime.pipeline import Output, Pipeline, load
from nova_export.runtime.request import Request

__version__ = "0.1.0"
__all__ = ["Output", "Pipeline", "Request", "__version__", "load"]
