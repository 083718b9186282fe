"""Programs of Debian for tests: installed once, without services, and otherwise refused in one line."""

import os

import pytest

from . import packages

APT = """#!/bin/sh
echo "$@" >>{log}
case "$1$2" in
  -qinstall) test -e {policy} && printf '#!/bin/sh\n' >{program} && chmod +x {program} ;;
esac
{end}
"""


@pytest.fixture
def apt(tmp_path, monkeypatch):
    """A machine with no program but an apt-get that installs `latex`; returns a function that sets how it ends."""
    monkeypatch.setattr(packages, "POLICY", tmp_path / "policy")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/bin")

    def write(end="", program="latex-of-the-test"):
        text = APT.format(log=tmp_path / "log", policy=tmp_path / "policy", program=tmp_path / "bin" / program, end=end)
        (tmp_path / "bin/apt-get").write_text(text)
        (tmp_path / "bin/apt-get").chmod(0o755)

    return write


def test_what_is_missing_is_installed_once_and_starts_no_service(apt, tmp_path):
    apt()
    for _ in range(2):
        packages.install(["latex-package"], ["latex-of-the-test"])
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines == ["-q update", "-q install -y --no-install-recommends latex-package"]
    assert not (tmp_path / "policy").exists()


def test_a_refusal_is_one_line(apt, tmp_path, monkeypatch):
    apt("echo broken >&2; exit 100")
    with pytest.raises(packages.PackagesError, match=r"^apt-get update failed: broken$"):
        packages.install(["latex-package"], ["latex-of-the-test"])
    assert not (tmp_path / "policy").exists()
    apt(program="another")
    with pytest.raises(packages.PackagesError, match=r"^latex-package came without latex-of-the-test$"):
        packages.install(["latex-package"], ["latex-of-the-test"])
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(packages.PackagesError, match=r"^needs root to install latex-package$"):
        packages.install(["latex-package"], ["latex-of-the-test"])
    (tmp_path / "bin/apt-get").unlink()
    monkeypatch.setenv("PATH", f"{tmp_path}/bin")
    with pytest.raises(packages.PackagesError, match=r"^needs Debian or Ubuntu, or their packages latex-package"):
        packages.install(["latex-package"], ["latex-of-the-test"])
