"""Serving a classifier: the queue in front of an engine (`batcher`), and an engine in a process of its own (`process`).
There is no server yet.
"""
