"""Engines: the code in a worker that turns weights and a request into an answer."""
