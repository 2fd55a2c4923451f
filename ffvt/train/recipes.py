"""Training recipes by name: the flags of `ffvt train --recipe NAME`, and what is known of where they lead."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainingRecipe:
    """One recipe.

    Attributes:
        flags: training flags, as on a command line.
        known: the data set, and the accuracy with its source.
    """

    flags: str
    known: str


# What the recipes of TransFG share, by its authors' code, where its paper (section 4.1) says the same or nothing.
_TRANSFG = (
    "--model_type ViT-B_16 --head transfg --patch_stride 12 --contrastive --train_batch_size 16 --num_steps 10000 "
    "--precision fp16 --eval_every 100 --eval_batch_size 8"
)
_AT_448 = "--img_size 448 --resize_size 600 --cache_dir cache"

RECIPES = {
    "finetune": TrainingRecipe(
        "--name finetune --dataset imagefolder --feature_fusion --last_block pretrained --first_candidate 1 "
        "--dropout 0 --train_batch_size 32 --learning_rate 0.02 --epochs 7 --warmup_epochs 0.4 --eval_epochs 1 "
        "--val_split 0.1 --cache_dir cache",
        "images of your own, from pretrained weights",
    ),
    "cub": TrainingRecipe(
        "--name cub --dataset CUB --model_type ViT-B_16 --img_size 448 --resize_size 600 --train_batch_size 8 "
        "--learning_rate 0.02 --num_steps 10000 --precision fp16 --eval_every 200 --feature_fusion --cache_dir cache",
        "CUB-200-2011, 91.6 % in the paper",
    ),
    "dogs": TrainingRecipe(
        "--name dogs --dataset dog --model_type ViT-B_16 --img_size 448 --resize_size 600 --train_batch_size 4 "
        "--learning_rate 3e-3 --num_steps 30000 --precision fp16 --eval_every 300 --feature_fusion --decay_type linear "
        "--num_token 24 --cache_dir cache",
        "Stanford Dogs, 91.5 % in the paper",
    ),
    "cotton": TrainingRecipe(
        "--name cotton --dataset cotton --model_type ViT-B_16 --img_size 384 --resize_size 500 --train_batch_size 8 "
        "--learning_rate 0.02 --num_steps 2000 --precision fp16 --eval_every 16 --feature_fusion --cache_dir cache",
        "Cotton80",
    ),
    "soyloc": TrainingRecipe(
        "--name soyloc --dataset soyloc --model_type ViT-B_16 --img_size 384 --resize_size 500 --train_batch_size 8 "
        "--learning_rate 0.02 --num_steps 4750 --precision fp16 --eval_every 50 --feature_fusion --cache_dir cache",
        "SoyLocal",
    ),
    "partbirds": TrainingRecipe(
        "--name partbirds --dataset partbirds --preset default --model_type vit_s16 --img_size 64 --resize_size 64 "
        "--patch_size 8 --embed_dim 96 --depth 4 --num_heads 4 --mlp_dim 192 --dropout 0 --feature_fusion "
        "--num_token 4 --first_candidate 1 --optimizer adamw --learning_rate 1e-3 --weight_decay 0.05 "
        "--train_batch_size 48 --eval_batch_size 100 --num_steps 900 --warmup_steps 100 --eval_every 150 "
        "--log_every 20 --workers 0 --seed 0",
        "drawn birds, 80.9 % here",
    ),
    "transfg_cub": TrainingRecipe(
        f"--name transfg_cub --dataset CUB --augment crop {_TRANSFG} {_AT_448} --learning_rate 0.03",
        "TransFG on CUB-200-2011, 91.7 % in its paper",
    ),
    "transfg_cars": TrainingRecipe(
        f"--name transfg_cars --dataset car {_TRANSFG} {_AT_448} --learning_rate 0.03",
        "TransFG on Stanford Cars, 94.8 % in its paper",
    ),
    "transfg_dogs": TrainingRecipe(
        f"--name transfg_dogs --dataset dog --augment crop {_TRANSFG} {_AT_448} --learning_rate 3e-3",
        "TransFG on Stanford Dogs, 92.3 % in its paper",
    ),
    "transfg_nabirds": TrainingRecipe(
        f"--name transfg_nabirds --dataset nabirds --augment crop {_TRANSFG} {_AT_448} --learning_rate 0.03",
        "TransFG on NABirds, 90.8 % in its paper",
    ),
    "transfg_inat2017": TrainingRecipe(
        f"--name transfg_inat2017 --dataset inat2017 {_TRANSFG} --img_size 304 --resize_size 400 --learning_rate 0.01",
        "TransFG on iNaturalist 2017, 71.7 % in its paper",
    ),
}
