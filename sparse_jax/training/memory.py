"""Memory in use, as the device or the operating system reports it."""

import jax
import psutil

__all__ = ["bytes_shown", "current_bytes", "peak_bytes"]


def bytes_shown(size: float) -> str:
    """Returns a number of bytes for people.

    Example:
      >>> bytes_shown(3 * 2**29), bytes_shown(2048), bytes_shown(100)
      ('1.50 GiB', '2.00 KiB', '100 B')
    """
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size >= 2**power:
            return f"{size / 2**power:.2f} {unit}"
    return f"{size:.0f} B"


def current_bytes() -> int:
    """Returns the bytes in use: of the first device, or on CPU of this process."""
    stats = jax.local_devices()[0].memory_stats()
    return stats["bytes_in_use"] if stats else psutil.Process().memory_info().rss


def peak_bytes() -> int:
    """Returns the most bytes in use so far, of the device or of this process."""
    stats = jax.local_devices()[0].memory_stats()
    if stats:
        return stats["peak_bytes_in_use"]
    info = psutil.Process().memory_info()
    if peak := getattr(info, "peak_wset", 0):  # Windows
        return peak
    # The module exists on Unix only.
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
