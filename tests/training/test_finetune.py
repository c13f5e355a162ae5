"""Fine-tuning: groups, targets, one step; and the stage over Ray."""

import copy
import csv
import json
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from tiny_finetune import NAMES, SWIN, coloured_set, encoder_of, recipe_for
from tiny_shards import photos
from torch import nn

from pipeline.config.load import with_overrides
from pipeline.errors import SettingError
from pipeline.models.encoder_source import build_classifier, check_labels, find_encoder
from pipeline.shards.shard_set import ShardSet
from pipeline.training.finetune_loop import TOP1
from wavemim.augment import RandAugment, random_resized_crop
from wavemim.finetune import (
    FinetuneStep,
    Mixing,
    freeze_encoder,
    make_classifier,
    make_finetune_optimizer,
    middle,
    parameter_groups,
)
from wavemim.optim import make_schedule


def classifier(name, classes=5, drop_path=0.1, head="mean", **changes):
    encoder, arguments = encoder_of(name, **changes)
    return make_classifier(encoder, name, arguments, classes=classes, drop_path=drop_path, head=head)[0]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return coloured_set(tmp_path_factory.mktemp("finetune") / "shards")


@pytest.fixture(scope="module")
def recipe(shards, tmp_path_factory):
    return recipe_for(shards, tmp_path_factory.mktemp("encoder"))


# Parameter groups.
def by_formula(name, model, decay, weight_decay):
    """{parameter: (rate, weight decay)}: the head has 1, each layer below it `decay` times that of the next (BEiT, MAE)."""
    found = {}
    for key, value in model.named_parameters():
        parts = key.split(".")
        if name.startswith("vit"):
            top = 3 + 1
            layer = 0 if parts[0] in ("cls_token", "pos_embed", "patch_embed") else top
            layer = int(parts[1]) + 1 if parts[0] == "blocks" else layer
        else:
            depths, top = SWIN["depths"], sum(SWIN["depths"]) + 1
            layer = {"patch_embed": 0, "norm": top - 1}.get(parts[0], top)  # timm counts the norm to the last block
            if parts[0] == "layers":  # and the downsampling in front of a stage to its first block
                block = int(parts[3]) if parts[2] == "blocks" else 0
                layer = 1 + sum(depths[: int(parts[1])]) + block
        plain = value.ndim <= 1 or parts[-1] in ("cls_token", "pos_embed", "relative_position_bias_table")
        found[key] = (decay ** (top - layer), 0.0 if plain else weight_decay)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_rates_fall_from_layer_to_layer(name):
    model = classifier(name)
    names = {id(value): key for key, value in model.named_parameters()}
    found = {
        names[id(value)]: (pytest.approx(group["lr_scale"]), group["weight_decay"])
        for group in parameter_groups(model, weight_decay=0.05, layer_decay=0.5)
        for value in group["params"]
    }
    assert by_formula(name, model, 0.5, 0.05) == found
    listed = model.no_weight_decay()
    theirs = param_groups_layer_decay(model, 0.05, no_weight_decay_list=listed, layer_decay=0.5)
    for group in theirs:
        for value in group["params"]:
            assert found[names[id(value)]] == (group["lr_scale"], group["weight_decay"])


def test_the_schedule_keeps_the_rates_of_layers_apart():
    model = classifier("vit_tiny_patch16_224")
    optimizer = make_finetune_optimizer(model, lr=1.0, weight_decay=0.05, layer_decay=0.5, betas=(0.9, 0.999))
    schedule = make_schedule(optimizer, total_steps=100, warmup_steps=10, min_lr=0.0)
    for step, peak in ((5, 0.5), (50, 0.5), (100, 0.0)):
        schedule.step_update(step)
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(peak * group["lr_scale"], abs=1e-9)


