"""The eager pipeline against golden videos, stage by stage too; the torch-free runtime against it.

The runtime gets torch modules here, so that what is compared is loops, guidance, schedules and draws alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nova_export.config import NovaConfig
from nova_export.errors import Cancelled, CheckpointError, StageError, UsageError
from nova_export.runtime.pipeline import Pipeline
from nova_export.runtime.request import Request
from nova_export.runtime.tokenizer import PromptTokenizer
from nova_export.stages import stages
from reference_model.checkpoint import make_module
from reference_model.eager import EagerPipeline, Memory, denoise, encode_frame, encode_tokens
from reference_model.guidance import Guider
from reference_model.init import init_checkpoint
from reference_model.runner import TorchRunner
from reference_model.schedulers import make_scheduler
from tests.conftest import GOLDEN, golden_calls

EXTRA = GOLDEN.parent / "golden_extra"
TOLERANCE = 5e-4  # of golden latents, as their README says
CHECKPOINTS = ("t2v", "t2i", "t2v-rope")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The models are tiny: threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def eager(name: str, draw_dtype: torch.dtype = torch.float32) -> EagerPipeline:
    return EagerPipeline.from_checkpoint(GOLDEN / name / "checkpoint", draw_dtype)


def runtime(pipeline: EagerPipeline, checkpoint: Path) -> Pipeline:
    """The torch-free pipeline over the same modules."""
    config = pipeline.config
    runners = {n: TorchRunner(spec, pipeline.modules[n]) for n, spec in stages(config).items()}
    tokenizer = None
    if pipeline.tokenizer is not None:
        tokenizer = PromptTokenizer(checkpoint / "tokenizer/tokenizer.json", config.text_len)
    return Pipeline(config, runners.__getitem__, tokenizer)


def worst(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(np.float64) - b).max())


# --- golden videos ---


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_golden_call(name: str) -> None:
    arguments, expected = golden_calls(name)[0]
    out = eager(name)(**arguments)
    assert worst(out.latents, expected["latents"]) <= (2e-4 if name == "t2v-rope" else 5e-5)
    assert worst(out.frames, expected["frames"].reshape(out.frames.shape)) <= 1


def test_golden_call_drawn_in_double() -> None:
    arguments, expected = golden_calls("t2v")[1]
    out = eager("t2v", torch.float64)(**arguments)
    assert worst(out.latents, expected["latents"]) <= 5e-5
    assert worst(out.frames, expected["frames"]) <= 1
    assert worst(eager("t2v")(**arguments).latents, expected["latents"]) > 1  # in single: another video


def test_golden_call_drawn_in_single() -> None:
    """The same call, recorded again as users draw."""
    arguments, _ = golden_calls("t2v")[1]
    expected = np.load(EXTRA / "t2v_call1_float32.npz")
    assert worst(eager("t2v")(**arguments).latents, expected["latents"]) <= TOLERANCE


@pytest.mark.parametrize("case", sorted(path.stem for path in EXTRA.glob("*.json")))
@pytest.mark.filterwarnings("ignore:image")
def test_golden_extra(case: str, tmp_path: Path) -> None:
    """What the published package gives for every option: the eager pipeline does, and the runtime."""
    data, expected = json.loads((EXTRA / f"{case}.json").read_text()), np.load(EXTRA / f"{case}.npz")
    checkpoint = init_checkpoint(**data["init"], out=tmp_path / "checkpoint")
    pipeline = EagerPipeline.from_checkpoint(checkpoint)
    arguments = {**data["call"], **({"image": expected["image"]} if data["image"] else {})}
    for out in (pipeline(**arguments), runtime(pipeline, checkpoint)(**arguments)):
        assert worst(out.latents, expected["latents"]) <= TOLERANCE
        if "frames" in expected:
            frames = expected["frames"].reshape(expected["latents"].shape[0], -1, *out.frames.shape[2:])
            assert worst(out.frames[:, : frames.shape[1]], frames) <= 1  # published drops a last partial tile


# --- every stage by itself, fed what the published package fed it ---


def golden(name: str) -> tuple[EagerPipeline, dict[str, Any], Any]:
    return (eager(name), *golden_calls(name)[0])


def tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_text_matches_golden(name: str) -> None:
    pipeline, arguments, expected = golden(name)
    states, lengths = pipeline.encode_text([arguments["prompt"], ""])
    assert lengths[1] == 0
    n = int(lengths[0])
    assert worst(states[0, :n].numpy(), expected["prompt_embeds"][0, 0, :n]) <= 1e-5
    tokens = pipeline.modules["condition"].text_embed(states, lengths)
    assert worst(tokens.numpy(), expected["text_tokens"][0]) <= 1e-5


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_temporal_encoder_matches_golden(name: str) -> None:
    """Recorded before the mixer: so frames after the first are compared where there is none."""
    pipeline, arguments, expected = golden(name)
    request = Request(**arguments)
    condition, memory = pipeline.condition(request), Memory()
    frames = len(expected["temporal_out"]) if pipeline.config.mixer_rank is None else 1
    latents = torch.zeros_like(tensor(expected["latents"][:, :, 0]))
    for t in range(frames):
        context = encode_frame(
            pipeline.modules["temporal_encoder"],
            Guider.of(request, pipeline.config),
            memory,
            latents,
            condition,
            torch.tensor([float(t)]),
        )
        assert worst(context.detach().numpy(), expected["temporal_out"][t]) <= 2e-4
        latents = tensor(expected["latents"][:, :, t])


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_spatial_encoder_and_head_match_golden(name: str) -> None:
    """First frame, every AR step, on the golden context, latents and z; the head in its published form."""
    pipeline, arguments, expected = golden(name)
    module, head = pipeline.modules["spatial_encoder"], pipeline.modules["diffusion_head"]
    guider = Guider(arguments["guidance_scale"], arguments["guidance_scale"], 1, 0, 1, 0, 0)
    scheduler = make_scheduler(pipeline.config.scheduler, arguments["num_diffusion_steps"])
    context = tensor(expected["temporal_out"][0])
    generator = torch.Generator().manual_seed(arguments["seed"])
    torch.rand(1, pipeline.config.num_tokens, 1, generator=generator)
    patches = module.image_encoder.patch_embed
    tokens = torch.zeros(1, pipeline.config.num_tokens, pipeline.config.token_dim)
    known = torch.zeros(1, 0, 1, dtype=torch.int64)
    for step in range(len(expected["spatial_out"]) // expected["latents"].shape[2]):
        now = tensor(expected[f"pred_ids.{step}"])
        latents = patches.unpatchify(tokens, pipeline.config.token_grid)
        z = encode_tokens(module, guider, latents, context, known)
        assert worst(z.numpy(), expected["spatial_out"][step]) <= TOLERANCE
        noise = torch.randn(latents.shape, generator=generator)
        assert worst(noise.numpy(), expected["noise"][step]) == 0
        z = tensor(expected["spatial_out"][step])
        sample = denoise(
            head, guider, scheduler, z, noise, now, lambda shape: torch.randn(shape, generator=generator)
        )
        ids = now.expand(-1, -1, tokens.shape[-1])
        result = patches.patchify(sample).gather(1, ids)
        golden_tokens = tensor(expected["denoised_tokens"][step]).gather(1, ids)
        assert worst(result.numpy(), golden_tokens.numpy()) <= 5e-5
        tokens, known = tokens.scatter(1, ids, golden_tokens), torch.cat([known, now], dim=1)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_stage_module_gives_the_z_that_the_published_form_gives(name: str) -> None:
    """`SpatialEncoder.all_tokens` and `forward` (K tokens only) against the published form, all N tokens."""
    pipeline, rows = eager(name), 2
    module, config = pipeline.modules["spatial_encoder"], pipeline.config
    torch.manual_seed(0)
    context = torch.randn(rows, config.frame_tokens, config.temporal.width)
    tokens = torch.randn(1, config.num_tokens, config.token_dim)
    order = torch.randperm(config.num_tokens)[None, :, None]
    known, following = order[:, :5], order[:, 5:9]
    values = tokens.gather(1, known.expand(-1, -1, config.token_dim))
    held = torch.zeros_like(tokens).scatter(1, known.expand_as(values), values)
    latents = module.image_encoder.patch_embed.unpatchify(held, config.token_grid)
    published = encode_tokens(module, Guider(5, 5, 5, 0, 1, 0, 0), latents, context, known)
    inputs = (context, values.expand(rows, -1, -1), known[..., 0].expand(rows, -1))
    assert worst(module.all_tokens(*inputs).numpy(), published.numpy()) <= 1e-4
    ids = following[..., 0].expand(rows, -1)
    wanted = published.gather(1, ids[..., None].expand(-1, -1, published.shape[-1]))
    assert worst(module(*inputs, ids).numpy(), wanted.numpy()) <= 1e-4


# --- the torch-free runtime agrees, option by option ---


def random_pipeline(config: NovaConfig, seed: int = 0) -> EagerPipeline:
    """A checkpoint's modules with random weights, for configs that no golden checkpoint has."""
    torch.manual_seed(seed)
    modules = {}
    for name, stage in stages(config).items():
        module = make_module(stage, config)
        for key, parameter in module.named_parameters():
            if key.endswith(("_token", "embed.weight")):
                nn.init.normal_(parameter, std=0.5)
        modules[name] = module.eval().requires_grad_(False)
    return EagerPipeline(config, modules)


