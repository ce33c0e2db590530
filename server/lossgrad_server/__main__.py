"""The command `lossgrad-server`, also `python -m lossgrad_server`."""
