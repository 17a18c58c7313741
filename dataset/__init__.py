"""What is on disk -> samples -> batches."""
