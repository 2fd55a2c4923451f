"""SoyLocal as the authors train it: leaves of 200 cultivars, ViT-B/16 at 384 pixels.

    torchrun --nproc_per_node 4 recipes/soyloc.py --data_root DIR --pretrained_dir ViT-B_16.npz

Resize to 500, random crop of 384, flip; 12 tokens of each layer, 133 in the last block; about 250 epochs.
DIR holds anno/train.txt, anno/test.txt (lines of image and class, from 1) and images/;
`ffvt doctor --dataset soyloc --data_root DIR` checks it. ViT-B_16.npz is Google's, pretrained on ImageNet-21k.
Any flag of `ffvt train` may follow, and overrides the recipe's. `ffvt train --recipe soyloc` does the same.

Hardware: the authors used 4 GPUs with 8 images each. Time: not yet measured on a GPU.
Accuracy: no figure could be verified.
"""

import sys

from ffvt.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", "--recipe", "soyloc", *sys.argv[1:]]))
