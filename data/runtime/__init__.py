"""data.runtime: the process: flags, run folder, identity, device, distribution, files, errors.

See README.md here.
"""
