"""The embedded PixArt and Flux: ordinary pipeline folders that learnt what they draw. (The embedded SD3: test_backbones.)"""

from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline, PixArtSigmaPipeline
from PIL import Image

from harness.api import BACKBONES, METHODS, ConfigError
from harness.backbones import pixart as pixart_module
from harness.data.emoji import load_emoji
from harness.embedded import emoji_loop
from harness.engine.sampler import SamplerConfig, initial_noise, sample

FOLDERS = {name: Path(pixart_module.__file__).parents[1] / "embedded" / f"emoji_{name}" for name in ("pixart", "flux")}
ERROR = {"pixart": 0.12, "flux": 0.6}
"""Of the prediction at noise level 0.5. Predicting nothing: 1 for PixArt's noise, about 2 for Flux's velocity."""


@pytest.fixture(scope="module", params=FOLDERS)
def backbone(request):
    """Shared: leave it as you found it."""
    return BACKBONES.build(request.param, {"weights": "embedded", "dtype": "float32"})


def test_the_folder_is_small_and_says_nothing_of_the_machine_it_was_made_on(backbone):
    files = [path for path in FOLDERS[backbone.name].rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 30e6
    assert not any("_name_or_path" in path.read_text() for path in files if path.suffix == ".json")


def test_it_comes_with_its_own_defaults(backbone):
    assert (backbone.default_num_steps, backbone.default_guidance_scale) == (20, 2.0)
    assert backbone.encode(["a"])["encoder_hidden_states"].shape[1] == 16 and backbone.resolution == 64
    assert backbone.latent_shape == (4, 16, 16)
    assert backbone.run(backbone.set_timesteps(2), 1).num_tokens == {"pixart": 256, "flux": 64}[backbone.name]


def test_it_predicts_on_pictures_it_was_not_trained_on_and_listens_to_the_caption(backbone):
    emoji = load_emoji("reference")
    images = torch.from_numpy(emoji.images[::90]).permute(0, 3, 1, 2) / 255
    captions = emoji.captions[::90]
    latents = backbone.encode_images(images)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    noisy, timestep, target = backbone.noised(latents, noise, torch.full((len(latents),), 0.5))
    guidance = {"guidance": torch.ones(len(latents))} if backbone.distilled_guidance else {}
    errors = []
    for texts in (captions, captions[1:] + captions[:1]):
        with torch.no_grad():
            predicted = backbone.denoise(noisy, timestep, {**backbone.encode(texts), **guidance})
        errors.append(float((predicted - target).square().mean()))
    assert errors[0] < ERROR[backbone.name]
    assert errors[0] < 0.9 * errors[1], "another picture's caption is worse"


@pytest.mark.parametrize("backbone", ["flux"], indirect=True)
def test_the_guidance_that_flux_takes_as_an_input_does_something(backbone):
    noisy = torch.randn(4, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))
    text, at = backbone.encode(["red heart on a white background"] * 4), torch.full((4,), 800.0)
    with torch.no_grad():
        weak, strong, empty = (backbone.denoise(noisy, at, {**words, "guidance": torch.full((4,), scale)})
                               for words, scale in ((text, 1.0), (text, 3.0), (backbone.encode([""] * 4), 1.0)))
    guided = empty + 3.0 * (weak - empty)
    assert (strong - guided).square().mean() < (weak - guided).square().mean(), "it is nearer to the guided prediction"


@pytest.mark.parametrize("scale", [2.0, 3.0])
def test_diffusers_own_pipeline_draws_the_same(backbone, scale):
    prompt = "red heart on a white background"
    config = SamplerConfig(num_steps=4, guidance_scale=scale, batch_size=1)
    ours = next(sample(backbone, METHODS.build("dense", {}), config, [prompt], [7])).images[0]
    latents = initial_noise([7], backbone.latent_shape, torch.device("cpu"), torch.float32)
    if backbone.name == "flux":
        pipe, extra = FluxPipeline.from_pretrained(FOLDERS["flux"]), {}
        latents = FluxPipeline._pack_latents(latents, *latents.shape)
    else:
        pipe, extra = PixArtSigmaPipeline.from_pretrained(FOLDERS["pixart"]), {"use_resolution_binning": False,
                                                                              "clean_caption": False}
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(prompt, latents=latents, num_inference_steps=4, guidance_scale=scale, height=64, width=64, output_type="pt",
                  max_sequence_length=16, **extra).images[0]
    torch.testing.assert_close(ours, theirs.clamp(0, 1), atol=2e-3, rtol=0)


def test_a_family_without_an_embedded_model_is_refused_with_what_to_take():
    with pytest.raises(ConfigError, match="no embedded model"):
        BACKBONES.build("dit", {"weights": "embedded"})


def test_a_training_stops_at_a_gradient_that_is_no_number_and_keeps_its_checkpoint(tmp_path):
    class Breaks:
        name, schedule, module = "breaks", emoji_loop.Schedule(peak=1e-3, decay_from=0.5, floor=0.1), torch.nn.Linear(2, 1)

        def begin(self):
            pass

        def loss(self, step):
            return self.module(torch.ones(1, 2)).sum() * (float("nan") if step == 3 else 1.0)

        def picture(self, averaged):
            return Image.new("RGB", (1, 1))

    task = Breaks()
    emoji_loop.Loop(task, tmp_path).run(minutes=1, steps=2)
    with pytest.raises(FloatingPointError, match="breaks: at step 4 the gradient is nan.*--no-compile"):
        emoji_loop.Loop(task, tmp_path).run(minutes=1, steps=6)
    kept = torch.load(tmp_path / "breaks.pt", weights_only=True)
    assert kept["at"]["step"] == 2 and all(value.isfinite().all() for value in kept["model"].values())
    assert all(weight.isfinite().all() for weight in task.module.parameters()), "the optimiser never saw it"
