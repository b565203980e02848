"""The HTTP service: plans, jobs, profiles, files and dashboards over one database."""
