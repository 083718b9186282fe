"""Scan paths: the orders in which a 2-D grid of tokens is read, and their inverses (SPEC.md, section 1)."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import unknown

# Paths of each kind of scan, with a set of parameters for each.
DIRECTIONS = {
    "continuous": 4, "cross": 4, "bidirectional": 2, "unidirectional": 1, "bidirectional_4": 4, "unidirectional_4": 4,
}  # fmt: skip


class ScanPaths(NamedTuple):
    """`order[k, l]` is the token that path k visits at step l; `inverse[k, order[k, l]] = l`. Both int64 [K, L].

    `pairs` names two paths after two paths that are each other's reverse: (0, 2, 1, 3) are 0 and 2, 1 and 3. It is
    empty where not every path has a partner.
    """

    order: Tensor
    inverse: Tensor
    pairs: tuple[int, ...] = ()


def scan_paths(kind: str, height: int, width: int) -> ScanPaths:
    """The paths of a kind of scan over `height` × `width` tokens in row-major order, on the CPU.

    continuous      four snakes without jumps (LaMamba-Diff): over rows from the top left, over rows from the bottom
                    left, over columns from the bottom left, over columns from the bottom right
    cross           rows, columns, and both reversed (VMamba)
    bidirectional   rows and rows reversed (Vision Mamba)
    unidirectional  rows

    bidirectional_4 and unidirectional_4 read each path of these with two and four sets of parameters, so that
    parameters and cost are those of four paths (VMamba's released variants do so).

    Raises InputError for any other kind.
    """
    if kind not in DIRECTIONS:
        raise unknown("scan", kind, DIRECTIONS)
    rows = torch.arange(height * width, device="cpu").view(height, width)
    upwards = rows.flip(0)
    if kind == "continuous":
        paths = [_snake(rows), _snake(upwards), _snake(upwards.T), _snake(upwards.flip(1).T)]
    else:
        forward, down = rows.flatten(), rows.T.flatten()
        paths = [forward, down, forward.flip(0), down.flip(0)]
        paths = {
            "cross": paths,
            "bidirectional": [forward, paths[2]],
            "unidirectional": [forward],
            "bidirectional_4": [forward, forward, paths[2], paths[2]],
            "unidirectional_4": [forward] * 4,
        }[kind]
    order = torch.stack(paths)
    return ScanPaths(order, order.argsort(dim=1), _pairs(order))


def _pairs(order: Tensor) -> tuple[int, ...]:
    """See `ScanPaths`. Of several partners, a path gets the first that is free."""
    free, pairs = list(range(len(order))), []
    while free:
        path = free.pop(0)
        partner = next((other for other in free if torch.equal(order[other], order[path].flip(0))), None)
        if partner is None:
            return ()
        free.remove(partner)
        pairs += [path, partner]
    return tuple(pairs)


def _snake(lines: Tensor) -> Tensor:
    """The lines of a grid, one after the other, with every second line reversed."""
    lines = lines.clone()
    lines[1::2] = lines[1::2].flip(1)
    return lines.flatten()
