"""Which token each element of an activation belongs to: abstract interpretation of a forward pass.

The page README.md of this folder has the domain, its order and the law that every rule obeys.
"""
