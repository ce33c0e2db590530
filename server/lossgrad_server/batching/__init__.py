"""Between transport and device: admission, the queue, forming batches. Knows jobs; no gRPC, torch or numpy."""
