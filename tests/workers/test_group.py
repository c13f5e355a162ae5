"""Settings of a group of workers, without starting any."""

import pytest

from pipeline.config.load import load, with_overrides
from pipeline.errors import SettingError
from pipeline.workers.group import least_workers


def test_elastic_stages_have_at_most_their_own_workers():
    recipe = with_overrides(load("small"), {"train.workers": 4, "finetune.workers": 2})
    assert [least_workers(recipe, workers) for workers in (4, 2)] == [4, 2]  # not elastic
    elastic = with_overrides(recipe, {"cluster.min_workers": 3})
    assert [least_workers(elastic, workers) for workers in (4, 2)] == [3, 2]
    with_overrides(recipe, {"cluster.min_workers": 2, "train.workers": 1})  # for fine-tuning
    with pytest.raises(SettingError, match=r"cluster\.min_workers=5: more than train\.workers=4"):
        with_overrides(recipe, {"cluster.min_workers": 5})
