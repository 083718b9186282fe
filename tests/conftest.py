"""What the tests of several kernels need."""

import os
import shutil
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from lamabench.models import mixers, plugins, registry

from . import packages


def pytest_runtest_setup(item):
    """A test with the marker `debian` gets its programs, or is skipped with the reason."""
    if mark := item.get_closest_marker("debian"):
        needed = mark.kwargs
        if packages.missing(needed["programs"]) and (why := packages.obstacle(needed["packages"])):
            pytest.skip(why)
        packages.install(**needed)


@pytest.fixture
def poison(monkeypatch):
    """Memory that a kernel does not write is NaN."""
    empty = torch.empty

    def full(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", full)


@pytest.fixture
def another_user():
    """A folder that everybody can enter, and a context in which files are opened without root's permissions."""

    @contextmanager
    def acting():
        if os.geteuid():
            yield
            return
        os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(0)

    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder, acting
    for path in folder.rglob("*"):
        if path.is_dir():
            path.chmod(0o755)
    shutil.rmtree(folder)


@pytest.fixture
def traced(monkeypatch):
    """torch.compile without its code generation, which takes minutes on a CPU: traced graphs run operator by operator.
    Lists the arguments of its calls."""
    from lamabench.harness import sampling

    compile_, calls = torch.compile, []

    def compile_traced(net, **options):
        calls.append(options)
        return compile_(net, backend="aot_eager", **options)

    monkeypatch.setattr(torch, "compile", compile_traced)
    monkeypatch.setattr("lamabench.harness.sampling._kept", sampling._Kept())
    return calls


@pytest.fixture
def registered():
    """What a test registers, mixers, families and plug-ins, is gone after it. It begins without plug-ins."""
    registry.families()
    tables = (registry._FAMILIES, mixers.MIXERS, plugins._LOADED)
    copies, modules = [dict(table) for table in tables], set(sys.modules)
    plugins._LOADED.clear()
    yield
    for table, copy in zip(tables, copies, strict=True):
        table.clear()
        table.update(copy)
    for name in set(sys.modules) - modules:
        if name.startswith(plugins.PREFIX):
            del sys.modules[name]
