"""CUB-200-2011 as the authors of TransFG train it: 200 kinds of birds, ViT-B/16 at 448 pixels, overlapping patches.

    torchrun --nproc_per_node 4 recipes/transfg_cub.py --data_root DIR --pretrained_dir ViT-B_16.npz

Resize to 600, random crop of 448, flip; 37 x 37 patches of 16 pixels, 12 apart;
12 parts in the last block. SGD at 0.03, 10,000 steps, warm-up 500, cosine; cross-entropy without smoothing, and the
contrastive loss over the images of all processes (the authors take the pairs of each process). With 16 images on each
of 4 processes that is 107 epochs.
From the paper are sizes, rate, batch and margin; from the authors' code steps, warm-up, augmentation and precision.
DIR holds CUB_200_2011/ (images/, images.txt, image_class_labels.txt, train_test_split.txt);
`ffvt doctor --dataset CUB --data_root DIR` checks it. ViT-B_16.npz is Google's, pretrained on ImageNet-21k.
Any flag of `ffvt train` may follow, and overrides the recipe's. `ffvt train --recipe transfg_cub` does the same.

Hardware: the authors used 4 GPUs. Time: not yet measured on a GPU.
Accuracy: 91.7 % reported in the paper (He et al., AAAI 2022; arXiv 2103.07976). Not reproduced here.
"""

import sys

from ffvt.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", "--recipe", "transfg_cub", *sys.argv[1:]]))
