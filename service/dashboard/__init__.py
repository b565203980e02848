"""Aggregates for dashboards."""