def class_conditional() -> EagerPipeline:
    return random_pipeline(replace(eager("t2i").config, text_dim=None, text_len=0, text_encoder=None))


def scheduled(name: str = "t2v", **options: Any) -> Callable[[], EagerPipeline]:
    """A golden checkpoint with other scheduler options."""

    def make() -> EagerPipeline:
        pipeline = eager(name)
        return replace(
            pipeline, config=replace(pipeline.config, scheduler={**pipeline.config.scheduler, **options})
        )

    return make


def same(pipeline: EagerPipeline, name: str, **arguments: Any) -> None:
    steps = {"num_inference_steps": 3, "num_diffusion_steps": 4, "seed": 11}
    arguments = {**steps, **arguments}
    expected = pipeline(**arguments)
    actual = runtime(pipeline, GOLDEN / name / "checkpoint")(**arguments)
    assert np.isfinite(expected.latents).all() and expected.latents.std() > 0.1
    scale = max(1.0, float(np.abs(expected.latents).max()))
    assert worst(actual.latents, expected.latents) <= 1e-4 * scale
    assert worst(actual.frames, expected.frames) <= 1


PROMPT = "a red circle moving right"
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no guidance": {"guidance_scale": 1},
    "negative prompt": {"negative_prompt": "niagara falls"},
    "motion flow": {"motion_flow": 9.5},
    "renorm": {"guidance_renorm": 0.4},
    "full renorm": {"guidance_renorm": 0},
    "trunc": {"guidance_trunc": 400},
    "trunc of all steps": {"guidance_trunc": 2000},
    "trunc and renorm": {"guidance_trunc": 300, "guidance_renorm": 0.6},
    "growing scale": {"min_guidance_scale": 1.5},
    "growing from 1": {"min_guidance_scale": 1, "guidance_renorm": 0.5},
    "spatiotemporal": {"spatiotemporal_guidance_scale": 1.3},
    "spatiotemporal, renorm, trunc": {
        "spatiotemporal_guidance_scale": 2,
        "guidance_renorm": 0.5,
        "guidance_trunc": 300,
    },
    "image guidance": {"image_guidance_scale": 1.7},
    "image guidance, all": {
        "image_guidance_scale": 1.7,
        "guidance_renorm": 0.5,
        "guidance_trunc": 300,
        "min_guidance_scale": 2,
    },
    "batch": {"prompt": [PROMPT, "a blue square"], "num_images_per_prompt": 2, "guidance_renorm": 0.5},
    "batch, extra pass": {
        "prompt": [PROMPT, "a blue square"],
        "negative_prompt": ["", "red"],
        "spatiotemporal_guidance_scale": 1,
    },
    "one AR step": {"num_inference_steps": 1},
    "more AR steps than tokens": {"num_inference_steps": 40, "num_diffusion_steps": 2},
    "one diffusion step": {"num_diffusion_steps": 1},
    "long prompt": {"prompt": " ".join(["word"] * 40)},
    "empty prompt": {"prompt": ""},
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_another_number_type(name: str) -> None:
    """As it runs on GPUs, in half precision: nothing in between is made in another type."""
    call = {"prompt": PROMPT, "num_inference_steps": 2, "num_diffusion_steps": 2, "seed": 1}
    if name != "t2i":
        call |= {"max_latent_length": 2, "image": np.full((64, 96, 3), 99, np.uint8)}
    expected = eager(name)(**call)
    own = EagerPipeline.from_checkpoint(GOLDEN / name / "checkpoint").to("cpu", torch.bfloat16)
    seen: dict[str, torch.dtype] = {}
    actual = own(**call, observe=lambda name, tensor: seen.setdefault(name, tensor.dtype))
    assert {d for name, d in seen.items() if name != "pred_ids"} == {torch.bfloat16}
    assert actual.latents.dtype == np.float32
    error = np.abs(actual.latents - expected.latents).mean() / expected.latents.std()
    assert 1e-4 < error < 0.2


