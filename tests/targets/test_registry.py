"""Targets of one's own: registered by a decorator, named by a recipe, imported from a file on every worker."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_images import SIZE, TOKEN, images_of, normalised_of, statistics_of
from tiny_shards import SIDE, photos, write_set

from pipeline.config.load import load, validate, with_overrides
from pipeline.config.recipe import differences, identity
from pipeline.errors import SettingError
from pipeline.models.build import build_blank_model, build_inputs, build_model, build_views, check_model
from pipeline.shards.batches import sequential
from pipeline.training.pretrain_loop import train
from wavemim import registry
from wavemim.figures.reconstruction import reconstruction_figure
from wavemim.registry import arguments_of, known_targets, predicts_bands, register_target, target_class
from wavemim.targets import FourierTarget, HOGTarget, PixelTarget, Tap, Target, WaveletTarget

ROOT = Path(__file__).parents[2]
TINY = [f"data.image_size={SIDE}", "data.levels=4", f"encoder.image_size={SIDE}", "encoder.patch_size=8"]
TINY += ["encoder.width=32", "encoder.depth=2", "encoder.heads=2", "decoder.width=16", "decoder.heads=2"]
TINY += ["target.taps={3: 1, 4: 2}", "train.batch=8", "train.epochs=1", "train.warmup_epochs=0", "train.log_every=1"]
MEAN = '''
import torch
from wavemim.targets import Target, register_target
from wavemim.targets.base import to_positions

@register_target("{name}")
class MeanTarget(Target):
    """The mean colour of each position, times a factor."""

    def __init__(self, taps, statistics, *, factor=1.0, **settings):
        super().__init__(taps, statistics, **settings)
        self.factor = factor

    def values(self, tap):
        return self.channels

    def forward(self, images, pyramid):
        with torch.no_grad():
            sides = {{tap.level: self.positions(tap.level) for tap in self.taps}}
            means = {{n: torch.nn.functional.adaptive_avg_pool2d(images.float(), side) for n, side in sides.items()}}
            return {{n: self.factor * to_positions(maps[:, :, None], 1) for n, maps in means.items()}}
'''


@pytest.fixture(autouse=True)
def _clean_registry(monkeypatch):
    """Leave no targets behind."""
    monkeypatch.setattr(registry, "_classes", dict(registry._classes))
    monkeypatch.setattr(registry, "_origins", dict(registry._origins))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("wavemim_target_"):
            del sys.modules[name]


@pytest.fixture
def module(tmp_path):
    """A file that registers `mean_colour`."""
    path = tmp_path / "own.py"
    path.write_text(MEAN.format(name="mean_colour"))
    return path


def recipe_of(module, *settings):
    return load("small", [*TINY, "target.kind=mean_colour", f"target.module={module}", *settings])


def test_the_built_in_targets_come_through_the_same_door():
    assert [target_class(name) for name in registry.BUILT_IN] == [WaveletTarget, PixelTarget, HOGTarget, FourierTarget]
    assert known_targets() == ["wavelet", "pixels", "hog", "fourier"]
    for name in registry.BUILT_IN:  # known without their classes, so that settings are checked without torch
        assert predicts_bands(name) == target_class(name).predicts_bands
    assert arguments_of(WaveletTarget) == {
        *("image_size", "token_sizes", "wavelet", "normalise", "loss", "on_device", "band_scale"),
    }


def test_a_class_of_the_same_name_replaces_itself_and_nobody_else():
    def cell():
        @register_target("flat")
        class Flat(PixelTarget):
            pass

        return Flat

    first, second = cell(), cell()  # a notebook's cell, run twice
    assert first is not second and target_class("flat") is second
    assert known_targets()[-1] == "flat"

    class Other(PixelTarget):
        pass

    with pytest.raises(ValueError, match=r"'flat'.*is taken by .*Flat of .*test_registry.py; choose another"):
        register_target("flat")(Other)
    with pytest.raises(ValueError, match=r"'wavelet'.*is taken by WaveletTarget"):
        register_target("wavelet")(Other)
    with pytest.raises(TypeError, match=r"not a subclass of wavemim.targets.Target"):
        register_target("module")(torch.nn.Linear)
    for name in ("Flat", "2d", "", "a b", "a.b"):
        with pytest.raises(ValueError, match="lower-case letters"):
            register_target(name)
    with pytest.raises(ValueError, match=r"target.kind=nothing: not registered; known are wavelet"):
        target_class("nothing")


def test_what_a_constructor_takes_is_seen_through_keyword_arguments():
    class Passing(HOGTarget):
        def __init__(self, taps, statistics, *, own=1, **settings):
            super().__init__(taps, statistics, **settings)

    assert arguments_of(Passing) == {"own", *arguments_of(HOGTarget)} and "bins" in arguments_of(Passing)
    assert "loss" not in arguments_of(FourierTarget)


def test_a_recipe_names_a_file_and_its_options(module, monkeypatch):
    monkeypatch.chdir(module.parent)
    recipe = recipe_of("own.py", "target.options.factor=3")
    assert recipe.target.module == str(module)  # workers have other working folders
    check_model(recipe)
    target = build_blank_model(recipe).target
    assert type(target).__name__ == "MeanTarget" and target.factor == 3.0 and target.loss == "l2"
    assert validate(json.loads(json.dumps(recipe.dump()))) == recipe
    assert with_overrides(recipe, {"target.options": {}}).target.options == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["target.kind=mean"], "target.kind=mean: no target of this name.*; allowed are .*, mean_colour; .* does not register it"),
        (["target.bands.3=HV"], "target.bands: target.kind=mean_colour has no bands"),
        (["target.normalise=contrast"], "target.normalise=contrast"),
        (["target.options.size=3"], "target.options.size: target.kind=mean_colour takes factor"),
        (["target.options.loss=l1"], "target.options.loss: cannot be set here"),
        (["target.kind=fourier", "target.options.x=1"], "target.options.x: target.kind=fourier takes no options"),
        (["target.options={factor: }"], "factor has no value"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(module, settings, message):
    with pytest.raises(SettingError, match=message) as caught:
        build_blank_model(recipe_of(module, *settings))
    assert "\n" not in str(caught.value)


def test_modules_that_cannot_be_imported_are_one_line(tmp_path):
    with pytest.raises(
        SettingError, match=r"target.module=.*nothing.py: cannot be imported: FileNotFoundError: no such"
    ):
        recipe_of(tmp_path / "nothing.py")
    with pytest.raises(
        SettingError, match=r"target.module=no_such_module_at_all: cannot be imported: ModuleNotFoundError"
    ):
        recipe_of("no_such_module_at_all")
    broken = tmp_path / "broken.py"
    broken.write_text(MEAN.format(name="mean_colour") + "\n1 / 0\n")
    with pytest.raises(SettingError, match=r"broken.py: cannot be imported: ZeroDivisionError: division by zero"):
        recipe_of(broken)
    assert "mean_colour" not in known_targets()
    broken.write_text(MEAN.format(name="mean_colour"))  # mended, in the same process
    assert recipe_of(broken).target.kind == "mean_colour"
    with pytest.raises(
        SettingError, match=r"target.kind=mean_colours: no target of this name; did you mean 'mean_colour'"
    ):
        load("small", ["target.kind=mean_colours"])


def test_a_module_by_its_dotted_name(module, monkeypatch):
    monkeypatch.syspath_prepend(module.parent)
    try:
        recipe = recipe_of("own")
        assert recipe.target.module == "own" and type(build_blank_model(recipe).target).__module__ == "own"
        assert recipe_of(module).target.kind == "mean_colour"  # the same file by its path: not imported twice
    finally:
        sys.modules.pop("own", None)


def test_it_trains_and_its_checkpoint_is_read_by_another_process(module, tmp_path):
    shards = write_set(tmp_path / "shards", photos(36))
    recipe = recipe_of(module, "train.epochs=2", "train.lr=0.05")
    losses = []
    folder = tmp_path / "checkpoint"
    trained = train(
        recipe, shards,
        device=torch.device("cpu"),
        on_log=lambda metrics, images: losses.append(metrics["train/loss"]),
        on_checkpoint=lambda saver, state: saver(folder),
    )  # fmt: skip
    assert len(losses) == 6 and losses[-1] < losses[0]
    views = build_views(recipe, trained.model, build_inputs(shards), augment=False)
    batch = next(sequential(shards, "val", 2, window=SIDE))
    figure = tmp_path / "figure.png"
    compared = reconstruction_figure(figure, model=trained.model, views=views, stored=batch.levels, rows=batch.rows)
    assert figure.stat().st_size > 1000 and compared.rebuilt is None
    assert [level.true.shape for level in compared.levels] == [(2, 1, 4, 4), (2, 1, 8, 8)]
    code = (
        "import sys; from pathlib import Path; from pipeline.models.build import model_of_checkpoint\n"
        "model, _, recipe = model_of_checkpoint(Path(sys.argv[1])); print(recipe.target.kind, type(model.target).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == ["mean_colour", "MeanTarget"]


def test_a_target_that_derives_from_wavelets_has_bands_and_levels(tmp_path):
    @register_target("signs")
    class SignTarget(WaveletTarget):
        def forward(self, images, pyramid):
            return {level: values.sign() for level, values in super().forward(images, pyramid).items()}

    settings = [*TINY, "target.kind=signs"]
    recipe = load("small", [*settings, "target.bands.3=HV"])
    assert recipe.bands_by_level() == {3: "HV", 4: "AHVD"}
    model = build_model(recipe, write_set(tmp_path / "shards", photos(6)))
    assert [tap.bands for tap in model.target.taps] == ["HV", "AHVD"] and isinstance(model.target, SignTarget)
    with pytest.raises(SettingError, match="level 5 is deeper than the stored pyramid"):
        load("small", [*settings, "target.taps={3: 1, 5: 2}"])
    with pytest.raises(SettingError, match=r"target.taps.0: level 0"):
        load("small", [*settings, "target.taps={0: 2}"])


def test_folders_from_before_these_settings_are_the_same_work(module):
    before = identity(load("small", TINY), "pretrain")
    assert "target.kind" in before and not {"target.module", "target.options"} & before.keys()
    own = identity(recipe_of(module), "pretrain")
    assert "target.module" not in own  # where the class is found: the folder may move
    assert differences(own, identity(recipe_of(module, "target.options.factor=2"), "pretrain")) == [
        "target.options: None → {'factor': 2}"
    ]


def test_pictures_are_drawn_of_a_target_that_draws_none_itself(module):
    recipe_of(module)
    images = images_of(3)
    target = target_class("mean_colour")(
        [Tap(3, 1), Tap(4, 2)], statistics_of(images), image_size=SIZE, token_sizes={3: TOKEN, 4: TOKEN}
    )
    normal = normalised_of(images)
    truth = target(normal, {})
    mask = torch.zeros(3, 16, dtype=torch.bool)
    for level, side in ((3, 4), (4, 2)):
        drawn = target.picture(level, truth[level], normal, {}, mask)
        assert drawn.shape == (3, 1, side, side)
        torch.testing.assert_close(drawn.amax((1, 2, 3)), torch.full((3,), 255.0))
        torch.testing.assert_close(target.picture(level, truth[level] / 2, normal, {}, mask), drawn / 2)
    assert target.rebuild(truth, normal, {}, mask) is None


def test_the_base_class_needs_values_and_forward():
    target = Target([Tap(3, 1)], statistics_of(images_of()), image_size=SIZE, token_sizes={3: TOKEN})
    with pytest.raises(NotImplementedError):
        target.values(target.taps[0])
    with pytest.raises(NotImplementedError):
        target(torch.zeros(1, 3, SIZE, SIZE), {})
