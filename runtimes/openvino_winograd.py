"""Winograd's convolutions for OpenVINO's CPU, which has none on AVX2, made of its own operations.

A tile of 4×4 outputs of a convolution with r×r taps is computed from n×n inputs, n = r + 3, as
Aᵀ[(G g Gᵀ) ⊙ (Bᵀ d B)]A, summed over input channels before Aᵀ…A (Lavin and Gray 2016, arXiv 1509.09308): n²
multiplications in place of 16 r², a quarter for r = 3. Bᵀ d B is a depthwise convolution along each axis with
stride 4, which takes the tiles apart at once; the sums over channels are n² convolutions 1×1; Aᵀ…A is
additions, and depth-to-space puts the tiles together again.

The values are the same up to float32's rounding. The weights take n²/r² times the memory, and a graph takes
longer to compile; so this is for pictures that are large beside their weights.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from functools import reduce
from math import prod
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import openvino as ov
import openvino.opset13 as ops
from numpy.typing import NDArray

#: Outputs of a tile along one axis.
TILE = 4
#: Where polynomials are evaluated, besides at infinity, by the taps of the convolution along one axis.
POINTS = {2: (0, 1, -1, 2), 3: (0, 1, -1, 2, -2)}
#: Pixels of a picture, and channels on either side, from which on it is used.
PIXELS, CHANNELS = 128 * 128, 128
#: Strides, pads and dilations of a convolution 1×1.
_POINTWISE = ([1, 1], [0, 0], [0, 0], [1, 1])


class Room:
    """Arrays in a temporary file, whose memory can be given back while they stay readable.

    OpenVINO lays constants out anew for its kernels and keeps what it was given besides, never to look at it
    again.
    """

    def __init__(self) -> None:
        self._maps: list[mmap.mmap] = []

    def hold(self, array: NDArray[np.float32]) -> NDArray[np.float32]:
        """A copy that lies in the file."""
        with TemporaryFile() as file:
            file.truncate(array.nbytes)
            self._maps.append(mmap.mmap(file.fileno(), array.nbytes))
        copy = np.frombuffer(self._maps[-1], np.float32).reshape(array.shape)
        copy[...] = array
        return copy

    def leave(self) -> None:
        """Give the memory back, where the system can; what is read again is read from the file."""
        for each in self._maps:
            if hasattr(mmap, "MADV_DONTNEED"):
                each.madvise(mmap.MADV_DONTNEED)


def use_winograd(model: ov.Model, room: Room, pixels: int = PIXELS, channels: int = CHANNELS) -> int:
    """Put Winograd's form in the place of each convolution that it is for, in place; how many there were."""
    found = [node for node in model.get_ordered_ops() if _fits(node, pixels, channels)]
    for node in found:
        facts, weight = node.get_attributes(), _value(node.input_value(1))
        whole = winograd(node.input_value(0), weight, facts["pads_begin"], facts["pads_end"], room)
        whole.set_friendly_name(node.get_friendly_name())
        node.output(0).replace(whole.output(0))
    return len(found)


def matrices(taps: int) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Aᵀ (4 × n), G (n × taps) and Bᵀ (n × n) for a convolution along one axis, by Toom and Cook's points."""
    points = POINTS[taps]
    infinite = np.eye(TILE + taps - 1)[-1:]
    a = np.vander(points, TILE, increasing=True).T.astype(float)
    scale = [np.prod([p - q for q in points if q != p]) for p in points]
    g = np.vander(points, taps, increasing=True) / np.array(scale)[:, None]
    b = [np.pad(np.poly([q for q in points if q != p])[::-1], (0, 1)) for p in points]
    return (
        np.hstack([a, infinite[:, -TILE:].T]),
        np.vstack([g, infinite[:, -taps:]]),
        np.vstack([*b, np.poly(points)[::-1]]),
    )


