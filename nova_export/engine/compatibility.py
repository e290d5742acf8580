"""What engines are made for, and whether this machine can run those of a bundle, before any is loaded."""

from __future__ import annotations

from collections.abc import Mapping

from nova_export.bundle import Bundle, EngineEntry
from nova_export.engine.compiler import KEPT
from nova_export.engine.flavour import flavour, machine_capability
from nova_export.errors import BundleError, UsageError
from nova_export.targets import BUILDERS, TARGETS, Target, find


def made_by(target: Target) -> dict[str, str]:
    """What engines for a target depend on beside graph and profile. Raises DependencyError, UsageError."""
    capability = target.compute_capability or machine_capability()
    if capability is None:
        raise UsageError(
            "there is no NVIDIA GPU in this machine to compile for; name a target like rtx-40, or build with "
            "--no-engines and compile on the device"
        )
    if target.hardware and (wanted := target.hardware.compute_capability) != capability:
        raise UsageError(
            f"target {target.name} has compute capability {wanted}, this machine's GPU {capability}; compile "
            "on the device itself, or for the target `tensorrt`"
        )
    return {**_runtime(target), "compute capability": capability}


def _runtime(target: Target) -> dict[str, str]:
    kind = flavour(target.runtime)
    return {"runtime": kind.name, "version": str(kind.load().__version__)}


DEFAULTS = {"weights": KEPT, "builder": BUILDERS[0]}  # of engines that were made before there was a choice


def changed(entry: EngineEntry, wanted: Mapping[str, str]) -> str:
    """Why an engine is not the wanted one; empty if it is."""
    for name, value in wanted.items():
        if (had := entry.made_of.get(name, DEFAULTS.get(name))) != value:
            # Digests say nothing to a person.
            return f"another {name}" if name in ("graph", "profile") else f"{name} was {had!r}, is {value!r}"
    return ""


def check_engines(bundle: Bundle, target: str) -> None:
    """Whether this machine can run a bundle's engines for a target.

    Raises BundleError: some are missing, or for another GPU or version. DependencyError: no TensorRT here.
    UsageError: no GPU here.
    """
    command = f"nova-export engines {bundle.folder} --target {target}"
    again = f"`{command}` compiles them, --device cpu does without"
    engines = bundle.engines.get(target, {})
    if missing := sorted(bundle.stages.keys() - engines.keys()):
        raise BundleError(f"{bundle.folder}: has no engine of {missing[0]} for {target}; {again}")
    capability = machine_capability()
    if capability is None:
        raise UsageError(f"{target}: there is no NVIDIA GPU in this machine; --device cpu does without")
    here = {**_runtime(find(TARGETS, target)), "compute capability": capability}
    for name, engine in engines.items():
        if why := changed(engine, here):
            raise BundleError(f"{bundle.folder}: {name} for {target} cannot run here: {why}; {again}")
