"""`--processes N`: several front ends, each a server of its own, that share one port (docs/architecture.md).

`parent.py` is the program that binds nothing and keeps them there, `front_end.py` one of them as the parent sees it,
`child.py` the program that runs in it, `link.py` the socket between the two. `shares.py` divides a server's settings among
them, `port.py` holds their port, and `merging.py` makes one server's metrics of theirs. The parent imports neither torch nor
what computes, and does no request's work.
"""
