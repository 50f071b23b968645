"""Fine-tune pre-trained Transformers in JAX by training only what matters."""

import lazy_loader

# The stub beside this file is the table of contents. Loading names when they are
# first used keeps `sparse-jax --help` under a second: importing JAX takes longer.
_load, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> object:
    """Loads a public name, or reads the installed version."""
    if name == "__version__":
        from importlib.metadata import version

        return version("sparse_jax")
    return _load(name)
