"""Tests of the repository itself: import rules, public names, documentation, packaging."""
