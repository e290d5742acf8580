"""Serving a bundle with Triton Inference Server: its model repository, what runs in it, and a client."""