@pytest.mark.parametrize("name", ["t2v", "t2v-rope"])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.filterwarnings("ignore:prompt has")
def test_runtime_agrees_on_video(name: str, option: str) -> None:
    same(eager(name), name, **{"prompt": PROMPT, "max_latent_length": 2, **OPTIONS[option]})


def test_runtime_agrees_on_a_checkpoints_own_guidance() -> None:
    published = eager("t2i")
    same(replace(published, config=replace(published.config, guidance_scale=1.5)), "t2i", prompt=PROMPT)


@pytest.mark.parametrize("option", ["plain", "renorm", "batch", "no guidance", "growing scale"])
def test_runtime_agrees_on_images(option: str) -> None:
    same(eager("t2i"), "t2i", **{"prompt": PROMPT, **OPTIONS[option]})


@pytest.mark.parametrize(
    "arguments",
    [
        {"prompt": 7},
        {"prompt": [0, 999], "num_images_per_prompt": 2},
        {"prompt": [3, 4], "negative_prompt": [5, 6], "guidance_renorm": 0.5},
        {"prompt": 7, "guidance_scale": 1},
        {"prompt": 7, "min_guidance_scale": 2, "guidance_trunc": 300},
    ],
)
def test_runtime_agrees_on_class_conditional(arguments: dict[str, Any]) -> None:
    same(class_conditional(), "t2i", **arguments)


