"""iNaturalist 2017 as the authors of TransFG train it: 5,089 species, ViT-B/16 at 304 pixels, overlapping patches.

    torchrun --nproc_per_node 4 recipes/transfg_inat2017.py --data_root DIR --pretrained_dir ViT-B_16.npz

Resize to 400, random crop of 304, flip, AutoAugment's ImageNet policy; 25 x 25 patches of 16 pixels, 12 apart;
12 parts in the last block. SGD at 0.01, 10,000 steps, warm-up 500, cosine; cross-entropy without smoothing, and the
contrastive loss over the images of all processes (the authors take the pairs of each process). With 16 images on each
of 4 processes that is 1.1 epochs: 10,000 steps are their code's for every set, and may be too few for this one.
From the paper are sizes, rate, batch and margin; from the authors' code steps, warm-up, augmentation and precision.
DIR holds train_val_images/, train2017.json, val2017.json;
`ffvt doctor --dataset inat2017 --data_root DIR` checks it. ViT-B_16.npz is Google's, pretrained on ImageNet-21k.
Any flag of `ffvt train` may follow, and overrides the recipe's. `ffvt train --recipe transfg_inat2017` does the same.

Hardware: the authors used 4 GPUs. Time: not yet measured on a GPU.
Accuracy: 71.7 % reported in the paper (He et al., AAAI 2022; arXiv 2103.07976). Not reproduced here.
"""

import sys

from ffvt.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", "--recipe", "transfg_inat2017", *sys.argv[1:]]))
