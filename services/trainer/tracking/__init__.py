"""A run as others see it: its journal, facts, alerts, record, and what other tools hear."""
