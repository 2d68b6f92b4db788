"""The relay: one process per destination that reads the journal, folds events into reports and delivers them. Layer 3.

It never imports Celery, OpenTelemetry or pydantic-settings: what it has to know reaches it as plain values. Workers
touch it only through `launch`, which starts the process and needs neither HTTP client nor SQLite for that.
"""
