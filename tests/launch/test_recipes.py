"""Recipes: the values of a paper by one word, and what is given beside it wins."""

import json
from pathlib import Path

import pytest
from lamabench.ablations.study import load
from lamabench.harness.config import check_fit
from lamabench.harness.keys import training_key
from lamabench.harness.sections import TrainConfig
from lamabench.kernels.errors import InputError
from lamabench.launch import plan
from lamabench.launch.cli import main
from lamabench.launch.compose import choices, compose
from lamabench.models.registry import preset

LATENTS = ["data=synthetic", "data.channels=4", "data.num_classes=1000"]
PIXELS = ["data=synthetic", "data.size=64", "data.num_classes=1000"]
# What the sources say; a recipe may set nothing else.
PAPERS = {
    "dit": {"steps": 400_000, "batch_size": 256, "lr": 1e-4, "weight_decay": 0.0, "class_dropout": 0.1},
    "lamamba": {"steps": 400_000, "batch_size": 256, "lr": 1e-4, "weight_decay": 0.01, "class_dropout": 0.1},
    "sit": {"steps": 400_000, "batch_size": 256, "lr": 1e-4, "weight_decay": 0.0, "class_dropout": 0.1},
    "adm": {"steps": 1_980_000, "batch_size": 256, "lr": 1e-4, "weight_decay": 0.0, "class_dropout": 0.0},
    "adm_64": {"steps": 540_000, "batch_size": 2048, "lr": 3e-4, "weight_decay": 0.0, "class_dropout": 0.0},
}
SAMPLING = {"dit": (3, False), "sit": (3, False), "lamamba": (None, False), "adm": (None, True), "adm_64": (None, True)}
MODELS = {"dit": "dit_s_2", "sit": "dit_s_2", "lamamba": "lamamba_s", "adm": "unet_s", "adm_64": "adm_64"}


@pytest.mark.parametrize("name", PAPERS)
def test_a_recipe_has_the_values_of_its_paper(name):
    config, chosen = compose([*(PIXELS if name == "adm_64" else LATENTS), f"recipe={name}", f"model={MODELS[name]}"])
    check_fit(config)
    assert config.train == TrainConfig(**PAPERS[name])
    method, steps = ("heun", 125) if name == "sit" else ("ancestral", 250)
    assert (config.sample.method, config.sample.steps, config.sample.guidance) == (method, steps, 1.0)
    assert config.sample.labels == ("balanced" if name == "lamamba" else "random")
    assert config.objective.kind == ("flow" if name == "sit" else "ddpm")
    assert config.model.out_channels == (4 if name == "sit" else None)
    assert (config.sample.guidance_channels, config.sample.clip) == SAMPLING[name]
    assert config.objective.schedule == ("cosine" if name == "adm_64" else "linear")
    assert config.model.dropout == (0.1 if name == "adm_64" else 0.0)
    assert chosen == {"model": MODELS[name], "data": "synthetic"}


def test_these_are_all_recipes():
    assert choices("recipe") == sorted([*PAPERS, "none"])


@pytest.mark.parametrize("before", [True, False])
def test_what_is_given_beside_a_recipe_wins(before):
    own = ["train.lr=0.5", "model.dropout=0.2", "sample.clip=false"]
    words = [*PIXELS, "model=adm_64"]
    config, _ = compose([*own, *words, "recipe=adm_64"] if before else ["recipe=adm_64", *words, *own])
    assert (config.train.lr, config.model.dropout, config.sample.clip) == (0.5, 0.2, False)
    assert (config.train.batch_size, config.objective.schedule) == (2048, "cosine")


def test_a_recipe_is_its_values_and_nothing_more():
    """A training by a recipe is that by the same words; DiT's are the defaults."""
    words = [*LATENTS, "model=dit_s_2"]
    plain, dit, lamamba = (compose([*words, *more])[0] for more in ([], ["recipe=dit"], ["recipe=lamamba"]))
    assert compose([*words, "recipe=none"])[0] == plain
    assert training_key(plain) == training_key(dit) != training_key(lamamba)
    assert training_key(lamamba) == training_key(compose([*words, "train.weight_decay=0.01"])[0])


def test_a_preset_refuses_another_schedule():
    for words in ([], ["recipe=adm"]):
        with pytest.raises(InputError, match=r"model adm_64 is trained with the cosine noise schedule, not linear"):
            compose([*PIXELS, "model=adm_64", *words])
    assert compose([*PIXELS, "model=adm_64", "objective.schedule=cosine"])[0].model.dropout == 0.0
    with pytest.raises(InputError, match=r"cosine noise schedule, not linear"):
        compose([*PIXELS, "model=adm_64", "objective.kind=v"])
    check_fit(compose([*PIXELS, "model=adm_64", "objective.kind=flow", "train.class_dropout=0"])[0])  # has no schedule


def test_a_study_takes_recipes(tmp_path: Path):
    file = tmp_path / "recipes.yaml"
    file.write_text("question: q\nbase: {model: dit_nano, data: digits, sample.guidance_channels: null}\n"
                    "axes: {recipe: [dit, lamamba]}\nstages: [train]\n")  # fmt: skip
    runs = plan.plan(load(str(file)))
    assert [run.config.train.weight_decay for run in runs] == [0.0, 0.01]
    assert [run.about["variant"] for run in runs] == [{"recipe": "dit"}, {"recipe": "lamamba"}]


def test_cost_has_the_head_of_the_objective(capsys):
    """DiT's head is a Linear from the width to p² · channels values a token: of 1 channel instead of 2."""
    rows = {}
    for kind in ("ddpm", "v", "flow"):
        assert main(["cost", "dit_nano", f"objective.kind={kind}", "--json"]) == 0
        (rows[kind],) = json.loads(capsys.readouterr().out)
    config = preset("dit_nano").config
    values, tokens = config.patch_size**2 * config.in_channels, (config.input_size // config.patch_size) ** 2
    assert rows["v"] == rows["flow"]
    assert rows["ddpm"]["params"] - rows["v"]["params"] == values * (config.hidden_size + 1)
    assert rows["ddpm"]["macs"] - rows["v"]["macs"] == tokens * values * config.hidden_size
    assert main(["cost", "dit_nano", "--json"]) == 0 and [rows["ddpm"]] == json.loads(capsys.readouterr().out)
