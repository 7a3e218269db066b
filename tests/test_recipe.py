"""The training recipe by hand, on a model of a few numbers: each test fails when its one line of the recipe changes."""

import itertools
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from toy import Number, Toy, toy_data

from harness.api import Stage
from harness.engine import adapters
from harness.engine.sampler import Loop, SamplerConfig
from harness.engine.tokens import Skip
from harness.storage.store import Store
from harness.training import stage as stages
from harness.training.batches import Batches
from harness.training.checkpoint import StageState
from harness.training.config import TrainConfig
from harness.training.ranks import Ranks
from harness.training.stage import StageTrainer
from harness.training.train import Training, train

DEFAULTS = {  # Shiva-DiT where the paper gives a number: caption drop 0.1, every 4th block, AdamW, DoRA of rank 32
    "steps": 240, "batch_size": 8, "warmup_steps": 20, "timesteps": "stratified", "strata": 16, "adapter": "dora",
    "adapter_rank": 32, "adapter_lr": 1e-4, "weight_decay": 0.01, "max_grad_norm": 1.0, "caption_drop": 0.1, "distill_every": 4,
    "distill_weight": 1.0, "precision": "float32", "gradient_checkpointing": False, "validate_every": 0, "validation_images": 64,
    "checkpoint_every": 50, "seed": 0}
PLAIN = TrainConfig(steps=6, batch_size=4, warmup_steps=2, adapter="none", distill_weight=0.0)
WHOLE = Stage("only", share=1.0)


def batches(config=PLAIN, stage=WHOLE, seed=0, backbone=None):
    """Of the toy data."""
    return Batches(backbone or Toy(), toy_data(), config, stage, seed)


class Seen:
    """What the optimiser was given at each step."""

    def __init__(self, monkeypatch):
        self.rates, self.decays, self.grads, self.values = [], [], [], []
        step = torch.optim.AdamW.step

        def watched(optimizer, *args, **kwargs):
            groups = optimizer.param_groups
            self.rates.append([group["lr"] for group in groups])
            self.decays.append([group["weight_decay"] for group in groups])
            self.grads.append([p.grad.clone() for group in groups for p in group["params"] if p.grad is not None])
            result = step(optimizer, *args, **kwargs)
            self.values.append([p.detach().clone() for group in groups for p in group["params"]])
            return result

        monkeypatch.setattr(torch.optim.AdamW, "step", watched)


def trained(tmp_path, config=PLAIN, method=None, backbone=None):
    """The method and its result."""
    method = method or Number()
    return method, train(backbone or Toy(), method, config, toy_data(), Store(tmp_path))


# ------------------------------------------------------------------------------------------ options and stages


def test_the_defaults_of_the_recipe():
    assert TrainConfig().__dict__ == DEFAULTS


def test_what_shapes_a_stage_is_in_its_key():
    shaping = TrainConfig().shaping()
    apart = {"steps", "adapter", "adapter_rank", "adapter_lr", "checkpoint_every", "validation_images"}
    assert shaping == {name: value for name, value in DEFAULTS.items() if name not in apart}
    assert TrainConfig(validate_every=1).shaping()["validation_images"] == 64
    assert TrainConfig().adapting() == {"adapter": "dora", "adapter_rank": 32, "adapter_lr": 1e-4}
    assert (TrainConfig().num_held_out, TrainConfig(validate_every=3).num_held_out) == (0, 64)


def test_a_stage_takes_its_share_of_the_steps_rounded_and_at_least_one(tmp_path):
    method = Number()
    method.stages = (Stage("half", 0.5), Stage("most", 0.46), Stage("none", 0.0))
    _, result = trained(tmp_path, replace(PLAIN, steps=7), method)
    assert {name: one["steps"] for name, one in result.info["stages"].items()} == {"half": 4, "most": 3, "none": 1}
    assert [step for step, _ in result.series["train/number"]] == list(range(8))
    assert result.info["num_parameters"] == 1 == result.info["stages"]["half"]["trained_parameters"]


def test_a_stage_is_stored_with_what_it_trained_and_its_curves_are_rounded_to_a_millionth(tmp_path):
    method, seen = Number(), []
    method.untrained = torch.nn.Parameter(torch.ones(3))
    method.register_buffer("noted", torch.tensor([2.0]))
    method.stage_buffers = lambda: {"noted": method.noted}
    result = train(Toy(), method, PLAIN, toy_data(), Store(tmp_path), lambda *told: seen.append(told))
    [path] = tmp_path.glob("trained/*/method.safetensors")
    assert {name: len(value.flatten()) for name, value in load_file(path).items()} == {"number": 1, "noted": 1}
    assert seen == [("train only", done, 6) for done in range(1, 7)]
    values = [value for points in result.series.values() for _, value in points]
    assert all(value == round(value, 6) for value in values) and any(value != round(value, 5) for value in values)


