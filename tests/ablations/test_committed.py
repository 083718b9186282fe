"""The committed studies: what would answer them, what they take, and arms that are of like size."""

import re
from functools import cache

import pytest
from lamabench.ablations.study import load, names
from lamabench.harness.guide import passes
from lamabench.harness.keys import config_from_dict, model_key
from lamabench.harness.measure.cost import Cost, cost
from lamabench.harness.moments import sample_sets
from lamabench.kernels.errors import InputError
from lamabench.launch import gpu_hours
from lamabench.launch.cli import main
from lamabench.launch.plan import pieces, plan
from latents_of_a_study import NEEDED

QUALITY = [name for name in names() if name not in ("crossover", "demo")]
LIKE = {"size": ("params", "macs"), "macs": ("macs",), "parameters": ("params",), "flops": ("flops",)}
COSTS: dict[str, Cost] = {}


def cost_of(model) -> Cost:
    key = model_key(model)
    if key not in COSTS:
        COSTS[key] = cost(model)
    return COSTS[key]


@cache
def planned(name):
    return plan(load(name), NEEDED.get(name, ()))


def budget(name):
    """Trainings, images and FLOPs (three forward passes an image; one for each step of sampling, two with guidance),
    and the GPU-hours for which there are committed records."""
    runs = planned(name)
    images, training, sampling, sets = set(), 0.0, 0.0, 0
    for piece in pieces(runs):
        config = config_from_dict(piece.task.config)
        if piece.task.kind == "training":
            images.add(config.train.steps * config.train.batch_size)
            training += 3 * cost_of(config.model).flops * config.train.steps * config.train.batch_size
        elif piece.task.kind == "samples":
            sets += 1
            each = config.sample.count * sum(passes(config))
            sampling += cost_of(config.model).flops * each
    (seen,) = images
    trainings = sum(piece.task.kind == "training" for piece in pieces(runs))
    committed = gpu_hours.trained(gpu_hours.committed_roots(), [run.config for run in runs])
    speeds = [*gpu_hours.committed_speeds(), *gpu_hours.on_gpus(committed)]
    known = [one for one in gpu_hours.of_runs(runs, speeds)[0] if one and isinstance(one, dict)]
    slowest = [max(one, key=lambda device: one[device]) for one in known]
    gpus = [gpu for gpu in ("H100", "H200") if any(gpu in device for device in slowest)]
    hours = sum(max(one.values()) for one in known)
    text = f"{trainings} trainings of {seen / 1e6:g} M images, {training:.2g} FLOPs; {sets} sets of samples, "
    text += f"{sampling:.2g} FLOPs; "
    if not known:
        return text + "hours of training unmeasured"
    text += f"{hours:.{0 if hours > 2 else 1}f} hours of training on an {' or an '.join(gpus)}"
    return text + (f" for {len(known)} trainings, the others unmeasured" if len(known) < trainings else "")


@pytest.mark.parametrize("name", names())
def test_a_study_says_what_would_be_an_answer(name):
    study = load(name)
    assert study.answer and study.answer.endswith(".")


JUDGED = {
    "block_mix", "cifar10_block_mix", "cifar10_d_state", "cifar10_lr", "cifar10_lr_s", "cifar10_objective",
    "cifar10_scale", "cifar10_scan", "cifar10_skip", "cifar10_window", "d_state", "dit_block", "objective", "rivals",
    "scale", "scan", "unet",
}  # fmt: skip


@pytest.mark.parametrize("name", names())
def test_verdicts_are_on_variants(name):
    """The studies whose answers name pairs have verdicts, which end up in the listing and not in a debug study that
    lacks their variants."""
    study = load(name)
    assert bool(study.verdicts) == (name in JUDGED)
    known = [variant.values for variant in study.expand()]
    for pairs in study.about().get("verdicts", {}).values():
        assert all(side in known for pair in pairs for side in pair.values())
    if study.debug:
        assert study.debug_size().pairs().keys() <= study.verdicts.keys()


@pytest.mark.parametrize("name", QUALITY)
def test_a_study_of_quality_states_seeds_and_budget(name):
    study = load(name)
    assert len(study.seeds) >= 3
    words = {3: "three seeds", 5: "five seeds"}
    assert words[len(study.seeds)] in study.answer
    assert study.budget == budget(name)


@pytest.mark.parametrize("name", [name for name in QUALITY if name not in NEEDED])  # ImageNet's 80 epochs
def test_a_study_of_quality_does_not_measure_memorising(name):
    for run in planned(name):
        assert run.config.model.dropout > 0 and run.config.train.snapshots
        assert run.config.train.steps * run.config.train.batch_size <= 600 * 50_000  # epochs of CIFAR-10
        assert run.config.sample.guidance_channels is None


