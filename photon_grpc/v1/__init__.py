"""Generated from `proto/photon/v1` by `tools/gen_proto.py`; never edited by hand."""

from __future__ import annotations