# ------------------------------------------------------------------------------------------ batches


def test_a_tenth_of_the_captions_is_dropped():
    backbone = Toy()
    drawn = batches(replace(PLAIN, batch_size=50, caption_drop=0.1), backbone=backbone)
    for step in range(40):
        drawn.draw(step)
    captions = list(itertools.chain.from_iterable(backbone.captions))
    assert captions.count("") / len(captions) == pytest.approx(0.1, abs=0.02)
    assert set(captions) == {"", *(str(index) for index in range(12))}
    for share, dropped in ((0.0, 0.0), (0.999999, 1.0)):
        backbone = Toy()
        batches(replace(PLAIN, batch_size=50, caption_drop=share), backbone=backbone).draw(0)
        assert backbone.captions[0].count("") / 50 == dropped


def test_a_batch_is_these_draws_in_this_order():
    config, data = replace(PLAIN, caption_drop=0.5), toy_data()
    backbone = Toy()
    found = batches(config, seed=7, backbone=backbone).draw(0)
    generator = torch.Generator().manual_seed(7)
    picks = torch.randint(12, (4,), generator=generator)
    uniform = torch.rand(4, generator=generator)
    level = ((torch.randperm(4, generator=generator) + uniform) / 4).clamp(0.001, 0.999)
    dropped = torch.rand(4, generator=generator) < 0.5
    noise = torch.randn((4, *backbone.latent_shape), generator=generator)
    seeds = torch.randint(2**62, (4,), generator=generator)
    clean, t = data.latents[picks], level[:, None, None, None]
    assert torch.equal(found.level, level) and torch.equal(found.timestep, 1000 * level) and torch.equal(found.seeds, seeds)
    assert torch.equal(found.noisy, (1 - t) * clean + t * noise) and torch.equal(found.target, noise - clean)
    assert backbone.captions == [["" if drop else str(int(i)) for i, drop in zip(picks, dropped, strict=True)]]


def test_levels_stay_a_thousandth_from_clean_and_from_noise():
    drawn = batches(replace(PLAIN, batch_size=1))
    for value, level in ((0.0, 0.001), (1.0, 0.999), (0.3, 0.3)):
        drawn._levels = lambda step, size, value=value: torch.full((size,), value)
        assert drawn.draw(0).level.tolist() == pytest.approx([level])


@pytest.mark.parametrize("together", [False, True])
def test_uniform_timesteps_are_plain_draws(together):
    drawn = batches(replace(PLAIN, timesteps="uniform"), Stage("s", 1.0, one_timestep=together), seed=3)
    generator = torch.Generator().manual_seed(3)
    picks = torch.randint(12, (4,), generator=generator)
    assert picks is not None
    expected = torch.rand((), generator=generator).expand(4) if together else torch.rand(4, generator=generator)
    torch.testing.assert_close(drawn.draw(0).level, expected.clamp(0.001, 0.999), rtol=0, atol=0)


def test_strata_of_a_shared_timestep_are_shuffled_anew_when_all_were_taken():
    drawn = batches(replace(PLAIN, strata=3), Stage("s", 1.0, one_timestep=True))
    levels = [float(drawn.draw(step).level[0]) for step in range(30)]
    strata = [[int(3 * level) for level in levels[start:start + 3]] for start in range(0, 30, 3)]
    assert all(sorted(one) == [0, 1, 2] for one in strata) and len({tuple(one) for one in strata}) > 2


def test_held_out_images_are_the_end_of_a_fixed_permutation_and_keep_their_captions():
    config, backbone = replace(PLAIN, validate_every=1, validation_images=8, caption_drop=0.9), Toy()
    shuffled = torch.randperm(12, generator=torch.Generator().manual_seed(20260))
    found = list(batches(config, seed=5, backbone=backbone).validation())
    assert [int(one) for row in backbone.captions for one in row] == shuffled[4:].tolist()
    assert [one.level.tolist() for one in found] == [[0.25] * 4, [0.75] * 4]
    generator = torch.Generator().manual_seed(20260)
    noise = torch.randn((4, 4, 2, 2), generator=generator)
    assert torch.equal(found[0].target, noise - toy_data().latents[shuffled[4:8]])
    backbone.captions.clear()
    drawn = batches(replace(config, caption_drop=0.0), backbone=backbone)
    for step in range(20):
        drawn.draw(step)
    assert {int(one) for row in backbone.captions for one in row} == set(shuffled[:4].tolist())


