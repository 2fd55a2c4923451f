"""Flags that hold no sense: each refused in one line that names the flag and the value, with status 2, or 1 later."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from functools import partial
from pathlib import Path

from ffvt.cli import main
from ffvt.exits import ERROR, USAGE
from tests.hostile.case import Case

LONGEST = 620  # letters of the line
BIRDS = "--dataset partbirds --preset easy --img_size 64 --resize_size 64 --model_type vit_s16 --workers 0 --device cpu"

# command line, what the line must name
USAGE_CASES = (
    ("", "COMMAND"),
    ("trian", "trian"),
    ("train extra", "extra"),
    ("train --no_such_flag 1", "--no_such_flag"),
    ("train --train_batch_size 0", "train_batch_size=0"),
    ("train --train_batch_size -8", "train_batch_size=-8"),
    ("train --train_batch_size 8.5", "8.5"),
    ("train --train_batch_size 1e3", "1e3"),
    ("train --train_batch_size eight", "eight"),
    ("train --train_batch_size", "--train_batch_size"),
    ("train --train_batch_size 6 --gradient_accumulation_steps 4", "train_batch_size=6"),
    ("train --gradient_accumulation_steps 0", "gradient_accumulation_steps=0"),
    ("train --eval_batch_size 0", "eval_batch_size=0"),
    ("train --num_steps 0", "num_steps=0"),
    ("train --num_steps -1", "num_steps=-1"),
    ("train --num_steps 10k", "10k"),
    ("train --warmup_steps -1", "warmup_steps=-1"),
    ("train --eval_every 0", "eval_every=0"),
    ("train --save_every 0", "save_every=0"),
    ("train --log_every 0", "log_every=0"),
    ("train --learning_rate 0", "learning_rate=0.0"),
    ("train --learning_rate -0.1", "learning_rate=-0.1"),
    ("train --learning_rate nan", "learning_rate=nan"),
    ("train --learning_rate inf", "learning_rate=inf"),
    ("train --learning_rate 1,0", "1,0"),
    ("train --weight_decay -1", "weight_decay=-1.0"),
    ("train --weight_decay nan", "weight_decay=nan"),
    ("train --layer_decay 0", "layer_decay=0.0"),
    ("train --layer_decay 1.5", "layer_decay=1.5"),
    ("train --max_grad_norm -1", "max_grad_norm=-1.0"),
    ("train --max_grad_norm inf", "max_grad_norm=inf"),
    ("train --smoothing_value 1", "smoothing_value=1.0"),
    ("train --smoothing_value -0.1", "smoothing_value=-0.1"),
    ("train --ema_decay 1", "ema_decay=1.0"),
    ("train --ema_decay nan", "ema_decay=nan"),
    ("train --val_split 1", "val_split=1.0"),
    ("train --val_split -0.1", "val_split=-0.1"),
    ("train --workers -1", "workers=-1"),
    ("train --prefetch 0", "prefetch=0"),
    ("train --max_skipped_steps -1", "max_skipped_steps=-1"),
    ("train --loss_scale -1", "loss_scale=-1.0"),
    ("train --rendezvous_timeout 0", "rendezvous_timeout=0.0"),
    ("train --rendezvous_timeout nan", "rendezvous_timeout=nan"),
    ("train --rendezvous_timeout soon", "soon"),
    ("train --optimizer lamb", "lamb"),
    ("train --decay_type step", "step"),
    ("train --precision fp8", "fp8"),
    ("train --device tpu", "tpu"),
    ("train --last_block maybe", "maybe"),
    ("train --dataset imagenet", "imagenet"),
    ("train --model_type resnet50", "resnet50"),
    ("train --model_type ''", "got model_type=''"),
    ("train --recipe nothing", "nothing"),
    ("train --fp16 --precision bf16", "precision='bf16'"),
    ("train --fp16 --precision auto", "precision='auto'"),
    ("train --fsdp --fp16", "fsdp"),
    ("train --fsdp --ema_decay 0.9", "ema_decay=0.9"),
    ("train --fsdp --compile", "compile=True"),
    ("train --resume auto --overwrite", "overwrite=True"),
    ("train --name ''", "name=''"),
    ("train --name ..", "name='..'"),
    ("train --name a/../../b", "name='a/../../b'"),
    ("train --name /elsewhere", "name='/elsewhere'"),
    ("train --feature_fusion=yes", "--feature_fusion"),
    ("train --seed x", "--seed"),
    ("train --img_size 64px", "64px"),
    ("train --criterion \x1b[2J", "criterion="),
    (f"train --criterion {'x' * 100_000}", "criterion="),
    ("train --head linear", "linear"),
    ("train --keep_rate nan", "keep_rate=nan"),
    ("train --keep_rate 0", "keep_rate=0.0"),
    ("train --keep_rate 0.5 --head transfg", "keep_rate=0.5"),
    ("train --locations 3,6,9", "3,6,9"),
    ("train --locations", "--locations"),
    ("train --patch_stride 0", "patch_stride=0"),
    ("train --images_per_class -1", "images_per_class=-1"),
    ("train --images_per_class 3", "train_batch_size=8"),
    ("train --contrastive --mixup 0.2", "contrastive=True"),
    ("evaluate", "--checkpoint"),
    ("evaluate --checkpoint x --precision int8", "int8"),
    ("evaluate --checkpoint x --precision auto", "auto"),
    ("evaluate --checkpoint x --batch_size many", "many"),
    ("predict", "--checkpoint"),
    ("predict --checkpoint x --top many y.jpg", "--top"),
    ("plot", "RUN"),
    ("doctor", "--dataset"),
    ("doctor --dataset cub --threads many", "many"),
    ("plan --tflops fast", "fast"),
    ("train --train_batch_size 0 --name \x1b[2J", "train_batch_size=0"),
    ("train --optimizer \x1b]0;owned\x07", "owned"),
    (f"train --optimizer {'x' * 100_000}", "--optimizer"),
    (f"train --{'y' * 100_000} 1", "unrecognized"),
)

# the same where only the run itself finds out
ERROR_CASES = (
    ("train --dataset imagefolder --data_root nowhere", "nowhere"),
    ("train --dataset CUB --data_root nowhere", "nowhere"),
    (f"train {BIRDS} --img_size 100", "image_size=100"),
    (f"train {BIRDS} --preset odd", "preset='odd'"),
    (f"train {BIRDS} --feature_fusion --num_token 0", "num_select=0"),
    (f"train {BIRDS} --feature_fusion --num_token 5000", "num_select=5000"),
    (f"train {BIRDS} --feature_fusion --depth 0", "depth=0"),
    (f"train {BIRDS} --feature_fusion --criterion best", "'best'"),
    (f"train {BIRDS} --feature_fusion --criterion \x1b[2J", "criterion must be one of"),
    (f"train {BIRDS} --feature_fusion --criterion vote:0", "votes=0"),
    (f"train {BIRDS} --feature_fusion --criterion random:{'9' * 50}", "criterion must be one of"),
    (f"train {BIRDS} --keep_rate 0.5 --locations {2**70}", "locations"),
    (f"train {BIRDS} --keep_rate 0.5 --locations 2 1", "locations"),
    (f"train {BIRDS} --patch_stride 1000", "patch_stride=1000"),
    (f"train {BIRDS} --images_per_class 1 --train_batch_size 100", "images_per_class=1"),
    (f"train {BIRDS} --embed_dim 33", "embed_dim=33"),
    (f"train {BIRDS} --patch_size 7", "patch_size=7"),
    (f"train {BIRDS} --dropout 1.5", "dropout=1.5"),
    (f"train {BIRDS} --feature_fusion --first_candidate -1", "first_candidate=-1"),
    (f"train {BIRDS} --eval_split nowhere", "nowhere"),
    (f"train {BIRDS} --pretrained_dir missing.npz", "missing.npz"),
    (f"train {BIRDS} --resume nowhere", "resume='nowhere'"),
    (f"train {BIRDS} --fsdp", "fsdp"),
    (f"train {BIRDS} --device cuda", "device='cuda'"),
    ("evaluate --checkpoint nowhere", "nowhere"),
    ("predict --checkpoint nowhere x.jpg", "nowhere"),
    ("visualize --checkpoint nowhere x.jpg", "nowhere"),
    ("plot nowhere", "nowhere"),
    ("plan --memory lots", "memory='lots'"),
    ("doctor --dataset imagefolder --data_root nowhere --extract missing.tar", "missing.tar"),
    ("doctor --dataset partbirds", "partbirds"),
)


def refused(line: str, named: str, status: int, folder: Path) -> None:
    """Runs a command line in this process; it must end with this status after one line that names the value."""
    arguments = [word.strip("'") if word in ("''",) else word for word in line.split(" ") if word]
    err = io.StringIO()
    with contextlib.chdir(folder) if hasattr(contextlib, "chdir") else contextlib.nullcontext():
        found = _status(lambda: main(arguments), err)
    said = err.getvalue().strip().splitlines()
    assert found == status, f"status {found}; said: {said[-3:]}"
    assert said, "nothing was said"
    assert status == ERROR or len(said) == 1, f"{len(said)} lines: {said[:3]}"
    assert said[-1].startswith("ffvt"), said[-1]
    assert named in said[-1], said[-1][:300]
    assert said[-1].isprintable(), repr(said[-1][:300])
    assert len(said[-1]) <= LONGEST, f"{len(said[-1])} letters"
    assert status == ERROR or "--help)" in said[-1], said[-1]


def _status(command: Callable[[], int], err: io.StringIO) -> int:
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        try:
            return command()
        except SystemExit as stop:
            return stop.code


def _cases(lines: tuple[tuple[str, str], ...], status: int) -> list[Case]:
    return [
        Case(
            "flags",
            f"ffvt {line.replace(BIRDS, '(birds)')[:70]!r}",
            partial(refused, line, named, status),
            refusal=None,
        )
        for line, named in lines
    ]


CASES = _cases(USAGE_CASES, USAGE) + _cases(ERROR_CASES, ERROR)
