"""Settings of what judges an encoder: evaluation and sweeps."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pipeline.settings import Positive, Section

Protocol = Literal["linear", "blocks", "knn", "attentive", "few_labels", "rank"]


class Evaluate(Section):
    """What the encoder is worth, on frozen features."""

    protocols: tuple[Protocol, ...] = Field(
        ("linear", "knn", "few_labels", "rank"),
        min_length=1,
        description="what is measured: linear probe, the same for every block, kNN, attentive probe, linear probe on few "
        "labels, RankMe and alpha-ReQ; those left out by default take as long as the rest together, or longer",
    )
    batch: Positive = Field(256, description="images in a forward pass")
    max_images: Positive = Field(50_000, description="train images that probes are fitted to, at most")
    probe_strengths: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (0.01, 0.1, 1.0, 10.0), min_length=1, description="inverse regularisations tried on a held-out part of train"
    )
    probe_iterations: Positive = Field(1000, description="steps of the linear probes' solver, at most")
    knn_k: Positive = Field(20, description="neighbours of the kNN classifier; its curve goes from 1 to 200")
    few_shares: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(
        (0.01, 0.1), min_length=1, description="few_labels: shares of the train labels, at least one a class"
    )
    few_draws: Positive = Field(5, description="few_labels: times that each share is drawn")
    attentive_images: Positive = Field(
        10_000,
        description="attentive: train images whose tokens are kept, at most; each takes 2 bytes × tokens × width of "
        "memory, 0.3 MB of a ViT-B/16 at 224 pixels",
    )
    attentive_epochs: Positive = Field(20, description="attentive: passes over those images")
    attentive_batch: Positive = Field(256, description="attentive: images in a step")
    attentive_lrs: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (3e-4, 1e-3, 3e-3), min_length=1, description="attentive: learning rates tried on a held-out part of train"
    )


class Tune(Section):
    """A sweep: each trial is a short pretraining with some settings changed, judged by a frozen-feature measure."""

    space: str = Field("level_weights", description="file of tune_spaces/, by name or path")
    trials: Positive = Field(8, description="number of trials")
    search: Literal["optuna", "random"] = Field("optuna", description="how the next trial is chosen")
    epochs: float = Field(5, gt=0, description="epochs of a trial")
    max_images: Positive = Field(10_000, description="train images a trial's probe is fitted to, at most")
    concurrent: Positive | None = Field(None, description="trials at once; null: one for each free CPU or GPU")
