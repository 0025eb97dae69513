"""Data sets as uint8 tensors, their division over simulated devices, and training batches.

`data.sources` reads a data set, `data.holdout` holds out images for validation, `data.splits` turns
labels into one index array per device, `data.batches` turns those into batches. None of them
imports anything else of this project.
"""
