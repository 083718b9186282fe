"""Every bad input is exit code 2, one line on standard error that says what is wrong, and nothing left on disk."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from bad_encodings import ENCODE
from bad_inputs import TABLE
from bad_rows import BASE, STUDY, Bad
from bad_samples import FOREIGN, SAMPLES
from lamabench.launch.cli import main
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

TRAINED = [
    "train", "model=dit_nano", "model.depth=1", "model.hidden_size=16", "model.num_heads=2", "data=digits",
    "data.size=8", "train.steps=2", "train.batch_size=2", "train.precision=float32", "run.device=cpu",
]  # fmt: skip
DRAWN = ["sample.count=12", "sample.method=ddim", "sample.steps=2", "run.device=cpu"]
LONG = "x" * 400
# What is wrong in a config.json: where, and the value there (None: the entry is missing).
ENTRIES = {
    "study": (("study",), None), "title": (("title",), 7), "variant": (("variant",), [1]), "seed": (("seed",), "x"),
    "weights": (("weights",), 3), "plugins": (("plugins",), 7), "plugin": (("plugins",), [{"name": "a"}]),
    "data": (("config", "data"), []), "path": (("config", "data", "path"), 7),
    "size": (("config", "data", "size"), "8"), "seeds": (("config", "seed"), []),
    "kind": (("config", "encoder", "kind"), {"a": 1}), "steps": (("config", "train", "steps"), "x"),
    "root": (("config", "run", "root"), []), "metrics": (("config", "evaluate", "metrics"), {"fd": 1}),
    "unknown": (("config", "train", "stesp"), 1), "model": (("config", "model"), None),
}  # fmt: skip
DAMAGED = [
    Bad([command, f"entries/{name}/train/{{name}}", "sample.count=3"], r"config\.json")
    for name in ENTRIES
    for command in ("sample", "evaluate")
]
PIPES = [
    Bad(["sample", "{run}", "sample.at=[]"], "sample.at is empty: give last, all, or a list"),
    Bad(["train", "model=dit_nano", "data=digits", "sample.at=[]"], "sample.at is empty"),
    Bad(["evaluate", "pipe.npz", "data=digits"], "pipe.npz .*neither a file nor a folder"),
    Bad(["evaluate", "empty.npz", "data=digits"], r"empty\.npz .* folder"),
    Bad(["train", "model=dit_nano", "data=npz", "data.path=pipe.npz"], "pipe.npz .*neither a file nor a folder"),
    Bad(["data", "check", "data=npz", "data.path=pipe.npz"], "pipe.npz .*neither a file nor a folder"),
    Bad(["data", "check", "data=npz", "data.path=few.npz"], "data.channels is 3, but .* have 1; set it to 1"),
]
# What is known of a score before anything is written.
SCORES = [
    Bad(["evaluate", "{run}", *DRAWN, f"evaluate.{setting}"], message)
    for setting, message in (
        ("metrics=[kid]", "kid needs at least 100 samples, 12 given"),
        ("reference_count=1", "fd needs at least 2 reference images, 1 given; .*prc needs at least"),
        ("reference_count=9999", "evaluate.reference_count 9999 is more than the 1797 images"),
        ("features_path=no.pt", r"evaluate\.features_path no\.pt has no effect for efficientnet_lite0"),
        ("metrics=[sfid]", r"metrics=sfid cannot be computed .*; choices of evaluate\.features: inception_v3"),
        ("download=perhaps", r"evaluate\.download must be true, false or the address of a mirror"),
        ("prc_reference_count=0", r"evaluate\.prc_reference_count must be above 0, not 0"),
        ("reference=no.npz", r"evaluate\.reference no\.npz does not exist"),
        ("reference=", r"evaluate\.reference is empty"),
        ("reference=bare.npz", r"evaluate\.reference bare\.npz has no moments \(mu, sigma\) and no images \(arr_0\)"),
        ("reference=plain.npz", r"plain\.npz is not a readable \.npz file: it is a single array"),
        ("reference=pipe.npz", r"pipe\.npz is not a readable \.npz file: it is neither a file nor a folder"),
        ("reference=float.npz", r"evaluate\.reference float\.npz has no moments"),
    )
]
ROWS = [*TABLE, *DAMAGED, *PIPES, *SCORES, *SAMPLES, *FOREIGN, *ENCODE]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a training and its samples, data of several kinds, and files that are no data."""
    folder = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setenv("PATH", "/nowhere")  # no SLURM
        patch.setattr("sys.dont_write_bytecode", True)  # of plugins in the folder
        patch.setattr("os.sysconf", lambda name: {"SC_PHYS_PAGES": 2**20, "SC_PAGE_SIZE": 2**12}.get(name, 2))  # 4 GiB
        assert main(TRAINED) == 0
        (run,) = Path("runs/train").glob("dit_nano-*")
        assert main(["sample", str(run), *DRAWN]) == 0
        data(folder)
        damaged(folder)
        other_entries(folder)
        yield folder, str(run)


