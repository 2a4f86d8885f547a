"""Measures what the present machine takes: ops, layers, links; see the modules for the parts."""
