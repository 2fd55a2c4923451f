"""Stanford Dogs as the authors train it: 120 breeds, ViT-B/16 at 448 pixels.

    torchrun --nproc_per_node 4 recipes/dogs.py --data_root DIR --pretrained_dir ViT-B_16.npz

Resize to 600, random crop of 448, flip, colour jitter 0.4; 24 tokens of each layer, 265 in the last block; 40 epochs.
The authors print this command with `--dataset CUB`, which trains on birds; the set is `dog`.
DIR holds Images/, Annotation/, train_list.mat, test_list.mat;
`ffvt doctor --dataset dog --data_root DIR` checks it. ViT-B_16.npz is Google's, pretrained on ImageNet-21k.
Any flag of `ffvt train` may follow, and overrides the recipe's. `ffvt train --recipe dogs` does the same.

Hardware: the authors used 4 GPUs with 4 images each. Time: not yet measured on a GPU.
Accuracy: 91.5 % reported in the paper (Wang, Yu, Gao; BMVC 2021; arXiv 2107.02341). Not reproduced here.
"""

import sys

from ffvt.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", "--recipe", "dogs", *sys.argv[1:]]))
