"""Passes over ONNX graphs, one a file. Each changes the model that it is given, and says what it changed."""

NAMESPACE = "namespace"  # the metadata of a node that names the torch modules it is from
