"""A sweep: recipes times settings times seeds, run in processes, stopped and gone on with, and set in one table."""
