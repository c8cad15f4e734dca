"""The data plane's language: vocabulary, messages, framing and the session machine, all free of I/O.

Only `protocol.transport` touches sockets. `WIRE_FORMAT.md` beside this file is the normative description.
"""
