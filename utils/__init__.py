"""The training engine, metrics, drawing and small leaf helpers."""
