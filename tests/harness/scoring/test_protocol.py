"""Protocols of generation: what they contain, when they are equal, and their words."""

import hashlib
import itertools
import subprocess
import sys

import pytest
from lamabench.harness.scoring.protocol import (
    UNKNOWN,
    fields_of,
    generation,
    interval_words,
    protocol_hash,
    stated,
    words,
)
from lamabench.kernels.errors import InputError

CONFIG = {
    "model": {"num_classes": 10, "in_channels": 3},
    "objective": {"kind": "ddpm", "schedule": "cosine"},
    "encoder": {"kind": "pixels"},
    "sample": {"guidance": 7.0, "steps": 1000},  # what a later command asked for
}
ROW = {
    "count": 50, "method": "ancestral", "steps": 250, "guidance": 1.5, "guidance_channels": 2, "clip": True,
    "labels": "cyclic", "timesteps": "even", "seed": 3, "weights": "ema", "precision": "bfloat16", "batch_size": 8,
}  # fmt: skip


def of(config=None, **changes):
    return generation({**CONFIG, **(config or {})}, ROW | changes)


def test_it_is_what_the_record_of_the_samples_says():
    assert of() == {
        "objective": "ddpm", "schedule": "cosine", "sampler": "ancestral", "steps": 250, "timesteps": "even",
        "guidance": 1.5, "guidance_channels": 2, "clip": True, "labels": "balanced", "weights": "ema",
        "precision": "bfloat16", "encoder": "pixels",
    }  # fmt: skip


def test_the_hash_is_of_the_fields_that_count():
    text = '{"a":1.5,"b":{"c":"d"}}'
    assert protocol_hash({"b": {"c": "d"}, "none": None, "a": 1.5}) == hashlib.sha256(text.encode()).hexdigest()[:8]
    assert fields_of(None) == {}
    assert fields_of(UNKNOWN) == {"generation": {"source": "unknown"}}, "no two unknown ways are equal"
    assert fields_of({"words": "x"}) == {
        "generation": {"words": "x"},
        "generation_protocol": protocol_hash({"words": "x"}),
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "ddim"},
        {"steps": 25},
        {"timesteps": "ddim"},
        {"guidance": 1.0},
        {"guidance_channels": None},
        {"guidance_interval": "0.28 to 2.9"},
        {"guide": "dit_nano 0123abcd at step 400"},
        {"clip": False},
        {"labels": "random"},
        {"count": 9},  # classes without an image
        {"weights": "live"},
        {"precision": "float32"},
        {"config": {"objective": {"kind": "ddpm", "schedule": "linear"}}},
        {"config": {"objective": {"kind": "other", "schedule": "cosine"}}},
        {"config": {"objective": {"kind": "v", "schedule": "cosine"}}},
        {"config": {"objective": {"kind": "flow", "schedule": "linear", "times": "uniform"}}},
        {"config": {"encoder": {"kind": "vae"}}},
    ],
    ids=str,
)
def test_another_way_of_drawing_is_another_protocol(changes):
    assert protocol_hash(of(**changes)) != protocol_hash(of())
    assert words(of(**changes)) != words(of())


def test_what_has_no_effect_is_no_other_protocol():
    base = protocol_hash(of())
    assert protocol_hash(of(seed=9, count=10, batch_size=64)) == base
    assert protocol_hash(of(labels="spread", count=5)) == base, "balanced, of fewer images than classes"
    assert protocol_hash(of(guidance=1.0)) == protocol_hash(of(guidance=1.0, guidance_channels=None))
    assert protocol_hash(of(guidance_channels=3)) == protocol_hash(of(guidance_channels=None)), "all of three"
    assert protocol_hash(of(guidance=4)) == protocol_hash(of(guidance=4.0))
    for way in ({"guide": "x"}, {"guidance_interval": "0.28 to 2.9"}):
        assert of(guidance=1.0, **way) == of(guidance=1.0), "guidance 1 is none"
    assert of(guidance_interval="0 to inf") == of() and of(guidance_interval="2 to 2") == of(guidance=1.0)
    flow = [{"objective": {"kind": "flow", "schedule": "linear", "times": t}} for t in ("uniform", "logit_normal")]
    assert of(flow[0]) == of(flow[1]), "how t is distributed in training"
    none = {"model": {"num_classes": 0, "in_channels": 3}}
    assert protocol_hash(of(none, labels="random")) == protocol_hash(of(none)) != base


