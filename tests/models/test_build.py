"""What only the built model can tell is refused before anything is started, and names the setting."""

import pytest

from pipeline.config.load import load
from pipeline.errors import SettingError
from pipeline.models.build import build_blank_model, build_masking, check_model

SWIN = [
    "encoder.name=swin_tiny_patch4_window7_224",
    "encoder.patch_size=null",
    "encoder.width=null",
    "encoder.depth=null",
]
SWIN += ["encoder.heads=null", "target.taps={2: 1, 5: 4}", "data.image_size=128", "data.levels=5"]
DINO = ["encoder.name=vit_small_patch14_dinov2", "encoder.width=null", "encoder.heads=null", "encoder.patch_size=null"]
DINO += ["data.image_size=112", "encoder.image_size=112", "target.kind=pixels", "target.taps={0: 8}"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["target.taps={3: 6, 4: 9}"],
            "target.taps: level 4: block 9 does not exist, vit_tiny_patch16_224 has blocks 1 to 8",
        ),
        (
            ["target.taps={3: 6, 4: 7}"],
            "target.taps: the last block, 8, has no tap, so that blocks after 7 would never",
        ),
        ([*SWIN, "encoder.image_size=128", "target.taps={2: 1, 5: 5}"], "target.taps: level 5: stage 5 does not exist"),
        (
            [
                *SWIN,
                "encoder.image_size=80",
                "data.image_size=80",
                "data.levels=4",
                "target.taps={4: 4}",
                "mask.unit=16",
            ],
            "encoder.name=swin_tiny_patch4_window7_224 with encoder.image_size=80: 80 pixels are not a multiple of the "
            "token size, 32 pixels; nearest allowed: 64 or 96",
        ),
        (
            [*DINO, "mask.unit=16"],
            "mask.unit=16: the side of a hidden block, 16, is not a multiple of 14 that divides 112",
        ),
        (
            [*DINO, "target.taps={2: 8}"],
            "target.taps.2: cells of 4 pixels and tokens of 14 pixels do not divide each other; use patches whose size is",
        ),
        ([*DINO, "mask.ratio=0.001"], "mask.ratio=0.001: a ratio of 0.001 hides 0 of 64 blocks"),
    ],
)
def test_geometry_that_only_the_model_knows(settings, message):
    recipe = load("small", settings)  # nothing is wrong that the settings alone could tell
    with pytest.raises(SettingError) as caught:
        check_model(recipe)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_blocks_that_are_hidden_as_a_whole():
    """A patch of a ViT, the coarsest token of a backbone with stages, and 32 pixels for blocks."""
    for settings, pixels in (
        ([], 8),
        (["mask.kind=block"], 32),
        (["mask.unit=16"], 16),
        ([*SWIN, "encoder.image_size=128"], 32),
    ):
        recipe = load("small", settings)
        encoder = build_blank_model(recipe).encoder
        masking = build_masking(recipe, encoder)
        assert masking.unit * encoder.cell == pixels, settings
        assert masking.grid * encoder.cell == recipe.encoder.image_size


def test_settings_of_plain_vits_are_refused_for_others():
    with pytest.raises(SettingError, match=r"encoder\.width=32 does not apply to 'swin_tiny_patch4_window7_224'"):
        check_model(load("small", [*SWIN, "encoder.image_size=128", "encoder.width=32"]))


@pytest.mark.parametrize(("share", "expected"), [(0.5, 224**2 / 2), (1.0, 224**2 - 793)])
def test_the_fourier_target_knows_how_many_frequencies_are_removed(share, expected):
    """793 of 224² are inside of the circle of radius 16."""
    narrow = ["encoder.width=8", "encoder.depth=1", "encoder.heads=1", "target.taps={4: 1}"]
    recipe = load("mfm_vit_base", [*narrow, f"mask.low_pass_share={share}"])
    target = build_blank_model(recipe).target
    assert target.average == "frequency" and float(target.get_buffer("expected4")) == expected
