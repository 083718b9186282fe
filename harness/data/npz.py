"""Images in an .npz file."""

import numpy as np

from ...kernels.errors import InputError
from ..sections import DataConfig
from .archive import npz_headers, read_npz
from .arrays import Arrays, check_size
from .files import line_of
from .image_data import data_path


def npz(config: DataConfig) -> Arrays:
    """An .npz file with `images` uint8 [N, H, W, C] or [N, H, W] and optional integer `labels` [N], from class 0 to the
    highest label. Where there are no `images`, `arr_0` and `arr_1` are taken, as in the files of ADM's evaluator."""
    path = data_path(config)
    name, of_labels = "images", "labels"
    if name not in (headers := npz_headers(path, (name, of_labels))):
        name, of_labels = "arr_0", "arr_1"
        headers = npz_headers(path, (name, of_labels))
    if name not in headers:
        raise InputError(f"{line_of(path)} has no array 'images' (uint8 [N, H, W, C] or [N, H, W])")
    shape, kind = headers[name]
    if kind != np.uint8 or len(shape) not in (3, 4) or 0 in shape[1:]:
        raise InputError(f"{line_of(path)}: {name} is {kind} {list(shape)}, not uint8 [N, H, W, C] or [N, H, W]")
    if (channels := (*shape, 1)[3]) != config.channels:
        hint = f"; set it to {channels}" if channels in (1, 3) else ""
        raise InputError(f"data.channels is {config.channels}, but the images of {line_of(path)} have {channels}{hint}")
    check_size(config, shape[0])
    arrays = read_npz(path, (name, of_labels))
    labels = arrays.get(of_labels, np.zeros(shape[0], dtype=np.int64))
    fits = labels.dtype.kind in "iu" and labels.shape == shape[:1]
    if not fits or labels.astype(np.int64).min(initial=0) < 0:
        actual = f"{labels.dtype} {list(labels.shape)}"
        raise InputError(f"{line_of(path)}: {of_labels} is {actual}, not [{shape[0]}] integers of 0 or more")
    labels = labels.astype(np.int64)
    names = [str(i) for i in range(len(np.unique(labels)))]
    return Arrays(arrays[name].reshape(*shape[:3], channels), labels, names)
