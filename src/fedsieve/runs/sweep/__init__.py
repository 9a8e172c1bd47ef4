"""A sweep: recipes times settings times seeds, run in processes, stopped and gone on with, and set in one table."""

from fedsieve.runs.sweep.cells import Cell, Grid, Job, check_grid, grid
from fedsieve.runs.sweep.folder import check_same_sweep, default_folder, open_folder
from fedsieve.runs.sweep.table import show_table
from fedsieve.runs.sweep.view import run_sweep

__all__ = [
    "Cell",
    "Grid",
    "Job",
    "check_grid",
    "check_same_sweep",
    "default_folder",
    "grid",
    "open_folder",
    "run_sweep",
    "show_table",
]
