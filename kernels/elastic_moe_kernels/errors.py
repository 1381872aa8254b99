"""The one exception that the kernels raise on purpose."""

from __future__ import annotations


class KernelError(ValueError):
    """A kernel refused its arguments, or an implementation that was named is not to be had.

    The message says what was wrong, what was got, what is allowed and what to do.
    """