def test_every_process_takes_its_rows_of_the_global_batch(monkeypatch):
    whole = batches().draw(0)
    for rank in (0, 1):
        monkeypatch.setattr(Ranks, "current", classmethod(lambda cls, rank=rank: cls(rank, 2)))
        part = batches().draw(0)
        rows = slice(2 * rank, 2 * rank + 2)
        for name in ("noisy", "timestep", "target", "level", "seeds"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[rows]), name


# ------------------------------------------------------------------------------------------ the schedule and the optimiser


def test_the_learning_rate_warms_up_in_a_line_and_falls_by_a_cosine_to_a_tenth(tmp_path, monkeypatch):
    seen = Seen(monkeypatch)
    trained(tmp_path, replace(PLAIN, steps=6, warmup_steps=2))
    # steps 0, 1 of the warm-up, then 0, 1/4, 1/2, 3/4 of the cosine
    factors = [0.5, 1.0, 1.0, 0.1 + 0.45 * (1 + 0.5**0.5), 0.55, 0.1 + 0.45 * (1 - 0.5**0.5)]
    assert [rate for [rate] in seen.rates] == pytest.approx([0.1 * factor for factor in factors])


def test_the_schedule_at_its_corners():
    factor = stages._lr_factor
    assert [factor(step, 240, 20) for step in (0, 18, 19, 20, 130, 240, 300)] == pytest.approx([0.05, 0.95, 1, 1, 0.55, 0.1, 0.1])
    assert factor(0, 10, 0) == 1 and factor(3, 3, 3) == 1 and factor(2, 3, 8) == 3 / 8
    assert factor(4, 4, 3) == pytest.approx(0.1) and factor(5, 4, 4) == pytest.approx(0.1)


def test_every_stage_warms_up_anew_with_a_fresh_optimiser(tmp_path, monkeypatch):
    seen, method = Seen(monkeypatch), Number()
    method.stages = (Stage("one", 0.5), Stage("two", 0.5))
    trained(tmp_path, replace(PLAIN, steps=6, warmup_steps=2), method)
    rates = [rate for [rate] in seen.rates]
    assert rates[:3] == rates[3:] == pytest.approx([0.05, 0.1, 0.1])


@pytest.mark.parametrize("limit", [0.5, 1.0])
@pytest.mark.parametrize("slope", [0.01, 100.0])
def test_gradients_are_clipped_to_their_norm_and_recorded_before(tmp_path, monkeypatch, slope, limit):
    seen, method = Seen(monkeypatch), Number()
    method.slope = slope
    _, result = trained(tmp_path, replace(PLAIN, max_grad_norm=limit), method)
    assert [float(grad) for [grad] in seen.grads] == pytest.approx([min(slope, limit)] * 6, rel=1e-5)
    assert [value for _, value in result.series["train/grad_norm"]] == pytest.approx([slope] * 6)


@pytest.mark.parametrize("decay", [None, 0.0])
def test_a_step_is_adamw_with_the_decay_of_its_group(tmp_path, monkeypatch, decay):
    """Under a gradient of 1 every AdamW step is: p <- p (1 - lr decay) - lr."""
    seen, method = Seen(monkeypatch), Number()
    method.decay = decay
    trained(tmp_path, replace(PLAIN, weight_decay=0.5), method)
    expected, value = [], 1.0
    for [rate] in seen.rates:
        value = value * (1 - rate * (0.5 if decay is None else decay)) - rate
        expected.append(value)
    assert [float(value) for [value] in seen.values] == pytest.approx(expected, rel=1e-5)


def test_gradients_of_one_step_do_not_reach_the_next(tmp_path, monkeypatch):
    seen, method = Seen(monkeypatch), Number()
    method.slope = 0.25
    trained(tmp_path, PLAIN, method)
    assert [float(grad) for [grad] in seen.grads] == [0.25] * 6


