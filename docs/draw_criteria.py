"""Draws docs/criteria.png: one photograph and the patches that each criterion picks in it.

    python docs/draw_criteria.py PHOTO WEIGHTS [--layer 9]

WEIGHTS: of a DINOv2 ViT-S/14, a file or "timm:vit_small_patch14_dinov2.lvd142m".
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageOps

import ffvt

SIZE, PATCH, PICKS = 224, 14, 12
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the images that the weights were trained on


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("photo", type=Path)
    parser.add_argument("weights")
    parser.add_argument("--layer", type=int, default=9, help="whose picks are drawn, from 1")
    args = parser.parse_args()
    with Image.open(args.photo) as photo:
        photo = ImageOps.fit(photo.convert("RGB"), (SIZE, SIZE))
    pixels = np.asarray(photo)
    scaled = torch.from_numpy(pixels.copy()) / 255
    images = ((scaled - torch.tensor(MEAN)) / torch.tensor(DEVIATION)).permute(2, 0, 1).unsqueeze(0)
    figure = Figure(figsize=(13.2, 4.9), layout="constrained")
    grid = list(figure.subplots(2, 6).flat)
    for axes in grid:
        axes.set_axis_off()
    grid[0].imshow(pixels)
    grid[0].set_title("photograph")
    for axes, name in zip(grid[1:], ffvt.criteria.names()):
        axes.imshow(shaded(pixels, picks_of(name, args.weights, images, args.layer)))
        axes.set_title(name)
    figure.savefig(Path(__file__).parent / "criteria.png", dpi=80)


@torch.no_grad()
def picks_of(name: str, weights: str, images: torch.Tensor, layer: int) -> list[int]:
    """The tokens that a layer picks by a criterion, the class token left out."""
    sizes = {"image_size": SIZE, "num_select": PICKS, "first_candidate": 1}
    model = ffvt.create_model("vit_s14", criterion=name, prune_dead_rows=False, **sizes).eval()
    ffvt.load_weights(model, weights, last_block="pretrained")
    return model.forward_with_selection(images)[1].index[0, layer - 1].tolist()


def shaded(pixels: np.ndarray, picks: list[int]) -> np.ndarray:
    """The picture with all but the picked patches dimmed."""
    side = SIZE // PATCH
    light = np.full(side * side, 0.4)
    light[np.array(picks) - 1] = 1.0
    return (pixels * np.kron(light.reshape(side, side), np.ones((PATCH, PATCH)))[..., None]).astype(np.uint8)


if __name__ == "__main__":
    main()
