"""Encoding into a cache of latents: what diffusers gives for each image, whole after any kill, and refusals."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from lamabench.harness import encoding, latent_shards, signals
from lamabench.harness.config import Config
from lamabench.harness.data import autoencoder, images, latents
from lamabench.harness.data.files import sha256
from lamabench.harness.progress import Progress, Quiet
from lamabench.kernels.errors import InputError
from lamabench.launch.compose import compose
from safetensors.torch import load_file

from ..autoencoders import save_kl, save_tiny

DATA = ["data=synthetic", "data.size=16", "run.device=cpu"]  # 320 images of 10 classes, of which flips are trained on


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Autoencoders, and a cache in shards of 100 images."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked process has no others
    folder = tmp_path_factory.mktemp("autoencoders")
    save_kl(folder / "kl")
    save_kl(folder / "other", seed=1)
    save_kl(folder / "scaled", scaling_factor=0.5)
    save_tiny(folder / "tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latent_shards, "SHARD", 100)
        encode(folder / "kl", folder / "cache")
    yield folder
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(latent_shards, "SHARD", 100)


def config(*words) -> Config:
    return compose([*DATA, *words])[0]


def encode(source, target, *words, **options):
    return encoding.encode(config(*words), str(source), target, Quiet(), **options)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def tensors_of(folder):
    """The tensors of a whole cache, by safetensors alone."""
    shards = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    return {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}


def test_a_cache_has_what_diffusers_gives(place):
    net = save_kl(place / "again")
    data = images.load(config().data)
    pixels = torch.stack([data.image(i) for i in range(len(data))])
    tensors = tensors_of(place / "cache")
    for x, end in ((pixels, ""), (pixels.flip(-1), "_mirrored")):
        with torch.no_grad():
            posterior = net.encode(x.double().div(127.5).sub(1).float()).latent_dist
        assert torch.allclose(tensors[f"mean{end}"], posterior.mean, atol=1e-5)
        assert torch.allclose(tensors[f"logvar{end}"], posterior.logvar, atol=1e-5)
    # A mirrored latent is not the latent of the mirrored image, which is why there are two encodings.
    assert not torch.allclose(tensors["mean"].flip(-1), tensors["mean_mirrored"], atol=1e-3)
    assert tensors["labels"].tolist() == data.labels.tolist()


def test_the_index_says_what_was_encoded(place):
    index = json.loads((place / "cache" / "index.json").read_text())
    data = images.load(config().data)
    assert index["fingerprint"] == data.fingerprint and index["images"] == 320 and index["dtype"] == "float32"
    assert index["data"] == {
        "kind": "synthetic", "name": "", "size": 16, "channels": 3, "num_classes": 10, "split": "train",
    }  # fmt: skip
    assert index["encoder"] == {
        "kind": "AutoencoderKL", "identity": autoencoder.load(str(place / "kl")).identity, "scale": 0.18215,
        "shift": 0.0, "channels": 4, "side": 4, "source": str((place / "kl").resolve()),
    }  # fmt: skip
    assert [shard["images"] for shard in index["shards"]] == [100, 100, 100, 20]
    files = sorted(path.name for path in (place / "cache").iterdir())
    assert files == [*(shard["file"] for shard in index["shards"]), "index.json"]  # and nothing half-written
    for shard in index["shards"]:
        assert sha256(place / "cache" / shard["file"]) == shard["sha256"]


def test_an_autoencoder_without_variances_gives_means_alone(place, tmp_path):
    index = encode(place / "tiny", tmp_path / "cache", "data.flip=false", dtype="float16")
    assert (index.logvar, index.mirrored, index.dtype) == (False, False, "float16")
    tensors = load_file(tmp_path / "cache" / index.shards[0].file)
    assert set(tensors) == {"mean", "labels"} and tensors["mean"].dtype == torch.float16
    net = save_tiny(tmp_path / "tiny")
    data = images.load(config().data)
    with torch.no_grad():
        expected = net.encode(torch.stack([data.image(i) for i in range(100)]).float() / 127.5 - 1).latents
    assert torch.allclose(tensors["mean"].float(), expected, atol=1e-3)


KILLS = {
    "in the first batch": ("encode", 1),
    "in the third shard": ("encode", 5),
    "while a shard is written": ("fsync", 3),
    "before the shard has its name": ("replace", 3),
    "after it has its name": ("replaced", 3),
    "before the index": ("write_index", 1),
    "after the index": ("rmtree", 1),
}


@pytest.mark.parametrize("case", KILLS)
def test_a_killed_encoding_continues(place, tmp_path, case):
    """By SIGKILL, at any point. Whole shards are not encoded again, and the cache is the same to the byte."""
    target = tmp_path / "cache"
    if not (pid := os.fork()):
        kill_at(*KILLS[case])
        encode(place / "kl", target)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    whole = [path.name for path in target.glob("*.safetensors")]
    if case != "after the index":
        with pytest.raises(InputError, match=r"has no index.json"):
            latents.read_index(target)
    with pytest.MonkeyPatch.context() as patch:
        parts = []
        plain = encoding.batches
        patch.setattr(encoding, "batches", lambda data, part, *rest: parts.append(part) or plain(data, part, *rest))
        encode(place / "kl", target)
    names = [f"{part.start:08d}-{part.stop:08d}.safetensors" for part in parts]
    assert sorted(names + whole) == sorted(name for name in content(place / "cache") if name != "index.json")
    assert content(target) == content(place / "cache") and len(list(target.iterdir())) == 5


def kill_at(where, count):
    """Kill this process by SIGKILL at the call number `count` of a function."""
    left = [count]

    def killing(function, after=False):
        def called(*args, **kwargs):
            result = function(*args, **kwargs) if after else None
            if os.fspath(args[-1]).endswith(".safetensors") if where in ("replace", "replaced") else True:
                left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            return result if after else function(*args, **kwargs)

        return called

    if where == "encode":
        autoencoder.Autoencoder.encode = killing(autoencoder.Autoencoder.encode)
    elif where == "write_index":
        encoding.write_index = killing(encoding.write_index)
    elif where == "rmtree":
        shutil.rmtree = killing(shutil.rmtree)
    elif where == "fsync":
        os.fsync = killing(os.fsync)
    else:
        os.replace = killing(os.replace, after=where == "replaced")


def test_a_signal_stops_it_after_a_batch(place, tmp_path, monkeypatch):
    monkeypatch.setattr(autoencoder, "PIXELS", 16 * 16 * 10)
    plain, calls = autoencoder.Autoencoder.encode, []

    def encoded(self, x):
        calls.append(len(x))
        if len(calls) == 25:  # in the second shard: ten batches of a shard, plain and mirrored
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, x)

    monkeypatch.setattr(autoencoder.Autoencoder, "encode", encoded)
    with pytest.raises(KeyboardInterrupt), signals.noted():
        encode(place / "kl", tmp_path / "cache")
    assert calls == [10] * 26
    assert sorted(path.name for path in (tmp_path / "cache").glob("*.safetensors")) == ["00000000-00000100.safetensors"]
    encode(place / "kl", tmp_path / "cache")
    assert len(calls) == 26 + 44  # 20 batches of each of two shards, and 4 of the last one


@pytest.mark.parametrize("damage", ["cut", "gone", "other"])
def test_a_damaged_shard_is_written_again(place, tmp_path, damage):
    target = tmp_path / "cache"
    shutil.copytree(place / "cache", target)
    file = target / "00000100-00000200.safetensors"
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(
            file.read_bytes()[:-1] if damage == "cut" else (target / "00000300-00000320.safetensors").read_bytes()
        )
    times = {path.name: path.stat().st_mtime_ns for path in target.glob("*.safetensors") if path != file}
    encode(place / "kl", target)
    assert content(target) == content(place / "cache")
    assert times == {path.name: path.stat().st_mtime_ns for path in target.glob("*.safetensors") if path != file}


def test_a_changed_byte_is_seen_by_its_checksum(place, tmp_path):
    target = tmp_path / "cache"
    shutil.copytree(place / "cache", target)
    file = target / "00000100-00000200.safetensors"
    changed = bytearray(file.read_bytes())
    changed[-1000] ^= 1
    file.write_bytes(changed)
    encode(place / "kl", target)
    assert file.read_bytes() == changed  # which only a look at every byte shows
    encode(place / "kl", target, verify=True)
    assert content(target) == content(place / "cache")


def test_a_complete_cache_is_left_alone(place, monkeypatch):
    before = content(place / "cache")
    monkeypatch.setattr(autoencoder.Autoencoder, "encode", None)
    encode(place / "kl", place / "cache")
    assert content(place / "cache") == before


REFUSED = {
    "another encoder": (["other"], {}, "encoder.identity [0-9a-f]{12}, not [0-9a-f]{12}"),
    "another scale": (["scaled"], {}, "encoder.scale 0.18215, not 0.5"),
    "another kind": (["tiny"], {}, "encoder.kind AutoencoderKL, not AutoencoderTiny"),
    "another size": (["kl", "data.size=32"], {}, "data.size 16, not 32"),
    "another split": (["kl", "data.split=test"], {}, "data.split train, not test"),
    "no flips": (["kl", "data.flip=false"], {}, "data.flip True, not False"),
    "another type": (["kl"], {"dtype": "float16"}, "dtype float32, not float16"),
}


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize("case", REFUSED)
def test_a_cache_of_something_else_is_refused(place, tmp_path, case, complete):
    (source, *words), options, message = REFUSED[case]
    target = tmp_path / "cache"
    shutil.copytree(place / "cache", target)
    if not complete:
        request = json.loads((target / "index.json").read_text()) | {"shards": [], "device": "cpu"}
        del request["schema"]
        (target / "index.json").unlink()
        (target / ".encoding").mkdir()
        (target / ".encoding" / "request.json").write_text(json.dumps(request))
    before = content(target)
    with pytest.raises(InputError, match=rf"cache has latents with {message}: encode into another folder"):
        encode(place / source, target, *words, **options)
    assert content(target) == before


def test_another_device_does_not_continue_it(place, tmp_path):
    """Its latents would differ by rounding."""
    latent_shards.prepare(tmp_path, {**request_of(place), "device": "cuda"}, None)
    with pytest.raises(InputError, match="latents with device cuda, not cpu"):
        encode(place / "kl", tmp_path)


def request_of(place):
    index = json.loads((place / "cache" / "index.json").read_text())
    return {name: value for name, value in index.items() if name != "schema"}


def test_what_does_not_fit_leaves_nothing(place, tmp_path, monkeypatch):
    target = tmp_path / "cache"
    with pytest.raises(InputError, match=r"data.channels is 1, but the autoencoder takes images of 3"):
        encode(place / "kl", target, "data.channels=1")
    with pytest.raises(InputError, match=r"data.size 18 is not divisible by 4"):
        encode(place / "kl", target, "data.size=18", "model=dit_nano")
    free = shutil.disk_usage(tmp_path)._replace(free=50_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(InputError, match=r"needs .* GiB more, but its disk has .* free; --dtype float16 takes half"):
        encode(place / "kl", target)
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(InputError, match=r"has other files \(note.txt\) and no cache of latents"):
        encode(place / "kl", tmp_path)
    with pytest.raises(InputError, match="is a file; give a folder"):
        encode(place / "kl", tmp_path / "note.txt")
    assert not target.exists()


def test_the_room_is_that_of_the_files(place):
    """The bytes that are checked beforehand are those of the shards, but for their headers."""
    index = latents.read_index(place / "cache")
    size = sum(path.stat().st_size for path in (place / "cache").glob("*.safetensors"))
    assert 0 <= size - 320 * latent_shards.image_bytes(index) < 4 * 600
    assert latent_shards.image_bytes(index) == 4 * 4 * 4 * 4 * 4 + 8  # four tensors, 4 × 4 × 4, float32, and a label


def test_latents_that_are_not_finite_are_no_cache(place, tmp_path):
    net = save_kl(tmp_path / "large")
    with torch.no_grad():
        net.quant_conv.bias.fill_(1e5)  # more than float16 has
    net.save_pretrained(tmp_path / "large")
    with pytest.raises(InputError, match="mean of images 0 to 99 is not finite in float16"):
        encode(tmp_path / "large", tmp_path / "cache", dtype="float16")
    assert not (tmp_path / "cache" / "index.json").exists()


def test_float16_rounds_by_more_than_narrow_posteriors_vary(capsys):
    """In [4, 8), float16 has steps of 2^-8, so that its error is uniform with a deviation of 2^-8 / sqrt(12)."""
    mean = torch.rand(4, 4, 64, 64, generator=torch.manual_seed(0)) * 4 + 4
    logvar = torch.full_like(mean, -17)  # of published autoencoders, most are from -23 to -17
    error, noise = encoding.rounding(mean, logvar, "float16")
    assert error == pytest.approx(2**-8 / 12**0.5, rel=0.02) and noise == pytest.approx(np.exp(-8.5))
    assert error > 5 * noise and encoding.rounding(mean, logvar, "float32")[0] < noise / 100
    encoding.say_rounding({"mean": mean, "logvar": logvar}, "float16", Progress())
    assert "float16 rounds the means by 0.0011" in capsys.readouterr().err
