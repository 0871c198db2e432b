"""Bytes of checkpoints: chunks, manifest parts, objects, COMMIT and epoch records. docs/format.md is the contract.

Pure: bytes in, values out; no files, no clock, no torch. Whatever breaks a rule of the document is a FormatError,
raised before anything large is allocated.
"""