def winograd(
    picture: Any, weight: NDArray[np.float32], before: Sequence[int], after: Sequence[int], room: Room
) -> Any:
    """The operation that gives what a convolution of ``picture`` with pads ``before`` and ``after`` it would.

    ``picture``: an output (N, C, h, w). ``weight``: (O, C, r, r), r 2 or 3. What comes out must be a multiple
    of 4 along each axis. ``room`` holds the transformed weights.
    """
    _, g, b = matrices(weight.shape[-1])
    kernels = room.hold(_transformed(weight, g))
    points, channels = POINTS[weight.shape[-1]], weight.shape[1]
    factor = {p**k: _constant(np.array([p**k])) for p in points for k in range(TILE)}
    taps = [[_taps(row, axis, channels) for row in b] for axis in (0, 1)]
    columns = []  # of the tile's outputs, by row of its n×n products
    for row, along in zip(kernels, taps[0], strict=True):
        taken = _depthwise(picture, along, 0, (before[0], after[0]))
        products = [
            ops.convolution(
                _depthwise(taken, across, 1, (before[1], after[1])),
                ov.op.Constant(kernel[:, :, None, None], shared_memory=True),
                *_POINTWISE,
            )
            for kernel, across in zip(row, taps[1], strict=True)
        ]
        columns.append(_outputs(products, points, factor))
    tile = zip(*(_outputs(column, points, factor) for column in zip(*columns, strict=True)), strict=True)
    return ops.depth_to_space(ops.concat([each for row in tile for each in row], 1), "blocks_first", TILE)


def _transformed(weight: NDArray[np.float32], g: NDArray[np.float64]) -> NDArray[np.float32]:
    """(O, C, r, r) → (n, n, O, C)."""
    flat = weight.reshape(-1, g.shape[1] ** 2)
    found = np.kron(g, g).astype(np.float32) @ flat.T
    return found.reshape(len(g), len(g), *weight.shape[:2])


def _fits(node: Any, pixels: int, channels: int) -> bool:
    """Whether it is a float32 convolution, stride 1, of a large picture by constant weights."""
    if node.get_type_name() != "Convolution" or node.get_output_partial_shape(0).is_dynamic:
        return False
    kernel, drawn, facts = list(node.get_input_shape(1)), node.get_output_shape(0), node.get_attributes()
    plain = [1] * len(kernel[2:])
    return (
        len(kernel) == 4
        and kernel[2] == kernel[3]
        and kernel[3] in POINTS
        and min(kernel[:2]) >= channels
        and prod(drawn[2:]) >= pixels
        and all(size % TILE == 0 for size in drawn[2:])
        and (list(facts["strides"]), list(facts["dilations"])) == (plain, plain)
        and facts["auto_pad"] == "explicit"
        and node.get_output_element_type(0) == ov.Type.f32
        and _is_constant(node.input_value(1).get_node())
    )


def _is_constant(node: Any) -> bool:
    sources = [port.get_node() for port in node.input_values()]
    return node.get_type_name() == "Constant" or (
        bool(sources) and all(_is_constant(source) for source in sources)
    )


def _value(output: Any) -> NDArray[np.float32]:
    """What a constant expression gives: weights that are stored smaller are widened by OpenVINO itself."""
    model = ov.Model([ops.result(output)], [], "weights")
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return np.array(compiled([])[0], np.float32)


def _taps(row: NDArray[np.float64], axis: int, channels: int) -> Any:
    """The same taps along one axis for every channel, as a depthwise convolution has them."""
    shape = (channels, 1, 1, len(row), 1) if axis == 0 else (channels, 1, 1, 1, len(row))
    return _constant(np.broadcast_to(row.reshape(shape[1:]), shape))


def _depthwise(picture: Any, taps: Any, axis: int, pads: tuple[int, int]) -> Any:
    """Along one axis, a tile further each time; ``pads`` before and after."""
    stride, before, after = [1, 1], [0, 0], [0, 0]
    stride[axis], before[axis], after[axis] = TILE, *pads
    return ops.group_convolution(picture, taps, stride, before, after, [1, 1])


def _outputs(products: Sequence[Any], points: Sequence[int], factor: dict[int, Any]) -> list[Any]:
    """Aᵀ along one axis: n products → 4 outputs. Points p and −p share their sum and their difference."""
    # The first point is 0, whose powers are 0 but the first.
    rows: list[list[Any]] = [[products[0]], [], [], []]
    for place, point in enumerate(points[1:], 1):
        if -point in points[:place]:
            continue
        even = odd = products[place]
        if -point in points:
            other = products[points.index(-point)]
            even, odd = ops.add(even, other), ops.subtract(odd, other)
        for power, row in enumerate(rows):
            term = odd if power % 2 else even
            row.append(term if point**power == 1 else ops.multiply(term, factor[point**power]))
    rows[-1].append(products[-1])  # the point at infinity
    return [reduce(ops.add, row) for row in rows]


def _constant(array: NDArray[Any]) -> Any:
    return ops.constant(np.ascontiguousarray(array, np.float32))
