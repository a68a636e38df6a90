"""The command line: `app` holds the commands of `datakit`, one module a group; `output` prints what they found.

The only room that calls down into the other packages, and only when a command needs them."""
