"""What is asked of a catalog: conditions, SQL, selections, snapshots, their history and differences, the funnel."""
