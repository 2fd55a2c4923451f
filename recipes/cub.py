"""CUB-200-2011 as the authors train it: 200 kinds of birds, ViT-B/16 at 448 pixels.

    torchrun --nproc_per_node 4 recipes/cub.py --data_root DIR --pretrained_dir ViT-B_16.npz

Resize to 600, random crop of 448, flip, colour jitter 0.4; 12 tokens of each layer, 133 in the last block; about 53
epochs.
DIR holds CUB_200_2011/ (images/, images.txt, image_class_labels.txt, train_test_split.txt);
`ffvt doctor --dataset CUB --data_root DIR` checks it. ViT-B_16.npz is Google's, pretrained on ImageNet-21k.
Any flag of `ffvt train` may follow, and overrides the recipe's. `ffvt train --recipe cub` does the same.

Hardware: the authors used 4 GPUs with 8 images each. Time: not yet measured on a GPU.
Accuracy: 91.6 % reported in the paper (Wang, Yu, Gao; BMVC 2021; arXiv 2107.02341). Not reproduced here.
"""

import sys

from ffvt.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", "--recipe", "cub", *sys.argv[1:]]))
