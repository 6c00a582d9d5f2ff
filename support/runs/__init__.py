"""A run folder of train.py, and the flags of both scripts."""
