"""Invalid configurations: one line says what is wrong before anything is written."""

from dataclasses import replace

import pytest
from lamabench.baselines.dit import DiTConfig
from lamabench.harness.config import CUDA_GRAPHS, Config, DataConfig, RunConfig, SampleConfig, TrainConfig, check_fit
from lamabench.kernels.errors import InputError
from lamabench.models.registry import preset

DIT = DiTConfig(input_size=8, in_channels=1, num_classes=10, patch_size=2, hidden_size=16, depth=1, num_heads=2)
ADM = replace(preset("unet_nano").config, input_size=8)


def make(model=DIT, **settings):
    data = DataConfig(kind="digits", size=8, channels=1, num_classes=10)
    return Config(model=model, data=data, train=TrainConfig(batch_size=4, **settings))


BAD = [
    (make(replace(DIT, input_size=16)), "model.input_size 16 does not fit data.size 8"),
    (make(replace(DIT, num_classes=3)), "model.num_classes 3 does not fit data.num_classes 10"),
    (make(replace(ADM, null_class=False)), "train.class_dropout 0.1 needs a null class"),
    (
        replace(make(replace(ADM, null_class=False), class_dropout=0.0), sample=SampleConfig(guidance=2.0)),
        "sample.guidance 2.0 needs a null class",
    ),
    (
        replace(make(), sample=SampleConfig(guidance_channels=3)),
        "sample.guidance_channels 3 is more than the model's 1",
    ),
    *[
        (
            replace(make(compile=kind), run=RunConfig(micro_batch=2)),
            f"run.micro_batch sums gradients .*train.compile={kind} .*: choose train.compile=compile, or "
            "run.micro_batch=null",
        )
        for kind in CUDA_GRAPHS
    ],
]


@pytest.mark.parametrize(("config", "message"), BAD)
def test_model_and_data_must_fit(config, message):
    with pytest.raises(InputError, match=message):
        check_fit(config)


def test_float16_is_refused_with_the_reason():
    with pytest.raises(InputError, match=r"train\.precision=float16 .*65504.*no loss scaling.*float32, bfloat16$"):
        TrainConfig(precision="float16")
    with pytest.raises(InputError, match=r"unknown train\.precision 'fp16'; choices: float32, bfloat16"):
        TrainConfig(precision="fp16")
