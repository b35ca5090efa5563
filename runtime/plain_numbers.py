"""Numbers as other programs write them: pandas writes whole numbers as 16.0, trainers hand over numpy's."""

from __future__ import annotations

import math
import numbers


def whole_number(value: object) -> int | None:
    """The value as an int if it is a whole number (16, 16.0, numpy's), otherwise None. True and False are none."""
    if type(value) is int:
        return value
    if value is None or type(value) is str:
        return None
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        return None
    if isinstance(value, numbers.Integral):
        return int(value)
    return int(float(value)) if float(value).is_integer() else None


def plain_number(value: object) -> object:
    """An int or a float for any real number, also numpy's; other values as they are."""
    if type(value) in (int, float):
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)
