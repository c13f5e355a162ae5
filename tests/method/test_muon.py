"""Muon: which parameters it trains, and that its steps are those of torch's own."""

import copy
import re

import pytest
import torch
from test_step import NoHostSync
from tiny import make, make_step, photos, stored

from pipeline.config.load import load
from pipeline.errors import SettingError
from pipeline.models.build import build_blank_model, check_model
from wavemim.decoders import Trunk
from wavemim.model import DecoderSettings
from wavemim.optim import hidden_matrices, make_optimizer
from wavemim.step import apply_gradients
from wavemim.targets import Tap

MATRIX = re.compile(r"(attn\.(qkv|proj)|mlp\.fc[12]|decoders\.\d\.embed|\.(query|key_value|proj))\.weight$")
CONVOLUTION = "encoder.model.patch_embed.proj.weight"
ROWS, ONE = torch.arange(4), torch.ones(4)


@pytest.mark.parametrize("attention", ["self", "cross"])
def test_its_steps_are_those_of_torch(attention):
    """Both optimizers of torch by themselves, on parameters that are listed by name, at the rates of the schedule."""
    images = photos(4)
    step = make_step(images, clip=1.0, optimizer="muon", decoder=DecoderSettings(16, 1, 2, attention=attention))
    plain = copy.deepcopy(step.model)
    named = {name: value for name, value in plain.named_parameters() if value.requires_grad}
    matrices = [name for name in named if MATRIX.search(name) and name != CONVOLUTION]
    assert len(matrices) == 4 * 3 + 3 * (
        5 if attention == "self" else 6
    )  # of each block, and the embedding of each tap
    others = [name for name in named if name not in matrices]
    decayed = [name for name in others if named[name].ndim > 1 and "token" not in name]
    assert sorted(decayed) == [
        "decoders.1.head.weight",
        "decoders.2.head.weight",
        "decoders.3.head.weight",
        CONVOLUTION,
    ]
    muon = torch.optim.Muon([named[name] for name in matrices], weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    groups = [
        {"params": [named[name] for name in others if name not in decayed], "weight_decay": 0.0},
        {"params": [named[name] for name in decayed], "weight_decay": 0.05},
    ]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    for number in range(3):
        step(stored(images), ROWS, ONE, 4.0, epoch=number, step=number)
        twin = make_step(images, decoder=DecoderSettings(16, 1, 2, attention=attention))
        twin.model.load_state_dict(plain.state_dict())
        twin.backward(stored(images), ROWS, ONE, 4.0, epoch=number)
        torch.nn.utils.clip_grad_norm_(twin.model.parameters(), 1.0)
        for name, value in twin.model.named_parameters():
            plain.get_parameter(name).grad = value.grad
        for group in (*muon.param_groups, *adamw.param_groups):
            group["lr"] = 1e-3 * (number + 1) / 5  # the warm-up takes five steps
        muon.step()
        adamw.step()
        for name, value in step.model.named_parameters():
            assert torch.equal(value, plain.get_parameter(name)), name


def test_a_step_never_waits_for_a_value():
    images = photos(4)
    step = make_step(images, optimizer="muon", ema=0.9)
    for _ in range(2):
        step.backward(stored(images), ROWS, ONE, 4.0, epoch=0)
        with NoHostSync():
            step.optimizer.found_inf = torch.zeros(())
            step.optimizer.step()


def test_a_matrix_without_gradient_stays_as_it_is():
    step = make_step(photos(4), optimizer="muon")
    step.backward(stored(photos(4)), ROWS, ONE, 4.0, epoch=0)
    idle = step.model.encoder.model.blocks[0].mlp.fc1.weight
    before, idle.grad = idle.clone(), None
    apply_gradients(step.model, step.optimizer, float("inf"), None)
    assert torch.equal(idle, before) and not step.optimizer.state[idle]


SWIN = [
    "encoder={name: swinv2_tiny_window8_256, image_size: 64, patch_size: null}",
    "data.image_size=64",
    "data.levels=5",
]
SWIN += ["target.taps={2: 1, 5: 4}", "mask.unit=16"]


def test_tables_of_positions_and_predictions_are_left_to_adamw():
    with torch.device("meta"):
        model = build_blank_model(load("small", SWIN))
    names = {id(value): name for name, value in model.named_parameters()}
    found = {names[id(value)] for value in hidden_matrices(model)}
    assert {name for name in found if "cpb_mlp" in name or ".head." in name or "patch_embed" in name} == set()
    assert {
        "encoder.model.layers_0.blocks.0.attn.qkv.weight",
        "encoder.model.layers_1.downsample.reduction.weight",
    } <= {re.sub(r"layers\.(\d)", r"layers_\1", name) for name in found}
    assert all(model.get_parameter(name).ndim == 2 for name in found)


def test_the_heads_of_a_shared_decoder_are_left_to_adamw():
    taps = [Tap(1, 3, "HVD"), Tap(2, 3, "HVD"), Tap(3, 3, "AHVD")]
    model, _ = make(photos(4), taps=taps, decoder=DecoderSettings(16, 1, 2, per="block"))
    names = {id(value): name for name, value in model.named_parameters()}
    found = {names[id(value)] for value in hidden_matrices(model)}
    assert "decoders.1.embed.weight" in found and not [name for name in found if name.endswith("head.weight")]


def test_what_muon_cannot_train_is_refused():
    linear = Trunk(8, depth=1, heads=2, drops=False).norm
    with pytest.raises(ValueError, match="Muon trains linear layers, and the model has none"):
        make_optimizer(linear, lr=1.0, weight_decay=0.0, betas=(0.9, 0.95), kind="muon")
    settings = [
        "encoder={name: resnet10t, image_size: 64, patch_size: null}",
        "target.taps={2: 1, 4: 4}",
        "mask.unit=16",
    ]
    with pytest.raises(SettingError, match=r"train\.optimizer=muon: Muon trains .*; set train\.optimizer=adamw"):
        check_model(load("small", [*settings, "decoder.depth=0", "train.optimizer=muon"]))
    with pytest.raises(SettingError, match=r"train\.optimizer=muon: needs whole matrices, and train\.parallel=fsdp"):
        load("small", ["train.optimizer=muon", "train.parallel=fsdp", "train.workers=2"])
