"""The engine: from one captured forward pass and one score to relevance per token.

`backward` runs the backward pass of a score and hands the attention map of each call to
`row_propagation` (only the explained rows) or `full_propagation` (whole matrices), which apply
`equations`. The page README.md of this folder has the data flow, shapes and invariants.
"""
