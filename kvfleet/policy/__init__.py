"""Policy algorithms: conditions, PII, residency, tenants."""
