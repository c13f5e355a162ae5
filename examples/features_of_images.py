"""Features of your own images with a pretrained encoder, and the most similar images.

The encoder is a run, a checkpoint, or a folder that `wavemim export` wrote:

    wavemim demo out=wavemim-demo
    python examples/features_of_images.py wavemim-demo/runs/demo photos/*.jpg --out features.npz
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

import wavemim


def main() -> None:
    """Compute the features, name each image's nearest neighbour, and save them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoder", help="a run's folder, a checkpoint's, or an exported encoder's")
    parser.add_argument("images", nargs="+", type=Path, help="image files, of any sizes")
    parser.add_argument("--out", type=Path, help="write names and features to this .npz file")
    arguments = parser.parse_args()

    encoder = wavemim.load_encoder(arguments.encoder)
    if torch.cuda.is_available():
        encoder.to("cuda")
    features = encoder.features(arguments.images)
    print(f"{len(features)} images → {features.shape[1]} features each, seen at {encoder.image_size} px")

    if len(features) > 2:  # of two images, the mean lies halfway: there is nothing to compare
        directions = torch.nn.functional.normalize(features - features.mean(0), dim=1)
        similarity = (directions @ directions.T).fill_diagonal_(-1)
        width = max(len(path.name) for path in arguments.images)
        print(f"{'image':{width}}  {'most alike':{width}}  cosine")
        for path, (cosine, nearest) in zip(arguments.images, zip(*similarity.max(1), strict=True), strict=True):
            print(f"{path.name:{width}}  {arguments.images[int(nearest)].name:{width}}  {float(cosine):6.3f}")

    if arguments.out:
        np.savez(arguments.out, names=[str(path) for path in arguments.images], features=features.numpy())
        print(f"saved to {arguments.out}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
