"""Users' data: questions, images and traces, read from JSON lines, parquet or a data set id."""