# The model.
@pytest.mark.parametrize("name", NAMES)
def test_a_classifier_has_the_encoders_weights_and_a_small_new_head(name):
    encoder, arguments = encoder_of(name)
    for value in encoder.parameters():
        nn.init.normal_(value)
    model, used = make_classifier(encoder, name, arguments, classes=5, drop_path=0.2)
    own, known = model.state_dict(), encoder.state_dict()
    new = {key for key in own if key not in known}
    assert new == ({"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"} if "vit" in name else
                   {"head.fc.weight", "head.fc.bias"})  # fmt: skip
    assert all(torch.equal(own[key], known[key]) for key in own if key in known)
    assert all(parameter.requires_grad for parameter in model.parameters())
    images = torch.randn(2, 3, 64, 64)
    features = model.forward_head(model.forward_features(images), pre_logits=True)
    assert model(images).shape == (2, 5) and model(images).abs().max() < 1e-3 * features.abs().max()
    if "vit" in name:  # the mean of the patch tokens before the encoder's own norm, normalised after
        tokens = model.eval().forward_intermediates(images, indices=1, norm=False, intermediates_only=True)[-1]
        mean = nn.functional.layer_norm(tokens.flatten(2).mean(2), (32,), eps=1e-6)
        torch.testing.assert_close(model.head(mean), model(images))
    rates = [module.drop_prob for module in model.modules() if type(module).__name__ == "DropPath"]
    assert max(rates) == pytest.approx(0.2) and sorted(rates) == rates
    again = timm.create_model(name, **used)
    assert {key: value.shape for key, value in again.state_dict().items()} == {k: v.shape for k, v in own.items()}


@pytest.mark.parametrize("name", ["levit_128s", "caformer_s18"])
def test_norms_inside_a_head_begin_as_timm_has_them(name):
    model, _ = make_classifier(
        timm.create_model(name, num_classes=0), name, {"num_classes": 0}, classes=5, drop_path=0.0
    )
    norms = [value for key, value in model.named_parameters() if key.startswith("head") and "norm.weight" in key]
    norms += [value for key, value in model.named_parameters() if key.startswith("head") and "bn.weight" in key]
    assert norms and all((value == 1).all() for value in norms)


def test_a_distilled_model_needs_its_tokens():
    name = "deit_tiny_distilled_patch16_224"
    encoder = timm.create_model(name, num_classes=0)
    with pytest.raises(ValueError, match=r"set finetune\.head=token"):
        make_classifier(encoder, name, {"num_classes": 0}, classes=5, drop_path=0.0)
    model, _ = make_classifier(encoder, name, {"num_classes": 0}, classes=5, drop_path=0.0, head="token")
    assert model.eval()(torch.zeros(1, 3, 224, 224)).shape == (1, 5)


def test_what_cannot_be_a_classifier_is_refused():
    encoder = timm.create_model("dla46_c", num_classes=0)
    with pytest.raises(ValueError, match=r"'dla46_c' has no drop path; set finetune\.drop_path=0"):
        make_classifier(encoder, "dla46_c", {"num_classes": 0}, classes=3, drop_path=0.1)
    assert make_classifier(encoder, "dla46_c", {"num_classes": 0}, classes=3, drop_path=0.0)[0].num_classes == 3
    with pytest.raises(ValueError, match="timm cannot build"):
        classifier("vit_tiny_patch16_224", class_token=False, head="token")


def test_a_frozen_encoder_leaves_the_head_to_be_trained():
    model = classifier("vit_tiny_patch16_224", drop_path=0.0)
    freeze_encoder(model)
    trained = {key for key, value in model.named_parameters() if value.requires_grad}
    assert trained == {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}


# A step.
def make_step(model, mixing, **options):
    optimizer = make_finetune_optimizer(model, lr=0.1, weight_decay=0.05, layer_decay=0.7, betas=(0.9, 0.999))
    schedule = make_schedule(optimizer, total_steps=10, warmup_steps=0, min_lr=0.0)
    return FinetuneStep(model.train(), mixing, optimizer, schedule, seed=3, **options)


def gradients(step, *arguments, number=4):
    step.model.zero_grad(set_to_none=True)
    loss = step.backward(*arguments, step=number)
    return loss, {key: value.grad.clone() for key, value in step.model.named_parameters()}


def batch_of(n, classes=5):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(n, 3, 64, 64, generator=generator)
    return images, torch.randint(classes, (n,), generator=generator), torch.ones(n)


