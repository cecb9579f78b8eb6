"""Images of a few examples, brought to the one form that pictures and logs can show."""

from __future__ import annotations

from typing import Any

import numpy as np


def thumbnails(images: Any, index: Any) -> np.ndarray:
    """Pick examples from a stack of images and scale each to the range [0, 1].

    Args:
        images: ``[N, H, W]``, ``[N, 1, H, W]``, ``[N, 3, H, W]`` or ``[N, H, W, 3]`` array or tensor of any
            numbers; only the chosen examples are read.
        index: ``[K]`` the examples to pick.

    Returns:
        ``[K, H, W]`` (grey) or ``[K, H, W, 3]`` (colour) float32 in [0, 1]. Bytes are divided by 255, values
        in [0, 1] are kept, and other images, such as normalised ones, are stretched from minimum to maximum.

    Raises:
        ValueError: if ``images`` has another shape.
    """
    if len(index) == 0:
        return np.zeros((0, 1, 1), np.float32)
    stack = np.stack([_as_array(images[int(i)]) for i in index])
    shape = [len(images), *stack.shape[1:]]
    if stack.ndim == 4 and stack.shape[1] == 1:
        stack = stack[:, 0]
    elif stack.ndim == 4 and stack.shape[1] == 3:
        stack = np.moveaxis(stack, 1, -1)
    if stack.ndim != 3 and not (stack.ndim == 4 and stack.shape[-1] == 3):
        raise ValueError(
            f"images has shape {shape}, but it must be [N, H, W], [N, 1, H, W], [N, 3, H, W] or "
            "[N, H, W, 3]: give the images as they are before any flattening."
        )
    if stack.dtype == np.uint8:
        return (stack / 255).astype(np.float32)
    stack = np.nan_to_num(stack.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    return np.stack([_stretch(image) for image in stack])


def _stretch(image: np.ndarray) -> np.ndarray:
    low, high = image.min(), image.max()
    if low >= 0 and high <= 1:
        return image
    return (image - low) / (high - low) if high > low else np.zeros_like(image)


def _as_array(image: Any) -> np.ndarray:
    return np.asarray(image.detach().cpu() if hasattr(image, "detach") else image)
