"""Folders of runs for tests of reports, written as the harness writes them, with numbers that tests choose."""

import csv
import hashlib
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from lamabench.harness.disk import append
from lamabench.harness.record import row
from lamabench.harness.run import LAYOUT, STUDY, create, write_study
from lamabench.reports.report import evidence_of, overview_text

Line = dict[str, Any]
WHERE = {
    "commit": "a" * 40, "dirty": False, "host": "box", "device": "A CPU", "driver": None, "torch": "2.15.0",
    "python": "3.11.9", "lamabench": "0.1.0",
}  # fmt: skip
H100 = {**WHERE, "device": "NVIDIA H100 80GB HBM3", "driver": "570.1"}
PARTS = {
    "ssm": {"params": 300_000, "macs": 6_000_000, "flops": 12_000_000},
    "scan": {"params": 0, "macs": 0, "flops": 1_000_000},
    "attention": {"params": 0, "macs": 0, "flops": 0},
    "mlp": {"params": 700_000, "macs": 4_000_000, "flops": 8_000_000},
}
# The fields that the keys of records depend on here.
KEYED = ("metric", "protocol", "mode", "operator", "shape", "pass", "input_size", "checkpointing", "compile")
KEYED += ("precision", "batch_size", "asked")


def digest(*content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def line(kind: str, state: str = "done", **fields: Any) -> Line:
    about = {"kind": kind, "state": state, "time": "2025-06-01T10:00:00+00:00", "provenance": WHERE}
    return {**about, **fields}


def cost(macs: int = 10_000_000, params: int = 1_000_000) -> Line:
    return line("cost", params=params, macs=macs, flops=2 * macs + 1_000_000, paper_gflops=macs / 1e9, parts=PARTS)


def trained(final_loss: float = 0.0625, steps: int = 600) -> Line:
    return line(
        "train", steps=steps, images=64 * steps, seconds=96.0, images_per_s=400.0, final_loss=final_loss,
        backend={"selective_scan": "torch"}, precision="float32", batch_size=64,
    )  # fmt: skip


def drawn(steps: int = 50, speed: float = 12.5) -> Line:
    same = {"count": 512, "method": "ddim", "guidance": 1.0, "guidance_channels": None, "seconds": 41.0}
    return line("sample", steps=steps, images_per_s=speed, **same)


def scored(value: float, protocol: str = "p1", metric: str = "FD-EffNetLite0-512", std: float | None = None) -> Line:
    against = {"reference": "digits", "reference_count": 1797, "features": "efficientnet_lite0"}
    return line("score", metric=metric, value=value, std=std, count=512, protocol=protocol, **against)


def made(score: Line, **way: Any) -> Line:
    """A score whose record says how its samples were made."""
    generation = {"sampler": "ddim", "steps": 50, "clip": True, **way}
    protocol = f"g{generation['steps']}" + "".join(f"{key}{value}" for key, value in way.items() if key != "steps")
    return {**score, "generation": generation, "generation_protocol": protocol}


def timed(mode: str, speed: float, batch: int = 16, **fields: Any) -> Line:
    middle = 1000 * batch / speed
    same = {
        "precision": "float32", "compile": "eager", "backend": {"attention": "sdpa"}, "peak_memory_gib": None,
        "threads": 2, "input_size": 8, "checkpointing": False, "flops": 21_000_000,
    }  # fmt: skip
    steps = {"p20_ms": middle * 0.8, "p50_ms": middle, "p80_ms": middle * 1.25}
    return line("speed", mode=mode, batch_size=batch, images_per_s=speed, **{**same, **steps, **fields})


def swept(mode: str, speed: float, batch: int = 64, **fields: Any) -> Line:
    return {**timed(mode, speed, batch, precision="bfloat16", **fields), "provenance": H100}


def everything(value: float, speed: float, **more: Any) -> list[Line]:
    return [cost(**more), trained(), drawn(), scored(value), timed("forward", speed), timed("train", speed / 4)]


def put(folder: Path, info: Line, lines: list[Line]) -> Path:
    """Write a folder with its records. A line without a key gets one from what it measured and from the folder."""
    create(folder, info)
    for values in lines:
        content = [values.get(name) for name in KEYED]
        content.append(values.get("backend") if "operator" in values else values["provenance"]["device"])
        key = info["key"] if values["kind"] in ("cost", "train", "sample") else digest(info["key"], content)
        append(folder / "record.jsonl", row(**{"key": key, **values}).as_dict())
    return folder


def write(
    root: Path,
    name: str,
    lines: list[Line],
    family: str = "dit",
    title: str = "DiT-demo",
    variant: Line | None = None,
    seed: int = 0,
    curve: list[float] | None = None,
    labels: list[int] | None = None,
    study: str = "demo",
    step: int = 600,
    model: Line | None = None,
    trains: bool = True,
    entry: Line | None = None,
    facts: Line | None = None,
    **sample: Any,
) -> Path:
    """Write a run of a study: its model, its training and, where there are lines or labels of samples, its samples at a
    step. Returns the study's link to the run. `facts` are what .study.json says the study is about.

    Image k of the samples is 4 × 4 pixels of the value k. A second call for the same run adds samples.
    """
    variant = {"model": f"{family}_demo"} if variant is None else variant
    preset = str(variant.get("model", f"{family}_demo"))
    about = {"study": study, "name": name, "variant": variant, "seed": seed, "model": preset, "family": family}
    about["title"] = title
    config: Line = {
        "model": {"family": family, **(model or {})},
        "train": {"batch_size": 64, "steps": step},
        "seed": seed,
    }
    config["sample"] = {"steps": 50, "batch_size": 8, **sample}
    base = re.sub(r"-s\d+$", "", name)
    model_key, key = digest(base, variant, model), digest(study, base, variant, model, seed)
    home, models = root / "trainings" / f"{family}-digits-{key}", root / "models" / f"{family}-{model_key}"
    of_samples = [one for one in lines if one["kind"] in ("sample", "score")]
    of_training = [one for one in lines if one["kind"] == "train"]
    of_model = [one for one in lines if one not in (*of_samples, *of_training)]
    if of_model or not trains:
        put(models, {"kind": "model", "key": model_key, **about, "config": {"model": config["model"]}}, of_model)
    sample_folders = []
    if trains:
        put(home, {"kind": "training", "key": key, **about, "config": config}, of_training)
        steps = [{"step": k, "images": 64 * k, "loss": value} for k, value in enumerate(curve or [], start=1)]
        (home / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in steps))
    if of_samples or labels is not None:
        sample_key = digest(key, step, sample)
        sample_folders.append(home / "samples" / sample_key)
        info = {"kind": "samples", "key": sample_key, **about, "training": str(home), "step": step, "config": config}
        moment = {"checkpoint_step": step, "samples": sample_key}
        put(sample_folders[0], info, [moment | one if one["kind"] == "score" else one for one in of_samples])
    if labels is not None:
        images = np.broadcast_to(np.arange(len(labels), dtype=np.uint8)[:, None, None, None], (len(labels), 4, 4, 1))
        np.savez(sample_folders[0] / "samples.npz", images=images, labels=np.array(labels))
    listed = {**about, "training": str(home.relative_to(root)) if trains else None, **(entry or {})}
    listed |= {
        "model_folder": str(models.relative_to(root)),
        "samples": [str(one.relative_to(root)) for one in sample_folders],
    }
    write_study(root, study, f"{study}.yaml", [listed], add=True, about=facts)
    return root / study / name


