"""Stanford Dogs as the authors train it: 120 breeds, ViT-B/16 at 448 pixels.

    torchrun --nproc_per_node 4 recipes/dogs.py --data_root DIR --pretrained_dir ViT-B_16.npz

Resize to 600, random crop of 448, flip, colour jitter 0.4; 24 tokens of each layer, 265 in the last block; 40 epochs.
The authors print this command with `--dataset CUB`, which trains on birds; the set is `dog`.
DIR holds Images/, Annotation/, train_list.mat, test_list.mat;
`ffvt doctor --dataset dog --data_root DIR` checks it. ViT-B_16.npz is Google's, pretrained on ImageNet-21k.
Any flag of `python -m ffvt.train` may follow, and replaces the recipe's.

Hardware: the authors used 4 GPUs with 4 images each. Time: not yet measured on a GPU.
Accuracy: 91.5 % reported in the paper (Wang, Yu, Gao; BMVC 2021; arXiv 2107.02341). Not reproduced here.
"""

import sys

from ffvt.train.__main__ import main

FLAGS = """
--name dogs --dataset dog --model_type ViT-B_16 --img_size 448 --resize_size 600 --train_batch_size 4
--learning_rate 3e-3 --num_steps 30000 --fp16 --eval_every 300 --feature_fusion --decay_type linear --num_token 24
--cache_dir cache
"""

if __name__ == "__main__":
    sys.exit(main([*FLAGS.split(), *sys.argv[1:]], prog="recipes/dogs.py"))
