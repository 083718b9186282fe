"""Invalid configurations: one line says what is wrong before anything is written."""

from dataclasses import replace

import pytest
from lamabench.baselines.dit import DiTConfig
from lamabench.harness.config import Config, check_fit
from lamabench.harness.sections import (
    CUDA_GRAPHS,
    BenchConfig,
    DataConfig,
    EvaluateConfig,
    RunConfig,
    SampleConfig,
    TrainConfig,
)
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
    (
        replace(
            make(replace(DIT, num_classes=0)),
            data=DataConfig(kind="digits", size=8, num_classes=0),
            sample=SampleConfig(guidance=1.5),
        ),
        "sample.guidance 1.5 needs classes, but data.num_classes is 0: set sample.guidance=1",
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


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (TrainConfig, {"lr": NAN}, "train.lr must be above 0, not nan"),
        (TrainConfig, {"lr": INF}, "train.lr must be above 0 and finite, not inf"),
        (TrainConfig, {"lr": -1.0}, "train.lr must be above 0, not -1.0"),
        (TrainConfig, {"weight_decay": NAN}, "train.weight_decay must be 0 or more and finite, not nan"),
        (TrainConfig, {"weight_decay": INF}, "train.weight_decay must be 0 or more and finite, not inf"),
        (TrainConfig, {"weight_decay": -0.1}, "train.weight_decay must be 0 or more and finite, not -0.1"),
        (TrainConfig, {"ema_decay": NAN}, "train.ema_decay must be at least 0"),
        (TrainConfig, {"class_dropout": NAN}, "train.class_dropout must be at least 0"),
        (TrainConfig, {"batch_size": 10**6}, "train.batch_size must be at most 100,000, not 1000000"),
        (TrainConfig, {"steps": 10**8}, "train.steps must be at most 99,999,999"),
        (TrainConfig, {"snapshots": 1}, "train.snapshots 1 would keep the weights of 400,000 steps, more than 10,000"),
        (SampleConfig, {"guidance": NAN}, "sample.guidance must be finite, not nan"),
        (SampleConfig, {"guidance": -INF}, "sample.guidance must be finite, not -inf"),
        (SampleConfig, {"count": 10**12}, "sample.count must be at most 10,000,000"),
        (SampleConfig, {"batch_size": 10**8}, "sample.batch_size must be at most 100,000"),
        (SampleConfig, {"seed": 2**64}, r"sample.seed must be 0 or more and below 2\^64"),
        (EvaluateConfig, {"batch_size": 10**8}, "evaluate.batch_size must be at most 100,000"),
        (EvaluateConfig, {"seed": 2**32}, r"evaluate.seed must be 0 or more and below 2\^32"),
        (BenchConfig, {"seconds": NAN}, "bench.seconds must be above 0, not nan"),
        (BenchConfig, {"seconds": INF}, "bench.seconds must be above 0 and finite, not inf"),
        (BenchConfig, {"warmup": 10**20}, "bench.warmup must be at most 100,000"),
        (BenchConfig, {"repeats": 10**20}, "bench.repeats must be at most 100,000"),
        (BenchConfig, {"batch_size": [1, 10**8]}, "bench.batch_size must be at most 100,000, not 100000000"),
        (BenchConfig, {"input_sizes": [8, 100_000]}, "bench.input_sizes must be at most 16,384, not 100000"),
        (BenchConfig, {"input_sizes": [0]}, "bench.input_sizes must be above 0, not 0"),
        (DataConfig, {"size": 100_000}, "data.size must be at most 16,384, not 100000"),
        (RunConfig, {"workers": 257}, "run.workers must be 0 or more and at most 256, or auto, not 257"),
        (RunConfig, {"workers": -1}, "run.workers must be 0 or more"),
    ],
)
def test_numbers_are_finite_and_bounded(section, values, message):
    with pytest.raises(InputError, match=f"^{message}"):
        section(**values)


def test_the_largest_numbers_are_taken():
    assert TrainConfig(steps=99_999_999, batch_size=100_000, lr=1e-30).weight_decay == 0.0
    assert TrainConfig(snapshots=40 * 256).snapshots == 10_240
    assert SampleConfig(seed=2**64 - 1, guidance=-2.0).guidance == -2.0
    assert RunConfig(workers=256).workers == 256 and EvaluateConfig(seed=2**32 - 1).seed == 2**32 - 1