def test_mixed_targets_sum_to_one_and_images_are_mixed_as_the_targets_say():
    images = torch.eye(6)[:, :, None, None].expand(6, 6, 4, 4).clone()  # image i is channel i
    labels = torch.arange(6)
    np.random.seed(0)
    seen = set()
    for _ in range(20):
        mixed, targets = Mixing(6, mixup=0.8, cutmix=1.0)(images.clone(), labels)
        torch.testing.assert_close(targets.sum(1), torch.ones(6))
        torch.testing.assert_close(mixed.mean((2, 3)), targets, atol=1e-6, rtol=0)  # the share of each image
        seen.add(len(mixed.unique()) > 2)  # mixup blends, cutmix does not
    assert seen == {True, False}
    mixed, targets = Mixing(6, label_smoothing=0.3)(images.clone(), labels)
    assert torch.equal(mixed, images)
    torch.testing.assert_close(targets, 0.7 * torch.eye(6) + 0.05)
    mixed, targets = Mixing(6, mixup=0.8)(images[:5].clone(), labels[:5])  # an odd number
    assert torch.equal(mixed[4], images[4]) and torch.equal(targets[4], torch.eye(6)[4])


def test_rows_without_weight_or_label_change_nothing():
    mixing = Mixing(5, mixup=0.8, cutmix=1.0, label_smoothing=0.1, erasing=0.5)
    step = make_step(classifier("vit_tiny_patch16_224", drop_path=0.3), mixing)
    images, labels, weight = batch_of(6)
    loss, alone = gradients(step, images, labels, weight, 6.0)
    more = torch.cat((images, 100 * torch.randn(3, 3, 64, 64)))
    others = torch.cat((labels, torch.tensor([1, 2, -1])))
    filled = torch.cat((weight, torch.tensor([0.0, 0.0, 1.0])))
    again, filled_up = gradients(step, more, others, filled, 6.0)
    assert torch.equal(loss, again)
    assert all(torch.equal(alone[key], filled_up[key]) for key in alone)
    _, other = gradients(step, images, labels, weight, 6.0, number=5)  # and they are drawn anew in each step
    assert not torch.equal(other["head.weight"], alone["head.weight"])
    nothing, zeros = gradients(step, images, labels, 0 * weight, 6.0)
    assert nothing == 0 and not any(value.any() for value in zeros.values())


def test_a_step_is_what_it_says():
    model = classifier("vit_tiny_patch16_224", drop_path=0.0)
    nn.init.normal_(model.head.weight, std=0.5)
    plain = copy.deepcopy(model)
    step = make_step(model, Mixing(5, label_smoothing=0.2), accumulate=3)
    images, labels, weight = batch_of(7)
    result = step(images, labels, weight, 7.0, step=0)
    expected = nn.functional.cross_entropy(plain.train()(images), labels, label_smoothing=0.2)
    torch.testing.assert_close(result.losses, expected.detach()[None])
    expected.backward()
    norm = torch.stack([value.grad.norm() for value in plain.parameters()]).norm()
    torch.testing.assert_close(result.grad_norm, norm)
    rate = 0.1 * (1 + np.cos(np.pi * 0.1)) / 2  # of the cosine at step 1 of 10
    gradient, before, after = plain.head.weight.grad, plain.head.weight, model.head.weight
    torch.testing.assert_close(after, before * (1 - rate * 0.05) - rate * gradient / (gradient.abs() + 1e-8))


def test_attention_in_bfloat16_on_a_cpu_avoids_the_fused_kernel():
    model = classifier("vit_tiny_patch16_224", drop_path=0.0)
    for precision, kernel in ((torch.float32, "flash_attention_for_cpu"), (torch.bfloat16, "attention_math")):
        with torch.profiler.profile() as profiled:
            gradients(make_step(model, Mixing(5), precision=precision), *batch_of(2), 2.0)
        used = {event.key for event in profiled.key_averages() if "_scaled_dot_product" in event.key}
        assert {key.removesuffix("_backward") for key in used} == {f"aten::_scaled_dot_product_{kernel}"}


