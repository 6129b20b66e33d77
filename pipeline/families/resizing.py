"""How the processors of all families resize a picture."""

from __future__ import annotations

import math

from pipeline.families.base import AreaLimits, ImageSize


def smart_resize(size: ImageSize, factor: int, limits: AreaLimits) -> ImageSize:
    """The size at which the model sees a picture.

    Sides are multiples of `factor`, the area is within the limits, the aspect is kept. As `smart_resize` of
    Qwen's processors, the rounding of Python's `round` included.
    """
    height, width = (round(side / factor) * factor for side in size)
    if height * width > limits.max_pixels:
        shrink = math.sqrt(size.height * size.width / limits.max_pixels)
        height, width = (max(factor, math.floor(side / shrink / factor) * factor) for side in size)
    elif height * width < limits.min_pixels:
        grow = math.sqrt(limits.min_pixels / (size.height * size.width))
        height, width = (math.ceil(side * grow / factor) * factor for side in size)
    return ImageSize(height, width)
