"""The commit of the code, also in a checkout of another user."""

import os
import subprocess

from lamabench.harness import provenance


def test_the_commit_of_a_checkout_of_another_user(another_user, monkeypatch):
    """git trusts no folder of another user, but a record without a commit would not tell what ran."""
    folder, _ = another_user
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b"]
    (folder / "harness").mkdir()
    (folder / "harness" / "provenance.py").write_text("# a copy\n")
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "m"]):
        subprocess.run([*git, *words], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    monkeypatch.setattr(provenance, "__file__", str(folder / "harness" / "provenance.py"))
    if os.geteuid() == 0:
        for path in (folder, *folder.rglob("*")):
            os.chown(path, 65534, 65534)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_SYSTEM", os.devnull)
    assert provenance.code() == {"commit": commit, "dirty": False}
    (folder / "harness" / "provenance.py").write_text("# changed\n")
    assert provenance.code() == {"commit": commit, "dirty": True}
