"""Compares exported files with their model on photographs: the same class, the same picks, the largest difference.

    python -m benchmarks.check_export --images DIR --weights FILE

The head is random, as what is compared is arithmetic: which of its classes is the largest, and what the layers pick.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path

import torch
from torch import Tensor

import ffvt
from ffvt.data.images import load_image
from ffvt.data.transforms import center_crop, normalize
from ffvt.export import load_exported
from ffvt.export_check import expect

SIDE, CLASSES, BATCH = 112, 81, 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", required=True, help="folder of photographs, searched for .jpg")
    parser.add_argument("--weights", required=True, help="weights of a ViT-S/14")
    parser.add_argument("--count", type=int, default=200, help="photographs (default: 200)")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = ffvt.create_model("vit_s14", image_size=SIDE, num_classes=CLASSES).eval()
    ffvt.load_weights(model, arguments.weights, last_block="pretrained")
    torch.nn.init.normal_(model.head.weight, std=0.02)
    paths = sorted(Path(arguments.images).rglob("*.jpg"))
    paths = paths[:: max(1, len(paths) // arguments.count)][: arguments.count]
    torch.set_grad_enabled(False)
    images = normalize(torch.stack([center_crop(load_image(path, 128), SIDE) for path in paths]))
    exact = copy.deepcopy(model).double()
    expected = [expect(model, exact, batch) for batch in images.split(BATCH)]
    for suffix in (".onnx", ".pt2"):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"model{suffix}"
            print(ffvt.export_model(model, path, with_selection=True).summary())
            run = load_exported(path)
            print(compared([run(batch) for batch in images.split(BATCH)], expected))


def compared(found: list[list[Tensor]], expected: list) -> str:
    """One line of counts: top-1, picks of clear layers, largest difference of the logits."""
    logits, index, _ = (torch.cat(parts) for parts in zip(*found))
    true_logits, true_index, _, clear = (torch.cat(parts) for parts in zip(*expected))
    same = logits.argmax(1) == true_logits.argmax(1)
    picks = (index.sort(-1).values == true_index.sort(-1).values).all(-1)
    difference, unclear = (logits - true_logits).abs().amax(1), clear.numel() - int(clear.sum())
    return (
        f"same top-1 {int(same.sum())}/{len(same)}; same picks in {int((picks & clear).sum())}/{int(clear.sum())} "
        f"clear layers of images, and in {int((picks & ~clear).sum())}/{unclear} unclear ones; largest difference of "
        f"the logits {float(difference.max()):.1e}, of logits up to {float(true_logits.abs().max()):.2f}"
    )


if __name__ == "__main__":
    main()
