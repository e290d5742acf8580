"""Recipes in TOML: which stage gets which precision, and which layers stay in float."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from nova_export.errors import InputError
from nova_export.toml_file import read_toml

FOLDER = "recipes"


@dataclass(frozen=True)
class Recipe:
    """precision: of all stages but those of `stages`. float_layers: by stage, patterns of layers' names
    (as in a shell, * for anything) that a precision in integers leaves in float."""

    precision: str = "fp32"
    stages: Mapping[str, str] = field(default_factory=dict)
    float_layers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def load(cls, name: str) -> Recipe:
        """A .toml file, or one of those that come with the package, by its name. Raises InputError."""
        path = Path(name) if name.endswith(".toml") else _folder() / f"{name}.toml"
        try:
            data = read_toml(path)
        except FileNotFoundError:
            known = ", ".join(sorted(each.stem for each in _folder().glob("*.toml")))
            raise InputError(
                f"recipe {name!r}: no such file; there is {known}, or name a .toml file"
            ) from None
        except (OSError, ValueError) as error:
            raise InputError(f"recipe {path}: cannot be read as TOML ({error})") from error
        return cls.from_dict(data, str(path))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "recipe") -> Recipe:
        """Raises InputError for what is no recipe; whether precisions and stages exist, the build says."""
        if unknown := data.keys() - {"precision", "stages", "float_layers"}:
            raise InputError(
                f"{where}: {min(unknown)!r} is unknown; it may have precision, stages, float_layers"
            )
        precision, stages = data.get("precision", "fp32"), data.get("stages", {})
        layers = data.get("float_layers", {})
        if not isinstance(precision, str):
            raise InputError(f"{where}: precision is {precision!r}; it must be a name, in quotes")
        if not isinstance(stages, dict) or not all(isinstance(value, str) for value in stages.values()):
            raise InputError(
                f'{where}: [stages] is {stages!r}; it must have lines like text_encoder = "fp16"'
            )
        if not isinstance(layers, dict) or not all(_is_names(value) for value in layers.values()):
            raise InputError(
                f'{where}: [float_layers] is {layers!r}; it must have lines like text_encoder = ["*.fc2"]'
            )
        return cls(precision, dict(stages), {stage: tuple(names) for stage, names in layers.items()})


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _folder() -> Path:
    return Path(str(files("calibration"))) / FOLDER
