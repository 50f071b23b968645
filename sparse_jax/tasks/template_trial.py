"""A process that renders a chat template once, within bounds, before anyone else does.

A template is a program of a stranger: one line of it fills the memory, or never ends,
and inside a single operation of Python nothing can stop it but the system. This file
is run as a script, so it imports nothing of this library.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["MEMORY", "SECONDS"]

SECONDS = 2  # of the processor; templates take milliseconds
MEMORY = 1 << 30  # bytes of addresses; the process itself has less than a tenth

_OUT_OF_MEMORY = 3


def _bound() -> None:
    """Limits this process, where the system can."""
    try:
        import resource
    except ImportError:
        return
    for kind, limit in ((resource.RLIMIT_CPU, SECONDS), (resource.RLIMIT_AS, MEMORY)):
        try:
            resource.setrlimit(kind, (limit, resource.getrlimit(kind)[1]))
        except (ValueError, OSError):
            continue


def _render(template: str, calls: Sequence[Mapping[str, Any]]) -> None:
    """Renders a template in an environment like that of transformers."""
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def stop(message: str) -> None:
        raise ValueError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = json.dumps
    environment.globals |= {"raise_exception": stop, "strftime_now": lambda _: "now"}
    compiled = environment.from_string(template)
    for call in calls:
        compiled.render(**call)


def main() -> int:
    """Renders what standard input asks for; returns whether memory was enough.

    Any other error of the template is left to the rendering that counts.
    """
    _bound()
    wanted = json.load(sys.stdin)
    try:
        _render(wanted["template"], wanted["calls"])
    except MemoryError:
        return _OUT_OF_MEMORY
    except Exception:
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
