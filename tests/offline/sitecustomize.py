"""Guard of `make test`: put on PYTHONPATH, it lets no socket of any Python process leave the machine.

Loopback and local sockets pass, since notebooks talk to their kernels. An attempt raises OSError and is noted in the
file ICD_OFFLINE_RECORD, so that one whose error is swallowed comes out too. What libraries do in compiled code without
Python's socket module is not seen; HF_HUB_OFFLINE keeps those still.
"""

import os
import sys

LOCAL = ("127.", "::1", "localhost", "0.0.0.0", "::ffff:127.")


def is_local(host: object) -> bool:
    """Whether a host name or address stays on this machine."""
    text = (
        host.decode(errors="replace")
        if isinstance(host, bytes)
        else ""
        if host is None
        else str(host)
    )
    return text in ("", "::") or text.startswith(LOCAL)


def guard(event: str, args: tuple) -> None:
    """Audit hook: refuse and record what would leave the machine."""
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        address = args[1]
        host = (
            address[0] if isinstance(address, tuple) else ""
        )  # a local socket has a path, not a pair
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = args[0]
    else:
        return
    if is_local(host):
        return
    what = f"{event} {host!r} by {' '.join(sys.argv[:2]) or 'python'}"
    if record := os.environ.get("ICD_OFFLINE_RECORD"):
        with open(record, "a", encoding="utf-8") as out:
            out.write(what + "\n")
    raise OSError(f"offline guard: {what}")


sys.addaudithook(guard)
