"""NOVA in plain PyTorch: stateless modules, one per stage, that the exporter traces; and an eager loop, the oracle."""
