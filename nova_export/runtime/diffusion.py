"""The diffusion steps of one AR step, in as many calls of the head as they take.

A head with a loop does any number in one. An unrolled one does so many a call: each goes on from what the one
before left, and steps that change nothing fill up the last.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from nova_export.runtime.runner import Array, Held, Runner
from nova_export.spec import Stage

KEEP = (1, 0, 0)  # a, b, s of x' = a x + b eps + s noise
NOISES = ("step_noise", "step_rest_noise")


def denoise(head: Runner, inputs: Mapping[str, Held]) -> Mapping[str, Held]:
    """Outputs of the head after all steps of the tables. inputs: as of a head with a loop."""
    axis = head.stage.axis("steps")
    if axis.min < axis.max:
        return head.run(inputs)
    outputs: Mapping[str, Held] = {"denoised": inputs["noise"], "next_rest": inputs["rest"]}
    tables = {name: np.asarray(inputs[name]) for name in step_tables(head.stage)}
    for start in range(0, len(tables["step_coefficients"]), axis.max):
        rows = {
            name: filled_up(name, table[start : start + axis.max], axis.max) for name, table in tables.items()
        }
        state = {"noise": outputs["denoised"], "rest": outputs["next_rest"]}
        outputs = head.run({**inputs, **rows, **state})
    return outputs


def step_tables(stage: Stage) -> list[str]:
    """Inputs that have a row for each step."""
    return [tensor.name for tensor in stage.inputs if tensor.shape[0] == "steps"]


def filled_up(name: str, rows: Array, steps: int) -> Array:
    """A table of so many steps: those that it lacks predict as the last one, and take nothing of it."""
    if not (missing := steps - len(rows)):
        return rows
    more = np.repeat(rows[-1:], missing, axis=0)
    if name == "step_coefficients":
        more[:] = KEEP
    elif name in NOISES:
        more[:] = 0
    return np.concatenate([rows, more])
