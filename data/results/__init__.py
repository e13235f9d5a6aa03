"""data.results: what comes out: evaluation, metrics, reports, tables, plots, costs. See README.md in this folder."""
