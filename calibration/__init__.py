"""What quantization and its checks learn from: prompts that stand for what users ask."""

from importlib.resources import files


def prompts() -> list[str]:
    """The prompts of prompts.txt, one a line."""
    return (files(__name__) / "prompts.txt").read_text(encoding="utf-8").splitlines()
