"""Which images, patches, masks, taps and decoders fit together.

Each rule is a function of plain numbers that raises ValueError. The parts of the method call them for themselves; the
configuration calls them too, before anything is built, and names the setting. Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

BLOCK = 32  # pixels per side of a hidden block where no size is given


def nearest_multiples(value: int, unit: int) -> str:
    """The multiples of `unit` on both sides of `value`, for messages."""
    below = value // unit * unit
    return f"{below} or {below + unit}" if below else str(unit)


def check_image_size(image_size: int, unit: int) -> None:
    """Check that images consist of whole tokens.

    Args:
        image_size: Pixels per side of an image.
        unit: Pixels per side of a token: the patch of a ViT, the coarsest token of a backbone with stages.

    Raises:
        ValueError: If `unit` does not divide `image_size`.
    """
    if image_size % unit:
        raise ValueError(
            f"{image_size} pixels are not a multiple of the token size, {unit} pixels; nearest allowed: "
            f"{nearest_multiples(image_size, unit)}"
        )


def hidden_count(blocks: int, ratio: float) -> int:
    """The number of blocks that a mask hides: the same in every image."""
    return round(blocks * ratio)


def check_ratio(blocks: int, ratio: float) -> None:
    """Check that a mask hides something, and not everything.

    Args:
        blocks: Number of blocks in an image, each hidden or visible as a whole.
        ratio: Share of them that is hidden.

    Raises:
        ValueError: If no block is hidden, or none is visible.
    """
    hidden = hidden_count(blocks, ratio)
    if not 0 < hidden < blocks:
        raise ValueError(
            f"a ratio of {ratio} hides {hidden} of {blocks} blocks; at least one must be hidden and one visible"
        )


def block_side(unit: int | None, *, cell: int, default: int, kind: str) -> int:
    """The side of the blocks that a mask hides as a whole.

    Args:
        unit: The side that was asked for; None for the default.
        cell: Side of the smallest thing that can be hidden: a patch, or a token of the finest stage.
        default: The encoder's own default.
        kind: Kind of the mask.

    Returns:
        Pixels per side.
    """
    return unit or (max(BLOCK, cell) if kind == "block" else default)


def check_blocks(side: int, unit: int, cell: int = 1) -> None:
    """Check that hidden blocks consist of whole cells and fill an image.

    Args:
        side: Side of an image, in pixels or cells, as are the others.
        unit: Side of a block.
        cell: Side of a cell.

    Raises:
        ValueError: If `unit` is not a multiple of `cell` that divides `side`.
    """
    allowed = [block for block in range(cell, side + 1, cell) if side % block == 0]
    if unit not in allowed:
        must = f"a multiple of {cell} that divides {side}" if cell > 1 else f"a divisor of {side}"
        listed = ", ".join(map(str, allowed)) or "none"
        raise ValueError(f"the side of a hidden block, {unit}, is not {must}; allowed are {listed}")


def check_frequencies(radius: float, low_pass_share: float, image_size: int) -> None:
    """Check the settings of masks in the spectrum.

    Args:
        radius: Radius of the circle, in cycles per image.
        low_pass_share: Share of images that keep the circle only.
        image_size: Pixels per side of an image.

    Raises:
        ValueError: If the circle is empty or does not lie within the spectrum, or the share is not within 0 and 1.
    """
    if not 0 < radius < image_size / 2:
        raise ValueError(
            f"a radius of {radius:g} is not within the spectrum of images of {image_size} pixels, which ends at "
            f"{image_size // 2} cycles; use a radius above 0 and below that"
        )
    if not 0 <= low_pass_share <= 1:
        raise ValueError(f"a low-pass share of {low_pass_share} is not a number from 0 to 1")


def check_mask_count(count: int, kind: str, low_pass_share: float) -> None:
    """Check the number of masks for each image.

    Args:
        count: Number of masks.
        kind: Their kind.
        low_pass_share: Of masks in the spectrum, the share of images that keep the circle only.

    Raises:
        ValueError: If masks in the spectrum would be the same.
    """
    most = 2 if 0 < low_pass_share < 1 else 1  # low-pass and high-pass
    if kind == "frequency" and count > most:
        raise ValueError(
            f"a low-pass share of {low_pass_share:g} allows {most} different mask{'s' if most > 1 else ''} of an image; "
            f"use at most {most}"
        )


def check_level(level: int, least: int) -> None:
    """Check that a target has this level: some have none for the patch itself.

    Raises:
        ValueError: If `level` is below `least`.
    """
    if level < least:
        raise ValueError(f"level {level} does not exist for this target; its levels start at {least}")


def check_cells(level: int, token: int, image_size: int) -> None:
    """Check that the cells of a level, the tokens that predict them, and the images fit together.

    Args:
        level: Level of the tap. Its cells have 2^level pixels per side; level 0 stands for the token itself.
        token: Pixels per side of a token at the tap.
        image_size: Pixels per side of an image.

    Raises:
        ValueError: If cells and tokens do not divide each other, or the larger of them does not divide the image.
    """
    cell = 2**level if level else token
    if max(token, cell) % min(token, cell):
        raise ValueError(
            f"cells of {cell} pixels and tokens of {token} pixels do not divide each other; use patches whose size is a "
            "power of two"
        )
    if image_size % max(token, cell):
        raise ValueError(
            f"cells of {cell} pixels and tokens of {token} pixels do not divide images of {image_size} pixels; nearest "
            f"allowed: {nearest_multiples(image_size, max(token, cell))}"
        )


def check_tapped(taps: Mapping[int, int], depth: int, *, word: str, name: str) -> None:
    """Check that tapped blocks exist, and that the last one is tapped: blocks behind the last tap are never trained.

    Args:
        taps: Level → block, counted from 1.
        depth: Number of blocks of the encoder.
        word: What they are called, "block" or "stage".
        name: Name of the encoder.

    Raises:
        ValueError: If a block does not exist, or the last one has no tap.
    """
    for level, block in taps.items():
        if not 1 <= block <= depth:
            raise ValueError(
                f"level {level}: {word} {block} does not exist, {name} has {word}s 1 to {depth} with these settings"
            )
    if depth not in taps.values():
        raise ValueError(
            f"the last {word}, {depth}, has no tap, so that {word}s after {max(taps.values())} would never be trained; "
            f"tap {word} {depth}"
        )


def check_decoder_width(width: int, heads: int) -> None:
    """Check the width of a decoder.

    Raises:
        ValueError: If `width` is not a multiple of `heads`, as attention needs, and of 4, as sine-cosine positions need.
    """
    if width % heads:
        raise ValueError(f"a decoder of width {width} is not a multiple of its {heads} attention heads")
    if width % 4:
        raise ValueError(f"a decoder of width {width} is not a multiple of 4, which sine-cosine positions need")


def check_decoder_depth(
    depth: int, *, drops: bool = False, attention: Literal["self", "cross"] = "self", shared: bool = False
) -> None:
    """Check what a linear decoder, one without blocks, cannot do.

    Args:
        depth: Number of transformer blocks.
        drops: Whether the encoder drops hidden tokens.
        attention: Kind of attention in the blocks.
        shared: Whether taps share the blocks.

    Raises:
        ValueError: If `depth` is 0 and hidden tokens are missing, cross-attention is wanted, or blocks are shared.
    """
    if depth:
        return
    if drops:
        raise ValueError("a linear decoder predicts from tokens of hidden patches, which this encoder drops")
    if attention == "cross":
        raise ValueError("a linear decoder has no attention")
    if shared:
        raise ValueError("a linear decoder has no blocks that taps could share")