def test_parts_of_workers_make_up_the_gradient_of_the_whole():
    model = classifier("vit_tiny_patch16_224", drop_path=0.0)
    images, labels, weight = batch_of(6)
    _, whole = gradients(make_step(model, Mixing(5)), images, labels, weight, 6.0)
    parts = []
    for rank, rows in enumerate((slice(0, 4), slice(4, 6))):  # DDP takes the mean over workers
        part = make_step(model, Mixing(5), rank=rank, world=2)
        parts.append(gradients(part, images[rows], labels[rows], weight[rows], 6.0)[1])
    for key, value in whole.items():
        torch.testing.assert_close((parts[0][key] + parts[1][key]) / 2, value, atol=1e-6, rtol=1e-4)


def test_a_step_without_a_finite_gradient_changes_nothing():
    step = make_step(classifier("vit_tiny_patch16_224"), Mixing(5))
    before = copy.deepcopy(step.model.state_dict())
    images, labels, weight = batch_of(4)
    assert not step(images * float("inf"), labels, weight, 4.0, step=0).grad_norm.isfinite()
    assert all(torch.equal(value, before[key]) for key, value in step.model.state_dict().items())


# Images.
def test_rand_augment_crops_as_the_device_does():
    pixels, rows = torch.from_numpy(photos(6)), torch.arange(6) * 7
    options = {"size": 32, "seed": 2, "scale": (0.2, 1.0)}
    nothing = RandAugment("rand-m0-p0", pixel_mean=[120.0] * 3, **options)(pixels, rows, epoch=3)
    assert nothing.dtype == torch.uint8
    expected = random_resized_crop(pixels.float(), rows, epoch=3, **options)
    assert (nothing.float() - expected).abs().max() <= 2  # Pillow rounds twice
    changed = RandAugment("rand-m9-mstd0.5-inc1", pixel_mean=[120.0] * 3, **options)(pixels, rows, epoch=3)
    assert changed.shape == nothing.shape and not torch.equal(changed, nothing)
    grey = RandAugment("rand-m10-n4-p1-inc1", pixel_mean=[120.0], **options)
    assert grey(pixels[:, :1].repeat(10, 1, 1, 1), torch.arange(60), epoch=0).shape == (60, 1, 32, 32)


def test_rand_augment_follows_from_the_row_in_any_number_of_threads():
    pixels, rows = torch.from_numpy(photos(24)), torch.arange(24) * 7
    augment = RandAugment("rand-m9-mstd0.5-inc1", size=32, seed=2, pixel_mean=[120.0] * 3)
    np.random.seed(1)
    random.seed(1)
    before = np.random.get_state()[1].tolist(), random.getstate()
    expected = augment(pixels, rows, epoch=3)
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before  # the batch is mixed by these
    with ThreadPoolExecutor(4) as pool:
        parts = pool.map(lambda row: augment(pixels[row : row + 1], rows[row : row + 1], epoch=3), reversed(range(24)))
        assert torch.equal(torch.cat(list(parts)).flip(0), expected)
    assert not torch.equal(augment(pixels, rows, epoch=4), expected)
    same = augment(pixels[:1].repeat(24, 1, 1, 1), rows * 0, epoch=3)
    assert (same == same[:1]).all()  # a row is augmented in the same way wherever it lies
    assert len({image.numpy().tobytes() for image in augment(pixels[:1].repeat(24, 1, 1, 1), rows, epoch=3)}) > 20


@pytest.mark.parametrize(("size", "corner", "side"), [(64, 0, 64), (60, 2, 60), (56, 4, 56), (28, 4, 56)])
def test_the_middle_is_what_is_judged(size, corner, side):
    pixels = torch.from_numpy(photos(2)).float()
    found = middle(pixels, size)
    cut = pixels[..., corner : corner + side, corner : corner + side]
    expected = cut if size == side else nn.functional.interpolate(cut, size=size, mode="area")
    assert found.shape == (2, 3, size, size)
    assert (found - expected).abs().mean() < (1e-3 if size == side else 3)


