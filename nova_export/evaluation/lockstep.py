"""Two sets of stages on the same inputs, call by call: how far one is from the other, and where.

The reference's outputs go on into the loops (teacher forcing), so that an error of one call is not in the
inputs of the next: what stands at a step arose there. How errors pile up is `drift`'s question, which lets
both run freely. Torch-free, and nothing is kept but sums.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from nova_export.evaluation.difference import Difference
from nova_export.runtime.diffusion import denoise
from nova_export.runtime.generate import Floats, StageGetter, Step
from nova_export.runtime.runner import Array, Held, Lent, Runner

Place = tuple[int, int]  # latent frame, AR step; both from 0


class Position:
    """Where in its loops a run is, known from the stages that it calls; -1 before the first frame or step."""

    def __init__(self) -> None:
        self.frame = self.step = -1

    def call(self, stage: str) -> None:
        """A stage is called. A run begins with the condition, and a frame with the temporal encoder."""
        if stage == "condition":
            self.frame = self.step = -1
        elif stage == "temporal_encoder":
            self.frame, self.step = self.frame + 1, -1
        elif stage == "spatial_encoder":
            self.step += 1


class Lockstep:
    """Stages for a Pipeline: it gets the reference's outputs, and the tested ones are compared with them.

    tensors: by stage and output. tokens: by place, what the tested stages of an AR step make together, from
    the state in which the reference is. whole_steps: whether tokens are wanted; they may take the head twice.
    """

    def __init__(self, reference: StageGetter, tested: StageGetter, whole_steps: bool = False) -> None:
        self.reference, self.tested, self.whole_steps = reference, tested, whole_steps
        self.tensors: dict[tuple[str, str], Difference] = {}
        self.tokens: dict[Place, Difference] = {}
        self._position = Position()
        self._z: tuple[Array, Array] | None = None  # of this step, the reference's and the tested one

    def __call__(self, name: str) -> Runner:
        return _Both(self, name)

    def compare(self, name: str, outputs: Mapping[str, tuple[Array, Array]]) -> None:
        """Add one call's outputs: of each the reference's and the tested one."""
        self._position.call(name)
        for tensor, pair in outputs.items():
            self.tensors.setdefault((name, tensor), Difference()).add(*pair)
        if name == "spatial_encoder":
            self._z = outputs["z"]

    def compare_tokens(self, expected: Array, made: Array, of: Callable[[Array], Array]) -> None:
        """Add a step's tokens. made: of the reference's z. of: what the tested head makes of another z."""
        if self._z and not np.array_equal(*self._z):
            made = of(self._z[1])
        place = self._position.frame, self._position.step
        self.tokens.setdefault(place, Difference()).add(expected, made)


class _Both(Lent):
    """A stage of a Lockstep."""

    def __init__(self, lockstep: Lockstep, name: str) -> None:
        self.lockstep, self.name = lockstep, name
        self.runner = lockstep.reference(name)
        self.stage = self.runner.stage

    def run(self, inputs: Mapping[str, Held]) -> Mapping[str, Held]:
        """The reference's outputs. What a stage writes in place is compared where the reference wrote."""
        aliases = {tensor.name: tensor.alias for tensor in self.stage.outputs if tensor.alias}
        before = {alias: np.array(inputs[alias]) for alias in aliases.values()}
        copies = {alias: array.copy() for alias, array in before.items()}
        tested = self._tested({**inputs, **copies})
        reference = self.runner.run(inputs)
        # Of two heads one may have a loop and one be unrolled, which has an output more.
        shared = [name for name in reference if name in tested or self.name != "diffusion_head"]
        pairs = {name: (np.asarray(reference[name]), np.asarray(tested[name])) for name in shared}
        for name, alias in aliases.items():
            written = pairs[name][0] != before[alias]
            pairs[name] = pairs[name][0][written], pairs[name][1][written]
        self.lockstep.compare(self.name, pairs)
        if self.name == "diffusion_head" and self.lockstep.whole_steps:
            shape = np.shape(inputs["z"])

            def of(z: Array) -> Array:
                return np.asarray(self._tested({**inputs, "z": z.reshape(shape)})["denoised"])

            self.lockstep.compare_tokens(*pairs["denoised"], of)
        return reference

    def _tested(self, inputs: Mapping[str, Held]) -> Mapping[str, Held]:
        runner = self.lockstep.tested(self.name)
        return denoise(runner, inputs) if self.name == "diffusion_head" else runner.run(inputs)


class Recorder:
    """A callback that keeps a run's latents, step by step, to compare a later run with."""

    def __init__(self) -> None:
        self.latents: dict[Place, Floats] = {}

    def __call__(self, step: Step) -> None:
        self.latents[step.frame, step.step] = step.latents.copy()

    def compare(self, drift: dict[Place, Difference]) -> Callable[[Step], None]:
        """A callback that adds another run's differences from this one to `drift`."""

        def callback(step: Step) -> None:
            place = step.frame, step.step
            drift.setdefault(place, Difference()).add(self.latents[place], step.latents)

        return callback
