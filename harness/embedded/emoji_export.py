"""From checkpoints to an ordinary diffusers pipeline folder, averaged weights in fp16, and back."""

import json
import shutil
from pathlib import Path
from string import Template

import torch
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from PIL import Image

from harness.data.emoji import load_emoji
from harness.embedded.emoji_flow import GUIDANCE_SCALE, NUM_STEPS, PROMPTS, SAMPLE_SHIFT
from harness.embedded.emoji_model import EmojiModel
from harness.embedded.emoji_text import MAX_LENGTH, build_silent_t5, build_tokenizer, tie_unknown_words
from harness.embedded.emoji_vae import load_vae, psnr_db
from harness.storage.durable import swap_in

REVIVED = "revived.json"
README = Path(__file__).with_name("emoji_sd3_readme.md")


def build_pipeline(checkpoint: Path, vae_folder: Path) -> StableDiffusion3Pipeline:
    """The pipeline of a checkpoint's averaged weights, float32."""
    tokenizer = build_tokenizer()
    model = EmojiModel(tokenizer)
    model.load_state_dict(torch.load(checkpoint, weights_only=True)["ema"])
    model.eval()
    for encoder in (model.text_encoder, model.text_encoder_2):
        tie_unknown_words(encoder, tokenizer)
    t5, t5_tokenizer = build_silent_t5()
    return StableDiffusion3Pipeline(
        transformer=model.transformer, vae=load_vae(vae_folder),
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=SAMPLE_SHIFT),
        text_encoder=model.text_encoder, tokenizer=tokenizer, text_encoder_2=model.text_encoder_2,
        tokenizer_2=tokenizer, text_encoder_3=t5, tokenizer_3=t5_tokenizer)


def stage_facts(checkpoints: Path, stage: str) -> dict:
    """Steps, minutes, last loss and a dozen points (step, second, loss) of a stage; zero if it never ran."""
    path, earlier = checkpoints / f"{stage}.pt", checkpoints / REVIVED
    if not path.exists() and earlier.exists():
        return json.loads(earlier.read_text(encoding="utf-8"))["stages"][stage]
    if not path.exists():
        return {"steps": 0, "minutes": 0, "loss": None, "curve": []}
    at = torch.load(path, weights_only=True)["at"]
    curve = at["curve"]
    return {"steps": at["step"], "minutes": round(at["seconds"] / 60, 1),
            "loss": curve[-1][2] if curve else None,
            "curve": [*curve[: -1 : max(1, len(curve) // 12)], *curve[-1:]]}


def facts(checkpoints: Path, vae: AutoencoderTiny) -> dict:
    """What was measured while training: stages, PSNR in dB, fingerprints, and the settings to sample with."""
    train, reference = load_emoji("train"), load_emoji("reference")
    stages = ("vae", "low", "high", "decoder")
    return {"stages": {stage: stage_facts(checkpoints, stage) for stage in stages},
            "psnr_64": round(psnr_db(vae, reference), 2),
            "psnr_32": round(psnr_db(vae, reference, half=True), 2),
            "train_pairs": len(train), "train_fingerprint": train.fingerprint,
            "reference_pairs": len(reference), "reference_fingerprint": reference.fingerprint,
            "num_steps": NUM_STEPS, "guidance_scale": GUIDANCE_SCALE, "shift": SAMPLE_SHIFT,
            "max_sequence_length": MAX_LENGTH}


def readme(measured: dict) -> str:
    """The README of the folder, its numbers filled in."""
    flat = {f"{stage}_{key}": value for stage, of in measured["stages"].items() for key, value in of.items()}
    template = Template(README.read_text(encoding="utf-8"))
    return template.substitute(measured, **flat, train_short=measured["train_fingerprint"][:12])


def export(checkpoints: Path, out: Path) -> None:
    """Write the pipeline folder beside `out` and swap it in, so that no reader meets half of it."""
    checkpoint = checkpoints / "high.pt"
    checkpoint = checkpoint if checkpoint.exists() else checkpoints / "low.pt"
    decoder = checkpoints / "vae_final"
    vae_folder = decoder if decoder.exists() else checkpoints / "vae"
    temporary = out.with_name(out.name + ".new")
    shutil.rmtree(temporary, ignore_errors=True)
    pipe = build_pipeline(checkpoint, vae_folder)
    measured = facts(checkpoints, pipe.vae)
    # The text encoders stay float32: transformers loads them as stored, diffusers loads the rest as float32.
    pipe.transformer.half()
    pipe.vae.half()
    pipe.save_pretrained(temporary)
    _drop_derived_key(temporary / "vae" / "config.json")
    (temporary / "training.json").write_text(json.dumps(measured) + "\n", encoding="utf-8")
    (temporary / "README.md").write_text(readme(measured), encoding="utf-8")
    swap_in(temporary, out)


def _drop_derived_key(config: Path) -> None:
    """AutoencoderTiny saves a key that its own constructor then warns about at every load."""
    settings = json.loads(config.read_text())
    del settings["block_out_channels"]
    config.write_text(json.dumps(settings, indent=2) + "\n")


def revive(folder: Path, checkpoints: Path) -> None:
    """Turn an exported folder into the checkpoint of stage "high" that it was, optimiser state apart."""
    pipe = StableDiffusion3Pipeline.from_pretrained(folder)
    model = EmojiModel(build_tokenizer())
    for name in ("transformer", "text_encoder", "text_encoder_2"):
        getattr(model, name).load_state_dict(getattr(pipe, name).state_dict())
    checkpoints.mkdir(parents=True, exist_ok=True)
    pipe.vae.save_pretrained(checkpoints / "vae")
    shutil.copy(folder / "training.json", checkpoints / REVIVED)
    at = json.loads((checkpoints / REVIVED).read_text(encoding="utf-8"))["stages"]["high"]
    torch.save({"model": model.state_dict(), "ema": model.state_dict(), "rng": torch.get_rng_state(),
                "at": {"step": at["steps"], "seconds": 60.0 * at["minutes"], "curve": at["curve"]}},
               checkpoints / "high.pt")


def sample_grid(folder: Path, prompts: tuple[str, ...] = PROMPTS, columns: int = 6, seed: int = 0,
                **options: float) -> Image.Image:
    """The prompts drawn by the exported pipeline itself, image i from seed + i, each enlarged to 128 px."""
    pipe = StableDiffusion3Pipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    settings = {"num_inference_steps": NUM_STEPS, "guidance_scale": GUIDANCE_SCALE,
                "max_sequence_length": MAX_LENGTH, **options}
    images = pipe(list(prompts), generator=generators, **settings).images
    sheet = Image.new("RGB", (128 * columns, 128 * -(-len(images) // columns)))
    for i, image in enumerate(images):
        place = (128 * (i % columns), 128 * (i // columns))
        sheet.paste(image.resize((128, 128), Image.Resampling.NEAREST), place)
    return sheet
