"""The devices of a command: those there are, simulated ones, those of other hosts."""

from sparse_jax.errors import InputError

__all__ = ["take_devices"]


def take_devices(
    devices: int | None,
    *,
    mesh: str | None = None,
    distributed: bool = False,
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
) -> None:
    """Prepares JAX for a command; comes before all else.

    Args:
      devices: number to simulate on the CPU of this process; None takes what there is.
      mesh: what the devices are for; without one a single device is used.
      distributed: whether other processes run the same command.
      coordinator, processes, process: as for `join_processes`; each implies
        `distributed`.

    Raises:
      InputError: if a number is out of range, nothing uses the devices, or JAX has
        another kind of device.
    """
    if devices is not None and devices < 1:
        raise InputError(f"`devices` must be positive, got {devices}.")
    if devices is not None and devices > 1 and mesh is None:
        raise InputError(
            f"`devices` must come with a mesh, got {devices} and none. Say what they "
            f"are for, as in --mesh data={devices}."
        )
    given = (coordinator, processes, process)
    if devices is None and not distributed and given == (None, None, None):
        return
    import jax

    if devices is not None:
        jax.config.update("jax_num_cpu_devices", devices)
    if distributed or given != (None, None, None):
        from sparse_jax.sharding.lost_processes import watch_processes
        from sparse_jax.sharding.processes import join_processes

        join_processes(coordinator, processes, process)
        watch_processes()
    if devices is not None and jax.default_backend() != "cpu":
        raise InputError(
            f"`devices` must be left out where there are real ones, got {devices} and "
            f"{jax.device_count()} of kind {jax.default_backend()}. Set "
            "JAX_PLATFORMS=cpu to simulate some all the same."
        )
