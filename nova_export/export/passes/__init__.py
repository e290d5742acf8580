"""Passes over ONNX graphs, one a file. Each changes the model that it is given, and says what it changed."""
