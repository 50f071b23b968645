"""Sharding: one model over many devices, and a step for them."""

import lazy_loader

# As in the package above: the stub names what is here, and use imports it.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
