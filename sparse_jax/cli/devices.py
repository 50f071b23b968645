"""The devices of a command: those there are, or simulated ones."""

from sparse_jax.errors import InputError

__all__ = ["take_devices"]


def take_devices(devices: int | None) -> None:
    """Simulates some devices on the CPU, if a number is given; comes before all else.

    Raises:
      InputError: if the number is not positive, or JAX has another kind of device.
    """
    if devices is None:
        return
    if devices < 1:
        raise InputError(f"`devices` must be positive, got {devices}.")
    import jax

    jax.config.update("jax_num_cpu_devices", devices)
    if jax.default_backend() != "cpu":
        raise InputError(
            f"`devices` must be left out where there are real ones, got {devices} and "
            f"{jax.device_count()} of kind {jax.default_backend()}. Set "
            "JAX_PLATFORMS=cpu to simulate some all the same."
        )
