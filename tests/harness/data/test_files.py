"""Fingerprints count every byte, and no file is read twice."""

import builtins
import os
import time
from pathlib import Path

import numpy as np
import pytest
from lamabench.harness.data import files as data_files
from lamabench.harness.data.files import entries, fingerprint, known_fingerprint
from lamabench.kernels.errors import InputError
from PIL import Image

LONG_AGO = 10**18  # nanoseconds: 2001


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lamabench" / "data"


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the images that were opened."""
    original, names = builtins.open, []

    def watched(file, *rest, **options):
        if str(file).endswith(".bmp"):
            names.append(Path(file).name)
        return original(file, *rest, **options)

    monkeypatch.setattr(builtins, "open", watched)
    return names


def folder_of_images(root: Path, count: int = 5) -> list[Path]:
    root.mkdir(exist_ok=True)
    for i in range(count):
        Image.fromarray(np.full((4, 4), i, dtype=np.uint8)).save(root / f"{i}.bmp")
        os.utime(root / f"{i}.bmp", ns=(LONG_AGO, LONG_AGO))
    return sorted(root.glob("*.bmp"))


def edit(file: Path, at: int = -1, time_ns: int | None = None) -> None:
    """Change one byte in place."""
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)
    if time_ns is not None:
        os.utime(file, ns=(time_ns, time_ns))


def test_a_folder_for_compiled_code_holds_no_fingerprints(tmp_path, opened, cache, monkeypatch):
    """A training moves compiled code below the root of its runs after it has read the names of its images."""
    files = folder_of_images(tmp_path / "set")
    first = fingerprint(tmp_path / "set", files)
    opened.clear()
    monkeypatch.setenv("LAMABENCH_NVRTC_CACHE_DIR", str(tmp_path / "compiled"))
    assert fingerprint(tmp_path / "set", files) == first and not opened
    assert [*cache.iterdir()] and not (tmp_path / "compiled").exists()


def test_the_second_fingerprint_reads_no_file(tmp_path, opened):
    files = folder_of_images(tmp_path / "set")
    opened.clear()
    assert known_fingerprint(tmp_path / "set", files) is None and not opened
    first = fingerprint(tmp_path / "set", files)
    assert sorted(opened) == [file.name for file in files]
    opened.clear()
    assert fingerprint(tmp_path / "set", files) == known_fingerprint(tmp_path / "set", files) == first
    assert not opened
    for name in "abc":
        (tmp_path / "set" / f"{name}.bmp").write_bytes(files[0].read_bytes())
    more = sorted((tmp_path / "set").glob("*.bmp"))
    assert known_fingerprint(tmp_path / "set", more) is None
    assert fingerprint(tmp_path / "set", more) != first
    assert sorted(opened) == ["a.bmp", "b.bmp", "c.bmp"]


def test_pixels_and_names_count_but_times_do_not(tmp_path, opened):
    files = folder_of_images(tmp_path / "set")
    first = fingerprint(tmp_path / "set", files)
    opened.clear()
    os.utime(files[1], ns=(LONG_AGO + 1, LONG_AGO + 1))
    assert fingerprint(tmp_path / "set", files) == first and opened == ["1.bmp"]
    opened.clear()
    size = files[2].stat().st_size
    edit(files[2], time_ns=LONG_AGO + 1)
    assert files[2].stat().st_size == size
    opened.clear()
    assert fingerprint(tmp_path / "set", files) != first and opened == ["2.bmp"]
    edit(files[2])
    assert fingerprint(tmp_path / "set", files) == first
    files[4].rename(tmp_path / "set" / "5.bmp")
    assert fingerprint(tmp_path / "set", [*files[:4], tmp_path / "set" / "5.bmp"]) != first


def test_two_edits_within_a_tick_of_the_clock(tmp_path):
    """On a file system that counts time in whole seconds, the second edit changes neither size nor time."""
    files = folder_of_images(tmp_path / "set")
    tick = time.time_ns() // 10**9 * 10**9
    os.utime(files[0], ns=(tick, tick))
    first = fingerprint(tmp_path / "set", files)
    edit(files[0], time_ns=tick)
    assert known_fingerprint(tmp_path / "set", files) is None
    assert fingerprint(tmp_path / "set", files) != first


@pytest.mark.parametrize("damage", ["torn", "other", "folder", "read-only"])
def test_a_useless_cache_only_costs_time(tmp_path, cache, damage, monkeypatch):
    files = folder_of_images(tmp_path / "set")
    first = fingerprint(tmp_path / "set", files)
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    if damage == "torn":
        file.write_bytes(whole[: len(whole) // 2])
    elif damage == "other":
        np.savez(file, names=np.zeros(3, np.uint8), sizes=np.zeros(2), times=np.zeros(1), digests=np.zeros(40))
    elif damage == "folder":
        file.unlink()
        file.mkdir()
    else:
        file.unlink()
        monkeypatch.setattr(data_files, "write_atomically", lambda *_: (_ for _ in ()).throw(PermissionError(13, "no")))
    assert known_fingerprint(tmp_path / "set", files) is None
    assert fingerprint(tmp_path / "set", files) == first
    assert list(cache.glob(".*")) == []


def test_files_read_before_a_bad_one_are_not_read_again(tmp_path, opened, monkeypatch):
    monkeypatch.setattr(data_files, "PART", 2)
    files = folder_of_images(tmp_path / "set")
    good = files[4].read_bytes()
    files[4].write_bytes(b"no image")
    with pytest.raises(InputError, match=r"unreadable image .*/4\.bmp: cannot identify image file$"):
        fingerprint(tmp_path / "set", files)
    files[4].write_bytes(good)
    opened.clear()
    fingerprint(tmp_path / "set", files)
    assert opened == ["4.bmp"]


def torn(file: Path) -> None:
    """Half of the pixels; the header is whole."""
    content = file.read_bytes()
    file.write_bytes(content[: len(content) - 8])


def test_a_file_with_a_whole_header_is_decoded(tmp_path):
    files = folder_of_images(tmp_path / "set")
    whole = fingerprint(tmp_path / "set", files)
    good = files[2].read_bytes()
    torn(files[2])
    with Image.open(files[2]) as image:
        assert image.size == (4, 4)
    with pytest.raises(InputError, match=r"^unreadable image .*/2\.bmp: image file is truncated \(.*\)$"):
        fingerprint(tmp_path / "set", files)
    assert known_fingerprint(tmp_path / "set", files) is None
    files[2].write_bytes(good)
    assert fingerprint(tmp_path / "set", files) == whole


def test_all_damaged_files_are_counted_and_the_first_are_named(tmp_path):
    files = folder_of_images(tmp_path / "set", 9)
    for file in files[1:8]:
        torn(file)
    files[1].unlink()
    with pytest.raises(InputError) as error:
        fingerprint(tmp_path / "set", files)
    text = str(error.value)
    assert text.startswith("7 of 9 images are unreadable (") and "1.bmp: No such file or directory; " in text
    assert [name for name in "012345678" if f"/{name}.bmp: " in text] == list("12345")
    assert "and 2 more)" in text and "data check" in text and "\n" not in text


@pytest.mark.parametrize("kind", ["GIF", "PPM", "EPS", "TIFF"])
def test_a_file_of_another_format_is_damaged_whatever_its_suffix(tmp_path, kind):
    """Pillow would start Ghostscript for EPS."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", kind)
    with pytest.raises(InputError, match=r"a\.png: cannot identify image file"):
        fingerprint(tmp_path, [tmp_path / "a.png"])


