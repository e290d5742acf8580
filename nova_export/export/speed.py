"""How long a stage takes in each of several graphs, turn by turn, at the sizes that its spec is tuned for."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from nova_export.config import NovaConfig
from nova_export.export.verify import sample_inputs
from nova_export.runtime.runner import OrtRunner
from nova_export.spec import Stage

TURNS = 5
ENOUGH = 20.0  # seconds: no further turn is begun


def median_seconds(stage: Stage, config: NovaConfig, graphs: Mapping[str, Path]) -> dict[str, float]:
    """Of each graph, by its name: the median of some runs, after one that is not counted."""
    sizes = {axis.name: axis.opt for axis in stage.axes}
    inputs = sample_inputs(stage, config, sizes, seed=0)
    times: dict[str, list[float]] = {name: [] for name in graphs}
    with ExitStack() as stack:
        runners = {name: stack.enter_context(OrtRunner(stage, path)) for name, path in graphs.items()}
        for runner in runners.values():
            runner.run(inputs)
        began = time.perf_counter()
        for turn in range(TURNS):
            if turn and time.perf_counter() - began > ENOUGH:
                break
            for name, runner in runners.items():
                started = time.perf_counter()
                runner.run(inputs)
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(each) for name, each in times.items()}
