"""data.runtime: the process: flags, run folder, device, distribution, files and errors. See README.md in this folder."""
