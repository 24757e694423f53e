"""`python -m photon_grpc` is `photon-grpc`."""

from __future__ import annotations

from photon_grpc.cli import main

if __name__ == "__main__":
    main()