def test_adapters_have_a_rate_and_the_decay_of_the_recipe(tmp_path, monkeypatch):
    seen, method = Seen(monkeypatch), Number()
    method.stages, method.decay = (Stage("only", 1.0, adapters=True),), 0.0
    config = replace(PLAIN, adapter="lora", adapter_rank=2, adapter_lr=0.02, weight_decay=0.3, steps=3)
    backbone = Toy()
    _, result = trained(tmp_path, config, method, backbone)
    assert seen.rates[-1] == pytest.approx([0.1, 0.02]) and seen.decays[0] == [0.0, 0.3]
    assert result.info["stages"]["only"]["trained_parameters"] == 1 + 4 * 2 * (4 * 2)
    moved = [result.backbone.transformer.transformer_blocks[i].attn1.weight - block.attn1.weight
             for i, block in enumerate(backbone.transformer.transformer_blocks)]
    assert all(change.any() and torch.linalg.matrix_rank(change) <= 2 for change in moved)


@pytest.mark.parametrize("allowed, adapter, groups", [(True, "lora", 2), (True, "none", 1), (False, "lora", 1)])
def test_adapters_train_where_the_stage_allows_them_and_start_from_the_trainings_seed(allowed, adapter, groups):
    method, starts = Number(), []
    method.stages = (Stage("only", 1.0, adapters=allowed),)
    for noise in (1, 2):
        torch.manual_seed(noise)
        trainer = StageTrainer(Toy(), Toy(), method, replace(PLAIN, adapter=adapter, adapter_rank=2), toy_data(), None)
        state, _ = trainer._begin(method.stages[0])
        assert len(state.optimizer.param_groups) == groups
        starts.append(torch.cat([torch.zeros(1), *(p.detach().flatten() for p in state.adapters.values())]))
    assert torch.equal(*starts) and starts[0].any() == (groups == 2)


def test_seeds_of_a_stage_are_its_own_and_the_same_for_all_methods():
    drawn, method = {}, Number()
    method.stages = (Stage("a", 0.5), Stage("b", 0.5))
    method.start_stage = lambda stage, generator: [{"params": [method.number], "lr": 1.0, "name": str(generator.initial_seed())}]
    for stage in method.stages:
        trainer = StageTrainer(Toy(), Toy(), method, replace(PLAIN, seed=3), toy_data(), None)
        state, _ = trainer._begin(stage)
        drawn[stage.name] = (state.batches.generator.initial_seed(), state.optimizer.param_groups[0]["name"])
    assert drawn == {"a": (3 * 1009 + 500, str(3 * 1009)), "b": (3 * 1009 + 501, str(3 * 1009 + 1))}


# ------------------------------------------------------------------------------------------ losses of a step


class Distilled(Number):
    """Needs nothing of the teacher itself; the second pass is one of two."""

    num_passes = 2

    def __init__(self):
        super().__init__()
        self.passes, self.progress, self.calls = [], [], []

    def start_step(self, progress, level, validating=False):
        """Noted."""
        self.progress.append((progress, validating))

    def start_pass(self, index):
        """Noted."""
        self.passes.append(index)

    def reduce(self, hidden_states, site):
        """Noted. The second pass skips the first block."""
        self.calls.append((site.call.training, site.call.step, site.call.guidance_halves, site.call.timestep))
        return Skip() if self.passes[-1] == 1 and site.block == 0 else None


@pytest.mark.parametrize("weight", [0.0, 1.0, 2.5])
def test_the_terms_of_a_step_are_the_passes_the_weighted_distillation_and_the_methods_own(tmp_path, weight):
    config = replace(PLAIN, steps=1, distill_weight=weight, distill_every=2)
    teacher, student, method = Toy(), Toy(), Distilled()
    with torch.no_grad():
        student.transformer.transformer_blocks[0].attn1.weight.add_(0.1)
    trainer = StageTrainer(teacher, student, method, config, toy_data(), Loop(teacher, SamplerConfig()).run)
    state = trainer.train(WHOLE, 1, tmp_path, lambda done: None)
    batch = Batches(teacher, toy_data(), config, WHOLE, 500).draw(0)

    def outputs(backbone, first=0):
        tokens, found = batch.noisy.flatten(2).transpose(1, 2), []
        for block in backbone.transformer.transformer_blocks[first:]:
            tokens = block(tokens)
            found.append(torch.nn.functional.layer_norm(tokens, (4,)))
        return found, tokens.transpose(1, 2).view_as(batch.noisy)

    (found, prediction), (wanted, dense) = outputs(student), outputs(teacher)
    point = {name: value for name, [(_, value)] in state.series.items()}
    errors = [float((one - batch.target).square().mean()) for one in (prediction, outputs(student, 1)[1])]
    assert point["train/diffusion"] == pytest.approx(sum(errors), rel=1e-4) and errors[0] != errors[1]
    assert point["train/number"] == 1.0 and method.passes == [0, 1]
    assert set(point) == {"train/diffusion", "train/number", "train/grad_norm"} | ({"train/distill"} if weight else set())
    if weight:
        features = [float((found[tap] - wanted[tap]).square().mean()) for tap in (1, 3)]
        expected = weight * (float((prediction - dense).square().mean()) + sum(features) / 2)
        assert point["train/distill"] == pytest.approx(expected, rel=1e-4)
    assert all(call[:3] == (True, -1, 1) and torch.equal(call[3], batch.level) for call in method.calls)


