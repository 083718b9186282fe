"""Programs of Debian that some tests need: SLURM, LaTeX, a browser."""

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

POLICY = Path("/usr/sbin/policy-rc.d")  # Debian's switch against starting services on installation


class PackagesError(Exception):
    """Why programs are missing, in one line."""


def missing(programs: Sequence[str]) -> list[str]:
    return [name for name in programs if not shutil.which(name)]


def obstacle(packages: Sequence[str]) -> str:
    """Why packages cannot be installed here, in words; empty if they can."""
    if not shutil.which("apt-get"):
        return f"needs Debian or Ubuntu, or their packages {' '.join(packages)} installed"
    return f"needs root to install {' '.join(packages)}" if os.geteuid() else ""


def install(packages: Sequence[str], programs: Sequence[str]) -> None:
    """Install the packages if a program is missing, without their services being started. Raises PackagesError if that
    is impossible here or fails."""
    if not missing(programs):
        return
    if why := obstacle(packages):
        raise PackagesError(why)
    print(f"installing {' '.join(packages)}", flush=True)
    ours = not POLICY.exists()
    if ours:
        POLICY.write_text("#!/bin/sh\nexit 101\n")
        POLICY.chmod(0o755)
    try:
        for words in (["update"], ["install", "-y", "--no-install-recommends", *packages]):
            env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
            done = subprocess.run(["apt-get", "-q", *words], env=env, capture_output=True, text=True)
            if done.returncode:
                raise PackagesError(f"apt-get {words[0]} failed: {last_line(done.stderr)}")
    finally:
        if ours:
            POLICY.unlink()
    if absent := missing(programs):
        raise PackagesError(f"{' '.join(packages)} came without {' '.join(absent)}")


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["(no output)"])[-1]
