"""The embedded PixArt: an ordinary pipeline folder that learnt what it draws. (The embedded SD3: test_backbones.)"""

from pathlib import Path

import pytest
import torch
from diffusers import PixArtSigmaPipeline
from PIL import Image

from harness.api import BACKBONES, METHODS, ConfigError
from harness.backbones import emoji_loop
from harness.backbones import pixart as pixart_module
from harness.data.emoji import load_emoji
from harness.sampler import SamplerConfig, initial_noise, sample

FOLDER = Path(pixart_module.__file__).parent / "emoji_pixart"


@pytest.fixture(scope="module")
def pixart():
    """Shared: leave it as you found it."""
    return BACKBONES.build("pixart", {"weights": "embedded"})


def test_the_folder_is_small_and_says_nothing_of_the_machine_it_was_made_on():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 20e6
    assert not any("_name_or_path" in path.read_text() for path in files if path.suffix == ".json")


def test_it_comes_with_its_own_defaults(pixart):
    assert (pixart.default_num_steps, pixart.default_guidance_scale, pixart.text_length) == (20, 2.0, 16)
    assert pixart.latent_shape == (4, 16, 16) and pixart.run(pixart.set_timesteps(2), 2).num_tokens == 256


def test_it_predicts_the_noise_of_pictures_it_was_not_trained_on_and_listens_to_the_caption(pixart):
    emoji = load_emoji("reference")
    images = torch.from_numpy(emoji.images[::90]).permute(0, 3, 1, 2) / 255
    captions = emoji.captions[::90]
    latents = pixart.encode_images(images)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    noisy, timestep, target = pixart.noised(latents, noise, torch.full((len(latents),), 0.5))
    given, swapped = pixart.encode(captions), pixart.encode(captions[1:] + captions[:1])
    with torch.no_grad():
        errors = [float((pixart.denoise(noisy, timestep, text) - target).square().mean()) for text in (given, swapped)]
    assert errors[0] < 0.12, "predicting nothing gives 1"
    assert errors[0] < 0.9 * errors[1], "another picture's caption is worse"


def test_diffusers_own_pipeline_draws_the_same(pixart):
    prompt = "red heart on a white background"
    config = SamplerConfig(num_steps=4, guidance_scale=2.0, batch_size=1)
    ours = next(sample(pixart, METHODS.build("dense", {}), config, [prompt], [7])).images[0]
    pipe = PixArtSigmaPipeline.from_pretrained(FOLDER)
    pipe.set_progress_bar_config(disable=True)
    latents = initial_noise([7], pixart.latent_shape, torch.device("cpu"), torch.float32)
    theirs = pipe(prompt, latents=latents, num_inference_steps=4, guidance_scale=2.0, height=64, width=64, output_type="pt",
                  max_sequence_length=16, use_resolution_binning=False, clean_caption=False).images[0]
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
