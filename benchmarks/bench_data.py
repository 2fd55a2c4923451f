"""The input pipeline: cached pictures and batched transforms beside the authors' chain in a DataLoader.

    python -m benchmarks.bench_data [--data_root DIR] [--side 448] [--augment NAME ...] [--rounds 10] [--quick]

The CUB recipe (resize to 600, crop of 448, jitter 0.4, flip, normalise) on JPEG files of 500 x 375 pixels: the pictures
below DIR, resized to that, or else drawn with the spectrum of photographs. One process on one core, one thread, no
workers, batches of 16, interleaved epochs. Both give fp32 batches. The cost of building the cache is a line of its own.
--side N crops at N pixels, and resizes in proportion. --augment adds rows of our cached pictures under other recipes.
--quick runs one batch once; it writes only where --out says.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from benchmarks.harness import Case, measure, require_close, save, speedups, stamp
from benchmarks.timing_tables import render
from ffvt.data.datasets import CachedPictures, PictureFiles
from ffvt.data.layout_readers import Listing
from ffvt.data.mixing import Mixing
from ffvt.data.own_readers import PICTURE_SUFFIXES
from ffvt.data.sampling import EvaluationView, StepSampler, TrainingView, batch_as_it_is
from ffvt.data.transforms import AUGMENTATIONS, PLAIN, RECIPES, Recipe, augmented, normalize
from ffvt.train.step import Preparation

SIZE, SIDE, ROOM = (500, 375), 448, 600 / 448  # ROOM: side that is resized to, of one that is cropped to
BATCH, BATCHES = 16, 4
RECIPE = RECIPES["CUB"]
AUGMENTED = {name: (augmented(PLAIN, name), None) for name in AUGMENTATIONS} | {
    "resized crop": (Recipe(resized_crop=0.08), None),
    "erasing": (Recipe(erasing=1.0), None),
    "mixup": (PLAIN, Mixing(0.2, 0.0, 200)),
    "cutmix": (PLAIN, Mixing(0.0, 1.0, 200)),
}
AUTHORS, OURS, UNCACHED = "authors' chain", "ours, cached", "ours, decoding each time"


class AuthorsPictures(Dataset):
    """The pictures under the authors' chain, as their CUB loader has it, read from files."""

    def __init__(self, paths: list[Path], side: int) -> None:
        self.paths, resized = paths, round(side * ROOM)
        self.chain = transforms.Compose(
            [
                transforms.Resize((resized, resized), transforms.InterpolationMode.BILINEAR),
                transforms.RandomCrop((side, side)),
                transforms.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(RECIPE.mean, RECIPE.std),
            ]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        with Image.open(self.paths[index]) as image:
            return self.chain(image.convert("RGB")), 0


def write_pictures(folder: Path, count: int, data_root: str) -> list[Path]:
    """JPEG files of 500 x 375 pixels: of the pictures below data_root, or drawn."""
    found = sorted(path for path in Path(data_root).rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES)
    sources = found[:: max(1, len(found) // count)][:count] if data_root else [None] * count
    if len(sources) < count:
        raise ValueError(f"bench_data: data_root must have at least {count} pictures; got {len(sources)}")
    paths = [folder / f"{number:04}.jpg" for number in range(count)]
    for number, (source, path) in enumerate(zip(sources, paths)):
        image = _drawn(number) if source is None else Image.open(source).convert("RGB").resize(SIZE)
        image.save(path, quality=90)
    return paths


def _drawn(seed: int) -> Image.Image:
    """Noise whose amplitudes fall with the frequency, as those of photographs do."""
    width, height = SIZE
    draw = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    spectrum = np.fft.rfft2(draw.standard_normal((3, height, width))) / np.maximum(frequency, 1 / width)
    pixels = np.fft.irfft2(spectrum, (height, width))
    pixels = 128 + 50 * (pixels - pixels.mean()) / pixels.std()
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


def authors_epoch(paths: list[Path], side: int):
    loader = DataLoader(AuthorsPictures(paths, side), BATCH, shuffle=True)

    def epoch() -> None:
        for _images, _labels in loader:
            pass

    return epoch


def our_epoch(pictures: Dataset, side: int, recipe: Recipe = RECIPE, mixing: Mixing | None = None):
    view = TrainingView(pictures, side, 0, recipe)
    sampler = StepSampler(len(view), BATCH, len(view) // BATCH, 0)
    loader = DataLoader(view, batch_sampler=sampler, collate_fn=batch_as_it_is)

    prepare = Preparation(recipe, mixing)

    def epoch() -> None:
        for batch in loader:
            prepare.mix(prepare(batch.image, batch.jitter, batch.erased), batch.label, seed=0)

    return epoch


def require_same_pictures(paths: list[Path], pictures: Dataset, side: int) -> None:
    """Gate: without the random part, both chains give the same values."""
    authors = AuthorsPictures(paths, side).chain.transforms
    chain = transforms.Compose([*authors[:1], transforms.CenterCrop(side), *authors[4:]])
    for index in (0, len(paths) - 1):
        with Image.open(paths[index]) as image:
            expected = chain(image.convert("RGB"))
        found = normalize(EvaluationView(pictures, side, RECIPE)[index].image[None], RECIPE)[0]
        require_close("picture", found, expected, 1e-5)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, appends the lines and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_root", default="")
    parser.add_argument("--side", type=int, default=SIDE)
    parser.add_argument(
        "--augment", nargs="*", choices=AUGMENTED, default=[], metavar="NAME", help=", ".join(AUGMENTED)
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, help="JSON lines to append to; benchmarks/results/data.jsonl")
    parser.add_argument("--quick", action="store_true", help="one batch once; writes only where --out says")
    arguments = parser.parse_args(argv)
    side, (batches, rounds) = arguments.side, (1, 1) if arguments.quick else (BATCHES, arguments.rounds)
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[-1]})
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        paths = write_pictures(Path(name), BATCH * batches, arguments.data_root)
        files = PictureFiles(Listing(["all"], paths, [0] * len(paths)), round(side * ROOM))
        started = time.perf_counter()
        cached = CachedPictures(files, Path(name) / "cache", 1)
        build_ms = (time.perf_counter() - started) * 1e3
        cases = [
            Case(AUTHORS, partial(authors_epoch, paths, side)),
            Case(OURS, partial(our_epoch, cached, side)),
            Case(UNCACHED, partial(our_epoch, files, side)),
            *(
                Case(f"{OURS}, {name}", partial(our_epoch, cached, side, *AUGMENTED[name]))
                for name in arguments.augment
            ),
        ]
        timings = measure(cases, rounds, 1, "cpu", gate=partial(require_same_pictures, paths, cached, side))
    source = "photographs" if arguments.data_root else "drawn pictures"
    records = _records(timings, build_ms, len(paths), side, source)
    save(records, arguments, "data.jsonl")
    print(render(records))
    for record in records:
        print(f"{record['case']}: {record['images_per_second']:.0f} images/s on one core")
    print(f"building the cache: {build_ms / len(paths):.1f} ms a picture, once")


def _recipe_of(case: str, sizes: str) -> str:
    augmentation = case.removeprefix(f"{OURS}, ")
    return f"CUB, {sizes}, jitter 0.4" if augmentation == case else f"{sizes}, {augmentation}"


def _records(timings, build_ms: float, count: int, side: int, source: str) -> list[dict]:
    shared = {**stamp("data", "cpu"), "mode": f"{count} pictures", "dtype": "uint8 to fp32"}
    sizes, files = f"{round(side * ROOM)} to {side}", {"files": f"JPEG 500 x 375, {source}", "batch": BATCH}
    ratios = speedups(timings, AUTHORS)
    return [
        {
            **shared,
            "case": case,
            "parameters": {"recipe": _recipe_of(case, sizes), **files},
            "time_ms": timing.to_dict(),
            "speedup": {AUTHORS: ratios[case]},
            "images_per_second": round(count / timing.median * 1e3, 1),
            "cache_build_ms_per_picture": round(build_ms / count, 2),
            "peak_memory_bytes": None,
        }
        for case, timing in timings.items()
    ]


if __name__ == "__main__":
    main()
