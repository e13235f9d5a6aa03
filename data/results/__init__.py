"""data.results: evaluation, metrics, reports, tables, plots, cost model. See README.md in this folder."""
