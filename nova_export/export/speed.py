"""How long a stage takes in each of several graphs, turn by turn, at the sizes that its spec is tuned for."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from nova_export.config import NovaConfig
from nova_export.export.bench import Options, interleave
from nova_export.export.contenders import stage_sizes
from nova_export.export.verify import sample_inputs
from nova_export.runtime.runner import OrtRunner
from nova_export.spec import Stage

TIMING = Options(repeats=5, budget=20.0)


def median_seconds(stage: Stage, config: NovaConfig, graphs: Mapping[str, Path]) -> dict[str, float]:
    """Of each graph, by its name: the median of some runs, after one that is not counted."""
    inputs = sample_inputs(stage, config, stage_sizes(stage, {}), seed=0)
    with ExitStack() as stack:
        runners = {name: stack.enter_context(OrtRunner(stage, path)) for name, path in graphs.items()}
        runs = {name: partial(runner.run, inputs) for name, runner in runners.items()}
        for run in runs.values():
            run()
        times = interleave(runs, TIMING)
    return {name: statistics.median(each) for name, each in times.items()}
