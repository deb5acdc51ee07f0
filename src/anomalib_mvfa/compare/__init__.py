"""Methods side by side: jobs, their results, and a report of tables and figures."""
