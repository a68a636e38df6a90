"""The only code that opens a container or converts colour.

`container` opens sources, `probe` reads their metadata, `reader` yields frames (all of them, or a span),
`sparse_reader` frames at chosen times, `frame` and `color` turn a frame into arrays, `cut` and `writer` make clip
files.
"""
