"""`rank-search serve`: studies over HTTP. No torch in the process, and the database by way of the study layer alone."""
