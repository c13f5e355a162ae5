"""Decoders against plain re-statements of MAE and CrossMAE, written from the papers' equations."""

import copy
import itertools
import math

import pytest
import torch
from safetensors.torch import save_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from wavemim.decoders import TapDecoder, Trunk
from wavemim.masking import random_mask, visible_indices_of

WIDE, WIDTH, HEADS, GRID, PREFIX, VISIBLE, VALUES, BATCH = 24, 16, 4, 4, 2, 5, 6, 3


TINY = {
    "encoder_width": WIDE, "tokens": GRID, "prefix": PREFIX, "positions": GRID, "values": VALUES, "width": WIDTH,
    "depth": 2, "heads": HEADS, "normalised": False, "drops": True,
}  # fmt: skip


def make(*, seed=0, **changes):
    """A tiny decoder whose biases and norms are not at their initial values, which would hide mistakes."""
    torch.manual_seed(seed)
    return disturb(TapDecoder(**TINY | changes))


def disturb(module):
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter)
    return module


def inputs(drops=True, seed=0):
    """(tokens, visible or None) of random tokens; the mask differs from image to image."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(BATCH, PREFIX + (VISIBLE if drops else GRID * GRID), WIDE, generator=generator)
    mask = random_mask(torch.arange(BATCH) + 100 * seed, GRID, 1 - VISIBLE / GRID**2, seed=seed, epoch=0)
    return tokens, visible_indices_of(mask, VISIBLE) if drops else None


def some(positions, count=3, seed=0):
    """Positions (B, `count`) in no order, others in each image."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(positions**2, generator=generator)[:count] for _ in range(BATCH)])


def linear(x, state, name):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def norm(x, state, name):
    scaled = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]


def attention(queries, keys, values):
    """Softmax attention of one image, (S, W) to (T, W), a loop over heads and queries."""
    size = WIDTH // HEADS
    out = torch.zeros_like(queries)
    for head in range(HEADS):
        part = slice(head * size, head * size + size)
        for s in range(len(queries)):
            scores = torch.stack([queries[s, part] @ key for key in keys[:, part]]) / math.sqrt(size)
            out[s, part] = scores.softmax(0) @ values[:, part]
    return out


def mlp(x, state, name):
    hidden = linear(norm(x, state, f"{name}.norm2"), state, f"{name}.mlp.fc1")
    return linear(hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))), state, f"{name}.mlp.fc2")


def self_block(x, state, name):
    q, k, v = linear(norm(x, state, f"{name}.norm1"), state, f"{name}.attn.qkv").split(WIDTH, -1)
    x = x + linear(attention(q, k, v), state, f"{name}.attn.proj")
    return x + mlp(x, state, name)


def cross_block(x, context, state, name):
    q = linear(norm(x, state, f"{name}.norm1"), state, f"{name}.query")
    k, v = linear(context, state, f"{name}.key_value").split(WIDTH, -1)
    x = x + linear(attention(q, k, v), state, f"{name}.proj")
    return x + mlp(x, state, name)


