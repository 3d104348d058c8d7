"""From pixels to patches: only patches with new pixels are projected, where finding them is cheap."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from neuroflow_kernels import linear_rows, row_kernels_serve

from ..adapters.anatomy import convolution_of, is_patch_projection
from .derived import Derived
from .kernels import is_plain
from .passes import Pass
from .state import LastFrame, StreamState, copy_into

FEW_ROWS = 512  # above this, reading the weights is negligible, and torch's product is as fast
DENSE_PROJECTION = 0.75  # share of patches above which picking out the changed ones gains nothing


def patch_windows(convolution: nn.Conv2d | nn.Conv3d, pixels: torch.Tensor) -> torch.Tensor:
    """The convolution's windows, one row a patch: [S, C, H, W] -> [S, N, C * height * width].

    Those of a clip [S, C, T, H, W] are tubelets, [S, N, C * frames * height * width].
    """
    axes = len(convolution.kernel_size)
    if pixels.ndim != 2 + axes or pixels.shape[1] != convolution.in_channels:
        lengths = ", ".join("THW"[-axes:])
        accepted = f"{convolution.in_channels} channels, [S, {convolution.in_channels}, {lengths}]"
        raise ValueError(f"pixel_values has shape {list(pixels.shape)}; accepted is {accepted}")
    windows, within = pixels, range(3, 3 + 2 * axes, 2)
    for axis, size in zip(within, convolution.kernel_size, strict=True):
        count = windows.shape[axis - 1] // size
        windows = windows.narrow(axis - 1, 0, count * size).unflatten(axis - 1, (count, size))
    windows = windows.permute(0, *(axis - 1 for axis in within), 1, *within)  # [S, rows, columns, C, height, width]
    return windows.flatten(1 + axes).flatten(1, axes)


def project_windows(convolution: nn.Conv2d | nn.Conv3d, windows: torch.Tensor) -> torch.Tensor:
    """The convolution as a matrix product: `patch_windows` [*, values of a window] -> [*, D].

    Rows are contiguous, in the order that the gate and the blocks read; a convolution leaves channels outermost. The
    kernel is fixed rather than the fastest, because the choice of patches would depend on it.
    """
    weight = convolution.weight.flatten(1)
    if windows.numel() <= FEW_ROWS * windows.shape[-1] and row_kernels_serve(windows):
        return linear_rows(windows.flatten(0, -2), weight, convolution.bias).unflatten(0, windows.shape[:-1])
    return F.linear(windows, weight, convolution.bias)


def changed(before: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
    """The patches, int32 rows, whose pixels [1, N, values] differ in any bit between two frames."""
    words = torch.int64 if windows.shape[2] * windows.element_size() % 8 == 0 else torch.uint8
    return (before.view(words) != windows.view(words)).any(2)[0].nonzero()[:, 0].int()


def note_colours(current: Pass, convolution: nn.Module, windows: list[torch.Tensor]) -> None:
    """Keep the mean red, green and blue of each entry's patches, [1, N, values], if the gate reads them."""
    if current.plan.config.cut_light is not None and convolution.in_channels == 3:
        current.colours = [own.unflatten(2, (3, -1)).mean(3, dtype=torch.float32) for own in windows]


def project(current: Pass, derived: Derived, forward: Callable, pixels: torch.Tensor) -> torch.Tensor:
    """The projection of the frames' pixels; it is kept for the gate, as are the pixels if the gate reads them.

    Args:
        forward: the projection's own.
        pixels: as the projection takes them.
    """
    projection = current.plan.anatomy.projection
    convolution = convolution_of(projection)
    is_bare = convolution is projection
    if not is_patch_projection(convolution) or not (is_bare or pixels.ndim == 2 + len(convolution.kernel_size)):
        current.projected, current.pixels = forward(pixels), pixels
        return current.projected
    windows = [patch_windows(convolution, image) for image in pixels.split(1)]  # [1, N, values] each
    if current.plan.config.signal == "pixel":
        current.pixels = torch.cat(windows)
    note_colours(current, convolution, windows)
    if not is_plain(projection, forward, pixels):
        current.projected = forward(pixels)
        return current.projected
    if pixels.device.type == "cpu":
        weights = derived(projection, "projection", object)  # a new object when the weights change
        found: dict[int, torch.Tensor] = {}  # by entry
        for state in dict.fromkeys(current.states):
            own = [entry for entry, of in enumerate(current.states) if of is state]
            projected = _project_changed(projection, weights, state, [windows[entry] for entry in own])
            found |= zip(own, projected, strict=True)
        rows = [found[entry] for entry in range(len(windows))]
    else:  # finding changes would sync, and projecting all costs little
        rows = [project_windows(projection, own) for own in windows]
    # A hook may change it in place, and it may be the first hidden state, which the next frame must not change.
    shared = len(rows) == 1 and not projection._forward_hooks and not current.asked
    projected = rows[0] if shared else torch.cat(rows)
    counts = [length // size for length, size in zip(pixels.shape[2:], projection.kernel_size, strict=True)]
    current.projected = projected.transpose(1, 2).unflatten(2, counts)
    return current.projected


def _project_changed(
    projection: nn.Conv2d | nn.Conv3d, weights: object, state: StreamState, frames: list[torch.Tensor]
) -> list[torch.Tensor]:
    """Project a stream's next frames, patches [1, N, values] each, to [1, N, D], reusing those with unchanged pixels.

    Args:
        weights: identifies the projection's weights.
    """
    last, state.last_frame = state.last_frame, None
    if last is None or last.windows.shape != frames[0].shape or last.windows.dtype != frames[0].dtype:
        last = LastFrame(None, None, None)
    befores = [last.windows if last.weights is weights else None, *frames[:-1]]
    differing = [
        None if before is None or before.shape != frame.shape else changed(before, frame)
        for before, frame in zip(befores, frames, strict=True)
    ]
    patches = frames[0].shape[1]
    differing = [None if rows is None or rows.numel() > DENSE_PROJECTION * patches else rows for rows in differing]
    fresh = [frame[0] if rows is None else frame[0, rows] for frame, rows in zip(frames, differing, strict=True)]
    lengths = [len(each) for each in fresh]
    if any(lengths):
        products = project_windows(projection, torch.cat(fresh)[None])[0].split(lengths)
    kept, projected, results = last.windows, last.projected, []
    for number, (rows, length) in enumerate(zip(differing, lengths, strict=True)):
        if rows is None:
            projected = copy_into(projected, products[number][None])
        elif length:
            projected[0, rows] = products[number]
        results.append(projected.clone() if number < len(frames) - 1 else projected)
    if len(frames) > 1 or differing[0] is None:
        kept = copy_into(kept, frames[-1])
    elif lengths[0]:
        kept[0, differing[0]] = fresh[0]
    state.last_frame = LastFrame(kept, projected, weights)
    return results
