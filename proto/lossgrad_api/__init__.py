"""The wire contract of lossgrad: generated protobuf code (v1/) and the codec around it. Imports nothing of ours."""
