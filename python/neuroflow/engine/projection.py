"""From pixels to patches: only those with new pixels are projected, where finding them is cheap."""

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

FEW_ROWS = 512  # from here on reading the weights takes none of the time, and torch's own product is as fast
DENSE_PROJECTION = 0.75  # of the patches; above it, picking out the changed ones gains nothing


def patch_windows(convolution: nn.Conv2d | nn.Conv3d, pixels: torch.Tensor) -> torch.Tensor:
    """The windows that the convolution sees, one row a patch: [S, C, H, W] -> [S, N, C * height * width].

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

    The rows are contiguous, which is the order that the gate and the blocks read; a convolution leaves the channels
    outermost. Not by what is the fastest here, as which patches are encoded would hang on that.
    """
    weight = convolution.weight.flatten(1)
    if windows.numel() <= FEW_ROWS * windows.shape[-1] and row_kernels_serve(windows):
        return linear_rows(windows.flatten(0, -2), weight, convolution.bias).unflatten(0, windows.shape[:-1])
    return F.linear(windows, weight, convolution.bias)


def changed(before: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
    """The patches, int32 rows, any bit of whose pixels [1, N, values] differs between two frames."""
    words = torch.int64 if windows.shape[2] * windows.element_size() % 8 == 0 else torch.uint8
    return (before.view(words) != windows.view(words)).any(2)[0].nonzero()[:, 0].int()


def note_colours(current: Pass, convolution: nn.Module, windows: list[torch.Tensor]) -> None:
    """Keep the mean red, green and blue of the patches of each entry, [1, N, values], if the gate reads them."""
    if current.plan.config.cut_light is not None and convolution.in_channels == 3:
        current.colours = [own.unflatten(2, (3, -1)).mean(3, dtype=torch.float32) for own in windows]


def project(current: Pass, derived: Derived, forward: Callable, pixels: torch.Tensor) -> torch.Tensor:
    """What the tower's projection gives of the frames' pixels; kept for the gate, and the pixels too if it reads them.

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
        weights = derived(projection, "projection", object)  # another object for other weights
        found: dict[int, torch.Tensor] = {}  # by entry
        for state in dict.fromkeys(current.states):
            own = [entry for entry, of in enumerate(current.states) if of is state]
            projected = _project_changed(projection, weights, state, [windows[entry] for entry in own])
            found |= zip(own, projected, strict=True)
        rows = [found[entry] for entry in range(len(windows))]
    else:  # it would be waited for, and loses little by projecting all
        rows = [project_windows(projection, own) for own in windows]
    # A hook may change it in place; and it may be the first of the hidden states, which the next frame must not change.
    shared = len(rows) == 1 and not projection._forward_hooks and not current.asked
    projected = rows[0] if shared else torch.cat(rows)
    counts = [length // size for length, size in zip(pixels.shape[2:], projection.kernel_size, strict=True)]
    current.projected = projected.transpose(1, 2).unflatten(2, counts)
    return current.projected


def _project_changed(
    projection: nn.Conv2d | nn.Conv3d, weights: object, state: StreamState, frames: list[torch.Tensor]
) -> list[torch.Tensor]:
    """A stream's next frames, patches [1, N, values] each, projected to [1, N, D]; those with the pixels of the frame
    before were already.

    Args:
        weights: stands for those of the projection.
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
