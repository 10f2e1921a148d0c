"""Engines the bench times, each in a process of its own that speaks one protocol.

Imports nothing, as `bench` does.
"""
