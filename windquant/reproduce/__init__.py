"""Reproducing a result elsewhere: sending it, getting it, recomputing it, and telling how it came about."""