def place(y, x, width=WIDTH):
    """MAE's position of row y and column x: sines and cosines of x, then of y, of falling frequencies."""
    rates = [10000 ** -(i / (width // 4)) for i in range(width // 4)]
    return torch.tensor([f(at * rate) for at in (x, y) for f in (math.sin, math.cos) for rate in rates])


PLACES = torch.stack([place(*divmod(position, GRID)) for position in range(GRID * GRID)])
COARSE = torch.stack(  # the average over the 2 x 2 tokens of a position
    [
        sum(PLACES[(2 * y + dy) * GRID + 2 * x + dx] for dy in (0, 1) for dx in (0, 1)) / 4
        for y in (0, 1)
        for x in (0, 1)
    ]
)


def embedded(decoder, tokens):
    state = decoder.state_dict()
    return linear(norm(tokens, state, "norm_in"), state, "embed")


def literal_mae(decoder, tokens, visible):
    """All tokens (B, R + G², W) after the blocks: MAE's forward_decoder with the class token in front."""
    state = decoder.state_dict()
    out = []
    for image, seen in zip(embedded(decoder, tokens), visible, strict=True):
        rows = list(image[:PREFIX])
        for position in range(GRID * GRID):
            at = (seen == position).nonzero().flatten().tolist()
            rows.append((image[PREFIX + at[0]] if at else state["trunk.mask_token"][0, 0]) + PLACES[position])
        x = torch.stack(rows)
        for number in range(2):
            x = self_block(x, state, f"trunk.blocks.{number}")
        out.append(x)
    return torch.stack(out)


def literal_context(decoder, tokens, visible):
    """Tokens (B, R + V or R + G², W) with their positions."""
    context = embedded(decoder, tokens)
    for b, n in itertools.product(range(BATCH), range(context.shape[1] - PREFIX)):
        context[b, PREFIX + n] += PLACES[n if visible is None else visible[b, n]]
    return context


def literal_head(decoder, x):
    return linear(norm(x, decoder.state_dict(), "trunk.norm"), decoder.state_dict(), "head")


def averaged(x):
    """(B, 16, W) over 2 x 2 cells: (B, 4, W)."""
    cells = [[(2 * y + dy) * GRID + 2 * x + dx for dy in (0, 1) for dx in (0, 1)] for y in (0, 1) for x in (0, 1)]
    return torch.stack([x[:, cell].mean(1) for cell in cells], 1)


@pytest.fixture(autouse=True)
def _no_gradients(request):
    with torch.set_grad_enabled("gradients" in request.node.name):
        yield


def test_positions_are_those_of_mae():
    places = make().places
    assert not places.requires_grad
    assert (places[:, :PREFIX] == 0).all()
    torch.testing.assert_close(places[0, PREFIX:], PLACES, atol=1e-6, rtol=0)


def test_decoder_of_mae_vit_base_has_its_parameter_count():
    sizes = {"encoder_width": 768, "tokens": 14, "prefix": 1, "positions": 14, "values": 768}
    with torch.device("meta"):
        decoder = TapDecoder(**TINY | sizes | {"width": 512, "depth": 8, "heads": 16, "normalised": True})
    assert sum(p.numel() for p in decoder.parameters()) == 26_109_184


@pytest.mark.parametrize("attention", ["self", "cross"])
def test_initial_weights_are_those_of_mae(attention):
    decoder = TapDecoder(**TINY | {"values": 96, "width": 128, "depth": 1, "attention": attention})
    linears = [module for module in decoder.modules() if isinstance(module, nn.Linear)]
    assert len(linears) == (6 if attention == "self" else 7)
    for module in linears:
        bound = math.sqrt(6 / sum(module.weight.shape))  # Xavier uniform
        assert 0.98 * bound < module.weight.abs().max() <= bound
        assert (module.bias == 0).all()
    assert 0.015 < decoder.trunk.mask_token.std() < 0.025


@pytest.mark.parametrize("positions", [4, 2])
def test_self_attention_is_mae(positions):
    decoder = make(positions=positions)
    tokens, visible = inputs()
    expected = literal_mae(decoder, tokens, visible)[:, PREFIX:]
    if positions == 2:
        expected = averaged(expected)
    torch.testing.assert_close(decoder(tokens, visible), literal_head(decoder, expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("positions", "places"), [(4, PLACES), (2, COARSE)])
def test_partial_self_attention_has_mask_tokens_of_the_chosen_positions_alone(positions, places):
    decoder, index = make(positions=positions), some(positions)
    tokens, visible = inputs()
    state = decoder.state_dict()
    context = literal_context(decoder, tokens, visible)
    rows = []
    for b in range(BATCH):
        x = torch.cat((context[b], state["trunk.mask_token"][0] + places[index[b]]))
        for number in range(2):
            x = self_block(x, state, f"trunk.blocks.{number}")
        rows.append(x[-index.shape[1] :])
    expected = literal_head(decoder, torch.stack(rows))
    torch.testing.assert_close(decoder(tokens, visible, index), expected, atol=1e-5, rtol=1e-5)


def test_partial_self_attention_at_all_hidden_positions_is_mae():
    decoder = make()
    tokens, visible = inputs()
    hidden = torch.ones(BATCH, GRID * GRID, dtype=torch.bool).scatter_(1, visible, False)
    index = visible_indices_of(~hidden, GRID * GRID - VISIBLE)
    expected = decoder(tokens, visible).gather(1, index[:, :, None].expand(-1, -1, VALUES))
    torch.testing.assert_close(decoder(tokens, visible, index), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("drops", [True, False])
@pytest.mark.parametrize(("positions", "places"), [(4, PLACES), (2, COARSE)])
def test_cross_attention_is_a_literal_loop(positions, places, drops):
    decoder = make(positions=positions, attention="cross", drops=drops)
    tokens, visible = inputs(drops)
    state = decoder.state_dict()
    rows = []
    for context in literal_context(decoder, tokens, visible):
        x = state["trunk.mask_token"][0] + places
        for number in range(2):
            x = cross_block(x, context, state, f"trunk.blocks.{number}")
        rows.append(x)
    expected = literal_head(decoder, torch.stack(rows))
    torch.testing.assert_close(decoder(tokens, visible), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("positions", [4, 2])
@pytest.mark.parametrize(("attention", "drops"), [("cross", True), ("cross", False), ("self", False)])
def test_partial_prediction_is_a_part_of_the_whole(attention, drops, positions):
    decoder, index = make(positions=positions, attention=attention, drops=drops), some(positions)
    tokens, visible = inputs(drops)
    whole = decoder(tokens, visible)
    expected = torch.stack([whole[b, index[b]] for b in range(BATCH)])
    torch.testing.assert_close(decoder(tokens, visible, index), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("positions", [4, 2])
def test_self_attention_over_all_tokens_needs_no_mask_token(positions):
    decoder = make(positions=positions, drops=False)
    state = decoder.state_dict()
    assert "trunk.mask_token" not in state
    tokens, _ = inputs(drops=False)
    rows = []
    for x in literal_context(decoder, tokens, None):
        for number in range(2):
            x = self_block(x, state, f"trunk.blocks.{number}")
        rows.append(x[PREFIX:])
    expected = averaged(torch.stack(rows)) if positions == 2 else torch.stack(rows)
    torch.testing.assert_close(decoder(tokens), literal_head(decoder, expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("positions", [4, 2])
def test_depth_zero_is_one_linear_map(positions, normalised):
    decoder = make(positions=positions, depth=0, drops=False, normalised=normalised)
    names = ["head.bias", "head.weight"] + ([] if normalised else ["norm_in.bias", "norm_in.weight"])
    assert sorted(decoder.state_dict()) == names
    tokens, _ = inputs(drops=False)
    x = tokens[:, PREFIX:] if normalised else norm(tokens[:, PREFIX:], decoder.state_dict(), "norm_in")
    expected = linear(averaged(x) if positions == 2 else x, decoder.state_dict(), "head")
    torch.testing.assert_close(decoder(tokens), expected, atol=1e-5, rtol=1e-5)
    index = some(positions)
    chosen = torch.stack([expected[b, index[b]] for b in range(BATCH)])
    torch.testing.assert_close(decoder(tokens, None, index), chosen, atol=1e-5, rtol=1e-5)


def test_normalised_tokens_are_not_normalised_again():
    plain, normalised = make(), make(normalised=True)
    assert not [name for name in normalised.state_dict() if name.startswith("norm_in")]
    state = plain.state_dict()
    normalised.load_state_dict({name: value for name, value in state.items() if not name.startswith("norm_in")})
    tokens, visible = inputs()
    torch.testing.assert_close(normalised(norm(tokens, state, "norm_in"), visible), plain(tokens, visible))


def test_users_mistakes_are_named():
    with pytest.raises(ValueError, match="linear decoder predicts from tokens of hidden patches"):
        make(depth=0)
    with pytest.raises(ValueError, match="no blocks that taps could share"):
        Trunk(WIDTH, depth=0, heads=HEADS, drops=False)
    for width, heads, message in [(18, 4, "its 4 attention heads"), (18, 3, "multiple of 4")]:
        with pytest.raises(ValueError, match=f"width {width} .*{message}"):
            Trunk(width, depth=1, heads=heads, drops=True)


class Taps(nn.Module):
    """Two taps on grids of their own, as a model holds them: a shared trunk is the model's."""

    def __init__(self, *, shared, drops=True, attention="self"):
        super().__init__()
        kind = {"drops": drops, "attention": attention}
        self.trunk = disturb(Trunk(WIDTH, depth=2, heads=HEADS, **kind)) if shared else None
        self.decoders = nn.ModuleList(make(positions=p, trunk=self.trunk, seed=p, **kind) for p in (4, 2))

    def forward(self, tokens, visible, index):
        return [d(tokens, visible, i, self.trunk) for d, i in zip(self.decoders, index, strict=True)]


def test_a_shared_trunk_is_stored_once(tmp_path):
    taps = Taps(shared=True)
    state = taps.state_dict()
    assert "trunk.blocks.1.mlp.fc2.weight" in state
    assert not [name for name in state if name.startswith("decoders") and "trunk" in name]
    save_model(taps, tmp_path / "taps.safetensors")
    tokens, visible = inputs()
    expected = taps(tokens, visible, (None, None))
    for decoder, output in zip(copy.deepcopy(taps).decoders, expected, strict=True):
        with pytest.raises(AssertionError, match="shared trunk"):
            decoder(tokens, visible)
        # a decoder of its own with the same weights is the same function
        alone = make(positions=decoder.tokens // decoder.pool)
        alone.load_state_dict(decoder.state_dict() | taps.trunk.state_dict(prefix="trunk."))
        torch.testing.assert_close(alone(tokens, visible), output)


@pytest.mark.parametrize("part", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("attention", ["self", "cross"])
@pytest.mark.parametrize("drops", [True, False])
def test_gradients_reach_every_parameter(drops, attention, shared, part):
    taps = Taps(shared=shared, drops=drops, attention=attention)
    tokens, visible = inputs(drops)
    tokens.requires_grad_()
    for output in taps(tokens, visible, (some(4), some(2)) if part else (None, None)):
        assert output.shape == (BATCH, 3 if part else output.shape[1], VALUES)
        output.square().sum().backward()
    assert tokens.grad.abs().sum(2).all()
    trained = {name: p for name, p in taps.named_parameters() if p.requires_grad}
    assert len(trained) > 30
    assert [name for name, p in trained.items() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("attention", ["self", "cross"])
def test_half_precision_computes_in_half_and_stays_near(attention):
    decoder, index = make(attention=attention), some(4)
    tokens, visible = inputs()
    types = []
    for chosen in (None, index):
        expected = decoder(tokens, visible, chosen)
        seen = decoder.trunk.blocks[0].register_forward_pre_hook(lambda _, given: types.extend(x.dtype for x in given))
        with torch.autocast("cpu", torch.bfloat16):
            output = decoder(tokens, visible, chosen)
        seen.remove()
        assert {output.dtype, *types} == {torch.bfloat16}
        assert (output - expected).square().mean() < 1e-3 * expected.square().mean()


@pytest.mark.parametrize(
    ("drops", "attention", "part"),
    [(True, "self", False), (True, "self", True), (True, "cross", True), (False, "self", True)],
)
def test_compiles_to_one_graph_for_every_mask(drops, attention, part):
    taps = Taps(shared=True, drops=drops, attention=attention)
    torch.compiler.reset()
    compiled = torch.compile(taps, fullgraph=True, backend="eager")
    with torch.enable_grad():
        for seed in range(3):
            tokens, visible = inputs(drops, seed)
            index = (some(4, seed=seed), some(2, seed=seed)) if part else (None, None)
            with torch.compiler.set_stance("fail_on_recompile" if seed else "default"):
                outputs = compiled(tokens, visible, index)
            for output, expected in zip(outputs, taps(tokens, visible, index), strict=True):
                torch.testing.assert_close(output, expected)


def flops(decoder, visible, chosen=None):
    """Forward FLOPs of one image, counted on tensors without data."""
    tokens = torch.empty(1, decoder.prefix + visible, decoder.embed.in_features, device="meta")
    places = torch.empty(1, visible, dtype=torch.long, device="meta")
    index = None if chosen is None else torch.empty(1, chosen, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter:
        decoder.to("meta")(tokens, places, index)
    return counter.get_total_flops()


@pytest.mark.parametrize("attention", ["self", "cross"])
def test_cost_of_a_prediction_falls_with_its_positions(attention):
    decoder, chosen = make(attention=attention), 3
    tokens = PREFIX + VISIBLE
    if attention == "self":
        length = tokens + chosen
        block = 2 * length * 12 * WIDTH**2 + 4 * length**2 * WIDTH
    else:
        block = 2 * chosen * 10 * WIDTH**2 + 2 * tokens * 2 * WIDTH**2 + 4 * chosen * tokens * WIDTH
    expected = 2 * tokens * WIDE * WIDTH + 2 * block + 2 * chosen * WIDTH * VALUES
    assert flops(decoder, VISIBLE, chosen) == expected < flops(decoder, VISIBLE)
