"""What must run with several devices or processes; `tests/unit/test_sharding.py` starts it."""
