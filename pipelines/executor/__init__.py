"""All of Ray: the session, the actors and their pool, and the flow of items through them."""
