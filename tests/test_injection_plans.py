"""Plans that run a block otherwise than once on fewer tokens: not at all, by rows, several times, or narrower."""

import pytest
import torch
from conftest import PROMPTS

from harness.api import ConfigError, Method, Reduction
from harness.engine.injection import attach
from harness.engine.sampler import Loop, SamplerConfig, initial_noise
from harness.engine.tokens import Keep, Mixture, PerRow, Skip

CONFIG = SamplerConfig(num_steps=2, guidance_scale=1.0)


def predicted(backbone, reduce, block=1, kind="block"):
    """The prediction (B, C, H, W) of two images with `reduce(hidden_states)` as the plan at one block, and the tokens counted."""

    class Planned(Method):
        name, sites = "planned", frozenset({kind})

        def reduce(self, hidden_states, site):
            return reduce(hidden_states) if site.block == block else None

    loop, method = Loop(backbone, CONFIG), Planned(None)
    with attach(backbone, method, loop.run) as injection:
        noise = initial_noise([1, 2], backbone.latent_shape, torch.device("cpu"), torch.float32)
        out = loop.predict(injection, 0, noise, loop.conditioning(PROMPTS[:2]), torch.tensor([1, 2]))
    return out, injection.token_count.tokens


def keep(*count):
    return lambda x: Keep(torch.arange(x.shape[1] - count[0], x.shape[1]).expand(x.shape[0], -1), x.shape[1])


def test_a_skipped_block_is_a_removed_block(tiny_backbone):
    blocks = tiny_backbone.transformer.transformer_blocks
    skipped, tokens = predicted(tiny_backbone, lambda x: Skip())
    removed = blocks[1]
    del blocks[1]
    try:
        without, _ = predicted(tiny_backbone, lambda x: None, block=0)
    finally:
        blocks.insert(1, removed)
    assert torch.equal(skipped, without)
    assert tokens[0, 1, ""][0] == 0


def test_a_skipped_block_adds_the_residual_that_it_is_given(tiny_backbone):
    seen = {}

    def half_of_the_block(x):
        seen["x"] = x
        return Skip(torch.full_like(x, 0.5))

    added, _ = predicted(tiny_backbone, half_of_the_block, block=2)
    plain, _ = predicted(tiny_backbone, lambda x: Skip(), block=2)
    assert not torch.equal(added, plain)


def test_rows_with_plans_of_their_own_give_what_each_gives_alone(tiny_backbone):
    def mixed(x):
        return PerRow([keep(10)(x[:1]), None], x.shape[1])

    out, tokens = predicted(tiny_backbone, mixed)
    torch.testing.assert_close(out[0], predicted(tiny_backbone, keep(10))[0][0], atol=1e-5, rtol=0)
    torch.testing.assert_close(out[1], predicted(tiny_backbone, lambda x: None)[0][1], atol=1e-5, rtol=0)
    computed, total = tokens[0, 1, ""]
    assert computed == (10 + total) / 2


def test_rows_that_share_a_plan_run_together_and_come_back_in_order(tiny_backbone):
    shared = Skip()

    def plans(x):
        assert x.shape[0] == 2
        return PerRow([None, shared], x.shape[1])

    out, _ = predicted(tiny_backbone, plans)
    swapped, _ = predicted(tiny_backbone, lambda x: PerRow([shared, None], x.shape[1]))
    dense, none = (predicted(tiny_backbone, lambda x, p=p: p)[0] for p in (None, shared))
    torch.testing.assert_close(out, torch.stack([dense[0], none[1]]), atol=1e-5, rtol=0)
    torch.testing.assert_close(swapped, torch.stack([none[0], dense[1]]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_mixture_is_the_weighted_sum_of_its_runs(tiny_backbone, share):
    weights = [torch.tensor(share), torch.tensor(1 - share)]
    outputs = {}

    def spy(name, plan):
        def hook(module, args, kwargs, result):
            outputs[name] = result[1]

        handle = tiny_backbone.transformer.transformer_blocks[1].register_forward_hook(hook, with_kwargs=True)
        predicted(tiny_backbone, plan)
        handle.remove()

    spy("few", keep(10))
    spy("many", keep(40))
    spy("mixed", lambda x: Mixture([keep(10)(x), keep(40)(x)], weights, x.shape[1]))
    expected = share * outputs["few"] + (1 - share) * outputs["many"]
    torch.testing.assert_close(outputs["mixed"], expected, atol=1e-5, rtol=0)


def test_a_plan_may_run_the_module_in_its_own_way(tiny_backbone):
    class Doubled(Keep):
        def execute(self, module, forward, args, kwargs):
            assert module is tiny_backbone.transformer.transformer_blocks[1].ff
            return 2 * forward(*args, **kwargs)

    out, _ = predicted(tiny_backbone, lambda x: Doubled(torch.arange(x.shape[1]), x.shape[1]), kind="ffn")
    linear = tiny_backbone.transformer.transformer_blocks[1].ff.net[2]
    with torch.no_grad():
        linear.weight.mul_(2), linear.bias.mul_(2)
        wanted, _ = predicted(tiny_backbone, lambda x: None)
        linear.weight.div_(2), linear.bias.div_(2)
    torch.testing.assert_close(out, wanted, atol=1e-5, rtol=0)


def test_attention_beside_text_cannot_compute_nothing(tiny_backbone):
    with pytest.raises(ConfigError, match="what the module gives for text would be missing"):
        predicted(tiny_backbone, lambda x: Skip(), kind="attention")


class Half(Reduction):
    """Says that it computes half of the 64 tokens, and does, but for what a subclass leaves out."""

    num_tokens = 32

    def reduce(self, hidden_states):
        return hidden_states[:, ::2]

    def restore(self, computed, bypass):
        return computed.repeat_interleave(2, dim=1)


@pytest.mark.parametrize(("missing", "gives"), [({"restore": Reduction.restore}, "`restore`.*gives 32 tokens where 64 are due"),
                                                ({"reduce": Reduction.reduce}, "`reduce`.*gives 64 tokens where 32 are due"),
                                                ({"num_tokens": None}, "`reduce`.*gives 32 tokens where 64 are due")])
def test_a_plan_that_lets_pass_what_it_says_to_reduce_is_an_error(tiny_backbone, missing, gives):
    predicted(tiny_backbone, lambda x: Half(), kind="ffn")
    with pytest.raises(RuntimeError, match=rf"{gives}; a plan that computes fewer tokens sets num_tokens and has a `reduce`"):
        predicted(tiny_backbone, lambda x: type("Wrong", (Half,), missing)(), kind="ffn")