def test_a_stereo_picture_of_a_phone_is_a_jpeg(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))])
    assert [(one.width, one.height, one.mode) for one in entries(tmp_path, [tmp_path / "a.jpg"])] == [(8, 8, "RGB")]


def test_sizes_and_modes_are_cached(tmp_path, opened):
    folder_of_images(tmp_path / "set", 2)
    Image.new("RGB", (7, 3)).save(tmp_path / "set" / "x.bmp")
    os.utime(tmp_path / "set" / "x.bmp", ns=(LONG_AGO, LONG_AGO))
    files = sorted((tmp_path / "set").glob("*.bmp"))
    first = entries(tmp_path / "set", files)
    assert [entry[3:] for entry in first] == [(4, 4, "L"), (4, 4, "L"), (7, 3, "RGB")]
    opened.clear()
    assert entries(tmp_path / "set", files) == first and not opened


def test_a_cache_of_a_version_without_decoding_is_not_used(tmp_path, cache, opened):
    files = folder_of_images(tmp_path / "set")
    first = fingerprint(tmp_path / "set", files)
    (file,) = cache.iterdir()
    with np.load(file) as arrays:
        older = {name: arrays[name] for name in ("names", "sizes", "times", "digests")}
    np.savez(file, **older)
    opened.clear()
    assert known_fingerprint(tmp_path / "set", files) is None and not opened
    assert fingerprint(tmp_path / "set", files) == first and len(opened) == 5


def test_a_large_set_reports_its_progress(tmp_path, monkeypatch):
    monkeypatch.setattr(data_files, "PART", 2)
    files, lines = folder_of_images(tmp_path / "set"), []
    fingerprint(tmp_path / "set", files, lines.append)
    assert lines == []  # it was quick
    monkeypatch.setattr(data_files, "SAY_S", 0.0)
    for file in files:
        os.utime(file)
    fingerprint(tmp_path / "set", files, lines.append)
    assert lines == [f"reading {done} of 5 files of {tmp_path / 'set'}" for done in (0, 2, 4)]


def test_names_of_any_bytes(tmp_path):
    odd = tmp_path / "set" / os.fsdecode(b"a\nb\xff.bmp")
    folder_of_images(tmp_path / "set", 1)[0].rename(odd)
    first = fingerprint(tmp_path / "set", [odd])
    assert known_fingerprint(tmp_path / "set", [odd]) == first
