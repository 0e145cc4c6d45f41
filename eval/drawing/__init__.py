"""Pictures, tables and the report's page."""