def write_three(root: Path) -> Path:
    """Three models: two finished, and one ran out of memory with an error full of characters that need escaping."""
    curve = [1 / k for k in range(1, 31)]
    write(root, "lamamba", everything(60.0, 600.0), "lamamba", "LaMamba_demo", curve=curve, labels=[1, 0, 1, 0, 2])
    write(root, "dit", everything(75.5, 1200.0, macs=20_000_000), "dit", "DiT-demo", curve=curve, labels=[0, 1, 1])
    out_of_memory = line("train", "oom", error="tried 50% of {0} & a_b | #1 $x\n ~^\\ <y>")
    write(root, "adm", [cost(30_000_000), out_of_memory], "adm", "ADM", curve=curve[:9])
    return root


def samples_of(run: Path) -> Path:
    """The samples.npz of a run."""
    (path,) = run.glob("samples/*/samples.npz")
    return path


def parsed(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def markdown(text: str) -> list[dict[str, str]]:
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line.startswith("|")]
    head, _, *body = [[cell.strip() for cell in row] for row in rows]
    return [dict(zip(head, row, strict=True)) for row in body]


# Presets as `write_many` takes them: {family: (title, preset, their parameters in millions and FLOPs in 1e9 by size)}.
# The FLOPs of the first three are on record; those of the plug-in are made up.
SIZES = ("S", "B", "L", "XL")
PRESETS: dict[str, tuple[str, str, tuple[tuple[float, float], ...]]] = {
    "lamamba": ("LaMamba-Diff-{}", "lamamba_{}", ((28.0, 4.972), (127.0, 21.31), (464.0, 70.85), (659.7, 96.85))),
    "dit": ("DiT-{}/2", "dit_{}_2", ((33.0, 12.12), (130.5, 46.03), (458.1, 161.4), (675.1, 237.3))),
    "adm": ("U-Net-{}", "unet_{}", ((34.0, 10.32), (135.0, 40.77), (470.0, 142.5), (680.0, 205.0))),
    "mine": ("Mine-{}", "mine_{}", ((30.0, 8.0), (120.0, 32.0), (440.0, 128.0), (650.0, 190.0))),
}
LAWS = {"lamamba": (8.0, 60.0, 0.45), "dit": (8.0, 110.0, 0.45), "adm": (8.0, 100.0, 0.4), "mine": (8.0, 90.0, 0.35)}
IMAGES = 25_600_000  # of a training of `write_many`: 100,000 steps of 256 images
HELDOUT = "held-out loss"
FD = "FD-EffNetLite0-10k"


