"""Serving a classifier. So far the queue in front of the engine (`batcher`); there is no server yet."""
