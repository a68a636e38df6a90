"""The only code that opens a container or converts colour.

`container` opens sources, `probe` reads their facts, `decode` yields frames (all of them, a span, or
chosen times), `picture` and `colour` turn a frame into arrays, `cut` and `write` make clip files.
"""