def law(family: str, gflops: float, share: float = 1.0) -> float:
    """The Frechet distance of `write_many` without noise: a + b·C^-c with C in GFLOPs, after a share of a training."""
    a, b, c = LAWS[family]
    return a + b * gflops**-c * share**-0.6


def write_many(
    root: Path,
    families: int = 3,
    sizes: int = 4,
    seeds: int = 3,
    snapshots: int = 5,
    study: str = "scale",
    noise: float = 0.02,
) -> Path:
    """Write a study with a file: families × sizes × seeds runs, each scored at `snapshots` moments. Returns its folder.

    The Frechet distance follows `law`, times exp(noise · N(0, 1)), with one number for each training. 2 runs are
    (root, 2, 1, 1), 12 are (root, 2, 3, 2) and 40 are (root, 2, 4, 5). Trainings ran on an H100, as did timings.
    """
    entries = []
    for of_family, (family, (title, preset, models)) in enumerate(list(PRESETS.items())[:families]):
        for size, (params, gflops) in enumerate(models[:sizes]):
            for seed in range(seeds):
                luck = float(np.exp(noise * np.random.default_rng([of_family, size, seed]).standard_normal()))
                name = preset.format(SIZES[size].lower())
                about: Line = {"study": study, "name": f"{name}-s{seed}", "variant": {"model": name}, "seed": seed}
                about |= {"model": name, "family": family, "title": title.format(SIZES[size])}
                entries.append(_write_one(root, about, params * 1e6, gflops * 1e9, snapshots, luck))
    write_study(root, study, f"{study}.yaml", entries)
    listing = json.loads((root / study / STUDY).read_text())
    question = "Does LaMamba-Diff stay ahead of DiT and of the U-Net from S to XL?"
    listing["about"] = {
        "question": question, "claim": "LaMamba-Diff surpasses DiT at every scale.",
        "answer": "It does if its FD is lower at each size.", "budget": f"{len(entries)} trainings",
        "axes": {"model": list(dict.fromkeys(one["model"] for one in entries))},
    }  # fmt: skip
    (root / study / STUDY).write_text(json.dumps(listing))
    return root / study


