"""The kernels of a call by class, and `lamabench bench --profile`."""

import json
from types import SimpleNamespace

import pytest
from lamabench.harness.measure import profiling
from lamabench.harness.measure.search import Point
from lamabench.launch.cli import main
from measuring import DIT, NANO, make

KERNELS = [
    ("scan_backward", "", "scan backward"),
    ("scan_segments", "", "scan backward"),
    ("void selective_scan_fwd_kernel<Selective_Scan_fwd_kernel_traits<32, 4>>", "", "scan forward"),  # mamba-ssm's
    ("void selective_scan_bwd_kernel<Selective_Scan_bwd_kernel_traits<32, 4>>", "", "scan backward"),
    ("scan_forward_pairs", "", "scan forward"),
    ("prepare_tokens", "lamabench::selective_scan_cuda", "scan forward"),
    ("prepare_tokens", "lamabench::selective_scan_cuda_backward", "scan backward"),
    ("triton_red_fused_native_layer_norm_backward_sum_12", "", "reductions"),
    ("triton_per_fused_add_mul_sum_3", "", "reductions"),
    ("triton_poi_fused_convolution_native_layer_norm_7", "", "pointwise"),
    ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float>>", "aten::sum", "reductions"),
    ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float>", "", "reductions"),
    ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "", "optimizer"),
    ("void at::native::distribution_elementwise_grid_stride_kernel<normal>", "", "pointwise"),
    ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT", "aten::addmm", "products"),
    ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x64x64", "", "products"),
    ("void cublasLt::splitKreduce_kernel<32, 16>", "", "products"),
    ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc", "aten::cudnn_convolution", "other"),
    ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc", "", "other"),  # in a CUDA graph
    ("forward", "lamabench::gated_norm", "other"),
    ("attend_backward", "", "other"),
    ("pytorch_flash::flash_fwd_kernel<cutlass::half_t>", "", "other"),
    ("Memcpy DtoD (Device -> Device)", "", "pointwise"),
    ("what", "", "other"),
]


@pytest.mark.parametrize(("kernel", "operator", "name"), KERNELS)
def test_classes(kernel, operator, name):
    assert profiling.class_of(kernel, operator) == name


def test_rows_of_the_events_of_a_gpu():
    """Kernels that an operator started have its name and shapes, those of a CUDA graph have neither, and a mark of the
    user is no kernel."""

    def kernel(name, microseconds, **more):
        time = SimpleNamespace(elapsed_us=lambda: microseconds)
        return SimpleNamespace(name=name, device_type=SimpleNamespace(name="CUDA"), time_range=time, kernels=[], **more)

    def operator(name, shapes, *kernels):
        started = [SimpleNamespace(name=one, duration=time) for one, time in kernels]
        return SimpleNamespace(name=name, device_type=SimpleNamespace(name="CPU"), input_shapes=shapes, kernels=started)

    events = [
        operator("aten::sum", [[4, 8], []], ("reduce_kernel", 10.0)),
        operator("aten::sum", [[4, 8], []], ("reduce_kernel", 20.0)),
        operator("aten::mean", [[2, 2]], ("reduce_kernel", 5.0)),
        operator("aten::empty", [[]]),
        operator("cudaLaunchKernel", [], ("reduce_kernel", 20.0)),
        *(kernel("reduce_kernel", time) for time in (10.0, 20.0, 5.0, 7.0)),
        kernel("scan_backward", 1000.0, is_user_annotation=False),
        kernel("Optimizer.step#AdamW.step", 9999.0, is_user_annotation=True),
    ]
    rows = profiling.rows_of(events, "cuda:0")
    assert [tuple(row.values()) for row in rows] == [
        ("reductions", "reduce_kernel", "aten::sum", 2, pytest.approx(0.03), "4×8 (2)"),
        ("reductions", "reduce_kernel", "", 1, pytest.approx(0.007), ""),
        ("reductions", "reduce_kernel", "aten::mean", 1, pytest.approx(0.005), "2×2 (1)"),
        ("scan backward", "scan_backward", "", 1, pytest.approx(1.0), ""),
    ]
    assert [(row["class"], row["count"], row["share"]) for row in profiling.totals(rows)] == [
        ("scan backward", 1, pytest.approx(1 / 1.042)), ("reductions", 4, pytest.approx(0.042 / 1.042)), ("all", 5, 1.0)
    ]  # fmt: skip
    assert profiling.totals([]) == [{"class": "all", "count": 0, "ms": 0, "share": 0}]


def test_the_products_of_a_step_are_three_times_those_of_a_forward_pass():
    config = make()

    def products(mode):
        point = Point(DIT.input_size, mode, False, "eager", 2)
        rows = profiling.profiled(DIT, point, "float32", config.backend, config.objective, "cpu")
        assert {"products", "reductions", "pointwise"} <= {row["class"] for row in rows}
        return sum(row["count"] for row in rows if row["class"] == "products")

    forward, train = products("forward"), products("train")
    assert 2 * forward < train <= 3 * forward


def test_the_command_lists_kernels_and_records_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["bench", "dit_nano", "depth=1", "bench.batch_size=2", "bench.modes=[train]", "run.device=cpu", "--profile"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "Mode train, Compile eager, Batch 2" in printed and "aten::addmm" in printed and "reductions" in printed
    assert not list(tmp_path.rglob("record.jsonl"))
    assert main([*words, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {"model", "mode", "class", "kernel", "count", "ms", "shapes"} <= rows[0].keys()
    assert main([*words, "bench.checkpointing=[false,true]"]) == 0
    titles = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Model dit_nano")]
    assert len(set(titles)) == 2 and titles[1] == f"{titles[0]}, checkpointed"
    assert main([word.replace("=2", "=auto") for word in words]) == 2
    assert "--profile lists the kernels of a given batch" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["compile", "whole-step"])
def test_a_step_on_the_gpu_has_scans_both_ways(kind):
    config = make(NANO)
    point = Point(NANO.input_size, "train", False, kind, 8)
    rows = profiling.profiled(NANO, point, "bfloat16", config.backend, config.objective, "cuda")
    classes = {row["class"]: row for row in profiling.totals(rows)}
    assert {"scan forward", "scan backward", "products", "reductions", "optimizer"} <= classes.keys()
    assert kind == "whole-step" or any(row["operator"] for row in rows)
