"""The project's benchmarks. Each measures side by side in one run and prints ratios; none asserts an absolute time."""