def test_progress_is_the_share_of_the_stage_that_is_done(tmp_path):
    method, config = Distilled(), replace(PLAIN, steps=4, validate_every=3, validation_images=4)
    trained(tmp_path, config, method)
    assert method.progress == [(0.0, False), (0.25, False), (0.5, False), (0.75, True), (0.75, False), (1.0, True)]
    assert method.passes == [0, 1, 0, 1, 0, 1, 0, 0, 1, 0], "validation is one pass"


def test_of_two_processes_each_averages_and_only_the_first_writes(tmp_path, monkeypatch):
    written, averaged = [], []
    monkeypatch.setattr(StageState, "save", lambda state, path: written.append(state.step))
    monkeypatch.setattr(Ranks, "mean", lambda ranks, value: value + 0.5)
    monkeypatch.setattr(Ranks, "average_gradients", lambda ranks, parameters: averaged.append(len(parameters)))
    for rank, expected in ((0, [1]), (1, [])):
        monkeypatch.setattr(Ranks, "current", classmethod(lambda cls, rank=rank: cls(rank, 2)))
        method, backbone = Number(), Toy()
        trainer = StageTrainer(backbone, backbone, method, replace(PLAIN, checkpoint_every=1), toy_data(),
                               Loop(backbone, SamplerConfig()).run)
        state = trainer.train(WHOLE, 2, tmp_path, lambda done: None)
        assert (method.rank, method.num_ranks) == (rank, 2) and method.synchronise(torch.tensor(1.0)) == 1.5
        assert state.series["train/number"][0] == (0, 1.5) and written == expected
        written.clear()
    assert averaged == [1] * 4


def test_the_mean_over_processes_is_exchanged_once_and_none_stays_where_nobody_has_a_gradient(monkeypatch):
    """Two processes; the other one's part of every exchange is all ones."""
    exchanged = []
    monkeypatch.setattr(Ranks, "mean", lambda ranks, value: exchanged.append(value) or (value + 1) / 2)
    has, lacks = torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.zeros(3))
    has.grad = torch.arange(4.0).view(2, 2)
    Ranks(0, 2).average_gradients([has, lacks])
    assert len(exchanged) == 1 and exchanged[0].tolist() == [1, 0, 0, 1, 2, 3, 0, 0, 0]
    assert has.grad.tolist() == [[0.5, 1.0], [1.5, 2.0]] and lacks.grad.tolist() == [0.5] * 3
    monkeypatch.setattr(Ranks, "mean", lambda ranks, value: value / 2)
    lacks.grad = None
    Ranks(0, 2).average_gradients([has, lacks])
    assert has.grad.tolist() == [[0.25, 0.5], [0.75, 1.0]] and lacks.grad is None
    Ranks(0, 1).average_gradients([has])
    assert has.grad.tolist() == [[0.25, 0.5], [0.75, 1.0]]
    monkeypatch.undo()
    assert Ranks(1, 3).rows(6) == slice(2, 4) and Ranks().mean(torch.tensor(2.0)) == 2 and Ranks().tell("x") == "x"


def test_validation_measures_errors_to_target_and_to_dense_and_the_share_computed(tmp_path):
    config = replace(PLAIN, steps=1, validate_every=1, validation_images=8)
    backbone = Toy()
    _, result = trained(tmp_path, config, backbone=backbone)
    with torch.no_grad():
        errors = [float((backbone.denoise(b.noisy, b.timestep, {}) - b.target).square().mean())
                  for b in batches(config, backbone=backbone).validation()]
    point = {name: value for name, [(_, value)] in result.series.items() if name.startswith("val/")}
    assert point == {"val/diffusion_mse": pytest.approx(sum(errors) / 2, abs=2e-6), "val/dense_mse": 0.0, "val/keep_ratio": 1.0}
    everywhere = Number()
    everywhere.sites = frozenset()
    _, result = trained(tmp_path / "without sites", config, everywhere)
    assert result.series["val/keep_ratio"] == [(0, 1.0)]


