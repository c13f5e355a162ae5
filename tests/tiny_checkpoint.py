"""A checkpoint of a tiny untrained model, for tests that read checkpoints."""

from loss_equality.cases import TWO_LEVELS
from tiny import statistics
from tiny_images import images_of

from pipeline.config.load import load
from pipeline.models.build import build_blank_model
from wavemim.weights import checkpoint

SIDE = 32
SMALL = [
    "data.image_size=32",
    "data.levels=3",
    "encoder.image_size=32",
    "encoder.patch_size=4",
    "encoder.width=32",
    "encoder.depth=2",
    "encoder.heads=2",
    "decoder.width=16",
    "decoder.heads=2",
    "target.taps={2: 1, 3: 2}",
]


def write_checkpoint(folder, *settings, channels=3):
    """A checkpoint as pretraining writes it, of a tiny untrained model; gives (model, statistics)."""
    recipe = load(TWO_LEVELS, [*SMALL, f"data.channels={channels}", *settings])
    stats = statistics(images_of(4, channels, SIDE), 3)
    model = build_blank_model(recipe)  # weights do not depend on statistics
    state = {
        "images": 8,
        "recipe": recipe.dump(),
        "shards": "abc",
        "pixel_mean": stats.pixel_mean,
        "pixel_std": stats.pixel_std,
        "statistics": {"mean": stats.mean, "std": stats.std},
        "wavelet": "haar",
    }
    checkpoint.save(folder, model, None, state)
    return model.eval(), stats
