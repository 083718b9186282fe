"""Token mixers: [B, H, W, C] -> the same shape. A block has a list of them, so that an ablation is data.

An entry of a model's `mixers` is a kind (`window`) or a mapping with its own settings ({kind: window, size: 4}). It
becomes a `Mixer`, a small dataclass that builds the module. Importing this package registers the kinds of the suite.
"""

from .attention import GlobalAttention, GlobalMixer, WindowAttention, WindowMixer
from .convolution import ConvMixer, ConvolutionMixer
from .entries import stage_mixers
from .mixer import EMPTY, MIXERS, Mixer, register_mixer
from .scan import SS2D, SSMMixer
from .ssd import SSD2D, SSDMixer

__all__ = [
    "EMPTY",
    "MIXERS",
    "SS2D",
    "SSD2D",
    "ConvMixer",
    "ConvolutionMixer",
    "GlobalAttention",
    "GlobalMixer",
    "Mixer",
    "SSDMixer",
    "SSMMixer",
    "WindowAttention",
    "WindowMixer",
    "register_mixer",
    "stage_mixers",
]
