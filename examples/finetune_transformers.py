"""Fine-tunes a ViT of transformers as an FFVT, with transformers' own Trainer.

Runs on a CPU in half a minute: the weights are random and the images are drawn, so that nothing is downloaded. For a
real model, take `AutoModel.from_pretrained("facebook/dinov2-small")` and a data set of your own.

    pip install 'ffvt[hf]'
    python examples/finetune_transformers.py
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Dinov2Config, Dinov2Model, Trainer, TrainingArguments

import ffvt

SIDE, PATCH, CLASSES = 56, 14, 4  # pixels, pixels, classes


class Dots(Dataset):
    """Noise with one bright patch; its colour is the class."""

    COLOURS = torch.tensor([[3.0, 0.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 3.0], [2.0, 2.0, 0.0]])

    def __init__(self, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.randint(CLASSES, (count,), generator=generator)
        self.images = 0.3 * torch.randn(count, 3, SIDE, SIDE, generator=generator)
        corners = PATCH * torch.randint(SIDE // PATCH, (count, 2), generator=generator)
        for image, label, (top, left) in zip(self.images, self.labels, corners.tolist()):
            image[:, top : top + PATCH, left : left + PATCH] += self.COLOURS[label].view(3, 1, 1)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        return {"pixel_values": self.images[number], "labels": self.labels[number]}


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main(steps: int = 150) -> dict[str, float]:
    """Trains, evaluates, and returns what the Trainer measured."""
    torch.manual_seed(0)
    vit = Dinov2Model(
        Dinov2Config(hidden_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=SIDE, patch_size=PATCH)
    )
    model = ffvt.add_feature_fusion(vit, num_select=4, num_classes=CLASSES, first_candidate=1)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=16,
            learning_rate=2e-3,
            report_to=[],
            logging_steps=50,
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(
            model, arguments, train_dataset=Dots(512, 0), eval_dataset=Dots(128, 1), compute_metrics=accuracy
        )
        trainer.train()
        return trainer.evaluate()


if __name__ == "__main__":
    measured = main()
    print(f"accuracy on images not seen: {measured['eval_accuracy']:.0%}")