@pytest.mark.parametrize("name", ["t2v", "t2v-rope"])
@pytest.mark.parametrize("option", ["plain", "batch", "spatiotemporal", "image guidance"])
def test_runtime_agrees_on_image_to_video(name: str, option: str) -> None:
    pipeline = eager(name)
    image = np.random.default_rng(0).integers(0, 256, (*pipeline.config.image_size, 3), np.uint8)
    same(pipeline, name, **{"prompt": PROMPT, "image": image, "max_latent_length": 2, **OPTIONS[option]})


FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 1.0}
SCHEDULERS: dict[str, dict[str, Any]] = {
    **{f"betas {kind}": {"beta_schedule": kind} for kind in ("linear", "scaled_linear", "sigmoid")},
    "betas given": {"trained_betas": np.linspace(1e-4, 0.03, 1000).tolist()},
    **{f"spacing {kind}": {"timestep_spacing": kind} for kind in ("linspace", "trailing")},
    "steps offset": {"steps_offset": 1},
    "zero snr": {"rescale_betas_zero_snr": True, "beta_schedule": "linear"},
    "zero snr, velocity, trailing": {
        "rescale_betas_zero_snr": True,
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
    },
    **{f"predicts {kind}": {"prediction_type": kind} for kind in ("sample", "v_prediction")},
    **{f"variance {kind}": {"variance_type": kind} for kind in ("fixed_small_log", "fixed_large")},
    "fewer trained steps": {"num_train_timesteps": 300},
    "flow": FLOW,
    "flow, trained shift": {**FLOW, "shift": 3.0},
}


