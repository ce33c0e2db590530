"""The Open Inference Protocol (KServe v2, with Triton's extensions) over the same pipeline as the native service."""
