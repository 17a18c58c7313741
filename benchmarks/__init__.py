"""Ratios of the project's paths against straightforward ones; see README.md. Run by hand."""
