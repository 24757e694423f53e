"""`control`: how soon the server does what it is told, or what a client's silence tells it.

`drain`: SIGTERM under load. `cancel`: from a client's cancel to free blocks. `frozen`: clients that are
stopped and never heard of again. `steps`: what the engine loses to calls that are none of its business.
All but `steps` on an engine that makes its tokens up in steps of fixed length.
"""
