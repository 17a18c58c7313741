"""Networks only: no argument parsing, no file walking, no metrics."""