def test_records_of_earlier_versions():
    """They had cyclic labels and even timesteps only, and no field for them."""
    assert of(labels=None, timesteps=None) == of()
    assert of(labels=None, timesteps=None, count=5)["labels"] == "cyclic"


def test_words():
    linear = {"objective": {"kind": "ddpm", "schedule": "linear"}}
    text = "250 ancestral steps, guidance 1.5 on 2 channels, clipped, balanced labels, EMA, bfloat16"
    assert words(of(linear)) == text
    assert words(of()) == f"cosine schedule, {text}"
    parts = {"guidance_interval": interval_words([0.28, None]), "guide": "dit_nano 0123abcd at step 400"}
    guided = "autoguidance 1.5 by dit_nano 0123abcd at step 400 on 2 channels at sigma 0.28 to inf"
    assert words(of(linear, **parts)) == text.replace("guidance 1.5 on 2 channels", guided)
    plain = of(linear, method="ddim", steps=1, guidance=1, clip=False, weights="live", labels="random")
    assert words(plain) == "1 ddim step, no guidance, random labels, live weights, bfloat16"
    flow, v = ({"objective": {"kind": kind, "schedule": "linear"}} for kind in ("flow", "v"))
    assert words(of(flow, method="euler")) == "flow matching, " + text.replace("ancestral", "euler")
    assert words(of(v)) == f"v-prediction, {text}" and of(flow)["schedule"] is None
    assert words(None) == words({}) == words(UNKNOWN) == "unknown"


def test_equal_words_are_equal_protocols():
    values = {
        "method": ("ancestral", "ddim"), "steps": (25, 250), "timesteps": ("even", "ddim"),
        "guidance": (1.0, 1.5, 1.5000001, 4.0), "guidance_channels": (None, 1, 2), "clip": (False, True),
        "guidance_interval": (None, "0 to 1", "0 to 1.5"), "guide": (None, "a at step 1"),
        "labels": ("cyclic", "random"), "weights": ("ema", "live", "ema@0.99"), "precision": ("float32", "bfloat16"),
    }  # fmt: skip
    texts = {}
    for one in itertools.product(*values.values()):
        drawn = of(**dict(zip(values, one, strict=True)))
        texts.setdefault(words(drawn), set()).add(protocol_hash(drawn))
    assert len(texts) == 2 * 2 * 2 * (1 + 3 * 3 * 3 * 2) * 2 * 2 * 3 * 2
    assert all(len(hashes) == 1 for hashes in texts.values())


def test_statements():
    assert stated("sampler=heun, steps=18,guidance=1,clip=true,labels=random") == {
        "sampler": "heun", "steps": 18, "guidance": 1.0, "clip": True, "labels": "random",
    }  # fmt: skip
    assert words(stated("sampler=heun,steps=18,guidance=4")) == "18 heun steps, guidance 4"
    assert words(stated(" the released samples, EDM ")) == "the released samples, EDM"
    assert words(stated("steps=25, by hand")) == "steps=25, by hand"
    whole = ",".join(f"{name}={value}" for name, value in of().items())
    assert protocol_hash(stated(whole)) == protocol_hash(of()), "all fields of a protocol state that protocol"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stesp=3", "unknown field of --generation 'stesp' .did you mean 'steps'"),
        ("steps=3.5", "steps must be a whole number above 0, not '3.5'"),
        ("steps=0", "steps must be a whole number above 0"),
        ("guidance=nan", "guidance must be a number, not 'nan'"),
        ("clip=maybe", "clip must be true or false, not 'maybe'"),
        ("sampler=", "sampler must be a word"),
        ("", "--generation is empty"),
        ("two\nlines", "no line of text"),
    ],
)
def test_bad_statements(text, message):
    with pytest.raises(InputError, match=message):
        stated(text)


def test_reports_read_it_without_torch():
    code = "import sys, lamabench.harness.scoring.protocol; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
