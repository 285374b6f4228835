"""The checks of `verify`, one function each, and their report.

Each check compares what a capture says of a model (attention, tokens, explained rows, elements that
are read) with derivatives of the model itself. `Subject` is what they check: a method, a batch and
a target. `report` holds the results.
"""