def test_shards_that_cannot_be_learnt_from_are_refused(recipe, shards):
    def other(**changes):
        return replace(shards, manifest={**shards.manifest, **changes})

    with pytest.raises(SettingError, match="has no labels"):
        check_labels(other(classes=None))
    with pytest.raises(SettingError, match="single class 'a'"):
        check_labels(other(classes=["a"]))
    with pytest.raises(SettingError, match="has no val images"):
        check_labels(other(splits={**shards.manifest["splits"], "val": {"rows": 0, "files": []}}))
    subject, with_policy = find_encoder(recipe, shards), with_overrides(recipe, {"finetune.rand_augment": "rand-m9"})
    with pytest.raises(
        SettingError, match=r"rand_augment=rand-m9: RandAugment needs images of 1 or 3 channels.*stores 4"
    ):
        build_classifier(with_policy.finetune, replace(subject, channels=4), shards)


def test_settings_that_do_not_go_together_are_refused(recipe):
    for changes, words in (
        ({"finetune.batch": 10, "finetune.workers": 3}, r"finetune\.batch=10: not a multiple of finetune\.workers=3"),
        ({"finetune.accumulate": 20}, r"finetune\.accumulate=20: .* 8 images"),
        ({"finetune.warmup_epochs": 10}, r"finetune\.warmup_epochs=10: must be less than finetune\.epochs=10"),
        ({"finetune.crop_scale": [1, 0.5]}, r"finetune\.crop_scale=\[1\.0, 0\.5\]"),
        (
            {"finetune.rand_augment": "augmix-m3"},
            r"finetune\.rand_augment=augmix-m3: must be a policy that timm calls rand-",
        ),
    ):
        with pytest.raises(SettingError, match=words):
            with_overrides(recipe, changes)


# The stage.
@pytest.mark.ray
@pytest.mark.timeout(800)
def test_the_stage_with_two_workers(ray_local, recipe, shards, tmp_path):
    from pipeline.stages import finetune as stage

    copies = tmp_path / "copies"
    changes = {"name": "two", "finetune.workers": 2, "finetune.epochs": 6, "train.checkpoints_at": str(copies)}
    two = with_overrides(recipe, changes)
    result = stage.run(two, ray_local, stage.check(two), progress=False)
    folder = two.stage_dir("finetune")
    written = json.loads((folder / "result.json").read_text())
    assert written["measured"] == result["measured"] and result["state"] == "new"
    kept, copied = (
        sorted(path.name for path in where.glob("images-*")) for where in (folder, copies / "two" / "finetune")
    )
    assert kept == copied and len(kept) == two.train.keep_checkpoints
    measured = result["measured"]
    assert measured[f"{TOP1}_low"] < measured[TOP1] <= measured[f"{TOP1}_high"] and measured[f"{TOP1}_n"] == 32
    with open(folder / "confusion.csv", newline="") as file:
        lines = list(csv.reader(file))
    counts = np.array([[int(cell) for cell in line[1:]] for line in lines[1:]])
    assert lines[0][1:] == ["a", "b", "c"] and counts.sum() == 32 == sum(line["n"] for line in result["per_class"])
    assert measured[TOP1] == pytest.approx(100 * counts.trace() / 32) and measured[TOP1] > 60

    model = timm.create_model(f"local-dir:{result['model']}", pretrained=True).eval()
    assert model.num_classes == 3 and model.pretrained_cfg["label_names"] == ["a", "b", "c"]
    assert predicted(model, ShardSet.open(two.shards_at)) == counts.tolist()
    assert stage.run(two, ray_local, stage.check(two), progress=False) == {**written, "state": "finished already"}


def predicted(model, shards):
    """Val images by true and predicted class, of whole images read by themselves."""
    from pipeline.shards.batches import sequential

    counts = [[0] * 3 for _ in range(3)]
    mean, std = (255 * torch.tensor(model.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    for batch in sequential(shards, "val", 8, window=64, pixels=True):
        with torch.no_grad():
            found = model((batch.pixels - mean) / std).argmax(1)
        for true, taken in zip(batch.labels.tolist(), found.tolist(), strict=True):
            counts[true][taken] += 1
    return counts
