"""Random small transformer programs, and what their relevance must be, without the package.

`generate.draw(seed)` builds a program: an ordinary float64 module, its inputs and a target. Beside
its ordinary `forward`, every part of a program has `follow`, which computes the same numbers in the
plainest form and writes on a `tape` who attended to whom: the generator built the program, so it
knows where each token went. `reference` makes relevance of that tape by equations 5 to 11.
`compare` sets the package's maps beside it.

`python -m laws.random_programs --seeds 600`, with `tests` on the path, prints a table of the
outcomes.
"""
