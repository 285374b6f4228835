"""Operations whose outputs are new tokens: embeddings, patch convolutions, projections, sums.

Each function opens a space in the register of tokens (`TokenSpaces`), says which tokens or elements
the new tokens were made of and where they lie in the input, and returns the value of the result.
"""
