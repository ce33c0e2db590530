"""The generated code of package lossgrad_api.v1; proto/generate.py writes it."""
