"""The papers' tables and figures, run: cells and their cost, the runs, and the results that are kept of them."""
