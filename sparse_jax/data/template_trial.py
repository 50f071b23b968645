"""A process that renders a chat template once, within bounds, before anyone else does.

A template is a program of a stranger: one line of it fills the memory, or never ends,
and inside a single operation of Python nothing can stop it but the system. This file
is run as a script, so it imports nothing of this library.
"""

import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence

__all__ = ["MEMORY", "OUT_OF_MEMORY", "SECONDS"]

SECONDS = 2  # of the processor; templates take milliseconds
MEMORY = 1 << 30  # bytes of addresses
OUT_OF_MEMORY = 3  # exit code


def _bound() -> None:
    """Limits this process, where the system can."""
    try:
        import resource
    except ImportError:
        return
    # What the start of Python took, with whatever it imports there, does not count.
    seconds = math.ceil(time.process_time()) + SECONDS
    for kind, limit in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, _addresses() + MEMORY),
    ):
        try:
            resource.setrlimit(kind, (limit, resource.getrlimit(kind)[1]))
        except (ValueError, OSError):
            continue


def _addresses() -> int:
    """Returns the bytes of addresses that this process has, 0 if not known."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0


def _render(template: str, calls: Sequence[Mapping[str, object]]) -> None:
    """Renders a template in an environment like that of transformers."""
    from jinja2.ext import Extension, loopcontrols
    from jinja2.nodes import Node
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        tags = {"generation"}

        def parse(self, parser: Parser) -> Node | list[Node]:
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
        return OUT_OF_MEMORY
    except Exception:
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
