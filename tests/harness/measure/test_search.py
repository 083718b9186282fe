"""The next measurement of a benchmark, from the rows so far."""

import pytest
from lamabench.harness.measure.search import Point, best_batch, next_batch, next_compiled_batch, next_point
from lamabench.harness.sections import BenchConfig
from lamabench.kernels.errors import InputError


def measured(speeds, seconds=0.001):
    """Rows by batch, from images per second, "oom" or another state."""
    return {
        batch: {"state": "done", "images_per_s": speed, "p50_ms": 1e3 * seconds}
        if isinstance(speed, int | float)
        else {"state": speed}
        for batch, speed in speeds.items()
    }


@pytest.mark.parametrize(
    ("speeds", "batch"),
    [
        ({}, 1),
        ({1: 5.0}, 8),
        ({1: "oom"}, None),
        ({1: 5.0, 8: 30.0}, 16),
        ({1: 5.0, 8: 30.0, 16: 30.1}, 32),  # one doubling without a gain may be chance
        ({1: 5.0, 8: 30.0, 16: 30.1, 32: 30.5}, 48),  # two are not; one and a half times the best, 32
        ({1: 5.0, 8: 30.0, 16: 29.0, 32: 28.0}, 12),
        ({1: 5.0, 8: 30.0, 16: 29.0, 32: 30.7}, 64),  # 2.3 % over the best
        ({1: 5.0, 8: 30.0, 16: 29.0, 32: 28.0, 12: 31.0}, None),
        ({1: 5.0, 8: 30.0, 16: "oom"}, 12),
        ({1: 5.0, 8: 30.0, 16: "oom", 12: "oom"}, None),
        ({1: 5.0, 8: "oom"}, 4),
        ({1: 5.0, 8: "oom", 4: "oom"}, 2),
        ({1: 5.0, 8: "oom", 4: "oom", 2: "oom"}, None),
        ({1: 5.0, 8: "oom", 4: 9.0}, 6),
        ({1: 5.0, 8: "oom", 4: 4.0}, None),  # one and a half images
        ({1: 5.0, 8: "wrong"}, None),
        ({1: "failed"}, None),
    ],
)
def test_batch_search(speeds, batch):
    assert next_batch(measured(speeds), 3.0) == batch


def test_the_batch_search_ends_if_a_call_takes_as_long_as_a_measurement():
    assert next_batch(measured({1: 1.0, 8: 2.0}, seconds=3.0), 3.0) == 12
    assert best_batch(measured({1: 1.0, 8: 2.0, 12: 1.5, 16: "oom"})) == 8
    assert best_batch(measured({1: "oom"})) is None


def test_the_whole_step_is_a_mode_of_training():
    settings = BenchConfig(batch_size=[4, 8], compile=["compile", "whole-step"], modes=["forward", "train"])
    points, _ = fill(settings, 16, lambda point: 1.0)
    kinds = [("forward", "compile")] * 2 + [("train", "compile")] * 2 + [("train", "whole-step")] * 2
    assert [(point.mode, point.compile) for point in points] == kinds
    with pytest.raises(InputError, match=r"bench.compile=whole-step is a mode of training: give bench.modes=\[train\]"):
        BenchConfig(compile=["whole-step"])


def fill(settings, size, speed):
    """The points of a whole sweep in which a point has the outcome `speed(point)`, and the rows."""
    rows, points = [], []
    while (point := next_point(settings, size, rows)) is not None:
        points.append(point)
        (row,) = measured({0: speed(point)}).values()
        rows.append({**point._asdict(), **row})
        assert len(rows) < 100
    return points, rows


def test_a_sweep_of_lists_is_their_product():
    settings = BenchConfig(
        batch_size=[2, 4], compile=["eager", "compile"], input_sizes=[16, 8], checkpointing=[False, True]
    )
    points, _ = fill(settings, 32, lambda point: 1.0)
    assert (
        len(points) == len(set(points)) == 2 * (1 + 2) * 2 * 2
    )  # sizes, forward and two ways of training, kinds, batches
    assert points[0] == Point(16, "forward", False, "eager", 2) and {p.input_size for p in points} == {8, 16}
    assert {p.checkpointing for p in points if p.mode == "forward"} == {False}
    assert {p.input_size for p in fill(BenchConfig(), 32, lambda point: 1.0)[0]} == {32}


def test_auto_batch_compiles_at_the_best_eager_batch_and_its_double():
    settings = BenchConfig(batch_size="auto", modes=["forward"], compile=["compile", "max-autotune"])

    def speed(point):
        if point.compile == "compile":
            return "failed"
        return "oom" if point.batch_size > 16 else float(point.batch_size)

    points, rows = fill(settings, 32, speed)
    assert [(p.compile, p.batch_size) for p in points] == [
        ("eager", 1), ("eager", 8), ("eager", 16), ("eager", 32), ("eager", 24),
        ("compile", 16),  # its double would fail as well
        ("max-autotune", 16), ("max-autotune", 32), ("max-autotune", 24), ("max-autotune", 20),
    ]  # fmt: skip
    for count in range(len(rows)):  # a killed sweep left the first rows
        assert next_point(settings, 32, rows[:count]) == points[count]


@pytest.mark.parametrize("best", [1, 2, 7, 16, 100])
@pytest.mark.parametrize("limit", range(0, 300, 7))
def test_compiled_batches_end_near_the_limit_of_memory(best, limit):
    rows = {}
    while (batch := next_compiled_batch(rows, best)) is not None:
        assert batch >= 1 and batch not in rows
        rows |= measured({batch: 1.0 if batch <= limit else "oom"})
    fitted = best_batch(rows) and max(batch for batch, row in rows.items() if row["state"] == "done")
    assert len(rows) <= 8 and (fitted is None) == (limit == 0)
    if fitted is not None:
        assert fitted == 2 * best or limit <= fitted + max(1, fitted // 4)


def test_a_failed_compilation_ends_the_search_of_a_batch():
    assert next_compiled_batch(measured({8: "failed"}), 8) is None
    assert next_compiled_batch(measured({8: 1.0, 16: "wrong"}), 8) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "bench.batch_size must be numbers above 0, or auto, not"),
        ({"batch_size": [4, "many"]}, "bench.batch_size must be numbers above 0, or auto"),
        ({"batch_size": []}, "bench.batch_size is empty"),
        ({"compile": ["eagre"]}, r"unknown bench.compile 'eagre' \(did you mean 'eager'\?\); choices: eager, compile"),
        ({"modes": ["fly"]}, "unknown bench.modes 'fly'; choices: forward, train"),
        ({"input_sizes": [0]}, "bench.input_sizes must be above 0"),
        ({"seconds": 0.0}, "bench.seconds must be above 0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(InputError, match=message):
        BenchConfig(**settings)
