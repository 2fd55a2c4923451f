"""CUB-200-2011 as the authors train it: 200 kinds of birds, ViT-B/16 at 448 pixels.

    torchrun --nproc_per_node 4 recipes/cub.py --data_root DIR --pretrained_dir ViT-B_16.npz

Resize to 600, random crop of 448, flip, colour jitter 0.4; 12 tokens of each layer, 133 in the last block; about 53
epochs.
DIR holds CUB_200_2011/ (images/, images.txt, image_class_labels.txt, train_test_split.txt);
`ffvt doctor --dataset CUB --data_root DIR` checks it. ViT-B_16.npz is Google's, pretrained on ImageNet-21k.
Any flag of `python -m ffvt.train` may follow, and replaces the recipe's.

Hardware: the authors used 4 GPUs with 8 images each. Time: not yet measured on a GPU.
Accuracy: 91.6 % reported in the paper (Wang, Yu, Gao; BMVC 2021; arXiv 2107.02341). Not reproduced here.
"""

import sys

from ffvt.train.__main__ import main

FLAGS = """
--name cub --dataset CUB --model_type ViT-B_16 --img_size 448 --resize_size 600 --train_batch_size 8
--learning_rate 0.02 --num_steps 10000 --fp16 --eval_every 200 --feature_fusion --cache_dir cache
"""

if __name__ == "__main__":
    sys.exit(main([*FLAGS.split(), *sys.argv[1:]], prog="recipes/cub.py"))
