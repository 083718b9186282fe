"""The roofline of operators."""

from pathlib import Path
from typing import Any

import lamabench.reports as package
import numpy as np
import pytest
from lamabench.reports.roofline import points, roofline
from lamabench.reports.runs import read
from run_folders import H100, Line, line, write

MEMORY, PEAK, EXPONENTIALS = 2e12, 1e15, 4e12  # bytes, FLOPs and exponentials per second


def timed(flops: float, exponentials: float, memory: float, ms: float, backend: str = "triton", **more: Any) -> Line:
    floors = {"flops": flops / PEAK, "exponentials": exponentials / EXPONENTIALS, "bytes": memory / MEMORY}
    fields = {f"{name}_floor_ms": 1000 * seconds for name, seconds in floors.items()}
    fields |= {"bytes_per_s": MEMORY, "flops_per_s": PEAK, "exponentials_per_s": EXPONENTIALS}
    same = {"operator": "attention", "shape": "q 2", "pass": "forward", "precision": "bfloat16", "input_size": 32}
    return line("operator_speed", p50_ms=ms, backend={"attention": backend}, provenance=H100, **same | fields | more)


def test_points_and_roof(tmp_path: Path) -> None:
    lines = [
        timed(3e9, 0, 1e8, 2.0),
        timed(6e9, 5e8, 1e8, 4.0, "torch", disturbed="busy", shape="q 4"),
        timed(9e9, 0, 1e8, 8.0, **{"pass": "forward+backward"}),
        timed(9e9, 0, 1e8, 1.0, precision="float32"),  # another setting has more
    ]
    runs = read([write(tmp_path, "one", lines)])
    figure = roofline(runs)
    assert not isinstance(figure, str)
    flops, exponentials = figure.axes
    roof, *drawn, crosses = flops.lines
    data = {(line.get_marker(), str(line.get_markerfacecolor())): np.ravel(line.get_data()).tolist() for line in drawn}
    expected = {
        ("s", "#0072B2"): [30.0, 1.5e12],
        ("o", "#0072B2"): [60.0, 1.5e12],
        ("s", "white"): [90.0, 9e9 / 8e-3],
    }
    assert data == {key: pytest.approx(values) for key, values in expected.items()}
    np.testing.assert_allclose(crosses.get_data(), [[60.0], [1.5e12]])
    x, y = (np.asarray(values) for values in roof.get_data())
    np.testing.assert_allclose(y, np.minimum(PEAK, MEMORY * x))
    assert x[1] == pytest.approx(PEAK / MEMORY)
    np.testing.assert_allclose(np.ravel(exponentials.lines[1].get_data()), [5.0, 5e8 / 4e-3])
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["attention", "torch", "triton"]
    caption = figure.get_supxlabel().replace("\n", " ")
    assert caption.startswith("NVIDIA H100 80GB HBM3, bfloat16. Filled: forward;") and "Crosses: something" in caption


def test_no_point_of_the_committed_records_is_above_its_roof() -> None:
    records = Path(str(package.__file__)).parent / "records" / "bench-kernels"
    runs = read([records])
    assert roofline(runs).__class__.__name__ == "Figure"
    rows = [row for run in runs for row in run.rows if row["kind"] == "operator_speed" and row["state"] == "done"]
    for kind in ("flops", "exponentials"):
        drawn = points(rows, kind)
        assert len(drawn) > 100
        for point in drawn:
            limits = point.row["bytes_per_s"] * point.intensity, point.row[f"{kind}_per_s"]
            assert point.rate < min(limits)
            if point.row["floor"] in (kind, "bytes"):  # the distance from the roof is what the table has
                assert min(limits) / point.rate == pytest.approx(point.row["times_floor"])


def test_without_floors_there_is_no_roofline(tmp_path: Path) -> None:
    bare = {f"{name}_per_s": None for name in ("bytes", "flops", "exponentials")}
    text = "no operator was timed beside the floors of its machine"
    assert roofline(read([write(tmp_path, "one", [timed(1.0, 1.0, 1.0, 1.0, **bare)])])) == text
