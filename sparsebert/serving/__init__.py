"""Serving a classifier: the queue in front of an engine (`batcher`), an engine in a process of its own (`process`), and
both with a tokenizer, for an event loop (`served`). There is no HTTP yet.
"""
