"""Submitting a workflow to a Ray cluster: what travels (package), the client (client, follow), the job (start, job)."""
