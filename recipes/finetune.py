"""Images of your own, fine-tuned from pretrained weights with the switches that serve small sets best.

    python recipes/finetune.py --data_root DIR --model_type vit_s14 --pretrained_dir WEIGHTS --img_size 224 \\
        --resize_size 256 --name mine

DIR holds train/<class>/<image> and test/<class>/<image>; `ffvt doctor --dataset imagefolder --data_root DIR` checks it.
The last block starts from the pretrained one, the class token is never picked, and there is no dropout. Seven epochs of
batches of 32; a tenth of the training images chooses the best model; decoded images are kept in ./cache.
Any flag of `ffvt train` may follow, and overrides the recipe's. `ffvt train --recipe finetune` does the same.

Hardware: any; a GPU for large images. Time: docs/tutorial.md has a run on two CPU cores.
Accuracy: depends on the images; docs/tutorial.md has one data set.
"""

import sys

from ffvt.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", "--recipe", "finetune", *sys.argv[1:]]))
