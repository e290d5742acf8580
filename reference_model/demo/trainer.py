"""One phase of training: optimizer, learning rate, averaged weights, and state that survives a stop.

What a step draws depends on the seed and the step's number alone, so a run that was stopped goes on as if it
had not been.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Losses = Callable[[np.random.Generator], dict[str, Tensor]]  # "loss" is what is minimised


def best_device() -> torch.device:
    """A GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Phase:
    """`steps` steps on `batch` clips of `frames` frames each; `only` weights whose names begin so.

    muon: whether Muon trains the matrices of the blocks; AdamW trains the rest, with steps as large.
    most_snr: signal to noise ratio of the diffusion loss from which on noise levels weigh less.
    cross_weight: how much more often than others a sample with a cross is drawn, the hardest outline.
    lit_weight: the same of a sample before another background than black, which most prompts leave it at.
    white_weight: the same of a sample before white, beside lit_weight.
    latent_noise: greatest deviation of noise on the latents of a clip, for a decoder that takes a
    transformer's errors; in units of the latents' own deviation where the encoder is trained too.
    """

    frames: int
    batch: int
    steps: int
    learning_rate: float
    only: str = ""
    muon: bool = False
    most_snr: float = math.inf
    cross_weight: float = 1.0
    lit_weight: float = 1.0
    white_weight: float = 1.0
    latent_noise: float = 0.0

    def weight(self, crosses: Any, lit: Any, white: Any) -> Any:
        """How much more often than the plainest a sample is drawn: of one, or arrays of them, 0 or 1."""
        return self.cross_weight**crosses * self.lit_weight**lit * self.white_weight**white


class Trainer:
    """Trains a module through one phase: Muon and AdamW under a warm-up, then a cosine down to zero.

    folder: where state and log live. average: decay of the weights' moving average, which is faster while few
    steps are done. matrices: names of the weights for Muon.
    """

    def __init__(
        self,
        module: nn.Module,
        folder: Path,
        phase: Phase,
        *,
        seed: int,
        warmup: int,
        average: float,
        weight_decay: float = 0.0,
        matrices: Collection[str] = (),
    ) -> None:
        self.module, self.folder, self.phase = module, folder, phase
        self.warmup, self.seed, self.average = warmup, seed, average
        self.step, self.seconds = 0, 0.0
        self.parameters = {n: p for n, p in module.named_parameters() if n.startswith(phase.only)}
        self.averaged = {name: p.detach().clone() for name, p in self.parameters.items()}
        muon = {n: p for n, p in self.parameters.items() if phase.muon and n in matrices}
        rest = {n: p for n, p in self.parameters.items() if n not in muon}
        adamw = torch.optim.AdamW(rest.values(), betas=(0.9, 0.98), weight_decay=weight_decay, foreach=True)
        self.optimizers: dict[str, torch.optim.Optimizer] = dict.fromkeys(rest, adamw)
        if muon:
            orthogonal = torch.optim.Muon(
                muon.values(), weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
            )
            self.optimizers |= dict.fromkeys(muon, orthogonal)
        folder.mkdir(parents=True, exist_ok=True)
        if self._state.exists():
            self._resume()

    def run(self, losses: Losses, until: int | None = None, save_every: int = 100) -> Iterator[int]:
        """Train up to step `until`, or to the end; yields the step's number whenever state was saved."""
        last = min(until or self.phase.steps, self.phase.steps)
        sums: dict[str, list[float]] = {}
        started = time.monotonic()
        while self.step < last:
            rng = np.random.default_rng((self.seed, self.step))
            torch.manual_seed(int(rng.integers(2**62)))
            values = losses(rng)
            values["loss"].backward()
            nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
            for optimizer in set(self.optimizers.values()):
                for group in optimizer.param_groups:
                    group["lr"] = self.rate(self.step)
                optimizer.step()
            self.module.zero_grad(set_to_none=True)
            self.step += 1
            self._update_average()
            for name, value in values.items():
                sums.setdefault(name, []).append(float(value.detach()))
            if self.step % save_every == 0 or self.step == last:
                self.seconds += time.monotonic() - started
                self.log({name: sum(each) / len(each) for name, each in sums.items()})
                self.save()
                yield self.step
                started, sums = time.monotonic(), {}

    def rate(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, then a cosine to zero."""
        if step < self.warmup:
            return self.phase.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / (self.phase.steps - self.warmup)
        return self.phase.learning_rate * 0.5 * (1 + math.cos(math.pi * done))

    def log(self, values: dict[str, float]) -> None:
        """One JSON line in log.jsonl, and the same to read on stdout."""
        line = {"step": self.step, "seconds": round(self.seconds, 1)}
        line |= {name: float(f"{value:.5g}") for name, value in values.items()}
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(
            f"{self.folder.parent.name}/{self.folder.name}",
            *(f"{name} {value}" for name, value in line.items()),
            flush=True,
        )

    def save(self) -> None:
        """Write everything a stopped run needs, whole or not at all."""
        tensors = {f"weight/{name}": p.detach() for name, p in self.parameters.items()}
        tensors |= {f"average/{name}": p for name, p in self.averaged.items()}
        for name, parameter in self.parameters.items():
            state = self.optimizers[name].state[parameter]
            tensors |= {f"state/{name}/{key}": value for key, value in state.items()}
        partial = self._state.with_suffix(".partial")
        metadata = {"step": str(self.step), "seconds": str(self.seconds)}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata)
        partial.replace(self._state)

    def load_average(self) -> None:
        """Put the averaged weights into the module."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self.averaged[name])

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """The module with its averaged weights, to evaluate in the middle of training."""
        kept = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.load_average()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.copy_(kept[name])

    @property
    def _state(self) -> Path:
        return self.folder / "state.safetensors"

    def _resume(self) -> None:
        from safetensors import safe_open

        tensors = load_file(self._state, device=str(next(iter(self.averaged.values())).device))
        with safe_open(self._state, "pt") as file:
            metadata = file.metadata()
        self.step, self.seconds = int(metadata["step"]), float(metadata["seconds"])
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"weight/{name}"])
                self.averaged[name] = tensors[f"average/{name}"]
                prefix = f"state/{name}/"
                self.optimizers[name].state[parameter] = {
                    key.removeprefix(prefix): tensor
                    for key, tensor in tensors.items()
                    if key.startswith(prefix)
                }

    def _update_average(self) -> None:
        decay = min(self.average, (1 + self.step) / (10 + self.step))
        averaged = list(self.averaged.values())
        torch._foreach_lerp_(averaged, [p.detach() for p in self.parameters.values()], 1 - decay)
