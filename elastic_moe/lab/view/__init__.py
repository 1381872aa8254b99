"""What people see of a sweep or a run: frontier, plots, report."""
