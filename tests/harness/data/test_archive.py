"""A bad archive is an error of one line, and no array is read that is larger than the memory."""

import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from lamabench.harness.data import archive as archive_module
from lamabench.harness.data.archive import npz_headers, read_npz
from lamabench.kernels.errors import InputError


def header(shape: str, descr: str = "|u1") -> bytes:
    """The header of a .npy file that declares a shape, without the array."""
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}"
    text += " " * (-(len(text) + 11) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


def archive(path: Path, content: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("images.npy", content)
    return path


BAD = {
    "64 TB": (header("(64000000000000,)") + b"\0" * 64, r"should be uint8 \[64000000000000\], but has 64 bytes"),
    "short": (header("(4, 4)") + b"\0" * 9, "but has 9 bytes"),
    "negative": (header("(-4, 4)") + b"\0" * 16, "but has 16 bytes"),
    "objects": (header("(1,)", "|O") + b"\x80\x04N.", "allow_pickle"),
    "no array": (b"hello", "."),
    "long header": (header("(" + "1," * 20000 + ")") + b"\0", "."),
}


@pytest.mark.parametrize("name", BAD)
def test_headers_that_do_not_match_the_array(tmp_path, name):
    content, words = BAD[name]
    path = archive(tmp_path / "x.npz", content)
    with pytest.raises(InputError, match=rf"x\.npz is not a readable \.npz file: .*{words}") as caught:
        read_npz(path, ("images",))
    assert "\n" not in str(caught.value)


def test_an_array_larger_than_the_memory(tmp_path, monkeypatch):
    """A zip bomb: a small file whose header is true."""
    path = archive(tmp_path / "x.npz", header("(16777216,)") + bytes(2**24))
    assert path.stat().st_size < 2**16
    assert read_npz(path, ("images",))["images"].shape == (2**24,)
    pages = {"SC_PHYS_PAGES": 2**20, "SC_PAGE_SIZE": 8}
    monkeypatch.setattr(os, "sysconf", pages.__getitem__)
    with pytest.raises(
        InputError, match=r"array images of .*x\.npz would take 0\.0 GiB of memory, but this machine has 0\.0"
    ):
        read_npz(path, ("images",))


def test_a_zip_bomb_is_not_read(tmp_path, monkeypatch):
    """Beyond a size, an array may not be hundreds of times larger than its file. Real images are not."""
    monkeypatch.setattr(archive_module, "BOMB_BYTES", 2**20)
    bomb = archive(tmp_path / "x.npz", header("(2097152,)") + bytes(2**21))
    monkeypatch.setattr(np.lib.format, "read_array", lambda *_, **__: pytest.fail("the array was read"))
    for read in (read_npz, npz_headers):
        with pytest.raises(InputError, match=r"array images of .*x\.npz would have 0\.0 GiB, but its file has only"):
            read(bomb, ("images",))
    for content in (bytes(2**19), np.random.default_rng(0).bytes(2**21)):  # small, or as large as its file
        path = archive(tmp_path / "x.npz", header(f"({len(content)},)") + content)
        assert npz_headers(path, ("images", "labels")) == {"images": ((len(content),), np.dtype("u1"))}


def test_files_that_are_not_archives(tmp_path):
    whole = archive(tmp_path / "whole.npz", header("(4096,)") + np.random.default_rng(0).bytes(4096)).read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 255
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((2, 8, 8, 1), np.uint8))
    contents = {
        "torn": whole[:-30],
        "flipped": bytes(flipped),
        "plain": buffer.getvalue(),
        "text": b"hello",
        "none": b"",
    }
    for name, content in contents.items():
        path = tmp_path / f"{name}.npz"
        path.write_bytes(content)
        with pytest.raises(InputError, match=rf"{name}\.npz is not a readable \.npz file: \S"):
            read_npz(path, ("images",))
    assert read_npz(tmp_path / "whole.npz", ("labels",)) == {}
