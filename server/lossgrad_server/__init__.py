"""The lossgrad server: regression losses and their gradients over gRPC. What belongs where: docs/architecture.md."""

__version__ = "0.1.0"
