"""nova_export.stages: the declarations hang together, and the reference modules are what they say."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from nova_export.config import NovaConfig
from nova_export.export.verify import run_module, sample_inputs, verify_sizes
from nova_export.spec import Stage
from nova_export.stages import MAX_BATCH, MAX_PASSES, cache_names, stages
from reference_model.checkpoint import Weights, make_module
from tests.conftest import GOLDEN
from tests.strategies import configs, tiny_config

torch = pytest.importorskip("torch")

# Sizes that follow from the inputs', so no axis bounds them.
DERIVED = {"vae_encoder": {"latent_height", "latent_width"}, "vae_decoder": {"frames", "height", "width"}}
GOLDEN_NAMES = ("t2v", "t2v-rope", "t2i")


def golden_config(name: str) -> NovaConfig:
    return NovaConfig.from_checkpoint(GOLDEN / name / "checkpoint")


def made_module(stage: Stage, config: NovaConfig) -> torch.nn.Module:
    module = make_module(stage, config)
    return module.eval().requires_grad_(False)


def check_declarations(config: NovaConfig) -> None:
    made = stages(config)
    for name, stage in made.items():
        assert name == stage.name
        inputs, outputs = ([t.name for t in tensors] for tensors in (stage.inputs, stage.outputs))
        assert len({*inputs, *outputs}) == len(inputs) + len(outputs), name  # one namespace in a graph
        axes = [axis.name for axis in stage.axes]
        assert len(set(axes)) == len(axes), name
        used_in = {size for t in stage.inputs for size in t.shape if isinstance(size, str)}
        used_out = {size for t in stage.outputs for size in t.shape if isinstance(size, str)}
        assert used_in == set(axes), name
        assert used_out - used_in == DERIVED.get(name, set()), name
        by_name = {t.name: t for t in stage.inputs}
        for tensor in stage.outputs:
            if tensor.alias:
                aliased = by_name[tensor.alias]
                assert (aliased.shape, aliased.dtype) == (tensor.shape, tensor.dtype)
        aliases = [t.alias for t in stage.outputs if t.alias]
        assert len(set(aliases)) == len(aliases)


def check_modules(config: NovaConfig) -> None:
    for stage in stages(config).values():
        with torch.device("meta"):
            module = made_module(stage, config)
        signature = inspect.signature(module.forward)
        names = [t.name for t in stage.inputs]
        signature.bind(**dict.fromkeys(names))  # raises TypeError: a name too many, or one missing
        unused = {p.name for p in signature.parameters.values() if p.kind != p.VAR_KEYWORD} - set(names)
        assert unused <= {"first_context", "motion"}  # which not every checkpoint has
        assert [key for key in module.state_dict() if not key.startswith(stage.prefixes)] == []


@given(configs)
@settings(deadline=None)
def test_declarations_hang_together(config: NovaConfig) -> None:
    check_declarations(config)


@given(configs)
@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.too_slow])
def test_modules_take_what_is_declared(config: NovaConfig) -> None:
    check_modules(config)


@pytest.mark.parametrize(
    "config",
    [
        tiny_config(),
        tiny_config((1, 1), stride=16, rotary=True, mixer=None, channels=8),
        tiny_config((1, 2), frames=1, text=False),
    ],
    ids=["video", "rotary", "class"],
)
def test_modules_give_the_declared_shapes(config: NovaConfig) -> None:
    for stage in stages(config).values():
        module = made_module(stage, config)
        for case, sizes in enumerate(verify_sizes(stage, config)):
            inputs = sample_inputs(stage, config, sizes, seed=case)
            assert stage.bind(inputs) == sizes
            if stage.name == "vae_encoder" or (stage.name == "diffusion_head" and case != 1):
                continue  # as small as the VAE's image, not the transformer's; scan compiles for every shape
            outputs = run_module(stage, module, inputs)
            frames = config.tiling.frames_per_latent * (sizes.get("latent_frames", 1) - 1) + 1
            if config.tiling.latent_frames == 1:  # an image VAE decodes each latent frame by itself
                frames = sizes.get("latent_frames", 1)
            scale = 2 ** (len(config.vae["block_out_channels"]) - 1)
            pixels = {
                "frames": frames,
                "height": scale * sizes.get("latent_height", 0),
                "width": scale * sizes.get("latent_width", 0),
            }
            expected = stage.shapes({**pixels, **sizes}, outputs=True)
            assert {name: array.shape for name, array in outputs.items()} == expected
            assert all(outputs[t.name].dtype == np.dtype(t.dtype) for t in stage.outputs)


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_golden_checkpoints(name: str) -> None:
    config = golden_config(name)
    check_declarations(config)
    check_modules(config)


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_prefixes_split_a_checkpoint(name: str) -> None:
    """Every weight of the golden checkpoints belongs to one stage: to none or two, and the spec is wrong."""
    made = stages(golden_config(name)).values()
    is_video = golden_config(name).is_video
    for part in ("transformer", "vae", "text_encoder"):
        for key in Weights(GOLDEN / name / "checkpoint" / part).files:
            users = [stage.name for stage in made if stage.part == part and key.startswith(stage.prefixes)]
            if key.startswith("lm_head.") or (part == "vae" and not is_video and not users):
                continue  # text is encoded, not written; an image checkpoint encodes no image
            assert len(users) == 1, (key, users)


def test_which_stages_a_checkpoint_has() -> None:
    common = ["condition", "temporal_encoder", "spatial_encoder", "diffusion_head"]
    assert list(stages(tiny_config())) == ["text_encoder", *common, "vae_encoder", "vae_decoder"]
    assert list(stages(tiny_config(frames=1))) == ["text_encoder", *common, "vae_decoder"]
    assert list(stages(tiny_config(frames=1, text=False))) == [*common, "vae_decoder"]


def test_inputs_that_not_every_checkpoint_has() -> None:
    def names(stage: str, **kind: object) -> set[str]:
        return {t.name for t in stages(tiny_config(**kind))[stage].inputs}

    assert "first_context" in names("temporal_encoder", mixer=-1)
    assert "first_context" not in names("temporal_encoder", mixer=None)
    assert "motion" in names("condition") and "motion" not in names("condition", frames=1)
    assert names("condition", text=False) == {"class_ids"}


def test_every_layer_has_its_caches() -> None:
    config = tiny_config(depth=(3, 2, 1))
    assert cache_names(config) == [f"{kind}_cache_{i}" for i in range(3) for kind in ("key", "value")]
    stage = stages(config)["temporal_encoder"]
    assert [t.alias for t in stage.outputs if t.alias] == cache_names(config)


@given(configs)
@settings(deadline=None)
def test_bounds_leave_room_for_what_a_run_needs(config: NovaConfig) -> None:
    made = stages(config)
    assert made["temporal_encoder"].axis("capacity").min == config.condition_tokens + config.frame_tokens
    assert made["temporal_encoder"].axis("text").max == config.condition_tokens
    assert made["spatial_encoder"].axis("predicted").min == 0  # the first AR step knows no token
    assert made["spatial_encoder"].axis("next").max == config.num_tokens  # one AR step predicts all
    assert made["spatial_encoder"].axis("rows").max == MAX_PASSES * MAX_BATCH
    head = made["diffusion_head"]
    assert head.axis("rest").max == head.axis("steps").max + 1
