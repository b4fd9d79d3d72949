"""Serving a classifier: the queue in front of an engine (`batcher`), an engine in a process of its own (`process`), a
model with both, for an event loop (`served`), HTTP (`http`), and a server that runs until it is told to (`server`).
"""
