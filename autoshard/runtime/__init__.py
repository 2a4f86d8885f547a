"""What emitted code runs on: a mesh of ranks, collectives, parameters, and the training engine.

Emitted layers import :mod:`~autoshard.runtime.ops` (the functions that stand in their graphs) and
:mod:`~autoshard.runtime.parameters` (what they declare); everything else drives them.
"""
