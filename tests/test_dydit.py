"""DyDiT: what a mask leaves out is not computed, gates learn, and the plan for sampling meets a budget."""

import copy

import pytest
import torch
from conftest import PROMPTS, TinySD3, tiny_pipeline
from test_train import CONFIG as TRAIN
from test_train import data  # noqa: F401  (a fixture)
from torch.utils.flop_counter import FlopCounterMode

from harness.api import METHODS, Call
from harness.backbones.dit import DiT
from harness.cost.flops import Meter
from harness.engine.injection import attach
from harness.engine.sampler import Loop, SamplerConfig, initial_noise, sample
from harness.storage.store import Store
from harness.training.train import train
from methods.dydit.gates import FlopsLoss, Gates, hard_gate
from methods.dydit.narrow import MaskedFeedForward, NarrowAttention, NarrowFeedForward

CONFIG = SamplerConfig(num_steps=4, guidance_scale=1.0)


@pytest.fixture(scope="module")
def backbone():
    """Four heads, and a second attention in block 1."""
    return TinySD3.from_pipeline(tiny_pipeline(num_attention_heads=4, attention_head_dim=8))


def build(backbone, **options):
    torch.manual_seed(0)
    method = METHODS.build("dydit", options)
    method.begin(Loop(backbone, CONFIG).run)
    return method


@pytest.mark.parametrize("block, name", [(0, "attn"), (1, "attn"), (1, "attn2"), (3, "attn")])
def test_leaving_heads_out_is_masking_them_and_all_heads_are_the_module_itself(backbone, block, name):
    module = backbone.transformer.transformer_blocks[block].get_submodule(name)
    torch.manual_seed(3)
    inputs = {"hidden_states": torch.randn(2, 64, 32)}
    if name == "attn":
        inputs["encoder_hidden_states"] = torch.randn(2, 6, 32)
    forward = module.forward
    for heads in ([0, 1, 2, 3], [0, 2], [0]):
        mask = torch.zeros(2, 4)
        mask[:, heads] = 1
        narrow = NarrowAttention(heads=heads).execute(module, forward, (), inputs)
        masked = NarrowAttention(mask=mask).execute(module, forward, (), inputs)
        torch.testing.assert_close(narrow, masked, atol=1e-5, rtol=0)
        if len(heads) == 4:
            torch.testing.assert_close(narrow, forward(**inputs), atol=1e-5, rtol=0)


def test_leaving_groups_and_tokens_out_is_masking_them(backbone):
    module, torch_input = backbone.transformer.transformer_blocks[0].ff, torch.randn(2, 64, 32)
    kept = torch.arange(0, 64, 3).expand(2, -1)
    tokens, groups = torch.zeros(2, 64), torch.tensor([[1.0, 0.0, 1.0, 0.0]] * 2)
    tokens[:, kept[0]] = 1
    narrow, masked = NarrowFeedForward(kept, 64, [0, 2], 4), MaskedFeedForward(groups, tokens)
    results = [plan.restore(plan.execute(module, module.forward, (plan.reduce(torch_input),), {}), None)
               for plan in (narrow, masked)]
    torch.testing.assert_close(*results, atol=1e-5, rtol=0)
    assert masked.mean_tokens == 22


def test_a_fresh_model_in_training_form_is_the_dense_one(backbone):
    method = build(backbone, keep_ratio=0.5)
    loop = Loop(backbone, CONFIG)
    noise = initial_noise([1], backbone.latent_shape, torch.device("cpu"), torch.float32)
    inputs = (noise, torch.tensor([600.0]), backbone.encode(PROMPTS[:1]))
    with torch.no_grad():
        dense = backbone.denoise(*inputs)
        method.start_step(0.5, torch.tensor([0.6]))
        method.start_pass(0)
        with attach(backbone, method, loop.run) as injection:
            injection.begin_call(Call(-1, torch.tensor([0.6]), torch.tensor([1]), 1, training=True))
            torch.testing.assert_close(backbone.denoise(*inputs), dense, atol=1e-5, rtol=0)
            assert float(method._loss.value()) == pytest.approx(2 * (1 - method._loss.target) ** 2)
            method.start_pass(1)
            assert torch.equal(backbone.denoise(*inputs), dense)