@pytest.mark.parametrize("options", SCHEDULERS.values(), ids=list(SCHEDULERS))
@pytest.mark.parametrize("steps", [1, 7])
def test_runtime_agrees_on_schedulers(options: dict[str, Any], steps: int) -> None:
    pipeline = scheduled(**options)()
    same(pipeline, "t2v", prompt=PROMPT, num_diffusion_steps=steps, guidance_renorm=0.7, guidance_scale=3)


@pytest.mark.parametrize(
    "arguments", [{"flow_shift": 2.5}, {"guidance_trunc": 600}, {"guidance_renorm": 0.3, "flow_shift": 0.5}]
)
def test_runtime_agrees_on_flow_matching(arguments: dict[str, Any]) -> None:
    same(scheduled(**FLOW)(), "t2v", prompt=PROMPT, **arguments)


# --- manners ---


def test_arguments_are_checked_as_the_runtime_checks_them() -> None:
    with pytest.raises(UsageError, match="num_inference_steps"):
        eager("t2v")(PROMPT, num_inference_steps=0)


def test_callback_cancels() -> None:
    with pytest.raises(Cancelled, match="frame 1 of 1, step 2"):
        eager("t2v")(PROMPT, num_inference_steps=4, num_diffusion_steps=1, callback=lambda s: s.step < 1)


@pytest.mark.parametrize(
    "options",
    [
        {"_class_name": "DDIMScheduler"},
        {"beta_schedule": "?"},
        {"timestep_spacing": "?"},
        {"prediction_type": "?"},
        {"variance_type": "learned"},
        {**FLOW, "use_dynamic_shifting": True},
    ],
)
def test_unknown_schedulers_are_refused(options: dict[str, Any]) -> None:
    scheduler = {"_class_name": "DDPMScheduler", **options}
    with pytest.raises(CheckpointError, match=r"scheduler_config\.json"):
        made = make_scheduler(scheduler, 4)
        made.step(0, torch.zeros(1), torch.zeros(1), torch.zeros)


def test_runner_writes_aliased_outputs_into_their_inputs() -> None:
    pipeline = eager("t2v")
    stage = stages(pipeline.config)["temporal_encoder"]
    shapes = stage.shapes({"rows": 1, "text": 0, "capacity": 40})
    inputs = {t.name: np.zeros(shapes[t.name], t.dtype) for t in stage.inputs}
    outputs = TorchRunner(stage, pipeline.modules["temporal_encoder"]).run(inputs)
    assert outputs["new_key_cache_0"] is inputs["key_cache_0"]
    assert np.abs(inputs["key_cache_0"]).max() > 0


def test_runner_refuses_what_the_spec_does_not_allow() -> None:
    pipeline = eager("t2v")
    runner = TorchRunner(stages(pipeline.config)["vae_decoder"], pipeline.modules["vae_decoder"])
    with pytest.raises(StageError, match="latents"):
        runner.run({"latents": np.zeros((1, 4, 1, 8, 12), np.float64)})
