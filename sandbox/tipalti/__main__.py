"""`python -m sandbox.tipalti --port P [--state FILE]`."""

from __future__ import annotations

from sandbox.serve import arguments, run
from sandbox.tipalti.service import TipaltiService

DEFAULT_PORT = 8091


def main() -> None:
    """Serve until SIGTERM."""
    options = arguments("tipalti", DEFAULT_PORT).parse_args()
    run(lambda: TipaltiService(options.state), options.host, options.port)


if __name__ == "__main__":
    main()