def test_a_gate_is_hard_forward_and_relaxed_backward():
    logits = torch.tensor([[-4.0, -0.1, 0.1, 4.0]], requires_grad=True)
    gate = hard_gate(logits, torch.full((1, 4), 0.5), tau=5.0)  # at one half the noise is zero
    assert gate.tolist() == [[0.0, 0.0, 1.0, 1.0]]
    gate.sum().backward()
    soft = torch.sigmoid(logits.detach() / 5)
    torch.testing.assert_close(logits.grad, soft * (1 - soft) / 5)
    assert hard_gate(logits, None, 5.0).tolist() == [[0.0, 0.0, 1.0, 1.0]]


def test_gates_open_as_often_as_a_logistic_variable_is_below_the_logit():
    uniform = torch.rand(20000, generator=torch.Generator().manual_seed(0))
    share = hard_gate(torch.full((20000,), 1.0), uniform, 5.0).mean()
    assert float(share) == pytest.approx(float(torch.sigmoid(torch.tensor(1.0))), abs=0.015)


def test_the_flops_loss_counts_products_per_row_and_is_zero_at_its_target(backbone):
    run = Loop(backbone, CONFIG).run
    full = FlopsLoss(run, 1.0, 2.0)
    full.add(torch.ones(2, 4), torch.ones(2, 4), torch.ones(2, 64))
    assert float(full.value()) == 0
    attention, ffn = 4 * 32 + 2 * 64, 8 * 32
    half = torch.cat([torch.ones(2, 2), torch.zeros(2, 2)], 1)
    loss = FlopsLoss(run, 0.0, 1.0)
    loss.add(half, half, torch.cat([torch.ones(2, 16), torch.zeros(2, 48)], 1))
    assert float(loss.value()) == pytest.approx(((attention / 2 + ffn / 8) / (attention + ffn)) ** 2)


def test_the_first_head_and_group_are_always_on(backbone):
    method = build(backbone, keep_ratio=0.5)
    run, gates = method.run, method.gates
    with torch.no_grad():
        for gate in gates:
            gate.heads.bias.fill_(-50), gate.groups.bias.fill_(-50)
    method.schedule.note_embedding(torch.tensor([0.5]), torch.zeros(1, 32))
    for block in range(run.num_blocks):
        method.schedule.note_tokens(block, torch.tensor([0.5]), torch.tensor([0.4]))
    method.tabulate()
    for row in method.plan:
        for heads, groups, share in row:
            assert (heads, groups) == ([0], [0]) and share == pytest.approx(0.4, abs=1e-3)


def test_flops_fall_with_heads_groups_and_tokens(backbone):
    meter, method = Meter(backbone, SamplerConfig(num_steps=2)), build(backbone, keep_ratio=0.5)

    def cost(heads, groups, share):
        method.schedule.plan = lambda *facts: [[(heads, groups, share)] * 4] * 2
        return meter.count(method).transformer

    every = [0, 1, 2, 3]
    full = cost(every, every, 1.0)
    assert full == meter.dense.total
    fewer = [cost([0, 1], every, 1.0), cost(every, [0, 1], 1.0), cost(every, every, 0.5)]
    assert all(value < full for value in fewer)
    assert fewer[1] == fewer[2]  # half the channels cost what half the tokens do


def test_without_text_dit_xl_executes_what_the_paper_prints():
    """GMACs of arXiv:2410.03456, whose trained models miss their own target by up to 0.012: ours, before training, by 0.007."""
    meter = Meter(DiT(DiT.Config(weights="shape_only", architecture="dit-xl-2", device="meta")), SamplerConfig(num_steps=1))
    assert meter.dense.total / meter.run.guidance_halves / 2e9 == pytest.approx(118.69, rel=1e-3)
    for target, published in ((0.7, 84.33), (0.5, 57.88)):
        executed = meter.count(METHODS.build("dydit", {"keep_ratio": target})).total / meter.dense.total
        assert executed == pytest.approx(target, abs=0.01)
        assert executed == pytest.approx(published / 118.69, abs=0.02)


