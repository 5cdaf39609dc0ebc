"""A benchmark as a document: scores with their intervals, runs compared task by task; and its table, pictures and page."""
