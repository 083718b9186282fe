"""NVRTC compiles the CUDA C++ of the scans without a GPU, once, and says what it refuses."""

import pytest
from lamabench.kernels import nvrtc
from lamabench.kernels.selective_scan import backend_cuda

KERNELS = {
    "scan_prepare.cu": ("prepare_tokens", {}),
    "scan_forward.cu": ("scan_forward", {"W_REGISTERS": 1, "BLOCKS_AN_SM": 2, "KEEP": 2}),
    "scan_backward.cu": ("scan_segments", {"WARPS": 4, "BLOCKS_AN_SM": 2, "KEPT": 0, "SEGMENTED": 1}),
}


@pytest.mark.parametrize("file", KERNELS)
@pytest.mark.parametrize(("capability", "sizes"), [("90", (4, 16, 20, 64, 0)), ("80", (1, 1, 3, 33, 1))])
def test_cuda_compiles_and_is_cached(file, capability, sizes, tmp_path, monkeypatch):
    """NVRTC needs no GPU, so that the code for a user's GPU compiles here. It compiles once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    name, more = KERNELS[file]
    constants = (*zip(("K", "N", "R", "E", "EXACT"), sizes, strict=True), *more.items())
    compile_source = nvrtc.compile_source.__wrapped__
    code = compile_source((backend_cuda.COMMON, backend_cuda.FOLDER / file), constants, capability)
    assert code.startswith(b"\x7fELF") and name.encode() in code
    monkeypatch.setattr(nvrtc, "_compile", None)
    assert compile_source((backend_cuda.COMMON, backend_cuda.FOLDER / file), constants, capability) == code
    assert len(list(tmp_path.rglob("*"))) == 2  # the folder and the code, nothing half-written


def test_compiler_errors_are_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"(?s)NVRTC refused scan_prepare.cu.*scan_prepare.cu\(\d+\): error"):
        nvrtc.compile_source((backend_cuda.FOLDER / "scan_prepare.cu",), (), "90")
