"""What a run says before its first step."""

import pytest

from ffvt.train.announcement import advice, kind_of, precision_advice
from ffvt.train.options import TrainOptions


@pytest.mark.parametrize(
    ("changes", "images", "said"),
    [
        ({"num_steps": 40}, 100, "warmup_steps=500 is not below num_steps=40"),
        ({"num_steps": 500}, 100, "warmup_steps=500 is not below num_steps=500"),
        ({"optimizer": "adamw"}, 100, "learning_rate=0.03 is a rate for SGD"),
        ({"feature_fusion": True, "pretrained_dir": "w.npz"}, 2376, "2,376 images usually do better with"),
    ],
)
def test_options_that_look_like_mistakes_are_named(changes, images, said):
    (line,) = advice(TrainOptions(**changes), images)
    assert said in line


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "plain ViT (no --feature_fusion)"),
        ({"feature_fusion": True}, "FFVT, 12 tokens picked by each block"),
        ({"feature_fusion": True, "criterion": "vote:12"}, "FFVT, 12 tokens picked by each block by vote:12"),
        (
            {"head": "transfg", "patch_stride": 12, "contrastive": True},
            "TransFG, a part picked by each head, patches 12 pixels apart, contrastive loss",
        ),
        ({"keep_rate": 0.7}, "plain ViT (no --feature_fusion), 70% of the patches kept after blocks 3, 6, 9"),
    ],
)
def test_the_kind_of_model_is_told(changes, said):
    assert kind_of(TrainOptions(**changes)) == said


@pytest.mark.parametrize(
    ("changes", "images"),
    [
        ({}, 100),
        ({"optimizer": "adamw", "learning_rate": 5e-3}, 100),
        ({"feature_fusion": True, "pretrained_dir": "w.npz"}, 20_000),
        ({"feature_fusion": True, "pretrained_dir": "w.npz", "last_block": "pretrained"}, 100),
        ({"num_steps": 501}, 100),
    ],
)
def test_sound_options_get_no_advice(changes, images):
    assert advice(TrainOptions(**changes), images) == []


HALF = {"fp32": 161e9, "bf16": 84e9, "fp16": 158e9}
TWICE = {"fp32": 105e9, "bf16": 220e9, "fp16": 2e9}


@pytest.mark.parametrize(
    ("changes", "rates", "said"),
    [
        ({"precision": "bf16"}, HALF, "bf16 84, fp32 161 GFLOP/s here: --precision fp32 or auto trains faster"),
        ({"precision": "fp16"}, HALF, "fp16 158, fp32 161 GFLOP/s here: --precision fp32 or auto trains faster"),
        ({"fp16": True}, TWICE, "fp16 2, bf16 220 GFLOP/s here: --precision bf16 or auto without --fp16 trains"),
        ({}, TWICE, "fp32 105, bf16 220 GFLOP/s here: --precision bf16 or auto trains faster"),
    ],
)
def test_a_faster_precision_is_named_with_both_rates(changes, rates, said):
    (line,) = precision_advice(TrainOptions(**changes), rates, "cpu")
    assert said in line
    (line,) = precision_advice(TrainOptions(**changes), rates, "cpu", is_resumed=True)
    assert "auto" not in line


@pytest.mark.parametrize(
    ("changes", "rates", "device"),
    [
        ({}, HALF, "cpu"),
        ({"precision": "bf16"}, TWICE, "cpu"),
        ({}, {"fp32": 100, "bf16": 149, "fp16": 149}, "cpu"),
        ({}, {"fp32": 100, "bf16": 90, "fp16": 900}, "cpu"),  # auto would not take fp16 there
        ({"precision": "bf16"}, {"fp32": 100, "bf16": 100, "fp16": 900}, "cuda"),
        ({"fsdp": True}, {"fp32": 100, "bf16": 90, "fp16": 900}, "cuda"),
    ],
)
def test_a_precision_that_is_fast_enough_gets_no_advice(changes, rates, device):
    assert precision_advice(TrainOptions(**changes), rates, device) == []