def test_what_validation_draws_and_remembers_is_put_back(tmp_path):
    class Draws(Number):
        def start_stage(self, stage, generator):
            self.generator, self.remembered = generator, 0
            return super().start_stage(stage, generator)

        def start_step(self, progress, level, validating=False):
            self.remembered += 1
            if not validating:
                drawn.append((float(torch.rand((), generator=self.generator)), self.remembered))
            else:
                torch.rand(7, generator=self.generator)

        def training_state(self):
            return {"remembered": self.remembered}

        def load_training_state(self, state):
            self.remembered = state["remembered"]

    curves = []
    for every in (0, 1):
        drawn = []
        trained(tmp_path / str(every), replace(PLAIN, validate_every=every, validation_images=4), Draws())
        curves.append([one for one in drawn])
    assert curves[0] == curves[1] and [step for _, step in curves[0]] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("precision, dtype", [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_the_forward_pass_has_the_asked_precision_and_the_loss_float32(tmp_path, precision, dtype):
    seen, method, backbone = [], Number(), Toy()
    method.reduce = lambda hidden_states, site: seen.append(hidden_states.dtype) if site.block == 3 else None
    hook = backbone.transformer.transformer_blocks[0].attn1.register_forward_hook(
        lambda module, args, output: seen.append(output.dtype))
    trained(tmp_path, replace(PLAIN, steps=1, precision=precision), method, backbone)
    hook.remove()
    assert seen[0] == dtype
    assert method.number.dtype == torch.float32


# ------------------------------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize("every, expected", [(0, []), (1, [1, 2, 3, 4, 5]), (2, [2, 4]), (4, [4])])
def test_checkpoints_are_written_every_so_many_steps_and_not_at_the_end(tmp_path, monkeypatch, every, expected):
    steps = []
    monkeypatch.setattr(StageState, "save", lambda state, path: steps.append(state.step))
    trained(tmp_path, replace(PLAIN, checkpoint_every=every))
    assert steps == expected


def test_a_paused_training_leaves_a_checkpoint_where_it_stopped_and_goes_on_from_there(tmp_path, monkeypatch):
    seen, config = Seen(monkeypatch), replace(PLAIN, checkpoint_every=0)
    training = Training(Toy(), Number(), config, toy_data())
    curves = training.curves(Store(tmp_path), 2)
    assert [step for step, _ in curves["train/number"]] == [0, 1] and len(seen.rates) == 2
    [path] = tmp_path.glob("trained/.*.work/checkpoint.safetensors")
    assert set(load_file(path)) == {"method.number", "optimizer.0.step", "optimizer.0.exp_avg", "optimizer.0.exp_avg_sq",
                                    "batches.generator", "batches.order", "generator"}
    again = Training(Toy(), Number(), config, toy_data()).curves(Store(tmp_path), 6)
    assert len(seen.rates) == 6 and [step for step, _ in again["train/number"]] == list(range(6))
    _, whole = trained(tmp_path / "whole", config)
    assert again == whole.series


# ------------------------------------------------------------------------------------------ adapters


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_adapter_is_a_product_of_its_rank_added_with_factor_one(kind):
    transformer = Toy(2).transformer
    before = transformer.transformer_blocks[1].attn1.weight.clone()
    adapters.add_adapters(transformer, kind, 3)
    trainable = {name for name, p in transformer.named_parameters() if p.requires_grad}
    assert {name.split(".")[2] for name in trainable} == {"attn1"} and not any(name.startswith("proj") for name in trainable)
    layer = transformer.transformer_blocks[1].attn1
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert down.shape == (3, 4) and up.shape == (4, 3) and not up.any()
    with torch.no_grad():
        up.copy_(torch.arange(12.0).view(4, 3) / 10)
    expected = before + up @ down
    if kind == "dora":  # each row keeps the length that it had
        expected = expected / expected.norm(dim=1, keepdim=True) * before.norm(dim=1, keepdim=True)
    adapters.merge_adapters(transformer)
    torch.testing.assert_close(transformer.transformer_blocks[1].attn1.weight, expected)
