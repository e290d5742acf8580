"""NOVA in plain PyTorch: stateless modules, one a stage, for the exporter; an eager loop, the oracle."""
