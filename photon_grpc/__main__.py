"""`photon-grpc`, and `python -m photon_grpc`: the command line, once what takes longest is under way."""

from __future__ import annotations

import sys

from photon_grpc import engine_ahead


def main() -> None:
    """The entry point: runs a command and ends the process with its exit code."""
    engine = engine_ahead.begin(sys.argv[1:])
    try:
        from photon_grpc.cli import main as run_command

        run_command(engine=engine)
    finally:
        if engine is not None:
            engine.discard()


if __name__ == "__main__":
    main()
