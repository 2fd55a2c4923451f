"""A screen of criteria on photographs: the backbone is frozen, the last block, norm and head are trained on its tokens.

The tokens of every selecting block and what each criterion picks of them are computed once and kept in a folder; a run
then costs one block an image.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ffvt
from ffvt import criteria
from ffvt.data.datasets import ImageSet, open_split
from ffvt.data.sampling import EvaluationView
from ffvt.data.transforms import normalize
from ffvt.model.ffvt import FFVT
from ffvt.train.optim import make_optimizer, make_scheduler

SPLITS = ("train", "val")
SIDE, RESIZED, NUM_SELECT = 112, 128, 12
BATCH, EPOCHS, WARMUP, RATE = 32, 6, 30, 0.02
CHUNK = 64  # images at a time through the frozen blocks


@dataclass(frozen=True)
class Screen:
    """What every run needs.

    Attributes:
        cache: folder of the tokens and picks that `prepare` wrote.
        weights: of the model, a file.
        num_classes: classes.
        images: of the training and the validation split.
        steps: of training.
    """

    cache: Path
    weights: Path
    num_classes: int
    images: tuple[int, int]
    steps: int

    def __str__(self) -> str:
        return (
            f"Photographs at {SIDE} px, {self.images[0]} for training and {self.images[1]} for validation, "
            f"{self.num_classes} classes; ViT-S/14 with frozen blocks, the last trained for {self.steps} steps of "
            f"{BATCH}, SGD {RATE}; K {NUM_SELECT}, first_candidate 1"
        )

    def run(self, name: str, seed: int) -> dict[str, Any]:
        """Trains on one criterion's picks, or as the plain ViT on all tokens of the last frozen block: the accuracy."""
        torch.set_num_threads(1)
        began = time.perf_counter()
        (images, labels), (held_out, answers) = (self._inputs(split, name) for split in SPLITS)
        model = make_model(self.weights, self.num_classes)
        parts = nn.ModuleDict({"last_block": model.last_block, "norm": model.norm, "head": model.head}).train()
        optimizer = make_optimizer("sgd", parts, RATE, 0.0)
        scheduler = make_scheduler(optimizer, "cosine", min(WARMUP, self.steps // 4), self.steps)
        order = _order(len(labels), self.steps * BATCH, seed)
        for batch in order.split(BATCH):
            loss = F.cross_entropy(_classify(parts, images[batch]), labels[batch])
            loss.backward()
            nn.utils.clip_grad_norm_(parts.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        with torch.no_grad():
            found = torch.cat([_classify(parts.eval(), some) for some in held_out.split(CHUNK)])
        right = (found.argmax(1) == answers).double().mean().item()
        seconds = round(time.perf_counter() - began, 1)
        return {"accuracy": right, "images": len(answers), "hit_rate": None, "seconds": seconds}

    def _inputs(self, split: str, name: str) -> tuple[Tensor, Tensor]:
        """What the last block sees of every image, (M, T, C) fp16, and the labels (M,)."""
        kept = torch.load(self.cache / f"{split}.pt", mmap=True)
        tokens = kept["tokens"]  # (M, L-1, N, C)
        if name not in kept["picks"]:
            return tokens[:, -1].clone(), kept["labels"]
        index = kept["picks"][name].unsqueeze(-1).expand(-1, -1, -1, tokens.shape[-1])  # (M, L-1, K, C)
        return torch.cat([tokens[:, -1, :1], tokens.gather(2, index).flatten(1, 2)], dim=1), kept["labels"]


def _order(count: int, drawn: int, seed: int) -> Tensor:
    """So many indices of images: one permutation after the other."""
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([torch.randperm(count, generator=generator) for _ in range(-(-drawn // count))])[:drawn]


def _classify(parts: nn.ModuleDict, tokens: Tensor) -> Tensor:
    """Tokens (B, T, C) -> logits (B, classes)."""
    return parts["head"](parts["norm"](parts["last_block"](tokens.float())[:, 0]))


def make_model(weights: Path, num_classes: int) -> FFVT:
    """A pretrained model whose blocks leave behind what every criterion reads; its head is zero."""
    fields = {"image_size": SIDE, "num_classes": num_classes, "num_select": NUM_SELECT, "dropout": 0.0}
    model = ffvt.create_model("vit_s14", **fields, first_candidate=1, criterion="class_row")
    ffvt.load_weights(model, weights, last_block="pretrained")
    return model


def prepare(photographs: Path, weights: Path, cache: Path, names: Sequence[str], steps: int | None) -> Screen:
    """The screen of these photographs; computes what the folder `cache` does not hold of them yet."""
    splits = [
        open_split("imagefolder", split, SIDE, RESIZED, data_root=str(photographs), fit="crop") for split in SPLITS
    ]
    num_classes, counts = len(splits[0].classes), tuple(len(images) for images in splits)
    wanted = {"photographs": str(photographs.resolve()), "weights": str(weights.resolve()), "images": list(counts)}
    facts = cache / "facts.json"
    known = [*criteria.names(), *(name for name in names if ":" in name)]
    kept = json.loads(facts.read_text()) if facts.exists() else {}
    if {**kept, "names": None} != {**wanted, "names": None} or not set(known) <= set(kept["names"]):
        cache.mkdir(parents=True, exist_ok=True)
        facts.unlink(missing_ok=True)
        model = make_model(weights, num_classes).eval()
        for split, images in zip(SPLITS, splits):
            torch.save(observe(model, images, known), cache / f"{split}.pt")
        facts.write_text(json.dumps({**wanted, "names": known}))
    return Screen(cache, weights, num_classes, counts, steps or round(EPOCHS * counts[0] / BATCH))


@torch.no_grad()
def observe(model: FFVT, images: ImageSet, names: Sequence[str]) -> dict[str, Any]:
    """The tokens of every selecting block, what each criterion picks there, and the labels."""
    view, blocks = EvaluationView(images, SIDE), len(model.blocks)
    tokens = torch.empty(len(view), blocks, model.config.num_tokens, model.config.embed_dim, dtype=torch.float16)
    picks = {name: torch.empty(len(view), blocks, NUM_SELECT, dtype=torch.int64) for name in names}
    for start in range(0, len(view), CHUNK):
        place = slice(start, min(start + CHUNK, len(view)))
        x = model.embed(normalize(torch.stack([view[i].image for i in range(place.start, place.stop)])))
        layers = []
        for number, block in enumerate(model.blocks):
            x, layer = block(x)
            layers.append(layer._replace(tokens=x, number=number))
            tokens[place, number] = x
            for name in names:
                picks[name][place, number] = criteria.pick(criteria.find(name)(layers), NUM_SELECT, 1)
        print(f"{place.stop} of {len(view)} photographs seen")
    return {"tokens": tokens, "picks": picks, "labels": torch.tensor(images.labels)}
