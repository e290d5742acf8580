"""What quantization and its checks learn from: prompts that stand for what users ask, and what layers see."""

from importlib.resources import files

from nova_export.config import NovaConfig


def prompts() -> list[str]:
    """The prompts of prompts.txt, one a line."""
    return (files(__name__) / "prompts.txt").read_text(encoding="utf-8").splitlines()


def default_prompts(config: NovaConfig, count: int) -> list[str | int]:
    """ShapesEval's prompts for a checkpoint of the demo's size, class ids, or else those of prompts.txt."""
    from nova_export.errors import InputError
    from nova_export.evaluation.shapes_eval import check_source, prompt_list

    if config.is_class_conditional:
        return list(range(count))
    try:
        check_source(config, "")
    except InputError:
        return [*prompts()[:count]]
    return [item.prompt for item in prompt_list()[:count]]
