"""All of Ray: the session, the actors and their pool, the flow of videos through them, and how settings set one up.

What may crash runs in a child process of an actor (`datakit.process.child`), so that a damaged file costs itself and
nothing else. The price: a picture is pickled three times on its way. Its decoder's child sends it to the video worker,
that puts it into Ray's object store, a stage worker takes it out and hands it to the child that runs the stage. At 640
pixels and three pictures a clip that is about 2 MB each time, against seconds of decoding; stages without a child
(language models, encoders) save the last one, and the driver only moves references.
"""
