"""A depthwise convolution and SiLU, channels last: the step before Mamba's scan (arXiv 2312.00752, figure 3)."""

from torch import Tensor

from ..errors import InputError
from ..operator import Backend, Operator, Work
from ..triton_support import triton_reasons
from . import backend_torch, backend_triton, reference


def macs(batch: int, height: int, width: int, channels: int, kernel: int) -> int:
    """Multiply-adds of the convolution: every pixel of every channel meets kernel² weights."""
    return batch * height * width * channels * kernel**2


def work(x: Tensor, weight: Tensor, *_: Tensor | None) -> Work:
    """The work of one call, from the arguments of a backend or of the custom operator: a SiLU for each element."""
    batch, height, width, channels = x.shape
    return Work(macs=macs(batch, height, width, channels, weight.shape[-1]), exponentials=x.numel())


OPERATOR = Operator(
    "depthwise_conv",
    [
        Backend("triton", backend_triton.depthwise_conv_silu, triton_reasons, auto_on=("cuda",)),
        Backend("torch", backend_torch.depthwise_conv_silu),
        Backend("reference", reference.depthwise_conv_silu),
    ],
    work,
    traced={"lamabench::depthwise_conv_silu": work},
)


def depthwise_conv_silu(x: Tensor, weight: Tensor, bias: Tensor | None = None, backend: str = "auto") -> Tensor:
    """SiLU of a k × k convolution of every channel with its own kernel; zeros around the image, sizes unchanged.

    x       [B, H, W, E], may be strided, such as half of the channels of [B, H, W, 2E]
    weight  [E, 1, k, k] with k odd, and bias [E] or None, as in `nn.Conv2d`; may be float32 where x is bfloat16
    returns [B, H, W, E], in the type of x (under autocast, backend `torch` returns autocast's type)

    Raises InputError where the shapes do not fit together.
    """
    channels, k = x.shape[-1], weight.shape[-1]
    if x.ndim != 4 or weight.shape != (channels, 1, k, k) or k % 2 == 0:
        raise InputError(
            f"depthwise_conv: x must be [B, H, W, E] and weight [E, 1, k, k] with k odd, "
            f"not {list(x.shape)} and {list(weight.shape)}"
        )
    if bias is not None and bias.shape != (channels,):
        raise InputError(f"depthwise_conv: bias must be [{channels}], not {list(bias.shape)}")
    return OPERATOR.resolve(backend, x.device.type).run(x, weight, bias)