def test_guidance_of_latents_has_arms_of_three_and_four_channels():
    runs = planned("guidance_latents")
    arms = {(run.config.sample.guidance_channels, run.config.sample.guidance) for run in runs}
    assert arms == {(channels, scale) for channels in (3, 4) for scale in (1.25, 1.5, 2.0)}
    assert len({run.training.key for run in runs}) == 3 and {run.config.model.in_channels for run in runs} == {4}
    with pytest.raises(InputError, match="encoder=FOLDER takes it from the cache"):
        plan(load("guidance_latents"))


@pytest.mark.parametrize(
    ("name", "base"), [("block_mix", "ssm+window"), ("unet", "add"), ("cifar10_block_mix", "ssm+window")]
)
def test_arms_of_like_size_are_of_like_size(name, base):
    models = {run.variant: run.config.model for run in planned(name)}
    arms = {variant: end[1] for variant in models if (end := re.search(r"-of-like-(\w+)$", variant))}
    reference, sets = cost_of(models[base]), {}
    for variant, like in arms.items():
        sets.setdefault(variant.removesuffix(f"-of-like-{like}"), set()).update(LIKE[like])
        for quantity in LIKE[like]:
            assert getattr(cost_of(models[variant]), quantity) == pytest.approx(
                getattr(reference, quantity), rel=0.03
            ), (variant, quantity)
    mixes = {"ssm", "window", "global", "conv", "mlp", "ssd+window", "conv31+window"}
    both = {"block_mix": mixes, "unet": {"stack"}, "cifar10_block_mix": {"ssm+ssm", "window+window", "window"}}[name]
    assert {mix for mix, quantities in sets.items() if {"params", "macs"} <= quantities} >= both


@pytest.mark.parametrize("study", ["scan", "cifar10_scan"])
def test_the_scans_differ_in_paths_alone(study):
    models = {run.variant: run.config.model for run in planned(study)}
    four = [cost_of(models[scan]) for scan in ("continuous", "cross", "bidirectional_4", "unidirectional_4")]
    assert all(one == four[0] for one in four)
    assert cost_of(models["unidirectional"]).params < cost_of(models["bidirectional"]).params < four[0].params


def test_a_modern_block_costs_what_a_plain_one_does():
    models = {run.variant: run.config.model for run in planned("dit_block")}
    plain, *others = (cost_of(models[arm]) for arm in models)
    assert len(others) == 6 and all(one.macs == plain.macs for one in others)
    assert all(one.params == pytest.approx(plain.params, rel=1e-3) for one in others)


FIRST = [name for name in QUALITY if name.startswith("cifar10_")]


def test_the_first_answers_share_trainings_and_sets_of_samples():
    """The base of the ablations is one training for each seed. A table has 10,000 samples, and curves have five
    moments."""
    trainings = {name: {run.training.key for run in planned(name)} for name in FIRST}
    assert len(FIRST) == 9
    base, large = (
        {run.training.key for run in planned("cifar10_scale") if run.about["model"] in models}
        for models in (["lamamba_t"], ["lamamba_s68", "dit_s_2", "unet_s"])
    )
    assert len(base) == 3 and all(base <= trainings[name] for name in FIRST if name != "cifar10_lr_s")
    assert len(large) == 9 and large <= trainings["cifar10_lr_s"]
    for name in FIRST:
        sets = sample_sets(planned(name)[0].config)
        assert sets == [*((step, 2000) for step in (500, 1000, 1500, 2000, 2500)), (2500, 10_000)]


def test_sizes_of_a_family_stand_beside_equal_ones():
    params = {run.about["model"]: cost_of(run.config.model).params for run in planned("cifar10_scale")}
    for sizes in (("lamamba_t", "dit_t_2", "unet_t"), ("lamamba_s68", "dit_s_2", "unet_s")):
        assert max(params[name] for name in sizes) < 1.08 * min(params[name] for name in sizes)


def test_plan_prints_answer_and_budget(capsys, tmp_path):
    assert main(["sweep", "plan", "guidance", f"run.root={tmp_path}"]) == 0
    study, out = load("guidance"), capsys.readouterr().out
    assert f"\nAnswer: {study.answer}\nBudget: {study.budget}\n" in out
    assert main(["sweep", "plan", "cifar10_scale", f"run.root={tmp_path}", f"data.path={tmp_path}"]) == 0
    rates = "; ".join(f"model {model}: train.lr=0.0016" for model in ("unet_t", "dit_s_2", "unet_s"))
    assert f"\nSettings: {rates}\n" in capsys.readouterr().out