def data(folder):
    images = np.zeros((1, 8, 8, 1), np.uint8)
    np.savez(folder / "few.npz", images=images)
    np.savez(folder / "float.npz", images=images.astype(np.float32))
    np.savez(folder / "object.npz", images=np.array([{}], object))
    np.savez(folder / "bare.npz", pictures=images)
    with open(folder / "plain.npz", "wb") as file:
        np.save(file, images)
    whole = (folder / "few.npz").read_bytes()
    (folder / "cut.npz").write_bytes(whole[: len(whole) // 2])
    many = np.zeros((8, 8, 8, 1), np.uint8)
    np.savez(folder / "four.npz", images=many, labels=np.arange(8) % 4)
    np.savez(folder / "gaps.npz", images=many, labels=np.array([1, 2, 3, 1, 2, 3, 1, 2]))
    (folder / "huge.npz").write_bytes(whole.replace(b"(1, 8, 8, 1), }", b"(9, 9, 9, 9), }"))
    for name in ("a", "b"):  # the images are read only if the number of classes fits
        (folder / "two" / name).mkdir(parents=True)
        for number in range(2):
            (folder / "two" / name / f"{number}.png").write_bytes(b"\x89PNG nothing")
    (folder / "images" / "a").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(folder / "images" / "a" / "fine.png")
    (folder / "images" / "a" / "broken.png").write_bytes(b"\x89PNG nothing")
    for side in (8, 9):
        (folder / "sizes").mkdir(exist_ok=True)
        Image.new("L", (side, 8)).save(folder / "sizes" / f"{side}.png")
    (folder / "empty").mkdir()
    (folder / "empty.npz").mkdir()
    os.mkfifo(folder / "pipe.npz")


def damaged(folder):
    """Copies of the runs, whose weights and checkpoints are damaged in several ways."""
    for kind in ("cut", "empty", "plain", "list", "missing", "extra", "shape"):
        copy = folder / "damaged" / kind
        shutil.copytree(folder / "runs", copy, symlinks=True)
        for path in copy.glob("trainings/*/*/step-*.safetensors"):
            with safe_open(path, "np") as file:
                metadata = file.metadata()
            tensors = load_file(path)
            group = "model/" if path.parent.name == "checkpoints" else ""
            first = next(name for name in tensors if name.startswith(group))
            if kind == "list":
                metadata = dict.fromkeys(metadata, "[]")
            if kind == "missing":
                del tensors[first]
            if kind == "extra":
                tensors[f"{group}other"] = tensors[first]
            if kind == "shape":
                tensors[first] = np.zeros((3, 1, 3), tensors[first].dtype)
            save_file(tensors, path, None if kind == "plain" else metadata)
            if kind in ("cut", "empty"):
                whole = path.read_bytes()
                path.write_bytes(whole[: len(whole) // 2] if kind == "cut" else b"")


def other_entries(folder):
    """Copies of the runs whose config.json is JSON, but has something else in it."""
    for name, (keys, value) in ENTRIES.items():
        copy = folder / "entries" / name
        shutil.copytree(folder / "runs", copy, symlinks=True)
        (path,) = copy.glob("trainings/*/config.json")
        inside = content = json.loads(path.read_text())
        for key in keys[:-1]:
            inside = inside[key]
        inside[keys[-1]] = value
        if value is None:
            del inside[keys[-1]]
        path.write_text(json.dumps(content))


def listing(folder):
    """Every path below a folder, with the size and time of files. Caches of data may be written."""

    def inside(place):
        with os.scandir(place) as entries:
            for entry in entries:
                if entry.name != "cache":
                    yield entry
                    if entry.is_dir(follow_symlinks=False):
                        yield from inside(entry)

    def size_and_time(entry):
        return (entry.stat().st_size, entry.stat().st_mtime_ns) if entry.is_file() else None

    return {entry.path: size_and_time(entry) for entry in inside(folder)}


def filled(text, run):
    return text.replace("{run}", run).replace("{name}", Path(run).name).replace("{long}", LONG)


def name(bad: Bad) -> str:
    texts = [text.removeprefix(BASE)[-40:] for text in bad.files.values() if text != STUDY]
    return re.sub(r"[^\w.=,:*\[\]-]+", " ", " ".join([*bad.words, *texts])).strip()


@pytest.mark.parametrize("bad", ROWS, ids=name)
def test_bad_input_is_one_line_and_leaves_nothing(bad, place, capsys):
    folder, run = place
    for file, text in bad.files.items():
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(text, encoding="utf-8")
    try:
        before = listing(folder)
        try:
            code = main([filled(word, run) for word in bad.words])
        except SystemExit as error:
            code = error.code
        out, err = capsys.readouterr()
        assert (code, out) == (2, ""), err
        assert err.count("\n") == 1 and err.startswith("lamabench") and "error: " in err, err
        assert re.search(filled(bad.message, run), err), err
        assert listing(folder) == before
    finally:
        for file in bad.files:
            (folder / file).unlink()
            if (folder / file).parent != folder:
                (folder / file).parent.rmdir()


def test_the_table_has_every_command_and_no_row_twice():
    assert len(ROWS) >= 120
    rows = [(tuple(bad.words), *bad.files.items()) for bad in ROWS]
    assert len(set(rows)) == len(rows)
    commands = {bad.words[0] for bad in TABLE if bad.words} | {
        f"sweep {bad.words[1]}" for bad in TABLE if bad.words[:1] == ["sweep"]
    }
    actions = ("plan", "run", "submit", "status", "retry", "cancel", "collect", "prune")
    assert commands >= {
        "train", "sample", "evaluate", "bench", "bench-kernels", "cost", "check", "models", "doctor", "report",
        *(f"sweep {action}" for action in actions),
    }  # fmt: skip
