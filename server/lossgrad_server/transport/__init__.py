"""Messages in, messages out. Handlers (service.py) see `Call` (call.py), not grpcio, one transport under it."""
