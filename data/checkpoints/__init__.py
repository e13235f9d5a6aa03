"""data.checkpoints: what lies on disk: weights, configs, adapters. See README.md in this folder."""
