"""data.batches: token ids -> examples -> tensors. See README.md in this folder."""