def _write_one(root: Path, about: Line, params: float, flops: float, snapshots: int, luck: float) -> Line:
    """One training of `write_many`, with its model. Returns its entry in the list of the study."""
    family, seed, size = about["family"], about["seed"], {"params": int(params), "flops": int(flops)}
    config: Line = {"model": {"family": family, "size": about["model"]}, "seed": seed, "data": {"kind": "cifar10"}}
    config |= {"train": {"batch_size": 256, "steps": IMAGES // 256}, "sample": {"steps": 250, "batch_size": 256}}
    model, key = digest(about["model"]), digest(about["study"], about["name"])
    home, models = root / "trainings" / f"{family}-cifar10-{key}", root / "models" / f"{family}-{model}"
    slow = {"lamamba": 0.5, "adm": 0.7}.get(family, 1.0)  # of the FLOPs per second
    speed = slow * 1.2e14 / flops
    forward = swept("forward", 3.5 * speed, compile="compile", flops=size["flops"], mfu=0.4 * slow, input_size=32)
    train = swept("train", speed, compile="whole-step", flops=size["flops"], mfu=0.35 * slow, input_size=32)
    memory = 2 + params / 2e7
    at_once = [{**forward, "peak_memory_gib": memory / 3}, {**train, "peak_memory_gib": memory}]
    macs = size["flops"] * 48 // 100
    part = {"mlp": {"params": size["params"], "macs": macs, "flops": size["flops"]}}
    counted = line("cost", macs=macs, paper_gflops=macs / 1e9, parts=part, **size)
    if not models.exists():
        _put(
            models, {"kind": "model", "key": model, **about, "config": {"model": config["model"]}}, [counted, *at_once]
        )
    done = {"images_per_s": speed, "precision": "bfloat16", "compile": "whole-step", "batch_size": 256, "processes": 1}
    done |= {"images": IMAGES, "steps": IMAGES // 256, "seconds": IMAGES / speed, "process_seconds": IMAGES / speed}
    loss = 0.05 + 0.03 * (flops / 1e9) ** -0.3
    done |= {"final_loss": loss * luck**0.1, "training_flops": 3 * flops * IMAGES, "backend": {"attention": "sdpa"}}
    _put(home, {"kind": "training", "key": key, **about, "config": config}, [line("train", **done)])
    random = np.random.default_rng(int(key, 16))
    with open(home / "metrics.jsonl", "w", encoding="utf-8") as file:
        for share in np.linspace(0.02, 1, 50):
            value = (loss + 0.01 * (share**-0.5 - 1)) * luck**0.1
            seen: Line = {"step": round(share * IMAGES / 256), "images": round(share * IMAGES / 256) * 256}
            seen |= {"loss": value * (1 + 0.02 * random.standard_normal()), "seconds": share * IMAGES / speed}
            seen |= {"heldout_loss": 1.05 * value} if round(share * 50) % 10 == 0 else {}
            file.write(json.dumps(seen) + "\n")
    samples = []
    for share in (number / snapshots for number in range(1, snapshots + 1)):
        step = round(share * IMAGES / 256)
        folder = home / "samples" / digest(key, step)
        moment = {"checkpoint_step": step, "images_seen": 256 * step, "training_flops": 3 * flops * 256 * step}
        moment |= {"training_seconds": 256 * step / speed, "weights": "ema"}
        images = {"count": 10_000, "method": "ddim", "guidance": 1.0, "labels": "cyclic", "seconds": 900.0}
        row = line("sample", **moment, **images, steps=250, images_per_s=10_000 / 900)
        fd = made(scored(law(family, flops / 1e9, share) * luck, metric=FD), steps=250)
        fd |= {"count": 10_000, "reference": "cifar10", "reference_count": 50_000, "samples": folder.name, "floor": 2.1}
        held = line("score", metric=HELDOUT, value=1.05 * (loss + 0.01 * (share**-0.5 - 1)) * luck**0.1, count=10_000)
        held |= {"reference": "cifar10 test", "protocol": "held"}
        info = {"kind": "samples", "key": folder.name, **about, "training": str(home), "step": step, "config": config}
        _put(folder, info, [row, moment | fd, moment | held])
        samples.append(folder)
    labels = np.arange(20) % 10
    pictures = random.integers(0, 256, (20, 8, 8, 3), np.uint8)
    np.savez(samples[-1] / "samples.npz", images=pictures, labels=labels)
    entry = {**about, "training": str(home.relative_to(root)), "model_folder": str(models.relative_to(root))}
    entry |= {"samples": [str(one.relative_to(root)) for one in samples], "steps": IMAGES // 256, "backend": {}}
    return entry


def _put(folder: Path, info: Line, lines: list[Line]) -> None:
    """As `put`, without a flush to disk after each line; all ran on an H100."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"layout": LAYOUT, **info}))
    texts = []
    for values in lines:
        key = (
            info["key"]
            if values["kind"] in ("cost", "train", "sample")
            else digest(info["key"], [values.get(name) for name in KEYED])
        )
        texts.append(json.dumps(row(**{"key": key, **values, "provenance": H100}).as_dict()) + "\n")
    (folder / "record.jsonl").write_text("".join(texts))


def summary_rows(paths: list[Path]) -> list[Line]:
    """The rows of the summary of what lies at or below folders, with the keys of its csv."""
    return evidence_of(paths).overview.records()


def summary_text(paths: list[Path], baseline: str | None = None) -> str:
    """What `lamabench report` prints of what lies at or below folders."""
    return overview_text(evidence_of(paths, baseline))
