"""What formats work with: the export job, a row of somebody else's data set, and how columns are named there."""