def test_a_head_that_is_left_out_costs_nothing_without_text_and_keys_and_values_beside_it(backbone):
    """Attention: 4 projections of N D^2 and two products of N^2 D multiply-adds, each an equal part per head."""
    num_tokens, width, text = 64, 32, 6
    block = backbone.transformer.transformer_blocks[1]
    image, beside = torch.randn(1, num_tokens, width), torch.randn(1, text, width)

    def flops(module, heads, **inputs):
        device = {name: value.to("meta") for name, value in {"hidden_states": image, **inputs}.items()}
        with FlopCounterMode(display=False) as counter:
            NarrowAttention(heads=heads).execute(copy.deepcopy(module).to("meta"), None, (), device)
        return counter.get_total_flops()

    whole = 2 * (4 * num_tokens * width**2 + 2 * num_tokens**2 * width)
    assert [flops(block.attn2, list(range(count))) for count in (1, 2, 4)] == [whole // 4, whole // 2, whole]
    saved = flops(block.attn, [0, 1, 2, 3], encoder_hidden_states=beside) - flops(block.attn, [0], encoder_hidden_states=beside)
    per_head = 2 * (2 * num_tokens * width**2 + 2 * num_tokens * (num_tokens + text) * width) // 4
    assert saved == 3 * per_head  # queries and the way out alone


def test_trained_gates_are_fitted_to_the_budget_and_sampled_as_counted(backbone, data, tmp_path):  # noqa: F811
    cut, sampler = 0.12, SamplerConfig(num_steps=2, guidance_scale=1.0)
    meter = Meter(backbone, sampler)
    options = {"keep_ratio": 0.6, "width_bias": 2.0, "token_bias": 2.0, "router_lr": 0.05, "ramp": 0.1}
    method, again = METHODS.build("dydit", options), METHODS.build("dydit", options)
    config = TRAIN.__class__(**{**TRAIN.__dict__, "adapter": "lora", "steps": 8, "validate_every": 0})
    trained = train(backbone, method, config, data, Store(tmp_path))
    assert set(trained.series) == {"train/diffusion", "train/flops", "train/grad_norm"}
    train(backbone, again, config, data, Store(tmp_path))  # loaded
    method.begin(meter.run)
    fitted = method.fit_budget(lambda: meter.cut(method), cut)
    again.begin(meter.run)
    again.load_fit(fitted)
    assert method.plan == again.plan
    assert meter.cut(method) == pytest.approx(cut, abs=0.03)  # four heads are coarse
    counts = []
    images = list(sample(trained.backbone, method, sampler, PROMPTS, [1, 2, 3, 4], lambda live: counts.append(live.token_count)))
    assert torch.isfinite(images[0].images).all()
    assert counts[0].kept("ffn", sampler.num_steps) == meter.counted(method)[1]["ffn"]


def test_the_flops_loss_closes_gates(backbone, data, tmp_path):  # noqa: F811
    method = METHODS.build("dydit", {"keep_ratio": 0.5, "width_bias": 2.0, "token_bias": 2.0, "router_lr": 0.1, "hold": 0.0,
                                     "ramp": 0.05, "complete": False, "flops_weight": 20.0})
    config = TRAIN.__class__(**{**TRAIN.__dict__, "adapter": "lora", "steps": 40, "validate_every": 0})
    trained = train(backbone, method, config, data, Store(tmp_path))
    losses = [value for _, value in trained.series["train/flops"]]
    assert sum(losses[-5:]) < 0.5 * sum(losses[3:8])
    assert isinstance(method.gates[0], Gates) and float(method.schedule.tokens.mean()) < 0.9
